// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/sequences.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// A probability and whether its class is the label.
struct calibration_pair {
  double p;
  index at; ///< row × classes + column
  bool hit;
};

struct calibration_settings {
  index window, clusters;
  double tolerance;
};

/// The objective of one set of pairs that ascend in p.
class calibration_event {
  template <class V> static typename V::value_type& at(V& v, index t) {
    return v[static_cast<std::size_t>(t)];
  }

public:
  explicit calibration_event(const calibration_settings& settings) : settings_(settings) {}

  std::vector<calibration_pair> pairs;

  /// The value.
  double measure() {
    if (pairs.empty())
      return 0;
    term_.resize(pairs.size());
    for_ties([&](index first, index last) {
      index hits = 0;
      for (index t = first; t < last; ++t)
        hits += at(pairs, t).hit;
      const double share = static_cast<double>(hits) / static_cast<double>(last - first);
      std::fill(term_.begin() + first, term_.begin() + last, share);
    });
    sum_up([&](exact_sum& sum, std::size_t t) { // p less the hits, which may be nearly the same
      sum.add(pairs[t].p);
      sum.add(-term_[t]);
    });
    find_clusters();
    double value = 0;
    index first = 0;
    for (const index last : ends_) {
      const double weight = weight_of(last - first);
      exact_sum excess;
      for (index t = first; t < last; ++t) {
        const double s = window_total(t) / width(), beyond = std::fabs(s) - settings_.tolerance;
        excess.add(std::max(beyond, 0.0));
        at(term_, t) = beyond > 0 ? (s > 0 ? weight : -weight) : 0;
      }
      value += weight * excess.value();
      first = last;
    }
    return value;
  }
  /// After measure(): give(pair, ∂value/∂p).
  template <class Give> void differentiate(Give give) {
    sum_up([&](exact_sum& sum, std::size_t t) { sum.add(term_[t]); });
    for_ties([&](index first, index last) {
      exact_sum all;
      for (index t = first; t < last; ++t)
        all.add(window_total(t));
      const double slope = all.value() / static_cast<double>(last - first) / width();
      for (index t = first; t < last; ++t)
        give(at(pairs, t), slope);
    });
  }

private:
  double width() const { return static_cast<double>(settings_.window + 1); }

  /// f(first, last) for all runs of equal probabilities.
  template <class F> void for_ties(F f) {
    const auto n = static_cast<index>(pairs.size());
    for (index first = 0, last; first < n; first = last) {
      for (last = first + 1; last < n && at(pairs, last).p == at(pairs, first).p;)
        ++last;
      f(first, last);
    }
  }
  /// Sums of the terms before each place, with their rounding errors: differences of them keep the
  /// digits of a short window.
  template <class Add> void sum_up(Add add) {
    before_.assign(pairs.size() + 1, {});
    for (std::size_t t = 0; t < pairs.size(); ++t) {
      before_[t + 1] = before_[t];
      add(before_[t + 1], t);
    }
  }
  /// Σ of the terms no more than half a window away.
  double window_total(index t) const {
    const auto n = static_cast<index>(pairs.size());
    const auto& low =
        before_[static_cast<std::size_t>(std::max<index>(t - settings_.window / 2, 0))];
    const auto& high = before_[static_cast<std::size_t>(std::min(t + settings_.window / 2 + 1, n))];
    return (high.sum - low.sum) + (high.error - low.error);
  }
  /// Of an excess in a cluster of so many.
  double weight_of(index count) const {
    return settings_.clusters == 0 ? 1 / static_cast<double>(count)
                                   : 1 / (static_cast<double>(settings_.clusters) *
                                          (static_cast<double>(count) + 1e-5));
  }

  /// k-means on the line: where each cluster ends. From the middles of equal shares, 25 steps of
  /// Lloyd's at most; a probability that is as near to two centres goes to the lower.
  void find_clusters() {
    const auto n = static_cast<index>(pairs.size()), count = settings_.clusters;
    ends_.assign(static_cast<std::size_t>(std::max<index>(count, 1)), n);
    if (n == 0 || count == 0)
      return;
    std::vector<exact_sum> sums(pairs.size() + 1);
    for (std::size_t t = 0; t < pairs.size(); ++t) {
      sums[t + 1] = sums[t];
      sums[t + 1].add(pairs[t].p);
    }
    std::vector<double> centres;
    for (index k = 0; k < count; ++k)
      centres.push_back(at(pairs, (2 * k + 1) * n / (2 * count)).p);
    for (int step = 0; step < 25; ++step) {
      const auto before = ends_;
      for (index k = 0; k + 1 < count; ++k) {
        const double border = at(centres, k) + (at(centres, k + 1) - at(centres, k)) / 2;
        const auto end =
            std::upper_bound(pairs.begin(), pairs.end(), border,
                             [](double b, const calibration_pair& c) { return b < c.p; });
        at(ends_, k) = static_cast<index>(end - pairs.begin());
      }
      if (step > 0 && ends_ == before)
        return;
      index first = 0;
      for (index k = 0; k < count; ++k) {
        const index last = at(ends_, k);
        if (last > first) {
          const auto &low = at(sums, first), &high = at(sums, last);
          at(centres, k) =
              ((high.sum - low.sum) + (high.error - low.error)) / static_cast<double>(last - first);
        }
        first = last;
      }
    }
  }

  calibration_settings settings_;
  std::vector<double> term_; ///< share of hits, then the slopes of the windows
  std::vector<exact_sum> before_;
  std::vector<index> ends_;
};

} // namespace core

/// h-calibration: how far probabilities are from frequencies, over windows of similar ones. It
/// trains a recalibration map (temperatures, splines, …) on held-out data.
///
///   ℓ = (scale/C) Σ_e L(rows whose label is not e),   e over the C classes
///   L: of the pairs (p_t, o_t) of all its rows and classes, o = 1 at labels, by ascending p,
///   S_t = (1/(v + 1)) Σ_{|j − t| ≤ v/2} (p_j − o_j)    (nothing beyond the ends)
///   L = mean over clusters of Σ_{t in it} max(0, |S_t| − ε)/(size of the cluster + 1e-5)
///   ∂L/∂p_j = (1/(v + 1)) Σ_{|t − j| ≤ v/2} w_t sign(S_t)[|S_t| > ε],   w_t = 1/(K (size + 1e-5))
///
/// The K clusters are those of k-means on p (from the middles of equal shares, at most 25 steps of
/// Lloyd's), and held fixed in the gradient, as the order is: ℓ is piecewise linear, this its
/// slope. clusters = 0: L is the mean over all pairs. Without leave_class_out, ℓ = scale · L(all
/// rows). Equal probabilities stand for each other: each has their mean of p − o, and of the
/// gradients. So the order of rows and classes does not matter. Shapes: probabilities and gradient
/// rows × classes of T; one label of any integral type per row; the gradient may be the
/// probabilities themselves. They need not add up to 1. Special values: rows with label
/// ignore_index take no part, and have gradient 0. NaN or an infinity in a row makes the value and
/// that row's gradient NaN, and the row takes no part in the others'. An event without rows, an
/// empty batch: 0. Call options: scale (of the gradient), accumulate and run_on; all others belong
/// to losses of rows and are refused. Sums are in double, with their rounding errors kept; threads
/// do not matter. Cost: one sort of rows × classes pairs, C passes over them, memory for up to
/// eight gradients. Throws std::invalid_argument. Source: Huang, Cao, Xia, et al., "h-calibration",
/// 2025 (defaults as in their code, whose k-means has random centres).
///
///   perdita::h_calibration<float> loss;
///   float value = loss(softmax_of_scores, labels, d_probabilities); // then softmax_backward
template <class T = float> class h_calibration {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    index window = 200;          ///< v ≥ 0, even
    double tolerance = 1e-20;    ///< ε ≥ 0
    index clusters = 15;         ///< K ≥ 0
    bool leave_class_out = true; ///< a set of rows per class
    double scale = 1e5;          ///< of value and gradient
    std::int64_t ignore_index = -100;
  };
  static constexpr const char* name = "h_calibration";

  h_calibration() : h_calibration(options{}) {}
  explicit(false) h_calibration(const options& o) : options_(o) {
    core::require(o.window >= 0 && o.window % 2 == 0, name, "window", o.window,
                  "an even number of at least 0");
    core::require(o.tolerance >= 0, name, "tolerance", o.tolerance, "a number of at least 0");
    core::require(o.clusters >= 0, name, "clusters", o.clusters, "at least 0");
    core::finite(name, "scale", o.scale);
  }
  const options& settings() const { return options_; }

  template <core::labels_like Y>
  T operator()(matrix_view<const T> probabilities, Y&& labels,
               const call_options<T>& call = {}) const {
    return run(probabilities, core::integer_rows(core::as_vector(labels)), {}, false, call);
  }
  template <core::labels_like Y>
  T operator()(matrix_view<const T> probabilities, Y&& labels, matrix_view<T> gradient,
               const call_options<T>& call = {}) const {
    return run(probabilities, core::integer_rows(core::as_vector(labels)), gradient, true, call);
  }

private:
  static constexpr core::sequence_checks<T> checks{name};
  static constexpr index most_groups = 8; // of events that share a gradient

  void check(const matrix_view<const T>& p, const core::integer_rows& labels,
             const matrix_view<T>& g, bool has_gradient, const call_options<T>& call) const {
    checks.memory("probabilities", p.data, p.rows * p.cols);
    checks.size("labels", labels.cols, p.rows, "as many as there are rows");
    checks.memory("labels", labels.data, p.rows);
    checks.call(call, p.rows, false, "as many as there are rows");
    if (call.row_weights.data || call.upstream.data || call.values.data || call.normaliser != 0)
      core::fail(std::string("perdita::") + name +
                 ": row_weights, upstream, values or normaliser is given, expected none");
    if (p.rows > 0)
      core::require(p.cols > 0, name, "columns", p.cols, "at least 1 class");
    for (index r = 0; r < p.rows; ++r) {
      const std::int64_t y = labels.at(0, r);
      if (y != options_.ignore_index && (y < 0 || y >= p.cols))
        core::fail_at(name, "labels", r, core::to_text(y),
                      "0 to " + core::to_text(p.cols - 1) + ", or ignore_index " +
                          core::to_text(options_.ignore_index));
    }
    if (has_gradient)
      checks.gradient(core::matrix_data<T>(p), core::matrix_data<T, true>(g), call.accumulate);
  }

  static bool is_lost(const matrix_view<const T>& p, index r) {
    bool finite = true;
    for (index c = 0; c < p.cols; ++c)
      finite = finite && std::isfinite(p(r, c));
    return !finite;
  }

  T run(const matrix_view<const T>& p, const core::integer_rows& labels, const matrix_view<T>& g,
        bool has_gradient, const call_options<T>& call) const {
    check(p, labels, g, has_gradient, call);
    std::vector<core::calibration_pair> pairs; // of all rows, ascending
    std::vector<index> label(static_cast<std::size_t>(p.rows));
    std::vector<bool> lost(label.size());
    bool any_lost = false;
    for (index r = 0; r < p.rows; ++r) {
      const auto i = static_cast<std::size_t>(r);
      const std::int64_t y = labels.at(0, r);
      label[i] = static_cast<index>(y);
      lost[i] = y != options_.ignore_index && is_lost(p, r);
      any_lost = any_lost || lost[i];
      for (index c = 0; c < p.cols && y != options_.ignore_index && !lost[i]; ++c)
        pairs.push_back({static_cast<double>(p(r, c)), r * p.cols + c, c == label[i]});
    }
    std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) {
      return a.p < b.p || (a.p == b.p && a.at < b.at);
    });

    const index events = options_.leave_class_out ? p.cols : 1;
    const index groups = std::min(events, most_groups);
    const auto elements = static_cast<std::size_t>(p.rows * p.cols);
    std::vector<double> values(static_cast<std::size_t>(events)),
        slopes(has_gradient ? elements * static_cast<std::size_t>(groups) : 0);
    const auto workers = std::min(static_cast<std::size_t>(groups), call.run_on.concurrency());
    core::share_out(groups, workers, call.run_on, [&](std::size_t) {
      return [&](index group) {
        core::calibration_event event({options_.window, options_.clusters, options_.tolerance});
        double* const sum = slopes.data() + static_cast<std::size_t>(group) * elements;
        for (index e = group; e < events; e += groups) {
          event.pairs.clear();
          for (const auto& pair : pairs)
            if (!options_.leave_class_out || label[static_cast<std::size_t>(pair.at / p.cols)] != e)
              event.pairs.push_back(pair);
          values[static_cast<std::size_t>(e)] = event.measure();
          if (has_gradient)
            event.differentiate(
                [&](const core::calibration_pair& pair, double slope) { sum[pair.at] += slope; });
        }
      };
    });

    const double share = events == 0 ? 0 : options_.scale / static_cast<double>(events);
    if (has_gradient)
      write(g, slopes, lost, groups, share * static_cast<double>(call.scale), call.accumulate);
    if (any_lost)
      return std::numeric_limits<T>::quiet_NaN();
    core::exact_sum total;
    for (const double value : values)
      total.add(value);
    return static_cast<T>(share * total.value());
  }

  static void write(const matrix_view<T>& g, const std::vector<double>& slopes,
                    const std::vector<bool>& lost, index groups, double scale, bool accumulate) {
    for (index r = 0; r < g.rows; ++r)
      for (index c = 0; c < g.cols; ++c) {
        double slope =
            lost[static_cast<std::size_t>(r)] ? std::numeric_limits<double>::quiet_NaN() : 0;
        for (index k = 0; k < groups; ++k)
          slope += slopes[static_cast<std::size_t>((k * g.rows + r) * g.cols + c)];
        slope *= scale;
        g(r, c) = static_cast<T>(accumulate ? static_cast<double>(g(r, c)) + slope : slope);
      }
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
