// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/row_loss.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

struct pairwise_preference_options {
  double preference = 1;  ///< a ≥ 0: of the preference heads
  double consistency = 1; ///< b ≥ 0: of how the classifier's confidence contradicts preferences
  double diversity = 1;   ///< c ≥ 0: of how far the heads differ, which is maximised
};

/// Where the gradients of a pair's logits and preference scores go.
template <class T> struct pairwise_gradients {
  matrix_view<T> first_logits, second_logits, first_scores, second_scores;
};

namespace core {

/// What a loss of pairs adds to the two losses of their logits.
template <class T> struct preference_job {
  pairwise_preference_options weights;
  matrix_data<T> logits[2], scores[2];
  matrix_data<T, true> of_logits[2], of_scores[2];
  const void* preferences = nullptr;
  index stride = 1;
  void (*reader)(const void*, index, index, index, std::int64_t*) = nullptr;

  std::int64_t preference(index r) const {
    std::int64_t p;
    reader(preferences, stride, r, 1, &p);
    return p;
  }
};

template <class T> class preference_kernel {
public:
  static index rows_per_sum(const row_job<T>& job) { return block_rows(job); }
  static index rows_per_task(const row_job<T>& job, std::size_t) { return block_rows(job); }

  preference_kernel(const preference_job<T>& pairs, const row_job<T>& job, std::byte* scratch)
      : pairs_(pairs), job_(job), classes_(pairs.logits[0].cols), heads_(pairs.scores[0].cols) {
    carver memory(scratch);
    const auto n = static_cast<std::size_t>(std::max(classes_, heads_));
    for (double*& numbers : numbers_)
      numbers = memory.take<double>(n);
    for (T*& stage : stage_)
      stage = memory.take<T>(n);
    scratch_bytes_ = memory.used();
  }
  static std::size_t scratch_bytes(const preference_job<T>& pairs, const row_job<T>& job) {
    return preference_kernel(pairs, job, nullptr).scratch_bytes_;
  }

  /// Gradients are added to those of the logits, and are those of the scores.
  void run(index first, index last, value_sum* total) {
    for (index r = first; r < last; ++r) {
      const std::int64_t y = job_.label(r);
      if (!job_.counts(r, y)) {
        store_ignored_report(job_, r);
        if (pairs_.of_scores[0] && !job_.accumulate) {
          std::fill_n(numbers_[0], heads_, 0.0);
          for (const auto& to : pairs_.of_scores)
            write(to, r, numbers_[0], 0, false);
        }
        continue;
      }
      const std::int64_t preferred = pairs_.preference(r);
      double value = judge_scores(r, preferred);
      if (pairs_.weights.consistency > 0)
        value += judge_logits(r, static_cast<index>(y), preferred);
      store_value(job_, r, value, *total);
    }
  }
  void drain() {}

private:
  static constexpr double nan = std::numeric_limits<double>::quiet_NaN();

  static double softplus(double z) { return std::fmax(z, 0) + std::log1p(std::exp(-std::fabs(z))); }
  static double sigmoid(double z) {
    const double e = std::exp(-std::fabs(z));
    return (z >= 0 ? 1 : e) / (1 + e);
  }

  /// The heads' part: binary cross-entropies of z = s1 − s2.
  double judge_scores(index r, std::int64_t preferred) {
    double *const z = numbers_[0], *const slopes = numbers_[1];
    read(pairs_.scores[0], r, heads_, z);
    read(pairs_.scores[1], r, heads_, slopes);
    double all = 0, none = 0, spoilt = 0; // Σ σ(z) and Σ σ(−z); NaN where one is
    for (index h = 0; h < heads_; ++h) {
      z[h] -= slopes[h];
      spoilt += z[h] == z[h] ? 0 : z[h];
      all += sigmoid(z[h]);
      none += sigmoid(-z[h]);
    }
    const double t = preferred == 2 ? 0.5 : static_cast<double>(preferred);
    const auto n = static_cast<double>(heads_);
    const double of_heads = pairs_.weights.preference / n,
                 of_pairs = heads_ > 1 ? pairs_.weights.diversity / (n * (n - 1)) : 0;
    exact_sum value;
    for (index h = 0; h < heads_; ++h) {
      const double hit = sigmoid(z[h]), miss = sigmoid(-z[h]), above = softplus(z[h]),
                   below = softplus(-z[h]);
      value.add(times(of_heads, times(t, below) + times(1 - t, above)));
      value.add(-times(of_pairs, times(std::fmax(all - hit, 0), below) +
                                     times(std::fmax(none - miss, 0), above)));
      // of σ(z_h) − σ(z_i), or of what they lack of 1
      const double ahead = hit < 0.5 ? n * hit - all : none - n * miss;
      slopes[h] = of_heads * ((1 - t) * hit - t * miss) - of_pairs * ahead;
    }
    if (spoilt != spoilt)
      std::fill_n(slopes, heads_, nan);
    if (pairs_.of_scores[0]) {
      const double scale = job_.row_scale(r);
      write(pairs_.of_scores[0], r, slopes, scale, job_.accumulate);
      write(pairs_.of_scores[1], r, slopes, -scale, job_.accumulate);
    }
    return spoilt == spoilt ? value.value() : nan;
  }

  struct confidence {
    double hit, miss; ///< p_y, and 1 − p_y from the rivals' shares
  };
  /// Shares become the softmax of the row.
  confidence find_confidence(index side, index r, index y, double* shares) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    read(pairs_.logits[side], r, classes_, shares);
    double top = -inf, sum = 0, rivals = 0;
    for (index k = 0; k < classes_; ++k)
      top = shares[k] > top || shares[k] != shares[k] ? shares[k] : top;
    if (!std::isfinite(top))
      return {nan, nan};
    for (index k = 0; k < classes_; ++k) {
      shares[k] = std::exp(shares[k] - top);
      (k == y ? sum : rivals) += shares[k];
    }
    sum += rivals;
    for (index k = 0; k < classes_; ++k)
      shares[k] /= sum;
    return {shares[y], rivals / sum};
  }
  /// The classifier's part: b times how far p_y of the pair contradicts what is preferred.
  double judge_logits(index r, index y, std::int64_t preferred) {
    confidence of[2];
    for (index side = 0; side < 2; ++side)
      of[side] = find_confidence(side, r, y, numbers_[side]);
    const double lead =
        of[0].hit > 0.5 && of[1].hit > 0.5 ? of[1].miss - of[0].miss : of[0].hit - of[1].hit;
    const double sign = lead != lead                 ? nan
                        : lead > 0 && preferred != 1 ? 1
                        : lead < 0 && preferred != 0 ? -1
                                                     : 0;
    const double weight = pairs_.weights.consistency;
    if (pairs_.of_logits[0])
      for (index side = 0; side < 2; ++side) {
        double* const shares = numbers_[side];
        const double slope = weight * (side == 0 ? sign : -sign) * of[side].hit;
        for (index k = 0; k < classes_; ++k)
          shares[k] = slope * (k == y ? of[side].miss : -shares[k]);
        write(pairs_.of_logits[side], r, shares, job_.row_scale(r), true);
      }
    return weight * sign * lead;
  }

  void read(const matrix_data<T>& from, index r, index n, double* to) {
    from.read(r, 0, n, stage_[0]);
    for (index i = 0; i < n; ++i)
      to[i] = static_cast<double>(stage_[0][i]);
  }
  void write(const matrix_data<T, true>& to, index r, const double* slopes, double scale,
             bool add) {
    if (add)
      to.reader(to.at(r, 0), to.col_stride, to.cols, stage_[1]);
    for (index i = 0; i < to.cols; ++i) {
      const auto slope = static_cast<T>(slopes[i] * scale);
      stage_[0][i] = add ? stage_[1][i] + slope : slope;
    }
    to.write(r, 0, to.cols, stage_[0]);
  }

  const preference_job<T>& pairs_;
  const row_job<T>& job_;
  index classes_, heads_;
  std::size_t scratch_bytes_ = 0;
  double* numbers_[2] = {};
  T* stage_[2] = {};
};

/// The part of a loss of pairs that is not the wrapped loss's.
template <class T> class preference_terms : public row_loss<preference_terms<T>, T> {
public:
  struct options {
    std::int64_t ignore_index;
    perdita::reduction reduction;
  };
  static constexpr const char* name = "pairwise_preference";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  explicit preference_terms(const options& o) : options_(o) {}
  const options& settings() const { return options_; }

  template <class L>
  T operator()(const preference_job<T>& pairs, const vector_view<L>& labels,
               const call_options<T>& call) const {
    row_job<T> job;
    job.name = name;
    job.scores = pairs.logits[0];
    this->set_labels(job, labels);
    return this->drive(job, call, [&](const auto&) {
      return job.scores.rows == 0
                 ? 0.0
                 : run_blocks<preference_kernel<T>>(pairs, job, call.run_on, call.memory);
    });
  }

private:
  friend row_loss<preference_terms<T>, T>;
  template <class F> void visit(const row_job<T>&, F f) const { f(0); }
  options options_;
};

} // namespace core

/// Learning from pairs of examples of one class of which annotators (or a model) prefer one: any
/// loss of rows for the logits c and c′ of both, and H preference heads with scores s and s′, whose
/// differences z_h = s_h − s′_h say which is preferred. For a pair with label y, p_y and p′_y the
/// softmax of its logits,
///
///   ½ ℓ(c, y) + ½ ℓ(c′, y)
///   + a (1/H) Σ_h (t log(1 + e^{−z_h}) + (1 − t) log(1 + e^{z_h}))
///   + b ([p′_y − p_y]₊, [p_y − p′_y]₊ or |p_y − p′_y|)
///   − c (1/(H(H − 1))) Σ_{i≠j} (q_i log(1 + e^{−z_j}) + (1 − q_i) log(1 + e^{z_j})),  q = σ(z)
///
/// where the first (preference 1), the second (0), or neither (2) is preferred: t = 1, 0 or ½, and
/// in this order the terms of b. The last one lets heads differ: q_i is held constant in its
/// gradient, so that the gradient returned is not the derivative of the value unless c = 0.
///
///   ∂/∂s_h = (a/H) (σ(z_h) − t) − (c/(H(H − 1))) (H q_h − Σ q),   ∂/∂s′_h = −∂/∂s_h
///   ∂/∂c_k = ½ ∂ℓ/∂c_k + b ν p_y (δ_ky − p_k),  ν = ∂(term of b)/∂p_y, 0 at its kink; c′: −ν
///
/// Shapes: both matrices of logits pairs × classes, both of scores pairs × heads (H ≥ 1; with one,
/// there is nothing to differ from), one label and one preference per pair, both integers.
/// Gradients are of T, and lie apart from each other and from the inputs. A NaN, or +inf among the
/// logits or the same infinity in both scores of a head, makes NaN of the pair's value and of the
/// gradients of its logits or its scores, whichever it is in.
///
/// Reductions, ignore_index and row weights: those of the wrapped loss; a pair is a row, and one
/// whose label is ignored has no part in anything. Class weights of the loss are in its own terms
/// and in the denominators of their means only. `values` has the pairs' values; no other
/// by-products. Cost: two calls of the loss, and a pass. Threads do not matter. Beside
/// call_options::memory a call with gradients allocates a little, and one with `values` two numbers
/// per pair. Throws std::invalid_argument.
/// Source: Kim, Shin, Kang, "Prefer to classify: improving text classifiers via auxiliary
/// preference learning", ICML 2023 (all weights 1).
///
///   perdita::pairwise_preference loss(perdita::cross_entropy<float>(), {.diversity = 0});
///   float value = loss(c1, c2, s1, s2, labels, preferences, {d_c1, d_c2, d_s1, d_s2});
template <class Loss> class pairwise_preference {
public:
  using T = typename Loss::value_type;
  using value_type = T;
  using options = pairwise_preference_options;
  static constexpr const char* name = "pairwise_preference";

  explicit(false) pairwise_preference(Loss loss)
      : pairwise_preference(std::move(loss), options{}) {}
  pairwise_preference(Loss loss, const options& o) : loss_(std::move(loss)), options_(o) {
    const auto check = [](const char* what, double weight) {
      core::require(weight >= 0 && std::isfinite(weight), name, what, weight,
                    "a finite number, 0 or more");
    };
    check("preference", o.preference);
    check("consistency", o.consistency);
    check("diversity", o.diversity);
  }
  const options& settings() const { return options_; }
  const Loss& loss() const { return loss_; }

  /// The reduced value.
  template <class A, class B, class S, class R, core::labels_like Y, core::labels_like P>
  requires core::scores_like<A, T> && core::scores_like<B, T> && core::scores_like<S, T> &&
      core::scores_like<R, T>
          T operator()(A&& first_logits, B&& second_logits, S&& first_scores, R&& second_scores,
                       Y&& labels, P&& preferences, const call_options<T>& call = {}) const {
    return run<false>(core::as_matrix(first_logits), core::as_matrix(second_logits),
                      core::as_matrix(first_scores), core::as_matrix(second_scores),
                      core::as_vector(labels), core::as_vector(preferences), {}, call);
  }
  /// The reduced value, and the gradients with respect to all logits and scores.
  template <class A, class B, class S, class R, core::labels_like Y, core::labels_like P>
  requires core::scores_like<A, T> && core::scores_like<B, T> && core::scores_like<S, T> &&
      core::scores_like<R, T>
          T operator()(A&& first_logits, B&& second_logits, S&& first_scores, R&& second_scores,
                       Y&& labels, P&& preferences, const pairwise_gradients<T>& gradients,
                       const call_options<T>& call = {}) const {
    return run<true>(core::as_matrix(first_logits), core::as_matrix(second_logits),
                     core::as_matrix(first_scores), core::as_matrix(second_scores),
                     core::as_vector(labels), core::as_vector(preferences), gradients, call);
  }

private:
  template <bool Gradient, class A, class B, class S, class R, class L, class P>
  T run(const matrix_view<A>& first_logits, const matrix_view<B>& second_logits,
        const matrix_view<S>& first_scores, const matrix_view<R>& second_scores,
        const vector_view<L>& labels, const vector_view<P>& preferences,
        const pairwise_gradients<T>& to, const call_options<T>& call) const {
    core::preference_job<T> job{options_,
                                {{first_logits}, {second_logits}},
                                {{first_scores}, {second_scores}},
                                {{to.first_logits}, {to.second_logits}},
                                {{to.first_scores}, {to.second_scores}},
                                preferences.data,
                                preferences.stride,
                                &core::read_labels<std::remove_const_t<P>>};
    check_shapes(job, preferences.size, call);
    if constexpr (Gradient)
      check_gradients(job);

    const auto rows = static_cast<std::size_t>(first_logits.rows);
    std::vector<T> of_first(call.values.data ? rows : 0), of_second(of_first.size());
    call_options<T> half = call;
    half.scale = call.scale / 2;
    const auto classify = [&](const auto& logits, const auto& gradient, std::vector<T>& values) {
      half.values = values;
      if constexpr (Gradient)
        return loss_(logits, labels, gradient, half);
      else
        return loss_(logits, labels, half);
    };
    const T first = classify(first_logits, to.first_logits, of_first);
    const T second = classify(second_logits, to.second_logits, of_second);
    const auto& of_loss = loss_.settings();
    const T more =
        core::preference_terms<T>({of_loss.ignore_index, of_loss.reduction})(job, labels, call);
    for (std::size_t i = 0; i < of_first.size(); ++i)
      call.values[static_cast<index>(i)] += of_first[i] / 2 + of_second[i] / 2;
    return first / 2 + second / 2 + more;
  }

  template <bool M>
  static void check_matrix(const std::string& what, const core::matrix_data<T, M>& m, index rows,
                           index cols) {
    const auto text = [](index r, index c) { return core::to_text(r) + " x " + core::to_text(c); };
    if (m.rows != rows || m.cols != cols)
      core::fail(name, "shape of the " + what, text(m.rows, m.cols), text(rows, cols));
    if (!m.data && rows * cols > 0)
      core::fail(name, what, "null", "a pointer to memory");
  }
  static void check_shapes(const core::preference_job<T>& job, index preferences,
                           const call_options<T>& call) {
    const index rows = job.logits[0].rows, heads = job.scores[0].cols;
    check_matrix("first logits", job.logits[0], rows, job.logits[0].cols);
    check_matrix("second logits", job.logits[1], rows, job.logits[0].cols);
    check_matrix("first scores", job.scores[0], rows, heads);
    check_matrix("second scores", job.scores[1], rows, heads);
    core::require(heads > 0 || rows == 0, name, "columns of the first scores", heads,
                  "at least 1 head");
    core::require(preferences == rows, name, "size of preferences", preferences,
                  "the number of pairs");
    core::require(job.preferences || rows == 0, name, "preferences", 0, "a pointer to memory");
    for (index r = 0; r < rows; ++r) {
      const std::int64_t p = job.preference(r);
      if (p < 0 || p > 2)
        core::fail_at(name, "preferences", r, core::to_text(p),
                      "1 (the first), 0 (the second) or 2 (neither)");
    }
    if (call.values.data || call.values.size > 0) {
      core::require(call.values.size == rows, name, "size of values", call.values.size,
                    "the number of pairs");
      core::require_memory(name, "values", call.values.data, rows);
    }
    const core::report_views<T> report{call.values,  call.log_sum_exp, call.target_log_probability,
                                       call.entropy, call.penalty,     call.hits};
    if (report.any())
      core::fail(std::string("perdita::") + name +
                 ": a by-product is asked for, expected none but values");
  }
  static void check_gradients(const core::preference_job<T>& job) {
    const char* const sides[] = {"first", "second"};
    std::vector<core::extent> memory;
    for (int side = 0; side < 2; ++side) {
      const std::string of = std::string("gradient of the ") + sides[side];
      check_matrix(of + " logits", job.of_logits[side], job.logits[0].rows, job.logits[0].cols);
      check_matrix(of + " scores", job.of_scores[side], job.scores[0].rows, job.scores[0].cols);
      memory.push_back(core::bytes_of(job.of_logits[side]));
      memory.push_back(core::bytes_of(job.of_scores[side]));
    }
    const std::size_t written = memory.size();
    for (int side = 0; side < 2; ++side) {
      memory.push_back(core::bytes_of(job.logits[side]));
      memory.push_back(core::bytes_of(job.scores[side]));
    }
    core::require_apart(name, memory, written);
  }

  Loss loss_;
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
