// SPDX-License-Identifier: MIT
#pragma once

/// Which entries of a gradient of scores are worth a product. Where few are, the two products of
/// the linear head run over a list of them.
///
/// An entry is dropped where its size, with every scale in it, is not above the row's threshold.
/// Either the threshold is given, or it is the largest of a few for which what is dropped of a row
/// adds up to no more than a share of the row's mass Σ_j |g_j|: they rise by a constant ratio from
/// share · mass / classes, which cannot drop too much. Who has a slice of the classes drops no more
/// than their part of the share, so that all slices together keep to it.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "row_job.hpp"
#include "workspace.hpp"

namespace perdita::inline PERDITA_ABI::core {

struct linear_filter {
  double share = 0;     ///< of a row's mass that may be dropped, or
  double threshold = 0; ///< what is dropped, in units of the scale that all rows have in common

  explicit operator bool() const { return share > 0 || threshold > 0; }
};

/// An entry of a piece of the gradient that is worth a product.
template <class T> struct live_entry {
  std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>
      at; // class in the piece * rows + row
  T value;
};

/// The thresholds of the rows of a block, one row in each lane.
template <class T> class linear_thresholds {
  using V = pack<T>;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr index steps = 8;  // thresholds that are tried
  static constexpr index block = 64; // classes whose mass is added up in T

public:
  /// What each of the thresholds that are tried would drop of a panel of rows.
  struct masses {
    wide_lanes<T> tried[steps];
    void clear() {
      for (auto& m : tried)
        m.clear();
    }
  };

  /// For `classes` of `all` that a row has.
  linear_thresholds(const linear_filter& filter, index classes, index all, index panels,
                    index slices, carver& memory)
      : filter_(filter), slices_(slices),
        ratio_(static_cast<T>(std::pow(static_cast<double>(classes), 1.0 / steps))),
        least_(static_cast<T>(filter.share / static_cast<double>(all))) {
    filter_.share *= static_cast<double>(classes) / static_cast<double>(all);
    const auto n = static_cast<std::size_t>(filter ? panels : 0);
    mass_ = memory.take<V>(n);
    threshold_ = memory.take<V>(n);
    dropped_ = memory.take<V>(measured() ? n * static_cast<std::size_t>(slices * steps) : 0);
  }
  bool any() const { return static_cast<bool>(filter_); }
  /// Whether they depend on what the rows hold: then measure(), put() and choose() come first.
  bool measured() const { return filter_.share > 0; }

  void begin(index panel, const V& mass, double common_scale) {
    mass_[panel] = mass;
    threshold_[panel] =
        measured() ? mass * least_ : V(static_cast<T>(filter_.threshold * std::fabs(common_scale)));
  }

  PERDITA_NOINLINE void measure(index panel, const T* gradient, index n, masses& to) const {
    V tried[steps];
    tried[0] = threshold_[panel];
    for (index k = 1; k < steps; ++k)
      tried[k] = tried[k - 1] * ratio_;
    for (index first = 0; first < n; first += block) {
      V sum[steps];
      for (V& s : sum)
        s = V(0);
      for (index j = first; j < std::min(n, first + block); ++j) {
        const V size = abs(V::load(gradient + j * width));
        for (index k = 0; k < steps; ++k)
          sum[k] += select(size <= tried[k], size, V(0));
      }
      for (index k = 0; k < steps; ++k)
        to.tried[k].add(sum[k]);
    }
  }
  void put(index panel, index slice, const masses& m) const {
    for (index k = 0; k < steps; ++k) {
      pack<double> wide[wide_lanes<T>::parts];
      for (int h = 0; h < wide_lanes<T>::parts; ++h)
        wide[h] = m.tried[k].folded(h);
      dropped_[(panel * slices_ + slice) * steps + k] = narrow(wide);
    }
  }
  /// As if put() had been called for every slice, with nothing.
  void forget(index panel) const {
    std::fill_n(dropped_ + panel * slices_ * steps, slices_ * steps, V(0));
  }
  void keep_all(index panel) const { threshold_[panel] = V(-1); }
  /// Settles the thresholds of a panel, of which `part` has been measured; dropped[i] is the mass
  /// that row i loses of it.
  void choose(index panel, double part, double (&dropped)[lanes<T>]) const {
    alignas(64) T some[lanes<T>], all[lanes<T>], threshold[lanes<T>];
    double mass[steps][lanes<T>] = {};
    for (index s = 0; s < slices_; ++s)
      for (index k = 0; k < steps; ++k) {
        dropped_[(panel * slices_ + s) * steps + k].store(some);
        for (index i = 0; i < width; ++i)
          mass[k][i] += static_cast<double>(some[i]);
      }
    mass_[panel].store(all);
    threshold_[panel].store(threshold);
    for (index i = 0; i < width; ++i) {
      index k = steps - 1;
      while (k > 0 && !(mass[k][i] <= filter_.share * part * static_cast<double>(all[i])))
        --k;
      dropped[i] = mass[k][i];
      for (; k > 0; --k)
        threshold[i] *= ratio_;
    }
    threshold_[panel] = V::load(threshold);
  }

  /// Which lanes are live, of every panel of a class, class by class.
  using lane_mask = std::uint16_t;
  static_assert(width <= 16);

  /// What a list of the live entries of a piece saves, in entries of products; 0 where the piece
  /// is as fast. NaN is live. `live` is given a mask for every class and panel, for list().
  index saved(const T* gradient, index n, index panel_step, index rows, lane_mask* live) const {
    constexpr index cost = 8; // measured: entries of a product in the time of a listed one
    const index panels = (rows + width - 1) / width;
    index count = 0;
    for (index p = 0; p < panels; ++p) {
      const V threshold = threshold_[p];
      const std::uint32_t real = (std::uint32_t{1} << std::min(width, rows - p * width)) - 1;
      for (index j = 0; j < n; ++j) {
        const V g = V::load(gradient + p * panel_step + j * width);
        const std::uint32_t here = lane_bits(!(abs(g) <= threshold)) & real;
        live[j * panels + p] = static_cast<lane_mask>(here);
        count += std::popcount(here);
      }
    }
    return std::max<index>(n * rows - count * cost, 0);
  }
  /// Lists the entries of a piece that saved() has found live, class by class; returns how many
  /// there are.
  index list(const T* gradient, index n, index panel_step, index rows, const lane_mask* live,
             live_entry<T>* to) const {
    live_entry<T>* const first = to;
    for (index j = 0; j < n; ++j)
      for (index p = 0; p * width < rows; ++p)
        for (std::uint32_t left = *live++; left != 0; left &= left - 1) {
          const index i = std::countr_zero(left);
          *to++ = {static_cast<decltype(to->at)>(j * rows + p * width + i),
                   gradient[p * panel_step + j * width + i]};
        }
    return to - first;
  }

private:
  linear_filter filter_;
  index slices_;
  T ratio_, least_;
  V *mass_ = nullptr, *threshold_ = nullptr;
  V* dropped_ = nullptr; // of every panel, slice and threshold
};

/// to[0, n) += a from[0, n)
template <class T> void add_multiple(T a, const T* from, index n, T* to) {
  using V = pack<T>;
  constexpr auto width = static_cast<index>(lanes<T>);
  const V factor(a);
  index i = 0;
  for (; i + width <= n; i += width)
    fma(factor, V::load(from + i), V::load(to + i)).store(to + i);
  if (i < n)
    store_first(fma(factor, load_first(from + i, n - i, V(0)), load_first(to + i, n - i, V(0))),
                to + i, n - i);
}

} // namespace perdita::inline PERDITA_ABI::core
