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
struct value_and_slope {
  pack<double> value, slope;
};

/// Any of these functions, from target_odds; it is not copied. All of them share one formula, and
/// so one traversal each of rows and columns: what tells them apart is called once for every few
/// rows.
template <class T> class target_function {
public:
  using odds = target_odds<T, pack<double>>;

  template <class Function>
  explicit target_function(const Function& f)
      : object_(&f),
        call_([](const void* g, const odds& o) { return (*static_cast<const Function*>(g))(o); }) {}
  value_and_slope operator()(const odds& o) const { return call_(object_, o); }

private:
  const void* object_;
  value_and_slope (*call_)(const void*, const odds&);
};

template <class T> struct target_formula : row_formula {
  using statistic = log_sum_exp;

  target_function<T> f;

  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = pack<double>;
    const target_odds<T, W> odds(row);
    const value_and_slope at = f(odds);
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
/// target_access, function(), which makes a function of target_odds. Shapes, reductions, errors,
/// masked classes and by-products are those of cross_entropy.
template <class Derived, class T> class target_loss : public row_loss<Derived, T> {
public:
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = true;

private:
  friend row_loss<Derived, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    const auto function = core::target_access::function(static_cast<const Derived&>(*this));
    f(core::target_formula<T>{{}, core::target_function<T>(function)});
  }
};

} // namespace perdita::inline PERDITA_ABI
