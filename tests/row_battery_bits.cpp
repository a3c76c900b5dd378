// SPDX-License-Identifier: MIT

// Part of the battery of row_battery.hpp: the same numbers whatever the circumstances. Also linked
// into the [threads] tests.

#include "support/row_battery.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "support/executors.hpp"
#include "support/row_judge.hpp"

namespace perdita_tests {

using perdita::reduction;

template <class T> void check_nan(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", NaN");
    random_numbers random(5);
    for (const index cols : {1, 2, 3, 16, 17, 100, 513, 1025}) {
      const index rows = 9, bad = 4;
      const std::vector<row_kind> kinds = ordinary_kinds(d, setting, cols, rows);
      if (kinds.empty())
        continue;
      const problem<T> good = make_problem(d, setting, cols, kinds, kept::compute, random);
      const auto loss = d.make(setting, cols, reduction::sum);
      arrangement a;
      const outcome<T> clean = run(*loss, good, a);
      std::vector<index> places{0, cols / 2, cols - 1, cols / 16 * 16};
      if (good.soft.empty())
        places.push_back(static_cast<index>(good.labels[bad]));
      for (const index place : places) {
        if (place >= cols)
          continue;
        problem<T> p = good;
        p.scores[static_cast<std::size_t>(bad * cols + place)] =
            std::numeric_limits<T>::quiet_NaN();
        for (const layout l : {layout::packed, layout::column_major}) {
          a.scores = a.gradient = l;
          const outcome<T> got = run(*loss, p, a);
          const std::string where = std::string(name_of(l)) + ", " + std::to_string(cols) +
                                    " columns, NaN in " + std::to_string(place);
          t.require(got.total != got.total, where + ": the sum hides it");
          t.require(got.trespass.empty(), where + " touched" + got.trespass);
          t.require(got.hits.empty() || d.soft(setting) || got.hits[bad] == 0, where + ": a hit");
          for (index r = 0; r < rows; ++r) {
            const auto i = static_cast<std::size_t>(r);
            const T value = got.by_products[0][i];
            t.require(r == bad ? value != value : same(value, clean.by_products[0][i]),
                      where + ": value of row " + std::to_string(r));
            bool right = true;
            for (index c = 0; c < cols; ++c) {
              const auto k = static_cast<std::size_t>(r * cols + c);
              const T g = got.gradient[k];
              right = right && (r == bad ? g != g : same(g, clean.gradient[k]));
            }
            t.require(right, where + ": gradient of row " + std::to_string(r));
          }
          // A row that does not count does not count for this either.
          problem<T> without = p;
          without.row_weights.assign(static_cast<std::size_t>(rows), T(1));
          without.row_weights[bad] = 0;
          const outcome<T> removed = run(*loss, without, a);
          t.require(removed.total == removed.total, where + ": a row of weight 0 counts");
          bool zero = true;
          for (index c = 0; c < cols; ++c)
            zero = zero && same(removed.gradient[static_cast<std::size_t>(bad * cols + c)], T(0));
          t.require(zero, where + ": gradient of a row of weight 0");
        }
      }
    }
    t.check();
  }
}

template <class T> void check_same_bits(const row_descriptor<T>& d) {
  for (int setting = 0; setting < d.settings(); ++setting) {
    const auto few = d.few_settings();
    const bool thorough = std::find(few.begin(), few.end(), setting) != few.end();
    tally t(title(d, setting) + ", bits");
    random_numbers random(9);
    for (const kept storage : {kept::compute, kept::bfloat16, kept::half}) {
      if (storage != kept::compute && (sizeof(T) == 8 || !thorough))
        continue;
      for (const index cols : {1, 2, 7, 16, 33, 515, 1100}) {
        if (!thorough && cols != 33)
          continue;
        if (storage != kept::compute && cols < 33)
          continue;
        // One row of every kind, so that every path is taken beside every other.
        std::vector<row_kind> kinds;
        for (const row_kind kind : legal_kinds(d, setting, cols))
          if (storage != kept::half || kind != row_kind::huge)
            kinds.push_back(kind);
        if (cols > 1000)
          kinds.resize(std::min<std::size_t>(kinds.size(), 6));
        if (kinds.empty())
          continue;
        problem<T> p = make_problem(d, setting, cols, kinds, storage, random);
        add_weights(p, random);
        ignore_some(p);
        const auto loss = d.make(setting, cols, reduction::sum);
        const outcome<T> base = run(*loss, p, {});
        const std::string size = std::to_string(p.rows) + " x " + std::to_string(cols) +
                                 (storage == kept::compute ? ""
                                  : storage == kept::half  ? " half"
                                                           : " bfloat16");
        t.require(base.trespass.empty(), size + ": touched" + base.trespass);

        for (int l = 0; l < static_cast<int>(layout::count); ++l)
          for (const bool in_place : {false, true}) {
            arrangement a;
            a.scores = a.gradient = static_cast<layout>(l);
            a.in_place = in_place;
            a.step = l % 3 == 0 ? 1 : l % 3 == 1 ? 2 : -1;
            t.identical(base, run(*loss, p, a),
                        size + ", " + name_of(a.scores) + (in_place ? ", in place" : ""));
            a.against = l % 2 == 0 ? edge::back : edge::front;
            t.identical(base, run(*loss, p, a),
                        size + ", at the edge of a page, " + name_of(a.scores));
            a.against = l % 2 == 0 ? edge::front : edge::back;
            t.identical(base, run(*loss, p, a),
                        size + ", at the edge of a page, " + name_of(a.scores));
            a.wants_gradient = a.in_place = false;
            t.identical(base, run(*loss, p, a), size + ", value only, " + name_of(a.scores));
          }
        for (const auto& [from, to] : {std::pair(layout::packed, layout::column_major),
                                       std::pair(layout::column_major, layout::packed),
                                       std::pair(layout::padded, layout::inner_2),
                                       std::pair(layout::channels_first, layout::packed)}) {
          arrangement a;
          a.scores = from;
          a.gradient = to;
          t.identical(base, run(*loss, p, a), size + ", " + name_of(from) + " to " + name_of(to));
        }
        for (std::size_t offset = 1; offset < 16; ++offset) {
          arrangement a;
          a.offset = offset;
          a.in_place = offset % 2 == 0;
          t.identical(base, run(*loss, p, a), size + ", offset " + std::to_string(offset));
        }
        for (const unsigned wanted : {0U, 1U, 2U, 4U, 8U, 16U, 32U, 7U, 0x3FU})
          for (const bool wants_gradient : {false, true}) {
            arrangement a;
            a.by_products = wanted;
            a.wants_gradient = wants_gradient;
            t.identical(base, run(*loss, p, a),
                        size + ", by-products " + std::to_string(wanted) +
                            (wants_gradient ? "" : ", value only"));
          }
        if (d.soft(setting))
          for (int l = 0; l < static_cast<int>(layout::count); ++l) {
            arrangement a;
            a.scores = static_cast<layout>(l);
            a.over_target = true;
            t.identical(base, run(*loss, p, a),
                        size + ", over the soft targets, " + name_of(a.scores));
          }
        for (const layout l :
             {layout::packed, layout::column_major, layout::inner_2}) { // accumulate
          problem<T> q = p;
          for (std::size_t i = 0; i < p.scores.size(); ++i)
            q.before.push_back(rounded(storage, static_cast<T>(random.uniform(-3, 3))));
          outcome<T> sum = base;
          if (storage ==
              kept::compute) { // 16-bit: the sum is rounded once, which base does not show
            for (std::size_t i = 0; i < sum.gradient.size(); ++i)
              if (!p.ignored(static_cast<index>(i) / cols))
                sum.gradient[i] = q.before[i] + base.gradient[i];
              else
                sum.gradient[i] = q.before[i];
          } else {
            problem<T> wider = q;
            wider.storage = kept::compute;
            sum = run(*loss, wider, {});
            for (T& g : sum.gradient)
              g = rounded(storage, g);
          }
          arrangement a;
          a.scores = a.gradient = l;
          t.identical(sum, run(*loss, q, a), size + ", accumulate, " + name_of(l));
        }
        for (const layout l : {layout::packed, layout::column_major}) // place in the batch
          for (index r = 0; r < p.rows; r += 1 + p.rows / 7) {
            arrangement a;
            a.scores = a.gradient = l;
            const outcome<T> alone = run(*loss, p.rows_only(r, 1), a);
            outcome<T> part = base;
            const auto i = static_cast<std::ptrdiff_t>(r);
            part.gradient.assign(base.gradient.begin() + i * cols,
                                 base.gradient.begin() + (i + 1) * cols);
            for (std::size_t k = 0; k < 5; ++k)
              if (!base.by_products[k].empty())
                part.by_products[k] = {base.by_products[k][static_cast<std::size_t>(i)]};
            if (!base.hits.empty())
              part.hits = {base.hits[static_cast<std::size_t>(i)]};
            t.identical(part, alone,
                        size + ", " + name_of(l) + ", row " + std::to_string(r) + " alone", false);
          }
      }
    }
    t.check();
  }
}

template <class T> void check_storage(const row_descriptor<T>& d) {
  if (sizeof(T) == 8)
    return;
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", storage");
    random_numbers random(21);
    for (const kept storage : {kept::bfloat16, kept::half})
      for (const index cols : {1, 3, 16, 100, 513, 1030}) {
        std::vector<row_kind> kinds;
        for (const row_kind kind : legal_kinds(d, setting, cols))
          if (kind != row_kind::huge || storage != kept::half)
            kinds.push_back(kind);
        if (kinds.empty())
          continue;
        if (cols > 200)
          kinds.resize(std::min<std::size_t>(kinds.size(), 9));
        problem<T> p = make_problem(d, setting, cols, kinds, storage, random);
        problem<T> wider = p;
        wider.storage = kept::compute;
        for (const reduction how : reductions) {
          const auto loss = d.make(setting, cols, how);
          outcome<T> expected = run(*loss, wider, {});
          for (T& g : expected.gradient)
            g = rounded(storage, g);
          for (const layout l : {layout::packed, layout::column_major, layout::inner_2})
            for (const bool in_place : {false, true}) {
              arrangement a;
              a.scores = a.gradient = l;
              a.in_place = in_place;
              t.identical(expected, run(*loss, p, a),
                          (storage == kept::half ? "half, " : "bfloat16, ") + std::to_string(cols) +
                              " columns, " + name_of(l) + (in_place ? ", in place" : ""));
            }
        }
      }
    t.check();
  }
}

template <class T> void check_threads(const row_descriptor<T>& d, bool thorough) {
  using shape = std::pair<index, index>;
  using crew = std::pair<unsigned, task_order>;
  const std::vector<shape> shapes = thorough
                                        ? std::vector<shape>{{1500, 130}, {70, 3000}, {9000, 3}}
                                        : std::vector<shape>{{70, 3000}};
  std::vector<crew> crews{{3, task_order::shuffled}, {16, task_order::reversed}};
  if (thorough)
    crews.insert(crews.end(),
                 {{1, task_order::reversed}, {2, task_order::forward}, {7, task_order::shuffled}});
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", threads");
    random_numbers random(101);
    for (const auto& [rows, cols] : shapes) {
      const auto few = ordinary_kinds(d, setting, cols, 40);
      if (few.empty())
        continue;
      const problem<T> pool = make_problem(d, setting, cols, few, kept::compute, random);
      problem<T> p = pool.rows_only(0, 0);
      p.rows = rows;
      for (index r = 0; r < rows; ++r) {
        const auto from = static_cast<index>(random.below(40));
        p.scores.insert(p.scores.end(), pool.scores.begin() + from * cols,
                        pool.scores.begin() + (from + 1) * cols);
        if (!pool.soft.empty())
          p.soft.insert(p.soft.end(), pool.soft.begin() + from * cols,
                        pool.soft.begin() + (from + 1) * cols);
        else
          p.labels.push_back(pool.labels[static_cast<std::size_t>(from)]);
      }
      add_weights(p, random);
      const auto loss = d.make(setting, cols, reduction::mean);
      for (const layout l : {layout::packed, layout::column_major}) {
        arrangement a;
        a.scores = a.gradient = l;
        const outcome<T> base = run(*loss, p, a);
        const std::string size =
            std::to_string(rows) + " x " + std::to_string(cols) + ", " + name_of(l);
        a.run_on = {};
        t.identical(base, run(*loss, p, a), size + ", the default");
        perdita::workspace memory;
        a.memory = &memory;
        for (const auto& [threads, order] : crews) {
          const threads_executor many(threads, order);
          a.run_on = many;
          a.in_place = order == task_order::shuffled;
          t.identical(base, run(*loss, p, a), size + ", " + std::to_string(threads) + " threads");
        }
        // One thread after the other, more tasks than it says: nothing may depend on who runs what.
        const one_thread_executor one(task_order::shuffled);
        a.run_on = one;
        t.identical(base, run(*loss, p, a), size + ", one thread out of order");
      }
      // One loss, used by several threads at once.
      const outcome<T> base = run(*loss, p, {});
      std::vector<outcome<T>> results(4);
      const threads_executor many(4, task_order::forward);
      const auto call = [&](std::size_t i) { results[i] = run(*loss, p, {}); };
      many(4, call);
      for (const outcome<T>& r : results)
        t.identical(base, r, "four calls at once");
    }
    t.check();
  }
}

template void check_nan(const row_descriptor<float>&);
template void check_nan(const row_descriptor<double>&);
template void check_same_bits(const row_descriptor<float>&);
template void check_same_bits(const row_descriptor<double>&);
template void check_storage(const row_descriptor<float>&);
template void check_storage(const row_descriptor<double>&);
template void check_threads(const row_descriptor<float>&, bool);
template void check_threads(const row_descriptor<double>&, bool);

} // namespace perdita_tests
