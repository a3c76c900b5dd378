// SPDX-License-Identifier: MIT
#pragma once

/// The layers of examples/word_model.cpp below the last one: the words before become embeddings,
/// these side by side the input of one hidden layer.

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include <Eigen/Core>

#include "generator.hpp"

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using row_vector = Eigen::RowVectorXf;
using Eigen::Index;

inline matrix random_matrix(Index rows, Index cols, float limit, generator& random) {
  matrix result(rows, cols);
  for (Index i = 0; i < result.size(); ++i)
    result.data()[i] = limit * random.symmetric();
  return result;
}

/// Numbers that are learnt by Adagrad (Duchi et al. 2011): each has a rate of its own, which falls
/// with the squares of the gradients that it has seen. A rare word's stays high, and what saw no
/// gradient does not move, so that rows without one may be left out.
template <class M> struct learnt {
  M value, gradient, squares;

  explicit learnt(M start)
      : value(std::move(start)), gradient(M::Zero(value.rows(), value.cols())),
        squares(M::Constant(value.rows(), value.cols(), 1e-8f)) {}

  void learn(float rate) { step(value.array(), gradient.array(), squares.array(), rate); }
  void learn_row(Index r, float rate) {
    step(value.row(r).array(), gradient.row(r).array(), squares.row(r).array(), rate);
  }

private:
  template <class V, class G, class S> static void step(V v, G g, S s, float rate) {
    s += g.square();
    v -= rate * g / s.sqrt();
  }
};

class network {
public:
  network(Index vocabulary, Index context, Index dimension, generator& random)
      : embeddings_(random_matrix(vocabulary, dimension, 0.1f, random)),
        weights_(random_matrix(context * dimension, dimension,
                               std::sqrt(3.0f / static_cast<float>(context * dimension)), random)),
        bias_(row_vector::Zero(dimension)), context_(context) {}

  /// One row of hidden states for each position of a text, which sees the words before it.
  const matrix& forward(std::span<const int> words, std::span<const int> positions) {
    const Index dimension = embeddings_.value.cols();
    const auto rows = static_cast<Index>(positions.size());
    seen_.resize(positions.size() * static_cast<std::size_t>(context_));
    input_.resize(rows, context_ * dimension);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < context_; ++c) {
        const int word =
            words[static_cast<std::size_t>(positions[static_cast<std::size_t>(r)] - 1 - c)];
        seen_[static_cast<std::size_t>(r * context_ + c)] = word;
        input_.row(r).segment(c * dimension, dimension) = embeddings_.value.row(word);
      }
    hidden_.noalias() = input_ * weights_.value;
    hidden_ = (hidden_.rowwise() + bias_.value).array().tanh();
    return hidden_;
  }

  /// Learns from the gradient with respect to the last forward's result.
  void learn(const matrix& d_hidden, float rate) {
    const matrix d_sum = d_hidden.array() * (1 - hidden_.array().square());
    const matrix d_input = d_sum * weights_.value.transpose();
    weights_.gradient.noalias() = input_.transpose() * d_sum;
    bias_.gradient = d_sum.colwise().sum();
    weights_.learn(rate);
    bias_.learn(rate);
    learn_embeddings(d_input, rate);
  }

private:
  /// Of the embeddings only the rows of words that were seen.
  void learn_embeddings(const matrix& d_input, float rate) {
    const Index dimension = embeddings_.value.cols();
    for (Index r = 0; r < d_input.rows(); ++r)
      for (Index c = 0; c < context_; ++c)
        embeddings_.gradient.row(seen_[static_cast<std::size_t>(r * context_ + c)]) +=
            d_input.row(r).segment(c * dimension, dimension);
    std::sort(seen_.begin(), seen_.end());
    seen_.erase(std::unique(seen_.begin(), seen_.end()), seen_.end());
    for (const int word : seen_) {
      embeddings_.learn_row(word, rate);
      embeddings_.gradient.row(word).setZero();
    }
  }

  learnt<matrix> embeddings_, weights_;
  learnt<row_vector> bias_;
  Index context_;
  std::vector<int> seen_; // words before, row by row
  matrix input_, hidden_;
};
