// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// p = softmax of a row: what the first pass over the rows leaves to the second.
struct entropy_row {
  double top = 0;      ///< the largest score over the temperature
  double inverse = 0;  ///< 1/Σ e^d, d = z − top
  double surprise = 0; ///< −Σ p d
  double entropy = 0;  ///< −Σ p log p = log Σ e^d − Σ p d
};

} // namespace core

/// Entropy of a softmax's predictions, without labels: row by row, and of their batch mean.
///
///   a mean_i H(p_i) + b (log K − H(p̄)),   p_i = softmax(x_i/τ), p̄ = mean_i p_i, K classes
///   H(p) = −Σ_j p_j log p_j
///   ∂/∂x_ij = (p_ij/(nτ)) (−a (log p_ij + H(p_i)) + b (log p̄_j − Σ_k p_ik log p̄_k))
///
/// a = 1, b = 0: entropy minimisation; a < 0: a bonus on entropy (confidence penalty).
/// a = 0, b = 1: me-max, the divergence of p̄ from uniform, in [0, log K].
/// a = b = 1: log K less the mutual information of row and class: sure of each row, and fair to the
/// classes. Units: nats.
/// Shapes: scores and gradient rows × classes of T; the gradient may be the scores themselves.
/// Special values: a masked class (-inf) has no part in H(p_i), but counts in K. A row with NaN,
/// +inf or nothing but -inf makes the value and its own gradient NaN, and adds nothing to p̄.
/// Call options: row_weights weigh both means (n is their sum; 0 removes a row; nothing left gives
/// 0); scale, accumulate and `values`, which has H(p_i) times the row's weight, as for losses of
/// rows. upstream and normaliser are refused: p̄ belongs to the batch, and no reduction changes it.
/// Accuracy: sums are in double; H keeps its digits where it is small, log K − H(p̄) is within a few
/// 2^-53 log K. Threads do not matter. Cost: exponentials twice, if there is a gradient. Allocates
/// four numbers per row, and a row per 128 rows and per thread, in each call; call_options::memory
/// is not used. Throws std::invalid_argument.
/// Source: Grandvalet, Bengio 2004 (a); Krause, Perona, Gomes 2010 (both); Assran et al. 2021
/// (me-max; SimGCD takes τ = 0.1 and weight 2); Pereyra et al. 2017 (a < 0).
///
///   perdita::prediction_entropy<float> me_max({.row = 0, .batch = 2, .temperature = 0.1f});
///   float value = me_max(logits, d_logits, {.accumulate = true});
template <class T = float> class prediction_entropy {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    T row = 1;         ///< a: of the mean of the rows' entropies
    T batch = 0;       ///< b: of log K less the entropy of the mean
    T temperature = 1; ///< τ > 0
  };
  static constexpr const char* name = "prediction_entropy";

  prediction_entropy() : prediction_entropy(options{}) {}
  explicit(false) prediction_entropy(const options& o) : options_(o) {
    core::finite(name, "row", o.row);
    core::finite(name, "batch", o.batch);
    core::invertible<double>(name, "temperature", o.temperature);
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> scores, const call_options<T>& call = {}) const {
    return run(scores, {}, false, call);
  }
  T operator()(matrix_view<const T> scores, matrix_view<T> gradient,
               const call_options<T>& call = {}) const {
    return run(scores, gradient, true, call);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};
  static constexpr index rows_per_task = 128;
  using W = core::pack<double>;

  void check(const matrix_view<const T>& x, const matrix_view<T>& g, bool has_gradient,
             const call_options<T>& call) const {
    checks.memory("scores", x.data, x.rows * x.cols);
    checks.call(call, x.rows, false, "as many as the scores have");
    if (call.upstream.data || call.normaliser != 0)
      core::fail(std::string("perdita::") + name +
                 ": upstream or normaliser is given, expected neither");
    if (x.rows > 0)
      core::require(x.cols > 0, name, "columns", x.cols, "at least 1 class");
    if (has_gradient)
      checks.gradient(core::matrix_data<T>(x), core::matrix_data<T, true>(g), call.accumulate);
  }

  T run(const matrix_view<const T>& x, const matrix_view<T>& g, bool has_gradient,
        const call_options<T>& call) const {
    check(x, g, has_gradient, call);
    const index tasks = (x.rows + rows_per_task - 1) / rows_per_task;
    const auto width = static_cast<std::size_t>(core::whole_packs(x.cols));
    const auto workers = std::min(static_cast<std::size_t>(tasks), call.run_on.concurrency());
    std::vector<core::entropy_row> rows(static_cast<std::size_t>(x.rows));
    std::vector<double> sums(static_cast<std::size_t>(tasks) * width);
    // work(r, images, sum) for every row r; sum is its task's, of weighted probabilities.
    const auto for_rows = [&](auto work) {
      core::share_out(tasks, workers, call.run_on, [&](std::size_t) {
        return [&, images = std::vector<double>(width)](index t) mutable {
          const index last = std::min(x.rows, (t + 1) * rows_per_task);
          for (index r = t * rows_per_task; r < last; ++r)
            work(r, images.data(), sums.data() + static_cast<std::size_t>(t) * width);
        };
      });
    };
    for_rows([&](index r, double* images, double* sum) {
      rows[static_cast<std::size_t>(r)] = measure(x, r, images, sum, core::weight_of(call, r));
    });

    core::exact_sum entropy, all;
    for (index r = 0; r < x.rows; ++r) {
      const auto& row = rows[static_cast<std::size_t>(r)];
      const double w = core::weight_of(call, r), part = w == 0 ? 0 : w * row.entropy;
      entropy.add(part);
      all.add(w);
      if (call.values.data)
        call.values[r] = static_cast<T>(part);
    }
    std::vector<double> mean(width); // first p̄, then its logarithm
    const double divergence = divide(sums, mean, all.value(), x.cols);
    const double share = all.value() == 0 ? 0 : 1 / all.value();
    if (has_gradient)
      for_rows([&](index r, double* images, double*) {
        differentiate(x, g, r, images, rows[static_cast<std::size_t>(r)], mean.data(), share, call);
      });
    if (share == 0)
      return 0;
    // A row that is not a number is one in the value, whatever the weights of the two terms are.
    const double average = entropy.value() * share, a = static_cast<double>(options_.row);
    const double rows_part = a == 0 && !std::isnan(average) ? 0 : a * average;
    return static_cast<T>(rows_part + static_cast<double>(options_.batch) * divergence);
  }

  /// x/τ − top of a row, filled up to whole packs with what has no image.
  void read_row(const matrix_view<const T>& x, index r, double top, double* images) const {
    const double steep = 1 / static_cast<double>(options_.temperature);
    for (index j = 0; j < x.cols; ++j)
      images[j] = static_cast<double>(x(r, j)) * steep - top;
    std::fill(images + x.cols, images + core::whole_packs(x.cols), core::no_score);
  }

  core::entropy_row measure(const matrix_view<const T>& x, index r, double* images, double* sum,
                            double weight) const {
    core::entropy_row row;
    if (weight == 0)
      return row;
    read_row(x, r, 0, images);
    index best = 0;
    bool lost = false;
    for (index j = 0; j < x.cols; ++j) {
      best = images[j] > images[best] ? j : best;
      lost = lost || std::isnan(images[j]);
    }
    row.top = images[best];
    if (lost || std::isinf(row.top)) {
      row.top = row.inverse = row.surprise = row.entropy = std::numeric_limits<double>::quiet_NaN();
      return row;
    }
    const index packs = core::whole_packs(x.cols);
    W rivals(0), moment(0);
    const W zero(0);
    for (index j = 0; j < packs; j += core::per_pack) {
      const W d = W::load(images + j) - row.top, e = exp_shifted(d);
      moment = select(e == zero, moment, moment - e * d);
      const W number = core::iota<double>() + static_cast<double>(j);
      rivals += select(number == W(static_cast<double>(best)), zero, e);
      e.store(images + j);
    }
    const double others = sum_lanes(rivals);
    row.inverse = 1 / (1 + others);
    row.surprise = sum_lanes(moment) * row.inverse;
    row.entropy = core::log1p_of(others) + row.surprise;
    const W factor(weight * row.inverse);
    for (index j = 0; j < packs; j += core::per_pack)
      fma(W::load(images + j), factor, W::load(sum + j)).store(sum + j);
    return row;
  }

  /// log p̄, and log K − H(p̄) = Σ p̄ log(K p̄).
  static double divide(const std::vector<double>& sums, std::vector<double>& mean, double weight,
                       index classes) {
    core::exact_sum divergence;
    const double k = static_cast<double>(classes);
    for (std::size_t j = 0; j < static_cast<std::size_t>(classes); ++j) {
      core::exact_sum total;
      for (std::size_t at = j; at < sums.size(); at += mean.size())
        total.add(sums[at]);
      const double p = weight == 0 ? 0 : total.value() / weight;
      mean[j] = p > 0 ? std::log(p) : 0;
      if (p > 0)
        divergence.add(p * std::log(k * p));
    }
    return divergence.value();
  }

  void differentiate(const matrix_view<const T>& x, const matrix_view<T>& g, index r,
                     double* images, const core::entropy_row& row, const double* log_mean,
                     double share, const call_options<T>& call) const {
    const double weight = core::weight_of(call, r), a = static_cast<double>(options_.row),
                 b = static_cast<double>(options_.batch);
    const double scale = static_cast<double>(call.scale) * share * weight /
                         static_cast<double>(options_.temperature);
    if (weight != 0)
      read_row(x, r, row.top, images);
    core::exact_sum cross; // Σ p log p̄
    const auto probability = [&](index j) {
      return core::first_lane(exp_shifted(W(images[j]))) * row.inverse;
    };
    if (weight != 0 && b != 0)
      for (index j = 0; j < x.cols; ++j)
        cross.add(probability(j) * log_mean[j]);
    for (index j = 0; j < x.cols; ++j) {
      double slope = 0;
      if (weight != 0) {
        const double p = probability(j);
        const double of_row = p == 0 ? 0 : images[j] + row.surprise; // log p + H
        slope = scale * p * (b * (log_mean[j] - cross.value()) - a * of_row);
      }
      g(r, j) = static_cast<T>(call.accumulate ? static_cast<double>(g(r, j)) + slope : slope);
    }
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
