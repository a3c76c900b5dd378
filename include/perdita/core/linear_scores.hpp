// SPDX-License-Identifier: MIT
#pragma once

/// The scores of some rows and classes as a product of hidden states and class weights.

#include <algorithm>

#include "linear_job.hpp"
#include "product.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// The operands of a linear head.
template <class T> struct linear_operands {
  matrix_data<T> hidden, weights;
  const T* bias = nullptr;
};

/// The scores of `count` rows for n classes from `first` on, without the bias, in panels of W rows
/// that lie `panel` apart. `packed` has room for shape::depth numbers of every row of the panels,
/// `copy` for as many of W rows or of a strip. A score's bits depend on its operands alone.
template <class T>
void make_scores(const linear_operands<T>& head, const index* rows, index count, index first,
                 index n, T* packed, T* copy, T* scores, index panel) {
  using shape = linear_shape<T>;
  constexpr index width = shape::width;
  const index depth = head.hidden.cols, panels = (count + width - 1) / width;
  if (depth == 0)
    std::fill_n(scores, panels * panel, T(0));
  for (index k = 0; k < depth; k += shape::depth) {
    const index terms = std::min(shape::depth, depth - k);
    for (index p = 0; p < panels; ++p)
      panel_of_rows(head.hidden, rows + p * width, std::min(width, count - p * width), k, terms,
                    copy, packed + p * terms * width);
    for (index c = 0; c < n; c += shape::strip) {
      const index some = std::min(shape::strip, n - c);
      broadcast_operand<T> weights = rows_of(head.weights, first + c, some, k, terms, copy);
      weights.far = true;
      multiply<T>(weights, {packed, terms * width}, {scores + c * width, width, panel}, some,
                  panels * width, terms, k > 0);
    }
  }
}

} // namespace perdita::inline PERDITA_ABI::core
