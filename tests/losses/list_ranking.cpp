// SPDX-License-Identifier: MIT

// BPR, ListNet, ListMLE and LambdaLoss: formula sheet "contrastive", 8.1, 8.3 to 8.5.

#include <perdita/list_ranking.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/element_check.hpp"
#include "support/executors.hpp"
#include "support/normaliser.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::lambda_weights;
using perdita::list_target;
using perdita::matrix_view;
using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// --- Lists ---------------------------------------------------------------------------------------

template <class T> struct lists {
  index queries, items;
  std::vector<T> scores, targets;
  std::vector<int> lengths;

  lists(index q, index n)
      : queries(q), items(n), scores(static_cast<std::size_t>(q * n)), targets(scores.size()),
        lengths(static_cast<std::size_t>(q), static_cast<int>(n)) {}
  /// Relevances 0 to 4, of which many are equal, or real ones; lengths are anything.
  lists(index q, index n, double spread, bool grades, std::uint64_t seed) : lists(q, n) {
    random_numbers random(seed);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i] = static_cast<T>(spread * random.normal());
      targets[i] =
          static_cast<T>(grades ? static_cast<double>(random.below(5)) : spread * random.normal());
    }
    for (int& length : lengths)
      length = static_cast<int>(random.below(static_cast<std::uint64_t>(n) + 1));
    lengths.back() = static_cast<int>(n);
  }
  matrix_view<const T> score_view() const { return {scores.data(), queries, items}; }
  matrix_view<const T> target_view() const { return {targets.data(), queries, items}; }
};

/// What a list is worth: sizes are what errors are measured by.
struct list_outcome {
  wide value = 0, value_size = 0;
  std::vector<wide> slope, slope_size;
  explicit list_outcome(std::size_t n) : slope(n, wide(0)), slope_size(n, wide(0)) {}
};

std::vector<std::size_t> sorted(const std::vector<wide>& key) {
  std::vector<std::size_t> order(key.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return key[a] > key[b]; });
  return order;
}
wide log_sum(const std::vector<wide>& z) {
  return log_sum_exp(z, [](std::size_t) { return true; });
}

/// −log softmax(z), and what the rounding of the exponents does to that.
struct surprises {
  std::vector<wide> value, size;

  explicit surprises(const std::vector<wide>& z) {
    for (std::size_t i = 0; i < z.size(); ++i) {
      wide rest = 0, sway = 0;
      for (std::size_t k = 0; k < z.size(); ++k)
        if (k != i) {
          const wide ratio = exp(wide(z[k] - z[i]));
          rest += ratio;
          sway += ratio * size_of(wide(z[k] - z[i]));
        }
      value.push_back(log1p(rest));
      size.push_back(value.back() + sway / (1 + rest));
    }
  }
};

list_outcome listnet_reference(const std::vector<wide>& s, const std::vector<wide>& q) {
  list_outcome e(s.size());
  const surprises miss(s);
  wide mass = 0;
  for (const wide& x : q)
    mass += x;
  for (std::size_t i = 0; i < s.size(); ++i) {
    const wide p = exp(wide(-miss.value[i]));
    e.value += weighted(q[i], miss.value[i]);
    e.value_size += q[i] * miss.size[i];
    e.slope[i] = mass * p - q[i];
    e.slope_size[i] = mass * p * (1 + miss.value[i]) + q[i];
  }
  return e;
}
list_outcome soft_listnet_reference(const std::vector<wide>& s, const std::vector<wide>& y) {
  std::vector<wide> q;
  const surprises of_targets(y), miss(s);
  for (const wide& x : of_targets.value)
    q.push_back(exp(wide(-x)));
  list_outcome e = listnet_reference(s, q);
  for (std::size_t i = 0; i < s.size(); ++i) {
    e.value_size += q[i] * miss.size[i] * of_targets.value[i];
    e.slope_size[i] += q[i] * of_targets.value[i];
  }
  return e;
}

/// Of the first `places` places of an order.
list_outcome plackett_luce(const std::vector<wide>& s, const std::vector<std::size_t>& order,
                           std::size_t places) {
  const std::size_t n = s.size();
  list_outcome e(n);
  for (std::size_t j = 0; j < std::min(n, places); ++j) {
    std::vector<wide> left;
    for (std::size_t k = j; k < n; ++k)
      left.push_back(s[order[k]]);
    const std::vector<wide> behind(left.begin() + 1, left.end());
    const wide total = log_sum(left), later = log_sum(behind);
    const wide lead = later - left[0];
    const wide miss = softplus(lead), share = logistic(lead);
    e.value += miss;
    e.value_size += miss + (share > 0 ? wide(share * size_of(lead)) : wide(0));
    for (std::size_t k = j; k < n; ++k) {
      const wide p = k == j ? share : wide(exp(wide(s[order[k]] - total)));
      e.slope[order[k]] += k == j ? wide(-p) : p;
      // Next to nothing is behind a place: what is, is as uncertain as its distance.
      const wide exponent = k > j ? wide(s[order[k]] - total) : n > j + 1 ? lead : wide(0);
      e.slope_size[order[k]] += p * (1 + size_of(exponent));
    }
  }
  return e;
}
list_outcome listmle_reference(const std::vector<wide>& s, const std::vector<wide>& y) {
  return plackett_luce(s, sorted(y), s.size());
}

/// The sum over pairs as they are defined, positions counted from 1.
list_outcome lambda_reference(const std::vector<wide>& s, const std::vector<wide>& y,
                              lambda_weights kind, const wide& sigma, const wide& mu,
                              std::size_t truncation) {
  const std::size_t n = s.size(), top = std::min(n, truncation);
  list_outcome e(n);
  const auto discount = [](std::size_t i) {
    return wide(log(wide(2)) / log(wide(1 + static_cast<double>(i))));
  };
  const auto by_score = sorted(s), by_target = sorted(y);
  wide ideal = 0;
  for (std::size_t i = 0; i < top; ++i)
    ideal += (pow(wide(2), y[by_target[i]]) - 1) * discount(i + 1);
  const auto gain = [&](std::size_t item) {
    return ideal == 0 ? wide(0) : wide((pow(wide(2), y[item]) - 1) / ideal);
  };
  for (std::size_t i = 0; i < top; ++i)
    for (std::size_t j = 0; j < top; ++j) {
      const std::size_t a = by_score[i], b = by_score[j];
      if (kind != lambda_weights::ndcg_loss1 && !(y[a] > y[b]))
        continue;
      const wide gap = gain(a) - gain(b);
      const wide rank = size_of(wide(discount(i + 1) - discount(j + 1))) * gap;
      const std::size_t d = i > j ? i - j : j - i;
      const wide apart = d == 0 ? wide(0) : wide((discount(d) - discount(d + 1)) * gap);
      const wide w = kind == lambda_weights::ranknet       ? wide(1)
                     : kind == lambda_weights::lambda_rank ? rank
                     : kind == lambda_weights::ndcg_loss1  ? wide(gain(a) * discount(i + 1))
                     : kind == lambda_weights::ndcg_loss2  ? apart
                                                           : wide(mu * apart + rank);
      // What the rounding of the terms of the differences comes to.
      const wide sway =
          kind == lambda_weights::ranknet || kind == lambda_weights::ndcg_loss1
              ? w
              : wide((gain(a) + gain(b)) *
                     (kind == lambda_weights::ndcg_loss2_plus ? wide(mu + 1) : wide(1)));
      const wide x = sigma * (s[b] - s[a]), slope = sigma * w * logistic(x);
      const wide steep = 1 + size_of(x);
      e.value += w * softplus(x);
      e.value_size += sway * (softplus(x) + logistic(x) * steep);
      e.slope[a] -= slope;
      e.slope[b] += slope;
      for (const std::size_t item : {a, b})
        e.slope_size[item] += sigma * sway * logistic(x) * steep;
    }
  return e;
}

/// A call of `loss` with every kind of factor, list by list against the reference.
template <class T, class Loss, class Reference>
void judge_lists(const Loss& loss, const lists<T>& data, Reference reference, double budget,
                 error_judge& of_values, error_judge& of_slopes) {
  const auto n = static_cast<std::size_t>(data.items), q = static_cast<std::size_t>(data.queries);
  const double epsilon = std::numeric_limits<T>::epsilon();
  // Shares below e^−690 are 0, and so may be what is subnormal.
  const double least = std::max(1e-295, 8.0 * static_cast<double>(std::numeric_limits<T>::min()));
  std::vector<T> g(q * n, T(9)), values(q), weights(q), upstream(q);
  random_numbers random(77);
  wide total = 0, total_size = 0, count = 0;
  for (std::size_t i = 0; i < q; ++i) {
    weights[i] = static_cast<T>(i % 4) / 2;
    upstream[i] = static_cast<T>(random.uniform(-1, 1));
    count += weights[i];
  }
  const perdita::call_options<T> call{
      .row_weights = weights, .upstream = upstream, .scale = 3, .values = values};
  const T value = loss(data.score_view(), data.target_view(), data.lengths,
                       matrix_view<T>(g.data(), data.queries, data.items), call);
  CHECK(loss(data.score_view(), data.target_view(), data.lengths, call) == value);
  const wide share = loss.settings().reduction == reduction::mean ? wide(1 / count) : wide(1);
  for (std::size_t r = 0; r < q; ++r) {
    const auto size = static_cast<std::size_t>(data.lengths[r]);
    std::vector<wide> s, y;
    for (std::size_t i = 0; i < size; ++i) {
      s.push_back(data.scores[r * n + i]);
      y.push_back(data.targets[r * n + i]);
    }
    const wide w = weights[r];
    const list_outcome e = reference(s, y);
    INFO("list " << r << " of " << size << ", value " << values[r] << " for " << text(e.value));
    CHECK(of_values.within(size_of(wide(values[r] - w * e.value)), budget,
                           epsilon * w * e.value_size + least));
    total += w * e.value;
    total_size += w * e.value_size;
    for (std::size_t i = 0; i < n; ++i) {
      const wide factor = 3 * share * w * upstream[r];
      const wide slope = i < size ? e.slope[i] : wide(0), of = i < size ? e.slope_size[i] : wide(0);
      CHECK(of_slopes.within(size_of(wide(g[r * n + i] - factor * slope)), budget,
                             epsilon * size_of(factor) * of + least));
    }
  }
  CHECK(size_of(wide(value - share * total)) <= budget * epsilon * share * total_size);
}

/// The formula sheet's scores and relevances.
lists<double> golden() {
  lists<double> data(2, 5);
  for (std::size_t k = 0; k < 10; ++k) {
    const double at = static_cast<double>(k);
    data.scores[k] = std::sin(0.8 * at + 0.1 + 0.15 * at * at);
  }
  data.targets = {3, 2, 0, 1, 0, 0, 1, 2, 3, 4};
  return data;
}
template <class Loss> void check_golden(const Loss& loss, double value, double norm) {
  const auto data = golden();
  std::vector<double> g(10);
  CHECK(std::abs(loss(data.score_view(), data.target_view(), matrix_view<double>(g.data(), 2, 5)) -
                 value) < 2e-10);
  double squares = 0;
  for (const double x : g)
    squares += x * x;
  CHECK(std::abs(std::sqrt(squares) - norm) < 1e-8);
}

template <class Loss> void check_derivative(const Loss& loss, bool grades) {
  lists<double> data(3, 6, 1, grades, 12);
  std::vector<double> g(18);
  loss(data.score_view(), data.target_view(), data.lengths, matrix_view<double>(g.data(), 3, 6));
  const auto report = perdita::testing::check_gradient(
      [&] { return loss(data.score_view(), data.target_view(), data.lengths); }, data.scores, g);
  INFO(Loss::name << ": " << report.message());
  CHECK(report.ok);
}

const std::vector<lambda_weights> all_weights{
    lambda_weights::ranknet, lambda_weights::lambda_rank, lambda_weights::ndcg_loss1,
    lambda_weights::ndcg_loss2, lambda_weights::ndcg_loss2_plus};

/// Items that change places change the places of their slopes, which add up to 0.
template <class Loss> void check_symmetry(const Loss& loss) {
  lists<double> data(1, 9, 1, false, 31);
  for (double& y : data.targets)
    y = std::abs(y);
  lists<double> turned = data;
  std::rotate(turned.scores.begin(), turned.scores.begin() + 4, turned.scores.end());
  std::rotate(turned.targets.begin(), turned.targets.begin() + 4, turned.targets.end());
  std::vector<double> g(9), h(9);
  const double value =
      loss(data.score_view(), data.target_view(), matrix_view<double>(g.data(), 1, 9));
  CHECK(std::abs(
            loss(turned.score_view(), turned.target_view(), matrix_view<double>(h.data(), 1, 9)) -
            value) < 1e-14 * value);
  std::rotate(h.begin(), h.begin() + 5, h.end());
  double sum = 0;
  for (std::size_t i = 0; i < 9; ++i) {
    CHECK(std::abs(g[i] - h[i]) < 1e-14);
    sum += g[i];
  }
  CHECK(std::abs(sum) < 1e-14);
}

/// NaN or infinity at one place of a list.
template <class Loss> void check_spoilt(const Loss& loss, double bad, bool in_targets) {
  lists<double> data(3, 9, 1, true, 4);
  data.lengths = {9, 9, 9};
  std::vector<double> clean(27), g(27), good(3), values(3);
  const auto run = [&](std::vector<double>& to, std::vector<double>& v) {
    return loss(data.score_view(), data.target_view(), data.lengths,
                matrix_view<double>(to.data(), 3, 9), {.values = v});
  };
  run(clean, good);
  (in_targets ? data.targets : data.scores)[9 + 3] = bad;
  INFO(Loss::name << " of " << bad << (in_targets ? ", target" : ", score"));
  CHECK(std::isnan(run(g, values)));
  CHECK((values[0] == good[0] && std::isnan(values[1]) && values[2] == good[2]));
  for (std::size_t i = 0; i < 27; ++i)
    CHECK((i / 9 == 1 ? std::isnan(g[i]) : g[i] == clean[i]));
  // What no list has does not matter.
  data.lengths[1] = 3;
  CHECK(std::isfinite(run(g, values)));
  for (std::size_t i = 12; i < 18; ++i)
    CHECK(g[i] == 0);
}

} // namespace

// --- BPR -----------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("bpr: every number", "[bpr]", float, double) {
  using T = TestType;
  const auto points = pair_points<T>(signed_grid(), {-2.5, 0, 1}, -3, 3);
  const std::size_t size = points.x.size();
  for (const double margin : {0.0, 0.5, -0.25}) {
    const element_reference reference = [&](wide a, wide b) {
      const wide x = margin - (a - b), p = logistic(x), other = logistic(wide(-x));
      const wide sway = size_of(wide(a - b)) + size_of(x);
      return element_point{.value = softplus(x),
                           .slope = -p,
                           .curvature = p * other,
                           .value_size = softplus(x) + sway * p,
                           .slope_size = p + sway * p * other,
                           .curvature_size = p * other * (1 + sway),
                           .scale = 1};
    };
    for (std::size_t i = 0; i < size; i += 5)
      if (std::abs(points.x[i]) < 30)
        check_reference(reference, points.x[i], points.t[i]);
    const perdita::bpr<T> loss({.margin = static_cast<T>(margin), .reduction = reduction::none});
    element_results<T> found{std::vector<T>(size), std::vector<T>(size), std::vector<T>(size)};
    std::vector<T> slope(size), curvature(size);
    loss(points.x, points.t, found.slope, slope, {.values = found.value});
    loss.hessian_diagonal(points.x, points.t, found.curvature, curvature);
    judge("bpr", points, found, reference, {3, 3, 4});
    for (std::size_t i = 0; i < size; ++i)
      REQUIRE((slope[i] == -found.slope[i] && curvature[i] == found.curvature[i]));
  }
}

TEST_CASE("bpr: the formula sheet's value, by embeddings", "[bpr]") {
  std::vector<double> x(24), y(24), chosen(6), others(6), a(6), b(6), dx(24), dy(24);
  for (std::size_t k = 0; k < 24; ++k) {
    const double at = static_cast<double>(k);
    x[k] = std::sin(0.7 * at + 0.3 + 0.15 * at * at);
    y[k] = std::cos(0.9 * at + 0.1 + 0.15 * at * at);
  }
  for (std::size_t k = 0; k < 24; ++k) {
    chosen[k / 4] += x[k] * y[k];
    others[k / 4] += x[k] * y[4 * (5 - k / 4) + k % 4];
  }
  CHECK(std::abs(perdita::bpr<double>()(chosen, others, a, b) - 0.767280704529) < 1e-12);
  double of_x = 0, of_y = 0;
  for (std::size_t k = 0; k < 24; ++k) {
    const std::size_t r = k / 4, back = 4 * (5 - r) + k % 4;
    dx[k] += a[r] * y[k] + b[r] * y[back];
    dy[k] += a[r] * x[k];
    dy[back] += b[r] * x[k];
  }
  for (std::size_t k = 0; k < 24; ++k) {
    of_x += dx[k] * dx[k];
    of_y += dy[k] * dy[k];
  }
  CHECK(std::abs(std::sqrt(of_x) - 0.379819196) < 1e-9);
  CHECK(std::abs(std::sqrt(of_y) - 0.401283231) < 1e-9);
}

TEST_CASE("bpr: infinity, NaN, weights, bad input", "[bpr]") {
  using Catch::Matchers::ContainsSubstring;
  const std::vector<double> a{inf, -inf, inf, nan, 1}, b{0, 0, inf, 0, 1};
  std::vector<double> values(5), g(5), h(5), weights{1, 1, 1, 1, 2};
  const perdita::bpr<double> loss({.reduction = reduction::none});
  loss(a, b, g, h, {.weights = weights, .values = values});
  CHECK((values[0] == 0 && g[0] == 0 && h[0] == 0));
  CHECK((values[1] == inf && g[1] == -1 && h[1] == 1));
  CHECK((std::isnan(values[2]) && std::isnan(g[2]) && std::isnan(values[3]) && std::isnan(h[3])));
  CHECK((std::abs(values[4] - 2 * std::log(2.0)) < 1e-15 && g[4] == -1 && h[4] == 1));
  CHECK_THROWS_WITH(perdita::bpr<double>({.margin = inf}), ContainsSubstring("margin is inf"));
  std::vector<double> four(4, 5);
  CHECK_THROWS_WITH(loss(a, four, g, h), ContainsSubstring("targets"));
  CHECK_THROWS_WITH(loss(a, b, g, four), ContainsSubstring("second result"));
  CHECK(four == std::vector<double>(4, 5));
}

// --- Lists ---------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("listnet, listmle: value and gradient against the formula", "[lists]", float,
                   double) {
  using T = TestType;
  error_judge net_values, net_slopes, mle_values, mle_slopes;
  for (const index items : {1, 2, 7, 17})
    for (const double spread : {0.01, 2.0, 400.0})
      for (const auto how : {reduction::mean, reduction::sum}) {
        const auto seed = static_cast<std::uint64_t>(items) + (how == reduction::sum);
        auto data = lists<T>(9, items, spread, spread == 2, seed);
        judge_lists<T>(perdita::listmle<T>({.reduction = how}), data, listmle_reference, 4,
                       mle_values, mle_slopes);
        judge_lists<T>(perdita::listnet<T>({.reduction = how}), data, soft_listnet_reference, 4,
                       net_values, net_slopes);
        for (T& y : data.targets)
          y = std::max(y, T(0));
        judge_lists<T>(
            perdita::listnet<T>({.target = list_target::probabilities, .reduction = how}), data,
            listnet_reference, 4, net_values, net_slopes);
      }
  report_accuracy<T>(
      "listnet", "", in_epsilons_of_terms,
      {net_values.worst(), net_slopes.worst(), std::max(net_values.share(), net_slopes.share())});
  report_accuracy<T>(
      "listmle", "", in_epsilons_of_terms,
      {mle_values.worst(), mle_slopes.worst(), std::max(mle_values.share(), mle_slopes.share())});
}

TEMPLATE_TEST_CASE("listmle: the top of the list, and orders", "[lists]", float, double) {
  using T = TestType;
  const double epsilon = std::numeric_limits<T>::epsilon();
  const auto data = lists<T>(9, 12, 2, true, 5);
  for (const index places : {1, 3, 11, 12, 50}) {
    error_judge values, slopes;
    judge_lists<T>(
        perdita::listmle<T>({.places = places}), data,
        [&](const std::vector<wide>& s, const std::vector<wide>& y) {
          return plackett_luce(s, sorted(y), static_cast<std::size_t>(places));
        },
        4, values, slopes);
    // The same order, as items: as many columns as places, or all and an option.
    const index columns = std::min<index>(places, 12);
    std::vector<int> order(static_cast<std::size_t>(9 * columns), -7);
    for (std::size_t q = 0; q < 9; ++q) {
      const auto size = static_cast<std::size_t>(data.lengths[q]);
      const auto from = data.targets.begin() + static_cast<std::ptrdiff_t>(12 * q);
      const auto found = sorted(std::vector<wide>(from, from + data.lengths[q]));
      for (std::size_t j = 0; j < std::min(size, static_cast<std::size_t>(columns)); ++j)
        order[q * static_cast<std::size_t>(columns) + j] = static_cast<int>(found[j]);
    }
    std::vector<T> g(9 * 12), h(9 * 12);
    const T value = perdita::listmle<T>({.places = places})(
        data.score_view(), data.target_view(), data.lengths, matrix_view<T>(g.data(), 9, 12));
    const T ordered =
        perdita::listmle<T>()(data.score_view(), matrix_view<const int>(order.data(), 9, columns),
                              data.lengths, matrix_view<T>(h.data(), 9, 12));
    // Those without a place are added in another order.
    CHECK(std::abs(ordered - value) <= 8 * static_cast<T>(epsilon) * value);
    for (std::size_t i = 0; i < g.size(); ++i)
      CHECK(std::abs(g[i] - h[i]) <= 8 * static_cast<T>(epsilon));
  }
}

TEST_CASE("listmle: long lists", "[lists]") {
  const std::size_t n = 64;
  error_judge values, slopes;
  for (const int sense : {0, 1, -1}) { // any order, the right one, the opposite
    lists<double> data(1, static_cast<index>(n), 1, false, 3);
    if (sense != 0)
      for (std::size_t i = 0; i < n; ++i) {
        data.scores[i] = 0.01 * static_cast<double>(i);
        data.targets[i] = sense * static_cast<double>(i);
      }
    std::vector<double> g(n);
    const double value =
        perdita::listmle<double>()(data.score_view(), data.target_view(),
                                   matrix_view<double>(g.data(), 1, static_cast<index>(n)));
    const list_outcome e = listmle_reference({data.scores.begin(), data.scores.end()},
                                             {data.targets.begin(), data.targets.end()});
    CHECK(values.within(size_of(wide(value - e.value)), 1, 0x1p-52 * e.value_size));
    for (std::size_t i = 0; i < n; ++i)
      CHECK(slopes.within(size_of(wide(g[i] - e.slope[i])), 16, 0x1p-52 * e.slope_size[i]));
  }
  report_accuracy<double>(
      "listmle", "long lists", in_epsilons_of_terms,
      {values.worst(), slopes.worst(), std::max(values.share(), slopes.share())});
}

TEST_CASE("listmle: what is near 0 keeps its digits", "[lists]") {
  // In the right order by far: ℓ = Σ log(1 + e^−60 + …), and not 0.
  const std::vector<double> s{120, 60, 0}, y{3, 2, 1};
  std::vector<double> g(3);
  const double value = perdita::listmle<double>()(matrix_view<const double>(s.data(), 1, 3),
                                                  matrix_view<const double>(y.data(), 1, 3),
                                                  matrix_view<double>(g.data(), 1, 3));
  const double e = std::exp(-60.0);
  CHECK(std::abs(value - 2 * e) < 1e-13 * e);
  CHECK(std::abs(g[0] + e) < 1e-13 * e);
  CHECK(std::abs(g[1]) < 2e-26 * e + 1e-13 * e);
  CHECK(std::abs(g[2] - e) < 1e-13 * e);
}

TEMPLATE_TEST_CASE("lambda_loss: value and gradient against the formula", "[lists]", float,
                   double) {
  using T = TestType;
  error_judge of_values, of_slopes;
  for (const auto kind : all_weights)
    for (const index items : {1, 2, 7, 14})
      for (const index truncation : {0, 1, 5})
        for (const double spread : {0.5, 30.0}) {
          auto data = lists<T>(5, items, spread, true, static_cast<std::uint64_t>(items) + 40);
          if (items == 7) // equal scores, whose places are the list's
            for (std::size_t i = 0; i < data.scores.size(); ++i)
              data.scores[i] = static_cast<T>(i % 3);
          if (items == 2)
            std::fill(data.targets.begin(), data.targets.end(), T(0)); // nothing relevant
          const double sigma = 1.5, mu = 3;
          const perdita::lambda_loss<T> loss(
              {.weights = kind, .sigma = sigma, .mu = mu, .truncation = truncation});
          judge_lists<T>(
              loss, data,
              [&](const std::vector<wide>& s, const std::vector<wide>& y) {
                return lambda_reference(s, y, kind, sigma, mu,
                                        truncation ? static_cast<std::size_t>(truncation) : 1000);
              },
              2, of_values, of_slopes);
        }
  report_accuracy<T>(
      "lambda_loss", "", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("Losses of lists: the formula sheet's values", "[lists]") {
  check_golden(perdita::listnet<double>(), 1.68361680088, 0.398785054);
  check_golden(perdita::listmle<double>(), 5.61270542611, 1.55509868);
  const auto lambda = [](lambda_weights kind) {
    return perdita::lambda_loss<double>({.weights = kind, .reduction = reduction::sum});
  };
  check_golden(lambda(lambda_weights::lambda_rank), 1.38557244519, 0.556209041);
  check_golden(lambda(lambda_weights::ndcg_loss2), 1.22970654506, 0.575807222);
  check_golden(lambda(lambda_weights::ndcg_loss2_plus), 13.6826378958, 6.24814972);
}

TEST_CASE("Losses of lists: the gradient is the derivative, symmetric, and adds up to 0",
          "[lists]") {
  check_derivative(perdita::listnet<double>(), true);
  check_derivative(perdita::listnet<double>({.target = list_target::probabilities}), true);
  check_derivative(perdita::listmle<double>(), false);
  check_derivative(perdita::listmle<double>({.places = 2}), true);
  check_symmetry(perdita::listnet<double>());
  check_symmetry(perdita::listnet<double>({.target = list_target::probabilities}));
  check_symmetry(perdita::listmle<double>());
  check_symmetry(perdita::listmle<double>({.places = 4}));
  for (const auto kind : all_weights)
    check_symmetry(perdita::lambda_loss<double>({.weights = kind}));
  // With constant weights only ranknet is a function whose derivative this is; the others are
  // where the scores do not change places.
  check_derivative(perdita::lambda_loss<double>({.weights = lambda_weights::ranknet}), true);
}

TEST_CASE("lambda_loss: the gradient is the derivative between changes of place", "[lists]") {
  using options = perdita::testing::gradient_check_options;
  for (const auto kind : all_weights) {
    std::vector<double> s{9, 0, 6, 3}, y{1, 2, 0, 3}, g(4);
    const perdita::lambda_loss<double> loss({.weights = kind, .sigma = 0.2});
    const matrix_view<double> score(s.data(), 1, 4), target(y.data(), 1, 4);
    loss(score, target, matrix_view<double>(g.data(), 1, 4));
    const auto report = perdita::testing::check_gradient([&] { return loss(score, target); }, s, g,
                                                         options{.step = 1});
    INFO(static_cast<int>(kind) << ": " << report.message());
    CHECK(report.ok);
  }
}

TEST_CASE("Losses of lists: NaN and infinity stay in their list", "[lists]") {
  for (const double bad : {nan, inf}) {
    check_spoilt(perdita::listnet<double>(), bad, false);
    check_spoilt(perdita::listnet<double>(), bad, true);
    check_spoilt(perdita::listnet<double>({.target = list_target::probabilities}), bad, true);
    check_spoilt(perdita::listmle<double>(), bad, false);
    check_spoilt(perdita::lambda_loss<double>(), bad, false);
    check_spoilt(perdita::lambda_loss<double>(), bad, true);
  }
  check_spoilt(perdita::listnet<double>({.target = list_target::probabilities}), -inf, true);
  check_spoilt(perdita::listmle<double>(), -inf, false);
  check_spoilt(perdita::listmle<double>(), nan, true);
  check_spoilt(perdita::lambda_loss<double>(), -inf, false);
  check_spoilt(perdita::lambda_loss<double>(), -1, true);
  check_spoilt(perdita::lambda_loss<double>(), 2000, true);
}

TEST_CASE("listnet: scores of no chance", "[lists]") {
  const perdita::listnet<double> loss;
  std::vector<double> s{1, -inf, 0.5}, y{0, -inf, 1}, g(3), short_g(2);
  const auto run = [&](std::vector<double>& to) {
    const auto n = static_cast<index>(s.size());
    return loss(matrix_view<const double>(s.data(), 1, n),
                matrix_view<const double>(y.data(), 1, n), matrix_view<double>(to.data(), 1, n));
  };
  const double masked = run(g);
  CHECK((g[1] == 0 && std::isfinite(masked)));
  const auto full = g;
  s = {1, 0.5};
  y = {0, 1};
  CHECK(run(short_g) == masked);
  CHECK((short_g[0] == full[0] && short_g[1] == full[2]));
  s = {1, -inf, 0.5};
  y = {0, 1, 1};
  CHECK(run(g) == inf);
  CHECK((std::isfinite(g[0]) && g[1] < -0.4));
  s = {-inf, -inf, -inf};
  CHECK(std::isnan(run(g)));
  s = {1, 2, 3};
  y = s;
  run(g);
  for (const double x : g)
    CHECK(std::abs(x) < 1e-16);
}

TEST_CASE("Losses of lists: no lists, empty lists, one item", "[lists]") {
  const matrix_view<const double> none(nullptr, 0, 5), hollow(nullptr, 3, 0);
  const std::vector<double> s{4, 5}, y{1, 0};
  const matrix_view<const double> one(s.data(), 2, 1), target(y.data(), 2, 1);
  std::vector<double> g(2, 7);
  CHECK(perdita::listnet<double>()(none, none) == 0);
  CHECK(perdita::listmle<double>()(hollow, hollow) == 0);
  CHECK(perdita::lambda_loss<double>()(none, none) == 0);
  CHECK(perdita::listmle<double>()(one, target, matrix_view<double>(g.data(), 2, 1)) == 0);
  CHECK(g == std::vector<double>{0, 0});
  CHECK(perdita::listnet<double>()(one, target, std::vector<int>{0, 1}) == 0);
}

TEST_CASE("Losses of lists: in place, added, strided, 16 bits, threads", "[lists][threads]") {
  const index q = 150, n = 11;
  const auto data = lists<float>(q, n, 2, true, 19);
  const auto everything = [&](const auto& loss) {
    std::vector<float> g(data.scores.size());
    const matrix_view<float> to(g.data(), q, n);
    const float value =
        loss(data.score_view(), data.target_view(), data.lengths, to, {.run_on = perdita::serial});
    perdita::workspace memory;
    for (const std::size_t threads : {2U, 7U}) {
      const threads_executor pool(threads, task_order::shuffled);
      std::vector<float> many(g.size());
      CHECK(loss(data.score_view(), data.target_view(), data.lengths,
                 matrix_view<float>(many.data(), q, n),
                 {.run_on = pool, .memory = &memory}) == value);
      CHECK(many == g);
    }
    auto own = data.scores;
    const matrix_view<float> here(own.data(), q, n);
    CHECK(loss(here, data.target_view(), data.lengths, here) == value);
    CHECK(own == g);
    std::vector<float> added(g.size(), 1), turned(g.size());
    std::vector<perdita::half> sixteen(g.size());
    loss(data.score_view(), data.target_view(), data.lengths,
         matrix_view<float>(added.data(), q, n), {.accumulate = true});
    for (std::size_t i = 0; i < g.size(); ++i) {
      REQUIRE(std::abs(added[i] - 1 - g[i]) <= 1.2e-7f);
      turned[i % static_cast<std::size_t>(n) * static_cast<std::size_t>(q) +
             i / static_cast<std::size_t>(n)] = data.scores[i];
      sixteen[i] = {perdita::core::narrow_half(data.targets[i])};
    }
    const matrix_view<float> across(turned.data(), q, n, 1, q);
    CHECK(loss(across, matrix_view<const perdita::half>(sixteen.data(), q, n), data.lengths,
               across) == value);
    for (index r = 0; r < q; ++r)
      for (index c = 0; c < n; ++c)
        REQUIRE(across(r, c) == to(r, c));
  };
  everything(perdita::listnet<float>());
  everything(perdita::listmle<float>({.places = 6}));
  everything(perdita::lambda_loss<float>({.truncation = 8}));
}

TEST_CASE("Losses of lists: bad input is refused, and nothing written", "[lists]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::listnet<double>({.target = static_cast<list_target>(5)}),
                    ContainsSubstring("target is 5"));
  CHECK_THROWS_WITH(perdita::listmle<double>({.places = -1}), ContainsSubstring("places is -1"));
  using lambda = perdita::lambda_loss<double>;
  CHECK_THROWS_WITH(lambda({.weights = static_cast<lambda_weights>(9)}),
                    ContainsSubstring("weights is 9"));
  CHECK_THROWS_WITH(lambda({.sigma = 0}), ContainsSubstring("sigma is 0"));
  CHECK_THROWS_WITH(lambda({.mu = -1}), ContainsSubstring("mu is -1"));
  CHECK_THROWS_WITH(lambda({.truncation = -2}), ContainsSubstring("truncation is -2"));
  std::vector<double> s(12, 1), y(12, 1), g(12, 5), values(2, 5);
  const matrix_view<double> score(s.data(), 3, 4), target(y.data(), 3, 4), to(g.data(), 3, 4);
  const perdita::listmle<double> loss;
  CHECK_THROWS_WITH(loss(score, matrix_view<double>(y.data(), 2, 4), to),
                    ContainsSubstring("rows of the targets is 2"));
  CHECK_THROWS_WITH(loss(score, matrix_view<double>(y.data(), 3, 3), to),
                    ContainsSubstring("columns of the targets is 3"));
  CHECK_THROWS_WITH(loss(matrix_view<double>(nullptr, 3, 4), target, to),
                    ContainsSubstring("scores is null"));
  CHECK_THROWS_WITH(loss(score, target, matrix_view<double>(g.data(), 3, 3)),
                    ContainsSubstring("gradient columns is 3"));
  CHECK_THROWS_WITH(loss(score, target, target), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(score, target, score, {.accumulate = true}),
                    ContainsSubstring("accumulate"));
  CHECK_THROWS_WITH(loss(score, target, to, {.values = values}), ContainsSubstring("values is 2"));
  CHECK_THROWS_WITH(loss(score, target, std::vector<int>{1, 5, 2}, to),
                    ContainsSubstring("lengths[1] is 5"));
  CHECK_THROWS_WITH(loss(score, target, std::vector<int>{1, 2}, to),
                    ContainsSubstring("lengths is 2"));
  const auto order_refused = [&](std::vector<int> order, index columns, const char* why) {
    CHECK_THROWS_WITH(
        loss(score, matrix_view<int>(order.data(), 3, columns), std::vector<int>{4, 2, 4}, to),
        ContainsSubstring(why));
  };
  order_refused({0, 1, 1, 0, 3, 3}, 2, "order[5] is 3");
  order_refused({0, 1, 2, 0, 3, 2}, 2, "order[2] is 2");
  order_refused({0, -1, 1, 0, 3, 2}, 2, "order[1] is -1");
  order_refused({0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 1, 2, 3, 0, 1}, 5, "columns of the order is 5");
  order_refused({0}, 0, "columns of the order is 0");
  CHECK(g == std::vector<double>(12, 5));
  CHECK(values == std::vector<double>(2, 5));
}

TEST_CASE("Losses of lists: what the mean divides by", "[lists]") {
  const lists<double> data(5, 7, 2, true, 3);
  std::vector<double> g(35);
  const auto of = [&](const auto& loss, const perdita::call_options<double>& call) {
    const double value = loss(data.score_view(), data.target_view(), data.lengths,
                              matrix_view<double>(g.data(), 5, 7), call);
    return all_of(value, g);
  };
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    return of(perdita::listnet<double>({.reduction = how}), call);
  });
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    return of(perdita::lambda_loss<double>({.reduction = how}), call);
  });
}

} // namespace perdita_tests
