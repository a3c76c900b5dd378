// SPDX-License-Identifier: MIT

// The battery of row_battery.hpp as a whole, for losses/*.cpp, and what its inputs are worth. Also
// linked into the [threads] tests.

#include "support/row_battery.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {

template <class T> void check_row_loss(const row_descriptor<T>& d) {
  // By name, because a test case runs sections of one name and place once only.
  const std::string of = d.name() + ": ";
  SECTION(of + "the reference's gradient is its derivative") { check_reference(d); }
  SECTION(of + "values and gradients of every setting") { check_accuracy(d); }
  SECTION(of + "shapes") { check_shapes(d); }
  SECTION(of + "NaN") { check_nan(d); }
  SECTION(of + "the same bits however it is asked") { check_same_bits(d); }
  SECTION(of + "sixteen-bit storage") { check_storage(d); }
  SECTION(of + "differences of values") { check_differences(d); }
  SECTION(of + "what the traits say") { check_mathematics(d); }
  SECTION(of + "rows that do not count") { check_edges(d); }
  SECTION(of + "errors") { check_errors(d); }
  SECTION(of + "threads") { check_threads(d, false); }
}

template void check_row_loss(const row_descriptor<float>&);
template void check_row_loss(const row_descriptor<double>&);

TEST_CASE("row battery: the generators make what they say", "[battery]") {
  random_numbers random(1);
  double sum = 0, squares = 0;
  const int n = 20000;
  for (const double x : make_scores(row_kind::normal, n, 0, random)) {
    sum += x / n;
    squares += x * x / n;
  }
  CHECK(std::abs(sum) < 0.1);
  CHECK(squares > 8);
  CHECK(squares < 10);
  for (int k = 0; k < static_cast<int>(row_kind::count); ++k) {
    const auto x = make_scores(static_cast<row_kind>(k), 100, 37, random);
    const auto [low, high] = std::minmax_element(x.begin(), x.end());
    const bool flat =
        k >= static_cast<int>(row_kind::equal) && k <= static_cast<int>(row_kind::all_minus_1000);
    INFO("kind " << k);
    CHECK((*low == *high) == flat);
    CHECK(std::isfinite(x[37]));
  }
  std::vector<int> seen(5);
  for (int i = 0; i < 1000; ++i)
    ++seen[random.below(5)];
  for (const int s : seen)
    CHECK(s > 150);
  double mass = 0;
  for (const double q : make_distribution(row_kind::normal, 100, 3, random))
    mass += q;
  CHECK(std::abs(mass - 1) < 1e-9);
}

} // namespace perdita_tests
