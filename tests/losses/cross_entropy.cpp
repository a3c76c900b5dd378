// SPDX-License-Identifier: MIT

// Cross-entropy: formula sheet 1.1, 1.2 and 1.4. Its second derivatives: cross_entropy_hessian.cpp.

#include <perdita/cross_entropy.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/cross_entropy_descriptor.hpp"
#include "support/numbers.hpp"
#include "support/row_battery.hpp"

namespace perdita_tests {
namespace {

using namespace cross_entropies;

int setting_with(bool (*fits)(const options&)) { return first_setting(every_option, fits); }
const int plain = 0;
const int smoothed = setting_with([](const options& o) { return o.smoothing > 0; });
const int focal = setting_with([](const options& o) { return o.gamma == 2; });
const int sharp_focal = setting_with([](const options& o) { return o.gamma == 0.5; });
const int softcapped = setting_with([](const options& o) { return o.softcap > 0; });
const int soft_targets = setting_with([](const options& o) { return o.soft; });
const int weighted_classes = setting_with([](const options& o) { return o.weights; });
const int penalised = setting_with([](const options& o) { return o.penalty > 0; });
const int cold = setting_with([](const options& o) { return o.temperature < 1; });

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double undefined = std::numeric_limits<double>::quiet_NaN();

} // namespace

TEMPLATE_TEST_CASE("cross_entropy: the row battery", "[cross_entropy]", float, double) {
  check_row_loss(cross_entropy_descriptor<TestType>());
}

TEMPLATE_TEST_CASE("cross_entropy: special rows", "[cross_entropy]", float, double) {
  const double e1 = std::exp(1.0), p1 = e1 / (1 + e1), n = undefined;
  const std::vector<special_row> rows{
      {"one class", plain, {3}, 0, {}, 0, {0}},
      {"one class, masked", plain, {-inf}, 0, {}, inf, {-1}},
      {"one class, NaN", plain, {n}, 0, {}, n, {n}},
      {"one class, focal", focal, {3}, 0, {}, 0, {0}},
      {"one class, smoothed", smoothed, {3}, 0, {}, 0, {0}},
      {"one class, soft", soft_targets, {3}, -1, {1}, 0, {0}},
      {"all equal", plain, {7, 7, 7, 7}, 2, {}, std::log(4.0), {0.25, 0.25, -0.75, 0.25}},
      {"all -1000", plain, {-1000, -1000}, 1, {}, std::log(2.0), {0.5, -0.5}},
      {"masked", plain, {1, -inf, 0}, 0, {}, std::log1p(1 / e1), {p1 - 1, 0, 1 - p1}},
      {"all rivals masked", plain, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"label masked", plain, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"all masked", plain, {-inf, -inf, -inf}, 1, {}, inf, {0, -1, 0}},
      {"+inf at the label", plain, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"+inf elsewhere", plain, {0, inf, 1}, 0, {}, n, {n, n, n}},
      {"+inf at the label and elsewhere", plain, {inf, inf, 1}, 0, {}, n, {n, n, n}},
      {"NaN at the label", plain, {0, n, 1}, 1, {}, n, {n, n, n}},
      {"NaN beside a mask", plain, {n, -inf, 1}, 2, {}, n, {n, n, n}},
      {"NaN at a masked label's rival", plain, {n, -inf, 1}, 1, {}, n, {n, n, n}},
      {"NaN beside +inf at the label", plain, {n, 0, inf}, 2, {}, n, {n, n, n}},
      {"masked, focal",
       focal,
       {-inf, 0, 0},
       1,
       {},
       std::log(2.0) / 4,
       {0, -(0.25 + std::log(2.0) / 2) / 2, (0.25 + std::log(2.0) / 2) / 2}},
      {"label masked, focal", focal, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"label masked, focal 1/2", sharp_focal, {1, -inf, 0}, 1, {}, inf, {p1, -1, 1 - p1}},
      {"all rivals masked, focal 1/2", sharp_focal, {-inf, 5, -inf}, 1, {}, 0, {0, 0, 0}},
      {"+inf at the label, focal 1/2", sharp_focal, {0, inf, 1}, 1, {}, 0, {0, 0, 0}},
      {"masked, softcap", softcapped, {0, -inf, 0}, 0, {}, std::log(2.0), {-0.5, 0, 0.5}},
      {"masked, temperature", cold, {0, -inf, 0}, 0, {}, std::log(2.0), {-0.5 / 0.7, 0, 0.5 / 0.7}},
      {"masked, penalty",
       penalised,
       {-std::log(2.0), -inf, -std::log(2.0)},
       0,
       {},
       std::log(2.0),
       {-0.5, 0, 0.5}},
      {"masked without weight, soft",
       soft_targets,
       {0, -inf, 0},
       -1,
       {0.5, 0, 0.5},
       std::log(2.0),
       {0, 0, 0}},
      {"masked with weight, soft",
       soft_targets,
       {0, -inf, 0},
       -1,
       {0.5, 0.25, 0.25},
       inf,
       {0, -0.25, 0.25}},
      {"one-hot soft target at a mask",
       soft_targets,
       {1, -inf, 0},
       -1,
       {0, 1, 0},
       inf,
       {p1, -1, 1 - p1}},
      {"all masked, soft", soft_targets, {-inf, -inf}, -1, {0.75, 0.25}, inf, {-0.75, -0.25}},
      {"no soft target", soft_targets, {1, 2, 3}, -1, {0, 0, 0}, 0, {0, 0, 0}},
      {"masked with smoothing",
       smoothed,
       {0, -inf, 0},
       0,
       {},
       inf,
       {0.5 - 0.9 - 0.1 / 3, -0.1 / 3, 0.5 - 0.1 / 3}},
      {"label without class weight", weighted_classes, {1, 2, 3}, 2, {}, 0, {0, 0, 0}},
      {"masked label without class weight", weighted_classes, {1, 2, -inf}, 2, {}, 0, {0, 0, 0}},
      {"largest numbers", plain, {3e38, -3e38}, 0, {}, 0, {0, 0}},
  };
  check_special(cross_entropy_descriptor<TestType>(), rows, 8);
}

// Formula sheet, appendix A, made with 40 digits by somebody else's program: here the reference is
// checked too.
TEMPLATE_TEST_CASE("cross_entropy: golden values", "[cross_entropy]", float, double) {
  using perdita::cross_entropy;
  using T = TestType;
  constexpr double value_tolerance = sizeof(T) == 8 ? 1e-9 : 2e-6;
  constexpr double slope_tolerance = sizeof(T) == 8 ? 1e-8 : 2e-6;
  const std::vector<T> x{T(0.5), T(-1.2), T(2), T(0.1)}, second{T(1), T(0.3), T(-0.7), T(0.2)};
  const auto check = [&](const cross_entropy<T>& loss, const auto& target,
                         const std::vector<T>& scores, double value,
                         const std::vector<double>& slopes) {
    const auto rows = static_cast<std::ptrdiff_t>(scores.size() / 4);
    std::vector<T> g(scores.size());
    const T got = loss(perdita::matrix_view<const T>(scores.data(), rows, 4), target,
                       perdita::matrix_view<T>(g.data(), rows, 4));
    CHECK_THAT(static_cast<double>(got), Catch::Matchers::WithinAbs(value, value_tolerance));
    for (std::size_t j = 0; j < slopes.size(); ++j) {
      INFO("slope " << j);
      CHECK_THAT(static_cast<double>(g[j]), Catch::Matchers::WithinAbs(slopes[j], slope_tolerance));
    }
  };
  const std::vector<int> label{0}, labels{0, 3};
  check({}, label, x, 1.8460412949, {-0.842139144, 0.0288385774, 0.707483271, 0.105817296});
  check({{.label_smoothing = T(0.1)}}, label, x, 1.8610412949,
        {-0.767139144, 0.00383857741, 0.682483271, 0.080817296});
  const std::vector<T> q{T(0.6), T(0.1), T(0.1), T(0.2)};
  check({}, perdita::matrix_view<const T>(q.data(), 1, 4), x, 1.9460412949,
        {-0.442139144, -0.0711614226, 0.607483271, -0.094182704});
  check({{.softcap = T(2), .log_z_penalty = T(0.01)}}, label, x, 1.5883833951,
        {-0.731726744, 0.0330022194, 0.261535799, 0.14965944});
  check({{.focal_gamma = T(2)}}, label, x, 1.30920941929,
        {-1.01058952, 0.034607065, 0.848998867, 0.126983588});
  std::vector<T> both = x;
  both.insert(both.end(), second.begin(), second.end());
  check({}, labels, both,
        (1.8460412949 +
         (std::log(std::exp(1.0) + std::exp(0.3) + std::exp(-0.7) + std::exp(0.2)) - 0.2)) /
            2,
        {});
}

TEST_CASE("cross_entropy: the traits are those of the options", "[cross_entropy]") {
  const cross_entropy_descriptor<double> d;
  using perdita::cross_entropy;
  const auto same = [](const perdita::loss_traits& a, const perdita::loss_traits& b) {
    return a.convex == b.convex && a.smooth == b.smooth && a.exact_gradient == b.exact_gradient &&
           a.nonnegative == b.nonnegative && a.shift_invariant == b.shift_invariant;
  };
  CHECK(same(cross_entropy<double>().traits(), d.traits(plain)));
  CHECK(same(cross_entropy<double>({.focal_gamma = 2}).traits(), d.traits(focal)));
  CHECK(same(cross_entropy<double>({.softcap = 5}).traits(), d.traits(softcapped)));
  CHECK(same(cross_entropy<double>({.log_z_penalty = 0.01}).traits(), d.traits(penalised)));
  CHECK(same(cross_entropy<double>({.temperature = 0.7}).traits(), d.traits(cold)));
  CHECK(same(cross_entropy<double>({.label_smoothing = 0.1}).traits(), d.traits(smoothed)));
}

TEMPLATE_TEST_CASE("cross_entropy: threads", "[cross_entropy][threads]", float, double) {
  check_threads(cross_entropy_descriptor<TestType>());
}

} // namespace perdita_tests
