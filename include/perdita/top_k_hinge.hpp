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
  template <class V> auto slopes(const double* c) const {
    return [upper = V(static_cast<T>(c[0])), lower = V(static_cast<T>(c[1])),
            share = V(static_cast<T>(c[2])), each = V(T(1) / static_cast<T>(k))](const V& x) {
      return select(x > upper, each, select(x >= lower, share, V(0))) + (share - share);
    };
  }
  row_solution solve(const T* x, index n, index y, double* order) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const auto label = static_cast<double>(x[y]);
    const auto gap = [&](double at) {
      return static_cast<double>((static_cast<T>(at) - x[y]) + margin);
    };
    index rivals = 0, above = 0, equal = 0; // not masked; over the label, and as good
    bool lost = label != label;
    for (index i = 0; i < n; ++i) {
      const auto at = static_cast<double>(x[i]);
      if (i == y || at == -inf)
        continue;
      order[rivals++] = at;
      const double g = gap(at);
      lost = lost || g != g;
      above += g > 0;
      equal += g == 0;
    }
    const index left = rivals + (label > -inf), most = std::min(k, left);
    if (lost)
      return no_solution();
    if (left == 0)
      return solution(inf, -1);
    const auto count = static_cast<double>(most);
    const auto share = [&](index before, index ties) {
      return (count - static_cast<double>(before)) / (count * static_cast<double>(ties));
    };
    const bool counted = label > -inf && above < most; // the label is one of them
    const index chosen = counted ? most - 1 : most;
    std::partial_sort(order, order + chosen, order + rivals, std::greater<>());
    double sum = 0;
    for (index i = 0; i < chosen; ++i)
      sum += gap(order[i]);
    const double value = sum / count;
    if (left < k)
      return solution(value, (counted ? 1 / count : 0) - 1, inf, least, 1 / count);
    if (counted && above + equal + 1 >= most) { // and the last
      const double part = share(above, equal + 1);
      double upper = least, lower = inf;
      for (index i = 0; i < rivals; ++i) {
        const double g = gap(order[i]);
        upper = g <= 0 ? std::fmax(upper, order[i]) : upper;
        lower = g == 0 ? std::fmin(lower, order[i]) : lower;
      }
      return solution(value, part - 1, upper, lower, part);
    }
    const double edge = order[chosen - 1];
    const auto better = std::count_if(order, order + rivals, [=](double o) { return o > edge; });
    const auto ties = std::count(order, order + rivals, edge);
    return solution(value, (counted ? 1 / count : 0) - 1, edge, edge,
                    share(static_cast<index>(better) + counted, static_cast<index>(ties)));
  }

private:
  static constexpr double least = static_cast<double>(std::numeric_limits<T>::lowest());
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
    index k = 1; ///< from 1 to the number of classes
    T margin = 1;
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
    core::require(std::isfinite(o.margin), name, "margin", o.margin, "a finite number");
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
