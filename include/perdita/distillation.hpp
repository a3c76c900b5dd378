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
#include "element.hpp"

namespace perdita::inline PERDITA_ABI {

/// How far the student's distribution p is from the teacher's q.
enum class divergence {
  forward_kl,     ///< KL(q ‖ p) = Σ q log(q/p): knowledge distillation
  reverse_kl,     ///< KL(p ‖ q)
  jensen_shannon, ///< β KL(q ‖ m) + (1 − β) KL(p ‖ m),  m = β q + (1 − β) p
  total_variation ///< ½ Σ |p − q|
};

/// How far a student's score x is from the teacher's t at temperature T, class by class.
enum class logit_distance {
  log_cosh,              ///< T² log cosh((x − t)/(2T)) = T² KL(½ ‖ σ((x − t)/T)): DHKD
  binary_kl,             ///< T² KL(σ(t/T) ‖ σ(x/T)), of two outcomes: one against the rest
  squared_error,         ///< ½ (x − t)²
  centred_squared_error, ///< ½ (x − t − mean of x − t)²
};

namespace core {

/// T² must be a number with all its digits, where it is a factor.
template <class T> void require_square(const char* name, T temperature, bool keep_size) {
  const auto t = static_cast<double>(temperature);
  require(!keep_size || std::isnormal(t * t), name, "temperature", temperature,
          "a number whose square neither overflows nor underflows, or keep_size false");
}

/// e^x − 1 − x for |x| ≤ 1, with all its digits.
inline pack<double> exp_beyond_linear(const pack<double>& x) {
  using W = pack<double>;
  constexpr int terms = 18;
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

/// What the formulas of two rows of scores have in common.
struct paired_scores {
  static constexpr bool paired = true;
  using W = pack<double>;
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
    index leader = 0;   // whose score is the top
    double log_sum = 0; // log Σ e^{(z − top)/T}

    softmax(const double* z, index n, double temperature, double* p) {
      for (index i = 0; i < n; ++i)
        if (z[i] > top || z[i] != z[i]) {
          top = z[i];
          leader = i;
        }
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

  /// a − b, and what rounding leaves of it (Knuth).
  struct difference {
    double value, rest;
    difference(double a, double b) : value(a - b) {
      const double of_b = a - value;
      rest = (a - (value + of_b)) + (of_b - b);
    }
  };

  static bool gone(double x, double t) {
    constexpr double nothing = -std::numeric_limits<double>::infinity();
    return x == nothing && t == nothing;
  }
  /// r = (x − t)/T less a constant; 0 where both are masked. Returns its mean by q where all of r
  /// is within ½ of that, else r of the teacher's leader.
  static double ratios_to_centre(const double* x, const double* t, index n, double temperature,
                                 const double* q, const softmax& of_x, const softmax& of_t,
                                 double* r) {
    // Scores of one side may be far above those of the other, which means nothing.
    const difference apart(of_x.top, of_t.top);
    for (index i = 0; i < n; ++i) {
      const difference d(x[i], t[i]);
      const double rest = std::isfinite(d.value) ? d.rest - apart.rest : 0;
      r[i] = gone(x[i], t[i]) ? 0 : ((d.value - apart.value) + rest) / temperature;
    }
    W total(0);
    for (index i = 0; i < n; i += width)
      total += first(q + i, n - i) * first(r + i, n - i);
    const double mean = sum_lanes(total);
    bool all = mean == mean;
    for (index i = 0; all && i < n; ++i)
      all = gone(x[i], t[i]) || std::fabs(r[i] - mean) <= 0.5;
    return all ? mean : r[of_t.leader];
  }

  /// r = log(p/q); 0 where both are masked. With d = (x − t)/T less a constant, r is d − c. Some
  /// classes have d near each other: all of them where p and q are, else those by the teacher's
  /// leader. With the mean μ of these by q, and the masses P and Q of the others, c is
  /// μ + log1p(Σ_near q φ(d − μ) − Q) − log1p(−P): no digit of what is near 0 is lost.
  /// Returns what was subtracted last, from all alike: less it, r cancels with no mean of r.
  static double log_ratios(const double* x, const double* t, index n, double temperature,
                           const double* p, const double* q, const softmax& of_x,
                           const softmax& of_t, double* r) {
    const double centre = ratios_to_centre(x, t, n, temperature, q, of_x, of_t, r);
    const W limit(0.5), zero(0);
    W far_p(0), far_q(0), near_q(0), moment(0);
    for (index i = 0; i < n; i += width) {
      const W d = first(r + i, n - i) - W(centre), mine = first(p + i, n - i),
              share = first(q + i, n - i);
      const auto near = abs(d) <= limit;
      far_p += select(near, zero, mine);
      far_q += select(near, zero, share);
      near_q += select(near, share, zero);
      moment += select(near, share * d, zero);
      put(d, r + i, n - i);
    }
    const double lost_p = sum_lanes(far_p), lost_q = sum_lanes(far_q);
    if (lost_p <= 0.5 && lost_q <= 0.5) {
      const double shift = sum_lanes(moment) / sum_lanes(near_q);
      W beyond(0);
      for (index i = 0; i < n; i += width) {
        const W d = first(r + i, n - i), share = first(q + i, n - i);
        beyond += select((share == zero) | !(abs(d) <= limit), zero,
                         share * exp_beyond_linear(d - W(shift)));
      }
      const double more = std::log1p(sum_lanes(beyond) - lost_q) - std::log1p(-lost_p);
      for (index i = 0; i < n; ++i)
        r[i] = gone(x[i], t[i]) ? 0 : (r[i] - shift) - more;
      return more;
    }
    for (index i = 0; i < n; ++i)
      r[i] = gone(x[i], t[i]) ? 0
                              : ((x[i] - of_x.top) - (t[i] - of_t.top)) / temperature -
                                    (of_x.log_sum - of_t.log_sum);
    return 0;
  }
};

struct distillation_formula : paired_scores {
  distillation_formula(divergence of, double at, double weight, double factor)
      : kind(of), temperature(at), beta(weight), scale(factor) {}

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
    const double common = log_ratios(x, t, n, temperature, p, q, of_x, of_t, r);
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
      mean = sum([&](const W& a, const W&, const W& l) { return shared(a, l + W(common)); });
      slope([&](const W& a, const W&, const W& l) { return shared(a, (l + W(common)) - W(mean)); });
      break;
    case divergence::jensen_shannon: {
      const W student(1 - beta), teacher(beta);
      const auto mixed = [=](const W& a, const W& b) { return fma(teacher, b, student * a); };
      // log(1 + w (e^l − 1)), small for a small w too; `same` is 1 + w (e^l − 1), for where that is
      // small or e^l too large.
      const auto log_mix = [](const W& w, const W& l, const W& same) {
        const W more = w * expm1(l);
        return select((l <= W(600)) & (more > W(-0.5)), log1p(more), log(same));
      };
      const auto of_teacher = [=](const W& a, const W& b, const W& l) { // log(m/q)
        return log_mix(student, l, mixed(a, b) / b);
      };
      const auto of_student = [=](const W& a, const W& b, const W& l) { // log(m/p)
        return log_mix(teacher, -l, mixed(a, b) / a);
      };
      value = sum([&](const W& a, const W& b, const W& l) {
        const W m = mixed(a, b);
        return teacher * divergence_term(b, m, of_teacher(a, b, l)) +
               student * divergence_term(a, m, of_student(a, b, l));
      });
      const W base = log_mix(teacher, W(common), W(1)); // of_student of the common part
      const auto own = [&](const W& a, const W& b, const W& l) {
        return base - of_student(a, b, l);
      };
      mean = sum([&](const W& a, const W& b, const W& l) { return shared(a, own(a, b, l)); });
      slope([&](const W& a, const W& b, const W& l) {
        return student * shared(a, own(a, b, l) - W(mean));
      });
      break;
    }
    case divergence::total_variation: {
      value = 0.5 * sum([](const W& a, const W& b, const W& l) {
                return select(abs(l) <= W(0.5), abs(b * expm1(l)), abs(a - b));
              });
      // p/2 (s − Σ p s), s the sign of r, by the masses of the other signs: 1 − Σ p s cancels.
      const W zero(0), two(2);
      const W up(sum([&](const W&a, const W&, const W&l) { return select(l > zero, a, zero); })),
          down(sum([&](const W&a, const W&, const W&l) { return select(l < zero, a, zero); })),
          same(sum([&](const W&a, const W&, const W&l) { return select(l == zero, a, zero); }));
      slope([&](const W& a, const W&, const W& l) {
        return W(0.5) * a *
               select(l > zero, two * down + same, select(l < zero, -(two * up + same), down - up));
      });
      break;
    }
    }
    return scale * value;
  }
};

struct logit_matching_formula : paired_scores {
  logit_matching_formula(logit_distance of, double at, double factor, bool mean)
      : kind(of), temperature(at), scale(factor), per_class(mean) {}

  logit_distance kind;
  double temperature;
  double scale; // of the value
  bool per_class;

  double operator()(const double* x, const double* t, index n, index, double* slopes) const {
    const bool centred = kind == logit_distance::centred_squared_error;
    const index classes = centred || per_class ? count(x, t, n) : 1;
    const double factor = per_class ? scale / static_cast<double>(classes) : scale;
    const W mean(centred ? sum_of_differences(x, t, n) / static_cast<double>(classes) : 0);
    W total(0);
    for (index i = 0; i < n; i += width) {
      const W a = first(x + i, n - i), b = first(t + i, n - i), d = difference(a, b);
      element_outcome<W> term;
      if (kind == logit_distance::log_cosh) {
        const log_cosh_formula<double> log_cosh;
        const W half = d / W(2 * temperature), zero(0);
        term = log_cosh.late(half, zero, log_cosh.early(half, zero));
        term.slope = term.slope * W(0.5);
      } else if (kind == logit_distance::binary_kl) {
        term = binary_kl(a / W(temperature), b / W(temperature), d / W(temperature));
      } else {
        const W gone(no_score), off = (d - mean) / W(temperature);
        term.slope = select((a == gone) & (b == gone), W(0), off);
        term.value = W(0.5) * term.slope * term.slope;
      }
      total += n - i >= width ? term.value : without_rest(term.value, n - i);
      put(term.slope * W(factor / temperature), slopes + i, n - i);
    }
    const double value = factor * sum_lanes(total);
    if (value != value)
      std::fill_n(slopes, n, value);
    return value;
  }

private:
  static constexpr double no_score = -std::numeric_limits<double>::infinity();

  /// Equal scores do not differ, if infinite.
  static W difference(const W& a, const W& b) { return select(a == b, W(0), a - b); }
  static W without_rest(const W& a, index n) {
    return select(iota<double>() < W(static_cast<double>(n)), a, W(0));
  }
  /// Classes that are not masked for both; 1 where there are none.
  static index count(const double* x, const double* t, index n) {
    index classes = 0;
    for (index i = 0; i < n; ++i)
      classes += !(x[i] == no_score && t[i] == no_score);
    return std::max<index>(classes, 1);
  }
  static double sum_of_differences(const double* x, const double* t, index n) {
    exact_sum sum;
    for (index i = 0; i < n; ++i)
      sum.add(x[i] == t[i] ? 0 : x[i] - t[i]);
    return sum.value();
  }

  /// log(σ(a)/σ(b)) for scores that are not near each other, d = a − b.
  static W far_log_ratio(const W& a, const W& b, const W& d) {
    const W zero(0), kink = select((a <= zero) & (b <= zero), d, min(a, zero) - min(b, zero));
    return kink - (log1p(exp(-abs(a))) - log1p(exp(-abs(b))));
  }
  /// KL(σ(b) ‖ σ(a)) and σ(a) − σ(b). With p = σ(a), q = σ(b),
  /// log(p/q) = −log1p((1 − q)(e^−d − 1)) and log((1 − p)/(1 − q)) = −log1p(q (e^d − 1)),
  /// neither of which cancels where a is near b.
  static element_outcome<W> binary_kl(const W& a, const W& b, const W& d) {
    const W p = sigmoid(a), not_p = sigmoid(-a), q = sigmoid(b), not_q = sigmoid(-b);
    const auto near = abs(d) <= W(0.5);
    const W yes = select(near, -log1p(not_q * expm1(-d)), far_log_ratio(a, b, d));
    const W no = select(near, -log1p(q * expm1(d)), far_log_ratio(-a, -b, -d));
    element_outcome<W> out;
    out.value = divergence_term(q, p, yes) + divergence_term(not_q, not_p, no);
    out.slope = select(near, q * not_p * expm1(d), select(b > W(0), not_q - not_p, p - q));
    return out;
  }
};

/// ½ (log p_y − t_y)² of the label y, t_y being the logarithm of the teacher's probability.
struct sampled_log_ratio_formula : paired_scores {
  double operator()(const double* x, const double* t, index n, index label, double* slopes) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const softmax of_x(x, n, 1, slopes);
    const double target = t[label];
    if (!std::isfinite(of_x.top) || target != target) {
      std::fill_n(slopes, n, std::numeric_limits<double>::quiet_NaN());
      return slopes[0];
    }
    double rivals = 0;
    for (index i = 0; i < n; ++i)
      rivals += i == label ? 0 : slopes[i];
    const double log_p = x[label] == of_x.top ? -std::log1p(rivals / slopes[label])
                                              : (x[label] - of_x.top) - of_x.log_sum;
    const double r = log_p == -inf && target == -inf ? 0 : log_p - target;
    for (index i = 0; i < n; ++i)
      slopes[i] = slopes[i] == 0 || r == 0 ? 0 : -r * slopes[i];
    slopes[label] = rivals == 0 || r == 0 ? 0 : r * rivals;
    return 0.5 * r * r;
  }
};

/// Σ ½ (log p − log q)² over all classes.
struct log_ratio_formula : paired_scores {
  double operator()(const double* x, const double* t, index n, index, double* slopes) const {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    double *p = slopes + n, *q = p + n, *r = q + n;
    const softmax of_x(x, n, 1, p), of_t(t, n, 1, q);
    if (!(std::isfinite(of_x.top) && std::isfinite(of_t.top))) {
      std::fill_n(slopes, n, nan);
      return nan;
    }
    log_ratios(x, t, n, 1, p, q, of_x, of_t, r);
    double squares = 0, sum = 0;
    for (index i = 0; i < n; ++i) {
      squares += r[i] * r[i];
      sum += r[i];
    }
    for (index i = 0; i < n; ++i)
      slopes[i] = std::isfinite(squares) ? r[i] - p[i] * sum : nan;
    return 0.5 * squares;
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
/// its teacher, nor where both are confident: value and gradient of forward and reverse KL and
/// Jensen-Shannon keep their digits, and so does total variation where both are confident.
/// Classes masked (-inf) for both do not count; what only one of them masks costs what the formula
/// says (+inf, or log(1/β) …). A row that is all masked, or has NaN or +inf, is NaN.
/// Shapes, reductions, errors: as cross_entropy with soft targets. No by-products but `values`.
/// Needs whole rows, so not on the linear head (sequence_head has both KL there).
/// Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015; reverse KL
/// and generalised Jensen-Shannon: Agarwal et al., "On-policy distillation of language models",
/// ICLR 2024.
template <class T = float> class distillation : public row_loss<distillation<T>, T> {
public:
  struct options {
    perdita::divergence divergence = perdita::divergence::forward_kl;
    T temperature = 1;     ///< T > 0, of both; with keep_size T² must be a normal double
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
    core::require_enumerator(name, "divergence", o.divergence, perdita::divergence::total_variation,
                             "one of those that are named");
    core::invertible<double>(name, "temperature", o.temperature);
    core::require_square(name, o.temperature, o.keep_size);
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
    f(core::distillation_formula(options_.divergence, t, static_cast<double>(options_.beta),
                                 options_.keep_size ? t * t : 1));
  }
  options options_;
};

/// Distillation of scores, not of distributions: every class by itself, with no softmax.
///
///   ℓ = Σ_k T² D(x_k, t_k)    x of the student, t of the teacher
///   log_cosh:              D = log cosh((x − t)/(2T)),       ∂ℓ/∂x = ½ T tanh((x − t)/(2T))
///   binary_kl:             D = KL(σ(t/T) ‖ σ(x/T)),          ∂ℓ/∂x = T (σ(x/T) − σ(t/T))
///   squared_error:         D = (x − t)²/(2T²),               ∂ℓ/∂x = x − t
///   centred_squared_error: D = (x − t − mean(x − t))²/(2T²), ∂ℓ/∂x = x − t − mean(x − t)
///
/// T² keeps the gradient's size when T changes; without keep_size it is left out. per_class divides
/// by the number of classes: centred_squared_error is then what `distillation` by forward KL tends
/// to for T → ∞. log_cosh is the loss of a student's second head in dual-head distillation (the
/// first has cross_entropy), with T = 2 and weight 1 or 0.1.
/// The target is the teacher's scores, rows × classes. Nothing cancels where the student is near
/// its teacher, and no probability is clamped. Classes with equal scores, if infinite, do not
/// differ; those masked (-inf) for both do not count in a mean either. What only one of them masks
/// costs what the formula says (a centred row with one is NaN). NaN makes its row NaN.
/// Shapes, reductions, errors: as cross_entropy with soft targets. No by-products but `values`.
/// Needs whole rows, so not on the linear head.
/// Source: Yang, Zhou, Gong, Zhang, "Dual-head knowledge distillation", 2024 (log_cosh, binary_kl);
/// Ba, Caruana, "Do deep nets really need to be deep?", NeurIPS 2014 (squared_error); Hinton,
/// Vinyals, Dean 2015 (centred).
template <class T = float> class logit_matching : public row_loss<logit_matching<T>, T> {
public:
  struct options {
    logit_distance distance = logit_distance::log_cosh;
    T temperature = 2;      ///< as distillation's; of no effect on squared errors of kept size
    bool keep_size = true;  ///< the factor T²
    bool per_class = false; ///< the mean over the classes, not the sum
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100; ///< without effect: there are no labels
  };
  static constexpr const char* name = "logit_matching";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;

  logit_matching() : logit_matching(options{}) {}
  explicit(false) logit_matching(const options& o) : options_(o) {
    core::require_enumerator(name, "distance", o.distance, logit_distance::centred_squared_error,
                             "one of those that are named");
    core::invertible<double>(name, "temperature", o.temperature);
    core::require_square(name, o.temperature, o.keep_size);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = true,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = options_.distance == logit_distance::centred_squared_error};
  }

private:
  friend row_loss<logit_matching<T>, T>;
  void check(const core::row_job<T>& job) const {
    if (job.labels && job.scores.rows > 0)
      core::fail(name, "target", "labels", "the scores of a teacher, rows × classes");
  }
  template <class F> void visit(const core::row_job<T>&, F f) const {
    const auto t = static_cast<double>(options_.temperature);
    f(core::logit_matching_formula(options_.distance, t, options_.keep_size ? t * t : 1,
                                   options_.per_class));
  }
  options options_;
};

/// Squared difference of log-probabilities (SEL), of the student's softmax p and a teacher: of the
/// label y alone, whose log-probability the teacher gives, or of all classes.
///
///   ℓ = ½ r_y²,    r_y = log p_y − log q_y,   ∂ℓ/∂x_j = r_y (δ_jy − p_j)
///   ℓ = ½ Σ r_k²,  r_k = log p_k − log q_k,   ∂ℓ/∂x_j = r_j − p_j Σ r_k,  q = softmax(t)
///
/// The first learns q from labels that are drawn from it; cross-entropy weighted by q_y would not,
/// but the normalised q². Not convex.
/// scores: rows × classes; labels as for cross_entropy, ignore_index too; log_probabilities: log
/// q_y of T, one per row, of which only the label's is asked for; teacher: scores (or
/// log-probabilities), rows × classes. A class that both mask (-inf) has r = 0. Where one of them
/// does the value is +inf: the gradient is then infinite in the label's form, as the formula says,
/// and NaN in that of all classes. A row that is all masked, or has NaN or +inf, is NaN.
/// Reductions, call options, errors: as cross_entropy. No by-products but `values`. Needs whole
/// rows, so not on the linear head.
/// Source: Zhao, Zhu, "Towards the fundamental limits of knowledge transfer over finite domains",
/// ICLR 2024.
template <class T = float> class squared_log_ratio : public row_loss<squared_log_ratio<T>, T> {
public:
  struct options {
    perdita::reduction reduction = perdita::reduction::mean;
    std::int64_t ignore_index = -100;
  };
  static constexpr const char* name = "squared_log_ratio";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = false;

  squared_log_ratio() : squared_log_ratio(options{}) {}
  explicit(false) squared_log_ratio(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = false,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

  /// Of the labels: the reduced value.
  template <class X, core::labels_like Y, core::vector_like Q>
  requires core::scores_like<X, T> T operator()(X&& scores, Y&& labels, Q&& log_probabilities,
                                                const call_options<T>& call = {}) const {
    return of_labels<false>(core::as_matrix(scores), core::as_vector(labels),
                            core::as_vector(log_probabilities), matrix_view<T>(), call);
  }
  /// The reduced value, and its gradient.
  template <class X, core::labels_like Y, core::vector_like Q, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& labels, Q&& log_probabilities, G&& gradient,
                   const call_options<T>& call = {}) const {
    return of_labels<true>(core::as_matrix(scores), core::as_vector(labels),
                           core::as_vector(log_probabilities), core::as_matrix(gradient), call);
  }
  /// Of all classes: the reduced value.
  template <class X, class Y>
  requires core::scores_like<X, T> && core::scores_like<Y, T>
      T operator()(X&& scores, Y&& teacher, const call_options<T>& call = {}) const {
    return of_classes<false>(core::as_matrix(scores), core::as_matrix(teacher), matrix_view<T>(),
                             call);
  }
  /// The reduced value, and its gradient.
  template <class X, class Y, class G>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::gradient_like<G, T>
      T operator()(X&& scores, Y&& teacher, G&& gradient, const call_options<T>& call = {}) const {
    return of_classes<true>(core::as_matrix(scores), core::as_matrix(teacher),
                            core::as_matrix(gradient), call);
  }

private:
  friend row_loss<squared_log_ratio<T>, T>;

  template <bool Gradient, class X, class L, class G>
  T of_labels(const matrix_view<X>& scores, const vector_view<L>& labels,
              const vector_view<const T>& log_q, const matrix_view<G>& gradient,
              const call_options<T>& call) const {
    this->check_size("log_probabilities", log_q.size, scores.rows);
    // A row of the teacher's is one number, as often as there are classes.
    const matrix_view<const T> teacher(log_q.data, scores.rows, scores.cols, log_q.stride, 0);
    auto job = this->paired_job(scores, teacher, gradient, "log_probabilities");
    this->set_labels(job, labels);
    return this->template evaluate<Gradient>(
        job, call, [](const auto&, auto f) { f(core::sampled_log_ratio_formula()); });
  }
  template <bool Gradient, class X, class Y, class G>
  T of_classes(const matrix_view<X>& scores, const matrix_view<Y>& teacher,
               const matrix_view<G>& gradient, const call_options<T>& call) const {
    auto job = this->paired_job(scores, teacher, gradient, "teacher");
    return this->template evaluate<Gradient>(
        job, call, [](const auto&, auto f) { f(core::log_ratio_formula()); });
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
