// SPDX-License-Identifier: MIT

// A vocabulary in slices: records merge to what the whole head knows, and every slice finds its
// part of the gradients.

#include <perdita/linear.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/linear_run.hpp"

namespace perdita_tests {
namespace {

template <class T> struct slice_answer {
  T value = 0;
  std::vector<T> d_hidden, d_weights, d_bias, values, entropy;
  std::vector<unsigned char> hits;
};

/// The problem's classes cut before those numbers, asked as machines would that have a slice each.
template <class Loss>
slice_answer<typename Loss::value_type>
in_slices(const Loss& loss, const linear_problem<typename Loss::value_type>& p,
          const std::vector<index>& cuts, std::size_t budget = 0) {
  using T = typename Loss::value_type;
  const perdita::linear head(loss, {.budget = budget});
  const perdita::matrix_view<const T> hidden(p.hidden.data(), p.rows, p.features);
  slice_answer<T> a;
  const auto rows = static_cast<std::size_t>(p.rows);
  a.d_hidden.assign(p.hidden.size(), 0);
  a.d_weights.assign(p.weights.size(), 7);
  a.d_bias.assign(p.bias.size(), 7);
  a.values.assign(rows, 0);
  a.entropy.assign(rows, 0);
  a.hits.assign(rows, 0);
  perdita::call_options<T> call{.row_weights = p.row_weights, .upstream = p.upstream};
  call.accumulate = true;
  call.values = a.values;
  if constexpr (Loss::has_softmax) {
    call.entropy = a.entropy;
    call.hits = a.hits;
  }
  const auto slice_from = [&](std::size_t s, auto use) {
    const index first = cuts[s], end = s + 1 < cuts.size() ? cuts[s + 1] : p.classes;
    const perdita::matrix_view<const T> weights(p.weights.data() + first * p.features, end - first,
                                                p.features);
    const perdita::vector_view<const T> bias(p.bias.data() + first, end - first);
    const perdita::matrix_view<T> d_weights(a.d_weights.data() + first * p.features, end - first,
                                            p.features);
    const perdita::vector_view<T> d_bias(a.d_bias.data() + first, end - first);
    use(head.slice(hidden, perdita::affine(weights, bias), p.labels, first, p.classes, call),
        perdita::affine(d_weights, d_bias));
  };
  std::vector<std::vector<perdita::linear_record>> records(
      cuts.size(), std::vector<perdita::linear_record>(rows));
  for (std::size_t s = 0; s < cuts.size(); ++s)
    slice_from(s, [&](const auto& slice, const auto&) { slice.summarise(records[s]); });
  for (std::size_t step = 1; step < cuts.size(); step *= 2) // what is merged is merged again
    for (std::size_t s = 0; s + step < cuts.size(); s += 2 * step)
      slice_from(
          s, [&](const auto& slice, const auto&) { slice.merge(records[s], records[s + step]); });
  for (std::size_t s = 0; s < cuts.size(); ++s)
    slice_from(s, [&](const auto& slice, const auto& d_weights) {
      const T value = slice.finish(records[0]);
      CHECK((s == 0 || value == a.value)); // the same for everybody
      a.value = value;
      slice.backward(records[0], perdita::matrix_view<T>(a.d_hidden.data(), p.rows, p.features),
                     d_weights);
    });
  return a;
}

template <class Loss>
slice_answer<typename Loss::value_type> whole(const Loss& loss,
                                              const linear_problem<typename Loss::value_type>& p) {
  using T = typename Loss::value_type;
  const perdita::linear head(loss);
  slice_answer<T> a;
  const auto rows = static_cast<std::size_t>(p.rows);
  a.d_hidden.resize(p.hidden.size());
  a.d_weights.resize(p.weights.size());
  a.d_bias.resize(p.bias.size());
  a.values.assign(rows, 0);
  a.entropy.assign(rows, 0);
  a.hits.assign(rows, 0);
  perdita::call_options<T> call{.row_weights = p.row_weights, .upstream = p.upstream};
  call.values = a.values;
  if constexpr (Loss::has_softmax) {
    call.entropy = a.entropy;
    call.hits = a.hits;
  }
  const perdita::matrix_view<const T> hidden(p.hidden.data(), p.rows, p.features),
      weights(p.weights.data(), p.classes, p.features);
  const perdita::matrix_view<T> d_hidden(a.d_hidden.data(), p.rows, p.features),
      d_weights(a.d_weights.data(), p.classes, p.features);
  a.value = head(hidden, perdita::affine(weights, p.bias), p.labels, d_hidden,
                 perdita::affine(d_weights, a.d_bias), call);
  return a;
}

/// The largest difference over the largest number.
template <class T> double off(const std::vector<T>& a, const std::vector<T>& b) {
  double most = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    most = std::max(most, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
    size = std::max(size, std::fabs(static_cast<double>(b[i])));
  }
  return size > 0 ? most / size : most;
}

template <class T> linear_problem<T> sliced_problem() {
  random_numbers random(3);
  linear_problem<T> p = make_linear_problem<T>(37, 29, 1301, 3);
  p.labels[0] = 16; // the last class of a slice that becomes the second of a pair
  p.labels[1] = 1299;
  p.labels[2] = 1299;
  ignore_some(p);
  add_weights(p, random);
  return p;
}

template <class Loss> void check_slices(const Loss& loss) {
  using T = typename Loss::value_type;
  const linear_problem<T> p = sliced_problem<T>();
  const slice_answer<T> expected = whole(loss, p);
  const double near = 24 * static_cast<double>(std::numeric_limits<T>::epsilon());
  const std::vector<std::vector<index>> cuts{
      {0}, {0, 700}, {0, 1, 1300}, {0, 3, 17, 64, 65, 511, 1299}};
  for (const auto& cut : cuts) {
    const slice_answer<T> a = in_slices(loss, p, cut);
    INFO(cut.size() << " slices");
    CHECK(std::fabs(static_cast<double>(a.value - expected.value)) <=
          near * std::fabs(static_cast<double>(expected.value)));
    CHECK(off(a.values, expected.values) <= near);
    CHECK(off(a.entropy, expected.entropy) <= near);
    CHECK(a.hits == expected.hits);
    CHECK(off(a.d_hidden, expected.d_hidden) <= near);
    CHECK(off(a.d_weights, expected.d_weights) <= near);
    CHECK(off(a.d_bias, expected.d_bias) <= near);
    if (cut.size() == 1) { // nothing was merged: every bit is the same
      CHECK(a.value == expected.value);
      CHECK(a.values == expected.values);
      CHECK(a.d_hidden == expected.d_hidden);
      CHECK(a.d_weights == expected.d_weights);
      CHECK(a.d_bias == expected.d_bias);
    }
  }
}

} // namespace

TEST_CASE("linear: 1, 2, 3 and 7 uneven slices give what the whole gives", "[linear]") {
  check_slices(perdita::cross_entropy<float>());
  check_slices(perdita::cross_entropy<double>({.label_smoothing = 0.1, .log_z_penalty = 0.01}));
  check_slices(perdita::z_loss<double>());
}

TEST_CASE("linear: slices may keep only a few pieces", "[linear]") {
  const auto p = sliced_problem<float>();
  const perdita::cross_entropy<float> loss;
  const slice_answer<float> expected = whole(loss, p);
  const slice_answer<float> a = in_slices(loss, p, {0, 500}, std::size_t{40} << 10);
  CHECK(off(a.d_hidden, expected.d_hidden) <= 3e-6);
  CHECK(off(a.d_weights, expected.d_weights) <= 3e-6);
}

TEST_CASE("linear: rivals of all pieces count for a hit", "[linear]") {
  linear_problem<float> p = make_linear_problem<float>(9, 8, 1301, 3);
  p.labels.assign(p.labels.size(), 5);
  p.bias.assign(p.bias.size(), 0);
  p.bias[5] = 500;
  p.bias[1300] = 600;
  const perdita::cross_entropy<float> loss;
  const auto hits = whole(loss, p).hits;
  CHECK(std::count(hits.begin(), hits.end(), 0) == p.rows);
  p.bias[1300] = 400;
  const auto more = whole(loss, p).hits;
  CHECK(std::count(more.begin(), more.end(), 1) == p.rows);
}

TEST_CASE("linear: a slice refuses what cannot be its", "[linear]") {
  const auto p = sliced_problem<float>();
  const perdita::linear head(perdita::cross_entropy<float>{});
  const perdita::matrix_view<const float> hidden(p.hidden.data(), p.rows, p.features),
      weights(p.weights.data(), 100, p.features);
  const auto slice = [&](index first, index classes) {
    return head.slice(hidden, weights, p.labels, first, classes);
  };
  CHECK_THROWS_WITH(slice(-1, 1301), Catch::Matchers::ContainsSubstring("first_class is -1"));
  CHECK_THROWS_WITH(slice(1202, 1301), Catch::Matchers::ContainsSubstring("first_class is 1202"));
  CHECK_THROWS_WITH(head.slice(hidden, perdita::matrix_view<const float>(nullptr, 0, p.features),
                               p.labels, 5, 1301),
                    Catch::Matchers::ContainsSubstring("rows of the weights is 0"));
  std::vector<perdita::linear_record> few(36), enough(37);
  CHECK_THROWS_WITH(slice(0, 1301).summarise(few),
                    Catch::Matchers::ContainsSubstring("number of records is 36"));
  CHECK_THROWS_WITH(slice(0, 1301).merge(enough, few),
                    Catch::Matchers::ContainsSubstring("number of records is 36"));
  // Labels are looked up among all classes.
  CHECK_THROWS_WITH(slice(0, 101).summarise(enough), Catch::Matchers::ContainsSubstring("labels["));
}

} // namespace perdita_tests
