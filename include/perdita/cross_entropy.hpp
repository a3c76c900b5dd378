// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/row_formula.hpp"
#include "core/row_loss.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// The numbers of a cross-entropy that its formula needs, all sizes settled.
template <class T> struct cross_entropy_parameters {
  double smoothing = 0, focal_gamma = 0, log_z_penalty = 0, inverse_temperature = 1;
  T cap = 0, inverse_cap = 0, scale = 1; // of scores; the last is the inverse temperature
  const T* class_weights = nullptr;      // all 1 if not given
  side_cursor<T> side;                   // at class 0
  double spread = 1;                     // what the side numbers are to be multiplied by
  bool soft = false;
  bool tempered = false; // the scale is not 1
  bool sides = false;    // some side number may not be 0
};

/// Takes f(u) = softplus(u) and 1 to (1 − p)^γ f and df, f'(u) = (1 − p) df. Out of line: rare, and
/// long where everything around it is in registers.
template <class T, class W>
PERDITA_NOINLINE void focus(const target_odds<T, W>& o, double focal_gamma, W& f, W& df) {
  const W zero(0), one(1), gamma(focal_gamma), power = exp(gamma * log(o.miss));
  const W ratio = select(o.miss == zero, one, o.surprise / o.miss);
  f = weighted(power, f);
  df = weighted(power, one + weighted(o.hit, gamma * ratio));
}

/// Cross-entropy as an algebra: value and slope are functions of target_odds. Where there is a soft
/// target instead of a label, the class that it favours is the target. The statistic says what is
/// added to a label's term: nothing (log_sum_exp); Σ_c b (log Σ e^z − z_c), label smoothing with
/// the same b for all (…_and_total); or that with any b_c, for soft targets and for label smoothing
/// with b_c = ε π_c w_c, and cap and entropy (…_and_moments).
template <class T, class Statistic> struct cross_entropy_formula : row_formula {
  using statistic = Statistic;
  static constexpr bool smoothed = std::is_same_v<Statistic, log_sum_exp_and_total>;
  static constexpr bool general = std::is_same_v<Statistic, log_sum_exp_and_moments>;
  static constexpr bool proportional = !smoothed && !general;
  static constexpr bool has_side = general;

  cross_entropy_parameters<T> p;

  double label_weight(index y) const {
    return p.class_weights ? static_cast<double>(p.class_weights[y]) : 1.0;
  }
  side_cursor<T> side(index first) const {
    side_cursor<T> s = p.side;
    s.move(first);
    return s;
  }

  /// z = cap tanh(x / cap) / temperature; a masked score stays -inf. As steepness,
  /// temperature · ∂z/∂x.
  template <class V> PERDITA_INLINE scored_number<V> scored(const V& x) const requires general {
    if (p.cap == 0)
      return {tempered(x), V(1)};
    const V masked(-std::numeric_limits<T>::infinity());
    const auto [y, slope] = tanh_with_slope(x * V(p.inverse_cap));
    const V z = y * V(p.cap) * V(p.scale);
    return {select(x == masked, masked, z), select(x == masked, V(1), slope)};
  }
  template <class V> PERDITA_INLINE V score(const V& x) const {
    if constexpr (general)
      if (p.cap > 0)
        return capped(x);
    return tempered(x);
  }
  /// Out of line: what looks at many scores takes scored().
  template <class V> PERDITA_NOINLINE V capped(const V& x) const { return scored(x).z; }
  template <class V> PERDITA_INLINE V tempered(const V& x) const {
    if (!p.tempered) // a branch costs less than a multiplication
      return x;
    return x * V(p.scale);
  }
  bool images_are_steep() const { return p.cap > 0 && !p.sides; }
  bool slope_reads_score() const { return general && p.cap > 0 && p.sides; }
  template <class V>
  PERDITA_INLINE V slope(const V& steepness, const V& share, const V& b, const V*) const {
    const V pull = b * V(static_cast<T>(p.spread * p.inverse_temperature));
    if constexpr (smoothed)
      return share - pull;
    return select(b == V(0), share, share - pull) * steepness;
  }

  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    using W = decltype(row.target);
    const W zero(0), one(1), inf(std::numeric_limits<double>::infinity());
    const target_odds<T, W> o(row);

    // f(u) = (1 − p)^γ softplus(u), and f'(u) = (1 − p) df
    W f = o.surprise, df = one;
    if (p.focal_gamma > 0)
      focus(o, p.focal_gamma, f, df);
    const W hard = p.soft ? zero : row.label_weight * W(1 - p.smoothing);
    W value = weighted(hard, f);
    W rivals = hard * df; // what the rivals share in proportion to p
    W target = zero - rivals * o.miss;

    if constexpr (smoothed || general) {
      const W spread(p.spread);
      W b = spread, b_rivals, pulled = spread * row.term[1];
      if constexpr (smoothed) {
        const W count = row.classes - one;
        b_rivals = spread * count;
        pulled = select(row.term[2] < count, -inf, pulled); // some are masked
      } else {
        b = spread * row.target_side;
        b_rivals = spread * row.term[2];
      }
      const W over = select(row.term[0] == zero, inf, b_rivals * o.above() - pulled);
      value = value + weighted(b, o.surprise) + select(b_rivals == zero, zero, over);
      rivals = rivals + (b + b_rivals);
      target = target + (b_rivals * o.hit - b * o.miss);
    }
    if (p.log_z_penalty > 0) {
      const W lse = o.log_sum_exp(), pull = W(2 * p.log_z_penalty) * lse;
      value = value + W(p.log_z_penalty) * lse * lse;
      rivals = rivals + pull;
      target = target + weighted(o.hit, pull);
    }
    row_outcome<W> out;
    out.value = value;
    out.image_scale = select(row.term[0] == zero, zero, rivals * o.per_rival);
    out.target_gradient = target;
    const W slower(p.inverse_temperature);
    out.image_scale = out.image_scale * slower;
    out.target_gradient = out.target_gradient * slower;
    if constexpr (general)
      out.target_gradient = out.target_gradient * scored(row.raw_target).steepness;
    return out;
  }

  template <class Row> auto report(const Row& row) const {
    const auto o = reported_odds(row.term[0], row.shift, row.target);
    using W = std::remove_cvref_t<decltype(o.hit)>;
    row_report<W> r = softmax_report(o);
    r.penalty = weighted(W(p.log_z_penalty), o.log_sum_exp() * o.log_sum_exp());
    if constexpr (general) { // Σ_c p_c (lse − z_c)
      const W rivals = select(row.term[0] == W(0), W(0), o.above() - row.term[3] / row.term[0]);
      r.entropy = weighted(o.hit, o.surprise) + weighted(o.miss, rivals);
    }
    return r;
  }
};

/// Second derivatives. With n = −log p_y and f(n) = (1−e^{−n})^γ n, the Hessian in z is
///
///   H = A (diag p − p pᵀ) + 2c p pᵀ + F (p − e_y)(p − e_y)ᵀ
///   A = (1−ε) w_y f'(n) + ε Σ π_c w_c + 2c log Σ e^z,   F = (1−ε) w_y f''(n)
///
/// and temperature divides it by its square. Product: H v, where v comes as the soft target does.
template <class T, bool Product> struct cross_entropy_hessian : row_formula {
  using statistic = std::conditional_t<Product, log_sum_exp_and_mean, log_sum_exp>;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;
  static constexpr bool has_side = Product;

  cross_entropy_formula<T, log_sum_exp_and_moments> loss;
  double smoothed_weight; // ε Σ π_c w_c

  double label_weight(index y) const { return loss.label_weight(y); }
  side_cursor<T> side(index) const { return {nullptr, nullptr, nullptr, T(1), T(0)}; }
  template <class V> PERDITA_INLINE V score(const V& x) const { return loss.score(x); }
  template <class V>
  PERDITA_INLINE V slope(const V&, const V& share, const V& v, const V* c) const {
    if constexpr (Product)
      return share * fma(v, c[0], c[1]);
    return share * fma(share, c[1], c[0]);
  }
  template <class Row> PERDITA_NOINLINE auto finish(const Row& row) const {
    const target_odds o(row);
    using W = decltype(o.hit);
    const W zero(0), one(1), two(2);
    const auto& p = loss.p;
    const W hard = row.label_weight * W(1 - p.smoothing);
    W first = one, second = zero; // f', and (1 − p) f''
    if (p.focal_gamma > 0) {
      const W gamma(p.focal_gamma), focus = exp(gamma * log(o.miss));
      const W ratio = select(o.miss == zero, one, o.surprise / o.miss);
      const W hn = weighted(o.hit, o.surprise), hr = weighted(o.hit, ratio);
      first = weighted(focus, one + gamma * hr);
      second = gamma * weighted(focus, two * o.hit + (gamma - one) * o.hit * hr - hn);
    }
    const W c(2 * p.log_z_penalty), t(p.inverse_temperature * p.inverse_temperature);
    const W penalty = p.log_z_penalty > 0 ? c * o.log_sum_exp() : zero;
    const W a = t * (weighted(hard, first) + W(smoothed_weight) + penalty);
    const W f = t * weighted(hard, second);
    row_outcome<W> out;
    out.value = zero;
    out.image_scale = per_rival(o.miss, row);
    if constexpr (Product) {
      const W v = row.target_side;
      const W apart = per_rival(row.term[1], row) - v; // mean of v over the rivals, minus v_y
      const W mean = v + weighted(o.miss, apart);      // pᵀv
      out.coefficient[0] = a;
      out.coefficient[1] = (t * c - a) * mean + f * apart;
      out.target_gradient =
          o.hit * (t * c * mean - a * weighted(o.miss, apart)) - o.miss * f * apart;
    } else {
      const W curve = select(o.miss == zero, zero, f / o.miss);
      out.coefficient[0] = a;
      out.coefficient[1] = (t * c - a) + curve;
      out.target_gradient = o.hit * (a * o.miss + t * c * o.hit) + f * o.miss;
    }
    return out;
  }
};

} // namespace core

/// Cross-entropy of a softmax, with everything that is usually asked of it.
///
///   ℓ = (1−ε) w_y (1−p_y)^γ (−log p_y)  +  ε Σ_c π_c w_c (−log p_c)  +  c (log Σ e^z)²
///   p = softmax(z),   z = cap · tanh(x / cap) / temperature
///   ∂ℓ/∂z = (1−ε) w_y (p − e_y)  +  ε Σ_c π_c w_c (p − e_c)  +  2 c (log Σ e^z) p      (γ = 0)
///
/// With soft targets q the first two terms are Σ_c w_c ((1−ε) q_c + ε π_c) (−log p_c).
///
/// Domain: any scores. -inf is a masked class: p = 0, gradient 0; as a label it costs +inf, with
/// gradient −w_y. +inf at the label alone costs 0; elsewhere it makes the row NaN, as a NaN does.
/// Shapes: scores rows × classes, one label per row or soft targets rows × classes.
/// Units: nats per row. `mean` divides by Σ w_y (times row weights) over the rows that count, and
/// with soft targets by the number of rows (or Σ row weights), as PyTorch does; 0 if none counts.
/// Accuracy: value within 2 ulp of max(value, |log Σ e^z| where it enters) in float; gradient
/// entries within (4 + ½ max|z − max z|) ulp, with a softcap 4|x|/cap more; entries below 2^-99 of
/// a row's largest may be 0.
/// Cost: the scores are read once, the gradient written once. Throws std::invalid_argument.
/// Source: label smoothing: Szegedy et al. 2016; focal: Lin et al. 2017; log-Z penalty: "z-loss"
/// of Chowdhery et al. 2022 (PaLM); soft-cap: Gemma 2, 2024. Values agree with
/// torch.nn.functional.cross_entropy, but for an empty mean, which is NaN there.
///
///   perdita::cross_entropy<float> loss({.label_smoothing = 0.1f});
///   float value = loss(logits, labels, d_logits);
template <class T = float> class cross_entropy : public row_loss<cross_entropy<T>, T> {
public:
  struct options {
    T label_smoothing = 0;                ///< ε in [0, 1]
    vector_view<const T> prior{};         ///< π: where smoothing leads, Σ π = 1; or uniform
    vector_view<const T> class_weights{}; ///< w ≥ 0; all 1 if not given. Both are copied.
    std::int64_t ignore_index = -100;     ///< rows with this label do not count
    perdita::reduction reduction = perdita::reduction::mean;
    T temperature = 1;   ///< > 0, as its inverse must be finite: in float from 3e-39 on
    T softcap = 0;       ///< the same, or 0 for none
    T log_z_penalty = 0; ///< c ≥ 0
    T focal_gamma = 0;   ///< γ ≥ 0; for labels only
  };
  static constexpr const char* name = "cross_entropy";
  static constexpr bool takes_soft_targets = true;
  static constexpr bool has_softmax = true;

  cross_entropy() : cross_entropy(options{}) {}
  explicit(false) cross_entropy(const options& o) : options_(o) {
    using core::require;
    const auto finite_from_0 = [](T x) { return x >= 0 && std::isfinite(x); };
    require(o.label_smoothing >= 0 && o.label_smoothing <= 1, name, "label_smoothing",
            o.label_smoothing, "a number in [0, 1]");
    core::invertible<T>(name, "temperature", o.temperature);
    require(o.softcap == 0 || core::is_invertible<T>(o.softcap), name, "softcap", o.softcap,
            "0 for none, or a finite number whose inverse is finite");
    require(finite_from_0(o.log_z_penalty), name, "log_z_penalty", o.log_z_penalty,
            "a finite number, 0 or more");
    require(finite_from_0(o.focal_gamma), name, "focal_gamma", o.focal_gamma,
            "a finite number, 0 or more");
    core::require_reduction(name, o.reduction);
    copy(o.class_weights, "class_weights", class_weights_);
    copy(o.prior, "prior", prior_);
    options_.class_weights = {}; // the caller's memory is not kept
    options_.prior = {};
    double total = prior_.empty() ? 1 : 0;
    for (T x : prior_)
      total += static_cast<double>(x);
    require(std::fabs(total - 1) <= 1e-3, name, "the sum of prior", total, "1");
    require(class_weights_.empty() || prior_.empty() || class_weights_.size() == prior_.size(),
            name, "size of prior", prior_.size(), "the size of class_weights");
    const std::size_t classes = std::max(class_weights_.size(), prior_.size());
    const auto epsilon = static_cast<double>(o.label_smoothing);
    for (std::size_t c = 0; c < classes; ++c) {
      const double w = label_weight(static_cast<index>(c));
      const double pi =
          prior_.empty() ? 1 / static_cast<double>(classes) : static_cast<double>(prior_[c]);
      bias_.push_back(static_cast<T>(epsilon * pi * w));
      weight_.push_back(static_cast<T>((1 - epsilon) * w));
    }
  }

  /// The options, without the views: the copies of those are class_weights() and prior().
  const options& settings() const { return options_; }
  const std::vector<T>& class_weights() const { return class_weights_; }
  const std::vector<T>& prior() const { return prior_; }

  /// The diagonal of each row's Hessian, into `result`: ∂²ℓ/∂x_j², with the row weights, scales
  /// and reduction of the gradient. Labels only, and no softcap.
  template <class X, core::labels_like Y, class G>
  requires core::scores_like<X, T> && core::gradient_like<G, T>
  void hessian_diagonal(X&& scores, Y&& labels, G&& result,
                        const call_options<T>& call = {}) const {
    auto job =
        second_order(core::as_matrix(scores), core::as_vector(labels), core::as_matrix(result));
    run_second_order<false>(job, call);
  }
  /// Each row's Hessian times that row of `v`, into `result`. Labels only, and no softcap.
  template <class X, core::labels_like Y, class M, class G>
  requires core::scores_like<X, T> && core::scores_like<M, T> && core::gradient_like<G, T>
  void hessian_product(X&& scores, Y&& labels, M&& v, G&& result,
                       const call_options<T>& call = {}) const {
    auto job =
        second_order(core::as_matrix(scores), core::as_vector(labels), core::as_matrix(result));
    const auto direction = core::as_matrix(v);
    this->check_size("rows of v", direction.rows, job.scores.rows);
    this->check_size("columns of v", direction.cols, job.scores.cols);
    this->require_memory("v", direction.data, direction.rows * direction.cols);
    job.soft = core::matrix_data<T>(direction);
    run_second_order<true>(job, call);
  }

  constexpr loss_traits traits() const {
    const bool plain = options_.focal_gamma == 0 && options_.softcap == 0;
    return {.convex = plain && options_.log_z_penalty == 0,
            .smooth = true,
            .exact_gradient = true,
            .nonnegative = true,
            .shift_invariant = options_.softcap == 0 && options_.log_z_penalty == 0};
  }

private:
  friend row_loss<cross_entropy<T>, T>;

  static void copy(vector_view<const T> from, const char* what, std::vector<T>& to) {
    core::require_memory(name, what, from.data, from.size);
    to.reserve(static_cast<std::size_t>(from.size));
    for (index c = 0; c < from.size; ++c) {
      if (!(from[c] >= 0 && std::isfinite(from[c])))
        core::fail_at(name, what, c, core::to_text(from[c]), "a finite number, 0 or more");
      to.push_back(from[c]);
    }
  }

  double label_weight(index y) const {
    return class_weights_.empty() ? 1.0 : static_cast<double>(class_weights_[std::size_t(y)]);
  }

  bool has_label_weights() const { return !class_weights_.empty(); }

  void check(const core::row_job<T>& job) const {
    const auto same = [&](const std::vector<T>& v, const char* what) {
      if (!v.empty() && static_cast<index>(v.size()) != job.scores.cols)
        core::fail(name, std::string("size of ") + what, core::to_text(v.size()),
                   core::to_text(job.scores.cols) + " (the number of classes)");
    };
    same(class_weights_, "class_weights");
    same(prior_, "prior");
    core::require(!job.has_soft_target() || job.labels || options_.focal_gamma == 0, name,
                  "focal_gamma", options_.focal_gamma, "0 with soft targets");
  }

  core::cross_entropy_parameters<T> parameters(const core::row_job<T>& job) const {
    core::cross_entropy_parameters<T> p;
    p.smoothing = static_cast<double>(options_.label_smoothing);
    p.focal_gamma = static_cast<double>(options_.focal_gamma);
    p.log_z_penalty = static_cast<double>(options_.log_z_penalty);
    p.inverse_temperature = 1 / static_cast<double>(options_.temperature);
    p.scale = static_cast<T>(p.inverse_temperature);
    p.tempered = p.inverse_temperature != 1;
    p.cap = options_.softcap;
    if (p.cap > 0)
      p.inverse_cap = static_cast<T>(1 / static_cast<double>(p.cap));
    p.class_weights = class_weights_.empty() ? nullptr : class_weights_.data();
    p.soft = job.has_soft_target() && !job.labels;
    p.sides = p.soft || p.smoothing > 0;
    // side number of class c: ε π_c w_c + (1 − ε) w_c q_c; for all of them the same, 1 ε/K
    const double even = p.smoothing / static_cast<double>(job.scores.cols);
    const bool evenly = even > 0 && bias_.empty() && !p.soft;
    p.spread = evenly ? even : 1;
    p.side.uniform_bias = static_cast<T>(evenly ? 1 : even);
    p.side.uniform_weight = static_cast<T>(1 - p.smoothing);
    p.side.bias = bias_.empty() ? nullptr : bias_.data();
    p.side.weight = weight_.empty() ? nullptr : weight_.data();
    return p;
  }

  template <class S, class L, class G>
  core::row_job<T> second_order(matrix_view<S> scores, vector_view<L> labels,
                                matrix_view<G> result) const {
    core::require(options_.softcap == 0, name, "softcap", options_.softcap,
                  "0 where second derivatives are asked for");
    core::row_job<T> job;
    job.scores = core::matrix_data<T>(scores);
    job.gradient = core::matrix_data<T, true>(result);
    this->set_labels(job, labels);
    return job;
  }
  template <bool Product>
  void run_second_order(core::row_job<T>& job, const call_options<T>& call) const {
    this->template evaluate<true>(job, call, [this](const auto& settled, auto f) {
      double smoothed = static_cast<double>(options_.label_smoothing);
      if (!bias_.empty()) {
        smoothed = 0;
        for (T b : bias_)
          smoothed += static_cast<double>(b);
      }
      f(core::cross_entropy_hessian<T, Product>{{}, {{}, parameters(settled)}, smoothed});
    });
  }

  /// Calls f with the formula that serves the job: the plainest that can. The bits are the same
  /// from each that can.
  template <class F> void visit(const core::row_job<T>& job, F f) const {
    using namespace core;
    const auto p = parameters(job);
    const bool special = p.soft || p.cap > 0 || job.report.entropy.data || !bias_.empty();
    if (special)
      f(cross_entropy_formula<T, log_sum_exp_and_moments>{{}, p});
    else if (p.smoothing > 0)
      f(cross_entropy_formula<T, log_sum_exp_and_total>{{}, p});
    else
      f(cross_entropy_formula<T, log_sum_exp>{{}, p});
  }

  options options_;
  std::vector<T> class_weights_, prior_;
  std::vector<T> bias_, weight_; // ε π w and (1 − ε) w, where they are not uniform
};

} // namespace perdita::inline PERDITA_ABI
