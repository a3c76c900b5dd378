// SPDX-License-Identifier: MIT
#pragma once

/// Losses of ranking: of two scores of which the first should be the higher (bpr), and of lists of
/// items, a query each, whose order or relevance is known.
///
/// Lists (listnet, listmle, lambda_loss). Shapes: scores, targets and gradient are queries × items,
/// of T (or 16-bit storage where T is float). Lists of different lengths: `lengths`, one integer
/// for each query, of 0 to items; what follows in a row is not looked at, and its gradient is 0.
///
///   loss(scores, targets);           loss(scores, targets, lengths);
///   loss(scores, targets, gradient); loss(scores, targets, lengths, gradient);
///
/// An empty list is worth 0 and counts for the mean. The gradient may be the scores themselves,
/// else it lies apart from both. Call options as for losses of rows, a query being a row; no
/// by-products but `values`. All is computed in double; no bit depends on the number of threads.
/// NaN or infinity, where a loss does not say what it means, makes its list NaN and no other. To
/// check a given order a call allocates a number per item of the longest list, beside
/// call_options::memory. Throws std::invalid_argument.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/element_kernel.hpp"
#include "core/sequences.hpp"
#include "margin.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct bpr_formula : element_formula {
  static constexpr int slopes = 2;
  T margin;

  template <class V>
  PERDITA_INLINE element_outcome_of_two<V> operator()(const V& preferred, const V& other) const {
    const auto found = logistic_function()((preferred - other) - V(margin));
    return {{found.value, found.slope, found.curvature}, -found.slope, found.curvature};
  }
};

template <class T> struct list_job {
  matrix_data<T> scores, targets;
  integer_rows order; ///< in place of targets
  integer_rows lengths;
  matrix_data<T, true> gradient;
  const call_options<T>* call;
  double share;

  index length(index query) const {
    return lengths.data ? static_cast<index>(lengths.at(0, query)) : scores.cols;
  }
};

/// One list: the arrays are padded to whole packs, the scores with -inf.
struct list_row {
  index size = 0, padded = 0;
  index ordered = 0; ///< how many of `order` are given; 0: targets are
  double *scores, *targets, *slopes, *spare[3];
  exact_sum* sums;
  index* order;

  /// The items from the highest key to the lowest; of equals, the first comes first.
  void sort_by(const double* key) {
    for (index i = 0; i < size; ++i)
      order[i] = i;
    std::sort(order, order + size,
              [key](index a, index b) { return key[a] > key[b] || (key[a] == key[b] && a < b); });
  }
  /// Whether test(x) holds of all scores.
  template <class F> static bool all_of(const double* x, index n, F test) {
    for (index i = 0; i < n; ++i)
      if (!test(x[i]))
        return false;
    return true;
  }
};

/// log(1 + e^x), and the shares 1/(1 + e^−x) and 1/(1 + e^x).
struct softplus_parts {
  double value, above, below;

  explicit softplus_parts(double x) {
    const double e = std::exp(-std::fabs(x)), large = 1 / (1 + e), small = e * large;
    value = std::max(x, 0.0) + std::log1p(e);
    above = x > 0 ? large : small;
    below = x > 0 ? small : large;
  }
};

/// A formula's operator()(list_row&) returns the value and writes the slopes of size items; NaN
/// stands for both.
template <class T, class Formula> class list_pass {
public:
  list_pass(carver& memory, const list_job<T>& job, const Formula& formula)
      : job_(job), formula_(formula) {
    row_.padded = whole_packs(job.scores.cols);
    const auto n = static_cast<std::size_t>(row_.padded);
    for (double** array : {&row_.scores, &row_.targets, &row_.slopes, &row_.spare[0],
                           &row_.spare[1], &row_.spare[2]})
      *array = memory.take<double>(n);
    row_.sums = memory.take<exact_sum>(n);
    row_.order = memory.take<index>(n);
    stage_ = memory.take<T>(n);
  }

  double run(index query) {
    const auto& call = *job_.call;
    const double weight = weight_of(call, query);
    double value = 0;
    row_.size = weight == 0 ? 0 : job_.length(query);
    if (row_.size > 0) {
      read(query);
      value = formula_(row_);
    }
    if (job_.gradient)
      write(query, value, weight * upstream_of(call, query) * static_cast<double>(call.scale));
    if (weight != 0)
      value *= weight;
    if (call.values.data)
      call.values[query] = static_cast<T>(value);
    return value;
  }

private:
  void read(index query) {
    const index n = row_.size;
    read_row(job_.scores, query, stage_, row_.scores);
    std::fill(row_.scores + n, row_.scores + row_.padded, no_score);
    if (job_.targets) {
      read_row(job_.targets, query, stage_, row_.targets);
      std::fill(row_.targets + n, row_.targets + row_.padded, no_score);
    } else {
      read_order(query);
    }
  }
  /// Those that no place is given follow in any order: their places do not matter.
  void read_order(index query) {
    const index n = row_.size;
    row_.ordered = std::min(n, job_.order.cols);
    double* const placed = row_.targets;
    std::fill(placed, placed + n, 0.0);
    for (index j = 0; j < row_.ordered; ++j) {
      row_.order[j] = static_cast<index>(job_.order.at(query, j));
      placed[row_.order[j]] = 1;
    }
    for (index i = 0, next = row_.ordered; i < n; ++i)
      if (placed[i] == 0)
        row_.order[next++] = i;
  }
  void write(index query, double value, double scale) {
    double* const slopes = row_.slopes;
    std::fill(slopes + row_.size, slopes + row_.padded, 0.0);
    const double factor = scale * job_.share;
    for (index i = 0; i < row_.size; ++i)
      slopes[i] = value == value ? slopes[i] * factor : value;
    write_row(job_.gradient, query, slopes, job_.call->accumulate, stage_);
  }

  const list_job<T>& job_;
  const Formula& formula_;
  list_row row_;
  T* stage_;
};

/// Base of losses of lists: the calls and their checks. Derived has name, takes_order, settings()
/// with a reduction, and formula().
template <class Derived, class T> class list_loss {
public:
  using value_type = T;

  /// The reduced value.
  template <class X, class Y>
  requires scores_like<X, T> &&(scores_like<Y, T> || label_rows<Y>)T
  operator()(X&& scores, Y&& targets, const call_options<T>& call = {}) const {
    auto job = make_job(scores, targets, call);
    return run(job);
  }
  template <class X, class Y, labels_like L>
  requires scores_like<X, T> &&(scores_like<Y, T> || label_rows<Y>)T
  operator()(X&& scores, Y&& targets, L&& lengths, const call_options<T>& call = {}) const {
    auto job = make_job(scores, targets, call);
    set_lengths(job, as_vector(lengths));
    return run(job);
  }
  /// The reduced value, and its gradient with respect to the scores.
  template <class X, class Y, class G>
  requires scores_like<X, T> &&(scores_like<Y, T> || label_rows<Y>)&&gradient_like<G, T> T
  operator()(X&& scores, Y&& targets, G&& gradient, const call_options<T>& call = {}) const {
    auto job = make_job(scores, targets, call);
    set_gradient(job, as_matrix(gradient));
    return run(job);
  }
  template <class X, class Y, labels_like L, class G>
  requires scores_like<X, T> &&(scores_like<Y, T> || label_rows<Y>)&&gradient_like<G, T> T
  operator()(X&& scores, Y&& targets, L&& lengths, G&& gradient,
             const call_options<T>& call = {}) const {
    auto job = make_job(scores, targets, call);
    set_lengths(job, as_vector(lengths));
    set_gradient(job, as_matrix(gradient));
    return run(job);
  }

private:
  static constexpr sequence_checks<T> checks() { return {Derived::name}; }

  template <class X, class Y>
  list_job<T> make_job(X& scores, Y& targets, const call_options<T>& call) const {
    list_job<T> job{matrix_data<T>(as_matrix(scores)), {}, {}, {}, {}, &call, 1};
    const index queries = job.scores.rows, items = job.scores.cols;
    checks().memory("scores", job.scores.data, queries * items);
    const auto given = as_matrix(targets);
    checks().size("rows of the targets", given.rows, queries, "as many as the scores have");
    checks().memory("targets", given.data, given.rows * given.cols);
    if constexpr (label_rows<Y>) {
      static_assert(Derived::takes_order, "the targets must be numbers of the compute type");
      require(given.cols <= items && (given.cols > 0 || queries * items == 0), Derived::name,
              "columns of the order", given.cols, "1 or more, and no more than the scores have");
      job.order = integer_rows(given);
    } else {
      checks().size("columns of the targets", given.cols, items, "as many as the scores have");
      job.targets = matrix_data<T>(given);
    }
    checks().call(call, queries, false, "as many as there are queries");
    return job;
  }
  template <class I> void set_lengths(list_job<T>& job, vector_view<I> lengths) const {
    checks().lengths("lengths", job.lengths, lengths, job.scores.rows, job.scores.cols);
  }
  template <class G> void set_gradient(list_job<T>& job, const matrix_view<G>& gradient) const {
    job.gradient = matrix_data<T, true>(gradient);
    checks().gradient(job.scores, job.gradient, job.call->accumulate);
    const extent both[] = {bytes_of(job.gradient), bytes_of(job.targets)};
    require_apart(Derived::name, both, 1);
  }
  /// That the order of each list names its items, each at most once.
  void check_order(const list_job<T>& job) const {
    std::vector<index> last(static_cast<std::size_t>(job.scores.cols), -1);
    for (index q = 0; q < job.scores.rows; ++q) {
      const index n = job.length(q), places = std::min(n, job.order.cols);
      for (index j = 0; j < places; ++j) {
        const std::int64_t item = job.order.at(q, j);
        if (item < 0 || item >= n || last[static_cast<std::size_t>(item)] == q)
          fail_at(Derived::name, "order", q * job.order.cols + j, to_text(item),
                  "an item of the list, 0 to " + to_text(n - 1) + ", that has no place yet");
        last[static_cast<std::size_t>(item)] = q;
      }
    }
  }
  T run(list_job<T>& job) const {
    const auto& self = static_cast<const Derived&>(*this);
    if (job.order.data)
      check_order(job);
    job.share = share_of(*job.call, self.settings().reduction, job.scores.rows);
    const auto formula = self.formula();
    const double total = sum_of_sequences<T>(job.scores.rows, *job.call, [&](carver& c) {
      return list_pass<T, decltype(self.formula())>(c, job, formula);
    });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }
};

} // namespace core

/// What the targets of listnet are.
enum class list_target {
  relevances,   ///< scores, of which the softmax is the target
  probabilities ///< the target itself, 0 or more, which need not add up to 1
};

/// How lambda_loss weighs a pair. Positions i, j = 1, 2, … by score, D_i = log2(1 + i),
/// G_i = (2^y_i − 1)/maxDCG.
enum class lambda_weights {
  ranknet,        ///< 1
  lambda_rank,    ///< |1/D_i − 1/D_j| |G_i − G_j|, by which swapping the two changes NDCG
  ndcg_loss1,     ///< G_i/D_i, of all pairs, i = j too
  ndcg_loss2,     ///< |1/D_|i−j| − 1/D_(|i−j|+1)| |G_i − G_j|
  ndcg_loss2_plus ///< μ times ndcg_loss2 and lambda_rank: NDCG-Loss2++
};

namespace core {

struct listnet_formula {
  list_target kind;

  double operator()(list_row& row) const {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const auto sound = [](double x) { return x < std::numeric_limits<double>::infinity(); };
    if (!list_row::all_of(row.scores, row.size, sound) ||
        !list_row::all_of(row.targets, row.size, [&](double y) {
          return sound(y) && (kind == list_target::relevances || y > no_score);
        }))
      return nan;
    double *const s = row.scores, *const p = row.slopes, *const q = row.spare[0];
    const double log_sum = make_softmax(s, row.padded, p);
    double mass = 1;
    if (kind == list_target::relevances) {
      if (std::isnan(make_softmax(row.targets, row.padded, q)))
        return nan;
    } else {
      std::copy(row.targets, row.targets + row.size, q);
      exact_sum sum;
      for (index i = 0; i < row.size; ++i)
        sum.add(q[i]);
      mass = sum.value();
    }
    if (std::isnan(log_sum))
      return nan;
    exact_sum value;
    for (index i = 0; i < row.size; ++i) {
      if (q[i] != 0)
        value.add(q[i] * (log_sum - s[i]));
      p[i] = mass * p[i] - q[i];
    }
    return value.value();
  }

private:
  /// x less its maximum and p = softmax(x); returns log Σ e^x of what x became, with the digits of
  /// what little it is where one leads. NaN where all is masked.
  static double make_softmax(double* x, index n, double* p) {
    lower_to_0(x, n);
    images_of(x, n, p);
    const double* const top = std::find(x, x + n, 0.0);
    if (top == x + n)
      return std::numeric_limits<double>::quiet_NaN();
    const index leader = top - x;
    exact_sum rest;
    for (index i = 0; i < n; ++i)
      if (i != leader)
        rest.add(p[i]);
    const double sum = 1 + rest.value();
    for (index i = 0; i < n; ++i)
      p[i] /= sum;
    return std::log1p(rest.value());
  }
};

struct listmle_formula {
  index places; ///< 0: all

  double operator()(list_row& row) const {
    const auto finite = [](double x) { return std::isfinite(x); };
    const index n = row.size;
    if (!list_row::all_of(row.scores, n, finite))
      return std::numeric_limits<double>::quiet_NaN();
    index last = places == 0 ? n : std::min(n, places);
    if (row.ordered > 0) {
      last = std::min(last, row.ordered);
    } else {
      if (!list_row::all_of(row.targets, n, [](double y) { return y == y; }))
        return std::numeric_limits<double>::quiet_NaN();
      row.sort_by(row.targets);
    }
    // From the end: how much likelier all later items are than that of each place, d = LSE − z.
    double *const own = row.spare[0], *const later = row.spare[1];
    suffix behind, tail;
    exact_sum value;
    for (index j = n - 1; j >= 0; --j) {
      const double z = row.scores[row.order[j]];
      if (j < last) {
        const softplus_parts parts(behind.lead_over(z));
        value.add(parts.value);
        own[j] = parts.below;
        later[j] = parts.above;
      }
      behind.add(z);
      if (j == last)
        tail = behind;
    }
    // From the start: `burden` is Σ over the places before of the item's share, over its share
    // among those not placed yet.
    double burden = 0;
    for (index j = 0; j < last; ++j) {
      row.slopes[row.order[j]] = burden * own[j] - later[j];
      burden = (1 + burden) * later[j];
    }
    for (index j = last; j < n; ++j)
      row.slopes[row.order[j]] = burden * tail.share_of(row.scores[row.order[j]]);
    return value.value();
  }

private:
  /// Σ e^z of what was added, as e^shift times a sum. The shift moves where a number is so much
  /// above it that the rounding of what was before hardly counts: for smaller steps it would be
  /// rounded again and again, and for larger ones lead_over() would cancel.
  struct suffix {
    double shift = 0;
    exact_sum sum;

    void add(double z) {
      constexpr double far = 2;
      if (sum.sum == 0 || z > shift + far) {
        const double factor = sum.sum == 0 ? 0 : std::exp(shift - z);
        sum.sum *= factor;
        sum.error *= factor;
        shift = z;
      }
      sum.add(std::exp(z - shift));
    }
    /// log Σ e^z − z; -inf where nothing was added.
    double lead_over(double z) const {
      return sum.sum == 0 ? no_score : (shift - z) + std::log(sum.value());
    }
    double share_of(double z) const { return std::exp(z - shift) / sum.value(); }
  };
};

struct lambda_formula {
  lambda_weights weights;
  double sigma, mu;
  index truncation; ///< 0: none

  double operator()(list_row& row) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const index n = row.size;
    const auto sound = [](double x) { return x >= 0 && x < inf; };
    if (!list_row::all_of(row.scores, n, [](double x) { return std::isfinite(x); }) ||
        !list_row::all_of(row.targets, n, sound))
      return std::numeric_limits<double>::quiet_NaN();
    const index top = truncation == 0 ? n : std::min(n, truncation);
    double *const gain = row.spare[0], *const discount = row.spare[1]; // 1/D of the places
    for (index i = 0; i < n; ++i)
      discount[i] = 1 / std::log2(static_cast<double>(i + 2));
    if (weights != lambda_weights::ranknet && !find_gains(row, top, discount, gain))
      return std::numeric_limits<double>::quiet_NaN();
    row.sort_by(row.scores);

    exact_sum value;
    std::fill(row.sums, row.sums + n, exact_sum{});
    const auto add = [&](index winner, index loser, double weight) {
      if (weight == 0)
        return;
      const softplus_parts parts(sigma * (row.scores[loser] - row.scores[winner]));
      value.add(weight * parts.value);
      const double slope = sigma * weight * parts.above;
      row.sums[winner].add(-slope);
      row.sums[loser].add(slope);
    };
    for (index i = 0; i < top; ++i)
      for (index j = weights == lambda_weights::ndcg_loss1 ? 0 : i + 1; j < top; ++j) {
        const index a = row.order[i], b = row.order[j];
        if (weights == lambda_weights::ndcg_loss1)
          add(a, b, gain[a] * discount[i]);
        else if (row.targets[a] > row.targets[b])
          add(a, b, weigh(i, j, gain[a], gain[b], discount));
        else if (row.targets[b] > row.targets[a])
          add(b, a, weigh(i, j, gain[a], gain[b], discount));
      }
    for (index i = 0; i < n; ++i)
      row.slopes[i] = row.sums[i].value();
    return value.value();
  }

private:
  /// False where they overflow.
  static bool find_gains(list_row& row, index top, const double* discount, double* gain) {
    constexpr double log_2 = 0.693147180559945309417232121458;
    for (index i = 0; i < row.size; ++i)
      gain[i] = std::expm1(row.targets[i] * log_2);
    row.sort_by(row.targets);
    exact_sum ideal;
    for (index i = 0; i < top; ++i)
      ideal.add(gain[row.order[i]] * discount[i]);
    const double most = ideal.value();
    if (!std::isfinite(most))
      return false;
    for (index i = 0; i < row.size && most > 0; ++i)
      gain[i] /= most;
    return true;
  }
  /// Of the items at the places i < j, counted from 0.
  double weigh(index i, index j, double first, double second, const double* discount) const {
    if (weights == lambda_weights::ranknet)
      return 1;
    const double gap = std::fabs(first - second);
    const double swapped = discount[i] - discount[j];
    const double apart = discount[j - i - 1] - discount[j - i];
    if (weights == lambda_weights::lambda_rank)
      return swapped * gap;
    return (weights == lambda_weights::ndcg_loss2 ? apart : mu * apart + swapped) * gap;
  }
};

} // namespace core

/// Bayesian personalised ranking: the score a of what a user chose should be above the score b of
/// something else, by the margin c.
///
///   ℓ = log(1 + e^(c − (a − b))),  ∂ℓ/∂a = −1/(1 + e^((a − b) − c)),  ∂ℓ/∂b = −∂ℓ/∂a
///   ∂²ℓ/∂a² = ∂²ℓ/∂b² = |∂ℓ/∂a| (1 − |∂ℓ/∂a|)
///
/// Vectors or matrices of one shape: a pair per element. No penalty of the embeddings' size is
/// part of it. Scores that are the same infinity make their element NaN; other infinities have
/// their limits. Weights, reductions, call options, errors: as the losses in margin.hpp.
/// Source: Rendle, Freudenthaler, Gantner, Schmidt-Thieme, "BPR: Bayesian personalized ranking from
/// implicit feedback", UAI 2009.
///
///   perdita::bpr<float> loss;
///   float value = loss(chosen, others, d_chosen, d_others);
template <class T = float> class bpr : public element_loss<bpr<T>, T> {
public:
  struct options {
    T margin = 0; ///< c, finite
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "bpr";
  static constexpr element_traits traits{
      .convex = true, .smooth = true, .nonnegative = true, .lipschitz = 1};

  bpr() : bpr(options{}) {}
  explicit(false) bpr(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <class A, class B>
  requires core::reals_like<A, T> && core::reals_like<B, T>
      T operator()(A&& chosen, B&& others, const element_options<T>& call = {}) const {
    const auto f = formula(); // which the job refers to
    auto job = this->make_job(f, chosen, others);
    return this->reduce(job, call);
  }
  template <class A, class B, class G, class H>
  requires core::reals_like<A, T> && core::reals_like<B, T> && core::writable_elements_like<G, T> &&
      core::writable_elements_like<H, T>
          T operator()(A&& chosen, B&& others, G&& chosen_gradient, H&& others_gradient,
                       const element_options<T>& call = {}) const {
    const auto f = formula(); // which the job refers to
    auto job = this->make_job(f, chosen, others);
    set_outputs(job, chosen_gradient, others_gradient);
    return this->reduce(job, call);
  }
  /// ∂²ℓ/∂a² and ∂²ℓ/∂b²
  template <class A, class B, class G, class H>
  requires core::reals_like<A, T> && core::reals_like<B, T> && core::writable_elements_like<G, T> &&
      core::writable_elements_like<H, T>
  void hessian_diagonal(A&& chosen, B&& others, G&& of_chosen, H&& of_others,
                        const element_options<T>& call = {}) const {
    const auto f = formula(); // which the job refers to
    auto job = this->make_job(f, chosen, others);
    job.second_order = true;
    set_outputs(job, of_chosen, of_others);
    this->reduce(job, call);
  }

private:
  core::bpr_formula<T> formula() const { return {{}, options_.margin}; }
  template <class G, class H> void set_outputs(core::element_job<T>& job, G& of_a, H& of_b) const {
    core::set_output(job, 0, "first result", core::as_elements(of_a));
    core::set_output(job, 1, "second result", core::as_elements(of_b));
  }
  options options_;
};

/// ListNet: cross-entropy of the chances of being the first of the list.
///
///   ℓ = −Σ_i q_i log softmax(s)_i,  q = softmax(y),   ∂ℓ/∂s_i = softmax(s)_i − q_i
///
/// y are relevances on the scale of scores: labels 0, 1, …, 4 are no probabilities here. With
/// list_target::probabilities, q are the targets themselves, 0 or more, and
/// ∂ℓ/∂s_i = (Σq) softmax(s)_i − q_i. A score of −∞ is one of no chance: its item has no part
/// where q is 0 (its relevance −∞ too), and else the value is +inf. A list of nothing else is NaN.
/// The published code adds 1e-10 to each probability; nothing is added here. Beginning of
/// list_ranking.hpp: shapes, calls, errors. Source: Cao, Qin, Liu, Tsai, Li, "Learning to rank:
/// from pairwise approach to listwise approach", ICML 2007.
///
///   perdita::listnet<float> loss;
///   float value = loss(scores, relevances, d_scores);
template <class T = float> class listnet : public core::list_loss<listnet<T>, T> {
public:
  struct options {
    list_target target = list_target::relevances; ///< what the targets are
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "listnet";
  static constexpr bool takes_order = false;

  listnet() : listnet(options{}) {}
  explicit(false) listnet(const options& o) : options_(o) {
    core::require_enumerator(name, "target", o.target, list_target::probabilities,
                             "relevances or probabilities");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::list_loss<listnet<T>, T>;
  core::listnet_formula formula() const { return {options_.target}; }
  options options_;
};

/// ListMLE: −log of the likelihood of the right order where the places are given one after another,
/// each by a softmax of the scores of the items that are left (Plackett and Luce).
///
///   ℓ = Σ_j [log Σ_{k ≥ j} e^z_k − z_j],   z_j the score of the item that belongs to place j
///   ∂ℓ/∂z_k = Σ_{j ≤ k} e^z_k / Σ_{i ≥ j} e^z_i − 1
///
/// The targets are relevances (the highest first, of equals the first) or the order itself: an
/// integral matrix of queries × places, whose row has the list's items from the best on, each at
/// most once. With fewer places than items, and with `places` = k, the sum is over the first places
/// only (and no 1 is taken off for items that have none): the likelihood of the top of the list.
/// A list of one item is worth 0. O(n) steps after sorting, from suffix sums and prefix ratios that
/// neither overflow nor cancel: what is near 0 keeps its digits. Scores must be finite, else their
/// list is NaN; relevances may be infinite. Rounding errors of the slopes grow with the length of
/// the list in double; in float they do not. Beginning of list_ranking.hpp: shapes, calls, errors.
/// Source: Xia, Liu, Wang, Zhang, Li, "Listwise approach to learning to rank: theory and
/// algorithm", ICML 2008; the top: Xia, Liu, Li, "Statistical consistency of top-k ranking",
/// NIPS 2009.
///
///   perdita::listmle<float> loss({.places = 10});
///   float value = loss(scores, relevances, lengths, d_scores);
template <class T = float> class listmle : public core::list_loss<listmle<T>, T> {
public:
  struct options {
    index places = 0; ///< k ≥ 0: of the first places only; 0: of all
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "listmle";
  static constexpr bool takes_order = true;

  listmle() : listmle(options{}) {}
  explicit(false) listmle(const options& o) : options_(o) {
    core::require(o.places >= 0, name, "places", o.places, "0 or more");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::list_loss<listmle<T>, T>;
  core::listmle_formula formula() const { return {options_.places}; }
  options options_;
};

/// The LambdaLoss framework: pairs of items in the wrong order, weighed by what their order is
/// worth to NDCG.
///
///   ℓ = Σ_{y_i > y_j} w_ij log(1 + e^(−σ (s_i − s_j)))
///   ∂ℓ/∂s_i = −Σ_j σ w_ij / (1 + e^(σ (s_i − s_j))) over those below it, and the opposite sign for
///   those above
///
/// The weights w (lambda_weights) are made of the targets, relevances y ≥ 0, and of the places of
/// the items by score (of equals the first in the list comes first); they are constants for the
/// gradient, so that the value jumps where two scores change places. `truncation` = k: of pairs
/// with both items among the k best scores, and maxDCG of k places. A list without relevant items
/// is worth 0 (except with the weight 1). Logarithms are natural: divide by log 2 for the binary
/// ones of the paper, and sum over the queries for the authors' reduction. Their code bounds 1/(1 +
/// e^(−σ (s_i − s_j))) by 1e-10 from below, which takes the slope of the worst pairs; not here.
/// Targets that are negative, or that 2^y or maxDCG overflows for, make their list NaN, and so do
/// scores that are not finite. O(n²) for lists of n. Beginning of list_ranking.hpp: shapes, calls,
/// errors. Source: Wang, Li, Golbandi, Bendersky, Najork, "The LambdaLoss framework for ranking
/// metric optimization", CIKM 2018; Burges, "From RankNet to LambdaRank to LambdaMART", 2010.
///
///   perdita::lambda_loss<float> loss({.weights = perdita::lambda_weights::ndcg_loss2_plus});
///   float value = loss(scores, relevances, d_scores);
template <class T = float> class lambda_loss : public core::list_loss<lambda_loss<T>, T> {
public:
  struct options {
    lambda_weights weights = lambda_weights::lambda_rank; ///< w, of pairs
    double sigma = 1;                                     ///< σ > 0: how steep
    double mu = 10;                                       ///< μ ≥ 0, of ndcg_loss2_plus
    index truncation = 0;                                 ///< k ≥ 0; 0: all places
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "lambda_loss";
  static constexpr bool takes_order = false;

  lambda_loss() : lambda_loss(options{}) {}
  explicit(false) lambda_loss(const options& o) : options_(o) {
    core::require_enumerator(name, "weights", o.weights, lambda_weights::ndcg_loss2_plus,
                             "one of lambda_weights");
    core::positive(name, "sigma", o.sigma);
    core::not_negative(name, "mu", o.mu);
    core::require(o.truncation >= 0, name, "truncation", o.truncation, "0 or more");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::list_loss<lambda_loss<T>, T>;
  core::lambda_formula formula() const {
    return {options_.weights, options_.sigma, options_.mu, options_.truncation};
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
