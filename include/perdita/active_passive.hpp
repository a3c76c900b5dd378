// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/target_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With c = −log p_y, S = Σ_k −log p_k and K classes:  n = c/S,
///   ∂n/∂x_j = (p_j (S − K c) + c)/S² − δ_jy/S
template <class T> struct active_passive_formula : row_formula {
  using statistic = log_sum_exp_and_total;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  double alpha, beta;
  target_function<T> passive;

  template <class V> PERDITA_INLINE V slope(const V&, const V& share, const V&, const V* c) const {
    return share + c[0];
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = pack<double>;
    const W zero(0), inf(std::numeric_limits<double>::infinity()), k(row.classes);
    const target_odds<T, W> odds(row);
    const W c = odds.surprise;
    const W sum = fma(row.term[2], odds.above(), c - row.term[1]);
    // Nothing to normalise by: a masked class, or no rival.
    const auto void_sum = (row.term[2] < k - W(1)) | (c == inf) | (sum == zero);
    const W per_sum = select(void_sum, zero, W(1) / sum), inverse = W(alpha) * per_sum;
    const value_and_slope other = passive(odds);

    row_outcome<W> out;
    out.value = select(c == inf, W(alpha), weighted(inverse, c)) + weighted(W(beta), other.value);
    const W even = weighted(inverse * per_sum, c); // of every class
    const W steep = inverse - k * even + W(beta) * other.slope;
    out.coefficient[0] = even;
    out.image_scale = select(row.term[0] == zero, zero, steep * odds.per_rival);
    out.target_gradient = -(inverse * odds.miss + even * fma(k, odds.hit, W(-1)) +
                            W(beta) * (other.slope * odds.miss));
    return out;
  }
  template <class Row> auto report(const Row& row) const { return softmax_report(row); }
};

} // namespace core

struct active_passive_options {
  double alpha = 1; ///< α ≥ 0: of the normalised cross-entropy
  double beta = 1;  ///< β ≥ 0: of the passive loss
  std::int64_t ignore_index = -100;
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Active passive loss: normalised cross-entropy (NCE), which only looks at the label, and a
/// passive loss, any function of the label's probability (robust.hpp, comp_sum.hpp).
///
///   ℓ = α log p_y / Σ_k log p_k + β ℓ_passive(p_y),   p = softmax(x), K classes
///   ∂NCE/∂x = (p (S − K c) + c)/S² − e_y/S,   c = −log p_y, S = −Σ_k log p_k
///
/// The first term lies in (0, 1). β = 0: NCE alone. The published pairs: symmetric_cross_entropy
/// with alpha = 0 (NCE+RCE), comp_sum with tau = 2 (NCE+MAE), asymmetric_gce, asymmetric_unhinged.
/// Special values: with a masked class (-inf) the first term is 0, with a masked label α, with one
/// class 0; its gradient is then 0. Others, shapes, reductions, errors, by-products: as
/// cross_entropy. The passive loss's own ignore_index and reduction are not used.
/// Source: Ma, Huang, Wang, Romano, Erfani, Bailey, "Normalized loss functions for deep learning
/// with noisy labels", ICML 2020.
///
///   perdita::asymmetric_gce<float> passive({.a = 3, .q = 1.5f});
///   perdita::active_passive loss(passive, {.alpha = 5});
template <class Passive>
class active_passive : public row_loss<active_passive<Passive>, typename Passive::value_type> {
public:
  using T = typename Passive::value_type;
  using options = active_passive_options;
  static constexpr const char* name = "active_passive";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;

  explicit(false) active_passive(const Passive& passive) : active_passive(passive, options{}) {}
  active_passive(Passive passive, const options& o) : passive_(std::move(passive)), options_(o) {
    core::not_negative(name, "alpha", o.alpha);
    core::not_negative(name, "beta", o.beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  const Passive& passive() const { return passive_; }
  constexpr loss_traits traits() const {
    return {.convex = false,
            .smooth = passive_.traits().smooth,
            .exact_gradient = passive_.traits().exact_gradient,
            .nonnegative = passive_.traits().nonnegative,
            .shift_invariant = true};
  }

private:
  friend row_loss<active_passive<Passive>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    const auto function = core::target_access::function(passive_);
    f(core::active_passive_formula<T>{
        {}, options_.alpha, options_.beta, core::target_function<T>(function)});
  }
  Passive passive_;
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
