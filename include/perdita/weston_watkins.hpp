// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Margins are formed in T, here and in the slopes, so that both see the same ones above 0.
template <class T> struct weston_watkins_formula : solved_formula {
  T margin;

  template <class V> PERDITA_INLINE V gap(const V& x, const V& label) const {
    const V masked(-std::numeric_limits<T>::infinity());
    return select(x == masked, masked, (x - label) + V(margin));
  }
  /// `downscale` Σ of the gaps above 0, for where their sum overflows.
  double small_sum(const T* x, index n, index y) const {
    double sum = 0;
    for (index k = 0; k < n; ++k) {
      const double g = small_gap(static_cast<double>(x[k]), static_cast<double>(x[y]), margin);
      sum += k != y && g > 0 ? g : 0;
    }
    return sum;
  }
  pack<double> small_sums(const short_rivals<T>& rivals) const {
    using W = pack<double>;
    const W zero(0);
    W sum(0);
    for (index k = 0; k < rivals.n; ++k) {
      const W g = small_gap(rivals.score(k), first_rows(rivals.own), margin);
      sum += select(g > zero, g, zero);
    }
    return sum;
  }
  template <class V, class C> auto slopes(const C* c) const {
    return [this, label = to_lanes<V>(c[0]), lost = to_lanes<V>(c[1])](const V& x) {
      return select(gap(x, label) > V(0), V(1), V(0)) + lost;
    };
  }
  row_solution solve(const T* x, index n, index y, double*) const {
    using V = pack<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    constexpr auto width = static_cast<index>(lanes<T>);
    lane_sums<T, 1> value;
    V active(0);
    for_packs(
        x, n, -inf, [&](const V& at, index i) __attribute__((always_inline)) {
          prefetch(x + i + prefetch_distance<T>);
          V g = gap(at, V(x[y]));
          if (y >= i && y < i + width) [[unlikely]]
            g = select(iota<T>() == V(static_cast<T>(y - i)), V(0), g);
          const auto inactive = g <= V(0); // NaN shows
          value.some[0] += select(inactive, V(0), g);
          value.count_pack();
          active += select(inactive, V(0), V(1));
        });
    double total = value.total(0);
    if (total == inf) [[unlikely]]
      total = small_sum(x, n, y) / downscale;
    const double lost = total == total ? 0 : total;
    const double label = static_cast<double>(x[y]), of_label = label == label ? 0 : label;
    return solution(total + of_label, lost + of_label - static_cast<double>(total_count(active)),
                    label, lost + of_label);
  }
  summary<solved_row, pack<double>> solve_rows(pack<T>* x, index n, const pack<T>& label) const {
    using V = pack<T>;
    using W = pack<double>;
    const short_rivals<T> rivals(x, n, label);
    const V zero(0), one(1);
    W total(0);
    V active(0);
    for (index j = 0; j < n; ++j) {
      const V g = gap(x[j], rivals.own);
      const auto inactive = g <= zero; // NaN shows
      total += first_rows(select(inactive, zero, g));
      active += select(inactive, zero, one);
    }
    const auto beyond = total == W(std::numeric_limits<double>::infinity());
    if (any(beyond)) [[unlikely]]
      total = select(beyond, small_sums(rivals) / downscale, total);
    const W own = first_rows(rivals.own), of_label = select(is_nan(own), own, W(0));
    const W lost = of_label + select(is_nan(total), total, W(0));
    return solutions(W(0), {total + of_label, lost - first_rows(active), own, lost, W(0)});
  }
};

} // namespace core

/// The multi-class hinge of Weston and Watkins, which every rival within the margin adds to:
///
///   ℓ = Σ_{k≠y} max(0, c + x_k − x_y)
///   ∂ℓ/∂x_k = [c + x_k − x_y > 0],  ∂ℓ/∂x_y = −(their number)
///
/// Masked classes (-inf) are no rivals; a masked label costs +inf, as a rival of +inf does, but 0
/// where no rival is left.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`. Needs whole rows, so
/// not on the linear head.
/// Source: Weston and Watkins, "Support vector machines for multi-class pattern recognition", 1999.
template <class T = float> class weston_watkins : public row_loss<weston_watkins<T>, T> {
public:
  struct options {
    T margin = 1; ///< c
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "weston_watkins";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  weston_watkins() : weston_watkins(options{}) {}
  explicit(false) weston_watkins(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<weston_watkins<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::weston_watkins_formula<T>{{}, options_.margin});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
