// SPDX-License-Identifier: MIT

// Part of the battery of row_battery.hpp: batches that count for little, and calls that are wrong.
// Also linked into the [threads] tests.

#include "support/row_battery.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/row_judge.hpp"

namespace perdita_tests {

using perdita::reduction;

template <class T> void check_edges(const row_descriptor<T>& d) {
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", edges");
    random_numbers random(88);
    const index cols = 5;
    const auto kinds = ordinary_kinds(d, setting, cols, 10);
    if (kinds.empty())
      continue;
    const problem<T> p = make_problem(d, setting, cols, kinds, kept::compute, random);
    for (const reduction how : reductions) {
      const auto loss = d.make(setting, cols, how);
      for (const layout l : {layout::packed, layout::column_major}) {
        arrangement a;
        a.scores = a.gradient = l;
        const outcome<T> empty = run(*loss, p.rows_only(0, 0), a);
        t.require(same(empty.total, T(0)), "the value of an empty batch");
        t.require(empty.trespass.empty(), "an empty batch touched" + empty.trespass);

        problem<T> none = p;
        std::string why = "ignored";
        for (const bool by_weight : {false, true}) {
          if (by_weight) {
            none = p;
            none.row_weights.assign(static_cast<std::size_t>(p.rows), T(0));
          } else if (d.soft(setting)) {
            continue;
          } else {
            none.labels.assign(static_cast<std::size_t>(p.rows), row_descriptor<T>::ignore_index);
          }
          const outcome<T> got = run(*loss, none, a);
          t.require(same(got.total, T(0)), "the value where no row counts");
          for (const T g : got.gradient)
            t.require(same(g, T(0)), "the gradient where no row counts");
          for (const auto& v : got.by_products)
            for (const T x : v)
              t.require(same(x, T(0)), "a by-product where no row counts");
          for (const unsigned char h : got.hits)
            t.require(h == 0, "a hit where no row counts");
          problem<T> more = none;
          more.before.assign(p.scores.size(), T(1.5));
          for (const T g : run(*loss, more, a).gradient)
            t.require(same(g, T(1.5)), "the accumulated gradient where no row counts");
        }

        // A weight of zero, and being ignored, are removal.
        problem<T> kept_rows = p.rows_only(0, 0), weighted = p, ignored = p;
        weighted.row_weights.assign(static_cast<std::size_t>(p.rows), T(1));
        for (index r = 0; r < p.rows; ++r) {
          if (r % 3 == 1) {
            weighted.row_weights[static_cast<std::size_t>(r)] = 0;
            if (!d.soft(setting))
              ignored.labels[static_cast<std::size_t>(r)] = row_descriptor<T>::ignore_index;
            continue;
          }
          const problem<T> one = p.rows_only(r, 1);
          ++kept_rows.rows;
          kept_rows.scores.insert(kept_rows.scores.end(), one.scores.begin(), one.scores.end());
          kept_rows.soft.insert(kept_rows.soft.end(), one.soft.begin(), one.soft.end());
          kept_rows.labels.insert(kept_rows.labels.end(), one.labels.begin(), one.labels.end());
        }
        const outcome<T> removed = run(*loss, kept_rows, a);
        const auto close = [&](const outcome<T>& got, const std::string& what) {
          t.compare(removed.total, 2 * std::numeric_limits<T>::epsilon() * std::abs(removed.total),
                    got.total, "total", [&] { return what; });
          std::size_t i = 0;
          for (index r = 0; r < p.rows; ++r)
            for (index c = 0; c < cols; ++c) {
              const T g = got.gradient[static_cast<std::size_t>(r * cols + c)];
              if (r % 3 == 1)
                t.require(same(g, T(0)), what + ": the gradient of a removed row");
              else
                t.require(same(g, removed.gradient[i++]), what + ": the gradient of another row");
            }
        };
        close(run(*loss, weighted, a), "of weight 0");
        if (d.soft(setting))
          continue;
        close(run(*loss, ignored, a), "ignored");
        // Whichever of eight rows it is, and also where nobody asks for the values.
        for (std::size_t r = 0; r < 8; ++r) {
          problem<T> eight = p.rows_only(0, 8);
          eight.labels[r] = row_descriptor<T>::ignore_index;
          arrangement unasked = a;
          unasked.by_products = 0;
          t.require(same(run(*loss, eight, a).total, run(*loss, eight, unasked).total),
                    "the total where row " + std::to_string(r) + " of eight is ignored");
        }
      }
    }
    t.check();
  }
}

namespace {

template <class T> struct misuse {
  const char* what;
  void (*spoil)(invocation<T>&, void* elsewhere);
  std::vector<const char*> says;
};

} // namespace

template <class T> void check_errors(const row_descriptor<T>& d) {
  using call_type = invocation<T>;
  static std::int64_t wrong_labels[4];
  static T some[16];
  const auto relabel = [](call_type& c, std::int64_t label) {
    std::copy_n(c.labels, 4, wrong_labels);
    wrong_labels[2] = label;
    c.labels = wrong_labels;
  };
  static const auto relabel_with = relabel;
  const std::vector<misuse<T>> all{
      {"gradient rows",
       [](call_type& c, void*) { c.gradient_at.rows = c.gradient_at.plane_rows = 3; },
       {"gradient rows", "3", "4"}},
      {"gradient columns",
       [](call_type& c, void*) { c.gradient_at.cols = 6; },
       {"gradient columns", "6", "5"}},
      {"too few labels", [](call_type& c, void*) { c.label_count = 3; }, {"labels", "3", "4"}},
      {"too many labels", [](call_type& c, void*) { c.label_count = 5; }, {"labels", "5", "4"}},
      {"label -1", [](call_type& c, void*) { relabel_with(c, -1); }, {"labels[2]", "-1", "0 to 4"}},
      {"label = classes",
       [](call_type& c, void*) { relabel_with(c, 5); },
       {"labels[2]", "5", "0 to 4", "-7"}},
      {"label INT_MIN",
       [](call_type& c, void*) { relabel_with(c, INT32_MIN); },
       {"labels[2]", "-2147483648"}},
      {"label INT64_MIN",
       [](call_type& c, void*) { relabel_with(c, INT64_MIN); },
       {"labels[2]", "-9223372036854775808"}},
      {"label INT64_MAX",
       [](call_type& c, void*) { relabel_with(c, INT64_MAX); },
       {"labels[2]", "9223372036854775807"}},
      {"row weights",
       [](call_type& c, void*) {
         c.options.row_weights = {some, 3};
       },
       {"row_weights", "3", "4"}},
      {"upstream",
       [](call_type& c, void*) {
         c.options.upstream = {some, 5};
       },
       {"upstream", "5", "4"}},
      {"values",
       [](call_type& c, void*) {
         c.options.values = {some, 5};
       },
       {"values", "5", "4"}},
      {"log-sum-exp",
       [](call_type& c, void*) {
         c.options.log_sum_exp = {some, 3};
       },
       {"log_sum_exp", "3", "4"}},
      {"log-probability",
       [](call_type& c, void*) {
         c.options.target_log_probability = {some, 1};
       },
       {"target_log_probability", "1", "4"}},
      {"entropy",
       [](call_type& c, void*) {
         c.options.entropy = {some, 2};
       },
       {"entropy", "2", "4"}},
      {"penalty",
       [](call_type& c, void*) {
         c.options.penalty = {some, 2};
       },
       {"penalty", "2", "4"}},
      {"hits",
       [](call_type& c, void* p) {
         c.options.hits = {static_cast<unsigned char*>(p), 7};
       },
       {"hits", "7", "4"}},
      {"log-sum-exp of a loss without softmax",
       [](call_type& c, void*) {
         c.options.log_sum_exp = {some, 4};
       },
       {"by-product", "softmax"}},
      {"normaliser -1",
       [](call_type& c, void*) { c.options.normaliser = -1; },
       {"normaliser", "-1"}},
      {"normaliser NaN",
       [](call_type& c, void*) { c.options.normaliser = std::nan(""); },
       {"normaliser", "nan"}},
      {"normaliser inf",
       [](call_type& c, void*) { c.options.normaliser = HUGE_VAL; },
       {"normaliser", "inf"}},
      {"overlapping gradient",
       [](call_type& c, void*) {
         c.gradient = const_cast<T*>(static_cast<const T*>(c.scores) + 1);
       },
       {"gradient", "scores", "overlap"}},
      {"in place with other strides",
       [](call_type& c, void*) {
         c.gradient = const_cast<void*>(c.scores);
         c.gradient_at.row_stride = 1, c.gradient_at.col_stride = 4;
       },
       {"gradient", "scores", "overlap"}},
      {"accumulate in place",
       [](call_type& c, void*) {
         c.gradient = const_cast<void*>(c.scores);
         c.options.accumulate = true;
       },
       {"accumulate", "true"}},
      {"no columns",
       [](call_type& c, void*) { c.scores_at.cols = c.gradient_at.cols = c.soft_at.cols = 0; },
       {"0"}},
      {"soft rows",
       [](call_type& c, void*) { c.soft_at.rows = c.soft_at.plane_rows = 3; },
       {"target rows", "3", "4"}},
      {"soft columns",
       [](call_type& c, void*) { c.soft_at.cols = 4; },
       {"target columns", "4", "5"}},
      {"gradient over the target",
       [](call_type& c, void*) { c.gradient = const_cast<T*>(static_cast<const T*>(c.soft) + 1); },
       {"gradient", "target"}},
  };
  for (const int setting : d.few_settings()) {
    tally t(title(d, setting) + ", errors");
    const bool soft = d.soft(setting);
    for (const misuse<T>& m : all) {
      const std::string what = m.what;
      const bool about_soft = what.find("soft") != what.npos || what.find("target") != what.npos;
      if (soft ? what.find("label") != what.npos : about_soft)
        continue;
      if (what.find("without softmax") != what.npos &&
          d.make(setting, 5, reduction::mean)->has_softmax())
        continue;
      for (const bool column_major : {false, true}) {
        std::vector<T> scores(32, T(0.5)), targets(32, T(0.2)), gradient(32, T(-77)),
            values(4, T(-77)), other(8, T(-77));
        const std::vector<std::int64_t> labels{0, 4, 1, 3};
        call_type c;
        c.scores = scores.data();
        c.scores_at = {4, 5, 5, 1, 4, 0};
        if (column_major)
          c.scores_at = {4, 5, 1, 4, 4, 0};
        c.gradient_at = c.soft_at = c.scores_at;
        c.labels = labels.data();
        c.label_count = 4;
        if (soft)
          c.soft = targets.data();
        c.gradient = gradient.data();
        c.options.values = values;
        if (column_major && what == "in place with other strides")
          continue;
        m.spoil(c, other.data());
        std::string message;
        try {
          (void)(*d.make(setting, 5, reduction::mean))(c);
          message = "(nothing was thrown)";
        } catch (const std::invalid_argument& e) {
          message = e.what();
        } catch (const std::exception& e) {
          message = std::string("(not an invalid_argument) ") + e.what();
        }
        t.require(message.find("perdita::" + d.name() + ": ") == 0,
                  what + ": \"" + message + "\" does not begin with the loss");
        for (const char* part : m.says)
          t.require(message.find(part) != message.npos,
                    what + ": \"" + message + "\" does not say \"" + part + "\"");
        t.require(message.find("expected") != message.npos,
                  what + ": \"" + message + "\" does not say what is expected");
        const auto untouched = [](const std::vector<T>& v, T x) {
          return std::all_of(v.begin(), v.end(), [x](T y) { return y == x; });
        };
        t.require(untouched(scores, T(0.5)) && untouched(targets, T(0.2)) &&
                      untouched(gradient, T(-77)) && untouched(values, T(-77)) &&
                      untouched(other, T(-77)),
                  what + ": something was written");
      }
    }
    t.check();
  }
}

template void check_edges(const row_descriptor<float>&);
template void check_edges(const row_descriptor<double>&);
template void check_errors(const row_descriptor<float>&);
template void check_errors(const row_descriptor<double>&);

} // namespace perdita_tests
