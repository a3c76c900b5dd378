// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for scores that are products, hidden states times class weights, and are never all
/// held. A block of rows goes through all classes in pieces; a piece is made by core/product.hpp,
/// summed up while it is in cache, and later becomes the same piece of the gradient, from which the
/// two products follow that the gradients of the inputs consist of. Either the pieces of a block
/// are kept in between ("roomy"), or only a few are, and they are made again ("tight").
///
/// Work is shared out by classes (and for the gradient of the hidden states by its columns), so
/// that every element of every result is added up by one task, in an order that depends on the
/// shape alone.

#include <atomic>
#include <memory>
#include <type_traits>

#include "executor.hpp"
#include "linear_filter.hpp"
#include "linear_tile.hpp"
#include "product.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// What a call of the linear head adds to the job of its loss, whose scores have a shape, but no
/// memory.
template <class T> struct linear_job {
  matrix_data<T> hidden, weights;
  vector_view<const T> bias;
  matrix_data<T, true> d_hidden, d_weights; ///< no data: value only
  vector_view<T> d_bias;
  bool accumulate_weights = false;
  linear_filter<T> filter;
  vector_view<double> dropped; ///< by the filter, of every row
  index first_class = 0;       ///< where the weights are a slice: its place among all classes
  index block_rows = 0;        ///< a multiple of W
  index slots = 0;             ///< pieces kept at once
};

/// What is known of a row from one slice of the classes, or from all: numbers that can be stored,
/// sent, and merged.
struct row_record {
  static constexpr int terms = 4;
  double shift, term[terms];
  double rivals;     // the largest raw score but the label's
  double raw_target; // of the label, where the slice has it
  double has_target; // 1 or 0
};

/// Sizes that depend on the shape alone.
template <class T> struct linear_shape {
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr index panels = 16; ///< of W rows in a block, at the most
  static constexpr index columns =
      panels * width;                 ///< of an input that go through a product at once
  static constexpr index depth = 256; ///< terms of a product that are added up at once
  static constexpr index strip = 48;  ///< rows of the broadcast operand that pass over all panels
  index classes;

  /// Classes in a piece: fewer where there are few, so that there is work for several threads.
  index piece() const {
    return classes >= 4096 ? 512 : std::clamp<index>((classes + 7) / 8, 64, 512);
  }
  index pieces() const { return (classes + piece() - 1) / piece(); }
  /// Elements from panel to panel of a piece: not a power of two, for the caches' sake.
  index panel() const { return (std::min(piece(), classes) + 1) * width; }
  /// Elements of a piece of `rows` rows.
  index slot(index rows) const { return (rows + width - 1) / width * panel(); }
};

template <class Formula, class T, bool Gradient> class linear_kernel {
  using V = pack<T>;
  using W = pack<double>;
  using statistic = typename Formula::statistic;
  using tile = linear_tile<Formula, T>;
  using shape = linear_shape<T>;
  static constexpr index width = shape::width;
  static constexpr index most_panels = shape::panels;
  static constexpr index most_rows = most_panels * width;
  static constexpr index groups = most_rows / finish_rows; // of rows that are finished together
  /// Runs of pieces that are summed up each by one task, and then merged.
  static constexpr index most_slices = statistic::terms <= 2 ? 32 : 16;

public:
  linear_kernel(const Formula& formula, const row_job<T>& job, const linear_job<T>& linear,
                const executor& run_on, std::byte* scratch)
      : formula_(formula), job_(job), linear_(linear), run_on_(run_on), shape_{linear.weights.rows},
        depth_(linear.hidden.cols), slots_(linear.slots), roomy_(slots_ == shape_.pieces()),
        slices_(std::min(most_slices, shape_.pieces())),
        workers_(std::min(static_cast<index>(run_on.concurrency()), roomy_ ? most_slices : slots_)),
        direct_hidden_(linear.d_hidden.direct() && linear.d_hidden.col_stride == 1),
        direct_weights_(linear.d_weights.direct() && linear.d_weights.col_stride == 1 &&
                        linear.d_weights.plane_rows == linear.d_weights.rows) {
    carver memory(scratch);
    lay_out(memory, scratch != nullptr);
    scratch_bytes_ = memory.used();
  }
  std::size_t scratch_bytes() const { return scratch_bytes_; }

  /// Σ of the weighted values of all rows, and their gradients.
  double run() {
    exact_sum total;
    for_blocks([&](bool first) {
      sum_up();
      finish(&total);
      if constexpr (Gradient)
        go_back(first, roomy_);
    });
    return total.value();
  }

  /// What is known of every row that counts after this slice of the classes.
  void summarise(row_record* records) {
    for_blocks([&](bool) {
      sum_up();
      for (index i = 0; i < count_; ++i)
        records[rows_[i]] = record(i);
    });
  }
  /// As run(), from records of all classes. By-products and values only where there is no gradient.
  double resume(const row_record* records) {
    exact_sum total;
    for_blocks([&](bool first) {
      for (index i = 0; i < panels() * width; ++i)
        recall(i, records[rows_[std::min(i, count_ - 1)]]);
      finish(Gradient ? nullptr : &total);
      if constexpr (Gradient)
        go_back(first, false);
    });
    return total.value();
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

private:
  static_assert(statistic::terms <= row_record::terms);

  /// A thread's own memory.
  struct worker {
    T* panels; // an operand in panels
    T* rows;   // an operand as rows of T, where it is not
    T* soft;   // a panel of soft targets
    T* piece;  // a piece of scores, where only their sums are wanted
    T* line;
    panel_sums<statistic, T>* sums;
    wide_lanes<T>* masses; // of a panel of rows
  };

  void lay_out(carver& memory, bool real) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    const index rows = linear_.block_rows, panels = rows / width;
    rows_ = memory.take<index>(size(rows));
    labels_ = memory.take<std::int64_t>(size(rows));
    for (double** p : {&weight_, &scale_, &label_weight_, &target_side_})
      *p = memory.take<double>(size(rows));
    raw_target_ = memory.take<T>(size(rows));
    rivals_ = memory.take<T>(size(slices_ * rows));
    partial_ = memory.take<summary<statistic, W>>(size(slices_ * rows / finish_rows));
    merged_ = memory.take<summary<statistic, W>>(size(rows / finish_rows));
    slopes_ = memory.take<panel_slopes<T>>(size(panels));
    if constexpr (Gradient) {
      slot_memory_ = memory.take<T>(size(slots_ * shape_.slot(rows)));
      places_ = memory.take<T*>(size(rows));
      live_ = memory.take<index>(size(slots_));
      if (filter()) {
        filtered_ = memory.take<typename linear_filter<T>::panel>(size(panels));
        masses_ = memory.take<V>(size(measures() ? slices_ * panels * linear_filter<T>::steps : 0));
      }
      if (!direct_hidden_)
        stage_hidden_ = memory.take<T>(size(rows * depth_));
      if (!direct_weights_)
        stage_weights_ = memory.take<T>(size(shape_.classes * depth_));
    }
    all_workers_ = memory.take<worker>(size(workers_));
    for (index i = 0; i < workers_; ++i) {
      worker w{};
      w.panels = memory.take<T>(size(std::max(rows, most_rows) * shape::depth));
      w.rows = memory.take<T>(size(shape::strip * shape::depth));
      w.soft = memory.take<T>(job_.sparse ? size(shape_.panel()) : 0);
      w.piece = Gradient ? nullptr : memory.take<T>(size(shape_.slot(rows)));
      w.line = memory.take<T>(size(std::max(depth_, shape::depth)));
      w.sums = memory.take<panel_sums<statistic, T>>(size(panels));
      if (Gradient && measures())
        w.masses = memory.take<wide_lanes<T>>(size(panels * linear_filter<T>::steps));
      if (real)
        new (&all_workers_[i]) worker(w);
    }
  }

  const linear_filter<T>& filter() const { return linear_.filter; }
  /// Whether thresholds depend on the rows.
  bool measures() const { return filter().share > 0; }

  // ---- tasks

  /// f(worker, i) for each i < n, each by one of the workers.
  template <class F> void for_each(index n, F f) const {
    std::atomic<index> next{0};
    const auto work = [&](std::size_t k) {
      for (index i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;)
        f(all_workers_[k], i);
    };
    run_on_(static_cast<std::size_t>(std::min(workers_, n)), work);
  }

  index first_of(index piece) const { return piece * shape_.piece(); }
  index size_of(index piece) const {
    return std::min(shape_.piece(), shape_.classes - first_of(piece));
  }
  index panels() const { return (count_ + width - 1) / width; }
  T* slot(index s) const { return slot_memory_ + s * shape_.slot(linear_.block_rows); }
  const T* bias(index first) const { return linear_.bias.data ? bias_at(first) : nullptr; }
  const T* bias_at(index first) const { return linear_.bias.data + first; }

  // ---- the block of rows

  /// f(whether it is the first) for every block of rows, which is then at hand.
  template <class F> void for_blocks(F f) {
    bool first = true;
    for (index r = 0; r < job_.scores.rows;) {
      r = collect(r);
      if (count_ == 0)
        continue;
      begin();
      f(first);
      first = false;
    }
    if constexpr (Gradient)
      put_weights(first);
  }

  /// The next rows that count, as many as fit; the others get their zeros. Returns the row after.
  index collect(index r) {
    count_ = 0;
    for (const index rows = job_.scores.rows; r < rows && count_ < linear_.block_rows; ++r) {
      std::int64_t label = 0;
      if (job_.labels)
        job_.read_labels(r, 1, &label);
      if (!job_.counts(r, label)) {
        store_ignored_report(job_, r);
        if (Gradient && !job_.accumulate)
          put_zeros(r);
        continue;
      }
      rows_[count_] = r;
      labels_[count_++] = label;
    }
    return r;
  }
  void put_zeros(index r) const {
    T* line = all_workers_[0].line;
    std::fill_n(line, depth_, T(0));
    linear_.d_hidden.write(r, 0, depth_, line);
  }

  void begin() {
    const index whole = panels() * width;
    std::fill(labels_ + count_, labels_ + whole, -1);
    std::fill_n(raw_target_, whole, T(0));
    for (index i = 0; i < whole; ++i) {
      const bool real = i < count_;
      weight_[i] = real ? job_.row_weight(rows_[i]) : 0;
      scale_[i] = real ? job_.row_scale(rows_[i]) : 0;
      if (real && !job_.labels)
        labels_[i] = job_.sparse.favourite(rows_[i]);
      label_weight_[i] =
          real && job_.labels ? formula_.label_weight(static_cast<index>(labels_[i])) : 0;
      target_side_[i] = 0;
      if (real && Formula::has_side)
        target_side_[i] = target_side(
            formula_, static_cast<index>(labels_[i]),
            job_.sparse ? job_.sparse.probability(rows_[i], labels_[i]) : T(0), bool(job_.sparse));
    }
    if constexpr (Gradient)
      for (index i = 0; i < count_; ++i)
        places_[i] =
            direct_hidden_ ? linear_.d_hidden.pointer(rows_[i], 0) : stage_hidden_ + i * depth_;
  }

  // ---- operands

  /// The rows of the block that are in panel p, columns [first, first + n), as columns of W.
  void panel_of_hidden(const worker& w, index p, index first, index n, T* to) const {
    const index rows = std::min(width, count_ - p * width);
    const index* row = rows_ + p * width;
    const auto& m = linear_.hidden;
    if (rows < width)
      std::fill_n(to, n * width, T(0));
    const bool even = row[rows - 1] - row[0] == rows - 1 && m.left_in_plane(row[0]) >= rows;
    if (even && m.direct() && m.col_stride == 1)
      return copy_transposed(m.pointer(row[0], first), m.row_stride, rows, n, to, width);
    for (index i = 0; i < rows; ++i)
      m.read(row[i], first, n, w.rows + i * n);
    copy_transposed(w.rows, n, rows, n, to, width);
  }
  /// `rows` rows of a matrix as broadcast operand: where they lie, or copied.
  broadcast_operand<T> rows_of(const worker& w, const matrix_data<T>& m, index row, index rows,
                               index first, index n) const {
    if (m.direct() && m.col_stride == 1 && m.left_in_plane(row) >= rows)
      return {m.pointer(row, first), m.row_stride, 1, width};
    for (index i = 0; i < rows; ++i)
      m.read(row + i, first, n, w.rows + i * n);
    return {w.rows, n, 1, width};
  }
  /// n columns of row k as they go into panels of `terms` rows.
  void put_in_panels(const worker& w, const matrix_data<T>& m, index row, index first, index n,
                     index k, index terms) const {
    constexpr index ahead = 8; // rows: short pieces, far apart, that no core's prefetcher follows
    const T* from = w.line;
    if (m.direct() && m.col_stride == 1) {
      from = m.pointer(row, first);
      if (m.left_in_plane(row) > ahead)
        for (index j = 0; j < n; j += width)
          prefetch(from + ahead * m.row_stride + j);
    } else {
      m.read(row, first, n, w.line);
    }
    for (index j = 0; j < n; j += width) {
      const V x = j + width <= n ? V::load(from + j) : load_first(from + j, n - j, V(0));
      x.store(w.panels + j * terms + k * width);
    }
  }

  // ---- scores

  /// The scores of a piece, without the bias.
  void make_piece(const worker& w, index piece, T* scores) const {
    const index first = first_of(piece), n = size_of(piece);
    for (index k = 0; k < depth_; k += shape::depth) {
      const index terms = std::min(shape::depth, depth_ - k);
      for (index p = 0; p < panels(); ++p)
        panel_of_hidden(w, p, k, terms, w.panels + p * terms * width);
      for (index c = 0; c < n; c += shape::strip) {
        const index rows = std::min(shape::strip, n - c);
        multiply<T>(rows_of(w, linear_.weights, first + c, rows, k, terms),
                    {w.panels, terms * width}, {scores + c * width, width, shape_.panel()}, rows,
                    panels() * width, terms, k > 0);
      }
    }
  }

  piece_side<T> side_of(const worker& w, index p, index first, index n) const {
    piece_side<T> result;
    if constexpr (Formula::has_side) {
      result.side = formula_.side(linear_.first_class + first);
      if (job_.sparse) {
        std::fill_n(w.soft, n * width, T(0));
        for (index i = 0; i < std::min(width, count_ - p * width); ++i)
          job_.sparse.scatter(rows_[p * width + i], linear_.first_class + first, n, w.soft + i,
                              width);
        result.soft = w.soft;
      }
    }
    return result;
  }

  V labels_in(index p, index first, index n) const {
    return tile::place(labels_ + p * width, linear_.first_class + first, n);
  }

  void sum_up() {
    for_each(slices_, [this](const worker& w, index s) {
      for (index p = 0; p < panels(); ++p)
        w.sums[p].clear();
      const index pieces = shape_.pieces(), end = (s + 1) * pieces / slices_;
      for (index piece = s * pieces / slices_; piece < end; ++piece) {
        T* scores = Gradient ? slot(roomy_ ? piece : &w - all_workers_) : w.piece;
        make_piece(w, piece, scores);
        const index first = first_of(piece), n = size_of(piece);
        for (index p = 0; p < panels(); ++p)
          tile::absorb(formula_, scores + p * shape_.panel(), bias(first), n,
                       side_of(w, p, first, n), labels_in(p, first, n), w.sums[p],
                       raw_target_ + p * width);
      }
      for (index p = 0; p < panels(); ++p)
        put_partial(w.sums[p], s, p);
    });
    for (index group = 0; group < panels() * width / finish_rows; ++group) {
      const auto* part = partial_ + group * slices_;
      merged_[group] = part[0];
      for (index s = 1; s < slices_; ++s)
        merged_[group] = merge(merged_[group], part[s]);
    }
    for (index s = 1; s < slices_; ++s)
      for (index i = 0; i < panels() * width; i += width)
        max(V::load(rivals_ + s * linear_.block_rows + i), V::load(rivals_ + i)).store(rivals_ + i);
  }
  void put_partial(const panel_sums<statistic, T>& sums, index slice, index p) const {
    constexpr index parts = wide_lanes<T>::parts;
    W shift[parts];
    widen(sums.shift, shift);
    for (index h = 0; h < parts; ++h) {
      auto& to = partial_[(p * parts + h) * slices_ + slice];
      to.shift = shift[h];
      for (int k = 0; k < statistic::terms; ++k)
        to.term[k] = sums.term[k].folded(static_cast<int>(h));
    }
    sums.rivals.store(rivals_ + slice * linear_.block_rows + p * width);
  }

  // ---- from sums to values and slopes

  /// Values and by-products only where there is a total to add to.
  void finish(exact_sum* total) {
    value_sum values;
    for (index p = 0; p < panels(); ++p)
      finish_panel(p, total ? &values : nullptr);
    if (total)
      values.add_to(*total);
  }
  void finish_panel(index p, value_sum* values) {
    constexpr index parts = wide_lanes<T>::parts;
    const V rivals = V::load(rivals_ + p * width), raw = V::load(raw_target_ + p * width);
    W target[parts], raw_target[parts], rival[parts];
    widen(formula_.score(raw), target);
    widen(raw, raw_target);
    widen(rivals, rival);
    W shift[parts], factor[parts], scale[parts], slope[parts], c[coefficients][parts];
    for (index h = 0; h < parts; ++h) {
      const index at = p * width + h * finish_rows;
      row_summary<statistic> s;
      static_cast<summary<statistic, W>&>(s) = merged_[p * parts + h];
      s.target = target[h];
      s.target_side = W::load(target_side_ + at);
      s.label_weight = W::load(label_weight_ + at);
      s.classes = W(static_cast<double>(job_.scores.cols));
      const row_outcome<W> result = formula_.finish(s);
      if (values) {
        put_values(result.value, at, *values);
        if (job_.report.any())
          put_report(s, at, raw_target[h], rival[h]);
      }
      shift[h] = s.shift;
      scale[h] = W::load(scale_ + at);
      factor[h] = Formula::linear ? result.image_scale * scale[h] : result.image_scale;
      slope[h] = result.target_gradient * scale[h];
      for (int k = 0; k < coefficients; ++k)
        c[k][h] = result.coefficient[k];
    }
    panel_slopes<T>& to = slopes_[p];
    to.shift = narrow(shift);
    to.factor = narrow(factor);
    to.cut = V(std::numeric_limits<T>::min()) / abs(to.factor);
    to.scale = narrow(scale);
    to.target = narrow(slope);
    if constexpr (Gradient)
      if (filter())
        set_filter(p, factor, slope);
    for (int k = 0; k < coefficients; ++k)
      to.coefficient[k] = narrow(c[k]);
  }
  void put_values(const W& value, index at, value_sum& values) const {
    alignas(64) double v[finish_rows];
    value.store(v);
    for (index i = 0; i < std::min(finish_rows, count_ - at); ++i)
      store_value(job_, rows_[at + i], v[i], values);
  }
  void put_report(const row_summary<statistic>& s, index at, const W& raw_target,
                  const W& rivals) const {
    static constexpr index lane[finish_rows] = {0, 1, 2, 3, 4, 5, 6, 7};
    if (at < count_)
      store_report(formula_, job_, s, rows_ + at, lane, raw_target, rivals,
                   std::min(finish_rows, count_ - at));
  }

  // ---- records

  row_record record(index i) const {
    const auto& s = merged_[i / finish_rows];
    const auto lane = [&](const W& x) {
      alignas(64) double v[finish_rows];
      x.store(v);
      return v[i % finish_rows];
    };
    row_record r{};
    r.shift = lane(s.shift);
    for (int k = 0; k < statistic::terms; ++k)
      r.term[k] = lane(s.term[k]);
    r.rivals = static_cast<double>(rivals_[i]);
    r.raw_target = static_cast<double>(raw_target_[i]);
    const std::int64_t at = labels_[i] - linear_.first_class;
    r.has_target = at >= 0 && at < shape_.classes ? 1 : 0;
    return r;
  }
  void recall(index i, const row_record& r) {
    auto& s = merged_[i / finish_rows];
    const auto set_lane = [&](W& x, double value) {
      x = select(iota<double>() == W(static_cast<double>(i % finish_rows)), W(value), x);
    };
    set_lane(s.shift, r.shift);
    for (int k = 0; k < statistic::terms; ++k)
      set_lane(s.term[k], r.term[k]);
    rivals_[i] = static_cast<T>(r.rivals);
    raw_target_[i] = static_cast<T>(r.raw_target);
  }
  static summary<statistic, W> summary_of(const row_record& r) {
    summary<statistic, W> s;
    s.shift = W(r.shift);
    for (int k = 0; k < statistic::terms; ++k)
      s.term[k] = W(r.term[k]);
    return s;
  }

  // ---- gradients

  void go_back(bool first_block, bool scores_are_kept) {
    bool emitted = false;
    if (measures()) {
      measure(scores_are_kept);
      emitted = scores_are_kept;
    }
    for (index piece = 0; piece < shape_.pieces(); piece += slots_) {
      const index n = std::min(slots_, shape_.pieces() - piece);
      for_each(n, [&](const worker& w, index s) {
        if (!emitted) {
          if (!scores_are_kept)
            make_piece(w, piece + s, slot(s));
          emit(w, piece + s, slot(s));
        }
        if (linear_.d_bias.data)
          add_to_bias(piece + s, slot(s), !first_block || linear_.accumulate_weights);
        const bool accumulate = !first_block || (direct_weights_ && linear_.accumulate_weights);
        if (!add_live_to_weights(w, piece + s, s, accumulate))
          add_to_weights(w, piece + s, slot(s), accumulate);
      });
      const index strip = columns_per_task();
      for_each((depth_ + strip - 1) / strip, [&](const worker& w, index i) {
        add_to_hidden(w, piece, n, i * strip, std::min(strip, depth_ - i * strip));
      });
    }
    if (!direct_hidden_)
      put_hidden();
  }

  void emit(const worker& w, index piece, T* scores) const {
    const index first = first_of(piece), n = size_of(piece);
    for (index p = 0; p < panels(); ++p)
      tile::emit(formula_, scores + p * shape_.panel(), bias(first), n, side_of(w, p, first, n),
                 labels_in(p, first, n), slopes_[p]);
  }

  T* weights_gradient(index c) const {
    return stage_weights_ ? stage_weights_ + c * depth_ : linear_.d_weights.pointer(c, 0);
  }
  index weights_gradient_step() const {
    return stage_weights_ ? depth_ : linear_.d_weights.row_stride;
  }
  /// Rows of the gradient of the weights += gradient of the scores, transposed, times hidden.
  void add_to_weights(const worker& w, index piece, const T* gradient, bool accumulate) const {
    const index n = size_of(piece), step = weights_gradient_step();
    T* to = weights_gradient(first_of(piece));
    for (index d = 0; d < depth_; d += shape::columns) {
      const index cols = std::min(shape::columns, depth_ - d);
      for (index i = 0; i < count_; ++i)
        put_in_panels(w, linear_.hidden, rows_[i], d, cols, i, count_);
      for (index c = 0; c < n; c += shape::strip)
        multiply<T>({gradient + c * width, width, 1, shape_.panel()}, {w.panels, count_ * width},
                    {to + c * step + d, step, width}, std::min(shape::strip, n - c), cols, count_,
                    accumulate);
    }
  }
  void add_to_bias(index piece, const T* gradient, bool accumulate) const {
    const index last = panels() - 1;
    const auto real = iota<T>() < V(static_cast<T>(count_ - last * width));
    for (index j = 0; j < size_of(piece); ++j) {
      const auto at = [&](index p) { return V::load(gradient + p * shape_.panel() + j * width); };
      V sum = select(real, at(last), V(0));
      for (index p = 0; p < last; ++p)
        sum += at(p);
      T& to = linear_.d_bias[first_of(piece) + j];
      to = accumulate ? to + sum_lanes(sum) : sum_lanes(sum);
    }
  }

  /// Columns of the gradient of the hidden states that one task adds to.
  index columns_per_task() const {
    const index share = depth_ / (4 * workers_) / width * width;
    return std::clamp(share, 4 * width, shape::columns);
  }
  /// Columns of the gradient of the hidden states += gradient of the scores times weights.
  void add_to_hidden(const worker& w, index piece, index pieces, index d, index cols) const {
    for (index s = 0; s < pieces; ++s) {
      if (add_live_to_hidden(w, piece + s, s, d, cols))
        continue;
      for (index first = 0; first < size_of(piece + s); first += shape::depth) {
        const index terms = std::min(shape::depth, size_of(piece + s) - first);
        for (index k = 0; k < terms; ++k)
          put_in_panels(w, linear_.weights, first_of(piece + s) + first + k, d, cols, k, terms);
        const bool accumulate = piece + s + first > 0 || (direct_hidden_ && job_.accumulate);
        for (index p = 0; p < panels(); ++p)
          multiply<T>({slot(s) + p * shape_.panel() + first * width, 1, width, width * width},
                      {w.panels, terms * width}, {nullptr, 0, width, places_ + p * width, d},
                      std::min(width, count_ - p * width), cols, terms, accumulate);
      }
    }
  }

  // ---- filtered gradients

  void set_filter(index p, const W* factor, const W* target) {
    constexpr index parts = wide_lanes<T>::parts;
    const double common = std::fabs(job_.scale);
    W mass[parts], threshold[parts];
    for (index h = 0; h < parts; ++h) {
      mass[h] = abs(factor[h]) * merged_[p * parts + h].term[0] + abs(target[h]);
      threshold[h] = measures() ? mass[h] * W(filter().share / static_cast<double>(shape_.classes))
                                : W(filter().threshold * common);
    }
    filtered_[p].mass = narrow(mass);
    filtered_[p].least = filtered_[p].threshold = narrow(threshold);
  }

  /// Chooses the rows' thresholds, once it is known what each would drop.
  void measure(bool scores_are_kept) {
    constexpr index steps = linear_filter<T>::steps;
    for_each(slices_, [&](const worker& w, index s) {
      for (index i = 0; i < panels() * steps; ++i)
        w.masses[i].clear();
      const index pieces = shape_.pieces(), end = (s + 1) * pieces / slices_;
      for (index piece = s * pieces / slices_; piece < end; ++piece) {
        T* scores = slot(scores_are_kept ? piece : &w - all_workers_);
        if (!scores_are_kept)
          make_piece(w, piece, scores);
        emit(w, piece, scores);
        for (index p = 0; p < panels(); ++p)
          filter().measure(scores + p * shape_.panel(), size_of(piece), filtered_[p],
                           w.masses + p * steps);
      }
      for (index i = 0; i < panels() * steps; ++i) {
        W wide[wide_lanes<T>::parts];
        for (int h = 0; h < wide_lanes<T>::parts; ++h)
          wide[h] = w.masses[i].folded(h);
        masses_[s * panels() * steps + i] = narrow(wide);
      }
    });
    for (index p = 0; p < panels(); ++p) {
      double mass[steps][lanes<T>] = {}, dropped[lanes<T>];
      for (index s = 0; s < slices_; ++s)
        for (index k = 0; k < steps; ++k) {
          alignas(64) T part[lanes<T>];
          masses_[(s * panels() + p) * steps + k].store(part);
          for (index i = 0; i < width; ++i)
            mass[k][i] += static_cast<double>(part[i]);
        }
      filter().choose(filtered_[p], mass, dropped);
      for (index i = 0; i < std::min(width, count_ - p * width); ++i)
        if (linear_.dropped.data)
          linear_.dropped[rows_[p * width + i]] = dropped[i];
    }
  }

  /// Where few entries are live, lists them in place of the piece's gradient and adds them to the
  /// gradient of the weights.
  bool add_live_to_weights(const worker& w, index piece, index s, bool accumulate) const {
    live_[s] = -1;
    if constexpr (!statistic::has_image)
      return false;
    if (!filter())
      return false;
    const index n = size_of(piece);
    T* gradient = slot(s);
    index live = 0;
    for (index p = 0; p < panels(); ++p)
      live += linear_filter<T>::count(gradient + p * shape_.panel(), n,
                                      std::min(width, count_ - p * width), filtered_[p]);
    if (live * linear_filter<T>::most_live > n * count_)
      return false;
    auto* list = reinterpret_cast<live_entry<T>*>(w.panels);
    live_[s] = linear_filter<T>::list(gradient, n, shape_.panel(), filtered_, count_, list) - list;
    T* to = weights_gradient(first_of(piece));
    const index step = weights_gradient_step();
    if (!accumulate)
      for (index c = 0; c < n; ++c)
        std::fill_n(to + c * step, depth_, T(0));
    for (index e = 0; e < live_[s]; ++e)
      linear_filter<T>::add_multiple(
          list[e].value, row_of(w, linear_.hidden, rows_[list[e].at % count_], 0, depth_), depth_,
          to + list[e].at / count_ * step);
    std::copy_n(list, live_[s], reinterpret_cast<live_entry<T>*>(gradient));
    return true;
  }
  /// The same for columns of the gradient of the hidden states.
  bool add_live_to_hidden(const worker& w, index piece, index s, index d, index cols) const {
    if (live_[s] < 0)
      return false;
    if (piece == 0 && !(direct_hidden_ && job_.accumulate))
      for (index i = 0; i < count_; ++i)
        std::fill_n(places_[i] + d, cols, T(0));
    const auto* list = reinterpret_cast<const live_entry<T>*>(slot(s));
    for (index e = 0; e < live_[s]; ++e)
      linear_filter<T>::add_multiple(
          list[e].value, row_of(w, linear_.weights, first_of(piece) + list[e].at / count_, d, cols),
          cols, places_[list[e].at % count_] + d);
    return true;
  }
  /// n columns of a row of T: where they lie, or copied.
  const T* row_of(const worker& w, const matrix_data<T>& m, index row, index first, index n) const {
    if (m.direct() && m.col_stride == 1)
      return m.pointer(row, first);
    m.read(row, first, n, w.line);
    return w.line;
  }

  // ---- gradients that are not made where they belong

  void put_hidden() const {
    for (index i = 0; i < count_; ++i)
      put_row(linear_.d_hidden, rows_[i], stage_hidden_ + i * depth_, job_.accumulate);
  }
  void put_weights(bool nothing) const {
    const bool accumulate = linear_.accumulate_weights;
    if (nothing && !accumulate) {
      for (index c = 0; c < shape_.classes; ++c) {
        std::fill_n(all_workers_[0].line, depth_, T(0));
        linear_.d_weights.write(c, 0, depth_, all_workers_[0].line);
      }
      for (index c = 0; c < linear_.d_bias.size; ++c)
        linear_.d_bias[c] = T(0);
    } else if (!nothing && stage_weights_) {
      for (index c = 0; c < shape_.classes; ++c)
        put_row(linear_.d_weights, c, stage_weights_ + c * depth_, accumulate);
    }
  }
  void put_row(const matrix_data<T, true>& m, index row, T* from, bool accumulate) const {
    if (accumulate) {
      T* old = all_workers_[0].line;
      m.reader(m.at(row, 0), m.col_stride, depth_, old);
      for (index d = 0; d < depth_; ++d)
        from[d] += old[d];
    }
    m.write(row, 0, depth_, from);
  }

  const Formula& formula_;
  const row_job<T>& job_;
  const linear_job<T>& linear_;
  const executor& run_on_;
  shape shape_;
  index depth_, slots_;
  bool roomy_;
  index slices_, workers_;
  bool direct_hidden_, direct_weights_;
  std::size_t scratch_bytes_ = 0;

  // The block of rows.
  index count_ = 0;
  index* rows_ = nullptr;
  std::int64_t* labels_ = nullptr; // -1 in lanes without a row
  double *weight_ = nullptr, *scale_ = nullptr, *label_weight_ = nullptr, *target_side_ = nullptr;
  T *raw_target_ = nullptr, *rivals_ = nullptr;
  summary<statistic, W>*partial_ = nullptr, *merged_ = nullptr; // of every slice; of all
  panel_slopes<T>* slopes_ = nullptr;
  T* slot_memory_ = nullptr;
  index* live_ = nullptr; // of every slot: entries in its list; -1 where it holds all
  typename linear_filter<T>::panel* filtered_ = nullptr;
  V* masses_ = nullptr;  // of every slice, panel and threshold
  T** places_ = nullptr; // where each row's gradient goes
  T *stage_hidden_ = nullptr, *stage_weights_ = nullptr;
  worker* all_workers_ = nullptr;
};

} // namespace perdita::inline PERDITA_ABI::core
