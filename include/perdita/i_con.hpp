// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"

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
    lane_sums<T, 2> given; // Σ p, and how many
    for_chosen(
        row, compared{}, [&](const V&, const auto& mask, index j) __attribute__((always_inline)) {
          given.some[0] += max(V(0), V::load(row.relation + j));
          given.some[1] += select(mask, V(1), V(0));
          given.count_pack();
        });
    const double all = given.total(0);
    if (all == 0)
      return {0, false};
    const V factor(static_cast<T>((1 - debias) / all));
    const V even(static_cast<T>(debias / given.total(1)));
    const auto p = [&](const V& relation) __attribute__((always_inline)) {
      return select(relation == V(0), V(0), fma(max(V(0), relation), factor, even));
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
///   ℓ_i = −Σ_j p_ij log q_ij,  and with `divergence` + Σ_j p_ij log p_ij;  ∂ℓ_i/∂logit_ij = q_ij −
///   p_ij
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

} // namespace perdita::inline PERDITA_ABI
