// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Rivals are put in order by their scores: margins that rounding makes equal are no ties. Only the
/// label, whose margin is 0, is told apart from them by margins.
template <class T> struct top_k_hinge_formula : solved_formula {
  T margin;
  index k;

  /// c: scores above c[0] have 1/k, those from c[1] to c[0] have c[2].
  template <class V, class C> auto slopes(const C* c) const {
    return [
      upper = to_lanes<V>(c[0]), lower = to_lanes<V>(c[1]), share = to_lanes<V>(c[2]),
      each = V(T(1) / static_cast<T>(k))
    ](const V& x) __attribute__((always_inline)) {
      return select(x > upper, each, select(x >= lower, share, V(0))) + (share - share);
    };
  }
  row_solution solve(const T* x, index n, index y, double* order) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    part_maxima<T> parts(n, k, order);
    const rival_scores<T> rivals(x, n, y, parts);
    const bool has_label = x[y] > -std::numeric_limits<T>::infinity();
    const T gap_of_top = (rivals.top - x[y]) + margin;
    if (rivals.spoilt || (!rivals.all_masked() && gap_of_top != gap_of_top))
      return no_solution();
    const auto [found, gathered] = rivals.largest(k, parts, order);
    const index most = std::min(k, found + has_label);
    if (most == 0)
      return solution(inf, -1);
    const auto gap = [&](double at) {
      return static_cast<double>((static_cast<T>(at) - x[y]) + margin);
    };
    const auto count = static_cast<double>(most);
    const auto share = [&](index before, index ties) {
      return (count - static_cast<double>(before)) / (count * static_cast<double>(ties));
    };
    // The label is one of them where fewer than `most` rivals are above it, and the last of them
    // where no others are below it.
    const bool counted = has_label && (found < most || gap(order[most - 1]) <= 0);
    const index chosen = counted ? most - 1 : most;
    double sum = 0;
    for (index i = 0; i < chosen; ++i)
      sum += gap(order[i]);
    double value = sum / count;
    if (!std::isfinite(value)) [[unlikely]]
      value = small_mean(order, chosen, count, static_cast<double>(x[y]));
    if (most < k)
      return solution(value, (counted ? 1 / count : 0) - 1, inf, least, 1 / count);
    if (counted && (chosen == 0 || gap(order[chosen - 1]) >= 0)) {
      const label_edge edge = around_label(rivals, x[y]);
      const double part = share(edge.above, edge.equal + 1);
      return solution(value, part - 1, edge.upper, edge.lower, part);
    }
    const double edge = order[chosen - 1];
    const index equal = std::count(order, order + gathered, edge);
    const index above = std::find(order, order + chosen, edge) - order;
    return solution(value, (counted ? 1 / count : 0) - 1, edge, edge,
                    share(above + counted, equal));
  }
  /// The same, a row in each lane.
  summary<solved_row, pack<double>> solve_rows(pack<T>* x, index n, const pack<T>& label) const {
    using V = pack<T>;
    using W = pack<double>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    const V zero(0), one(1), nothing(-inf), all(static_cast<T>(k));
    const short_rivals<T> rivals(x, n, label);
    const auto gap = [&](const V& z) { return (z - rivals.own) + V(margin); };
    V order[most_short_columns], found(0), last(0);
    largest_by_lane(x, n, k, order);
    for (index i = 0; i < k; ++i)
      found += select(order[i] > nothing, one, zero);
    const V has_label = select(rivals.own > nothing, one, zero), most = min(all, found + has_label);
    for (index i = 0; i < k; ++i)
      last = select(most == V(static_cast<T>(i + 1)), order[i], last);
    const V counted =
        select((has_label > zero) & ((found < most) | (gap(last) <= zero)), one, zero);
    const V chosen = most - counted;
    W sum(0);
    V edge(0);
    for (index i = 0; i < k; ++i) {
      const auto here = chosen > V(static_cast<T>(i));
      sum += first_rows(select(here, gap(order[i]), zero));
      edge = select(here, order[i], edge);
    }
    V above(0), equal(0), above_label(0), equal_label(0);
    V upper(std::numeric_limits<T>::lowest()), lower(inf);
    for (index j = 0; j < n; ++j) {
      const V z = x[j], g = gap(z);
      above += select(z > edge, one, zero);
      equal += select(z == edge, one, zero);
      above_label += select(g > zero, one, zero);
      equal_label += select(g == zero, one, zero);
      upper = max(upper, select(g > zero, nothing, z));
      lower = min(lower, select(g == zero, z, V(inf)));
    }
    const auto few = most < all, whole = !few;
    const auto by_label = whole & (counted > zero) & ((chosen == zero) | (gap(edge) >= zero));
    const W count = first_rows(most),
            of_label = select(first_rows(counted) > W(0), 1 / count, W(0));
    const W before = first_rows(select(by_label, above_label, above + counted));
    const W ties = first_rows(select(by_label, equal_label + one, equal));
    const W share = select(first_rows(most) < W(static_cast<double>(k)), 1 / count,
                           (count - before) / (count * ties));
    const W own_share = select(first_rows(select(by_label, one, zero)) > W(0), share, of_label);
    const auto none = count == W(0);
    W value = sum / count;
    const auto beyond = !(abs(value) < W(std::numeric_limits<double>::infinity()));
    if (any(beyond)) [[unlikely]] { // as small_mean()
      W sum_of_small(0);
      for (index i = 0; i < k; ++i)
        sum_of_small +=
            select(first_rows(chosen) > W(static_cast<double>(i)),
                   small_gap(first_rows(order[i]), first_rows(rivals.own), margin), W(0));
      value = select(beyond, sum_of_small / count / downscale, value);
    }
    const V of_top = gap(rivals.top);
    const V lost = select((rivals.top > nothing) & is_nan(of_top), of_top, rivals.spoilt);
    return solutions(first_rows(lost),
                     {select(none, W(inf), value), select(none, W(0), own_share) - 1,
                      first_rows(select(few, V(inf), select(by_label, upper, edge))),
                      first_rows(select(few, V(std::numeric_limits<T>::lowest()),
                                        select(by_label, lower, edge))),
                      select(none, W(0), share)});
  }

private:
  /// The value where differences, or their sum, may have overflowed alone.
  PERDITA_NOINLINE double small_mean(const double* order, index chosen, double count,
                                     double own) const {
    double sum = 0;
    for (index i = 0; i < chosen; ++i)
      sum += small_gap(order[i], own, margin);
    return sum / count / downscale;
  }
  static constexpr double least = static_cast<double>(std::numeric_limits<T>::lowest());

  /// How many rivals are above the label and as good as it, and the largest of those that are not
  /// above it and the smallest of those that are as good.
  struct label_edge {
    index above, equal;
    double upper, lower;
  };
  label_edge around_label(const rival_scores<T>& rivals, T own) const {
    using V = pack<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    const V zero(0), one(1), label(own), width(margin);
    V above(0), equal(0), upper(std::numeric_limits<T>::lowest()), lower(inf);
    rivals.each([&](const V& z, index) __attribute__((always_inline)) {
      const V gap = (z - label) + width;
      const auto ties = gap == zero;
      above += select(gap > zero, one, zero);
      equal += select(ties, one, zero);
      upper = max(upper, select(gap > zero, V(-inf), z));
      lower = min(lower, select(ties, z, V(inf)));
    });
    return {total_count(above), total_count(equal), static_cast<double>(max_lanes(upper)),
            -static_cast<double>(max_lanes(-lower))};
  }
};

} // namespace core

/// Top-k hinge: a label need only be among the k best,
///
///   ℓ = the mean of the k largest of δ_c = x_c − x_y + margin (c ≠ y) and δ_y = 0
///   ∂ℓ/∂x = q − e_y,   q_c = 1/k for the k largest; what is equal to the k-th shares its part
///
/// k = 1: crammer_singer. The limit λ → 0 of ldr_k_kl. Not bounded below for k > 1.
/// Masked classes (-inf) do not count; where fewer than k are left, their number takes the place of
/// k. A masked label costs +inf. A NaN, or the label and a rival of +inf, makes the row NaN.
/// Shapes, reductions, errors: as cross_entropy; k must not exceed the number of classes. No
/// by-products but `values`. Needs whole rows, so not on the linear head.
/// Source: Lapin, Hein, Schiele, "Top-k multiclass SVM", NIPS 2015 (there with max(0, ·), which is
/// implied for k = 1 only).
template <class T = float> class top_k_hinge : public row_loss<top_k_hinge<T>, T> {
public:
  struct options {
    index k = 1;  ///< from 1 to the number of classes
    T margin = 1; ///< finite: added to x_c − x_y of c ≠ y
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "top_k_hinge";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = false,
                                      .shift_invariant = true};

  top_k_hinge() : top_k_hinge(options{}) {}
  explicit(false) top_k_hinge(const options& o) : options_(o) {
    core::require(o.k >= 1, name, "k", o.k, "1 or more");
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<top_k_hinge<T>, T>;
  void check(const core::row_job<T>& job) const {
    core::require(options_.k <= job.scores.cols, name, "k", options_.k,
                  "at most the number of classes");
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::top_k_hinge_formula<T>{{}, options_.margin, options_.k});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
