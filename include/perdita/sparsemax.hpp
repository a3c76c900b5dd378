// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/threshold.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// z = x − max x,  τ = (Σ_S z − 1)/|S|,  p = max(z − τ, 0):
/// ℓ = ½ (Σ_S z² − |S| τ² + 1) − z_y,  ∂ℓ/∂x = p − e_y.
struct sparsemax_formula : row_formula {
  using statistic = simplex_threshold;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  template <class V> PERDITA_INLINE V slope(const V& x, const V&, const V&, const V* c) const {
    return max(V(0), (x - c[0]) - c[1]);
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

} // namespace core

/// The sparsemax loss, the Fenchel-Young loss of ½‖p‖² on the simplex:
///
///   ℓ = ½ Σ_{j ∈ S} (x_j² − τ²) + ½ − x_y,  p = sparsemax(x) = max(x − τ, 0),  S = {p > 0}
///   ∂ℓ/∂x = p − e_y
///
/// with τ such that Σ p = 1. ℓ = 0 exactly where x_y ≥ x_j + 1 for every other j. Two classes with
/// t = x_y − x_other: 0 for t ≥ 1, (t−1)²/4 for |t| < 1, −t for t ≤ −1.
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
  static constexpr bool takes_soft_targets = false;
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
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::sparsemax_formula{});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
