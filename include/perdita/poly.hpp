// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "core/target_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With m = 1 − p:  f = m^γ c + ε m^{γ+1},  f' = m^γ (1 + γ p c/m + ε (γ + 1) p).
struct poly1_function {
  double epsilon, gamma;

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    const W zero(0), one(1), e(epsilon);
    if (gamma == 0)
      return value_and_slope{o.surprise + e * o.miss, one + e * o.hit};
    const W g(gamma), focus = exp(g * log(o.miss));
    const W steepness = select(o.miss == zero, one, weighted(o.hit, o.surprise) / o.miss);
    return value_and_slope{weighted(focus, o.surprise) + e * (focus * o.miss),
                           weighted(focus, one + g * steepness + W(epsilon * (gamma + 1)) * o.hit)};
  }
};

} // namespace core

/// Poly-1: cross-entropy, or the focal loss, with the first coefficient of its expansion in 1 − p_y
/// changed by ε:
///
///   ℓ = (1 − p_y)^γ (−log p_y) + ε (1 − p_y)^{γ+1},   p = softmax(x)
///   ∂ℓ/∂x = (1 − p_y)^γ (1 + γ p_y (−log p_y)/(1 − p_y) + ε (γ + 1) p_y) (p − e_y)
///
/// γ = 0: −log p_y + ε (1 − p_y).  ε = 0: cross_entropy with focal_gamma = γ.
/// ε ≥ −1, so that no value is below zero.
/// Shapes, reductions, errors, special values and by-products: as cross_entropy.
/// Source: Leng et al., "PolyLoss: a polynomial expansion perspective of classification loss
/// functions", ICLR 2022.
template <class T = float> class poly1 : public target_loss<poly1<T>, T> {
public:
  struct options {
    T epsilon = 1; ///< ε ≥ −1
    T gamma = 0;   ///< γ ≥ 0: the focal exponent
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "poly1";

  poly1() : poly1(options{}) {}
  explicit(false) poly1(const options& o) : options_(o) {
    core::require(o.epsilon >= -1 && std::isfinite(o.epsilon), name, "epsilon", o.epsilon,
                  "a finite number, -1 or more");
    core::not_negative(name, "gamma", o.gamma);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = options_.epsilon == 0 && options_.gamma == 0,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

private:
  friend core::target_access;
  core::poly1_function function() const {
    return {static_cast<double>(options_.epsilon), static_cast<double>(options_.gamma)};
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
