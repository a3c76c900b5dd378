// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "core/integral_data.hpp"
#include "core/row_loss.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// What predictions p and targets t have in common, and what not. No term is below 0 where both
/// are in [0, 1], so that nothing cancels where they agree.
struct overlap_sums {
  double both = 0;   ///< Σ p t
  double missed = 0; ///< Σ t (1 − p); nothing where squares are added up
  double extra = 0;  ///< Σ p (1 − t), or Σ (p − t)²
};

/// Slopes are t u + (1 − t) v or, where squares are added up, (p − t) u + p v.
struct overlap_outcome {
  double value = 0, u = 0, v = 0;
};

/// Classes of pixels: image i says what the targets of the predictions' rows i K to i K + K − 1
/// are, K the number of classes; or, where there is only one, it is a mask of that.
template <class T> struct label_map {
  matrix_data<T> labels;
  index classes = 1;
  std::int64_t ignored = 0;
  void (*compare)(const label_map&, const unsigned char*, index, std::int64_t, T*) = nullptr;

  template <class L>
  label_map(const matrix_view<L>& map, index rows, std::int64_t ignore_index)
      : labels(integral_data<T>(map)), classes(map.rows > 0 ? rows / map.rows : 1),
        ignored(ignore_index), compare(&compare_labels<std::remove_const_t<L>>) {}
  std::int64_t largest() const { return classes == 1 ? 1 : classes - 1; }
  /// Of row r of the predictions: 1 where its class is, 0 elsewhere, −1 where nothing counts.
  void read(index r, index c, index n, T* out) const {
    compare(*this, labels.at(r / classes, c), n, classes == 1 ? 1 : r % classes, out);
  }

private:
  template <class L>
  static void compare_labels(const label_map& map, const unsigned char* p, index n,
                             std::int64_t wanted, T* out) {
    const L* of_pixels = reinterpret_cast<const L*>(p);
    for (index i = 0; i < n; ++i) {
      const L label = of_pixels[i * map.labels.col_stride];
      out[i] = std::cmp_equal(label, map.ignored) ? T(-1)
               : std::cmp_equal(label, wanted)    ? T(1)
                                                  : T(0);
    }
  }
};

/// Sums and slopes of matrices of which each row is one subject, or all rows together are. Rows are
/// cut into pieces, whose sums are added up in order, whoever makes them.
template <class T, class Targets = matrix_data<T>> class overlap_kernel {
  using V = pack<T>;
  using W = pack<double>;
  static constexpr index width = static_cast<index>(lanes<T>);
  static constexpr index chunk = 512, piece = 16384, task_elements = 32768;
  static constexpr bool has_holes = std::is_same_v<Targets, label_map<T>>;

public:
  overlap_kernel(const matrix_data<T>& predictions, const Targets& targets,
                 const matrix_data<T, true>& gradient, const row_job<T>& job, bool squared)
      : predictions_(predictions), targets_(targets), gradient_(gradient), job_(job),
        squared_(squared), rows_(predictions.rows), cols_(predictions.cols),
        pieces_in_row_((cols_ + piece - 1) / piece), pieces_(rows_ * pieces_in_row_),
        subjects_(job.scores.rows), pieces_in_subject_(pieces_ / subjects_) {}

  static std::size_t scratch_bytes(index rows, index cols, index subjects) {
    carver memory;
    memory.take<overlap_sums>(static_cast<std::size_t>(rows * ((cols + piece - 1) / piece)));
    memory.take<overlap_outcome>(static_cast<std::size_t>(subjects));
    return memory.used();
  }
  /// Σ of the subjects' weighted values; their gradients, where there is room for them.
  template <class Formula>
  double run(const Formula& formula, const executor& run_on, std::byte* scratch) const {
    carver memory(scratch);
    const auto sums = memory.take<overlap_sums>(static_cast<std::size_t>(pieces_));
    const auto outcomes = memory.take<overlap_outcome>(static_cast<std::size_t>(subjects_));
    for_pieces(run_on, [&](index p, index r, index c, index n) { sums[p] = sum_up(r, c, n); });
    value_sum total;
    for (index s = 0; s < subjects_; ++s) {
      outcomes[s] = finish(formula, s, sums + s * pieces_in_subject_);
      if (job_.counts(s, 0))
        store_value(job_, s, outcomes[s].value, total);
      else
        store_ignored_report(job_, s);
    }
    if (gradient_)
      for_pieces(run_on, [&](index p, index r, index c, index n) {
        const index s = p / pieces_in_subject_;
        emit(outcomes[s], job_.counts(s, 0), r, c, n);
      });
    exact_sum sum;
    total.add_to(sum);
    return sum.value();
  }

private:
  /// f(number of the piece, its row, first column, columns)
  template <class F> void for_pieces(const executor& run_on, F f) const {
    const index per_task = std::max<index>(1, task_elements / std::min(cols_, piece));
    const auto work = [&](std::size_t task) {
      const index first = static_cast<index>(task) * per_task;
      for (index p = first; p < std::min(pieces_, first + per_task); ++p) {
        const index c = p % pieces_in_row_ * piece;
        f(p, p / pieces_in_row_, c, std::min(piece, cols_ - c));
      }
    };
    run_on(static_cast<std::size_t>((pieces_ + per_task - 1) / per_task), work);
  }

  template <class Formula>
  overlap_outcome finish(const Formula& formula, index subject, const overlap_sums* sums) const {
    exact_sum both, missed, extra;
    for (index p = 0; p < pieces_in_subject_; ++p) {
      both.add(sums[p].both);
      missed.add(sums[p].missed);
      extra.add(sums[p].extra);
    }
    overlap_outcome out = formula({both.value(), missed.value(), extra.value()});
    const double scale = job_.row_scale(subject);
    constexpr double most = std::numeric_limits<T>::max(); // so that 0 of it is 0
    out.u = std::clamp(out.u * scale, -most, most);
    out.v = std::clamp(out.v * scale, -most, most);
    return out;
  }

  struct lane_sums {
    W both = W(0), missed = W(0), extra = W(0);
    PERDITA_INLINE void add(const W& p, const W& t, bool squared) {
      both = fma(p, t, both);
      if (squared) {
        extra = fma(p - t, p - t, extra);
      } else {
        missed = fma(t, W(1) - p, missed);
        extra = fma(p, W(1) - t, extra);
      }
    }
    PERDITA_INLINE void add(const pack<float>& p, const pack<float>& t, bool squared) {
      add(widen_low(p), widen_low(t), squared);
      add(widen_high(p), widen_high(t), squared);
    }
  };

  overlap_sums sum_up(index r, index c, index n) const {
    wide_lanes<double> both, missed, extra; // of short sums
    for (auto* sum : {&both, &missed, &extra})
      sum->clear();
    alignas(64) T stage[2][chunk];
    for (index done = 0; done < n; done += chunk) {
      const index m = std::min(chunk, n - done);
      const T* const p = look(predictions_, r, c + done, m, stage[0]);
      const T* const t = look(targets_, r, c + done, m, stage[1]);
      lane_sums lane;
      for (index i = 0; i < m; i += width) {
        V x = first(p + i, m - i), y = first(t + i, m - i);
        close_holes(x, y);
        lane.add(x, y, squared_);
      }
      both.add(lane.both);
      missed.add(lane.missed);
      extra.add(lane.extra);
    }
    return {both.total(), missed.total(), extra.total()};
  }

  void emit(const overlap_outcome& outcome, bool counts, index r, index c, index n) const {
    if (!counts && job_.accumulate)
      return;
    const V u(static_cast<T>(outcome.u)), v(static_cast<T>(outcome.v));
    alignas(64) T stage[4][chunk];
    for (index done = 0; done < n; done += chunk) {
      const index m = std::min(chunk, n - done);
      const T* const p = look(predictions_, r, c + done, m, stage[0]);
      const T* const t = look(targets_, r, c + done, m, stage[1]);
      if (job_.accumulate)
        gradient_.reader(gradient_.at(r, c + done), gradient_.col_stride, m, stage[2]);
      for (index i = 0; i < m; i += width) {
        V x = first(p + i, m - i), y = first(t + i, m - i);
        const auto hole = close_holes(x, y);
        V slope =
            squared_ ? fma(x - y, u, select(y == V(0), V(0), y * v)) : fma(y, u, (V(1) - y) * v);
        if constexpr (has_holes)
          slope = select(hole, V(0), slope);
        if (!counts)
          slope = V(0);
        if (job_.accumulate)
          slope += first(stage[2] + i, m - i);
        slope.store(stage[3] + i);
      }
      gradient_.write(r, c + done, m, stage[3]);
    }
  }

  /// Nothing predicted, and nothing there, where nothing counts.
  static PERDITA_INLINE auto close_holes(V& prediction, V& target) {
    const auto hole = target < V(0);
    if constexpr (has_holes) {
      prediction = select(hole, V(0), prediction);
      target = select(hole, V(0), target);
    }
    return hole;
  }
  template <class From>
  static const T* look(const From& from, index r, index c, index n, T* stage) {
    if constexpr (std::is_same_v<From, matrix_data<T>>)
      if (from.direct() && from.col_stride == 1)
        return from.pointer(r, c);
    from.read(r, c, n, stage);
    return stage;
  }
  /// Zeros, which add nothing, after the last.
  static V first(const T* p, index n) { return n >= width ? V::load(p) : load_first(p, n, V(0)); }

  const matrix_data<T>& predictions_;
  const Targets& targets_;
  const matrix_data<T, true>& gradient_;
  const row_job<T>& job_;
  bool squared_;
  index rows_, cols_, pieces_in_row_, pieces_, subjects_, pieces_in_subject_;
};

/// Rays through a volume along one axis. Voxel k of ray (o, i) is o outer_step + i inner_step +
/// k step; rays are numbered row by row, as the voxels of the projection.
struct volume_rays {
  index outer, inner, length;
  index outer_step, inner_step, step;

  volume_rays(index depth, index height, index columns, int axis) {
    const index shape[] = {depth, height, columns};
    length = shape[axis];
    step = axis == 0 ? height * columns : axis == 1 ? columns : 1;
    outer = axis == 1 ? depth : 1;
    outer_step = height * columns;
    inner = (axis == 2 ? depth * height : axis == 1 ? columns : height * columns);
    inner_step = axis == 2 ? columns : 1;
  }
  index count() const { return outer * inner; }
  index voxels() const { return count() * length; }
};

template <class T> class projection_kernel {
  static constexpr index chunk = 512;

public:
  projection_kernel(const volume_rays& rays, index rows, const executor& run_on)
      : rays_(rays), rows_(rows), run_on_(run_on) {}

  /// The largest voxel of each ray; NaN where there is one.
  void project(const matrix_data<T>& volume, T* result) const {
    for_rays([&](index r, index first, index n, index voxel) {
      alignas(64) T x[chunk];
      T* const top = result + r * rays_.count() + first;
      read(volume, r, voxel, n, top);
      for (index k = 1; k < rays_.length; ++k) {
        read(volume, r, voxel + k * rays_.step, n, x);
        for (index i = 0; i < n; ++i)
          top[i] = top[i] >= x[i] || top[i] != top[i] ? top[i] : x[i];
      }
    });
  }
  /// A projection's slopes to the voxels that it came from: in equal parts where there are several.
  void scatter(const matrix_data<T>& volume, const T* tops, const T* slopes, bool accumulate,
               const matrix_data<T, true>& gradient) const {
    for_rays([&](index r, index first, index n, index voxel) {
      alignas(64) T x[chunk], ties[chunk], before[chunk];
      const T* const top = tops + r * rays_.count() + first;
      const T* const slope = slopes + r * rays_.count() + first;
      std::fill_n(ties, n, T(0));
      for (index k = 0; k < rays_.length; ++k) {
        read(volume, r, voxel + k * rays_.step, n, x);
        for (index i = 0; i < n; ++i)
          ties[i] += x[i] == top[i] ? T(1) : T(0);
      }
      for (index k = 0; k < rays_.length; ++k) {
        const index at = voxel + k * rays_.step;
        read(volume, r, at, n, x);
        for (index i = 0; i < n; ++i)
          x[i] = slope[i] != slope[i] ? slope[i] : x[i] == top[i] ? slope[i] / ties[i] : T(0);
        if (accumulate) {
          read(gradient, r, at, n, before);
          for (index i = 0; i < n; ++i)
            x[i] += before[i];
        }
        gradient.writer(gradient.at(r, at), gradient.col_stride * rays_.inner_step, n, x);
      }
    });
  }

private:
  /// f(row, first ray, rays, first voxel)
  template <class F> void for_rays(F f) const {
    const index blocks = (rays_.inner + chunk - 1) / chunk, slabs = rays_.outer * blocks;
    const auto work = [&](std::size_t task) {
      const index at = static_cast<index>(task), slab = at % slabs;
      const index o = slab / blocks, i = slab % blocks * chunk;
      f(at / slabs, o * rays_.inner + i, std::min(chunk, rays_.inner - i),
        o * rays_.outer_step + i * rays_.inner_step);
    };
    run_on_(static_cast<std::size_t>(rows_ * slabs), work);
  }
  template <bool M>
  void read(const matrix_data<T, M>& from, index r, index voxel, index n, T* to) const {
    from.reader(from.at(r, voxel), from.col_stride * rays_.inner_step, n, to);
  }

  volume_rays rays_;
  index rows_;
  const executor& run_on_;
};

/// Of squares: the denominator is 2 Σ p t + Σ (p − t)² + s, and slopes are u (p − t) + v t, of
/// which nothing cancels.
struct dice_formula {
  double smoothing;
  bool squared;

  overlap_outcome operator()(const overlap_sums& s) const {
    const double apart = s.missed + s.extra, shared = 2 * s.both + smoothing;
    const double all = shared + apart;
    if (all == 0)
      return {};
    if (squared)
      return {apart / all, 2 * (shared / all) / all, -2 * (apart / all) / all};
    return {apart / all, -(1 + apart / all) / all, (shared / all) / all};
  }
};

struct tversky_formula {
  static constexpr bool squared = false;
  double alpha, exponent, smoothing;

  overlap_outcome operator()(const overlap_sums& s) const {
    const double beta = 1 - alpha, apart = alpha * s.missed + beta * s.extra;
    const double shared = s.both + smoothing, all = shared + apart;
    if (all == 0)
      return {};
    const double miss = apart / all; // 1 − TI
    const double size = std::fabs(miss);
    const double steep = miss == 0 && exponent < 1
                             ? 0
                             : std::copysign(exponent, miss) * std::pow(size, exponent - 1);
    const double of_shared = shared / all;
    return {std::pow(size, exponent), -steep * ((alpha * of_shared + miss) / all),
            steep * (beta * of_shared / all)};
  }
};

} // namespace core

namespace core {

template <class M>
concept label_map_like = matrix_like<M> && label_type<typename element_of<M>::type>;

} // namespace core

/// Base of the losses of how far two sets overlap. Derived declares what a row_loss does, and
/// formula(): sums → outcome.
template <class Derived, class T> class overlap_loss : public row_loss<Derived, T> {
public:
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;
  static constexpr bool takes_label_maps = true; ///< hidden by losses that do not

  /// The reduced value. Predictions and targets are rows × elements, of T (or 16-bit storage where
  /// T is float).
  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& predictions, Y&& targets, const call_options<T>& call = {}) const {
    return run(core::as_matrix(predictions), core::as_matrix(targets), matrix_view<T>(), call,
               false);
  }
  /// The reduced value, and its gradient with respect to the predictions, written (or added) to
  /// `gradient`: a buffer of its own, or the predictions themselves.
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<G, T> T
  operator()(X&& predictions, Y&& targets, G&& gradient, const call_options<T>& call = {}) const {
    return run(core::as_matrix(predictions), core::as_matrix(targets), core::as_matrix(gradient),
               call, true);
  }
  /// The same, with the classes of pixels for targets.
  template <class X, core::label_map_like Y>
  requires core::scores_like<X, T> T operator()(X&& predictions, Y&& labels,
                                                const call_options<T>& call = {}) const {
    return run_map(core::as_matrix(predictions), core::as_matrix(labels), matrix_view<T>(), call,
                   false);
  }
  template <class X, core::label_map_like Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T> T
  operator()(X&& predictions, Y&& labels, G&& gradient, const call_options<T>& call = {}) const {
    return run_map(core::as_matrix(predictions), core::as_matrix(labels), core::as_matrix(gradient),
                   call, true);
  }

protected:
  void check_shape(const char* what, index rows, index cols, index wanted_rows,
                   index wanted_cols) const {
    const auto text = [](index r, index c) { return core::to_text(r) + " x " + core::to_text(c); };
    if (rows != wanted_rows || cols != wanted_cols) [[unlikely]]
      core::fail(Derived::name, std::string("shape of the ") + what, text(rows, cols),
                 text(wanted_rows, wanted_cols));
  }
  /// Of targets that have `given`, next to predictions. Hidden by losses that take others.
  index target_columns(index prediction_columns, index /*given*/) const {
    return prediction_columns;
  }

  static std::size_t overlap_bytes(index rows, index cols, const core::row_job<T>& job) {
    return core::overlap_kernel<T>::scratch_bytes(rows, cols, job.scores.rows);
  }
  template <class Targets>
  double run_overlap(const core::matrix_data<T>& predictions, const Targets& targets,
                     const core::matrix_data<T, true>& gradient, const core::row_job<T>& job,
                     const executor& run_on, std::byte* scratch) const {
    const auto formula = self().formula();
    return core::overlap_kernel<T, Targets>(predictions, targets, gradient, job, formula.squared)
        .run(formula, run_on, scratch);
  }
  template <class Targets>
  double run_overlap(const core::row_job<T>& given, const Targets& targets,
                     const core::row_job<T>& job, const call_options<T>& call) const {
    workspace own;
    workspace& memory = call.memory ? *call.memory : own;
    return run_overlap(given.scores, targets, given.gradient, job, call.run_on,
                       memory.request(overlap_bytes(given.scores.rows, given.scores.cols, job)));
  }
  /// What most losses do; mip_tversky hides it.
  double evaluate(const core::row_job<T>& given, const core::row_job<T>& job,
                  const call_options<T>& call) const {
    return run_overlap(given, given.soft, job, call);
  }

private:
  friend row_loss<Derived, T>;
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  template <class F> void visit(const core::row_job<T>&, F f) const { f(self().formula()); }

  template <class S, class Y, class G>
  T run(const matrix_view<S>& predictions, const matrix_view<Y>& targets,
        const matrix_view<G>& gradient, const call_options<T>& call, bool has_gradient) const {
    core::row_job<T> given;
    given.name = Derived::name;
    given.scores = core::matrix_data<T>(predictions);
    given.soft = core::matrix_data<T>(targets);
    given.gradient = core::matrix_data<T, true>(gradient);
    check_shape("targets", targets.rows, targets.cols, predictions.rows,
                self().target_columns(predictions.cols, targets.cols));
    check_call(given, call, has_gradient);
    return drive_subjects(given, call, [&](const core::row_job<T>& job) {
      return self().evaluate(given, job, call);
    });
  }
  template <class S, class L, class G>
  T run_map(const matrix_view<S>& predictions, const matrix_view<L>& labels,
            const matrix_view<G>& gradient, const call_options<T>& call, bool has_gradient) const {
    static_assert(Derived::takes_label_maps, "this loss takes its targets as numbers");
    const core::label_map<T> map(labels, predictions.rows, self().settings().ignore_index);
    if (map.classes < 1 || labels.rows * map.classes != predictions.rows)
      core::fail(Derived::name, "rows of the predictions", core::to_text(predictions.rows),
                 "a multiple of those of the labels, " + core::to_text(labels.rows));
    check_shape("labels", labels.rows, labels.cols, labels.rows, predictions.cols);
    core::row_job<T> given;
    given.name = Derived::name;
    given.scores = core::matrix_data<T>(predictions);
    given.soft = map.labels;
    given.gradient = core::matrix_data<T, true>(gradient);
    check_call(given, call, has_gradient);
    check_labels(labels, map);
    return drive_subjects(given, call, [&](const core::row_job<T>& job) {
      return run_overlap(given, map, job, call);
    });
  }
  template <class L>
  void check_labels(const matrix_view<L>& labels, const core::label_map<T>& map) const {
    for (index r = 0; r < labels.rows; ++r)
      for (index c = 0; c < labels.cols; ++c) {
        const L label = labels(r, c);
        const bool known =
            std::cmp_greater_equal(label, 0) && std::cmp_less_equal(label, map.largest());
        if (!known && std::cmp_not_equal(label, map.ignored))
          core::fail_at(Derived::name, "labels", r * labels.cols + c, core::to_text(label),
                        "0 to " + core::to_text(map.largest()) + ", or ignore_index " +
                            core::to_text(map.ignored));
      }
  }
  /// f(job), of a row for each subject, which all rows are together if one value is asked for.
  template <class F>
  T drive_subjects(const core::row_job<T>& given, const call_options<T>& call, F f) const {
    core::row_job<T> job;
    job.name = Derived::name;
    const index rows = given.scores.rows, cols = given.scores.cols;
    const bool one = self().settings().over_batch;
    job.scores.rows = one ? (rows * cols > 0 ? 1 : 0) : rows;
    job.scores.cols = one ? rows * cols : cols;
    return this->drive(job, call, [&](const auto&) { return job.scores.rows > 0 ? f(job) : 0; });
  }

  void check_call(const core::row_job<T>& job, const call_options<T>& call,
                  bool has_gradient) const {
    const index rows = job.scores.rows, cols = job.scores.cols;
    this->require_memory("predictions", job.scores.data, rows * cols);
    this->require_memory("targets", job.soft.data, job.soft.rows * job.soft.cols);
    if (!has_gradient)
      return;
    check_shape("gradient", job.gradient.rows, job.gradient.cols, rows, cols);
    this->require_memory("gradient", job.gradient.data, rows * cols);
    if (core::check_overlap(Derived::name, job) && call.accumulate && rows * cols > 0)
      core::fail(std::string("perdita::") + Derived::name +
                 ": accumulate is true, expected false where the gradient overwrites the "
                 "predictions");
  }
};

/// Soft Dice loss of predictions p and targets t, both in [0, 1], over the elements of a row (an
/// image, or a channel of one),
///
///   ℓ = 1 − (2 Σ p t + s)/(Σ p + Σ t + s) = Σ (p + t − 2 p t)/U,   U the denominator
///   ∂ℓ/∂p = (2 Σ p t + s − 2 t U)/U²
///   squared:  ℓ = 1 − (2 Σ p t + s)/(Σ p² + Σ t² + s) = Σ (p − t)²/U
///   ∂ℓ/∂p = 2 (p − t)/U − 2 p Σ (p − t)²/U²
///
/// computed in the forms on the right, which keep their digits where p is near t.
///
/// Targets are of the predictions' shape, of T (or 16-bit storage where T is float), or a label
/// map: integers, images × pixels, whose label 0 to K − 1 says which of the image's K rows of
/// predictions (rows i K to i K + K − 1, K = rows/images) has the target 1 there; all others have
/// 0. With K = 1 it is a mask, of 0 and 1. Pixels of ignore_index have no part in any row, whatever
/// is predicted there, and their gradient is 0. No one-hot matrix is made. Predictions whose
/// channels are last are rows too, with the strides of a matrix_view.
///
/// U = 0 (nothing is there, nothing predicted, s = 0): value and gradient are 0. Outside [0, 1] the
/// formulas hold as they stand. NaN or an infinity makes its row NaN.
///
/// Reductions, row weights, `accumulate` and the rest of the call options: as cross_entropy, a row
/// being a row. No by-products but `values`. With over_batch all elements together have one value:
/// the call's row_weights, upstream and values then have one entry. Sums are in double, and no bit
/// depends on the number of threads. std::invalid_argument where shapes differ or memory is
/// missing.
/// Source: Milletari, Navab, Ahmadi, "V-Net", 3DV 2016 (squared); Sudre et al., DLMIA 2017.
template <class T = float> class dice : public overlap_loss<dice<T>, T> {
public:
  struct options {
    T smoothing = 1;         ///< s ≥ 0
    bool squared = false;    ///< squares in the denominator
    bool over_batch = false; ///< one value for all rows
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< of label maps
  };
  static constexpr const char* name = "dice";

  dice() : dice(options{}) {}
  explicit(false) dice(const options& o) : options_(o) {
    core::not_negative(name, "smoothing", o.smoothing);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend overlap_loss<dice<T>, T>;
  core::dice_formula formula() const {
    return {static_cast<double>(options_.smoothing), options_.squared};
  }
  options options_;
};

/// Tversky loss, with an exponent focal Tversky loss, of predictions p and targets t in [0, 1],
///
///   TI = (Σ p t + s)/D,   D = Σ p t + α Σ t (1 − p) + (1 − α) Σ p (1 − t) + s
///   ℓ = (1 − TI)^γ,       ∂ℓ/∂p = −γ (1 − TI)^{γ−1} (t D − (Σ p t + s)(1 − α))/D²
///
/// α is on what is missed. 1 − TI is computed as what is not shared over D, with all its digits.
/// Where TI = 1 and γ < 1 the slope is infinite; the gradient is 0 there, by definition. D = 0:
/// value and gradient are 0. α = ½, γ = 1 is dice with twice the smoothing. Outside [0, 1] it is
/// |1 − TI|^γ. Everything else: as dice.
/// Source: Salehi, Erdogmus, Gholipour, MLMI 2017 (whose β is this α); Abraham, Khan, "A novel
/// focal Tversky loss function", ISBI 2019 (whose 1/γ is this γ).
template <class T = float> class tversky : public overlap_loss<tversky<T>, T> {
public:
  struct options {
    T alpha = T(0.7); ///< α in [0, 1]: weight of false negatives; false positives have 1 − α
    T exponent = T(0.75);    ///< γ > 0; 1 is the Tversky loss
    T smoothing = 1;         ///< s ≥ 0
    bool over_batch = false; ///< one value for all rows
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< of label maps
  };
  static constexpr const char* name = "tversky";

  tversky() : tversky(options{}) {}
  explicit(false) tversky(const options& o) : options_(o) { check_options(name, o); }
  const options& settings() const { return options_; }

  template <class Options> static void check_options(const char* of, const Options& o) {
    core::require(o.alpha >= 0 && o.alpha <= 1, of, "alpha", o.alpha, "a number in [0, 1]");
    core::require(o.exponent > 0 && std::isfinite(o.exponent), of, "exponent", o.exponent,
                  "a finite number above 0");
    core::require(o.smoothing >= 0 && std::isfinite(o.smoothing), of, "smoothing", o.smoothing,
                  "a finite number, 0 or more");
    core::require_reduction(of, o.reduction);
  }

private:
  friend overlap_loss<tversky<T>, T>;
  core::tversky_formula formula() const {
    return {static_cast<double>(options_.alpha), static_cast<double>(options_.exponent),
            static_cast<double>(options_.smoothing)};
  }
  options options_;
};

/// The focal Tversky loss of maximum-intensity projections: each row is a volume of depth × height
/// × width voxels, of which the largest along an axis counts. The gradient of a pixel goes to the
/// voxel that it shows, in equal parts where several are as large.
///
/// Targets are volumes too, or already their projections (as they must be where predictions are
/// patches and the labels' projection is of the whole): rows × pixels, in the order of the two
/// other axes. A voxel of NaN makes its row NaN, all of it. Takes scratch for three projections.
/// Everything else: as tversky.
/// Source: Chatterjee et al., "SPOCKMIP", 2024.
template <class T = float> class mip_tversky : public overlap_loss<mip_tversky<T>, T> {
public:
  struct options {
    index depth = 1, height = 1, width = 1; ///< of a volume; its columns in row-major order
    int axis = 0;                           ///< 0 the depth, 1 the height, 2 the width
    T alpha = T(0.7);                       ///< α in [0, 1]: weight of false negatives
    T exponent = T(0.75);                   ///< γ > 0
    T smoothing = 1;                        ///< s ≥ 0
    bool over_batch = false;                ///< one value for all rows
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< without effect: there are no labels
  };
  static constexpr const char* name = "mip_tversky";
  static constexpr bool takes_label_maps = false;

  explicit(false) mip_tversky(const options& o) : options_(o) {
    core::require(o.depth > 0, name, "depth", o.depth, "a number of voxels above 0");
    core::require(o.height > 0, name, "height", o.height, "a number of voxels above 0");
    core::require(o.width > 0, name, "width", o.width, "a number of voxels above 0");
    core::require(o.axis >= 0 && o.axis <= 2, name, "axis", o.axis, "0, 1 or 2");
    tversky<T>::check_options(name, o);
  }
  const options& settings() const { return options_; }

private:
  friend overlap_loss<mip_tversky<T>, T>;
  core::tversky_formula formula() const {
    return {static_cast<double>(options_.alpha), static_cast<double>(options_.exponent),
            static_cast<double>(options_.smoothing)};
  }
  core::volume_rays rays() const {
    return {options_.depth, options_.height, options_.width, options_.axis};
  }
  index target_columns(index prediction_columns, index given) const {
    core::require(prediction_columns == rays().voxels(), name, "columns of the predictions",
                  prediction_columns, "depth times height times width");
    return given == rays().count() ? given : prediction_columns;
  }

  double evaluate(const core::row_job<T>& given, const core::row_job<T>& job,
                  const call_options<T>& call) const {
    const index rows = given.scores.rows, pixels = rays().count();
    const auto size = static_cast<std::size_t>(rows * pixels);
    const std::size_t overlap = this->overlap_bytes(rows, pixels, job);
    core::carver counter;
    for (int k = 0; k < 3; ++k)
      counter.take<T>(size);
    workspace own;
    core::carver memory((call.memory ? *call.memory : own).request(counter.used() + overlap));
    T *const tops = memory.take<T>(size), *const labels = memory.take<T>(size),
             *const slopes = memory.take<T>(size);
    const auto scratch = memory.take<std::byte>(overlap);
    const core::projection_kernel<T> projection(rays(), rows, call.run_on);
    projection.project(given.scores, tops);
    core::matrix_data<T> targets = given.soft;
    if (given.soft.cols != pixels) {
      projection.project(given.soft, labels);
      targets = matrix_view<const T>(labels, rows, pixels);
    }
    const core::matrix_data<T> predictions(matrix_view<const T>(tops, rows, pixels));
    core::row_job<T> plain = job; // what is added to lies in the volume
    plain.accumulate = false;
    const core::matrix_data<T, true> to(
        matrix_view<T>(given.gradient ? slopes : nullptr, rows, pixels));
    const double total = this->run_overlap(predictions, targets, to, plain, call.run_on, scratch);
    if (given.gradient)
      projection.scatter(given.scores, tops, slopes, job.accumulate, given.gradient);
    return total;
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
