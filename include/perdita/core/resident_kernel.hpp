// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for losses and maps whose summary needs a whole row at hand: a row is solved where
/// it lies, or in a copy where its classes do not lie side by side, and its gradient (or what it is
/// mapped to) follows from cache. A formula declares, beside what row_formula.hpp says,
///
///   solve(x, n, room)           the summary of a row; `room` is for n numbers and a pack
///   solve(x, n, label, room)    the same, where it depends on the label
///   solve_rows(x, n)            where there is one, the summaries of finish_rows short rows, one
///                               in each lane and a class in each pack
///   solve_rows(x, n, labels)    the same, where they depend on the labels: see solved_row.hpp
///   slopes<V>(c)                z → ∂value/∂score, from the outcome's coefficients in double; of
///                               one row, or with solve_rows() of the row in each lane too
///   image<V>(c)                 where there is one: z → image. Then slopes() wants images, which
///                               solve(x, n, label, room, images) leaves: whole packs of T
///   edge<T>(c)                  where there is one: below it slopes are 0; they take so long that
///                               they are taken of the others alone, in double
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
  static constexpr index least_streamed = 8 * width; // else there would be hardly a whole line
  static constexpr bool label_in_rows = requires(const Formula& f, V* x) {
    f.solve_rows(x, index{}, V(0));
  };
  static constexpr bool solves_rows_together = label_in_rows || requires(const Formula& f, V* x) {
    f.solve_rows(x, index{});
  };
  static constexpr bool keeps_images = requires(const Formula& f, const double* c) {
    f.template image<V>(c);
  };
  static constexpr bool has_edge = requires(const Formula& f, const double* c) {
    f.template edge<T>(c);
  };
  static constexpr bool has_slopes = requires(const Formula& f, const double* c) {
    f.template slopes<V>(c);
  };

public:
  static index rows_per_sum(const row_job<T>& job) { return block_rows(job); }
  static index rows_per_task(const row_job<T>& job, std::size_t) { return block_rows(job); }

  resident_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols),
        scores_in_place_(job.scores.direct() && job.scores.col_stride == 1),
        gradient_in_place_(job.gradient.direct() && job.gradient.col_stride == 1 &&
                           !job.accumulate) {
    carver memory(scratch);
    const auto row = static_cast<std::size_t>(cols_ + width);
    if (scores_in_place_)
      rows_at_once_ = std::clamp<index>(cached_numbers / cols_, 1, finish_rows);
    room_ = memory.take<double>(row);
    images_ = memory.take<T>(keeps_images ? row * static_cast<std::size_t>(rows_at_once_) : 0);
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
      index rows[finish_rows], labels[finish_rows], count = 0;
      for (; r < last && count < rows_at_once_; ++r) {
        const std::int64_t label = job_.labels ? job_.label(r) : -1;
        if (job_.counts(r, label)) {
          labels[count] = static_cast<index>(label);
          rows[count++] = r;
        } else {
          ignore(r);
        }
      }
      if (count > 0)
        batch(rows, labels, count, *total);
    }
  }
  void drain() {
    if (job_.streaming)
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

  T* images(index i) const { return images_ + i * (cols_ + width); }
  auto solve(const T* x, index label, [[maybe_unused]] index i) const {
    if constexpr (keeps_images)
      return formula_.solve(x, cols_, label, room_, images(i));
    else if constexpr (requires { formula_.solve(x, cols_, label, room_); })
      return formula_.solve(x, cols_, label, room_);
    else
      return formula_.solve(x, cols_, room_);
  }

  void batch(const index* rows, const index* label, index count, value_sum& total) {
    using W = pack<double>;
    const T* x[finish_rows] = {};
    gather(rows, count, x);
    row_summary<statistic> s;
    s.target_side = W(0);
    s.label_weight = W(1);
    s.classes = W(static_cast<double>(cols_));
    if constexpr (solves_rows_together)
      if (cols_ <= most_short_columns)
        return solve_together(rows, x, label, count, s, total);
    solve_each(rows, x, label, count, s);
    const auto result = formula_.finish(s);
    constexpr int numbers = decltype(formula_.finish(s))::coefficients;
    alignas(64) double out[2 + numbers][finish_rows];
    result.value.store(out[0]);
    result.target_gradient.store(out[1]);
    for (int k = 0; k < numbers; ++k)
      result.coefficient[k].store(out[2 + k]);
    [[maybe_unused]] alignas(64) double size[finish_rows];
    if constexpr (has_edge)
      s.term[statistic::size].store(size);
    for (index i = 0; i < count; ++i) {
      store_value(job_, rows[i], out[0][i], total);
      if constexpr (has_slopes)
        if (job_.has_gradient()) {
          double c[numbers];
          for (int k = 0; k < numbers; ++k)
            c[k] = out[2 + k][i];
          const auto slopes = formula_.template slopes<V>(c);
          if constexpr (keeps_images) {
            emit(rows[i], label[i], x[i], images(i), out[1][i], slopes);
          } else if constexpr (has_edge) {
            // By the pack where hardly a pack has any, and where most have.
            if (size[i] > static_cast<double>(cols_ / 1024) &&
                size[i] < static_cast<double>(cols_ / 4))
              emit(rows[i], label[i], x[i], x[i], out[1][i], list_slopes(x[i], c));
            else
              emit(rows[i], label[i], x[i], x[i], out[1][i], slopes);
          } else {
            emit(rows[i], label[i], x[i], x[i], out[1][i], slopes);
          }
        }
    }
  }
  void solve_each(const index* rows, const T* const* x, const index* label, index count,
                  row_summary<statistic>& s) const {
    using W = pack<double>;
    alignas(64) double in[2 + statistic::terms][finish_rows] = {};
    for (index i = 0; i < count; ++i) {
      const auto one = solve(x[i], label[i], i);
      if constexpr (requires { formula_.record(rows[i], one); })
        formula_.record(rows[i], one);
      in[0][i] = one.shift;
      in[1][i] = label[i] >= 0 ? static_cast<double>(x[i][label[i]]) : one.shift;
      for (int k = 0; k < statistic::terms; ++k)
        in[2 + k][i] = one.term[k];
    }
    s.shift = W::load(in[0]);
    s.target = W::load(in[1]);
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] = W::load(in[2 + k]);
  }

  /// Short rows, one in each lane and a class in each pack.
  void solve_together(const index* rows, const T* const* x, const index* label, index count,
                      row_summary<statistic>& s, value_sum& total) const {
    V z[most_short_columns];
    to_columns(x, count, z);
    alignas(64) T of_label[lanes<T>] = {};
    for (index i = 0; i < count; ++i)
      of_label[i] = static_cast<T>(label[i]);
    const V own_class = V::load(of_label);
    const auto solved = [&]() __attribute__((always_inline)) {
      if constexpr (label_in_rows)
        return formula_.solve_rows(z, cols_, own_class);
      else
        return formula_.solve_rows(z, cols_);
    }
    ();
    s.shift = s.target = solved.shift;
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] = solved.term[k];
    if constexpr (!label_in_rows) {
      V own = to_lanes<V>(solved.shift);
      for (index j = 0; j < cols_; ++j)
        own = select(own_class == V(static_cast<T>(j)), z[j], own);
      s.target = first_rows(own);
    }
    if constexpr (requires { formula_.record(index{}, summary<statistic, double>()); })
      record(rows, count, s);
    const auto result = formula_.finish(s);
    if (count == finish_rows && rows[0] % finish_rows == 0 &&
        rows[count - 1] == rows[0] + finish_rows - 1 && !job_.row_weights.data &&
        !job_.report.values.data) {
      total.add(result.value);
    } else {
      alignas(64) double value[finish_rows];
      result.value.store(value);
      for (index i = 0; i < count; ++i)
        store_value(job_, rows[i], value[i], total);
    }
    if constexpr (has_slopes)
      if (job_.has_gradient())
        emit_together(rows, count, z, own_class, result);
  }
  static bool equidistant(const T* const* x, index count) {
    for (index i = 2; i < count; ++i)
      if (x[i] - x[i - 1] != x[1] - x[0])
        return false;
    return true;
  }
  /// Rows that are missing repeat the last.
  void to_columns(const T* const* x, index count, V* z) const {
    alignas(64) T columns[most_short_columns * lanes<T>];
    for (index j = 0; j < cols_; ++j)
      V(0).store(columns + j * width);
    if (equidistant(x, count)) {
      copy_transposed(x[0], x[count > 1] - x[0], count, cols_, columns, width);
    } else {
      for (index i = 0; i < count; ++i)
        for (index j = 0; j < cols_; ++j)
          columns[j * width + i] = x[i][j];
    }
    for (index i = count; i < finish_rows; ++i)
      for (index j = 0; j < cols_; ++j)
        columns[j * width + i] = columns[j * width + count - 1];
    for (index j = 0; j < cols_; ++j)
      z[j] = V::load(columns + j * width);
  }
  void record(const index* rows, index count, const row_summary<statistic>& s) const {
    alignas(64) double term[statistic::terms][finish_rows];
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k].store(term[k]);
    for (index i = 0; i < count; ++i) {
      summary<statistic, double> one;
      for (int k = 0; k < statistic::terms; ++k)
        one.term[k] = term[k][i];
      formula_.record(rows[i], one);
    }
  }
  template <class Outcome>
  void emit_together(const index* rows, index count, const V* z, const V& own_class,
                     const Outcome& result) const {
    using W = pack<double>;
    alignas(64) double factor[finish_rows] = {};
    for (index i = 0; i < count; ++i)
      factor[i] = job_.row_scale(rows[i]);
    const W factors = W::load(factor);
    const V scale = to_lanes<V>(factors), own = to_lanes<V>(result.target_gradient * factors);
    const auto slope = [&]() {
      if constexpr (keeps_images)
        return [
          slopes = formula_.template slopes<V>(result.coefficient),
          image = formula_.template image<V>(result.coefficient)
        ](const V& x) __attribute__((always_inline)) {
          return slopes(image(x));
        };
      else if constexpr (has_edge)
        return [slopes = formula_.template slopes<W>(result.coefficient)](const V& x)
            __attribute__((always_inline)) {
          return to_lanes<V>(slopes(first_rows(x)));
        };
      else
        return formula_.template slopes<V>(result.coefficient);
    }();
    alignas(64) T columns[most_short_columns * lanes<T>];
    for (index j = 0; j < cols_; ++j)
      select(own_class == V(static_cast<T>(j)), own, slope(z[j]) * scale)
          .store(columns + j * width);
    if (gradient_in_place_) {
      T* out[finish_rows] = {};
      for (index i = 0; i < count; ++i)
        out[i] = job_.gradient.pointer(rows[i], 0);
      if (equidistant(out, count))
        return copy_transposed(columns, width, cols_, count, out[0], out[count > 1] - out[0]);
    }
    alignas(64) T across[finish_rows * most_short_columns];
    copy_transposed(columns, width, cols_, count, across, cols_);
    for (index i = 0; i < count; ++i)
      hand_over(rows[i], across + i * cols_);
  }
  /// A row's gradient where it does not lie as it is computed.
  void hand_over(index r, T* gradient) const {
    if (job_.accumulate) {
      job_.gradient.reader(job_.gradient.at(r, 0), job_.gradient.col_stride, cols_, sum_);
      for (index j = 0; j < cols_; ++j)
        gradient[j] += sum_[j];
    }
    job_.gradient.write(r, 0, cols_, gradient);
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

  /// A row's gradient: slopes of `from`.
  template <class Slopes>
  void emit(index r, index label, const T* x, const T* from, double target, Slopes slopes) {
    if (job_.streaming && gradient_in_place_ && cols_ >= least_streamed)
      return emit<true>(r, label, x, from, target, slopes, job_.gradient.pointer(r, 0));
    emit<false>(r, label, x, from, target, slopes,
                gradient_in_place_ ? job_.gradient.pointer(r, 0) : out_);
    if (!gradient_in_place_)
      hand_over(r, out_);
  }
  /// Meanwhile a row of the next batch is asked for; where a batch is so small that what solve()
  /// asks for in time is in it, that is soon enough.
  template <bool Streamed, class Slopes>
  PERDITA_NOINLINE void emit(index r, index label, const T* x, const T* from, double target,
                             Slopes slopes, T* out) const {
    const V scale(static_cast<T>(job_.row_scale(r))),
        own(static_cast<T>(target * job_.row_scale(r)));
    const index own_class = label >= 0 ? label : -width;
    const index ahead = scores_in_place_ && cols_ <= two_in_cache && rows_at_once_ < finish_rows
                            ? rows_at_once_ * job_.scores.row_stride
                            : 0;
    const auto slope = [&](const V& z, index j) __attribute__((always_inline)) {
      const V g = slopes(z) * scale;
      const index lane = own_class - j;
      if (lane >= 0 && lane < width) [[unlikely]]
        return select(iota<T>() == V(static_cast<T>(lane)), own, g);
      return g;
    };
    const auto some = [&](index j, index n) __attribute__((always_inline)) {
      const V nothing(std::numeric_limits<T>::quiet_NaN()); // not from an edge on
      store_first(slope(load_first(from + j, n, nothing), j), out + j, n);
    };
    index j = 0;
    if constexpr (Streamed) {
      const auto address = reinterpret_cast<std::uintptr_t>(out);
      j = static_cast<index>((64 - address % 64) % 64 / sizeof(T));
      if (j > 0)
        some(0, j);
    }
    for (; j + width <= cols_; j += width) {
      prefetch(x + j + ahead);
      const V g = slope(V::load(from + j), j);
      if constexpr (Streamed)
        g.stream(out + j);
      else
        g.store(out + j);
    }
    if (j < cols_)
      some(j, cols_ - j);
  }

  /// Slopes that lie there for the scores from an edge on, which are to be asked for in their
  /// order.
  struct slope_list {
    V edge;
    const double* next;

    PERDITA_INLINE V operator()(const V& z) {
      V slope(0);
      for (std::uint32_t left = lane_bits(z >= edge); left != 0; left &= left - 1)
        slope = select(iota<T>() == V(static_cast<T>(std::countr_zero(left))),
                       V(static_cast<T>(*next++)), slope);
      return slope;
    }
  };
  slope_list list_slopes(const T* x, const double* c) const {
    using W = pack<double>;
    constexpr index step = static_cast<index>(lanes<double>);
    const T edge = formula_.template edge<T>(c);
    const index count = row_maxima<T>(x, cols_).gather(edge, T(0), room_);
    std::fill_n(room_ + count, step - 1, 0.0);
    const auto slopes = formula_.template slopes<W>(c);
    for (index k = 0; k < count; k += step)
      slopes(W::load(room_ + k)).store(room_ + k);
    return {V(edge), room_};
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_, rows_at_once_ = finish_rows;
  bool scores_in_place_, gradient_in_place_;
  std::size_t scratch_bytes_ = 0;
  double* room_ = nullptr;
  T *images_ = nullptr, *panel_ = nullptr, *out_ = nullptr, *sum_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
