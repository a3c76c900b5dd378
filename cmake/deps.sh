#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Installs what a preset needs and this machine lacks (Debian and its relatives).
#
#   sh cmake/deps.sh [run|test|bench|ci]...        default: test
#
# Does nothing, and asks for no password, when nothing is missing.
set -eu

groups=${*:-test}
missing=

tool() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
has_package() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
package() { has_package "$1" || missing="$missing $1"; }

needs() {
  case $1 in
    run)
      tool cmake cmake
      tool ninja ninja-build
      tool c++ g++
      package libeigen3-dev
      package libxsimd-dev ;;
    test)
      needs run
      # Catch2 3 is libcatch2-dev; Debian 12 has Catch2 2.13 under the other name.
      has_package libcatch2-dev || has_package catch2 || missing="$missing CATCH2" ;;
    bench)
      needs run
      package libbenchmark-dev
      package python3-matplotlib ;;
    ci)
      needs test
      package libbenchmark-dev
      package libomp-dev
      package libclang-rt-dev
      tool g++ g++
      tool clang++ clang
      tool clang-format clang-format
      tool nm binutils
      tool pkg-config pkgconf
      tool python3 python3 ;;
    *)
      echo "deps.sh: no group '$1'; there are run, test, bench and ci" >&2
      exit 2 ;;
  esac
}

if ! command -v apt-get >/dev/null 2>&1; then
  echo "deps.sh: no apt-get here, so nothing was installed. Needed: CMake 3.25, Ninja, a C++20" \
    "compiler, xsimd 8.1 or newer, Eigen 3.4 or newer; for the tests Catch2;" \
    "for the benchmarks Google Benchmark." >&2
  exit 0
fi

for group in $groups; do needs "$group"; done
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" != 0 ]; then
  as_root=sudo
  command -v sudo >/dev/null 2>&1 || {
    echo "deps.sh: neither root nor sudo; missing:$missing" >&2
    exit 1
  }
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
quietly() { "$@" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }; }

[ -z "$as_root" ] || $as_root -v # asks for the password where it can be seen
quietly $as_root apt-get update
packages=
for name in $missing; do
  case $name in
    CATCH2)
      name=catch2
      if apt-cache show libcatch2-dev >/dev/null 2>&1; then name=libcatch2-dev; fi ;;
  esac
  case " $packages " in *" $name "*) ;; *) packages="$packages $name" ;; esac
done
echo "deps.sh: installing$packages"
# shellcheck disable=SC2086 # a list of words
quietly $as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y --no-install-recommends $packages
