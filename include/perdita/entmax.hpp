// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "sparsemax.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

inline void require_entmax_alpha(const char* name, double alpha) {
  require(alpha > 1 && std::isfinite(alpha), name, "alpha", alpha, "a finite number above 1");
}

/// From the conjugate Ω* of the row less its maximum x₁: ℓ = Ω* + (x₁ − x_y), which are both at
/// least 0, and ∂ℓ/∂x = p − e_y, in which p₁ − 1 is known without a difference to 1.
template <class Power> struct entmax_formula : row_formula {
  using statistic = tsallis_threshold;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  explicit entmax_formula(const Power& p) : power(p) {}

  template <class T> auto solve(const T* x, index n, double* room) const {
    return solve_tsallis(power, x, n, room);
  }
  template <class T> auto solve_rows(pack<T>* x, index n) const {
    return solve_tsallis_rows(power, x, n);
  }
  template <class V, class C> auto slopes(const C* c) const { return power.template slopes<V>(c); }
  template <class T>
  requires requires(const Power& p, const double* c) { p.template edge<T>(c); }
  T edge(const double* c) const { return power.template edge<T>(c); }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    const W behind = row.shift - row.target;
    W base, raised;
    power.raise(row.term[0], -behind, base, raised);
    row_outcome<W> out;
    out.value = row.term[3] + behind;
    out.coefficient[0] = row.shift;
    out.coefficient[1] = row.term[0];
    out.coefficient[2] = row.term[1];
    out.target_gradient = select(behind == W(0), -row.term[2], row.term[1] * raised - W(1));
    return out;
  }

  Power power;
};

/// f(power) with what serves an α.
template <class F> void with_entmax_power(double alpha, F f) {
  if (alpha == 1.5)
    f(tsallis_three_halves{});
  else if (alpha == 1.25)
    f(tsallis_five_quarters{});
  else
    f(tsallis_power(alpha));
}

/// One number of a row, found where the row lies.
struct resident_number {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 1;
};

/// ∂ℓ/∂α at fixed p, to which ℓ is stationary; with a = α − 1 and w = a log p
///
///   −1/(αa)² Σ p (a (1 − e^w) + α (1 − e^w + w e^w)) = −1/(αa)² ((2α − 1) (1 − Σ p^α) + α Σ p^α w)
///
/// For α ≤ 2 the first, whose terms are at least 0; beyond, where p is steep at the edge of the
/// support, the second, in which what is there has no weight.
struct entmax_alpha_formula : row_formula {
  using statistic = resident_number;
  static constexpr bool excludes_target = false;
  double alpha;

  explicit entmax_alpha_formula(double order) : alpha(order) {}

  template <class T> summary<resident_number, double> solve(const T* x, index n, double* z) const {
    using W = pack<double>;
    constexpr index width = static_cast<index>(lanes<double>);
    const tsallis_power power(alpha);
    const auto s = solve_tsallis(power, x, n, z);
    const double rate = s.term[0], top = s.term[1];
    if (!(top > 0)) // all is masked, or NaN
      return {0, {top}};
    const bool steep = alpha > 2;
    const double a = alpha - 1, rest = s.term[2];
    const double log_root = a * (rest < 0.5 ? row_log1p(-rest) : row_log(top));
    index count = gather_rivals(row_maxima<T>(x, n), rate, z);
    double of_maximum = 0;
    if (steep) {
      const double log_power = log_root * (alpha / a);
      of_maximum = alpha * log_root * row_exp(log_power) - (2 * alpha - 1) * row_expm1(log_power);
    } else {
      z[count++] = 0; // as one of the others
    }
    const W zero(0), nothing(-std::numeric_limits<double>::infinity());
    wide_lanes<double> sum;
    sum.clear();
    for (index j = 0; j < count; j += width) {
      const W rival = load_first(z + j, std::min(count - j, width), nothing);
      const W log_base = log1p(max(W(-1), W(rate) * rival)), w = log_base + W(log_root);
      const W weight = steep ? exp(w * W(alpha / a)) : W(top) * exp(log_base * W(1 / a));
      const W lost = steep ? fma(W(alpha), w, W(1 - 2 * alpha))
                           : fma(W(a), -expm1(w), W(alpha) * lost_by_order(w));
      sum.add(select(weight > zero, weight * lost, zero));
    }
    return {0, {-(of_maximum + sum.total()) / (alpha * a) / (alpha * a)}};
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    row_outcome<W> out;
    out.value = row.term[0];
    out.target_gradient = W(0);
    return out;
  }

private:
  /// 1 − e^w + w e^w = Σ_{k≥2} w^k (k−1)/k! for w ≤ 0.
  static pack<double> lost_by_order(const pack<double>& w) {
    using W = pack<double>;
    static constexpr std::array<double, 13> c{
        1. / 2,        1. / 3,         1. / 8,         1. / 30,     1. / 144,
        1. / 840,      1. / 5760,      1. / 45360,     1. / 403200, 1. / 3991680,
        1. / 43545600, 1. / 518918400, 1. / 6706022400};
    W series(0);
    for (std::size_t k = c.size(); k-- > 0;)
      series = fma(series, w, W(c[k]));
    return select(w > W(-0.5), w * w * series, fma(w, exp(w), -expm1(w)));
  }
};

/// The rows' ∂ℓ/∂α, served as a loss without a gradient.
template <class T> class entmax_alpha_slope : public row_loss<entmax_alpha_slope<T>, T> {
public:
  struct options {
    double alpha;
    std::int64_t ignore_index;
    perdita::reduction reduction;
  };
  static constexpr const char* name = "entmax_loss::alpha_gradient";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  explicit entmax_alpha_slope(const options& o) : options_(o) {}
  const options& settings() const { return options_; }

private:
  friend row_loss<entmax_alpha_slope<T>, T>;
  template <class F> void visit(const row_job<T>&, F f) const {
    f(entmax_alpha_formula(options_.alpha));
  }
  options options_;
};

} // namespace core

/// What entmax() may be told.
struct entmax_options {
  double alpha = 1.5;           ///< α > 1
  vector_view<index> support{}; ///< one number per row: the classes above the threshold
  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

/// result = entmax(scores) by rows, between softmax (α → 1) and the argmax (α → ∞):
///
///   p_j = ((α−1) x_j − τ)_+^{1/(α−1)},   Σ p = 1
///
/// `result` may be the scores. p is exactly 0 where x_j ≤ max x − 1/(α−1). For α > 2 a probability
/// has an infinite slope where it leaves 0, and is as exact there as doubles for τ make it, to some
/// 10^(−16/(α−1)): half their digits for α = 3, none for α = 50. Special values and support: as
/// sparsemax.
/// Throws std::invalid_argument on a mismatch of shapes, or if α is not a finite number above 1.
/// Source: Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void entmax(X&& scores, Y&& result, const entmax_options& options = {}) {
  core::require_entmax_alpha("entmax", options.alpha);
  core::with_entmax_power(options.alpha, [&](const auto& power) {
    core::map_onto_simplex<T>("entmax", core::entmax_formula(power), core::as_matrix(scores),
                              core::as_matrix(result), options.support, options.run_on,
                              options.memory);
  });
}

/// entmax() with α = 3/2:  p_j = (x_j/2 − τ)_+², without an exponential.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void entmax15(X&& scores, Y&& result, const simplex_map_options& options = {}) {
  core::map_onto_simplex<T>("entmax15", core::entmax_formula(core::tsallis_three_halves{}),
                            core::as_matrix(scores), core::as_matrix(result), options.support,
                            options.run_on, options.memory);
}

/// What entmax_backward() may be told.
struct entmax_backward_options {
  double alpha = 1.5; ///< α > 1
  executor run_on{};
  workspace* memory = nullptr;
};

/// ∂/∂scores from p = entmax(scores) and d_p = ∂/∂p, with s_j = p_j^{2−α} where p_j > 0, else 0:
///
///   s_j (d_j − Σ s d / Σ s)
///
/// d_scores may be p or d_p. For α > 2, s grows without bound as p leaves 0: an s_j beyond the sum
/// of the others costs its own entry digits, and one beyond 1e15 (double: 1e150) counts as that.
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void entmax_backward(P&& p, D&& d_p, Y&& d_scores, const entmax_backward_options& options = {}) {
  core::require_entmax_alpha("entmax_backward", options.alpha);
  core::map_backward<T>("entmax_backward", options.alpha, core::as_matrix(p), core::as_matrix(d_p),
                        core::as_matrix(d_scores), options.run_on, options.memory);
}

/// entmax_backward() with α = 3/2.
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void entmax15_backward(P&& p, D&& d_p, Y&& d_scores, const executor& run_on = {},
                       workspace* memory = nullptr) {
  core::map_backward<T>("entmax15_backward", 1.5, core::as_matrix(p), core::as_matrix(d_p),
                        core::as_matrix(d_scores), run_on, memory);
}

/// The 1.5-entmax loss, between cross-entropy and sparsemax_loss: entmax_loss with α = 3/2,
///
///   ℓ = ⟨p, x⟩ + (4/3)(1 − Σ p^{3/2}) − x_y,   p_j = (x_j/2 − τ)_+²,   τ such that Σ p = 1
///   ∂ℓ/∂x = p − e_y
///
/// ℓ and its gradient are exactly 0 where x_y ≥ x_j + 2 for every other j.
/// Soft targets: as entmax_loss. Special values, shapes, reductions, errors, cost: as
/// sparsemax_loss.
/// Source: Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019.
template <class T = float> class entmax15_loss : public row_loss<entmax15_loss<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "entmax15_loss";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  entmax15_loss() : entmax15_loss(options{}) {}
  explicit(false) entmax15_loss(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<entmax15_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    if (job.has_soft_target())
      f(core::tsallis_young{1.5});
    else
      f(core::entmax_formula(core::tsallis_three_halves{}));
  }
  options options_;
};

/// The α-entmax loss, the Fenchel-Young loss of Tsallis' entropy of order α > 1:
///
///   ℓ = ⟨p, x⟩ + (1 − Σ p^α)/(α(α−1)) − x_y,   p_j = ((α−1) x_j − τ)_+^{1/(α−1)},   Σ p = 1
///   ∂ℓ/∂x = p − e_y
///
/// α → 1: cross-entropy.  α = 3/2: entmax15_loss.  α = 2: sparsemax_loss.  α → ∞: the perceptron's
/// max x − x_y. ℓ and its gradient are exactly 0 where x_y ≥ x_j + 1/(α−1) for every other j.
/// Every digit of a small ℓ is right: nothing is subtracted from something as large.
/// A soft target is a distribution q, of multi-label rows q = y/|y|:
///
///   ℓ = ⟨p, x⟩ − Σ p^α/(α(α−1)) + Σ q^α/(α(α−1)) − ⟨q, x⟩,   ∂ℓ/∂x = p − q
///
/// with everything else as sparsemax_loss has it.
/// For α > 2 a probability has an infinite slope where it leaves 0, and is as exact there as
/// doubles for τ make it, to some 10^(−16/(α−1)): half their digits for α = 3, none for α = 50.
/// Special values, shapes, reductions, errors: as sparsemax_loss. α = 2 is served faster by a loss
/// of its own, and α = 3/2 and 5/4 take squares and roots; else each score within 1/(α−1) of the
/// maximum takes an exponential and a logarithm in double, some five times for the threshold and
/// once for p.
/// Throws std::invalid_argument if α is not a finite number above 1.
/// Source: Peters, Niculae and Martins, "Sparse sequence-to-sequence models", ACL 2019; Blondel,
/// Martins and Niculae, "Learning with Fenchel-Young losses", JMLR 2020.
template <class T = float> class entmax_loss : public row_loss<entmax_loss<T>, T> {
public:
  struct options {
    double alpha = 1.5; ///< α > 1
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "entmax_loss";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits = entmax15_loss<T>::traits;

  entmax_loss() : entmax_loss(options{}) {}
  explicit(false) entmax_loss(const options& o) : options_(o) {
    core::require_entmax_alpha(name, o.alpha);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// ∂/∂α of the reduced value, at most 0, and of each row in `values`:
  ///
  ///   −(1 − Σ p^α)(2α−1)/(α(α−1))² − Σ p^α log p / (α(α−1)),
  ///
  /// which does not depend on the label, and in which nothing cancels for α near 1. 0 for a row
  /// with one class above -inf, or none.
  template <class X, class Y>
  requires core::scores_like<X, T> T alpha_gradient(X&& scores, Y&& labels,
                                                    const call_options<T>& call = {})
  const {
    const core::entmax_alpha_slope<T> slope(
        {options_.alpha, options_.ignore_index, options_.reduction});
    return slope(scores, labels, call);
  }

private:
  friend row_loss<entmax_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    if (job.has_soft_target())
      return f(core::tsallis_young{options_.alpha});
    core::with_entmax_power(options_.alpha,
                            [&](const auto& power) { f(core::entmax_formula(power)); });
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
