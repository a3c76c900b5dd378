// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/element_kernel.hpp"
#include "core/math.hpp"
#include "core/random.hpp"
#include "margin.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// The normal distribution's quantile, to some 1e-16: algorithm AS 241 (Wichura 1988).
template <class V> PERDITA_INLINE V normal_quantile(const V& u) {
  using eight = std::array<double, 8>;
  constexpr eight a{3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427,
                    13731.693765509461125, 45921.953931549871457, 67265.770927008700853,
                    33430.575583588128105, 2509.0809287301226727},
      b{1.0,
        42.313330701600911252,
        687.18700749205790830,
        5394.1960214247511077,
        21213.794301586595867,
        39307.895800092710610,
        28729.085735721942674,
        5226.4952788528545610},
      c{1.42343711074968357734,   4.63033784615654529590,   5.76949722146069140550,
        3.64784832476320460504,   1.27045825245236838258,   0.241780725177450611770,
        0.0227238449892691845833, 7.74545014278341407640e-4},
      d{1.0,
        2.05319162663775882187,
        1.67638483018380384940,
        0.689767334985100004550,
        0.148103976427480074590,
        0.0151986665636164571966,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9},
      e{6.65790464350110377720,    5.46378491116411436990,   1.78482653991729133580,
        0.296560571828504891230,   0.0265321895265761230930, 0.00124266094738807843860,
        2.71155556874348757815e-5, 2.01033439929228813265e-7},
      f{1.0,
        0.599832206555887937690,
        0.136929880922735805310,
        0.0148753612908506148525,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15};
  const auto ratio = [](const V& x, const eight& above, const eight& below) {
    return detail::polynomial(x, x * x, above) / detail::polynomial(x, x * x, below);
  };
  const V q = u - V(0.5), s = sqrt(-log(min(u, V(1) - u)));
  const V tail = select(s > V(5), ratio(s - V(5), e, f), ratio(s - V(1.6), c, d));
  return select(abs(q) > V(0.425), with_sign_of(q, tail), q * ratio(fnma(q, q, V(0.180625)), a, b));
}

/// −min(1, r) of a normal z, where z is the Box-Cox transform of r: r = [1 + λz]₊^{1/λ}, or e^z.
template <class V> PERDITA_INLINE V drawn_slope(const V& z, double lambda) {
  // Nearer to 0 than this, λz would lose digits, and r is e^z to the last one.
  const bool exponential = std::abs(lambda) < 0x1p-60;
  const V power = exponential ? z : log1p(max(z * V(lambda), V(-1))) / V(lambda);
  return -exp(min(power, V(0)));
}

/// g m of the margin m, with a g that is given.
template <class T> struct ens_formula : element_formula {
  static constexpr int inputs = 3;
  T step, origin; ///< y = step · label + origin

  template <class V>
  PERDITA_INLINE element_outcome<V> operator()(const V& x, const V& label, const V& g) const {
    const V y = fma(label, V(step), V(origin)), m = y * x;
    return {g * m, unless_nan(m, g * y), unless_nan(m, V(0))};
  }
};

/// Memory for one call, and what is drawn in it.
template <class T> class ens_draw {
  using W = pack<double>;
  static constexpr index width = static_cast<index>(lanes<double>);

public:
  explicit ens_draw(index n) : size_(n) {
    carve(nullptr);
    carve(memory_.request(bytes_));
  }
  T* derivatives() const { return derivatives_; }

  /// Of elements numbered row by row.
  void run(const element_array<T>& x, const element_array<T>& labels, const ens_formula<T>& formula,
           std::uint64_t state, double lambda) {
    if (size_ == 0)
      return;
    x.read(0, size_, margins_);
    labels.read(0, size_, derivatives_);
    for (index i = 0; i < size_; ++i) {
      margins_[i] *= std::fma(derivatives_[i], formula.step, formula.origin);
      order_[i] = i;
    }
    std::sort(order_, order_ + size_, [this](index i, index j) {
      const T a = key(i), b = key(j);
      return a < b || (a == b && i < j);
    });
    draw(state, lambda);
    std::sort(slopes_, slopes_ + size_);
    for (index k = 0; k < size_; ++k)
      derivatives_[order_[k]] = static_cast<T>(flattened(slopes_[k], margins_[order_[k]]));
  }

private:
  void carve(std::byte* base) {
    carver c(base);
    const auto n = static_cast<std::size_t>(size_);
    margins_ = c.take<T>(n);
    derivatives_ = c.take<T>(n);
    order_ = c.take<index>(n);
    slopes_ = c.take<double>(n + lanes<double>);
    bytes_ = c.used();
  }
  /// NaN, which has no rank, goes with +inf.
  T key(index i) const {
    return margins_[i] == margins_[i] ? margins_[i] : std::numeric_limits<T>::infinity();
  }
  void draw(std::uint64_t state, double lambda) {
    for (index i = 0; i < size_; i += width) {
      for (index k = i; k < i + width; ++k)
        slopes_[k] = uniform_at(state, static_cast<std::uint64_t>(k));
      drawn_slope(normal_quantile(W::load(slopes_ + i)), lambda).store(slopes_ + i);
    }
  }
  static double flattened(double g, T margin) {
    return g / std::max(1.0, static_cast<double>(margin)) - 1e-6;
  }

  index size_;
  workspace memory_;
  std::size_t bytes_ = 0;
  T *margins_ = nullptr, *derivatives_ = nullptr;
  index* order_ = nullptr;
  double* slopes_ = nullptr;
};

} // namespace core

/// EnsLoss, an ensemble of binary losses: every step draws another convex, calibrated function φ of
/// the margins m_i = y_i x_i, of which only the derivatives g_i = φ'(m_i) are ever made. For a
/// batch of n, with λ as below:
///
///   z_1 … z_n  normal,  r_j = [1 + λ z_j]₊^{1/λ}  (e^{z_j} for λ = 0),  s = sort(−min(1, r))
///   g_i = s_k/max(1, m_i) − 1e-6,  k the rank of m_i
///
///   value  Σ g_i m_i,  ∂/∂x_i  g_i y_i;  both divided by n for the mean
///
/// So g never decreases with the margin (convexity), is at most −1e-6 (calibration asks for
/// φ'(0) < 0) and at least −1 − 1e-6, and beyond a margin of 1, |g| ≤ 1/m + 1e-6. The gradient is
/// exact for the g that was drawn, as constants. The value is a surrogate and no Σ φ(m_i): it may
/// be negative, differences of it do not give the gradient where they change a rank or m_i > 1,
/// and those of different steps are not to be compared.
///
/// λ is options.lambda or, where options.period is above 0, uniform in (−1, 1), drawn anew every
/// `period` steps.
///
///   perdita::ens_loss<float> loss({.seed = 7, .period = 10 * batches_per_epoch});
///   float value = loss(scores, labels, gradient, step);  // step: 0, 1, 2, …
///
/// What is drawn depends on seed, step, and the number of elements, and on nothing else: not on
/// threads, layout or labels. Margins that are equal are ranked by their place (row by row).
/// Shapes, layouts, labels, reductions, call options and errors: as margin.hpp; an element of
/// weight 0 keeps its rank. NaN in an element makes its value and derivative NaN; it ranks with a
/// margin of +inf. A margin of +inf has value −inf and g = −1e-6, one of −inf the value +inf. Each
/// call allocates memory for its batch, and sorts it on the calling thread.
///
/// Source: Dai, "EnsLoss: Stochastic calibrated loss ensembles for preventing overfitting in
/// classification", ICML 2025.
template <class T = float> class ens_loss : private element_loss<ens_loss<T>, T> {
public:
  using value_type = T;
  struct options {
    std::uint64_t seed = 0;   ///< of all that is drawn
    double lambda = 0;        ///< of the Box-Cox transform, in [−1, 1]; without a period
    std::uint64_t period = 0; ///< steps from one draw of λ to the next; 0: λ is as given
    binary_labels labels = binary_labels::signed_one; ///< how labels are written
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "ens_loss";

  ens_loss() : ens_loss(options{}) {}
  explicit(false) ens_loss(const options& o) : options_(o) {
    core::require(std::abs(o.lambda) <= 1, name, "lambda", o.lambda, "a number in [-1, 1]");
    core::require_labels(name, o.labels);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// λ at a step.
  double lambda(std::uint64_t step) const {
    return options_.period == 0
               ? options_.lambda
               : 2 * core::uniform_at(stream(of_lambda), step / options_.period) - 1;
  }

  /// The reduced Σ g_i m_i.
  template <class X, class Y>
  requires core::reals_like<X, T> && core::elements_like<Y, T>
      T operator()(X&& scores, Y&& labels, std::uint64_t step,
                   const element_options<T>& call = {}) const {
    return run(scores, labels, step, call, [](auto&) {});
  }
  /// The same, and its gradient for constant g, written (or added) to `gradient`: a buffer of its
  /// own, or the scores themselves.
  template <class X, class Y, class G>
  requires core::reals_like<X, T> && core::elements_like<Y, T> && core::writable_elements_like<G, T>
      T operator()(X&& scores, Y&& labels, G&& gradient, std::uint64_t step,
                   const element_options<T>& call = {}) const {
    return run(scores, labels, step, call, [&](auto& job) {
      core::set_output(job, 0, "gradient", core::as_elements(gradient));
    });
  }

private:
  friend element_loss<ens_loss<T>, T>;
  enum purpose : std::uint64_t { of_slopes, of_lambda };
  std::uint64_t stream(purpose p) const {
    return core::split_mix(core::split_mix(options_.seed, 0), p);
  }

  template <class X, class Y, class F>
  T run(X& scores, Y& labels, std::uint64_t step, const element_options<T>& call,
        F set_outputs) const {
    const bool zero_one = options_.labels == binary_labels::zero_one;
    const core::ens_formula<T> formula{{}, T(zero_one ? 2 : 1), T(zero_one ? -1 : 0)};
    auto job = this->make_job(formula, scores, labels);
    set_outputs(job);
    const index rows = job.in[0].rows(), cols = job.in[0].cols();
    core::ens_draw<T> draw(rows * cols);
    draw.run(job.in[0], job.in[1], formula, core::split_mix(stream(of_slopes), step), lambda(step));
    job.in[2] = core::element_array<T>(matrix_view<const T>(draw.derivatives(), rows, cols));
    return this->reduce(job, call);
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
