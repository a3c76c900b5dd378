// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With Q = Σ_{k≠y} p_k²:  ℓ = (1 − p_y)² + Q, and no digit of 1 − p_y is lost:
///   ∂ℓ/∂x_j = 2 p_j (p_j + p_y (1 − p_y) − Q),  ∂ℓ/∂x_y = −2 p_y ℓ
template <class T> struct brier_formula : row_formula {
  using statistic = log_sum_exp_and_squares;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  template <class V> PERDITA_INLINE V slope(const V&, const V& share, const V&, const V* c) const {
    return share * fma(share, V(2), c[0]);
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const W zero(0), two(2);
    const target_odds<T, W> odds(row);
    const W share = select(row.term[0] == zero, zero, odds.per_rival);
    const W squares = weighted(row.term[1], share * share);
    row_outcome<W> out;
    out.value = fma(odds.miss, odds.miss, squares);
    out.image_scale = share;
    out.coefficient[0] = two * (odds.hit * odds.miss - squares);
    out.target_gradient = -(two * odds.hit * out.value);
    return out;
  }
  template <class Row> auto report(const Row& row) const { return softmax_report(row); }
};

} // namespace core

/// Brier score, the squared error of the probabilities:
///
///   ℓ = Σ_k (p_k − δ_ky)²,   p = softmax(x)
///   ∂ℓ/∂x_j = 2 p_j ((p_j − δ_jy) − Σ_k p_k (p_k − δ_ky))
///
/// Between 0 and 2. A proper scoring rule; bounded, and so less moved by wrong labels than
/// cross-entropy. Not convex in the scores. A masked label (-inf) costs 1 + Σ p², and its own slope
/// is 0.
/// Shapes, reductions, errors, other special values and by-products: as cross_entropy.
/// Source: Brier, "Verification of forecasts expressed in terms of probability", 1950.
template <class T = float> class brier : public row_loss<brier<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "brier";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  brier() : brier(options{}) {}
  explicit(false) brier(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<brier<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const { f(core::brier_formula<T>{}); }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
