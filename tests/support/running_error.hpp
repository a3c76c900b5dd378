// SPDX-License-Identifier: MIT
#pragma once

// Running error analysis (Wilkinson 1963): a reference that follows an algorithm, to first order,
// with every operation's own error and what it makes of the errors that come in. Errors are in
// epsilons of double, so that an operation rounds by half of its result. A sum of e^z passes the
// errors of the z on in proportion to its terms; a probability's relative error is the absolute
// error of its logarithm.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace perdita_tests {

/// Largest errors of exp, log and the like (core/math.hpp), in epsilons of the result.
constexpr double kernel_error = 1.1, sigmoid_error = 2.5, expm1_error = 2.4;

struct inexact {
  double value, error;
};

/// x less its maximum, -inf as it is.
inline std::vector<double> lowered(std::vector<double> x) {
  const double top = *std::max_element(x.begin(), x.end());
  for (double& v : x)
    v = top > -std::numeric_limits<double>::infinity() ? v - top : v;
  return x;
}
/// An exact p times e^(error of log p): how far off. Beyond the first order, as errors of
/// logarithms may be large.
inline double grown(double p, double log_error) {
  const double epsilon = std::numeric_limits<double>::epsilon();
  return p > 0 ? p * std::expm1(std::min(log_error * epsilon, 700.0)) / epsilon : 0;
}
/// Rounding of a sum of n terms above 0, relative.
inline double summed(std::size_t n) { return static_cast<double>(n) / 2; }

} // namespace perdita_tests
