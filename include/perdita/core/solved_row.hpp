// SPDX-License-Identifier: MIT
#pragma once

/// Losses that an algorithm over a whole row finds, label and all, and not a summary that parts of
/// the row could be merged from: formulas for resident_kernel.hpp whose solve(x, n, label, room)
/// returns a row_solution.

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>

#include "row_formula.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <int Coefficients> struct solved_row_of {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 2 + Coefficients;
};
using solved_row = solved_row_of<coefficients>;
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
    constexpr int count = static_cast<int>(std::size(decltype(row.term){})) - 2;
    row_outcome<std::remove_cvref_t<decltype(row.target)>, count> out;
    out.value = row.term[0];
    out.target_gradient = row.term[1];
    for (int k = 0; k < count; ++k)
      out.coefficient[k] = row.term[2 + k];
    return out;
  }
};

/// Sums of numbers times this are finite.
inline constexpr double downscale = 0x1p-64;
/// (x − label + margin) times `downscale`, for where that, or a sum of such, has overflowed.
template <class W, class T> W small_gap(const W& x, const W& label, T margin) {
  return (x * downscale - label * downscale) + W(static_cast<double>(margin) * downscale);
}

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

/// What the first sweep over a row can find beside its maximum: rival_scores calls start(near) and
/// then absorbs every pack and the index of its first score, from the start again if it turns out
/// that the maximum is further than `slack` above `near`, which is never above it.

/// e^{θ (x − near)} in whole packs, and their sum.
template <class T> struct image_sweep {
  double slack;
  pack<T> rate, shift;
  T* images;
  lane_sums<T, 1> sum;

  image_sweep(double theta, T* to)
      : slack(16 / theta), rate(static_cast<T>(theta)), shift(0), images(to) {}
  void start(T near) { shift = pack<T>(near); }
  PERDITA_INLINE void operator()(const pack<T>& z, index i) {
    const pack<T> image = exp((z - shift) * rate);
    image.store(images + i);
    sum.some[0] += image;
    sum.count_pack();
  }
};

/// f(number, how often) for the largest numbers in some packs, largest first, until they are `most`
/// or only -inf is left. They are taken out. Without a branch that depends on the numbers: for a
/// few, a fraction of the time that sorting takes.
template <class T, class F> void take_largest(pack<T>* some, index packs, index most, F f) {
  using V = pack<T>;
  const V nothing(-std::numeric_limits<T>::infinity());
  for (index left = most; left > 0;) {
    V top = nothing, equal(0);
    for (index p = 0; p < packs; ++p)
      top = max(some[p], top);
    const T number = max_lanes(top);
    if (number == first_lane(nothing))
      return;
    for (index p = 0; p < packs; ++p) {
      const auto here = some[p] == V(number);
      equal += select(here, V(1), V(0));
      some[p] = select(here, nothing, some[p]);
    }
    const index times = total_count(equal);
    f(number, times);
    left -= times;
  }
}
/// How many of the largest numbers are taken like this, and from how many packs.
inline constexpr index few_numbers = 16, few_packs = 32;

/// The maxima of some parts of a row: there are rivals from the k-th largest of them on, and few
/// more than k.
template <class T> class part_maxima {
  using V = pack<T>;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr T nothing = -std::numeric_limits<T>::infinity();

public:
  static constexpr double slack = std::numeric_limits<double>::infinity();

  /// `room` is for n numbers and a pack.
  part_maxima(index n, index k, double* room)
      : k_(k), length_(n / width / (4 * k / width + 1)), left_(length_), seen_(nothing),
        most_(static_cast<T*>(static_cast<void*>(room))) {}
  void start(T) {}
  PERDITA_INLINE void operator()(const V& z, index) {
    seen_ = max(z, seen_);
    if (--left_ == 0)
      flush();
  }
  T edge() const {
    T result = std::numeric_limits<T>::lowest();
    if (parts_ < k_)
      return result;
    if (k_ <= few_numbers && parts_ <= few_packs * width) {
      V some[few_packs];
      for (index p = 0; p < parts_; p += width)
        some[p / width] = V::load(most_ + p);
      index found = 0;
      T last = result;
      take_largest(some, parts_ / width, k_, [&](T number, index times) {
        last = number;
        found += times;
      });
      return found < k_ ? result : last; // masked parts have no maximum
    }
    std::nth_element(most_, most_ + k_ - 1, most_ + parts_, std::greater<>());
    return std::fmax(most_[k_ - 1], result);
  }

private:
  PERDITA_INLINE void flush() {
    seen_.store(most_ + parts_);
    parts_ += width;
    seen_ = V(nothing);
    left_ = length_;
  }
  index k_, length_, left_, parts_ = 0;
  V seen_;
  T* most_;
};

/// The scores of a row's rivals, as packs: -inf at the label and beyond the end.
template <class T> class rival_scores {
  using V = pack<T>;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr T nothing = -std::numeric_limits<T>::infinity();

public:
  T top;        ///< the largest
  T near;       ///< what the distances that are absorbed are to
  double label; ///< x_y − top; x_y where every rival is masked
  bool spoilt;  ///< NaN among them, or the label
  bool lost;    ///< that, or a rival of +inf

  rival_scores(const T* x, index n, index y) : rival_scores(x, n, y, nothing_more_) {}

  /// With what else a sweep absorbs.
  template <class Absorb>
  rival_scores(const T* x, index n, index y, Absorb& absorb)
      : x_(x), n_(n), own_at_(y / width * width) {
    constexpr bool absorbs = !std::is_same_v<Absorb, const nothing_more>;
    if (n % width != 0) {
      last_at_ = n / width * width;
      load_first(x + last_at_, n - last_at_, V(nothing)).store(last_);
    }
    V::load(own_at_ == last_at_ ? last_ : x + own_at_).store(own_);
    own_[y % width] = nothing;
    V most(nothing), nans(0);
    auto sums = absorb; // a copy, for registers
    if constexpr (absorbs) {
      for (index i = 0; i < std::min(n_, 8 * width); i += width)
        most = max(V::load(at(i)), most);
      near = max_lanes(most);
      sums.start(near);
    }
    each([&](const V& z, index i) __attribute__((always_inline)) {
      prefetch(x + i + prefetch_distance<T>);
      most = max(z, most);
      nans = select(is_nan(z), z, nans);
      sums(z, i);
    });
    top = max_lanes(most);
    if constexpr (!absorbs)
      near = top;
    label = static_cast<double>(x[y]) - (top == nothing ? 0 : static_cast<double>(top));
    spoilt = any(is_nan(nans)) || x[y] != x[y];
    lost = spoilt || top == std::numeric_limits<T>::infinity();
    if constexpr (absorbs) {
      if (!lost && !all_masked() &&
          !(static_cast<double>(top) - static_cast<double>(near) <= absorb.slack)) {
        near = top;
        sums = absorb;
        sums.start(near);
        each([&](const V& z, index i) __attribute__((always_inline)) { sums(z, i); });
      }
      absorb = sums;
    }
  }
  bool all_masked() const { return top == nothing; }

  /// f(pack of scores, index of the first)
  template <class F> PERDITA_INLINE void each(F f) const {
    for (index i = 0; i < n_;) {
      const index first = i, end = i < own_at_                   ? own_at_
                                   : i < whole() && i != own_at_ ? whole()
                                                                 : i + width;
      for (const T* const from = at(first); i < end; i += width)
        f(V::load(from + (i - first)), i);
    }
  }
  /// Σ e^{θ (x − edge)} of the rivals up to `edge`, on which some are.
  double sum_of_images(T edge, double theta) const {
    const V shift(edge), rate(static_cast<T>(theta));
    lane_sums<T, 1> sum;
    each([&](const V& z, index) __attribute__((always_inline)) {
      const V d = z - shift;
      sum.some[0] += exp_shifted(select(d > V(0), V(nothing), d) * rate);
      sum.count_pack();
    });
    return sum.total(0);
  }
  struct selection {
    index chosen;   ///< how many there are
    index gathered; ///< how many with what else is as large as the last of them, at least
  };
  /// Writes the `most` largest that are not masked, largest first, and after them what else was
  /// gathered. `out` has room for n numbers and a pack, and may be that of `parts`.
  selection largest(index most, const part_maxima<T>& parts, double* out) const {
    const T edge = parts.edge();
    if (most <= few_numbers) {
      V some[few_packs];
      index packs = 0, count = 0;
      each([&](const V& z, index) __attribute__((always_inline)) {
        const auto above = z >= V(edge);
        if (any(above)) {
          some[packs % few_packs] = select(above, z, V(nothing));
          ++packs;
        }
      });
      if (packs <= few_packs) {
        take_largest(some, packs, most, [&](T number, index times) {
          std::fill_n(out + count, times, static_cast<double>(number));
          count += times;
        });
        return {std::min(most, count), count};
      }
    }
    const index count = gather(edge, out), wanted = std::min(most, count);
    if (wanted < count)
      std::nth_element(out, out + wanted, out + count, std::greater<>());
    std::sort(out, out + wanted, std::greater<>());
    return {wanted, count};
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
  struct nothing_more {
    PERDITA_INLINE void operator()(const V&, index) const {}
  };
  index whole() const { return n_ / width * width; }
  const T* at(index i) const { return i == own_at_ ? own_ : i == last_at_ ? last_ : x_ + i; }

  static constexpr nothing_more nothing_more_{};
  const T* x_;
  index n_, own_at_, last_at_ = -1;
  alignas(64) T own_[lanes<T>], last_[lanes<T>];
};

/// rival_scores of short rows, a row in each lane and a class in each pack: `scores` become -inf at
/// the labels. Only the first finish_rows lanes are of interest.
template <class T> struct short_rivals {
  using V = pack<T>;
  using W = pack<double>;
  V own, top; ///< the score of the label, and the largest of the rivals
  V spoilt;   ///< NaN where one of them is, else 0
  V* scores;
  index n;

  short_rivals(V* x, index columns, const V& label) : own(0), scores(x), n(columns) {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    top = V(nothing);
    spoilt = V(0);
    for (index j = 0; j < n; ++j) {
      const auto here = label == V(static_cast<T>(j));
      own = select(here, x[j], own);
      spoilt = select(is_nan(x[j]), x[j], spoilt);
      x[j] = select(here, V(nothing), x[j]);
      top = max(x[j], top);
    }
  }
  W score(index j) const { return first_rows(scores[j]); }
};

/// The k largest of n packs lane by lane, largest first; -inf where there are fewer.
template <class V> void largest_by_lane(const V* x, index n, index k, V* order) {
  std::fill_n(order, k, V(-std::numeric_limits<typename V::value_type>::infinity()));
  for (index j = 0; j < n; ++j) {
    V left = x[j];
    for (index i = 0; i < k; ++i) {
      const V more = max(left, order[i]);
      left = min(left, order[i]);
      order[i] = more;
    }
  }
}

/// The rows' solution where `lost` is not NaN.
template <int Terms>
summary<solved_row_of<Terms - 2>, pack<double>> solutions(const pack<double>& lost,
                                                          const pack<double> (&terms)[Terms]) {
  summary<solved_row_of<Terms - 2>, pack<double>> s;
  s.shift = pack<double>(0);
  for (int k = 0; k < Terms; ++k)
    s.term[k] = select(is_nan(lost), lost, terms[k]);
  return s;
}

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
