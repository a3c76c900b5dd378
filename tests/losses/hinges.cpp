// SPDX-License-Identifier: MIT

// Descriptors of the hinges that need whole rows: formula sheet 4.3 and 4.4.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <perdita/core/solved_row.hpp>
#include <perdita/ldr.hpp>
#include <perdita/top_k_hinge.hpp>
#include <perdita/weston_watkins.hpp>

#include "support/catch.hpp"
#include "support/margin_descriptor.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"

namespace perdita_tests {
namespace {

template <class T>
class weston_watkins_descriptor final : public margin_descriptor<T, perdita::weston_watkins<T>> {
public:
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    row_expectation e = nothing_reported();
    wide active = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide gap = row.scores[k] == -infinity()
                           ? -infinity()
                           : wide(row.scores[k] - row.scores[y] + this->margin(setting));
      const bool counts = k != y && gap > 0;
      e.value.value += counts ? gap : wide(0);
      // Each margin is rounded twice, and may be no longer above 0 then.
      e.value.allow(2 * (size_of(row.scores[k] - row.scores[y]) + this->margin(setting)));
      active += counts ? 1 : 0;
      e.gradient.push_back({counts ? wide(1) : wide(0), 0});
    }
    e.gradient[y] = {-active, 0};
    if (e.value.value == 0)
      e.value.slack = 0;
    return e;
  }
};

template <class T> class top_k_hinge_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "top_k_hinge"; }
  int settings() const override { return 6; }
  static constexpr int long_settings[] = {6, 7}; ///< k = 50: not for the battery's short rows
  static index most(int setting) {
    return setting < 6 ? std::vector<index>{1, 2, 5}[std::size_t(setting % 3)] : 50;
  }
  static double margin(int setting) { return setting < 3 || setting == 6 ? 1 : 0; }
  std::string describe(int setting) const override {
    return "k " + std::to_string(most(setting)) + ", margin " +
           perdita::core::to_text(margin(setting));
  }
  std::vector<int> few_settings() const override { return {1}; }
  bool legal(int setting, row_kind, index cols) const override { return cols >= most(setting); }
  std::unique_ptr<row_subject<T>> make(int setting, index cols,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::top_k_hinge<T>>>(
        perdita::top_k_hinge<T>({.k = std::min(cols, most(setting)),
                                 .margin = static_cast<T>(margin(setting)),
                                 .ignore_index = row_descriptor<T>::ignore_index,
                                 .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::top_k_hinge<T>::traits; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto y = static_cast<std::size_t>(row.label);
    std::vector<wide> gaps;
    wide size = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const bool masked = row.scores[k] == -infinity();
      gaps.push_back(masked   ? -infinity()
                     : k == y ? wide(0)
                              : wide(row.scores[k] - row.scores[y] + margin(setting)));
      if (!masked)
        size = larger(size, size_of(row.scores[k] - row.scores[y]));
    }
    std::vector<wide> sorted = gaps;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    auto k = static_cast<std::size_t>(most(setting));
    while (sorted[k - 1] == -infinity())
      --k;
    const wide count = static_cast<double>(k), edge = sorted[k - 1];
    wide above = 0, equal = 0, sum = 0;
    for (const wide& g : gaps) {
      above += g > edge ? 1 : 0;
      equal += g == edge ? 1 : 0;
    }
    for (std::size_t i = 0; i < k; ++i)
      sum += sorted[i];
    row_expectation e = nothing_reported();
    e.value = {sum / count, 3 * (size + margin(setting))};
    for (std::size_t c = 0; c < gaps.size(); ++c) {
      const wide share = gaps[c] > edge    ? wide(1 / count)
                         : gaps[c] == edge ? wide((count - above) / (count * equal))
                                           : wide(0);
      const wide slope = c == y ? wide(share - 1) : share;
      e.gradient.push_back({slope, 2 * size_of(slope)});
    }
    return e;
  }
};

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

/// Rows of multiples of 1/16, so that differences are exact: with many ties; in order either way;
/// the largest side by side; nearly all masked; all equal.
constexpr int long_kinds = 6;
template <class T> std::vector<T> long_row(int kind, index cols, random_numbers& random) {
  std::vector<T> x;
  for (index c = 0; c < cols; ++c) {
    const double z = std::round(16 * random.normal()) / 16, at = static_cast<double>(c) / 16;
    const double all[long_kinds] = {
        z, at, -at, c / 60 == cols / 120 ? 10 + z : z, random.below(100) == 0 ? z : -inf, 3};
    x.push_back(static_cast<T>(all[kind]));
  }
  return x;
}

} // namespace

TEMPLATE_TEST_CASE("weston_watkins: the row battery", "[hinges]", float, double) {
  check_row_loss(weston_watkins_descriptor<TestType>());
}
TEMPLATE_TEST_CASE("top_k_hinge: the row battery", "[hinges]", float, double) {
  check_row_loss(top_k_hinge_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("weston_watkins: special rows", "[hinges]", float, double) {
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"ties", 0, {7, 7, 7, 1}, 0, {}, 2, {-2, 1, 1, 0}},
      {"on the kink", 0, {8, 7, 7, 1}, 0, {}, 0, {0, 0, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0}, 1, {}, inf, {1, -2, 1}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, 0, {0, 0, 0}},
      {"+inf at the label", 0, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, inf, {-2, 1, 1}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN below", 0, {5, n, 1}, 0, {}, n, {n, n, n}},
      {"NaN at the label", 0, {5, n, 1}, 1, {}, n, {n, n, n}},
      {"appendix A", 0, {0.5, -1.2, 2, 0.1}, 0, {}, 3.1, {-2, 0, 1, 1}},
  };
  check_special(weston_watkins_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("top_k_hinge: special rows", "[hinges]", float, double) {
  const std::vector<special_row> rows{
      {"ties, k = 1", 0, {7, 7, 7, 1}, 0, {}, 1, {-1, 0.5, 0.5, 0}},
      {"k = 1 as Crammer and Singer", 0, {0.5, -1.2, 2, 0.1}, 0, {}, 2.5, {-1, 0, 1, 0}},
      {"k = 2", 1, {0.5, -1.2, 2, 0.1}, 0, {}, 1.55, {-1, 0, 0.5, 0.5}},
      {"k = 2, ties with the label", 4, {3, 3, 3, 1}, 0, {}, 0, {-2. / 3, 1. / 3, 1. / 3, 0}},
      {"k = 2, one left", 1, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"k = 5, four left", 2, {0, 1, -inf, 2, 3}, 3, {}, 0.25, {0.25, 0.25, 0, -0.75, 0.25}},
      {"label masked", 1, {1, -inf, 0}, 1, {}, inf, {0.5, -1, 0.5}},
      {"all masked", 1, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf elsewhere", 0, {0, inf, 1}, 0, {}, inf, {-1, 1, 0}},
      {"NaN", 1, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN at the label", 1, {0, 1, n}, 2, {}, n, {n, n, n}},
  };
  check_special(top_k_hinge_descriptor<TestType>(), rows, 8);
}

/// Two of which make a number that T does not have.
template <class T> constexpr double half_of_most = sizeof(T) == 4 ? 0x1p127 : 0x1p1023;

/// The rows as they are, and with so many masked classes that they are long.
std::vector<special_row> short_and_long(std::vector<special_row> rows) {
  for (std::size_t k = 0, count = rows.size(); k < count; ++k) {
    special_row row = rows[k];
    row.scores.resize(row.scores.size() + 40, -inf);
    row.gradient.resize(row.scores.size(), 0);
    rows.push_back(row);
  }
  return rows;
}

TEMPLATE_TEST_CASE("top_k_hinge: differences beyond T whose mean is not", "[hinges]", float,
                   double) {
  const double l = half_of_most<TestType>;
  const std::vector<special_row> rows{
      {"k = 2 of three", 1, {l, -l, 0}, 1, {}, 1.5 * l, {0.5, -1, 0.5}},
      {"k = 2 with the label", 1, {l, -l}, 1, {}, l, {0.5, -0.5}},
      {"k = 2 below the label", 1, {-l, l, -l}, 1, {}, -l, {0.25, -0.5, 0.25}},
      {"k = 2, ties", 1, {l, -l, l / 2, l / 2}, 1, {}, 1.75 * l, {0.5, -1, 0.25, 0.25}},
      {"k = 5", 2, {l, -l, l, 0, 0, -l}, 1, {}, 1.2 * l, {0.2, -1, 0.2, 0.2, 0.2, 0.2}},
      {"k = 5, label highest", 2, {-l, l, -l, -l, -l}, 1, {}, -1.6 * l, {0.2, -0.8, 0.2, 0.2, 0.2}},
  };
  check_special(top_k_hinge_descriptor<TestType>(), short_and_long(rows), 8);
}

// Their mean over the rows is.
TEST_CASE("weston_watkins: sums beyond float", "[hinges]") {
  const float l = 0x1p127F;
  for (const index cols : {3, 40}) {
    std::vector<float> x(static_cast<std::size_t>(4 * cols), static_cast<float>(-inf));
    std::vector<float> g(x.size(), 7), expected(x.size());
    for (std::size_t r = 0; r < 4; ++r) {
      const auto at = r * static_cast<std::size_t>(cols);
      x[at] = r == 0 ? -l : l;
      x[at + 1] = r == 0 ? l : 0;
      x[at + 2] = 0;
    }
    expected[0] = -0.5, expected[1] = expected[2] = 0.25;
    CHECK(perdita::weston_watkins<float>()(
              perdita::matrix_view<const float>(x.data(), 4, cols), std::vector<int>{0, 0, 0, 0},
              perdita::matrix_view<float>(g.data(), 4, cols)) == 0.75F * l);
    CHECK(g == expected);
  }
  // 40 of which each is a number
  std::vector<float> x(40, l / 8), g(40);
  std::vector<float> weight{0.125F};
  x[7] = 0;
  CHECK(perdita::weston_watkins<float>({.margin = 0, .reduction = perdita::reduction::sum})(
            perdita::matrix_view<const float>(x.data(), 1, 40), std::vector<int>{7},
            perdita::matrix_view<float>(g.data(), 1, 40), {.row_weights = weight}) == l / 64 * 39);
}

// What is above the k-th is found in parts of a long row: see rival_scores.
TEMPLATE_TEST_CASE("top_k_hinge: the 50 largest of thousands", "[hinges]", float, double) {
  using T = TestType;
  const top_k_hinge_descriptor<T> descriptor;
  for (int kind = 0; kind < long_kinds; ++kind)
    for (const index cols : {1024, 4099})
      for (const int setting : top_k_hinge_descriptor<T>::long_settings) {
        random_numbers random(9);
        std::vector<T> x = long_row<T>(kind, cols, random), g(x.size());
        auto sorted = x;
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        // Above, beside and below the 50th, and where it is.
        for (const T own :
             {sorted[10], sorted[48], sorted[49], T(sorted[49] - 1), sorted[2000 % x.size()]}) {
          const index y = random.below(2) == 0 ? cols - 1 : cols / 2;
          x[static_cast<std::size_t>(y)] = own;
          const perdita::matrix_view<T> to(g.data(), 1, cols);
          const T value = perdita::top_k_hinge<T>(
              {.k = 50, .margin = static_cast<T>(descriptor.margin(setting))})(
              perdita::matrix_view<const T>(x.data(), 1, cols), std::vector<index>{y}, to);
          const row_expectation e = descriptor.expect(setting, {{x.begin(), x.end()}, y, {}});
          INFO("kind " << kind << ", " << cols << " columns, " << descriptor.describe(setting)
                       << ", label " << own << ": " << value << " for " << text(e.value.value));
          // All differences are exact.
          const wide epsilon = std::numeric_limits<T>::epsilon();
          CHECK((wide(value) == e.value.value ||
                 size_of(wide(value - e.value.value)) <= epsilon * size_of(e.value.value)));
          std::size_t wrong = 0;
          for (std::size_t k = 0; k < g.size(); ++k)
            wrong += !(size_of(wide(g[k] - e.gradient[k].value)) <=
                       epsilon * size_of(e.gradient[k].value));
          CHECK(wrong == 0);
        }
      }
}

TEMPLATE_TEST_CASE("top_k_hinge: rivals that are few, and far apart or close together", "[hinges]",
                   float, double) {
  using T = TestType;
  using perdita::index;
  for (const index classes : {32, 63, 64, 200, 1000})
    for (const index k : {2, 5, 17})
      for (const index apart : {1, 8, 16, 64})
        for (const index rivals : {1, 2, 3, 6}) {
          if (k > classes || (rivals - 1) * apart + 1 >= classes)
            continue;
          std::vector<T> x(static_cast<std::size_t>(classes), -std::numeric_limits<T>::infinity()),
              g(x);
          const int label = static_cast<int>(classes - 1);
          x.back() = 0;
          const auto among = static_cast<double>(std::min(k, rivals + 1));
          double expected = 0;
          for (index i = 0; i < rivals; ++i) {
            x[static_cast<std::size_t>(i * apart)] = static_cast<T>(rivals - i);
            if (i < k)
              expected += static_cast<double>(rivals - i + 1) / among;
          }
          const T value = perdita::top_k_hinge<T>({.k = k})(
              perdita::matrix_view<const T>(x.data(), 1, classes), std::vector<int>{label},
              perdita::matrix_view<T>(g.data(), 1, classes));
          INFO(classes << " classes, k = " << k << ", " << rivals << " rivals, " << apart
                       << " apart: " << value << " for " << expected);
          CHECK(std::abs(static_cast<double>(value) - expected) <= 1e-6);
          for (index i = 0; i < rivals; ++i)
            CHECK(std::abs(static_cast<double>(g[static_cast<std::size_t>(i * apart)]) -
                           (i < k ? 1 / among : 0)) <= 1e-6);
        }
}

TEMPLATE_TEST_CASE("rival_scores: against the scores one by one", "[hinges]", float, double) {
  using T = TestType;
  constexpr T minus = -std::numeric_limits<T>::infinity();
  constexpr double untouched = 77;
  const auto width = static_cast<index>(perdita::core::lanes<T>);
  const auto check = [&](const std::vector<T>& x, index y) {
    const auto cols = static_cast<index>(x.size());
    const perdita::core::rival_scores<T> rivals(x.data(), cols, y);
    std::vector<double> all; // the rivals that are not masked, as they come
    for (index k = 0; k < cols; ++k)
      if (k != y && x[std::size_t(k)] > minus)
        all.push_back(static_cast<double>(x[std::size_t(k)]));
    auto sorted = all;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    INFO(cols << " columns, label " << y << ", " << all.size() << " rivals");
    const auto own = static_cast<double>(x[std::size_t(y)]);
    REQUIRE(rivals.all_masked() == all.empty());
    CHECK(rivals.label == own - (all.empty() ? 0 : sorted[0]));
    CHECK_FALSE(rivals.spoilt);
    CHECK(rivals.lost == (!all.empty() && sorted[0] == inf));
    std::vector<double> out;
    const auto room = [&] {
      out.assign(x.size() + std::size_t(width) + 1, untouched);
      return out.data();
    };
    const auto got = [&](index count) {
      CHECK(out.back() == untouched);
      return std::vector<double>(out.begin(), out.begin() + count);
    };
    for (const index most : {1, 2, 5, 50}) {
      const auto count = std::min<std::size_t>(std::size_t(most), sorted.size());
      perdita::core::part_maxima<T> parts(cols, most, room());
      const perdita::core::rival_scores<T> swept(x.data(), cols, y, parts);
      const auto [found, gathered] = swept.largest(most, parts, out.data());
      REQUIRE(found == static_cast<index>(count));
      CHECK(got(found) == std::vector<double>(sorted.begin(), sorted.begin() + found));
      if (found > 0) { // and all that are as large as the last of them
        const double last = sorted[count - 1];
        const auto all_gathered = got(gathered);
        CHECK(std::count(all_gathered.begin(), all_gathered.end(), last) ==
              std::count(sorted.begin(), sorted.end(), last));
      }
    }
    index each = 0;
    rivals.each([&](const perdita::core::pack<T>&, index i) { each += i == each * width; });
    CHECK(each == (cols + width - 1) / width);
    if (all.empty()) {
      CHECK(rivals.gather(std::numeric_limits<T>::lowest(), room()) == 0);
      return;
    }
    CHECK(rivals.top == static_cast<T>(sorted[0]));
    std::vector<T> stored(x.size() + std::size_t(width));
    perdita::core::image_sweep<T> sweep(0.75, stored.data());
    const perdita::core::rival_scores<T> swept(x.data(), cols, y, sweep);
    CHECK(swept.top == rivals.top);
    if (!swept.lost) {
      const auto near = static_cast<double>(swept.near);
      CHECK(near <= sorted[0]);
      CHECK(sorted[0] <= near + 16 / 0.75);
      wide images = 0, error = 0;
      for (const double z : all) {
        const wide one = exp(wide((z - wide(near)) * 0.75));
        images += one;
        error += one * (4 + size_of(wide(z - wide(near))));
      }
      CHECK(size_of(wide(sweep.sum.total(0) - images)) <=
            std::numeric_limits<T>::epsilon() * error);
    }
    for (const double edge : {sorted[0], sorted[sorted.size() / 2], sorted.back(),
                              static_cast<double>(std::numeric_limits<T>::lowest())}) {
      std::vector<double> reached;
      wide images = 0, error = 0; // of those up to it
      for (const double z : all) {
        if (z >= edge)
          reached.push_back(z);
        const wide image = z > edge ? wide(0) : exp(wide((z - wide(edge)) * 0.75));
        images += image;
        error += image * (4 + size_of(wide(z - wide(edge))));
      }
      CHECK(got(rivals.gather(static_cast<T>(edge), room())) == reached);
      if (edge < inf && std::count(all.begin(), all.end(), edge) > 0)
        CHECK(size_of(wide(rivals.sum_of_images(static_cast<T>(edge), 0.75) - images)) <=
              std::numeric_limits<T>::epsilon() * error);
    }
  };
  random_numbers random(10);
  for (index cols = 1; cols <= 2 * width + 2; ++cols)
    for (index y = 0; y < cols; ++y) {
      std::vector<T> x;
      for (index k = 0; k < cols; ++k)
        x.push_back(static_cast<T>(3 * random.normal()));
      check(x, y);
      for (T& z : x) // ties, and masked
        z = random.below(3) == 0 ? minus : std::round(z);
      check(x, y);
      std::fill(x.begin(), x.end(), minus);
      check(x, y);
      x[std::size_t(y)] = 5;
      check(x, y);
      x[std::size_t((y + 1) % cols)] = static_cast<T>(inf);
      if (cols > 1)
        check(x, y);
      for (const index bad : {y, index{0}, cols - 1}) {
        auto spoilt = x;
        spoilt[std::size_t(bad)] = static_cast<T>(n);
        const perdita::core::rival_scores<T> rivals(spoilt.data(), cols, y);
        CHECK((rivals.spoilt && rivals.lost));
      }
    }
  for (int kind = 0; kind < long_kinds; ++kind)
    for (const index y : {0, 1000, 4098})
      check(long_row<T>(kind, 4099, random), y);
  // The largest comes late, and far above what was seen before: a sweep starts again.
  for (const double rise : {20., 25., 90.}) {
    auto late = long_row<T>(0, 4099, random);
    late[4000] = *std::max_element(late.begin(), late.end()) + static_cast<T>(rise);
    check(late, 0);
  }
}

TEST_CASE("hinges: options out of range are refused", "[hinges]") {
  using Catch::Matchers::ContainsSubstring;
  const float infinite = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH(perdita::weston_watkins<float>({.margin = infinite}),
                    ContainsSubstring("margin is inf"));
  CHECK_THROWS_WITH(perdita::top_k_hinge<float>({.margin = infinite}),
                    ContainsSubstring("margin is inf"));
  CHECK_THROWS_WITH(perdita::top_k_hinge<float>({.k = 0}), ContainsSubstring("k is 0"));
  const std::vector<float> x{0, 1};
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(perdita::top_k_hinge<float>({.k = 3})(
                        perdita::matrix_view<const float>(x.data(), 1, 2), label),
                    ContainsSubstring("k is 3"));
}

} // namespace perdita_tests
