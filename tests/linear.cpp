// SPDX-License-Identifier: MIT

// The linear head gives the numbers that it must: against a wider reference, and, where the scores
// are exact, against the same loss of given scores.

#include <perdita/linear.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <perdita/testing/gradient_check.hpp>

#include "support/catch.hpp"
#include "support/linear_reference.hpp"
#include "support/linear_run.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

constexpr auto mean = perdita::reduction::mean, sum = perdita::reduction::sum;

struct size {
  index rows, features, classes;
};
/// Ends inside a pack, a block of rows, a piece, a slice, 256 terms, 48 classes; and exactly there.
const std::vector<size> small_sizes{{1, 1, 1},    {3, 7, 2},    {16, 1, 17},   {17, 16, 64},
                                    {1, 300, 65}, {63, 7, 511}, {64, 255, 17}, {3, 256, 1000},
                                    {257, 7, 65}, {16, 16, 513}};
const std::vector<size> large_sizes{{256, 256, 64}, {300, 257, 65}, {257, 16, 1000}, {64, 300, 513},
                                    {3, 257, 4096}, {17, 7, 4097},  {16, 255, 5000}};

/// Class weights, some 0.
template <class T> std::vector<T> class_weights(index classes) {
  std::vector<T> w;
  for (index c = 0; c < classes; ++c)
    w.push_back(static_cast<T>(c % 4 == 2 ? 0.125 : 0.5 + 0.375 * static_cast<double>(c % 5)));
  return w;
}

/// f(title, reference, a function from a reduction and classes to the head)
template <class T, class F> void for_each_loss(F f) {
  using cross_entropy = perdita::cross_entropy<T>;
  f("plain", cross_entropy_reference{},
    [](perdita::reduction how, index) { return make_linear(cross_entropy({.reduction = how})); });
  const auto option = [](double x) { return static_cast<double>(static_cast<T>(x)); };
  cross_entropy_reference all, focal;
  all.smoothing = option(0.1), all.temperature = option(0.7), all.softcap = 5;
  all.penalty = option(0.01);
  focal.gamma = 2;
  f("everything", all, [](perdita::reduction how, index classes) {
    const std::vector<T> w = class_weights<T>(classes);
    return make_linear(cross_entropy({.label_smoothing = T(0.1),
                                      .class_weights = w,
                                      .reduction = how,
                                      .temperature = T(0.7),
                                      .softcap = T(5),
                                      .log_z_penalty = T(0.01)}));
  });
  f("focal", focal, [](perdita::reduction how, index) {
    return make_linear(cross_entropy({.reduction = how, .focal_gamma = T(2)}));
  });
  f("ldr_kl", ldr_kl_reference{option(0.7), option(0.3)}, [](perdita::reduction how, index) {
    return make_linear(perdita::ldr_kl<T>({.lambda = T(0.7), .margin = T(0.3), .reduction = how}));
  });
  f("z_loss", z_loss_reference{.a = 0.5, .b = 2}, [](perdita::reduction how, index) {
    return make_linear(perdita::z_loss<T>({.a = T(0.5), .b = T(2), .reduction = how}));
  });
}
/// The reference with what depends on the number of classes.
template <class T> cross_entropy_reference for_classes(cross_entropy_reference r, index classes) {
  if (r.softcap > 0)
    for (const T w : class_weights<T>(classes))
      r.class_weights.push_back(static_cast<double>(w));
  return r;
}
template <class T, class Reference> Reference for_classes(const Reference& r, index) { return r; }

template <class T> const char* type_name() { return sizeof(T) == 4 ? "float" : "double"; }

} // namespace

TEMPLATE_TEST_CASE("linear: value and gradients are those of the formula, to rounding", "[linear]",
                   float, double) {
  using T = TestType;
  for_each_loss<T>([](const char* title, const auto& reference, const auto& make) {
    std::vector<size> sizes = small_sizes;
    const bool plain = std::string(title) == "plain";
    if (plain)
      sizes.insert(sizes.end(), large_sizes.begin(), large_sizes.end());
    else
      sizes.insert(sizes.end(), {{300, 16, 65}, {17, 16, 4097}});
    close_to values(std::string(title) + " <" + type_name<T>() + ">, values");
    close_to gradients(std::string(title) + " <" + type_name<T>() + ">, gradients");
    std::uint64_t seed = 0;
    for (const size& s : sizes) {
      random_numbers random(++seed);
      // 3 is an ordinary spread, 12 has confident rows.
      linear_problem<T> p = make_linear_problem<T>(s.rows, s.features, s.classes, seed,
                                                   seed % 3 == 2 ? 12 : 3, seed % 4 != 3);
      if (seed % 2 == 0 && s.rows > 1) {
        ignore_some(p);
        add_weights(p, random);
        p.scale = 3;
      }
      const auto head = make(seed % 3 == 0 ? sum : mean, s.classes);
      judge<T>(for_classes<T>(reference, s.classes), seed % 3 == 0 ? sum : mean,
               reference_scores<T>(p), run(*head, p), values, gradients);
    }
    values.check();
    gradients.check();
    report_linear<T>(values, gradients);
  });
}

TEMPLATE_TEST_CASE("linear: reductions, row weights, upstream slopes, scales and what is added to",
                   "[linear]", float, double) {
  using T = TestType;
  using perdita::reduction;
  close_to values(std::string("calls <") + type_name<T>() + ">, values");
  close_to gradients(std::string("calls <") + type_name<T>() + ">, gradients");
  std::uint64_t seed = 100;
  for (const reduction how : {reduction::none, reduction::mean, reduction::sum})
    for (const bool adds : {false, true})
      for (const layout kept : {layout::packed, layout::padded, layout::column_major})
        for (const double normaliser : {0.0, 7.0})
          for (const bool tight : {false, true}) {
            random_numbers random(++seed);
            linear_problem<T> p = make_linear_problem<T>(tight ? 140 : 37, 19, 150, seed);
            ignore_some(p);
            add_weights(p, random);
            if (adds)
              add_before(p, random);
            p.scale = T(-0.75);
            p.normaliser = normaliser;
            linear_way way;
            way.d_hidden = way.d_weights = kept;
            way.budget = tight ? least_budget<T>(p.rows, p.classes) : 0;
            const auto head = make_linear(perdita::cross_entropy<T>({.reduction = how}));
            const linear_answer<T> got = run(*head, p, way);
            CHECK(got.trespass.empty());
            judge<T>(cross_entropy_reference{}, how, reference_scores<T>(p), got, values,
                     gradients);
          }
  values.check();
  gradients.check();
  report_linear<T>(values, gradients);
}

TEMPLATE_TEST_CASE("linear: with a little memory and with much, the same to rounding", "[linear]",
                   float, double) {
  using T = TestType;
  close_to values(std::string("budgets <") + type_name<T>() + ">, values");
  close_to gradients(std::string("budgets <") + type_name<T>() + ">, gradients");
  const linear_problem<T> p = make_linear_problem<T>(257, 31, 1000, 17);
  const reference_scores<T> scores(p);
  const auto head = make_linear(perdita::cross_entropy<T>());
  const linear_answer<T> roomy = run(*head, p);
  for (const index eighths : {8, 9, 16, 20, 33, 48, 64, 1000}) { // of a piece of 257 rows
    linear_way way;
    way.budget = least_budget<T>(p.rows, p.classes) * static_cast<std::size_t>(eighths) / 8;
    linear_answer<T> got = run(*head, p, way);
    judge<T>(cross_entropy_reference{}, mean, scores, got, values, gradients);
    // Only sums over rows know of the budget.
    got.d_weights.clear(), got.d_bias.clear();
    CHECK(difference(roomy, got) == "");
  }
  values.check();
  gradients.check();
  report_linear<T>(values, gradients);
}

TEMPLATE_TEST_CASE("linear: rows that do not count leave nothing, whatever they hold", "[linear]",
                   float, double) {
  using T = TestType;
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  random_numbers random(5);
  linear_problem<T> p = make_linear_problem<T>(280, 21, 600, 5);
  // The first forty, the last nine, and some between; some by their label, some by their weight.
  p.row_weights.assign(280, T(1));
  std::vector<index> out;
  for (index r = 0; r < p.rows; ++r)
    if (r < 40 || r >= 271 || random.below(3) == 0) {
      out.push_back(r);
      if (r % 2 == 0)
        p.labels[static_cast<std::size_t>(r)] = p.ignore_index;
      else
        p.row_weights[static_cast<std::size_t>(r)] = 0;
      for (index d = 0; d < p.features; ++d)
        p.hidden[static_cast<std::size_t>(r * p.features + d)] =
            r % 3 == 0 ? nan : std::numeric_limits<T>::infinity();
    }
  // The same without them
  linear_problem<T> rest = p;
  rest.hidden.clear(), rest.labels.clear(), rest.row_weights.clear();
  for (index r = 0; r < p.rows; ++r)
    if (p.counts(r)) {
      rest.labels.push_back(p.labels[static_cast<std::size_t>(r)]);
      for (index d = 0; d < p.features; ++d)
        rest.hidden.push_back(p.x(r, d));
    }
  rest.rows = static_cast<index>(rest.labels.size());
  REQUIRE(rest.rows + static_cast<index>(out.size()) == p.rows);
  for (const bool tight : {false, true}) {
    const auto head = make_linear(perdita::cross_entropy<T>());
    linear_way way;
    way.budget = tight ? least_budget<T>(p.rows, p.classes) : 0;
    const linear_answer<T> all = run(*head, p, way);
    way.budget = tight ? least_budget<T>(rest.rows, p.classes) : 0;
    const linear_answer<T> some = run(*head, rest, way);
    CHECK(same(all.value, some.value));
    CHECK(same(all.d_weights, some.d_weights));
    CHECK(same(all.d_bias, some.d_bias));
    std::size_t wrong = 0;
    index k = 0;
    for (index r = 0; r < p.rows; ++r) {
      for (index d = 0; d < p.features; ++d) {
        const T expected =
            p.counts(r) ? some.d_hidden[static_cast<std::size_t>(k * p.features + d)] : T(0);
        wrong += !same(all.d_hidden[static_cast<std::size_t>(r * p.features + d)], expected);
      }
      for (const std::size_t b : {0U, 1U, 2U, 4U})
        wrong += !same(all.by_products[b][static_cast<std::size_t>(r)],
                       p.counts(r) ? some.by_products[b][static_cast<std::size_t>(k)] : T(0));
      k += p.counts(r);
    }
    CHECK(wrong == 0);
  }
  // Gradients that are added to keep what they were, to the bit.
  add_before(p, random);
  const auto head = make_linear(perdita::z_loss<T>());
  const linear_answer<T> added = run(*head, p);
  std::size_t wrong = 0;
  for (const index r : out)
    for (index d = 0; d < p.features; ++d) {
      const auto i = static_cast<std::size_t>(r * p.features + d);
      wrong += !same(added.d_hidden[i], p.before_hidden[i]);
    }
  CHECK(wrong == 0);
}

TEMPLATE_TEST_CASE("linear: no rows, or none that count: zeros, or nothing added", "[linear]",
                   float, double) {
  using T = TestType;
  random_numbers random(6);
  const auto head = make_linear(perdita::cross_entropy<T>({.label_smoothing = T(0.1)}));
  for (const index rows : {0, 1, 33})
    for (const bool adds : {false, true})
      for (const layout kept : {layout::packed, layout::column_major}) {
        linear_problem<T> p = make_linear_problem<T>(rows, 17, 70, 6);
        p.labels.assign(static_cast<std::size_t>(rows), p.ignore_index);
        for (T& x : p.hidden)
          x = std::numeric_limits<T>::quiet_NaN();
        if (adds)
          add_before(p, random);
        linear_way way;
        way.d_hidden = way.d_weights = kept;
        way.by_products = 0x3F;
        for (const bool wants : {true, false}) {
          way.wants_gradient = wants;
          const linear_answer<T> got = run(*head, p, way);
          CHECK(got.trespass.empty());
          CHECK(same(got.value, T(0)));
          for (const std::vector<T>& v : got.by_products)
            CHECK(same(v, std::vector<T>(static_cast<std::size_t>(rows), T(0))));
          CHECK(got.hits == std::vector<unsigned char>(static_cast<std::size_t>(rows), 0));
          if (!wants)
            continue;
          const auto n = [](index i) { return static_cast<std::size_t>(i); };
          CHECK(same(got.d_hidden,
                     adds ? p.before_hidden : std::vector<T>(n(rows * p.features), T(0))));
          CHECK(same(got.d_weights,
                     adds ? p.before_weights : std::vector<T>(n(p.classes * p.features), T(0))));
          CHECK(same(got.d_bias, adds ? p.before_bias : std::vector<T>(n(p.classes), T(0))));
        }
      }
}

TEMPLATE_TEST_CASE("linear: without features the scores are the bias; without a bias, 0",
                   "[linear]", float, double) {
  using T = TestType;
  close_to values("no features, values"), gradients("no features, gradients");
  for (const bool bias : {false, true}) {
    const linear_problem<T> p = make_linear_problem<T>(21, 0, 70, 8, 3, bias);
    // Scratch memory that is full of NaN
    perdita::workspace memory;
    constexpr std::size_t bytes = std::size_t{4} << 20;
    std::fill_n(memory.request(bytes), bytes, std::byte{0xFF});
    linear_way way;
    way.memory = &memory;
    const auto head = make_linear(perdita::cross_entropy<T>());
    judge<T>(cross_entropy_reference{}, mean, reference_scores<T>(p), run(*head, p, way), values,
             gradients);
  }
  values.check();
  gradients.check();
  report_linear<T>(values, gradients);
}

TEMPLATE_TEST_CASE("linear: a NaN or an infinity in a hidden state makes its own row NaN, no other",
                   "[linear]", float, double) {
  using T = TestType;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const linear_problem<T> p = make_linear_problem<T>(37, 20, 130, 9);
  for (const bool z : {false, true}) {
    const auto head = z ? make_linear(perdita::z_loss<T>({.reduction = perdita::reduction::sum}))
                        : make_linear(perdita::cross_entropy<T>({.reduction = sum}));
    const linear_answer<T> clean = run(*head, p);
    for (const T bad : {std::numeric_limits<T>::quiet_NaN(), inf, -inf})
      for (const index r : {0, 15, 36}) {
        linear_problem<T> q = p;
        q.hidden[static_cast<std::size_t>(r * p.features + 3)] = bad;
        const linear_answer<T> got = run(*head, q);
        CHECK(std::isnan(got.value));
        std::size_t wrong = 0;
        for (index i = 0; i < p.rows; ++i) {
          const T value = got.by_products[0][static_cast<std::size_t>(i)];
          wrong += i == r ? !std::isnan(value)
                          : !same(value, clean.by_products[0][static_cast<std::size_t>(i)]);
          for (index d = 0; d < p.features; ++d) {
            const auto at = static_cast<std::size_t>(i * p.features + d);
            wrong += i == r ? !std::isnan(got.d_hidden[at])
                            : !same(got.d_hidden[at], clean.d_hidden[at]);
          }
        }
        CHECK(wrong == 0);
        // Every class has a slope in that row.
        std::size_t finite = 0;
        for (const T x : got.d_weights)
          finite += !std::isnan(x);
        for (const T x : got.d_bias)
          finite += !std::isnan(x);
        CHECK(finite == 0);
      }
  }
}

TEMPLATE_TEST_CASE("linear: scores that are huge, or hardly anything", "[linear]", float, double) {
  using T = TestType;
  for_each_loss<T>([](const char* title, const auto& reference, const auto& make) {
    close_to values(std::string(title) + " <" + type_name<T>() + ">, huge and tiny, values");
    close_to gradients(std::string(title) + " <" + type_name<T>() + ">, huge and tiny, gradients");
    for (const double spread : {1e4, 1e-4}) {
      const linear_problem<T> p = make_linear_problem<T>(19, 24, 90, 11, spread, false);
      const auto head = make(sum, p.classes);
      judge<T>(for_classes<T>(reference, p.classes), sum, reference_scores<T>(p), run(*head, p),
               values, gradients);
    }
    values.check();
    gradients.check();
    report_linear<T>(values, gradients);
  });
}

TEMPLATE_TEST_CASE("linear: a class with a bias of -inf is masked", "[linear]", float, double) {
  using T = TestType;
  linear_problem<T> p = make_linear_problem<T>(23, 30, 100, 12);
  // Every third class, and a whole block of 64, but no label's.
  for (index c = 0; c < p.classes; ++c)
    if (c % 3 == 1 || c < 64)
      p.bias[static_cast<std::size_t>(c)] = -std::numeric_limits<T>::infinity();
  for (std::int64_t& y : p.labels)
    y = 65 + y % 11 * 3;
  linear_problem<T> rest = p; // without them
  rest.weights.clear(), rest.bias.clear();
  std::vector<index> place(static_cast<std::size_t>(p.classes), -1);
  rest.classes = 0;
  for (index c = 0; c < p.classes; ++c)
    if (std::isfinite(p.bias[static_cast<std::size_t>(c)])) {
      place[static_cast<std::size_t>(c)] = rest.classes++;
      rest.bias.push_back(p.bias[static_cast<std::size_t>(c)]);
      for (index d = 0; d < p.features; ++d)
        rest.weights.push_back(p.w(c, d));
    }
  for (std::int64_t& y : rest.labels)
    y = place[static_cast<std::size_t>(y)];
  close_to values("masked, values"), gradients("masked, gradients");
  const auto head = make_linear(perdita::cross_entropy<T>());
  linear_answer<T> got = run(*head, p);
  // Slopes of masked classes are exactly 0; the others are those of the rest.
  std::size_t wrong = 0;
  std::vector<T> d_weights, d_bias;
  for (index c = 0; c < p.classes; ++c) {
    const bool masked = place[static_cast<std::size_t>(c)] < 0;
    for (index d = 0; d < p.features; ++d) {
      const T g = got.d_weights[static_cast<std::size_t>(c * p.features + d)];
      wrong += masked && g != 0;
      if (!masked)
        d_weights.push_back(g);
    }
    wrong += masked && got.d_bias[static_cast<std::size_t>(c)] != 0;
    if (!masked)
      d_bias.push_back(got.d_bias[static_cast<std::size_t>(c)]);
  }
  CHECK(wrong == 0);
  got.d_weights = d_weights;
  got.d_bias = d_bias;
  judge<T>(cross_entropy_reference{}, mean, reference_scores<T>(rest), got, values, gradients);
  values.check();
  gradients.check();
  report_linear<T>(values, gradients);

  // As a label it costs everything.
  p.labels[4] = 1;
  const linear_answer<T> hopeless = run(*head, p);
  CHECK(hopeless.by_products[0][4] == std::numeric_limits<T>::infinity());
  CHECK(hopeless.value == std::numeric_limits<T>::infinity());
}

TEST_CASE("linear: the gradients are differences of values", "[linear]") {
  linear_problem<double> p = make_linear_problem<double>(5, 4, 7, 13, 2);
  random_numbers random(13);
  add_weights(p, random);
  std::fill(p.upstream.begin(), p.upstream.end(), 1.0);
  p.labels[1] = p.ignore_index;
  const std::vector<double> w = class_weights<double>(p.classes);
  const linear_subject_pointer<double> heads[] = {
      make_linear(perdita::cross_entropy<double>({.label_smoothing = 0.1,
                                                  .class_weights = w,
                                                  .temperature = 0.7,
                                                  .softcap = 5,
                                                  .log_z_penalty = 0.01,
                                                  .focal_gamma = 1.5})),
      make_linear(perdita::ldr_kl<double>({.lambda = 0.7, .margin = 0.3})),
      make_linear(perdita::z_loss<double>({.a = 0.5, .b = 2}))};
  for (const auto& head : heads) {
    const linear_answer<double> got = run(*head, p);
    const auto value = [&] {
      linear_way way;
      way.wants_gradient = false;
      way.by_products = 0;
      return run(*head, p, way).value;
    };
    for (const auto& [x, gradient] :
         {std::pair(&p.hidden, &got.d_hidden), std::pair(&p.weights, &got.d_weights),
          std::pair(&p.bias, &got.d_bias)}) {
      const auto report = perdita::testing::check_gradient(value, *x, *gradient);
      INFO(report.message());
      CHECK(report.ok);
      CHECK(report.unresolved == 0);
    }
  }
}

TEST_CASE("linear: twice through, with slopes that a first pass gave, as a loss of sequences does",
          "[linear]") {
  // ℓ = Σ_s log(1 + e^{-β Σ_{t in s} log p_t}) over sequences of three rows.
  constexpr double beta = 0.3;
  constexpr index sequences = 4, length = 3;
  linear_problem<double> p = make_linear_problem<double>(sequences * length, 6, 20, 14, 2);
  p.labels[4] = p.ignore_index;
  const auto head = make_linear(perdita::cross_entropy<double>({.reduction = sum}));
  std::vector<double> slopes;
  const auto value = [&] {
    linear_way way;
    way.wants_gradient = false;
    way.by_products = 4;
    linear_problem<double> first = p;
    first.upstream.clear();
    const std::vector<double> log_p = run(*head, first, way).by_products[2];
    double total = 0;
    slopes.clear();
    for (index s = 0; s < sequences; ++s) {
      double m = 0;
      for (index t = 0; t < length; ++t)
        m += beta * log_p[static_cast<std::size_t>(s * length + t)];
      total += std::log1p(std::exp(-m));
      // The row's value is -log p: ∂ℓ/∂value = β / (1 + e^m).
      slopes.insert(slopes.end(), length, beta / (1 + std::exp(m)));
    }
    return total;
  };
  (void)value();
  p.upstream = slopes;
  const linear_answer<double> got = run(*head, p);
  for (const auto& [x, gradient] :
       {std::pair(&p.hidden, &got.d_hidden), std::pair(&p.weights, &got.d_weights),
        std::pair(&p.bias, &got.d_bias)}) {
    const auto report = perdita::testing::check_gradient(value, *x, *gradient);
    INFO(report.message());
    CHECK(report.ok);
  }
}

TEST_CASE("linear: tight, 1 MiB a thread whatever the shape", "[linear]") {
  constexpr index rows = 4096, classes = 50257;
  struct one_thread_as {
    std::size_t threads;
    void operator()(std::size_t n, perdita::task work) const { perdita::serial(n, work); }
    std::size_t concurrency() const { return threads; }
  };
  for (const index features : {512, 2304}) {
    // So many rows and classes in shape alone: they all lie in the same place, and none counts.
    const auto n = static_cast<std::size_t>(features);
    const std::vector<float> hidden(n, 0.125F), weights(n, 0.25F);
    std::vector<float> d_hidden(n), d_weights(n);
    const std::vector<std::int64_t> labels(rows, -100);
    const auto head = make_linear(perdita::cross_entropy<float>());
    for (const std::size_t threads : {1U, 2U})
      for (const bool wants_gradient : {false, true}) {
        linear_call<float> call;
        call.hidden = {hidden.data(), rows, features, 0, 1};
        call.weights = {weights.data(), classes, features, 0, 1};
        call.labels = labels;
        call.wants_gradient = wants_gradient;
        call.d_hidden = {d_hidden.data(), rows, features, 0, 1};
        call.d_weights = {d_weights.data(), classes, features, 0, 1};
        call.head.budget = threads * least_budget<float>(rows, classes);
        const one_thread_as several{threads};
        perdita::workspace memory;
        call.options.run_on = several;
        call.options.memory = &memory;
        CHECK((*head)(call) == 0);
        INFO(features << " features, " << threads << " threads: " << memory.size() << " bytes");
        CHECK(memory.size() > threads * least_budget<float>(rows, classes));
        CHECK(memory.size() <= threads << 20);
      }
  }
}

} // namespace perdita_tests
