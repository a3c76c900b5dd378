// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

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
    return [
      top = V(static_cast<T>(c[0])), inverse = V(static_cast<T>(c[1])),
      share = V(static_cast<T>(c[2]))
    ](const V& x) __attribute__((always_inline)) {
      return exp((x - top) * inverse) * share;
    };
  }
  row_solution solve(const T* x, index n, index y, double*) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const rival_scores<T> rivals(x, n, y);
    if (rivals.lost)
      return no_solution();
    const bool has_label = x[y] > -std::numeric_limits<T>::infinity();
    const double label = rivals.label - margin, log_classes = std::log(static_cast<double>(n));
    if (rivals.all_masked()) // nothing but the label, if that
      return solution(has_label ? certain(log_classes) : inf, has_label ? 0.0 : -1.0, 0, 1, 0);
    const state at = settled(rivals, label, log_classes);
    const double off = at.lambda - lambda;
    const double value = at.lambda * (at.odds.surprise - log_classes) -
                         alpha * log_classes / (2 * lambda) * off * off;
    return solution(has_label ? value : inf, -at.odds.miss, static_cast<double>(rivals.top),
                    1 / at.lambda, at.odds.miss / at.sum);
  }

private:
  /// Σ f^i e^f, i = 0 … 3, of the rivals' f = (x − top)/λ.
  struct moments {
    double of[4];
  };

  /// What they are at a λ near by, f growing by a factor: to the fourth power of what it is off 1.
  static moments moved(const moments& m, double factor) {
    const double e = factor - 1, *s = m.of;
    return {{s[0] + e * (s[1] + e / 2 * (s[2] + e / 3 * s[3])),
             factor * (s[1] + e * (s[2] + e / 2 * s[3])), factor * factor * (s[2] + e * s[3]),
             factor * factor * factor * s[3]}};
  }

  /// The distribution at one λ.
  struct state {
    double lambda, sum, log_sum;
    scalar_odds odds;
    double entropy, second, third; // the central moments of f

    state(const moments& m, double label, double at)
        : lambda(at), sum(m.of[0]), log_sum(std::log(sum)), odds(log_sum - label / at) {
      const double mean = m.of[1] / sum, square = m.of[2] / sum, cube = m.of[3] / sum;
      const double of_rivals = square - mean * mean;
      const double apart = odds.hit > 0 && odds.miss > 0 ? mean - label / at : 0;
      const double both = odds.hit * odds.miss;
      entropy = odds.miss * (log_sum - mean);
      entropy += odds.hit > 0 ? odds.hit * odds.surprise : 0;
      entropy += odds.miss > 0 ? odds.miss * odds.rival_surprise : 0;
      second = odds.miss * of_rivals + both * apart * apart;
      third = odds.miss * (cube - mean * (3 * square - 2 * mean * mean)) +
              both * apart * (3 * of_rivals + (odds.hit - odds.miss) * apart * apart);
    }
  };

  /// Where the label is certain: KL = log K.
  double certain(double log_classes) const { return -log_classes * lambda * (1 - 1 / (2 * alpha)); }

  /// λ ← λ₀ (1 − KL/(α log K)) from λ₀ on falls to the largest root. Once the slope and the
  /// curvature of its defect agree on where that is, the root of their parabola may take over.
  double next(const state& at, double log_classes) const {
    constexpr double close = 0.5;
    const double to = lambda * (1 - (log_classes - at.entropy) / (alpha * log_classes));
    const double fall = at.lambda - to, strength = lambda / (alpha * log_classes * at.lambda);
    const double slope = 1 - strength * at.second;
    const double curvature = strength / at.lambda * (at.third + 3 * at.second);
    const double inside = slope * slope - 2 * curvature * fall;
    if (!(slope > 0 && inside > 0))
      return to;
    const double step = 2 * fall / (slope + std::sqrt(inside));
    const bool agree = std::fabs(curvature * step) < 0.6 * slope;
    return agree && std::fabs(step) < close * at.lambda ? at.lambda - step : to;
  }

  /// The distribution at λ*. Only the last pass has to be exact.
  state settled(const rival_scores<T>& rivals, double label, double log_classes) const {
    constexpr bool is_double = std::is_same_v<T, double>;
    constexpr double near = 0.1, nearest = is_double ? 1e-6 : 1e-3;
    constexpr int most = 200;
    bool exact = is_double;
    double at = lambda, about = 1;
    for (int step = 0;; ++step) {
      const moments m =
          exact ? moments_at<true>(rivals, at, about) : moments_at<false>(rivals, at, about);
      const state now(m, label, at);
      if (log_classes == 0)
        return now;
      const double to = next(now, log_classes), change = std::fabs(to - at);
      if (exact && (change <= nearest * at || step >= most))
        return state(moved(m, at / to), label, to);
      about = now.sum;
      exact = exact || change < near * at || step >= most;
      at = 1 / static_cast<double>(static_cast<T>(1 / to));
    }
  }

  /// Quick: to within some epsilons of T. Exact: as λ* in T needs, which is more than T itself is,
  /// with packs in double where a score has more than a small part of the sum, which is `about`.
  /// Where none has, there are many, and their errors average out.
  template <bool Exact>
  static moments moments_at(const rival_scores<T>& rivals, double at, double about) {
    using V = pack<T>;
    using W = pack<double>;
    constexpr auto parts = sizeof(double) / sizeof(T);
    constexpr double part = 1. / 64;
    const V shift(rivals.top), rate(static_cast<T>(1 / at)), least(-80);
    const V high(static_cast<T>(std::log(about * part)));
    const W wide_shift(static_cast<double>(rivals.top)), wide_rate(1 / at), wide_least(-800);
    lane_sums<T, 4> sums;
    W exact[4] = {W(0), W(0), W(0), W(0)};
    rivals.each([&](const V& z, index) __attribute__((always_inline)) {
      const V f = (z - shift) * rate;
      if (Exact && (std::is_same_v<T, double> || any(f >= high))) {
        W wide[parts];
        widen(z, wide);
        for (const W& w : wide)
          absorb(
              exact, max(wide_least, (w - wide_shift) * wide_rate),
              [](const W& x) __attribute__((always_inline)) { return exp_to<T>(x); });
        return;
      }
      absorb(
          sums.some, max(least, f), [](const V& x) __attribute__((always_inline)) {
            return Exact ? exp(x) : exp_shifted(x);
          });
      sums.count_pack();
    });
    moments m;
    for (int k = 0; k < 4; ++k)
      m.of[k] = sums.total(k) + sum_lanes(exact[k]);
    return m;
  }
  template <class V, class Exp>
  static PERDITA_INLINE void absorb(V* sums, const V& f, const Exp& image_of) {
    const V e = image_of(f), first = f * e, second = f * first;
    sums[0] += e;
    sums[1] += first;
    sums[2] += second;
    sums[3] = fma(f, second, sums[3]);
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
