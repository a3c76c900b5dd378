// SPDX-License-Identifier: MIT
#pragma once

/// Estimates of KL(π‖ref) from the tokens that π has drawn.

#include <cmath>
#include <limits>

#include "tokens.hpp"

namespace perdita::inline PERDITA_ABI::policy {

/// With x = l − ref, the log-ratio of a token y drawn from π, and ρ = e^{l − old}, the value and
/// its derivative with respect to l:
///
///   k1            x                    1          unbiased; its expected gradient is 0
///   k2            x²/2                 x          biased; expected gradient ∇KL(π‖ref)
///   k3            e^{−x} − 1 + x ≥ 0   1 − e^{−x}  unbiased; expected gradient ∇KL(ref‖π), the
///                                                 other direction
///   k3_corrected  ρ (e^{−x} − 1 + x)   ρ x        as k3 for tokens of an older policy; expected
///                                                 gradient ∇KL(π‖ref)
///   k3_plus       e^{−x} − 1 + x       x          the value of k3 with the gradient of k2, not
///                                                 its derivative
///
/// Where π rules a token out that an older policy drew (l = −inf): e^{ref − old} with slope 0
/// (k3_corrected), else the limits. Where the reference rules a token out (ref = −inf): +inf, with
/// slopes 1 (k1, k3) or +inf. Where e^{−x} is beyond the largest number (x < −709), k3 is +inf and
/// its slope −inf. Source: Schulman, "Approximating KL divergence", 2020; k3_corrected:
/// DeepSeek-V3.2, 2025; k3_plus: verl.
enum class kl_estimator { k1, k2, k3, k3_corrected, k3_plus };

struct kl_part {
  double value, slope;
};

} // namespace perdita::inline PERDITA_ABI::policy

namespace perdita::inline PERDITA_ABI::core {

/// e^y − 1 − y, with its digits near 0.
inline double exp_above_tangent(double y) {
  if (std::fabs(y) <= 1) {
    double sum = 1;
    for (int k = 20; k > 2; --k)
      sum = 1 + sum * y / k;
    return y * y / 2 * sum;
  }
  return y > std::numeric_limits<double>::max() ? y : std::expm1(y) - y;
}

/// Of the log-ratios of a token: to the reference, and to the policy that drew it; `apart` is
/// log_ratio − x, which is finite where these are not.
inline policy::kl_part estimate_kl(policy::kl_estimator estimator, double x, double log_ratio,
                                   double apart) {
  using enum policy::kl_estimator;
  switch (estimator) {
  case k1:
    return {x, 1};
  case k2:
    return {x * x / 2, x};
  case k3:
    return {exp_above_tangent(-x), -std::expm1(-x)};
  case k3_plus:
    return {exp_above_tangent(-x), x};
  case k3_corrected:
    break;
  }
  const double ratio = std::exp(log_ratio);
  // Far down, ρ is too small and e^{−x} too large for a product.
  const double value = x < -1 ? std::exp(apart) * (1 + times(std::exp(x), x - 1))
                              : times_or_nan(exp_above_tangent(-x), ratio);
  return {value, ratio == 0 ? times_or_nan(ratio, x) : times_or_nan(x, ratio)};
}

} // namespace perdita::inline PERDITA_ABI::core
