// SPDX-License-Identifier: MIT

// Cross-entropy against the limits of the machine.
//
//   sh bench/run                                   everything, with the peers and the figure
//   build/bench/bench/bench_cross_entropy --benchmark_filter='float/row/1024x32000'
//   PERDITA_BENCH_SECONDS=5 ...                    more samples for each benchmark
//
// A benchmark is named cross_entropy/STORAGE/LAYOUT/ROWSxCLASSES/MODE/threads:N, and its counters
// are
//
//   x_limit  time ÷ time of the traffic that cannot be avoided, over the same bytes, in turns with
//            the loss: for "value" a read by eight streams, for "gradient" (into a buffer of its
//            own) a copy, for "in_place" a scaling where the numbers lie. Copies of more than 4 MiB
//            are made by streaming stores, smaller ones by plain stores.
//   x_floor  time ÷ the longer of that and of the arithmetic: one exponential and one addition per
//            score, at the speed they have in the first-level cache. What x_limit means where a
//            problem fits the caches and arithmetic decides.
//   noise    median ÷ lower quartile of the samples, of the loss or of the traffic, whichever is
//            more: where this is far above 1.05 somebody else used the machine, and the ratios mean
//            little.
//
// Time and bytes_per_second (scores read plus gradient written) are those of the lower quartile.

#include <algorithm>
#include <cstdint>
#include <string>
#include <variant>

#include <benchmark/benchmark.h>

#include <perdita/cross_entropy.hpp>

#include "support/limits.hpp"
#include "support/memory.hpp"
#include "support/most_threads.hpp"
#include "support/pool.hpp"
#include "support/problem.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

enum class mode { value, gradient, in_place };
constexpr const char* mode_name(mode m) {
  return m == mode::value ? "value" : m == mode::gradient ? "gradient" : "in_place";
}

float* floats(std::byte* p) { return reinterpret_cast<float*>(p); }

/// As the library has it: results that fit the caches are better kept there.
bool streams(double bytes) { return bytes > double{4 << 20}; }

void copy_in(const pool& pool, const std::byte* from, std::byte* to, double bytes) {
  const auto* source = reinterpret_cast<const float*>(from);
  on_parts(pool, static_cast<std::size_t>(bytes) / sizeof(float),
           [&](std::size_t i, std::size_t n) {
             if (streams(bytes))
               copy<stores::streaming>(source + i, floats(to) + i, n);
             else
               copy<stores::plain>(source + i, floats(to) + i, n);
           });
}

/// The least traffic that `m` implies, in the buffers that it uses.
void limit(const pool& pool, mode m, double bytes) {
  const buffers& b = memory();
  const std::size_t n = static_cast<std::size_t>(bytes) / sizeof(float);
  if (m == mode::value)
    on_parts(pool, n,
             [&](std::size_t i, std::size_t count) { read<8>(floats(b.logits()) + i, count); });
  else if (m == mode::gradient)
    copy_in(pool, b.logits(), b.gradient(), bytes);
  else
    on_parts(pool, n, [&](std::size_t i, std::size_t count) {
      scale(floats(b.in_place()) + i, count, 1.0F);
    });
}

/// Every thread of the pool computes exponentials.
void compute_exponentials(const pool& pool) {
  const auto task = [](std::size_t) { exponentials::run(normal_variates().data(), 8); };
  pool(pool.concurrency(), task);
}

template <class S> class evaluation {
public:
  evaluation(const problem<S>& p, mode m, const pool& pool) : problem_(p), mode_(m), pool_(pool) {
    call_.run_on = pool;
    call_.memory = &workspace_;
  }
  void prepare() {
    if (mode_ == mode::in_place) // both the limit and the loss find what this leaves in the caches
      copy_in(pool_, reinterpret_cast<const std::byte*>(problem_.scores().data),
              memory().in_place(), problem_.bytes());
    pool_.wake();
  }
  void run() {
    const auto& p = problem_;
    value_ = mode_ == mode::value      ? loss_(p.scores(), p.labels(), call_)
             : mode_ == mode::gradient ? loss_(p.scores(), p.labels(), p.gradient(), call_)
                                       : loss_(p.in_place(), p.labels(), p.in_place(), call_);
  }
  /// nullptr, or what is wrong with the result of run().
  const char* complaint() const {
    const auto& p = problem_;
    if (!p.right(static_cast<double>(value_)))
      return "the loss is not that of the reference";
    if (mode_ != mode::value && !p.right(mode_ == mode::gradient ? p.gradient() : p.in_place()))
      return "the gradient is not that of the reference";
    return nullptr;
  }

private:
  const problem<S>& problem_;
  mode mode_;
  const pool& pool_;
  perdita::cross_entropy<float> loss_;
  perdita::workspace workspace_;
  perdita::call_options<float> call_;
  float value_ = 0;
};

template <class S>
void against_limits(benchmark::State& state, shape size, layout order, mode m, std::size_t n) {
  const problem<S>& p = use_problem<S>(size, order);
  const pool& pool = threads(n);
  evaluation<S> subject(p, m, pool);
  subject.prepare();
  subject.run();
  if (const char* complaint = subject.complaint()) {
    state.SkipWithError(complaint);
    return;
  }
  const auto prepare = [&] { subject.prepare(); };
  contestant loss([&] { subject.run(); }, prepare);
  contestant traffic([&] { limit(pool, m, p.bytes()); }, prepare);
  contestant arithmetic([&] { compute_exponentials(pool); }, [&] { pool.wake(); });
  const double moved = m == mode::value ? p.bytes() : 2 * p.bytes();
  for (auto _ : state) {
    compete({&loss, &traffic, &arithmetic});
    state.SetIterationTime(loss.seconds());
  }
  const double floor = arithmetic.seconds() * static_cast<double>(p.elements()) /
                       static_cast<double>(exponentials::count * pool.concurrency());
  state.counters["x_limit"] = loss.seconds() / traffic.seconds();
  state.counters["x_floor"] = loss.seconds() / std::max(traffic.seconds(), floor);
  state.counters["noise"] = std::max(loss.noise(), traffic.noise());
  state.counters["samples"] = static_cast<double>(loss.samples());
  state.SetBytesProcessed(static_cast<std::int64_t>(moved));
}

/// How much slower rows are whose scores spread by sigma than rows whose scores spread by 1.
void against_narrow_rows(benchmark::State& state, float sigma, mode m, std::size_t n) {
  current_problem() = std::monostate(); // its buffer is used here
  const shape size{256, 32000};
  const problem<float> narrow(size, layout::row_major, 1, memory().logits());
  const problem<float> wide(size, layout::row_major, sigma,
                            memory().logits() + static_cast<std::size_t>(narrow.bytes()));
  evaluation<float> a(narrow, m, threads(n)), b(wide, m, threads(n));
  for (evaluation<float>* e : {&a, &b}) {
    e->prepare();
    e->run();
    if (const char* complaint = e->complaint()) {
      state.SkipWithError(complaint);
      return;
    }
  }
  contestant one([&] { a.run(); }, [&] { a.prepare(); });
  contestant other([&] { b.run(); }, [&] { b.prepare(); });
  for (auto _ : state) {
    compete({&one, &other});
    state.SetIterationTime(other.seconds());
  }
  state.counters["x_narrow"] = other.seconds() / one.seconds();
  state.counters["noise"] = std::max(one.noise(), other.noise());
}

/// A limit by itself, in bytes (or operations) per second, over `bytes` per thread.
template <class F>
void report_limit(const std::string& what, double bytes, std::size_t n, double work, const F& f) {
  const std::string size =
      bytes >= 1 << 20 ? std::to_string(static_cast<int>(bytes) >> 20) + "MiB/" : "";
  const std::string full = "limit/" + what + "/" + size + "threads:" + std::to_string(n);
  benchmark::RegisterBenchmark(
      full.c_str(),
      [=](benchmark::State& state) {
        const pool& pool = threads(n);
        const auto part = static_cast<std::size_t>(bytes) / sizeof(float);
        current_problem() = std::monostate();
        fill(floats(memory().logits()), static_cast<perdita::index>(n * part), 1);
        fill(floats(memory().in_place()), static_cast<perdita::index>(n * part), 1);
        const auto task = [&](std::size_t i) { f(i * part, part); };
        contestant c([&] { pool(n, task); }, [&] { pool.wake(); });
        for (auto _ : state) {
          compete({&c});
          state.SetIterationTime(c.seconds());
        }
        state.counters["per_second"] =
            benchmark::Counter(work * static_cast<double>(n) / c.seconds());
        state.counters["noise"] = c.noise();
      })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

void register_limits(std::size_t n) {
  // The parts of all threads lie in one buffer: whole MiB of it.
  const double most = static_cast<double>(largest_problem / n >> 20 << 20);
  double last = 0;
  for (const double wanted : {double{1 << 20}, double{16 << 20}, double{60 << 20}}) {
    const double bytes = std::min(wanted, most);
    if (bytes == last)
      continue;
    last = bytes;
    const auto traffic = [&](const char* what, double passes, const auto& f) {
      report_limit(what, bytes, n, passes * bytes, [=](std::size_t i, std::size_t count) {
        const buffers& b = memory();
        f(floats(b.logits()) + i, floats(b.gradient()) + i, floats(b.in_place()) + i, count);
      });
    };
    using in = const float*;
    using out = float*;
    using size = std::size_t;
    traffic("read_1_stream", 1, [](in x, out, out, size c) { read<1>(x, c); });
    traffic("read_4_streams", 1, [](in x, out, out, size c) { read<4>(x, c); });
    traffic("read_8_streams", 1, [](in x, out, out, size c) { read<8>(x, c); });
    traffic("copy_plain", 2, [](in x, out y, out, size c) { copy<stores::plain>(x, y, c); });
    traffic("copy_streaming", 2,
            [](in x, out y, out, size c) { copy<stores::streaming>(x, y, c); });
    traffic("scale_in_place", 2, [](in, out, out x, size c) { scale(x, c, 1.0F); });
  }
  report_limit("exponentials", 0, n, double{exponentials::count},
               [](std::size_t, std::size_t) { exponentials::run(normal_variates().data(), 8); });
  report_limit("float_operations", 0, n, 2 * double{multiply_adds::count},
               [](std::size_t, std::size_t) { multiply_adds::run(); });
}

template <class F> void add(const std::string& full, const F& f) {
  benchmark::RegisterBenchmark(full.c_str(), f)
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}

template <class S> void register_cross_entropy(std::size_t most_threads) {
  // The innermost loops share one problem, which is expensive to make and to solve in double.
  for (const layout order : {layout::row_major, layout::column_major})
    for (const shape size : shapes)
      for (const mode m : {mode::value, mode::gradient, mode::in_place})
        for (std::size_t n = 1; n <= most_threads; ++n)
          add(std::string("cross_entropy/") + storage_name<S>() + "/" + name(order) + "/" +
                  size.name() + "/" + mode_name(m) + "/threads:" + std::to_string(n),
              [=](benchmark::State& state) { against_limits<S>(state, size, order, m, n); });
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  const std::size_t most_threads = bench::most_threads(bench::processors().size());
  for (std::size_t n = 1; n <= most_threads; ++n)
    bench::register_limits(n);
  bench::register_cross_entropy<float>(most_threads);
  bench::register_cross_entropy<bench::bfloat16>(most_threads);
  for (const float sigma : {1.0F, 20.0F, 500.0F})
    for (const auto m : {bench::mode::value, bench::mode::gradient, bench::mode::in_place})
      bench::add("spread/256x32000/sigma:" + std::to_string(static_cast<int>(sigma)) + "/" +
                     bench::mode_name(m) + "/threads:1",
                 [=](benchmark::State& s) { bench::against_narrow_rows(s, sigma, m, 1); });
  benchmark::AddCustomContext("loss", "perdita::cross_entropy<float>");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
