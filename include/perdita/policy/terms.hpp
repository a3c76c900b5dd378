// SPDX-License-Identifier: MIT
#pragma once

/// What a token contributes to a policy-gradient loss: a value and a slope.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/errors.hpp"
#include "tokens.hpp"

namespace perdita::inline PERDITA_ABI::policy {

/// What a term sees of a token: l, its log-ratio x to the old policy (of the token or the sequence,
/// as the level says), ρ = e^x, and the advantage A.
struct point {
  double log_probability, log_ratio, ratio, advantage;
};
/// A term's value; its derivative with respect to x, or, where the term is `direct`, to l; and
/// whether the ratio was held from below (−1) or from above (+1).
struct part {
  double value, slope;
  int clipped = 0;
};

inline constexpr double no_limit = std::numeric_limits<double>::infinity();

// A term of your own is a type like these: `direct`, check(loss's name), and the function.

/// −A l: slope −A. Source: Williams 1992.
struct reinforce {
  static constexpr bool direct = true;
  void check(const char*) const {}
  part operator()(const point& p) const {
    return {core::times_or_nan(-p.advantage, p.log_probability), -p.advantage};
  }
};

/// max(−A ρ, −A clip(ρ, 1 − low, 1 + high)): slope −A ρ, or 0 where the clipped branch is the
/// larger; on ties the other counts. For A < 0, `dual` holds the value at −A · dual (dual-clip),
/// and `delta` holds ρ in the first branch at delta > 1 + high (two-sided clipping); beyond either
/// the slope is 0. Where ρ overflows: A > 0 is clipped, A < 0 is +inf, unless `dual` or `delta`
/// holds. Sources: Schulman et al. 2017; Ye et al. 2020; INTELLECT-2, 2025.
struct clip {
  double low = 0.2, high = 0.2;
  double dual = no_limit;
  double delta = no_limit;

  static constexpr bool direct = false;
  void check(const char* name) const {
    core::require(low >= 0 && low <= 1, name, "low", low, "a number in [0, 1]");
    core::require(high >= 0, name, "high", high, "a number, 0 or more");
    core::require(dual > 1, name, "dual", dual, "a number above 1");
    core::require(delta > 1 + high, name, "delta", delta, "a number above 1 + high");
  }
  part operator()(const point& p) const {
    const double a = -p.advantage, floor = 1 - low, cap = 1 + high;
    const int side = a < 0 && p.ratio > cap ? 1 : a > 0 && p.ratio < floor ? -1 : 0;
    part result{core::times_or_nan(a, std::min(p.ratio, delta)),
                p.ratio > delta ? 0 : core::times_or_nan(a, p.ratio), side};
    if (const double held = core::times_or_nan(a, std::clamp(p.ratio, floor, cap));
        held > result.value)
      result = {held, 0, side};
    if (a > 0 && result.value > a * dual)
      result = {a * dual, 0, side};
    return result;
  }
};

/// −A clip(ρ, floor, cap) l, where the clipped ratio is held constant: slope −A clip(ρ, floor,
/// cap), which no clipping silences. TRL and Liger have no floor, and their ε_high is the cap
/// itself; verl's form is cispo::around_one(ε_low, ε_high). Source: MiniMax-M1, 2025.
struct cispo {
  double floor = 0, cap = 5;

  static constexpr cispo around_one(double low, double high) { return {1 - low, 1 + high}; }
  static constexpr bool direct = true;
  void check(const char* name) const {
    core::require(floor >= 0, name, "floor", floor, "a number, 0 or more");
    core::require(cap >= floor && cap > 0, name, "cap", cap, "a number above 0, floor or more");
  }
  part operator()(const point& p) const {
    const double slope = core::times_or_nan(-p.advantage, std::clamp(p.ratio, floor, cap));
    const int side = p.advantage > 0 && p.ratio > cap     ? 1
                     : p.advantage < 0 && p.ratio < floor ? -1
                                                          : 0;
    return {core::times_or_nan(slope, p.log_probability), slope, side};
  }
};

/// −(4/τ) q A, q = σ(τ(ρ − 1)), a soft gate: slope −4 q (1 − q) ρ A, that of PPO at ρ = 1. τ is
/// `gain` for A > 0, else `loss`. Source: SAPO, Qwen team 2025.
struct sapo {
  double gain = 1, loss = 1.05;

  static constexpr bool direct = false;
  void check(const char* name) const {
    core::positive(name, "gain", gain);
    core::positive(name, "loss", loss);
  }
  part operator()(const point& p) const {
    const double tau = p.advantage > 0 ? gain : loss, z = tau * (p.ratio - 1);
    const double e = std::exp(-std::fabs(z)), near = 1 / (1 + e), far = e / (1 + e);
    const double q = z >= 0 ? near : far, rest = z >= 0 ? far : near;
    const double gate = core::times_or_nan(4 * q * rest, p.ratio);
    return {core::times_or_nan(-4 / tau * q, p.advantage), core::times_or_nan(-gate, p.advantage)};
  }
};

/// −φ A l, φ = e^{λ + k x − λ e^x} held constant, with x held in ±limit: slope −φ A. φ(x = 0) = 1,
/// and the peak is at e^x = k/λ. k and λ are the first pair for A ≥ 0, else the second; x is the
/// log-ratio of the sequence (level::sequence). Source: VESPO, 2026.
struct vespo {
  double k = 2, lambda = 3, k_loss = 3, lambda_loss = 2;
  double limit = 20;

  static constexpr bool direct = true;
  void check(const char* name) const {
    for (const double x : {k, lambda, k_loss, lambda_loss})
      core::not_negative(name, "k or lambda", x);
    core::require(limit > 0 && limit <= 700, name, "limit", limit, "a number in (0, 700]");
  }
  part operator()(const point& p) const {
    const bool gains = p.advantage >= 0;
    const double x = std::clamp(p.log_ratio, -limit, limit);
    const double exponent =
        (gains ? k : k_loss) * x - (gains ? lambda : lambda_loss) * std::expm1(x);
    const double slope = core::times_or_nan(-p.advantage, std::exp(exponent));
    return {core::times_or_nan(slope, p.log_probability), slope};
  }
};

/// −A l + ½ β x²: slope −A + β x. l = −inf: +inf for β > 0. Source: Richemond et al., DRO, 2024.
struct dro {
  double beta = 0.1;

  static constexpr bool direct = true;
  static constexpr bool only_of_tokens = true;
  void check(const char* name) const { core::not_negative(name, "beta", beta); }
  part operator()(const point& p) const {
    const double line = core::times_or_nan(-p.advantage, p.log_probability);
    const double square = core::times_or_nan(beta / 2, p.log_ratio * p.log_ratio);
    const bool outgrown = line == core::no_score && square == -line;
    return {outgrown ? square : line + square, core::times_or_nan(beta, p.log_ratio) - p.advantage};
  }
};

/// −A s, s the geometric mean of the sequence's ratios, each clipped first on the side where it
/// would go on to gain: log ρ ≤ high for A > 0, log ρ ≥ −low for A < 0. Slope −A s for each token
/// that is not clipped. With level::sequence_mean. Source: Zhao et al., GMPO, 2025.
struct gmpo {
  double low = 0.4, high = 0.4;

  static constexpr bool direct = false;
  void check(const char* name) const {
    core::require(low >= 0, name, "low", low, "a number, 0 or more");
    core::require(high >= 0, name, "high", high, "a number, 0 or more");
  }
  /// −1 or +1 where a token's log-ratio is clipped, to −low or high.
  int side(double log_ratio, double advantage) const {
    return advantage > 0 && log_ratio > high ? 1 : advantage < 0 && log_ratio < -low ? -1 : 0;
  }
  part operator()(const point& p) const {
    const double value = core::times_or_nan(-p.advantage, p.ratio);
    return {value, value};
  }
};

/// PPO's loss of a value function: ½ max((v − R)², (clip(v, v_old ± width) − R)²), slope v − R, or
/// 0 where the clipped branch is the larger. The batch has v as `policy`, v_old as `old` (without
/// it, nothing is clipped) and the returns R as `token_advantages`. The by-product clip_low or
/// clip_high says where v lies below or above and is held; of the others, none has a meaning.
/// Source: Schulman et al.'s code, 2017.
struct clipped_value {
  double width = 0.2;

  static constexpr bool direct = true;
  static constexpr bool only_of_tokens = true;
  void check(const char* name) const {
    core::require(width >= 0, name, "width", width, "a number, 0 or more");
  }
  part operator()(const point& p) const {
    const double off = p.log_probability - p.advantage;
    if (std::fabs(p.log_ratio) > width) {
      const double to = p.log_ratio < 0 ? -width : width, held = off - p.log_ratio + to;
      if (held * held > off * off)
        return {held * held / 2, 0, p.log_ratio < 0 ? -1 : 1};
    }
    return {off * off / 2, off};
  }
};

} // namespace perdita::inline PERDITA_ABI::policy
