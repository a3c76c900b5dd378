// SPDX-License-Identifier: MIT

// Every loss of one prediction and one target, value and gradient, against the memory's limit.
//
//   build/bench/bench/bench_element                              all, and a table of them
//   build/bench/bench/bench_element --benchmark_filter='element/mse/'
//
// A benchmark is named element/LOSS/threads:N. Its counter x_limit is time ÷ time of copying, by
// streaming stores, as many bytes as the loss reads and writes, in turns with it: 12 an element
// (prediction, target and slope), of gaussian_nll 20. Two reads and a write are a little faster
// than a read and a write for each: what does nothing but wait for memory may be below 1. `noise`
// is as in bench_cross_entropy. The table at the end has these ratios.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <perdita/element.hpp>
#include <perdita/margin.hpp>

#include "support/limits.hpp"
#include "support/memory.hpp"
#include "support/most_threads.hpp"
#include "support/pool.hpp"
#include "support/problem.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

constexpr std::size_t elements = std::size_t{1} << 24; // 64 MiB of each: in no cache

/// Predictions, targets, variances, and two gradients, with the distances of buffers.
class vectors {
public:
  enum which { predictions, targets, variances, gradient, other_gradient, count };

  vectors() {
    fill(data(predictions), static_cast<index>(elements), 1);
    fill(data(variances), static_cast<index>(elements), 1);
    for (std::size_t i = 0; i < elements; ++i)
      data(variances)[i] = 0.5F + std::abs(data(variances)[i]);
  }
  float* data(which w) const {
    return reinterpret_cast<float*>(memory_.data() + static_cast<std::size_t>(w) * distance);
  }
  perdita::vector_view<const float> in(which w) const {
    return {data(w), static_cast<index>(elements)};
  }
  perdita::vector_view<float> out(which w) const { return {data(w), static_cast<index>(elements)}; }

  /// Makes each target what f makes of a normal variate.
  template <class F> void set_targets(const F& f) const {
    const auto& values = normal_variates();
    for (std::size_t i = 0; i < elements; ++i)
      data(targets)[i] = f(values[(7 * i + 3) % values.size()]);
  }
  /// Reads and writes as many bytes as `used` of the vectors have; only gradients are written.
  void copy_bytes(const pool& pool, std::size_t used) const {
    const std::size_t half = elements / 2;
    for (std::size_t i = 0; i < used; ++i) // half a vector is read, half a vector is written
      on_parts(pool, half, [&](std::size_t first, std::size_t n) {
        const float* from = data(static_cast<which>(i / 2)) + i % 2 * half + first;
        float* to = data(i / 2 % 2 == 0 ? gradient : other_gradient) + i % 2 * half + first;
        copy<stores::streaming>(from, to, n);
      });
  }

private:
  static constexpr std::size_t distance = sizeof(float) * elements + huge_memory::page + 33 * 64;
  huge_memory memory_{count * distance};
};

const vectors& data() {
  static const vectors v;
  return v;
}

/// What targets a loss has.
enum class kind { any, positive, sign, share };

void use_targets(kind k) {
  static kind current = kind(-1);
  if (k == current)
    return;
  current = k;
  data().set_targets([=](float x) {
    return k == kind::any        ? x
           : k == kind::positive ? 0.1F + std::abs(x)
           : k == kind::sign     ? (x < 0 ? -1.0F : 1.0F)
                                 : (x < 0 ? 0.0F : 1.0F);
  });
}

/// Calls a loss of predictions and targets, or of variances too.
template <class Loss> constexpr bool has_variances = false;
template <> constexpr bool has_variances<perdita::gaussian_nll<float>> = true;

template <class Loss, class In, class Out>
float evaluate(const Loss& loss, const In& in, const Out& out,
               const perdita::element_options<float>& call) {
  using v = vectors;
  if constexpr (has_variances<Loss>)
    return loss(in(v::predictions), in(v::targets), in(v::variances), out(v::gradient),
                out(v::other_gradient), call);
  else
    return loss(in(v::predictions), in(v::targets), out(v::gradient), call);
}

/// Whether the value is finite and sampled slopes are those of their elements alone.
template <class Loss> bool plausible(const Loss& loss, float value) {
  using v = vectors;
  constexpr index one = 1;
  for (std::size_t i = 0; i < elements; i += elements / 61) {
    float slopes[2] = {};
    evaluate(
        loss,
        [&](v::which w) { return perdita::vector_view<const float>(data().data(w) + i, one); },
        [&](v::which w) {
          return perdita::vector_view<float>(slopes + (w == v::gradient ? 0 : 1), one);
        },
        {.normaliser = double{elements}, .run_on = perdita::serial});
    if (slopes[0] != data().data(v::gradient)[i] ||
        (has_variances<Loss> && slopes[1] != data().data(v::other_gradient)[i]))
      return false;
  }
  return std::isfinite(value);
}

/// Ratios by loss and number of threads, of what was run.
std::vector<std::pair<std::string, std::map<std::size_t, double>>>& table() {
  static std::vector<std::pair<std::string, std::map<std::size_t, double>>> ratios;
  return ratios;
}

template <class Loss>
void against_copy(benchmark::State& state, const std::string& name, const Loss& loss, kind targets,
                  std::size_t n) {
  using v = vectors;
  use_targets(targets);
  const pool& pool = threads(n);
  perdita::workspace memory;
  perdita::element_options<float> call;
  call.run_on = pool;
  call.memory = &memory;
  float value = 0;
  const auto run = [&] {
    value = evaluate(
        loss, [](v::which w) { return data().in(w); }, [](v::which w) { return data().out(w); },
        call);
  };
  run();
  if (!plausible(loss, value)) {
    state.SkipWithError("the value is not finite, or slopes are not those of elements alone");
    return;
  }
  const std::size_t used = has_variances<Loss> ? 5 : 3;
  contestant subject(run, [&] { pool.wake(); });
  contestant limit([&] { data().copy_bytes(pool, used); }, [&] { pool.wake(); });
  for (auto _ : state) {
    compete({&subject, &limit});
    state.SetIterationTime(subject.seconds());
  }
  const double ratio = subject.seconds() / limit.seconds();
  state.counters["x_limit"] = ratio;
  state.counters["noise"] = std::max(subject.noise(), limit.noise());
  state.SetBytesProcessed(static_cast<std::int64_t>(used * elements * sizeof(float)));
  if (table().empty() || table().back().first != name)
    table().push_back({name, {}});
  table().back().second[n] = ratio;
}

template <class Loss> void add(const Loss& loss, kind targets, std::size_t most) {
  for (std::size_t n = 1; n <= most; ++n)
    benchmark::RegisterBenchmark(
        (std::string("element/") + Loss::name + "/threads:" + std::to_string(n)).c_str(),
        [=](benchmark::State& s) { against_copy(s, Loss::name, loss, targets, n); })
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
}

void register_all(std::size_t most) {
  using namespace perdita;
  add(l1<float>(), kind::any, most);
  add(mse<float>(), kind::any, most);
  add(smooth_l1<float>(), kind::any, most);
  add(huber<float>(), kind::any, most);
  add(pseudo_huber<float>(), kind::any, most);
  add(log_cosh<float>(), kind::any, most);
  add(quantile<float>(), kind::any, most);
  add(expectile<float>(), kind::any, most);
  add(cauchy<float>(), kind::any, most);
  add(tukey_biweight<float>(), kind::any, most);
  add(geman_mcclure<float>(), kind::any, most);
  add(gaussian_nll<float>(), kind::any, most);
  add(poisson_nll<float>(), kind::positive, most);
  add(gamma_nll<float>(), kind::positive, most);
  add(tweedie_nll<float>(), kind::positive, most);
  add(logistic<float>(), kind::sign, most);
  add(hinge<float>(), kind::sign, most);
  add(squared_hinge<float>(), kind::sign, most);
  add(smoothed_hinge<float>(), kind::sign, most);
  add(exponential<float>(), kind::sign, most);
  add(square_margin<float>(), kind::sign, most);
  add(modified_huber<float>(), kind::sign, most);
  add(savage<float>(), kind::sign, most);
  add(tangent<float>(), kind::sign, most);
  add(unhinged<float>(), kind::sign, most);
  add(bce_logits<float>(), kind::share, most);
}

void print_table() {
  std::set<std::size_t> columns; // numbers of threads
  for (const auto& [name, ratios] : table())
    for (const auto& [n, ratio] : ratios)
      columns.insert(n);
  std::printf("\nvalue and gradient: time / time of copying as many bytes\n%-16s", "");
  for (const std::size_t n : columns)
    std::printf(" threads:%zu", n);
  std::printf("\n");
  for (const auto& [name, ratios] : table()) {
    std::printf("%-16s", name.c_str());
    for (const std::size_t n : columns)
      if (const auto found = ratios.find(n); found != ratios.end())
        std::printf(" %9.2f", found->second);
      else
        std::printf(" %9s", "");
    std::printf("\n");
  }
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  const std::size_t most = bench::most_threads(bench::processors().size());
  bench::register_all(most);
  benchmark::RunSpecifiedBenchmarks();
  bench::print_table();
  benchmark::Shutdown();
}
