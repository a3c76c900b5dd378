// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/row_loss.hpp"

namespace perdita::inline PERDITA_ABI {

template <class T>
class cross_entropy;

namespace core {

/// Scores as they are, one label: everything that needs no sum but Σ e^z over the rivals.
///
/// With u = log Σ_{j≠y} e^{z_j} − z_y, the log-odds against the label,
///   −log p_y = softplus(u),   1 − p_y = σ(u),   ∂u/∂z_j = e^{z_j} / Σ_{k≠y} e^{z_k},   ∂u/∂z_y = −1,
/// so that a confident row keeps its digits: nothing is subtracted from 1.
template <class T, bool General>
struct cross_entropy_formula {
  using statistic = std::conditional_t<General, log_sum_exp_and_moments, log_sum_exp>;
  static constexpr bool excludes_target = true;
  static constexpr bool proportional = !General;
  static constexpr bool has_side = General;

  const cross_entropy<T>& loss;
  bool soft = false;

  double label_weight(index y) const { return loss.label_weight(y); }

  template <class V>
  PERDITA_INLINE V score(const V& x) const {
    if constexpr (!General) {
      return x;
    } else {
      const V z = cap > 0 ? select(x == V(-std::numeric_limits<T>::infinity()), x,
                                   tanh(x * V(1 / cap)) * V(cap))
                          : x;
      return z * V(inverse_temperature);
    }
  }
  template <class V>
  PERDITA_INLINE V slope(const V& z, const V& share, const V& b, const V*) const {
    const V g = (share - b) * V(inverse_temperature);
    if (!(cap > 0)) return g;
    const V t = z * V(1 / (inverse_temperature * cap));
    const V steepness = fnma(t, t, V(1));
    return select(z == V(-std::numeric_limits<T>::infinity()), g, g * steepness);
  }
  side_cursor<T> side(index first) const {
    side_cursor<T> s;
    s.uniform_bias = loss.uniform_side_;
    s.uniform_weight = soft ? 1 - loss.options_.label_smoothing : T(0);
    if (!loss.side_.empty()) s.bias = loss.side_.data() + first;
    if (!loss.soft_weight_.empty()) s.weight = loss.soft_weight_.data() + first;
    return s;
  }
  T cap = 0, inverse_temperature = 1;

  template <class W>
  struct parts {
    W log_rivals;  // log Σ_{j≠y} e^{z_j − shift}
    W odds;        // u
    W surprise, miss, hit;  // −log p, 1 − p and p of the label
    W log_sum_exp;
  };
  template <class S>
  auto part(const S& s) const {
    using W = decltype(s.target);
    const W inf(std::numeric_limits<double>::infinity());
    parts<W> p;
    p.log_rivals = log(s.term[0]);
    p.odds = select(s.target == -inf, inf, (s.shift - s.target) + p.log_rivals);
    p.surprise = softplus(p.odds);
    p.miss = sigmoid(p.odds);
    p.hit = sigmoid(-p.odds);
    p.log_sum_exp = select(s.target == -inf, s.shift + p.log_rivals, s.target + p.surprise);
    return p;
  }

  template <class S>
  auto finish(const S& s) const {
    using W = decltype(s.target);
    const W zero(0.0);
    const parts<W> p = part(s);
    const auto& o = loss.options_;

    // f(u) = (1 − p)^γ softplus(u), and its derivative
    W value = p.surprise, steep = p.miss;
    if (o.focal_gamma > 0) {
      const W gamma(static_cast<double>(o.focal_gamma));
      const W focus = exp(gamma * -softplus(-p.odds));
      value = select(p.surprise == zero, zero, focus * p.surprise);
      steep = select(p.surprise == zero, zero, focus * fma(gamma * p.hit, p.surprise, p.miss));
    }
    const W hard = soft ? zero : s.label_weight * W(1 - static_cast<double>(o.label_smoothing));
    value = hard * value;
    W rivals = hard * steep;  // coefficient of the rivals' shares e^z / Σ e^z
    W target = -rivals;

    if constexpr (General) {  // + Σ_c b_c (lse − z_c)
      const W b = s.target_side, b_rivals = s.term[2];
      const W over = fma(b_rivals, p.log_rivals + softplus(-p.odds), -s.term[1]);
      value = value + fma(b, p.surprise, select(b_rivals == zero, zero, over));
      rivals = fma(b + b_rivals, p.miss, rivals);
      target = target + fma(b_rivals, p.hit, -(b * p.miss));
    }
    if (o.log_z_penalty > 0) {
      const W c(static_cast<double>(o.log_z_penalty)), lse = p.log_sum_exp;
      value = fma(c * lse, lse, value);
      rivals = fma(W(2.0) * c * lse, p.miss, rivals);
      target = fma(W(2.0) * c * lse, p.hit, target);
    }
    row_outcome<W> out;
    out.value = value;
    out.image_scale = select(s.term[0] == zero, zero, rivals / s.term[0]);
    out.coefficient[0] = out.coefficient[1] = zero;
    out.target_gradient = target;
    if constexpr (General) {
      W slope = W(static_cast<double>(inverse_temperature));
      if (cap > 0) {
        const W t = s.target * W(1 / (static_cast<double>(inverse_temperature) * static_cast<double>(cap)));
        slope = slope * select(abs(s.target) == W(std::numeric_limits<double>::infinity()), W(1.0), fnma(t, t, W(1.0)));
      }
      out.target_gradient = target * slope;
    }
    return out;
  }

  template <class S>
  auto report(const S& s) const {
    using W = decltype(s.target);
    const parts<W> p = part(s);
    row_report<W> r;
    r.log_sum_exp = p.log_sum_exp;
    r.target_log_probability = -p.surprise;
    r.penalty = W(static_cast<double>(loss.options_.log_z_penalty)) * p.log_sum_exp * p.log_sum_exp;
    r.entropy = W(0.0);
    if constexpr (General) {  // Σ p_c (lse − z_c)
      const W zero(0.0);
      const W rivals = p.log_rivals + softplus(-p.odds) - s.term[3] / s.term[0];
      r.entropy = select(p.hit == zero, zero, p.hit * p.surprise) + select(p.miss == zero, zero, p.miss * rivals);
    }
    return r;
  }
};

}  // namespace core

template <class T = float>
class cross_entropy : public row_loss<cross_entropy<T>, T> {
 public:
  struct options_type {
    T label_smoothing = 0;
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
    vector_view<const T> class_weights{};
    vector_view<const T> prior{};
    T temperature = 1;
    T softcap = 0;
    T log_z_penalty = 0;
    T focal_gamma = 0;
  };
  static constexpr const char* name = "cross_entropy";
  static constexpr bool takes_soft_targets = true;

  cross_entropy() : cross_entropy(options_type{}) {}
  cross_entropy(const options_type& o) : options_(o) {
    using core::require;
    require(o.label_smoothing >= 0 && o.label_smoothing <= 1, name, "label_smoothing", o.label_smoothing, "a number in [0, 1]");
    for (index c = 0; c < o.class_weights.size; ++c) class_weights_.push_back(o.class_weights[c]);
    for (index c = 0; c < o.prior.size; ++c) prior_.push_back(o.prior[c]);
  }
  const options_type& options() const { return options_; }
  double label_weight(index y) const { return class_weights_.empty() ? 1.0 : static_cast<double>(class_weights_[static_cast<std::size_t>(y)]); }
  void check(index) const {}
  template <class Job, class F>
  void visit(const Job& job, F f) const {
    const bool general = job.soft || options_.label_smoothing > 0 || options_.temperature != 1 || options_.softcap > 0 || job.report.entropy.data;
    if (general) f(core::cross_entropy_formula<T, true>{*this, static_cast<bool>(job.soft), options_.softcap, 1/options_.temperature});
    else f(core::cross_entropy_formula<T, false>{*this});
  }
 private:
  friend struct core::cross_entropy_formula<T, true>;
  friend struct core::cross_entropy_formula<T, false>;
  options_type options_;
  std::vector<T> class_weights_, prior_, side_, soft_weight_;
  T uniform_side_ = 0;
};
}  // namespace perdita::inline PERDITA_ABI
