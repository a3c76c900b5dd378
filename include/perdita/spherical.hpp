// SPDX-License-Identifier: MIT
#pragma once

/// The spherical family beside the Z-loss: losses that know a row by its sum, its squared length
/// and its label's score alone (Vincent, de Brébisson, Bouthillier 2015).

#include <cmath>
#include <cstdint>

#include "core/score_ratio.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

struct taylor_map : quadratic_map {
  template <class W> static W total(const W* t) { return fma(W(0.5), t[2], t[0] + t[1]); }
  template <class W> static W of(const W& z) { return fma(W(0.5), z * z, W(1) + z); }
  template <class V> PERDITA_INLINE V slope(const V& z) const { return z + V(1); }
};

struct spherical_map : quadratic_map {
  double epsilon;
  explicit spherical_map(double e) : epsilon(e) {}
  template <class W> W total(const W* t) const { return t[2] + W(epsilon) * t[0]; }
  template <class W> W of(const W& z) const { return z * z + W(epsilon); }
  template <class V> PERDITA_INLINE V slope(const V& z) const { return z + z; }
};

} // namespace core

/// Cross-entropy of the Taylor softmax, with the exponential's series up to the second degree in
/// its place:
///
///   ℓ = −log( t(x_y) / Σ_k t(x_k) ),   t(x) = 1 + x + x²/2 ≥ 1/2
///   ∂ℓ/∂x_j = (1 + x_j) / Σ_k t(x_k) − δ_jy (1 + x_y)/t(x_y)
///
/// Special values: -inf is a masked class, +inf at a label costs 0 with no gradient, elsewhere and
/// NaN make the row NaN. In float scores beyond 1e18 are as infinite. Not invariant to shifts.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Source: de Brébisson and Vincent, "An exploration of softmax alternatives belonging to the
/// spherical loss family", ICLR 2016.
template <class T = float> class taylor_softmax : public score_ratio_loss<taylor_softmax<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "taylor_softmax";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  taylor_softmax() : taylor_softmax(options{}) {}
  explicit(false) taylor_softmax(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend score_ratio_access;
  core::taylor_map map() const { return {}; }
  options options_;
};

/// Cross-entropy of the spherical softmax:
///
///   ℓ = −log( (x_y² + ε) / Σ_k (x_k² + ε) )
///   ∂ℓ/∂x_j = 2 x_j / Σ_k (x_k² + ε) − δ_jy 2 x_y/(x_y² + ε)
///
/// It does not see the scores' signs. ε = 0: nor their scale, and a label with score 0 costs +inf
/// with a NaN gradient.
/// Special values: -inf is a masked class, +inf at a label costs 0 with no gradient, elsewhere and
/// NaN make the row NaN. In float scores beyond 1e18 are as infinite, and squares below 1e-38 as
/// zero.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Source: de Brébisson and Vincent, "An exploration of softmax alternatives belonging to the
/// spherical loss family", ICLR 2016.
template <class T = float>
class spherical_softmax : public score_ratio_loss<spherical_softmax<T>, T> {
public:
  struct options {
    T epsilon = T(0.1); ///< ε ≥ 0
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "spherical_softmax";
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = false};

  spherical_softmax() : spherical_softmax(options{}) {}
  explicit(false) spherical_softmax(const options& o) : options_(o) {
    core::not_negative(name, "epsilon", o.epsilon);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend score_ratio_access;
  core::spherical_map map() const {
    return core::spherical_map(static_cast<double>(options_.epsilon));
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
