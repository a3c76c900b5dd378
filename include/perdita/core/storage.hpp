// SPDX-License-Identifier: MIT
#pragma once

/// Storage types: what scores and gradients are kept as. Sixteen-bit numbers are converted a chunk
/// at a time to and from float, in which everything is computed.

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#if __has_include(<stdfloat>)
#include <stdfloat>
#endif

#include "simd.hpp"
#include "views.hpp"

namespace Eigen {
struct half;
struct bfloat16;
} // namespace Eigen

namespace perdita::inline PERDITA_ABI {

/// The upper half of a float: for those who bring no such type of their own.
struct bfloat16 {
  std::uint16_t bits;
};
/// IEEE 754 binary16.
struct half {
  std::uint16_t bits;
};

/// How the bits of a storage type are read. Specialise `storage_of` for a type of your own.
enum class storage { float32, float64, bfloat16, float16 };

template <class S> struct storage_of;
// clang-format off
template <> struct storage_of<float> { static constexpr storage value = storage::float32; };
template <> struct storage_of<double> { static constexpr storage value = storage::float64; };
template <> struct storage_of<bfloat16> { static constexpr storage value = storage::bfloat16; };
template <> struct storage_of<half> { static constexpr storage value = storage::float16; };
template <> struct storage_of<Eigen::bfloat16> { static constexpr storage value = storage::bfloat16; };
template <> struct storage_of<Eigen::half> { static constexpr storage value = storage::float16; };
#if defined(__STDCPP_BFLOAT16_T__)
template <> struct storage_of<std::bfloat16_t> { static constexpr storage value = storage::bfloat16; };
#endif
#if defined(__STDCPP_FLOAT16_T__)
template <> struct storage_of<std::float16_t> { static constexpr storage value = storage::float16; };
#endif
// clang-format on

namespace core {

/// S can hold scores for a loss that computes in T: T itself, or sixteen bits for float.
template <class S, class T>
concept storable_as = requires {
  storage_of<S>::value;
}
&&(std::same_as<S, T> || (sizeof(S) == 2 && std::same_as<T, float>));

PERDITA_INLINE float widen_bfloat16(std::uint16_t b) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16);
}
/// To nearest, ties to even; NaN stays NaN.
PERDITA_INLINE std::uint16_t narrow_bfloat16(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (u >> 16) | 0x40u;
  return static_cast<std::uint16_t>(x != x ? nan : rounded);
}

/// A half's exponent is rebased by multiplying with 2^112, which is exact and covers subnormals.
PERDITA_INLINE float widen_half(std::uint16_t h) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(h & 0x7FFFu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude | 0x7F800000u; // infinity and NaN
  const std::uint32_t u = magnitude >= 0x0F800000u ? special : std::bit_cast<std::uint32_t>(scaled);
  return std::bit_cast<float>(u | static_cast<std::uint32_t>(h & 0x8000u) << 16);
}
/// To nearest, ties to even; NaN stays NaN; beyond 65504 to infinity by rounding.
PERDITA_INLINE std::uint16_t narrow_half(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t a = u & 0x7FFFFFFFu;
  std::uint32_t h;
  if (a > 0x7F800000u) {
    h = 0x7E00u | ((a >> 13) & 0x1FFu);
  } else if (a >= 0x477FF000u) {
    h = 0x7C00u;
  } else if (a < 0x38800000u) { // subnormal: adding 1/2 leaves the rounded bits at the bottom
    h = std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3F000000u;
  } else {
    h = (a + 0xFFFu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<std::uint16_t>(sign | h);
}

template <storage Kind> PERDITA_INLINE float widen(std::uint16_t h) {
#if defined(__F16C__)
  if constexpr (Kind == storage::float16)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
  if constexpr (Kind == storage::float16)
    return widen_half(h);
#endif
  if constexpr (Kind == storage::bfloat16)
    return widen_bfloat16(h);
}
template <storage Kind> PERDITA_INLINE std::uint16_t narrow(float x) {
#if defined(__F16C__)
  if constexpr (Kind == storage::float16)
    return static_cast<std::uint16_t>(_mm_cvtsi128_si32(
        _mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
#else
  if constexpr (Kind == storage::float16)
    return narrow_half(x);
#endif
  if constexpr (Kind == storage::bfloat16)
    return narrow_bfloat16(x);
}

template <storage Kind>
void read_sixteen(const unsigned char* p, index stride, index n, float* out) {
  index i = 0;
  if (stride == 1) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (; i + 16 <= n; i += 16) {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * i));
      if constexpr (Kind == storage::bfloat16)
        _mm512_storeu_ps(out + i, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(
                                      0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, h), 16)));
      else
        _mm512_storeu_ps(out + i, _mm512_maskz_cvtph_ps(0xFFFF, h));
    }
#elif defined(__AVX2__) && defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i));
      if constexpr (Kind == storage::bfloat16)
        _mm256_storeu_ps(out + i,
                         _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)));
      else
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
    }
#endif
  }
  for (; i < n; ++i) {
    std::uint16_t h;
    std::memcpy(&h, p + 2 * i * stride, 2);
    out[i] = widen<Kind>(h);
  }
}

template <storage Kind>
void write_sixteen(unsigned char* p, index stride, index n, const float* in) {
  index i = 0;
  if (stride == 1) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (; i + 16 <= n; i += 16) {
      const __m512 x = _mm512_loadu_ps(in + i);
      __m256i h;
      if constexpr (Kind == storage::bfloat16) {
        const __m512i u = _mm512_castps_si512(x);
        const __m512i top = _mm512_maskz_srli_epi32(0xFFFF, u, 16);
        const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_maskz_srli_epi32(
            0xFFFF, _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        h = _mm512_maskz_cvtepi32_epi16(
            0xFFFF, _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
      } else {
        h = _mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 2 * i), h);
    }
#elif defined(__AVX2__) && defined(__F16C__)
    if constexpr (Kind == storage::float16)
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  }
  for (; i < n; ++i) {
    const std::uint16_t h = narrow<Kind>(in[i]);
    std::memcpy(p + 2 * i * stride, &h, 2);
  }
}

template <class T> void read_strided(const unsigned char* p, index stride, index n, T* out) {
  const T* x = reinterpret_cast<const T*>(p);
  for (index i = 0; i < n; ++i)
    out[i] = x[i * stride];
}
template <class T> void write_strided(unsigned char* p, index stride, index n, const T* in) {
  T* x = reinterpret_cast<T*>(p);
  for (index i = 0; i < n; ++i)
    x[i * stride] = in[i];
}

/// A matrix whose storage type is known only at run time: kernels are compiled for T alone.
template <class T, bool Mutable = false> struct matrix_data {
  using byte = std::conditional_t<Mutable, unsigned char, const unsigned char>;
  using direct_pointer = std::conditional_t<Mutable, T*, const T*>;

  byte* data = nullptr;
  index rows = 0, cols = 0;
  index row_stride = 0, col_stride = 1; // in elements
  index plane_rows = 0, plane_stride = 0;
  index width = sizeof(T);
  void (*reader)(const unsigned char*, index, index, T*) = nullptr;
  void (*writer)(unsigned char*, index, index, const T*) = nullptr;

  matrix_data() = default;
  template <class S>
  matrix_data(const matrix_view<S>& m)
      : data(reinterpret_cast<byte*>(m.data)), rows(m.rows), cols(m.cols), row_stride(m.row_stride),
        col_stride(m.col_stride), plane_rows(m.plane_rows), plane_stride(m.plane_stride),
        width(sizeof(S)) {
    using value = std::remove_const_t<S>;
    if constexpr (std::same_as<value, T>) {
      reader = &read_strided<T>;
      writer = &write_strided<T>;
    } else {
      reader = &read_sixteen<storage_of<value>::value>;
      writer = &write_sixteen<storage_of<value>::value>;
    }
  }

  explicit operator bool() const { return data != nullptr; }
  /// Elements are T and may be used where they lie.
  bool direct() const { return width == sizeof(T); }
  bool holds_bfloat16() const { return reader == &read_sixteen<storage::bfloat16>; }
  byte* at(index r, index c) const {
    const index offset = plane_rows == rows
                             ? r * row_stride
                             : r / plane_rows * plane_stride + r % plane_rows * row_stride;
    return data + (offset + c * col_stride) * width;
  }
  direct_pointer pointer(index r, index c) const {
    return reinterpret_cast<direct_pointer>(at(r, c));
  }
  /// How many rows from r on are one stride apart.
  index left_in_plane(index r) const {
    return plane_rows == 0 ? std::numeric_limits<index>::max() : plane_rows - r % plane_rows;
  }
  /// n elements of row r from column c on.
  void read(index r, index c, index n, T* out) const { reader(at(r, c), col_stride, n, out); }
  void write(index r, index c, index n, const T* in) const requires Mutable {
    writer(at(r, c), col_stride, n, in);
  }
  /// n elements of column c from row r on, which do not cross a plane.
  void read_column(index r, index c, index n, T* out) const {
    reader(at(r, c), row_stride, n, out);
  }
};

} // namespace core
} // namespace perdita::inline PERDITA_ABI
