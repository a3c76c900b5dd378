// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/fenchel_young.hpp"
#include "core/solved_row.hpp"
#include "sparsemax.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// τ with Σ clip(x − τ, 0, 1) = B, less the ⌈B⌉-th largest score, which is the shift, and how many
/// classes are above 0.
struct budget_threshold {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 2;
  static constexpr int size = 1;
};

struct budget_formula : row_formula {
  using statistic = budget_threshold;
  double budget;

  explicit budget_formula(double b) : budget(b) {}

  /// With k = ⌈B⌉ and the k-th largest score v: above v there are fewer than B classes, so τ < v;
  /// and where τ = v − B/k, k classes have B/k or more. What is near τ is near v, so that its
  /// distance to v is exact, whatever the size of the scores. `room` is for n numbers and a pack.
  template <class T>
  summary<budget_threshold, double> solve(const T* x, index n, double* room) const {
    const row_maxima<T> maxima(x, n);
    if (const auto top = static_cast<double>(maxima.top); top != top)
      return {top, {top, 0}};
    pack<T> unmasked(0);
    const T masked = -std::numeric_limits<T>::infinity();
    for_packs(
        x, n, masked, [&](const pack<T>& z, index) __attribute__((always_inline)) {
          unmasked += select(z > pack<T>(masked), pack<T>(1), pack<T>(0));
        });
    const index finite = total_count(unmasked);
    if (finite == 0)
      return {0, {0, 0}};
    const auto all = static_cast<double>(finite);
    const bool whole = all <= budget;
    const index k = whole ? finite : static_cast<index>(std::ceil(budget));
    const T level = largest(maxima, k, room);
    if (whole)
      return {static_cast<double>(level), {-1, all}};
    const index count = maxima.gather(static_cast<T>(level - 1), level, room);
    const auto end = std::remove_if(room, room + count, [](double d) { return d >= 1; });
    const auto above = static_cast<double>(room + count - end);
    const auto [threshold, size] =
        search(room, end - room, budget - above, budget / static_cast<double>(k));
    return {static_cast<double>(level), {threshold, size + above}};
  }
  template <class V, class C> auto slopes(const C* c) const {
    return [level = to_lanes<V>(c[0]), threshold = to_lanes<V>(c[1])](const V& x) {
      return min(V(1), max(V(0), (x - level) - threshold));
    };
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    row_outcome<W> out;
    out.value = out.target_gradient = W(0);
    out.coefficient[0] = row.shift;
    out.coefficient[1] = row.term[0];
    return out;
  }

private:
  /// The k-th largest score of k or more that are not masked. In a long row, if k is small, that of
  /// some sets' maxima is not above it, and leaves few.
  template <class T> static T largest(const row_maxima<T>& maxima, index k, double* room) {
    if (k == 1)
      return maxima.top;
    constexpr index sets = row_maxima<T>::block;
    T edge = std::numeric_limits<T>::lowest();
    if (k <= sets && maxima.columns() > 4 * sets) {
      alignas(64) T some[sets];
      maxima.largest(some);
      std::nth_element(some, some + k - 1, some + sets, std::greater<>());
      edge = std::max(edge, some[k - 1]);
    }
    const index count = maxima.gather(edge, 0, room);
    std::nth_element(room, room + k - 1, room + count, std::greater<>());
    return static_cast<T>(room[k - 1]);
  }

  /// At a trial τ: Σ p, how many p there are above 0, in (0, 1] and in [0, 1), and the nearest
  /// outside, which is how far it is to where Σ p changes if there are none.
  struct piece {
    double total, size, falling, rising, next_above, next_below;
  };
  static piece measure(const double* d, index n, double threshold) {
    using W = pack<double>;
    constexpr double inf = std::numeric_limits<double>::infinity();
    const W zero(0), one(1), tau(threshold);
    wide_lanes<double> total;
    total.clear();
    W size(0), falling(0), rising(0), above(-inf), below(-inf);
    for_packs(
        d, n, -inf, [&](const W& at, index) __attribute__((always_inline)) {
          const W p = at - tau;
          const auto positive = p > zero, under = p < one;
          total.add(select(under, max(zero, p), one));
          size += select(positive, one, zero);
          falling += select(positive & (p <= one), one, zero);
          rising += select(under & (p >= zero), one, zero);
          above = max(above, select(p > one, -p, W(-inf)));
          below = max(below, select(p < zero, p, W(-inf)));
        });
    return {total.total(),     sum_lanes(size),       sum_lanes(falling),
            sum_lanes(rising), -max_lanes(above) - 1, max_lanes(below)};
  }

  struct found {
    double threshold, size;
  };
  /// τ from −reach on, below 0, where Σ clip(d − τ, 0, 1) is `wanted`. The sum is piecewise linear:
  /// the next τ is what would do were no class to enter or to leave (0, 1), so that the last step
  /// is exact, and bisection where that is outside the bracket, or takes its time.
  static found search(const double* d, index n, double wanted, double reach) {
    double low = -reach, high = 0, threshold = low;
    for (int round = 0;; ++round) {
      const piece s = measure(d, n, threshold);
      const double over = s.total - wanted;
      const bool rises = over > 0;
      (rises ? low : high) = threshold;
      const double slope = rises ? s.falling : s.rising;
      double step = over / slope;
      if (slope == 0)
        step = rises ? s.next_above : s.next_below;
      double next = threshold + step;
      const bool serves = low < next && next < high && round < 40;
      if (!serves && next != threshold)
        next = low + (high - low) / 2;
      if (over == 0 || next == threshold || next == low || next == high ||
          high - low <= 0x1p-60 * reach)
        return {threshold, s.size};
      threshold = next;
    }
  }
};

/// Ω = ½ ‖p‖² where 0 ≤ p ≤ 1 and Σ p = B: beside what young_row() says, Σ_{p_j = 1} (1 − q_j)(x_j
/// − 1 − τ).
struct budget_young {
  static constexpr bool paired = true;
  double budget;

  double operator()(const double* x, const double* q, index n, index, double* slopes) const {
    using W = pack<double>;
    const auto solve = [&](const double* z, index count, double, double* room) {
      const auto s = budget_formula(budget).solve(z, count, room);
      return [level = s.shift, threshold = s.term[0]](const W& at, const W& share) {
        const W zero(0), over = (at - W(level)) - W(threshold), excess = max(zero, over - W(1));
        const W gap = share - min(W(1), max(zero, over));
        const W outside = times_or_zero(share, max(zero, -over));
        const W above = max(zero, W(1) - share) * excess;
        return young_part{fma(W(0.5) * gap, gap, outside + above), gap};
      };
    };
    return young_row(x, q, n, budget, slopes, solve);
  }
};

/// As sparsemax's, over the classes inside (0, 1).
template <class T> struct budget_backward_formula : simplex_backward_formula<T> {
  budget_backward_formula() : simplex_backward_formula<T>(2) {}
  template <class V> V score(const V& p) const {
    return select((p > V(0)) & (p < V(1)), V(1), p - min(p, V(1))); // NaN stays NaN
  }
};

} // namespace core

/// What budget_map() may be told.
struct budget_options {
  double budget = 1;            ///< Σ p, above 0
  vector_view<index> support{}; ///< one number per row: the classes above the threshold
  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

/// result = the nearest point with 0 ≤ p ≤ 1 and Σ p = B, by rows:  p_j = clip(x_j − τ, 0, 1).
/// B = 1 is sparsemax; an integer B relaxes the choice of the B largest. `result` may be the
/// scores. Classes at -inf get 0; where there are no more than B others, those get 1 each. A NaN or
/// +inf makes the row NaN, and its support 0.
/// Error: 2 epsilon, absolute.
/// Throws std::invalid_argument on a mismatch of shapes, or if B is not a finite number above 0.
/// Cost: some three reads of a row in cache, and some ten of the scores within 1 of τ; a selection
/// from the row besides for large B.
/// Source: Blondel, Martins and Niculae, "Learning with Fenchel-Young losses", JMLR 2020.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void budget_map(X&& scores, Y&& result, const budget_options& options = {}) {
  core::require(options.budget > 0 && std::isfinite(options.budget), "budget_map", "budget",
                options.budget, "a finite number above 0");
  core::map_onto_simplex<T>("budget_map", core::budget_formula(options.budget),
                            core::as_matrix(scores), core::as_matrix(result), options.support,
                            options.run_on, options.memory);
}

/// ∂/∂scores from p = budget_map(scores) and d_p = ∂/∂p:  where 0 < p_j < 1, d_j less the mean of d
/// over those; else 0. d_scores may be p or d_p.
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void budget_map_backward(P&& p, D&& d_p, Y&& d_scores, const executor& run_on = {},
                         workspace* memory = nullptr) {
  const auto d = core::as_matrix(d_p);
  core::map_rows<T>("budget_map_backward", core::budget_backward_formula<T>{}, core::as_matrix(p),
                    &d, core::as_matrix(d_scores), run_on, memory);
}

} // namespace perdita::inline PERDITA_ABI
