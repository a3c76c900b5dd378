// SPDX-License-Identifier: MIT
#pragma once

/// The traversal for losses of anchors: each anchor is compared with every candidate, and the loss
/// looks at a whole row of comparisons at once. Some anchors are taken at a time; their rows, and
/// then the rows of slopes, are all that is held. Every product is made once: 2 N M D operations
/// for the values, 6 N M D with gradients.
///
/// Blocks of anchors follow one another; what is shared out within a block is independent, and the
/// size of a block depends on the shape alone: so do the bits.

#include <algorithm>
#include <cmath>
#include <limits>

#include "compared_rows.hpp"
#include "executor.hpp"
#include "product.hpp"
#include "solved_row.hpp"

namespace perdita::inline PERDITA_ABI {

/// Changes who is compared with whom: any callable f(anchor, relation, n) of the user's, which may
/// set any of relation[0] … relation[n - 1] (1: belongs to the anchor, -1: does not, 0: is not
/// compared with it) of the candidates of an anchor. Called once or twice for each anchor, on any
/// thread. Does not own the callable.
template <class T> class relation_filter {
public:
  relation_filter() = default;
  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, relation_filter> &&
           std::invocable<const F&, index, T*, index>) relation_filter(const F& f)
      : object_(&f), call_([](const void* object, index anchor, T* relation, index n) {
          (*static_cast<const F*>(object))(anchor, relation, n);
        }) {}
  explicit operator bool() const { return call_ != nullptr; }
  void operator()(index anchor, T* relation, index n) const { call_(object_, anchor, relation, n); }

private:
  const void* object_ = nullptr;
  void (*call_)(const void*, index, T*, index) = nullptr;
};

namespace core {

/// What a formula sees of an anchor: a row of comparisons in whole packs.
template <class T> struct anchor_row {
  index anchor;
  index size;         ///< of whole packs; what lies beyond the last candidate has relation 0
  T* scores;          ///< cosines, products or squared distances; slopes are to take their place
  const T* relation;  ///< 1: belongs to the anchor, -1: does not, 0: to be left out
  const double* note; ///< of all anchors, where the formula takes notes
  /// Σ of the anchors' weights times their notes, where these are not rows.
  const double* total = nullptr;
  const double* share = nullptr; ///< of all anchors, where the formula is mutual
  bool alone = false;            ///< the candidates are the anchors
  T* room = nullptr;             ///< for as many numbers as scores, where the formula wants it
};

/// What a formula makes of it.
struct anchor_outcome {
  double value = 0;
  bool counts = true;   ///< otherwise all of this, and the slopes, are taken for 0
  double extra[2] = {}; ///< derivatives by options, which are added up as the values are
  double terms = 1;     ///< how often the anchor's weight counts in the mean's denominator
};

/// Base of formulas of anchors. They have
///
///   template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>&) const
///
/// which returns the anchor's value and, for gradients, overwrites the scores with slopes (what it
/// writes where the relation is 0 is dropped). With notes every anchor is looked at twice: first
///
///   template <class T> void note(const anchor_row<T>&, double* to) const
///
/// writes down as many numbers for each anchor (row_of_notes: anchor_row::size of them); row() then
/// finds those of all, one anchor after the other, behind anchor_row::note. In between, where there
/// is such a function,
///
///   template <class Weight>
///   void combine(double* notes, index anchors, Weight weight, bool alone) const
///
/// may make what it likes of all notes: this is how anchors are coupled. weight(i) is an anchor's;
/// `alone` says that each pair has been seen from both sides.
///
/// The value of an anchor may depend on the comparisons of others, by their notes: a formula that
/// is mutual makes slopes of Σ_i share_i value_i, also for anchors of weight 0 and so of share 0
/// where the candidates are the anchors.
struct anchor_formula {
  static constexpr index row_of_notes = -1;
  static constexpr bool distances = false; ///< the scores are squared distances
  static constexpr index notes = 0;
  static constexpr bool mutual = false;
  static constexpr bool wants_room = false;   ///< for gradients
  bool takes_notes() const { return true; }   ///< if there are any
  bool has_negatives() const { return true; } ///< or else what does not belong is left out
};

/// The weight of each anchor, 1 where none are given.
template <class T> struct anchor_weights {
  vector_view<const T> given;
  double operator()(index anchor) const {
    return given.data ? static_cast<double>(given[anchor]) : 1;
  }
};

/// Any formula, which is not copied: all of them share one traversal.
template <class T> struct anchor_function {
  const void* formula;
  bool distances, mutual, wants_room, has_negatives;
  index notes;
  anchor_outcome (*value)(const void*, const anchor_row<T>&);
  anchor_outcome (*slopes)(const void*, const anchor_row<T>&);
  void (*note)(const void*, const anchor_row<T>&, double*);
  void (*combine)(const void*, double*, index, const anchor_weights<T>&, bool);

  template <class Formula>
  explicit anchor_function(const Formula& f)
      : formula(&f), distances(Formula::distances), mutual(f.mutual),
        wants_room(Formula::wants_room), has_negatives(f.has_negatives()),
        notes(f.takes_notes() ? Formula::notes : 0),
        value([](const void* p, const anchor_row<T>& row) {
          return static_cast<const Formula*>(p)->template row<false>(row);
        }),
        slopes([](const void* p, const anchor_row<T>& row) {
          return static_cast<const Formula*>(p)->template row<true>(row);
        }),
        note([]([[maybe_unused]] const void* p, [[maybe_unused]] const anchor_row<T>& row,
                [[maybe_unused]] double* to) {
          if constexpr (Formula::notes != 0)
            static_cast<const Formula*>(p)->note(row, to);
        }),
        combine([]([[maybe_unused]] const void* p, [[maybe_unused]] double* notes_of_all,
                   [[maybe_unused]] index anchors, [[maybe_unused]] const anchor_weights<T>& weight,
                   [[maybe_unused]] bool alone) {
          if constexpr (requires(const Formula& g) {
                          g.combine(notes_of_all, anchors, weight, alone);
                        })
            static_cast<const Formula*>(p)->combine(notes_of_all, anchors, weight, alone);
        }) {}
};

/// What one call asks of the kernel.
template <class T> struct anchor_job {
  matrix_data<T> x, y;
  matrix_data<T, true> d_x, d_y; ///< d_y without data: only that of x is wanted
  bool normalise = true, accumulate = false;
  bool alone = false;                             ///< y is x: an anchor is not compared with itself
  const T *label_x = nullptr, *label_y = nullptr; ///< numbers that are equal or not
  relation_filter<T> filter;
  anchor_weights<T> weight;
  vector_view<const T> upstream;
  vector_view<T> values;
  double* extra[2] = {};    ///< where the sums of anchor_outcome::extra go, if anywhere
  vector_view<double> each; ///< where each anchor's extra[0] goes, if anywhere
  T scale = 1;              ///< of gradients
  double normaliser = 0;    ///< 0: the weights of the anchors that count, if `mean`
  bool mean = true;
};

template <class T> class anchor_kernel {
  using V = pack<T>;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr index strip = 96; // candidates whose comparisons, or gradients, are one task
  static constexpr index depth_step = 256;
  static constexpr index step = 2 * width;
  static constexpr index terms = 256; // candidates at a time that add to anchors' gradients
  /// The comparisons of a block, and its anchors: at most so much, and so much more for each
  /// candidate. A block's products read all candidates anew, so that a narrow one waits for memory.
  static constexpr index block_bytes = index(17) << 18, block_bytes_each = 416;
  static constexpr index most_anchors = 128;

public:
  anchor_kernel(const anchor_function<T>& function, const anchor_job<T>& job, bool gradient,
                const executor& run_on, std::byte* scratch)
      : function_(function), job_(job), gradient_(gradient), run_on_(run_on), memory_(scratch),
        depth_(job.x.cols), anchors_(job.x.rows), candidates_(job.y.rows),
        padded_(whole(candidates_)),
        notes_each_(function.notes == anchor_formula::row_of_notes ? padded_ : function.notes),
        stride_(padded_ + 16), block_(block_of()),
        to_candidates_(job.alone || job.d_y.data != nullptr),
        workers_(std::min(static_cast<index>(run_on.concurrency()),
                          std::max(block_, parts(candidates_, strip)))),
        columns_(std::clamp(parts(depth_, workers_ * step) * step, index(64), index(256))),
        x_{job.x, job.d_x, job.normalise, job.accumulate}, y_{job.y, job.d_y, job.normalise,
                                                              job.accumulate} {
    lay_out(scratch != nullptr);
  }
  std::size_t scratch_bytes() const { return memory_.used(); }

  double run() {
    prepare();
    if (notes_each_ > 0)
      take_notes();
    for_blocks([this](index first, index n) {
      compare(first, n);
      for_each(n, [&, this](const worker& w, index i) { judge(w, first, i); });
      if (gradient_)
        add_to_anchors(first, n);
      if (gradient_ && to_candidates_)
        add_to_candidates(first, n);
    });
    return settle();
  }

private:
  struct worker {
    T* tile;     // comparisons or slopes of a strip, by candidates
    T* panels;   // an operand in panels
    T* buffer;   // rows that do not lie as they should
    T* relation; // of one anchor
    T* room;     // for a formula
  };

  static index whole(index n) { return (n + width - 1) / width * width; }
  static index parts(index n, index size) { return (n + size - 1) / size; }
  index block_of() const {
    const index most = (block_bytes + block_bytes_each * candidates_) /
                       (static_cast<index>(sizeof(T)) * (stride_ + whole(depth_)));
    // Products take two packs at a time.
    const index even = most < step ? width : most / step * step;
    return std::min({even, std::max(whole(anchors_), width), most_anchors});
  }

  void lay_out(bool real) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    x_.lay_out(memory_, gradient_);
    if (job_.alone)
      y_ = x_;
    else
      y_.lay_out(memory_, gradient_ && to_candidates_);
    values_ = memory_.take<double>(size(anchors_));
    weights_ = memory_.take<double>(size(anchors_));
    for (double*& p : extra_)
      p = memory_.take<double>(size(gradient_ ? anchors_ : 0));
    notes_ = memory_.take<double>(size(anchors_ * notes_each_));
    totals_ = memory_.take<double>(size(std::max(function_.notes, index(0))));
    shares_ = memory_.take<double>(size(function_.mutual ? anchors_ : 0));
    numbers_ = memory_.take<index>(size(anchors_));
    targets_ = memory_.take<T*>(size(gradient_ ? anchors_ : 0));
    nowhere_ = memory_.take<T>(size(gradient_ ? depth_ : 0));
    spoilt_x_ = memory_.take<T>(size(gradient_ ? anchors_ : 0));
    spoilt_y_ = job_.alone ? spoilt_x_ : memory_.take<T>(size(gradient_ ? candidates_ : 0));
    if (function_.distances) {
      square_x_ = memory_.take<double>(size(anchors_));
      square_y_ = job_.alone ? square_x_ : memory_.take<double>(size(candidates_));
      pull_x_ = memory_.take<double>(size(anchors_));
      pull_y_ = job_.alone ? pull_x_ : memory_.take<double>(size(candidates_));
    }
    scores_ = memory_.take<T>(size(block_ * stride_));
    panels_ = memory_.take<T>(size(block_ * whole(depth_)));
    all_workers_ = memory_.take<worker>(size(workers_));
    for (index i = 0; i < workers_; ++i) {
      worker w{};
      w.tile = memory_.take<T>(size(strip * block_));
      w.panels = memory_.take<T>(size(gradient_ ? columns_ * terms : 0));
      w.buffer = memory_.take<T>(size(std::max(2 * depth_, strip * depth_step)));
      w.relation = memory_.take<T>(size(padded_));
      w.room = memory_.take<T>(size(gradient_ && function_.wants_room ? padded_ : 0));
      if (real)
        new (&all_workers_[i]) worker(w);
    }
  }

  /// f(worker, i) for each i < n, each by one of the workers.
  template <class F> void for_each(index n, F f) const {
    share_out(run_on_, workers_, n, [&](std::size_t k, index i) { f(all_workers_[k], i); });
  }
  template <class F> void for_rows(index n, F f) const {
    constexpr index some = 64;
    for_each(parts(n, some), [&](const worker& w, index task) {
      for (index r = task * some; r < std::min(n, (task + 1) * some); ++r)
        f(w, r);
    });
  }
  /// f(first anchor, how many) for one block after the other.
  template <class F> void for_blocks(F f) const {
    for (index first = 0; first < anchors_; first += block_)
      f(first, std::min(block_, anchors_ - first));
  }

  void prepare() {
    for (index r = 0; r < anchors_; ++r) {
      numbers_[r] = r;
      if (function_.mutual)
        shares_[r] = share_of(r);
    }
    if (gradient_)
      std::fill_n(nowhere_, depth_, T(0));
    start(x_, spoilt_x_, square_x_, pull_x_);
    if (!job_.alone)
      start(y_, spoilt_y_, square_y_, pull_y_);
  }
  void start(const compared_rows<T>& of, T* spoilt, double* squares, double* pulls) const {
    for_rows(of.rows(), [&](const worker& w, index r) {
      of.find_factor(r, w.buffer);
      if (of.places)
        of.clear(r);
      const T* row = row_of(of.x, r, 0, of.cols(), w.buffer);
      if (gradient_)
        spoilt[r] = what_spoils(row, of.cols());
      if (function_.distances) {
        squares[r] = wide_dot(row, row, of.cols(), static_cast<double>(of.factor[r]));
        pulls[r] = 0;
      }
    });
  }

  /// NaN where one of n numbers is not finite, or 0.
  static T what_spoils(const T* x, index n) {
    V wrong(0);
    for_packs(x, n, T(0), [&](const V& z, index) { wrong += z - z; });
    return any(is_nan(wrong)) ? std::numeric_limits<T>::quiet_NaN() : T(0);
  }

  // ---- comparisons

  /// n anchors with all candidates.
  void compare(index first, index n) const {
    for (index k = 0; k < depth_; k += depth_step) {
      const index d = std::min(depth_step, depth_ - k);
      for_each(parts(n, width), [&, this](const worker& w, index p) {
        x_.panel(numbers_ + first + p * width, std::min(width, n - p * width), k, d, w.buffer,
                 panels_ + k * block_ + p * width * d);
      });
    }
    for_each(parts(candidates_, strip), [&, this](const worker& w, index i) {
      const index from = i * strip, count = std::min(strip, candidates_ - from);
      if (depth_ == 0)
        std::fill_n(w.tile, count * block_, T(0));
      for (index k = 0; k < depth_; k += depth_step) {
        const index d = std::min(depth_step, depth_ - k);
        broadcast_operand<T> rows = rows_of(job_.y, from, count, k, d, w.buffer);
        rows.far = true;
        multiply<T>(rows, {panels_ + k * block_, width * d}, {w.tile, block_, width}, count,
                    whole(n), d, k > 0);
      }
      for (index a = 0; a < n; a += width)
        copy_transposed(w.tile + a, block_, count, std::min(width, n - a),
                        scores_ + a * stride_ + from, stride_);
    });
  }
  void scale_row(const worker& w, index anchor, T* row) const {
    std::fill(row + candidates_, row + padded_, T(0));
    const V factor(x_.factor[anchor] / x_.reach(anchor));
    for (index j = 0; j < padded_; j += width) {
      const V by = j + width <= candidates_ ? V::load(y_.factor + j)
                                            : load_first(y_.factor + j, candidates_ - j, V(0));
      (V::load(row + j) * (factor * by)).store(row + j);
    }
    if (function_.distances)
      measure(w, anchor, row);
  }
  /// Squared distances from products. Those of near neighbours are made anew: there the difference
  /// would be all rounding.
  void measure(const worker& w, index anchor, T* row) const {
    const double mine = square_x_[anchor];
    const T* own = nullptr;
    for (index j = 0; j < candidates_; ++j) {
      const double both = mine + square_y_[j];
      double square = both - 2 * static_cast<double>(row[j]);
      if (square < both / 8) {
        if (!own)
          own = row_of(job_.x, anchor, 0, depth_, w.buffer);
        square = near_square(own, static_cast<double>(x_.factor[anchor]), j, w.buffer + depth_);
      }
      row[j] = static_cast<T>(square);
    }
  }
  double near_square(const T* own, double factor, index j, T* buffer) const {
    const T* y = row_of(job_.y, j, 0, depth_, buffer);
    const auto other = static_cast<double>(y_.factor[j]);
    double sum = 0;
    for (index k = 0; k < depth_; ++k) {
      // Of equal rows 0, which one product with digits that the other has not would not leave.
      const double d = reg::rounded(static_cast<double>(own[k]) * factor) -
                       reg::rounded(static_cast<double>(y[k]) * other);
      sum += d * d;
    }
    return sum;
  }

  // ---- values and slopes

  anchor_row<T> row_of_block(const worker& w, index first, index i) const {
    const index anchor = first + i;
    scale_row(w, anchor, scores_ + i * stride_);
    const V mine(job_.label_x[anchor]), other(function_.has_negatives ? T(-1) : T(0));
    for (index j = 0; j < padded_; j += width) {
      const V theirs = j + width <= candidates_
                           ? V::load(job_.label_y + j)
                           : load_first(job_.label_y + j, candidates_ - j, V(0));
      select(theirs == mine, V(1), other).store(w.relation + j);
    }
    if (job_.filter)
      job_.filter(anchor, w.relation, candidates_);
    if (job_.alone)
      w.relation[anchor] = 0;
    std::fill(w.relation + candidates_, w.relation + padded_, T(0));
    return {anchor,     padded_, scores_ + i * stride_, w.relation, notes_, totals_, shares_,
            job_.alone, w.room};
  }
  /// ∂(what is minimised, times the mean's denominator)/∂(value of the anchor)
  double share_of(index anchor) const {
    const double share = job_.weight(anchor) * static_cast<double>(job_.scale);
    return job_.upstream.data ? share * static_cast<double>(job_.upstream[anchor]) : share;
  }

  void take_notes() {
    const index notes = notes_each_;
    for_blocks([this, notes](index first, index n) {
      compare(first, n);
      for_each(n, [&, this](const worker& w, index i) {
        function_.note(function_.formula, row_of_block(w, first, i), notes_ + (first + i) * notes);
      });
    });
    function_.combine(function_.formula, notes_, anchors_, job_.weight, job_.alone);
    for (index k = 0; k < function_.notes; ++k) {
      exact_sum sum;
      for (index r = 0; r < anchors_; ++r)
        if (const double weight = job_.weight(r); weight != 0)
          sum.add(weight * notes_[r * notes + k]);
      totals_[k] = sum.value();
    }
  }

  void judge(const worker& w, index first, index i) {
    const anchor_row<T> row = row_of_block(w, first, i);
    const double weight = job_.weight(row.anchor);
    anchor_outcome outcome;
    outcome.counts = false;
    if (weight != 0 || (gradient_ && function_.mutual && job_.alone))
      outcome = (gradient_ ? function_.slopes : function_.value)(function_.formula, row);
    const bool valued = outcome.counts && weight != 0;
    values_[row.anchor] = valued ? weight * outcome.value : 0;
    weights_[row.anchor] = valued ? weight * outcome.terms : 0;
    if (job_.values.data)
      job_.values[row.anchor] = static_cast<T>(values_[row.anchor]);
    if (!gradient_)
      return;
    const double share = valued ? share_of(row.anchor) : 0;
    finish_slopes(row, function_.mutual ? (outcome.counts ? 1 : 0) : share);
    for (int k = 0; k < 2; ++k)
      extra_[k][row.anchor] = valued ? share * outcome.extra[k] : 0;
  }
  /// From slopes of what the formula saw to those of products.
  void finish_slopes(const anchor_row<T>& row, double share) const {
    const V factor(static_cast<T>(share));
    const auto none = factor == V(0);
    targets_[row.anchor] = static_cast<T>(share) == T(0) ? nowhere_ : x_.places[row.anchor];
    const V spoilt(spoilt_x_[row.anchor]);
    double pull = 0;
    for (index j = 0; j < row.size; j += width) {
      const V left_out(V::load(row.relation + j));
      const V wrong =
          spoilt + (j + width <= candidates_ ? V::load(spoilt_y_ + j)
                                             : load_first(spoilt_y_ + j, candidates_ - j, V(0)));
      V slope = select((left_out == V(0)) | none, V(0), V::load(row.scores + j) * factor + wrong);
      if (function_.distances)
        slope = slope * V(-2);
      slope.store(row.scores + j);
    }
    if (function_.distances) {
      wide_lanes<T> sum;
      sum.clear();
      for (index j = 0; j < row.size; j += width)
        sum.add(-V::load(row.scores + j));
      for (int p = 0; p < wide_lanes<T>::parts; ++p)
        pull += sum_lanes(sum.folded(p));
      pull_x_[row.anchor] += pull;
    }
  }

  // ---- gradients

  void add_to_anchors(index first, index n) const {
    for_each(parts(depth_, columns_), [&, this](const worker& w, index task) {
      const index d = task * columns_, cols = std::min(columns_, depth_ - d);
      for (index from = 0; from < candidates_; from += terms) {
        const index count = std::min(terms, candidates_ - from);
        for (index k = 0; k < count; ++k)
          put_unit(y_, spoilt_y_, from + k, d, cols, k, count, w.buffer, w.panels);
        multiply<T>({scores_ + from, stride_, 1, width}, {w.panels, count * width},
                    {nullptr, 0, width, targets_ + first, d}, n, cols, count, true);
      }
    });
  }
  void add_to_candidates(index first, index n) const {
    for_each(n, [&, this](const worker& w, index k) {
      if (targets_[first + k] == nowhere_)
        clear_row(depth_, k, n, panels_);
      else
        put_unit(x_, spoilt_x_, first + k, 0, depth_, k, n, w.buffer, panels_);
    });
    for_each(parts(candidates_, strip), [&, this](const worker& w, index i) {
      const index from = i * strip, count = std::min(strip, candidates_ - from);
      for (index a = 0; a < n; a += width)
        copy_transposed(scores_ + a * stride_ + from, stride_, std::min(width, n - a), count,
                        w.tile + a, block_);
      if (function_.distances)
        for (index j = 0; j < count; ++j)
          for (index a = 0; a < n; ++a)
            pull_y_[from + j] -= static_cast<double>(w.tile[j * block_ + a]);
      for (index d = 0; d < depth_; d += depth_step)
        multiply<T>({w.tile, block_, 1, width}, {panels_ + d * n, n * width},
                    {nullptr, 0, width, y_.places + from, d}, count,
                    std::min(depth_step, depth_ - d), n, true);
    });
  }
  /// n columns of a unit vector become row k of panels. What is spoilt has slopes of NaN where it
  /// is compared, and elsewhere 0, which its own NaN would not leave at that.
  static void put_unit(const compared_rows<T>& of, const T* spoilt, index row, index first, index n,
                       index k, index depth, T* buffer, T* panels) {
    if (spoilt[row] != T(0))
      clear_row(n, k, depth, panels);
    else
      put_in_panels(of.x, row, first, n, k, depth, buffer, panels, of.factor[row]);
  }

  static void clear_row(index n, index k, index depth, T* panels) {
    for (index j = 0; j < n; j += width)
      V(0).store(panels + j * depth + k * width);
  }

  double settle() const {
    double share = 1;
    if (job_.mean) {
      const double all = job_.normaliser != 0 ? job_.normaliser : sum_of(weights_);
      share = all != 0 ? 1 / all : 0;
    }
    if (gradient_) {
      settle_rows(x_, share, pull_x_);
      if (!job_.alone && to_candidates_)
        settle_rows(y_, share, pull_y_);
      for (int k = 0; k < 2; ++k)
        if (job_.extra[k])
          *job_.extra[k] = share * sum_of(extra_[k]);
      for (index r = 0; r < job_.each.size; ++r)
        job_.each[r] = share * extra_[0][r];
    }
    return share == 0 ? 0 : sum_of(values_) * share;
  }
  void settle_rows(const compared_rows<T>& of, double share, const double* pulls) const {
    for_rows(of.rows(), [&](const worker& w, index r) {
      of.settle(r, share, function_.distances ? pulls[r] : 0, w.buffer);
    });
  }
  double sum_of(const double* x) const {
    exact_sum sum;
    for (index r = 0; r < anchors_; ++r)
      sum.add(x[r]);
    return sum.value();
  }

  const anchor_function<T>& function_;
  const anchor_job<T>& job_;
  bool gradient_;
  const executor& run_on_;
  carver memory_;
  index depth_, anchors_, candidates_, padded_;
  index notes_each_; // of an anchor
  index stride_;     // from row to row of a block: not a power of two, for the caches' sake
  index block_;
  bool to_candidates_; // go gradients as well
  index workers_;
  index columns_;          // of the anchors' gradients: a task
  compared_rows<T> x_, y_; // the same ones where embeddings are compared with themselves
  double *values_ = nullptr, *weights_ = nullptr, *extra_[2] = {};
  double *notes_ = nullptr, *totals_ = nullptr, *shares_ = nullptr;
  index* numbers_ = nullptr;
  /// Where an anchor's gradient is made: nowhere, if it has none. What it is a product of may be
  /// NaN, and no slope of 0 would stop that.
  T **targets_ = nullptr, *nowhere_ = nullptr;
  T *spoilt_x_ = nullptr, *spoilt_y_ = nullptr;      // NaN where a row is not finite, or 0
  double *square_x_ = nullptr, *square_y_ = nullptr; // of what is compared
  double *pull_x_ = nullptr, *pull_y_ = nullptr; // Σ of a row's, or a column's, slopes, doubled
  T* scores_ = nullptr;                          // of a block; then slopes
  T* panels_ = nullptr;                          // the block's anchors
  worker* all_workers_ = nullptr;
};

template <class T>
double run_anchors(const anchor_function<T>& function, const anchor_job<T>& job, bool gradient,
                   const executor& run_on, workspace* memory) {
  using kernel = anchor_kernel<T>;
  workspace own;
  const auto bytes = kernel(function, job, gradient, run_on, nullptr).scratch_bytes();
  return kernel(function, job, gradient, run_on, (memory ? *memory : own).request(bytes)).run();
}

} // namespace core
} // namespace perdita::inline PERDITA_ABI
