// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// Where the mean over an anchor's positives is taken: of logarithms, or in the logarithm.
enum class positives_mean { outside, inside };

struct sup_con_options {
  double temperature = 0.07;                      ///< τ > 0, with a finite inverse
  positives_mean mean = positives_mean::outside;  ///< "out" and "in" of the paper
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the anchors with a positive
  /// Where given, ∂value/∂τ goes there if gradients are asked for.
  double* d_temperature = nullptr;
  /// One τ per anchor, instead of the one above, and where ∂value/∂τ_i of each go.
  vector_view<const double> temperatures{};
  vector_view<double> d_temperatures{};
};

/// A filter for MoCo: queries are compared with a matrix of their own keys, which come first, and
/// then a queue; the keys of other queries are left out.
struct own_key_only {
  index keys;
  template <class T> void operator()(index query, T* relation, index n) const {
    for (index j = 0; j < std::min(keys, n); ++j)
      relation[j] = j == query ? T(1) : T(0);
  }
};

namespace core {

/// u = log Σ_n e^{S_n} − log Σ_p e^{S_p} is all that the rivals matter: nothing cancels where the
/// positives are sure of themselves.
struct sup_con_formula : anchor_formula {
  double temperature;
  bool inside = false;
  vector_view<const double> temperatures{}; ///< of each anchor, where given

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const double rate = 1 / (temperatures.data ? temperatures[row.anchor] : temperature);
    const chosen_scores<T> own(row, belonging{});
    if (own.count == 0)
      return {0, false};
    const chosen_images<T> positive(row, belonging{}, rate), negative(row, rivalling{}, rate);
    const double count = static_cast<double>(own.count);
    const scalar_odds odds(negative.log() - positive.log());
    anchor_outcome out;
    // log Σ_p e^{S_p} less the mean of S_p: 0 for a single one.
    const double spread = own.count == 1 ? 0 : positive.log() - rate * own.sum / count;
    out.value = odds.surprise + (inside ? std::log(count) : spread);
    if constexpr (Gradient) {
      const V of_negative = negative.factor(odds.miss * rate);
      const V of_positive = positive.factor((inside ? -odds.miss : odds.hit) * rate);
      const V even(static_cast<T>(inside ? 0 : rate / count));
      const V single(static_cast<T>(-odds.miss * rate));
      const double along = put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            const V pulled = own.count == 1 ? single : positive.images(x) * of_positive - even;
            return select(relation > V(0), pulled, negative.images(x) * of_negative);
          });
      out.extra[0] = -rate * along; // ∂/∂τ of S/τ
    }
    return out;
  }
};

} // namespace core

/// The supervised contrastive loss: an anchor i among its candidates A(i), some of which, P(i),
/// belong to it, S = ⟨x̂_i, ŷ_j⟩/τ,
///
///   outside   ℓ_i = log Σ_{a∈A} e^{S_ia} − (1/|P|) Σ_{p∈P} S_ip
///             ∂ℓ_i/∂S_ij = softmax_A(j) − [j ∈ P]/|P|
///   inside    ℓ_i = log Σ_{a∈A} e^{S_ia} − log Σ_{p∈P} e^{S_ip} + log |P|
///             ∂ℓ_i/∂S_ij = softmax_A(j) − [j ∈ P] softmax_P(j)
///
/// and the mean over anchors that have a positive (the reference code counts the others too, with a
/// loss of 0). With one positive each these are one loss, and
///
///   loss.pairs(x, y, d_x, d_y)   is InfoNCE
///   loss.views(v, 2, d_v)        NT-Xent
///   loss.pairs(q, keys_then_queue, d_q, {.filter = own_key_only{keys}})   MoCo
///
/// MoCo's keys are best written where the queue will have them, before its rest: nothing is copied.
/// (perdita::similarity makes both, too, and both directions of CLIP: in less memory, but a third
/// slower where gradients are asked for). `temperatures` gives each anchor its own τ. See
/// anchor_loss for calls, shapes, special values and errors. All embeddings equal: log(|A|) each.
/// Throws where a τ is not above 0.
///
/// Source: Khosla et al., "Supervised contrastive learning", 2020 (equations 2 and 3, without their
/// factor τ/τ_base, which is 1 by default); van den Oord, Li, Vinyals 2018; Chen et al. 2020.
template <class T> class sup_con : public anchor_loss<sup_con<T>, T> {
public:
  using options = sup_con_options;
  static constexpr const char* name = "sup_con";

  sup_con() : sup_con(options{}) {}
  explicit sup_con(const options& o) : options_(o) {
    core::invertible<T>(name, "temperature", o.temperature);
    core::require_enumerator(name, "mean", o.mean, positives_mean::inside, "outside or inside");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::sup_con_formula formula() const {
    return {
        {}, options_.temperature, options_.mean == positives_mean::inside, options_.temperatures};
  }
  void set_extra(core::anchor_job<T>& job) const {
    const auto& o = options_;
    const auto per_anchor = [&](const char* what, const auto& v) {
      if (v.data || v.size > 0)
        core::require(v.data && v.size == job.x.rows, name, what, v.size, "one number per anchor");
    };
    per_anchor("temperatures", o.temperatures);
    per_anchor("d_temperatures", o.d_temperatures);
    for (index i = 0; i < o.temperatures.size; ++i)
      if (!core::is_invertible<T>(o.temperatures[i]))
        core::fail_at(name, "temperatures", i, core::to_text(o.temperatures[i]),
                      "a finite number above 0 whose inverse is finite");
    job.extra[0] = o.d_temperature;
    job.each = o.d_temperatures;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
