// SPDX-License-Identifier: MIT

// The traversal of element losses, tested on one of them and on one of two gradients: formula
// sheet 17. Apart from the losses, which the thread sanitizer need not compile.

#include <perdita/element.hpp>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/memory_block.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::reduction;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double n = std::numeric_limits<double>::quiet_NaN();

template <class T> std::vector<T> random_vector(std::size_t size, std::uint64_t seed) {
  random_numbers random(seed);
  std::vector<T> x(size);
  for (T& v : x)
    v = static_cast<T>(3 * random.normal());
  return x;
}
template <class T> double sum_of(const std::vector<T>& x) {
  wide sum = 0;
  for (const T v : x)
    sum += wide(v);
  return static_cast<double>(sum);
}
template <class T> perdita::huber<T> a_loss(reduction how = reduction::none) {
  return perdita::huber<T>({.delta = 2, .reduction = how});
}
template <class T> double relative(T got, double expected) {
  return std::abs(static_cast<double>(got) - expected) / std::abs(expected) /
         static_cast<double>(std::numeric_limits<T>::epsilon());
}

} // namespace

TEMPLATE_TEST_CASE("element traversal: any length and alignment, and nothing beyond", "[element]",
                   float, double) {
  using T = TestType;
  std::vector<std::size_t> lengths;
  for (std::size_t i = 0; i <= 35; ++i)
    lengths.push_back(i);
  for (const std::size_t i : {511U, 512U, 513U, 1030U, 32768U, 32769U, 66000U})
    lengths.push_back(i);
  const auto loss = a_loss<T>();
  const auto all_x = random_vector<T>(66000, 1), all_t = random_vector<T>(66000, 2);
  std::vector<T> alone_g(all_x.size()), alone_v(all_x.size());
  for (std::size_t i = 0; i < all_x.size(); ++i) { // each element by itself
    const std::vector<T> x{all_x[i]}, t{all_t[i]};
    if (i >= 1100 && i % 97 != 0)
      continue;
    std::vector<T> g(1);
    alone_v[i] = loss(x, t, g, {.run_on = perdita::serial});
    alone_g[i] = g[0];
  }
  for (const std::size_t size : lengths)
    for (const edge at : {edge::front, edge::back, edge::none}) {
      CAPTURE(size, static_cast<int>(at));
      const std::size_t bytes = size * sizeof(T), offset = at == edge::none ? 20 * sizeof(T) : 0;
      memory_block x(bytes, offset, at), t(bytes, offset, at), g(bytes, offset, at);
      const auto view = [&](memory_block& b) {
        return perdita::vector_view<T>(reinterpret_cast<T*>(b.data()),
                                       static_cast<perdita::index>(size));
      };
      std::copy_n(all_x.begin(), size, view(x).data);
      std::copy_n(all_t.begin(), size, view(t).data);
      const auto x_before = x.copy(), t_before = t.copy();
      auto around = g.copy();
      const T value = loss(view(x), view(t), view(g), {.run_on = perdita::serial});
      CHECK(x == x_before);
      CHECK(t == t_before);
      CHECK(value == loss(view(x), view(t), {.run_on = perdita::serial}));
      std::vector<T> v(size);
      loss(view(x), view(t), {.values = v, .run_on = perdita::serial});
      CHECK((size == 0 ? value == 0 : relative(value, sum_of(v)) <= 1));
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < size; ++i)
        wrong += (i < 1100 || i % 97 == 0) && view(g)[static_cast<perdita::index>(i)] != alone_g[i];
      CHECK(wrong == 0);
      const auto made = g.copy();
      std::copy_n(made.begin() + static_cast<std::ptrdiff_t>(g.position()), bytes,
                  around.begin() + static_cast<std::ptrdiff_t>(g.position()));
      CHECK(made == around);
    }
  CHECK(loss(std::vector<T>(), std::vector<T>()) == 0);
  CHECK(a_loss<T>(reduction::mean)(std::vector<T>(), std::vector<T>()) == 0);
}

TEST_CASE("element traversal: layouts of matrices", "[element]") {
  using T = float;
  using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
  using row_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto loss = a_loss<T>();
  for (const auto& [rows, cols] : {std::pair{1, 700}, {37, 29}, {700, 1}, {3, 1000}, {40, 600}}) {
    CAPTURE(rows, cols);
    const auto size = static_cast<std::size_t>(rows * cols);
    const auto x = random_vector<T>(size, 3), t = random_vector<T>(size, 4);
    std::vector<T> g(size);
    const T value = loss(x, t, g);
    const row_matrix rx = Eigen::Map<const row_matrix>(x.data(), rows, cols),
                     rt = Eigen::Map<const row_matrix>(t.data(), rows, cols),
                     expected = Eigen::Map<const row_matrix>(g.data(), rows, cols);
    const matrix cx = rx, ct = rt;
    const auto check = [&](const auto& px, const auto& pt, auto&& pg) {
      pg.setConstant(T(77));
      CHECK(relative(loss(px, pt, pg), static_cast<double>(value)) <= 1);
      CHECK((pg.array() == expected.array()).all());
    };
    row_matrix rg(rows, cols);
    matrix cg(rows, cols);
    check(rx, rt, rg);
    check(cx, ct, cg);
    check(rx, ct, cg);
    check(cx, rt, rg);
    // Blocks of something larger, of which the rest stays as it is.
    row_matrix large_row = row_matrix::Constant(rows + 3, cols + 5, T(5));
    matrix large = matrix::Constant(rows + 3, cols + 5, T(5));
    check(rx, ct, large_row.block(1, 2, rows, cols));
    check(cx, rt, large.block(1, 2, rows, cols));
    const auto count = (rows + 3) * (cols + 5) - rows * cols;
    CHECK((large_row.array() == T(5)).count() >= count);
    CHECK((large.array() == T(5)).count() >= count);
  }
}

TEMPLATE_TEST_CASE("element traversal: vectors with strides, backwards, in place", "[element]",
                   float, double) {
  using T = TestType;
  using view = perdita::vector_view<T>;
  const auto loss = a_loss<T>();
  for (const perdita::index size : {1, 17, 600, 40000}) {
    const auto n_elements = static_cast<std::size_t>(size);
    const auto x = random_vector<T>(n_elements, 5), t = random_vector<T>(n_elements, 6);
    std::vector<T> g(n_elements), wide_x(3 * n_elements, T(9)), wide_g(2 * n_elements, T(9));
    const T value = loss(x, t, g);
    const std::vector<T> backwards(t.rbegin(), t.rend());
    for (std::size_t i = 0; i < n_elements; ++i)
      wide_x[3 * i] = x[i];
    const perdita::vector_view<const T> reversed(backwards.data() + size - 1, size, -1);
    CHECK(loss(view(wide_x.data(), size, 3), reversed, view(wide_g.data(), size, 2)) == value);
    for (std::size_t i = 0; i < n_elements; ++i)
      REQUIRE((wide_g[2 * i] == g[i] && wide_g[2 * i + 1] == T(9)));
    auto same = x;
    CHECK(loss(same, t, same) == value);
    CHECK(same == g);
    CHECK(loss(view(wide_x.data(), size, 3), t, view(wide_x.data(), size, 3)) == value);
    for (std::size_t i = 0; i < n_elements; ++i)
      REQUIRE((wide_x[3 * i] == g[i] && wide_x[3 * i + 1] == T(9)));
  }
}

TEST_CASE("element traversal: sixteen bits, integers and images", "[element]") {
  const auto loss = a_loss<float>();
  for (const perdita::index size : {5, 512, 1500}) {
    std::vector<perdita::bfloat16> x16(static_cast<std::size_t>(size)), g16(x16.size());
    std::vector<float> x(x16.size()), g(x16.size()), t(x16.size());
    std::vector<std::int8_t> labels(x16.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      x16[i].bits = perdita::core::narrow_bfloat16(static_cast<float>(std::sin(double(i)) * 5));
      x[i] = perdita::core::widen_bfloat16(x16[i].bits);
      labels[i] = static_cast<std::int8_t>(i % 7) - 3;
      t[i] = static_cast<float>(labels[i]);
    }
    const float value = loss(x, t, g);
    CHECK(loss(x16, labels, g16) == value);
    for (std::size_t i = 0; i < x.size(); ++i)
      REQUIRE(g16[i].bits == perdita::core::narrow_bfloat16(g[i]));
    CHECK(loss(x16, labels, x16) == value); // in place
    CHECK(x16[0].bits == g16[0].bits);
  }
  // Classes first in predictions and gradient, rows of classes in the targets.
  const perdita::index images = 3, classes = 5, pixels = 70;
  const auto x = random_vector<float>(1050, 8), t = random_vector<float>(1050, 9);
  std::vector<float> g(1050);
  using images_view = perdita::matrix_view<float>;
  auto in = x;
  const auto at = images_view::channels_first(in.data(), images, classes, pixels);
  const auto out = images_view::channels_first(g.data(), images, classes, pixels);
  loss(at, perdita::matrix_view(t.data(), images * pixels, classes), out);
  for (perdita::index r = 0; r < images * pixels; ++r)
    for (perdita::index c = 0; c < classes; ++c) {
      const float d = at(r, c) - t[static_cast<std::size_t>(r * classes + c)];
      REQUIRE(out(r, c) == std::min(2.0F, std::max(-2.0F, d)));
    }
}

TEMPLATE_TEST_CASE("element traversal: weights, scales and reductions", "[element]", float,
                   double) {
  using T = TestType;
  for (const std::size_t size : {3U, 31U, 700U, 40001U}) {
    CAPTURE(size);
    auto x = random_vector<T>(size, 11);
    const auto t = random_vector<T>(size, 12);
    auto w = random_vector<T>(size, 13), u = random_vector<T>(size, 14);
    for (T& v : w)
      v = std::abs(v) + T(0.5);
    w[2] = -w[2];
    w[1] = 0; // and what has no weight may be anything
    x[1] = static_cast<T>(n);
    std::vector<T> v(size), g(size);
    a_loss<T>()(x, t, g, {.values = v});
    CHECK(std::isnan(v[1]));
    CHECK(std::isnan(g[1]));
    wide weights = 0, terms = 0;
    for (std::size_t i = 0; i < size; ++i) {
      weights += wide(w[i]);
      terms += i == 1 ? wide(0) : wide(T(v[i] * w[i]));
    }
    const double sum_w = static_cast<double>(weights), weighted_sum = static_cast<double>(terms);
    const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
    const auto near_sum = [&](T got, double share) {
      return std::abs(static_cast<double>(got) - weighted_sum * share) <=
             3 * epsilon * std::abs(weighted_sum * share);
    };
    std::vector<T> values(size), out(size, T(0.5));
    const perdita::element_options<T> call{
        .weights = w, .upstream = u, .scale = 8, .accumulate = true, .values = values};
    const auto slopes = [&](double share) {
      for (std::size_t i = 0; i < size; ++i) {
        CHECK((i == 1 ? values[i] == 0 : values[i] == v[i] * w[i]));
        const double s = i == 1 ? 0
                                : static_cast<double>(g[i]) * static_cast<double>(w[i]) *
                                      static_cast<double>(u[i]) * 8 * share;
        if (!(std::abs(static_cast<double>(out[i]) - (0.5 + s)) <=
              epsilon * (0.5 + 3 * std::abs(s))))
          return false;
        out[i] = T(0.5);
      }
      return true;
    };
    CHECK(near_sum(a_loss<T>()(x, t, out, call), 1));
    CHECK(slopes(1));
    CHECK(near_sum(a_loss<T>(reduction::sum)(x, t, out, call), 1));
    CHECK(slopes(1));
    CHECK(near_sum(a_loss<T>(reduction::mean)(x, t, out, call), 1 / sum_w));
    CHECK(slopes(1 / sum_w));
    auto by_seven = call;
    by_seven.normaliser = 7;
    CHECK(near_sum(a_loss<T>(reduction::mean)(x, t, out, by_seven), 1.0 / 7));
    CHECK(slopes(1.0 / 7));
    // The second order takes the same factors.
    std::vector<T> h(size), h_weighted(size);
    a_loss<T>().hessian_diagonal(x, t, h);
    a_loss<T>(reduction::mean).hessian_diagonal(x, t, h_weighted, {.weights = w, .scale = 8});
    for (std::size_t i = 0; i < size; ++i)
      CHECK((i == 1 ? h_weighted[i] == 0
                    : std::abs(static_cast<double>(h_weighted[i]) -
                               static_cast<double>(h[i] * w[i]) * 8 / sum_w) <=
                          3 * epsilon * std::abs(static_cast<double>(w[i]) * 8 / sum_w)));
    // Without weights the mean is over all; nothing left is 0.
    x[1] = 0;
    const T mean = a_loss<T>(reduction::mean)(x, t);
    CHECK(relative(mean, static_cast<double>(a_loss<T>()(x, t)) / double(size)) <= 1);
    const std::vector<T> nothing(size, T(0));
    CHECK(a_loss<T>(reduction::mean)(x, t, out, {.weights = nothing}) == 0);
    CHECK(out == nothing);
  }
}

TEMPLATE_TEST_CASE("element traversal: the same bits for any number of threads",
                   "[element][threads]", float, double) {
  using T = TestType;
  const std::size_t size = 300001;
  const auto x = random_vector<T>(size, 21), t = random_vector<T>(size, 22);
  auto w = random_vector<T>(size, 23);
  const auto loss = a_loss<T>(reduction::mean);
  perdita::workspace memory;
  std::vector<T> one(size), one_w(size), many(size), many_w(size), v(size), many_v(size);
  const T value = loss(x, t, one, {.run_on = perdita::serial, .memory = &memory});
  const T value_w = loss(x, t, one_w, {.weights = w, .values = v, .run_on = perdita::serial});
  CHECK(relative(value, static_cast<double>(a_loss<T>()(x, t)) / double(size)) <= 1);
  for (const std::size_t threads : {2U, 7U}) {
    const threads_executor pool(threads, task_order::shuffled);
    CHECK(loss(x, t, many, {.run_on = pool, .memory = &memory}) == value);
    CHECK(many == one);
    CHECK(loss(x, t, many_w, {.weights = w, .values = many_v, .run_on = pool}) == value_w);
    CHECK(many_w == one_w);
    CHECK(many_v == v);
  }
  const one_thread_executor reversed(task_order::reversed);
  CHECK(loss(x, t, many, {.run_on = reversed}) == value);
  CHECK(loss(x, t, many) == value);
}

namespace {

/// Numbers that start `offset` after a start of a line, and what lies around them.
template <class T> struct line_block {
  static constexpr std::size_t line = 64 / sizeof(T);
  std::vector<T> memory;
  T* data;
  perdita::index size;

  line_block(std::size_t count, std::size_t offset)
      : memory(count + 3 * line, T(9)), size(static_cast<perdita::index>(count)) {
    const auto beyond = reinterpret_cast<std::uintptr_t>(memory.data()) % 64 / sizeof(T);
    data = memory.data() + (line - beyond) % line + offset;
  }
  perdita::vector_view<T> view() const { return {data, size}; }
  bool holds(const std::vector<T>& expected) const {
    const auto others = std::count(memory.begin(), memory.end(), T(9));
    return std::memcmp(data, expected.data(), expected.size() * sizeof(T)) == 0 &&
           others == static_cast<std::ptrdiff_t>(3 * line) +
                         std::count(expected.begin(), expected.end(), T(9));
  }
};

} // namespace

TEMPLATE_TEST_CASE("element traversal: gradients that go past the caches are the same bits",
                   "[element][threads]", float, double) {
  using T = TestType;
  const std::size_t size = (std::size_t{4} << 20) / sizeof(T) + 1237;
  const auto tile_x = random_vector<T>(4999, 31), tile_t = random_vector<T>(4999, 32);
  std::vector<T> x(size), t(size), v(size);
  for (std::size_t i = 0; i < size; ++i) {
    x[i] = tile_x[i % 4999];
    t[i] = tile_t[7 * i % 4999];
    v[i] = T(0.5) + std::abs(tile_t[3 * i % 4999]);
  }
  const auto loss = a_loss<T>(reduction::mean);
  auto in_place = x; // nothing streams into what it reads
  const T value = loss(in_place, t, in_place, {.scale = 1e6});
  const threads_executor pool(3, task_order::shuffled);
  for (const std::size_t offset : {0U, 1U, 4U, 7U}) {
    CAPTURE(offset);
    const line_block<T> g(size, offset);
    CHECK(loss(x, t, g.view(), {.scale = 1e6, .run_on = pool}) == value);
    CHECK(g.holds(in_place));
  }
  // Two gradients at once, which start at different places of a line.
  const perdita::gaussian_nll<T> gaussian({.reduction = reduction::sum});
  auto of_mean = x, of_variance = v;
  const T both = gaussian(of_mean, t, of_variance, of_mean, of_variance);
  for (const std::size_t offset : {0U, 3U}) {
    const line_block<T> g(size, 0), h(size, offset);
    CHECK(gaussian(x, t, v, g.view(), h.view()) == both);
    CHECK(g.holds(of_mean));
    CHECK(h.holds(of_variance));
  }
}

TEST_CASE("element traversal: what goes past the caches", "[element]") {
  using perdita::core::as_elements;
  const perdita::core::huber_formula<float> formula{{}, 2};
  const perdita::index size = (perdita::index{1} << 20) + 1;
  std::vector<float> x(2 * static_cast<std::size_t>(size)), t(x.size()), g(x.size());
  const auto view = [](std::vector<float>& m, perdita::index count, perdita::index stride = 1) {
    return perdita::vector_view<float>(m.data(), count, stride);
  };
  const auto streams = [&](auto in, auto targets, auto out, auto change) {
    perdita::core::element_job<float> job("huber", perdita::core::element_function<float>(formula));
    job.in[0] = perdita::core::element_array<float>(as_elements(in));
    job.in[1] = perdita::core::element_array<float>(as_elements(targets));
    job.out[0] = perdita::core::element_array<float, true>(as_elements(out));
    change(job);
    job.settle();
    return job.streaming;
  };
  const auto as_it_is = [](auto&) {};
  CHECK(streams(view(x, size), view(t, size), view(g, size), as_it_is));
  CHECK_FALSE(streams(view(x, size - 1), view(t, size - 1), view(g, size - 1), as_it_is));
  CHECK_FALSE(streams(view(x, size), view(t, size), view(x, size), as_it_is));
  CHECK_FALSE(streams(view(x, size), view(t, size), view(t, size), as_it_is));
  CHECK_FALSE(streams(view(x, size), view(t, size), view(g, size, 2), as_it_is));
  CHECK_FALSE(streams(view(x, size), view(t, size), view(g, size),
                      [](auto& job) { job.accumulate = true; }));
  CHECK_FALSE(streams(view(x, size), view(t, size), view(g, size),
                      [](auto& job) { job.second_order = true; }));
  CHECK_FALSE(streams(view(x, size), view(t, size), view(g, size), [](auto& job) {
    job.out[0] = {}; // the value only
  }));
}

TEST_CASE("element traversal: bad input is refused, and nothing written", "[element]") {
  using Catch::Matchers::ContainsSubstring;
  const auto loss = a_loss<float>();
  std::vector<float> x(8, 1), t(8, 2), g(8, 3), few(7, 1), w(8, 1);
  const auto untouched = g;
  const auto refused = [&](const std::function<void()>& f, const char* message) {
    CHECK_THROWS_WITH(f(), ContainsSubstring(message) && ContainsSubstring("perdita::huber"));
    CHECK(g == untouched);
    CHECK(x == std::vector<float>(8, 1));
  };
  refused([&] { loss(x, few, g); }, "shape of targets is 1 x 7, expected 1 x 8");
  refused([&] { loss(x, t, few); }, "shape of gradient is 1 x 7");
  refused([&] { loss(x, perdita::matrix_view(t.data(), 2, 4), g); }, "shape of targets is 2 x 4");
  refused([&] { loss(x, t, g, {.weights = few}); }, "shape of weights is 1 x 7");
  refused([&] { loss(x, t, g, {.upstream = few}); }, "shape of upstream is 1 x 7");
  refused([&] { loss(x, t, g, {.values = few}); }, "shape of values is 1 x 7");
  refused([&] { loss.hessian_diagonal(x, t, few); }, "shape of result is 1 x 7");
  refused([&] { loss(perdita::vector_view<float>(nullptr, 8), t, g); }, "predictions is null");
  refused([&] { loss(x, t, g, {.normaliser = -1}); }, "normaliser is -1");
  refused([&] { loss(x, t, g, {.normaliser = inf}); }, "normaliser is inf");
  refused([&] { loss(x, t, x, {.accumulate = true}); }, "gradient overlaps the predictions");
  using view = perdita::vector_view<float>;
  refused([&] { loss(view(x.data(), 4), view(t.data(), 4), view(x.data() + 1, 4)); },
          "gradient overlaps the predictions");
  refused([&] { loss(view(x.data(), 4), view(t.data(), 4), view(x.data() + 3, 4, -1)); },
          "gradient overlaps the predictions");
  refused([&] { loss(view(x.data(), 4), view(g.data(), 4), view(g.data() + 2, 4)); },
          "gradient overlaps the targets");
  refused([&] { loss(x, t, g, {.weights = g}); }, "gradient overlaps the weights");
  refused([&] { loss(x, t, g, {.upstream = g}); }, "gradient overlaps upstream");
  refused([&] { loss(x, t, g, {.values = g}); }, "gradient overlaps the values");
  refused([&] { loss(x, t, {.values = x}); }, "the view of values overlaps the predictions");
  refused([&] { loss(x, t, {.weights = w, .values = w}); }, "values overlaps the weights");
  refused([&] { loss(x, t, g, {.upstream = w, .values = w}); }, "values overlaps upstream");
  const perdita::gaussian_nll<float> gaussian;
  CHECK_THROWS_WITH(gaussian(x, t, w, g, g), ContainsSubstring("overlaps the gradient"));
  CHECK_THROWS_WITH(gaussian(x, t, few), ContainsSubstring("shape of variance is 1 x 7"));
  CHECK(g == untouched);
}

} // namespace perdita_tests
