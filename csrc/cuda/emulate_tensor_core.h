// The words of tensor_core.h on the host.  Fragments are laid out as the PTX manual has them, not as CuTe does.
#pragma once

// CUTLASS has brought CUDA's own words, which say nothing to a host compiler.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __grid_constant__

#include <vector>

#include "cuda/emulate.h"

namespace moert::cuda {

// Copies in flight.  They arrive as late as they may or, `at_once`, as early: the first finds a read without its wait,
// the second a copy into a buffer that is still read.
struct AsyncCopies {
  struct Copy {
    void* to;
    const void* from;
  };
  static inline std::vector<std::vector<Copy>> groups[1024];  // of each thread of a cluster; the last is open

  static void arrive(const Copy& c) {
    if (reinterpret_cast<uintptr_t>(c.to) % 16 || reinterpret_cast<uintptr_t>(c.from) % 16)
      emulate::fail("an asynchronous copy must be aligned to 16 bytes");
    if (c.from)
      std::memcpy(c.to, c.from, 16);
    else
      std::memset(c.to, 0, 16);
  }
};

inline void copy_async(void* to, const void* from, bool inside) {
  const AsyncCopies::Copy copy{to, inside ? from : nullptr};
  if (emulate::copies_at_once) return AsyncCopies::arrive(copy);
  auto& groups = AsyncCopies::groups[emulate::thread_in_cluster()];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(copy);
}

inline void close_group() {
  auto& groups = AsyncCopies::groups[emulate::thread_in_cluster()];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

template <int n>
void wait_groups() {
  auto& groups = AsyncCopies::groups[emulate::thread_in_cluster()];
  while (groups.size() > n + 1) {
    for (const auto& copy : groups.front()) AsyncCopies::arrive(copy);
    groups.erase(groups.begin());
  }
}

// Four matrices of eight rows of 16 bytes; lane 8 i + r gives row r of matrix i, lane l gets elements 2 (l % 4) and the
// next of row l / 4, or, transposed, of column l / 4.
template <bool transposed>
struct EmulatedLdmatrix {
  using SRegisters = cute::uint128_t[1];
  using DRegisters = uint32_t[4];

  static void copy(const cute::uint128_t& from, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
    const auto* rows = emulate::exchange(0xffffffffu, reinterpret_cast<uintptr_t>(&from));
    const int lane = int(threadIdx.x % 32);
    uint32_t* const d[] = {&d0, &d1, &d2, &d3};
    for (int i = 0; i < 4; ++i) {
      const auto element = [&](int row, int column) {
        return uint32_t(emulate::aligned<const uint16_t[8]>(reinterpret_cast<const void*>(rows[8 * i + row]))[column]);
      };
      const int line = lane / 4, first = lane % 4 * 2;
      *d[i] = transposed ? element(first, line) | element(first + 1, line) << 16
                         : element(line, first) | element(line, first + 1) << 16;
    }
  }
};

using Ldmatrix = EmulatedLdmatrix<false>;
using LdmatrixTransposed = EmulatedLdmatrix<true>;

// Two registers of every lane of a warp, the first in the low half.
inline void share_pair(uint32_t low, uint32_t high, uint64_t* all) {
  std::memcpy(all, emulate::exchange(0xffffffffu, uint64_t(high) << 32 | low), 32 * sizeof(uint64_t));
}

// One warp's product of 16 x 8.  With g = lane / 4 and t = lane % 4, register i of a holds row g (+ 8 where i is odd),
// of b column g, and elements 2 t and 2 t + 1 (16 bits) or t (32 bits) of the half i / 2 (of b: i) of the depth.
template <class Element>
struct EmulatedMma {
  using DRegisters = float[4];
  using ARegisters = uint32_t[4];
  using BRegisters = uint32_t[2];
  using CRegisters = float[4];
  static constexpr int kPerRegister = 4 / sizeof(Element);

  static float element(uint64_t pair, int which, int i) {
    const auto word = uint32_t(pair >> 32 * which);
    Element x;
    if constexpr (kPerRegister == 2) {
      const auto half = uint16_t(word >> 16 * i);
      std::memcpy(&x, &half, 2);
    } else {
      const uint32_t kept = word & 0xffffe000u;  // what a tensor core takes of a float
      std::memcpy(&x, &kept, 4);
    }
    return float(x);
  }

  static void fma(float& d0, float& d1, float& d2, float& d3, const uint32_t& a0, const uint32_t& a1,
                  const uint32_t& a2, const uint32_t& a3, const uint32_t& b0, const uint32_t& b1, const float& c0,
                  const float& c1, const float& c2, const float& c3) {
    uint64_t a[2][32], b[32];
    share_pair(a0, a1, a[0]);
    share_pair(a2, a3, a[1]);
    share_pair(b0, b1, b);
    float sums[] = {c0, c1, c2, c3};
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 4; ++k)
        for (int i = 0; i < kPerRegister; ++i)
          for (int v = 0; v < 4; ++v)
            sums[v] += element(a[half][4 * g + k], v / 2, i) * element(b[4 * (2 * t + v % 2) + k], half, i);
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
  }
};

// The same of 32 columns of int8, four in a register, and int32 sums.
struct EmulatedMmaInt8 {
  static void fma(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, const uint32_t& a0, const uint32_t& a1,
                  const uint32_t& a2, const uint32_t& a3, const uint32_t& b0, const uint32_t& b1, const uint32_t& c0,
                  const uint32_t& c1, const uint32_t& c2, const uint32_t& c3) {
    uint64_t a[2][32], b[32];
    share_pair(a0, a1, a[0]);
    share_pair(a2, a3, a[1]);
    share_pair(b0, b1, b);
    const auto element = [](uint64_t pair, int which, int i) { return int32_t(int8_t(pair >> (32 * which + 8 * i))); };
    uint32_t sums[] = {c0, c1, c2, c3};  // they wrap around
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 4; ++k)
        for (int i = 0; i < 4; ++i)
          for (int v = 0; v < 4; ++v)
            sums[v] += uint32_t(element(a[half][4 * g + k], v / 2, i) * element(b[4 * (2 * t + v % 2) + k], half, i));
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
  }
};

using MmaInt8 = EmulatedMmaInt8;
using MmaBf16 = EmulatedMma<cute::bfloat16_t>;
using MmaF16 = EmulatedMma<cute::half_t>;
using MmaTf32 = EmulatedMma<cute::tfloat32_t>;

}  // namespace moert::cuda

namespace cute {

template <>
struct Copy_Traits<moert::cuda::Ldmatrix> : Copy_Traits<SM75_U32x4_LDSM_N> {};
template <>
struct Copy_Traits<moert::cuda::LdmatrixTransposed> : Copy_Traits<SM75_U16x8_LDSM_T> {};
template <>
struct MMA_Traits<moert::cuda::MmaBf16> : MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN> {};
template <>
struct MMA_Traits<moert::cuda::MmaF16> : MMA_Traits<SM80_16x8x16_F32F16F16F32_TN> {};
template <>
struct MMA_Traits<moert::cuda::MmaTf32> : MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN> {};

}  // namespace cute
