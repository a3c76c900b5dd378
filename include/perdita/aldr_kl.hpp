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

/// With d_k = x_k + c − (the largest of these) for k ≠ y, S = Σ_{k≠y} e^{d_k/λ} and
/// u = log S − d_y/λ, at the λ* that is looked for:
///   ℓ = λ (softplus(u) − log K) − (α log K/(2 λ₀)) (λ − λ₀)²,  ∂ℓ/∂x_k = σ(u) e^{d_k/λ}/S
template <class T> struct aldr_kl_formula : solved_formula {
  double lambda, alpha, margin;

  template <class V> auto slopes(const double* c) const {
    return
        [top = V(static_cast<T>(c[0])), inverse = V(static_cast<T>(c[1])),
         share = V(static_cast<T>(c[2]))](const V& x) { return exp((x - top) * inverse) * share; };
  }
  row_solution solve(const T* x, index n, index y, double* d) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const rivals_of_row rivals(x, n, y, d);
    if (rivals.lost)
      return no_solution();
    const double label = rivals.label - margin, log_classes = std::log(static_cast<double>(n));
    if (rivals.top == -inf) // nothing but the label, if that
      return solution(x[y] > -inf ? certain(log_classes) : inf, x[y] > -inf ? 0.0 : -1.0, 0, 1, 0);

    state at(d, n, label, lambda);
    if (n > 1)
      settle(at, d, n, label, log_classes);
    const double miss = at.miss, off = at.lambda - lambda;
    const double value =
        at.lambda * (at.surprise - log_classes) - alpha * log_classes / (2 * lambda) * off * off;
    return solution(label == -inf ? inf : value, -miss, rivals.top, 1 / at.lambda, miss / at.sum);
  }

private:
  /// The distribution at one λ.
  struct state {
    double lambda, sum, miss, surprise, entropy, variance;

    state(const double* d, index n, double label, double at) : lambda(at) {
      const exponential_moments m(d, n, 1 / at);
      sum = m.sum;
      const double log_sum = std::log(sum), u = log_sum - label / at;
      const double smaller = std::exp(-std::fabs(u)), hit = (u > 0 ? smaller : 1) / (1 + smaller);
      miss = (u > 0 ? 1 : smaller) / (1 + smaller);
      surprise = std::log1p(smaller) + std::fmax(u, 0); // of the label
      const double rival_surprise = std::log1p(smaller) + std::fmax(-u, 0);
      const double mean = m.first / sum;
      entropy = miss * (log_sum - mean / at);
      entropy += hit > 0 ? hit * surprise : 0;
      entropy += miss > 0 ? miss * rival_surprise : 0;
      const double apart = hit > 0 && miss > 0 ? mean - label : 0;
      variance = miss * (m.second / sum - mean * mean) + hit * miss * apart * apart;
    }
  };

  /// Where the label is certain: KL = log K.
  double certain(double log_classes) const { return -log_classes * lambda * (1 - 1 / (2 * alpha)); }
  /// λ ← λ₀ (1 − KL/(α log K)) from λ₀ on falls to the largest root. Its slope says when Newton's
  /// step may take over.
  void settle(state& at, const double* d, index n, double label, double log_classes) const {
    constexpr double close = 0.02, epsilon = std::numeric_limits<double>::epsilon();
    constexpr int most = 200;
    for (int step = 0; step < most; ++step) {
      const double next = lambda * (1 - (log_classes - at.entropy) / (alpha * log_classes));
      const double fall = at.lambda - next;
      const double cubed = at.lambda * at.lambda * at.lambda;
      const double rate = lambda * at.variance / (alpha * log_classes * cubed);
      const bool newton = std::fabs(fall) < close * (1 - rate) * at.lambda;
      const double to = newton ? at.lambda - fall / (1 - rate) : next;
      const double change = std::fabs(to - at.lambda);
      at = state(d, n, label, to);
      if (change <= 4 * epsilon * to)
        return;
    }
  }
};

} // namespace core

/// ALDR-KL: LDR-KL whose λ adapts to the row, and so to how noisy its label may be,
///
///   ℓ = max_λ  λ log( (1/K) Σ_k e^{δ_k/λ} ) − (α log K/(2 λ₀)) (λ − λ₀)²
///   δ_k = x_k − x_y + c for k ≠ y,  δ_y = 0
///   ∂ℓ/∂x = p − e_y,   p = softmax(δ/λ*),   λ* = λ₀ (1 − KL(p ‖ 1/K)/(α log K))
///
/// λ* is solved for to the last digits. Where the equation has several solutions (the bracket need
/// not be concave) it is the largest of them, that which the iteration from λ₀ falls to. It lies in
/// [λ₀ (1 − 1/α), λ₀]: a row that is sure of any class gets a small λ.
/// Masked classes (-inf) have no share; a masked label costs +inf, with slope −1; +inf elsewhere or
/// NaN makes the row NaN.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`. Needs whole rows, so
/// not on the linear head; λ* takes a handful of passes over a row.
/// Source: Zhu, Ying, Yang, "Label distributionally robust losses for multi-class classification",
/// ICML 2023. Their script does one step of the equation a visit, from the λ of the visit before,
/// without the margin, on normalised scores; here the equation itself holds.
template <class T = float> class aldr_kl : public row_loss<aldr_kl<T>, T> {
public:
  struct options {
    T lambda = 1; ///< λ₀ > 0
    T alpha = 2;  ///< α > 1: how hard λ is held at λ₀
    T margin = 0; ///< c
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "aldr_kl";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = false,
                                      .shift_invariant = true};

  aldr_kl() : aldr_kl(options{}) {}
  explicit(false) aldr_kl(const options& o) : options_(o) {
    core::require(o.lambda > 0 && std::isfinite(o.lambda), name, "lambda", o.lambda,
                  "a finite number above 0");
    core::require(o.alpha > 1 && std::isfinite(o.alpha), name, "alpha", o.alpha,
                  "a finite number above 1");
    core::require(std::isfinite(o.margin), name, "margin", o.margin, "a finite number");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<aldr_kl<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::aldr_kl_formula<T>{{},
                               static_cast<double>(options_.lambda),
                               static_cast<double>(options_.alpha),
                               static_cast<double>(options_.margin)});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
