// SPDX-License-Identifier: MIT
#pragma once

// Batches of rows of every kind, what the reference says of them, and the comparison with what a
// loss answered.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "accuracy.hpp"
#include "catch.hpp"
#include "numbers.hpp"
#include "row_run.hpp"

namespace perdita_tests {

// ---- how answers are judged

template <class T> double ulps(judged expected, T got) {
  if (!std::isfinite(expected) || expected == 0 || !std::isfinite(got))
    return 0;
  const int exponent = std::max(std::ilogb(expected) + 1, std::numeric_limits<T>::min_exponent);
  return static_cast<double>(
      std::ldexp(std::abs(judged(got) - expected), std::numeric_limits<T>::digits - exponent));
}

/// Counts comparisons and keeps the worst one.
class tally {
public:
  explicit tally(std::string title) : title_(std::move(title)) {}

  template <class T, class Where>
  void compare(judged expected, judged allowed, T got, const char* what, Where where) {
    ++compared_;
    bool ok = true;
    if (std::isnan(expected)) {
      ok = got != got;
    } else if (!std::isfinite(expected)) {
      ok = got == (expected > 0 ? std::numeric_limits<T>::infinity()
                                : -std::numeric_limits<T>::infinity());
    } else if (!std::isfinite(got)) {
      // Overflow is rounding where it is as near as any number of the type.
      ok = std::abs(expected) + allowed >= judged(std::numeric_limits<T>::max()) && got == got &&
           (got > 0) == (expected > 0);
    } else {
      const judged error = std::abs(judged(got) - expected);
      ok = error <= allowed;
      if (error > 0) {
        const auto ratio = static_cast<double>(error / allowed);
        if (!(ratio <= worst_)) {
          worst_ = ratio;
          worst_at_ = std::string(what) + " " + where();
        }
      }
    }
    if (!ok && wrong_++ < shown())
      complaints_ += "\n  " + std::string(what) + " " + where() + ": " +
                     perdita::core::to_text(got) + ", expected " + text(expected) + " +- " +
                     text(allowed);
  }
  void require(bool ok, const std::string& what) {
    ++compared_;
    if (!ok && wrong_++ < shown())
      complaints_ += "\n  " + what;
  }
  template <class T>
  void identical(const outcome<T>& expected, const outcome<T>& got, const std::string& what,
                 bool totals = true) {
    const auto& e = expected;
    if (totals)
      require(same(e.total, got.total), what + ": value " + perdita::core::to_text(got.total) +
                                            ", expected " + perdita::core::to_text(e.total));
    if (!got.gradient.empty())
      require(same(e.gradient, got.gradient),
              what + ": gradient" + first(e.gradient, got.gradient));
    for (std::size_t k = 0; k < 5; ++k)
      if (!got.by_products[k].empty() && !e.by_products[k].empty())
        require(same(e.by_products[k], got.by_products[k]),
                what + ": " + by_product_names[k] + first(e.by_products[k], got.by_products[k]));
    if (!got.hits.empty())
      require(e.hits == got.hits, what + ": hits");
    require(got.trespass.empty(), what + " touched" + got.trespass);
  }
  /// Among ordinary rows most answers are not zero; where they are, the test tests nothing.
  void ordinary(judged expected) {
    ++ordinary_;
    if (expected == 0)
      ++zeros_;
  }
  enum measure { of_value, of_slope };
  /// In ulp, but where terms cancel: what they leave may be all error.
  template <class T> void add_ulp(measure what, judged expected, judged allowed, T got) {
    if (allowed <= 256 * judged(std::numeric_limits<T>::epsilon()) * std::abs(expected))
      ulp_[what] = std::max(ulp_[what], ulps(expected, got));
  }

  /// Of a loss in the type T.
  template <class T> void report(const std::string& loss) const {
    report_accuracy<T>(loss, "(" + title_ + "; worst: " + worst_at_ + ")", in_ulp_of_rows,
                       {ulp_[of_value], ulp_[of_slope], worst_});
  }
  void check() const {
    INFO(title_ << ": " << wrong_ << " of " << compared_ << " comparisons failed" << complaints_);
    CHECK(wrong_ == 0);
    CHECK(compared_ > 0);
    CHECK(10 * zeros_ <= 3 * ordinary_);
  }

private:
  static std::size_t shown() { return reporting() ? 100 : 5; }
  template <class T>
  static std::string first(const std::vector<T>& expected, const std::vector<T>& got) {
    if (expected.size() != got.size())
      return ": " + std::to_string(got.size()) + " numbers, not " + std::to_string(expected.size());
    for (std::size_t i = 0; i < got.size(); ++i)
      if (!same(expected[i], got[i])) {
        char line[128];
        std::snprintf(line, sizeof line, "[%zu] is %a, expected %a", i, static_cast<double>(got[i]),
                      static_cast<double>(expected[i]));
        return line;
      }
    return "";
  }

  std::string title_, complaints_, worst_at_;
  std::size_t compared_ = 0, wrong_ = 0, ordinary_ = 0, zeros_ = 0;
  double worst_ = 0, ulp_[2] = {-1, -1};
};

/// A slope below this share of the largest one of its row may be exactly zero.
template <class T> judged negligible_share() {
  return std::ldexp(judged(1), sizeof(T) == 4 ? -99 : -990);
}

template <class T>
void judge(const row_descriptor<T>& d, int setting, perdita::reduction how, const problem<T>& p,
           const std::vector<row_expectation>& rows, const outcome<T>& got,
           const std::vector<bool>& ordinary, tally& t) {
  const judged epsilon = std::numeric_limits<T>::epsilon();
  const judged smallest = std::numeric_limits<T>::min();
  judged weights = 0;
  const auto weight_of = [&](index r) {
    return p.row_weights.empty() ? judged(1) : judged(p.row_weights[static_cast<std::size_t>(r)]);
  };
  for (index r = 0; r < p.rows; ++r)
    if (!p.ignored(r))
      weights +=
          weight_of(r) *
          (d.soft(setting)
               ? judged(1)
               : static_cast<judged>(d.label_weight(
                     setting, static_cast<index>(p.labels[static_cast<std::size_t>(r)]), p.cols)));
  judged share = 1;
  if (how == perdita::reduction::mean)
    share = p.normaliser != 0 ? 1 / judged(p.normaliser) : weights != 0 ? 1 / weights : 0;

  judged total = 0, slack = 0;
  for (index r = 0; r < p.rows; ++r) {
    const auto i = static_cast<std::size_t>(r);
    const row_expectation& e = rows[i];
    const bool counts = !p.ignored(r);
    const judged weight = weight_of(r);
    const auto value = static_cast<judged>(e.value.value);
    const judged value_slack = e.value.slack + std::abs(value);
    const auto here = [&] {
      return "of row " + std::to_string(r) + " of " + std::to_string(p.rows) + " x " +
             std::to_string(p.cols);
    };
    if (counts && share != 0) {
      total += value * weight * share;
      slack += value_slack * weight * share;
    }
    const auto by_product = [&](std::size_t k, const expected_number& x, judged factor) {
      if (got.by_products[k].empty() || !x.reported)
        return;
      const auto expected = static_cast<judged>(x.value);
      const judged of_x = x.slack + std::abs(expected);
      t.compare(counts ? expected * factor : 0, counts ? of_x * factor * epsilon + smallest : 0,
                got.by_products[k][i], by_product_names[k], here);
    };
    by_product(0, e.value, weight);
    by_product(1, e.log_sum_exp, 1);
    by_product(2, e.target_log_probability, 1);
    by_product(3, e.entropy, 1);
    by_product(4, e.penalty, 1);
    if (!got.hits.empty() && e.hit_reported)
      t.require(got.hits[i] == (counts && e.hit ? 1 : 0), "hit of row " + std::to_string(r));
    if (ordinary[i] && counts && !got.by_products[0].empty()) {
      t.add_ulp(t.of_value, value * weight, value_slack * weight * epsilon, got.by_products[0][i]);
    }

    judged factor = counts ? weight * share * judged(p.scale) : 0;
    if (!p.upstream.empty())
      factor *= judged(p.upstream[i]);
    if (got.gradient.empty())
      continue;
    std::vector<judged> slopes;
    judged most = 0;
    for (const expected_number& g : e.gradient) {
      slopes.push_back(static_cast<judged>(g.value));
      if (std::isfinite(slopes.back()))
        most = std::max(most, std::abs(slopes.back()));
    }
    const judged floor = most * negligible_share<T>();
    for (index c = 0; c < p.cols; ++c) {
      const auto k = static_cast<std::size_t>(c);
      const judged size = std::abs(slopes[k]), expected = counts ? slopes[k] * factor : 0;
      // A share that leaves the normal range is flushed before it meets the last factor.
      const judged allowed =
          counts ? ((e.gradient[k].slack + size * 2) * epsilon + floor) * std::abs(factor) +
                       2 * smallest
                 : 0;
      const T answer = got.gradient[static_cast<std::size_t>(r * p.cols + c)];
      t.compare(expected, allowed, answer, "gradient",
                [&] { return here() + ", column " + std::to_string(c); });
      if (ordinary[i] && counts && share != 0) {
        if (!d.sparse())
          t.ordinary(expected);
        if (size > most / 1000)
          t.add_ulp(t.of_slope, expected, allowed, answer);
      }
    }
  }
  if (how != perdita::reduction::none)
    t.compare(total, (slack + std::abs(total)) * epsilon + smallest, got.total, "total",
              [&] { return "over " + std::to_string(p.rows) + " x " + std::to_string(p.cols); });
}

// ---- problems

template <class T>
problem<T> make_problem(const row_descriptor<T>& d, int setting, index cols,
                        const std::vector<row_kind>& kinds, kept storage, random_numbers& random) {
  problem<T> p;
  p.rows = static_cast<index>(kinds.size());
  p.cols = cols;
  p.storage = storage;
  for (const row_kind kind : kinds) {
    const auto label = static_cast<index>(random.below(static_cast<std::uint64_t>(cols)));
    for (const double x : make_scores(kind, cols, label, random))
      p.scores.push_back(rounded(storage, static_cast<T>(x)));
    if (d.soft(setting))
      for (const double q : make_distribution(kind, cols, label, random))
        p.soft.push_back(rounded(storage, static_cast<T>(q)));
    else
      p.labels.push_back(label);
  }
  return p;
}

template <class T>
std::vector<row_kind> legal_kinds(const row_descriptor<T>& d, int setting, index cols) {
  std::vector<row_kind> kinds;
  for (int k = 0; k < static_cast<int>(row_kind::count); ++k)
    if (d.legal(setting, static_cast<row_kind>(k), cols))
      kinds.push_back(static_cast<row_kind>(k));
  return kinds;
}
template <class T>
std::vector<row_kind> ordinary_kinds(const row_descriptor<T>& d, int setting, index cols,
                                     index rows) {
  std::vector<row_kind> wanted, kinds;
  for (const row_kind kind : {row_kind::normal, row_kind::normal_wide, row_kind::gap_5})
    if (d.legal(setting, kind, cols))
      wanted.push_back(kind);
  for (index r = 0; r < rows && !wanted.empty(); ++r)
    kinds.push_back(wanted[static_cast<std::size_t>(r) % wanted.size()]);
  return kinds;
}
inline bool is_ordinary(row_kind kind) {
  return kind == row_kind::normal || kind == row_kind::normal_wide || kind == row_kind::gap_5;
}

template <class T>
std::vector<row_expectation> expect_rows(const row_descriptor<T>& d, int setting,
                                         const problem<T>& p) {
  std::vector<row_expectation> rows;
  for (index r = 0; r < p.rows; ++r)
    rows.push_back(d.expect(setting, p.row(r)));
  return rows;
}

/// Row weights, some of them 0; upstream slopes of both signs.
template <class T> void add_weights(problem<T>& p, random_numbers& random) {
  for (index r = 0; r < p.rows; ++r) {
    p.row_weights.push_back(r % 5 == 3 ? T(0) : static_cast<T>(random.uniform(0.25, 4)));
    p.upstream.push_back(static_cast<T>(random.uniform(-2, 2)));
  }
}
template <class T> void ignore_some(problem<T>& p) {
  if (p.soft.empty())
    for (std::size_t r = 1; r < p.labels.size(); r += 4)
      p.labels[r] = row_descriptor<T>::ignore_index;
}

template <class T> std::string title(const row_descriptor<T>& d, int setting) {
  return d.name() + (sizeof(T) == 4 ? "<float> " : "<double> ") + d.describe(setting);
}

inline constexpr std::array<perdita::reduction, 3> reductions{
    perdita::reduction::none, perdita::reduction::mean, perdita::reduction::sum};

} // namespace perdita_tests
