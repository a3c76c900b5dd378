// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/batch_call.hpp"
#include "core/compared_rows.hpp"
#include "core/embeddings.hpp"
#include "core/point_cloud.hpp"

namespace perdita::inline PERDITA_ABI {

/// Two views of a batch, each with what is common to targets and background and what is salient
/// of targets: items × features; or the gradients.
template <class T> struct sep_clr_batch { matrix_view<T> common[2], salient[2]; };

namespace core {

/// Points that push each other away by k(x, y) = e^{−‖x − y‖²/(2τ)}. No matrix of kernels is held.
class repelling_points {
  using W = pack<double>;

public:
  repelling_points(const matrix_view<const double>& x, double temperature, const executor& run_on)
      : cloud_(matrix_data<double>(x)), rate_(0.5 / temperature), run_on_(run_on),
        logs_(static_cast<std::size_t>(whole_packs(cloud_.size()))) {
    for_points(cloud_, cloud_, run_on_, [this](index i, W*) {
      std::vector<double> row(static_cast<std::size_t>(cloud_.blocks() * per_pack));
      for (index b = 0; b < cloud_.blocks(); ++b)
        (cloud_.squares(cloud_.point(i), b, i) * W(-rate_)).store(row.data() + b * per_pack);
      logs_[static_cast<std::size_t>(i)] =
          sum_of_images(row.data(), static_cast<index>(row.size())).log();
    });
  }

  /// log of the mean of k over all pairs; adds `weight` times its gradient. One point: 0.
  double uniformity(double weight, const matrix_view<double>& slopes) {
    if (cloud_.size() < 2)
      return 0;
    const auto n = static_cast<double>(cloud_.size());
    std::vector<double> rows(logs_);
    std::fill(rows.begin() + cloud_.size(), rows.end(), no_score);
    const double all = sum_of_images(rows.data(), static_cast<index>(rows.size())).log();
    std::fill(logs_.begin(), logs_.end(), all);
    push(weight, slopes);
    return all - std::log(n * (n - 1));
  }
  /// Mean over the points of the log of their means of k, with themselves.
  double joint_entropy(double weight, const matrix_view<double>& slopes) {
    const auto n = static_cast<double>(cloud_.size());
    exact_sum sum;
    for (double& l : logs_)
      l = std::fmax(l, 0) + std::log1p(std::exp(-std::fabs(l)));
    for (index i = 0; i < cloud_.size(); ++i)
      sum.add(logs_[static_cast<std::size_t>(i)]);
    push(weight / n, slopes);
    return sum.value() / n - std::log(n);
  }

private:
  /// Adds −(share/τ) Σ_j k_ij (e^{−l_i} + e^{−l_j}) (x_i − x_j).
  void push(double share, const matrix_view<double>& slopes) const {
    if (!slopes.data)
      return;
    for_points(cloud_, cloud_, run_on_, [&, this](index i, W* pull) {
      const W mine(logs_[static_cast<std::size_t>(i)]);
      for (index b = 0; b < cloud_.blocks(); ++b) {
        const W k = cloud_.squares(cloud_.point(i), b, i) * W(-rate_);
        const W theirs = W::load(logs_.data() + b * per_pack);
        cloud_.add_pull(cloud_.point(i), b, exp_shifted(k - mine) + exp_shifted(k - theirs), pull);
      }
      for (index d = 0; d < cloud_.dims(); ++d)
        slopes(i, d) -= 2 * rate_ * share * sum_lanes(pull[d]);
    });
  }

  point_cloud cloud_;
  double rate_;
  const executor& run_on_;
  std::vector<double> logs_; // of each point's sum over the others; then what push() divides by
};

} // namespace core

/// Separates what targets and background have in common (c) from what is salient of targets (s), in
/// two views 1 and 2. ĉ = c/‖c‖; š is s, but 0 of background items; k(x, y) = e^{−‖x − y‖²/(2τ)};
///
///   A(x) = mean_i ‖x¹_i − x²_i‖²/(2τ)             U(x) = log mean_{i<j} k(x_i, x_j)
///   J(c, s) = mean_i log mean_j k(c_i, c_j) k(s_i, s_j)                          (j = i, too)
///
///   L = common (A(ĉ) + U(ĉ¹) + U(ĉ²)) + salient (A(s of targets) + U(š¹) + U(š²))
///     + information_less mean_background (‖s¹‖² + ‖s²‖²)/(4τ) + joint (J(ĉ¹, š¹) + J(ĉ², š²))/2
///
///   ∂U/∂x_i = −(2/τ) Σ_j w_ij (x_i − x_j),  w_ij = k_ij/Σ k
///   ∂J/∂x_i = −(1/τ) Σ_j (w_ij + w_ji)(x_i − x_j),  w_ij = k_ij/(n Σ_l k_il)
///
/// with k of the pair (c, s) in J, whose negative estimates their joint entropy. Shapes: common and
/// salient matrices items × features each, of T, any strides; one label per item, 1 of a target
/// and 0 of background; the gradients have the shapes of what they belong to, memory apart.
/// Special values: no targets, or no background: their means are 0 (the authors' code: NaN). One
/// item: U = 0. No items: 0. A zero vector c has ĉ = 0, and no gradient. Where the value is not
/// finite (NaN or an infinity; squares that overflow) all gradients are NaN.
/// Sums and distances are in double, of differences; O(n² d) time, O(n d) memory: no matrix of
/// pairs is held. No bit depends on the number of threads. Throws std::invalid_argument.
/// Source: Louiset et al., "Separating common from salient patterns with contrastive representation
/// learning", ICLR 2024 (k-JEM), and the authors' code, whose weights are the defaults.
///
///   perdita::sep_clr<float> loss;
///   float value = loss({{c1, c2}, {s1, s2}}, is_target, {{d_c1, d_c2}, {d_s1, d_s2}});
template <class T = float> class sep_clr {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double temperature = 0.5;                                               ///< τ > 0
    double common = 1, salient = 1000, information_less = 1000, joint = 10; ///< weights, >= 0
  };
  static constexpr const char* name = "sep_clr";

  sep_clr() : sep_clr(options{}) {}
  explicit(false) sep_clr(const options& o) : options_(o) {
    core::invertible<double>(name, "temperature", o.temperature);
    const auto weight = [](const char* what, double x) {
      core::require(x >= 0 && std::isfinite(x), name, what, x, "a finite number, not negative");
    };
    weight("common", o.common);
    weight("salient", o.salient);
    weight("information_less", o.information_less);
    weight("joint", o.joint);
  }
  const options& settings() const { return options_; }

  template <core::labels_like L>
  T operator()(const sep_clr_batch<const T>& x, L&& is_target,
               const embedding_options<T>& call = {}) const {
    return run(x, core::as_vector(is_target), nullptr, call);
  }
  /// The value, and all gradients.
  template <core::labels_like L>
  T operator()(const sep_clr_batch<const T>& x, L&& is_target, const sep_clr_batch<T>& gradients,
               const embedding_options<T>& call = {}) const {
    return run(x, core::as_vector(is_target), &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  /// A view in double: (ĉ, š) side by side, and their gradients.
  struct view {
    index n, of_common, of_salient;
    std::vector<double> x, slopes, factors; ///< 1/‖c‖

    view(const matrix_view<const T>& c, const matrix_view<const T>& s,
         const std::vector<bool>& target, bool gradients)
        : n(c.rows), of_common(c.cols), of_salient(s.cols),
          x(static_cast<std::size_t>(n * width())), slopes(gradients ? x.size() : 0),
          factors(static_cast<std::size_t>(n)) {
      const auto to = of(x);
      for (index i = 0; i < n; ++i) {
        for (index d = 0; d < of_common; ++d)
          to(i, d) = static_cast<double>(c(i, d));
        const double by = core::inverse_norm(x.data() + i * width(), of_common);
        factors[static_cast<std::size_t>(i)] = by;
        for (index d = 0; d < of_common; ++d)
          to(i, d) *= by;
        for (index d = 0; d < of_salient && target[static_cast<std::size_t>(i)]; ++d)
          to(i, of_common + d) = static_cast<double>(s(i, d));
      }
    }
    index width() const { return of_common + of_salient; }
    matrix_view<double> of(std::vector<double>& m) const {
      return {m.empty() ? nullptr : m.data(), n, width()};
    }
    matrix_view<double> common(std::vector<double>& m) const {
      return {m.empty() ? nullptr : m.data(), n, of_common, width(), 1};
    }
    matrix_view<double> salient(std::vector<double>& m) const {
      return {m.empty() ? nullptr : m.data() + of_common, n, of_salient, width(), 1};
    }
  };

  T run(const sep_clr_batch<const T>& x, const auto& labels, const sep_clr_batch<T>* gradients,
        const embedding_options<T>& call) const {
    check(x, gradients);
    const index n = x.common[0].rows;
    const std::vector<bool> target = targets(labels, n);
    if (n == 0)
      return 0;
    std::array<view, 2> views{view(x.common[0], x.salient[0], target, gradients),
                              view(x.common[1], x.salient[1], target, gradients)};
    const double apart = align(views, target) + separate(views, call.run_on);
    // Last, as it sets what the others have added to.
    const double value = apart + quieten(x.salient, target, views, gradients != nullptr);
    if (gradients)
      for (std::size_t v = 0; v < 2; ++v)
        store(views[v], std::isfinite(value), gradients->common[v], gradients->salient[v], call);
    return static_cast<T>(value);
  }

  void check(const sep_clr_batch<const T>& x, const sep_clr_batch<T>* gradients) const {
    static constexpr const char* names[] = {"common", "salient"};
    std::vector<core::extent> pieces, inputs;
    for (int side = 0; side < 2; ++side)
      for (int v = 0; v < 2; ++v) {
        const auto& m = side == 0 ? x.common[v] : x.salient[v];
        const auto& first = side == 0 ? x.common[0] : x.salient[0];
        const std::string what(names[side]);
        checks.size("rows of " + what, m.rows, x.common[0].rows);
        checks.size("columns of " + what, m.cols, first.cols);
        checks.memory(what, m.data, m.rows * m.cols);
        inputs.push_back(core::bytes_of(core::matrix_data<T>(m)));
        if (!gradients)
          continue;
        const auto& g = side == 0 ? gradients->common[v] : gradients->salient[v];
        checks.size("rows of the gradient of " + what, g.rows, m.rows);
        checks.size("columns of the gradient of " + what, g.cols, m.cols);
        checks.memory("gradient of " + what, g.data, g.rows * g.cols);
        pieces.push_back(core::bytes_of(core::matrix_data<T, true>(g)));
      }
    const std::size_t written = pieces.size();
    pieces.insert(pieces.end(), inputs.begin(), inputs.end());
    core::require_apart(name, pieces, written);
  }
  static std::vector<bool> targets(const auto& labels, index n) {
    checks.size("labels", labels.size, n);
    checks.memory("labels", labels.data, n);
    std::vector<bool> result(static_cast<std::size_t>(n));
    for (index i = 0; i < n; ++i) {
      if (labels[i] != 0 && labels[i] != 1)
        core::fail_at(name, "labels", i, core::to_text(labels[i]), "0 or 1");
      result[static_cast<std::size_t>(i)] = labels[i] == 1;
    }
    return result;
  }

  /// common A(ĉ) + salient A(š over targets)
  double align(std::array<view, 2>& views, const std::vector<bool>& target) const {
    const view& first = views[0];
    const auto count = static_cast<double>(std::count(target.begin(), target.end(), true));
    const double of_common = options_.common / static_cast<double>(first.n);
    const double of_salient = count > 0 ? options_.salient / count : 0;
    const auto a = first.of(views[0].x), b = first.of(views[1].x);
    core::exact_sum sum;
    for (index i = 0; i < first.n; ++i)
      for (index d = 0; d < first.width(); ++d) {
        const double weight = (d < first.of_common ? of_common : of_salient) / options_.temperature;
        const double apart = a(i, d) - b(i, d);
        sum.add(weight / 2 * apart * apart);
        if (!first.slopes.empty()) {
          first.of(views[0].slopes)(i, d) += weight * apart;
          first.of(views[1].slopes)(i, d) -= weight * apart;
        }
      }
    return sum.value();
  }
  double separate(std::array<view, 2>& views, const executor& run_on) const {
    double value = 0;
    for (view& v : views) {
      const auto points = [&](const matrix_view<double>& m) {
        return core::repelling_points(m, options_.temperature, run_on);
      };
      if (options_.common > 0)
        value +=
            options_.common * points(v.common(v.x)).uniformity(options_.common, v.common(v.slopes));
      if (options_.salient > 0)
        value += options_.salient *
                 points(v.salient(v.x)).uniformity(options_.salient, v.salient(v.slopes));
      if (options_.joint > 0)
        value += options_.joint / 2 *
                 points(v.of(v.x)).joint_entropy(options_.joint / 2, v.of(v.slopes));
    }
    return value;
  }
  /// Salient features of background are drawn to 0: nothing else moves them.
  double quieten(const matrix_view<const T>* salient, const std::vector<bool>& target,
                 std::array<view, 2>& views, bool gradients) const {
    const auto count = static_cast<double>(std::count(target.begin(), target.end(), false));
    const double weight =
        count > 0 ? options_.information_less / (2 * options_.temperature * count) : 0;
    core::exact_sum sum;
    for (std::size_t v = 0; v < 2; ++v)
      for (index i = 0; i < views[v].n; ++i)
        for (index d = 0; d < views[v].of_salient && !target[static_cast<std::size_t>(i)]; ++d) {
          const double s = static_cast<double>(salient[v](i, d));
          sum.add(weight / 2 * s * s);
          if (gradients)
            views[v].salient(views[v].slopes)(i, d) = weight * s;
        }
    return sum.value();
  }
  static void store(view& v, bool known, const matrix_view<T>& common,
                    const matrix_view<T>& salient, const embedding_options<T>& call) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto slopes = v.of(v.slopes), x = v.of(v.x);
    core::store_slopes(salient, call,
                       [&](index i, index d) { return known ? slopes(i, v.of_common + d) : nan; });
    std::vector<double> along(static_cast<std::size_t>(v.n));
    for (index i = 0; i < v.n; ++i)
      along[static_cast<std::size_t>(i)] =
          core::wide_dot(v.x.data() + i * v.width(), v.slopes.data() + i * v.width(), v.of_common);
    core::store_slopes(common, call, [&](index i, index d) {
      const auto at = static_cast<std::size_t>(i);
      return known ? v.factors[at] * (slopes(i, d) - along[at] * x(i, d)) : nan;
    });
  }

  options options_;
};

/// Supervised alignment of features with what is known of items (SepCLR's attributes): items whose
/// attributes are alike are drawn together,
///
///   L = (2/(n (n − 1))) Σ_{i<j} w_ij ‖x_i − x_j‖²,  ∂L/∂x_i = (4/(n (n − 1))) Σ_j w_ij (x_i − x_j)
///   w_ij = e^{−(y_i − y_j)²/(2 τ)} of attributes that are numbers, or [y_i = y_j] of integers
///
/// with one feature per attribute in the authors' code, and any number here. Shapes: x and d_x
/// items × features of T, any strides, memory apart; y one number, of T or of any integral type,
/// per item. One item or none: 0. NaN of x makes the value NaN, and the gradients of what is
/// compared with it by a weight that is not 0; NaN of y, or infinities of one sign, those of all.
/// O(n² d), in double, of differences; no bit depends on the number of threads. Throws
/// std::invalid_argument. Source: as sep_clr (the authors' code, τ = 0.025).
template <class T = float> class supervised_alignment {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double temperature = 0.025; ///< τ > 0, of attributes that are numbers
  };
  static constexpr const char* name = "supervised_alignment";

  supervised_alignment() : supervised_alignment(options{}) {}
  explicit(false) supervised_alignment(const options& o) : options_(o) {
    core::invertible<double>(name, "temperature", o.temperature);
  }
  const options& settings() const { return options_; }

  template <class Y>
  T operator()(matrix_view<const T> x, const Y& attributes,
               const embedding_options<T>& call = {}) const {
    return run(x, core::as_vector(attributes), nullptr, call);
  }
  template <class Y>
  T operator()(matrix_view<const T> x, const Y& attributes, matrix_view<T> gradient,
               const embedding_options<T>& call = {}) const {
    return run(x, core::as_vector(attributes), &gradient, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  template <class Y> double weight(const Y& y, index i, index j) const {
    if constexpr (std::is_integral_v<std::remove_cvref_t<decltype(y[i])>>) {
      return y[i] == y[j] ? 1 : 0;
    } else {
      const double apart = static_cast<double>(y[i]) - static_cast<double>(y[j]);
      return std::exp(-apart * apart / (2 * options_.temperature));
    }
  }
  template <class Y>
  T run(const matrix_view<const T>& x, const Y& y, const matrix_view<T>* gradient,
        const embedding_options<T>& call) const {
    const std::array<matrix_view<T>, 1> to{gradient ? *gradient : matrix_view<T>{}};
    checks.batches(std::array<matrix_view<const T>, 1>{x}, gradient ? &to : nullptr,
                   {core::bytes_of(y)});
    checks.size("attributes", y.size, x.rows);
    checks.memory("attributes", y.data, y.size);
    const index n = x.rows;
    const double share = n > 1 ? 2 / (static_cast<double>(n) * static_cast<double>(n - 1)) : 0;
    std::vector<double> parts(static_cast<std::size_t>(n));
    core::panelled slopes(gradient ? n : 0, x.cols);
    core::for_row_blocks(n, call.run_on, [&](index first, index last) {
      for (index i = first; i < last; ++i)
        for (index j = 0; j < n; ++j) {
          if (const double w = i == j ? 0 : weight(y, i, j); w != 0)
            for (index d = 0; d < x.cols; ++d) {
              const double apart = static_cast<double>(x(i, d)) - static_cast<double>(x(j, d));
              parts[static_cast<std::size_t>(i)] += w * apart * apart / 2;
              if (gradient)
                slopes(i, d) += w * apart;
            }
        }
    });
    core::exact_sum sum;
    for (const double part : parts)
      sum.add(part);
    if (gradient)
      core::store_slopes(*gradient, call,
                         [&](index i, index d) { return 2 * share * slopes(i, d); });
    return static_cast<T>(share * sum.value());
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
