// SPDX-License-Identifier: MIT

// Cross-entropy by oneDNN, which has no such primitive: log-softmax forward, the loss read from its
// result, and log-softmax backward with a dense gradient, which is written before the clock starts:
//
//   build/bench/bench/bench_onednn

#include <cstddef>
#include <memory>
#include <string>

#include <dnnl.hpp>

#include "../support/openmp_threads.hpp"
#include "../support/peer.hpp"

namespace {

#if DNNL_VERSION_MAJOR >= 3
using forward_type = dnnl::softmax_forward;
using backward_type = dnnl::softmax_backward;
forward_type::primitive_desc forward_description(const dnnl::engine& engine,
                                                 const dnnl::memory::desc& matrix) {
  return {engine, dnnl::prop_kind::forward_training, dnnl::algorithm::softmax_log, matrix, matrix,
          1};
}
backward_type::primitive_desc backward_description(const dnnl::engine& engine,
                                                   const dnnl::memory::desc& matrix,
                                                   const forward_type::primitive_desc& forward) {
  return {engine, dnnl::algorithm::softmax_log, matrix, matrix, matrix, 1, forward};
}
#else
using forward_type = dnnl::logsoftmax_forward;
using backward_type = dnnl::logsoftmax_backward;
forward_type::primitive_desc forward_description(const dnnl::engine& engine,
                                                 const dnnl::memory::desc& matrix) {
  return {{dnnl::prop_kind::forward_training, matrix, 1}, engine};
}
backward_type::primitive_desc backward_description(const dnnl::engine& engine,
                                                   const dnnl::memory::desc& matrix,
                                                   const forward_type::primitive_desc& forward) {
  return {{matrix, matrix, 1}, engine, forward};
}
#endif

struct log_softmax {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::memory::desc matrix;
  forward_type::primitive_desc forward_desc;
  forward_type forward;
  backward_type backward;
  bench::huge_memory upstream_memory{bench::largest_problem};
  dnnl::memory scores, log_p, upstream, gradient;

  explicit log_softmax(const bench::problem<float>& p)
      : matrix({p.scores().rows, p.scores().cols}, dnnl::memory::data_type::f32,
               dnnl::memory::format_tag::ab),
        forward_desc(forward_description(engine, matrix)), forward(forward_desc),
        backward(backward_description(engine, matrix, forward_desc)),
        scores(matrix, engine, bench::memory().logits()),
        log_p(matrix, engine, bench::memory().in_place()),
        upstream(matrix, engine, upstream_memory.data()),
        gradient(matrix, engine, bench::memory().gradient()) {
    auto* dense = reinterpret_cast<float*>(upstream_memory.data());
    for (std::size_t r = 0; r < p.labels().size(); ++r)
      dense[r * static_cast<std::size_t>(p.scores().cols) +
            static_cast<std::size_t>(p.labels()[r])] = -1 / static_cast<float>(p.scores().rows);
  }
};

bench::peer make(const bench::problem<float>& p, std::size_t) {
  const auto state = std::make_shared<log_softmax>(p);
  const auto run = [&p, state] {
    log_softmax& s = *state;
    s.forward.execute(s.stream, {{DNNL_ARG_SRC, s.scores}, {DNNL_ARG_DST, s.log_p}});
    s.backward.execute(s.stream, {{DNNL_ARG_DST, s.log_p},
                                  {DNNL_ARG_DIFF_DST, s.upstream},
                                  {DNNL_ARG_DIFF_SRC, s.gradient}});
    s.stream.wait();
    const auto log_p = p.in_place();
    double sum = 0;
    for (bench::index r = 0; r < log_p.rows; ++r)
      sum -= bench::to_double(log_p(r, p.labels()[static_cast<std::size_t>(r)]));
    return sum / static_cast<double>(log_p.rows);
  };
  return {run, [&p] { return p.gradient(); }};
}

} // namespace

int main(int argc, char** argv) {
  const dnnl_version_t* v = dnnl_version();
  const std::string name = "oneDNN_" + std::to_string(v->major) + "." + std::to_string(v->minor);
  const bench::peer_program onednn{name.c_str(), bench::most_openmp_threads(),
                                   bench::use_openmp_threads, make};
  return bench::run_peer(argc, argv, onednn);
}
