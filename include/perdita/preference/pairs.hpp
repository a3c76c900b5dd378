// SPDX-License-Identifier: MIT
#pragma once

/// What every loss of pairs of responses is made of: the score of each response, a margin between
/// the two (or each by itself), a link function, and the mean. A published loss is a constructor
/// that puts these together; put together others as you like.

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "inputs.hpp"
#include "link.hpp"

namespace perdita::inline PERDITA_ABI {

/// Pairs of a chosen and a rejected response to the same prompt, each by the log-probability of its
/// tokens, summed. What is left out is not there: a loss that needs it says so.
template <class T> struct preference_pairs {
  vector_view<const T> chosen, rejected;                         ///< of the model
  vector_view<const T> chosen_reference{}, rejected_reference{}; ///< of the reference model
  token_counts chosen_lengths{}, rejected_lengths{};
  /// Of the model of the iteration before (inpo).
  vector_view<const T> chosen_previous{}, rejected_previous{};
  /// Of the model, of a third response to each prompt, which is to be said (tpo).
  vector_view<const T> gold{};
  token_counts gold_lengths{};
  /// One number per pair that is taken off the margin between the two, where a loss has one.
  vector_view<const T> margins{};
  /// Factors of the pairs, of value and gradient, and not in the mean's denominator (that is what
  /// call_options::row_weights are for), nor of sft: WPO's c_w c_l; at most 1 in its code and in
  /// TRL up to 0.28.
  vector_view<const T> weights{};
  /// Probability that the chosen response is the better one, in [0, 1] (dno, sppo).
  vector_view<const T> targets{};
  vector_view<const T> rejected_targets{}; ///< the same of the rejected; without it 1 − targets
  /// Number measured over many pairs, held constant: δ of bco, M₀ of β-DPO.
  double baseline = 0;
};

/// By-products, one number per pair (0 where the row weight is 0). No view, no cost.
template <class T> struct preference_report {
  vector_view<T> chosen_rewards{}, rejected_rewards{}; ///< β (log π − log ref), unless documented
  vector_view<T> margins{};                            ///< chosen less rejected reward
  vector_view<T> accuracies{};                         ///< 1 where the margin is above 0, else 0
  vector_view<T> chosen_log_ratios{}, rejected_log_ratios{}; ///< log π − log ref
  vector_view<T> arguments{}; ///< what the first link that compares the two is given; else 0
};

/// One response of a pair, as scores see it.
struct preference_side {
  double log_probability, reference = 0, length = 1, previous = 0;
  double log_ratio() const { return log_probability - reference; }
};

struct preference_pair {
  preference_side chosen, rejected;
  double margin = 0, target = 1, rejected_target = 0, baseline = 0;
  double weight = 1; ///< row weight, above 0
  preference_side gold{};
};

/// Value of a pair and its slopes by its log-probabilities.
struct pair_outcome {
  double value = 0, chosen = 0, rejected = 0;
  double argument = 0; ///< of the link
  bool has_argument = false;
  double gold = 0; ///< slope
};

namespace core {

/// That two vectors have an element in common. Of equal strides, one may lie between the elements
/// of the other.
template <class T> bool meet(const vector_view<const T>& a, const vector_view<const T>& b) {
  const extent x = bytes_of(a), y = bytes_of(b);
  if (x.begin >= y.end || y.begin >= x.end)
    return false;
  const auto step = static_cast<std::uintptr_t>(std::abs(a.stride)) * sizeof(T);
  const std::uintptr_t offset = x.begin > y.begin ? x.begin - y.begin : y.begin - x.begin;
  return a.stride != b.stride || step == 0 || offset % step == 0;
}

/// All the numbers of T that are read.
template <class T>
std::array<vector_view<const T>, 13> pair_inputs(const preference_pairs<T>& in,
                                                 const call_options<T>& call) {
  return {in.chosen,
          in.rejected,
          in.chosen_reference,
          in.rejected_reference,
          in.chosen_previous,
          in.rejected_previous,
          in.gold,
          in.margins,
          in.weights,
          in.targets,
          in.rejected_targets,
          call.row_weights,
          call.upstream};
}

/// That all that is written about pairs lies apart. What is read is read before that, so that it
/// may be the same memory, but not that of a gradient which is added to what is there.
template <class T>
void check_pair_outputs(const char* name, const preference_pairs<T>& in,
                        const vector_view<T> (&gradients)[3], const call_options<T>& call,
                        const preference_report<T>& report) {
  const vector_view<const T> outputs[] = {gradients[0],
                                          gradients[1],
                                          gradients[2],
                                          call.values,
                                          report.chosen_rewards,
                                          report.rejected_rewards,
                                          report.margins,
                                          report.accuracies,
                                          report.chosen_log_ratios,
                                          report.rejected_log_ratios,
                                          report.arguments};
  for (std::size_t i = 0; i < std::size(outputs); ++i)
    for (std::size_t j = 0; j < i; ++j)
      if (meet(outputs[i], outputs[j]))
        fail(std::string("perdita::") + name +
             ": two gradients or by-products are the same memory, expected memory apart");
  if (!call.accumulate)
    return;
  for (const auto& gradient : gradients)
    for (const auto& input : pair_inputs(in, call))
      if (meet<T>(gradient, input))
        fail(std::string("perdita::") + name +
             ": accumulate is true, expected false where a gradient overwrites an input");
}

} // namespace core

/// What must be given, as a set of bits.
enum preference_inputs : unsigned {
  needs_nothing = 0,
  needs_reference = 1,
  needs_lengths = 2,
  needs_previous = 4,
  needs_targets = 8,
  divides_by_lengths = 16, ///< each at least 1, if given
  needs_gold = 32
};

/// Scores: functors of a preference_side that give a value and its slope by the log-probability.
/// `inputs`, where they have it, says what they need.
namespace scores {

using links::outcome;

template <class S> constexpr unsigned inputs_of() {
  if constexpr (requires { S::inputs; })
    return S::inputs;
  else
    return needs_nothing;
}

/// log π
struct log_probability {
  outcome operator()(const preference_side& s) const { return {s.log_probability, 1}; }
};
/// log π − log ref
struct log_ratio {
  static constexpr unsigned inputs = needs_reference;
  outcome operator()(const preference_side& s) const { return {s.log_ratio(), 1}; }
};
/// log π / n^power; n = 1 where no lengths are given: log-probabilities are averages then.
struct average {
  static constexpr unsigned inputs = divides_by_lengths;
  double power = 1;
  outcome operator()(const preference_side& s) const {
    const double n = power == 1 ? s.length : std::pow(s.length, power);
    return {s.log_probability / n, 1 / n};
  }
};
/// A score over the number of tokens, which must be given.
template <class S> struct per_token {
  static constexpr unsigned inputs = inputs_of<S>() | needs_lengths | divides_by_lengths;
  S score{};
  outcome operator()(const preference_side& s) const {
    const outcome o = score(s);
    return {o.value / s.length, o.slope / s.length};
  }
};
/// A function φ of a score.
template <class S, links::link F> struct transformed {
  static constexpr unsigned inputs = inputs_of<S>();
  S score;
  F function;
  outcome operator()(const preference_side& s) const {
    const outcome inner = score(s), outer = function(inner.value);
    return {outer.value, links::times(outer.slope, inner.slope)};
  }
};
template <class S, class F> transformed(S, F) -> transformed<S, F>;

} // namespace scores

template <class S>
concept preference_score = requires(const S& score, const preference_side& side) {
  { score(side) } -> std::convertible_to<links::outcome>;
};

/// A part of a loss: the outcome of every pair of a batch.
struct preference_term {
  std::function<void(std::span<const preference_pair>, std::span<pair_outcome>)> run;
  unsigned inputs = needs_nothing; ///< not of a term of weight 0, which is left out
  bool coupled = false;            ///< the value of a pair depends on the scores of others
  bool takes_weights = true;       ///< preference_pairs::weights
  double weight = 1;
};

/// A term times a number.
inline preference_term operator*(double weight, preference_term term) {
  term.weight *= weight;
  return term;
}

/// f(pair) of every pair; f returns a pair_outcome.
template <class F> preference_term pairwise_term(F f, unsigned inputs) {
  const auto each = [f](std::span<const preference_pair> pairs, std::span<pair_outcome> out) {
    for (std::size_t i = 0; i < pairs.size(); ++i)
      out[i] = f(pairs[i]);
  };
  return {each, inputs};
}

/// link(t), t = β (score of the chosen − score of the rejected) − offset − margin of the pair
template <preference_score C, preference_score R, links::link L>
preference_term margin_term(C chosen, R rejected, L link, double beta, double offset = 0) {
  const auto of_pair = [=](const preference_pair& p) -> pair_outcome {
    const links::outcome w = chosen(p.chosen), l = rejected(p.rejected);
    const double t = beta * (w.value - l.value) - offset - p.margin;
    const links::outcome o = link(t);
    const double slope = beta * o.slope;
    return {o.value, links::times(w.slope, slope), -links::times(l.slope, slope), t, true};
  };
  return pairwise_term(of_pair, scores::inputs_of<C>() | scores::inputs_of<R>());
}
template <preference_score S, links::link L>
preference_term margin_term(S score, L link, double beta, double offset = 0) {
  return margin_term(score, score, link, beta, offset);
}

/// of_chosen(β score of the chosen) + of_rejected(β score of the rejected), each less the baseline
/// where it is `shifted`.
template <preference_score S, links::link W, links::link L>
preference_term point_term(S score, double beta, W of_chosen, L of_rejected, bool shifted = false) {
  const auto of_pair = [=](const preference_pair& p) -> pair_outcome {
    const double from = shifted ? p.baseline : 0;
    const links::outcome w = score(p.chosen), l = score(p.rejected);
    const links::outcome a = of_chosen(beta * w.value - from),
                         b = of_rejected(beta * l.value - from);
    return {a.value + b.value, links::times(beta * a.slope, w.slope),
            links::times(beta * b.slope, l.slope)};
  };
  return pairwise_term(of_pair, scores::inputs_of<S>());
}

/// What the negative log-likelihood of a chosen response is divided by.
enum class likelihood_share {
  batch_tokens, ///< the mean length of the chosen: the mean over pairs is the mean over all tokens
  tokens,       ///< its own length: the mean over pairs is one of averages
  sequence      ///< 1
};

/// −log π of the chosen (or the gold), over the share; lengths not given are 1. Without the pairs'
/// weights.
inline preference_term likelihood_term(likelihood_share share = likelihood_share::batch_tokens,
                                       bool of_gold = false) {
  core::require_enumerator("likelihood_term", "share", share, likelihood_share::sequence,
                           "one of likelihood_share");
  const auto each = [=](std::span<const preference_pair> pairs, std::span<pair_outcome> out) {
    const auto side = of_gold ? &preference_pair::gold : &preference_pair::chosen;
    const auto slope = of_gold ? &pair_outcome::gold : &pair_outcome::chosen;
    core::exact_sum tokens, weights;
    for (const preference_pair& p : pairs) {
      tokens.add(p.weight * (p.*side).length);
      weights.add(p.weight);
    }
    const double mean = tokens.value() / weights.value();
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      const preference_side& s = pairs[i].*side;
      const double n = share == likelihood_share::batch_tokens ? mean
                       : share == likelihood_share::tokens     ? s.length
                                                               : 1;
      if (n > 0) {
        out[i].value = -s.log_probability / n;
        out[i].*slope = -1 / n;
      }
    }
  };
  preference_term term{each, (share == likelihood_share::tokens ? divides_by_lengths : 0U) |
                                 (of_gold ? needs_gold : 0U)};
  term.takes_weights = false;
  return term;
}

/// A loss of pairs of responses: Σ of its terms.
///
///   ℓ_i = Σ_k w_k ℓ_k,i,   margin_term: ℓ = g(β (φ(chosen) − φ(rejected)) − offset − margin_i)
///   ∂ℓ/∂(log π of the chosen) = β g′ φ′(chosen),   of the rejected: −β g′ φ′(rejected)
///
/// Shapes: one number per pair in every view. Log-probabilities, gradients and by-products are of
/// T, lengths integers of any type. Arithmetic is in double. The memory of gradients may be that of
/// the inputs (but not with accumulate), and no two outputs share memory. A NaN makes NaN of its
/// pair's value and all its slopes, and no other pair's; ±inf of the model gives the limit, or NaN
/// where the two have none. References must be no infinity; a length of 0 is refused by losses that
/// divide by it.
///
/// Call options as for losses of rows, a pair being a row: row_weights (0 removes a pair from
/// everything), upstream and values; `mean` divides by the number of pairs (or the sum of their row
/// weights; 0 where there are none). Losses whose pairs depend on one another's scores refuse row
/// weights but 0 and 1, weights, and upstream; their values belong to the pair that holds the
/// chosen response. A call is O(pairs) and runs in the calling thread; run_on and memory are not
/// used. Throws std::invalid_argument.
///
///   // A loss that nobody has published:
///   perdita::preference_loss<float> loss(
///       "mine", {perdita::margin_term(perdita::scores::average{},
///       perdita::links::lrml(0.05), 2.0),
///                0.1 * perdita::likelihood_term()});
///   float value = loss({.chosen = a, .rejected = b}, d_a, d_b, {}, {.accuracies = right});
template <class T = float> class preference_loss {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  using reward_function = std::function<double(const preference_side&)>;

  /// `reward` is what the report calls so; log π − log ref if it is left out.
  preference_loss(std::string name, std::vector<preference_term> terms, reward_function reward = {},
                  perdita::reduction reduction = perdita::reduction::mean)
      : name_(std::move(name)), terms_(std::move(terms)), reward_(std::move(reward)),
        reduction_(reduction) {
    core::require_reduction(name_.c_str(), reduction_);
    if (terms_.empty())
      core::fail(name_.c_str(), "number of terms", "0", "at least 1");
    for (const preference_term& term : terms_) {
      core::require(std::isfinite(term.weight), name_.c_str(), "weight of a term", term.weight,
                    "a finite number");
      inputs_ |= term.weight != 0 ? term.inputs : 0U;
      coupled_ = coupled_ || term.coupled;
    }
    if (!reward_)
      reward_ = [](const preference_side& s) { return s.log_ratio(); };
  }

  /// The reduced value.
  T operator()(const preference_pairs<T>& pairs, const call_options<T>& call = {},
               const preference_report<T>& report = {}) const {
    return run(pairs, {}, false, call, report);
  }
  /// The reduced value, and its gradient by the log-probabilities.
  T operator()(const preference_pairs<T>& pairs, vector_view<T> d_chosen, vector_view<T> d_rejected,
               const call_options<T>& call = {}, const preference_report<T>& report = {}) const {
    return run(pairs, {d_chosen, d_rejected}, true, call, report);
  }
  /// The same with the gradient by the log-probabilities of the gold responses.
  T with_gold(const preference_pairs<T>& pairs, vector_view<T> d_chosen, vector_view<T> d_rejected,
              vector_view<T> d_gold, const call_options<T>& call = {},
              const preference_report<T>& report = {}) const {
    return run(pairs, {d_chosen, d_rejected, d_gold}, true, call, report);
  }

private:
  struct gradient_views {
    vector_view<T> chosen{}, rejected{}, gold{};
  };
  void check_view(const char* what, const auto& v, index count, bool needed) const {
    const core::sequence_checks<T> checks{name_.c_str()};
    if (!needed && !v.data && v.size == 0)
      return;
    checks.entries(what, v, count, "as many as there are chosen");
  }
  void check_counts(const char* what, const token_counts& counts, index pairs,
                    const call_options<T>& call, bool needed) const {
    if (!counts.given() && !needed)
      return;
    const core::sequence_checks<T> checks{name_.c_str()};
    checks.size(what, counts.entries.cols, pairs, "as many as there are chosen");
    checks.memory(what, counts.entries.data, pairs);
    const bool divides = (inputs_ & divides_by_lengths) != 0;
    for (index i = 0; i < pairs; ++i)
      if (const auto n = counts.entries.at(0, i);
          n < (divides ? 1 : 0) && core::weight_of(call, i) != 0)
        core::fail_at(name_.c_str(), what, i, core::to_text(n),
                      divides ? "1 or more" : "0 or more");
  }
  template <class Holds>
  void check_each(const char* what, const vector_view<const T>& v, const call_options<T>& call,
                  const char* expected, Holds holds) const {
    for (index i = 0; v.data && i < v.size; ++i)
      if (core::weight_of(call, i) != 0 && !holds(v[i]))
        core::fail_at(name_.c_str(), what, i, core::to_text(v[i]), expected);
  }
  void check(const preference_pairs<T>& p, const call_options<T>& call,
             const preference_report<T>& report) const {
    const core::sequence_checks<T> checks{name_.c_str()};
    const index n = p.chosen.size;
    const bool reference = (inputs_ & needs_reference) != 0;
    const bool previous = (inputs_ & needs_previous) != 0;
    check_view("chosen", p.chosen, n, true);
    check_view("rejected", p.rejected, n, true);
    check_view("chosen_reference", p.chosen_reference, n, reference);
    check_view("rejected_reference", p.rejected_reference, n, reference);
    check_view("chosen_previous", p.chosen_previous, n, previous);
    check_view("rejected_previous", p.rejected_previous, n, previous);
    check_view("margins", p.margins, n, false);
    check_view("weights", p.weights, n, false);
    check_view("targets", p.targets, n, (inputs_ & needs_targets) != 0);
    check_view("rejected_targets", p.rejected_targets, n, false);
    check_view("chosen_rewards", report.chosen_rewards, n, false);
    check_view("rejected_rewards", report.rejected_rewards, n, false);
    check_view("report's margins", report.margins, n, false);
    check_view("accuracies", report.accuracies, n, false);
    check_view("chosen_log_ratios", report.chosen_log_ratios, n, false);
    check_view("rejected_log_ratios", report.rejected_log_ratios, n, false);
    check_view("arguments", report.arguments, n, false);
    checks.call(call, n, false, "as many as there are chosen");
    const bool lengths = (inputs_ & needs_lengths) != 0, gold = (inputs_ & needs_gold) != 0;
    check_counts("chosen_lengths", p.chosen_lengths, n, call, lengths);
    check_counts("rejected_lengths", p.rejected_lengths, n, call, lengths);
    check_view("gold", p.gold, n, gold);
    check_counts("gold_lengths", p.gold_lengths, n, call, lengths && gold);

    const auto no_infinity = [](T x) { return !std::isinf(x); };
    const auto probability = [](T x) { return x >= 0 && x <= 1; };
    const char* const finite = "a finite number";
    check_each("chosen_reference", p.chosen_reference, call, finite, no_infinity);
    check_each("rejected_reference", p.rejected_reference, call, finite, no_infinity);
    check_each("chosen_previous", p.chosen_previous, call, finite, no_infinity);
    check_each("rejected_previous", p.rejected_previous, call, finite, no_infinity);
    check_each("targets", p.targets, call, "a number in [0, 1]", probability);
    check_each("rejected_targets", p.rejected_targets, call, "a number in [0, 1]", probability);
    check_each("weights", p.weights, call, "a finite number, 0 or more",
               [](T x) { return x >= 0 && std::isfinite(x); });
    core::require(std::isfinite(p.baseline), name_.c_str(), "baseline", p.baseline, finite);
    if (!coupled_)
      return;
    if (p.weights.data || call.upstream.data)
      core::fail("perdita::" + name_ +
                 ": weights or upstream are given, expected none where pairs "
                 "depend on one another");
    check_each("row_weights", call.row_weights, call, "0 or 1", [](T x) { return x == T(1); });
  }
  void check_gradients(const gradient_views& to, index count) const {
    check_view("d_chosen", to.chosen, count, true);
    check_view("d_rejected", to.rejected, count, true);
    check_view("d_gold", to.gold, count, false);
  }

  static double number(const vector_view<const T>& v, index i, double otherwise) {
    return v.data ? static_cast<double>(v[i]) : otherwise;
  }
  static double number(const token_counts& counts, index i, double otherwise) {
    return counts.given() ? counts.of(i) : otherwise;
  }
  static preference_pair gather(const preference_pairs<T>& p, index i, double weight) {
    preference_pair pair;
    pair.chosen = {number(p.chosen, i, 0), number(p.chosen_reference, i, 0),
                   number(p.chosen_lengths, i, 1), number(p.chosen_previous, i, 0)};
    pair.rejected = {number(p.rejected, i, 0), number(p.rejected_reference, i, 0),
                     number(p.rejected_lengths, i, 1), number(p.rejected_previous, i, 0)};
    pair.margin = number(p.margins, i, 0);
    pair.target = number(p.targets, i, 1);
    pair.rejected_target = number(p.rejected_targets, i, 1 - pair.target);
    pair.baseline = p.baseline;
    pair.weight = weight;
    pair.gold = {number(p.gold, i, 0), 0, number(p.gold_lengths, i, 1)};
    return pair;
  }

  /// The outcomes of all terms.
  std::vector<pair_outcome> evaluate(std::span<const preference_pair> pairs,
                                     std::span<const double> weights) const {
    std::vector<pair_outcome> total(pairs.size()), part(pairs.size());
    for (const preference_term& term : terms_) {
      std::fill(part.begin(), part.end(), pair_outcome{});
      if (term.weight != 0)
        term.run(pairs, part);
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        const pair_outcome& o = part[i];
        const double w = term.takes_weights ? term.weight * weights[i] : term.weight;
        total[i].value += links::times(w, o.value);
        total[i].chosen += links::times(w, o.chosen);
        total[i].rejected += links::times(w, o.rejected);
        total[i].gold += links::times(w, o.gold);
        if (o.has_argument && !total[i].has_argument) {
          total[i].argument = o.argument;
          total[i].has_argument = true;
        }
      }
    }
    for (pair_outcome& o : total)
      if (o.value != o.value)
        o.chosen = o.rejected = o.gold = o.value;
    return total;
  }

  static void put(const vector_view<T>& to, index i, double x) {
    if (to.data)
      to[i] = static_cast<T>(x);
  }
  static void put_slope(const vector_view<T>& to, index i, double x, bool accumulate) {
    if (to.data)
      to[i] = static_cast<T>(accumulate ? static_cast<double>(to[i]) + x : x);
  }
  void fill(const preference_report<T>& report, index i, const preference_pair& p,
            const pair_outcome& o) const {
    const double w = reward_(p.chosen), l = reward_(p.rejected);
    put(report.chosen_rewards, i, w);
    put(report.rejected_rewards, i, l);
    put(report.margins, i, w - l);
    put(report.accuracies, i, w > l ? 1 : 0);
    put(report.chosen_log_ratios, i, p.chosen.log_ratio());
    put(report.rejected_log_ratios, i, p.rejected.log_ratio());
    put(report.arguments, i, o.argument);
  }
  void fill_removed(const preference_report<T>& report, index i) const {
    for (const auto& view :
         {report.chosen_rewards, report.rejected_rewards, report.margins, report.accuracies,
          report.chosen_log_ratios, report.rejected_log_ratios, report.arguments})
      put(view, i, 0);
  }

  T run(const preference_pairs<T>& pairs, const gradient_views& gradients, bool has_gradient,
        const call_options<T>& call, const preference_report<T>& report) const {
    check(pairs, call, report);
    const index count = pairs.chosen.size;
    if (has_gradient)
      check_gradients(gradients, count);
    core::check_pair_outputs(name_.c_str(), pairs,
                             {gradients.chosen, gradients.rejected, gradients.gold}, call, report);
    // All that is read is read before anything is written.
    const double share = core::share_of(call, reduction_, count);
    std::vector<preference_pair> present;
    std::vector<double> weights, scales; // of pairs; of their gradients
    std::vector<index> places;
    for (index i = 0; i < count; ++i)
      if (const double row_weight = core::weight_of(call, i); row_weight != 0) {
        present.push_back(gather(pairs, i, row_weight));
        weights.push_back(number(pairs.weights, i, 1));
        scales.push_back(share * row_weight * core::upstream_of(call, i) *
                         static_cast<double>(call.scale));
        places.push_back(i);
      }
    const std::vector<pair_outcome> outcomes = evaluate(present, weights);

    core::exact_sum total;
    std::size_t next = 0;
    for (index i = 0; i < count; ++i) {
      const bool counts = next < places.size() && places[next] == i;
      const pair_outcome o = counts ? outcomes[next] : pair_outcome{};
      const double scale = counts ? scales[next] : 0,
                   value = counts ? present[next].weight * o.value : 0;
      total.add(value);
      put(call.values, i, value);
      put_slope(gradients.chosen, i, core::times_or_nan(scale, o.chosen), call.accumulate);
      put_slope(gradients.rejected, i, core::times_or_nan(scale, o.rejected), call.accumulate);
      put_slope(gradients.gold, i, core::times_or_nan(scale, o.gold), call.accumulate);
      if (counts)
        fill(report, i, present[next++], o);
      else
        fill_removed(report, i);
    }
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

  std::string name_;
  std::vector<preference_term> terms_;
  reward_function reward_;
  perdita::reduction reduction_;
  unsigned inputs_ = needs_nothing;
  bool coupled_ = false;
};

namespace core {

/// β log π, β log π/n^p or β (log π − log ref), as a reward.
template <class S> auto reward_of(S score, double beta) {
  return [=](const preference_side& s) { return beta * score(s).value; };
}
template <class B> auto ratio_reward(B beta) {
  return reward_of(scores::log_ratio{}, static_cast<double>(beta));
}

} // namespace core

} // namespace perdita::inline PERDITA_ABI
