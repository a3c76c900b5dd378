// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>
#include <vector>

#include "pairs.hpp"

// Everything that these do not say of themselves: preference_loss. u = log π − log ref of the
// chosen, v of the rejected, d = u − v, n the lengths. β > 0 everywhere.

namespace perdita::inline PERDITA_ABI {

namespace scores {

/// β (log π − log ref) + α n
struct with_length {
  static constexpr unsigned inputs = needs_reference | needs_lengths;
  double beta, alpha;
  outcome operator()(const preference_side& s) const {
    return {beta * s.log_ratio() + alpha * s.length, beta};
  }
};
/// r − λ max(0, −r) of r = log π − log ref, slope 1 at r = 0.
struct penalised {
  static constexpr unsigned inputs = needs_reference;
  double lambda;
  outcome operator()(const preference_side& s) const {
    const double r = s.log_ratio();
    return r < 0 ? outcome{(1 + lambda) * r, 1 + lambda} : outcome{r, 1};
  }
};
/// f (log π − log ref)
struct scaled_log_ratio {
  static constexpr unsigned inputs = needs_reference;
  double factor;
  outcome operator()(const preference_side& s) const { return {factor * s.log_ratio(), factor}; }
};
/// log π − share log ref − (1 − share) log of the iteration before
struct mixed_log_ratio {
  static constexpr unsigned inputs = needs_reference | needs_previous;
  double share;
  outcome operator()(const preference_side& s) const {
    return {(s.log_probability - s.previous) - share * (s.reference - s.previous), 1};
  }
};

} // namespace scores

/// R-DPO, regularised by length: log(1 + e^−t), t = β d + α (n − n′). Needs lengths. A chosen
/// response that is the longer has the smaller gradient for α > 0.
/// Source: Park, Rafailov, Ermon, Finn, "Disentangling length from quality in direct preference
/// optimization", 2024.
template <class T = float> class rdpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1);
    T alpha = T(0.01);
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "rdpo";

  rdpo() : rdpo(options{}) {}
  explicit(false) rdpo(const options& o)
      : preference_loss<T>(name,
                           {margin_term(scores::with_length{core::positive(name, "beta", o.beta),
                                                            core::finite(name, "alpha", o.alpha)},
                                        links::logistic{}, 1)},
                           core::ratio_reward(o.beta), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  options options_;
};

/// DPO-Positive: log(1 + e^−t), t = β (u − λ max(0, −u) − v): the chosen must not lose what the
/// reference gives it. ∂/∂u = −β σ(−t) (1 + λ [u < 0]).
/// Source: Pal et al., "Smaug: fixing failure modes of preference optimisation with DPO-positive",
/// 2024 (λ 5, 50 and 500).
template <class T = float> class dpop : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1);
    T lambda = 50; ///< 0 or more
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "dpop";

  dpop() : dpop(options{}) {}
  explicit(false) dpop(const options& o)
      : preference_loss<T>(
            name,
            {margin_term(scores::penalised{core::not_negative(name, "lambda", o.lambda)},
                         scores::log_ratio{}, links::logistic{},
                         core::positive(name, "beta", o.beta))},
            core::ratio_reward(o.beta), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  options options_;
};

/// DPO-Shift: log(1 + e^−β (u − f v)); f = 1 is DPO. Let f rise or fall between steps as you like.
/// Source: Yang et al., "DPO-Shift: shifting the distribution of direct preference optimization",
/// 2025 (f from 0.5 to 0.95).
template <class T = float> class dpo_shift : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1);
    T factor = T(0.95); ///< f in (0, 1]
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "dpo_shift";

  dpo_shift() : dpo_shift(options{}) {}
  explicit(false) dpo_shift(const options& o)
      : preference_loss<T>(name, {term(o)}, core::ratio_reward(o.beta), o.reduction), options_(o) {}
  const options& settings() const { return options_; }

private:
  static preference_term term(const options& o) {
    core::require(o.factor > 0 && o.factor <= 1, name, "factor", o.factor, "a number in (0, 1]");
    return margin_term(scores::log_ratio{}, scores::scaled_log_ratio{static_cast<double>(o.factor)},
                       links::logistic{}, core::positive(name, "beta", o.beta));
  }
  options options_;
};

/// Cal-DPO: log(1 + e^−d) + ½ ((u − 1/(2β))² + (v + 1/(2β))²). No β in the first term.
/// Source: Xiao et al., "Cal-DPO: calibrated direct preference optimization for language model
/// alignment", NeurIPS 2024, and its code (β 0.001 in the scripts).
template <class T = float> class cal_dpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.001);
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "cal_dpo";

  cal_dpo() : cal_dpo(options{}) {}
  explicit(false) cal_dpo(const options& o)
      : preference_loss<T>(name, terms(core::positive(name, "beta", o.beta)),
                           core::ratio_reward(o.beta), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  static std::vector<preference_term> terms(double beta) {
    const double half = 1 / (2 * beta);
    return {margin_term(scores::log_ratio{}, links::logistic{}, 1),
            0.5 * point_term(scores::log_ratio{}, 1, links::square(half), links::square(-half))};
  }
  options options_;
};

/// SPPO: ½ ((u − (P − ½)/β)² + (v − (P′ − ½)/β)²), P and P′ the pairs' targets and
/// rejected_targets: how probably each response wins against one of the model. Without them 1 and
/// 0; `dpo` with dpo_type::sppo is twice that. In the paper, η = 1/β.
///
/// Source: Wu et al., "Self-play preference optimization for language model alignment", ICLR 2025
/// (β about 0.001).
template <class T = float> class sppo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.001);
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "sppo";

  sppo() : sppo(options{}) {}
  explicit(false) sppo(const options& o)
      : preference_loss<T>(name, {term(core::positive(name, "beta", o.beta))},
                           core::ratio_reward(o.beta), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  static preference_term term(double beta) {
    const auto of_pair = [beta](const preference_pair& p) -> pair_outcome {
      const double w = p.chosen.log_ratio() - (p.target - 0.5) / beta;
      const double l = p.rejected.log_ratio() - (p.rejected_target - 0.5) / beta;
      return {(w * w + l * l) / 2, w, l};
    };
    return pairwise_term(of_pair, needs_reference);
  }
  options options_;
};

namespace core {

/// p log(1 + e^−t) + (1 − p) log(1 + e^t), t = β d − margin, p the pair's target.
inline pair_outcome judge_by_target(const preference_pair& p, double beta) {
  const double t = beta * (p.chosen.log_ratio() - p.rejected.log_ratio()) - p.margin;
  const links::outcome o = links::cross_entropy(p.target, 1 - p.target, t);
  return {o.value, beta * o.slope, -beta * o.slope, t, true};
}

} // namespace core

/// Direct Nash optimisation: the soft target p, the pairs' targets, of the margin,
/// p log(1 + e^−ηd) + (1 − p) log(1 + e^ηd), references from the iteration before. Slope by u:
/// η (σ(ηd) − p). Any degree of preference in the place of a label is trained by this.
/// Source: Rosset et al., "Direct Nash optimization: teaching language models to self-improve with
/// general preferences", 2024. Its DNO-Prct has p = 1: `dpo`.
template <class T = float> class dno : public preference_loss<T> {
public:
  struct options {
    T eta = T(0.1); ///< η > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "dno";

  dno() : dno(options{}) {}
  explicit(false) dno(const options& o)
      : preference_loss<T>(name, {term(core::positive(name, "eta", o.eta))},
                           core::ratio_reward(o.eta), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  static preference_term term(double eta) {
    return pairwise_term([eta](const preference_pair& p) { return core::judge_by_target(p, eta); },
                         needs_reference | needs_targets);
  }
  options options_;
};

/// Exploratory preference optimisation, of pairs of a sample of the model (the pairs' `chosen`,
/// whichever is the better) and one of the reference (`rejected`). With the probability p that the
/// model's is the better one (the pairs' targets; 1 or 0 as a judge says),
///
///   p log(1 + e^−βd) + (1 − p) log(1 + e^βd), or with `ipo` (d − (2p − 1)/(2β))²;   + α log π(y′)
///
/// so that what the reference says is unlearnt. Where that is −inf the steeper part wins. α = 0, of
/// two samples of the model: online DPO. The report's margins are those of the model's over the
/// reference's sample. Source: Xie et al., "Exploratory preference optimization: harnessing
/// implicit Q*-approximation for sample-efficient RLHF", ICLR 2025; TRL, and its α.
template <class T = float> class xpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1);
    T alpha = T(1e-5); ///< α, 0 or more
    bool ipo = false;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "xpo";

  xpo() : xpo(options{}) {}
  explicit(false) xpo(const options& o)
      : preference_loss<T>(name, {term(o)}, core::ratio_reward(o.beta), o.reduction), options_(o) {}
  const options& settings() const { return options_; }

private:
  static pair_outcome square(const preference_pair& p, double beta) {
    const double d = p.chosen.log_ratio() - p.rejected.log_ratio();
    const double off = d - p.margin - (2 * p.target - 1) / (2 * beta);
    return {off * off, 2 * off, -2 * off, d - p.margin, true};
  }
  static preference_term term(const options& o) {
    const double beta = core::positive(name, "beta", o.beta);
    const double alpha = core::not_negative(name, "alpha", o.alpha);
    const auto of_pair = [beta, alpha, ipo = o.ipo](const preference_pair& p) -> pair_outcome {
      pair_outcome out = ipo ? square(p, beta) : core::judge_by_target(p, beta);
      const double said = p.rejected.log_probability;
      // Where `said` is −inf the comparison grows by −slope · said, and that without end with ipo.
      if (out.value == -core::no_score && said == core::no_score)
        out.value = (ipo ? out.rejected : out.rejected + alpha) * said;
      else
        out.value += links::times(alpha, said);
      out.rejected += alpha;
      return out;
    };
    return pairwise_term(of_pair, needs_reference | needs_targets);
  }
  options options_;
};

/// Iterative Nash policy optimisation: (h − 1/(2η))², h = log π/π′ − (τ/η) log ref/ref′ −
/// (1 − τ/η) log of the same of the iteration before (the pairs' *_previous). τ = η: IPO of sums.
/// Rewards are η (log π − log ref).
/// Source: Zhang et al., "Iterative Nash policy optimization: aligning LLMs with general
/// preferences via no-regret learning", ICLR 2025 (η 0.0075, τ = η/3).
template <class T = float> class inpo : public preference_loss<T> {
public:
  struct options {
    T eta = T(0.0075); ///< η > 0
    T tau = T(0.0025); ///< τ in (0, η]
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "inpo";

  inpo() : inpo(options{}) {}
  explicit(false) inpo(const options& o)
      : preference_loss<T>(name, {term(o)}, core::ratio_reward(o.eta), o.reduction), options_(o) {}
  const options& settings() const { return options_; }

private:
  static preference_term term(const options& o) {
    const double eta = core::positive(name, "eta", o.eta);
    core::require(o.tau > 0 && o.tau <= o.eta, name, "tau", o.tau, "a number in (0, eta]");
    return margin_term(scores::mixed_log_ratio{static_cast<double>(o.tau) / eta},
                       links::square(1 / (2 * eta)), 1);
  }
  options options_;
};

/// β-DPO: log(1 + e^−β_b d) with a β of the batch, held constant in the gradient:
/// β_b = max(least, β (1 + a (mean d − M₀))), M₀ the pairs' baseline, the mean over pairs of row
/// weight, by these weights. The pairs that are kept have row weight 1 and the others 0: see
/// margin_statistics for both. Rewards are β log-ratio.
/// Source: Wu et al., "β-DPO: direct preference optimization with dynamic β", NeurIPS 2024.
template <class T = float> class beta_dpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1);
    T a = T(0.6);
    T least = T(0.001); ///< above 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "beta_dpo";

  beta_dpo() : beta_dpo(options{}) {}
  explicit(false) beta_dpo(const options& o)
      : preference_loss<T>(name, {term(o)}, core::ratio_reward(o.beta), o.reduction), options_(o) {}
  const options& settings() const { return options_; }

private:
  static preference_term term(const options& o) {
    const double beta = core::positive(name, "beta", o.beta), a = core::finite(name, "a", o.a);
    const double least = core::positive(name, "least", o.least);
    const auto each = [=](std::span<const preference_pair> pairs, std::span<pair_outcome> out) {
      core::exact_sum sum, weights;
      for (const preference_pair& p : pairs)
        if (const double d = p.chosen.log_ratio() - p.rejected.log_ratio(); d == d) {
          sum.add(p.weight * d);
          weights.add(p.weight);
        }
      if (weights.value() == 0)
        weights.add(1);
      const double mean = sum.value() / weights.value();
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        const preference_pair& p = pairs[i];
        const double of_batch =
            std::max(beta * (1 + links::times(a, mean - p.baseline)), least); // NaN stays
        const double t = of_batch * (p.chosen.log_ratio() - p.rejected.log_ratio()) - p.margin;
        const links::outcome found = links::logistic{}(t);
        const double slope = links::times(found.slope, of_batch);
        out[i] = {found.value, slope, -slope, t, true};
      }
    };
    return {each, needs_reference};
  }
  options options_;
};

/// Exponential averages of mean and standard deviation (n − 1) of the margins d = u − v of batches,
/// and which pairs of a batch β-DPO keeps. The first batch is taken whole. Margins that are not
/// finite have no part in the averages: no batch ruins them.
class margin_statistics {
public:
  explicit margin_statistics(double decay = 0.9) : decay_(decay) {
    core::require(decay >= 0 && decay < 1, "margin_statistics", "decay", decay,
                  "a number in [0, 1)");
  }
  double mean() const { return mean_; }
  double deviation() const { return deviation_; }

  template <class T> void update(const preference_pairs<T>& pairs) {
    std::vector<double> d = margins(pairs);
    std::erase_if(d, [](double x) { return !std::isfinite(x); });
    if (d.empty())
      return;
    const auto n = static_cast<double>(d.size());
    core::exact_sum sum, squares;
    for (const double x : d)
      sum.add(x);
    const double mean = sum.value() / n;
    for (const double x : d)
      squares.add((x - mean) * (x - mean));
    const double deviation = d.size() > 1 ? std::sqrt(squares.value() / (n - 1)) : 0;
    if (!std::isfinite(deviation))
      return;
    const double keep = started_ ? decay_ : 0;
    mean_ = keep * mean_ + (1 - keep) * mean;
    deviation_ = keep * deviation_ + (1 - keep) * deviation;
    started_ = true;
  }
  /// e^−½((d − M₀)/S₀)² of each pair, with which the paper draws the kept ones.
  template <class T> std::vector<double> densities(const preference_pairs<T>& pairs) const {
    std::vector<double> d = margins(pairs);
    for (double& x : d) {
      const double off = x - mean_;
      x = off == 0 ? 1 : std::exp(-0.5 * (off / deviation_) * (off / deviation_));
    }
    return d;
  }
  /// 1 for the `share` of the pairs (rounded up) of the largest density, the first of equal ones,
  /// else 0: row weights.
  template <class T> std::vector<T> keep(const preference_pairs<T>& pairs, double share) const {
    core::require(share >= 0 && share <= 1, "margin_statistics", "share", share,
                  "a number in [0, 1]");
    const std::vector<double> d = margins(pairs);
    std::vector<std::size_t> order(d.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto distance = [&](std::size_t i) {
      return d[i] == d[i] ? std::fabs(d[i] - mean_) : std::numeric_limits<double>::infinity();
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t i, std::size_t j) { return distance(i) < distance(j); });
    std::vector<T> kept(d.size());
    const auto count =
        static_cast<std::size_t>(std::ceil(share * static_cast<double>(d.size()) - 1e-9));
    for (std::size_t k = 0; k < count; ++k)
      kept[order[k]] = 1;
    return kept;
  }

private:
  template <class T> static std::vector<double> margins(const preference_pairs<T>& p) {
    constexpr core::sequence_checks<T> checks{"margin_statistics"};
    const auto views = {p.chosen, p.rejected, p.chosen_reference, p.rejected_reference};
    for (const auto& view : views)
      checks.entries("log-probabilities", view, p.chosen.size, "as many as there are chosen");
    std::vector<double> d(static_cast<std::size_t>(p.chosen.size));
    for (index i = 0; i < p.chosen.size; ++i) {
      const auto at = [i](const auto& view) { return static_cast<double>(view[i]); };
      d[static_cast<std::size_t>(i)] =
          (at(p.chosen) - at(p.chosen_reference)) - (at(p.rejected) - at(p.rejected_reference));
    }
    return d;
  }
  double decay_, mean_ = 0, deviation_ = 0;
  bool started_ = false;
};

/// Diffusion-DPO: log(1 + e^−t), t = −(β/2) ((e − r) − (e′ − r′)), e the mean squared errors of the
/// predicted noise for the chosen and r the reference's at the same noise, given in the places of
/// the log-probabilities. Rewards are −(β/2) (e − r).
/// Source: Wallace et al., "Diffusion model alignment using direct preference optimization", CVPR
/// 2024, and its code (β 5000, with the number of steps in it).
template <class T = float> class diffusion_dpo : public preference_loss<T> {
public:
  struct options {
    T beta = 5000;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "diffusion_dpo";

  diffusion_dpo() : diffusion_dpo(options{}) {}
  explicit(false) diffusion_dpo(const options& o)
      : preference_loss<T>(
            name,
            {margin_term(scores::scaled_log_ratio{-1}, links::logistic{},
                         core::positive(name, "beta", o.beta) / 2)},
            core::reward_of(scores::scaled_log_ratio{-1}, static_cast<double>(o.beta) / 2),
            o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  options options_;
};

/// The Bradley-Terry loss of a reward model: log(1 + e^−(r − r′ − margin)) + c (r + r′)², of
/// rewards r in the places of the log-probabilities, margins those of the pairs. Without c the sum
/// of a pair's rewards is free.
///
/// Source: Bradley, Terry, 1952; Touvron et al., "Llama 2", 2023
/// (margin); Eisenstein et al., "Helping or herding?", 2023 (c, 0.01).
template <class T = float> class bradley_terry : public preference_loss<T> {
public:
  struct options {
    T centering = 0; ///< c, 0 or more
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "bradley_terry";

  bradley_terry() : bradley_terry(options{}) {}
  explicit(false) bradley_terry(const options& o)
      : preference_loss<T>(name, terms(core::not_negative(name, "centering", o.centering)),
                           core::reward_of(scores::log_probability{}, 1), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  static std::vector<preference_term> terms(double centering) {
    const auto squared = [](const preference_pair& p) -> pair_outcome {
      const double sum = p.chosen.log_probability + p.rejected.log_probability;
      return {sum * sum, 2 * sum, 2 * sum};
    };
    return {margin_term(scores::log_probability{}, links::logistic{}, 1),
            centering * pairwise_term(squared, needs_nothing)};
  }
  options options_;
};

/// Density-ratio losses: the chosen responses are samples of the distribution that is wanted, the
/// rejected ones of the reference.
enum class density_ratio_type {
  lsif, ///< −e^u + ½ e^2v
  ukl,  ///< −log π + e^v
  bce,  ///< log(1 + e^−u) + log(1 + e^v)
  ddro  ///< 2 log 2 − u − log(2 − e^v); linear in e^v from 2 − 10^−6 on
};

/// A loss of density_ratio_type. lsif is not bounded below. Exponentials, and slopes that are some,
/// are infinite beyond 709; the value of lsif only where the difference of its two is. Rewards are
/// log-ratios.
/// Source: the code of DisentangledPreferenceOptimization (IceyWuu); Kanamori, Hido, Sugiyama, 2009
/// (LSIF); Higuchi, Suzuki, "Direct density ratio optimization", 2025 (DDRO).
template <class T = float> class density_ratio : public preference_loss<T> {
public:
  struct options {
    density_ratio_type type = density_ratio_type::ddro;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "density_ratio";

  density_ratio() : density_ratio(options{}) {}
  explicit(false) density_ratio(const options& o)
      : preference_loss<T>(name, {term(o.type)}, core::reward_of(scores::log_ratio{}, 1),
                           o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  static links::outcome below_2(double v) {
    constexpr double least = 1e-6;
    const double x = std::exp(v), rest = 1 - std::expm1(v);
    if (rest >= least)
      return {-std::log1p(-std::expm1(v)), x / rest};
    return {-std::log(least) + (least - rest) / least, rest == rest ? x / least : rest};
  }
  /// ½ e^2v − e^u, also where both overflow.
  static double lsif(double u, double v) {
    const double wanted = std::exp(u), other = std::exp(2 * v) / 2;
    if (std::isfinite(wanted) && std::isfinite(other))
      return other - wanted;
    const double log_other = 2 * v - std::numbers::ln2, apart = log_other - u;
    return std::copysign(
        std::exp(std::max(u, log_other) + std::log(-std::expm1(-std::fabs(apart)))), apart);
  }
  static preference_term term(density_ratio_type type) {
    const scores::log_ratio s;
    switch (type) {
    case density_ratio_type::lsif: {
      const auto of_pair = [](const preference_pair& p) -> pair_outcome {
        const double u = p.chosen.log_ratio(), v = p.rejected.log_ratio();
        return {lsif(u, v), -std::exp(u), std::exp(2 * v)};
      };
      return pairwise_term(of_pair, needs_reference);
    }
    case density_ratio_type::ukl: {
      const auto of_pair = [](const preference_pair& p) -> pair_outcome {
        const double e = std::exp(p.rejected.log_ratio());
        return {e - p.chosen.log_probability, -1, e};
      };
      return pairwise_term(of_pair, needs_reference);
    }
    case density_ratio_type::bce:
      return point_term(s, 1, links::logistic{}, links::flipped<links::logistic>{});
    case density_ratio_type::ddro: {
      const auto chosen = [](double u) { return links::outcome{2 * std::numbers::ln2 - u, -1}; };
      return point_term(s, 1, chosen, below_2);
    }
    }
    core::fail(name, "type", core::to_text(static_cast<int>(type)), "one of density_ratio_type");
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
