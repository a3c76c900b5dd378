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
  const auto p = core::as_vector(log_target);
  const auto q = core::as_vector(log_proposal);
  const auto l = core::as_vector(log_policy);
  const auto a = core::as_vector(advantages);
  const core::sequence_checks<double> checks{name};
  checks.size("log_proposal", q.size, p.size, "as many as of log_target");
  checks.size("log_policy", l.size, p.size, "as many as of log_target");
  checks.size("advantages", a.size, p.size, "as many as of log_target");
  for (const void* data : {static_cast<const void*>(p.data), static_cast<const void*>(q.data),
                           static_cast<const void*>(l.data), static_cast<const void*>(a.data)})
    checks.memory("an argument", data, p.size);
  core::require(std::isfinite(o.log_normaliser), name, "log_normaliser", o.log_normaliser,
                "a finite number");
  core::require(o.exponent_limit > 0 && o.exponent_limit <= 700, name, "exponent_limit",
                o.exponent_limit, "a number in (0, 700]");
  for (index i = 0; i < p.size; ++i) {
    const auto below = [&](double x) { return std::min(x, o.exponent_limit); };
    const double from = static_cast<double>(q[i]);
    const double target = std::exp(below(static_cast<double>(p[i]) - from) - o.log_normaliser);
    const double own = o.baseline ? std::exp(below(static_cast<double>(l[i]) - from)) : 0;
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
  const auto p = core::as_vector(log_target);
  const auto q = core::as_vector(log_proposal);
  const auto l = core::as_vector(log_policy);
  const core::sequence_checks<double> checks{name};
  checks.size("log_proposal", q.size, p.size, "as many as of log_target");
  checks.size("log_policy", l.size, p.size, "as many as of log_target");
  core::require(p.size > 0, name, "log_target's size", p.size, "1 or more");
  for (const void* data : {static_cast<const void*>(p.data), static_cast<const void*>(q.data),
                           static_cast<const void*>(l.data)})
    checks.memory("an argument", data, p.size);
  const auto n = static_cast<double>(p.size);
  const auto target = [&](index i) { return static_cast<double>(p[i]); };
  const auto weight = [&](index i) { return target(i) - static_cast<double>(q[i]); };
  double top = core::no_score;
  for (index i = 0; i < p.size; ++i)
    top = std::max(top, weight(i));
  target_distance result;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (top == core::no_score) {
    result.kl = result.total_variation = nan;
    return result;
  }
  core::exact_sum sum, kl, variation;
  for (index i = 0; i < p.size; ++i)
    sum.add(std::exp(weight(i) - top));
  result.log_normaliser = top + std::log(sum.value() / n);
  const double log_z = log_normaliser ? *log_normaliser : result.log_normaliser;
  for (index i = 0; i < p.size; ++i) {
    const double own = static_cast<double>(l[i]), w = std::exp(weight(i) - log_z);
    kl.add(core::times(w, target(i) - own));
    variation.add(std::fabs(std::exp(own - static_cast<double>(q[i])) - w));
  }
  result.kl = kl.value() / n - log_z;
  result.total_variation = variation.value() / n / 2;
  return result;
}

struct moment_options {
  double step = 0.5;       ///< of λ, times what the moments lack
  double tolerance = 0.01; ///< of the largest |μ* − μ|
  index most_steps = 1000;
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
  checks.size("moments", wanted.size, f.cols, "as many as features");
  checks.memory("moments", wanted.data, wanted.size);
  checks.size("lambda", static_cast<index>(lambda.size()), f.cols, "as many as features");
  core::require(o.step > 0 && std::isfinite(o.step), name, "step", o.step,
                "a finite number above 0");
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
