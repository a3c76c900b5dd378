// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/paired_kernel.hpp"
#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

/// How far the student's distribution p is from the teacher's q.
enum class divergence {
  forward_kl,     ///< KL(q ‖ p) = Σ q log(q/p): knowledge distillation
  reverse_kl,     ///< KL(p ‖ q)
  jensen_shannon, ///< β KL(q ‖ m) + (1 − β) KL(p ‖ m),  m = β q + (1 − β) p
  total_variation ///< ½ Σ |p − q|
};

namespace core {

/// e^x − 1 − x for |x| ≤ ½, with all its digits.
inline pack<double> exp_beyond_linear(const pack<double>& x) {
  using W = pack<double>;
  constexpr int terms = 14;
  W sum(1);
  for (int k = terms; k > 2; --k)
    sum = fma(sum * x, W(1.0 / k), W(1));
  return W(0.5) * x * x * sum;
}

/// The part of a class in KL(a ‖ b) = Σ a φ(log(b/a)), φ(x) = e^x − 1 − x: never below 0, and
/// nothing cancels where a and b are nearly equal. `ratio` is log(b/a).
inline pack<double> divergence_term(const pack<double>& a, const pack<double>& b,
                                    const pack<double>& ratio) {
  using W = pack<double>;
  const W zero(0), far = (b - a) - select(a == zero, zero, a * ratio);
  return select(abs(ratio) <= W(0.5), a * exp_beyond_linear(ratio), far);
}

struct distillation_formula {
  static constexpr bool paired = true;
  using W = pack<double>;

  divergence kind;
  double temperature, beta;
  double scale; // of the value

  double operator()(const double* x, const double* t, index n, index, double* slopes) const {
    double *p = slopes + n, *q = p + n, *r = q + n;
    const softmax of_x(x, n, temperature, p), of_t(t, n, temperature, q);
    if (!(std::isfinite(of_x.top) && std::isfinite(of_t.top))) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(slopes, n, nan);
      return nan;
    }
    log_ratios(x, t, n, q, of_x, of_t, r);
    double value = 0, mean = 0; // of what p is multiplied by
    const auto at = [&](index i, auto f) {
      return f(first(p + i, n - i), first(q + i, n - i), first(r + i, n - i));
    };
    const auto sum = [&](auto f) {
      W total(0);
      for (index i = 0; i < n; i += width)
        total += at(i, f);
      return sum_lanes(total);
    };
    const auto slope = [&](auto f) {
      for (index i = 0; i < n; i += width)
        put(W(scale / temperature) * at(i, f), slopes + i, n - i);
    };
    // p times what is multiplied by it, as it must be where p is 0
    const auto shared = [](const W& share, const W& y) {
      return select(share == W(0), W(0), share * y);
    };
    switch (kind) {
    case divergence::forward_kl:
      value = sum([](const W& a, const W& b, const W& l) { return divergence_term(b, a, l); });
      slope([](const W& a, const W& b, const W& l) {
        return select(abs(l) <= W(0.5), b * expm1(l), a - b);
      });
      break;
    case divergence::reverse_kl:
      value = sum([](const W& a, const W& b, const W& l) { return divergence_term(a, b, -l); });
      mean = sum([&](const W& a, const W&, const W& l) { return shared(a, l); });
      slope([&](const W& a, const W&, const W& l) { return shared(a, l - W(mean)); });
      break;
    case divergence::jensen_shannon: {
      const W student(1 - beta), teacher(beta);
      // log(m/q), log(p/m) and m
      const auto mixed = [=](const W& a, const W& b, const W& l, W& m) {
        m = fma(teacher, b, student * a);
        return select(abs(l) <= W(0.5), log1p(student * expm1(l)), log(m / b));
      };
      const auto own = [=](const W& a, const W& b, const W& l, W& m) {
        const W of_teacher = mixed(a, b, l, m);
        return select(abs(l) <= W(0.5), l - of_teacher, log(a / m));
      };
      value = sum([&](const W& a, const W& b, const W& l) {
        W m;
        const W of_teacher = mixed(a, b, l, m), of_student = own(a, b, l, m);
        return teacher * divergence_term(b, m, of_teacher) +
               student * divergence_term(a, m, -of_student);
      });
      mean = sum([&](const W& a, const W& b, const W& l) {
        W m;
        return shared(a, own(a, b, l, m));
      });
      slope([&](const W& a, const W& b, const W& l) {
        W m;
        return student * shared(a, own(a, b, l, m) - W(mean));
      });
      break;
    }
    case divergence::total_variation: {
      const auto sign = [](const W& l) {
        return select(l > W(0), W(1), select(l < W(0), W(-1), W(0)));
      };
      value = 0.5 * sum([](const W& a, const W& b, const W& l) {
                return select(abs(l) <= W(0.5), abs(b * expm1(l)), abs(a - b));
              });
      mean = sum([&](const W& a, const W&, const W& l) { return a * sign(l); });
      slope([&](const W& a, const W&, const W& l) { return W(0.5) * a * (sign(l) - W(mean)); });
      break;
    }
    }
    return scale * value;
  }

private:
  static constexpr auto width = static_cast<index>(lanes<double>);

  static W first(const double* p, index n) {
    return n >= width ? W::load(p) : load_first(p, n, W(0));
  }
  static void put(const W& a, double* p, index n) {
    if (n >= width)
      a.store(p);
    else
      store_first(a, p, n);
  }

  /// p = softmax(z/T). The top is infinite or NaN where there is none.
  struct softmax {
    double top = -std::numeric_limits<double>::infinity();
    double log_sum = 0; // log Σ e^{(z − top)/T}

    softmax(const double* z, index n, double temperature, double* p) {
      for (index i = 0; i < n; ++i)
        top = z[i] > top || z[i] != z[i] ? z[i] : top;
      if (!std::isfinite(top))
        return;
      W sum(0);
      for_packs(z, n, -std::numeric_limits<double>::infinity(), [&](const W& at, index i) {
        const W image = exp((at - W(top)) / W(temperature));
        sum += image;
        put(image, p + i, n - i);
      });
      const double total = sum_lanes(sum);
      log_sum = std::log(total);
      for (index i = 0; i < n; i += width)
        put(first(p + i, n - i) / W(total), p + i, n - i);
    }
  };

  /// r = log(p/q); 0 where both are masked. Where p and q are near each other it is
  /// d − log E_q e^d, d = (x − t)/T, whose logarithm is μ + log1p(E_q φ(d − μ)), μ the mean of d:
  /// no digit is lost.
  void log_ratios(const double* x, const double* t, index n, const double* q, const softmax& of_x,
                  const softmax& of_t, double* r) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const auto gone = [&](index i) { return x[i] == -inf && t[i] == -inf; };
    const double apart = of_x.top - of_t.top;
    for (index i = 0; i < n; ++i)
      r[i] = ((gone(i) ? apart : x[i] - t[i])) / temperature;
    W total(0);
    for (index i = 0; i < n; i += width)
      total += first(q + i, n - i) * first(r + i, n - i);
    const double mean = sum_lanes(total);
    double reach = mean == mean ? 0 : inf;
    for (index i = 0; i < n; ++i)
      reach = gone(i) ? reach : std::fmax(reach, std::fabs(r[i] - mean));
    if (reach <= 0.5) {
      W beyond(0);
      for (index i = 0; i < n; i += width) {
        const W d = first(r + i, n - i) - W(mean), share = first(q + i, n - i);
        beyond += select(share == W(0), W(0), share * exp_beyond_linear(d));
      }
      const double more = std::log1p(sum_lanes(beyond));
      for (index i = 0; i < n; ++i)
        r[i] = gone(i) ? 0 : (r[i] - mean) - more;
      return;
    }
    for (index i = 0; i < n; ++i)
      r[i] = gone(i) ? 0
                     : ((x[i] - of_x.top) - (t[i] - of_t.top)) / temperature -
                           (of_x.log_sum - of_t.log_sum);
  }
};

} // namespace core

/// Distillation: a student's scores against a teacher's, by a divergence of their distributions,
///
///   ℓ = T² D(q, p),   p = softmax(x/T) of the student, q = softmax(t/T) of the teacher
///   forward_kl:       ∂ℓ/∂x = T (p − q)
///   reverse_kl:       ∂ℓ/∂x = T p (r − Σ p r),            r = log(p/q)
///   jensen_shannon:   ∂ℓ/∂x = (1 − β) T p (r − Σ p r),    r = log(p/m)
///   total_variation:  ∂ℓ/∂x = ½ T p (s − Σ p s),          s = sign(p − q)
///
/// T² keeps the gradient's size when T changes; without keep_size it is left out.
/// The target is the teacher's scores, rows × classes. Nothing cancels where the student is near
/// its teacher: value and gradient of forward and reverse KL and Jensen-Shannon keep their digits.
/// Classes masked (-inf) for both do not count; what only one of them masks costs what the formula
/// says (+inf, or log(1/β) …). A row that is all masked, or has NaN or +inf, is NaN.
/// Shapes, reductions, errors: as cross_entropy with soft targets. No by-products but `values`.
/// Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015; reverse KL
/// and generalised Jensen-Shannon: Agarwal et al., "On-policy distillation of language models",
/// ICLR 2024.
template <class T = float> class distillation : public row_loss<distillation<T>, T> {
public:
  struct options {
    perdita::divergence divergence = perdita::divergence::forward_kl;
    T temperature = 1;     ///< T > 0, of both
    T beta = T(0.5);       ///< of jensen_shannon: the teacher's weight, between 0 and 1
    bool keep_size = true; ///< the factor T²
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< without effect: there are no labels
  };
  static constexpr const char* name = "distillation";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;

  distillation() : distillation(options{}) {}
  explicit(false) distillation(const options& o) : options_(o) {
    using perdita::divergence;
    const auto kind = static_cast<int>(o.divergence);
    core::require(kind >= 0 && kind <= static_cast<int>(divergence::total_variation), name,
                  "divergence", kind, "one of those that are named");
    core::require(o.temperature > 0 && std::isfinite(o.temperature), name, "temperature",
                  o.temperature, "a finite number above 0");
    core::require(o.beta > 0 && o.beta < 1, name, "beta", o.beta, "a number between 0 and 1");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = options_.divergence == divergence::forward_kl,
            .smooth = options_.divergence != divergence::total_variation,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

private:
  friend row_loss<distillation<T>, T>;
  void check(const core::row_job<T>& job) const {
    if (job.labels && job.scores.rows > 0)
      core::fail(name, "target", "labels", "the scores of a teacher, rows × classes");
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    const auto t = static_cast<double>(options_.temperature);
    f(core::distillation_formula{options_.divergence, t, static_cast<double>(options_.beta),
                                 options_.keep_size ? t * t : 1});
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
