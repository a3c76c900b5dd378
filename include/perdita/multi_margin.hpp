// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/integral_data.hpp"
#include "core/paired_kernel.hpp"
#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"
#include "core/weighted.hpp"
#include "weston_watkins.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With the gaps of Weston and Watkins: their squares too, and a factor for each label.
template <class T> struct multi_margin_formula : weston_watkins_formula<T> {
  bool squared;
  const T* class_weights; ///< all 1 if not given

  /// What the slope is proportional to: 1, or the gap; 0 where there is none, or it is NaN.
  template <class V> PERDITA_INLINE V step(const V& gap) const {
    return select(gap > V(0), squared ? gap : V(1), V(0));
  }
  template <class V, class C> auto slopes(const C* c) const {
    return [this, label = to_lanes<V>(c[0]), lost = to_lanes<V>(c[1]), factor = to_lanes<V>(c[2])](
               const V& x) { return weighted(factor, step(this->gap(x, label))) + lost; };
  }
  row_solution solve(const T* x, index n, index y, double*) const {
    using V = pack<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    constexpr auto width = static_cast<index>(lanes<T>);
    wide_lanes<T> value, steps;
    value.clear();
    steps.clear();
    for_packs(x, n, -inf, [&](const V& at, index i) {
      V g = this->gap(at, V(x[y]));
      if (y >= i && y < i + width)
        g = select(iota<T>() == V(static_cast<T>(y - i)), V(0), g);
      const V s = step(g);
      value.add(select(g <= V(0), V(0), squared ? g * g : g)); // NaN shows
      steps.add(s);
    });
    const double label = static_cast<double>(x[y]), total = value.total();
    const double sum = total + (label == label ? 0 : label), lost = sum == sum ? 0 : sum;
    const double weight = class_weights ? static_cast<double>(class_weights[y]) : 1;
    const double share = weight / static_cast<double>(n), factor = squared ? 2 * share : share;
    double mean = times(share, sum);
    if (total == std::numeric_limits<double>::infinity() && !squared) [[unlikely]]
      mean = times(share, this->small_sum(x, n, y)) / downscale;
    return solution(mean + lost, lost - times(factor, steps.total()), label, lost, factor);
  }
  /// The same, a row in each lane.
  summary<solved_row, pack<double>> solve_rows(pack<T>* x, index n, const pack<T>& label) const {
    using V = pack<T>;
    using W = pack<double>;
    const short_rivals<T> rivals(x, n, label);
    W total(0), steps(0);
    for (index j = 0; j < n; ++j) {
      const V g = this->gap(x[j], rivals.own);
      total += first_rows(select(g <= V(0), V(0), squared ? g * g : g)); // NaN shows
      steps += first_rows(step(g));
    }
    alignas(64) T of_label[lanes<T>];
    alignas(64) double weight[finish_rows];
    label.store(of_label);
    for (index i = 0; i < finish_rows; ++i)
      weight[i] =
          class_weights ? static_cast<double>(class_weights[static_cast<index>(of_label[i])]) : 1;
    const W own = first_rows(rivals.own), zero(0);
    const W sum = total + select(is_nan(own), own, zero), lost = select(is_nan(sum), sum, zero);
    const W share = W::load(weight) / W(static_cast<double>(n));
    const W factor = squared ? 2 * share : share;
    W mean = weighted(share, sum);
    const auto beyond = total == W(std::numeric_limits<double>::infinity());
    if (any(beyond) && !squared) [[unlikely]]
      mean = select(beyond, weighted(share, this->small_sums(rivals)) / downscale, mean);
    return solutions(zero, {mean + lost, lost - weighted(factor, steps), own, lost, factor});
  }
};

template <class Y>
concept class_lists_like =
    matrix_like<Y> && std::signed_integral<std::remove_const_t<typename element_of<Y>::type>>;

/// A row of n class numbers, which the first negative one ends, as a row of ones and zeros.
template <class L, class T>
void read_class_list(const unsigned char* p, index stride, index n, T* out) {
  const L* list = reinterpret_cast<const L*>(p);
  std::fill_n(out, n, T(0));
  for (index i = 0; i < n && list[i * stride] >= 0; ++i)
    out[list[i * stride]] = T(1);
}
/// Scores in double, of which those with a target above 0 are relevant.
struct multilabel_margin_formula {
  static constexpr bool paired = true;
  double margin;

  double operator()(const double* x, const double* target, index n, index, double* slopes) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    double *relevant = slopes + n, *others = relevant + n;
    index hits = 0, misses = 0;
    double spoilt = 0; // NaN where a number is
    for (index i = 0; i < n; ++i) {
      spoilt += (x[i] == x[i] ? 0 : x[i]) + (target[i] == target[i] ? 0 : target[i]);
      (target[i] > 0 ? relevant[hits++] : others[misses++]) = x[i];
    }
    std::sort(relevant, relevant + (spoilt == spoilt ? hits : 0));
    std::sort(others, others + (spoilt == spoilt ? misses : 0));
    const double least = hits > 0 ? relevant[0] : inf,
                 most = misses > 0 ? others[misses - 1] : -inf;
    if (spoilt != spoilt || (most == inf && hits > 0 && relevant[hits - 1] == inf)) {
      std::fill_n(slopes, n, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    const double share = 1 / static_cast<double>(n);
    for (index i = 0; i < n; ++i) {
      const auto above = [&](double b) { return !(b + margin > x[i]); };
      const auto count =
          target[i] > 0 ? others + misses - std::partition_point(others, others + misses, above)
                        : std::lower_bound(relevant, relevant + hits, x[i] + margin) - relevant;
      slopes[i] = static_cast<double>(target[i] > 0 ? -count : count) * share;
    }
    if (most == inf && least < inf) // not inf less inf in the sum
      return inf;
    return share * sum(relevant, hits, others, misses);
  }

private:
  /// Σ max(0, c + b − a), both sorted: what it is for a b grows from that of the one before, by
  /// nothing below 0.
  double sum(const double* relevant, index hits, const double* others, index misses) const {
    exact_sum total, of_one;
    double before = 0;
    index below = 0;
    for (index i = 0; i < misses; ++i) {
      const double reach = others[i] + margin;
      if (below > 0)
        of_one.add(static_cast<double>(below) * (reach - before));
      for (; below < hits && relevant[below] < reach; ++below)
        of_one.add(reach - relevant[below]);
      total.add(of_one.value());
      before = reach;
    }
    return total.value();
  }
};

} // namespace core

/// Multi-class margin loss, as PyTorch's multi_margin_loss, of K classes:
///
///   ℓ = (w_y/K) Σ_{k≠y} h_k^p,  h_k = max(0, c + x_k − x_y),  p = 1 or 2
///   ∂ℓ/∂x_k = (w_y/K) p h_k^{p−1} [h_k > 0],  ∂ℓ/∂x_y = −(their sum)
///
/// p = 1 without weights is weston_watkins divided by K. Weights scale the value, and do not count
/// in the denominator of the mean, which is that of cross_entropy without class weights.
/// Masked classes (-inf) are no rivals, but count in K; a masked label costs +inf, as a rival of
/// +inf does, unless its weight is 0 or no rival is left. NaN, or +inf at the label and elsewhere,
/// makes the row NaN. On the kink the slope is 0. h² is formed in T, and infinite where it
/// overflows.
/// Shapes, reductions, errors: as cross_entropy. No by-products but `values`. Needs whole rows, so
/// not on the linear head.
///
/// PyTorch's multilabel_soft_margin_loss is bce_logits (margin.hpp) of a matrix, whose mean is over
/// all elements; its weights are those of the call.
/// Source: Weston and Watkins, "Support vector machines for multi-class pattern recognition", 1999;
/// squares: Lee and Lin, "A study on L2-loss (squared hinge-loss) multiclass SVM", 2013.
template <class T = float> class multi_margin : public row_loss<multi_margin<T>, T> {
public:
  struct options {
    int p = 1;                            ///< 1 or 2
    T margin = 1;                         ///< c
    vector_view<const T> class_weights{}; ///< w ≥ 0, one per class; all 1 if not given. Copied.
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "multi_margin";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  multi_margin() : multi_margin(options{}) {}
  explicit(false) multi_margin(const options& o) : options_(o) {
    core::require(o.p == 1 || o.p == 2, name, "p", o.p, "1 or 2");
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
    core::require_memory(name, "class_weights", o.class_weights.data, o.class_weights.size);
    for (index i = 0; i < o.class_weights.size; ++i) {
      const T w = o.class_weights[i];
      if (!(w >= 0 && std::isfinite(w)))
        core::fail_at(name, "class_weights", i, core::to_text(w), "a finite number, 0 or more");
      class_weights_.push_back(w);
    }
    options_.class_weights = {}; // the caller's memory is not kept
  }
  /// The options, without the view: the copy of that is class_weights().
  const options& settings() const { return options_; }
  const std::vector<T>& class_weights() const { return class_weights_; }

  constexpr loss_traits traits() const {
    return {.convex = true,
            .smooth = options_.p == 2,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

private:
  friend row_loss<multi_margin<T>, T>;
  void check(const core::row_job<T>& job) const {
    if (!class_weights_.empty() && static_cast<index>(class_weights_.size()) != job.scores.cols)
      core::fail(name, "size of class_weights", core::to_text(class_weights_.size()),
                 core::to_text(job.scores.cols) + " (the number of classes)");
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::multi_margin_formula<T>{{{}, options_.margin},
                                    options_.p == 2,
                                    class_weights_.empty() ? nullptr : class_weights_.data()});
  }
  options options_;
  std::vector<T> class_weights_;
};

/// Multi-label margin loss, as PyTorch's multilabel_margin_loss: every relevant class should be
/// above every other by the margin c. Of K classes, with R those whose target is above 0:
///
///   ℓ = (1/K) Σ_{a∈R} Σ_{b∉R} max(0, c + x_b − x_a)
///   ∂ℓ/∂x_b = |{a : c + x_b > x_a}|/K,  ∂ℓ/∂x_a = −|{b : c + x_b > x_a}|/K
///
/// The target is rows × classes, of one of two kinds: numbers of T (or 16-bit storage), above 0 for
/// the relevant classes (1, say) and 0 for the others; or, as in PyTorch, of a signed integral
/// type, the list of the relevant classes' numbers in any order, which the first negative number
/// ends (what comes after it is of no effect). A class that is listed twice counts once (in
/// PyTorch: twice).
///
/// Where all classes are relevant, or none, the loss is 0. With one it is multi_margin. Takes
/// K log K operations a row, in double; on the kink the slope is 0.
/// Masked classes (-inf) that are not relevant do not count, but in K; a relevant one costs +inf
/// unless all others are masked, as another one of +inf does. NaN, or +inf on both sides, makes the
/// row NaN. Shapes, reductions, errors: as cross_entropy with soft targets; a listed class that
/// does not exist throws. No by-products but `values`. Needs whole rows, so not on the linear head.
/// Source: Elisseeff and Weston, "A kernel method for multi-labelled classification", 2001.
template <class T = float> class multilabel_margin : public row_loss<multilabel_margin<T>, T> {
public:
  struct options {
    T margin = 1; ///< c
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< without effect: there are no labels
  };
  static constexpr const char* name = "multilabel_margin";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  multilabel_margin() : multilabel_margin(options{}) {}
  explicit(false) multilabel_margin(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value. `target` is a matrix of numbers or of lists.
  template <class X, class Y>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& target,
                                                const call_options<T>& call = {}) const {
    if constexpr (core::class_lists_like<Y>)
      return of_lists<false>(core::as_matrix(scores), core::as_matrix(target), matrix_view<T>(),
                             call);
    else
      return row_loss<multilabel_margin<T>, T>::operator()(scores, target, call);
  }
  /// The reduced value, and its gradient with respect to the scores.
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& target, G&& gradient, const call_options<T>& call = {}) const {
    if constexpr (core::class_lists_like<Y>)
      return of_lists<true>(core::as_matrix(scores), core::as_matrix(target),
                            core::as_matrix(gradient), call);
    else
      return row_loss<multilabel_margin<T>, T>::operator()(scores, target, gradient, call);
  }

private:
  friend row_loss<multilabel_margin<T>, T>;
  void check(const core::row_job<T>& job) const {
    if (job.labels && job.scores.rows > 0)
      core::fail(name, "target", "labels", "rows × classes, above 0 where a class is relevant");
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::multilabel_margin_formula{static_cast<double>(options_.margin)});
  }
  template <bool Gradient, class S, class L, class G>
  T of_lists(const matrix_view<S>& scores, const matrix_view<L>& lists,
             const matrix_view<G>& gradient, const call_options<T>& call) const {
    this->check_size("target rows", lists.rows, scores.rows);
    this->check_size("target columns", lists.cols, scores.cols);
    this->require_memory("target", lists.data, lists.rows * lists.cols);
    for (index r = 0; r < lists.rows; ++r)
      for (index i = 0; i < lists.cols && lists(r, i) >= 0; ++i)
        if (static_cast<std::int64_t>(lists(r, i)) >= scores.cols)
          core::fail_at(name, "target", r * lists.cols + i, core::to_text(lists(r, i)),
                        "0 to " + core::to_text(scores.cols - 1) + ", or a negative number");
    core::row_job<T> job;
    job.name = name;
    job.scores = core::matrix_data<T>(scores);
    job.soft = core::integral_data<T>(lists, &core::read_class_list<std::remove_const_t<L>, T>);
    job.gradient = core::matrix_data<T, true>(gradient);
    return this->template evaluate<Gradient>(
        job, call, [this](const auto& settled, auto f) { this->visit(settled, f); });
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
