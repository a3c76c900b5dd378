// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <vector>

#include <perdita/core/row_loss.hpp>

#include "catch.hpp"

namespace perdita_tests {

/// That `mean` divides by the caller's normaliser, if there is one, and that `sum` does not. The
/// value and all slopes are run(reduction, call); a power of 2 rounds nothing.
template <class T, class Run> void check_normaliser(Run run) {
  const perdita::call_options<T> own{.normaliser = 64};
  const std::vector<T> of_sum = run(perdita::reduction::sum, perdita::call_options<T>{}),
                       of_mean = run(perdita::reduction::mean, own);
  CHECK(run(perdita::reduction::sum, own) == of_sum);
  CHECK(of_sum[0] > 0);
  REQUIRE(of_mean.size() == of_sum.size());
  for (std::size_t k = 0; k < of_sum.size(); ++k)
    CHECK(of_mean[k] == of_sum[k] / 64);
}
/// A value, and slopes of any number of inputs, one after another.
template <class T, class... V> std::vector<T> all_of(T value, const V&... slopes) {
  std::vector<T> all{value};
  (all.insert(all.end(), slopes.begin(), slopes.end()), ...);
  return all;
}

} // namespace perdita_tests
