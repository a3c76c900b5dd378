// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "entmax.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// α = 2: p_j = p₁ (1 − r_j)_+
struct norm_of_two {
  template <class W> PERDITA_INLINE void raise(const W& rate, const W& z, W& base, W& power) const {
    power = base = max(W(0), fma(rate, z, W(1)));
  }
  template <class W> PERDITA_INLINE W lower(const W& base, const W&) const {
    return select(base > W(0), W(1), W(0));
  }
  template <class V, class C> static auto slopes(const C* c) {
    return [shift = to_lanes<V>(c[0]), rate = to_lanes<V>(c[1]), top = to_lanes<V>(c[2])](
               const V& z) { return top * max(V(0), fma(rate, z - shift, V(1))); };
  }
};

/// From Ω* + 1 less the maximum x₁: ℓ = (Ω* + 1 − x₁) + (x₁ − x_y), which are both at least 0.
template <class Solver, class Power> struct normmax_formula : entmax_formula<Power> {
  Solver solver;

  normmax_formula(const Solver& s, const Power& p) : entmax_formula<Power>(p), solver(s) {}
  template <class T> auto solve(const T* x, index n, double* room) const {
    return solve_norm(solver, this->power, x, n, room);
  }
  template <class T> auto solve_rows(pack<T>* x, index n) const {
    return solve_norm_rows(solver, this->power, x, n);
  }
};

/// f(formula) with what serves an α.
template <class F> void with_normmax(double alpha, F f) {
  const tsallis_power power(alpha);
  if (alpha == 2)
    f(normmax_formula(tsallis_three_halves{1}, norm_of_two{}));
  else
    f(normmax_formula(tsallis_power(power.order() / power.alpha(), 1), power));
}

/// From p and b = ∂/∂p, with m = ⟨b, p⟩ and s_j = (p_j/‖p‖)^{2−α} where p_j > 0, else 0:
///
///   ‖p‖/(α−1) s_j (b_j − m) − p_j Σ_k ‖p‖/(α−1) s_k (b_k − m)
struct normmax_backward_formula {
  static constexpr bool paired = true;
  double alpha;

  double operator()(const double* p, const double* b, index n, index, double* slopes) const {
    using W = pack<double>;
    constexpr auto width = static_cast<index>(lanes<double>);
    constexpr double most = 1e150; // beside it the others are nothing, and the sums stay finite
    const auto beside = [&](index i) {
      return i + width <= n ? W::load(b + i) : load_first(b + i, n - i, W(0));
    };
    const auto put = [&](const W& slope, index i) {
      if (i + width <= n)
        slope.store(slopes + i);
      else
        store_first(slope, slopes + i, n - i);
    };
    const double norm = norm_of(alpha, p, n), scale = norm / (alpha - 1);
    wide_lanes<double> mean, sum;
    mean.clear(), sum.clear();
    for_packs(p, n, 0.0, [&](const W& share, index i) { mean.add(share * beside(i)); });
    const W m(mean.total());
    for_packs(p, n, 0.0, [&](const W& share, index i) {
      const W s = min(W(most), exp(log(share / W(norm)) * W(2 - alpha)));
      const W own = select(share == W(0), W(0), W(scale) * s * (beside(i) - m));
      sum.add(own);
      put(own, i);
    });
    const W all(sum.total());
    for_packs(p, n, 0.0, [&](const W& share, index i) {
      const W own = i + width <= n ? W::load(slopes + i) : load_first(slopes + i, n - i, W(0));
      put(fnma(share, all, own), i);
    });
    return 0;
  }
};

} // namespace core

/// What normmax() may be told.
struct normmax_options {
  double alpha = 2;             ///< α > 1
  vector_view<index> support{}; ///< one number per row: the classes above the threshold
  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

/// result = normmax(scores) by rows, the argmax of ⟨p, x⟩ − ‖p‖_α over the simplex:
///
///   p_j = w_j^{1/(α−1)} / Σ w^{1/(α−1)},   w_j = (x_j − τ)_+,   Σ w^{α/(α−1)} = 1
///
/// Sparse as entmax, but nearly uniform over its support for large α. `result` may be the scores.
/// p is exactly 0 where x_j ≤ max x − 1. For α > 2 a probability has an infinite slope where it
/// leaves 0, and is as exact there as doubles for τ make it. Special values and support: as
/// sparsemax.
/// Throws std::invalid_argument on a mismatch of shapes, or if α is not a finite number above 1.
/// Cost: as entmax; α = 2 without an exponential.
/// Source: Blondel, Martins and Niculae, "Learning with Fenchel-Young losses", JMLR 2020.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void normmax(X&& scores, Y&& result, const normmax_options& options = {}) {
  core::require_entmax_alpha("normmax", options.alpha);
  core::with_normmax(options.alpha, [&](const auto& formula) {
    core::map_onto_simplex<T>("normmax", formula, core::as_matrix(scores), core::as_matrix(result),
                              options.support, options.run_on, options.memory);
  });
}

/// What normmax_backward() may be told.
struct normmax_backward_options {
  double alpha = 2; ///< α > 1
  executor run_on{};
  workspace* memory = nullptr;
};

/// ∂/∂scores from p = normmax(scores) and d_p = ∂/∂p, with m = ⟨d, p⟩ and s_j = (p_j/‖p‖_α)^{2−α}
/// where p_j > 0, else 0:
///
///   g_j = ‖p‖_α/(α−1) s_j (d_j − m),   ∂/∂x_j = g_j − p_j Σ g
///
/// d_scores may be p or d_p. For α > 2, s grows without bound as p leaves 0; beyond 1e150 it counts
/// as that.
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void normmax_backward(P&& p, D&& d_p, Y&& d_scores, const normmax_backward_options& options = {}) {
  core::require_entmax_alpha("normmax_backward", options.alpha);
  const auto d = core::as_matrix(d_p);
  core::map_rows<T>("normmax_backward", core::normmax_backward_formula{options.alpha},
                    core::as_matrix(p), &d, core::as_matrix(d_scores), options.run_on,
                    options.memory);
}

/// The normmax loss, the Fenchel-Young loss of the norm ‖p‖_α on the simplex, α > 1:
///
///   ℓ = τ + 1 − x_y,   Σ (x_j − τ)_+^{α/(α−1)} = 1,   ∂ℓ/∂x = p − e_y,  p = normmax(x)
///
/// (τ = ⟨p, x⟩ − ‖p‖_α.) α → ∞: sparsemax's τ. ℓ and its gradient are exactly 0 where x_y ≥ x_j + 1
/// for every other j. Every digit of a small ℓ is right.
/// A soft target is a distribution q, of multi-label rows q = y/|y|:
///
///   ℓ = τ + ‖q‖_α − ⟨q, x⟩,   ∂ℓ/∂x = p − q
///
/// with everything else as sparsemax_loss has it.
/// Special values, shapes, reductions, errors, cost: as entmax_loss; α = 2 is served faster.
/// Throws std::invalid_argument if α is not a finite number above 1.
/// Source: Blondel, Martins and Niculae, "Learning with Fenchel-Young losses", JMLR 2020.
template <class T = float> class normmax_loss : public row_loss<normmax_loss<T>, T> {
public:
  struct options {
    double alpha = 2; ///< α > 1
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "normmax_loss";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits = sparsemax_loss<T>::traits;

  normmax_loss() : normmax_loss(options{}) {}
  explicit(false) normmax_loss(const options& o) : options_(o) {
    core::require_entmax_alpha(name, o.alpha);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<normmax_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    if (job.has_soft_target())
      f(core::norm_young{options_.alpha});
    else
      core::with_normmax(options_.alpha, f);
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
