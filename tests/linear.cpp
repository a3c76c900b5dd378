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
  });
}

} // namespace perdita_tests
