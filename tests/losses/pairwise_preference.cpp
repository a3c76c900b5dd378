// SPDX-License-Identifier: MIT

// Formula sheet 14.6.

#include <perdita/pairwise_preference.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <perdita/brier.hpp>
#include <perdita/cross_entropy.hpp>
#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/normaliser.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;
using perdita::reduction;
using weights_of = perdita::pairwise_preference_options;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

struct expectation {
  wide value = 0;
  std::vector<wide> logits[2], scores[2];
};

/// Of one pair, all from the definition, with cross-entropy.
template <class T>
expectation expect(const std::vector<T> (&c)[2], const std::vector<T> (&s)[2], int label,
                   int preferred, const weights_of& w) {
  expectation e;
  const auto y = static_cast<std::size_t>(label);
  wide hit[2], miss[2];
  std::vector<wide> p[2];
  for (int side = 0; side < 2; ++side) {
    const std::vector<wide> x(c[side].begin(), c[side].end());
    const wide all = log_sum_exp(x, [](std::size_t) { return true; }),
               rivals = log_sum_exp(x, [&](std::size_t k) { return k != y; });
    hit[side] = exp(wide(x[y] - all));
    miss[side] = exp(wide(rivals - all));
    e.value += softplus(rivals - x[y]) / 2;
    for (std::size_t k = 0; k < x.size(); ++k) {
      p[side].push_back(exp(wide(x[k] - all)));
      e.logits[side].push_back((k == y ? wide(-miss[side]) : p[side][k]) / 2);
    }
  }
  const wide lead = hit[0] - hit[1];
  const wide sign = lead > 0 && preferred != 1 ? 1 : lead < 0 && preferred != 0 ? -1 : 0;
  e.value += w.consistency * sign * lead;
  for (int side = 0; side < 2; ++side)
    for (std::size_t k = 0; k < p[side].size(); ++k)
      e.logits[side][k] += w.consistency * (side == 0 ? sign : wide(-sign)) * hit[side] *
                           (k == y ? miss[side] : wide(-p[side][k]));

  const std::size_t heads = s[0].size();
  const wide t = preferred == 2 ? wide(0.5) : wide(preferred), n = static_cast<double>(heads);
  for (std::size_t j = 0; j < heads; ++j) {
    const wide z = wide(s[0][j]) - wide(s[1][j]);
    e.value += w.preference / n * (t * softplus(-z) + (1 - t) * softplus(z));
    wide slope = w.preference / n * ((1 - t) * logistic(z) - t * logistic(-z)); // σ(z) − t
    for (std::size_t i = 0; i < heads; ++i) {
      if (i == j)
        continue;
      const wide q = logistic(wide(s[0][i]) - wide(s[1][i]));
      e.value -= w.diversity / (n * (n - 1)) * (q * softplus(-z) + (1 - q) * softplus(z));
      slope -= w.diversity / (n * (n - 1)) * (logistic(z) - q);
    }
    e.scores[0].push_back(slope);
    e.scores[1].push_back(-slope);
  }
  return e;
}

template <class T> struct pairs {
  std::vector<T> c[2], s[2], of_c[2], of_s[2];
  pairs(std::size_t rows, std::size_t classes, std::size_t heads, double spread,
        random_numbers& random) {
    for (int side = 0; side < 2; ++side) {
      for (std::size_t i = 0; i < rows * classes; ++i)
        c[side].push_back(static_cast<T>(spread * random.normal()));
      for (std::size_t i = 0; i < rows * heads; ++i)
        s[side].push_back(static_cast<T>(spread * random.normal()));
      of_c[side].assign(rows * classes, T(7));
      of_s[side].assign(rows * heads, T(7));
    }
  }
  template <class Loss, class Labels, class Preferences>
  T run(const Loss& loss, const Labels& labels, const Preferences& preferences,
        const perdita::call_options<T>& call = {}, bool gradients = true) {
    const auto rows = static_cast<index>(labels.size());
    const auto view = [&](std::vector<T>& x) {
      return matrix_view<T>(x.data(), rows, static_cast<index>(x.size()) / rows);
    };
    if (!gradients)
      return loss(view(c[0]), view(c[1]), view(s[0]), view(s[1]), labels, preferences, call);
    return loss(view(c[0]), view(c[1]), view(s[0]), view(s[1]), labels, preferences,
                {view(of_c[0]), view(of_c[1]), view(of_s[0]), view(of_s[1])}, call);
  }
};

} // namespace

TEMPLATE_TEST_CASE("pairwise_preference: value and gradients", "[pairwise_preference]", float,
                   double) {
  using T = TestType;
  random_numbers random(51);
  error_judge of_values, of_slopes;
  for (const weights_of w :
       {weights_of{1, 1, 1}, weights_of{2, 0, 0}, weights_of{0, 3, 0}, weights_of{0.5, 0.25, 2}})
    for (const std::size_t heads : {1U, 2U, 3U, 9U})
      for (const std::size_t classes : {1U, 2U, 10U})
        for (const double spread : {0.0, 1.0, 30.0})
          for (const int preferred : {0, 1, 2}) {
            pairs<T> one(1, classes, heads, spread, random);
            const int y = static_cast<int>(random.below(classes));
            const expectation e = expect(one.c, one.s, y, preferred, w);
            const perdita::pairwise_preference loss(perdita::cross_entropy<T>(), w);
            const T value = one.run(loss, std::vector<int>{y}, std::vector<int>{preferred});
            CHECK(value ==
                  one.run(loss, std::vector<int>{y}, std::vector<int>{preferred}, {}, false));
            // The terms differ in sign: errors are in units of what they are made of.
            const wide scale = wide(std::numeric_limits<T>::epsilon()) *
                               (1 + w.preference + w.consistency + w.diversity);
            const auto add = [&](error_judge& of, T got, const wide& expected, const wide& size) {
              of.within(size_of(wide(got - expected)), 2, scale * size);
            };
            add(of_values, value, e.value, 1 + 2 * spread);
            for (int side = 0; side < 2; ++side) {
              for (std::size_t k = 0; k < classes; ++k)
                add(of_slopes, one.of_c[side][k], e.logits[side][k], 1);
              for (std::size_t h = 0; h < heads; ++h)
                add(of_slopes, one.of_s[side][h], e.scores[side][h], 1);
            }
          }
  report_accuracy<T>("pairwise_preference", "", in_epsilons_of_terms, of_values, of_slopes);
  INFO(of_values.worst() << " and " << of_slopes.worst());
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("pairwise_preference: digits of a gradient that is nearly 0", "[pairwise_preference]") {
  random_numbers random(52);
  pairs<double> one(1, 3, 1, 0, random);
  const perdita::pairwise_preference loss{perdita::cross_entropy<double>()};
  const auto check = [](double got, const wide& expected) {
    INFO(got << " " << text(expected));
    CHECK(size_of(wide(got - expected)) <= 1e-15 * size_of(expected));
  };
  for (const double z : {40.0, 700.0})
    for (const int preferred : {0, 1}) { // agreed with, in scores and in confidence
      one.s[0] = {preferred == 1 ? z : -z};
      one.c[0] = {preferred == 1 ? 41.0 : 40.0, 0, 0};
      one.c[1] = {preferred == 1 ? 40.0 : 41.0, 0, 0};
      const expectation e = expect(one.c, one.s, 0, preferred, {1, 1, 1});
      check(one.run(loss, std::vector<int>{0}, std::vector<int>{preferred}), e.value);
      check(one.of_s[0][0], e.scores[0][0]);
      check(one.of_c[1][0], e.logits[1][0]);
      check(one.of_c[0][2], e.logits[0][2]);
      // and contradicted
      const expectation other = expect(one.c, one.s, 0, 1 - preferred, {0, 1e6, 1});
      const perdita::pairwise_preference consistent(perdita::cross_entropy<double>(),
                                                    {.preference = 0, .consistency = 1e6});
      check(one.run(consistent, std::vector<int>{0}, std::vector<int>{1 - preferred}), other.value);
      check(one.of_c[1][0], other.logits[1][0]);
    }
}

TEST_CASE("pairwise_preference: the gradients are derivatives, the diversity's of its own half",
          "[pairwise_preference]") {
  random_numbers random(53);
  const std::vector<int> labels{1, 0, 2}, preferences{0, 1, 2};
  pairs<double> three(3, 3, 2, 1, random);
  const perdita::pairwise_preference loss(perdita::brier<double>(), {.diversity = 0});
  three.run(loss, labels, preferences);
  for (int side = 0; side < 2; ++side)
    for (const bool scores : {false, true}) {
      auto& x = scores ? three.s[side] : three.c[side];
      const auto g = scores ? three.of_s[side] : three.of_c[side];
      const auto report = perdita::testing::check_gradient(
          [&](const auto&) { return three.run(loss, labels, preferences, {}, false); }, x, g);
      INFO(report.message());
      CHECK(report.ok);
    }
  // What is constant in a head's gradient is the others'.
  const auto of_diversity = [&](double c) {
    const perdita::pairwise_preference with(perdita::brier<double>(), {.diversity = c});
    three.run(with, labels, preferences);
    return three.of_s[0];
  };
  const auto plain = of_diversity(0), diverse = of_diversity(1);
  for (std::size_t r = 0; r < 3; ++r) { // pulled apart, by as much
    const double first = diverse[2 * r] - plain[2 * r],
                 second = diverse[2 * r + 1] - plain[2 * r + 1];
    CHECK(std::abs(first + second) < 1e-15);
    const auto q = [&](std::size_t i) { return 1 / (1 + std::exp(three.s[1][i] - three.s[0][i])); };
    CHECK(std::abs(first + (q(2 * r) - q(2 * r + 1)) / 6) < 1e-15);
  }
}

TEST_CASE("pairwise_preference: rows, reductions and options", "[pairwise_preference]") {
  random_numbers random(54);
  const std::size_t rows = 40, classes = 7, heads = 3;
  pairs<float> all(rows, classes, heads, 1, random);
  std::vector<std::int16_t> labels;
  std::vector<unsigned char> preferences;
  std::vector<float> weights, upstream, each(rows);
  for (std::size_t r = 0; r < rows; ++r) {
    labels.push_back(r % 9 == 4 ? std::int16_t(-1)
                                : static_cast<std::int16_t>(random.below(classes)));
    preferences.push_back(static_cast<unsigned char>(random.below(3)));
    weights.push_back(static_cast<float>(r % 4) / 2);
    upstream.push_back(static_cast<float>(random.normal()));
  }
  all.c[0][0] = all.s[1][0] = static_cast<float>(nan); // of the pair of weight 0
  const perdita::pairwise_preference loss(perdita::cross_entropy<float>({.ignore_index = -1}));
  const perdita::pairwise_preference none(
      perdita::cross_entropy<float>({.ignore_index = -1, .reduction = reduction::none}));
  perdita::call_options<float> call;
  call.row_weights = weights;
  call.upstream = upstream;
  call.values = each;
  call.scale = 2;
  const float value = all.run(loss, labels, preferences, call);
  double sum = 0, count = 0;
  for (std::size_t r = 0; r < rows; ++r)
    count += labels[r] < 0 ? 0 : static_cast<double>(weights[r]);
  for (std::size_t r = 0; r < rows; ++r) {
    pairs<float> one(1, classes, heads, 1, random);
    const auto part = [r](const std::vector<float>& x, std::size_t n) {
      const auto begin = x.begin() + static_cast<std::ptrdiff_t>(r * n);
      return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(n));
    };
    const bool counts = labels[r] >= 0 && weights[r] != 0;
    for (int side = 0; side < 2; ++side) {
      one.c[side] = part(all.c[side], classes);
      one.s[side] = part(all.s[side], heads);
    }
    const float own =
        counts ? one.run(loss, std::vector<int>{labels[r]}, std::vector<int>{preferences[r]})
               : 0.0F;
    sum += static_cast<double>(weights[r] * own);
    CHECK(std::abs(each[r] - weights[r] * own) < 2e-6F);
    for (int side = 0; side < 2; ++side) {
      const auto c = part(all.of_c[side], classes), s = part(all.of_s[side], heads);
      const float factor = counts ? 2 * weights[r] * upstream[r] / static_cast<float>(count) : 0.0F;
      for (std::size_t k = 0; k < classes; ++k)
        CHECK(std::abs(c[k] - (counts ? factor * one.of_c[side][k] : 0.0F)) < 1e-7F);
      for (std::size_t h = 0; h < heads; ++h)
        CHECK(std::abs(s[h] - (counts ? factor * one.of_s[side][h] : 0.0F)) < 1e-7F);
    }
  }
  CHECK(std::abs(static_cast<double>(value) - sum / count) < 1e-6);
  CHECK(std::abs(static_cast<double>(all.run(none, labels, preferences, call)) - sum) < 2e-5);

  all.run(loss, labels, preferences, call);
  pairs<float> again = all;
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  CHECK(again.run(loss, labels, preferences, call) == value);
  CHECK((again.of_c[0] == all.of_c[0] && again.of_c[1] == all.of_c[1]));
  CHECK((again.of_s[0] == all.of_s[0] && again.of_s[1] == all.of_s[1]));
  call.accumulate = true;
  again.run(loss, labels, preferences, call);
  for (int side = 0; side < 2; ++side) {
    for (std::size_t i = 0; i < rows * classes; ++i)
      CHECK(std::abs(again.of_c[side][i] - 2 * all.of_c[side][i]) < 1e-7F);
    for (std::size_t i = 0; i < rows * heads; ++i)
      CHECK(again.of_s[side][i] == 2 * all.of_s[side][i]);
  }
}

TEST_CASE("pairwise_preference: special pairs", "[pairwise_preference]") {
  random_numbers random(55);
  const std::vector<int> label{1};
  const perdita::pairwise_preference loss{perdita::cross_entropy<double>()};
  const perdita::pairwise_preference no_diversity(perdita::cross_entropy<double>(),
                                                  {.diversity = 0});
  pairs<double> one(1, 3, 2, 1, random);
  one.s[0] = {inf, 1};
  CHECK(std::isfinite(one.run(no_diversity, label, std::vector<int>{1})));
  CHECK(one.of_s[0][0] == 0);
  CHECK(one.run(no_diversity, label, std::vector<int>{0}) == inf);
  CHECK(one.of_s[0][0] == 0.5);
  one.s[0] = one.s[1] = {inf, 1};
  CHECK(std::isnan(one.run(loss, label, std::vector<int>{1})));
  CHECK((std::isnan(one.of_s[0][0]) && std::isnan(one.of_s[1][1])));
  CHECK(std::isfinite(one.of_c[0][0]));
  one.s[0] = {nan, 1};
  CHECK(std::isnan(one.run(loss, label, std::vector<int>{2})));

  one = pairs<double>(1, 3, 2, 1, random);
  one.c[0] = one.c[1]; // on the kink
  const auto plain =
      perdita::pairwise_preference(perdita::cross_entropy<double>(), {.consistency = 0});
  for (const int preferred : {0, 1, 2}) {
    one.run(plain, label, std::vector<int>{preferred});
    const auto expected = one.of_c[0];
    one.run(loss, label, std::vector<int>{preferred});
    CHECK(one.of_c[0] == expected);
  }
  one.c[0] = {-inf, 2, 0}; // a masked class
  CHECK(std::isfinite(one.run(loss, label, std::vector<int>{0})));
  CHECK(one.of_c[0][0] == 0);
  for (const double bad : {nan, inf}) {
    one.c[1] = {bad, 1, 2};
    CHECK(std::isnan(one.run(loss, label, std::vector<int>{0})));
    CHECK((std::isnan(one.of_c[1][0]) && std::isnan(one.of_c[0][1]) &&
           std::isfinite(one.of_s[0][0])));
  }
  CHECK(perdita::pairwise_preference(perdita::cross_entropy<double>())(
            matrix_view<double>(one.c[0].data(), 0, 3), matrix_view<double>(one.c[1].data(), 0, 3),
            matrix_view<double>(one.s[0].data(), 0, 2), matrix_view<double>(one.s[1].data(), 0, 2),
            std::vector<int>{}, std::vector<int>{}) == 0);
}

TEST_CASE("pairwise_preference: what is refused", "[pairwise_preference]") {
  using Catch::Matchers::ContainsSubstring;
  using loss_type = perdita::pairwise_preference<perdita::cross_entropy<double>>;
  for (const double bad : {-1.0, inf, nan}) {
    CHECK_THROWS_WITH(loss_type({}, {.preference = bad}), ContainsSubstring("preference is"));
    CHECK_THROWS_WITH(loss_type({}, {.consistency = bad}), ContainsSubstring("consistency is"));
    CHECK_THROWS_WITH(loss_type({}, {.diversity = bad}), ContainsSubstring("diversity is"));
  }
  random_numbers random(56);
  pairs<double> two(2, 3, 2, 1, random);
  const loss_type loss{perdita::cross_entropy<double>()};
  const std::vector<int> labels{0, 1}, fine{2, 0};
  CHECK_THROWS_WITH(two.run(loss, labels, std::vector<int>{0, 3}),
                    ContainsSubstring("preferences[1] is 3"));
  CHECK_THROWS_WITH(two.run(loss, labels, std::vector<int>{-1, 0}),
                    ContainsSubstring("preferences[0] is -1"));
  CHECK_THROWS_WITH(two.run(loss, labels, std::vector<int>{0}),
                    ContainsSubstring("size of preferences is 1"));
  CHECK_THROWS_WITH(two.run(loss, std::vector<int>{0, 3}, fine),
                    ContainsSubstring("labels[1] is 3"));
  perdita::call_options<double> call;
  std::vector<double> report(2);
  call.entropy = report;
  CHECK_THROWS_WITH(two.run(loss, labels, fine, call), ContainsSubstring("by-product"));
  call = {};
  std::vector<double> short_values(1);
  call.values = short_values;
  CHECK_THROWS_WITH(two.run(loss, labels, fine, call), ContainsSubstring("size of values"));
  const auto view = [](std::vector<double>& x, index rows, index cols) {
    return matrix_view<double>(x.data(), rows, cols);
  };
  const auto c = view(two.c[0], 2, 3), d = view(two.c[1], 2, 3), s = view(two.s[0], 2, 2),
             t = view(two.s[1], 2, 2), dc = view(two.of_c[0], 2, 3), dd = view(two.of_c[1], 2, 3),
             ds = view(two.of_s[0], 2, 2), dt = view(two.of_s[1], 2, 2);
  CHECK_THROWS_WITH(loss(c, view(two.c[1], 2, 2), s, t, labels, fine),
                    ContainsSubstring("shape of the second logits is 2 x 2"));
  CHECK_THROWS_WITH(loss(c, d, s, view(two.s[1], 1, 2), labels, fine),
                    ContainsSubstring("shape of the second scores is 1 x 2"));
  CHECK_THROWS_WITH(loss(c, d, view(two.s[0], 2, 0), view(two.s[1], 2, 0), labels, fine),
                    ContainsSubstring("at least 1 head"));
  CHECK_THROWS_WITH(loss(c, d, s, t, labels, fine, {dc, dd, ds, view(two.of_s[1], 2, 1)}),
                    ContainsSubstring("shape of the gradient of the second scores"));
  CHECK_THROWS_WITH(loss(c, d, s, t, labels, fine, {dc, dc, ds, dt}),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(c, d, s, t, labels, fine, {dc, d, ds, dt}), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(
      loss(c, d, s, t, labels, fine, {dc, dd, ds, matrix_view<double>(nullptr, 2, 2)}),
      ContainsSubstring("gradient of the second scores is null"));
  for (const auto* g : {&two.of_c[0], &two.of_c[1], &two.of_s[0], &two.of_s[1]})
    for (const double untouched : *g)
      CHECK(untouched == 7);
}

TEST_CASE("pairwise_preference: what the mean divides by", "[pairwise_preference]") {
  random_numbers random(55);
  pairs<double> all(3, 4, 2, 1, random);
  const std::vector<int> labels{1, 3, 0}, preferences{0, 1, 2};
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    const perdita::pairwise_preference loss(perdita::cross_entropy<double>({.reduction = how}));
    const double value = all.run(loss, labels, preferences, call);
    return all_of(value, all.of_c[0], all.of_c[1], all.of_s[0], all.of_s[1]);
  });
}

} // namespace perdita_tests
