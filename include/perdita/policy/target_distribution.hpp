// SPDX-License-Identifier: MIT
#pragma once

/// Policy gradients towards a given distribution p = P/Z of sequences (GDC, KL-DPG), in logarithms.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "advantages.hpp"

namespace perdita::inline PERDITA_ABI::policy {

namespace detail {
/// Log-probabilities of sequences: of the target P, of the proposal q that drew them, and of π.
template <class P, class Q, class L> struct drawn_sequences {
  P target;
  Q proposal;
  L policy;

  drawn_sequences(const core::sequence_checks<double>& checks, P p, Q q, L l)
      : target(p), proposal(q), policy(l) {
    checks.memory("log_target", p.data, p.size);
    checks.entries("log_proposal", q, p.size, "as many as of log_target");
    checks.entries("log_policy", l, p.size, "as many as of log_target");
  }
  index size() const { return target.size; }
  /// log P − log q and log π − log q of sequence i.
  double log_weight(index i) const { return of(target, i) - of(proposal, i); }
  double log_ratio(index i) const { return of(policy, i) - of(proposal, i); }
  template <class V> static double of(const V& v, index i) { return static_cast<double>(v[i]); }
};
} // namespace detail

struct target_options {
  double log_normaliser = 0;  ///< log Z, the running mean of P/q; 0 leaves the loss times Z
  bool baseline = false;      ///< subtract Z π/q, whose expected gradient is 0
  double exponent_limit = 80; ///< log P − log q, and log π − log q, are held at most here
};

/// Advantages with which policy_gradient's `reinforce` descends −E_q[(P/q) log π]/Z, whose expected
/// gradient is that of the cross-entropy of p and π:
///
///   A = P/(Z q), or with the baseline (P/Z − π)/q
///
/// of the sequences' log-probabilities log P (−inf for those that p rules out), log q of what drew
/// them, and log π. Constants in the gradient. For a distribution with features φ,
/// log P = log a + Σ λ φ (fit_moments finds λ). May be in place of log P.
/// Sources: Parshakova et al., DPG, 2019; Khalifa et al., GDC, 2021; Go et al., f-DPG, 2023.
template <core::real_vector P, core::real_vector Q, core::real_vector L, core::real_output_vector A>
void target_advantages(P&& log_target, Q&& log_proposal, L&& log_policy, A&& advantages,
                       const target_options& o = {}) {
  constexpr const char* name = "target_advantages";
  const core::sequence_checks<double> checks{name};
  const detail::drawn_sequences drawn(checks, core::as_vector(log_target),
                                      core::as_vector(log_proposal), core::as_vector(log_policy));
  const auto a = core::as_vector(advantages);
  checks.entries("advantages", a, drawn.size(), "as many as of log_target");
  core::finite(name, "log_normaliser", o.log_normaliser);
  core::require(o.exponent_limit > 0 && o.exponent_limit <= 700, name, "exponent_limit",
                o.exponent_limit, "a number in (0, 700]");
  const auto below = [&](double x) { return std::min(x, o.exponent_limit); };
  for (index i = 0; i < drawn.size(); ++i) {
    const double target = std::exp(below(drawn.log_weight(i)) - o.log_normaliser);
    const double own = o.baseline ? std::exp(below(drawn.log_ratio(i))) : 0;
    core::put(a[i], target - own);
  }
}

/// How far a policy is from the target, by samples of the proposal.
struct target_distance {
  double log_normaliser = -std::numeric_limits<double>::infinity(); ///< log of the mean of P/q
  double kl = 0;                                                    ///< KL(p‖π)
  double total_variation = 0;                                       ///< ½ E_q |π/q − P/(Z q)|
};

/// Estimates log Z, KL(p‖π) = E_q[(P/q)(log P − log π)]/Z − log Z and the total variation from the
/// sequences' log-probabilities. With the samples' own Z, or the one that is given. Where all of P
/// is 0: log Z = −inf and NaN distances.
template <core::real_vector P, core::real_vector Q, core::real_vector L>
target_distance distance_to_target(P&& log_target, Q&& log_proposal, L&& log_policy,
                                   const double* log_normaliser = nullptr) {
  constexpr const char* name = "distance_to_target";
  const detail::drawn_sequences drawn(core::sequence_checks<double>{name},
                                      core::as_vector(log_target), core::as_vector(log_proposal),
                                      core::as_vector(log_policy));
  core::require(drawn.size() > 0, name, "log_target's size", drawn.size(), "1 or more");
  const auto n = static_cast<double>(drawn.size());
  double top = core::no_score;
  for (index i = 0; i < drawn.size(); ++i)
    top = std::max(top, drawn.log_weight(i));
  target_distance result;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (top == core::no_score) {
    result.kl = result.total_variation = nan;
    return result;
  }
  core::exact_sum sum, kl, variation;
  for (index i = 0; i < drawn.size(); ++i)
    sum.add(std::exp(drawn.log_weight(i) - top));
  result.log_normaliser = top + std::log(sum.value() / n);
  const double log_z = log_normaliser ? *log_normaliser : result.log_normaliser;
  for (index i = 0; i < drawn.size(); ++i) {
    const double w = std::exp(drawn.log_weight(i) - log_z);
    if (w != 0) // what both rule out is no difference
      kl.add(core::times_or_nan(w, drawn.of(drawn.target, i) - drawn.of(drawn.policy, i)));
    variation.add(std::fabs(std::exp(drawn.log_ratio(i)) - w));
  }
  result.kl = kl.value() / n - log_z;
  result.total_variation = variation.value() / n / 2;
  return result;
}

struct moment_options {
  double step = 0.5;       ///< of λ, times what the moments lack
  double tolerance = 0.01; ///< of the largest |μ* − μ|
  index most_steps = 1000; ///< 0 or more
};
struct moment_report {
  double gap = 0; ///< largest |μ* − μ| of the last λ
  index steps = 0;
};

/// λ of p ∝ a e^{λ·φ} with moments E_p φ = μ*, from features φ (samples × features) of samples of
/// a: by steps λ += step (μ* − μ), μ = Σ e^{λ·φ} φ / Σ e^{λ·φ}. λ starts with what it holds.
/// Source: Khalifa et al., GDC, 2021.
template <core::real_matrix F, core::real_vector M>
moment_report fit_moments(F&& features, M&& moments, std::vector<double>& lambda,
                          const moment_options& o = {}) {
  constexpr const char* name = "fit_moments";
  const auto f = core::as_matrix(features);
  const auto wanted = core::as_vector(moments);
  const core::sequence_checks<double> checks{name};
  core::require(f.rows > 0, name, "samples", f.rows, "1 or more");
  checks.memory("features", f.data, f.rows * f.cols);
  checks.entries("moments", wanted, f.cols, "as many as features");
  for (index k = 0; k < f.cols; ++k)
    core::finite(name, "moments", wanted[k]);
  checks.size("lambda", static_cast<index>(lambda.size()), f.cols, "as many as features");
  core::positive(name, "step", o.step);
  core::require(o.tolerance > 0, name, "tolerance", o.tolerance, "a number above 0");
  core::require(o.most_steps >= 0, name, "most_steps", o.most_steps, "0 or more");
  std::vector<double> scores(static_cast<std::size_t>(f.rows)), lack(lambda.size());
  const auto feature = [&](index i, std::size_t k) {
    return static_cast<double>(f(i, static_cast<index>(k)));
  };
  moment_report report;
  for (;; ++report.steps) {
    for (index i = 0; i < f.rows; ++i) {
      double score = 0;
      for (std::size_t k = 0; k < lambda.size(); ++k)
        score += lambda[k] * feature(i, k);
      scores[static_cast<std::size_t>(i)] = score;
    }
    const double top = *std::max_element(scores.begin(), scores.end());
    core::exact_sum total;
    for (double& score : scores)
      total.add(score = std::exp(score - top));
    report.gap = 0;
    for (std::size_t k = 0; k < lambda.size(); ++k) {
      core::exact_sum sum;
      for (index i = 0; i < f.rows; ++i)
        sum.add(scores[static_cast<std::size_t>(i)] * feature(i, k));
      lack[k] = static_cast<double>(wanted[static_cast<index>(k)]) - sum.value() / total.value();
      report.gap = report.gap >= std::fabs(lack[k]) ? report.gap : std::fabs(lack[k]);
    }
    if (report.gap < o.tolerance || report.gap != report.gap || report.steps == o.most_steps)
      return report;
    for (std::size_t k = 0; k < lambda.size(); ++k)
      lambda[k] += o.step * lack[k];
  }
}

} // namespace perdita::inline PERDITA_ABI::policy
