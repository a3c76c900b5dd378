// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "core/target_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct comp_sum_function {
  double rest; // 1 − τ

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    if (rest == 0)
      return value_and_slope{o.surprise, W(1)};
    const W x = W(rest) * o.surprise;
    return value_and_slope{expm1(x) / W(rest), exp_for_slope<T>(x)};
  }
};

} // namespace core

/// Comp-sum loss: the concave function Φ^τ of the sum of the rivals' odds,
///
///   ℓ = Φ^τ( Σ_{k≠y} e^{x_k − x_y} ),   Φ^τ(u) = ((1 + u)^{1−τ} − 1) / (1 − τ)
///     = (p_y^{τ−1} − 1) / (1 − τ),      p = softmax(x);   τ = 1: log(1 + u) = −log p_y
///   ∂ℓ/∂x = p_y^{τ−1} (p − e_y)
///
/// τ = 0: the sum-exponential loss 1/p_y − 1.  τ = 1: cross-entropy.  1 < τ < 2: generalised
/// cross-entropy (1 − p_y^q)/q with q = τ − 1 (Zhang and Sabuncu 2018).  τ = 2: the mean absolute
/// error 1 − p_y, half the distance between p and e_y. Continuous in τ.
/// For τ < 1 value and gradient grow without bound: a value that T cannot hold is +inf, and the
/// factor p_y^{τ−1} of the gradient stops at 2^-24 of T's largest number.
/// A masked label (-inf) costs +inf for τ ≤ 1, 1/(τ − 1) for τ > 1 with a zero gradient.
/// Shapes, reductions, errors, other special values and by-products: as cross_entropy.
/// Source: Mao, Mohri, Zhong, "Cross-entropy loss functions: theoretical analysis and
/// applications", ICML 2023.
template <class T = float> class comp_sum : public target_loss<comp_sum<T>, T> {
public:
  struct options {
    T tau = 1; ///< τ ≥ 0
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "comp_sum";

  comp_sum() : comp_sum(options{}) {}
  explicit(false) comp_sum(const options& o) : options_(o) {
    core::not_negative(name, "tau", o.tau);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = options_.tau <= 1,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

private:
  friend core::target_access;
  core::comp_sum_function<T> function() const { return {1 - static_cast<double>(options_.tau)}; }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
