// SPDX-License-Identifier: MIT
#pragma once

/// The command line of examples/word_model.cpp.

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>

#include "whole_number.hpp"

#ifndef PERDITA_EXAMPLES_HEADERS
#define PERDITA_EXAMPLES_HEADERS "include/perdita"
#endif

struct options {
  std::string text; ///< a file or a directory
  std::string save; ///< a file to write, or none
  int epochs = 2, batch = 1024, dimension = 128, context = 4;
  std::uint64_t seed = 1;
  bool materialised = false, compare = false, help = false;
};

/// What is read where no other text is given.
inline std::string own_headers() {
  const std::string path = PERDITA_EXAMPLES_HEADERS;
  if (!std::filesystem::is_directory(path))
    throw std::runtime_error(path + ": the library's headers, which it reads where no other text "
                                    "is given, are not there");
  return path;
}

inline void print_usage() {
  const options defaults;
  std::printf(
      "usage: word_model [OPTION...] [TEXT]\n"
      "\n"
      "Trains a language model that guesses each word of a text from the words before it, with a\n"
      "softmax over all words that the text has. The last tenth of the text is held out; words\n"
      "that only this part has are one and the same, `unknown`.\n"
      "TEXT: a file, or a directory of which every file is read; by default\n"
      "%s\n"
      "\n"
      "  --epochs N      how often the text is read             (%d)\n"
      "  --batch N       positions in the text per step         (%d)\n"
      "  --dimension N   numbers per embedding and hidden state (%d)\n"
      "  --context N     words before, from which it guesses    (%d)\n"
      "  --seed N        of the random numbers                  (%d)\n"
      "  --materialised  hold the scores of a batch in memory, as one does without the head\n"
      "  --compare       a few steps both ways, side by side, and no more\n"
      "  --save FILE     write the trained last layer, with hidden states of the held-out words\n"
      "\n"
      "Exit status: 0 if the model guesses held-out words better than their frequencies do, 1 if\n"
      "not, 2 if it could not be trained.\n",
      PERDITA_EXAMPLES_HEADERS, defaults.epochs, defaults.batch, defaults.dimension,
      defaults.context, static_cast<int>(defaults.seed));
}

inline options read_options(int argc, char** argv) {
  options result;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto value = [&]() -> std::string_view {
      if (i + 1 == argc)
        throw std::runtime_error(std::string(argument) + ": expected a value after it");
      return argv[++i];
    };
    const auto number = [&](int most) { return whole_number(argument, value(), 1, most); };
    if (argument == "--help" || argument == "-h")
      result.help = true;
    else if (argument == "--epochs")
      result.epochs = number(1000);
    else if (argument == "--batch")
      result.batch = number(1 << 20);
    else if (argument == "--dimension")
      result.dimension = number(1 << 14);
    else if (argument == "--context")
      result.context = number(64);
    else if (argument == "--seed")
      result.seed = whole_number(argument, value(), std::uint64_t{0}, UINT64_MAX);
    else if (argument == "--materialised")
      result.materialised = true;
    else if (argument == "--compare")
      result.compare = true;
    else if (argument == "--save")
      result.save = value();
    else if (argument.starts_with('-') || !result.text.empty())
      throw std::runtime_error("unexpected '" + std::string(argument) +
                               "'; --help lists all options");
    else
      result.text = argument;
  }
  return result;
}
