// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI::core {

template <class N> PERDITA_NOINLINE std::string to_text(N value) {
  if constexpr (std::is_integral_v<N>) {
    return std::to_string(value);
  } else {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", static_cast<double>(value));
    return text;
  }
}

/// The one place where a call or a constructor gives up: std::invalid_argument, or, without
/// exceptions, PERDITA_ERROR_HANDLER(const char*) and then abort().
[[noreturn]] inline void fail(const std::string& message) {
#if PERDITA_HAS_EXCEPTIONS
  throw std::invalid_argument(message);
#else
#ifdef PERDITA_ERROR_HANDLER
  PERDITA_ERROR_HANDLER(message.c_str());
#else
  std::fprintf(stderr, "%s\n", message.c_str());
#endif
  std::abort();
#endif
}

/// "perdita::cross_entropy: label_smoothing is 1.5, expected a number in [0, 1]"
[[noreturn]] PERDITA_NOINLINE inline void fail(const char* loss, const std::string& argument,
                                               const std::string& got,
                                               const std::string& expected) {
  fail(std::string("perdita::") + loss + ": " + argument + " is " + got + ", expected " + expected);
}

/// Apart, so that no text is made where nothing fails.
template <class N>
[[noreturn]] PERDITA_NOINLINE void fail_with(const char* loss, const char* argument, N got,
                                             const char* expected) {
  fail(loss, argument, to_text(got), expected);
}
template <class N>
PERDITA_INLINE void require(bool holds, const char* loss, const char* argument, N got,
                            const char* expected) {
  if (!holds) [[unlikely]]
    fail_with(loss, argument, got, expected);
}

[[noreturn]] PERDITA_NOINLINE inline void fail_null(const char* loss, const char* argument) {
  fail(loss, argument, "null", "a pointer to memory");
}
/// An argument with so many elements must have them somewhere.
inline void require_memory(const char* loss, const char* argument, const void* data,
                           std::int64_t elements) {
  if (!data && elements > 0) [[unlikely]]
    fail_null(loss, argument);
}

/// An option that must be a finite number above 0.
template <class T> double positive(const char* loss, const char* option, T x) {
  require(x > 0 && std::isfinite(x), loss, option, x, "a finite number above 0");
  return static_cast<double>(x);
}
/// Whether x, as a T, can be multiplied by and divided by.
template <class T, class N> bool is_invertible(N x) {
  const T y = static_cast<T>(x);
  return x > 0 && std::isfinite(y) && std::isfinite(1 / y);
}
/// An option by which numbers of type T are divided.
template <class T, class N> double invertible(const char* loss, const char* option, N x) {
  require(is_invertible<T>(x), loss, option, x, "a finite number above 0 whose inverse is finite");
  return static_cast<double>(x);
}
/// An option that must be a finite number, 0 or more.
template <class T> double not_negative(const char* loss, const char* option, T x) {
  require(x >= 0 && std::isfinite(x), loss, option, x, "a finite number, 0 or more");
  return static_cast<double>(x);
}
/// An option that must be a finite number.
template <class T> double finite(const char* loss, const char* option, T x) {
  require(std::isfinite(x), loss, option, x, "a finite number");
  return static_cast<double>(x);
}

/// An option that must be one of its type's enumerators, the last of which is `last`.
template <class Enum>
void require_enumerator(const char* loss, const char* option, Enum x, Enum last,
                        const char* expected) {
  const auto number = static_cast<int>(x);
  require(number >= 0 && number <= static_cast<int>(last), loss, option, number, expected);
}

/// As fail(), of element `index` of the argument.
[[noreturn]] PERDITA_NOINLINE inline void fail_at(const char* loss, const char* argument,
                                                  std::int64_t index, const std::string& got,
                                                  const std::string& expected) {
  fail(loss, std::string(argument) + "[" + std::to_string(index) + "]", got, expected);
}

} // namespace perdita::inline PERDITA_ABI::core
