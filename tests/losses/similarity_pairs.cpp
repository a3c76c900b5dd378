// SPDX-License-Identifier: MIT

// Losses of an anchor's similarities with its positives and negatives.

#include <perdita/circle.hpp>
#include <perdita/metrix.hpp>
#include <perdita/multi_similarity.hpp>

#include <algorithm>

#include "support/anchors.hpp"

namespace perdita_tests {
namespace {

using perdita::index;

/// Σ e^{f(s)} of an anchor's scores with this relation that `keep` keeps; 0 of none.
template <class F, class Keep>
wide images(const wide_comparisons& c, index i, int which, F f, Keep keep) {
  wide sum = 0;
  for (index j = 0; j < c.candidates(); ++j)
    if (c.of(i, j) == which && keep(j))
      sum += exp(wide(f(j)));
  return sum;
}

wide multi_similarity(const wide_comparisons& c, const perdita::multi_similarity_options& o) {
  wide total = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    const auto score = [&](index j) { return c.score(i, j); };
    const auto distinct = [&](index j) { return !o.mining || score(j) < 1 - o.duplicate; };
    wide least = infinity(), most = -infinity();
    for (index j = 0; j < c.candidates(); ++j) {
      if (c.of(i, j) == 1 && distinct(j))
        least = smaller(least, score(j));
      if (c.of(i, j) == -1)
        most = larger(most, score(j));
    }
    const wide positive = images(
        c, i, 1, [&](index j) { return wide(-o.alpha * (score(j) - o.base)); },
        [&](index j) { return distinct(j) && (!o.mining || score(j) - o.margin < most); });
    const wide negative = images(
        c, i, -1, [&](index j) { return wide(o.beta * (score(j) - o.base)); },
        [&](index j) { return !o.mining || score(j) + o.margin > least; });
    if (!o.mining || (positive > 0 && negative > 0))
      total += log1p(positive) / o.alpha + log1p(negative) / o.beta;
  }
  return total / wide(static_cast<double>(c.anchors()));
}

/// `alone`: of all pairs, those with i < j.
wide circle(const wide_comparisons& c, const wide_comparisons& held, double m, double gamma,
            bool batch, bool alone) {
  wide total = 0, all_positive = 0, all_negative = 0;
  int anchors = 0;
  for (index i = 0; i < c.anchors(); ++i) {
    const auto counts = [&](index j) { return !(alone && j < i); };
    const wide positive = images(
        c, i, 1,
        [&](index j) {
          const wide weight = larger(wide(1 + m - held.score(i, j)), 0);
          return wide(-gamma * weight * (c.score(i, j) - 1 + m));
        },
        counts);
    const wide negative = images(
        c, i, -1,
        [&](index j) {
          const wide weight = larger(wide(held.score(i, j) + m), 0);
          return wide(gamma * weight * (c.score(i, j) - m));
        },
        counts);
    all_positive += positive;
    all_negative += negative;
    if (positive > 0 && negative > 0) {
      total += log1p(wide(positive * negative));
      ++anchors;
    }
  }
  if (batch)
    return log1p(wide(all_positive * all_negative));
  return anchors > 0 ? wide(total / anchors) : wide(0);
}

template <class T, perdita::circle_group Group>
void check_circle(bool constant, const std::string& name) {
  constants held;
  const bool batch = Group == perdita::circle_group::batch;
  check_anchor_values<T>(
      name, perdita::circle<T, Group>({.margin = 0.25, .gamma = 16, .constant_weights = constant}),
      {.value_budget = 64, .gradient_budget = 256}, [&](const wide_comparisons& c) {
        return circle(c, constant ? held.of(c) : c, 0.25, 16, batch,
                      batch && c.anchors() == c.candidates());
      });
}

} // namespace

TEMPLATE_TEST_CASE("Multi-similarity and circle are their definitions", "", float, double) {
  using T = TestType;
  for (const bool mining : {false, true}) {
    const perdita::multi_similarity_options o{
        .alpha = 3, .beta = 20, .base = 0.4, .mining = mining};
    check_anchor_values<T>("multi_similarity", perdita::multi_similarity<T>(o),
                           {.value_budget = 32, .gradient_budget = 128},
                           [&](const wide_comparisons& c) { return multi_similarity(c, o); });
  }
  for (const bool constant : {true, false}) {
    check_circle<T, perdita::circle_group::anchor>(constant, "circle");
    check_circle<T, perdita::circle_group::batch>(constant, "circle, of the batch");
  }
}

TEST_CASE("Multi-similarity and circle: calls", "") {
  check_anchor_calls(perdita::multi_similarity<double>());
  check_anchor_calls(perdita::multi_similarity<double>({.mining = true}));
  check_anchor_calls(perdita::circle<double>({.gamma = 2}));
  check_anchor_calls(perdita::circle<float, perdita::circle_group::batch>({.gamma = 2}));
}

TEST_CASE("Multi-similarity and circle are the formula sheet's", "") {
  const auto x = sheet_x();
  const std::vector<int> labels{0, 0, 1, 1, 2, 2};
  batch<double> g(6, 4);
  CHECK(
      near(perdita::multi_similarity<double>()(x.view(), labels, g.view()), 0.781309721269, 5e-9));
  CHECK(near(length_of(g.x), 0.466500323, 5e-9));
  const perdita::circle<double, perdita::circle_group::batch> circle({.gamma = 16});
  CHECK(near(circle(x.view(), labels, g.view()), 33.0902760834, 5e-9));
  CHECK(near(length_of(g.x), 24.7633594, 5e-9));
}

TEST_CASE("Multi-similarity and circle: what has a stated result", "") {
  const batch<double> equal(6, 3, 2.0), zero(6, 3), one(1, 3, 1.0);
  batch<double> g(6, 3), of_one(1, 3);
  const std::vector<int> same(6, 1), apart{1, 2, 3, 4, 5, 6}, twos{1, 2, 3, 1, 2, 3}, single{1};
  const auto expect = [&](const auto& loss, const batch<double>& x, const std::vector<int>& labels,
                          double value) {
    CHECK(near(loss(x.view(), labels, g.view()), value, 1e-14));
    CHECK(near(loss(x.view(), labels), value, 1e-14));
    const bool level = x.x[0] != 0; // 0 has no gradient at all
    for (const double slope : g.x)
      CHECK(std::abs(slope) <= (level ? 1e-12 : 0));
  };
  const perdita::multi_similarity<double> pairs;
  const auto positives = [](int n, double s) { return std::log1p(n * std::exp(1 - 2 * s)) / 2; };
  const auto negatives = [](int n, double s) { return std::log1p(n * std::exp(50 * s - 25)) / 50; };
  expect(pairs, equal, twos, positives(1, 1) + negatives(4, 1));
  expect(pairs, equal, same, positives(5, 1));
  expect(pairs, equal, apart, negatives(5, 1));
  expect(pairs, zero, twos, positives(1, 0) + negatives(4, 0));
  CHECK(pairs(one.view(), single, of_one.view()) == 0);
  const perdita::multi_similarity<double> mined({.mining = true});
  expect(mined, equal, twos, 0); // duplicates are no positives
  expect(mined, equal, same, 0);
  expect(mined, equal, apart, 0);
  expect(mined, zero, twos, positives(1, 0) + negatives(4, 0));
  CHECK(mined(one.view(), single) == 0);
  auto spoilt = equal;
  spoilt(2, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(mined(spoilt.view(), twos)));

  const perdita::circle<double> circle({.gamma = 4});
  const perdita::circle<double, perdita::circle_group::batch> whole({.gamma = 4});
  const auto both = [](int n, double s) { // log of n pairs' images
    return std::log(n) + 4 * (s + 0.25) * (s - 0.25) - 4 * (1.25 - s) * (s - 0.75);
  };
  expect(circle, equal, twos, std::log1p(std::exp(both(4, 1))));
  expect(circle, zero, twos, std::log1p(std::exp(both(4, 0))));
  expect(whole, equal, twos, std::log1p(std::exp(both(3 * 12, 1)))); // 3 and 12 pairs
  expect(whole, zero, twos, std::log1p(std::exp(both(3 * 12, 0))));
  for (const auto& labels : {same, apart}) {
    expect(circle, equal, labels, 0);
    expect(whole, equal, labels, 0);
  }
  CHECK(circle(one.view(), single) == 0);
  CHECK(whole(one.view(), single, of_one.view()) == 0);
  CHECK(of_one.x == std::vector<double>(3, 0.0));

  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::circle<double>({.gamma = 0}), ContainsSubstring("gamma is 0"));
  CHECK_THROWS_WITH(perdita::multi_similarity<double>({.beta = -1}),
                    ContainsSubstring("beta is -1"));
}

// --- Metrix --------------------------------------------------------------------------------------

namespace {

/// Comparisons of anchors with mixed examples, and the part y of each that belongs to the anchor:
/// below 0 of what is not compared.
struct mixed_comparisons {
  wide_matrix score, part;
};
template <class T, class Part>
mixed_comparisons mix(const wide_matrix& anchors, const wide_matrix& x,
                      const perdita::mixed_examples<T>& mixed, const anchor_subject& subject,
                      Part part) {
  const wide_matrix unit = subject.normalise ? unit_rows(x) : x;
  wide_matrix v(mixed.size(), x.cols);
  for (index k = 0; k < v.rows; ++k)
    for (index d = 0; d < x.cols; ++d) {
      const auto at = static_cast<std::size_t>(k);
      const wide share = mixed.share[at];
      v(k, d) = share * unit(mixed.first[at], d) + (1 - share) * unit(mixed.second[at], d);
    }
  mixed_comparisons result{compare(anchors, v, {}, subject).score,
                           wide_matrix(anchors.rows, v.rows)};
  for (index i = 0; i < anchors.rows; ++i)
    for (index k = 0; k < v.rows; ++k)
      result.part(i, k) = part(i, static_cast<std::size_t>(k));
  return result;
}
/// y by the two labels.
wide part_of(bool first, bool second, double share, bool strangers) {
  if (!first && !second && !strangers)
    return -1;
  return (first ? wide(share) : wide(0)) + (second ? wide(1 - wide(share)) : wide(0));
}

/// log(1 + Σ y e^{−r₊(s − b₊)}) and log(1 + Σ (1 − y) e^{r₋(s − b₋)}) of an anchor.
std::pair<wide, wide> sides(const mixed_comparisons& c, index i, const wide& rate, const wide& base,
                            const wide& other_rate, const wide& other_base) {
  wide own = 0, others = 0;
  for (index k = 0; k < c.score.cols; ++k)
    if (const wide y = c.part(i, k); y >= 0) {
      own += y * exp(wide(-rate * (c.score(i, k) - base)));
      others += (1 - y) * exp(wide(other_rate * (c.score(i, k) - other_base)));
    }
  return {log1p(own), log1p(others)};
}
wide mixed_part(const mixed_comparisons& c, const perdita::multi_similarity_options& o) {
  wide total = 0;
  for (index i = 0; i < c.score.rows; ++i) {
    const auto [own, others] = sides(c, i, o.alpha, o.base, o.beta, o.base);
    total += own / o.alpha + others / o.beta;
  }
  return total / wide(static_cast<double>(c.score.rows));
}
wide mixed_part(const mixed_comparisons& c, const perdita::pair_margin_options& o) {
  wide sum[2] = {0, 0}, above[2] = {0, 0}, all = 0;
  for (index i = 0; i < c.score.rows; ++i)
    for (index k = 0; k < c.score.cols; ++k) {
      const wide y = c.part(i, k), d = c.score(i, k);
      if (y < 0)
        continue;
      all += 1;
      const wide miss[] = {larger(0, wide(d - o.positive_margin)),
                           larger(0, wide(o.negative_margin - d))};
      for (int side = 0; side < 2; ++side) {
        const wide weight = side == 0 ? y : wide(1 - y);
        sum[side] += weight * (o.squared ? wide(miss[side] * miss[side] / 2) : miss[side]);
        above[side] += weight * miss[side] > 0 ? 1 : 0;
      }
    }
  if (o.mean == perdita::pair_mean::pairs)
    return (sum[0] + sum[1]) / all;
  return sum[0] / above[0] + sum[1] / above[1];
}
wide mixed_part(const mixed_comparisons& c, const perdita::lifted_structure_options& o) {
  wide total = 0, anchors = 0;
  for (index i = 0; i < c.score.rows; ++i) {
    wide own = 0, others = 0;
    for (index k = 0; k < c.score.cols; ++k)
      if (const wide y = c.part(i, k); y >= 0) {
        own += y * exp(wide(c.score(i, k)));
        others += (1 - y) * exp(wide(o.margin - c.score(i, k)));
      }
    if (own > 0 && others > 0) {
      total += larger(0, wide(log(own) + log(others)));
      anchors += 1;
    }
  }
  return total / anchors;
}
/// Of comparisons of proxies with examples.
wide mixed_part(const mixed_comparisons& c, const perdita::proxy_anchor<double>::options& o) {
  const double alpha = o.alpha, margin = o.margin;
  wide own = 0, others = 0, with_parts = 0;
  for (index p = 0; p < c.score.rows; ++p) {
    const auto [pull, push] = sides(c, p, alpha, margin, alpha, -wide(margin));
    own += pull;
    others += push;
    bool any = false;
    for (index k = 0; k < c.score.cols; ++k)
      any = any || c.part(p, k) > 0;
    with_parts += any ? 1 : 0;
  }
  return own / with_parts + others / wide(static_cast<double>(c.score.rows));
}

/// The same: examples are the anchors.
wide mixed_part(const mixed_comparisons& c, const perdita::proxy_nca<double>::options& o) {
  wide total = 0, anchors = 0;
  for (index k = 0; k < c.score.cols; ++k) {
    wide own = 0, others = 0;
    for (index p = 0; p < c.score.rows; ++p)
      if (const wide y = c.part(p, k); y >= 0) {
        const wide image = exp(wide(2 * o.scale * c.score(p, k)));
        own += y * image;
        others += o.all_proxies ? image : wide((1 - y) * image);
      }
    if (own > 0) {
      total += log(others) - log(own);
      anchors += 1;
    }
  }
  return total / anchors;
}

template <class T> perdita::mixed_examples<T> some_mixtures() {
  return {{0, 3, 8, 2, 5, 5, 1},
          {1, 0, 2, 7, 6, 4, 1},
          {T(0.25), T(0.5), T(0.875), 0, 1, T(0.3), T(0.5)}};
}

/// Two calls with and without the mixed part differ by it, and its slopes are those of its
/// definition.
template <class T, class Loss>
void check_metrix(const char* name, const Loss& loss, const anchor_subject& subject,
                  const perdita::mixed_examples<T>& mixed = some_mixtures<T>(),
                  std::initializer_list<bool> with_own = {true, false}) {
  const std::vector<int> labels{4, -2, 4, -2, 9, 4, -2, 9, 4};
  const auto x = random_batch<T>(9, 3, 6);
  wide_matrix wide_x(x);
  error_judge values, slopes;
  for (const bool own : with_own)
    for (const bool strangers : {true, false}) {
      INFO(name << ", own " << own << ", strangers " << strangers);
      const perdita::metrix both(loss, {.weight = 0.75, .own = own, .strangers = strangers});
      batch<T> g(9, 3), h(9, 3);
      const T got = both(x.view(), labels, mixed, g.view());
      CHECK(both(x.view(), labels, mixed) == got);
      const T clean = loss(x.view(), labels, h.view());
      const auto value = [&] {
        const auto part = [&](index i, std::size_t k) {
          const index first = mixed.first[k], second = mixed.second[k];
          const auto is = [&](index r) {
            return labels[static_cast<std::size_t>(r)] == labels[static_cast<std::size_t>(i)];
          };
          if (!own && (first == i || second == i))
            return wide(-1);
          return part_of(is(first), is(second), static_cast<double>(mixed.share[k]), strangers);
        };
        return wide(mixed_part(mix(wide_x, wide_x, mixed, subject, part), loss.settings()) * 3 / 4);
      };
      const wide expected = value() + clean;
      CHECK(values.within(size_of(wide(got - expected)), 16,
                          std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
      auto all = differences(wide_x, value);
      for (std::size_t k = 0; k < all.x.size(); ++k)
        all.x[k] += h.x[k];
      CHECK(slopes_within(slopes, g, all, 64));
    }
  report_accuracy<T>("metrix", name, in_epsilons, values, slopes);
}
/// The same with proxies, of which one is without samples; a sample is without proxy.
template <class T, class Loss, class Options>
void check_metrix_of_proxies(const char* name, const Loss& loss, const Options& options,
                             std::initializer_list<bool> with_strangers) {
  error_judge values, slopes;
  const auto x = random_batch<T>(9, 3, 6), proxies = random_batch<T>(4, 3, 7);
  const std::vector<int> labels{0, 1, 0, 1, 2, 0, -100, 2, 0};
  const auto mixed = some_mixtures<T>();
  batch<T> g(9, 3), h(9, 3), d(4, 3), e(4, 3);
  const perdita::metrix alone(loss, {.weight = 0});
  const T clean = alone(x.seen(), proxies.seen(), labels, mixed, h.view(), e.view());
  for (const bool strangers : with_strangers) {
    INFO(name << ", strangers " << strangers);
    const perdita::metrix both(loss, {.weight = 0.75, .strangers = strangers});
    const T got = both(x.seen(), proxies.seen(), labels, mixed, g.view(), d.view());
    CHECK(both(x.seen(), proxies.seen(), labels, mixed) == got);
    wide_matrix wide_x(x), wide_p(proxies);
    const auto value = [&] {
      const auto part = [&](index p, std::size_t k) {
        const int i = labels[static_cast<std::size_t>(mixed.first[k])],
                  j = labels[static_cast<std::size_t>(mixed.second[k])];
        return i < 0 || j < 0
                   ? wide(-1)
                   : part_of(i == p, j == p, static_cast<double>(mixed.share[k]), strangers);
      };
      return wide(mixed_part(mix(wide_p, wide_x, mixed, {}, part), options) * 3 / 4);
    };
    const wide expected = value() + clean;
    CHECK(values.within(size_of(wide(got - expected)), 16,
                        std::numeric_limits<T>::epsilon() * (1 + size_of(expected))));
    auto of_x = differences(wide_x, value), of_p = differences(wide_p, value);
    for (std::size_t k = 0; k < of_x.x.size(); ++k)
      of_x.x[k] += h.x[k];
    for (std::size_t k = 0; k < of_p.x.size(); ++k)
      of_p.x[k] += e.x[k];
    CHECK(slopes_within(slopes, g, of_x, 64));
    CHECK(slopes_within(slopes, d, of_p, 64));
  }
  report_accuracy<T>("metrix", name, in_epsilons, values, slopes);
}

} // namespace

TEMPLATE_TEST_CASE("Metrix is its definition", "", float, double) {
  using T = TestType;
  check_metrix<T>("multi_similarity",
                  perdita::multi_similarity<T>({.alpha = 3, .beta = 20, .base = 0.4}), {});
  check_metrix<T>("pair_margin", perdita::pair_margin<T>({.positive_margin = 0.25}),
                  {.distances = true});
  check_metrix<T>("pair_margin, nonzero",
                  perdita::pair_margin<T>({.negative_margin = 2,
                                           .squared = false,
                                           .mean = perdita::pair_mean::nonzero,
                                           .normalise = false}),
                  {.normalise = false, .distances = true});

  for (const double margin : {1.0, -2.0}) { // with the second, some anchors are 0
    const perdita::lifted_structure<T> loss(
        {.margin = margin, .terms = perdita::lifted_terms::anchors, .normalise = margin > 0});
    const anchor_subject subject{.normalise = margin > 0, .distances = true};
    check_metrix<T>("lifted_structure", loss, subject, some_mixtures<T>(), {false});
    auto inner = some_mixtures<T>(); // no example is an anchor: distances of rounding alone pull
    inner.second[6] = 3;
    for (T& share : inner.share)
      share = share > 0 && share < 1 ? share : T(0.625);
    check_metrix<T>("lifted_structure", loss, subject, inner);
  }
  check_metrix_of_proxies<T>("proxy_anchor", perdita::proxy_anchor<T>({.alpha = 8}),
                             perdita::proxy_anchor<double>::options{.alpha = 8}, {true, false});
  for (const bool all : {false, true})
    check_metrix_of_proxies<T>("proxy_nca", perdita::proxy_nca<T>({.scale = 3, .all_proxies = all}),
                               perdita::proxy_nca<double>::options{.scale = 3, .all_proxies = all},
                               {true});
}

namespace {
batch<double> batch_row(const batch<double>& x, std::size_t row) {
  const auto n = static_cast<std::size_t>(x.view().cols);
  batch<double> result(1, static_cast<index>(n));
  std::copy_n(&x.x[row * n], n, result.x.begin());
  return result;
}
/// Twice the gradients g and d of a call, added to what is there.
template <class Loss>
void check_added(const Loss& loss, const batch<double>& x, const batch<double>& proxies,
                 const std::vector<int>& labels, const perdita::mixed_examples<double>& mixed,
                 const batch<double>& g, const batch<double>& d) {
  batch<double> h(x.view().rows, x.view().cols, 1.0), e(5, x.view().cols, -1.0);
  loss(x.seen(), proxies.seen(), labels, mixed, h.view(), e.view(),
       {.scale = 2, .accumulate = true});
  for (std::size_t k = 0; k < g.x.size(); ++k)
    CHECK(std::abs(h.x[k] - (1 + 2 * g.x[k])) < 1e-13);
  for (std::size_t k = 0; k < d.x.size(); ++k)
    CHECK(std::abs(e.x[k] - (2 * d.x[k] - 1)) < 1e-13);
}
} // namespace

TEST_CASE("Metrix: calls", "[threads]") {
  using Catch::Matchers::ContainsSubstring;
  const index n = 40;
  const auto x = random_batch<double>(n, 5, 3);
  std::vector<int> labels;
  for (index i = 0; i < n; ++i)
    labels.push_back(static_cast<int>(i % 5) - 2);
  const auto mixed = perdita::draw_mixed_examples<double>(labels, 70, 11);
  const perdita::multi_similarity<double> clean;
  const perdita::metrix loss(clean);
  batch<double> g(n, 5), h(n, 5), other(n, 5, 1.0);
  std::vector<double> values(40), weights(40, 1), of_clean(40);
  const double value =
      loss(x.view(), labels, mixed, g.view(), {.values = values, .run_on = perdita::serial});
  double sum = 0;
  for (const double v : values)
    sum += v / n;
  CHECK(near(sum, value, 1e-14));
  const threads_executor pool(3, task_order::shuffled);
  CHECK(loss(x.view(), labels, mixed, h.view(), {.run_on = pool}) == value);
  CHECK(h.x == g.x);
  loss(x.view(), labels, mixed, other.view(), {.scale = 2, .accumulate = true});
  for (std::size_t k = 0; k < g.x.size(); ++k)
    CHECK(std::abs(other.x[k] - (1 + 2 * g.x[k])) < 1e-14);
  { // What the mean divides by, and slopes of anchors, which are weights of the gradient.
    std::vector<double> of_anchors;
    for (index i = 0; i < n; ++i)
      of_anchors.push_back(0.25 * static_cast<double>(i % 7));
    CHECK(near(loss(x.view(), labels, mixed, {.normaliser = 8}), value * n / 8, 1e-14));
    loss(x.view(), labels, mixed, h.view(), {.row_weights = of_anchors, .normaliser = 8});
    loss(x.view(), labels, mixed, other.view(), {.upstream = of_anchors, .normaliser = 8});
    for (std::size_t k = 0; k < g.x.size(); ++k)
      CHECK(std::abs(other.x[k] - h.x[k]) < 1e-13);
  }
  // No examples, or none of the loss: the clean loss. λ = 1 and λ = 0 are rows themselves.
  const double alone = clean(x.view(), labels, h.view());
  CHECK(loss(x.view(), labels, {}, g.view()) == alone);
  CHECK(g.x == h.x);
  CHECK(perdita::metrix(clean, {.weight = 0})(x.view(), labels, mixed) == alone);
  perdita::mixed_examples<double> whole;
  for (index i = 0; i < n; ++i) {
    whole.first.push_back(i);
    whole.second.push_back((i + 1) % n);
    whole.share.push_back(i % 2 ? 0 : 1);
  }
  const perdita::metrix copies(clean, {.weight = 1, .strangers = true});
  std::vector<int> of_whole;
  batch<double> rows(n, 5);
  for (index i = 0; i < n; ++i) {
    const index from = i % 2 ? (i + 1) % n : i;
    of_whole.push_back(labels[static_cast<std::size_t>(from)]);
    std::copy_n(&x.x[static_cast<std::size_t>(5 * from)], 5,
                &rows.x[static_cast<std::size_t>(5 * i)]);
  }
  CHECK(near(copies(x.view(), labels, whole),
             alone + clean(x.view(), rows.view(), labels, of_whole), 1e-13));
  { // An anchor without anything positive, or negative, does not count in the mean.
    const perdita::lifted_structure<double> lifted(
        {.margin = 3, .terms = perdita::lifted_terms::anchors});
    const perdita::metrix of_copies(lifted, {.weight = 1, .strangers = true});
    auto lonely = labels;
    lonely[0] = 99;
    perdita::mixed_examples<double> others;
    of_whole.clear();
    rows = batch<double>(n, 5);
    for (index k = 0; k < n; ++k) {
      const index from = 1 + k % (n - 1);
      others.first.push_back(from);
      others.second.push_back(from);
      others.share.push_back(1);
      of_whole.push_back(lonely[static_cast<std::size_t>(from)]);
      std::copy_n(&x.x[static_cast<std::size_t>(5 * from)], 5,
                  &rows.x[static_cast<std::size_t>(5 * k)]);
    }
    CHECK(near(of_copies(x.view(), lonely, others),
               lifted(x.view(), lonely) + lifted(x.view(), rows.view(), lonely, of_whole), 1e-13));
    const std::vector<int> all_one(40, 1);
    CHECK(of_copies(x.view(), all_one, others) == 0);
  }
  { // A weight of 0 takes an anchor out of both parts.
    for (std::size_t i = 20; i < 40; ++i)
      weights[i] = 0;
    const double some = loss(x.view(), labels, mixed, {.row_weights = weights, .values = values});
    sum = 0;
    for (std::size_t i = 0; i < 20; ++i)
      sum += values[i] / 20;
    CHECK(near(some, sum, 1e-14));
    CHECK(values[30] == 0);
  }
  auto spoilt = x;
  spoilt(3, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(loss(spoilt.view(), labels, mixed)));
  { // Proxies: the examples of `whole` are their rows' terms, one by one. Of a class alone: 0.
    std::vector<int> classes;
    for (const int label : labels)
      classes.push_back(label + 2);
    const auto proxies = random_batch<double>(5, 5, 4);
    for (const bool all : {false, true}) {
      const perdita::proxy_nca<double> nca({.scale = 2, .all_proxies = all});
      const perdita::similarity head(nca);
      const auto term = [&](std::size_t row) {
        const std::vector<int> label{classes[row]};
        return head(batch_row(x, row).seen(), proxies.seen(), label);
      };
      sum = 0;
      for (std::size_t i = 0; i < 40; ++i)
        sum += term(static_cast<std::size_t>(i % 2 ? whole.second[i] : whole.first[i])) / 40;
      const perdita::metrix mix(nca, {.weight = 1});
      batch<double> d(5, 5), e(5, 5);
      const double of_all = mix(x.seen(), proxies.seen(), classes, whole, g.view(), d.view(),
                                {.run_on = perdita::serial});
      CHECK(near(of_all, head(x.seen(), proxies.seen(), classes) + sum, 1e-14));
      CHECK(mix(x.seen(), proxies.seen(), classes, whole, h.view(), e.view(), {.run_on = pool}) ==
            of_all);
      CHECK(h.x == g.x);
      CHECK(e.x == d.x);
      check_added(mix, x, proxies, classes, whole, g, d);
      batch<double> of_one(1, 5);
      const std::vector<int> none(40, 0);
      CHECK(near(mix(x.seen(), batch_row(proxies, 0).seen(), none, whole, g.view(), of_one.view()),
                 0, 1e-14));
      for (const double slope : g.x)
        CHECK(std::abs(slope) < 1e-14);
    }
    const perdita::metrix mix(perdita::proxy_anchor<double>({.alpha = 8}), {.weight = 0.5});
    batch<double> d(5, 5);
    mix(x.seen(), proxies.seen(), classes, mixed, g.view(), d.view());
    check_added(mix, x, proxies, classes, mixed, g, d);
    loss(x.view(), labels, mixed, g.view());
  }

  // Refused, with nothing written.
  const auto kept = g;
  const auto refused = [&](auto change, const char* why) {
    auto wrong = mixed;
    change(wrong);
    CHECK_THROWS_WITH(loss(x.view(), labels, wrong, g.view()), ContainsSubstring(why));
  };
  refused([](auto& m) { m.first.resize((1 << 24) + 1); },
          "mixed examples is 16777217, expected 2^24 at the most");
  refused([](auto& m) { m.second.pop_back(); }, "second of the mixed examples is 69");
  refused([](auto& m) { m.share.pop_back(); }, "share of the mixed examples is 69");
  refused([](auto& m) { m.first[3] = -1; }, "first[3] is -1");
  refused([](auto& m) { m.second[4] = 40; }, "second[4] is 40");
  refused([](auto& m) { m.share[5] = 1.5; }, "share[5] is 1.5");
  refused([](auto& m) { m.share[6] = std::numeric_limits<double>::quiet_NaN(); },
          "share[6] is nan");
  CHECK_THROWS_WITH(perdita::metrix(clean, {.weight = -1}), ContainsSubstring("weight is -1"));
  CHECK_THROWS_WITH(perdita::metrix(perdita::lifted_structure<double>()),
                    ContainsSubstring("terms of lifted_structure is pairs"));
  CHECK(g.x == kept.x);
}

// Images of what belongs to an anchor are taken of what does not, too, and the other way round:
// here of e^89, for which float has no number.
TEST_CASE("Metrix: what is far apart", "") {
  const std::vector<int> labels{0, 0, 1, 1}; // which lie opposite one another
  const perdita::mixed_examples<float> rows{{1, 2, 3, 0}, {0, 1, 2, 0}, {1, 1, 1, 1}};
  batch<float> x(4, 2), long_x(4, 2), g(4, 2), d(2, 2);
  for (index r = 0; r < 4; ++r)
    for (index k = 0; k < 2; ++k) {
      const double angle = 0.01 * static_cast<double>(r) + (r < 2 ? 0 : 3.14159);
      x(r, k) = static_cast<float>(k == 0 ? std::cos(angle) : std::sin(angle));
      long_x(r, k) = 44.6F * x(r, k);
    }
  const auto finite = [](const batch<float>& b) {
    return std::all_of(b.x.begin(), b.x.end(), [](float slope) { return std::isfinite(slope); });
  };
  const perdita::metrix pairs(perdita::multi_similarity<float>({.alpha = 44.5, .beta = 44.5}),
                              {.strangers = true});
  CHECK(std::isfinite(pairs(x.view(), labels, rows, g.view())));
  CHECK(finite(g));
  const perdita::metrix lifted(
      perdita::lifted_structure<float>(
          {.margin = 99, .terms = perdita::lifted_terms::anchors, .normalise = false}),
      {.strangers = true});
  CHECK(std::isfinite(lifted(long_x.view(), labels, rows, g.view())));
  CHECK(finite(g));
  for (const bool exchanged : {false, true})
    for (const bool all : {false, true}) {
      batch<float> proxies(2, 2);
      for (index k = 0; k < 2; ++k) {
        proxies(0, k) = x(exchanged ? 3 : 0, k);
        proxies(1, k) = x(exchanged ? 0 : 3, k);
      }
      const perdita::metrix nca(perdita::proxy_nca<float>({.scale = 22.25, .all_proxies = all}));
      CHECK(std::isfinite(nca(x.seen(), proxies.seen(), labels, rows, g.view(), d.view())));
      CHECK((finite(g) && finite(d)));
    }
}

// Row 4 is NaN, and left out of the clean part. It is part of an example that anchors of classes
// other than 1 and 2 are not compared with.
TEMPLATE_TEST_CASE("Metrix: what is not compared may be anything", "", float, double) {
  using T = TestType;
  const std::vector<int> labels{0, 0, 1, 0, 2, 0, 1};
  const perdita::mixed_examples<T> mixed{
      {0, 2, 4, 3}, {2, 1, 2, 6}, {T(0.5), T(0.25), T(0.75), T(0.5)}};
  const perdita::mixed_examples<T> without{{0, 2}, {2, 1}, {T(0.5), T(0.25)}};
  const auto x = random_batch<T>(7, 3, 8);
  auto spoilt = x;
  spoilt(4, 1) = std::numeric_limits<T>::quiet_NaN();
  const std::vector<T> weights{1, 1, 0, 1, 0, 1, 0}; // class 0 alone
  const auto filter = [](index, T* relation, index) { relation[4] = 0; };
  const auto check = [&](const auto& clean) {
    const perdita::metrix loss(clean);
    std::vector<T> values(7);
    perdita::anchor_options<T> call{.row_weights = weights, .filter = filter};
    const T value = loss(x.view(), labels, mixed, call);
    CHECK(loss(spoilt.view(), labels, mixed, call) == value);
    call.row_weights = {};
    call.values = values;
    CHECK(std::isnan(loss(spoilt.view(), labels, mixed, call)));
    for (std::size_t i = 0; i < 7; ++i)
      CHECK(std::isnan(values[i]) == (labels[i] != 0));
  };
  check(perdita::multi_similarity<T>());
  check(perdita::pair_margin<T>());
  check(perdita::lifted_structure<T>({.margin = 3, .terms = perdita::lifted_terms::anchors}));
  auto beyond = x; // of which no square is a number
  beyond(4, 1) = std::numeric_limits<T>::max() / 2;
  const perdita::metrix lengths(perdita::pair_margin<T>({.normalise = false}));
  const perdita::anchor_options<T> call{.row_weights = weights, .filter = filter};
  CHECK(lengths(beyond.view(), labels, mixed, call) == lengths(x.view(), labels, mixed, call));
  batch<T> g(7, 3); // of a row that nothing depends on: 0
  const perdita::metrix loss{perdita::multi_similarity<T>()};
  loss(spoilt.view(), labels, without, g.view(), call);
  CHECK((g(4, 0) == 0 && g(4, 1) == 0 && g(4, 2) == 0));
}

TEST_CASE("Metrix of proxies: a row that is ignored may be anything", "") {
  auto x = random_batch<double>(4, 3, 1);
  const auto p = random_batch<double>(2, 3, 2);
  const std::vector<int> labels{0, 1, 0, -100};
  const perdita::mixed_examples<double> mixed{{0, 0}, {1, 3}, {0.3, 0.6}};
  const perdita::metrix loss{perdita::proxy_nca<double>()};
  batch<double> g(4, 3), h(2, 3), again(4, 3), other(2, 3);
  const double value = loss(x.view(), p.view(), labels, mixed, g.view(), h.view());
  x(3, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(loss(x.view(), p.view(), labels, mixed, again.view(), other.view()) == value);
  CHECK((again.x == g.x && other.x == h.x));
  const perdita::matrix_view<const double> many(p.x.data(), (1 << 24) + 1, 3);
  CHECK_THROWS_WITH(loss(x.view(), many, labels, mixed),
                    Catch::Matchers::ContainsSubstring("proxies is 16777217"));
}

TEST_CASE("Metrix: what is drawn", "") {
  const std::vector<int> labels{5, 1, 5, 5, 1, 5, 7}, same(4, 2);
  const auto mixed = perdita::draw_mixed_examples<double>(labels, 20000, 3);
  REQUIRE(mixed.size() == 20000);
  double mean = 0, square = 0;
  std::vector<int> first(7), second(7);
  for (std::size_t k = 0; k < 20000; ++k) {
    const auto i = static_cast<std::size_t>(mixed.first[k]),
               j = static_cast<std::size_t>(mixed.second[k]);
    REQUIRE(labels[i] != labels[j]);
    ++first[i];
    ++second[j];
    mean += mixed.share[k] / 20000;
    square += (mixed.share[k] - 0.5) * (mixed.share[k] - 0.5) / 20000;
  }
  CHECK(std::abs(mean - 0.5) < 0.005); // Beta(2, 2): three standard deviations
  CHECK(std::abs(square - 0.05) < 0.001);
  for (const int count : first)
    CHECK(std::abs(count - 20000.0 / 7) < 150);
  // A row of label 5 is second to the rows of the other two classes: 2/5 + 1/6 of 1/7.
  CHECK(std::abs(second[0] - 20000.0 / 7 * (2.0 / 5 + 1.0 / 6)) < 130);
  CHECK(std::abs(second[6] - 20000.0 / 7 * (4.0 / 3 + 2.0 / 5)) < 200);
  const auto fewer = perdita::draw_mixed_examples<double>(labels, 5, 3);
  CHECK(std::equal(fewer.share.begin(), fewer.share.end(), mixed.share.begin()));
  CHECK(perdita::draw_mixed_examples<double>(same, 5, 3).size() == 0);
  CHECK(perdita::draw_mixed_examples<double>(std::vector<int>{}, 5, 3).size() == 0);
  CHECK_THROWS_WITH(
      perdita::draw_mixed_examples<double>(perdita::vector_view<const int>(nullptr, 4), 5, 3),
      Catch::Matchers::ContainsSubstring("labels is null"));
}

TEST_CASE("Multi-similarity: what is a duplicate", "") {
  batch<double> x(3, 2);
  x(0, 0) = x(2, 1) = 1, x(1, 0) = 0.8, x(1, 1) = 0.6; // cosines 0.8, 0.6 and 0
  const std::vector<int> labels{0, 0, 1};
  const perdita::multi_similarity<double> near_one({.mining = true, .margin = 1}),
      near_most({.mining = true, .margin = 1, .duplicate = 0.3});
  CHECK(near_one(x.view(), labels) > 0);
  CHECK(near_most(x.view(), labels) == 0); // 0.8 is no positive then, and nothing is mined without
}

TEST_CASE("Metrix: sums, and seeds", "") {
  const std::vector<int> labels{4, -2, 4, -2, 9, 4, -2, 9, 4};
  const auto x = random_batch<double>(9, 3, 6);
  const auto mixed = some_mixtures<double>();
  const auto compare = [&](const auto& mean, const auto& sum) {
    // All anchors count: a sum is the mean times what the sum of the clean loss is.
    batch<double> g(9, 3), h(9, 3);
    const double a = perdita::metrix(mean)(x.view(), labels, mixed, g.view(), {.normaliser = 1});
    CHECK(near(perdita::metrix(sum)(x.view(), labels, mixed, h.view()), a, 1e-13));
    for (std::size_t k = 0; k < g.x.size(); ++k)
      CHECK(std::abs(g.x[k] - h.x[k]) < 1e-13);
  };
  const auto how = perdita::reduction::sum;
  compare(perdita::multi_similarity<double>(),
          perdita::multi_similarity<double>({.reduction = how}));
  compare(perdita::pair_margin<double>(), perdita::pair_margin<double>({.reduction = how}));
  const auto anchors = perdita::lifted_terms::anchors;
  compare(perdita::lifted_structure<double>({.terms = anchors}),
          perdita::lifted_structure<double>({.terms = anchors, .reduction = how}));
  // As many examples as rows: both parts of a sum are 9 times those of the mean.
  const std::vector<int> classes{0, 1, 0, 1, 2, 0, 1, 2, 0};
  const auto proxies = random_batch<double>(4, 3, 7);
  const auto nine = perdita::draw_mixed_examples<double>(classes, 9, 1);
  CHECK(near(
      perdita::metrix(perdita::proxy_nca<double>({.reduction = how}))(x.seen(), proxies.seen(),
                                                                      classes, nine),
      9 * perdita::metrix(perdita::proxy_nca<double>())(x.seen(), proxies.seen(), classes, nine),
      1e-13));
  const auto one = perdita::draw_mixed_examples<double>(labels, 20, 1),
             other = perdita::draw_mixed_examples<double>(labels, 20, 2);
  CHECK((one.first != other.first && one.share != other.share));
}

} // namespace perdita_tests
