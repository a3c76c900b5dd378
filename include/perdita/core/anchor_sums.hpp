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
struct compared {
  template <class V> PERDITA_INLINE auto operator()(const V& relation) const {
    return !(relation == V(0));
  }
};

/// The same where relations between 0 and 1 say how much of a candidate belongs to the anchor: the
/// rest of it does not.
struct partly_belonging {
  template <class V> PERDITA_INLINE auto operator()(const V& relation) const {
    return relation > V(0);
  }
  template <class V> PERDITA_INLINE V weight(const V& relation) const {
    return max(relation, V(0));
  }
};
struct partly_rivalling {
  template <class V> PERDITA_INLINE auto operator()(const V& relation) const {
    return weight(relation) > V(0);
  }
  template <class V> PERDITA_INLINE V weight(const V& relation) const {
    return select(relation == V(0), V(0), min(V(1) - relation, V(1)));
  }
};

/// f(score, mask of those chosen, index of the first) for each pack of a row.
template <class T, class Chosen, class F>
PERDITA_INLINE void for_chosen(const anchor_row<T>& row, Chosen chosen, F f) {
  using V = pack<T>;
  for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>))
    f(V::load(row.scores + j), chosen(V::load(row.relation + j)), j);
}

template <class T, class Chosen> double count_of(const anchor_row<T>& row, Chosen chosen) {
  using V = pack<T>;
  lane_sums<T, 1> count;
  for_chosen(
      row, chosen, [&](const V&, const auto& mask, index) __attribute__((always_inline)) {
        count.some[0] += select(mask, V(1), V(0));
        count.count_pack();
      });
  return count.total(0);
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

/// A logit that is a multiple of the score.
template <class T> struct scaled {
  pack<T> rate;

  scaled(double r) : rate(static_cast<T>(r)) {}
  PERDITA_INLINE pack<T> operator()(const pack<T>& x) const { return x * rate; }
};

/// log Σ e^{logit(x)} over those chosen, by their weights if there are any, and their shares of
/// that sum.
template <class T, class Logit = scaled<T>> class chosen_images {
  using V = pack<T>;

public:
  template <class Chosen>
  chosen_images(const anchor_row<T>& row, Chosen chosen, const Logit& logit) : logit_(logit) {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    V most(nothing);
    for_chosen(
        row, chosen, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          most = max(select(mask, logit_(x), V(nothing)), most);
        });
    const T largest = max_lanes(most);
    top_ = largest == nothing ? T(0) : largest; // -inf − -inf would be NaN
    const V shift(top_);
    lane_sums<T, 1> sum;
    for_chosen(
        row, chosen,
        [&](const V& x, const auto& mask, [[maybe_unused]] index j) __attribute__((always_inline)) {
          V image = exp_shifted(logit_(x) - shift);
          if constexpr (requires { chosen.weight(x); })
            image = image * chosen.weight(V::load(row.relation + j));
          sum.some[0] += select(mask, image, V(0));
          sum.count_pack();
        });
    sum_ = sum.total(0);
  }
  /// -inf of none; NaN where one of them is.
  double log() const { return static_cast<double>(top_) + log_above(); }
  bool none() const { return sum_ == 0; }
  T top() const { return top_; }                      ///< the largest logit; 0 of none
  double log_above() const { return std::log(sum_); } ///< log() − top()
  /// A factor for images(): `share` divided by the sum.
  V factor(double share) const { return V(static_cast<T>(sum_ == 0 ? 0 : share / sum_)); }
  /// e^{logit(x) − top} of those chosen; anything of others.
  PERDITA_INLINE V images(const V& x) const { return exp_shifted(logit_(x) - V(top_)); }

private:
  Logit logit_;
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
/// The outcome of such a row, which counts in the mean's denominator as it would with numbers: the
/// other anchors' gradients are what they are without it.
inline anchor_outcome spoilt_outcome(double terms = 1) {
  anchor_outcome out{std::numeric_limits<double>::quiet_NaN()};
  out.terms = terms;
  return out;
}

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

/// Puts f(score, relation) in the place of each score, 0 where nothing is compared, and returns
/// Σ slope · score.
template <class T, class F> PERDITA_INLINE double put_slopes(const anchor_row<T>& row, F f) {
  using V = pack<T>;
  lane_sums<T, 1> along;
  for (index j = 0; j < row.size; j += static_cast<index>(lanes<T>)) {
    const V x = V::load(row.scores + j), relation = V::load(row.relation + j);
    const V slope = select(relation == V(0), V(0), f(x, relation));
    along.some[0] += select(slope == V(0), V(0), slope * x);
    along.count_pack();
    slope.store(row.scores + j);
  }
  return along.total(0);
}

/// Those chosen whose scores `out` picks get the score `to`, of which no sum of images takes notice
/// (∓inf): as if they were not there.
template <class T, class Chosen, class Out>
PERDITA_INLINE void drop(const anchor_row<T>& row, Chosen chosen, T to, Out out) {
  using V = pack<T>;
  for_chosen(
      row, chosen, [&](const V& x, const auto& mask, index j) __attribute__((always_inline)) {
        select(mask & out(x), V(to), x).store(row.scores + j);
      });
}

/// log Σ_i weight(i) e^{x_i}, x_i being notes[i · stride].
template <class Weight>
double weighted_log_sum(const double* notes, index n, index stride, Weight weight) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (index i = 0; i < n; ++i)
    if (weight(i) != 0 && notes[i * stride] > top)
      top = notes[i * stride];
  if (top == -std::numeric_limits<double>::infinity())
    top = 0;
  for (index i = 0; i < n; ++i)
    if (weight(i) != 0)
      sum += weight(i) * std::exp(notes[i * stride] - top);
  return top + std::log(sum);
}

} // namespace perdita::inline PERDITA_ABI::core
