// SPDX-License-Identifier: MIT
#pragma once

/// The memory that everything is measured in: one block of huge pages, touched once and reused by
/// every benchmark of the process, so that no page fault and no address luck enters a comparison.

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bench {

class huge_memory {
public:
  static constexpr std::size_t page = std::size_t{2} << 20;

  explicit huge_memory(std::size_t bytes) {
    const std::size_t whole = (bytes + page - 1) / page * page;
    memory_ = static_cast<std::byte*>(std::aligned_alloc(page, whole));
    if (!memory_)
      throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory_, whole,
            MADV_HUGEPAGE); // where it is refused, small pages serve everybody alike
#endif
    std::memset(memory_, 0, whole);
  }
  huge_memory(const huge_memory&) = delete;
  huge_memory& operator=(const huge_memory&) = delete;
  ~huge_memory() { std::free(memory_); }

  std::byte* data() const { return memory_; }

private:
  std::byte* memory_;
};

inline constexpr std::size_t largest_problem = sizeof(float) * 256 * 128256;

/// Three buffers, each large enough for the largest problem.
struct buffers {
  // Starts differ by 33 cache lines: at equal offsets within a page, a load must wait for an
  // unrelated earlier store.
  static constexpr std::size_t distance = largest_problem + huge_memory::page + 33 * 64;
  huge_memory memory{3 * distance};

  std::byte* logits() const { return memory.data(); }              ///< never written by a sample
  std::byte* gradient() const { return memory.data() + distance; } ///< written out of place
  std::byte* in_place() const { return memory.data() + 2 * distance; } ///< logits, then gradient
};

inline const buffers& memory() {
  static const buffers b;
  return b;
}

} // namespace bench
