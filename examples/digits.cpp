// SPDX-License-Identifier: MIT
//
// Trains a softmax classifier with one hidden layer on handwritten digits: the products are
// Eigen's, the loss and its gradient Perdita's.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>

#include <Eigen/Core>

#include <perdita/cross_entropy.hpp>

#include "digits.hpp"
#include "digits_network.hpp"
#include "progress.hpp"

#ifndef PERDITA_EXAMPLES_DATA
#define PERDITA_EXAMPLES_DATA "examples/data"
#endif

constexpr int hidden_units = 128, epochs = 60, batch = 32;
constexpr float first_rate = 0.1f;
constexpr std::uint64_t seed = 1;
constexpr double required_accuracy = 0.96;

double train_and_test(const std::string& path) {
  generator random(seed);
  auto [train, test] = split(read_digits(path), random);
  const int kept = train.size(), held_out = test.size();
  std::printf("%s: %d digits to learn from, %d held out\n", path.c_str(), kept, held_out);

  layer hidden(pixels, hidden_units, random), output(hidden_units, classes, random);

  const perdita::cross_entropy<float> loss; // the mean over the rows
  perdita::workspace memory;                // scratch that all calls share: none of them allocates
  Eigen::VectorX<unsigned char> hits(batch);

  using clock = std::chrono::steady_clock;
  using seconds = std::chrono::duration<double>;
  const auto start = clock::now();
  seconds in_loss{};
  progress display(epochs);
  for (int epoch = 1; epoch <= epochs; ++epoch) {
    const auto epoch_start = clock::now();
    const float rate = first_rate * static_cast<float>(epochs + 1 - epoch) / epochs;
    double loss_sum = 0;
    int hit_count = 0;
    train.shuffle(random);
    for (int first = 0; first < kept; first += batch) {
      const int n = std::min(batch, kept - first);
      const auto images = train.images.middleRows(first, n);
      const auto labels = train.labels.segment(first, n);
      const matrix active = relu(hidden(images));
      matrix scores = output(active);

      const auto loss_start = clock::now();
      const float value = loss(scores, labels, scores, {.hits = hits.head(n), .memory = &memory});
      in_loss += clock::now() - loss_start;
      const matrix& d_scores = scores; // the gradient took the place of the scores

      const matrix d_active = d_scores * output.weights.transpose();
      output.learn(active, d_scores, rate);
      hidden.learn(images, (active.array() > 0).select(d_active, 0), rate);
      loss_sum += static_cast<double>(value) * n;
      hit_count += hits.head(n).cast<int>().sum();
    }
    char figures[96];
    std::snprintf(figures, sizeof figures, "loss %.4f  accuracy %5.1f %%  %.0f rows/s",
                  loss_sum / kept, 100.0 * hit_count / kept,
                  kept / seconds(clock::now() - epoch_start).count());
    display.show(epoch, figures);
  }
  const double total = seconds(clock::now() - start).count();

  hits.resize(held_out);
  const float train_loss = loss(output(relu(hidden(train.images))), train.labels);
  const float test_loss = loss(output(relu(hidden(test.images))), test.labels, {.hits = hits});
  const int right = hits.cast<int>().sum();
  const double accuracy = static_cast<double>(right) / held_out;
  std::printf("training loss  %.4f\n", static_cast<double>(train_loss));
  std::printf("test loss      %.4f\n", static_cast<double>(test_loss));
  std::printf("test accuracy  %.2f %% (%d of %d)\n", 100 * accuracy, right, held_out);
  std::printf("total time     %.3f s\n", total);
  std::printf("in the loss    %.3f s (%.1f %%)\n", in_loss.count(), 100 * in_loss.count() / total);
  return accuracy;
}

int main(int argc, char** argv) try {
  const std::string argument = argc > 1 ? argv[1] : PERDITA_EXAMPLES_DATA "/digits.csv";
  if (argument == "--help" || argument == "-h") {
    std::printf("usage: digits [FILE.csv]\n\n"
                "Trains a softmax classifier on handwritten digits, a quarter of them held out.\n"
                "FILE.csv: 64 pixels (0 to 16) and the digit on each line; by default\n"
                "%s\n\n"
                "Exit status: 0 if at least %.0f %% of the held-out digits are recognised, 1 if\n"
                "not, 2 if there was nothing to learn from.\n",
                PERDITA_EXAMPLES_DATA "/digits.csv", 100 * required_accuracy);
    return 0;
  }
  if (argc > 2 || argument.starts_with('-')) {
    std::fprintf(stderr, "usage: digits [FILE.csv]\n");
    return 2;
  }
  Eigen::setNbThreads(1); // the products are too small to be worth sharing out
  if (train_and_test(argument) >= required_accuracy)
    return 0;
  std::fprintf(stderr, "digits: fewer than %.0f %% recognised\n", 100 * required_accuracy);
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "digits: %s\n", error.what());
  return 2;
}
