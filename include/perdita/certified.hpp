// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/paired_kernel.hpp"
#include "core/row_loss.hpp"
#include "core/solved_row.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// Cross-entropy of the worst scores that bounds allow. The first row is the one whose slopes are
/// wanted.
struct certified_formula {
  static constexpr bool paired = true;
  enum class first_row { lower, upper, margins };
  first_row first;

  double operator()(const double* x, const double* other, index n, index y, double* slopes) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    double *worst = slopes + n, *d = worst + n;
    choose(x, other, n, y, worst);
    const rivals_of_row rivals(worst, n, y, d);
    if (rivals.lost || worst[y] == inf)
      return spoil(slopes, n);
    const double sum = exponential_moments(d, n, 1).sum;
    if (sum == 0 && worst[y] == -inf)
      return spoil(slopes, n);                                       // every class is masked
    const double u = sum == 0 ? -inf : std::log(sum) - rivals.label; // log of the odds against y
    const double smaller = std::exp(-std::fabs(u)), miss = (u > 0 ? 1 : smaller) / (1 + smaller);
    write(d, sum, miss, n, y, slopes);
    return std::log1p(smaller) + std::fmax(u, 0);
  }

private:
  void choose(const double* x, const double* other, index n, index y, double* worst) const {
    if (first == first_row::margins) {
      for (index k = 0; k < n; ++k)
        worst[k] = -x[k];
      worst[y] = 0;
    } else {
      const bool is_lower = first == first_row::lower;
      std::copy_n(is_lower ? other : x, n, worst);
      worst[y] = (is_lower ? x : other)[y];
    }
  }
  void write(const double* d, double sum, double miss, index n, index y, double* slopes) const {
    if (first == first_row::lower) {
      std::fill_n(slopes, n, 0.0);
      slopes[y] = -miss;
      return;
    }
    const double share = sum == 0 ? 0 : (first == first_row::upper ? miss : -miss) / sum;
    for (index k = 0; k < n; ++k)
      slopes[k] = share * std::exp(d[k]); // 0 for the label
  }
  static double spoil(double* slopes, index n) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(slopes, n, nan);
    return nan;
  }
};

} // namespace core

/// Certified cross-entropy: that of the worst scores between given bounds (those of interval bound
/// propagation, for example), which is at least that of any scores between them,
///
///   ℓ = log Σ_k e^{ẑ_k − ẑ_y},   ẑ_y = lower_y, ẑ_k = upper_k for k ≠ y;   p = softmax(ẑ)
///   ∂ℓ/∂lower_y = p_y − 1,  ∂ℓ/∂upper_k = p_k (k ≠ y), all others 0
///
/// Both matrices are rows × classes. Value and gradients keep their digits where p_y is almost 1.
/// lower = upper is cross_entropy. That lower ≤ upper is not checked, and the lower bounds of
/// rivals and the label's upper bound are of no effect, NaN too. Classes whose upper bound is -inf
/// do not count; lower_y = -inf has the value +inf; a bound that counts and is +inf or NaN, or no
/// class at all, makes the row NaN. Asking for the gradients takes a pass for each; they lie apart
/// from each other and from the bounds. Reductions, errors, row weights: as cross_entropy. No
/// by-products but `values`.
/// Source: Gowal et al., "On the effectiveness of interval bound propagation", 2018; Wong, Kolter,
/// ICML 2018.
template <class T = float>
class certified_cross_entropy : public row_loss<certified_cross_entropy<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "certified_cross_entropy";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  certified_cross_entropy() : certified_cross_entropy(options{}) {}
  explicit(false) certified_cross_entropy(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = true,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = true};
  }

  /// The reduced value.
  template <class L, class U, core::labels_like Y>
  requires core::scores_like<L, T> && core::scores_like<U, T>
      T operator()(L&& lower, U&& upper, Y&& labels, const call_options<T>& call = {}) const {
    return run<false>(lower, upper, labels, matrix_view<T>(), call, first_row::lower);
  }
  /// The reduced value, and the gradients with respect to both bounds.
  template <class L, class U, core::labels_like Y, class G, class H>
  requires core::scores_like<L, T> && core::scores_like<U, T> && core::gradient_like<G, T> &&
      core::gradient_like<H, T>
          T operator()(L&& lower, U&& upper, Y&& labels, G&& d_lower, H&& d_upper,
                       const call_options<T>& call = {}) const {
    const auto to_lower = core::as_matrix(d_lower);
    const auto to_upper = core::as_matrix(d_upper);
    this->check_pair(core::as_matrix(lower), core::as_matrix(upper), to_lower, to_upper,
                     "rows of the lower bounds' gradient", "columns of the lower bounds' gradient",
                     "the lower bounds' gradient");
    run<true>(upper, lower, labels, to_upper, call, first_row::upper);
    return run<true>(lower, upper, labels, to_lower, call, first_row::lower);
  }

private:
  friend row_loss<certified_cross_entropy<T>, T>;
  using first_row = core::certified_formula::first_row;

  template <bool Gradient, class X, class A, class Y, class G>
  T run(X& first, A& second, Y& labels, matrix_view<G> gradient, const call_options<T>& call,
        first_row which) const {
    auto job = this->paired_job(core::as_matrix(first), core::as_matrix(second), gradient,
                                "the other bounds");
    this->set_labels(job, core::as_vector(labels));
    return this->template evaluate<Gradient>(
        job, call, [&](const auto&, auto f) { f(core::certified_formula{which}); });
  }
  options options_;
};

/// Certified cross-entropy from lower bounds m_k of the margins z_y − z_k, which are tighter than
/// what bounds of the scores say,
///
///   ℓ = log(1 + Σ_{k≠y} e^{−m_k}),   ∂ℓ/∂m_k = −e^{−m_k}/(1 + Σ_{j≠y} e^{−m_j})
///
/// The matrix is rows × classes; the label's own entry is of no effect (its margin is 0), and its
/// gradient is 0. m_k = +inf: the class does not count. -inf (nothing is known) or NaN makes the
/// row NaN. Reductions, errors, row weights, in place: as cross_entropy. No by-products but
/// `values`.
/// Source: Wong, Kolter, ICML 2018; Zhang et al., "CROWN-IBP", ICLR 2020.
template <class T = float>
class certified_margin_loss : public row_loss<certified_margin_loss<T>, T> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "certified_margin_loss";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  certified_margin_loss() : certified_margin_loss(options{}) {}
  explicit(false) certified_margin_loss(const options& o) : options_(o) {
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }
  constexpr loss_traits traits() const {
    return {.convex = true,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = false};
  }

  /// The reduced value.
  template <class M, core::labels_like Y>
  requires core::scores_like<M, T> T operator()(M&& margins, Y&& labels,
                                                const call_options<T>& call = {}) const {
    return run<false>(core::as_matrix(margins), labels, matrix_view<T>(), call);
  }
  /// The reduced value, and its gradient with respect to the margins.
  template <class M, core::labels_like Y, class G>
  requires core::scores_like<M, T> && core::gradient_like<G, T>
      T operator()(M&& margins, Y&& labels, G&& gradient, const call_options<T>& call = {}) const {
    return run<true>(core::as_matrix(margins), labels, core::as_matrix(gradient), call);
  }

private:
  friend row_loss<certified_margin_loss<T>, T>;

  template <bool Gradient, class S, class Y, class G>
  T run(const matrix_view<S>& margins, Y& labels, const matrix_view<G>& gradient,
        const call_options<T>& call) const {
    core::row_job<T> job;
    job.name = name;
    job.scores = job.soft = core::matrix_data<T>(margins); // the kernel reads two
    job.gradient = core::matrix_data<T, true>(gradient);
    this->set_labels(job, core::as_vector(labels));
    return this->template evaluate<Gradient>(job, call, [](const auto&, auto f) {
      f(core::certified_formula{core::certified_formula::first_row::margins});
    });
  }
  options options_;
};

namespace core {

/// Lower bounds of margins of a linear layer whose inputs lie in boxes, and what their slopes say
/// of everything that they are made of. Works on copies in double.
class interval_layer {
public:
  template <class T>
  interval_layer(const matrix_data<T>& center, const matrix_data<T>& radius,
                 const matrix_data<T>& weights, const std::vector<std::int64_t>& labels,
                 const executor& run_on)
      : rows_(center.rows), classes_(weights.rows), dims_(center.cols), center_(copy(center)),
        radius_(copy(radius)), weights_(copy(weights)), labels_(labels), run_on_(run_on) {}

  /// m_k = ⟨W_y − W_k, c⟩ − ⟨|W_y − W_k|, r⟩ + b_y − b_k. Rows whose labels are out of range stay.
  template <class B> void find_margins(const B& bias, double* margins) const {
    run(rows_, [&](index r) {
      const index y = label(r);
      if (y < 0)
        return;
      for (index k = 0; k < classes_; ++k) {
        double sum = bias(y) - bias(k);
        for_inputs(r, y, k, [&](index, double d, double c, double radius) {
          sum += d * c - std::fabs(d) * radius;
        });
        margins[r * classes_ + k] = sum;
      }
    });
  }
  /// f(row, ∂/∂c, ∂/∂r)
  template <class F> void of_inputs(const double* slopes, F f) const {
    run(rows_, [&](index r) {
      std::vector<double> sums(static_cast<std::size_t>(2 * dims_));
      double *of_center = sums.data(), *of_radius = of_center + dims_;
      for_rivals(r, slopes, [&](index y, index k, double g) {
        for_inputs(r, y, k, [&](index j, double d, double, double) {
          of_center[j] += g * d;
          of_radius[j] -= g * std::fabs(d);
        });
      });
      f(r, of_center, of_radius);
    });
  }
  /// f(class, ∂/∂W, ∂/∂b)
  template <class F> void of_classes(const double* slopes, F f) const {
    run(classes_, [&](index own) {
      std::vector<double> of_weights(static_cast<std::size_t>(dims_));
      double of_bias = 0;
      for (index r = 0; r < rows_; ++r)
        for_rivals(r, slopes, [&](index y, index k, double g) {
          if (y != own && k != own)
            return;
          const double sign = y == own ? g : -g;
          of_bias += sign;
          for_inputs(r, y, k, [&](index j, double d, double c, double radius) {
            of_weights[static_cast<std::size_t>(j)] += sign * (c - (d > 0   ? radius
                                                                    : d < 0 ? -radius
                                                                            : 0));
          });
        });
      f(own, of_weights.data(), of_bias);
    });
  }

private:
  template <class T> static std::vector<double> copy(const matrix_data<T>& from) {
    std::vector<double> to;
    std::vector<T> row(static_cast<std::size_t>(from.cols));
    for (index r = 0; r < from.rows; ++r) {
      from.read(r, 0, from.cols, row.data());
      to.insert(to.end(), row.begin(), row.end());
    }
    return to;
  }
  index label(index r) const {
    const auto y = labels_[static_cast<std::size_t>(r)];
    return y >= 0 && y < classes_ ? static_cast<index>(y) : -1;
  }
  template <class F> void run(index n, F f) const {
    const auto work = [&](std::size_t i) { f(static_cast<index>(i)); };
    run_on_(static_cast<std::size_t>(n), work);
  }
  /// f(label, class, slope of the margin) where there is a slope.
  template <class F> void for_rivals(index r, const double* slopes, F f) const {
    const index y = label(r);
    for (index k = 0; y >= 0 && k < classes_; ++k)
      if (k != y && slopes[r * classes_ + k] != 0)
        f(y, k, slopes[r * classes_ + k]);
  }
  /// f(j, W_yj − W_kj, c_j, r_j)
  template <class F> void for_inputs(index r, index y, index k, F f) const {
    const double *of_y = weights_.data() + y * dims_, *of_k = weights_.data() + k * dims_;
    const double *c = center_.data() + r * dims_, *radius = radius_.data() + r * dims_;
    for (index j = 0; j < dims_; ++j)
      f(j, of_y[j] - of_k[j], c[j], radius[j]);
  }

  index rows_, classes_, dims_;
  std::vector<double> center_, radius_, weights_;
  const std::vector<std::int64_t>& labels_;
  const executor& run_on_;
};

} // namespace core

/// certified_margin_loss of a last layer z = W h + b whose inputs are known to lie in boxes,
/// |h − c| ≤ r, with the layer's own bounds of its margins, tighter than those of its scores:
///
///   m_k = ⟨W_y − W_k, c⟩ − ⟨|W_y − W_k|, r⟩ + b_y − b_k,   ℓ = log(1 + Σ_{k≠y} e^{−m_k})
///
/// with g_k = ∂ℓ/∂m_k, D_k = W_y − W_k:
///
///   ∂ℓ/∂c = Σ g_k D_k,  ∂ℓ/∂r = −Σ g_k |D_k|,  ∂ℓ/∂b_y = Σ g_k,  ∂ℓ/∂b_k = −g_k
///   ∂ℓ/∂W_y = Σ g_k (c − sign(D_k) r),  ∂ℓ/∂W_k = −g_k (c − sign(D_k) r),   sign(0) = 0
///
/// center, radius: rows × features; weights: classes × features; bias: classes. r ≥ 0 is not
/// checked; r = 0 is cross_entropy of the layer. Outputs lie apart from each other; `accumulate`
/// adds to all of them. NaN makes its row NaN and, as far as it reaches, the gradients of weights
/// and bias. Sums are in double, and no bit depends on the number of threads. Takes memory for
/// copies of the inputs in double, and for the margins. Reductions, errors, row weights: as
/// cross_entropy. No by-products but `values`.
/// Source: Gowal et al., "On the effectiveness of interval bound propagation", 2018 (elision of the
/// last layer).
template <class T = float> class certified_linear {
public:
  using value_type = T;
  using options = typename certified_margin_loss<T>::options;
  static constexpr const char* name = "certified_linear";

  certified_linear() : certified_linear(options{}) {}
  explicit(false) certified_linear(const options& o)
      : margin_loss_({.ignore_index = o.ignore_index, .reduction = o.reduction}), options_(o) {}
  const options& settings() const { return options_; }

  /// The reduced value.
  template <class C, class R, class W, core::labels_like Y>
  requires core::scores_like<C, T> && core::scores_like<R, T> && core::scores_like<W, T>
      T operator()(C&& center, R&& radius, W&& weights, vector_view<const T> bias, Y&& labels,
                   const call_options<T>& call = {}) const {
    return run({core::as_matrix(center)}, {core::as_matrix(radius)}, {core::as_matrix(weights)},
               bias, core::as_vector(labels), nullptr, call);
  }
  /// The reduced value, and all gradients.
  template <class C, class R, class W, core::labels_like Y, class DC, class DR, class DW>
  requires core::scores_like<C, T> && core::scores_like<R, T> && core::scores_like<W, T> &&
      core::gradient_like<DC, T> && core::gradient_like<DR, T> && core::gradient_like<DW, T>
          T operator()(C&& center, R&& radius, W&& weights, vector_view<const T> bias, Y&& labels,
                       DC&& d_center, DR&& d_radius, DW&& d_weights, vector_view<T> d_bias,
                       const call_options<T>& call = {}) const {
    const matrix_view<T> of_bias(d_bias.data, 1, d_bias.size, 0, d_bias.stride);
    const outputs to{{core::as_matrix(d_center)},
                     {core::as_matrix(d_radius)},
                     {core::as_matrix(d_weights)},
                     {of_bias}};
    return run({core::as_matrix(center)}, {core::as_matrix(radius)}, {core::as_matrix(weights)},
               bias, core::as_vector(labels), &to, call);
  }

private:
  using input = core::matrix_data<T>;
  using output = core::matrix_data<T, true>;
  struct outputs {
    output center, radius, weights, bias;
  };

  template <bool M>
  static void check(const char* what, const core::matrix_data<T, M>& m, index rows, index cols) {
    core::require(m.rows == rows, name, (std::string("rows of ") + what).c_str(), m.rows,
                  "the number that the other arguments have");
    core::require(m.cols == cols, name, (std::string("columns of ") + what).c_str(), m.cols,
                  "the number that the other arguments have");
    core::require(m.data || rows * cols == 0, name, what, 0, "a pointer to memory");
  }
  static void check_outputs(const outputs& to, const input& center, const input& weights) {
    check("d_center", to.center, center.rows, center.cols);
    check("d_radius", to.radius, center.rows, center.cols);
    check("d_weights", to.weights, weights.rows, weights.cols);
    check("d_bias", to.bias, 1, weights.rows);
    const core::extent memory[] = {core::bytes_of(to.center), core::bytes_of(to.radius),
                                   core::bytes_of(to.weights), core::bytes_of(to.bias)};
    core::require_apart(name, memory, 4);
  }
  /// Sums become elements, or are added to them.
  static void put(const output& to, index r, const double* from, index n, bool accumulate) {
    std::vector<T> row(static_cast<std::size_t>(n), T(0));
    if (accumulate)
      to.reader(to.at(r, 0), to.col_stride, n, row.data());
    for (index j = 0; j < n; ++j)
      row[static_cast<std::size_t>(j)] += static_cast<T>(from[j]);
    to.write(r, 0, n, row.data());
  }
  static std::vector<double> widened(const vector_view<const T>& v) {
    std::vector<double> wide;
    for (index i = 0; v.data && i < v.size; ++i)
      wide.push_back(static_cast<double>(v[i]));
    return wide;
  }

  template <class L>
  T run(const input& center, const input& radius, const input& weights,
        const vector_view<const T>& bias, const vector_view<L>& labels, const outputs* to,
        const call_options<T>& call) const {
    const index rows = center.rows, classes = weights.rows;
    check("center", center, rows, center.cols);
    check("radius", radius, rows, center.cols);
    check("weights", weights, classes, center.cols);
    core::require(bias.size == classes, name, "size of bias", bias.size, "the number of classes");
    core::require(bias.data || classes == 0, name, "bias", 0, "a pointer to memory");
    core::require(labels.size == rows, name, "labels", labels.size, "as many as rows");
    core::require(labels.data || rows == 0, name, "labels", 0, "a pointer to memory");
    if (to)
      check_outputs(*to, center, weights);

    std::vector<std::int64_t> of_rows(static_cast<std::size_t>(rows));
    core::read_labels<std::remove_const_t<L>>(labels.data, labels.stride, 0, rows, of_rows.data());
    std::vector<double> margins(static_cast<std::size_t>(rows * classes));
    const core::interval_layer layer(center, radius, weights, of_rows, call.run_on);
    layer.find_margins([&](index k) { return static_cast<double>(bias[k]); }, margins.data());
    const double value = of_margins(margins, classes, of_rows, call);
    if (to) {
      layer.of_inputs(margins.data(), [&](index r, const double* c, const double* radii) {
        put(to->center, r, c, center.cols, call.accumulate);
        put(to->radius, r, radii, center.cols, call.accumulate);
      });
      const vector_view<T> d_bias(reinterpret_cast<T*>(to->bias.data), classes,
                                  to->bias.col_stride);
      layer.of_classes(margins.data(), [&](index k, const double* w, double b) {
        put(to->weights, k, w, center.cols, call.accumulate);
        d_bias[k] = static_cast<T>(call.accumulate ? static_cast<double>(d_bias[k]) + b : b);
      });
    }
    return static_cast<T>(value);
  }
  /// Margins become their slopes.
  double of_margins(std::vector<double>& margins, index classes,
                    const std::vector<std::int64_t>& labels, const call_options<T>& call) const {
    const std::vector<double> weights = widened(call.row_weights), factors = widened(call.upstream);
    const auto rows = static_cast<index>(labels.size());
    core::require(!call.values.data || call.values.size == rows, name, "values", call.values.size,
                  "as many as rows");
    std::vector<double> values(labels.size());
    call_options<double> wide;
    wide.row_weights = weights;
    wide.upstream = factors;
    wide.scale = static_cast<double>(call.scale);
    wide.normaliser = call.normaliser;
    wide.values = values;
    wide.run_on = call.run_on;
    wide.memory = call.memory;
    const matrix_view<double> at(margins.data(), rows, classes);
    const double value = margin_loss_(at, labels, at, wide);
    for (index r = 0; call.values.data && r < rows; ++r)
      call.values[r] = static_cast<T>(values[static_cast<std::size_t>(r)]);
    return value;
  }

  certified_margin_loss<double> margin_loss_;
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
