// SPDX-License-Identifier: MIT

// The supervised contrastive loss, InfoNCE and NT-Xent by it.

#include <perdita/sup_con.hpp>

#include <perdita/cross_entropy.hpp>
#include <perdita/similarity.hpp>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

wide sup_con(const wide_comparisons& c, double temperature, bool inside) {
  wide total = 0;
  int anchors = 0;
  for (perdita::index i = 0; i < c.anchors(); ++i) {
    if (!c.has(i, 1))
      continue;
    ++anchors;
    wide all = 0, own = 0, sum = 0;
    int count = 0;
    for (perdita::index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) == 0)
        continue;
      const wide s = c.score(i, j) / temperature, image = exp(s);
      all += image;
      if (c.of(i, j) > 0) {
        own += image;
        sum += s;
        ++count;
      }
    }
    total += log(all) - (inside ? wide(log(own) - log(wide(count))) : wide(sum / count));
  }
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

} // namespace

TEMPLATE_TEST_CASE("The supervised contrastive loss is its definition", "", float, double) {
  for (const bool inside : {false, true})
    for (const double temperature : {0.07, 1.0})
      for (const int classes : {1, 4, 30}) {
        const perdita::sup_con<TestType> loss(
            {.temperature = temperature,
             .mean = inside ? perdita::positives_mean::inside : perdita::positives_mean::outside});
        check_anchor_values<TestType>(
            "sup_con", loss,
            {.value_budget = 8 + 4 / temperature, .gradient_budget = 32 + 8 / temperature},
            [&](const wide_comparisons& c) { return sup_con(c, temperature, inside); }, 9, 17, 3,
            classes);
      }
}

TEST_CASE("Supervised contrastive: calls", "[threads]") {
  check_anchor_calls(perdita::sup_con<double>());
  check_anchor_calls(perdita::sup_con<float>({.normalise = false}));
}

TEST_CASE("InfoNCE and NT-Xent by pairs and views", "") {
  const auto x = unit_rows(sheet_x()), y = sheet_y();
  const perdita::sup_con<double> loss({.temperature = 0.5});
  const perdita::similarity head(perdita::cross_entropy<double>{}, {.scale = 2});
  batch<double> g(6, 4), h(6, 4), g2(6, 4), h2(6, 4);
  double slope = 0;
  const perdita::sup_con<double> with_slope({.temperature = 0.5, .d_temperature = &slope});
  CHECK(near(with_slope.pairs(x.view(), y.view(), g.view(), h.view()),
             head(x.view(), y.view(), g2.view(), h2.view()), 1e-14));
  for (std::size_t i = 0; i < 24; ++i) {
    CHECK(std::abs(g.x[i] - g2.x[i]) < 1e-14);
    CHECK(std::abs(h.x[i] - h2.x[i]) < 1e-14);
  }
  const double above =
      perdita::sup_con<double>({.temperature = 0.5 + 1e-5}).pairs(x.view(), y.view());
  const double below =
      perdita::sup_con<double>({.temperature = 0.5 - 1e-5}).pairs(x.view(), y.view());
  CHECK(near(slope, (above - below) / 2e-5, 1e-8));

  batch<double> both(12, 4), d_both(12, 4), d_again(12, 4);
  std::copy(x.x.begin(), x.x.end(), both.x.begin());
  std::copy(y.x.begin(), y.x.end(), both.x.begin() + 24);
  std::vector<int> partner;
  for (int i = 0; i < 12; ++i)
    partner.push_back((i + 6) % 12);
  CHECK(near(loss.views(both.view(), 2, d_both.view()),
             head.within(both.view(), partner, d_again.view()), 1e-14));
  for (std::size_t i = 0; i < 48; ++i)
    CHECK(std::abs(d_both.x[i] - d_again.x[i]) < 1e-14);
}

// Products of such rows are no numbers, but their cosines are what they are.
TEMPLATE_TEST_CASE("Very long and very short embeddings", "", float, double) {
  using T = TestType;
  const auto x = random_batch<T>(40, 5, 1), y = random_batch<T>(40, 5, 2);
  const perdita::sup_con<T> loss({.temperature = 0.1});
  const perdita::similarity head(perdita::cross_entropy<T>{}, {.scale = 10});
  batch<T> g(40, 5), h(40, 5), of_head(40, 5), d_y(40, 5);
  const T value = loss.pairs(x.view(), y.view(), g.view(), h.view());
  const T of_pairs = head(x.view(), y.view(), of_head.view(), d_y.view());
  const int most = sizeof(T) == 4 ? 100 : 900;
  for (const int power : {-most, -most / 2, most / 2, most}) {
    auto far_x = x, far_y = y;
    for (T& z : far_x.x)
      z = std::ldexp(z, power);
    for (T& z : far_y.x)
      z = std::ldexp(z, power);
    INFO("times 2^" << power);
    batch<T> far_g(40, 5), far_h(40, 5);
    CHECK(loss.pairs(far_x.view(), far_y.view(), far_g.view(), far_h.view()) == value);
    const auto same = [&](const batch<T>& far, const batch<T>& near_by) {
      for (std::size_t i = 0; i < far.x.size(); ++i)
        if (!(std::abs(std::ldexp(far.x[i], power) - near_by.x[i]) <=
              16 * std::numeric_limits<T>::epsilon() * std::abs(near_by.x[i]) + T(1e-8)))
          return false;
      return true;
    };
    CHECK(same(far_g, g));
    CHECK(same(far_h, h));
    CHECK(head(far_x.view(), far_y.view(), far_g.view(), far_h.view()) == of_pairs);
    CHECK(same(far_g, of_head));
    CHECK(same(far_h, d_y));
  }
}

TEST_CASE("Supervised contrastive: what has a stated result", "") {
  const perdita::sup_con<double> loss({.temperature = 0.1});
  const batch<double> equal(6, 3, 2.0);
  batch<double> g(6, 3);
  const std::vector<int> same(6, 1), apart{1, 2, 3, 4, 5, 6};
  CHECK(near(loss(equal.view(), same, g.view()), std::log(5.0), 1e-14)); // all tie
  for (const double slope : g.x)
    CHECK(std::abs(slope) < 1e-15);
  CHECK(loss(equal.view(), apart, g.view()) == 0); // no positives: no anchor counts
  CHECK(g.x == std::vector<double>(18, 0.0));
  const batch<double> zero(6, 3);
  CHECK(near(loss(zero.view(), same, g.view()), std::log(5.0), 1e-14));
  CHECK(g.x == std::vector<double>(18, 0.0));
  const batch<double> one(1, 3, 1.0);
  CHECK(loss.pairs(one.view(), one.view()) == 0); // a batch of one
  CHECK(loss(one.view(), std::vector<int>{1}) == 0);
  { // sure of itself: e^-20 keeps its digits
    batch<double> x(2, 2);
    x(0, 0) = 1, x(1, 1) = 1;
    CHECK(near(perdita::sup_con<double>({.temperature = 0.05}).pairs(x.view(), x.view()),
               std::log1p(std::exp(-20.0)), 1e-14));
  }
  CHECK_THROWS_WITH(perdita::sup_con<double>({.temperature = 0}),
                    Catch::Matchers::ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(
      loss(equal.view(), same, {.row_weights = perdita::vector_view<const double>(nullptr, 6)}),
      Catch::Matchers::ContainsSubstring("row_weights is null"));
  CHECK_THROWS_WITH(perdita::sup_con<double>({.mean = static_cast<perdita::positives_mean>(2)}),
                    Catch::Matchers::ContainsSubstring("mean is 2"));
}

} // namespace perdita_tests
