// SPDX-License-Identifier: MIT

// ⊥Grad: formula sheet 9.

#include <perdita/orthogonal_gradient.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

namespace perdita_tests {
namespace {

template <class T> std::vector<T> wave(std::size_t n, double frequency) {
  std::vector<T> x(n);
  for (std::size_t i = 0; i < n; ++i)
    x[i] = static_cast<T>(std::sin(frequency * static_cast<double>(i) + 1));
  return x;
}
template <class T> double dot(const std::vector<T>& a, const std::vector<T>& b) {
  long double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    sum += static_cast<long double>(a[i]) * static_cast<long double>(b[i]);
  return static_cast<double>(sum);
}

} // namespace

TEMPLATE_TEST_CASE("orthogonal_gradient: what is left is orthogonal, and the rest as it was",
                   "[orthogonal]", float, double) {
  using T = TestType;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  error_judge errors;
  for (const std::size_t n : {2U, 7U, 255U, 256U, 1000U, 100003U}) {
    const auto w = wave<T>(n, 0.37), g = wave<T>(n, 0.11);
    auto left = g;
    perdita::orthogonal_gradient(w, left);
    const double ww = dot(w, w), gg = dot(g, g), factor = dot(w, g) / ww;
    const double ratio = std::sqrt(gg / ww); // of lengths: what an error of ⟨w, g⟩ is measured by
    CHECK(std::abs(dot(w, left)) <= epsilon * std::sqrt(ww * gg));
    for (std::size_t i = 0; i < n; ++i)
      CHECK(
          errors.within(std::abs(static_cast<double>(left[i]) -
                                 (static_cast<double>(g[i]) - factor * static_cast<double>(w[i]))),
                        2, epsilon * (std::abs(static_cast<double>(g[i])) + ratio)));
    auto again = left;
    perdita::orthogonal_gradient(w, again);
    for (std::size_t i = 0; i < n; ++i)
      CHECK(std::abs(static_cast<double>(again[i] - left[i])) <= 4 * epsilon * (1 + ratio));
    auto stretched = g;
    perdita::orthogonal_gradient(w, stretched, {.keep_length = true});
    CHECK(std::abs(dot(stretched, stretched) / gg - 1) <= 16 * epsilon * gg / dot(left, left));
    CHECK(std::abs(dot(w, stretched)) <=
          4 * epsilon * std::sqrt(ww * gg) * std::sqrt(gg / dot(left, left)));
  }
  report_accuracy<T>("orthogonal_gradient", "", in_epsilons_of_terms,
                     {-1, errors.worst(), errors.share()});
}

TEMPLATE_TEST_CASE("orthogonal_gradient: a gradient nearly along the weights keeps its length",
                   "[orthogonal]", float, double) {
  using T = TestType;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  for (const double apart : {1e-2, 1e-4, 1e-6}) {
    const auto w = wave<T>(100003, 0.37);
    auto g = wave<T>(100003, 0.11);
    for (std::size_t i = 0; i < g.size(); ++i)
      g[i] = static_cast<T>(apart * static_cast<double>(g[i]) - static_cast<double>(w[i]));
    auto stretched = g;
    perdita::orthogonal_gradient(w, stretched, {.keep_length = true});
    INFO(apart);
    CHECK(std::abs(dot(stretched, stretched) / dot(g, g) - 1) <= 16 * epsilon);
  }
}

TEST_CASE("orthogonal_gradient: nothing to project on, nothing left, not a number",
          "[orthogonal]") {
  const std::vector<double> zero(5, 0), w{1, 2, 3, 4, 5};
  std::vector<double> g{5, 4, 3, 2, 1};
  const auto before = g;
  perdita::orthogonal_gradient(zero, g, {.keep_length = true});
  CHECK(g == before);
  std::vector<double> along{2, 4, 6, 8, 10};
  perdita::orthogonal_gradient(w, along, {.keep_length = true});
  CHECK(std::sqrt(dot(along, along)) < 1e-14);
  std::vector<double> lost{1, std::nan(""), 1, 1, 1};
  perdita::orthogonal_gradient(w, lost);
  for (const double x : lost)
    CHECK(std::isnan(x));
  std::vector<double> none;
  perdita::orthogonal_gradient(none, none);
}

TEST_CASE("orthogonal_gradient: strides", "[orthogonal]") {
  const auto w = wave<double>(600, 0.3);
  auto g = wave<double>(900, 0.2), untouched = g;
  std::vector<double> dense_w, dense_g;
  for (std::size_t i = 0; i < 300; ++i) {
    dense_w.push_back(w[2 * i]);
    dense_g.push_back(g[3 * i]);
  }
  perdita::orthogonal_gradient(perdita::vector_view<const double>(w.data(), 300, 2),
                               perdita::vector_view<double>(g.data(), 300, 3));
  perdita::orthogonal_gradient(dense_w, dense_g);
  for (std::size_t i = 0; i < 900; ++i)
    CHECK(g[i] == (i % 3 == 0 ? dense_g[i / 3] : untouched[i]));
}

TEST_CASE("orthogonal_gradient: bad input is refused, and nothing written", "[orthogonal]") {
  using Catch::Matchers::ContainsSubstring;
  const std::vector<float> w(4, 1);
  std::vector<float> g{1, 2, 3};
  CHECK_THROWS_WITH(perdita::orthogonal_gradient(w, g), ContainsSubstring("size of weights is 4"));
  CHECK(g == std::vector<float>{1, 2, 3});
  CHECK_THROWS_WITH(perdita::orthogonal_gradient(perdita::vector_view<const float>(nullptr, 3), g),
                    ContainsSubstring("memory"));
}

TEST_CASE("orthogonal_gradient: the same bits for any number of threads", "[orthogonal][threads]") {
  const auto w = wave<float>(54321, 0.37), g = wave<float>(54321, 0.11);
  auto one = g;
  perdita::orthogonal_gradient(w, one, {.keep_length = true, .run_on = perdita::serial});
  for (const std::size_t n : {2U, 7U}) {
    const threads_executor pool(n, task_order::shuffled);
    auto many = g;
    perdita::orthogonal_gradient(w, many, {.keep_length = true, .run_on = pool});
    CHECK(many == one);
  }
}

} // namespace perdita_tests
