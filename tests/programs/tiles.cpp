// SPDX-License-Identifier: MIT

// The linear head's products of bfloat16 by tiles: by AVX512-BF16 or emulated where the processor
// has none. A program of its own, because the tests of all other things are compiled without.

#undef PERDITA_TILES
#define PERDITA_TILES 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

#include "support/executors.hpp"

namespace {

using index = std::int64_t;
using perdita::bfloat16;

int failures = 0;
void expect(bool right, const std::string& what) {
  if (right)
    return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

struct problem {
  index rows, features, classes, hidden_step, weight_step;
  std::vector<bfloat16> hidden, weights;
  std::vector<float> bias;
  std::vector<int> labels; // -1: ignored

  problem(index n, index d, index c, index gap)
      : rows(n), features(d), classes(c), hidden_step(d + gap), weight_step(d + 3 * gap) {
    std::mt19937 random(static_cast<unsigned>(n * 7 + d * 3 + c));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<bfloat16>& v, index size, float scale) {
      for (index i = 0; i < size; ++i)
        v.push_back({perdita::core::narrow_bfloat16(scale * normal(random))});
    };
    fill(hidden, n * hidden_step, 1);
    fill(weights, c * weight_step, 1 / std::sqrt(static_cast<float>(d)));
    for (index j = 0; j < c; ++j)
      bias.push_back(normal(random));
    for (index i = 0; i < n; ++i)
      labels.push_back(i % 5 == 3 ? -1 : static_cast<int>(random() % static_cast<unsigned>(c)));
  }
  double h(index i, index k) const { return wide(hidden, i * hidden_step + k); }
  double w(index j, index k) const { return wide(weights, j * weight_step + k); }
  static double wide(const std::vector<bfloat16>& v, index i) {
    return static_cast<double>(perdita::core::widen_bfloat16(v[static_cast<std::size_t>(i)].bits));
  }
};

struct result {
  float value = 0;
  std::vector<float> d_hidden, d_weights, d_bias;
  bool operator==(const result&) const = default;
};

/// Buffers of gradients hold `before`, which is added to.
result run(const problem& p, std::size_t budget, const perdita::executor& run_on, bool accumulate) {
  const auto size = [](index n) { return static_cast<std::size_t>(n); };
  const float before = accumulate ? 1.0f : NAN;
  result r{0, std::vector<float>(size(p.rows * p.features), before),
           std::vector<float>(size(p.classes * p.features), before),
           std::vector<float>(size(p.classes), before)};
  const perdita::linear head(
      perdita::cross_entropy<float>({.label_smoothing = 0.1f, .ignore_index = -1}),
      {.budget = budget, .accumulate_weights = accumulate});
  perdita::call_options<float> call;
  call.run_on = run_on;
  call.accumulate = accumulate;
  const perdita::matrix_view hidden(p.hidden.data(), p.rows, p.features, p.hidden_step, 1);
  const perdita::matrix_view weights(p.weights.data(), p.classes, p.features, p.weight_step, 1);
  const perdita::matrix_view d_hidden(r.d_hidden.data(), p.rows, p.features);
  const perdita::matrix_view d_weights(r.d_weights.data(), p.classes, p.features);
  const perdita::affine d_layer(d_weights, r.d_bias);
  r.value = head(hidden, perdita::affine(weights, p.bias), p.labels, d_hidden, d_layer, call);
  const float alone = head(hidden, perdita::affine(weights, p.bias), p.labels, call);
  expect(alone == r.value, "another value without gradients");
  return r;
}

/// By plain loops; and of every element of the gradients what a relative error of 1 of every
/// element of the scores' gradient would come to.
struct reference {
  double value = 0;
  std::vector<double> d_hidden, d_weights, d_hidden_size, d_weights_size;

  explicit reference(const problem& p) {
    const auto size = [](index n) { return static_cast<std::size_t>(n); };
    d_hidden.resize(size(p.rows * p.features));
    d_weights.resize(size(p.classes * p.features));
    d_hidden_size = d_hidden, d_weights_size = d_weights;
    const auto counted =
        std::count_if(p.labels.begin(), p.labels.end(), [](int y) { return y >= 0; });
    for (index i = 0; i < p.rows; ++i) {
      const int y = p.labels[size(i)];
      if (y < 0)
        continue;
      std::vector<double> s(size(p.classes));
      for (index j = 0; j < p.classes; ++j) {
        s[size(j)] = static_cast<double>(p.bias[size(j)]);
        for (index k = 0; k < p.features; ++k)
          s[size(j)] += p.h(i, k) * p.w(j, k);
      }
      const double most = *std::max_element(s.begin(), s.end());
      double sum = 0, mean = 0;
      for (const double x : s)
        sum += std::exp(x - most), mean += x / static_cast<double>(p.classes);
      const double log_sum = most + std::log(sum), smoothing = static_cast<double>(0.1f);
      value += (log_sum - (1 - smoothing) * s[size(y)] - smoothing * mean) /
               static_cast<double>(counted);
      for (index j = 0; j < p.classes; ++j) {
        const double target =
            (j == y ? 1 - smoothing : 0.0) + smoothing / static_cast<double>(p.classes);
        const double g = (std::exp(s[size(j)] - log_sum) - target) / static_cast<double>(counted);
        for (index k = 0; k < p.features; ++k) {
          d_hidden[size(i * p.features + k)] += g * p.w(j, k);
          d_weights[size(j * p.features + k)] += g * p.h(i, k);
          d_hidden_size[size(i * p.features + k)] += std::abs(g * p.w(j, k));
          d_weights_size[size(j * p.features + k)] += std::abs(g * p.h(i, k));
        }
      }
    }
  }
};

/// The largest error in units of its bound: half a unit in the last of bfloat16's eight digits.
double worst(const std::vector<float>& got, const std::vector<double>& right,
             const std::vector<double>& size, double before) {
  double w = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double bound = std::ldexp(size[i], -8) + 1e-6 * (size[i] + before);
    const double error =
        std::abs(static_cast<double>(got[i]) - right[i] - before) / (bound + 1e-30);
    w = error <= w ? w : error; // a NaN stays
  }
  return w;
}

void check(index rows, index features, index classes, index gap) {
  const problem p(rows, features, classes, gap);
  const reference right(p);
  const std::string name = std::to_string(rows) + " x " + std::to_string(features) + " x " +
                           std::to_string(classes) + " + " + std::to_string(gap);
  const perdita_tests::threads_executor three(3, perdita_tests::task_order::shuffled);
  for (const std::size_t budget : {std::size_t{0}, std::size_t{4} << 20})
    for (const bool accumulate : {false, true}) {
      const result r = run(p, budget, perdita::serial, accumulate);
      const double before = accumulate ? 1 : 0;
      const double of_hidden = worst(r.d_hidden, right.d_hidden, right.d_hidden_size, before),
                   of_weights = worst(r.d_weights, right.d_weights, right.d_weights_size, before);
      expect(std::abs(static_cast<double>(r.value) - right.value) <= 2e-6 * (1 + right.value),
             name + ": value " + std::to_string(r.value) + ", not " + std::to_string(right.value));
      expect(of_hidden <= 1 && of_weights <= 1, name + ": gradients " + std::to_string(of_hidden) +
                                                    " and " + std::to_string(of_weights) +
                                                    " of the bound");
      // Rounded to float the errors would be hundreds of times smaller: then no tile was used.
      expect(of_weights > 0.02 || classes < 64, name + ": not by tiles");
      expect(run(p, budget, three, accumulate) == r, name + ": other bits with other threads");
    }
}

} // namespace

int main() {
  check(1, 1, 64, 0);
  check(5, 33, 65, 1);
  check(40, 64, 100, 0);
  check(70, 31, 513, 3);
  check(20, 64, 70, 1); // weights an odd number of elements apart
  check(300, 96, 1100, 0);
  check(17, 2100, 64, 0);
  check(9, 20, 30, 0); // too few classes: by floats
  if (failures == 0)
    std::printf("products by tiles: right\n");
  return failures;
}
