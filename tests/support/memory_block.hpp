// SPDX-License-Identifier: MIT
#pragma once

// Memory that shows who touched it: filled with bytes that are NaN as a number of any width, and,
// if asked for, against a page that may not be touched at all.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace perdita_tests {

enum class edge { none, front, back };

class memory_block {
public:
  static constexpr unsigned char untouched = 0xFF;

  /// `bytes` bytes, `offset` past a multiple of 64; or right behind or before a forbidden page.
  memory_block(std::size_t bytes, std::size_t offset, edge at) : bytes_(bytes) {
    if (at == edge::none) { // mapping pages is slow
      pages_ = (bytes + 2 * margin + 127) / 64 * 64;
      area_ = static_cast<unsigned char*>(std::aligned_alloc(64, pages_));
      if (!area_)
        throw std::bad_alloc();
      std::fill_n(area_, pages_, untouched);
      data_ = area_ + margin + offset;
      return;
    }
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    pages_ = (bytes + page - 1) / page * page;
    mapped_ = pages_ + 2 * page;
    void* memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
      throw std::bad_alloc();
    map_ = static_cast<unsigned char*>(memory);
    if (mprotect(map_, page, PROT_NONE) != 0 ||
        mprotect(map_ + page + pages_, page, PROT_NONE) != 0)
      std::abort();
    area_ = map_ + page;
    std::fill_n(area_, pages_, untouched);
    data_ = at == edge::front ? area_ : area_ + pages_ - bytes;
  }
  memory_block(const memory_block&) = delete;
  memory_block& operator=(const memory_block&) = delete;
  ~memory_block() {
    if (map_)
      munmap(map_, mapped_);
    else
      std::free(area_);
  }

  unsigned char* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  /// Everything, for comparison with what it was.
  std::vector<unsigned char> copy() const { return {area_, area_ + pages_}; }
  bool operator==(const std::vector<unsigned char>& before) const {
    return std::equal(area_, area_ + pages_, before.begin(), before.end());
  }
  /// Where data() is in a copy().
  std::size_t position() const { return static_cast<std::size_t>(data_ - area_); }

private:
  static constexpr std::size_t margin = 256;
  unsigned char* map_ = nullptr;
  unsigned char* area_ = nullptr;
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0, pages_ = 0, mapped_ = 0;
};

} // namespace perdita_tests
