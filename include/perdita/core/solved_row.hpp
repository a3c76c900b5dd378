// SPDX-License-Identifier: MIT
#pragma once

/// Losses that an algorithm over a whole row finds, label and all, and not a summary that parts of
/// the row could be merged from: formulas for resident_kernel.hpp whose solve(x, n, label, room)
/// returns a row_solution.

#include <limits>

#include "row_formula.hpp"

namespace perdita::inline PERDITA_ABI::core {

struct solved_row {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 2 + coefficients;
};
using row_solution = summary<solved_row, double>;

/// What solve() returns.
inline row_solution solution(double value, double target_gradient, double c0 = 0, double c1 = 0,
                             double c2 = 0) {
  return {0, {value, target_gradient, c0, c1, c2}};
}
/// The row is NaN, and slopes() make NaN of these coefficients.
inline row_solution no_solution() {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  return solution(nan, nan, nan, nan, nan);
}

struct solved_formula : row_formula {
  using statistic = solved_row;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  template <class Row> auto finish(const Row& row) const {
    row_outcome<std::remove_cvref_t<decltype(row.target)>> out;
    out.value = row.term[0];
    out.target_gradient = row.term[1];
    for (int k = 0; k < coefficients; ++k)
      out.coefficient[k] = row.term[2 + k];
    return out;
  }
};

/// f(numbers, how many of them count) over n numbers, a pack at a time; the others are `filler`.
template <class T, class F> void for_packs(const T* x, index n, T filler, F f) {
  constexpr auto width = static_cast<index>(lanes<T>);
  for (index i = 0; i < n; i += width)
    f(i + width <= n ? pack<T>::load(x + i) : load_first(x + i, n - i, pack<T>(filler)), i);
}

/// The scores of a row's rivals as their distances from the largest of them, in double; -inf at the
/// label.
struct rivals_of_row {
  double top = -std::numeric_limits<double>::infinity(); ///< the largest rival
  double label = 0;                                      ///< x_y − top
  bool lost = false;                                     ///< NaN or a rival of +inf

  template <class T> rivals_of_row(const T* x, index n, index y, double* distances) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const maximum<T> before = find_maximum(x, y), after = find_maximum(x + y + 1, n - y - 1, y + 1);
    top = static_cast<double>(merge(before, after).value);
    const double from = top == -inf ? 0 : top;
    label = static_cast<double>(x[y]) - from;
    double spoilt = label == label ? 0 : 1;
    for (index k = 0; k < n; ++k) {
      distances[k] = static_cast<double>(x[k]) - from;
      spoilt += distances[k] == distances[k] ? 0 : 1;
    }
    distances[y] = -inf;
    lost = spoilt > 0 || top == inf;
  }
};

/// Σ e^{θd}, Σ d e^{θd} and Σ d² e^{θd} of distances d ≤ 0.
struct exponential_moments {
  double sum = 0, first = 0, second = 0;

  exponential_moments(const double* d, index n, double theta) {
    using W = pack<double>;
    constexpr double inf = std::numeric_limits<double>::infinity();
    W s0(0), s1(0), s2(0);
    for_packs(d, n, -inf, [&](const W& at, index) {
      const W image = exp(at * W(theta)), x = select(image == W(0), W(0), at), weighted = image * x;
      s0 += image;
      s1 += weighted;
      s2 = fma(weighted, x, s2);
    });
    sum = sum_lanes(s0);
    first = sum_lanes(s1);
    second = sum_lanes(s2);
  }
};

} // namespace perdita::inline PERDITA_ABI::core
