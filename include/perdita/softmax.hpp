// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include "core/errors.hpp"
#include "core/row_formula.hpp"
#include "core/row_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// p_j = e^{z_j} / Σ e^z
struct softmax_formula : row_formula {
  using statistic = log_sum_exp;
  template <class Row> auto finish(const Row& row) const {
    const target_odds o(row);
    using W = decltype(o.hit);
    row_outcome<W> out;
    out.value = W(0);
    out.image_scale = per_rival(o.miss, row);
    out.target_gradient = o.hit;
    return out;
  }
};

/// z_j − log Σ e^z; the largest entry is −softplus(u), which keeps the digits of 1 − p.
struct log_softmax_formula : row_formula {
  using statistic = log_sum_exp;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;
  static constexpr bool uses_share = false;
  static constexpr bool slope_reads_score() { return true; }
  template <class V> PERDITA_INLINE V slope(const V& z, const V&, const V&, const V* c) const {
    return (z - c[0]) - c[1];
  }
  template <class Row> auto finish(const Row& row) const {
    const target_odds o(row);
    using W = decltype(o.hit);
    row_outcome<W> out;
    out.value = W(0);
    out.coefficient[0] = row.shift;
    out.coefficient[1] = select(row.term[0] == W(0), W(0), o.above()); // all rivals masked
    out.target_gradient = -o.surprise;
    return out;
  }
};

/// Backward of either map from its own output y and b = ∂/∂y:
/// softmax: y_j (b_j − Σ y b);  log-softmax: b_j − e^{y_j} Σ b.
template <class T, bool Log> struct softmax_backward_formula : row_formula {
  using statistic = weighted_sums;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;
  static constexpr bool has_side = true;
  side_cursor<T> side(index) const { return {nullptr, nullptr, nullptr, T(1), T(0)}; }
  template <class V> PERDITA_INLINE V slope(const V& y, const V&, const V& b, const V* c) const {
    if constexpr (Log)
      return fnma(exp(y), c[0], b);
    return y * (b - c[0]);
  }
  template <class Row> auto finish(const Row& row) const {
    using W = decltype(row.target);
    row_outcome<W> out;
    out.value = W(0);
    out.coefficient[0] = row.term[Log ? 1 : 0];
    out.target_gradient = slope(row.target, W(0), row.target_side, out.coefficient);
    return out;
  }
};

inline void check_same_shape(const char* name, const char* what, index rows, index cols,
                             index expected_rows, index expected_cols) {
  const auto check = [&](const char* which, index got, index expected) {
    if (got != expected)
      fail(name, std::string(what) + which, to_text(got), to_text(expected));
  };
  check(" rows", rows, expected_rows);
  check(" columns", cols, expected_cols);
}

template <class T, class Formula, class X, class B, class Y>
void map_rows(const char* name, const Formula& formula, matrix_view<X> x, const matrix_view<B>* b,
              matrix_view<Y> y, const executor& run_on, workspace* memory) {
  check_same_shape(name, "result", y.rows, y.cols, x.rows, x.cols);
  if (b)
    check_same_shape(name, "gradient", b->rows, b->cols, x.rows, x.cols);
  if (x.rows == 0)
    return;
  require(x.cols > 0, name, "columns", x.cols, "at least 1 class");
  require_memory(name, "scores", x.data, x.rows * x.cols);
  require_memory(name, "result", y.data, x.rows * x.cols);
  if (b)
    require_memory(name, "gradient", b->data, x.rows * x.cols);
  row_job<T> job;
  job.name = name;
  job.scores = matrix_data<T>(x);
  job.gradient = matrix_data<T, true>(y);
  if (b)
    job.soft = matrix_data<T>(*b);
  check_overlap(name, job);
  run_rows<true>(formula, job, run_on, memory);
}

/// float for every storage type but double.
template <class M>
using compute_type =
    std::conditional_t<std::same_as<std::remove_const_t<typename element_of<M>::type>, double>,
                       double, float>;

} // namespace core

/// result = softmax(scores) by rows: e^{x_j} / Σ_k e^{x_k}. `result` may be the scores. A row
/// whose scores are all -inf gives zeros; one +inf takes all; a NaN or a second +inf makes the row
/// NaN.
/// Throws std::invalid_argument on a mismatch of shapes.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void softmax(X&& scores, Y&& result, const executor& run_on = {}, workspace* memory = nullptr) {
  core::map_rows<T>("softmax", core::softmax_formula{}, core::as_matrix(scores),
                    static_cast<const matrix_view<const T>*>(nullptr), core::as_matrix(result),
                    run_on, memory);
}

/// result = log softmax(scores) by rows: x_j − log Σ_k e^{x_k}. The largest entry of a confident
/// row keeps its digits (−1e-12 is not 0). A row whose scores are all -inf stays -inf.
template <class X, class Y, class T = core::compute_type<X>>
requires core::scores_like<X, T> && core::gradient_like<Y, T>
void log_softmax(X&& scores, Y&& result, const executor& run_on = {}, workspace* memory = nullptr) {
  core::map_rows<T>("log_softmax", core::log_softmax_formula{}, core::as_matrix(scores),
                    static_cast<const matrix_view<const T>*>(nullptr), core::as_matrix(result),
                    run_on, memory);
}

/// ∂/∂scores from p = softmax(scores) and d_p = ∂/∂p:  p_j (d_j − Σ_k p_k d_k).
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void softmax_backward(P&& p, D&& d_p, Y&& d_scores, const executor& run_on = {},
                      workspace* memory = nullptr) {
  const auto d = core::as_matrix(d_p);
  core::map_rows<T>("softmax_backward", core::softmax_backward_formula<T, false>{},
                    core::as_matrix(p), &d, core::as_matrix(d_scores), run_on, memory);
}

/// ∂/∂scores from log_p = log_softmax(scores) and d_log_p = ∂/∂log_p:  d_j − p_j Σ_k d_k.
template <class P, class D, class Y, class T = core::compute_type<P>>
requires core::scores_like<P, T> && core::scores_like<D, T> && core::gradient_like<Y, T>
void log_softmax_backward(P&& log_p, D&& d_log_p, Y&& d_scores, const executor& run_on = {},
                          workspace* memory = nullptr) {
  const auto d = core::as_matrix(d_log_p);
  core::map_rows<T>("log_softmax_backward", core::softmax_backward_formula<T, true>{},
                    core::as_matrix(log_p), &d, core::as_matrix(d_scores), run_on, memory);
}

} // namespace perdita::inline PERDITA_ABI
