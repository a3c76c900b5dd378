// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Columns of mean 0 and variance v/(v + ε), v being the variance (over n) that they had.
struct standardised_batch {
  panelled values;
  std::vector<double> steepness; ///< 1/√(v + ε); NaN where v overflows
  std::vector<double> shortfall; ///< ε/(v + ε): what the variance lacks to 1

  standardised_batch(index rows, index cols)
      : values(rows, cols), steepness(padded(values)), shortfall(padded(values)) {}

  void standardise(double epsilon, const executor& run_on) {
    for_panels(values, run_on, [&](index p) {
      centre_panel(values, p);
      const W square =
          dot_panel(values, values, p) / W(static_cast<double>(values.rows())) + W(epsilon);
      const W unknown(std::numeric_limits<double>::quiet_NaN());
      const W steep =
          select(square < W(std::numeric_limits<double>::infinity()), W(1) / sqrt(square), unknown);
      steep.store(steepness.data() + p * panelled::width);
      (W(epsilon) / square).store(shortfall.data() + p * panelled::width);
      for (index r = 0; r < values.rows(); ++r)
        (values.pack_at(r, p) * steep).store(values.at(r, p));
    });
  }
  /// From slopes of the standardised columns to those of the columns themselves.
  void differentiate(panelled& slopes, const executor& run_on) const {
    const W n(static_cast<double>(values.rows()));
    for_panels(values, run_on, [&](index p) {
      const W steep = W::load(steepness.data() + p * panelled::width);
      const W along = dot_panel(slopes, values, p) / n;
      centre_panel(slopes, p);
      for (index r = 0; r < values.rows(); ++r)
        (fnma(values.pack_at(r, p), along, slopes.pack_at(r, p)) * steep).store(slopes.at(r, p));
    });
  }

private:
  using W = panelled::W;
  static std::size_t padded(const panelled& x) {
    return static_cast<std::size_t>(x.count() * panelled::width);
  }
};

/// The gradient of one view: the other times `weights`, back through the standardisation.
template <class T>
void differentiate_view(const standardised_batch& own, const standardised_batch& other,
                        const panelled& weights, const matrix_view<T>& to,
                        const embedding_options<T>& call) {
  panelled slopes(own.values.rows(), own.values.cols());
  add_product(other.values, weights, slopes, call.run_on);
  own.differentiate(slopes, call.run_on);
  store_slopes(to, call, [&](index r, index j) { return slopes(r, j); });
}

} // namespace core

/// Barlow Twins: two views a and b of a batch of n, whose features shall correlate across the views
/// with themselves and with no other:
///
///   â = (a − mean)/√(var + ε), column by column, and so b̂; var over n;  C = âᵀb̂/n
///   L = Σ_l (1 − C_ll)² + λ Σ_{l≠m} C_lm²
///   ∂L/∂â = b̂ Hᵀ/n, ∂L/∂b̂ = â H/n, H_ll = −2 (1 − C_ll), H_lm = 2 λ C_lm
///   ∂L/∂a = (g − mean g − â mean(g â))/√(var + ε), column by column, g = ∂L/∂â; and so b
///
/// Shapes: both views and both gradients are rows × features of T, memory apart; C, features by
/// features in double, is held (twice), and both batches in double (twice, for gradients).
/// Special values: a constant feature is 0 once standardised: it adds 1, and its gradient is
/// (g − mean g)/√ε. One row: every feature is constant, L is the number of features, the gradients
/// are 0. No rows or no features: 0. What is not finite, or too large for its variance to be so,
/// makes the value and both gradients NaN: features mix.
/// Accuracy: 1 − C_ll is ½ (mean (â − b̂)² + ε/(var a + ε) + ε/(var b + ε)), all of whose digits
/// stay where the views agree. Sums are in double; no bit depends on the number of threads.
/// Throws std::invalid_argument.
/// Source: Zbontar, Jing, Misra, LeCun, Deny, ICML 2021; ε as in its code's batch normalisation.
///
///   perdita::barlow_twins<float> loss({.off_diagonal = 0.0051});
///   float value = loss(a, b, d_a, d_b);
template <class T = float> class barlow_twins {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double off_diagonal = 0.0051; ///< λ
    double epsilon = 1e-5;        ///< ε > 0, added to the variances
  };
  static constexpr const char* name = "barlow_twins";

  barlow_twins() : barlow_twins(options{}) {}
  explicit(false) barlow_twins(const options& o) : options_(o) {
    checks.finite("off_diagonal", o.off_diagonal);
    core::positive(name, "epsilon", o.epsilon);
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> a, matrix_view<const T> b,
               const embedding_options<T>& call = {}) const {
    return run({a, b}, nullptr, call);
  }
  /// The value, and the gradients with respect to both views.
  T operator()(matrix_view<const T> a, matrix_view<const T> b, matrix_view<T> a_gradient,
               matrix_view<T> b_gradient, const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 2> gradients{a_gradient, b_gradient};
    return run({a, b}, &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};
  using W = core::panelled::W;

  T run(const std::array<matrix_view<const T>, 2>& x,
        const std::array<matrix_view<T>, 2>* gradients, const embedding_options<T>& call) const {
    checks.batches(x, gradients);
    const index n = x[0].rows, d = x[0].cols;
    if (n == 0 || d == 0)
      return 0;
    core::standardised_batch a(n, d), b(n, d);
    if (!core::load_batch(x[0], a.values, call.run_on) ||
        !core::load_batch(x[1], b.values, call.run_on))
      return core::give_up(gradients, call);
    a.standardise(options_.epsilon, call.run_on);
    b.standardise(options_.epsilon, call.run_on);

    const double count = static_cast<double>(n);
    core::panelled h = core::cross_product(a.values, b.values, call.run_on);
    const double others =
        core::scale_off_diagonal(h, 2 * options_.off_diagonal / (count * count), call.run_on);
    core::exact_sum value;
    value.add(options_.off_diagonal * (others / (count * count)));
    const std::vector<double> missing = missing_correlation(a, b, call.run_on);
    for (index j = 0; j < d; ++j) {
      const double miss = missing[static_cast<std::size_t>(j)];
      value.add(miss * miss);
      h(j, j) = -2 * miss / count;
    }
    if (!std::isfinite(value.value()))
      return core::give_up(gradients, call);
    if (gradients) {
      core::differentiate_view(a, b, core::transpose(h, call.run_on), (*gradients)[0], call);
      core::differentiate_view(b, a, h, (*gradients)[1], call);
    }
    return static_cast<T>(value.value());
  }

  /// 1 − C_ll
  static std::vector<double> missing_correlation(const core::standardised_batch& a,
                                                 const core::standardised_batch& b,
                                                 const executor& run_on) {
    std::vector<double> missing(a.shortfall.size());
    core::for_panels(a.values, run_on, [&](index p) {
      W sum(0);
      for (index r = 0; r < a.values.rows(); ++r) {
        const W apart = a.values.pack_at(r, p) - b.values.pack_at(r, p);
        sum = fma(apart, apart, sum);
      }
      const index at = p * core::panelled::width;
      const W lacking = W::load(a.shortfall.data() + at) + W::load(b.shortfall.data() + at);
      const W mean = sum / W(static_cast<double>(a.values.rows()));
      ((mean + lacking) * 0.5).store(missing.data() + at);
    });
    return missing;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
