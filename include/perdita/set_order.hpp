// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// Which orderings order_search counts.
enum class orderings { best, any, all };

namespace core {

template <class T> struct order_job {
  matrix_data<T> scores;
  matrix_data<T, true> gradient;
  orderings kind = orderings::best;
  const call_options<T>* call = nullptr;
  double share = 1;
  bool has_gradient = false;
};

/// One worker's sets.
template <class T> class order_pass {
  using W = pack<double>;

public:
  order_pass(carver& c, const order_job<T>& job) : job_(job), width_(whole_packs(job.scores.cols)) {
    for (double** row : {&score_, &slope_})
      *row = c.take<double>(static_cast<std::size_t>(width_));
    buffer_ = c.take<T>(static_cast<std::size_t>(width_));
  }

  double run(index r) {
    const double weight = weight_of(*job_.call, r);
    double value = 0;
    std::fill_n(slope_, width_, 0.0);
    if (weight != 0 && job_.scores.cols > 0) {
      read_row(job_.scores, r, buffer_, score_);
      value = value_and_slope() * weight;
    }
    if (job_.call->values.data)
      job_.call->values[r] = static_cast<T>(value);
    if (job_.has_gradient && (weight != 0 || !job_.call->accumulate)) {
      const double scale =
          static_cast<double>(job_.call->scale) * job_.share * weight * upstream_of(*job_.call, r);
      for (index j = 0; j < width_; j += per_pack)
        (W::load(slope_ + j) * scale).store(slope_ + j);
      write_row(job_.gradient, r, slope_, job_.call->accumulate, buffer_);
    }
    return value;
  }

private:
  double value_and_slope() {
    if (!settle_scores(score_, width_)) {
      std::fill_n(slope_, width_, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    if (job_.kind == orderings::all)
      return mean();
    const double top = lower_to_0(score_, width_);
    const index best = std::find(score_, score_ + width_, 0.0) - score_;
    if (best == width_) // none is possible
      return -no_score;
    if (job_.kind == orderings::best) {
      slope_[best] = -1;
      return -top;
    }
    const double sum = images_of(score_, width_, slope_);
    for (index j = 0; j < width_; j += per_pack)
      (W::load(slope_ + j) * (-1 / sum)).store(slope_ + j);
    return -(top + log_of(sum));
  }
  double mean() {
    const double share = 1 / static_cast<double>(job_.scores.cols);
    exact_sum total;
    for (index j = 0; j < job_.scores.cols; ++j) {
      total.add(score_[j]);
      slope_[j] = -share;
    }
    return -total.value() * share;
  }

  const order_job<T>& job_;
  index width_;
  double *score_, *slope_;
  T* buffer_;
};

template <class T> struct assignment_job {
  matrix_data<T> scores;
  matrix_data<T, true> gradient;
  integer_rows items, sizes;
  index sets = 0, positions = 0;
  const call_options<T>* call = nullptr;
  double share = 1;
  bool has_gradient = false;

  index size(index b) const { return static_cast<index>(sizes.at(0, b)); }
};

/// The assignment of n columns to n rows with the smallest sum of costs (Kuhn 1955, Munkres 1957,
/// by shortest augmenting paths): row_of[j] of column j. All arrays but cost have n + 1 elements.
struct assignment {
  index n;
  const double* cost; ///< n × n
  double *row_price, *col_price, *slack;
  index *row_of, *before;
  unsigned char* done;

  /// 1-based inside; element 0 stands for the row that is being placed.
  void solve() const {
    std::fill_n(row_price, n + 1, 0.0);
    std::fill_n(col_price, n + 1, 0.0);
    std::fill_n(row_of, n + 1, index{0});
    for (index row = 1; row <= n; ++row)
      place(row);
    for (index j = 0; j < n; ++j)
      row_of[j] = row_of[j + 1] - 1;
  }

private:
  void place(index row) const {
    std::fill_n(slack, n + 1, std::numeric_limits<double>::infinity());
    std::fill_n(done, n + 1, static_cast<unsigned char>(0));
    row_of[0] = row;
    index at = 0;
    do {
      done[at] = 1;
      const index i = row_of[at];
      index next = 0;
      double least = std::numeric_limits<double>::infinity();
      for (index j = 1; j <= n; ++j) {
        if (done[j])
          continue;
        const double reduced = cost[(i - 1) * n + j - 1] - row_price[i] - col_price[j];
        if (reduced < slack[j])
          slack[j] = reduced, before[j] = at;
        if (slack[j] < least)
          least = slack[j], next = j;
      }
      for (index j = 0; j <= n; ++j)
        if (done[j])
          row_price[row_of[j]] += least, col_price[j] -= least;
        else
          slack[j] -= least;
      at = next;
    } while (row_of[at] != 0);
    for (; at != 0; at = before[at])
      row_of[at] = row_of[before[at]];
  }
};

/// One worker's sets.
template <class T> class assignment_pass {
public:
  assignment_pass(carver& c, const assignment_job<T>& job)
      : job_(job), classes_(whole_packs(job.scores.cols)) {
    const auto n = static_cast<std::size_t>(std::min(job.positions, job.items.cols)),
               classes = static_cast<std::size_t>(classes_);
    cost_ = c.take<double>(n * n);
    for (double** row : {&found_.row_price, &found_.col_price, &found_.slack})
      *row = c.take<double>(n + 1);
    found_.row_of = c.take<index>(n + 1);
    found_.before = c.take<index>(n + 1);
    found_.done = c.take<unsigned char>(n + 1);
    for (std::int64_t** row : {&item_, &said_})
      *row = c.take<std::int64_t>(n);
    score_ = c.take<double>(classes);
    slope_ = c.take<double>(classes);
    buffer_ = c.take<T>(classes);
  }

  double run(index b) {
    const double weight = weight_of(*job_.call, b);
    const index n = weight != 0 ? job_.size(b) : 0;
    const bool defined = search(b, n);
    const double scale =
        static_cast<double>(job_.call->scale) * job_.share * weight * upstream_of(*job_.call, b);
    exact_sum total;
    for (index t = 0; t < job_.positions; ++t) {
      if (t < n)
        total.add(compare(b, t, defined, scale));
      else
        std::fill_n(slope_, classes_, 0.0);
      if (job_.has_gradient && (t < n || !job_.call->accumulate))
        write_row(job_.gradient, b * job_.positions + t, slope_, job_.call->accumulate, buffer_);
    }
    const double value = total.value() * weight;
    if (job_.call->values.data)
      job_.call->values[b] = static_cast<T>(value);
    return weight != 0 ? value : 0;
  }
  /// said()[t]: the item of position t; false where a score is no number, and it is any.
  bool search(index b, index n) {
    job_.items.read(b, 0, n, item_);
    bool defined = true;
    double most = 0;
    for (index t = 0; t < n; ++t) {
      read_row(job_.scores, b * job_.positions + t, buffer_, score_);
      defined = settle_scores(score_, classes_) && defined;
      lower_to_0(score_, classes_); // no assignment is worth more or less for it
      for (index i = 0; i < n; ++i) {
        const double cost = cost_[t * n + i] = -score_[item_[i]];
        most = std::max(most, cost < -no_score ? cost : 0);
      }
    }
    if (!defined) {
      std::copy_n(item_, n, said_);
      return false;
    }
    for (index i = 0; i < n * n; ++i) // more than any assignment without it
      cost_[i] = cost_[i] < -no_score ? cost_[i] : static_cast<double>(n + 1) * (1 + most);
    found_.n = n;
    found_.cost = cost_;
    found_.solve();
    for (index i = 0; i < n; ++i)
      said_[found_.row_of[i]] = item_[i];
    return true;
  }
  const std::int64_t* said() const { return said_; }

private:
  double compare(index b, index t, bool defined, double scale) {
    if (!defined) {
      std::fill_n(slope_, classes_, std::numeric_limits<double>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    read_row(job_.scores, b * job_.positions + t, buffer_, score_);
    settle_scores(score_, classes_);
    const double value =
        cross_entropy_among(score_, classes_, static_cast<index>(said_[t]), slope_);
    for (index j = 0; j < classes_; j += per_pack)
      (pack<double>::load(slope_ + j) * scale).store(slope_ + j);
    return value;
  }

  const assignment_job<T>& job_;
  index classes_;
  assignment found_{};
  double *cost_, *score_, *slope_;
  std::int64_t *item_, *said_;
  T* buffer_;
};

} // namespace core

/// Order search: the loss of a set that a model says one by one, from the log-probabilities ℓ_π
/// that it gives to orderings π of the set (all of them, or a sample).
///
///   orderings::best:  −max ℓ_π             ∂/∂ℓ_π = −[π is the first that attains it]
///   orderings::any:   −log Σ e^{ℓ_π}       ∂/∂ℓ_π = −softmax(ℓ)_π: the set, in whatever order
///   orderings::all:   −(1/n) Σ ℓ_π         ∂/∂ℓ_π = −1/n: uniform, the usual warm-up
///
/// Instead of the best, an ordering may be drawn with probability e^{ℓ_π}/Σ: then its −ℓ_π is the
/// loss, for which nothing is needed here. The gradients go on to the model that made the ℓ, as
/// upstream of its own losses.
///
/// Shapes: sets × orderings, of T or (for float) of 16 bits. Reduction over sets, weights, values:
/// as in call_options, a set being a row. The gradient may lie on the ℓ.
/// Special values: -inf (or below −2^1000) is no ordering; where there is no other: +inf and a
/// gradient of 0, and +inf for `all` if there is one at all. NaN, +inf or more than 2^1000: NaN in
/// the row's value and gradient. No orderings: 0.
///
/// Computed in double. Same bits for any number of threads. Throws std::invalid_argument.
/// Source: Vinyals, Bengio, Kudlur, "Order matters: sequence to sequence for sets", ICLR 2016.
///
///   perdita::order_search<float> search({.kind = perdita::orderings::best});
///   float value = search(log_probabilities, d_log_probabilities);
template <class T = float> class order_search {
public:
  using value_type = T;
  struct options {
    orderings kind = orderings::best;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "order_search";

  order_search() : order_search(options{}) {}
  explicit(false) order_search(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
    core::require_enumerator(name, "kind", o.kind, orderings::all, "best, any or all");
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X>
  requires core::scores_like<X, T> T operator()(X&& log_probabilities,
                                                const call_options<T>& call = {}) const {
    core::order_job<T> job;
    set_inputs(job, core::as_matrix(log_probabilities), call);
    return run(job);
  }
  /// The reduced value, and its gradient, written or added to the last.
  template <class X, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& log_probabilities, G&& gradient, const call_options<T>& call = {}) const {
    core::order_job<T> job;
    set_inputs(job, core::as_matrix(log_probabilities), call);
    job.gradient = core::matrix_data<T, true>(core::as_matrix(gradient));
    job.has_gradient = true;
    checks.gradient(job.scores, job.gradient, call.accumulate);
    return run(job);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class S>
  void set_inputs(core::order_job<T>& job, matrix_view<S> scores,
                  const call_options<T>& call) const {
    job.scores = core::matrix_data<T>(scores);
    job.kind = options_.kind;
    job.call = &call;
    checks.memory("log_probabilities", scores.data, scores.rows * scores.cols);
    checks.call(call, scores.rows, false, "as many as there are sets");
  }
  T run(core::order_job<T>& job) const {
    job.share = core::share_of(*job.call, options_.reduction, job.scores.rows);
    const double total = core::sum_of_sequences<T>(
        job.scores.rows, *job.call, [&](core::carver& c) { return core::order_pass<T>(c, job); });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }

  options options_;
};

/// Cross-entropy of a set of items, in the best order: order search where each position is
/// predicted by itself, so that the best of the n! orderings is an assignment.
///
///   ℓ = min_π Σ_{t<n} −log softmax(x_t)_{y_π(t)}
///   ∂ℓ/∂x_tk = p_t(k) − [k = y_π(t)] for the best π
///
/// Shapes: scores (sets · positions) × classes, position t of set b being row b·positions + t, of T
/// or (for float) of 16 bits; positions first: as in linear_chain_crf. Items: a matrix of any
/// integral type, sets × the largest set, padded with anything; an item may come twice. Sizes: one
/// for each set, of at most so many positions; positions from the size on are not read, gradient 0.
///
/// Reduction over sets, weights, by-products (values): as in call_options, a set being a row. The
/// gradient may lie on the scores.
///
/// Special values: -inf (or below −2^1000) is a masked class. Where every order has a masked item,
/// one with the fewest of them, value +inf. NaN, +inf or a score above 2^1000 in a set: NaN in its
/// value and gradient, and in no other's. Of equal orders, any, but always the same.
///
/// Computed in double, in n³ operations. Same bits for any number of threads. Throws
/// std::invalid_argument.
/// Source: Vinyals, Bengio, Kudlur, "Order matters: sequence to sequence for sets", ICLR 2016;
/// Kuhn, "The Hungarian method for the assignment problem", 1955.
///
///   perdita::set_cross_entropy<float> loss;
///   float value = loss(scores, items, sizes, d_scores);
///   loss.order(scores, items, sizes, ordered);   // the items in that order
template <class T = float> class set_cross_entropy {
public:
  using value_type = T;
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "set_cross_entropy";

  set_cross_entropy() : set_cross_entropy(options{}) {}
  explicit(false) set_cross_entropy(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class X, core::label_rows Y, core::labels_like N>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& items, N&& sizes,
                                                const call_options<T>& call = {}) const {
    core::assignment_job<T> job;
    set_inputs(job, core::as_matrix(scores), core::as_matrix(items), core::as_vector(sizes), call);
    return run(job);
  }
  /// The reduced value, and its gradient, written or added to the last.
  template <class X, core::label_rows Y, core::labels_like N, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& items, N&& sizes, G&& gradient,
                   const call_options<T>& call = {}) const {
    core::assignment_job<T> job;
    set_inputs(job, core::as_matrix(scores), core::as_matrix(items), core::as_vector(sizes), call);
    job.gradient = core::matrix_data<T, true>(core::as_matrix(gradient));
    job.has_gradient = true;
    checks.gradient(job.scores, job.gradient, call.accumulate);
    return run(job);
  }
  /// The items of each set in its best order, written to a matrix like that of the items; what is
  /// after a set's size stays. Where a score is no number, any order. row_weights, upstream,
  /// normaliser and values belong to the loss, and are refused.
  template <class X, core::label_rows Y, core::labels_like N, core::label_rows O>
  requires core::scores_like<X, T>
  void order(X&& scores, Y&& items, N&& sizes, O&& ordered,
             const call_options<T>& call = {}) const {
    core::assignment_job<T> job;
    set_inputs(job, core::as_matrix(scores), core::as_matrix(items), core::as_vector(sizes), call);
    checks.search(call);
    if (call.values.data)
      core::fail(name, "values", "given", "none: an order has no value");
    const auto out = core::as_matrix(ordered);
    checks.size("rows of the ordered items", out.rows, job.sets, "the rows that the items have");
    checks.size("columns of the ordered items", out.cols, job.items.cols,
                "the columns that the items have");
    checks.memory("ordered items", out.data, out.rows * out.cols);
    core::sum_of_sequences<T>(job.sets, call, [&](core::carver& c) {
      return writer<decltype(out)>{core::assignment_pass<T>(c, job), job, out};
    });
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class M> struct writer {
    core::assignment_pass<T> pass;
    const core::assignment_job<T>& job;
    M out;
    double run(index b) {
      pass.search(b, job.size(b));
      for (index t = 0; t < job.size(b); ++t)
        out(b, t) = static_cast<std::remove_reference_t<decltype(out(0, 0))>>(pass.said()[t]);
      return 0;
    }
  };

  template <class S, class I, class N>
  void set_inputs(core::assignment_job<T>& job, matrix_view<S> scores, matrix_view<I> items,
                  vector_view<N> sizes, const call_options<T>& call) const {
    job.scores = core::matrix_data<T>(scores);
    job.items = core::integer_rows(items);
    job.sets = items.rows;
    job.positions = job.sets > 0 ? scores.rows / job.sets : 0;
    job.call = &call;
    checks.size("score rows", scores.rows, job.sets * job.positions,
                "as many for every set, of which there is one for each row of items");
    checks.memory("scores", scores.data, scores.rows * scores.cols);
    checks.memory("items", items.data, items.rows * items.cols);
    core::require(items.plane_rows == items.rows, name, "plane_rows of the items", items.plane_rows,
                  "all rows in one plane");
    checks.lengths("sizes", job.sizes, sizes, job.sets, std::min(job.positions, items.cols));
    checks.call(call, job.sets, false, "as many as there are sets");
    for (index b = 0; b < job.sets; ++b)
      for (index i = 0; i < job.size(b); ++i)
        if (const std::int64_t y = job.items.at(b, i); y < 0 || y >= scores.cols)
          core::fail_at(name, "items", b * items.cols + i, core::to_text(y),
                        "0 to " + core::to_text(scores.cols - 1));
  }
  T run(core::assignment_job<T>& job) const {
    job.share = core::share_of(*job.call, options_.reduction, job.sets);
    const double total = core::sum_of_sequences<T>(
        job.sets, *job.call, [&](core::carver& c) { return core::assignment_pass<T>(c, job); });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
