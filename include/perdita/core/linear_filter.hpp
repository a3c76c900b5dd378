// SPDX-License-Identifier: MIT
#pragma once

/// Which entries of a gradient of scores are worth a product. Where few are, the two products of
/// the linear head run over a list of them.
///
/// An entry is dropped where its size, with every scale in it, is not above the row's threshold.
/// Either the threshold is given, or it is the largest of a few for which what is dropped of a row
/// adds up to no more than a share of the row's mass Σ_j |g_j|: thresholds from share · mass /
/// classes, which cannot drop too much, up by a constant ratio.

#include <cmath>

#include "linear_tile.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class T> struct live_entry {
  std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>
      at; // class in the piece * rows + row
  T value;
};

template <class T> struct linear_filter {
  using V = pack<T>;
  static constexpr auto width = static_cast<index>(lanes<T>);
  static constexpr index steps = 8; ///< thresholds that are tried
  /// Above this share of live entries a dense product is faster.
  static constexpr index most_live = 8; // one in so many

  double share = 0;     ///< of a row's mass that may be dropped, or
  double threshold = 0; ///< what is dropped, over the scale that all rows have in common
  double ratio = 1;     ///< from threshold to threshold

  explicit operator bool() const { return share > 0 || threshold > 0; }

  /// One row in each lane.
  struct panel {
    V least;     // of the thresholds
    V threshold; // that was chosen
    V mass;
  };

  /// mass[k] += what the k-th threshold drops of one panel of a piece.
  PERDITA_NOINLINE void measure(const T* gradient, index n, const panel& at,
                                wide_lanes<T>* mass) const {
    constexpr index block = 64;
    V tried[steps];
    tried[0] = at.least;
    for (index k = 1; k < steps; ++k)
      tried[k] = tried[k - 1] * static_cast<T>(ratio);
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
        mass[k].add(sum[k]);
    }
  }

  /// The largest threshold that drops no more than the share; and how much it drops.
  void choose(panel& at, const double (*mass)[lanes<T>], double* dropped) const {
    alignas(64) T least[lanes<T>], all[lanes<T>], chosen[lanes<T>];
    at.least.store(least);
    at.mass.store(all);
    for (std::size_t i = 0; i < lanes<T>; ++i) {
      index k = steps - 1;
      while (k > 0 && !(mass[k][i] <= share * static_cast<double>(all[i])))
        --k;
      chosen[i] = least[i];
      for (index s = 0; s < k; ++s)
        chosen[i] *= static_cast<T>(ratio);
      dropped[i] = mass[k][i];
    }
    at.threshold = V::load(chosen);
  }

  /// How many entries of `rows` rows of one panel of a piece are live. NaN is.
  static index count(const T* gradient, index n, index rows, const panel& at) {
    V live(0);
    for (index j = 0; j < n; ++j)
      live += select(abs(V::load(gradient + j * width)) <= at.threshold, V(0), V(1));
    return static_cast<index>(sum_lanes(select(iota<T>() < V(static_cast<T>(rows)), live, V(0))));
  }

  /// Lists the live entries of a piece, class by class; returns the end of the list.
  static live_entry<T>* list(const T* gradient, index n, index panel_step, const panel* at,
                             index rows, live_entry<T>* to) {
    alignas(64) T value[lanes<T>], size[lanes<T>], threshold[lanes<T>];
    const index panels = (rows + width - 1) / width;
    for (index j = 0; j < n; ++j)
      for (index p = 0; p < panels; ++p) {
        const V g = V::load(gradient + p * panel_step + j * width);
        if (!any(!(abs(g) <= at[p].threshold))) [[likely]]
          continue;
        g.store(value);
        abs(g).store(size);
        at[p].threshold.store(threshold);
        for (index i = 0; i < std::min(width, rows - p * width); ++i)
          if (!(size[i] <= threshold[i]))
            *to++ = {static_cast<decltype(to->at)>(j * rows + p * width + i), value[i]};
      }
    return to;
  }

  /// to[0, n) += a from[0, n)
  static PERDITA_INLINE void add_multiple(T a, const T* from, index n, T* to) {
    const V factor(a);
    index i = 0;
    for (; i + width <= n; i += width)
      fma(factor, V::load(from + i), V::load(to + i)).store(to + i);
    if (i < n)
      store_first(fma(factor, load_first(from + i, n - i, V(0)), load_first(to + i, n - i, V(0))),
                  to + i, n - i);
  }
};

} // namespace perdita::inline PERDITA_ABI::core
