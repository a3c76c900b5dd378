# SPDX-License-Identifier: MIT
#
# PERDITA_FETCH_DEPENDENCIES: downloads what the machine lacks, at the versions pinned here. What is
# installed, or given by a parent, always comes first.
include(FetchContent)

# The SOURCE_SUBDIR does not exist: of a header-only library we want the files, not its build.
FetchContent_Declare(
  perdita_xsimd
  URL https://github.com/xtensor-stack/xsimd/archive/refs/tags/13.2.0.tar.gz
  URL_HASH SHA256=edd8cd3d548c185adc70321c53c36df41abe64c1fe2c67bc6d93c3ecda82447a
  DOWNLOAD_EXTRACT_TIMESTAMP ON
  SOURCE_SUBDIR none)
FetchContent_Declare(
  perdita_eigen
  URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz
  URL_HASH SHA256=8586084f71f9bde545ee7fa6d00288b264a2b7ac3607b974e54d13e7162c1c72
  DOWNLOAD_EXTRACT_TIMESTAMP ON
  SOURCE_SUBDIR none)
FetchContent_Declare(
  Catch2
  URL https://github.com/catchorg/Catch2/archive/refs/tags/v3.7.1.tar.gz
  URL_HASH SHA256=c991b247a1a0d7bb9c39aa35faf0fe9e19764213f28ffba3109388e62ee0269c
  DOWNLOAD_EXTRACT_TIMESTAMP ON
  SYSTEM)
FetchContent_Declare(
  benchmark
  URL https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz
  URL_HASH SHA256=32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981
  DOWNLOAD_EXTRACT_TIMESTAMP ON
  SYSTEM)

if(NOT PERDITA_NO_SIMD AND NOT TARGET xsimd)
  perdita_locate_xsimd()
  if(NOT PERDITA_XSIMD_INCLUDE_DIR)
    FetchContent_MakeAvailable(perdita_xsimd)
    set(PERDITA_XSIMD_INCLUDE_DIR ${perdita_xsimd_SOURCE_DIR}/include CACHE PATH "" FORCE)
  endif()
endif()

if(PERDITA_BUILD_TESTS OR PERDITA_BUILD_EXAMPLES OR PERDITA_BUILD_BENCH)
  find_package(Eigen3 QUIET GLOBAL)
  if(NOT TARGET Eigen3::Eigen)
    FetchContent_MakeAvailable(perdita_eigen)
    add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
    target_include_directories(Eigen3::Eigen SYSTEM INTERFACE ${perdita_eigen_SOURCE_DIR})
  endif()
endif()

if(PERDITA_BUILD_TESTS)
  find_package(Catch2 QUIET GLOBAL)
  if(NOT TARGET Catch2::Catch2WithMain)
    FetchContent_MakeAvailable(Catch2)
    list(APPEND CMAKE_MODULE_PATH ${catch2_SOURCE_DIR}/extras) # where include(Catch) looks
  endif()
endif()

if(PERDITA_BUILD_BENCH)
  find_package(benchmark QUIET GLOBAL)
  if(NOT TARGET benchmark::benchmark)
    set(BENCHMARK_ENABLE_TESTING OFF)
    set(BENCHMARK_ENABLE_INSTALL OFF)
    FetchContent_MakeAvailable(benchmark)
  endif()
endif()
