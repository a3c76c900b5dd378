// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>

#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// p_k = min(1/k, s e^{δ_k/λ}): the m largest margins are at the cap, the others share what is left
/// as a softmax. With L_m = log Σ e^{δ/λ} of all but the m largest, m is the smallest number for
/// which nothing else is above the cap: (1 − m/k) e^{δ_(m+1)/λ − L_m} ≤ 1/k.
template <class T> struct ldr_k_kl_formula : solved_formula {
  double lambda, margin;
  index k;

  template <class V, class C> auto slopes(const C* c) const {
    return [
      near = to_lanes<V>(c[0]), most = to_lanes<V>(c[1]), share = to_lanes<V>(c[2]),
      inverse = V(static_cast<T>(1 / lambda))
    ](const V& x) __attribute__((always_inline)) {
      return min(most, exp((x - near) * inverse) * share);
    };
  }
  row_solution solve(const T* x, index n, index y, double* d) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    part_maxima<T> parts(n, k, d);
    const rival_scores<T> rivals(x, n, y, parts);
    const auto own = static_cast<double>(x[y]);
    if (rivals.lost || own == inf)
      return no_solution();
    // Margins δ over the label, or over the largest rival where the label is masked.
    const bool has_label = own > -inf;
    const double from = (has_label ? own : static_cast<double>(rivals.top)) - margin;
    index found = !rivals.all_masked();
    if (k > 1)
      found = rivals.largest(k, parts, d).chosen;
    else
      d[0] = static_cast<double>(rivals.top);
    const index left = std::min(k, found + has_label);
    if (left == 0)
      return solution(inf, -1);
    const auto most = static_cast<double>(left); // at the cap, at the most
    const index top = left - 1;
    // The rivals among the top; what comes next leads those that are not.
    const bool label_in_top = has_label && top > 0 && (found < top || d[top - 1] - from < 0);
    const index held_rivals = top - label_in_top;
    const double next = held_rivals < found ? d[held_rivals] : -inf;
    // Of those that are not: L as r + log(1 + X).
    double r = -inf, others = 0;
    if (held_rivals < found) {
      const auto ties = static_cast<double>(std::count(d, d + held_rivals, next));
      r = (next - from) / lambda;
      others = std::fmax(0, rivals.sum_of_images(static_cast<T>(next), 1 / lambda) - ties - 1);
    }
    if (has_label && !label_in_top) {
      if (r > 0) {
        others += std::exp(-r);
      } else { // and where there is no r
        others = (others + 1) * std::exp(r);
        r = 0;
      }
    }
    for (index i = 0; i < held_rivals; ++i)
      d[i] -= from;
    if (label_in_top)
      insert(0, d, held_rivals);
    index m = top;
    const auto free = [&] { return 1 - static_cast<double>(m) / most; };
    for (; m > 0; --m) {
      const double first = d[m - 1] / lambda, with = (others + 1) * std::exp(r - first);
      if (most - static_cast<double>(m - 1) > with + 1)
        break;
      others = with;
      r = first;
    }
    const double below = r + std::log1p(others); // L_m
    const double held = std::accumulate(d, d + m, 0.0), size = std::log(static_cast<double>(n));
    const double value = held / most +
                         lambda * (static_cast<double>(m) / most) * (std::log(most) - size) +
                         free() * lambda * (below - size - std::log(free()));
    const double share = std::fmin(1 / most, free() * std::exp(-below));
    const double miss = !has_label ? 1 : most == 1 ? -std::expm1(-below) : 1 - share;
    // Any score near the largest that is not at the cap does, as long as the factor belongs to it.
    const double label_or_next =
        held_rivals == found || (has_label && !label_in_top) ? std::fmax(next, from) : next;
    const auto near = static_cast<T>(m < top ? d[m] + from : label_or_next);
    return solution(has_label ? value : inf, -miss, static_cast<double>(near), 1 / most,
                    free() * std::exp((static_cast<double>(near) - from) / lambda - below));
  }
  /// The same, a row in each lane.
  summary<solved_row, pack<double>> solve_rows(pack<T>* x, index n, const pack<T>& label) const {
    using V = pack<T>;
    using W = pack<double>;
    const W zero(0), one(1), inf(std::numeric_limits<double>::infinity()), inverse(1 / lambda);
    const short_rivals<T> rivals(x, n, label);
    const W own = first_rows(rivals.own), highest = first_rows(rivals.top);
    const auto masked = own == -inf;
    const W has_label = select(masked, zero, one);
    const W of_from = select(masked, highest, own);
    const W from = select(of_from == -inf, zero, of_from) - margin;
    const W lost =
        first_rows(rivals.spoilt) + select((highest == inf) | (own == inf), inf - inf, zero);

    V order[most_short_columns];
    largest_by_lane(x, n, k, order);
    W found(0);
    for (index i = 0; i < k; ++i)
      found += select(first_rows(order[i]) > -inf, one, zero);
    const W left = min(W(static_cast<double>(k)), found + has_label);
    const auto none = left == zero;
    const W most = select(none, one, left), top = most - one;
    W last(0);
    for (index i = 0; i < k; ++i)
      last = select(top == W(static_cast<double>(i + 1)), first_rows(order[i]), last);
    const auto label_in_top =
        (has_label > zero) & (top > zero) & ((found < top) | (last - from < zero));
    const auto label_below = (has_label > zero) & !label_in_top;
    const W held = select(label_in_top, top - one, top);
    W next = -inf, margins[most_short_columns], label_left = select(label_in_top, zero, -inf);
    for (index i = 0; i < k; ++i) { // those among the top in falling order, and what comes next
      const W at(static_cast<double>(i)), score = first_rows(order[i]);
      next = select(held == at, score, next);
      const W d = select(at < held, score - from, -inf);
      margins[i] = max(d, label_left);
      label_left = min(d, label_left);
    }
    // Those that are not: L as r + log(1 + X).
    const auto has_next = next > -inf;
    const W edge = select(has_next, next, zero);
    W images(-1), r = select(has_next, (edge - from) * inverse, -inf);
    for (index j = 0; j < n; ++j) {
      const W d = (rivals.score(j) - edge) * inverse;
      images += exp_to<T>(select(d > zero, -inf, d));
    }
    for (index i = 0; i < k; ++i) // what is as large, but among the top
      images +=
          select((W(static_cast<double>(i)) < held) & (first_rows(order[i]) == edge), -one, zero);
    W others = max(zero, images);
    const auto label_leads = label_below & !(r > zero);
    const W of_next = select(has_next, others + one, zero);
    others = select(label_below, select(label_leads, of_next * exp(r), others + exp(-r)), others);
    r = select(label_leads, zero, r);

    W at_cap = top, open = one;
    for (index i = k - 1; i > 0; --i) {
      const W here(static_cast<double>(i)), d = margins[i - 1] * inverse;
      const W with = (others + one) * exp_to<T>(r - d);
      const auto tried = (open > zero) & !(here > top);
      const auto stops = tried & (most - (here - one) > with + one);
      const auto goes = tried & !stops;
      open = select(stops, zero, open);
      others = select(goes, with, others);
      r = select(goes, d, r);
      at_cap = select(goes, here - one, at_cap);
    }
    W sum(0), first(0);
    for (index i = 0; i < k; ++i) {
      const W here(static_cast<double>(i));
      sum += select(here < at_cap, margins[i], zero);
      first = select(here == at_cap, margins[i] + from, first);
    }
    const W below = r + log1p(others), part = at_cap / most, free = (most - at_cap) / most;
    const W size(std::log(static_cast<double>(n)));
    const W value = sum / most + lambda * part * (log(most) - size) +
                    free * lambda * (below - size - log(free));
    const W share = min(one / most, free * exp(-below));
    const W miss = select(masked, one, select(most == one, -expm1(-below), one - share));
    const W label_or_next = select(label_below | !has_next, max(next, from), next);
    const W near = first_rows(to_lanes<V>(select(at_cap < top, first, label_or_next)));
    const W factor = free * exp((near - from) * inverse - below);
    return solutions(lost, {select(masked | none, inf, value), select(none, -one, -miss),
                            select(none, zero, near), select(none, zero, one / most),
                            select(none, zero, factor)});
  }

private:
  /// Into n numbers in falling order.
  static void insert(double number, double* d, index n) {
    double* const at = std::upper_bound(d, d + n, number, std::greater<>());
    std::copy_backward(at, d + n, d + n + 1);
    *at = number;
  }
};

} // namespace core

/// LDR-k-KL: LDR-KL whose distribution may not lean on any class by more than 1/k, so that up to k
/// classes may be right,
///
///   ℓ = max { Σ_c q_c δ_c − λ KL(q ‖ 1/K) : q ∈ simplex, q_c ≤ 1/k }
///   δ_c = x_c − x_y + margin for c ≠ y,  δ_y = 0
///   ∂ℓ/∂x = q − e_y,   q_c = min(1/k, s e^{δ_c/λ})
///
/// k = 1: ldr_kl.  k = K: the average margin.  λ → 0: top_k_hinge. Not bounded below for k > 1: a
/// label that leads pushes others down.
/// Masked classes (-inf) have no share; where fewer than k are left, their number takes the place
/// of k. A masked label costs +inf, with slope −1. +inf or NaN makes the row NaN.
/// Shapes, reductions, errors: as cross_entropy; k must not exceed the number of classes. No
/// by-products but `values`. Needs whole rows, so not on the linear head.
/// Source: Zhu, Ying, Yang, "Label distributionally robust losses for multi-class classification",
/// ICML 2023.
template <class T = float> class ldr_k_kl : public row_loss<ldr_k_kl<T>, T> {
public:
  struct options {
    index k = 1;  ///< from 1 to the number of classes
    T lambda = 1; ///< λ > 0, and 1/λ finite
    T margin = 0; ///< finite: added to x_c − x_y of c ≠ y
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "ldr_k_kl";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = false,
                                      .shift_invariant = true};

  ldr_k_kl() : ldr_k_kl(options{}) {}
  explicit(false) ldr_k_kl(const options& o) : options_(o) {
    core::require(o.k >= 1, name, "k", o.k, "1 or more");
    core::require(o.lambda > 0 && std::isfinite(o.lambda) && std::isfinite(1 / o.lambda), name,
                  "lambda", o.lambda, "a finite number above 0 whose inverse is finite");
    core::require(std::isfinite(o.margin), name, "margin", o.margin, "a finite number");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<ldr_k_kl<T>, T>;
  void check(const core::row_job<T>& job) const {
    core::require(options_.k <= job.scores.cols, name, "k", options_.k,
                  "at most the number of classes");
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::ldr_k_kl_formula<T>{{},
                                static_cast<double>(options_.lambda),
                                static_cast<double>(options_.margin),
                                options_.k});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
