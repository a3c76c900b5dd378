// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

/// VICReg: two views x and y of a batch of n shall agree (invariance), spread in every feature
/// (variance) and have features without correlation (covariance):
///
///   L = a mean (x_ij − y_ij)² + (b/2) (v(x) + v(y)) + c (o(x) + o(y))
///   v(x) = (1/d) Σ_j max(0, γ − s_j), s_j = √(var_j + ε)
///   o(x) = (1/d) Σ_{i≠j} Cov_ij²;      var and Cov over n − 1, d features, the mean over n d
///   ∂v/∂x_ij = −[s_j < γ] x̂_ij/((n − 1) d s_j),  x̂ = x − column means
///   ∂o/∂x = (4/(d (n − 1))) x̂ (Cov without its diagonal)
///
/// as the authors' code has it; the paper has no ½ at v, and sums where the mean over d is.
/// Shapes: both views and both gradients are rows × features of T, memory apart; Cov, features by
/// features in double, is held, and both batches and gradients in double.
/// Special values: a constant feature has s = √ε: it adds γ − √ε to its v, and its gradients of v
/// and o are 0 exactly. s_j = γ: slope 0. One row has no variance: throws. No rows or no features:
/// 0. What is not finite, or squares to what is not, makes the value and both gradients NaN.
/// Sums are in double; no bit depends on the number of threads. Throws std::invalid_argument.
/// Source: Bardes, Ponce, LeCun, ICLR 2022.
///
///   perdita::vicreg<float> loss;
///   float value = loss(x, y, d_x, d_y);
template <class T = float> class vicreg {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double invariance = 25; ///< a
    double variance = 25;   ///< b
    double covariance = 1;  ///< c
    double deviation = 1;   ///< γ: the standard deviation that suffices
    double epsilon = 1e-4;  ///< ε > 0, added to the variances
  };
  static constexpr const char* name = "vicreg";

  vicreg() : vicreg(options{}) {}
  explicit(false) vicreg(const options& o) : options_(o) {
    checks.finite("invariance", o.invariance);
    checks.finite("variance", o.variance);
    checks.finite("covariance", o.covariance);
    checks.finite("deviation", o.deviation);
    core::positive(name, "epsilon", o.epsilon);
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
  using W = core::panelled::W;

  T run(const std::array<matrix_view<const T>, 2>& views,
        const std::array<matrix_view<T>, 2>* gradients, const embedding_options<T>& call) const {
    checks.batches(views, gradients);
    const index n = views[0].rows, d = views[0].cols;
    core::require(n != 1, name, "rows", n, "at least 2: one row has no variance");
    if (n == 0 || d == 0)
      return 0;
    core::panelled x(n, d), y(n, d);
    if (!core::load_batch(views[0], x, call.run_on) || !core::load_batch(views[1], y, call.run_on))
      return core::give_up(gradients, call);

    // Slopes are first those of x's share in the invariance; y's are their negatives.
    core::panelled slopes(gradients ? n : 0, d), y_slopes(gradients ? n : 0, d);
    core::panelled* const of_x = gradients ? &slopes : nullptr;
    core::panelled* const of_y = gradients ? &y_slopes : nullptr;
    const double invariance =
        compare(x, y, of_x, of_y, call.run_on); // before the others centre them
    const double of_both = invariance + spread(x, of_x, call.run_on),
                 value = of_both + spread(y, of_y, call.run_on);
    if (!std::isfinite(value))
      return core::give_up(gradients, call);
    if (gradients) {
      core::store_slopes((*gradients)[0], call, [&](index r, index j) { return slopes(r, j); });
      core::store_slopes((*gradients)[1], call, [&](index r, index j) { return y_slopes(r, j); });
    }
    return static_cast<T>(value);
  }

  /// The invariance; sets the slopes.
  double compare(const core::panelled& x, const core::panelled& y, core::panelled* of_x,
                 core::panelled* of_y, const executor& run_on) const {
    const double share =
        options_.invariance / (static_cast<double>(x.rows()) * static_cast<double>(x.cols()));
    std::vector<double> sums(static_cast<std::size_t>(x.count()));
    core::for_panels(x, run_on, [&](index p) {
      W sum(0);
      for (index r = 0; r < x.rows(); ++r) {
        const W apart = x.pack_at(r, p) - y.pack_at(r, p);
        sum = fma(apart, apart, sum);
        if (of_x) {
          (apart * (2 * share)).store(of_x->at(r, p));
          (apart * (-2 * share)).store(of_y->at(r, p));
        }
      }
      sums[static_cast<std::size_t>(p)] = sum_lanes(sum);
    });
    core::exact_sum total;
    for (const double s : sums)
      total.add(s);
    return share * total.value();
  }

  /// Centres a view; its variance and covariance terms, whose slopes are added.
  double spread(core::panelled& x, core::panelled* slopes, const executor& run_on) const {
    const double degrees = static_cast<double>(x.rows() - 1), d = static_cast<double>(x.cols());
    const double weight = options_.variance / 2 / d;
    std::vector<double> deviations(static_cast<std::size_t>(x.count() * core::panelled::width));
    core::for_panels(x, run_on, [&](index p) {
      core::centre_panel(x, p);
      const W deviation = sqrt(core::dot_panel(x, x, p) / W(degrees) + W(options_.epsilon));
      deviation.store(deviations.data() + p * core::panelled::width);
      if (!slopes)
        return;
      const W narrow =
          select(deviation < W(options_.deviation), W(-weight / degrees) / deviation, W(0));
      for (index r = 0; r < x.rows(); ++r)
        fma(narrow, x.pack_at(r, p), slopes->pack_at(r, p)).store(slopes->at(r, p));
    });
    core::exact_sum lacking;
    for (index j = 0; j < x.cols(); ++j) {
      const double lack = options_.deviation - deviations[static_cast<std::size_t>(j)];
      lacking.add(lack <= 0 ? 0 : lack);
    }
    return weight * lacking.value() +
           options_.covariance * core::covariance_penalty(x, options_.covariance, slopes, run_on);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
