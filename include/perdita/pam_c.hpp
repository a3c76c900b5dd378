// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "core/compared_rows.hpp"
#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

/// A sparse matrix by rows: row i has the elements begin[i] … begin[i + 1] − 1 of column and
/// weight.
template <class T, class I = std::int32_t> struct sparse_rows {
  vector_view<const I> begin, column;
  vector_view<const T> weight;
};

namespace core {

/// Vectors in double, of length 1 or 0, and slopes of their cosines in the making.
struct cosine_points {
  index n, d;
  std::vector<double> x, factor; ///< unit vectors, and 1/length of what they were

  /// `x` holds them as they are.
  cosine_points(index points, index dims, std::vector<double> from, const executor& run_on)
      : n(points), d(dims), x(std::move(from)), factor(static_cast<std::size_t>(n)) {
    for_row_blocks(n, run_on, [this](index first, index last) {
      for (index i = first; i < last; ++i) {
        factor[static_cast<std::size_t>(i)] = inverse_norm(point(i), d);
        for (index k = 0; k < d; ++k)
          x[static_cast<std::size_t>(i * d + k)] *= factor[static_cast<std::size_t>(i)];
      }
    });
  }
  const double* point(index i) const { return x.data() + i * d; }
  double cosine(index i, index j) const { return wide_dot(point(i), point(j), d); }
  void add(double slope, index j, double* to) const {
    for (index k = 0; k < d; ++k)
      to[k] += slope * point(j)[k];
  }
  /// From the gradient of unit vector i to that of the vector.
  void project(index i, double* g) const {
    const double along = wide_dot(g, point(i), d);
    for (index k = 0; k < d; ++k)
      g[k] = factor[static_cast<std::size_t>(i)] * (g[k] - along * point(i)[k]);
  }
};

} // namespace core

/// Contrast with meta-nodes in the place of negatives: nodes z of a graph with weights A ≥ 0 of
/// neighbours, and clusters whose meta-nodes C_a = Σ_{i ∈ a} z_i stand for their members,
///
///   L = −mean_i log(x_i + ε) + mean_a log(y_a + ε)
///   x_i = Σ_j A_ij e^{σ cos(z_i, z_j)},   y_a = Σ_b e^{σ cos(C_a, C_b)}
///
/// where a node's, and a meta-node's, cosine with itself counts as 0 (so that y_a ≥ 1), with
///
///   ∂L/∂cos(z_i, z_j) = −σ A_ij e^{σ cos}/(n (x_i + ε))
///   ∂L/∂cos(C_a, C_b) = σ e^{σ cos}/(k (y_a + ε))
///
/// Shapes: z and its gradient nodes × features, of T, any strides, memory apart; A nodes × nodes,
/// sparse (a row-normalised power of the adjacency matrix with self-loops); one cluster per node:
/// integers, of which those that occur are the k clusters. A and the clusters are constants.
/// Special values: a zero node, and a meta-node of length 0, have cosines of 0 and no gradient; a
/// node without neighbours has x = 0, hence the term −log ε. Where the value is not finite, all
/// gradients are NaN. No nodes: 0.
/// Sums are in double; O((elements of A + k²) d) time, O(n d + elements of A) memory. No bit
/// depends on the number of threads. Throws std::invalid_argument, for weights that are negative or
/// not finite, too.
/// Source: PamC, contrast with a meta-node proxy (code: gayanku/PAMC), of which this is the
/// contrastive term; the training adds 0.1 KL(p ‖ q) of a deep embedded clustering to 2 L.
///
///   perdita::pam_c<float> loss;
///   float value = loss(z, {begin, column, weight}, clusters, d_z);
template <class T = float> class pam_c {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double sharpness = 1; ///< σ, above 0 and up to 500: multiplies the cosines
    double floor = 1e-10; ///< ε ≥ 0
  };
  static constexpr const char* name = "pam_c";

  pam_c() : pam_c(options{}) {}
  explicit(false) pam_c(const options& o) : options_(o) {
    core::require(o.sharpness > 0 && o.sharpness <= 500, name, "sharpness", o.sharpness,
                  "a number above 0, 500 at the most");
    core::require(o.floor >= 0 && std::isfinite(o.floor), name, "floor", o.floor,
                  "a finite number, not negative");
  }
  const options& settings() const { return options_; }

  template <class I = std::int32_t, core::labels_like L>
  T operator()(matrix_view<const T> z, const sparse_rows<T, I>& weights, L&& clusters,
               const embedding_options<T>& call = {}) const {
    return run(z, weights, core::as_vector(clusters), nullptr, call);
  }
  /// The value, and the gradient with respect to z.
  template <class I = std::int32_t, core::labels_like L>
  T operator()(matrix_view<const T> z, const sparse_rows<T, I>& weights, L&& clusters,
               matrix_view<T> gradient, const embedding_options<T>& call = {}) const {
    return run(z, weights, core::as_vector(clusters), &gradient, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};

  template <class I>
  T run(const matrix_view<const T>& z, const sparse_rows<T, I>& a, const auto& labels,
        const matrix_view<T>* gradient, const embedding_options<T>& call) const {
    const index n = z.rows, d = z.cols;
    check(z, a, labels, gradient);
    if (n == 0)
      return 0;
    const std::vector<index> cluster = number(labels);
    const index k = 1 + *std::max_element(cluster.begin(), cluster.end());
    std::vector<double> raw(static_cast<std::size_t>(n * d));
    std::vector<double> sums(static_cast<std::size_t>(k * d));
    for (index i = 0; i < n; ++i)
      for (index c = 0; c < d; ++c) {
        const double x = static_cast<double>(z(i, c));
        raw[static_cast<std::size_t>(i * d + c)] = x;
        sums[static_cast<std::size_t>(cluster[static_cast<std::size_t>(i)] * d + c)] += x;
      }
    const core::cosine_points nodes(n, d, std::move(raw), call.run_on);
    const core::cosine_points meta(k, d, std::move(sums), call.run_on);
    std::vector<double> slopes(gradient ? nodes.x.size() : 0);
    const double attraction = attract(nodes, a, slopes, call.run_on); // sets slopes; the other adds
    const double value = attraction + repel(meta, cluster, slopes, call.run_on);
    if (gradient)
      core::store_slopes(*gradient, call, [&](index i, index c) {
        return std::isfinite(value) ? slopes[static_cast<std::size_t>(i * d + c)]
                                    : std::numeric_limits<double>::quiet_NaN();
      });
    return static_cast<T>(value);
  }

  template <class I>
  static void check(const matrix_view<const T>& z, const sparse_rows<T, I>& a, const auto& labels,
                    const matrix_view<T>* gradient) {
    const std::array<matrix_view<const T>, 1> inputs{z};
    const std::array<matrix_view<T>, 1> outputs{gradient ? *gradient : matrix_view<T>()};
    checks.batches(inputs, gradient ? &outputs : nullptr,
                   {core::bytes_of(labels), core::bytes_of(a.begin), core::bytes_of(a.column),
                    core::bytes_of(a.weight)});
    checks.size("clusters", labels.size, z.rows);
    checks.memory("clusters", labels.data, z.rows);
    checks.size("begin", a.begin.size, z.rows + 1);
    checks.memory("begin", a.begin.data, z.rows + 1);
    checks.size("weights", a.weight.size, a.column.size);
    checks.memory("columns", a.column.data, a.column.size);
    checks.memory("weights", a.weight.data, a.weight.size);
    for (index i = 0; i <= z.rows; ++i) {
      const auto at = static_cast<index>(a.begin[i]);
      if (at < (i > 0 ? static_cast<index>(a.begin[i - 1]) : 0) || at > a.column.size)
        core::fail_at(name, "begin", i, core::to_text(at),
                      "numbers that do not fall, up to that of the elements");
    }
    for (index e = 0; e < a.column.size; ++e) {
      if (a.column[e] < 0 || static_cast<index>(a.column[e]) >= z.rows)
        core::fail_at(name, "columns", e, core::to_text(a.column[e]), "the number of a node");
      if (!(a.weight[e] >= T(0)) || !std::isfinite(a.weight[e]))
        core::fail_at(name, "weights", e, core::to_text(a.weight[e]),
                      "a finite number, not negative");
    }
  }
  /// Clusters from 0, in the order in which they occur.
  static std::vector<index> number(const auto& labels) {
    std::unordered_map<std::int64_t, index> seen;
    std::vector<index> result(static_cast<std::size_t>(labels.size));
    for (index i = 0; i < labels.size; ++i)
      result[static_cast<std::size_t>(i)] =
          seen.try_emplace(static_cast<std::int64_t>(labels[i]), static_cast<index>(seen.size()))
              .first->second;
    return result;
  }
  static double mean_of(const std::vector<double>& x) {
    core::exact_sum sum;
    for (const double v : x)
      sum.add(v);
    return sum.value() / static_cast<double>(x.size());
  }

  /// −mean_i log(x_i + ε). Slopes of elements are stored, and gathered by row and by column.
  template <class I>
  double attract(const core::cosine_points& z, const sparse_rows<T, I>& a,
                 std::vector<double>& slopes, const executor& run_on) const {
    std::vector<double> terms(static_cast<std::size_t>(z.n));
    std::vector<double> of_element(static_cast<std::size_t>(a.column.size));
    const auto ends = [&](index i) {
      return std::pair(static_cast<index>(a.begin[i]), static_cast<index>(a.begin[i + 1]));
    };
    core::for_row_blocks(z.n, run_on, [&](index first, index last) {
      for (index i = first; i < last; ++i) {
        const auto [begin, end] = ends(i);
        double sum = options_.floor;
        for (index e = begin; e < end; ++e) {
          const auto j = static_cast<index>(a.column[e]);
          double& image = of_element[static_cast<std::size_t>(e)];
          image = static_cast<double>(a.weight[e]) *
                  (i == j ? 1 : std::exp(options_.sharpness * z.cosine(i, j)));
          sum += image;
        }
        terms[static_cast<std::size_t>(i)] = -std::log(sum);
        const double share = -options_.sharpness / (static_cast<double>(z.n) * sum);
        for (index e = begin; e < end; ++e)
          of_element[static_cast<std::size_t>(e)] *=
              static_cast<index>(a.column[e]) == i || sum == 0 ? 0 : share;
      }
    });
    if (!slopes.empty()) {
      const auto [begin, element, row] = transposed(z.n, a);
      core::for_row_blocks(
          z.n, run_on,
          [&, &begin = begin, &element = element, &row = row](index first, index last) {
            for (index i = first; i < last; ++i) {
              double* const g = slopes.data() + i * z.d;
              for (index e = ends(i).first; e < ends(i).second; ++e)
                z.add(of_element[static_cast<std::size_t>(e)], static_cast<index>(a.column[e]), g);
              for (auto t = begin[static_cast<std::size_t>(i)];
                   t < begin[static_cast<std::size_t>(i) + 1]; ++t)
                z.add(of_element[element[t]], row[t], g);
              z.project(i, g);
            }
          });
    }
    return mean_of(terms);
  }
  /// The elements of each column: where they begin, which they are, and their rows.
  struct columns {
    std::vector<std::size_t> begin, element;
    std::vector<index> row;
  };
  template <class I> static columns transposed(index n, const sparse_rows<T, I>& a) {
    const auto size = static_cast<std::size_t>(a.column.size);
    columns result{std::vector<std::size_t>(static_cast<std::size_t>(n) + 1),
                   std::vector<std::size_t>(size), std::vector<index>(size)};
    for (index i = 0; i < n; ++i)
      for (auto e = static_cast<index>(a.begin[i]); e < static_cast<index>(a.begin[i + 1]); ++e)
        ++result.begin[static_cast<std::size_t>(a.column[e]) + 1];
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
      result.begin[i + 1] += result.begin[i];
    std::vector<std::size_t> next(result.begin);
    for (index i = 0; i < n; ++i)
      for (auto e = static_cast<index>(a.begin[i]); e < static_cast<index>(a.begin[i + 1]); ++e) {
        const std::size_t at = next[static_cast<std::size_t>(a.column[e])]++;
        result.element[at] = static_cast<std::size_t>(e);
        result.row[at] = i;
      }
    return result;
  }

  /// mean_a log(y_a + ε). No matrix of cosines is held: they are made again for the gradient.
  double repel(const core::cosine_points& meta, const std::vector<index>& cluster,
               std::vector<double>& slopes, const executor& run_on) const {
    const auto k = static_cast<std::size_t>(meta.n);
    std::vector<double> terms(k), sums(k), of_meta(slopes.empty() ? 0 : meta.x.size());
    const auto image = [&, this](index a, index b) {
      return std::exp(options_.sharpness * meta.cosine(a, b));
    };
    core::for_row_blocks(meta.n, run_on, [&, this](index first, index last) {
      for (index a = first; a < last; ++a) {
        double sum = options_.floor + 1;
        for (index b = 0; b < meta.n; ++b)
          sum += a == b ? 0 : image(a, b);
        sums[static_cast<std::size_t>(a)] = sum;
        terms[static_cast<std::size_t>(a)] = std::log(sum);
      }
    });
    if (!slopes.empty()) {
      core::for_row_blocks(meta.n, run_on, [&, this](index first, index last) {
        for (index a = first; a < last; ++a) {
          double* const g = of_meta.data() + a * meta.d;
          for (index b = 0; b < meta.n; ++b)
            if (a != b)
              meta.add(options_.sharpness / static_cast<double>(meta.n) * image(a, b) *
                           (1 / sums[static_cast<std::size_t>(a)] +
                            1 / sums[static_cast<std::size_t>(b)]),
                       b, g);
          meta.project(a, g);
        }
      });
      for (std::size_t i = 0; i < cluster.size(); ++i)
        for (index c = 0; c < meta.d; ++c)
          slopes[i * static_cast<std::size_t>(meta.d) + static_cast<std::size_t>(c)] +=
              of_meta[static_cast<std::size_t>(cluster[i] * meta.d + c)];
    }
    return mean_of(terms);
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
