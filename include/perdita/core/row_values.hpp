// SPDX-License-Identifier: MIT
#pragma once

/// For losses whose rows' weights depend on the rows' values: a first pass over another loss, which
/// finds the values, before the second, which weighs them.

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "row_loss.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// The value of each row by itself, and what the caller would have it count: row_weights, or 1, and
/// 0 where it is ignored.
template <class T> struct row_values {
  std::vector<T> value;
  std::vector<double> weight;
  index size() const { return static_cast<index>(value.size()); }
};

inline void require_rows(const char* name, const char* what, index got, index expected) {
  if (got != expected) [[unlikely]]
    fail(name, what, to_text(got), to_text(expected) + " (as many as the scores have)");
}

/// A second pass must not fail, because the first writes the by-products.
template <class T, class S, class Y, class G>
void require_gradient(const char* name, matrix_view<S> scores, Y& target, matrix_view<G> gradient,
                      bool accumulate) {
  require_rows(name, "gradient rows", gradient.rows, scores.rows);
  require_rows(name, "gradient columns", gradient.cols, scores.cols);
  require_memory(name, "gradient", gradient.data, scores.rows * scores.cols);
  row_job<T> job;
  job.scores = matrix_data<T>(scores);
  job.gradient = matrix_data<T, true>(gradient);
  if constexpr (!labels_like<Y>)
    job.soft = matrix_data<T>(as_matrix(target));
  if (check_overlap(name, job) && accumulate && scores.rows * scores.cols > 0)
    fail(std::string("perdita::") + name +
         ": accumulate is true, expected false where the gradient overwrites the scores");
}

/// The caller's row weights, each a finite number of at least 0; 1 where there are none.
template <class T>
std::vector<double> read_weights(const char* name, const vector_view<const T>& weights,
                                 index rows) {
  std::vector<double> w(static_cast<std::size_t>(rows), 1.0);
  if (weights.data || weights.size > 0) {
    require_rows(name, "row_weights", weights.size, rows);
    require_memory(name, "row_weights", weights.data, rows);
  }
  if (!weights.data)
    return w;
  for (index i = 0; i < rows; ++i) {
    const auto x = static_cast<double>(weights[i]);
    if (!(x >= 0 && std::isfinite(x)))
      fail_at(name, "row_weights", i, to_text(x), "a finite number, 0 or more");
    w[static_cast<std::size_t>(i)] = x;
  }
  return w;
}

/// The first pass: checks the call and writes all by-products but the values. Those are not
/// weighted by the caller's weights, but rows of weight 0 are left out.
template <class Loss, class X, class Y, class T>
row_values<T> find_row_values(const char* name, const Loss& loss, X& scores, Y& target,
                              const call_options<T>& call) {
  const index rows = as_matrix(scores).rows;
  row_values<T> found;
  found.weight = read_weights(name, call.row_weights, rows);
  found.value.resize(static_cast<std::size_t>(rows));
  if (call.values.data || call.values.size > 0) {
    require_rows(name, "values", call.values.size, rows);
    require_memory(name, "values", call.values.data, rows);
  }
  std::vector<T> present(found.value.size());
  for (std::size_t i = 0; i < present.size(); ++i)
    present[i] = found.weight[i] == 0 ? T(0) : T(1);

  call_options<T> first = call;
  first.row_weights = present;
  first.values = found.value;
  loss(scores, target, first);

  if constexpr (labels_like<Y>) {
    const auto labels = as_vector(target);
    using L = std::remove_const_t<std::remove_reference_t<decltype(labels[0])>>;
    for (index i = 0; i < rows; ++i) {
      std::int64_t label;
      read_labels<L>(labels.data, labels.stride, i, 1, &label);
      if (label == loss.settings().ignore_index)
        found.weight[static_cast<std::size_t>(i)] = 0;
    }
  }
  return found;
}

/// What the second pass is asked for: the by-products are there already, but for the values.
template <class T>
call_options<T> second_pass(const call_options<T>& call, const std::vector<T>& weights) {
  call_options<T> second = call;
  second.row_weights = weights;
  second.log_sum_exp = second.target_log_probability = second.entropy = second.penalty = {};
  second.hits = {};
  return second;
}

} // namespace perdita::inline PERDITA_ABI::core
