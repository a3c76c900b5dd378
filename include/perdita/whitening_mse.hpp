// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// A matrix of doubles, row by row.
class double_rows {
public:
  double_rows(index rows, index cols)
      : rows_(rows), cols_(cols), x_(static_cast<std::size_t>(rows * cols)) {}
  index rows() const { return rows_; }
  index cols() const { return cols_; }
  double& operator()(index r, index c) { return x_[static_cast<std::size_t>(r * cols_ + c)]; }
  double operator()(index r, index c) const { return x_[static_cast<std::size_t>(r * cols_ + c)]; }

private:
  index rows_, cols_;
  std::vector<double> x_;
};

/// A sub-batch of one view, whitened: Σ = (1 − ε) x̂ᵀx̂/(n − 1) + ε I = L Lᵀ, z = L⁻¹ x̂ of each row,
/// u = z/‖z‖.
class whitened_rows {
public:
  template <class T>
  whitened_rows(const matrix_view<const T>& x, index first, index rows, double epsilon)
      : centred_(rows, x.cols), unit_(rows, x.cols), factor_(x.cols, x.cols),
        norms_(static_cast<std::size_t>(rows)),
        share_((1 - epsilon) / static_cast<double>(rows - 1)), epsilon_(epsilon) {
    for (index j = 0; j < x.cols; ++j) {
      const double base = static_cast<double>(x(first, j));
      double sum = 0;
      for (index r = 0; r < rows; ++r)
        sum += static_cast<double>(x(first + r, j)) - base;
      for (index r = 0; r < rows; ++r)
        centred_(r, j) =
            (static_cast<double>(x(first + r, j)) - base) - sum / static_cast<double>(rows);
    }
  }
  double unit(index r, index j) const { return unit_(r, j); }
  bool at_mean(index r) const { return norms_[static_cast<std::size_t>(r)] == 0; }

  /// False where Σ has no inverse, or something is not finite.
  bool whiten() {
    if (!factorise())
      return false;
    for (index r = 0; r < centred_.rows(); ++r) {
      double square = 0;
      for (index i = 0; i < centred_.cols(); ++i) {
        double z = centred_(r, i);
        for (index k = 0; k < i; ++k)
          z -= factor_(i, k) * unit_(r, k);
        unit_(r, i) = z / factor_(i, i);
        square += unit_(r, i) * unit_(r, i);
      }
      const double norm = std::sqrt(square);
      norms_[static_cast<std::size_t>(r)] = norm;
      for (index i = 0; norm > 0 && i < centred_.cols(); ++i)
        unit_(r, i) /= norm;
    }
    return true;
  }

  /// From slopes with respect to u to those of the rows themselves.
  void differentiate(double_rows& slopes) const {
    const index n = slopes.rows(), d = slopes.cols();
    through_norms(slopes);
    solve_transposed(slopes);
    // ∂/∂L = −tril(slopesᵀ z)
    double_rows of_factor(d, d);
    for (index r = 0; r < n; ++r)
      for (index i = 0; i < d; ++i)
        for (index k = 0; k <= i; ++k)
          of_factor(i, k) -= slopes(r, i) * unit_(r, k) * norms_[static_cast<std::size_t>(r)];
    const double_rows of_covariance = through_factor(of_factor);
    for (index r = 0; r < n; ++r)
      for (index i = 0; i < d; ++i)
        for (index k = 0; k < d; ++k)
          slopes(r, k) += share_ * centred_(r, i) * (of_covariance(i, k) + of_covariance(k, i));
    for (index j = 0; j < d; ++j) {
      double sum = 0;
      for (index r = 0; r < n; ++r)
        sum += slopes(r, j);
      for (index r = 0; r < n; ++r)
        slopes(r, j) -= sum / static_cast<double>(n);
    }
  }

private:
  /// Cholesky.
  bool factorise() {
    const index n = centred_.rows(), d = centred_.cols();
    for (index r = 0; r < n; ++r)
      for (index i = 0; i < d; ++i)
        for (index k = 0; k <= i; ++k)
          factor_(i, k) += share_ * centred_(r, i) * centred_(r, k);
    for (index i = 0; i < d; ++i) {
      factor_(i, i) += epsilon_;
      // Of a pivot that was this much larger nothing but rounding is left.
      const double least = 0x1p-50 * static_cast<double>(d) * factor_(i, i);
      for (index k = 0; k <= i; ++k) {
        double sum = factor_(i, k);
        for (index l = 0; l < k; ++l)
          sum -= factor_(i, l) * factor_(k, l);
        if (k == i && !(sum > least && std::isfinite(sum)))
          return false;
        factor_(i, k) = k == i ? std::sqrt(sum) : sum / factor_(k, k);
      }
    }
    return true;
  }
  void through_norms(double_rows& slopes) const {
    for (index r = 0; r < slopes.rows(); ++r) {
      const double norm = norms_[static_cast<std::size_t>(r)];
      double along = 0;
      for (index j = 0; j < slopes.cols(); ++j)
        along += slopes(r, j) * unit_(r, j);
      for (index j = 0; j < slopes.cols(); ++j)
        slopes(r, j) = norm > 0 ? (slopes(r, j) - along * unit_(r, j)) / norm : 0;
    }
  }
  /// Each row g becomes L⁻ᵀ g.
  void solve_transposed(double_rows& rows) const {
    for (index r = 0; r < rows.rows(); ++r)
      for (index i = rows.cols() - 1; i >= 0; --i) {
        rows(r, i) /= factor_(i, i);
        for (index k = 0; k < i; ++k)
          rows(r, k) -= factor_(i, k) * rows(r, i);
      }
  }
  /// From slopes of L to those of Σ, up to symmetry: L⁻ᵀ Φ L⁻¹, Φ the lower triangle of Lᵀ ∂/∂L
  /// with half its diagonal.
  double_rows through_factor(const double_rows& of_factor) const {
    const index d = of_factor.cols();
    double_rows phi(d, d), turned(d, d);
    for (index i = 0; i < d; ++i)
      for (index k = 0; k <= i; ++k) {
        for (index l = i; l < d; ++l)
          phi(i, k) += factor_(l, i) * of_factor(l, k);
        phi(i, k) *= k == i ? 0.5 : 1;
      }
    solve_transposed(phi); // each row: Φ L⁻¹
    for (index i = 0; i < d; ++i)
      for (index k = 0; k < d; ++k)
        turned(k, i) = phi(i, k);
    solve_transposed(turned); // each row: (L⁻ᵀ Φ L⁻¹)ᵀ
    return turned;
  }

  double_rows centred_, unit_, factor_;
  std::vector<double> norms_;
  double share_, epsilon_;
};

} // namespace core

/// W-MSE: two views x and y of a batch of n, whitened apart, shall have the same directions:
///
///   x̂ = x − column means, Σ = (1 − ε) x̂ᵀx̂/(m − 1) + ε I = L Lᵀ, u = L⁻¹ x̂/‖L⁻¹ x̂‖ of each row of
///   a sub-batch of m; and so v of y;   ℓ = 2 − 2 mean_i ⟨u_i, v_i⟩
///   g_i = −(2/n) (v_i − ⟨u_i, v_i⟩ u_i)/‖z_i‖, z = L⁻¹ x̂, h = L⁻ᵀ g,
///   ∂ℓ/∂x̂ = h + (1 − ε)/(m − 1) x̂ (S + Sᵀ), S = L⁻ᵀ Φ L⁻¹, Φ = tril(−Lᵀ tril(hᵀz)), half its
///   diagonal;   ∂ℓ/∂x = ∂ℓ/∂x̂ less its column means
///
/// Sub-batches are rows that follow each other. Several random ones, as the authors draw them:
/// calls with the rows in other orders, and `accumulate`. Shapes: both views and both gradients are
/// rows × features of T, memory apart; n a multiple of m. Special values: a row in the middle of
/// its sub-batch has u = 0 and no slope of its own. m <= d needs ε > 0, else throws. A Σ that is
/// singular all the same (constant or repeated features), and what is not finite, makes the value
/// and both gradients NaN. No rows or no features: 0. Sums are in double; no bit depends on the
/// number of threads: each sub-batch is one task. Accuracy falls with the condition of Σ. Throws
/// std::invalid_argument. Source: Ermolov, Siarohin, Sangineto, Sebe, "Whitening for
/// self-supervised representation learning", ICML 2021.
///
///   perdita::whitening_mse<float> loss({.sub_batch = 128});
///   float value = loss(x, y, d_x, d_y);
template <class T = float> class whitening_mse {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    index sub_batch = 128; ///< m; 0: all rows
    double epsilon = 0;    ///< ε in [0, 1]: the identity's part in Σ
  };
  static constexpr const char* name = "whitening_mse";

  whitening_mse() : whitening_mse(options{}) {}
  explicit(false) whitening_mse(const options& o) : options_(o) {
    core::require(o.sub_batch == 0 || o.sub_batch >= 2, name, "sub_batch", o.sub_batch,
                  "0 or at least 2");
    core::require(o.epsilon >= 0 && o.epsilon <= 1, name, "epsilon", o.epsilon,
                  "a number in [0, 1]");
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> x, matrix_view<const T> y,
               const embedding_options<T>& call = {}) const {
    return run({x, y}, nullptr, call);
  }
  /// The value, and the gradients with respect to both views.
  T operator()(matrix_view<const T> x, matrix_view<const T> y, matrix_view<T> x_gradient,
               matrix_view<T> y_gradient, const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 2> gradients{x_gradient, y_gradient};
    return run({x, y}, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  T run(const std::array<matrix_view<const T>, 2>& x,
        const std::array<matrix_view<T>, 2>* gradients, const embedding_options<T>& call) const {
    checks.batches(x, gradients);
    const index n = x[0].rows, d = x[0].cols;
    if (n == 0 || d == 0)
      return 0;
    const index m = options_.sub_batch == 0 ? n : options_.sub_batch;
    core::require(n % m == 0 && m >= 2, name, "rows", n, "a multiple of sub_batch, at least 2");
    core::require(m > d || options_.epsilon > 0, name, "epsilon", options_.epsilon,
                  "above 0 where a sub-batch has no more rows than features");
    // All is computed before anything is written: one singular covariance spoils the value.
    core::double_rows slopes[2]{{gradients ? n : 0, d}, {gradients ? n : 0, d}};
    std::vector<double> distances(static_cast<std::size_t>(n / m));
    const auto work = [&](std::size_t t) {
      distances[t] = one_sub_batch(x, static_cast<index>(t) * m, m, gradients ? slopes : nullptr);
    };
    call.run_on(distances.size(), work);
    core::exact_sum sum;
    for (const double part : distances)
      sum.add(part);
    if (!std::isfinite(sum.value()))
      return core::give_up(gradients, call);
    for (std::size_t v = 0; gradients && v < 2; ++v)
      core::store_slopes((*gradients)[v], call, [&](index r, index j) { return slopes[v](r, j); });
    return static_cast<T>(sum.value() / static_cast<double>(n));
  }

  /// Σ of 2 − 2 ⟨u, v⟩ over m rows from `first` on; sets their slopes.
  double one_sub_batch(const std::array<matrix_view<const T>, 2>& x, index first, index m,
                       core::double_rows* slopes) const {
    core::whitened_rows view[2]{{x[0], first, m, options_.epsilon},
                                {x[1], first, m, options_.epsilon}};
    if (!view[0].whiten() || !view[1].whiten())
      return std::numeric_limits<double>::quiet_NaN();
    const index d = x[0].cols;
    double sum = 0;
    for (index r = 0; r < m; ++r)
      sum += distance(view[0], view[1], r, d);
    for (index v = 0; slopes && v < 2; ++v) {
      core::double_rows mine(m, d);
      for (index r = 0; r < m; ++r)
        for (index j = 0; j < d; ++j)
          mine(r, j) = -2 / static_cast<double>(x[0].rows) * view[1 - v].unit(r, j);
      view[v].differentiate(mine);
      for (index r = 0; r < m; ++r)
        for (index j = 0; j < d; ++j)
          slopes[v](first + r, j) = mine(r, j);
    }
    return sum;
  }

  /// 2 − 2 ⟨u, v⟩, which is ‖u − v‖² of unit vectors.
  static double distance(const core::whitened_rows& u, const core::whitened_rows& v, index r,
                         index cols) {
    double square = 0;
    for (index j = 0; j < cols; ++j)
      square += (u.unit(r, j) - v.unit(r, j)) * (u.unit(r, j) - v.unit(r, j));
    return u.at_mean(r) || v.at_mean(r) ? 2 : square;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
