// SPDX-License-Identifier: MIT
#pragma once

/// Unlearning: losses of what is to be forgotten, and the terms that keep the rest.
///
///   of sequences   gradient_ascent, npo, npo_kto, simnpo, sequence_nll; of these, ascent and NLL
///                  have token means of the whole batch
///   of tokens      wga, satimp, token_unlikelihood: scores.policy has one number per token; prompt
///                  and padding are left out, or of row weight 0
///   of logits      unlikelihood, ce_u, undial, logit_gap: losses of rows, with ignore_index
///   together       retaining: a forget loss with retain NLL and KL; c_advul; c_advipo
///
/// The KL term of a row of logits is distillation's forward_kl at temperature 1, with labels' rows
/// weighted 0 where they are prompt or padding: the NPO code averages over those too.
/// GradDiff is retaining<gradient_ascent>, NPO+RT retaining<npo>, IDK retaining<sequence_nll> with
/// refusals in the place of answers. DPO as unlearning, (2/β) log(1 + e^(−β (x_idk − x_f))), is dpo
/// times 2/β with the refusal chosen.
/// Beginning of points.hpp: inputs, reducers, special values, errors.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <utility>

#include "../core/paired_kernel.hpp"
#include "../core/solved_row.hpp"
#include "../core/traits.hpp"
#include "points.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// What a sequence (or token) that is to be forgotten, or kept, is in the summary.
template <class T, class Link>
T reduce_of_one_class(const char* name, const sequence_scores<T>& in, const score_rule& rule,
                      reduction how, const vector_view<T>& gradient, const call_options<T>& call,
                      const sequence_report<T>& report, bool chosen, Link link) {
  return reduce_points(
      name, in, rule, how, gradient, call, report, [&](index) { return chosen; },
      [&](index, double x) { return links::outcome(link(x)); });
}

/// Options of losses that have no others.
struct reduction_alone {
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Base of the losses of one class of sequences: Derived has name, chosen, rule() and link().
template <class Derived, class T, class Options> class one_class_loss {
public:
  using value_type = T;
  using options = Options;
  const options& settings() const { return options_; }

  /// The reduced value, and its gradient where there is memory for it.
  T operator()(const sequence_scores<T>& scores, vector_view<T> gradient = {},
               const call_options<T>& call = {}, const sequence_report<T>& report = {}) const {
    const auto& self = static_cast<const Derived&>(*this);
    return reduce_of_one_class(Derived::name, scores, self.rule(), options_.reduction, gradient,
                               call, report, Derived::chosen, self.link());
  }

protected:
  explicit one_class_loss(const options& o) : options_(o) {
    require_reduction(Derived::name, o.reduction);
  }
  options options_;
};

} // namespace core

/// The negative log-likelihood of sequences, without a reference:
///
///   ℓ_i = −log π(y_i),   mean: over the tokens of all sequences,  −Σ w_i log π(y_i) / Σ w_i n_i
///
/// so that lengths are needed. It is retain term, and utility term, of the losses here.
template <class T = float>
class sequence_nll : public core::one_class_loss<sequence_nll<T>, T, core::reduction_alone> {
public:
  static constexpr const char* name = "sequence_nll";
  static constexpr bool chosen = true;
  explicit(false) sequence_nll(const core::reduction_alone& o = {})
      : core::one_class_loss<sequence_nll, T, core::reduction_alone>(o) {}

private:
  friend core::one_class_loss<sequence_nll, T, core::reduction_alone>;
  core::score_rule rule() const { return {.has_reference = false, .per_token = true}; }
  auto link() const {
    return [](double x) { return links::outcome{-x, -1}; };
  }
};

/// Gradient ascent: log π(y), per token of the batch: −sequence_nll. Not bounded below.
template <class T = float>
class gradient_ascent : public core::one_class_loss<gradient_ascent<T>, T, core::reduction_alone> {
public:
  static constexpr const char* name = "gradient_ascent";
  static constexpr bool chosen = false;
  explicit(false) gradient_ascent(const core::reduction_alone& o = {})
      : core::one_class_loss<gradient_ascent, T, core::reduction_alone>(o) {}

private:
  friend core::one_class_loss<gradient_ascent, T, core::reduction_alone>;
  core::score_rule rule() const { return {.has_reference = false, .per_token = true}; }
  auto link() const {
    return [](double x) { return links::outcome{x, 1}; };
  }
};

struct npo_options {
  double beta = 0.1;      ///< β > 0
  bool per_token = false; ///< x is divided by the sequence's length (the WMDP code)
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Negative preference optimisation. With x = log π(y) − log π_ref(y) of what is to be forgotten,
///
///   ℓ = (2/β) log(1 + e^(β x)),   ∂ℓ/∂x = 2 σ(β x)
///
/// Gradient ascent that stops: ℓ − (2/β) log 2 → x as β → 0. At π = π_ref the slope is 1.
/// Source: Zhang, Lin, Bai, Mei, "Negative preference optimization: from catastrophic collapse to
/// effective unlearning", COLM 2024.
///
///   perdita::npo<float> loss;
///   float value = loss({.policy = p, .reference = r}, d_policy);
template <class T = float> class npo : public core::one_class_loss<npo<T>, T, npo_options> {
public:
  static constexpr const char* name = "npo";
  static constexpr bool chosen = false;
  explicit(false) npo(const npo_options& o = {}) : core::one_class_loss<npo, T, npo_options>(o) {
    core::positive(name, "beta", o.beta);
  }

private:
  friend core::one_class_loss<npo, T, npo_options>;
  core::score_rule rule() const {
    return {.beta = this->options_.beta, .power = this->options_.per_token ? 1.0 : 0.0};
  }
  auto link() const {
    return [beta = this->options_.beta](double x) {
      return links::outcome{2 / beta * links::softplus(beta * x), 2 * links::sigmoid(beta * x)};
    };
  }
};

/// The K of npo_kto: the mean of log π(y) − log π_ref(y) over refusals y, a constant for the
/// gradient; 0 where there are none. Not held above 0, as kto_baseline is.
template <class T> double refusal_baseline(const sequence_scores<T>& refusals) {
  return core::mean_log_ratio("refusal_baseline", refusals).mean;
}

struct npo_kto_options {
  double beta = 0.1;    ///< β > 0
  bool bounded = false; ///< kto_sigmoid, else kto_logsigmoid
  perdita::reduction reduction = perdita::reduction::mean;
};

/// The variants of KTO that the NPO code forgets with. With x as in npo and K of refusal_baseline,
///
///   kto_logsigmoid: ℓ = (2/β) log(1 + e^(β x − K)),   ∂ℓ/∂x = 2 σ(β x − K)
///   kto_sigmoid:    ℓ = (2/β) σ(β x − K),             ∂ℓ/∂x = 2 σ(β x − K) σ(K − β x)
///
/// K is not multiplied by β there; K = 0 in the first is npo. The code's values are 1 more, and
/// 1 − 2/β more, with these gradients. The summary's kl is K. Source: the code of Zhang et al.
/// (npo).
template <class T = float> class npo_kto {
public:
  using value_type = T;
  using options = npo_kto_options;
  static constexpr const char* name = "npo_kto";

  npo_kto() : npo_kto(options{}) {}
  explicit(false) npo_kto(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const sequence_scores<T>& scores, double baseline, vector_view<T> gradient = {},
               const call_options<T>& call = {}, const sequence_report<T>& report = {}) const {
    core::finite(name, "baseline", baseline);
    const double beta = options_.beta;
    const T value =
        core::reduce_of_one_class(name, scores, {.beta = beta}, options_.reduction, gradient, call,
                                  report, false, [&](double x) -> links::outcome {
                                    const double t = beta * x - baseline;
                                    const links::outcome at =
                                        options_.bounded ? links::flipped<links::sigmoid_gain>{}(t)
                                                         : links::flipped<links::logistic>{}(t);
                                    return {2 / beta * at.value, 2 * at.slope};
                                  });
    if (report.summary)
      report.summary->kl = baseline;
    return value;
  }

private:
  options options_;
};

struct simnpo_options {
  double beta = 2.5; ///< β > 0
  double gamma = 0;  ///< γ, finite
  perdita::reduction reduction = perdita::reduction::mean;
};

/// NPO without a reference, of the mean log-probability a = log π(y)/n of a token:
///
///   ℓ = (2/β) log(1 + e^(β (a + γ))),   ∂ℓ/∂a = 2 σ(β (a + γ))
///
/// One script of the authors' takes the logarithm of σ of raw logits instead; not here.
/// Source: Fan, Liu, Lin, Jia, Zhang, Mei, Liu, "Simplicity prevails: rethinking negative
/// preference optimization for LLM unlearning", NeurIPS 2025.
template <class T = float>
class simnpo : public core::one_class_loss<simnpo<T>, T, simnpo_options> {
public:
  static constexpr const char* name = "simnpo";
  static constexpr bool chosen = false;
  explicit(false) simnpo(const simnpo_options& o = {})
      : core::one_class_loss<simnpo, T, simnpo_options>(o) {
    core::positive(name, "beta", o.beta);
    core::finite(name, "gamma", o.gamma);
  }

private:
  friend core::one_class_loss<simnpo, T, simnpo_options>;
  core::score_rule rule() const {
    return {.has_reference = false, .beta = this->options_.beta, .power = 1};
  }
  auto link() const {
    return [o = this->options_](double a) {
      const double t = o.beta * (a + o.gamma);
      return links::outcome{2 / o.beta * links::softplus(t), 2 * links::sigmoid(t)};
    };
  }
};

// --- Tokens --------------------------------------------------------------------------------------

struct wga_options {
  double beta = 1; ///< β ≥ 0; 0: gradient ascent
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Weighted gradient ascent, token by token, l = log p: the surer a token is the more it counts.
///
///   ℓ = p^β log p,   slope p^β: the weight is held constant
///
/// l = −inf: 0 (−inf with β = 0). Source: Wang, Zhou, Zhou, Shin, Han, Weinberger, "Rethinking LLM
/// unlearning objectives: a gradient perspective and go beyond", ICLR 2025.
template <class T = float> class wga : public core::one_class_loss<wga<T>, T, wga_options> {
public:
  static constexpr const char* name = "wga";
  static constexpr bool chosen = false;
  explicit(false) wga(const wga_options& o = {}) : core::one_class_loss<wga, T, wga_options>(o) {
    core::not_negative(name, "beta", o.beta);
  }

private:
  friend core::one_class_loss<wga, T, wga_options>;
  core::score_rule rule() const { return {.has_reference = false}; }
  auto link() const {
    return [beta = this->options_.beta](double l) {
      const double w = std::exp(links::times(beta, l));
      return links::outcome{links::times(w, l), l != l ? l : w};
    };
  }
};

struct satimp_options {
  double beta1 = 5; ///< ≥ 0, of saturation: p^β₁
  double beta2 = 1; ///< ≥ 0, of importance: (1 − p)^β₂
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Gradient ascent weighted by saturation and importance, token by token, l = log p:
///
///   ℓ = p^β₁ (1 − p)^β₂ log p,   slope p^β₁ (1 − p)^β₂: the weight is held constant
///
/// 0 at p = 0 (β₁ > 0) and p = 1 (β₂ > 0). l > 0 is NaN, unless β₂ = 0. Source: Yang, Wang, Huang,
/// Liu, Zhang, Han, "Exploring criteria of loss reweighting to enhance LLM unlearning", ICML 2025.
template <class T = float>
class satimp : public core::one_class_loss<satimp<T>, T, satimp_options> {
public:
  static constexpr const char* name = "satimp";
  static constexpr bool chosen = false;
  explicit(false) satimp(const satimp_options& o = {})
      : core::one_class_loss<satimp, T, satimp_options>(o) {
    core::not_negative(name, "beta1", o.beta1);
    core::not_negative(name, "beta2", o.beta2);
  }

private:
  friend core::one_class_loss<satimp, T, satimp_options>;
  core::score_rule rule() const { return {.has_reference = false}; }
  auto link() const {
    return [o = this->options_](double l) {
      const double w =
          std::exp(links::times(o.beta1, l) + links::times(o.beta2, links::log1mexp(l)));
      return links::outcome{links::times(w, l), l != l ? l : w};
    };
  }
};

struct unlikelihood_options {
  /// Tokens of a lower log-probability count for nothing: they are forgotten already.
  double threshold = -std::numeric_limits<double>::infinity();
  std::int64_t ignore_index = -100; ///< of rows of logits
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Unlikelihood of tokens, l = log p:
///
///   ℓ = −log(1 − p),   ∂ℓ/∂l = p/(1 − p);   0 and 0 where l < threshold
///
/// Those below the threshold count in the mean's denominator. l = 0: +inf with an infinite slope,
/// where `unlikelihood`, from the logits, still has all digits; l > 0: NaN.
/// Source: Welleck, Kulikov, Roller, Dinan, Cho, Weston, "Neural text generation with unlikelihood
/// training", ICLR 2020; the threshold: Xhonneux et al. 2024 (c_advul).
template <class T = float>
class token_unlikelihood
    : public core::one_class_loss<token_unlikelihood<T>, T, unlikelihood_options> {
public:
  static constexpr const char* name = "token_unlikelihood";
  static constexpr bool chosen = false;
  explicit(false) token_unlikelihood(const unlikelihood_options& o = {})
      : core::one_class_loss<token_unlikelihood, T, unlikelihood_options>(o) {
    core::require(o.threshold == o.threshold, name, "threshold", o.threshold, "a number");
  }

private:
  friend core::one_class_loss<token_unlikelihood, T, unlikelihood_options>;
  core::score_rule rule() const { return {.has_reference = false}; }
  auto link() const {
    return [threshold = this->options_.threshold](double l) {
      if (l < threshold)
        return links::outcome{0, 0};
      if (l > 0)
        l = std::numeric_limits<double>::quiet_NaN();
      // 1/(e^−l − 1), but −0 would make −inf of it
      return links::outcome{-links::log1mexp(l),
                            l == 0 ? std::numeric_limits<double>::infinity() : 1 / std::expm1(-l)};
    };
  }
};

// --- Rows of logits ------------------------------------------------------------------------------

namespace core {

/// e^{x_j − top} of the scores but the one at `left_out` (none: −1), which has 0, and their sums.
struct row_images {
  double top = no_score;
  double sum = 0, log_sum = 0; ///< Σ e^d, d = x − top, and its logarithm with all digits
  double moment = 0;           ///< Σ e^d d
  bool lost = false;           ///< NaN, or +inf but where it is left out

  row_images(const double* x, index n, index left_out, double* images) {
    index leader = -1;
    for (index j = 0; j < n; ++j) {
      lost = lost || x[j] != x[j];
      if (j != left_out && x[j] > top) {
        top = x[j];
        leader = j;
      }
    }
    lost = lost || top == -no_score;
    if (lost || all_masked())
      return;
    using W = pack<double>;
    wide_lanes<double> rest, moments;
    rest.clear();
    moments.clear();
    for_packs(x, n, no_score, [&](const W& z, index i) {
      const W at = iota<double>() + static_cast<double>(i);
      const W d = select(at == W(static_cast<double>(left_out)), W(no_score), z - W(top));
      const W e = exp(d);
      rest.add(select(at == W(static_cast<double>(leader)), W(0), e));
      moments.add(select(e == W(0), W(0), e * d));
      if (i + per_pack <= n)
        e.store(images + i);
      else
        store_first(e, images + i, n - i);
    });
    const double behind = rest.total();
    sum = 1 + behind;
    log_sum = std::log1p(behind);
    moment = moments.total();
  }
  bool all_masked() const { return top == no_score; }
};

/// Unlikelihood, and CE-U, whose gradient is the same:
///   p_y (e_y − q),  q the softmax without y
struct unlikelihood_formula {
  static constexpr bool paired = true;
  double threshold;
  bool with_entropy; ///< CE-U's value

  double operator()(const double* x, const double*, index n, index y, double* slopes) const {
    const row_images rivals(x, n, y, slopes);
    if (rivals.lost) {
      std::fill_n(slopes, n, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    if (rivals.all_masked()) { // p_y = 1, or 0 where it is masked too
      std::fill_n(slopes, n, 0.0);
      slopes[y] = x[y] == no_score ? 0 : 1;
      return x[y] == no_score ? 0 : -no_score;
    }
    const scalar_odds odds(rivals.top - x[y] + rivals.log_sum);
    if (-odds.surprise < threshold) {
      std::fill_n(slopes, n, 0.0);
      return 0;
    }
    const double factor = odds.hit / rivals.sum;
    for (index j = 0; j < n; ++j)
      slopes[j] *= -factor;
    slopes[y] = odds.hit;
    const double entropy = with_entropy ? rivals.log_sum - rivals.moment / rivals.sum : 0;
    return odds.rival_surprise + entropy;
  }
};

/// Cross-entropy of softmax(x) to softmax(t − β e_y).
struct undial_formula {
  static constexpr bool paired = true;
  double beta;

  double operator()(const double* x, const double* t, index n, index y, double* slopes) const {
    double *const q = slopes + n, *const z = q + n;
    const double top = *std::max_element(t, t + n); // which β must not drown in
    std::transform(t, t + n, z, [top](double score) { return score - top; });
    z[y] -= beta;
    const row_images own(x, n, -1, slopes), target(z, n, -1, q);
    if (own.lost || target.lost || own.all_masked() || target.all_masked()) {
      std::fill_n(slopes, n, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    exact_sum value;
    for (index j = 0; j < n; ++j) {
      const double share = q[j] / target.sum;
      value.add(links::times(share, (own.top - x[j]) + own.log_sum));
      slopes[j] = slopes[j] / own.sum - share;
    }
    return value.value();
  }
};

/// (max − mean)² of the scores that are not masked.
struct logit_gap_formula {
  static constexpr bool paired = true;

  double operator()(const double* x, const double*, index n, index, double* slopes) const {
    index top = 0, count = 0;
    bool lost = false;
    for (index j = 0; j < n; ++j) {
      lost = lost || x[j] != x[j] || x[j] == -no_score;
      count += x[j] != no_score;
      top = x[j] > x[top] ? j : top;
    }
    std::fill_n(slopes, n, lost ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    if (lost || count == 0)
      return lost ? slopes[0] : 0;
    exact_sum below;
    for (index j = 0; j < n; ++j)
      if (x[j] != no_score)
        below.add(x[top] - x[j]);
    const double gap = below.value() / static_cast<double>(count);
    for (index j = 0; j < n; ++j)
      if (x[j] != no_score)
        slopes[j] = 2 * gap * ((j == top ? 1 : 0) - 1 / static_cast<double>(count));
    return gap * gap;
  }
};

} // namespace core

/// Unlikelihood of the label, from logits:
///
///   ℓ = −log(1 − p_y),   ∂ℓ/∂x = (p_y/(1 − p_y)) (e_y − p) = p_y (e_y − q),  q_j = p_j/(1 − p_y)
///
/// 0 and 0 where log p_y < threshold. 1 − p_y comes from the rivals' shares: no digit is lost.
/// Special values: a masked label (-inf) costs 0; all rivals masked: +inf, with slope 1 at the
/// label; NaN, or +inf at a rival, makes the row NaN. Shapes, reductions, errors: as cross_entropy.
/// No by-products but `values`. Source: token_unlikelihood.
template <class T = float> class unlikelihood : public row_loss<unlikelihood<T>, T> {
public:
  using options = unlikelihood_options;
  static constexpr const char* name = "unlikelihood";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  unlikelihood() : unlikelihood(options{}) {}
  explicit(false) unlikelihood(const options& o) : options_(o) {
    core::require(o.threshold == o.threshold, name, "threshold", o.threshold, "a number");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = false,
            .smooth = options_.threshold == core::no_score,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

private:
  friend row_loss<unlikelihood<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::unlikelihood_formula{options_.threshold, false});
  }
  options options_;
};

struct row_unlearning_options {
  std::int64_t ignore_index = -100;
  perdita::reduction reduction = perdita::reduction::mean;
};

/// CE-U: cross-entropy to the model's own distribution without the label,
///
///   ℓ = −Σ_j q_j log p_j = H(q) − log(1 − p_y),   q = softmax(x with −inf at y), held constant
///   ∂ℓ/∂x = p − q = p_y (e_y − q)
///
/// whose gradient is bounded, and is that of `unlikelihood`. It is not the derivative of the value,
/// in which q moves too. The authors leave out the first token of an answer: ignore its row.
/// Special values, shapes, reductions, errors: as unlikelihood, but a masked label costs H(q).
/// Source: Yang, "CE-U: cross entropy unlearning", 2025.
template <class T = float> class ce_u : public row_loss<ce_u<T>, T> {
public:
  using options = row_unlearning_options;
  static constexpr const char* name = "ce_u";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = false,
                                      .smooth = true,
                                      .exact_gradient = false,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  ce_u() : ce_u(options{}) {}
  explicit(false) ce_u(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend row_loss<ce_u<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const {
    f(core::unlikelihood_formula{core::no_score, true});
  }
  options options_;
};

struct undial_options {
  double beta = 10; ///< β ≥ 0: what is taken off the label's logit of the teacher
  std::int64_t ignore_index = -100;
  perdita::reduction reduction = perdita::reduction::mean;
};

/// UNDIAL: self-distillation from a teacher whose label has been pressed down.
///
///   ℓ = −Σ_j q_j log p_j,   q = softmax(t − β e_y),   ∂ℓ/∂x = p − q
///
/// t: logits of the frozen model, rows × classes of T. The authors' code takes ignored labels for
/// indices, and the prompt too; here rows of ignore_index have no part.
/// -inf is a masked class, whose term is 0 where q is, else +inf; NaN, +inf, or nothing but -inf in
/// either makes the row NaN. Shapes, reductions, errors: as cross_entropy. No by-products but
/// `values`. Source: Dong, Lin, Belkin, Huerta, Vulić, "UNDIAL: self-distillation with adjusted
/// logits for robust unlearning in large language models", NAACL 2025.
///
///   perdita::undial<float> loss({.beta = 10});
///   float value = loss(logits, labels, teacher_logits, d_logits);
template <class T = float> class undial : public row_loss<undial<T>, T> {
public:
  using options = undial_options;
  static constexpr const char* name = "undial";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = true,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  undial() : undial(options{}) {}
  explicit(false) undial(const options& o) : options_(o) {
    core::not_negative(name, "beta", o.beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X, core::labels_like Y, class Q>
  requires core::scores_like<X, T> && core::scores_like<Q, T>
      T operator()(X&& scores, Y&& labels, Q&& teacher, const call_options<T>& call = {}) const {
    return run<false>(core::as_matrix(scores), core::as_vector(labels), core::as_matrix(teacher),
                      matrix_view<T>(), call);
  }
  /// The reduced value, and its gradient.
  template <class X, core::labels_like Y, class Q, class G>
  requires core::scores_like<X, T> && core::scores_like<Q, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& labels, Q&& teacher, G&& gradient,
                   const call_options<T>& call = {}) const {
    return run<true>(core::as_matrix(scores), core::as_vector(labels), core::as_matrix(teacher),
                     core::as_matrix(gradient), call);
  }

private:
  friend row_loss<undial<T>, T>;
  template <bool Gradient, class X, class L, class Q, class G>
  T run(const matrix_view<X>& scores, const vector_view<L>& labels, const matrix_view<Q>& teacher,
        const matrix_view<G>& gradient, const call_options<T>& call) const {
    auto job = this->paired_job(scores, teacher, gradient, "teacher");
    this->set_labels(job, labels);
    return this->template evaluate<Gradient>(
        job, call, [this](const auto&, auto f) { f(core::undial_formula{options_.beta}); });
  }
  options options_;
};

/// PDU's forget loss: logits made even, whatever the label.
///
///   ℓ = (max_k x_k − mean_k x_k)²,   ∂ℓ/∂x = 2 (max − mean) (e_argmax − 1/V)
///
/// V counts the classes that are not masked (-inf); of equal maxima the first takes the slope, and
/// all masked is 0. NaN or +inf makes the row NaN. Rows without weight have no part: give prompt
/// and padding row_weights of 0. Shapes, reductions, errors: as cross_entropy, without labels. No
/// by-products but `values`. Not smooth where maxima meet.
/// Source: Entesari, Hatami, Khaziev, Ramakrishna, Fazlyab, "Constrained entropic unlearning: a
/// primal-dual framework for large language models", 2025.
///
///   perdita::logit_gap<float> forget;
///   perdita::retain_multiplier mu;
///   mu.update(retain_value, 0.1, 0.01);   // and μ is the weight of the retain loss
template <class T = float> class logit_gap : public row_loss<logit_gap<T>, T> {
public:
  using options = row_unlearning_options;
  static constexpr const char* name = "logit_gap";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;
  static constexpr loss_traits traits{.convex = true,
                                      .smooth = false,
                                      .exact_gradient = true,
                                      .nonnegative = true,
                                      .shift_invariant = true};

  logit_gap() : logit_gap(options{}) {}
  explicit(false) logit_gap(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <class X>
  requires core::scores_like<X, T> T operator()(X&& scores,
                                                const call_options<T>& call = {}) const {
    return run<false>(core::as_matrix(scores), matrix_view<T>(), call);
  }
  template <class X, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, G&& gradient, const call_options<T>& call = {}) const {
    return run<true>(core::as_matrix(scores), core::as_matrix(gradient), call);
  }

private:
  friend row_loss<logit_gap<T>, T>;
  template <bool Gradient, class X, class G>
  T run(const matrix_view<X>& scores, const matrix_view<G>& gradient,
        const call_options<T>& call) const {
    auto job = this->paired_job(scores, scores, gradient, "scores");
    return this->template evaluate<Gradient>(
        job, call, [](const auto&, auto f) { f(core::logit_gap_formula{}); });
  }
  options options_;
};

/// The dual variable of "the retain loss is at most ε": μ ← max(0, μ + η (L_r − ε)). One number, to
/// be saved with the model; it is the retain weight of the step that follows.
struct retain_multiplier {
  double value = 0;

  /// Returns the new value. A loss that is not finite leaves it.
  double update(double retain_loss, double level, double step) {
    core::finite("retain_multiplier", "level", level);
    core::not_negative("retain_multiplier", "step", step);
    core::require(value >= 0, "retain_multiplier", "value", value, "0 or more");
    const double next = value + step * (retain_loss - level);
    if (std::isfinite(next))
      value = std::max(0.0, next);
    return value;
  }
  bool operator==(const retain_multiplier&) const = default;
};

// --- Together ------------------------------------------------------------------------------------

struct retaining_options {
  double forget_weight = 1; ///< γ ≥ 0
  double retain_weight = 1; ///< α ≥ 0: of the retain set's NLL per token
  double kl_weight = 0; ///< κ ≥ 0: of the mean of KL(reference ‖ policy) over retained tokens
};

/// What is to be kept.
template <class T> struct retained {
  sequence_scores<T> sequences{};    ///< with lengths, for the NLL
  vector_view<const T> kl{};         ///< KL(π_ref ‖ π) of each position of the retain set
  vector_view<const T> kl_weights{}; ///< 0 for prompt and padding; none: all positions count
};

/// Where the gradients of its three terms go: slopes by the log-probabilities of what is to be
/// forgotten and of what is kept, and by each position's KL. An empty view: not wanted.
template <class T> struct retaining_gradients { vector_view<T> forget{}, retain{}, kl{}; };

/// The terms before they are weighted.
struct retaining_terms {
  double forget = 0, retain = 0, kl = 0;
};

/// A forget loss with what keeps the rest:
///
///   γ L_forget + α (−Σ log π(y_r) / Σ n_r) + κ mean_t KL_t
///
/// Slopes are those of the terms times their weights; by KL_t: κ over the number of positions (or
/// the sum of their weights). A term of weight 0 is not computed, and need not be given; its slopes
/// are 0. GradDiff: gradient_ascent with α = 1.
///
///   perdita::retaining loss(perdita::npo<float>({.beta = 0.1}), {.kl_weight = 1});
///   float value = loss(forget, {.sequences = retain, .kl = kl}, {d_forget, d_retain, d_kl});
///
/// sequence_head (sequence.hpp) makes the sums and, as forward_kl, the KL from hidden states, and
/// takes all three gradients back: the last as sequence_gradient::d_forward_kl.
template <class Forget> class retaining {
public:
  using T = typename Forget::value_type;
  using value_type = T;
  using options = retaining_options;
  static constexpr const char* name = "retaining";

  explicit(false) retaining(Forget forget) : retaining(std::move(forget), options{}) {}
  retaining(Forget forget, const options& o) : forget_(std::move(forget)), options_(o) {
    core::not_negative(name, "forget_weight", o.forget_weight);
    core::not_negative(name, "retain_weight", o.retain_weight);
    core::not_negative(name, "kl_weight", o.kl_weight);
  }
  const options& settings() const { return options_; }

  T operator()(const sequence_scores<T>& forget, const retained<T>& keep,
               const retaining_gradients<T>& to = {}, retaining_terms* terms = nullptr) const {
    check_kl(keep, to.kl);
    const core::score_checks<T> checks{name};
    checks.apart({core::bytes_of(to.forget), core::bytes_of(to.retain), core::bytes_of(to.kl)},
                 {core::bytes_of(forget.policy), core::bytes_of(forget.reference),
                  core::bytes_of(forget.weights), core::bytes_of(keep.sequences.policy),
                  core::bytes_of(keep.sequences.reference), core::bytes_of(keep.sequences.weights),
                  core::bytes_of(keep.kl), core::bytes_of(keep.kl_weights)});
    // What a later term would find wrong must be found before the first writes; and the gradient of
    // a term that is left out is written too.
    core::require_memory(name, "gradient of what is forgotten", to.forget.data, to.forget.size);
    core::require_memory(name, "gradient of what is kept", to.retain.data, to.retain.size);
    core::require_memory(name, "gradient of the kl", to.kl.data, to.kl.size);
    if (options_.forget_weight != 0)
      checks.optional("gradient of what is forgotten", to.forget, forget.policy.size);
    if (options_.retain_weight != 0) {
      checks.optional("gradient of what is kept", to.retain, keep.sequences.policy.size);
      sequence_nll<T>()(keep.sequences);
    }
    retaining_terms found;
    found.forget = part(options_.forget_weight, forget_, forget, to.forget);
    found.retain = part(options_.retain_weight, sequence_nll<T>(), keep.sequences, to.retain);
    found.kl = options_.kl_weight == 0 ? 0 : mean_kl(keep, to.kl);
    if (options_.kl_weight == 0)
      clear(to.kl);
    if (terms)
      *terms = found;
    return static_cast<T>(links::times(options_.forget_weight, found.forget) +
                          links::times(options_.retain_weight, found.retain) +
                          links::times(options_.kl_weight, found.kl));
  }

private:
  static void clear(const vector_view<T>& to) {
    for (index i = 0; i < to.size; ++i)
      to[i] = 0;
  }
  template <class Loss>
  static double part(double weight, const Loss& loss, const sequence_scores<T>& in,
                     const vector_view<T>& gradient) {
    if (weight == 0) {
      clear(gradient);
      return 0;
    }
    return static_cast<double>(loss(in, gradient, {.scale = static_cast<T>(weight)}));
  }
  void check_kl(const retained<T>& keep, const vector_view<T>& gradient) const {
    const core::score_checks<T> checks{name};
    if (options_.kl_weight != 0 && keep.kl.size == 0 && keep.sequences.policy.size > 0)
      core::fail(name, "kl", "missing", "a number for each position of the retain set");
    checks.size("kl", keep.kl, keep.kl.size);
    checks.optional("kl_weights", keep.kl_weights, keep.kl.size);
    if (options_.kl_weight != 0)
      checks.optional("gradient of the kl", gradient, keep.kl.size);
  }
  double mean_kl(const retained<T>& keep, const vector_view<T>& gradient) const {
    core::exact_sum sum, weights;
    const auto weight = [&](index i) {
      return keep.kl_weights.data ? static_cast<double>(keep.kl_weights[i]) : 1.0;
    };
    for (index i = 0; i < keep.kl.size; ++i) {
      sum.add(links::times(weight(i), static_cast<double>(keep.kl[i])));
      weights.add(weight(i));
    }
    const double share = weights.value() != 0 ? 1 / weights.value() : 0;
    for (index i = 0; i < gradient.size; ++i)
      gradient[i] = static_cast<T>(options_.kl_weight * share * weight(i));
    return share == 0 ? 0 : sum.value() * share;
  }

  Forget forget_;
  options options_;
};

struct c_advul_options {
  double away_weight = 0.5, toward_weight = 0.5, utility_weight = 1; ///< 0 or more
  double away_cutoff = -5;    ///< of −NLL of what is to be left
  double toward_cutoff = 0.5; ///< of the NLL of what is to be said
  double leak = 0.001;        ///< slope beyond the cutoffs, in [0, 1]
};

/// Continuous adversarial unlearning, of log-probabilities under attack: away from harmful answers,
/// toward refusals, with utility on ordinary ones. With A, B, U the NLL per token of the three,
///
///   a f(−A; c_a) + b f(B; c_t) + u U,   f(t; c) = t where t ≥ c, else c + λ t
///
/// by each log-probability: the slope of f over the number of tokens, +, − and −. As published, f
/// jumps by λ c at its cutoff. A term of weight 0 needs no data, and one without sequences is
/// worth f(0).
/// Source: Xhonneux, Sordoni, Günnemann, Gidel, Schwinn, "Efficient adversarial training in LLMs
/// with continuous attacks", NeurIPS 2024.
template <class T = float> class c_advul {
public:
  using value_type = T;
  using options = c_advul_options;
  static constexpr const char* name = "c_advul";
  struct pieces {
    sequence_scores<T> away{}, toward{}, utility{}; ///< policy and lengths
  };
  struct gradients {
    vector_view<T> away{}, toward{}, utility{};
  };

  c_advul() : c_advul(options{}) {}
  explicit(false) c_advul(const options& o) : options_(o) {
    core::not_negative(name, "away_weight", o.away_weight);
    core::not_negative(name, "toward_weight", o.toward_weight);
    core::not_negative(name, "utility_weight", o.utility_weight);
    core::finite(name, "away_cutoff", o.away_cutoff);
    core::finite(name, "toward_cutoff", o.toward_cutoff);
    core::require(o.leak >= 0 && o.leak <= 1, name, "leak", o.leak, "a number in [0, 1]");
  }
  const options& settings() const { return options_; }

  T operator()(const pieces& in, const gradients& to = {}) const {
    const core::score_checks<T> checks{name};
    checks.apart({core::bytes_of(to.away), core::bytes_of(to.toward), core::bytes_of(to.utility)},
                 {core::bytes_of(in.away.policy), core::bytes_of(in.away.reference),
                  core::bytes_of(in.away.weights), core::bytes_of(in.toward.policy),
                  core::bytes_of(in.toward.reference), core::bytes_of(in.toward.weights),
                  core::bytes_of(in.utility.policy), core::bytes_of(in.utility.reference),
                  core::bytes_of(in.utility.weights)});
    const auto check = [&](const char* what, double weight, const auto& gradient, const auto& of) {
      core::require_memory(name, what, gradient.data, gradient.size);
      if (weight != 0)
        checks.optional(what, gradient, of.policy.size);
    };
    check("gradient of away", options_.away_weight, to.away, in.away);
    check("gradient of toward", options_.toward_weight, to.toward, in.toward);
    check("gradient of utility", options_.utility_weight, to.utility, in.utility);
    const double none = -std::numeric_limits<double>::infinity();
    const part away = measure(in.away, options_.away_weight, options_.away_cutoff, -1),
               toward = measure(in.toward, options_.toward_weight, options_.toward_cutoff, 1),
               utility = measure(in.utility, options_.utility_weight, none, 1);
    write(away, in.away, to.away);
    write(toward, in.toward, to.toward);
    write(utility, in.utility, to.utility);
    return static_cast<T>(away.value + toward.value + utility.value);
  }

private:
  struct part {
    double value = 0, slope = 0; ///< the latter by the NLL
  };
  part measure(const sequence_scores<T>& in, double weight, double cutoff, double sign) const {
    if (weight == 0)
      return {};
    const double t = sign * static_cast<double>(sequence_nll<T>()(in));
    const double steep = t < cutoff ? options_.leak : 1;
    return {weight * (t < cutoff ? cutoff + links::times(options_.leak, t) : t),
            weight * sign * steep};
  }
  static void write(const part& p, const sequence_scores<T>& in, const vector_view<T>& to) {
    if (to.data && p.slope != 0)
      sequence_nll<T>()(in, to, {.scale = static_cast<T>(p.slope)});
    else
      for (index i = 0; i < to.size; ++i)
        to[i] = 0;
  }
  options options_;
};

/// Sequences of tokens one after another: sequence i has the tokens [starts[i], starts[i + 1]).
template <class T> struct token_scores {
  vector_view<const T> tokens;            ///< log-probabilities of the policy
  vector_view<const std::int64_t> starts; ///< 0, …, and the number of tokens; or none of all
  vector_view<const T> reference_means;   ///< of the reference, one average per sequence; finite
};

struct c_advipo_options {
  double beta = 0.25;         ///< β > 0
  double away_cutoff = -5;    ///< tokens of the rejected at or below it are forgotten already
  double toward_cutoff = 0.5; ///< tokens of the chosen at or above −this are learnt already
  perdita::reduction reduction = perdita::reduction::mean;
};

/// Continuous adversarial IPO: token means of a chosen (toward) and a rejected (away) answer, where
/// tokens that need no more training are left out of the sum, but not of its length:
///
///   ℓ = ((a_w − a_l) − (r_w − r_l) − 1/(2β))²,   a = Σ_kept l_t/n
///   ∂ℓ/∂l_t = ±(2/n) (…) of a token that is kept, else 0
///
/// kept: l_t > away_cutoff of the rejected, l_t < −toward_cutoff of the chosen. The references'
/// means are without cutoffs. The value jumps where a token crosses one. A pair of which one answer
/// is empty has no part in anything. NaN makes its pair NaN. Source: as c_advul.
template <class T = float> class c_advipo {
public:
  using value_type = T;
  using options = c_advipo_options;
  static constexpr const char* name = "c_advipo";

  c_advipo() : c_advipo(options{}) {}
  explicit(false) c_advipo(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::require(o.away_cutoff == o.away_cutoff, name, "away_cutoff", o.away_cutoff, "a number");
    core::require(o.toward_cutoff == o.toward_cutoff, name, "toward_cutoff", o.toward_cutoff,
                  "a number");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const token_scores<T>& chosen, const token_scores<T>& rejected,
               vector_view<T> d_chosen = {}, vector_view<T> d_rejected = {},
               const call_options<T>& call = {}) const {
    const index pairs = std::max(index{0}, chosen.starts.size - 1);
    const core::score_checks<T> checks{name};
    checks.call(call, pairs, {});
    check("chosen", chosen, d_chosen, pairs);
    check("rejected", rejected, d_rejected, pairs);
    checks.apart(
        {core::bytes_of(d_chosen), core::bytes_of(d_rejected), core::bytes_of(call.values)},
        {core::bytes_of(chosen.tokens), core::bytes_of(rejected.tokens),
         core::bytes_of(chosen.reference_means), core::bytes_of(rejected.reference_means),
         core::bytes_of(call.row_weights), core::bytes_of(call.upstream)});

    const auto weight = [&](index i) {
      return size(chosen, i) == 0 || size(rejected, i) == 0 ? 0 : core::weight_of(call, i);
    };
    const auto counts = [&](index i) { return weight(i) != 0; };
    checks.reference("reference_means of the chosen", chosen.reference_means, pairs, counts);
    checks.reference("reference_means of the rejected", rejected.reference_means, pairs, counts);
    double share = 1;
    if (options_.reduction == reduction::mean) {
      core::exact_sum all;
      for (index i = 0; i < pairs; ++i)
        all.add(weight(i));
      const double denominator = call.normaliser != 0 ? call.normaliser : all.value();
      share = denominator != 0 ? 1 / denominator : 0;
    }
    const double high = -options_.toward_cutoff, low = options_.away_cutoff;
    const auto learning = [high](double l) { return !(l >= high); };
    const auto leaving = [low](double l) { return !(l <= low); };
    core::exact_sum total;
    for (index i = 0; i < pairs; ++i) {
      const double w = weight(i);
      links::outcome at{0, 0};
      if (w != 0)
        at = links::square(1 / (2 * options_.beta))(
            (mean(chosen, i, learning) - mean(rejected, i, leaving)) -
            (static_cast<double>(chosen.reference_means[i]) -
             static_cast<double>(rejected.reference_means[i])));
      const double value = links::times(w, at.value);
      const double slope = links::times(
          w * static_cast<double>(call.scale) * share * core::upstream_of(call, i), at.slope);
      write(chosen, i, slope, d_chosen, call.accumulate, learning);
      write(rejected, i, -slope, d_rejected, call.accumulate, leaving);
      if (call.values.data)
        call.values[i] = static_cast<T>(value);
      total.add(value);
    }
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

private:
  static index size(const token_scores<T>& in, index i) {
    return static_cast<index>(in.starts[i + 1] - in.starts[i]);
  }
  template <class Keep> static double mean(const token_scores<T>& in, index i, Keep keep) {
    core::exact_sum sum;
    for (auto t = static_cast<index>(in.starts[i]); t < in.starts[i + 1]; ++t)
      if (const auto l = static_cast<double>(in.tokens[t]); keep(l))
        sum.add(l);
    return sum.value() / static_cast<double>(size(in, i));
  }
  template <class Keep>
  static void write(const token_scores<T>& in, index i, double slope, const vector_view<T>& to,
                    bool accumulate, Keep keep) {
    if (!to.data)
      return;
    for (auto t = static_cast<index>(in.starts[i]); t < in.starts[i + 1]; ++t)
      core::put_slope(
          to[t],
          keep(static_cast<double>(in.tokens[t])) ? slope / static_cast<double>(size(in, i)) : 0.0,
          accumulate);
  }
  void check(const char* side, const token_scores<T>& in, const vector_view<T>& gradient,
             index pairs) const {
    const std::string of = std::string(" of the ") + side;
    const core::score_checks<T> checks{name};
    if (pairs > 0 || in.starts.size > 0 || in.tokens.size > 0)
      checks.size(("starts" + of).c_str(), in.starts, pairs + 1);
    checks.size(("tokens" + of).c_str(), in.tokens, in.tokens.size);
    checks.optional(("gradient" + of).c_str(), gradient, in.tokens.size);
    for (index i = 0; i < in.starts.size; ++i) {
      const std::int64_t low = i == 0 ? 0 : in.starts[i - 1],
                         high = i == 0 ? 0 : static_cast<std::int64_t>(in.tokens.size);
      if (in.starts[i] < low || in.starts[i] > high ||
          (i == pairs && in.starts[i] != in.tokens.size))
        core::fail_at(name, ("starts" + of).c_str(), i, core::to_text(in.starts[i]),
                      "numbers from 0 to the number of tokens, ascending");
    }
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
