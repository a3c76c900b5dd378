// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for scores whose classes do not lie side by side (column-major matrices, images
/// with their classes first) and for rows too short to fill a pack: lanes are rows.
///
/// A tile of rows goes through all classes twice, once for the sums and once for the gradient. Each
/// chunk of columns is first copied to a stage, where it lies dense: columns that are a power of
/// two apart would push each other out of the caches. If the stage holds all columns, the images
/// e^{z-s} stay there and the scores are read once. To give a row the same bits as the other
/// traversal, class j is added to sum number j mod W, W being the lanes of a pack, and the sums are
/// added in the same tree.

#include "row_kernel.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Lanes are better rows than classes.
template <class T> bool prefers_columns(const row_job<T>& job) {
  const bool short_rows = job.scores.cols < 2 * static_cast<index>(lanes<T>);
  return short_rows || (job.scores.row_stride == 1 && job.scores.col_stride != 1);
}

template <class Formula, class T, bool Gradient> class column_kernel {
  using V = pack<T>;
  using W = pack<double>;
  using statistic = typename Formula::statistic;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr index packs = 4; // of rows, in a tile
  static constexpr index tile_rows = packs * width;
  static constexpr index halves = wide_lanes<T>::parts;
  static constexpr index panel_columns = 2048;
  static constexpr index prefetch_columns = 64;

public:
  static constexpr index rows_at_once = tile_rows;

  column_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols),
        carries_(Gradient && Formula::proportional && statistic::has_image &&
                 cols_ <= panel_columns) {
    carver memory(scratch);
    const index staged = carries_ ? cols_ : std::min(cols_, 2 * chunk_columns);
    const auto panel = static_cast<std::size_t>(staged * tile_rows);
    const index chunks = (cols_ + chunk_columns - 1) / chunk_columns;
    tile_ = memory.take<tile>(1);
    shifts_ = memory.take<V>(static_cast<std::size_t>(chunks * packs));
    stage_ = memory.take<T>(panel);
    stage_soft_ = job.soft ? memory.take<T>(panel) : nullptr;
    stage_row_ = memory.take<T>(static_cast<std::size_t>(chunk_columns + tile_rows));
    scratch_bytes_ = memory.used();
    if (scratch)
      new (tile_) tile;
  }

  static std::size_t scratch_bytes(const Formula& formula, const row_job<T>& job) {
    return column_kernel(formula, job, nullptr).scratch_bytes_;
  }

  /// Rows [first, last): adds their weighted values to total.
  void run(index first, index last, exact_sum& total) {
    const index plane = std::max<index>(job_.scores.plane_rows, 1);
    for (index r = first; r < last;) {
      const index n = std::min({tile_rows, last - r, plane - r % plane});
      run_tile(r, n, total);
      r += n;
    }
    if (job_.streaming)
      stream_fence();
  }

private:
  /// Which columns of a chunk hold some row's target, and which one each row's.
  struct marks {
    unsigned char any[chunk_columns];
    V column[packs];
    PERDITA_INLINE V replace(const V& x, const V& by, index j, index p) const {
      return any[j] ? select(column[p] == V(static_cast<T>(j)), by, x) : x;
    }
  };

  /// A tile of rows between their first class and their gradient.
  struct tile {
    index first, rows, row_packs;
    bool some_ignored;
    std::int64_t label[tile_rows];
    alignas(64) double target_side[tile_rows], label_weight[tile_rows], scale[tile_rows];
    alignas(64) double image_scale[tile_rows];
    alignas(64) T raw_target[tile_rows];
    bool counts[tile_rows];
    V shift[packs], rivals[packs], seen[packs];
    V keep[packs]; // 0 in the lanes of rows that do not count
    V factor[packs], cut[packs], gradient_scale[packs], target_gradient[packs];
    V coefficient[packs][coefficients];
    marks target_at[2]; // of this chunk and of the next
    wide_lanes<T> sums[statistic::terms][lanes<T>][packs];
  };

  /// Where a chunk is staged: element (j, row of the tile) at [j * tile_rows + row].
  T* staged(index column) const {
    return stage_ + (carries_ ? column : column % (2 * chunk_columns)) * tile_rows;
  }
  marks& targets(index column) const { return tile_->target_at[column / chunk_columns % 2]; }
  /// Whole packs of rows of numbers that may be used where they lie.
  template <bool M> bool whole(const matrix_data<T, M>& m) const {
    return m.direct() && m.row_stride == 1 && tile_->rows % width == 0;
  }

  /// Copies columns [column, column + n) of the tile's rows to a stage. Lanes without a row repeat
  /// the last one.
  void fetch(const matrix_data<T>& m, index column, index n, T* stage) const {
    const tile& t = *tile_;
    const index filled = t.row_packs * width;
    if (whole(m)) {
      const T* from = m.pointer(t.first, column);
      const index step = m.col_stride;
      for (index j = 0; j < n; ++j, from += step, stage += tile_rows)
        for (index p = 0; p < filled; p += width) {
          prefetch(from + p + prefetch_columns * step);
          V::load(from + p).store(stage + p);
        }
    } else if (m.row_stride == 1) {
      for (index j = 0; j < n; ++j, stage += tile_rows) {
        m.read_column(t.first, column + j, t.rows, stage);
        std::fill(stage + t.rows, stage + filled, stage[t.rows - 1]);
      }
    } else {
      for (index i = 0; i < filled; ++i) {
        const index r = t.first + std::min(i, t.rows - 1);
        if (m.direct() && m.col_stride == 1) {
          const T* from = m.pointer(r, column);
          for (index j = 0; j < n; ++j)
            stage[j * tile_rows + i] = from[j];
        } else {
          m.read(r, column, n, stage_row_);
          for (index j = 0; j < n; ++j)
            stage[j * tile_rows + i] = stage_row_[j];
        }
      }
    }
  }

  void run_tile(index first, index rows, exact_sum& total) {
    tile& t = *tile_;
    t.first = first;
    t.rows = rows;
    t.row_packs = (rows + width - 1) / width;
    begin();
    prepare(0);
    for (index c = 0; c < cols_; c += chunk_columns) {
      for (index p = 0; p < t.row_packs; ++p)
        choose_shift(p, c, chunk_size(c));
      const bool overlaps =
          chunk_size(c + chunk_columns) == chunk_columns && whole(job_.scores) && !job_.soft;
      const bool ahead = statistic::look_is_maximum && overlaps;
      take_targets(c);
      if (ahead)
        mark(c + chunk_columns, chunk_columns);
      by_packs([&]<index Packs>(std::integral_constant<index, Packs>, index p) {
        if (ahead)
          absorb<true, Packs>(c, chunk_columns, p);
        else
          absorb<false, Packs>(c, chunk_size(c), p);
      });
      if (!ahead && c + chunk_columns < cols_)
        prepare(c + chunk_columns);
    }
    for (index p = 0; p < t.row_packs; ++p)
      finish(p, total);
    if constexpr (Gradient)
      for (index c = 0; c < cols_; c += chunk_columns)
        emit(c, chunk_size(c));
  }

  /// f(number of packs, first pack): a full tile at once, others pack by pack.
  template <class F> void by_packs(F f) {
    if (tile_->row_packs == packs)
      return f(std::integral_constant<index, packs>{}, index{0});
    for (index p = 0; p < tile_->row_packs; ++p)
      f(std::integral_constant<index, 1>{}, p);
  }

  index chunk_size(index column) const { return std::min(chunk_columns, cols_ - column); }

  void begin() {
    tile& t = *tile_;
    t.some_ignored = false;
    alignas(64) T keep[tile_rows];
    if (job_.labels)
      job_.read_labels(t.first, t.rows, t.label);
    for (index i = 0; i < t.row_packs * width; ++i) {
      const index r = t.first + std::min(i, t.rows - 1);
      t.counts[i] = i < t.rows && job_.counts(r, job_.labels ? t.label[i] : 0);
      keep[i] = t.counts[i] ? T(1) : T(0);
      t.some_ignored = t.some_ignored || !t.counts[i];
      if (!t.counts[i])
        t.label[i] = 0;
      if (!job_.labels)
        t.label[i] = favourite(job_, r, stage_row_);
      t.label_weight[i] = job_.labels ? formula_.label_weight(static_cast<index>(t.label[i])) : 0;
      t.scale[i] = job_.row_scale(r);
      t.target_side[i] = 0;
      if constexpr (Formula::has_side) {
        T q = 0;
        if (job_.soft)
          job_.soft.read(r, static_cast<index>(t.label[i]), 1, &q);
        t.target_side[i] =
            target_side(formula_, static_cast<index>(t.label[i]), q, static_cast<bool>(job_.soft));
      }
    }
    for (index p = 0; p < t.row_packs; ++p) {
      t.keep[p] = V::load(keep + p * width);
      t.shift[p] = statistic::template first_shift<V>();
      t.rivals[p] = V(-std::numeric_limits<T>::infinity());
    }
    for (auto& term : t.sums)
      for (index i = 0; i < std::min(width, cols_); ++i)
        for (index p = 0; p < t.row_packs; ++p)
          term[i][p].clear();
  }

  void mark(index column, index n) {
    tile& t = *tile_;
    marks& m = targets(column);
    std::fill_n(m.any, n, static_cast<unsigned char>(0));
    alignas(64) T relative[tile_rows];
    for (index i = 0; i < t.row_packs * width; ++i) {
      const index j = static_cast<index>(t.label[i]) - column;
      const bool here = j >= 0 && j < n;
      relative[i] = here ? static_cast<T>(j) : T(-1);
      if (here)
        m.any[j] = 1;
    }
    for (index p = 0; p < t.row_packs; ++p)
      m.column[p] = V::load(relative + p * width);
  }

  /// Stages a chunk and looks at it.
  void prepare(index column) {
    const index n = chunk_size(column);
    fetch(job_.scores, column, n, staged(column));
    if (job_.soft)
      fetch(job_.soft, column, n, stage_soft_);
    mark(column, n);
    for (index p = 0; p < tile_->row_packs; ++p)
      tile_->seen[p] = look(p, column, n);
  }

  /// Keeps the scores of the targets that lie in a staged chunk.
  void take_targets(index column) {
    tile& t = *tile_;
    const T* x = staged(column);
    for (index i = 0; i < t.row_packs * width; ++i) {
      const index j = static_cast<index>(t.label[i]) - column;
      if (j >= 0 && j < chunk_size(column))
        t.raw_target[i] = x[j * tile_rows + i];
    }
  }

  /// Adds a chunk of some packs of rows, from p0 on, to the sums; with Ahead, stages and looks at
  /// the next chunk in the same loop, so that memory and arithmetic overlap.
  template <bool Ahead, index Packs> PERDITA_NOINLINE void absorb(index column, index n, index p0) {
    tile& t = *tile_;
    const V nothing = statistic::template look_at_nothing<V>();
    const index next = column + chunk_columns, step = job_.scores.col_stride;
    const marks &here = targets(column), &there = targets(next);
    T* x = staged(column) + p0 * width;
    const T* from = nullptr;
    T* to = nullptr;
    if constexpr (Ahead) {
      from = job_.scores.pointer(t.first + p0 * width, next);
      to = staged(next) + p0 * width;
    }
    V seen[Packs], shift[Packs];
    for (index p = 0; p < Packs; ++p) {
      seen[p] = nothing;
      shift[p] = t.shift[p0 + p];
    }
    V part[lanes<T>][statistic::terms][Packs];
    for (index i = 0; i < std::min(width, n); ++i)
      for (auto& term : part[i])
        for (V& sum : term)
          sum = V(0);
    side_cursor<T> side;
    if constexpr (Formula::has_side)
      side = formula_.side(column);
    for (index j = 0; j < n; ++j) {
      auto& sums = part[j % width];
      for (index p = 0; p < Packs; ++p) {
        if constexpr (Ahead) {
          const T* at = from + j * step + p * width;
          prefetch(at + prefetch_columns * step);
          const V z = V::load(at);
          z.store(to + j * tile_rows + p * width);
          seen[p] = statistic::look(seen[p], there.replace(z, nothing, j, p0 + p));
        }
        T* at = x + j * tile_rows + p * width;
        V z = formula_.score(V::load(at));
        V b(0);
        if constexpr (Formula::has_side)
          b = side_of(side, j, p0 + p);
        if constexpr (Formula::excludes_target) {
          z = here.replace(z, statistic::absent(shift[p]), j, p0 + p);
          if constexpr (Formula::has_side)
            b = here.replace(b, V(0), j, p0 + p);
        }
        V sum[statistic::terms];
        for (int k = 0; k < statistic::terms; ++k)
          sum[k] = sums[k][p];
        const V image = statistic::absorb(sum, z, shift[p], b);
        for (int k = 0; k < statistic::terms; ++k)
          sums[k][p] = sum[k];
        if constexpr (Gradient)
          if (carries_)
            image.store(at);
      }
    }
    for (index p = 0; p < Packs; ++p) {
      if constexpr (Ahead)
        t.seen[p0 + p] = seen[p];
      for (index i = 0; i < std::min(n, width); ++i)
        for (int k = 0; k < statistic::terms; ++k)
          t.sums[k][i][p0 + p].add(part[i][k][p]);
    }
  }

  V side_of(const side_cursor<T>& side, index j, index p) const {
    const V b(side.bias ? side.bias[j] : side.uniform_bias);
    if (!job_.soft)
      return b;
    const V w(side.weight ? side.weight[j] : side.uniform_weight);
    return fma(V::load(stage_soft_ + j * tile_rows + p * width), w, b);
  }

  /// What the shift of a staged chunk is picked from.
  V look(index p, index column, index n) const {
    const V nothing = statistic::template look_at_nothing<V>();
    const T* x = staged(column) + p * width;
    const marks& here = targets(column);
    constexpr index sums = statistic::look_is_maximum ? 1 : width;
    V seen[sums];
    for (V& s : seen)
      s = nothing;
    for (index j = 0; j < n; ++j) {
      V z = V::load(x + j * tile_rows);
      if constexpr (Formula::excludes_target)
        z = here.replace(z, nothing, j, p);
      seen[j % sums] = statistic::look(seen[j % sums], z);
    }
    for (index half = sums / 2; half > 0; half /= 2)
      for (index i = 0; i < half; ++i)
        seen[i] = seen[i] + seen[i + half];
    return seen[0];
  }

  void choose_shift(index p, index column, index n) {
    tile& t = *tile_;
    const V seen = t.seen[p];
    if constexpr (statistic::look_is_maximum)
      t.rivals[p] = max(seen, t.rivals[p]);
    const V shift = statistic::choose(formula_.score(seen), t.shift[p], n);
    if (column > 0 && any(!(shift == t.shift[p]))) {
      W by[halves];
      widen(t.shift[p], shift, by);
      for (index i = 0; i < width; ++i) {
        wide_lanes<T> sums[statistic::terms];
        for (int k = 0; k < statistic::terms; ++k)
          sums[k] = t.sums[k][i][p];
        rebase_lanes<statistic>(sums, by);
        for (int k = 0; k < statistic::terms; ++k)
          t.sums[k][i][p] = sums[k];
      }
    }
    t.shift[p] = shift;
    shifts_[column / chunk_columns * packs + p] = shift;
  }

  static void widen(const V& a, W* wide) {
    alignas(64) T narrow[lanes<T>];
    a.store(narrow);
    alignas(64) double d[lanes<T>];
    for (index i = 0; i < width; ++i)
      d[i] = static_cast<double>(narrow[i]);
    for (index h = 0; h < halves; ++h)
      wide[h] = W::load(d + h * finish_rows);
  }
  /// a − b in double
  static void widen(const V& a, const V& b, W* difference) {
    W other[halves];
    widen(a, difference);
    widen(b, other);
    for (index h = 0; h < halves; ++h)
      difference[h] = difference[h] - other[h];
  }

  void finish(index p, exact_sum& total) {
    tile& t = *tile_;
    W shift[halves], rivals[halves], raw[halves], target[halves];
    widen(t.shift[p], shift);
    widen(t.rivals[p], rivals);
    const V raw_target = V::load(t.raw_target + p * width);
    widen(raw_target, raw);
    widen(formula_.score(raw_target), target);
    alignas(64) T narrow[1 + coefficients][lanes<T>];
    for (index h = 0; h < halves; ++h) {
      const index at = p * width + h * finish_rows;
      row_summary<statistic> s;
      s.shift = shift[h];
      s.target = target[h];
      s.target_side = W::load(t.target_side + at);
      s.label_weight = W::load(t.label_weight + at);
      s.classes = W(static_cast<double>(cols_));
      for (int k = 0; k < statistic::terms; ++k)
        s.term[k] = total_of(t.sums[k], p, h);
      const row_outcome<W> result = formula_.finish(s);
      alignas(64) double value[finish_rows];
      result.value.store(value);
      index numbers[finish_rows], lane[finish_rows], count = 0;
      for (index i = 0; i < finish_rows; ++i) {
        if (t.counts[at + i]) {
          store_value(job_, t.first + at + i, value[i], total);
          lane[count] = i;
          numbers[count++] = t.first + at + i;
        } else if (at + i < t.rows) {
          store_ignored_report(job_, t.first + at + i);
        }
      }
      if (job_.report.any())
        store_report(formula_, job_, s, numbers, lane, raw[h], rivals[h], count);
      if constexpr (Gradient) {
        const W scale = W::load(t.scale + at);
        (Formula::linear ? result.image_scale * scale : result.image_scale)
            .store(t.image_scale + at);
        narrow_to(result.target_gradient * scale, narrow[0] + h * finish_rows);
        for (int k = 0; k < coefficients; ++k)
          narrow_to(result.coefficient[k], narrow[1 + k] + h * finish_rows);
      }
    }
    if constexpr (Gradient) {
      t.target_gradient[p] = V::load(narrow[0]);
      for (int k = 0; k < coefficients; ++k)
        t.coefficient[p][k] = V::load(narrow[1 + k]);
      alignas(64) T scale[lanes<T>];
      for (index i = 0; i < width; ++i)
        scale[i] = static_cast<T>(t.scale[p * width + i]);
      t.gradient_scale[p] = V::load(scale);
    }
  }

  static void narrow_to(const W& wide, T* out) {
    alignas(64) double d[finish_rows];
    wide.store(d);
    for (index i = 0; i < finish_rows; ++i)
      out[i] = static_cast<T>(d[i]);
  }

  /// Σ over the classes' sums, halves onto halves, as sum_lanes() does with lanes.
  W total_of(const wide_lanes<T> (&sums)[lanes<T>][packs], index p, index h) const {
    const auto of = [&](index i) {
      return i < cols_ ? sums[i][p].folded(static_cast<int>(h)) : W(0);
    };
    W sum[lanes<T>];
    for (index i = 0; i < width; ++i)
      sum[i] = of(i);
    for (index half = width / 2; half > 0; half /= 2)
      for (index i = 0; i < half; ++i)
        sum[i] = sum[i] + sum[i + half];
    return sum[0];
  }

  /// The factors from image to share for the chunk that starts at a column.
  void set_chunk(index p, index column) {
    tile& t = *tile_;
    W moved[halves];
    widen(shifts_[column / chunk_columns * packs + p], t.shift[p], moved);
    alignas(64) T factor[lanes<T>];
    for (index h = 0; h < halves; ++h) {
      const W scale = W::load(t.image_scale + p * width + h * finish_rows);
      narrow_to(exp(moved[h]) * scale, factor + h * finish_rows);
    }
    t.factor[p] = V::load(factor);
    t.cut[p] = V(std::numeric_limits<T>::min()) / abs(t.factor[p]);
  }

  /// Where a chunk of the gradient comes from and goes to.
  struct route {
    const T* x; // scores, or images
    T* out;
    index x_step, out_step;
    bool reads, streamed;
  };

  void emit(index column, index n) {
    tile& t = *tile_;
    const auto& m = job_.gradient;
    route r;
    r.reads = !carries_ && whole(job_.scores); // scores from where they lie
    T* stage = staged(column);
    if (!carries_ && !r.reads)
      fetch(job_.scores, column, n, stage);
    if (!carries_ && job_.soft)
      fetch(job_.soft, column, n, stage_soft_);
    if (cols_ > chunk_columns)
      mark(column, n);
    for (index p = 0; p < t.row_packs; ++p)
      set_chunk(p, column);
    r.x = r.reads ? job_.scores.pointer(t.first, column) : stage;
    r.x_step = r.reads ? job_.scores.col_stride : tile_rows;
    const bool in_place = whole(m) && !job_.accumulate;
    r.out = in_place ? m.pointer(t.first, column) : stage;
    r.out_step = in_place ? m.col_stride : tile_rows;
    r.streamed = job_.streaming && in_place && r.out_step % width == 0 &&
                 reinterpret_cast<std::uintptr_t>(r.out) % 64 == 0;
    by_packs([&]<index Packs>(std::integral_constant<index, Packs>, index p) {
      emit_packs<Packs>(r, column, n, p);
    });
    if (!in_place)
      put(stage, column, n);
  }

  template <index Packs>
  PERDITA_NOINLINE void emit_packs(const route& r, index column, index n, index p0) const {
    const tile& t = *tile_;
    const marks& here = targets(column);
    const T* x = r.x + p0 * width;
    T* out = r.out + p0 * width;
    const index x_step = r.x_step, out_step = r.out_step;
    side_cursor<T> side;
    if constexpr (Formula::has_side)
      side = formula_.side(column);
    V factor[Packs], cut[Packs], shift[Packs];
    for (index p = 0; p < Packs; ++p) {
      factor[p] = t.factor[p0 + p];
      cut[p] = t.cut[p0 + p];
      shift[p] = shifts_[column / chunk_columns * packs + p0 + p];
    }
    for (index j = 0; j < n; ++j) {
      for (index p = 0; p < Packs; ++p) {
        const index q = p0 + p;
        const T* from = x + j * x_step + p * width;
        if (r.reads)
          prefetch(from + prefetch_columns * x_step);
        V g = V::load(from);
        if (Formula::proportional && statistic::has_image && carries_) {
          g = multiply_unless_less(g, cut[p], factor[p]);
        } else {
          const V z = formula_.score(g);
          V share(0), b(0);
          if constexpr (statistic::has_image && Formula::uses_share)
            share = multiply_unless_less(exp_shifted(z - shift[p]), cut[p], factor[p]);
          if constexpr (Formula::has_side)
            b = side_of(side, j, q);
          g = share;
          if constexpr (!Formula::proportional && Formula::linear)
            g = formula_.slope(z, share, Formula::has_side ? b * t.gradient_scale[q] : b,
                               t.coefficient[q]);
          else if constexpr (!Formula::proportional)
            g = formula_.slope(z, share, b, t.coefficient[q]) * t.gradient_scale[q];
        }
        g = here.replace(g, t.target_gradient[q], j, q);
        if (t.some_ignored)
          g = select(t.keep[q] == V(0), V(0), g);
        T* to = out + j * out_step + p * width;
        if (r.streamed)
          g.stream(to);
        else
          g.store(to);
      }
    }
  }

  /// Stores a staged chunk of the gradient.
  void put(const T* stage, index column, index n) const {
    const tile& t = *tile_;
    const auto& m = job_.gradient;
    const bool by_column = m.row_stride == 1;
    for (index k = 0; k < (by_column ? n : t.rows); ++k) {
      const index size = by_column ? t.rows : n;
      const auto at = m.at(t.first + (by_column ? 0 : k), column + (by_column ? k : 0));
      const index step = by_column ? m.row_stride : m.col_stride;
      if (m.direct() && step == 1 && !job_.accumulate && !by_column) {
        T* to = reinterpret_cast<T*>(at);
        for (index i = 0; i < size; ++i)
          to[i] = stage[i * tile_rows + k];
        continue;
      }
      if (job_.accumulate)
        m.reader(at, step, size, stage_row_);
      for (index i = 0; i < size; ++i) {
        const T g = by_column ? stage[k * tile_rows + i] : stage[i * tile_rows + k];
        stage_row_[i] = job_.accumulate ? stage_row_[i] + g : g;
      }
      m.writer(at, step, size, stage_row_);
    }
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_;
  bool carries_;
  std::size_t scratch_bytes_ = 0;
  tile* tile_ = nullptr;
  V* shifts_ = nullptr; // of every chunk and pack of rows
  T *stage_ = nullptr, *stage_soft_ = nullptr, *stage_row_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
