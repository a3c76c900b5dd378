// SPDX-License-Identifier: MIT
#pragma once

/// One engine for losses that see each sequence on its own: score → link → reducer, and its result
/// is one number per sequence, the slope by its log-probability.
///
///   x = log π(y) − log π_ref(y), or without a reference, or over the sequence's length
///   loss = Σ_i w_i v_i ℓ_i(x_i) / Σ_i w_i,   w the row weights, v the weights among the scores
///
///   loss(scores, …);   loss(scores, …, gradient, call, report)
///
/// without a gradient where its view is empty. Call options as for losses of rows, a sequence being
/// a row, but that all is done in the calling thread and without memory of its own: run_on and
/// memory are not used. A token may stand for a sequence. Log-probabilities and outputs are of T,
/// and lie apart; arithmetic is in double.
///
/// An infinite x gives the limit of the link, NaN makes NaN of its sequence, of the reduced value,
/// and of no other gradient. An infinite reference is refused: what it holds for impossible has no
/// ratio. Where lengths are given, a sequence of length 0 has no part in anything, nor has one of
/// row weight 0; what stands there is not looked at. Nothing left gives 0. Throws
/// std::invalid_argument, before anything is written.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "../core/sequences.hpp"
#include "inputs.hpp"
#include "link.hpp"

namespace perdita::inline PERDITA_ABI {

/// What is known of N sequences.
template <class T> struct sequence_scores {
  vector_view<const T> policy;      ///< log-probability, summed over the tokens
  vector_view<const T> reference{}; ///< the same of the reference model; finite
  token_counts lengths{};           ///< tokens that were summed over, 0 or more
  /// Factors of value and gradient that do not count in the mean's denominator (that is what
  /// call_options::row_weights are for): BCO's and WPO's.
  vector_view<const T> weights{};
};

/// By-products over a batch, by class. Means are over what counts, unweighted, and NaN where there
/// is nothing to average.
struct sequence_summary {
  double chosen_rewards = 0, rejected_rewards = 0;
  double margins = 0;    ///< the difference of the two
  double accuracies = 0; ///< of lists: how often the best has a reward above the worst's; else NaN
  double chosen_logps = 0, rejected_logps = 0; ///< of the policy, as they were given
  double kl = 0;                               ///< KTO's baseline z0
  double delta = 0;                            ///< BCO's shift
  index chosen = 0, rejected = 0;              ///< how many
  index empty = 0;                             ///< sequences of length 0
};

/// By-products. A reward is β times the score that the link sees. No view, no cost.
template <class T> struct sequence_report {
  vector_view<T> rewards{}; ///< of each sequence; of lists, of each candidate, list by list
  sequence_summary* summary = nullptr;
};

namespace core {

template <class V>
concept binary_labels_like = vector_like<V> && std::integral<typename element_of<V>::type>;

/// What a score is made of: x = factor (log π − log π_ref)/length^power, less offsets of its own.
struct score_rule {
  bool has_reference = true;
  double beta = 1;        ///< of the reward: β x
  double power = 0;       ///< 0: of sums, no length is asked for
  bool per_token = false; ///< the mean is over tokens: Σ w_i length_i divides
};

/// The checks and the arithmetic that points and lists share.
template <class T> struct score_checks {
  const char* name;

  template <class V> void size(const char* what, const vector_view<V>& v, index expected) const {
    if (v.size != expected)
      fail(name, what, to_text(v.size) + " long", to_text(expected) + " (one for each sequence)");
    if (!v.data && expected > 0)
      fail(name, what, "null", "a pointer to memory");
  }
  template <class V>
  void optional(const char* what, const vector_view<V>& v, index expected) const {
    if (v.data || v.size > 0)
      size(what, v, expected);
  }
  /// That holds(v[i]) for each i that counts.
  template <class V, class Counts, class Holds>
  void each(const char* what, const vector_view<V>& v, const char* expected, Counts counts,
            Holds holds) const {
    for (index i = 0; v.data && i < v.size; ++i)
      if (counts(i) && !holds(v[i]))
        fail_at(name, what, i, to_text(v[i]), expected);
  }
  template <class V, class Counts>
  void reference(const char* what, const vector_view<V>& v, index expected, Counts counts) const {
    if (v.size == 0 && expected > 0)
      fail(name, what, "missing", "log-probabilities of that model, one for each sequence");
    size(what, v, expected);
    each(what, v, "a finite number", counts, [](auto x) { return !std::isinf(x); });
  }
  /// The shape of token counts; false where there are none.
  bool lengths(const token_counts& v, index lists, index each, bool needed) const {
    if (!v.given()) {
      if (needed && lists * each > 0)
        fail(name, "lengths", "missing", "how many tokens each sequence has");
      return false;
    }
    if (v.entries.rows != lists || v.entries.cols != each)
      fail(name, "lengths", to_text(v.entries.rows) + " × " + to_text(v.entries.cols),
           to_text(lists) + " × " + to_text(each) + " (one for each sequence)");
    require_memory(name, "lengths", v.entries.data, lists * each);
    return true;
  }
  void length(index i, std::int64_t n, std::int64_t least) const {
    if (n < least)
      fail_at(name, "lengths", i, to_text(n), to_text(least) + " or more");
  }
  /// Of points, those that count.
  template <class Counts>
  void lengths(const token_counts& v, index sequences, bool needed, Counts counts) const {
    if (lengths(v, 1, sequences, needed))
      for (index i = 0; i < sequences; ++i)
        if (counts(i))
          length(i, v.entries.at(0, i), 0);
  }
  void call(const call_options<T>& c, index count, const vector_view<const T>& weights) const {
    sequence_checks<T>{name}.call(c, count, false);
    optional("weights", weights, count);
    each(
        "weights", weights, "a finite number, 0 or more",
        [&](index i) { return weight_of(c, i) != 0; },
        [](T w) { return w >= 0 && std::isfinite(w); });
  }
  /// Outputs against each other and against the inputs.
  void apart(std::initializer_list<extent> outputs, std::initializer_list<extent> inputs) const {
    std::vector<extent> all(outputs);
    all.insert(all.end(), inputs);
    require_apart(name, all, outputs.size());
  }
};

inline bool read_label(const char* name, index i, std::int64_t label) {
  if (label != 0 && label != 1)
    fail_at(name, "labels", i, to_text(label), "1 (desirable) or 0 (undesirable)");
  return label == 1;
}

/// Means of what two classes have.
class class_means {
public:
  void add(bool chosen, double reward, double log_probability) {
    rewards_[chosen].add(reward);
    logps_[chosen].add(log_probability);
    ++count_[chosen];
  }
  void write(sequence_summary& to) const {
    to.chosen = count_[1];
    to.rejected = count_[0];
    to.chosen_rewards = mean(rewards_[1], count_[1]);
    to.rejected_rewards = mean(rewards_[0], count_[0]);
    to.margins = to.chosen_rewards - to.rejected_rewards;
    to.chosen_logps = mean(logps_[1], count_[1]);
    to.rejected_logps = mean(logps_[0], count_[0]);
    to.accuracies = std::numeric_limits<double>::quiet_NaN();
  }

private:
  static double mean(const exact_sum& sum, index n) {
    return n > 0 ? sum.value() / static_cast<double>(n) : std::numeric_limits<double>::quiet_NaN();
  }
  exact_sum rewards_[2], logps_[2];
  index count_[2] = {};
};

/// Mean of log π − log π_ref over the sequences that are not empty, or of them those with a finite
/// one; 0 where there are none.
struct log_ratio_mean {
  double mean = 0;
  index count = 0;
};
template <class T>
log_ratio_mean mean_log_ratio(const char* name, const sequence_scores<T>& in,
                              bool finite_alone = false) {
  const index n = in.policy.size;
  const score_checks<T> checks{name};
  checks.size("policy", in.policy, n);
  checks.lengths(in.lengths, n, false, [](index) { return true; });
  const auto counts = [&](index i) { return !in.lengths.given() || in.lengths.of(i) != 0; };
  checks.reference("reference", in.reference, n, counts);
  log_ratio_mean result;
  exact_sum sum;
  for (index i = 0; i < n; ++i) {
    if (!counts(i))
      continue;
    const double x = static_cast<double>(in.policy[i]) - static_cast<double>(in.reference[i]);
    if (finite_alone && !std::isfinite(x))
      continue;
    sum.add(x);
    ++result.count;
  }
  if (result.count > 0)
    result.mean = sum.value() / static_cast<double>(result.count);
  return result;
}

/// Writes (or adds) a slope.
template <class T> void put_slope(T& to, double slope, bool accumulate) {
  to = static_cast<T>(accumulate ? static_cast<double>(to) + slope : slope);
}

/// The reduced value of link(i, x) = value and slope of sequence i, and the gradient with respect
/// to the policy's log-probabilities, if there is memory for it. chosen(i): its class in the
/// summary.
template <class T, class Chosen, class Link>
T reduce_points(const char* name, const sequence_scores<T>& in, const score_rule& rule,
                reduction how, const vector_view<T>& gradient, const call_options<T>& call,
                const sequence_report<T>& report, Chosen chosen, Link link) {
  const index n = in.policy.size;
  const score_checks<T> checks{name};
  checks.size("policy", in.policy, n);
  checks.call(call, n, in.weights);
  checks.lengths(in.lengths, n, rule.power != 0 || rule.per_token,
                 [&](index i) { return weight_of(call, i) != 0; });
  const auto length = [&](index i) { return in.lengths.given() ? in.lengths.of(i) : 1.0; };
  const auto weight = [&](index i) { return length(i) == 0 ? 0 : weight_of(call, i); };
  if (rule.has_reference)
    checks.reference("reference", in.reference, n, [&](index i) { return weight(i) != 0; });
  checks.optional("gradient", gradient, n);
  checks.optional("rewards", report.rewards, n);
  checks.apart({bytes_of(gradient), bytes_of(call.values), bytes_of(report.rewards)},
               {bytes_of(in.policy), bytes_of(in.reference), bytes_of(in.weights),
                bytes_of(call.row_weights), bytes_of(call.upstream)});

  double share = 1;
  if (how == reduction::mean) {
    exact_sum all;
    for (index i = 0; call.normaliser == 0 && i < n; ++i)
      all.add(rule.per_token ? weight(i) * length(i) : weight(i));
    const double denominator = call.normaliser != 0 ? call.normaliser : all.value();
    share = denominator != 0 ? 1 / denominator : 0;
  }

  exact_sum total;
  class_means means;
  index empty = 0;
  for (index i = 0; i < n; ++i) {
    const double w = weight(i);
    double value = 0, slope = 0, reward = 0;
    empty += length(i) == 0;
    if (w != 0) {
      const double s = static_cast<double>(in.policy[i]);
      const double per = rule.power == 0 ? 1 : std::pow(length(i), rule.power);
      const double x = (rule.has_reference ? s - static_cast<double>(in.reference[i]) : s) / per;
      const double factor = in.weights.data ? w * static_cast<double>(in.weights[i]) : w;
      const links::outcome at = link(i, x);
      value = links::times(factor, at.value);
      slope = links::times(factor, at.value == at.value ? at.slope : at.value) / per;
      reward = rule.beta * x;
      means.add(chosen(i), reward, s);
    }
    total.add(value);
    const double scale = static_cast<double>(call.scale) * share * upstream_of(call, i);
    if (gradient.data)
      put_slope(gradient[i], links::times(scale, slope), call.accumulate);
    if (call.values.data)
      call.values[i] = static_cast<T>(value);
    if (report.rewards.data)
      report.rewards[i] = static_cast<T>(reward);
  }
  if (report.summary) {
    *report.summary = {};
    means.write(*report.summary);
    report.summary->empty = empty;
  }
  return static_cast<T>(share == 0 ? 0 : total.value() * share);
}

} // namespace core

} // namespace perdita::inline PERDITA_ABI
