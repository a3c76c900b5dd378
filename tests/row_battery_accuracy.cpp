// SPDX-License-Identifier: MIT

// Part of the battery of row_battery.hpp: right numbers. Also linked into the [threads] tests.

#include "support/row_battery.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/row_judge.hpp"

namespace perdita_tests {

using perdita::reduction;

template <class T> void check_accuracy(const row_descriptor<T>& d) {
  for (int setting = 0; setting < d.settings(); ++setting) {
    tally t(title(d, setting));
    random_numbers random(static_cast<std::uint64_t>(setting) + 1);
    for (const index cols : {1, 2, 3, 17, 100}) {
      const std::vector<row_kind> kinds = legal_kinds(d, setting, cols);
      if (kinds.empty())
        continue;
      problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      const std::vector<row_expectation> rows = expect_rows(d, setting, p);
      std::vector<bool> ordinary;
      for (const row_kind kind : kinds)
        ordinary.push_back(is_ordinary(kind) && cols > 1);
      for (const reduction how : reductions) {
        const auto loss = d.make(setting, cols, how);
        judge(d, setting, how, p, rows, run(*loss, p, {}), ordinary, t);
        arrangement everything;
        everything.by_products = 0x3F;
        judge(d, setting, how, p, rows, run(*loss, p, everything), ordinary, t);
      }
      problem<T> q = p;
      add_weights(q, random);
      q.scale = static_cast<T>(-0.375);
      for (const reduction how : reductions) {
        const auto loss = d.make(setting, cols, how);
        judge(d, setting, how, q, rows, run(*loss, q, {}), ordinary, t);
      }
      ignore_some(q);
      q.upstream.clear();
      for (const double normaliser : {0.0, 12.5}) {
        q.normaliser = normaliser;
        const auto loss = d.make(setting, cols, reduction::mean);
        judge(d, setting, reduction::mean, q, rows, run(*loss, q, {}), ordinary, t);
      }
      q.row_weights.clear();
      q.normaliser = 0;
      const auto loss = d.make(setting, cols, reduction::mean);
      judge(d, setting, reduction::mean, q, rows, run(*loss, q, {}), ordinary, t);
    }
    t.report<T>(d.name());
    t.check();
  }
}

template <class T> void check_shapes(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", shapes");
    random_numbers random(77);
    for (const index cols : {1,   2,   3,   7,   8,    15,   16,   17,   31,   33,
                             100, 511, 512, 513, 1000, 1024, 1025, 2049, 5000, 65537}) {
      const index distinct = cols < 100 ? 17 : cols < 10000 ? 3 : 1;
      const std::vector<row_kind> kinds = ordinary_kinds(d, setting, cols, distinct);
      if (kinds.empty())
        continue;
      const problem<T> pool = make_problem(d, setting, cols, kinds, kept::compute, random);
      const std::vector<row_expectation> expected = expect_rows(d, setting, pool);
      for (const index rows : {1, 2, 3, 8, 9, 17}) {
        if (cols > (rows == 3 || rows == 17 ? 3000 : rows == 1 ? 100000 : 500))
          continue;
        // Fewer distinct rows than rows: in turn, so that each is met in several places.
        problem<T> p = pool.rows_only(0, 0);
        p.rows = rows;
        std::vector<row_expectation> here;
        for (index r = 0; r < rows; ++r) {
          const problem<T> one = pool.rows_only(r % distinct, 1);
          p.scores.insert(p.scores.end(), one.scores.begin(), one.scores.end());
          p.soft.insert(p.soft.end(), one.soft.begin(), one.soft.end());
          p.labels.insert(p.labels.end(), one.labels.begin(), one.labels.end());
          here.push_back(expected[static_cast<std::size_t>(r % distinct)]);
        }
        const std::vector<bool> ordinary(static_cast<std::size_t>(rows), cols > 1);
        const auto loss = d.make(setting, cols, reduction::mean);
        const outcome<T> row_major = run(*loss, p, {});
        judge(d, setting, reduction::mean, p, here, row_major, ordinary, t);
        if (rows == 3) {
          arrangement everything;
          everything.by_products = 0x3F;
          judge(d, setting, reduction::mean, p, here, run(*loss, p, everything), ordinary, t);
        }
        arrangement columns;
        columns.scores = columns.gradient = layout::column_major;
        t.identical(row_major, run(*loss, p, columns),
                    "column-major " + std::to_string(rows) + " x " + std::to_string(cols));
        columns.in_place = true;
        t.identical(row_major, run(*loss, p, columns),
                    "column-major in place " + std::to_string(rows) + " x " + std::to_string(cols));
        arrangement in_place;
        in_place.in_place = true;
        t.identical(row_major, run(*loss, p, in_place),
                    "in place " + std::to_string(rows) + " x " + std::to_string(cols));
      }
    }
    t.report<T>(d.name());
    t.check();
  }
}

template <class T>
void check_special(const row_descriptor<T>& d, const std::vector<special_row>& rows, double slack) {
  tally t(d.name() + (sizeof(T) == 4 ? "<float>" : "<double>") + ", special rows");
  const judged epsilon = std::numeric_limits<T>::epsilon();
  for (const special_row& s : rows) {
    const auto cols = static_cast<index>(s.scores.size());
    const auto loss = d.make(s.setting, cols, reduction::sum);
    for (const index before : {0, 3}) {
      random_numbers random(3);
      const auto kinds = ordinary_kinds(d, s.setting, cols, before > 0 ? 9 : 1);
      if (static_cast<index>(kinds.size()) <= before)
        continue;
      problem<T> p = make_problem(d, s.setting, cols, kinds, kept::compute, random);
      for (std::size_t c = 0; c < s.scores.size(); ++c) {
        const std::size_t at = static_cast<std::size_t>(before * cols) + c;
        p.scores[at] = static_cast<T>(s.scores[c]);
        if (!s.soft.empty())
          p.soft[at] = static_cast<T>(s.soft[c]);
      }
      if (s.soft.empty())
        p.labels[static_cast<std::size_t>(before)] = s.label;
      for (const layout l : {layout::packed, layout::column_major})
        for (const bool in_place : {false, true}) {
          arrangement a;
          a.scores = a.gradient = l;
          a.in_place = in_place;
          const outcome<T> got = run(*loss, p, a);
          const std::string where = std::string("(") + s.what + ", " + name_of(l) +
                                    (in_place ? ", in place" : "") + ", setting " +
                                    d.describe(s.setting) + ")";
          const auto near = [&](double expected, T answer, const char* what, index c) {
            t.compare(expected, slack * epsilon * std::max<judged>(std::abs(expected), 1), answer,
                      what, [&] { return std::to_string(c) + " " + where; });
            if (expected == 0)
              t.require(answer == 0,
                        std::string(what) + " " + std::to_string(c) + " is not exactly 0 " + where);
          };
          near(s.value, got.by_products[0][static_cast<std::size_t>(before)], "value", 0);
          if (before == 0)
            near(s.value, got.total, "total", 0);
          for (index c = 0; c < cols; ++c)
            near(s.gradient[static_cast<std::size_t>(c)],
                 got.gradient[static_cast<std::size_t>(before * cols + c)], "gradient", c);
          for (index r = 0; r < p.rows; ++r)
            if (r != before)
              for (index c = 0; c < cols; ++c)
                t.require(std::isfinite(got.gradient[static_cast<std::size_t>(r * cols + c)]),
                          "the gradient of another row " + where);
        }
    }
  }
  t.check();
}

template <class T> void check_differences(const row_descriptor<T>& d) {
  if (sizeof(T) == 4)
    return;
  for (int setting = 0; setting < d.settings(); ++setting) {
    random_numbers random(33);
    for (const reduction how : {reduction::mean, reduction::sum}) {
      const index cols = 5;
      const auto kinds = ordinary_kinds(d, setting, cols, 3);
      if (kinds.empty())
        continue;
      problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      for (index r = 0; r < p.rows; ++r)
        p.row_weights.push_back(static_cast<T>(random.uniform(0.5, 2)));
      const auto loss = d.make(setting, cols, how);
      arrangement value_only;
      value_only.wants_gradient = false;
      value_only.by_products = 0;
      const std::vector<T> gradient = run(*loss, p, {}).gradient;
      const auto value = [&] { return static_cast<double>(run(*loss, p, value_only).total); };
      const auto report = perdita::testing::check_gradient(value, p.scores, gradient);
      INFO(title(d, setting) << ": " << report.message());
      CHECK(report.ok);
      if (d.twice_smooth())
        CHECK(report.unresolved == 0);
    }
  }
}

template <class T> void check_reference(const row_descriptor<T>& d) {
  // Differences of fourth order in 113 bits: truncation about 1e-24, noise about 1e-27 per score.
  const wide step = ldexp(wide(1), -20), tolerance = ldexp(wide(1), -64);
  for (int setting = 0; setting < d.settings(); ++setting) {
    tally t(title(d, setting) + ", reference");
    random_numbers random(55);
    for (const index cols : {2, 5}) {
      const auto kinds = ordinary_kinds(d, setting, cols, 4);
      if (kinds.empty())
        continue;
      const problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      for (index r = 0; r < p.rows; ++r) {
        const row_input row = p.row(r);
        const row_expectation e = d.expect(setting, row);
        for (std::size_t c = 0; c < row.scores.size(); ++c) {
          const auto at = [&](int k) -> wide {
            row_input moved = row;
            moved.scores[c] += step * k;
            return d.expect(setting, moved).value.value;
          };
          const wide slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
          const wide error = size_of(slope - e.gradient[c].value);
          t.require(error <= tolerance, "row " + std::to_string(r) + ", column " +
                                            std::to_string(c) + ": " + text(e.gradient[c].value) +
                                            ", by differences " + text(slope));
          if (!d.sparse())
            t.ordinary(static_cast<judged>(e.gradient[c].value));
        }
      }
    }
    t.check();
  }
}

template <class T> void check_mathematics(const row_descriptor<T>& d) {
  const T epsilon = std::numeric_limits<T>::epsilon();
  for (int setting = 0; setting < d.settings(); ++setting) {
    tally t(title(d, setting) + ", mathematics");
    random_numbers random(66);
    const perdita::loss_traits traits = d.traits(setting);
    t.require(traits.exact_gradient, "the traits disown the gradient, and the differences do not");
    for (const index cols : {2, 6}) {
      const auto kinds = ordinary_kinds(d, setting, cols, 24);
      if (kinds.empty())
        continue;
      const auto loss = d.make(setting, cols, reduction::none);
      const auto values = [&](const problem<T>& p) { return run(*loss, p, {}).by_products[0]; };
      const problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
      const std::vector<T> value = values(p);
      if (traits.nonnegative)
        for (const T v : value)
          t.require(v >= 0, "a value of " + perdita::core::to_text(v) + " below 0");
      if (traits.shift_invariant && sizeof(T) == 8) { // float has no room for the shift
        problem<T> q = p;
        for (T& x : q.scores)
          x += T(1e4);
        const std::vector<T> moved = values(q);
        for (std::size_t r = 0; r < value.size(); ++r)
          t.compare(value[r], 1e5 * epsilon * (1 + std::abs(value[r])), moved[r], "shifted value",
                    [&] { return std::to_string(r); });
      }
      if (traits.convex) { // on the segments between neighbouring rows that have the same target
        problem<T> a = p, middle = p;
        for (std::size_t i = 0; i < p.scores.size(); ++i) {
          a.scores[i] = p.scores[(i + static_cast<std::size_t>(cols)) % p.scores.size()];
          middle.scores[i] = (p.scores[i] + a.scores[i]) / 2;
        }
        const std::vector<T> other = values(a), between = values(middle);
        for (std::size_t r = 0; r < value.size(); ++r)
          t.require(between[r] <= (value[r] + other[r]) / 2 +
                                      16 * epsilon * (1 + std::abs(value[r]) + std::abs(other[r])),
                    "not convex between row " + std::to_string(r) + " and the next");
      }
    }
    t.check();
  }
}

template void check_accuracy(const row_descriptor<float>&);
template void check_accuracy(const row_descriptor<double>&);
template void check_shapes(const row_descriptor<float>&);
template void check_shapes(const row_descriptor<double>&);
template void check_differences(const row_descriptor<float>&);
template void check_differences(const row_descriptor<double>&);
template void check_reference(const row_descriptor<float>&);
template void check_reference(const row_descriptor<double>&);
template void check_mathematics(const row_descriptor<float>&);
template void check_mathematics(const row_descriptor<double>&);
template void check_special(const row_descriptor<float>&, const std::vector<special_row>&, double);
template void check_special(const row_descriptor<double>&, const std::vector<special_row>&, double);

} // namespace perdita_tests
