// SPDX-License-Identifier: MIT

// PyTorch's multi_margin_loss and multilabel_margin_loss.

#include <perdita/multi_margin.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"

namespace perdita_tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

/// p, margin and whether there are weights, of which one in five is 0.
struct multi_margin_setting {
  int p;
  double margin;
  bool weights;
};
constexpr multi_margin_setting settings_of_multi_margin[] = {
    {1, 1, false}, {2, 1, false}, {1, 2.5, true}, {2, 0, true}, {1, -0.5, false}, {2, 2.5, false},
};

template <class T> class multi_margin_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "multi_margin"; }
  int settings() const override { return 6; }
  std::string describe(int setting) const override {
    const auto& s = settings_of_multi_margin[setting];
    return "p " + std::to_string(s.p) + ", margin " + std::to_string(s.margin) +
           (s.weights ? ", weights" : "");
  }
  std::vector<int> few_settings() const override { return {2, 1}; }
  static T weight(index label) {
    constexpr double weights[] = {0.25, 1.5, 3, 0.7, 0};
    return static_cast<T>(weights[label % 5]);
  }
  std::unique_ptr<row_subject<T>> make(int setting, index cols,
                                       perdita::reduction reduction) const override {
    const auto& s = settings_of_multi_margin[setting];
    std::vector<T> weights;
    for (index c = 0; s.weights && c < cols; ++c)
      weights.push_back(weight(c));
    return std::make_unique<row_subject_of<perdita::multi_margin<T>>>(
        perdita::multi_margin<T>({.p = s.p,
                                  .margin = static_cast<T>(s.margin),
                                  .class_weights = weights,
                                  .ignore_index = row_descriptor<T>::ignore_index,
                                  .reduction = reduction}));
  }
  perdita::loss_traits traits(int setting) const override {
    return perdita::multi_margin<T>({.p = settings_of_multi_margin[setting].p}).traits();
  }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  row_expectation expect(int setting, const row_input& row) const override {
    const auto& s = settings_of_multi_margin[setting];
    const auto y = static_cast<std::size_t>(row.label);
    const wide share = (s.weights ? wide(static_cast<double>(weight(row.label))) : wide(1)) /
                       static_cast<double>(row.scores.size());
    row_expectation e = nothing_reported();
    wide slopes = 0, slack = 0;
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide lead = row.scores[k] - row.scores[y];
      const bool masked = row.scores[k] == -infinity();
      const wide h = masked || k == y ? wide(0) : larger(0, lead + s.margin);
      // Each gap is rounded twice.
      const wide error = masked ? wide(0) : wide(size_of(lead) + size_of(wide(s.margin)));
      wide slope = 0, slope_slack = 0;
      if (s.p == 1) {
        e.value.value += weighted(share, h);
        e.value.allow(weighted(share, wide(error + h)));
        slope = h > 0 ? share : wide(0);
      } else {
        e.value.value += weighted(share, wide(h * h));
        e.value.allow(weighted(share, wide((2 * h + h) * (error + h))));
        slope = weighted(share, wide(2 * h));
        slope_slack = weighted(share, wide(2 * error));
      }
      slope_slack += size_of(slope);
      e.gradient.push_back({slope, slope_slack});
      slopes += slope;
      slack += slope_slack;
    }
    e.gradient[y] = {-slopes, slack};
    if (e.value.value == 0)
      e.value.slack = 0;
    return e;
  }
};

template <class T> class multilabel_margin_descriptor final : public row_descriptor<T> {
public:
  std::string name() const override { return "multilabel_margin"; }
  int settings() const override { return 3; }
  static double margin(int setting) {
    constexpr double margins[] = {1, 0, 2.5};
    return margins[setting];
  }
  std::string describe(int setting) const override {
    return "margin " + std::to_string(margin(setting));
  }
  std::vector<int> few_settings() const override { return {0}; }
  bool soft(int) const override { return true; }
  std::unique_ptr<row_subject<T>> make(int setting, index,
                                       perdita::reduction reduction) const override {
    return std::make_unique<row_subject_of<perdita::multilabel_margin<T>>>(
        perdita::multilabel_margin<T>(
            {.margin = static_cast<T>(margin(setting)), .reduction = reduction}));
  }
  perdita::loss_traits traits(int) const override { return perdita::multilabel_margin<T>::traits; }
  bool twice_smooth() const override { return false; }
  bool sparse() const override { return true; }

  /// By sums of the sorted scores, in 113 bits: pair by pair takes too long for wide rows.
  row_expectation expect(int setting, const row_input& row) const override {
    const wide c = margin(setting), classes = static_cast<double>(row.scores.size());
    std::vector<wide> relevant, others, sums{0}, sizes{0};
    for (std::size_t k = 0; k < row.scores.size(); ++k)
      if (row.scores[k] > -infinity())
        (row.soft[k] > 0 ? relevant : others).push_back(row.scores[k]);
    std::sort(relevant.begin(), relevant.end());
    std::sort(others.begin(), others.end());
    for (const wide& a : relevant) {
      sums.push_back(sums.back() + a);
      sizes.push_back(sizes.back() + size_of(a));
    }
    row_expectation e = nothing_reported();
    for (std::size_t k = 0; k < row.scores.size(); ++k) {
      const wide x = row.scores[k];
      wide count = 0;
      if (row.soft[k] > 0) {
        count = -static_cast<double>(others.end() -
                                     std::upper_bound(others.begin(), others.end(), wide(x - c)));
      } else if (x > -infinity()) {
        const auto below = static_cast<std::size_t>(
            std::lower_bound(relevant.begin(), relevant.end(), wide(x + c)) - relevant.begin());
        count = static_cast<double>(below);
        e.value.value += (count * (x + c) - sums[below]) / classes;
        e.value.allow((count * (size_of(x) + c) + sizes[below]) / classes);
      }
      e.gradient.push_back({wide(count / classes), size_of(wide(count / classes))});
    }
    e.value.allow(2 * e.value.value);
    return e;
  }
};

} // namespace

TEMPLATE_TEST_CASE("multilabel_margin: the row battery", "[multi_margin]", float, double) {
  check_row_loss(multilabel_margin_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("multilabel_margin: special rows", "[multi_margin]", float, double) {
  const std::vector<special_row> rows{
      // PyTorch's documentation: relevant are 3 and 0
      {"documented", 0, {0.1, 0.2, 0.4, 0.8}, -1, {1, 0, 0, 1}, 0.85, {-0.5, 0.5, 0.5, -0.5}},
      {"one class", 0, {3}, -1, {1}, 0, {0}},
      {"all are relevant", 0, {3, 4}, -1, {1, 1}, 0, {0, 0}},
      {"none is", 0, {3, 4}, -1, {0, 0}, 0, {0, 0}},
      {"ties", 0, {5, 5, 5, 5}, -1, {1, 1, 0, 0}, 1, {-0.5, -0.5, 0.5, 0.5}},
      {"ties without a margin", 1, {5, 5, 5, 5}, -1, {1, 1, 0, 0}, 0, {0, 0, 0, 0}},
      {"on the kink", 0, {5, 4, 0, 1}, -1, {1, 0, 0, 0}, 0, {0, 0, 0, 0}},
      {"as multi_margin", 0, {0.5, -1.2, 2, 0.1}, -1, {1, 0, 0, 0}, 0.775, {-0.5, 0, 0.25, 0.25}},
      {"another masked", 0, {1, -inf, 1, 0}, -1, {1, 0, 0, 0}, 0.25, {-0.25, 0, 0.25, 0}},
      {"relevant masked", 0, {1, -inf, 1, 1}, -1, {1, 1, 0, 0}, inf, {-0.5, -0.5, 0.5, 0.5}},
      {"all masked", 0, {-inf, -inf}, -1, {1, 0}, 0, {0, 0}},
      {"+inf among the others", 0, {0, inf, 5, 3}, -1, {1, 0, 1, 1}, inf, {-.25, .75, -.25, -.25}},
      {"+inf twice", 0, {0, inf, inf, 1}, -1, {1, 0, 0, 0}, inf, {-.75, .25, .25, .25}},
      {"+inf among the relevant", 0, {0, inf}, -1, {0, 1}, 0, {0, 0}},
      {"+inf on both sides", 0, {inf, inf, 0}, -1, {1, 0, 0}, n, {n, n, n}},
      {"NaN", 0, {0, n, 1}, -1, {1, 0, 1}, n, {n, n, n}},
      {"NaN in the target", 0, {0, 1, 2}, -1, {1, n, 1}, n, {n, n, n}},
  };
  check_special(multilabel_margin_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("multi_margin: the row battery", "[multi_margin]", float, double) {
  check_row_loss(multi_margin_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("multi_margin: special rows", "[multi_margin]", float, double) {
  const std::vector<special_row> rows{
      {"one class", 0, {3}, 0, {}, 0, {0}},
      {"ties", 0, {7, 7, 7, 1}, 0, {}, 0.5, {-0.5, 0.25, 0.25, 0}},
      {"on the kink", 0, {8, 7, 7, 1}, 0, {}, 0, {0, 0, 0, 0}},
      {"all rivals masked", 0, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", 0, {1, -inf, 0, 0}, 1, {}, inf, {0.25, -0.75, 0.25, 0.25}},
      {"label masked, p = 2", 1, {1, -inf, 0, 0}, 1, {}, inf, {inf, -inf, inf, inf}},
      {"label masked, weight 0, p = 1", 2, {1, 2, 0, 0, -inf}, 4, {}, 0, {0, 0, 0, 0, 0}},
      {"label masked, weight 0, p = 2", 3, {1, 2, 0, 0, -inf}, 4, {}, 0, {0, 0, 0, 0, 0}},
      {"all masked", 0, {-inf, -inf, -inf}, 1, {}, 0, {0, 0, 0}},
      {"+inf at the label", 1, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", 0, {0, inf, 1, 0}, 0, {}, inf, {-0.75, 0.25, 0.25, 0.25}},
      {"+inf twice", 0, {inf, inf, 1, 0}, 0, {}, n, {n, n, n, n}},
      {"NaN", 0, {0, 1, n}, 0, {}, n, {n, n, n}},
      {"NaN, p = 2", 1, {5, n, 1}, 0, {}, n, {n, n, n}},
      {"NaN, weight 0", 3, {5, n, 1, 0, 0}, 4, {}, n, {n, n, n, n, n}},
      {"NaN at the label", 0, {5, n, 1}, 1, {}, n, {n, n, n}},
      {"NaN at the label, all else masked", 1, {-inf, n}, 1, {}, n, {n, n}},
      // h = 2.5 and 0.6
      {"p = 1", 0, {0.5, -1.2, 2, 0.1}, 0, {}, 3.1 / 4, {-0.5, 0, 0.25, 0.25}},
      {"p = 2", 1, {0.5, -1.2, 2, 0.1}, 0, {}, 6.61 / 4, {-1.55, 0, 1.25, 0.3}},
  };
  check_special(multi_margin_descriptor<TestType>(), rows, 8);
}

TEMPLATE_TEST_CASE("multi_margin: differences beyond T whose mean is not", "[multi_margin]", float,
                   double) {
  const double l = sizeof(TestType) == 4 ? 0x1p127 : 0x1p1023; // 2 l is infinite
  std::vector<special_row> rows{
      {"two above", 0, {l, -l, 0, -l}, 1, {}, 0.75 * l, {0.25, -0.75, 0.25, 0.25}},
      {"one above", 4, {l, -l, -l, -l}, 1, {}, 0.5 * l, {0.25, -0.25, 0, 0}},
      {"below", 0, {-l, l, -l, -l}, 1, {}, 0, {0, 0, 0, 0}},
      {"weight 0", 2, {l, 0, 0, 0, -l}, 4, {}, 0, {0, 0, 0, 0, 0}},
      {"weight 1/4", 2, {-l, l, l, 0, 0}, 0, {}, 0.3 * l, {-0.2, 0.05, 0.05, 0.05, 0.05}},
  };
  special_row longer = rows[0];
  longer.scores.resize(64, -inf);
  longer.gradient = {1. / 64, -3. / 64, 1. / 64, 1. / 64};
  longer.gradient.resize(64, 0);
  longer.value = 3 * (l / 64);
  rows.push_back(longer);
  check_special(multi_margin_descriptor<TestType>(), rows, 8);
}

TEST_CASE("multi_margin: weights and the mean", "[multi_margin]") {
  const std::vector<double> x{0, 1, 1, 0.5, 2, 2}, w{3, 0.5, 1};
  const std::vector<int> labels{0, 1};
  std::vector<double> g(6);
  const perdita::matrix_view<const double> scores(x.data(), 2, 3);
  const perdita::matrix_view<double> gradient(g.data(), 2, 3);
  // Rows of 4 · 3/3 and 1 · 0.5/3; the mean is over rows, not weights.
  const double value =
      perdita::multi_margin<double>({.class_weights = w})(scores, labels, gradient);
  CHECK(std::abs(value - (4 + 0.5 / 3) / 2) < 1e-15);
  CHECK(std::abs(g[0] + 1) < 1e-15);
  CHECK(std::abs(g[5] - 0.5 / 6) < 1e-15);
  CHECK(g[3] == 0);
  // The caller's weights may change.
  std::vector<double> changing = w;
  const perdita::multi_margin<double> loss({.class_weights = changing});
  changing.assign(3, 100);
  CHECK(loss(scores, labels) == value);
  CHECK(loss.class_weights() == w);
  CHECK(loss.settings().class_weights.empty());
}

TEMPLATE_TEST_CASE("multilabel_margin: lists of classes", "[multi_margin]", signed char, int,
                   std::int64_t) {
  using list_type = TestType;
  using perdita::index;
  random_numbers random(41);
  const perdita::multilabel_margin<double> loss;
  for (const index cols : {index(1), index(4), index(90)}) {
    const index rows = 9;
    const auto size = static_cast<std::size_t>(rows * cols);
    std::vector<double> x(size), relevant(size, 0), g(size, 7), h(size, 8);
    std::vector<list_type> lists(size, list_type(-1)), turned(size);
    for (index r = 0; r < rows; ++r) {
      const std::size_t at = static_cast<std::size_t>(r * cols);
      std::vector<list_type> order;
      for (index c = 0; c < cols; ++c) {
        x[at + static_cast<std::size_t>(c)] = random.normal();
        order.insert(order.begin() + static_cast<std::ptrdiff_t>(random.below(order.size() + 1)),
                     static_cast<list_type>(c));
      }
      // None, all, or some, in any order; what follows the end is some class or nonsense.
      const auto chosen = r == 0 ? 0 : r == 1 ? order.size() : random.below(order.size() + 1);
      for (std::size_t i = 0; i < order.size(); ++i) {
        if (i < chosen)
          relevant[at + static_cast<std::size_t>(order[i])] = 1;
        lists[at + i] = i == chosen ? list_type(-1 - r) : i < chosen ? order[i] : list_type(120);
      }
    }
    for (index r = 0; r < rows; ++r)
      for (index c = 0; c < cols; ++c)
        turned[static_cast<std::size_t>(c * rows + r)] =
            lists[static_cast<std::size_t>(r * cols + c)];
    const perdita::matrix_view<const double> scores(x.data(), rows, cols),
        matrix(relevant.data(), rows, cols);
    const perdita::matrix_view<double> of_matrix(g.data(), rows, cols),
        of_lists(h.data(), rows, cols);
    const double expected = loss(scores, matrix, of_matrix);
    const perdita::matrix_view<const list_type> listed(lists.data(), rows, cols);
    CHECK(loss(scores, listed, of_lists) == expected);
    CHECK(g == h);
    CHECK((cols == 1 || expected > 0));
    CHECK(loss(scores, listed) == expected);
    CHECK(loss(scores, perdita::matrix_view<const list_type>(turned.data(), rows, cols, 1, rows)) ==
          expected);
    // In place
    const perdita::matrix_view<double> both(x.data(), rows, cols);
    CHECK(loss(both, listed, both) == expected);
    CHECK(x == g);
  }
}

TEST_CASE("multilabel_margin: PyTorch's example, and lists that are refused", "[multi_margin]") {
  using Catch::Matchers::ContainsSubstring;
  std::vector<double> x{0.1, 0.2, 0.4, 0.8}, g(4, 7);
  std::vector<std::int64_t> y{3, 0, -1, 1};
  const perdita::matrix_view<double> scores(x.data(), 1, 4), gradient(g.data(), 1, 4);
  const perdita::matrix_view<std::int64_t> target(y.data(), 1, 4);
  const perdita::multilabel_margin<double> loss;
  // 0.25 * ((1-(0.1-0.2)) + (1-(0.1-0.4)) + (1-(0.8-0.2)) + (1-(0.8-0.4)))
  CHECK(std::abs(loss(scores, target, gradient) - 0.85) < 1e-15);
  CHECK(g == std::vector<double>{-0.5, 0.5, 0.5, -0.5});
  y = {3, 3, -1, -1}; // once
  const double of_one = loss(scores, target);
  CHECK(std::abs(of_one - 0.25 * (0.3 + 0.4 + 0.6)) < 1e-15);

  g.assign(4, 7);
  y = {3, 4, -1, -1};
  CHECK_THROWS_WITH(loss(scores, target, gradient),
                    ContainsSubstring("target[1] is 4, expected 0 to 3, or a negative number"));
  CHECK_THROWS_WITH(loss(scores, perdita::matrix_view<std::int64_t>(y.data(), 1, 3), gradient),
                    ContainsSubstring("target columns"));
  CHECK_THROWS_WITH(loss(scores, perdita::matrix_view<std::int64_t>(y.data(), 2, 4), gradient),
                    ContainsSubstring("target rows"));
  CHECK_THROWS_WITH(loss(scores, perdita::matrix_view<const std::int64_t>(nullptr, 1, 4), gradient),
                    ContainsSubstring("target is null"));
  CHECK(g == std::vector<double>(4, 7));
}

TEST_CASE("multi_margin: what is refused", "[multi_margin]") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_WITH(perdita::multi_margin<float>(
                        {.class_weights = perdita::vector_view<const float>(nullptr, 3)}),
                    ContainsSubstring("class_weights is null"));
  for (const int p : {0, 3, -1})
    CHECK_THROWS_WITH(perdita::multi_margin<float>({.p = p}), ContainsSubstring("p is"));
  for (const double margin : {inf, n}) {
    CHECK_THROWS_WITH(perdita::multi_margin<double>({.margin = margin}),
                      ContainsSubstring("margin is"));
    CHECK_THROWS_WITH(perdita::multilabel_margin<double>({.margin = margin}),
                      ContainsSubstring("margin is"));
  }
  for (const double bad : {-1.0, inf, n}) {
    const std::vector<double> w{1, bad};
    CHECK_THROWS_WITH(perdita::multi_margin<double>({.class_weights = w}),
                      ContainsSubstring("class_weights[1] is"));
  }
  const std::vector<double> two{1, 1}, x{1, 2, 3};
  std::vector<double> g(3, 7);
  const std::vector<int> label{0};
  CHECK_THROWS_WITH(perdita::multi_margin<double>({.class_weights = two})(
                        perdita::matrix_view<const double>(x.data(), 1, 3), label,
                        perdita::matrix_view<double>(g.data(), 1, 3)),
                    ContainsSubstring("size of class_weights is 2"));
  CHECK_THROWS_WITH(
      perdita::multilabel_margin<double>()(perdita::matrix_view<const double>(x.data(), 1, 3),
                                           label, perdita::matrix_view<double>(g.data(), 1, 3)),
      ContainsSubstring("target is labels"));
  CHECK(g == std::vector<double>(3, 7));
}

} // namespace perdita_tests
