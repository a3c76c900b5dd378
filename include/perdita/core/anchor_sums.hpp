// SPDX-License-Identifier: MIT
#pragma once

/// Sums over some of an anchor's comparisons, of which losses of anchors are made.

#include <algorithm>
#include <cmath>
#include <limits>

#include "anchor_kernel.hpp"
#include "math.hpp"
#include "solved_row.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// Which candidates of an anchor: masks from relations.
struct belonging {
  template <class V> PERDITA_INLINE auto operator()(const V& relation) const {
    return relation > V(0);
  }
};
struct rivalling {
  template <class V> PERDITA_INLINE auto operator()(const V& relation) const {
    return relation < V(0);
  }
};

/// f(score, mask of those chosen, index of the first) for each pack of a row.
template <class T, class Chosen, class F>
PERDITA_INLINE void for_chosen(const anchor_row<T>& row, Chosen chosen, F f) {
  using V = pack<T>;
  for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>))
    f(V::load(row.scores + j), chosen(V::load(row.relation + j)), j);
}

/// How many there are, the sum of their scores, and the extremes (∓inf of none; NaN is passed
/// over).
template <class T> struct chosen_scores {
  index count = 0;
  double sum = 0;
  T least = std::numeric_limits<T>::infinity(), most = -std::numeric_limits<T>::infinity();

  template <class Chosen> chosen_scores(const anchor_row<T>& row, Chosen chosen) {
    using V = pack<T>;
    lane_sums<T, 2> sums;
    V low(least), high(most);
    for_chosen(
        row, chosen, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          sums.some[0] += select(mask, V(1), V(0));
          sums.some[1] += select(mask, x, V(0));
          low = min(select(mask, x, V(std::numeric_limits<T>::infinity())), low);
          high = max(select(mask, x, V(-std::numeric_limits<T>::infinity())), high);
          sums.count_pack();
        });
    count = static_cast<index>(sums.total(0));
    sum = sums.total(1);
    least = -max_lanes(-low);
    most = max_lanes(high);
  }
};

/// log Σ e^{rate · x} over those chosen, and their shares of that sum.
template <class T> class chosen_images {
  using V = pack<T>;

public:
  template <class Chosen>
  chosen_images(const anchor_row<T>& row, Chosen chosen, double rate)
      : rate_(static_cast<T>(rate)) {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    V most(nothing);
    for_chosen(
        row, chosen, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          most = max(select(mask, x * rate_, V(nothing)), most);
        });
    top_ = max_lanes(most);
    const V shift(top_ == nothing ? T(0) : top_);
    lane_sums<T, 1> sum;
    for_chosen(
        row, chosen, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          sum.some[0] += select(mask, exp_shifted(x * rate_ - shift), V(0));
          sum.count_pack();
        });
    sum_ = sum.total(0);
  }
  /// -inf of none; NaN where one of them is.
  double log() const {
    if (sum_ != sum_)
      return sum_;
    return sum_ == 0 ? -std::numeric_limits<double>::infinity()
                     : static_cast<double>(top_) + std::log(sum_);
  }
  /// A factor for images(): `share` divided by the sum.
  V factor(double share) const { return V(static_cast<T>(sum_ == 0 ? 0 : share / sum_)); }
  /// e^{rate x − top} of those chosen; anything of others.
  PERDITA_INLINE V images(const V& x) const { return exp_shifted(x * rate_ - V(top_)); }

private:
  V rate_;
  T top_;
  double sum_;
};

/// Whether a comparison that counts is not a finite number. The slopes are NaN then.
template <bool Gradient, class T> bool spoilt(const anchor_row<T>& row) {
  using V = pack<T>;
  V wrong(0);
  for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
    const V x = V::load(row.scores + j);
    wrong += select(V::load(row.relation + j) == V(0), V(0), x - x);
  }
  if (!any(is_nan(wrong)))
    return false;
  if constexpr (Gradient)
    std::fill_n(row.scores, row.size, std::numeric_limits<T>::quiet_NaN());
  return true;
}
/// The outcome of such a row.
inline anchor_outcome spoilt_outcome() { return {std::numeric_limits<double>::quiet_NaN()}; }

/// Distances instead of their squares.
template <class T> void take_roots(const anchor_row<T>& row) {
  using V = pack<T>;
  for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>))
    sqrt(V::load(row.scores + j)).store(row.scores + j);
}
/// A slope by the square of a distance from that by the distance: 0 where the distance is.
template <class T> PERDITA_INLINE pack<T> slope_of_square(const pack<T>& slope, const pack<T>& d) {
  return select(d == pack<T>(0), pack<T>(0), slope / (d + d));
}

/// The first of those chosen whose score is this one.
template <class T, class Chosen>
index first_with(const anchor_row<T>& row, Chosen chosen, T score) {
  using V = pack<T>;
  constexpr auto width = static_cast<index>(lanes<T>);
  for (index j = 0; j < row.size; j += width) {
    const auto found = chosen(V::load(row.relation + j)) & (V::load(row.scores + j) == V(score));
    if (!any(found))
      continue;
    T hit[lanes<T>];
    select(found, V(1), V(0)).store(hit);
    return j + (std::find(hit, hit + width, T(1)) - hit);
  }
  return -1;
}

} // namespace perdita::inline PERDITA_ABI::core
