// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

using eisl_noise = std::function<double(index sequence, index n, index position, index ngram)>;

template <class T> struct eisl_job {
  matrix_data<T> scores;
  matrix_data<T, true> gradient;
  integer_rows targets, input_lengths, target_lengths;
  index sequences = 0, steps = 0, most_labels = 0;
  const std::vector<index>* sizes = nullptr;
  const std::vector<T>* weights = nullptr;
  const eisl_noise* noise = nullptr;
  double temperature = 1, floor = -20;
  bool log_probabilities = false, has_gradient = false;
  const call_options<T>* call = nullptr;
  double share = 1;

  index length(index b) const { return static_cast<index>(input_lengths.at(0, b)); }
  index labels(index b) const { return static_cast<index>(target_lengths.at(0, b)); }
  double weight_of_size(std::size_t i) const {
    return weights->empty() ? 1 / static_cast<double>(sizes->size())
                            : static_cast<double>((*weights)[i]);
  }
};

/// One worker's sequences. Log-probabilities of the target's labels lie in rows, one for each label
/// and a column for each step, so that an n-gram's at all positions are sums of n rows, each read
/// from one column further on.
template <class T> class eisl_pass {
  using W = pack<double>;

public:
  eisl_pass(carver& c, const eisl_job<T>& job)
      : job_(job), classes_(whole_packs(job.scores.cols)),
        width_(whole_packs(job.steps) + whole_packs(std::min(job.steps, job.most_labels))) {
    const auto classes = static_cast<std::size_t>(classes_),
               width = static_cast<std::size_t>(width_),
               labels = static_cast<std::size_t>(job.most_labels);
    log_p_ = c.take<double>(labels * width);
    slope_ = c.take<double>(job.has_gradient ? labels * width : 0);
    for (double** row : {&score_, &image_, &of_class_})
      *row = c.take<double>(classes);
    for (double** row : {&mean_, &share_})
      *row = c.take<double>(width);
    target_ = c.take<std::int64_t>(labels);
    buffer_ = c.take<T>(classes);
  }

  /// The value of sequence b times its weight; its gradient.
  double run(index b) {
    const double weight = weight_of(*job_.call, b);
    const bool counts = weight != 0;
    steps_ = counts ? job_.length(b) : 0;
    labels_ = counts ? job_.labels(b) : 0;
    double value = 0;
    const bool defined = read(b);
    if (!defined)
      value = std::numeric_limits<double>::quiet_NaN();
    for (std::size_t i = 0; defined && i < job_.sizes->size(); ++i)
      value += job_.weight_of_size(i) * add_size(b, (*job_.sizes)[i], job_.weight_of_size(i));
    if (job_.call->values.data)
      job_.call->values[b] = static_cast<T>(value * weight);
    if (job_.has_gradient)
      write(b, defined,
            static_cast<double>(job_.call->scale) * job_.share * weight *
                upstream_of(*job_.call, b));
    return value * weight;
  }

private:
  /// False where a score is no number.
  bool read(index b) {
    job_.targets.read(b, 0, labels_, target_);
    std::fill_n(log_p_, labels_ * width_, 0.0);
    if (job_.has_gradient)
      std::fill_n(slope_, labels_ * width_, 0.0);
    for (index t = 0; t < steps_; ++t) {
      if (!read_step(b, t))
        return false;
      for (index l = 0; l < labels_; ++l)
        log_p_[l * width_ + t] = std::max(score_[target_[l]] - log_sum_, job_.floor);
    }
    return true;
  }
  /// Scores of a step, less log Σ e^score once log_sum_ is taken off.
  bool read_step(index b, index t) {
    read_row(job_.scores, b * job_.steps + t, buffer_, score_);
    if (!settle_scores(score_, classes_))
      return false;
    log_sum_ = 0;
    if (job_.log_probabilities)
      return true;
    lower_to_0(score_, classes_);
    images_of(score_, classes_, image_);
    leader_ = std::find(score_, score_ + classes_, 0.0) - score_;
    if (leader_ == classes_) // all are masked
      leader_ = 0;
    const double own = std::exchange(image_[leader_], 0.0);
    W rivals(0);
    for (index j = 0; j < classes_; j += per_pack)
      rivals += W::load(image_ + j);
    rivals_ = sum_lanes(rivals);
    image_[leader_] = own;
    log_sum_ = log1p_of(rivals_);
    return true;
  }

  /// The value of n-grams of one size, 0 where they are longer than either side.
  double add_size(index b, index n, double weight) {
    if (n <= 0)
      n += labels_;
    if (n < 1 || n > labels_ || n > steps_)
      return 0;
    const index ngrams = labels_ - n + 1;
    double value = 0;
    for (index i = 0; i < ngrams; ++i)
      value += add_ngram(b, n, i, weight / static_cast<double>(ngrams));
    return value / static_cast<double>(ngrams);
  }
  /// −Σ q t over the positions, and its slopes.
  double add_ngram(index b, index n, index i, double weight) {
    const index positions = steps_ - n + 1, width = whole_packs(positions);
    const W part(1 / static_cast<double>(n));
    for (index s = 0; s < width; s += per_pack) {
      W sum(0);
      for (index j = 0; j < n; ++j)
        sum += W::load(log_p_ + (i + j) * width_ + s + j);
      (sum * part).store(mean_ + s);
    }
    for (index s = 0; s < positions; ++s)
      share_[s] = (mean_[s] + (*job_.noise ? (*job_.noise)(b, n, s, i) : 0)) / job_.temperature;
    std::fill(share_ + positions, share_ + width, no_score);
    lower_to_0(share_, width);
    const double sum = images_of(share_, width, share_);
    W total(0);
    for (index s = 0; s < width; s += per_pack) {
      const W q = W::load(share_ + s) / W(sum);
      q.store(share_ + s);
      total = fma(q, W::load(mean_ + s), total);
    }
    const double mean = sum_lanes(total);
    if (!job_.has_gradient)
      return -mean;
    const W factor(-weight / static_cast<double>(n)), warmth(1 / job_.temperature);
    for (index s = 0; s < width; s += per_pack) {
      const W more = factor * W::load(share_ + s) * fma(W::load(mean_ + s) - mean, warmth, W(1));
      more.store(share_ + s);
    }
    for (index j = 0; j < n; ++j) {
      double* const to = slope_ + (i + j) * width_ + j;
      for (index s = 0; s < width; s += per_pack)
        (W::load(to + s) + W::load(share_ + s)).store(to + s);
    }
    return -mean;
  }

  void write(index b, bool defined, double scale) {
    for (index t = 0; t < job_.steps; ++t) {
      if (t >= steps_ && job_.call->accumulate)
        return;
      std::fill_n(of_class_, classes_,
                  t < steps_ && !defined ? std::numeric_limits<double>::quiet_NaN() : 0.0);
      if (t < steps_ && defined)
        slope_of_step(b, t, scale); // before the gradient, which may lie on the scores
      write_row(job_.gradient, b * job_.steps + t, of_class_, job_.call->accumulate, buffer_);
    }
  }
  /// of_class = scale (d_k − p_k Σ d), d being the slope of log p.
  void slope_of_step(index b, index t, double scale) {
    read_step(b, t);
    for (index l = 0; l < labels_; ++l)
      if (score_[target_[l]] - log_sum_ > job_.floor)
        of_class_[target_[l]] += slope_[l * width_ + t] * scale;
    if (job_.log_probabilities)
      return;
    const double of_leader = std::exchange(of_class_[leader_], 0.0);
    W sum(0);
    for (index k = 0; k < classes_; k += per_pack)
      sum += W::load(of_class_ + k);
    const double others = sum_lanes(sum), part = 1 / (1 + rivals_);
    for (index k = 0; k < classes_; k += per_pack)
      (W::load(of_class_ + k) - W::load(image_ + k) * (part * (others + of_leader)))
          .store(of_class_ + k);
    // d (1 − p) − p (the others' d)
    of_class_[leader_] = part * (of_leader * rivals_ - others);
  }

  const eisl_job<T>& job_;
  index classes_, width_, steps_ = 0, labels_ = 0, leader_ = 0;
  double *log_p_, *slope_, *score_, *image_, *of_class_, *mean_, *share_;
  std::int64_t* target_;
  T* buffer_;
  double rivals_ = 0, log_sum_ = 0;
};

} // namespace core

/// Edit-invariant sequence loss: every n-gram of the target should be said somewhere, at whichever
/// position suits it best, so that shifted, dropped or repeated words cost little.
///
///   t_{s,i} = (1/n) Σ_{j<n} log p_{s+j}(y_{i+j}),  p = softmax(x)     n-gram i of y at position s
///   q_{·,i} = softmax_s((t_{s,i} + noise) / temperature)
///   ℓ_n = −(1/M) Σ_i Σ_s q_{s,i} t_{s,i},  M = labels − n + 1;   ℓ = Σ_n w_n ℓ_n
///   ∂ℓ_n/∂t_{s,i} = −(q_{s,i} / M) (1 + (t_{s,i} − Σ_r q_{r,i} t_{r,i}) / temperature)
///   ∂ℓ/∂x_sk = d_sk − p_sk Σ_j d_sj,  d = ∂ℓ/∂log p
///
/// options::sizes: the n, each 1 or more, or counted from the target's length (0: all of it, −1:
/// one less). An n that is longer than the sequence or the target, or below 1, adds 0. Weights:
/// one for each size, or none for equal ones that add up to 1. options::noise(sequence, n,
/// position, ngram), called from any thread: Gumbel noise −log(−log u), which makes q a sample of
/// positions; without it, the expected ones. options::floor: log-probabilities count for no less,
/// and have no gradient there. options::log_probabilities: x are log p, and the gradient is d.
/// With one n = labels = steps the value is the cross-entropy's mean over the steps; the paper adds
/// a share of cross-entropy (call_options::accumulate and ::scale do).
///
/// Shapes: scores (sequences · steps) × classes, step t of sequence b being row b·steps + t, of T
/// or (for float) of 16 bits; steps first: as in linear_chain_crf. Targets: a matrix of any
/// integral type, sequences × the longest, padded with anything. Lengths: one for each sequence;
/// what is beyond them is not read (the authors' code compares with padding, too), gradient 0. No
/// steps or no labels: 0.
///
/// Reduction over sequences, weights, by-products (values): as in call_options, a sequence being a
/// row. The gradient may lie on the scores.
///
/// Special values: -inf (or below −2^1000) is a masked class, its log p the floor. NaN, +inf or a
/// score above 2^1000: NaN in the sequence's value and gradient, and in no other's.
///
/// Computed in double; the value's terms do not cancel. Same bits for any number of threads. Cost:
/// steps × labels × n for each n. Memory: 2 steps × labels doubles for each thread that works.
/// Throws std::invalid_argument.
/// Source: Liu, Yang, Tao, Liang, Bao, Wu, He, Cui, Hu, "Don't take it literally: an edit-invariant
/// sequence loss for text generation", NAACL 2022.
///
///   perdita::eisl<float> eisl({.sizes = {1, 2, 3, 4}});
///   float value = eisl(scores, targets, input_lengths, target_lengths, d_scores);
template <class T = float> class eisl {
public:
  using value_type = T;
  struct options {
    std::vector<index> sizes = {2}; ///< n, one at least; 0 and less: from the target's length
    std::vector<T> weights = {};    ///< none: equal, of sum 1
    T temperature = 1;              ///< of q, > 0, with a finite inverse
    T floor = -20;                  ///< below 0: log-probabilities count for no less
    bool log_probabilities = false; ///< the scores are log p
    core::eisl_noise noise = {};    ///< added to t in q; none: the expected positions
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "eisl";

  eisl() : eisl(options{}) {}
  explicit(false) eisl(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require(!o.sizes.empty(), name, "size of sizes", o.sizes.size(), "one n at least");
    core::require(o.weights.empty() || o.weights.size() == o.sizes.size(), name, "size of weights",
                  o.weights.size(), "0, or as many as there are sizes");
    for (std::size_t i = 0; i < o.weights.size(); ++i)
      if (!std::isfinite(o.weights[i]))
        core::fail_at(name, "weights", static_cast<std::int64_t>(i), core::to_text(o.weights[i]),
                      "a finite number");
    core::invertible<double>(name, "temperature", o.temperature);
    core::require(o.floor < 0 && std::isfinite(o.floor), name, "floor", o.floor,
                  "a finite number below 0");
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X, core::label_rows Y, core::labels_like N, core::labels_like M>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& targets, N&& input_lengths,
                                                M&& target_lengths,
                                                const call_options<T>& call = {}) const {
    core::eisl_job<T> job;
    set_inputs(job, core::as_matrix(scores), core::as_matrix(targets),
               core::as_vector(input_lengths), core::as_vector(target_lengths), call);
    return run(job);
  }

  /// The reduced value, and its gradient, written or added to the last.
  template <class X, core::label_rows Y, core::labels_like N, core::labels_like M, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& targets, N&& input_lengths, M&& target_lengths, G&& gradient,
                   const call_options<T>& call = {}) const {
    core::eisl_job<T> job;
    set_inputs(job, core::as_matrix(scores), core::as_matrix(targets),
               core::as_vector(input_lengths), core::as_vector(target_lengths), call);
    job.gradient = core::matrix_data<T, true>(core::as_matrix(gradient));
    job.has_gradient = true;
    checks.gradient(job.scores, job.gradient, call.accumulate);
    return run(job);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class S, class I, class N, class M>
  void set_inputs(core::eisl_job<T>& job, matrix_view<S> scores, matrix_view<I> targets,
                  vector_view<N> inputs, vector_view<M> lengths,
                  const call_options<T>& call) const {
    job.scores = core::matrix_data<T>(scores);
    job.targets = core::integer_rows(targets);
    job.sequences = targets.rows;
    job.steps = job.sequences > 0 ? scores.rows / job.sequences : 0;
    job.most_labels = targets.cols;
    job.sizes = &options_.sizes;
    job.weights = &options_.weights;
    job.noise = &options_.noise;
    job.temperature = static_cast<double>(options_.temperature);
    job.floor = static_cast<double>(options_.floor);
    job.log_probabilities = options_.log_probabilities;
    job.call = &call;
    checks.size("score rows", scores.rows, job.sequences * job.steps,
                "as many for every sequence, of which there is one for each row of targets");
    checks.memory("scores", scores.data, scores.rows * scores.cols);
    checks.memory("targets", targets.data, targets.rows * targets.cols);
    core::require(targets.plane_rows == targets.rows, name, "plane_rows of the targets",
                  targets.plane_rows, "all rows in one plane");
    checks.lengths("input_lengths", job.input_lengths, inputs, job.sequences, job.steps);
    checks.lengths("target_lengths", job.target_lengths, lengths, job.sequences, job.most_labels);
    checks.call(call, job.sequences, false);
    for (index b = 0; b < job.sequences; ++b)
      for (index l = 0; l < job.labels(b); ++l)
        if (const std::int64_t y = job.targets.at(b, l); y < 0 || y >= scores.cols)
          core::fail_at(name, "targets", b * job.most_labels + l, core::to_text(y),
                        "0 to " + core::to_text(scores.cols - 1));
  }

  T run(core::eisl_job<T>& job) const {
    job.share = core::share_of(*job.call, options_.reduction, job.sequences);
    const double total = core::sum_of_sequences<T>(
        job.sequences, *job.call, [&](core::carver& c) { return core::eisl_pass<T>(c, job); });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
