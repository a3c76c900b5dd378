// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

/// Alignment of pairs of embeddings a_i and b_i, which the paper takes from the unit sphere:
///
///   L = mean_i r_i^α, r_i = ‖a_i − b_i‖;   ∂L/∂a_i = (α/n) r_i^(α−1) (a_i − b_i)/r_i = −∂L/∂b_i
///
/// Shapes: both matrices and both gradients are pairs × features of T, memory apart.
/// Special values: r = 0 has the slope 0, for α <= 1 too, where there is a kink. Nothing overflows
/// unless r^α does. NaN or an infinity makes the value NaN or infinite, and of the
/// gradients its own pair NaN. No pairs, or no features: 0.
/// Sums are in double; no bit depends on the number of threads. Throws std::invalid_argument.
/// Source: Wang, Isola, "Understanding contrastive representation learning through alignment and
/// uniformity on the hypersphere", ICML 2020 (α = 2).
///
///   perdita::alignment<float> loss;
///   float value = loss(a, b, d_a, d_b);
template <class T = float> class alignment {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double exponent = 2; ///< α > 0
  };
  static constexpr const char* name = "alignment";

  alignment() : alignment(options{}) {}
  explicit(false) alignment(const options& o) : options_(o) {
    core::positive(name, "exponent", o.exponent);
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> a, matrix_view<const T> b,
               const embedding_options<T>& call = {}) const {
    return run({a, b}, nullptr, call);
  }
  /// The value, and the gradients with respect to both matrices.
  T operator()(matrix_view<const T> a, matrix_view<const T> b, matrix_view<T> a_gradient,
               matrix_view<T> b_gradient, const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 2> gradients{a_gradient, b_gradient};
    return run({a, b}, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  T run(const std::array<matrix_view<const T>, 2>& x,
        const std::array<matrix_view<T>, 2>* gradients, const embedding_options<T>& call) const {
    checks.batches(x, gradients);
    const auto n = static_cast<std::size_t>(x[0].rows);
    std::vector<double> distances(n);
    core::for_row_blocks(x[0].rows, call.run_on, [&](index first, index last) {
      for (index i = first; i < last; ++i)
        distances[static_cast<std::size_t>(i)] = distance(x, i);
    });
    if (gradients) {
      store((*gradients)[0], x, distances, call, 1);
      store((*gradients)[1], x, distances, call, -1);
    }
    core::exact_sum sum;
    for (const double r : distances)
      sum.add(std::pow(r, options_.exponent));
    return n == 0 ? T(0) : static_cast<T>(sum.value() / static_cast<double>(n));
  }

  static double apart(const std::array<matrix_view<const T>, 2>& x, index i, index j) {
    return static_cast<double>(x[0](i, j)) - static_cast<double>(x[1](i, j));
  }
  /// Scaled where squares would overflow or vanish.
  static double distance(const std::array<matrix_view<const T>, 2>& x, index i) {
    double top = 0, sum = 0;
    for (index j = 0; j < x[0].cols; ++j) {
      const double size = std::fabs(apart(x, i, j));
      top = size > top || std::isnan(size) ? size : top;
    }
    if (top == 0 || !std::isfinite(top))
      return top;
    const double scale = top > 0x1p500 ? 0x1p-600 : top < 0x1p-500 ? 0x1p600 : 1;
    for (index j = 0; j < x[0].cols; ++j) {
      const double part = apart(x, i, j) * scale;
      sum = std::fma(part, part, sum);
    }
    return std::sqrt(sum) / scale;
  }
  void store(const matrix_view<T>& to, const std::array<matrix_view<const T>, 2>& x,
             const std::vector<double>& distances, const embedding_options<T>& call,
             double sign) const {
    std::vector<double> steepness(distances.size()); // ± α r^(α − 1)/n
    for (std::size_t i = 0; i < distances.size(); ++i)
      steepness[i] = sign * options_.exponent * std::pow(distances[i], options_.exponent - 1) /
                     static_cast<double>(distances.size());
    core::store_slopes(to, call, [&](index i, index j) {
      const double r = distances[static_cast<std::size_t>(i)];
      if (!std::isfinite(r))
        return std::numeric_limits<double>::quiet_NaN();
      return r == 0 ? 0 : steepness[static_cast<std::size_t>(i)] * (apart(x, i, j) / r);
    });
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
