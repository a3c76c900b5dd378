// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/errors.hpp"
#include "core/executor.hpp"
#include "core/simd.hpp"
#include "core/views.hpp"

namespace perdita::inline PERDITA_ABI {

struct orthogonal_gradient_options {
  bool keep_length = false; ///< stretch what is left to the length that the gradient had
  executor run_on{};
};

namespace core {

/// What is known of two vectors: always the same parts, added up in the same order, whoever does
/// it.
template <class T> class vector_pair {
  using W = pack<double>;
  static constexpr index parts = 64, block = 256, width = static_cast<index>(lanes<double>);

public:
  vector_pair(vector_view<const T> a, vector_view<T> b, const executor& run_on)
      : a_(a), b_(b), run_on_(run_on) {}

  struct products {
    double aa, ab, bb;
  };
  products measure() const {
    products part[parts], sum{0, 0, 0};
    for_parts([&](index p, index first, index last) {
      W aa(0), ab(0), bb(0);
      for_blocks(first, last, [&](index, index, const double* x, const double* y) {
        for (index i = 0; i < block; i += width) {
          const W u = W::load(x + i), v = W::load(y + i);
          aa = fma(u, u, aa);
          ab = fma(u, v, ab);
          bb = fma(v, v, bb);
        }
      });
      part[p] = {sum_lanes(aa), sum_lanes(ab), sum_lanes(bb)};
    });
    for (const products& p : part)
      sum = {sum.aa + p.aa, sum.ab + p.ab, sum.bb + p.bb};
    return sum;
  }
  /// Σ (b − factor a)²; bb − factor ab has no digits where b lies nearly along a.
  double squares_left(double factor) const {
    double part[parts], sum = 0;
    for_parts([&](index p, index first, index last) {
      W squares(0);
      for_blocks(first, last, [&](index, index, const double* x, const double* y) {
        for (index i = 0; i < block; i += width) {
          const W left = fnma(W(factor), W::load(x + i), W::load(y + i));
          squares = fma(left, left, squares);
        }
      });
      part[p] = sum_lanes(squares);
    });
    for (const double p : part)
      sum += p;
    return sum;
  }
  /// b = (b − factor a) scale, rounded once.
  void subtract(double factor, double scale) const {
    for_parts([&](index, index first, index last) {
      for_blocks(first, last, [&](index at, index n, const double* x, double* y) {
        for (index i = 0; i < block; i += width)
          (fnma(W(factor), W::load(x + i), W::load(y + i)) * scale).store(y + i);
        for (index i = 0; i < n; ++i)
          b_[at + i] = static_cast<T>(y[i]);
      });
    });
  }

private:
  template <class F> void for_parts(F f) const {
    const auto work = [&](std::size_t p) {
      const auto part = static_cast<index>(p);
      f(part, b_.size * part / parts, b_.size * (part + 1) / parts);
    };
    run_on_(static_cast<std::size_t>(parts), work);
  }
  /// Copies in double, zeros after the last.
  template <class F> void for_blocks(index first, index last, F f) const {
    alignas(64) double x[block], y[block];
    for (index at = first; at < last; at += block) {
      const index n = std::min(block, last - at);
      for (index i = 0; i < n; ++i) {
        x[i] = static_cast<double>(a_[at + i]);
        y[i] = static_cast<double>(b_[at + i]);
      }
      std::fill(x + n, x + block, 0.0);
      std::fill(y + n, y + block, 0.0);
      f(at, n, x, y);
    }
  }

  vector_view<const T> a_;
  vector_view<T> b_;
  const executor& run_on_;
};

} // namespace core

/// ⊥Grad: takes from the gradient of a parameter its part along the parameter, which for logits
/// past the point of fitting only scales them:
///
///   g ← g − (⟨w, g⟩ / ⟨w, w⟩) w,   and with keep_length  g ← g ‖g before‖ / ‖g‖
///
/// Of one tensor at a time, as vectors of its elements (float or double; any stride). Sums are in
/// double, in an order that does not depend on the executor. w = 0 leaves g as it is; a g along w
/// becomes about 0 and is not stretched where nothing but rounding is left of it.
/// Throws std::invalid_argument where the sizes differ or the memory is missing.
/// Source: Prieto, Barsbey, Mediano, Birdal, "Grokking at the edge of numerical stability", ICLR
/// 2025 (keep_length: their optimiser).
template <core::vector_like W, core::vector_like G>
void orthogonal_gradient(W&& weights, G&& gradient,
                         const orthogonal_gradient_options& options = {}) {
  const auto w = core::as_vector(weights);
  const auto g = core::as_vector(gradient);
  using T = std::remove_reference_t<decltype(g[0])>;
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>,
                "the gradient must be a vector of float or double that can be written to");
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(w[0])>, T>,
                "the weights must be of the gradient's type");
  constexpr const char* name = "orthogonal_gradient";
  core::require(w.size == g.size, name, "size of weights", w.size, "the size of the gradient");
  core::require(g.size == 0 || (w.data && g.data), name, "memory", 0, "pointers that are not null");

  const core::vector_pair<T> pair(w, g, options.run_on);
  const auto before = pair.measure();
  if (!(before.aa > 0) && before.aa == before.aa)
    return;
  const double factor = before.ab / before.aa;
  if (!options.keep_length)
    return pair.subtract(factor, 1);
  const double left = pair.squares_left(factor);
  const double noise = 1e-14 * before.bb; // what rounding leaves of nothing
  pair.subtract(factor, left > noise ? std::sqrt(before.bb / left) : 1);
}

} // namespace perdita::inline PERDITA_ABI
