// SPDX-License-Identifier: MIT
#pragma once

#include "row_job.hpp"
#include "weighted.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// What a formula declares, with what most of them declare. A formula is the whole mathematics of
/// a row loss, for values V of one class in each lane and W of one row in each lane:
///
///   statistic                   the summary that finish() needs
///   score(x)                    from the caller's numbers to the statistic's z; keeps -inf
///   finish(row)                 row_summary → row_outcome
///   slope(z, share, side, c)    ∂value/∂score, with share = image_scale e^{z - shift} and the
///                               outcome's coefficients c
///   scored(x)                   where there is one: z and how steep it is, ∂z/∂x up to a factor
///                               that all classes share. slope() gets that instead of z, or 1 where
///                               images_are_steep(): then they are multiplied by it at once
///   own(r)                      where there is one: a number of row r, which finish(row) and
///                               report(row) get as row.own
struct row_formula {
  static constexpr bool excludes_target = true; ///< the sums are over the rivals of the target
  static constexpr bool proportional = true;    ///< slope is share: nothing else is needed
  static constexpr bool linear = true;          ///< slope is linear in share and side together,
                                                ///< the side being 1 where there is none
  static constexpr bool uses_share = true;      ///< slope() reads its second argument
  static constexpr bool keeps_scores = false;   ///< z takes long: it is kept, as images are, for
                                                ///< slope(). Of a statistic without images
  static constexpr bool has_side = false;       ///< side(first) gives a number per class
  static constexpr bool slope_reads_score() { return false; } ///< slope() reads z
  double label_weight(index) const { return 1; }
  template <class V> PERDITA_INLINE V score(const V& x) const { return x; }
};

/// A score, and what a formula that has scored() says of how steep it is.
template <class V> struct scored_number { V z, steepness; };
template <class Formula, class V>
concept has_steepness = requires(const Formula& f, const V& x) {
  f.scored(x);
};

template <class Formula, class V>
PERDITA_INLINE scored_number<V> scored(const Formula& formula, const V& x) {
  if constexpr (has_steepness<Formula, V>)
    return formula.scored(x);
  else
    return {formula.score(x), V(1)};
}
/// What is kept of an image for the gradient.
template <class Formula, class V>
PERDITA_INLINE V kept_image(const Formula& formula, const V& image, const V& steepness) {
  if constexpr (has_steepness<Formula, V>)
    if (formula.images_are_steep())
      return image * steepness;
  return image;
}

template <class Row> struct own_summary : Row { pack<double> own; };

/// The summary of rows row_of(i), i < n, with their own numbers where the formula has such.
template <class Formula, class Row, class RowOf>
PERDITA_INLINE auto with_own(const Formula& formula, const Row& row, index n, const RowOf& row_of) {
  if constexpr (requires { formula.own(index{}); }) {
    alignas(64) double own[finish_rows] = {};
    for (index i = 0; i < n; ++i)
      own[i] = formula.own(row_of(i));
    own_summary<Row> result;
    static_cast<Row&>(result) = row;
    result.own = pack<double>::load(own);
    return result;
  } else {
    return row;
  }
}

/// A target among its rivals, from Σ e^{z_j − shift} over the rivals j ≠ y: with the log-odds
/// against the target u = log Σ_{j≠y} e^{z_j} − z_y,
///
///   −log p_y = softplus(u),  1 − p_y = σ(u),  ∂u/∂z_j = e^{z_j} / Σ_{k≠y} e^{z_k},  ∂u/∂z_y = −1,
///
/// so that a confident row keeps its digits: nothing is subtracted from 1. What is asked of it is
/// rounded to T in the end, and only as exact as that needs.
template <class T, class W> class target_odds {
  static constexpr double far = 650; // e^650 and its product with any sum are finite

public:
  W surprise;  // −log p of the target; +inf where it is masked
  W miss, hit; // 1 − p and p of the target; 1 and 0 where it is masked
  W per_rival; // (1 − p) / Σ of the rivals' images, where some rival is above -inf

  template <class Row>
  PERDITA_INLINE explicit target_odds(const Row& row)
      : target_odds(row.term[0], row.shift, row.target) {}
  PERDITA_INLINE target_odds(const W& images, const W& shift, const W& target)
      : images_(images), shift_(shift), target_(target), lead_(shift - target) {
    const W reach = min(W(far), lead_);
    e_ = exp_to<T>(reach);
    if constexpr (std::is_same_v<T, double>) {
      // What the lead's rounding lost; NaN where it is infinite. Scores in float lose nothing that
      // shows.
      const W back = lead_ - shift_;
      const W lost = (shift_ - (lead_ - back)) - (target_ + back);
      e_ = select(abs(lead_) < W(1e3), fma(e_, lost, e_), e_);
    }
    // Rivals to target; not 0 where both are masked.
    const W odds = max(W(0x1p-600), images_) * e_;
    const auto [log_both, inverse] = log1p_and_inverse_to<T>(odds);
    surprise = log_both + max(W(0), lead_ - W(far));
    miss = odds * inverse;
    hit = select(lead_ > W(far), odds - odds, inverse); // 0, but NaN where a rival is
    per_rival = e_ * inverse;
  }
  /// log Σ e^z − shift, where some rival is above -inf.
  PERDITA_NOINLINE W above() const {
    const W one(1), behind = log1p_and_inverse_to<T>((images_ - one) + one / e_).log;
    return select(lead_ > W(0), behind, surprise - lead_);
  }
  /// -inf where all is masked.
  PERDITA_NOINLINE W log_sum_exp() const {
    const W nothing(-std::numeric_limits<double>::infinity());
    const auto masked = target_ == nothing;
    const W lse = select(masked, shift_ + above(), target_ + surprise);
    return select(masked & (images_ == W(0)), nothing, lse);
  }

private:
  W images_, shift_, target_, lead_, e_; // e^lead
};

template <class Row>
target_odds(const Row&)
    -> target_odds<double, std::remove_cvref_t<decltype(std::declval<Row>().target)>>;

/// The log-odds against the target; +inf for a masked target, also where its rivals are masked.
template <class Row> auto log_odds_against(const Row& row) {
  using W = std::remove_cvref_t<decltype(row.target)>;
  const W inf(std::numeric_limits<double>::infinity());
  return select(row.target == -inf, inf + row.term[0], (row.shift - row.target) + log(row.term[0]));
}

/// numerator / Σ of the rivals' images; 0 where every rival is masked.
template <class Row, class W> PERDITA_INLINE W per_rival(const W& numerator, const Row& row) {
  return select(row.term[0] == W(0), W(0), numerator / row.term[0]);
}

/// The by-products of a softmax. Compiled once, whatever is summed up besides.
template <class W> PERDITA_NOINLINE row_report<W> softmax_report(const target_odds<double, W>& o) {
  return {o.log_sum_exp(), -o.surprise, W(0), W(0)};
}
template <class W>
PERDITA_NOINLINE target_odds<double, W> reported_odds(const W& images, const W& shift,
                                                      const W& target) {
  return {images, shift, target};
}
template <class Row> auto softmax_report(const Row& row) {
  return softmax_report(reported_odds(row.term[0], row.shift, row.target));
}

/// ∂value/∂score of z, from its share. Where slopes are linear the row's scale is in the share
/// already, so that a plain row has the same bits however it is served.
template <class Formula, class V>
PERDITA_INLINE V slope_at(const Formula& formula, const V& z, const V& share, const V& side,
                          const V& scale, const V* c) {
  if constexpr (Formula::proportional)
    return share;
  else if constexpr (Formula::linear)
    return formula.slope(z, share, Formula::has_side ? side * scale : scale, c);
  else
    return formula.slope(z, share, side, c) * scale;
}
/// The same from an image that was kept.
template <class Formula, class V>
PERDITA_INLINE V slope_of_image(const Formula& formula, const V& image, const V& factor,
                                const V& cut, const V& side, const V& scale, const V* c) {
  if constexpr (Formula::keeps_scores) {
    return slope_at(formula, image, V(0), side, scale, c);
  } else {
    const V no_score(has_steepness<Formula, V> ? 1 : 0);
    return slope_at(formula, no_score, multiply_unless_less(image, cut, factor), side, scale, c);
  }
}
/// The same from a raw score x: `factor` takes the image of its z to the share, and what is below
/// `cut` to 0.
template <class Formula, class V>
PERDITA_INLINE V slope_of(const Formula& formula, const V& x, const V& shift, const V& factor,
                          const V& cut, const V& side, const V& scale, const V* c) {
  const auto [z, steepness] = scored(formula, x);
  V share(0);
  if constexpr (Formula::statistic::has_image && (Formula::uses_share || Formula::proportional)) {
    const V image = kept_image(formula, exp_shifted(z - shift), steepness);
    share = multiply_unless_less(image, cut, factor);
  }
  if constexpr (has_steepness<Formula, V>)
    return slope_at(formula, formula.images_are_steep() ? V(1) : steepness, share, side, scale, c);
  else
    return slope_at(formula, z, share, side, scale, c);
}

} // namespace perdita::inline PERDITA_ABI::core
