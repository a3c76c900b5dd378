// SPDX-License-Identifier: MIT

// softmax, log_softmax and their backward against wide arithmetic.

#include <perdita/softmax.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/softmax_reference.hpp"

namespace perdita_tests {
namespace {

template <class T>
using row_major = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T> using column_major = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;

/// In epsilons: of a probability, of a log-probability; the condition terms come on top.
constexpr double budget = 4;

template <class T> row_major<T> make_rows(index cols, bool masks) {
  random_numbers random(static_cast<std::uint64_t>(cols));
  std::vector<row_kind> kinds;
  for (int k = 0; k < static_cast<int>(row_kind::count); ++k)
    if (masks || static_cast<row_kind>(k) != row_kind::masked)
      kinds.push_back(static_cast<row_kind>(k));
  row_major<T> x(static_cast<index>(kinds.size()), cols);
  for (index r = 0; r < x.rows(); ++r) {
    const auto label = static_cast<index>(random.below(static_cast<std::uint64_t>(cols)));
    const auto scores = make_scores(kinds[static_cast<std::size_t>(r)], cols, label, random);
    for (index c = 0; c < cols; ++c)
      x(r, c) = static_cast<T>(scores[static_cast<std::size_t>(c)]);
  }
  return x;
}
template <class M> softmax_row exact(const M& x, index r) {
  std::vector<wide> z;
  for (index c = 0; c < x.cols(); ++c)
    z.push_back(x(r, c));
  return softmax_row(z);
}
template <class A, class B> bool same_bits(const A& a, const B& b) {
  bool same = a.rows() == b.rows() && a.cols() == b.cols();
  for (index r = 0; same && r < a.rows(); ++r)
    for (index c = 0; c < a.cols(); ++c)
      same = same && (a(r, c) == b(r, c) || (a(r, c) != a(r, c) && b(r, c) != b(r, c)));
  return same;
}

} // namespace

TEMPLATE_TEST_CASE("softmax: values of every kind of row", "[softmax]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon(), smallest = std::numeric_limits<T>::min();
  const wide negligible = ldexp(wide(1), sizeof(T) == 4 ? -99 : -990);
  std::size_t compared = 0, wrong = 0;
  std::string worst;
  error_judge of_p, of_log;
  for (const index cols : {1, 2, 3, 17, 100, 700}) {
    const row_major<T> x = make_rows<T>(cols, true);
    row_major<T> p(x.rows(), cols), log_p(x.rows(), cols);
    perdita::softmax(x, p);
    perdita::log_softmax(x, log_p);
    for (index r = 0; r < x.rows(); ++r) {
      const softmax_row s = exact(x, r);
      const auto top = static_cast<index>(s.top);
      for (index c = 0; c < cols; ++c) {
        const auto j = static_cast<std::size_t>(c);
        const wide behind = s.z[j] > -infinity() ? wide(s.z[s.top] - s.z[j]) : wide(0);
        // Where one class leads, the others are shares of the rivals: the mean distance counts too.
        const wide condition = budget + behind + size_of(s.excess) + (cols > 512 ? 16 : 0) +
                               (sizeof(T) == 8 ? behind : wide(0));
        const wide allowed = s.p(j) * condition * epsilon + negligible + smallest;
        const bool p_right = of_p.within(size_of(wide(p(r, c)) - s.p(j)), 1, allowed);
        bool log_right = false;
        if (s.z[j] == -infinity())
          log_right = log_p(r, c) == -std::numeric_limits<T>::infinity();
        else
          log_right =
              of_log.within(size_of(wide(log_p(r, c)) + s.surprise(j)), 1,
                            (c == top ? wide(s.excess * (budget + size_of(log(s.rest + smallest))))
                                      : wide((behind + s.excess) * budget)) *
                                    epsilon +
                                negligible + smallest);
        compared += 2;
        if (!p_right || !log_right) {
          ++wrong;
          worst = std::to_string(cols) + " columns, row " + std::to_string(r) + ", column " +
                  std::to_string(c) + ": p " + perdita::core::to_text(p(r, c)) + " for " +
                  text(s.p(j)) + ", log p " + perdita::core::to_text(log_p(r, c)) + " for " +
                  text(wide(-s.surprise(j)));
        }
      }
    }
    // Other layouts, and over the scores: the same bits.
    const column_major<T> columns = x;
    column_major<T> p_columns(x.rows(), cols), log_columns(x.rows(), cols);
    perdita::softmax(columns, p_columns);
    perdita::log_softmax(columns, log_columns);
    CHECK(same_bits(p, p_columns));
    CHECK(same_bits(log_p, log_columns));
    row_major<T> over = x;
    perdita::softmax(over, over);
    CHECK(same_bits(p, over));
    over = x;
    perdita::log_softmax(over, over);
    CHECK(same_bits(log_p, over));
    column_major<T> over_columns = x;
    perdita::log_softmax(over_columns, over_columns);
    CHECK(same_bits(log_p, over_columns));
  }
  report_accuracy<T>("softmax", "", in_allowances, {of_p.share(), -1, of_p.share()});
  report_accuracy<T>("log_softmax", "", in_allowances, {of_log.share(), -1, of_log.share()});
  INFO(wrong << " of " << compared << " wrong, the last one: " << worst);
  CHECK(wrong == 0);
  CHECK(compared > 10000);
}

TEMPLATE_TEST_CASE("softmax: backward", "[softmax]", float, double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon(), smallest = std::numeric_limits<T>::min();
  std::size_t compared = 0, wrong = 0;
  std::string worst;
  error_judge of_p, of_log;
  for (const index cols : {1, 2, 3, 17, 100, 700}) {
    const row_major<T> x = make_rows<T>(cols, true);
    random_numbers random(4);
    row_major<T> d(x.rows(), cols), p = d, log_p = d, from_p = d, from_log = d;
    for (index r = 0; r < x.rows(); ++r)
      for (index c = 0; c < cols; ++c)
        d(r, c) = static_cast<T>(random.uniform(-2, 2));
    perdita::softmax(x, p);
    perdita::log_softmax(x, log_p);
    perdita::softmax_backward(p, d, from_p);
    perdita::log_softmax_backward(log_p, d, from_log);
    for (index r = 0; r < x.rows(); ++r) {
      wide mean = 0, size = 0, sum = 0, sum_size = 0;
      for (index c = 0; c < cols; ++c) {
        mean += wide(p(r, c)) * wide(d(r, c));
        size += wide(p(r, c)) * size_of(wide(d(r, c)));
        sum += wide(d(r, c));
        sum_size += size_of(wide(d(r, c)));
      }
      for (index c = 0; c < cols; ++c) {
        // From the maps' own outputs, which are what the functions are given.
        const wide pj = p(r, c), lj = log_p(r, c), dj = d(r, c);
        const wide first = pj * (dj - mean);
        const wide share =
            log_p(r, c) == -std::numeric_limits<T>::infinity() ? wide(0) : wide(exp(lj));
        const wide second = dj - share * sum;
        const bool right =
            of_p.within(size_of(wide(from_p(r, c)) - first), 1,
                        pj * (size_of(dj) + size) * budget * 2 * epsilon + smallest) &&
            of_log.within(size_of(wide(from_log(r, c)) - second), 1,
                          (size_of(dj) + share * sum_size) * budget * 2 * epsilon + smallest);
        ++compared;
        if (!right) {
          ++wrong;
          worst = std::to_string(cols) + " columns, row " + std::to_string(r) + ", column " +
                  std::to_string(c) + ": " + perdita::core::to_text(from_p(r, c)) + " for " +
                  text(first) + ", of the logarithm " + perdita::core::to_text(from_log(r, c)) +
                  " for " + text(second);
        }
      }
    }
    const column_major<T> p_columns = p, log_columns = log_p, d_columns = d;
    column_major<T> across(x.rows(), cols);
    perdita::softmax_backward(p_columns, d_columns, across);
    CHECK(same_bits(from_p, across));
    perdita::log_softmax_backward(log_columns, d_columns, across);
    CHECK(same_bits(from_log, across));
    row_major<T> over = p;
    perdita::softmax_backward(over, d, over);
    CHECK(same_bits(from_p, over));
  }
  report_accuracy<T>("softmax", "", in_allowances, {-1, of_p.share(), of_p.share()});
  report_accuracy<T>("log_softmax", "", in_allowances, {-1, of_log.share(), of_log.share()});
  INFO(wrong << " of " << compared << " wrong, the last one: " << worst);
  CHECK(wrong == 0);
  CHECK(compared > 5000);
}

TEMPLATE_TEST_CASE("softmax: special rows", "[softmax]", float, double) {
  using T = TestType;
  const T inf = std::numeric_limits<T>::infinity(), n = std::numeric_limits<T>::quiet_NaN();
  row_major<T> x(6, 3), p(6, 3), log_p(6, 3), right_p(6, 3), right_log(6, 3);
  const T log2 = static_cast<T>(std::log(2.0));
  x << 0, -inf, 0, -inf, -inf, -inf, 0, n, 1, 0, inf, 1, -inf, 4, -inf, inf, inf, 0;
  right_p << T(0.5), 0, T(0.5), 0, 0, 0, n, n, n, 0, 1, 0, 0, 1, 0, n, n, n;
  right_log << -log2, -inf, -log2, -inf, -inf, -inf, n, n, n, -inf, 0, -inf, -inf, 0, -inf, n, n, n;
  const auto close = [&](const row_major<T>& got, const row_major<T>& right) {
    for (index r = 0; r < 6; ++r)
      for (index c = 0; c < 3; ++c) {
        INFO("row " << r << ", column " << c << ": " << got(r, c) << " for " << right(r, c));
        const bool ok = got(r, c) == right(r, c) ||
                        (got(r, c) != got(r, c) && right(r, c) != right(r, c)) ||
                        std::abs(got(r, c) - right(r, c)) <= std::numeric_limits<T>::epsilon();
        CHECK(ok);
      }
  };
  perdita::softmax(x, p);
  close(p, right_p);
  perdita::log_softmax(x, log_p);
  close(log_p, right_log);
}

TEST_CASE("softmax: null pointers to something", "[softmax]") {
  using Catch::Matchers::ContainsSubstring;
  const row_major<float> x = row_major<float>::Zero(3, 4);
  row_major<float> y(3, 4);
  const perdita::matrix_view<const float> no_scores(nullptr, 3, 4);
  const perdita::matrix_view<float> no_result(nullptr, 3, 4);
  CHECK_THROWS_WITH(perdita::softmax(no_scores, y), ContainsSubstring("softmax: scores is null"));
  CHECK_THROWS_WITH(perdita::log_softmax(x, no_result), ContainsSubstring("result is null"));
  CHECK_THROWS_WITH(perdita::softmax_backward(x, no_scores, y),
                    ContainsSubstring("softmax_backward: gradient is null"));
}

TEST_CASE("softmax: shapes are checked", "[softmax]") {
  const row_major<float> x = row_major<float>::Zero(3, 4);
  row_major<float> wrong = row_major<float>::Constant(3, 5, 7), right(3, 4);
  CHECK_THROWS_AS(perdita::softmax(x, wrong), std::invalid_argument);
  CHECK_THROWS_AS(perdita::log_softmax(x, wrong), std::invalid_argument);
  CHECK_THROWS_AS(perdita::softmax_backward(x, x, wrong), std::invalid_argument);
  CHECK_THROWS_AS(perdita::softmax_backward(x, wrong, right), std::invalid_argument);
  CHECK((wrong.array() == 7).all());
  const row_major<float> nothing(0, 4), thin(3, 0);
  row_major<float> no_rows(0, 4), no_columns(3, 0);
  CHECK_NOTHROW(perdita::softmax(nothing, no_rows));
  CHECK_THROWS_AS(perdita::softmax(thin, no_columns), std::invalid_argument);
}

} // namespace perdita_tests
