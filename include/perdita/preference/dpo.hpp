// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <span>
#include <vector>

#include "pairs.hpp"

namespace perdita::inline PERDITA_ABI {

/// f-divergences between the model and its reference, of which f′ is the score.
enum class preference_divergence { reverse_kl, forward_kl, js, alpha };

namespace scores {

/// s(r) of the log-ratio r = log π − log ref; reverse KL is r itself.
///
///   reverse_kl  s = r                              s′ = 1
///   forward_kl  s = 1 − e^−r                       s′ = e^−r
///   js          s = log 2 + log σ(r)               s′ = σ(−r)
///   alpha       s = (e^((a − 1) r) − 1)/(a − 1)    s′ = e^((a − 1) r)
///
/// (a = 1: reverse_kl, a = 0: forward_kl.) 0 at r = 0; TRL leaves the constants 1, log 2 and 1/(1 −
/// a) out (`centred` = false), of which a margin sees nothing. Exponents end at `most`, with slope
/// 0 beyond (TRL: 80).
struct divergence {
  static constexpr unsigned inputs = needs_reference;
  preference_divergence kind = preference_divergence::reverse_kl;
  double a = 0.5;
  bool centred = true;
  double most = 80;

  outcome operator()(const preference_side& s) const {
    const double r = s.log_ratio();
    switch (kind) {
    case preference_divergence::forward_kl:
      return power(r, 0);
    case preference_divergence::js:
      return {(centred ? std::numbers::ln2 : 0) - links::softplus(-r), links::sigmoid(-r)};
    case preference_divergence::alpha:
      return power(r, a);
    case preference_divergence::reverse_kl:
      break;
    }
    return {r, 1};
  }

private:
  outcome power(double r, double of) const {
    if (of == 1)
      return {r, 1};
    const double rate = of - 1, x = rate * r;
    const bool beyond = x > most;
    const double at = beyond ? most : x;
    return {(centred ? std::expm1(at) : std::exp(at)) / rate, beyond ? 0 : std::exp(at)};
  }
};

} // namespace scores

/// The loss types of TRL's DPO trainer, with u and v the log-ratios of the chosen and the rejected,
/// s of both the score of the divergence (u, v for reverse KL), z = β (s(u) − s(v)), ε the
/// label_smoothing:
enum class dpo_type {
  sigmoid, ///< log(1 + e^−z): DPO
  cdpo,    ///< `smoothed` of z: what sigmoid is with label_smoothing in TRL up to 0.28
  robust,  ///< `robust` of z; ε < ½
  hinge,   ///< max(0, 1 − z)
  ipo,     ///< (s(u)/n − s(v)/n′ − 1/(2β))², n the lengths: TRL from 0.7.11 on
  ipo_sum, ///< (s(u) − s(v) − 1/(2β))²: the paper, TRL before, its OnlineDPO and XPO trainers
  exo,     ///< `exo` of z; ε > 0 (TRL up to 0.28 took 0 for 0.001)
  nca,     ///< log(1 + e^−βs(u)) + ½ log(1 + e^βs(u)) + ½ log(1 + e^βs(v))
  bco,     ///< log(1 + e^−(βs(u) − δ)) + log(1 + e^(βs(v) − δ)), δ the pairs' baseline
           ///< (TRL 0.9.3 to 0.28: running_mean of all βu and βv; from 0.29 on 0)
  sppo,    ///< (s(u) − 1/(2β))² + (s(v) + 1/(2β))²: twice the paper's with certain wins
  aot,     ///< `smoothed` of β (U_(k) − R_(k)), sorted apart: U = log π of the chosen less of
           ///< the rejected, R that of the reference. Pairs depend on one another
  aot_unpaired, ///< the same of β (u_(k) − v_(k)): "aot_pair" in TRL before 0.28
  apo_zero,     ///< σ(−βu) + σ(βv)
  apo_down,     ///< σ(βu) + σ(−z)
  discopop,     ///< `lrml` of z
  sigmoid_norm, ///< log(1 + e^−β(s(u)/n − s(v)/n′))
  sft,          ///< −log π of the chosen over the mean length: the mean over all tokens
  kto_pair ///< TRL 0.7.5 to 0.8.6: ½ σ(−β(u − KL′)) + ½ σ(−β(KL − v)), KL = max(0, mean u),
           ///< KL′ = max(0, mean v), both with their gradient. Pairs depend on one another
};

/// One type of a combination, and its weight.
struct dpo_part {
  dpo_type type = dpo_type::sigmoid;
  double weight = 1;
  explicit(false) dpo_part(dpo_type of, double times = 1) : type(of), weight(times) {}
};

namespace core {

/// Places of the sorted numbers; equal ones as they come. Without pairs of which this or the other
/// number is NaN.
template <class Value, class Other>
std::vector<std::size_t> sorted_places(std::span<const preference_pair> pairs, Value value,
                                       Other other) {
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < pairs.size(); ++i)
    if (!std::isnan(value(pairs[i])) && !std::isnan(other(pairs[i])))
      places.push_back(i);
  std::stable_sort(places.begin(), places.end(),
                   [&](std::size_t i, std::size_t j) { return value(pairs[i]) < value(pairs[j]); });
  return places;
}

/// link(β (a_(k) − b_(k))) of two numbers of each pair that are sorted apart. `to_rejected`: b is
/// the rejected's, with its gradient, otherwise a's is that of the whole pair.
template <class A, class B, links::link L>
preference_term sorted_term(A a, B b, L link, double beta, bool to_rejected) {
  const auto each = [=](std::span<const preference_pair> pairs, std::span<pair_outcome> out) {
    for (pair_outcome& o : out)
      o.value = std::numeric_limits<double>::quiet_NaN();
    const auto by_a = sorted_places(pairs, a, b), by_b = sorted_places(pairs, b, a);
    for (std::size_t k = 0; k < by_a.size(); ++k) {
      const double t = beta * (a(pairs[by_a[k]]) - b(pairs[by_b[k]]));
      const links::outcome o = link(t);
      pair_outcome& to = out[by_a[k]];
      to.value = o.value;
      to.chosen = beta * o.slope;
      out[to_rejected ? by_b[k] : by_a[k]].rejected = -beta * o.slope;
      to.argument = t;
      to.has_argument = true;
    }
  };
  preference_term term{each, needs_reference};
  term.coupled = true;
  return term;
}

/// dpo_type::kto_pair
inline preference_term old_kto_term(double beta) {
  const auto each = [beta](std::span<const preference_pair> pairs, std::span<pair_outcome> out) {
    exact_sum chosen, rejected;
    double n = 0;
    const auto counts = [](const preference_pair& p) {
      const double u = p.chosen.log_ratio(), v = p.rejected.log_ratio();
      return u == u && v == v;
    };
    for (const preference_pair& p : pairs)
      if (counts(p)) {
        chosen.add(p.chosen.log_ratio());
        rejected.add(p.rejected.log_ratio());
        ++n;
      }
    const double kl = std::max(chosen.value() / n, 0.0), // NaN stays
        other = std::max(rejected.value() / n, 0.0);
    const links::sigmoid_gain gain;
    exact_sum by_kl, by_other;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      const preference_pair& p = pairs[i];
      const links::outcome w = gain(beta * (p.chosen.log_ratio() - other)),
                           l = gain(beta * (kl - p.rejected.log_ratio()));
      out[i].value = counts(p) ? (w.value + l.value) / 2 : std::numeric_limits<double>::quiet_NaN();
      out[i].chosen = beta * w.slope / 2;
      out[i].rejected = -beta * l.slope / 2;
      if (counts(p)) {
        by_kl.add(beta * l.slope / 2);
        by_other.add(-beta * w.slope / 2);
      }
    }
    for (pair_outcome& o : out) {
      o.chosen += kl > 0 ? by_kl.value() / n : 0;
      o.rejected += other > 0 ? by_other.value() / n : 0;
    }
  };
  preference_term term{each, needs_reference};
  term.coupled = true;
  return term;
}

} // namespace core

/// Mean of numbers that come in batches, each with the weight of all before: the δ of bco. Those
/// that are not finite have no part: no batch ruins the mean.
class running_mean {
public:
  /// Takes the batch in and returns the mean.
  template <core::vector_like V> double update(V&& numbers) {
    const auto view = core::as_vector(numbers);
    core::require_memory("running_mean", "numbers", view.data, view.size);
    core::exact_sum sum;
    double count = 0;
    for (index i = 0; i < view.size; ++i)
      if (const auto x = static_cast<double>(view[i]); std::isfinite(x)) {
        sum.add(x);
        ++count;
      }
    count_ += count;
    if (count > 0)
      mean_ += (sum.value() - mean_ * count) / count_;
    return mean_;
  }
  double value() const { return mean_; }

private:
  double mean_ = 0, count_ = 0;
};

/// Direct preference optimisation and its relatives, as in TRL's DPO trainer: Σ of the types with
/// their weights, see dpo_type.
///
/// All types but sft need references (a reference-free loss: references of 0), ipo and sigmoid_norm
/// lengths as well. The divergence is ignored by aot, aot_unpaired, apo_zero, kto_pair and by the
/// first half of apo_down. rpo_alpha of TRL 0.9.3 to 0.28 is {sigmoid, {sft, alpha}}; MPO is
/// {{sigmoid, 0.8}, {bco, 0.2}, sft}. TRL before 0.29 has a_old = 1 − divergence_alpha. LD-DPO's
/// weights of tokens (ld_weights) belong into the log-probabilities, WPO's of pairs (wpo_weights)
/// into preference_pairs::weights. Rewards are β log-ratio (TRL), or β s with scored_rewards (the
/// f-DPO code). Everything else: preference_loss.
///
/// Throws std::invalid_argument for β ≤ 0, ε outside [0, ½] (robust: [0, ½); exo: (0, ½]), no type,
/// a weight that is not finite.
///
/// Source: Rafailov et al., "Direct preference optimization", NeurIPS 2023; Azar et al., 2023
/// (IPO); Mitchell, 2023 (cDPO); Chowdhury et al., 2024 (robust); Zhao et al., 2023 (SLiC: hinge);
/// Ji et al., 2024 (EXO); Chen et al., 2024 (NCA); Jung et al., 2025 (BCO); Wu et al., 2025 (SPPO);
/// Melnyk et al., 2024 (AOT); D'Oosterlinck et al., 2025 (APO); Lu et al., 2024 (DiscoPOP); Wang et
/// al., 2024 (f-DPO); TRL 1.10.
///
///   perdita::dpo<float> loss({.beta = 0.1f, .types = {perdita::dpo_type::ipo}});
///   float value = loss({.chosen = a, .rejected = b, .chosen_reference = ra, .rejected_reference =
///                       rb, .chosen_lengths = na, .rejected_lengths = nb}, d_a, d_b);
template <class T = float> class dpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1); ///< β > 0
    std::vector<dpo_part> types{dpo_type::sigmoid};
    T label_smoothing = 0; ///< ε: cdpo, robust, exo, aot
    T tau = T(0.05);       ///< τ > 0: discopop
    preference_divergence divergence = preference_divergence::reverse_kl;
    T divergence_alpha = T(0.5); ///< of preference_divergence::alpha: finite
    bool centred = true;         ///< scores::divergence; false as in TRL
    bool scored_rewards = false; ///< rewards are β s, not β log-ratio
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "dpo";

  dpo() : dpo(options{}) {}
  explicit(false) dpo(const options& o)
      : preference_loss<T>(name, terms(o), reward(o), o.reduction), options_(o) {}
  const options& settings() const { return options_; }

private:
  static scores::divergence score(const options& o) {
    return {o.divergence, core::finite(name, "divergence_alpha", o.divergence_alpha), o.centred};
  }
  static typename preference_loss<T>::reward_function reward(const options& o) {
    const double beta = core::positive(name, "beta", o.beta);
    if (o.scored_rewards)
      return core::reward_of(score(o), beta);
    return core::reward_of(scores::log_ratio{}, beta);
  }
  static std::vector<preference_term> terms(const options& o) {
    core::positive(name, "beta", o.beta);
    core::smoothing(name, o.label_smoothing);
    core::require_enumerator(name, "divergence", o.divergence, preference_divergence::alpha,
                             "one of preference_divergence");
    std::vector<preference_term> all;
    for (const dpo_part& part : o.types) {
      all.push_back(part.weight * term(part.type, o));
      if (part.type == dpo_type::apo_down)
        all.push_back(part.weight * chosen_down(o));
    }
    return all;
  }
  /// σ(βu)
  static preference_term chosen_down(const options& o) {
    const auto nothing = [](double) { return links::outcome{0, 0}; };
    return point_term(scores::log_ratio{}, static_cast<double>(o.beta),
                      links::flipped<links::sigmoid_gain>{}, nothing);
  }
  static preference_term term(dpo_type type, const options& o) {
    const scores::divergence s = score(o);
    const scores::per_token<scores::divergence> per_token{s};
    const auto beta = static_cast<double>(o.beta), half = 1 / (2 * beta),
               e = core::smoothing(name, o.label_smoothing);
    switch (type) {
    case dpo_type::sigmoid:
      return margin_term(s, links::logistic{}, beta);
    case dpo_type::cdpo:
      return margin_term(s, links::smoothed(e), beta);
    case dpo_type::robust:
      core::require(e < 0.5, name, "label_smoothing", e, "a number in [0, 0.5) for robust");
      return margin_term(s, links::robust(e), beta);
    case dpo_type::hinge:
      return margin_term(s, links::hinge(1), beta);
    case dpo_type::ipo:
      return margin_term(per_token, links::square(half), 1);
    case dpo_type::ipo_sum:
      return margin_term(s, links::square(half), 1);
    case dpo_type::exo:
      core::require(e > 0, name, "label_smoothing", e, "a number in (0, 0.5] for exo");
      return margin_term(s, links::exo(e), beta);
    case dpo_type::nca: {
      const auto chosen = [](double t) { return links::cross_entropy(1, 0.5, t); };
      const auto rejected = [](double t) { return links::cross_entropy(0, 0.5, t); };
      return point_term(s, beta, chosen, rejected);
    }
    case dpo_type::bco:
      return point_term(s, beta, links::logistic{}, links::flipped<links::logistic>{}, true);
    case dpo_type::sppo:
      return point_term(s, 1, links::square(half), links::square(-half));
    case dpo_type::aot:
      return core::sorted_term(
          [](const preference_pair& p) {
            return p.chosen.log_probability - p.rejected.log_probability;
          },
          [](const preference_pair& p) { return p.chosen.reference - p.rejected.reference; },
          links::smoothed(e), beta, false);
    case dpo_type::aot_unpaired:
      return core::sorted_term([](const preference_pair& p) { return p.chosen.log_ratio(); },
                               [](const preference_pair& p) { return p.rejected.log_ratio(); },
                               links::smoothed(e), beta, true);
    case dpo_type::apo_zero:
      return point_term(scores::log_ratio{}, beta, links::sigmoid_gain{},
                        links::flipped<links::sigmoid_gain>{});
    case dpo_type::apo_down:
      return margin_term(s, links::sigmoid_gain{}, beta);
    case dpo_type::discopop:
      return margin_term(s, links::lrml(core::positive(name, "tau", o.tau)), beta);
    case dpo_type::sigmoid_norm:
      return margin_term(per_token, links::logistic{}, beta);
    case dpo_type::sft:
      return likelihood_term();
    case dpo_type::kto_pair:
      return core::old_kto_term(beta);
    }
    core::fail(name, "type", core::to_text(static_cast<int>(type)), "one of dpo_type");
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
