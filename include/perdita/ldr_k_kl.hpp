// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Of all but the m that are at the cap, with b the largest of these rivals, S = Σ e^{(x − b)/λ} of
/// them and g = (b − x_y + margin)/λ:
///   p_k = min(1/k, (1 − m/k) e^{(x_k − b)/λ} / (S + e^−g)),  log Σ e^{δ/λ} = g + log(S + e^−g)
/// m is the smallest number for which nothing else is above the cap: 1 − m/k ≤ 1/k Σ e^{(δ − d)/λ}
/// with the largest δ for d. Rivals are compared with rivals and not by their margins over the
/// label, which have no digits for what is far closer than that.
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
    const bool has_label = own > -inf;
    const auto over_label = [&](double score) { return (score - own) + margin; };
    index found = !rivals.all_masked();
    if (k > 1)
      found = rivals.largest(k, parts, d).chosen;
    else
      d[0] = static_cast<double>(rivals.top);
    const index left = std::min(k, found + has_label);
    if (left == 0)
      return solution(inf, -1);
    const auto most = static_cast<double>(left); // at the cap, at the most
    index at_cap = left - 1;
    bool label_at_cap = has_label && at_cap > 0 && over_label(d[at_cap - 1]) < 0;
    index held = at_cap - label_at_cap; // rivals among them
    double sum = 0, top = 0;            // of the rivals below
    if (held < found) {
      top = d[held];
      const auto ties = static_cast<double>(std::count(d, d + held, top));
      sum = std::fmax(1, rivals.sum_of_images(static_cast<T>(top), 1 / lambda) - ties);
    }
    for (; at_cap > 0; --at_cap) { // the least at the cap, unless it would be above it
      const bool is_label = label_at_cap && (held == 0 || !(over_label(d[held - 1]) < 0));
      double with = sum, all; // on its own scale
      if (is_label) {
        all = 1 + (sum > 0 ? sum * std::exp(over_label(top) / lambda) : 0);
      } else {
        with = 1 + (sum > 0 ? sum * std::exp((top - d[held - 1]) / lambda) : 0);
        all = with;
        if (has_label && !label_at_cap)
          all += std::exp(-over_label(d[held - 1]) / lambda);
      }
      if (most - static_cast<double>(at_cap - 1) > all)
        break;
      sum = with;
      if (is_label)
        label_at_cap = false;
      else
        top = d[--held];
    }
    // Of the rivals and of the label, on the larger one's scale.
    const bool label_below = has_label && !label_at_cap;
    const double gap = sum > 0 ? over_label(top) / lambda : -inf;
    const double e = label_below ? std::exp(-std::fabs(gap)) : 0;
    const bool label_leads = label_below && !(gap > 0);
    const double against = label_leads ? sum * e : sum, own_image = label_leads ? 1 : e;
    const double part = static_cast<double>(at_cap) / most;
    const double free = (most - static_cast<double>(at_cap)) / most, all = against + own_image;
    double of_cap = 0; // Σ δ/k of those at the cap
    for (index i = 0; i < held; ++i)
      of_cap += over_label(d[i]) / most;
    const double size = std::log(static_cast<double>(n));
    const double log_all = std::log1p(label_leads ? against : (sum - 1) + own_image);
    const double value =
        of_cap + lambda * part * (std::log(most) - size) +
        free * ((label_leads ? 0 : over_label(top)) + lambda * (log_all - size - std::log(free)));
    const double miss = label_at_cap ? 1 - 1 / most : (against + part * own_image) / all;
    double near = top, factor = sum > 0 ? free / all * (label_leads ? e : 1) : 0;
    // Where those below have slopes too small for T, only what is at the cap counts.
    if (held > 0 && !(factor >= std::numeric_limits<T>::min())) {
      near = d[held - 1];
      factor = 1 / most;
    }
    return solution(has_label ? value : inf, -miss, near, 1 / most, factor);
  }
  /// The same, a row in each lane.
  summary<solved_row, pack<double>> solve_rows(pack<T>* x, index n, const pack<T>& label) const {
    using V = pack<T>;
    using W = pack<double>;
    const W zero(0), one(1), inf(std::numeric_limits<double>::infinity()), inverse(1 / lambda);
    const short_rivals<T> rivals(x, n, label);
    const W own = first_rows(rivals.own), highest = first_rows(rivals.top);
    const auto masked = own == -inf;
    const W has_label = select(masked, zero, one), of_label = select(masked, zero, own);
    const W lost =
        first_rows(rivals.spoilt) + select((highest == inf) | (own == inf), inf - inf, zero);
    const auto over_label = [&](const W& score) __attribute__((always_inline)) {
      return (score - of_label) + margin;
    };

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
    const auto label_in_top = !masked & (top > zero) & (over_label(last) < zero);
    W label_at_cap = select(label_in_top, one, zero), held = top - label_at_cap;
    // Those among the top in falling order, and the rival that comes next.
    W first[most_short_columns], is_label[most_short_columns], next = -inf;
    W moved = own, label_left = label_at_cap;
    for (index i = 0; i < k; ++i) {
      const W score = first_rows(order[i]);
      next = select(held == W(static_cast<double>(i)), score, next);
      const auto behind_label = label_in_top & (over_label(score) < zero);
      first[i] = select(behind_label, moved, score);
      is_label[i] = select(behind_label, label_left, zero);
      moved = select(behind_label, score, moved);
      label_left = label_left - is_label[i];
    }
    const auto has_next = next > -inf;
    const W edge = select(has_next, next, zero);
    W images(0);
    for (index j = 0; j < n; ++j) {
      const W d = (rivals.score(j) - edge) * inverse;
      images += exp_to<T>(select(d > zero, -inf, d));
    }
    for (index i = 0; i < k; ++i) // what is as large, but among the top
      images +=
          select((W(static_cast<double>(i)) < held) & (first_rows(order[i]) == edge), -one, zero);
    W sum = select(has_next, max(one, images), zero), largest = edge;
    W at_cap = top, open = one;
    for (index i = k - 1; i > 0; --i) {
      const W here(static_cast<double>(i)), &from = first[i - 1];
      const auto is = is_label[i - 1] > zero;
      const W fall = exp_to<T>(min(zero, (largest - from) * inverse));
      const W apart = select(is, over_label(largest), -over_label(from)) * inverse;
      const W beside = exp_to<T>(min(zero, apart));
      const W with = select(is, sum, sum * fall + one);
      const W with_label = select(masked | (label_at_cap > zero), with, with + beside);
      const W all = select(is, sum * beside + one, with_label);
      const auto tried = (open > zero) & !(here > top);
      const auto stops = tried & (most - (here - one) > all);
      const auto goes = tried & !stops;
      open = select(stops, zero, open);
      sum = select(goes, with, sum);
      largest = select(goes & !is, from, largest);
      held = held - select(goes & !is, one, zero);
      label_at_cap = select(goes & is, zero, label_at_cap);
      at_cap = select(goes, here - one, at_cap);
    }
    // Of the rivals and of the label, on the larger one's scale.
    const auto has_rival = sum > zero;
    const auto label_below = !masked & (label_at_cap == zero);
    const W gap = over_label(largest) * inverse;
    const auto leads = label_below & !(has_rival & (gap > zero));
    const W e = select(label_below & has_rival, exp_to<T>(-abs(gap)), zero);
    const W against = select(leads, sum * e, sum), own_image = select(leads, one, e);
    const W each = one / most, part = at_cap * each, free = (most - at_cap) / most;
    const W all = against + own_image;
    W of_cap(0), least = zero;
    for (index i = 0; i < k; ++i) {
      const W here(static_cast<double>(i)), score = first_rows(order[i]);
      of_cap += select(here < held, over_label(score) * each, zero);
      least = select(here < held, score, least);
    }
    const W size(std::log(static_cast<double>(n)));
    const W log_all = log1p(select(leads, against, (sum - one) + own_image));
    const W value =
        of_cap + lambda * part * (log(most) - size) +
        free * (select(leads, zero, over_label(largest)) + lambda * (log_all - size - log(free)));
    const W miss = select(label_at_cap > zero, one - each, (against + part * own_image) / all);
    const W share = select(has_rival, free / all * select(leads, e, one), zero);
    const auto from_rest = (held == zero) | (share >= W(std::numeric_limits<T>::min()));
    const W near = select(from_rest, largest, least), factor = select(from_rest, share, each);
    return solutions(lost, {select(masked | none, inf, value), select(none, -one, -miss),
                            select(none, zero, near), select(none, zero, each),
                            select(none, zero, factor)});
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
    core::invertible<T>(name, "lambda", o.lambda);
    core::finite(name, "margin", o.margin);
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
