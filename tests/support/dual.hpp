// SPDX-License-Identifier: MIT
#pragma once

// Numbers of 113 bits with a derivative: references give value and slope from one formula.

#include "wide.hpp"

namespace perdita_tests {

struct dual {
  wide value, slope;
  explicit dual(const wide& x, const wide& d = 0) : value(x), slope(d) {}
};

inline dual operator-(const dual& a) { return dual(-a.value, -a.slope); }
inline dual operator+(const dual& a, const dual& b) {
  return dual(a.value + b.value, a.slope + b.slope);
}
inline dual operator-(const dual& a, const dual& b) {
  return dual(a.value - b.value, a.slope - b.slope);
}
inline dual operator*(const dual& a, const dual& b) {
  return dual(a.value * b.value, a.value * b.slope + a.slope * b.value);
}
inline dual operator+(const dual& a, const wide& b) { return dual(a.value + b, a.slope); }
inline dual operator-(const dual& a, const wide& b) { return dual(a.value - b, a.slope); }
inline dual operator-(const wide& a, const dual& b) { return dual(a - b.value, -b.slope); }
inline dual operator*(const wide& a, const dual& b) { return dual(a * b.value, a * b.slope); }
inline dual operator*(const dual& a, const wide& b) { return b * a; }

/// f(a), from its value and derivative there.
inline dual chain(const dual& a, const wide& value, const wide& derivative) {
  return dual(value, a.slope == 0 ? wide(0) : wide(derivative * a.slope));
}
inline dual exp(const dual& a) {
  const wide e = exp(a.value);
  return chain(a, e, e);
}
inline dual expm1(const dual& a) { return chain(a, expm1(a.value), exp(a.value)); }
/// log(1 + e^a)
inline dual sp(const dual& a) { return chain(a, softplus(a.value), logistic(a.value)); }
/// 1/(1 + e^−a)
inline dual sg(const dual& a) {
  const wide p = logistic(a.value);
  return chain(a, p, p * logistic(-a.value));
}
/// log(1 − e^a), a < 0
inline dual log1mexp(const dual& a) {
  const wide value = a.value > -0.5 ? log(wide(-expm1(a.value))) : log1p(wide(-exp(a.value)));
  return chain(a, value, -1 / expm1(wide(-a.value)));
}
/// max(a, 0), with slope 0 at 0
inline dual at_least_0(const dual& a) { return a.value > 0 ? a : dual(0); }

} // namespace perdita_tests
