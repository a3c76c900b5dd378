// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/element_kernel.hpp"
#include "core/embeddings.hpp"
#include "core/math.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct focal_formula : element_formula {
  T gamma, alpha;

  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& z, const V& t) const {
    const auto alike = t > V(T(0.5));
    const V x = select(is_nan(t), t, select(alike, z, -z));
    const V weight = select(alike, V(alpha), V(1 - alpha));
    const V miss = sigmoid(-x), hit = sigmoid(x), surprise = softplus(-x);
    const V focus = gamma == T(0) ? unless_nan(x, V(1)) : exp(softplus(x) * V(-gamma));
    const V part = select(hit == V(0), V(0), hit * surprise); // 0 · inf
    const V value = select(focus == V(0), V(0), focus * surprise);
    const V slope = -(focus * fma(V(gamma), part, miss));
    const V curvature = focus * (V(gamma * gamma) * hit * part + hit * miss * V(2 * gamma + 1) -
                                 V(gamma) * miss * part);
    return {weight * value, select(alike, weight, -weight) * slope, weight * curvature};
  }
};

} // namespace core

/// Binary focal loss of logits z, of pairs that are alike (t = 1) or not (t = 0): with x = z or −z,
/// p = 1/(1 + e^{−x}) and w = α or 1 − α,
///
///   ℓ = −w (1 − p)^γ log p
///   ∂ℓ/∂x = −w (1 − p)^γ (1 − p − γ p log p)
///   ∂²ℓ/∂x² = w (1 − p)^γ p [(1 + 2γ)(1 − p) − γ² p log p + γ (1 − p) log p]
///
/// γ = 0 and α = ½: half of the binary cross-entropy with logits. Targets above ½ are 1, and all
/// others 0. z = ±inf has its limits: 0, or an infinite value with a slope of ±w. See element.hpp
/// for calls, shapes and errors.
///
/// Source: Lin et al., "Focal loss for dense object detection", ICCV 2017; with the defaults of
/// Patacchiola, Storkey, "Self-supervised relational reasoning for representation learning",
/// NeurIPS 2020.
template <class T = float> class binary_focal : public element_loss<binary_focal<T>, T> {
public:
  struct options {
    T gamma = 2;      ///< γ ≥ 0
    T alpha = T(0.5); ///< in [0, 1]: of pairs that are alike
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "binary_focal";

  binary_focal() : binary_focal(options{}) {}
  explicit(false) binary_focal(const options& o) : options_(o) {
    core::require(o.gamma >= 0 && std::isfinite(o.gamma), name, "gamma", o.gamma,
                  "a finite number, not negative");
    core::require(o.alpha >= 0 && o.alpha <= 1, name, "alpha", o.alpha, "a number in [0, 1]");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  /// |∂ℓ/∂x| <= w (1 + γ/e), which is not reached unless γ = 0.
  element_traits traits() const {
    const double most = std::fmax(options_.alpha, 1 - options_.alpha);
    return {.convex = options_.gamma == 0,
            .smooth = true,
            .nonnegative = true,
            .lipschitz = most * (1 + static_cast<double>(options_.gamma) / 2.718281828459045)};
  }

private:
  friend core::element_access;
  core::focal_formula<T> formula() const { return {{}, options_.gamma, options_.alpha}; }
  options options_;
};

/// Two rows of features, and whether they show the same item.
struct relation_pair {
  index first, second;
  bool alike;
};

/// Pairs for self-supervised relational reasoning: of M items in K views, row k M + m showing item
/// m in view k, each two views k < l make M pairs of the same item and then M of different ones,
///
///   (k M + m, l M + m), alike,   and   (k M + m, l M + (m − r) mod M), not
///
/// with r = 1, 2, …, M − 1, 1, … for one two after the other: (0, 1), (0, 2), …, (1, 2), …
///
/// A relation module makes a logit of the two features of a pair, side by side; binary_focal, or
/// the logistic loss, judges it by targets().
///
///   perdita::relation_pairs pairs(items, 4);
///   pairs.concatenate(x, joined);                    // the module's input, pairs × 2 features
///   value = focal(logits, pairs.targets<float>(), d_logits);
///   pairs.gather(d_joined, d_x);                     // from the module's gradient
class relation_pairs {
public:
  static constexpr const char* name = "relation_pairs";

  relation_pairs(index items, index views) : items_(items), views_(views) {
    core::require(items >= 2, name, "items", items, "at least 2");
    core::require(views >= 2, name, "views", views, "at least 2");
    for (index k = 0; k < views; ++k)
      for (index l = k + 1; l < views; ++l)
        firsts_.push_back({k, l});
  }
  index size() const { return static_cast<index>(firsts_.size()) * 2 * items_; }
  relation_pair operator[](index i) const {
    const index two = i / (2 * items_), place = i % (2 * items_), m = place % items_;
    const auto [k, l] = firsts_[static_cast<std::size_t>(two)];
    const bool alike = place < items_;
    const index roll = alike ? 0 : 1 + two % (items_ - 1);
    return {k * items_ + m, l * items_ + (m + items_ - roll) % items_, alike};
  }
  /// 1 of pairs that are alike, 0 of others.
  template <class T> std::vector<T> targets() const {
    std::vector<T> result;
    for (index i = 0; i < size(); ++i)
      result.push_back(T((*this)[i].alike ? 1 : 0));
    return result;
  }

  /// Row i of `joined` becomes the features of pair i, those of its first row before the second's.
  /// Memory apart from x.
  template <class T>
  void concatenate(matrix_view<const T> x, matrix_view<T> joined,
                   const executor& run_on = {}) const {
    check(x, joined);
    using R = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const core::extent memory[] = {core::bytes_of(core::matrix_data<R, true>(joined)),
                                   core::bytes_of(core::matrix_data<R>(x))};
    core::require_apart(name, memory, 1);
    core::for_row_blocks(size(), run_on, [&, this](index first, index last) {
      for (index i = first; i < last; ++i)
        for (index d = 0; d < x.cols; ++d) {
          const relation_pair pair = (*this)[i];
          joined(i, d) = x(pair.first, d);
          joined(i, x.cols + d) = x(pair.second, d);
        }
    });
  }
  template <class T>
  void concatenate(matrix_view<T> x, matrix_view<T> joined, const executor& run_on = {}) const {
    concatenate(matrix_view<const T>(x), joined, run_on);
  }
  /// The gradient of the features: sums over the pairs that a row is in.
  template <class T> void gather(matrix_view<const T> d_joined, matrix_view<T> d_x) const {
    check(d_x, d_joined);
    std::vector<double> sum(static_cast<std::size_t>(d_x.rows * d_x.cols));
    const auto row = [&](index r) { return sum.data() + r * d_x.cols; };
    for (index i = 0; i < size(); ++i)
      for (index d = 0; d < d_x.cols; ++d) {
        const relation_pair pair = (*this)[i];
        row(pair.first)[d] += static_cast<double>(d_joined(i, d));
        row(pair.second)[d] += static_cast<double>(d_joined(i, d_x.cols + d));
      }
    for (index r = 0; r < d_x.rows; ++r)
      for (index d = 0; d < d_x.cols; ++d)
        d_x(r, d) = static_cast<T>(row(r)[d]);
  }
  template <class T> void gather(matrix_view<T> d_joined, matrix_view<T> d_x) const {
    gather(matrix_view<const T>(d_joined), d_x);
  }

private:
  struct two_views {
    index first, second;
  };
  void check(const auto& x, const auto& joined) const {
    const auto expect = [](const char* what, index got, index expected) {
      if (got != expected)
        core::fail(name, what, core::to_text(got), core::to_text(expected));
    };
    expect("rows of the features", x.rows, items_ * views_);
    expect("rows of the pairs", joined.rows, size());
    expect("columns of the pairs", joined.cols, 2 * x.cols);
    if (x.rows * x.cols > 0 && (!x.data || !joined.data))
      core::fail(name, "features or pairs", "null", "a pointer to memory");
  }

  index items_, views_;
  std::vector<two_views> firsts_;
};

} // namespace perdita::inline PERDITA_ABI
