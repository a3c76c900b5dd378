// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

struct sig_lip_options {
  double scale = 10;                              ///< e^t of the paper
  double bias = -10;                              ///< b
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the anchors, not of the pairs
  /// Where given, ∂value/∂scale (times the scale: ∂value/∂t) and ∂value/∂b go there if gradients
  /// are asked for.
  double *d_scale = nullptr, *d_bias = nullptr;
};

namespace core {

struct sig_lip_formula : anchor_formula {
  double scale, bias;

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const V factor(static_cast<T>(scale)), shift(static_cast<T>(bias)), zero(0);
    lane_sums<T, 3> sums; // of values, slopes by logits, and those times scores
    for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
      const V x = V::load(row.scores + j), relation = V::load(row.relation + j);
      const V logit = fma(x, factor, shift), wrong = select(relation > zero, -logit, logit);
      sums.some[0] += select(relation == zero, zero, softplus(wrong));
      if constexpr (Gradient) {
        const V rate = sigmoid(wrong);
        const V slope = select(relation == zero, zero, select(relation > zero, -rate, rate));
        sums.some[1] += slope;
        sums.some[2] += select(relation == zero, zero, slope * x);
        (slope * factor).store(row.scores + j);
      }
      sums.count_pack();
    }
    return {sums.total(0), true, {sums.total(2), sums.total(1)}};
  }
};

} // namespace core

/// SigLIP: every pair is a question of its own, whether it belongs together,
///
///   S = scale ⟨x̂_i, ŷ_j⟩ + bias, y = 1 where j belongs to i, otherwise −1
///   L = (1/N) Σ_i Σ_j log(1 + e^(−y S)),   ∂L/∂S = −y σ(−y S)/N
///
/// and ∂L/∂scale, ∂L/∂bias. It is the mean over N anchors of sums over candidates, not over pairs;
/// every anchor counts, with positives or without. As in the paper:
///
///   loss.pairs(images, texts, d_images, d_texts)
///
/// by labels an anchor may have several texts. log(1 + e^u) and σ(u) neither overflow nor lose
/// digits. See anchor_loss for calls, shapes, special values and errors. A batch of one has a pair
/// that belongs together and no other. Throws where scale or bias is not finite.
///
/// Source: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid loss for language image pre-training", 2023.
template <class T> class sig_lip : public anchor_loss<sig_lip<T>, T> {
public:
  using options = sig_lip_options;
  static constexpr const char* name = "sig_lip";

  sig_lip() : sig_lip(options{}) {}
  explicit sig_lip(const options& o) : options_(o) {
    core::finite(name, "scale", o.scale);
    core::finite(name, "bias", o.bias);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::sig_lip_formula formula() const { return {{}, options_.scale, options_.bias}; }
  void set_extra(core::anchor_job<T>& job) const {
    job.extra[0] = options_.d_scale;
    job.extra[1] = options_.d_bias;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
