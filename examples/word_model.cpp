// SPDX-License-Identifier: MIT
//
// Trains a small neural language model (Bengio et al. 2003) on any text: the words before become
// embeddings, then hidden states, then scores of every word of the text. The last step and the loss
// are perdita::linear's, which makes both gradients and never holds the scores.
//
// Read first: output_layer, below. words.hpp has the text, word_network.hpp the other layers.

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <ostream>
#include <span>
#include <stdexcept>
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

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#endif

constexpr float first_rate = 0.05f; // falls to 0 in the course of the training
constexpr double mebibyte = 1 << 20;

using clock_type = std::chrono::steady_clock;
double seconds_since(clock_type::time_point start) {
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
      : weights_(matrix::Zero(static_cast<Index>(unigram.size()), dimension)),
        bias_(row_vector::Zero(static_cast<Index>(unigram.size()))), materialised_(materialised) {
    // Without weights, and with this bias, it starts as the unigram model.
    for (std::size_t word = 0; word < unigram.size(); ++word)
      bias_.value[static_cast<Index>(word)] = static_cast<float>(std::log(unigram[word]));
  }

  /// The mean loss of a batch.
  float value(const matrix& hidden, const std::vector<word_number>& labels) {
    if (!materialised_)
      return head_(hidden, perdita::affine(weights_.value, bias_.value), labels,
                   {.memory = &memory_});
    return loss_(make_scores(hidden), labels, {.memory = &memory_});
  }

  /// The mean loss of a batch. Its gradient with respect to the hidden states goes to d_hidden;
  /// those with respect to weights and bias stay here, for learn().
  float value_and_gradients(const matrix& hidden, const std::vector<word_number>& labels,
                            matrix& d_hidden) {
    d_hidden.resize(hidden.rows(), hidden.cols());
    if (!materialised_)
      return head_(hidden, perdita::affine(weights_.value, bias_.value), labels, d_hidden,
                   perdita::affine(weights_.gradient, bias_.gradient), {.memory = &memory_});

    // The same without the head: the gradient takes the place of the scores.
    Eigen::Ref<matrix> scores = make_scores(hidden);
    const float value = loss_(scores, labels, scores, {.memory = &memory_});
    const all_cores use;
    d_hidden.noalias() = scores * weights_.value;
    weights_.gradient.noalias() = scores.transpose() * hidden;
    bias_.gradient = scores.colwise().sum();
    return value;
  }

  void learn(float rate) {
    weights_.learn(rate);
    bias_.learn(rate);
  }

  const matrix& weights() const { return weights_.value; }
  const row_vector& bias() const { return bias_.value; }
  /// Bytes held besides the layer itself and its gradients.
  std::size_t scratch() const {
    return memory_.size() + static_cast<std::size_t>(scores_.size()) * sizeof(float);
  }

private:
  Eigen::Ref<matrix> make_scores(const matrix& hidden) {
    if (scores_.rows() < hidden.rows())
      scores_.resize(hidden.rows(), weights_.value.rows());
    Eigen::Ref<matrix> scores = scores_.topRows(hidden.rows());
    const all_cores use;
    scores.noalias() = hidden * weights_.value.transpose();
    scores.rowwise() += bias_.value;
    return scores;
  }

  perdita::cross_entropy<float> loss_; // the mean over the rows
  perdita::linear<perdita::cross_entropy<float>> head_{loss_};
  perdita::workspace memory_; // scratch that all calls share: none of them allocates
  learnt<matrix> weights_;
  learnt<row_vector> bias_;
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

  void save(std::ostream& file);

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

/// Writes what a benchmark of the head needs, with the peaked distributions of a trained model. In
/// this machine's byte order, one after the other, matrices row by row:
///   int64 N, D, V; float hidden[N][D]; float weights[V][D]; float bias[V]; int32 labels[N].
/// N: all held-out words.
void model::save(std::ostream& file) {
  const auto positions = held_out(text_.training, text_.held_out());
  const matrix& hidden = forward(text_.words, positions);
  const std::int64_t sizes[] = {hidden.rows(), hidden.cols(), output_.weights().rows()};
  const std::vector<std::int32_t> labels(labels_.begin(), labels_.end());
  const auto write = [&](const auto* from, auto n) {
    file.write(reinterpret_cast<const char*>(from),
               static_cast<std::streamsize>(static_cast<std::size_t>(n) * sizeof *from));
  };
  write(sizes, 3);
  write(hidden.data(), hidden.size());
  write(output_.weights().data(), output_.weights().size());
  write(output_.bias().data(), output_.bias().size());
  write(labels.data(), labels.size());
}

/// Throws where the path cannot be written to.
std::ofstream open_to_write(const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  if (!file)
    throw std::runtime_error(path + ": " + std::strerror(errno));
  return file;
}

/// The most memory that this process has held so far, in bytes; 0 where nobody counts it.
double peak_memory() {
#if defined(RUSAGE_SELF)
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
#if defined(__APPLE__)
  return static_cast<double>(used.ru_maxrss);
#else
  return static_cast<double>(used.ru_maxrss) * 1024;
#endif
#else
  return 0;
#endif
}

struct epoch_result {
  double loss, seconds, in_head;
};

epoch_result run_epoch(model& learner, int epoch, int epochs, progress& display) {
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

void report(const epoch_result& result, double perplexity, const model& learner, int epoch,
            progress& display) {
  char figures[128];
  std::snprintf(figures, sizeof figures,
                "loss %.4f  held-out perplexity %.1f  %.0f words/s  %.0f %% in the head",
                result.loss, perplexity, static_cast<double>(learner.positions()) / result.seconds,
                100 * result.in_head / result.seconds);
  display.keep(epoch, figures);
}

/// True if the model has become better than the unigram model.
bool train(const corpus& text, const options& chosen) {
  std::ofstream file;
  if (!chosen.save.empty())
    file = open_to_write(chosen.save); // better now than after the training
  const double unigram = unigram_perplexity(text), bigram = bigram_perplexity(text);
  model learner(text, chosen, chosen.materialised);
  progress display(chosen.epochs);
  double perplexity = 0, seconds = 0;
  for (int epoch = 1; epoch <= chosen.epochs; ++epoch) {
    const epoch_result result = run_epoch(learner, epoch, chosen.epochs, display);
    perplexity = learner.held_out_perplexity();
    seconds += result.seconds;
    report(result, perplexity, learner, epoch, display);
  }
  std::printf("held-out perplexity  %.1f (unigram model %.1f, bigram model %.1f)\n", perplexity,
              unigram, bigram);
  std::printf("training             %.1f s (%.1f s in the head)\n", seconds, learner.in_head());
  std::printf("scratch of the head  %.1f MiB\n", learner.scratch() / mebibyte);
  std::printf("peak memory          %.1f MiB\n", peak_memory() / mebibyte);
  if (file.is_open()) {
    learner.save(file);
    if (!file.flush())
      throw std::runtime_error(chosen.save + ": cannot be written");
  }
  return perplexity < unigram;
}

/// What a few steps came to.
struct few_steps {
  std::vector<double> losses;
  double milliseconds = 0, mebibytes = 0; ///< of the head: a step, scratch
};

few_steps run_few_steps(const corpus& text, const options& chosen, bool materialised) {
  model learner(text, chosen, materialised);
  learner.start_epoch();
  few_steps result;
  result.losses.push_back(learner.train(0, first_rate)); // not timed: it also fetches the memory
  const double before = learner.in_head();
  const std::size_t steps = std::min<std::size_t>(learner.steps(), 8);
  for (std::size_t step = 1; step < steps; ++step)
    result.losses.push_back(learner.train(step, first_rate));
  if (steps > 1)
    result.milliseconds = 1000 * (learner.in_head() - before) / static_cast<double>(steps - 1);
  result.mebibytes = learner.scratch() / mebibyte;
  return result;
}

/// The same few steps with the head and without, side by side.
void compare(const corpus& text, const options& chosen) {
  const few_steps head = run_few_steps(text, chosen, false);
  const few_steps materialised = run_few_steps(text, chosen, true);
  std::printf("%-11s %13s %13s %13s\n", "", "head", "materialised", "difference");
  for (std::size_t step = 0; step < head.losses.size(); ++step)
    std::printf("loss %-6zu %13.6f %13.6f %13.1e\n", step + 1, head.losses[step],
                materialised.losses[step], head.losses[step] - materialised.losses[step]);
  const auto row = [](const char* name, double a, double b) {
    std::printf("%-11s %13.1f %13.1f %10.2f : 1\n", name, a, b, b / a);
  };
  if (head.losses.size() > 1)
    row("ms a step", head.milliseconds, materialised.milliseconds);
  row("scratch MiB", head.mebibytes, materialised.mebibytes);
}

int main(int argc, char** argv) try {
  options chosen = read_options(argc, argv);
  if (chosen.help) {
    print_usage();
    return 0;
  }
  if (chosen.text.empty()) {
    chosen.text = PERDITA_EXAMPLES_HEADERS;
    if (!std::filesystem::is_directory(chosen.text))
      throw std::runtime_error(chosen.text + ": the library's headers, which it reads where no "
                                             "other text is given, are not there");
  }
  Eigen::setNbThreads(1); // the products outside the head are small, and their order stays fixed
  const corpus text = read_corpus(chosen.text);
  std::printf("%s: %zu words, %zu different; the last %zu held out, %.1f %% of them unknown\n",
              chosen.text.c_str(), text.words.size(), text.vocabulary() - 1, text.held_out(),
              100 * unknown_share(text));
  std::fflush(stdout); // whoever reads a pipe should not wait for it either
  if (chosen.compare) {
    compare(text, chosen);
    return 0;
  }
  if (train(text, chosen))
    return 0;
  std::fprintf(stderr, "word_model: no better than the frequencies of the words\n");
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "word_model: %s\n", error.what());
  return 2;
}
