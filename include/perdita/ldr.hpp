// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With u = log Σ_{k≠y} e^{(x_k + c)/λ} − x_y/λ:  ℓ = λ (softplus(u) − log K),  ∂ℓ/∂u = λ σ(u),
/// and the scores enter u as x/λ. The margin is a constant of u, so the sums need not know it.
template <class T> struct ldr_kl_formula : row_formula {
  using statistic = log_sum_exp;

  double lambda, margin;

  template <class V> PERDITA_INLINE V score(const V& x) const {
    return x / V(static_cast<typename V::value_type>(lambda));
  }
  template <class Row> auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const W u = log_odds_against(row) + W(margin / lambda);
    const W miss = sigmoid(u);
    row_outcome<W> out;
    out.value = W(lambda) * (softplus(u) - log(row.classes));
    out.image_scale = per_rival(miss, row);
    out.target_gradient = -miss;
    return out;
  }
  template <class Row> auto report(const Row& row) const { return softmax_report(row); }
};

} // namespace core

/// LDR-KL, the label-distributionally-robust loss with a KL regulariser:
///
///   ℓ = max_{q ∈ simplex} Σ_k q_k δ_k − λ KL(q ‖ 1/K) = λ log( (1/K) Σ_k e^{δ_k/λ} )
///   δ_k = x_k − x_y + c for k ≠ y,  δ_y = 0
///   ∂ℓ/∂x = softmax(δ/λ) − e_y
///
/// λ = 1, c = 0: cross-entropy − log K.  λ → 0: max(0, max_{k≠y} δ_k) (Crammer and Singer 2001).
/// λ → ∞: the mean of the δ_k. ℓ is below zero, down to −λ log K, where the label leads by far.
/// Domain, shapes, special values and accuracy: as cross_entropy, on the scores x/λ.
/// By-products log_sum_exp, target_log_probability and hits are those of softmax(x/λ).
/// Source: Zhu, Ying, Yang, "Label distributionally robust losses for multi-class classification",
/// ICML 2023. (Their script first normalises the scores; that is the caller's here.)
template <class T = float> class ldr_kl : public row_loss<ldr_kl<T>, T> {
public:
  struct options {
    T lambda = 1; ///< λ > 0: how far the distribution over labels may lean
    T margin = 0; ///< c
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "ldr_kl";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = false,
                                      .shift_invariant = true};

  ldr_kl() : ldr_kl(options{}) {}
  explicit(false) ldr_kl(const options& o) : options_(o) {
    core::require(o.lambda > 0 && std::isfinite(o.lambda), name, "lambda", o.lambda,
                  "a finite number above 0");
    core::require(std::isfinite(o.margin), name, "margin", o.margin, "a finite number");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<ldr_kl<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::ldr_kl_formula<T>{
        {}, static_cast<double>(options_.lambda), static_cast<double>(options_.margin)});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
