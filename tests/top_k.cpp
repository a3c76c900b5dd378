// SPDX-License-Identifier: MIT

// top_k against a stable sort.

#include <perdita/top_k.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/map_rows.hpp"

namespace perdita_tests {
namespace {

/// The classes of a row from the largest score to the smallest: NaN first, ties in their order.
template <class T> std::vector<index> order_of(const std::vector<T>& x) {
  std::vector<index> order(x.size());
  std::iota(order.begin(), order.end(), index{0});
  std::stable_sort(order.begin(), order.end(), [&](index a, index b) {
    const T left = x[static_cast<std::size_t>(a)], right = x[static_cast<std::size_t>(b)];
    return left > right || (std::isnan(left) && !std::isnan(right));
  });
  return order;
}

template <class T> bool same_number(T a, T b) { return a == b || (a != a && b != b); }

/// Rows where the k largest are spread, bunched, equal, masked, or not numbers.
template <class T> std::vector<T> make_row(int kind, index cols, random_numbers& random) {
  constexpr T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> x;
  for (index c = 0; c < cols; ++c) {
    const T z = static_cast<T>(random.normal());
    const bool seldom = random.below(50) == 0;
    const T all[] = {z,
                     static_cast<T>(c),
                     static_cast<T>(-c),
                     static_cast<T>(random.below(3)),
                     T(7),
                     seldom ? z : -inf,
                     seldom ? nan : z,
                     seldom ? inf : z,
                     random.below(3) > 0 ? nan : z,
                     c / 80 == cols / 160 ? 10 + z : z, // side by side
                     -inf,
                     nan};
    x.push_back(all[kind]);
  }
  return x;
}
constexpr int row_kinds = 12;

} // namespace

TEMPLATE_TEST_CASE("top_k: every kind of row", "[top_k]", float, double) {
  using T = TestType;
  random_numbers random(3);
  std::size_t compared = 0, wrong = 0;
  for (const index cols : {1, 2, 15, 16, 17, 63, 64, 65, 300, 5000})
    for (const index k : {1, 2, 5, 16, 64, 100, 300, 4999}) {
      if (k > cols)
        continue;
      row_major<T> x(row_kinds, cols), values(row_kinds, k);
      row_major<std::int32_t> classes(row_kinds, k);
      std::vector<std::vector<T>> rows;
      for (int r = 0; r < row_kinds; ++r) {
        rows.push_back(make_row<T>(r, cols, random));
        for (index c = 0; c < cols; ++c)
          x(r, c) = rows.back()[static_cast<std::size_t>(c)];
      }
      perdita::top_k(x, values, classes);
      for (int r = 0; r < row_kinds; ++r) {
        const auto order = order_of(rows[static_cast<std::size_t>(r)]);
        std::size_t bad = 0;
        for (index j = 0; j < k; ++j) {
          const index expected = order[static_cast<std::size_t>(j)];
          bad += classes(r, j) != expected || !same_number(values(r, j), x(r, expected));
          ++compared;
        }
        INFO(cols << " columns, k = " << k << ", kind " << r);
        CHECK(bad == 0);
        wrong += bad;
      }
      // Other layouts, other types, threads: the same.
      const column_major<T> across = x;
      column_major<T> across_values(row_kinds, k);
      column_major<std::uint64_t> across_classes(row_kinds, k);
      perdita::workspace memory;
      perdita::top_k(across, across_values, across_classes,
                     {.run_on = perdita::serial, .memory = &memory});
      CHECK(same_bits(values, across_values));
      CHECK((classes.template cast<std::uint64_t>().array() == across_classes.array()).all());
    }
  CHECK(wrong == 0);
  CHECK(compared > 60000);
}

TEST_CASE("top_k: sixteen-bit scores", "[top_k]") {
  random_numbers random(4);
  const index cols = 1000, k = 20;
  std::vector<perdita::bfloat16> x, values(static_cast<std::size_t>(k));
  std::vector<float> wide_x;
  for (index c = 0; c < cols; ++c) {
    x.push_back({perdita::core::narrow_bfloat16(static_cast<float>(random.normal()))});
    wide_x.push_back(perdita::core::widen_bfloat16(x.back().bits)); // with many ties
  }
  std::vector<int> classes(static_cast<std::size_t>(k));
  perdita::top_k(perdita::matrix_view<const perdita::bfloat16>(x.data(), 1, cols),
                 perdita::matrix_view<perdita::bfloat16>(values.data(), 1, k),
                 perdita::matrix_view<int>(classes.data(), 1, k));
  const auto order = order_of(wide_x);
  for (std::size_t j = 0; j < classes.size(); ++j) {
    CHECK(classes[j] == order[j]);
    CHECK(values[j].bits == x[static_cast<std::size_t>(order[j])].bits);
  }
}

TEST_CASE("top_k: arguments are checked", "[top_k]") {
  using Catch::Matchers::ContainsSubstring;
  row_major<float> x = row_major<float>::Random(3, 300);
  row_major<float> values = row_major<float>::Constant(3, 2, 7);
  row_major<std::int32_t> classes = row_major<std::int32_t>::Constant(3, 2, 7);
  row_major<float> short_values(2, 2), wide_values(3, 301);
  row_major<std::int32_t> short_classes(3, 1), wide_classes(3, 301);
  row_major<std::int8_t> small(3, 2);
  CHECK_THROWS_WITH(perdita::top_k(x, short_values, classes),
                    ContainsSubstring("top_k: values rows"));
  CHECK_THROWS_WITH(perdita::top_k(x, values, short_classes), ContainsSubstring("indices columns"));
  CHECK_THROWS_WITH(perdita::top_k(x, wide_values, wide_classes),
                    ContainsSubstring("columns of values is 301"));
  CHECK_THROWS_WITH(perdita::top_k(x, values, small), ContainsSubstring("columns is 300"));
  CHECK_THROWS_WITH(perdita::top_k(x, perdita::matrix_view<float>(x.data() + 5, 3, 2), classes),
                    ContainsSubstring("overlaps"));
  CHECK_THROWS_AS(perdita::top_k(x, perdita::matrix_view<float>(nullptr, 3, 2), classes),
                  std::invalid_argument);
  CHECK((values.array() == 7).all());
  CHECK((classes.array() == 7).all());
  row_major<float> none(3, 0), no_rows(0, 300), no_values(0, 2);
  row_major<std::int32_t> no_classes(3, 0), nothing(0, 2);
  CHECK_NOTHROW(perdita::top_k(x, none, no_classes));
  CHECK_NOTHROW(perdita::top_k(no_rows, no_values, nothing));
}

} // namespace perdita_tests
