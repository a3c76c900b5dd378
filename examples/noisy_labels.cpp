// SPDX-License-Identifier: MIT
//
// The digits with labels of which many are wrong: how well do losses that are made for that learn
// what is right? The same network, the same start, the same wrong labels for all.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <Eigen/Core>

#include <perdita/aldr_kl.hpp>
#include <perdita/comp_sum.hpp>
#include <perdita/cross_entropy.hpp>
#include <perdita/ldr.hpp>
#include <perdita/sparsemax.hpp>
#include <perdita/z_loss.hpp>

#include "digits.hpp"
#include "digits_network.hpp"
#include "line_chart.hpp"

#ifndef PERDITA_EXAMPLES_DATA
#define PERDITA_EXAMPLES_DATA "examples/data"
#endif

constexpr int hidden_units = 128, batch = 32;

struct settings {
  std::string data = PERDITA_EXAMPLES_DATA "/digits.csv", figure;
  double flipped = 0.4;
  int epochs = 60, seeds = 3;
  float rate = 0.05f;
};

/// Gives each label another one at random with probability `share`.
void flip(Eigen::VectorXi& labels, double share, generator& random) {
  for (int& label : labels)
    if (random.below(1 << 20) < share * (1 << 20))
      label = (label + 1 + random.below(classes - 1)) % classes;
}

/// The share of the held-out digits, whose labels are right, that is recognised after each epoch.
template <class Loss>
std::vector<double> accuracies(const Loss& loss, const settings& s, std::uint64_t seed) {
  generator random(seed);
  auto [train, test] = split(read_digits(s.data), random);
  flip(train.labels, s.flipped, random);
  layer hidden(pixels, hidden_units, random), output(hidden_units, classes, random);
  perdita::workspace memory;
  std::vector<double> result;
  for (int epoch = 0; epoch < s.epochs; ++epoch) {
    train.shuffle(random);
    for (int first = 0; first < train.size(); first += batch) {
      const int n = std::min(batch, train.size() - first);
      const auto images = train.images.middleRows(first, n);
      const matrix active = relu(hidden(images));
      matrix scores = output(active);
      loss(scores, train.labels.segment(first, n), scores, {.memory = &memory});
      const matrix d_active = scores * output.weights.transpose(); // the gradient took their place
      output.learn(active, scores, s.rate);
      hidden.learn(images, (active.array() > 0).select(d_active, 0), s.rate);
    }
    const matrix scores = output(relu(hidden(test.images)));
    int right = 0;
    for (int r = 0; r < test.size(); ++r) {
      Eigen::Index best = 0;
      scores.row(r).maxCoeff(&best);
      right += best == test.labels[r];
    }
    result.push_back(100.0 * right / test.size());
  }
  return result;
}

/// The mean over several starts and sets of wrong labels.
template <class Loss> chart_line compare(const char* name, const Loss& loss, const settings& s) {
  chart_line line{name, std::vector<double>(static_cast<std::size_t>(s.epochs), 0)};
  for (int seed = 1; seed <= s.seeds; ++seed) {
    const std::vector<double> one = accuracies(loss, s, static_cast<std::uint64_t>(seed));
    for (std::size_t i = 0; i < one.size(); ++i)
      line.values[i] += one[i] / s.seeds;
  }
  const auto best = std::max_element(line.values.begin(), line.values.end());
  std::printf("%7.1f %% in epoch %2d %12.1f %%   %s\n", *best,
              static_cast<int>(best - line.values.begin()) + 1, line.values.back(), name);
  std::fflush(stdout);
  return line;
}

double number(const char* text, double low, double high, const char* option) {
  char* end = nullptr;
  const double value = std::strtod(text, &end);
  if (end == text || *end || !(value >= low && value <= high))
    throw std::runtime_error(std::string(option) + ": " + text + " is not a number from " +
                             std::to_string(low) + " to " + std::to_string(high));
  return value;
}

int main(int argc, char** argv) try {
  settings s;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    const bool last = i + 1 == argc;
    if (option == "--figure" && !last)
      s.figure = argv[++i];
    else if (option == "--flipped" && !last)
      s.flipped = number(argv[++i], 0, 0.9, "--flipped");
    else if (option == "--epochs" && !last)
      s.epochs = static_cast<int>(number(argv[++i], 2, 10000, "--epochs"));
    else if (option == "--seeds" && !last)
      s.seeds = static_cast<int>(number(argv[++i], 1, 1000, "--seeds"));
    else if (!option.starts_with('-'))
      s.data = argv[i];
    else {
      const bool asked = option == "--help" || option == "-h";
      std::fprintf(asked ? stdout : stderr,
                   "usage: noisy_labels [--flipped SHARE] [--epochs N] [--seeds N] [--figure "
                   "FILE.svg] [FILE.csv]\n\nTrains on handwritten digits of whose labels a SHARE "
                   "(0.4) is wrong, with several losses,\nand prints how many held-out digits each "
                   "recognises.\n");
      return asked ? 0 : 2;
    }
  }
  Eigen::setNbThreads(1); // the products are too small to be worth sharing out
  std::printf("digits with %.0f %% of the labels wrong, mean of %d runs: held-out digits "
              "recognised\n%-30s %19s %21s\n",
              100 * s.flipped, s.seeds, "", "at best", "after the last epoch");
  std::vector<chart_line> lines;
  const auto add = [&](const char* name, const auto& loss) {
    lines.push_back(compare(name, loss, s));
  };
  add("cross-entropy", perdita::cross_entropy<float>());
  add("GCE, q = 0.7", perdita::comp_sum<float>({.tau = 1.7f}));
  add("LDR-KL, λ = 10", perdita::ldr_kl<float>({.lambda = 10, .margin = 0.1f}));
  add("ALDR-KL, λ₀ = 10", perdita::aldr_kl<float>({.lambda = 10, .margin = 0.1f}));
  add("Z-loss", perdita::z_loss<float>());
  add("sparsemax", perdita::sparsemax_loss<float>());
  if (!s.figure.empty()) {
    char title[96];
    std::snprintf(title, sizeof title,
                  "Digits, %.0f %% of the labels wrong: %% of held-out digits "
                  "recognised",
                  100 * s.flipped);
    write_chart(s.figure, title, "epoch", lines, 50, 100, 10);
    std::printf("%s\n", s.figure.c_str());
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "noisy_labels: %s\n", error.what());
  return 2;
}
