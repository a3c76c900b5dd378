// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/point_cloud.hpp"
#include "ens_loss.hpp"
#include "kernel_divergence.hpp"

namespace perdita::inline PERDITA_ABI {

/// How a call of sinkhorn_divergence ended.
struct sinkhorn_report {
  index iterations = 0; ///< of the slowest of its problems
  double error = 0;     ///< the largest relative error of a marginal
};

namespace core {

/// The least and the largest number of a coordinate of two clouds.
inline std::pair<double, double> range_of(const point_cloud& x, const point_cloud& y, index d) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const point_cloud* c : {&x, &y})
    for (index i = 0; i < c->size(); ++i) {
      low = std::min(low, c->point(i)[d]);
      high = std::max(high, c->point(i)[d]);
    }
  return {low, high};
}

/// Potentials of entropic optimal transport between clouds with equal weights, cost ½‖x − y‖².
class sinkhorn_solver {
public:
  sinkhorn_solver(double epsilon, double tolerance, index most, const executor& run_on)
      : epsilon_(epsilon), tolerance_(tolerance), most_(most), run_on_(run_on) {}

  /// −ε log mean_j e^{(g_j − C_ij)/ε}
  std::vector<double> soft_minimum(const point_cloud& x, const point_cloud& y,
                                   const std::vector<double>& g, double epsilon) const {
    auto f = potential(x);
    const double log_count = std::log(static_cast<double>(y.size()));
    for_rows(x, y, g, epsilon, [&](index i, double* v, pack<double>*) {
      f[static_cast<std::size_t>(i)] =
          -epsilon * (sum_of_images(v, whole_packs(y.size())).log() - log_count);
    });
    return f;
  }
  /// Σ_j softmax_j((g_j − C_ij)/ε) (x_i − y_j) for all i, times `scale`, into `out`.
  void pull(const point_cloud& x, const point_cloud& y, const std::vector<double>& g, double scale,
            std::vector<double>& out) const {
    using W = pack<double>;
    out.resize(static_cast<std::size_t>(x.size() * x.dims()));
    for_rows(x, y, g, epsilon_, [&](index i, double* v, pack<double>* pulls) {
      const scaled_sum s = sum_of_images(v, whole_packs(y.size()));
      for (index b = 0; b < y.blocks(); ++b)
        y.add_pull(x.point(i), b, exp_shifted(W::load(v + b * per_pack) - s.top), pulls);
      for (index d = 0; d < x.dims(); ++d)
        out[static_cast<std::size_t>(i * x.dims() + d)] += scale * (sum_lanes(pulls[d]) / s.sum);
    });
  }

  /// Of two clouds, in turns: g is exact for f, f within the tolerance for g. The value.
  double solve(const point_cloud& x, const point_cloud& y, std::vector<double>& f,
               std::vector<double>& g) {
    f = potential(x);
    g = potential(y);
    for (double e = spread(x, y); e > epsilon_; e /= 2) {
      f = soft_minimum(x, y, g, e);
      g = soft_minimum(y, x, f, e);
    }
    f = soft_minimum(x, y, g, epsilon_);
    for (index t = 1;; ++t) {
      g = soft_minimum(y, x, f, epsilon_);
      auto next = soft_minimum(x, y, g, epsilon_);
      const double error = largest_error(f, next, x.size());
      if (!(error > tolerance_) || t >= most_) {
        note(t, error);
        return mean(f, x.size()) + mean(g, y.size());
      }
      f = std::move(next);
    }
  }
  /// Of a cloud and itself: one potential, by averaged steps. The value.
  double solve(const point_cloud& x, std::vector<double>& p) {
    p = potential(x);
    const auto average = [&](const std::vector<double>& next) {
      for (std::size_t i = 0; i < p.size(); ++i)
        p[i] = 0.5 * (p[i] + next[i]);
    };
    for (double e = spread(x, x); e > epsilon_; e /= 2)
      average(soft_minimum(x, x, p, e));
    for (index t = 1;; ++t) {
      const auto next = soft_minimum(x, x, p, epsilon_);
      const double error = largest_error(p, next, x.size());
      if (!(error > tolerance_) || t >= most_) {
        note(t, error);
        exact_sum excess; // of the plan's mass: with it, errors of p count in second order alone
        for (index i = 0; i < x.size(); ++i)
          excess.add(std::expm1(step(p, next, i)));
        return 2 * mean(p, x.size()) - epsilon_ * excess.value() / static_cast<double>(x.size());
      }
      average(next);
    }
  }
  const sinkhorn_report& report() const { return report_; }

private:
  static std::vector<double> potential(const point_cloud& x) {
    return std::vector<double>(static_cast<std::size_t>(whole_packs(x.size())));
  }
  /// work(i, (g_j − C_ij)/ε for all j, packs for a pull)
  template <class Work>
  void for_rows(const point_cloud& x, const point_cloud& y, const std::vector<double>& g,
                double epsilon, Work work) const {
    using W = pack<double>;
    const W rate(1 / epsilon);
    for_points(x, y, run_on_, [&](index i, W* pulls) {
      std::vector<double> row(static_cast<std::size_t>(whole_packs(y.size())));
      for (index b = 0; b < y.blocks(); ++b) {
        const W cost = y.squares(x.point(i), b, -1) * 0.5;
        ((W::load(g.data() + b * per_pack) - cost) * rate).store(row.data() + b * per_pack);
      }
      work(i, row.data(), pulls);
    });
  }
  /// At least the largest cost.
  static double spread(const point_cloud& x, const point_cloud& y) {
    double sum = 0;
    for (index d = 0; d < x.dims(); ++d) {
      const auto [low, high] = range_of(x, y, d);
      sum += 0.5 * (high - low) * (high - low);
    }
    return std::isfinite(sum) ? sum : 0;
  }
  double step(const std::vector<double>& f, const std::vector<double>& next, index i) const {
    const auto at = static_cast<std::size_t>(i);
    return (f[at] - next[at]) / epsilon_;
  }
  double largest_error(const std::vector<double>& f, const std::vector<double>& next,
                       index n) const {
    double largest = 0;
    for (index i = 0; i < n; ++i)
      if (const double e = std::fabs(std::expm1(step(f, next, i))); e > largest || e != e)
        largest = e;
    return largest;
  }
  static double mean(const std::vector<double>& f, index n) {
    exact_sum sum;
    for (index i = 0; i < n; ++i)
      sum.add(f[static_cast<std::size_t>(i)]);
    return sum.value() / static_cast<double>(n);
  }
  void note(index iterations, double error) {
    report_.iterations = std::max(report_.iterations, iterations);
    if (error > report_.error || error != error)
      report_.error = error;
  }

  double epsilon_, tolerance_;
  index most_;
  const executor& run_on_;
  sinkhorn_report report_;
};

/// p-Wasserstein distance, to the power p, of points on a line with equal weights, and slopes.
class line_transport {
public:
  line_transport(index n, index m, double p) : p_(p), u_(n), v_(m) {}

  /// Projections of both sets.
  double* first() { return u_.at.data(); }
  double* second() { return v_.at.data(); }

  /// The largest distance between partners, that is a number, of the last call.
  double largest() const { return largest_; }

  /// The distance, in powers of `unit`; adds slopes to those of the points unless they are null.
  double operator()(double unit, double* of_first, double* of_second) {
    u_.sort();
    v_.sort();
    const auto n = static_cast<index>(u_.at.size()), m = static_cast<index>(v_.at.size());
    const double share = 1 / (static_cast<double>(n) * static_cast<double>(m));
    largest_ = 0;
    exact_sum sum;
    for (index i = 0, j = 0, from = 0; i < n && j < m;) { // from: mass moved, of n m
      const index to = std::min((i + 1) * m, (j + 1) * n);
      const double mass = static_cast<double>(to - from) * share;
      const index a = u_.order[static_cast<std::size_t>(i)],
                  b = v_.order[static_cast<std::size_t>(j)];
      const double off = (first()[a] - second()[b]) / unit, size = std::fabs(off);
      const double steep = p_ == 2 ? size : std::pow(size, p_ - 1);
      largest_ = std::max(largest_, size);
      sum.add(mass * (size * steep));
      if (of_first && off != 0) {
        const double slope = mass * p_ * (off > 0 ? steep : off < 0 ? -steep : off);
        of_first[a] += slope;
        of_second[b] -= slope;
      }
      from = to;
      i += to == (i + 1) * m;
      j += to == (j + 1) * n;
    }
    return sum.value();
  }

private:
  struct side {
    std::vector<double> at;
    std::vector<index> order;
    explicit side(index n) : at(static_cast<std::size_t>(n)), order(at.size()) {}
    /// Ties in the order of the points. NaN last: every comparison has to be consistent.
    void sort() {
      std::iota(order.begin(), order.end(), index(0));
      std::sort(order.begin(), order.end(), [&](index a, index b) {
        const double x = at[static_cast<std::size_t>(a)], y = at[static_cast<std::size_t>(b)];
        const bool x_lost = x != x, y_lost = y != y;
        if (x_lost != y_lost)
          return y_lost;
        return x < y || (!(y < x) && a < b);
      });
    }
  };
  double p_, largest_ = 0;
  side u_, v_;
};

} // namespace core

/// Sinkhorn divergence of two samples with equal weights, for the cost C(x, y) = ½ ‖x − y‖²,
///
///   ℓ = OT(x, y) − ½ OT(x, x) − ½ OT(y, y) ≥ 0
///   OT(x, y) = min over plans P of ⟨P, C⟩ + ε KL(P ‖ product of the weights) = mean f + mean g
///   f_i = −ε log mean_j e^{(g_j − C_ij)/ε},  g_j alike
///   ∂ℓ/∂x_i = (1/n) (Σ_j w_ij (x_i − y_j) − Σ_j w'_ij (x_i − x_j)),   w: rows of P times n
///
/// 0 for equal samples. debiased = false: OT(x, y) alone. The potentials are found in the log
/// domain, with ε falling from the largest cost by halves, then alternating steps (for a sample and
/// itself averaged ones) until every marginal is right to the relative `tolerance`, or `iterations`
/// at ε are done: see the report. At such a point the value's error is of the second order of the
/// tolerance, that of the gradient, by the envelope theorem, of the first. Rounding: about
/// largest C/ε units of double's epsilon. Small ε need many iterations.
/// Cost: O(n m d) an iteration, for the distances are computed anew: no matrix of them is held.
/// Everything else: as mmd. The regulariser is as in geomloss, whose ε is blur²; other libraries
/// have Σ P log P, or return ⟨P, C⟩, which are other numbers.
/// Source: Cuturi 2013; Feydy et al., "Interpolating between optimal transport and MMD using
/// Sinkhorn divergences", AISTATS 2019.
///
///   perdita::sinkhorn_divergence<float> loss({.epsilon = 0.1});
///   perdita::sinkhorn_report report;
///   float value = loss(x, y, d_x, d_y, {}, &report); // report.error <= tolerance: converged
template <class T = float> class sinkhorn_divergence {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double epsilon = 0.05;    ///< ε > 0, in units of the cost
    double tolerance = 1e-6;  ///< ≥ 0, of the marginals
    index iterations = 10000; ///< at most, at least 1
    bool debiased = true;     ///< else OT(x, y) alone
  };
  static constexpr const char* name = "sinkhorn_divergence";

  sinkhorn_divergence() : sinkhorn_divergence(options{}) {}
  explicit(false) sinkhorn_divergence(const options& o) : options_(o) {
    core::positive(name, "epsilon", o.epsilon);
    core::require(o.tolerance >= 0, name, "tolerance", o.tolerance, "a number of at least 0");
    core::require(o.iterations >= 1, name, "iterations", o.iterations, "at least 1");
  }
  const options& settings() const { return options_; }

  /// The value.
  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& x, Y&& y, const call_options<T>& call = {},
                   sinkhorn_report* report = nullptr) const {
    return run({{core::as_matrix(x), core::as_matrix(y)}, {}, false}, call, report);
  }
  /// The value and both gradients.
  template <class X, class Y, class G, class H>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(X&& x, Y&& y, G&& d_x, H&& d_y, const call_options<T>& call = {},
                       sinkhorn_report* report = nullptr) const {
    return run({{core::as_matrix(x), core::as_matrix(y)},
                {core::as_matrix(d_x), core::as_matrix(d_y)},
                true},
               call, report);
  }

private:
  T run(const core::sample_pair<T>& pair, const call_options<T>& call,
        sinkhorn_report* report) const {
    pair.check({{name}}, false, 1, call);
    const core::point_cloud x(pair.in[0]), y(pair.in[1]);
    core::sinkhorn_solver solver(options_.epsilon, options_.tolerance, options_.iterations,
                                 call.run_on);
    std::vector<double> f, g, p, q;
    double value = solver.solve(x, y, f, g);
    if (options_.debiased)
      value -= 0.5 * (solver.solve(x, p) + solver.solve(y, q));
    if (pair.has_gradient)
      for (const bool second : {false, true}) {
        const core::point_cloud &mine = second ? y : x, &other = second ? x : y;
        std::vector<double> slopes;
        solver.pull(mine, other, second ? f : g, 1, slopes);
        if (options_.debiased)
          solver.pull(mine, mine, second ? q : p, -1, slopes);
        core::write_points(pair.out[second], slopes,
                           static_cast<double>(call.scale) / static_cast<double>(mine.size()),
                           call.accumulate);
      }
    if (report)
      *report = solver.report();
    return static_cast<T>(value);
  }
  options options_;
};

/// Sliced Wasserstein distance of two samples with equal weights along L directions θ_l, the rows
/// of a matrix (of length 1, for what is commonly meant: see random_directions),
///
///   ℓ^p = mean_l W_p^p({⟨θ_l, x_i⟩}, {⟨θ_l, y_j⟩}),   for n = m: W_p^p = mean_i |u_(i) − v_(i)|^p
///   ∂ℓ^p/∂x_i = (1/L) Σ_l θ_l (p/n) |u − v|^{p−1} sign(u − v)   of the pairs that sorting makes
///
/// with u_(i), v_(i) in order of size. Samples of unequal sizes share each point's mass among its
/// partners. root = false: ℓ^p, whose gradient is defined where ℓ = 0; there the root's is 0 by
/// definition. Equal projections keep the order of the points; the slope of |0| is 0.
/// Shapes: directions L × d, L ≥ 1, without gradient; everything else: as mmd. Cost: L sorts, and
/// up to 8 gradients of memory. Source: Rabin, Peyré, Delon, Bernot 2011; Bonneel et al. 2015.
///
///   perdita::random_directions(seed, perdita::matrix_view<float>(theta.data(), 50, dims));
///   float value = perdita::sliced_wasserstein<float>()(x, y, theta, d_x, d_y);
template <class T = float> class sliced_wasserstein {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double p = 2;     ///< at least 1
    bool root = true; ///< ℓ, not ℓ^p
  };
  static constexpr const char* name = "sliced_wasserstein";

  sliced_wasserstein() : sliced_wasserstein(options{}) {}
  explicit(false) sliced_wasserstein(const options& o) : options_(o) {
    core::require(o.p >= 1 && std::isfinite(o.p), name, "p", o.p, "a finite number of at least 1");
  }
  const options& settings() const { return options_; }

  /// The value.
  template <class X, class Y, class D>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::scores_like<D, T>
      T operator()(X&& x, Y&& y, D&& directions, const call_options<T>& call = {}) const {
    return run({{core::as_matrix(x), core::as_matrix(y)}, {}, false}, core::as_matrix(directions),
               call);
  }
  /// The value and the gradients of both samples.
  template <class X, class Y, class D, class G, class H>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::scores_like<D, T> &&
      core::gradient_like<G, T> && core::gradient_like<H, T>
          T operator()(X&& x, Y&& y, D&& directions, G&& d_x, H&& d_y,
                       const call_options<T>& call = {}) const {
    return run({{core::as_matrix(x), core::as_matrix(y)},
                {core::as_matrix(d_x), core::as_matrix(d_y)},
                true},
               core::as_matrix(directions), call);
  }

private:
  static constexpr index most_groups = 8; // of directions that share a gradient
  static constexpr core::batch_checks<T> checks{{name}};

  /// What can be taken from a coordinate of all points without rounding, so that a number added to
  /// all takes no digits of the projections.
  static std::vector<double> common_part(const core::point_cloud& x, const core::point_cloud& y) {
    std::vector<double> part;
    for (index d = 0; d < x.dims(); ++d) {
      const auto [low, high] = core::range_of(x, y, d);
      part.push_back(low > 0 && high <= 2 * low ? low : high < 0 && low >= 2 * high ? high : 0);
    }
    return part;
  }
  static void project(const core::point_cloud& x, const std::vector<double>& part,
                      const double* direction, double* to) {
    for (index i = 0; i < x.size(); ++i) {
      double sum = 0;
      for (index d = 0; d < x.dims(); ++d)
        sum = std::fma(x.point(i)[d] - part[static_cast<std::size_t>(d)], direction[d], sum);
      to[i] = sum;
    }
  }
  static void lift(const std::vector<double>& slopes, const double* direction, index dims,
                   double* to) {
    for (std::size_t i = 0; i < slopes.size(); ++i)
      for (index d = 0; d < dims; ++d)
        to[static_cast<index>(i) * dims + d] += slopes[i] * direction[d];
  }

  T run(const core::sample_pair<T>& pair, const core::matrix_data<T>& directions,
        const call_options<T>& call) const {
    pair.check(checks, false, 1, call);
    core::require(directions.rows >= 1, name, "rows of the directions", directions.rows,
                  "at least 1");
    checks.size("columns of the directions", directions.cols, pair.in[0].cols,
                "as many as of the samples");
    checks.memory("directions", directions.data, directions.rows * directions.cols);
    if (pair.has_gradient)
      for (const auto& g : pair.out)
        checks.apart({core::bytes_of(g)}, {core::bytes_of(directions)});

    const core::point_cloud x(pair.in[0]), y(pair.in[1]), theta(directions);
    const index n = x.size(), m = y.size(), dims = x.dims(), count = theta.size();
    const index groups = std::min(count, most_groups);
    const std::vector<double> part = common_part(x, y);
    const auto room = static_cast<std::size_t>(pair.has_gradient ? (n + m) * dims : 0);
    std::vector<double> values(static_cast<std::size_t>(count)), largest(values), slopes;
    const auto workers = std::min(static_cast<std::size_t>(groups), call.run_on.concurrency());
    const auto transport = [&](double unit) { // ℓ^p and slopes, in powers of it
      slopes.assign(room * static_cast<std::size_t>(groups), 0);
      core::share_out(groups, workers, call.run_on, [&](std::size_t) {
        return [&, line = core::line_transport(n, m, options_.p),
                of_x = std::vector<double>(static_cast<std::size_t>(n)),
                of_y = std::vector<double>(static_cast<std::size_t>(m))](index group) mutable {
          double* const to = slopes.data() + static_cast<std::size_t>(group) * room;
          for (index l = group; l < count; l += groups) {
            project(x, part, theta.point(l), line.first());
            project(y, part, theta.point(l), line.second());
            std::fill(of_x.begin(), of_x.end(), 0.0);
            std::fill(of_y.begin(), of_y.end(), 0.0);
            values[static_cast<std::size_t>(l)] =
                line(unit, pair.has_gradient ? of_x.data() : nullptr, of_y.data());
            largest[static_cast<std::size_t>(l)] = line.largest();
            if (!pair.has_gradient)
              continue;
            lift(of_x, theta.point(l), dims, to);
            lift(of_y, theta.point(l), dims, to + n * dims);
          }
        };
      });
      return core::total_of(values) / static_cast<double>(count);
    };
    double unit = 1, power = transport(unit);
    if (power < 0x1p-900 || power > 0x1p900) { // where powers have no digits, or no number
      const double most = *std::max_element(largest.begin(), largest.end());
      if (most > 0 && std::isfinite(most))
        power = transport(unit = most);
    }
    const double root = options_.p == 2 ? std::sqrt(power) : std::pow(power, 1 / options_.p);
    if (pair.has_gradient) {
      for (std::size_t k = 1; k < static_cast<std::size_t>(groups); ++k)
        for (std::size_t i = 0; i < room; ++i)
          slopes[i] += slopes[k * room + i];
      double scale = static_cast<double>(call.scale) / static_cast<double>(count);
      if (options_.root)
        scale *= power == 0 ? 0 : root / power / options_.p;
      else
        scale *= std::pow(unit, options_.p - 1);
      core::write_points(pair.out[0], slopes, scale, call.accumulate);
      slopes.erase(slopes.begin(), slopes.begin() + n * dims);
      core::write_points(pair.out[1], slopes, scale, call.accumulate);
    }
    return static_cast<T>(options_.root ? unit * root : power * std::pow(unit, options_.p));
  }
  options options_;
};

/// Unit vectors, each of whose directions is equally likely: normal numbers divided by their
/// length. Row l depends on seed, l and the number of columns alone, so a growing matrix keeps its
/// rows, and threads do not matter.
template <class M>
requires core::matrix_like<M>
void random_directions(std::uint64_t seed, M&& directions) {
  const auto m = core::as_matrix(directions);
  using T = std::remove_cvref_t<decltype(m(0, 0))>;
  constexpr const char* name = "random_directions";
  core::require(m.data || m.rows * m.cols == 0, name, "directions", 0, "a pointer to memory");
  core::require(m.cols >= 1 || m.rows == 0, name, "columns", m.cols, "at least 1");
  constexpr double turn = 6.283185307179586;
  std::vector<double> x(static_cast<std::size_t>(m.cols));
  for (index l = 0; l < m.rows; ++l) {
    const std::uint64_t row =
        core::split_mix(core::split_mix(seed, 0), static_cast<std::uint64_t>(l));
    double squares = 0;
    for (index d = 0; d < m.cols; ++d) {
      const auto at = 2 * static_cast<std::uint64_t>(d);
      const double radius = std::sqrt(-2 * std::log(core::uniform_at(row, at)));
      const double z = radius * std::cos(turn * core::uniform_at(row, at + 1));
      x[static_cast<std::size_t>(d)] = z;
      squares += z * z;
    }
    for (index d = 0; d < m.cols; ++d)
      m(l, d) = static_cast<T>(x[static_cast<std::size_t>(d)] / std::sqrt(squares));
  }
}

} // namespace perdita::inline PERDITA_ABI
