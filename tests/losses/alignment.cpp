// SPDX-License-Identifier: MIT

// Alignment: formula sheet "contrastive", 1.8.

#include <perdita/alignment.hpp>

#include <array>
#include <cmath>
#include <limits>

#include "support/embeddings.hpp"

namespace perdita_tests {

using perdita::index;

TEMPLATE_TEST_CASE("alignment: value and gradients against the formula", "[alignment]", float,
                   double) {
  using T = TestType;
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  error_judge of_values, of_slopes;
  for (const index cols : {1, 3, 33})
    for (const double alpha : {0.5, 1.0, 2.0, 3.0})
      for (const double spread : {1.0, 1e-12, 1e10}) {
        const index rows = 70;
        const auto a = random_batch<T>(rows, cols, 3, spread),
                   b = random_batch<T>(rows, cols, 4, spread);
        batch<T> da(rows, cols), db = da;
        const T value =
            perdita::alignment<T>({.exponent = alpha})(a.view(), b.view(), da.view(), db.view());
        wide expected = 0;
        for (index r = 0; r < rows; ++r) {
          wide square = 0;
          for (index c = 0; c < cols; ++c)
            square += (wide(a(r, c)) - b(r, c)) * (wide(a(r, c)) - b(r, c));
          expected += pow(square, wide(alpha / 2)) / rows;
          const wide factor = alpha * pow(square, wide(alpha / 2 - 1)) / rows;
          for (index c = 0; c < cols; ++c) {
            const wide slope = factor * (wide(a(r, c)) - b(r, c));
            CHECK(of_slopes.within(size_of(wide(da(r, c) - slope)), sizeof(T) == 4 ? 1 : 12,
                                   epsilon * size_of(slope)));
            CHECK(of_slopes.within(size_of(wide(db(r, c) + slope)), sizeof(T) == 4 ? 1 : 12,
                                   epsilon * size_of(slope)));
          }
        }
        CHECK(of_values.within(size_of(wide(value - expected)), sizeof(T) == 4 ? 1 : 8,
                               epsilon * expected));
      }
  report_accuracy<T>(
      "alignment", "", in_epsilons,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEST_CASE("alignment: the formula sheet's values", "[alignment]") {
  // Its gradients are those of vectors that are normalised first: across z, over the length.
  const auto x = sheet_x(), y = sheet_y(), z = unit_rows(x), w = unit_rows(y);
  auto dz = z, dw = w;
  const double value = perdita::alignment<double>()(z.view(), w.view(), dz.view(), dw.view());
  CHECK(near(value, 2.15451064152, 1e-11));
  const auto back = [](const batch<double>& raw, const batch<double>& unit, batch<double> g) {
    for (index r = 0; r < g.rows; ++r) {
      double along = 0, length = 0;
      for (index c = 0; c < g.cols; ++c)
        along += g(r, c) * unit(r, c), length += raw(r, c) * unit(r, c);
      for (index c = 0; c < g.cols; ++c)
        g(r, c) = (g(r, c) - along * unit(r, c)) / length;
    }
    return length_of(g.x);
  };
  CHECK(near(back(x, z, dz), 0.373827736, 1e-8));
  CHECK(near(back(y, w, dw), 0.377205701, 1e-8));
}

TEST_CASE("alignment: the gradients are the derivatives", "[alignment]") {
  for (const double alpha : {1.0, 2.0, 2.5})
    check_derivative<2>(perdita::alignment<double>({.exponent = alpha}),
                        std::array{random_batch<double>(7, 5, 1), random_batch<double>(7, 5, 2)});
}

TEST_CASE("alignment: pairs that agree, huge and tiny ones, NaN, nothing", "[alignment]") {
  constexpr double inf = std::numeric_limits<double>::infinity();
  for (const double alpha : {0.5, 1.0, 2.0}) {
    const perdita::alignment<double> loss({.exponent = alpha});
    batch<double> a(3, 2, 1), b(3, 2, 1), g(3, 2, 5), h(3, 2, 5);
    a(1, 1) = 2, b(1, 1) = 2;
    CHECK(loss(a.view(), b.view(), g.view(), h.view()) == 0);
    CHECK(g.x == std::vector<double>(6, 0));
    CHECK(h.x == std::vector<double>(6, 0));
    for (const double bad : {std::nan(""), inf, -inf}) {
      a(1, 0) = bad;
      const double value = loss(a.view(), b.view(), g.view(), h.view());
      CHECK((std::isnan(bad) ? std::isnan(value) : value == inf));
      for (const index j : {0, 1})
        CHECK((std::isnan(g(1, j)) && std::isnan(h(1, j))));
      CHECK((g(0, 0) == 0 && g(2, 1) == 0));
    }
  }
  const perdita::alignment<double> distance({.exponent = 1});
  batch<double> a(1, 2), b(1, 2), g(1, 2), h(1, 2);
  a(0, 0) = 3e300, a(0, 1) = 4e300;
  CHECK(near(distance(a.view(), b.view(), g.view(), h.view()), 5e300, 1e-15));
  CHECK((near(g(0, 0), 0.6, 1e-15) && near(h(0, 1), -0.8, 1e-15)));
  a(0, 0) = 3 * 0x1p-1074, a(0, 1) = 4 * 0x1p-1074;
  CHECK(distance(a.view(), b.view(), g.view(), h.view()) == 5 * 0x1p-1074);
  CHECK((near(g(0, 0), 0.6, 1e-15) && near(h(0, 1), -0.8, 1e-15)));
  for (const index n : {0, 3}) {
    const perdita::matrix_view<double> none(nullptr, n, n == 0 ? 4 : 0);
    CHECK(distance(none, none, none, none) == 0);
  }
}

TEMPLATE_TEST_CASE("alignment: layouts, threads, calls, refusals", "[alignment][threads]", float,
                   double) {
  check_calls<2>(perdita::alignment<TestType>(), 150, 21);
  CHECK_THROWS_WITH(perdita::alignment<TestType>({.exponent = 0}),
                    Catch::Matchers::ContainsSubstring("exponent is 0"));
}

} // namespace perdita_tests
