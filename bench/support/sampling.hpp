// SPDX-License-Identifier: MIT
#pragma once

/// How times are taken on a machine that is not ours alone: whatever is compared takes turns within
/// one benchmark, and what is reported is the lower quartile of each (interruptions only add time)
/// and the ratios of these quartiles.
///
/// PERDITA_BENCH_SECONDS, 1 by default, is the time given to each benchmark.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace bench {

inline double seconds_per_benchmark() {
  static const double seconds = [] {
    const char* text = std::getenv("PERDITA_BENCH_SECONDS");
    return text ? std::strtod(text, nullptr) : 1.0;
  }();
  return seconds;
}

/// Something to be timed: `prepare` restores, untimed, what `run` destroys.
class contestant {
public:
  explicit contestant(
      std::function<void()> run, std::function<void()> prepare = [] {})
      : run_(std::move(run)), prepare_(std::move(prepare)) {}

  void take_turn(bool timed = true) {
    using clock = std::chrono::steady_clock;
    prepare_();
    const auto start = clock::now();
    run_();
    const std::chrono::duration<double> elapsed = clock::now() - start;
    if (timed)
      samples_.push_back(elapsed.count());
  }

  /// A turn that was timed elsewhere.
  void add_sample(double seconds) { samples_.push_back(seconds); }

  /// The fraction q of the samples is faster than this, in seconds.
  double quantile(double q) const {
    std::vector<double> sorted = samples_;
    std::sort(sorted.begin(), sorted.end());
    return sorted[static_cast<std::size_t>(q * static_cast<double>(sorted.size() - 1))];
  }
  double seconds() const { return quantile(0.25); }
  /// How much slower the median is than the lower quartile: above about 1.05, do not believe.
  double noise() const { return quantile(0.5) / seconds(); }
  std::size_t samples() const { return samples_.size(); }

private:
  std::function<void()> run_, prepare_;
  std::vector<double> samples_;
};

/// How often contestants take turns: until the time is over, but neither less nor more than this.
struct rounds {
  std::size_t least = 15, most = 2000;
  double seconds = seconds_per_benchmark();
  bool warm = false; ///< everything has just been run: no turn is thrown away
};

/// Times all, in turns: forwards, then backwards, so that each follows each equally often.
inline void compete(std::vector<contestant*> all, const rounds& wanted = {}) {
  using clock = std::chrono::steady_clock;
  if (!wanted.warm)
    for (contestant* c : all)
      c->take_turn(false);
  const std::size_t taken = all.empty() ? 0 : all.front()->samples();
  const std::size_t least = wanted.least - std::min(wanted.least, taken), most = wanted.most;
  const auto end = clock::now() + std::chrono::duration<double>(wanted.seconds);
  for (std::size_t n = 0; n < least || (n < most && clock::now() < end); ++n) {
    for (contestant* c : all)
      c->take_turn();
    std::reverse(all.begin(), all.end());
  }
}

} // namespace bench
