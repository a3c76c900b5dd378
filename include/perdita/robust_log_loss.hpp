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
    return [this, top = V(static_cast<T>(c[0])), share = V(static_cast<T>(c[1])),
            even = V(static_cast<T>(c[2]))](const V& x) {
      const V p = exp(x - top) * share;
      return p * (V(static_cast<T>(per_rival)) / (V(static_cast<T>(a)) + p) + even);
    };
  }
  row_solution solve(const T* x, index n, index y, double* d) const {
    using W = pack<double>;
    constexpr double inf = std::numeric_limits<double>::infinity();
    const rivals_of_row rivals(x, n, y, d);
    if (rivals.lost)
      return no_solution();
    if (rivals.top == -inf) // p_y = 1, or, with the label masked too, 0
      return solution(x[y] > -inf ? 0.0 : std::log1p(1 / a), 0);
    const double sum = exponential_moments(d, n, 1).sum, u = std::log(sum) - rivals.label;
    const double smaller = std::exp(-std::fabs(u));
    const double miss = (u > 0 ? 1 : smaller) / (1 + smaller),
                 hit = (u > 0 ? smaller : 1) / (1 + smaller);
    W logs(0), shares(0);
    for_packs(d, n, -inf, [&](const W& at, index) {
      const W p = exp(at) * W(miss / sum);
      logs += log1p(p / W(a));
      shares += p / (W(a) + p);
    });
    const double r = sum_lanes(shares) * per_rival, h = hit / (a + hit);
    return solution(std::log1p(miss / (a + hit)) + sum_lanes(logs) * per_rival,
                    -hit * (miss / (a + hit) + r), rivals.top, miss / sum, h - r);
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
    T a = T(0.1); ///< a > 0: the smaller, the closer to cross-entropy
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
    core::require(o.a > 0 && std::isfinite(o.a), name, "a", o.a, "a finite number above 0");
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
