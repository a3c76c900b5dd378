// SPDX-License-Identifier: MIT
#pragma once

/// What one call asks of the kernels, in terms that do not depend on the caller's types.

#include <cstdint>

#include "statistics.hpp"
#include "storage.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Columns are taken in chunks of this many: a chunk of a row stays in the first-level cache, its
/// sums in T lanes are short, and the sums of chunks are added in double.
inline constexpr index chunk_columns = 512;
/// Rows whose summaries are finished together, one per lane of a pack of doubles.
inline constexpr index finish_rows = lanes<double>;
/// Rows up to this long are solved as many at a time where a formula can: most of what is done for
/// one row does not depend on its length.
inline constexpr index most_short_columns = 31;
/// The rows in the first lanes of a pack of T.
template <class T> PERDITA_INLINE pack<double> first_rows(const pack<T>& a) {
  pack<double> wide[sizeof(double) / sizeof(T)];
  widen(a, wide);
  return wide[0];
}
/// In the lanes of V, what is the same for all, or has been found for finish_rows rows.
template <class V> PERDITA_INLINE V to_lanes(double x) {
  return V(static_cast<typename V::value_type>(x));
}
template <class V> PERDITA_INLINE V to_lanes(const pack<double>& rows) {
  pack<double> wide[sizeof(double) / sizeof(typename V::value_type)];
  for (auto& w : wide)
    w = rows;
  return narrow(wide);
}
/// How far ahead a row is asked for that is read for the first time, in bytes and in numbers.
inline constexpr index prefetch_bytes = 16384;
template <class T>
inline constexpr index prefetch_distance = prefetch_bytes / static_cast<index>(sizeof(T));

/// What a formula's finish() gets: a row in each lane. For statistics over the rivals the target
/// is not in the sums.
template <class Statistic, class W = pack<double>> struct row_summary : summary<Statistic, W> {
  W target;       ///< score of the target
  W raw_target;   ///< the same before the formula's score()
  W target_side;  ///< side number of the target
  W label_weight; ///< class weight of the target
  W classes;
};

/// What it returns, all before weights and reductions.
template <class W = pack<double>, int Coefficients = 3> struct row_outcome {
  static constexpr int coefficients = Coefficients;
  W value;
  W image_scale = W(0);                             ///< share: image_scale e^{z - shift}
  W coefficient[coefficients] = {W(0), W(0), W(0)}; ///< whatever else slope() needs
  W target_gradient;                                ///< ∂value/∂score of the target, all of it
};
inline constexpr int coefficients = row_outcome<>::coefficients;

/// By-products of a row, in the same units as the value.
template <class W = pack<double>> struct row_report {
  W log_sum_exp, target_log_probability, entropy, penalty;
};

/// Where a row's by-products go; null for those not wanted.
template <class T> struct report_views {
  vector_view<T> values, log_sum_exp, target_log_probability, entropy, penalty;
  vector_view<unsigned char> hits;
  bool any() const {
    return log_sum_exp.data || target_log_probability.data || entropy.data || penalty.data ||
           hits.data;
  }
};

/// Soft targets as lists of (class, probability), or nothing.
template <class T> struct sparse_data {
  const void* classes = nullptr;
  index class_stride = 1;
  std::int64_t (*class_reader)(const void*, index) = nullptr;
  vector_view<const T> probabilities;
  vector_view<const std::int64_t> row_starts;
  index per_row = 0; ///< where there are no row_starts

  explicit operator bool() const { return class_reader != nullptr; }
  index begin(index r) const {
    return row_starts.data ? static_cast<index>(row_starts[r]) : r * per_row;
  }
  std::int64_t class_at(index entry) const { return class_reader(classes, entry * class_stride); }
  /// Adds the probabilities of row r for the classes [first, first + n) to `to`, `step` apart.
  void scatter(index r, index first, index n, T* to, index step) const {
    for (index e = begin(r); e < begin(r + 1); ++e) {
      const auto j = static_cast<index>(class_at(e)) - first;
      if (j >= 0 && j < n)
        to[j * step] += probabilities[e];
    }
  }
  T probability(index r, std::int64_t c) const {
    T q = 0;
    scatter(r, static_cast<index>(c), 1, &q, 1);
    return q;
  }
  /// The class of the largest entry; 0 where there is none.
  std::int64_t favourite(index r) const {
    index best = begin(r);
    for (index e = best; e < begin(r + 1); ++e)
      best = probabilities[e] > probabilities[best] ? e : best;
    return best < begin(r + 1) ? class_at(best) : 0;
  }
};

template <class T> struct row_job {
  const char* name = "";
  matrix_data<T> scores;
  matrix_data<T, true> gradient; ///< no data: value only
  matrix_data<T> soft;           ///< soft targets, or no data
  sparse_data<T> sparse;         ///< the same as lists, for heads that make the scores
  const void* labels = nullptr;
  void (*label_reader)(const void*, index, index, index, std::int64_t*) = nullptr;
  index label_stride = 1;
  std::int64_t ignore_index = 0;
  bool accumulate = false;
  bool streaming = false; ///< the gradient goes past the caches
  double scale = 1;       ///< of every gradient: loss scale, and 1/denominator for the mean
  vector_view<const T> row_weights, upstream;
  report_views<T> report;

  bool has_soft_target() const { return soft || sparse; }
  bool has_gradient() const { return static_cast<bool>(gradient); }
  bool in_place() const {
    return has_gradient() && static_cast<const void*>(gradient.data) == scores.data;
  }
  bool over_target() const { return soft && static_cast<const void*>(gradient.data) == soft.data; }
  void read_labels(index first, index n, std::int64_t* out) const {
    label_reader(labels, label_stride, first, n, out);
  }
  std::int64_t label(index r) const {
    std::int64_t result;
    read_labels(r, 1, &result);
    return result;
  }
  /// Whether a row counts for anything: a weight of zero is removal.
  bool counts(index r, std::int64_t label_of_row) const {
    return !(labels && label_of_row == ignore_index) &&
           !(row_weights.data && row_weights[r] == T(0));
  }
  double row_weight(index r) const {
    return row_weights.data ? static_cast<double>(row_weights[r]) : 1.0;
  }
  double row_scale(index r) const {
    const double s = scale * row_weight(r);
    return upstream.data ? s * static_cast<double>(upstream[r]) : s;
  }
};

/// Adds numbers with the rounding errors kept (Knuth's two-sum).
struct exact_sum {
  double sum = 0, error = 0;
  void add(double x) {
    const double t = sum + x, back = t - sum;
    error += (sum - (t - back)) + (x - back);
    sum = t;
  }
  void add(const exact_sum& other) {
    add(other.sum);
    error += other.error;
  }
  double value() const {
    const double total = sum + error;
    return total == total ? total : sum; // inf - inf in the error is not the sum's doing
  }
};

/// The sum of a block's values: row r is added in lane r mod 8, one by one or eight at a time, with
/// the same bits.
struct value_sum {
  alignas(64) double sum[finish_rows] = {}, error[finish_rows] = {};

  void add(index r, double x) {
    exact_sum lane{sum[r % finish_rows], error[r % finish_rows]};
    lane.add(x);
    sum[r % finish_rows] = lane.sum;
    error[r % finish_rows] = lane.error;
  }
  /// Eight rows from one on whose number is a multiple of 8.
  void add(const pack<double>& x) {
    const auto before = pack<double>::load(sum);
    const pack<double> t = before + x, back = t - before;
    (pack<double>::load(error) + ((before - (t - back)) + (x - back))).store(error);
    t.store(sum);
  }
  void add_to(exact_sum& total) const {
    for (index i = 0; i < finish_rows; ++i)
      total.add({sum[i], error[i]});
  }
};

/// One number per lane of a pack<T>, in double or, for T = double, in a double and its error.
template <class T> struct wide_lanes;

template <> struct wide_lanes<float> {
  static constexpr int parts = 2;
  pack<double> part[parts];

  void clear() { part[0] = part[1] = pack<double>(0); }
  PERDITA_INLINE void add(const pack<float>& x) {
    part[0] += widen_low(x);
    part[1] += widen_high(x);
  }
  pack<double> folded(int p) const { return part[p]; }
  void replace(int p, const pack<double>& x, const pack_mask<double>& where) {
    part[p] = select(where, x, part[p]);
  }
  /// Σ of the lanes: halves onto halves, in the order of sum_lanes().
  double total() const { return sum_lanes(part[0] + part[1]); }
};

template <> struct wide_lanes<double> {
  static constexpr int parts = 1;
  pack<double> part, error;

  void clear() { part = error = pack<double>(0); }
  PERDITA_INLINE void add(const pack<double>& x) { // Knuth's two-sum
    const pack<double> t = part + x, back = t - part;
    error += (part - (t - back)) + (x - back);
    part = t;
  }
  pack<double> folded(int) const {
    const pack<double> sum = part + error;
    return select(is_nan(sum), part, sum); // an infinite sum has a NaN for its error
  }
  void replace(int, const pack<double>& x, const pack_mask<double>& where) {
    part = select(where, x, part);
    error = select(where, pack<double>(0), error);
  }
  double total() const { return sum_lanes(folded(0)); }
};

/// Moves the sums of a whole pack of lanes to another shift; lanes that stay keep their bits. Out
/// of line, as it is rare and long.
template <class Statistic, class T>
PERDITA_NOINLINE void rebase_lanes(wide_lanes<T>* sums, const pack<double>* delta) {
  for (int p = 0; p < wide_lanes<T>::parts; ++p) {
    pack<double> t[Statistic::terms];
    for (int k = 0; k < Statistic::terms; ++k)
      t[k] = sums[k].folded(p);
    Statistic::rebase(t, delta[p]);
    const auto moved = !(delta[p] == pack<double>(0));
    for (int k = 0; k < Statistic::terms; ++k)
      sums[k].replace(p, t[k], moved);
  }
}

} // namespace perdita::inline PERDITA_ABI::core
