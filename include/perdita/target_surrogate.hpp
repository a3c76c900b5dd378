// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/sequences.hpp"
#include "core/weighted.hpp"

namespace perdita::inline PERDITA_ABI {

/// Where a surrogate touches the loss: scores, and the loss's value and gradient there, as a call
/// of any loss gives them. They are not copied.
template <class T> struct surrogate_anchor {
  double value = 0;
  matrix_view<const T> scores;   ///< z_t
  matrix_view<const T> gradient; ///< g = ∂ℓ/∂z at z_t
};

/// Target-based surrogate: a quadratic in the scores z that stands for a loss ℓ that is dear to
/// evaluate (or whose labels are), for several steps on the model that makes z.
///
///   ℓ(z_t) + ⟨g, z − z_t⟩ + ‖z − z_t‖²/(2η),   gradient g + (z − z_t)/η
///
/// At z_t value and gradient are ℓ's. The surrogate is nowhere below ℓ where 1/η is at least the
/// largest eigenvalue of ℓ's Hessian in z: ½ for the sum over rows of softmax cross-entropies,
/// ¼ for logistic losses, and 1/rows of that for the mean. It is least at z = z_t − η g, where it
/// is ℓ(z_t) − η‖g‖²/2.
/// Shapes: z, both matrices of the anchor and the gradient are rows × columns, of T. The gradient
/// may be z itself. Scores that are equal, if infinite, do not differ. NaN stays in its row.
/// Call options: row_weights and upstream multiply the rows' shares ⟨g, d⟩ + ‖d‖²/(2η) with
/// d = z − z_t, which `values` has; scale and accumulate as ever. ℓ(z_t) is only added, in full.
/// Nothing is divided by a number of rows: that is done, if at all, in ℓ(z_t) and g. normaliser is
/// refused. No other by-products. Sums are in double, with their rounding errors kept. Threads do
/// not matter. Throws std::invalid_argument.
/// Source: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based surrogates for
/// stochastic optimization", ICML 2023. The η of their code is an inverse, half of 1/η here.
///
///   const float value = loss(logits, labels, d_logits);              // z_t is a copy of logits
///   perdita::target_surrogate<float> surrogate({.step = 2});
///   for (...) surrogate(new_logits, {value, z_t, d_logits}, d_new_logits);
template <class T = float> class target_surrogate {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double step = 1; ///< η > 0; infinite: the linear part alone
  };
  static constexpr const char* name = "target_surrogate";

  target_surrogate() : target_surrogate(options{}) {}
  explicit(false) target_surrogate(const options& o) : options_(o) {
    core::require(o.step > 0, name, "step", o.step, "a number above 0");
  }
  const options& settings() const { return options_; }

  T operator()(matrix_view<const T> scores, const surrogate_anchor<T>& anchor,
               const call_options<T>& call = {}) const {
    return run(scores, anchor, {}, false, call);
  }
  T operator()(matrix_view<const T> scores, const surrogate_anchor<T>& anchor,
               matrix_view<T> gradient, const call_options<T>& call = {}) const {
    return run(scores, anchor, gradient, true, call);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};

  static void same_shape(const char* what, const char* rows, const char* cols,
                         const matrix_view<const T>& m, const matrix_view<const T>& scores) {
    checks.size(rows, m.rows, scores.rows, "as many as the scores have");
    checks.size(cols, m.cols, scores.cols, "as many as the scores have");
    checks.memory(what, m.data, m.rows * m.cols);
  }
  static void check_gradient(const matrix_view<const T>& scores, const surrogate_anchor<T>& anchor,
                             const matrix_view<T>& gradient, bool accumulate) {
    const core::matrix_data<T, true> g(gradient);
    checks.gradient(core::matrix_data<T>(scores), g, accumulate);
    for (const auto* part : {&anchor.scores, &anchor.gradient}) {
      core::row_job<T> job;
      job.scores = core::matrix_data<T>(*part);
      job.gradient = g;
      if (core::check_overlap("target_surrogate: anchor", job))
        core::fail(name, "gradient", "a matrix of the anchor", "memory apart");
    }
  }

  T run(const matrix_view<const T>& z, const surrogate_anchor<T>& anchor,
        const matrix_view<T>& gradient, bool has_gradient, const call_options<T>& call) const {
    const index rows = z.rows;
    checks.memory("scores", z.data, rows * z.cols);
    same_shape("anchor scores", "rows of the anchor's scores", "columns of the anchor's scores",
               anchor.scores, z);
    same_shape("anchor gradient", "rows of the anchor's gradient",
               "columns of the anchor's gradient", anchor.gradient, z);
    checks.call(call, rows, false, "as many as the scores have");
    core::require(call.normaliser == 0, name, "normaliser", call.normaliser,
                  "0: nothing is divided by a number of rows");
    if (has_gradient)
      check_gradient(z, anchor, gradient, call.accumulate);

    constexpr index per_task = 16;
    const index tasks = (rows + per_task - 1) / per_task;
    const auto workers = std::min(static_cast<std::size_t>(tasks), call.run_on.concurrency());
    workspace own;
    auto* const values =
        reinterpret_cast<double*>((call.memory ? *call.memory : own)
                                      .request(static_cast<std::size_t>(rows) * sizeof(double)));
    core::share_out(tasks, workers, call.run_on, [&](std::size_t) {
      return [&](index t) {
        for (index r = t * per_task; r < std::min(rows, (t + 1) * per_task); ++r) {
          values[r] = run_row(z, anchor, gradient, r, has_gradient, call);
          if (call.values.data)
            call.values[r] = static_cast<T>(values[r]);
        }
      };
    });
    core::exact_sum total;
    total.add(anchor.value);
    for (index r = 0; r < rows; ++r)
      total.add(values[r]);
    return static_cast<T>(total.value());
  }

  /// The weighted share of a row; writes its gradient.
  double run_row(const matrix_view<const T>& z, const surrogate_anchor<T>& anchor,
                 const matrix_view<T>& gradient, index r, bool has_gradient,
                 const call_options<T>& call) const {
    const double weight = core::weight_of(call, r);
    const double scale =
        core::times(weight, static_cast<double>(call.scale) * core::upstream_of(call, r));
    const double inverse = 1 / options_.step;
    core::exact_sum sum;
    for (index c = 0; c < z.cols; ++c) {
      const auto now = static_cast<double>(z(r, c)),
                 then = static_cast<double>(anchor.scores(r, c));
      const double moved = now == then ? 0 : now - then; // also from -inf to -inf
      const auto slope = static_cast<double>(anchor.gradient(r, c));
      const double pull = core::times(inverse, moved);
      if (weight != 0)
        sum.add(core::times(moved, slope + pull / 2));
      if (has_gradient) {
        T& g = gradient(r, c);
        const double change = core::times(scale, slope + pull);
        g = static_cast<T>(call.accumulate ? static_cast<double>(g) + change : change);
      }
    }
    return core::times(weight, sum.value());
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
