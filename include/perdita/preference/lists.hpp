// SPDX-License-Identifier: MIT
#pragma once

/// Preference losses of lists: K responses to one prompt, with ratings or in order. The engine is
/// that of points.hpp (score → link → reducer); formulas of whole lists are those of
/// list_ranking.hpp.
///
///   s = β (log π(y) − log π_ref(y)), for each candidate; where a loss has no reference or averages
///   over tokens, it says so
///
/// Shapes: matrices are lists × candidates. Lists of different sizes: `candidates`, how many of
/// each row count; what follows is not looked at, nor is a list of row weight 0, and its gradient
/// is 0. A list of none, or without two different ratings where pairs are wanted, is worth 0 and
/// counts for the mean. Calls:
///
///   loss(scores, ratings);   loss(scores, ratings, gradient, call, report)
///
/// Call options as for losses of rows, a list being a row; by-products in sequence_report: a reward
/// is s, and in the summary `chosen` is the best-rated candidate and `rejected` the worst-rated (of
/// equals the first), of lists that have two different ratings.
/// A score or rating that is not finite makes its list NaN and no other, where nothing else is
/// said; an infinite reference is refused. Serial, with memory of its own
/// (run_on and memory are not used); all in double. Throws std::invalid_argument.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <utility>
#include <vector>

#include "../list_ranking.hpp"
#include "points.hpp"

namespace perdita::inline PERDITA_ABI {

/// What is known of lists of sequences.
template <class T> struct list_scores {
  matrix_view<const T> policy;                  ///< log-probabilities, summed over the tokens
  matrix_view<const T> reference{};             ///< the same of the reference model; finite
  matrix_view<const T> previous{};              ///< of the previous iterate, for INPO; finite
  token_counts lengths{};                       ///< tokens, 1 or more, for averages
  vector_view<const std::int64_t> candidates{}; ///< how many of each list; none: all
  vector_view<const T> weights{};               ///< of lists, as those of sequence_scores
};

namespace core {

/// What the score of a list's candidate is: s = β (log π − a log π_ref − b log π_previous)/n^power,
/// b = 0 or 1 − a
struct list_rule {
  double beta = 1, reference = 1, previous = 0;
  double power = 0;          ///< 0: no lengths are asked for
  bool needs_ratings = true; ///< else, without them, candidates are in order of preference
};

/// The memory of one list.
class list_memory {
public:
  explicit list_memory(index most) {
    row.padded = whole_packs(most);
    const auto n = static_cast<std::size_t>(row.padded);
    numbers_.resize(6 * n);
    sums_.resize(n);
    order_.resize(n);
    double* next = numbers_.data();
    for (double** array :
         {&row.scores, &row.targets, &row.slopes, &row.spare[0], &row.spare[1], &row.spare[2]}) {
      *array = next;
      next += n;
    }
    row.sums = sums_.data();
    row.order = order_.data();
  }
  list_memory(const list_memory&) = delete;
  list_memory& operator=(const list_memory&) = delete;

  list_row row; ///< spare[2] is ∂s/∂(log π) of each candidate
private:
  std::vector<double> numbers_;
  std::vector<exact_sum> sums_;
  std::vector<index> order_;
};

template <class T> class list_reducer {
public:
  list_reducer(const char* name, const list_scores<T>& in, const list_rule& rule,
               matrix_view<const T> ratings, matrix_view<T> gradient, const call_options<T>& call,
               const sequence_report<T>& report)
      : in_(in), rule_(rule), ratings_(ratings), gradient_(gradient), call_(call),
        report_(report), checks_{name} {
    const index lists = in.policy.rows, most = in.policy.cols;
    shape("policy", in.policy, true);
    shape("ratings", ratings, rule.needs_ratings);
    shape("gradient", gradient, false);
    shape("reference", in.reference, rule.reference != 0);
    shape("previous", in.previous, rule.previous != 0);
    const bool divides =
        checks_.lengths(in.lengths, lists, most, rule.power != 0) && rule.power != 0;
    checks_.optional("candidates", in.candidates, lists);
    for (index q = 0; q < in.candidates.size; ++q)
      if (in.candidates[q] < 0 || in.candidates[q] > most)
        fail_at(name, "candidates", q, to_text(in.candidates[q]), "0 to " + to_text(most));
    checks_.call(call, lists, in.weights);
    checks_.optional("rewards", report.rewards, lists * most);
    each([&](index q, index k) {
      refuse_infinite("reference", in.reference, q, k);
      refuse_infinite("previous", in.previous, q, k);
      if (divides)
        checks_.length(q * most + k, in.lengths.entries.at(q, k), 1);
    });
    checks_.apart({bytes_of(gradient), bytes_of(call.values), bytes_of(report.rewards)},
                  {bytes_of(in.policy), bytes_of(in.reference), bytes_of(in.previous),
                   bytes_of(in.candidates), bytes_of(in.weights), bytes_of(ratings),
                   bytes_of(call.row_weights), bytes_of(call.upstream)});
  }

  /// That every rating lies in [low, high].
  void check_ratings(double low, double high, const char* expected) const {
    each([&](index q, index k) {
      if (const auto y = static_cast<double>(ratings_(q, k)); !(y >= low && y <= high))
        fail_at(checks_.name, "ratings", q * in_.policy.cols + k, to_text(y), expected);
    });
  }

  /// formula(list_row&): the value of a list; the slopes are those of its scores.
  template <class Formula> T run(reduction how, const Formula& formula) const {
    const index lists = in_.policy.rows;
    double share = 1;
    if (how == reduction::mean) {
      exact_sum all;
      for (index q = 0; q < lists; ++q)
        all.add(weight(q));
      const double denominator = call_.normaliser != 0 ? call_.normaliser : all.value();
      share = denominator != 0 ? 1 / denominator : 0;
    }
    list_memory memory(in_.policy.cols);
    class_means means;
    index right = 0;
    exact_sum total;
    for (index q = 0; q < lists; ++q) {
      list_row& row = memory.row;
      row.size = weight(q) == 0 ? 0 : size(q);
      read(row, q);
      if (row.size > 0)
        tell(row, q, means, right);
      const double factor =
          weight(q) * (in_.weights.data ? static_cast<double>(in_.weights[q]) : 1.0);
      const double found = row.size > 0 ? formula(row) : 0, value = links::times(factor, found);
      write(row, q, found,
            links::times(static_cast<double>(call_.scale) * share * upstream_of(call_, q), factor));
      if (call_.values.data)
        call_.values[q] = static_cast<T>(value);
      total.add(value);
    }
    if (report_.summary) {
      *report_.summary = {};
      means.write(*report_.summary);
      report_.summary->accuracies =
          static_cast<double>(right) / static_cast<double>(report_.summary->chosen); // NaN of none
    }
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

private:
  index size(index q) const {
    return in_.candidates.data ? static_cast<index>(in_.candidates[q]) : in_.policy.cols;
  }
  double weight(index q) const { return weight_of(call_, q); }
  /// All that counts.
  template <class F> void each(F f) const {
    for (index q = 0; q < in_.policy.rows; ++q)
      for (index k = 0; weight(q) != 0 && k < size(q); ++k)
        f(q, k);
  }
  template <class V> void shape(const char* what, const matrix_view<V>& m, bool needed) const {
    const index rows = in_.policy.rows, cols = in_.policy.cols;
    if (!m.data && m.rows * m.cols == 0 && (!needed || rows * cols == 0))
      return;
    if (m.rows != rows || m.cols != cols)
      fail(checks_.name, what,
           m.rows * m.cols == 0 ? "missing" : to_text(m.rows) + " × " + to_text(m.cols),
           to_text(rows) + " × " + to_text(cols) + " (lists × candidates)");
    if (!m.data)
      fail(checks_.name, what, "null", "a pointer to memory");
  }
  void refuse_infinite(const char* what, const matrix_view<const T>& m, index q, index k) const {
    if (m.data && std::isinf(m(q, k)))
      fail_at(checks_.name, what, q * in_.policy.cols + k, to_text(m(q, k)), "a finite number");
  }

  void read(list_row& row, index q) const {
    for (index k = 0; k < row.size; ++k) {
      // less `previous` first, so that what all of them have in common cancels
      const double before = rule_.previous != 0 ? static_cast<double>(in_.previous(q, k)) : 0;
      double x = static_cast<double>(in_.policy(q, k)) - before;
      if (rule_.reference != 0)
        x -= rule_.reference * (static_cast<double>(in_.reference(q, k)) - before);
      const double per = rule_.power == 0 ? 1 : std::pow(in_.lengths.of(k, q), rule_.power);
      row.scores[k] = rule_.beta * x / per;
      row.spare[2][k] = rule_.beta / per;
      row.targets[k] =
          ratings_.data ? static_cast<double>(ratings_(q, k)) : -static_cast<double>(k);
    }
    std::fill(row.scores + row.size, row.scores + row.padded, no_score);
    std::fill(row.targets + row.size, row.targets + row.padded, no_score);
    if (report_.rewards.data)
      for (index k = 0; k < in_.policy.cols; ++k)
        report_.rewards[q * in_.policy.cols + k] = static_cast<T>(k < row.size ? row.scores[k] : 0);
  }
  /// What the report has of a list, before a formula uses its memory.
  void tell(const list_row& row, index q, class_means& means, index& right) const {
    const double* const first = row.targets;
    const index best = std::max_element(first, first + row.size) - first,
                worst = std::min_element(first, first + row.size) - first;
    if (!(first[best] > first[worst]))
      return;
    means.add(true, row.scores[best], static_cast<double>(in_.policy(q, best)));
    means.add(false, row.scores[worst], static_cast<double>(in_.policy(q, worst)));
    right += row.scores[best] > row.scores[worst];
  }
  void write(const list_row& row, index q, double value, double factor) const {
    if (!gradient_.data)
      return;
    for (index k = 0; k < in_.policy.cols; ++k)
      put_slope(gradient_(q, k),
                k < row.size
                    ? links::times(factor, value == value ? row.slopes[k] * row.spare[2][k] : value)
                    : 0.0,
                call_.accumulate);
  }

  const list_scores<T>& in_;
  list_rule rule_;
  matrix_view<const T> ratings_;
  matrix_view<T> gradient_;
  const call_options<T>& call_;
  const sequence_report<T>& report_;
  score_checks<T> checks_;
};

inline bool all_finite(const list_row& row) {
  const auto finite = [](double x) { return std::isfinite(x); };
  return list_row::all_of(row.scores, row.size, finite) &&
         list_row::all_of(row.targets, row.size, finite);
}

/// Σ over pairs of judge(i, j), value and slope of the margin s_i − s_j, and its slopes; NaN where
/// anything is not finite. Of pairs with y_i > y_j, and with `ties` of all, each once.
template <class Judge> double judge_pairs(list_row& row, bool ties, bool mean, Judge judge) {
  if (!all_finite(row))
    return std::numeric_limits<double>::quiet_NaN();
  std::fill(row.sums, row.sums + row.size, exact_sum{});
  exact_sum value;
  double count = 0;
  for (index i = 0; i < row.size; ++i)
    for (index j = 0; j < row.size; ++j) {
      if (!(row.targets[i] > row.targets[j] || (ties && i < j && row.targets[i] == row.targets[j])))
        continue;
      const links::outcome at = judge(i, j, row.scores[i] - row.scores[j]);
      value.add(at.value);
      row.sums[i].add(at.slope);
      row.sums[j].add(-at.slope);
      ++count;
    }
  const double share = mean && count > 0 ? 1 / count : 1;
  for (index i = 0; i < row.size; ++i)
    row.slopes[i] = row.sums[i].value() * share;
  return value.value() * share;
}

/// Σ of judge(i, s_i), value and slope of each score.
template <class Judge> double judge_each(list_row& row, Judge judge) {
  if (!all_finite(row))
    return std::numeric_limits<double>::quiet_NaN();
  exact_sum value;
  for (index i = 0; i < row.size; ++i) {
    const links::outcome at = judge(i, row.scores[i]);
    value.add(at.value);
    row.slopes[i] = at.slope;
  }
  return value.value();
}

} // namespace core

/// RRHF: the better response should have the higher log-probability per token. Without a reference,
///
///   p_k = log π(y_k)/n_k^a,   ℓ = w Σ_{r_i < r_j} max(0, p_i − p_j) − c log π(y_best)
///   ∂ℓ/∂p_k = w (#{j: r_k < r_j, p_k > p_j} − #{i: r_i < r_k, p_i > p_k})
///
/// A sum over the pairs of a list, and a plain sum over the tokens of the best-rated response (of
/// equals the first), as in the paper; the authors' code averages the latter over padding too.
/// Its weight w is 100 in the code and 1 in their scripts. Slope 0 at the kink.
/// Source: Yuan, Yuan, Tan, Wang, Huang, Huang, "RRHF: rank responses to align language models with
/// human feedback without tears", NeurIPS 2023.
template <class T = float> class rrhf {
public:
  using value_type = T;
  struct options {
    double rank_weight = 1;    ///< w ≥ 0
    double nll_weight = 1;     ///< c ≥ 0
    double length_penalty = 1; ///< a; 0: sums, and no lengths are needed
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "rrhf";

  rrhf() : rrhf(options{}) {}
  explicit(false) rrhf(const options& o) : options_(o) {
    core::not_negative(name, "rank_weight", o.rank_weight);
    core::not_negative(name, "nll_weight", o.nll_weight);
    core::finite(name, "length_penalty", o.length_penalty);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const list_scores<T>& scores, matrix_view<const T> ratings,
               matrix_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const auto& o = options_;
    const core::list_reducer<T> lists(name, scores, {.reference = 0, .power = o.length_penalty},
                                      ratings, gradient, call, report);
    return lists.run(o.reduction, [&](core::list_row& row) {
      const double ranks = core::judge_pairs(row, false, false, [&](index, index, double margin) {
        const links::outcome at = links::hinge(0)(margin);
        return links::outcome{links::times(o.rank_weight, at.value),
                              links::times(o.rank_weight, at.slope)};
      });
      const index best = std::max_element(row.targets, row.targets + row.size) - row.targets;
      row.slopes[best] -= o.nll_weight / row.spare[2][best];
      return ranks - links::times(o.nll_weight, row.scores[best] / row.spare[2][best]);
    });
  }

private:
  options options_;
};

/// DPO of whole orders (Plackett-Luce): −log of the likelihood of the order, place by place,
///
///   ℓ = Σ_{k<K} (log Σ_{j≥k} e^{s_j} − s_k)
///   ∂ℓ/∂s_j = Σ_{k ≤ min(j, K−1)} e^{s_j}/Σ_{i≥k} e^{s_i} − [j < K]
///
/// Ratings give the order (the highest first, of equals the first); without, candidates are in it.
/// K = 2: DPO. O(K) after sorting; listmle. Source: Rafailov, Sharma, Mitchell, Ermon, Manning,
/// Finn, "Direct preference optimization", NeurIPS 2023 (appendix A.3).
template <class T = float> class plackett_luce_dpo {
public:
  using value_type = T;
  struct options {
    double beta = 0.1; ///< β > 0
    index places = 0;  ///< ≥ 0: of the first places only; 0: of all
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "plackett_luce_dpo";

  plackett_luce_dpo() : plackett_luce_dpo(options{}) {}
  explicit(false) plackett_luce_dpo(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::require(o.places >= 0, name, "places", o.places, "0 or more");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const list_scores<T>& scores, matrix_view<const T> ratings = {},
               matrix_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const core::list_reducer<T> lists(name, scores, {.beta = options_.beta, .needs_ratings = false},
                                      ratings, gradient, call, report);
    return lists.run(options_.reduction, core::listmle_formula{options_.places});
  }

private:
  options options_;
};

/// How LiPO judges a list with labels ψ in [0, 1].
enum class list_objective {
  lambda,        ///< Σ_{ψ_i>ψ_j} Δ_ij log(1 + e^(s_j − s_i))
  pair_logistic, ///< Σ_{ψ_i>ψ_j} log(1 + e^(s_j − s_i))
  pair_hinge,    ///< Σ_{ψ_i>ψ_j} max(0, 1 − (s_i − s_j))
  list_mle,      ///< Plackett-Luce of the order of ψ
  softmax,       ///< −Σ (ψ_i/Σψ) log softmax(s)_i; 0 where Σψ = 0
  point_mse,     ///< Σ (ψ_i − s_i)²
  point_sigmoid  ///< Σ ψ_i log(1 + e^−s_i) + (1 − ψ_i) log(1 + e^s_i)
};

namespace core {

struct lipo_formula {
  list_objective objective;

  double operator()(list_row& row) const {
    switch (objective) {
    case list_objective::list_mle:
      return listmle_formula{0}(row);
    case list_objective::softmax:
      return softmax(row);
    case list_objective::point_mse:
      return judge_each(row, [&](index i, double s) { return links::square(row.targets[i])(s); });
    case list_objective::point_sigmoid:
      return judge_each(row, [&](index i, double s) {
        return links::cross_entropy(row.targets[i], 1 - row.targets[i], s);
      });
    case list_objective::pair_hinge:
      return judge_pairs(row, false, false,
                         [](index, index, double margin) { return links::hinge(1)(margin); });
    case list_objective::lambda:
      find_weights(row);
      break;
    case list_objective::pair_logistic:
      break;
    }
    return judge_pairs(row, false, false, [&](index i, index j, double margin) {
      const links::outcome at = links::logistic()(margin);
      const double w = objective == list_objective::lambda
                           ? std::fabs(row.spare[0][i] - row.spare[0][j]) *
                                 std::fabs(row.spare[1][i] - row.spare[1][j])
                           : 1;
      return links::outcome{w * at.value, w * at.slope};
    });
  }

private:
  /// G = 2^ψ − 1 and 1/log(1 + rank by score).
  static void find_weights(list_row& row) {
    if (!all_finite(row))
      return; // to which judge_pairs says NaN
    row.sort_by(row.scores);
    for (index i = 0; i < row.size; ++i) {
      row.spare[0][i] = std::expm1(row.targets[i] * std::numbers::ln2);
      row.spare[1][row.order[i]] = 1 / std::log1p(static_cast<double>(i + 1));
    }
  }
  static double softmax(list_row& row) {
    exact_sum mass;
    for (index i = 0; i < row.size; ++i)
      mass.add(row.targets[i]);
    for (index i = 0; i < row.size && mass.value() > 0; ++i)
      row.targets[i] /= mass.value();
    return listnet_formula{list_target::probabilities}(row);
  }
};

} // namespace core

/// Listwise preference optimisation, LiPO, with labels ψ in [0, 1]: one of list_objective, of which
/// `lambda` is LiPO-λ,
///
///   Δ_ij = |2^ψ_i − 2^ψ_j| |1/log(1 + r_i) − 1/log(1 + r_j)|,   r = 1, 2, … the rank by score
///   ∂ℓ/∂s_i = −Σ_j Δ_ij σ(s_j − s_i) over those below it, and the opposite sign above
///
/// Δ is a constant for the gradient, so that the value jumps where two scores change places.
/// Logarithms are natural, and gains are not divided by the ideal: lambda_loss's `lambda_rank` is
/// the same but for that. Sums over the list. O(K²). With `softmax`, a score of −inf where ψ is 0
/// has no part. Source: Liu, Qin, Wu, et al., "LiPO: listwise preference optimization through
/// learning-to-rank", NAACL 2025.
template <class T = float> class lipo {
public:
  using value_type = T;
  struct options {
    double beta = 0.05; ///< β > 0
    list_objective objective = list_objective::lambda;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "lipo";

  lipo() : lipo(options{}) {}
  explicit(false) lipo(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::require_enumerator(name, "objective", o.objective, list_objective::point_sigmoid,
                             "one of list_objective");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const list_scores<T>& scores, matrix_view<const T> ratings,
               matrix_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const core::list_reducer<T> lists(name, scores, {.beta = options_.beta}, ratings, gradient,
                                      call, report);
    lists.check_ratings(0, 1, "a number in [0, 1]");
    return lists.run(options_.reduction, core::lipo_formula{options_.objective});
  }

private:
  options options_;
};

namespace core {

/// KL(P ‖ softmax(y/β_r)), P = softmax(s), with log-softmaxes that keep their digits.
struct exo_formula {
  double beta; // β_r

  double operator()(list_row& row) const {
    if (!all_finite(row))
      return std::numeric_limits<double>::quiet_NaN();
    const double top = *std::max_element(row.targets, row.targets + row.size), factor = 1 / beta;
    double *const log_p = row.spare[0], *const log_t = row.spare[1];
    for (index i = 0; i < row.size; ++i) // the maximum off first: large rewards have no product
      log_t[i] = (row.targets[i] - top) * factor;
    log_softmax(row.scores, row.size, log_p);
    log_softmax(log_t, row.size, log_t);
    if (!list_row::all_of(log_t, row.size, [](double t) { return std::isfinite(t); }))
      return divergence(row, 0x1p-11 * beta, [&](index i) {
        const double t = std::isfinite(log_t[i]) ? log_t[i] * (0x1p-11 * beta)
                                                 : (row.targets[i] / 2 - top / 2) * 0x1p-10;
        return log_p[i] * (0x1p-11 * beta) - t;
      });
    return divergence(row, 1, [&](index i) { return log_p[i] - log_t[i]; });
  }

private:
  /// From unit (log P − t), which are numbers where t is none.
  template <class Ratio> static double divergence(list_row& row, double unit, Ratio ratio) {
    const double* const log_p = row.spare[0];
    exact_sum value;
    for (index i = 0; i < row.size; ++i)
      value.add(links::times(std::exp(log_p[i]), ratio(i)));
    for (index i = 0; i < row.size; ++i)
      row.slopes[i] = links::times(std::exp(log_p[i]), ratio(i) - value.value()) / unit;
    return value.value() / unit;
  }
  /// The leader's own is −log1p(Σ of the others). `out` may be z.
  static void log_softmax(const double* z, index n, double* out) {
    const index top = std::max_element(z, z + n) - z;
    const double most = z[top];
    exact_sum rest;
    for (index i = 0; i < n; ++i)
      if (i != top)
        rest.add(std::exp(z[i] - most));
    const double log_sum = std::log1p(rest.value());
    for (index i = 0; i < n; ++i)
      out[i] = (z[i] - most) - log_sum;
  }
};

} // namespace core

/// Efficient exact optimisation over N candidates with rewards r:
///
///   ℓ = Σ_k P_k (log P_k − t_k),   P = softmax(s),  t = log softmax(r/β_r)
///   ∂ℓ/∂s_j = P_j (log P_j − t_j − ℓ)
///
/// Two candidates whose rewards differ by β_r log((1 − ε)/ε) make exo_pair of ε. The authors' code
/// writes targets of 0 and −10 there. Errors are absolute where P is close to the target.
/// Source: Ji, Lu, Niu, Ke, Wang, Zhu, Tang, Huang, "Towards efficient exact optimization of
/// language model alignment", ICML 2024.
template <class T = float> class exo_list {
public:
  using value_type = T;
  struct options {
    double beta = 0.1;        ///< β > 0, of the policy's log-ratios
    double reward_beta = 0.1; ///< β_r > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "exo_list";

  exo_list() : exo_list(options{}) {}
  explicit(false) exo_list(const options& o) : options_(o) {
    core::positive(name, "beta", o.beta);
    core::invertible<double>(name, "reward_beta", o.reward_beta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const list_scores<T>& scores, matrix_view<const T> rewards,
               matrix_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const core::list_reducer<T> lists(name, scores, {.beta = options_.beta}, rewards, gradient,
                                      call, report);
    return lists.run(options_.reduction, core::exo_formula{options_.reward_beta});
  }

private:
  options options_;
};

/// Direct Nash optimisation: regression on how clearly one response beats another. Over all pairs
/// of a list, their mean, with rewards r and s = η (log π − log π_t), π_t the previous iterate,
///
///   ℓ_ij = −p log σ(s_i − s_j) − (1 − p) log σ(s_j − s_i),   p = σ(r_i − r_j)
///   ∂ℓ_ij/∂s_i = σ(s_i − s_j) − p = −∂ℓ_ij/∂s_j
///
/// K = 2: the paper's loss. Pairs with p = 1 alone are DPO with the previous iterate for reference.
/// Source: Rosset, Cheng, Mitra, Santacroce, Awadallah, Xie, "Direct Nash optimization: teaching
/// language models to self-improve with general preferences", 2024.
template <class T = float> class dno_list {
public:
  using value_type = T;
  struct options {
    double eta = 0.1; ///< η > 0
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "dno_list";

  dno_list() : dno_list(options{}) {}
  explicit(false) dno_list(const options& o) : options_(o) {
    core::positive(name, "eta", o.eta);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const list_scores<T>& scores, matrix_view<const T> rewards,
               matrix_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const core::list_reducer<T> lists(name, scores, {.beta = options_.eta}, rewards, gradient, call,
                                      report);
    return lists.run(options_.reduction, [](core::list_row& row) {
      return core::judge_pairs(row, true, true, [&](index i, index j, double margin) {
        const double ahead = row.targets[i] - row.targets[j];
        return links::cross_entropy(links::sigmoid(ahead), links::sigmoid(-ahead), margin);
      });
    });
  }

private:
  options options_;
};

/// Iterative Nash policy optimisation. With the previous iterate π_t,
///
///   h = log π − (τ/η) log π_ref − ((η − τ)/η) log π_t
///   ℓ = mean over r_i > r_j of (h_i − h_j − 1/(2η))²,   ∂ℓ_ij/∂h_i = 2 (h_i − h_j − 1/(2η))
///
/// K = 2: the paper's loss. τ = η: IPO of sums, and no previous iterate is asked for. A reward in
/// the report is h. Source: Zhang, Yu, Peng, Song, Tian, Huo, Jiang, Mi, Yu, "Iterative Nash policy
/// optimization: aligning LLMs with general preferences via no-regret learning", ICLR 2025.
template <class T = float> class inpo_list {
public:
  using value_type = T;
  struct options {
    double eta = 0.0075; ///< η > 0
    double tau = 0.0025; ///< τ in (0, η]
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "inpo_list";

  inpo_list() : inpo_list(options{}) {}
  explicit(false) inpo_list(const options& o) : options_(o) {
    core::positive(name, "eta", o.eta);
    core::require(o.tau > 0 && o.tau <= o.eta, name, "tau", o.tau, "a number in (0, eta]");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  T operator()(const list_scores<T>& scores, matrix_view<const T> ratings,
               matrix_view<T> gradient = {}, const call_options<T>& call = {},
               const sequence_report<T>& report = {}) const {
    const double eta = options_.eta, tau = options_.tau;
    const core::list_reducer<T> lists(name, scores,
                                      {.reference = tau / eta, .previous = (eta - tau) / eta},
                                      ratings, gradient, call, report);
    return lists.run(options_.reduction, [&](core::list_row& row) {
      return core::judge_pairs(row, false, true, [&](index, index, double margin) {
        return links::square(1 / (2 * eta))(margin);
      });
    });
  }

private:
  options options_;
};

/// The chance of each candidate to win against another of its list, P_i = mean_{j≠i} σ(s_i − s_j)
/// of a preference model's scores; ½ where there is no other. For sppo_points.
template <class T>
void win_probabilities(matrix_view<const T> scores, matrix_view<T> result,
                       vector_view<const std::int64_t> candidates = {}) {
  const char* const name = "win_probabilities";
  const index lists = scores.rows, most = scores.cols;
  if (result.rows != lists || result.cols != most)
    core::fail(name, "result", core::to_text(result.rows) + " × " + core::to_text(result.cols),
               core::to_text(lists) + " × " + core::to_text(most));
  core::require_memory(name, "scores", scores.data, lists * most);
  core::require_memory(name, "result", result.data, lists * most);
  const core::score_checks<T> checks{name};
  checks.optional("candidates", candidates, lists);
  checks.apart({core::bytes_of(result)}, {core::bytes_of(scores), core::bytes_of(candidates)});
  for (index q = 0; q < candidates.size; ++q)
    if (candidates[q] < 0 || candidates[q] > most)
      core::fail_at(name, "candidates", q, core::to_text(candidates[q]),
                    "0 to " + core::to_text(most));
  for (index q = 0; q < lists; ++q) {
    const index n = candidates.data ? static_cast<index>(candidates[q]) : most;
    for (index i = 0; i < most; ++i) {
      core::exact_sum wins;
      for (index j = 0; j < n && i < n; ++j)
        if (j != i)
          wins.add(links::sigmoid(static_cast<double>(scores(q, i)) -
                                  static_cast<double>(scores(q, j))));
      result(q, i) = static_cast<T>(i >= n  ? 0
                                    : n > 1 ? wins.value() / static_cast<double>(n - 1)
                                            : 0.5);
    }
  }
}

// --- Curry-DPO: pairs from ratings, the easy ones first
// -------------------------------------------

/// Two responses to prompt `list`, and by how much the first is rated above the second.
struct rated_pair {
  index list, chosen, rejected;
  double gap;
  bool operator==(const rated_pair&) const = default;
};

enum class pairing {
  best_against_rest, ///< the best-rated response against each other: Curry-DPO
  best_against_worst,
  all
};

/// The pairs of rated responses, list by list. Equal ratings make no pair, nor do gaps below
/// `least_gap`; of equally good (or bad) ones the first is the best (the worst). Ratings are
/// finite.
template <class T>
std::vector<rated_pair> make_pairs(matrix_view<const T> ratings,
                                   pairing how = pairing::best_against_rest, double least_gap = 0,
                                   vector_view<const std::int64_t> candidates = {}) {
  const char* const name = "make_pairs";
  core::require_enumerator(name, "pairing", how, pairing::all, "one of those that are named");
  core::not_negative(name, "least_gap", least_gap);
  core::require_memory(name, "ratings", ratings.data, ratings.rows * ratings.cols);
  core::score_checks<T>{name}.optional("candidates", candidates, ratings.rows);
  std::vector<rated_pair> pairs;
  for (index q = 0; q < ratings.rows; ++q) {
    if (candidates.data && (candidates[q] < 0 || candidates[q] > ratings.cols))
      core::fail_at(name, "candidates", q, core::to_text(candidates[q]),
                    "0 to " + core::to_text(ratings.cols));
    const index n = candidates.data ? static_cast<index>(candidates[q]) : ratings.cols;
    index best = 0, worst = 0;
    for (index k = 0; k < n; ++k) {
      if (!std::isfinite(ratings(q, k)))
        core::fail_at(name, "ratings", q * ratings.cols + k, core::to_text(ratings(q, k)),
                      "a finite number");
      best = ratings(q, k) > ratings(q, best) ? k : best;
      worst = ratings(q, k) < ratings(q, worst) ? k : worst;
    }
    for (index i = 0; i < n; ++i)
      for (index j = 0; j < n; ++j) {
        const double gap = static_cast<double>(ratings(q, i)) - static_cast<double>(ratings(q, j));
        if (gap > 0 && gap >= least_gap && (how == pairing::all || i == best) &&
            (how != pairing::best_against_worst || j == worst))
          pairs.push_back({q, i, j, gap});
      }
  }
  return pairs;
}

/// Pairs in stages, to be trained on one after another; the reference of a stage is the model that
/// the one before left behind.
struct curriculum {
  std::vector<rated_pair> pairs;
  std::vector<index> starts; ///< of the stages, and the end

  index stages() const { return static_cast<index>(starts.size()) - 1; }
  std::span<const rated_pair> stage(index s) const {
    core::require(s >= 0 && s < stages(), "curriculum", "stage", s, "0 to the number of stages");
    const auto first = static_cast<std::size_t>(starts[static_cast<std::size_t>(s)]),
               last = static_cast<std::size_t>(starts[static_cast<std::size_t>(s) + 1]);
    return std::span(pairs).subspan(first, last - first);
  }
};

enum class staging {
  by_list, ///< the pairs of each prompt are spread over the stages: Curry-DPO
  overall  ///< all pairs in one order, cut into equal stages
};

/// The easy pairs, with the largest gaps, first; equal gaps stay in order. A stage may be empty.
/// Source: Pattnaik, Maheshwary, Ogueji, Yadav, Madhusudhan, "Curry-DPO: enhancing alignment using
/// curriculum learning & ranked preferences", Findings of EMNLP 2024.
///
///   const auto plan = perdita::make_curriculum(perdita::make_pairs(ratings), 3);
///   for (perdita::index s = 0; s < plan.stages(); ++s) train(plan.stage(s));
inline curriculum make_curriculum(std::vector<rated_pair> pairs, index stages,
                                  staging how = staging::by_list) {
  core::require(stages >= 1, "make_curriculum", "stages", stages, "1 or more");
  core::require_enumerator("make_curriculum", "staging", how, staging::overall,
                           "by_list or overall");
  std::stable_sort(pairs.begin(), pairs.end(),
                   [](const auto& a, const auto& b) { return a.gap > b.gap; });
  index lists = how == staging::overall ? 1 : 0;
  for (const rated_pair& p : pairs) {
    core::require(p.list >= 0, "make_curriculum", "list", p.list, "0 or more");
    if (how == staging::by_list)
      lists = std::max(lists, p.list + 1);
  }
  const auto group = [&](const rated_pair& p) {
    return static_cast<std::size_t>(how == staging::by_list ? p.list : 0);
  };
  std::vector<index> size(static_cast<std::size_t>(lists)), seen(size.size());
  for (const rated_pair& p : pairs)
    ++size[group(p)];
  std::vector<std::vector<rated_pair>> staged(static_cast<std::size_t>(stages));
  for (const rated_pair& p : pairs)
    staged[static_cast<std::size_t>(seen[group(p)]++ * stages / size[group(p)])].push_back(p);
  curriculum plan{{}, {0}};
  for (const auto& stage : staged) {
    plan.pairs.insert(plan.pairs.end(), stage.begin(), stage.end());
    plan.starts.push_back(static_cast<index>(plan.pairs.size()));
  }
  return plan;
}

} // namespace perdita::inline PERDITA_ABI
