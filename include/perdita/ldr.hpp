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
    return x * V(static_cast<typename V::value_type>(1 / lambda));
  }
  template <class Row> auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    W surprise, miss, per_image;
    if constexpr (std::is_same_v<T, double>) { // the margin may be less than an ulp of the shift
      const W u = log_odds_against(row) + W(margin / lambda);
      surprise = softplus(u);
      miss = sigmoid(u);
      per_image = per_rival(miss, row);
    } else {
      Row ahead = row;
      ahead.shift = row.shift + W(margin / lambda);
      const target_odds<T, W> odds(ahead);
      surprise = odds.surprise;
      miss = odds.miss;
      per_image = select(row.term[0] == W(0), W(0), odds.per_rival);
    }
    row_outcome<W> out;
    out.value = W(lambda) * (surprise - log(row.classes));
    out.image_scale = per_image;
    out.target_gradient = -miss;
    return out;
  }
  template <class Row> auto report(const Row& row) const { return softmax_report(row); }
};

template <class T> struct crammer_singer_formula : row_formula {
  using statistic = maximum_and_ties;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  double margin;

  template <class V> PERDITA_INLINE V slope(const V& x, const V&, const V&, const V* c) const {
    return select(x == c[0], c[1], c[2]);
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const W zero(0), ties = row.term[0], y = row.target;
    const W gap = select(ties == zero, select(y == y, zero, y), (row.shift - y) + W(margin));
    // NaN where a rival, the label or their difference is, else 0: it is added to everything.
    const W lost = (ties - ties) + select(gap == gap, zero, gap);
    const auto active = gap > zero;
    row_outcome<W> out;
    out.value = select(active, gap, zero) + lost;
    out.coefficient[0] = row.shift;
    out.coefficient[1] = select(active, W(1) / ties, zero) + lost;
    out.coefficient[2] = lost;
    out.target_gradient = select(active, W(-1), zero) + lost;
    return out;
  }
};

struct average_margin_formula : row_formula {
  using statistic = moments;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  double margin;

  template <class V> PERDITA_INLINE V slope(const V&, const V&, const V&, const V* c) const {
    return c[0];
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const W n = row.classes, offset = row.term[1] / n, lost = offset - offset;
    row_outcome<W> out;
    out.value = ((row.shift - row.target) + offset) + W(margin) * ((n - W(1)) / n);
    out.coefficient[0] = W(1) / n + lost;
    out.target_gradient = lost - (n - W(1)) / n;
    return out;
  }
};

} // namespace core

/// LDR-KL, the label-distributionally-robust loss with a KL regulariser:
///
///   ℓ = max_{q ∈ simplex} Σ_k q_k δ_k − λ KL(q ‖ 1/K) = λ log( (1/K) Σ_k e^{δ_k/λ} )
///   δ_k = x_k − x_y + c for k ≠ y,  δ_y = 0
///   ∂ℓ/∂x = softmax(δ/λ) − e_y
///
/// λ = 1, c = 0: cross-entropy − log K.  λ → 0: crammer_singer.  λ → ∞: average_margin.
/// ℓ is below zero, down to −λ log K, where the label leads by far.
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
    core::invertible<T>(name, "lambda", o.lambda);
    core::finite(name, "margin", o.margin);
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

/// The multi-class hinge of Crammer and Singer, LDR-KL's limit λ → 0:
///
///   ℓ = max(0, c + max_{k≠y} x_k − x_y)
///   ∂ℓ/∂x = e_k − e_y where ℓ > 0, else 0: k the largest rival, or equal shares for all of them
///
/// Masked classes (-inf) are no rivals; a masked label costs +inf, as a rival of +inf does, but 0
/// where no rival is left.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Source: Crammer and Singer, "On the algorithmic implementation of multiclass kernel-based vector
/// machines", JMLR 2001.
template <class T = float> class crammer_singer : public row_loss<crammer_singer<T>, T> {
public:
  struct options {
    T margin = 1; ///< c
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "crammer_singer";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  crammer_singer() : crammer_singer(options{}) {}
  explicit(false) crammer_singer(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<crammer_singer<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::crammer_singer_formula<T>{{}, static_cast<double>(options_.margin)});
  }
  options options_;
};

/// The average margin, LDR-KL's limit λ → ∞, which is linear in the scores:
///
///   ℓ = (1/K) Σ_k (x_k − x_y + c [k ≠ y]),   ∂ℓ/∂x = 1/K − e_y
///
/// There are no masked classes: NaN or an infinite score makes the row NaN, and so may, in float,
/// scores beyond 1e35, whose sums are infinite.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Source: as ldr_kl.
template <class T = float> class average_margin : public row_loss<average_margin<T>, T> {
public:
  struct options {
    T margin = 0; ///< c
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "average_margin";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = false,
                                      .shift_invariant = true};

  average_margin() : average_margin(options{}) {}
  explicit(false) average_margin(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<average_margin<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::average_margin_formula{{}, static_cast<double>(options_.margin)});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
