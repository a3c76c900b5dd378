// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

namespace perdita::inline PERDITA_ABI {

struct group_ordering_options {
  index negatives = 10;                           ///< of each anchor, the nearest: above 0
  double steepness = 1;                           ///< β of the relaxed swaps, above 0
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the anchors that count
};

namespace core {

/// An odd-even transposition network of n layers, whose swaps are relaxed: a layer makes
/// a' = α a + (1 − α) b and b' = (1 − α) a + α b of neighbours a and b, α = ½ + atan(β (b − a))/π.
///
/// Of the permutation matrix that the layers M_0 M_1 … make, the loss asks for how much of each row
/// lies in the first columns: the layers applied to a vector, O(n²) and not O(n³).
class sorting_network {
public:
  sorting_network(index n, double steepness)
      : n_(n), steepness_(steepness), x_(size(n + 1)), u_(size(n + 1)), alpha_(size(n)) {}

  double* scores() { return x_.data(); }

  /// The mean over the rows of −log(what lies where it should), the first `first` rows belonging to
  /// the first columns.
  double value(index first) {
    for (index r = 0; r < n_; ++r) {
      std::copy_n(at(x_, r), n_, at(x_, r + 1));
      for (index a = r % 2; a + 1 < n_; a += 2) {
        double& alpha = at(alpha_, r)[a];
        alpha = 0.5 + std::atan(steepness_ * (at(x_, r)[a + 1] - at(x_, r)[a])) / std::numbers::pi;
        mix(at(x_, r + 1) + a, alpha);
      }
    }
    std::fill_n(at(u_, n_), first, 1.0);
    std::fill_n(at(u_, n_) + first, n_ - first, 0.0);
    for (index r = n_; r-- > 0;) {
      std::copy_n(at(u_, r + 1), n_, at(u_, r));
      for (index a = r % 2; a + 1 < n_; a += 2)
        mix(at(u_, r) + a, at(alpha_, r)[a]);
    }
    double sum = 0;
    for (index i = 0; i < n_; ++i)
      sum -= std::fmax(std::log(share(i, first)), least);
    return sum / static_cast<double>(n_);
  }
  /// ∂value/∂score of each, after value().
  std::vector<double> slopes(index first) const {
    const auto n = static_cast<std::size_t>(n_);
    std::vector<double> h(n), g(n), of_alpha(alpha_.size());
    for (index i = 0; i < n_; ++i) {
      const double p = share(i, first);
      if (std::log(p) > least)
        h[static_cast<std::size_t>(i)] = (i < first ? -1 : 1) / (p * static_cast<double>(n_));
    }
    for (index r = 0; r < n_; ++r)
      for (index a = r % 2; a + 1 < n_; a += 2) {
        const double* u = at(u_, r + 1) + a;
        at(of_alpha, r)[a] =
            (h[static_cast<std::size_t>(a)] - h[static_cast<std::size_t>(a) + 1]) * (u[0] - u[1]);
        mix(h.data() + a, at(alpha_, r)[a]);
      }
    for (index r = n_; r-- > 0;)
      for (index a = r % 2; a + 1 < n_; a += 2) {
        const double* x = at(x_, r) + a;
        double* const d = g.data() + a;
        const double of = at(of_alpha, r)[a] + (d[0] - d[1]) * (x[0] - x[1]);
        const double v = steepness_ * (x[1] - x[0]);
        const double pull = of * steepness_ / (std::numbers::pi * (1 + v * v));
        mix(d, at(alpha_, r)[a]);
        d[0] -= pull;
        d[1] += pull;
      }
    return g;
  }

private:
  static constexpr double least = -100; // of logarithms

  std::size_t size(index layers) const { return static_cast<std::size_t>(layers * n_); }
  double* at(std::vector<double>& m, index layer) const { return m.data() + layer * n_; }
  const double* at(const std::vector<double>& m, index layer) const {
    return m.data() + layer * n_;
  }
  static void mix(double* pair, double alpha) {
    const double a = pair[0], b = pair[1];
    pair[0] = alpha * a + (1 - alpha) * b;
    pair[1] = (1 - alpha) * a + alpha * b;
  }
  /// Of row i, what lies in its group's columns.
  double share(index i, index first) const {
    const double p = std::clamp(u_[static_cast<std::size_t>(i)], 0.0, 1.0);
    return i < first ? p : 1 - p;
  }

  index n_;
  double steepness_;
  std::vector<double> x_, u_, alpha_; ///< layer by layer
};

struct group_ordering_formula : anchor_formula {
  index negatives;
  double steepness;

  group_ordering_formula(index k, double beta) : negatives(k), steepness(beta) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    const chosen_scores<T> positive(row, belonging{}), negative(row, rivalling{});
    if (positive.count == 0 || negative.count == 0)
      return {0, false};
    anchor_outcome out;
    if (!std::isfinite(positive.sum + negative.sum)) {
      out.value = std::numeric_limits<double>::quiet_NaN();
      if constexpr (Gradient)
        std::fill_n(row.scores, row.size, std::numeric_limits<T>::quiet_NaN());
      return out;
    }
    std::vector<index> order;
    const index first = choose(row, order);
    const auto n = static_cast<index>(order.size());
    sorting_network network(n, steepness);
    for (index i = 0; i < n; ++i)
      network.scores()[i] = static_cast<double>(row.scores[order[static_cast<std::size_t>(i)]]);
    out.value = network.value(first);
    if constexpr (Gradient) {
      const std::vector<double> slope = network.slopes(first);
      std::fill_n(row.scores, row.size, T(0));
      for (std::size_t i = 0; i < order.size(); ++i)
        row.scores[order[i]] = static_cast<T>(slope[i]);
    }
    return out;
  }

private:
  /// The nearest negatives and then all positives, both ascending; returns how many of the former.
  template <class T> index choose(const anchor_row<T>& row, std::vector<index>& order) const {
    const auto lower = [&row](index a, index b) {
      return row.scores[a] < row.scores[b] || (row.scores[a] == row.scores[b] && a > b);
    };
    std::vector<index> positive;
    for (index j = 0; j < row.size; ++j)
      if (row.relation[j] != 0)
        (row.relation[j] > 0 ? positive : order).push_back(j);
    if (const auto count = static_cast<index>(order.size()); count > negatives) {
      const auto kept = order.begin() + (count - negatives);
      std::nth_element(order.begin(), kept, order.end(), lower);
      order.erase(order.begin(), kept);
    }
    std::sort(order.begin(), order.end(), lower);
    std::sort(positive.begin(), positive.end(), lower);
    const auto first = static_cast<index>(order.size());
    order.insert(order.end(), positive.begin(), positive.end());
    return first;
  }
};

} // namespace core

/// Group ordering constraints: of an anchor, all positives are to be nearer than its k nearest
/// negatives. Their scores s (cosines), negatives and positives each in ascending order, go through
/// a differentiable sorting network, n = k + |P| layers that swap neighbours a, b by degrees,
///
///   α = ½ + atan(β (b − a))/π,   a' = α a + (1 − α) b,   b' = (1 − α) a + α b
///
/// whose layers together are a doubly stochastic matrix Q, relaxed from a permutation;
///
///   p_i = Σ_{columns c < k} Q_ic
///   ℓ = (1/n) [Σ_{negatives} −log p_i + Σ_{positives} −log(1 − p_i)]
///
/// (binary cross-entropies, with logarithms from −100 up; half the sum of that of p and of 1 − p,
/// which are the same), the gradient by the network backwards, and the mean over anchors that have
/// a positive and a negative. Where there are fewer than k negatives, it takes them all; of those
/// that tie the first. Which ones they are, and their order, are constants.
///
/// β times what cosines differ by is small: α stays within about [0.15, 0.85], and even a perfect
/// order has a loss.
///
/// The gradient is that of both sides of every cosine. The paper's goes to the anchors alone: call
/// loss(x, y, labels, labels, d_x, d_y, …) with a copy y of x, a filter that leaves out the anchor
/// itself, and ignore d_y.
///
/// O(n²) time and memory per anchor beyond the comparisons. See anchor_loss for calls, shapes,
/// special values and errors. Throws where k or β is not above 0.
///
/// Source: Shvetsova et al., "Learning by sorting: self-supervised learning with group ordering
/// constraints", ICCV 2023; Petersen et al., "Monotonic differentiable sorting networks", 2022.
template <class T> class group_ordering : public anchor_loss<group_ordering<T>, T> {
public:
  using options = group_ordering_options;
  static constexpr const char* name = "group_ordering";

  group_ordering() : group_ordering(options{}) {}
  explicit group_ordering(const options& o) : options_(o) {
    core::require(o.negatives > 0, name, "negatives", o.negatives, "a number above 0");
    core::positive(name, "steepness", o.steepness);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::group_ordering_formula formula() const { return {options_.negatives, options_.steepness}; }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
