// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"
#include "core/embeddings.hpp"

namespace perdita::inline PERDITA_ABI {

// Who a learned embedding takes for its neighbours: q(j|i) ∝ e^{logit}. Yours may be another: a
// type with `distances` (of what the scores are: squared distances, or cosines and products),
// logit(x) and its slope(x) on packs, and the factor by which Σ ∂/∂logit · logit becomes the
// derivative by its parameter.

/// e^{−d²/(2σ²)}
struct gaussian_neighbours {
  static constexpr bool distances = true;
  double sigma = 1;
  template <class V> V logit(const V& square) const { return square * slope(square); }
  template <class V> V slope(const V&) const {
    return V(static_cast<typename V::value_type>(-0.5 / (sigma * sigma)));
  }
  double by_parameter() const { return -2 / sigma; }
  bool valid() const { return sigma > 0 && std::isfinite(sigma); }
};
/// 1/(1 + d²): Student's t with one degree of freedom
struct student_neighbours {
  static constexpr bool distances = true;
  template <class V> V logit(const V& square) const { return -core::log1p(square); }
  template <class V> V slope(const V& square) const { return V(-1) / (square + V(1)); }
  double by_parameter() const { return 0; }
  bool valid() const { return true; }
};
/// e^{⟨x, y⟩/τ}
struct cosine_neighbours {
  static constexpr bool distances = false;
  double temperature = 0.07;
  template <class V> V logit(const V& cosine) const { return cosine * slope(cosine); }
  template <class V> V slope(const V&) const {
    return V(static_cast<typename V::value_type>(1 / temperature));
  }
  double by_parameter() const { return -1 / temperature; }
  bool valid() const { return temperature > 0 && std::isfinite(temperature); }
};

template <class Neighbours> struct i_con_options {
  Neighbours neighbours{};                        ///< q
  double debias = 0;                              ///< α of [0, 1]: p becomes (1 − α) p + α/n
  bool divergence = false;                        ///< the divergence, not the cross-entropy
  bool normalise = true;                          ///< embeddings become unit vectors first
  perdita::reduction reduction = reduction::mean; ///< of the anchors that belong to any
  /// Where given, ∂value/∂(σ or τ) goes there if gradients are asked for.
  double* d_parameter = nullptr;
};

namespace core {

/// An anchor's supervision: its relations above 0, with the sum 1, debiased by a share α that is
/// even over all it is compared with.
template <class T> struct debiased_shares {
  using V = pack<T>;
  V factor{0}, even{0};
  bool any; ///< otherwise the anchor has no supervision

  debiased_shares(const anchor_row<T>& row, double debias) {
    lane_sums<T, 2> sums; // Σ p, and how many
    for_chosen(
        row, compared{}, [&](const V&, const auto& mask, index j) __attribute__((always_inline)) {
          sums.some[0] += max(V(0), V::load(row.relation + j));
          sums.some[1] += select(mask, V(1), V(0));
          sums.count_pack();
        });
    const double all = sums.total(0);
    any = all != 0;
    if (!any)
      return;
    factor = V(static_cast<T>((1 - debias) / all));
    even = V(static_cast<T>(debias / sums.total(1)));
  }
  PERDITA_INLINE V of(const V& relation) const { return fma(max(V(0), relation), factor, even); }
};

template <class Neighbours> struct i_con_formula : anchor_formula {
  static constexpr bool distances = Neighbours::distances;
  Neighbours q;
  double debias;
  bool divergence;

  i_con_formula(const Neighbours& neighbours, double alpha, bool whole)
      : q(neighbours), debias(alpha), divergence(whole) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const auto logit = [this](const V& x) __attribute__((always_inline)) { return q.logit(x); };
    const debiased_shares<T> given(row, debias);
    if (!given.any)
      return {0, false};
    const auto p = [&](const V& relation) __attribute__((always_inline)) {
      return select(relation == V(0), V(0), given.of(relation));
    };
    const chosen_images<T, decltype(logit)> learned(row, compared{}, logit);
    const V top(learned.top());
    lane_sums<T, 2> sums; // Σ p (logit − top), Σ p log p
    for_chosen(
        row, compared{}, [&](const V& x, const auto&, index j) __attribute__((always_inline)) {
          const V share = p(V::load(row.relation + j));
          const auto none = share == V(0);
          sums.some[0] += select(none, V(0), share * (logit(x) - top));
          if (divergence)
            sums.some[1] += select(none, V(0), share * log(share));
          sums.count_pack();
        });
    anchor_outcome out;
    out.value = learned.log_above() - sums.total(0) + sums.total(1);
    if constexpr (Gradient) {
      const V to_share = learned.factor(1);
      lane_sums<T, 1> along; // Σ (q − p) (logit − top): the difference adds up to 0
      for_chosen(
          row,
          compared{}, [&](const V& x, const auto& mask, index j) __attribute__((always_inline)) {
            const V pull = learned.images(x) * to_share - p(V::load(row.relation + j));
            along.some[0] += select(mask, pull * (logit(x) - top), V(0));
            along.count_pack();
            (pull * q.slope(x)).store(row.scores + j);
          });
      out.extra[0] = q.by_parameter() * along.total(0);
    }
    return out;
  }
};

} // namespace core

/// I-Con: the divergence between who an embedding's neighbours are said to be, p(j|i), and who it
/// takes for them, q(j|i):
///
///   ℓ_i = −Σ_j p_ij log q_ij,  and with `divergence` + Σ_j p_ij log p_ij
///   ∂ℓ_i/∂logit_ij = q_ij − p_ij
///
/// over all j that i is compared with, and the mean over anchors i that have a p. Of the
/// supervision p is, for each anchor, even over who belongs to it,
///
///   loss.views(x, 2, d_x)    its other view         (cosine_neighbours: SimCLR)
///   loss(x, labels, d_x)     its class              (cosine_neighbours: SupCon "out")
///   loss(x, classes, labels, numbers, d_x, d_c)     its class's prototype: cross-entropy
///
/// or given, by a filter: what it sets above 0 is p up to a factor, −1 stands for p = 0 (SNE with
/// gaussian_neighbours, and its heavy-tailed form with student_neighbours):
///
///   const auto rows_of_p = [&](index i, float* p, index n) { … };
///   loss(x, d_x, {.filter = rows_of_p})
///
/// For unit vectors gaussian_neighbours with σ² are cosine_neighbours with τ = σ². Errors of the
/// slopes are rounding errors of p and q, so those of an anchor that is sure of its only neighbour
/// are not relative to the slope, as sup_con's are.
///
/// Anchors without p do not count. All embeddings equal: log of their number less one. See
/// anchor_loss for calls, shapes, special values and errors. Throws where σ or τ is not above 0 or
/// `debias` is outside [0, 1].
///
/// Source: Alshammari et al., "I-Con: a unifying framework for representation learning", ICLR 2025;
/// Hinton, Roweis, "Stochastic neighbor embedding", 2002; van der Maaten, Hinton, 2008.
template <class T, class Neighbours = cosine_neighbours>
class i_con : public anchor_loss<i_con<T, Neighbours>, T> {
public:
  using options = i_con_options<Neighbours>;
  static constexpr const char* name = "i_con";

  i_con() : i_con(options{}) {}
  explicit i_con(const options& o) : options_(o) {
    if (!o.neighbours.valid())
      core::fail(name, "a parameter of the neighbours", "0, negative or not finite",
                 "a finite number above 0");
    core::require(o.debias >= 0 && o.debias <= 1, name, "debias", o.debias, "a number in [0, 1]");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  /// With p from the call's filter.
  using anchor_loss<i_con<T, Neighbours>, T>::operator();
  template <class X>
  requires core::scores_like<X, T> T operator()(X&& x, const anchor_options<T>& call) const {
    return this->views(x, 1, call);
  }
  template <class X>
  requires core::scores_like<X, T> T operator()(X&& x, matrix_view<T> d_x,
                                                const anchor_options<T>& call) const {
    return this->views(x, 1, d_x, call);
  }

private:
  friend core::anchor_access;
  core::i_con_formula<Neighbours> formula() const {
    return {options_.neighbours, options_.debias, options_.divergence};
  }
  void set_extra(core::anchor_job<T>& job) const { job.extra[0] = options_.d_parameter; }

  options options_;
};

struct i_con_clusters_options {
  bool logits = true;                             ///< rows are logits of f; otherwise f itself
  double debias = 0;                              ///< α of [0, 1]: p becomes (1 − α) p + α/N
  bool divergence = false;                        ///< the divergence, not the cross-entropy
  perdita::reduction reduction = reduction::mean; ///< of the anchors that belong to any
};

namespace core {

/// The scores are q itself.
struct cluster_formula : anchor_formula {
  double debias;
  bool divergence;

  cluster_formula(double alpha, bool whole) : debias(alpha), divergence(whole) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const debiased_shares<T> given(row, debias);
    if (!given.any)
      return {0, false};
    lane_sums<T, 2> sums; // Σ p log q, Σ p log p
    for_chosen(
        row, compared{}, [&](const V& q, const auto& mask, index j) __attribute__((always_inline)) {
          const V p = given.of(V::load(row.relation + j));
          const auto counts = mask & (p > V(0));
          sums.some[0] += select(counts, p * log(q), V(0));
          if (divergence)
            sums.some[1] += select(counts, p * log(p), V(0));
          sums.count_pack();
          if constexpr (Gradient)
            select(counts, -p / q, V(0)).store(row.scores + j);
        });
    return {sums.total(1) - sums.total(0)};
  }
};

/// One traversal of f and of f/n.
template <class T> class cluster_pass : public anchor_loss<cluster_pass<T>, T> {
public:
  static constexpr const char* name = "i_con_clusters";
  struct options {
    perdita::reduction reduction;
    bool normalise = false;
  };
  cluster_pass(const cluster_formula& f, perdita::reduction how) : formula_(f), options_{how} {}
  const options& settings() const { return options_; }
  const cluster_formula& formula() const { return formula_; }

private:
  cluster_formula formula_;
  options options_;
};

} // namespace core

/// I-Con with clusters for neighbours: f_ic is the probability that item i is in cluster c, and q
/// that of meeting j when one draws one of i's clusters and then one of its items,
///
///   q_ij = Σ_c f_ic f_jc/n_c,  n_c = Σ_k f_kc        (j = i, too: rows of q sum up to 1)
///   ℓ_i = −Σ_j p_ij log q_ij,  and with `divergence` + Σ_j p_ij log p_ij
///   ∂L/∂f = (A + Aᵀ) F diag(1/n) − 1 (diag(Fᵀ A F)/n²)ᵀ,  A_ij = ∂L/∂q_ij = −p_ij/(N q_ij)
///
/// and the mean over the N anchors that have a p. Of the supervision p is even over the others of
/// an item's class, or over its other views, or given by a filter (see i_con); p_ii = 0 but for
/// `debias`, which has a share for the item itself.
///
///   loss(x, labels, d_x)      loss.views(x, 2, d_x)      loss(x, d_x, {.filter = rows_of_p})
///
/// x and d_x are matrices of T, items × clusters, any strides, and memory apart: logits, f being
/// each row's softmax, or f. Special values: all of f equal: log N. A cluster without any f is left
/// out. q = 0 where p is not: the value is infinite, and gradients NaN. NaN in any row makes n and
/// so the value and all gradients NaN. No p: 0. See anchor_loss for the call's options and memory;
/// a weight of 0 removes an anchor, but not its share of n. Throws std::invalid_argument.
///
/// Source: Alshammari et al., "I-Con: a unifying framework for representation learning", ICLR 2025
/// (UniformCluster; the formula is the authors' code's).
template <class T> class i_con_clusters {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
  using X = matrix_view<const T>;
  using G = matrix_view<T>;

public:
  using value_type = T;
  using options = i_con_clusters_options;
  static constexpr const char* name = "i_con_clusters";

  i_con_clusters() : i_con_clusters(options{}) {}
  explicit i_con_clusters(const options& o) : options_(o) {
    core::require(o.debias >= 0 && o.debias <= 1, name, "debias", o.debias, "a number in [0, 1]");
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

  template <core::labels_like L>
  T operator()(X x, const L& labels, const anchor_options<T>& call = {}) const {
    return run(x, labels, nullptr, call);
  }
  template <core::labels_like L>
  T operator()(X x, const L& labels, G d_x, const anchor_options<T>& call = {}) const {
    return run(x, labels, &d_x, call);
  }
  T views(X x, index n, const anchor_options<T>& call = {}) const {
    return run(x, items_of(x.rows, n), nullptr, call);
  }
  T views(X x, index n, G d_x, const anchor_options<T>& call = {}) const {
    return run(x, items_of(x.rows, n), &d_x, call);
  }
  /// With p from the call's filter.
  T operator()(X x, const anchor_options<T>& call) const { return views(x, 1, call); }
  T operator()(X x, G d_x, const anchor_options<T>& call) const { return views(x, 1, d_x, call); }

private:
  static std::vector<index> items_of(index rows, index n) {
    core::require(n > 0 && rows % n == 0, name, "views", n, "a divisor of the number of rows");
    std::vector<index> items;
    for (index r = 0; r < rows; ++r)
      items.push_back(r % (rows / n));
    return items;
  }
  static std::size_t at(index i) { return static_cast<std::size_t>(i); }

  /// f by rows.
  std::vector<double> shares(const X& x) const {
    std::vector<double> f;
    for (index r = 0; r < x.rows; ++r) {
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (index c = 0; c < x.cols; ++c) {
        f.push_back(static_cast<double>(x(r, c)));
        top = std::max(top, f.back());
      }
      double* row = f.data() + r * x.cols;
      for (index c = 0; options_.logits && c < x.cols; ++c)
        sum += row[c] = std::exp(row[c] - top);
      for (index c = 0; options_.logits && c < x.cols; ++c)
        row[c] /= sum;
    }
    return f;
  }

  template <class L>
  T run(const X& x, const L& labels, const G* d_x, const anchor_options<T>& call) const {
    const std::array<G, 1> to{d_x ? *d_x : G{}};
    core::embedding_checks<T>{name}.batches(std::array<X, 1>{x}, d_x ? &to : nullptr);
    const index n = x.rows, clusters = x.cols;
    const std::vector<double> f = shares(x);
    std::vector<double> by(at(clusters)), along(at(clusters)); // 1/n_c
    for (index k = 0; k < n * clusters; ++k)
      by[at(k % clusters)] += f[at(k)];
    for (double& b : by)
      b = b == 0 ? 0 : 1 / b;
    std::vector<T> own(f.begin(), f.end()), scaled(f.size()), d_own(f.size()), d_scaled(f.size());
    for (index k = 0; k < n * clusters; ++k)
      scaled[at(k)] = static_cast<T>(f[at(k)] * by[at(k % clusters)]);

    const auto relation = [&](index anchor, T* row, index candidates) {
      if (call.filter)
        call.filter(anchor, row, candidates);
      row[anchor] = T(-1);
    };
    anchor_options<T> inner = call;
    inner.filter = relation;
    inner.accumulate = false;
    const auto rows = [&](std::vector<T>& m) { return G(m.data(), n, clusters); };
    const core::cluster_pass<T> pass({options_.debias, options_.divergence}, options_.reduction);
    if (!d_x)
      return pass(rows(own), rows(scaled), labels, labels, inner);
    const T value =
        pass(rows(own), rows(scaled), labels, labels, rows(d_own), rows(d_scaled), inner);
    for (index k = 0; k < n * clusters; ++k)
      along[at(k % clusters)] +=
          static_cast<double>(d_scaled[at(k)]) * static_cast<double>(scaled[at(k)]);
    const auto slope = [&](index r, index c) {
      const std::size_t k = at(r * clusters + c);
      return static_cast<double>(d_own[k]) +
             (static_cast<double>(d_scaled[k]) - along[at(c)]) * by[at(c)];
    };
    std::vector<double> mean(at(n)); // Σ_c f ∂/∂f
    for (index k = 0; options_.logits && k < n * clusters; ++k)
      mean[at(k / clusters)] += f[at(k)] * slope(k / clusters, k % clusters);
    const embedding_options<T> as_they_are{.accumulate = call.accumulate, .run_on = call.run_on};
    core::store_slopes(*d_x, as_they_are, [&](index r, index c) {
      const double g = slope(r, c);
      return options_.logits ? f[at(r * clusters + c)] * (g - mean[at(r)]) : g;
    });
    return value;
  }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
