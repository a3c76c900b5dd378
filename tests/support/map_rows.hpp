// SPDX-License-Identifier: MIT
#pragma once

// Rows for tests of maps that are not losses, as Eigen's matrices.

#include <Eigen/Core>

#include <cstdint>
#include <vector>

#include "numbers.hpp"

namespace perdita_tests {

template <class T>
using row_major = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T> using column_major = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;

/// A row of every kind.
template <class T> row_major<T> make_rows(index cols) {
  random_numbers random(static_cast<std::uint64_t>(cols));
  row_major<T> x(static_cast<index>(row_kind::count), cols);
  for (index r = 0; r < x.rows(); ++r) {
    const auto label = static_cast<index>(random.below(static_cast<std::uint64_t>(cols)));
    const auto scores = make_scores(static_cast<row_kind>(r), cols, label, random);
    for (index c = 0; c < cols; ++c)
      x(r, c) = static_cast<T>(scores[static_cast<std::size_t>(c)]);
  }
  return x;
}

template <class M> std::vector<wide> row_of(const M& x, index r) {
  std::vector<wide> z;
  for (index c = 0; c < x.cols(); ++c)
    z.push_back(x(r, c));
  return z;
}

/// NaN is NaN.
template <class A, class B> bool same_bits(const A& a, const B& b) {
  bool same = a.rows() == b.rows() && a.cols() == b.cols();
  for (index r = 0; same && r < a.rows(); ++r)
    for (index c = 0; c < a.cols(); ++c)
      same = same && (a(r, c) == b(r, c) || (a(r, c) != a(r, c) && b(r, c) != b(r, c)));
  return same;
}

} // namespace perdita_tests
