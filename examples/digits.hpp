// SPDX-License-Identifier: MIT
#pragma once

/// The digits of examples/digits.cpp.

#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include "generator.hpp"

// One sample per row. Perdita takes column-major matrices, Eigen's default, just as well; here a
// row is what gets shuffled, so it should lie in one piece.
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr int pixels = 64, classes = 10;

struct dataset {
  matrix images;
  Eigen::VectorXi labels;

  int size() const { return static_cast<int>(labels.size()); }
  void shuffle(generator& random) {
    for (int i = size() - 1; i > 0; --i) {
      const int j = random.below(i + 1);
      images.row(i).swap(images.row(j));
      std::swap(labels[i], labels[j]);
    }
  }
};

/// Lines of 64 pixels (0 to 16) and the digit, all whole numbers, with commas between them.
inline dataset read_digits(const std::string& path) {
  std::ifstream file(path);
  if (!file)
    throw std::runtime_error(path + ": " + std::strerror(errno));
  std::vector<float> values;
  std::vector<int> labels;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const char* at = line.data();
    const char* end = at + line.size();
    if (at < end && end[-1] == '\r')
      --end;
    for (int column = 1; column <= pixels + 1; ++column) {
      const int largest = column <= pixels ? 16 : classes - 1;
      int value = -1;
      at = std::from_chars(at, end, value).ptr;
      const bool ended = column <= pixels ? at < end && *at == ',' : at == end;
      if (value < 0 || value > largest || !ended)
        throw std::runtime_error(path + ":" + std::to_string(number) + ": column " +
                                 std::to_string(column) + " of " + std::to_string(pixels + 1) +
                                 " should be a whole number from 0 to " + std::to_string(largest));
      ++at;
      if (column <= pixels)
        values.push_back(static_cast<float>(value));
      else
        labels.push_back(value);
    }
  }
  if (!file.eof())
    throw std::runtime_error(path + ": cannot be read");
  if (labels.size() < 4)
    throw std::runtime_error(path + ": expected at least 4 lines, found " +
                             std::to_string(labels.size()));
  const auto rows = static_cast<Eigen::Index>(labels.size());
  return {Eigen::Map<matrix>(values.data(), rows, pixels),
          Eigen::Map<Eigen::VectorXi>(labels.data(), rows)};
}
