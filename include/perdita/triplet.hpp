// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "core/sequences.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

template <class T> struct triplet_job {
  double margin, power, epsilon;
  bool swap;
  matrix_data<T> embeddings[3]; ///< anchors, positives, negatives
  matrix_data<T, true> gradients[3];
  const call_options<T>* call;
  double share;
};

template <class T> class triplet_pass {
  using W = pack<double>;

public:
  triplet_pass(carver& memory, const triplet_job<T>& job)
      : job_(job), cols_(job.embeddings[0].cols), padded_(whole_packs(cols_)) {
    const auto n = static_cast<std::size_t>(padded_);
    for (double*& row : rows_)
      row = memory.take<double>(n);
    for (double*& u : offsets_)
      u = memory.take<double>(n);
    out_ = memory.take<double>(n);
    stage_ = memory.take<T>(n);
  }

  double run(index r) const {
    const auto& call = *job_.call;
    const double weight = weight_of(call, r);
    outcome found{};
    if (weight != 0)
      found = find(r);
    // Without weight, upstream does not matter, NaN neither.
    const double scale = times(weight, upstream_of(call, r) * static_cast<double>(call.scale));
    if (job_.gradients[0])
      for (int k = 0; k < 3; ++k)
        emit(k, r, found, scale);
    const double value = times(weight, found.value);
    if (call.values.data)
      call.values[r] = static_cast<T>(value);
    return value;
  }

private:
  enum pair { near, far, swapped, pairs }; // a − p, a − n, p − n

  struct outcome {
    double value;
    double factor[pairs]; ///< of the distances in the value: 1, −1 or 0; NaN where it is
  };

  outcome find(index r) const {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (int k = 0; k < 3; ++k)
      read_row(job_.embeddings[k], r, stage_, rows_[k]);
    const double to_positive = distance(near, 0, 1);
    double to_negative = distance(far, 0, 2);
    pair other = far;
    if (job_.swap) {
      const double between = distance(swapped, 1, 2);
      if (!(to_negative <= between)) {
        to_negative = between;
        other = swapped;
      }
    }
    const double miss = (to_positive - to_negative) + job_.margin;
    if (!std::isfinite(miss))
      return {nan, {nan, nan, nan}};
    outcome result{std::max(0.0, miss), {}};
    if (miss > 0) {
      result.factor[near] = 1;
      result.factor[other] = -1;
    }
    // What the distance becomes: its slope by the components of the difference.
    if (job_.gradients[0] && miss > 0) {
      to_slope(offsets_[near], to_positive);
      to_slope(offsets_[other], to_negative);
    }
    return result;
  }

  /// ‖x − y + ε‖, and the difference in offsets_[to].
  double distance(pair to, int x, int y) const {
    double* const u = offsets_[to];
    const W epsilon(job_.epsilon);
    W top(0), wrong(0);
    std::fill(rows_[x] + cols_, rows_[x] + padded_, -job_.epsilon);
    std::fill(rows_[y] + cols_, rows_[y] + padded_, 0.0);
    for (index i = 0; i < padded_; i += per_pack) {
      const W d = (W::load(rows_[x] + i) - W::load(rows_[y] + i)) + epsilon;
      d.store(u + i);
      top = max(abs(d), top);
      wrong += d - d; // NaN where d is no finite number
    }
    const double most = max_lanes(top);
    if (sum_lanes(wrong) != 0)
      return std::numeric_limits<double>::quiet_NaN();
    if (most == 0 || std::isinf(job_.power))
      return most;
    return most * std::pow(sum_of_powers(u, most), 1 / job_.power);
  }
  /// Σ (|u| / top)^p
  double sum_of_powers(const double* u, double top) const {
    wide_lanes<double> sum;
    sum.clear();
    exact_sum general;
    for (index i = 0; i < padded_; i += per_pack) {
      const W share = abs(W::load(u + i)) / W(top);
      if (job_.power == 1)
        sum.add(share);
      else if (job_.power == 2)
        sum.add(share * share);
    }
    for (index i = 0; i < cols_ && job_.power != 1 && job_.power != 2; ++i)
      general.add(std::pow(std::fabs(u[i]) / top, job_.power));
    return sum.total() + general.value();
  }

  /// u becomes u |u|^(p − 2) / D^(p − 1), of the largest norm: the sign where |u| is D, shared.
  void to_slope(double* u, double norm) const {
    if (norm == 0)
      return;
    const double p = job_.power;
    if (p == 2) {
      for (index i = 0; i < padded_; i += per_pack)
        (W::load(u + i) / W(norm)).store(u + i);
      return;
    }
    double ties = 0;
    for (index i = 0; i < cols_ && std::isinf(p); ++i)
      ties += std::fabs(u[i]) == norm;
    for (index i = 0; i < cols_; ++i) {
      const double size = std::fabs(u[i]);
      double slope = 1;
      if (std::isinf(p))
        slope = size == norm ? 1 / ties : 0;
      else if (p != 1)
        slope = std::pow(size / norm, p - 1);
      u[i] = u[i] == 0 ? 0 : std::copysign(slope, u[i]);
    }
  }

  /// The gradient of matrix k, in which it is the first of a difference, or the second.
  void emit(int k, index r, const outcome& found, double scale) const {
    static constexpr double signs[3][pairs] = {{1, 1, 0}, {-1, 0, 1}, {0, -1, -1}};
    std::fill(out_, out_ + padded_, found.value == found.value ? 0 : found.value);
    for (int q = 0; q < pairs; ++q)
      if (const double factor = signs[k][q] * found.factor[q]; factor != 0 && factor == factor)
        for (index i = 0; i < padded_; i += per_pack)
          fma(W(factor), W::load(offsets_[q] + i), W::load(out_ + i)).store(out_ + i);
    const double factor = scale * job_.share;
    for (index i = 0; i < padded_; i += per_pack)
      (W::load(out_ + i) * W(factor)).store(out_ + i);
    write_row(job_.gradients[k], r, out_, job_.call->accumulate, stage_);
  }

  const triplet_job<T>& job_;
  index cols_, padded_;
  double *rows_[3], *offsets_[pairs], *out_;
  T* stage_;
};

} // namespace core

/// Triplet margin loss, as PyTorch's triplet_margin_loss: an embedding a (the anchor) should be
/// nearer to p (the positive) than to n (the negative), by the margin m.
///
///   ℓ = max(0, m + D(a, p) − D(a, n)),  D(x, y) = ‖x − y + ε‖_p
///   ∂D/∂x_i = u_i |u_i|^(p − 2) / D^(p − 1) = −∂D/∂y_i,  u = x − y + ε
///
/// and for m + D(a, p) ≤ D(a, n), at the kink too, all gradients are 0 (at the kink, PyTorch has
/// the slopes of the other side). With `swap`, D(p, n) stands for D(a, n) where it is smaller.
/// ε is added to every component of the difference: D(x, y) is not D(y, x), and D(x, x) is
/// ε d^(1/p), whose gradient is finite. With ε = 0, a distance of 0 has the gradient 0. For p = 1 a
/// component of 0 has the slope 0; for p = ∞, D is the largest |u_i|, and components that are the
/// largest together share its slope.
///
/// Shapes: the three matrices and their gradients are triplets × features, of T (or 16-bit storage
/// where T is float). The gradients lie apart from each other and from the embeddings. Nothing
/// overflows unless a difference or D does; that, NaN, or an infinity makes its triplet NaN.
/// Call options as for losses of rows, a triplet being a row; no by-products but `values`.
/// Everything is computed in double, and no bit depends on the number of threads. p other than 1,
/// 2 and ∞ takes two calls of std::pow per component. Throws std::invalid_argument.
/// Source: PyTorch's TripletMarginLoss; Balntas, Riba, Ponsa, Mikolajczyk, "Learning local feature
/// descriptors with triplets and shallow convolutional neural networks", BMVC 2016 (the swap).
///
///   perdita::triplet_margin<float> loss({.margin = 0.5f, .swap = true});
///   float value = loss(anchors, positives, negatives, d_anchors, d_positives, d_negatives);
template <class T = float> class triplet_margin {
public:
  using value_type = T;
  struct options {
    T margin = 1;          ///< m, finite
    double power = 2;      ///< p of the norm: 1 or more, infinity too
    double epsilon = 1e-6; ///< ε ≥ 0, added to each component of a difference
    bool swap = false;     ///< D(p, n) in place of D(a, n) where it is smaller
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "triplet_margin";

  triplet_margin() : triplet_margin(options{}) {}
  explicit(false) triplet_margin(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require(o.power >= 1, name, "power", o.power, "a number of 1 or more");
    core::not_negative(name, "epsilon", o.epsilon);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class A, class P, class N>
  requires core::scores_like<A, T> && core::scores_like<P, T> && core::scores_like<N, T> T
  operator()(A&& anchors, P&& positives, N&& negatives, const call_options<T>& call = {}) const {
    auto job = make_job(anchors, positives, negatives, call);
    return run(job);
  }
  /// The reduced value, and the gradients with respect to all three.
  template <class A, class P, class N, class G, class H, class I>
  requires core::scores_like<A, T> && core::scores_like<P, T> && core::scores_like<N, T> &&
      core::gradient_like<G, T> && core::gradient_like<H, T> && core::gradient_like<I, T>
          T operator()(A&& anchors, P&& positives, N&& negatives, G&& anchor_gradient,
                       H&& positive_gradient, I&& negative_gradient,
                       const call_options<T>& call = {}) const {
    auto job = make_job(anchors, positives, negatives, call);
    set_gradient(job, 0, core::as_matrix(anchor_gradient), "rows of the anchors' gradient",
                 "columns of the anchors' gradient", "the anchors' gradient");
    set_gradient(job, 1, core::as_matrix(positive_gradient), "rows of the positives' gradient",
                 "columns of the positives' gradient", "the positives' gradient");
    set_gradient(job, 2, core::as_matrix(negative_gradient), "rows of the negatives' gradient",
                 "columns of the negatives' gradient", "the negatives' gradient");
    core::extent memory[6];
    for (int k = 0; k < 3; ++k) {
      memory[k] = core::bytes_of(job.gradients[k]);
      memory[3 + k] = core::bytes_of(job.embeddings[k]);
    }
    core::require_apart(name, memory, 3);
    return run(job);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  template <class A, class P, class N>
  core::triplet_job<T> make_job(A& anchors, P& positives, N& negatives,
                                const call_options<T>& call) const {
    core::triplet_job<T> job{static_cast<double>(options_.margin),
                             options_.power,
                             options_.epsilon,
                             options_.swap,
                             {core::matrix_data<T>(core::as_matrix(anchors)),
                              core::matrix_data<T>(core::as_matrix(positives)),
                              core::matrix_data<T>(core::as_matrix(negatives))},
                             {},
                             &call,
                             1};
    const auto& a = job.embeddings[0];
    const char* const of = "as many as the anchors have";
    checks.memory("anchors", a.data, a.rows * a.cols);
    if (a.rows > 0)
      core::require(a.cols > 0, name, "columns", a.cols, "at least 1 feature");
    checks.size("rows of the positives", job.embeddings[1].rows, a.rows, of);
    checks.size("columns of the positives", job.embeddings[1].cols, a.cols, of);
    checks.memory("positives", job.embeddings[1].data, a.rows * a.cols);
    checks.size("rows of the negatives", job.embeddings[2].rows, a.rows, of);
    checks.size("columns of the negatives", job.embeddings[2].cols, a.cols, of);
    checks.memory("negatives", job.embeddings[2].data, a.rows * a.cols);
    checks.call(call, a.rows, false, "as many as there are triplets");
    return job;
  }
  template <class G>
  static void set_gradient(core::triplet_job<T>& job, int k, const matrix_view<G>& g,
                           const char* rows, const char* columns, const char* memory) {
    const char* const of = "as many as the anchors have";
    checks.size(rows, g.rows, job.embeddings[0].rows, of);
    checks.size(columns, g.cols, job.embeddings[0].cols, of);
    checks.memory(memory, g.data, g.rows * g.cols);
    job.gradients[k] = core::matrix_data<T, true>(g);
  }
  T run(core::triplet_job<T>& job) const {
    const index triplets = job.embeddings[0].rows;
    job.share = core::share_of(*job.call, options_.reduction, triplets);
    const double total = core::sum_of_sequences<T>(
        triplets, *job.call, [&](core::carver& c) { return core::triplet_pass<T>(c, job); });
    return static_cast<T>(job.share == 0 ? 0 : total * job.share);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
