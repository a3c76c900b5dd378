// SPDX-License-Identifier: MIT
#pragma once

/// The layers of the language model: the words before become embeddings, these side by side the
/// input of one hidden layer, and that the input of the last layer, which has a score for each
/// word.

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <perdita/linear.hpp>

#include "generator.hpp"
#include "words.hpp"

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

  // The squares start as if each number had seen a gradient of 1e-4, lest its first step be a whole
  // `rate`, however small the gradient.
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

/// Words before → embeddings → tanh of one layer.
class network {
public:
  // The layer's weights start with a variance of 1 over the numbers that each of its sums has.
  network(Index vocabulary, Index context, Index dimension, generator& random)
      : embeddings_(random_matrix(vocabulary, dimension, 0.1f, random)),
        weights_(random_matrix(context * dimension, dimension,
                               std::sqrt(3.0f / static_cast<float>(context * dimension)), random)),
        bias_(row_vector::Zero(dimension)), context_(context) {}

  /// One row of hidden states for each position in a text, made from the words before it.
  const matrix& forward(const std::vector<word_number>& words,
                        std::span<const position> positions) {
    const Index dimension = embeddings_.value.cols();
    input_.resize(static_cast<Index>(positions.size()), context_ * dimension);
    seen_.clear();
    for (Index row = 0; const position at : positions) {
      for (Index i = 0; i < context_; ++i) {
        const word_number word = words[at - 1 - static_cast<std::size_t>(i)];
        input_.row(row).segment(i * dimension, dimension) = embeddings_.value.row(word);
        seen_.push_back(word);
      }
      ++row;
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
  /// Touches the embeddings of the words that were seen, and no others.
  void learn_embeddings(const matrix& d_input, float rate) {
    const Index dimension = embeddings_.value.cols();
    auto word = seen_.begin();
    for (Index row = 0; row < d_input.rows(); ++row)
      for (Index i = 0; i < context_; ++i)
        embeddings_.gradient.row(*word++) += d_input.row(row).segment(i * dimension, dimension);
    std::sort(seen_.begin(), seen_.end());
    seen_.erase(std::unique(seen_.begin(), seen_.end()), seen_.end());
    for (const word_number once : seen_) {
      embeddings_.learn_row(once, rate);
      embeddings_.gradient.row(once).setZero();
    }
  }

  learnt<matrix> embeddings_, weights_;
  learnt<row_vector> bias_;
  Index context_;
  std::vector<word_number> seen_; // by the last forward, row by row
  matrix input_, hidden_;
};

/// What makes a score for each word from hidden states.
class last_layer {
public:
  last_layer(const std::vector<double>& unigram, Index dimension)
      : weights_(matrix::Zero(static_cast<Index>(unigram.size()), dimension)),
        bias_(row_vector::Zero(static_cast<Index>(unigram.size()))) {
    // Without weights, and with this bias, it starts as the unigram model.
    for (std::size_t word = 0; word < unigram.size(); ++word)
      bias_.value[static_cast<Index>(word)] = static_cast<float>(std::log(unigram[word]));
  }

  auto values() const { return perdita::affine(weights_.value, bias_.value); }
  /// For a loss to write to, before learn().
  auto gradients() { return perdita::affine(weights_.gradient, bias_.gradient); }

  void learn(float rate) {
    weights_.learn(rate);
    bias_.learn(rate);
  }

private:
  learnt<matrix> weights_;
  learnt<row_vector> bias_;
};
