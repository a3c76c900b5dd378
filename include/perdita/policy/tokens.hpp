// SPDX-License-Identifier: MIT
#pragma once

/// Which tokens of a batch of padded sequences count.

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>

#include "../core/sequences.hpp"
#include "../core/weighted.hpp"

namespace perdita::inline PERDITA_ABI::policy {

/// Sequences × tokens of integers or bool: a token counts where this is not 0. Does not own.
struct token_mask : core::integer_rows {
  token_mask() = default;
  template <core::matrix_like M>
  requires std::integral<std::remove_const_t<typename core::element_of<M>::type>>
  token_mask(M&& mask) : core::integer_rows(core::as_matrix(mask)) {}
};

/// How many tokens of each sequence count, from the first on. Does not own.
struct sequence_lengths : core::integer_rows {
  sequence_lengths() = default;
  template <core::labels_like V>
  sequence_lengths(V&& lengths) : core::integer_rows(core::as_vector(lengths)) {}
};

} // namespace perdita::inline PERDITA_ABI::policy

namespace perdita::inline PERDITA_ABI::core {

/// The tokens of `rows` sequences of at most `cols` tokens that count: by a mask, by lengths, or
/// all of them.
struct counted_tokens {
  policy::token_mask mask;
  policy::sequence_lengths lengths;
  index rows = 0, cols = 0;

  void check(const char* name) const {
    const sequence_checks<double> checks{name};
    if (mask.reader && lengths.reader)
      fail(name, "mask", "given with lengths", "one of the two");
    if (mask.reader) {
      checks.size("rows of the mask", mask.rows, rows, "as many as there are sequences");
      checks.size("columns of the mask", mask.cols, cols, "as many as there are tokens");
      checks.memory("mask", mask.data, rows * cols);
    }
    if (lengths.reader) {
      checks.size("lengths", lengths.cols, rows, "as many as there are sequences");
      checks.memory("lengths", lengths.data, rows);
      for (index r = 0; r < rows; ++r)
        if (const std::int64_t n = lengths.at(0, r); n < 0 || n > cols)
          fail_at(name, "lengths", r, to_text(n), "0 to " + to_text(cols));
    }
  }
  /// Not 0 for each token of sequence r that counts; how many do.
  index read(index r, std::int64_t* counts) const {
    if (mask.reader) {
      mask.read(r, 0, cols, counts);
      return cols - static_cast<index>(std::count(counts, counts + cols, 0));
    }
    const index n = lengths.reader ? static_cast<index>(lengths.at(0, r)) : cols;
    std::fill_n(counts, n, 1);
    std::fill_n(counts + n, cols - n, 0);
    return n;
  }
};

} // namespace perdita::inline PERDITA_ABI::core
