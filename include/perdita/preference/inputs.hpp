// SPDX-License-Identifier: MIT
#pragma once

/// Inputs and options that losses of pairs, of single sequences and of lists have in common.

#include "../core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// Numbers of tokens, integers of any type: one per sequence, or a row of them for each list.
struct token_counts {
  core::integer_rows entries;

  token_counts() = default;
  template <core::labels_like V>
  explicit(false) token_counts(V&& counts) : entries(core::as_vector(counts)) {}
  template <core::label_rows M>
  requires(!core::labels_like<M>) explicit(false) token_counts(M&& counts)
      : entries(core::as_matrix(counts)) {}
  bool given() const { return entries.data || entries.rows * entries.cols > 0; }
  /// Of sequence i, or of candidate i of a list.
  double of(index i, index list = 0) const { return static_cast<double>(entries.at(list, i)); }
};

namespace core {

/// The option ε of a smoothed link.
template <class T> double smoothing(const char* loss, T e) {
  require(e >= 0 && e <= T(0.5), loss, "label_smoothing", e, "a number in [0, 0.5]");
  return static_cast<double>(e);
}

} // namespace core
} // namespace perdita::inline PERDITA_ABI
