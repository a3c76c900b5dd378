// SPDX-License-Identifier: MIT

// Losses of embeddings compared with embeddings, value and gradients: by the similarity head, by
// blocks of anchors, and by way of the whole matrix.
//
//   build/bench/bench/bench_similarity --benchmark_filter='(info_nce|clip)/8192x1024/'
//   PERDITA_BENCH_LARGE=1 ...    with 16384 and 32768 rows, which take minutes
//
// similarity/LOSS/ROWSxFEATURES/threads:N. By the head: "info_nce" (rows only), "clip" (both
// directions), "nt_xent" (a matrix with itself, a partner for each row). By anchors:
// "sup_con_pairs" (InfoNCE again), "sup_con_views" (NT-Xent again), "sup_con" (a matrix with
// itself, eight of each label), "sig_lip", "circle" and "multi_similarity" (labels as for sup_con).
// Counters:
//
//   x_peak          useful operations per second (8 N² D; nt_xent 4 N² D; anchors 6 N² D) ÷ those
//                   of multiply-adds in registers, by as many threads
//   x_materialised  time of normalising, making all scores, cross-entropy of rows (and of columns),
//                   two more products and the projection, all from the library's blocks of products
//                   ÷ ours; to 8192 rows, for InfoNCE and CLIP
//   seconds         of one call
//   scratch_bytes   of the workspace
//   extra_bytes     growth of the peak of the resident memory during the first call
//   noise           median ÷ lower quartile of ours
//
// scaling/WAY/ROWSx512/threads:N, to 32768 rows: WAY being "head" (info_nce), "clip" or "sup_con".
// PERDITA_BENCH_ROWS=512,1024 ... takes other rows. The first of them are measured before and after
// the others, in one process and of each benchmark anew:
//
//   x_quadratic     time ÷ (time of the first rows · (rows ÷ first rows)²)
//
// and x_peak, seconds, scratch_bytes, extra_bytes and noise, as above.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <benchmark/benchmark.h>

#include <perdita/circle.hpp>
#include <perdita/cross_entropy.hpp>
#include <perdita/multi_similarity.hpp>
#include <perdita/sig_lip.hpp>
#include <perdita/similarity.hpp>
#include <perdita/sup_con.hpp>

#include "support/limits.hpp"
#include "support/linear_problem.hpp"
#include "support/most_threads.hpp"
#include "support/pipelines.hpp"
#include "support/pool.hpp"
#include "support/resident.hpp"
#include "support/sampling.hpp"

namespace bench {
namespace {

constexpr float scale = 14;

/// Embeddings of which each has a partner that is like it.
struct embeddings {
  matrix x, y, d_x, d_y;
  std::vector<std::int64_t> labels, partners, classes; ///< i; the row half the rows on; i/8

  embeddings(index n, index d) : x(n, d), y(n, d), d_x(n, d), d_y(n, d) {
    const random_numbers one{1}, other{2};
    for (index i = 0; i < x.size(); ++i) {
      x.data()[i] = one.normal(i);
      y.data()[i] = one.normal(i) + 2 * other.normal(i);
    }
    for (index i = 0; i < n; ++i) {
      labels.push_back(i);
      partners.push_back((i + n / 2) % n);
      classes.push_back(i / 8);
    }
  }
};

struct call {
  perdita::executor run_on;
  perdita::workspace* memory;
};
/// A loss, how many products of N²D multiplications and additions it needs, and what the whole
/// matrix is to be compared for: nothing, rows, or rows and columns.
struct subject {
  enum pipeline { none, rows, both };
  const char* name;
  double products;
  pipeline whole;
  float (*run)(const embeddings&, const call&);
};
template <bool Both> float by_head(const embeddings& e, const call& c) {
  const perdita::similarity head(perdita::cross_entropy<float>{}, {.scale = scale, .both = Both});
  return head(e.x.read(), e.y.read(), e.d_x.view(), e.d_y.view(),
              {.run_on = c.run_on, .memory = c.memory});
}
float within_head(const embeddings& e, const call& c) {
  const perdita::similarity head(perdita::cross_entropy<float>{}, {.scale = scale});
  return head.within(e.x.read(), e.partners, e.d_x.view(),
                     {.run_on = c.run_on, .memory = c.memory});
}
template <class Loss> float by_labels(const Loss& loss, const embeddings& e, const call& c) {
  return loss(e.x.read(), e.classes, e.d_x.view(), {.run_on = c.run_on, .memory = c.memory});
}
template <class Loss> float by_pairs(const Loss& loss, const embeddings& e, const call& c) {
  return loss.pairs(e.x.read(), e.y.read(), e.d_x.view(), e.d_y.view(),
                    {.run_on = c.run_on, .memory = c.memory});
}
const perdita::sup_con<float> sup_con({.temperature = 1.0 / scale});
constexpr subject subjects[] = {
    {"info_nce", 8, subject::rows, &by_head<false>},
    {"clip", 8, subject::both, &by_head<true>},
    {"nt_xent", 4, subject::none, &within_head},
    {"sup_con_pairs", 6, subject::rows,
     [](const embeddings& e, const call& c) { return by_pairs(sup_con, e, c); }},
    {"sup_con_views", 6, subject::none,
     [](const embeddings& e, const call& c) {
       return sup_con.views(e.x.read(), 2, e.d_x.view(), {.run_on = c.run_on, .memory = c.memory});
     }},
    {"sup_con", 6, subject::none,
     [](const embeddings& e, const call& c) { return by_labels(sup_con, e, c); }},
    {"sig_lip", 6, subject::none,
     [](const embeddings& e, const call& c) { return by_pairs(perdita::sig_lip<float>(), e, c); }},
    {"circle", 6, subject::none,
     [](const embeddings& e, const call& c) { return by_labels(perdita::circle<float>(), e, c); }},
    {"multi_similarity", 6, subject::none,
     [](const embeddings& e, const call& c) {
       return by_labels(perdita::multi_similarity<float>(), e, c);
     }},
};

class whole_matrix {
public:
  whole_matrix(const embeddings& e, bool both, const pool& run_on)
      : e_(e), both_(both), run_on_(run_on), products_(executor_), unit_x_(e.x.rows(), e.x.cols()),
        unit_y_(e.y.rows(), e.y.cols()), scores_(e.x.rows(), e.y.rows()),
        slopes_(e.x.rows(), e.y.rows()), d_x(e.x.rows(), e.x.cols()), d_y(e.y.rows(), e.y.cols()) {}

  float run() {
    normalise(e_.x, unit_x_, norm_x_);
    normalise(e_.y, unit_y_, norm_y_);
    products_.scores(unit_x_, unit_y_, scores_);
    scale_all(scores_);
    perdita::call_options<float> call;
    call.run_on = run_on_;
    call.scale = both_ ? scale / 2 : scale;
    float value = loss_(scores_.read(), e_.labels, slopes_.view(), call);
    if (both_) {
      const index n = scores_.rows();
      const matrix_view<const float> columns(scores_.data(), n, n, 1, n);
      const matrix_view<float> to(slopes_.data(), n, n, 1, n);
      call.accumulate = true;
      value = (value + loss_(columns, e_.labels, to, call)) / 2;
    }
    products_.to_hidden(slopes_, unit_y_, d_x);
    products_.to_weights(slopes_, unit_x_, d_y);
    project(d_x, unit_x_, norm_x_);
    project(d_y, unit_y_, norm_y_);
    return value;
  }

private:
  template <class F> void for_rows(index rows, const F& f) const {
    const auto task = [&](std::size_t i) {
      const auto first = static_cast<index>(i) * 64;
      for (index r = first; r < std::min(rows, first + 64); ++r)
        f(r);
    };
    run_on_(static_cast<std::size_t>((rows + 63) / 64), task);
  }
  static float dot(const float* a, const float* b, index n) {
    lanes sum(0);
    for (index i = 0; i < n; i += static_cast<index>(width))
      sum = core::fma(lanes::load(a + i), lanes::load(b + i), sum);
    return core::sum_lanes(sum);
  }
  void normalise(const matrix& from, const matrix& to, std::vector<float>& norms) const {
    norms.resize(static_cast<std::size_t>(from.rows()));
    for_rows(from.rows(), [&](index r) {
      const float norm = std::sqrt(dot(from.row(r), from.row(r), from.cols()));
      norms[static_cast<std::size_t>(r)] = norm;
      for (index c = 0; c < from.cols(); ++c)
        to.row(r)[c] = from.row(r)[c] / norm;
    });
  }
  void scale_all(const matrix& m) const {
    for_rows(m.rows(), [&](index r) {
      for (index c = 0; c < m.cols(); ++c)
        m.row(r)[c] *= scale;
    });
  }
  void project(const matrix& g, const matrix& unit, const std::vector<float>& norms) const {
    for_rows(g.rows(), [&](index r) {
      const float along = dot(g.row(r), unit.row(r), g.cols()),
                  norm = norms[static_cast<std::size_t>(r)];
      for (index c = 0; c < g.cols(); ++c)
        g.row(r)[c] = (g.row(r)[c] - along * unit.row(r)[c]) / norm;
    });
  }

  const embeddings& e_;
  bool both_;
  const pool& run_on_;
  perdita::executor executor_{run_on_};
  block_products products_;
  perdita::cross_entropy<float> loss_;
  matrix unit_x_, unit_y_, scores_, slopes_;
  std::vector<float> norm_x_, norm_y_;

public:
  matrix d_x, d_y;
};

double largest_difference(const matrix& a, const matrix& b) {
  double most = 0, size = 0;
  for (index i = 0; i < a.size(); ++i) {
    most = std::max(most, std::abs(static_cast<double>(a.data()[i] - b.data()[i])));
    size = std::max(size, std::abs(static_cast<double>(a.data()[i])));
  }
  return most / size;
}

/// By how much f() makes the peak of the resident memory grow, without what earlier benchmarks
/// left.
template <class F> double extra_memory(const F& f) {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
  return growth_of_peak(f);
}

void report(benchmark::State& state, const subject& of, index n, index d,
            std::size_t threads_wanted, const contestant& one, const contestant& fastest) {
  const double operations =
      of.products * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(d);
  state.counters["x_peak"] =
      operations / one.seconds() / (peak::operations(threads_wanted) / fastest.seconds());
  state.counters["seconds"] = one.seconds();
  state.counters["noise"] = one.noise();
}

void measure(benchmark::State& state, const subject& of, index n, index d,
             std::size_t threads_wanted) {
  const embeddings e(n, d);
  const pool& run_on = threads(threads_wanted);
  perdita::workspace memory;
  float value = 0;
  const auto ours = [&] { value = of.run(e, {run_on, &memory}); };
  const double extra = extra_memory(ours);
  contestant one(ours, [&] { run_on.wake(); });
  contestant fastest([&] { peak::run(run_on); }, [&] { run_on.wake(); });
  std::unique_ptr<whole_matrix> all;
  std::unique_ptr<contestant> other;
  if (of.whole != subject::none && n <= 8192) {
    all = std::make_unique<whole_matrix>(e, of.whole == subject::both, run_on);
    const float expected = all->run();
    if (!(std::abs(value - expected) < 1e-5F * expected) ||
        !(largest_difference(all->d_x, e.d_x) < 1e-4) ||
        !(largest_difference(all->d_y, e.d_y) < 1e-4)) {
      state.SkipWithError("not what the whole matrix gives");
      return;
    }
    other = std::make_unique<contestant>([&] { all->run(); }, [&] { run_on.wake(); });
  }
  for (auto _ : state) {
    std::vector<contestant*> turns{&one, &fastest};
    if (other)
      turns.push_back(other.get());
    compete(turns, {.least = n > 10000 ? 1U : 3U, .warm = true});
    state.SetIterationTime(one.seconds());
  }
  report(state, of, n, d, threads_wanted, one, fastest);
  if (other)
    state.counters["x_materialised"] = other->seconds() / one.seconds();
  state.counters["scratch_bytes"] = static_cast<double>(memory.size());
  state.counters["extra_bytes"] = extra;
}

/// Of embeddings that count by their direction alone: whether the gradient is across each of them.
/// (That all is right, similarity/... finds, where the whole matrix fits.)
bool is_across(const matrix& d_x, const matrix& x) {
  for (index r = 0; r < x.rows(); ++r) {
    double along = 0, size = 0;
    for (index c = 0; c < x.cols(); ++c) {
      const double product = static_cast<double>(d_x.row(r)[c]) * static_cast<double>(x.row(r)[c]);
      along += product;
      size += std::abs(product);
    }
    if (!(std::abs(along) <= 1e-5 * size && size > 0))
      return false;
  }
  return true;
}

void measure_scaling(benchmark::State& state, const subject& of, index n, index first,
                     std::size_t threads_wanted) {
  constexpr index features = 512;
  const embeddings fewest(first, features), e(n, features);
  const pool& run_on = threads(threads_wanted);
  const auto wake = [&] { run_on.wake(); };
  perdita::workspace memory, memory_of_fewest;
  float value = 0;
  const auto ours = [&] { value = of.run(e, {run_on, &memory}); };
  const double extra = extra_memory(ours);
  if (!(value > 0 && std::isfinite(value)) || !is_across(e.d_x, e.x)) {
    state.SkipWithError("no value, or no gradient");
    return;
  }
  contestant one(ours, wake), fastest([&] { peak::run(run_on); }, wake),
      base(
          [&] {
            of.run(fewest, {run_on, &memory_of_fewest});
          },
          wake);
  for (auto _ : state) {
    compete({&base}, {.least = 5});
    compete({&one, &fastest}, {.least = n > 20000 ? 2U : 3U, .warm = true});
    compete({&base}, {.least = 10, .warm = true});
    state.SetIterationTime(one.seconds());
  }
  report(state, of, n, features, threads_wanted, one, fastest);
  const double times = static_cast<double>(n) / static_cast<double>(first);
  state.counters["x_quadratic"] = one.seconds() / (base.seconds() * times * times);
  state.counters["scratch_bytes"] = static_cast<double>(memory.size());
  state.counters["extra_bytes"] = extra;
}

std::vector<index> rows_to_scale() {
  const char* text = std::getenv("PERDITA_BENCH_ROWS");
  if (!text)
    return {4096, 8192, 16384, 32768};
  std::vector<index> rows;
  for (char* end; *text; text = *end ? end + 1 : end) {
    rows.push_back(std::strtol(text, &end, 10));
    if (rows.back() < 1 || (*end && *end != ','))
      throw std::invalid_argument("PERDITA_BENCH_ROWS: expected numbers with commas between them");
  }
  return rows;
}

const subject& find(const std::string& name) {
  return *std::find_if(std::begin(subjects), std::end(subjects),
                       [&](const subject& s) { return s.name == name; });
}

template <class Measure> void add(const std::string& name, Measure measure) {
  benchmark::RegisterBenchmark(name.c_str(), measure)
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}

void register_all() {
  struct size {
    index rows, features;
  };
  std::vector<size> sizes{{1024, 512}, {4096, 512}, {8192, 512}, {8192, 1024}};
  if (std::getenv("PERDITA_BENCH_LARGE"))
    sizes.insert(sizes.end(), {{16384, 512}, {32768, 512}});
  const std::size_t most = most_threads(processors().size());
  for (const subject& of : subjects)
    for (const size& s : sizes)
      for (std::size_t n = 1; n <= most; ++n)
        add(std::string("similarity/") + of.name + "/" + std::to_string(s.rows) + "x" +
                std::to_string(s.features) + "/threads:" + std::to_string(n),
            [=](benchmark::State& state) { measure(state, of, s.rows, s.features, n); });
  const std::vector<index> rows = rows_to_scale();
  constexpr std::pair<const char*, const char*> ways[] = {
      {"head", "info_nce"}, {"clip", "clip"}, {"sup_con", "sup_con"}};
  for (const auto& [way, name] : ways)
    for (const index r : rows)
      for (std::size_t n = 1; n <= most; ++n)
        add(std::string("scaling/") + way + "/" + std::to_string(r) +
                "x512/threads:" + std::to_string(n),
            [=, &of = find(name)](benchmark::State& state) {
              measure_scaling(state, of, r, rows.front(), n);
            });
}

} // namespace
} // namespace bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv))
    return 1;
  bench::register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
