// SPDX-License-Identifier: MIT
#pragma once

#include "row_job.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// A row's projection onto the simplex: the support S = {z > τ} with τ = (Σ_S z − 1)/|S|, as
/// |S|, Σ_S z, Σ_S z², of z = x − max x. Resident: S is only known once the whole row is, so the
/// core hands over a row that lies in cache, and a head that never holds one cannot serve it.
///
/// Only scores within 1 of the maximum can be in S; they are gathered in one vectorised pass and
/// reduced by Michelot's exact iteration (1986), which drops what lies below the threshold of the
/// remainder until nothing does.
struct simplex_threshold {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 3;

  /// `candidates` has room for n numbers.
  template <class T>
  static summary<simplex_threshold, double> solve(const T* x, index n, double* candidates) {
    using V = pack<T>;
    constexpr index width = static_cast<index>(lanes<T>);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    V most(-std::numeric_limits<T>::infinity()), spoilt(0);
    index i = 0;
    for (; i + width <= n; i += width) {
      const V z = V::load(x + i);
      most = max(z, most);
      spoilt += z - z; // NaN for NaN; for -inf too, which the tail below tells apart
    }
    T maximum = max_lanes(most);
    bool has_nan = false;
    for (index j = i; j < n; ++j) {
      maximum = x[j] > maximum ? x[j] : maximum;
      has_nan = has_nan || x[j] != x[j];
    }
    if (any(is_nan(spoilt)))
      for (index j = 0; j < i; ++j)
        has_nan = has_nan || x[j] != x[j];
    if (has_nan || maximum == std::numeric_limits<T>::infinity())
      return {nan, {nan, nan, nan}};
    if (maximum == -std::numeric_limits<T>::infinity())
      return {0, {0, 0, 0}};

    index count = 0;
    const auto consider = [&](index j) {
      if (x[j] >= maximum - 1)
        candidates[count++] = static_cast<double>(x[j]) - static_cast<double>(maximum);
    };
    const V edge(maximum - 1);
    for (i = 0; i + width <= n; i += width)
      if (any(V::load(x + i) >= edge))
        for (index j = i; j < i + width; ++j)
          consider(j);
    for (; i < n; ++i)
      consider(i);

    for (;;) {
      double sum = 0;
      for (index j = 0; j < count; ++j)
        sum += candidates[j];
      const double threshold = (sum - 1) / static_cast<double>(count);
      index kept = 0;
      for (index j = 0; j < count; ++j)
        if (candidates[j] > threshold)
          candidates[kept++] = candidates[j];
      if (kept == count) {
        double squares = 0;
        for (index j = 0; j < count; ++j)
          squares = std::fma(candidates[j], candidates[j], squares);
        return {static_cast<double>(maximum), {static_cast<double>(count), sum, squares}};
      }
      count = kept;
    }
  }
};

} // namespace perdita::inline PERDITA_ABI::core
