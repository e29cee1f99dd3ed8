// Memory that kernels of csrc/cuda may read and write: the GPU's, or the host's where they are emulated.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if !defined(MOERT_EMULATED)
#include <cuda_runtime_api.h>
#endif

namespace moert {

#if defined(MOERT_EMULATED)

inline const char* why_no_gpu() { return nullptr; }
inline void* device_alloc(size_t bytes) { return ::operator new(bytes, std::align_val_t{256}); }
inline void device_free(void* p) { ::operator delete(p, std::align_val_t{256}); }
inline void copy(void* to, const void* from, size_t bytes) {
  if (bytes) std::memcpy(to, from, bytes);
}

#else

inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Null where there is a GPU.
inline const char* why_no_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess && count > 0 ? nullptr : cudaGetErrorString(error);
}

inline void* device_alloc(size_t bytes) {
  void* p = nullptr;
  must(cudaMalloc(&p, std::max<size_t>(bytes, 1)));
  return p;
}

inline void device_free(void* p) { cudaFree(p); }

inline void copy(void* to, const void* from, size_t bytes) { must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }

#endif

// A vector's copy on the device, `shift` elements past an aligned address.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values, size_t shift = 0)
      : size_(values.size()), shift_(shift), memory_(device_alloc((size_ + shift) * sizeof(T))) {
    copy(data(), values.data(), size_ * sizeof(T));
  }
  ~OnDevice() { device_free(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() { return static_cast<T*>(memory_) + shift_; }

  std::vector<T> read() {
    std::vector<T> values(size_);
    copy(values.data(), data(), size_ * sizeof(T));
    return values;
  }

 private:
  size_t size_, shift_;
  void* memory_;
};

// Without a GPU a test of its kernels says so and counts as skipped, or, with MOERT_MUST_RUN, as failed.
inline int run_tests(void (*tests)()) {
  if (const char* why = why_no_gpu()) {
    std::fprintf(stderr, "needs a CUDA device, found none: %s\n", why);
    return std::getenv("MOERT_MUST_RUN") ? 1 : 77;
  }
  tests();
  return 0;
}

}  // namespace moert
