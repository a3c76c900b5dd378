// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include "core/row_loss.hpp"
#include "core/traits.hpp"

namespace perdita::inline PERDITA_ABI {

namespace core {

/// z = (x_y − μ)/σ,  k = −σ(a (b − z)):  ∂ℓ/∂x_j = (k/σ) (δ_jy − 1/K − z (x_j − μ)/(σ K)).
template <class T>
struct z_loss_formula {
  using statistic = moments;
  static constexpr bool excludes_target = false;
  static constexpr bool proportional = false;
  static constexpr bool has_side = false;

  double a, b;

  double label_weight(index) const { return 1; }

  template <class V>
  PERDITA_INLINE V score(const V& x) const {
    return x;
  }
  /// (x_j − μ) times one coefficient, plus the other.
  template <class V>
  PERDITA_INLINE V slope(const V& x, const V& mean, const V&, const V* c) const {
    return fma(x - mean, c[0], c[1]);
  }
  template <class Row>
  auto finish(const Row& row) const {
    using W = decltype(row.target);
    const W zero(0), n = row.classes;
    const W offset = row.term[1] / n;  // μ − shift
    const W variance = max(zero, (row.term[2] - row.term[1] * offset) / n);
    const W from_mean = (row.target - row.shift) - offset;
    const W flat = select(variance == zero, W(1), zero);
    const W inverse = select(variance == zero, zero, W(1) / sqrt(variance));
    const W z = from_mean * inverse;
    const W u = W(a) * (W(b) - z);
    const W k = -sigmoid(u) * inverse;
    row_outcome<W> out;
    out.value = softplus(u) / W(a) + (variance - variance) * flat;
    out.image_scale = row.shift + offset;
    out.coefficient[0] = -(k * z * inverse) / n;
    out.coefficient[1] = -k / n;
    out.target_gradient = k * ((W(1) - W(1) / n) - z * z / n);
    return out;
  }
};

}  // namespace core
}  // namespace perdita::inline PERDITA_ABI
