// Memory between kernels, carved out of one piece.
#pragma once

#include <cstdint>

namespace moert::cuda {

// Hands out aligned pieces of memory that the caller owns; over null it only counts.
class Memory {
 public:
  explicit Memory(void* data) : data_(static_cast<char*>(data)) {}

  template <typename T>
  T* take(int64_t n) {
    constexpr int64_t kAlign = 256;
    T* here = data_ ? reinterpret_cast<T*>(data_ + used_) : nullptr;
    used_ += (n * int64_t(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return here;
  }

  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

}  // namespace moert::cuda
