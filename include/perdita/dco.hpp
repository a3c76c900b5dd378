// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "core/target_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// With a = log(1 − p) and t = 1 − (1 − p)^N:  f = −log t,  f' = N p (1 − p)^{N−1} / t.
struct dco_function {
  double attempts;

  template <class Odds> auto operator()(const Odds& o) const {
    using W = std::remove_cvref_t<decltype(o.hit)>;
    if (attempts == 1)
      return value_and_slope{o.surprise, W(1)};
    const W n(attempts), one(1);
    // The smaller of p and 1 − p has the digits.
    const W a = select(o.hit < W(0.5), log1p(-o.hit), log(o.miss));
    // Where p itself is lost, (1 − p)^N is e^{−N p}; where N p is lost beside 1, so are both.
    const auto lost = o.surprise > W(640);
    const W log_np = log(n) - o.surprise, np = exp(log_np);
    const auto rare = log_np < W(-40);
    const W power = select(lost, -np, n * a), fails = exp(power), covered = -expm1(power);
    const W value = select(covered < W(0.5), -log(covered), -log1p(-fails));
    const W slope = select(lost, np * fails, n * o.hit * exp(W(attempts - 1) * a)) / covered;
    return value_and_slope{select(rare, -log_np, value), select(rare, one, slope)};
  }
};

} // namespace core

/// Direct coverage optimisation: the negative log-probability that at least one of N independent
/// samples is right (pass@N),
///
///   ℓ = −log(1 − (1 − p_y)^N),   p = softmax(x)
///   ∂ℓ/∂x = F (p − e_y),   F = N p_y (1 − p_y)^{N−1} / (1 − (1 − p_y)^N) in (0, 1]
///
/// N = 1: cross-entropy. F limits confidence: it falls to 0 once N samples find the answer, near
/// p_y = 1/N. Value and F keep their digits from N p = 1e-300 to p = 1.
/// For an answer of several tokens or steps, p_y is a product: take log p from token
/// log-probabilities and use coverage(), whose slope is the coefficient of their gradients.
/// The published trainers report F (held fixed) times −log p_y; here the value is ℓ itself.
/// Shapes, reductions, errors, special values and by-products: as cross_entropy; a masked label
/// costs +inf with the gradient of cross-entropy.
/// Source: Chen, Raventos, Cheng, Ganguli, Druckmann, "Rethinking fine-tuning when scaling
/// test-time compute: limiting confidence improves mathematical reasoning", 2025.
template <class T = float> class dco : public target_loss<dco<T>, T> {
public:
  struct options {
    T attempts = 1; ///< N ≥ 1, not necessarily whole
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "dco";

  dco() : dco(options{}) {}
  explicit(false) dco(const options& o) : options_(o) {
    require_attempts(static_cast<double>(o.attempts));
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = options_.attempts == 1,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

  /// Value and ∂ℓ/∂(log p).
  struct point {
    double value, slope;
  };
  /// ℓ of one answer (or one step of it) from its log-probability, a sum over its tokens:
  /// ℓ = −log(1 − (1 − e^{log p})^N), ∂ℓ/∂ log p = −F. log_probability is at most 0.
  static point coverage(double log_probability, double attempts) {
    using W = core::pack<double>;
    require_attempts(attempts);
    core::require(log_probability <= 0, name, "log_probability", log_probability,
                  "a number of at most 0");
    struct {
      W surprise, hit, miss;
    } odds{W(-log_probability), exp(W(log_probability)), -expm1(W(log_probability))};
    const auto at = core::dco_function{attempts}(odds);
    return {core::first_lane(at.value), -core::first_lane(at.slope)};
  }

private:
  friend core::target_access;
  static void require_attempts(double n) {
    core::require(n >= 1 && std::isfinite(n), name, "attempts", n, "a finite number, 1 or more");
  }
  core::dco_function function() const { return {static_cast<double>(options_.attempts)}; }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
