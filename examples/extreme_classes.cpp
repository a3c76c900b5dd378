// SPDX-License-Identifier: MIT
//
// A classifier with up to millions of classes, whose last layer learns at the same cost whatever
// their number: perdita::spherical_layer with the Z-loss, beside the linear head with a softmax.
//
// The task, made up as it goes: classes as frequent as words are (the k-th with about 1/k, in no
// order), and hidden states that say which class it is: its code of random signs, blurred.
//
// Read first: learn_implicitly and learn_explicitly, below.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>
#include <perdita/spherical_layer.hpp>
#include <perdita/z_loss.hpp>

#include "generator.hpp"

struct options {
  std::vector<perdita::index> outputs{10'000, 100'000, 1'000'000};
  perdita::index features = 128, steps = 300, batch = 32;
  double memory = 4; // GiB
  double seconds = 1;
  bool help = false;
};

void print_usage() {
  const options defaults;
  std::printf(
      "usage: extreme_classes [OPTION...]\n"
      "\n"
      "Trains an output layer of D classes with the Z-loss, at a cost that does not depend on D,\n"
      "and, for comparison, one with a softmax, at a cost that does.\n"
      "\n"
      "  --outputs D     this many classes only (10000, 100000 and 1000000, one after another)\n"
      "  --features N    numbers per hidden state (%td)\n"
      "  --steps N       of training              (%td)\n"
      "  --batch N       hidden states per step   (%td)\n"
      "  --memory N      GiB that the softmax's weights and their gradient may take (%g)\n"
      "  --seconds N     for the softmax: as many steps as that takes, but one at least (%g)\n"
      "\n"
      "Exit status: 0 if the loss fell everywhere, 1 if not, 2 if nothing could be trained.\n",
      defaults.features, defaults.steps, defaults.batch, defaults.memory, defaults.seconds);
}

options read_options(int argc, char** argv) {
  options result;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto number = [&](perdita::index most) {
      const std::string_view text = i + 1 < argc ? argv[++i] : "";
      perdita::index value = 0;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
      if (error != std::errc{} || end != text.data() + text.size() || value < 1 || value > most)
        throw std::runtime_error(std::string(argument) + ": expected a whole number from 1 to " +
                                 std::to_string(most) + ", got '" + std::string(text) + "'");
      return value;
    };
    if (argument == "--help" || argument == "-h")
      result.help = true;
    else if (argument == "--outputs")
      result.outputs = {number(100'000'000)};
    else if (argument == "--features")
      result.features = number(1 << 14);
    else if (argument == "--steps")
      result.steps = number(1'000'000);
    else if (argument == "--batch")
      result.batch = number(1 << 14);
    else if (argument == "--memory")
      result.memory = static_cast<double>(number(1 << 14));
    else if (argument == "--seconds")
      result.seconds = static_cast<double>(number(1 << 14));
    else
      throw std::runtime_error("unexpected '" + std::string(argument) +
                               "'; --help lists all options");
  }
  return result;
}

class task {
public:
  task(perdita::index outputs, perdita::index features, perdita::index batch)
      : labels(static_cast<std::size_t>(batch)), hidden(static_cast<std::size_t>(batch * features)),
        outputs_(outputs), features_(features) {}

  void draw() {
    for (std::size_t i = 0; i < labels.size(); ++i) {
      // The logarithm of the rank is uniform. A prime scatters the ranks.
      const double u = 0.5 * (1 + static_cast<double>(random_.symmetric()));
      const double rank = std::pow(static_cast<double>(outputs_) + 1, u) - 1;
      const auto k = std::min(static_cast<perdita::index>(rank), outputs_ - 1);
      labels[i] = k * 2654435761 % outputs_;
      generator code(static_cast<std::uint64_t>(labels[i]) * 0x632be59bd9b4e019u);
      const float length = 1 / std::sqrt(static_cast<float>(features_));
      for (std::size_t j = 0, n = static_cast<std::size_t>(features_); j < n; ++j)
        hidden[i * n + j] =
            length * ((code.symmetric() < 0 ? -1.0f : 1.0f) + 0.5f * random_.symmetric());
    }
  }

  std::vector<std::int64_t> labels;
  std::vector<float> hidden; ///< batch × features

private:
  perdita::index outputs_, features_;
  generator random_{1};
};

using clock_type = std::chrono::steady_clock;
double seconds_since(clock_type::time_point start) {
  return std::chrono::duration<double>(clock_type::now() - start).count();
}

/// Small random numbers: were all outputs alike, the Z-loss would have no gradient.
std::vector<float> some_weights(perdita::index n) {
  generator random(2);
  std::vector<float> w(static_cast<std::size_t>(n));
  for (float& x : w)
    x = 0.1f * random.symmetric();
  return w;
}

struct result {
  double first = 0, last = 0; ///< mean losses of the first and the last tenth of the steps
  double microseconds = 0;    ///< for an example: the lower quartile of the steps
  double preparation = 0;     ///< seconds
};

/// Interruptions only add time.
double lower_quartile(std::vector<double> v) {
  const auto at = v.begin() + static_cast<std::ptrdiff_t>(v.size() / 4);
  std::nth_element(v.begin(), at, v.end());
  return *at;
}

/// Only rows of the weights whose classes occur are ever touched.
result learn_implicitly(perdita::index outputs, const options& chosen) {
  const perdita::index features = chosen.features, batch = chosen.batch;
  task examples(outputs, features, batch);
  auto weights = some_weights(outputs * features);
  const auto start = clock_type::now();
  perdita::spherical_layer<float> layer(perdita::matrix_view(weights.data(), outputs, features));
  result r;
  r.preparation = seconds_since(start);
  weights = {};

  const perdita::z_loss<float> loss({.a = 0.5f, .b = 8, .reduction = perdita::reduction::sum});
  std::vector<float> d_hidden(examples.hidden.size());
  std::vector<double> losses, times;
  for (perdita::index step = 0; step < chosen.steps; ++step) {
    examples.draw();
    const auto begin = clock_type::now();
    const float value = layer.step(
        loss, perdita::matrix_view<const float>(examples.hidden.data(), batch, features),
        examples.labels, perdita::matrix_view(d_hidden.data(), batch, features), {.rate = 0.02});
    times.push_back(1e6 * seconds_since(begin) / static_cast<double>(batch));
    losses.push_back(static_cast<double>(value) / static_cast<double>(batch));
  }
  const std::size_t tenth = (losses.size() + 9) / 10;
  for (std::size_t i = 0; i < tenth; ++i) {
    r.first += losses[i] / static_cast<double>(tenth);
    r.last += losses[losses.size() - 1 - i] / static_cast<double>(tenth);
  }
  r.microseconds = lower_quartile(times);
  return r;
}

/// Microseconds for an example, where every weight has a gradient and moves.
double learn_explicitly(perdita::index outputs, const options& chosen) {
  const perdita::index features = chosen.features, batch = chosen.batch;
  task examples(outputs, features, batch);
  auto weights = some_weights(outputs * features);
  std::vector<float> d_weights(weights.size()), d_hidden(examples.hidden.size());
  const perdita::linear head(perdita::cross_entropy<float>({.reduction = perdita::reduction::sum}));
  perdita::workspace memory;
  constexpr std::size_t parts = 64; // of the weights, for the threads
  std::vector<double> times;
  const auto start = clock_type::now();
  for (int step = 0; step < 1 || seconds_since(start) < chosen.seconds; ++step) {
    examples.draw();
    const auto begin = clock_type::now();
    head(perdita::matrix_view<const float>(examples.hidden.data(), batch, features),
         perdita::matrix_view<const float>(weights.data(), outputs, features), examples.labels,
         perdita::matrix_view(d_hidden.data(), batch, features),
         perdita::matrix_view(d_weights.data(), outputs, features), {.memory = &memory});
    const auto descend = [&](std::size_t part) {
      const std::size_t n = weights.size(), first = n * part / parts, last = n * (part + 1) / parts;
      for (std::size_t k = first; k < last; ++k)
        weights[k] -= 0.5f * d_weights[k];
    };
    perdita::executor()(parts, descend);
    times.push_back(1e6 * seconds_since(begin) / static_cast<double>(batch));
  }
  return lower_quartile(times);
}

int main(int argc, char** argv) try {
  const options chosen = read_options(argc, argv);
  if (chosen.help) {
    print_usage();
    return 0;
  }
  std::printf("%td features, batches of %td\n\n", chosen.features, chosen.batch);
  std::printf("%9s  %11s  %18s  %14s  %14s  %8s\n", "classes", "preparation", "Z-loss",
              "us/example", "softmax us/ex.", "ratio");
  bool fell = true;
  for (const perdita::index outputs : chosen.outputs) {
    const result r = learn_implicitly(outputs, chosen);
    std::printf("%9td  %9.2f s  %7.3f -> %7.3f  %14.1f", outputs, r.preparation, r.first, r.last,
                r.microseconds);
    std::fflush(stdout);
    const double needed = 2 * sizeof(float) * static_cast<double>(outputs * chosen.features);
    if (needed <= chosen.memory * (1 << 30)) {
      const double softmax = learn_explicitly(outputs, chosen);
      std::printf("  %14.1f  %8.1f\n", softmax, softmax / r.microseconds);
    } else {
      std::printf("  %14s\n", "no memory");
    }
    fell = fell && r.last < r.first;
  }
  return fell ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "extreme_classes: %s\n", error.what());
  return 2;
}
