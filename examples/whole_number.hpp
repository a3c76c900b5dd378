// SPDX-License-Identifier: MIT
#pragma once

/// Numbers on the examples' command lines.

#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

/// A whole number from least to most, or an error that names the option.
template <class T> T whole_number(std::string_view option, std::string_view text, T least, T most) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < least || value > most)
    throw std::runtime_error(std::string(option) + ": expected a whole number from " +
                             std::to_string(least) + " to " + std::to_string(most) + ", got '" +
                             std::string(text) + "'");
  return value;
}
