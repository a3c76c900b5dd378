// SPDX-License-Identifier: MIT
//
// Trains a small neural language model (Bengio et al. 2003) on any text: the words before become
// embeddings, then hidden states, then scores of every word of the text. The last step and the loss
// are perdita::linear's, which makes both gradients and never holds the scores.
//
// Read first: output_layer in word_learner.hpp. words.hpp has the text, word_network.hpp the
// layers.

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <ostream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <Eigen/Core>

#include "progress.hpp"
#include "word_learner.hpp"
#include "word_options.hpp"
#include "words.hpp"

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#endif

constexpr double mebibyte = 1 << 20;

/// Writes what a benchmark of the head needs, with the peaked distributions of a trained model. In
/// this machine's byte order, one after the other, matrices row by row:
///   int64 N, D, V; float hidden[N][D]; float weights[V][D]; float bias[V]; int32 labels[N].
/// N: all held-out words.
void save(model& learner, const corpus& text, std::ostream& file) {
  const matrix& hidden = learner.held_out_states();
  const auto layer = learner.layer().values();
  const std::int64_t sizes[] = {hidden.rows(), hidden.cols(), layer.matrix.rows()};
  const auto held_out = std::span(text.words).subspan(text.training);
  const std::vector<std::int32_t> labels(held_out.begin(), held_out.end());
  const auto write = [&](const auto* from, auto n) {
    file.write(reinterpret_cast<const char*>(from),
               static_cast<std::streamsize>(static_cast<std::size_t>(n) * sizeof *from));
  };
  write(sizes, 3);
  write(hidden.data(), hidden.size());
  write(layer.matrix.data(), layer.matrix.size());
  write(layer.bias.data(), layer.bias.size());
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
    save(learner, text, file);
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
  if (chosen.text.empty())
    chosen.text = own_headers();
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
