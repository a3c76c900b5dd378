#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What including perdita/cross_entropy.hpp costs a user's compiler, over including xsimd alone.

    python3 cmake/include_cost.py [COMPILER]

Processor seconds, the best of five, taken in turns so that a busy machine slows both. The goal is
0.3 s; only above 0.6 s is it called a failure, because machines differ.
"""
import os
import resource
import subprocess
import sys

GOAL, LIMIT, ROUNDS = 0.3, 0.6, 5
compiler = sys.argv[1] if len(sys.argv) > 1 else "c++"
include = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "include")


def seconds(header):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([compiler, "-std=c++20", "-march=native", "-fsyntax-only", "-I", include,
                    "-x", "c++", "-"], input=f"#include <{header}>\n", text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


rounds = [(seconds("xsimd/xsimd.hpp"), seconds("perdita/cross_entropy.hpp"))
          for _ in range(ROUNDS)]
bare, ours = map(min, zip(*rounds))
print(f"{compiler}: xsimd {bare:.2f} s, perdita/cross_entropy.hpp {ours:.2f} s: "
      f"{ours - bare:+.2f} s (goal {GOAL} s)")
sys.exit(ours - bare > LIMIT)
