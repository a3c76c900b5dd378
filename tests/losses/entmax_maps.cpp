// SPDX-License-Identifier: MIT

// sparsemax, entmax15, entmax, budget_map and their Jacobian products against wide arithmetic.

#include <perdita/budget_map.hpp>
#include <perdita/entmax.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/map_rows.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

constexpr double alphas[] = {1.25, 1.5, 2, 3};

template <class X, class Y>
void map(double alpha, X&& x, Y&& y, perdita::vector_view<index> support = {},
         const perdita::executor& run_on = {}) {
  if (alpha == 2)
    perdita::sparsemax(x, y, {.support = support, .run_on = run_on});
  else if (alpha == 1.5)
    perdita::entmax15(x, y, {.support = support, .run_on = run_on});
  else
    perdita::entmax(x, y, {.alpha = alpha, .support = support, .run_on = run_on});
}
template <class P, class D, class Y> void backward(double alpha, P&& p, D&& d, Y&& y) {
  if (alpha == 2)
    perdita::sparsemax_backward(p, d, y);
  else if (alpha == 1.5)
    perdita::entmax15_backward(p, d, y);
  else
    perdita::entmax_backward(p, d, y, {.alpha = alpha});
}

const char* name_of(double alpha) {
  return alpha == 2 ? "sparsemax" : alpha == 1.5 ? "entmax15" : "entmax";
}

/// b^{1/(α−1)} for the α of these tests, 0 for b ≤ 0.
wide power(double alpha, const wide& b) {
  if (b <= 0)
    return 0;
  return alpha == 1.25  ? wide(b * b * b * b)
         : alpha == 1.5 ? wide(b * b)
         : alpha == 2   ? b
                        : sqrt(b);
}

/// base = (α−1) x − τ and p of a row: by sorting for α = 3/2 and 2, else by steps.
struct exact_map {
  std::vector<wide> base, p;

  exact_map(double alpha, const std::vector<wide>& x) {
    const wide a = alpha - 1;
    std::vector<wide> z;
    for (const wide& s : x)
      if (s > -infinity())
        z.push_back(s);
    std::sort(z.begin(), z.end(), std::greater<>());
    const wide top = z.empty() ? wide(0) : z[0];
    for (wide& s : z)
      s = a * (s - top);
    const wide threshold = alpha == 2 || alpha == 1.5 ? by_sorting(alpha, z) : by_steps(alpha, z);
    for (const wide& s : x) {
      base.push_back(s == -infinity() ? wide(-1) : wide(a * (s - top) - threshold));
      p.push_back(power(alpha, base.back()));
    }
  }

private:
  static wide by_sorting(double alpha, const std::vector<wide>& z) {
    wide sum = 0, squares = 0, threshold = 0;
    for (std::size_t k = 1; k <= z.size(); ++k) {
      sum += z[k - 1];
      squares += z[k - 1] * z[k - 1];
      const wide n = static_cast<double>(k), mean = sum / n;
      const wide spread = n * (squares / n - mean * mean);
      const wide t =
          alpha == 2 ? wide((sum - 1) / n) : wide(mean - sqrt(larger(0, (1 - spread) / n)));
      if (t > z[k - 1])
        break;
      threshold = t;
    }
    return threshold;
  }
  /// Newton's, or halves where those leave the bracket. Σ p falls at least half as fast as τ rises:
  /// τ is off by no more than twice what Σ p is.
  static wide by_steps(double alpha, const std::vector<wide>& z) {
    const wide exponent = 1 / (alpha - 1);
    wide low = -1, high = 0, t = low;
    while (high - low > ldexp(wide(1), -112)) {
      wide excess = -1, slope = 0;
      for (const wide& s : z) {
        if (s <= t)
          break;
        const wide share = power(alpha, s - t);
        excess += share;
        slope += exponent * share / (s - t);
      }
      if (size_of(excess) <= ldexp(wide(1), -100))
        return t;
      (excess > 0 ? low : high) = t;
      const wide newton = t + excess / slope;
      t = newton > low && newton < high ? newton : wide((low + high) / 2);
    }
    return low;
  }
};

/// How far p may be off: by 2 epsilons of its base (in double where the map computes in that) and 2
/// of itself.
template <class T> wide allowance(double alpha, const wide& base) {
  const wide epsilon = std::numeric_limits<T>::epsilon();
  const bool in_double = alpha != 1.5 && alpha != 2;
  const wide error = 2 * (in_double ? wide(std::numeric_limits<double>::epsilon()) : epsilon);
  return power(alpha, base + error) - power(alpha, base - error) +
         2 * epsilon * power(alpha, base) + std::numeric_limits<T>::min();
}

} // namespace

TEMPLATE_TEST_CASE("simplex maps: values of every kind of row", "[entmax_maps]", float, double) {
  using T = TestType;
  std::size_t compared = 0, wrong = 0;
  std::string last;
  for (const double alpha : alphas) {
    error_judge errors;
    for (const index cols : {1, 2, 3, 17, 100, 700}) {
      const row_major<T> x = make_rows<T>(cols);
      row_major<T> p(x.rows(), cols);
      std::vector<index> support(static_cast<std::size_t>(x.rows()), -1);
      map(alpha, x, p, support);
      for (index r = 0; r < x.rows(); ++r) {
        const exact_map e(alpha, row_of(x, r));
        const wide fine = 8 * std::numeric_limits<double>::epsilon();
        index least = 0, most = 0;
        for (index c = 0; c < cols; ++c) {
          const auto j = static_cast<std::size_t>(c);
          const wide allowed = allowance<T>(alpha, e.base[j]);
          const wide error = size_of(wide(p(r, c)) - e.p[j]);
          const bool outside = e.base[j] < -1e-5;
          least += e.base[j] > fine;
          most += e.base[j] > -fine;
          ++compared;
          if (!errors.within(error, 1, allowed) || (outside && p(r, c) != 0)) {
            ++wrong;
            last = "alpha " + perdita::core::to_text(alpha) + ", " + std::to_string(cols) +
                   " columns, row " + std::to_string(r) + ", column " + std::to_string(c) + ": " +
                   perdita::core::to_text(p(r, c)) + " for " + text(e.p[j]);
          }
        }
        const index got = support[static_cast<std::size_t>(r)];
        INFO("alpha " << alpha << ", " << cols << " columns, row " << r << ": support " << got);
        CHECK((got >= least && got <= most));
      }
      // Other layouts, over the scores, and by threads: the same bits.
      const column_major<T> columns = x;
      column_major<T> p_columns(x.rows(), cols);
      map(alpha, columns, p_columns);
      CHECK(same_bits(p, p_columns));
      row_major<T> over = x;
      map(alpha, over, over);
      CHECK(same_bits(p, over));
      column_major<T> over_columns = x;
      map(alpha, over_columns, over_columns);
      CHECK(same_bits(p, over_columns));
      row_major<T> serial(x.rows(), cols);
      map(alpha, x, serial, {}, perdita::serial);
      CHECK(same_bits(p, serial));
    }
    report_accuracy<T>(name_of(alpha), "", in_allowances, {errors.share(), -1, errors.share()});
  }
  INFO(wrong << " of " << compared << " wrong, the last: " << last);
  CHECK(wrong == 0);
  CHECK(compared > 50000);
}

TEMPLATE_TEST_CASE("simplex maps: backward", "[entmax_maps]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  std::size_t compared = 0, wrong = 0;
  std::string last;
  for (const double alpha : alphas) {
    error_judge errors;
    for (const index cols : {1, 2, 3, 17, 100, 700}) {
      const row_major<T> x = make_rows<T>(cols);
      random_numbers random(4);
      row_major<T> d(x.rows(), cols), p = d, got = d;
      for (index r = 0; r < x.rows(); ++r)
        for (index c = 0; c < cols; ++c)
          d(r, c) = static_cast<T>(random.uniform(-2, 2));
      map(alpha, x, p);
      backward(alpha, p, d, got);
      for (index r = 0; r < x.rows(); ++r) {
        wide sum = 0, product = 0, size = 0;
        std::vector<wide> s;
        for (index c = 0; c < cols; ++c) {
          const wide pj = p(r, c);
          s.push_back(pj > 0 ? pow(pj, wide(2 - alpha)) : wide(0));
          sum += s.back();
          product += s.back() * wide(d(r, c));
          size += s.back() * size_of(wide(d(r, c)));
        }
        for (index c = 0; c < cols; ++c) {
          const wide sj = s[static_cast<std::size_t>(c)], dj = d(r, c);
          const wide expected = sj * (dj - product / sum);
          ++compared;
          if (!errors.within(size_of(wide(got(r, c)) - expected), 8,
                             epsilon * sj * (size_of(dj) + size / sum))) {
            ++wrong;
            last = "alpha " + perdita::core::to_text(alpha) + ", " + std::to_string(cols) +
                   " columns, row " + std::to_string(r) + ", column " + std::to_string(c) + ": " +
                   perdita::core::to_text(got(r, c)) + " for " + text(expected);
          }
        }
      }
      const column_major<T> p_columns = p, d_columns = d;
      column_major<T> across(x.rows(), cols);
      backward(alpha, p_columns, d_columns, across);
      CHECK(same_bits(got, across));
      row_major<T> over = p;
      backward(alpha, over, d, over);
      CHECK(same_bits(got, over));
    }
    report_accuracy<T>(name_of(alpha), "", in_allowances, {-1, errors.share(), errors.share()});
  }
  INFO(wrong << " of " << compared << " wrong, the last one: " << last);
  CHECK(wrong == 0);
  CHECK(compared > 50000);
}

TEST_CASE("simplex maps: backward is the transposed Jacobian", "[entmax_maps]") {
  random_numbers random(9);
  const index cols = 6;
  std::size_t moved = 0;
  for (const double alpha : alphas)
    for (int trial = 0; trial < 10; ++trial) {
      row_major<double> x(1, cols), d(1, cols), p(1, cols), got(1, cols);
      for (index c = 0; c < cols; ++c) {
        x(0, c) = random.uniform(-0.5, 0.5) / (alpha - 1);
        d(0, c) = random.uniform(-2, 2);
      }
      map(alpha, x, p);
      backward(alpha, p, d, got);
      for (index c = 0; c < cols; ++c) {
        const wide h = ldexp(wide(1), -40);
        wide difference = 0;
        for (const int sign : {-1, 1}) {
          std::vector<wide> z = row_of(x, 0);
          z[static_cast<std::size_t>(c)] += sign * h;
          const exact_map e(alpha, z);
          for (index k = 0; k < cols; ++k)
            difference += sign * wide(d(0, k)) * e.p[static_cast<std::size_t>(k)];
        }
        const double expected = static_cast<double>(wide(difference / (2 * h)));
        INFO("alpha " << alpha << ", trial " << trial << ", column " << c);
        CHECK(std::abs(got(0, c) - expected) <= 1e-12 * (1 + std::abs(expected)));
        moved += expected != 0;
      }
    }
  CHECK(moved > 100);
}

TEMPLATE_TEST_CASE("simplex maps: known values", "[entmax_maps]", float, double) {
  using T = TestType;
  const auto check = [](double alpha, std::vector<T> scores, std::vector<double> expected,
                        double error) {
    const auto n = static_cast<index>(scores.size());
    std::vector<T> p(scores.size());
    const perdita::matrix_view<const T> x(scores.data(), 1, n);
    std::vector<index> support(1, -1);
    map(alpha, x, perdita::matrix_view<T>(p.data(), 1, n), support);
    CHECK(support[0] == std::count_if(expected.begin(), expected.end(), [](double share) {
            return share > 0; // none is where they are NaN
          }));
    for (std::size_t k = 0; k < p.size(); ++k) {
      INFO("alpha " << alpha << ", class " << k << ": " << p[k] << " for " << expected[k]);
      const bool right =
          expected[k] != expected[k]
              ? p[k] != p[k]
              : std::abs(static_cast<double>(p[k]) - expected[k]) <= (expected[k] == 0 ? 0 : error);
      CHECK(right);
    }
  };
  const double golden = std::max<double>(1e-9, 2 * std::numeric_limits<T>::epsilon());
  check(2, {-2, 0, T(0.5)}, {0, 0.25, 0.75}, 0);
  check(1.5, {-2, 0, T(0.5)}, {0, 0.3260, 0.6740}, 5e-5);
  check(1.5, {T(0.5), T(-1.2), 2, T(0.1)}, {0.0502808757, 0, 0.9491318387, 0.0005872855615},
        golden);
  check(2, {T(0.5), T(-1.2), 2, T(0.1)}, {0, 0, 1, 0}, 0);
  check(1.25, {T(0.5), T(-1.2), 2, T(0.1)},
        {0.1133937818, 0.0005815769594, 0.8328107617, 0.0532138796}, golden);
  const T inf = std::numeric_limits<T>::infinity();
  const double n = std::numeric_limits<double>::quiet_NaN();
  for (const double alpha : {1.01, 1.25, 1.5, 2., 3., 1000.}) {
    const T margin = static_cast<T>(1 / (alpha - 1));
    check(alpha, {5}, {1}, 0);
    check(alpha, {7, 7, 7, 7}, {0.25, 0.25, 0.25, 0.25}, golden / 4);
    check(alpha, {0, -inf, 0}, {0.5, 0, 0.5}, golden / 4);
    check(alpha, {-inf, 5, -inf}, {0, 1, 0}, 0);
    check(alpha, {-inf, -inf}, {0, 0}, 0);
    check(alpha, {0, T(n), 1}, {n, n, n}, 0);
    check(alpha, {0, inf, 1}, {n, n, n}, 0);
    check(alpha, {-2 * margin, 0, -3 * margin}, {0, 1, 0}, 0);
  }
  for (const double alpha : {1.25, 1.5, 2., 3.}) { // 1/(α−1) is a number of the type
    const T margin = static_cast<T>(1 / (alpha - 1));
    check(alpha, {-margin, 0, -margin}, {0, 1, 0}, 0);
  }
  check(1 + 1e-9, {0, 1}, {1 / (1 + std::exp(1.)), std::exp(1.) / (1 + std::exp(1.))}, golden);
  // p^−3 is no number: beside what counts instead, the others are nothing.
  const row_major<T> p{{1, static_cast<T>(sizeof(T) == 4 ? 1e-20 : 1e-200)}}, d{{1, 2}};
  row_major<T> slopes(1, 2);
  perdita::entmax_backward(p, d, slopes, {.alpha = 5});
  CHECK(std::abs(slopes(0, 0) + 1) <= std::numeric_limits<T>::epsilon());
  CHECK(std::isfinite(slopes(0, 1)));
}

TEMPLATE_TEST_CASE("budget_map: values and backward", "[entmax_maps]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  std::size_t wrong = 0, compared = 0;
  error_judge of_map, of_slopes;
  std::string last;
  for (const double budget : {0.25, 1., 2., 2.5, 40.})
    for (const index cols : {1, 2, 3, 17, 100, 700}) {
      const row_major<T> x = make_rows<T>(cols);
      random_numbers random(5);
      row_major<T> p(x.rows(), cols), d = p, back = p;
      for (index r = 0; r < x.rows(); ++r)
        for (index c = 0; c < cols; ++c)
          d(r, c) = static_cast<T>(random.uniform(-2, 2));
      std::vector<index> support(static_cast<std::size_t>(x.rows()), -1);
      perdita::budget_map(x, p, {.budget = budget, .support = support});
      perdita::budget_map_backward(p, d, back);
      for (index r = 0; r < x.rows(); ++r) {
        const std::vector<wide> z = row_of(x, r);
        // τ by Newton's steps and, every fourth or where they leave the bracket, by halves of that;
        // down to where all are 1. The sum falls as it rises, in straight pieces.
        wide low = 0, high = -infinity(), finite = 0;
        const auto clipped = [](const wide& s, const wide& t) {
          return s == -infinity() ? wide(0) : larger(0, smaller(1, s - t));
        };
        for (const wide& s : z)
          if (s > -infinity())
            low = smaller(low, s - 1), high = larger(high, s), finite += 1;
        wide t = (low + high) / 2;
        for (int step = 1; budget < finite && high - low > 1e-24 && t > low && t < high; ++step) {
          wide sum = 0, inside = 0;
          for (const wide& s : z)
            if (s > t) {
              sum += smaller(1, s - t);
              inside += s - t < 1 ? 1 : 0;
            }
          (sum >= budget ? low : high) = t;
          if (size_of(wide(sum - budget)) <= 1e-27) {
            low = t;
            break;
          }
          const wide newton = t + (sum - budget) / inside;
          t = step % 4 != 0 && newton > low && newton < high ? newton : wide((low + high) / 2);
        }
        wide count = 0, mean = 0;
        index positive = 0;
        for (index c = 0; c < cols; ++c) {
          positive += p(r, c) > 0;
          if (p(r, c) > 0 && p(r, c) < 1)
            count += 1, mean += wide(d(r, c));
        }
        mean = count > 0 ? wide(mean / count) : wide(0);
        for (index c = 0; c < cols; ++c) {
          const wide expected = clipped(z[static_cast<std::size_t>(c)], low);
          const bool inside = p(r, c) > 0 && p(r, c) < 1;
          const wide slope = inside ? wide(wide(d(r, c)) - mean) : wide(0);
          ++compared;
          const wide rounded = size_of(low) * 0x1p-106; // τ here
          const bool right =
              of_map.within(size_of(wide(p(r, c)) - expected), 1, 2 * epsilon + rounded) &&
              of_slopes.within(size_of(wide(back(r, c)) - slope), 8, epsilon);
          if (!right) {
            ++wrong;
            last = "budget " + perdita::core::to_text(budget) + ", " + std::to_string(cols) +
                   " columns, row " + std::to_string(r) + ", column " + std::to_string(c) + ": " +
                   perdita::core::to_text(p(r, c)) + " for " + text(expected) + ", slope " +
                   perdita::core::to_text(back(r, c)) + " for " + text(slope);
          }
        }
        // Of a class at the threshold, rounding decides.
        CHECK(std::abs(support[static_cast<std::size_t>(r)] - positive) <= 1);
      }
      row_major<T> over = x;
      perdita::budget_map(over, over, {.budget = budget});
      CHECK(same_bits(p, over));
    }
  report_accuracy<T>(
      "budget_map", "", in_allowances,
      {of_map.share(), of_slopes.share(), std::max(of_map.share(), of_slopes.share())});
  INFO(wrong << " of " << compared << " wrong, the last one: " << last);
  CHECK(wrong == 0);
  CHECK(compared > 50000);
}

TEST_CASE("budget_map: known values", "[entmax_maps]") {
  constexpr double inf = std::numeric_limits<double>::infinity();
  constexpr double n = std::numeric_limits<double>::quiet_NaN();
  const auto check = [](double budget, std::vector<double> x, std::vector<double> expected) {
    std::vector<double> p(x.size());
    const auto cols = static_cast<index>(x.size());
    perdita::budget_map(perdita::matrix_view<const double>(x.data(), 1, cols),
                        perdita::matrix_view<double>(p.data(), 1, cols), {.budget = budget});
    for (std::size_t k = 0; k < p.size(); ++k) {
      INFO("budget " << budget << ", class " << k << ": " << p[k] << " for " << expected[k]);
      CHECK((p[k] == expected[k] || (p[k] != p[k] && expected[k] != expected[k])));
    }
  };
  check(2, {-2, 0, 0.5}, {0, 1, 1});
  check(1, {-2, 0, 0.5}, {0, 0.25, 0.75});
  check(2, {0, 0, 0, 0}, {0.5, 0.5, 0.5, 0.5});
  check(3, {1, 2, 3}, {1, 1, 1});
  check(5, {1, -inf, 3}, {1, 0, 1});
  check(1, {-inf, -inf}, {0, 0});
  check(1, {0, n, 3}, {n, n, n});
  check(2, {0, inf, 3}, {n, n, n});
  std::vector<double> p(2);
  const perdita::matrix_view<double> out(p.data(), 1, 2);
  const double most = std::numeric_limits<double>::max();
  check(2, {-most, 1}, {1, 1});
  check(3, {-most, -inf, most}, {1, 0, 1});
  check(1, {-most, most / 2}, {0, 1});
  check(2, {-most / 2, most / 2, 1, most}, {0, 1, 0, 1});
  for (const double budget : {0., -1., inf, n})
    CHECK_THROWS_AS(perdita::budget_map(out, out, {.budget = budget}), std::invalid_argument);
}

// Multiples of 1/4, so that everything is exact.
TEMPLATE_TEST_CASE("budget_map: where scores are large", "[entmax_maps]", float, double) {
  using T = TestType;
  const T masked = -std::numeric_limits<T>::infinity(), most = std::numeric_limits<T>::max();
  const auto check = [](double budget, std::vector<T> x, std::vector<T> expected) {
    for (int order = 0; order < 2; ++order) {
      std::vector<T> p(x.size(), 7);
      std::vector<index> support{-1};
      const auto cols = static_cast<index>(x.size());
      perdita::budget_map(perdita::matrix_view<const T>(x.data(), 1, cols),
                          perdita::matrix_view<T>(p.data(), 1, cols),
                          {.budget = budget, .support = support});
      INFO("budget " << budget << ", " << cols << " classes, the first " << x[0]);
      CHECK(std::equal(p.begin(), p.end(), expected.begin()));
      CHECK(support[0] ==
            std::count_if(expected.begin(), expected.end(), [](T z) { return z > 0; }));
      std::reverse(x.begin(), x.end());
      std::reverse(expected.begin(), expected.end());
    }
  };
  for (const T large : {T(1e12), T(1e17), T(3e38), most}) {
    check(1, {large, large, 0}, {0.5, 0.5, 0});
    check(1.5, {large, large, 0}, {0.75, 0.75, 0});
    check(0.5, {-large, -large, masked}, {0.25, 0.25, 0});
    check(2.5, {large, -large, 0, 0}, {1, 0, 0.75, 0.75});
    check(2, {large, 5, 4.5, 4.25, -large}, {1, 0.75, 0.25, 0, 0});
    check(1, {large, 5, 4.5, 4.25, -large}, {1, 0, 0, 0, 0});
    check(3, {large, large, 4, -large, -large, masked}, {1, 1, 1, 0, 0, 0});
    check(3.5, {large, large, 4, -large, -large, masked}, {1, 1, 1, 0.25, 0.25, 0});
    std::vector<T> x(900, -large), p(900);
    for (std::size_t k = 0; k < 100; ++k) {
      x[9 * k] = k < 90 ? large : T(-1);
      p[9 * k] = k < 90 ? T(1) : T(0.5);
    }
    check(95, x, p);
    std::fill(p.begin(), p.end(), T(0.25));
    for (std::size_t k = 0; k < 100; ++k)
      p[9 * k] = 1;
    check(300, x, p);
  }
}

TEST_CASE("simplex maps: arguments are checked", "[entmax_maps]") {
  const row_major<float> x = row_major<float>::Zero(3, 4);
  row_major<float> wrong = row_major<float>::Constant(3, 5, 7), right(3, 4);
  std::vector<index> two(2, -1);
  for (const double alpha : alphas) {
    CHECK_THROWS_AS(map(alpha, x, wrong), std::invalid_argument);
    CHECK_THROWS_AS(map(alpha, x, right, two), std::invalid_argument);
    CHECK_THROWS_AS(map(alpha, x, right, perdita::vector_view<index>(nullptr, 2)),
                    std::invalid_argument);
    CHECK_THROWS_AS(backward(alpha, x, x, wrong), std::invalid_argument);
    CHECK_THROWS_AS(backward(alpha, x, wrong, right), std::invalid_argument);
  }
  CHECK((wrong.array() == 7).all());
  CHECK(two == std::vector<index>(2, -1));
  for (const double alpha : {1., 0.5, -3., std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::quiet_NaN()}) {
    CHECK_THROWS_WITH(perdita::entmax(x, right, {.alpha = alpha}),
                      Catch::Matchers::ContainsSubstring("perdita::entmax: alpha is"));
    CHECK_THROWS_AS(perdita::entmax_backward(x, x, right, {.alpha = alpha}), std::invalid_argument);
  }
  const row_major<float> nothing(0, 4), thin(3, 0);
  row_major<float> no_rows(0, 4), no_columns(3, 0);
  CHECK_NOTHROW(perdita::entmax15(nothing, no_rows));
  CHECK_THROWS_AS(perdita::entmax15(thin, no_columns), std::invalid_argument);
}

} // namespace perdita_tests
