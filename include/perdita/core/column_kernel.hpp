// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for scores whose classes do not lie side by side (column-major matrices, images
/// with their classes first) and for rows too short to fill a pack: lanes are rows.
///
/// A tile of rows goes through all classes twice, once for the sums and once for the gradient. A
/// column of a tile is a page: with less of it at a time, columns that are far apart cost twice the
/// bandwidth. A chunk of columns is summed with the shift of the chunk before, while its maximum is
/// taken; where that turns out to be too far above the shift, the pack of rows is summed again. To
/// give a row the same bits as the other traversal, class j is added to sum number j mod W, W being
/// the lanes of a pack, and the sums are added in the same tree.

#include <bit>

#include "row_kernel.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Lanes are better rows than classes.
template <class T> bool prefers_columns(const row_job<T>& job) {
  const bool short_rows = job.scores.cols < 2 * static_cast<index>(lanes<T>);
  return short_rows || (job.scores.row_stride == 1 && job.scores.col_stride != 1);
}

template <class Formula, class T> class column_kernel {
  using V = pack<T>;
  using W = pack<double>;
  using statistic = typename Formula::statistic;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr index halves = wide_lanes<T>::parts;
  static constexpr index prefetch_columns = 8;
  /// Columns that are added to the same sums share the loads of what belongs to their rows, and
  /// memory is read in as many streams.
  static constexpr index at_once = 4, group = at_once * width;
  /// Packs of rows in a tile: a page of each column, fewer where the sums would outgrow the caches.
  static constexpr index most_packs = 64 / static_cast<index>(std::bit_ceil(statistic::terms + 0U));
  /// Where rows are copied to columns first, the copy is to stay in the first-level cache.
  static constexpr index short_row_packs = 16;

public:
  /// Rows whose values are added up together.
  static index rows_per_sum(const row_job<T>& job) {
    return 4 * width * ((job.scores.rows + 65535) / 65536);
  }
  /// Rows per task: tiles as tall as the number of workers allows, and enough to be worth a task.
  static index rows_per_task(const row_job<T>& job, std::size_t workers) {
    const auto up = [](index a, index b) { return (a + b - 1) / b; };
    const index rows = job.scores.rows, n = static_cast<index>(workers);
    const index tasks = up(up(rows, most_packs * width), n) * n;
    const index most = std::max({up(rows, tasks), up(65536, job.scores.cols), up(rows, 4096)});
    return up(most, rows_per_sum(job)) * rows_per_sum(job);
  }

  column_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols),
        short_rows_(job.scores.row_stride != 1),
        tile_packs_(std::min((job.scores.rows + width - 1) / width,
                             short_rows_ ? std::min(short_row_packs, most_packs) : most_packs)),
        tile_rows_(tile_packs_ * width) {
    carver memory(scratch);
    const auto rows = static_cast<std::size_t>(tile_rows_);
    const auto n = static_cast<std::size_t>(tile_packs_);
    const auto used_lanes = static_cast<std::size_t>(std::min(width, cols_));
    const index chunks = (cols_ + chunk_columns - 1) / chunk_columns;
    where_ = memory.take<std::uint64_t>(static_cast<std::size_t>(std::min(chunk_columns, cols_)));
    label_ = memory.take<std::int64_t>(rows);
    for (double** p : {&target_side_, &label_weight_, &weight_, &scale_, &image_scale_})
      *p = memory.take<double>(rows);
    for (V** p : {&column_, &keep_, &shift_, &seen_, &rivals_, &raw_target_, &factor_, &cut_,
                  &target_gradient_, &gradient_scale_, &coefficient_[0], &coefficient_[1],
                  &coefficient_[2]})
      *p = memory.take<V>(n);
    shifts_ = memory.take<V>(n * static_cast<std::size_t>(chunks));
    part_ = memory.take<V>(n * used_lanes * statistic::terms);
    sums_ = memory.take<wide_lanes<T>>(one_chunk() ? 0 : n * used_lanes * statistic::terms);
    stage_ = memory.take<T>(rows * static_cast<std::size_t>(short_rows_ ? cols_ : 1));
    for (T** p : {&soft_, &out_, &line_})
      *p = memory.take<T>(rows + 2 * chunk_columns);
    scratch_bytes_ = memory.used();
  }

  static std::size_t scratch_bytes(const Formula& formula, const row_job<T>& job) {
    return column_kernel(formula, job, nullptr).scratch_bytes_;
  }

  /// Rows [first, last): adds their weighted values to totals[0], totals[1], …
  void run(index first, index last, value_sum* totals) {
    for (index r = first; r < last;) {
      const index n = std::min({tile_rows_, last - r, job_.scores.left_in_plane(r),
                                job_.gradient.left_in_plane(r), job_.soft.left_in_plane(r)});
      run_tile(r, n, first, totals);
      r += n;
    }
  }
  void drain() {
    if (job_.streaming)
      stream_fence();
  }

private:
  index chunk_size(index column) const { return std::min(chunk_columns, cols_ - column); }
  /// Whether a chunk's sums are a row's.
  bool one_chunk() const { return cols_ <= chunk_columns; }
  /// Sum number j mod W of term k, for every pack of rows.
  template <class X> X* lane(X* sums, int k, index j) const {
    return sums + (k * std::min(width, cols_) + j % width) * tile_packs_;
  }
  /// Whether the tile's columns of a matrix may be used where they lie.
  template <bool M> bool direct(const matrix_data<T, M>& m) const {
    return m.direct() && m.row_stride == 1 && rows_ % width == 0;
  }

  /// One column of the tile, in whole packs: where it lies, or copied. Lanes without a row repeat
  /// the last one.
  const T* column_of(const matrix_data<T>& m, index column, T* copy) const {
    if (direct(m))
      return m.pointer(first_, column);
    if (m.row_stride == 1)
      for (index byte = 0; byte < rows_ * m.width; byte += 64)
        prefetch(m.at(first_, column) + prefetch_columns * m.col_stride * m.width + byte);
    m.read_column(first_, column, rows_, copy);
    std::fill(copy + rows_, copy + packs_ * width, copy[rows_ - 1]);
    return copy;
  }
  /// Whether all columns are used where they lie, so that several can be.
  bool columns_at_once() const {
    return !short_rows_ && direct(job_.scores) && (!job_.soft || direct(job_.soft));
  }
  /// From column number i of a group to the one that is asked for meanwhile.
  static index ahead_in_group(index i) {
    constexpr index steps = prefetch_columns / at_once;
    return i + steps < width ? steps : group - width + steps;
  }
  const T* scores(index column) const {
    return short_rows_ ? stage_ + column * tile_rows_ : column_of(job_.scores, column, line_);
  }

  /// Columns j, j + W, j + 2 W, … of a chunk.
  template <index Columns> struct column_cursor {
    const T *x[Columns], *soft[Columns] = {};
    V bias[Columns], weight[Columns];
    std::uint64_t targets[Columns]; // packs of rows with a target there
    index ahead;                    // from x to what is asked for meanwhile

    /// The side numbers of pack p.
    PERDITA_INLINE V side(index k, index p) const {
      if constexpr (!Formula::has_side)
        return V(0);
      else
        return soft[k] ? fma(V::load(soft[k] + p * width), weight[k], bias[k]) : bias[k];
    }
  };
  template <index Columns>
  PERDITA_INLINE column_cursor<Columns> point(index column, index j, index ahead) const {
    column_cursor<Columns> result;
    for (index k = 0; k < Columns; ++k) {
      const index c = column + j + k * width;
      result.x[k] = scores(c);
      if constexpr (Formula::has_side) {
        const side_cursor<T> side = formula_.side(c);
        result.bias[k] = V(side.bias ? *side.bias : side.uniform_bias);
        result.weight[k] = V(side.weight ? *side.weight : side.uniform_weight);
        if (job_.soft)
          result.soft[k] = column_of(job_.soft, c, soft_);
      }
      result.targets[k] = where_[j + k * width];
    }
    result.ahead = short_rows_ ? 0 : ahead * job_.scores.col_stride;
    return result;
  }

  void run_tile(index first, index rows, index block, value_sum* totals) {
    first_ = first;
    rows_ = rows;
    packs_ = (rows + width - 1) / width;
    begin();
    for (index c = 0; c < cols_; c += chunk_columns) {
      const index n = chunk_size(c);
      mark(c, n);
      constexpr bool looks_first = !statistic::look_is_maximum;
      if (looks_first || c == 0) {
        look(c, n);
        for (index p = 0; p < packs_; ++p)
          choose_shift(p, c, n);
      }
      absorb(c, n, 0, packs_);
      if (!looks_first && c > 0) {
        std::uint64_t moved = 0;
        for (index p = 0; p < packs_; ++p)
          moved |= std::uint64_t{choose_shift(p, c, n)} << p;
        if (moved)
          absorb(c, n, std::countr_zero(moved), static_cast<index>(std::bit_width(moved)));
      }
      for (index p = 0; p < packs_; ++p) {
        if constexpr (statistic::look_is_maximum)
          rivals_[p] = max(seen_[p], rivals_[p]);
        shifts_[c / chunk_columns * tile_packs_ + p] = shift_[p];
      }
      if (one_chunk())
        break;
      for (int k = 0; k < statistic::terms; ++k)
        for (index j = 0; j < std::min(n, width); ++j)
          for (index p = 0; p < packs_; ++p)
            lane(sums_, k, j)[p].add(lane(part_, k, j)[p]);
    }
    for (index p = 0; p < packs_; ++p)
      finish(p, block, totals);
    if (!job_.has_gradient())
      return;
    for (index c = 0; c < cols_; c += chunk_columns)
      emit(c, chunk_size(c));
    if (short_rows_ && job_.gradient.row_stride != 1)
      put_rows();
  }

  void begin() {
    if (job_.labels)
      job_.read_labels(first_, rows_, label_);
    else
      for (index i = 0; i < rows_; ++i)
        label_[i] = favourite(job_, first_ + i, out_);
    const index whole = packs_ * width;
    ignored_ = shifted_ = 0;
    std::fill(label_ + rows_, label_ + whole, 0);
    std::fill_n(keep_, packs_, V(1));
    if (rows_ < whole || !all_count())
      for (index i = 0; i < whole; ++i)
        if (i >= rows_ || !job_.counts(first_ + i, job_.labels ? label_[i] : 0)) {
          ignored_ |= std::uint64_t{1} << i / width;
          label_[i] = 0;
          V& keep = keep_[i / width];
          keep = select(iota<T>() == V(static_cast<T>(i % width)), V(0), keep);
        }
    std::fill_n(weight_, whole, 1.0);
    std::fill_n(scale_, whole, job_.scale);
    if (job_.row_weights.data || job_.upstream.data)
      for (index i = 0; i < rows_; ++i) {
        weight_[i] = job_.row_weight(first_ + i);
        scale_[i] = job_.row_scale(first_ + i);
      }
    std::fill_n(label_weight_, whole, 0.0);
    if (job_.labels)
      for (index i = 0; i < whole; ++i)
        label_weight_[i] = formula_.label_weight(static_cast<index>(label_[i]));
    std::fill_n(target_side_, whole, 0.0);
    if constexpr (Formula::has_side)
      for (index i = 0; i < rows_; ++i) {
        const auto label = static_cast<index>(label_[i]);
        T q = 0;
        if (job_.soft)
          job_.soft.read(first_ + i, label, 1, &q);
        target_side_[i] = target_side(formula_, label, q, static_cast<bool>(job_.soft));
      }
    for (index p = 0; p < packs_; ++p) {
      shift_[p] = statistic::template first_shift<V>();
      rivals_[p] = V(-std::numeric_limits<T>::infinity());
    }
    if (!one_chunk())
      for (int k = 0; k < statistic::terms; ++k)
        for (index j = 0; j < std::min(width, cols_); ++j)
          for (index p = 0; p < packs_; ++p)
            lane(sums_, k, j)[p].clear();
    if (!short_rows_)
      return;
    // Columns of the tile, from rows that lie side by side or not.
    if (job_.scores.direct() && job_.scores.col_stride == 1) {
      copy_transposed(job_.scores.pointer(first_, 0), job_.scores.row_stride, rows_, cols_, stage_,
                      tile_rows_);
    } else {
      for (index i = 0; i < rows_; ++i) {
        job_.scores.read(first_ + i, 0, cols_, line_);
        for (index j = 0; j < cols_; ++j)
          stage_[j * tile_rows_ + i] = line_[j];
      }
    }
    for (index j = 0; j < cols_; ++j)
      std::fill(stage_ + j * tile_rows_ + rows_, stage_ + j * tile_rows_ + whole,
                stage_[j * tile_rows_ + rows_ - 1]);
  }

  /// Whether no row of the tile is left out, which is told without a branch per row.
  bool all_count() const {
    std::int64_t ignored = 0;
    if (job_.labels)
      for (index i = 0; i < rows_; ++i)
        ignored |= label_[i] == job_.ignore_index;
    return !ignored && !job_.row_weights.data;
  }

  /// Notes which packs of rows have their target in which column of a chunk.
  void mark(index column, index n) {
    const bool crowded = n < 2 * width;
    std::fill_n(where_, n, crowded ? ~std::uint64_t{0} : 0);
    if (crowded && n == cols_) {
      for (index i = 0; i < packs_ * width; ++i)
        out_[i] = static_cast<T>(static_cast<std::int32_t>(label_[i]));
      for (index p = 0; p < packs_; ++p)
        column_[p] = V::load(out_ + p * width);
      return;
    }
    alignas(64) T relative[lanes<T>];
    for (index p = 0; p < packs_; ++p) {
      for (index i = 0; i < width; ++i) {
        const auto j = static_cast<index>(label_[p * width + i]) - column;
        const bool here = j >= 0 && j < n;
        relative[i] = here ? static_cast<T>(j) : T(-1);
        if (here && !crowded)
          where_[j] |= std::uint64_t{1} << p;
      }
      column_[p] = V::load(relative);
    }
  }
  bool marked(std::uint64_t packs, index p) const { return packs >> p & 1; }

  /// What the shifts of a chunk are picked from, before it is summed.
  void look(index column, index n) {
    const V nothing = statistic::template look_at_nothing<V>();
    constexpr index sums = statistic::look_is_maximum ? 1 : width;
    V* const seen = statistic::look_is_maximum ? seen_ : part_;
    std::fill_n(seen, std::min(sums, cols_) * tile_packs_, nothing);
    for (index j = 0; j < n; ++j) {
      const T* x = scores(column + j);
      V* const s = seen + j % sums * tile_packs_;
      for (index p = 0; p < packs_; ++p) {
        prefetch(x + prefetch_columns * job_.scores.col_stride + p * width);
        V z = V::load(x + p * width);
        if (Formula::excludes_target && marked(where_[j], p)) [[unlikely]]
          z = select(column_[p] == V(static_cast<T>(j)), nothing, z);
        s[p] = statistic::look(s[p], z);
      }
    }
    if constexpr (!statistic::look_is_maximum)
      for (index p = 0; p < packs_; ++p)
        seen_[p] = folded([&](index i) { return part_[i * tile_packs_ + p]; });
  }

  /// Σ f(i) over W numbers, halves onto halves, as sum_lanes() does with lanes; those past the last
  /// column are 0.
  template <index Apart = 1, class F> PERDITA_INLINE auto folded(F f, index i = 0) const {
    if constexpr (Apart == width) {
      return f(i);
    } else {
      auto sum = folded<2 * Apart>(f, i);
      if (i + Apart < cols_)
        sum += folded<2 * Apart>(f, i + Apart);
      return sum;
    }
  }

  /// Whether the shift of a pack moved.
  bool choose_shift(index p, index column, index n) {
    const V shift = statistic::choose(formula_.score(seen_[p]), shift_[p], n);
    if (!any(!(shift == shift_[p])))
      return false;
    if (column > 0) {
      W by[halves], to[halves];
      widen(shift_[p], by);
      widen(shift, to);
      for (index h = 0; h < halves; ++h)
        by[h] = by[h] - to[h];
      for (index i = 0; i < std::min(width, cols_); ++i) {
        wide_lanes<T> sums[statistic::terms];
        for (int k = 0; k < statistic::terms; ++k)
          sums[k] = lane(sums_, k, i)[p];
        rebase_lanes<statistic>(sums, by);
        for (int k = 0; k < statistic::terms; ++k)
          lane(sums_, k, i)[p] = sums[k];
      }
      shifted_ |= std::uint64_t{1} << p;
    }
    shift_[p] = shift;
    return true;
  }

  /// Sums a chunk of the packs of rows [begin, end), and looks at it.
  PERDITA_NOINLINE void absorb(index column, index n, index begin, index end) {
    const V nothing = statistic::template look_at_nothing<V>();
    if (statistic::look_is_maximum)
      std::fill(seen_ + begin, seen_ + end, nothing);
    index j = 0;
    if (columns_at_once())
      for (; j + group <= n; j += group)
        for (index i = 0; i < width; ++i)
          absorb_columns<at_once>(column, j + i, ahead_in_group(i), begin, end);
    for (; j < n; ++j)
      absorb_columns<1>(column, j, prefetch_columns, begin, end);
  }

  /// Columns j, j + W, j + 2 W, … of a chunk, which are added to the same sums.
  template <index Columns>
  PERDITA_NOINLINE void absorb_columns(index column, index j, index ahead, index begin, index end) {
    const V nothing = statistic::template look_at_nothing<V>();
    const index step = std::min(width, cols_) * tile_packs_; // from term to term
    const column_cursor<Columns> at = point<Columns>(column, j, ahead);
    const Formula formula = formula_; // a copy: a store may change anything but it
    V* const sums = lane(part_, 0, j);
    for (index p = begin; p < end; ++p) {
      V sum[statistic::terms];
      for (int k = 0; k < statistic::terms; ++k)
        sum[k] = j < width ? V(0) : sums[k * step + p];
      V seen = seen_[p];
      for (index k = 0; k < Columns; ++k) {
        prefetch(at.x[k] + at.ahead + p * width);
        const V raw = V::load(at.x[k] + p * width);
        V z = scored(formula, raw).z, look = raw, b = at.side(k, p);
        if (marked(at.targets[k], p)) [[unlikely]] {
          const auto here = column_[p] == V(static_cast<T>(j + k * width));
          raw_target_[p] = select(here, raw, raw_target_[p]);
          if constexpr (Formula::excludes_target) {
            look = select(here, nothing, look);
            z = select(here, statistic::absent(shift_[p]), z);
            b = select(here, V(0), b);
          }
        }
        if constexpr (statistic::look_is_maximum)
          seen = statistic::look(seen, look);
        statistic::absorb(sum, z, shift_[p], b);
      }
      seen_[p] = seen;
      for (int k = 0; k < statistic::terms; ++k)
        sums[k * step + p] = sum[k];
    }
  }

  /// Half h of the rows of a pack.
  static PERDITA_INLINE W half(const V& a, index h) {
    W wide[halves];
    widen(a, wide);
    return wide[h];
  }
  PERDITA_INLINE auto summary_of(index p, index h) const {
    const index at = p * width + h * finish_rows;
    row_summary<statistic> s;
    s.shift = half(shift_[p], h);
    s.target = half(formula_.score(raw_target_[p]), h);
    s.raw_target = half(raw_target_[p], h);
    s.target_side = W::load(target_side_ + at);
    s.label_weight = W::load(label_weight_ + at);
    s.classes = W(static_cast<double>(cols_));
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] =
          one_chunk()
              ? folded([&](index i) { return half(lane(part_, k, i)[p], h); })
              : folded([&](index i) { return lane(sums_, k, i)[p].folded(static_cast<int>(h)); });
    return with_own(formula_, s, std::min(finish_rows, rows_ - at),
                    [&](index i) { return first_ + at + i; });
  }

  void finish(index p, index block, value_sum* totals) {
    W target_gradient[halves], gradient_scale[halves], coefficient[coefficients][halves];
    // Unrolled, so that what is computed stays in registers.
    const auto finish_half = [&](index h) __attribute__((always_inline)) {
      const index at = p * width + h * finish_rows;
      const row_outcome<W> result = formula_.finish(summary_of(p, h));
      add_values(select(half(keep_[p], h) == W(0), W(0), result.value * W::load(weight_ + at)), at,
                 block, totals);
      if (job_.report.any()) [[unlikely]]
        report(p, h);
      const W scale = W::load(scale_ + at);
      (Formula::linear ? result.image_scale * scale : result.image_scale).store(image_scale_ + at);
      target_gradient[h] = result.target_gradient * scale;
      gradient_scale[h] = scale;
      for (int k = 0; k < coefficients; ++k)
        coefficient[k][h] = result.coefficient[k];
    };
    finish_half(0);
    if constexpr (halves > 1)
      finish_half(1);
    if (!job_.has_gradient())
      return;
    target_gradient_[p] = narrow(target_gradient);
    gradient_scale_[p] = narrow(gradient_scale);
    for (int k = 0; k < coefficients; ++k)
      coefficient_[k][p] = narrow(coefficient[k]);
  }

  /// The weighted values of eight rows from number `at` of the tile on; 0 for those that do not
  /// count.
  PERDITA_INLINE void add_values(const W& weighted, index at, index block, value_sum* totals) {
    const index row = first_ + at;
    if (at + finish_rows <= rows_ && row % finish_rows == 0 && !job_.report.values.data)
      return totals[(row - block) / rows_per_sum(job_)].add(weighted);
    alignas(64) double v[finish_rows];
    weighted.store(v);
    add_single_values(v, at, block, totals);
  }
  PERDITA_NOINLINE void add_single_values(const double* v, index at, index block,
                                          value_sum* totals) {
    const index row = first_ + at, n = std::min(finish_rows, rows_ - at);
    const index per_sum = rows_per_sum(job_);
    for (index i = 0; i < n; ++i) {
      totals[(row + i - block) / per_sum].add(row + i, v[i]);
      if (job_.report.values.data)
        job_.report.values[row + i] = static_cast<T>(v[i]);
    }
  }

  PERDITA_NOINLINE void report(index p, index h) {
    const index at = p * width + h * finish_rows;
    index numbers[finish_rows], lanes_of[finish_rows], count = 0;
    alignas(64) T keep[lanes<T>];
    keep_[p].store(keep);
    for (index i = 0; i < std::min(finish_rows, rows_ - at); ++i) {
      if (keep[at % width + i] == T(0)) {
        store_ignored_report(job_, first_ + at + i);
      } else {
        lanes_of[count] = i;
        numbers[count++] = first_ + at + i;
      }
    }
    store_report(formula_, job_, summary_of(p, h), numbers, lanes_of, half(raw_target_[p], h),
                 half(rivals_[p], h), count);
  }

  /// The factors from image to share for the chunk that starts at a column.
  void set_factors(index column) {
    for (index p = 0; p < packs_; ++p) {
      const double* const scale = image_scale_ + p * width;
      if (marked(shifted_, p)) {
        factor_[p] = factor_of(shifts_[column / chunk_columns * tile_packs_ + p], shift_[p], scale);
      } else {
        W factor[halves];
        for (index h = 0; h < halves; ++h)
          factor[h] = W::load(scale + h * finish_rows);
        factor_[p] = narrow(factor);
      }
      cut_[p] = V(std::numeric_limits<T>::min()) / abs(factor_[p]);
    }
  }

  void emit(index column, index n) {
    const auto& m = job_.gradient;
    if (cols_ > chunk_columns)
      mark(column, n);
    if (column == 0 || shifted_)
      set_factors(column);
    const bool staged = short_rows_ && m.row_stride != 1;
    const bool in_place = !staged && direct(m) && !job_.accumulate;
    const V* shift = shifts_ + column / chunk_columns * tile_packs_;
    index j = 0;
    if (in_place && columns_at_once())
      for (; j + group <= n; j += group)
        for (index i = 0; i < width; ++i)
          emit_columns<at_once>(column, j + i, ahead_in_group(i), shift,
                                m.pointer(first_, column + j + i), true);
    for (; j < n; ++j) {
      T* to = staged     ? stage_ + (column + j) * tile_rows_
              : in_place ? m.pointer(first_, column + j)
                         : out_;
      emit_columns<1>(column, j, prefetch_columns, shift, to, in_place);
      if (!staged && !in_place)
        put_column(column + j);
    }
  }

  /// The gradient of columns j, j + W, j + 2 W, … of a chunk, the first of which goes to `to`, for
  /// good or to be read again.
  template <index Columns>
  void emit_columns(index column, index j, index ahead, const V* shift, T* to,
                    bool for_good) const {
    const index step = width * job_.gradient.col_stride;
    const bool on_lines = reinterpret_cast<std::uintptr_t>(to) % 64 == 0 &&
                          (Columns == 1 || step * static_cast<index>(sizeof(T)) % 64 == 0);
    emit_columns<Columns>(column, j, ahead, shift, to, step,
                          job_.streaming && on_lines && for_good);
  }
  template <index Columns>
  PERDITA_NOINLINE void emit_columns(index column, index j, index ahead, const V* shift, T* to,
                                     index step, bool streamed) const {
    const column_cursor<Columns> from = point<Columns>(column, j, ahead);
    const std::uint64_t ignored = ignored_;
    const Formula formula = formula_;
    for (index p = 0; p < packs_; ++p) {
      const V c[coefficients] = {coefficient_[0][p], coefficient_[1][p], coefficient_[2][p]};
      for (index k = 0; k < Columns; ++k) {
        prefetch(from.x[k] + from.ahead + p * width);
        V g = slope_of(formula, V::load(from.x[k] + p * width), shift[p], factor_[p], cut_[p],
                       from.side(k, p), gradient_scale_[p], c);
        if (marked(from.targets[k] | ignored, p)) [[unlikely]] {
          g = select(column_[p] == V(static_cast<T>(j + k * width)), target_gradient_[p], g);
          g = select(keep_[p] == V(0), V(0), g);
        }
        T* const at = to + k * step + p * width;
        if (streamed)
          g.stream(at);
        else
          g.store(at);
      }
    }
  }

  /// Stores a column of the gradient that was made in out_.
  void put_column(index column) const {
    const auto& m = job_.gradient;
    if (job_.accumulate) {
      m.reader(m.at(first_, column), m.row_stride, rows_, line_);
      for (index i = 0; i < rows_; ++i)
        out_[i] += line_[i];
    }
    m.writer(m.at(first_, column), m.row_stride, rows_, out_);
  }

  /// Stores the gradient of short rows, which lies in columns.
  void put_rows() const {
    const auto& m = job_.gradient;
    if (m.direct() && m.col_stride == 1 && !job_.accumulate)
      return copy_transposed(stage_, tile_rows_, cols_, rows_, m.pointer(first_, 0), m.row_stride);
    for (index i = 0; i < rows_; ++i) {
      if (job_.accumulate)
        m.reader(m.at(first_ + i, 0), m.col_stride, cols_, line_);
      for (index j = 0; j < cols_; ++j) {
        const T g = stage_[j * tile_rows_ + i];
        line_[j] = job_.accumulate ? line_[j] + g : g;
      }
      m.write(first_ + i, 0, cols_, line_);
    }
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_;
  bool short_rows_;
  index tile_packs_, tile_rows_;
  std::size_t scratch_bytes_ = 0;

  // The tile between its first class and its gradient.
  index first_ = 0, rows_ = 0, packs_ = 0;
  std::uint64_t ignored_ = 0, shifted_ = 0; // packs with a row that does not count; whose chunks
                                            // differ in shift
  std::uint64_t* where_ = nullptr;          // of every column of a chunk: packs with a target there
  std::int64_t* label_ = nullptr;
  double *target_side_ = nullptr, *label_weight_ = nullptr, *weight_ = nullptr, *scale_ = nullptr;
  double* image_scale_ = nullptr;
  V* column_ = nullptr; // of each row's target in the chunk, or -1
  V* keep_ = nullptr;   // 0 in the lanes of rows that do not count
  V *shift_ = nullptr, *seen_ = nullptr, *rivals_ = nullptr, *raw_target_ = nullptr;
  V *factor_ = nullptr, *cut_ = nullptr, *target_gradient_ = nullptr, *gradient_scale_ = nullptr;
  V* coefficient_[coefficients] = {nullptr, nullptr, nullptr};
  V* shifts_ = nullptr; // of every chunk and pack of rows
  V* part_ = nullptr;   // sums of a chunk
  wide_lanes<T>* sums_ = nullptr;
  T *stage_ = nullptr, *soft_ = nullptr, *out_ = nullptr, *line_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
