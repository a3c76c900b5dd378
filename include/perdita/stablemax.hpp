// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "core/score_ratio.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// z = s(x), which is 0 for a masked class; s' = 1 where s ≥ 1, s² below.
struct stablemax_map {
  using statistic = plain_sum;
  static constexpr bool divides = true;
  template <class V> PERDITA_INLINE V score(const V& x) const {
    return select(x >= V(0), x + V(1), V(1) / (V(1) - x));
  }
  template <class V> static PERDITA_INLINE auto masked(const V& z) { return z == V(0); }
  template <class W> static W total(const W* sum) { return *sum; }
  template <class W> static W of(const W& z) { return z; }
  template <class V> PERDITA_INLINE V slope(const V& z) const {
    return select(z >= V(1), V(1), z * z);
  }
};

} // namespace core

/// Cross-entropy of StableMax, which grows linearly instead of exponentially:
///
///   ℓ = −log( s(x_y) / Σ_k s(x_k) ),   s(x) = x + 1 for x ≥ 0, 1/(1 − x) for x < 0
///   ∂ℓ/∂x_j = s'(x_j)/s(x_j) (r_j − δ_jy),   r = s(x)/Σ s
///
/// Not invariant to shifts. Special values: -inf is a masked class, +inf at a label costs 0 with no
/// gradient, elsewhere NaN. In float scores beyond 1e36 may be as infinite.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Source: Prieto, Barsbey, Mediano, Birdal, "Grokking at the edge of numerical stability", ICLR
/// 2025.
template <class T = float> class stablemax : public score_ratio_loss<stablemax<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "stablemax";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  stablemax() : stablemax(options{}) {}
  explicit(false) stablemax(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend score_ratio_access;
  core::stablemax_map map() const { return {}; }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
