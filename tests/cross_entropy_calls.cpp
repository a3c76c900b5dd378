// SPDX-License-Identifier: MIT

// The ways to call a row loss: types of labels, of containers, of storage, and what its
// constructor refuses.

#include <perdita/cross_entropy.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"

namespace {

using perdita::cross_entropy;
using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using column_major = Eigen::MatrixXf;

constexpr int rows = 11, cols = 21;

row_major some_scores() {
  row_major x(rows, cols);
  for (int i = 0; i < rows * cols; ++i)
    x(i / cols, i % cols) = 0.125F * static_cast<float>(i * 37 % 101) - 6;
  return x;
}
std::vector<int> some_labels() {
  std::vector<int> y;
  for (int r = 0; r < rows; ++r)
    y.push_back(r * 5 % cols);
  return y;
}

struct answer {
  float value;
  row_major gradient;
  bool operator==(const answer& other) const {
    return value == other.value && gradient == other.gradient;
  }
};
answer expected() {
  const row_major x = some_scores();
  answer a{0, row_major::Zero(rows, cols)};
  const std::vector<int> y = some_labels();
  a.value = cross_entropy<float>()(perdita::matrix_view<const float>(x.data(), rows, cols), y,
                                   perdita::matrix_view<float>(a.gradient.data(), rows, cols));
  return a;
}

template <class Options> std::string refusal(const Options& make) {
  try {
    make();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "(nothing was thrown)";
}

} // namespace

TEMPLATE_TEST_CASE("cross_entropy: labels of any integral type", "[cross_entropy]", signed char,
                   unsigned char, std::int16_t, std::uint16_t, std::int32_t, std::uint32_t,
                   std::int64_t, std::uint64_t, char, long long) {
  const answer right = expected();
  const row_major x = some_scores();
  std::vector<TestType> y;
  for (const int label : some_labels())
    y.push_back(static_cast<TestType>(label));
  const cross_entropy<float> loss;
  answer got{0, row_major(rows, cols)};
  got.value = loss(x, y, got.gradient);
  CHECK(got == right);

  const std::span<const TestType> span(y);
  got.value = loss(x, span, got.gradient);
  CHECK(got == right);

  // Every other element, and backwards.
  std::vector<TestType> spread(2 * rows, TestType(99)), reversed(y.rbegin(), y.rend());
  for (int r = 0; r < rows; ++r)
    spread[2 * static_cast<std::size_t>(r)] = y[static_cast<std::size_t>(r)];
  got.value = loss(x, perdita::vector_view<const TestType>(spread.data(), rows, 2), got.gradient);
  CHECK(got == right);
  got.value =
      loss(x, perdita::vector_view<const TestType>(&reversed.back(), rows, -1), got.gradient);
  CHECK(got == right);

  Eigen::Matrix<TestType, Eigen::Dynamic, 1> column(rows);
  for (int r = 0; r < rows; ++r)
    column(r) = y[static_cast<std::size_t>(r)];
  got.value = loss(x, column, got.gradient);
  CHECK(got == right);
}

TEST_CASE("cross_entropy: a temperature or softcap without a finite inverse is refused",
          "[cross_entropy]") {
  using Catch::Matchers::ContainsSubstring;
  std::vector<float> x{1, 2, 3}, g(3, 5);
  const std::vector<int> y{1};
  const auto call = [&](const perdita::cross_entropy<float>::options& o) {
    cross_entropy<float> loss(o);
    return loss(perdita::matrix_view<const float>(x.data(), 1, 3), y,
                perdita::matrix_view<float>(g.data(), 1, 3));
  };
  CHECK_THROWS_WITH(call({.temperature = 1e-40F}),
                    ContainsSubstring("perdita::cross_entropy: temperature is 9.999946") &&
                        ContainsSubstring("expected a finite number above 0 whose inverse is "
                                          "finite"));
  CHECK_THROWS_WITH(
      call({.softcap = 1e-40F}),
      ContainsSubstring("softcap is") &&
          ContainsSubstring("expected 0 for none, or a finite number whose inverse is finite"));
  CHECK_THROWS_WITH(cross_entropy<double>({.temperature = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK_THROWS_WITH(cross_entropy<double>({.softcap = 1e-310}),
                    ContainsSubstring("whose inverse is finite"));
  CHECK(g == std::vector<float>(3, 5));
  CHECK_NOTHROW(call({.temperature = 3e-39F}));
  CHECK_NOTHROW(call({.softcap = 3e-39F}));
  for (const float slope : g)
    CHECK(slope == slope);
}

TEST_CASE("cross_entropy: a label that its own type makes large is refused", "[cross_entropy]") {
  const row_major x = some_scores();
  std::vector<std::uint64_t> y(rows, 0);
  y[3] = std::numeric_limits<std::uint64_t>::max() - 99; // -100 if read as signed
  CHECK_THROWS_AS(cross_entropy<float>()(x, y), std::invalid_argument);
  std::vector<std::uint8_t> small(rows, 0);
  small[3] = 156; // -100 if read as signed
  CHECK_THROWS_AS(cross_entropy<float>()(x, small), std::invalid_argument);
  std::vector<std::int8_t> ignored(rows, 0);
  ignored[3] = -100;
  CHECK_NOTHROW(cross_entropy<float>()(x, ignored));
}

TEST_CASE("cross_entropy: Eigen's matrices, maps, blocks, and references", "[cross_entropy]") {
  const answer right = expected();
  const std::vector<int> y = some_labels();
  const cross_entropy<float> loss;
  const row_major rm = some_scores();
  const column_major cm = rm;
  const auto check = [&](const auto& scores, auto&& gradient) {
    answer got{loss(scores, y, gradient), gradient};
    CHECK(got == right);
    CHECK(loss(scores, y) == right.value);
  };
  check(rm, row_major(rows, cols));
  check(cm, column_major(rows, cols));
  check(rm, column_major(rows, cols));
  check(cm, row_major(rows, cols));

  row_major large = row_major::Constant(rows + 6, cols + 9, 99);
  large.block(2, 3, rows, cols) = rm;
  row_major target = row_major::Constant(rows + 6, cols + 9, -5);
  check(large.block(2, 3, rows, cols), target.block(1, 4, rows, cols));
  CHECK((target.array() == -5).count() == target.size() - rows * cols);
  column_major large_columns = large;
  check(large_columns.block(2, 3, rows, cols), column_major(rows, cols));
  check(large.middleRows(2, rows).middleCols(3, cols), row_major(rows, cols));

  const Eigen::Map<const row_major> map(rm.data(), rows, cols);
  check(map, row_major(rows, cols));
  std::vector<float> strided(2 * rows * cols, 99);
  Eigen::Map<row_major, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> spread(
      strided.data(), rows, cols, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(2 * cols, 2));
  spread = rm;
  check(spread, row_major(rows, cols));
  const Eigen::Ref<const column_major> ref(cm);
  check(ref, column_major(rows, cols));
  check(rm.array(), row_major(rows, cols));
  const column_major transposed = rm.transpose();
  check(transposed.transpose(), row_major(rows, cols));

  // Over the scores themselves
  row_major over = rm;
  answer got{loss(over, y, over), over};
  CHECK(got == right);
  column_major over_columns = cm;
  got = {loss(over_columns, y, over_columns), over_columns};
  CHECK(got == right);

  // One row
  const Eigen::RowVectorXf row = rm.row(0);
  Eigen::RowVectorXf slope(cols);
  const std::vector<int> one{y[0]};
  const float value = loss(row, one, slope);
  CHECK(value == loss(rm.topRows(1), one));
}

TEST_CASE("cross_entropy: images with classes first", "[cross_entropy]") {
  // 3 images of 4 × 5 pixels with 7 classes, against the same pixels as rows.
  constexpr int images = 3, classes = 7, pixels = 20;
  std::vector<float> x(images * classes * pixels), g(x.size());
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = 0.25F * static_cast<float>(i * 29 % 47) - 5;
  row_major as_rows(images * pixels, classes), slopes(images * pixels, classes);
  std::vector<int> y;
  for (int n = 0; n < images; ++n)
    for (int p = 0; p < pixels; ++p) {
      for (int c = 0; c < classes; ++c)
        as_rows(n * pixels + p, c) = x[static_cast<std::size_t>((n * classes + c) * pixels + p)];
      y.push_back(p % 6 == 5 ? -100 : (p + n) % classes);
    }
  const cross_entropy<float> loss;
  const float value = loss(as_rows, y, slopes);
  const auto scores =
      perdita::matrix_view<const float>::channels_first(x.data(), images, classes, pixels);
  const auto gradient =
      perdita::matrix_view<float>::channels_first(g.data(), images, classes, pixels);
  const auto is_right = [&] {
    bool same = true;
    for (int n = 0; n < images; ++n)
      for (int p = 0; p < pixels; ++p)
        for (int c = 0; c < classes; ++c)
          same = same && g[static_cast<std::size_t>((n * classes + c) * pixels + p)] ==
                             slopes(n * pixels + p, c);
    std::fill(g.begin(), g.end(), -7.0F);
    return same;
  };
  CHECK(loss(scores, y, gradient) == value);
  CHECK(is_right());
  CHECK(loss(as_rows, y, gradient) == value);
  CHECK(is_right());
  row_major from_images(images * pixels, classes);
  CHECK(loss(scores, y, from_images) == value);
  CHECK(from_images == slopes);
}

TEMPLATE_TEST_CASE("cross_entropy: sixteen-bit scores of every kind", "[cross_entropy]",
                   Eigen::half, Eigen::bfloat16) {
  using matrix = Eigen::Matrix<TestType, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix x = some_scores().cast<TestType>();
  const row_major wide = x.template cast<float>();
  const std::vector<int> y = some_labels();
  const cross_entropy<float> loss;
  row_major slopes(rows, cols), mixed(rows, cols);
  matrix got(rows, cols), narrow(rows, cols);
  const float value = loss(wide, y, slopes);
  CHECK(loss(x, y, got) == value);
  CHECK(got == slopes.template cast<TestType>());
  CHECK(loss(x, y, mixed) == value); // 16-bit scores, float gradient
  CHECK(mixed == slopes);
  CHECK(loss(wide, y, narrow) == value); // float scores, 16-bit gradient
  CHECK(narrow == slopes.template cast<TestType>());
  const Eigen::Matrix<TestType, Eigen::Dynamic, Eigen::Dynamic> columns = x;
  CHECK(loss(columns, y) == value);

  // Soft targets of another storage than the scores
  row_major q = row_major::Constant(rows, cols, 0.5F / cols);
  for (int r = 0; r < rows; ++r)
    q(r, y[static_cast<std::size_t>(r)]) += 0.5F;
  const matrix q16 = q.cast<TestType>();
  const row_major q_wide = q16.template cast<float>();
  const float soft = loss(wide, q_wide, slopes);
  CHECK(loss(x, q16, got) == soft);
  CHECK(loss(wide, q16, mixed) == soft);
  CHECK(mixed == slopes);
  CHECK(loss(x, q_wide, mixed) == soft);
  CHECK(mixed == slopes);
}

TEST_CASE("cross_entropy: the constructor says what it refuses", "[cross_entropy]") {
  const float bad = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  using loss = cross_entropy<float>;
  struct wrong {
    std::string message;
    std::vector<const char*> says;
  };
  const std::vector<float> negative{1, -2, 1}, nan{1, 1, bad}, infinite{inf, 1, 1},
      half{0.25F, 0.25F, 0.125F};
  const std::vector<wrong> all{
      {refusal([&] { loss({.label_smoothing = -0.125F}); }),
       {"label_smoothing", "-0.125", "[0, 1]"}},
      {refusal([&] { loss({.label_smoothing = 1.5F}); }), {"label_smoothing", "1.5", "[0, 1]"}},
      {refusal([&] { loss({.label_smoothing = bad}); }), {"label_smoothing", "nan"}},
      {refusal([&] { loss({.temperature = 0}); }), {"temperature", "is 0", "above 0"}},
      {refusal([&] { loss({.temperature = -1}); }), {"temperature", "-1"}},
      {refusal([&] { loss({.temperature = inf}); }), {"temperature", "inf"}},
      {refusal([&] { loss({.temperature = bad}); }), {"temperature", "nan"}},
      {refusal([&] { loss({.softcap = -30}); }), {"softcap", "-30"}},
      {refusal([&] { loss({.softcap = bad}); }), {"softcap", "nan"}},
      {refusal([&] { loss({.log_z_penalty = -1}); }), {"log_z_penalty", "-1"}},
      {refusal([&] { loss({.log_z_penalty = inf}); }), {"log_z_penalty", "inf"}},
      {refusal([&] { loss({.focal_gamma = -2}); }), {"focal_gamma", "-2"}},
      {refusal([&] { loss({.focal_gamma = bad}); }), {"focal_gamma", "nan"}},
      {refusal([&] { loss({.class_weights = negative}); }), {"class_weights[1]", "-2"}},
      {refusal([&] { loss({.class_weights = nan}); }), {"class_weights[2]", "nan"}},
      {refusal([&] { loss({.class_weights = infinite}); }), {"class_weights[0]", "inf"}},
      {refusal([&] { loss({.prior = negative}); }), {"prior[1]", "-2"}},
      {refusal([&] { loss({.prior = half}); }), {"prior", "0.625", "1"}},
      {refusal([&] { loss({.reduction = static_cast<perdita::reduction>(9)}); }),
       {"reduction", "9"}},
  };
  for (const wrong& w : all) {
    INFO(w.message);
    CHECK(w.message.find("perdita::cross_entropy: ") == 0);
    CHECK(w.message.find("expected") != w.message.npos);
    for (const char* part : w.says) {
      INFO(part);
      CHECK(w.message.find(part) != w.message.npos);
    }
  }
  // Nearly anything that makes sense is accepted.
  CHECK_NOTHROW(loss({.label_smoothing = 1}));
  CHECK_NOTHROW(loss({.label_smoothing = std::nextafter(1.0F, 0.0F)}));
  CHECK_NOTHROW(loss({.temperature = std::numeric_limits<float>::min()}));
}

TEST_CASE("cross_entropy: options that do not fit the call", "[cross_entropy]") {
  const row_major x = some_scores();
  const std::vector<int> y = some_labels();
  const std::vector<float> three{1, 1, 1}, third{0.5F, 0.25F, 0.25F};
  row_major g = row_major::Constant(rows, cols, -5);
  const auto check = [&](const cross_entropy<float>& loss, const auto& target,
                         std::vector<const char*> says) {
    const std::string message = refusal([&] { (void)loss(x, target, g); });
    INFO(message);
    CHECK(message.find("perdita::cross_entropy: ") == 0);
    for (const char* part : says)
      CHECK(message.find(part) != message.npos);
    CHECK((g.array() == -5).all());
  };
  check({{.class_weights = three}}, y, {"class_weights", "3", "21"});
  check({{.label_smoothing = 0.5F, .prior = third}}, y, {"prior", "3", "21"});
  check({{.focal_gamma = 2}}, x, {"focal_gamma", "2", "soft"});
}

TEST_CASE("cross_entropy: null pointers to something", "[cross_entropy]") {
  const cross_entropy<float> loss;
  const row_major x = some_scores();
  const std::vector<int> y = some_labels();
  row_major g(rows, cols);
  const perdita::matrix_view<const float> no_scores(nullptr, rows, cols);
  const perdita::matrix_view<float> no_gradient(nullptr, rows, cols);
  const perdita::vector_view<const int> no_labels(nullptr, rows);
  const auto says = [](const std::string& message, const char* what) {
    INFO(message);
    return message.find("perdita::cross_entropy: ") == 0 && message.find(what) != message.npos &&
           message.find("null") != message.npos;
  };
  CHECK(says(refusal([&] { (void)loss(no_scores, y, g); }), "scores"));
  CHECK(says(refusal([&] { (void)loss(x, no_labels, g); }), "labels"));
  CHECK(says(refusal([&] { (void)loss(x, y, no_gradient); }), "gradient"));
  CHECK(says(refusal([&] { (void)loss(x, no_scores, g); }), "target"));
  CHECK(says(refusal([&] { loss.hessian_product(x, y, no_scores, g); }), ": v is"));
  const perdita::vector_view<const float> no_weights(nullptr, rows);
  CHECK(says(refusal([&] { (void)loss(x, y, g, {.row_weights = no_weights}); }), "row_weights"));
  const perdita::vector_view<float> no_values(nullptr, rows);
  CHECK(says(refusal([&] { (void)loss(x, y, g, {.values = no_values}); }), "values"));
  CHECK(
      says(refusal([&] { cross_entropy<float>({.class_weights = no_weights}); }), "class_weights"));
  CHECK(says(refusal([&] { cross_entropy<float>({.prior = no_weights}); }), "prior"));
  // No rows need no memory.
  CHECK(loss(perdita::matrix_view<const float>(nullptr, 0, cols), std::vector<int>{},
             perdita::matrix_view<float>(nullptr, 0, cols)) == 0);
}

TEST_CASE("cross_entropy: no penalty is none, whatever log Z is", "[cross_entropy]") {
  const double inf = std::numeric_limits<double>::infinity();
  const Eigen::Matrix<double, 3, 2, Eigen::RowMajor> x{{inf, 1}, {-inf, -inf}, {1, 2}};
  std::vector<double> penalty(3, 9), nats(3);
  cross_entropy<double>()(x, std::vector<int>{0, 0, 1},
                          perdita::call_options<double>{.entropy = nats, .penalty = penalty});
  CHECK(penalty == std::vector<double>(3));
}

TEST_CASE("cross_entropy: the options' memory is copied", "[cross_entropy]") {
  const row_major x = some_scores();
  const std::vector<int> y = some_labels();
  std::vector<float> weights(cols, 2);
  weights[0] = 0.5F;
  const cross_entropy<float> loss({.class_weights = weights});
  const float value = loss(x, y);
  weights.assign(cols, std::numeric_limits<float>::quiet_NaN());
  CHECK(loss(x, y) == value);
}

TEST_CASE("cross_entropy: the mean divides by the weights that count", "[cross_entropy]") {
  // Two rows with equal scores: each row's value is its weight times log 4.
  const row_major x = row_major::Zero(3, 4);
  const std::vector<int> y{0, 1, -100};
  const std::vector<double> w{3, 5, 100, 100};
  const Eigen::MatrixXd wide = x.cast<double>();
  const double log4 = std::log(4.0);
  using Catch::Matchers::WithinRel;
  using loss = cross_entropy<double>;
  CHECK_THAT(loss({.class_weights = w})(wide, y), WithinRel(log4, 1e-15));
  CHECK_THAT(loss({.class_weights = w, .reduction = perdita::reduction::sum})(wide, y),
             WithinRel(8 * log4, 1e-15));
  const std::vector<double> rows_weigh{2, 1, 7};
  CHECK_THAT(loss({.class_weights = w, .reduction = perdita::reduction::sum})(
                 wide, y, {.row_weights = rows_weigh}),
             WithinRel(11 * log4, 1e-15));
  CHECK_THAT(loss({.class_weights = w})(wide, y, {.row_weights = rows_weigh}),
             WithinRel(log4, 1e-15));
  CHECK_THAT(loss({.class_weights = w})(wide, y, {.normaliser = 2}), WithinRel(4 * log4, 1e-15));
  // Soft targets: class weights do not enter the denominator.
  Eigen::MatrixXd q = Eigen::MatrixXd::Zero(3, 4);
  q(0, 0) = q(1, 1) = 1;
  CHECK_THAT(loss({.class_weights = w})(wide, q), WithinRel(8 * log4 / 3, 1e-15));
  CHECK_THAT(loss({.class_weights = w})(wide, q, {.row_weights = rows_weigh}),
             WithinRel(11 * log4 / 10, 1e-15));
}

// A gradient of more than 4 MiB is written past the caches, whole lines at a time; one that
// overwrites its scores is not.
TEMPLATE_TEST_CASE("cross_entropy: a gradient that goes past the caches has the same bits",
                   "[cross_entropy][threads]", float, double) {
  using T = TestType;
  using perdita_tests::task_order;
  using perdita_tests::threads_executor;
  struct batch {
    std::ptrdiff_t classes, gap; // between rows, in numbers
  };
  const threads_executor pool(3, task_order::shuffled);
  for (const batch& b :
       {batch{1000, 0}, batch{997, 5}, batch{513, 64}, batch{40007, 0}, batch{180001, 3}}) {
    const std::ptrdiff_t stride = b.classes + b.gap;
    const std::ptrdiff_t n =
        (std::ptrdiff_t{4} << 20) / static_cast<std::ptrdiff_t>(sizeof(T)) / b.classes + 2;
    std::vector<T> x(static_cast<std::size_t>(n * stride));
    for (std::size_t i = 0; i < x.size(); ++i) // far enough apart, at times, for another shift
      x[i] = static_cast<T>(i * 7919 % 1009) / 64 + (i * 31 % 30011 == 7 ? T(40) : T(0));
    std::vector<int> y;
    for (std::ptrdiff_t r = 0; r < n; ++r)
      y.push_back(r % 11 == 3 ? -100 : static_cast<int>(r * 101 % b.classes));
    for (const T focal : {T(0), T(2)}) {
      const cross_entropy<T> loss({.focal_gamma = focal});
      std::vector<T> expected = x;
      const perdita::matrix_view<T> all(expected.data(), n, b.classes, stride, 1);
      const T value = loss(all, y, all);
      for (std::ptrdiff_t r = 0; r < n; ++r)
        std::fill_n(expected.begin() + r * stride + b.classes, r + 1 < n ? b.gap : 0, T(9));
      for (const std::size_t offset : {0U, 5U}) {
        CAPTURE(b.classes, focal, offset);
        std::vector<T> gradient(expected.size() + 32, T(9));
        const auto start = offset + (64 - reinterpret_cast<std::uintptr_t>(gradient.data()) % 64) /
                                        sizeof(T) % (64 / sizeof(T));
        const perdita::matrix_view<const T> scores(x.data(), n, b.classes, stride, 1);
        const perdita::matrix_view<T> to(gradient.data() + start, n, b.classes, stride, 1);
        CHECK(loss(scores, y, to, {.run_on = pool}) == value);
        const auto written = static_cast<std::ptrdiff_t>((n - 1) * stride + b.classes);
        const auto first = gradient.begin() + static_cast<std::ptrdiff_t>(start);
        CHECK(std::equal(first, first + written, expected.begin()));
        CHECK(std::count(gradient.begin(), first, T(9)) == first - gradient.begin());
        CHECK(std::count(first + written, gradient.end(), T(9)) ==
              gradient.end() - first - written);
      }
    }
  }
}

// Rows of one to four chunks take a way of their own, but for those whose shift moves from chunk to
// chunk, before, between and behind which the others go on. Column-major, rows are in lanes
// instead.
TEMPLATE_TEST_CASE("cross_entropy: short rows whose shift moves among others", "[cross_entropy]",
                   float, double) {
  using T = TestType;
  constexpr std::ptrdiff_t n = 29;
  for (const std::ptrdiff_t classes : {512, 530, 1000, 1026, 1532, 2048, 2050}) {
    std::vector<T> x(static_cast<std::size_t>(n * classes)), by_columns(x.size()), weights, prior;
    std::vector<int> y;
    for (std::ptrdiff_t c = 0; c < classes; ++c) {
      weights.push_back(T(1) + static_cast<T>(c % 5) / 4);
      prior.push_back((c % 2 ? T(1.5) : T(0.5)) / static_cast<T>(classes));
    }
    for (std::ptrdiff_t r = 0; r < n; ++r) {
      // In a pack with the largest score, in the row's last columns, or somewhere.
      y.push_back(static_cast<int>(r % 4 == 0   ? classes - 20
                                   : r % 4 == 1 ? classes - 1 - r % 16
                                                : r * 101 % classes));
      for (std::ptrdiff_t c = 0; c < classes; ++c) {
        T& score = x[static_cast<std::size_t>(r * classes + c)];
        score = static_cast<T>((r * classes + c) * 7919 % 1009) / 64;
        if (r % 5 == 2 || r % 7 == 3) // in the last chunk, or in each more than in the one before
          score += static_cast<T>(c == classes - 19 ? 40 : r % 7 == 3 ? c / 512 * 33 : 0);
        by_columns[static_cast<std::size_t>(c * n + r)] = score;
      }
    }
    using options = typename cross_entropy<T>::options;
    const std::vector<options> all{{},
                                   {.focal_gamma = T(2)},
                                   {.softcap = T(50)},
                                   {.label_smoothing = T(0.125)},
                                   {.label_smoothing = T(0.125), .class_weights = weights},
                                   {.label_smoothing = T(0.125), .prior = prior}};
    for (std::size_t i = 0; i < all.size(); ++i) {
      CAPTURE(classes, i);
      const cross_entropy<T> loss(all[i]);
      std::vector<T> gradient(x.size()), expected(x.size());
      const perdita::matrix_view<const T> columns(by_columns.data(), n, classes, 1, n);
      const T value = loss(columns, y, perdita::matrix_view<T>(expected.data(), n, classes));
      const perdita::matrix_view<const T> scores(x.data(), n, classes);
      CHECK(loss(scores, y) == value);
      CHECK(loss(scores, y, perdita::matrix_view<T>(gradient.data(), n, classes)) == value);
      CHECK(gradient == expected);
      const perdita::matrix_view<T> in_place(x.data(), n, classes);
      const std::vector<T> before = x;
      CHECK(loss(in_place, y, in_place) == value);
      CHECK(x == expected);
      x = before;
    }
    // Soft targets that do not lie in rows are copied chunk by chunk, as the rows then go.
    std::vector<T> q(x.size()), q_by_columns(x.size()), gradient(x.size()), expected(x.size());
    for (std::ptrdiff_t r = 0; r < n; ++r)
      for (std::ptrdiff_t c = 0; c < classes; ++c) {
        const T at = prior[static_cast<std::size_t>((c + r) % classes)];
        q[static_cast<std::size_t>(r * classes + c)] = at;
        q_by_columns[static_cast<std::size_t>(c * n + r)] = at;
      }
    const cross_entropy<T> loss;
    const perdita::matrix_view<const T> scores(x.data(), n, classes);
    const T value = loss(scores, perdita::matrix_view<const T>(q.data(), n, classes),
                         perdita::matrix_view<T>(expected.data(), n, classes));
    CHECK(loss(scores, perdita::matrix_view<const T>(q_by_columns.data(), n, classes, 1, n),
               perdita::matrix_view<T>(gradient.data(), n, classes)) == value);
    CHECK(gradient == expected);
  }
}

// The last chunk of a row may lie within a pack: of the chunk before where it is looked at, of a
// line that chunk ends in where the gradient goes past the caches. Column-major, nothing does.
TEMPLATE_TEST_CASE("cross_entropy: a last chunk of a few columns", "[cross_entropy]", float,
                   double) {
  using T = TestType;
  constexpr std::ptrdiff_t few = 24;
  const auto n = static_cast<std::size_t>(few);
  for (const std::ptrdiff_t classes : {516, 519, 1025, 1028, 1030, 2049, 2050, 2063}) {
    CAPTURE(classes);
    const auto k = static_cast<std::size_t>(classes);
    std::vector<T> x(n * k), by_columns(n * k), expected(n * k);
    std::vector<int> y;
    for (std::size_t r = 0; r < n; ++r) {
      // The label is the largest, or is not.
      y.push_back(static_cast<int>(r % 3 == 0 ? 7 : r * 101 % k));
      for (std::size_t c = 0; c < k; ++c) {
        const int levels[] = {0, -5, -100, -1000, 60};
        T& score = x[r * k + c];
        score = static_cast<T>(levels[r % 5]) + static_cast<T>((r * k + c) * 7919 % 61) / 32;
        if (c == 7 && r % 3 == 0)
          score += 4;
        if (c + 2 == k && r % 2 == 1) // in the last columns
          score += r % 4 == 1 ? T(20) : T(100);
        if (c + 20 == k && r % 6 == 2) // in the last pack of the chunk before
          score += 10;
        by_columns[c * n + r] = score;
      }
    }
    std::vector<unsigned char> best(n), hits(n);
    for (const T cap : {T(0), T(2000)}) { // gradients from images, and from scores
      const cross_entropy<T> loss({.softcap = cap});
      const perdita::matrix_view<const T> columns(by_columns.data(), few, classes, 1, few);
      const T value =
          loss(columns, y, perdita::matrix_view<T>(expected.data(), few, classes), {.hits = best});
      CHECK(std::count(best.begin(), best.end(), 1) >= 4);
      std::vector<T> in_place = x;
      const perdita::matrix_view<T> all(in_place.data(), few, classes);
      CHECK(loss(all, y, all, {.hits = hits}) == value);
      CHECK(in_place == expected);
      CHECK(hits == best);
      std::fill(in_place.begin(), in_place.end(), T(9));
      CHECK(loss(perdita::matrix_view<const T>(x.data(), few, classes), y, all) == value);
      CHECK(in_place == expected);

      // The same rows again and again, until it is 4 MiB.
      const std::size_t times = (std::size_t{4} << 20) / sizeof(T) / x.size() + 1;
      std::vector<T> many, gradient(times * x.size());
      std::vector<int> labels;
      for (std::size_t i = 0; i < times; ++i) {
        many.insert(many.end(), x.begin(), x.end());
        labels.insert(labels.end(), y.begin(), y.end());
      }
      const auto rows_of_all = static_cast<std::ptrdiff_t>(labels.size());
      loss(perdita::matrix_view<const T>(many.data(), rows_of_all, classes), labels,
           perdita::matrix_view<T>(gradient.data(), rows_of_all, classes),
           {.normaliser = static_cast<T>(few)});
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < gradient.size(); ++i)
        wrong += !(gradient[i] == expected[i % x.size()]);
      CHECK(wrong == 0);
    }
  }
}

TEMPLATE_TEST_CASE("cross_entropy: the gradient may overwrite a soft target", "[cross_entropy]",
                   float, double) {
  using T = TestType;
  using matrix = perdita::matrix_view<T>;
  const cross_entropy<T> loss({.label_smoothing = T(0.1)});
  for (const std::ptrdiff_t k : {7, 700, 2049, 3000, 300001}) { // the last goes past the caches
    CAPTURE(k);
    constexpr std::ptrdiff_t n = 5;
    std::vector<T> x, q, g(static_cast<std::size_t>(n * k));
    for (std::ptrdiff_t i = 0; i < n * k; ++i) {
      x.push_back(T(0.125) * static_cast<T>(i * 37 % 101) - 6);
      q.push_back(static_cast<T>(i * 29 % 103) / static_cast<T>(k));
    }
    for (const bool columns : {false, true}) {
      const auto in = [&](std::vector<T>& v) {
        return columns ? matrix(v.data(), n, k, 1, n) : matrix(v.data(), n, k);
      };
      std::vector<T> both = q;
      const T value = loss(in(x), in(q), in(g));
      CHECK(loss(in(x), in(both), in(both)) == value);
      CHECK((both == g));
      loss.hessian_product(in(x), std::vector<int>(n, 1), in(q), in(g));
      both = q;
      loss.hessian_product(in(x), std::vector<int>(n, 1), in(both), in(both));
      CHECK((both == g));
      CHECK_THROWS_WITH(loss(in(x), in(both), in(both), {.accumulate = true}),
                        Catch::Matchers::ContainsSubstring("expected false where the gradient "));
      CHECK((both == g));
    }
  }
}
