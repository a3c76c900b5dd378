// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

struct decoupled_options {
  double temperature = 0.1;                       ///< τ > 0, with a finite inverse
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of anchors with positives and negatives
  /// Where given, ∂value/∂τ goes there if gradients are asked for.
  double* d_temperature = nullptr;
};
struct weighted_decoupled_options {
  double temperature = 0.1;
  double sigma = 0.5;            ///< σ of the positives' weights, above 0
  bool constant_weights = false; ///< they have no gradient
  bool normalise = true;
  perdita::reduction reduction = reduction::mean;
  double* d_temperature = nullptr;
};

namespace core {

struct decoupled_formula : anchor_formula {
  double rate; ///< 1/τ

  explicit decoupled_formula(double temperature) : rate(1 / temperature) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    return judge<Gradient>(row, 1, 0);
  }
  /// With a weight of the positives, and ∂/∂c of all else that depends on their mean c.
  template <bool Gradient, class T>
  anchor_outcome judge(const anchor_row<T>& row, double weight, double pull) const {
    using V = pack<T>;
    const chosen_scores<T> own(row, belonging{});
    const chosen_images<T> negative(row, rivalling{}, rate);
    const double rivals = negative.log(), share = 1 / static_cast<double>(own.count);
    if (own.count == 0 || rivals == -std::numeric_limits<double>::infinity())
      return {0, false};
    anchor_outcome out;
    out.value = rivals - weight * rate * share * own.sum;
    if constexpr (Gradient) {
      const V of_negative = negative.factor(rate);
      const V pulled(static_cast<T>((pull - weight * rate) * share));
      const double along = put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            return select(relation > V(0), pulled, negative.images(x) * of_negative);
          });
      out.extra[0] = -rate * (along - pull * share * own.sum);
    }
    return out;
  }
};

/// An anchor's notes are c/σ, c being the mean of its positives; then its weight and the pull.
struct weighted_decoupled_formula : decoupled_formula {
  static constexpr index notes = 2;
  double sigma;
  bool constant;

  weighted_decoupled_formula(double temperature, double s, bool c)
      : decoupled_formula(temperature), sigma(s), constant(c) {}

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    const chosen_scores<T> own(row, belonging{}), rival(row, rivalling{});
    const bool counts = own.count > 0 && rival.count > 0;
    to[0] = counts ? own.sum / static_cast<double>(own.count) / sigma
                   : -std::numeric_limits<double>::infinity();
  }
  template <class Weight> void combine(double* note, index anchors, Weight weight, bool) const {
    const double total = weighted_log_sum(note, anchors, notes, weight);
    double all = 0, mean = 0;
    const auto counts = [&](index i) {
      return weight(i) != 0 && note[2 * i] != -std::numeric_limits<double>::infinity();
    };
    for (index i = 0; i < anchors; ++i)
      if (counts(i)) {
        all += weight(i);
        mean += weight(i) * std::exp(note[2 * i] - total) * note[2 * i];
      }
    for (index i = 0; i < anchors; ++i)
      if (counts(i)) {
        const double share = all * std::exp(note[2 * i] - total);
        note[2 * i + 1] = constant ? 0 : share * (note[2 * i] - mean) * rate;
        note[2 * i] = 2 - share;
      }
  }
  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    const double* own = row.note + row.anchor * notes;
    return judge<Gradient>(row, own[0], own[1]);
  }
};

} // namespace core

/// Decoupled contrastive loss (DCL): the positive is not among what it is compared with. With
/// S = ⟨x̂_i, ŷ_j⟩/τ, an anchor's positives P and negatives N,
///
///   ℓ_i = log Σ_{n∈N} e^{S_in} − (1/|P|) Σ_{p∈P} S_ip,   ∂ℓ_i/∂S_ij = softmax_N(j) or −1/|P|
///
/// and the mean over anchors that have both. The authors' loss of two views, in both directions
/// (they add the directions: twice this mean), and one of them:
///
///   loss.views(both, 2, d_both)
///   loss.views(both, 2, d_both, {.row_weights = ones_and_then_zeros})
///
/// The negatives of a row are both views of all others. (The authors' mask leaves e^−103.6 of what
/// it masks, which shows at low temperatures; this is exact.) With loss.pairs(x, y, d_x, d_y) the
/// negatives are the other y only. All embeddings equal: log |N|. A batch of one has no negatives:
/// 0. See anchor_loss for calls, shapes, special values and errors.
///
/// Source: Yeh et al., "Decoupled contrastive learning", ECCV 2022.
template <class T> class decoupled : public anchor_loss<decoupled<T>, T> {
public:
  using options = decoupled_options;
  static constexpr const char* name = "decoupled";

  decoupled() : decoupled(options{}) {}
  explicit decoupled(const options& o) : options_(o) {
    core::invertible<T>(name, "temperature", o.temperature);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::decoupled_formula formula() const { return core::decoupled_formula(options_.temperature); }
  void set_extra(core::anchor_job<T>& job) const { job.extra[0] = options_.d_temperature; }

  options options_;
};

/// The same with weights of the positives (DCLW), lower for those that are near already: with c_i
/// the mean of the cosines of i's positives and W anchors,
///
///   ℓ_i = log Σ_{n∈N} e^{S_in} − w_i c_i/τ,   w_i = 2 − W softmax_i(c/σ)
///
/// over all anchors that count, the mean of w being 1. As in the authors' code the weights are
/// differentiated, ∂L/∂c_j having the further term softmax_j(c/σ) (c_j − Σ_k softmax_k c_k)/(τσ),
/// unless they are constant_weights.
///
/// Row weights are numbers of copies of an anchor, in the softmax as well. Anchors are coupled:
/// what is NaN in one positive is in all values, and `upstream` weighs the gradients of what an
/// anchor compares, which is the gradient of a weighted sum of values only with constant weights.
/// Twice as many comparisons are made without gradients, a third more with them.
template <class T> class weighted_decoupled : public anchor_loss<weighted_decoupled<T>, T> {
public:
  using options = weighted_decoupled_options;
  static constexpr const char* name = "weighted_decoupled";

  weighted_decoupled() : weighted_decoupled(options{}) {}
  explicit weighted_decoupled(const options& o) : options_(o) {
    core::invertible<T>(name, "temperature", o.temperature);
    core::positive(name, "sigma", o.sigma);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::weighted_decoupled_formula formula() const {
    return {options_.temperature, options_.sigma, options_.constant_weights};
  }
  void set_extra(core::anchor_job<T>& job) const { job.extra[0] = options_.d_temperature; }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
