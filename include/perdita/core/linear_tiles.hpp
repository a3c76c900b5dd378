// SPDX-License-Identifier: MIT
#pragma once

/// The linear head's three products where hidden states and weights are bfloat16 and the processor
/// multiplies such numbers as they are (core/tile_product.hpp). Scores are exact sums of exact
/// products, but for float's rounding; for the gradients' products the gradient of the scores is
/// rounded to bfloat16 first, so that an element of them is off by at most 2⁻⁸ Σ |g x|.

#include <bit>

#include "linear_job.hpp"
#include "tile_product.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class T> class linear_tiles {
  using number = std::uint16_t;
  using shape = linear_shape<T>;
  using tiles = tile_shape;
  static constexpr index width = shape::width;
  static constexpr index most_terms = 2048; ///< of scores that are added up at once

public:
  static constexpr bool possible = PERDITA_TILES && std::same_as<T, float>;

  linear_tiles(const linear_job<T>& linear, carver& memory)
      : linear_(linear), depth_(linear.hidden.cols), terms_(tiles::whole_terms(depth_)),
        rows_(tiles::whole_terms(linear.block_rows)), panel_(shape{linear.weights.rows}.panel()) {
    if constexpr (possible)
      used_ = lie(linear.hidden) && lie(linear.weights) && linear.weights.rows >= 64 &&
              depth_ > 0 && !linear.filter && tiles_usable();
    if (!used_)
      return;
    by_features_ = memory.take<number>(static_cast<std::size_t>(rows_ * terms_));
    if (linear.d_weights)
      by_rows_ = memory.take<number>(static_cast<std::size_t>(rows_ * terms_));
  }
  bool used() const { return used_; }

  /// Into how many tasks take() is divided, for a block of `count` rows.
  static index parts(index count) { return tiles::whole_terms(count) / tiles::terms; }
  /// Puts some of the hidden states of a block, whose rows are `row`, into panels, for the scores
  /// and, where it is wanted, for the gradient of the weights. There are zeros where there is no
  /// row.
  void take(const index* row, index count, index part) const {
    const index end = (part + 1) * tiles::terms;
    for (index i = part * tiles::terms; i < end; ++i) {
      number* to = by_features_ + i / width * (terms_ * width) + i % width * 2;
      const number* from = i < count ? at(linear_.hidden, row[i], 0) : nullptr;
      for (index k = 0; k < terms_; k += 2, to += 2 * width) {
        to[0] = from && k < depth_ ? from[k] : number{0};
        to[1] = from && k + 1 < depth_ ? from[k + 1] : number{0};
      }
    }
    for (index i = part * tiles::terms; linear_.d_weights && i < end; i += 2) {
      const auto from = [&](index r) {
        return r < count ? at(linear_.hidden, row[r], 0) : nullptr;
      };
      put_pairs(from(i), from(i + 1), depth_, by_rows_ + i * width, rows_ * width);
    }
  }

  /// The scores of n classes, from the weights' row `first` on, of `panels` panels of rows.
  /// `copy` has room for 32 rows of 2048 numbers.
  void make_scores(index first, index n, index panels, T* scores, T* copy) const {
    const bool lie = depth_ % tiles::terms == 0 && linear_.weights.row_stride % 2 == 0 &&
                     linear_.weights.left_in_plane(first) >= n;
    const index whole = lie ? n / tiles::rows * tiles::rows : 0;
    for (index k = 0; k < terms_; k += most_terms) {
      const index terms = std::min(most_terms, terms_ - k);
      const auto multiply = [&](const number* rows, index stride, index c, index classes) {
        multiply_tiles({rows, stride, tiles::rows * stride},
                       {by_features_ + k * width, terms_ * width},
                       {scores + c * width, width, panel_}, classes, panels * width, terms, k > 0);
      };
      if (whole > 0)
        multiply(at(linear_.weights, first, k), linear_.weights.row_stride, 0, whole);
      for (index c = whole; c < n; c += 2 * tiles::rows) {
        const index classes = std::min(2 * tiles::rows, n - c);
        number* to = numbers(copy);
        std::fill_n(to, 2 * tiles::rows * terms, number{0});
        for (index i = 0; i < classes; ++i)
          std::copy_n(at(linear_.weights, first + c + i, k), std::min(terms, depth_ - k),
                      to + i * terms);
        multiply(to, terms, c, classes);
      }
    }
  }

  /// Rows of the gradient of the weights (+)= the gradient of n classes' scores times the hidden
  /// states of the `count` rows at hand. `copy` has room for n rows of `count` numbers.
  void add_to_weights(const T* gradient, index n, index count, T* to, index step, bool accumulate,
                      T* copy) const {
    const index rows = tiles::whole_terms(count);
    number* narrowed = numbers(copy);
    std::fill_n(narrowed, (n + tiles::rows - 1) / tiles::rows * tiles::rows * rows, number{0});
    for (index p = 0; p * width < count; ++p)
      for (index j = 0; j < n; ++j)
        put(gradient + p * panel_ + j * width, std::min(width, count - p * width),
            narrowed + j * rows + p * width);
    multiply_tiles({narrowed, rows, tiles::rows * rows}, {by_rows_, rows_ * width},
                   {to, step, width}, n, depth_, rows, accumulate);
  }

  /// Rounds the gradient of n classes' scores, where it lies, to what add_to_hidden() takes: of
  /// each panel all classes of the first row, of the second, … `copy` has room for a panel of it.
  void turn(T* gradient, index n, index panels, T* copy) const {
    const index terms = tiles::whole_terms(n);
    for (index p = 0; p < panels; ++p) {
      T* panel = gradient + p * panel_;
      for (index j = 0; j < terms; j += tiles::terms) {
        T pairs[tiles::terms / 2][width];
        for (index k = 0; k < tiles::terms; k += 2) {
          number first[width] = {}, second[width] = {};
          if (j + k < n)
            put(panel + (j + k) * width, width, first);
          if (j + k + 1 < n)
            put(panel + (j + k + 1) * width, width, second);
          for (index i = 0; i < width; ++i)
            pairs[k / 2][i] = std::bit_cast<T>(static_cast<std::uint32_t>(first[i]) |
                                               static_cast<std::uint32_t>(second[i]) << 16);
        }
        copy_transposed(pairs[0], width, tiles::terms / 2, width, copy + j / 2, terms / 2);
      }
      std::copy_n(copy, width * terms / 2, panel);
    }
  }
  /// Columns of the gradient of the hidden states (+)= turned gradient times weights. `copy` has
  /// room for n rows of `cols` numbers.
  void add_to_hidden(const T* turned, index first, index n, index count, index d, index cols,
                     T* const* places, bool accumulate, T* copy) const {
    const index terms = tiles::whole_terms(n);
    number* panels = numbers(copy);
    for (index k = 0; k < terms; k += 2) {
      const auto from = [&](index c) {
        return c < n ? at(linear_.weights, first + c, d) : nullptr;
      };
      put_pairs(from(k), from(k + 1), cols, panels + k * width, terms * width);
    }
    multiply_tiles({reinterpret_cast<const number*>(turned), terms, 2 * panel_},
                   {panels, terms * width}, {nullptr, 0, width, places, d}, count, cols, terms,
                   accumulate);
  }

private:
  static bool lie(const matrix_data<T>& m) { return m.holds_bfloat16() && m.col_stride == 1; }
  static const number* at(const matrix_data<T>& m, index row, index col) {
    return reinterpret_cast<const number*>(m.at(row, col));
  }
  static number* numbers(T* scratch) { return reinterpret_cast<number*>(scratch); }
  static void put(const T* x, index n, number* to) {
    write_sixteen<storage::bfloat16>(reinterpret_cast<unsigned char*>(to), 1, n, x);
  }

  const linear_job<T>& linear_;
  index depth_, terms_; // features, and with zeros up to whole tiles
  index rows_;          // of a block, up to whole tiles
  index panel_;         // elements from panel to panel of a piece
  bool used_ = false;
  number *by_features_ = nullptr, *by_rows_ = nullptr; // hidden states of the rows at hand
};

} // namespace perdita::inline PERDITA_ABI::core
