// SPDX-License-Identifier: MIT
#pragma once

/// Losses that see the scores through the probability of the label alone: with c = −log p_y,
///
///   ℓ = f(c),   ∂ℓ/∂x_j = f'(c) (p_j − δ_jy)
///
/// Such a loss is a function of target_odds and nothing else.

#include <limits>

#include "row_formula.hpp"
#include "row_loss.hpp"
#include "traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// f(c) and f'(c).
template <class W> struct value_and_slope { W value, slope; };

/// Function: target_odds → value_and_slope.
template <class T, class Function> struct target_formula : row_formula {
  using statistic = log_sum_exp;

  Function f;

  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const target_odds<T, W> odds(row);
    const value_and_slope<W> at = f(odds);
    row_outcome<W> out;
    out.value = at.value;
    out.image_scale = select(row.term[0] == W(0), W(0), at.slope * odds.per_rival);
    out.target_gradient = -(at.slope * odds.miss);
    return out;
  }
  template <class Row> auto report(const Row& row) const { return softmax_report(row); }
};

/// Opens function() of a loss to those who compose it.
struct target_access {
  template <class Loss> static auto function(const Loss& loss) { return loss.function(); }
};

/// e^x for a slope: no larger than what a share may be multiplied by and stay finite in T.
template <class T, class W> W exp_for_slope(const W& x) {
  return min(W(static_cast<double>(std::numeric_limits<T>::max()) * 0x1p-24), exp(x));
}

} // namespace core

/// Base of the functors: Derived declares its name, options, settings(), traits() and, open to
/// target_access, function(), which makes the Function above. Shapes, reductions, errors, masked
/// classes and by-products are those of cross_entropy.
template <class Derived, class T> class target_loss : public row_loss<Derived, T> {
public:
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;

private:
  friend row_loss<Derived, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    auto function = core::target_access::function(static_cast<const Derived&>(*this));
    f(core::target_formula<T, decltype(function)>{{}, function});
  }
};

} // namespace perdita::inline PERDITA_ABI
