// SPDX-License-Identifier: MIT

// The linear head against the same loss of given scores, where the scores are exact: with all
// by-products, special rows, and lists of soft targets against matrices of them.

#include <perdita/linear.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <perdita/cross_entropy.hpp>

#include "support/catch.hpp"
#include "support/linear_reference.hpp"
#include "support/linear_run.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {
namespace {

using perdita::reduction;

/// Both are within a few epsilons of the truth, and so of each other.
constexpr double value_budget = 3, slope_budget = 4;

/// What the loss says of given scores, as an answer with ∂/∂scores in the place of d_hidden.
template <class T>
linear_answer<T> given(const perdita::cross_entropy<T>& loss, const linear_problem<T>& p,
                       const std::vector<T>& scores, const std::vector<T>& soft,
                       unsigned by_products = 0x37) {
  const auto n = static_cast<std::size_t>(p.rows);
  linear_answer<T> a;
  a.d_hidden.assign(scores.size(), T(-7));
  perdita::call_options<T> call;
  perdita::vector_view<T>* const views[] = {
      &call.values, &call.log_sum_exp, &call.target_log_probability, &call.entropy, &call.penalty};
  for (unsigned k = 0; k < 5; ++k)
    if (by_products >> k & 1) {
      a.by_products[k].assign(n, T(-7));
      *views[k] = a.by_products[k];
    }
  a.hits.assign(n, 7);
  call.hits = a.hits;
  if (!p.row_weights.empty())
    call.row_weights = p.row_weights;
  if (!p.upstream.empty())
    call.upstream = p.upstream;
  call.scale = p.scale;
  call.normaliser = p.normaliser;
  const perdita::matrix_view<const T> x(scores.data(), p.rows, p.classes);
  const perdita::matrix_view<T> g(a.d_hidden.data(), p.rows, p.classes);
  a.value = soft.empty() && !p.sparse
                ? loss(x, p.labels, g, call)
                : loss(x, perdita::matrix_view<const T>(soft.data(), p.rows, p.classes), g, call);
  return a;
}

/// Compares what the head answered with that, and with the products that follow from its slopes.
template <class T>
void agree(const linear_problem<T>& p, const std::vector<T>& scores,
           const linear_answer<T>& expected, const linear_answer<T>& got, close_to& values,
           close_to& slopes) {
  using R = wider<T>;
  const R epsilon = static_cast<R>(std::numeric_limits<T>::epsilon());
  const R smallest = static_cast<R>(std::numeric_limits<T>::min());
  const auto classes = static_cast<std::size_t>(p.classes);
  const auto depth = static_cast<std::size_t>(p.features);
  const auto compare = [&](const char* what, T e, T g, R size) {
    values.compare(static_cast<R>(e),
                   static_cast<R>(value_budget) * (size + std::abs(static_cast<R>(e))) * epsilon +
                       smallest,
                   g, [&] { return std::string(what); });
  };
  CHECK(got.hits == expected.hits);
  R largest = 0; // what values near 0 are differences of
  std::vector<R> dx(static_cast<std::size_t>(p.rows) * depth), dx_size(dx), dw(classes * depth),
      dw_size(dw), db(classes), db_size(db);
  for (index r = 0; r < p.rows; ++r) {
    const auto i = static_cast<std::size_t>(r);
    const T* const z = scores.data() + i * classes;
    const T most = *std::max_element(z, z + classes);
    const R size = std::isfinite(most) ? std::abs(static_cast<R>(most)) : R(1);
    largest = std::max(largest, size);
    for (std::size_t k = 0; k < 5; ++k)
      if (!expected.by_products[k].empty() && !got.by_products[k].empty())
        compare(by_product_names[k], expected.by_products[k][i], got.by_products[k][i], size);
    R top = 0; // slopes too small beside the largest may be 0
    for (std::size_t j = 0; j < classes; ++j)
      top = std::max(top, std::abs(static_cast<R>(expected.d_hidden[i * classes + j])));
    for (std::size_t j = 0; j < classes; ++j) {
      const R g = static_cast<R>(expected.d_hidden[i * classes + j]);
      const R behind = std::isfinite(z[j]) && std::isfinite(most)
                           ? static_cast<R>(most) - static_cast<R>(z[j])
                           : R(0);
      const R noise = std::abs(g) * (static_cast<R>(slope_budget) + behind / 2) +
                      top * (1 + static_cast<R>(negligible_share<T>()) / epsilon);
      db[j] += g;
      db_size[j] += noise + noise_of_sum<R>(p.rows) * std::abs(g);
      for (std::size_t d = 0; d < depth; ++d) {
        const R x = static_cast<R>(p.hidden[i * depth + d]),
                w = static_cast<R>(p.weights[j * depth + d]);
        dx[i * depth + d] += g * w;
        dw[j * depth + d] += g * x;
        dx_size[i * depth + d] += (noise + noise_of_sum<R>(p.classes) * std::abs(g)) * std::abs(w);
        dw_size[j * depth + d] += (noise + noise_of_sum<R>(p.rows) * std::abs(g)) * std::abs(x);
      }
    }
  }
  compare("total", expected.value, got.value, largest * static_cast<R>(p.rows));
  const auto products = [&](const char* what, const std::vector<R>& e, const std::vector<R>& size,
                            const std::vector<T>& g) {
    for (std::size_t k = 0; k < g.size(); ++k)
      slopes.compare(e[k], size[k] * epsilon + 1000 * smallest, g[k],
                     [&] { return std::string(what) + " " + std::to_string(k); });
  };
  products("d_hidden", dx, dx_size, got.d_hidden);
  products("d_weights", dw, dw_size, got.d_weights);
  products("d_bias", db, db_size, got.d_bias);
}

template <class T> std::vector<perdita::cross_entropy<T>> losses(index classes, reduction how) {
  std::vector<T> w;
  for (index c = 0; c < classes; ++c)
    w.push_back(static_cast<T>(0.25 + 0.5 * static_cast<double>(c % 4)));
  using loss = perdita::cross_entropy<T>;
  return {loss({.reduction = how}),
          loss({.class_weights = w, .reduction = how, .log_z_penalty = T(0.01)}),
          loss({.label_smoothing = T(0.1), .class_weights = w, .reduction = how}),
          loss({.reduction = how, .temperature = T(2), .softcap = T(15)}),
          loss({.label_smoothing = T(0.25), .reduction = how, .log_z_penalty = T(0.01)})};
}

/// Lists of classes, unsorted and with repetitions, and the same as a matrix.
template <class T>
std::vector<T> add_lists(linear_problem<T>& p, bool with_starts, random_numbers& random) {
  p.sparse = true;
  p.labels.clear();
  std::vector<T> dense(static_cast<std::size_t>(p.rows * p.classes), T(0));
  constexpr index each = 3; // of every row where there are no starts
  for (index r = 0; r < p.rows; ++r) {
    const index n = with_starts ? static_cast<index>(random.below(6)) : each; // some are empty
    if (with_starts)
      p.row_starts.push_back(static_cast<std::int64_t>(p.soft_classes.size()));
    for (index k = 0; k < n; ++k) {
      // Every other list says one class twice. Eighths, which sum up exactly.
      const auto c =
          k == 2 && r % 2 == 0
              ? p.soft_classes[p.soft_classes.size() - 2]
              : static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(p.classes)));
      const T q = static_cast<T>(1 + static_cast<double>(random.below(4))) / 8;
      p.soft_classes.push_back(c);
      p.probabilities.push_back(q);
      dense[static_cast<std::size_t>(r * p.classes + c)] += q;
    }
  }
  if (with_starts)
    p.row_starts.push_back(static_cast<std::int64_t>(p.soft_classes.size()));
  return dense;
}

} // namespace

TEMPLATE_TEST_CASE("linear: values, by-products and gradients as the loss of the scores has them",
                   "[linear]", float, double) {
  using T = TestType;
  close_to values(std::string("given scores <") + (sizeof(T) == 4 ? "float>" : "double>"));
  close_to slopes(std::string("slopes of given scores <") +
                  (sizeof(T) == 4 ? "float>" : "double>"));
  struct shape {
    index rows, features, classes;
  };
  std::uint64_t seed = 40;
  for (const shape& s : {shape{40, 12, 3}, {19, 30, 600}, {270, 5, 130}})
    for (const reduction how : {reduction::none, reduction::mean, reduction::sum}) {
      random_numbers random(++seed);
      linear_problem<T> p = make_exact_problem<T>(s.rows, s.features, s.classes, seed);
      ignore_some(p);
      add_weights(p, random);
      p.scale = 2;
      for (T& q : p.row_weights) // exact ones
        q = std::round(4 * q) / 4;
      const std::vector<T> scores = exact_scores(p);
      for (const auto& loss : losses<T>(s.classes, how)) {
        const unsigned wanted = seed % 2 == 0 ? 0x3F : 0x37;
        linear_way way;
        way.by_products = wanted;
        const linear_answer<T> got = run(*make_linear(loss), p, way);
        CHECK(got.trespass.empty());
        agree(p, scores, given(loss, p, scores, {}, wanted), got, values, slopes);
      }
    }
  values.check();
  slopes.check();
  report_linear<T>(values, slopes);
}

TEMPLATE_TEST_CASE("linear: lists of soft targets are the matrix that they stand for", "[linear]",
                   float, double) {
  using T = TestType;
  close_to values(std::string("soft targets <") + (sizeof(T) == 4 ? "float>" : "double>"));
  close_to slopes(std::string("slopes of soft targets <") +
                  (sizeof(T) == 4 ? "float>" : "double>"));
  std::uint64_t seed = 60;
  for (const bool with_starts : {true, false})
    for (const index classes : {7, 90, 520})
      for (const bool weighs : {false, true}) {
        random_numbers random(++seed);
        linear_problem<T> p = make_exact_problem<T>(classes == 90 ? 275 : 30, 11, classes, seed);
        const std::vector<T> dense = add_lists(p, with_starts, random);
        if (weighs)
          add_weights(p, random);
        const std::vector<T> scores = exact_scores(p);
        for (const auto& loss : losses<T>(classes, weighs ? reduction::mean : reduction::sum)) {
          linear_answer<T> got;
          for (const bool tight : {false, true}) {
            linear_way way;
            way.by_products = 0x1B; // not what depends on which class is the favourite
            way.step = tight ? -2 : 1;
            way.budget = tight ? least_budget<T>(p.rows, p.classes) : 0;
            got = run(*make_linear(loss), p, way);
            CHECK(got.trespass.empty());
            linear_answer<T> expected = given(loss, p, scores, dense, 0x1B);
            got.hits = expected.hits;
            agree(p, scores, expected, got, values, slopes);
          }
        }
      }
  values.check();
  slopes.check();
  report_linear<T>(values, slopes);
}

TEMPLATE_TEST_CASE("linear: rows of no entries cost nothing but what smoothing asks", "[linear]",
                   float, double) {
  using T = TestType;
  linear_problem<T> p = make_linear_problem<T>(18, 6, 40, 70);
  p.sparse = true;
  p.row_starts.assign(19, 0);
  const linear_answer<T> nothing = run(*make_linear(perdita::cross_entropy<T>()), p);
  CHECK(nothing.value == 0);
  CHECK(same(nothing.d_hidden, std::vector<T>(nothing.d_hidden.size(), T(0))));
  CHECK(same(nothing.d_weights, std::vector<T>(nothing.d_weights.size(), T(0))));
  // Without row_starts the number of entries of each row is none, too.
  linear_problem<T> even = p;
  even.row_starts.clear();
  CHECK(difference(nothing, run(*make_linear(perdita::cross_entropy<T>()), even)) == "");
  close_to values("no entries, values"), slopes("no entries, slopes");
  cross_entropy_reference reference;
  reference.smoothing = 0.25;
  judge<T>(reference, reduction::sum, reference_scores<T>(p),
           run(*make_linear(perdita::cross_entropy<T>(
                   {.label_smoothing = T(0.25), .reduction = reduction::sum})),
               p),
           values, slopes);
  values.check();
  slopes.check();
  report_linear<T>(values, slopes);
}

TEMPLATE_TEST_CASE("linear: special scores are what they are to the loss", "[linear]", float,
                   double) {
  using T = TestType;
  constexpr T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  // One feature for each class, and one hidden state for each row: scores at will.
  struct row {
    std::array<T, 4> scores;
    std::int64_t label;
  };
  const std::vector<row> rows{{{1, -inf, 0, 2}, 0},
                              {{1, -inf, 0, 2}, 1},
                              {{0, 5, 1, 0}, 1},
                              {{0, inf, 1, 0}, 1},
                              {{0, inf, 1, 0}, 0},
                              {{inf, inf, 1, 0}, 0},
                              {{0, nan, 1, 0}, 1},
                              {{0, nan, 1, 0}, 0},
                              {{-inf, -inf, -inf, -inf}, 2},
                              {{-inf, -inf, 3, -inf}, 2},
                              {{-1000, -1000, -1000, -1000}, 3},
                              {{10000, 10020, 9980, 10000}, 1},
                              {{T(1e-30), T(-1e-30), 0, 0}, 2}};
  for (const T smoothing : {T(0), T(0.1)}) {
    const perdita::cross_entropy<T> loss(
        {.label_smoothing = smoothing, .reduction = reduction::sum});
    const auto head = make_linear(loss);
    for (const row& r : rows) {
      // The bias brings the scores, and the products are zeros.
      linear_problem<T> p;
      p.rows = 1, p.features = 2, p.classes = 4;
      p.hidden = {1, 1};
      p.weights.assign(8, T(0));
      for (std::size_t c = 0; c < 4; ++c)
        p.weights[2 * c] = T(c), p.weights[2 * c + 1] = -T(c);
      p.bias.assign(r.scores.begin(), r.scores.end());
      p.labels = {r.label};
      const std::vector<T> scores(r.scores.begin(), r.scores.end());
      const linear_answer<T> expected = given(loss, p, scores, {}), got = run(*head, p);
      INFO("scores " << scores[0] << " " << scores[1] << " " << scores[2] << " " << scores[3]
                     << ", label " << r.label << ", smoothing " << smoothing);
      const auto close = [](T a, T b) {
        const T few = 8 * std::numeric_limits<T>::epsilon();
        return same(a, b) || std::abs(a - b) <= few * std::max(std::abs(a), std::abs(b));
      };
      CHECK(close(expected.value, got.value));
      for (std::size_t k = 0; k < 5; ++k)
        if (!expected.by_products[k].empty())
          CHECK(close(expected.by_products[k][0], got.by_products[k][0]));
      CHECK(expected.hits == got.hits);
      for (std::size_t c = 0; c < 4; ++c)
        CHECK(close(expected.d_hidden[c], got.d_bias[c]));
    }
  }
}

} // namespace perdita_tests
