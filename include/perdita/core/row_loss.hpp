// SPDX-License-Identifier: MIT
#pragma once

/// The call operators of every row loss: checks, reduction, distribution over threads.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "errors.hpp"
#include "executor.hpp"
#include "row_run.hpp"
#include "views.hpp"

namespace perdita::inline PERDITA_ABI {

/// What becomes of the values of the rows, with PyTorch's meaning: `mean` divides their weighted
/// sum by the sum of the weights of the rows that count (0, not NaN, where none does); `none`
/// leaves them to call_options::values, with the gradient of each row by itself.
enum class reduction { none, mean, sum };

/// Everything that changes a call but not the mathematics. The same names for every loss.
template <class T> struct call_options {
  /// One factor per row, of value and gradient; counts in the mean's denominator. 0 removes a row.
  vector_view<const T> row_weights{};
  /// ∂(what is minimised)/∂(value of the row): multiplies the gradient of each row only.
  vector_view<const T> upstream{};
  /// Multiplies the gradient only: a loss scale, or an upstream gradient common to all rows.
  T scale = 1;
  /// What the mean divides by, instead of its own denominator, where this is not 0.
  double normaliser = 0;
  /// Adds to the gradient buffer instead of overwriting it.
  bool accumulate = false;

  /// By-products, one number per row (0 for ignored rows). No view, no cost.
  vector_view<T> values{};                 ///< value times row weight
  vector_view<T> log_sum_exp{};            ///< of the transformed scores
  vector_view<T> target_log_probability{}; ///< log p of the label
  vector_view<T> entropy{};                ///< -Σ p log p, in nats
  vector_view<T> penalty{};                ///< the penalty's part of the value
  vector_view<unsigned char> hits{};       ///< 1 where the label's score is above all others

  executor run_on{};
  workspace* memory = nullptr; ///< scratch to reuse; without it a call allocates once
};

namespace core {

template <class I>
concept label_type = std::integral<I> && !std::same_as<std::remove_const_t<I>, bool>;

template <class V>
concept labels_like = vector_like<V> && label_type<typename element_of<V>::type>;

template <class M, class T>
concept scores_like =
    matrix_like<M> && storable_as<std::remove_const_t<typename element_of<M>::type>, T>;

template <class M, class T>
concept gradient_like = scores_like<M, T> && !std::is_const_v<typename element_of<M>::type>;

inline void require_reduction(const char* loss, reduction r) {
  require_enumerator(loss, "reduction", r, reduction::sum, "none, mean or sum");
}

struct extent {
  std::uintptr_t begin, end;
};
/// The bytes between the first and the last element of a matrix; none where it has none.
template <class T, bool M> extent bytes_of(const matrix_data<T, M>& m) {
  if (m.rows * m.cols == 0)
    return {0, 0};
  index low = 0, high = 0;
  const index planes = m.plane_rows > 0 ? m.rows / m.plane_rows : 1;
  for (const index reach : {(m.plane_rows - 1) * m.row_stride, (m.cols - 1) * m.col_stride,
                            (planes - 1) * m.plane_stride})
    (reach < 0 ? low : high) += reach;
  const auto base = reinterpret_cast<std::uintptr_t>(m.data);
  return {base + static_cast<std::uintptr_t>(low * m.width),
          base + static_cast<std::uintptr_t>((high + 1) * m.width)};
}
template <class T> extent bytes_of(const matrix_view<T>& m) {
  return m.data ? bytes_of(matrix_data<std::remove_const_t<T>>(m)) : extent{0, 0};
}
/// The same of a vector.
template <class T> extent bytes_of(const vector_view<T>& v) {
  if (v.size == 0 || !v.data)
    return {0, 0};
  const auto first = reinterpret_cast<std::uintptr_t>(v.data),
             last = reinterpret_cast<std::uintptr_t>(v.data + (v.size - 1) * v.stride);
  return {std::min(first, last), std::max(first, last) + sizeof(T)};
}

[[noreturn]] PERDITA_NOINLINE inline void fail_apart(const char* name) {
  fail(std::string("perdita::") + name +
       ": a gradient overlaps an input or another gradient, expected memory apart");
}
/// That none of the first `written` pieces of memory shares a byte with any other.
inline void require_apart(const char* name, std::span<const extent> memory, std::size_t written) {
  for (std::size_t i = 0; i < written; ++i)
    for (std::size_t j = i + 1; j < memory.size(); ++j)
      if (memory[i].begin < memory[j].end && memory[j].begin < memory[i].end) [[unlikely]]
        fail_apart(name);
}

/// The gradient may be the scores or the target themselves (true), or memory apart from both.
template <class T> bool check_overlap(const char* name, const row_job<T>& job) {
  if (job.scores.rows * job.scores.cols == 0)
    return false;
  const auto& g = job.gradient;
  const extent mine = bytes_of(g);
  const auto against = [&](const matrix_data<T>& m, const char* what) {
    const extent other = bytes_of(m);
    const bool same = static_cast<const void*>(g.data) == m.data && g.width == m.width &&
                      g.row_stride == m.row_stride && g.col_stride == m.col_stride &&
                      g.plane_rows == m.plane_rows && g.plane_stride == m.plane_stride;
    if (!same && mine.begin < other.end && other.begin < mine.end)
      fail(std::string("perdita::") + name + ": gradient overlaps the " + what +
           ", expected either the very same elements or memory apart");
    return same;
  };
  const bool target = job.soft && against(job.soft, "target");
  return against(job.scores, "scores") || target;
}

/// Labels too large for the signed type that they are compared in become the largest, which is out
/// of range too.
template <class L>
void read_labels(const void* labels, index stride, index first, index n, std::int64_t* out) {
  const L* from = static_cast<const L*>(labels) + first * stride;
  for (index i = 0; i < n; ++i) {
    constexpr auto most = std::numeric_limits<std::int64_t>::max();
    const L label = from[i * stride];
    if constexpr (std::is_unsigned_v<L> && sizeof(L) >= sizeof(std::int64_t))
      out[i] = label > static_cast<L>(most) ? most : static_cast<std::int64_t>(label);
    else
      out[i] = static_cast<std::int64_t>(label);
  }
}

[[noreturn]] PERDITA_NOINLINE inline void fail_size(const char* name, const char* what, index got,
                                                    index expected, const char* of) {
  fail(name, what, to_text(got), to_text(expected) + " (" + of + ")");
}
inline void require_size(const char* name, const char* what, index got, index expected,
                         const char* of = "as many as the scores have") {
  if (got != expected) [[unlikely]]
    fail_size(name, what, got, expected, of);
}

/// What the checks of a call ask of a loss, whichever it is: they are compiled once.
template <class T> struct row_facts {
  const char* name;
  bool has_softmax;
  std::int64_t ignore_index;
  reduction reduce;
  const void* loss;
  void (*check)(const void* loss, const row_job<T>&);
  /// Class weights of n labels, those that are ignored left out; null: all are 1.
  void (*weigh)(const void* loss, const std::int64_t* labels, index n, double* weights);
};

template <class T>
void check_matrices(const char* name, const row_job<T>& job, const call_options<T>& call,
                    bool has_gradient) {
  const index rows = job.scores.rows, cols = job.scores.cols;
  require_memory(name, "scores", job.scores.data, rows * cols);
  if (has_gradient) {
    require_size(name, "gradient rows", job.gradient.rows, rows);
    require_size(name, "gradient columns", job.gradient.cols, cols);
    require_memory(name, "gradient", job.gradient.data, rows * cols);
    const bool same = check_overlap(name, job);
    if (same && call.accumulate && rows * cols > 0)
      fail(std::string("perdita::") + name +
           ": accumulate is true, expected false where the gradient overwrites the scores or the "
           "target");
  }
}

/// For the first label out of range among those of n rows, of which there is one.
template <class T>
void fail_at_label(const char* name, const row_job<T>& job, const std::int64_t* labels, index first,
                   index n) {
  const index cols = job.scores.cols;
  for (index i = 0; i < n; ++i)
    if (labels[i] != job.ignore_index && (labels[i] < 0 || labels[i] >= cols))
      fail_at(name, "labels", first + i, to_text(labels[i]),
              "0 to " + to_text(cols - 1) + ", or ignore_index " + to_text(job.ignore_index));
}

/// Checks everything but matrices; returns the mean's denominator.
template <class T>
double check_and_weigh(const row_facts<T>& facts, const row_job<T>& job,
                       const call_options<T>& call) {
  const index rows = job.scores.rows, cols = job.scores.cols;
  const char* name = facts.name;
  const auto per_row = [&](const char* what, const void* data, index size) {
    if (data || size > 0) {
      require_size(name, what, size, rows);
      require_memory(name, what, data, size);
    }
  };
  per_row("row_weights", call.row_weights.data, call.row_weights.size);
  per_row("upstream", call.upstream.data, call.upstream.size);
  per_row("values", call.values.data, call.values.size);
  per_row("log_sum_exp", call.log_sum_exp.data, call.log_sum_exp.size);
  per_row("target_log_probability", call.target_log_probability.data,
          call.target_log_probability.size);
  per_row("entropy", call.entropy.data, call.entropy.size);
  per_row("penalty", call.penalty.data, call.penalty.size);
  per_row("hits", call.hits.data, call.hits.size);
  if (!facts.has_softmax && job.report.any())
    fail(std::string("perdita::") + name +
         ": a by-product of a softmax is asked for, expected none but values");
  require(call.normaliser >= 0 && std::isfinite(call.normaliser), name, "normaliser",
          call.normaliser, "a finite number above 0, or 0 for the reduction's own");
  if (rows > 0)
    require(cols > 0, name, "columns", cols, "at least 1 class");
  if (cols > 0)
    facts.check(facts.loss, job);

  exact_sum weights;
  index ones = 0; // weights of 1 are only counted
  constexpr index batch = 256;
  std::int64_t labels[batch];
  double of_label[batch];
  const bool weigh = job.labels && facts.weigh, equal = !job.row_weights.data && !facts.weigh;
  for (index first = 0; first < rows; first += batch) {
    const index n = std::min(batch, rows - first);
    std::int64_t ignored = 0, wrong = 0;
    if (job.labels) {
      job.read_labels(first, n, labels);
      for (index i = 0; i < n; ++i) { // without a branch
        const bool counts = labels[i] != job.ignore_index;
        ignored += !counts;
        wrong += counts & ((labels[i] < 0) | (labels[i] >= cols));
      }
    }
    if (wrong) [[unlikely]]
      fail_at_label(name, job, labels, first, n);
    if (equal) {
      ones += n - ignored;
      continue;
    }
    if (weigh)
      facts.weigh(facts.loss, labels, n, of_label);
    for (index i = 0; i < n; ++i) {
      if (job.labels && labels[i] == job.ignore_index)
        continue;
      const double weight = (weigh ? of_label[i] : 1) * job.row_weight(first + i);
      if (weight == 1)
        ++ones;
      else
        weights.add(weight);
    }
  }
  return weights.value() + static_cast<double>(ones);
}

/// Checks a job and settles its scale; returns what the sum over the rows is multiplied by.
template <class T>
double settle(const row_facts<T>& facts, row_job<T>& job, const call_options<T>& call) {
  job.ignore_index = facts.ignore_index;
  job.accumulate = call.accumulate;
  job.row_weights = call.row_weights;
  job.upstream = call.upstream;
  job.report = {call.values,  call.log_sum_exp, call.target_log_probability,
                call.entropy, call.penalty,     call.hits};
  const double weights = check_and_weigh(facts, job, call);

  double share = 1;
  if (facts.reduce == reduction::mean) {
    const double denominator = call.normaliser != 0 ? call.normaliser : weights;
    share = denominator != 0 ? 1 / denominator : 0;
  }
  job.scale = static_cast<double>(call.scale) * share;
  return share;
}

/// What a head may do with a loss of rows.
struct row_head {
  template <class Loss, class T, class L>
  static void set_labels(const Loss& loss, row_job<T>& job, vector_view<L> labels);
  template <class Loss, class T, class Run>
  static T drive(const Loss& loss, row_job<T>& job, const call_options<T>& call, Run run);
};

} // namespace core

/// Base of every loss of one row of scores and a target. Derived declares
///
///   name                        for messages
///   settings()                  options, among them reduction and ignore_index
///   takes_soft_targets          whether a target may be a matrix
///   has_softmax                 whether log_sum_exp and the like can be asked for
///   visit(job, f)               calls f(formula) with the formula that serves the job
///
/// and, where they differ from these defaults, label_weight(y), the class weight in the mean's
/// denominator (1), has_label_weights(), false where all of those are 1 and need not be asked for,
/// and check(job), which fails if the loss cannot take such a job;
///
/// and a formula (core/row_formula.hpp) declares the algebra.
template <class Derived, class T> class row_loss {
public:
  using value_type = T;

  /// The reduced value. `scores` is rows × classes, of T (or 16-bit storage where T is float);
  /// `target` is one label per row, of any integral type, or rows × classes soft targets.
  template <class X, class Y>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& target,
                                                const call_options<T>& call = {}) const {
    return run<false>(core::as_matrix(scores), target, matrix_view<T>(), call);
  }

  /// The reduced value, and its gradient with respect to the scores, written (or added) to
  /// `gradient`: a buffer of its own, or the scores themselves.
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& target, G&& gradient, const call_options<T>& call = {}) const {
    return run<true>(core::as_matrix(scores), target, core::as_matrix(gradient), call);
  }

protected:
  /// Checks a job, settles its scale and runs it with the formula that visit(job, f) hands to f.
  template <bool Gradient, class Visit>
  T evaluate(core::row_job<T>& job, const call_options<T>& call, Visit visit) const {
    core::check_matrices(self().name, job, call, Gradient);
    const double share = core::settle(facts(), job, call);
    double total = 0;
    if (job.scores.rows > 0)
      visit(job, [&](const auto& formula) {
        total = core::run_rows<Gradient>(formula, job, call.run_on, call.memory);
      });
    return reduced(total, share);
  }
  /// For a head: a job whose scores have a shape, but no memory. run(formula) makes of it the sum
  /// of the rows' weighted values, and their gradients.
  template <class Run> T drive(core::row_job<T>& job, const call_options<T>& call, Run run) const {
    const double share = core::settle(facts(), job, call);
    double total = 0;
    self().visit(job, [&](const auto& formula) { total = run(formula); });
    return reduced(total, share);
  }
  template <class L> void set_labels(core::row_job<T>& job, vector_view<L> labels) const {
    check_size("labels", labels.size, job.scores.rows);
    require_memory("labels", labels.data, labels.size);
    job.labels = labels.data ? static_cast<const void*>(labels.data) : this;
    job.label_reader = &core::read_labels<std::remove_const_t<L>>;
    job.label_stride = labels.stride;
  }
  void require_memory(const char* what, const void* data, index elements) const {
    core::require_memory(self().name, what, data, elements);
  }
  void check_size(const char* what, index got, index expected) const {
    core::require_size(self().name, what, got, expected);
  }

  /// For losses of two matrices, `what` being the second: the job of the gradient of the first.
  template <class X, class A, class G>
  core::row_job<T> paired_job(const matrix_view<X>& first, const matrix_view<A>& second,
                              const matrix_view<G>& gradient, const char* what) const {
    core::row_job<T> job;
    job.name = self().name;
    job.scores = core::matrix_data<T>(first);
    job.soft = core::matrix_data<T>(second);
    job.gradient = core::matrix_data<T, true>(gradient);
    if (second.rows != first.rows) // no text, and no heap, before
      check_size((std::string("rows of ") + what).c_str(), second.rows, first.rows);
    if (second.cols != first.cols)
      check_size((std::string("columns of ") + what).c_str(), second.cols, first.cols);
    require_memory(what, job.soft.data, second.rows * second.cols);
    return job;
  }
  /// For those that write both gradients, in a pass each that reads both matrices: what the second
  /// pass would find wrong with `gradient`, its own, must be found before the first one writes.
  template <class X, class A, class G, class H>
  void check_pair(const matrix_view<X>& first, const matrix_view<A>& second,
                  const matrix_view<G>& gradient, const matrix_view<H>& other_gradient,
                  const char* rows, const char* columns, const char* memory) const {
    const core::extent all[] = {core::bytes_of(core::matrix_data<T, true>(gradient)),
                                core::bytes_of(core::matrix_data<T, true>(other_gradient)),
                                core::bytes_of(core::matrix_data<T>(first)),
                                core::bytes_of(core::matrix_data<T>(second))};
    core::require_apart(self().name, all, 2);
    check_size(rows, gradient.rows, first.rows);
    check_size(columns, gradient.cols, first.cols);
    require_memory(memory, gradient.data, gradient.rows * gradient.cols);
  }

  double label_weight(index) const { return 1; }
  bool has_label_weights() const { return true; }
  void check(const core::row_job<T>&) const {}

private:
  friend core::row_head;
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  template <bool Gradient, class S, class Y, class G>
  T run(matrix_view<S> scores, Y& target, matrix_view<G> gradient,
        const call_options<T>& call) const {
    core::row_job<T> job;
    job.name = self().name;
    job.scores = core::matrix_data<T>(scores);
    job.gradient = core::matrix_data<T, true>(gradient);
    if constexpr (core::labels_like<Y>) {
      set_labels(job, core::as_vector(target));
    } else {
      static_assert(core::scores_like<Y, T> && Derived::takes_soft_targets,
                    "the target must be a vector of integral labels, or (for losses that take "
                    "them) a matrix of probabilities of the compute or a 16-bit type");
      const auto soft = core::as_matrix(target);
      check_size("target rows", soft.rows, scores.rows);
      check_size("target columns", soft.cols, scores.cols);
      require_memory("target", soft.data, soft.rows * soft.cols);
      job.soft = core::matrix_data<T>(soft);
    }
    return run_job<Gradient>(job, call);
  }
  template <bool Gradient> T run_job(core::row_job<T>& job, const call_options<T>& call) const {
    return evaluate<Gradient>(job, call,
                              [this](const auto& settled, auto f) { self().visit(settled, f); });
  }

  static T reduced(double total, double share) {
    return static_cast<T>(share == 0 ? 0 : total * share);
  }
  core::row_facts<T> facts() const {
    using plain_label_weight = double (row_loss::*)(index) const;
    constexpr bool plain = std::is_same_v<decltype(&Derived::label_weight), plain_label_weight>;
    const auto& options = self().settings();
    return {self().name,
            Derived::has_softmax,
            options.ignore_index,
            options.reduction,
            this,
            &check_job,
            !plain && self().has_label_weights() ? &weigh : nullptr};
  }
  static void check_job(const void* loss, const core::row_job<T>& job) {
    static_cast<const row_loss*>(loss)->self().check(job);
  }
  static void weigh(const void* loss, const std::int64_t* labels, index n, double* weights) {
    const Derived& derived = static_cast<const row_loss*>(loss)->self();
    for (index i = 0; i < n; ++i)
      if (labels[i] != derived.settings().ignore_index)
        weights[i] = derived.label_weight(static_cast<index>(labels[i]));
  }
};

template <class Loss, class T, class L>
void core::row_head::set_labels(const Loss& loss, row_job<T>& job, vector_view<L> labels) {
  static_cast<const row_loss<Loss, T>&>(loss).set_labels(job, labels);
}
template <class Loss, class T, class Run>
T core::row_head::drive(const Loss& loss, row_job<T>& job, const call_options<T>& call, Run run) {
  return static_cast<const row_loss<Loss, T>&>(loss).drive(job, call, run);
}

} // namespace perdita::inline PERDITA_ABI
