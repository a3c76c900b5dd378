// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"
#include "core/singular_values.hpp"

namespace perdita::inline PERDITA_ABI {

/// RankMe: in how many directions a batch of embeddings X spreads. A metric; its gradient makes it
/// a regulariser.
///
///   p_k = σ_k/Σσ + ε,  R = exp(−Σ_k p_k log p_k),   σ the min(n, d) singular values of X = U S Wᵀ
///   ∂R/∂X = U diag(s) Wᵀ, s_k = (R/Σσ) (h_k − Σ_l h_l σ_l/Σσ), h_k = −(log p_k + 1)
///
/// About 1 to min(n, d), and the same for c X. X is not centred. ε, added after the division as in
/// the paper, lets R pass min(n, d) a little.
/// Shapes: embeddings and gradient are rows × features of T, memory apart.
/// Special values: a matrix of zeros, no rows or no features: 0 directions, gradient 0. Singular
/// values below 10^-12 of the largest have no part in the gradient: R has a kink there. What is not
/// finite makes the value and the gradient NaN.
/// Everything is in double, by one-sided Jacobi rotations; no bit depends on the number of threads.
/// Cost: as core/singular_values.hpp says, on one thread. Throws std::invalid_argument.
/// Source: Garrido, Balestriero, Najman, LeCun, ICML 2023; Roy, Vetterli 2007 (effective rank).
///
///   double directions = perdita::rank_me<float>()(embeddings);
template <class T = float> class rank_me {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double epsilon = 1e-7; ///< ε >= 0
  };
  static constexpr const char* name = "rank_me";

  rank_me() : rank_me(options{}) {}
  explicit(false) rank_me(const options& o) : options_(o) {
    core::require(o.epsilon >= 0 && std::isfinite(o.epsilon), name, "epsilon", o.epsilon,
                  "a finite number from 0 on");
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

  T run(const std::array<matrix_view<const T>, 1>& x,
        const std::array<matrix_view<T>, 1>* gradients, const embedding_options<T>& call) const {
    checks.batches(x, gradients);
    const matrix_view<const T>& from = x[0];
    double top = 0;
    for (index r = 0; r < from.rows; ++r)
      for (index j = 0; j < from.cols; ++j) {
        const double size = std::fabs(static_cast<double>(from(r, j)));
        if (!std::isfinite(size))
          return core::give_up(gradients, call);
        top = size > top ? size : top;
      }
    if (top == 0) {
      if (gradients)
        core::store_slopes((*gradients)[0], call, [](index, index) { return 0; });
      return 0;
    }
    int exponent = 0; // so that no square overflows
    std::frexp(top, &exponent);
    core::singular_values spectrum(from.rows, from.cols);
    for (index r = 0; r < from.rows; ++r)
      for (index j = 0; j < from.cols; ++j)
        spectrum(r, j) = std::ldexp(static_cast<double>(from(r, j)), -exponent);
    spectrum.solve();

    const double total = spectrum.sum();
    core::exact_sum entropy, mean; // −Σ p log p, Σ h σ/Σσ
    for (index k = 0; k < spectrum.count(); ++k) {
      const double log_p = log_share(spectrum[k], total);
      entropy.add(-(spectrum[k] / total + options_.epsilon) * log_p);
      mean.add(-(log_p + 1) * (spectrum[k] / total));
    }
    const double rank = std::exp(entropy.value());
    if (gradients) {
      const double least = 1e-12 * spectrum.largest();
      spectrum.combine([&](index k) {
        const double h = -(log_share(spectrum[k], total) + 1);
        return spectrum[k] > least ? rank / total * (h - mean.value()) : 0;
      });
      core::store_slopes((*gradients)[0], call,
                         [&](index r, index j) { return std::ldexp(spectrum(r, j), -exponent); });
    }
    return static_cast<T>(rank);
  }
  /// log p; 0 where p is, as p log p is then.
  double log_share(double sigma, double total) const {
    const double p = sigma / total + options_.epsilon;
    return p > 0 ? std::log(p) : 0;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
