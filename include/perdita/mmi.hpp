// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// What a second model says of a batch of sequences: its scores and their labels.
template <class X, class Y> struct scored_labels {
  X& scores;
  Y& labels;
  template <class A, class B> scored_labels(A&& x, B&& y) : scores(x), labels(y) {}
};
template <class A, class B>
scored_labels(A&&, B&&) -> scored_labels<std::remove_reference_t<A>, std::remove_reference_t<B>>;

namespace core {

/// Cross-entropies of the tokens of sequences, by one model.
template <class T> struct mmi_part {
  matrix_data<T> scores;
  matrix_data<T, true> gradient;
  integer_rows labels;
  index steps = 0;
  double weight = 1;
  index first = std::numeric_limits<index>::max(); ///< how many tokens of a sequence count
  bool has_gradient = false;
};
template <class T> struct mmi_job {
  mmi_part<T> parts[2];
  index sequences = 0;
  std::int64_t ignore_index = -100;
  double length_reward = 0;
  const call_options<T>* call = nullptr;
  double share = 1;
};

/// One worker's sequences.
template <class T> class mmi_pass {
public:
  mmi_pass(carver& c, const mmi_job<T>& job)
      : job_(job),
        width_(whole_packs(std::max(job.parts[0].scores.cols, job.parts[1].scores.cols))) {
    for (double** row : {&score_, &slope_})
      *row = c.take<double>(static_cast<std::size_t>(width_));
    buffer_ = c.take<T>(static_cast<std::size_t>(width_));
  }

  /// The value of sequence b times its weight; its gradients.
  double run(index b) {
    weight_ = weight_of(*job_.call, b);
    factor_ =
        static_cast<double>(job_.call->scale) * job_.share * weight_ * upstream_of(*job_.call, b);
    const double reward = job_.length_reward * static_cast<double>(tokens(b));
    exact_sum total;
    for (const mmi_part<T>& part : job_.parts)
      add(part, b, total);
    total.add(-reward);
    const double value = weight_ != 0 ? total.value() * weight_ : 0;
    if (job_.call->values.data)
      job_.call->values[b] = static_cast<T>(value);
    return value;
  }

private:
  /// Of the first part.
  index tokens(index b) const {
    index n = 0;
    for (index t = 0; t < job_.parts[0].steps; ++t)
      n += job_.parts[0].labels.at(b, t) != job_.ignore_index;
    return n;
  }
  void add(const mmi_part<T>& part, index b, exact_sum& total) {
    index said = 0;
    for (index t = 0; t < part.steps; ++t) {
      const index row = b * part.steps + t;
      const std::int64_t label = part.labels.at(b, t);
      const bool counts =
          label != job_.ignore_index && said++ < part.first && part.weight != 0 && weight_ != 0;
      const index width = whole_packs(part.scores.cols);
      if (counts)
        total.add(part.weight * compare(part, row, static_cast<index>(label), width));
      else
        std::fill_n(slope_, width, 0.0);
      if (part.has_gradient && (counts || !job_.call->accumulate))
        write_row(part.gradient, row, slope_, job_.call->accumulate, buffer_);
    }
  }
  double compare(const mmi_part<T>& part, index row, index label, index width) {
    read_row(part.scores, row, buffer_, score_);
    if (!settle_scores(score_, width)) {
      std::fill_n(slope_, width, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    const double value = cross_entropy_among(score_, width, label, slope_);
    for (index j = 0; j < width; j += per_pack)
      (pack<double>::load(slope_ + j) * (factor_ * part.weight)).store(slope_ + j);
    return value;
  }

  const mmi_job<T>& job_;
  index width_;
  double *score_, *slope_;
  T* buffer_;
  double weight_ = 1, factor_ = 1;
};

/// What the calls of both objectives have in common.
template <class T> struct mmi_calls {
  const char* name;
  std::int64_t ignore_index;
  perdita::reduction reduction;

  template <class X, class Y> void set(mmi_part<T>& part, X&& scores, Y&& labels) const {
    const auto x = as_matrix(scores);
    const auto y = as_matrix(labels);
    const sequence_checks<T> checks{name};
    part.scores = matrix_data<T>(x);
    part.labels = integer_rows(y);
    part.steps = y.cols;
    checks.size("score rows", x.rows, y.rows * y.cols, "sequences × steps");
    checks.memory("scores", x.data, x.rows * x.cols);
    checks.memory("labels", y.data, y.rows * y.cols);
    require(y.plane_rows == y.rows, name, "plane_rows of the labels", y.plane_rows,
            "all rows in one plane");
    for (index b = 0; b < y.rows; ++b)
      for (index t = 0; t < y.cols; ++t)
        if (const std::int64_t label = part.labels.at(b, t);
            label != ignore_index && (label < 0 || label >= x.cols))
          fail_at(name, "labels", b * y.cols + t, to_text(label),
                  "0 to " + to_text(x.cols - 1) + ", or ignore_index " + to_text(ignore_index));
  }
  template <class G> void set_gradient(mmi_part<T>& part, G&& gradient, bool accumulate) const {
    part.gradient = matrix_data<T, true>(as_matrix(gradient));
    part.has_gradient = true;
    sequence_checks<T>{name}.gradient(part.scores, part.gradient, accumulate);
  }
  /// A gradient may lie on its own scores only.
  void check_apart(const mmi_job<T>& job) const {
    const auto &one = job.parts[0], &two = job.parts[1];
    const extent first[] = {bytes_of(one.gradient), bytes_of(two.gradient), bytes_of(two.scores)},
                 second[] = {bytes_of(two.gradient), bytes_of(one.scores)};
    require_apart(name, first, 1);
    require_apart(name, second, 1);
  }
  T run(mmi_job<T>& job, index sequences, const call_options<T>& call) const {
    const sequence_checks<T> checks{name};
    job.sequences = sequences;
    job.ignore_index = ignore_index;
    job.call = &call;
    checks.call(call, sequences, false);
    check_apart(job);
    job.share = share_of(call, reduction, sequences);
    const double total =
        sum_of_sequences<T>(sequences, call, [&](carver& c) { return mmi_pass<T>(c, job); });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }
};

} // namespace core

/// Maximum mutual information with an anti-language model: what any context makes likely is worth
/// less.
///
///   ℓ = −log p(y | source) + λ Σ_{k ≤ γ} log u(y_k) − r N,   N the number of tokens
///   p = softmax(x), u = softmax(z) of a language model, for the first γ tokens of the sequence
///   ∂ℓ/∂x_tj = p_tj − [j = y_t],   ∂ℓ/∂z_tj = −λ (u_tj − [j = y_t]) for these, 0 for the others
///
/// λ: options::penalty; γ: penalised; r: length_reward. λ = 0 is the negative log-likelihood. The
/// language model is penalised for what it says best: the value is not bounded from below, so that
/// training both with it needs λ < 1 and another loss for z.
///
/// Shapes: scores and those of the language model (sequences · steps) × classes each (of one
/// vocabulary), step t of sequence b being row b·steps + t, of T or (for float) of 16 bits; steps
/// first: as in linear_chain_crf. Labels: sequences × steps, of any integral type; ignore_index is
/// no token, its rows are not read and have the gradient 0. Reduction over sequences, weights,
/// values: as in call_options, a sequence being a row. Gradients may lie on their own scores.
///
/// Special values: -inf (or below −2^1000) is a masked class: as a label +inf for x and −inf for z,
/// NaN for both. NaN, +inf or a score above 2^1000: NaN in the value of the sequence and the
/// gradient of the token, by that model.
///
/// Computed in double. Same bits for any number of threads. Throws std::invalid_argument.
/// Source: Li, Galley, Brockett, Gao, Dolan, "A diversity-promoting objective function for neural
/// conversation models", NAACL 2016.
///
///   perdita::mmi_anti_lm<float> mmi({.penalty = 0.5f, .penalised = 5});
///   float value = mmi(scores, lm_scores, labels, d_scores);   // a fixed language model
///   value = mmi(scores, lm_scores, labels, d_scores, d_lm_scores);
template <class T = float> class mmi_anti_lm {
public:
  using value_type = T;
  struct options {
    T penalty = T(0.5);                                  ///< λ ≥ 0
    index penalised = std::numeric_limits<index>::max(); ///< tokens from the first on
    T length_reward = 0;                                 ///< r, of each token; finite
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "mmi_anti_lm";

  mmi_anti_lm() : mmi_anti_lm(options{}) {}
  explicit(false) mmi_anti_lm(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require(o.penalty >= 0 && std::isfinite(o.penalty), name, "penalty", o.penalty,
                  "a finite number of 0 or more");
    core::require(o.penalised >= 0, name, "penalised", o.penalised, "0 or more");
    core::finite(name, "length_reward", o.length_reward);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X, class Z, core::label_rows Y>
  requires core::scores_like<X, T> && core::scores_like<Z, T>
      T operator()(X&& scores, Z&& lm_scores, Y&& labels, const call_options<T>& call = {}) const {
    core::mmi_job<T> job = set(scores, lm_scores, labels);
    return calls().run(job, core::as_matrix(labels).rows, call);
  }
  /// The reduced value, and its gradient with respect to the scores, written or added to the last.
  template <class X, class Z, core::label_rows Y, class G>
  requires core::scores_like<X, T> && core::scores_like<Z, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Z&& lm_scores, Y&& labels, G&& gradient,
                   const call_options<T>& call = {}) const {
    core::mmi_job<T> job = set(scores, lm_scores, labels);
    calls().set_gradient(job.parts[0], gradient, call.accumulate);
    return calls().run(job, core::as_matrix(labels).rows, call);
  }
  /// And with respect to the language model's.
  template <class X, class Z, core::label_rows Y, class G, class H>
  requires core::scores_like<X, T> && core::scores_like<Z, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(X&& scores, Z&& lm_scores, Y&& labels, G&& gradient, H&& lm_gradient,
                       const call_options<T>& call = {}) const {
    core::mmi_job<T> job = set(scores, lm_scores, labels);
    calls().set_gradient(job.parts[0], gradient, call.accumulate);
    calls().set_gradient(job.parts[1], lm_gradient, call.accumulate);
    return calls().run(job, core::as_matrix(labels).rows, call);
  }

private:
  core::mmi_calls<T> calls() const { return {name, options_.ignore_index, options_.reduction}; }
  template <class X, class Z, class Y>
  core::mmi_job<T> set(X&& scores, Z&& lm_scores, Y&& labels) const {
    core::mmi_job<T> job;
    calls().set(job.parts[0], scores, labels);
    calls().set(job.parts[1], lm_scores, labels);
    job.parts[1].weight = -static_cast<double>(options_.penalty);
    job.parts[1].first = options_.penalised;
    job.length_reward = static_cast<double>(options_.length_reward);
    return job;
  }

  options options_;
};

/// Maximum mutual information, both ways: how well the target follows from its source, and the
/// source from the target.
///
///   ℓ = −(1 − λ) log p(target | source) − λ log q(source | target) − r N,   N tokens of the target
///   gradients: (1 − λ) (p − [y]) for the forward model's scores, λ (q − [y]) for the backward
///   one's
///
/// λ: options::backward, in [0, 1]; r: length_reward. call_options::values of candidates are their
/// costs for reranking: the best is the least. Each model has its own labels, number of steps and
/// classes; the same sequences. All else as in mmi_anti_lm.
/// Source: as mmi_anti_lm.
///
///   perdita::mmi_bidirectional<float> mmi({.backward = 0.5f});
///   float value = mmi(scores, targets, perdita::scored_labels(backward_scores, sources),
///                     d_scores, d_backward_scores);
template <class T = float> class mmi_bidirectional {
public:
  using value_type = T;
  struct options {
    T backward = T(0.5); ///< share of the backward model
    T length_reward = 0; ///< r, of each token of the target; finite
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "mmi_bidirectional";

  mmi_bidirectional() : mmi_bidirectional(options{}) {}
  explicit(false) mmi_bidirectional(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require(o.backward >= 0 && o.backward <= 1, name, "backward", o.backward,
                  "a number in [0, 1]");
    core::finite(name, "length_reward", o.length_reward);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X, core::label_rows Y, class Z, class S>
  requires core::scores_like<X, T> && core::scores_like<Z, T>
      T operator()(X&& scores, Y&& labels, const scored_labels<Z, S>& backward,
                   const call_options<T>& call = {}) const {
    core::mmi_job<T> job = set(scores, labels, backward);
    return calls().run(job, core::as_matrix(labels).rows, call);
  }
  /// The reduced value, and both gradients, written or added to the last two.
  template <class X, core::label_rows Y, class Z, class S, class G, class H>
  requires core::scores_like<X, T> && core::scores_like<Z, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(X&& scores, Y&& labels, const scored_labels<Z, S>& backward, G&& gradient,
                       H&& backward_gradient, const call_options<T>& call = {}) const {
    core::mmi_job<T> job = set(scores, labels, backward);
    calls().set_gradient(job.parts[0], gradient, call.accumulate);
    calls().set_gradient(job.parts[1], backward_gradient, call.accumulate);
    return calls().run(job, core::as_matrix(labels).rows, call);
  }

private:
  core::mmi_calls<T> calls() const { return {name, options_.ignore_index, options_.reduction}; }
  template <class X, class Y, class Z, class S>
  core::mmi_job<T> set(X&& scores, Y&& labels, const scored_labels<Z, S>& backward) const {
    core::mmi_job<T> job;
    calls().set(job.parts[0], scores, labels);
    calls().set(job.parts[1], backward.scores, backward.labels);
    core::sequence_checks<T>{name}.size("rows of the backward labels",
                                        core::as_matrix(backward.labels).rows,
                                        core::as_matrix(labels).rows, "as many sequences");
    job.parts[1].weight = static_cast<double>(options_.backward);
    job.parts[0].weight = 1 - job.parts[1].weight;
    job.length_reward = static_cast<double>(options_.length_reward);
    return job;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
