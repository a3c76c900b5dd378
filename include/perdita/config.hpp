// SPDX-License-Identifier: MIT
#pragma once

/// Every macro that changes what Perdita compiles to. Each is 0 or 1 and may be defined before the
/// first include; whatever changes code is also part of the inline namespace PERDITA_ABI, so that
/// translation units built with different flags link into one program safely.
///
/// PERDITA_NO_SIMD          1: no xsimd; the same lanes as scalars, and (by std::fma) the same bits
/// PERDITA_TILES            1: the linear head multiplies bfloat16 matrices as they are, in tiles
///                          (default where the target has AMX-BF16; elsewhere by AVX512-BF16, of
///                          which an Intel core has half the speed of float, or emulated)
/// PERDITA_HAS_EXCEPTIONS   0: an error calls PERDITA_ERROR_HANDLER(message), then aborts
/// PERDITA_ERROR_HANDLER    what to call then; by default the message goes to stderr
/// PERDITA_ALLOW_FAST_MATH  1: accept -ffast-math, which voids every promise about NaN and accuracy

#include "version.hpp"

#ifndef PERDITA_NO_SIMD
#if __has_include(<xsimd/xsimd.hpp>)
#define PERDITA_NO_SIMD 0
#else
#define PERDITA_NO_SIMD 1
#endif
#endif

#ifndef PERDITA_TILES
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && !PERDITA_NO_SIMD
#define PERDITA_TILES 1
#else
#define PERDITA_TILES 0
#endif
#endif

#ifndef PERDITA_HAS_EXCEPTIONS
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define PERDITA_HAS_EXCEPTIONS 1
#else
#define PERDITA_HAS_EXCEPTIONS 0
#endif
#endif

#ifndef PERDITA_ALLOW_FAST_MATH
#define PERDITA_ALLOW_FAST_MATH 0
#endif

#if (defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)) &&         \
    !PERDITA_ALLOW_FAST_MATH
#error                                                                                             \
    "perdita: -ffast-math breaks NaN, infinities and the accuracy of every loss; compile without it, or define PERDITA_ALLOW_FAST_MATH=1 and accept wrong results"
#endif

// What the code is compiled for, spelt into every symbol.
#if PERDITA_NO_SIMD
#define PERDITA_LANES scalar
#else
#define PERDITA_LANES simd
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define PERDITA_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define PERDITA_ISA avx2_fma
#elif defined(__AVX2__)
#define PERDITA_ISA avx2
#elif defined(__AVX__) && defined(__FMA__)
#define PERDITA_ISA avx_fma
#elif defined(__AVX__)
#define PERDITA_ISA avx
#elif defined(__SSE4_2__)
#define PERDITA_ISA sse4_2
#elif defined(__SSE4_1__)
#define PERDITA_ISA sse4_1
#elif defined(__SSSE3__)
#define PERDITA_ISA ssse3
#elif defined(__SSE3__)
#define PERDITA_ISA sse3
#elif defined(__SSE2__) || defined(_M_X64)
#define PERDITA_ISA sse2
#elif defined(__aarch64__)
#define PERDITA_ISA neon
#else
#define PERDITA_ISA other
#endif

#if !PERDITA_TILES
#define PERDITA_PRODUCTS lanes
#elif defined(__AMX_BF16__)
#define PERDITA_PRODUCTS tiles
#elif defined(__AVX512BF16__)
#define PERDITA_PRODUCTS dots
#else
#define PERDITA_PRODUCTS emulated
#endif

#if PERDITA_HAS_EXCEPTIONS
#define PERDITA_CONTRACT throws
#else
#define PERDITA_CONTRACT aborts
#endif

#if defined(_OPENMP)
#define PERDITA_EXECUTION openmp
#else
#define PERDITA_EXECUTION serial
#endif

#define PERDITA_JOIN(major, lanes, isa, products, contract, execution)                             \
  v##major##_##lanes##_##isa##_##products##_##contract##_##execution
#define PERDITA_EXPAND(...) PERDITA_JOIN(__VA_ARGS__)
#define PERDITA_ABI                                                                                \
  PERDITA_EXPAND(PERDITA_VERSION_MAJOR, PERDITA_LANES, PERDITA_ISA, PERDITA_PRODUCTS,              \
                 PERDITA_CONTRACT, PERDITA_EXECUTION)

#if defined(__GNUC__)
#define PERDITA_INLINE inline __attribute__((always_inline))
#define PERDITA_NOINLINE __attribute__((noinline))
#else
#define PERDITA_INLINE inline
#define PERDITA_NOINLINE
#endif
