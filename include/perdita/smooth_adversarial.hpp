// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/paired_kernel.hpp"
#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// The first row is the one whose slopes are wanted. ‖v‖ does not care which row is which.
template <class T> struct smooth_adversarial_formula {
  static constexpr bool paired = true;

  double tau, rho, nu;
  bool first_is_clean;

  double operator()(const double* x, const double* other, index n, index y, double* slopes) const {
    const double distance = apart(x, other, n, y, slopes);
    const double of_clean = first_is_clean ? comp_sum(x, n, y, slopes + n, slopes)
                                           : comp_sum(other, n, y, slopes + n, nullptr);
    const double value = of_clean + distance;
    if (value != value)
      std::fill_n(slopes, n, value);
    return value;
  }

private:
  /// ν ‖v‖ and its slopes with respect to x; scaled, so that no square overflows.
  double apart(const double* x, const double* other, index n, index y, double* slopes) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const auto masked = [&](index k) { return x[k] == -inf && other[k] == -inf; };
    const auto step = [&](index k) { return masked(k) ? 0 : other[k] - x[k]; };
    double largest = 0, squares = 0, sum = 0, lost = 0;
    for (index k = 0; k < n; ++k) {
      slopes[k] = k == y || masked(k) ? 0 : step(y) - step(k);
      lost += slopes[k] - slopes[k]; // NaN where anything is not finite
      largest = std::fmax(largest, std::fabs(slopes[k]));
    }
    if (lost != lost)
      return lost;
    if (largest == 0)
      return 0;
    for (index k = 0; k < n; ++k)
      squares += (slopes[k] / largest) * (slopes[k] / largest);
    const double length = std::sqrt(squares);
    for (index k = 0; k < n; ++k) {
      slopes[k] = nu * (slopes[k] / largest) / length;
      sum += slopes[k];
    }
    slopes[y] = -sum;
    return nu * largest * length;
  }

  /// Φ^τ of the scores over ρ; adds its slopes, where they are wanted.
  double comp_sum(const double* x, index n, index y, double* d, double* slopes) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    constexpr double most = static_cast<double>(std::numeric_limits<T>::max()) * 0x1p-24;
    const rivals_of_row rivals(x, n, y, d);
    if (rivals.lost)
      return std::numeric_limits<double>::quiet_NaN();
    const double rest = 1 - tau, sum = sum_of_images(d, n, 1 / rho);
    const double u =
        rivals.top == -inf ? (x[y] == -inf ? inf : -inf) : std::log(sum) - rivals.label / rho;
    const scalar_odds odds(u);
    const double steep = rest == 0 ? 1 : std::fmin(most, std::exp(rest * odds.surprise));
    if (slopes) {
      for (index k = 0; k < n; ++k)
        slopes[k] +=
            k == y || sum == 0 ? 0 : steep * odds.miss * std::exp(d[k] / rho) / (sum * rho);
      slopes[y] -= steep * odds.miss / rho;
    }
    return rest == 0 ? odds.surprise : std::expm1(rest * odds.surprise) / rest;
  }
};

} // namespace core

/// Smooth adversarial comp-sum loss: the comp-sum loss of the clean scores h, and how far the
/// margins move when the input is perturbed to give the scores h',
///
///   ℓ = Φ^τ( Σ_{k≠y} e^{(h_k − h_y)/ρ} ) + ν ‖v‖₂,   v_k = (h'_y − h'_k) − (h_y − h_k),  k ≠ y
///   ∂ℓ/∂h'_k = −ν v_k/‖v‖,  ∂ℓ/∂h'_y = ν Σ_k v_k/‖v‖
///   ∂ℓ/∂h = p_y^{τ−1} (p − e_y)/ρ − ∂ℓ/∂h',   p = softmax(h/ρ)
///
/// Φ^τ as in comp_sum. The attack, which looks for the h' that is farthest, is the caller's. An
/// upper bound of the adversarial ρ-margin comp-sum loss where ν ≥ √(K−1)/ρ. v = 0: no gradient
/// from it. ν = 0: comp_sum of h/ρ.
/// Both matrices are rows × classes. Classes masked (-inf) in both do not count; other infinities,
/// or NaN, make the row NaN. Asking for the gradients takes a pass for each; they lie apart from
/// each other and from the scores. Reductions, errors, row weights: as cross_entropy. No
/// by-products but `values`. Needs whole rows, so not on the linear head.
/// Source: Mao, Mohri, Zhong, "Cross-entropy loss functions: theoretical analysis and
/// applications", ICML 2023.
template <class T = float> class smooth_adversarial : public row_loss<smooth_adversarial<T>, T> {
public:
  struct options {
    T tau = 1; ///< τ ≥ 0
    T rho = 1; ///< ρ > 0: width of the margin
    T nu = 1;  ///< ν ≥ 0: weight of the distance
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "smooth_adversarial";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  smooth_adversarial() : smooth_adversarial(options{}) {}
  explicit(false) smooth_adversarial(const options& o) : options_(o) {
    core::not_negative(name, "tau", o.tau);
    core::positive(name, "rho", o.rho);
    core::not_negative(name, "nu", o.nu);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = options_.tau <= 1,
            .smooth = false,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

  /// The reduced value.
  template <class X, class A, core::labels_like Y>
  requires core::scores_like<X, T> && core::scores_like<A, T> T
  operator()(X&& scores, A&& adversarial, Y&& labels, const call_options<T>& call = {}) const {
    return run<false>(scores, adversarial, labels, matrix_view<T>(), call, true);
  }
  /// The reduced value, and the gradients with respect to both matrices of scores.
  template <class X, class A, core::labels_like Y, class G, class H>
  requires core::scores_like<X, T> && core::scores_like<A, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(X&& scores, A&& adversarial, Y&& labels, G&& d_scores, H&& d_adversarial,
                       const call_options<T>& call = {}) const {
    const auto to_scores = core::as_matrix(d_scores);
    const auto to_adversarial = core::as_matrix(d_adversarial);
    this->check_pair(core::as_matrix(scores), core::as_matrix(adversarial), to_scores,
                     to_adversarial, "gradient rows", "gradient columns", "gradient");
    run<true>(adversarial, scores, labels, to_adversarial, call, false);
    return run<true>(scores, adversarial, labels, to_scores, call, true);
  }

private:
  friend row_loss<smooth_adversarial<T>, T>;

  template <bool Gradient, class X, class A, class Y, class G>
  T run(X& first, A& second, Y& labels, matrix_view<G> gradient, const call_options<T>& call,
        bool first_is_clean) const {
    auto job = this->paired_job(core::as_matrix(first), core::as_matrix(second), gradient,
                                "the other scores");
    this->set_labels(job, core::as_vector(labels));
    return this->template evaluate<Gradient>(job, call, [&](const auto&, auto f) {
      f(core::smooth_adversarial_formula<T>{static_cast<double>(options_.tau),
                                            static_cast<double>(options_.rho),
                                            static_cast<double>(options_.nu), first_is_clean});
    });
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
