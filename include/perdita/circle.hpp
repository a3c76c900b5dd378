// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// Whose pairs one softplus of the circle loss is of.
enum class circle_group { anchor, batch };

struct circle_options {
  double margin = 0.25;         ///< m
  double gamma = 80;            ///< γ, above 0
  bool constant_weights = true; ///< the weights of scores have no gradient, as in public code
  bool normalise = true;        ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of anchors with positives and negatives
};

namespace core {

/// γ [1 + m − s]₊ (1 − m − s) of positives and γ [s + m]₊ (s − m) of negatives, and their slopes.
template <class T, bool Positive> struct circle_logit {
  using V = pack<T>;
  V gamma, margin;
  bool constant;

  explicit circle_logit(const circle_options& o)
      : gamma(static_cast<T>(o.gamma)), margin(static_cast<T>(o.margin)),
        constant(o.constant_weights) {}

  /// How far a score is from where it would cost nothing.
  PERDITA_INLINE V distance(const V& s) const { return Positive ? V(1) - s : s; }
  PERDITA_INLINE V weight(const V& d) const { return gamma * max(V(0), d + margin); }
  PERDITA_INLINE V operator()(const V& s) const {
    const V d = distance(s);
    return weight(d) * (d - margin);
  }
  PERDITA_INLINE V slope(const V& s) const {
    const V d = distance(s), w = weight(d);
    const V size = constant ? w : select(w > V(0), gamma * (d + d), w);
    return Positive ? -size : size;
  }
};

/// Notes, where all anchors are one group, are an anchor's logarithms of sums; then its parts of
/// all anchors' sums, W times each, and the logit of the softplus.
template <circle_group Group> struct circle_formula : anchor_formula {
  static constexpr bool whole = Group == circle_group::batch;
  static constexpr index notes = whole ? 3 : 0;
  static constexpr double nothing = -std::numeric_limits<double>::infinity();
  circle_options o;

  explicit circle_formula(const circle_options& options) : o(options) {}

  template <class T> struct sums {
    circle_logit<T, true> of_positive;
    circle_logit<T, false> of_negative;
    chosen_images<T, circle_logit<T, true>> positive;
    chosen_images<T, circle_logit<T, false>> negative;

    sums(const anchor_row<T>& row, const circle_options& o)
        : of_positive(o), of_negative(o), positive(row, belonging{}, of_positive),
          negative(row, rivalling{}, of_negative) {}
  };

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    const sums<T> sum(row, o);
    to[0] = sum.positive.log();
    to[1] = sum.negative.log();
  }
  template <class Weight>
  void combine(double* note, index anchors, Weight weight, bool alone) const {
    const double positive = weighted_log_sum(note, anchors, notes, weight);
    const double negative = weighted_log_sum(note + 1, anchors, notes, weight);
    double all = 0;
    for (index i = 0; i < anchors; ++i)
      all += weight(i);
    for (double* own = note; own < note + anchors * notes; own += notes) {
      own[0] = all * std::exp(own[0] - positive);
      own[1] = all * std::exp(own[1] - negative);
      own[2] = positive == nothing || negative == nothing
                   ? nothing
                   : positive + negative - (alone ? 2 * std::log(2.0) : 0);
    }
  }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const double* own = whole ? row.note + row.anchor * notes : nullptr;
    if (whole && own[2] == nothing)
      return {0, false};
    if (whole && !Gradient)
      return {scalar_odds(own[2]).surprise};
    const sums<T> sum(row, o);
    if (!whole && (sum.positive.none() || sum.negative.none()))
      return {0, false};
    const scalar_odds odds(whole ? own[2] : sum.positive.log() + sum.negative.log());
    if constexpr (Gradient) {
      const V by_positive = sum.positive.factor(odds.miss * (whole ? own[0] : 1));
      const V by_negative = sum.negative.factor(odds.miss * (whole ? own[1] : 1));
      put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            return select(relation > V(0),
                          sum.positive.images(x) * by_positive * sum.of_positive.slope(x),
                          sum.negative.images(x) * by_negative * sum.of_negative.slope(x));
          });
    }
    return {odds.surprise};
  }
};

} // namespace core

/// The circle loss of positives P and negatives N, s = ⟨x̂_i, ŷ_j⟩:
///
///   ℓ = log(1 + Σ_{n∈N} e^{γ a_n (s_n − m)} Σ_{p∈P} e^{−γ a_p (s_p − 1 + m)})
///   a_p = [1 + m − s_p]₊,  a_n = [s_n + m]₊
///   ∂ℓ/∂s_p = −w softmax_P(p) γ a_p,  ∂ℓ/∂s_n = w softmax_N(n) γ a_n,  w = 1 − e^{−ℓ}
///
/// with a_p and a_n as constants, as in the public code; otherwise γ a_p and γ a_n there become
/// 2γ (1 − s_p) and 2γ s_n where a is not 0. Two groupings, which give different numbers:
///
///   perdita::circle<float>                               one ℓ per anchor, and the mean of those
///                                                        that have positives and negatives
///   perdita::circle<float, perdita::circle_group::batch> one ℓ of all pairs of the call: of x with
///                                                        itself, each pair i < j once
///
/// Usual (m, γ): (0.25, 256) for faces, (0.25, 128) for persons, (0.4, 80) for retrieval. No
/// positives or no negatives: 0.
///
/// Of the batch: each anchor's value is the whole; row weights are numbers of copies of an anchor,
/// `upstream` should be one number for all, any NaN makes the value NaN, and comparisons are made
/// twice where gradients are asked for. See anchor_loss for calls, shapes, special values and
/// errors. Throws where γ is not above 0 or m not finite.
///
/// Source: Sun et al., "Circle loss: a unified perspective of pair similarity optimization",
/// CVPR 2020.
template <class T, circle_group Group = circle_group::anchor>
class circle : public anchor_loss<circle<T, Group>, T> {
public:
  using options = circle_options;
  static constexpr const char* name = "circle";

  circle() : circle(options{}) {}
  explicit circle(const options& o) : options_(o) {
    core::positive(name, "gamma", o.gamma);
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::circle_formula<Group> formula() const { return core::circle_formula<Group>(options_); }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
