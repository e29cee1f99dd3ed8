// What every plain SIMT kernel is written in: CUDA's own words under nvcc, the same words over fibers under a host
// compiler (emulate.h), and the few warp operations that the kernels share.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda/emulate.h"
#endif

#include <type_traits>

#include "cuda/numbers.h"

#define MOERT_DEVICE_INLINE __device__ __forceinline__

// The block's memory of the size that launch() was given, as `name`, an array of T.
#if defined(__CUDACC__)
#define MOERT_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char moert_shared[]; \
  T* name = reinterpret_cast<T*>(moert_shared)
#else
#define MOERT_SHARED(T, name) T* name = static_cast<T*>(::moert::emulate::shared_memory())
#endif

namespace moert::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

MOERT_DEVICE_INLINE int lane_id() { return int(threadIdx.x % kWarp); }
MOERT_DEVICE_INLINE int warp_id() { return int(threadIdx.x / kWarp); }

// Butterflies: every lane gets the same bits, in an order that depends on the lane numbers alone.  Over kLanes
// neighbours.
template <int kLanes = kWarp, typename T>
MOERT_DEVICE_INLINE T warp_sum(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sum of the lanes before this one.
MOERT_DEVICE_INLINE int32_t warp_exclusive(int32_t x) {
  int32_t sum = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, unsigned(step));
    if (lane_id() >= step) sum += other;
  }
  return sum - x;
}

template <typename T>
MOERT_DEVICE_INLINE T warp_max(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t>) return __reduce_max_sync(kAllLanes, x);
#endif
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// 16 bytes, the widest load there is on every architecture; the address must be a multiple of 16.
struct alignas(16) Chunk {
  uint32_t words[4];
};

template <typename T>
constexpr int kChunk = int(sizeof(Chunk) / sizeof(T));  // elements

MOERT_DEVICE_INLINE Chunk load_chunk(const void* p) {
#if defined(__CUDACC__)
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
#else
  return emulate::aligned<Chunk>(p);
#endif
}

// The same past the first-level cache and read-only: for weights that are read once.
MOERT_DEVICE_INLINE Chunk stream_chunk(const void* p) {
#if defined(__CUDACC__)
  Chunk c;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.words[0]), "=r"(c.words[1]), "=r"(c.words[2]), "=r"(c.words[3])
               : "l"(p));
  return c;
#else
  return emulate::aligned<Chunk>(p);
#endif
}

MOERT_DEVICE_INLINE void store_chunk(void* p, const Chunk& c) {
#if defined(__CUDACC__)
  // In its own words: from a uint4 the compiler makes four stores where the words were floats.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(c.words[0]), "r"(c.words[1]), "r"(c.words[2]), "r"(c.words[3])
               : "memory");
#else
  emulate::aligned<Chunk>(p) = c;
#endif
}

// Element i of a chunk of T as a sum's type; i is known when the loop around it is unrolled.
template <typename T>
MOERT_DEVICE_INLINE Acc<T> element(const Chunk& c, int i) {
  if constexpr (std::is_same_v<T, float>)
    return bits_to_float(c.words[i]);
  else if constexpr (std::is_same_v<T, bf16>)
    return bits_to_float(i % 2 ? c.words[i / 2] & 0xffff0000u : c.words[i / 2] << 16);
  else if constexpr (std::is_same_v<T, f16>)
    return to_float(f16{uint16_t(c.words[i / 2] >> (i % 2 * 16))});
  else
    return bits_to_double(uint64_t(c.words[2 * i + 1]) << 32 | c.words[2 * i]);
}

template <typename T>
MOERT_DEVICE_INLINE void set_element(Chunk& c, int i, Acc<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    c.words[i] = float_to_bits(x);
  } else if constexpr (std::is_same_v<T, double>) {
    const uint64_t bits = double_to_bits(x);
    c.words[2 * i] = uint32_t(bits);
    c.words[2 * i + 1] = uint32_t(bits >> 32);
  } else {
    const uint32_t bits = narrow<T>(x).bits;
    c.words[i / 2] = i % 2 ? (c.words[i / 2] & 0xffffu) | bits << 16 : bits;
  }
}

MOERT_HOST_DEVICE inline bool is_aligned(const void* p, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Chunk) == 0 && stride_bytes % int64_t(sizeof(Chunk)) == 0;
}

}  // namespace moert::cuda
