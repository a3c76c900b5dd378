// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for losses of two rows of scores, of which the second is the target and has no
/// gradient: a student's and its teacher's. Both are at hand in double, and the formula gives the
/// value and the slopes,
///
///   double operator()(const double* x, const double* target, index n, index label,
///                     double* slopes) const;   label: -1 where there are none
///
/// with room for 3 n more doubles, and a pack, behind the slopes. A job with labels alone has e_y
/// for its target.

#include "resident_kernel.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class Formula>
concept paired_formula = requires {
  Formula::paired;
};

/// What a head that never holds a whole row of scores cannot serve.
template <class Formula>
concept whole_row_formula = paired_formula<Formula> || resident_formula<Formula>;

template <class Formula, class T> class paired_kernel {
public:
  static index rows_per_sum(const row_job<T>& job) { return block_rows(job); }
  static index rows_per_task(const row_job<T>& job, std::size_t) { return block_rows(job); }

  paired_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols) {
    carver memory(scratch);
    const auto n = static_cast<std::size_t>(cols_);
    for (double** row : {&x_, &target_})
      *row = memory.take<double>(n);
    slopes_ = memory.take<double>(4 * n + lanes<double>);
    stage_ = memory.take<T>(n);
    sum_ = memory.take<T>(n);
    scratch_bytes_ = memory.used();
  }
  static std::size_t scratch_bytes(const Formula& formula, const row_job<T>& job) {
    return paired_kernel(formula, job, nullptr).scratch_bytes_;
  }

  /// Rows [first, last): adds their weighted values to the total.
  void run(index first, index last, value_sum* total) {
    for (index r = first; r < last; ++r) {
      const std::int64_t label = job_.labels ? job_.label(r) : -1;
      if (!job_.counts(r, label)) {
        store_ignored(job_, r, stage_);
        continue;
      }
      read(job_.scores, r, x_);
      if (job_.soft)
        read(job_.soft, r, target_);
      else
        write_unit(static_cast<index>(label));
      store_value(job_, r, formula_(x_, target_, cols_, static_cast<index>(label), slopes_),
                  *total);
      if (job_.has_gradient())
        write(r);
    }
  }
  void drain() {}

private:
  void read(const matrix_data<T>& from, index r, double* to) {
    from.read(r, 0, cols_, stage_);
    for (index c = 0; c < cols_; ++c)
      to[c] = static_cast<double>(stage_[c]);
  }
  void write_unit(index label) {
    std::fill_n(target_, cols_, 0.0);
    target_[label] = 1;
  }
  void write(index r) {
    const double scale = job_.row_scale(r);
    for (index c = 0; c < cols_; ++c)
      stage_[c] = static_cast<T>(slopes_[c] * scale);
    if (job_.accumulate) {
      job_.gradient.reader(job_.gradient.at(r, 0), job_.gradient.col_stride, cols_, sum_);
      for (index c = 0; c < cols_; ++c)
        stage_[c] += sum_[c];
    }
    job_.gradient.write(r, 0, cols_, stage_);
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_;
  std::size_t scratch_bytes_ = 0;
  double *x_ = nullptr, *target_ = nullptr, *slopes_ = nullptr;
  T *stage_ = nullptr, *sum_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
