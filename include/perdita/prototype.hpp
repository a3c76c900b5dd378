// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/embeddings.hpp"
#include "core/point_cloud.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// A batch with a label for each row.
template <class T> struct labelled_rows {
  matrix_view<const T> rows;
  std::vector<std::int64_t> labels;

  template <class L>
  labelled_rows(const embedding_checks<T>& checks, const char* what, const matrix_view<const T>& m,
                const vector_view<L>& of)
      : rows(m) {
    checks.memory(what, m.data, m.rows * m.cols);
    const std::string name = std::string("labels of the ") + what;
    checks.size(name, of.size, m.rows);
    checks.memory(name, of.data, of.size);
    labels.resize(static_cast<std::size_t>(m.rows));
    read_labels<std::remove_const_t<L>>(of.data, of.stride, 0, m.rows, labels.data());
  }
  std::int64_t label(index r) const { return labels[static_cast<std::size_t>(r)]; }
};

template <class T>
void check_slopes(const embedding_checks<T>& checks, const char* what, const matrix_view<T>& g,
                  const matrix_view<const T>& like) {
  checks.size(std::string("rows of the gradient of the ") + what, g.rows, like.rows);
  checks.size(std::string("columns of the gradient of the ") + what, g.cols, like.cols);
  checks.memory(std::string("gradient of the ") + what, g.data, g.rows * g.cols);
}

/// Slopes of points in double, row by row.
class point_slopes {
public:
  point_slopes(index n, index dims) : dims_(dims), g_(static_cast<std::size_t>(n * dims)) {}
  /// Adds slope ∂D/∂a to row a and slope ∂D/∂b to row b of another, D = √(‖a − b‖² + ε).
  static void pull(const point_cloud& x, index a, point_slopes& of_x, const point_cloud& y, index b,
                   point_slopes& of_y, double slope, double distance) {
    const double *p = x.point(a), *q = y.point(b), by = distance > 0 ? slope / distance : 0;
    for (index k = 0; k < of_x.dims_; ++k) {
      const double step = by * (p[k] - q[k]);
      of_x.at(a, k) += step;
      of_y.at(b, k) -= step;
    }
  }
  template <class T> void store(const matrix_view<T>& to, const embedding_options<T>& call) const {
    store_slopes(to, call,
                 [this](index r, index k) { return g_[static_cast<std::size_t>(r * dims_ + k)]; });
  }

private:
  double& at(index r, index k) { return g_[static_cast<std::size_t>(r * dims_ + k)]; }

  index dims_;
  std::vector<double> g_;
};

/// Whether all numbers of the points that count are finite, and small enough for their squares and
/// sums of these.
template <class Counts> bool has_distances(const point_cloud& x, Counts counts) {
  for (index i = 0; i < x.size(); ++i) {
    const double* p = x.point(i);
    if (counts(i) && !std::all_of(p, p + x.dims(), [](double v) { return std::fabs(v) <= 1e150; }))
      return false;
  }
  return true;
}
inline bool has_distances(const point_cloud& x) {
  return has_distances(x, [](index) { return true; });
}

struct neighbour {
  double square = std::numeric_limits<double>::infinity();
  index at = -1;
};
/// The nearest points of y, in their order (of equals, the first come first), but the one skipped.
inline void find_nearest(const point_cloud& y, const double* p, index skipped, neighbour* to,
                         index n) {
  std::fill_n(to, n, neighbour{});
  alignas(64) double squares[lanes<double>];
  for (index b = 0; b < y.blocks(); ++b) {
    const auto found = y.squares(p, b, skipped);
    if (!any(found < pack<double>(to[n - 1].square)))
      continue;
    found.store(squares);
    for (index i = 0; i < per_pack; ++i) {
      if (!(squares[i] < to[n - 1].square))
        continue;
      index place = n - 1;
      for (; place > 0 && squares[i] < to[place - 1].square; --place)
        to[place] = to[place - 1];
      to[place] = {squares[i], b * per_pack + i};
    }
  }
}

} // namespace core

/// Prototypes of classes: the means of their rows, and the way back.
///
///   c_k = (1/n_k) Σ_{i of k} x_i,   ∂/∂x_i = (1/n_k) ∂/∂c_k, k the label of i
///
/// A class without rows has the prototype 0. Sums are in double, row after row. Labels from 0 to
/// the number of prototypes − 1. Throws std::invalid_argument.
template <class T, core::labels_like L>
void class_means(std::type_identity_t<matrix_view<const T>> x, L&& labels, matrix_view<T> means) {
  constexpr core::embedding_checks<T> checks{"class_means"};
  const core::labelled_rows<T> of(checks, "rows", x, core::as_vector(labels));
  checks.size("columns of the means", means.cols, x.cols);
  checks.memory("means", means.data, means.rows * means.cols);
  std::vector<double> sums(static_cast<std::size_t>(means.rows * means.cols));
  std::vector<double> counts(static_cast<std::size_t>(means.rows));
  for (index r = 0; r < x.rows; ++r)
    if (of.label(r) < 0 || of.label(r) >= means.rows)
      core::fail_at(checks.name, "labels", r, core::to_text(of.label(r)),
                    "0 to " + core::to_text(means.rows - 1));
  for (index r = 0; r < x.rows; ++r) {
    const auto k = static_cast<index>(of.label(r));
    ++counts[static_cast<std::size_t>(k)];
    for (index j = 0; j < x.cols; ++j)
      sums[static_cast<std::size_t>(k * x.cols + j)] += static_cast<double>(x(r, j));
  }
  for (index k = 0; k < means.rows; ++k)
    for (index j = 0; j < means.cols; ++j)
      means(k, j) = static_cast<T>(sums[static_cast<std::size_t>(k * x.cols + j)] /
                                   std::max(1.0, counts[static_cast<std::size_t>(k)]));
}
/// From the gradient of the means to that of the rows.
template <class T, core::labels_like L>
void class_means_gradient(std::type_identity_t<matrix_view<const T>> d_means, L&& labels,
                          matrix_view<T> d_x, const embedding_options<T>& call = {}) {
  constexpr core::embedding_checks<T> checks{"class_means_gradient"};
  const core::labelled_rows<T> of(checks, "gradient", d_x, core::as_vector(labels));
  checks.size("columns of the gradient of the means", d_means.cols, d_x.cols);
  checks.memory("gradient of the means", d_means.data, d_means.rows * d_means.cols);
  const core::extent memory[] = {core::bytes_of(core::matrix_data<T, true>(d_x)),
                                 core::bytes_of(core::matrix_data<T>(d_means))};
  core::require_apart(checks.name, memory, 1);
  std::vector<double> counts(static_cast<std::size_t>(d_means.rows));
  for (index r = 0; r < d_x.rows; ++r) {
    if (of.label(r) < 0 || of.label(r) >= d_means.rows)
      core::fail_at(checks.name, "labels", r, core::to_text(of.label(r)),
                    "0 to " + core::to_text(d_means.rows - 1));
    ++counts[static_cast<std::size_t>(of.label(r))];
  }
  core::store_slopes(d_x, call, [&](index r, index j) {
    const auto k = static_cast<index>(of.label(r));
    return static_cast<double>(d_means(k, j)) / counts[static_cast<std::size_t>(k)];
  });
}

/// Proto-Triplet: a query should be nearer to its own class's prototype than to any other's, by a
/// margin m:
///
///   L = (1/N) Σ_q max(0, D(q, c_y) − min_{k≠y} D(q, c_k) + m),  D(a, b) = √(‖a − b‖² + ε)
///   ∂D/∂a = (a − b)/D = −∂D/∂b
///
/// of the N queries whose label is not ignored. At the kink slopes are 0; of prototypes equally
/// near the first is taken. Shapes: queries × features and prototypes × features of T, a label for
/// each query, gradients of their matrices' shape, memory apart. class_means() makes prototypes of
/// a support set, and class_means_gradient() goes back to it. Special values: one prototype alone,
/// or no query that counts: 0 with gradients of 0. Query and prototype the same: D = √ε, gradient
/// 0. What is not finite, or squares to what is not, makes the value and both gradients NaN.
/// Everything is in double, from differences; memory: both sets three times in double; never
/// queries × prototypes. No bit depends on the number of threads. Throws std::invalid_argument.
/// Source: SuSana's code (with m = 0.5, ε = 1e-6).
///
///   perdita::proto_triplet<float> loss;
///   float value = loss(queries, prototypes, labels, d_queries, d_prototypes);
template <class T = float> class proto_triplet {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    double margin = 0.5;              ///< m, finite
    double epsilon = 1e-6;            ///< ε ≥ 0, added to squared distances
    std::int64_t ignore_index = -100; ///< label of a query that does not count
  };
  static constexpr const char* name = "proto_triplet";

  proto_triplet() : proto_triplet(options{}) {}
  explicit(false) proto_triplet(const options& o) : options_(o) {
    checks.finite("margin", o.margin);
    core::not_negative(name, "epsilon", o.epsilon);
  }
  const options& settings() const { return options_; }

  template <core::labels_like L>
  T operator()(matrix_view<const T> queries, matrix_view<const T> prototypes, L&& labels,
               const embedding_options<T>& call = {}) const {
    return run(queries, prototypes, core::as_vector(labels), nullptr, call);
  }
  /// The value, and the gradients with respect to queries and prototypes.
  template <core::labels_like L>
  T operator()(matrix_view<const T> queries, matrix_view<const T> prototypes, L&& labels,
               matrix_view<T> queries_gradient, matrix_view<T> prototypes_gradient,
               const embedding_options<T>& call = {}) const {
    const std::array<matrix_view<T>, 2> gradients{queries_gradient, prototypes_gradient};
    return run(queries, prototypes, core::as_vector(labels), &gradients, call);
  }

private:
  static constexpr core::embedding_checks<T> checks{name};
  struct triplet {
    double to_own = 0, to_other = 0;
    index other = -1;
    double miss(double margin) const { return (to_own - to_other) + margin; }
  };

  template <class L>
  T run(const matrix_view<const T>& queries, const matrix_view<const T>& prototypes,
        const vector_view<L>& labels, const std::array<matrix_view<T>, 2>* gradients,
        const embedding_options<T>& call) const {
    const core::labelled_rows<T> of(checks, "queries", queries, labels);
    check(of, prototypes, gradients);
    const core::point_cloud x{core::matrix_data<T>(queries)}, c{core::matrix_data<T>(prototypes)};
    const auto counts = [&](index q) { return of.label(q) != options_.ignore_index; };
    std::vector<triplet> found(static_cast<std::size_t>(queries.rows));
    core::for_row_blocks(queries.rows, call.run_on, [&](index first, index last) {
      for (index q = first; q < last; ++q)
        if (counts(q) && prototypes.rows > 1)
          found[static_cast<std::size_t>(q)] = find(x, c, q, static_cast<index>(of.label(q)));
    });
    double counted = 0;
    core::exact_sum total;
    for (index q = 0; q < queries.rows; ++q)
      if (counts(q)) {
        const triplet& t = found[static_cast<std::size_t>(q)];
        const double miss = prototypes.rows > 1 ? t.miss(options_.margin) : 0;
        total.add(miss <= 0 ? 0 : miss);
        ++counted;
      }
    if (!core::has_distances(x, counts) || !core::has_distances(c))
      return core::give_up(gradients, call);
    const double share = counted > 0 ? 1 / counted : 0;
    if (gradients)
      emit(x, c, of, found, share, *gradients, call);
    return static_cast<T>(total.value() * share);
  }

  void check(const core::labelled_rows<T>& queries, const matrix_view<const T>& prototypes,
             const std::array<matrix_view<T>, 2>* gradients) const {
    checks.memory("prototypes", prototypes.data, prototypes.rows * prototypes.cols);
    checks.size("columns of the prototypes", prototypes.cols, queries.rows.cols);
    if (gradients) {
      const auto& [of_queries, of_prototypes] = *gradients;
      core::check_slopes(checks, "queries", of_queries, queries.rows);
      core::check_slopes(checks, "prototypes", of_prototypes, prototypes);
      const core::extent memory[] = {core::bytes_of(core::matrix_data<T, true>(of_queries)),
                                     core::bytes_of(core::matrix_data<T, true>(of_prototypes)),
                                     core::bytes_of(core::matrix_data<T>(queries.rows)),
                                     core::bytes_of(core::matrix_data<T>(prototypes))};
      core::require_apart(name, memory, 2);
    }
    for (index q = 0; q < queries.rows.rows; ++q)
      if (const auto label = queries.label(q);
          label != options_.ignore_index && (label < 0 || label >= prototypes.rows))
        core::fail_at(name, "labels", q, core::to_text(label),
                      "0 to " + core::to_text(prototypes.rows - 1) + ", or ignore_index " +
                          core::to_text(options_.ignore_index));
  }
  triplet find(const core::point_cloud& x, const core::point_cloud& c, index q, index y) const {
    const double* p = x.point(q);
    alignas(64) double squares[core::lanes<double>];
    c.squares(p, y / core::per_pack, -1).store(squares);
    core::neighbour nearest;
    core::find_nearest(c, p, y, &nearest, 1);
    return {std::sqrt(squares[y % core::per_pack] + options_.epsilon),
            std::sqrt(nearest.square + options_.epsilon), nearest.at};
  }
  void emit(const core::point_cloud& x, const core::point_cloud& c,
            const core::labelled_rows<T>& of, const std::vector<triplet>& found, double share,
            const std::array<matrix_view<T>, 2>& gradients,
            const embedding_options<T>& call) const {
    core::point_slopes of_x(x.size(), x.dims()), of_c(c.size(), c.dims());
    for (index q = 0; q < x.size(); ++q) {
      const triplet& t = found[static_cast<std::size_t>(q)];
      if (t.other < 0 || !(t.miss(options_.margin) > 0))
        continue;
      const auto y = static_cast<index>(of.label(q));
      core::point_slopes::pull(x, q, of_x, c, y, of_c, share, t.to_own);
      core::point_slopes::pull(x, q, of_x, c, t.other, of_c, -share, t.to_other);
    }
    of_x.store(gradients[0], call);
    of_c.store(gradients[1], call);
  }

  options options_;
};

namespace core {

/// What ICNN knows of the neighbours of all origins, nearest first, and the score made of it.
class icnn_score {
public:
  struct member {
    index at;
    double distance;
    bool same; // of the origin's class
  };

  /// `considered` neighbours of each origin, of which k count; whether there are more targets.
  icnn_score(index origins, index k, index considered, bool more)
      : origins_(origins), k_(k), considered_(considered), more_(more),
        members_(static_cast<std::size_t>(origins * considered)) {}
  member* neighbours(index i) { return members_.data() + i * considered_; }
  const member* neighbours(index i) const { return members_.data() + i * considered_; }

  double score() {
    double alike = 0, apart = 0, share = 0;
    with_same_ = with_others_ = 0;
    farthest_ = {-1, 0, -1};
    for (index i = 0; i < origins_; ++i) {
      const double same = count_same(i);
      with_same_ += same > 0 ? 1 : 0;
      with_others_ += same < static_cast<double>(k_) ? 1 : 0;
      share += same / static_cast<double>(k_);
      for (index j = 0; j < k_; ++j)
        if (const member& m = neighbours(i)[j]; !m.same && m.distance > farthest_.distance)
          farthest_ = {i, j, m.distance};
    }
    for (index i = 0; i < origins_; ++i) {
      const double same = count_same(i);
      const spread s = spread_of(i);
      double sum_same = 0, sum_others = 0;
      for (index j = 0; j < k_; ++j) {
        const member& m = neighbours(i)[j];
        (m.same ? sum_same : sum_others) += m.distance;
      }
      alike += std::isinf(s.unit) ? 0 : sum_same / s.unit / (same + tiny);
      apart += sum_others / (static_cast<double>(k_) - same + tiny);
    }
    apart_ = apart;
    const double a = 1 - alike / (with_same_ + tiny);
    const double b =
        farthest_.row < 0 ? 1 : apart / (farthest_.distance + tiny) / (with_others_ + tiny);
    const double gamma = more_ ? share / static_cast<double>(origins_) : 1;
    return ((a + b) / 2 + gamma) / 2;
  }

  /// f(i, member, ∂(a + b)/∂distance), after score().
  template <class F> void each_slope(F f) const {
    for (index i = 0; i < origins_; ++i) {
      const member* m = neighbours(i);
      const double same = count_same(i), weight = 1 / ((with_same_ + tiny) * (same + tiny));
      const spread s = spread_of(i);
      double sum_same = 0;
      for (index j = 0; j < k_; ++j) {
        if (m[j].same && !std::isinf(s.unit)) {
          f(i, m[j], -weight / s.unit);
          sum_same += m[j].distance;
        }
        if (!m[j].same)
          f(i, m[j],
            1 / ((with_others_ + tiny) * (static_cast<double>(k_) - same + tiny) *
                 (farthest_.distance + tiny)));
      }
      if (s.by >= 0)
        f(i, m[s.by], weight * sum_same / s.unit / s.unit);
    }
    if (farthest_.row >= 0) {
      const double d = farthest_.distance + tiny;
      f(farthest_.row, neighbours(farthest_.row)[farthest_.place],
        -apart_ / (with_others_ + tiny) / d / d);
    }
  }

private:
  static constexpr double tiny = 1e-7;
  /// What distances of one class are measured in, and the neighbour whose distance that is.
  struct spread {
    double unit;
    index by;
  };
  struct place_of_farthest {
    index row, place;
    double distance;
  };

  double count_same(index i) const {
    double n = 0;
    for (index j = 0; j < k_; ++j)
      n += neighbours(i)[j].same ? 1 : 0;
    return n;
  }
  /// The distance of the first of another class, or that of the k-th where it is larger.
  spread spread_of(index i) const {
    const member* m = neighbours(i);
    index j = 0;
    while (j < considered_ && m[j].same)
      ++j;
    if (j == considered_)
      return {std::numeric_limits<double>::infinity(), -1};
    const double unit = m[j].distance + tiny;
    return m[k_ - 1].distance > unit ? spread{m[k_ - 1].distance, k_ - 1} : spread{unit, j};
  }

  index origins_, k_, considered_;
  bool more_;
  std::vector<member> members_;
  double with_same_ = 0, with_others_ = 0, apart_ = 0;
  place_of_farthest farthest_{-1, 0, -1};
};

} // namespace core

/// ICNN, the inter- and intra-class nearest neighbours score of a set of origins among targets, as
/// a loss: −log(score), score in (0, 1]. For each origin i let D_i1 ≤ D_i2 ≤ … be its distances D =
/// √(‖a − b‖² + ε) to its nearest targets (the very nearest dropped), c_ij whether they are of its
/// class, and of the first k of them C_i of its class and E_i = k − C_i not:
///
///   r_i  the first D_ij with c_ij = 0 among the nearest `considered`
///   A = 1 − Σ_i Σ_{j≤k} c_ij D_ij/max(r_i + e, D_ik)/(C_i + e)/(#{C > 0} + e)
///   B = Σ_i Σ_{j≤k} (1 − c_ij) D_ij/(D_max + e)/(E_i + e)/(#{E > 0} + e), D_max the largest of
///       these D_ij; 1 where there are none
///   γ = the mean of C_i/k; 1 if there are no more than k + 2 targets
///   score = ((A + B)/2 + γ)/2,  e = 1e-7
///
/// where an origin with no r_i has no part in A's sum. The gradient goes through all distances,
/// those of r_i, D_ik and D_max too; which neighbours there are, and γ, have none, so that the
/// value jumps where neighbours change places. k falls to the number of targets − 2 where they are
/// few. The nearest target is dropped because it is the origin itself where origins are among the
/// targets; where they are not, as with queries and prototypes, the authors' code drops the nearest
/// prototype all the same: drop_nearest = false does not.
///
///   loss(origins, origin_labels, targets, target_labels, d_origins, d_targets)
///   loss.within(x, labels, d_x)                     origins and targets are the same
///
/// Shapes: rows × features of T, labels of any integral type, of which only equality matters;
/// gradients of their matrices' shape, memory apart.
/// Special values: fewer than 3 targets: throws. No origins: 0. All of one class: A = B = γ = 1,
/// value 0, gradient 0. Equal embeddings: D = √ε with gradient 0; the one of the lower number is
/// nearer. What is not finite, or above 1e150, makes the value and gradients NaN.
/// Everything is in double, from differences; memory: both sets three times in double and
/// `considered` neighbours of each origin; never origins × targets. No bit depends on the number of
/// threads. Throws std::invalid_argument.
/// Source: SuSana's code, which leaves out a variance and the exponents of the score of García
/// Ramírez, "ICNN: the inter- and intraclass nearest neighbors score", 2021.
template <class T = float> class icnn {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);

public:
  using value_type = T;
  struct options {
    index neighbours = 4;     ///< k, 1 or more
    index considered = 0;     ///< for r_i: k or more; 0 is k + 1
    double epsilon = 1e-6;    ///< ε ≥ 0, added to squared distances
    bool drop_nearest = true; ///< the nearest target of each origin does not count
  };
  static constexpr const char* name = "icnn";

  icnn() : icnn(options{}) {}
  explicit(false) icnn(const options& o) : options_(o) {
    core::require(o.neighbours >= 1, name, "neighbours", o.neighbours, "1 or more");
    core::require(o.considered == 0 || o.considered >= o.neighbours, name, "considered",
                  o.considered, "0, or as many as neighbours or more");
    core::not_negative(name, "epsilon", o.epsilon);
  }
  const options& settings() const { return options_; }

  template <core::labels_like L, core::labels_like K>
  T operator()(matrix_view<const T> origins, L&& origin_labels, matrix_view<const T> targets,
               K&& target_labels, const embedding_options<T>& call = {}) const {
    const rows of(checks, "origins", origins, core::as_vector(origin_labels)),
        to(checks, "targets", targets, core::as_vector(target_labels));
    return run<2>(of, to, nullptr, call);
  }
  template <core::labels_like L, core::labels_like K>
  T operator()(matrix_view<const T> origins, L&& origin_labels, matrix_view<const T> targets,
               K&& target_labels, matrix_view<T> origins_gradient, matrix_view<T> targets_gradient,
               const embedding_options<T>& call = {}) const {
    const rows of(checks, "origins", origins, core::as_vector(origin_labels)),
        to(checks, "targets", targets, core::as_vector(target_labels));
    const std::array<matrix_view<T>, 2> gradients{origins_gradient, targets_gradient};
    return run<2>(of, to, &gradients, call);
  }
  template <core::labels_like L>
  T within(matrix_view<const T> x, L&& labels, const embedding_options<T>& call = {}) const {
    const rows of(checks, "origins", x, core::as_vector(labels));
    return run<1>(of, of, nullptr, call);
  }
  template <core::labels_like L>
  T within(matrix_view<const T> x, L&& labels, matrix_view<T> gradient,
           const embedding_options<T>& call = {}) const {
    const rows of(checks, "origins", x, core::as_vector(labels));
    const std::array<matrix_view<T>, 1> gradients{gradient};
    return run<1>(of, of, &gradients, call);
  }

private:
  using rows = core::labelled_rows<T>;
  static constexpr core::embedding_checks<T> checks{name};

  template <std::size_t N>
  T run(const rows& of, const rows& to, const std::array<matrix_view<T>, N>* gradients,
        const embedding_options<T>& call) const {
    check(of, to, gradients);
    const core::point_cloud x{core::matrix_data<T>(of.rows)}, y{core::matrix_data<T>(to.rows)};
    const index k = std::min(options_.neighbours, y.size() - 2), dropped = options_.drop_nearest;
    const index considered =
        std::min(options_.considered > 0 ? options_.considered : k + 1, y.size() - dropped);
    if (x.size() == 0) {
      store<N>(gradients, core::point_slopes(0, x.dims()), core::point_slopes(y.size(), y.dims()),
               call);
      return 0;
    }
    if (!core::has_distances(x) || !core::has_distances(y))
      return core::give_up(gradients, call);
    core::icnn_score found(x.size(), k, std::max(k, considered), k + 2 < y.size());
    find(of, to, x, y, std::max(k, considered), found, call.run_on);
    const double score = found.score();
    if (gradients) {
      core::point_slopes of_x(x.size(), x.dims()), of_y(y.size(), y.dims());
      found.each_slope([&](index i, const core::icnn_score::member& m, double slope) {
        core::point_slopes::pull(x, i, of_x, y, m.at, N == 1 ? of_x : of_y, -slope / (4 * score),
                                 m.distance);
      });
      store<N>(gradients, of_x, of_y, call);
    }
    return static_cast<T>(-std::log(score));
  }
  template <std::size_t N>
  static void store(const std::array<matrix_view<T>, N>* gradients, const core::point_slopes& of_x,
                    const core::point_slopes& of_y, const embedding_options<T>& call) {
    if (!gradients)
      return;
    of_x.store((*gradients)[0], call);
    if constexpr (N == 2)
      of_y.store((*gradients)[1], call);
  }
  template <std::size_t N>
  void check(const rows& of, const rows& to, const std::array<matrix_view<T>, N>* gradients) const {
    checks.size("columns of the targets", to.rows.cols, of.rows.cols);
    core::require(to.rows.rows >= 3, name, "targets", to.rows.rows, "at least 3");
    if (!gradients)
      return;
    core::check_slopes(checks, "origins", (*gradients)[0], of.rows);
    if constexpr (N == 2)
      core::check_slopes(checks, "targets", (*gradients)[1], to.rows);
    std::vector<core::extent> memory;
    for (const auto& g : *gradients)
      memory.push_back(core::bytes_of(core::matrix_data<T, true>(g)));
    memory.push_back(core::bytes_of(core::matrix_data<T>(of.rows)));
    memory.push_back(core::bytes_of(core::matrix_data<T>(to.rows)));
    core::require_apart(name, memory, N);
  }
  void find(const rows& of, const rows& to, const core::point_cloud& x, const core::point_cloud& y,
            index considered, core::icnn_score& found, const executor& run_on) const {
    core::for_row_blocks(x.size(), run_on, [&](index first, index last) {
      const index dropped = options_.drop_nearest ? 1 : 0;
      std::vector<core::neighbour> nearest(static_cast<std::size_t>(considered + dropped));
      for (index i = first; i < last; ++i) {
        core::find_nearest(y, x.point(i), -1, nearest.data(), considered + dropped);
        for (index j = 0; j < considered; ++j) {
          const core::neighbour& n = nearest[static_cast<std::size_t>(j + dropped)];
          found.neighbours(i)[j] = {n.at, std::sqrt(n.square + options_.epsilon),
                                    to.label(n.at) == of.label(i)};
        }
      }
    });
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
