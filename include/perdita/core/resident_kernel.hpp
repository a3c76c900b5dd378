// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for losses and maps whose summary needs a whole row at hand: a row is solved where
/// it lies, or in a copy where its classes do not lie side by side, and its gradient (or what it is
/// mapped to) follows from cache. A formula declares, beside what row_formula.hpp says,
///
///   solve(x, n, room)           the summary of a row; `room` is for n numbers and a pack
///   solve(x, n, label, room)    the same, where it depends on the label
///   slopes<V>(c)                z → ∂value/∂score, from the outcome's coefficients in double
///   edge<T>(c)                  below it slopes are 0; where they take so long that they are only
///                               taken of the others, in double
///   record(row, summary)        of a map: takes note of what else was found
///
/// A job without labels is a map: the slopes are the result.

#include <bit>
#include <cstdint>

#include "row_kernel.hpp"
#include "threshold.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class Formula>
concept resident_formula = requires {
  Formula::statistic::resident;
};

template <class Formula, class T> class resident_kernel {
  using V = pack<T>;
  using statistic = typename Formula::statistic;
  static constexpr index width = static_cast<index>(lanes<T>);
  /// A solved row is soon read again.
  static constexpr index cached_numbers = (index{1} << 18) / static_cast<index>(sizeof(T));
  /// Up to here, a row and the next may be cached at once.
  static constexpr index two_in_cache = (index{1} << 20) / static_cast<index>(sizeof(T));
  static constexpr bool has_slopes = requires(const Formula& f, const double* c) {
    f.template slopes<V>(c);
  };
  static constexpr bool has_edge = requires(const Formula& f, const double* c) {
    f.template edge<T>(c);
  };

public:
  static index rows_per_sum(const row_job<T>& job) { return block_rows(job); }
  static index rows_per_task(const row_job<T>& job, std::size_t) { return block_rows(job); }

  resident_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols),
        scores_in_place_(job.scores.direct() && job.scores.col_stride == 1),
        gradient_in_place_(job.gradient.direct() && job.gradient.col_stride == 1 &&
                           !job.accumulate),
        // Ordinary stores where there would be hardly a whole line.
        streaming_(job.streaming && gradient_in_place_ && cols_ >= 8 * width),
        prefetches_(scores_in_place_ && cols_ <= two_in_cache) {
    carver memory(scratch);
    const auto row = static_cast<std::size_t>(cols_ + width);
    if (scores_in_place_)
      rows_at_once_ = std::clamp<index>(cached_numbers / cols_, 1, finish_rows);
    candidates_ = memory.take<double>(row);
    panel_ = memory.take<T>(scores_in_place_ ? row : row * finish_rows);
    out_ = memory.take<T>(row);
    sum_ = memory.take<T>(row);
    scratch_bytes_ = memory.used();
  }

  static std::size_t scratch_bytes(const Formula& formula, const row_job<T>& job) {
    return resident_kernel(formula, job, nullptr).scratch_bytes_;
  }

  /// Rows [first, last): adds their weighted values to the total.
  void run(index first, index last, value_sum* total) {
    for (index r = first; r < last;) {
      index rows[finish_rows], count = 0;
      for (; r < last && count < rows_at_once_; ++r) {
        if (job_.counts(r, job_.labels ? job_.label(r) : 0))
          rows[count++] = r;
        else
          ignore(r);
      }
      if (count > 0)
        batch(rows, count, last, *total);
    }
  }
  void drain() {
    if (streaming_)
      stream_fence();
  }

private:
  void ignore(index r) {
    if (job_.has_gradient() && !job_.accumulate) {
      std::fill_n(out_, cols_, T(0));
      job_.gradient.write(r, 0, cols_, out_);
    }
    store_ignored_report(job_, r);
  }

  auto solve(const T* x, index label) const {
    if constexpr (requires { formula_.solve(x, cols_, label, candidates_); })
      return formula_.solve(x, cols_, label, candidates_);
    else
      return formula_.solve(x, cols_, candidates_);
  }

  void batch(const index* rows, index count, index last, value_sum& total) {
    using W = pack<double>;
    const T* x[finish_rows];
    gather(rows, count, x);
    alignas(64) double in[2 + statistic::terms][finish_rows] = {};
    for (index i = 0; i < count; ++i) {
      const index label = job_.labels ? static_cast<index>(job_.label(rows[i])) : -1;
      const auto s = solve(x[i], label);
      if constexpr (requires { formula_.record(rows[i], s); })
        formula_.record(rows[i], s);
      in[0][i] = s.shift;
      in[1][i] = label >= 0 ? static_cast<double>(x[i][label]) : s.shift;
      for (int k = 0; k < statistic::terms; ++k)
        in[2 + k][i] = s.term[k];
    }
    row_summary<statistic> s;
    s.shift = W::load(in[0]);
    s.target = W::load(in[1]);
    s.target_side = W(0);
    s.label_weight = W(1);
    s.classes = W(static_cast<double>(cols_));
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] = W::load(in[2 + k]);
    const row_outcome<W> result = formula_.finish(s);
    alignas(64) double out[2 + coefficients][finish_rows];
    result.value.store(out[0]);
    result.target_gradient.store(out[1]);
    for (int k = 0; k < coefficients; ++k)
      result.coefficient[k].store(out[2 + k]);
    for (index i = 0; i < count; ++i) {
      store_value(job_, rows[i], out[0][i], total);
      if constexpr (has_slopes)
        if (job_.has_gradient()) {
          double c[coefficients];
          for (int k = 0; k < coefficients; ++k)
            c[k] = out[2 + k][i];
          double size = 0;
          if constexpr (has_edge)
            size = in[2 + statistic::size][i];
          emit(rows[i], last, x[i], c, out[1][i], size);
        }
    }
  }

  /// Rows side by side: where they lie, or copied column by column where that is how they lie.
  void gather(const index* rows, index count, const T** x) {
    const index step = cols_ + width;
    for (index i = 0; i < count; ++i)
      x[i] = scores_in_place_ ? job_.scores.pointer(rows[i], 0) : panel_ + i * step;
    if (scores_in_place_)
      return;
    if (job_.scores.row_stride != 1) {
      for (index i = 0; i < count; ++i)
        job_.scores.read(rows[i], 0, cols_, panel_ + i * step);
      return;
    }
    for (index c = 0; c < cols_; ++c)
      for (index i = 0; i < count; ++i)
        job_.scores.read(rows[i], c, 1, panel_ + i * step + c);
  }

  void emit(index r, index last, const T* x, const double* c, double target,
            [[maybe_unused]] double size) {
    const V scale(static_cast<T>(job_.row_scale(r)));
    const V own(static_cast<T>(target * job_.row_scale(r)));
    const index label = job_.labels ? static_cast<index>(job_.label(r)) : -1;
    const auto slopes = formula_.template slopes<V>(c);
    T* out = gradient_in_place_ ? job_.gradient.pointer(r, 0) : out_;
    V edge(0);
    const double* few = nullptr; // the slopes of those from the edge on
    if constexpr (has_edge)
      // By the pack where hardly a pack has any, and where most have.
      if (const index n = static_cast<index>(size); n > cols_ / 1024 && n < cols_ / 4) {
        edge = V(formula_.template edge<T>(c));
        few = list_slopes(x, c);
      }
    const auto finished = [&](const V& z, index j) __attribute__((always_inline)) {
      V slope(0);
      if (few)
        for (std::uint32_t left = lane_bits(z >= edge); left != 0; left &= left - 1)
          slope = select(iota<T>() == V(static_cast<T>(std::countr_zero(left))),
                         V(static_cast<T>(*few++)), slope);
      else
        slope = slopes(z);
      const V g = slope * scale;
      if (static_cast<std::size_t>(label - j) < lanes<T>) [[unlikely]]
        return select(iota<T>() == V(static_cast<T>(label - j)), own, g);
      return g;
    };
    const auto part = [&](index j, index n) {
      const V nothing(std::numeric_limits<T>::quiet_NaN()); // not from the edge on
      store_first(finished(load_first(x + j, n, nothing), j), out + j, n);
    };
    index j = 0;
    const T* next = x; // what is asked for while this is written
    if (streaming_) {
      const auto address = reinterpret_cast<std::uintptr_t>(out);
      j = std::min(cols_, static_cast<index>((64 - address % 64) % 64 / sizeof(T)));
      if (j > 0)
        part(0, j);
      if (prefetches_ && r + rows_at_once_ < last)
        next = job_.scores.pointer(r + rows_at_once_, 0);
    }
    if (streaming_)
      for (; j + width <= cols_; j += width) {
        prefetch(next + j);
        finished(V::load(x + j), j).stream(out + j);
      }
    else
      for (; j + width <= cols_; j += width)
        finished(V::load(x + j), j).store(out + j);
    if (j < cols_)
      part(j, cols_ - j);
    if (gradient_in_place_)
      return;
    if (job_.accumulate) {
      job_.gradient.reader(job_.gradient.at(r, 0), job_.gradient.col_stride, cols_, sum_);
      for (j = 0; j < cols_; ++j)
        out_[j] += sum_[j];
    }
    job_.gradient.write(r, 0, cols_, out_);
  }

  /// The slopes of the scores from the edge on, in their order.
  const double* list_slopes(const T* x, const double* c) const {
    using W = pack<double>;
    const index count = gather_from(x, cols_, formula_.template edge<T>(c), T(0), candidates_);
    constexpr index step = static_cast<index>(lanes<double>);
    std::fill_n(candidates_ + count, step - 1, 0.0);
    const auto slopes = formula_.template slopes<W>(c);
    for (index k = 0; k < count; k += step)
      slopes(W::load(candidates_ + k)).store(candidates_ + k);
    return candidates_;
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_, rows_at_once_ = finish_rows;
  bool scores_in_place_, gradient_in_place_, streaming_, prefetches_;
  std::size_t scratch_bytes_ = 0;
  double* candidates_ = nullptr;
  T *panel_ = nullptr, *out_ = nullptr, *sum_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
