// SPDX-License-Identifier: MIT
#pragma once

// The descriptor of every loss that is a function of the label's probability.

#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <perdita/core/target_loss.hpp>

#include "catch.hpp"
#include "row_descriptor.hpp"
#include "softmax_reference.hpp"

namespace perdita_tests {

/// A label with probability p: c = -log p and miss = 1 - p come by themselves, because neither can
/// be had from p.
struct target_point {
  wide c, p, miss;
  static target_point at(const wide& c) { return {c, exp(wide(-c)), wide(-expm1(wide(-c)))}; }
};

/// One way to set a loss's options.
template <class T> struct target_setting {
  std::string describe;
  std::function<std::unique_ptr<row_subject<T>>(perdita::reduction)> make;
  perdita::loss_traits traits;
  std::function<wide(const target_point&)> value, slope; ///< f and df/dc
  /// Their terms' sizes added up, where they have terms of both signs.
  std::function<wide(const target_point&)> terms = {}, slope_terms = {};
  bool grows = false; ///< too fast for rows whose label has no probability to speak of
  bool smooth = true; ///< df/dc has no kinks
};

template <class T, class Loss>
target_setting<T> make_target_setting(std::string describe, const typename Loss::options& options,
                                      std::function<wide(const target_point&)> value,
                                      std::function<wide(const target_point&)> slope) {
  const auto make = [options](perdita::reduction how) {
    auto o = options;
    o.ignore_index = row_descriptor<T>::ignore_index;
    o.reduction = how;
    return std::make_unique<row_subject_of<Loss>>(Loss(o));
  };
  return {std::move(describe),
          make,
          Loss(options).traits(),
          std::move(value),
          std::move(slope),
          {},
          {}};
}

template <class T> class target_descriptor final : public row_descriptor<T> {
public:
  static constexpr double value_budget = 4, slope_budget = 4; // epsilons, before condition terms

  target_descriptor(std::string name, std::vector<target_setting<T>> settings, std::vector<int> few)
      : name_(std::move(name)), settings_(std::move(settings)), few_(std::move(few)) {}

  std::string name() const override { return name_; }
  int settings() const override { return static_cast<int>(settings_.size()); }
  std::string describe(int setting) const override { return of(setting).describe; }
  std::vector<int> few_settings() const override { return few_; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return of(setting).make(reduction);
  }
  perdita::loss_traits traits(int setting) const override { return of(setting).traits; }
  bool legal(int setting, row_kind kind, index) const override {
    return !of(setting).grows || (kind != row_kind::huge && kind != row_kind::spread_500 &&
                                  kind != row_kind::ascending && kind != row_kind::descending);
  }
  bool twice_smooth() const override {
    bool smooth = true;
    for (const auto& s : settings_)
      smooth = smooth && s.smooth;
    return smooth;
  }

  /// A kink is where a loss gives up: beyond it all slopes are zero.
  bool sparse() const override { return !twice_smooth(); }

  row_expectation expect(int setting, const row_input& row) const override {
    const target_setting<T>& loss = of(setting);
    const auto y = static_cast<std::size_t>(row.label);
    const softmax_row s(row.scores);
    const rival_errors errors(row.scores, y, 0, T());
    const target_point at{s.surprise(y), s.p(y), s.miss(y)};
    const wide value = loss.value(at), slope = loss.slope(at);
    const auto terms = static_cast<judged>(loss.terms ? loss.terms(at) : size_of(value)),
               slope_terms =
                   static_cast<judged>(loss.slope_terms ? loss.slope_terms(at) : size_of(slope));

    // An error of c moves the value by the slope, and the slope by the curvature.
    const judged miss = static_cast<judged>(at.miss), surprise = static_cast<judged>(at.c);
    const judged of_c = miss * errors.of_u + surprise * value_budget;
    const wide h = at.c * ldexp(wide(1), -36);
    const judged curvature =
        h > 0 && is_finite(at.c)
            ? std::abs(static_cast<judged>((loss.slope(target_point::at(at.c + h)) -
                                            loss.slope(target_point::at(at.c - h))) /
                                           (2 * h)))
            : 0;
    row_expectation e;
    e.value = {value, terms * value_budget + slope_terms * of_c};
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide share = k == y ? at.miss : s.p(k);
      const wide size = slope * share;
      const judged relative = slope_budget + errors.of_u + (k == y ? 0 : errors.of_share(k));
      e.gradient.push_back(
          {k == y ? wide(-size) : size,
           (slope_terms * relative + curvature * of_c) * static_cast<judged>(share)});
    }
    const wide lse = s.log_sum_exp;
    e.log_sum_exp = {lse, value_budget * larger(size_of(lse), size_of(row.scores[s.top])) +
                              miss * errors.of_u};
    e.target_log_probability = {-at.c, of_c};
    e.entropy.reported = e.penalty.reported = false;
    e.hit = true;
    for (std::size_t k = 0; k < row.scores.size(); ++k)
      e.hit = e.hit && (k == y || row.scores[k] < row.scores[y]);
    return e;
  }

private:
  const target_setting<T>& of(int setting) const {
    return settings_[static_cast<std::size_t>(setting)];
  }
  std::string name_;
  std::vector<target_setting<T>> settings_;
  std::vector<int> few_;
};

/// A row of the formula sheet's appendix A: its scores and label, and what a loss makes of them.
template <class Loss>
void check_golden(const Loss& loss, double value, const std::vector<double>& gradient) {
  const std::vector<double> x{0.5, -1.2, 2, 0.1};
  std::vector<double> g(4);
  const std::vector<int> label{0};
  const double got = loss(perdita::matrix_view<const double>(x.data(), 1, 4), label,
                          perdita::matrix_view<double>(g.data(), 1, 4));
  using Catch::Matchers::WithinAbs;
  CHECK_THAT(got, WithinAbs(value, 1e-9));
  for (std::size_t k = 0; k < 4; ++k)
    CHECK_THAT(g[k], WithinAbs(gradient[k], 1e-8));
}

} // namespace perdita_tests
