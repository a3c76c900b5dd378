// expect: perdita::linear: matrices are views, Eigen matrices or std::mdspan of the loss's type
// SPDX-License-Identifier: MIT

#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

float f(perdita::matrix_view<const float> hidden, perdita::matrix_view<const float> weights,
        const std::vector<int>& labels, perdita::matrix_view<const float> d_hidden,
        perdita::matrix_view<float> d_weights) {
  return perdita::linear(perdita::cross_entropy<float>())(hidden, weights, labels, d_hidden,
                                                          d_weights);
}
