// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// What smile compares a token with: the labels of its sequence, or all other classes and itself.
enum class smile_set { own, others };

/// The labels of a batch of sequences, and the classes that the tokens of each are compared with:
/// sequences × any number.
template <class Y, class S> struct with_subsets {
  Y& labels;
  S& subsets;
  template <class A, class B> with_subsets(A&& y, B&& s) : labels(y), subsets(s) {}
};
template <class A, class B>
with_subsets(A&&, B&&) -> with_subsets<std::remove_reference_t<A>, std::remove_reference_t<B>>;

namespace core {

template <class T> struct smile_job {
  matrix_data<T> scores;
  matrix_data<T, true> gradient;
  integer_rows labels;
  integer_rows subsets; ///< or no reader
  smile_set among = smile_set::own;
  index sequences = 0, steps = 0;
  std::int64_t ignore_index = -100;
  bool whole_first = true, has_gradient = false;
  double likelihood = 0; ///< share of the plain cross-entropy
  const call_options<T>* call = nullptr;
  double share = 1;
};

/// One worker's sequences.
template <class T> class smile_pass {
public:
  smile_pass(carver& c, const smile_job<T>& job)
      : job_(job), classes_(whole_packs(job.scores.cols)) {
    const auto classes = static_cast<std::size_t>(classes_),
               most =
                   static_cast<std::size_t>(whole_packs(std::max(job.steps, job.subsets.cols + 1)));
    for (double** row : {&score_, &slope_, &result_})
      *row = c.take<double>(classes);
    for (double** row : {&few_, &few_slope_})
      *row = c.take<double>(most);
    for (std::int64_t** row : {&label_, &set_})
      *row = c.take<std::int64_t>(most);
    buffer_ = c.take<T>(classes);
  }

  /// Σ of the weighted values of the tokens of sequence b; their gradients.
  double run(index b) {
    job_.labels.read(b, 0, job_.steps, label_);
    std::int64_t* end = set_ + job_.subsets.cols;
    if (job_.subsets.reader)
      job_.subsets.read(b, 0, job_.subsets.cols, set_);
    else
      end = std::copy_if(label_, label_ + job_.steps, set_,
                         [&](std::int64_t y) { return y != job_.ignore_index; });
    std::sort(set_, end);
    size_ = std::unique(set_, end) - set_;
    exact_sum total;
    for (index t = 0; t < job_.steps; ++t)
      total.add(run_token(b * job_.steps + t, label_[t], t == 0 && job_.whole_first));
    return total.value();
  }

private:
  double run_token(index row, std::int64_t label, bool whole) {
    const double weight = weight_of(*job_.call, row);
    const bool counts = label != job_.ignore_index && weight != 0;
    double value = 0;
    if (counts || job_.has_gradient)
      std::fill_n(result_, classes_, 0.0);
    if (counts) {
      const double factor = static_cast<double>(job_.call->scale) * job_.share * weight *
                            upstream_of(*job_.call, row);
      const double among_all = whole ? 1 : job_.likelihood, among_few = 1 - among_all;
      job_.scores.read(row, 0, job_.scores.cols, buffer_);
      if (among_all > 0)
        value = among_all * add_all(static_cast<index>(label), among_all, factor);
      if (among_few > 0) {
        const bool others = job_.among == smile_set::others && !job_.subsets.reader;
        const double part =
            others ? add_others(label, among_few, factor) : add_few(label, among_few, factor);
        value = fma_of(among_few, part, value);
      }
    }
    if (job_.call->values.data)
      job_.call->values[row] = static_cast<T>(value * weight);
    if (job_.has_gradient && (counts || !job_.call->accumulate))
      write_row(job_.gradient, row, result_, job_.call->accumulate, buffer_);
    return value * weight;
  }
  double add_all(index y, double share, double factor) {
    read_all();
    return add_row(y, share, factor);
  }
  double add_others(std::int64_t label, double share, double factor) {
    read_all();
    const auto leave_out = [&](double* row, double x) {
      for (index i = 0; i < size_; ++i)
        if (set_[i] != label)
          row[set_[i]] = x;
    };
    leave_out(score_, no_score);
    const double value =
        compare(score_, classes_, static_cast<index>(label), factor * share, slope_);
    leave_out(slope_, 0); // where others are NaN, too
    add_slopes();
    return value;
  }
  void read_all() {
    for (index j = 0; j < job_.scores.cols; ++j)
      score_[j] = static_cast<double>(buffer_[j]);
    std::fill(score_ + job_.scores.cols, score_ + classes_, no_score);
  }
  double add_row(index y, double share, double factor) {
    const double value = compare(score_, classes_, y, factor * share, slope_);
    add_slopes();
    return value;
  }
  void add_slopes() {
    for (index j = 0; j < classes_; ++j)
      result_[j] += slope_[j];
  }
  double add_few(std::int64_t label, double share, double factor) {
    const auto found = std::lower_bound(set_, set_ + size_, label);
    const index y = found < set_ + size_ && *found == label ? found - set_ : size_,
                size = std::max(size_, y + 1), n = whole_packs(size);
    set_[y] = label; // where it was, or after the others
    for (index i = 0; i < size; ++i)
      few_[i] = static_cast<double>(buffer_[set_[i]]);
    std::fill(few_ + size, few_ + n, no_score);
    const double value = compare(few_, n, y, factor * share, few_slope_);
    for (index i = 0; i < size; ++i)
      result_[set_[i]] += few_slope_[i];
    return value;
  }
  double compare(double* scores, index n, index y, double scale, double* slope) {
    if (!settle_scores(scores, n)) {
      std::fill_n(slope, n, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    const double value = cross_entropy_among(scores, n, y, slope);
    for (index j = 0; j < n; j += per_pack)
      (pack<double>::load(slope + j) * scale).store(slope + j);
    return value;
  }

  const smile_job<T>& job_;
  index classes_, size_ = 0;
  double *score_, *slope_, *result_, *few_, *few_slope_;
  std::int64_t *label_, *set_;
  T* buffer_;
};

} // namespace core

/// SMILE, semipermeable maximum likelihood: cross-entropy of each token among the tokens of its own
/// sequence only, so that words which are not in it are neither pushed up nor down.
///
///   ℓ_t = −log( e^{x_ty} / Σ_{v ∈ A} e^{x_tv} ),   A = the labels of the sequence
///   ∂ℓ_t/∂x_tv = P_A(v) − [v = y] in A, 0 elsewhere
///   with options::likelihood s:  s · cross-entropy + (1 − s) ℓ_t   (the paper trains with 0.01)
///
/// Variants, for comparison: options::among = smile_set::others takes for A all classes that are
/// not labels of the sequence, and y (the paper's reverse SMILE); with_subsets(labels, subsets)
/// gives a row of classes for each sequence, of which, with y, A is made: random ones, say. Classes
/// may come twice.
///
/// The first token of a sequence, which has no words before it, is compared with all classes where
/// whole_first. Never more than cross-entropy; 0 where A has one label.
///
/// Scores: (sequences · steps) × classes, step t of sequence b being row b·steps + t, of T or (for
/// float) of 16 bits; steps first: as in linear_chain_crf. Labels: sequences × steps, of any
/// integral type; ignore_index (padding) is not in A, its gradient is 0 and its row is not read.
/// Reductions, weights and values are those of tokens (rows), as in cross_entropy; a label whose
/// token has the weight 0 is still in A. By-products: values, no others. The gradient may lie on
/// the scores.
///
/// Special values: -inf (or below −2^1000) is a masked class; as the label, value +inf and gradient
/// −weight. NaN, +inf or a score above 2^1000 makes NaN of all that is compared with it: of A,
/// where the token is compared with A alone; the other classes do not count.
///
/// Computed in double. Same bits for any number of threads. Throws std::invalid_argument.
/// Source: Yue, Hu, Zhang, Jin, "Learning descriptive image captioning via semipermeable maximum
/// likelihood estimation", NeurIPS 2023.
///
///   perdita::smile<float> smile({.likelihood = 0.01f});
///   float value = smile(scores, labels, d_scores);
template <class T = float> class smile {
public:
  using value_type = T;
  struct options {
    T likelihood = 0;                 ///< share of the plain cross-entropy, in [0, 1]
    bool whole_first = true;          ///< a sequence's first token is compared with all classes
    smile_set among = smile_set::own; ///< what A is, where no subsets are given
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "smile";

  smile() : smile(options{}) {}
  explicit(false) smile(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require(o.likelihood >= 0 && o.likelihood <= 1, name, "likelihood", o.likelihood,
                  "a number in [0, 1]");
    core::require_enumerator(name, "among", o.among, smile_set::others,
                             "smile_set::own or smile_set::others");
  }
  const options& settings() const { return options_; }

  /// The reduced value. `labels` is a matrix, or with_subsets(matrix, matrix).
  template <class X, class Y>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& labels,
                                                const call_options<T>& call = {}) const {
    core::smile_job<T> job;
    set_inputs(job, core::as_matrix(scores), labels, call);
    return run(job);
  }

  /// The reduced value, and its gradient, written or added to the last.
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& labels, G&& gradient, const call_options<T>& call = {}) const {
    core::smile_job<T> job;
    set_inputs(job, core::as_matrix(scores), labels, call);
    job.gradient = core::matrix_data<T, true>(core::as_matrix(gradient));
    job.has_gradient = true;
    checks.gradient(job.scores, job.gradient, call.accumulate);
    return run(job);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class Y> struct is_with_subsets : std::false_type {};
  template <class Y, class S> struct is_with_subsets<with_subsets<Y, S>> : std::true_type {};

  template <class S, class Y>
  void set_inputs(core::smile_job<T>& job, matrix_view<S> scores, Y& given,
                  const call_options<T>& call) const {
    if constexpr (is_with_subsets<std::remove_const_t<Y>>::value) {
      set_inputs(job, scores, given.labels, call);
      set_subsets(job, core::as_matrix(given.subsets));
    } else {
      static_assert(core::label_rows<Y>, "perdita::smile: labels are a matrix of integers, or "
                                         "with_subsets of one and another");
      set_labels(job, scores, core::as_matrix(given), call);
    }
  }
  template <class I> void set_subsets(core::smile_job<T>& job, matrix_view<I> subsets) const {
    job.subsets = core::integer_rows(subsets);
    checks.size("subset rows", subsets.rows, job.sequences, "as many as there are sequences");
    checks.memory("subsets", subsets.data, subsets.rows * subsets.cols);
    core::require(subsets.plane_rows == subsets.rows, name, "plane_rows of the subsets",
                  subsets.plane_rows, "all rows in one plane");
    for (index b = 0; b < subsets.rows; ++b)
      for (index i = 0; i < subsets.cols; ++i)
        if (const std::int64_t k = job.subsets.at(b, i); k < 0 || k >= job.scores.cols)
          core::fail_at(name, "subsets", b * subsets.cols + i, core::to_text(k),
                        "0 to " + core::to_text(job.scores.cols - 1));
  }
  template <class S, class I>
  void set_labels(core::smile_job<T>& job, matrix_view<S> scores, matrix_view<I> labels,
                  const call_options<T>& call) const {
    job.scores = core::matrix_data<T>(scores);
    job.labels = core::integer_rows(labels);
    job.sequences = labels.rows;
    job.steps = labels.cols;
    job.ignore_index = options_.ignore_index;
    job.whole_first = options_.whole_first;
    job.among = options_.among;
    job.likelihood = static_cast<double>(options_.likelihood);
    job.call = &call;
    checks.size("score rows", scores.rows, labels.rows * labels.cols, "sequences × steps");
    checks.memory("scores", scores.data, scores.rows * scores.cols);
    checks.memory("labels", labels.data, labels.rows * labels.cols);
    core::require(labels.plane_rows == labels.rows, name, "plane_rows of the labels",
                  labels.plane_rows, "all rows in one plane");
    checks.call(call, scores.rows, false, "as many as the scores have");
    for (index b = 0; b < job.sequences; ++b)
      for (index t = 0; t < job.steps; ++t)
        if (const std::int64_t y = job.labels.at(b, t);
            y != options_.ignore_index && (y < 0 || y >= scores.cols))
          core::fail_at(name, "labels", b * job.steps + t, core::to_text(y),
                        "0 to " + core::to_text(scores.cols - 1) + ", or ignore_index " +
                            core::to_text(options_.ignore_index));
  }
  /// 1 over the weights of the tokens that count.
  double token_share(const core::smile_job<T>& job) const {
    if (options_.reduction != reduction::mean)
      return 1;
    core::exact_sum weights;
    for (index r = 0; job.call->normaliser == 0 && r < job.scores.rows; ++r)
      if (job.labels.at(r / job.steps, r % job.steps) != options_.ignore_index)
        weights.add(core::weight_of(*job.call, r));
    const double denominator = job.call->normaliser != 0 ? job.call->normaliser : weights.value();
    return denominator != 0 ? 1 / denominator : 0;
  }

  T run(core::smile_job<T>& job) const {
    job.share = token_share(job);
    const double total = core::sum_of_sequences<T>(
        job.sequences, *job.call, [&](core::carver& c) { return core::smile_pass<T>(c, job); });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
