// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

struct multi_similarity_options {
  double alpha = 2, beta = 50; ///< sharpness of positives and negatives, above 0
  double base = 0.5;           ///< λ, the score where a pair begins to cost
  bool mining = false;         ///< only pairs that the authors' code looks at
  double margin = 0.1;         ///< ε of the mining
  double duplicate = 1e-5;     ///< mining drops positives with scores of 1 − this or more
  bool normalise = true;       ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of all anchors
};

namespace core {

struct multi_similarity_formula : anchor_formula {
  multi_similarity_options o;

  explicit multi_similarity_formula(const multi_similarity_options& options) : o(options) {}

  template <class T> void mine(const anchor_row<T>& row) const {
    using V = pack<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    const V same(static_cast<T>(1 - o.duplicate)), margin(static_cast<T>(o.margin));
    const auto most = chosen_scores<T>(row, rivalling{}).most;
    drop(
        row, belonging{},
        inf, [&](const V& x) __attribute__((always_inline)) { return x >= same; });
    const auto least = chosen_scores<T>(row, belonging{}).least;
    drop(
        row, belonging{},
        inf, [&](const V& x) __attribute__((always_inline)) { return x - margin >= V(most); });
    drop(
        row, rivalling{},
        -inf, [&](const V& x) __attribute__((always_inline)) { return x + margin <= V(least); });
  }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (o.mining)
      mine(row);
    const chosen_images<T> positive(row, belonging{}, -o.alpha), negative(row, rivalling{}, o.beta);
    const scalar_odds far(positive.log() + o.alpha * o.base),
        near(negative.log() - o.beta * o.base);
    const bool idle = o.mining && (positive.none() || negative.none());
    if constexpr (Gradient) {
      const V of_positive = positive.factor(idle ? 0 : -far.miss);
      const V of_negative = negative.factor(idle ? 0 : near.miss);
      put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            return select(relation > V(0), positive.images(x) * of_positive,
                          negative.images(x) * of_negative);
          });
    }
    const double value = far.surprise / o.alpha + near.surprise / o.beta;
    return {idle && value == value ? 0 : value};
  }
};

} // namespace core

/// The multi-similarity loss of an anchor's positives P and negatives N, s = ⟨x̂_i, ŷ_j⟩:
///
///   ℓ_i = (1/α) log(1 + Σ_{p∈P} e^{−α(s_ip − λ)}) + (1/β) log(1 + Σ_{n∈N} e^{β(s_in − λ)})
///   ∂ℓ_i/∂s_ip = −e_p/(1 + Σ e_p),  ∂ℓ_i/∂s_in = e_n/(1 + Σ e_n)
///
/// and the mean over all anchors; a set that is empty adds 0. The paper's loss is the first call
/// of anchor_loss, loss(x, labels, d_x).
///
/// With mining, as in the authors' code, positives of 1 − duplicate or more are dropped; then
/// negatives that are not above the least positive less ε, and positives that are not below the
/// largest negative plus ε. An anchor that has no positive or no negative left is 0, and counts in
/// the mean. (The code's α, β and λ are 2, 40 and 0.5.) What is dropped has no gradient, nor has
/// the choice.
///
/// See anchor_loss for calls, shapes, special values and errors. Embeddings that are all equal
/// under one label: (1/α) log(1 + |P| e^{−α(1 − λ)}). Throws where α or β is not above 0, or
/// another option not finite.
///
/// Source: Wang et al., "Multi-similarity loss with general pair weighting for deep metric
/// learning", CVPR 2019.
template <class T> class multi_similarity : public anchor_loss<multi_similarity<T>, T> {
public:
  using options = multi_similarity_options;
  static constexpr const char* name = "multi_similarity";

  multi_similarity() : multi_similarity(options{}) {}
  explicit multi_similarity(const options& o) : options_(o) {
    const auto finite = [](const char* what, double x) {
      core::require(std::isfinite(x), name, what, x, "a finite number");
    };
    core::positive(name, "alpha", o.alpha);
    core::positive(name, "beta", o.beta);
    finite("base", o.base);
    finite("margin", o.margin);
    finite("duplicate", o.duplicate);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::multi_similarity_formula formula() const {
    return core::multi_similarity_formula(options_);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
