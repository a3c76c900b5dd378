// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With g_k = 1/((K−1)(a + p_k)) and r = Σ_{k≠y} p_k g_k:
///   ∂ℓ/∂x_k = p_k (g_k + p_y/(a + p_y) − r),  ∂ℓ/∂x_y = −p_y ((1 − p_y)/(a + p_y) + r)
template <class T> struct robust_log_formula : solved_formula {
  double a;
  double per_rival; // 1/(K − 1)

  template <class V> auto slopes(const double* c) const {
    return [
      this, top = V(static_cast<T>(c[0])), share = V(static_cast<T>(c[1])),
      even = V(static_cast<T>(c[2]))
    ](const V& x) __attribute__((always_inline)) {
      const V p = exp(x - top) * share;
      return p * (V(static_cast<T>(per_rival)) / (V(static_cast<T>(a)) + p) + even);
    };
  }
  row_solution solve(const T* x, index n, index y, double*) const {
    const rival_scores<T> rivals(x, n, y);
    if (rivals.lost)
      return no_solution();
    if (rivals.all_masked()) // p_y = 1, or, with the label masked too, 0
      return solution(x[y] > rivals.top ? 0.0 : std::log1p(1 / a), 0);
    const double sum = rivals.sum_of_images(rivals.top, 1);
    const scalar_odds odds(std::log(sum) - rivals.label);
    const rival_sums s = sums(rivals, odds.miss / sum);
    const double h = odds.hit / (a + odds.hit);
    return solution(std::log1p(odds.miss / (a + odds.hit)) + s.logs * per_rival,
                    -odds.hit * (odds.miss / (a + odds.hit) + s.shares * per_rival), rivals.top,
                    odds.miss / sum, h - s.shares * per_rival);
  }

private:
  /// Σ log(1 + p_k/a) and Σ p_k/(a + p_k)
  struct rival_sums {
    double logs, shares;
  };
  /// A logarithm takes long, so several terms are multiplied first: as their product less 1, to
  /// which (e, q) → e (1 + q) + q adds one and, with nothing subtracted, keeps its digits.
  rival_sums sums(const rival_scores<T>& rivals, double share) const {
    using V = pack<T>;
    const double most = std::log(static_cast<double>(std::numeric_limits<T>::max())) - 1;
    const auto at_once = static_cast<int>(std::fmax(1, std::fmin(16, most / std::log1p(1 / a))));
    const V shift(rivals.top), one(1), factor(static_cast<T>(share / a));
    V product(0), some_shares(0);
    wide_lanes<T> logs, shares;
    logs.clear();
    shares.clear();
    int left = at_once;
    const auto flush = [&]() __attribute__((always_inline)) {
      logs.add(log1p(product));
      shares.add(some_shares);
      product = some_shares = V(0);
      left = at_once;
    };
    rivals.each([&](const V& z, index) __attribute__((always_inline)) {
      const V q = exp_shifted(z - shift) * factor, with = one + q;
      some_shares += q / with;
      product = fma(product, with, q);
      if (--left == 0)
        flush();
    });
    flush();
    return {logs.total(), shares.total()};
  }
};

} // namespace core

/// Robust log loss (RLL), made for noisy labels:
///
///   ℓ = log((a + 1)/(a + p_y)) + (1/(K − 1)) Σ_{k≠y} log((a + p_k)/a),   p = softmax(x)
///   ∂ℓ/∂x_j = p_j (g_j − Σ_k p_k g_k),   g_y = −1/(a + p_y),  g_k = 1/((K − 1)(a + p_k))
///
/// Between 0, where p_y = 1, and log(1 + 1/a) + log(1 + 1/((K − 1) a)).
/// Masked classes (-inf) have p = 0; a masked label costs log(1 + 1/a) and more, with slope 0; +inf
/// but at the label, or NaN, makes the row NaN. One class costs nothing.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`. Needs whole rows (p
/// enters term by term), so not on the linear head.
/// Source: Patel and Sastry, "Memorization in deep neural networks: does the loss function
/// matter?", PAKDD 2021.
template <class T = float> class robust_log_loss : public row_loss<robust_log_loss<T>, T> {
public:
  struct options {
    T a = T(0.1); ///< a > 0, not subnormal: the smaller, the closer to cross-entropy
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "robust_log_loss";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  robust_log_loss() : robust_log_loss(options{}) {}
  explicit(false) robust_log_loss(const options& o) : options_(o) {
    core::require(o.a >= std::numeric_limits<T>::min() && std::isfinite(o.a), name, "a", o.a,
                  "a finite number above 0 and not subnormal");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<robust_log_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    const auto rivals = static_cast<double>(job.scores.cols - 1);
    f(core::robust_log_formula<T>{
        {}, static_cast<double>(options_.a), rivals > 0 ? 1 / rivals : 0});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
