// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "../policy/advantages.hpp"

namespace perdita::inline PERDITA_ABI {

/// B pairs of completions as 2B sequences × tokens: the chosen of all pairs, then the rejected ones
/// in the same order.
template <class T> struct token_pairs {
  matrix_view<const T> policy{};      ///< l: log-probabilities of the tokens
  matrix_view<const T> reference{};   ///< q: under the reference
  matrix_view<const T> guide{};       ///< tgdpo: under the model that was trained before
  matrix_view<const T> divergence{};  ///< tdpo: D_t = KL(ref‖π) at each token
  policy::token_mask mask{};          ///< 0 where a token does not count; or
  policy::sequence_lengths lengths{}; ///< how many do, from the first on; else all do
};

/// What is wanted: gradients of the shape of token_pairs::policy, and one number per pair, 0 where
/// the row weight is 0.
template <class T> struct token_pair_outputs {
  matrix_view<T> gradient{};            ///< with respect to l
  matrix_view<T> divergence_gradient{}; ///< with respect to D
  vector_view<T> chosen_rewards{}, rejected_rewards{};
  vector_view<T> margins{};   ///< chosen − rejected reward
  double* accuracy = nullptr; ///< fraction of the pairs that count with a margin above 0
};

/// Settings of tgdpo.
struct tgdpo_options {
  double beta = 0.1;  ///< β > 0, of the log-ratio and in the weights
  double alpha = 0.5; ///< α ≥ 0, of the guide in the weights
  double floor = -std::numeric_limits<double>::infinity(); ///< least weight of a token
  perdita::reduction reduction = perdita::reduction::mean;

  static constexpr const char* name = "tgdpo";
  static constexpr bool has_guide = true, has_divergence = false;
  /// Weight of a token whose log-ratio of guide and reference is r.
  double weight(bool chosen, double r) const {
    const double f = 1 + core::times_or_nan((chosen ? alpha : -alpha) * beta, r);
    return f < floor ? floor : f;
  }
  double of_divergence() const { return 0; }
  bool moves_divergence(bool) const { return false; }
};

/// Settings of tdpo.
struct tdpo_options {
  double beta = 0.1;  ///< β > 0
  double alpha = 0.5; ///< α ≥ 0, of the divergences' difference in the second form
  bool second = true; ///< TDPO2, else TDPO1
  perdita::reduction reduction = perdita::reduction::mean;

  static constexpr const char* name = "tdpo";
  static constexpr bool has_guide = false, has_divergence = true;
  double weight(bool, double) const { return 1; }
  double of_divergence() const { return second ? alpha : 1; }
  bool moves_divergence(bool chosen) const { return !second || !chosen; }
};

/// The pairs' losses with weights of tokens, of Σ over the tokens that count:
///
///   ℓ = log(1 + e^{−β (s_w − s_l)}),   s = Σ_t f_t (l_t − q_t) + κ Σ_t D_t
///   ∂ℓ/∂l_t = ∓β σ(−β (s_w − s_l)) f_t   (− chosen, + rejected)
///   ∂ℓ/∂D_t = the same with κ for f_t
///
/// TGDPO: f_t = 1 ± α β (guide_t − q_t) (+ chosen), at least `floor`, constant in the gradient;
/// κ = 0. The theory wants f > 0, the published code has no floor. α = 0: DPO. Rewards β s.
/// TDPO1: f = 1, κ = 1. TDPO2: κ = α, and the chosen D_t are constant in the gradient, so that it
/// is not the derivative of the value with respect to them. α = 0: DPO. Rewards β (Σ (l − q) + Σ
/// D), whatever α. D_t depends on the logits of π: its derivative is p − ref; with it, those of
/// TDPO1 with respect to a token's logits are ∓β σ(·) (onehot − ref).
///
/// Shapes: see token_pairs. A sequence without tokens has s = 0. Call options: row_weights, one per
/// pair, which the mean divides by; upstream, values, scale, normaliser, accumulate, run_on
/// (memory is not used: some numbers for each pair are allocated). Special values: −inf in l or q
/// of a token that counts makes s infinite, unless f is 0; both at once, and NaN, make NaN of the
/// pair. A pair with z = +inf has no gradient, however large f is. Tokens that do not count are
/// never looked at, and their gradient is 0. Computed in double; threads do not matter. Throws
/// std::invalid_argument. Sources: Zeng et al., "Token-level direct preference optimization", 2024;
/// Zhu et al., "TGDPO", 2025.
///
///   perdita::tdpo<float> loss({.beta = 0.1, .alpha = 0.5});
///   float value = loss({.policy = l, .reference = q, .divergence = d, .lengths = n},
///                      {.gradient = d_l, .divergence_gradient = d_d});
///
/// From hidden states: sequence_head (sequence.hpp) over a padded layout of 2B sequences × tokens
/// makes l, q and D as its by-products target_log_probability, reference_log_probability and
/// forward_kl, one number a row, of which matrices are views; all three are 0 in rows that predict
/// nothing that counts, so that no mask is needed. It takes both gradients back:
///
///   pass.backward(zeros, d_hidden, d_weights,
///                 {.d_log_probability = d_l, .d_forward_kl = d_d});
template <class Options, class T = float> class token_preference {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  using options = Options;
  using pairs = token_pairs<T>;
  using outputs = token_pair_outputs<T>;
  static constexpr const char* name = Options::name;

  token_preference() : token_preference(Options{}) {}
  explicit(false) token_preference(const Options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::not_negative(name, "alpha", o.alpha);
    if constexpr (Options::has_guide)
      core::require(o.floor == o.floor, name, "floor", o.floor, "a number");
    core::require_reduction(name, o.reduction);
  }
  const Options& settings() const { return options_; }

  /// The value; gradients and by-products where `out` has a place for them.
  T operator()(const pairs& in, const outputs& out = {}, const call_options<T>& call = {}) const {
    const core::counted_tokens tokens = check(in, out, call);
    const index n = tokens.rows / 2;
    const double share = core::share_of(call, options_.reduction, n);
    std::vector<pair_numbers> numbers(static_cast<std::size_t>(n));
    const auto workers = std::min(static_cast<std::size_t>(n), call.run_on.concurrency());
    core::share_out(n, workers, call.run_on, [&](std::size_t) {
      std::vector<std::int64_t> counts(static_cast<std::size_t>(tokens.cols));
      return [&, counts](index i) mutable {
        auto& pair = numbers[static_cast<std::size_t>(i)];
        const double weight = core::weight_of(call, i);
        if (weight != 0)
          pair = compare(in, tokens, i, counts.data());
        const double factor =
            weight * share * static_cast<double>(call.scale) * core::upstream_of(call, i);
        pair.value *= weight;
        for (const bool chosen : {true, false})
          write(in, out, tokens, chosen ? i : n + i, chosen, weight == 0, factor * pair.slope,
                call.accumulate, counts.data());
      };
    });
    return report(numbers, out, call, share);
  }

private:
  struct pair_numbers {
    double value = 0, slope = 0; ///< of the margin
    double rewards[2] = {};      ///< chosen, rejected
  };

  core::counted_tokens check(const pairs& in, const outputs& out,
                             const call_options<T>& call) const {
    const core::batch_checks<T> checks{{name}};
    const index rows = in.policy.rows;
    core::require(rows % 2 == 0, name, "rows of policy", rows,
                  "an even number: all chosen, then all rejected");
    std::vector<core::extent> memory;
    const auto view = [&](const char* what, const auto& m, bool needed) {
      if (!m.data && m.rows * m.cols == 0 && !(needed && rows * in.policy.cols > 0))
        return;
      checks.size((std::string("rows of ") + what).c_str(), m.rows, rows, "as many as of policy");
      checks.size((std::string("columns of ") + what).c_str(), m.cols, in.policy.cols,
                  "as many as of policy");
      checks.memory(what, m.data, m.rows * m.cols);
      memory.push_back(core::bytes_of(core::matrix_data<T>(matrix_view<const T>(m))));
    };
    view("gradient", out.gradient, false);
    view("divergence_gradient", out.divergence_gradient, false);
    for (const auto& v : {out.chosen_rewards, out.rejected_rewards, out.margins, call.values})
      memory.push_back(core::bytes_of(v));
    const std::size_t written = memory.size();
    view("policy", in.policy, true);
    view("reference", in.reference, true);
    view("guide", in.guide, Options::has_guide);
    view("divergence", in.divergence, Options::has_divergence);
    memory.push_back(core::bytes_of(call.row_weights));
    memory.push_back(core::bytes_of(call.upstream));
    if (!Options::has_divergence && out.divergence_gradient.data)
      core::fail(name, "divergence_gradient", "given", "none: the loss has no divergence");
    for (const auto& v : {out.chosen_rewards, out.rejected_rewards, out.margins})
      if (v.data || v.size > 0)
        checks.entries("rewards or margins", v, rows / 2, "as many as there are pairs");
    const core::counted_tokens tokens{in.mask, in.lengths, rows, in.policy.cols};
    tokens.check(name);
    checks.call(call, rows / 2, false, "as many as there are pairs");
    core::require_apart(name, memory, written);
    return tokens;
  }

  double weight(const pairs& in, index r, index t, bool chosen) const {
    if constexpr (Options::has_guide)
      return options_.weight(chosen, static_cast<double>(in.guide(r, t)) -
                                         static_cast<double>(in.reference(r, t)));
    else
      return 1;
  }

  pair_numbers compare(const pairs& in, const core::counted_tokens& tokens, index i,
                       std::int64_t* counts) const {
    pair_numbers pair;
    double scores[2];
    for (const bool chosen : {true, false}) {
      const index r = chosen ? i : tokens.rows / 2 + i;
      core::exact_sum ratios, divergences;
      tokens.read(r, counts);
      for (index t = 0; t < tokens.cols; ++t) {
        if (!counts[t])
          continue;
        const double x =
            static_cast<double>(in.policy(r, t)) - static_cast<double>(in.reference(r, t));
        ratios.add(core::times_or_nan(weight(in, r, t, chosen), x));
        if constexpr (Options::has_divergence)
          divergences.add(static_cast<double>(in.divergence(r, t)));
      }
      scores[!chosen] =
          ratios.value() + core::times_or_nan(options_.of_divergence(), divergences.value());
      pair.rewards[!chosen] = options_.beta * (ratios.value() + divergences.value());
    }
    const double z = options_.beta * (scores[0] - scores[1]), e = std::exp(-std::fabs(z));
    pair.value = std::fmax(-z, 0) + std::log1p(e);
    pair.slope = -options_.beta * (z > 0 ? e : 1) / (1 + e);
    return pair;
  }

  void write(const pairs& in, const outputs& out, const core::counted_tokens& tokens, index r,
             bool chosen, bool removed, double slope, bool accumulate, std::int64_t* counts) const {
    if (!out.gradient.data && !out.divergence_gradient.data)
      return;
    tokens.read(r, counts);
    const auto put = [&](T& to, double more) {
      to = static_cast<T>(accumulate ? static_cast<double>(to) + more : more);
    };
    const double own = chosen ? slope : -slope;
    const double of_divergence =
        options_.moves_divergence(chosen) ? own * options_.of_divergence() : 0;
    for (index t = 0; t < tokens.cols; ++t) {
      const bool counted = counts[t] != 0 && !removed;
      if (out.gradient.data)
        put(out.gradient(r, t), counted ? core::times_or_nan(own, weight(in, r, t, chosen)) : 0);
      if (out.divergence_gradient.data)
        put(out.divergence_gradient(r, t), counted ? of_divergence : 0);
    }
  }

  static T report(const std::vector<pair_numbers>& numbers, const outputs& out,
                  const call_options<T>& call, double share) {
    core::exact_sum total;
    index right = 0, counted = 0;
    const auto put = [](const vector_view<T>& to, index i, double x) {
      if (to.data)
        to[i] = static_cast<T>(x);
    };
    for (index i = 0; i < static_cast<index>(numbers.size()); ++i) {
      const auto& pair = numbers[static_cast<std::size_t>(i)];
      total.add(pair.value);
      put(call.values, i, pair.value);
      put(out.chosen_rewards, i, pair.rewards[0]);
      put(out.rejected_rewards, i, pair.rewards[1]);
      put(out.margins, i, pair.rewards[0] - pair.rewards[1]);
      counted += core::weight_of(call, i) != 0;
      right += pair.rewards[0] > pair.rewards[1];
    }
    if (out.accuracy)
      *out.accuracy = counted == 0 ? 0 : static_cast<double>(right) / static_cast<double>(counted);
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

  Options options_;
};

template <class T = float> using tgdpo = token_preference<tgdpo_options, T>;
template <class T = float> using tdpo = token_preference<tdpo_options, T>;

namespace core {

/// Views of pairs as in token_pairs.
template <class M>
policy::detail::token_views tokens_of_pairs(const char* name, const char* what, const M& first,
                                            const policy::token_mask& mask,
                                            const policy::sequence_lengths& lengths) {
  policy::detail::token_views views(name, first, mask, lengths);
  views.same(what, first);
  require(first.rows % 2 == 0, name, what, first.rows,
          "an even number of rows: all chosen, then all rejected");
  return views;
}

} // namespace core

/// LD-DPO's weights of the tokens of pairs (shaped as token_pairs): 1 of the first min(n, n′) that
/// count in each of the two, α of those beyond, 0 of those that do not count. For
/// sequence_call::token_weights of the policy, and of the reference (as TRL from 0.29 on; before,
/// and in LLaMA-Factory, of the policy alone). α = 1: DPO. Source: Liu et al., "Length
/// desensitization in direct preference optimization", 2024.
template <core::real_output_matrix W>
void ld_weights(W&& weights, double alpha, const policy::token_mask& mask = {},
                const policy::sequence_lengths& lengths = {}) {
  constexpr const char* name = "ld_weights";
  const auto w = core::as_matrix(weights);
  core::require(alpha >= 0 && alpha <= 1, name, "alpha", alpha, "a number in [0, 1]");
  auto views = core::tokens_of_pairs(name, "weights", w, mask, lengths);
  const index pairs = w.rows / 2;
  for (index i = 0; i < pairs; ++i) {
    const index shared = std::min(views.tokens.read(i, views.counts.data()),
                                  views.tokens.read(pairs + i, views.counts.data()));
    for (const index r : {i, pairs + i}) {
      views.tokens.read(r, views.counts.data());
      index seen = 0;
      for (index t = 0; t < w.cols; ++t) {
        const bool counts = views.counts[static_cast<std::size_t>(t)] != 0;
        seen += counts;
        core::put(w(r, t), !counts ? 0 : seen <= shared ? 1 : alpha);
      }
    }
  }
}

/// WPO's weights c c′ of pairs, at most `cap`, for preference_pairs::weights: of each response
///
///   c = e^(mean_t (l_t − log Σ_k p_t[k]²))
///
/// over the tokens that count; 1 of none. l: log-probabilities of the tokens as in token_pairs.
/// log Σ p² is log Σ e^2z − 2 log Σ e^z: the log_sum_exp of cross_entropy of temperature ½, less
/// twice that of temperature 1. Constants for the gradient. cap = 1: the authors' code and TRL up
/// to 0.28; TRL has none from 0.29 on. Source: Zhou et al., "WPO: enhancing RLHF with weighted
/// preference optimization", EMNLP 2024.
template <core::real_matrix L, core::real_matrix P, core::real_output_vector W>
void wpo_weights(L&& policy, P&& log_squares, W&& weights, double cap = 1,
                 const policy::token_mask& mask = {},
                 const policy::sequence_lengths& lengths = {}) {
  constexpr const char* name = "wpo_weights";
  const auto l = core::as_matrix(policy);
  const auto squares = core::as_matrix(log_squares);
  const auto w = core::as_vector(weights);
  core::require(cap > 0, name, "cap", cap, "a number above 0");
  auto views = core::tokens_of_pairs(name, "policy", l, mask, lengths);
  views.same("log_squares", squares);
  const index pairs = l.rows / 2;
  core::sequence_checks<double>{name}.entries("weights", w, pairs, "as many as there are pairs");
  const core::extent memory[] = {core::bytes_of(w), core::bytes_of(l), core::bytes_of(squares)};
  core::require_apart(name, memory, 1);
  for (index i = 0; i < pairs; ++i) {
    double exponent = 0;
    for (const index r : {i, pairs + i}) {
      const index n = views.tokens.read(r, views.counts.data());
      core::exact_sum sum;
      for (index t = 0; t < l.cols; ++t)
        if (views.counts[static_cast<std::size_t>(t)])
          sum.add(static_cast<double>(l(r, t)) - static_cast<double>(squares(r, t)));
      exponent += n > 0 ? sum.value() / static_cast<double>(n) : 0;
    }
    const double weight = std::exp(exponent);
    core::put(w[i], weight > cap ? cap : weight);
  }
}

/// Settings of rto_rewards, as published.
struct rto_options {
  double beta = 0.05;      ///< of the trained model's log-ratio
  double clip = 0.05;      ///< which times beta is held in ±clip
  double kl_weight = 0.05; ///< ≥ 0: of log π − log ref
  double score_clip = 10;  ///< the reward model's score is held in ± this
};

/// RTO's rewards of tokens, for policy::generalised_advantages and ppo:
///
///   r_t = clip(β (guide_t − ref_t), ±clip) − kl_weight (l_t − ref_t) + [t is last] clip(score,
///   ±10)
///
/// 0 where a token does not count. Guide: log-probabilities of a model trained with DPO. May be in
/// place of any of the three.
/// Source: Zhong et al., "DPO meets PPO: reinforced token optimization", 2024.
template <core::real_matrix L, core::real_matrix F, core::real_matrix D, core::real_vector S,
          core::real_output_matrix R>
void rto_rewards(L&& policy, F&& reference, D&& guide, S&& scores, R&& rewards,
                 const rto_options& o = {}, const policy::token_mask& mask = {},
                 const policy::sequence_lengths& lengths = {}) {
  constexpr const char* name = "rto_rewards";
  core::positive(name, "beta", o.beta);
  core::require(o.clip >= 0, name, "clip", o.clip, "a number, 0 or more");
  core::require(o.score_clip >= 0, name, "score_clip", o.score_clip, "a number, 0 or more");
  const auto d = core::as_matrix(guide);
  const auto q = core::as_matrix(reference);
  const auto out = core::as_matrix(rewards);
  const auto score = core::as_vector(scores);
  const auto l = core::as_matrix(policy);
  const policy::detail::token_views views(name, l, mask, lengths);
  views.same("guide", d);
  core::require_same_or_apart(name, out, d);
  core::require_same_or_apart(name, out, core::as_column(score));
  core::require_memory(name, "scores", score.data, score.size);
  std::vector<double> held;
  for (index i = 0; i < score.size; ++i)
    held.push_back(std::clamp(static_cast<double>(score[i]), -o.score_clip, o.score_clip));
  policy::detail::write_rewards(name, l, q, vector_view<const double>(held), out,
                                {.weight = o.kl_weight}, views.tokens, [&](index i, index t) {
                                  const double r = o.beta * (static_cast<double>(d(i, t)) -
                                                             static_cast<double>(q(i, t)));
                                  return std::clamp(r, -o.clip, o.clip);
                                });
}

} // namespace perdita::inline PERDITA_ABI
