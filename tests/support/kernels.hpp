// SPDX-License-Identifier: MIT
#pragma once

// The traversals that several test files need, compiled once for all of them, in kernels/*.cpp. The
// test cases have this precompiled; a program that does not include it compiles its own.

#include <perdita/linear.hpp>
#include <perdita/perdita.hpp>

#define PERDITA_TEST_ROWS(how, T, ...)                                                             \
  how double run_rows<false>(const __VA_ARGS__&, row_job<T>&, const executor&, workspace*);        \
  how double run_rows<true>(const __VA_ARGS__&, row_job<T>&, const executor&, workspace*);

#define PERDITA_TEST_LINEAR(how, T, ...)                                                           \
  how double run_linear<false>(const __VA_ARGS__&, const row_job<T>&, const linear_job<T>&,        \
                               const executor&, workspace*, const row_record*);                    \
  how double run_linear<true>(const __VA_ARGS__&, const row_job<T>&, const linear_job<T>&,         \
                              const executor&, workspace*, const row_record*);                     \
  how void summarise_linear(const __VA_ARGS__&, const row_job<T>&, const linear_job<T>&,           \
                            const executor&, workspace*, row_record*);

#define PERDITA_TEST_PRODUCT(how, T)                                                               \
  how void multiply<T>(broadcast_operand<T>, panelled_operand<T>, product_result<T>, index, index, \
                       index, bool);

#define PERDITA_TEST_ANCHORS(how, T)                                                               \
  how double run_anchors<T>(const anchor_function<T>&, const anchor_job<T>&, bool,                 \
                            const executor&, workspace*);                                          \
  how T anchor_request<T>::run(const anchor_function<T>&, const anchor_options<T>&);

#define PERDITA_TEST_ROW_KERNELS(how, T)                                                           \
  how void copy_transposed<T>(const T*, std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t, T*,        \
                              std::ptrdiff_t);                                                     \
  how double settle(const row_facts<T>&, row_job<T>&, const call_options<T>&);                     \
  how void check_matrices(const char*, const row_job<T>&, const call_options<T>&, bool);           \
  PERDITA_TEST_ROWS(how, T, cross_entropy_formula<T, log_sum_exp>)                                 \
  PERDITA_TEST_ROWS(how, T, cross_entropy_formula<T, log_sum_exp_and_total>)                       \
  PERDITA_TEST_ROWS(how, T, cross_entropy_formula<T, log_sum_exp_and_moments>)                     \
  PERDITA_TEST_ROWS(how, T, target_formula<T>)                                                     \
  PERDITA_TEST_ROWS(how, T, ldr_kl_formula<T>)                                                     \
  PERDITA_TEST_ROWS(how, T, z_loss_formula<T>)                                                     \
  PERDITA_TEST_ROWS(how, T, sparsemax_formula)

#define PERDITA_TEST_SIMILARITY(how, T, ...)                                                       \
  how double run_similarity(const __VA_ARGS__&, const row_job<T>&, const similarity_job<T>&,       \
                            const executor&, workspace*);
#define PERDITA_TEST_SIMILARITY_KERNELS(how, T)                                                    \
  PERDITA_TEST_SIMILARITY(how, T, cross_entropy_formula<T, log_sum_exp>)                           \
  PERDITA_TEST_SIMILARITY(how, T, cross_entropy_formula<T, log_sum_exp_and_total>)                 \
  PERDITA_TEST_SIMILARITY(how, T, cross_entropy_formula<T, log_sum_exp_and_moments>)

#define PERDITA_TEST_LINEAR_KERNELS(how, T)                                                        \
  PERDITA_TEST_PRODUCT(how, T)                                                                     \
  PERDITA_TEST_LINEAR(how, T, cross_entropy_formula<T, log_sum_exp>)                               \
  PERDITA_TEST_LINEAR(how, T, cross_entropy_formula<T, log_sum_exp_and_total>)                     \
  PERDITA_TEST_LINEAR(how, T, cross_entropy_formula<T, log_sum_exp_and_moments>)                   \
  PERDITA_TEST_LINEAR(how, T, z_loss_formula<T>)

namespace perdita::inline PERDITA_ABI::core {
PERDITA_TEST_ROW_KERNELS(extern template, float)
PERDITA_TEST_ROW_KERNELS(extern template, double)
PERDITA_TEST_ANCHORS(extern template, float)
PERDITA_TEST_ANCHORS(extern template, double)
PERDITA_TEST_SIMILARITY_KERNELS(extern template, float)
PERDITA_TEST_SIMILARITY_KERNELS(extern template, double)
PERDITA_TEST_LINEAR_KERNELS(extern template, float)
PERDITA_TEST_LINEAR_KERNELS(extern template, double)
} // namespace perdita::inline PERDITA_ABI::core
