// SPDX-License-Identifier: MIT
#pragma once

/// Preference losses of single responses that are desirable (label 1) or not (0): KTO, APO-zero and
/// BCO; and of single responses whose chance to win is known: SPPO. Beginning of points.hpp:
/// inputs, reducers, special values, errors. Labels may be of any integral type, bool too.
///
/// A class that is absent has no part in the value, and its means in the report are NaN.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../core/batch_call.hpp"
#include "points.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Value and slope in x of a link of t = β (x − shift), which wants the sign of its class.
template <class Link>
links::outcome signed_link(const Link& link, bool desirable, double beta, double x, double shift,
                           double weight) {
  const double sign = desirable ? 1 : -1;
  const links::outcome at = link(sign * (beta * x - shift));
  return {links::times(weight, at.value), links::times(weight * beta * sign, at.slope)};
}

/// The losses of labelled points: Link of β x − shift for the desirable, of its negative for the
/// others.
template <class T, class L, class Link>
T reduce_labelled(const char* name, const sequence_scores<T>& in, const vector_view<L>& labels,
                  double beta, double shift, const double (&class_weight)[2], reduction how,
                  const vector_view<T>& gradient, const call_options<T>& call,
                  const sequence_report<T>& report, Link link) {
  score_checks<T>{name}.size("labels", labels, in.policy.size);
  score_checks<T>{name}.apart({bytes_of(gradient), bytes_of(call.values), bytes_of(report.rewards)},
                              {bytes_of(labels)});
  score_checks<T>{name}.call(call, labels.size, in.weights);
  for (index i = 0; i < labels.size; ++i)
    if (weight_of(call, i) != 0)
      read_label(name, i, static_cast<std::int64_t>(labels[i]));
  const auto desirable = [&](index i) { return labels[i] != 0; };
  return reduce_points(
      name, in, {.beta = beta}, how, gradient, call, report, desirable, [&](index i, double x) {
        return signed_link(link, desirable(i), beta, x, shift, class_weight[desirable(i)]);
      });
}

} // namespace core

/// Of n completions, the one that KTO's baseline pairs with prompt i: they are rotated by one.
constexpr index mismatched(index i, index n) { return (i + 1) % n; }

/// KTO's baseline, z0 = max(0, mean (log π(y′|x) − log π_ref(y′|x))) over mismatched pairs of
/// prompt and completion; a constant for the gradient. A batch of one has no mismatched pair and is
/// refused; sequences of length 0 have no part. NaN among the log-probabilities makes NaN, which
/// kto refuses. Over several machines: the mean of the ratios of all.
template <class T> double kto_baseline(const sequence_scores<T>& pairs) {
  const char* const name = "kto_baseline";
  const index n = pairs.policy.size;
  core::require(n >= 2, name, "pairs", n, "2 or more: one completion can only meet its own prompt");
  const double mean = core::mean_log_ratio(name, pairs).mean;
  return mean < 0 ? 0 : mean;
}

/// Kahneman-Tversky optimisation. With the log-ratio x = log π(y) − log π_ref(y),
///
///   desirable:   ℓ = w_D σ(−β (x − z0)),   ∂ℓ/∂x = −w_D β s (1 − s)
///   undesirable: ℓ = w_U σ(−β (z0 − x)),   ∂ℓ/∂x = +w_U β s (1 − s),   s = σ(β (x − z0))
///
/// The mean is over all examples, both classes together; class weights do not count in its
/// denominator. z0 ≥ 0 is a constant (kto_baseline). The paper advises a w_D n_D/(w_U n_U) of 1 to
/// 4/3. The value is that of TRL and HALOs (1 − σ in place of the paper's λ − v). −inf: the limit,
/// w or 0, with slope 0. The summary's kl is z0.
/// Source: Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, "KTO: model alignment as prospect
/// theoretic optimization", ICML 2024.
///
///   perdita::kto<float> loss({.beta = 0.1});
///   const double z0 = perdita::kto_baseline<float>({.policy = m, .reference = m_ref});
///   float value = loss({.policy = p, .reference = r}, labels, z0, d_policy);
template <class T = float> class kto {
public:
  using value_type = T;
  struct options {
    double beta = 0.1;             ///< β > 0
    double desirable_weight = 1;   ///< w_D ≥ 0
    double undesirable_weight = 1; ///< w_U ≥ 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "kto";

  kto() : kto(options{}) {}
  explicit(false) kto(const options& o) : kto(o, name) {}
  const options& settings() const { return options_; }

  /// The reduced value, and its gradient where there is memory for it.
  template <core::binary_labels_like L>
  T operator()(const sequence_scores<T>& scores, L&& labels, double baseline,
               vector_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    core::require(baseline >= 0 && std::isfinite(baseline), called_, "baseline", baseline,
                  "a finite number, 0 or more");
    const auto& o = options_;
    const T value =
        core::reduce_labelled(called_, scores, core::as_vector(labels), o.beta, o.beta * baseline,
                              {o.undesirable_weight, o.desirable_weight}, o.reduction, gradient,
                              call, report, links::sigmoid_gain());
    if (report.summary)
      report.summary->kl = baseline;
    return value;
  }

protected:
  kto(const options& o, const char* called) : options_(o), called_(called) {
    core::positive(called, "beta", o.beta);
    core::not_negative(called, "desirable_weight", o.desirable_weight);
    core::not_negative(called, "undesirable_weight", o.undesirable_weight);
    core::require_reduction(called, o.reduction);
  }

private:
  options options_;
  const char* called_; ///< in messages
};

/// APO-zero of unpaired responses: kto with z0 = 0, so that the likelihood of what is desirable is
/// raised and that of the rest is lowered, whatever the policy's divergence.
///
///   desirable: ℓ = w_D σ(−β x),   undesirable: ℓ = w_U σ(β x)
///
/// Source: D'Oosterlinck et al., "Anchored preference optimization and contrastive revisions", TACL
/// 2025; TRL's KTO with loss_type apo_zero_unpaired.
template <class T = float> class apo_zero_unpaired : private kto<T> {
public:
  using value_type = T;
  using options = typename kto<T>::options;
  static constexpr const char* name = "apo_zero_unpaired";

  apo_zero_unpaired() : apo_zero_unpaired(options{}) {}
  explicit(false) apo_zero_unpaired(const options& o) : kto<T>(o, name) {}
  using kto<T>::settings;

  template <core::binary_labels_like L>
  T operator()(const sequence_scores<T>& scores, L&& labels, vector_view<T> gradient = {},
               const call_options<T>& call = {}, const sequence_report<T>& report = {}) const {
    return kto<T>::operator()(scores, labels, 0, gradient, call, report);
  }
};

/// The running mean of BCO's rewards: two numbers, to be saved and restored with the model.
struct bco_state {
  double delta = 0; ///< mean of all β x so far
  double count = 0; ///< of how many

  /// Takes a batch in: before the loss of that batch, and only in training. Sequences of length 0
  /// have no part, nor have log-ratios that are not finite: no batch ruins the mean. None left: no
  /// change.
  template <class T> void update(const sequence_scores<T>& scores, double beta) {
    const char* const name = "bco_state";
    core::positive(name, "beta", beta);
    const auto seen = core::mean_log_ratio(name, scores, true);
    if (seen.count > 0)
      update_mean(beta * seen.mean, static_cast<double>(seen.count));
  }
  /// A mean over n rewards, gathered from several machines say; no change if it is not finite.
  void update_mean(double mean, double n) {
    const double next = delta + (mean - delta) * (n / (count + n));
    if (!std::isfinite(next))
      return;
    count += n;
    delta = next;
  }
  bool operator==(const bco_state&) const = default;
};

/// Weights of underlying distribution matching: of an undesirable response whose prompt belongs to
/// the desirable ones with probability p, p/(1 − p + 10⁻⁸) within [low, high]; 1 of the desirable.
/// For sequence_scores::weights. May be in place of the probabilities.
template <class T, core::binary_labels_like L>
void udm_weights(vector_view<const T> probabilities, L&& labels, vector_view<T> weights,
                 double low = 0.5, double high = 10) {
  const char* const name = "udm_weights";
  core::require(low >= 0 && low <= high, name, "low", low, "a number from 0 to `high`");
  const auto y = core::as_vector(labels);
  const core::score_checks<T> checks{name};
  const index n = probabilities.size;
  checks.size("probabilities", probabilities, n);
  checks.size("labels", y, n);
  checks.size("weights", weights, n);
  checks.apart({core::bytes_of(weights)}, {core::bytes_of(y)});
  core::require_same_or_apart(name, core::as_column(weights), core::as_column(probabilities));
  for (index i = 0; i < n; ++i) {
    core::read_label(name, i, static_cast<std::int64_t>(y[i]));
    if (!(probabilities[i] >= 0 && probabilities[i] <= 1))
      core::fail_at(name, "probabilities", i, core::to_text(probabilities[i]),
                    "a number in [0, 1]");
  }
  for (index i = 0; i < n; ++i) {
    const auto p = static_cast<double>(probabilities[i]);
    weights[i] = y[i] != 0 ? T(1) : static_cast<T>(std::clamp(p / (1 - p + 1e-8), low, high));
  }
}

/// Binary classifier optimisation. With the log-ratio x and the shift δ of a bco_state,
///
///   desirable:   ℓ = log(1 + e^(−(β x − δ))),   ∂ℓ/∂x = −β σ(δ − β x)
///   undesirable: ℓ = log(1 + e^(β x − δ)),      ∂ℓ/∂x = +β σ(β x − δ)
///
/// δ is a constant for the gradient. UDM weights (udm_weights) go in the scores' `weights`: they do
/// not count in the mean's denominator. The summary's delta is δ. Source: Jung, Han, Nam, On,
/// "Binary classifier optimization for large language model alignment", ACL 2025; TRL's BCO.
///
///   perdita::bco<float> loss({.beta = 0.1});
///   perdita::bco_state state;
///   state.update<float>({.policy = p, .reference = r}, 0.1);
///   float value = loss({.policy = p, .reference = r}, labels, state, d_policy);
template <class T = float> class bco {
public:
  using value_type = T;
  struct options {
    double beta = 0.1; ///< β > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "bco";

  bco() : bco(options{}) {}
  explicit(false) bco(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <core::binary_labels_like L>
  T operator()(const sequence_scores<T>& scores, L&& labels, const bco_state& state,
               vector_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    core::finite(name, "delta", state.delta);
    const T value = core::reduce_labelled(name, scores, core::as_vector(labels), options_.beta,
                                          state.delta, {1, 1}, options_.reduction, gradient, call,
                                          report, links::logistic());
    if (report.summary)
      report.summary->delta = state.delta;
    return value;
  }

private:
  options options_;
};

/// Self-play preference optimisation of single responses. With the log-ratio x to the previous
/// iterate and the chance P that the response wins against that model's (win_probabilities),
///
///   ℓ = ½ (x − (P − ½)/β)²,   ∂ℓ/∂x = x − (P − ½)/β
///
/// TRL's sppo_hard is twice this with P = 1 and 0. In the report, a response of P > ½ is chosen.
/// Source: Wu, Sun, Yuan, Ji, Yang, Gu, "Self-play preference optimization for language model
/// alignment", ICLR 2025.
template <class T = float> class sppo_points {
public:
  using value_type = T;
  struct options {
    double beta = 0.01; ///< β = 1/η > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "sppo_points";

  sppo_points() : sppo_points(options{}) {}
  explicit(false) sppo_points(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const sequence_scores<T>& scores, vector_view<const T> win_probabilities,
               vector_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const core::score_checks<T> checks{name};
    checks.size("win_probabilities", win_probabilities, scores.policy.size);
    checks.apart(
        {core::bytes_of(gradient), core::bytes_of(call.values), core::bytes_of(report.rewards)},
        {core::bytes_of(win_probabilities)});
    checks.call(call, scores.policy.size, scores.weights);
    checks.each(
        "win_probabilities", win_probabilities, "a number in [0, 1]",
        [&](index i) { return core::weight_of(call, i) != 0; },
        [](T p) { return p >= 0 && p <= 1; });
    return core::reduce_points(
        name, scores, {.beta = options_.beta}, options_.reduction, gradient, call, report,
        [&](index i) { return win_probabilities[i] > T(0.5); },
        [&](index i, double x) {
          const double off = x - (static_cast<double>(win_probabilities[i]) - 0.5) / options_.beta;
          return links::outcome{0.5 * off * off, off};
        });
  }

private:
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
