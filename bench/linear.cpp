// SPDX-License-Identifier: MIT

// The linear head against the multiply-add units of the machine, and against the same loss by way
// of all scores.
//
//   sh bench/run                                      everything, with the peers and the figures
//   build/bench/bench/bench_linear --benchmark_filter='linear/float/1024x1024x32768/.*threads:2'
//   PERDITA_BENCH_LARGE=1 ...    with what takes minutes: 8192x2304x256000, and 2048x2304x256000 on
//                                one thread
//   PERDITA_BENCH_HEAD=FILE ...  filter/file/...: a trained head (the format is in
//                                support/linear_problem.hpp)
//
// linear/STORAGE/ROWSxFEATURESxCLASSES/MODE/threads:N, MODE being "value", "roomy" (value and
// gradients, no score computed twice) or "tight" (the scores of one piece per thread held). The
// three, what they are compared with and the peak take turns; the counters are
//
//   x_peak          useful operations per second (2 N D V for value, 6 for roomy, 8 for tight) ÷
//                   those of multiply-adds in registers, by as many threads
//   x_materialised  time of making all scores, of cross-entropy in place, and of two more products,
//                   all from the library's blocks of products ÷ ours
//   x_eigen         the same with Eigen's products ÷ ours
//   scratch_bytes   of the workspace
//   extra_bytes     growth of the peak of the resident memory during the first call
//   samples, noise  how many turns; median ÷ lower quartile of ours
//
// x_float, for bfloat16 hidden states and weights: time ÷ that with floats. Built for a target with
// AMX (-march=sapphirerapids), products of bfloat16 are made by its tiles; with PERDITA_TILES=1 and
// without AMX, by AVX512-BF16.
//
// filter/DATA/MODE/RULE/threads:N: value and gradients with gradient filtering. x_unfiltered is
// time ÷ time without; error_hidden and error_weights ‖Δ‖ ÷ ‖·‖ of the gradients; live the share of
// the entries that are not dropped; dropped the share of their mass that is, of all rows together;
// bound the largest ‖Δ∂X_i‖ ÷ (what row i dropped · max ‖W_j‖), which must not be above 1.
//
// map/ROWSxFEATURESxCLASSES/threads:N: time of each way ÷ time of the best of them.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <perdita/cross_entropy.hpp>
#include <perdita/linear.hpp>

#include "support/limits.hpp"
#include "support/linear_problem.hpp"
#include "support/openmp_threads.hpp"
#include "support/pipelines.hpp"
#include "support/resident.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

using head = perdita::linear<perdita::cross_entropy<float>>;

constexpr head_shape large{8192, 2304, 256000};
constexpr head_shape named[] = {{1024, 1024, 32768}, {4096, 512, 50257}, {2048, 2304, 256000}};

bool large_wanted() { return std::getenv("PERDITA_BENCH_LARGE") != nullptr; }

enum class mode { value, roomy, tight };
constexpr mode modes[] = {mode::value, mode::roomy, mode::tight};
const char* name(mode m) {
  return m == mode::value ? "value" : m == mode::roomy ? "roomy" : "tight";
}
double products(mode m) { return m == mode::value ? 1 : m == mode::roomy ? 3 : 4; }

/// One piece of scores for each thread.
perdita::linear_options options(mode m, head_shape size, std::size_t threads) {
  using pieces = perdita::core::linear_shape<float>;
  const index rows = std::min(pieces::columns, size.rows);
  const auto piece = static_cast<std::size_t>(pieces{size.classes}.slot(rows)) * sizeof(float);
  return {.budget = m == mode::tight ? threads * piece : 0};
}

template <class F> double seconds_of(const F& f) {
  contestant once([&] { f(); });
  once.take_turn();
  return once.seconds();
}

/// A call of the head on matrices of S.
template <class S = float> class evaluation {
public:
  evaluation(const linear_problem& p, mode m, const perdita::linear_options& o,
             const perdita::executor& run_on, const S* hidden, const S* weights)
      : problem_(p), mode_(m), head_(perdita::cross_entropy<float>{}, o),
        hidden_(hidden, p.size.rows, p.size.features),
        weights_(weights, p.size.classes, p.size.features),
        log_sum_exp_(static_cast<std::size_t>(p.size.rows)) {
    call_.run_on = run_on;
    call_.memory = &workspace_;
  }
  evaluation(const linear_problem& p, mode m, const perdita::linear_options& o,
             const perdita::executor& run_on)
      : evaluation(p, m, o, run_on, p.hidden.data(), p.weights.data()) {}
  evaluation(const evaluation&) = delete;
  evaluation& operator=(const evaluation&) = delete;

  void run() { value_ = run_with(call_); }
  /// The first call, by which the others are judged; nullptr, or what is wrong.
  const char* check(double tolerance = 1e-4) {
    auto call = call_;
    call.log_sum_exp = log_sum_exp_;
    extra_bytes_ =
        growth_of_peak([&] { first_seconds_ = seconds_of([&] { value_ = run_with(call); }); });
    if (tolerance < 1e-3 && !problem_.right(log_sum_exp_))
      return "a row's log-sum-exp is not that of the reference";
    if (tolerance < 1e-3 && !problem_.right(static_cast<double>(value_), log_sum_exp_))
      return "the loss is not that of the reference";
    if (mode_ != mode::value && !problem_.gradients_right(log_sum_exp_, tolerance))
      return "a gradient is not that of the reference";
    return nullptr;
  }
  const std::vector<float>& log_sum_exp() const { return log_sum_exp_; }
  double scratch_bytes() const { return static_cast<double>(workspace_.size()); }
  double extra_bytes() const { return extra_bytes_; }
  double first_seconds() const { return first_seconds_; }

private:
  float run_with(const perdita::call_options<float>& call) const {
    const auto& p = problem_;
    const auto with = [&](const auto& weights, const auto& d_weights) {
      return mode_ == mode::value
                 ? head_(hidden_, weights, p.labels, call)
                 : head_(hidden_, weights, p.labels, p.d_hidden.view(), d_weights, call);
    };
    auto w = weights_;
    auto b = perdita::vector_view<const float>(p.bias);
    return b.size == 0 ? with(w, p.d_weights.view())
                       : with(perdita::affine(w, b), p.d_weights.view());
  }

  const linear_problem& problem_;
  mode mode_;
  head head_;
  matrix_view<const S> hidden_, weights_;
  perdita::workspace workspace_;
  perdita::call_options<float> call_;
  std::vector<float> log_sum_exp_;
  float value_ = 0;
  double extra_bytes_ = -1, first_seconds_ = 0;
};

/// The problem at hand: only one is kept, because they may be large.
const linear_problem& use_linear_problem(head_shape size, scores kind) {
  static std::optional<linear_problem> current;
  static scores current_kind;
  if (!current || !(current->size == size) || current_kind != kind) {
    current.reset();
    current.emplace(size, kind);
    current_kind = kind;
  }
  return *current;
}

double bytes(index rows, index cols) {
  return sizeof(float) * static_cast<double>(rows) * static_cast<double>(cols);
}
double bytes_of_problem(head_shape s) {
  return 2 * (bytes(s.rows, s.features) + bytes(s.classes, s.features));
}

double available_memory() {
  double result = 1e300;
  if (std::FILE* file = std::fopen("/proc/meminfo", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, file))
      if (std::strncmp(line, "MemAvailable:", 13) == 0)
        result = 1024 * std::strtod(line + 13, nullptr);
    std::fclose(file);
  }
  return result;
}

// ---- named shapes

/// What the turns of one shape on some threads gave.
struct measured {
  struct way {
    double seconds = 0, noise = 0, samples = 0, scratch = 0, extra = 0;
    double materialised = 0, eigen = 0; // seconds; 0: no memory for it
  };
  std::map<mode, way> ways;
  double peak = 0; // operations per second
  std::string complaint;
};

measured measure(head_shape size, std::size_t n) {
  measured result;
  if (available_memory() < 1.05 * bytes_of_problem(size) + (1 << 28)) {
    result.complaint = "no memory for the problem";
    return result;
  }
  const linear_problem& p = use_linear_problem(size, scores::random);
  const perdita::executor run_on = use_openmp_threads(n);
  perdita::call_options<float> call;
  call.run_on = run_on;
  const block_products blocks(run_on);
  const eigen_products eigen(run_on);

  std::vector<std::unique_ptr<evaluation<>>> ours;
  std::vector<std::pair<std::string, contestant>> all;
  std::vector<double> first; // the time of each one's first run
  all.reserve(8);
  for (const mode m : modes) {
    ours.push_back(std::make_unique<evaluation<>>(p, m, options(m, size, n), run_on));
    if (const char* complaint = ours.back()->check()) {
      result.complaint = std::string(name(m)) + ": " + complaint;
      return result;
    }
    all.emplace_back(name(m), contestant([&e = *ours.back()] { e.run(); }));
    first.push_back(ours.back()->first_seconds());
  }
  const std::vector<float>& log_sum_exp = ours[0]->log_sum_exp();
  std::optional<matrix> scores;
  if (available_memory() > 1.05 * bytes(size.rows, size.classes) + (1 << 28))
    scores.emplace(size.rows, size.classes);
  const auto add = [&](const char* which, const auto& with) {
    for (const bool gradient : {false, true}) {
      const auto run = [&p, &with, &scores, gradient, &call] {
        return materialise(with, p, *scores, gradient, call);
      };
      float value = 0;
      first.push_back(seconds_of([&] { value = run(); }));
      if (!p.right(static_cast<double>(value), log_sum_exp) ||
          (gradient && !p.gradients_right(log_sum_exp)))
        result.complaint = std::string(which) + ": the result is not that of the reference";
      all.emplace_back(std::string(which) + (gradient ? "_gradient" : "_value"),
                       contestant([run] { benchmark::DoNotOptimize(run()); }));
    }
  };
  if (scores) {
    add("materialised", blocks);
    add("eigen", eigen);
  }
  all.emplace_back("peak", contestant([&] { peak::run(run_on); }));
  first.push_back(seconds_of([&] { peak::run(run_on); }));
  if (!result.complaint.empty())
    return result;

  std::vector<contestant*> turns;
  for (auto& [what, c] : all)
    turns.push_back(&c);
  if (*std::min_element(first.begin(), first.end() - 1) > 5) // nothing warm about the others, then
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i].second.add_sample(first[i]);
  compete(turns, {.least = 2, .seconds = 10 * seconds_per_benchmark(), .warm = true});

  std::map<std::string, double> seconds;
  for (const auto& [what, c] : all)
    seconds[what] = c.seconds();
  result.peak = peak::operations(n) / seconds["peak"];
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const contestant& c = all[i].second;
    const char* suffix = modes[i] == mode::value ? "_value" : "_gradient";
    result.ways[modes[i]] = {c.seconds(),
                             c.noise(),
                             static_cast<double>(c.samples()),
                             ours[i]->scratch_bytes(),
                             ours[i]->extra_bytes(),
                             seconds[std::string("materialised") + suffix],
                             seconds[std::string("eigen") + suffix]};
  }
  return result;
}

/// One mode of what measure() says, which is asked once for all modes.
void report(benchmark::State& state, head_shape size, mode m, std::size_t n) {
  static std::map<std::string, measured> known;
  const std::string key = size.name() + "/" + std::to_string(n);
  if (!known.count(key))
    known[key] = measure(size, n);
  const measured& all = known[key];
  if (!all.complaint.empty()) {
    state.SkipWithError(all.complaint.c_str());
    return;
  }
  const measured::way& way = all.ways.at(m);
  for (auto _ : state)
    state.SetIterationTime(way.seconds);
  state.counters["x_peak"] = products(m) * size.product() / way.seconds / all.peak;
  if (way.materialised > 0) {
    state.counters["x_materialised"] = way.materialised / way.seconds;
    state.counters["x_eigen"] = way.eigen / way.seconds;
  } else {
    state.SetLabel("no memory for all scores");
  }
  state.counters["peak_gflops"] = all.peak * 1e-9;
  state.counters["scratch_bytes"] = way.scratch;
  state.counters["extra_bytes"] = way.extra;
  state.counters["samples"] = way.samples;
  state.counters["noise"] = way.noise;
}

// ---- storage

void against_float(benchmark::State& state, head_shape size, mode m, std::size_t n) {
  const linear_problem& p = use_linear_problem(size, scores::random);
  const perdita::executor run_on = use_openmp_threads(n);
  const auto rounded = [](const matrix& from) {
    std::vector<perdita::bfloat16> to(static_cast<std::size_t>(from.size()));
    for (std::size_t i = 0; i < to.size(); ++i)
      to[i].bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(from.data()[i]) >> 16);
    return to;
  };
  const auto hidden = rounded(p.hidden), weights = rounded(p.weights);
  evaluation<> with_float(p, m, options(m, size, n), run_on);
  evaluation<perdita::bfloat16> narrow(p, m, options(m, size, n), run_on, hidden.data(),
                                       weights.data());
  const char* complaint = with_float.check();
  if (!complaint)
    complaint = narrow.check(0.1);
  if (complaint) {
    state.SkipWithError(complaint);
    return;
  }
  contestant one([&] { with_float.run(); }), other([&] { narrow.run(); });
  for (auto _ : state) {
    compete({&one, &other}, {.least = 2, .seconds = 3 * seconds_per_benchmark(), .warm = true});
    state.SetIterationTime(other.seconds());
  }
  state.counters["x_float"] = other.seconds() / one.seconds();
  state.counters["samples"] = static_cast<double>(one.samples());
  state.counters["noise"] = std::max(one.noise(), other.noise());
}

// ---- filtering

struct rule {
  const char* name;
  double mass, below;
};
constexpr rule rules[] = {{"mass:0.01", 0.01, 0},
                          {"mass:0.03", 0.03, 0},
                          {"mass:0.1", 0.1, 0},
                          {"below:2^-16", 0, 0x1p-16},
                          {"below:2^-12", 0, 0x1p-12}};

double norm(const float* p, index n) {
  double sum = 0;
  for (index i = 0; i < n; ++i)
    sum += static_cast<double>(p[i]) * static_cast<double>(p[i]);
  return std::sqrt(sum);
}
/// a -= b; returns ‖a - b‖
double difference(matrix& a, const matrix& b) {
  for (index i = 0; i < a.size(); ++i)
    a.data()[i] -= b.data()[i];
  return norm(a.data(), a.size());
}
matrix copy_of(const matrix& m) {
  matrix copy(m.rows(), m.cols());
  std::copy_n(m.data(), m.size(), copy.data());
  return copy;
}

/// Of the whole gradient of the scores, for rules that bound single entries: computed here.
struct entries {
  double live = 0, mass = 0, dropped = 0;
};
entries count(const linear_problem& p, const std::vector<float>& log_sum_exp, double below) {
  entries result;
  const matrix z(1, p.size.classes);
  const index step = std::max<index>(1, p.size.rows / 64); // of the rows 64 are enough
  index rows = 0;
  for (index r = 0; r < p.size.rows; r += step, ++rows) {
    const eigen_products::row_major x = eigen_products::map(p.hidden).row(r);
    eigen_products::map(z).noalias() = x * eigen_products::map(p.weights).transpose();
    for (index c = 0; c < p.size.classes; ++c) {
      const auto i = static_cast<std::size_t>(r), j = static_cast<std::size_t>(c);
      const double raw =
          static_cast<double>(z.data()[c]) + (p.bias.empty() ? 0 : static_cast<double>(p.bias[j]));
      const double g = std::abs(std::exp(raw - static_cast<double>(log_sum_exp[i])) -
                                (p.labels[i] == c ? 1 : 0));
      result.mass += g;
      (g <= below ? result.dropped : result.live) += g <= below ? g : 1;
    }
  }
  result.live /= static_cast<double>(rows) * static_cast<double>(p.size.classes);
  result.dropped /= result.mass;
  result.mass /= static_cast<double>(rows);
  return result;
}

void filtered(benchmark::State& state, const linear_problem& p, mode m, const rule& with,
              std::size_t n) {
  const perdita::executor run_on = use_openmp_threads(n);
  auto o = options(m, p.size, n);
  evaluation<> exact(p, m, o, run_on);
  std::vector<double> dropped(static_cast<std::size_t>(p.size.rows));
  o.drop_mass = with.mass;
  o.drop_below = with.below;
  o.dropped = dropped;
  evaluation<> with_filter(p, m, o, run_on);

  if (const char* complaint = exact.check()) {
    state.SkipWithError(complaint);
    return;
  }
  const matrix d_hidden = copy_of(p.d_hidden), d_weights = copy_of(p.d_weights);
  with_filter.run();
  matrix off_hidden = copy_of(p.d_hidden), off_weights = copy_of(p.d_weights);
  const double error_hidden =
      difference(off_hidden, d_hidden) / norm(d_hidden.data(), d_hidden.size());
  const double error_weights =
      difference(off_weights, d_weights) / norm(d_weights.data(), d_weights.size());

  contestant without([&] { exact.run(); }), filter([&] { with_filter.run(); });
  for (auto _ : state) {
    compete({&without, &filter},
            {.least = 2, .seconds = 3 * seconds_per_benchmark(), .warm = true});
    state.SetIterationTime(filter.seconds());
  }
  state.counters["x_unfiltered"] = filter.seconds() / without.seconds();
  state.counters["error_hidden"] = error_hidden;
  state.counters["error_weights"] = error_weights;
  const entries all = count(p, exact.log_sum_exp(), with.below);
  if (with.mass > 0) {
    double longest = 0, total = 0, worst = 0;
    for (index c = 0; c < p.size.classes; ++c)
      longest = std::max(longest, norm(p.weights.row(c), p.size.features));
    for (index r = 0; r < p.size.rows; ++r) {
      const double mass = dropped[static_cast<std::size_t>(r)];
      // What rounding alone makes of a row that drops nothing is no error of the filter.
      const double off =
          norm(off_hidden.row(r), p.size.features) - 1e-5 * norm(d_hidden.row(r), p.size.features);
      total += mass;
      worst = std::max(worst, off > 0 ? off / (mass * longest) : 0);
    }
    state.counters["bound"] = worst;
    state.counters["dropped"] = total / all.mass; // all.mass: of a row, times the rows of the mean
    if (worst > 1)
      state.SkipWithError("the error of a row is above its bound");
  } else {
    state.counters["live"] = all.live;
    state.counters["dropped"] = all.dropped;
  }
  state.counters["samples"] = static_cast<double>(filter.samples());
  state.counters["noise"] = std::max(filter.noise(), without.noise());
}

// ---- the map

constexpr index map_rows[] = {1, 16, 128, 1024}, map_features[] = {64, 512, 2048},
                map_classes[] = {64, 1000, 32768};

void compare(benchmark::State& state, head_shape size, std::size_t n) {
  const linear_problem& p = use_linear_problem(size, scores::random);
  const perdita::executor run_on = use_openmp_threads(n);
  perdita::call_options<float> call;
  perdita::workspace memory;
  call.run_on = run_on;
  call.memory = &memory;
  const block_products blocks(run_on);
  const eigen_products eigen(run_on);
  const matrix scores(size.rows, size.classes);
  evaluation<> roomy(p, mode::roomy, options(mode::roomy, size, n), run_on);
  evaluation<> tight(p, mode::tight, options(mode::tight, size, n), run_on);

  for (evaluation<>* e : {&roomy, &tight})
    if (const char* complaint = e->check()) {
      state.SkipWithError(complaint);
      return;
    }
  const auto right = [&](float value) {
    return p.right(static_cast<double>(value), roomy.log_sum_exp()) &&
           p.gradients_right(roomy.log_sum_exp());
  };
  if (!right(materialise(blocks, p, scores, true, call)) ||
      !right(materialise(eigen, p, scores, true, call))) {
    state.SkipWithError("a materialised result is not that of the reference");
    return;
  }
  contestant all[] = {
      contestant([&] { roomy.run(); }), contestant([&] { tight.run(); }),
      contestant([&] { benchmark::DoNotOptimize(materialise(blocks, p, scores, true, call)); }),
      contestant([&] { benchmark::DoNotOptimize(materialise(eigen, p, scores, true, call)); })};
  const char* names[] = {"roomy", "tight", "materialised", "eigen"};
  for (auto _ : state) {
    compete({&all[0], &all[1], &all[2], &all[3]},
            {.least = 3, .seconds = 0.5 * seconds_per_benchmark()});
    state.SetIterationTime(all[0].seconds());
  }
  double best = all[0].seconds();
  for (const contestant& c : all)
    best = std::min(best, c.seconds());
  for (int i = 0; i < 4; ++i)
    state.counters[names[i]] = all[i].seconds() / best;
  state.counters["best_ms"] = best * 1e3;
  state.counters["samples"] = static_cast<double>(all[0].samples());
  state.counters["noise"] = all[0].noise();
}

template <class F> void add(const std::string& full, const F& f) {
  benchmark::RegisterBenchmark(full.c_str(), f)
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}
std::string on(std::size_t n) { return "/threads:" + std::to_string(n); }

void register_all(std::size_t n) {
  for (const head_shape size : named)
    if (n > 1 || large_wanted() || size.classes < 256000)
      for (const mode m : modes)
        add("linear/float/" + size.name() + "/" + name(m) + on(n),
            [=](benchmark::State& s) { report(s, size, m, n); });
  if (n > 1 && large_wanted())
    for (const mode m : modes)
      add("linear/float/" + large.name() + "/" + name(m) + on(n),
          [=](benchmark::State& s) { report(s, large, m, n); });
  for (const head_shape size : {named[0], named[1]})
    for (const mode m : modes)
      add("linear/bfloat16/" + size.name() + "/" + name(m) + on(n),
          [=](benchmark::State& s) { against_float(s, size, m, n); });
  for (const index rows : map_rows)
    for (const index features : map_features)
      for (const index classes : map_classes)
        add("map/" + head_shape{rows, features, classes}.name() + on(n), [=](benchmark::State& s) {
          compare(s, {rows, features, classes}, n);
        });
}

void register_filters(std::size_t n) {
  for (const scores kind : {scores::peaked, scores::flat})
    for (const mode m : {mode::roomy, mode::tight})
      for (const rule& with : rules)
        add(std::string("filter/") + name(kind) + "/" + name(m) + "/" + with.name + on(n),
            [=, &with](benchmark::State& s) {
              filtered(s, use_linear_problem(named[0], kind), m, with, n);
            });
  const char* path = std::getenv("PERDITA_BENCH_HEAD");
  if (!path)
    return;
  for (const mode m : {mode::roomy, mode::tight})
    for (const rule& with : rules)
      add(std::string("filter/file/") + name(m) + "/" + with.name + on(n),
          [=, &with](benchmark::State& s) {
            static const std::unique_ptr<linear_problem> p = linear_problem::read(path);
            if (p)
              filtered(s, *p, m, with, n);
            else
              s.SkipWithError("PERDITA_BENCH_HEAD cannot be read");
          });
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  const std::size_t most = bench::most_openmp_threads();
  for (std::size_t n = 1; n <= most; ++n)
    bench::register_all(n);
  bench::register_filters(most);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
