// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

struct uniformity_options {
  double t = 2;          ///< above 0
  bool normalise = true; ///< distances of unit vectors
  static constexpr perdita::reduction reduction = perdita::reduction::mean;
};

namespace core {

/// An anchor's notes are log Σ_j e^{−t d²} and how many there are; then W times its share of the
/// sum of all, the number, and the loss.
struct uniformity_formula : anchor_formula {
  static constexpr bool distances = true;
  static constexpr index notes = 3;
  double rate; ///< −t

  explicit uniformity_formula(double t) : rate(-t) {}

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    to[0] = chosen_images<T>(row, compared{}, rate).log();
    to[1] = static_cast<double>(chosen_scores<T>(row, compared{}).count);
  }
  template <class Weight> void combine(double* note, index anchors, Weight weight, bool) const {
    const double total = weighted_log_sum(note, anchors, notes, weight);
    double pairs = 0, all = 0;
    for (index i = 0; i < anchors; ++i) {
      pairs += weight(i) * note[3 * i + 1];
      all += note[3 * i + 1] > 0 ? weight(i) : 0;
    }
    for (index i = 0; i < anchors; ++i) {
      note[3 * i] = all * std::exp(note[3 * i] - total);
      note[3 * i + 2] = total - std::log(pairs);
    }
  }
  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const double* own = row.note + row.anchor * notes;
    if (own[1] == 0)
      return {0, false};
    if constexpr (Gradient) {
      const chosen_images<T> near(row, compared{}, rate);
      const V factor = near.factor(rate * own[0]);
      put_slopes(
          row, [&](const V& x, const V&)
                   __attribute__((always_inline)) { return near.images(x) * factor; });
    }
    return {own[2]};
  }
};

} // namespace core

/// Uniformity: how far from evenly spread over the sphere embeddings are,
///
///   L = log (mean over pairs i < j of e^{−t ‖x̂_i − x̂_j‖²}),   t = 2
///   ∂L/∂x̂_i = −4t Σ_j w_ij (x̂_i − x̂_j),  w_ij the images divided by their sum over all i ≠ j
///
///   perdita::uniformity<float> loss;
///   float value = loss(x, d_x);
///
/// The other calls of anchor_loss compare x with y, and with a filter fewer pairs; labels are of no
/// account. L ≤ 0: 0, but for rounding, where all embeddings are equal; distances of near
/// neighbours keep their digits. Fewer than two rows: 0.
///
/// All rows are one sum: a NaN or an infinity in any row makes the value NaN. Each anchor's value
/// is the whole. Row weights are numbers of copies of an anchor; `upstream` should be one number
/// for all. See anchor_loss for shapes and errors; every comparison is made twice.
///
/// Source: Wang, Isola, "Understanding contrastive representation learning through alignment and
/// uniformity on the hypersphere", ICML 2020. (perdita::alignment is the other half.)
template <class T = float> class uniformity : public anchor_loss<uniformity<T>, T> {
public:
  using options = uniformity_options;
  static constexpr const char* name = "uniformity";

  uniformity() : uniformity(options{}) {}
  explicit uniformity(const options& o) : options_(o) { core::positive(name, "t", o.t); }
  const options& settings() const { return options_; }

  using anchor_loss<uniformity<T>, T>::operator();
  template <class X>
  requires core::scores_like<X, T> T operator()(X&& x, const anchor_options<T>& call = {}) const {
    return this->views(x, 1, call);
  }
  template <class X>
  requires core::scores_like<X, T> T operator()(X&& x, matrix_view<T> d_x,
                                                const anchor_options<T>& call = {}) const {
    return this->views(x, 1, d_x, call);
  }

private:
  friend core::anchor_access;
  core::uniformity_formula formula() const { return core::uniformity_formula(options_.t); }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
