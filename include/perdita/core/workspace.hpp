// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "../config.hpp"

namespace perdita::inline PERDITA_ABI {

/// Scratch memory that calls may share one after another: it grows to the largest request and is
/// kept until destruction. A call without one allocates what it needs once and frees it.
class workspace {
public:
  /// At least `bytes` bytes, aligned to 64; the contents are unspecified.
  std::byte* request(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, alignment)));
      size_ = bytes;
    }
    return memory_.get();
  }
  std::size_t size() const { return size_; }

private:
  static constexpr std::align_val_t alignment{64};
  struct release {
    void operator()(std::byte* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<std::byte, release> memory_;
  std::size_t size_ = 0;
};

namespace core {
/// Cuts typed arrays out of a block of bytes, each aligned to 64. With no block it only counts.
class carver {
public:
  explicit carver(std::byte* base = nullptr) : base_(base) {}
  template <class T> T* take(std::size_t n) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  std::size_t used() const { return used_; }

private:
  std::byte* base_;
  std::size_t used_ = 0;
};
} // namespace core

} // namespace perdita::inline PERDITA_ABI
