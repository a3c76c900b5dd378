// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

struct ranked_list_options {
  double margin = 0.4;               ///< m: between what belongs together and others; finite
  double boundary = 1.2;             ///< α: others should be no nearer; finite
  double balance = 0.5;              ///< λ in [0, 1]: of others
  double positive_temperature = 0;   ///< T₊ ≥ 0
  double negative_temperature = 10;  ///< T₋ ≥ 0
  bool differentiate_weights = true; ///< otherwise they are constants
  bool normalise = true;             ///< distances of unit vectors
  perdita::reduction reduction = reduction::mean;
};

namespace core {

struct ranked_list_formula : anchor_formula {
  static constexpr bool distances = true;
  ranked_list_options o;

  explicit ranked_list_formula(const ranked_list_options& options) : o(options) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (spoilt<Gradient>(row))
      return spoilt_outcome();
    take_roots(row);
    const kind<T> positive(row, belonging{}, 1, o.boundary - o.margin, o.positive_temperature);
    const kind<T> negative(row, rivalling{}, -1, o.boundary, o.negative_temperature);
    if constexpr (Gradient)
      for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
        const V d = V::load(row.scores + j);
        const auto belongs = V::load(row.relation + j) > V(0);
        const V slope = select(belongs, positive.slopes(d, 1 - o.balance, o.differentiate_weights),
                               negative.slopes(d, o.balance, o.differentiate_weights));
        slope_of_square(slope, d).store(row.scores + j);
      }
    return {(1 - o.balance) * positive.mean + o.balance * negative.mean,
            positive.compared || negative.compared};
  }

private:
  /// Hinges h = [sign (d − at)]₊ of one kind, and their mean with weights e^{temperature h} of
  /// those above 0.
  template <class T> struct kind {
    using V = pack<T>;
    T sign, at, temperature;
    T top = 0;
    double sum = 0, mean = 0; ///< Σ e^{temperature (h − top)}
    bool compared = false;

    template <class Chosen>
    kind(const anchor_row<T>& row, Chosen chosen, T direction, double bound, double by)
        : sign(direction), at(static_cast<T>(bound)), temperature(static_cast<T>(by)) {
      V most(0), any_of(0);
      for_chosen(
          row, chosen, [&](const V& d, const auto& mask, index) __attribute__((always_inline)) {
            most = max(select(mask, hinge(d), V(0)), most);
            any_of = select(mask, V(1), any_of);
          });
      top = max_lanes(most);
      compared = any(any_of > V(0));
      lane_sums<T, 2> sums;
      for_chosen(
          row, chosen, [&](const V& d, const auto& mask, index) __attribute__((always_inline)) {
            const V h = hinge(d), w = select(mask, weights(h), V(0));
            sums.some[0] += w;
            sums.some[1] += w * h;
            sums.count_pack();
          });
      sum = sums.total(0);
      mean = sum > 0 ? sums.total(1) / sum : 0;
    }
    PERDITA_INLINE V hinge(const V& d) const { return max((d - V(at)) * V(sign), V(0)); }
    PERDITA_INLINE V weights(const V& h) const {
      return select(h > V(0), exp_shifted((h - V(top)) * V(temperature)), V(0));
    }
    PERDITA_INLINE V slopes(const V& d, double share, bool differentiate) const {
      const V h = hinge(d);
      const V slope = weights(h) * V(static_cast<T>(sum > 0 ? share * sign / sum : 0));
      return differentiate ? slope * fma(h - V(static_cast<T>(mean)), V(temperature), V(1)) : slope;
    }
  };
};

} // namespace core

/// The ranked list loss: at distances d of unit vectors, what belongs to an anchor should be nearer
/// than α − m and others further than α,
///
///   ℓ = (1 − λ) Σ_p w_p h_p/Σ w + λ Σ_n w_n h_n/Σ w,
///   h_p = [d_p − (α − m)]₊, h_n = [α − d_n]₊, w = e^{T h} where h > 0 (T₊ or T₋), otherwise 0
///   ∂ℓ/∂d_p = (1 − λ) (w_p/Σ w) (1 + T (h_p − mean_w h)), of n with −λ
///
/// or, where weights are constants as in the paper, without the last factor. The mean is over all
/// anchors that are compared with anything; a kind without h above 0 adds 0. (pytorch-metric-
/// learning, which differentiates the weights too, adds 10⁻⁵ to each weight in Σ w.) At kinks,
/// where the value jumps if T is not 0, and at d = 0 the gradient is 0: see pair_margin for small
/// distances, and anchor_loss for calls, shapes, special values and errors.
///
/// Source: Wang et al., "Ranked list loss for deep metric learning", 2019, and its defaults.
template <class T> class ranked_list : public anchor_loss<ranked_list<T>, T> {
public:
  using options = ranked_list_options;
  static constexpr const char* name = "ranked_list";

  ranked_list() : ranked_list(options{}) {}
  explicit ranked_list(const options& o) : options_(o) {
    const auto finite = [](const char* what, double x) {
      core::require(std::isfinite(x), name, what, x, "a finite number");
    };
    const auto not_negative = [](const char* what, double x) {
      core::require(x >= 0 && std::isfinite(x), name, what, x, "a finite number, 0 or more");
    };
    finite("margin", o.margin);
    finite("boundary", o.boundary);
    core::require(o.balance >= 0 && o.balance <= 1, name, "balance", o.balance,
                  "a number in [0, 1]");
    not_negative("positive_temperature", o.positive_temperature);
    not_negative("negative_temperature", o.negative_temperature);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::ranked_list_formula formula() const { return core::ranked_list_formula(options_); }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
