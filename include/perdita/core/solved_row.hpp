// SPDX-License-Identifier: MIT
#pragma once

/// Losses that an algorithm over a whole row finds, label and all, and not a summary that parts of
/// the row could be merged from: formulas for resident_kernel.hpp whose solve(x, n, label, room)
/// returns a row_solution.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "row_formula.hpp"

namespace perdita::inline PERDITA_ABI::core {

struct solved_row {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 2 + coefficients;
};
using row_solution = summary<solved_row, double>;

/// What solve() returns.
inline row_solution solution(double value, double target_gradient, double c0 = 0, double c1 = 0,
                             double c2 = 0) {
  return {0, {value, target_gradient, c0, c1, c2}};
}
/// The row is NaN, and slopes() make NaN of these coefficients.
inline row_solution no_solution() {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  return solution(nan, nan, nan, nan, nan);
}

struct solved_formula : row_formula {
  using statistic = solved_row;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool linear = false;

  template <class Row> auto finish(const Row& row) const {
    row_outcome<std::remove_cvref_t<decltype(row.target)>> out;
    out.value = row.term[0];
    out.target_gradient = row.term[1];
    for (int k = 0; k < coefficients; ++k)
      out.coefficient[k] = row.term[2 + k];
    return out;
  }
};

/// f(numbers, index of the first) over n numbers, a pack at a time; the last is filled up with
/// `filler`. A lambda should be always_inline: packs that go through memory take longer than most
/// of what is done with them.
template <class T, class F> PERDITA_INLINE void for_packs(const T* x, index n, T filler, F f) {
  constexpr auto width = static_cast<index>(lanes<T>);
  index i = 0;
  for (; i + width <= n; i += width)
    f(pack<T>::load(x + i), i);
  if (i < n)
    f(load_first(x + i, n - i, pack<T>(filler)), i);
}

/// A label against its rivals, from u = log Σ_{j≠y} e^{z_j} − z_y: see target_odds.
struct scalar_odds {
  double miss, hit;                ///< 1 − p and p of the label
  double surprise, rival_surprise; ///< −log p and −log(1 − p)

  explicit scalar_odds(double u) {
    const double e = std::exp(-std::fabs(u)), smaller = e / (1 + e), larger = 1 / (1 + e);
    miss = u > 0 ? larger : smaller;
    hit = u > 0 ? smaller : larger;
    const double least = std::log1p(e);
    surprise = least + std::fmax(u, 0);
    rival_surprise = least + std::fmax(-u, 0);
  }
};

/// Sums of what packs add up to, in double but for a few packs at a time: a conversion at every
/// pack takes longer than what an exponential does.
template <class T, int N> class lane_sums {
  static constexpr int at_once = sizeof(T) == sizeof(double) ? 1 : 16;

public:
  pack<T> some[N];

  lane_sums() {
    for (int k = 0; k < N; ++k) {
      some[k] = pack<T>(0);
      sums_[k].clear();
    }
  }
  PERDITA_INLINE void count_pack() {
    if (--left_ == 0)
      flush();
  }
  PERDITA_INLINE double total(int k) {
    flush();
    return sums_[k].total();
  }

private:
  PERDITA_INLINE void flush() {
    for (int k = 0; k < N; ++k) {
      sums_[k].add(some[k]);
      some[k] = pack<T>(0);
    }
    left_ = at_once;
  }
  wide_lanes<T> sums_[N];
  int left_ = at_once;
};

/// What counts of less than 2^24 in each lane come to.
template <class T> index total_count(const pack<T>& counts) {
  wide_lanes<T> sum;
  sum.clear();
  sum.add(counts);
  return static_cast<index>(sum.total());
}

/// The scores of a row's rivals, as packs: -inf at the label and beyond the end.
template <class T> class rival_scores {
  using V = pack<T>;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr T nothing = -std::numeric_limits<T>::infinity();

public:
  T top;        ///< the largest
  double label; ///< x_y − top; x_y where every rival is masked
  bool spoilt;  ///< NaN among them, or the label
  bool lost;    ///< that, or a rival of +inf

  rival_scores(const T* x, index n, index y) : x_(x), n_(n), own_at_(y / width * width) {
    if (n % width != 0) {
      last_at_ = n / width * width;
      load_first(x + last_at_, n - last_at_, V(nothing)).store(last_);
    }
    V::load(own_at_ == last_at_ ? last_ : x + own_at_).store(own_);
    own_[y % width] = nothing;
    V most(nothing), nans(0);
    each([&](const V& z, index) __attribute__((always_inline)) {
      most = max(z, most);
      nans = select(is_nan(z), z, nans);
    });
    top = max_lanes(most);
    label = static_cast<double>(x[y]) - (top == nothing ? 0 : static_cast<double>(top));
    spoilt = any(is_nan(nans)) || x[y] != x[y];
    lost = spoilt || top == std::numeric_limits<T>::infinity();
  }
  bool all_masked() const { return top == nothing; }

  /// f(pack of scores, index of the first)
  template <class F> PERDITA_INLINE void each(F f) const {
    for (index i = 0; i < n_; i += width)
      f(V::load(at(i)), i);
  }
  /// Σ e^{θ (x − near)} of the rivals up to `near`, on which some are.
  double sum_of_images(T near, double theta) const {
    const V shift(near), rate(static_cast<T>(theta));
    lane_sums<T, 1> sum;
    each([&](const V& z, index) __attribute__((always_inline)) {
      const V d = z - shift;
      sum.some[0] += exp_shifted(select(d > V(0), V(nothing), d) * rate);
      sum.count_pack();
    });
    return sum.total(0);
  }
  /// Writes the `most` largest that are not masked, largest first; returns how many there are.
  /// `out` has room for n numbers and a pack.
  index largest(index most, double* out) const {
    if (most == 1) {
      out[0] = static_cast<double>(top);
      return all_masked() ? 0 : 1;
    }
    const index count = gather(edge_for(most, out), out), wanted = std::min(most, count);
    if (wanted < count)
      std::nth_element(out, out + wanted, out + count, std::greater<>());
    std::sort(out, out + wanted, std::greater<>());
    return wanted;
  }
  struct numbers {
    index above, equal;
  };
  /// How many are above a number, and how many are equal to it.
  numbers around(T number) const {
    const V edge(number), one(1), zero(0);
    V above(0), equal(0);
    each([&](const V& z, index) __attribute__((always_inline)) {
      above += select(z > edge, one, zero);
      equal += select(z == edge, one, zero);
    });
    return {total_count(above), total_count(equal)};
  }
  /// All that are not below a number, as they come.
  index gather(T edge, double* out) const {
    index count = 0;
    each([&](const V& z, index) __attribute__((always_inline)) {
      if (!any(z >= V(edge)))
        return;
      alignas(64) T some[lanes<T>];
      z.store(some);
      for (const T s : some) {
        out[count] = static_cast<double>(s);
        count += s >= edge ? 1 : 0;
      }
    });
    return count;
  }

private:
  const T* at(index i) const { return i == own_at_ ? own_ : i == last_at_ ? last_ : x_ + i; }

  /// A number that at least `most` rivals reach, and few more: of the largest in each of some
  /// parts of the row, the one in that place.
  T edge_for(index most, double* room) const {
    constexpr T least = std::numeric_limits<T>::lowest();
    const index length = n_ / width / (4 * most / width + 1); // of a part, in packs
    if (length < 2)
      return least;
    index parts = 0, left = length;
    V seen(nothing);
    each([&](const V& z, index) __attribute__((always_inline)) {
      seen = max(z, seen);
      if (--left > 0)
        return;
      alignas(64) T some[lanes<T>];
      seen.store(some);
      std::copy_n(some, width, room + parts);
      parts += width;
      seen = V(nothing);
      left = length;
    });
    std::nth_element(room, room + most - 1, room + parts, std::greater<>());
    return std::fmax(static_cast<T>(room[most - 1]), least);
  }

  const T* x_;
  index n_, own_at_, last_at_ = -1;
  alignas(64) T own_[lanes<T>], last_[lanes<T>];
};

/// The scores of a row's rivals as their distances from the largest of them, in double; -inf at the
/// label.
struct rivals_of_row {
  double top = -std::numeric_limits<double>::infinity(); ///< the largest rival
  double label = 0;                                      ///< x_y − top
  bool lost = false;                                     ///< NaN or a rival of +inf

  rivals_of_row(const double* x, index n, index y, double* distances) {
    const rival_scores<double> rivals(x, n, y);
    top = rivals.top;
    label = rivals.label;
    lost = rivals.lost;
    const double from = rivals.all_masked() ? 0 : top;
    for (index k = 0; k < n; ++k)
      distances[k] = x[k] - from;
    distances[y] = -std::numeric_limits<double>::infinity();
  }
};

/// Σ e^{θd} of distances d ≤ 0.
inline double sum_of_images(const double* d, index n, double theta) {
  using W = pack<double>;
  W sum(0);
  for_packs(
      d, n, -std::numeric_limits<double>::infinity(),
      [&](const W& at, index) __attribute__((always_inline)) { sum += exp(at * W(theta)); });
  return sum_lanes(sum);
}

} // namespace perdita::inline PERDITA_ABI::core
