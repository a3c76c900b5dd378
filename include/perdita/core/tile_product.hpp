// SPDX-License-Identifier: MIT
#pragma once

/// Products of bfloat16 matrices, summed up in float, sixteen rows by a pack of columns at a time:
/// what the AMX units of a processor do. With AVX512-BF16 the blocks of core/product.hpp do it, a
/// term of which is a pair of numbers; elsewhere scalars, so that it can be tested. Both units
/// round to the nearest even, take subnormal operands as zeros, and make zeros of subnormal
/// results.
///
/// One operand has rows of terms: term k of row i is a[i / 16 * group + i % 16 * stride + k]. The
/// other comes in panels of W columns, two terms together: terms k and k + 1 of column j are the
/// two numbers at b[j / W * panel + (k / 2 * W + j % W) * 2]. Terms come in multiples of 32; zeros
/// fill them up.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "product.hpp"

#if PERDITA_TILES && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define PERDITA_AMX 1
#else
#define PERDITA_AMX 0
#endif
#if PERDITA_TILES && !PERDITA_AMX && defined(__AVX512BF16__) && !PERDITA_NO_SIMD
#include <immintrin.h>
#define PERDITA_DOTS 1
#else
#define PERDITA_DOTS 0
#endif

namespace perdita::inline PERDITA_ABI::core {

struct tile_shape {
  static constexpr auto width = static_cast<index>(lanes<float>);
  static constexpr index rows = width; ///< 16, where there are tiles
  static constexpr index terms = 32;
  static constexpr index whole_terms(index n) { return (n + terms - 1) / terms * terms; }
};

struct tile_rows {
  const std::uint16_t* data;
  index stride, group; ///< stride: even
};
struct tile_panels {
  const std::uint16_t* data;
  index panel;
};

#if PERDITA_DOTS
inline bool tiles_usable() { return true; }

/// Operands are pairs of bfloat16 in the place of a float.
struct pair_terms {
  using V = pack<float>;
  static PERDITA_INLINE V broadcast(const float* x) {
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    return V({reg::batch<float>(_mm512_castsi512_ps(_mm512_set1_epi32(pair)))});
  }
  static PERDITA_INLINE V add(const V& x, const V& y, const V& sum) {
    const auto pairs = [](const V& v) { return std::bit_cast<__m512bh>(v.r[0].data); };
    return V({reg::batch<float>(_mm512_dpbf16_ps(sum.r[0].data, pairs(x), pairs(y)))});
  }
};

/// result (+)= a b, for any numbers of rows and columns (whole tiles of the operands are read) and
/// a multiple of 32 terms.
inline void multiply_tiles(tile_rows a, tile_panels b, product_result<float> c, index rows,
                           index cols, index terms, bool accumulate) {
  using shape = tile_shape;
  const auto floats = [](const std::uint16_t* p) { return reinterpret_cast<const float*>(p); };
  // Rows that pass over all panels together, or as many as lie evenly.
  const index strip = a.group == shape::rows * a.stride ? 3 * shape::rows : shape::rows;
  for (index i = 0; i < rows; i += strip, c.skip_rows(strip))
    multiply<float, pair_terms>(
        {floats(a.data + i / shape::rows * a.group), a.stride / 2, 1, shape::width},
        {floats(b.data), b.panel / 2}, c, std::min(strip, rows - i), cols, terms / 2, accumulate);
}
#else
namespace detail {

#if PERDITA_AMX
/// Linux lets a process use the tiles' registers once it has asked for them.
inline bool tiles_permitted() {
  static_assert(tile_shape::width == 16);
  constexpr long request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}

/// The eight tile registers of this thread, while it lives: 0 to 3 sums, 4 and 5 rows, 6 and 7
/// columns. In inline assembly, because the compilers' intrinsics take no constant expressions.
class tile_registers {
  struct alignas(64) configuration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  };

public:
  tile_registers() {
    configuration c;
    std::fill_n(c.bytes, 8, std::uint16_t{64});
    std::fill_n(c.rows, 8, std::uint8_t{16});
    asm volatile("ldtilecfg %0" ::"m"(c));
  }
  ~tile_registers() { asm volatile("tilerelease" ::: "memory"); }
  tile_registers(const tile_registers&) = delete;
  tile_registers& operator=(const tile_registers&) = delete;

  template <int N> PERDITA_INLINE void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(N)); }
  /// `step` in bytes, from row to row.
  template <int N> PERDITA_INLINE void load(const void* p, index step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(step), "i"(N) : "memory");
  }
  template <int N> PERDITA_INLINE void store(void* p, index step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(step), "i"(N) : "memory");
  }
  template <int Sum, int Rows, int Columns> PERDITA_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Rows), "i"(Columns));
  }
};
#else
inline bool tiles_permitted() { return true; }

class tile_registers {
  using shape = tile_shape;

public:
  template <int N> void clear() { std::fill_n(sum_[N], shape::rows * shape::width, 0.0f); }
  template <int N> void load(const void* p, index step) {
    constexpr bool columns = N >= 6;
    constexpr index rows = columns ? shape::terms / 2 : shape::rows;
    constexpr index row = (columns ? 2 * shape::width : shape::terms) * 2;
    for (index i = 0; i < rows; ++i)
      std::copy_n(static_cast<const unsigned char*>(p) + i * step, row,
                  reinterpret_cast<unsigned char*>(operand_[N % 4]) + i * row);
  }
  template <int N> void store(void* p, index step) {
    for (index i = 0; i < shape::rows; ++i)
      std::memcpy(static_cast<unsigned char*>(p) + i * step, sum_[N] + i * shape::width,
                  shape::width * sizeof(float));
  }
  template <int Sum, int Rows, int Columns> void multiply() {
    const std::uint16_t *a = operand_[Rows % 4], *b = operand_[Columns % 4];
    for (index i = 0; i < shape::rows; ++i)
      for (index k = 0; k < shape::terms; ++k)
        for (index j = 0; j < shape::width; ++j)
          sum_[Sum][i * shape::width + j] +=
              widen_bfloat16(a[i * shape::terms + k]) *
              widen_bfloat16(b[(k / 2 * shape::width + j) * 2 + k % 2]);
  }

private:
  float sum_[4][shape::rows * shape::width];
  std::uint16_t operand_[4][shape::terms * shape::width];
};
#endif

/// The sums in register N become rows and columns of the result; no more than there are.
template <int N>
void put_tile(tile_registers& registers, const product_result<float>& c, index rows, index cols,
              bool accumulate) {
  using shape = tile_shape;
  constexpr index width = shape::width;
  alignas(64) float sums[shape::rows * width];
  registers.store<N>(sums, width * 4);
  using V = pack<float>;
  for (index i = 0; i < std::min(rows, shape::rows); ++i) {
    float* to = c.at(i);
    const V sum = V::load(sums + i * width);
    if (cols >= width)
      (accumulate ? V::load(to) + sum : sum).store(to);
    else
      store_first(accumulate ? load_first(to, cols, V(0)) + sum : sum, to, cols);
  }
}

} // namespace detail

/// Whether products may be made by tiles in this process.
inline bool tiles_usable() { return PERDITA_TILES && detail::tiles_permitted(); }

/// result (+)= a b, for any numbers of rows and columns (whole tiles of the operands are read) and
/// a multiple of 32 terms. Four tiles at a time: each operand is read half as often as one by one.
PERDITA_NOINLINE inline void multiply_tiles(tile_rows a, tile_panels b, product_result<float> c,
                                            index rows, index cols, index terms, bool accumulate) {
  using shape = tile_shape;
  constexpr index width = shape::width;
  detail::tile_registers registers;
  for (index i = 0; i < rows; i += 2 * shape::rows) {
    const bool two_rows = rows - i > shape::rows;
    auto to = c;
    to.skip_rows(i);
    for (index j = 0; j < cols; j += 2 * width) {
      const bool two_panels = cols - j > width;
      const std::uint16_t* x = a.data + i / shape::rows * a.group;
      const std::uint16_t* y = b.data + j / width * b.panel;
      for (index r = 0; accumulate && r < std::min(2 * shape::rows, rows - i); ++r)
        for (index q = 0; q < 2; ++q)
          prefetch_to_write(to.at(r) + q * c.panel);
      registers.clear<0>();
      registers.clear<1>();
      registers.clear<2>();
      registers.clear<3>();
      for (index k = 0; k < terms; k += shape::terms) {
        registers.load<4>(x + k, a.stride * 2);
        registers.load<6>(y + k * width, width * 4);
        registers.multiply<0, 4, 6>();
        if (two_rows) {
          registers.load<5>(x + a.group + k, a.stride * 2);
          registers.multiply<2, 5, 6>();
        }
        if (two_panels) {
          registers.load<7>(y + b.panel + k * width, width * 4);
          registers.multiply<1, 4, 7>();
          if (two_rows)
            registers.multiply<3, 5, 7>();
        }
      }
      auto below = to;
      below.skip_rows(shape::rows);
      detail::put_tile<0>(registers, to, rows - i, cols - j, accumulate);
      if (two_rows)
        detail::put_tile<2>(registers, below, rows - i - shape::rows, cols - j, accumulate);
      to.skip_panels(1);
      below.skip_panels(1);
      if (two_panels) {
        detail::put_tile<1>(registers, to, rows - i, cols - j - width, accumulate);
        if (two_rows)
          detail::put_tile<3>(registers, below, rows - i - shape::rows, cols - j - width,
                              accumulate);
      }
      to.skip_panels(1);
    }
  }
}
#endif

/// Two rows of n numbers become pairs; zeros for a row that is missing, and after the last number
/// up to a pack's end. Pairs of column j go to to[j / W * panel + j % W * 2].
inline void put_pairs(const std::uint16_t* first, const std::uint16_t* second, index n,
                      std::uint16_t* to, index panel) {
  constexpr index width = tile_shape::width;
  for (index j = 0; j < n; j += width, to += panel)
    for (index i = 0; i < width; ++i) {
      const bool there = j + i < n;
      to[2 * i] = there && first ? first[j + i] : std::uint16_t{0};
      to[2 * i + 1] = there && second ? second[j + i] : std::uint16_t{0};
    }
}

} // namespace perdita::inline PERDITA_ABI::core
