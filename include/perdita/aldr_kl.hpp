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
  using W = pack<double>;

  template <class V, class C> auto slopes(const C* c) const {
    return [ top = to_lanes<V>(c[0]), inverse = to_lanes<V>(c[1]),
             share = to_lanes<V>(c[2]) ](const V& x) __attribute__((always_inline)) {
      return exp((x - top) * inverse) * share;
    };
  }
  template <class V, class Exp>
  static PERDITA_INLINE void absorb(V* sums, const V& f, const Exp& image_of) {
    const V e = image_of(f), first = f * e, second = f * first;
    sums[0] += e;
    sums[1] += first;
    sums[2] += second;
    sums[3] = fma(f, second, sums[3]);
  }
  /// The moments at the first λ, quick, of the rivals' (x − near)/λ.
  struct first_sweep {
    double slack;
    pack<T> rate, shift;
    lane_sums<T, 4> sums;

    explicit first_sweep(double at) : slack(16 * at), rate(static_cast<T>(1 / at)), shift(0) {}
    void start(T near) { shift = pack<T>(near); }
    PERDITA_INLINE void operator()(const pack<T>& z, index) {
      absorb(
          sums.some, max(pack<T>(-80), (z - shift) * rate),
          [](const pack<T>& f) __attribute__((always_inline)) { return exp_shifted(f); });
      sums.count_pack();
    }
  };
  row_solution solve(const T* x, index n, index y, double*) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    first_sweep sweep(lambda);
    const rival_scores<T> rivals(x, n, y, sweep);
    if (rivals.lost)
      return no_solution();
    const bool has_label = x[y] > -std::numeric_limits<T>::infinity();
    const double log_classes = std::log(static_cast<double>(n));
    if (rivals.all_masked()) // nothing but the label, if that
      return solution(has_label ? certain(log_classes) : inf, has_label ? 0.0 : -1.0, 0, 1, 0);
    const state at = settled(rivals, sweep, x[y], log_classes);
    const double miss = first_lane(at.miss);
    return solution(has_label ? first_lane(value(at, log_classes)) : inf, -miss,
                    static_cast<double>(rivals.top), 1 / first_lane(at.lambda),
                    miss / first_lane(at.sum));
  }
  summary<solved_row, W> solve_rows(pack<T>* x, index n, const pack<T>& target) const {
    const W zero(0), one(1), inf(std::numeric_limits<double>::infinity());
    const short_rivals<T> rivals(x, n, target);
    const W own = first_rows(rivals.own), top = first_rows(rivals.top);
    const auto alone = top == -inf, masked = own == -inf;
    const W from = select(alone, zero, top), label = own - from - margin;
    const W lost = first_rows(rivals.spoilt) + (top - from);
    const double log_classes = std::log(static_cast<double>(n));
    W at(lambda), result = at, open = select(alone | is_nan(lost), zero, one);
    moments m, result_m{one, zero, zero, zero};
    for (int step = 0; any(open > zero); ++step) {
      const W inverse = one / at;
      m = {zero, zero, zero, zero};
      for (index j = 0; j < n; ++j)
        absorb(
            m.of, max(W(-800), (rivals.score(j) - from) * inverse),
            [](const W& f) __attribute__((always_inline)) { return exp_to<T>(f); });
      const W to = next(state(m, label, at), log_classes);
      const auto found = (abs(to - at) <= nearest * at) & (open > zero);
      const auto ends = step < most_steps ? found : open > zero;
      const moments there = moved(m, at / to);
      for (int k = 0; k < 4; ++k)
        result_m.of[k] = select(ends, there.of[k], result_m.of[k]);
      result = select(ends, to, result);
      open = select(ends, zero, open);
      at = select(open > zero, to, at);
    }
    const state end(result_m, label, result);
    const W of_alone = select(masked, one, zero), miss = select(alone, of_alone, end.miss);
    const W v = select(alone, W(certain(log_classes)), value(end, log_classes));
    return solutions(lost, {select(masked, inf, v), -miss, from, one / result,
                            select(alone, zero, miss / end.sum)});
  }

private:
  static constexpr double nearest = std::is_same_v<T, double> ? 1e-6 : 1e-3;
  static constexpr int most_steps = 200;

  /// Σ f^i e^f, i = 0 … 3, of the rivals' f = (x − top)/λ.
  struct moments {
    W of[4];
  };

  /// What they are at a λ near by, f growing by a factor: to the fourth power of what it is off 1.
  static moments moved(const moments& m, const W& factor) {
    const W e = factor - 1, *s = m.of;
    return {{s[0] + e * (s[1] + e * 0.5 * (s[2] + e * (1. / 3) * s[3])),
             factor * (s[1] + e * (s[2] + e * 0.5 * s[3])), factor * factor * (s[2] + e * s[3]),
             factor * factor * factor * s[3]}};
  }

  /// The distribution at one λ.
  struct state {
    W lambda, sum, hit, miss, surprise;
    W entropy, second, third; // the central moments of f

    state(const moments& m, const W& label, const W& at) : lambda(at), sum(m.of[0]) {
      const W zero(0), one(1), log_sum = log(sum), inverse = one / sum, u = log_sum - label / at;
      const W e = exp(-abs(u)), larger = one / (one + e), smaller = e * larger, least = log1p(e);
      miss = select(u > zero, larger, smaller);
      hit = select(u > zero, smaller, larger);
      surprise = least + max(zero, u);
      const W mean = m.of[1] * inverse, square = m.of[2] * inverse, cube = m.of[3] * inverse;
      const W of_rivals = square - mean * mean;
      const W apart = select((hit > zero) & (miss > zero), mean - label / at, zero);
      const W both = hit * miss;
      entropy = miss * (log_sum - mean) + select(hit > zero, hit * surprise, zero) +
                select(miss > zero, miss * (least + max(zero, -u)), zero);
      second = miss * of_rivals + both * apart * apart;
      third = miss * (cube - mean * (square * 3 - mean * mean * 2)) +
              both * apart * (of_rivals * 3 + (hit - miss) * apart * apart);
    }
  };

  W value(const state& at, double log_classes) const {
    const W off = at.lambda - lambda;
    return at.lambda * (at.surprise - log_classes) - alpha * log_classes / (2 * lambda) * off * off;
  }
  /// Where the label is certain: KL = log K.
  double certain(double log_classes) const { return -log_classes * lambda * (1 - 1 / (2 * alpha)); }

  /// λ ← λ₀ (1 − KL/(α log K)) from λ₀ on falls to the largest root. Once the slope and the
  /// curvature of its defect agree on where that is, the root of their parabola may take over.
  W next(const state& at, double log_classes) const {
    constexpr double close = 0.5;
    const W zero(0), one(1), pull = W(1 / (alpha * log_classes));
    const W to = lambda * (one - (log_classes - at.entropy) * pull);
    const W fall = at.lambda - to, strength = lambda * pull / at.lambda;
    const W slope = one - strength * at.second;
    const W curvature = strength / at.lambda * (at.third + at.second * 3);
    const W inside = slope * slope - curvature * 2 * fall;
    const W step = fall * 2 / (slope + sqrt(max(zero, inside)));
    const auto serves = (slope > zero) & (inside > zero) & (abs(step) < at.lambda * close);
    return select(serves & (abs(curvature * step) < slope * 0.6), at.lambda - step, to);
  }

  /// The distribution at λ*. Only the last pass has to be exact; the first one is done.
  state settled(const rival_scores<T>& rivals, first_sweep& sweep, T own,
                double log_classes) const {
    constexpr bool is_double = std::is_same_v<T, double>;
    constexpr double near = 0.1;
    const double top = static_cast<double>(rivals.top),
                 label = static_cast<double>(own) - top - margin,
                 above = top - static_cast<double>(rivals.near);
    double at = lambda, to, about;
    {
      moments m;
      for (int k = 0; k < 4; ++k)
        m.of[k] = W(sweep.sums.total(k));
      const state now(m, W(label + above), W(at));
      to = first_lane(next(now, log_classes));
      about = first_lane(now.sum) * std::exp(-above / lambda);
    }
    bool exact = is_double;
    for (int step = 1;; ++step) {
      const double change = std::fabs(to - at);
      exact = exact || change < near * at || step >= most_steps;
      at = 1 / static_cast<double>(static_cast<T>(1 / to));
      const moments m =
          exact ? moments_at<true>(rivals, at, about) : moments_at<false>(rivals, at, about);
      const state now(m, W(label), W(at));
      to = first_lane(next(now, log_classes));
      if (exact && (std::fabs(to - at) <= nearest * at || step >= most_steps))
        return state(moved(m, W(at / to)), W(label), W(to));
      about = first_lane(now.sum);
    }
  }

  /// Quick: to within some epsilons of T. Exact: as λ* in T needs, which is more than T itself is,
  /// with packs in double where a score has more than a small part of the sum, which is `about`.
  /// Where none has, there are many, and their errors average out.
  template <bool Exact>
  static moments moments_at(const rival_scores<T>& rivals, double at, double about) {
    using V = pack<T>;
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
      m.of[k] = W(sums.total(k) + sum_lanes(exact[k]));
    return m;
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
