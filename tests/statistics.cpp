// SPDX-License-Identifier: MIT

// A statistic of parts, merged, is the statistic of the whole: what lanes, chunks, tiles and shards
// rest on.

#include "perdita/core/statistics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using W = perdita::core::pack<double>;

/// The numbers of one row, summed as a kernel does: one shift, one score at a time.
template <class S>
perdita::core::summary<S, W> summarise(const std::vector<double>& z, const std::vector<double>& b,
                                       std::size_t first, std::size_t last) {
  perdita::core::summary<S, W> s;
  W seen = S::template look_at_nothing<W>();
  for (std::size_t i = first; i < last; ++i)
    seen = S::look(seen, W(z[i]));
  s.shift = S::choose(seen, S::template first_shift<W>(), static_cast<index>(last - first));
  for (W& t : s.term)
    t = W(0);
  for (std::size_t i = first; i < last; ++i)
    S::absorb(s.term, W(z[i]), s.shift, W(b[i]));
  return s;
}

/// The same from `shards` parts of uneven length, the first of them the shortest.
template <class S>
perdita::core::summary<S, W> merged(const std::vector<double>& z, const std::vector<double>& b,
                                    std::size_t shards) {
  const auto end = [&](std::size_t k) { return z.size() * k * k / (shards * shards); };
  auto s = summarise<S>(z, b, 0, end(1));
  for (std::size_t k = 1; k < shards; ++k)
    s = perdita::core::merge(s, summarise<S>(z, b, end(k), end(k + 1)));
  return s;
}

bool close(const W& x, long double right) {
  const auto got = static_cast<long double>(perdita::core::first_lane(x));
  return got == right || std::fabs(got - right) <= 1e-13L * std::max(1.0L, std::fabs(right));
}

} // namespace

TEST_CASE("statistics: merged shards are the whole", "[statistics]") {
  namespace core = perdita::core;
  std::vector<double> z, b;
  for (int i = 0; i < 490; ++i) {
    z.push_back(40 * std::sin(1.7 * i) + (i > 400 ? 300 : 0)); // the shift has to move
    b.push_back(i % 3 == 0 ? 0.25 : 0);
  }
  z[4] = z[200] = z[488] = -std::numeric_limits<double>::infinity();
  b[4] = b[200] = b[488] = 0;
  const auto n = static_cast<long double>(z.size());
  long double exponentials = 0, weighted = 0, of_b = 0, mean_b = 0, entropy = 0;
  for (std::size_t i = 0; i < z.size(); ++i) {
    const long double zi = z[i], bi = b[i], e = std::exp(zi - 340);
    exponentials += e;
    mean_b += e * bi;
    of_b += bi;
    weighted += bi == 0 ? 0 : bi * zi;
    entropy += e == 0 ? 0 : e * (zi - 340);
  }
  const long double log_sum = 340 + std::log(exponentials);
  for (const std::size_t shards : {1u, 2u, 3u, 7u}) {
    INFO(shards << " shards");
    const auto plain = merged<core::log_sum_exp>(z, b, shards);
    CHECK(close(plain.shift + core::log(plain.term[0]), log_sum));
    const auto all = merged<core::log_sum_exp_and_moments>(z, b, shards);
    CHECK(close(all.shift + core::log(all.term[0]), log_sum));
    CHECK(close(core::fma(all.term[2], all.shift, all.term[1]), weighted));
    CHECK(close(all.term[2], of_b));
    CHECK(close(all.term[3] / all.term[0] + all.shift, entropy / exponentials + 340));
    const auto mean = merged<core::log_sum_exp_and_mean>(z, b, shards);
    CHECK(close(mean.term[1] / mean.term[0], mean_b / exponentials));

    std::vector<double> finite = z;
    std::replace(finite.begin(), finite.end(), -std::numeric_limits<double>::infinity(), 0.0);
    long double sum = 0, squares = 0;
    for (const double x : finite)
      sum += x;
    for (const double x : finite)
      squares += (x - sum / n) * (x - sum / n);
    const auto m = merged<core::moments>(finite, b, shards);
    CHECK(close(m.term[0], n));
    CHECK(close(m.shift + m.term[1] / m.term[0], sum / n));
    CHECK(close(m.term[2] - m.term[1] * m.term[1] / m.term[0], squares));
  }
}

TEST_CASE("statistics: a shard of masked classes changes nothing", "[statistics]") {
  namespace core = perdita::core;
  const std::vector<double> masked(5, -std::numeric_limits<double>::infinity()), b(5, 0.0);
  const std::vector<double> z{1, 2, 3, -4, 0.5};
  const auto some = summarise<core::log_sum_exp>(z, b, 0, 5);
  const auto none = summarise<core::log_sum_exp>(masked, b, 0, 5);
  for (const auto& both : {core::merge(some, none), core::merge(none, some)}) {
    CHECK(core::first_lane(both.shift) == core::first_lane(some.shift));
    CHECK(core::first_lane(both.term[0]) == core::first_lane(some.term[0]));
  }
  const auto still_none = core::merge(none, none);
  CHECK(core::first_lane(still_none.term[0]) == 0);
}

TEMPLATE_TEST_CASE("statistics: the maximum and its place, whole and in shards", "[statistics]",
                   float, double) {
  namespace core = perdita::core;
  const TestType inf = std::numeric_limits<TestType>::infinity(),
                 nan = std::numeric_limits<TestType>::quiet_NaN();
  random_numbers random(7);
  for (const index n : {1, 2, 7, 8, 15, 16, 17, 31, 40, 513}) {
    std::vector<TestType> x(static_cast<std::size_t>(n));
    for (int trial = 0; trial < 40; ++trial) {
      for (TestType& v : x) { // few values, so that there are ties
        const auto k = random.below(12);
        v = k == 0 ? -inf : k == 1 && trial % 2 ? nan : static_cast<TestType>(k) - 6;
      }
      core::maximum<TestType> right;
      for (index i = 0; i < n; ++i)
        if (x[static_cast<std::size_t>(i)] > right.value)
          right = {x[static_cast<std::size_t>(i)], i};
      for (const index cut : {index{0}, n / 3, n}) {
        const auto got = core::merge(core::find_maximum(x.data(), cut),
                                     core::find_maximum(x.data() + cut, n - cut, cut));
        CHECK(got.value == right.value);
        CHECK(got.at == right.at);
      }
    }
  }
}

} // namespace perdita_tests
