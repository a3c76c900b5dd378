// SPDX-License-Identifier: MIT
#pragma once

/// Products with a weight that may take something out of a sum. What has weight 0 does not count:
/// no infinity and no NaN comes through. times_or_nan is for losses that promise that NaN shows
/// whatever the weight.

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// weight * x; 0 where the weight is 0, whatever x is.
template <class W> PERDITA_INLINE W weighted(const W& weight, const W& x) {
  return select(weight == W(0), W(0), weight * x);
}
/// The same of one number.
inline double times(double weight, double x) { return weight == 0 ? 0 : weight * x; }
/// The same, but NaN stays NaN.
inline double times_or_nan(double weight, double x) { return x == x ? times(weight, x) : x; }

} // namespace perdita::inline PERDITA_ABI::core
