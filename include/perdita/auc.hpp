// SPDX-License-Identifier: MIT
#pragma once

/// Losses of a whole batch of binary scores that stand for an area: under the ROC curve
/// (auc_margin) and under the precision-recall curve (soap). Both have a state that is the
/// caller's.
///
/// Scores and gradient are vectors of T, labels integers: above 0 is positive (1 against 0 or −1).
/// The gradient may be the scores themselves, else it lies apart. All is computed in double, on the
/// calling thread. Throws std::invalid_argument, and then nothing has been written.

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

/// What a call of a loss of a batch may ask for.
template <class T> struct auc_call {
  T scale = 1;             ///< multiplies the gradient of the scores only
  bool accumulate = false; ///< adds to that gradient instead of overwriting it
};

namespace core {

template <class T> struct binary_batch {
  vector_view<const T> scores;
  integer_rows labels;

  bool positive(index i) const { return labels.at(0, i) > 0; }
};

template <class T>
void check_batch(const char* name, const binary_batch<T>& batch, const vector_view<T>* gradient,
                 bool accumulate) {
  const sequence_checks<T> checks{name};
  const index n = batch.scores.size;
  checks.memory("scores", batch.scores.data, n);
  checks.size("labels", batch.labels.cols, n, "as many as there are scores");
  checks.memory("labels", batch.labels.data, n);
  if (!gradient)
    return;
  const auto column = [](auto v) {
    return matrix_view<std::remove_pointer_t<decltype(v.data)>>(v.data, v.size, 1, v.stride, 1);
  };
  checks.gradient(matrix_data<T>(column(batch.scores)), matrix_data<T, true>(column(*gradient)),
                  accumulate);
}
/// That a batch of n consists of different samples of a state.
template <class T>
void check_samples(const char* name, const integer_rows& samples, index n, std::size_t known) {
  const sequence_checks<T> checks{name};
  checks.size("ids", samples.cols, n, "as many as there are scores");
  checks.memory("ids", samples.data, n);
  std::vector<std::int64_t> seen(static_cast<std::size_t>(n));
  const auto most = static_cast<std::int64_t>(known);
  for (index i = 0; i < n; ++i) {
    const std::int64_t id = samples.at(0, i);
    if (id < 0 || id >= most)
      fail_at(name, "ids", i, to_text(id),
              "0 to " + to_text(most - 1) + ", the samples of the state");
    seen[static_cast<std::size_t>(i)] = id;
  }
  std::sort(seen.begin(), seen.end());
  const auto twice = std::adjacent_find(seen.begin(), seen.end());
  if (twice != seen.end())
    fail(name, "ids", to_text(*twice) + " twice", "different numbers");
}
template <class T> void put(vector_view<T> to, index i, double slope, bool accumulate) {
  to[i] = static_cast<T>(accumulate ? static_cast<double>(to[i]) + slope : slope);
}

template <class V, class T>
concept batch_of =
    vector_like<V> && std::same_as<std::remove_const_t<typename element_of<V>::type>, T>;

} // namespace core

/// The variables of auc_margin besides the scores; plain numbers, to be kept and stored.
struct auc_state {
  double a = 0;     ///< tends to the mean score of positives
  double b = 0;     ///< and of negatives
  double alpha = 0; ///< ≥ 0, the dual variable, which is ascended

  /// A step of gradient descent in a and b, and of ascent in alpha, which stays 0 or more.
  void step(const auc_state& slopes, double rate) {
    a -= rate * slopes.a;
    b -= rate * slopes.b;
    alpha = std::max(alpha + rate * slopes.alpha, 0.0); // NaN stays
  }
};

/// How auc_margin averages.
enum class auc_average {
  batch,  ///< over the batch, each class by the share of the other: AUC-M
  classes ///< over each class by itself, which is 1/(π (1 − π)) times that
};

/// AUC margin loss: a min-max form of the squared loss of all pairs of a positive and a negative,
/// one score at a time.
///
///   L = c₊ Σ₊ (h − a)² + c₋ Σ₋ (h − b)² + 2α (κ m + c₋ Σ₋ h − c₊ Σ₊ h) − κ α²
///   auc_average::batch:   c₊ = (1 − π)/n, c₋ = π/n, κ = π (1 − π);  classes: 1/n₊, 1/n₋, 1
///   ∂L/∂h = 2 c₊ (h − a − α) of a positive, 2 c₋ (h − b + α) of a negative
///   ∂L/∂a = −2 c₊ Σ₊ (h − a),  ∂L/∂b = −2 c₋ Σ₋ (h − b)
///   ∂L/∂α = 2 (κ m + c₋ Σ₋ h − c₊ Σ₊ h) − 2 κ α
///
/// to be minimised over the scores, a and b, and maximised over α ≥ 0. π is the share of positives:
/// that of the batch, or `positive_rate`. At the best a, b, α (best_state) with the batch's π, the
/// loss by classes is the mean of (m − (h₊ − h₋))² over all pairs as long as α > 0. A class that
/// the batch lacks has no terms; no scores are worth 0. (The authors' code by classes divides by
/// the number of scores that are not 0, and a misplaced bracket: here is the formula.) Infinity and
/// NaN spoil the value and the slopes of their class's variables. L is computed as it is written:
/// near the saddle its terms cancel. Beginning of auc.hpp: shapes, errors. Source: Yuan, Yan,
/// Sonka, Yang, "Large-scale robust deep AUC maximization", ICCV 2021; Ying, Wen, Lyu, "Stochastic
/// online AUC maximization", NIPS 2016.
///
///   perdita::auc_margin<float> loss;
///   perdita::auc_state state, slopes;
///   float value = loss(scores, labels, state, d_scores, slopes);
///   state.step(slopes, 0.1);
template <class T = float> class auc_margin {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double margin = 1;                        ///< m, finite
    double positive_rate = 0;                 ///< π in (0, 1), or 0: that of the batch
    auc_average average = auc_average::batch; ///< what c₊, c₋ and κ are
  };
  static constexpr const char* name = "auc_margin";

  auc_margin() : auc_margin(options{}) {}
  explicit(false) auc_margin(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require(o.positive_rate >= 0 && o.positive_rate < 1, name, "positive_rate",
                  o.positive_rate, "a number in (0, 1), or 0 for that of the batch");
    core::require_enumerator(name, "average", o.average, auc_average::classes, "batch or classes");
  }
  const options& settings() const { return options_; }

  /// L for this state.
  template <core::batch_of<T> X, core::labels_like Y>
  T operator()(X&& scores, Y&& labels, const auc_state& state) const {
    const auto batch = read(scores, labels);
    core::check_batch<T>(name, batch, nullptr, false);
    return static_cast<T>(value(measure(batch, state), state));
  }
  /// L, its gradient by the scores, and its slopes by the variables of the state.
  template <core::batch_of<T> X, core::labels_like Y, core::batch_of<T> G>
  T operator()(X&& scores, Y&& labels, const auc_state& state, G&& gradient, auc_state& slopes,
               const auc_call<T>& call = {}) const {
    const auto batch = read(scores, labels);
    vector_view<T> to = core::as_vector(gradient);
    core::check_batch<T>(name, batch, &to, call.accumulate);
    const moments m = measure(batch, state);
    const auto scale = static_cast<double>(call.scale);
    const auc_state now = state; // which may be `slopes`
    for (index i = 0; i < batch.scores.size; ++i) {
      const auto h = static_cast<double>(batch.scores[i]);
      const double slope = batch.positive(i) ? m.of_positive * ((h - now.a) - now.alpha)
                                             : m.of_negative * ((h - now.b) + now.alpha);
      core::put(to, i, 2 * slope * scale, call.accumulate);
    }
    slopes = {-2 * m.off_a, -2 * m.off_b, 2 * (gap(m) - m.kappa * now.alpha)};
    return static_cast<T>(value(m, now));
  }
  /// The state where L has its saddle for these scores; α not below 0. Of a class that the batch
  /// lacks, 0.
  template <core::batch_of<T> X, core::labels_like Y>
  auc_state best_state(X&& scores, Y&& labels) const {
    const auto batch = read(scores, labels);
    core::check_batch<T>(name, batch, nullptr, false);
    const moments m = measure(batch, {});
    auc_state best;
    best.a = m.positives == 0 ? 0 : m.from + m.above_positive / m.positives;
    best.b = m.negatives == 0 ? 0 : m.from + m.above_negative / m.negatives;
    best.alpha = m.kappa == 0 ? 0 : std::max(gap(m) / m.kappa, 0.0);
    return best;
  }

private:
  struct moments {
    double positives = 0, negatives = 0;
    double of_positive = 0, of_negative = 0, kappa = 0; ///< c₊, c₋, κ
    double from = 0;                                    ///< a score
    double above_positive, above_negative;              ///< Σ (h − from)
    double sum_positive, sum_negative;                  ///< c Σ (h − from)
    double balance = 0; ///< c₋ n₋ − c₊ n₊, exactly 0 where each has its own mean
    double off_a, off_b, square_a, square_b; ///< c Σ (h − a), c Σ (h − a)²
  };

  template <class X, class Y> static core::binary_batch<T> read(X& scores, Y& labels) {
    return {core::as_vector(scores), core::integer_rows(core::as_vector(labels))};
  }
  moments measure(const core::binary_batch<T>& batch, const auc_state& state) const {
    moments m;
    core::exact_sum sums[2], offs[2], squares[2];
    const index n = batch.scores.size;
    if (n > 0 && std::isfinite(batch.scores[0]))
      m.from = static_cast<double>(batch.scores[0]);
    for (index i = 0; i < n; ++i) {
      const bool positive = batch.positive(i);
      const auto h = static_cast<double>(batch.scores[i]);
      const double off = h - (positive ? state.a : state.b);
      (positive ? m.positives : m.negatives) += 1;
      sums[positive].add(h - m.from);
      offs[positive].add(off);
      squares[positive].add(off * off);
    }
    const auto count = static_cast<double>(n);
    if (options_.average == auc_average::classes) {
      m.of_positive = m.positives > 0 ? 1 / m.positives : 0;
      m.of_negative = m.negatives > 0 ? 1 / m.negatives : 0;
      m.kappa = n > 0 ? 1 : 0;
      m.balance = (m.negatives > 0 ? 1 : 0) - (m.positives > 0 ? 1 : 0);
    } else if (n > 0) {
      const double given = options_.positive_rate;
      const double rate = given > 0 ? given : m.positives / count,
                   rest = given > 0 ? 1 - given : m.negatives / count;
      m.of_positive = rest / count;
      m.of_negative = rate / count;
      m.kappa = rate * rest;
      m.balance = given > 0 ? (rate * m.negatives - rest * m.positives) / count : 0;
    }
    m.above_positive = sums[1].value();
    m.above_negative = sums[0].value();
    m.sum_positive = m.of_positive * m.above_positive;
    m.sum_negative = m.of_negative * m.above_negative;
    m.off_a = m.of_positive * offs[1].value();
    m.off_b = m.of_negative * offs[0].value();
    m.square_a = m.of_positive * squares[1].value();
    m.square_b = m.of_negative * squares[0].value();
    return m;
  }
  double gap(const moments& m) const {
    return m.kappa * options_.margin + (m.sum_negative - m.sum_positive) + m.balance * m.from;
  }
  double value(const moments& m, const auc_state& state) const {
    core::exact_sum sum;
    for (const double term :
         {m.square_a, m.square_b, 2 * state.alpha * gap(m), -m.kappa * state.alpha * state.alpha})
      sum.add(term);
    return sum.value();
  }

  options options_;
};

/// The moving averages of soap, two numbers for each sample of a data set, 0 before its first step
/// as a positive. Plain vectors, to be kept and stored. Those of negatives stay 0.
struct soap_state {
  std::vector<double> all, positives; ///< of the surrogate over all samples, and over positives

  soap_state() = default;
  explicit soap_state(std::size_t samples) : all(samples), positives(samples) {}
};

/// SOAP: stochastic optimisation of average precision, of which a positive's part is its rank among
/// positives over its rank among all, both by a surrogate of what is above it.
///
///   l_is = max(0, m − (f_i − f_s))²,  for a positive i and any s (i itself, too) of a batch of n
///   u_i ← (1 − γ) u_i + γ Σ_s l_is/n,  v_i ← (1 − γ) v_i + γ Σ_{s positive} l_is/n
///   L = −mean_i v_i/u_i  over the P positives of the batch, with the new u and v
///   gradient: Σ_is w_is ∂l_is/(P n),  w_is = (v_i − u_i [s positive])/u_i²
///   ∂l_is/∂f_s = 2 max(0, m − (f_i − f_s)) = −∂l_is/∂f_i
///
/// −L estimates average precision. The gradient is that of L for γ = 1; for smaller γ it is that of
/// the authors' Σ w_is l_is/(P n) with w taken for constants, whose value says nothing. γ weighs
/// the new (0.9: the past has little weight). `ids` says which samples of the state the batch
/// consists of: different numbers, from 0 on. A call with a gradient is a step, which updates the
/// state of its positives; a call without one is the value of that step and leaves the state as it
/// is. A batch without positives throws. A score that is NaN or infinite makes the value and all
/// slopes NaN, and the state of the batch's positives stays as it was. O(P n). The gradient is for
/// this batch only. Beginning of auc.hpp: shapes, errors. Source: Qi, Luo, Xu, Ji, Yang,
/// "Stochastic optimization of areas under precision-recall curves with provable convergence",
/// NeurIPS 2021.
///
///   perdita::soap<float> loss;
///   perdita::soap_state state(samples);
///   float value = loss(scores, labels, ids, state, d_scores);
template <class T = float> class soap {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double margin = 1;  ///< m > 0
    double gamma = 0.9; ///< γ in (0, 1], the weight of what is new
  };
  static constexpr const char* name = "soap";

  soap() : soap(options{}) {}
  explicit(false) soap(const options& o) : options_(o) {
    core::positive(name, "margin", o.margin);
    core::require(o.gamma > 0 && o.gamma <= 1, name, "gamma", o.gamma, "a number in (0, 1]");
  }
  const options& settings() const { return options_; }

  /// The value of the step that a call with a gradient would be.
  template <core::batch_of<T> X, core::labels_like Y, core::labels_like I>
  T operator()(X&& scores, Y&& labels, I&& ids, const soap_state& state) const {
    const core::binary_batch<T> batch = read(scores, labels);
    const core::integer_rows samples(core::as_vector(ids));
    core::check_batch<T>(name, batch, nullptr, false);
    return static_cast<T>(average(batch, samples, state).value);
  }
  /// A step: the new state, the value, and the gradient.
  template <core::batch_of<T> X, core::labels_like Y, core::labels_like I, core::batch_of<T> G>
  T operator()(X&& scores, Y&& labels, I&& ids, soap_state& state, G&& gradient,
               const auc_call<T>& call = {}) const {
    const core::binary_batch<T> batch = read(scores, labels);
    const core::integer_rows samples(core::as_vector(ids));
    vector_view<T> to = core::as_vector(gradient);
    core::check_batch<T>(name, batch, &to, call.accumulate);
    const averages found = average(batch, samples, state);
    const index n = batch.scores.size;
    if (std::isnan(found.value)) {
      for (index i = 0; i < n; ++i)
        core::put(to, i, found.value, call.accumulate);
      return static_cast<T>(found.value);
    }
    for (index i = 0; i < found.count; ++i) {
      const auto sample = static_cast<std::size_t>(samples.at(0, found.place[at(i)]));
      state.all[sample] = found.all[at(i)];
      state.positives[sample] = found.positives[at(i)];
    }
    const std::vector<double> slopes = find_slopes(found);
    for (index i = 0; i < n; ++i)
      core::put(to, found.place[at(i)], slopes[at(i)] * static_cast<double>(call.scale),
                call.accumulate);
    return static_cast<T>(found.value);
  }

private:
  using W = core::pack<double>;

  struct averages {
    double value = 0;
    index count = 0;                    ///< of positives
    std::vector<index> place;           ///< of the scores in the batch: the positives come first
    std::vector<double> scores;         ///< in that order
    std::vector<double> all, positives; ///< u and v
  };

  static std::size_t at(index i) { return static_cast<std::size_t>(i); }
  template <class X, class Y> static core::binary_batch<T> read(X& scores, Y& labels) {
    return {core::as_vector(scores), core::integer_rows(core::as_vector(labels))};
  }

  void check(const core::binary_batch<T>& batch, const core::integer_rows& samples,
             const soap_state& state) const {
    const core::sequence_checks<T> checks{name};
    const index n = batch.scores.size;
    checks.size("positives of the state", static_cast<index>(state.positives.size()),
                static_cast<index>(state.all.size()), "as many as all");
    core::check_samples<T>(name, samples, n, state.all.size());
  }

  averages average(const core::binary_batch<T>& batch, const core::integer_rows& samples,
                   const soap_state& state) const {
    check(batch, samples, state);
    averages found;
    const index n = batch.scores.size;
    for (const bool positive : {true, false}) {
      for (index i = 0; i < n; ++i)
        if (batch.positive(i) == positive)
          found.place.push_back(i);
      if (positive)
        found.count = static_cast<index>(found.place.size());
    }
    core::require(found.count > 0, name, "number of positives", found.count, "1 or more");
    bool finite = true;
    for (const index i : found.place) {
      found.scores.push_back(static_cast<double>(batch.scores[i]));
      finite = finite && std::isfinite(found.scores.back());
    }
    if (!finite) {
      found.value = std::numeric_limits<double>::quiet_NaN();
      return found;
    }
    core::exact_sum precision;
    for (index i = 0; i < found.count; ++i) {
      const auto sample = static_cast<std::size_t>(samples.at(0, found.place[at(i)]));
      const double score = found.scores[at(i)];
      const double own = squares_above(found.scores, 0, found.count, score),
                   others = squares_above(found.scores, found.count, n, score);
      const double keep = 1 - options_.gamma, gain = options_.gamma / static_cast<double>(n);
      found.positives.push_back(keep * state.positives[sample] + gain * own);
      found.all.push_back(keep * state.all[sample] + gain * (own + others));
      precision.add(found.positives.back() / found.all.back());
    }
    found.value = -precision.value() / static_cast<double>(found.count);
    return found;
  }

  /// Σ max(0, m − (f_i − f_s))² of a range.
  double squares_above(const std::vector<double>& scores, index first, index last,
                       double score) const {
    core::wide_lanes<double> sum;
    sum.clear();
    for (index s = first; s < last; s += core::per_pack) {
      const W miss = missing(scores, s, last, score);
      sum.add(miss * miss);
    }
    return sum.total();
  }
  /// What all scores share cancels first.
  W missing(const std::vector<double>& scores, index s, index last, double score) const {
    return max(W(0), (load(scores, s, last) - W(score)) + W(options_.margin));
  }
  static W load(const std::vector<double>& x, index i, index last) {
    return last - i < core::per_pack ? core::load_first(x.data() + i, last - i, W(core::no_score))
                                     : W::load(x.data() + i);
  }

  /// In the order of `place`.
  std::vector<double> find_slopes(const averages& found) const {
    const auto n = static_cast<index>(found.scores.size());
    const double share = 2 / (static_cast<double>(found.count) * static_cast<double>(n));
    std::vector<double> slopes(at(n));
    for (index i = 0; i < found.count; ++i) {
      const double all = found.all[at(i)], own = found.positives[at(i)];
      const double score = found.scores[at(i)];
      const double pull =
          pull_up(found.scores, 0, found.count, score, share * ((own - all) / all) / all,
                  slopes.data()) +
          pull_up(found.scores, found.count, n, score, share * (own / all) / all, slopes.data());
      slopes[at(i)] -= pull;
    }
    return slopes;
  }
  /// Adds weight max(0, m − (f_i − f_s)) to the slopes of a range; returns the sum of what was
  /// added.
  double pull_up(const std::vector<double>& scores, index first, index last, double score,
                 double weight, double* slopes) const {
    core::wide_lanes<double> sum;
    sum.clear();
    for (index s = first; s < last; s += core::per_pack) {
      const W more = missing(scores, s, last, score) * W(weight);
      sum.add(more);
      if (last - s < core::per_pack)
        core::store_first(core::load_first(slopes + s, last - s, W(0)) + more, slopes + s,
                          last - s);
      else
        (W::load(slopes + s) + more).store(slopes + s);
    }
    return sum.total();
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
