// SPDX-License-Identifier: MIT
#pragma once

/// Hidden states, class weights and labels for the linear head, where its gradients go, and what is
/// right: the values of three rows and the gradients of three rows and three classes, in plain
/// double.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <perdita/core/views.hpp>

#include "memory.hpp"

namespace bench {

using perdita::index;
using perdita::matrix_view;

struct head_shape {
  index rows, features, classes;
  std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(features) + "x" + std::to_string(classes);
  }
  double product() const { // operations
    return 2 * static_cast<double>(rows) * static_cast<double>(features) *
           static_cast<double>(classes);
  }
  bool operator==(const head_shape&) const = default;
};

/// A row-major matrix of floats in huge pages.
class matrix {
public:
  matrix(index rows, index cols)
      : rows_(rows), cols_(cols), memory_(std::make_unique<huge_memory>(
                                      static_cast<std::size_t>(rows * cols) * sizeof(float) + 64)) {
  }
  float* data() const { return reinterpret_cast<float*>(memory_->data()); }
  index rows() const { return rows_; }
  index cols() const { return cols_; }
  index size() const { return rows_ * cols_; }
  float* row(index r) const { return data() + r * cols_; }
  matrix_view<float> view() const { return {data(), rows_, cols_}; }
  matrix_view<const float> read() const { return {data(), rows_, cols_}; }

private:
  index rows_, cols_;
  std::unique_ptr<huge_memory> memory_;
};

/// Numbers that depend on their place alone: about normal (a sum of four uniform ones), variance 1.
struct random_numbers {
  std::uint64_t seed;
  std::uint64_t bits(std::uint64_t at) const {
    std::uint64_t z = (at + seed * 0x632be59bd9b4e019) * 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  double uniform(index at) const {
    return static_cast<double>(bits(static_cast<std::uint64_t>(at)) >> 11) * 0x1p-53;
  }
  float normal(index at) const {
    const std::uint64_t z = bits(static_cast<std::uint64_t>(at));
    const auto sum = (z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48);
    return (static_cast<float>(sum) * 0x1p-16F - 2) * 1.7320508F;
  }
};

enum class scores {
  random, ///< normal, of deviation 2
  peaked, ///< like a trained language model's: what is frequent, and a few that fit the context
  flat    ///< of deviation 0.1: nothing can be left out
};
inline const char* name(scores s) {
  return s == scores::random ? "random" : s == scores::peaked ? "peaked" : "flat";
}

class linear_problem {
public:
  linear_problem(head_shape s, scores kind) : linear_problem(s) {
    const index d = size.features;
    const auto spread = static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
    const random_numbers random{1}, other{2};
    for (index i = 0; i < weights.size(); ++i)
      weights.data()[i] = random.normal(i) * spread;
    const float sigma = kind == scores::flat ? 0.1F : kind == scores::peaked ? 2.6F : 2.0F;
    for (index i = 0; i < hidden.size(); ++i)
      hidden.data()[i] = other.normal(i) * sigma;
    for (index r = 0; r < size.rows; ++r)
      labels[at(r)] =
          static_cast<std::int32_t>(random_numbers{3}.bits(static_cast<std::uint64_t>(r)) %
                                    static_cast<std::uint64_t>(size.classes));
    if (kind == scores::peaked)
      sharpen();
    solve();
  }

  /// From a file: three int64 N D V, float hidden N x D, float weights V x D, float bias V, int32
  /// labels N. nullptr where there is no such file.
  static std::unique_ptr<linear_problem> read(const char* path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    std::array<std::int64_t, 3> n{};
    if (!file || std::fread(n.data(), sizeof n, 1, file.get()) != 1)
      return nullptr;
    std::unique_ptr<linear_problem> p(new linear_problem({n[0], n[1], n[2]}));
    p->bias.resize(at(n[2]));
    const auto take = [&](auto* to, index count) {
      return std::fread(to, sizeof *to, at(count), file.get()) == at(count);
    };
    if (!take(p->hidden.data(), n[0] * n[1]) || !take(p->weights.data(), n[2] * n[1]) ||
        !take(p->bias.data(), n[2]) || !take(p->labels.data(), n[0]))
      return nullptr;
    p->solve();
    return p;
  }

  head_shape size;
  matrix hidden, weights, d_hidden, d_weights;
  std::vector<float> bias; ///< empty: none
  std::vector<std::int32_t> labels;

  /// z_ij, in double.
  double score(index row, index c) const {
    const float *x = hidden.row(row), *w = weights.row(c);
    double sum = bias.empty() ? 0 : static_cast<double>(bias[at(c)]);
    for (index d = 0; d < size.features; ++d)
      sum += static_cast<double>(x[d]) * static_cast<double>(w[d]);
    return sum;
  }
  /// The log-sum-exp of three rows, and the gradients of the mean loss.
  bool right(const std::vector<float>& log_sum_exp) const {
    for (std::size_t i = 0; i < checked_rows_.size(); ++i)
      if (!near(static_cast<double>(log_sum_exp[at(checked_rows_[i])]), log_sum_exp_[i], 1e-5))
        return false;
    return true;
  }
  bool right(double value, const std::vector<float>& log_sum_exp) const {
    double sum = 0;
    for (index r = 0; r < size.rows; ++r)
      sum += static_cast<double>(log_sum_exp[at(r)]) - target_[at(r)];
    return near(value, sum / static_cast<double>(size.rows), 1e-5);
  }
  /// Of what d_hidden and d_weights hold.
  bool gradients_right(const std::vector<float>& log_sum_exp, double tolerance = 1e-4) const {
    const auto n = static_cast<double>(size.rows);
    for (std::size_t i = 0; i < checked_rows_.size(); ++i) {
      const index r = checked_rows_[i];
      double error = 0, norm = 0;
      for (index d = 0; d < size.features; ++d) {
        const double expected = d_hidden_[i * at(size.features) + at(d)] / n;
        const double e = static_cast<double>(d_hidden.row(r)[d]) - expected;
        error += e * e;
        norm += expected * expected;
      }
      if (!(error <= tolerance * tolerance * norm))
        return false;
    }
    for (const index c : {index{0}, static_cast<index>(labels[0]), size.classes - 1}) {
      std::vector<double> expected(at(size.features));
      for (index r = 0; r < size.rows; ++r) {
        const double g = std::exp(score(r, c) - static_cast<double>(log_sum_exp[at(r)])) -
                         (labels[at(r)] == c ? 1 : 0);
        for (index d = 0; d < size.features; ++d)
          expected[at(d)] += g / n * static_cast<double>(hidden.row(r)[d]);
      }
      double error = 0, norm = 0;
      for (index d = 0; d < size.features; ++d) {
        const double e = static_cast<double>(d_weights.row(c)[d]) - expected[at(d)];
        error += e * e;
        norm += expected[at(d)] * expected[at(d)];
      }
      if (!(error <= tolerance * tolerance * norm))
        return false;
    }
    return true;
  }

private:
  static std::size_t at(index i) { return static_cast<std::size_t>(i); }

  explicit linear_problem(head_shape s)
      : size(s), hidden(s.rows, s.features), weights(s.classes, s.features),
        d_hidden(s.rows, s.features), d_weights(s.classes, s.features), labels(at(s.rows)) {}

  static bool near(double a, double b, double tolerance) {
    return std::abs(a - b) <= tolerance * std::max(std::abs(b), 1e-3);
  }

  /// One direction carries how frequent a class is (Zipf's law, in an order without meaning); the
  /// label is drawn by that, and the hidden state leans towards it, more in some rows than in
  /// others.
  void sharpen() {
    const random_numbers random{4}, rows{5};
    std::vector<index> rank(at(size.classes));
    std::iota(rank.begin(), rank.end(), 0);
    for (index j = size.classes - 1; j > 0; --j)
      std::swap(
          rank[at(j)],
          rank[random.bits(static_cast<std::uint64_t>(j)) % static_cast<std::uint64_t>(j + 1)]);
    std::vector<double> below(at(size.classes) + 1);
    std::vector<index> class_of(at(size.classes));
    for (index j = 0; j < size.classes; ++j)
      class_of[at(rank[at(j)])] = j;
    for (index k = 0; k < size.classes; ++k)
      below[at(k) + 1] = below[at(k)] + 1 / (static_cast<double>(k) + 2.7);
    for (index j = 0; j < size.classes; ++j)
      weights.row(j)[0] = static_cast<float>(-std::log(static_cast<double>(rank[at(j)]) + 2.7));
    for (index r = 0; r < size.rows; ++r) {
      const double drawn = rows.uniform(3 * r) * below.back();
      const auto k = std::upper_bound(below.begin(), below.end(), drawn) - below.begin() - 1;
      const index label = class_of[at(std::clamp<index>(k, 0, size.classes - 1))];
      labels[at(r)] = static_cast<std::int32_t>(label);
      const auto lean = static_cast<float>(4 + 14 * rows.uniform(3 * r + 1));
      float* x = hidden.row(r);
      for (index d = 1; d < size.features; ++d)
        x[d] += lean * weights.row(label)[d];
      x[0] = 1;
    }
  }

  void solve() {
    checked_rows_ = {0, size.rows / 2, size.rows - 1};
    d_hidden_.assign(3 * at(size.features), 0);
    std::vector<double> z(at(size.classes));
    for (std::size_t i = 0; i < 3; ++i) {
      const index r = checked_rows_[i];
      for (index c = 0; c < size.classes; ++c)
        z[at(c)] = score(r, c);
      const double most = *std::max_element(z.begin(), z.end());
      double sum = 0;
      for (const double x : z)
        sum += std::exp(x - most);
      log_sum_exp_[i] = most + std::log(sum);
      for (index c = 0; c < size.classes; ++c) {
        const double g = std::exp(z[at(c)] - log_sum_exp_[i]) - (labels[at(r)] == c ? 1 : 0);
        for (index d = 0; d < size.features; ++d)
          d_hidden_[i * at(size.features) + at(d)] += g * static_cast<double>(weights.row(c)[d]);
      }
    }
    target_.resize(at(size.rows));
    for (index r = 0; r < size.rows; ++r)
      target_[at(r)] = score(r, labels[at(r)]);
  }

  std::array<index, 3> checked_rows_{};
  std::array<double, 3> log_sum_exp_{};
  std::vector<double> d_hidden_, target_;
};

} // namespace bench
