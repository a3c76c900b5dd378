// SPDX-License-Identifier: MIT
#pragma once

/// Losses that put another function in the place of softmax's exponential:
///
///   ℓ = −log( f(x_y) / Σ_k f(x_k) ),   f ≥ 0,   with S = Σ_k f(x_k):
///   ∂ℓ/∂x_j = f'(x_j)/S,   ∂ℓ/∂x_y = −(f'(x_y)/f(x_y)) (S − f(x_y))/S
///
/// The sum over the rivals comes from a statistic of numbers z, each a function of x alone.

#include <limits>
#include <type_traits>

#include "row_formula.hpp"
#include "row_loss.hpp"
#include "traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Base of maps with z = x: f is c + l x + q x².
struct quadratic_map {
  using statistic = power_sums;
  static constexpr bool divides = false;
  template <class V> PERDITA_INLINE V score(const V& x) const { return x; }
  template <class V> static PERDITA_INLINE auto masked(const V& z) {
    return z == V(-std::numeric_limits<typename V::value_type>::infinity());
  }
};

/// Map: score(x) gives z, and divides says whether it is a quotient; of(z) is f, and total(t) Σ f
/// from the terms of statistic; slope(z) is f'; masked(z) where there is no class.
template <class Map, class T> struct score_ratio_formula : row_formula {
  using statistic = typename Map::statistic;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;
  static constexpr bool keeps_scores = Map::divides;

  Map map;

  template <class V> PERDITA_INLINE V score(const V& x) const { return map.score(x); }
  template <class V> PERDITA_INLINE V slope(const V& z, const V&, const V&, const V* c) const {
    return select(map.masked(z), V(0), map.slope(z) * c[0]);
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = std::remove_cvref_t<decltype(row.target)>;
    const W zero(0), one(1), inf(std::numeric_limits<double>::infinity()), z = row.target;
    const W rivals = map.total(row.term), f = map.of(z);
    const W per_own = one / f, odds = rivals * per_own, most(0x1p1000);
    const auto [surprise, hit] = log1p_and_inverse_to<T>(min(most, odds));
    const auto lost = map.masked(z);
    row_outcome<W> out;
    out.value = select(lost, inf, select(odds < most, surprise, odds));
    out.coefficient[0] = hit * per_own;
    if (any(lost)) [[unlikely]]
      out.coefficient[0] = select(lost, select(rivals == zero, zero, one / rivals), hit * per_own);
    W miss = odds * hit;
    const auto hopeless = (rivals < inf) & (f > zero) & !((odds < most) | lost);
    if (any(hopeless)) [[unlikely]] { // p < 2^-1000: odds may be beyond all numbers
      out.value = select(hopeless, log(rivals) - log(f), out.value);
      out.coefficient[0] = select(hopeless, one / rivals, out.coefficient[0]);
      miss = select(hopeless, one, miss);
    }
    out.target_gradient =
        select(lost | (miss == zero), zero, zero - (map.slope(z) * per_own) * miss);
    if (const auto spoilt = !(rivals < inf); any(spoilt)) [[unlikely]] {
      const W nan = inf - inf;
      out.value = select(spoilt, nan, out.value);
      out.coefficient[0] = select(spoilt, nan, out.coefficient[0]);
      out.target_gradient = select(spoilt, nan, out.target_gradient);
    }
    return out;
  }
};

} // namespace core

/// Base of the functors: Derived declares its name, options, settings(), traits and, open to
/// score_ratio_access, map().
struct score_ratio_access {
  template <class Loss> static auto map(const Loss& loss) { return loss.map(); }
};
template <class Derived, class T> class score_ratio_loss : public row_loss<Derived, T> {
public:
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

private:
  friend row_loss<Derived, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    auto map = score_ratio_access::map(static_cast<const Derived&>(*this));
    f(core::score_ratio_formula<decltype(map), T>{{}, map});
  }
};

} // namespace perdita::inline PERDITA_ABI
