// SPDX-License-Identifier: MIT
#pragma once

/// Matrix products of small blocks that lie in cache, on the library's lanes.
///
/// One operand is broadcast, element by element; the other comes in panels of W columns, so that a
/// pack of it is one aligned load: element (k, j) of a panelled matrix is panel[j / W][k][j % W].
/// Each element of a result is one chain of fma() over k, so it does not depend on the instruction
/// set (among those with FMA), on the sizes of the blocks around it, or on who computes it.

#include <algorithm>

#include "simd.hpp"
#include "storage.hpp"
#include "views.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// The broadcast operand: element (i, k) is data[i * row + k / W * section + k % W * step], W being
/// the lanes of a pack. An ordinary row has step 1 and section W.
template <class T> struct broadcast_operand {
  const T* data;
  index row, step, section;
  bool far = false; ///< lies in memory: while some rows are multiplied, the next ones are fetched
};
/// The panelled operand: element (k, j) is data[j / W * panel + k * W + j % W].
template <class T> struct panelled_operand {
  const T* data;
  index panel;
};
/// Element (i, j) is data[i * row + j / W * panel + j % W], or the same from places[i] on, where
/// rows lie anywhere.
template <class T> struct product_result {
  T* data;
  index row, panel;
  T* const* places = nullptr;
  index column = 0; ///< in the rows that `places` names

  T* at(index i) const { return places ? places[i] + column : data + i * row; }
  void skip_rows(index n) { places ? void(places += n) : void(data += n * row); }
  void skip_panels(index n) { places ? void(column += n * panel) : void(data += n * panel); }
};

/// How many results the registers hold: rows of the broadcast operand times packs.
template <class T> struct product_shape {
#if PERDITA_NO_SIMD
  static constexpr index rows = 1, packs = 1;
#elif defined(__AVX512F__)
  static constexpr index rows = 6, packs = 4;
#elif defined(__aarch64__)
  static constexpr index rows = 6, packs = 1;
#elif defined(__AVX__)
  static constexpr index rows = 6, packs = 1;
#else
  static constexpr index rows = 3, packs = 1;
#endif
};

/// How a term is added to its sum: operands are numbers.
template <class T> struct number_terms {
  static PERDITA_INLINE pack<T> broadcast(const T* x) { return pack<T>(*x); }
  static PERDITA_INLINE pack<T> add(const pack<T>& x, const pack<T>& y, const pack<T>& sum) {
    return fma(x, y, sum);
  }
};

namespace detail {

/// result (+)= a b for Rows rows and Packs packs, the last of which has `last` columns.
template <index Rows, index Packs, class Terms, class T>
PERDITA_NOINLINE void multiply_few(const broadcast_operand<T>& a, const panelled_operand<T>& b,
                                   const product_result<T>& c, index depth, index last,
                                   bool accumulate) {
  using V = pack<T>;
  constexpr auto width = static_cast<index>(lanes<T>);
  V sum[Rows][Packs];
  unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
    unrolled<Packs>([&](auto q) __attribute__((always_inline)) { sum[i][q] = V(0); });
  });
  // Results lie far apart, often in memory: these, and where a step is narrow those of the same
  // rows' next packs, for which a product of few terms alone would be too short.
  unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
    unrolled<std::max<index>(2, Packs)>([&](auto q) __attribute__((always_inline)) {
      prefetch_to_write(c.at(i) + static_cast<index>(q) * c.panel);
    });
  });
  const T* from = a.data;
  const T* panel = b.data;
  const index row = a.row, step = a.step;
  for (index k = 0; k < depth; k += width) {
    const T* x = from;
    if (a.far)
      unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        prefetch(from + (Rows + static_cast<index>(i)) * row);
      });
    for (index left = std::min(width, depth - k); left > 0; --left) {
      V y[Packs];
      unrolled<Packs>([&](auto q) __attribute__((always_inline)) {
        // one load, not one for each row
        y[q] = kept(V::load(panel + static_cast<index>(q) * b.panel));
      });
      unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        const V one = Terms::broadcast(x + static_cast<index>(i) * row);
        unrolled<Packs>([&](auto q) __attribute__((always_inline)) {
          sum[i][q] = Terms::add(one, y[q], sum[i][q]);
        });
      });
      x += step;
      panel += width;
    }
    from += a.section;
  }
  unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
    T* const first = c.at(i);
    unrolled<Packs>([&](auto q) __attribute__((always_inline)) {
      T* const to = first + static_cast<index>(q) * c.panel;
      if (q + 1 < Packs || last == width) {
        (accumulate ? V::load(to) + sum[i][q] : sum[i][q]).store(to);
      } else {
        store_first(accumulate ? load_first(to, last, V(0)) + sum[i][q] : sum[i][q], to, last);
      }
    });
  });
}

/// All rows of one or more packs of columns: as many at a time as fit, then 4, then 1.
template <index Packs, class Terms, class T>
void multiply_panel(broadcast_operand<T> a, const panelled_operand<T>& b, product_result<T> c,
                    index rows, index depth, index last, bool accumulate) {
  constexpr index most = product_shape<T>::rows;
  const auto take = [&]<index Rows>(std::integral_constant<index, Rows>) {
    a.far = a.far && rows >= 2 * Rows;
    multiply_few<Rows, Packs, Terms>(a, b, c, depth, last, accumulate);
    a.data += Rows * a.row;
    c.skip_rows(Rows);
    rows -= Rows;
  };
  // A step of four has too few sums to keep the multiply-adders busy: of ten, sixteen, … rows two
  // fives are better than a six and a four.
  if constexpr (most == 6)
    for (int fives = rows % 6 == 4 && rows > 4 ? 2 : 0; fives > 0; --fives)
      take(std::integral_constant<index, 5>{});
  // Two fours are better than a full step and a rest of two.
  while (rows >= most && (most != 6 || rows % 6 != 2 || rows > 8))
    take(std::integral_constant<index, most>{});
  if constexpr (most > 4)
    while (rows >= 4)
      take(std::integral_constant<index, 4>{});
  while (rows > 0)
    take(std::integral_constant<index, 1>{});
}

} // namespace detail

/// result (+)= a b for `rows` rows, `cols` columns and `depth` terms.
template <class T, class Terms = number_terms<T>>
void multiply(broadcast_operand<T> a, panelled_operand<T> b, product_result<T> c, index rows,
              index cols, index depth, bool accumulate) {
  constexpr auto width = static_cast<index>(lanes<T>);
  constexpr index packs = product_shape<T>::packs; // 1, 2 or 4
  const auto advance = [&](index n) {
    a.far = false;
    b.data += n * b.panel;
    c.skip_panels(n);
    cols -= n * width;
  };
  const auto take = [&]<index Packs>(std::integral_constant<index, Packs>) {
    for (; cols > (Packs - 1) * width; advance(Packs))
      detail::multiply_panel<Packs, Terms>(a, b, c, rows, depth,
                                           std::min(width, cols - (Packs - 1) * width), accumulate);
  };
  if constexpr (packs >= 4)
    take(std::integral_constant<index, 4>{});
  if constexpr (packs >= 2)
    take(std::integral_constant<index, 2>{});
  take(std::integral_constant<index, 1>{});
}

// ---- operands from matrices: where they lie, or copied

/// Whether rows of a matrix may be used where they lie.
template <class T, bool M> bool rows_lie(const matrix_data<T, M>& m) {
  return m.direct() && m.col_stride == 1;
}

/// n columns of a row, from column `first` on; `copy` has room for them.
template <class T>
const T* row_of(const matrix_data<T>& m, index row, index first, index n, T* copy) {
  if (rows_lie(m))
    return m.pointer(row, first);
  m.read(row, first, n, copy);
  return copy;
}

/// n columns of `rows` rows to be broadcast; `copy` has room for them.
template <class T>
broadcast_operand<T> rows_of(const matrix_data<T>& m, index row, index rows, index first, index n,
                             T* copy) {
  constexpr auto width = static_cast<index>(lanes<T>);
  if (rows_lie(m) && m.left_in_plane(row) >= rows)
    return {m.pointer(row, first), m.row_stride, 1, width};
  for (index i = 0; i < rows; ++i)
    m.read(row + i, first, n, copy + i * n);
  return {copy, n, 1, width};
}

/// A panel whose columns are the given rows (W at the most) and whose rows are n columns of the
/// matrix; zeros where there is no row. `copy` has room for W * n numbers.
template <class T>
void panel_of_rows(const matrix_data<T>& m, const index* row, index rows, index first, index n,
                   T* copy, T* to) {
  constexpr auto width = static_cast<index>(lanes<T>);
  if (rows < width)
    std::fill_n(to, n * width, T(0));
  const bool even = row[rows - 1] - row[0] == rows - 1 && m.left_in_plane(row[0]) >= rows;
  if (even && rows_lie(m))
    return copy_transposed(m.pointer(row[0], first), m.row_stride, rows, n, to, width);
  for (index i = 0; i < rows; ++i)
    m.read(row[i], first, n, copy + i * n);
  copy_transposed(copy, n, rows, n, to, width);
}

/// n columns of a row, times a factor, become row k of panels that have `depth` rows; zeros after
/// the last column. `copy` has room for n numbers.
template <class T>
void put_in_panels(const matrix_data<T>& m, index row, index first, index n, index k, index depth,
                   T* copy, T* panels, T factor = 1) {
  using V = pack<T>;
  constexpr auto width = static_cast<index>(lanes<T>);
  constexpr index ahead = 8; // rows: short pieces, far apart, that no core's prefetcher follows
  const T* from = row_of(m, row, first, n, copy);
  if (rows_lie(m) && m.left_in_plane(row) > ahead)
    for (index j = 0; j < n; j += width)
      prefetch(from + ahead * m.row_stride + j);
  const V by(factor);
  for (index j = 0; j < n; j += width) {
    const V x = j + width <= n ? V::load(from + j) : load_first(from + j, n - j, V(0));
    (x * by).store(panels + j * depth + k * width);
  }
}

} // namespace perdita::inline PERDITA_ABI::core
