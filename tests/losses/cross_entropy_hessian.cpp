// SPDX-License-Identifier: MIT

// Cross-entropy's second derivatives: kernels of their own, which the thread sanitizer need not
// compile.

#include <perdita/cross_entropy.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/cross_entropy_descriptor.hpp"
#include "support/numbers.hpp"

namespace perdita_tests {

using namespace cross_entropies;

// The second derivatives are those of the reference, by differences of its gradient in 113 bits.
TEMPLATE_TEST_CASE("cross_entropy: second derivatives", "[cross_entropy]", float, double) {
  using T = TestType;
  const cross_entropy_descriptor<T> d;
  // In epsilons of what an entry is the difference of: 1 − p is formed by subtraction here.
  constexpr double budget = 16;
  const wide step = ldexp(wide(1), -20), epsilon = std::numeric_limits<T>::epsilon();
  std::size_t compared = 0, wrong = 0;
  double worst = 0;
  std::string where;
  for (int setting = 0; setting < d.settings(); ++setting) {
    const options& o = every_option[static_cast<std::size_t>(setting)];
    if (o.soft || o.softcap > 0)
      continue;
    random_numbers random(7);
    for (const index cols : {1, 2, 5, 40}) {
      const index rows = cols > 5 ? 3 : 6;
      std::vector<T> x, v, diagonal(static_cast<std::size_t>(rows * cols)), product = diagonal,
                                                                            across = diagonal;
      std::vector<std::int64_t> labels;
      for (index r = 0; r < rows; ++r) {
        labels.push_back(static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(cols))));
        for (index c = 0; c < cols; ++c) {
          x.push_back(static_cast<T>(2 * random.normal()));
          v.push_back(static_cast<T>(random.uniform(-1, 1)));
        }
      }
      const std::vector<T> w = o.weights ? class_weights<T>(cols) : std::vector<T>();
      const std::vector<T> pi = o.prior ? prior<T>(cols) : std::vector<T>();
      const perdita::cross_entropy<T> loss({.label_smoothing = static_cast<T>(o.smoothing),
                                            .prior = pi,
                                            .class_weights = w,
                                            .reduction = perdita::reduction::sum,
                                            .temperature = static_cast<T>(o.temperature),
                                            .log_z_penalty = static_cast<T>(o.penalty),
                                            .focal_gamma = static_cast<T>(o.gamma)});
      const perdita::matrix_view<const T> scores(x.data(), rows, cols),
          direction(v.data(), rows, cols);
      loss.hessian_diagonal(scores, labels, perdita::matrix_view<T>(diagonal.data(), rows, cols));
      loss.hessian_product(scores, labels, direction,
                           perdita::matrix_view<T>(product.data(), rows, cols));
      for (index r = 0; r < rows; ++r) {
        row_input row;
        row.label = static_cast<index>(labels[static_cast<std::size_t>(r)]);
        for (index c = 0; c < cols; ++c)
          row.scores.push_back(x[static_cast<std::size_t>(r * cols + c)]);
        const auto slope = [&](const std::vector<wide>& along, std::size_t c) -> wide {
          const auto at = [&](int k) -> wide {
            row_input moved = row;
            for (std::size_t j = 0; j < along.size(); ++j)
              moved.scores[j] += along[j] * step * k;
            return d.expect(setting, moved).gradient[c].value;
          };
          return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
        };
        std::vector<wide> along;
        wide largest = 1;
        for (index c = 0; c < cols; ++c)
          along.push_back(v[static_cast<std::size_t>(r * cols + c)]);
        std::vector<wide> exact;
        for (index c = 0; c < cols && (cols <= 5 || c < 8); ++c) {
          std::vector<wide> axis(static_cast<std::size_t>(cols), wide(0));
          axis[static_cast<std::size_t>(c)] = 1;
          exact.push_back(slope(axis, static_cast<std::size_t>(c)));
          exact.push_back(slope(along, static_cast<std::size_t>(c)));
          largest = larger(largest, larger(size_of(exact.end()[-1]), size_of(exact.end()[-2])));
        }
        for (std::size_t k = 0; k < exact.size(); ++k) {
          const std::size_t at = static_cast<std::size_t>(r * cols) + k / 2;
          const T got = k % 2 == 0 ? diagonal[at] : product[at];
          const wide error = size_of(wide(got) - exact[k]) / (largest * epsilon);
          ++compared;
          worst = worse(worst, static_cast<double>(error));
          if (!(error <= budget) && wrong++ == 0)
            where = d.describe(setting) + ", " + std::to_string(cols) + " columns, row " +
                    std::to_string(r) + (k % 2 == 0 ? ", diagonal " : ", product ") +
                    std::to_string(k / 2) + ": " + perdita::core::to_text(got) + " for " +
                    text(exact[k]);
        }
      }
    }
  }
  INFO(wrong << " of " << compared << " wrong, worst " << worst << " epsilon; first: " << where);
  CHECK(wrong == 0);
  CHECK(compared > 1000);
}

TEMPLATE_TEST_CASE("cross_entropy: second derivatives of a masked label", "[cross_entropy]", float,
                   double) {
  using T = TestType;
  const T inf = std::numeric_limits<T>::infinity();
  const std::vector<T> x{-inf, 0, 0}, v{1, 2, 4};
  std::vector<T> h(3);
  const perdita::matrix_view<const T> scores(x.data(), 1, 3), direction(v.data(), 1, 3);
  const perdita::matrix_view<T> to(h.data(), 1, 3);
  for (const T gamma : {T(0), T(0.5), T(2)}) { // the focus is on all of it
    const perdita::cross_entropy<T> loss({.focal_gamma = gamma});
    loss.hessian_diagonal(scores, std::vector<int>{0}, to);
    CHECK(h == std::vector<T>{0, T(0.25), T(0.25)});
    loss.hessian_product(scores, std::vector<int>{0}, direction, to);
    CHECK(h == std::vector<T>{0, T(-0.5), T(0.5)});
  }
}

} // namespace perdita_tests
