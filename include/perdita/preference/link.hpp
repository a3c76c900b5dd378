// SPDX-License-Identifier: MIT
#pragma once

/// Link functions: what a preference loss makes of one number, a margin or a reward. Each is a
/// functor of a double that gives value and slope, and anything callable like it will do.
///
/// All is in double, exact to a few units in the last place of the largest term, and never
/// overflows where the result does not. ±inf gives the limit, NaN NaN. Constructors throw
/// std::invalid_argument.

#include <cmath>
#include <concepts>
#include <limits>
#include <numbers>

#include "../core/errors.hpp"
#include "../core/weighted.hpp"

namespace perdita::inline PERDITA_ABI::links {

/// log(1 + e^x)
inline double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }
/// σ(x) = 1/(1 + e^−x); 1 − σ(x) is sigmoid(−x), with all its digits.
inline double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}
/// log(1 − e^a) for a ≤ 0: the log-probability of what has not the log-probability a.
inline double log1mexp(double a) {
  return a > -std::numbers::ln2 ? std::log(-std::expm1(a)) : std::log1p(-std::exp(a));
}
using core::times;

struct outcome {
  double value, slope;
};

template <class F>
concept link = requires(const F& f, double t) {
  { f(t) } -> std::convertible_to<outcome>;
};

/// p log(1 + e^−t) + q log(1 + e^t), slope q σ(t) − p σ(−t): cross-entropy of σ(t) where p + q = 1.
inline outcome cross_entropy(double p, double q, double t) {
  return {times(p, softplus(-t)) + times(q, softplus(t)), q * sigmoid(t) - p * sigmoid(-t)};
}

/// log(1 + e^−t), slope −σ(−t)
struct logistic {
  outcome operator()(double t) const { return {softplus(-t), -sigmoid(-t)}; }
};

/// (1 − ε) log(1 + e^−t) + ε log(1 + e^t), slope σ(t) − (1 − ε); least at log((1 − ε)/ε).
struct smoothed {
  double epsilon; ///< in [0, 1]
  explicit smoothed(double e) : epsilon(e) {
    core::require(e >= 0 && e <= 1, "links::smoothed", "epsilon", e, "a number in [0, 1]");
  }
  outcome operator()(double t) const { return cross_entropy(1 - epsilon, epsilon, t); }
};

/// p log(1 + e^−t) + (1 − p) log(1 + e^t), slope σ(t) − p; least at log(p/(1 − p)).
struct soft_target {
  double p; ///< in [0, 1]
  explicit soft_target(double probability) : p(probability) {
    core::require(p >= 0 && p <= 1, "links::soft_target", "p", p, "a number in [0, 1]");
  }
  outcome operator()(double t) const { return cross_entropy(p, 1 - p, t); }
};

/// ((1 − ε) log(1 + e^−t) − ε log(1 + e^t))/(1 − 2ε) = log(1 + e^−t) − tε/(1 − 2ε), slope
/// −σ(−t) − ε/(1 − 2ε): an unbiased estimate of `logistic` from labels of which a share ε is wrong.
/// Not bounded below.
struct robust {
  double epsilon; ///< in [0, ½)
  explicit robust(double e) : epsilon(e) {
    core::require(e >= 0 && e < 0.5, "links::robust", "epsilon", e, "a number in [0, 0.5)");
  }
  outcome operator()(double t) const {
    const double tilt = epsilon / (1 - 2 * epsilon);
    return {softplus(-t) - times(tilt, t), -sigmoid(-t) - tilt};
  }
};

/// max(0, c − t), slope −1 below c, 0 from it on.
struct hinge {
  double at; ///< c
  explicit hinge(double c) : at(c) {
    core::require(std::isfinite(c), "links::hinge", "at", c, "a finite number");
  }
  outcome operator()(double t) const {
    const double miss = at - t;
    if (miss <= 0)
      return {0, 0};
    return {miss, miss != miss ? miss : -1};
  }
};

/// (t − c)², slope 2 (t − c)
struct square {
  double target; ///< c
  explicit square(double c) : target(c) {
    core::require(std::isfinite(c), "links::square", "target", c, "a finite number");
  }
  outcome operator()(double t) const {
    const double off = t - target;
    return {off * off, 2 * off};
  }
};

/// σ(t) (log σ(t) − log(1 − ε)) + σ(−t) (log σ(−t) − log ε), slope σ(t) σ(−t) (t − log((1 − ε)/ε)):
/// KL of σ(t) from 1 − ε. Least, 0, at log((1 − ε)/ε); the value's error there is absolute.
struct exo {
  double epsilon; ///< in (0, 1)
  explicit exo(double e) : epsilon(e) {
    core::require(e > 0 && e < 1, "links::exo", "epsilon", e, "a number in (0, 1)");
  }
  outcome operator()(double t) const {
    const double hit = sigmoid(t), miss = sigmoid(-t);
    const double log_right = std::log1p(-epsilon), log_wrong = std::log(epsilon);
    return {times(hit, -softplus(-t) - log_right) + times(miss, -softplus(t) - log_wrong),
            times(hit * miss, t - (log_right - log_wrong))};
  }
};

/// σ(−t) = 1 − σ(t), slope −σ(t) σ(−t)
struct sigmoid_gain {
  outcome operator()(double t) const { return {sigmoid(-t), -sigmoid(t) * sigmoid(-t)}; }
};

/// Log-ratio modulated loss: (1 − k) log(1 + e^−t) + k e^−t with k = σ(t/τ), slope −(1 − k) σ(−t) −
/// k e^−t + (k (1 − k)/τ) (e^−t − log(1 + e^−t)).
struct lrml {
  double tau; ///< τ > 0
  explicit lrml(double t) : tau(t) {
    core::require(t > 0 && std::isfinite(t), "links::lrml", "tau", t, "a finite number above 0");
  }
  outcome operator()(double t) const {
    const double k = sigmoid(t / tau), rest = sigmoid(-t / tau), above = softplus(-t);
    // k e^−t: the factors alone are 0 and inf
    const double image =
        std::exp(t < 0 ? times(1 / tau - 1, t) - softplus(t / tau) : -t - softplus(-t / tau));
    return {times(rest, above) + image,
            -rest * sigmoid(-t) + times(rest / tau - 1, image) - times(k * rest, above) / tau};
  }
};

/// Another link of −t: what a rejected response's reward meets.
template <link F> struct flipped {
  F of{};
  outcome operator()(double t) const {
    const outcome o = of(-t);
    return {o.value, -o.slope};
  }
};

/// −t, slope −1
struct linear {
  outcome operator()(double t) const { return {-t, t != t ? t : -1}; }
};

} // namespace perdita::inline PERDITA_ABI::links
