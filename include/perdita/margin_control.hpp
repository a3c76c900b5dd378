// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/sequences.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// What the first pass over the rows leaves to the second, of p = softmax of a row.
struct squared_row {
  double top = 0;     ///< the largest score
  double inverse = 0; ///< 1/Σ e^d, d = z − top
  double square = 0;  ///< Σ p²
};

} // namespace core

/// A penalty on confident predictions, to be added to another loss: the softmax's squared Frobenius
/// norm, without labels. Of p_i = softmax(x_i), S_i = Σ_j p_ij² and the row weights w (1),
///
///   λ log(1 + F),  F = Σ_i w_i S_i,       ∂/∂x_ij = (2 λ w_i/(1 + F)) p_ij (p_ij − S_i)
///   per_row:  λ Σ_i w_i log(1 + S_i)/Σ w,  ∂/∂x_ij = (2 λ w_i/((1 + S_i) Σ w)) p_ij (p_ij − S_i)
///
/// F is of the whole batch: between rows/K, where all is uniform, and the number of rows, so that
/// its strength depends on the size of the batch; per_row does not.
/// Shapes: scores and gradient rows × classes of T; the gradient may be the scores themselves.
/// Special values: a masked class (-inf) has no part. A row with NaN, +inf or nothing but -inf
/// makes the value and its own gradient NaN, and has no part in the other rows' gradients.
/// Call options: row_weights as above (0 removes a row); scale, accumulate and `values`, which has
/// w_i S_i, or with per_row w_i log(1 + S_i), without λ. upstream and normaliser are refused.
/// Accuracy: sums are in double; the slope of a row's largest score keeps its digits where p is
/// almost 1. Threads do not matter. Cost: exponentials twice, if there is a gradient. Allocates
/// three numbers per row, and a row per thread, in each call; call_options::memory is not used.
/// Throws std::invalid_argument.
/// Source: the margin control of FedLD, for federated learning (its code, with λ = 0.03 and the
/// norm of the batch).
///
///   perdita::margin_control<float> control;
///   value += control(logits, d_logits, {.accumulate = true});
template <class T = float> class margin_control {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    T weight = T(0.03);   ///< λ, finite
    bool per_row = false; ///< the mean of the rows' penalties
  };
  static constexpr const char* name = "margin_control";

  margin_control() : margin_control(options{}) {}
  explicit(false) margin_control(const options& o) : options_(o) {
    core::finite(name, "weight", o.weight);
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
    std::vector<core::squared_row> rows(static_cast<std::size_t>(x.rows));
    const auto at = [&](index r) -> core::squared_row& {
      return rows[static_cast<std::size_t>(r)];
    };
    for_rows(x, call, [&](index r, double* images) { at(r) = measure(x, r, images); });

    core::exact_sum penalty, valid, weights; // valid: without rows that are not numbers
    for (index r = 0; r < x.rows; ++r) {
      const double w = core::weight_of(call, r), square = at(r).square;
      const double part = core::times(w, options_.per_row ? core::log1p_of(square) : square);
      penalty.add(part);
      weights.add(w);
      if (!std::isnan(part))
        valid.add(part);
      if (call.values.data)
        call.values[r] = static_cast<T>(part);
    }
    const double lambda = static_cast<double>(options_.weight), all = weights.value();
    if (has_gradient)
      for_rows(x, call, [&](index r, double* images) {
        const double w = core::weight_of(call, r), batch = 1 + valid.value();
        const double over = options_.per_row ? (1 + at(r).square) * all : batch;
        const double factor = core::times(w, 2 * lambda * static_cast<double>(call.scale) / over);
        differentiate(x, g, r, images, at(r), factor, call.accumulate);
      });
    if (all == 0)
      return 0;
    return static_cast<T>(
        lambda * (options_.per_row ? penalty.value() / all : core::log1p_of(penalty.value())));
  }

  /// work(r, room for the row) for every row
  template <class F>
  void for_rows(const matrix_view<const T>& x, const call_options<T>& call, F work) const {
    const index tasks = (x.rows + rows_per_task - 1) / rows_per_task;
    const auto workers = std::min(static_cast<std::size_t>(tasks), call.run_on.concurrency());
    const auto width = static_cast<std::size_t>(core::whole_packs(x.cols));
    core::share_out(tasks, workers, call.run_on, [&](std::size_t) {
      return [&, images = std::vector<double>(width)](index t) mutable {
        const index last = std::min(x.rows, (t + 1) * rows_per_task);
        for (index r = t * rows_per_task; r < last; ++r)
          work(r, images.data());
      };
    });
  }
  /// e^(x − top); returns their sum.
  static double find_images(const matrix_view<const T>& x, index r, double top, double* images) {
    for (index j = 0; j < x.cols; ++j)
      images[j] = static_cast<double>(x(r, j)) - top;
    std::fill(images + x.cols, images + core::whole_packs(x.cols), core::no_score);
    return core::images_of(images, x.cols, images);
  }

  static core::squared_row measure(const matrix_view<const T>& x, index r, double* images) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    core::squared_row row{core::no_score};
    for (index j = 0; j < x.cols; ++j) {
      const auto score = static_cast<double>(x(r, j));
      row.top = score > row.top || std::isnan(score) ? score : row.top;
    }
    if (!std::isfinite(row.top))
      return {nan, nan, nan};
    row.inverse = 1 / find_images(x, r, row.top, images);
    core::pack<double> square(0);
    for (index j = 0; j < x.cols; j += core::per_pack) {
      const auto p = core::pack<double>::load(images + j) * row.inverse;
      square = fma(p, p, square);
    }
    row.square = sum_lanes(square);
    return row;
  }
  static void differentiate(const matrix_view<const T>& x, const matrix_view<T>& g, index r,
                            double* images, const core::squared_row& row, double factor,
                            bool accumulate) {
    if (factor != 0)
      find_images(x, r, row.top, images);
    for (index j = 0; j < x.cols; ++j) {
      double slope = 0;
      if (factor != 0) {
        const double p = images[j] * row.inverse;
        slope = factor * p * (images[j] == 1 ? lead(images, x.cols, row.inverse) : p - row.square);
      }
      g(r, j) = static_cast<T>(accumulate ? static_cast<double>(g(r, j)) + slope : slope);
    }
  }
  /// p − Σ p² for the largest p, without a difference that loses digits: Σ p_k (p − p_k).
  static double lead(const double* images, index n, double inverse) {
    core::pack<double> sum(0);
    for (index k = 0; k < n; k += core::per_pack) {
      const auto e = core::pack<double>::load(images + k);
      sum = fma(e, core::pack<double>(1) - e, sum);
    }
    return sum_lanes(sum) * inverse * inverse;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
