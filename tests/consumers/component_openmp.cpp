// SPDX-License-Identifier: MIT
#include <perdita/cross_entropy.hpp>

#ifndef _OPENMP
#error "perdita::openmp does not switch OpenMP on"
#endif
#include <omp.h>

int main() { return omp_get_max_threads() > 0 ? 0 : 1; }
