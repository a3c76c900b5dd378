// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/anchor_loss.hpp"
#include "core/anchor_sums.hpp"
#include "sup_con.hpp"

namespace perdita::inline PERDITA_ABI {

struct hard_contrastive_options {
  double share = 0.08;                            ///< α of the negatives, the nearest, stay
  double temperature = 0.07;                      ///< τ > 0, with a finite inverse
  bool normalise = true;                          ///< cosines, and not products
  perdita::reduction reduction = reduction::mean; ///< of the anchors with a positive
  /// Where given, ∂value/∂τ goes there if gradients are asked for.
  double* d_temperature = nullptr;
};
struct simple_contrastive_options {
  double share = 1;
  double lambda = 1; ///< factor of the negatives
  bool normalise = true;
  perdita::reduction reduction = reduction::mean;
};

namespace core {

/// Numbers as integers that are ordered as they are.
template <class T> bits_of<T> ordered_bits(T x) {
  const auto bits = std::bit_cast<bits_of<T>>(x);
  return bits < 0 ? std::numeric_limits<bits_of<T>>::min() - bits : bits;
}
template <class T> T from_ordered_bits(bits_of<T> bits) {
  return std::bit_cast<T>(bits < 0 ? std::numeric_limits<bits_of<T>>::min() - bits : bits);
}

/// A score that exactly the `most` largest of those chosen reach, and what is equal to the least of
/// them: bisection, without memory. NaN counts as the largest.
template <class T, class Chosen> T edge_of(const anchor_row<T>& row, Chosen chosen, index most) {
  using V = pack<T>;
  const auto reached = [&](T edge) {
    V count(0);
    for_chosen(
        row, chosen, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          count += select(mask & !(x < V(edge)), V(1), V(0));
        });
    return total_count(count);
  };
  const chosen_scores<T> all(row, chosen);
  if (most >= all.count || !(all.least < all.most))
    return -std::numeric_limits<T>::infinity();
  auto low = ordered_bits(all.least), high = ordered_bits(all.most);
  while (low < high) { // `low` is reached by `most` or more, what is above `high` by fewer
    const auto middle = (low | high) - ((low ^ high) >> 1); // of the two, rounded up
    const index n = reached(from_ordered_bits<T>(middle));
    if (n == most)
      return from_ordered_bits<T>(middle);
    (n > most ? low : high) = n > most ? middle : middle - 1;
  }
  return from_ordered_bits<T>(low);
}

/// All but the nearest negatives are dropped. Their number: a share, rounded up, of which rounding
/// errors make no more.
template <class T> void keep_nearest(const anchor_row<T>& row, double share) {
  if (share == 1)
    return;
  const double all = static_cast<double>(chosen_scores<T>(row, rivalling{}).count);
  const auto kept = static_cast<index>(std::ceil(share * all * (1 - 1e-12)));
  const pack<T> edge(edge_of(row, rivalling{}, kept));
  drop(
      row, rivalling{},
      -std::numeric_limits<T>::infinity(), [&](const pack<T>& x) __attribute__((always_inline)) {
        return x < edge;
      });
}

struct hard_contrastive_formula : sup_con_formula {
  double share;

  hard_contrastive_formula(double s, double tau) : sup_con_formula{{}, tau}, share(s) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    keep_nearest(row, share);
    return sup_con_formula::row<Gradient>(row);
  }
};

struct simple_contrastive_formula : anchor_formula {
  double share, lambda;

  simple_contrastive_formula(double s, double l) : share(s), lambda(l) {}

  template <bool Gradient, class T> anchor_outcome row(const anchor_row<T>& row) const {
    using V = pack<T>;
    const chosen_scores<T> own(row, belonging{});
    if (own.count == 0)
      return {0, false};
    keep_nearest(row, share);
    const V dropped(-std::numeric_limits<T>::infinity());
    const auto kept = [&](const V& x, const auto& mask) { return mask & !(x == dropped); };
    lane_sums<T, 1> rivals;
    for_chosen(
        row, rivalling{}, [&](const V& x, const auto& mask, index) __attribute__((always_inline)) {
          rivals.some[0] += select(kept(x, mask), x, V(0));
          rivals.count_pack();
        });
    const double even = 1 / static_cast<double>(own.count);
    if constexpr (Gradient)
      put_slopes(
          row, [&](const V& x, const V& relation) __attribute__((always_inline)) {
            return select(relation > V(0), V(static_cast<T>(-even)),
                          select(x == dropped, V(0), V(static_cast<T>(lambda))));
          });
    return {lambda * rivals.total(0) - even * own.sum};
  }
};

inline void require_share(const char* name, double share) {
  require(share > 0 && share <= 1, name, "share", share, "a number above 0 and up to 1");
}

} // namespace core

/// The supervised contrastive loss with hard negatives only: of an anchor's n negatives the ⌈αn⌉
/// with the largest scores stay, and what ties with the least of them,
///
///   ℓ_i = log (Σ_{p∈P} e^{S_ip} + Σ_{kept n} e^{S_in}) − (1/|P|) Σ_{p∈P} S_ip,  S = ⟨x̂_i, ŷ_j⟩/τ
///
/// where the edge has no gradient; it is found by counting, in up to 31 (double: 63) looks at a row
/// and half as many as a rule. α = 1: sup_con. As in the paper, with one positive each:
///
///   loss.pairs(x, y, d_x, d_y)
///
/// Anchors without positives do not count; without negatives the loss of a single positive is 0.
/// Equal embeddings all tie: all stay. See anchor_loss for calls, shapes, special values and
/// errors. Throws where α is not in (0, 1] or τ not above 0.
///
/// Source: Wang, Liu, "Understanding the behaviour of contrastive loss", CVPR 2021.
template <class T> class hard_contrastive : public anchor_loss<hard_contrastive<T>, T> {
public:
  using options = hard_contrastive_options;
  static constexpr const char* name = "hard_contrastive";

  hard_contrastive() : hard_contrastive(options{}) {}
  explicit hard_contrastive(const options& o) : options_(o) {
    core::require_share(name, o.share);
    core::invertible<T>(name, "temperature", o.temperature);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::hard_contrastive_formula formula() const { return {options_.share, options_.temperature}; }
  void set_extra(core::anchor_job<T>& job) const { job.extra[0] = options_.d_temperature; }

  options options_;
};

/// The same paper's simple loss, which weighs all negatives alike, and with α < 1 its hard form:
///
///   ℓ_i = λ Σ_{kept n} s_in − (1/|P|) Σ_{p∈P} s_ip,   s = ⟨x̂_i, ŷ_j⟩
template <class T> class simple_contrastive : public anchor_loss<simple_contrastive<T>, T> {
public:
  using options = simple_contrastive_options;
  static constexpr const char* name = "simple_contrastive";

  simple_contrastive() : simple_contrastive(options{}) {}
  explicit simple_contrastive(const options& o) : options_(o) {
    core::require_share(name, o.share);
    core::finite(name, "lambda", o.lambda);
    core::require_reduction(name, o.reduction);
  }
  const options& settings() const { return options_; }

private:
  friend core::anchor_access;
  core::simple_contrastive_formula formula() const { return {options_.share, options_.lambda}; }

  options options_;
};

} // namespace perdita::inline PERDITA_ABI
