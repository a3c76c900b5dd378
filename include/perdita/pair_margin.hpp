// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// What sums over pairs are divided by: the number of all pairs; or those of pairs that belong
/// together, and of others, by how many of them are above 0.
enum class pair_mean { pairs, nonzero };

struct pair_margin_options {
  double positive_margin = 0; ///< how far apart what belongs together may be: finite
  double negative_margin = 1; ///< how far apart others must be: finite
  bool squared = true;        ///< ½h² of a hinge h, and not h
  pair_mean mean = pair_mean::pairs;
  bool normalise = true; ///< distances of unit vectors
  perdita::reduction reduction = reduction::mean;
};

namespace core {

/// Hinges of pairs by u: a distance, or a cosine's negative. [u − at₀] of what belongs together,
/// [at₁ − u] of others.
template <bool Distances> struct pair_hinges : anchor_formula {
  static constexpr bool distances = Distances;
  static constexpr index notes = 2; ///< how many hinges are not 0, of either kind

  double at[2];
  double factor[2] = {1, 1};
  bool squared = false;
  bool apart = false; ///< each kind is divided by its number
  bool ties = false;  ///< hinges at their kink count in that number

  bool takes_notes() const { return apart; }

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    lane_sums<T, 2> sums;
    for_hinges(
        row, [&](const auto& h) __attribute__((always_inline)) {
          const pack<T> one = select(h.active, pack<T>(1), pack<T>(0));
          sums.some[0] += select(h.belongs, one, pack<T>(0));
          sums.some[1] += select(h.belongs, pack<T>(0), one);
          sums.count_pack();
        });
    to[0] = sums.total(0);
    to[1] = sums.total(1);
  }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (spoilt<Gradient>(row))
      return spoilt_outcome(count_of(row, compared{}));
    double by[2];
    for (int k = 0; k < 2; ++k)
      by[k] = !apart ? factor[k] : row.total[k] > 0 ? factor[k] / row.total[k] : 0;
    const V own(static_cast<T>(by[0])), other(static_cast<T>(-by[1]));
    lane_sums<T, 3> sums;
    for_hinges(
        row, [&](const auto& h) __attribute__((always_inline)) {
          const V miss = select(h.active, h.miss, V(0));
          const V value = squared ? miss * miss * V(T(0.5)) : miss;
          sums.some[0] += select(h.belongs, value, V(0));
          sums.some[1] += select(h.belongs, V(0), value);
          sums.some[2] += select(h.compared, V(1), V(0));
          sums.count_pack();
          if constexpr (Gradient) {
            const V steep = squared ? miss : select(miss > V(0), V(1), V(0));
            const V slope = select(h.belongs, own, other) * steep;
            if constexpr (Distances)
              slope_of_square(slope, h.u).store(row.scores + h.first);
            else
              (-slope).store(row.scores + h.first);
          }
        });
    anchor_outcome out;
    out.value = by[0] * sums.total(0) + by[1] * sums.total(1);
    out.terms = sums.total(2);
    out.counts = out.terms > 0;
    return out;
  }

private:
  template <class T> struct hinge {
    index first;
    pack<T> u, miss;
    pack_mask<T> belongs, compared, active;
  };
  template <class T, class F> PERDITA_INLINE void for_hinges(const anchor_row<T>& row, F f) const {
    using V = pack<T>;
    const V near(static_cast<T>(at[0])), far(static_cast<T>(at[1]));
    for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
      const V x = V::load(row.scores + j), relation = V::load(row.relation + j);
      hinge<T> h;
      h.first = j;
      if constexpr (Distances)
        h.u = sqrt(x);
      else
        h.u = -x;
      h.belongs = relation > V(0);
      h.compared = h.belongs | (relation < V(0));
      h.miss = select(h.belongs, h.u - near, far - h.u);
      h.active = h.compared & (ties ? h.miss >= V(0) : h.miss > V(0));
      f(h);
    }
  }
};

} // namespace core

/// The contrastive loss of pairs: embeddings at the distance D = ‖x̂_i − ŷ_j‖ that belong together
/// should be no further apart than m₊, others no nearer than m₋,
///
///   h = [D − m₊]₊ or [m₋ − D]₊,   ℓ = ½h² (squared) or h,   ∂ℓ/∂D = ±h or ±1 where h > 0
///
/// of all pairs of an anchor and a candidate. The mean is over all pairs, or, with
/// pair_mean::nonzero, that of the hinges above 0 of pairs that belong together plus that of the
/// others: the value jumps where a hinge reaches 0. With weights w of anchors, Σ w ℓ/Σ w.
///
///   {}                                                  the paper's, with its m as negative_margin
///   {.squared = false, .mean = pair_mean::nonzero}      as pytorch-metric-learning
///
/// At a kink and at D = 0 the gradient is 0. A gradient is made as a difference of sums of slopes
/// times embeddings: where D is small next to these, a pair's part of it keeps about log₂(D/ε)
/// bits, and no direction, but a size of the order of ∂ℓ/∂D, where D is of the order of ε. The
/// distances themselves are exact to some ε, but of unit vectors no better than ε absolutely; below
/// 10⁻¹⁹ (float) they lose digits, and are 0 in the end.
///
/// No pairs, or none above 0: 0. See anchor_loss for calls, shapes, special values and errors; with
/// pair_mean::nonzero every anchor is looked at twice, and anchor_options::normaliser is not used.
///
/// Source: Hadsell, Chopra, LeCun, "Dimensionality reduction by learning an invariant mapping",
/// 2006 (some texts write y = 1 for pairs that do not belong together).
template <class T> class pair_margin : public anchor_loss<pair_margin<T>, T> {
public:
  using options = pair_margin_options;
  static constexpr const char* name = "pair_margin";

  pair_margin() : pair_margin(options{}) {}
  explicit pair_margin(const options& o) : options_(o) {
    core::finite(name, "positive_margin", o.positive_margin);
    core::finite(name, "negative_margin", o.negative_margin);
    core::require_enumerator(name, "mean", o.mean, pair_mean::nonzero, "pairs or nonzero");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  bool apart() const {
    return options_.mean == pair_mean::nonzero && options_.reduction == reduction::mean;
  }
  auto formula() const {
    core::pair_hinges<true> f;
    f.at[0] = options_.positive_margin;
    f.at[1] = options_.negative_margin;
    f.squared = options_.squared;
    f.apart = apart();
    return f;
  }
  void set_extra(core::anchor_job<T>& job) const { job.mean = job.mean && !apart(); }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
