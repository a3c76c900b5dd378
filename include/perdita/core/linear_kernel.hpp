// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for scores that are products, hidden states times class weights, and are never all
/// held. A block of rows goes through all classes in pieces; a piece is made by core/product.hpp,
/// summed up while it is in cache, and later becomes the same piece of the gradient, from which the
/// two products follow that the gradients of the inputs consist of. Either the pieces of a block
/// are kept in between ("roomy"), or only a few are, and they are made again ("tight").
///
/// A formula of two heads has the other's operands as `other`: where there are any, that head's
/// scores of the same rows and classes are the side numbers of the gradient. What is known of rows
/// has been found elsewhere (core/linear_divergence.hpp): there is only the way back, from records.
///
/// Work is shared out by classes (and for the gradient of the hidden states by its columns), so
/// that every element of every result is added up by one task, in an order that depends on the
/// shape alone.

#include <algorithm>
#include <atomic>

#include "executor.hpp"
#include "linear_block.hpp"
#include "linear_scores.hpp"
#include "linear_tiles.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class Formula, class T, bool Gradient> class linear_kernel {
  using V = pack<T>;
  using statistic = typename Formula::statistic;
  using tile = linear_tile<Formula, T>;
  using tiles = linear_tiles<T>;
  using shape = linear_shape<T>;
  static constexpr index width = shape::width;
  /// Runs of pieces that are summed up each by one task, and then merged.
  static constexpr index most_slices = statistic::terms <= 2 ? 32 : 16;
  static constexpr bool two_heads = requires(const Formula& f) { f.other; };
  /// Two heads are compared by the same products, so that what is equal cancels.
  static constexpr bool may_use_tiles = tiles::possible && !two_heads;

public:
  linear_kernel(const Formula& formula, const row_job<T>& job, const linear_job<T>& linear,
                const executor& run_on, std::byte* scratch)
      : formula_(formula), job_(job), linear_(linear), run_on_(run_on),
        memory_(scratch), shape_{linear.weights.rows}, depth_(linear.hidden.cols),
        slots_(linear.slots), kept_(Gradient && slots_ == shape_.pieces()),
        slices_(std::min(most_slices, shape_.pieces())),
        workers_(std::min(static_cast<index>(run_on.concurrency()), kept_ ? most_slices : slots_)),
        hidden_lies_(rows_lie(linear.d_hidden)),
        weights_lie_(rows_lie(linear.d_weights) &&
                     linear.d_weights.plane_rows == linear.d_weights.rows),
        block_(formula, job, linear, slices_, memory_),
        thresholds_(linear.filter, shape_.classes, job.scores.cols, linear.block_rows / width,
                    slices_, memory_),
        tiles_(linear, memory_) {
    lay_out(scratch != nullptr);
  }
  std::size_t scratch_bytes() const { return memory_.used(); }

  /// Σ of the weighted values of all rows, and their gradients.
  double run() requires(!two_heads) {
    exact_sum total;
    for_blocks([&](bool first) {
      sum_up();
      block_.finish(&total);
      if constexpr (Gradient)
        go_back(first, kept_);
    });
    return total.value();
  }
  /// What is known of every row that counts after these classes.
  void summarise(row_record* records) {
    for_blocks([&](bool) {
      sum_up();
      block_.record(records);
    });
  }
  /// As run(), from records of all classes; but values and by-products or gradients, not both.
  double resume(const row_record* records) {
    exact_sum total;
    for_blocks([&](bool first) {
      block_.recall(records);
      block_.finish(Gradient ? nullptr : &total);
      if constexpr (Gradient)
        go_back(first, false);
    });
    return total.value();
  }

private:
  /// A thread's own memory.
  struct worker {
    T* panels; // an operand in panels
    T* rows;   // rows that do not lie as they should
    T* soft;   // a panel of soft targets
    T* beside; // another head's scores of a few classes
    panel_sums<statistic, T>* sums;
    typename linear_thresholds<T>::masses* masses;
    index number;
  };

  void lay_out(bool real) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    const index rows = linear_.block_rows, panels = rows / width;
    slot_memory_ = memory_.take<T>(size(slots_ * shape_.slot(rows)));
    if constexpr (Gradient) {
      places_ = memory_.take<T*>(size(rows));
      live_ = memory_.take<index>(size(slots_));
      stage_hidden_ = hidden_lies_ ? nullptr : memory_.take<T>(size(rows * depth_));
      stage_weights_ = weights_lie_ ? nullptr : memory_.take<T>(size(shape_.classes * depth_));
    }
    all_workers_ = memory_.take<worker>(size(workers_));
    for (index i = 0; i < workers_; ++i) {
      worker w{};
      w.panels = memory_.take<T>(size(shape::columns * shape::depth));
      w.rows = memory_.take<T>(size(std::max(depth_, shape::strip * shape::depth)));
      w.soft = memory_.take<T>(size(job_.sparse ? shape_.panel() : 0));
      if constexpr (Gradient && two_heads)
        w.beside =
            memory_.take<T>(size(formula_.other.weights ? panels * shape_.panel_beside() : 0));
      w.sums = memory_.take<panel_sums<statistic, T>>(size(panels));
      if (Gradient && thresholds_.measured())
        w.masses = memory_.take<typename linear_thresholds<T>::masses>(size(panels));
      w.number = i;
      if (real)
        new (&all_workers_[i]) worker(w);
    }
  }

  /// f(worker, i) for each i < n, each by one of the workers.
  template <class F> void for_each(index n, F f) const {
    share_out(run_on_, workers_, n, [&](std::size_t k, index i) { f(all_workers_[k], i); });
  }
  /// f(worker, piece, where its scores are or may go) for each piece, and then done(worker, slice)
  /// for each run of pieces that is one task's.
  template <class F, class Done> void for_slices(F f, Done done) const {
    for_each(slices_, [&](const worker& w, index s) {
      const index pieces = shape_.pieces(), end = (s + 1) * pieces / slices_;
      for (index piece = s * pieces / slices_; piece < end; ++piece)
        f(w, piece, slot(kept_ ? piece : w.number));
      done(w, s);
    });
  }
  /// f(whether it is the first) for every block of rows, which is then at hand.
  template <class F> void for_blocks(F f) {
    bool first = true;
    for (index r = 0; r < job_.scores.rows;) {
      r = block_.collect(r, [this](index row) { ignore(row); });
      if (block_.count() == 0)
        continue;
      if constexpr (Gradient)
        for (index i = 0; i < block_.count(); ++i)
          places_[i] = hidden_lies_ ? linear_.d_hidden.pointer(block_.rows()[i], 0)
                                    : stage_hidden_ + i * depth_;
      if constexpr (may_use_tiles)
        if (tiles_.used())
          for_each(tiles::parts(block_.count()), [this](const worker&, index part) {
            tiles_.take(block_.rows(), block_.count(), part);
          });
      f(first);
      first = false;
    }
    if constexpr (Gradient)
      put_weights(first);
  }
  void ignore(index row) const {
    store_ignored_report(job_, row);
    if (Gradient && !job_.accumulate) {
      std::fill_n(all_workers_[0].rows, depth_, T(0));
      linear_.d_hidden.write(row, 0, depth_, all_workers_[0].rows);
    }
  }

  index first_of(index piece) const { return piece * shape_.piece(); }
  index size_of(index piece) const {
    return std::min(shape_.piece(), shape_.classes - first_of(piece));
  }
  T* slot(index s) const { return slot_memory_ + s * shape_.slot(linear_.block_rows); }
  const T* bias(index first) const {
    return linear_.bias.data ? linear_.bias.data + first : nullptr;
  }

  // ---- scores

  /// The scores of a piece, without the bias.
  void make_piece(const worker& w, index piece, T* scores) const {
    if constexpr (may_use_tiles)
      if (tiles_.used())
        return tiles_.make_scores(first_of(piece), size_of(piece), block_.panels(), scores,
                                  w.panels);
    make_scores<T>({linear_.hidden, linear_.weights}, block_.rows(), block_.count(),
                   first_of(piece), size_of(piece), w.panels, w.rows, scores, shape_.panel());
  }

  void sum_up() {
    const auto absorb = [this](const worker& w, index piece, T* scores) {
      const index first = first_of(piece), n = size_of(piece);
      make_piece(w, piece, scores);
      for (index p = 0; p < block_.panels(); ++p)
        tile::absorb(formula_, scores + p * shape_.panel(), bias(first), n,
                     block_.side(p, first, n, w.soft), block_.labels(p, first, n), w.sums[p],
                     block_.raw_targets(p));
    };
    for (index i = 0; i < workers_; ++i)
      clear(all_workers_[i].sums);
    for_slices(absorb, [this](const worker& w, index s) {
      for (index p = 0; p < block_.panels(); ++p)
        block_.put(w.sums[p], s, p);
      clear(w.sums);
    });
    block_.merge_slices();
  }
  template <class S> void clear(S* of_panels) const {
    for (index p = 0; p < block_.panels(); ++p)
      of_panels[p].clear();
  }

  // ---- gradients

  void go_back(bool first_block, bool made) {
    if (thresholds_.any())
      begin_thresholds();
    std::fill_n(live_, slots_, whole);
    if (thresholds_.measured())
      measure(made);
    // Both products of a few pieces, then of the next: few enough to be in the last-level cache
    // still, and enough for every worker to have several.
    const index together = std::min(slots_, std::max<index>(16, 4 * workers_));
    for (index piece = 0; piece < shape_.pieces(); piece += together) {
      const index n = std::min(together, shape_.pieces() - piece), kept = kept_ ? piece : 0;
      for_each(n, [&](const worker& w, index i) {
        if (live_[kept + i] != emitted)
          emit(w, piece + i, slot(kept + i), made);
        add_to_weights(w, piece + i, kept + i, first_block);
      });
      const index strip = columns_per_task();
      for_each((depth_ + strip - 1) / strip, [&](const worker& w, index task) {
        for (index i = 0; i < n; ++i)
          add_to_hidden(w, piece + i, kept + i, task * strip,
                        std::min(strip, depth_ - task * strip));
      });
    }
    if (!hidden_lies_)
      for (index i = 0; i < block_.count(); ++i)
        put_row(linear_.d_hidden, block_.rows()[i], stage_hidden_ + i * depth_, job_.accumulate);
  }

  /// Turns the scores of a piece into their gradient.
  void emit(const worker& w, index piece, T* scores, bool made) const {
    if (!made)
      make_piece(w, piece, scores);
    const index step = has_other() ? shape::beside : size_of(piece);
    for (index c = 0; c < size_of(piece); c += step) {
      const index first = first_of(piece) + c, n = std::min(step, size_of(piece) - c);
      if (has_other())
        make_beside(w, first, n);
      for (index p = 0; p < block_.panels(); ++p)
        tile::emit(formula_, scores + p * shape_.panel() + c * width, bias(first), n,
                   side(w, p, first, n), block_.labels(p, first, n), block_.slopes(p));
    }
  }
  bool has_other() const {
    if constexpr (two_heads)
      return static_cast<bool>(formula_.other.weights);
    return false;
  }
  /// The other head's scores of n classes, complete.
  void make_beside(const worker& w, index first, index n) const {
    if constexpr (two_heads) {
      const auto& head = formula_.other;
      make_scores(head, block_.rows(), block_.count(), first, n, w.panels, w.rows, w.beside,
                  shape_.panel_beside());
      for (index p = 0; p < block_.panels(); ++p)
        for (index j = 0; j < n; ++j) {
          T* const at = w.beside + p * shape_.panel_beside() + j * width;
          const V x = V::load(at);
          formula_.score(head.bias ? x + V(head.bias[first + j]) : x).store(at);
        }
    }
  }
  piece_side<T> side(const worker& w, index p, index first, index n) const {
    piece_side<T> result = block_.side(p, first, n, w.soft);
    if (has_other())
      result.soft = w.beside + p * shape_.panel_beside();
    return result;
  }

  // ---- filtering

  void begin_thresholds() {
    for (index p = 0; p < block_.panels(); ++p)
      thresholds_.begin(p, block_.mass(p), job_.scale);
  }
  /// Chooses the rows' thresholds, once it is known what each would drop, where that pays.
  void measure(bool made) {
    for (index i = 0; i < workers_; ++i)
      clear(all_workers_[i].masses);
    const bool all = worth_measuring(made);
    if (all)
      for_slices([&](const worker& w, index piece, T*) { weigh(w, piece, made); },
                 [this](const worker& w, index s) { put_masses(w, s); });
    for (index p = 0; p < block_.panels(); ++p) {
      double dropped[lanes<T>] = {};
      if (all)
        thresholds_.choose(p, 1, dropped);
      else
        thresholds_.keep_all(p);
      if (linear_.dropped.data)
        for (index i = 0; i < block_.rows_in(p); ++i)
          linear_.dropped[block_.rows()[p * width + i]] = dropped[i];
    }
  }
  /// A piece's gradient, which stays if scores do, is added to what the thresholds would drop.
  void weigh(const worker& w, index piece, bool made) const {
    const T* const gradient = emitted_once(w, piece, made);
    for (index p = 0; p < block_.panels(); ++p)
      thresholds_.measure(p, gradient + p * shape_.panel(), size_of(piece), w.masses[p]);
  }
  const T* emitted_once(const worker& w, index piece, bool made) const {
    const index s = kept_ ? piece : w.number;
    if (live_[s] != emitted)
      emit(w, piece, slot(s), made);
    if (kept_)
      live_[s] = emitted;
    return slot(s);
  }
  /// Of a piece's live entries, in the room for rows until the list is made.
  static auto* masks(const worker& w) {
    using lane_mask = typename linear_thresholds<T>::lane_mask;
    static_assert(sizeof(lane_mask) * shape::most_classes * shape::panels <=
                  sizeof(T) * shape::strip * shape::depth);
    return reinterpret_cast<lane_mask*>(w.rows);
  }
  void put_masses(const worker& w, index slice) const {
    for (index p = 0; p < block_.panels(); ++p)
      thresholds_.put(p, slice, w.masses[p]);
    clear(w.masses);
  }
  /// Measuring takes as long as so many features of a product; where scores are not kept, all of
  /// them have to be made once more for it, another product; lists save at most two. So a few
  /// pieces are looked at first: what lists would save, if the others were like them.
  bool worth_measuring(bool made) {
    constexpr index one_in = 16, offset = 8, features = 80;
    const index samples = (slices_ - offset + one_in - 1) / one_in;
    if (slices_ <= offset)
      return true;
    const auto piece_of = [this](index k) {
      const index s = k * one_in + offset, pieces = shape_.pieces();
      return (s * pieces / slices_ + (s + 1) * pieces / slices_) / 2;
    };
    index classes = 0;
    for (index k = 0; k < samples; ++k)
      classes += size_of(piece_of(k));
    for (index p = 0; p < block_.panels(); ++p)
      thresholds_.forget(p);
    for_each(samples, [&](const worker& w, index k) {
      weigh(w, piece_of(k), made);
      put_masses(w, k);
    });
    double dropped[lanes<T>];
    for (index p = 0; p < block_.panels(); ++p)
      thresholds_.choose(p, static_cast<double>(classes) / static_cast<double>(shape_.classes),
                         dropped);
    std::atomic<index> saved{0};
    for_each(samples, [&](const worker& w, index k) {
      const index piece = piece_of(k);
      saved += thresholds_.saved(emitted_once(w, piece, made), size_of(piece), shape_.panel(),
                                 block_.count(), masks(w));
    });
    begin_thresholds();
    return 2 * depth_ * saved > classes * block_.count() * (features + (kept_ ? 0 : depth_));
  }

  // ---- products

  /// Rows of the gradient of the weights += gradient of the scores, transposed, times hidden.
  void add_to_weights(const worker& w, index piece, index s, bool first_block) const {
    const bool accumulate = !first_block || (weights_lie_ && linear_.accumulate_weights);
    const index first = first_of(piece), n = size_of(piece), count = block_.count();
    T* gradient = slot(s);
    if (linear_.d_bias.data)
      add_to_bias(first, n, gradient, !first_block || linear_.accumulate_weights);
    const index step = weights_lie_ ? linear_.d_weights.row_stride : depth_;
    T* to = weights_lie_ ? linear_.d_weights.pointer(first, 0) : stage_weights_ + first * depth_;
    live_[s] = whole;
    if constexpr (may_use_tiles)
      if (tiles_.used()) {
        tiles_.add_to_weights(gradient, n, count, to, step, accumulate, w.panels);
        return tiles_.turn(gradient, n, block_.panels(), w.rows);
      }
    if (thresholds_.any() && thresholds_.saved(gradient, n, shape_.panel(), count, masks(w)) > 0)
      return add_live_to_weights(w, n, s, to, step, accumulate);
    for (index d = 0; d < depth_; d += shape::columns) {
      const index cols = std::min(shape::columns, depth_ - d);
      for (index i = 0; i < count; ++i)
        put_in_panels(linear_.hidden, block_.rows()[i], d, cols, i, count, w.rows, w.panels);
      for (index c = 0; c < n; c += shape::strip)
        multiply<T>({gradient + c * width, width, 1, shape_.panel()}, {w.panels, count * width},
                    {to + c * step + d, step, width}, std::min(shape::strip, n - c), cols, count,
                    accumulate);
    }
  }
  void add_to_bias(index first, index n, const T* gradient, bool accumulate) const {
    const index last = block_.panels() - 1;
    const auto real = iota<T>() < V(static_cast<T>(block_.rows_in(last)));
    for (index j = 0; j < n; ++j) {
      const auto at = [&](index p) { return V::load(gradient + p * shape_.panel() + j * width); };
      V sum = select(real, at(last), V(0));
      for (index p = 0; p < last; ++p)
        sum += at(p);
      T& to = linear_.d_bias[first + j];
      to = accumulate ? to + sum_lanes(sum) : sum_lanes(sum);
    }
  }
  /// From a list of the entries that matter, which then takes the gradient's place.
  void add_live_to_weights(const worker& w, index n, index s, T* to, index step,
                           bool accumulate) const {
    T* gradient = slot(s);
    const index count = block_.count();
    auto* list = reinterpret_cast<live_entry<T>*>(w.panels);
    live_[s] = thresholds_.list(gradient, n, shape_.panel(), count, masks(w), list);
    if (!accumulate)
      for (index c = 0; c < n; ++c)
        std::fill_n(to + c * step, depth_, T(0));
    for (index e = 0; e < live_[s]; ++e) {
      const auto [at, value] = list[e];
      add_multiple(value, row_of(linear_.hidden, block_.rows()[at % count], 0, depth_, w.rows),
                   depth_, to + at / count * step);
    }
    std::copy_n(list, live_[s], reinterpret_cast<live_entry<T>*>(gradient));
  }

  /// Columns of the gradient of the hidden states that one task adds to.
  index columns_per_task() const {
    const index share = (depth_ / workers_ + width - 1) / width * width;
    return std::clamp(share, 4 * width, shape::columns);
  }
  /// Columns of the gradient of the hidden states += gradient of the scores times weights.
  void add_to_hidden(const worker& w, index piece, index s, index d, index cols) const {
    const bool accumulate = piece > 0 || (hidden_lies_ && job_.accumulate);
    if (live_[s] >= 0)
      return add_live_to_hidden(w, piece, s, d, cols, accumulate);
    if constexpr (may_use_tiles)
      if (tiles_.used())
        return tiles_.add_to_hidden(slot(s), first_of(piece), size_of(piece), block_.count(), d,
                                    cols, places_, accumulate, w.panels);
    for (index first = 0; first < size_of(piece); first += shape::depth) {
      const index terms = std::min(shape::depth, size_of(piece) - first);
      for (index k = 0; k < terms; ++k)
        put_in_panels(linear_.weights, first_of(piece) + first + k, d, cols, k, terms, w.rows,
                      w.panels);
      for (index p = 0; p < block_.panels(); ++p)
        multiply<T>({slot(s) + p * shape_.panel() + first * width, 1, width, width * width},
                    {w.panels, terms * width}, {nullptr, 0, width, places_ + p * width, d},
                    block_.rows_in(p), cols, terms, accumulate || first > 0);
    }
  }
  void add_live_to_hidden(const worker& w, index piece, index s, index d, index cols,
                          bool accumulate) const {
    const index count = block_.count();
    if (!accumulate)
      for (index i = 0; i < count; ++i)
        std::fill_n(places_[i] + d, cols, T(0));
    const auto* list = reinterpret_cast<const live_entry<T>*>(slot(s));
    for (index e = 0; e < live_[s]; ++e)
      add_multiple(list[e].value,
                   row_of(linear_.weights, first_of(piece) + list[e].at / count, d, cols, w.rows),
                   cols, places_[list[e].at % count] + d);
  }
  // ---- gradients that are not made where they belong

  void put_weights(bool nothing) const {
    const bool accumulate = linear_.accumulate_weights;
    if (nothing && accumulate)
      return;
    T* zeros = all_workers_[0].rows;
    if (nothing)
      std::fill_n(zeros, depth_, T(0));
    for (index c = 0; c < shape_.classes && (nothing || !weights_lie_); ++c)
      put_row(linear_.d_weights, c, nothing ? zeros : stage_weights_ + c * depth_, accumulate);
    for (index c = 0; c < linear_.d_bias.size && nothing; ++c)
      linear_.d_bias[c] = T(0);
  }
  void put_row(const matrix_data<T, true>& m, index row, T* from, bool accumulate) const {
    if (accumulate) {
      T* old = all_workers_[0].rows;
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
  carver memory_;
  shape shape_;
  index depth_, slots_;
  bool kept_; // a slot for every piece
  index slices_, workers_;
  bool hidden_lies_, weights_lie_; // their gradients can be made where they belong
  linear_block<Formula, T> block_;
  linear_thresholds<T> thresholds_;
  tiles tiles_;
  T* slot_memory_ = nullptr;
  static constexpr index whole = -1, emitted = -2; // what lies in a slot, where it is no list:
                                                   // all of a piece, for emit() or after it
  index* live_ = nullptr;                          // of every slot: entries in its list
  T** places_ = nullptr;                           // where each row's gradient goes
  T *stage_hidden_ = nullptr, *stage_weights_ = nullptr;
  worker* all_workers_ = nullptr;
};

/// Has use(kernel) do its part, with the scratch that the kernel asks for.
template <bool Gradient, class Formula, class T, class Use>
auto with_linear_kernel(const Formula& formula, const row_job<T>& job, const linear_job<T>& linear,
                        const executor& run_on, workspace* memory, Use use) {
  using kernel = linear_kernel<Formula, T, Gradient>;
  workspace own;
  const auto bytes = kernel(formula, job, linear, run_on, nullptr).scratch_bytes();
  kernel k(formula, job, linear, run_on, (memory ? *memory : own).request(bytes));
  return use(k);
}

/// Σ of the weighted values of all rows, and their gradients if the job has any. From records of
/// all classes, where there are records: values and by-products or gradients, not both.
template <bool Gradient, class Formula, class T>
double run_linear(const Formula& formula, const row_job<T>& job, const linear_job<T>& linear,
                  const executor& run_on, workspace* memory, const row_record* records) {
  return with_linear_kernel<Gradient>(formula, job, linear, run_on, memory, [=](auto& kernel) {
    if constexpr (requires { kernel.run(); })
      if (!records)
        return kernel.run();
    return kernel.resume(records);
  });
}

/// What is known of every row that counts after the classes at hand.
template <class Formula, class T>
void summarise_linear(const Formula& formula, const row_job<T>& job, const linear_job<T>& linear,
                      const executor& run_on, workspace* memory, row_record* records) {
  with_linear_kernel<false>(formula, job, linear, run_on, memory,
                            [=](auto& kernel) { kernel.summarise(records); });
}

} // namespace perdita::inline PERDITA_ABI::core
