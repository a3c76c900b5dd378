// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.hpp"
#include "views.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Singular values of a matrix M in double, and functions of them, by rotating its rows (or its
/// columns, if they are fewer) until they are orthogonal: one-sided Jacobi (Hestenes 1958), whose
/// bits depend on nothing but M (not on threads, as those of Eigen's decompositions do, where its
/// products have threads).
///
///   R M = diag(σ) W, R and the rows of W orthonormal;  M = Σ_k σ_k r_kᵀ w_k
///
/// Squares of elements, and their sum, must not overflow. Cost: some 6 to 12 sweeps of s² (s + 2 l)
/// multiply-adds and more, s the shorter and l the longer side.
class singular_values {
public:
  singular_values(index rows, index cols)
      : by_columns_(cols < rows), count_(std::min(rows, cols)), length_(std::max(rows, cols)),
        stride_(padded(length_)), turn_stride_(padded(count_)),
        vectors_(static_cast<std::size_t>(count_ * stride_)),
        turns_(static_cast<std::size_t>(count_ * turn_stride_)),
        sigma_(static_cast<std::size_t>(count_)) {}

  index count() const { return count_; }
  /// An element of M before solve(), of what combine() made after that.
  double& operator()(index row, index col) {
    return by_columns_ ? vector(col)[row] : vector(row)[col];
  }
  double operator[](index k) const { return sigma_[static_cast<std::size_t>(k)]; }

  /// Finds the singular values, in no order.
  void solve() {
    for (index i = 0; i < count_; ++i)
      turn(i)[i] = 1;
    double total = 0;
    for (index i = 0; i < count_; ++i)
      total += products(vector(i), vector(i)).aa;
    for (int sweep = 0; sweep < most_sweeps && rotate_all(total * negligible); ++sweep) {
    }
    for (index i = 0; i < count_; ++i)
      sigma_[static_cast<std::size_t>(i)] = std::sqrt(products(vector(i), vector(i)).aa);
  }
  double largest() const {
    return count_ == 0 ? 0 : *std::max_element(sigma_.begin(), sigma_.end());
  }
  double sum() const {
    double total = 0;
    for (const double s : sigma_)
      total += s;
    return total;
  }

  /// Replaces M by Σ_k f(k) r_kᵀ w_k, after solve(), where f(k) is 0 wherever σ_k is.
  template <class F> void combine(F f) {
    std::vector<double> result(vectors_.size());
    for (index k = 0; k < count_; ++k) {
      const double factor = f(k);
      if (factor == 0)
        continue;
      for (index i = 0; i < count_; ++i)
        add(vector(k), turn(k)[i] * (factor / (*this)[k]), result.data() + i * stride_);
    }
    vectors_.swap(result);
  }

private:
  using W = pack<double>;
  static constexpr auto width = static_cast<index>(lanes<double>);
  static constexpr double orthogonal = 0x1p-51;  ///< a cosine below this counts as 0
  static constexpr double negligible = 0x1p-120; ///< of the sum of all squares
  static constexpr int most_sweeps = 40;         ///< it takes about 10

  struct sums {
    double aa, ab, bb;
  };
  static index padded(index n) { return (n + width - 1) / width * width; }
  double* vector(index i) { return vectors_.data() + i * stride_; }
  double* turn(index i) { return turns_.data() + i * turn_stride_; }

  sums products(const double* a, const double* b) const {
    W aa(0), ab(0), bb(0);
    for (index i = 0; i < stride_; i += width) {
      const W x = W::load(a + i), y = W::load(b + i);
      aa = fma(x, x, aa);
      ab = fma(x, y, ab);
      bb = fma(y, y, bb);
    }
    return {sum_lanes(aa), sum_lanes(ab), sum_lanes(bb)};
  }
  void add(const double* from, double factor, double* to) const {
    for (index i = 0; i < stride_; i += width)
      fma(W(factor), W::load(from + i), W::load(to + i)).store(to + i);
  }
  static void rotate(double* a, double* b, index n, double cosine, double sine) {
    const W c(cosine), s(sine);
    for (index i = 0; i < n; i += width) {
      const W x = W::load(a + i), y = W::load(b + i);
      fnma(s, y, c * x).store(a + i);
      fma(s, x, c * y).store(b + i);
    }
  }
  /// One rotation of every pair; whether one was needed.
  bool rotate_all(double small) {
    bool turned = false;
    for (index p = 0; p + 1 < count_; ++p)
      for (index q = p + 1; q < count_; ++q) {
        const sums s = products(vector(p), vector(q));
        if (!(s.aa > small && s.bb > small) ||
            !(std::fabs(s.ab) > orthogonal * std::sqrt(s.aa) * std::sqrt(s.bb)))
          continue;
        turned = true;
        const double zeta = (s.bb - s.aa) / (2 * s.ab);
        const double tangent = std::copysign(1 / (std::fabs(zeta) + std::hypot(1, zeta)), zeta);
        const double cosine = 1 / std::hypot(1, tangent);
        rotate(vector(p), vector(q), stride_, cosine, cosine * tangent);
        rotate(turn(p), turn(q), turn_stride_, cosine, cosine * tangent);
      }
    return turned;
  }

  bool by_columns_;
  index count_, length_, stride_, turn_stride_;
  std::vector<double> vectors_, turns_, sigma_;
};

} // namespace perdita::inline PERDITA_ABI::core
