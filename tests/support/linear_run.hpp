// SPDX-License-Identifier: MIT
#pragma once

// Calls of the linear head, free of types: a problem, a way to ask it, and what came back. The
// losses that it is tried with are compiled once, in linear_subjects.cpp.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/ldr.hpp>
#include <perdita/linear.hpp>
#include <perdita/z_loss.hpp>

#include "numbers.hpp"
#include "row_run.hpp"

namespace perdita_tests {

// ---- the head with a loss

template <class T> struct linear_call {
  perdita::matrix_view<const T> hidden, weights;
  perdita::vector_view<const T> bias; ///< no data: none
  perdita::vector_view<const std::int64_t> labels;
  const perdita::sparse_targets<T>* sparse = nullptr; ///< instead of labels
  bool wants_gradient = true;
  perdita::matrix_view<T> d_hidden, d_weights;
  perdita::vector_view<T> d_bias; ///< no data: none
  perdita::call_options<T> options;
  perdita::linear_options head;
};

template <class T> class linear_subject {
public:
  virtual ~linear_subject() = default;
  virtual T operator()(const linear_call<T>& call) const = 0;
  /// Whether there are by-products beside the values.
  virtual bool has_softmax() const = 0;
};

template <class T> using linear_subject_pointer = std::unique_ptr<linear_subject<T>>;
linear_subject_pointer<float> make_linear(const perdita::cross_entropy<float>&);
linear_subject_pointer<double> make_linear(const perdita::cross_entropy<double>&);
linear_subject_pointer<float> make_linear(const perdita::ldr_kl<float>&);
linear_subject_pointer<double> make_linear(const perdita::ldr_kl<double>&);
linear_subject_pointer<float> make_linear(const perdita::z_loss<float>&);
linear_subject_pointer<double> make_linear(const perdita::z_loss<double>&);

// ---- problems

template <class T> struct linear_problem {
  index rows = 0, features = 0, classes = 0;
  std::vector<T> hidden, weights, bias; // row by row; bias empty: none
  std::vector<std::int64_t> labels;
  bool sparse = false; // the next three instead of labels
  std::vector<std::int32_t> soft_classes;
  std::vector<T> probabilities;
  std::vector<std::int64_t> row_starts;                      // empty: as many for every row
  std::vector<T> row_weights, upstream;                      // empty: none
  std::vector<T> before_hidden, before_weights, before_bias; // not empty: what is added to
  T scale = 1;
  double normaliser = 0;
  std::int64_t ignore_index = -100;

  bool counts(index r) const {
    const auto i = static_cast<std::size_t>(r);
    return (sparse || labels[i] != ignore_index) && (row_weights.empty() || row_weights[i] != 0);
  }
  T x(index r, index d) const { return hidden[static_cast<std::size_t>(r * features + d)]; }
  T w(index c, index d) const { return weights[static_cast<std::size_t>(c * features + d)]; }
};

/// Scores are about normal, with a deviation of `spread`.
template <class T>
linear_problem<T> make_linear_problem(index rows, index features, index classes, std::uint64_t seed,
                                      double spread = 3, bool bias = true) {
  random_numbers random(seed);
  linear_problem<T> p;
  p.rows = rows, p.features = features, p.classes = classes;
  const double unit = spread / std::sqrt(static_cast<double>(features > 0 ? features : 1));
  const auto fill = [&](std::vector<T>& v, index n, double size) {
    for (index i = 0; i < n; ++i)
      v.push_back(static_cast<T>(size * random.normal()));
  };
  fill(p.hidden, rows * features, 1);
  fill(p.weights, classes * features, unit);
  if (bias)
    fill(p.bias, classes, 1);
  for (index r = 0; r < rows; ++r)
    p.labels.push_back(
        static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(classes))));
  return p;
}

/// All scores, and all that they are added up from, are exact in T: any order gives the same.
template <class T>
linear_problem<T> make_exact_problem(index rows, index features, index classes, std::uint64_t seed,
                                     double spread = 3, bool bias = true) {
  linear_problem<T> p = make_linear_problem<T>(rows, features, classes, seed, 0, bias);
  random_numbers random(seed + 1);
  // Integers from -8 to 8 have a deviation of 4.9.
  const double unit =
      std::exp2(std::round(std::log2(spread / 24 / std::sqrt(static_cast<double>(features)))));
  const auto fill = [&](std::vector<T>& v, double size) {
    for (T& x : v)
      x = static_cast<T>(size * (static_cast<double>(random.below(17)) - 8));
  };
  fill(p.hidden, 1);
  fill(p.weights, unit);
  fill(p.bias, unit * 8);
  return p;
}
/// The scores of such a problem.
template <class T> std::vector<T> exact_scores(const linear_problem<T>& p) {
  std::vector<T> z;
  for (index r = 0; r < p.rows; ++r)
    for (index c = 0; c < p.classes; ++c) {
      T sum = p.bias.empty() ? T(0) : p.bias[static_cast<std::size_t>(c)];
      for (index d = 0; d < p.features; ++d)
        sum += p.x(r, d) * p.w(c, d);
      z.push_back(sum);
    }
  return z;
}

template <class T> void ignore_some(linear_problem<T>& p) {
  for (std::size_t r = 1; r < p.labels.size(); r += 4)
    p.labels[r] = p.ignore_index;
}
template <class T> void add_weights(linear_problem<T>& p, random_numbers& random) {
  for (index r = 0; r < p.rows; ++r) {
    p.row_weights.push_back(r % 5 == 3 ? T(0) : static_cast<T>(random.uniform(0.25, 4)));
    p.upstream.push_back(static_cast<T>(random.uniform(-2, 2)));
  }
}
/// Something that gradients are added to.
template <class T> void add_before(linear_problem<T>& p, random_numbers& random) {
  const auto fill = [&](std::vector<T>& v, index n) {
    for (index i = 0; i < n; ++i)
      v.push_back(static_cast<T>(random.uniform(-1, 1)));
  };
  fill(p.before_hidden, p.rows * p.features);
  fill(p.before_weights, p.classes * p.features);
  fill(p.before_bias, p.classes);
}

// ---- ways to ask

/// Nothing of this may change a bit of the answer, but the budget between roomy and tight.
struct linear_way {
  layout hidden = layout::packed, weights = layout::packed;
  layout d_hidden = layout::packed, d_weights = layout::packed;
  bool wants_gradient = true, wants_d_bias = true;
  unsigned by_products = 0x37; // as in arrangement: all but the entropy
  std::size_t offset = 0;      // elements past an aligned address
  edge against = edge::none;
  index step = 1; // of what has one element per row, and of the gradient of the bias
  std::size_t budget = 0;
  perdita::executor run_on{perdita::serial};
  perdita::workspace* memory = nullptr;
};

template <class T> struct linear_answer {
  T value = 0;
  std::vector<T> d_hidden, d_weights, d_bias;
  std::array<std::vector<T>, 5> by_products;
  std::vector<unsigned char> hits;
  std::string trespass; // what else was touched
};

template <class T>
linear_answer<T> run(const linear_subject<T>& head, const linear_problem<T>& p,
                     const linear_way& way = {}) {
  arrangement a;
  a.offset = way.offset, a.against = way.against, a.step = way.step;
  arrangement packed = a;
  packed.step = 1;
  const unsigned wanted = head.has_softmax() ? way.by_products : way.by_products & 1;

  placed_matrix<T> hidden(way.hidden, p.rows, p.features, kept::compute, a);
  placed_matrix<T> weights(way.weights, p.classes, p.features, kept::compute, a);
  placed_matrix<T> d_hidden(way.d_hidden, p.rows, p.features, kept::compute, a);
  placed_matrix<T> d_weights(way.d_weights, p.classes, p.features, kept::compute, a);
  hidden.write(p.hidden);
  weights.write(p.weights);
  if (!p.before_hidden.empty())
    d_hidden.write(p.before_hidden);
  if (!p.before_weights.empty())
    d_weights.write(p.before_weights);
  for (placed_matrix<T>* m : {&hidden, &weights, &d_hidden, &d_weights})
    m->remember();
  placed_vector<T> bias(static_cast<index>(p.bias.size()), packed);
  bias.write(p.bias);
  placed_vector<T> d_bias(p.classes, a);
  if (!p.before_bias.empty())
    d_bias.write(p.before_bias);
  placed_vector<std::int64_t> labels(static_cast<index>(p.labels.size()), a);
  labels.write(p.labels);
  placed_vector<T> row_weights(static_cast<index>(p.row_weights.size()), a),
      upstream(static_cast<index>(p.upstream.size()), a);
  row_weights.write(p.row_weights);
  upstream.write(p.upstream);
  placed_vector<T> r0(p.rows, a), r1(p.rows, a), r2(p.rows, a), r3(p.rows, a), r4(p.rows, a);
  placed_vector<T>* const reports[] = {&r0, &r1, &r2, &r3, &r4};
  placed_vector<unsigned char> hits(p.rows, a);
  placed_vector<std::int32_t> soft_classes(static_cast<index>(p.soft_classes.size()), a);
  soft_classes.write(p.soft_classes);
  placed_vector<T> probabilities(static_cast<index>(p.probabilities.size()), a);
  probabilities.write(p.probabilities);
  placed_vector<std::int64_t> row_starts(static_cast<index>(p.row_starts.size()), a);
  row_starts.write(p.row_starts);
  perdita::sparse_targets<T> sparse{soft_classes.view(), probabilities.view(), {}};
  if (!p.row_starts.empty())
    sparse.row_starts = row_starts.view();

  const auto view = []<class E>(const placed_matrix<T>& m, E*) {
    const geometry& at = m.at();
    perdita::matrix_view<E> v(static_cast<E*>(m.origin()), at.rows, at.cols, at.row_stride,
                              at.col_stride);
    v.plane_rows = at.plane_rows;
    v.plane_stride = at.plane_stride;
    return v;
  };
  linear_call<T> call;
  call.hidden = view(hidden, static_cast<const T*>(nullptr));
  call.weights = view(weights, static_cast<const T*>(nullptr));
  if (!p.bias.empty())
    call.bias = bias.view();
  call.labels = labels.view();
  call.sparse = p.sparse ? &sparse : nullptr;
  call.wants_gradient = way.wants_gradient;
  if (way.wants_gradient) {
    call.d_hidden = view(d_hidden, static_cast<T*>(nullptr));
    call.d_weights = view(d_weights, static_cast<T*>(nullptr));
    if (way.wants_d_bias)
      call.d_bias = d_bias.view();
  }
  call.head.budget = way.budget;
  call.head.accumulate_weights = !p.before_weights.empty();
  perdita::call_options<T>& o = call.options;
  if (!p.row_weights.empty())
    o.row_weights = row_weights.view();
  if (!p.upstream.empty())
    o.upstream = upstream.view();
  o.scale = p.scale;
  o.normaliser = p.normaliser;
  o.accumulate = !p.before_hidden.empty();
  perdita::vector_view<T>* views[] = {&o.values, &o.log_sum_exp, &o.target_log_probability,
                                      &o.entropy, &o.penalty};
  for (unsigned k = 0; k < 5; ++k)
    if (wanted >> k & 1)
      *views[k] = reports[k]->view();
  if (wanted >> 5 & 1)
    o.hits = hits.view();
  o.run_on = way.run_on;
  o.memory = way.memory;

  const std::uint32_t environment_before = environment();
  linear_answer<T> answer;
  answer.value = head(call);
  if (environment() != environment_before)
    answer.trespass += " the floating-point environment;";

  if (way.wants_gradient) {
    answer.d_hidden = d_hidden.read();
    answer.d_weights = d_weights.read();
    if (way.wants_d_bias)
      answer.d_bias = d_bias.read();
  }
  for (unsigned k = 0; k < 5; ++k)
    if (wanted >> k & 1)
      answer.by_products[k] = reports[k]->read();
  if (wanted >> 5 & 1)
    answer.hits = hits.read();
  if (hidden.changed() || weights.changed() || bias.changed())
    answer.trespass += " an input;";
  if (labels.changed() || row_weights.changed() || upstream.changed() || soft_classes.changed() ||
      probabilities.changed() || row_starts.changed())
    answer.trespass += " labels, targets or row weights;";
  const bool allowed = way.wants_gradient;
  if (allowed ? d_hidden.changed_elsewhere() : d_hidden.changed())
    answer.trespass += " memory beside the gradient of the hidden states;";
  if (allowed ? d_weights.changed_elsewhere() : d_weights.changed())
    answer.trespass += " memory beside the gradient of the weights;";
  if (d_bias.changed_elsewhere() || (d_bias.changed() && !(allowed && way.wants_d_bias)))
    answer.trespass += " memory beside the gradient of the bias;";
  for (unsigned k = 0; k < 5; ++k)
    if (reports[k]->changed_elsewhere() || (reports[k]->changed() && !(wanted >> k & 1)))
      answer.trespass += std::string(" memory beside ") + by_product_names[k] + ";";
  if (hits.changed_elsewhere())
    answer.trespass += " memory beside hits;";
  return answer;
}

/// Where two answers differ in a bit; empty if nowhere. What only one of them has does not count.
template <class T>
std::string difference(const linear_answer<T>& expected, const linear_answer<T>& got) {
  std::string all = got.trespass.empty() ? "" : "touched" + got.trespass;
  if (!same(expected.value, got.value))
    all += " value";
  const auto check = [&](const char* what, const auto& e, const auto& g) {
    if (e.empty() || g.empty() || same(e, g))
      return;
    all += std::string(" ") + what;
    for (std::size_t i = 0; i < e.size() && i < g.size(); ++i)
      if (!same(e[i], g[i])) {
        char text[128];
        std::snprintf(text, sizeof text, "[%zu] %a, not %a;", i, static_cast<double>(g[i]),
                      static_cast<double>(e[i]));
        all += text;
        return;
      }
  };
  check("d_hidden", expected.d_hidden, got.d_hidden);
  check("d_weights", expected.d_weights, got.d_weights);
  check("d_bias", expected.d_bias, got.d_bias);
  for (std::size_t k = 0; k < 5; ++k)
    check(by_product_names[k], expected.by_products[k], got.by_products[k]);
  check("hits", expected.hits, got.hits);
  return all;
}

/// The least budget for a problem: one piece.
template <class T> std::size_t least_budget(index rows, index classes) {
  constexpr auto lanes = static_cast<index>(perdita::core::lanes<T>);
  const index piece = classes >= 4096 ? 512 : std::clamp<index>((classes + 7) / 8, 64, 512);
  const index block = std::min(16 * lanes, (rows + lanes - 1) / lanes * lanes);
  return static_cast<std::size_t>(block * (std::min(piece, classes) + 1)) * sizeof(T);
}

} // namespace perdita_tests
