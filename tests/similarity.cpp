// SPDX-License-Identifier: MIT

// The similarity head against 113-bit sums over all pairs, written out here for each direction.

#include <perdita/similarity.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/z_loss.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/wide.hpp"

namespace perdita_tests {
namespace {

using perdita::index;
using perdita::matrix_view;

std::size_t at(index i) { return static_cast<std::size_t>(i); }

/// cross_entropy<double> without options, and so with one formula: all three, of both types, take
/// the compiler long. Those of float are here, those of double in the tests of the linear head.
class plain_cross_entropy : public perdita::row_loss<plain_cross_entropy, double> {
public:
  struct options {
    std::int64_t ignore_index = -100;
    perdita::reduction reduction = perdita::reduction::mean;
  };
  static constexpr const char* name = "cross_entropy";
  static constexpr bool has_softmax = true;
  options settings() const { return {}; }

private:
  friend perdita::row_loss<plain_cross_entropy, double>;
  template <class F> void visit(const perdita::core::row_job<double>&, F f) const {
    f(perdita::core::cross_entropy_formula<double, perdita::core::log_sum_exp>{{}, {}});
  }
};
template <class T>
using cross_entropy = std::conditional_t<std::is_same_v<T, float>, perdita::cross_entropy<float>,
                                         plain_cross_entropy>;

template <class T> struct matrix {
  index rows, cols;
  std::vector<T> data;

  matrix(index n, index d) : rows(n), cols(d), data(at(n * d)) {}
  matrix(index n, index d, random_numbers& random) : matrix(n, d) {
    for (T& x : data)
      x = static_cast<T>(random.normal());
  }
  matrix_view<const T> view() const { return {data.data(), rows, cols}; }
  matrix_view<T> out() { return {data.data(), rows, cols}; }
  T& operator()(index r, index c) { return data[at(r * cols + c)]; }
  T operator()(index r, index c) const { return data[at(r * cols + c)]; }
};

/// What is asked of the head: which directions, and whether cosines.
struct setting {
  double scale = 1;
  bool normalise = true, both = false, within = false;
};

/// Cross-entropies, and their gradients, of the definition.
class definition {
public:
  wide value = 0, d_scale = 0;
  std::vector<wide> d_x, d_y;
  std::vector<judged> size_x, size_y; ///< of the terms that add up to an entry
  std::vector<wide> values;

  template <class T>
  definition(const matrix<T>& x, const matrix<T>& y, const std::vector<std::int64_t>& labels,
             const setting& s, const std::vector<double>& weights)
      : d_x(x.data.size()), d_y(y.data.size()), size_x(d_x.size()), size_y(d_y.size()),
        values(at(x.rows)), rows_(x.rows), cols_(y.rows), depth_(x.cols), of_(s) {
    normalise(x, unit_x_, length_x_);
    normalise(y, unit_y_, length_y_);
    g_.assign(at(rows_ * cols_), 0);
    for (index i = 0; i < rows_; ++i)
      for (index j = 0; j < cols_; ++j)
        z_.push_back(score(i, j));
    wide all = 0;
    for (const double w : weights)
      all += w;
    const wide share = s.both ? wide(0.5) : wide(1);
    for (index i = 0; i < rows_; ++i)
      if (labels[at(i)] >= 0)
        add_row(i, labels[at(i)], weights[at(i)], share / all, false);
    for (index j = 0; s.both && j < cols_; ++j)
      add_row(j, j, weights[at(j)], share / all, true);
    spread();
  }

private:
  template <class T>
  void normalise(const matrix<T>& m, std::vector<wide>& unit, std::vector<wide>& length) const {
    for (index r = 0; r < m.rows; ++r) {
      wide square = 0;
      for (index k = 0; k < depth_; ++k)
        square += wide(m(r, k)) * m(r, k);
      length.push_back(of_.normalise ? wide(sqrt(square)) : wide(1));
      for (index k = 0; k < depth_; ++k)
        unit.push_back(length.back() > 0 ? wide(wide(m(r, k)) / length.back()) : wide(0));
    }
  }
  wide score(index i, index j) const {
    wide sum = 0;
    for (index k = 0; k < depth_; ++k)
      sum += unit_x_[at(i * depth_ + k)] * unit_y_[at(j * depth_ + k)];
    return of_.scale * sum;
  }
  /// Row i, or column i, whose label is y.
  void add_row(index i, std::int64_t y, double weight, const wide& share, bool column) {
    const index n = column ? rows_ : cols_;
    const auto place = [&](index j) { return at(column ? j * cols_ + i : i * cols_ + j); };
    std::vector<wide> image(at(n)); // e^{z − z_y}
    wide rivals = 0;
    for (index j = 0; j < n; ++j)
      if (j != y && !(of_.within && i == j)) {
        image[at(j)] = exp(wide(z_[place(j)] - z_[place(y)]));
        rivals += image[at(j)];
      }
    const wide loss = log1p(rivals), each = share * weight / (1 + rivals);
    value += share * weight * loss;
    values[at(i)] += (of_.both ? wide(0.5) : wide(1)) * weight * loss;
    for (index j = 0; j < n; ++j)
      if (!(of_.within && i == j)) {
        const wide g = each * (j == y ? wide(-rivals) : image[at(j)]);
        g_[place(j)] += g;
        d_scale += g * z_[place(j)] / of_.scale;
      }
  }
  static std::vector<judged> sizes(const std::vector<wide>& numbers) {
    std::vector<judged> result;
    for (const wide& x : numbers)
      result.push_back(std::abs(static_cast<judged>(x)));
    return result;
  }
  void spread() {
    std::vector<wide> to_x(d_x.size()), to_y(d_y.size());
    const std::vector<judged> of_x = sizes(unit_x_), of_y = sizes(unit_y_);
    for (index i = 0; i < rows_; ++i)
      for (index j = 0; j < cols_; ++j) {
        const wide g = of_.scale * g_[at(i * cols_ + j)];
        const judged of_g = std::abs(static_cast<judged>(g));
        for (index k = 0; k < depth_; ++k) {
          const std::size_t a = at(i * depth_ + k), b = at(j * depth_ + k);
          to_x[a] += g * unit_y_[b];
          to_y[b] += g * unit_x_[a];
          size_x[a] += of_g * of_y[b];
          size_y[b] += of_g * of_x[a];
        }
      }
    if (of_.within)
      for (std::size_t k = 0; k < to_x.size(); ++k) {
        to_x[k] += to_y[k];
        size_x[k] += size_y[k];
      }
    tangent(to_x, unit_x_, length_x_, rows_, d_x, size_x);
    tangent(to_y, unit_y_, length_y_, cols_, d_y, size_y);
  }
  /// The part across the embedding; its errors are those of all that it is the difference of.
  void tangent(const std::vector<wide>& g, const std::vector<wide>& unit,
               const std::vector<wide>& length, index n, std::vector<wide>& to,
               std::vector<judged>& size) const {
    const std::vector<judged> of_unit = sizes(unit), of_length = sizes(length);
    for (index r = 0; r < n; ++r) {
      wide dot = 0;
      judged error = 0;
      for (index k = 0; of_.normalise && k < depth_; ++k) {
        const std::size_t e = at(r * depth_ + k);
        dot += g[e] * unit[e];
        error += size[e] * of_unit[e];
      }
      const bool none = of_.normalise && length[at(r)] == 0;
      for (index k = 0; k < depth_; ++k) {
        const std::size_t e = at(r * depth_ + k);
        to[e] = none ? wide(0) : wide((g[e] - dot * unit[e]) / length[at(r)]);
        size[e] = none ? judged(0) : (size[e] + error * of_unit[e]) / of_length[at(r)];
      }
    }
  }

  index rows_, cols_, depth_;
  setting of_;
  std::vector<wide> unit_x_, unit_y_, length_x_, length_y_, z_, g_;
};

std::vector<std::int64_t> count_up(index n) {
  std::vector<std::int64_t> result;
  for (index i = 0; i < n; ++i)
    result.push_back(i);
  return result;
}
std::vector<std::int64_t> partners(index n) {
  std::vector<std::int64_t> result;
  for (index i = 0; i < n; ++i)
    result.push_back((i + n / 2) % n);
  return result;
}

} // namespace

// Of scores in T: D products and a few roundings, each ε/2 of at most s.  With that, as the loss of
// given scores.
TEMPLATE_TEST_CASE("similarity: values and gradients of cross-entropy", "[similarity]", float,
                   double) {
  using T = TestType;
  const wide epsilon = std::numeric_limits<T>::epsilon();
  random_numbers random(1);
  error_judge of_values, of_slopes;
  struct shape {
    index rows, cols, depth;
  };
  // Tiles of several sizes, with ends inside packs and products of more than one block.
  for (const shape& s : {shape{1, 1, 3}, shape{2, 2, 1}, shape{7, 7, 5}, shape{40, 40, 17},
                         shape{70, 70, 18}, shape{33, 70, 19}, shape{70, 9, 300}})
    for (const setting& how : {setting{1}, setting{20}, setting{0.5, false}, setting{5, true, true},
                               setting{0.5, false, true}, setting{5, true, false, true},
                               setting{0.25, false, false, true}}) {
      if ((how.both && s.rows != s.cols) || (how.within && (s.rows != s.cols || s.rows < 2)))
        continue;
      const matrix<T> x(s.rows, s.depth, random);
      const matrix<T> y = how.within ? x : matrix<T>(s.cols, s.depth, random);
      const auto labels = how.within ? partners(s.rows) : [&] {
        auto l = count_up(s.rows);
        for (auto& label : l)
          label %= s.cols;
        return l;
      }();
      const std::vector<double> ones(at(s.rows), 1);
      const definition expected(x, y, labels, how, ones);
      double d_scale = -1;
      const perdita::similarity head(
          cross_entropy<T>(),
          {.scale = how.scale, .normalise = how.normalise, .both = how.both, .d_scale = &d_scale});
      matrix<T> d_x(s.rows, s.depth), d_y(s.cols, s.depth);
      std::vector<T> values(at(s.rows));
      const perdita::call_options<T> call{.values = values};
      T value = 0, alone = 0;
      if (how.within) {
        value = head.within(x.view(), labels, d_x.out(), call);
        alone = head.within(x.view(), labels, call);
      } else if (how.both || s.rows == s.cols) {
        value = head(x.view(), y.view(), d_x.out(), d_y.out(), call);
        alone = head(x.view(), y.view(), call);
      } else {
        value = head(x.view(), y.view(), labels, d_x.out(), d_y.out(), call);
        alone = head(x.view(), y.view(), labels, call);
      }
      CHECK(value == alone);
      INFO(s.rows << " x " << s.cols << " x " << s.depth << ", scale " << how.scale << ", both "
                  << how.both << ", within " << how.within);
      // What the scores' own error makes of a loss: at most twice it. Not normalised, they grow.
      const double largest =
          how.scale * (how.normalise ? 1 : 4 * static_cast<double>(s.depth) + 30);
      const double noise =
          (0.5 * std::sqrt(static_cast<double>(s.depth)) + 3) * largest; // roundings that add up
      CHECK(of_values.within(size_of(wide(value - expected.value)), 4,
                             wide(epsilon * (noise + expected.value))));
      for (index i = 0; i < s.rows; ++i)
        CHECK(of_values.within(size_of(wide(values[at(i)] - expected.values[at(i)])), 4,
                               wide(epsilon * (noise + expected.values[at(i)]))));
      bool right = true;
      const auto compare = [&](const matrix<T>& got, const std::vector<wide>& want,
                               const std::vector<judged>& size) {
        for (std::size_t k = 0; k < want.size(); ++k)
          right = of_slopes.within(size_of(wide(got.data[k] - want[k])), 4,
                                   wide(epsilon * ((noise + 4) * size[k] + 1e-30L))) &&
                  right;
      };
      compare(d_x, expected.d_x, expected.size_x);
      if (!how.within)
        compare(d_y, expected.d_y, expected.size_y);
      CHECK(right);
      CHECK(size_of(wide(d_scale - expected.d_scale)) <=
            4 * epsilon * (noise + 4) * (largest / how.scale));
    }
  report_accuracy<T>(
      "similarity", "cross_entropy", in_epsilons_of_terms,
      {of_values.worst(), of_slopes.worst(), std::max(of_values.share(), of_slopes.share())});
}

TEMPLATE_TEST_CASE("similarity: the same as the loss of a matrix of scores", "[similarity]", float,
                   double) {
  // Any loss, with labels, weights, ignored rows, upstream factors: rows only.
  using T = TestType;
  random_numbers random(2);
  const index rows = 45, cols = 70, depth = 23;
  const matrix<T> x(rows, depth, random), y(cols, depth, random);
  std::vector<std::int64_t> labels;
  std::vector<T> weights, upstream;
  for (index i = 0; i < rows; ++i) {
    labels.push_back(i % 7 == 3 ? -100 : i * 3 % cols);
    weights.push_back(static_cast<T>(i % 5) / 4);
    upstream.push_back(static_cast<T>(1 + i % 3) / 2);
  }
  std::vector<T> values(at(rows)), other_values(at(rows));
  perdita::call_options<T> call{.row_weights = weights, .upstream = upstream, .scale = T(0.75)};
  const auto check = [&](const auto& loss) {
    const perdita::similarity head(loss, {.scale = 2, .normalise = false});
    matrix<T> d_x(rows, depth), d_y(cols, depth), scores(rows, cols), g(rows, cols);
    for (index i = 0; i < rows; ++i)
      for (index j = 0; j < cols; ++j) {
        double sum = 0;
        for (index k = 0; k < depth; ++k)
          sum += static_cast<double>(x(i, k)) * static_cast<double>(y(j, k));
        scores(i, j) = static_cast<T>(2 * sum);
      }
    call.values = values;
    const T value = head(x.view(), y.view(), labels, d_x.out(), d_y.out(), call);
    call.values = other_values;
    const T expected = loss(scores.view(), labels, g.out(), call);
    const double tolerance = 400 * static_cast<double>(std::numeric_limits<T>::epsilon());
    CHECK(std::abs(value - expected) <= tolerance * std::abs(expected));
    bool right = true;
    for (index i = 0; i < rows; ++i)
      right = right && std::abs(values[at(i)] - other_values[at(i)]) <=
                           tolerance * (1 + other_values[at(i)]);
    const auto product = [&](index i, index k, bool of_x) {
      double sum = 0;
      for (index j = 0; j < (of_x ? cols : rows); ++j)
        sum += 2 * static_cast<double>(of_x ? g(i, j) : g(j, i)) *
               static_cast<double>(of_x ? y(j, k) : x(j, k));
      return sum;
    };
    for (index i = 0; i < rows; i += 3)
      for (index k = 0; k < depth; ++k)
        right =
            right && std::abs(static_cast<double>(d_x(i, k)) - product(i, k, true)) <= tolerance;
    for (index j = 0; j < cols; j += 5)
      for (index k = 0; k < depth; ++k)
        right =
            right && std::abs(static_cast<double>(d_y(j, k)) - product(j, k, false)) <= tolerance;
    CHECK(right);
  };
  if constexpr (std::is_same_v<T, float>) {
    check(cross_entropy<T>({.label_smoothing = T(0.1)}));
    check(perdita::z_loss<T>());
  } else {
    check(cross_entropy<T>());
  }
}

TEST_CASE("similarity: the same bits for any threads, layout and memory", "[similarity]") {
  using T = float;
  random_numbers random(3);
  const index n = 300, depth = 40;
  const matrix<T> x(n, depth, random), y(n, depth, random);
  const auto labels = partners(n);
  double d_scale = 0;
  const perdita::similarity head(cross_entropy<T>(),
                                 {.scale = 7, .both = true, .d_scale = &d_scale});
  matrix<T> d_x(n, depth), d_y(n, depth), d_v(n, depth);
  const T value = head(x.view(), y.view(), d_x.out(), d_y.out());
  const double of_scale = d_scale;
  const T within = head.within(x.view(), labels, d_v.out());
  perdita::workspace memory;
  perdita::call_options<T> call;
  call.memory = &memory;
  for (const unsigned threads : {2U, 3U, 16U}) {
    const threads_executor many(threads, task_order::shuffled);
    call.run_on = many;
    matrix<T> e_x(n, depth), e_y(n, depth), e_v(n, depth);
    CHECK(head(x.view(), y.view(), e_x.out(), e_y.out(), call) == value);
    CHECK(d_scale == of_scale);
    CHECK(head.within(x.view(), labels, e_v.out(), call) == within);
    CHECK(e_x.data == d_x.data);
    CHECK(e_y.data == d_y.data);
    CHECK(e_v.data == d_v.data);
  }
  call.run_on = {};
  // Column-major in and out; and added to what is there.
  matrix<T> across(depth, n), out(depth, n);
  for (index r = 0; r < n; ++r)
    for (index c = 0; c < depth; ++c)
      across(c, r) = x(r, c);
  const matrix_view<const T> turned(across.data.data(), n, depth, 1, n);
  const matrix_view<T> turned_out(out.data.data(), n, depth, 1, n);
  matrix<T> sum = d_y;
  call.accumulate = true;
  CHECK(head(turned, y.view(), turned_out, sum.out(), call) == value);
  bool same = true;
  for (index r = 0; r < n; ++r)
    for (index c = 0; c < depth; ++c)
      same = same && out(c, r) == d_x(r, c) && sum(r, c) == d_y(r, c) + d_y(r, c);
  CHECK(same);
}

TEST_CASE("similarity: known values", "[similarity]") {
  using T = double;
  const perdita::similarity head(cross_entropy<T>(), {.scale = 10, .both = true});
  // All equal: every partner is as likely as every other.
  matrix<T> x(6, 4);
  std::fill(x.data.begin(), x.data.end(), 0.3);
  matrix<T> d_x(6, 4), d_y(6, 4);
  CHECK(std::abs(head(x.view(), x.view(), d_x.out(), d_y.out()) - std::log(6.0)) < 1e-14);
  CHECK(std::abs(head.within(x.view(), partners(6)) - std::log(5.0)) < 1e-14);
  for (const T g : d_x.data)
    CHECK(std::abs(g) < 1e-14);
  // One pair.
  matrix<T> one(1, 4), d_one(1, 4), d_other(1, 4);
  std::fill(one.data.begin(), one.data.end(), 2.0);
  CHECK(head(one.view(), one.view(), d_one.out(), d_other.out()) == 0);
  CHECK(d_one.data == std::vector<T>(4, 0));
  // No pair; no row, but something to compare it with.
  const matrix<T> none(0, 4);
  matrix<T> d_none(0, 4);
  CHECK(head(none.view(), none.view(), d_none.out(), d_none.out()) == 0);
  double d_scale = 7;
  const perdita::similarity rows(cross_entropy<T>(), {.d_scale = &d_scale});
  CHECK(rows(none.view(), x.view(), std::vector<std::int64_t>(), d_none.out(), d_x.out()) == 0);
  CHECK((d_x.data == std::vector<T>(24, 0) && d_scale == 0));
  // Scaled embeddings are the same, their gradients shorter; gradients are across them.
  random_numbers random(5);
  const matrix<T> a(9, 5, random), b(9, 5, random);
  matrix<T> larger_a = a, d_a(9, 5), d_b(9, 5), d_larger(9, 5);
  for (T& v : larger_a.data)
    v *= 1024;
  const T value = head(a.view(), b.view(), d_a.out(), d_b.out());
  CHECK(head(larger_a.view(), b.view(), d_larger.out(), d_b.out()) == value);
  for (index r = 0; r < 9; ++r) {
    double dot = 0, size = 0;
    for (index k = 0; k < 5; ++k) {
      CHECK(d_larger(r, k) * 1024 == d_a(r, k));
      dot += a(r, k) * d_a(r, k);
      size += std::abs(a(r, k) * d_a(r, k));
    }
    CHECK(std::abs(dot) <= 1e-13 * size + 1e-16);
  }
}

TEMPLATE_TEST_CASE("similarity: zero vectors, duplicates, masks, NaN", "[similarity]", float,
                   double) {
  using T = TestType;
  random_numbers random(6);
  const index n = 20, depth = 6;
  matrix<T> x(n, depth, random), y(n, depth, random), d_x(n, depth), d_y(n, depth);
  const perdita::similarity head(cross_entropy<T>(), {.scale = 4, .both = true});
  for (index k = 0; k < depth; ++k) {
    x(3, k) = 0;
    y(5, k) = std::numeric_limits<T>::denorm_min();
    y(7, k) = y(6, k);
    x(8, k) *= T(1e18);
    x(9, k) *= T(1e-18);
  }
  const T value = head(x.view(), y.view(), d_x.out(), d_y.out());
  CHECK(std::isfinite(value));
  for (index r = 0; r < n; ++r)
    for (index k = 0; k < depth; ++k) {
      CHECK(std::isfinite(d_x(r, k)));
      CHECK(std::isfinite(d_y(r, k)));
      CHECK((r != 3 || d_x(r, k) == 0));
      CHECK((r != 5 || d_y(r, k) == 0));
    }
  // A row that has nothing left to be compared with.
  matrix<T> one(1, depth, random), d_one(1, depth);
  CHECK(head.within(one.view(), std::vector<int>{0}, d_one.out()) ==
        std::numeric_limits<T>::infinity());
  // Vectors so short that the scale over their length is beyond T spoil nothing.
  matrix<T> a(3, depth, random), b(3, depth, random), d_a(3, depth), d_b(3, depth);
  const perdita::similarity steep(cross_entropy<T>(), {.scale = 128, .both = true});
  const T plain = steep(a.view(), b.view(), d_a.out(), d_b.out());
  const matrix<T> slopes_a = d_a, slopes_b = d_b;
  constexpr int down = 6 - std::numeric_limits<T>::max_exponent;
  for (index k = 0; k < depth; ++k) {
    a(1, k) = std::ldexp(a(1, k), down);
    b(2, k) = std::ldexp(b(2, k), down);
  }
  CHECK(std::abs(steep(a.view(), b.view(), d_a.out(), d_b.out()) - plain) <=
        64 * std::numeric_limits<T>::epsilon() * plain);
  for (index r = 0; r < 3; ++r)
    for (index k = 0; k < depth; ++k) {
      const T tolerance = 4096 * std::numeric_limits<T>::epsilon();
      CHECK((r == 1 || std::abs(d_a(r, k) - slopes_a(r, k)) <= tolerance));
      CHECK((r == 2 || std::abs(d_b(r, k) - slopes_b(r, k)) <= tolerance));
    }
  // NaN reaches its own row, and whoever is compared with it.
  const perdita::similarity rows(cross_entropy<T>(), {.scale = 4});
  x(4, 2) = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> values(at(n));
  CHECK(std::isnan(rows(x.view(), y.view(), {.values = values})));
  for (index r = 0; r < n; ++r)
    CHECK(std::isnan(values[at(r)]) == (r == 4));
}

namespace {
void refuses(const std::function<void()>& call, const char* why) {
  CHECK_THROWS_WITH(call(), Catch::Matchers::ContainsSubstring(why));
}
} // namespace

TEST_CASE("similarity: errors come before anything is written", "[similarity]") {
  using T = float;
  random_numbers random(7);
  const matrix<T> x(4, 3, random), y(4, 3, random), more(5, 3, random), wider(4, 2, random);
  matrix<T> d_x(4, 3), d_y(4, 3), d_more(5, 3);
  const std::vector<int> labels{0, 1, 2, 3}, ignored{0, -100, 2, 3}, outside{0, 1, 2, 4};
  const std::vector<T> weights{1, 0, 1, 1};
  using loss = cross_entropy<T>;
  refuses([&] { perdita::similarity(loss(), {.scale = 0}); }, "scale");
  refuses([&] { perdita::similarity(loss(), {.scale = std::numeric_limits<double>::infinity()}); },
          "scale");
  const perdita::similarity rows{loss()}, both(loss(), {.both = true});
  refuses([&] { rows(x.view(), more.view()); }, "rows of y is 5");
  refuses([&] { rows(x.view(), wider.view()); }, "columns of y is 2");
  refuses([&] { rows(x.view(), y.view(), d_more.out(), d_y.out()); },
          "rows of the gradient of x is 5");
  refuses([&] { rows(x.view(), y.view(), d_x.out(), d_x.out()); }, "overlap");
  refuses([&] { rows(x.view(), y.view(), outside, d_x.out(), d_y.out()); }, "label");
  refuses([&] { both(x.view(), y.view(), labels, d_x.out(), d_y.out()); }, "labels");
  refuses([&] { both(x.view(), y.view(), d_x.out(), d_y.out(), {.row_weights = weights}); },
          "row_weights");
  refuses([&] { rows.within(x.view(), ignored, d_x.out()); }, "labels[1] is -100");
  CHECK(d_x.data == std::vector<T>(12, 0));
}

namespace {

/// What a batch is found to be, in whatever pieces.
template <class T> struct batch_answer {
  T value = 0;
  double d_scale = 0;
  matrix<T> d_x, d_y;
  std::vector<T> values;
  std::vector<unsigned char> hits; ///< of the rows

  batch_answer(index rows, index cols, index depth)
      : d_x(rows, depth), d_y(cols, depth), values(at(rows)), hits(at(rows)) {}
  bool operator==(const batch_answer& b) const {
    return value == b.value && d_scale == b.d_scale && d_x.data == b.d_x.data &&
           d_y.data == b.d_y.data && values == b.values && hits == b.hits;
  }
};

/// The largest difference over the largest number, in units of epsilon.
template <class T> double off(const std::vector<T>& a, const std::vector<T>& b) {
  double most = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::abs(static_cast<double>(a[i] - b[i])));
    size = std::max(size, std::abs(static_cast<double>(b[i])));
  }
  return most / size / static_cast<double>(std::numeric_limits<T>::epsilon());
}
template <class T> double off_values(const batch_answer<T>& a, const batch_answer<T>& b) {
  return std::max(off<T>({a.value}, {b.value}), off(a.values, b.values));
}
template <class T> double off_slopes(const batch_answer<T>& a, const batch_answer<T>& b) {
  return std::max({off(a.d_x.data, b.d_x.data), off(a.d_y.data, b.d_y.data),
                   off<T>({static_cast<T>(a.d_scale)}, {static_cast<T>(b.d_scale)})});
}

using cuts = std::vector<index>; // where pieces begin

template <class T> class cut_batch {
public:
  cut_batch(const matrix<T>& x, const matrix<T>& y, double scale) : x_(x), y_(y), scale_(scale) {}

  /// With labels, or of pairs.
  std::vector<std::int64_t> labels;
  std::vector<T> weights;
  perdita::executor run_on = perdita::serial;
  bool apart = false;  ///< gradients of pieces are made by themselves and then added
  bool within = false; ///< x and y are one batch, none of which is compared with itself

  /// Adds one direction, times `share`, made as whoever has only these pieces makes it.
  template <class Loss>
  void add(const Loss& loss, const cuts& of_x, const cuts& of_y, T share, batch_answer<T>& to,
           bool exchanged = false) const {
    const matrix<T>&x = exchanged ? y_ : x_, &y = exchanged ? x_ : y_;
    matrix<T>&d_x = exchanged ? to.d_y : to.d_x, &d_y = exchanged ? to.d_x : to.d_y;
    double sum = static_cast<double>(x.rows), part = 0;
    if (!weights.empty()) {
      sum = 0;
      for (index i = 0; i < x.rows; ++i)
        sum += labels[at(i)] >= 0 ? static_cast<double>(weights[at(i)]) : 0;
    }
    const perdita::similarity head(loss, {.scale = scale_, .d_scale = apart ? &part : &to.d_scale});
    for (std::size_t r = 0; r < of_x.size(); ++r) {
      const index first = of_x[r], rows = size_of(of_x, r, x.rows);
      std::vector<T> values(at(rows));
      std::vector<unsigned char> hits(at(rows));
      perdita::call_options<T> call{.scale = share, .normaliser = sum, .accumulate = !apart};
      call.values = values;
      call.hits = hits;
      call.run_on = run_on;
      if (!weights.empty())
        call.row_weights = perdita::vector_view<const T>(weights.data() + first, rows);
      const auto slice = [&](std::size_t c) {
        const matrix_view<const T> some = piece<const T>(x.data, first, rows),
                                   others =
                                       piece<const T>(y.data, of_y[c], size_of(of_y, c, y.rows));
        if (labels.empty())
          return head.slice(some, others, first, of_y[c], y.rows, call);
        const perdita::vector_view<const std::int64_t> own(labels.data() + first, rows);
        return within ? head.slice_within(some, others, own, first, of_y[c], y.rows, call)
                      : head.slice(some, others, own, of_y[c], y.rows, call);
      };
      using records = std::vector<perdita::similarity_record>;
      records all(at(rows));
      slice(0).summarise(all);
      for (std::size_t c = 1; c < of_y.size(); ++c) {
        records more(at(rows));
        slice(c).summarise(more);
        slice(0).merge(all, more);
      }
      to.value += share * slice(of_y.size() - 1).finish(all);
      for (index i = 0; i < rows; ++i)
        to.values[at(first + i)] += share * values[at(i)];
      if (!exchanged)
        std::copy(hits.begin(), hits.end(), to.hits.begin() + first);
      std::fill(values.begin(), values.end(), T(0)); // what backward() leaves alone
      for (std::size_t c = 0; c < of_y.size(); ++c) {
        const index others = size_of(of_y, c, y.rows);
        if (!apart) {
          slice(c).backward(all, piece<T>(d_x.data, first, rows),
                            piece<T>(d_y.data, of_y[c], others));
          continue;
        }
        matrix<T> e_x(rows, x.cols), e_y(others, x.cols);
        slice(c).backward(all, e_x.out(), e_y.out());
        to.d_scale += part;
        add_to(d_x.data, first, e_x);
        add_to(d_y.data, of_y[c], e_y);
      }
      CHECK(values == std::vector<T>(at(rows)));
    }
  }

private:
  static index size_of(const cuts& of, std::size_t i, index all) {
    return (i + 1 < of.size() ? of[i + 1] : all) - of[i];
  }
  template <class U, class V> matrix_view<U> piece(V& data, index first, index rows) const {
    return {data.data() + first * x_.cols, rows, x_.cols};
  }
  static void add_to(std::vector<T>& to, index first, const matrix<T>& m) {
    for (index k = 0; k < m.rows * m.cols; ++k)
      to[at(first * m.cols + k)] += m.data[at(k)];
  }

  const matrix<T>&x_, &y_;
  double scale_;
};

} // namespace

TEMPLATE_TEST_CASE("similarity: 1, 2, 3 and 7 uneven slices give what the whole batch gives",
                   "[similarity]", float, double) {
  using T = TestType;
  random_numbers random(9);
  const index n = 150, depth = 19;
  const double scale = 9;
  const matrix<T> x(n, depth, random), y(n, depth, random);
  const cross_entropy<T> loss;
  const threads_executor many(3, task_order::shuffled);
  double of_values = 0, of_slopes = 0;
  for (const bool both : {false, true}) {
    batch_answer<T> whole(n, n, depth);
    const perdita::similarity head(loss, {.scale = scale, .both = both, .d_scale = &whole.d_scale});
    whole.value = head(x.view(), y.view(), whole.d_x.out(), whole.d_y.out(),
                       {.values = whole.values, .hits = whole.hits});
    for (const cuts& of_y : {cuts{0}, cuts{0, 70}, cuts{0, 1, 149}, cuts{0, 50, 50},
                             cuts{0, 3, 17, 64, 65, 111, 149}}) {
      std::vector<T> values;
      for (const cuts& of_x : {cuts{0}, cuts{0, 1, 83}}) {
        const auto ask = [&](const perdita::executor& run_on, bool apart) {
          cut_batch<T> batch(x, y, scale);
          batch.run_on = run_on;
          batch.apart = apart;
          batch_answer<T> a(n, n, depth);
          batch.add(loss, of_x, of_y, both ? T(0.5) : T(1), a);
          if (both)
            batch.add(loss, of_y, of_x, T(0.5), a, true);
          return a;
        };
        const batch_answer<T> a = ask(perdita::serial, false);
        INFO(of_x.size() << " x " << of_y.size() << " pieces, both " << both);
        of_values = std::max(of_values, off_values(a, whole));
        of_slopes = std::max(of_slopes, off_slopes(a, whole));
        CHECK(off_values(a, whole) <= 24);
        CHECK(off_slopes(a, whole) <= 24);
        CHECK(a.hits == whole.hits);
        CHECK(ask(many, false) == a);
        CHECK(ask(perdita::serial, true) == a);
        if (both)
          continue;
        CHECK((of_x.size() > 1 || of_y.size() > 1 || a == whole)); // nothing was merged
        CHECK((of_x.size() == 1 || a.values == values));           // however the rows are cut
        values = a.values;
      }
    }
  }
  report_accuracy<T>("similarity slices", "cross_entropy", "ε of the largest",
                     {of_values, of_slopes, std::max(of_values, of_slopes) / 24});
}

TEST_CASE("similarity: slices with labels, weights and by-products", "[similarity]") {
  using T = float;
  random_numbers random(10);
  const index rows = 60, cols = 170, depth = 11;
  const matrix<T> x(rows, depth, random), y(cols, depth, random);
  cut_batch<T> batch(x, y, 6);
  for (index i = 0; i < rows; ++i) {
    batch.labels.push_back(i % 7 == 3 ? -100 : i * 31 % cols);
    batch.weights.push_back(static_cast<T>(i % 5) / 4);
  }
  const cross_entropy<T> loss({.label_smoothing = T(0.1)});
  batch_answer<T> whole(rows, cols, depth);
  const perdita::similarity head(loss, {.scale = 6, .d_scale = &whole.d_scale});
  whole.value = head(x.view(), y.view(), batch.labels, whole.d_x.out(), whole.d_y.out(),
                     {.row_weights = batch.weights, .values = whole.values, .hits = whole.hits});
  for (const cuts& of_x : {cuts{0}, cuts{0, 3, 4, 40}}) // 3 has no loss
    for (const cuts& of_y : {cuts{0}, cuts{0, 20, 165}}) {
      batch_answer<T> a(rows, cols, depth);
      batch.add(loss, of_x, of_y, 1, a);
      CHECK(off_values(a, whole) <= 24);
      CHECK(off_slopes(a, whole) <= 24);
      CHECK(a.hits == whole.hits);
    }
  // The last two records first.
  const auto slice = [&](index first, index n) {
    return head.slice(x.view(), matrix_view<const T>(y.data.data() + first * depth, n, depth),
                      batch.labels, first, cols, {.row_weights = batch.weights});
  };
  std::vector<perdita::similarity_record> all(at(rows)), more(at(rows)), last(at(rows));
  slice(0, 20).summarise(all);
  slice(20, 145).summarise(more);
  slice(165, 5).summarise(last);
  slice(0, 20).merge(more, last);
  slice(0, 20).merge(all, more);
  CHECK(off<T>({slice(0, 20).finish(all)}, {whole.value}) <= 24);
}

TEMPLATE_TEST_CASE("similarity: slices of a batch within itself", "[similarity]", float, double) {
  using T = TestType;
  random_numbers random(11);
  const index n = 130, depth = 13;
  const matrix<T> x(n, depth, random);
  cut_batch<T> batch(x, x, 7);
  batch.within = true;
  batch.labels = partners(n);
  const threads_executor many(3, task_order::shuffled);
  const cross_entropy<T> loss;
  batch_answer<T> whole(n, n, depth);
  const perdita::similarity head(loss, {.scale = 7, .d_scale = &whole.d_scale});
  whole.value = head.within(x.view(), batch.labels, whole.d_x.out(),
                            {.values = whole.values, .hits = whole.hits});
  for (const cuts& of_x : {cuts{0}, cuts{0, 1, 83}})
    for (const cuts& of_y : {cuts{0}, cuts{0, 1, 129}, cuts{0, 16, 90, 90}}) {
      INFO(of_x.size() << " x " << of_y.size() << " pieces");
      const auto ask = [&](const perdita::executor& run_on) {
        batch.run_on = run_on;
        batch_answer<T> a(n, n, depth);
        batch.add(loss, of_x, of_y, 1, a);
        return a;
      };
      batch_answer<T> a = ask(perdita::serial);
      CHECK(ask(many) == a);
      for (std::size_t k = 0; k < a.d_x.data.size(); ++k) {
        a.d_x.data[k] += a.d_y.data[k];
        a.d_y.data[k] = 0;
      }
      CHECK(off_values(a, whole) <= 24);
      CHECK(off_slopes(a, whole) <= 24);
      CHECK(a.hits == whole.hits);
    }
  CHECK_THROWS_WITH(head.slice_within(x.view(), x.view(), batch.labels, 1, 0, n),
                    Catch::Matchers::ContainsSubstring("first_x is 1"));
}

TEST_CASE("similarity: a slice refuses what cannot be its", "[similarity]") {
  using T = float;
  random_numbers random(11);
  const matrix<T> x(4, 3, random), y(2, 3, random);
  matrix<T> d_x(4, 3), d_y(2, 3), d_more(5, 3);
  double d_scale = 7;
  const cross_entropy<T> loss;
  const perdita::similarity head(loss, {.d_scale = &d_scale});
  const perdita::similarity both(loss, {.both = true});
  const std::vector<int> labels{0, 4, 2, 3}, outside{0, 5, 2, 3}, few_labels{0, 1};
  const auto of_pairs = [&](index first_x, index first_y) {
    return head.slice(x.view(), y.view(), first_x, first_y, 5);
  };
  refuses([&] { both.slice(x.view(), y.view(), 0, 0, 5); }, "both is 1");
  refuses([&] { of_pairs(0, -1); }, "first_y is -1");
  refuses([&] { of_pairs(0, 4); }, "first_y is 4");
  refuses([&] { of_pairs(-1, 0); }, "first_x is -1");
  refuses([&] { of_pairs(2, 0); }, "first_x is 2");
  refuses([&] { head.slice(x.view(), y.view(), labels, 0, 1); }, "first_y is 0");
  refuses([&] { head.slice(x.view(), y.view(), few_labels, 0, 5); }, "labels is 2");
  const perdita::similarity_record mark{1, {2, 3, 4, 5}, 6, 7, 8};
  std::vector<perdita::similarity_record> records(4, mark), few(3, mark);
  const auto slice = of_pairs(1, 3);
  refuses([&] { head.slice(x.view(), y.view(), outside, 3, 5).summarise(records); },
          "labels[1] is 5");
  refuses([&] { slice.summarise(few); }, "number of records is 3");
  refuses([&] { slice.merge(records, few); }, "number of records is 3");
  refuses([&] { slice.merge(few, records); }, "number of records is 3");
  refuses([&] { slice.finish(few); }, "number of records is 3");
  refuses([&] { slice.backward(few, d_x.out(), d_y.out()); }, "number of records is 3");
  refuses([&] { slice.backward(records, d_more.out(), d_y.out()); },
          "rows of the gradient of x is 5");
  refuses([&] { slice.backward(records, d_x.out(), d_x.out()); }, "rows of the gradient of y is 4");
  refuses([&] { slice.backward(records, d_x.out(), matrix_view<T>(d_x.data.data(), 2, 3)); },
          "overlap");
  refuses(
      [&] {
        head.slice(x.view(), y.view(), outside, 3, 5).backward(records, d_x.out(), d_y.out());
      },
      "labels[1] is 5");
  const auto untouched = [&](const auto& all) {
    return std::all_of(all.begin(), all.end(), [&](const perdita::similarity_record& r) {
      return r.shift == mark.shift && std::equal(r.term, r.term + 4, mark.term) &&
             r.rivals == mark.rivals && r.raw_target == mark.raw_target &&
             r.has_target == mark.has_target;
    });
  };
  CHECK((untouched(records) && untouched(few) && d_scale == 7));
  CHECK((d_x.data == std::vector<T>(12, 0) && d_y.data == std::vector<T>(6, 0)));
}

TEST_CASE("similarity: threads", "[similarity][threads]") {
  using T = float;
  random_numbers random(8);
  const index n = 200, depth = 12;
  const matrix<T> x(n, depth, random), y(n, depth, random);
  matrix<T> d_x(n, depth), d_y(n, depth), e_x(n, depth), e_y(n, depth);
  const perdita::similarity head(perdita::z_loss<T>(), {.scale = 7, .both = true});
  const T value = head(x.view(), y.view(), d_x.out(), d_y.out());
  const threads_executor many(4, task_order::forward);
  perdita::call_options<T> call;
  call.run_on = many;
  CHECK(head(x.view(), y.view(), e_x.out(), e_y.out(), call) == value);
  CHECK(e_x.data == d_x.data);
  CHECK(e_y.data == d_y.data);
}

} // namespace perdita_tests
