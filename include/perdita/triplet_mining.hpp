// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

/// What triplets compare: D, D², or 1 − cos, which is D²/2 of unit vectors.
enum class triplet_measure { distance, squared_distance, cosine_distance };
/// Of those that belong to an anchor.
enum class triplet_positives { all, farthest, nearest };
/// Of the others, for each positive, by the gap g = u_n − u_p:
enum class triplet_negatives {
  all,
  hard,      ///< all with g ≤ 0
  semi_hard, ///< all with 0 < g ≤ margin
  easy,      ///< all with g > margin
  nearest,   ///< the one of the least g
  next       ///< the one of the least g above 0; without one, the farthest
};
enum class triplet_penalty { hinge, softplus };
/// Means divide by the number of triplets that were chosen, or of those whose term is above 0.
enum class triplet_mean { triplets, nonzero };

struct triplet_mining_options {
  double margin = 0.2;                                  ///< m, finite; of the measure
  triplet_measure measure = triplet_measure::distance;  ///< u
  triplet_positives positives = triplet_positives::all; ///< p, of each anchor
  triplet_negatives negatives = triplet_negatives::all; ///< n, for each positive
  triplet_penalty penalty = triplet_penalty::hinge;     ///< of m + u_p − u_n
  triplet_mean mean = triplet_mean::nonzero;
  bool swap = false;     ///< u_n is the smaller of those from the anchor and from the positive
  bool normalise = true; ///< distances of unit vectors
  perdita::reduction reduction = reduction::mean;
};

namespace core {

struct triplet_formula : anchor_formula {
  static constexpr bool distances = true;
  static constexpr bool wants_room = true; // for slopes, while the distances are still needed

  static constexpr index notes = row_of_notes; // what negatives are to every positive
  bool takes_notes() const { return o.swap; }

  triplet_mining_options o;
  bool mutual;      ///< a swapped distance is of the positive's row
  double low, high; ///< low < g ≤ high is mined

  explicit triplet_formula(const triplet_mining_options& options)
      : o(options), mutual(o.swap), low(-std::numeric_limits<double>::infinity()), high(-low) {
    if (o.negatives == triplet_negatives::hard)
      high = 0;
    else if (o.negatives == triplet_negatives::semi_hard)
      low = 0, high = o.margin;
    else if (o.negatives == triplet_negatives::easy)
      low = o.margin;
  }

  template <class T> void note(const anchor_row<T>& row, double* to) const {
    measure(row);
    std::copy_n(row.scores, row.size, to);
  }

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    if (spoilt<Gradient>(row))
      return spoilt_outcome(most_triplets(row));
    measure(row);
    if constexpr (Gradient)
      std::fill_n(row.room, row.size, T(0));
    anchor_outcome out;
    out.terms = 0;
    const chosen_scores<T> others(row, rivalling{}), own(row, belonging{});
    if (others.count > 0 && own.count > 0) {
      const auto add = [&](index p) {
        if (o.swap)
          add_swapped<Gradient>(row, p, out);
        else if (single())
          add_single<Gradient>(row, p, others, out);
        else if (o.penalty == triplet_penalty::softplus)
          add_all<Gradient, true>(row, p, out);
        else
          add_all<Gradient, false>(row, p, out);
      };
      if (o.positives == triplet_positives::all) {
        for (index p = 0; p < row.size; ++p)
          if (row.relation[p] > 0)
            add(p);
      } else {
        const bool far = o.positives == triplet_positives::farthest;
        add(first_with(row, belonging{}, far ? own.most : own.least));
      }
    }
    out.counts = out.terms > 0;
    if constexpr (Gradient)
      write_slopes(row);
    return out;
  }

private:
  bool single() const {
    return o.negatives == triplet_negatives::nearest || o.negatives == triplet_negatives::next;
  }
  /// How many may be chosen, where no distance says which.
  template <class T> double most_triplets(const anchor_row<T>& row) const {
    const double own = count_of(row, belonging{}), others = count_of(row, rivalling{});
    const bool all = o.positives == triplet_positives::all;
    return (all ? own : std::min(own, 1.0)) * (single() ? std::min(others, 1.0) : others);
  }
  template <class T> void measure(const anchor_row<T>& row) const {
    using V = pack<T>;
    if (o.measure == triplet_measure::distance)
      take_roots(row);
    else if (o.measure == triplet_measure::cosine_distance)
      for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>))
        (V::load(row.scores + j) * V(T(0.5))).store(row.scores + j);
  }
  template <class T> void write_slopes(const anchor_row<T>& row) const {
    using V = pack<T>;
    const V half(o.measure == triplet_measure::cosine_distance ? T(0.5) : T(1));
    for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
      const V slope = V::load(row.room + j);
      const V by = o.measure == triplet_measure::distance
                       ? slope_of_square(slope, V::load(row.scores + j))
                       : slope * half;
      by.store(row.scores + j);
    }
  }

  /// One positive with all negatives in a range.
  template <bool Gradient, bool Soft, class T>
  void add_all(const anchor_row<T>& row, index p, anchor_outcome& out) const {
    using V = pack<T>;
    const V own(row.scores[p]), margin(static_cast<T>(o.margin));
    const V least(static_cast<T>(low)), most(static_cast<T>(high));
    lane_sums<T, 3> sum;
    for_chosen(
        row,
        rivalling{}, [&](const V& u, const auto& rivals, index j) __attribute__((always_inline)) {
          const V gap = u - own, miss = margin - gap;
          const auto mined = rivals & (gap > least) & (gap <= most);
          V value = max(miss, V(0));
          if constexpr (Soft)
            value = softplus(miss);
          value = select(mined, value, V(0));
          sum.some[0] += value;
          sum.some[1] += o.mean == triplet_mean::nonzero ? select(value > V(0), V(1), V(0))
                                                         : select(mined, V(1), V(0));
          if constexpr (Gradient) {
            V slope = select(value > V(0), V(1), V(0));
            if constexpr (Soft)
              slope = select(mined, sigmoid(miss), V(0));
            sum.some[2] += slope;
            (V::load(row.room + j) - slope).store(row.room + j);
          }
          sum.count_pack();
        });
    out.value += sum.total(0);
    out.terms += sum.total(1);
    if constexpr (Gradient)
      row.room[p] += static_cast<T>(sum.total(2));
  }

  /// One positive with all negatives in a range, by the lesser of the negative's two distances. Of
  /// each pair of rows that belong together there are two triplets with a negative, whose terms are
  /// the same: the slopes are those of this row's distances in both.
  template <bool Gradient, class T>
  void add_swapped(const anchor_row<T>& row, index p, anchor_outcome& out) const {
    const double* theirs = row.note + p * row.size;
    const auto own = static_cast<double>(row.scores[p]);
    double pull = 0;
    for (index n = 0; n < row.size; ++n) {
      const auto mine = static_cast<double>(row.scores[n]);
      const double gap = std::fmin(mine, theirs[n]) - own;
      if (!(row.relation[n] < 0 && gap > low && gap <= high))
        continue;
      double value = std::fmax(o.margin - gap, 0), slope = value > 0 ? 1 : 0;
      if (o.penalty == triplet_penalty::softplus) {
        const scalar_odds odds(o.margin - gap);
        value = odds.surprise;
        slope = odds.miss;
      }
      out.value += value;
      out.terms += o.mean == triplet_mean::triplets || value > 0 ? 1 : 0;
      if constexpr (Gradient) {
        pull += slope;
        const double as_anchor = mine <= theirs[n] ? row.share[row.anchor] : 0,
                     as_positive = mine < theirs[n] ? row.share[p] : 0;
        row.room[n] -= static_cast<T>(slope * (as_anchor + as_positive));
      }
    }
    if constexpr (Gradient)
      row.room[p] += static_cast<T>(pull * row.share[row.anchor]);
  }

  /// One positive with one negative.
  template <bool Gradient, class T>
  void add_single(const anchor_row<T>& row, index p, const chosen_scores<T>& others,
                  anchor_outcome& out) const {
    T theirs = others.least;
    if (o.negatives == triplet_negatives::next) {
      theirs = least_above(row, row.scores[p]);
      if (theirs == std::numeric_limits<T>::infinity())
        theirs = others.most;
    }
    const double miss =
        (static_cast<double>(row.scores[p]) - static_cast<double>(theirs)) + o.margin;
    double value = std::fmax(miss, 0), slope = miss > 0 ? 1 : 0;
    if (o.penalty == triplet_penalty::softplus) {
      const scalar_odds odds(miss);
      value = odds.surprise;
      slope = odds.miss;
    }
    out.value += value;
    out.terms += o.mean == triplet_mean::triplets || value > 0 ? 1 : 0;
    if constexpr (Gradient) {
      row.room[p] += static_cast<T>(slope);
      row.room[first_with(row, rivalling{}, theirs)] -= static_cast<T>(slope);
    }
  }
  template <class T> static T least_above(const anchor_row<T>& row, T least) {
    using V = pack<T>;
    constexpr T nothing = std::numeric_limits<T>::infinity();
    V found(nothing);
    for_chosen(
        row,
        rivalling{}, [&](const V& u, const auto& rivals, index) __attribute__((always_inline)) {
          found = min(select(rivals & (u > V(least)), u, V(nothing)), found);
        });
    return -max_lanes(-found);
  }
};

} // namespace core

/// Triplet losses with the triplets of a batch: an anchor a, candidates p that belong to it and n
/// that do not, u their distances, squared distances, or 1 − cos,
///
///   ℓ = [m + u_p − u_n]₊ or log(1 + e^{m + u_p − u_n}),   ∂ℓ/∂u_p = h = −∂ℓ/∂u_n,
///
/// h = 1 where the hinge is above 0 (0 at the kink), or 1/(1 + e^{−(m + u_p − u_n)}); the choice of
/// triplets is a constant. The mean is over all triplets chosen, or those above 0 (it jumps where
/// one reaches 0), each by its anchor's weight:
///
///   {}                                       batch all; m of pytorch-metric-learning is 0.05
///   {.positives = farthest, .negatives = nearest, .mean = triplets}              batch hard
///   {.margin = 0, …, .penalty = softplus}                                        soft margin
///   {.negatives = semi_hard}                 all negatives beyond p, but within the margin
///   {.margin = 1, .measure = squared_distance, .negatives = next, .mean = triplets}
///                                            FaceNet's semi-hard, as TensorFlow Addons
///   {.positives = nearest, .negatives = next or nearest, …}                      easy positives
///
/// An anchor without positives or negatives has no triplets and does not count; no triplets at all,
/// or none above 0: 0. Ties: the first. The slope of D is 0 at D = 0, so that duplicates are not
/// told apart; see pair_margin for small distances. 1 − cos of a zero vector and another is ½ here,
/// and 0 of two.
///
/// With `swap`, u_n is the lesser of those of (a, n) and (p, n) (of equal ones, the anchor's), in
/// the term as well as in the choice. It wants all positives, negatives by a range of gaps, and
/// embeddings that are compared with themselves, without a filter: what belongs to what, and the
/// distances, must be the same from both sides. It keeps the distances of all pairs, 8 bytes each.
///
/// Time: one pass over the candidates for each positive; no triplet is ever stored. See anchor_loss
/// for calls, shapes, special values and errors; cosine_distance wants `normalise`.
///
/// Source: Schroff, Kalenichenko, Philbin, "FaceNet", 2015; Hermans, Beyer, Leibe, "In defense of
/// the triplet loss for person re-identification", 2017; Balntas, Riba, Ponsa, Mikolajczyk,
/// "Learning local feature descriptors with triplets and shallow convolutional neural networks",
/// BMVC 2016 (the swap); Xuan, Stylianou, Pless, "Improved
/// embeddings with easy positive triplet mining", 2020.
template <class T> class triplet_mining : public anchor_loss<triplet_mining<T>, T> {
public:
  using options = triplet_mining_options;
  static constexpr const char* name = "triplet_mining";

  triplet_mining() : triplet_mining(options{}) {}
  explicit triplet_mining(const options& o) : options_(o) {
    core::finite(name, "margin", o.margin);
    const auto named = [](const char* option, auto x, auto last) {
      core::require_enumerator(name, option, x, last, "one of those that are named");
    };
    named("measure", o.measure, triplet_measure::cosine_distance);
    named("positives", o.positives, triplet_positives::nearest);
    named("negatives", o.negatives, triplet_negatives::next);
    named("penalty", o.penalty, triplet_penalty::softplus);
    named("mean", o.mean, triplet_mean::nonzero);
    core::require(o.normalise || o.measure != triplet_measure::cosine_distance, name, "normalise",
                  0, "true for cosines");
    const bool ranges =
        o.negatives != triplet_negatives::nearest && o.negatives != triplet_negatives::next;
    core::require(!o.swap || (o.positives == triplet_positives::all && ranges), name, "swap", 1,
                  "false but for all positives, and negatives by a range of gaps");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  void set_extra(core::anchor_job<T>& job) const {
    core::require(!options_.swap || (job.alone && !job.filter), name, "swap", 1,
                  "false but for embeddings compared with themselves, without a filter");
  }
  core::triplet_formula formula() const { return core::triplet_formula(options_); }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
