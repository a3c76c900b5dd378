// SPDX-License-Identifier: MIT

// PyTorch's cosine_embedding_loss: formula sheet "contrastive", 9.1.

#include <perdita/cosine_embedding.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

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
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// Of one pair, from the definition.
template <class T> struct expectation {
  wide value = 0, size = 0;
  std::vector<wide> of_a, of_b, size_a, size_b; ///< sizes: of the terms of a slope

  expectation(const std::vector<T>& a, const std::vector<T>& b, int y, const wide& margin,
              const wide& epsilon = 1e-12) {
    wide aa = epsilon, bb = epsilon, ab = 0, parts = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      aa += wide(a[i]) * wide(a[i]);
      bb += wide(b[i]) * wide(b[i]);
      ab += wide(a[i]) * wide(b[i]);
      parts += size_of(wide(wide(a[i]) * wide(b[i])));
    }
    const wide q = sqrt(aa) * sqrt(bb), c = ab / q;
    size = y > 0 ? wide(1 - c) : wide(parts / q + size_of(margin));
    const int sign = y > 0 ? -1 : c > margin ? 1 : 0;
    value = y > 0 ? wide(1 - c) : larger(0, c - margin);
    for (std::size_t i = 0; i < a.size(); ++i) {
      of_a.push_back(sign * (wide(b[i]) / q - ab / q * wide(a[i]) / aa));
      of_b.push_back(sign * (wide(a[i]) / q - ab / q * wide(b[i]) / bb));
      size_a.push_back(size_of(wide(b[i] / q)) + size_of(wide(parts / q * a[i] / aa)));
      size_b.push_back(size_of(wide(a[i] / q)) + size_of(wide(parts / q * b[i] / bb)));
    }
  }
};

template <class T, class Loss>
T run(const Loss& loss, const std::vector<T>& a, const std::vector<T>& b, int y, std::vector<T>& da,
      std::vector<T>& db) {
  const auto n = static_cast<index>(a.size());
  da.assign(a.size(), T(7));
  db.assign(a.size(), T(7));
  return loss(matrix_view<const T>(a.data(), 1, n), matrix_view<const T>(b.data(), 1, n),
              std::vector<int>{y}, matrix_view<T>(da.data(), 1, n),
              matrix_view<T>(db.data(), 1, n));
}

} // namespace

TEMPLATE_TEST_CASE("cosine_embedding: value and gradients", "[cosine_embedding]", float, double) {
  using T = TestType;
  random_numbers random(31);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  const double huge = sizeof(T) == 4 ? 1e36 : 1e306, tiny = sizeof(T) == 4 ? 1e-36 : 1e-290;
  for (const std::size_t n : {1U, 2U, 3U, 16U, 17U, 300U, 513U})
    // How far b is from a multiple of a: 1 − c must keep its digits.
    for (const double apart : {10.0, 1.0, 1e-3, 1e-6, 1e-12})
      for (const auto& [of_a, of_b] : {std::pair{1.0, 1.0},
                                       {1e-6, 2.0},
                                       {huge, 1.0},
                                       {3.0, huge},
                                       {huge, huge},
                                       {tiny, 1.0},
                                       {tiny, huge},
                                       {1e-8, tiny}})
        for (const int y : {1, -1})
          for (const double margin : {0.0, 0.375, -1.0}) {
            std::vector<T> a, b, da, db;
            for (std::size_t i = 0; i < n; ++i) {
              const double x = random.normal();
              a.push_back(static_cast<T>(x * of_a));
              b.push_back(static_cast<T>((0.5 * x + apart * random.normal()) * of_b));
            }
            const expectation<T> e(a, b, y, margin);
            const T value = run(perdita::cosine_embedding<T>({.margin = static_cast<T>(margin)}), a,
                                b, y, da, db);
            // The reference's own 1 − c has its 34 digits only.
            of_values.within(size_of(wide(value - e.value)), sizeof(T) == 4 ? 1 : 6,
                             epsilon * e.size + wide(1e-32));
            const auto judge = [&](T got, const wide& expected, const wide& size) {
              const wide least = std::numeric_limits<T>::min();
              of_slopes.within(size_of(wide(got - expected)), sizeof(T) == 4 ? 1 : 4,
                               epsilon * larger(size, least));
            };
            for (std::size_t i = 0; i < n; ++i) {
              judge(da[i], e.of_a[i], e.size_a[i]);
              judge(db[i], e.of_b[i], e.size_b[i]);
            }
          }
  report_accuracy<T>("cosine_embedding", "", in_epsilons_of_terms, of_values, of_slopes);
  INFO(of_values.worst() << " and " << of_slopes.worst());
  CHECK(of_values.all_within());
  CHECK(of_slopes.all_within());
}

TEST_CASE("cosine_embedding: golden value", "[cosine_embedding]") {
  // The matrices X and Y of formula sheet "contrastive", 11
  std::vector<double> x, y, dx(24), dy(24);
  for (int k = 0; k < 24; ++k) {
    x.push_back(std::sin(.7 * k + .3 + .15 * k * k));
    y.push_back(std::cos(.9 * k + .1 + .15 * k * k));
  }
  const std::vector<double> labels{1, -1, 1, -1, 1, -1};
  const double value = perdita::cosine_embedding<double>({.margin = 0.1})(
      matrix_view<const double>(x.data(), 6, 4), matrix_view<const double>(y.data(), 6, 4), labels,
      matrix_view<double>(dx.data(), 6, 4), matrix_view<double>(dy.data(), 6, 4));
  const auto norm = [](const std::vector<double>& g) {
    double sum = 0;
    for (const double d : g)
      sum += d * d;
    return std::sqrt(sum);
  };
  using Catch::Matchers::WithinAbs;
  CHECK_THAT(value, WithinAbs(0.622923225042, 1e-11));
  CHECK_THAT(norm(dx), WithinAbs(0.143236791, 1e-9));
  CHECK_THAT(norm(dy), WithinAbs(0.139010067, 1e-9));
}

TEST_CASE("cosine_embedding: the gradients are the value's derivatives", "[cosine_embedding]") {
  random_numbers random(32);
  std::vector<double> a, b, da, db, unused, other;
  for (int i = 0; i < 7; ++i) {
    a.push_back(random.normal());
    b.push_back(random.normal() + a.back());
  }
  const auto list = [](const auto& x) { return std::vector<double>(x.begin(), x.end()); };
  for (const int y : {1, -1})
    for (const double epsilon : {1e-12, 0.5}) {
      const perdita::cosine_embedding<double> loss({.margin = 0.1, .epsilon = epsilon});
      run(loss, a, b, y, da, db);
      const auto fixed_a = a, fixed_b = b;
      const auto first = perdita::testing::check_gradient(
          [&](const auto& x) { return run(loss, list(x), fixed_b, y, unused, other); }, a, da);
      INFO(first.message());
      CHECK(first.ok);
      const auto second = perdita::testing::check_gradient(
          [&](const auto& x) { return run(loss, fixed_a, list(x), y, unused, other); }, b, db);
      INFO(second.message());
      CHECK(second.ok);
    }
}

TEST_CASE("cosine_embedding: zero vectors, infinities and NaN", "[cosine_embedding]") {
  using list = std::vector<double>;
  using Catch::Matchers::WithinRel;
  const perdita::cosine_embedding<double> loss;
  list da, db;
  const list zero{0, 0}, b{3, 4};
  CHECK(run(loss, zero, b, 1, da, db) == 1);
  CHECK_THAT(da[0], WithinRel(-0.6e6, 1e-12));
  CHECK_THAT(da[1], WithinRel(-0.8e6, 1e-12));
  CHECK(db == zero);
  CHECK(run(loss, b, zero, 1, da, db) == 1);
  CHECK_THAT(db[1], WithinRel(-0.8e6, 1e-12));
  CHECK(da == zero);
  for (const int y : {1, -1}) {
    CHECK(run(loss, zero, zero, y, da, db) == (y > 0 ? 1 : 0));
    CHECK((da == zero && db == zero));
  }
  CHECK(run(perdita::cosine_embedding<double>({.margin = -0.5}), zero, b, -1, da, db) == 0.5);
  CHECK_THAT(da[0], WithinRel(0.6e6, 1e-12));
  // On the kink
  CHECK(run(loss, {1, 0}, {0, 1}, -1, da, db) == 0);
  CHECK((da == zero && db == zero));
  CHECK(run(loss, {1, 0}, {-1, 0}, -1, da, db) == 0);

  for (const double bad : {nan, inf, -inf})
    for (const int y : {1, -1})
      for (const bool first : {false, true}) {
        const list spoilt{bad, -3};
        CHECK(std::isnan(run(loss, first ? spoilt : b, first ? b : spoilt, y, da, db)));
        for (const list& g : {da, db})
          CHECK((std::isnan(g[0]) && std::isnan(g[1])));
      }
  constexpr double largest = std::numeric_limits<double>::max();
  CHECK_THAT(run(loss, {largest, largest}, {largest, -largest}, 1, da, db), WithinRel(1, 1e-15));
  CHECK(run(loss, {largest, largest}, {largest, largest}, 1, da, db) == 0);
}

TEST_CASE("cosine_embedding: rows, reductions, layouts and options", "[cosine_embedding]") {
  random_numbers random(33);
  const index rows = 37, cols = 45;
  const auto size = static_cast<std::size_t>(rows * cols);
  std::vector<float> a(size), b(size), da(size), db(size), each(37), ga, gb;
  for (std::size_t i = 0; i < size; ++i) {
    a[i] = static_cast<float>(random.normal());
    b[i] = static_cast<float>(random.normal()) + a[i] / 2;
  }
  a[5] = static_cast<float>(nan); // pair 0, of its own
  std::vector<signed char> labels;
  std::vector<float> weights, upstream;
  for (index r = 0; r < rows; ++r) {
    labels.push_back(r % 3 == 1 ? 1 : -1);
    weights.push_back(r == 0 ? 0 : static_cast<float>(r % 4));
    upstream.push_back(static_cast<float>(random.normal()));
  }
  const matrix_view<const float> first(a.data(), rows, cols), second(b.data(), rows, cols);
  const matrix_view<float> to_first(da.data(), rows, cols), to_second(db.data(), rows, cols);
  perdita::call_options<float> call;
  call.row_weights = weights;
  call.upstream = upstream;
  call.scale = 3;
  call.values = each;
  const perdita::cosine_embedding<float> loss({.margin = 0.2F});
  std::fill(da.begin(), da.end(), 5.0F);
  std::fill(db.begin(), db.end(), 5.0F);
  const float value = loss(first, second, labels, to_first, to_second, call);
  double sum = 0, all = 0;
  for (index r = 0; r < rows; ++r) {
    const auto begin = static_cast<std::ptrdiff_t>(r * cols);
    const std::vector<float> x(a.begin() + begin, a.begin() + begin + cols),
        y(b.begin() + begin, b.begin() + begin + cols);
    const float own = run(loss, x, y, labels[static_cast<std::size_t>(r)], ga, gb);
    const auto w = weights[static_cast<std::size_t>(r)];
    all += static_cast<double>(w);
    if (w != 0)
      sum += static_cast<double>(w * own);
    if (w == 0)
      CHECK(each[static_cast<std::size_t>(r)] == 0);
    else
      CHECK(std::abs(each[static_cast<std::size_t>(r)] - w * own) <= 2e-7F * w * own);
  }
  CHECK(std::abs(static_cast<double>(value) - sum / all) < 1e-6);
  for (std::size_t i = 0; i < size; ++i) { // the last row of ga and gb
    const auto r = i / static_cast<std::size_t>(cols), c = i % static_cast<std::size_t>(cols);
    if (weights[r] == 0)
      CHECK((da[i] == 0 && db[i] == 0));
    if (r == 36)
      continue;
    if (r == 35) {
      run(loss, {a.begin() + 35 * cols, a.begin() + 36 * cols},
          {b.begin() + 35 * cols, b.begin() + 36 * cols}, labels[r], ga, gb);
      const float factor = weights[r] * upstream[r] * 3 / static_cast<float>(all);
      CHECK(std::abs(da[i] - factor * ga[c]) <= 4e-7F * std::abs(factor * ga[c]));
      CHECK(std::abs(db[i] - factor * gb[c]) <= 4e-7F * std::abs(factor * gb[c]));
    }
  }

  // Threads, strides, labels of other kinds, accumulation
  const auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
    return std::equal(x.begin(), x.end(), y.begin());
  };
  std::vector<float> strided(2 * size), ha(size), hb(size, 1.0F);
  for (index r = 0; r < rows; ++r)
    for (index c = 0; c < cols; ++c)
      strided[static_cast<std::size_t>(2 * (c * rows + r))] =
          b[static_cast<std::size_t>(r * cols + c)];
  const matrix_view<const float> other(strided.data(), rows, cols, 2, 2 * rows);
  std::vector<double> zero_one;
  for (const auto l : labels)
    zero_one.push_back(l > 0 ? 1 : 0);
  const threads_executor threads(3, task_order::shuffled);
  call.run_on = threads;
  const perdita::cosine_embedding<float> of_zero_one(
      {.margin = 0.2F, .labels = perdita::binary_labels::zero_one});
  CHECK(of_zero_one(first, other, zero_one, matrix_view<float>(ha.data(), rows, cols),
                    matrix_view<float>(hb.data(), rows, cols), call) == value);
  CHECK((same(ha, da) && same(hb, db)));
  CHECK(loss(first, second, labels, call) == value);
  call.accumulate = true;
  loss(first, second, labels, to_first, to_second, call);
  for (std::size_t i = 0; i < size; ++i)
    CHECK((da[i] == 2 * ha[i] && db[i] == 2 * hb[i]));
  CHECK(loss(matrix_view<const float>(a.data(), 0, 4), matrix_view<const float>(b.data(), 0, 4),
             std::vector<int>{}) == 0);
}

TEST_CASE("cosine_embedding: errors", "[cosine_embedding]") {
  using Catch::Matchers::ContainsSubstring;
  const double largest = std::numeric_limits<double>::max();
  CHECK_THROWS_WITH(perdita::cosine_embedding<double>({.margin = nan}),
                    ContainsSubstring("margin"));
  for (const double epsilon : {0.0, -1.0, nan, inf})
    CHECK_THROWS_WITH(perdita::cosine_embedding<double>({.epsilon = epsilon}),
                      ContainsSubstring("epsilon"));
  std::vector<double> a{1, 2, 3, 4}, b{1, 2, 3, 4}, g(4, largest), h(4, largest);
  const matrix_view<double> x(a.data(), 2, 2), y(b.data(), 2, 2), dx(g.data(), 2, 2),
      dy(h.data(), 2, 2);
  const perdita::cosine_embedding<double> loss;
  const std::vector<int> good{1, -1};
  for (const int label : {0, 2, -100})
    CHECK_THROWS_WITH(loss(x, y, std::vector<int>{1, label}, dx, dy),
                      ContainsSubstring("labels[1] is") && ContainsSubstring("1 or -1"));
  CHECK_THROWS_WITH(
      perdita::cosine_embedding<double>({.labels = perdita::binary_labels::zero_one})(x, y, good),
      ContainsSubstring("labels[1] is -1, expected 0 or 1"));
  CHECK_THROWS_WITH(loss(x, y, std::vector<unsigned>{1, 0xFFFFFFFFU}), ContainsSubstring("labels"));
  CHECK_THROWS_WITH(loss(x, y, std::vector<double>{1, nan}), ContainsSubstring("labels[1]"));
  CHECK_THROWS_WITH(loss(x, y, std::vector<int>{1}, dx, dy), ContainsSubstring("labels"));
  CHECK_THROWS_WITH(loss(x, matrix_view<double>(b.data(), 1, 2), good),
                    ContainsSubstring("rows of the second embeddings"));
  CHECK_THROWS_WITH(loss(x, y, good, matrix_view<double>(g.data(), 2, 1), dy),
                    ContainsSubstring("columns of the first gradient"));
  CHECK_THROWS_WITH(loss(x, y, good, dx, matrix_view<double>(h.data(), 1, 2)),
                    ContainsSubstring("rows of the second gradient"));
  CHECK_THROWS_WITH(loss(x, y, good, dx, dx), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(x, y, good, x, dy), ContainsSubstring("overlaps"));
  CHECK_THROWS_WITH(loss(x, y, good, dx, matrix_view<double>(nullptr, 2, 2)),
                    ContainsSubstring("second gradient"));
  CHECK_THROWS_WITH(loss(x, matrix_view<double>(nullptr, 2, 2), good),
                    ContainsSubstring("second embeddings"));
  for (const double untouched : g)
    CHECK(untouched == largest);
  for (const double untouched : h)
    CHECK(untouched == largest);
}

TEST_CASE("cosine_embedding: what the mean divides by", "[cosine_embedding]") {
  const std::vector<double> a{1, 2, 3, -1, 0.5, 2}, b{2, -1, 1, 1, 1, 0.25};
  const std::vector<int> labels{1, -1, 1};
  const auto view = [](auto& v) { return matrix_view(v.data(), 3, 2); };
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    std::vector<double> da(6), db(6);
    const double value = perdita::cosine_embedding<double>({.reduction = how})(
        view(a), view(b), labels, view(da), view(db), call);
    return all_of(value, da, db);
  });
}

} // namespace perdita_tests
