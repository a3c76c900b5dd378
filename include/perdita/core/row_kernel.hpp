// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for rows whose classes lie side by side: lanes are classes.
///
/// A row is read from memory once. While the exponentials of one row are taken, the gradient of
/// the row before leaves in the same loop, so that arithmetic, reading and writing overlap; the
/// line 16 KiB ahead is asked for in time (without that, alternating between rows starves the
/// hardware's prefetcher: a factor of two on Zen 4). The next chunk's maximum is taken in the same
/// loop too. Images e^{z-s} stay in the gradient's row where it overwrites the scores, or is long
/// and goes through the caches, and in scratch otherwise; formulas whose slope reads the score
/// compute them again. A gradient too large for the caches is written past them, whole lines at a
/// time. Short rows go in one loop each where all lies in place and the shift stays: what is done
/// once a row would take a third.

#include <algorithm>

#include "row_formula.hpp"
#include "row_job.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Side numbers of the classes from some column on: bias + weight * soft target.
template <class T> struct side_cursor {
  const T* soft = nullptr;
  const T* weight = nullptr;
  const T* bias = nullptr;
  T uniform_weight = 0, uniform_bias = 0;

  PERDITA_INLINE pack<T> at(index i) const {
    const pack<T> b = bias ? pack<T>::load(bias + i) : pack<T>(uniform_bias);
    if (!soft)
      return b;
    const pack<T> w = weight ? pack<T>::load(weight + i) : pack<T>(uniform_weight);
    return fma(pack<T>::load(soft + i), w, b);
  }
  /// Of the first n < W classes from i on, 0 for the others.
  PERDITA_INLINE pack<T> first(index i, index n) const {
    const pack<T> zero(0);
    const pack<T> b = bias ? load_first(bias + i, n, zero) : pack<T>(uniform_bias);
    if (!soft)
      return b;
    const pack<T> w = weight ? load_first(weight + i, n, zero) : pack<T>(uniform_weight);
    return fma(load_first(soft + i, n, zero), w, b);
  }
  void move(index columns) {
    for (const T** p : {&soft, &weight, &bias})
      if (*p)
        *p += columns;
  }
};

/// The side number of one class.
template <class Formula, class T>
double target_side(const Formula& formula, index label, T soft, bool has_soft) {
  if constexpr (Formula::has_side) {
    const side_cursor<T> s = formula.side(label);
    const auto weight = static_cast<double>(s.weight ? *s.weight : s.uniform_weight);
    const auto bias = static_cast<double>(s.bias ? *s.bias : s.uniform_bias);
    return has_soft ? static_cast<double>(
                          static_cast<T>(std::fma(static_cast<double>(soft), weight, bias)))
                    : bias;
  }
  return 0;
}

/// Where there is no label, the class that the soft target favours takes its place, and where
/// there is no target at all, the one with the largest score. `stage` holds a chunk.
template <class T> index favourite(const row_job<T>& job, index r, T* stage) {
  const auto& from = job.soft ? job.soft : job.scores;
  if (from.direct() && from.col_stride == 1)
    return find_maximum(from.pointer(r, 0), job.scores.cols).at;
  maximum<T> best;
  for (index first = 0; first < job.scores.cols; first += chunk_columns) {
    const index n = std::min(chunk_columns, job.scores.cols - first);
    from.read(r, first, n, stage);
    best = merge(best, find_maximum(stage, n, first));
  }
  return best.at;
}

/// Adds a row's value to the total of its block.
template <class T>
void store_value(const row_job<T>& job, index r, double value, value_sum& total) {
  const double weighted = value * job.row_weight(r);
  total.add(r, weighted);
  if (job.report.values.data)
    job.report.values[r] = static_cast<T>(weighted);
}

/// Runs a finished batch through the formula's report and stores what was asked for of the rows
/// in the given lanes.
template <class Formula, class T, class Summary>
PERDITA_NOINLINE void store_report(const Formula& formula, const row_job<T>& job, const Summary& s,
                                   const index* rows, const index* lane,
                                   const pack<double>& raw_target, const pack<double>& raw_rivals,
                                   index count) {
  alignas(64) double v[4][finish_rows] = {};
  alignas(64) double target[finish_rows], rivals[finish_rows];
  raw_target.store(target);
  raw_rivals.store(rivals);
  if constexpr (requires { formula.report(s); }) {
    const auto r = formula.report(s);
    r.log_sum_exp.store(v[0]);
    r.target_log_probability.store(v[1]);
    r.entropy.store(v[2]);
    r.penalty.store(v[3]);
  }
  const vector_view<T> to[] = {job.report.log_sum_exp, job.report.target_log_probability,
                               job.report.entropy, job.report.penalty};
  for (index i = 0; i < count; ++i) {
    for (int k = 0; k < 4; ++k)
      if (to[k].data)
        to[k][rows[i]] = static_cast<T>(v[k][lane[i]]);
    if (job.report.hits.data)
      job.report.hits[rows[i]] = static_cast<unsigned char>(
          target[lane[i]] > rivals[lane[i]] && !std::isnan(v[0][lane[i]])); // rivals pass NaN over
  }
}

/// By-products of a row that does not count.
template <class T> void store_ignored_report(const row_job<T>& job, index r) {
  for (const auto& v : {job.report.values, job.report.log_sum_exp,
                        job.report.target_log_probability, job.report.entropy, job.report.penalty})
    if (v.data)
      v[r] = T(0);
  if (job.report.hits.data)
    job.report.hits[r] = 0;
}

/// Gradient and by-products of a row that does not count.
template <class T> void store_ignored(const row_job<T>& job, index r, T* zeros) {
  if (job.has_gradient() && !job.accumulate) {
    std::fill_n(zeros, std::min(chunk_columns, job.scores.cols), T(0));
    for (index c = 0; c < job.scores.cols; c += chunk_columns)
      job.gradient.write(r, c, std::min(chunk_columns, job.scores.cols - c), zeros);
  }
  store_ignored_report(job, r);
}

/// Rows per task and per partial sum of the values: enough to be worth a task, few enough to share
/// out; a function of the shape, never of the number of threads.
template <class T> index block_rows(const row_job<T>& job) {
  const auto up = [](index a, index b) { return (a + b - 1) / b; };
  const index rows = job.scores.rows;
  const index n =
      std::max({up(65536, job.scores.cols), std::clamp<index>(rows / 16, 1, 8), up(rows, 4096)});
  return n > finish_rows ? up(n, finish_rows) * finish_rows : n;
}

/// scale e^{shifts[c] − shift}, c < n: from image to share, for chunks whose shifts differ. This is
/// rare: compiled once, for all formulas.
template <class T>
PERDITA_NOINLINE void fill_factors(const T* shifts, T shift, index n, double scale, T* factors) {
  alignas(64) double d[finish_rows];
  for (index c = 0; c < n; c += finish_rows) {
    const index k = std::min(finish_rows, n - c);
    for (index i = 0; i < k; ++i)
      d[i] = static_cast<double>(shifts[c + i]) - static_cast<double>(shift);
    (exp(pack<double>::load(d)) * scale).store(d);
    for (index i = 0; i < k; ++i)
      factors[c + i] = static_cast<T>(d[i]);
  }
}
/// The same of one chunk, for rows in lanes.
template <class T>
PERDITA_NOINLINE pack<T> factor_of(const pack<T>& chunk_shift, const pack<T>& shift,
                                   const double* scale) {
  pack<double> chunk[wide_lanes<T>::parts], last[wide_lanes<T>::parts];
  widen(chunk_shift, chunk);
  widen(shift, last);
  for (index h = 0; h < wide_lanes<T>::parts; ++h)
    chunk[h] = exp(chunk[h] - last[h]) * pack<double>::load(scale + h * finish_rows);
  return narrow(chunk);
}

/// One chunk of columns at a time of one row's sums and of another row's gradient.
template <class Formula, class T> class row_kernel {
  using V = pack<T>;
  using statistic = typename Formula::statistic;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr index chunk_packs = chunk_columns / width;
  static constexpr index short_chunks = 4;
  static constexpr index short_columns = short_chunks * chunk_columns;

public:
  static index rows_per_sum(const row_job<T>& job) { return block_rows(job); }
  static index rows_per_task(const row_job<T>& job, std::size_t) { return block_rows(job); }
  static index group_size(index cols) { return cols <= short_columns ? finish_rows : 1; }

  row_kernel(const Formula& formula, const row_job<T>& job, std::byte* scratch)
      : formula_(formula), job_(job), cols_(job.scores.cols),
        chunks_((cols_ + chunk_columns - 1) / chunk_columns),
        scores_in_place_(job.scores.direct() && job.scores.col_stride == 1),
        soft_in_place_(job.soft.direct() && job.soft.col_stride == 1),
        gradient_in_place_(job.gradient.direct() && job.gradient.col_stride == 1 &&
                           !job.accumulate),
        images_in_row_(
            scores_in_place_ && gradient_in_place_ &&
            (job.in_place() || (cols_ > short_columns && !job.streaming && !job.over_target()))),
        has_gradient_(job.has_gradient()),
        short_(cols_ <= short_columns && scores_in_place_ && (!job.soft || soft_in_place_) &&
               (!has_gradient_ || gradient_in_place_)) {
    // A row without a target has just been read for its favourite; it is the next that is far,
    // unless one that short of a cache leaves again.
    constexpr index three_in_cache = (index{2} << 20) / 3 / static_cast<index>(sizeof(T));
    if (!job.labels && !job.soft && scores_in_place_ && cols_ <= three_in_cache)
      ahead_ = group_size(cols_) * job.scores.row_stride;
    carver memory(scratch);
    lay_out(memory, scratch != nullptr);
    scratch_bytes_ = memory.used();
  }

  static std::size_t scratch_bytes(const Formula& formula, const row_job<T>& job) {
    return row_kernel(formula, job, nullptr).scratch_bytes_;
  }

  /// Rows [first, last): adds their weighted values to the total. The gradient of the last rows is
  /// left for the next call, or drain(), to write.
  template <bool Gradient> void run(index first, index last, value_sum* total) {
    const index capacity = group_size(cols_);
    std::int64_t labels[finish_rows] = {};
    for (index r = first; r < last;) {
      index count = 0;
      for (; r < last && count < capacity; ++r) {
        const index k = (r - first) % finish_rows;
        if (job_.labels && k == 0)
          job_.read_labels(r, std::min(finish_rows, last - r), labels);
        if (job_.counts(r, labels[k]))
          begin(current_[count++], r, static_cast<index>(labels[k]));
        else
          store_ignored(job_, r, stage_gradient_);
      }
      if (count == 0)
        continue;
      advance<Gradient>(count);
      finish(current_, count, *total);
      pending_ = Gradient ? count : 0;
      std::swap(current_, previous_);
    }
  }
  template <bool Gradient> void drain() {
    advance<Gradient>(0);
    pending_ = 0;
    write_line();
    if (job_.streaming)
      stream_fence();
  }

private:
  /// A row between its first column and its gradient.
  struct live_row {
    index row, label;
    double scale;
    const T* x; // where the scores and the gradient lie, if they may be used there
    T* gradient;
    T raw_target, shift;
    V look[short_chunks]; // what the first chunks' shifts are picked from
    index looked;         // of how many chunks that is known
    T rivals;             // the largest raw score but the target's
    bool shifted;         // not all chunks have the same shift
    wide_lanes<T> sums[statistic::terms];
    T* shifts;  // of every chunk
    T* factors; // of every chunk: from image to share
    T* image;   // scratch; null where the images stay in the row
    T coefficient[coefficients];
    T target_gradient;
  };

  /// What is looked at while something else is summed.
  struct lookout {
    const T* x;
    index offset; // from the columns that are summed to those of x
    index last;   // the last column to look at a pack from: again and again, if need be
    index hole;   // the first column of the pack with the target in it, or -1
    T hole_lane;
  };

  struct absorb_cursor {
    live_row *row, *after;
    index first_chunk, chunk; // of the run, and the one that is summed
    const T* x;
    T* image;
    side_cursor<T> side;
    index hole; // the pack with the target in it, or -1
    T hole_lane;
    lookout next;
    bool looks = false; // at anything
    V shift, seen;
    V rivals; // the maximum of what was seen of chunks that are done
    V sum[statistic::terms];
  };

  struct emit_cursor {
    const T* from; // images, or scores where the formula needs them
    T* to;
    side_cursor<T> side;
    V factor, cut, shift, scale;
    V coefficient[coefficients];
    index hole = -1; // the pack with the target in it, or -1
    T hole_lane;
    V target;       // its gradient
    index head = 0; // columns before the first aligned pack of a streamed row
    bool streaming = false, straddles = false;
  };

  void lay_out(carver& memory, bool real) {
    const index n = 2 * group_size(cols_);
    current_ = memory.take<live_row>(static_cast<std::size_t>(n));
    previous_ = current_ + n / 2;
    for (index k = 0; k < n; ++k) {
      T* shifts = memory.take<T>(static_cast<std::size_t>(chunks_ + width));
      T* factors = memory.take<T>(static_cast<std::size_t>(chunks_ + width));
      // Where caches are short, a row's images take the place of those of the row that it follows,
      // as these are read: a tenth faster, or a third where two rows exceed a cache. (With ordinary
      // stores of the gradient in the same loop it is a quarter slower.)
      const bool follows = job_.streaming && k >= n / 2;
      T* image = follows && real ? current_[k - n / 2].image : nullptr;
      if (keeps_images() && !images_in_row_ && !follows)
        image = memory.take<T>(static_cast<std::size_t>(cols_ + 2 * width));
      if (!real)
        continue;
      live_row* row = new (&current_[k]) live_row;
      row->shifts = shifts;
      row->factors = factors;
      row->image = image;
    }
    for (T** stage : {&stage_x_[0], &stage_x_[1], &stage_emit_, &stage_gradient_, &stage_sum_,
                      &stage_soft_, &stage_soft_emit_})
      *stage = memory.take<T>(static_cast<std::size_t>(chunk_columns + 2 * width));
  }

  /// The gradient can be made of the images, so these are all that a row leaves behind.
  static PERDITA_INLINE bool uses_images(const Formula& formula) {
    return Formula::keeps_scores || (statistic::has_image && !formula.slope_reads_score());
  }
  bool uses_images() const { return uses_images(formula_); }
  bool keeps_images() const { return has_gradient_ && uses_images(); }
  index chunk_size(index c) const { return std::min(chunk_columns, cols_ - c * chunk_columns); }
  // ---- sources

  const T* scores(const live_row& row, index first, index n, T* stage) const {
    if (scores_in_place_)
      return row.x + first;
    if (job_.scores.col_stride == 1)
      for (index byte = 0; byte < n * job_.scores.width; byte += 64)
        prefetch(job_.scores.at(row.row, first) + prefetch_bytes + byte);
    job_.scores.read(row.row, first, n, stage);
    return stage;
  }
  side_cursor<T> side(index r, index first, index n, T* stage) const {
    side_cursor<T> result;
    if constexpr (Formula::has_side) {
      result = formula_.side(first);
      if (job_.soft) {
        if (!soft_in_place_)
          job_.soft.read(r, first, n, stage);
        result.soft = soft_in_place_ ? job_.soft.pointer(r, first) : stage;
      }
    }
    return result;
  }

  // ---- the sums

  void begin(live_row& row, index r, index label) {
    row.row = r;
    row.label = job_.labels ? label : favourite(job_, r, stage_soft_);
    row.scale = job_.row_scale(r);
    row.x = scores_in_place_ ? job_.scores.pointer(r, 0) : nullptr;
    row.gradient = gradient_in_place_ ? job_.gradient.pointer(r, 0) : nullptr;
    for (auto& s : row.sums)
      s.clear();
    row.shift = first_lane(statistic::template first_shift<V>());
    row.rivals = -std::numeric_limits<T>::infinity();
    row.shifted = false;
    row.looked = 0;
  }

  index hole_in(const live_row& row, index first, index n) const {
    if constexpr (!Formula::excludes_target)
      return -1;
    return row.label >= first && row.label < first + n ? row.label - first : -1;
  }

  /// What the shift of the chunk that starts at column `first` is picked from, where packs before
  /// offset `from` have been seen.
  V look_at(const live_row& row, const T* x, index first, index n, index from, V seen) const {
    const V nothing = statistic::template look_at_nothing<V>();
    const index hole = hole_in(row, first, n);
    const auto pack_at = [&](index j) {
      V z = j + width <= n ? V::load(x + j) : load_first(x + j, n - j, nothing);
      if (hole >= j && hole < j + width) [[unlikely]]
        z = select(iota<T>() == V(static_cast<T>(hole - j)), nothing, z);
      return z;
    };
    constexpr index chains = 4; // of maxima, none of which waits for another
    if (statistic::look_is_maximum && from + chains * width <= n) {
      V most[chains] = {seen, nothing, nothing, nothing};
      for (; from + chains * width <= n; from += chains * width)
        for (index k = 0; k < chains; ++k)
          most[k] = statistic::look(most[k], pack_at(from + k * width));
      seen = statistic::look(statistic::look(most[0], most[1]), statistic::look(most[2], most[3]));
    }
    for (index j = from; j < n; j += width)
      seen = statistic::look(seen, pack_at(j));
    return seen;
  }

  /// Whether the shift moved for chunk c.
  bool choose_shift(live_row& row, const V& seen, index c) const {
    T look;
    if constexpr (statistic::look_is_maximum) {
      look = max_lanes(seen);
      row.rivals = std::max(row.rivals, look);
    } else {
      look = sum_lanes(seen);
    }
    const T shift =
        first_lane(statistic::choose(formula_.score(V(look)), V(row.shift), chunk_size(c)));
    const bool moves = !(shift == row.shift);
    if (moves) {
      pack<double> delta[2];
      delta[0] = delta[1] = static_cast<double>(row.shift) - static_cast<double>(shift);
      if (c > 0)
        rebase_lanes<statistic>(row.sums, delta);
      row.shifted = c > 0;
      row.shift = shift;
    }
    row.shifts[c] = row.shift;
    return moves;
  }

  T* image_of(live_row& row, index column) const {
    if (!keeps_images())
      return nullptr;
    return row.image ? row.image + column : row.gradient + column;
  }

  /// The last n < width columns of a row.
  void absorb_tail(absorb_cursor& a, index at, index n) const {
    const V absent = statistic::absent(a.shift);
    auto here = iota<T>() < V(static_cast<T>(n));
    if (a.hole == at / width)
      here = here & !(iota<T>() == V(a.hole_lane));
    const auto [raw, steepness] = scored(formula_, load_first(a.x + at, n, V(0)));
    const V z = select(here, raw, absent);
    V side(0);
    if constexpr (Formula::has_side)
      side = select(here, a.side.first(at, n), V(0));
    const V image = statistic::absorb(a.sum, z, a.shift, side);
    if (keeps_images())
      store_first(kept_image(formula_, image, steepness), a.image + at, n);
  }

  // ---- the gradient

  /// Prepares the row's first chunk. A streamed row starts at its first aligned address.
  void open(const live_row& row, emit_cursor& e) const {
    e.streaming = job_.streaming && gradient_in_place_ && (uses_images() || scores_in_place_) &&
                  (!job_.soft || soft_in_place_);
    e.head = 0;
    if (e.streaming) {
      const auto address = reinterpret_cast<std::uintptr_t>(row.gradient);
      e.head = std::min(cols_, static_cast<index>((64 - address % 64) % 64 / sizeof(T)));
    }
    e.scale = V(static_cast<T>(row.scale));
    e.target = V(row.target_gradient);
    for (int k = 0; k < coefficients; ++k)
      e.coefficient[k] = V(row.coefficient[k]);
  }

  void set_chunk(const live_row& row, emit_cursor& e, index c) const {
    const T factor = row.factors[c];
    e.factor = V(factor);
    e.cut = V(std::numeric_limits<T>::min() / std::fabs(factor));
    e.shift = V(row.shifts[c]);
  }

  void point(live_row& row, emit_cursor& e, index first, index n) const {
    const index hole = row.label - first;
    set_hole(hole >= 0 && hole < n ? hole : -1, e.hole, e.hole_lane);
    e.from = uses_images() ? image_of(row, first) : scores(row, first, n, stage_emit_);
    e.to = gradient_in_place_ ? row.gradient + first : stage_gradient_;
    e.side = side(row.row, first, n, stage_soft_emit_);
  }

  /// Points at `run` chunks from number c on, and writes what comes before the first aligned pack;
  /// returns the number of whole packs in them.
  index aim(live_row& row, emit_cursor& e, index c, index run) {
    const index first = c * chunk_columns + e.head;
    const index n = std::min(run * chunk_columns, cols_ - first);
    set_chunk(row, e, c);
    e.straddles = false;
    if (c == 0 && e.head > 0) {
      point(row, e, 0, e.head);
      complete_line(partial(e, 0, e.head), e.to, e.head);
    }
    if (n <= 0)
      return 0;
    point(row, e, first, n);
    // The last pack of a streamed chunk, whole or not, reaches into the next, which may have
    // another shift.
    e.straddles = row.shifted && e.head > 0 && e.head + n > chunk_columns;
    return n / width - (e.straddles && n % width == 0 ? 1 : 0);
  }

  /// n < width elements of the gradient from offset `at` of what e is aimed at.
  V partial(const emit_cursor& e, index at, index n) const {
    V side(0);
    if constexpr (Formula::has_side)
      side = e.side.first(at, n);
    const V g = gradient_of(formula_, load_first(e.from + at, n, V(0)), side, e);
    return with_target(g, at / width, e);
  }

  void put_end(const V& end, index at, index n, const emit_cursor& e) {
    if (e.streaming)
      begin_line(end, e.to + at, n);
    else
      store_first(end, e.to + at, n);
  }

  // A streamed row ends in the line in which the next one starts. An ordinary store there would
  // wait for memory, so the end waits for its line to be complete.

  void begin_line(const V& end, T* to, index n) {
    write_line();
    end.store(line_);
    line_to_ = to;
    line_count_ = n;
  }
  void complete_line(const V& start, T* to, index n) {
    if (line_count_ > 0 && line_to_ + line_count_ == to && line_count_ + n == width) {
      store_first(start, line_ + line_count_, n);
      V::load(line_).stream(line_to_);
      line_count_ = 0;
    } else {
      store_first(start, to, n);
    }
  }
  void write_line() {
    if (line_count_ > 0)
      store_first(V::load(line_), line_to_, line_count_);
    line_count_ = 0;
  }

  /// Nowhere but here: a store of the target alone would wait for a line that just left the caches.
  PERDITA_INLINE V with_target(const V& g, index pack_number, const emit_cursor& e) const {
    if (pack_number == e.hole) [[unlikely]]
      return select(iota<T>() == V(e.hole_lane), e.target, g);
    return g;
  }

  /// A pack of the gradient, from images or, where the formula needs them, scores.
  static PERDITA_INLINE V gradient_of(const Formula& formula, const V& read, const V& side,
                                      const emit_cursor& e) {
    if (uses_images(formula))
      return slope_of_image(formula, read, e.factor, e.cut, side, e.scale, e.coefficient);
    return slope_of(formula, read, e.shift, e.factor, e.cut, side, e.scale, e.coefficient);
  }

  /// The same of pack number i.
  static PERDITA_INLINE V gradient_of_pack(const Formula& formula, index i, const V& read,
                                           const emit_cursor& e) {
    V side(0);
    if constexpr (Formula::has_side)
      side = e.side.at(i * width);
    return gradient_of(formula, read, side, e);
  }
  static PERDITA_INLINE void put(const V& g, index i, const emit_cursor& e) {
    constexpr index soon = 12; // packs
    if (e.streaming) {
      g.stream(e.to + i * width);
    } else {
      g.store(e.to + i * width);
      prefetch_to_write(e.to + (i + soon) * width);
    }
  }

  /// What is left of `run` chunks from number c on once their whole packs are written.
  void flush(const live_row& row, const emit_cursor& e, index c, index run) {
    const index first = c * chunk_columns + e.head;
    const index n = std::min(run * chunk_columns, cols_ - first);
    if (n <= 0)
      return;
    const index rest = n % width, at = n - rest;
    emit_cursor both;
    if (e.straddles) {
      emit_cursor next = both = e;
      set_chunk(row, next, c + 1);
      const auto here = iota<T>() < V(static_cast<T>(width - e.head));
      both.factor = select(here, e.factor, next.factor);
      both.cut = select(here, e.cut, next.cut);
      both.shift = select(here, e.shift, next.shift);
      if (rest == 0) {
        absorb_cursor none;
        step<false, true>(n / width - 1, n / width, none, both);
      }
    }
    if (rest > 0)
      put_end(partial(e.straddles ? both : e, at, rest), at, rest, e);
    if (gradient_in_place_)
      return;
    if (job_.accumulate) {
      job_.gradient.reader(job_.gradient.at(row.row, first), job_.gradient.col_stride, n,
                           stage_sum_);
      for (index j = 0; j < n; ++j)
        stage_gradient_[j] += stage_sum_[j];
    }
    job_.gradient.write(row.row, first, n, stage_gradient_);
  }

  // ---- the traversal

  /// The sums of the current rows and the gradient of the previous ones.
  template <bool Gradient> void advance(index count) {
    for (index k = 0; k < std::max(count, pending_); ++k) {
      live_row* a = k < count ? &current_[k] : nullptr;
      live_row* e = Gradient && k < pending_ ? &previous_[k] : nullptr;
      live_row* after = k + 1 < count ? &current_[k + 1] : nullptr;
      if (!short_ || !a || (e && e->shifted) || !pass<Gradient>(*a, e, after ? *after : *a))
        advance<Gradient>(a, e, after);
    }
  }

  /// Up to which chunk they can be taken in one go: where nothing is copied first, and for the
  /// gradient of row e where its factors are the same.
  index chunks_at_once(const live_row* e, const emit_cursor& emitting) const {
    if (!statistic::look_is_maximum || !scores_in_place_ || (job_.soft && !soft_in_place_) ||
        (e && ((e->shifted && emitting.head > 0) || !gradient_in_place_)))
      return 0;
    // Where a last chunk is so short that row e may have no pack in it, it goes by itself.
    return chunk_size(chunks_ - 1) < 2 * width ? chunks_ - 1 : chunks_;
  }
  /// The same from chunk c on, where all chunks of row e have the same factor.
  static index run_from(index c, index at_once, const live_row* e) {
    const index n = std::max<index>(at_once - c, 1);
    if (!e || !e->shifted)
      return n;
    const T* shift = e->shifts + c;
    return std::find_if(shift + 1, shift + n, [=](T s) { return !(s == *shift); }) - shift;
  }
  index size_of(index c, index run) const {
    return std::min(run * chunk_columns, cols_ - c * chunk_columns);
  }
  static void accept(live_row& row, const absorb_cursor& a) {
    for (int k = 0; k < statistic::terms; ++k)
      row.sums[k].add(a.sum[k]);
  }
  /// What happened inside a run of chunks.
  static void accept_run(live_row& row, const absorb_cursor& a) {
    if (a.chunk == a.first_chunk)
      return;
    std::fill(row.shifts + a.first_chunk + 1, row.shifts + a.chunk + 1, row.shift);
    if constexpr (statistic::look_is_maximum)
      row.rivals = std::max(row.rivals, max_lanes(a.rivals));
  }

  void start_sums(live_row& row, absorb_cursor& a, index c) const {
    a.row = &row;
    a.first_chunk = a.chunk = c;
    a.shift = V(row.shift);
    a.rivals = V(row.rivals);
    a.seen = statistic::template look_at_nothing<V>();
    for (V& sum : a.sum)
      sum = V(0);
  }

  /// All chunks of row a's sums, and with each one the same chunk of row e's gradient. Meanwhile
  /// the next chunk is looked at: a's own, or the first one of the row that comes after.
  template <bool Gradient> void advance(live_row* a, live_row* e, live_row* after) {
    absorb_cursor absorbing;
    emit_cursor emitting;
    if (a) {
      // Copied scores have no room for another row's.
      absorbing.after = scores_in_place_ ? after : nullptr;
      absorbing.x = scores(*a, 0, chunk_size(0), stage_x_[0]);
      absorbing.seen = a->looked ? a->look[0]
                                 : look_at(*a, absorbing.x, 0, chunk_size(0), 0,
                                           statistic::template look_at_nothing<V>());
    }
    if (e)
      open(*e, emitting);
    const index at_once = chunks_at_once(e, emitting);
    for (index c = 0; c < chunks_;) {
      const index run = run_from(c, at_once, e);
      const index absorb_packs = a ? aim(*a, absorbing, c, run) : 0;
      const index emit_packs = e ? aim(*e, emitting, c, run) : 0;
      const index done = take<Gradient>(absorb_packs, emit_packs, c, run, absorbing, e, emitting);
      if (a)
        settle(*a, absorbing, c, run, done);
      c += done;
    }
  }

  /// Points at `run` chunks from number c on, whose scores a.x is at; returns the number of whole
  /// packs in them.
  index aim(live_row& row, absorb_cursor& a, index c, index run) const {
    const index first = c * chunk_columns, n = size_of(c, run);
    choose_shift(row, a.seen, c);
    if (row.label >= first && row.label < first + n)
      row.raw_target = a.x[row.label - first];
    set_hole(hole_in(row, first, n), a.hole, a.hole_lane);
    a.image = image_of(row, first);
    a.side = side(row.row, first, n, stage_soft_);
    start_sums(row, a, c);
    look_ahead(a);
    return n / width;
  }

  /// From the chunk that is summed to the rest of its row, or to the first chunk of the row after.
  void look_ahead(absorb_cursor& a) const {
    const index c = a.chunk + 1 < chunks_ ? a.chunk + 1 : 0, first = c * chunk_columns;
    const live_row* row = c > 0 ? a.row : a.after;
    const index n = c > 0 && scores_in_place_ ? cols_ - first : chunk_size(c);
    const T* x = row ? scores(*row, first, n, stage_x_[c % 2]) : nullptr;
    // A sum may not see a pack twice, a maximum may.
    a.looks = x && n >= (statistic::look_is_maximum ? width : chunk_size(a.chunk) / width * width);
    a.next = {a.x, (a.first_chunk - a.chunk) * chunk_columns, 0, -1, 0};
    if (!a.looks)
      return;
    a.next.x = x;
    a.next.last = (n / width - 1) * width;
    set_hole(hole_in(*row, first, n), a.next.hole, a.next.hole_lane);
    a.next.hole *= width;
  }

  /// Packs of sums and of the gradient, as many as they have in common together; returns how many
  /// of the chunks are done: fewer where the shift has to move. The images of row e are read before
  /// others take their place.
  template <bool Gradient>
  index take(index absorb_packs, index emit_packs, index c, index run, absorb_cursor& absorbing,
             const live_row* e, const emit_cursor& emitting) {
    index at = 0, both = 0;
    if constexpr (Gradient) {
      both = std::min(absorb_packs, emit_packs);
      if (both > 0)
        at = step<true, true>(0, both, absorbing, emitting);
      const index done = at < both ? at / chunk_packs : run;
      if (emit_packs > both)
        step<false, true>(both, emit_packs, absorbing, emitting);
      if (e)
        flush(*e, emitting, c, done);
      if (at < both || absorb_packs == both)
        return done;
    }
    at = step<true, false>(at, absorb_packs, absorbing, emitting);
    return at < absorb_packs ? at / chunk_packs : run;
  }

  /// Ends `done` of the chunks that a was aimed at, and goes to the next.
  void settle(live_row& row, absorb_cursor& a, index c, index run, index done) const {
    const index n = size_of(c, run);
    if (done == run && n % width)
      absorb_tail(a, n / width * width, n % width);
    accept_run(row, a);
    accept(row, a);
    const index end = c + done < chunks_ ? c + done : 0, first = end * chunk_columns;
    live_row* next = end > 0 ? &row : a.after;
    if (!next)
      return;
    const T* x = scores_in_place_ ? next->x + first : stage_x_[end % 2];
    if (done == run) { // the rest of what a.next was at
      const index size = chunk_size(end), seen = std::min(size, chunk_size(c + done - 1));
      a.seen = look_at(*next, x, first, size, a.looks ? seen / width * width : 0,
                       a.looks ? a.seen : statistic::template look_at_nothing<V>());
    }
    if (end == 0) {
      next->look[0] = a.seen;
      next->looked = 1;
    }
    a.x = x;
  }

  static void set_hole(index hole, index& pack_number, T& lane) {
    pack_number = hole < 0 ? -1 : hole / width;
    lane = static_cast<T>(hole < 0 ? 0 : hole % width);
  }

  /// Packs [begin, end) of what the cursors point at; returns the end, or where before it a chunk
  /// ended after which the shift has to move.
  template <bool Absorb, bool Emit>
  PERDITA_NOINLINE index step(index begin, index end, absorb_cursor& absorbing,
                              const emit_cursor& emitting) const {
    const V nothing = statistic::template look_at_nothing<V>();
    const bool keeps = Emit ? uses_images() : keeps_images();
    const Formula formula = formula_; // copies: a store may change anything but them
    absorb_cursor a;
    emit_cursor e;
    if constexpr (Absorb)
      a = absorbing;
    if constexpr (Emit)
      e = emitting;
    index i = begin;
    while (i < end) {
      const index stop = Absorb ? std::min(end, (i / chunk_packs + 1) * chunk_packs) : end;
      for (; i < stop; ++i) {
        const index j = i * width;
        V from; // is read before another image takes its place
        if constexpr (Emit)
          from = V::load(e.from + j);
        if constexpr (Absorb) {
          prefetch(a.x + j + ahead_);
          auto [z, steepness] = scored(formula, V::load(a.x + j));
          V side(0);
          if constexpr (Formula::has_side)
            side = a.side.at(j);
          if (i == a.hole) [[unlikely]] {
            const auto here = iota<T>() == V(a.hole_lane);
            z = select(here, statistic::absent(a.shift), z);
            side = select(here, V(0), side);
          }
          const index ahead = std::min(j + a.next.offset, a.next.last);
          V look = V::load(a.next.x + ahead); // before the image, which may take its place
          if (ahead == a.next.hole) [[unlikely]]
            look = select(iota<T>() == V(a.next.hole_lane), nothing, look);
          a.seen = statistic::look(a.seen, look);
          const V image = statistic::absorb(a.sum, z, a.shift, side);
          if (keeps)
            kept_image(formula, image, steepness).store(a.image + j);
        }
        if constexpr (Emit)
          put(with_target(gradient_of_pack(formula, i, from, e), i, e), i, e);
      }
      if constexpr (Absorb) {
        for (int k = 0; k < statistic::terms; ++k)
          absorbing.sum[k] = a.sum[k];
        absorbing.seen = a.seen;
        if (i == end || !turn(absorbing))
          break;
        for (V& sum : a.sum)
          sum = V(0);
        a.seen = nothing;
        a.next = absorbing.next;
      }
    }
    return i;
  }

  /// From one chunk of a run to the next; false if the shift has to move first.
  PERDITA_NOINLINE bool turn(absorb_cursor& a) const {
    const index c = a.chunk + 1, n = chunk_size(c);
    if (n % width) {
      const index first = c * chunk_columns;
      a.seen = look_at(*a.row, a.row->x + first, first, n, n / width * width, a.seen);
    }
    if (any(!(statistic::choose(formula_.score(a.seen), a.shift, chunk_columns) == a.shift)))
      return false;
    accept(*a.row, a);
    a.rivals = max(a.seen, a.rivals);
    a.chunk = c;
    if (c + 1 == chunks_)
      look_ahead(a);
    return true;
  }

  // ---- short rows

  /// Row a's sums and row e's gradient where a is a short row that has one shift; false, and
  /// nothing done, where it has not.
  template <bool Gradient> bool pass(live_row& a, live_row* e, live_row& after) {
    if constexpr (!statistic::look_is_maximum) {
      return false;
    } else {
      for (index& c = a.looked; c < chunks_; ++c)
        a.look[c] = look_at(a, a.x + c * chunk_columns, c * chunk_columns, chunk_size(c), 0,
                            statistic::template look_at_nothing<V>());
      T most = max_lanes(a.look[0]);
      const V shift = statistic::choose(formula_.score(V(most)), V(a.shift), chunk_size(0));
      for (index c = 1; c < chunks_; ++c) {
        const T look = max_lanes(a.look[c]);
        if (any(!(statistic::choose(formula_.score(V(look)), shift, chunk_size(c)) == shift)))
          return false;
        most = std::max(most, look);
      }
      a.rivals = most;
      a.shift = first_lane(shift);
      std::fill_n(a.shifts, chunks_, a.shift);
      a.raw_target = a.x[a.label];
      emit_cursor emitting;
      index packs = 0, rest = 0;
      V end(0);
      if constexpr (Gradient) {
        if (e) {
          open(*e, emitting);
          packs = aim(*e, emitting, 0, chunks_);
          rest = cols_ - emitting.head - packs * width;
          if (rest > 0) // is read before another image takes its place
            end = partial(emitting, packs * width, rest);
        }
      }
      pass_packs<Gradient>(a, after, emitting, packs);
      if (rest > 0)
        put_end(end, packs * width, rest, emitting);
      return true;
    }
  }

  /// The pack with the target in it, or the number of whole packs, and a copy of it without the
  /// target: what is read in its place costs no branch that nothing can predict.
  struct target_pack {
    index number;
    alignas(64) T without[lanes<T>];

    target_pack(const live_row& row, index packs) : number(packs) {
      if (const index at = row.label / width; Formula::excludes_target && at < packs) {
        number = at;
        V nothing = statistic::absent(V(0));
        if constexpr (requires { statistic::template absent_score<V>(); })
          nothing = statistic::template absent_score<V>();
        select(iota<T>() == V(static_cast<T>(row.label % width)), nothing,
               V::load(row.x + at * width))
            .store(without);
      }
    }
    PERDITA_INLINE V load(const T* x, index i) const {
      return V::load(i == number ? without : x + i * width);
    }
  };

  /// One loop over whole rows, but for their ends: sums of `row`, a look at `after`, and the first
  /// packs of another row's gradient.
  template <bool Gradient>
  PERDITA_NOINLINE void pass_packs(live_row& row, live_row& after, const emit_cursor& emitting,
                                   index emit_packs) const {
    const V nothing = statistic::template look_at_nothing<V>();
    const index packs = cols_ / width, rest = cols_ % width, ahead = ahead_;
    const target_pack own(row, packs), next(after, packs);
    const T *const x = row.x, *const next_x = after.x;
    T* const images = image_of(row, 0);
    const side_cursor<T> sides = side(row.row, 0, cols_, nullptr);
    const V shift(row.shift);
    // Not by loops: GCC would keep three sums in memory, and each addition wait for the one before.
    constexpr auto each_term = [](auto f) __attribute__((always_inline)) {
      detail::unrolled<statistic::terms>(f);
    };
    V sum[statistic::terms], seen = nothing;
    each_term([&](auto k) __attribute__((always_inline)) { sum[k] = V(0); });
    const Formula formula = formula_; // copies: a store may change anything but them
    const emit_cursor e = emitting;
    V of_target(0);
    if constexpr (Gradient) {
      if (e.hole >= 0 && e.hole < emit_packs)
        of_target = with_target(
            gradient_of_pack(formula, e.hole, V::load(e.from + e.hole * width), e), e.hole, e);
    }
    const auto absorb_pack = [&](index i) __attribute__((always_inline)) {
      const index j = i * width;
      prefetch(x + j + ahead);
      const auto [z, steepness] = scored(formula, own.load(x, i));
      V side(0);
      if constexpr (Formula::has_side) {
        side = sides.at(j);
        if (i == own.number) [[unlikely]]
          side = select(iota<T>() == V(static_cast<T>(row.label % width)), V(0), side);
      }
      const V image = statistic::absorb(sum, z, shift, side);
      if (images)
        kept_image(formula, image, steepness).store(images + j);
      seen = statistic::look(seen, next.load(next_x, i));
    };
    index i = 0;
    for (index c = 0; c < chunks_; ++c) {
      const index end = std::min((c + 1) * chunk_packs, packs);
      if constexpr (Gradient) {
        for (const index both = std::min(end, emit_packs); i < both; ++i) {
          const V from = V::load(e.from + i * width);
          absorb_pack(i);
          put(gradient_of_pack(formula, i, from, e), i, e);
        }
      }
      for (; i < end; ++i)
        absorb_pack(i);
      if (c + 1 == chunks_ && rest > 0) {
        absorb_cursor a;
        a.x = x;
        a.image = images;
        a.side = sides;
        set_hole(hole_in(row, 0, cols_), a.hole, a.hole_lane);
        a.shift = shift;
        each_term([&](auto k) __attribute__((always_inline)) { a.sum[k] = sum[k]; });
        absorb_tail(a, packs * width, rest);
        each_term([&](auto k) __attribute__((always_inline)) { sum[k] = a.sum[k]; });
        seen = look_at(after, next_x, 0, cols_, packs * width, seen);
      }
      each_term([&](auto k) __attribute__((always_inline)) {
        row.sums[k].add(sum[k]);
        sum[k] = V(0);
      });
      after.look[c] = seen;
      seen = nothing;
    }
    after.looked = chunks_;
    if (Gradient && e.hole >= 0 && e.hole < emit_packs)
      put(of_target, e.hole, e);
  }

  // ---- from sums to values

  void finish(live_row* rows, index count, value_sum& total) {
    using W = pack<double>;
    static constexpr index lane[finish_rows] = {0, 1, 2, 3, 4, 5, 6, 7};
    const index padding = (width - cols_ % width) % width;
    index numbers[finish_rows];
    for (index i = 0; i < finish_rows; ++i)
      numbers[i] = rows[std::min(i, count - 1)].row;
    // Rows that are missing repeat the last.
    const auto of_rows = [=](auto f) __attribute__((always_inline)) {
      return pack_of([=](index i) __attribute__((always_inline)) {
        return static_cast<double>(f(rows[std::min(i, count - 1)]));
      });
    };
    const W raw_target = of_rows([](const live_row& row) { return row.raw_target; });
    row_summary<statistic> s;
    s.shift = of_rows([](const live_row& row) { return row.shift; });
    s.target = first_rows(formula_.score(to_lanes<V>(raw_target)));
    s.raw_target = raw_target;
    s.target_side = W(0);
    if constexpr (Formula::has_side)
      s.target_side = of_rows([this](const live_row& row) {
        T q = 0;
        if (job_.soft)
          job_.soft.read(row.row, row.label, 1, &q);
        return target_side(formula_, row.label, q, static_cast<bool>(job_.soft));
      });
    s.label_weight = W(0);
    if (job_.labels)
      s.label_weight =
          of_rows([this](const live_row& row) { return formula_.label_weight(row.label); });
    s.classes = W(static_cast<double>(cols_));
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] = of_rows([k](const live_row& row) { return row.sums[k].total(); });
    if constexpr (statistic::counts)
      s.term[0] = s.term[0] - W(static_cast<double>(padding));
    const auto summary = with_own(formula_, s, count, [&](index i) { return numbers[i]; });
    const row_outcome<W> result = formula_.finish(summary);
    alignas(64) double out[3 + coefficients][finish_rows];
    result.value.store(out[0]);
    result.image_scale.store(out[1]);
    result.target_gradient.store(out[2]);
    for (int k = 0; k < coefficients; ++k)
      result.coefficient[k].store(out[3 + k]);
    if (job_.report.any())
      store_report(formula_, job_, summary, numbers, lane, raw_target,
                   of_rows([](const live_row& row) { return row.rivals; }), count);
    for (index i = 0; i < count; ++i) {
      live_row& row = rows[i];
      store_value(job_, row.row, out[0][i], total);
      if (has_gradient_) {
        const double scale = Formula::linear ? out[1][i] * row.scale : out[1][i];
        if (row.shifted)
          fill_factors(row.shifts, row.shift, chunks_, scale, row.factors);
        else
          std::fill_n(row.factors, chunks_, static_cast<T>(scale));
        for (int k = 0; k < coefficients; ++k)
          row.coefficient[k] = static_cast<T>(out[3 + k][i]);
        row.target_gradient = static_cast<T>(out[2][i] * row.scale);
      }
    }
  }

  const Formula& formula_;
  const row_job<T>& job_;
  index cols_, chunks_;
  bool scores_in_place_, soft_in_place_, gradient_in_place_, images_in_row_, has_gradient_, short_;
  std::size_t scratch_bytes_ = 0;
  index ahead_ = prefetch_distance<T>; // what is asked for in time
  live_row *current_ = nullptr, *previous_ = nullptr;
  index pending_ = 0; // rows of previous_ whose gradient is not written
  T* stage_x_[2] = {nullptr, nullptr};
  T *stage_emit_ = nullptr, *stage_gradient_ = nullptr, *stage_sum_ = nullptr;
  T *stage_soft_ = nullptr, *stage_soft_emit_ = nullptr;
  alignas(64) T line_[lanes<T>] = {}; // of the gradient, of which the first elements are known
  T* line_to_ = nullptr;
  index line_count_ = 0;
};

/// The same where it is known when a call is compiled whether it has a gradient: what it does not
/// need is not compiled, and most of what it does need is compiled once for both.
template <class Formula, class T, bool Gradient> class row_pass : public row_kernel<Formula, T> {
public:
  using row_kernel<Formula, T>::row_kernel;
  void run(index first, index last, value_sum* total) {
    row_kernel<Formula, T>::template run<Gradient>(first, last, total);
  }
  void drain() { row_kernel<Formula, T>::template drain<Gradient>(); }
};

} // namespace perdita::inline PERDITA_ABI::core
