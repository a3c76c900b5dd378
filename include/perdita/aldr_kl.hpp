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
    search looking{W(lambda)};
    W result(lambda), open = select(alone | is_nan(lost), zero, one);
    moments result_m{one, zero, zero, zero};
    for (int pass = 1; any(open > zero); ++pass) {
      const W at = looking.at, inverse = one / at;
      moments m{zero, zero, zero, zero};
      for (index j = 0; j < n; ++j)
        absorb(
            m.of, max(W(-800), (rivals.score(j) - from) * inverse),
            [](const W& f) __attribute__((always_inline)) { return exp_to<T>(f); });
      looking.look(*this, state(m, label, at), log_classes, pass);
      const auto ends = (looking.found > zero) & (open > zero);
      const moments there = moved(m, at / looking.at);
      for (int k = 0; k < 4; ++k)
        result_m.of[k] = select(ends, there.of[k], result_m.of[k]);
      result = select(ends, looking.at, result);
      open = select(ends, zero, open);
    }
    const state end(result_m, label, result);
    const W of_alone = select(masked, one, zero), miss = select(alone, of_alone, end.miss);
    const W v = select(alone, W(certain(log_classes)), value(end, log_classes));
    return solutions(lost, {select(masked, inf, v), -miss, from, one / result,
                            select(alone, zero, miss / end.sum)});
  }

private:
  static constexpr double nearest = std::is_same_v<T, double> ? 1e-6 : 1e-3;

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

  /// Looks for the largest root of the defect D(λ) = λ − λ₀ (1 − KL/(α log K)), from λ₀ down.
  ///
  /// D' ≤ 1, so none is nearer than D. Where the parabola of D has a root, that is next, but from
  /// afar no more than a stride. Where it has none, its vertex is, as what the parabola says of
  /// there is right only near it; if there is none then either, a stride passes it. A step that
  /// ends where D grows again may have passed two roots, and goes back to the vertex. Only two
  /// roots within a stride, that no parabola on the way shows, are missed.
  ///
  /// D ≥ 0 at λ₀ and D < 0 below λ₀ (1 − 1/α), so a root is between `low` and `high` throughout.
  /// From the pass `halves` on, each pass halves what is between them, whatever D is, and the
  /// search ends when that is small: after no more than halves + 2 + log2(α/((α − 1) nearest²))
  /// passes.
  struct search {
    W at; ///< the next λ; the root, when found
    W low{0}, high{at}, found{0};
    W straight{0}; ///< 1: the next λ is the parabola's root, and up to there it is nearly a line
    W strode{1};   ///< 1: what is between the next λ and `high` has been seen to have no root

    static constexpr int halves = 32;
    static constexpr double far = 0.5, stride_of = 1. / 16;

    void look(const aldr_kl_formula& f, const state& here, double log_classes, int pass) {
      const W zero(0), one(1), half(0.5), &l = here.lambda;
      const W pull = one / (f.alpha * log_classes), strength = f.lambda * pull / l;
      const W defect = l - f.lambda * (one - (log_classes - here.entropy) * pull);
      const W slope = one - strength * here.second;
      const W curvature = strength / l * (here.third + here.second * 3);
      const W inside = slope * slope - curvature * 2 * defect;
      const W to_root = defect * 2 / (slope + sqrt(max(zero, inside)));
      const W to_vertex = slope / curvature;
      const W stride = max(defect, l * stride_of);

      const auto above = defect > zero, falls = slope > zero; // on the way down
      const auto root = falls & (inside >= zero), none = above & !root;
      const auto line = root & (abs(to_root) < l * far) & (abs(curvature * to_root) < slope * 0.6);
      const auto back = none & !falls & (curvature > zero) & (inside > zero) & (strode == zero);
      const auto vertex = none & falls & (slope * slope > curvature * half * defect);
      const auto passes = none & !back & !vertex;

      low = select(above, low, at);
      high = select(above & !back, at, high);
      const W from = select(back, at, low), middle = from + (high - from) * half;
      const W step = select(line | back, select(back, to_vertex, to_root),
                            select(passes, stride, min(stride, select(root, to_root, to_vertex))));
      const W to = l - step;
      const auto serves = (to > from) & (to < high) & (above | root) & (W(pass) < W(halves));
      const auto near = root & (abs(to_root) <= l * nearest);
      const auto narrow =
          !((high - low > at * (nearest * nearest)) & (low < middle) & (middle < high));
      at = select(near, l - to_root, select(serves, to, middle));
      found = select(near | narrow, one, zero);
      straight = select(line, one, zero);
      strode = select(passes | (W(pass) >= W(halves)), one, zero);
    }
  };

  /// The distribution at λ*. Only the last pass has to be exact; the first one is done.
  state settled(const rival_scores<T>& rivals, first_sweep& sweep, T own,
                double log_classes) const {
    constexpr bool is_double = std::is_same_v<T, double>;
    constexpr double near = 0.1;
    const double top = static_cast<double>(rivals.top),
                 label = static_cast<double>(own) - top - margin,
                 above = top - static_cast<double>(rivals.near);
    moments m;
    for (int k = 0; k < 4; ++k)
      m.of[k] = W(sweep.sums.total(k));
    state now(m, W(label + above), W(lambda));
    double at = lambda, about = first_lane(now.sum) * std::exp(-above / lambda);
    search looking{W(lambda)};
    bool exact = false;
    for (int pass = 1;; ++pass) {
      search next = looking;
      next.look(*this, now, log_classes, pass);
      const double to = first_lane(next.at);
      if (exact && first_lane(next.found) > 0)
        return state(moved(m, W(at / to)), W(label), W(to));
      if (exact || std::fabs(to - at) >= near * at) {
        looking = next;
      } else { // what has few digits decides nothing else
        exact = true;
        if (first_lane(next.straight) > 0) {
          looking.at = next.at;
          looking.strode = W(0);
        }
      }
      exact = exact || is_double;
      at = 1 / static_cast<double>(static_cast<T>(1 / first_lane(looking.at)));
      m = exact ? moments_at<true>(rivals, at, about) : moments_at<false>(rivals, at, about);
      now = state(m, W(label), W(at));
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
/// What is computed: ℓ at the largest λ* ≤ λ₀ that satisfies the last equation, that which the
/// iteration of it from λ₀ falls to, to the last digits. The bracket need not be concave: where the
/// equation has several solutions (α near 1, a row between sure and not), that need not be the
/// maximum. λ* lies in [λ₀ (1 − 1/α), λ₀]: a row that is sure of any class gets a small λ. Where
/// the two largest solutions meet and vanish as the scores change, λ* falls to the next and the
/// value jumps; the gradient is exact between such places, and near them λ* has fewer digits.
/// Masked classes (-inf) have no share; a masked label costs +inf, with slope −1; +inf elsewhere or
/// NaN makes the row NaN.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`. Needs whole rows, so
/// not on the linear head; λ* takes a handful of passes over a row, near such places up to 30.
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
    core::positive(name, "lambda", o.lambda);
    core::require(o.alpha > 1 && std::isfinite(o.alpha), name, "alpha", o.alpha,
                  "a finite number above 1");
    core::require(std::isfinite(1 / (o.lambda * (1 - 1 / o.alpha))), name, "lambda", o.lambda,
                  "so large that the inverse of lambda (1 - 1/alpha) is finite");
    core::finite(name, "margin", o.margin);
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
