// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/batch_call.hpp"
#include "core/point_cloud.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// e^{(least − ‖x − y‖²)/(2 σ²)} between points, from squared distances.
struct gaussian_kernel {
  double unit; ///< which points are multiplied by: a power of two, 1 unless σ² is out of range
  double rate; ///< 1/(2 σ²), of such points
  double least = 0; ///< the squared distance whose kernel is 1

  explicit gaussian_kernel(double bandwidth) {
    const int exponent = std::ilogb(bandwidth);
    unit = std::ldexp(1.0, std::clamp(exponent, -400, 400) - exponent);
    rate = 0.5 / (bandwidth * unit) / (bandwidth * unit);
  }
  gaussian_kernel from(double square) const {
    gaussian_kernel kernel = *this;
    kernel.least = square;
    return kernel;
  }
  pack<double> operator()(const pack<double>& squares) const {
    return exp_shifted((pack<double>(least) - squares) * rate);
  }
};

/// Σ_j k(x_i, y_j) for all points x_i, and, where `pulls` is given, Σ_j k (x_i − y_j). Without the
/// pair i, i if so asked.
inline std::vector<double> sum_kernel(const point_cloud& x, const point_cloud& y,
                                      const gaussian_kernel& kernel, bool skip_own, double* pulls,
                                      const executor& run_on) {
  using W = pack<double>;
  std::vector<double> sums(static_cast<std::size_t>(x.size()));
  for_points(x, y, run_on, [&](index i, pack<double>* pull) {
    W sum(0);
    for (index b = 0; b < y.blocks(); ++b) {
      const W k = kernel(y.squares(x.point(i), b, skip_own ? i : -1));
      sum += k;
      if (pulls)
        y.add_pull(x.point(i), b, k, pull);
    }
    sums[static_cast<std::size_t>(i)] = sum_lanes(sum);
    if (pulls)
      for (index d = 0; d < x.dims(); ++d)
        pulls[i * x.dims() + d] = sum_lanes(pull[d]);
  });
  return sums;
}
/// The largest of number(i, block of y) of all pairs of points; 0 if none is finite.
template <class Number>
double largest_number(const point_cloud& x, const point_cloud& y, const executor& run_on,
                      Number number) {
  using W = pack<double>;
  std::vector<double> largest(static_cast<std::size_t>(x.size()));
  for_points(x, y, run_on, [&](index i, W*) {
    W high(no_score);
    for (index b = 0; b < y.blocks(); ++b)
      high = max(number(i, b), high);
    largest[static_cast<std::size_t>(i)] = max_lanes(high);
  });
  const double top = *std::max_element(largest.begin(), largest.end());
  return std::isfinite(top) ? top : 0;
}
inline double total_of(const std::vector<double>& parts) {
  exact_sum sum;
  for (const double part : parts)
    sum.add(part);
  return sum.value();
}

/// Kernels of two samples: their sums, and for the gradients Σ_j k (x_i − y_j).
struct two_sample_sums {
  double xx = 0, yy = 0, xy = 0;
  std::vector<double> pull_xx, pull_yy, pull_xy, pull_yx;

  two_sample_sums(const point_cloud& x, const point_cloud& y, const gaussian_kernel& within,
                  double least, bool skip_own, bool gradients, const executor& run_on) {
    const auto room = [&](std::vector<double>& pulls, const point_cloud& of) {
      pulls.resize(gradients ? static_cast<std::size_t>(of.size() * of.dims()) : 0);
      return gradients ? pulls.data() : nullptr;
    };
    const gaussian_kernel across = within.from(least);
    xx = total_of(sum_kernel(x, x, within, skip_own, room(pull_xx, x), run_on));
    yy = total_of(sum_kernel(y, y, within, skip_own, room(pull_yy, y), run_on));
    xy = total_of(sum_kernel(x, y, across, false, room(pull_xy, x), run_on));
    if (gradients)
      sum_kernel(y, x, across, false, room(pull_yx, y), run_on);
  }
};

/// What a loss of two samples is of its kernels: the value, and ∂value/∂(each sum).
struct two_sample_slopes {
  double value, of_xx, of_yy, of_xy;
};

/// The matrices of a loss of samples, two with as many gradients.
template <class T> struct sample_pair {
  matrix_data<T> in[2];
  matrix_data<T, true> out[2];
  bool has_gradient = false;

  void check(const batch_checks<T>& checks, bool paired, index least,
             const call_options<T>& call) const {
    static constexpr const char* names[2] = {"the first sample", "the second sample"};
    checks.only_whole(call);
    if (paired)
      checks.size("rows of the second sample", in[1].rows, in[0].rows, "as many as of the first");
    else
      checks.size("columns of the second sample", in[1].cols, in[0].cols,
                  "as many as of the first");
    std::vector<extent> memory;
    for (int k = 0; k < 2 && has_gradient; ++k) {
      checks.size("gradient rows", out[k].rows, in[k].rows, "as many as of the sample");
      checks.size("gradient columns", out[k].cols, in[k].cols, "as many as of the sample");
      checks.memory("gradient", out[k].data, out[k].rows * out[k].cols);
      memory.push_back(bytes_of(out[k]));
    }
    const std::size_t written = memory.size();
    for (int k = 0; k < 2; ++k) {
      require(in[k].rows >= least, checks.name,
              k == 0 ? "rows of the first sample" : "rows of the second sample", in[k].rows,
              least == 2 ? "at least 2" : "at least 1");
      checks.memory(names[k], in[k].data, in[k].rows * in[k].cols);
      memory.push_back(bytes_of(in[k]));
    }
    require_apart(checks.name, memory, written);
  }
};

/// The calls of a loss of two samples: double Loss::evaluate(pair, call).
template <class Loss, class T> class sample_loss {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;

  /// The value.
  template <class X, class Y>
  requires scores_like<X, T> && scores_like<Y, T>
      T operator()(X&& first, Y&& second, const call_options<T>& call = {}) const {
    sample_pair<T> pair{{as_matrix(first), as_matrix(second)}, {}, false};
    return static_cast<T>(static_cast<const Loss&>(*this).evaluate(pair, call));
  }
  /// The value and the gradients of both samples.
  template <class X, class Y, class G, class H>
  requires scores_like<X, T> && scores_like<Y, T> && gradient_like<G, T> && gradient_like<H, T>
      T operator()(X&& first, Y&& second, G&& d_first, H&& d_second,
                   const call_options<T>& call = {}) const {
    sample_pair<T> pair{
        {as_matrix(first), as_matrix(second)}, {as_matrix(d_first), as_matrix(d_second)}, true};
    return static_cast<T>(static_cast<const Loss&>(*this).evaluate(pair, call));
  }
};

/// Writes −(2 of_own pull_own + of_xy pull_xy)/σ², the gradient of a sample's points.
template <class T>
void write_pulls(const matrix_data<T, true>& to, const std::vector<double>& own, double of_own,
                 const std::vector<double>& across, double of_across, const gaussian_kernel& kernel,
                 const call_options<T>& call) {
  const double scale = -2 * kernel.rate * static_cast<double>(call.scale);
  std::size_t at = 0;
  for (index r = 0; r < to.rows; ++r)
    for (index c = 0; c < to.cols; ++c, ++at)
      put_number(to, r, c, scale * (2 * of_own * own[at] + of_across * across[at]) * kernel.unit,
                 call.accumulate);
}
template <class T>
void write_two_sample(const sample_pair<T>& pair, const two_sample_sums& sums,
                      const two_sample_slopes& slopes, const gaussian_kernel& kernel,
                      const call_options<T>& call) {
  if (!pair.has_gradient)
    return;
  write_pulls(pair.out[0], sums.pull_xx, slopes.of_xx, sums.pull_xy, slopes.of_xy, kernel, call);
  write_pulls(pair.out[1], sums.pull_yy, slopes.of_yy, sums.pull_yx, slopes.of_xy, kernel, call);
}

/// Gaussian kernels A and B of n paired samples, of which no matrix is held: row sums, and Σ A ∘ B.
class paired_kernels {
public:
  paired_kernels(const point_cloud& x, const point_cloud& y, const gaussian_kernel& of_x,
                 const gaussian_kernel& of_y, const executor& run_on)
      : x_(x), y_(y), of_x_(of_x), of_y_(of_y), run_on_(run_on), a(padded(x.size())), b(a) {
    using W = pack<double>;
    std::vector<double> products(static_cast<std::size_t>(x.size()));
    for_points(x, y, run_on, [&](index i, pack<double>*) {
      W sum_a(0), sum_b(0), product(0);
      for (index t = 0; t < x.blocks(); ++t) {
        const W k = of_x(x.squares(x.point(i), t, -1)), l = of_y(y.squares(y.point(i), t, -1));
        sum_a += k;
        sum_b += l;
        product = fma(k, l, product);
      }
      const auto at = static_cast<std::size_t>(i);
      a[at] = sum_lanes(sum_a);
      b[at] = sum_lanes(sum_b);
      products[at] = sum_lanes(product);
    });
    both = total_of(products);
  }

  /// Σ_ij A_ij G_ij, G_ij = factor B_ij + w_i + w_j. Adds Σ_j 2 G_ij ∂A_ij/∂x_i to the gradient.
  /// The other way around for the second sample.
  template <class T>
  double pull(bool second, double factor, const std::vector<double>& w,
              const matrix_data<T, true>& to, const call_options<T>& call) const {
    using W = pack<double>;
    const point_cloud &mine = second ? y_ : x_, &other = second ? x_ : y_;
    const gaussian_kernel &own = second ? of_y_ : of_x_, &others = second ? of_x_ : of_y_;
    const double scale = -4 * own.rate * static_cast<double>(call.scale);
    std::vector<double> sums(static_cast<std::size_t>(mine.size()));
    for_points(mine, other, run_on_, [&](index i, pack<double>* pulls) {
      W sum(0);
      const W mine_w(w[static_cast<std::size_t>(i)]);
      for (index t = 0; t < mine.blocks(); ++t) {
        const W k = own(mine.squares(mine.point(i), t, -1));
        const W l = others(other.squares(other.point(i), t, -1));
        const W slope = k * fma(l, W(factor), mine_w + W::load(w.data() + t * per_pack));
        sum += slope;
        if (to)
          mine.add_pull(mine.point(i), t, slope, pulls);
      }
      sums[static_cast<std::size_t>(i)] = sum_lanes(sum);
      for (index d = 0; d < to.cols; ++d)
        put_number(to, i, d, scale * sum_lanes(pulls[d]) * own.unit, call.accumulate);
    });
    return total_of(sums);
  }
  static std::vector<double> padded(index n) {
    return std::vector<double>(static_cast<std::size_t>(whole_packs(n)));
  }

private:
  const point_cloud &x_, &y_;
  gaussian_kernel of_x_, of_y_;
  const executor& run_on_;

public:
  std::vector<double> a, b; ///< sums of the rows of A and of B, then zeros
  double both = 0;          ///< Σ A ∘ B
};

} // namespace core

/// Squared maximum mean discrepancy of two samples with a Gaussian kernel
/// k(x, y) = e^{−‖x − y‖²/(2 σ²)},
///
///   biased:    ℓ = mean k(x, x') + mean k(y, y') − 2 mean k(x, y)     over all pairs; ℓ ≥ 0
///   unbiased:  the same without the pairs of a point and itself; may be below 0
///   ∂ℓ/∂x_i = (2/σ²) (Σ_j k(x_i, y_j)(x_i − y_j)/(n m) − Σ_j k(x_i, x_j)(x_i − x_j)/c)
///
/// c = n² or n (n − 1). Several bandwidths: add the losses, with `accumulate`.
/// Shapes: two matrices, points × dimensions, of as many columns, with 1 or more points each (2 for
/// the unbiased one); the gradients have the shapes of the samples and lie apart from everything.
/// Sixteen-bit samples as elsewhere. A coordinate that is not finite makes the value NaN.
/// Call options: scale (of the gradient), accumulate, run_on; all others belong to losses of rows
/// and are refused. Distances are those of differences, in double; no kernel matrix is held: cost
/// O((n + m)² d) time, O((n + m) d) memory. Threads do not matter. Throws std::invalid_argument.
/// Source: Gretton, Borgwardt, Rasch, Schölkopf, Smola, "A kernel two-sample test", JMLR 2012.
///
///   perdita::mmd<float> loss({.bandwidth = 2, .unbiased = true});
///   float value = loss(x, y, d_x, d_y);
template <class T = float> class mmd : public core::sample_loss<mmd<T>, T> {
public:
  struct options {
    double bandwidth = 1;  ///< σ > 0
    bool unbiased = false; ///< without the pairs of a point and itself
  };
  static constexpr const char* name = "mmd";

  mmd() : mmd(options{}) {}
  explicit(false) mmd(const options& o) : options_(o) {
    core::positive(name, "bandwidth", o.bandwidth);
  }
  const options& settings() const { return options_; }

private:
  friend core::sample_loss<mmd<T>, T>;
  double evaluate(const core::sample_pair<T>& pair, const call_options<T>& call) const {
    pair.check({{name}}, false, options_.unbiased ? 2 : 1, call);
    const core::gaussian_kernel kernel(options_.bandwidth);
    const core::point_cloud x(pair.in[0], kernel.unit), y(pair.in[1], kernel.unit);
    const core::two_sample_sums sums(x, y, kernel, 0, options_.unbiased, pair.has_gradient,
                                     call.run_on);
    const auto n = static_cast<double>(x.size()), m = static_cast<double>(y.size());
    const double of_xx = 1 / (n * (options_.unbiased ? n - 1 : n)),
                 of_yy = 1 / (m * (options_.unbiased ? m - 1 : m)), of_xy = -2 / (n * m);
    const double value = (of_xx * sums.xx + of_yy * sums.yy) + of_xy * sums.xy;
    core::write_two_sample(pair, sums, {value, of_xx, of_yy, of_xy}, kernel, call);
    return value;
  }
  options options_;
};

/// Cauchy-Schwarz divergence of the kernel density estimates of two samples,
///
///   ℓ = log mean k(x, x') + log mean k(y, y') − 2 log mean k(x, y) ≥ 0,
///   k(x, y) = e^{−‖x − y‖²/(2 σ²)}
///   ∂ℓ/∂x_i = (2/σ²) (Σ_j k(x_i, y_j)(x_i − y_j)/Σ k(x, y)
///                     − Σ_j k(x_i, x_j)(x_i − x_j)/Σ k(x, x'))
///
/// 0 only if the mean embeddings are proportional. Natural logarithms (code of the authors: base
/// 2). The last sum is taken relative to its largest term, so samples however far apart have a
/// finite value and a gradient. Everything else: as mmd, biased.
/// Source: Principe 2010; Yu, Yu, Løkse, Jenssen, Principe, "Cauchy-Schwarz divergence information
/// bottleneck for regression", ICLR 2024.
template <class T = float>
class cauchy_schwarz_divergence : public core::sample_loss<cauchy_schwarz_divergence<T>, T> {
public:
  struct options {
    double bandwidth = 1; ///< σ > 0
  };
  static constexpr const char* name = "cauchy_schwarz_divergence";

  cauchy_schwarz_divergence() : cauchy_schwarz_divergence(options{}) {}
  explicit(false) cauchy_schwarz_divergence(const options& o) : options_(o) {
    core::positive(name, "bandwidth", o.bandwidth);
  }
  const options& settings() const { return options_; }

private:
  friend core::sample_loss<cauchy_schwarz_divergence<T>, T>;
  double evaluate(const core::sample_pair<T>& pair, const call_options<T>& call) const {
    pair.check({{name}}, false, 1, call);
    const core::gaussian_kernel kernel(options_.bandwidth);
    const core::point_cloud x(pair.in[0], kernel.unit), y(pair.in[1], kernel.unit);
    const double least = -core::largest_number(
        x, y, call.run_on, [&](index i, index b) { return -y.squares(x.point(i), b, -1); });
    const core::two_sample_sums sums(x, y, kernel, least, false, pair.has_gradient, call.run_on);
    const auto n = static_cast<double>(x.size()), m = static_cast<double>(y.size());
    const double value = std::log(sums.xx / (n * n)) + std::log(sums.yy / (m * m)) -
                         2 * (std::log(sums.xy / (n * m)) - kernel.rate * least);
    core::write_two_sample(pair, sums, {value, 1 / sums.xx, 1 / sums.yy, -2 / sums.xy}, kernel,
                           call);
    return value;
  }
  options options_;
};

/// Hilbert-Schmidt independence criterion of n pairs (x_i, y_i) with Gaussian kernels A of x and B
/// of y, the biased estimate
///
///   ℓ = tr(A H B H)/(n − 1)²,   H = I − 11ᵀ/n;   ℓ ≥ 0
///   ∂ℓ/∂x_i = −(2/(σ² (n − 1)²)) Σ_j (H B H)_ij A_ij (x_i − x_j)
///
/// and alike for y. The mean is taken from B before it is multiplied by A, so a criterion near 0
/// is not the difference of large numbers. Shapes: two matrices of n ≥ 2 rows and any columns.
/// Two passes over all pairs, O(n² d) time, O(n d) memory. Everything else: as mmd.
/// Source: Gretton, Bousquet, Smola, Schölkopf, ALT 2005.
template <class T = float> class hsic : public core::sample_loss<hsic<T>, T> {
public:
  struct options {
    double bandwidth = 1;       ///< σ > 0 of the first sample's kernel
    double other_bandwidth = 1; ///< of the second's
  };
  static constexpr const char* name = "hsic";

  hsic() : hsic(options{}) {}
  explicit(false) hsic(const options& o) : options_(o) {
    core::positive(name, "bandwidth", o.bandwidth);
    core::positive(name, "other_bandwidth", o.other_bandwidth);
  }
  const options& settings() const { return options_; }

private:
  friend core::sample_loss<hsic<T>, T>;
  double evaluate(const core::sample_pair<T>& pair, const call_options<T>& call) const {
    pair.check({{name}}, true, 2, call);
    const core::gaussian_kernel of_x(options_.bandwidth), of_y(options_.other_bandwidth);
    const core::point_cloud x(pair.in[0], of_x.unit), y(pair.in[1], of_y.unit);
    const core::paired_kernels kernels(x, y, of_x, of_y, call.run_on);
    const auto n = static_cast<double>(x.size());
    const double factor = 1 / ((n - 1) * (n - 1));
    const auto centring = [&](const std::vector<double>& sums) {
      std::vector<double> w = sums;
      const double half = core::total_of(sums) / (2 * n * n);
      for (double& s : w)
        s = factor * (half - s / n);
      return w;
    };
    const double value = kernels.pull(false, factor, centring(kernels.b), pair.out[0], call);
    if (pair.has_gradient)
      kernels.pull(true, factor, centring(kernels.a), pair.out[1], call);
    return value;
  }
  options options_;
};

namespace core {

/// What cs_qmi is without normalisation; the gradients are added where there are any.
inline double quadratic_information(const point_cloud& x, const point_cloud& y,
                                    const gaussian_kernel& of_x, const gaussian_kernel& of_y,
                                    const executor& run_on, std::vector<double>* d_x,
                                    std::vector<double>* d_y) {
  const paired_kernels kernels(x, y, of_x, of_y, run_on);
  const double sum_a = total_of(kernels.a), sum_b = total_of(kernels.b);
  exact_sum products;
  for (std::size_t i = 0; i < kernels.a.size(); ++i)
    products.add(kernels.a[i] * kernels.b[i]);
  const double c = products.value();
  const auto differentiate = [&](bool second, const std::vector<double>& others, double own,
                                 index dims, std::vector<double>* to) {
    if (!to)
      return;
    std::vector<double> w = others;
    for (double& s : w)
      s = 0.5 / own - s / c;
    to->resize(static_cast<std::size_t>(x.size() * dims));
    call_options<double> call;
    call.run_on = run_on;
    kernels.pull(second, 1 / kernels.both, w,
                 matrix_data<double, true>(matrix_view<double>(to->data(), x.size(), dims)), call);
  };
  differentiate(false, kernels.b, sum_a, x.dims(), d_x);
  differentiate(true, kernels.a, sum_b, y.dims(), d_y);
  return std::log(kernels.both / c * (sum_a / c * sum_b)); // of the means: n² n⁴/n⁶ is 1
}

template <class T>
void write_points(const matrix_data<T, true>& to, const std::vector<double>& slopes, double scale,
                  bool accumulate) {
  std::size_t at = 0;
  for (index r = 0; r < to.rows; ++r)
    for (index c = 0; c < to.cols; ++c, ++at)
      put_number(to, r, c, scale * slopes[at], accumulate);
}

} // namespace core

/// Cauchy-Schwarz quadratic mutual information of n pairs (x_i, y_i) with Gaussian kernels A of x
/// and B of y: the Cauchy-Schwarz divergence of the joint density's estimate from the product's,
///
///   ℓ = log mean(A ∘ B) + log(mean A · mean B) − 2 log mean_i(mean_j A_ij · mean_j B_ij) ≥ 0
///   ∂ℓ/∂A_ij = B_ij/Σ(A ∘ B) + 1/Σ A − (b_i + b_j)/Σ a b     (a, b: sums of rows)
///
/// and from there as hsic. normalised: ℓ(x, y)/√(ℓ(x, x) ℓ(y, y)), with its gradient, at three
/// times the cost; NaN if all x or all y are equal, and good to double's epsilon over ℓ(x, x) and
/// ℓ(y, y) if they are nearly so. That, times β, is the compression term of the Cauchy-Schwarz
/// information bottleneck: add it to conditional_cauchy_schwarz. Natural logarithms. n ≥ 1.
/// Everything else: as hsic. Source: Principe 2010; Yu et al., ICLR 2024.
template <class T = float> class cs_qmi : public core::sample_loss<cs_qmi<T>, T> {
public:
  struct options {
    double bandwidth = 1;       ///< σ > 0 of the first sample's kernel
    double other_bandwidth = 1; ///< of the second's
    bool normalised = false;    ///< over √(ℓ(x, x) ℓ(y, y))
  };
  static constexpr const char* name = "cs_qmi";

  cs_qmi() : cs_qmi(options{}) {}
  explicit(false) cs_qmi(const options& o) : options_(o) {
    core::positive(name, "bandwidth", o.bandwidth);
    core::positive(name, "other_bandwidth", o.other_bandwidth);
  }
  const options& settings() const { return options_; }

private:
  friend core::sample_loss<cs_qmi<T>, T>;
  double evaluate(const core::sample_pair<T>& pair, const call_options<T>& call) const {
    pair.check({{name}}, true, 1, call);
    const core::gaussian_kernel kernels[2] = {core::gaussian_kernel(options_.bandwidth),
                                              core::gaussian_kernel(options_.other_bandwidth)};
    const core::point_cloud samples[2] = {core::point_cloud(pair.in[0], kernels[0].unit),
                                          core::point_cloud(pair.in[1], kernels[1].unit)};
    std::vector<double> slopes[2], of_own[2];
    const auto room = [&](std::vector<double>& v) { return pair.has_gradient ? &v : nullptr; };
    const double joint = core::quadratic_information(samples[0], samples[1], kernels[0], kernels[1],
                                                     call.run_on, room(slopes[0]), room(slopes[1]));
    double below = 1;
    if (options_.normalised) {
      double own[2];
      for (int k = 0; k < 2; ++k)
        own[k] = core::quadratic_information(samples[k], samples[k], kernels[k], kernels[k],
                                             call.run_on, room(of_own[k]), nullptr);
      below = std::sqrt(own[0]) * std::sqrt(own[1]);
      // ℓ(x, x) has x twice, and stands under a root.
      for (int k = 0; k < 2 && pair.has_gradient; ++k)
        for (std::size_t i = 0; i < slopes[k].size(); ++i)
          slopes[k][i] -= joint / own[k] * of_own[k][i];
    }
    for (int k = 0; k < 2 && pair.has_gradient; ++k)
      core::write_points(pair.out[k], slopes[k], static_cast<double>(call.scale) / below,
                         call.accumulate);
    return joint / below;
  }
  options options_;
};

/// Cauchy-Schwarz divergence of the conditional density of predictions ŷ given x from that of
/// responses y given x, of n triples, with Gaussian kernels K of x, and k of y and ŷ:
///
///   ℓ = log Σ W_ij k(y_i, y_j) + log Σ W_ij k(ŷ_i, ŷ_j) − 2 log Σ W_ij k(ŷ_i, y_j)
///   W_ij = K_ij/(Σ_j K_ij)²
///   ∂ℓ/∂ŷ_i = −(1/σ²) Σ_j ((W_ij + W_ji) k(ŷ_i, ŷ_j)(ŷ_i − ŷ_j)/Σ W k(ŷ, ŷ)
///                          − 2 W_ij k(ŷ_i, y_j)(ŷ_i − y_j)/Σ W k(ŷ, y))
///
/// 0 for ŷ = y. The prediction term of the Cauchy-Schwarz information bottleneck, which adds β
/// times the normalised cs_qmi of inputs and representation. The last sum is taken relative to its
/// largest term, so that predictions far off have a gradient. (The authors' code has Σ_j K_ij²
/// for (Σ_j K_ij)², and logarithms to base 2.)
/// Shapes: x n × any, y and ŷ n × columns, n ≥ 1; one gradient, of ŷ, apart from everything.
/// Everything else: as mmd.
/// Source: Yu et al., ICLR 2024.
///
///   perdita::conditional_cauchy_schwarz<float> loss({.bandwidth = 2});
///   float value = loss(inputs, responses, predictions, d_predictions);
template <class T = float> class conditional_cauchy_schwarz {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double bandwidth = 1;       ///< σ > 0 of the inputs' kernel
    double other_bandwidth = 1; ///< of the responses'
  };
  static constexpr const char* name = "conditional_cauchy_schwarz";

  conditional_cauchy_schwarz() : conditional_cauchy_schwarz(options{}) {}
  explicit(false) conditional_cauchy_schwarz(const options& o) : options_(o) {
    core::positive(name, "bandwidth", o.bandwidth);
    core::positive(name, "other_bandwidth", o.other_bandwidth);
  }
  const options& settings() const { return options_; }

  /// The value.
  template <class X, class Y, class P>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::scores_like<P, T> T
  operator()(X&& inputs, Y&& responses, P&& predictions, const call_options<T>& call = {}) const {
    return run(core::as_matrix(inputs), core::as_matrix(responses), core::as_matrix(predictions),
               {}, false, call);
  }
  /// The value and the gradient with respect to the predictions.
  template <class X, class Y, class P, class G>
  requires core::scores_like<X, T> && core::scores_like<Y, T> && core::scores_like<P, T> &&
      core::gradient_like<G, T>
          T operator()(X&& inputs, Y&& responses, P&& predictions, G&& gradient,
                       const call_options<T>& call = {}) const {
    return run(core::as_matrix(inputs), core::as_matrix(responses), core::as_matrix(predictions),
               core::as_matrix(gradient), true, call);
  }

private:
  static constexpr core::batch_checks<T> checks{{name}};

  static void check(const core::matrix_data<T>& x, const core::matrix_data<T>& y,
                    const core::matrix_data<T>& p, const core::matrix_data<T, true>& g,
                    bool has_gradient, const call_options<T>& call) {
    checks.only_whole(call);
    core::require(x.rows >= 1, name, "rows of the inputs", x.rows, "at least 1");
    checks.size("rows of the responses", y.rows, x.rows, "as many as of the inputs");
    checks.size("rows of the predictions", p.rows, x.rows, "as many as of the inputs");
    checks.size("columns of the predictions", p.cols, y.cols, "as many as of the responses");
    checks.memory("inputs", x.data, x.rows * x.cols);
    checks.memory("responses", y.data, y.rows * y.cols);
    checks.memory("predictions", p.data, p.rows * p.cols);
    if (!has_gradient)
      return;
    checks.size("gradient rows", g.rows, p.rows, "as many as of the predictions");
    checks.size("gradient columns", g.cols, p.cols, "as many as of the predictions");
    checks.memory("gradient", g.data, g.rows * g.cols);
    checks.apart({core::bytes_of(g)}, {core::bytes_of(x), core::bytes_of(y), core::bytes_of(p)});
  }

  T run(const core::matrix_data<T>& inputs, const core::matrix_data<T>& responses,
        const core::matrix_data<T>& predictions, const core::matrix_data<T, true>& gradient,
        bool has_gradient, const call_options<T>& call) const {
    using W = core::pack<double>;
    check(inputs, responses, predictions, gradient, has_gradient, call);
    const core::gaussian_kernel of_x(options_.bandwidth), of_y(options_.other_bandwidth);
    const core::point_cloud x(inputs, of_x.unit), y(responses, of_y.unit),
        p(predictions, of_y.unit);
    const index n = x.size(), dims = p.dims();

    auto share = core::sum_kernel(x, x, of_x, false, nullptr, call.run_on); // then 1/(Σ K)²
    std::vector<double> log_share;
    for (double& s : share) {
      log_share.push_back(-2 * std::log(s));
      s = 1 / (s * s);
    }
    share.resize(static_cast<std::size_t>(core::whole_packs(n)));
    const auto apart = [&](index i, index b) { return x.squares(x.point(i), b, -1); };
    const auto exponent = [&](index i, index b, const W& squares) { // log W_ij k(ŷ_i, y_j)
      const W of_inputs = fnma(squares, W(of_x.rate), W(log_share[static_cast<std::size_t>(i)]));
      return fnma(y.squares(p.point(i), b, -1), W(of_y.rate), of_inputs);
    };
    const double top = core::largest_number(
        p, y, call.run_on, [&](index i, index b) { return exponent(i, b, apart(i, b)); });
    std::vector<double> sums[3]; // of y; of ŷ; of both
    for (auto& sum : sums)
      sum.resize(static_cast<std::size_t>(n));
    std::vector<double> within(static_cast<std::size_t>(n * dims)), between(within);
    core::for_points(p, x, call.run_on, [&](index i, W* pulls) {
      const auto at = static_cast<std::size_t>(i);
      std::vector<W> others(static_cast<std::size_t>(dims), W(0));
      W sum[3] = {W(0), W(0), W(0)};
      for (index b = 0; b < x.blocks(); ++b) {
        const W squares = apart(i, b), k = of_x(squares), mine = k * share[at];
        const W theirs = k * W::load(share.data() + b * core::per_pack);
        const W of_predictions = of_y(p.squares(p.point(i), b, -1));
        const W of_both = exp_shifted(exponent(i, b, squares) - W(top));
        sum[0] += mine * of_y(y.squares(y.point(i), b, -1));
        sum[1] += mine * of_predictions;
        sum[2] += of_both;
        if (!has_gradient)
          continue;
        p.add_pull(p.point(i), b, (mine + theirs) * of_predictions, pulls);
        y.add_pull(p.point(i), b, of_both, others.data());
      }
      for (std::size_t s = 0; s < 3; ++s)
        sums[s][at] = core::sum_lanes(sum[s]);
      for (index d = 0; d < dims; ++d) {
        within[static_cast<std::size_t>(i * dims + d)] = core::sum_lanes(pulls[d]);
        between[static_cast<std::size_t>(i * dims + d)] =
            core::sum_lanes(others[static_cast<std::size_t>(d)]);
      }
    });
    const double of_y_sum = core::total_of(sums[0]), of_p = core::total_of(sums[1]),
                 of_both = core::total_of(sums[2]);
    if (has_gradient)
      core::write_pulls(gradient, within, 0.5 / of_p, between, -2 / of_both, of_y, call);
    return static_cast<T>(std::log(of_y_sum) + std::log(of_p) - 2 * (std::log(of_both) + top));
  }
  options options_;
};

} // namespace perdita::inline PERDITA_ABI
