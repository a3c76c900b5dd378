// SPDX-License-Identifier: MIT
#pragma once

/// What a call of the linear head is about, in terms that do not depend on the caller's types.

#include <algorithm>

#include "linear_filter.hpp"
#include "row_job.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// What a call of the linear head adds to the job of its loss, whose scores have a shape, but no
/// memory.
template <class T> struct linear_job {
  matrix_data<T> hidden, weights;
  vector_view<const T> bias;
  matrix_data<T, true> d_hidden, d_weights; ///< no data: value only
  vector_view<T> d_bias;
  bool accumulate_weights = false;
  linear_filter filter;
  vector_view<double> dropped; ///< by the filter, of every row
  index first_class = 0;       ///< where the weights are a slice: its place among all classes
  index block_rows = 0;        ///< a multiple of W
  index slots = 0;             ///< pieces kept at once
};

/// What is known of a row from one slice of the classes, or from all: numbers that can be stored,
/// sent, and merged.
struct row_record {
  static constexpr int terms = 4;
  double shift, term[terms];
  double rivals;     // the largest raw score but the label's
  double raw_target; // of the label, where the slice has it
  double has_target; // 1 or 0
};

/// Sizes that depend on the shape alone.
template <class T> struct linear_shape {
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr index panels = 16; ///< of W rows in a block, at the most
  /// Columns of an input that go through a product at once.
  static constexpr index columns = panels * width;
  static constexpr index most_classes = 512; ///< in a piece
  static constexpr index depth = 256;        ///< terms of a product that are added up at once
  static constexpr index strip = 48; ///< rows of the broadcast operand that pass over all panels
  /// Classes of which another head's scores are made at once, to lie beside those of a piece.
  static constexpr index beside = 128;
  index classes;

  /// Classes in a piece: fewer where there are few, so that there is work for several threads.
  index piece() const {
    return classes >= 4096 ? most_classes : std::clamp<index>((classes + 7) / 8, 64, most_classes);
  }
  index pieces() const { return (classes + piece() - 1) / piece(); }
  /// Elements from panel to panel of a piece: not a power of two, for the caches' sake.
  index panel() const { return (std::min(piece(), classes) + 1) * width; }
  index panel_beside() const { return (std::min(std::min(beside, piece()), classes) + 1) * width; }
  /// Elements of a piece of `rows` rows.
  index slot(index rows) const { return (rows + width - 1) / width * panel(); }
};

} // namespace perdita::inline PERDITA_ABI::core
