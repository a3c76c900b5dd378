// SPDX-License-Identifier: MIT
#pragma once

/// How much memory something needs while it runs, as the system sees it.

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bench {

/// A line of /proc/self/status, in bytes; -1 where there is none.
inline double memory_status(const char* key) {
  double result = -1;
  if (std::FILE* file = std::fopen("/proc/self/status", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, file))
      if (std::strncmp(line, key, std::strlen(key)) == 0)
        result = 1024 * std::strtod(line + std::strlen(key) + 1, nullptr);
    std::fclose(file);
  }
  return result;
}

/// By how much f() makes the peak of the resident memory grow; -1 where the system does not say.
template <class F> double growth_of_peak(const F& f) {
  const double before = memory_status("VmRSS");
  std::FILE* peak = std::fopen("/proc/self/clear_refs", "w");
  const bool reset = peak && std::fputs("5", peak) >= 0;
  if (peak)
    std::fclose(peak);
  f();
  const double after = memory_status("VmHWM");
  return reset && before >= 0 && after >= 0 ? after - before : -1;
}

} // namespace bench
