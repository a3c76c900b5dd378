// SPDX-License-Identifier: MIT
#pragma once

/// Vector mathematics on packs: exp, log and what losses build from them. No branch, no table in
/// memory, no call, and only operations that round alike everywhere: the same bits on every
/// instruction set with FMA and on plain scalars.
///
/// The errors named are the largest that tests/math.cpp accepts, in units in the last place of the
/// exact result, with FMA or without: every float has been tried, and 2e7 doubles. NaN gives NaN.
/// Overflow is where it should be, to the bit; a result below the normal range is 0, except where
/// a function is about x near 0 (expm1, log1p, tanh), which return a tiny x itself.

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "simd.hpp"

namespace perdita::inline PERDITA_ABI::core {

namespace detail {

/// Constants, each a correctly rounded value or a minimax fit (Remez, 40 digits) to the quotient
/// named beside it.
template <class T> struct constants;

template <> struct constants<float> {
  static constexpr int mantissa = 23;
  static constexpr float magic = 0x1.8p23F; // + integer: the integer is in the low bits
  static constexpr float log2_e = 0x1.715476p0F;
  static constexpr float ln2_high = 0x1.62e4p-1F; // 15 bits: n * ln2_high is exact
  static constexpr float ln2_low = 0x1.7f7d1cp-20F;
  static constexpr float least_exp = -0x1.5d589ep6F;   // least x with e^x >= 2^-126
  static constexpr float greatest_exp = 0x1.62e42ep6F; // greatest x with finite e^x
  static constexpr float least_shifted = -69;          // e^-69 = 2^-99.5
  static constexpr float expm1_is_minus_1 = -20;
  static constexpr float tiny = 0x1p-30F; // x^2 vanishes beside x
  /// (e^r - 1 - r) / r^2 on |r| <= ln2 / 2
  static constexpr std::array<float, 5> exp{0x1.fffffep-2F, 0x1.5554bp-3F, 0x1.555674p-5F,
                                            0x1.1227f6p-7F, 0x1.6bebf6p-10F};
  /// (log(1 + f) - f + f^2/2) / f^3 on [-1/4, 1/2]
  static constexpr std::array<float, 8> log{0x1.5555a4p-2F,  -0x1.00004p-2F, 0x1.9969bp-3F,
                                            -0x1.54efdcp-3F, 0x1.28847ap-3F, -0x1.0d8a9p-3F,
                                            0x1.ac90ecp-4F,  -0x1.714118p-5F};
  /// (log(1 + e) / (e - mirror) - 1/2) / z, in z = e * mirror on [-1/2, 0], mirror = -e / (1 + e)
  static constexpr std::array<float, 4> mirrored{0x1.5554bap-4F, 0x1.10e07cp-6F, 0x1.ca9dd6p-9F,
                                                 0x1.3fa696p-11F};
  /// (tanh(x) - x) / x^3, in x^2, on |x| <= 0.55
  static constexpr std::array<float, 5> tanh{-0x1.55554ap-2F, 0x1.110d14p-3F, -0x1.b92538p-5F,
                                             0x1.592052p-6F, -0x1.9a83fcp-8F};
};

template <> struct constants<double> {
  static constexpr int mantissa = 52;
  static constexpr double magic = 0x1.8p52;
  static constexpr double log2_e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42feep-1; // 32 bits: n * ln2_high is exact
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double least_exp = -0x1.6232bdd7abcd2p9;
  static constexpr double greatest_exp = 0x1.62e42fefa39efp9;
  static constexpr double least_shifted = -690;
  static constexpr double expm1_is_minus_1 = -40;
  static constexpr double tiny = 0x1p-60;
  /// (e^r - 1 - r) / r^2 on |r| <= ln2 / 2
  static constexpr std::array<double, 10> exp{
      0x1.0000000000005p-1,  0x1.5555555555539p-3,  0x1.555555555225ap-5,  0x1.1111111119085p-7,
      0x1.6c16c17ef5889p-10, 0x1.a01a0174decd9p-13, 0x1.a019a71c6efdap-16, 0x1.71de8841c8465p-19,
      0x1.28a236b792b98p-22, 0x1.ae6bbf497ea13p-26};
  /// (log((1 + s) / (1 - s)) / s - 2) / s^2, in s^2, on s^2 <= 1/25
  static constexpr std::array<double, 8> log{
      0x1.555555555554fp-1, 0x1.999999999c1adp-2, 0x1.24924921e1875p-2, 0x1.c71c749200bcap-3,
      0x1.745c4a5d6068ep-3, 0x1.3b35d00aff329p-3, 0x1.0dcaa091a52bfp-3, 0x1.1b87d35be4d21p-3};
  static constexpr std::array<double, 10> mirrored{
      0x1.5555555555500p-4,  0x1.1111111108d59p-6,  0x1.d41d41cb59e0ap-9,  0x1.a019ff500cef4p-11,
      0x1.7a45d607042ffp-13, 0x1.5d2499dd45888p-15, 0x1.4561b0793a2bep-17, 0x1.2d854903a7e0ap-19,
      0x1.01332b9bf52c5p-21, 0x1.2876ccd9b02e8p-24};
  /// (tanh(x) - x) / x^3, in x^2, on |x| <= 0.55
  static constexpr std::array<double, 10> tanh{
      -0x1.5555555555495p-2,  0x1.1111111101f91p-3, -0x1.ba1ba1acf7daep-5,  0x1.664f45ac14019p-6,
      -0x1.226ddae14775ap-7,  0x1.d6c5cfbad5aabp-9, -0x1.7cf0b4a62d34cp-10, 0x1.2f905fbf9867dp-11,
      -0x1.b891fc616ae07p-13, 0x1.aab2def6741fdp-15};
};

template <class V> using constants_of = constants<typename V::value_type>;

/// The polynomials of exp() and log() in double, for a relative error of 2^-34 instead of 2^-53.
struct brief {
  static constexpr std::array<double, 6> exp{0x1.0000003a236d9p-1,  0x1.5555544348842p-3,
                                             0x1.55548dc4b2b62p-5,  0x1.111270a032062p-7,
                                             0x1.6d8d06c33a3f8p-10, 0x1.9f08affe86ef3p-13};
  static constexpr std::array<double, 4> log{0x1.555554229debbp-1, 0x1.999bdb402d285p-2,
                                             0x1.23e9ba6429937p-2, 0x1.ed89a4071b69ap-3};
  static constexpr double ln2 = 0x1.62e42fefa39efp-1;
};

/// Σ c[First + i Stride] x^i
template <std::size_t First, std::size_t Stride, class V, class Coefficients>
PERDITA_INLINE V horner(const V& x, const Coefficients& c) {
  if constexpr (First + Stride < std::tuple_size_v<Coefficients>) {
    return fma(horner<First + Stride, Stride>(x, c), x, V(c[First]));
  } else {
    return V(c[First]);
  }
}

/// Σ c[i] x^i, even and odd powers apart (half as long a chain); x2 = x^2.
template <class V, class Coefficients>
PERDITA_INLINE V polynomial(const V& x, const V& x2, const Coefficients& c) {
  return fma(horner<1, 2>(x2, c), x, horner<0, 2>(x2, c));
}

/// x = n ln 2 + r, |r| <= ln2 / 2; the low bits of `shifted` are n, and `rest` is e^r - 1.
template <class V> struct reduced_exp { V shifted, n, rest; };

template <class V> PERDITA_INLINE reduced_exp<V> reduce_exp(const V& x) {
  using C = constants_of<V>;
  const V shifted = fma(x, V(C::log2_e), V(C::magic));
  const V n = shifted - C::magic;
  const V r = fnma(n, V(C::ln2_low), fnma(n, V(C::ln2_high), x));
  const V r2 = r * r;
  return {shifted, n, fma(r2, polynomial(r, r2, C::exp), r)};
}

/// e^x for least <= x <= 20; exactly 0 for x < least.
template <class V> PERDITA_INLINE V exp_from(const V& x, const V& least) {
  const auto e = reduce_exp(x);
  if constexpr (has_scaling) {
    return scale_unless_less(x, least, e.rest + 1, e.n);
  } else {
    const auto n = shift_left<constants_of<V>::mantissa>(as_bits(e.shifted));
    const V power = add_bits_unless_less(x, least, n, as_bits(V(1)));
    return fma_unless_less(x, least, power, e.rest, power);
  }
}

/// -x = n ln 2 + r: the low bits of `shifted` are n, and `lack` is 1 - e^r.
template <class V> struct reduced_exp_minus { V shifted, n, lack; };

/// reduce_exp(-x), without a minus that takes time.
template <class V> PERDITA_INLINE reduced_exp_minus<V> reduce_exp_minus(const V& x) {
  using C = constants_of<V>;
  const V shifted = fnma(x, V(C::log2_e), V(C::magic));
  const V n = shifted - C::magic;
  const V s = fma(n, V(C::ln2_low), fma(n, V(C::ln2_high), x)); // -r
  const V s2 = s * s;
  const V even = horner<0, 2>(s2, C::exp), odd = horner<1, 2>(s2, C::exp);
  return {shifted, n, fnma(s2, fnma(odd, s, even), s)};
}

/// k = the integer for which x / 2^k is in [3/4, 3/2), plus the magic number that shows it.
template <class V> PERDITA_INLINE V exponent_shifted(const V& x) {
  using C = constants_of<V>;
  using T = typename V::value_type;
  const auto bits = as_bits(x) + -std::bit_cast<bits_of<T>>(T(0.75));
  return from_bits(shift_right<C::mantissa>(bits) + std::bit_cast<bits_of<T>>(C::magic));
}

/// k ln 2 + log(1 + f) + low, for f in [-1/4, 1/2] and |low| of the order of an ulp.
template <class V> PERDITA_INLINE V log_from(const V& k, const V& f, const V& low) {
  using C = constants_of<V>;
  const V tail = fma(k, V(C::ln2_low), low);
  const V f2 = f * f;
  const V half = f * 0.5;
  V rest; // log(1 + f) - f + f^2/2 + tail
  if constexpr (std::is_same_v<typename V::value_type, float>) {
    rest = fma(f2 * f, polynomial(f, f2, C::log), tail);
  } else { // = s (f^2/2 + s^2 P(s^2)) + tail, s = f / (2 + f): half as long a polynomial
    const V s = f / (f + 2);
    const V s2 = s * s;
    rest = fma(s, fma(s2, polynomial(s2, s2 * s2, C::log), half * f), tail);
  }
  const V high = k * C::ln2_high; // exact
  const V sum = high + f;
  return sum + ((f - (sum - high)) + fnma(half, f, rest));
}

/// A logarithm with its zero at the end of its range: y inside, the special values outside.
template <class V> PERDITA_INLINE V log_ends(const V& x, typename V::value_type end, const V& y) {
  using limits = std::numeric_limits<typename V::value_type>;
  const V infinity(limits::infinity());
  const V outside = select(x == end, -infinity, V(limits::quiet_NaN()));
  return select((x > end) & (x < infinity), y, select(x > end, x, outside));
}

/// 2^(i/16) with i << 19 taken off the bits, so that (16 e + i) << 19 added gives 2^(e + i/16).
alignas(64) inline constexpr auto sixteenths = [] {
  constexpr std::array<std::uint32_t, 16> powers{0x3f800000, 0x3f85aac3, 0x3f8b95c2, 0x3f91c3d3,
                                                 0x3f9837f0, 0x3f9ef532, 0x3fa5fed7, 0x3fad583f,
                                                 0x3fb504f3, 0x3fbd08a4, 0x3fc5672a, 0x3fce248c,
                                                 0x3fd744fd, 0x3fe0ccdf, 0x3feac0c7, 0x3ff5257d};
  std::array<float, 16> table{};
  for (std::uint32_t i = 0; i < 16; ++i)
    table[i] = std::bit_cast<float>(powers[i] - (i << 19));
  return table;
}();

} // namespace detail

/// e^x of a score less its maximum, for x <= 20: 2^(n/16) from a table in a register times a cubic.
/// Exactly 0 below -69 (double: -690, no table), so that nothing built from it is subnormal.
/// Error: float 1 + 0.04 |x| ulp, double 1.1 ulp. -inf gives 0.
PERDITA_INLINE pack<float> exp_shifted(const pack<float>& x) {
  using V = pack<float>;
  const V least(detail::constants<float>::least_shifted);
  // x = (n/16) ln 2 + r. One constant is off by 2.8e-9 |x|; the rounding of x itself by 6e-8 |x|.
  const V shifted = fma(x, V(0x1.715476p4F), V(detail::constants<float>::magic));
  const V n = shifted - detail::constants<float>::magic;
  V r;
  if constexpr (fused) {
    r = fnma(n, V(0x1.62e43p-5F), x);
  } else { // in two, so that n * 0x1.62ep-5 is exact
    r = fnma(n, V(0x1.0bfbe8p-19F), fnma(n, V(0x1.62ep-5F), x));
  }
  // Nothing subnormal, either: some machines are slow to multiply it.
  const V power =
      add_bits_unless_less(x, least, as_bits(lookup(detail::sixteenths.data(), as_bits(shifted))),
                           shift_left<19>(as_bits(shifted)));
  const V q = fma(fma(r, V(0x1.55559cp-3F), V(0x1.00022ap-1F)), r, V(1)); // (e^r - 1) / r
  return fma_unless_less(x, least, power * r, q, power);
}
PERDITA_INLINE pack<double> exp_shifted(const pack<double>& x) {
  return detail::exp_from(x, pack<double>(detail::constants<double>::least_shifted));
}

/// e^x = 2^n e^r, with a polynomial of degree 6 (double: 11) on |r| <= ln2 / 2.
/// Error: 1.1 ulp. Finite up to 88.7228 (709.7827), 0 below -87.3365 (-708.3964).
template <class T> PERDITA_INLINE pack<T> exp(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  if constexpr (has_scaling) { // which overflows as it should
    const auto e = detail::reduce_exp(min(V(C::greatest_exp + T(0.25)), x));
    return scale_unless_less(x, V(C::least_exp), e.rest + 1, e.n);
  } else {
    const auto e = detail::reduce_exp(x);
    const V y = add_bits_unless_less(x, V(C::least_exp), as_bits(e.rest + 1),
                                     shift_left<C::mantissa>(as_bits(e.shifted)));
    return select(x <= C::greatest_exp, y, x + std::numeric_limits<T>::infinity());
  }
}

/// e^-x for x >= 0: what exp(-x) is, in less time. Error: 1.1 ulp. inf gives 0. To the bit, but
/// without FMA only where no product is subnormal (x <= 60; double 650).
template <class T> PERDITA_INLINE pack<T> exp_minus(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  const auto e = detail::reduce_exp_minus(x);
  if constexpr (has_scaling) {
    return scale_unless_less(V(-C::least_exp), x, 1 - e.lack, e.n);
  } else {
    const auto n = shift_left<C::mantissa>(as_bits(e.shifted));
    const V power = from_bits(n + as_bits(V(1))), minus_power = from_bits(n + as_bits(V(-1)));
    return fma_unless_less(V(-C::least_exp), x, minus_power, e.lack, power);
  }
}

/// 1 - e^-x for x >= 0: what -expm1(-x) is, to the bit, in less time. Error: 1.3 ulp. inf gives 1.
template <class T> PERDITA_INLINE pack<T> one_minus_exp_minus(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  const auto e = detail::reduce_exp_minus(min(V(-C::expm1_is_minus_1), x));
  const V power = from_bits(shift_left<C::mantissa>(as_bits(e.shifted)) + as_bits(V(1)));
  return fma(power, e.lack, 1 - power);
}

/// e^x - 1 = 2^n (e^r - 1) + (2^n - 1), reduced as in exp().
/// Error: float 1.8 ulp, double 2.4 ulp. -inf gives -1, inf inf, and +-0 itself.
template <class T> PERDITA_INLINE pack<T> expm1(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  const V inside = min(V(C::greatest_exp + T(0.25)), max(V(C::expm1_is_minus_1), x));
  const auto e = detail::reduce_exp(inside);
  const V half = from_bits(shift_left<C::mantissa>(as_bits(e.shifted)) + as_bits(V(0.5)));
  const V y = fma(half, e.rest, half - 0.5); // half, because 2^n can overflow where e^x does not
  return select(abs(x) < C::tiny, x, y + y);
}

/// The natural logarithm: x = 2^k (1 + f), f in [-1/4, 1/2), and a polynomial for log(1 + f).
/// Error: 0.9 ulp, of subnormal x too. 0 gives -inf, inf inf, and x < 0 NaN.
template <class T> PERDITA_INLINE pack<T> log(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  if constexpr (has_scaling) {
    const V m = mantissa(x), k = exponent(x) - exponent(m);
    return detail::log_ends(x, 0, detail::log_from(k, m - 1, V(0)));
  }
  const auto subnormal = x < std::numeric_limits<T>::min();
  const V y = select(subnormal, x * T(0x1p60), x);
  const V k = detail::exponent_shifted(y) - C::magic;
  const V m = from_bits(as_bits(y) + shift_left<C::mantissa>(as_bits(C::magic - k)));
  return detail::log_ends(x, 0, detail::log_from(k - select(subnormal, V(60), V(0)), m - 1, V(0)));
}

/// log(1 + x): as log(), with f computed from x and what its rounding lost added back.
/// Error: float 1 ulp, double 0.9 ulp. -1 gives -inf, inf inf, x < -1 NaN, and +-0 itself.
template <class T> PERDITA_INLINE pack<T> log1p(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  const V k = detail::exponent_shifted(x + 1) - C::magic;
  // 4/2^k, as 1/2^k can be subnormal
  const V scale = from_bits(shift_left<C::mantissa>(as_bits(C::magic - k)) + as_bits(V(4)));
  const V quarter = x * 0.25;
  const V offset = fma(scale, V(0.25), V(-1));
  const V f = fma(quarter, scale, offset);       // (1 + x) / 2^k - 1, rounded
  const V low = fma(quarter, scale, offset - f); // what the rounding lost
  const V y = detail::log_from(k, f, fnma(low, f, low));
  return detail::log_ends(x, -1, select(abs(x) < C::tiny, x, y));
}

/// log(1 + e) for 0 <= e <= 1, where mirror = -e / (1 + e) is known anyhow. The logarithm changes
/// its sign, and z = e * mirror stays, where the two change places: it is (e - mirror) (1/2 + z
/// P(z)), and P is short; e - mirror = 2 e + z. Error: 1.7 ulp (1.5 with FMA).
template <class T> PERDITA_INLINE pack<T> log1p_beside(const pack<T>& e, const pack<T>& mirror) {
  using V = pack<T>;
  constexpr auto& c = detail::constants<T>::mirrored;
  const V z = e * mirror;
  V rest;
  if constexpr (std::is_same_v<T, float>)
    rest = detail::horner<0, 1>(z, c);
  else
    rest = detail::polynomial(z, z * z, c);
  return fma(z, fma(e - mirror, rest, V(0.5)), e);
}

/// log(1 + x) for x >= 0. Error: float 1.3 ulp, double 0.9 ulp. inf gives inf.
template <class T> PERDITA_INLINE pack<T> log1p_of_positive(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  // 1 + x = 2^k (1 + f), f in [-1/4, 1/2); f = x where k = 0, and else its rounding is no matter
  const auto exponent =
      shift_right<C::mantissa>(as_bits(x + 1) + -std::bit_cast<bits_of<T>>(T(0.75)));
  const V k = from_bits(exponent + std::bit_cast<bits_of<T>>(C::magic)) - C::magic;
  // 4/2^k, as 1/2^k can be subnormal
  const V scale = from_bits(-shift_left<C::mantissa>(exponent) + std::bit_cast<bits_of<T>>(T(4)));
  const V f = fma(x * scale, V(0.25), fma(scale, V(0.25), V(-1)));
  V y;
  if constexpr (std::is_same_v<T, float>) {
    const V f2 = f * f;
    const V rest = fma(f, detail::polynomial(f, f2, C::log), V(-0.5F));
    y = fma(k, V(C::ln2_high + C::ln2_low), fma(f2, rest, f));
  } else {
    y = detail::log_from(k, f, V(0));
  }
  return select(x < std::numeric_limits<T>::infinity(), y, x);
}

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): no overflow, and no loss where e^x is tiny.
/// Error: 1.6 ulp. -inf gives 0 and inf inf; 0 below -87.3365 (-708.3964).
template <class T> PERDITA_INLINE pack<T> softplus(const pack<T>& x) {
  using V = pack<T>;
  const V e = detail::exp_from(-abs(x), V(detail::constants<T>::least_exp));
  const auto large = e >= 0.5;
  const V f = select(large, fma(e, V(0.5), V(-0.5)), e); // exact
  return max(V(0), x) + detail::log_from(select(large, V(1), V(0)), f, V(0));
}

/// e^x for x <= 700 in double, as exact as what is rounded to T in the end needs.
/// Error: double 1.1 ulp, and 0 below -708.3964; float 2^-34 of e^x, and e^-690 below -690.
template <class T> PERDITA_INLINE pack<double> exp_to(const pack<double>& x) {
  using V = pack<double>;
  using C = detail::constants<double>;
  if constexpr (std::is_same_v<T, double>)
    return detail::exp_from(x, V(C::least_exp));
  const V inside = max(V(C::least_shifted), x);
  const V shifted = fma(inside, V(C::log2_e), V(C::magic));
  const V r = fnma(shifted - C::magic, V(detail::brief::ln2), inside);
  const V r2 = r * r;
  const V y = fma(r2, detail::polynomial(r, r2, detail::brief::exp), r) + 1;
  return from_bits(as_bits(y) + shift_left<C::mantissa>(as_bits(shifted)));
}

/// log(1 + x) and 1 / (1 + x).
template <class V> struct log1p_and_inverse { V log, inverse; };

/// Both for 0 <= x <= 2^1000 in double, as exact as what is rounded to T in the end needs.
/// Error: double 0.9 and 1 ulp; float 2^-34 of either.
template <class T>
PERDITA_INLINE log1p_and_inverse<pack<double>> log1p_and_inverse_to(const pack<double>& x) {
  using V = pack<double>;
  using C = detail::constants<double>;
  if constexpr (std::is_same_v<T, double>)
    return {log1p(x), 1 / (x + 1)};
  // 1 + x = 2^k (1 + f), f in [-1/4, 1/2)
  const auto exponent =
      shift_right<C::mantissa>(as_bits(x + 1) + -std::bit_cast<std::int64_t>(0.75));
  const V k = from_bits(exponent + std::bit_cast<std::int64_t>(C::magic)) - C::magic;
  const V scale = from_bits(-shift_left<C::mantissa>(exponent) + std::bit_cast<std::int64_t>(1.0));
  const V f = fma(x, scale, scale - 1);
  // 1 / (1 + f) and s = f / (2 + f) by one division, which takes as long as a polynomial
  const V one = f + 1, two = f + 2, both = 1 / (one * two);
  const V s = (f * one) * both, s2 = s * s;
  const V rest = fma(s2, detail::polynomial(s2, s2 * s2, detail::brief::log), V(2));
  return {fma(k, V(detail::brief::ln2), s * rest), (scale * two) * both};
}

/// 1 / (1 + e^-x), as e^x / (1 + e^x) for x < 0.
/// Error: 2.5 ulp. -inf gives 0 and inf 1; 0 below -87.3365 (-708.3964).
template <class T> PERDITA_INLINE pack<T> sigmoid(const pack<T>& x) {
  using V = pack<T>;
  const V e = detail::exp_from(-abs(x), V(detail::constants<T>::least_exp));
  return select(x < 0, e, V(1)) / (e + 1);
}

/// log(1 + e^x) and 1 / (1 + e^-x) in double, as exact as what is rounded to T in the end needs.
template <class V> struct softplus_and_sigmoid { V softplus, sigmoid; };
template <class T>
PERDITA_INLINE softplus_and_sigmoid<pack<double>> softplus_and_sigmoid_to(const pack<double>& x) {
  using V = pack<double>;
  if constexpr (std::is_same_v<T, double>)
    return {softplus(x), sigmoid(x)};
  const V far(650), e = exp_to<T>(min(far, x));
  const auto [log, inverse] = log1p_and_inverse_to<T>(e);
  return {log + max(V(0), x - far), e * inverse};
}

/// The hyperbolic tangent, and its slope 1 - tanh(x)^2.
template <class V> struct tanh_and_slope { V tanh, slope; };

/// tanh(x) = 1 - q with q = 2 / (e^2|x| + 1), or x + x^3 P(x^2) up to 0.55; its slope is q (2 - q),
/// which keeps its digits where it is small. Error: 1.6 ulp, and 3.5 ulp of the slope, which is 0
/// beyond 43.66 (354.19). +-inf gives +-1, and +-0 itself; tanh(-x) = -tanh(x) to the bit.
template <class T> PERDITA_INLINE tanh_and_slope<pack<T>> tanh_with_slope(const pack<T>& x) {
  using V = pack<T>;
  using C = detail::constants<T>;
  const V a = abs(x);
  const V x2 = x * x;
  const V inner = fma(x * x2, detail::polynomial(x2, x2 * x2, C::tanh), x);
  const V e = detail::exp_from(a * -2, V(C::least_exp));
  const V q = (e + e) / (e + 1), outer = 1 - q;
  const V y = select(a < C::tiny, x, select(a < T(0.55), inner, select(x < 0, -outer, outer)));
  return {y, q * (2 - q)};
}
template <class T> PERDITA_INLINE pack<T> tanh(const pack<T>& x) { return tanh_with_slope(x).tanh; }

} // namespace perdita::inline PERDITA_ABI::core
