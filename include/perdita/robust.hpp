// SPDX-License-Identifier: MIT
#pragma once

/// Losses for noisy labels: functions of the label's probability whose weight p f'(p) falls where
/// the label has little of it. Generalised cross-entropy and the mean absolute error are comp_sum.

#include <cmath>
#include <cstdint>

#include "core/target_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

struct truncated_gce_function {
  double q, threshold;

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    const W x = W(-q) * o.surprise;
    const auto cut = o.surprise >= W(-std::log(threshold));
    return value_and_slope{
        select(cut, W(-std::expm1(q * std::log(threshold)) / q), expm1(x) / W(-q)),
        select(cut, W(0), exp(x))};
  }
};

struct symmetric_cross_entropy_function {
  double alpha, reverse; // β |A|

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    return value_and_slope{weighted(W(alpha), o.surprise) + W(reverse) * o.miss,
                           fma(W(reverse), o.hit, W(alpha))};
  }
};

/// With m = 1 − p, b = a ∓ 1:  (b^q / q) ((1 ± m/b)^q − 1), so that a small m keeps its digits.
struct asymmetric_function {
  double a, q, sign;

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    const double base = a - sign;
    W grown = log1p(W(sign / base) * o.miss); // log(1 ± m/b)
    if (sign < 0) {                           // Where a and p are small, they have the digits.
      const W left = (W(a) + o.hit) / W(base);
      grown = select(left < W(0.5), log(left), grown);
    }
    return value_and_slope{W(sign * std::pow(base, q) / q) * expm1(W(q) * grown),
                           W(std::pow(base, q - 1)) * exp(W(q - 1) * grown) * o.hit};
  }
};

/// With m = π + (1 − π) p.
struct jensen_shannon_function {
  double pi;

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    const double rest = 1 - pi, most = -std::log1p(-pi); // −log(1 − π)
    // The smaller of m and 1 − m has the digits.
    const W m = fma(W(rest), o.hit, W(pi));
    const W log_m = select(m < W(0.5), log(m), log1p(W(-rest) * o.miss));
    // log(m/p), which is small for a small π.
    const W lead = select(o.hit > W(pi), log1p(W(pi) * (o.miss / o.hit)), o.surprise + log_m);
    const W ratio = weighted(o.hit, lead); // −p log(p/m)
    const W divergence = W(rest) * (W(most) * o.miss - ratio) - W(pi) * log_m;
    return value_and_slope{divergence * W(1 / (rest * most)),
                           (W(most) * o.hit + ratio) * W(1 / most)};
  }
};

/// What the functors below have in common.
constexpr loss_traits robust_traits(bool convex, bool smooth) {
  return {.convex = convex,
          .smooth = smooth,
          .exact_gradient = true,
          .nonnegative = true,
          .shift_invariant = true};
}

} // namespace core

/// Truncated generalised cross-entropy: generalised cross-entropy that gives a label up whose
/// probability is not above k.
///
///   ℓ = (1 − max(p_y, k)^q) / q,   p = softmax(x)
///   ∂ℓ/∂x = p_y^q (p − e_y) where p_y > k, else 0
///
/// Shapes, reductions, errors, special values and by-products: as comp_sum with τ = 1 + q.
/// Source: Zhang and Sabuncu, "Generalized cross entropy loss for training deep neural networks
/// with noisy labels", NeurIPS 2018 (without the weights that they alternate with).
template <class T = float> class truncated_gce : public target_loss<truncated_gce<T>, T> {
public:
  struct options {
    T q = T(0.7);         ///< q > 0
    T threshold = T(0.5); ///< k in (0, 1)
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "truncated_gce";

  truncated_gce() : truncated_gce(options{}) {}
  explicit(false) truncated_gce(const options& o) : options_(o) {
    core::positive(name, "q", o.q);
    core::require(o.threshold > 0 && o.threshold < 1, name, "threshold", o.threshold,
                  "a number in (0, 1)");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const { return core::robust_traits(false, false); }

private:
  friend core::target_access;
  core::truncated_gce_function function() const {
    return {static_cast<double>(options_.q), static_cast<double>(options_.threshold)};
  }
  options options_;
};

/// Symmetric cross-entropy: cross-entropy, and the reverse one with log 0 replaced by A.
///
///   ℓ = α (−log p_y) + β (−A) (1 − p_y),   p = softmax(x)
///   ∂ℓ/∂x = (α + β (−A) p_y) (p − e_y)
///
/// α = 0, β = 1: reverse cross-entropy, −A times the mean absolute error. A masked label then costs
/// −βA, with a zero gradient.
/// Shapes, reductions, errors, other special values and by-products: as cross_entropy.
/// Source: Wang, Ma, Chen, Luo, Yi, Bailey, "Symmetric cross entropy for robust learning with noisy
/// labels", ICCV 2019.
template <class T = float>
class symmetric_cross_entropy : public target_loss<symmetric_cross_entropy<T>, T> {
public:
  struct options {
    T alpha = T(0.1);   ///< α ≥ 0
    T beta = 1;         ///< β ≥ 0
    T log_of_zero = -4; ///< A < 0
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "symmetric_cross_entropy";

  symmetric_cross_entropy() : symmetric_cross_entropy(options{}) {}
  explicit(false) symmetric_cross_entropy(const options& o) : options_(o) {
    core::not_negative(name, "alpha", o.alpha);
    core::not_negative(name, "beta", o.beta);
    core::require(o.log_of_zero < 0 && std::isfinite(o.log_of_zero), name, "log_of_zero",
                  o.log_of_zero, "a finite number below 0");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const { return core::robust_traits(options_.beta == 0, true); }

private:
  friend core::target_access;
  core::symmetric_cross_entropy_function function() const {
    return {static_cast<double>(options_.alpha),
            -static_cast<double>(options_.beta) * static_cast<double>(options_.log_of_zero)};
  }
  options options_;
};

/// Asymmetric generalised cross-entropy (AGCE):
///
///   ℓ = ((a + 1)^q − (a + p_y)^q) / q,   p = softmax(x)
///   ∂ℓ/∂x = (a + p_y)^{q−1} p_y (p − e_y)
///
/// A masked label costs ((a + 1)^q − a^q)/q, with a zero gradient.
/// Shapes, reductions, errors, other special values and by-products: as cross_entropy.
/// Source: Zhou, Liu, Jiang, Gao, Ji, "Asymmetric loss functions for learning with noisy labels",
/// ICML 2021.
template <class T = float> class asymmetric_gce : public target_loss<asymmetric_gce<T>, T> {
public:
  struct options {
    T a = 1; ///< a > 0
    T q = 2; ///< q > 0
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "asymmetric_gce";

  asymmetric_gce() : asymmetric_gce(options{}) {}
  explicit(false) asymmetric_gce(const options& o) : options_(o) {
    core::positive(name, "a", o.a);
    core::positive(name, "q", o.q);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const { return core::robust_traits(false, true); }

private:
  friend core::target_access;
  core::asymmetric_function function() const {
    return {static_cast<double>(options_.a), static_cast<double>(options_.q), -1};
  }
  options options_;
};

/// Asymmetric unhinged loss (AUL):
///
///   ℓ = ((a − p_y)^q − (a − 1)^q) / q,   p = softmax(x)
///   ∂ℓ/∂x = (a − p_y)^{q−1} p_y (p − e_y)
///
/// A masked label costs (a^q − (a − 1)^q)/q, with a zero gradient.
/// Shapes, reductions, errors, other special values and by-products: as cross_entropy.
/// Source: Zhou, Liu, Jiang, Gao, Ji, "Asymmetric loss functions for learning with noisy labels",
/// ICML 2021.
template <class T = float>
class asymmetric_unhinged : public target_loss<asymmetric_unhinged<T>, T> {
public:
  struct options {
    T a = T(1.5); ///< a > 1
    T q = T(0.9); ///< q > 0
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "asymmetric_unhinged";

  asymmetric_unhinged() : asymmetric_unhinged(options{}) {}
  explicit(false) asymmetric_unhinged(const options& o) : options_(o) {
    core::require(o.a > 1 && std::isfinite(o.a), name, "a", o.a, "a finite number above 1");
    core::positive(name, "q", o.q);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const { return core::robust_traits(false, true); }

private:
  friend core::target_access;
  core::asymmetric_function function() const {
    return {static_cast<double>(options_.a), static_cast<double>(options_.q), 1};
  }
  options options_;
};

/// Generalised Jensen-Shannon divergence between e_y, with weight π, and p, scaled to lie between
/// cross-entropy (π → 0) and the mean absolute error (π → 1):
///
///   ℓ = −(π KL(e_y ‖ m) + (1 − π) KL(p ‖ m)) / ((1 − π) log(1 − π)),   m = π e_y + (1 − π) p
///   ∂ℓ/∂x = p_y (log((1 − π) p_y / m_y) / log(1 − π)) (p − e_y),   p = softmax(x)
///
/// A masked label costs 1 + π log π / ((1 − π) log(1 − π)), with a zero gradient.
/// Shapes, reductions, errors, other special values and by-products: as cross_entropy.
/// Source: Englesson and Azizpour, "Generalized Jensen-Shannon divergence loss for learning with
/// noisy labels", NeurIPS 2021.
template <class T = float> class jensen_shannon : public target_loss<jensen_shannon<T>, T> {
public:
  struct options {
    T pi = T(0.5); ///< π in (0, 1)
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "jensen_shannon";

  jensen_shannon() : jensen_shannon(options{}) {}
  explicit(false) jensen_shannon(const options& o) : options_(o) {
    core::require(o.pi > 0 && o.pi < 1, name, "pi", o.pi, "a number in (0, 1)");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const { return core::robust_traits(false, true); }

private:
  friend core::target_access;
  core::jensen_shannon_function function() const { return {static_cast<double>(options_.pi)}; }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
