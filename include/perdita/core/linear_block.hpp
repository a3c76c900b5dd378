// SPDX-License-Identifier: MIT
#pragma once

/// The rows that the linear head has at hand: what is known of them before their scores are made,
/// and what becomes of the sums over their scores.

#include <algorithm>

#include "linear_job.hpp"
#include "linear_tile.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class Formula, class T> class linear_block {
  using V = pack<T>;
  using W = pack<double>;
  using statistic = typename Formula::statistic;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr index parts = wide_lanes<T>::parts;
  static constexpr int coefficients = slope_coefficients<Formula>();
  static_assert(statistic::terms <= row_record::terms);

public:
  linear_block(const Formula& formula, const row_job<T>& job, const linear_job<T>& linear,
               index slices, carver& memory)
      : formula_(formula), job_(job), first_class_(linear.first_class),
        classes_(linear.weights.rows), most_(linear.block_rows), slices_(slices) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    rows_ = memory.take<index>(size(most_));
    labels_ = memory.take<std::int64_t>(size(most_));
    for (double** p : {&scale_, &label_weight_, &target_side_})
      *p = memory.take<double>(size(most_));
    raw_target_ = memory.take<T>(size(most_));
    rivals_ = memory.take<T>(size(slices_ * most_));
    partial_ = memory.take<summary<statistic, W>>(size(slices_ * most_ / finish_rows));
    merged_ = memory.take<summary<statistic, W>>(size(most_ / finish_rows));
    slopes_ = memory.take<panel_slopes<Formula, T>>(size(most_ / width));
  }

  /// How many rows there are; their numbers; and how many panels they take.
  index count() const { return count_; }
  const index* rows() const { return rows_; }
  index panels() const { return (count_ + width - 1) / width; }
  index rows_in(index panel) const { return std::min(width, count_ - panel * width); }

  /// Takes the next rows that count, from row r on, as many as fit; ignored(row) for the others.
  /// Returns the row after.
  template <class F> index collect(index r, F ignored) {
    count_ = 0;
    for (const index rows = job_.scores.rows; r < rows && count_ < most_; ++r) {
      std::int64_t label = 0;
      if (job_.labels)
        job_.read_labels(r, 1, &label);
      if (!job_.counts(r, label)) {
        ignored(r);
        continue;
      }
      rows_[count_] = r;
      labels_[count_++] = job_.labels ? label : job_.sparse.favourite(r);
    }
    for (index i = 0; i < panels() * width; ++i)
      begin(i);
    return r;
  }

  // ---- scores of a panel, n classes from the weights' number `first` on

  V labels(index panel, index first, index n) const {
    return linear_tile<Formula, T>::place(labels_ + panel * width, first_class_ + first, n);
  }
  T* raw_targets(index panel) const { return raw_target_ + panel * width; }
  /// `soft` has room for n packs.
  piece_side<T> side(index panel, index first, index n, T* soft) const {
    piece_side<T> result;
    if constexpr (Formula::has_side) {
      result.side = formula_.side(first_class_ + first);
      if (job_.sparse) {
        std::fill_n(soft, n * width, T(0));
        for (index i = 0; i < rows_in(panel); ++i)
          job_.sparse.scatter(rows_[panel * width + i], first_class_ + first, n, soft + i, width);
        result.soft = soft;
      }
    }
    return result;
  }

  // ---- sums: each panel of each slice of the classes by itself, then all together

  void put(const panel_sums<statistic, T>& sums, index slice, index panel) const {
    W shift[parts];
    widen(sums.shift, shift);
    for (index h = 0; h < parts; ++h) {
      auto& to = partial_[(panel * parts + h) * slices_ + slice];
      to.shift = shift[h];
      for (int k = 0; k < statistic::terms; ++k)
        to.term[k] = sums.term[k].folded(static_cast<int>(h));
    }
    sums.rivals.store(rivals_ + slice * most_ + panel * width);
  }
  void merge_slices() {
    for (index group = 0; group < panels() * parts; ++group) {
      const auto* part = partial_ + group * slices_;
      merged_[group] = part[0];
      for (index s = 1; s < slices_; ++s)
        merged_[group] = merge(merged_[group], part[s]);
    }
    for (index s = 1; s < slices_; ++s)
      for (index i = 0; i < panels() * width; i += width)
        max(V::load(rivals_ + s * most_ + i), V::load(rivals_ + i)).store(rivals_ + i);
  }

  // ---- records

  void record(row_record* records) const {
    for (index i = 0; i < count_; ++i) {
      const auto& s = merged_[i / finish_rows];
      row_record& r = records[rows_[i]];
      r = {};
      r.shift = lane(s.shift, i);
      for (int k = 0; k < statistic::terms; ++k)
        r.term[k] = lane(s.term[k], i);
      r.rivals = static_cast<double>(rivals_[i]);
      r.raw_target = static_cast<double>(raw_target_[i]);
      const std::int64_t at = labels_[i] - first_class_;
      r.has_target = at >= 0 && at < classes_ ? 1 : 0;
    }
  }
  void recall(const row_record* records) {
    for (index i = 0; i < panels() * width; ++i) {
      const row_record& r = records[rows_[std::min(i, count_ - 1)]];
      auto& s = merged_[i / finish_rows];
      set_lane(s.shift, i, r.shift);
      for (int k = 0; k < statistic::terms; ++k)
        set_lane(s.term[k], i, r.term[k]);
      rivals_[i] = static_cast<T>(r.rivals);
      raw_target_[i] = static_cast<T>(r.raw_target);
    }
  }
  static void merge_records(row_record& a, const row_record& b) {
    const auto both = merge(summary_of(a), summary_of(b));
    a.shift = first_lane(both.shift);
    for (int k = 0; k < statistic::terms; ++k)
      a.term[k] = first_lane(both.term[k]);
    a.rivals = std::max(a.rivals, b.rivals);
    a.raw_target = b.has_target != 0 ? b.raw_target : a.raw_target;
    a.has_target = std::max(a.has_target, b.has_target);
  }

  // ---- from sums to values and slopes

  /// Values and by-products go where there is a total to add to.
  void finish(exact_sum* total) {
    value_sum values;
    for (index p = 0; p < panels(); ++p)
      finish_panel(p, total ? &values : nullptr);
    if (total)
      values.add_to(*total);
  }
  const panel_slopes<Formula, T>& slopes(index panel) const { return slopes_[panel]; }
  /// Σ_j |∂value/∂score| of the rows of a panel where every slope but the label's is an image's
  /// share, and about that for other formulas of a softmax.
  V mass(index panel) const {
    W factor[parts], target[parts], result[parts];
    widen(slopes_[panel].factor, factor);
    widen(slopes_[panel].target, target);
    for (index h = 0; h < parts; ++h)
      result[h] = abs(factor[h]) * merged_[panel * parts + h].term[0] + abs(target[h]);
    return narrow(result);
  }

private:
  void begin(index i) {
    raw_target_[i] = 0;
    scale_[i] = label_weight_[i] = target_side_[i] = 0;
    if (i >= count_) {
      labels_[i] = -1;
      return;
    }
    const auto label = static_cast<index>(labels_[i]);
    scale_[i] = job_.row_scale(rows_[i]);
    if (job_.labels)
      label_weight_[i] = formula_.label_weight(label);
    target_side_[i] =
        target_side(formula_, label, job_.sparse ? job_.sparse.probability(rows_[i], label) : T(0),
                    static_cast<bool>(job_.sparse));
  }

  void finish_panel(index p, value_sum* values) {
    const V raw = V::load(raw_target_ + p * width);
    W target[parts], raw_target[parts], rivals[parts];
    widen(formula_.score(raw), target);
    widen(raw, raw_target);
    widen(V::load(rivals_ + p * width), rivals);
    W shift[parts], factor[parts], scale[parts], slope[parts], c[coefficients][parts];
    for (index h = 0; h < parts; ++h) {
      const index at = p * width + h * finish_rows;
      row_summary<statistic> s;
      static_cast<summary<statistic, W>&>(s) = merged_[p * parts + h];
      s.target = target[h];
      s.raw_target = raw_target[h];
      s.target_side = W::load(target_side_ + at);
      s.label_weight = W::load(label_weight_ + at);
      s.classes = W(static_cast<double>(job_.scores.cols));
      const auto row = with_own(formula_, s, std::min(finish_rows, count_ - at),
                                [&](index i) { return rows_[at + i]; });
      const auto result = formula_.finish(row);
      if (values && at < count_)
        report(row, result.value, at, raw_target[h], rivals[h], *values);
      shift[h] = s.shift;
      scale[h] = W::load(scale_ + at);
      factor[h] = Formula::linear ? result.image_scale * scale[h] : result.image_scale;
      slope[h] = result.target_gradient * scale[h];
      for (int k = 0; k < coefficients; ++k)
        c[k][h] = result.coefficient[k];
    }
    panel_slopes<Formula, T>& to = slopes_[p];
    to.shift = narrow(shift);
    to.factor = narrow(factor);
    to.cut = V(std::numeric_limits<T>::min()) / abs(to.factor);
    to.scale = narrow(scale);
    to.target = narrow(slope);
    for (int k = 0; k < coefficients; ++k)
      to.coefficient[k] = narrow(c[k]);
  }
  template <class Row>
  void report(const Row& row, const W& value, index at, const W& raw_target, const W& rivals,
              value_sum& values) const {
    static constexpr index each[finish_rows] = {0, 1, 2, 3, 4, 5, 6, 7};
    const index n = std::min(finish_rows, count_ - at);
    for (index i = 0; i < n; ++i)
      store_value(job_, rows_[at + i], lane(value, i), values);
    if (job_.report.any())
      store_report(formula_, job_, row, rows_ + at, each, raw_target, rivals, n);
  }

  static double lane(const W& x, index i) {
    alignas(64) double v[finish_rows];
    x.store(v);
    return v[i % finish_rows];
  }
  static void set_lane(W& x, index i, double value) {
    x = select(iota<double>() == W(static_cast<double>(i % finish_rows)), W(value), x);
  }
  static summary<statistic, W> summary_of(const row_record& r) {
    summary<statistic, W> s;
    s.shift = W(r.shift);
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] = W(r.term[k]);
    return s;
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index first_class_, classes_, most_, slices_;
  index count_ = 0;
  index* rows_ = nullptr;
  std::int64_t* labels_ = nullptr; // -1 in lanes without a row
  double *scale_ = nullptr, *label_weight_ = nullptr, *target_side_ = nullptr;
  T *raw_target_ = nullptr, *rivals_ = nullptr;
  summary<statistic, W>*partial_ = nullptr, *merged_ = nullptr; // of every slice; of all
  panel_slopes<Formula, T>* slopes_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
