// SPDX-License-Identifier: MIT
#pragma once

/// Embeddings that are compared with others: what makes unit vectors of them, and their gradients
/// in the making.

#include <algorithm>
#include <cmath>
#include <limits>

#include "executor.hpp"
#include "product.hpp"
#include "row_job.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Σ_j (by x_j) (by y_j) in double, in an order of its own.
template <class T> double wide_dot(const T* x, const T* y, index n, double by = 1) {
  constexpr auto width = static_cast<index>(lanes<T>);
  constexpr int parts = wide_lanes<T>::parts;
  pack<double> sum[parts], a[parts], b[parts];
  std::fill_n(sum, parts, pack<double>(0));
  const auto load = [n](const T* from, index j) {
    return j + width <= n ? pack<T>::load(from + j) : load_first(from + j, n - j, pack<T>(0));
  };
  for (index j = 0; j < n; j += width) {
    widen(load(x, j), a);
    widen(load(y, j), b);
    for (int p = 0; p < parts; ++p)
      sum[p] += (a[p] * by) * (b[p] * by);
  }
  double total = 0;
  for (int p = 0; p < parts; ++p)
    total += sum_lanes(sum[p]);
  return total;
}

/// 1/‖x‖; 0 for what is too short for that, and NaN where x is not finite.
template <class T> double inverse_norm(const T* x, index n) {
  double most = 0;
  for (index j = 0; j < n; ++j) {
    const double size = std::fabs(static_cast<double>(x[j]));
    most = size > most || size != size ? size : most;
    if (most != most)
      return most;
  }
  if (most < static_cast<double>(std::numeric_limits<T>::min()))
    return 0;
  if (most > std::numeric_limits<double>::max())
    return std::numeric_limits<double>::quiet_NaN();
  const double unit = std::ldexp(1.0, -std::ilogb(most)); // no square overflows
  return unit / std::sqrt(wide_dot(x, x, n, unit));
}

/// Rows x, their factors, and places where gradients of what is compared add up until settle()
/// makes those of the rows of them. Functions that take a buffer want room for one row.
template <class T> struct compared_rows {
  matrix_data<T> x;
  matrix_data<T, true> d_x; ///< no data: none is wanted
  bool normalise = true, accumulate = false;

  T* factor = nullptr;  ///< 1/‖x‖, or 1
  T** places = nullptr; ///< where each row's gradient is made
  T* stage = nullptr;   ///< memory for those that are not made where they belong

  index rows() const { return x.rows; }
  index cols() const { return x.cols; }

  void lay_out(carver& memory, bool gradient) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    factor = memory.take<T>(size(rows()));
    if (!gradient)
      return;
    places = memory.take<T*>(size(rows()));
    stage = memory.take<T>(size(staged() ? rows() * cols() : 0));
  }
  void find_factor(index r, T* buffer) const {
    factor[r] =
        normalise ? static_cast<T>(inverse_norm(row_of(x, r, 0, cols(), buffer), cols())) : T(1);
  }
  /// A power of 2 that brings a row that is normalised to a length from ½ to 1.
  T reach(index r) const { return factor[r] > 0 ? std::ldexp(T(1), std::ilogb(factor[r])) : T(1); }
  /// panel_of_rows() of rows times their reach: products with them stay numbers where both sides
  /// are very long, or very short.
  void panel(const index* row, index rows, index first, index n, T* copy, T* to) const {
    using V = pack<T>;
    constexpr auto width = static_cast<index>(lanes<T>);
    panel_of_rows(x, row, rows, first, n, copy, to);
    alignas(64) T by[lanes<T>];
    for (index i = 0; i < width; ++i)
      by[i] = i < rows ? reach(row[i]) : T(1);
    const V scale = V::load(by);
    for (index j = 0; j < n; ++j)
      (V::load(to + j * width) * scale).store(to + j * width);
  }
  void clear(index r) const {
    places[r] = staged() ? stage + r * cols() : d_x.pointer(r, 0);
    std::fill_n(places[r], cols(), T(0));
  }
  /// From the gradient of what is compared, Σ of slopes times unit vectors and `pull` times the
  /// row itself, to `share` times that of the row: what is along a unit vector has none. Returns
  /// ⟨gradient, embedding⟩ of what is compared, times the share. What nothing depends on has the
  /// gradient 0, whatever it is.
  double settle(index r, double share, double pull, T* buffer) const {
    const T* from = row_of(x, r, 0, cols(), buffer);
    T* g = places[r];
    const auto by = static_cast<double>(factor[r]);
    double own = by * wide_dot(from, g, cols());
    const bool idle = own != own && pull == 0 &&
                      std::all_of(g, g + cols(), [](T slope) { return slope == T(0); });
    if (idle)
      own = 0;
    for (index j = 0; j < cols() && !idle; ++j) {
      const auto slope = static_cast<double>(g[j]), value = static_cast<double>(from[j]);
      const double rest = normalise ? by * (slope - own * by * value) : slope + pull * value;
      g[j] = static_cast<T>(share * rest);
    }
    if (staged()) {
      if (accumulate) {
        d_x.reader(d_x.at(r, 0), d_x.col_stride, cols(), buffer);
        for (index j = 0; j < cols(); ++j)
          g[j] += buffer[j];
      }
      d_x.write(r, 0, cols(), g);
    }
    return share * own;
  }
  bool staged() const { return !rows_lie(d_x) || accumulate; }
};

} // namespace perdita::inline PERDITA_ABI::core
