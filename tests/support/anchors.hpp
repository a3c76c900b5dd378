// SPDX-License-Identifier: MIT
#pragma once

// Losses of anchors against their definitions: the value from a matrix of comparisons in 113 bits,
// the gradients by differences of that value, which are exact to 70 bits and more.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <perdita/core/anchor_loss.hpp>

#include "accuracy.hpp"
#include "catch.hpp"
#include "embeddings.hpp"
#include "executors.hpp"
#include "wide.hpp"

namespace perdita_tests {

/// What a definition sees: cosines, products or (not squared) distances, and who belongs to whom
/// (1), does not (-1), or is not compared (0).
struct wide_comparisons {
  wide_matrix score;
  std::vector<std::vector<int>> relation;

  perdita::index anchors() const { return score.rows; }
  perdita::index candidates() const { return score.cols; }
  int of(perdita::index i, perdita::index j) const {
    return relation[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)];
  }
  bool has(perdita::index i, int which) const {
    for (const int r : relation[static_cast<std::size_t>(i)])
      if (r == which)
        return true;
    return false;
  }
};
/// The whole, reduced value.
using anchor_definition = std::function<wide(const wide_comparisons&)>;

struct anchor_subject {
  bool normalise = true;
  bool distances = false;
  double value_budget = 64, gradient_budget = 256; ///< ε of 1 and of the largest slope
};

wide_matrix unit_rows(wide_matrix x);
/// Of one x and y after another, which differ by little where differences are taken: only rows that
/// are not what they were are compared anew.
class comparer {
public:
  comparer(std::vector<std::vector<int>> relation, const anchor_subject& subject)
      : subject_(subject), now_{wide_matrix(0, 0), std::move(relation)} {}
  const wide_comparisons& operator()(const wide_matrix& x, const wide_matrix& y);

private:
  struct side {
    wide_matrix raw{0, 0}, unit{0, 0};
    std::vector<bool> moved;
    void become(const wide_matrix& m, bool normalise);
  };
  anchor_subject subject_;
  side x_, y_;
  wide_comparisons now_;
};
inline wide_comparisons compare(const wide_matrix& x, const wide_matrix& y,
                                const std::vector<std::vector<int>>& relation,
                                const anchor_subject& subject) {
  return comparer(relation, subject)(x, y);
}
std::vector<std::vector<int>> relations(const std::vector<int>& x, const std::vector<int>& y,
                                        bool alone);
/// The last comparisons that were not near those before: what constants of a loss are made of.
class constants {
public:
  const wide_comparisons& of(const wide_comparisons& c) {
    bool same = kept_.score.x.size() == c.score.x.size();
    for (std::size_t k = 0; same && k < c.score.x.size(); ++k)
      same = size_of(wide(c.score.x[k] - kept_.score.x[k])) < wide(1e-8);
    if (!same)
      kept_ = c;
    return kept_;
  }

private:
  wide_comparisons kept_{wide_matrix(0, 0), {}};
};

/// (f(m + h) − f(m − h))/2h of every element.
wide_matrix differences(wide_matrix& m, const std::function<wide()>& f);

/// The calls of any loss of anchors, so that what checks them is compiled once.
template <class T> class anchor_calls {
public:
  using matrix = perdita::matrix_view<const T>;
  using slopes = perdita::matrix_view<T>;
  using labels = std::vector<int>;
  using options = perdita::anchor_options<T>;
  anchor_calls() = default;
  anchor_calls(const anchor_calls&) = delete;
  anchor_calls& operator=(const anchor_calls&) = delete;
  virtual ~anchor_calls() = default;

  virtual T operator()(const matrix& x, const labels& of_x, const options& = {}) const = 0;
  virtual T operator()(const matrix& x, const labels& of_x, const slopes& d_x,
                       const options& = {}) const = 0;
  virtual T operator()(const matrix& x, const matrix& y, const labels& of_x, const labels& of_y,
                       const options& = {}) const = 0;
  virtual T operator()(const matrix& x, const matrix& y, const labels& of_x, const labels& of_y,
                       const slopes& d_x, const slopes& d_y, const options& = {}) const = 0;
  virtual T views(const matrix& x, perdita::index n, const slopes& d_x) const = 0;
};
template <class Loss> class anchor_calls_of final : public anchor_calls<typename Loss::value_type> {
public:
  using T = typename Loss::value_type;
  using typename anchor_calls<T>::matrix, typename anchor_calls<T>::slopes,
      typename anchor_calls<T>::labels, typename anchor_calls<T>::options;
  explicit anchor_calls_of(const Loss& loss) : loss_(loss) {}

  T operator()(const matrix& x, const labels& of_x, const options& o) const override {
    return loss_(x, of_x, o);
  }
  T operator()(const matrix& x, const labels& of_x, const slopes& d_x,
               const options& o) const override {
    return loss_(x, of_x, d_x, o);
  }
  T operator()(const matrix& x, const matrix& y, const labels& of_x, const labels& of_y,
               const options& o) const override {
    return loss_(x, y, of_x, of_y, o);
  }
  T operator()(const matrix& x, const matrix& y, const labels& of_x, const labels& of_y,
               const slopes& d_x, const slopes& d_y, const options& o) const override {
    return loss_(x, y, of_x, of_y, d_x, d_y, o);
  }
  T views(const matrix& x, perdita::index n, const slopes& d_x) const override {
    return loss_.views(x, n, d_x);
  }

private:
  const Loss& loss_;
};

/// How many rows, others, features and classes.
struct anchor_shape {
  perdita::index n = 9, m = 17, d = 3;
  int classes = 4;
};
/// Values and gradients of n rows compared with one another, and of those with m others.
template <class T>
void check_values_of_calls(const std::string& name, const anchor_calls<T>& loss,
                           const anchor_subject& subject, const anchor_definition& definition,
                           const anchor_shape& shape);
template <class T, class Loss>
void check_anchor_values(const std::string& name, const Loss& loss, const anchor_subject& subject,
                         const anchor_definition& definition, perdita::index n = 9,
                         perdita::index m = 17, perdita::index d = 3, int classes = 4) {
  check_values_of_calls<T>(name, anchor_calls_of(loss), subject, definition, {n, m, d, classes});
}

/// Threads, layouts, accumulation, weights, by-products and refusals. Every anchor of the loss must
/// count.
template <class T> void check_calls_of(const anchor_calls<T>& loss);
template <class Loss> void check_anchor_calls(const Loss& loss) {
  check_calls_of<typename Loss::value_type>(anchor_calls_of(loss));
}

/// An anchor with NaN or an infinity makes the mean NaN, but the other anchors' gradients are what
/// they are.
template <class Loss> void check_spoilt_anchor(const Loss& loss) {
  using T = typename Loss::value_type;
  const auto x = random_batch<T>(8, 3, 1), y = random_batch<T>(9, 3, 2);
  const std::vector<int> of_x{0, 1, 2, 0, 1, 2, 0, 0}, of_y{0, 1, 2, 0, 1, 2, 0, 1, 1};
  batch<T> g(8, 3), again(8, 3);
  loss(x.view(), y.view(), of_x, of_y, g.view());
  for (const T odd : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    auto spoilt = x;
    spoilt(3, 1) = odd;
    CHECK(std::isnan(loss(spoilt.view(), y.view(), of_x, of_y, again.view())));
    for (perdita::index i = 0; i < 8; ++i)
      for (perdita::index k = 0; k < 3; ++k)
        CHECK((i == 3 ? std::isnan(again(i, k)) : again(i, k) == g(i, k)));
  }
}

} // namespace perdita_tests
