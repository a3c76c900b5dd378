// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"
#include "core/singular_values.hpp"

namespace perdita::inline PERDITA_ABI {

/// Maximum manifold capacity representations: the views of an item shall agree, and the items'
/// means fill all directions. Of B items with V views each, on the unit sphere:
///
///   z = x/‖x‖,  c_b = mean_v z_bv,   L = −‖C‖_* + (λ/B) Σ_b ‖Z_b‖_*
///   ∂L/∂z_bv = −(U Wᵀ)_b/V + (λ/B) (U_b W_bᵀ)_v,   ∂L/∂x = (g − ⟨g, z⟩ z)/‖x‖, g = ∂L/∂z
///
/// ‖·‖_* is the sum of the singular values, C = U S Wᵀ has the rows c_b (not normalised again), Z_b
/// = U_b S_b W_bᵀ the rows z_bv. −L <= √(B min(B, d)) for λ = 0.
/// Shapes: embeddings and gradient are (items · views) × features of T, memory apart; the rows of
/// an item follow each other. Batches of whole views that lie one after another in memory are
///   perdita::matrix_view<float> x(data, items * views, features, items * features, 1);
///   x.plane_rows = views, x.plane_stride = features;
/// Special values: a row of zeros has z = 0 and the gradient 0. Singular values below 10^-12 of the
/// largest of their matrix have no part in the gradient: a subgradient, of what has a kink there
/// (so wherever items are alike, or views where λ is not 0). No rows or no features: 0. What is not
/// finite makes the value and the gradient NaN. ‖x‖ neither overflows nor vanishes.
/// Everything is in double, by one-sided Jacobi rotations; no bit depends on the number of threads.
/// Cost: as core/singular_values.hpp says, on one thread for C.
/// Throws std::invalid_argument.
/// Source: Yerxa, Kuang, Simoncelli, Chung, "Learning efficient coding of natural images with
/// maximum manifold capacity representations", NeurIPS 2023.
///
///   perdita::mmcr<float> loss({.views = 2});
///   float value = loss(embeddings, gradient);
template <class T = float> class mmcr {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    index views = 2;  ///< V >= 1
    double local = 0; ///< λ
  };
  static constexpr const char* name = "mmcr";

  mmcr() : mmcr(options{}) {}
  explicit(false) mmcr(const options& o) : options_(o) {
    core::require(o.views >= 1, name, "views", o.views, "at least 1");
    checks.finite("local", o.local);
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> embeddings, const embedding_options<T>& call = {}) const {
    return run({embeddings}, nullptr, call);
  }
  T operator()(matrix_view<const T> embeddings, matrix_view<T> gradient,
               const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 1> gradients{gradient};
    return run({embeddings}, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};
  static constexpr double cut = 1e-12; ///< of the largest singular value

  T run(const std::array<matrix_view<const T>, 1>& x,
        const std::array<matrix_view<T>, 1>* gradients, const embedding_options<T>& call) const {
    checks.batches(x, gradients);
    const index n = x[0].rows, d = x[0].cols, items = n / options_.views;
    core::require(n % options_.views == 0, name, "rows", n, "a multiple of views");
    if (n == 0 || d == 0)
      return 0;
    core::panelled z(n, d), slopes(gradients ? n : 0, d);
    if (!core::load_batch(x[0], z, call.run_on))
      return core::give_up(gradients, call);
    std::vector<double> norms(static_cast<std::size_t>(n));
    core::for_row_blocks(n, call.run_on, [&](index first, index last) {
      for (index r = first; r < last; ++r)
        norms[static_cast<std::size_t>(r)] = normalise(z, r);
    });
    core::panelled* const to = gradients ? &slopes : nullptr;
    double value = spread(z, items, to);
    if (options_.local != 0)
      value += agree(z, items, to, call.run_on);
    if (gradients)
      differentiate(z, norms, slopes, (*gradients)[0], call);
    return static_cast<T>(value);
  }

  /// Makes row r a unit vector, or leaves it 0; its norm.
  static double normalise(core::panelled& z, index r) {
    double top = 0, square = 0;
    for (index j = 0; j < z.cols(); ++j)
      top = std::max(top, std::fabs(z(r, j)));
    if (top == 0)
      return 0;
    int exponent = 0; // so that no square overflows or vanishes
    std::frexp(top, &exponent);
    for (index j = 0; j < z.cols(); ++j) {
      z(r, j) = std::ldexp(z(r, j), -exponent);
      square = std::fma(z(r, j), z(r, j), square);
    }
    const double norm = std::sqrt(square);
    for (index j = 0; j < z.cols(); ++j)
      z(r, j) /= norm;
    return std::ldexp(norm, exponent);
  }

  /// −‖C‖_*; sets the slopes.
  double spread(const core::panelled& z, index items, core::panelled* slopes) const {
    const double share = 1 / static_cast<double>(options_.views);
    core::singular_values centroids(items, z.cols());
    for (index r = 0; r < z.rows(); ++r)
      for (index j = 0; j < z.cols(); ++j)
        centroids(r / options_.views, j) += share * z(r, j);
    centroids.solve();
    if (slopes) {
      centroids.combine([&, least = cut * centroids.largest()](index k) {
        return centroids[k] > least ? -share : 0;
      });
      for (index r = 0; r < z.rows(); ++r)
        for (index j = 0; j < z.cols(); ++j)
          (*slopes)(r, j) = centroids(r / options_.views, j);
    }
    return -centroids.sum();
  }
  /// (λ/B) Σ_b ‖Z_b‖_*; adds to the slopes.
  double agree(const core::panelled& z, index items, core::panelled* slopes,
               const executor& run_on) const {
    const double weight = options_.local / static_cast<double>(items);
    const index views = options_.views;
    std::vector<double> norms(static_cast<std::size_t>(items));
    const auto work = [&](std::size_t item) {
      const index first = static_cast<index>(item) * views;
      core::singular_values one(views, z.cols());
      for (index v = 0; v < views; ++v)
        for (index j = 0; j < z.cols(); ++j)
          one(v, j) = z(first + v, j);
      one.solve();
      norms[item] = one.sum();
      if (!slopes)
        return;
      one.combine(
          [&, least = cut * one.largest()](index k) { return one[k] > least ? weight : 0; });
      for (index v = 0; v < views; ++v)
        for (index j = 0; j < z.cols(); ++j)
          (*slopes)(first + v, j) += one(v, j);
    };
    run_on(static_cast<std::size_t>(items), work);
    core::exact_sum total;
    for (const double s : norms)
      total.add(s);
    return weight * total.value();
  }

  static void differentiate(const core::panelled& z, const std::vector<double>& norms,
                            const core::panelled& slopes, const matrix_view<T>& to,
                            const embedding_options<T>& call) {
    std::vector<double> along(norms.size());
    core::for_row_blocks(z.rows(), call.run_on, [&](index first, index last) {
      for (index r = first; r < last; ++r)
        for (index j = 0; j < z.cols(); ++j) {
          double& sum = along[static_cast<std::size_t>(r)];
          sum = std::fma(slopes(r, j), z(r, j), sum);
        }
    });
    core::store_slopes(to, call, [&](index r, index j) {
      const double norm = norms[static_cast<std::size_t>(r)];
      return norm == 0
                 ? 0
                 : std::fma(-along[static_cast<std::size_t>(r)], z(r, j), slopes(r, j)) / norm;
    });
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
