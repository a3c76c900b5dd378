// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "pairs.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Log-probabilities of 0 or more are taken for this.
inline constexpr double certain = -1e-15;

} // namespace core

namespace scores {

/// log(p/(1 − p)) of a log-probability a = log p, slope 1/(1 − p).
inline outcome log_odds(double a) {
  const double inside = a >= core::certain ? core::certain : a;
  return {inside - links::log1mexp(inside), a >= core::certain ? 0 : -1 / std::expm1(inside)};
}
/// (1 − e^−αa)/α, slope e^−αa; a where α = 0. Exponents end at `most`, with slope 0 beyond.
struct power_transform {
  double alpha;
  double most = 80;
  outcome operator()(double a) const {
    if (alpha == 0)
      return {a, 1};
    const double x = -alpha * a;
    return x > most ? outcome{-std::expm1(most) / alpha, 0}
                    : outcome{-std::expm1(x) / alpha, std::exp(x)};
  }
};

} // namespace scores

/// A margin of log-probabilities through any of these links.
enum class cpo_type { sigmoid, hinge, ipo };

namespace core {

/// The links of cpo and tpo.
inline preference_term cpo_term(const char* loss, cpo_type type, double beta, double epsilon) {
  switch (type) {
  case cpo_type::sigmoid:
    return margin_term(scores::log_probability{}, links::smoothed(epsilon), beta);
  case cpo_type::hinge:
    return margin_term(scores::log_probability{}, links::hinge(1), beta);
  case cpo_type::ipo:
    return margin_term(scores::average{}, links::square(1 / (2 * beta)), 1);
  }
  fail(loss, "type", to_text(static_cast<int>(type)), "one of cpo_type");
}
/// Their rewards: β log π, or β log π/n where the link is of averages.
inline std::function<double(const preference_side&)> cpo_reward(bool averages, double beta) {
  if (averages)
    return reward_of(scores::average{}, beta);
  return reward_of(scores::log_probability{}, beta);
}

} // namespace core

/// Contrastive preference optimisation: no reference, and the likelihood of the chosen.
///
///   sigmoid: (1 − ε) log(1 + e^−z) + ε log(1 + e^z), hinge: max(0, 1 − z);  z = β (log π − log π′)
///   ipo: (log π/n − log π′/n′ − 1/(2β))²
///   + likelihood · (−log π of the chosen over the mean length)
///
/// Lengths: for ipo and the likelihood; without them log-probabilities are averages and the latter
/// the mean of these. Rewards are β log π (ipo: β log π/n). Everything else: preference_loss.
/// Source: Xu et al., "Contrastive preference optimization", ICML 2024; TRL (simpo there: simpo).
///
///   perdita::cpo<float> loss;
///   float value = loss({.chosen = a, .rejected = b, .chosen_lengths = na}, d_a, d_b);
template <class T = float> class cpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.1); ///< β > 0
    cpo_type type = cpo_type::sigmoid;
    T likelihood = 1;      ///< 0 or more
    T label_smoothing = 0; ///< ε in [0, ½], of sigmoid
    likelihood_share share = likelihood_share::batch_tokens;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "cpo";

  cpo() : cpo(options{}) {}
  explicit(false) cpo(const options& o)
      : preference_loss<T>(
            name,
            {core::cpo_term(name, o.type, core::positive(name, "beta", o.beta),
                            core::smoothing(name, o.label_smoothing)),
             core::not_negative(name, "likelihood", o.likelihood) * likelihood_term(o.share)},
            core::cpo_reward(o.type == cpo_type::ipo, static_cast<double>(o.beta)), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  options options_;
};

/// Simple preference optimisation: averages of log-probabilities, and a target margin.
///
///   (1 − ε) log(1 + e^−t) + ε log(1 + e^t), or max(0, 1 − t) if `hinge`
///   t = β (φ(log π/n) − φ(log π′/n′)) − γ,  φ(a) = (1 − e^−αa)/α; a for α = 0 (SimPO)
///   + likelihood · (−log π of the chosen over the mean length)
///
/// γ is inside the link and not multiplied by β: the paper's γ/β of 0.25 and β of 2 are γ = 0.5.
/// TRL's and Liger's defaults (β 0.1, γ 0.5) are not the paper's. likelihood > 0: CPO-SimPO; α > 0:
/// AlphaPO, see alphapo. Without lengths log-probabilities are averages. Rewards are β log π/n.
/// Everything else: preference_loss.
/// Source: Meng, Xia, Chen, "SimPO: simple preference optimization with a reference-free reward",
/// NeurIPS 2024; Gupta et al., "AlphaPO: reward shape matters for LLM alignment", ICML 2025.
///
///   perdita::simpo<float> loss({.beta = 2.5f, .gamma = 1.375f});
///   float value = loss({.chosen = a, .rejected = b, .chosen_lengths = na, .rejected_lengths = nb},
///                      d_a, d_b);
template <class T = float> class simpo : public preference_loss<T> {
public:
  struct options {
    T beta = 2; ///< β > 0
    T gamma = T(0.5);
    T alpha = 0;
    bool hinge = false;
    T likelihood = 0;      ///< 0 or more
    T label_smoothing = 0; ///< ε in [0, ½], not of the hinge
    likelihood_share share = likelihood_share::batch_tokens;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "simpo";

  simpo() : simpo(options{}) {}
  explicit(false) simpo(const options& o) : simpo(o, name) {}
  const options& settings() const { return options_; }

protected:
  simpo(const options& o, const char* called)
      : preference_loss<T>(
            called,
            {term(o, called),
             core::not_negative(called, "likelihood", o.likelihood) * likelihood_term(o.share)},
            core::reward_of(scores::average{}, static_cast<double>(o.beta)), o.reduction),
        options_(o) {}

private:
  static preference_term term(const options& o, const char* called) {
    const double beta = core::positive(called, "beta", o.beta);
    const double gamma = core::finite(called, "gamma", o.gamma);
    const double epsilon = core::smoothing(called, o.label_smoothing);
    const scores::transformed score{
        scores::average{}, scores::power_transform{core::finite(called, "alpha", o.alpha)}};
    if (o.hinge)
      return margin_term(score, links::hinge(1), beta, gamma);
    return margin_term(score, links::smoothed(epsilon), beta, gamma);
  }
  options options_;
};

/// simpo with a power of the probability: its options, with the defaults of AlphaPO.
template <class T = float> class alphapo : public simpo<T> {
public:
  struct options {
    T beta = T(2.5); ///< β > 0
    T gamma = T(0.25);
    T alpha = T(0.25);
    bool hinge = false;
    T likelihood = 0;      ///< 0 or more
    T label_smoothing = 0; ///< ε in [0, ½], not of the hinge
    likelihood_share share = likelihood_share::batch_tokens;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "alphapo";

  alphapo() : alphapo(options{}) {}
  explicit(false) alphapo(const options& o)
      : simpo<T>({.beta = o.beta,
                  .gamma = o.gamma,
                  .alpha = o.alpha,
                  .hinge = o.hinge,
                  .likelihood = o.likelihood,
                  .label_smoothing = o.label_smoothing,
                  .share = o.share,
                  .reduction = o.reduction},
                 name) {}
};

/// Triple preference optimisation: of each prompt's three responses, the best one (the pairs'
/// `gold`) is said, and the other two are set apart.
///
///   the links of cpo, or with `averages` (TPO-L)
///   (1 − ε) log(1 + e^−t) + ε log(1 + e^t), t = β (log π/n − log π′/n′) − γ
///   + likelihood · (−log π of the gold over the mean length)
///
/// Rewards are β log π (of averages: β log π/n). Everything else: preference_loss.
/// Source: Saeidi et al., "Triple preference optimization: achieving better alignment using a
/// single step optimization", 2024; TRL.
///
///   perdita::tpo<float> loss;
///   float value = loss({.chosen = a, .rejected = b, .gold = c, .gold_lengths = nc},
///                      d_a, d_b, d_c);
template <class T = float> class tpo : public preference_loss<T> {
public:
  struct options {
    T beta = T(0.01); ///< β > 0
    cpo_type type = cpo_type::sigmoid;
    bool averages = false; ///< TPO-L, of sigmoid
    T gamma = T(0.5);      ///< of averages
    T likelihood = 1;      ///< 0 or more
    T label_smoothing = 0; ///< ε in [0, ½], of sigmoid
    likelihood_share share = likelihood_share::batch_tokens;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "tpo";

  tpo() : tpo(options{}) {}
  explicit(false) tpo(const options& o)
      : preference_loss<T>(
            name,
            {term(o),
             core::not_negative(name, "likelihood", o.likelihood) * likelihood_term(o.share, true)},
            core::cpo_reward(o.averages || o.type == cpo_type::ipo, static_cast<double>(o.beta)),
            o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

  T operator()(const preference_pairs<T>& pairs, const call_options<T>& call = {},
               const preference_report<T>& report = {}) const {
    return preference_loss<T>::operator()(pairs, call, report);
  }
  T operator()(const preference_pairs<T>& pairs, vector_view<T> d_chosen, vector_view<T> d_rejected,
               vector_view<T> d_gold, const call_options<T>& call = {},
               const preference_report<T>& report = {}) const {
    return this->with_gold(pairs, d_chosen, d_rejected, d_gold, call, report);
  }

private:
  static preference_term term(const options& o) {
    const double beta = core::positive(name, "beta", o.beta);
    const double epsilon = core::smoothing(name, o.label_smoothing);
    if (!o.averages)
      return core::cpo_term(name, o.type, beta, epsilon);
    core::require(o.type == cpo_type::sigmoid, name, "type", static_cast<int>(o.type),
                  "cpo_type::sigmoid for averages");
    return margin_term(scores::average{}, links::smoothed(epsilon), beta,
                       core::finite(name, "gamma", o.gamma));
  }
  options options_;
};

/// Odds ratio preference optimisation.
///
///   λ log(1 + e^−θ) + likelihood · (−log π of the chosen over the mean length)
///   θ = o(log π/n) − o(log π′/n′),  o(a) = a − log(1 − e^a),  o′ = 1/(1 − e^a)
///
/// Exact for averages a from −1e308 to −1e-15; what is above that, 0 for instance, is taken for it,
/// with slope 0. Without lengths log-probabilities are averages. The likelihood is that of the
/// completion; TRL's counts the prompt too: set likelihood to 0 and add cross_entropy of all
/// tokens. Rewards are λ log π/n (TRL); arguments θ, of which TRL's log_odds_chosen is the mean,
/// and log_odds_ratio that of −log(1 + e^−θ). TRL's λ is 0.1 and called beta, the official
/// code's 1. Everything else: preference_loss.
///
/// Source: Hong, Lee, Thorne, "ORPO: monolithic
/// preference optimization without reference model", EMNLP 2024.
///
///   perdita::orpo<float> loss;
///   float value = loss({.chosen = a, .rejected = b, .chosen_lengths = na, .rejected_lengths = nb},
///                      d_a, d_b);
template <class T = float> class orpo : public preference_loss<T> {
public:
  struct options {
    T lambda = T(0.1); ///< λ > 0
    T likelihood = 1;  ///< 0 or more
    likelihood_share share = likelihood_share::batch_tokens;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "orpo";

  orpo() : orpo(options{}) {}
  explicit(false) orpo(const options& o)
      : preference_loss<T>(
            name,
            {core::positive(name, "lambda", o.lambda) *
                 margin_term(scores::transformed{scores::average{}, scores::log_odds},
                             links::logistic{}, 1),
             core::not_negative(name, "likelihood", o.likelihood) * likelihood_term(o.share)},
            core::reward_of(scores::average{}, static_cast<double>(o.lambda)), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  options options_;
};

/// Sequence likelihood calibration with human feedback: max(0, δ − log π + log π′) + λ (−log π of
/// the chosen), of sums, not averages. Slope 0 at the kink. Rewards are log π. Everything else:
/// preference_loss.
/// Source: Zhao et al., "SLiC-HF: sequence likelihood calibration with human feedback", 2023; the
/// defaults of HALOs. Where the likelihood is another response's, λ = 0 and cross_entropy.
template <class T = float> class slic : public preference_loss<T> {
public:
  struct options {
    T delta = 1;
    T lambda = T(0.1); ///< 0 or more
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "slic";

  slic() : slic(options{}) {}
  explicit(false) slic(const options& o)
      : preference_loss<T>(name,
                           {margin_term(scores::log_probability{},
                                        links::hinge(core::finite(name, "delta", o.delta)), 1),
                            core::not_negative(name, "lambda", o.lambda) *
                                likelihood_term(likelihood_share::sequence)},
                           core::reward_of(scores::log_probability{}, 1), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  options options_;
};

/// Rank responses to align human feedback, of two: rank · max(0, log π′/n′^p − log π/n^p) +
/// likelihood · (−log π of the chosen). Slope 0 at the kink. The official code's rank is 100, its
/// scripts' 1, and its likelihood a mean over padding too. Rewards are log π/n^p. Everything else:
/// preference_loss.
/// Source: Yuan et al., "RRHF: rank responses to align language models with human feedback without
/// tears", NeurIPS 2023.
template <class T = float> class rrhf_pair : public preference_loss<T> {
public:
  struct options {
    T rank = 1;         ///< 0 or more
    T likelihood = 1;   ///< 0 or more
    T length_power = 1; ///< p
    likelihood_share share = likelihood_share::sequence;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "rrhf_pair";

  rrhf_pair() : rrhf_pair(options{}) {}
  explicit(false) rrhf_pair(const options& o)
      : preference_loss<T>(
            name,
            {core::not_negative(name, "rank", o.rank) * margin_term(score(o), links::hinge(0), 1),
             core::not_negative(name, "likelihood", o.likelihood) * likelihood_term(o.share)},
            core::reward_of(score(o), 1), o.reduction),
        options_(o) {}
  const options& settings() const { return options_; }

private:
  static scores::average score(const options& o) {
    return {core::finite(name, "length_power", o.length_power)};
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
