// SPDX-License-Identifier: MIT

// Gradient filtering: what is dropped stays within what was allowed, and its effect within the
// bound that the head states.

#include <perdita/linear.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/linear_run.hpp"

namespace perdita_tests {
namespace {

/// A few classes take most of every row: hidden states lean towards their label's weights, and the
/// bias falls off as words do.
linear_problem<float> peaked_problem(index rows = 70, index classes = 3000) {
  // Of the few pieces of 3000 classes all are measured; of more, where the features make it pay.
  const index features = classes > 4000 ? 192 : 48;
  linear_problem<float> p = make_linear_problem<float>(rows, features, classes, 5, 1);
  for (index c = 0; c < p.classes; ++c)
    p.bias[static_cast<std::size_t>(c)] = -1.2F * std::log(static_cast<float>(c + 1));
  for (index r = 0; r < p.rows; ++r)
    for (index d = 0; d < p.features; ++d) {
      auto& x = p.hidden[static_cast<std::size_t>(r * p.features + d)];
      x += 6 * p.w(p.labels[static_cast<std::size_t>(r)], d);
    }
  return p;
}

struct gradients {
  float value = 0;
  std::vector<float> hidden, weights, bias;
};

gradients differentiate(const linear_problem<float>& p, const perdita::linear_options& options,
                        perdita::executor run_on = perdita::serial,
                        const perdita::cross_entropy<float>& loss = {}, float scale = 1) {
  gradients g;
  g.hidden.assign(p.hidden.size(), 3);
  g.weights.assign(p.weights.size(), 3);
  g.bias.assign(p.bias.size(), 3);
  const perdita::linear head(loss, options);
  const perdita::matrix_view<const float> hidden(p.hidden.data(), p.rows, p.features),
      weights(p.weights.data(), p.classes, p.features);
  const perdita::matrix_view<float> d_hidden(g.hidden.data(), p.rows, p.features),
      d_weights(g.weights.data(), p.classes, p.features);
  perdita::call_options<float> call{.row_weights = p.row_weights, .upstream = p.upstream};
  call.scale = scale;
  call.run_on = run_on;
  g.value = head(hidden, perdita::affine(weights, p.bias), p.labels, d_hidden,
                 perdita::affine(d_weights, g.bias), call);
  return g;
}

double length(const float* x, const float* y, index n) {
  double sum = 0;
  for (index i = 0; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - (y ? static_cast<double>(y[i]) : 0.0);
    sum += d * d;
  }
  return std::sqrt(sum);
}

/// Each row's Σ_j |G_ij|, in double.
std::vector<double> row_masses(const linear_problem<float>& p) {
  std::vector<double> masses;
  for (index r = 0; r < p.rows; ++r) {
    std::vector<double> z;
    for (index c = 0; c < p.classes; ++c) {
      double sum = static_cast<double>(p.bias[static_cast<std::size_t>(c)]);
      for (index d = 0; d < p.features; ++d)
        sum += static_cast<double>(p.x(r, d)) * static_cast<double>(p.w(c, d));
      z.push_back(sum);
    }
    const double most = *std::max_element(z.begin(), z.end());
    double all = 0, rivals = 0;
    for (index c = 0; c < p.classes; ++c) {
      const double e = std::exp(z[static_cast<std::size_t>(c)] - most);
      all += e;
      rivals += c == p.labels[static_cast<std::size_t>(r)] ? 0 : e;
    }
    masses.push_back(2 * rivals / all / static_cast<double>(p.rows));
  }
  return masses;
}

} // namespace

TEST_CASE("linear: what drop_mass drops is within the share, and its effect within the bound",
          "[linear]") {
  const auto p = peaked_problem(70, GENERATE(3000, 6000)); // looked through at once; tried first
  const gradients exact = differentiate(p, {});
  const auto masses = row_masses(p);
  double longest = 0;
  for (index c = 0; c < p.classes; ++c)
    longest = std::max(longest, length(p.weights.data() + c * p.features, nullptr, p.features));
  const std::size_t few_pieces = std::size_t{400} << 10;
  for (const std::size_t budget : {std::size_t{0}, few_pieces})
    for (const double share : {1e-3, 1e-2, 0.1, 0.3}) {
      std::vector<double> dropped(masses.size(), -1);
      const gradients g =
          differentiate(p, {.budget = budget, .drop_mass = share, .dropped = dropped});
      INFO("share " << share << ", budget " << budget);
      CHECK(g.value == exact.value);
      CHECK(length(g.bias.data(), exact.bias.data(), p.classes) <=
            1e-6 * length(exact.bias.data(), nullptr, p.classes));
      double all = 0, weights_bound = 0;
      for (index r = 0; r < p.rows; ++r) {
        const auto i = static_cast<std::size_t>(r);
        CHECK(dropped[i] >= 0);
        CHECK(dropped[i] <= share * masses[i] * (1 + 1e-4));
        const double rounding =
            1e-5 * length(exact.hidden.data() + r * p.features, nullptr, p.features);
        CHECK(length(g.hidden.data() + r * p.features, exact.hidden.data() + r * p.features,
                     p.features) <= dropped[i] * longest + rounding);
        all += dropped[i];
        weights_bound += dropped[i] * length(p.hidden.data() + r * p.features, nullptr, p.features);
      }
      const auto n = static_cast<index>(exact.weights.size());
      CHECK(length(g.weights.data(), exact.weights.data(), n) <=
            weights_bound + 1e-5 * length(exact.weights.data(), nullptr, n));
      if (share == 0.3) { // and something is dropped
        CHECK(all > 0);
        CHECK(length(g.weights.data(), exact.weights.data(), n) > 0);
      }
    }
}

TEST_CASE("linear: no more is dropped than is said to be", "[linear]") {
  auto p = peaked_problem();
  for (index c = 0; c < p.classes; ++c) // a feature in which what rivals lose adds up
    p.weights[static_cast<std::size_t>(c * p.features)] = 1;
  const gradients exact = differentiate(p, {});
  std::vector<double> dropped(static_cast<std::size_t>(p.rows));
  const gradients g = differentiate(p, {.drop_mass = 0.3, .dropped = dropped});
  double missing = 0, said = 0;
  for (index r = 0; r < p.rows; ++r) {
    const auto at = static_cast<std::size_t>(r * p.features);
    const double off = static_cast<double>(exact.hidden[at]) - static_cast<double>(g.hidden[at]);
    CHECK(off <= 1.001 * dropped[static_cast<std::size_t>(r)] + 1e-8);
    missing += off;
    said += dropped[static_cast<std::size_t>(r)];
  }
  CHECK(missing > 0.7 * said); // pieces in which a list does not pay are kept whole
}

TEST_CASE("linear: slices together drop no more than the share", "[linear]") {
  const auto p = peaked_problem(40, 6000);
  const auto masses = row_masses(p);
  constexpr index slices = 8;
  constexpr double share = 0.3;
  const index each = p.classes / slices;
  std::vector<double> dropped(masses.size());
  const perdita::linear head(perdita::cross_entropy<float>{},
                             {.drop_mass = share, .dropped = dropped});
  const perdita::matrix_view<const float> hidden(p.hidden.data(), p.rows, p.features);
  const auto slice = [&](index s) {
    const perdita::matrix_view<const float> weights(p.weights.data() + s * each * p.features, each,
                                                    p.features);
    const perdita::vector_view<const float> bias(p.bias.data() + s * each, each);
    return head.slice(hidden, perdita::affine(weights, bias), p.labels, s * each, p.classes);
  };
  std::vector<perdita::linear_record> all(masses.size()), one(masses.size());
  slice(0).summarise(all);
  for (index s = 1; s < slices; ++s) {
    slice(s).summarise(one);
    slice(s).merge(all, one);
  }
  std::vector<float> d_hidden(p.hidden.size()),
      d_weights(static_cast<std::size_t>(each) * static_cast<std::size_t>(p.features));
  std::vector<double> sum(masses.size());
  for (index s = 0; s < slices; ++s) {
    slice(s).backward(all, perdita::matrix_view<float>(d_hidden.data(), p.rows, p.features),
                      perdita::matrix_view<float>(d_weights.data(), each, p.features));
    for (std::size_t i = 0; i < sum.size(); ++i)
      sum[i] += dropped[i];
  }
  for (std::size_t i = 0; i < sum.size(); ++i)
    CHECK(sum[i] <= share * masses[i] * (1 + 1e-4));
  CHECK(std::any_of(sum.begin(), sum.end(), [](double d) { return d > 0; }));
}

TEST_CASE("linear: of rows that lose nothing, that is said", "[linear]") {
  auto p = peaked_problem(20);
  p.labels[3] = p.labels[19] = -100;
  for (const double share : {0.3, 0.0}) {
    std::vector<double> dropped(20, -1);
    differentiate(p, {.drop_mass = share, .dropped = dropped});
    CHECK(dropped[3] == 0);
    CHECK(dropped[19] == 0);
    for (const double d : dropped)
      CHECK((share > 0 ? d >= 0 : d == 0));
  }
}

TEST_CASE("linear: drop_below drops by size, with what is in an entry but the common scale",
          "[linear]") {
  const auto p = peaked_problem();
  const gradients exact = differentiate(p, {});
  const auto n = static_cast<index>(exact.weights.size());
  const double all = length(exact.weights.data(), nullptr, n);
  const gradients g = differentiate(p, {.drop_below = 0x1p-12});
  const double error = length(g.weights.data(), exact.weights.data(), n);
  CHECK(error > 0);
  CHECK(error < 0.02 * all);
  CHECK(g.value == exact.value);

  SECTION("a loss scale changes nothing") {
    const gradients scaled = differentiate(p, {.drop_below = 0x1p-12}, perdita::serial, {}, 1024);
    for (std::size_t i = 0; i < g.weights.size(); ++i)
      REQUIRE(scaled.weights[i] == 1024 * g.weights[i]);
  }
  SECTION("a row's weight does") {
    auto heavy = p;
    heavy.row_weights.assign(static_cast<std::size_t>(p.rows), 4096.F);
    const gradients h = differentiate(heavy, {.drop_below = 0x1p-12});
    // 4096 times the weight, 1/4096 of the share: only now everything is large enough to be kept
    CHECK(length(h.weights.data(), exact.weights.data(), n) < 0.01 * error);
  }
}

TEST_CASE("linear: a confident row keeps the gradient of its log-Z penalty", "[linear]") {
  linear_problem<float> p = make_linear_problem<float>(16, 48, 3000, 6, 0.1);
  for (index r = 0; r < p.rows; ++r) // p(label) is 1 to the last digit, log Z is not 0
    p.bias[static_cast<std::size_t>(p.labels[static_cast<std::size_t>(r)])] = 0;
  for (index r = 0; r < p.rows; ++r) {
    p.labels[static_cast<std::size_t>(r)] = 7;
  }
  p.bias[7] = 60;
  const perdita::cross_entropy<float> loss({.log_z_penalty = 1e-4F});
  const gradients exact = differentiate(p, {}, perdita::serial, loss);
  const gradients g = differentiate(p, {.drop_mass = 0.01}, perdita::serial, loss);
  const auto n = static_cast<index>(exact.hidden.size());
  const double size = length(exact.hidden.data(), nullptr, n);
  CHECK(size > 0);
  CHECK(length(g.hidden.data(), exact.hidden.data(), n) <= 0.01 * size);
}

TEST_CASE("linear: flat rows have nothing to drop, and lose nothing", "[linear]") {
  const auto p = make_linear_problem<float>(40, 32, 3000, 8, 0.05, true);
  auto flat = p;
  flat.bias.assign(flat.bias.size(), 0);
  const gradients exact = differentiate(flat, {});
  for (const double share : {0.1, 0.5}) { // the second threshold would drop half of all, or more
    const gradients g = differentiate(flat, {.drop_mass = share});
    CHECK(g.hidden == exact.hidden);
    CHECK(g.weights == exact.weights);
  }
}

TEST_CASE("linear: where nothing is worth a list, it is not searched for one", "[linear]") {
  auto p = make_linear_problem<float>(40, 8, 6000, 8, 0.05);
  p.bias.assign(p.bias.size(), 0);
  for (const std::size_t budget : {std::size_t{0}, std::size_t{100} << 10}) {
    std::vector<double> dropped(static_cast<std::size_t>(p.rows), -1);
    const gradients exact = differentiate(p, {.budget = budget}),
                    g = differentiate(p, {.budget = budget, .drop_mass = 0.5, .dropped = dropped});
    CHECK(g.hidden == exact.hidden);
    CHECK(g.weights == exact.weights);
    CHECK(dropped == std::vector<double>(dropped.size(), 0));
  }
}

TEST_CASE("linear: filtered gradients have the same bits for any number of threads",
          "[linear][threads]") {
  auto p = peaked_problem(40, GENERATE(1500, 5000));
  ignore_some(p);
  for (const std::size_t budget : {std::size_t{0}, std::size_t{100} << 10}) {
    const perdita::linear_options options{.budget = budget, .drop_mass = 0.2};
    const gradients one = differentiate(p, options);
    for (const std::size_t n : {2U, 7U}) {
      const threads_executor pool(n, task_order::shuffled);
      const gradients g = differentiate(p, options, pool);
      CHECK(g.hidden == one.hidden);
      CHECK(g.weights == one.weights);
      CHECK(g.bias == one.bias);
    }
  }
}

TEST_CASE("linear: a NaN is never dropped, and no other row changes", "[linear]") {
  const auto p = peaked_problem();
  auto poisoned = p;
  poisoned.hidden[static_cast<std::size_t>(3 * p.features + 1)] =
      std::numeric_limits<float>::quiet_NaN();
  for (const perdita::linear_options& options : {perdita::linear_options{.drop_mass = 0.3},
                                                 perdita::linear_options{.drop_below = 0x1p-12}}) {
    const gradients g = differentiate(poisoned, options);
    for (index d = 0; d < p.features; ++d)
      CHECK(std::isnan(g.hidden[static_cast<std::size_t>(3 * p.features + d)]));
    for (index d = 0; d < p.features; ++d)
      CHECK(!std::isnan(g.hidden[static_cast<std::size_t>(4 * p.features + d)]));
  }
}

TEST_CASE("linear: filters are refused where they mean nothing", "[linear]") {
  using Catch::Matchers::ContainsSubstring;
  const perdita::cross_entropy<float> loss;
  CHECK_THROWS_WITH(perdita::linear(loss, {.drop_mass = 1}), ContainsSubstring("drop_mass is 1"));
  CHECK_THROWS_WITH(perdita::linear(loss, {.drop_below = -1}),
                    ContainsSubstring("drop_below is -1"));
  CHECK_THROWS_WITH(perdita::linear(loss, {.drop_mass = 0.1, .drop_below = 0.1}),
                    ContainsSubstring("drop_below is 0.1"));
  const auto p = make_linear_problem<float>(3, 4, 5, 1);
  const perdita::linear flat(perdita::z_loss<float>{}, {.drop_below = 0.1});
  std::vector<float> d_hidden(p.hidden.size(), 3), d_weights(p.weights.size(), 3);
  const perdita::matrix_view<const float> hidden(p.hidden.data(), 3, 4),
      weights(p.weights.data(), 5, 4);
  CHECK_THROWS_WITH(flat(hidden, weights, p.labels, perdita::matrix_view(d_hidden.data(), 3, 4),
                         perdita::matrix_view(d_weights.data(), 5, 4)),
                    ContainsSubstring("drop_below"));
  CHECK(d_weights == std::vector<float>(p.weights.size(), 3));
  std::vector<double> few(2);
  CHECK_THROWS_WITH(differentiate(p, {.drop_mass = 0.1, .dropped = few}),
                    ContainsSubstring("size of dropped is 2"));
}

} // namespace perdita_tests
