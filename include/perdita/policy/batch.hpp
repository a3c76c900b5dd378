// SPDX-License-Identifier: MIT
#pragma once

/// What a policy-gradient loss is told: options, inputs, and what it gives back.

#include "../core/views.hpp"
#include "kl_estimators.hpp"
#include "terms.hpp"
#include "tokens.hpp"

namespace perdita::inline PERDITA_ABI::policy {

/// Weight w of each token of sequence i, which has n_i tokens that count, among B sequences:
enum class reducer {
  sequence_mean,   ///< 1/(n_i B): the mean of the sequences' means (GRPO, SAPO)
  token_mean,      ///< 1/Σ n (BNPO). With call.normaliser 1/normaliser: the tokens of a global
                   ///< batch over its number of processes (DAPO, CISPO, VESPO)
  constant_length, ///< 1/(B constant_length) (Dr. GRPO)
  sequence_sum,    ///< 1/B: the mean of the sequences' sums (LUSPO)
  sum,             ///< 1
};

/// Which log-ratio x a term sees, from those of the tokens x_t = l_t − old_t.
enum class level {
  token,         ///< its own
  sequence,      ///< Σ x_t over its sequence
  sequence_mean, ///< their mean
  /// Their mean, of which only the token's own part moves (GSPO-token): the slope with respect to x
  /// is that of l_t. Equal to sequence_mean in the gradient where A and w are constant along the
  /// sequence; else not the derivative of the value.
  sequence_mean_of_token,
};

/// What becomes of tokens that a sampler drew with another probability than `old` says: their part
/// of the loss, without the KL term, is multiplied by e^{old − sampler}, at most `correction_cap`
/// (truncate), or 0 beyond it (mask); of the token, or the product over its sequence.
enum class correction { truncate, mask, truncate_sequence, mask_sequence };

struct options {
  policy::reducer reducer = policy::reducer::token_mean;
  policy::level level = policy::level::token;
  double constant_length = 0;        ///< above 0, for reducer::constant_length
  double log_ratio_limit = no_limit; ///< |x| beyond this is held, with slope 0 (verl: 20)

  kl_estimator kl = kl_estimator::k3;
  double kl_weight = 0;       ///< β ≥ 0; above 0 it needs a reference
  double kl_limit = no_limit; ///< |l − ref| beyond this is held, with slope 0 (verl: 20)

  double entropy_weight = 0; ///< ≥ 0: this times the reduced entropy is subtracted; needs entropies
  policy::correction correction = policy::correction::truncate; ///< where a sampler is given
  double correction_cap = 3;                                    ///< above 0
  double off_policy_limit = no_limit;                           ///< OPSM: see policy_gradient
};

/// Views of sequences × tokens, but for one advantage per sequence. What is not given is left out.
template <class T> struct batch {
  matrix_view<const T> policy{};           ///< l: log-probabilities of the tokens
  matrix_view<const T> old{};              ///< of the policy that drew them; else ρ = 1
  matrix_view<const T> reference{};        ///< for the KL term
  matrix_view<const T> sampler{};          ///< of the engine that in fact drew them
  vector_view<const T> advantages{};       ///< one per sequence; or
  matrix_view<const T> token_advantages{}; ///< one per token
  matrix_view<const T> entropies{};        ///< of the policy at each token
  token_mask mask{};                       ///< 0 where a token does not count; or
  sequence_lengths lengths{};              ///< how many do, from the first on; else all do
};

/// Over the tokens that count.
struct metrics {
  index tokens = 0;
  double clip_low = 0;    ///< fraction with A < 0 whose ratio is clipped from below
  double clip_high = 0;   ///< fraction with A > 0 whose ratio is clipped from above
  double clip_region = 0; ///< fraction of either
  double mean_ratio = 0;  ///< of ρ, as the terms see it
  double old_kl = 0;      ///< mean of ½ (l − old)²
  double kl = 0;          ///< mean of the estimates; 0 without a reference
  double entropy = 0;     ///< mean; 0 without entropies
  index dropped = 0;      ///< sequences that OPSM dropped
};

template <class T> struct outputs {
  matrix_view<T> gradient{};         ///< with respect to l
  matrix_view<T> entropy_gradient{}; ///< with respect to the entropies: −entropy_weight · w
  policy::metrics* metrics = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::policy
