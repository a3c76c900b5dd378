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
#include "core/traits.hpp"

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

  /// p = tanh(√c ‖v‖) v/(√c ‖v‖), and so β = 1/cosh².
  void prepare(index k) {
    const double *v = v_ + k * dims_, *a = a_ + k * dims_;
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
    double m, squares;       ///< M, ‖w‖²
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
    return {2 * length / root_ * arc, arc, s, 1 / std::hypot(1, s), m, squares};
  }
  void add_to_point(index r, index k, double g, double* sum) const {
    const pair at = pair_of(r, k);
    const double *x = x_ + r * dims_, *p = p_ + k * dims_, *a = a_ + k * dims_;
    const double near = near_x_[r], e = length_[k] == 0 ? 0 * near : 4 * g * at.h / near;
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
      of_p[j] += (of_across - e) * a[j] - 2 * of_squares * w - 2 * c_ * of_beta * p[j];
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
  double *x_, *v_, *p_, *a_, *near_x_, *beta_, *stretch_, *across_, *length_;
  std::size_t scratch_bytes_ = 0;
};

} // namespace core

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
    core::require(o.curvature > 0 && std::isfinite(o.curvature), name, "curvature", o.curvature,
                  "a finite number above 0");
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
    run<true>(second, first, to_second, call);
    return run<true>(first, second, to_first, call);
  }

private:
  friend row_loss<poincare_distance<T>, T>;

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
    return distance_(half(x, 0), half(x, 1), half(g, 0), half(g, 1), call);
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
    core::require(o.curvature > 0 && std::isfinite(o.curvature), name, "curvature", o.curvature,
                  "a finite number above 0");
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

} // namespace perdita::inline PERDITA_ABI
