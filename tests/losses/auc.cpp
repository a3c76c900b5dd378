// SPDX-License-Identifier: MIT

// AUC-M, SOAP and partial AUC: formula sheet "contrastive", 8.6 and 8.7.

#include <perdita/auc.hpp>
#include <perdita/partial_auc.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::auc_average;
using perdita::auc_state;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

template <class T> struct binary {
  std::vector<T> scores;
  std::vector<int> labels, ids;

  binary(std::size_t n, double rate, double spread, std::uint64_t seed) {
    random_numbers random(seed);
    for (std::size_t i = 0; i < n; ++i) {
      scores.push_back(static_cast<T>(spread * random.normal()));
      labels.push_back(random.uniform(0, 1) < rate ? 1 : i % 2 ? 0 : -1);
      ids.push_back(static_cast<int>((7 * i + 3) % (2 * n + 1)));
    }
  }
};

const std::vector<int> golden_labels{1, 0, 0, 1, 0, 1, 0, 0};
std::vector<double> golden_scores() {
  std::vector<double> h(8);
  for (std::size_t k = 0; k < 8; ++k) {
    const double at = static_cast<double>(k);
    h[k] = std::sin(0.7 * at + 0.3 + 0.15 * at * at);
  }
  return h;
}
double norm(const std::vector<double>& x) {
  double squares = 0;
  for (const double v : x)
    squares += v * v;
  return std::sqrt(squares);
}

/// What errors are measured by, beside what they are of.
struct measured {
  wide value = 0, size = 0;
  void add(const wide& x) {
    value += x;
    size += size_of(x);
  }
};

} // namespace

// --- AUC-M ---------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("auc_margin: value and gradients against the formula", "[auc]", float, double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const std::size_t n : {1U, 2U, 9U, 200U})
    for (const double rate : {0.0, 0.3, 0.9})
      for (const double given : {0.0, 0.2})
        for (const auto how : {auc_average::batch, auc_average::classes}) {
          const binary<T> data(n, rate, 2, 5 + n);
          const auc_state s{0.3, -0.45, 0.7};
          const double m = 1.25;
          const perdita::auc_margin<T> loss({.margin = m, .positive_rate = given, .average = how});
          std::vector<T> g(n, T(9));
          auc_state slopes;
          const T value = loss(data.scores, data.labels, s, g, slopes, {.scale = 3});
          CHECK(loss(data.scores, data.labels, s) == value);

          // Term by term, as means over the batch or over the classes.
          wide positives = 0, count = static_cast<double>(n);
          for (const int y : data.labels)
            positives += y == 1;
          const wide p = given > 0 ? wide(given) : wide(positives / count);
          const bool batch = how == auc_average::batch;
          const wide kappa = batch ? wide(p * (1 - p)) : wide(1);
          const wide a = s.a, b = s.b, alpha = s.alpha;
          measured expected, of_a, of_b, of_alpha;
          expected.add(2 * alpha * kappa * m);
          expected.add(-kappa * alpha * alpha);
          of_alpha.add(2 * kappa * m);
          of_alpha.add(-2 * kappa * alpha);
          for (std::size_t i = 0; i < n; ++i) {
            const bool positive = data.labels[i] == 1;
            const wide h = data.scores[i], sign = positive ? 1 : -1, at = positive ? a : b;
            const wide c = batch ? wide((positive ? wide(1 - p) : p) / count)
                                 : wide(1 / (positive ? positives : wide(count - positives)));
            expected.add(c * (h - at) * (h - at));
            expected.add(-2 * alpha * sign * c * h);
            (positive ? of_a : of_b).add(-2 * c * (h - at));
            of_alpha.add(-2 * sign * c * h);
            const wide slope = 3 * 2 * c * (h - at - sign * alpha);
            CHECK(of_slopes.within(size_of(wide(g[i] - slope)), 3,
                                   epsilon * 6 * c * (size_of(h) + size_of(at) + alpha)));
          }
          CHECK(
              of_values.within(size_of(wide(value - expected.value)), 4, epsilon * expected.size));
          const double fine = std::numeric_limits<double>::epsilon();
          CHECK(size_of(wide(slopes.a - of_a.value)) <= 4 * fine * of_a.size);
          CHECK(size_of(wide(slopes.b - of_b.value)) <= 4 * fine * of_b.size);
          CHECK(size_of(wide(slopes.alpha - of_alpha.value)) <= 4 * fine * of_alpha.size);
        }
  report_accuracy<T>(
      "auc_margin", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("auc_margin: the formula sheet's value, and both averages", "[auc]") {
  const auto h = golden_scores();
  std::vector<double> g(8);
  const auc_state s{0.2, -0.1, 0.4};
  auc_state slopes, by_class;
  const double value = perdita::auc_margin<double>()(h, golden_labels, s, g, slopes);
  CHECK(std::abs(value - 0.322348954779) < 1e-12);
  CHECK(std::abs(norm(g) - 0.269181841) < 1e-9);
  // π (1 − π) of what it is by classes.
  const perdita::auc_margin<double> classes({.average = auc_average::classes});
  std::vector<double> of_classes(8);
  const double factor = 15.0 / 64;
  CHECK(std::abs(factor * classes(h, golden_labels, s, of_classes, by_class) - value) < 1e-15);
  for (std::size_t i = 0; i < 8; ++i)
    CHECK(std::abs(factor * of_classes[i] - g[i]) < 1e-15);
  CHECK(std::abs(factor * by_class.a - slopes.a) < 1e-15);
  CHECK(std::abs(factor * by_class.b - slopes.b) < 1e-15);
  CHECK(std::abs(factor * by_class.alpha - slopes.alpha) < 1e-15);
}

TEST_CASE("auc_margin: at the saddle it is the squared loss of all pairs", "[auc]") {
  const auto h = golden_scores();
  for (const auto how : {auc_average::batch, auc_average::classes}) {
    const perdita::auc_margin<double> loss({.margin = 1.5, .average = how});
    const auc_state best = loss.best_state(h, golden_labels);
    double pairs = 0, count = 0;
    for (std::size_t i = 0; i < 8; ++i)
      for (std::size_t j = 0; j < 8; ++j)
        if (golden_labels[i] == 1 && golden_labels[j] == 0) {
          pairs += std::pow(1.5 - (h[i] - h[j]), 2);
          ++count;
        }
    const double factor = how == auc_average::batch ? 15.0 / 64 : 1;
    CHECK(best.alpha > 0);
    CHECK(std::abs(loss(h, golden_labels, best) - factor * pairs / count) < 1e-14);
    std::vector<double> g(8);
    auc_state slopes;
    loss(h, golden_labels, best, g, slopes);
    CHECK(std::abs(slopes.a) + std::abs(slopes.b) + std::abs(slopes.alpha) < 1e-15);
    // Steps of the variables alone come there from anywhere.
    auc_state s;
    for (int t = 0; t < 2000; ++t) {
      loss(h, golden_labels, s, g, slopes);
      s.step(slopes, 0.3);
    }
    CHECK(std::abs(s.a - best.a) + std::abs(s.b - best.b) + std::abs(s.alpha - best.alpha) < 1e-12);
  }
  // α is not below 0.
  const std::vector<double> apart{5, -5};
  const perdita::auc_margin<double> loss;
  CHECK(loss.best_state(apart, std::vector<int>{1, 0}).alpha == 0);
  auc_state s{0, 0, 0.1};
  s.step({1, 2, -3}, 0.5);
  CHECK((s.a == -0.5 && s.b == -1 && s.alpha == 0));
}

TEST_CASE("auc_margin: the gradients are the derivatives", "[auc]") {
  for (const auto how : {auc_average::batch, auc_average::classes})
    for (const double given : {0.0, 0.2}) {
      auto h = golden_scores();
      const perdita::auc_margin<double> loss({.positive_rate = given, .average = how});
      std::vector<double> g(8), s{0.2, -0.1, 0.4};
      const auto state = [&] { return auc_state{s[0], s[1], s[2]}; };
      auc_state slopes;
      loss(h, golden_labels, state(), g, slopes);
      const auto value = [&] { return loss(h, golden_labels, state()); };
      const auto of_scores = perdita::testing::check_gradient(value, h, g);
      INFO(of_scores.message());
      CHECK(of_scores.ok);
      const std::vector<double> of_state{slopes.a, slopes.b, slopes.alpha};
      const auto report = perdita::testing::check_gradient(value, s, of_state);
      INFO(report.message());
      CHECK(report.ok);
    }
}

TEST_CASE("auc_margin: one class, no scores, NaN, in place, added", "[auc]") {
  const std::vector<double> h{1, 3};
  const std::vector<int> ones{1, 1}, both{1, 0}, none;
  std::vector<double> g(2);
  auc_state slopes;
  const auc_state s{0.5, 0, 0.25};
  const perdita::auc_margin<double> loss, given({.positive_rate = 0.25}),
      classes({.average = auc_average::classes});
  CHECK(loss(h, ones, s, g, slopes) == 0);
  CHECK(g == std::vector<double>{0, 0});
  CHECK(given(h, ones, s, g, slopes) != 0);
  CHECK((g[0] != 0 && slopes.b == 0));
  // Mean of (h − a)², 2α (m − mean h) and −α².
  CHECK(classes(h, ones, s) == 3.25 - 0.5 - 0.0625);
  std::vector<double> empty;
  CHECK(loss(empty, none, s, empty, slopes) == 0);
  CHECK((slopes.a == 0 && slopes.b == 0 && slopes.alpha == 0));
  const auto nobody = classes.best_state(empty, none);
  CHECK((nobody.a == 0 && nobody.b == 0 && nobody.alpha == 0));
  // Of one class, its mean is known, and nothing of the other.
  const std::vector<double> three{1, 2, 6};
  for (const auto& l : {loss, given, classes}) {
    const auto negatives = l.best_state(three, std::vector<int>{0, 0, 0}),
               positives = l.best_state(three, std::vector<int>{1, 1, 1});
    CHECK((negatives.a == 0 && negatives.b == 3 && std::isfinite(negatives.alpha)));
    CHECK((positives.a == 3 && positives.b == 0 && std::isfinite(positives.alpha)));
  }

  const std::vector<double> spoilt{nan, 3};
  CHECK(std::isnan(loss(spoilt, both, s, g, slopes)));
  CHECK((std::isnan(g[0]) && std::isfinite(g[1])));
  CHECK((std::isnan(slopes.a) && std::isfinite(slopes.b) && std::isnan(slopes.alpha)));

  std::vector<double> own = h, added(2, 1);
  loss(h, both, s, g, slopes);
  loss(h, both, s, added, slopes, {.accumulate = true});
  loss(own, both, s, own, slopes);
  CHECK(own == g);
  CHECK((added[0] == 1 + g[0] && added[1] == 1 + g[1]));
  // The slopes may overwrite the state.
  auc_state both_in_one = s;
  const double value = loss(h, both, s, g, slopes);
  CHECK(loss(h, both, both_in_one, g, both_in_one) == value);
  CHECK((both_in_one.a == slopes.a && both_in_one.alpha == slopes.alpha));
}

TEST_CASE("auc_margin: what is added to all scores and both means changes nothing", "[auc]") {
  const std::vector<int> labels{1, 0, 0, 1, 0};
  const double large = 0x1p52; // to which integers can be added
  const std::vector<double> scores{2, 1, 3, 0, 7};
  std::vector<double> raised, g(5), d(5);
  for (const double h : scores)
    raised.push_back(large + h);
  const auc_state state{1, 3, 0.25}, above{large + 1, large + 3, 0.25};
  for (const auc_average average : {auc_average::batch, auc_average::classes}) {
    const perdita::auc_margin<double> loss({.average = average});
    auc_state slopes, same;
    CHECK(loss(raised, labels, above, d, same) == loss(scores, labels, state, g, slopes));
    CHECK((d == g && same.a == slopes.a && same.b == slopes.b && same.alpha == slopes.alpha));
    CHECK(loss.best_state(raised, labels).alpha == loss.best_state(scores, labels).alpha);
  }
}

TEST_CASE("auc_margin: a slope that is NaN is no step to 0", "[auc]") {
  auc_state state{0.5, 0, 0.25};
  state.step({0, 0, nan}, 0.1);
  CHECK(std::isnan(state.alpha));
  const std::vector<double> spoilt{nan, 3};
  CHECK(std::isnan(perdita::auc_margin<double>().best_state(spoilt, std::vector<int>{1, 0}).alpha));
}

TEST_CASE("auc_margin: bad input is refused, and nothing written", "[auc]") {
  using Catch::Matchers::ContainsSubstring;
  using loss_type = perdita::auc_margin<double>;
  CHECK_THROWS_WITH(loss_type({.margin = nan}), ContainsSubstring("margin is"));
  CHECK_THROWS_WITH(loss_type({.positive_rate = 1}), ContainsSubstring("positive_rate is 1"));
  CHECK_THROWS_WITH(loss_type({.average = static_cast<auc_average>(4)}),
                    ContainsSubstring("average is 4"));
  std::vector<double> h(3, 1), g(3, 5), two(2, 5);
  const std::vector<int> y{1, 0, 1}, short_y{1, 0};
  auc_state slopes{8, 8, 8};
  const loss_type loss;
  CHECK_THROWS_WITH(loss(h, short_y, {}, g, slopes), ContainsSubstring("labels is 2, expected 3"));
  CHECK_THROWS_WITH(loss(h, y, {}, two, slopes), ContainsSubstring("gradient rows is 2"));
  CHECK_THROWS_WITH(loss(h, y, {}, h, slopes, {.accumulate = true}),
                    ContainsSubstring("accumulate"));
  CHECK_THROWS_WITH(loss(perdita::vector_view<const double>(nullptr, 3), y, {}),
                    ContainsSubstring("scores is null"));
  CHECK((slopes.a == 8 && g == std::vector<double>(3, 5) && two == std::vector<double>(2, 5)));
}

// --- SOAP ----------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("soap: steps against the formula", "[soap]", float, double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const std::size_t n : {1U, 2U, 9U, 60U})
    for (const double gamma : {0.1, 0.9, 1.0})
      for (const double rate : {0.2, 1.0}) {
        const double m = 0.75;
        const perdita::soap<T> loss({.margin = m, .gamma = gamma});
        perdita::soap_state state(2 * n + 1);
        std::vector<wide> all(2 * n + 1, wide(0)), own(2 * n + 1, wide(0));
        for (std::uint64_t step = 0; step < 3; ++step) {
          binary<T> data(n, rate, 0.7, 11 + n + 100 * step);
          data.labels[n / 2] = 1;
          wide count = static_cast<double>(n), positives = 0, value = 0;
          std::vector<wide> slope(n, wide(0)), size(n, wide(0));
          for (const int y : data.labels)
            positives += y == 1;
          for (std::size_t i = 0; i < n; ++i) {
            if (data.labels[i] != 1)
              continue;
            const auto id = static_cast<std::size_t>(data.ids[i]);
            wide of_all = 0, of_own = 0;
            const auto miss = [&](std::size_t s) {
              return larger(0, m - (wide(data.scores[i]) - wide(data.scores[s])));
            };
            for (std::size_t s = 0; s < n; ++s) {
              of_all += miss(s) * miss(s) / count;
              of_own += data.labels[s] == 1 ? wide(miss(s) * miss(s) / count) : wide(0);
            }
            const wide fresh = gamma;
            all[id] = (1 - fresh) * all[id] + fresh * of_all;
            own[id] = (1 - fresh) * own[id] + fresh * of_own;
            value -= own[id] / all[id] / positives;
            for (std::size_t s = 0; s < n; ++s) {
              const bool positive = data.labels[s] == 1;
              const wide w = (own[id] - (positive ? all[id] : wide(0))) / (all[id] * all[id]);
              const wide term = w * 2 * miss(s) / (positives * count);
              const wide reach =
                  (own[id] + (positive ? all[id] : wide(0))) / (all[id] * all[id]) * 2 *
                  (miss(s) + m + size_of(wide(data.scores[i])) + size_of(wide(data.scores[s]))) /
                  (positives * count);
              slope[s] += term;
              slope[i] -= term;
              size[s] += reach;
              size[i] += reach;
            }
          }
          const T before = loss(data.scores, data.labels, data.ids, state);
          std::vector<T> g(n, T(9));
          const T got = loss(data.scores, data.labels, data.ids, state, g, {.scale = 2});
          CHECK(before == got);
          CHECK(of_values.within(size_of(wide(got - value)), 4, epsilon * size_of(value)));
          for (std::size_t i = 0; i < n; ++i)
            CHECK(of_slopes.within(size_of(wide(g[i] - 2 * slope[i])), 2, 2 * epsilon * size[i]));
          for (std::size_t k = 0; k < all.size(); ++k) {
            CHECK(size_of(wide(state.all[k] - all[k])) <= 1e-14 * all[k]);
            CHECK(size_of(wide(state.positives[k] - own[k])) <= 1e-14 * own[k]);
          }
        }
      }
  report_accuracy<T>(
      "soap", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("soap: the formula sheet's value", "[soap]") {
  const auto h = golden_scores();
  const std::vector<int> ids{0, 1, 2, 3, 4, 5, 6, 7};
  perdita::soap_state state(8);
  std::vector<double> g(8);
  const perdita::soap<double> loss({.gamma = 1});
  CHECK(std::abs(loss(h, golden_labels, ids, state, g) + 0.414067271393) < 1e-12);
  CHECK(std::abs(norm(g) - 0.363454722) < 1e-9);
  // A ranking without mistakes by more than the margin: all that is above is positive.
  std::vector<double> sure{9, 0, 0, 9, 0, 9, 0, 0};
  CHECK(loss(sure, golden_labels, ids, state, g) == -1);
  CHECK(norm(g) == 0);
}

TEST_CASE("soap: with γ = 1 the gradient is the derivative", "[soap]") {
  auto h = golden_scores();
  const std::vector<int> ids{7, 6, 5, 4, 3, 2, 1, 0};
  perdita::soap_state state(8);
  std::vector<double> g(8);
  const perdita::soap<double> loss({.gamma = 1});
  loss(h, golden_labels, ids, state, g);
  const auto report =
      perdita::testing::check_gradient([&] { return loss(h, golden_labels, ids, state); }, h, g);
  INFO(report.message());
  CHECK(report.ok);
  double sum = 0;
  for (const double x : g)
    sum += x;
  CHECK(std::abs(sum) < 1e-15);
}

TEST_CASE("soap: the state is plain numbers, of the positives of the batch", "[soap]") {
  const auto h = golden_scores();
  const std::vector<int> ids{0, 1, 2, 3, 4, 5, 6, 7};
  const perdita::soap<double> loss;
  perdita::soap_state state(10);
  std::vector<double> g(8), again(8);
  loss(h, golden_labels, ids, state, g);
  for (std::size_t k = 0; k < 10; ++k)
    CHECK((state.all[k] > 0) == (k < 8 && golden_labels[k] == 1));
  // Stored and brought back, it goes on as before.
  perdita::soap_state copy;
  copy.all = state.all;
  copy.positives = state.positives;
  CHECK(loss(h, golden_labels, ids, copy, again) == loss(h, golden_labels, ids, state, g));
  CHECK((again == g && copy.all == state.all && copy.positives == state.positives));
}

TEST_CASE("soap: NaN, infinity, in place, added, strided", "[soap]") {
  auto h = golden_scores();
  const std::vector<int> ids{0, 1, 2, 3, 4, 5, 6, 7};
  const perdita::soap<double> loss;
  perdita::soap_state state(8);
  std::vector<double> g(8);
  loss(h, golden_labels, ids, state, g);
  const auto before = state;
  for (const double bad : {nan, inf, -inf})
    for (const std::size_t at : {0U, 1U}) {
      auto spoilt = h;
      spoilt[at] = bad;
      CHECK(std::isnan(loss(spoilt, golden_labels, ids, state)));
      CHECK(std::isnan(loss(spoilt, golden_labels, ids, state, g)));
      CHECK(std::all_of(g.begin(), g.end(), [](double x) { return std::isnan(x); }));
      CHECK((state.all == before.all && state.positives == before.positives));
    }
  const double value = loss(h, golden_labels, ids, state, g);
  auto one = before, two = before, three = before;
  std::vector<double> own = h, added(8, 1), apart(24, 8);
  CHECK(loss(own, golden_labels, ids, one, own) == value);
  CHECK(own == g);
  loss(h, golden_labels, ids, two, added, {.accumulate = true});
  const perdita::vector_view<double> strided(apart.data(), 8, 3);
  for (std::size_t i = 0; i < 8; ++i)
    apart[3 * i] = h[i];
  CHECK(loss(strided, golden_labels, ids, three, strided) == value);
  for (std::size_t i = 0; i < 8; ++i) {
    CHECK(std::abs(added[i] - 1 - g[i]) < 2.3e-16);
    CHECK((apart[3 * i] == g[i] && apart[3 * i + 1] == 8 && apart[3 * i + 2] == 8));
  }
}

TEST_CASE("soap: bad input is refused, and nothing written", "[soap]") {
  using Catch::Matchers::ContainsSubstring;
  using loss_type = perdita::soap<double>;
  CHECK_THROWS_WITH(loss_type({.margin = 0}), ContainsSubstring("margin is 0"));
  CHECK_THROWS_WITH(loss_type({.gamma = 0}), ContainsSubstring("gamma is 0"));
  CHECK_THROWS_WITH(loss_type({.gamma = 1.5}), ContainsSubstring("gamma is 1.5"));
  const std::vector<double> h{1, 2, 3};
  const std::vector<int> y{1, 0, 1}, zeros{0, 0, -1};
  std::vector<double> g(3, 5);
  perdita::soap_state state(4);
  const loss_type loss;
  const auto refused = [&](const std::vector<int>& labels, const std::vector<int>& ids,
                           const char* why) {
    CHECK_THROWS_WITH(loss(h, labels, ids, state, g), ContainsSubstring(why));
    CHECK_THROWS_WITH(loss(h, labels, ids, state), ContainsSubstring(why));
  };
  refused({1, 0}, {0, 1, 2}, "labels is 2");
  refused(y, {0, 1}, "ids is 2");
  refused(y, {0, 1, 4}, "ids[2] is 4");
  refused(y, {0, -1, 2}, "ids[1] is -1");
  refused(y, {2, 1, 2}, "ids is 2 twice");
  refused(zeros, {0, 1, 2}, "number of positives is 0");
  state.positives.pop_back();
  refused(y, {0, 1, 2}, "positives of the state is 3");
  CHECK(g == std::vector<double>(3, 5));
  CHECK(state.all == std::vector<double>(4, 0));
}

// --- Partial AUC ---------------------------------------------------------------------------------

namespace {

/// What a step makes of scores: the value, and the state.
struct wide_step {
  wide value = 0, outer = 0;
  std::vector<wide> inner; // of all samples
};
struct wide_pairs {
  std::vector<wide> scores;
  const std::vector<int>& labels;
  const std::vector<int>& ids;
  double margin;

  std::vector<wide> losses(std::size_t i) const {
    std::vector<wide> l;
    for (std::size_t j = 0; j < scores.size(); ++j)
      if (labels[j] != 1) {
        const wide miss = larger(0, margin - (scores[i] - scores[j]));
        l.push_back(miss * miss);
      }
    return l;
  }
  wide positives() const {
    return static_cast<double>(std::count(labels.begin(), labels.end(), 1));
  }
};

wide_step dro(const wide_pairs& b, const wide_step& from,
              const perdita::partial_auc_dro<double>::options& o) {
  wide_step to = from; // u and w themselves, 0 without a past
  wide sum = 0;
  for (std::size_t i = 0; i < b.scores.size(); ++i) {
    if (b.labels[i] != 1)
      continue;
    const auto l = b.losses(i);
    wide mean = 0;
    for (const wide& x : l)
      mean += exp(wide(x / o.temperature)) / static_cast<double>(l.size());
    wide& u = to.inner[static_cast<std::size_t>(b.ids[i])];
    u = u == 0 ? mean : wide((1 - wide(o.gamma)) * u + o.gamma * mean);
    sum += o.outer_temperature > 0
               ? exp(wide(o.temperature / wide(o.outer_temperature) * log(u))) / b.positives()
               : wide(o.temperature * log(u) / b.positives());
  }
  to.value = sum;
  if (o.outer_temperature > 0) {
    to.outer =
        from.outer == 0 ? sum : wide((1 - wide(o.outer_gamma)) * from.outer + o.outer_gamma * sum);
    to.value = o.outer_temperature * log(to.outer);
  }
  return to;
}
wide_step cvar(const wide_pairs& b, const wide_step& from,
               const perdita::partial_auc_cvar<double>::options& o) {
  wide_step to = from;
  const wide alpha = o.positives, beta = o.negatives;
  wide worst = 0, sum = 0;
  for (std::size_t i = 0; i < b.scores.size(); ++i) {
    if (b.labels[i] != 1)
      continue;
    wide& u = to.inner[static_cast<std::size_t>(b.ids[i])];
    const auto l = b.losses(i);
    wide v = u, number = 0;
    for (const wide& x : l) {
      v += larger(0, wide(x - u)) / (beta * static_cast<double>(l.size()));
      number += x > u ? 1 : 0;
    }
    const bool counts = o.positives == 1 || v > from.outer;
    if (counts)
      u -= o.rate * (1 - number / (beta * static_cast<double>(l.size())));
    worst += counts ? 1 : 0;
    sum += o.positives == 1 ? v : larger(0, wide(v - from.outer));
  }
  to.value = sum / (alpha * b.positives());
  if (o.positives < 1) {
    to.value += from.outer;
    to.outer = from.outer - o.rate * (1 - worst / (alpha * b.positives()));
  }
  return to;
}

/// Steps of a loss against its definition; the gradient against differences of the value where
/// `exact`. stored(x): what the state keeps of a number of the definition.
template <class T, class Loss, class Definition, class Stored>
void check_partial(const std::string& detail, const Loss& loss, Definition definition,
                   Stored stored, bool exact) {
  error_judge of_values, of_slopes;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  for (const std::size_t n : {2U, 9U, 40U}) {
    auto state = Loss::new_state(2 * n + 1);
    wide_step expected;
    expected.inner.assign(2 * n + 1, wide(0));
    for (std::uint64_t time = 0; time < 3; ++time) {
      binary<T> data(n, 0.4, 0.5, 21 + n + 50 * time);
      data.labels[0] = 1;
      data.labels[n - 1] = 0;
      wide_pairs pairs{
          {data.scores.begin(), data.scores.end()}, data.labels, data.ids, loss.settings().margin};
      const wide_step next = definition(pairs, expected);
      std::vector<T> g(n, T(9));
      const T before = loss(data.scores, data.labels, data.ids, state);
      const T got = loss(data.scores, data.labels, data.ids, state, g, {.scale = 2});
      CHECK(before == got);
      CHECK(of_values.within(size_of(wide(got - next.value)), 4,
                             epsilon * (1 + size_of(next.value))));
      if (exact || time == 0) {
        std::vector<wide> slopes(n);
        wide top = 1e-6, sum = 0;
        for (std::size_t i = 0; i < n; ++i) {
          const wide kept = pairs.scores[i], h = 1e-11;
          pairs.scores[i] = kept + h;
          const wide above = definition(pairs, expected).value;
          pairs.scores[i] = kept - h;
          slopes[i] = (above - definition(pairs, expected).value) / (2 * h);
          pairs.scores[i] = kept;
          top = larger(top, size_of(slopes[i]));
        }
        for (std::size_t i = 0; i < n; ++i) {
          sum += g[i];
          CHECK(of_slopes.within(size_of(wide(g[i] / 2 - slopes[i])), 24, epsilon * top));
        }
        CHECK(size_of(sum) <= 40 * epsilon * top);
      }
      expected = next;
      for (std::size_t k = 0; k < expected.inner.size(); ++k) {
        const double keeps = stored(expected.inner[k]);
        CHECK((state.inner[k] == keeps || std::abs(state.inner[k] - keeps) < 1e-13));
      }
      const double outer = stored(expected.outer);
      CHECK((state.outer == outer || std::abs(state.outer - outer) < 1e-13));
    }
  }
  report_accuracy<T>(Loss::name, detail, in_epsilons, of_values, of_slopes);
}

} // namespace

TEMPLATE_TEST_CASE("Partial AUC: steps against the formulas", "[partial_auc]", float, double) {
  using T = TestType;
  for (const double gamma : {0.6, 1.0})
    for (const double outer : {0.0, 0.7}) {
      const perdita::partial_auc_dro<double>::options o{.margin = 0.75,
                                                        .temperature = 0.4,
                                                        .outer_temperature = outer,
                                                        .gamma = gamma,
                                                        .outer_gamma = gamma};
      const perdita::partial_auc_dro<T> loss({o.margin, o.temperature, outer, gamma, gamma});
      check_partial<T>(
          outer > 0 ? "two ways" : "", loss,
          [&](const wide_pairs& b, const wide_step& from) { return dro(b, from, o); },
          [](const wide& x) { return x == 0 ? -inf : static_cast<double>(log(x)); }, gamma == 1);
    }
  for (const double alpha : {1.0, 0.5}) {
    const perdita::partial_auc_cvar<double>::options o{
        .negatives = 0.3, .positives = alpha, .rate = 0.25};
    check_partial<T>(
        alpha < 1 ? "two ways" : "", perdita::partial_auc_cvar<T>({1, 0.3, alpha, 0.25}),
        [&](const wide_pairs& b, const wide_step& from) { return cvar(b, from, o); },
        [](const wide& x) { return static_cast<double>(x); }, true);
  }
}

TEST_CASE("Partial AUC: limits, and thresholds that settle", "[partial_auc]") {
  const auto h = golden_scores();
  const std::vector<int> ids{0, 1, 2, 3, 4, 5, 6, 7};
  std::vector<double> g(8);
  double mean = 0, largest = 0, worst = 0; // over pairs; of each positive's largest
  for (std::size_t i = 0; i < 8; ++i) {
    double top = 0;
    for (std::size_t j = 0; j < 8 && golden_labels[i] == 1; ++j)
      if (golden_labels[j] == 0) {
        const double miss = std::max(0.0, 1 - (h[i] - h[j]));
        mean += miss * miss / 15;
        top = std::max(top, miss * miss);
      }
    largest += top / 3;
    worst = std::max(worst, top);
  }
  const auto dro_of = [&](double temperature, double outer) {
    const perdita::partial_auc_dro<double> loss(
        {.temperature = temperature, .outer_temperature = outer});
    return loss(h, golden_labels, ids, loss.new_state(8));
  };
  CHECK(std::abs(dro_of(1e9, 0) - mean) < 1e-6);
  CHECK(std::abs(dro_of(1e9, 1e9) - mean) < 1e-6);
  CHECK(std::abs(dro_of(1e-4, 0) - largest) < 1e-3);
  CHECK(std::abs(dro_of(1e-4, 1e-4) - worst) < 1e-3);
  // One temperature for both: one soft maximum of all pairs.
  const perdita::partial_auc_cvar<double> all({.negatives = 1, .rate = 0});
  CHECK(std::abs(all(h, golden_labels, ids, all.new_state(8)) - mean) < 1e-15);
  // A fifth of five negatives: the largest of each positive; a third of three: the worst.
  for (const double alpha : {1.0, 1.0 / 3}) {
    const perdita::partial_auc_cvar<double> loss(
        {.negatives = 0.2, .positives = alpha, .rate = 0.001});
    auto state = loss.new_state(8);
    for (int t = 0; t < 20000; ++t)
      loss(h, golden_labels, ids, state, g);
    CHECK(std::abs(loss(h, golden_labels, ids, state) - (alpha == 1 ? largest : worst)) < 0.02);
  }
}

TEST_CASE("soap, partial AUC: what is added to all scores changes nothing", "[soap][partial_auc]") {
  const std::vector<int> labels{1, 0, 0, 1}, ids{0, 1, 2, 3};
  const double large = 0x1p52; // to which integers can be added
  const std::vector<double> scores{2, 1, 3, 0}, raised{large + 2, large + 1, large + 3, large};
  const auto check = [&](const auto& loss, const auto& first) {
    auto state = first, again = first;
    std::vector<double> g(4), d(4);
    CHECK(loss(scores, labels, ids, state, g) == loss(raised, labels, ids, again, d));
    CHECK(g == d);
  };
  check(perdita::soap<double>({.margin = 0.7}), perdita::soap_state(4));
  const perdita::partial_auc_dro<double> dro({.margin = 0.1});
  const perdita::partial_auc_cvar<double> cvar({.margin = 0.1});
  check(dro, dro.new_state(4));
  check(cvar, cvar.new_state(4));
}

TEST_CASE("Partial AUC: special values and refusals", "[partial_auc]") {
  using Catch::Matchers::ContainsSubstring;
  const auto h = golden_scores();
  const std::vector<int> ids{0, 1, 2, 3, 4, 5, 6, 7};
  const auto check = [&](const auto& loss) {
    auto state = loss.new_state(8);
    std::vector<double> g(8), own = h, added(8, 1);
    const double value = loss(h, golden_labels, ids, state, g);
    const auto before = state;
    for (const double bad : {nan, inf, -inf})
      for (const std::size_t at : {0U, 1U}) {
        auto spoilt = h;
        spoilt[at] = bad;
        std::vector<double> d(8);
        CHECK(std::isnan(loss(spoilt, golden_labels, ids, state)));
        CHECK(std::isnan(loss(spoilt, golden_labels, ids, state, d)));
        CHECK(std::all_of(d.begin(), d.end(), [](double x) { return std::isnan(x); }));
        CHECK((state.inner == before.inner && state.outer == before.outer));
      }
    auto one = loss.new_state(8), two = one;
    CHECK(loss(own, golden_labels, ids, one, own) == value);
    CHECK((own == g && one.inner == before.inner));
    loss(h, golden_labels, ids, two, added, {.accumulate = true});
    for (std::size_t i = 0; i < 8; ++i)
      CHECK(std::abs(added[i] - 1 - g[i]) <= 4e-16 * (1 + std::abs(g[i])));
    // Far scores, and small temperatures, do not overflow.
    std::vector<double> far(8, 1e3);
    far[0] = -1e3;
    auto fresh = loss.new_state(8);
    CHECK(std::isfinite(loss(far, golden_labels, ids, fresh, g)));
    CHECK(std::all_of(g.begin(), g.end(), [](double x) { return std::isfinite(x); }));

    const auto refused = [&](const std::vector<int>& labels, const std::vector<int>& samples,
                             const char* why) {
      CHECK_THROWS_WITH(loss(h, labels, samples, state, g), ContainsSubstring(why));
    };
    const auto kept = g;
    refused(std::vector<int>(8, 0), ids, "number of positives is 0");
    refused(std::vector<int>(8, 1), ids, "number of negatives is 0");
    refused(golden_labels, {0, 1, 2, 3, 4, 5, 6, 8}, "ids[7] is 8");
    refused(golden_labels, {0, 1, 2, 3, 4, 5, 6, 6}, "ids is 6 twice");
    CHECK((g == kept && state.inner == before.inner));
  };
  check(perdita::partial_auc_dro<double>({.temperature = 1e-3}));
  check(perdita::partial_auc_dro<double>({.outer_temperature = 2}));
  check(perdita::partial_auc_cvar<double>());
  check(perdita::partial_auc_cvar<double>({.positives = 0.5}));
  using robust = perdita::partial_auc_dro<double>;
  using risk = perdita::partial_auc_cvar<double>;
  CHECK_THROWS_WITH(robust({.margin = 0}), ContainsSubstring("margin is 0"));
  CHECK_THROWS_WITH(robust({.temperature = 0}), ContainsSubstring("temperature is 0"));
  CHECK_THROWS_WITH(robust({.temperature = 1e-310}), ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(robust({.outer_temperature = -1}),
                    ContainsSubstring("outer_temperature is -1"));
  CHECK_THROWS_WITH(robust({.gamma = 2}), ContainsSubstring("gamma is 2"));
  CHECK_THROWS_WITH(risk({.negatives = 0}), ContainsSubstring("negatives is 0"));
  CHECK_THROWS_WITH(risk({.positives = 2}), ContainsSubstring("positives is 2"));
  CHECK_THROWS_WITH(risk({.rate = -1}), ContainsSubstring("rate is -1"));
}

} // namespace perdita_tests
