// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "core/fenchel_young.hpp"
#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/threshold.hpp"
#include "core/traits.hpp"
#include "softmax.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// z = x − max x,  τ = (Σ_S z − 1)/|S|,  p = max(z − τ, 0):
/// ℓ = ½ (Σ_S z² − |S| τ² + 1) − z_y,  ∂ℓ/∂x = p − e_y.
struct sparsemax_formula : row_formula {
  using statistic = simplex_threshold;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  template <class T> auto solve(const T* x, index n, double* room) const {
    return simplex_threshold::solve(x, n, room);
  }
  template <class T> auto solve_rows(pack<T>* x, index n) const {
    return simplex_threshold::solve_rows(x, n);
  }
  template <class V, class C> auto slopes(const C* c) const {
    return [shift = to_lanes<V>(c[0]), threshold = to_lanes<V>(c[1])](const V& x) {
      return max(V(0), (x - shift) - threshold);
    };
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    const W zero(0), one(1), size = row.term[0];
    const auto masked = size == zero; // every score is -inf
    const W threshold = select(masked, zero, (row.term[1] - one) / size);
    const W z = row.target - row.shift;
    row_outcome<W> out;
    const W value = W(0.5) * ((row.term[2] - size * threshold * threshold) + one) - z;
    out.value = select(masked, -z, max(zero, value));
    out.coefficient[0] = row.shift;
    out.coefficient[1] = threshold;
    out.target_gradient = select(masked, -one, max(zero, z - threshold) - one);
    return out;
  }
};

/// The p of a resident formula whose slopes, without a label, are p.
template <class Formula> struct simplex_map : Formula {
  vector_view<index> support;

  simplex_map(const Formula& f, vector_view<index> sizes) : Formula(f), support(sizes) {}
  template <class Summary> void record(index row, const Summary& s) const {
    const double size = s.term[Formula::statistic::size];
    if (support.data)
      support[row] = size == size ? static_cast<index>(size) : 0;
  }
};

template <class T, class Formula, class X, class Y>
void map_onto_simplex(const char* name, const Formula& formula, matrix_view<X> x, matrix_view<Y> y,
                      vector_view<index> support, const executor& run_on, workspace* memory) {
  if ((support.data || support.size > 0) && support.size != x.rows)
    fail(name, "support", to_text(support.size), to_text(x.rows) + " (as many as rows)");
  require_memory(name, "support", support.data, support.size);
  map_rows<T>(name, simplex_map<Formula>(formula, support), x,
              static_cast<const matrix_view<const T>*>(nullptr), y, run_on, memory);
}

/// Σ b s and Σ s, for scores s with a number b for each.
struct weighted_scores : weighted_sums {
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& s, const V&, const V& b) {
    sum[0] = fma(b, s, sum[0]);
    sum[1] += s;
    return s;
  }
};

/// From p and b = ∂/∂p:  s_j (b_j − Σ s b / Σ s) with s = p^{2−α} where p > 0, else 0.
template <class T> struct simplex_backward_formula : row_formula {
  using statistic = weighted_scores;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;
  static constexpr bool uses_share = false;
  static constexpr bool has_side = true;
  static constexpr bool slope_reads_score() { return true; }

  explicit simplex_backward_formula(double alpha) : power(std::max(2 - alpha, -1e30)) {}
  side_cursor<T> side(index) const { return {nullptr, nullptr, nullptr, T(1), T(0)}; }
  /// Not above `most`: beside it the others are nothing, and the sums stay finite.
  template <class V> V score(const V& p) const {
    using N = typename V::value_type;
    constexpr N most = sizeof(T) == 4 ? N(1e15) : N(1e150);
    V s(1);
    const V root = sqrt(p);
    if (power == 0.5)
      s = root;
    else if (power == 0.75)
      s = root * sqrt(root);
    else if (power != 0)
      s = min(V(most), exp(log(p) * V(static_cast<N>(power))));
    return select(p > V(0), s, p);
  }
  template <class V> PERDITA_INLINE V slope(const V& s, const V&, const V& b, const V* c) const {
    return s * (b - c[0]);
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    row_outcome<W> out;
    out.value = W(0);
    out.coefficient[0] = select(row.term[1] == W(0), W(0), row.term[0] / row.term[1]);
    out.target_gradient = slope(row.target, W(0), row.target_side, out.coefficient);
    return out;
  }

  double power; // 2 − α
};

template <class T, class P, class D, class Y>
void map_backward(const char* name, double alpha, matrix_view<P> p, matrix_view<D> d,
                  matrix_view<Y> y, const executor& run_on, workspace* memory) {
  map_rows<T>(name, simplex_backward_formula<T>(alpha), p, &d, y, run_on, memory);
}

} // namespace core

/// What sparsemax() and entmax15() may be told.
struct simplex_map_options {
  vector_view<index> support{}; ///< one number per row: the classes above the threshold
  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

/// result = sparsemax(scores) by rows, the nearest point of the simplex:  p_j = max(x_j − τ, 0)
/// with Σ p = 1. `result` may be the scores. A row whose scores are all -inf gives zeros; a NaN or
/// +inf makes the row NaN, and its support 0.
/// Error: 2 epsilon, absolute; exactly 0 where x_j ≤ max x − 1.
/// Throws std::invalid_argument on a mismatch of shapes.
/// Source: Martins and Astudillo, "From softmax to sparsemax", ICML 2016.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void sparsemax(X&& scores, Y&& result, const simplex_map_options& options = {}) {
  core::map_onto_simplex<T>("sparsemax", core::sparsemax_formula{}, core::as_matrix(scores),
                            core::as_matrix(result), options.support, options.run_on,
                            options.memory);
}

/// ∂/∂scores from p = sparsemax(scores) and d_p = ∂/∂p:  d_j less its mean over the support, and 0
/// outside. d_scores may be p or d_p.
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void sparsemax_backward(P&& p, D&& d_p, Y&& d_scores, const executor& run_on = {},
                        workspace* memory = nullptr) {
  core::map_backward<T>("sparsemax_backward", 2, core::as_matrix(p), core::as_matrix(d_p),
                        core::as_matrix(d_scores), run_on, memory);
}

/// The sparsemax loss, the Fenchel-Young loss of ½‖p‖² on the simplex:
///
///   ℓ = ½ Σ_{j ∈ S} (x_j² − τ²) + ½ − x_y,  p = sparsemax(x) = max(x − τ, 0),  S = {p > 0}
///   ∂ℓ/∂x = p − e_y
///
/// with τ such that Σ p = 1. ℓ = 0 exactly where x_y ≥ x_j + 1 for every other j. Two classes with
/// t = x_y − x_other: 0 for t ≥ 1, (t−1)²/4 for |t| < 1, −t for t ≤ −1.
///
/// A soft target is a distribution q, of multi-label rows q = y/|y|:
///
///   ℓ = ½ Σ_{j ∈ S} (x_j² − τ²) + ½ ‖q‖² − ⟨q, x⟩ = Σ ½ (q_j − p_j)² + Σ_{j ∉ S} q_j (τ − x_j)
///   ∂ℓ/∂x = p − q
///
/// 0 exactly where q = p; nothing cancels near it. Numbers q_j ≥ 0 whose sum is s count as s times
/// their distribution, gradient s p − q: the labels of a multi-label row may be left as 0 and 1,
/// and a row of zeros counts for nothing. A NaN in q makes the row NaN. Soft targets are served in
/// double.
/// Special values: -inf is a masked class (p = 0, gradient 0; as a label +inf and −1); NaN or +inf
/// makes the row NaN. Shapes, reductions, errors: as cross_entropy. No by-products but `values`.
/// Cost: two reads of a row, the second from cache, and its gradient. The row must be held whole.
/// Source: Martins and Astudillo, "From softmax to sparsemax", ICML 2016; Blondel, Martins and
/// Niculae, "Learning with Fenchel-Young losses", JMLR 2020.
template <class T = float> class sparsemax_loss : public row_loss<sparsemax_loss<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "sparsemax_loss";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  sparsemax_loss() : sparsemax_loss(options{}) {}
  explicit(false) sparsemax_loss(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<sparsemax_loss<T>, T>;
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    if (job.has_soft_target())
      f(core::gini_young{});
    else
      f(core::sparsemax_formula{});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
