// SPDX-License-Identifier: MIT
#pragma once

/// Lanes: `pack<T>` is 64 bytes of T on every machine (16 floats, 8 doubles), in as many registers
/// as that takes. A fixed number of lanes fixes the order of every sum, and every multiply-add is
/// an explicit fma(), so results do not depend on the instruction set (on sets with FMA and on
/// plain scalars; without FMA a product is rounded before the addition).
///
/// This is the only file that knows xsimd (8.1 to 14) or an intrinsic. Operations whose meaning
/// changed between versions of xsimd, or that it lacks, are spelt out here.

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../config.hpp"

#if !PERDITA_NO_SIMD
#include <xsimd/xsimd.hpp>
#endif
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
#endif

// GCC 12 reports its own AVX-512 headers (bug 105593) in every function they are inlined into.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace perdita::inline PERDITA_ABI::core {

template <class T> inline constexpr std::size_t lanes = 64 / sizeof(T);

template <class T> using bits_of = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

/// Whether fma() rounds once.
#if PERDITA_NO_SIMD || defined(__AVX512F__) || (defined(__FMA__) && defined(__AVX__)) ||           \
    defined(__aarch64__)
inline constexpr bool fused = true;
#else
inline constexpr bool fused = false;
#endif

/// One hardware register, or one scalar where there is no SIMD: the primitives that packs are
/// made of. `a` and `b` are of type Register, `m` of type mask.
namespace reg {

/// Rounds a product before anything is added to it: without this a compiler may contract
/// a * b + c on one machine and not on another.
template <class R> PERDITA_INLINE R rounded(R r) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#if defined(__AVX512F__)
  asm("" : "+v"(r));
#else
  asm("" : "+x"(r));
#endif
#elif defined(__GNUC__) && defined(__aarch64__)
  asm("" : "+w"(r));
#endif
  return r;
}

#if PERDITA_NO_SIMD

template <class T> struct types {
  using value = T;
  using integer = bits_of<T>;
  using mask = bool;
  static constexpr std::size_t size = 1;
};

template <class T> PERDITA_INLINE T set(T a) { return a; }
template <class T> PERDITA_INLINE T load(const T* p) { return *p; }
template <class T> PERDITA_INLINE void store(T* p, T a) { *p = a; }
template <class T> PERDITA_INLINE void stream(T* p, T a) { *p = a; }
template <class T> PERDITA_INLINE T multiply(T a, T b) { return rounded(a * b); }
template <class T> PERDITA_INLINE T fma(T a, T b, T c) { return std::fma(a, b, c); }
template <class T> PERDITA_INLINE T fnma(T a, T b, T c) { return std::fma(-a, b, c); }
template <class T> PERDITA_INLINE T maximum(T a, T b) { return a > b ? a : b; }
template <class T> PERDITA_INLINE T minimum(T a, T b) { return a < b ? a : b; }
template <class T> PERDITA_INLINE T select(bool m, T a, T b) { return m ? a : b; }
template <class T> PERDITA_INLINE T square_root(T a) { return std::sqrt(a); }
template <class T> PERDITA_INLINE T absolute(T a) { return std::fabs(a); }
template <class T> PERDITA_INLINE T negative(T a) { return -a; }
/// The same number, held in a register from here on.
template <class T> PERDITA_INLINE T kept(T a) { return rounded(a); }
PERDITA_INLINE bool any(bool m) { return m; }
PERDITA_INLINE std::uint32_t lane_bits(bool m) { return m; }
PERDITA_INLINE bool opposite(bool m) { return !m; }
PERDITA_INLINE bool both(bool a, bool b) { return a && b; }
PERDITA_INLINE bool either(bool a, bool b) { return a || b; }
template <class T> PERDITA_INLINE auto as_bits(T a) { return std::bit_cast<bits_of<T>>(a); }
PERDITA_INLINE float from_bits(std::int32_t a) { return std::bit_cast<float>(a); }
PERDITA_INLINE double from_bits(std::int64_t a) { return std::bit_cast<double>(a); }
template <int N, class I> PERDITA_INLINE I shift_left(I a) {
  return static_cast<I>(static_cast<std::make_unsigned_t<I>>(a) << N);
}
template <int N, class I> PERDITA_INLINE I shift_right(I a) { return static_cast<I>(a >> N); }
template <class I> PERDITA_INLINE I add_bits(I a, I b) {
  using U = std::make_unsigned_t<I>;
  return static_cast<I>(static_cast<U>(a) + static_cast<U>(b));
}
template <class I> PERDITA_INLINE I subtract_bits(I a, I b) {
  using U = std::make_unsigned_t<I>;
  return static_cast<I>(static_cast<U>(a) - static_cast<U>(b));
}
PERDITA_INLINE float lookup(const float* table, std::int32_t index) { return table[index & 15]; }

#else

template <class T> using batch = xsimd::batch<T>;

template <class T> struct types {
  using value = batch<T>;
  using integer = batch<bits_of<T>>;
  using mask = typename batch<T>::batch_bool_type;
  static constexpr std::size_t size = batch<T>::size;
};

template <class T> PERDITA_INLINE batch<T> set(T a) { return batch<T>(a); }
template <class T> PERDITA_INLINE batch<T> load(const T* p) { return batch<T>::load_unaligned(p); }
template <class T> PERDITA_INLINE void store(T* p, const batch<T>& a) { a.store_unaligned(p); }

template <class T> PERDITA_INLINE batch<T> multiply(const batch<T>& a, const batch<T>& b) {
  batch<T> product = a * b;
  product.data = rounded(product.data);
  return product;
}

// xsimd before 11 does not fuse on AVX-512, and its max() and min() treat NaN by a rule that
// changed in 14; on x86 the instructions themselves say what is meant.
#if defined(__AVX512F__)
PERDITA_INLINE batch<float> fma(const batch<float>& a, const batch<float>& b,
                                const batch<float>& c) {
  return _mm512_fmadd_ps(a.data, b.data, c.data);
}
PERDITA_INLINE batch<double> fma(const batch<double>& a, const batch<double>& b,
                                 const batch<double>& c) {
  return _mm512_fmadd_pd(a.data, b.data, c.data);
}
PERDITA_INLINE batch<float> fnma(const batch<float>& a, const batch<float>& b,
                                 const batch<float>& c) {
  return _mm512_fnmadd_ps(a.data, b.data, c.data);
}
PERDITA_INLINE batch<double> fnma(const batch<double>& a, const batch<double>& b,
                                  const batch<double>& c) {
  return _mm512_fnmadd_pd(a.data, b.data, c.data);
}
#elif defined(__FMA__) && defined(__AVX__)
PERDITA_INLINE batch<float> fma(const batch<float>& a, const batch<float>& b,
                                const batch<float>& c) {
  return _mm256_fmadd_ps(a.data, b.data, c.data);
}
PERDITA_INLINE batch<double> fma(const batch<double>& a, const batch<double>& b,
                                 const batch<double>& c) {
  return _mm256_fmadd_pd(a.data, b.data, c.data);
}
PERDITA_INLINE batch<float> fnma(const batch<float>& a, const batch<float>& b,
                                 const batch<float>& c) {
  return _mm256_fnmadd_ps(a.data, b.data, c.data);
}
PERDITA_INLINE batch<double> fnma(const batch<double>& a, const batch<double>& b,
                                  const batch<double>& c) {
  return _mm256_fnmadd_pd(a.data, b.data, c.data);
}
#elif defined(__aarch64__)
template <class T>
PERDITA_INLINE batch<T> fma(const batch<T>& a, const batch<T>& b, const batch<T>& c) {
  return xsimd::fma(a, b, c);
}
template <class T>
PERDITA_INLINE batch<T> fnma(const batch<T>& a, const batch<T>& b, const batch<T>& c) {
  return xsimd::fma(-a, b, c);
}
#else
template <class T>
PERDITA_INLINE batch<T> fma(const batch<T>& a, const batch<T>& b, const batch<T>& c) {
  return multiply(a, b) + c;
}
template <class T>
PERDITA_INLINE batch<T> fnma(const batch<T>& a, const batch<T>& b, const batch<T>& c) {
  return c - multiply(a, b);
}
#endif

#if defined(__AVX512F__)
PERDITA_INLINE batch<float> maximum(const batch<float>& a, const batch<float>& b) {
  return _mm512_max_ps(a.data, b.data);
}
PERDITA_INLINE batch<double> maximum(const batch<double>& a, const batch<double>& b) {
  return _mm512_max_pd(a.data, b.data);
}
PERDITA_INLINE batch<float> minimum(const batch<float>& a, const batch<float>& b) {
  return _mm512_min_ps(a.data, b.data);
}
PERDITA_INLINE batch<double> minimum(const batch<double>& a, const batch<double>& b) {
  return _mm512_min_pd(a.data, b.data);
}
PERDITA_INLINE void stream(float* p, const batch<float>& a) { _mm512_stream_ps(p, a.data); }
PERDITA_INLINE void stream(double* p, const batch<double>& a) { _mm512_stream_pd(p, a.data); }
#elif defined(__AVX__)
PERDITA_INLINE batch<float> maximum(const batch<float>& a, const batch<float>& b) {
  return _mm256_max_ps(a.data, b.data);
}
PERDITA_INLINE batch<double> maximum(const batch<double>& a, const batch<double>& b) {
  return _mm256_max_pd(a.data, b.data);
}
PERDITA_INLINE batch<float> minimum(const batch<float>& a, const batch<float>& b) {
  return _mm256_min_ps(a.data, b.data);
}
PERDITA_INLINE batch<double> minimum(const batch<double>& a, const batch<double>& b) {
  return _mm256_min_pd(a.data, b.data);
}
PERDITA_INLINE void stream(float* p, const batch<float>& a) { _mm256_stream_ps(p, a.data); }
PERDITA_INLINE void stream(double* p, const batch<double>& a) { _mm256_stream_pd(p, a.data); }
#elif defined(__SSE2__)
PERDITA_INLINE batch<float> maximum(const batch<float>& a, const batch<float>& b) {
  return _mm_max_ps(a.data, b.data);
}
PERDITA_INLINE batch<double> maximum(const batch<double>& a, const batch<double>& b) {
  return _mm_max_pd(a.data, b.data);
}
PERDITA_INLINE batch<float> minimum(const batch<float>& a, const batch<float>& b) {
  return _mm_min_ps(a.data, b.data);
}
PERDITA_INLINE batch<double> minimum(const batch<double>& a, const batch<double>& b) {
  return _mm_min_pd(a.data, b.data);
}
PERDITA_INLINE void stream(float* p, const batch<float>& a) { _mm_stream_ps(p, a.data); }
PERDITA_INLINE void stream(double* p, const batch<double>& a) { _mm_stream_pd(p, a.data); }
#else
template <class T> PERDITA_INLINE batch<T> maximum(const batch<T>& a, const batch<T>& b) {
  return xsimd::select(a > b, a, b);
}
template <class T> PERDITA_INLINE batch<T> minimum(const batch<T>& a, const batch<T>& b) {
  return xsimd::select(a < b, a, b);
}
template <class T> PERDITA_INLINE void stream(T* p, const batch<T>& a) { store(p, a); }
#endif

template <class M, class T>
PERDITA_INLINE batch<T> select(const M& m, const batch<T>& a, const batch<T>& b) {
  return xsimd::select(m, a, b);
}
template <class T> PERDITA_INLINE batch<T> square_root(const batch<T>& a) { return xsimd::sqrt(a); }
template <class T> PERDITA_INLINE batch<T> absolute(const batch<T>& a) { return xsimd::abs(a); }
// The unary minus of xsimd 8 is 0 - a, which loses the sign of zero.
template <class T> PERDITA_INLINE batch<T> negative(const batch<T>& a) {
  return a ^ batch<T>(T(-0.0));
}
template <class T> PERDITA_INLINE batch<T> kept(batch<T> a) {
  a.data = rounded(a.data);
  return a;
}
template <class M> PERDITA_INLINE bool any(const M& m) { return xsimd::any(m); }
/// Lane i as bit i.
template <class T> PERDITA_INLINE std::uint32_t lane_bits(const xsimd::batch_bool<T>& m) {
#if defined(__AVX512F__)
  return static_cast<std::uint32_t>(m.data);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return static_cast<std::uint32_t>(_mm256_movemask_ps(m.data));
  else
    return static_cast<std::uint32_t>(_mm256_movemask_pd(m.data));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<std::uint32_t>(_mm_movemask_ps(m.data));
  else
    return static_cast<std::uint32_t>(_mm_movemask_pd(m.data));
#else
  T set[batch<T>::size];
  xsimd::select(m, batch<T>(T(1)), batch<T>(T(0))).store_unaligned(set);
  std::uint32_t result = 0;
  for (std::size_t i = 0; i < batch<T>::size; ++i)
    result |= static_cast<std::uint32_t>(set[i] != T(0)) << i;
  return result;
#endif
}
/// Not xsimd's, which is too large for GCC to inline, on AVX-512: a call would leave the upper
/// halves of registers in use, and libm's older instructions wait for them.
template <class M> PERDITA_INLINE M opposite(const M& m) {
#if defined(__AVX512F__)
  return M(static_cast<typename M::register_type>(~m.data));
#else
  return !m;
#endif
}
template <class M> PERDITA_INLINE M both(const M& a, const M& b) { return a & b; }
template <class M> PERDITA_INLINE M either(const M& a, const M& b) { return a | b; }

template <class T> PERDITA_INLINE auto as_bits(const batch<T>& a) {
  using integer = batch<bits_of<T>>;
  return integer(std::bit_cast<typename integer::register_type>(a.data));
}
template <class I> PERDITA_INLINE auto from_bits(const batch<I>& a) {
  using real = batch<std::conditional_t<sizeof(I) == 4, float, double>>;
  return real(std::bit_cast<typename real::register_type>(a.data));
}
template <int N, class I> PERDITA_INLINE batch<I> shift_left(const batch<I>& a) { return a << N; }
template <int N, class I> PERDITA_INLINE batch<I> shift_right(const batch<I>& a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(I) == 8) { // there is no such instruction, and xsimd goes lane by lane
    const __m256i sign = _mm256_set1_epi64x(std::int64_t{1} << (63 - N));
    return batch<I>(_mm256_sub_epi64(_mm256_xor_si256(_mm256_srli_epi64(a.data, N), sign), sign));
  }
#endif
  return a >> N;
}
template <class I> PERDITA_INLINE batch<I> add_bits(const batch<I>& a, const batch<I>& b) {
  return a + b;
}
template <class I> PERDITA_INLINE batch<I> subtract_bits(const batch<I>& a, const batch<I>& b) {
  return a - b;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/// table[index & 7], lane by lane, the table in a register: from memory, Zen 3 takes half as long
/// again, and a compiler that is short of registers would leave it there.
PERDITA_INLINE __m256 permuted(__m256 table, __m256i index) {
#if defined(__GNUC__)
  __m256 result;
  asm("vpermps %1, %2, %0" : "=x"(result) : "x"(table), "x"(index));
  return result;
#else
  return _mm256_permutevar8x32_ps(table, index);
#endif
}
#endif

/// table[index & 15], lane by lane; the table is 64-byte aligned.
PERDITA_INLINE batch<float> lookup(const float* table, const batch<std::int32_t>& index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(index.data, _mm512_load_ps(table));
#elif defined(__AVX2__)
  const __m256 low = permuted(_mm256_load_ps(table), index.data);
  const __m256 high = permuted(_mm256_load_ps(table + 8), index.data);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.data, 28)));
#else
  constexpr std::size_t n = batch<float>::size;
  alignas(64) std::int32_t i[n];
  alignas(64) float value[n];
  index.store_aligned(i);
  for (std::size_t k = 0; k < n; ++k)
    value[k] = table[i[k] & 15];
  return batch<float>::load_aligned(value);
#endif
}

#endif

/// a; zero where x < cut (not where x is NaN).
template <class Real>
PERDITA_INLINE Real zero_if_less(const Real& x, const Real& cut, const Real& a) {
#if !PERDITA_NO_SIMD && defined(__AVX__) && !defined(__AVX512F__)
  // Not a blend, for which GCC 12 tests the sign of the mask first.
  if constexpr (std::is_same_v<Real, batch<float>>)
    return _mm256_and_ps(_mm256_cmp_ps(x.data, cut.data, _CMP_NLT_UQ), a.data);
  else
    return _mm256_and_pd(_mm256_cmp_pd(x.data, cut.data, _CMP_NLT_UQ), a.data);
#else
  return reg::select(x < cut, Real(0), a);
#endif
}

/// a + b; a where x == excluded (not where x is NaN).
template <class Real>
PERDITA_INLINE Real add_unless_equal(const Real& x, const Real& excluded, const Real& a,
                                     const Real& b) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (std::is_same_v<Real, batch<float>>) {
    const __mmask16 add = _mm512_cmp_ps_mask(x.data, excluded.data, _CMP_NEQ_UQ);
    return _mm512_mask_add_ps(a.data, add, a.data, b.data);
  } else {
    const __mmask8 add = _mm512_cmp_pd_mask(x.data, excluded.data, _CMP_NEQ_UQ);
    return _mm512_mask_add_pd(a.data, add, a.data, b.data);
  }
#else
  return a + reg::select(x == excluded, Real(0), b);
#endif
}

/// a + b as integers, read as a real; zero where x < cut (not where x is NaN).
template <class Real, class Integer>
PERDITA_INLINE Real add_bits_unless_less(const Real& x, const Real& cut, const Integer& a,
                                         const Integer& b) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (std::is_same_v<Real, batch<float>>) {
    const __mmask16 keep = _mm512_cmp_ps_mask(x.data, cut.data, _CMP_NLT_UQ);
    return Real(_mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, a.data, b.data)));
  } else
#endif
  {
    return zero_if_less<Real>(x, cut, from_bits(add_bits(a, b)));
  }
}

/// a * b; zero where a < cut, so that no subnormal product is ever formed (not where a is NaN).
template <class Real>
PERDITA_INLINE Real multiply_unless_less(const Real& a, const Real& cut, const Real& b) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (std::is_same_v<Real, batch<float>>) {
    const __mmask16 keep = _mm512_cmp_ps_mask(a.data, cut.data, _CMP_NLT_UQ);
    return Real(rounded(_mm512_maskz_mul_ps(keep, a.data, b.data)));
  } else
#endif
  {
    return reg::multiply(zero_if_less(a, cut, a), b);
  }
}

/// a * b + c; zero where x < cut, whatever a, b and c are there (not where x is NaN).
template <class Real>
PERDITA_INLINE Real fma_unless_less(const Real& x, const Real& cut, const Real& a, const Real& b,
                                    const Real& c) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (std::is_same_v<Real, batch<float>>) {
    const __mmask16 keep = _mm512_cmp_ps_mask(x.data, cut.data, _CMP_NLT_UQ);
    return Real(_mm512_maskz_fmadd_ps(keep, a.data, b.data, c.data));
  } else
#endif
  {
    return zero_if_less<Real>(x, cut, reg::fma(a, b, c));
  }
}

} // namespace reg

template <class T> struct pack;

/// How many of them a pack takes. They lie in plain arrays: std::array would mean thousands of
/// small calls, and a compiler that thinks about each of them.
template <class T> inline constexpr std::size_t registers = lanes<T> / reg::types<T>::size;

/// One truth value per lane of a pack<T>.
template <class T> struct pack_mask { typename reg::types<T>::mask r[registers<T>]; };

/// Integers of the width of T, one per lane: only what the vector maths needs.
template <class T> struct pack_bits { typename reg::types<T>::integer r[registers<T>]; };

namespace detail {
/// {f(0), f(1), …}: one call per register, unrolled; one per lane, as a loop, for plain scalars
/// (unrolled, sixteen lanes a step would keep a compiler busy for minutes).
template <class Result, class F> PERDITA_INLINE Result each(F f) {
#if PERDITA_NO_SIMD
  Result result;
  for (std::size_t i = 0; i < std::size(result.r); ++i)
    result.r[i] = f(i);
  return result;
#else
  return [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    return Result{{f(std::integral_constant<std::size_t, I>{})...}};
  }
  (std::make_index_sequence<std::extent_v<decltype(Result::r)>>{});
#endif
}
/// f(0), …, f(N − 1), written out: each number is a constant.
template <std::ptrdiff_t N, class F> PERDITA_INLINE void unrolled(F f) {
  [&]<std::ptrdiff_t... I>(std::integer_sequence<std::ptrdiff_t, I...>)
      __attribute__((always_inline)) {
    (f(std::integral_constant<std::ptrdiff_t, I>{}), ...);
  }
  (std::make_integer_sequence<std::ptrdiff_t, N>{});
}
} // namespace detail

/// 64 bytes of T: a value of the formulas that losses are written in.
template <class T> struct pack {
  using value_type = T;
  using array = typename reg::types<T>::value[registers<T>];
  array r;

  static constexpr std::size_t size = lanes<T>;
  static constexpr std::size_t step = reg::types<T>::size;

  pack() = default;
  PERDITA_INLINE pack(const array& values) { *this = values; }
  /// Register by register: GCC would copy the bytes by sixteen, and a load of a whole register must
  /// then wait until they have reached the cache.
  PERDITA_INLINE pack(const pack& other) { *this = other.r; }
  PERDITA_INLINE pack& operator=(const pack& other) { return *this = other.r; }
  PERDITA_INLINE pack& operator=(const array& values) {
    for (std::size_t i = 0; i < registers<T>; ++i)
      r[i] = values[i];
    return *this;
  }
  PERDITA_INLINE pack(T a) {
    const auto lane = reg::set(a);
    for (auto& x : r)
      x = lane;
  }

  static PERDITA_INLINE pack load(const T* p) {
    return detail::each<pack>([=](auto i) __attribute__((always_inline)) {
      return reg::load(p + i * step);
    });
  }
  PERDITA_INLINE void store(T* p) const {
    for (std::size_t i = 0; i < registers<T>; ++i)
      reg::store(p + i * step, r[i]);
  }
  /// Past the caches; p is aligned to 64 bytes.
  PERDITA_INLINE void stream(T* p) const {
    for (std::size_t i = 0; i < registers<T>; ++i)
      reg::stream(p + i * step, r[i]);
  }
};

#define PERDITA_PACK_2(result, name, expression)                                                   \
  template <class T> PERDITA_INLINE result<T> name(const pack<T>& a, const pack<T>& b) {           \
    return detail::each<result<T>>([&](auto i)                                                     \
                                       __attribute__((always_inline)) { return expression; });     \
  }                                                                                                \
  template <class T> PERDITA_INLINE result<T> name(const pack<T>& a, std::type_identity_t<T> b) {  \
    return name(a, pack<T>(b));                                                                    \
  }                                                                                                \
  template <class T> PERDITA_INLINE result<T> name(std::type_identity_t<T> a, const pack<T>& b) {  \
    return name(pack<T>(a), b);                                                                    \
  }
PERDITA_PACK_2(pack, operator+, a.r[i] + b.r[i])
PERDITA_PACK_2(pack, operator-, a.r[i] - b.r[i])
PERDITA_PACK_2(pack, operator*, reg::multiply(a.r[i], b.r[i]))
PERDITA_PACK_2(pack, operator/, a.r[i] / b.r[i])
PERDITA_PACK_2(pack_mask, operator<, a.r[i] < b.r[i])
PERDITA_PACK_2(pack_mask, operator>, a.r[i] > b.r[i])
PERDITA_PACK_2(pack_mask, operator<=, a.r[i] <= b.r[i])
PERDITA_PACK_2(pack_mask, operator>=, a.r[i] >= b.r[i])
PERDITA_PACK_2(pack_mask, operator==, a.r[i] == b.r[i])
/// The larger value; b where a is NaN.
PERDITA_PACK_2(pack, max, reg::maximum(a.r[i], b.r[i]))
/// The smaller value; b where a is NaN.
PERDITA_PACK_2(pack, min, reg::minimum(a.r[i], b.r[i]))
#undef PERDITA_PACK_2

template <class T> PERDITA_INLINE pack<T> operator-(const pack<T>& a) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::negative(a.r[i]);
  });
}
template <class T> PERDITA_INLINE pack<T>& operator+=(pack<T>& a, const pack<T>& b) {
  return a = a + b;
}

/// a * b + c, rounded once (where the machine can).
template <class T>
PERDITA_INLINE pack<T> fma(const pack<T>& a, const pack<T>& b, const pack<T>& c) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::fma(a.r[i], b.r[i], c.r[i]);
  });
}
/// c - a * b, rounded once (where the machine can).
template <class T>
PERDITA_INLINE pack<T> fnma(const pack<T>& a, const pack<T>& b, const pack<T>& c) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::fnma(a.r[i], b.r[i], c.r[i]);
  });
}
/// The same numbers, held in registers from here on.
template <class T> PERDITA_INLINE pack<T> kept(const pack<T>& a) {
  return detail::each<pack<T>>([&](auto i)
                                   __attribute__((always_inline)) { return reg::kept(a.r[i]); });
}
template <class T> PERDITA_INLINE pack<T> sqrt(const pack<T>& a) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::square_root(a.r[i]);
  });
}
template <class T> PERDITA_INLINE pack<T> abs(const pack<T>& a) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::absolute(a.r[i]);
  });
}
template <class T>
PERDITA_INLINE pack<T> select(const pack_mask<T>& m, const pack<T>& a, const pack<T>& b) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::select(m.r[i], a.r[i], b.r[i]);
  });
}
template <class T>
PERDITA_INLINE pack_mask<T> operator&(const pack_mask<T>& a, const pack_mask<T>& b) {
  return detail::each<pack_mask<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::both(a.r[i], b.r[i]);
  });
}
template <class T>
PERDITA_INLINE pack_mask<T> operator|(const pack_mask<T>& a, const pack_mask<T>& b) {
  return detail::each<pack_mask<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::either(a.r[i], b.r[i]);
  });
}
template <class T> PERDITA_INLINE pack_mask<T> operator!(const pack_mask<T>& a) {
  return detail::each<pack_mask<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::opposite(a.r[i]);
  });
}
template <class T> PERDITA_INLINE bool any(const pack_mask<T>& m) {
  bool result = false;
  for (const auto& x : m.r)
    result |= reg::any(x);
  return result;
}
/// Lane i as bit i.
template <class T> PERDITA_INLINE std::uint32_t lane_bits(const pack_mask<T>& m) {
  std::uint32_t result = 0;
  for (std::size_t i = 0; i < registers<T>; ++i)
    result |= reg::lane_bits(m.r[i]) << (i * pack<T>::step);
  return result;
}
/// Not as x != x: xsimd's comparison is an ordered one on some instruction sets.
template <class T> PERDITA_INLINE pack_mask<T> is_nan(const pack<T>& a) { return !(a == a); }

template <class T> PERDITA_INLINE pack_bits<T> as_bits(const pack<T>& a) {
  return detail::each<pack_bits<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::as_bits(a.r[i]);
  });
}
template <class T> PERDITA_INLINE pack<T> from_bits(const pack_bits<T>& a) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::from_bits(a.r[i]);
  });
}
template <int N, class T> PERDITA_INLINE pack_bits<T> shift_left(const pack_bits<T>& a) {
  return detail::each<pack_bits<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::template shift_left<N>(a.r[i]);
  });
}
template <int N, class T> PERDITA_INLINE pack_bits<T> shift_right(const pack_bits<T>& a) {
  return detail::each<pack_bits<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::template shift_right<N>(a.r[i]);
  });
}
template <class T>
PERDITA_INLINE pack_bits<T> operator+(const pack_bits<T>& a, const pack_bits<T>& b) {
  return detail::each<pack_bits<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::add_bits(a.r[i], b.r[i]);
  });
}
template <class T> PERDITA_INLINE pack_bits<T> operator+(const pack_bits<T>& a, bits_of<T> b) {
  using integer = typename reg::types<T>::integer;
  return detail::each<pack_bits<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::add_bits(a.r[i], integer(b));
  });
}
template <class T> PERDITA_INLINE pack_bits<T> operator-(const pack_bits<T>& a) {
  using integer = typename reg::types<T>::integer;
  return detail::each<pack_bits<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::subtract_bits(integer(bits_of<T>{0}), a.r[i]);
  });
}
/// table[index & 15] per lane; the table is 64-byte aligned.
PERDITA_INLINE pack<float> lookup(const float* table, const pack_bits<float>& index) {
  return detail::each<pack<float>>([&](auto i) __attribute__((always_inline)) {
    return reg::lookup(table, index.r[i]);
  });
}
/// a + b as integers, read as a real; zero where x < cut (not where x is NaN).
template <class T>
PERDITA_INLINE pack<T> add_bits_unless_less(const pack<T>& x, const pack<T>& cut,
                                            const pack_bits<T>& a, const pack_bits<T>& b) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::add_bits_unless_less(x.r[i], cut.r[i], a.r[i], b.r[i]);
  });
}
/// a + b; a where x == excluded (not where x is NaN).
template <class T>
PERDITA_INLINE pack<T> add_unless_equal(const pack<T>& x, const pack<T>& excluded, const pack<T>& a,
                                        const pack<T>& b) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::add_unless_equal(x.r[i], excluded.r[i], a.r[i], b.r[i]);
  });
}
/// a * b; zero where a < cut (not where a is NaN).
template <class T>
PERDITA_INLINE pack<T> multiply_unless_less(const pack<T>& a, const pack<T>& cut,
                                            const pack<T>& b) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::multiply_unless_less(a.r[i], cut.r[i], b.r[i]);
  });
}

/// a * b + c; zero where x < cut, whatever a, b and c are there (not where x is NaN).
template <class T>
PERDITA_INLINE pack<T> fma_unless_less(const pack<T>& x, const pack<T>& cut, const pack<T>& a,
                                       const pack<T>& b, const pack<T>& c) {
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::fma_unless_less(x.r[i], cut.r[i], a.r[i], b.r[i], c.r[i]);
  });
}

/// Whether numbers are taken apart and put together by instructions of their own, those below.
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
inline constexpr bool has_scaling = true;

/// a 2^n, rounded once, for integers n; zero where x < cut, whatever a and n are there (not where x
/// is NaN).
PERDITA_INLINE pack<float> scale_unless_less(const pack<float>& x, const pack<float>& cut,
                                             const pack<float>& a, const pack<float>& n) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.r[0].data, cut.r[0].data, _CMP_NLT_UQ);
  return pack<float>({_mm512_maskz_scalef_ps(keep, a.r[0].data, n.r[0].data)});
}
PERDITA_INLINE pack<double> scale_unless_less(const pack<double>& x, const pack<double>& cut,
                                              const pack<double>& a, const pack<double>& n) {
  const __mmask8 keep = _mm512_cmp_pd_mask(x.r[0].data, cut.r[0].data, _CMP_NLT_UQ);
  return pack<double>({_mm512_maskz_scalef_pd(keep, a.r[0].data, n.r[0].data)});
}
/// e for which 2^e <= |x| < 2^(e + 1), of subnormal x too.
PERDITA_INLINE pack<float> exponent(const pack<float>& x) {
  return pack<float>({_mm512_maskz_getexp_ps(0xFFFF, x.r[0].data)});
}
PERDITA_INLINE pack<double> exponent(const pack<double>& x) {
  return pack<double>({_mm512_maskz_getexp_pd(0xFF, x.r[0].data)});
}
/// m for which x = m 2^k, 3/4 <= m < 3/2.
PERDITA_INLINE pack<float> mantissa(const pack<float>& x) {
  constexpr auto range = _MM_MANT_NORM_p75_1p5;
  return pack<float>({_mm512_maskz_getmant_ps(0xFFFF, x.r[0].data, range, _MM_MANT_SIGN_src)});
}
PERDITA_INLINE pack<double> mantissa(const pack<double>& x) {
  constexpr auto range = _MM_MANT_NORM_p75_1p5;
  return pack<double>({_mm512_maskz_getmant_pd(0xFF, x.r[0].data, range, _MM_MANT_SIGN_src)});
}
#else
inline constexpr bool has_scaling = false;
#endif

/// The lower and the upper eight lanes, exactly.
template <int Half> PERDITA_INLINE pack<double> widen_half(const pack<float>& a) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__) && defined(__AVX512DQ__)
  pack<double> wide;
  wide.r[0] = _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, a.r[0].data, Half));
  return wide;
#elif !PERDITA_NO_SIMD && defined(__AVX__) && !defined(__AVX512F__)
  const __m256 half = a.r[Half].data;
  return pack<double>({_mm256_cvtps_pd(_mm256_castps256_ps128(half)),
                       _mm256_cvtps_pd(_mm256_extractf128_ps(half, 1))});
#else
  alignas(64) float narrow[16];
  alignas(64) double wide[8];
  a.store(narrow);
  for (int i = 0; i < 8; ++i)
    wide[i] = static_cast<double>(narrow[8 * Half + i]);
  return pack<double>::load(wide);
#endif
}
PERDITA_INLINE pack<double> widen_low(const pack<float>& a) { return widen_half<0>(a); }
PERDITA_INLINE pack<double> widen_high(const pack<float>& a) { return widen_half<1>(a); }

/// The lanes of a pack in packs of double, exactly; and back, rounded.
PERDITA_INLINE void widen(const pack<float>& a, pack<double> (&wide)[2]) {
  wide[0] = widen_low(a);
  wide[1] = widen_high(a);
}
PERDITA_INLINE void widen(const pack<double>& a, pack<double> (&wide)[1]) { wide[0] = a; }
PERDITA_INLINE pack<float> narrow(const pack<double> (&wide)[2]) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__) && defined(__AVX512DQ__)
  const __m256 low = _mm512_maskz_cvtpd_ps(0xFF, wide[0].r[0].data);
  const __m256 high = _mm512_maskz_cvtpd_ps(0xFF, wide[1].r[0].data);
  pack<float> result;
  result.r[0] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  return result;
#elif !PERDITA_NO_SIMD && defined(__AVX__) && !defined(__AVX512F__)
  const auto half = [](const pack<double>& w) __attribute__((always_inline)) {
    return _mm256_set_m128(_mm256_cvtpd_ps(w.r[1].data), _mm256_cvtpd_ps(w.r[0].data));
  };
  return pack<float>({half(wide[0]), half(wide[1])});
#else
  alignas(64) double d[16];
  alignas(64) float f[16];
  wide[0].store(d);
  wide[1].store(d + 8);
  for (int i = 0; i < 16; ++i)
    f[i] = static_cast<float>(d[i]);
  return pack<float>::load(f);
#endif
}
PERDITA_INLINE pack<double> narrow(const pack<double> (&wide)[1]) { return wide[0]; }

#if !PERDITA_NO_SIMD && defined(__AVX__) && !defined(__AVX512F__)
namespace reg {

/// All ones in the first `bytes` bytes of a pack, from byte 32 * part on; a multiple of four.
PERDITA_INLINE __m256i mask_first(std::ptrdiff_t bytes, std::size_t part) {
  alignas(64) static constexpr auto words = [] {
    std::array<std::int32_t, 32> w{};
    for (std::size_t i = 0; i < 16; ++i)
      w[i] = -1;
    return w;
  }();
  const std::int32_t* from = words.data() + 16 - bytes / 4 + 8 * part;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
PERDITA_INLINE batch<float> load_where(const __m256i& m, const float* p,
                                       const batch<float>& other) {
  return _mm256_blendv_ps(other.data, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
PERDITA_INLINE batch<double> load_where(const __m256i& m, const double* p,
                                        const batch<double>& other) {
  return _mm256_blendv_pd(other.data, _mm256_maskload_pd(p, m), _mm256_castsi256_pd(m));
}
PERDITA_INLINE void store_where(const __m256i& m, float* p, const batch<float>& a) {
  _mm256_maskstore_ps(p, m, a.data);
}
PERDITA_INLINE void store_where(const __m256i& m, double* p, const batch<double>& a) {
  _mm256_maskstore_pd(p, m, a.data);
}

/// Folds the upper half of a onto the lower one until one number is left.
template <class F> PERDITA_INLINE float fold_halves(batch<float> a, F f) {
  a = f(a, batch<float>(_mm256_permute2f128_ps(a.data, a.data, 1)));
  a = f(a, batch<float>(_mm256_permute_ps(a.data, 0x4e)));
  a = f(a, batch<float>(_mm256_permute_ps(a.data, 0xb1)));
  return _mm256_cvtss_f32(a.data);
}
template <class F> PERDITA_INLINE double fold_halves(batch<double> a, F f) {
  a = f(a, batch<double>(_mm256_permute2f128_pd(a.data, a.data, 1)));
  a = f(a, batch<double>(_mm256_permute_pd(a.data, 0x5)));
  return _mm256_cvtsd_f64(a.data);
}

} // namespace reg
#endif

/// The first n lanes from p, `filler` in the others; nothing else is read.
template <class T>
PERDITA_INLINE pack<T> load_first(const T* p, std::ptrdiff_t n, const pack<T>& filler) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  pack<T> result;
  if constexpr (sizeof(T) == 4)
    result.r[0] = _mm512_mask_loadu_ps(filler.r[0].data, static_cast<__mmask16>((1U << n) - 1), p);
  else
    result.r[0] = _mm512_mask_loadu_pd(filler.r[0].data, static_cast<__mmask8>((1U << n) - 1), p);
  return result;
#elif !PERDITA_NO_SIMD && defined(__AVX__)
  const std::ptrdiff_t bytes = n * static_cast<std::ptrdiff_t>(sizeof(T));
  return detail::each<pack<T>>([&](auto i) __attribute__((always_inline)) {
    return reg::load_where(reg::mask_first(bytes, i), p + i * pack<T>::step, filler.r[i]);
  });
#else
  alignas(64) T v[lanes<T>];
  filler.store(v);
  std::memcpy(v, p, static_cast<std::size_t>(n) * sizeof(T));
  return pack<T>::load(v);
#endif
}
/// Stores the first n lanes, and nothing else.
template <class T> PERDITA_INLINE void store_first(const pack<T>& a, T* p, std::ptrdiff_t n) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1U << n) - 1), a.r[0].data);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1U << n) - 1), a.r[0].data);
#elif !PERDITA_NO_SIMD && defined(__AVX__)
  const std::ptrdiff_t bytes = n * static_cast<std::ptrdiff_t>(sizeof(T));
  for (std::size_t i = 0; i < registers<T>; ++i)
    reg::store_where(reg::mask_first(bytes, i), p + i * pack<T>::step, a.r[i]);
#else
  alignas(64) T v[lanes<T>];
  a.store(v);
  std::memcpy(p, v, static_cast<std::size_t>(n) * sizeof(T));
#endif
}

/// {0, 1, 2, …}
template <class T> PERDITA_INLINE pack<T> iota() {
  alignas(64) static constexpr auto values = [] {
    std::array<T, lanes<T>> v{};
    for (std::size_t i = 0; i < v.size(); ++i)
      v[i] = static_cast<T>(i);
    return v;
  }();
  return pack<T>::load(values.data());
}

namespace detail {
/// Folds the upper half of v onto the lower one until one number is left.
template <std::size_t N, class T, class F> PERDITA_INLINE T fold_halves(T* v, F f) {
  if constexpr (N > 1) {
    for (std::size_t i = 0; i < N / 2; ++i)
      v[i] = f(v[i], v[i + N / 2]);
    return fold_halves<N / 2>(v, f);
  }
  return v[0];
}
} // namespace detail

/// Σ of the lanes in the one fixed tree: halves onto halves.
template <class T> PERDITA_INLINE T sum_lanes(const pack<T>& a) {
  const auto add = [](auto x, auto y) __attribute__((always_inline)) { return x + y; };
#if !PERDITA_NO_SIMD && defined(__AVX__) && !defined(__AVX512F__)
  return reg::fold_halves(a.r[0] + a.r[1], add);
#else
  alignas(64) T v[lanes<T>];
  a.store(v);
  return detail::fold_halves<lanes<T>>(v, add);
#endif
}
/// The largest lane; no lane is NaN.
template <class T> PERDITA_INLINE T max_lanes(const pack<T>& a) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_max_ps(a.r[0].data);
  else
    return _mm512_reduce_max_pd(a.r[0].data);
#elif !PERDITA_NO_SIMD && defined(__AVX__)
  return reg::fold_halves(
      reg::maximum(a.r[0], a.r[1]),
      [](const auto& x, const auto& y)
          __attribute__((always_inline)) { return reg::maximum(x, y); });
#else
  alignas(64) T v[lanes<T>];
  a.store(v);
  return detail::fold_halves<lanes<T>>(
      v, [](T x, T y) __attribute__((always_inline)) { return x > y ? x : y; });
#endif
}
template <class T> PERDITA_INLINE T first_lane(const pack<T>& a) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_cvtss_f32(a.r[0].data);
  else
    return _mm512_cvtsd_f64(a.r[0].data);
#elif !PERDITA_NO_SIMD && defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return _mm256_cvtss_f32(a.r[0].data);
  else
    return _mm256_cvtsd_f64(a.r[0].data);
#else
  alignas(64) T v[lanes<T>];
  a.store(v);
  return v[0];
#endif
}

namespace detail {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
/// f(0), …, f(N − 1), unrolled.
template <std::size_t N, class F> PERDITA_INLINE void repeat(F f) {
  [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) { (f(I), ...); }
  (std::make_index_sequence<N>{});
}
/// Rows to columns: 4 x 4 blocks by unpacking, then blocks of four lanes.
PERDITA_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  repeat<4>([&](std::size_t i) __attribute__((always_inline)) {
    const __m512* const x = r + 4 * i;
    const auto pd = [](__m512 v) __attribute__((always_inline)) { return _mm512_castps_pd(v); };
    const __m512 low01 = _mm512_unpacklo_ps(x[0], x[1]), low23 = _mm512_unpacklo_ps(x[2], x[3]);
    const __m512 high01 = _mm512_unpackhi_ps(x[0], x[1]), high23 = _mm512_unpackhi_ps(x[2], x[3]);
    t[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(low01), pd(low23)));
    t[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(low01), pd(low23)));
    t[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(high01), pd(high23)));
    t[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(high01), pd(high23)));
  });
  repeat<4>([&](std::size_t c) __attribute__((always_inline)) {
    const __m512 a = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xdd);
    const __m512 e = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xdd);
    r[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    r[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  });
}
#elif !PERDITA_NO_SIMD && defined(__AVX2__)
/// Rows to columns: 4 x 4 blocks, those in the lower and those in the upper halves at once.
PERDITA_INLINE void transpose(__m256& a, __m256& b, __m256& c, __m256& d) {
  const __m256 low01 = _mm256_unpacklo_ps(a, b), low23 = _mm256_unpacklo_ps(c, d);
  const __m256 high01 = _mm256_unpackhi_ps(a, b), high23 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(low01, low23, 0x44);
  b = _mm256_shuffle_ps(low01, low23, 0xee);
  c = _mm256_shuffle_ps(high01, high23, 0x44);
  d = _mm256_shuffle_ps(high01, high23, 0xee);
}
/// The first n numbers from p on, n <= 4; the others are 0.
PERDITA_INLINE __m128 load_up_to_4(const float* p, std::ptrdiff_t n) {
  if (n >= 4)
    return _mm_loadu_ps(p);
  const __m128i order = _mm_setr_epi32(0, 1, 2, 3);
  return _mm_maskload_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(n)), order));
}
/// Not by a mask, which takes long on some machines.
PERDITA_INLINE void store_up_to_4(float* p, __m128 a, std::ptrdiff_t n) {
  if (n >= 4)
    return _mm_storeu_ps(p, a);
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), a);
    a = _mm_movehl_ps(a, a);
    p += 2;
  }
  if (n & 1)
    _mm_store_ss(p, a);
}
/// m rows of n numbers to n rows of m, m <= 8 and n <= 4.
PERDITA_INLINE void transpose_4_columns(const float* from, std::ptrdiff_t from_step,
                                        std::ptrdiff_t m, std::ptrdiff_t n, float* to,
                                        std::ptrdiff_t to_step) {
  __m256 r[4];
  for (std::ptrdiff_t k = 0; k < 4; ++k) {
    const __m128 zero = _mm_setzero_ps();
    r[k] = _mm256_set_m128(k + 4 < m ? load_up_to_4(from + (k + 4) * from_step, n) : zero,
                           k < m ? load_up_to_4(from + k * from_step, n) : zero);
  }
  transpose(r[0], r[1], r[2], r[3]);
  for (std::ptrdiff_t k = 0; k < 4; ++k)
    if (k < n) {
      store_up_to_4(to + k * to_step, _mm256_castps256_ps128(r[k]), m);
      if (m > 4)
        store_up_to_4(to + k * to_step + 4, _mm256_extractf128_ps(r[k], 1), m - 4);
    }
}
/// m rows of n numbers to n rows of m, m <= 4 and n <= 8.
PERDITA_INLINE void transpose_4_rows(const float* from, std::ptrdiff_t from_step, std::ptrdiff_t m,
                                     std::ptrdiff_t n, float* to, std::ptrdiff_t to_step) {
  __m256 r[4];
  for (std::ptrdiff_t k = 0; k < 4; ++k) {
    const float* const row = from + k * from_step;
    if (k >= m)
      r[k] = _mm256_setzero_ps();
    else if (n == 8)
      r[k] = _mm256_loadu_ps(row);
    else
      r[k] = _mm256_set_m128(n > 4 ? load_up_to_4(row + 4, n - 4) : _mm_setzero_ps(),
                             load_up_to_4(row, n));
  }
  transpose(r[0], r[1], r[2], r[3]);
  for (std::ptrdiff_t k = 0; k < 4; ++k) {
    if (k < n)
      store_up_to_4(to + k * to_step, _mm256_castps256_ps128(r[k]), m);
    if (k + 4 < n)
      store_up_to_4(to + (k + 4) * to_step, _mm256_extractf128_ps(r[k], 1), m);
  }
}
PERDITA_INLINE void transpose_8_by_8(const float* from, std::ptrdiff_t from_step, float* to,
                                     std::ptrdiff_t to_step) {
  __m256 r[8]; // {row k, row k + 4} of the left half, then of the right half
  for (std::ptrdiff_t k = 0; k < 4; ++k)
    for (std::ptrdiff_t half = 0; half < 2; ++half)
      r[4 * half + k] = _mm256_set_m128(_mm_loadu_ps(from + (k + 4) * from_step + 4 * half),
                                        _mm_loadu_ps(from + k * from_step + 4 * half));
  transpose(r[0], r[1], r[2], r[3]);
  transpose(r[4], r[5], r[6], r[7]);
  for (std::ptrdiff_t k = 0; k < 8; ++k)
    _mm256_storeu_ps(to + k * to_step, r[k]);
}
#endif
#if !PERDITA_NO_SIMD && defined(__AVX2__)
/// Pairs, eight at a time: {a0 b0 a1 b1 …} to {a0 a1 …} and {b0 b1 …}, and back.
PERDITA_INLINE void split_pairs(const float* from, float* a, float* b) {
  const __m256 x = _mm256_loadu_ps(from), y = _mm256_loadu_ps(from + 8);
  const auto ordered = [](__m256 v) __attribute__((always_inline)) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
  };
  _mm256_storeu_ps(a, ordered(_mm256_shuffle_ps(x, y, 0x88)));
  _mm256_storeu_ps(b, ordered(_mm256_shuffle_ps(x, y, 0xdd)));
}
PERDITA_INLINE void join_pairs(const float* a, const float* b, float* to) {
  const __m256 x = _mm256_loadu_ps(a), y = _mm256_loadu_ps(b);
  const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);
  _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
#endif
} // namespace detail

/// to[j to_step + i] = from[i from_step + j] for i < rows, j < cols: a transposed copy. What lies
/// between the rows and what lies between the columns of the copy is left alone.
template <class T>
void copy_transposed(const T* from, std::ptrdiff_t from_step, std::ptrdiff_t rows,
                     std::ptrdiff_t cols, T* to, std::ptrdiff_t to_step) {
  std::ptrdiff_t i = 0;
#if !PERDITA_NO_SIMD && defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    if (cols == 2 && from_step == 2) {
      for (; i + 8 <= rows; i += 8)
        detail::split_pairs(from + 2 * i, to + i, to + to_step + i);
    } else if (rows == 2 && to_step == 2) {
      std::ptrdiff_t j = 0;
      for (; j + 8 <= cols; j += 8)
        detail::join_pairs(from + j, from + from_step + j, to + 2 * j);
      from += j;
      to += 2 * j;
      cols -= j;
    }
  }
#endif
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    for (; i < rows; i += 16)
      for (std::ptrdiff_t j = 0; j < cols; j += 16) {
        const std::ptrdiff_t m = rows - i < 16 ? rows - i : 16, n = cols - j < 16 ? cols - j : 16;
        __m512 r[16];
        detail::repeat<16>([&](std::size_t k) __attribute__((always_inline)) {
          const auto row = static_cast<std::ptrdiff_t>(k);
          r[k] = row < m ? load_first(from + (i + row) * from_step + j, n, pack<T>(0)).r[0].data
                         : _mm512_setzero_ps();
        });
        detail::transpose(r);
        detail::repeat<16>([&](std::size_t k) __attribute__((always_inline)) {
          const auto column = static_cast<std::ptrdiff_t>(k);
          if (column < n)
            store_first(pack<T>({r[k]}), to + (j + column) * to_step + i, m);
        });
      }
#elif !PERDITA_NO_SIMD && defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    for (; i < rows; i += 8) {
      const std::ptrdiff_t m = rows - i < 8 ? rows - i : 8;
      for (std::ptrdiff_t j = 0; j < cols; j += 8) {
        const std::ptrdiff_t n = cols - j < 8 ? cols - j : 8;
        const T* const x = from + i * from_step + j;
        T* const y = to + j * to_step + i;
        if (m == 8 && n == 8) {
          detail::transpose_8_by_8(x, from_step, y, to_step);
        } else if (m <= 4) {
          detail::transpose_4_rows(x, from_step, m, n, y, to_step);
        } else {
          detail::transpose_4_columns(x, from_step, m, n < 4 ? n : 4, y, to_step);
          if (n > 4)
            detail::transpose_4_columns(x + 4, from_step, m, n - 4, y + 4 * to_step, to_step);
        }
      }
    }
#endif
  for (; i < rows; ++i)
    for (std::ptrdiff_t j = 0; j < cols; ++j)
      to[j * to_step + i] = from[i * from_step + j];
}

/// {f(0), f(1), …}, put together in registers: a load of lanes that have just been stored one by
/// one waits until all stores before it have reached the cache.
template <class F> PERDITA_INLINE pack<double> pack_of(F f) {
#if !PERDITA_NO_SIMD && defined(__AVX512F__)
  pack<double> result;
  result.r[0] = _mm512_setr_pd(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7));
  return result;
#elif !PERDITA_NO_SIMD && defined(__AVX__)
  pack<double> result;
  result.r[0] = _mm256_setr_pd(f(0), f(1), f(2), f(3));
  result.r[1] = _mm256_setr_pd(f(4), f(5), f(6), f(7));
  return result;
#else
  alignas(64) double v[lanes<double>];
  for (std::size_t i = 0; i < lanes<double>; ++i)
    v[i] = f(static_cast<std::ptrdiff_t>(i));
  return pack<double>::load(v);
#endif
}

/// Asks for the line at p to be brought into the second-level cache.
PERDITA_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}
/// Asks for the line at p to be brought into the first-level cache, to be written.
PERDITA_INLINE void prefetch_to_write(void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 1, 3);
#endif
}
/// Makes streaming stores visible to other threads.
PERDITA_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

} // namespace perdita::inline PERDITA_ABI::core

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
