// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "policy/pass.hpp"

namespace perdita::inline PERDITA_ABI {

/// Policy-gradient losses: of the log-probabilities l of B sequences of tokens that were drawn from
/// an older policy, any term × level of the ratio × reducer × KL estimator,
///
///   L = Σ_it w_it (s_it f(x_it, A_it) + β k(l_it − ref_it) − c H_it),   x from l − old
///   ∂L/∂l_it = w_it (s_it f′ + β k′),   ∂L/∂H_it = −c w_it
///
/// where f is a policy:: term, x the log-ratio of the policy::level, w the weights of the
/// policy::reducer, k a policy::kl_estimator, and s a constant weight, 1 but for the two
/// corrections. At the levels of a sequence, every token has the sequence's x; its derivative
/// reaches all of the sequence's tokens: for a direct term there is none, as its ratio is constant.
///
///   s, sampler mismatch: policy::correction, where `sampler` is given
///   s, off-policy sequences: 0 for the tokens with A < 0 of a sequence where the mean of old − l
///      is above off_policy_limit (OPSM)
///
/// Named losses are functions below that give such an object. They set the reducer and the level
/// (nash_md: kl and kl_weight too), whatever the options say.
/// Without `old`, x = 0 and ρ = 1, but the gradient flows. Advantages come from
/// policy/advantages.hpp or your own; they, `old`, `sampler` and the reference are constants.
///
/// Shapes: sequences × tokens, of any strides; see policy::batch. Tokens that do not count are
/// never looked at, and their gradient is 0. A sequence without tokens adds 0, but is one of the B;
/// a batch without tokens has value 0 and gradient 0. Call options: row_weights, one per sequence,
/// which the means divide by (by Σ w_i n_i for token_mean); upstream, values (of a sequence, times
/// its weight, before the division by the number of sequences or tokens), scale, normaliser,
/// accumulate, run_on, memory.
/// Special values: with A = 0 a term adds nothing, however large the ratio. Log-ratios are computed
/// in double, so that ρ overflows at x = 709, where value and slope are infinite unless the term
/// says otherwise; in float the results overflow at 88. −inf in l or `old` is a ratio of 0 or
/// infinity; in both, and NaN, make NaN of the token's slope (of the sequence's at its levels) and
/// of the value. Accuracy: sums of tokens are compensated. Cost: two short passes over each
/// sequence. Threads do not matter. Throws std::invalid_argument.
///
///   auto loss = perdita::dapo<float>({.high = 0.28});
///   perdita::policy::metrics seen;
///   float value = loss({.policy = l, .old = old, .advantages = a, .lengths = n},
///                      {.gradient = d_l, .metrics = &seen}, {.normaliser = tokens});
///   perdita::policy_gradient<perdita::policy::sapo, float> mine(
///       {}, {.level = perdita::policy::level::sequence_mean, .kl_weight = 0.01});
template <class Term, class T = float> class policy_gradient {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  using options = policy::options;
  using batch = policy::batch<T>;
  using outputs = policy::outputs<T>;
  static constexpr const char* name = "policy_gradient";

  policy_gradient() : policy_gradient(Term{}) {}
  explicit policy_gradient(const Term& term, const options& o = {}) : term_(term), options_(o) {
    term.check(name);
    const auto limit = [](const char* what, double x) {
      core::require(x > 0, name, what, x, "a number above 0");
    };
    const auto named = [](const char* what, auto x, auto last) {
      core::require_enumerator(name, what, x, last, "one of those that are named");
    };
    named("reducer", o.reducer, policy::reducer::sum);
    named("level", o.level, policy::level::sequence_mean_of_token);
    named("kl", o.kl, policy::kl_estimator::k3_plus);
    named("correction", o.correction, policy::correction::mask_sequence);
    core::not_negative(name, "kl_weight", o.kl_weight);
    core::not_negative(name, "entropy_weight", o.entropy_weight);
    limit("log_ratio_limit", o.log_ratio_limit);
    limit("kl_limit", o.kl_limit);
    limit("correction_cap", o.correction_cap);
    core::require(o.off_policy_limit == o.off_policy_limit, name, "off_policy_limit",
                  o.off_policy_limit, "a number");
    core::require(o.reducer != policy::reducer::constant_length ||
                      (o.constant_length > 0 && std::isfinite(o.constant_length)),
                  name, "constant_length", o.constant_length, "a finite number above 0");
    core::require(!core::term_of_tokens<Term> ||
                      (o.level == policy::level::token && o.log_ratio_limit == policy::no_limit),
                  name, "level", static_cast<int>(o.level),
                  "level::token and no log_ratio_limit for this term");
    core::require(!core::limits_tokens<Term> || o.level == policy::level::sequence_mean, name,
                  "level", static_cast<int>(o.level), "level::sequence_mean for this term");
  }
  const options& settings() const { return options_; }
  const Term& term() const { return term_; }

  /// The value; gradients and by-products where `out` has a place for them.
  T operator()(const batch& in, const outputs& out = {}, const call_options<T>& call = {}) const {
    const auto job = core::check_policy_call(name, options_, in, out, call);
    const index n = job.tokens.rows;
    core::carver count;
    using pass = core::policy_pass<Term, T>;
    count.template take<core::policy_sums>(static_cast<std::size_t>(n));
    const std::size_t shared = count.used();
    pass(term_, options_, job, call, count);
    const std::size_t scratch = count.used() - shared;
    const auto workers = std::min(static_cast<std::size_t>(n), call.run_on.concurrency());
    workspace own;
    std::byte* const bytes = (call.memory ? *call.memory : own).request(shared + workers * scratch);
    core::carver carve(bytes);
    auto* const sums = carve.template take<core::policy_sums>(static_cast<std::size_t>(n));
    core::share_out(n, workers, call.run_on, [&](std::size_t worker) {
      core::carver mine(bytes + shared + worker * scratch);
      return [sums, work = pass(term_, options_, job, call, mine)](index i) mutable {
        sums[i] = work.run(i);
      };
    });
    core::exact_sum total;
    for (index i = 0; i < n; ++i) {
      total.add(sums[i].value);
      if (call.values.data)
        call.values[i] = static_cast<T>(sums[i].value);
    }
    if (out.metrics)
      *out.metrics = core::measure_policy(sums, n);
    return static_cast<T>(job.share == 0 ? 0 : total.value() * job.share);
  }

private:
  Term term_;
  options options_;
};

namespace core {
template <class T, class Term>
policy_gradient<Term, T> policy_loss(const Term& term, policy::options o, policy::reducer reducer,
                                     policy::level level = policy::level::token) {
  o.reducer = reducer;
  o.level = level;
  return policy_gradient<Term, T>(term, o);
}
} // namespace core

// --- The published losses: a term, a reducer and a level. Other options are the caller's. --------

/// Williams 1992; of the sequences' sums, as A Σ log π is the derivative of the expected reward.
template <class T = float>
auto reinforce(const policy::reinforce& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_sum);
}
/// With policy::leave_one_out_advantages, TRL's form: the clipped ratio of whole sequences. (The
/// paper's, Ahmadian et al. 2024, is `reinforce` with the same advantages.)
template <class T = float> auto rloo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_mean, policy::level::sequence);
}
/// Schulman et al. 2017; advantages from policy::generalised_advantages.
template <class T = float> auto ppo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::token_mean);
}
/// PPO's loss of the values, see policy::clipped_value.
template <class T = float>
auto ppo_value(const policy::clipped_value& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::token_mean);
}
/// Shao et al., DeepSeekMath, 2024; advantages from policy::group_advantages. Published with
/// kl_weight 0.04.
template <class T = float> auto grpo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_mean);
}
/// GRPO with the mean over the tokens of the batch (TRL).
template <class T = float> auto bnpo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::token_mean);
}
/// Liu et al., "Understanding R1-Zero-like training", 2025: needs constant_length, and advantages
/// that are not divided by their deviation.
template <class T = float> auto dr_grpo(const policy::clip& term, const policy::options& o) {
  return core::policy_loss<T>(term, o, policy::reducer::constant_length);
}
/// Yu et al., DAPO, 2025: published with high 0.28; the tokens of the global batch go to
/// call_options::normaliser.
template <class T = float> auto dapo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::token_mean);
}
/// LUSPO, 2026 (TRL): the sequence's loss times its length.
template <class T = float>
auto luspo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_sum, policy::level::sequence_mean);
}
/// See policy::cispo; normaliser as for dapo.
template <class T = float>
auto cispo(const policy::cispo& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::token_mean);
}
/// See policy::sapo.
template <class T = float> auto sapo(const policy::sapo& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_mean);
}
/// See policy::vespo; normaliser as for dapo.
template <class T = float>
auto vespo(const policy::vespo& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::token_mean, policy::level::sequence);
}
/// Zheng et al., GSPO, 2025: published with low 3e-4, high 4e-4.
template <class T = float> auto gspo(const policy::clip& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_mean,
                              policy::level::sequence_mean);
}
/// See policy::gmpo.
template <class T = float> auto gmpo(const policy::gmpo& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_mean,
                              policy::level::sequence_mean);
}
/// Munos et al., "Nash learning from human feedback", ICML 2024 (Nash-MD), of the sequences' sums:
/// slopes β (l − ref) − (P − ½), β > 0, P − ½ the advantages, P the probability that the sequence
/// is preferred to one of a mixture of policy and reference. (TRL's value has β (l − ref) l, with a
/// constant ratio, where this has ½ β (l − ref)².)
template <class T = float> auto nash_md(double beta = 0.1, policy::options o = {}) {
  o.kl = policy::kl_estimator::k2;
  o.kl_weight = core::positive("nash_md", "beta", beta);
  return core::policy_loss<T>(policy::reinforce{}, o, policy::reducer::sequence_sum);
}
/// See policy::dro; of the sequences' sums.
template <class T = float> auto dro(const policy::dro& term = {}, const policy::options& o = {}) {
  return core::policy_loss<T>(term, o, policy::reducer::sequence_sum);
}

} // namespace perdita::inline PERDITA_ABI
