// SPDX-License-Identifier: MIT
#pragma once

// Regularised prediction maps and their Fenchel-Young losses in wide arithmetic, from nothing but
// definitions: p = argmax ⟨p, x⟩ − Ω(p), and Ω itself.

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "wide.hpp"

namespace perdita_tests {

/// b^e for b ≥ 0, without pow() where e is a multiple of 1/4.
inline wide raise(const wide& b, double e) {
  if (b <= 0)
    return 0;
  const double quarters = 4 * e;
  if (quarters != std::floor(quarters) || quarters > 24)
    return pow(b, wide(e));
  wide result = 1;
  for (int k = 0; k < static_cast<int>(e); ++k)
    result *= b;
  const int rest = static_cast<int>(quarters) % 4;
  if (rest == 0)
    return result;
  const wide root = sqrt(b);
  if (rest >= 2)
    result *= root;
  return rest % 2 == 1 ? wide(result * sqrt(root)) : result;
}

enum class map_kind { softmax, entmax, normmax }; // entmax of α = 2 is sparsemax

/// p of a row. Of the sparse maps, with gaps g = max x − x, w = w₁ − c g is what p is a power of:
/// Σ w_+^γ = 1.
struct exact_prediction {
  std::vector<wide> p, base; ///< base = 1 − c g/w₁, of any sign
  wide top = -infinity();
  wide most = 0;            ///< the largest p of a sparse map
  wide first = 1;           ///< w₁
  double power_of_base = 1; ///< p ∝ base_+^that

  exact_prediction(map_kind kind, double alpha, const std::vector<wide>& x) {
    for (const wide& z : x)
      top = larger(top, z);
    if (kind == map_kind::softmax) {
      wide sum = 0;
      for (const wide& z : x) {
        p.push_back(z == -infinity() ? wide(0) : wide(exp(wide(z - top))));
        base.push_back(p.back() > 0 ? 1 : -1);
        sum += p.back();
      }
      for (wide& share : p)
        share /= sum;
      return;
    }
    const bool norm = kind == map_kind::normmax;
    const wide c = norm ? 1 : alpha - 1;
    const double power = norm ? alpha / (alpha - 1) : 1 / (alpha - 1);
    power_of_base = 1 / (alpha - 1);
    std::vector<wide> gaps;
    for (const wide& z : x)
      if (c * (top - z) < 1)
        gaps.push_back(c * (top - z));
    first = find(gaps, power);
    wide sum = 0;
    for (const wide& z : x) {
      base.push_back(z == -infinity() ? wide(-1) : wide(1 - c * (top - z) / first));
      p.push_back(raise(base.back(), power_of_base));
      sum += p.back();
    }
    for (wide& share : p)
      share /= sum;
    most = 1 / sum;
  }
  /// How far p_j moves where its base is wrong by so much.
  wide spread(std::size_t j, const wide& error) const {
    return most * (raise(base[j] + error, power_of_base) - raise(base[j] - error, power_of_base));
  }

private:
  /// Newton's method, or bisection where it leaves the bracket.
  static wide find(const std::vector<wide>& gaps, double power) {
    wide low = 0, high = 1, w = 1;
    for (int round = 0; round < 1000; ++round) {
      wide excess = -1, slope = 0;
      for (const wide& g : gaps)
        if (g < w) {
          const wide image = raise(w - g, power);
          excess += image;
          slope += power * image / (w - g);
        }
      (excess > 0 ? high : low) = w;
      const wide newton = w - excess / slope;
      const wide next = newton > low && newton < high ? newton : wide((low + high) / 2);
      if (excess == 0 || size_of(wide(next - w)) <= ldexp(w, -104))
        return excess == 0 ? w : next;
      w = next;
    }
    return w;
  }
};

/// Ω without the constants, which a loss does not have.
inline wide regulariser(map_kind kind, double alpha, const std::vector<wide>& p) {
  wide sum = 0;
  for (const wide& share : p)
    sum += kind == map_kind::softmax ? weighted(share, share > 0 ? wide(log(share)) : wide(0))
                                     : raise(share, alpha);
  if (kind == map_kind::softmax)
    return sum;
  return kind == map_kind::entmax ? wide(sum / (alpha * (wide(alpha) - 1)))
                                  : wide(pow(sum, 1 / wide(alpha)));
}

/// Ω*(x) + Ω(q) − ⟨q, x⟩ for a q with Σ q = 1.
inline wide young_value(map_kind kind, double alpha, const exact_prediction& e,
                        const std::vector<wide>& x, const std::vector<wide>& q) {
  wide value = regulariser(kind, alpha, q) - regulariser(kind, alpha, e.p);
  for (std::size_t j = 0; j < x.size(); ++j)
    value += weighted(wide(q[j] - e.p[j]), wide(e.top - x[j]));
  return value;
}

} // namespace perdita_tests
