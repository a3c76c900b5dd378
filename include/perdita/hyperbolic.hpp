// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/paired_kernel.hpp"
#include "core/row_loss.hpp"
#include "core/sequences.hpp"
#include "core/traits.hpp"
#include "cross_entropy.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// 1 − c ‖x‖² with its digits near the border of the ball: squares and their sum have no errors
/// that matter.
inline double gap_to_border(const double* x, index n, double c) {
  exact_sum squares;
  for (index k = 0; k < n; ++k) {
    const double square = x[k] * x[k];
    squares.add(square);
    squares.error += std::fma(x[k], x[k], -square);
  }
  const double most = squares.value(), rest = (squares.sum - most) + squares.error;
  const double product = c * most;
  return (1 - product) - (std::fma(c, most, -product) + c * rest);
}

struct poincare_formula {
  static constexpr bool paired = true;
  double curvature;

  double operator()(const double* u, const double* v, index n, index, double* slopes) const {
    const double near_u = gap_to_border(u, n, curvature), near_v = gap_to_border(v, n, curvature);
    if (!(near_u > 0 && near_v > 0)) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(slopes, n, nan);
      return nan;
    }
    double largest = 0, squares = 0;
    for (index k = 0; k < n; ++k)
      largest = std::fmax(largest, std::fabs(u[k] - v[k]));
    for (index k = 0; k < n && largest > 0; ++k)
      squares += (u[k] - v[k]) / largest * ((u[k] - v[k]) / largest);
    const double length = largest * std::sqrt(squares), root = std::sqrt(curvature);
    const double steep = 2 / std::sqrt(near_u * near_v + curvature * length * length);
    for (index k = 0; k < n; ++k)
      slopes[k] = largest == 0 ? 0
                               : steep * ((u[k] - v[k]) / largest / std::sqrt(squares) +
                                          curvature * length / near_u * u[k]);
    return 2 / root * std::asinh(root * length / std::sqrt(near_u * near_v));
  }
};

/// What hyperbolic_logits computes, on copies in double. m = (−p) ⊕ x is not formed:
///
///   ⟨m, a⟩/(1 − c ‖m‖²) = M/A_x,   M = ⟨w, a⟩ − (c ‖w‖²/β) ⟨p, a⟩,   w = x − p,  β = 1 − c ‖p‖²
class hyperbolic_head {
public:
  hyperbolic_head(double curvature, index points, index classes, index dims, std::byte* scratch)
      : c_(curvature), root_(std::sqrt(curvature)), points_(points), classes_(classes),
        dims_(dims) {
    carver memory(scratch);
    const auto take = [&](index n) { return memory.take<double>(static_cast<std::size_t>(n)); };
    x_ = take(points * dims);
    v_ = take(classes * dims);
    p_ = take(classes * dims);
    a_ = take(classes * dims);
    near_x_ = take(points);
    beta_ = take(classes);
    stretch_ = take(classes);
    across_ = take(classes);
    length_ = take(classes);
    unit_ = take(classes);
    scratch_bytes_ = memory.used();
  }
  std::size_t scratch_bytes() const { return scratch_bytes_; }

  template <class T>
  void read(const matrix_data<T>& points, const matrix_data<T>& offsets,
            const matrix_data<T>& normals) {
    const auto copy = [&](const matrix_data<T>& from, double* to) {
      for (index r = 0; r < from.rows; ++r)
        for (index k = 0; k < dims_; ++k)
          to[r * dims_ + k] = element(from, r, k);
    };
    copy(points, x_);
    copy(offsets, v_);
    copy(normals, a_);
    for (index r = 0; r < points_; ++r) {
      const double gap = gap_to_border(x_ + r * dims_, dims_, c_);
      near_x_[r] = gap > 0 ? gap : std::numeric_limits<double>::quiet_NaN();
    }
    for (index k = 0; k < classes_; ++k)
      prepare(k);
  }

  template <class T>
  void forward(const matrix_data<T, true>& logits, const executor& run_on) const {
    in_tasks(points_, classes_, run_on, [&](index r) {
      for (index k = 0; k < classes_; ++k)
        put(logits, r, k, pair_of(r, k).logit);
    });
  }
  template <class T>
  void backward(const matrix_data<T>& d_logits, const matrix_data<T, true>& d_points,
                const matrix_data<T, true>& d_offsets, const matrix_data<T, true>& d_normals,
                const executor& run_on) const {
    in_tasks(points_, classes_, run_on, [&](index r) {
      std::vector<double> sum(static_cast<std::size_t>(dims_));
      for (index k = 0; k < classes_; ++k)
        if (const double g = element(d_logits, r, k); g != 0)
          add_to_point(r, k, g, sum.data());
      for (index j = 0; j < dims_; ++j)
        put(d_points, r, j, sum[static_cast<std::size_t>(j)]);
    });
    in_tasks(classes_, points_, run_on, [&](index k) {
      std::vector<double> sums(static_cast<std::size_t>(2 * dims_));
      double *of_p = sums.data(), *of_a = of_p + dims_;
      for (index r = 0; r < points_; ++r)
        if (const double g = element(d_logits, r, k); g != 0)
          add_to_class(r, k, g, of_p, of_a);
      through_map(k, of_p);
      for (index j = 0; j < dims_; ++j) {
        put(d_offsets, k, j, of_p[j]);
        put(d_normals, k, j, of_a[j]);
      }
    });
  }

private:
  /// f(i) for i in [0, n), of which each costs `width` pairs.
  template <class F> void in_tasks(index n, index width, const executor& run_on, F f) const {
    const index some = std::max<index>(1, 32768 / std::max<index>(1, width * dims_));
    const auto work = [&](std::size_t task) {
      const index first = static_cast<index>(task) * some;
      for (index i = first; i < std::min(n, first + some); ++i)
        f(i);
    };
    run_on(static_cast<std::size_t>((n + some - 1) / some), work);
  }
  template <class T> static double element(const matrix_data<T>& m, index r, index k) {
    T x;
    m.read(r, k, 1, &x);
    return static_cast<double>(x);
  }
  template <class T>
  static void put(const matrix_data<T, true>& m, index r, index k, double value) {
    const T x = static_cast<T>(value);
    m.write(r, k, 1, &x);
  }
  double dot(const double* a, const double* b) const {
    double sum = 0;
    for (index j = 0; j < dims_; ++j)
      sum += a[j] * b[j];
    return sum;
  }

  /// p = tanh(√c ‖v‖) v/(√c ‖v‖), and so β = 1/cosh². The normal, in which scores are linear but
  /// for its length, is divided by a power of two, so that no square of it leaves the range.
  void prepare(index k) {
    const double* v = v_ + k * dims_;
    double* a = a_ + k * dims_;
    double largest = 0;
    for (index j = 0; j < dims_; ++j)
      largest = std::fmax(largest, std::fabs(a[j]));
    const int power = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
    for (index j = 0; j < dims_; ++j)
      a[j] = std::scalbn(a[j], -power);
    unit_[k] = std::scalbn(1.0, power);
    const double size = root_ * std::sqrt(dot(v, v)), cosh = std::cosh(size);
    stretch_[k] = size == 0 ? 1 : std::tanh(size) / size;
    beta_[k] = 1 / cosh / cosh;
    for (index j = 0; j < dims_; ++j)
      p_[k * dims_ + j] = stretch_[k] * v[j];
    across_[k] = dot(p_ + k * dims_, a);
    length_[k] = std::sqrt(dot(a, a));
  }

  struct pair {
    double logit, arc, s, h; ///< arc = asinh(s), h = 1/√(1 + s²)
    double m, squares;       ///< M of the divided normal, ‖w‖²
  };
  pair pair_of(index r, index k) const {
    const double *x = x_ + r * dims_, *p = p_ + k * dims_, *a = a_ + k * dims_;
    double along = 0, squares = 0;
    for (index j = 0; j < dims_; ++j) {
      const double w = x[j] - p[j];
      along += w * a[j];
      squares += w * w;
    }
    const double m = along - c_ * squares / beta_[k] * across_[k], length = length_[k];
    const double s = length == 0 ? 0 * near_x_[r] : 2 * root_ * m / (length * near_x_[r]);
    const double arc = std::asinh(s);
    return {2 * length / root_ * arc * unit_[k], arc, s, 1 / std::hypot(1, s), m, squares};
  }
  void add_to_point(index r, index k, double g, double* sum) const {
    const pair at = pair_of(r, k);
    const double *x = x_ + r * dims_, *p = p_ + k * dims_, *a = a_ + k * dims_;
    const double near = near_x_[r], e = length_[k] == 0 ? 0 * near : 4 * g * at.h / near * unit_[k];
    const double of_squares = -e * c_ * across_[k] / beta_[k];
    for (index j = 0; j < dims_; ++j)
      sum[j] += e * a[j] + 2 * of_squares * (x[j] - p[j]) + 2 * c_ * e * (at.m / near) * x[j];
  }
  void add_to_class(index r, index k, double g, double* of_p, double* of_a) const {
    const pair at = pair_of(r, k);
    const double *x = x_ + r * dims_, *p = p_ + k * dims_, *a = a_ + k * dims_;
    const double near = near_x_[r], e = length_[k] == 0 ? 0 * near : 4 * g * at.h / near;
    const double ratio = c_ / beta_[k], of_squares = -e * ratio * across_[k];
    const double of_across = -e * ratio * at.squares;
    const double of_beta = e * ratio * at.squares * across_[k] / beta_[k];
    const double of_length =
        length_[k] == 0 ? 0 : g * 2 / root_ * (at.arc - at.s * at.h) / length_[k];
    for (index j = 0; j < dims_; ++j) {
      const double w = x[j] - p[j];
      of_p[j] += ((of_across - e) * a[j] - 2 * of_squares * w - 2 * c_ * of_beta * p[j]) * unit_[k];
      of_a[j] += e * w + of_across * p[j] + of_length * a[j];
    }
  }
  /// The gradient of p becomes that of v.
  void through_map(index k, double* g) const {
    const double* v = v_ + k * dims_;
    const double squares = dot(v, v), t = stretch_[k];
    const double along = squares == 0 ? 0 : (beta_[k] - t) * (dot(g, v) / squares);
    for (index j = 0; j < dims_; ++j)
      g[j] = t * g[j] + along * v[j];
  }

  double c_, root_;
  index points_, classes_, dims_;
  double *x_, *v_, *p_, *a_, *near_x_, *beta_, *stretch_, *across_, *length_, *unit_;
  std::size_t scratch_bytes_ = 0;
};

} // namespace core

template <class T> class pairwise_confusion;

/// Distance of pairs of points u, v in the Poincaré ball of curvature −c, the ball of radius 1/√c,
///
///   d = (2/√c) artanh(√c ‖(−u) ⊕ v‖) = (2/√c) asinh(√c ‖u − v‖/√(A_u A_v)),   A_x = 1 − c ‖x‖²
///   ∂d/∂u = (2/√(A_u A_v + c ‖u − v‖²)) ((u − v)/‖u − v‖ + (c ‖u − v‖/A_u) u)
///
/// computed in the forms with asinh, in which nothing cancels for points that are near each other
/// (no G² − 1 is formed) or near the border. u = v: distance 0 and, by definition, gradient 0.
/// Points on the border or outside, NaN and infinities make their pair NaN.
/// Both matrices are pairs × dimensions; the gradients lie apart from each other and from the
/// points, and take a pass each. Reductions over pairs, row weights, errors: as cross_entropy. No
/// by-products but `values`.
/// Source: Nickel, Kiela, NeurIPS 2017; Ganea, Bécigneul, Hofmann, NeurIPS 2018.
template <class T = float> class poincare_distance : public row_loss<poincare_distance<T>, T> {
public:
  struct options {
    T curvature = 1; ///< c > 0
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< without effect: there are no labels
  };
  static constexpr const char* name = "poincare_distance";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  poincare_distance() : poincare_distance(options{}) {}
  explicit(false) poincare_distance(const options& o) : options_(o) {
    core::positive(name, "curvature", o.curvature);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class U, class V>
  requires core::scores_like<U, T> && core::scores_like<V, T>
      T operator()(U&& u, V&& v, const call_options<T>& call = {}) const {
    return run<false>(core::as_matrix(u), core::as_matrix(v), matrix_view<T>(), call);
  }
  /// The reduced value, and the gradients with respect to both points.
  template <class U, class V, class G, class H>
  requires core::scores_like<U, T> && core::scores_like<V, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(U&& u, V&& v, G&& d_u, H&& d_v, const call_options<T>& call = {}) const {
    const auto first = core::as_matrix(u);
    const auto second = core::as_matrix(v);
    const auto to_first = core::as_matrix(d_u);
    const auto to_second = core::as_matrix(d_v);
    this->check_pair(first, second, to_first, to_second, "rows of the first gradient",
                     "columns of the first gradient", "the first gradient");
    return of_both(first, second, to_first, to_second, call);
  }

private:
  friend row_loss<poincare_distance<T>, T>;
  friend pairwise_confusion<T>;

  template <class U, class V, class G, class H>
  T of_both(const matrix_view<U>& first, const matrix_view<V>& second,
            const matrix_view<G>& to_first, const matrix_view<H>& to_second,
            const call_options<T>& call) const {
    run<true>(second, first, to_second, call);
    return run<true>(first, second, to_first, call);
  }

  template <bool Gradient, class U, class V, class G>
  T run(const matrix_view<U>& first, const matrix_view<V>& second, const matrix_view<G>& gradient,
        const call_options<T>& call) const {
    auto job = this->paired_job(first, second, gradient, "the other points");
    return this->template evaluate<Gradient>(job, call, [&](const auto&, auto f) {
      f(core::poincare_formula{static_cast<double>(options_.curvature)});
    });
  }
  options options_;
};

/// Pairwise confusion in the Poincaré ball: the mean distance of the points in the first half of a
/// batch to those in the second, point i to point n + i of 2 n. Minimised, it keeps a classifier
/// from telling apart what it should not.
///
/// One matrix of points, 2 n × dimensions, with its rows one stride apart, and one gradient of that
/// shape, apart from the points. A pair is a row of the call options. Everything else:
/// as poincare_distance.
/// Source: Narayan, Patel, "Hyp-OC", 2024, whose code has atan for artanh and divides by 2 n; this
/// is the formula.
template <class T = float> class pairwise_confusion {
public:
  using value_type = T;
  using options = typename poincare_distance<T>::options;
  static constexpr const char* name = "pairwise_confusion";

  pairwise_confusion() : pairwise_confusion(options{}) {}
  explicit(false) pairwise_confusion(const options& o) : distance_(o) {}
  const options& settings() const { return distance_.settings(); }

  /// The reduced value.
  template <class X>
  requires core::scores_like<X, T> T operator()(X&& points,
                                                const call_options<T>& call = {}) const {
    const auto x = core::as_matrix(points);
    check(x);
    return distance_(half(x, 0), half(x, 1), call);
  }
  /// The reduced value, and its gradient.
  template <class X, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& points, G&& gradient, const call_options<T>& call = {}) const {
    const auto x = core::as_matrix(points);
    const auto g = core::as_matrix(gradient);
    check(x);
    check(g);
    core::require(g.rows == x.rows, name, "rows of the gradient", g.rows, "as many as of points");
    core::require(g.cols == x.cols, name, "columns of the gradient", g.cols,
                  "as many as of points");
    core::require_memory(name, "gradient", g.data, g.rows * g.cols);
    const core::extent memory[] = {core::bytes_of(core::matrix_data<T, true>(g)),
                                   core::bytes_of(core::matrix_data<T>(x))};
    core::require_apart(name, memory, 1);
    return distance_.of_both(half(x, 0), half(x, 1), half(g, 0), half(g, 1), call);
  }

private:
  template <class S> static void check(const matrix_view<S>& m) {
    core::require(m.rows % 2 == 0, name, "rows", m.rows, "an even number");
    core::require(m.plane_rows == m.rows, name, "rows in a plane", m.plane_rows,
                  "all rows in one plane");
  }
  template <class S> static matrix_view<S> half(const matrix_view<S>& m, index which) {
    const index rows = m.rows / 2;
    S* const at = m.data ? m.data + which * rows * m.row_stride : nullptr;
    return {at, rows, m.cols, m.row_stride, m.col_stride};
  }
  poincare_distance<T> distance_;
};

/// Hyperbolic logistic regression: scores of points x of the Poincaré ball of curvature −c by their
/// signed distance to a hyperplane for each class, through p_k with normal a_k,
///
///   z_k = (2‖a_k‖/√c) asinh(2√c ⟨m, a_k⟩/(‖a_k‖ (1 − c ‖m‖²))),   m = (−p_k) ⊕ x
///   p_k = tanh(√c ‖v_k‖) v_k/(√c ‖v_k‖)
///
/// v_k (offsets) and a_k (normals) are free vectors. Any loss of scores may follow: cross_entropy
/// makes it Hyp-CE. c → 0: 4⟨x − p, a⟩. m is not formed, and nothing cancels where x is near p_k.
/// a_k = 0 has the score 0 and, by definition, no gradient. A point on the border or outside, or
/// NaN, makes its scores NaN. Offsets beyond about 350/√c are on the border too: NaN or infinite.
/// points: rows × dimensions; offsets, normals: classes × dimensions; scores: rows × classes; of T
/// (or 16-bit storage where T is float). Sums are in double, and no bit depends on the number of
/// threads. Outputs lie apart from each other and from d_scores.
/// Source: Ganea, Bécigneul, Hofmann, "Hyperbolic neural networks", NeurIPS 2018 (with the tangent
/// vectors at p_k free: Narayan, Patel, "Hyp-OC", 2024).
template <class T = float> class hyperbolic_logits {
public:
  using value_type = T;
  struct options {
    T curvature = 1; ///< c > 0
  };
  static constexpr const char* name = "hyperbolic_logits";

  hyperbolic_logits() : hyperbolic_logits(options{}) {}
  explicit(false) hyperbolic_logits(const options& o) : options_(o) {
    core::positive(name, "curvature", o.curvature);
  }
  const options& settings() const { return options_; }

  template <class X, class P, class A, class Z>
  requires core::scores_like<X, T> && core::scores_like<P, T> && core::scores_like<A, T> &&
      core::gradient_like<Z, T>
  void operator()(X&& points, P&& offsets, A&& normals, Z&& scores, const executor& run_on = {},
                  workspace* memory = nullptr) const {
    const core::matrix_data<T> x(core::as_matrix(points)), p(core::as_matrix(offsets)),
        a(core::as_matrix(normals));
    const core::matrix_data<T, true> z(core::as_matrix(scores));
    check_inputs(x, p, a);
    check("scores", z, x.rows, p.rows);
    with_head(x, p, a, memory, [&](const auto& head) { head.forward(z, run_on); });
  }
  /// The Jacobian's product with d_scores, for all three inputs. A d_scores of 0 takes all, NaN
  /// too.
  template <class X, class P, class A, class Z, class DX, class DP, class DA>
  requires core::scores_like<X, T> && core::scores_like<P, T> && core::scores_like<A, T> &&
      core::scores_like<Z, T> && core::gradient_like<DX, T> && core::gradient_like<DP, T> &&
      core::gradient_like<DA, T>
  void backward(X&& points, P&& offsets, A&& normals, Z&& d_scores, DX&& d_points, DP&& d_offsets,
                DA&& d_normals, const executor& run_on = {}, workspace* memory = nullptr) const {
    const core::matrix_data<T> x(core::as_matrix(points)), p(core::as_matrix(offsets)),
        a(core::as_matrix(normals)), dz(core::as_matrix(d_scores));
    const core::matrix_data<T, true> dx(core::as_matrix(d_points)), dp(core::as_matrix(d_offsets)),
        da(core::as_matrix(d_normals));
    check_inputs(x, p, a);
    check("d_scores", dz, x.rows, p.rows);
    check("d_points", dx, x.rows, x.cols);
    check("d_offsets", dp, p.rows, p.cols);
    check("d_normals", da, a.rows, a.cols);
    const core::extent memories[] = {core::bytes_of(dx), core::bytes_of(dp), core::bytes_of(da),
                                     core::bytes_of(dz)};
    core::require_apart(name, memories, 3);
    with_head(x, p, a, memory, [&](const auto& head) { head.backward(dz, dx, dp, da, run_on); });
  }

private:
  template <bool M>
  static void check(const char* what, const core::matrix_data<T, M>& m, index rows, index cols) {
    core::require(m.rows == rows, name, (std::string("rows of ") + what).c_str(), m.rows,
                  "the number that the other matrices have");
    core::require(m.cols == cols, name, (std::string("columns of ") + what).c_str(), m.cols,
                  "the number that the other matrices have");
    core::require(m.data || rows * cols == 0, name, what, 0, "a pointer to memory");
  }
  static void check_inputs(const core::matrix_data<T>& x, const core::matrix_data<T>& p,
                           const core::matrix_data<T>& a) {
    check("points", x, x.rows, x.cols);
    check("offsets", p, p.rows, x.cols);
    check("normals", a, p.rows, x.cols);
  }
  template <class F>
  void with_head(const core::matrix_data<T>& x, const core::matrix_data<T>& p,
                 const core::matrix_data<T>& a, workspace* memory, F f) const {
    const auto c = static_cast<double>(options_.curvature);
    const core::hyperbolic_head sizes(c, x.rows, p.rows, x.cols, nullptr);
    workspace own;
    core::hyperbolic_head head(c, x.rows, p.rows, x.cols,
                               (memory ? *memory : own).request(sizes.scratch_bytes()));
    head.read(x, p, a);
    f(head);
  }
  options options_;
};

/// Features into the Poincaré ball of curvature −c: clipped to a length, then through the
/// exponential map at the origin, and no nearer to the border than a margin,
///
///   x = ρ(‖v‖) v/‖v‖,   ρ(s) = tanh(√c min(s, R))/√c,   R = min(clip, artanh(1 − margin)/√c)
///   Jᵀg = (ρ/s) g + (ρ′ − ρ/s)(⟨g, v⟩/s²) v,   s = ‖v‖, ρ′ = 1/cosh²(√c s) up to s = R, then 0
///
/// so that d(0, x) = 2 min(‖v‖, R). v = 0 becomes 0, with the Jacobian 1. NaN or an infinity makes
/// its row NaN. features and points (and the gradients): rows × dimensions of T (or 16-bit storage
/// where T is float). Outputs may be the features or d_points themselves, or lie apart.
/// Throws std::invalid_argument.
/// Source: Ganea, Bécigneul, Hofmann, NeurIPS 2018; clipping: Guo, Wang, Chen, Yu, "Clipped
/// hyperbolic classifiers are super-hyperbolic classifiers", CVPR 2022.
template <class T = float> class exponential_map {
public:
  using value_type = T;
  struct options {
    T curvature = 1;    ///< c > 0
    T clip = 2;         ///< longest feature; infinite: as it is
    T margin = T(1e-3); ///< in (0, 1): relative distance from the border
  };
  static constexpr const char* name = "exponential_map";

  exponential_map() : exponential_map(options{}) {}
  explicit(false) exponential_map(const options& o) : options_(o) {
    core::positive(name, "curvature", o.curvature);
    core::require(o.clip > 0, name, "clip", o.clip, "a number above 0");
    core::require(o.margin > 0 && o.margin < 1, name, "margin", o.margin, "a number in (0, 1)");
  }
  const options& settings() const { return options_; }

  template <class V, class X>
  requires core::scores_like<V, T> && core::gradient_like<X, T>
  void operator()(V&& features, X&& points) const {
    const core::matrix_data<T> v(core::as_matrix(features));
    const core::matrix_data<T, true> x(core::as_matrix(points));
    check("points", v, x);
    for_rows(v, v, x, [&](const double* at, const double*, index n, double* out) {
      const radius of(*this, at, n);
      for (index j = 0; j < n; ++j)
        out[j] = of.ratio * at[j];
    });
  }
  /// The Jacobian's product with d_points.
  template <class V, class X, class D>
  requires core::scores_like<V, T> && core::scores_like<X, T> && core::gradient_like<D, T>
  void backward(V&& features, X&& d_points, D&& d_features) const {
    const core::matrix_data<T> v(core::as_matrix(features)), g(core::as_matrix(d_points));
    const core::matrix_data<T, true> d(core::as_matrix(d_features));
    check("d_points", v, g);
    check("d_features", v, d);
    check("d_features", g, d);
    for_rows(v, g, d, [&](const double* at, const double* slope, index n, double* out) {
      const radius of(*this, at, n);
      double along = 0;
      for (index j = 0; j < n; ++j)
        along += of.length == 0 ? 0 : slope[j] * (at[j] / of.length);
      for (index j = 0; j < n; ++j)
        out[j] = of.ratio * slope[j] +
                 (of.length == 0 ? 0 : (of.slope - of.ratio) * along * (at[j] / of.length));
    });
  }

private:
  /// ‖v‖, ρ/‖v‖ and ρ′.
  struct radius {
    double length = 0, ratio = 1, slope = 1;
    radius(const exponential_map& map, const double* v, index n) {
      double largest = 0, squares = 0;
      bool finite = true;
      for (index j = 0; j < n; ++j) {
        largest = std::fmax(largest, std::fabs(v[j]));
        finite = finite && std::isfinite(v[j]);
      }
      if (!finite) {
        length = ratio = slope = std::numeric_limits<double>::quiet_NaN();
        return;
      }
      if (largest == 0)
        return;
      for (index j = 0; j < n; ++j)
        squares += v[j] / largest * (v[j] / largest);
      length = largest * std::sqrt(squares);
      const double root = std::sqrt(static_cast<double>(map.options_.curvature));
      const double reach =
          std::min(static_cast<double>(map.options_.clip),
                   std::atanh(1 - static_cast<double>(map.options_.margin)) / root);
      const double cosh = std::cosh(root * std::min(length, reach));
      ratio = std::tanh(root * std::min(length, reach)) / root / length;
      slope = length > reach ? 0 : 1 / cosh / cosh;
    }
  };

  template <bool M>
  static void check(const char* what, const core::matrix_data<T>& v,
                    const core::matrix_data<T, M>& m) {
    constexpr core::sequence_checks<T> checks{name};
    checks.memory("features", v.data, v.rows * v.cols);
    checks.size((std::string("rows of ") + what).c_str(), m.rows, v.rows, "as many as of features");
    checks.size((std::string("columns of ") + what).c_str(), m.cols, v.cols,
                "as many as of features");
    checks.memory(what, m.data, m.rows * m.cols);
    if constexpr (M) {
      core::row_job<T> job;
      job.scores = v;
      job.gradient = m;
      core::check_overlap(name, job);
    }
  }
  /// f(row of a, row of b, columns, row of what is written)
  template <class F>
  static void for_rows(const core::matrix_data<T>& a, const core::matrix_data<T>& b,
                       const core::matrix_data<T, true>& to, F f) {
    const auto width = static_cast<std::size_t>(core::whole_packs(a.cols));
    std::vector<double> first(width), second(width), out(width);
    std::vector<T> stage(width);
    for (index r = 0; r < a.rows; ++r) {
      core::read_row(a, r, stage.data(), first.data());
      core::read_row(b, r, stage.data(), second.data());
      f(first.data(), second.data(), a.cols, out.data());
      core::write_row(to, r, out.data(), false, stage.data());
    }
  }
  options options_;
};

/// The gradients that hyp_oc writes; of the shapes of what they belong to.
template <class T> struct hyp_oc_gradients { matrix_view<T> features, offsets, normals; };

/// Hyp-OC, for one class against all that is not in it: cross-entropy of hyperbolic logistic
/// regression, and pairwise confusion between the halves of the batch,
///
///   ℓ = mean_i −log softmax(z_i)_{y_i} + γ mean_i d(x_i, x_{n+i}),   x_i = exponential_map(v_i)
///
/// z the hyperbolic_logits of x, d the poincare_distance. The first n of 2 n rows are a batch of
/// the one class, the others the pseudo-negatives made of it, say. With γ = 0 the number of rows
/// need not be even, and a row without cross-entropy has no gradient, whatever it holds. features:
/// 2 n × dimensions; labels: one of any integral type per row, of which those equal to ignore_index
/// have no cross-entropy; offsets, normals: classes × dimensions; all of T, which the gradients are
/// too. They lie apart from each other and from the inputs. All is computed in double. Special
/// values as in the parts: NaN or an infinity in a feature makes the value NaN, the gradients of
/// its row and its partner's, and those of offsets and normals. Call options: scale (of the
/// gradients), accumulate and run_on; all others belong to losses of rows and are refused. Threads
/// do not matter. Throws std::invalid_argument. Source: Narayan, Patel, "Hyp-OC: hyperbolic
/// one-class classification for face anti-spoofing", 2024. Their code has atan for artanh in d,
/// divides its sum by 2 n, and adds constants to denominators; this is the formula.
template <class T = float> class hyp_oc {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    T curvature = T(0.1); ///< c > 0
    T clip = 2;           ///< longest feature
    T margin = T(1e-3);   ///< in (0, 1): relative distance of points from the border
    T confusion = 1;      ///< γ ≥ 0
    std::int64_t ignore_index = -100;
  };
  static constexpr const char* name = "hyp_oc";

  hyp_oc() : hyp_oc(options{}) {}
  explicit(false) hyp_oc(const options& o) : options_(o) {
    core::positive(name, "curvature", o.curvature);
    core::require(o.clip > 0, name, "clip", o.clip, "a number above 0");
    core::require(o.margin > 0 && o.margin < 1, name, "margin", o.margin, "a number in (0, 1)");
    core::require(o.confusion >= 0 && std::isfinite(o.confusion), name, "confusion", o.confusion,
                  "a finite number of at least 0");
  }
  const options& settings() const { return options_; }

  template <core::labels_like Y>
  T operator()(matrix_view<const T> features, Y&& labels, matrix_view<const T> offsets,
               matrix_view<const T> normals, const call_options<T>& call = {}) const {
    return run(features, core::integer_rows(core::as_vector(labels)), offsets, normals, nullptr,
               call);
  }
  template <core::labels_like Y>
  T operator()(matrix_view<const T> features, Y&& labels, matrix_view<const T> offsets,
               matrix_view<const T> normals, const hyp_oc_gradients<T>& gradients,
               const call_options<T>& call = {}) const {
    return run(features, core::integer_rows(core::as_vector(labels)), offsets, normals, &gradients,
               call);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};
  using wide_matrix = matrix_view<double>;

  void check(const matrix_view<const T>& v, const core::integer_rows& labels,
             const matrix_view<const T>& p, const matrix_view<const T>& a,
             const hyp_oc_gradients<T>* g, const call_options<T>& call) const {
    checks.memory("features", v.data, v.rows * v.cols);
    if (options_.confusion != 0)
      core::require(v.rows % 2 == 0, name, "rows", v.rows, "an even number");
    same_shape("offsets", p, p.rows, v.cols);
    same_shape("normals", a, p.rows, v.cols);
    checks.size("labels", labels.cols, v.rows, "as many as there are rows");
    checks.memory("labels", labels.data, v.rows);
    checks.call(call, v.rows, false, "as many as there are rows");
    if (call.row_weights.data || call.upstream.data || call.values.data || call.normaliser != 0)
      core::fail(std::string("perdita::") + name +
                 ": row_weights, upstream, values or normaliser is given, expected none");
    if (v.rows > 0)
      core::require(p.rows > 0, name, "rows of offsets", p.rows, "at least 1 class");
    for (index r = 0; r < v.rows; ++r) {
      const std::int64_t y = labels.at(0, r);
      if (y != options_.ignore_index && (y < 0 || y >= p.rows))
        core::fail_at(name, "labels", r, core::to_text(y),
                      "0 to " + core::to_text(p.rows - 1) + ", or ignore_index " +
                          core::to_text(options_.ignore_index));
    }
    if (!g)
      return;
    same_shape("gradient of features", g->features, v.rows, v.cols);
    same_shape("gradient of offsets", g->offsets, p.rows, v.cols);
    same_shape("gradient of normals", g->normals, p.rows, v.cols);
    const auto bytes = [](const auto& m) { return core::bytes_of(core::matrix_data<T>(m)); };
    const core::extent memories[] = {bytes(g->features), bytes(g->offsets), bytes(g->normals),
                                     bytes(v),           bytes(p),          bytes(a)};
    core::require_apart(name, memories, 3);
  }
  template <class S>
  static void same_shape(const char* what, const matrix_view<S>& m, index rows, index cols) {
    checks.size((std::string("rows of ") + what).c_str(), m.rows, rows, "as the inputs have");
    checks.size((std::string("columns of ") + what).c_str(), m.cols, cols, "as the inputs have");
    checks.memory(what, m.data, rows * cols);
  }

  static std::vector<double> copy(const matrix_view<const T>& m) {
    std::vector<double> to;
    for (index r = 0; r < m.rows; ++r)
      for (index c = 0; c < m.cols; ++c)
        to.push_back(static_cast<double>(m(r, c)));
    return to;
  }
  static void write(const matrix_view<T>& to, const std::vector<double>& from,
                    const call_options<T>& call) {
    for (index r = 0; r < to.rows; ++r)
      for (index c = 0; c < to.cols; ++c) {
        const double slope =
            static_cast<double>(call.scale) * from[static_cast<std::size_t>(r * to.cols + c)];
        to(r, c) = static_cast<T>(call.accumulate ? static_cast<double>(to(r, c)) + slope : slope);
      }
  }

  T run(const matrix_view<const T>& features, const core::integer_rows& label_list,
        const matrix_view<const T>& offsets, const matrix_view<const T>& normals,
        const hyp_oc_gradients<T>* g, const call_options<T>& call) const {
    check(features, label_list, offsets, normals, g, call);
    const index rows = features.rows, dims = features.cols, classes = offsets.rows;
    const auto c = static_cast<double>(options_.curvature);
    std::vector<double> v = copy(features), p = copy(offsets), a = copy(normals), x(v.size());
    std::vector<double> z(static_cast<std::size_t>(rows * classes)), dx(v.size()), dp(p.size()),
        da(a.size()), apart(options_.confusion != 0 ? v.size() : 0);
    std::vector<std::int64_t> labels(static_cast<std::size_t>(rows));
    for (index r = 0; r < rows; ++r) {
      labels[static_cast<std::size_t>(r)] = label_list.at(0, r);
      if (options_.confusion == 0 && label_list.at(0, r) == options_.ignore_index)
        std::fill_n(v.begin() + r * dims, dims, 0); // which nothing depends on, whatever it is
    }
    const auto wide = [](std::vector<double>& m, index n, index cols) {
      return wide_matrix(m.data(), n, cols);
    };
    const wide_matrix points = wide(x, rows, dims), from = wide(v, rows, dims),
                      centres = wide(p, classes, dims), planes = wide(a, classes, dims),
                      scores = wide(z, rows, classes), slopes = wide(dx, rows, dims);
    const exponential_map<double> map({.curvature = c,
                                       .clip = static_cast<double>(options_.clip),
                                       .margin = static_cast<double>(options_.margin)});
    const hyperbolic_logits<double> logits({.curvature = c});
    const pairwise_confusion<double> confusion({.curvature = c});
    const cross_entropy<double> entropy({.ignore_index = options_.ignore_index});
    call_options<double> inner;
    inner.run_on = call.run_on;

    map(from, points);
    logits(points, centres, planes, scores, call.run_on);
    double value = g ? entropy(scores, labels, scores, inner) : entropy(scores, labels, inner);
    if (g)
      logits.backward(points, centres, planes, scores, slopes, wide(dp, classes, dims),
                      wide(da, classes, dims), call.run_on);
    if (const auto weight = static_cast<double>(options_.confusion); weight != 0) {
      value += weight *
               (g ? confusion(points, wide(apart, rows, dims), inner) : confusion(points, inner));
      for (std::size_t i = 0; g && i < dx.size(); ++i)
        dx[i] += weight * apart[i];
    }
    if (g) {
      map.backward(from, slopes, slopes);
      write(g->features, dx, call);
      write(g->offsets, dp, call);
      write(g->normals, da, call);
    }
    return static_cast<T>(value);
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
