// SPDX-License-Identifier: MIT

// Formula sheet 2.2: two matrices of scores and two gradients, which the battery does not know.

#include <perdita/smooth_adversarial.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <perdita/comp_sum.hpp>

#include "support/accuracy.hpp"
#include "support/catch.hpp"
#include "support/normaliser.hpp"
#include "support/numbers.hpp"
#include "support/softmax_reference.hpp"

namespace perdita_tests {
namespace {

using perdita::matrix_view;
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

struct expectation {
  wide value;
  std::vector<wide> clean, adversarial;
};
template <class T>
expectation expect(const std::vector<T>& h, const std::vector<T>& a, std::size_t y, const wide& tau,
                   const wide& rho, const wide& nu) {
  std::vector<wide> z;
  for (const T x : h)
    z.push_back(wide(x) / rho);
  const softmax_row s(z);
  const wide c = s.surprise(y), rest = 1 - tau;
  expectation e;
  e.value = rest == 0 ? c : wide(expm1(wide(rest * c)) / rest);
  wide squares = 0;
  std::vector<wide> v(h.size(), wide(0));
  for (std::size_t k = 0; k < h.size(); ++k)
    if (k != y) {
      v[k] = (wide(a[y]) - a[k]) - (wide(h[y]) - h[k]);
      squares += v[k] * v[k];
    }
  const wide norm = sqrt(squares), weight = exp(wide(rest * c));
  e.value += nu * norm;
  wide sum = 0;
  for (std::size_t k = 0; k < h.size(); ++k) {
    const wide r = norm > 0 ? wide(nu * v[k] / norm) : wide(0);
    sum += r;
    e.adversarial.push_back(-r);
    e.clean.push_back(weight * (k == y ? wide(-s.miss(y)) : s.p(k)) / rho + r);
  }
  e.adversarial[y] = sum;
  e.clean[y] -= sum;
  return e;
}

} // namespace

TEMPLATE_TEST_CASE("smooth_adversarial: value and both gradients", "[adversarial]", float, double) {
  using T = TestType;
  random_numbers random(11);
  const wide epsilon = std::numeric_limits<T>::epsilon();
  for (const double tau : {0.5, 1.0, 1.75})
    for (const double rho : {1.0, 0.5})
      for (const double nu : {0.0, 1.0, 2.5})
        for (const std::size_t classes :
             {std::size_t(2), std::size_t(3), std::size_t(17), std::size_t(300)}) {
          const std::size_t rows = 5;
          std::vector<T> h, a, dh(rows * classes), da(rows * classes);
          std::vector<int> labels;
          for (std::size_t i = 0; i < rows * classes; ++i) {
            h.push_back(static_cast<T>(random.normal()));
            a.push_back(static_cast<T>(static_cast<double>(h.back()) + 0.5 * random.normal()));
          }
          for (std::size_t r = 0; r < rows; ++r)
            labels.push_back(r == 3 ? -100 : static_cast<int>(random.below(classes)));
          const auto n = static_cast<perdita::index>(classes),
                     m = static_cast<perdita::index>(rows);
          const matrix_view<const T> in(h.data(), m, n), moved(a.data(), m, n);
          const perdita::smooth_adversarial<T> loss({.tau = static_cast<T>(tau),
                                                     .rho = static_cast<T>(rho),
                                                     .nu = static_cast<T>(nu),
                                                     .reduction = perdita::reduction::sum});
          const T value = loss(in, moved, labels, matrix_view<T>(dh.data(), m, n),
                               matrix_view<T>(da.data(), m, n));
          CHECK(value == loss(in, moved, labels));
          wide total = 0, worst = 0;
          for (std::size_t r = 0; r < rows; ++r) {
            const auto at = [&](const std::vector<T>& x) {
              return std::vector<T>(x.begin() + static_cast<std::ptrdiff_t>(r * classes),
                                    x.begin() + static_cast<std::ptrdiff_t>((r + 1) * classes));
            };
            if (r == 3) {
              for (std::size_t k = 0; k < classes; ++k)
                CHECK((at(dh)[k] == 0 && at(da)[k] == 0));
              continue;
            }
            const expectation e =
                expect(at(h), at(a), static_cast<std::size_t>(labels[r]), tau, rho, nu);
            total += e.value;
            const wide size = 1 + nu + exp(wide((1 - tau) * 20));
            for (std::size_t k = 0; k < classes; ++k) {
              worst = worse(worst, size_of(wide(wide(at(dh)[k]) - e.clean[k])) /
                                       larger(size_of(e.clean[k]), wide(nu > 0 ? 0.1 : 0)));
              worst = worse(worst, size_of(wide(wide(at(da)[k]) - e.adversarial[k])) / size);
            }
          }
          INFO("tau " << tau << ", rho " << rho << ", nu " << nu << ", classes " << classes << ": "
                      << static_cast<double>(worst / epsilon));
          const auto of_value = static_cast<double>(size_of(wide(wide(value) - total)) /
                                                    (total * epsilon)),
                     of_slopes = static_cast<double>(worst / epsilon);
          report_accuracy<T>("smooth_adversarial", "", in_epsilons_of_terms,
                             {of_value, of_slopes, std::max(of_value / 4, of_slopes / 32)});
          CHECK(of_value < 4);
          CHECK(of_slopes < 32);
        }
}

TEST_CASE("smooth_adversarial: without a distance it is comp_sum", "[adversarial]") {
  const std::vector<double> h{0.5, -1.2, 2, 0.1};
  std::vector<double> dh(4), da(4), g(4);
  const std::vector<int> label{0};
  const matrix_view<const double> in(h.data(), 1, 4);
  using Catch::Matchers::WithinAbs;
  for (const double nu : {0.0, 3.0}) { // and v = 0 costs nothing
    const double value = perdita::smooth_adversarial<double>({.tau = 1.5, .nu = nu})(
        in, in, label, matrix_view<double>(dh.data(), 1, 4), matrix_view<double>(da.data(), 1, 4));
    CHECK_THAT(value, WithinAbs(perdita::comp_sum<double>({.tau = 1.5})(
                                    in, label, matrix_view<double>(g.data(), 1, 4)),
                                1e-15));
    for (std::size_t k = 0; k < 4; ++k) {
      CHECK_THAT(dh[k], WithinAbs(g[k], 1e-15));
      CHECK(da[k] == 0);
    }
  }
}

TEST_CASE("smooth_adversarial: special rows", "[adversarial]") {
  const auto run = [](std::vector<double> h, std::vector<double> a, int y, std::vector<double>& dh,
                      std::vector<double>& da) {
    const auto n = static_cast<perdita::index>(h.size());
    dh.assign(h.size(), 7);
    da.assign(h.size(), 7);
    return perdita::smooth_adversarial<double>()(
        matrix_view<const double>(h.data(), 1, n), matrix_view<const double>(a.data(), 1, n),
        std::vector<int>{y}, matrix_view<double>(dh.data(), 1, n),
        matrix_view<double>(da.data(), 1, n));
  };
  std::vector<double> dh, da;
  CHECK(run({3}, {4}, 0, dh, da) == 0); // one class
  CHECK((dh[0] == 0 && da[0] == 0));
  const double masked = run({1, -inf, 2}, {1, -inf, 3}, 0, dh, da);
  CHECK(std::abs(masked - (std::log1p(std::exp(1.0)) + 1)) < 1e-15);
  CHECK((dh[1] == 0 && da[1] == 0 && da[2] == 1 && da[0] == -1));
  CHECK(std::isnan(run({1, nan, 2}, {1, 1, 3}, 0, dh, da)));
  CHECK((std::isnan(dh[0]) && std::isnan(da[2])));
  CHECK(std::isnan(run({1, 1, 2}, {1, nan, 3}, 0, dh, da)));
  CHECK(std::isnan(run({1, -inf, 2}, {1, 1, 3}, 0, dh, da)));
  const double huge = run({0, 1e200}, {0, -1e200}, 0, dh, da); // no square overflows
  CHECK(std::abs(huge / 3e200 - 1) < 1e-15);
}

TEST_CASE("smooth_adversarial: what is refused", "[adversarial]") {
  using Catch::Matchers::ContainsSubstring;
  using loss = perdita::smooth_adversarial<float>;
  CHECK_THROWS_WITH(loss({.tau = -1}), ContainsSubstring("tau is -1"));
  CHECK_THROWS_WITH(loss({.rho = 0}), ContainsSubstring("rho is 0"));
  CHECK_THROWS_WITH(loss({.nu = -1}), ContainsSubstring("nu is -1"));
  const std::vector<float> x(6);
  const std::vector<int> labels{0, 1};
  CHECK_THROWS_WITH(loss()(matrix_view<const float>(x.data(), 2, 3),
                           matrix_view<const float>(x.data(), 3, 2), labels),
                    ContainsSubstring("other scores is 3"));
  std::vector<float> g(6);
  const matrix_view<const float> in(x.data(), 2, 3), moved(g.data(), 2, 3);
  const matrix_view<float> out(g.data(), 2, 3);
  CHECK_THROWS_WITH(loss()(in, in, labels, out, out), ContainsSubstring("overlaps"));
  std::vector<float> a(6, 7);
  CHECK_THROWS_WITH(
      loss()(in, in, labels, matrix_view<float>(nullptr, 2, 3), matrix_view<float>(a.data(), 2, 3)),
      ContainsSubstring("gradient is null"));
  CHECK(a == std::vector<float>(6, 7)); // nothing was written before
  CHECK_THROWS_WITH(loss()(in, moved, labels, matrix_view<float>(), out),
                    ContainsSubstring("overlaps"));
}

TEST_CASE("smooth_adversarial: what the mean divides by", "[adversarial]") {
  const std::vector<double> h{.2, .5, -.1, .3, -.4, 1}, a{-.3, .1, .4, .2, 0, -1};
  const std::vector<int> labels{2, 0};
  const auto view = [](auto& v) { return matrix_view(v.data(), 2, 3); };
  check_normaliser<double>([&](perdita::reduction how, const perdita::call_options<double>& call) {
    std::vector<double> dh(6), da(6);
    const double value = perdita::smooth_adversarial<double>({.reduction = how})(
        view(h), view(a), labels, view(dh), view(da), call);
    return all_of(value, dh, da);
  });
}

} // namespace perdita_tests
