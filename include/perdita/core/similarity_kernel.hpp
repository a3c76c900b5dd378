// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for scores that are products of embeddings with embeddings, S = s X̂ Ŷᵀ, of which
/// only tiles are ever held. A tile serves its rows, and, transposed, its columns: those of the
/// other direction, or, where embeddings are compared with themselves, other rows of the same kind,
/// so that no product is made twice. All tiles are summed up, rows are finished, and all tiles are
/// made again and become tiles of the gradient.
///
/// Tiles are taken in steps. Those of one step have no row and no column in common, so each is one
/// task's, and every sum is added up in an order that depends on the shape alone. Sums of rows only
/// need no steps: a task goes through all columns, so that what is known of a row does not depend
/// on the rows around it either.

#include <algorithm>
#include <cmath>
#include <limits>

#include "compared_rows.hpp"
#include "executor.hpp"
#include "linear_block.hpp"
#include "product.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// What a call of the similarity head adds to the job of its loss, whose scores have a shape, but
/// no memory.
template <class T> struct similarity_job {
  matrix_data<T> x, y; ///< anchors, and what they are compared with
  matrix_data<T, true> d_x, d_y;
  bool gradient = false; ///< is wanted: both of d_x and d_y are given
  double scale = 1;
  bool normalise = true;
  bool both = false;  ///< columns have losses too; the result is the mean of both
  bool alone = false; ///< y is x, all of it; no d_y
  index first = 0;    ///< where y is a slice: its place among all candidates, which are the columns
  index own = -1;     ///< where x are candidates too: the place of the first; none meets itself
  double* d_scale = nullptr;
  bool accumulate_scale = false; ///< adds to d_scale
};

template <class Formula, class T> class similarity_kernel {
  using V = pack<T>;
  using statistic = typename Formula::statistic;
  using tile = linear_tile<Formula, T>;
  using shape = linear_shape<T>;
  using block = linear_block<Formula, T>;
  static constexpr index width = shape::width;

public:
  similarity_kernel(const Formula& formula, const row_job<T>& job, const similarity_job<T>& pairs,
                    const executor& run_on, std::byte* scratch)
      : formula_(formula), job_(job), column_job_(job), pairs_(pairs), run_on_(run_on),
        memory_(scratch), depth_(pairs.x.cols), rows_(pairs.x.rows), cols_(pairs.y.rows),
        side_(side_of(std::max(rows_, job.scores.cols))),
        workers_(std::min(static_cast<index>(run_on.concurrency()), steps())),
        x_{pairs.x, pairs.d_x, pairs.normalise, job.accumulate}, y_{pairs.y, pairs.d_y,
                                                                    pairs.normalise,
                                                                    job.accumulate},
        of_rows_(formula, job_, shape_of(pairs.y, pairs.first, rows_), 1, memory_),
        of_columns_(formula, column_job_, shape_of(pairs.x, 0, pairs.both ? cols_ : 0), 1,
                    memory_) {
    lay_out(scratch != nullptr);
  }
  std::size_t scratch_bytes() const { return memory_.used(); }

  double run() {
    find_norms();
    collect();
    sum_up();
    const double value = finish();
    if (pairs_.gradient)
      go_back();
    return value;
  }
  /// What is known of every row that counts after these candidates.
  void summarise(row_record* records) {
    find_norms();
    collect();
    sum_up();
    of_rows_.record(records);
  }
  /// As run(), from records of all candidates; but values and by-products or gradients, not both.
  double resume(const row_record* records) {
    collect();
    of_rows_.recall(records);
    exact_sum total;
    of_rows_.finish(pairs_.gradient ? nullptr : &total);
    if (pairs_.gradient) {
      find_norms();
      go_back();
    }
    return total.value();
  }

private:
  /// A thread's own memory.
  struct worker {
    T *scores, *across; // a tile, and the same transposed
    T* panels;          // an operand in panels
    T* rows;            // rows that do not lie as they should
  };
  using sums = panel_sums<statistic, T>;

  static linear_job<T> shape_of(const matrix_data<T>& classes, index first, index rows) {
    linear_job<T> l;
    l.weights = classes;
    l.first_class = first;
    l.block_rows = (rows + width - 1) / width * width;
    return l;
  }
  /// Rows and columns of a tile: fewer where there are few, so that there is work for several.
  static index side_of(index n) {
    const index share = (n + 7) / 8;
    return std::clamp((share + width - 1) / width * width, width, shape::columns);
  }
  static index parts(index n, index size) { return (n + size - 1) / size; }
  index steps() const { return std::max<index>(1, parts(std::max(rows_, cols_), side_)); }
  /// Elements from panel to panel of a tile: not a power of two, for the caches' sake.
  index panel() const { return (side_ + 1) * width; }
  bool turned() const { return pairs_.both || pairs_.alone; }

  void lay_out(bool real) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    x_.lay_out(memory_, pairs_.gradient);
    if (pairs_.alone)
      y_ = x_;
    else
      y_.lay_out(memory_, pairs_.gradient);
    sums_x_ = memory_.take<sums>(size(parts(rows_, width)));
    sums_y_ = memory_.take<sums>(size(pairs_.both ? parts(cols_, width) : 0));
    if (pairs_.both && job_.report.values.data)
      column_values_ = memory_.take<T>(size(cols_));
    if (pairs_.gradient)
      along_ = memory_.take<double>(size(rows_));
    all_workers_ = memory_.take<worker>(size(workers_));
    for (index i = 0; i < workers_; ++i) {
      worker w{};
      w.scores = memory_.take<T>(size(side_ / width * panel()));
      w.across = memory_.take<T>(size(turned() ? side_ / width * panel() : 0));
      w.panels = memory_.take<T>(size(std::max(shape::columns, side_) * shape::depth));
      w.rows = memory_.take<T>(size(std::max(depth_, shape::strip * shape::depth)));
      if (real)
        new (&all_workers_[i]) worker(w);
    }
  }

  /// f(worker, i) for each i < n, each by one of the workers.
  template <class F> void for_each(index n, F f) const {
    share_out(run_on_, workers_, n, [&](std::size_t k, index i) { f(all_workers_[k], i); });
  }
  /// f(worker, i, j) for each tile, or for i ≤ j where tile (j, i) is the same one transposed.
  template <class F> void for_tiles(F f) const {
    const index n = steps(), across = parts(cols_, side_), down = parts(of_rows_.count(), side_);
    for (index step = 0; step < n; ++step)
      for_each(pairs_.alone ? n : down, [&](const worker& w, index i) {
        if (pairs_.alone) { // each i is in one of the tiles of a step: with (step − i) mod n
          const index j = (step - i + n) % n;
          if (i <= j)
            f(w, i, j);
        } else {
          const index j = (i + step) % n;
          if (j < across)
            f(w, i, j);
        }
      });
  }
  /// f(worker, row) for each of n rows, some at a time.
  template <class F> void for_rows(index n, F f) const {
    constexpr index some = 64;
    for_each(parts(n, some), [&](const worker& w, index task) {
      for (index r = task * some; r < std::min(n, (task + 1) * some); ++r)
        f(w, r);
    });
  }

  // ---- before: norms, and who has a loss

  void find_norms() const {
    const auto find = [this](const compared_rows<T>& of) {
      for_rows(of.rows(), [&](const worker& w, index r) { of.find_factor(r, w.rows); });
    };
    find(x_);
    if (!pairs_.alone)
      find(y_);
  }
  void collect() {
    of_rows_.collect(0, [this](index r) { store_ignored_report(job_, r); });
    for (index p = 0; p < of_rows_.panels(); ++p)
      sums_x_[p].clear();
    if (!pairs_.both)
      return;
    column_job_.report = {};
    if (column_values_)
      column_job_.report.values = vector_view<T>(column_values_, cols_);
    of_columns_.collect(0, [](index) {});
    for (index p = 0; p < of_columns_.panels(); ++p)
      sums_y_[p].clear();
  }

  // ---- scores

  struct extent_of_tile {
    index row, rows, col, cols; ///< among the anchors that count; among y
  };
  extent_of_tile at(index i, index j) const {
    const index row = i * side_, col = j * side_;
    return {row, std::min(side_, of_rows_.count() - row), col, std::min(side_, cols_ - col)};
  }
  index panels_in(index rows) const { return parts(rows, width); }
  index lanes_in(index p, index rows) const { return std::min(width, rows - p * width); }

  void make(const worker& w, const extent_of_tile& t) const {
    const index panels = panels_in(t.rows);
    const index* rows = of_rows_.rows() + t.row;
    for (index p = 0; p < panels; ++p) // columns that a transposed panel has beyond the last
      std::fill(w.scores + p * panel() + t.cols * width,
                w.scores + p * panel() + panels_in(t.cols) * width * width, T(0));
    for (index k = 0; k < depth_; k += shape::depth) {
      const index terms = std::min(shape::depth, depth_ - k);
      for (index p = 0; p < panels; ++p)
        x_.panel(rows + p * width, lanes_in(p, t.rows), k, terms, w.rows,
                 w.panels + p * terms * width);
      for (index c = 0; c < t.cols; c += shape::strip) {
        const index n = std::min(shape::strip, t.cols - c);
        multiply<T>(rows_of(pairs_.y, t.col + c, n, k, terms, w.rows), {w.panels, terms * width},
                    {w.scores + c * width, width, panel()}, n, panels * width, terms, k > 0);
      }
    }
    for (index p = 0; p < panels; ++p) {
      alignas(64) T factor[lanes<T>] = {};
      for (index i = 0; i < lanes_in(p, t.rows); ++i) {
        const index r = rows[p * width + i];
        factor[i] = static_cast<T>(static_cast<double>(x_.factor[r] / x_.reach(r)) * pairs_.scale);
      }
      const V of_lanes = V::load(factor);
      T* const scores = w.scores + p * panel();
      for (index j = 0; j < t.cols; ++j)
        // In this order, for a short y has a huge factor.
        (depth_ == 0 ? V(0) : V::load(scores + j * width) * V(y_.factor[t.col + j]) * of_lanes)
            .store(scores + j * width);
      for (index i = 0; pairs_.own >= 0 && i < lanes_in(p, t.rows); ++i) {
        const index self = pairs_.own + rows[p * width + i] - pairs_.first - t.col;
        if (self >= 0 && self < t.cols)
          scores[self * width + i] = -std::numeric_limits<T>::infinity();
      }
    }
  }
  /// to = from, rows for columns, or that added to what is there. Panels have `rows` rows.
  template <bool Add> void turn(const T* from, T* to, index rows, index cols) const {
    alignas(64) T square[lanes<T> * lanes<T>];
    for (index p = 0; p < panels_in(rows); ++p)
      for (index q = 0; q < panels_in(cols); ++q) {
        const T* source = from + p * panel() + q * width * width;
        T* target = to + q * panel() + p * width * width;
        copy_transposed(source, width, width, width, Add ? square : target, width);
        for (index k = 0; Add && k < width; ++k)
          (V::load(target + k * width) + V::load(square + k * width)).store(target + k * width);
      }
  }

  void sum_up() {
    if (turned())
      for_tiles([this](const worker& w, index i, index j) { absorb(w, i, j); });
    else
      for_each(parts(of_rows_.count(), side_), [this](const worker& w, index i) {
        for (index j = 0; j < parts(cols_, side_); ++j)
          absorb(w, i, j);
      });
    put(of_rows_, sums_x_);
    if (pairs_.both)
      put(of_columns_, sums_y_);
  }
  void absorb(const worker& w, index i, index j) {
    const extent_of_tile t = at(i, j);
    make(w, t);
    absorb_panels(of_rows_, sums_x_, w.scores, t.row, t.rows, t.col, t.cols);
    if (!turned() || (pairs_.alone && i == j))
      return;
    turn<false>(w.scores, w.across, t.rows, t.cols);
    absorb_panels(pairs_.alone ? of_rows_ : of_columns_, pairs_.alone ? sums_x_ : sums_y_, w.across,
                  t.col, t.cols, t.row, t.rows);
  }
  void absorb_panels(block& of, sums* to, const T* scores, index row, index rows, index first,
                     index n) {
    for (index p = 0; p < panels_in(rows); ++p) {
      const index at = row / width + p;
      tile::absorb(formula_, scores + p * panel(), nullptr, n, of.side(at, first, n, nullptr),
                   of.labels(at, first, n), to[at], of.raw_targets(at));
    }
  }
  static void put(block& of, const sums* from) {
    for (index p = 0; p < of.panels(); ++p)
      of.put(from[p], 0, p);
    of.merge_slices();
  }
  double finish() {
    exact_sum total;
    of_rows_.finish(&total);
    if (!pairs_.both)
      return total.value();
    of_columns_.finish(&total);
    for (index r = 0; column_values_ && r < rows_; ++r)
      job_.report.values[r] = (job_.report.values[r] + column_values_[r]) / 2;
    return total.value() / 2;
  }

  // ---- gradients

  void go_back() {
    const auto clear = [this](const compared_rows<T>& of) {
      for_rows(of.rows(), [&](const worker&, index r) { of.clear(r); });
    };
    clear(x_);
    if (!pairs_.alone)
      clear(y_);
    for_tiles([this](const worker& w, index i, index j) { emit(w, i, j); });
    const double share = pairs_.both ? pairs_.scale / 2 : pairs_.scale;
    for_rows(rows_,
             [&, this](const worker& w, index r) { along_[r] = x_.settle(r, share, 0, w.rows); });
    if (!pairs_.alone)
      for_rows(cols_, [&, this](const worker& w, index r) { y_.settle(r, share, 0, w.rows); });
    if (!pairs_.d_scale)
      return;
    exact_sum sum; // Σ G∘S, of which each pair of embeddings alone has both halves
    for (index r = 0; r < rows_; ++r)
      sum.add(along_[r]);
    const double slope = sum.value() / (pairs_.alone ? 2 * pairs_.scale : pairs_.scale);
    *pairs_.d_scale = pairs_.accumulate_scale ? *pairs_.d_scale + slope : slope;
  }
  void emit(const worker& w, index i, index j) const {
    const extent_of_tile t = at(i, j);
    make(w, t);
    const bool turns = turned() && !(pairs_.alone && i == j);
    if (turns)
      turn<false>(w.scores, w.across, t.rows, t.cols);
    emit_panels(of_rows_, w.scores, t.row, t.rows, t.col, t.cols);
    if (turns) {
      emit_panels(pairs_.alone ? of_rows_ : of_columns_, w.across, t.col, t.cols, t.row, t.rows);
      turn<true>(w.across, w.scores, t.cols, t.rows);
    }
    add_to_x(w, t);
    add_to_y(w, t);
  }
  void emit_panels(const block& of, T* scores, index row, index rows, index first, index n) const {
    for (index p = 0; p < panels_in(rows); ++p) {
      const index at = row / width + p;
      tile::emit(formula_, scores + p * panel(), nullptr, n, of.side(at, first, n, nullptr),
                 of.labels(at, first, n), of.slopes(at));
    }
  }
  void add_to_x(const worker& w, const extent_of_tile& t) const {
    for (index d = 0; d < depth_; d += shape::columns) {
      const index cols = std::min(shape::columns, depth_ - d);
      for (index k = 0; k < t.cols; ++k)
        put_in_panels(pairs_.y, t.col + k, d, cols, k, t.cols, w.rows, w.panels,
                      y_.factor[t.col + k]);
      for (index p = 0; p < panels_in(t.rows); ++p) {
        T* places[lanes<T>];
        for (index i = 0; i < lanes_in(p, t.rows); ++i)
          places[i] = x_.places[of_rows_.rows()[t.row + p * width + i]];
        multiply<T>({w.scores + p * panel(), 1, width, width * width}, {w.panels, t.cols * width},
                    {nullptr, 0, width, places, d}, lanes_in(p, t.rows), cols, t.cols, true);
      }
    }
  }
  void add_to_y(const worker& w, const extent_of_tile& t) const {
    const index* rows = of_rows_.rows() + t.row;
    for (index d = 0; d < depth_; d += shape::columns) {
      const index cols = std::min(shape::columns, depth_ - d);
      for (index k = 0; k < t.rows; ++k)
        put_in_panels(pairs_.x, rows[k], d, cols, k, t.rows, w.rows, w.panels, x_.factor[rows[k]]);
      for (index c = 0; c < t.cols; c += shape::strip)
        multiply<T>({w.scores + c * width, width, 1, panel()}, {w.panels, t.rows * width},
                    {nullptr, 0, width, y_.places + t.col + c, d},
                    std::min(shape::strip, t.cols - c), cols, t.rows, true);
    }
  }

  const Formula& formula_;
  const row_job<T>& job_;
  row_job<T> column_job_;
  const similarity_job<T>& pairs_;
  const executor& run_on_;
  carver memory_;
  index depth_, rows_, cols_, side_, workers_;
  compared_rows<T> x_, y_; // the same ones where embeddings are compared with themselves
  block of_rows_, of_columns_;
  sums *sums_x_ = nullptr, *sums_y_ = nullptr;
  T* column_values_ = nullptr;
  double* along_ = nullptr; // ⟨gradient, embedding⟩
  worker* all_workers_ = nullptr;
};

/// Has use(kernel) do its part, with the scratch that the kernel asks for.
template <class Formula, class T, class Use>
auto with_similarity_kernel(const Formula& formula, const row_job<T>& job,
                            const similarity_job<T>& pairs, const executor& run_on,
                            workspace* memory, Use use) {
  using kernel = similarity_kernel<Formula, T>;
  workspace own;
  const auto bytes = kernel(formula, job, pairs, run_on, nullptr).scratch_bytes();
  kernel k(formula, job, pairs, run_on, (memory ? *memory : own).request(bytes));
  return use(k);
}

/// Σ of the weighted values of all rows, and their gradients where they are wanted.
template <class Formula, class T>
double run_similarity(const Formula& formula, const row_job<T>& job, const similarity_job<T>& pairs,
                      const executor& run_on, workspace* memory) {
  return with_similarity_kernel(formula, job, pairs, run_on, memory,
                                [](auto& kernel) { return kernel.run(); });
}

/// Either of them, with the values the by-products, from records of all candidates.
template <class Formula, class T>
double resume_similarity(const Formula& formula, const row_job<T>& job,
                         const similarity_job<T>& pairs, const executor& run_on, workspace* memory,
                         const row_record* records) {
  return with_similarity_kernel(formula, job, pairs, run_on, memory,
                                [=](auto& kernel) { return kernel.resume(records); });
}

/// What is known of every row that counts after the candidates at hand.
template <class Formula, class T>
void summarise_similarity(const Formula& formula, const row_job<T>& job,
                          const similarity_job<T>& pairs, const executor& run_on, workspace* memory,
                          row_record* records) {
  with_similarity_kernel(formula, job, pairs, run_on, memory,
                         [=](auto& kernel) { kernel.summarise(records); });
}

} // namespace perdita::inline PERDITA_ABI::core
