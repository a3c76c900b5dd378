// SPDX-License-Identifier: MIT
#pragma once

/// What losses of a whole batch have in common: one value that no row has a part of to itself.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "sequences.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// The checks of such a call, of whose options scale, accumulate, run_on and memory have a meaning.
template <class T> struct batch_checks : sequence_checks<T> {
  void only_whole(const call_options<T>& c) const {
    this->call(c, c.values.size, false);
    if (c.row_weights.data || c.upstream.data || c.values.data || c.normaliser != 0)
      fail(std::string("perdita::") + this->name +
           ": row_weights, upstream, values or normaliser is given, expected none");
  }
  /// That gradients lie apart from the inputs and from each other.
  void apart(std::vector<extent> gradients, std::initializer_list<extent> inputs) const {
    const std::size_t written = gradients.size();
    gradients.insert(gradients.end(), inputs);
    require_apart(this->name, gradients, written);
  }
};

/// A vector as a matrix of one column.
template <class T> matrix_view<T> as_column(const vector_view<T>& v) {
  return {v.data, v.size, 1, v.stride, 1};
}

template <class T> double number_at(const matrix_data<T>& m, index r, index c) {
  T x;
  m.read(r, c, 1, &x);
  return static_cast<double>(x);
}
/// Writes or adds a number.
template <class T>
void put_number(const matrix_data<T, true>& m, index r, index c, double x, bool accumulate) {
  T to = 0;
  if (accumulate)
    m.read(r, c, 1, &to);
  to = static_cast<T>(static_cast<double>(to) + x);
  m.write(r, c, 1, &to);
}

/// Σ e^x as sum · e^top.
struct scaled_sum {
  double top = no_score, sum = 0;

  double log() const {
    if (sum != sum || sum == 0)
      return sum == 0 ? no_score : sum;
    return top + log_of(sum);
  }
};
/// Of a whole number of packs; -inf adds nothing, +inf makes it infinite, NaN NaN.
inline scaled_sum sum_of_images(const double* x, index n) {
  using W = pack<double>;
  scaled_sum s;
  auto wrong = W(0) > W(0);
  for (index i = 0; i < n; i += per_pack)
    wrong = wrong | is_nan(W::load(x + i));
  if (any(wrong))
    return {s.top, std::numeric_limits<double>::quiet_NaN()};
  s.top = largest_of(x, n);
  if (s.top == no_score || s.top == -no_score) {
    s.sum = s.top == no_score ? 0 : 1;
    return s;
  }
  W sum(0);
  for (index i = 0; i < n; i += per_pack)
    sum += exp_shifted(W::load(x + i) - s.top);
  s.sum = sum_lanes(sum);
  return s;
}
inline scaled_sum total_of(const scaled_sum* parts, index n) {
  double top = no_score;
  for (index i = 0; i < n; ++i)
    top = std::max(top, parts[i].top);
  exact_sum sum;
  for (index i = 0; i < n; ++i)
    sum.add(parts[i].top == top ? parts[i].sum : parts[i].sum * std::exp(parts[i].top - top));
  return {top, sum.value()};
}

} // namespace perdita::inline PERDITA_ABI::core
