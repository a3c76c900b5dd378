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
    const double sum = sum_of_images(d, n, 1);
    if (sum == 0 && worst[y] == -inf)
      return spoil(slopes, n);                                       // every class is masked
    const double u = sum == 0 ? -inf : std::log(sum) - rivals.label; // log of the odds against y
    const scalar_odds odds(u);
    write(d, sum, odds.miss, n, y, slopes);
    return odds.surprise;
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

/// What a loss of a linear layer's bounds makes of the scores' leads d_k = z_k − z_y over the
/// label's: its slopes with respect to their largest and smallest values where the input lies in
/// its box, and to their values in one corner of it.
struct lead_slopes {
  double upper = 0, lower = 0, corner = 0;
};

/// Leads of a linear layer's scores whose inputs lie in boxes, and what their slopes say of
/// everything that they are made of. Works on copies in double.
class interval_layer {
public:
  template <class T>
  interval_layer(const matrix_data<T>& center, const matrix_data<T>& radius,
                 const matrix_data<T>& weights, const vector_view<const T>& bias,
                 const std::vector<std::int64_t>& labels, const executor& run_on)
      : rows_(center.rows), classes_(weights.rows), dims_(center.cols), center_(copy(center)),
        radius_(copy(radius)), weights_(copy(weights)), labels_(labels), run_on_(run_on),
        slopes_(static_cast<std::size_t>(rows_ * classes_)),
        corners_(static_cast<std::size_t>(rows_ * dims_)) {
    for (index k = 0; k < classes_; ++k)
      bias_.push_back(static_cast<double>(bias[k]));
  }

  /// log U of each row that counts(row), log U = log(1 + Σ_{k≠y} ((1 − f) e^{u_k} + f chord_k)) of
  /// the leads' upper bounds u and of the chords of e^d on [l, u] where their sum is largest; and
  /// its slopes times scale(row).
  template <class C, class S> void judge(double crown_share, C counts, S scale, double* values) {
    run(rows_, [&](index r) {
      if (label(r) >= 0 && counts(r))
        values[r] = judge_row(r, crown_share, scale(r));
    });
  }
  /// f(row, ∂/∂c, ∂/∂r)
  template <class F> void of_inputs(F f) const {
    run(rows_, [&](index r) {
      std::vector<double> sums(static_cast<std::size_t>(2 * dims_));
      double *of_center = sums.data(), *of_radius = of_center + dims_;
      const double* corner = corners_.data() + r * dims_;
      for_rivals(r, [&](index y, index k, const lead_slopes& g) {
        const double all = g.upper + g.lower + g.corner;
        for_inputs(r, y, k, [&](index j, double e, double, double) {
          of_center[j] += all * e;
          of_radius[j] += (g.upper - g.lower) * std::fabs(e) + g.corner * (corner[j] * e);
        });
      });
      f(r, of_center, of_radius);
    });
  }
  /// f(class, ∂/∂W, ∂/∂b)
  template <class F> void of_classes(F f) const {
    run(classes_, [&](index own) {
      std::vector<double> of_weights(static_cast<std::size_t>(dims_));
      double of_bias = 0;
      for (index r = 0; r < rows_; ++r) {
        const double* corner = corners_.data() + r * dims_;
        for_rivals(r, [&](index y, index k, const lead_slopes& g) {
          if (y != own && k != own)
            return;
          const double sign = k == own ? 1 : -1, all = sign * (g.upper + g.lower + g.corner);
          of_bias += all;
          for_inputs(r, y, k, [&](index j, double e, double c, double radius) {
            const double side = e > 0 ? 1 : e < 0 ? -1 : 0;
            of_weights[static_cast<std::size_t>(j)] +=
                all * c + sign * ((g.upper - g.lower) * side + g.corner * corner[j]) * radius;
          });
        });
      }
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
  /// A lead of between middle − reach and middle + reach, and how far it is above the middle in the
  /// corner.
  struct lead {
    double middle, reach, lean = 0;
  };
  double judge_row(index r, double crown_share, double scale) {
    const index y = label(r);
    std::vector<lead> leads(static_cast<std::size_t>(classes_));
    double top = 0; // of the exponents, the label's 0 among them
    for (index k = 0; k < classes_; ++k) {
      lead& d = leads[static_cast<std::size_t>(k)];
      d = {bias_at(k) - bias_at(y), 0};
      for_inputs(r, y, k, [&](index, double e, double c, double radius) {
        d.middle += e * c;
        d.reach += std::fabs(e) * radius;
      });
      if (k != y)
        top = std::fmax(top, d.middle + d.reach);
    }
    if (crown_share > 0)
      find_corner(r, y, top, leads);

    double sum = 0;
    for (index k = 0; k < classes_; ++k) {
      lead_slopes& g = slopes_[static_cast<std::size_t>(r * classes_ + k)];
      if (k != y)
        sum += relax(leads[static_cast<std::size_t>(k)], top, crown_share, g);
    }
    const double own = std::exp(-top), share = scale / (own + sum);
    for (index k = 0; k < classes_; ++k) {
      lead_slopes& g = slopes_[static_cast<std::size_t>(r * classes_ + k)];
      g = {g.upper * share, g.lower * share, g.corner * share};
    }
    return top == 0 ? std::log1p(sum) : top + std::log(own + sum);
  }
  /// (e^u − e^l)/(u − l) times e^−top
  static double steepness(const lead& d, double top) {
    const double width = 2 * d.reach, high = std::exp(d.middle + d.reach - top);
    return width > 0 && high > 0 ? high * (-std::expm1(-width) / width) : high;
  }
  /// Where in the box the sum of the chords is largest: a corner for Σ slope_k (W_k − W_y).
  void find_corner(index r, index y, double top, std::vector<lead>& leads) {
    double* corner = corners_.data() + r * dims_;
    for (index k = 0; k < classes_; ++k)
      if (k != y) {
        const double slope = steepness(leads[static_cast<std::size_t>(k)], top);
        if (slope != 0)
          for_inputs(r, y, k, [&](index j, double e, double, double) { corner[j] += slope * e; });
      }
    for (index j = 0; j < dims_; ++j)
      corner[j] = corner[j] > 0 ? 1 : corner[j] < 0 ? -1 : 0;
    for (index k = 0; k < classes_; ++k)
      for_inputs(r, y, k, [&](index j, double e, double, double radius) {
        leads[static_cast<std::size_t>(k)].lean += corner[j] * e * radius;
      });
  }
  /// (1 − f) e^u + f chord in the corner, times e^−top as its slopes are.
  static double relax(const lead& d, double top, double f, lead_slopes& g) {
    const double high = std::exp(d.middle + d.reach - top);
    if (f == 0 || !(d.reach > 0)) { // the chord is a point
      g = {high, 0, 0};
      return high;
    }
    const double low = std::exp(d.middle - d.reach - top), steep = steepness(d, top);
    const double at = std::clamp((d.reach + d.lean) / (2 * d.reach), 0.0, 1.0);
    g = {(1 - f) * high + f * at * (high - steep), f * (1 - at) * (low - steep), f * steep};
    return (1 - f) * high + f * ((1 - at) * low + at * high);
  }
  double bias_at(index k) const { return bias_[static_cast<std::size_t>(k)]; }

  /// f(label, class, slopes of its lead) where there is a slope.
  template <class F> void for_rivals(index r, F f) const {
    const index y = label(r);
    for (index k = 0; y >= 0 && k < classes_; ++k) {
      const lead_slopes& g = slopes_[static_cast<std::size_t>(r * classes_ + k)];
      if (g.upper != 0 || g.lower != 0 || g.corner != 0)
        f(y, k, g);
    }
  }
  /// f(j, W_kj − W_yj, c_j, r_j)
  template <class F> void for_inputs(index r, index y, index k, F f) const {
    const double *of_y = weights_.data() + y * dims_, *of_k = weights_.data() + k * dims_;
    const double *c = center_.data() + r * dims_, *radius = radius_.data() + r * dims_;
    for (index j = 0; j < dims_; ++j)
      f(j, of_k[j] - of_y[j], c[j], radius[j]);
  }

  index rows_, classes_, dims_;
  std::vector<double> center_, radius_, weights_, bias_;
  const std::vector<std::int64_t>& labels_;
  const executor& run_on_;
  std::vector<lead_slopes> slopes_; ///< 0 for the label, and for rows that do not count
  std::vector<double> corners_;     ///< the side, -1 to 1, of each row's corner
};

} // namespace core

/// Certified cross-entropy of a last layer z = W h + b whose inputs are known to lie in boxes,
/// |h − c| ≤ r: log of an upper bound, over the box, of Σ_k e^{d_k}, d_k = z_k − z_y the leads over
/// the label's score. With E_k = W_k − W_y, and u_k, l_k = ⟨E_k, c⟩ + b_k − b_y ± ⟨|E_k|, r⟩ the
/// layer's own bounds of d_k, tighter than those of its scores,
///
///   ℓ = log(1 + Σ_{k≠y} ((1 − f) e^{u_k} + f chord_k(d_k(h*))))
///
/// With the default f = 0 this is certified_margin_loss of m_k = −u_k. f = 1 is CROWN's fusion of
/// the loss with the layer: e^d is at most its chord between l_k and u_k, of slope s_k =
/// (e^{u_k} − e^{l_k})/(u_k − l_k), and the sum of the chords, one linear function of h, is largest
/// in a corner, h* = c + sign(Σ s_k E_k) r. It is nowhere above f = 0, and below it as soon as two
/// classes cannot have their worst in the same corner. CROWN-IBP mixes both: f falls from 1 to 0
/// (f = (ε_max − ε)/ε_max) while the box grows.
///
/// With θ_k = (d_k(h*) − l_k)/(u_k − l_k) and U what the logarithm is of,
///
///   U ∂ℓ/∂u_k = (1 − f) e^{u_k} + f θ_k (e^{u_k} − s_k),  U ∂ℓ/∂l_k = f (1 − θ_k) (e^{l_k} − s_k),
///   U ∂ℓ/∂d_k(h*) = f s_k
///
/// and from there to c, r, W and b; sign(0) = 0, and where u_k = l_k the chord is e^{u_k}.
///
/// center, radius: rows × features; weights: classes × features; bias: classes. r ≥ 0 is not
/// checked; r = 0 is cross_entropy of the layer. Outputs lie apart from each other; `accumulate`
/// adds to all of them. NaN makes its row NaN and, as far as it reaches, the gradients of weights
/// and bias. Sums are in double, and no bit depends on the number of threads. Takes memory for
/// copies of the inputs in double, and for the slopes. Reductions, errors, row weights: as
/// cross_entropy. No by-products but `values`.
/// Source: Gowal et al., "On the effectiveness of interval bound propagation", 2018 (elision of the
/// last layer); Zhang et al., "Towards stable and efficient training of verifiably robust neural
/// networks" (CROWN-IBP), ICLR 2020; Xu et al., "Automatic perturbation analysis for scalable
/// certified robustness and beyond", NeurIPS 2020 (loss fusion).
template <class T = float> class certified_linear : public row_loss<certified_linear<T>, T> {
public:
  using value_type = T;
  struct options {
    double crown_share = 0; ///< f in [0, 1]: of the chords' bound; the rest: the intervals'
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "certified_linear";
  static constexpr bool takes_soft_targets = false;
  static constexpr bool has_softmax = false;

  certified_linear() : certified_linear(options{}) {}
  explicit(false) certified_linear(const options& o) : options_(o) {
    core::require(o.crown_share >= 0 && o.crown_share <= 1, name, "crown_share", o.crown_share,
                  "a number in [0, 1]");
    core::require_reduction(name, o.reduction);
  }
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
  friend row_loss<certified_linear<T>, T>;
  template <class F> void visit(const core::row_job<T>&, F f) const { f(0); }

  using input = core::matrix_data<T>;
  using output = core::matrix_data<T, true>;
  struct outputs {
    output center, radius, weights, bias;
  };

  template <bool M>
  static void check_matrix(const char* what, const core::matrix_data<T, M>& m, index rows,
                           index cols) {
    core::require(m.rows == rows, name, (std::string("rows of ") + what).c_str(), m.rows,
                  "the number that the other arguments have");
    core::require(m.cols == cols, name, (std::string("columns of ") + what).c_str(), m.cols,
                  "the number that the other arguments have");
    core::require(m.data || rows * cols == 0, name, what, 0, "a pointer to memory");
  }
  static void check_outputs(const outputs& to, const input& center, const input& weights) {
    check_matrix("d_center", to.center, center.rows, center.cols);
    check_matrix("d_radius", to.radius, center.rows, center.cols);
    check_matrix("d_weights", to.weights, weights.rows, weights.cols);
    check_matrix("d_bias", to.bias, 1, weights.rows);
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

  template <class L>
  T run(const input& center, const input& radius, const input& weights,
        const vector_view<const T>& bias, const vector_view<L>& labels, const outputs* to,
        const call_options<T>& call) const {
    const index rows = center.rows, classes = weights.rows;
    check_matrix("center", center, rows, center.cols);
    check_matrix("radius", radius, rows, center.cols);
    check_matrix("weights", weights, classes, center.cols);
    core::require(bias.size == classes, name, "size of bias", bias.size, "the number of classes");
    core::require(bias.data || classes == 0, name, "bias", 0, "a pointer to memory");
    core::require(labels.size == rows, name, "labels", labels.size, "as many as rows");
    core::require(labels.data || rows == 0, name, "labels", 0, "a pointer to memory");
    if (to)
      check_outputs(*to, center, weights);

    core::row_job<T> job;
    job.name = name;
    job.scores.rows = rows;
    job.scores.cols = classes;
    this->set_labels(job, labels);
    return this->drive(job, call, [&](const auto&) {
      return judge({center, radius, weights}, bias, job, to, call);
    });
  }
  struct inputs {
    const input &center, &radius, &weights;
  };
  /// Σ of the rows' weighted values, and all gradients.
  double judge(const inputs& in, const vector_view<const T>& bias, const core::row_job<T>& job,
               const outputs* to, const call_options<T>& call) const {
    const index rows = job.scores.rows, classes = job.scores.cols, dims = in.center.cols;
    std::vector<std::int64_t> labels(static_cast<std::size_t>(rows));
    if (rows > 0)
      job.read_labels(0, rows, labels.data());
    const auto counts = [&](index r) { return job.counts(r, labels[static_cast<std::size_t>(r)]); };
    std::vector<double> values(labels.size());
    core::interval_layer layer(in.center, in.radius, in.weights, bias, labels, call.run_on);
    layer.judge(
        options_.crown_share, counts, [&](index r) { return job.row_scale(r); }, values.data());
    core::value_sum total;
    for (index r = 0; r < rows; ++r)
      if (counts(r))
        core::store_value(job, r, values[static_cast<std::size_t>(r)], total);
      else
        core::store_ignored_report(job, r);
    if (to) {
      layer.of_inputs([&](index r, const double* c, const double* radii) {
        put(to->center, r, c, dims, call.accumulate);
        put(to->radius, r, radii, dims, call.accumulate);
      });
      const vector_view<T> d_bias(reinterpret_cast<T*>(to->bias.data), classes,
                                  to->bias.col_stride);
      layer.of_classes([&](index k, const double* w, double b) {
        put(to->weights, k, w, dims, call.accumulate);
        d_bias[k] = static_cast<T>(call.accumulate ? static_cast<double>(d_bias[k]) + b : b);
      });
    }
    core::exact_sum sum;
    total.add_to(sum);
    return sum.value();
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
