// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// A term for each pair that belongs together, or for each anchor.
enum class lifted_terms { pairs, anchors };

struct lifted_structure_options {
  double margin = 1; ///< m, finite
  lifted_terms terms = lifted_terms::pairs;
  bool normalise = true; ///< distances of unit vectors
  perdita::reduction reduction = reduction::mean;
};

namespace core {

struct lifted_formula : anchor_formula {
  static constexpr bool distances = true;
  static constexpr index notes = 1;    ///< log Σ_n e^{m − D_an}
  static constexpr bool mutual = true; // a pair's term holds the negatives of both ends
  double margin;
  bool by_pairs;

  lifted_formula(double m, bool pairs) : margin(m), by_pairs(pairs) {}
  bool takes_notes() const { return by_pairs; }

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    take_roots(row);
    *to = margin + chosen_images<T>(row, rivalling{}, -1).log();
  }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    if (spoilt<Gradient>(row))
      return spoilt_outcome(by_pairs ? count_of(row, belonging{}) : 1);
    take_roots(row);
    return by_pairs ? pairs<Gradient>(row) : anchors<Gradient>(row);
  }

private:
  /// Σ_p ½J_ap². The negatives of a are part of J_ap and of J_pa, so that their slopes know the
  /// shares of both; D_ap is compared a second time by p.
  template <bool Gradient, class T> anchor_outcome pairs(const anchor_row<T>& row) const {
    using V = pack<T>;
    constexpr double nothing = -std::numeric_limits<double>::infinity();
    const chosen_images<T> negative(row, rivalling{}, -1);
    const double mine = margin + negative.log();
    double pushed = 0;
    anchor_outcome out;
    out.terms = 0;
    for (index p = 0; p < row.size; ++p) {
      if (!(row.relation[p] > 0))
        continue;
      ++out.terms;
      const auto distance = static_cast<double>(row.scores[p]);
      const double theirs = row.alone ? row.note[p] : nothing;
      const double top = mine > theirs ? mine : theirs;
      const scalar_odds odds(top == nothing ? 0 : theirs - mine);
      const double level = top + std::min(odds.surprise, odds.rival_surprise) + distance;
      const double hinge = level <= 0 ? 0 : level;
      out.value += 0.5 * hinge * hinge;
      if constexpr (Gradient) {
        const double own = row.share[row.anchor];
        const double both = row.alone ? own + row.share[p] : own;
        row.scores[p] =
            own != 0 && distance != 0 ? static_cast<T>(own * hinge / (2 * distance)) : T(0);
        pushed += both != 0 ? both * hinge * odds.hit : 0;
      }
    }
    out.counts = out.terms > 0;
    if constexpr (Gradient) {
      const V factor = negative.factor(-pushed);
      for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
        const V d = V::load(row.scores + j);
        const V slope = slope_of_square(negative.images(d) * factor, d);
        select(V::load(row.relation + j) < V(0), slope, d).store(row.scores + j);
      }
    }
    return out;
  }

  template <bool Gradient, class T> anchor_outcome anchors(const anchor_row<T>& row) const {
    using V = pack<T>;
    const chosen_images<T> positive(row, belonging{}, 1), negative(row, rivalling{}, -1);
    const double level = positive.log() + (margin + negative.log());
    const double hinge = level <= 0 ? 0 : level;
    if constexpr (Gradient) {
      const double share = level > 0 ? row.share[row.anchor] : 0;
      const V pull = positive.factor(share), push = negative.factor(-share);
      for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
        const V d = V::load(row.scores + j);
        const V slope = select(V::load(row.relation + j) > V(0), positive.images(d) * pull,
                               negative.images(d) * push);
        slope_of_square(slope, d).store(row.scores + j);
      }
    }
    return {hinge, !std::isinf(level)};
  }
};

} // namespace core

/// Lifted structure: at distances D of unit vectors, with N_i the candidates that do not belong to
/// i, and pairs (i, j) that do,
///
///   pairs     J_ij = log(Σ_{k∈N_i} e^{m − D_ik} + Σ_{l∈N_j} e^{m − D_jl}) + D_ij,
///             (1/2|P|) Σ_{pairs, i<j} [J_ij]₊²
///             ∂/∂D_ij = [J_ij]₊/|P|,  ∂/∂D_ik = −Σ_j ([J_ij]₊/|P|) e^{m − D_ik}/Σ
///   anchors   ℓ_i = [log Σ_{p∈P_i} e^{D_ip} + log Σ_{k∈N_i} e^{m − D_ik}]₊, the mean over anchors
///             with a positive and a negative
///
/// Of pairs, anchor i has the value ½ Σ_j [J_ij]₊², which is divided by the number of its j: a pair
/// is two terms, with the weights of i and of j. A filter must say the same of i and j as of j and
/// i. A pair whose ends have no negatives has the term 0. Where anchors are compared with other
/// candidates, those have no negatives of their own: then J_ij is of N_i alone. Of pairs, every
/// anchor is looked at twice.
///
/// At J = 0 and at D = 0 the gradient is 0; see pair_margin for small distances, and anchor_loss
/// for calls, shapes, special values and errors.
///
/// Source: Oh Song, Xiang, Jegelka, Savarese, "Deep metric learning via lifted structured feature
/// embedding", 2016; Hermans, Beyer, Leibe, "In defense of the triplet loss for person
/// re-identification", 2017 (by anchors).
template <class T> class lifted_structure : public anchor_loss<lifted_structure<T>, T> {
public:
  using options = lifted_structure_options;
  static constexpr const char* name = "lifted_structure";

  lifted_structure() : lifted_structure(options{}) {}
  explicit lifted_structure(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    core::require_enumerator(name, "terms", o.terms, lifted_terms::anchors, "pairs or anchors");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::lifted_formula formula() const {
    return {options_.margin, options_.terms == lifted_terms::pairs};
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
