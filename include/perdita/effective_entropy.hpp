// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

/// What takes a feature into (0, 1).
enum class squash {
  sigmoid,   ///< u = 1/(1 + e^−x): for embeddings of a hypercube
  normal_cdf ///< u = Φ(x), of the standard normal distribution: for those of a hypersphere
};

namespace core {

inline double logistic_of(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}
/// P(X < x) of a standard normal X, with the digits of small ones.
inline double normal_tail(double x) { return 0.5 * std::erfc(x * -0x1.6a09e667f3bcdp-1); }

inline double squashed(squash by, double x) {
  return by == squash::sigmoid ? logistic_of(x) : normal_tail(x);
}
inline double squash_slope(squash by, double x) {
  constexpr double inverse_root = 0x1.9884533d43651p-2; // 1/√(2π)
  return by == squash::sigmoid ? logistic_of(x) * logistic_of(-x)
                               : inverse_root * std::exp(-0.5 * x * x);
}
/// u(b) − u(a) for b >= a, with the digits of what is near 1.
inline double squashed_gap(squash by, double a, double b) {
  if (by == squash::sigmoid)
    return logistic_of(b) * logistic_of(-a) * -std::expm1(a - b);
  return a > 0 ? normal_tail(-a) - normal_tail(-b) : normal_tail(b) - normal_tail(a);
}

} // namespace core

/// E2MC, effective entropy maximisation: features shall be spread evenly, and apart from each
/// other. Of one batch x of n, or of two views:
///
///   L = c Σ_views o(u) − e mean_views H(u),   u = σ(x) or Φ(x), element by element
///   H(u) = (1/d) Σ_j (1/(n − m)) Σ_{i≤n−m} log((n + 1)/m D_ij + ε), D_ij = u_(i+m)j − u_(i)j,
///   u_(i)j the i-th smallest of column j, m = round √n: the m-spacing estimate of the entropy
///   o(u) = (1/d) Σ_{i≠j} Cov_ij², Cov of u over n − 1, d features
///   ∂H/∂u: k/((kD + ε) (n − m) d) to the upper end of each spacing, minus that to the lower,
///   k = (n + 1)/m;   ∂o/∂u = (4/(d (n − 1))) (u − column means) (Cov without its diagonal)
///
/// The authors add it, for a few epochs, to the loss that an embedding was trained with.
/// Shapes: batches and gradients rows × features of T, memory apart; Cov, features by features in
/// double, is held, and a batch, its u and slopes in double.
/// Special values: among equals the earlier row counts as the smaller (any order gives the same
/// value). A constant feature has the entropy log ε. One row has no spacing: throws. No rows or no
/// features: 0. What is not finite makes the value and all gradients NaN.
/// Sums are in double; gaps keep their digits near u = 1; with Φ those below 10^-8 lose them to
/// rounding. No bit depends on the number of threads. Throws std::invalid_argument.
/// Source: Chakraborty, LeCun, Rudner, Learned-Miller, "Improving pre-trained self-supervised
/// embeddings through effective entropy maximization", 2024; spacings: Vasicek 1976.
///
///   perdita::effective_entropy<float> loss({.entropy = 1, .covariance = 25,
///                                           .by = perdita::squash::normal_cdf});
///   float value = loss(x, y, d_x, d_y);
template <class T = float> class effective_entropy {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double entropy = 10;         ///< e
    double covariance = 1;       ///< c
    squash by = squash::sigmoid; ///< what takes x into (0, 1)
    double epsilon = 1e-7;       ///< ε > 0, in the logarithm
  };
  static constexpr const char* name = "effective_entropy";

  effective_entropy() : effective_entropy(options{}) {}
  explicit(false) effective_entropy(const options& o) : options_(o) {
    checks.finite("entropy", o.entropy);
    checks.finite("covariance", o.covariance);
    core::positive(name, "epsilon", o.epsilon);
    core::require_enumerator(name, "by", o.by, squash::normal_cdf, "sigmoid or normal_cdf");
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> x, const embedding_options<T>& call = {}) const {
    return run<1>({x}, nullptr, call);
  }
  T operator()(matrix_view<const T> x, matrix_view<T> gradient,
               const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 1> gradients{gradient};
    return run<1>({x}, &gradients, call);
  }
  /// Of two views, and the gradients with respect to both.
  T operator()(matrix_view<const T> x, matrix_view<const T> y, matrix_view<T> x_gradient,
               matrix_view<T> y_gradient, const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 2> gradients{x_gradient, y_gradient};
    return run<2>({x, y}, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  template <std::size_t N>
  T run(const std::array<matrix_view<const T>, N>& views,
        const std::array<matrix_view<T>, N>* gradients, const embedding_options<T>& call) const {
    checks.batches(views, gradients);
    const index n = views[0].rows, d = views[0].cols;
    core::require(n != 1, name, "rows", n, "at least 2: one row has no spacing");
    if (n == 0 || d == 0)
      return 0;
    std::vector<core::panelled> x;
    for (const auto& view : views) {
      x.emplace_back(n, d);
      if (!core::load_batch(view, x.back(), call.run_on))
        return core::give_up(gradients, call);
    }
    core::exact_sum value;
    for (std::size_t v = 0; v < N; ++v) {
      core::panelled slopes(gradients ? n : 0, d);
      value.add(of_view(x[v], options_.entropy / static_cast<double>(N),
                        gradients ? &slopes : nullptr, call.run_on));
      if (gradients)
        core::store_slopes((*gradients)[v], call, [&](index r, index j) {
          return slopes(r, j) * core::squash_slope(options_.by, x[v](r, j));
        });
    }
    return static_cast<T>(value.value());
  }

  /// c o − e H of one view; sets the slopes with respect to u.
  double of_view(const core::panelled& x, double weight, core::panelled* slopes,
                 const executor& run_on) const {
    core::panelled u(x.rows(), x.cols());
    std::vector<double> entropies(static_cast<std::size_t>(x.cols()));
    core::for_panels(x, run_on, [&](index p) {
      std::vector<double> column(static_cast<std::size_t>(x.rows()));
      const index first = p * core::panelled::width;
      for (index j = first; j < std::min(x.cols(), first + core::panelled::width); ++j) {
        for (index r = 0; r < x.rows(); ++r) {
          column[static_cast<std::size_t>(r)] = x(r, j);
          u(r, j) = core::squashed(options_.by, x(r, j));
        }
        entropies[static_cast<std::size_t>(j)] =
            column_entropy(column, j, weight / static_cast<double>(x.cols()), slopes);
      }
      core::centre_panel(u, p);
    });
    core::exact_sum entropy;
    for (const double h : entropies)
      entropy.add(h);
    return options_.covariance * core::covariance_penalty(u, options_.covariance, slopes, run_on) -
           weight / static_cast<double>(x.cols()) * entropy.value();
  }

  /// H of one column; its slopes times −weight are set.
  double column_entropy(const std::vector<double>& x, index col, double weight,
                        core::panelled* slopes) const {
    const std::size_t n = x.size();
    const auto m = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(n))));
    const double stretch = static_cast<double>(n + 1) / static_cast<double>(m);
    const double count = static_cast<double>(n - m);
    std::vector<index> order(n);
    std::iota(order.begin(), order.end(), index{0});
    const auto at = [&](index r) { return x[static_cast<std::size_t>(r)]; };
    std::sort(order.begin(), order.end(),
              [&](index r, index s) { return at(r) < at(s) || (at(r) == at(s) && r < s); });
    core::exact_sum sum;
    for (std::size_t i = 0; i + m < n; ++i) {
      const index low = order[i], high = order[i + m];
      const double gap = core::squashed_gap(options_.by, at(low), at(high));
      const double inside = std::fma(stretch, gap, options_.epsilon);
      sum.add(std::log(inside));
      if (slopes) {
        const double slope = weight * stretch / (inside * count);
        (*slopes)(high, col) -= slope;
        (*slopes)(low, col) += slope;
      }
    }
    return sum.value() / count;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
