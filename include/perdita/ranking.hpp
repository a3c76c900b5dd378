// SPDX-License-Identifier: MIT
#pragma once

/// Losses of pairs: of two scores of which one should be the higher, and of the distance of two
/// things that are alike or not. Shapes, labels, reductions, call options, NaN and errors: as
/// margin.hpp.
///
/// The smooth relative of margin_ranking is logistic(a − b, y) (Burges, "Learning to rank using
/// gradient descent", 2005); PyTorch's soft_margin_loss is logistic itself (margin.hpp).

#include <cmath>

#include "core/element_kernel.hpp"
#include "margin.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct margin_ranking_formula : element_formula {
  static constexpr int inputs = 3;
  static constexpr int slopes = 2;
  T step, origin; ///< y = step · label + origin
  T margin;

  template <class V>
  PERDITA_INLINE element_outcome_of_two<V> operator()(const V& a, const V& label,
                                                      const V& b) const {
    const V y = fma(label, V(step), V(origin)), miss = fnma(y, a - b, V(margin)), zero(0);
    const V slope = unless_nan(miss, select(miss > zero, y, zero)), none = unless_nan(miss, zero);
    return {{max(zero, miss), -slope, none}, slope, none};
  }
};

template <class T> struct hinge_embedding_formula : element_formula {
  T threshold; ///< of a label: above it, the two are alike
  T margin;

  template <class V>
  PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& label) const {
    const V miss = V(margin) - x, zero(0);
    const auto alike = label > V(threshold);
    const V value = select(alike, x, max(zero, miss));
    const V slope = select(alike, V(1), select(miss > zero, V(-1), zero));
    const V defined = x + label; // NaN where one is
    return {unless_nan(label, value), unless_nan(defined, slope), unless_nan(defined, zero)};
  }
};

} // namespace core

/// Margin ranking loss, as PyTorch's margin_ranking_loss: the score a should be above b by the
/// margin c where y = 1, and below it where y = −1.
///
///   ℓ = max(0, c − y (a − b)),  ∂ℓ/∂a = −y for c > y (a − b), else 0 (at the kink too),
///   ∂ℓ/∂b = −∂ℓ/∂a,  ∂²ℓ = 0
///
/// At the kink, PyTorch has the slope of the other side. Scores that are the same infinity make
/// their element NaN. Both scores have one shape.
///
///   loss(a, b, labels);
///   loss(a, b, labels, d_a, d_b);
///
/// Source: Herbrich, Graepel, Obermayer, "Large margin rank boundaries for ordinal regression",
/// 2000; Joachims, "Optimizing search engines using clickthrough data", 2002.
template <class T = float> class margin_ranking : public element_loss<margin_ranking<T>, T> {
public:
  struct options {
    T margin = 0;                                     ///< c, finite
    binary_labels labels = binary_labels::signed_one; ///< how labels are written
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "margin_ranking";
  static constexpr element_traits traits{
      .convex = true, .smooth = false, .nonnegative = true, .lipschitz = 1};

  margin_ranking() : margin_ranking(options{}) {}
  explicit(false) margin_ranking(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <class A, class B, class Y>
  requires core::reals_like<A, T> && core::reals_like<B, T> && core::elements_like<Y, T>
      T operator()(A&& a, B&& b, Y&& labels, const element_options<T>& call = {}) const {
    return with_job(a, b, labels, [&](auto& job) { return this->reduce(job, call); });
  }
  template <class A, class B, class Y, class G, class H>
  requires core::reals_like<A, T> && core::reals_like<B, T> && core::elements_like<Y, T> &&
      core::writable_elements_like<G, T> && core::writable_elements_like<H, T>
          T operator()(A&& a, B&& b, Y&& labels, G&& a_gradient, H&& b_gradient,
                       const element_options<T>& call = {}) const {
    return with_job(a, b, labels, [&](auto& job) {
      set_outputs(job, a_gradient, b_gradient);
      return this->reduce(job, call);
    });
  }
  /// ∂²ℓ/∂a² and ∂²ℓ/∂b²
  template <class A, class B, class Y, class G, class H>
  requires core::reals_like<A, T> && core::reals_like<B, T> && core::elements_like<Y, T> &&
      core::writable_elements_like<G, T> && core::writable_elements_like<H, T>
  void hessian_diagonal(A&& a, B&& b, Y&& labels, G&& of_a, H&& of_b,
                        const element_options<T>& call = {}) const {
    with_job(a, b, labels, [&](auto& job) {
      job.second_order = true;
      set_outputs(job, of_a, of_b);
      return this->reduce(job, call);
    });
  }

private:
  template <class A, class B, class Y, class F> T with_job(A& a, B& b, Y& labels, F f) const {
    const bool zero_one = options_.labels == binary_labels::zero_one;
    const core::margin_ranking_formula<T> formula{
        {}, T(zero_one ? 2 : 1), T(zero_one ? -1 : 0), options_.margin};
    auto job = this->make_job(formula, a, labels);
    core::set_input(job, 2, "second scores", core::as_elements(b));
    return f(job);
  }
  template <class G, class H> void set_outputs(core::element_job<T>& job, G& of_a, H& of_b) const {
    core::set_output(job, 0, "first result", core::as_elements(of_a));
    core::set_output(job, 1, "second result", core::as_elements(of_b));
  }
  options options_;
};

/// Hinge embedding loss, as PyTorch's hinge_embedding_loss, of the distance x of two things: alike,
/// they should be near; unlike, at least the margin c apart.
///
///   y = 1:   ℓ = x,              ∂ℓ/∂x = 1
///   y = −1:  ℓ = max(0, c − x),  ∂ℓ/∂x = −1 for x < c, else 0 (at the kink too);  ∂²ℓ/∂x² = 0
///
/// Of the label only the side counts: above 0 (of 0 and 1: above ½), or not. Negative distances are
/// not refused. Source: Hadsell, Chopra, LeCun, "Dimensionality reduction by learning an invariant
/// mapping", 2006 (there with squares).
template <class T = float> class hinge_embedding : public element_loss<hinge_embedding<T>, T> {
public:
  struct options {
    T margin = 1;                                     ///< c, finite
    binary_labels labels = binary_labels::signed_one; ///< how labels are written
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "hinge_embedding";
  static constexpr element_traits traits{
      .convex = true, .smooth = false, .nonnegative = false, .lipschitz = 1};

  hinge_embedding() : hinge_embedding(options{}) {}
  explicit(false) hinge_embedding(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::hinge_embedding_formula<T> formula() const {
    const bool zero_one = options_.labels == binary_labels::zero_one;
    return {{}, T(zero_one ? 0.5 : 0), options_.margin};
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
