// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With z the target's standard score and u = a (b − z):  ℓ = softplus(u) / a,
/// ∂ℓ/∂x_j = −σ(u)/σ (δ_jy − 1/K − z (x_j − μ)/(σ K)).
template <class T> struct z_loss_formula : row_formula {
  using statistic = moments;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  double a, b;

  template <class V> PERDITA_INLINE V slope(const V& x, const V&, const V&, const V* c) const {
    return fma(x - c[2], c[0], c[1]);
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    const W zero(0), n = row.classes, one_of = W(1) / n;
    const W offset = row.term[1] / n; // μ − shift; of equal scores exactly, so that σ is 0
    const W variance = max(zero, (row.term[2] - row.term[1] * offset) * one_of);
    const W inverse = select(variance == zero, zero, W(1) / sqrt(variance));
    const W z = ((row.target - row.shift) - offset) * inverse;
    const W u = W(a) * (W(b) - z);
    const auto [value, rate] = softplus_and_sigmoid_to<T>(u);
    const W steep = rate * inverse * one_of;
    row_outcome<W> out;
    out.value = value * W(1 / a);
    out.coefficient[0] = steep * z * inverse;
    out.coefficient[1] = steep - out.coefficient[0] * offset;
    out.coefficient[2] = row.shift;
    out.target_gradient = -(steep * ((n - W(1)) - z * z));
    return out;
  }
};

} // namespace core

/// Z-loss: softplus of the target's standard score, invariant to shift and scale of the scores:
///
///   ℓ = (1/a) log(1 + e^{a (b − z_y)}),  z_k = (x_k − μ)/σ,  μ and σ² the row's mean and variance
///   ∂ℓ/∂x_k = −σ(a (b − z_y))/σ · (δ_ky − 1/K − z_y z_k / K)   (σ(·): the logistic function)
///
/// Not to be confused with the penalty (log Σ e^x)², which is cross_entropy's log_z_penalty.
/// |z_y| ≤ √(K−1). The gradient sums to 0, is orthogonal to the scores and scales as 1/σ.
/// Special values: all scores equal (or one class): z = 0 and a zero gradient. NaN or an infinite
/// score makes the row NaN: there are no masked classes. Not convex. In float
/// the squares of the distances to the mean must stay in range: beyond 1e18, or below 1e-18, the
/// row counts as flat.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Source: de Brébisson and Vincent, "The Z-loss: a shift and scale invariant classification loss
/// belonging to the spherical family", 2016.
template <class T = float> class z_loss : public row_loss<z_loss<T>, T> {
public:
  struct options {
    T a = 1; ///< > 0: sharpness
    T b = 0; ///< the standard score that the target is pulled above
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "z_loss";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = false, // where all scores are equal
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  z_loss() : z_loss(options{}) {}
  explicit(false) z_loss(const options& o) : options_(o) {
    core::positive(name, "a", o.a);
    core::finite(name, "b", o.b);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<z_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::z_loss_formula<T>{
        {}, static_cast<double>(options_.a), static_cast<double>(options_.b)});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
