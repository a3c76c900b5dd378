// expect: perdita::linear: matrices are views, Eigen matrices or std::mdspan of the loss's type
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

float f(perdita::matrix_view<const double> hidden, perdita::matrix_view<const float> weights,
        const std::vector<int>& labels) {
  return perdita::linear(perdita::cross_entropy<float>())(hidden, weights, labels);
}
