// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/fenchel_young.hpp"
#include "sparsemax.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// τ with Σ clip(x − τ, 0, 1) = B, and how many classes are above 0.
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

  /// At a trial τ, the one that would do were no class to enter or to leave (0, 1); bisection where
  /// that is outside the bracket. The sum is piecewise linear, so that the last step is exact.
  template <class T> summary<budget_threshold, double> solve(const T* x, index n, double*) const {
    const T top = row_maxima<T>(x, n).top;
    const auto maximum = static_cast<double>(top);
    if (top != top)
      return {0, {maximum, 0}};
    double finite = 0, least = std::numeric_limits<double>::infinity();
    for (index j = 0; j < n; ++j)
      if (x[j] > -std::numeric_limits<T>::infinity()) {
        ++finite;
        least = std::min(least, static_cast<double>(x[j]));
      }
    if (finite <= budget) // all that there is
      return {0, {std::numeric_limits<T>::lowest(), finite}};
    double low = least - 1, high = maximum; // the sum is all of them, and nothing
    double threshold = maximum - std::min(1.0, budget);
    for (;;) {
      const piece s = measure(x, n, threshold);
      const double total = s.active + s.ones;
      (total > budget ? low : high) = threshold;
      if (total == budget)
        return {0, {threshold, s.size}};
      double next = threshold + (total - budget) / s.count;
      if (!(low < next && next < high)) // also where no class is inside (0, 1)
        next = low / 2 + high / 2;
      if (next == low || next == high || next == threshold)
        return {0, {threshold, s.size}};
      threshold = next;
    }
  }
  /// The threshold in two parts, the first of them near enough to x for an exact difference.
  template <class V> auto slopes(const double* c) const {
    using T = typename V::value_type;
    const T near = static_cast<T>(c[0]);
    // All that is not masked gets 1, the lowest number too.
    const T rest = near == std::numeric_limits<T>::lowest()
                       ? T(-1)
                       : static_cast<T>(c[0] - static_cast<double>(near));
    return [near = V(near), rest = V(rest)](const V& x) {
      return min(V(1), max(V(0), (x - near) - rest));
    };
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    row_outcome<W> out;
    out.value = out.target_gradient = W(0);
    out.coefficient[0] = row.term[0];
    return out;
  }

private:
  /// Σ of x − τ inside (0, 1) and how many there are, those from 1 on, and all above 0.
  struct piece {
    double active, count, ones, size;
  };
  template <class T> static piece measure(const T* x, index n, double threshold) {
    using V = pack<T>;
    using W = pack<double>;
    constexpr index width = static_cast<index>(lanes<T>);
    const W zero(0), one(1), tau(threshold);
    wide_lanes<double> active;
    active.clear();
    W count(0), ones(0), size(0);
    for (index j = 0; j < n; j += width) {
      const V masked(-std::numeric_limits<T>::infinity());
      W wide[sizeof(double) / sizeof(T)];
      widen(j + width <= n ? V::load(x + j) : load_first(x + j, n - j, masked), wide);
      for (const W& w : wide) {
        const W p = w - tau;
        const auto positive = p > zero, inside = positive & (p < one);
        active.add(select(inside, p, zero));
        count += select(inside, one, zero);
        ones += select(p >= one, one, zero);
        size += select(positive, one, zero);
      }
    }
    return {active.total(), sum_lanes(count), sum_lanes(ones), sum_lanes(size)};
  }
};

/// Ω = ½ ‖p‖² where 0 ≤ p ≤ 1 and Σ p = B: beside what young_row() says, Σ_{p_j = 1} (1 − q_j)(x_j
/// − 1 − τ).
struct budget_young {
  static constexpr bool paired = true;
  double budget;

  double operator()(const double* x, const double* q, index n, index, double* slopes) const {
    using W = pack<double>;
    return young_row(x, q, n, budget, slopes, [&](const double* z, index count, double, double*) {
      double threshold = budget_formula(budget).solve(z, count, nullptr).term[0];
      if (threshold == std::numeric_limits<double>::lowest())
        threshold = below_all(z, count);
      return [threshold](const W& at, const W& share) {
        const W zero(0), over = at - W(threshold), excess = max(zero, over - W(1));
        const W gap = share - min(W(1), max(zero, over));
        const W outside = times_or_zero(share, max(zero, -over));
        const W above = max(zero, W(1) - share) * excess;
        return young_part{fma(W(0.5) * gap, gap, outside + above), gap};
      };
    });
  }

private:
  /// Where all have 1.
  static double below_all(const double* z, index n) {
    double least = std::numeric_limits<double>::infinity();
    for (index j = 0; j < n; ++j)
      least = z[j] > -std::numeric_limits<double>::infinity() ? std::min(least, z[j]) : least;
    return least - (1 + 0x1p-40 * std::abs(least));
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
/// Error: 2 epsilon, absolute, and what rounding τ to a double makes (it shows in scores of 1e8 and
/// more, or in double).
/// Throws std::invalid_argument on a mismatch of shapes, or if B is not a finite number above 0.
/// Cost: some ten reads of a row in cache.
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
