// SPDX-License-Identifier: MIT
#pragma once

/// Regression losses, of a prediction x and a target t, element by element; r = x − t. There is no
/// factor ½ but where one is written.
///
/// Each has options and call operators as below, and hessian_diagonal(x, t, result):
///
///   perdita::huber<float> loss({.delta = 2});
///   float value = loss(predictions, targets);             // value only
///   float value = loss(predictions, targets, gradient);   // and gradient, in one pass
///   loss(predictions, targets, predictions, {.weights = w, .run_on = perdita::serial});
///
/// Predictions, targets and gradient have one shape: vectors, or matrices in any layout. mean
/// divides by the number of elements or, with weights, by their sum (0 where that is 0, and for
/// empty input; PyTorch: NaN). Values are added up in double, in an order that depends on the shape
/// and the layout, not on threads. NaN in an element makes its value and its derivatives NaN, and
/// those of no other; targets out of a loss's domain are not checked. Throws std::invalid_argument
/// where shapes differ, memory is missing or overlaps in part, or an option is out of range, before
/// anything is written.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include "core/element_kernel.hpp"
#include "core/math.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

struct l1_formula : element_formula {
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t;
    return {abs(r), with_sign_of(r, V(1)), unless_nan(r, V(0))};
  }
};

struct mse_formula : element_formula {
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t;
    return {r * r, r + r, unless_nan(r, V(2))};
  }
};

/// A factor 1/c, without a division and in range for any c: a power of two and a number near 1. For
/// c = 0, something huge.
template <class T> struct inverse_of {
  T c, power, rest;

  explicit inverse_of(T option) : c(option) {
    using limits = std::numeric_limits<T>;
    const int exponent = c > 0 ? std::ilogb(c) : limits::min_exponent;
    power = std::ldexp(T(1), -std::clamp(exponent, limits::min_exponent, limits::max_exponent - 2));
    rest = std::min(limits::max(), 1 / (c * power));
  }
  template <class V> PERDITA_INLINE V times(const V& x) const { return x * V(rest) * V(power); }
};

/// With s = r/β clipped to [−1, 1]:  s (r − s β/2)
template <class T> struct smooth_l1_formula : element_formula {
  inverse_of<T> beta;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, slope = min(V(1), max(V(-1), beta.times(r)));
    return {slope * fnma(V(beta.c * T(0.5)), slope, r), slope,
            unless_nan(r, select(abs(r) < V(beta.c), V(1) / V(beta.c), V(0)))};
  }
};

/// With s = r clipped to [−δ, δ]:  s (r − s/2)
template <class T> struct huber_formula : element_formula {
  T delta;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, slope = min(V(delta), max(V(-delta), r));
    return {slope * fnma(V(T(0.5)), slope, r), slope,
            unless_nan(r, select(abs(r) <= V(delta), V(1), V(0)))};
  }
};

/// u = |r|/c without its square, which could overflow: `ratio` is u or, where u > 1, 1/u.
template <class V> struct folded_ratio {
  V ratio, square, sum; ///< ratio² and 1 + ratio²
  pack_mask<typename V::value_type> above;

  PERDITA_INLINE explicit folded_ratio(const V& u) : above(u > V(1)) {
    ratio = min(V(1) / u, u);
    square = ratio * ratio;
    sum = square + V(1);
  }
};

/// A number beside whose square 1 vanishes, and which has a finite one.
template <class T> inline constexpr T beyond_one = T(0x1p60);

/// With s = √(1 + u²):  δ² (s − 1) = δ |r| u/(1 + s),  r/s,  1/s³; one division for both.
template <class T> struct pseudo_huber_formula : element_formula {
  inverse_of<T> delta;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, size = abs(r), one(1);
    const V u = min(V(beyond_one<T>), delta.times(size)); // beyond it u/s is 1
    const V root = sqrt(fma(u, u, one)), next = root + one, share = u / (root * next);
    const V inverse = share * next; // u/s
    return {V(delta.c) * (size * (share * root)), with_sign_bit(V(delta.c) * inverse, r, size),
            bend(delta.times(size), root)};
  }

private:
  template <class V> static PERDITA_INLINE V bend(const V& u, const V& root) {
    const V inverse = V(1) / select(u > V(beyond_one<T>), u, root);
    return inverse * inverse * inverse;
  }
};

/// With p = e^−2|r|:  |r| − log 2 + log(1 + p) but for a small r,  (1 − p)/(1 + p),  4p/(1 + p)².
template <class T> struct log_cosh_formula : element_formula {
  template <class V> PERDITA_INLINE V early(const V& x, const V& t) const {
    const V size = abs(x - t);
    return one_minus_exp_minus(size + size);
  }
  template <class V>
  PERDITA_INLINE element_outcome<V> late(const V& x, const V& t, const V& early) const {
    const V r = x - t, size = abs(r), one(1);
    const V& lack = early;
    const V sum = V(2) - lack;
    const V square = size * size;
    const V inner = square * detail::polynomial(square, square * square, series<T>());
    const V slope = lack / sum, p = one - lack, mirror = fma(slope, V(T(0.5)), V(T(-0.5)));
    const V outer = size - V(std::numbers::ln2_v<T>) + log1p_beside(p, mirror);
    const V power = exp_minus(size + size), whole = one + power;
    return {select(size < V(T(0.55)), inner, outer), with_sign_bit(slope, r, size),
            V(4) * power / (whole * whole)};
  }

private:
  /// log(cosh x)/x², in x², on |x| ≤ 0.55: 2^-26 and 2^-57 of it
  template <class S> static constexpr auto series() {
    if constexpr (std::is_same_v<S, float>)
      return std::array<float, 5>{0.5F, -0x1.5554dap-4F, 0x1.6be286p-6F, -0x1.b255ccp-8F,
                                  0x1.c0f74p-10F};
    else
      return std::array<double, 11>{0.5,
                                    -0x1.5555555555526p-4,
                                    0x1.6c16c16c10a62p-6,
                                    -0x1.ba1ba1b525bd1p-8,
                                    0x1.1ea5d292c9ec7p-9,
                                    -0x1.833d5bc975716p-11,
                                    0x1.0d0660d5bdbfbp-12,
                                    -0x1.7d2644d9b0571p-14,
                                    0x1.0ef3c49c207cp-15,
                                    -0x1.671d04fe6f0bdp-17,
                                    0x1.4746c6e186322p-19};
  }
};

template <class T> struct quantile_formula : element_formula {
  T tau;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, slope = select(r > V(0), V(1 - tau), select(r < V(0), V(-tau), r));
    return {slope * r, slope, unless_nan(r, V(0))};
  }
};

template <class T> struct expectile_formula : element_formula {
  T tau;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, weight = select(r > V(0), V(1 - tau), V(tau)), slope = weight * r;
    return {slope * r, slope + slope, unless_nan(r, weight + weight)};
  }
};

/// With u = |r|/c:  (c²/2) log(1 + u²),  c u/(1 + u²); where u is huge, c² log u and c/u. With q =
/// u² or, where u > 1, 1/u²:  (1 − u²)/(1 + u²)² is (1 − q)/(1 + q)² or −q times that.
template <class T> struct cauchy_formula : element_formula {
  inverse_of<T> c;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, size = abs(r), u = c.times(size), one(1);
    const auto huge = u > V(beyond_one<T>);
    const V square = select(huge, u, u * u), top = select(huge, one, u);
    const V half = select(huge, V(c.c), V(c.c * T(0.5)));
    return {V(c.c) * (half * log1p_of_positive(square)),
            with_sign_bit(V(c.c) * (top / (one + square)), r, size), bend(u)};
  }

private:
  template <class V> static PERDITA_INLINE V bend(const V& u) {
    const folded_ratio<V> f(u);
    const V numerator = (V(1) - f.ratio) * (V(1) + f.ratio);
    return select(f.above, -(f.square * numerator), numerator) / (f.sum * f.sum);
  }
};

template <class T> struct tukey_biweight_formula : element_formula {
  inverse_of<T> c;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, one(1), most(c.c * (c.c / 6));
    const V size = abs(r), u = c.times(size), square = u * u;
    const auto inside = size < V(c.c), outside = size >= V(c.c);
    const V left = c.times(V(c.c) - size) * (one + u);         // 1 − u²
    const V cubic = fma(square - V(3), square, V(3)) * square; // 1 − (1 − u²)³
    const V bent = left * fnma(V(5), square, one);
    return {select(outside, most, most * cubic),
            select(inside, r * (left * left), unless_nan(r, V(0))), select(outside, V(0), bent)};
  }
};

/// Stands for every larger u: its square is finite, and u/(1 + u²)² is 0.
template <class T> inline constexpr T beyond_cube = sizeof(T) == 4 ? T(0x1p62) : T(0x1p500);

/// With v = 1/(1 + u²):  (c²/2) u² v,  r v²; (1 − 3u²) v³, by 1/u where u > 1.
template <class T> struct geman_mcclure_formula : element_formula {
  inverse_of<T> c;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V r = x - t, size = abs(r), u = min(V(beyond_cube<T>), c.times(size));
    const V square = u * u, v = V(1) / (square + V(1));
    return {V(c.c) * (V(c.c * T(0.5)) * (square * v)), with_sign_bit(V(c.c) * (u * v * v), r, size),
            bend(c.times(size))};
  }

private:
  template <class V> static PERDITA_INLINE V bend(const V& u) {
    const folded_ratio<V> f(u);
    const V v = V(1) / f.sum, q = f.square, three(3);
    return select(f.above, q * q * (q - three), fnma(three, q, V(1))) * v * v * v;
  }
};

/// log t! by Stirling where t > 1, else 0.
template <class T, class V> PERDITA_INLINE V stirling(const V& t) {
  const V l = log(t), half = (l + V(T(1.8378770664093454836L))) * V(T(0.5)); // log 2π
  return select(t > V(1), fma(t, l - V(1), half), V(0));
}

template <class T, bool Full> struct poisson_log_formula : element_formula {
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V mean = exp(x), infinity(std::numeric_limits<T>::infinity());
    // e^x outgrows t x, which may be 0 · −∞ too.
    const V product = select(t == V(0), V(0), x);
    V value = select(mean == infinity, mean, fnma(t, product, mean));
    if constexpr (Full)
      value += stirling<T>(t);
    return {unless_nan(t, value), mean - t, unless_nan(t, mean)};
  }
};

template <class T, bool Full> struct poisson_formula : element_formula {
  T eps;
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    // Without a target, nothing is divided or taken the logarithm of.
    const V rate = x + V(eps), mean = select(t == V(0), unless_nan(rate, V(1)), rate);
    const V share = t / mean;
    V value = fnma(t, log(mean), x);
    if constexpr (Full)
      value += stirling<T>(t);
    return {value, V(1) - share, share / mean};
  }
};

template <class T> struct gamma_formula : element_formula {
  template <class V> PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& t) const {
    const V infinity(std::numeric_limits<T>::infinity());
    const V share = unless_nan(x, weighted(t, exp(-x)));
    return {select(share == infinity, share, x + share), V(1) - share, share};
  }
};

template <class T> struct tweedie_formula : element_formula {
  T power;
  template <class V> PERDITA_INLINE V early(const V& x, const V&) const {
    return exp(V(2 - power) * x);
  }
  template <class V>
  PERDITA_INLINE element_outcome<V> late(const V& x, const V& t, const V& early) const {
    const T below = power - 1, above = 2 - power; // exact
    const V share = weighted(t, exp(V(-below) * x)), &mean = early;
    return {share / V(below) + mean / V(above), mean - share,
            fma(V(below), share, V(above) * mean)};
  }
};

template <class T, bool Full> struct gaussian_formula : element_formula {
  static constexpr int inputs = 3, slopes = 2;
  T eps;
  template <class V>
  PERDITA_INLINE element_outcome_of_two<V> operator()(const V& x, const V& t,
                                                      const V& variance) const {
    const V clamped = max(V(eps), variance);
    const V v = select(variance < V(0), V(std::numeric_limits<T>::quiet_NaN()), clamped);
    const V r = x - t, share = r / v, inverse = V(1) / v, half(T(0.5));
    V value = fma(r, share, log(v));
    if constexpr (Full)
      value += V(T(1.8378770664093454836L)); // log 2π
    const V square = share * share;
    return {{value * half, share, unless_nan(r, inverse)},
            (inverse - square) * half,
            fma(square, inverse, inverse * inverse * V(T(-0.5)))};
  }
};

} // namespace core

/// Absolute error, as PyTorch's l1_loss:
///
///   ℓ = |r|,  ∂ℓ/∂x = sign r, 0 at r = 0,  ∂²ℓ/∂x² = 0
template <class T = float> class l1 : public element_loss<l1<T>, T> {
public:
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "l1";
  static constexpr element_traits traits{
      .convex = true, .smooth = false, .nonnegative = true, .lipschitz = 1};

  l1() : l1(options{}) {}
  explicit(false) l1(const options& o) : options_(o) { core::require_reduction(name, o.reduction); }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::l1_formula formula() const { return {}; }
  options options_;
};

/// Squared error, as PyTorch's mse_loss:
///
///   ℓ = r²,  ∂ℓ/∂x = 2r,  ∂²ℓ/∂x² = 2
template <class T = float> class mse : public element_loss<mse<T>, T> {
public:
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "mse";
  static constexpr element_traits traits{.convex = true,
                                         .smooth = true,
                                         .nonnegative = true,
                                         .lipschitz = std::numeric_limits<double>::infinity()};

  mse() : mse(options{}) {}
  explicit(false) mse(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::mse_formula formula() const { return {}; }
  options options_;
};

/// Smooth L1, as PyTorch's smooth_l1_loss; huber divided by δ = β:
///
///   ℓ = r²/(2β) for |r| < β, else |r| − β/2
///   ∂ℓ/∂x = r/β clipped to [−1, 1],  ∂²ℓ/∂x² = 1/β for |r| < β, else 0
///
/// β = 0: l1. Source: Girshick, "Fast R-CNN", ICCV 2015.
template <class T = float> class smooth_l1 : public element_loss<smooth_l1<T>, T> {
public:
  struct options {
    T beta = 1; ///< β ≥ 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "smooth_l1";

  smooth_l1() : smooth_l1(options{}) {}
  explicit(false) smooth_l1(const options& o) : options_(o) {
    core::not_negative(name, "beta", o.beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    return {.convex = true, .smooth = options_.beta > 0, .nonnegative = true, .lipschitz = 1};
  }

private:
  friend core::element_access;
  core::smooth_l1_formula<T> formula() const { return {{}, core::inverse_of<T>(options_.beta)}; }
  options options_;
};

/// Huber's loss, as PyTorch's huber_loss:
///
///   ℓ = r²/2 for |r| ≤ δ, else δ (|r| − δ/2)
///   ∂ℓ/∂x = r clipped to [−δ, δ],  ∂²ℓ/∂x² = 1 for |r| ≤ δ, else 0
///
/// Source: Huber, "Robust estimation of a location parameter", 1964.
template <class T = float> class huber : public element_loss<huber<T>, T> {
public:
  struct options {
    T delta = 1; ///< δ > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "huber";

  huber() : huber(options{}) {}
  explicit(false) huber(const options& o) : options_(o) {
    core::positive(name, "delta", o.delta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    return {.convex = true,
            .smooth = true,
            .nonnegative = true,
            .lipschitz = static_cast<double>(options_.delta)};
  }

private:
  friend core::element_access;
  core::huber_formula<T> formula() const { return {{}, options_.delta}; }
  options options_;
};

/// Pseudo-Huber loss:
///
///   ℓ = δ² (s − 1),  s = √(1 + (r/δ)²),  ∂ℓ/∂x = r/s,  ∂²ℓ/∂x² = 1/s³
///
/// No digit is lost where s is near 1, and (r/δ)² may overflow.
/// Source: Charbonnier, Blanc-Féraud, Aubert, Barlaud, "Deterministic edge-preserving
/// regularization in computed imaging", 1997 (with δ = 1 and a factor 2).
template <class T = float> class pseudo_huber : public element_loss<pseudo_huber<T>, T> {
public:
  struct options {
    T delta = 1; ///< δ > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "pseudo_huber";

  pseudo_huber() : pseudo_huber(options{}) {}
  explicit(false) pseudo_huber(const options& o) : options_(o) {
    core::positive(name, "delta", o.delta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    return {.convex = true,
            .smooth = true,
            .nonnegative = true,
            .lipschitz = static_cast<double>(options_.delta)};
  }

private:
  friend core::element_access;
  core::pseudo_huber_formula<T> formula() const {
    return {{}, core::inverse_of<T>(options_.delta)};
  }
  options options_;
};

/// Log-cosh:
///
///   ℓ = log cosh r,  ∂ℓ/∂x = tanh r,  ∂²ℓ/∂x² = 1/cosh² r
///
/// Near r = 0, where |r| + log(1 + e^−2|r|) − log 2 cancels, ℓ = r²/2 with all its digits.
template <class T = float> class log_cosh : public element_loss<log_cosh<T>, T> {
public:
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "log_cosh";
  static constexpr element_traits traits{
      .convex = true, .smooth = true, .nonnegative = true, .lipschitz = 1};

  log_cosh() : log_cosh(options{}) {}
  explicit(false) log_cosh(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::log_cosh_formula<T> formula() const { return {}; }
  options options_;
};

/// Quantile loss (pinball): its expectation is least at the τ-quantile of the target.
///
///   ℓ = τ (t − x) for x ≤ t, else (1 − τ)(x − t)
///   ∂ℓ/∂x = −τ for x < t, 1 − τ for x > t, 0 at x = t,  ∂²ℓ/∂x² = 0
///
/// τ = ½: half of l1. Source: Koenker and Bassett, "Regression quantiles", 1978.
template <class T = float> class quantile : public element_loss<quantile<T>, T> {
public:
  struct options {
    T tau = T(0.5); ///< τ in (0, 1)
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "quantile";

  quantile() : quantile(options{}) {}
  explicit(false) quantile(const options& o) : options_(o) {
    core::require(o.tau > 0 && o.tau < 1, name, "tau", o.tau, "a number in (0, 1)");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    const double tau = static_cast<double>(options_.tau);
    return {
        .convex = true, .smooth = false, .nonnegative = true, .lipschitz = std::max(tau, 1 - tau)};
  }

private:
  friend core::element_access;
  core::quantile_formula<T> formula() const { return {{}, options_.tau}; }
  options options_;
};

/// Expectile loss: its expectation is least at the τ-expectile of the target.
///
///   ℓ = w r²,  ∂ℓ/∂x = 2 w r,  ∂²ℓ/∂x² = 2 w,  w = τ for x ≤ t, else 1 − τ
///
/// τ = ½: half of mse. Source: Newey and Powell, "Asymmetric least squares estimation and testing",
/// 1987.
template <class T = float> class expectile : public element_loss<expectile<T>, T> {
public:
  struct options {
    T tau = T(0.5); ///< τ in (0, 1)
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "expectile";
  static constexpr element_traits traits{.convex = true,
                                         .smooth = true,
                                         .nonnegative = true,
                                         .lipschitz = std::numeric_limits<double>::infinity()};

  expectile() : expectile(options{}) {}
  explicit(false) expectile(const options& o) : options_(o) {
    core::require(o.tau > 0 && o.tau < 1, name, "tau", o.tau, "a number in (0, 1)");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::expectile_formula<T> formula() const { return {{}, options_.tau}; }
  options options_;
};

/// Cauchy's (Lorentzian) loss, the negative log-likelihood of Student's t with one degree of
/// freedom but for scale and constant:
///
///   ℓ = (c²/2) log(1 + u²),  u = r/c,  ∂ℓ/∂x = r/(1 + u²),  ∂²ℓ/∂x² = (1 − u²)/(1 + u²)²
///
/// Not convex. u² may overflow. Source: Black and Anandan, "The robust estimation of multiple
/// motions", 1996.
template <class T = float> class cauchy : public element_loss<cauchy<T>, T> {
public:
  struct options {
    T c = 1; ///< c > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "cauchy";

  cauchy() : cauchy(options{}) {}
  explicit(false) cauchy(const options& o) : options_(o) {
    core::positive(name, "c", o.c);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    return {.convex = false,
            .smooth = true,
            .nonnegative = true,
            .lipschitz = static_cast<double>(options_.c) / 2};
  }

private:
  friend core::element_access;
  core::cauchy_formula<T> formula() const { return {{}, core::inverse_of<T>(options_.c)}; }
  options options_;
};

/// Tukey's biweight:
///
///   ℓ = (c²/6)(1 − (1 − u²)³) for |u| < 1, else c²/6,  u = r/c
///   ∂ℓ/∂x = r (1 − u²)²,  ∂²ℓ/∂x² = (1 − u²)(1 − 5u²) for |u| < 1, else 0
///
/// Not convex. The default c is 95 % as efficient as least squares for normal errors of variance 1.
/// Source: Beaton and Tukey, "The fitting of power series, meaning polynomials, illustrated on
/// band-spectroscopic data", 1974.
template <class T = float> class tukey_biweight : public element_loss<tukey_biweight<T>, T> {
public:
  struct options {
    T c = T(4.685); ///< c > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "tukey_biweight";

  tukey_biweight() : tukey_biweight(options{}) {}
  explicit(false) tukey_biweight(const options& o) : options_(o) {
    core::positive(name, "c", o.c);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    // |u| (1 − u²)² is largest at u² = 1/5: 16/(25 √5)
    return {.convex = false,
            .smooth = true,
            .nonnegative = true,
            .lipschitz = static_cast<double>(options_.c) * 0.28621670111997309};
  }

private:
  friend core::element_access;
  core::tukey_biweight_formula<T> formula() const { return {{}, core::inverse_of<T>(options_.c)}; }
  options options_;
};

/// Geman and McClure's loss:
///
///   ℓ = (c²/2) u²/(1 + u²),  u = r/c,  ∂ℓ/∂x = r/(1 + u²)²,  ∂²ℓ/∂x² = (1 − 3u²)/(1 + u²)³
///
/// Not convex; below c²/2. u² may overflow. Source: Geman and McClure, "Statistical methods for
/// tomographic image reconstruction", 1987.
template <class T = float> class geman_mcclure : public element_loss<geman_mcclure<T>, T> {
public:
  struct options {
    T c = 1; ///< c > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "geman_mcclure";

  geman_mcclure() : geman_mcclure(options{}) {}
  explicit(false) geman_mcclure(const options& o) : options_(o) {
    core::positive(name, "c", o.c);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr element_traits traits() const {
    // |u|/(1 + u²)² is largest at u² = 1/3: 9/(16 √3)
    return {.convex = false,
            .smooth = true,
            .nonnegative = true,
            .lipschitz = static_cast<double>(options_.c) * 0.32475952641916450};
  }

private:
  friend core::element_access;
  core::geman_mcclure_formula<T> formula() const { return {{}, core::inverse_of<T>(options_.c)}; }
  options options_;
};

/// Poisson negative log-likelihood, as PyTorch's poisson_nll_loss; x is the log of the mean or,
/// with log_input = false, the mean:
///
///   ℓ = e^x − t x,  ∂ℓ/∂x = e^x − t,  ∂²ℓ/∂x² = e^x
///   ℓ = x − t log(x + ε),  ∂ℓ/∂x = 1 − t/(x + ε),  ∂²ℓ/∂x² = t/(x + ε)²
///
/// `full` adds t log t − t + ½ log(2πt), for t > 1 (Stirling's log t!). The domain is t ≥ 0 and a
/// mean above 0; t = 0 has no second term, whatever x is (PyTorch: 0 · ∞ is NaN); x = +inf makes ℓ
/// +inf.
template <class T = float> class poisson_nll : public element_loss<poisson_nll<T>, T> {
public:
  struct options {
    bool log_input = true; ///< x is the log of the mean, else the mean
    bool full = false;     ///< adds Stirling's log t! for t > 1
    T eps = T(1e-8);       ///< ε ≥ 0, where log_input is false
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "poisson_nll";
  static constexpr element_traits traits{.convex = true,
                                         .smooth = true,
                                         .nonnegative = false,
                                         .lipschitz = std::numeric_limits<double>::infinity()};

  poisson_nll() : poisson_nll(options{}) {}
  explicit(false) poisson_nll(const options& o) : options_(o) {
    core::not_negative(name, "eps", o.eps);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  template <class F> auto visit(F f) const {
    if (options_.log_input)
      return options_.full ? f(core::poisson_log_formula<T, true>{})
                           : f(core::poisson_log_formula<T, false>{});
    return options_.full ? f(core::poisson_formula<T, true>{{}, options_.eps})
                         : f(core::poisson_formula<T, false>{{}, options_.eps});
  }
  options options_;
};

/// Negative log-likelihood of a gamma distribution with mean e^x, over its shape and without what
/// does not depend on x; half its deviance is ℓ − log t − 1:
///
///   ℓ = x + t e^−x,  ∂ℓ/∂x = 1 − t e^−x,  ∂²ℓ/∂x² = t e^−x
///
/// The domain is t > 0; infinite where e^−x is. Source: McCullagh and Nelder, "Generalized linear
/// models", 1989; the mathematics as scikit-learn's HalfGammaLoss.
template <class T = float> class gamma_nll : public element_loss<gamma_nll<T>, T> {
public:
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "gamma_nll";
  static constexpr element_traits traits{.convex = true,
                                         .smooth = true,
                                         .nonnegative = false,
                                         .lipschitz = std::numeric_limits<double>::infinity()};

  gamma_nll() : gamma_nll(options{}) {}
  explicit(false) gamma_nll(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::gamma_formula<T> formula() const { return {}; }
  options options_;
};

/// Tweedie negative log-likelihood of power p with mean e^x, over its dispersion and without what
/// does not depend on x; a compound of Poisson and gamma:
///
///   ℓ = t e^{(1−p) x}/(p − 1) + e^{(2−p) x}/(2 − p),  ∂ℓ/∂x = e^{(2−p) x} − t e^{(1−p) x}
///   ∂²ℓ/∂x² = (2 − p) e^{(2−p) x} + (p − 1) t e^{(1−p) x}
///
/// The domain is t ≥ 0; t = 0 has no first term, whatever x is. Infinite where one of the powers of
/// e is. p → 1 is poisson_nll but for a constant, p → 2 gamma_nll. Source: Jørgensen, "Exponential
/// dispersion models", 1987.
template <class T = float> class tweedie_nll : public element_loss<tweedie_nll<T>, T> {
public:
  struct options {
    T power = T(1.5); ///< p in (1, 2)
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "tweedie_nll";
  static constexpr element_traits traits{.convex = true,
                                         .smooth = true,
                                         .nonnegative = true,
                                         .lipschitz = std::numeric_limits<double>::infinity()};

  tweedie_nll() : tweedie_nll(options{}) {}
  explicit(false) tweedie_nll(const options& o) : options_(o) {
    core::require(o.power > 1 && o.power < 2, name, "power", o.power,
                  "a number in (1, 2) (poisson_nll is 1, gamma_nll 2)");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::element_access;
  core::tweedie_formula<T> formula() const { return {{}, options_.power}; }
  options options_;
};

/// Gaussian negative log-likelihood, as PyTorch's gaussian_nll_loss; x is the mean:
///
///   ℓ = ½ (log v + r²/v),  v = max(variance, ε);  `full` adds ½ log 2π
///   ∂ℓ/∂x = r/v,  ∂ℓ/∂v = ½ (1/v − (r/v)²),  ∂²ℓ/∂x² = 1/v,  ∂²ℓ/∂v² = (r/v)²/v − 1/(2v²)
///
/// The gradient for a variance below ε is that at ε, not 0. The variance has the predictions'
/// shape. A negative one makes its element NaN (PyTorch: an error).
///
///   loss(mean, targets, variance);
///   loss(mean, targets, variance, d_mean, d_variance);
template <class T = float> class gaussian_nll : public element_loss<gaussian_nll<T>, T> {
public:
  struct options {
    bool full = false; ///< adds ½ log 2π
    T eps = T(1e-6);   ///< ε > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "gaussian_nll";
  static constexpr element_traits traits{.convex = true,
                                         .smooth = true,
                                         .nonnegative = false,
                                         .lipschitz = std::numeric_limits<double>::infinity()};

  gaussian_nll() : gaussian_nll(options{}) {}
  explicit(false) gaussian_nll(const options& o) : options_(o) {
    core::positive(name, "eps", o.eps);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <class X, class Y, class S>
  requires core::reals_like<X, T> && core::elements_like<Y, T> && core::reals_like<S, T>
      T operator()(X&& mean, Y&& targets, S&& variance, const element_options<T>& call = {}) const {
    return with_job(mean, targets, variance, [&](auto& job) { return this->reduce(job, call); });
  }
  template <class X, class Y, class S, class G, class H>
  requires core::reals_like<X, T> && core::elements_like<Y, T> && core::reals_like<S, T> &&
      core::writable_elements_like<G, T> && core::writable_elements_like<H, T>
          T operator()(X&& mean, Y&& targets, S&& variance, G&& mean_gradient,
                       H&& variance_gradient, const element_options<T>& call = {}) const {
    return with_job(mean, targets, variance, [&](auto& job) {
      set_outputs(job, mean_gradient, variance_gradient);
      return this->reduce(job, call);
    });
  }
  /// ∂²ℓ/∂x² and ∂²ℓ/∂v²
  template <class X, class Y, class S, class G, class H>
  requires core::reals_like<X, T> && core::elements_like<Y, T> && core::reals_like<S, T> &&
      core::writable_elements_like<G, T> && core::writable_elements_like<H, T>
  void hessian_diagonal(X&& mean, Y&& targets, S&& variance, G&& of_mean, H&& of_variance,
                        const element_options<T>& call = {}) const {
    with_job(mean, targets, variance, [&](auto& job) {
      job.second_order = true;
      set_outputs(job, of_mean, of_variance);
      return this->reduce(job, call);
    });
  }

private:
  template <class X, class Y, class S, class F>
  T with_job(X& mean, Y& targets, S& variance, F f) const {
    const auto with = [&](const auto& formula) {
      auto job = this->make_job(formula, mean, targets);
      core::set_input(job, 2, "variance", core::as_elements(variance));
      return f(job);
    };
    return options_.full ? with(core::gaussian_formula<T, true>{{}, options_.eps})
                         : with(core::gaussian_formula<T, false>{{}, options_.eps});
  }
  template <class G, class H>
  void set_outputs(core::element_job<T>& job, G& of_mean, H& of_variance) const {
    core::set_output(job, 0, "first result", core::as_elements(of_mean));
    core::set_output(job, 1, "second result", core::as_elements(of_variance));
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
