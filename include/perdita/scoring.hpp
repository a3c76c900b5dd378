// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "core/sequences.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Φ(x), also in its lower tail.
inline double normal_probability(double x) {
  return 0.5 * std::erfc(-x * (std::numbers::sqrt2 / 2));
}
/// Φ(b) − Φ(a) for a ≤ b, also in the upper tail.
inline double normal_between(double a, double b) {
  return a > 0 ? normal_probability(-a) - normal_probability(-b)
               : normal_probability(b) - normal_probability(a);
}
inline double normal_density(double x) {
  constexpr double root = std::numbers::inv_sqrtpi * std::numbers::sqrt2 / 2;
  return root * std::exp(-0.5 * x * x);
}

/// Level of a column: K, …, 1, or 1, …, K.
inline double level_of(index column, index levels, bool best_first) {
  return static_cast<double>(best_first ? levels - column : column + 1);
}

} // namespace core

/// How a normal distribution N(m, s²) of a score becomes numbers for the levels 1, …, K.
enum class level_mass {
  interval, ///< Φ((j + ½ − m)/s) − Φ((j − ½ − m)/s): for small deviations
  density   ///< φ((j − m)/s)/s: for large ones
};

/// Soft targets for levels of quality from a mean opinion score and its deviation: probabilities of
/// the levels 1, …, K whose mean is that score,
///
///   p_j = max(α raw_j + β, 0)/Σ,  α = (m − c)/Σ raw_j (j − c),  β = (1 − α Σ raw)/K,  c = (K +
///   1)/2
///
/// with raw_j from N(m, s²). α is what it tends to where m = c, with its digits nearby. Where s is
/// below least_deviation, or the cut at 0 moves the mean by more than most_error, p interpolates
/// between the two levels that m lies between.
/// The targets go to any loss that takes them: cross_entropy of the levels' scores differs from
/// KL(p ‖ softmax) by the entropy of p, which has no gradient.
/// Shapes: one mean and one deviation per row, of T; probabilities rows × levels of T (or 16-bit
/// storage where T is float), apart from them. A NaN makes its row NaN. Means are within the scale,
/// deviations at least 0.
/// Accuracy: about 2^-50 (1 + s²), s in levels. Throws std::invalid_argument.
/// Source: You, Cai, Gu, Xue, Dong, "Teaching large language models to regress accurate image
/// quality scores using score distribution" (DeQA-Score), CVPR 2025, whose code has α = 0 at m = c
/// and does not divide by Σ.
///
///   perdita::gaussian_levels<float> levels({.least = 0, .most = 100});
///   levels(opinion_means, opinion_deviations, targets);
///   float value = perdita::cross_entropy<float>()(level_scores, targets, d_level_scores);
template <class T = float> class gaussian_levels {
public:
  using value_type = T;
  struct options {
    index levels = 5; ///< K ≥ 2
    level_mass mass = level_mass::interval;
    T least = 1, most = 5;      ///< of the means' scale, which becomes 1 to K
    T least_deviation = T(0.2); ///< in levels
    T most_error = T(0.1);      ///< in levels
    bool best_first = true;     ///< column 0 is level K
  };
  static constexpr const char* name = "gaussian_levels";

  gaussian_levels() : gaussian_levels(options{}) {}
  explicit(false) gaussian_levels(const options& o) : options_(o) {
    core::require(o.levels >= 2, name, "levels", o.levels, "at least 2");
    core::require_enumerator(name, "mass", o.mass, level_mass::density, "interval or density");
    core::finite(name, "least", o.least);
    core::require(o.most > o.least && std::isfinite(o.most), name, "most", o.most,
                  "a finite number above least");
    core::require(o.least_deviation > 0, name, "least_deviation", o.least_deviation,
                  "a number above 0");
    core::require(o.most_error >= 0, name, "most_error", o.most_error, "a number of at least 0");
  }
  const options& settings() const { return options_; }

  template <core::vector_like M, core::vector_like S, class P>
  requires core::gradient_like<P, T>
  void operator()(M&& means, S&& deviations, P&& probabilities) const {
    run(core::as_vector(means), core::as_vector(deviations),
        core::matrix_data<T, true>(core::as_matrix(probabilities)));
  }

private:
  void check(const vector_view<const T>& means, const vector_view<const T>& deviations,
             const core::matrix_data<T, true>& p) const {
    constexpr core::sequence_checks<T> checks{name};
    checks.size("deviations", deviations.size, means.size, "as many as there are means");
    checks.size("rows of probabilities", p.rows, means.size, "as many as there are means");
    checks.size("columns of probabilities", p.cols, options_.levels, "as many as there are levels");
    checks.memory("means", means.data, means.size);
    checks.memory("deviations", deviations.data, means.size);
    checks.memory("probabilities", p.data, p.rows * p.cols);
    const core::extent to = core::bytes_of(p);
    for (const auto& from : {means, deviations}) {
      const core::extent read = core::bytes_of(
          core::matrix_data<T>(matrix_view<const T>(from.data, from.size, 1, from.stride, 1)));
      if (to.begin < read.end && read.begin < to.end)
        core::fail(name, "probabilities", "memory of an input", "memory apart");
    }
    for (index r = 0; r < means.size; ++r) {
      if (means[r] < options_.least || means[r] > options_.most)
        core::fail_at(name, "means", r, core::to_text(means[r]), "a number from least to most");
      if (deviations[r] < 0)
        core::fail_at(name, "deviations", r, core::to_text(deviations[r]),
                      "a number of at least 0");
    }
  }

  void run(const vector_view<const T>& means, const vector_view<const T>& deviations,
           const core::matrix_data<T, true>& to) const {
    check(means, deviations, to);
    const index n = options_.levels;
    std::vector<double> p(static_cast<std::size_t>(n)); // of the levels 1, …, n
    std::vector<T> row(p.size());
    const double least = static_cast<double>(options_.least);
    const double stretch =
        static_cast<double>(n - 1) / (static_cast<double>(options_.most) - least);
    for (index r = 0; r < means.size; ++r) {
      const double m = std::min((static_cast<double>(means[r]) - least) * stretch + 1,
                                static_cast<double>(n)); // which rounding may exceed
      const double s = static_cast<double>(deviations[r]) * stretch;
      if (std::isnan(m) || std::isnan(s))
        std::fill(p.begin(), p.end(), std::numeric_limits<double>::quiet_NaN());
      else if (s < static_cast<double>(options_.least_deviation) || !discretise(m, s, p))
        interpolate(m, p);
      for (index k = 0; k < n; ++k)
        row[static_cast<std::size_t>(k)] = static_cast<T>(
            p[static_cast<std::size_t>(core::level_of(k, n, options_.best_first)) - 1]);
      to.write(r, 0, n, row.data());
    }
  }

  /// False where the mean is not what it has to be.
  bool discretise(double m, double s, std::vector<double>& p) const {
    const double n = static_cast<double>(p.size()), centre = (n + 1) / 2, off = m - centre;
    double all = 0, moment = 0;
    for (std::size_t k = 0; k < p.size(); ++k) {
      const double j = static_cast<double>(k + 1);
      p[k] = raw(j - m, s);
      all += p[k];
      moment += p[k] * (j - centre);
    }
    // off/moment, of which both are 0 for a mean in the centre
    const double alpha = std::fabs(off) > s / 4 ? off / moment : 1 / mean_slope(off, s, p.size());
    const double beta = (1 - alpha * all) / n;
    double total = 0, mean = 0;
    for (std::size_t k = 0; k < p.size(); ++k) {
      p[k] = std::max(alpha * p[k] + beta, 0.0);
      total += p[k];
      mean += p[k] * static_cast<double>(k + 1);
    }
    for (double& share : p)
      share /= total;
    return std::fabs(mean / total - m) <= static_cast<double>(options_.most_error);
  }

  /// What level j gets, y = j − m.
  double raw(double y, double s) const {
    return options_.mass == level_mass::interval
               ? core::normal_between((y - 0.5) / s, (y + 0.5) / s)
               : core::normal_density(y / s) / s;
  }
  /// Its derivative by m.
  double raw_slope(double y, double s) const {
    return options_.mass == level_mass::interval
               ? (core::normal_density((y - 0.5) / s) - core::normal_density((y + 0.5) / s)) / s
               : core::normal_density(y / s) * (y / s) / (s * s);
  }
  /// (Σ raw_j (j − c))/off as the mean of its derivative between m = c and m = c + off, by five
  /// Gauss-Legendre nodes, which are exact to rounding for |off| ≤ s/4.
  double mean_slope(double off, double s, std::size_t levels) const {
    static constexpr double nodes[] = {0, 0.53846931010568309104, 0.90617984593866399280};
    static constexpr double weights[] = {0.56888888888888888889, 0.47862867049936646804,
                                         0.23692688505618908751};
    double sum = 0;
    for (std::size_t k = 0; k < levels; ++k) {
      const double y = static_cast<double>(k + 1) - static_cast<double>(levels + 1) / 2;
      for (int i = 0; i < 3; ++i)
        for (const double side : {-nodes[i], nodes[i]})
          sum += y * (i == 0 ? 0.25 : 0.5) * weights[i] * raw_slope(y - off * (1 + side) / 2, s);
    }
    return sum;
  }

  static void interpolate(double m, std::vector<double>& p) {
    const double low = std::min(std::floor(m), static_cast<double>(p.size() - 1));
    const auto k = static_cast<std::size_t>(low);
    std::fill(p.begin(), p.end(), 0.0);
    p[k - 1] = 1 - (m - low);
    p[k] = m - low;
  }

  options options_;
};

/// Fidelity of a comparison: how well two predicted distributions over K levels tell which of two
/// items is better (Thurstone's model).
///
///   ℓ = 1 − √(P G + ε) − √((1 − P)(1 − G) + ε)
///   P = Φ(u),  u = (m_A − m_B)/√V,  V = v_A + v_B + ε
///   m = Σ p_k l_k,  v = Σ p_k (l_k − m)²,  p = softmax(z), the levels l are K, …, 1
///   ∂ℓ/∂z_k = p_k (ℓ_m (l_k − m) + ℓ_v ((l_k − m)² − v)),
///   ℓ_m = ±ℓ_P φ(u)/√V (+ for A),  ℓ_v = −ℓ_P φ(u) u/(2V),
///   ℓ_P = ½ ((1 − G)/√((1 − P)(1 − G) + ε) − G/√(P G + ε))
///
/// G is the probability that A is better: 1, 0, ½ for a tie, or preference() of the labels' means
/// and deviations. With a fixed variance V is that, and has no gradient: variance = 2 and
/// smoothing = 0 is the form for labels without deviations. With ε = 0, ℓ ≥ 0, and 0 at P = G; with
/// ε > 0 it is at most 2√ε less. Nothing cancels near P = G, and both tails of Φ keep their digits;
/// where P or 1 − P underflows, the gradient does.
/// Shapes: scores of A and of B and both gradients, pairs × levels, of T (or 16-bit storage where T
/// is float); targets: one G in [0, 1] per pair, of T. The gradients lie apart from each other and
/// from the scores. Masked levels (-inf) have no share. A row with NaN, +inf or nothing but -inf
/// makes its pair NaN, and so does G = NaN.
/// Call options as for losses of rows, a pair being a row; no by-products but `values`. Threads do
/// not matter. Allocates room for a pair per thread and call; call_options::memory holds the pairs'
/// values alone. Throws std::invalid_argument.
/// Source: Thurstone 1927; Tsai, Liu, Qin, Chen, Ma, "FRank", SIGIR 2007 (fidelity); You et al.,
/// DeQA-Score, CVPR 2025.
template <class T = float> class thurstone_fidelity {
public:
  using value_type = T;
  struct options {
    T variance = 0;         ///< above 0: V is this
    T smoothing = T(1e-8);  ///< ε ≥ 0; above 0 where the variance is not fixed
    bool best_first = true; ///< column 0 is level K
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "thurstone_fidelity";

  thurstone_fidelity() : thurstone_fidelity(options{}) {}
  explicit(false) thurstone_fidelity(const options& o) : options_(o) {
    core::require(o.variance >= 0 && std::isfinite(o.variance), name, "variance", o.variance,
                  "a finite number of at least 0");
    core::require(o.smoothing >= 0 && std::isfinite(o.smoothing), name, "smoothing", o.smoothing,
                  "a finite number of at least 0");
    core::require(o.smoothing > 0 || o.variance > 0, name, "smoothing", o.smoothing,
                  "a number above 0 where the variance is not fixed");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// G for labels with these means and deviations.
  double preference(double mean_a, double deviation_a, double mean_b, double deviation_b) const {
    return core::normal_probability(
        (mean_a - mean_b) /
        std::sqrt(variance_of(deviation_a * deviation_a + deviation_b * deviation_b)));
  }

  /// The reduced value.
  template <class A, class B, core::vector_like Y>
  requires core::scores_like<A, T> && core::scores_like<B, T>
      T operator()(A&& first, B&& second, Y&& targets, const call_options<T>& call = {}) const {
    const core::matrix_data<T> scores[] = {core::as_matrix(first), core::as_matrix(second)};
    return run(scores, core::as_vector(targets), nullptr, call);
  }
  /// The reduced value, and the gradients with respect to both scores.
  template <class A, class B, core::vector_like Y, class G, class H>
  requires core::scores_like<A, T> && core::scores_like<B, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(A&& first, B&& second, Y&& targets, G&& d_first, H&& d_second,
                       const call_options<T>& call = {}) const {
    const core::matrix_data<T> scores[] = {core::as_matrix(first), core::as_matrix(second)};
    const core::matrix_data<T, true> gradients[] = {core::as_matrix(d_first),
                                                    core::as_matrix(d_second)};
    return run(scores, core::as_vector(targets), gradients, call);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};
  static constexpr index per_task = 64;

  double variance_of(double sum) const {
    return options_.variance > 0 ? static_cast<double>(options_.variance)
                                 : sum + static_cast<double>(options_.smoothing);
  }

  void check(const core::matrix_data<T>* x, const vector_view<const T>& targets,
             const core::matrix_data<T, true>* g, const call_options<T>& call) const {
    const index rows = x[0].rows, cols = x[0].cols;
    checks.size("rows of the second scores", x[1].rows, rows, "as many as of the first");
    checks.size("columns of the second scores", x[1].cols, cols, "as many as of the first");
    checks.size("targets", targets.size, rows, "as many as there are pairs");
    checks.memory("first scores", x[0].data, rows * cols);
    checks.memory("second scores", x[1].data, rows * cols);
    checks.memory("targets", targets.data, rows);
    checks.call(call, rows, false, "as many as there are pairs");
    if (rows > 0)
      core::require(cols > 0, name, "columns", cols, "at least 1 level");
    for (int k = 0; g && k < 2; ++k) {
      checks.size("gradient rows", g[k].rows, rows, "the rows that the scores have");
      checks.size("gradient columns", g[k].cols, cols, "the columns that the scores have");
      checks.memory("gradient", g[k].data, rows * cols);
    }
    if (g) {
      const core::extent all[] = {core::bytes_of(g[0]), core::bytes_of(g[1]), core::bytes_of(x[0]),
                                  core::bytes_of(x[1]),
                                  core::bytes_of(core::matrix_data<T>(matrix_view<const T>(
                                      targets.data, rows, 1, targets.stride, 1)))};
      core::require_apart(name, all, 2);
    }
    for (index r = 0; r < rows; ++r)
      if (targets[r] < 0 || targets[r] > 1)
        core::fail_at(name, "targets", r, core::to_text(targets[r]), "a probability");
  }

  T run(const core::matrix_data<T>* x, const vector_view<const T>& targets,
        const core::matrix_data<T, true>* g, const call_options<T>& call) const {
    check(x, targets, g, call);
    const index rows = x[0].rows, tasks = (rows + per_task - 1) / per_task;
    const auto workers = std::min(static_cast<std::size_t>(tasks), call.run_on.concurrency());
    const double share = core::share_of(call, options_.reduction, rows);
    workspace own;
    auto* const values =
        reinterpret_cast<double*>((call.memory ? *call.memory : own)
                                      .request(static_cast<std::size_t>(rows) * sizeof(double)));
    core::share_out(tasks, workers, call.run_on, [&](std::size_t) {
      return [&, a = side(x[0].cols), b = side(x[0].cols)](index t) mutable {
        for (index r = t * per_task; r < std::min(rows, (t + 1) * per_task); ++r) {
          const double weight = core::weight_of(call, r);
          const double scale = core::times(weight, static_cast<double>(call.scale) * share *
                                                       core::upstream_of(call, r));
          values[r] = weight == 0 ? 0 : weight * compare(x, r, targets[r], a, b);
          if (call.values.data)
            call.values[r] = static_cast<T>(values[r]);
          if (g) {
            a.write(g[0], r, scale, call.accumulate);
            b.write(g[1], r, scale, call.accumulate);
          }
        }
      };
    });
    core::exact_sum total;
    for (index r = 0; r < rows; ++r)
      total.add(values[r]);
    return static_cast<T>(share == 0 ? 0 : total.value() * share);
  }

  /// One item of a pair.
  struct side {
    std::vector<double> p, level;
    std::vector<T> stage;
    double mean = 0, variance = 0;
    double of_mean = 0, of_variance = 0; ///< derivatives of ℓ

    explicit side(index levels)
        : p(static_cast<std::size_t>(core::whole_packs(levels))), level(p.size()), stage(p.size()) {
    }

    void read(const core::matrix_data<T>& x, index r, bool best_first) {
      core::read_row(x, r, stage.data(), p.data());
      double top = core::no_score;
      for (index k = 0; k < x.cols; ++k) {
        const double z = p[static_cast<std::size_t>(k)];
        top = z > top || std::isnan(z) ? z : top;
        level[static_cast<std::size_t>(k)] = core::level_of(k, x.cols, best_first);
      }
      core::exact_sum all, of_levels;
      for (std::size_t k = 0; k < p.size(); ++k) {
        p[k] = core::first_lane(exp(core::pack<double>(p[k] - top))); // NaN where there is no top
        all.add(p[k]);
        of_levels.add(p[k] * level[k]);
      }
      mean = of_levels.value() / all.value();
      variance = 0;
      for (std::size_t k = 0; k < p.size(); ++k) {
        p[k] /= all.value();
        variance += p[k] * (level[k] - mean) * (level[k] - mean);
      }
    }
    void write(const core::matrix_data<T, true>& g, index r, double scale, bool accumulate) {
      for (std::size_t k = 0; k < p.size(); ++k) {
        const double off = level[k] - mean;
        p[k] = core::times(scale, p[k] * (of_mean * off + of_variance * (off * off - variance)));
      }
      core::write_row(g, r, p.data(), accumulate, stage.data());
    }
  };

  /// The value of a pair; leaves what its gradients need.
  double compare(const core::matrix_data<T>* x, index r, T target, side& a, side& b) const {
    a.read(x[0], r, options_.best_first);
    b.read(x[1], r, options_.best_first);
    const double v = variance_of(a.variance + b.variance), root = std::sqrt(v);
    const double u = (a.mean - b.mean) / root, g = static_cast<double>(target);
    const double p = core::normal_probability(u), q = core::normal_probability(-u);
    const double slope = slope_of(u, p, q, g);
    a.of_mean = slope / root;
    b.of_mean = -a.of_mean;
    a.of_variance = b.of_variance = options_.variance > 0 ? 0 : -slope * u / (2 * v);
    return half_gap(p, g) + half_gap(q, 1 - g);
  }
  /// Half of ℓ's digits: ½ (√p − √g)² for √(p g + ε) − √(p g) less.
  double half_gap(double p, double g) const {
    const double e = static_cast<double>(options_.smoothing);
    const double apart = std::sqrt(p) - std::sqrt(g), without = std::sqrt(p * g);
    return 0.5 * apart * apart - (e == 0 ? 0 : e / (std::sqrt(p * g + e) + without));
  }
  /// ∂ℓ/∂u. Where both fractions of ℓ_P are there, so that they do not cancel,
  /// ℓ_P = ½ (G (1 − G)(P − G) + ε (1 − 2G))/(a b ((1 − G) a + G b)), a and b the roots.
  double slope_of(double u, double p, double q, double g) const {
    const double e = static_cast<double>(options_.smoothing), h = 1 - g;
    const double a = std::sqrt(p * g + e), b = std::sqrt(q * h + e);
    const double density = core::normal_density(u);
    if (std::isnan(g))
      return g;
    if (density == 0 || (g > 0 && a == 0) || (h > 0 && b == 0))
      return 0;
    if (g == 0 || h == 0)
      return 0.5 * density * (g == 0 ? 1 / b : -1 / a);
    return 0.5 * density * (g * h * (p - g) + e * (h - g)) / (a * b * (h * a + g * b));
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
