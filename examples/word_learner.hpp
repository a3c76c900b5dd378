// SPDX-License-Identifier: MIT
#pragma once

/// The language model and how it learns a text: examples/word_model.cpp is about this; others start
/// from a model that has learnt. Read first: output_layer, below.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

#include "generator.hpp"
#include "progress.hpp"
#include "word_network.hpp"
#include "word_options.hpp"
#include "words.hpp"

inline constexpr float first_rate = 0.05f; // falls to 0 in the course of the training

using clock_type = std::chrono::steady_clock;
inline double seconds_since(clock_type::time_point start) {
  return std::chrono::duration<double>(clock_type::now() - start).count();
}

/// Lets Eigen's products use all cores, as the head does, while it lives.
struct all_cores {
  all_cores() { Eigen::setNbThreads(0); }
  ~all_cores() { Eigen::setNbThreads(1); }
};

/// The layer that makes a score for each word, and the cross-entropy of these scores.
class output_layer {
public:
  output_layer(const std::vector<double>& unigram, Index dimension, bool materialised)
      : layer_(unigram, dimension), materialised_(materialised) {}

  /// The mean loss of a batch.
  float value(const matrix& hidden, const std::vector<word_number>& labels) {
    if (!materialised_)
      return head_(hidden, layer_.values(), labels, {.memory = &memory_});
    return loss_(make_scores(hidden), labels, {.memory = &memory_});
  }

  /// The mean loss of a batch. Its gradient with respect to the hidden states goes to d_hidden;
  /// those with respect to weights and bias stay in the layer, for learn().
  float value_and_gradients(const matrix& hidden, const std::vector<word_number>& labels,
                            matrix& d_hidden) {
    d_hidden.resize(hidden.rows(), hidden.cols());
    if (!materialised_)
      return head_(hidden, layer_.values(), labels, d_hidden, layer_.gradients(),
                   {.memory = &memory_});

    // The same without the head: the gradient takes the place of the scores.
    Eigen::Ref<matrix> scores = make_scores(hidden);
    const float value = loss_(scores, labels, scores, {.memory = &memory_});
    const all_cores use;
    const auto to = layer_.gradients();
    d_hidden.noalias() = scores * layer_.values().matrix;
    to.matrix.noalias() = scores.transpose() * hidden;
    to.bias = scores.colwise().sum();
    return value;
  }

  void learn(float rate) { layer_.learn(rate); }

  const last_layer& layer() const { return layer_; }
  /// Bytes held besides the layer itself and its gradients.
  std::size_t scratch() const {
    return memory_.size() + static_cast<std::size_t>(scores_.size()) * sizeof(float);
  }

private:
  Eigen::Ref<matrix> make_scores(const matrix& hidden) {
    const auto from = layer_.values();
    if (scores_.rows() < hidden.rows())
      scores_.resize(hidden.rows(), from.matrix.rows());
    Eigen::Ref<matrix> scores = scores_.topRows(hidden.rows());
    const all_cores use;
    scores.noalias() = hidden * from.matrix.transpose();
    scores.rowwise() += from.bias;
    return scores;
  }

  perdita::cross_entropy<float> loss_; // the mean over the rows
  perdita::linear<perdita::cross_entropy<float>> head_{loss_};
  perdita::workspace memory_; // scratch that all calls share: none of them allocates
  last_layer layer_;
  bool materialised_;
  matrix scores_; // none unless materialised
};

/// The whole model, and the text that it learns from.
class model {
public:
  model(const corpus& text, const options& chosen, bool materialised)
      : text_(text), random_(chosen.seed),
        network_(static_cast<Index>(text.vocabulary()), chosen.context, chosen.dimension, random_),
        output_(unigram_model(text), chosen.dimension, materialised),
        batch_(static_cast<std::size_t>(chosen.batch)),
        order_(text.training - static_cast<std::size_t>(chosen.context)) {
    std::iota(order_.begin(), order_.end(), static_cast<position>(chosen.context));
  }

  std::size_t steps() const { return (order_.size() + batch_ - 1) / batch_; }
  std::size_t positions() const { return order_.size(); }
  std::size_t batch_size(std::size_t step) const {
    return std::min(batch_, order_.size() - step * batch_);
  }

  void start_epoch() {
    for (std::size_t i = order_.size(); i > 1; --i)
      std::swap(order_[i - 1],
                order_[static_cast<std::size_t>(random_.below(static_cast<int>(i)))]);
    // `unknown` never occurs in the training part. To be learnt at all it takes, in each epoch, the
    // place of about half of the words that occur once: those are as rare as new words.
    shown_ = text_.words;
    for (std::size_t i = 0; i < text_.training; ++i)
      if (text_.counts[shown_[i]] == 1 && random_.below(2) == 0)
        shown_[i] = corpus::unknown;
  }

  /// Learns from batch number `step` of the epoch; its mean loss before that.
  double train(std::size_t step, float rate) {
    const auto batch = std::span(order_).subspan(step * batch_, batch_size(step));
    const matrix& hidden = forward(shown_, batch);
    const auto start = clock_type::now();
    const float loss = output_.value_and_gradients(hidden, labels_, d_hidden_);
    in_head_ += seconds_since(start);
    output_.learn(rate);
    network_.learn(d_hidden_, rate);
    return static_cast<double>(loss);
  }

  double held_out_perplexity() {
    double sum = 0;
    for (std::size_t first = text_.training; first < text_.words.size(); first += batch_) {
      const auto batch = held_out(first, std::min(batch_, text_.words.size() - first));
      const matrix& hidden = forward(text_.words, batch);
      sum +=
          static_cast<double>(output_.value(hidden, labels_)) * static_cast<double>(batch.size());
    }
    return std::exp(sum / static_cast<double>(text_.held_out()));
  }

  /// Hidden states of all words that are held out.
  const matrix& held_out_states() {
    return forward(text_.words, held_out(text_.training, text_.held_out()));
  }
  const network& layers() const { return network_; }
  const last_layer& layer() const { return output_.layer(); }

  double in_head() const { return in_head_; } ///< seconds of training
  double scratch() const { return static_cast<double>(output_.scratch()); }

private:
  static std::vector<position> held_out(std::size_t first, std::size_t n) {
    std::vector<position> result(n);
    std::iota(result.begin(), result.end(), static_cast<position>(first));
    return result;
  }
  const matrix& forward(const std::vector<word_number>& words, std::span<const position> at) {
    labels_.clear();
    for (const position p : at)
      labels_.push_back(words[p]);
    return network_.forward(words, at);
  }

  const corpus& text_;
  generator random_;
  network network_;
  output_layer output_;
  std::size_t batch_;
  std::vector<position> order_;             // in which the epoch goes through the text
  std::vector<word_number> shown_, labels_; // the text as the epoch sees it; the words to guess
  matrix d_hidden_;
  double in_head_ = 0;
};

struct epoch_result {
  double loss, seconds, in_head;
};

inline epoch_result run_epoch(model& learner, int epoch, int epochs, progress& display) {
  const auto start = clock_type::now();
  const double in_head_before = learner.in_head();
  double loss_sum = 0;
  learner.start_epoch();
  for (std::size_t step = 0; step < learner.steps(); ++step) {
    const double part = static_cast<double>(step) / static_cast<double>(learner.steps());
    const double left = 1 - (epoch - 1 + part) / epochs;
    const double loss = learner.train(step, first_rate * static_cast<float>(left));
    loss_sum += loss * static_cast<double>(learner.batch_size(step));
    display.show_part(epoch, part, "loss " + std::to_string(loss));
  }
  return {loss_sum / static_cast<double>(learner.positions()), seconds_since(start),
          learner.in_head() - in_head_before};
}
