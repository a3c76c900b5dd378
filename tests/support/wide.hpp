// SPDX-License-Identifier: MIT
#pragma once

// The arithmetic of every reference: 113 bits, and an exponent that never runs out. Nothing here or
// in a descriptor calls the library.

#include <boost/multiprecision/cpp_bin_float.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace perdita_tests {

using wide = boost::multiprecision::cpp_bin_float_quad;

inline wide infinity() { return std::numeric_limits<wide>::infinity(); }
inline wide not_a_number() { return std::numeric_limits<wide>::quiet_NaN(); }
inline bool is_nan(const wide& x) { return !(x == x); }
inline bool is_finite(const wide& x) { return x - x == 0; }
inline wide larger(const wide& a, const wide& b) { return a > b ? a : b; }
inline wide smaller(const wide& a, const wide& b) { return a < b ? a : b; }
inline wide size_of(const wide& x) { return x < 0 ? wide(-x) : x; }

/// 0 · log 0 = 0: a term without weight does not count, whatever the other factor is.
inline wide weighted(const wide& weight, const wide& x) {
  return weight == 0 ? wide(0) : wide(weight * x);
}

inline wide logistic(const wide& x) {
  return x > 0 ? wide(1 / (1 + exp(-x))) : wide(exp(x) / (1 + exp(x)));
}
inline wide softplus(const wide& x) {
  return x > 0 ? wide(x + log1p(wide(exp(-x)))) : wide(log1p(wide(exp(x))));
}

/// log Σ e^z over the classes that `counts` lets in; -inf where there are none.
template <class Counts> wide log_sum_exp(const std::vector<wide>& z, Counts counts) {
  wide top = -infinity();
  for (std::size_t j = 0; j < z.size(); ++j)
    if (counts(j) && z[j] > top)
      top = z[j];
  if (!is_finite(top))
    return top;
  wide sum = 0;
  for (std::size_t j = 0; j < z.size(); ++j)
    if (counts(j) && z[j] > -infinity())
      sum += exp(wide(z[j] - top));
  return top + log(sum);
}

/// Digits for a message.
inline std::string text(const wide& x) { return x.str(17); }

} // namespace perdita_tests
