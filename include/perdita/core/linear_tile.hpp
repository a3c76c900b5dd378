// SPDX-License-Identifier: MIT
#pragma once

/// A block of rows whose scores are made piece by piece: what is summed up of a piece, what a row's
/// summary is finished to, and how a piece becomes a piece of the gradient. Lanes are rows.
///
/// A piece is `n` classes of all rows of the block, in panels of W rows: panel p, class j, lane i
/// is scores[p * panel + j * W + i]. A panel of it fits the first-level cache.

#include <algorithm>
#include <limits>

#include "row_formula.hpp"
#include "row_kernel.hpp"

namespace perdita::inline PERDITA_ABI::core {

/// The number that belongs to each class and row of a piece, for formulas that ask for one: the
/// formula's own, and the row's soft target in lanes where it has one.
template <class T> struct piece_side {
  side_cursor<T> side; // at the piece's first class
  const T* soft = nullptr;

  PERDITA_INLINE pack<T> at(index j) const {
    const pack<T> bias(side.bias ? side.bias[j] : side.uniform_bias);
    if (!soft)
      return bias;
    const pack<T> weight(side.weight ? side.weight[j] : side.uniform_weight);
    return fma(pack<T>::load(soft + j * static_cast<index>(lanes<T>)), weight, bias);
  }
};

/// The running sums of one panel of rows.
template <class Statistic, class T> struct panel_sums {
  pack<T> shift, rivals;
  wide_lanes<T> term[Statistic::terms];

  void clear() {
    shift = Statistic::template first_shift<pack<T>>();
    rivals = pack<T>(-std::numeric_limits<T>::infinity());
    for (auto& t : term)
      t.clear();
  }
};

/// How many coefficients the formula's slope() takes: as many as it says, or as a row_outcome has.
template <class Formula> constexpr int slope_coefficients() {
  if constexpr (requires { Formula::coefficients; })
    return Formula::coefficients;
  else
    return coefficients;
}

/// What a finished row hands to its gradient, one row in each lane.
template <class Formula, class T> struct panel_slopes {
  pack<T> shift, factor, cut, scale, target, coefficient[slope_coefficients<Formula>()];
};

template <class Formula, class T> class linear_tile {
  using V = pack<T>;
  using statistic = typename Formula::statistic;
  static constexpr auto width = static_cast<index>(lanes<T>);
  /// Classes that share a shift and are added up in T: few, so that little is lost.
  static constexpr index block = 64;

public:
  using sums = panel_sums<statistic, T>;
  using slopes = panel_slopes<Formula, T>;

  /// Where in a piece each row's label is; -1 where it is not there.
  static V place(const std::int64_t* labels, index first, index n) {
    alignas(64) T at[lanes<T>];
    for (index i = 0; i < width; ++i) {
      const std::int64_t j = labels[i] - first;
      at[i] = j >= 0 && j < n ? static_cast<T>(j) : T(-1);
    }
    return V::load(at);
  }

  /// Adds one panel of a piece to the sums; notes the score of each row's label in raw_target.
  static PERDITA_NOINLINE void absorb(const Formula& formula, const T* scores, const T* bias,
                                      index n, const piece_side<T>& side, const V& label, sums& to,
                                      T* raw_target) {
    const V nothing = statistic::template look_at_nothing<V>();
    for (index first = 0; first < n; first += block) {
      const index end = std::min(n, first + block);
      const bool labelled = holds(label, first, end);
      if (labelled) [[unlikely]]
        note_targets(scores, bias, first, end, label, raw_target);
      V seen = nothing;
      for (index j = first; j < end; ++j) {
        V raw = score_at(scores, bias, j);
        if (Formula::excludes_target && labelled) [[unlikely]]
          raw = select(label == V(static_cast<T>(j)), nothing, raw);
        seen = statistic::look(seen, raw);
      }
      move_shift(formula, seen, end - first, to);
      V part[statistic::terms];
      for (V& sum : part)
        sum = V(0);
      for (index j = first; j < end; ++j) {
        V z = scored(formula, score_at(scores, bias, j)).z, b(0);
        if constexpr (Formula::has_side)
          b = side.at(j);
        if (Formula::excludes_target && labelled) [[unlikely]] {
          const auto here = label == V(static_cast<T>(j));
          z = select(here, statistic::absent(to.shift), z);
          b = select(here, V(0), b);
        }
        statistic::absorb(part, z, to.shift, b);
      }
      for (int k = 0; k < statistic::terms; ++k)
        to.term[k].add(part[k]);
    }
  }

  /// Turns one panel of scores into the panel of their gradients, where it lies.
  static PERDITA_NOINLINE void emit(const Formula& formula, T* scores, const T* bias, index n,
                                    const piece_side<T>& side, const V& label,
                                    const slopes& panel) {
    const Formula f = formula; // copies: a store may change anything but them
    const slopes s = panel;
    for (index first = 0; first < n; first += block) {
      const index end = std::min(n, first + block);
      const bool labelled = holds(label, first, end);
      for (index j = first; j < end; ++j) {
        V b(0);
        if constexpr (Formula::has_side)
          b = side.at(j);
        V g = slope_of(f, score_at(scores, bias, j), s.shift, s.factor, s.cut, b, s.scale,
                       s.coefficient);
        if (labelled) [[unlikely]]
          g = select(label == V(static_cast<T>(j)), s.target, g);
        g.store(scores + j * width);
      }
    }
  }

private:
  static bool holds(const V& label, index first, index end) {
    return any((label >= V(static_cast<T>(first))) & (label < V(static_cast<T>(end))));
  }
  static PERDITA_INLINE V score_at(const T* scores, const T* bias, index j) {
    const V x = V::load(scores + j * width);
    return bias ? x + V(bias[j]) : x;
  }
  /// Lane by lane: other tasks note those of other rows of the panel.
  static PERDITA_NOINLINE void note_targets(const T* scores, const T* bias, index first, index end,
                                            const V& label, T* raw_target) {
    alignas(64) T at[lanes<T>], x[lanes<T>];
    label.store(at);
    for (index i = 0; i < width; ++i) {
      const auto j = static_cast<index>(at[i]);
      if (j < first || j >= end)
        continue;
      score_at(scores, bias, j).store(x);
      raw_target[i] = x[i];
    }
  }
  static void move_shift(const Formula& formula, const V& seen, index n, sums& to) {
    if constexpr (statistic::look_is_maximum)
      to.rivals = max(seen, to.rivals);
    const V shift = statistic::choose(formula.score(seen), to.shift, n);
    if (!any(!(shift == to.shift)))
      return;
    constexpr int parts = wide_lanes<T>::parts;
    pack<double> before[parts], after[parts];
    widen(to.shift, before);
    widen(shift, after);
    for (int i = 0; i < parts; ++i)
      before[i] = before[i] - after[i];
    rebase_lanes<statistic>(to.term, before);
    to.shift = shift;
  }
};

} // namespace perdita::inline PERDITA_ABI::core
