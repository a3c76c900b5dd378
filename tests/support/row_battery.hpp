// SPDX-License-Identifier: MIT
#pragma once

// Every promise that all losses of one row of scores make, tested from a descriptor alone. The
// battery is compiled once for each compute type, in row_battery*.cpp.
//
// With PERDITA_TEST_REPORT set in the environment, the accuracy tests report the worst errors
// found: see accuracy.hpp.

#include "row_descriptor.hpp"

namespace perdita_tests {

/// Value, gradient and by-products against the reference: every setting, kind of row, reduction.
template <class T> void check_accuracy(const row_descriptor<T>& loss);
/// The same over numbers of rows and columns, up to 65 537 columns.
template <class T> void check_shapes(const row_descriptor<T>& loss);
/// NaN anywhere in a row: NaN in its value and whole gradient, and in nothing else.
template <class T> void check_nan(const row_descriptor<T>& loss);
/// Layout, stride, alignment, place in the batch, overwriting, wanted by-products: the same bits,
/// no byte read or written that is not an element, the floating-point environment as it was.
template <class T> void check_same_bits(const row_descriptor<T>& loss);
/// Sixteen-bit storage is rounding on the way out and nothing else.
template <class T> void check_storage(const row_descriptor<T>& loss);
/// The derivative of the value it returns, by differences.
template <class T> void check_differences(const row_descriptor<T>& loss);
/// The gradient of the reference is the derivative of the reference.
template <class T> void check_reference(const row_descriptor<T>& loss);
/// Convex, at least 0, indifferent to a shift: what the loss's traits say.
template <class T> void check_mathematics(const row_descriptor<T>& loss);
/// Ignored rows, rows without weight, empty batches, no columns.
template <class T> void check_edges(const row_descriptor<T>& loss);
/// Errors are thrown before anything is written and say what is wrong.
template <class T> void check_errors(const row_descriptor<T>& loss);
/// Number of threads and order of tasks: the same bits. Thorough for each traversal ([threads]);
/// one shape, in two crews, will do for a loss that adds none.
template <class T> void check_threads(const row_descriptor<T>& loss, bool thorough = true);

/// Everything above.
template <class T> void check_row_loss(const row_descriptor<T>& loss);

/// A row whose answer is known exactly.
struct special_row {
  const char* what;
  int setting;
  std::vector<double> scores;
  index label; ///< or -1 and soft targets
  std::vector<double> soft;
  double value;
  std::vector<double> gradient;
};
/// Each alone and between ordinary rows. `slack` in epsilons, of every number.
template <class T>
void check_special(const row_descriptor<T>& loss, const std::vector<special_row>& rows,
                   double slack);

} // namespace perdita_tests
