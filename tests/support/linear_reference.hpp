// SPDX-License-Identifier: MIT
#pragma once

// What the linear head must give, from the formulas alone, and how far off an answer may be.
//
// Everything is computed in a wider type: double for float, whose products it holds exactly, and
// long double for double. Two kinds of error are allowed, and their effects added up:
//
//   of products    a sum of n terms is off by  (0.35 + 0.1 √n') ε Σ|terms|,  n' = min(n, 256) +
//                  n/256; the errors of the scores go into the slopes by the second derivatives;
//   of the loss    as its own tests have it, with simpler bounds.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "linear_run.hpp"
#include "row_judge.hpp"

namespace perdita_tests {

template <class T> using wider = std::conditional_t<sizeof(T) == 4, double, long double>;

/// A row's value and slopes, exactly, and how they move.
template <class R> struct reference_row {
  R value = 0;
  R value_noise = 0;    ///< of the loss's own arithmetic, in epsilons
  std::vector<R> slope; ///< ∂value/∂score
  std::vector<R> bend;  ///< Σ_k |∂slope_j/∂score_k|
  std::vector<R> noise; ///< of the slope by the loss's own arithmetic, in epsilons
};

/// Soft-max of z in R: shares, their distances to 1, and −log of them.
template <class R> struct reference_softmax {
  explicit reference_softmax(const std::vector<R>& z) : n(z.size()), image(n), behind(n) {
    for (std::size_t j = 1; j < n; ++j)
      if (z[j] > z[top])
        top = j;
    for (std::size_t j = 0; j < n; ++j) {
      behind[j] = z[top] - z[j];
      image[j] = std::exp(-behind[j]);
      if (j != top)
        rest += image[j];
    }
    largest = z[top];
    log_sum_exp = largest + std::log1p(rest);
    for (std::size_t j = 0; j < n; ++j)
      distance += image[j] > 0 ? image[j] * behind[j] / (1 + rest) : R(0);
  }
  R p(std::size_t j) const { return image[j] / (1 + rest); }
  R miss(std::size_t j) const {
    return j == top ? rest / (1 + rest) : (1 + (rest - image[j])) / (1 + rest);
  }
  R surprise(std::size_t j) const { return behind[j] + std::log1p(rest); }

  std::size_t n, top = 0;
  std::vector<R> image, behind;
  R rest = 0, largest = 0, log_sum_exp = 0, distance = 0; // distance: mean of behind, by shares
};

/// ℓ = (1−ε) w_y (1−p)^γ n + Σ_c b_c (−log p_c) + c (log Σ e^z)², n = −log p, b_c = w_c (ε π_c +
/// (1−ε) q_c), z = cap tanh(x/cap)/T. Labels where `soft` is empty.
struct cross_entropy_reference {
  double smoothing = 0, temperature = 1, softcap = 0, penalty = 0, gamma = 0;
  std::vector<double> class_weights;

  template <class R>
  reference_row<R> operator()(const std::vector<R>& x, std::size_t y,
                              const std::vector<R>& soft) const {
    const std::size_t n = x.size();
    const R e = static_cast<R>(smoothing), t = static_cast<R>(temperature),
            cap = static_cast<R>(softcap), c = static_cast<R>(penalty), g = static_cast<R>(gamma);
    std::vector<R> z(n), steep(n), curve(n);
    R most = 0;
    for (std::size_t j = 0; j < n; ++j) {
      const R th = cap > 0 && std::isfinite(x[j]) ? std::tanh(x[j] / cap) : R(0);
      z[j] = (cap > 0 && std::isfinite(x[j]) ? cap * th : x[j]) / t;
      steep[j] = (1 - th * th) / t;
      curve[j] = cap > 0 ? 2 * std::abs(th) / cap * steep[j] : R(0);
      if (std::isfinite(z[j]))
        most = std::max(most, std::abs(z[j]));
    }
    const reference_softmax<R> s(z);
    const R relative = static_cast<R>((softcap > 0 ? 3.5 : 0) + (temperature != 1 ? 1 : 0));
    const R of_z = relative * most; // errors of all z, in epsilons
    const auto weight = [&](std::size_t j) {
      return class_weights.empty() ? R(1) : static_cast<R>(class_weights[j]);
    };
    std::vector<R> b(n);
    R all = 0;
    for (std::size_t j = 0; j < n; ++j) {
      b[j] = weight(j) * (e / static_cast<R>(n) + (soft.empty() ? R(0) : (1 - e) * soft[j]));
      all += b[j];
    }
    // f(n) = (1−p)^γ n with two derivatives
    const R hard = soft.empty() ? (1 - e) * weight(y) : R(0);
    const R p = s.p(y), miss = s.miss(y), nats = s.surprise(y);
    R f = nats, f1 = 1, f2 = 0;
    if (g > 0 && miss > 0) {
      const R focus = std::pow(miss, g);
      f = focus * nats;
      f1 = focus * (1 + g * p * nats / miss);
      f2 = focus * g * p / miss * (2 + nats + std::abs(g - 1) * p * nats / miss);
    }
    const R of_power = g > 0 && miss > 0 ? 2 * g * std::abs(std::log(miss)) : R(0);
    const R lse = s.log_sum_exp;
    const R of_lse = 4 * std::max(std::abs(lse), std::abs(s.largest)) + of_z;

    reference_row<R> out;
    const auto term = [](R size, R x_) { return size == 0 ? R(0) : size * x_; };
    out.value = term(hard, f) + c * lse * lse;
    const R of_odds = s.distance + nats + 2 * of_z;
    out.value_noise = term(hard, f * (4 + of_power) + f1 * miss * of_odds) +
                      c * (4 * lse * lse + 2 * std::abs(lse) * of_lse);
    for (std::size_t j = 0; j < n; ++j) {
      out.value += term(b[j], s.surprise(j));
      out.value_noise += term(b[j], 4 * (s.surprise(j) + s.behind[j]) + of_odds);
    }
    for (std::size_t j = 0; j < n; ++j) {
      const R pj = s.p(j), other = s.miss(j);
      const bool own = j == y;
      const R label = hard * f1 * (own ? miss : pj);
      const R slope =
          (own ? -label : label) + term(all - b[j], pj) - term(b[j], other) + 2 * c * lse * pj;
      out.slope.push_back(slope * steep[j]);
      const R bend = hard * (f1 * 2 * pj * other + f2 * 2 * miss * (own ? miss : pj)) +
                     all * 2 * pj * other + 2 * c * pj * (2 * std::abs(lse) * other + 1);
      out.bend.push_back(bend * steep[j] / t + std::abs(slope) * curve[j]);
      const R share =
          4 + of_power + (1 + g) * of_odds + (own || pj == 0 ? R(0) : s.behind[j] / 2 + of_z);
      const R noise =
          (label + all * pj + 2 * c * std::abs(lse) * pj) * share + 4 * b[j] + 2 * c * pj * of_lse;
      out.noise.push_back(noise * steep[j] +
                          (cap > 0 ? std::abs(slope) * 2 * (relative + 2) / t : R(0)));
    }
    return out;
  }
};

/// ℓ = λ (log Σ_k e^{(x_k − x_y + c_k)/λ} − log K), c_y = 0
struct ldr_kl_reference {
  double lambda = 1, margin = 0;
  template <class R>
  reference_row<R> operator()(const std::vector<R>& x, std::size_t y, const std::vector<R>&) const {
    const R l = static_cast<R>(lambda), c = static_cast<R>(margin);
    std::vector<R> z(x.size());
    R most = 0;
    for (std::size_t j = 0; j < z.size(); ++j) {
      z[j] = (x[j] + (j == y ? R(0) : c)) / l;
      most = std::max(most, std::abs(z[j]));
    }
    const reference_softmax<R> s(z);
    const R log_classes = std::log(static_cast<R>(z.size()));
    const R of_odds = s.distance + s.surprise(y) + most;
    reference_row<R> out;
    out.value = l * (s.surprise(y) - log_classes);
    out.value_noise = l * (4 * (s.surprise(y) + log_classes) + s.miss(y) * of_odds);
    for (std::size_t j = 0; j < z.size(); ++j) {
      const R size = j == y ? s.miss(y) : s.p(j);
      out.slope.push_back(j == y ? -size : size);
      out.bend.push_back(2 * s.p(j) * s.miss(j) / l);
      out.noise.push_back(size * (4 + of_odds + s.behind[j] / 2 + most));
    }
    return out;
  }
};

/// ℓ = softplus(a (b − z_y)) / a of the standard score z_y
struct z_loss_reference {
  double a = 1, b = 0;
  template <class R>
  reference_row<R> operator()(const std::vector<R>& x, std::size_t y, const std::vector<R>&) const {
    const R n = static_cast<R>(x.size()), sharp = static_cast<R>(a);
    R mean = 0, variance = 0;
    for (const R v : x)
      mean += v / n;
    for (const R v : x)
      variance += (v - mean) * (v - mean) / n;
    const R inverse = x.size() == 1 ? R(0) : 1 / std::sqrt(variance);
    const R z = (x[y] - mean) * inverse, u = sharp * (static_cast<R>(b) - z);
    const R soft = u > 0 ? u + std::log1p(std::exp(-u)) : std::log1p(std::exp(u));
    const R s = u > 0 ? 1 / (1 + std::exp(-u)) : std::exp(u) / (1 + std::exp(u));
    const R of_u = sharp * std::abs(z) * 4 + std::abs(u);
    reference_row<R> out;
    out.value = soft / sharp;
    out.value_noise = (soft * 4 + s * of_u) / sharp;
    const R steep = s * inverse;
    for (std::size_t j = 0; j < x.size(); ++j) {
      const R zj = (x[j] - mean) * inverse;
      const R own = j == y ? steep : R(0), even = steep / n, tilt = steep * z * zj / n;
      out.slope.push_back(even + tilt - own);
      out.bend.push_back(
          (std::abs(out.slope[j]) * (sharp * (1 - s) * (2 + std::abs(z)) + 1) +
           even * (std::abs(zj) * (2 + std::abs(z)) + std::abs(z) * (2 + std::abs(zj)))) *
          inverse);
      out.noise.push_back((own + even + std::abs(tilt)) * (8 + of_u * (1 - s)) +
                          std::abs(even * z) * 8);
    }
    return out;
  }
};

/// Numbers against what they must be; keeps the worst.
class close_to {
public:
  explicit close_to(std::string title) : title_(std::move(title)) {}
  template <class R, class T, class Where> void compare(R expected, R allowed, T got, Where where) {
    ++compared_;
    if (std::isnan(expected) ? std::isnan(got) : static_cast<R>(got) == expected)
      return;
    const R error = std::abs(static_cast<R>(got) - expected);
    const double ratio = static_cast<double>(error / allowed);
    if (!(ratio <= worst_)) { // a NaN stays
      worst_ = ratio;
      char numbers[160];
      std::snprintf(numbers, sizeof numbers, ": %.17g, expected %.17g +- %.3g",
                    static_cast<double>(got), static_cast<double>(expected),
                    static_cast<double>(allowed));
      worst_at_ = where() + numbers;
    }
    if (!(error <= allowed))
      ++wrong_;
  }
  double worst() const { return worst_; }
  const std::string& title() const { return title_; }
  void check() const {
    INFO(title_ << ": " << wrong_ << " of " << compared_ << " wrong, worst " << worst_
                << " times the allowance: " << worst_at_);
    CHECK(wrong_ == 0);
    CHECK(compared_ > 0);
  }

private:
  std::string title_, worst_at_;
  std::size_t compared_ = 0, wrong_ = 0;
  double worst_ = 0;
};

/// What was found of the linear head, in shares of the allowance.
template <class T> void report_linear(const close_to& values, const close_to& gradients) {
  report_accuracy<T>(
      "linear", "(" + values.title() + ")", in_allowances,
      {values.worst(), gradients.worst(), std::max(values.worst(), gradients.worst())});
}

inline constexpr double product_noise = 0.1;
/// Of a sum of that many terms with random signs, in ε Σ|terms|. One term alone is rounded by half
/// an epsilon.
template <class R> R noise_of_sum(index terms) {
  const double n = static_cast<double>(terms);
  return static_cast<R>(0.35 + product_noise * std::sqrt(std::min(n, 256.0) + std::ceil(n / 256)));
}

/// X Wᵀ + b in R, and Σ|x||w| + |b|.
template <class T> class reference_scores {
public:
  using R = wider<T>;
  explicit reference_scores(const linear_problem<T>& p) : p_(p) {
    for (index r = 0; r < p.rows; ++r)
      for (index c = 0; c < p.classes; ++c) {
        R sum = 0, size = 0;
        for (index d = 0; d < p.features; ++d) {
          const R term = static_cast<R>(p.x(r, d)) * static_cast<R>(p.w(c, d));
          sum += term;
          size += std::abs(term);
        }
        if (!p.bias.empty()) {
          const R b = static_cast<R>(p.bias[static_cast<std::size_t>(c)]);
          sum += b;
          size += std::isfinite(b) ? std::abs(b) : R(0);
        }
        score.push_back(sum);
        of_terms.push_back(size);
      }
  }
  const linear_problem<T>& problem() const { return p_; }
  std::vector<R> score, of_terms;

private:
  const linear_problem<T>& p_;
};

/// Compares value, values of rows and all gradients with the reference's.
template <class T, class Loss>
void judge(const Loss& loss, perdita::reduction how, const reference_scores<T>& scores,
           const linear_answer<T>& got, close_to& of_values, close_to& of_gradients) {
  using R = wider<T>;
  const linear_problem<T>& p = scores.problem();
  const R epsilon = static_cast<R>(std::numeric_limits<T>::epsilon());
  const R smallest = static_cast<R>(std::numeric_limits<T>::min());
  const auto n = static_cast<std::size_t>(p.classes), depth = static_cast<std::size_t>(p.features);
  const auto at = [](index i) { return static_cast<std::size_t>(i); };

  R weights = 0;
  const auto weight_of = [&](index r) {
    return p.row_weights.empty() ? R(1) : static_cast<R>(p.row_weights[at(r)]);
  };
  for (index r = 0; r < p.rows; ++r)
    if (p.counts(r)) {
      R own = 1;
      if constexpr (std::is_same_v<Loss, cross_entropy_reference>)
        if (!loss.class_weights.empty() && !p.sparse)
          own = static_cast<R>(loss.class_weights[at(static_cast<index>(p.labels[at(r)]))]);
      weights += own * weight_of(r);
    }
  R share = 1;
  if (how == perdita::reduction::mean)
    share = p.normaliser != 0 ? 1 / static_cast<R>(p.normaliser)
            : weights != 0    ? 1 / weights
                              : R(0);

  R total = 0, total_noise = 0;
  std::vector<R> dx(at(p.rows) * depth), dx_noise(dx), dw(n * depth), dw_noise(dw), db(n),
      db_noise(db);
  const R of_rows = noise_of_sum<R>(p.rows), of_classes = noise_of_sum<R>(p.classes);
  std::vector<std::int64_t> starts = p.row_starts;
  for (index r = 0; starts.empty() && p.sparse && r <= p.rows; ++r)
    starts.push_back(static_cast<std::int64_t>(p.soft_classes.size()) / p.rows * r);
  for (index r = 0; r < p.rows; ++r) {
    const auto here = [&] { return "row " + std::to_string(r); };
    if (!p.counts(r)) {
      if (!got.by_products[0].empty())
        of_values.compare(R(0), R(0), got.by_products[0][at(r)], here);
      continue;
    }
    const std::vector<R> z(scores.score.begin() + r * p.classes,
                           scores.score.begin() + (r + 1) * p.classes);
    R off = 0; // the largest error of a score, in epsilons
    for (std::size_t j = 0; j < n; ++j)
      off = std::max(off, scores.of_terms[at(r) * n + j]);
    off *= noise_of_sum<R>(p.features);
    std::vector<R> soft;
    std::size_t y = 0;
    if (p.sparse) {
      soft.assign(n, R(0));
      for (auto e = starts[at(r)]; e < starts[at(r) + 1]; ++e)
        soft[static_cast<std::size_t>(p.soft_classes[static_cast<std::size_t>(e)])] +=
            static_cast<R>(p.probabilities[static_cast<std::size_t>(e)]);
    } else {
      y = static_cast<std::size_t>(p.labels[at(r)]);
    }
    const reference_row<R> row = loss(z, y, soft);
    R value_noise = row.value_noise + std::abs(row.value);
    for (const R g : row.slope)
      value_noise += std::abs(g) * off;
    total += row.value * weight_of(r) * share;
    total_noise += value_noise * weight_of(r) * share;
    if (!got.by_products[0].empty())
      of_values.compare(row.value * weight_of(r), value_noise * weight_of(r) * epsilon + smallest,
                        got.by_products[0][at(r)], here);

    const R factor = weight_of(r) * share * static_cast<R>(p.scale) *
                     (p.upstream.empty() ? R(1) : static_cast<R>(p.upstream[at(r)]));
    R most = 0; // what is too small beside the largest may be 0
    for (const R g : row.slope)
      most = std::max(most, std::abs(g));
    const R negligible = most * static_cast<R>(negligible_share<T>()) / epsilon;
    for (std::size_t j = 0; j < n; ++j) {
      const R g = row.slope[j] * factor;
      const R noise = (row.bend[j] * off + row.noise[j] + 2 * std::abs(row.slope[j]) + negligible) *
                      std::abs(factor);
      db[j] += g;
      db_noise[j] += noise + of_rows * std::abs(g);
      if (g == 0 && noise == 0)
        continue;
      for (std::size_t d = 0; d < depth; ++d) {
        const R w = static_cast<R>(p.weights[j * depth + d]),
                x = static_cast<R>(p.hidden[at(r) * depth + d]);
        dx[at(r) * depth + d] += g * w;
        dx_noise[at(r) * depth + d] += (noise + of_classes * std::abs(g)) * std::abs(w);
        dw[j * depth + d] += g * x;
        dw_noise[j * depth + d] += (noise + of_rows * std::abs(g)) * std::abs(x);
      }
    }
  }
  if (how != perdita::reduction::none)
    of_values.compare(total, (total_noise + std::abs(total)) * epsilon + smallest, got.value,
                      [] { return std::string("total"); });
  const auto compare = [&](const char* what, std::vector<R>& exact, const std::vector<R>& noise,
                           const std::vector<T>& answer, const std::vector<T>& before,
                           std::size_t each) {
    if (answer.empty())
      return;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      R allowed = noise[i] * epsilon;
      if (!before.empty()) {
        exact[i] += static_cast<R>(before[i]);
        allowed += (std::abs(exact[i]) + std::abs(static_cast<R>(before[i]))) * epsilon;
      }
      // What is below the smallest number is lost, in a slope before it is multiplied.
      allowed += 16 * smallest * static_cast<R>(p.classes + p.rows);
      of_gradients.compare(exact[i], allowed, answer[i], [&] {
        return std::string(what) + " " + std::to_string(i / each) + ", " + std::to_string(i % each);
      });
    }
  };
  compare("d_hidden", dx, dx_noise, got.d_hidden, p.before_hidden, depth > 0 ? depth : 1);
  compare("d_weights", dw, dw_noise, got.d_weights, p.before_weights, depth > 0 ? depth : 1);
  compare("d_bias", db, db_noise, got.d_bias, p.before_bias, 1);
}

} // namespace perdita_tests
