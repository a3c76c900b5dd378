// SPDX-License-Identifier: MIT
#pragma once

// The arithmetic of every reference: 113 bits, and an exponent that never runs out. Nothing here or
// in a descriptor calls the library.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

namespace perdita_tests {

#if __LDBL_MANT_DIG__ == 113
using wide = long double;
using std::exp, std::expm1, std::log, std::log1p, std::pow, std::sqrt, std::tanh, std::sin,
    std::cos, std::atan, std::ldexp, std::frexp;
#elif defined(__SIZEOF_FLOAT128__) && defined(__GLIBC__)
__extension__ typedef __float128 wide;
// What <math.h> calls expf128 and the like, by names that contradict no declaration there.
#define PERDITA_WIDE(name)                                                                         \
  extern "C" wide perdita_wide_##name(wide) noexcept __asm__(#name "f128");                        \
  inline wide name(wide x) { return perdita_wide_##name(x); }
PERDITA_WIDE(exp)
PERDITA_WIDE(expm1)
PERDITA_WIDE(log)
PERDITA_WIDE(log1p)
PERDITA_WIDE(sqrt)
PERDITA_WIDE(tanh)
PERDITA_WIDE(sin)
PERDITA_WIDE(cos)
PERDITA_WIDE(atan)
#undef PERDITA_WIDE
extern "C" wide perdita_wide_pow(wide, wide) noexcept __asm__("powf128");
extern "C" wide perdita_wide_ldexp(wide, int) noexcept __asm__("ldexpf128");
extern "C" wide perdita_wide_frexp(wide, int*) noexcept __asm__("frexpf128");
inline wide pow(wide x, wide y) { return perdita_wide_pow(x, y); }
inline wide ldexp(wide x, int exponent) { return perdita_wide_ldexp(x, exponent); }
inline wide frexp(wide x, int* exponent) { return perdita_wide_frexp(x, exponent); }
#else
#error "the references need arithmetic of 113 bits: Linux with glibc on x86-64 or AArch64"
#endif

/// What answers are compared in, and what they are allowed is reckoned in: 64 bits or more, by
/// instructions where `wide` calls a function for every sum. A double has 53: of its ulp this
/// rounds off a thousandth.
using judged = long double;

inline wide infinity() { return std::numeric_limits<double>::infinity(); }
inline wide not_a_number() { return std::numeric_limits<double>::quiet_NaN(); }
inline bool is_nan(const wide& x) { return !(x == x); }
inline bool is_finite(const wide& x) { return x - x == 0; }
inline wide larger(const wide& a, const wide& b) { return a > b ? a : b; }
inline wide smaller(const wide& a, const wide& b) { return a < b ? a : b; }
/// The worse of two errors; NaN is the worst, and stays.
inline wide worse(const wide& a, const wide& b) { return a != a || a >= b ? a : b; }
inline double worse(double a, double b) { return a != a || a >= b ? a : b; }
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
inline std::string text(const wide& x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.17g", static_cast<double>(x));
  return digits;
}

} // namespace perdita_tests
