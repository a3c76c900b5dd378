// SPDX-License-Identifier: MIT
#pragma once

/// The linear head as it is done otherwise: all scores are made and held, the loss turns them into
/// their gradient where they lie, and two more products follow. Once with the library's own blocks
/// of products, put together to products of whole matrices as well as we can, and once with
/// Eigen's.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

// GCC 12 reports its own AVX-512 headers (bug 105593) in every function they are inlined into.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <Eigen/Core>

#include <perdita/core/executor.hpp>
#include <perdita/core/product.hpp>
#include <perdita/cross_entropy.hpp>

#include "linear_problem.hpp"

namespace bench {

/// Products of row-major matrices on core::multiply. What is panelled is packed once; a tile of a
/// result stays in the second-level cache until it is done.
class block_products {
  static constexpr auto width = static_cast<index>(perdita::core::lanes<float>);
  static constexpr index depth = 256, columns = 256, strip = 48;
  using result = perdita::core::product_result<float>;

public:
  explicit block_products(const perdita::executor& run_on) : run_on_(run_on) {}

  /// z = x wᵀ. Tasks are blocks of 256 classes, and of rows where these are few.
  void scores(const matrix& x, const matrix& w, const matrix& z) const {
    const index d = x.cols(), blocks = parts(w.rows(), columns), cuts = row_parts(x.rows(), blocks);
    for_each(blocks * cuts, [&](index task) {
      const index first = task / cuts * columns, n = std::min(columns, w.rows() - first);
      const index begin = x.rows() * (task % cuts) / cuts,
                  end = x.rows() * (task % cuts + 1) / cuts;
      float* const packed = scratch(columns * (d + depth));
      for (index k = 0; k < d; k += depth) {
        const index terms = std::min(depth, d - k);
        for (index j = 0; j < n; j += width) {
          float* to = packed + k * columns + j * terms;
          if (n - j < width)
            std::fill_n(to, terms * width, 0.0F);
          perdita::core::copy_transposed(w.row(first + j) + k, d, std::min(width, n - j), terms, to,
                                         width);
        }
      }
      constexpr index tile_rows = 3 * strip, step = columns + width;
      alignas(64) static thread_local float tile[tile_rows * step];
      for (index r = begin; r < end; r += tile_rows) {
        const index rows = std::min(tile_rows, end - r);
        for (index k = 0; k < d; k += depth) {
          const index terms = std::min(depth, d - k);
          for (index i = 0; i < rows; i += strip)
            perdita::core::multiply<float>(
                {x.row(r + i) + k, d, 1, width}, {packed + k * columns, terms * width},
                result{tile + i * step, step, width}, std::min(strip, rows - i), n, terms, k > 0);
        }
        for (index i = 0; i < rows; ++i)
          std::copy_n(tile + i * step, n, z.row(r + i) + first);
      }
    });
  }

  /// dx = g w. Tasks are columns, and rows where these are few.
  void to_hidden(const matrix& g, const matrix& w, const matrix& dx) const {
    const index d = w.cols(), v = w.rows(), blocks = parts(d, columns),
                cuts = row_parts(g.rows(), blocks);
    for_each(blocks * cuts, [&](index task) {
      const index first = task / cuts * columns, n = std::min(columns, d - first);
      const index begin = g.rows() * (task % cuts) / cuts,
                  end = g.rows() * (task % cuts + 1) / cuts;
      float* const packed = scratch(columns * depth);
      for (index k = 0; k < v; k += depth) {
        const index terms = std::min(depth, v - k);
        pack(w, k, terms, first, n, packed);
        for (index i = begin; i < end; i += strip)
          perdita::core::multiply<float>({g.row(i) + k, v, 1, width}, {packed, terms * width},
                                         result{dx.row(i) + first, d, width},
                                         std::min(strip, end - i), n, terms, k > 0);
      }
    });
  }

  /// dw = gᵀ x. Tasks are blocks of 512 classes; a tile of g is copied, because its columns lie far
  /// apart.
  void to_weights(const matrix& g, const matrix& x, const matrix& dw) const {
    constexpr index most = 512, step = most + width;
    const index d = x.cols(), rows = g.rows(), v = g.cols();
    const index classes =
        std::clamp<index>((v + 8 * concurrency() - 1) / (8 * concurrency()), 48, most);
    for_each(parts(v, classes), [&](index task) {
      const index first = task * classes, n = std::min(classes, v - first);
      float* const tile = scratch(depth * step + columns * depth);
      float* const packed = tile + depth * step;
      for (index k = 0; k < rows; k += depth) {
        const index terms = std::min(depth, rows - k);
        for (index i = 0; i < terms; ++i)
          std::copy_n(g.row(k + i) + first, n, tile + i * step);
        for (index c = 0; c < d; c += columns) {
          const index cols = std::min(columns, d - c);
          pack(x, k, terms, c, cols, packed);
          for (index j = 0; j < n; j += strip)
            perdita::core::multiply<float>({tile + j, 1, step, width * step},
                                           {packed, terms * width},
                                           result{dw.row(first + j) + c, d, width},
                                           std::min(strip, n - j), cols, terms, k > 0);
        }
      }
    });
  }

private:
  static index parts(index n, index part) { return (n + part - 1) / part; }
  index concurrency() const { return static_cast<index>(run_on_.concurrency()); }
  /// Into how many runs of rows the work is cut, where there are `blocks` tasks already.
  index row_parts(index rows, index blocks) const {
    const index wanted = concurrency() > 1 ? parts(4 * concurrency(), blocks) : 1;
    return std::clamp<index>(rows / strip, 1, blocks >= 4 * concurrency() ? 1 : wanted);
  }
  template <class F> void for_each(index n, const F& f) const {
    const auto task = [&](std::size_t i) { f(static_cast<index>(i)); };
    run_on_(static_cast<std::size_t>(n), task);
  }
  /// A thread's own memory, kept.
  static float* scratch(index floats) {
    static thread_local std::unique_ptr<matrix> memory;
    if (!memory || memory->size() < floats)
      memory = std::make_unique<matrix>(1, floats);
    return memory->data();
  }
  /// Rows [k, k + terms) and columns [first, first + n) as panels.
  static void pack(const matrix& m, index k, index terms, index first, index n, float* to) {
    using V = perdita::core::pack<float>;
    for (index i = 0; i < terms; ++i) {
      const float* from = m.row(k + i) + first;
      for (index j = 0; j < n; j += width)
        (j + width <= n ? V::load(from + j) : perdita::core::load_first(from + j, n - j, V(0)))
            .store(to + j * terms + i * width);
    }
  }

  const perdita::executor& run_on_;
};

/// The same from Eigen, which has OpenMP's threads where it is compiled with OpenMP.
struct eigen_products {
  using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  static Eigen::Map<row_major> map(const matrix& m) { return {m.data(), m.rows(), m.cols()}; }

  explicit eigen_products(const perdita::executor& run_on) {
    Eigen::setNbThreads(static_cast<int>(run_on.concurrency()));
  }
  void scores(const matrix& x, const matrix& w, const matrix& z) const {
    map(z).noalias() = map(x) * map(w).transpose();
  }
  void to_hidden(const matrix& g, const matrix& w, const matrix& dx) const {
    map(dx).noalias() = map(g) * map(w);
  }
  void to_weights(const matrix& g, const matrix& x, const matrix& dw) const {
    map(dw).noalias() = map(g).transpose() * map(x);
  }
};

/// Value, and gradients where they are wanted, by way of all scores.
template <class Products>
float materialise(const Products& products, const linear_problem& p, const matrix& scores,
                  bool gradient, const perdita::call_options<float>& call) {
  static const perdita::cross_entropy<float> loss;
  products.scores(p.hidden, p.weights, scores);
  if (!gradient)
    return loss(scores.read(), p.labels, call);
  const float value = loss(scores.read(), p.labels, scores.view(), call);
  products.to_hidden(scores, p.weights, p.d_hidden);
  products.to_weights(scores, p.hidden, p.d_weights);
  return value;
}

} // namespace bench
