// SPDX-License-Identifier: MIT

// The ways to call the linear head: labels, containers and storage of every kind, and what is
// refused, before anything is written.

#include <perdita/linear.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <perdita/cross_entropy.hpp>

#include "support/catch.hpp"
#include "support/linear_run.hpp"

namespace perdita_tests {
namespace {

using perdita::affine;
using perdita::cross_entropy;
using perdita::linear;
using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using column_major = Eigen::MatrixXf;
using vector = Eigen::VectorXf;

constexpr int rows = 21, features = 10, classes = 70;
const linear_problem<float> problem = make_linear_problem<float>(rows, features, classes, 21);

row_major some_hidden() {
  return Eigen::Map<const row_major>(problem.hidden.data(), rows, features);
}
row_major some_weights() {
  return Eigen::Map<const row_major>(problem.weights.data(), classes, features);
}
vector some_bias() { return Eigen::Map<const vector>(problem.bias.data(), classes); }
std::vector<std::int64_t> some_labels() { return problem.labels; }

const linear head(cross_entropy<float>{});

struct answer {
  float value = 0;
  row_major d_hidden = row_major::Constant(rows, features, -7);
  row_major d_weights = row_major::Constant(classes, features, -7);
  vector d_bias = vector::Constant(classes, -7);
  bool operator==(const answer& other) const {
    return value == other.value && d_hidden == other.d_hidden && d_weights == other.d_weights &&
           d_bias == other.d_bias;
  }
};
answer expected(const row_major& x = some_hidden(), const row_major& w = some_weights()) {
  answer a;
  const vector b = some_bias();
  const affine in(w, b);
  const affine out(a.d_weights, a.d_bias);
  a.value = head(x, in, problem.labels, a.d_hidden, out);
  return a;
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "(nothing was thrown)";
}

/// Two dimensions with strides and nothing else: what std::mdspan looks like.
template <class T> struct span_2d {
  using element_type = T;
  T* data;
  std::array<std::ptrdiff_t, 2> extents, strides;
  static constexpr std::size_t rank() { return 2; }
  T* data_handle() const { return data; }
  std::ptrdiff_t extent(std::size_t k) const { return extents[k]; }
  std::ptrdiff_t stride(std::size_t k) const { return strides[k]; }
};

} // namespace

TEMPLATE_TEST_CASE("linear: labels of any integral type", "[linear]", signed char, unsigned char,
                   std::int16_t, std::uint32_t, std::int32_t, std::int64_t, std::uint64_t) {
  const answer right = expected();
  const row_major x = some_hidden(), w = some_weights();
  const vector b = some_bias();
  std::vector<TestType> y;
  for (const std::int64_t label : some_labels())
    y.push_back(static_cast<TestType>(label));
  answer got;
  const affine in(w, b);
  const affine out(got.d_weights, got.d_bias);
  got.value = head(x, in, y, got.d_hidden, out);
  CHECK((got == right));
  CHECK(head(x, in, std::span<const TestType>(y)) == right.value);
  std::vector<TestType> spread(2 * rows, TestType(99));
  for (int r = 0; r < rows; ++r)
    spread[2 * static_cast<std::size_t>(r)] = y[static_cast<std::size_t>(r)];
  CHECK(head(x, in, perdita::vector_view<const TestType>(spread.data(), rows, 2)) == right.value);
}

TEST_CASE("linear: Eigen's matrices, maps and blocks, and look-alikes of std::mdspan", "[linear]") {
  const answer right = expected();
  const std::vector<std::int64_t> y = some_labels();
  const row_major xr = some_hidden(), wr = some_weights();
  const column_major xc = xr, wc = wr;
  const vector b = some_bias();
  const auto check = [&](const auto& x, const auto& w, auto&& dx, auto&& dw) {
    answer got;
    const affine in(w, b);
    const affine out(dw, got.d_bias);
    got.value = head(x, in, y, dx, out);
    got.d_hidden = dx;
    got.d_weights = dw;
    CHECK((got == right));
    CHECK(head(x, in, y) == right.value);
  };
  check(xr, wr, row_major(rows, features), row_major(classes, features));
  check(xc, wc, column_major(rows, features), column_major(classes, features));
  check(xr, wc, column_major(rows, features), row_major(classes, features));
  check(xc, wr, row_major(rows, features), column_major(classes, features));

  row_major large = row_major::Constant(classes + 5, 2 * features + 3, 99);
  large.block(2, 1, rows, features) = xr;
  large.block(1, features + 2, classes, features) = wr;
  row_major out = row_major::Constant(classes + 7, features + 4, -5),
            out_hidden = row_major::Constant(rows + 7, features + 4, -5);
  check(large.block(2, 1, rows, features), large.block(1, features + 2, classes, features),
        out_hidden.block(3, 2, rows, features), out.block(3, 2, classes, features));
  CHECK((out.array() == -5).count() == out.size() - classes * features);
  CHECK((out_hidden.array() == -5).count() == out_hidden.size() - rows * features);
  column_major columns = large, column_out = out, column_hidden = out_hidden;
  column_out.setConstant(-5), column_hidden.setConstant(-5);
  check(columns.block(2, 1, rows, features), columns.block(1, features + 2, classes, features),
        column_hidden.block(3, 2, rows, features), column_out.block(3, 2, classes, features));
  CHECK((column_out.array() == -5).count() == out.size() - classes * features);
  CHECK((column_hidden.array() == -5).count() == out_hidden.size() - rows * features);

  const Eigen::Map<const row_major> map(xr.data(), rows, features);
  const column_major wt = wr.transpose();
  check(map, wt.transpose(), row_major(rows, features), row_major(classes, features));

  // As a bare span of two dimensions; the weights transposed.
  answer got;
  row_major dwt(features, classes);
  const span_2d<const float> x{xr.data(), {rows, features}, {features, 1}},
      w{wt.data(), {classes, features}, {features, 1}};
  const span_2d<float> dx{got.d_hidden.data(), {rows, features}, {features, 1}},
      dw{dwt.data(), {classes, features}, {1, classes}};
  const affine in(w, b);
  const affine into(dw, got.d_bias);
  got.value = head(x, in, y, dx, into);
  got.d_weights = dwt.transpose();
  CHECK((got == right));

  // Without a bias, and without its gradient, in std::span and vector.
  answer bare, with_bias;
  const std::vector<float> zero(classes, 0.0F);
  bare.value = head(xr, wr, y, bare.d_hidden, bare.d_weights);
  const affine zero_in(wr, zero);
  const affine zero_out(with_bias.d_weights, with_bias.d_bias);
  with_bias.value = head(xr, zero_in, y, with_bias.d_hidden, zero_out);
  CHECK(bare.value == with_bias.value);
  CHECK((bare.d_hidden == with_bias.d_hidden));
  CHECK((bare.d_weights == with_bias.d_weights));
  CHECK((bare.d_bias.array() == -7).all());
  const affine bias_only(bare.d_weights, bare.d_bias);
  bare.value = head(xr, wr, y, bare.d_hidden, bias_only); // a gradient of a bias of zero
  CHECK((bare == with_bias));
}

TEST_CASE("linear: sixteen-bit storage of any of the four matrices, rounded once", "[linear]") {
  using Eigen::bfloat16;
  using Eigen::half;
  const std::vector<std::int64_t> y = some_labels();
  const vector b = some_bias();
  const auto check = [&]<class X, class W, class DX, class DW>(X, W, DX, DW, bool columns) {
    const row_major x = some_hidden().cast<X>().template cast<float>(),
                    w = some_weights().cast<W>().template cast<float>();
    const answer right = expected(x, w);
    for (const bool adds : {false, true})
      for (const bool tight : {false, true}) {
        INFO("bytes " << sizeof(X) << sizeof(W) << sizeof(DX) << sizeof(DW) << ", columns "
                      << columns << ", adds " << adds << ", tight " << tight);
        const auto with = [&]<int Order>(std::integral_constant<int, Order>) {
          using matrix_x = Eigen::Matrix<X, Eigen::Dynamic, Eigen::Dynamic, Order>;
          using matrix_w = Eigen::Matrix<W, Eigen::Dynamic, Eigen::Dynamic, Order>;
          using matrix_dx = Eigen::Matrix<DX, Eigen::Dynamic, Eigen::Dynamic, Order>;
          using matrix_dw = Eigen::Matrix<DW, Eigen::Dynamic, Eigen::Dynamic, Order>;
          const matrix_x hidden = x.cast<X>();
          const matrix_w weights = w.cast<W>();
          matrix_dx d_hidden = matrix_dx::Constant(rows, features, static_cast<DX>(0.375F));
          matrix_dw d_weights = matrix_dw::Constant(classes, features, static_cast<DW>(-0.75F));
          vector d_bias = vector::Constant(classes, 2);
          const linear call(cross_entropy<float>(),
                            {.budget = tight ? least_budget<float>(rows, classes) : 0,
                             .accumulate_weights = adds});
          const affine in(weights, b);
          const affine out(d_weights, d_bias);
          const float value = call(hidden, in, y, d_hidden, out, {.accumulate = adds});
          CHECK(value == right.value);
          const row_major dx = adds ? row_major(right.d_hidden.array() + 0.375F) : right.d_hidden;
          const row_major dw = adds ? row_major(right.d_weights.array() - 0.75F) : right.d_weights;
          const matrix_dx wanted_dx = dx.cast<DX>();
          const matrix_dw wanted_dw = dw.cast<DW>();
          // Where it lies as rows of float it is added to piece by piece, and rounded each time.
          const bool in_place = adds && !columns && std::is_same_v<DX, float>;
          const float most = (d_hidden.template cast<float>() - wanted_dx.template cast<float>())
                                 .cwiseAbs()
                                 .maxCoeff();
          CHECK(most <= (in_place ? std::numeric_limits<float>::epsilon() : 0));
          CHECK((d_weights == wanted_dw));
          CHECK((d_bias == (adds ? vector(right.d_bias.array() + 2) : right.d_bias)));
        };
        if (columns)
          with(std::integral_constant<int, Eigen::ColMajor>());
        else
          with(std::integral_constant<int, Eigen::RowMajor>());
      }
  };
  check(float(), float(), float(), float(), false);
  check(bfloat16(), bfloat16(), bfloat16(), bfloat16(), false);
  check(half(), half(), half(), half(), true);
  check(bfloat16(), float(), float(), half(), true);
  check(float(), half(), bfloat16(), float(), false);
}

TEST_CASE("linear: labels are checked before anything is written", "[linear]") {
  const row_major x = some_hidden(), w = some_weights();
  const vector b = some_bias();
  const answer untouched;
  answer got;
  const affine in(w, b);
  const affine out(got.d_weights, got.d_bias);
  std::vector<float> values(rows, -7.0F);
  const auto refused = [&](auto bad, std::size_t at) {
    std::vector<decltype(bad)> y;
    for (const std::int64_t label : some_labels())
      y.push_back(static_cast<decltype(bad)>(label));
    y[at] = bad;
    const std::string message =
        refusal([&] { (void)head(x, in, y, got.d_hidden, out, {.values = values}); });
    CHECK((got == untouched));
    CHECK(values == std::vector<float>(rows, -7.0F));
    return message;
  };
  using Catch::Matchers::ContainsSubstring;
  CHECK_THAT(refused(classes, 3), ContainsSubstring("labels[3] is 70, expected 0 to 69, or "
                                                    "ignore_index -100"));
  CHECK_THAT(refused(-1, rows - 1), ContainsSubstring("labels[20] is -1"));
  CHECK_THAT(refused(std::numeric_limits<std::int64_t>::max(), 0), ContainsSubstring("labels[0]"));
  CHECK_THAT(refused(std::numeric_limits<std::uint64_t>::max() - 99, 0),
             ContainsSubstring("labels[0]"));
}

TEST_CASE("linear: every mismatch of shapes is named, before anything is written", "[linear]") {
  const row_major x = some_hidden(), w = some_weights();
  const vector b = some_bias();
  const std::vector<std::int64_t> y = some_labels();
  const answer untouched;
  answer got;
  const std::vector<float> twenty(rows - 1, 1.0F);
  std::vector<float> twenty_values(rows - 1, -7.0F);
  struct wrong {
    std::vector<std::string> says;
    std::function<void()> call;
  };
  const auto call = [&](const auto& hidden, const auto& weights, const auto& bias,
                        const auto& labels, auto&& dx, auto&& dw, auto&& db,
                        const perdita::call_options<float>& options = {}) {
    const affine in(weights, bias);
    const affine out(dw, db);
    (void)head(hidden, in, labels, dx, out, options);
  };
  const row_major narrow = w.leftCols(features - 1);
  const vector short_bias = b.head(classes - 1);
  const std::vector<std::int64_t> few(y.begin(), y.end() - 1);
  vector spread_bias(2 * classes);
  spread_bias.setZero();
  row_major fewer_rows(rows - 1, features), fewer_columns(rows, features + 1),
      more_classes(classes + 1, features), other_columns(classes, features - 1);
  vector short_d_bias(classes - 1);
  row_major &dx = got.d_hidden, &dw = got.d_weights;
  vector& db = got.d_bias;
  const perdita::matrix_view<const float> no_hidden(nullptr, rows, features),
      no_weights(nullptr, classes, features);
  const perdita::matrix_view<float> no_d_hidden(nullptr, rows, features),
      no_d_weights(nullptr, classes, features);
  const perdita::vector_view<float> no_d_bias(nullptr, classes);
  const perdita::vector_view<const float> no_bias(nullptr, classes);
  const perdita::vector_view<const int> no_labels(nullptr, rows);
  const auto without = [&](auto member) {
    perdita::call_options<float> options;
    options.*member = {twenty_values.data(), rows - 1};
    return options;
  };
  using options = perdita::call_options<float>;
  const std::vector<float> class_weights(classes + 1, 1.0F);
  const std::vector<wrong> all{
      {{"columns of the weights", "is 9", "expected 10"},
       [&] { call(x, narrow, b, y, dx, dw, db); }},
      {{"bias", "is 69", "expected 70"}, [&] { call(x, w, short_bias, y, dx, dw, db); }},
      {{"stride of bias", "is 2", "expected 1"},
       [&] {
         call(x, w, perdita::vector_view<const float>(spread_bias.data(), classes, 2), y, dx, dw,
              db);
       }},
      {{"labels", "is 20", "expected 21"}, [&] { call(x, w, b, few, dx, dw, db); }},
      {{"rows of the gradient of the hidden states", "is 20", "expected 21"},
       [&] { call(x, w, b, y, fewer_rows, dw, db); }},
      {{"columns of the gradient of the hidden states", "is 11", "expected 10"},
       [&] { call(x, w, b, y, fewer_columns, dw, db); }},
      {{"rows of the gradient of the weights", "is 71", "expected 70"},
       [&] { call(x, w, b, y, dx, more_classes, db); }},
      {{"columns of the gradient of the weights", "is 9", "expected 10"},
       [&] { call(x, w, b, y, dx, other_columns, db); }},
      {{"gradient of the bias", "is 69", "expected 70"},
       [&] { call(x, w, b, y, dx, dw, short_d_bias); }},
      {{"hidden", "null", "expected"}, [&] { call(no_hidden, w, b, y, dx, dw, db); }},
      {{"weights", "null", "expected"}, [&] { call(x, no_weights, b, y, dx, dw, db); }},
      {{"bias", "null", "expected"}, [&] { call(x, w, no_bias, y, dx, dw, db); }},
      {{"labels", "null", "expected"}, [&] { call(x, w, b, no_labels, dx, dw, db); }},
      {{"gradient", "null", "expected"}, [&] { call(x, w, b, y, no_d_hidden, dw, db); }},
      {{"gradient", "null", "expected"}, [&] { call(x, w, b, y, dx, no_d_weights, db); }},
      {{"gradient of the bias", "null", "expected"}, [&] { call(x, w, b, y, dx, dw, no_d_bias); }},
      {{"row_weights", "is 20", "expected 21"},
       [&] { call(x, w, b, y, dx, dw, db, {.row_weights = twenty}); }},
      {{"upstream", "is 20", "expected 21"},
       [&] { call(x, w, b, y, dx, dw, db, {.upstream = twenty}); }},
      {{"values", "is 20", "expected 21"},
       [&] { call(x, w, b, y, dx, dw, db, without(&options::values)); }},
      {{"log_sum_exp", "is 20", "expected 21"},
       [&] { call(x, w, b, y, dx, dw, db, without(&options::log_sum_exp)); }},
      {{"target_log_probability", "is 20"},
       [&] { call(x, w, b, y, dx, dw, db, without(&options::target_log_probability)); }},
      {{"entropy", "is 20"}, [&] { call(x, w, b, y, dx, dw, db, without(&options::entropy)); }},
      {{"normaliser", "is -1", "expected"},
       [&] { call(x, w, b, y, dx, dw, db, {.normaliser = -1}); }},
      {{"size of class_weights", "is 71", "70"},
       [&] {
         const linear weighted(cross_entropy<float>({.class_weights = class_weights}));
         const affine in(w, b);
         const affine out(dw, db);
         (void)weighted(x, in, y, dx, out);
       }},
      {{"columns", "is 0", "at least 1 class"},
       [&] {
         const row_major none(0, features);
         row_major d_none(0, features);
         (void)head(x, none, y, dx, d_none);
       }},
  };
  for (const wrong& w_ : all) {
    const std::string message = refusal(w_.call);
    for (const std::string& says : w_.says) {
      INFO(message << "\nshould say " << says);
      CHECK(message.find(says) != message.npos);
    }
    CHECK(message.find("perdita::") == 0);
    CHECK((got == untouched));
  }
  CHECK(twenty_values == std::vector<float>(rows - 1, -7.0F));
  // Nothing is no mismatch: neither rows nor classes, with no memory.
  CHECK(head(perdita::matrix_view<const float>(nullptr, 0, features),
             perdita::matrix_view<const float>(nullptr, 0, features), std::vector<int>{}) == 0);
}

TEST_CASE("linear: a result may lie on no input and on no other result", "[linear]") {
  // All in one piece of memory, each where it is asked to be.
  const std::vector<std::int64_t> y = some_labels();
  constexpr index nx = rows * features, nw = classes * features, nb = classes;
  struct place {
    const char* name;
    index size, at;
  };
  const std::array<place, 6> apart{{{"gradient of the hidden states", nx, 0},
                                    {"gradient of the weights", nw, nx},
                                    {"gradient of the bias", nb, nx + nw},
                                    {"hidden states", nx, nx + nw + nb},
                                    {"weights", nw, 2 * nx + nw + nb},
                                    {"bias", nb, 2 * (nx + nw) + nb}}};
  constexpr std::size_t all = 2 * (nx + nw + nb);
  std::vector<float> memory(all);
  const auto call = [&](const std::array<place, 6>& p) {
    for (std::size_t i = 0; i < all; ++i)
      memory[i] = 0.001F * static_cast<float>(i % 997);
    const std::vector<float> before = memory;
    const auto at = [&](std::size_t i) { return memory.data() + p[i].at; };
    const perdita::matrix_view<const float> x(at(3), rows, features), w(at(4), classes, features);
    const perdita::matrix_view<float> dx(at(0), rows, features), dw(at(1), classes, features);
    const perdita::vector_view<const float> b(at(5), classes);
    const perdita::vector_view<float> db(at(2), classes);
    const affine in(w, b);
    const affine out(dw, db);
    const std::string message = refusal([&] { (void)head(x, in, y, dx, out); });
    return memory == before ? message : "something was written: " + message;
  };
  CHECK(call(apart) == "something was written: (nothing was thrown)");
  for (std::size_t i = 0; i < 3; ++i)
    for (std::size_t j = i + 1; j < 6; ++j)
      for (const bool at_front : {true, false}) {
        // Result i ends, or begins, inside j by one element.
        std::array<place, 6> p = apart;
        std::vector<float> larger;
        p[i].at = at_front ? p[j].at - p[i].size + 1 : p[j].at + p[j].size - 1;
        if (p[i].at < 0 || p[i].at + p[i].size > static_cast<index>(all))
          continue;
        const std::string message = call(p);
        INFO(message << "\n" << p[i].name << " on " << p[j].name);
        CHECK(message.find("perdita::linear: ") == 0);
        CHECK(message.find("overlaps") != message.npos);
        CHECK(message.find("expected memory apart") != message.npos);
      }
  for (std::size_t i = 0; i < 3; ++i)
    for (std::size_t j = i + 1; j < 6; ++j) {
      std::array<place, 6> p = apart;
      p[i].at = p[j].at;
      if (p[i].at + p[i].size > static_cast<index>(all))
        p[i].at = static_cast<index>(all) - p[i].size;
      const std::string message = call(p);
      INFO(message << "\n" << p[i].name << " from the start of " << p[j].name);
      CHECK(message.find("overlaps") != message.npos);
    }
  // Side by side is apart.
  const row_major x = some_hidden(), w = some_weights();
  row_major both = row_major::Zero(rows + classes, features);
  CHECK_NOTHROW(head(x, w, y, both.topRows(rows), both.bottomRows(classes)));
  CHECK(both.topRows(rows) == [&] {
    answer a;
    (void)head(x, w, y, a.d_hidden, a.d_weights);
    return a.d_hidden;
  }());
}

TEST_CASE("linear: the gradient of the bias is taken with its stride", "[linear]") {
  const answer right = expected();
  const row_major x = some_hidden(), w = some_weights();
  const vector b = some_bias();
  const std::vector<std::int64_t> y = some_labels();
  for (const index stride : {2, -1, -3}) {
    std::vector<float> memory(3 * classes, -7.0F);
    const perdita::vector_view<float> db(
        stride > 0 ? memory.data() : memory.data() - (classes - 1) * stride, classes, stride);
    answer got;
    const affine in(w, b);
    const affine out(got.d_weights, db);
    got.value = head(x, in, y, got.d_hidden, out);
    for (index c = 0; c < classes; ++c)
      got.d_bias(c) = db[c];
    CHECK((got == right));
    const index taken = (classes - 1) * std::abs(stride) + 1;
    CHECK(std::count(memory.begin(), memory.end(), -7.0F) == 3 * classes - classes);
    CHECK(std::count(memory.begin() + taken, memory.end(), -7.0F) == 3 * classes - taken);
  }
  // Its far end lies on the gradient of the weights.
  std::vector<float> memory((classes + 2) * features, -7.0F);
  const perdita::matrix_view<float> dw(memory.data() + 2 * features, classes, features);
  answer got;
  const affine in(w, b);
  const auto refused = [&](const perdita::vector_view<float>& db) {
    const affine out(dw, db);
    const std::string message = refusal([&] { (void)head(x, in, y, got.d_hidden, out); });
    CHECK(std::count(memory.begin(), memory.end(), -7.0F) == (classes + 2) * features);
    return message.find("gradient of the weights overlaps gradient of the bias") != message.npos;
  };
  CHECK(refused({memory.data(), classes, 2}));
  CHECK(refused({memory.data() + (classes - 1) * 2, classes, -2}));
  CHECK(refused({memory.data(), classes, 1}));
}

TEST_CASE("linear: a budget that is too small names the least, which does", "[linear]") {
  const row_major x = some_hidden(), w = some_weights();
  const vector b = some_bias();
  const std::vector<std::int64_t> y = some_labels();
  const answer right = expected(), untouched;
  answer got;
  const affine in(w, b);
  const affine out(got.d_weights, got.d_bias);
  const auto call = [&](std::size_t budget) {
    const linear small(cross_entropy<float>(), {.budget = budget});
    return refusal([&] { got.value = small(x, in, y, got.d_hidden, out); });
  };
  const std::string message = call(1);
  CHECK((got == untouched));
  INFO(message);
  REQUIRE(message.find("perdita::linear: budget is 1, expected 0, or at least ") == 0);
  const std::size_t least = std::stoul(message.substr(message.find("at least ") + 9));
  CHECK(least == least_budget<float>(rows, classes));
  CHECK(call(least - 1) == "perdita::linear: budget is " + std::to_string(least - 1) +
                               ", expected 0, or at least " + std::to_string(least) +
                               " bytes for this shape");
  CHECK((got == untouched));
  CHECK(call(least) == "(nothing was thrown)");
  CHECK((got == right));
}

TEST_CASE("linear: bad lists of soft targets are refused, before anything is written", "[linear]") {
  const row_major x = some_hidden(), w = some_weights();
  const vector b = some_bias();
  using targets = perdita::sparse_targets<float>;
  std::vector<std::int32_t> c(2 * rows, 3);
  const std::vector<float> q(2 * rows, 0.5F);
  std::vector<std::int64_t> starts;
  for (std::int64_t r = 0; r <= rows; ++r)
    starts.push_back(2 * r);
  const answer untouched;
  answer got;
  const affine in(w, b);
  const affine out(got.d_weights, got.d_bias);
  const auto call = [&](const targets& t) {
    const std::string message = refusal([&] { got.value = head(x, in, t, got.d_hidden, out); });
    if (message != "(nothing was thrown)")
      CHECK((got == untouched));
    got = untouched;
    return message;
  };
  using Catch::Matchers::ContainsSubstring;
  CHECK(call({c, q, starts}) == "(nothing was thrown)");
  CHECK(call({c, q, {}}) == "(nothing was thrown)");
  CHECK_THAT(call({c, std::span(q).first(41), starts}),
             ContainsSubstring("size of probabilities is 41, expected 42"));
  CHECK_THAT(call({std::span(c).first(41), std::span(q).first(41), {}}),
             ContainsSubstring("number of entries is 41, expected 21"));
  CHECK_THAT(call({c, q, std::span(starts).first(21)}),
             ContainsSubstring("size of row_starts is 21, expected 22"));
  const auto with_start = [&](std::size_t r, std::int64_t at) {
    std::vector<std::int64_t> bad = starts;
    bad[r] = at;
    return call({c, q, bad});
  };
  CHECK_THAT(with_start(0, 1), ContainsSubstring("row_starts[0] is 1"));
  CHECK_THAT(with_start(0, -1), ContainsSubstring("row_starts[0] is -1"));
  CHECK_THAT(with_start(5, 13), ContainsSubstring("row_starts[6] is 12"));
  CHECK_THAT(with_start(5, 43), ContainsSubstring("row_starts[5] is 43"));
  CHECK_THAT(with_start(rows, 41), ContainsSubstring("row_starts[21] is 41"));
  CHECK_THAT(with_start(rows, 43), ContainsSubstring("row_starts[21] is 43"));
  CHECK_THAT(with_start(7, std::numeric_limits<std::int64_t>::min()),
             ContainsSubstring("row_starts[7]"));
  for (const std::int32_t bad : {-1, -100, classes, std::numeric_limits<std::int32_t>::max()}) {
    c[17] = bad;
    CHECK_THAT(call({c, q, starts}),
               ContainsSubstring("classes[17] is " + std::to_string(bad) + ", expected 0 to 69"));
  }
  c[17] = 3;
  CHECK_THAT(call({{nullptr, 42}, q, starts}), ContainsSubstring("classes is null"));
  CHECK_THAT(call({c, {nullptr, 42}, starts}), ContainsSubstring("probabilities is null"));
  const linear focal(cross_entropy<float>({.focal_gamma = 2}));
  CHECK_THAT(refusal([&] {
               got.value = focal(x, in, targets{c, q, starts}, got.d_hidden, out);
             }),
             ContainsSubstring("focal_gamma is 2, expected 0 with soft targets"));
  CHECK((got == untouched));

  // Of another integral type
  const std::vector<std::uint8_t> bytes(2 * rows, 3);
  const perdita::sparse_targets<float, std::uint8_t> narrow{bytes, q, {}};
  CHECK(head(x, in, narrow) == head(x, in, targets{c, q, {}}));
}

} // namespace perdita_tests
