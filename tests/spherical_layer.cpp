// SPDX-License-Identifier: MIT

// The spherical layer against an explicit one: all outputs, their gradient from the definition of
// the loss, and gradient descent on every weight, in long double.

#include <perdita/spherical_layer.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

using real = long double;
using perdita::index;
using perdita::matrix_view;

std::size_t at(index i) { return static_cast<std::size_t>(i); }

enum class kind { squared, spherical, taylor, z };
constexpr kind all_kinds[] = {kind::squared, kind::spherical, kind::taylor, kind::z};
constexpr double epsilon = 0.25, sharpness = 0.5, pull = 1.5;
std::string name_of(kind k) {
  const char* const names[] = {"squared error", "spherical softmax", "Taylor softmax", "Z-loss"};
  return names[static_cast<int>(k)];
}

/// Calls use(loss).
template <class T, class Use> auto with_loss(kind k, perdita::reduction r, Use use) {
  switch (k) {
  case kind::squared:
    return use(perdita::sparse_squared_error<T>({.ignore_index = -7, .reduction = r}));
  case kind::spherical:
    return use(
        perdita::spherical_softmax<T>({.epsilon = T(epsilon), .ignore_index = -7, .reduction = r}));
  case kind::taylor:
    return use(perdita::taylor_softmax<T>({.ignore_index = -7, .reduction = r}));
  default:
    return use(
        perdita::z_loss<T>({.a = T(sharpness), .b = T(pull), .ignore_index = -7, .reduction = r}));
  }
}

/// A row's target: classes and weights, of which some may be named twice.
struct targets {
  std::vector<std::int32_t> classes;
  std::vector<double> weights;
  std::vector<std::int64_t> starts{0};
};

/// The value of one row and its gradient with respect to each output.
real value_and_gradient(kind k, const std::vector<real>& o, const std::vector<real>& y,
                        std::vector<real>& g) {
  const auto n = static_cast<real>(o.size());
  real value = 0;
  std::fill(g.begin(), g.end(), real(0));
  if (k == kind::squared) {
    for (std::size_t j = 0; j < o.size(); ++j) {
      value += (o[j] - y[j]) * (o[j] - y[j]);
      g[j] = 2 * (o[j] - y[j]);
    }
    return value;
  }
  if (k == kind::z) {
    real mean = 0, variance = 0;
    for (const real x : o)
      mean += x / n;
    for (const real x : o)
      variance += (x - mean) * (x - mean) / n;
    const real sigma = std::sqrt(variance);
    for (std::size_t c = 0; c < o.size(); ++c) {
      if (y[c] == 0)
        continue;
      const real z = (o[c] - mean) / sigma, u = real(sharpness) * (real(pull) - z);
      value += y[c] * std::log1p(std::exp(u)) / real(sharpness);
      const real slope = -y[c] / (1 + std::exp(-u));
      for (std::size_t j = 0; j < o.size(); ++j)
        g[j] += slope / sigma * ((j == c ? 1 : 0) - 1 / n - z * (o[j] - mean) / sigma / n);
    }
    return value;
  }
  const auto f = [&](real x) {
    return k == kind::taylor ? 1 + x + x * x / 2 : x * x + real(epsilon);
  };
  const auto slope = [&](real x) { return k == kind::taylor ? 1 + x : 2 * x; };
  real sum = 0;
  for (const real x : o)
    sum += f(x);
  for (std::size_t c = 0; c < o.size(); ++c) {
    if (y[c] == 0)
      continue;
    value -= y[c] * std::log(f(o[c]) / sum);
    for (std::size_t j = 0; j < o.size(); ++j)
      g[j] += y[c] * (slope(o[j]) / sum - (j == c ? slope(o[c]) / f(o[c]) : 0));
  }
  return value;
}

/// The explicit layer.
struct naive_layer {
  index outputs, features;
  std::vector<real> w;

  /// The value times scale; the gradient of the hidden states goes to dh, and W takes a step.
  template <class T>
  real step(kind k, const std::vector<T>& h, const targets& t, real scale, real rate, real decay,
            std::vector<real>& dh) {
    const index rows = static_cast<index>(t.starts.size()) - 1;
    std::vector<real> dw(w.size(), 0), o(at(outputs)), y(at(outputs)), g(at(outputs));
    dh.assign(at(rows * features), 0);
    real value = 0;
    for (index i = 0; i < rows; ++i) {
      std::fill(y.begin(), y.end(), real(0));
      for (auto e = t.starts[at(i)]; e < t.starts[at(i) + 1]; ++e)
        y[at(t.classes[at(e)])] += static_cast<real>(t.weights[at(e)]);
      for (index c = 0; c < outputs; ++c) {
        o[at(c)] = 0;
        for (index j = 0; j < features; ++j)
          o[at(c)] += w[at(c * features + j)] * static_cast<real>(h[at(i * features + j)]);
      }
      value += scale * value_and_gradient(k, o, y, g);
      for (index c = 0; c < outputs; ++c)
        for (index j = 0; j < features; ++j) {
          dh[at(i * features + j)] += scale * g[at(c)] * w[at(c * features + j)];
          dw[at(c * features + j)] += scale * g[at(c)] * static_cast<real>(h[at(i * features + j)]);
        }
    }
    for (std::size_t i = 0; i < w.size(); ++i)
      w[i] = (1 - rate * decay) * w[i] - rate * dw[i];
    return value;
  }
};

/// The larger number, or NaN.
template <class R> R worse(R a, R b) { return b > a || b != b ? b : a; }

/// max |a − b| / max |b|, or what b's terms add up to where they cancel
template <class A> double distance(const std::vector<A>& a, const std::vector<real>& b) {
  real error = 0, size = real(0.01L);
  for (std::size_t i = 0; i < b.size(); ++i) {
    const real e = std::abs(static_cast<real>(a[i]) - b[i]);
    error = worse(error, e);
    size = std::max(size, std::abs(b[i]));
  }
  return static_cast<double>(error / size);
}

struct trial {
  kind loss;
  index outputs, features, rows;
  double rate, decay;
  int steps = 300;
  perdita::spherical_layer_options options{};
  bool labels = false; ///< one class a row, and some rows ignored
  double stretch = 0;  ///< hidden states lean along one direction by this
  int stabilise_every = 0;
  perdita::executor run_on = perdita::serial;
};

template <class T> struct outcome {
  double value = 0, d_hidden = 0, weights = 0; ///< largest relative errors
  index refactorings = 0;
  std::vector<T> final_weights, final_gradient;
};

template <class T> std::vector<T> some(index n, double scale, random_numbers& random) {
  std::vector<T> v(at(n));
  for (T& x : v)
    x = static_cast<T>(scale * random.normal());
  return v;
}

template <class T>
targets some_targets(const trial& t, random_numbers& random, std::vector<std::int64_t>& labels) {
  targets result;
  labels.clear();
  // Few classes for many rows: the same ones come again and again.
  const auto different = static_cast<std::uint64_t>(std::min<index>(t.outputs, 12));
  const auto draw = [&] {
    return static_cast<std::int32_t>(random.below(different) *
                                     static_cast<std::uint64_t>(t.outputs) / different);
  };
  for (index i = 0; i < t.rows; ++i) {
    if (t.labels) {
      labels.push_back(i % 5 == 3 ? -7 : draw());
      if (labels.back() >= 0) {
        result.classes.push_back(static_cast<std::int32_t>(labels.back()));
        result.weights.push_back(1);
      }
    } else {
      const std::uint64_t n = random.below(5); // none, too
      for (std::uint64_t e = 0; e < n; ++e) {
        result.classes.push_back(draw());
        result.weights.push_back(static_cast<double>(static_cast<T>(random.uniform(0.1, 0.6))));
      }
    }
    result.starts.push_back(static_cast<std::int64_t>(result.classes.size()));
  }
  return result;
}

template <class T> outcome<T> run(const trial& t) {
  random_numbers random(17);
  const auto w = some<T>(t.outputs * t.features, 0.5, random);
  naive_layer naive{t.outputs, t.features, std::vector<real>(w.begin(), w.end())};
  perdita::spherical_layer<T> layer(matrix_view(w.data(), t.outputs, t.features), t.options);
  outcome<T> out;
  std::vector<T> d_hidden(at(t.rows * t.features));
  std::vector<T> got(w.size());
  std::vector<real> dh;
  std::vector<std::int64_t> labels;
  for (int step = 0; step < t.steps; ++step) {
    auto h = some<T>(t.rows * t.features, 1 / std::sqrt(static_cast<double>(t.features)), random);
    if (t.stretch > 0)
      for (index i = 0; i < t.rows; ++i) {
        const double along = t.stretch * random.normal();
        for (index j = 0; j < t.features; ++j)
          h[at(i * t.features + j)] += static_cast<T>(along * std::cos(static_cast<double>(j)));
      }
    const targets y = some_targets<T>(t, random, labels);
    const auto counted = t.labels ? std::count_if(labels.begin(), labels.end(),
                                                  [](auto label) { return label >= 0; })
                                  : t.rows;
    const auto reduction = step % 2 == 0 ? perdita::reduction::mean : perdita::reduction::sum;
    const real scale = step % 2 == 0 ? 1 / static_cast<real>(counted) : 1;
    // Ignored rows: no target, and no outputs either.
    auto seen = h;
    if (t.labels)
      for (index i = 0; i < t.rows; ++i)
        if (labels[at(i)] < 0)
          std::fill_n(seen.begin() + i * t.features, t.features, T(0));
    const real expected = naive.step(t.loss, seen, y, scale, static_cast<real>(t.rate),
                                     static_cast<real>(t.decay), dh);
    if (t.labels)
      for (index i = 0; i < t.rows; ++i)
        if (labels[at(i)] < 0)
          std::fill_n(dh.begin() + i * t.features, t.features, real(0));
    const std::vector<T> weights(y.weights.begin(), y.weights.end());
    const T value = with_loss<T>(t.loss, reduction, [&](const auto& loss) {
      const matrix_view<const T> x(h.data(), t.rows, t.features);
      const matrix_view<T> dx(d_hidden.data(), t.rows, t.features);
      const perdita::spherical_step by{.rate = t.rate, .decay = t.decay};
      if (t.labels)
        return layer.step(loss, x, labels, dx, by, {.run_on = t.run_on});
      return layer.step(loss, x, perdita::sparse_targets<T>{y.classes, weights, y.starts}, dx, by,
                        {.run_on = t.run_on});
    });
    out.value = worse(out.value, static_cast<double>(std::abs(static_cast<real>(value) - expected) /
                                                     std::max(std::abs(expected), real(1e-3L))));
    const double e = distance(d_hidden, dh);
    if (t.features > 1 || t.loss != kind::z) // there it is zero: only h's sign matters
      out.d_hidden = worse(out.d_hidden, e);
    if (t.stabilise_every > 0 && step % t.stabilise_every == 0)
      step % (2 * t.stabilise_every) == 0 ? layer.stabilise() : layer.refactor();
    if (step % 10 == 9) {
      layer.weights(matrix_view<T>(got.data(), t.outputs, t.features));
      out.weights = worse(out.weights, distance(got, naive.w));
    }
  }
  out.refactorings = layer.refactorings();
  out.final_weights = got;
  out.final_gradient = d_hidden;
  return out;
}

/// Of weights that must not be off by more than `allowed` of the largest.
template <class T> void report(const trial& t, const outcome<T>& o, double allowed) {
  const double epsilons = 1 / static_cast<double>(std::numeric_limits<T>::epsilon());
  const double gradients = worse(o.d_hidden, o.weights);
  report_accuracy<T>(
      "spherical_layer", name_of(t.loss), "ε of the largest, after 300 steps",
      {o.value * epsilons, gradients * epsilons, worse(o.value, gradients) / allowed});
}
/// At least the largest of all errors.
template <class T> double worst_of(const outcome<T>& o) { return o.value + o.d_hidden + o.weights; }

} // namespace

TEST_CASE("spherical_layer: follows the explicit layer, for every loss, size, decay and batch",
          "[spherical_layer]") {
  double worst = 0;
  for (const kind k : all_kinds)
    for (const index features : {1, 7, 33})
      for (const index outputs : {2, 50, 300})
        for (const double decay : {0.0, 0.05}) {
          const bool large = features * outputs > 500;
          for (const index rows : large ? std::vector<index>{2} : std::vector<index>{1, 9}) {
            // Two standard scores are ±1 whatever happens: nothing but rounding is left there.
            if (k == kind::z && outputs == 2)
              continue;
            INFO(name_of(k) << ", D " << outputs << ", d " << features << ", rows " << rows
                            << ", decay " << decay);
            const trial t{.loss = k,
                          .outputs = outputs,
                          .features = features,
                          .rows = rows,
                          .rate = 0.02,
                          .decay = decay};
            const auto out = run<double>(t);
            report(t, out, 1e-10);
            CHECK(out.value <= 1e-10);
            CHECK(out.d_hidden <= 1e-10);
            CHECK(out.weights <= 1e-10);
            worst = worse(worst, worst_of(out));
          }
        }
  CHECK(worst > 0); // something was compared
}

TEST_CASE("spherical_layer: more features, and rows, than one piece has", "[spherical_layer]") {
  for (const kind k : all_kinds) {
    INFO(name_of(k));
    const auto out = run<double>({.loss = k,
                                  .outputs = 25,
                                  .features = 133,
                                  .rows = 19,
                                  .rate = 0.02,
                                  .decay = 0.05,
                                  .steps = 40,
                                  .stabilise_every = 9,
                                  .run_on = perdita::executor()});
    CHECK(worst_of(out) <= 1e-11);
  }
}

TEST_CASE("spherical_layer: labels, some of which do not count", "[spherical_layer]") {
  for (const kind k : all_kinds) {
    INFO(name_of(k));
    const auto out = run<double>({.loss = k,
                                  .outputs = 50,
                                  .features = 7,
                                  .rows = 11,
                                  .rate = 0.05,
                                  .decay = 0.01,
                                  .labels = true});
    CHECK(worst_of(out) <= 1e-10);
  }
}

TEST_CASE("spherical_layer: U may go over to V at any time, in part or as a whole",
          "[spherical_layer]") {
  for (const kind k : all_kinds) {
    INFO(name_of(k));
    // By hand: what leaves the bounds, or all.
    auto t = trial{.loss = k,
                   .outputs = 50,
                   .features = 33,
                   .rows = 4,
                   .rate = 0.05,
                   .decay = 0.02,
                   .stabilise_every = 7};
    auto out = run<double>(t);
    CHECK(out.refactorings == 43);
    CHECK(worst_of(out) <= 1e-10);
    // At every step.
    t.stabilise_every = 0;
    t.options = {.max_condition = 1, .check_every = 1};
    out = run<double>(t);
    CHECK(out.refactorings >= 299);
    CHECK(worst_of(out) <= 1e-10);
  }
  // Where hidden states lean one way, U loses that direction and needs help of its own; more of
  // them, and it is multiplied out.
  for (const index features : {3, 33}) {
    auto t = trial{.loss = kind::squared,
                   .outputs = 40,
                   .features = features,
                   .rows = 2,
                   .rate = 0.03,
                   .decay = 0,
                   .options = {.max_condition = 3, .check_every = 4},
                   .stretch = features == 3 ? 0.8 : 0.25};
    const auto helped = run<double>(t);
    CHECK(helped.refactorings > 3);
    CHECK(worst_of(helped) <= 1e-12);
    t.options = {.max_condition = 1e300, .check_every = 1000};
    const auto left = run<double>(t);
    CHECK(left.refactorings == 0);
    CHECK(worst_of(left) > 1e-6); // it was necessary
  }
}

TEST_CASE("spherical_layer: float", "[spherical_layer]") {
  for (const kind k : all_kinds)
    for (const double stretch : {0.0, 0.15}) {
      const double decay = stretch == 0 ? 0 : 0.05;
      INFO(name_of(k) << ", stretch and decay " << stretch);
      const trial t{.loss = k,
                    .outputs = 50,
                    .features = 33,
                    .rows = 4,
                    .rate = 0.02,
                    .decay = decay,
                    .stretch = stretch};
      const auto out = run<float>(t);
      report(t, out, 1e-5);
      CHECK(out.value <= 1e-5);
      CHECK(out.d_hidden <= 1e-5);
      CHECK(out.weights <= 1e-5);
    }
}

TEST_CASE("spherical_layer: a step that annuls a direction of all weights", "[spherical_layer]") {
  // 2 · rate · |h|² = 1: V U cannot follow, since U⁻¹ does not exist; and almost so.
  for (const double near : {0.0, 1e-12, 1e-5, -1e-3})
    for (const index features : {1, 4}) {
      INFO("off by " << near << ", d " << features);
      random_numbers random(5);
      const index outputs = 9;
      const auto w = some<double>(outputs * features, 1, random);
      perdita::spherical_layer<double> layer(matrix_view(w.data(), outputs, features));
      naive_layer naive{outputs, features, std::vector<real>(w.begin(), w.end())};
      std::vector<double> dx(at(features)), got(w.size());
      std::vector<real> dh;
      for (int step = 0; step < 6; ++step) {
        std::vector<double> h(at(features), 0);
        h[at(step % features)] = step % 2 == 0 ? 1 : 0.25;
        const targets y{{3, 7}, {0.5, 1.5}, {0, 2}};
        const double rate = 0.5 + near;
        const real expected = naive.step(kind::squared, h, y, 1, static_cast<real>(rate), 0, dh);
        const double value =
            layer.step(perdita::sparse_squared_error<double>{}, matrix_view(h.data(), 1, features),
                       perdita::sparse_targets<double>{y.classes, y.weights},
                       matrix_view(dx.data(), 1, features), {.rate = rate});
        CHECK(std::abs(value - static_cast<double>(expected)) <= 1e-11);
        CHECK(distance(dx, dh) <= 1e-11);
        layer.weights(matrix_view(got.data(), outputs, features));
        CHECK(distance(got, naive.w) <= 1e-11);
      }
      CHECK(layer.refactorings() > 0);
    }
}

TEMPLATE_TEST_CASE("spherical_layer: what it is made of comes out again", "[spherical_layer]",
                   float, double) {
  using T = TestType;
  random_numbers random(9);
  const index outputs = 1100, features = 21; // more than one piece of each
  const auto w = some<T>(outputs * features, 1, random);
  perdita::spherical_layer<T> layer(matrix_view(w.data(), outputs, features));
  std::vector<T> got(w.size());
  layer.weights(matrix_view(got.data(), outputs, features));
  CHECK(got == w);
  CHECK(layer.outputs() == outputs);
  CHECK(layer.features() == features);
  CHECK_THAT(layer.condition(), Catch::Matchers::WithinRel(1.0, 1e-12));

  // Column-major, and other sizes.
  std::vector<T> columns(w.size());
  for (index c = 0; c < outputs; ++c)
    for (index j = 0; j < features; ++j)
      columns[at(j * outputs + c)] = w[at(c * features + j)];
  layer.set_weights(matrix_view<const T>(columns.data(), 5, 3, 1, outputs));
  layer.set_weights(matrix_view<const T>(columns.data(), outputs, features, 1, outputs));
  std::fill(got.begin(), got.end(), T(0));
  layer.weights(matrix_view<T>(got.data(), outputs, features, 1, outputs));
  CHECK(got == columns);

  // After some steps: a row, scores, and a layer made of the weights are the same layer.
  std::vector<T> h, dx(at(4 * features));
  const std::vector<int> labels{5, 1099, 5, 640};
  const perdita::taylor_softmax<T> loss;
  for (int step = 0; step < 20; ++step) {
    h = some<T>(4 * features, 1, random);
    layer.step(loss, matrix_view(h.data(), 4, features), labels,
               matrix_view(dx.data(), 4, features), {.rate = 0.3, .decay = 0.01});
  }
  layer.weights(matrix_view(got.data(), outputs, features));
  const double tolerance = 200 * static_cast<double>(std::numeric_limits<T>::epsilon());
  std::vector<T> row(at(features)), o(at(outputs));
  for (const index c : {index(0), index(5), outputs - 1}) {
    layer.row(c, row);
    CHECK(std::equal(row.begin(), row.end(), got.begin() + c * features));
  }
  layer.scores(std::vector<T>(h.begin(), h.begin() + features), o);
  for (index c = 0; c < outputs; ++c) {
    double expected = 0;
    for (index j = 0; j < features; ++j)
      expected += static_cast<double>(got[at(c * features + j)]) * static_cast<double>(h[at(j)]);
    REQUIRE(std::abs(static_cast<double>(o[at(c)]) - expected) <= tolerance);
  }
  const perdita::spherical_layer<T> again(matrix_view(got.data(), outputs, features));
  std::vector<T> other(dx.size());
  const T a =
      layer(loss, matrix_view(h.data(), 4, features), labels, matrix_view(dx.data(), 4, features));
  const T b = again(loss, matrix_view(h.data(), 4, features), labels,
                    matrix_view(other.data(), 4, features));
  CHECK(std::abs(static_cast<double>(a - b)) <= tolerance);
  for (std::size_t i = 0; i < dx.size(); ++i)
    CHECK(std::abs(static_cast<double>(dx[i] - other[i])) <= tolerance);
}

TEST_CASE("spherical_layer: gradient of the hidden states against differences of the value",
          "[spherical_layer]") {
  random_numbers random(21);
  const index outputs = 40, features = 7, rows = 3;
  const auto w = some<double>(outputs * features, 1, random);
  perdita::spherical_layer<double> layer(matrix_view(w.data(), outputs, features));
  const std::vector<std::int32_t> classes{3, 9, 3, 17, 9, 39};
  const std::vector<double> weights{0.7, 0.3, 0.2, 0.5, 1, -0.25};
  const std::vector<std::int64_t> starts{0, 3, 4, 6};
  const perdita::sparse_targets<double> y{classes, weights, starts};
  std::vector<double> h = some<double>(rows * features, 1, random), dx(h.size());
  const matrix_view<double> x(h.data(), rows, features), out(dx.data(), rows, features);
  // A layer that has learnt: U, ω and w̄ are not what they were.
  for (int step = 0; step < 30; ++step)
    layer.step(perdita::taylor_softmax<double>{}, x, y, out, {.rate = 0.1, .decay = 0.05});
  for (const kind k : all_kinds)
    for (const auto r : {perdita::reduction::mean, perdita::reduction::sum})
      with_loss<double>(k, r, [&](const auto& loss) {
        layer(loss, x, y, out);
        const auto report =
            perdita::testing::check_gradient([&] { return layer(loss, x, y); }, h, dx);
        INFO(name_of(k) << ": " << report.message());
        CHECK(report.ok);
        CHECK(report.unresolved == 0);
        return 0;
      });
}

TEST_CASE("spherical_layer: values of rows, ignored rows, in place, 16-bit storage",
          "[spherical_layer]") {
  random_numbers random(31);
  const index outputs = 20, features = 5, rows = 4;
  const auto w = some<float>(outputs * features, 1, random);
  const perdita::spherical_layer<float> layer(matrix_view(w.data(), outputs, features));
  std::vector<float> h = some<float>(rows * features, 1, random), dx(h.size(), 9);
  const std::vector<unsigned char> labels{4, 255, 19, 4};
  const perdita::z_loss<float> none({.ignore_index = 255, .reduction = perdita::reduction::none});
  const perdita::z_loss<float> mean({.ignore_index = 255});
  const matrix_view<float> x(h.data(), rows, features);
  std::vector<float> values(8, 9);
  const float sum = layer(none, x, labels, matrix_view(dx.data(), rows, features),
                          {.values = perdita::vector_view<float>(values.data(), 4, 2)});
  CHECK(values[2] == 0);
  CHECK(values[1] == 9);
  CHECK_THAT(sum, Catch::Matchers::WithinRel(values[0] + values[4] + values[6], 1e-6f));
  CHECK_THAT(layer(mean, x, labels), Catch::Matchers::WithinRel(sum / 3, 1e-6f));
  for (index j = 0; j < features; ++j)
    CHECK(dx[at(features + j)] == 0);
  CHECK(dx[0] != 0);

  // The gradient over the hidden states.
  auto same = h;
  layer(none, matrix_view(same.data(), rows, features), labels,
        matrix_view(same.data(), rows, features));
  CHECK(same == dx);

  std::vector<perdita::bfloat16> narrow(h.size());
  std::vector<float> widened(h.size());
  for (std::size_t i = 0; i < h.size(); ++i) {
    narrow[i] = {perdita::core::narrow_bfloat16(h[i])};
    widened[i] = perdita::core::widen_bfloat16(narrow[i].bits);
  }
  CHECK(layer(mean, matrix_view(narrow.data(), rows, features), labels) ==
        layer(mean, matrix_view(widened.data(), rows, features), labels));

  const std::vector<int> nothing;
  std::vector<float> empty;
  CHECK(layer(mean, matrix_view(empty.data(), 0, features), nothing) == 0);
}

TEST_CASE("spherical_layer: what is not finite stays in its row, and no step is taken",
          "[spherical_layer]") {
  random_numbers random(41);
  const index outputs = 20, features = 5, rows = 3;
  const auto w = some<double>(outputs * features, 1, random);
  for (const kind k : all_kinds)
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      INFO(name_of(k));
      perdita::spherical_layer<double> layer(matrix_view(w.data(), outputs, features));
      auto h = some<double>(rows * features, 1, random);
      std::vector<double> clean(h.size()), dx(h.size()), values(3), usual(3), got(w.size());
      const std::vector<int> labels{1, 2, 1};
      const matrix_view<double> x(h.data(), rows, features);
      with_loss<double>(k, perdita::reduction::mean, [&](const auto& loss) {
        layer(loss, x, labels, matrix_view(clean.data(), rows, features), {.values = usual});
        h[at(features)] = bad;
        CHECK(std::isnan(layer.step(loss, x, labels, matrix_view(dx.data(), rows, features),
                                    {.rate = 0.1, .decay = 0.5}, {.values = values})));
        // Of no target, too
        const std::vector<int> two{1, 1};
        const std::vector<double> sure{1, 1};
        const std::vector<std::int64_t> starts{0, 1, 1, 2};
        const perdita::sparse_targets<double, int> some_rows{two, sure, starts};
        CHECK(std::isnan(layer(loss, x, some_rows)));
        return 0;
      });
      CHECK(values[0] == usual[0]);
      CHECK(std::isnan(values[1]));
      CHECK(values[2] == usual[2]);
      for (index i = 0; i < rows; ++i)
        for (index j = 0; j < features; ++j) {
          const double g = dx[at(i * features + j)];
          if (i == 1)
            CHECK(!std::isfinite(g));
          else
            CHECK(g == clean[at(i * features + j)]);
        }
      layer.weights(matrix_view(got.data(), outputs, features));
      CHECK(got == w);
    }
}

TEST_CASE("spherical_layer: outputs that are all the same", "[spherical_layer]") {
  const std::vector<double> zero(20 * 3, 0), h{1, 2, 3};
  std::vector<double> dx(3), got(zero.size());
  const std::vector<int> label{7};
  perdita::spherical_layer<double> layer(matrix_view(zero.data(), 20, 3));
  const matrix_view<const double> x(h.data(), 1, 3);
  const auto step = [&](const auto& loss) {
    return layer.step(loss, x, label, matrix_view(dx.data(), 1, 3), {.rate = 0.1});
  };
  CHECK_THAT(step(perdita::z_loss<double>{}), Catch::Matchers::WithinRel(std::log(2.0), 1e-12));
  CHECK_THAT(step(perdita::spherical_softmax<double>{}),
             Catch::Matchers::WithinRel(std::log(20.0), 1e-12));
  layer.weights(matrix_view(got.data(), 20, 3));
  CHECK(got == zero);
  CHECK_THAT(step(perdita::taylor_softmax<double>{}),
             Catch::Matchers::WithinRel(std::log(20.0), 1e-12));
  CHECK(step(perdita::sparse_squared_error<double>{}) > 0);
  layer.weights(matrix_view(got.data(), 20, 3));
  CHECK(got != zero);

  // The same but for rounding, which must not pass for a variance.
  random_numbers random(61);
  for (int i = 0; i < 40; ++i) {
    const auto line = some<double>(3, 1, random), state = some<double>(3, 1, random);
    std::vector<double> equal;
    for (int c = 0; c < 7; ++c)
      equal.insert(equal.end(), line.begin(), line.end());
    const perdita::spherical_layer<double> constant(matrix_view(equal.data(), 7, 3));
    CHECK_THAT(constant(perdita::z_loss<double>{}, matrix_view(state.data(), 1, 3),
                        std::vector<int>{4}, matrix_view(dx.data(), 1, 3)),
               Catch::Matchers::WithinRel(std::log(2.0), 1e-12));
    CHECK(dx == std::vector<double>(3, 0));
  }

  // One output.
  const std::vector<double> one{0.3, 0.1, 0.2};
  const std::vector<int> only{0};
  const perdita::spherical_layer<double> single(matrix_view(one.data(), 1, 3));
  CHECK_THAT(single(perdita::z_loss<double>{}, x, only, matrix_view(dx.data(), 1, 3)),
             Catch::Matchers::WithinRel(std::log(2.0), 1e-12));
  CHECK(dx == std::vector<double>(3, 0));
}

TEST_CASE("spherical_layer: the statistics come back to float weights", "[spherical_layer]") {
  random_numbers random(51);
  const index outputs = 30, features = 6;
  const auto w = some<float>(outputs * features, 1, random);
  perdita::spherical_layer<float> layer(matrix_view(w.data(), outputs, features),
                                        {.max_condition = 1, .check_every = 1});
  std::vector<float> dx(at(features)), got(w.size());
  const std::vector<int> label{2};
  const perdita::sparse_squared_error<float> loss;
  std::vector<float> h;
  for (int step = 0; step < 2000; ++step) { // every step rounds all of V
    h = some<float>(features, 0.4, random);
    layer.step(loss, matrix_view(h.data(), 1, features), label, matrix_view(dx.data(), 1, features),
               {.rate = 1e-4});
  }
  layer.weights(matrix_view(got.data(), outputs, features));
  naive_layer naive{outputs, features, std::vector<real>(got.begin(), got.end())};
  std::vector<real> dh;
  const double expected =
      static_cast<double>(naive.step(kind::squared, h, {{2}, {1}, {0, 1}}, 1, 0, 0, dh));
  const auto error = [&] {
    return std::abs(static_cast<double>(layer(loss, matrix_view(h.data(), 1, features), label)) -
                    expected) /
           expected;
  };
  const double before = error();
  layer.recompute();
  CHECK(before <= 1e-5);
  CHECK(error() <= 2e-7);
  CHECK(error() <= before / 3);
}

TEST_CASE("spherical_layer: the same bits for any number of threads",
          "[spherical_layer][threads]") {
  const auto learn = [](const perdita::executor& run_on) {
    return run<float>({.loss = kind::taylor,
                       .outputs = 200,
                       .features = 70,
                       .rows = 19,
                       .rate = 0.05,
                       .decay = 0.1,
                       .steps = 10,
                       .options = {.max_condition = 1, .check_every = 3},
                       .run_on = run_on});
  };
  const auto one = learn(perdita::serial);
  CHECK(worst_of(one) <= 2e-5);
  for (const std::size_t n : {2U, 5U}) {
    const threads_executor pool(n, task_order::shuffled);
    const auto many = learn(pool);
    CHECK(many.final_weights == one.final_weights);
    CHECK(many.final_gradient == one.final_gradient);
  }
}

TEST_CASE("spherical_layer: bad input is refused, and nothing changes", "[spherical_layer]") {
  using Catch::Matchers::ContainsSubstring;
  using layer_type = perdita::spherical_layer<double>;
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  std::vector<double> w(12, 1), h(8, 1), dx(8, 9), values(2, 9);
  const matrix_view<double> m(w.data(), 3, 4), x(h.data(), 2, 4), out(dx.data(), 2, 4);
  const auto refused = [](auto call, const char* why) {
    CHECK_THROWS_WITH(call(), ContainsSubstring("perdita::") && ContainsSubstring(why));
  };
  for (const double c : {0.5, nan, inf})
    refused([&] { layer_type(m, {.max_condition = c}); }, "max_condition is");
  refused([&] { layer_type(m, {.check_every = 0}); }, "check_every is 0");
  refused([&] { layer_type(matrix_view<double>(w.data(), 0, 4)); }, "number of weights is 0");
  refused([&] { layer_type(matrix_view<double>(nullptr, 3, 4)); }, "weights is null");
  refused([] { perdita::sparse_squared_error<double>({.reduction = perdita::reduction(9)}); },
          "reduction is 9");

  layer_type layer(m);
  const perdita::taylor_softmax<double> loss;
  const std::vector<int> labels{0, 2};
  const auto step = [&](const auto& hidden, const auto& target, const auto& gradient,
                        const perdita::spherical_step& by = {},
                        const perdita::spherical_call<double>& call = {}) {
    return [&] { layer.step(loss, hidden, target, gradient, by, call); };
  };
  for (const double rate : {-1.0, nan, inf})
    refused(step(x, labels, out, {.rate = rate}), "rate is");
  for (const double decay : {-1.0, nan, 2.0})
    refused(step(x, labels, out, {.rate = 0.5, .decay = decay}), "decay is");
  refused(step(matrix_view(h.data(), 2, 3), labels, out), "columns of the hidden states is 3");
  refused(step(matrix_view<double>(nullptr, 2, 4), labels, out), "hidden states is null");
  refused(step(x, labels, matrix_view(dx.data(), 1, 4)), "rows of the gradient");
  refused(step(x, labels, matrix_view(dx.data(), 2, 3)), "columns of the gradient");
  refused(step(x, labels, matrix_view<double>(nullptr, 2, 4)), "gradient of the hidden states is");
  refused(step(x, std::vector<int>{1}, out), "size of labels is 1");
  refused(step(x, std::vector<int>{1, 3}, out), "labels[1] is 3, expected 0 to 2");
  refused(step(x, std::vector<int>{-1, 1}, out), "labels[0] is -1");
  const perdita::spherical_call<double> few{.values =
                                                perdita::vector_view<double>(values.data(), 1)};
  refused(step(x, labels, out, {}, few), "size of values is 1");

  using sparse = perdita::sparse_targets<double>;
  const std::vector<std::int32_t> classes{0, 1, 2}, wrong{0, 3};
  const std::vector<double> ones(3, 1);
  const std::vector<std::int64_t> falling{0, 2, 1}, late{1, 2, 3}, brief{0, 3};
  refused(step(x, sparse{classes, ones}, out), "number of entries is 3");
  refused(step(x, sparse{wrong, std::vector<double>(2, 1)}, out), "classes[1] is 3");
  refused(step(x, sparse{classes, std::vector<double>(2, 1)}, out), "size of probabilities is 2");
  refused(step(x, sparse{classes, ones, falling}, out), "row_starts[2] is 1");
  refused(step(x, sparse{classes, ones, late}, out), "row_starts[0] is 1");
  refused(step(x, sparse{classes, ones, brief}, out), "size of row_starts is 2");

  std::vector<double> row(4), o(3);
  refused([&] { layer.row(3, row); }, "class is 3");
  refused([&] { layer.row(0, o); }, "size of out is 3");
  refused([&] { layer.scores(o, o); }, "size of hidden is 3");
  refused([&] { layer.scores(row, row); }, "size of out is 4");
  refused([&] { layer.weights(matrix_view(h.data(), 2, 4)); }, "rows of out is 2");
  refused([&] { layer.set_weights(matrix_view<double>(w.data(), 3, 0)); }, "number of weights");

  CHECK(dx == std::vector<double>(8, 9));
  std::vector<double> got(12);
  layer.weights(matrix_view(got.data(), 3, 4));
  CHECK(got == w);
}

} // namespace perdita_tests
