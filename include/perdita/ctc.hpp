// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct ctc_job {
  matrix_data<T> scores;
  matrix_data<T, true> gradient;
  integer_rows targets, input_lengths, target_lengths;
  index sequences = 0, steps = 0;
  bool concatenated = false;
  const std::int64_t* starts = nullptr; ///< of concatenated targets
  std::int64_t blank = 0;
  bool log_probabilities = false, zero_infinity = false, per_label = false, has_gradient = false;
  const call_options<T>* call = nullptr;
  double share = 1;

  index length(index b) const { return static_cast<index>(input_lengths.at(0, b)); }
  index labels(index b) const { return static_cast<index>(target_lengths.at(0, b)); }
  void read_target(index b, std::int64_t* out) const {
    targets.read(concatenated ? 0 : b, concatenated ? static_cast<index>(starts[b]) : 0, labels(b),
                 out);
  }
  /// What the mean divides a sequence by.
  double divisor(index b) const {
    return per_label ? static_cast<double>(std::max<index>(labels(b), 1)) : 1;
  }
};

/// The three states that a state is reached from, as their scores less the largest: itself, the one
/// before, and, where `skip` is 0 and not -inf, the one before that.
struct ctc_arrival {
  using W = pack<double>;
  W stay, step, jump, top;
  PERDITA_INLINE ctc_arrival(const double* before, const double* skip)
      : stay(W::load(before)), step(W::load(before - 1)), jump(W::load(before - 2) + W::load(skip)),
        top(max(max(stay, step), jump)) {}
  PERDITA_INLINE W shift() const {
    return select(top == W(no_score), W(0), top);
  } // not -inf less -inf
  /// log (e^stay + e^step + e^jump), with the digits of what the largest does not have.
  PERDITA_INLINE W log_sum() const {
    const W high = max(stay, step), low = min(stay, step), middle = min(high, jump), s = shift();
    return top + log1p(exp_shifted(low - s) + exp_shifted(middle - s));
  }
};

/// Below this, a value is computed from the probability of all that is not the target.
inline constexpr double ctc_sure_value = 0x1p-4;

/// One worker's passes over sequences. State 2 i + 1 is label i of the target, the even ones are
/// blanks.
template <class T> class ctc_pass {
  using W = pack<double>;
  static constexpr index margin = per_pack;

public:
  ctc_pass(carver& c, const ctc_job<T>& job, index longest, index most_labels)
      : job_(job), classes_(whole_packs(job.scores.cols)) {
    const auto states = static_cast<std::size_t>(whole_packs(2 * most_labels + 1) + margin);
    forward_ = c.take<double>((job.has_gradient ? static_cast<std::size_t>(longest) : 2) * states);
    for (double** row : {&skip_, &emission_, &share_, &stay_, &step_, &jump_})
      *row = c.take<double>(states);
    for (double** row : {&score_, &image_, &occupancy_})
      *row = c.take<double>(static_cast<std::size_t>(classes_));
    target_ = c.take<std::int64_t>(static_cast<std::size_t>(most_labels));
    buffer_ = c.take<T>(static_cast<std::size_t>(classes_));
  }

  /// The value of sequence b times its weight, divided as the mean divides it; its gradient.
  double run(index b) {
    const double weight = weight_of(*job_.call, b);
    const bool counts = weight != 0;
    const index n = counts ? job_.length(b) : 0;
    double value = 0;
    if (counts) {
      set_target(b);
      value = forward(b, n);
      if (value < ctc_sure_value && !job_.log_probabilities && n > 0)
        value = sure_value(b, n);
    }
    const bool impossible = value == std::numeric_limits<double>::infinity();
    if (impossible && job_.zero_infinity)
      value = 0;
    if (job_.call->values.data)
      job_.call->values[b] = static_cast<T>(value * weight);
    if (job_.has_gradient) {
      scale_ = static_cast<double>(job_.call->scale) * job_.share * weight *
               upstream_of(*job_.call, b) / job_.divisor(b);
      const index used = impossible ? 0 : n;
      if (defined_)
        backward(b, used);
      else
        fill(b, 0, used, std::numeric_limits<double>::quiet_NaN());
      if (!job_.call->accumulate)
        fill(b, used, job_.steps, 0);
    }
    return value * weight / job_.divisor(b);
  }

private:
  double* forward_row(index t) const {
    return forward_ + (job_.has_gradient ? t : t % 2) * (width_ + margin) + margin;
  }
  index class_of(index state) const {
    return static_cast<index>(state % 2 ? target_[state / 2] : job_.blank);
  }
  void set_target(index b) {
    job_.read_target(b, target_);
    states_ = 2 * job_.labels(b) + 1;
    width_ = whole_packs(states_);
    std::fill_n(skip_, width_, no_score);
    for (index s = 3; s < states_; s += 2)
      if (class_of(s) != class_of(s - 2))
        skip_[s] = 0;
  }

  /// Row t: scores, their largest, its class, and with the images e^(score − top) what the rivals
  /// of that class have.
  void read_step(index b, index t) {
    read_row(job_.scores, b * job_.steps + t, buffer_, score_);
    defined_ = settle_scores(score_, classes_) && defined_;
    if (job_.log_probabilities || !defined_)
      return;
    top_ = largest_of(score_, classes_);
    leader_ = std::find(score_, score_ + classes_, top_) - score_;
    lower_to_0(score_, classes_);
    images_of(score_, classes_, image_);
    const double own = image_[leader_];
    image_[leader_] = 0;
    W rivals(0);
    for (index j = 0; j < classes_; j += per_pack)
      rivals += W::load(image_ + j);
    rivals_ = sum_lanes(rivals);
    image_[leader_] = own;
    log_sum_ = log1p_of(rivals_);
  }
  double log_probability(index k) const {
    return job_.log_probabilities ? score_[k] : score_[k] - log_sum_;
  }
  void read_emissions(index b, index t) {
    read_step(b, t);
    const double of_blank = log_probability(static_cast<index>(job_.blank));
    for (index s = 0; s < states_; ++s)
      emission_[s] = s % 2 ? log_probability(class_of(s)) : of_blank;
    std::fill(emission_ + states_, emission_ + width_, no_score);
  }

  /// −log of the probability of the target; rows of log-probabilities of the ways to each state,
  /// less the largest.
  double forward(index b, index n) {
    defined_ = true;
    if (n == 0)
      return states_ == 1 ? 0 : -no_score;
    exact_sum offset;
    for (index t = 0; t < n; ++t) {
      read_emissions(b, t);
      if (!defined_)
        return std::numeric_limits<double>::quiet_NaN();
      double* const row = forward_row(t);
      std::fill_n(row - margin, margin, no_score);
      if (t == 0) {
        std::fill_n(row, width_, no_score);
        std::copy_n(emission_, std::min<index>(states_, 2), row);
      } else {
        const double* const before = forward_row(t - 1);
        for (index s = 0; s < width_; s += per_pack) {
          const ctc_arrival from(before + s, skip_ + s);
          (from.log_sum() + W::load(emission_ + s)).store(row + s);
        }
      }
      offset.add(lower_to_0(row, width_));
    }
    const double* const last = forward_row(n - 1) + states_;
    const double high = states_ > 1 ? std::max(last[-1], last[-2]) : last[-1],
                 low = states_ > 1 ? std::min(last[-1], last[-2]) : no_score;
    if (high == no_score)
      return -no_score;
    offset.add(high);
    offset.add(log1p_of(first_lane(exp_shifted(W(low - high)))));
    return 0 - offset.value();
  }

  /// The value where the target's probability is near 1: −log1p(−Q), Q being the probability of
  /// anything else: of leaving the target's states at some step, or of ending before its end. All
  /// terms are positive.
  double sure_value(index b, index n) {
    double *ways = stay_ + margin, *next = step_ + margin; // probabilities of the states
    std::fill_n(stay_, width_ + margin, 0.0);
    std::fill_n(step_, width_ + margin, 0.0);
    double elsewhere = 0;
    for (index t = 0; t < n; ++t) {
      read_step(b, t);
      find_largest();
      const double part = 1 / (1 + rivals_);
      double left = t == 0 ? outside(-1) : 0;
      for (index s = 0; t > 0 && s < states_; ++s)
        if (ways[s] > 0)
          left = fma_of(ways[s], outside(s), left);
      elsewhere = fma_of(left, part, elsewhere);
      for (index s = 0; s < states_; ++s) {
        const double from = t == 0          ? (s < 2 ? 1 : 0)
                            : skip_[s] == 0 ? ways[s] + ways[s - 1] + ways[s - 2]
                                            : ways[s] + ways[s - 1];
        next[s] = from * (image_[class_of(s)] * part);
      }
      std::swap(ways, next);
    }
    for (index s = 0; s < states_ - 2; ++s)
      elsewhere += ways[s];
    return -log1p_of(-elsewhere);
  }
  /// The four largest images of the step, and the sum of the others.
  void find_largest() {
    std::fill_n(largest_, 4, index{-1});
    for (index k = 0; k < job_.scores.cols; ++k) {
      index at = k;
      for (index& place : largest_)
        if (place < 0 || (at >= 0 && image_[at] > image_[place]))
          std::swap(at, place);
    }
    W sum(0);
    double kept[4];
    for (index i = 0; i < 4 && largest_[i] >= 0; ++i)
      kept[i] = std::exchange(image_[largest_[i]], 0);
    for (index k = 0; k < classes_; k += per_pack)
      sum += W::load(image_ + k);
    others_ = sum_lanes(sum);
    for (index i = 0; i < 4 && largest_[i] >= 0; ++i)
      image_[largest_[i]] = kept[i];
  }
  /// Σ image of the classes that lead from this state (-1: from the start) out of the target. The
  /// up to three that do not are taken off, which does not cancel: for every one that is not among
  /// the four largest, one more of these is out there.
  double outside(index state) const {
    const index next = state + (state % 2 ? 2 : 1); // the next label's state
    index inside[3] = {static_cast<index>(job_.blank), -1, -1};
    if (state % 2 == 1)
      inside[1] = class_of(state);
    if (next < states_ && class_of(next) != inside[1])
      inside[2] = class_of(next);
    const auto holds = [](const auto& set, index k) {
      return std::find(std::begin(set), std::end(set), k) != std::end(set);
    };
    double sum = others_;
    for (const index k : inside)
      if (k >= 0 && !holds(largest_, k))
        sum -= image_[k];
    sum = std::max(sum, 0.0);
    for (const index k : largest_)
      if (k >= 0 && !holds(inside, k))
        sum += image_[k];
    return sum;
  }

  /// share_: the probability of each state at the step, given the target; from the last step on.
  void backward(index b, index n) {
    if (n == 0)
      return;
    std::fill_n(share_, width_, 0.0);
    std::fill_n(occupancy_, classes_, 0.0);
    const double* const last = forward_row(n - 1) + states_ - 1;
    const double ahead = states_ > 1 ? last[0] - last[-1] : -no_score; // not both are -inf
    share_[states_ - 1] = first_lane(sigmoid(W(ahead)));
    if (states_ > 1)
      share_[states_ - 2] = first_lane(sigmoid(W(-ahead)));
    for (index t = n - 1; t >= 0; --t) {
      read_step(b, t); // before the gradient, which may lie on it
      slope();
      write_row(job_.gradient, b * job_.steps + t, image_, job_.call->accumulate, buffer_);
      if (t > 0)
        go_back(forward_row(t - 1));
    }
  }
  void go_back(const double* before) {
    for (index s = 0; s < width_; s += per_pack) {
      const ctc_arrival from(before + s, skip_ + s);
      const W shift = from.shift(), stay = exp_shifted(from.stay - shift),
              step = exp_shifted(from.step - shift), jump = exp_shifted(from.jump - shift);
      const W sum = stay + step + jump;
      const W share = select(sum > W(0), W::load(share_ + s) / sum, W(0));
      (stay * share).store(stay_ + s);
      (step * share).store(step_ + s);
      (jump * share).store(jump_ + s);
    }
    for (double* const row : {step_, jump_})
      std::fill_n(row + width_, margin, 0.0);
    for (index s = 0; s < width_; s += per_pack)
      (W::load(stay_ + s) + W::load(step_ + s + 1) + W::load(jump_ + s + 2)).store(share_ + s);
  }
  /// image = scale (p_k − the share of the states of class k); without p for log-probabilities.
  void slope() {
    double others = 0; // of states that are not the leader's
    for (index s = 0; s < states_; ++s) {
      const index k = class_of(s);
      occupancy_[k] += share_[s];
      if (k != leader_)
        others += share_[s];
    }
    const bool normalised = !job_.log_probabilities;
    const double part = normalised && top_ != no_score ? 1 / (1 + rivals_) : 0;
    for (index k = 0; k < classes_; k += per_pack) {
      const W p = normalised ? W::load(image_ + k) * part : W(0);
      ((p - W::load(occupancy_ + k)) * scale_).store(image_ + k);
    }
    if (part > 0) // (1 − share) − (1 − p)
      image_[leader_] = fma_of(-rivals_, part, others) * scale_;
    for (index s = 0; s < states_; ++s)
      occupancy_[class_of(s)] = 0;
  }
  void fill(index b, index first, index last, double x) {
    std::fill_n(image_, classes_, x);
    for (index t = first; t < last; ++t)
      write_row(job_.gradient, b * job_.steps + t, image_, job_.call->accumulate, buffer_);
  }

  const ctc_job<T>& job_;
  index classes_, states_ = 0, width_ = 0, leader_ = -1;
  double *forward_, *skip_, *emission_, *share_, *stay_, *step_, *jump_;
  double *score_, *image_, *occupancy_;
  std::int64_t* target_;
  T* buffer_;
  bool defined_ = true;
  double scale_ = 1, top_ = 0, rivals_ = 0, log_sum_ = 0;
  index largest_[4] = {}; ///< classes, -1 for none
  double others_ = 0;
};

} // namespace core

/// Connectionist temporal classification: −log of the probability that a step-wise classifier says
/// a sequence of labels, over all alignments: each step says a label or blank, repetitions merge,
/// then blanks are dropped.
///
///   ℓ = −log Σ_{alignments a of the target} Π_t p_t(a_t),   p_t = softmax(x_t)
///   ∂ℓ/∂x_tk = p_t(k) − P(a_t = k | target)
///
/// Scores x: (sequences · steps) × classes, step t of sequence b being row b·steps + t, of T or
/// (for float) of 16 bits: a packed tensor sequences × steps × classes as it lies. PyTorch's steps
/// × sequences × classes is a matrix_view with plane_rows = steps, plane_stride = classes and
/// row_stride = sequences · classes. Targets: a matrix, sequences × the longest (padded with
/// anything), or a vector of all, one after the other. Lengths: one for each sequence; all of any
/// integral type.
///
/// options::log_probabilities: x are log-probabilities, used as they are, and ∂ℓ/∂x_tk =
/// −P(a_t = k | target). (PyTorch gives e^x − P there, which is the gradient with respect to raw
/// scores; behind a log-softmax both lead to the same.)
///
/// Reductions: `mean` divides each sequence's value by the length of its target (by 1 where that is
/// 0), then takes the weighted mean over the sequences, as PyTorch does; those that are impossible
/// count. By-products: values, not divided; no others. The gradient may lie on the scores. Steps
/// after the input's end have the gradient 0 and are not read.
///
/// Special values: no alignment is possible (too few steps for the labels and a blank between
/// equal ones, or every alignment has a masked class): the value is +inf, or 0 with
/// options::zero_infinity, and the gradient is 0 either way (PyTorch: NaN without). An empty target
/// is all blanks; no steps and no labels: 0. -inf (or below −2^1000) is a masked class. NaN, +inf
/// or a score above 2^1000: NaN in the sequence's value and gradient, and in no other's.
///
/// Accuracy: computed in double, in logarithms less the largest of each step; shares of states are
/// carried from step to step as probabilities, so that the gradient of a sure sequence keeps its
/// digits. So does its value: below 1/16 it is computed a second time, from the probability of
/// everything else; not with log_probabilities, which need not add up to 1, where its error is
/// absolute, some 1e-16 a step. Same bits for any number of threads. Memory: steps × (2 labels + 1)
/// doubles for each thread that works; without gradient, two rows of that.
///
/// Throws std::invalid_argument, also where a target holds the blank.
/// Source: Graves et al., "Connectionist temporal classification", 2006; torch.nn.CTCLoss.
///
///   perdita::ctc_loss<float> ctc({.blank = 0});
///   float value = ctc(scores, targets, input_lengths, target_lengths, d_scores);
template <class T = float> class ctc_loss {
public:
  using value_type = T;
  struct options {
    std::int64_t blank = 0;         ///< the class of the blank
    bool log_probabilities = false; ///< the scores are log p already
    bool zero_infinity = false;     ///< impossible sequences have the value 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "ctc_loss";

  ctc_loss() : ctc_loss(options{}) {}
  explicit(false) ctc_loss(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require(o.blank >= 0, name, "blank", o.blank, "a class");
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X, core::labels_like N, core::labels_like M, class Y>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& targets, N&& input_lengths,
                                                M&& target_lengths,
                                                const call_options<T>& call = {}) const {
    core::ctc_job<T> job;
    set_inputs(job, core::as_matrix(scores), targets, core::as_vector(input_lengths),
               core::as_vector(target_lengths), call);
    check_targets(job);
    return run(job);
  }

  /// The reduced value, and its gradient, written or added to the last.
  template <class X, core::labels_like N, core::labels_like M, class Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& targets, N&& input_lengths, M&& target_lengths, G&& gradient,
                   const call_options<T>& call = {}) const {
    core::ctc_job<T> job;
    set_inputs(job, core::as_matrix(scores), targets, core::as_vector(input_lengths),
               core::as_vector(target_lengths), call);
    job.gradient = core::matrix_data<T, true>(core::as_matrix(gradient));
    job.has_gradient = true;
    checks.gradient(job.scores, job.gradient, call.accumulate);
    check_targets(job);
    return run(job);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class S, class Y, class N, class M>
  void set_inputs(core::ctc_job<T>& job, matrix_view<S> scores, Y& targets, vector_view<N> inputs,
                  vector_view<M> lengths, const call_options<T>& call) const {
    static_assert(core::labels_like<Y> || core::label_rows<Y>,
                  "perdita::ctc_loss: targets are a matrix of integers, sequences × the longest, "
                  "or a vector of all of them");
    job.scores = core::matrix_data<T>(scores);
    job.sequences = lengths.size;
    job.steps = job.sequences > 0 ? scores.rows / job.sequences : 0;
    job.blank = options_.blank;
    job.log_probabilities = options_.log_probabilities;
    job.zero_infinity = options_.zero_infinity;
    job.per_label = options_.reduction == reduction::mean;
    job.call = &call;
    checks.size("score rows", scores.rows, job.sequences * job.steps,
                "as many for every sequence, of which there is one for each target length");
    checks.memory("scores", scores.data, scores.rows * scores.cols);
    if (scores.rows > 0)
      core::require(options_.blank < scores.cols, name, "blank", options_.blank,
                    "a class that the scores have");
    checks.lengths("input_lengths", job.input_lengths, inputs, job.sequences, job.steps);
    checks.lengths("target_lengths", job.target_lengths, lengths, job.sequences,
                   std::numeric_limits<index>::max());
    if constexpr (core::labels_like<Y>) {
      const auto all = core::as_vector(targets);
      job.concatenated = true;
      checks.memory("targets", all.data, all.size);
      job.targets = core::integer_rows(all);
    } else {
      const auto rows = core::as_matrix(targets);
      checks.size("target rows", rows.rows, job.sequences, "as many as there are sequences");
      core::require(rows.plane_rows == rows.rows, name, "plane_rows of the targets",
                    rows.plane_rows, "all rows in one plane");
      checks.memory("targets", rows.data, rows.rows * rows.cols);
      job.targets = core::integer_rows(rows);
    }
    checks.call(call, job.sequences, false);
  }
  void check_targets(const core::ctc_job<T>& job) const {
    index start = 0;
    for (index b = 0; b < job.sequences; ++b) {
      const index n = job.labels(b), row = job.concatenated ? 0 : b,
                  first = job.concatenated ? start : 0;
      if (n > job.targets.cols - first)
        core::fail_at(name, "target_lengths", b, core::to_text(n),
                      "at most " + core::to_text(job.targets.cols - first) +
                          ", the labels that the targets have for it");
      for (index i = first; i < first + n; ++i)
        if (const std::int64_t y = job.targets.at(row, i);
            y < 0 || y >= job.scores.cols || y == options_.blank)
          core::fail_at(name, "targets", row * job.targets.cols + i, core::to_text(y),
                        "0 to " + core::to_text(job.scores.cols - 1) + " without the blank, " +
                            core::to_text(options_.blank));
      start += n;
    }
    if (job.concatenated)
      checks.size("size of targets", job.targets.cols, start, "the sum of target_lengths");
  }

  T run(core::ctc_job<T>& job) const {
    const call_options<T>& call = *job.call;
    const index n = job.sequences;
    index longest = 0, most_labels = 0;
    for (index b = 0; b < n; ++b) {
      longest = std::max(longest, job.length(b));
      most_labels = std::max(most_labels, job.labels(b));
    }
    job.share = core::share_of(call, options_.reduction, n);
    const auto workers = std::min(static_cast<std::size_t>(n), call.run_on.concurrency());
    core::carver count;
    count.template take<double>(static_cast<std::size_t>(n));
    count.template take<std::int64_t>(static_cast<std::size_t>(n));
    const std::size_t shared = count.used();
    core::ctc_pass<T>(count, job, longest, most_labels);
    const std::size_t scratch = count.used() - shared;

    workspace own;
    std::byte* const bytes = (call.memory ? *call.memory : own).request(shared + workers * scratch);
    core::carver carve(bytes);
    double* const values = carve.template take<double>(static_cast<std::size_t>(n));
    std::int64_t* const starts = carve.template take<std::int64_t>(static_cast<std::size_t>(n));
    for (index b = 0, start = 0; b < n; start += job.labels(b), ++b)
      starts[b] = start;
    job.starts = starts;
    core::share_out(n, workers, call.run_on, [&](std::size_t worker) {
      core::carver mine(bytes + shared + worker * scratch);
      return [&, pass = core::ctc_pass<T>(mine, job, longest, most_labels)](index b) mutable {
        values[b] = pass.run(b);
      };
    });
    core::exact_sum total;
    for (index b = 0; b < n; ++b)
      total.add(values[b]);
    return static_cast<T>(job.share == 0 ? 0 : total.value() * job.share);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
