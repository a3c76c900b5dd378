// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for scores whose classes do not lie side by side (column-major matrices, images
/// with their classes first) and for rows too short to fill a pack: lanes are rows.
///
/// A tile of rows goes through all classes twice, once for the sums and once for the gradient. To
/// give a row the same bits as the other traversal, class j is added to sum number j mod W, W being
/// the lanes of a pack, and the sums are added in the same tree.

#include "row_kernel.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Lanes are better rows than classes.
template <class T>
bool prefers_columns(const row_job<T>& job) {
  const bool short_rows = job.scores.cols < 2 * static_cast<index>(lanes<T>);
  return short_rows || (job.scores.row_stride == 1 && job.scores.col_stride != 1);
}

template <class Formula, class T, bool Gradient>
class column_kernel {
  using V = pack<T>;
  using W = pack<double>;
  using statistic = typename Formula::statistic;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr index packs = 4;  // of rows, in a tile
  static constexpr index halves = wide_lanes<T>::parts;
  static constexpr index prefetch_columns = 12;

 public:
  column_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols) {
    carver memory(scratch);
    const auto chunk = static_cast<std::size_t>(std::min(chunk_columns, cols_) * width);
    tile_ = memory.take<tile>(1);
    shifts_ = memory.take<V>(
        static_cast<std::size_t>((cols_ + chunk_columns - 1) / chunk_columns * packs));
    for (index p = 0; p < packs; ++p) {
      stage_[p] = memory.take<T>(chunk);
      stage_soft_[p] = job.soft ? memory.take<T>(chunk) : nullptr;
      stage_out_[p] = Gradient ? memory.take<T>(chunk) : nullptr;
    }
    stage_row_ = memory.take<T>(static_cast<std::size_t>(chunk_columns + width));
    scratch_bytes_ = memory.used();
    if (scratch) new (tile_) tile;
  }

  static std::size_t scratch_bytes(const Formula& formula, const row_job<T>& job) {
    return column_kernel(formula, job, nullptr).scratch_bytes_;
  }

  /// Rows [first, last): adds their weighted values to total.
  void run(index first, index last, exact_sum& total) {
    const index plane = std::max<index>(job_.scores.plane_rows, 1);
    for (index r = first; r < last;) {
      const index n = std::min({packs * width, last - r, plane - r % plane});
      run_tile(r, n, total);
      r += n;
    }
    if (job_.streaming) stream_fence();
  }

 private:
  /// A tile of rows between their first class and their gradient.
  struct tile {
    index first, rows, row_packs;
    bool some_ignored;
    index label[packs * lanes<T>];
    double raw_target[packs * lanes<T>], target[packs * lanes<T>];
    double target_side[packs * lanes<T>], label_weight[packs * lanes<T>];
    double scale[packs * lanes<T>];
    bool counts[packs * lanes<T>];
    V shift[packs], rivals[packs];
    V keep[packs];  // 0 in the lanes of rows that do not count
    V relative_label[packs];
    V factor[packs], cut[packs], gradient_scale[packs], target_gradient[packs];
    V coefficient[packs][coefficients];
    double image_scale[packs * lanes<T>];
    unsigned char has_label[chunk_columns];
    wide_lanes<T> sums[statistic::terms][lanes<T>][packs];
    V part[statistic::terms][lanes<T>][packs];
    V look[lanes<T>][packs];
  };

  /// Where a chunk of columns of one pack of rows lies: element (j, lane) at data[j * stride + lane].
  struct source {
    const T* data = nullptr;
    index stride = 0;
  };

  source fetch(const matrix_data<T>& m, index p, index column, index n, T* stage) {
    const index r = tile_->first + p * width, rows = std::min(width, tile_->rows - p * width);
    if (m.direct() && m.row_stride == 1 && rows == width)
      return {m.pointer(r, column), m.col_stride};
    if (m.row_stride == 1) {
      for (index j = 0; j < n; ++j) {
        m.read_column(r, column + j, rows, stage + j * width);
        for (index i = rows; i < width; ++i) stage[j * width + i] = stage[j * width];
      }
    } else {
      for (index i = 0; i < width; ++i) {
        m.read(r + std::min(i, rows - 1), column, n, stage_row_);
        for (index j = 0; j < n; ++j) stage[j * width + i] = stage_row_[j];
      }
    }
    return {stage, width};
  }

  void run_tile(index first, index rows, exact_sum& total) {
    tile& t = *tile_;
    t.first = first;
    t.rows = rows;
    t.row_packs = (rows + width - 1) / width;
    begin();
    for (index c = 0; c < cols_; c += chunk_columns)
      absorb(c, std::min(chunk_columns, cols_ - c));
    for (index p = 0; p < t.row_packs; ++p) finish(p, total);
    if constexpr (Gradient)
      for (index c = 0; c < cols_; c += chunk_columns)
        emit(c, std::min(chunk_columns, cols_ - c));
  }

  void begin() {
    tile& t = *tile_;
    t.some_ignored = false;
    alignas(64) T keep[packs * width];
    for (index i = 0; i < t.row_packs * width; ++i) {
      const index r = t.first + std::min(i, t.rows - 1);
      t.counts[i] = i < t.rows && !job_.ignored(r);
      keep[i] = t.counts[i] ? T(1) : T(0);
      t.some_ignored = t.some_ignored || !t.counts[i];
      const bool labelled = job_.labels && t.counts[i];
      t.label[i] = labelled ? static_cast<index>(job_.label(r)) : job_.labels ? 0 : favourite(r);
      t.label_weight[i] = job_.labels ? formula_.label_weight(t.label[i]) : 0;
      t.scale[i] = job_.row_scale(r);
      T x, q = 0;
      job_.scores.read(r, t.label[i], 1, &x);
      if (job_.soft) job_.soft.read(r, t.label[i], 1, &q);
      t.raw_target[i] = static_cast<double>(x);
      t.target_side[i] = target_side(formula_, t.label[i], q, static_cast<bool>(job_.soft));
    }
    for (index p = 0; p < t.row_packs; ++p) {
      alignas(64) T raw[lanes<T>];
      for (index i = 0; i < width; ++i) raw[i] = static_cast<T>(t.raw_target[p * width + i]);
      formula_.score(V::load(raw)).store(raw);
      for (index i = 0; i < width; ++i) t.target[p * width + i] = static_cast<double>(raw[i]);
      t.keep[p] = V::load(keep + p * width);
      t.shift[p] = statistic::template first_shift<V>();
      t.rivals[p] = V(-std::numeric_limits<T>::infinity());
      for (auto& term : t.sums)
        for (auto& residue : term) residue[p].clear();
    }
  }

  /// Where there is no label, the class that the soft target favours takes its place, and where
  /// there is no target at all, the one with the largest score.
  index favourite(index r) {
    const auto& from = job_.soft ? job_.soft : job_.scores;
    index best = 0;
    T most = -std::numeric_limits<T>::infinity();
    for (index c = 0; c < cols_; c += chunk_columns) {
      const index n = std::min(chunk_columns, cols_ - c);
      from.read(r, c, n, stage_row_);
      for (index j = 0; j < n; ++j)
        if (stage_row_[j] > most) {
          most = stage_row_[j];
          best = c + j;
        }
    }
    return best;
  }

  /// Marks the columns of the chunk that hold some row's target.
  void mark(index column, index n) {
    tile& t = *tile_;
    std::fill_n(t.has_label, n, static_cast<unsigned char>(0));
    for (index p = 0; p < t.row_packs; ++p) {
      alignas(64) T relative[lanes<T>];
      for (index i = 0; i < width; ++i) {
        const index j = t.label[p * width + i] - column;
        const bool here = j >= 0 && j < n;
        relative[i] = here ? static_cast<T>(j) : T(-1);
        if (here) t.has_label[j] = 1;
      }
      t.relative_label[p] = V::load(relative);
    }
  }

  void absorb(index column, index n) {
    tile& t = *tile_;
    mark(column, n);
    source x[packs], soft[packs];
    for (index p = 0; p < t.row_packs; ++p) {
      x[p] = fetch(job_.scores, p, column, n, stage_[p]);
      if (job_.soft) soft[p] = fetch(job_.soft, p, column, n, stage_soft_[p]);
      choose_shift(p, look(p, x[p], n), column, n);
    }
    for (auto& term : t.part)
      for (auto& residue : term)
        for (V& sum : residue) sum = V(0);
    side_cursor<T> side;
    if constexpr (Formula::has_side) side = formula_.side(column);
    for (index j = 0; j < n; ++j) {
      const index residue = j % width;
      for (index p = 0; p < t.row_packs; ++p) {
        V z = formula_.score(V::load(x[p].data + j * x[p].stride));
        V b(0);
        if constexpr (Formula::has_side) b = side_of(side, soft[p], j);
        if (Formula::excludes_target && t.has_label[j]) {
          const auto here = t.relative_label[p] == V(static_cast<T>(j));
          z = select(here, statistic::absent(t.shift[p]), z);
          b = select(here, V(0), b);
        }
        V sum[statistic::terms];
        for (int k = 0; k < statistic::terms; ++k) sum[k] = t.part[k][residue][p];
        statistic::absorb(sum, z, t.shift[p], b);
        for (int k = 0; k < statistic::terms; ++k) t.part[k][residue][p] = sum[k];
      }
    }
    for (int k = 0; k < statistic::terms; ++k)
      for (index residue = 0; residue < std::min(n, width); ++residue)
        for (index p = 0; p < t.row_packs; ++p)
          t.sums[k][residue][p].add(t.part[k][residue][p]);
  }

  static V side_of(const side_cursor<T>& side, const source& soft, index j) {
    const V b(side.bias ? side.bias[j] : side.uniform_bias);
    if (!soft.data) return b;
    const V w(side.weight ? side.weight[j] : side.uniform_weight);
    return fma(V::load(soft.data + j * soft.stride), w, b);
  }

  /// What the shift of a chunk is picked from.
  V look(index p, const source& x, index n) {
    tile& t = *tile_;
    const V nothing = statistic::template look_at_nothing<V>();
    constexpr index sums = statistic::look_is_maximum ? 1 : width;
    V seen[sums];
    for (V& s : seen) s = nothing;
    for (index j = 0; j < n; ++j) {
      const T* at = x.data + j * x.stride;
      prefetch(at + prefetch_columns * x.stride);
      V z = V::load(at);
      if (Formula::excludes_target && t.has_label[j])
        z = select(t.relative_label[p] == V(static_cast<T>(j)), nothing, z);
      seen[j % sums] = statistic::look(seen[j % sums], z);
    }
    for (index half = sums / 2; half > 0; half /= 2)
      for (index i = 0; i < half; ++i) seen[i] = seen[i] + seen[i + half];
    return seen[0];
  }

  void choose_shift(index p, const V& seen, index column, index n) {
    tile& t = *tile_;
    if constexpr (statistic::look_is_maximum) t.rivals[p] = max(seen, t.rivals[p]);
    const V shift = statistic::choose(formula_.score(seen), t.shift[p], n);
    alignas(64) T before[lanes<T>], after[lanes<T>];
    t.shift[p].store(before);
    shift.store(after);
    if (column > 0 && !std::equal(before, before + width, after)) {
      alignas(64) double delta[lanes<T>];
      for (index i = 0; i < width; ++i)
        delta[i] = static_cast<double>(before[i]) - static_cast<double>(after[i]);
      W by[halves];
      for (index h = 0; h < halves; ++h) by[h] = W::load(delta + h * finish_rows);
      for (index residue = 0; residue < width; ++residue) {
        wide_lanes<T> sums[statistic::terms];
        for (int k = 0; k < statistic::terms; ++k) sums[k] = t.sums[k][residue][p];
        rebase_lanes<statistic>(sums, by);
        for (int k = 0; k < statistic::terms; ++k) t.sums[k][residue][p] = sums[k];
      }
    }
    t.shift[p] = shift;
    shifts_[column / chunk_columns * packs + p] = shift;
  }

  void finish(index p, exact_sum& total) {
    tile& t = *tile_;
    alignas(64) T shift[lanes<T>], rivals[lanes<T>];
    t.shift[p].store(shift);
    t.rivals[p].store(rivals);
    alignas(64) T coefficient[coefficients][lanes<T>], target_gradient[lanes<T>], gradient_scale[lanes<T>];
    for (index h = 0; h < halves; ++h) {
      const index at = p * width + h * finish_rows;
      alignas(64) double wide_shift[finish_rows], wide_rivals[finish_rows];
      for (index i = 0; i < finish_rows; ++i) {
        wide_shift[i] = static_cast<double>(shift[h * finish_rows + i]);
        wide_rivals[i] = static_cast<double>(rivals[h * finish_rows + i]);
      }
      row_summary<statistic> s;
      s.shift = W::load(wide_shift);
      s.target = W::load(t.target + at);
      s.target_side = W::load(t.target_side + at);
      s.label_weight = W::load(t.label_weight + at);
      s.classes = W(static_cast<double>(cols_));
      for (int k = 0; k < statistic::terms; ++k) {
        W sum[lanes<T>];
        for (index i = 0; i < width; ++i) sum[i] = t.sums[k][i][p].folded(static_cast<int>(h));
        for (index half = width / 2; half > 0; half /= 2)
          for (index i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
        s.term[k] = sum[0];
      }
      const row_outcome<W> result = formula_.finish(s);
      alignas(64) double out[2 + coefficients][finish_rows];
      result.value.store(out[0]);
      result.target_gradient.store(out[1]);
      for (int k = 0; k < coefficients; ++k) result.coefficient[k].store(out[2 + k]);
      result.image_scale.store(t.image_scale + at);
      index numbers[finish_rows], lane[finish_rows], count = 0;
      for (index i = 0; i < finish_rows; ++i) {
        const index l = h * finish_rows + i;
        const double scale = t.scale[at + i];
        for (int k = 0; k < coefficients; ++k)
          coefficient[k][l] = static_cast<T>(out[2 + k][i]);
        target_gradient[l] = static_cast<T>(out[1][i] * scale);
        gradient_scale[l] = static_cast<T>(scale);
        if (Formula::proportional) t.image_scale[at + i] *= scale;
        if (t.counts[at + i]) {
          store_value(job_, t.first + at + i, out[0][i], total);
          lane[count] = i;
          numbers[count++] = t.first + at + i;
        } else if (at + i < t.rows) {
          store_ignored_report(job_, t.first + at + i);
        }
      }
      if (job_.report.any())
        store_report(formula_, job_, s, numbers, lane, t.raw_target + at, wide_rivals, count);
    }
    for (int k = 0; k < coefficients; ++k) t.coefficient[p][k] = V::load(coefficient[k]);
    t.target_gradient[p] = V::load(target_gradient);
    t.gradient_scale[p] = V::load(gradient_scale);
  }

  /// The factors from image to share for the chunk that starts at a column.
  void set_chunk(index p, index column) {
    tile& t = *tile_;
    alignas(64) T last[lanes<T>], then[lanes<T>], factor[lanes<T>], cut[lanes<T>];
    t.shift[p].store(last);
    shifts_[column / chunk_columns * packs + p].store(then);
    alignas(64) double f[lanes<T>];
    for (index i = 0; i < width; ++i)
      f[i] = static_cast<double>(then[i]) - static_cast<double>(last[i]);
    for (index h = 0; h < halves; ++h)
      (exp(W::load(f + h * finish_rows)) * W::load(t.image_scale + p * width + h * finish_rows))
          .store(f + h * finish_rows);
    for (index i = 0; i < width; ++i) {
      factor[i] = static_cast<T>(f[i]);
      cut[i] = std::numeric_limits<T>::min() / std::fabs(factor[i]);
    }
    t.factor[p] = V::load(factor);
    t.cut[p] = V::load(cut);
  }

  void emit(index column, index n) {
    tile& t = *tile_;
    if (cols_ > chunk_columns) mark(column, n);
    source x[packs], soft[packs];
    T* out[packs];
    index out_stride[packs];
    bool staged[packs], streamed = job_.streaming;
    for (index p = 0; p < t.row_packs; ++p) {
      const index r = t.first + p * width;
      x[p] = fetch(job_.scores, p, column, n, stage_[p]);
      if (job_.soft) soft[p] = fetch(job_.soft, p, column, n, stage_soft_[p]);
      set_chunk(p, column);
      staged[p] = !(job_.gradient.direct() && job_.gradient.row_stride == 1 && !job_.accumulate &&
                    t.rows - p * width >= width);
      out[p] = staged[p] ? stage_out_[p] : job_.gradient.pointer(r, column);
      out_stride[p] = staged[p] ? width : job_.gradient.col_stride;
      streamed = streamed && !staged[p] && reinterpret_cast<std::uintptr_t>(out[p]) % 64 == 0 &&
                 out_stride[p] % width == 0;
    }
    side_cursor<T> side;
    if constexpr (Formula::has_side) side = formula_.side(column);
    for (index j = 0; j < n; ++j) {
      for (index p = 0; p < t.row_packs; ++p) {
        const T* at = x[p].data + j * x[p].stride;
        prefetch(at + prefetch_columns * x[p].stride);
        const V z = formula_.score(V::load(at));
        V share(0), b(0);
        if constexpr (statistic::has_image && Formula::uses_share)
          share = multiply_unless_less(
              exp_shifted(z - shifts_[column / chunk_columns * packs + p]), t.cut[p], t.factor[p]);
        if constexpr (Formula::has_side) b = side_of(side, soft[p], j);
        V g = share;
        if constexpr (!Formula::proportional)
          g = formula_.slope(z, share, b, t.coefficient[p]) * t.gradient_scale[p];
        if (t.has_label[j])
          g = select(t.relative_label[p] == V(static_cast<T>(j)), t.target_gradient[p], g);
        if (t.some_ignored) g = select(t.keep[p] == V(0), V(0), g);
        T* to = out[p] + j * out_stride[p];
        if (streamed)
          g.stream(to);
        else
          g.store(to);
      }
    }
    for (index p = 0; p < t.row_packs; ++p)
      if (staged[p]) put(p, column, n);
  }

  /// Stores a staged chunk of the gradient of one pack of rows.
  void put(index p, index column, index n) {
    const index r = tile_->first + p * width, rows = std::min(width, tile_->rows - p * width);
    const T* stage = stage_out_[p];
    const auto& m = job_.gradient;
    if (m.row_stride == 1) {
      for (index j = 0; j < n; ++j) {
        if (job_.accumulate) m.reader(m.at(r, column + j), 1, rows, stage_row_);
        for (index i = 0; i < rows; ++i)
          stage_row_[i] = stage[j * width + i] + (job_.accumulate ? stage_row_[i] : T(0));
        m.write_column(r, column + j, rows, stage_row_);
      }
    } else {
      for (index i = 0; i < rows; ++i) {
        if (job_.accumulate) m.reader(m.at(r + i, column), m.col_stride, n, stage_row_);
        for (index j = 0; j < n; ++j)
          stage_row_[j] = stage[j * width + i] + (job_.accumulate ? stage_row_[j] : T(0));
        m.write(r + i, column, n, stage_row_);
      }
    }
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_;
  std::size_t scratch_bytes_ = 0;
  tile* tile_ = nullptr;
  V* shifts_ = nullptr;  // of every chunk and pack of rows
  T *stage_[packs], *stage_soft_[packs], *stage_out_[packs];
  T* stage_row_ = nullptr;
};

}  // namespace perdita::inline PERDITA_ABI::core
