// SPDX-License-Identifier: MIT
#pragma once

/// Mergeable summaries of a row of scores.
///
/// A statistic is a handful of sums over z - s, with a shift s that keeps them in range. It says
///
///   look, choose    how a first look at a chunk of scores picks the shift for that chunk;
///   absorb          how one batch of scores enters the sums; returns the score's image (e^{z-s});
///   rebase          what the sums become when the shift moves by delta = old - new;
///   common          the shift at which two summaries are added;
///   absent_score    where there is one: what a formula's score() takes to absent().
///
/// Because rebase makes any two summaries addable, the same statistic serves lanes, chunks,
/// threads, tiles of a linear head and shards of a vocabulary. `absent` is a score that leaves
/// every sum as it was. V is a pack of the compute type, W a pack of double.

#include <algorithm>
#include <limits>

#include "math.hpp"
#include "simd.hpp"
#include "views.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// The sums of one row (or one lane, or one shard) and the shift they refer to.
template <class Statistic, class W> struct summary {
  W shift;
  W term[Statistic::terms];
};

/// The summary of both parts.
template <class Statistic, class W>
summary<Statistic, W> merge(summary<Statistic, W> a, summary<Statistic, W> b) {
  const W shift = Statistic::common(a, b);
  Statistic::rebase(a.term, a.shift - shift);
  Statistic::rebase(b.term, b.shift - shift);
  for (int k = 0; k < Statistic::terms; ++k)
    a.term[k] = a.term[k] + b.term[k];
  a.shift = shift;
  return a;
}

/// The largest of some numbers and where it was: the first of equals. NaN is passed over; where
/// nothing is above -inf, at is 0.
template <class T> struct maximum {
  T value = -std::numeric_limits<T>::infinity();
  index at = 0;
};
/// a's numbers come before b's.
template <class T> maximum<T> merge(const maximum<T>& a, const maximum<T>& b) {
  return b.value > a.value ? b : a;
}
/// Of n numbers side by side, the first of which has number `first`.
template <class T> maximum<T> find_maximum(const T* x, index n, index first = 0) {
  using V = pack<T>;
  constexpr auto width = static_cast<index>(lanes<T>);
  constexpr index chains = 4; // none of which waits for another
  const V nothing(maximum<T>{}.value);
  V seen[chains] = {nothing, nothing, nothing, nothing};
  index j = 0;
  for (; j + chains * width <= n; j += chains * width)
    for (index k = 0; k < chains; ++k)
      seen[k] = max(V::load(x + j + k * width), seen[k]);
  for (; j < n; j += width)
    seen[0] = max(j + width <= n ? V::load(x + j) : load_first(x + j, n - j, nothing), seen[0]);
  const T most = max_lanes(max(max(seen[0], seen[1]), max(seen[2], seen[3])));
  if (!(most > maximum<T>{}.value))
    return {};
  for (j = 0; j + width <= n && !any(V::load(x + j) == V(most));)
    j += width;
  return {most, first + (std::find(x + j, x + n, most) - x)};
}

/// Σ e^{z-s}. The shift starts as the maximum of the first few scores and follows the maximum from
/// a distance: it moves only when a score is more than `slack` above it, so that most rows never
/// rescale anything.
struct log_sum_exp {
  static constexpr int terms = 1;
  static constexpr bool has_image = true;
  static constexpr bool look_is_maximum = true;
  static constexpr bool counts = false; // term 0 is not the number of scores

  template <class V> static PERDITA_INLINE V look_at_nothing() {
    return V(-std::numeric_limits<typename V::value_type>::infinity());
  }
  template <class V> static PERDITA_INLINE V look(const V& seen, const V& z) {
    return max(z, seen);
  }
  /// A row whose scores are all -inf so far keeps a finite shift: -inf - -inf would be NaN.
  template <class V> static PERDITA_INLINE V first_shift() {
    return V(std::numeric_limits<typename V::value_type>::lowest());
  }
  template <class V> static PERDITA_INLINE V choose(const V& seen, const V& shift, index) {
    constexpr int slack = 16;
    return select(seen > shift + slack, seen, shift);
  }
  template <class V> static PERDITA_INLINE V absent(const V&) { return look_at_nothing<V>(); }
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V&) {
    const V image = exp_shifted(z - shift);
    sum[0] += image;
    return image;
  }
  template <class W> static void rebase(W* t, const W& delta) { t[0] = t[0] * exp(delta); }
  template <class S> static auto common(const S& a, const S& b) { return max(a.shift, b.shift); }
};

/// Log-sum-exp with side sums, b being a number per class (and row):
/// Σ e^{z-s}, Σ b (z-s), Σ b, Σ e^{z-s} (z-s).
struct log_sum_exp_and_moments : log_sum_exp {
  static constexpr int terms = 4;

  template <class V>
  static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V& b) {
    const V d = z - shift;
    const V image = exp_shifted(d);
    const V zero(0);
    sum[0] += image;
    sum[1] = fma(b, select(b == zero, zero, d), sum[1]); // 0 * -inf is 0
    sum[2] += b;
    sum[3] = fma(image, select(image == zero, zero, d), sum[3]);
    return image;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    const W shrink = exp(delta);
    t[1] = fma(t[2], delta, t[1]);
    t[3] = fma(t[0], delta, t[3]) * shrink;
    t[0] = t[0] * shrink;
  }
};

/// Log-sum-exp with the sum of the scores and their number, both without those that are -inf:
/// Σ e^{z-s}, Σ (z-s), n.
struct log_sum_exp_and_total : log_sum_exp {
  static constexpr int terms = 3;

  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V&) {
    const V d = z - shift;
    const V image = exp_shifted(d);
    const V masked = look_at_nothing<V>();
    sum[0] += image;
    sum[1] = add_unless_equal(z, masked, sum[1], d);
    sum[2] = add_unless_equal(z, masked, sum[2], V(1));
    return image;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    t[0] = t[0] * exp(delta);
    t[1] = fma(t[2], delta, t[1]);
  }
};

/// Log-sum-exp with one more sum: Σ e^{z-s}, Σ e^{z-s} b.
struct log_sum_exp_and_mean : log_sum_exp {
  static constexpr int terms = 2;

  template <class V>
  static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V& b) {
    const V image = exp_shifted(z - shift);
    sum[0] += image;
    sum[1] = fma(image, b, sum[1]);
    return image;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    const W shrink = exp(delta);
    t[0] = t[0] * shrink;
    t[1] = t[1] * shrink;
  }
};

/// Log-sum-exp with the sum of squares: Σ e^{z-s}, Σ e^{2(z-s)}.
struct log_sum_exp_and_squares : log_sum_exp {
  static constexpr int terms = 2;

  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V&) {
    const V image = exp_shifted(z - shift);
    sum[0] += image;
    sum[1] = fma(image, image, sum[1]);
    return image;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    const W shrink = exp(delta);
    t[0] = t[0] * shrink;
    t[1] = t[1] * shrink * shrink;
  }
};

/// Σ b z and Σ b, with no shift: for what is linear in a row.
struct weighted_sums {
  static constexpr int terms = 2;
  static constexpr bool has_image = false;
  static constexpr bool look_is_maximum = true;
  static constexpr bool counts = false;

  template <class V> static PERDITA_INLINE V look_at_nothing() { return V(0); }
  template <class V> static PERDITA_INLINE V look(const V& seen, const V&) { return seen; }
  template <class V> static PERDITA_INLINE V first_shift() { return V(0); }
  template <class V> static PERDITA_INLINE V choose(const V&, const V& shift, index) {
    return shift;
  }
  template <class V> static PERDITA_INLINE V absent(const V&) { return V(0); }
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V&, const V& b) {
    sum[0] = fma(b, z, sum[0]);
    sum[1] += b;
    return b;
  }
  template <class W> static void rebase(W*, const W&) {}
  template <class S> static auto common(const S& a, const S&) { return a.shift; }
};

/// Σ z, with no shift, of formulas that take a score of -inf to 0.
struct plain_sum : weighted_sums {
  static constexpr int terms = 1;

  template <class V> static PERDITA_INLINE V absent_score() {
    return log_sum_exp::look_at_nothing<V>();
  }
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V&, const V&) {
    sum[0] += z;
    return z;
  }
};

/// The largest score, which is the shift, and how many scores are as large: none where all are
/// -inf.
struct maximum_and_ties : log_sum_exp {
  static constexpr bool has_image = false;

  template <class V> static PERDITA_INLINE V choose(const V& seen, const V& shift, index) {
    return max(seen, shift);
  }
  /// What is neither the maximum nor below it is NaN, and has to show.
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V&) {
    const V one(1), zero(0);
    sum[0] += select(z == shift, one, select(z < shift, zero, z));
    return z;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    t[0] = select(delta < W(0), t[0] - t[0], t[0]); // 0, but of NaN
  }
};

/// Count, Σ z and Σ z² of the scores that are not -inf, with no shift.
struct power_sums : weighted_sums {
  static constexpr int terms = 3;

  template <class V> static PERDITA_INLINE V absent(const V&) {
    return log_sum_exp::look_at_nothing<V>();
  }
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V&, const V&) {
    const V zero(0);
    const auto masked = z == log_sum_exp::look_at_nothing<V>();
    const V x = select(masked, zero, z);
    sum[0] += select(masked, zero, V(1)); // what is absent is not counted
    sum[1] += x;
    sum[2] = fma(x, x, sum[2]);
    return z;
  }
};

/// Count, Σ (z-s), Σ (z-s)²: mean and variance without cancellation, because every chunk is
/// shifted by its own mean (Chan, Golub and LeVeque 1983 for the merge).
struct moments {
  static constexpr int terms = 3;
  static constexpr bool has_image = false;
  static constexpr bool look_is_maximum = false;
  static constexpr bool counts = true;

  template <class V> static PERDITA_INLINE V look_at_nothing() { return V(0); }
  template <class V> static PERDITA_INLINE V look(const V& seen, const V& z) { return seen + z; }
  template <class V> static PERDITA_INLINE V first_shift() { return V(0); }
  template <class V> static PERDITA_INLINE V choose(const V& seen, const V&, index n) {
    return seen / V(static_cast<typename V::value_type>(n));
  }
  template <class V> static PERDITA_INLINE V absent(const V& shift) { return shift; }
  template <class V> static PERDITA_INLINE V absorb(V* sum, const V& z, const V& shift, const V&) {
    const V d = z - shift;
    sum[0] += V(1);
    sum[1] += d;
    sum[2] = fma(d, d, sum[2]);
    return d;
  }
  template <class W> static void rebase(W* t, const W& delta) {
    t[2] = fma(delta, fma(t[0], delta, t[1] + t[1]), t[2]);
    t[1] = fma(t[0], delta, t[1]);
  }
  template <class S> static auto common(const S& a, const S&) { return a.shift; }
};

} // namespace perdita::inline PERDITA_ABI::core
