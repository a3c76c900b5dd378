// SPDX-License-Identifier: MIT
#pragma once

/// What a small network for the digits is made of.

#include <cmath>
#include <utility>

#include <Eigen/Core>

#include "digits.hpp"

using matrix_ref = Eigen::Ref<const matrix>; // a matrix or some of its rows
using row_vector = Eigen::RowVectorXf;

/// x ↦ x · weights + bias, learnt by stochastic gradient descent with momentum.
struct layer {
  static constexpr float momentum = 0.9f, weight_decay = 1e-3f;
  matrix weights, weight_step;
  row_vector bias, bias_step;

  layer(int in, int out, generator& random)
      : weights(in, out), weight_step(matrix::Zero(in, out)), bias(row_vector::Zero(out)),
        bias_step(row_vector::Zero(out)) {
    const float limit = std::sqrt(6.0f / static_cast<float>(in)); // He et al. 2015
    for (Eigen::Index i = 0; i < weights.size(); ++i)
      weights.data()[i] = limit * random.symmetric();
  }
  matrix operator()(const matrix_ref& in) const { return (in * weights).rowwise() + bias; }
  void learn(const matrix_ref& in, const matrix& d_out, float rate) {
    weight_step = momentum * weight_step - rate * weight_decay * weights;
    weight_step.noalias() -= rate * in.transpose() * d_out;
    bias_step = momentum * bias_step - rate * d_out.colwise().sum();
    weights += weight_step;
    bias += bias_step;
  }
};

inline matrix relu(const matrix& x) { return x.cwiseMax(0.0f); }

/// Shuffles, holds a quarter out, and standardises both parts by the part to learn from alone.
inline std::pair<dataset, dataset> split(dataset all, generator& random) {
  all.shuffle(random);
  const int held_out = all.size() / 4, kept = all.size() - held_out;
  dataset test{all.images.topRows(held_out), all.labels.head(held_out)};
  dataset train{all.images.bottomRows(kept), all.labels.tail(kept)};
  // The 5 keeps pixels that are nearly always blank from counting for much where they are not.
  const row_vector mean = train.images.colwise().mean();
  const row_vector spread =
      ((train.images.rowwise() - mean).array().square().colwise().mean() + 5).sqrt();
  for (matrix* images : {&train.images, &test.images})
    *images = (images->rowwise() - mean).array().rowwise() / spread.array();
  return {std::move(train), std::move(test)};
}
