// SPDX-License-Identifier: MIT
#pragma once

/// Where the maps onto the simplex cut a row off, exactly and without sorting: one vectorised pass
/// for the maximum, one that gathers what is near enough to it to count, and an iteration on that.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "math.hpp"
#include "row_job.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// A row's largest score, and those of its parts: what looks for large scores passes most of the
/// row over.
template <class T> class row_maxima {
  using V = pack<T>;
  static constexpr index width = static_cast<index>(lanes<T>), streams = 4, most_parts = 256;

public:
  static constexpr index block = streams * width; ///< as many as largest() writes

  T top; ///< NaN where a score is NaN or +inf

  row_maxima(const T* scores, index count)
      : x_(scores), n_(count), whole_(count / block * block),
        length_(block * ((count + block * most_parts - 1) / (block * most_parts))) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
    for (index i = whole_; i < whole_ + block; i += width)
      (i < n_ ? load_first(x_ + i, std::min(n_ - i, width), V(-inf)) : V(-inf))
          .store(end_ + (i - whole_));
    V most(-inf), lost(0);
    for_parts([&](const T* x, index columns, index p) __attribute__((always_inline)) {
      V seen[streams] = {V(-inf), V(-inf), V(-inf), V(-inf)},
        nans[streams] = {V(0), V(0), V(0), V(0)};
      for (index i = 0; i < columns; i += block)
        for (index s = 0; s < streams; ++s) {
          prefetch(x + i + s * width + prefetch_distance<T>);
          const V z = V::load(x + i + s * width);
          seen[s] = max(z, seen[s]);
          nans[s] = select(z == z, nans[s], z);
        }
      const V of_part = max(max(seen[0], seen[1]), max(seen[2], seen[3]));
      of_part.store(of_parts_ + p * width);
      most = max(of_part, most);
      lost += (nans[0] + nans[1]) + (nans[2] + nans[3]);
    });
    top = max_lanes(most);
    if (top == inf || any(is_nan(lost)))
      top = nan;
  }
  index columns() const { return n_; }

  /// The largest scores of as many sets of columns.
  void largest(T* to) const {
    V seen[streams];
    for (V& s : seen)
      s = V(-std::numeric_limits<T>::infinity());
    for_parts([&](const T*, index, index p) {
      V& s = seen[p % streams];
      s = max(V::load(of_parts_ + p * width), s);
    });
    for (index s = 0; s < streams; ++s)
      seen[s].store(to + s * width);
  }
  /// Writes x_j − less for every score from `edge`, a number, on, in their order; returns how many
  /// there are. `to` has room for n numbers and a pack.
  index gather(T edge, T less, double* to) const {
    double* const start = to;
    const V least(edge);
    for_parts([&](const T* x, index columns, index p) __attribute__((always_inline)) {
      if (!any(V::load(of_parts_ + p * width) >= least))
        return;
      for (index i = 0; i < columns; i += block) {
        std::uint64_t here = 0;
        for (index s = 0; s < block; s += width)
          here |= static_cast<std::uint64_t>(lane_bits(V::load(x + i + s) >= least)) << s;
        double* out = to;
        to += std::popcount(here);
        // Four whether there are or not: what cannot be foretold takes longer.
        for (int k = 0; k < 4 || here != 0; ++k, here &= here - 1)
          *out++ =
              static_cast<double>(x[i + std::countr_zero(here) % 64]) - static_cast<double>(less);
      }
    });
    return to - start;
  }

private:
  /// f(scores, how many, which part); their number is a multiple of `block`, the last ones -inf.
  template <class F> PERDITA_INLINE void for_parts(F f) const {
    index p = 0;
    for (index i = 0; i < whole_; i += length_)
      f(x_ + i, std::min(length_, whole_ - i), p++);
    if (whole_ < n_)
      f(end_, block, p);
  }
  const T* x_;
  index n_, whole_, length_;
  alignas(64) T of_parts_[(most_parts + 1) * width];
  alignas(64) T end_[block];
};

/// Short rows less their largest scores, a row in each lane and a class in each pack.
template <class T> struct short_rows {
  using W = pack<double>;
  W top; ///< the largest scores; NaN where there is NaN or +inf, 0 where all is masked
  pack_mask<double> masked;
  index n;
  W z[most_short_columns];

  short_rows(pack<T>* x, index columns) : n(columns) {
    using V = pack<T>;
    const V nothing(-std::numeric_limits<T>::infinity());
    V most = nothing, spoilt(0);
    for (index j = 0; j < n; ++j) {
      most = max(x[j], most);
      spoilt = select(is_nan(x[j]), x[j], spoilt);
    }
    const W largest = first_rows(select(most == nothing, V(0), most));
    const W lost = (largest - largest) + first_rows(spoilt);
    masked = (first_rows(most) == W(-std::numeric_limits<double>::infinity())) & (lost == W(0));
    top = largest + lost;
    for (index j = 0; j < n; ++j)
      z[j] = first_rows(x[j]) - largest;
  }
  /// Of whole rows: what the kernel wants of them, and of those that are masked.
  template <class Statistic>
  summary<Statistic, W> finish(const W (&terms)[Statistic::terms],
                               const double (&of_masked)[Statistic::terms]) const {
    summary<Statistic, W> s;
    s.shift = top;
    for (int k = 0; k < Statistic::terms; ++k)
      s.term[k] = select(masked, W(of_masked[k]), select(is_nan(top), top, terms[k]));
    return s;
  }
};

/// A row's projection onto the simplex: the support S = {z > τ} with τ = (Σ_S z − 1)/|S|, as
/// |S|, Σ_S z, Σ_S z², of z = x − max x. Resident: S is only known once the whole row is, so the
/// core hands over a row that lies in cache, and a head that never holds one cannot serve it.
///
/// Only scores within 1 of the maximum can be in S; they are reduced by Michelot's exact iteration
/// (1986), which drops what lies below the threshold of the remainder until nothing does.
struct simplex_threshold {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 3;
  static constexpr int size = 0; ///< the term that is |S|

  /// `candidates` has room for n numbers and a pack.
  template <class T>
  static summary<simplex_threshold, double> solve(const T* x, index n, double* candidates) {
    const row_maxima<T> maxima(x, n);
    const T top = maxima.top;
    const auto maximum = static_cast<double>(top);
    if (top != top)
      return {maximum, {maximum, maximum, maximum}};
    if (top == -std::numeric_limits<T>::infinity())
      return {0, {0, 0, 0}};
    index count = maxima.gather(top - 1, top, candidates);
    for (;;) {
      double sum = 0;
      for (index j = 0; j < count; ++j)
        sum += candidates[j];
      const double threshold = (sum - 1) / static_cast<double>(count);
      index kept = 0;
      for (index j = 0; j < count; ++j) {
        const double z = candidates[j];
        candidates[kept] = z;
        kept += z > threshold;
      }
      if (kept == count) {
        double squares = 0;
        for (index j = 0; j < count; ++j)
          squares = std::fma(candidates[j], candidates[j], squares);
        return {maximum, {static_cast<double>(count), sum, squares}};
      }
      count = kept;
    }
  }
  /// Short rows: a row that is done only finds the same again.
  template <class T>
  static summary<simplex_threshold, pack<double>> solve_rows(pack<T>* x, index n) {
    using W = pack<double>;
    const short_rows<T> rows(x, n);
    const W zero(0), one(1);
    W threshold(-1), count(0), sum, squares, before;
    do {
      before = count;
      count = sum = squares = zero;
      for (index j = 0; j < n; ++j) {
        const auto inside = rows.z[j] > threshold;
        const W z = select(inside, rows.z[j], zero);
        sum += z;
        squares = fma(z, z, squares);
        count += select(inside, one, zero);
      }
      threshold = max((sum - one) / count, threshold); // never lower, by no rounding
    } while (any(!(count == before)));
    return rows.template finish<simplex_threshold>({count, sum, squares}, {0, 0, 0});
  }
};

/// The argmax p of ⟨p, x⟩ − (Σ p^α − 1)/(α(α−1)) over the simplex, which is
///
///   p_j = p₁ (1 − r_j)_+^β,   r_j = c (max x − x_j),   β = 1/(α−1),   c = p₁^{1−α}/β,
///
/// with the largest probability p₁ such that Σ p = 1. (τ = max x − 1/c is where the support ends.)
/// As c, p₁, 1 − p₁ without cancellation, the conjugate max_p ⟨p, x⟩ − … less max x, and |S|.
struct tsallis_threshold {
  static constexpr bool resident = true;
  static constexpr bool has_image = false;
  static constexpr int terms = 5;
  static constexpr int size = 4;
};

/// A trial value of p₁, and of what goes with it: of a row, or as packs of a row in each lane.
template <class W> struct tsallis_point {
  W at;        ///< what the iteration moves: 0 where p₁ is 1, and larger where it is less
  W rate;      ///< c
  W top, rest; ///< p₁ and 1 − p₁, neither of them the difference to the other
  W root;      ///< p₁^{α−1}
};
using tsallis_trial = tsallis_point<double>;

/// Sums over the rivals of the maximum at a trial: (1−r)_+^β, the same to β − 1 and to β + 1, and
/// how many are above 0.
template <class W> struct tsallis_sums { W powers, slopes, tails, size; };

/// B/E of Newton's step.
template <class W> W shape_of(const tsallis_sums<W>& rivals) {
  return (1 + rivals.powers) / (1 + rivals.slopes);
}

/// What mathematics of one row or of a row in each lane is written in.
inline double row_exp(double x) { return first_lane(exp(pack<double>(x))); }
inline double row_log(double x) { return first_lane(log(pack<double>(x))); }
inline double row_expm1(double x) { return first_lane(expm1(pack<double>(x))); }
inline double row_log1p(double x) { return first_lane(log1p(pack<double>(x))); }
inline double row_fma(double a, double b, double c) { return std::fma(a, b, c); }
inline double row_sqrt(double x) { return std::sqrt(x); }
inline double row_select(bool which, double a, double b) { return which ? a : b; }
inline double row_abs(double x) { return std::abs(x); }
inline bool row_any(bool which) { return which; }
inline pack<double> row_exp(const pack<double>& x) { return exp(x); }
inline pack<double> row_expm1(const pack<double>& x) { return expm1(x); }
inline pack<double> row_log1p(const pack<double>& x) { return log1p(x); }
PERDITA_INLINE pack<double> row_fma(const pack<double>& a, const pack<double>& b,
                                    const pack<double>& c) {
  return fma(a, b, c);
}
PERDITA_INLINE pack<double> row_sqrt(const pack<double>& x) { return sqrt(x); }
PERDITA_INLINE pack<double> row_select(const pack_mask<double>& which, const pack<double>& a,
                                       const pack<double>& b) {
  return select(which, a, b);
}
PERDITA_INLINE pack<double> row_abs(const pack<double>& x) { return abs(x); }
PERDITA_INLINE bool row_any(const pack_mask<double>& which) { return any(which); }

/// z → p from the maximum, c and p₁, in double: a power below 1 is steep near 0, and a large one
/// multiplies an error. Most scores are outside and cost a look.
template <class V, class Power, class C> auto wide_slopes(const Power& power, const C* c) {
  using W = pack<double>;
  return [
    power, edge = to_lanes<V>(c[0] - 1 / c[1]), shift = to_lanes<W>(c[0]), rate = to_lanes<W>(c[1]),
    top = to_lanes<W>(c[2])
  ](const V& z) __attribute__((always_inline)) {
    if (!any(!(z < edge))) // NaN is not outside
      return V(0);
    W wide[sizeof(double) / sizeof(typename V::value_type)], base;
    widen(z, wide);
    for (auto& w : wide) {
      W raised;
      power.raise(rate, w - shift, base, raised);
      w = top * raised;
    }
    return narrow(wide);
  };
}

/// The mathematics of one α for solve_tsallis(). With f = Σ p at a trial p₁, Newton's method is
/// applied to f^{α−1}, which is linear in p₁^{α−1} where all scores are alike and convex in it for
/// α ≤ 2: from p₁ = 1 on, nothing is ever overshot. A step is
///
///   p₁^{α−1} ← p₁^{α−1} (1 + (B/E)(f^{1−α} − 1)),   B = Σ (1−r)_+^β,   E = Σ (1−r)_+^{β−1}.
///
/// α = 1 + 2^{−K}, β = 2^K: squares and roots; the iteration moves 1 − p₁^{α−1}. For α = 3/2 a
/// support's equation is quadratic, and a step is to its root where it has one.
template <int K> struct tsallis_squares {
  static constexpr int beta = 1 << K;
  static constexpr double order = 1. / beta; ///< α − 1

  double unit = order; ///< c p₁^{α−1}: α − 1, or what the scores are divided by besides

  static constexpr double alpha() { return 1 + order; }

  /// No less than what the iteration arrives at: where n scores are equal, and some rounding.
  static double most(double n) {
    for (int k = 0; k < K; ++k)
      n = std::sqrt(n);
    return 1 - (1 - 0x1p-40) / n;
  }
  template <class W> tsallis_point<W> trial(const W& at, const W& root) const {
    W top = root, rest = at;
    for (int k = 0; k < K; ++k) {
      rest = rest * (1 + top);
      top = top * top;
    }
    return {at, unit / root, top, rest, root};
  }
  template <class W> tsallis_point<W> trial(const W& at) const { return trial(at, W(1 - at)); }
  template <class W>
  tsallis_point<W> step(const tsallis_point<W>& now, const W& excess,
                        const tsallis_sums<W>& rivals) const {
    W change; // of p₁^{α−1}, relative
    if constexpr (K == 1) {
      // Where nothing enters or leaves, Σ (base + change)² has to be 1/p₁.
      const W sum = 1 + rivals.slopes, over = excess / now.top;
      const W inside = row_fma(sum, sum, -(1 + rivals.size) * over);
      change = -over / (sum + row_sqrt(inside));
      if (row_any(inside < 0))
        change = row_select(inside < 0, newton(excess, rivals), change);
    } else {
      change = newton(excess, rivals);
    }
    // The smaller of the two is exact, and the other one its complement.
    const W root = row_fma(now.root, change, now.root), at = row_fma(-now.root, change, now.at);
    const auto small = root <= 0.5;
    return trial(row_select(small, W(1 - root), at), row_select(small, root, W(1 - at)));
  }
  /// (1 + y)_+ and its power β.
  template <class W> PERDITA_INLINE void raise(const W& rate, const W& z, W& base, W& power) const {
    power = base = max(W(0), fma(rate, z, W(1)));
    for (int k = 0; k < K; ++k)
      power = power * power;
  }
  /// The power β − 1.
  template <class W> PERDITA_INLINE W lower(const W& base, const W&) const {
    W result = base, square = base;
    for (int k = 1; k < K; ++k) {
      square = square * square;
      result = result * square;
    }
    return result;
  }
  template <class V, class C> auto slopes(const C* c) const {
    if constexpr (K > 1)
      return wide_slopes<V>(*this, c);
    else
      return [shift = to_lanes<V>(c[0]), rate = to_lanes<V>(c[1]),
              top = to_lanes<V>(c[2])](const V& z) {
        const V base = max(V(0), fma(rate, z - shift, V(1)));
        return top * (base * base);
      };
  }
  /// Scores below are outside.
  template <class T>
  requires(K > 1) static T edge(const double* c) { return static_cast<T>(c[0] - 1 / c[1]); }
  /// ∫_0^{1−p₁} t (1−t)^{α−2} dt
  template <class W> static W lead(const tsallis_point<W>& t) {
    W sum = W(1); // Σ_i (β − i) p₁^{(α−1) i}
    for (int i = 2; i <= beta; ++i)
      sum = row_fma(sum, t.root, W(i));
    return t.at * t.at * sum * (1 / alpha());
  }
  /// 1 − p₁^{α−1}
  template <class W> static W short_of_one(const tsallis_point<W>& t) { return t.at; }

private:
  template <class W> static W newton(const W& excess, const tsallis_sums<W>& rivals) {
    W norm = 1 + excess, over = W(1); // norm^β − 1 over norm − 1
    for (int k = 0; k < K; ++k) {
      norm = row_sqrt(norm);
      over = over * (1 + norm);
    }
    return -shape_of(rivals) * (excess / (norm * over));
  }
};
using tsallis_three_halves = tsallis_squares<1>;
using tsallis_five_quarters = tsallis_squares<2>;

/// Any α > 1, by exponentials and logarithms that keep their digits for α near 1, where p becomes
/// softmax, and for large α, where p₁^{α−1} may be too small for any number; moves −log p₁.
class tsallis_power {
public:
  /// No two α beyond 1e100 differ, and their products would be infinite.
  explicit tsallis_power(double alpha) : tsallis_power(alpha - 1, alpha - 1) {}
  /// By α − 1, for scores that are to be multiplied by unit/(α − 1).
  tsallis_power(double order, double unit)
      : order_(std::min(order, 1e100)), unit_(std::min(unit, 1e100)) {}
  double alpha() const { return order_ + 1; }
  double order() const { return order_; }
  double most(double n) const { return row_log1p(n - 1) * (1 + 0x1p-40); }
  template <class W> tsallis_point<W> trial(const W& at) const {
    constexpr double most = 1e300; // times a difference of 0 is 0
    const W rate = unit_ * row_exp(order_ * at);
    return {at, row_select(rate < most, rate, W(most)), row_exp(-at), -row_expm1(-at),
            row_exp(-order_ * at)};
  }
  template <class W>
  tsallis_point<W> step(const tsallis_point<W>& now, const W& excess,
                        const tsallis_sums<W>& rivals) const {
    const W shape = shape_of(rivals);
    const W y = -order_ * row_log1p(excess); // log(1 + shape (e^y − 1)) in several ways
    W change = row_log1p(shape * row_expm1(y));
    const auto far = y <= -1;
    if (row_any(far)) {
      const W least = row_log1p(-shape);
      const W very_far = row_select(y < least, least, y);
      change = row_select(
          far, row_select(y > -700, y + row_log1p((1 - shape) * row_expm1(-y)), very_far), change);
    }
    return trial(W(now.at - change / order_));
  }
  template <class W> PERDITA_INLINE void raise(const W& rate, const W& z, W& base, W& power) const {
    const W y = max(W(-1), rate * z);
    base = W(1) + y;
    power = exp(log1p(y) * W(1 / order_));
  }
  /// The power β − 1; 0 outside.
  template <class W> PERDITA_INLINE W lower(const W& base, const W& power) const {
    return select(base > W(0), power / base, W(0));
  }
  template <class V, class C> auto slopes(const C* c) const { return wide_slopes<V>(*this, c); }
  template <class T> static T edge(const double* c) { return static_cast<T>(c[0] - 1 / c[1]); }
  template <class W> W lead(const tsallis_point<W>& t) const {
    const double a = order_;
    const W m = t.rest;
    const auto far = (m > 0.5) | (a * m > 1);
    const W closed = -row_expm1(row_fma(W(-a), t.at, row_log1p(a * m))) / (a * (a + 1));
    if (!row_any(!far)) // = (1 − (1−m)^a (1 + a m)) / (a (a + 1))
      return closed;
    W term = m * m, sum = W(0);
    for (double k = 0; row_any((row_abs(term) > 0x1p-60 * sum) & !far); ++k) {
      sum = sum + term / (k + 2);
      term = term * ((k + 1 - a) / (k + 1) * m);
    }
    return row_select(far, closed, sum);
  }
  template <class W> W short_of_one(const tsallis_point<W>& t) const {
    return -row_expm1(-order_ * t.at);
  }

private:
  double order_, unit_; // α − 1, and c p₁^{α−1}
};

/// `z` are x_j − max x of n rivals, filled up with -inf to a whole number of packs.
template <class Power>
tsallis_sums<double> sum_rivals(const Power& power, const tsallis_trial& t, const double* z,
                                index n) {
  using W = pack<double>;
  constexpr index width = static_cast<index>(lanes<double>);
  const W rate(t.rate), zero(0), one(1);
  wide_lanes<double> powers, tails;
  powers.clear();
  tails.clear();
  W slopes(0), size(0);
  for (index j = 0; j < n; j += width) {
    W base, raised;
    power.raise(rate, W::load(z + j), base, raised);
    powers.add(raised);
    tails.add(raised * base);
    slopes += power.lower(base, raised);
    size += select(base > zero, one, zero);
  }
  return {powers.total(), sum_lanes(slopes), tails.total(), sum_lanes(size)};
}

/// Fills the last pack of n numbers up with -inf.
inline void fill_pack(double* z, index n) {
  for (; n % static_cast<index>(lanes<double>) != 0; ++n)
    z[n] = -std::numeric_limits<double>::infinity();
}
/// Drops what is outside the support at a trial.
inline index drop_outside(const tsallis_trial& t, double* z, index n) {
  index kept = 0;
  for (index j = 0; j < n; ++j) {
    z[kept] = z[j];
    kept += std::fma(t.rate, z[j], 1.0) > 0;
  }
  fill_pack(z, kept);
  return kept;
}

/// Where an iteration has come to.
struct tsallis_root {
  tsallis_trial at; ///< Σ p is 1 to rounding
  double low;       ///< a trial at which it is no less than 1, but for rounding
  double conjugate, size;
  index rivals; ///< of z, those that were not dropped
};

/// Steps from a trial with Σ p ≥ 1, and bisection where it leaves the bracket (it may for
/// α > 2) or takes its time, on the rivals z. Those that have left the support add 0; they are
/// dropped where they are many, as that takes longer than to sum them.
template <class Power>
tsallis_root find_root(const Power& power, tsallis_trial t, double* z, index count) {
  double low = t.at, high = power.most(static_cast<double>(count + 1));
  fill_pack(z, count);
  for (int round = 0;; ++round) {
    const tsallis_sums<double> s = sum_rivals(power, t, z, count);
    const double excess = std::fma(t.top, s.powers, -t.rest); // Σ p − 1
    if (excess > 0) { // p₁ is too large, and the support here as well
      low = t.at;
      if (4 * s.size < 3 * static_cast<double>(count))
        count = drop_outside(t, z, count);
    } else {
      high = t.at;
    }
    const bool settled = std::abs(excess) <= 0x1p-49 * t.rest;
    tsallis_trial next = power.step(t, excess, s);
    if (!settled && !(low < next.at && next.at < high && round < 40))
      next = power.trial(low + (high - low) / 2);
    if (settled || next.at == low || next.at == high) {
      const double conjugate = power.lead(t) + t.top * t.root * s.tails / power.alpha();
      return {t, settled ? t.at : low, conjugate, 1 + s.size, count};
    }
    t = next;
  }
}

/// The rivals of the maximum that may be in the support where c is `rate`; returns their number.
template <class T> index gather_rivals(const row_maxima<T>& maxima, double rate, double* rivals) {
  const double edge = static_cast<double>(maxima.top) - 1 / rate;
  const double below =
      std::max(edge - std::abs(edge) * 0x1p-52, double{std::numeric_limits<T>::lowest()});
  const index count = maxima.gather(static_cast<T>(below), maxima.top, rivals);
  double* const end = rivals + count;
  double* const itself = std::find(rivals, end, 0.0);
  *itself = end[-1];
  return count - 1;
}

/// A row whose largest score is a number. `room` is for n numbers and a pack, and holds the rivals
/// in the support in the end, among others. A long row begins with some of its largest scores
/// alone: their Σ p is less, so that what is outside the support that it gives is outside for good.
template <class Power, class T>
tsallis_root find_threshold(const Power& power, const row_maxima<T>& maxima, double* room) {
  constexpr index some = row_maxima<T>::block;
  tsallis_trial start = power.trial(0.0);
  if (maxima.columns() >= 16 * some) {
    alignas(64) T largest[some];
    maxima.largest(largest);
    const index count = gather_rivals(row_maxima<T>(largest, some), start.rate, room);
    // From a little short of there, for what rounding has done.
    start = power.trial(find_root(power, start, room, count).low * (1 - 0x1p-20));
  }
  return find_root(power, start, room, gather_rivals(maxima, start.rate, room));
}

/// A row by summarise(top, root), where it has a largest score that is a number.
template <class Power, class T, class Summarise>
summary<tsallis_threshold, double> solve_row(const Power& power, const T* x, index n, double* room,
                                             Summarise summarise) {
  const row_maxima<T> maxima(x, n);
  const auto maximum = static_cast<double>(maxima.top);
  if (maximum != maximum)
    return {maximum, {maximum, maximum, maximum, maximum, 0}};
  if (maximum == -std::numeric_limits<double>::infinity())
    return {0, {1, 0, 1, 0, 0}};
  return summarise(maximum, find_threshold(power, maxima, room));
}

template <class Power, class T>
summary<tsallis_threshold, double> solve_tsallis(const Power& power, const T* x, index n,
                                                 double* room) {
  const auto summarise = [](double top, const tsallis_root& r) {
    return summary<tsallis_threshold, double>{
        top, {r.at.rate, r.at.top, r.at.rest, r.conjugate, r.size}};
  };
  return solve_row(power, x, n, room, summarise);
}

/// find_root() for short rows, less their largest scores. Rows that are done stay where they are.
template <class T> struct tsallis_rows : short_rows<T> {
  using W = pack<double>;
  using short_rows<T>::n;
  using short_rows<T>::z;
  tsallis_point<W> at;
  W conjugate, size;

  template <class Power>
  tsallis_rows(const Power& power, pack<T>* x, index columns) : short_rows<T>(x, columns) {
    const W zero(0), one(1), nothing(-std::numeric_limits<double>::infinity());
    W missing(1); // one largest score is not among the rivals
    for (index j = 0; j < n; ++j) {
      const auto largest = (z[j] == zero) & (missing > zero);
      missing = select(largest, zero, missing);
      z[j] = select(largest, nothing, z[j]);
    }
    const auto solvable = !(this->masked | is_nan(this->top));
    W low(0), high(power.most(static_cast<double>(n))), open = select(solvable, one, zero);
    at = power.trial(zero);
    for (int round = 0;; ++round) {
      tsallis_sums<W> s{zero, zero, zero, zero};
      for (index j = 0; j < n; ++j) {
        W base, raised;
        power.raise(at.rate, z[j], base, raised);
        s.powers += raised;
        s.slopes += power.lower(base, raised);
        s.tails = fma(raised, base, s.tails);
        s.size += select(base > zero, one, zero);
      }
      const W excess = fma(at.top, s.powers, -at.rest);
      const auto settled = abs(excess) <= at.rest * 0x1p-49;
      open = select(settled, zero, open);
      if (any(open > zero)) {
        const auto larger = excess > zero;
        low = select(larger, at.at, low);
        high = select(larger, high, at.at);
        tsallis_point<W> next = power.step(at, excess, s);
        const auto serves = (low < next.at) & (next.at < high) & (W(round) < W(40));
        if (any(!serves & (open > zero)))
          replace(next, power.trial(W(low + (high - low) / 2)), !serves);
        open = select((next.at == low) | (next.at == high), zero, open);
        replace(at, next, open > zero);
      }
      if (!any(open > zero)) {
        conjugate = power.lead(at) + at.top * at.root * s.tails / power.alpha();
        size = one + s.size;
        return;
      }
    }
  }

private:
  static void replace(tsallis_point<W>& old, const tsallis_point<W>& by,
                      const pack_mask<double>& where) {
    for (W tsallis_point<W>::*part :
         {&tsallis_point<W>::at, &tsallis_point<W>::rate, &tsallis_point<W>::top,
          &tsallis_point<W>::rest, &tsallis_point<W>::root})
      old.*part = select(where, by.*part, old.*part);
  }
};

template <class Power, class T>
summary<tsallis_threshold, pack<double>> solve_tsallis_rows(const Power& power, pack<T>* x,
                                                            index n) {
  const tsallis_rows<T> rows(power, x, n);
  return rows.template finish<tsallis_threshold>(
      {rows.at.rate, rows.at.top, rows.at.rest, rows.conjugate, rows.size}, {1, 0, 1, 0, 0});
}

/// The argmax p of ⟨p, x⟩ − ‖p‖_α over the simplex. With h = 1 − 1/α and w = (p/‖p‖_α)^{α−1},
///
///   w_j = w₁ (1 − r_j)_+,   r_j = (max x − x_j)/w₁,   Σ w^{1/h} = 1,   p_j ∝ w_j^{1/(α−1)},
///
/// so that the w^{1/h} are what tsallis_threshold has for the order 1 + h and the scores x/h, and
/// c = 1/w₁; Ω*(x) = max x − w₁. As c, p₁, 1 − p₁, Ω* + 1 less max x, and |S|.
///
/// `solver` is for the order 1 + h, `power` for the power 1/(α−1).
template <class Solver, class Power, class T>
summary<tsallis_threshold, double> solve_norm(const Solver& solver, const Power& power, const T* x,
                                              index n, double* room) {
  const auto summarise = [&](double top, const tsallis_root& r) {
    const double others = sum_rivals(power, r.at, room, r.rivals).powers;
    return summary<tsallis_threshold, double>{
        top,
        {r.at.rate, 1 / (1 + others), others / (1 + others), solver.short_of_one(r.at), r.size}};
  };
  return solve_row(solver, x, n, room, summarise);
}

template <class Solver, class Power, class T>
summary<tsallis_threshold, pack<double>> solve_norm_rows(const Solver& solver, const Power& power,
                                                         pack<T>* x, index n) {
  using W = pack<double>;
  const tsallis_rows<T> rows(solver, x, n);
  W others(0);
  for (index j = 0; j < n; ++j) {
    W base, raised;
    power.raise(rows.at.rate, rows.z[j], base, raised);
    others += raised;
  }
  const W sum = 1 + others;
  return rows.template finish<tsallis_threshold>(
      {rows.at.rate, 1 / sum, others / sum, solver.short_of_one(rows.at), rows.size},
      {1, 0, 1, 0, 0});
}

} // namespace perdita::inline PERDITA_ABI::core
