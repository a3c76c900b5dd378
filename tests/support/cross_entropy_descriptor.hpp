// SPDX-License-Identifier: MIT
#pragma once

// Cross-entropy's descriptor: formula sheet 1.1, 1.2 and 1.4.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <perdita/cross_entropy.hpp>

#include "row_descriptor.hpp"
#include "softmax_reference.hpp"

namespace perdita_tests::cross_entropies {

struct options {
  double smoothing = 0, temperature = 1, softcap = 0, penalty = 0, gamma = 0;
  bool prior = false, weights = false, soft = false;
};

/// Every option alone, every pair, and all together.
inline std::vector<options> all_options() {
  using change = void (*)(options&);
  const std::vector<change> each{
      [](options& o) { o.smoothing = 0.1; }, [](options& o) { o.smoothing = 0.3, o.prior = true; },
      [](options& o) { o.weights = true; },  [](options& o) { o.temperature = 0.7; },
      [](options& o) { o.softcap = 5; },     [](options& o) { o.penalty = 0.01; },
      [](options& o) { o.gamma = 2; },       [](options& o) { o.soft = true; },
  };
  std::vector<options> all(1);
  for (std::size_t i = 0; i < each.size(); ++i) {
    each[i](all.emplace_back());
    for (std::size_t j = 0; j < i; ++j) {
      options o;
      each[j](o);
      each[i](o);
      if (!(o.soft && o.gamma > 0)) // refused
        all.push_back(o);
    }
  }
  for (const bool soft : {false, true}) {
    options o;
    for (const change& apply : each)
      apply(o);
    o.soft = soft;
    if (soft)
      o.gamma = 0;
    all.push_back(o);
  }
  // Other values: the ends of the ranges, and slopes that blow up if done carelessly.
  all.emplace_back().smoothing = 1;
  all.emplace_back().temperature = 4;
  all.emplace_back().softcap = 30;
  all.emplace_back().gamma = 0.5;
  all.emplace_back().gamma = 5;
  all.emplace_back().prior = true; // without smoothing it says nothing
  return all;
}
inline constexpr int all_with_labels = -1, all_with_soft = -2;
inline int setting_of(const std::vector<options>& all, int which) {
  for (std::size_t i = 0; i < all.size(); ++i)
    if (all[i].prior && all[i].weights && all[i].softcap > 0 &&
        all[i].soft == (which == all_with_soft))
      return static_cast<int>(i);
  return 0;
}
template <class F> int first_setting(const std::vector<options>& all, F fits) {
  for (std::size_t i = 0; i < all.size(); ++i)
    if (fits(all[i]))
      return static_cast<int>(i);
  return 0;
}

/// One class in four counts for nothing.
inline double class_weight(index c) {
  return c % 4 == 2 ? 0 : 0.5 + 0.375 * static_cast<double>(c % 5);
}
template <class T> std::vector<T> class_weights(index cols) {
  std::vector<T> w;
  for (index c = 0; c < cols; ++c)
    w.push_back(static_cast<T>(class_weight(c)));
  return w;
}
template <class T> std::vector<T> prior(index cols) {
  double sum = 0;
  for (index c = 0; c < cols; ++c)
    sum += 1 + static_cast<double>(c % 3);
  std::vector<T> p;
  for (index c = 0; c < cols; ++c)
    p.push_back(static_cast<T>((1 + static_cast<double>(c % 3)) / sum));
  return p;
}

template <class T> class cross_entropy_descriptor final : public row_descriptor<T> {
public:
  // The budgets, in epsilons: of a value, of a slope, of a by-product; the condition terms come on
  // top, each the derivative of the answer times an error that the arithmetic of T makes anyway.
  static constexpr double value_budget = 4, slope_budget = 4;

  std::string name() const override { return "cross_entropy"; }
  int settings() const override { return static_cast<int>(all_.size()); }
  std::string describe(int setting) const override {
    const options& o = at(setting);
    std::string s;
    const auto say = [&](bool is, const char* what, double x) {
      if (is)
        s += std::string(s.empty() ? "" : ", ") + what +
             (x != 0 ? " " + perdita::core::to_text(x) : "");
    };
    say(o.smoothing > 0, "smoothing", o.smoothing);
    say(o.prior, "prior", 0);
    say(o.weights, "class weights", 0);
    say(o.temperature != 1, "temperature", o.temperature);
    say(o.softcap > 0, "softcap", o.softcap);
    say(o.penalty > 0, "penalty", o.penalty);
    say(o.gamma > 0, "focal", o.gamma);
    say(o.soft, "soft targets", 0);
    return s.empty() ? "plain" : s;
  }
  std::vector<int> few_settings() const override {
    return {0, setting_of(all_, all_with_labels), setting_of(all_, all_with_soft),
            first_setting(all_, [](const options& o) { return o.gamma > 0 && o.penalty > 0; }),
            first_setting(all_, [](const options& o) { return o.soft; })};
  }
  bool soft(int setting) const override { return at(setting).soft; }

  std::unique_ptr<row_subject<T>> make(int setting, index cols,
                                       perdita::reduction reduction) const override {
    const options& o = at(setting);
    const std::vector<T> w = o.weights ? class_weights<T>(cols) : std::vector<T>();
    const std::vector<T> pi = o.prior ? prior<T>(cols) : std::vector<T>();
    return std::make_unique<row_subject_of<perdita::cross_entropy<T>>>(
        perdita::cross_entropy<T>({.label_smoothing = static_cast<T>(o.smoothing),
                                   .prior = pi,
                                   .class_weights = w,
                                   .ignore_index = row_descriptor<T>::ignore_index,
                                   .reduction = reduction,
                                   .temperature = static_cast<T>(o.temperature),
                                   .softcap = static_cast<T>(o.softcap),
                                   .log_z_penalty = static_cast<T>(o.penalty),
                                   .focal_gamma = static_cast<T>(o.gamma)}));
  }
  wide label_weight(int setting, index label, index) const override {
    return at(setting).weights ? wide(static_cast<T>(class_weight(label))) : wide(1);
  }

  row_expectation expect(int setting, const row_input& row) const override {
    const options& o = at(setting);
    const std::size_t n = row.scores.size();
    const wide cap = static_cast<T>(o.softcap), temperature = static_cast<T>(o.temperature);
    const wide epsilon = static_cast<T>(o.smoothing), gamma = static_cast<T>(o.gamma);
    const wide c = static_cast<T>(o.penalty);
    const bool capped = o.softcap > 0;

    // z = cap·tanh(x/cap)/T, with its derivative; -inf stays
    std::vector<wide> z, steepness;
    for (const wide& x : row.scores) {
      const bool masked = x == -infinity();
      const wide u = capped && !masked ? wide(x / cap) : wide(0);
      const wide e = exp(wide(-2 * size_of(u)));
      z.push_back(wide(capped && !masked ? wide(cap * tanh(u)) : x) / temperature);
      steepness.push_back(4 * e / ((1 + e) * (1 + e)) / temperature);
    }
    const softmax_row s(z);

    // b_c: the weight of -log p_c beside the label's own term
    const std::vector<T> w_all =
        o.weights ? class_weights<T>(static_cast<index>(n)) : std::vector<T>(n, T(1));
    const std::vector<T> pi_all = o.prior ? prior<T>(static_cast<index>(n)) : std::vector<T>();
    std::vector<wide> b;
    for (std::size_t j = 0; j < n; ++j) {
      const wide pi = o.prior ? wide(pi_all[j]) : wide(1) / wide(static_cast<double>(n));
      const wide q = row.soft.empty() ? wide(0) : wide((1 - epsilon) * row.soft[j]);
      b.push_back(wide(w_all[j]) * (q + epsilon * pi));
    }
    std::size_t y = static_cast<std::size_t>(std::max<index>(row.label, 0));
    if (!row.soft.empty())
      y = static_cast<std::size_t>(std::max_element(row.soft.begin(), row.soft.end()) -
                                   row.soft.begin());
    const wide hard = row.soft.empty() ? wide((1 - epsilon) * wide(w_all[y])) : wide(0);

    // Errors of z, and of u = log Σ_{j≠y} e^{z_j} − z_y, in epsilons
    const wide relative = (capped ? 3.5 : 0) + (o.temperature != 1 ? 1 : 0);
    const rival_errors errors(z, y, relative, T());
    const auto& [has_rivals, rival, behind, of_z, distance, noise, of_u] = errors;

    // What is expected, in full; and how far off it may be, for which the first digits will do.
    const wide p = s.p(y), miss = s.miss(y), surprise = s.surprise(y), lse = s.log_sum_exp;
    const wide focus =
        gamma > 0 ? wide(miss > 0 ? wide(exp(wide(gamma * log(miss)))) : wide(0)) : wide(1);
    const wide steep =
        gamma > 0 && miss > 0
            ? wide(focus + (p > 0 ? wide(gamma * p * surprise / miss * focus) : wide(0)))
            : focus;
    std::vector<wide> shares, surprises;
    std::vector<judged> share, away, weight;
    for (std::size_t j = 0; j < n; ++j) {
      shares.push_back(s.p(j));
      surprises.push_back(s.surprise(j));
      share.push_back(static_cast<judged>(shares[j]));
      away.push_back(static_cast<judged>(surprises[j]));
      weight.push_back(static_cast<judged>(b[j]));
    }
    const auto sum = static_cast<judged>(lse), missed = static_cast<judged>(miss),
               label_pull = static_cast<judged>(hard * steep), of_square = static_cast<judged>(c);
    // A power is the exponential of a product: γ log(1 − p) carries its own size into the error.
    const judged of_power =
        gamma > 0 && missed > 0 ? 2 * static_cast<judged>(gamma) * std::abs(std::log(missed)) : 0;

    row_expectation e;
    // value
    wide value = weighted(hard, weighted(focus, surprise));
    judged slack =
        static_cast<judged>(value) * (value_budget + of_power) + label_pull * missed * of_u;
    for (std::size_t j = 0; j < n; ++j) {
      value += weighted(b[j], surprises[j]);
      if (weight[j] > 0 && std::isfinite(away[j]))
        slack +=
            weight[j] *
            (value_budget * (std::abs(away[j]) + (j == y ? 0 : behind[j] + std::abs(sum - rival))) +
             of_z[j] + noise + of_z[y] * share[y] + missed * of_u);
    }
    const judged of_lse =
        value_budget * std::max(std::abs(sum), std::abs(static_cast<judged>(z[s.top]))) +
        missed * of_u + of_z[y];
    value += weighted(c, wide(lse * lse));
    const judged of_penalties = of_square * (value_budget * sum * sum + 2 * std::abs(sum) * of_lse);
    slack += of_penalties;
    e.value = {value, is_finite(value) ? slack : 0};

    // gradient
    std::vector<wide> after(n + 1, wide(0)); // Σ b from a class on: b_sum − b_j would cancel
    for (std::size_t j = n; j > 0; --j)
      after[j - 1] = after[j] + b[j - 1];
    wide before = 0;
    for (std::size_t j = 0; j < n; ++j) {
      const wide others = before + after[j + 1];
      before += b[j];
      const wide spread = weighted(others, shares[j]), pull = weighted(b[j], s.miss(j));
      const wide of_penalty = weighted(2 * c * shares[j], lse);
      const wide of_label = hard * steep * (j == y ? wide(-miss) : shares[j]);
      const wide g = of_label + spread - pull + of_penalty;
      const judged relative_error =
          slope_budget + of_power + (1 + o.gamma) * of_u + (j == y ? 0 : errors.of_share(j));
      judged allowed = (label_pull * (j == y ? missed : share[j]) + static_cast<judged>(spread) +
                        weight[j] * share[j] + std::abs(static_cast<judged>(of_penalty))) *
                           relative_error +
                       weight[j] * slope_budget + (j == y ? static_cast<judged>(pull) * of_u : 0) +
                       2 * of_square * share[j] * of_lse;
      allowed *= static_cast<judged>(steepness[j]);
      if (capped) { // and its condition in |x|/cap
        const auto u = std::abs(static_cast<judged>(row.scores[j] / cap));
        if (std::isfinite(u))
          allowed += std::abs(static_cast<judged>(g * steepness[j])) * 4 * (1 + u);
      }
      e.gradient.push_back({g * steepness[j], allowed});
    }

    // by-products
    e.log_sum_exp = {lse, of_lse};
    e.target_log_probability = {-surprise,
                                std::isfinite(away[y]) ? away[y] * value_budget + missed * of_u : 0,
                                row.soft.empty()};
    wide entropy = 0;
    for (std::size_t j = 0; j < n; ++j)
      if (shares[j] > 0)
        entropy += shares[j] * surprises[j];
    judged of_entropy = 0;
    for (std::size_t j = 0; j < n; ++j)
      if (share[j] > 0)
        of_entropy += share[j] * (value_budget * away[j] +
                                  std::abs(away[j] - static_cast<judged>(entropy)) *
                                      (behind[j] / 2 + of_z[j] + (j == y ? of_u : 0)));
    if (has_rivals)
      of_entropy += missed * value_budget * (std::abs(sum - rival) + distance) +
                    missed * of_u * (1 + std::abs(away[y]));
    // Where a rival leads, the rest of the entropy is a difference, taken in double.
    of_entropy += std::ldexp(judged(1), -50) * (1 + distance) / std::numeric_limits<T>::epsilon();
    // The shift of a row of several chunks stays up to 16 below the largest score.
    if (n > 512)
      of_entropy += 16 * missed;
    e.entropy = {entropy, of_entropy};
    e.penalty = {c * lse * lse, of_penalties};
    e.hit = true;
    for (std::size_t j = 0; j < n; ++j)
      e.hit = e.hit && (j == y || row.scores[j] < row.scores[y]);
    e.hit_reported = row.soft.empty();
    return e;
  }

  perdita::loss_traits traits(int setting) const override {
    const options& o = at(setting);
    const bool plain = o.gamma == 0 && o.softcap == 0 && o.penalty == 0;
    // By hand, to be compared with what the loss says.
    return {.convex = plain,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = o.softcap == 0 && o.penalty == 0};
  }

private:
  const options& at(int setting) const { return all_[static_cast<std::size_t>(setting)]; }
  std::vector<options> all_ = all_options();
};

inline const std::vector<options> every_option = all_options();

} // namespace perdita_tests::cross_entropies
