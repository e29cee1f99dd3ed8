// Expert choice: a block finds the last place of one expert in one segment by its key's digits, from the highest; a
// warp then writes which experts took its token.
#pragma once

#include "cuda/simt.h"

namespace moert::cuda {

// A key in the order of the scores, NaN first, and, the earlier the larger, the token: no two are equal.
struct Place {
  uint64_t score;
  uint32_t token;
};

// After every token's place.
constexpr Place kNobody{~uint64_t(0), ~uint32_t(0)};

template <typename T>
struct ChoiceCall {
  const T* scores;
  int64_t stride;
  const int64_t *segments, *capacity;  // [T], [D, E]
  int64_t tokens, E, D, k;
  Place* last;      // [D, E]
  Acc<T>* weights;  // [T, k]
  int32_t* ids;     // [T, k]
};

template <typename T>
MOERT_DEVICE_INLINE Place place_of(T x, int64_t t) {
  const Acc<T> score = widen(x) + Acc<T>(0);  // -0 becomes 0
  uint64_t bits;
  if constexpr (sizeof(score) == 8) {
    const uint64_t sign = uint64_t(1) << 63;
    bits = double_to_bits(score);
    bits = bits & sign ? ~bits : bits | sign;
  } else {  // the lower half is 0
    const uint32_t sign = 1u << 31, half = float_to_bits(score);
    bits = uint64_t(half & sign ? ~half : half | sign) << 32;
  }
  return {score == score ? bits : 0, 0xffffffffu - uint32_t(t)};
}

MOERT_HOST_DEVICE inline bool not_before(const Place& a, const Place& b) {
  return a.score > b.score || (a.score == b.score && a.token >= b.token);
}

// Digit `digit` of a key: those of the score, then those of the token, 8 bits each.
constexpr int kScoreDigits = 8, kDigits = 12;

MOERT_HOST_DEVICE inline int digit_of(const Place& p, int digit) {
  return int(digit < kScoreDigits ? p.score >> (56 - 8 * digit) & 255 : p.token >> (88 - 8 * digit) & 255);
}

// Whether the digits before `digit` are those of `prefix`.
MOERT_HOST_DEVICE inline bool begins_with(const Place& p, const Place& prefix, int digit) {
  if (digit == 0) return true;
  if (digit < kScoreDigits) return (p.score ^ prefix.score) >> (64 - 8 * digit) == 0;
  if (p.score != prefix.score) return false;
  return digit == kScoreDigits || (p.token ^ prefix.token) >> (96 - 8 * digit) == 0;
}

MOERT_HOST_DEVICE inline void set_digit(Place& p, int digit, uint32_t value) {
  if (digit < kScoreDigits)
    p.score |= uint64_t(value) << (56 - 8 * digit);
  else
    p.token |= value << (88 - 8 * digit);
}

constexpr int kChoiceThreads = 256;

// The digit at which, counted from the highest, place `wanted` (from 1) lies, and the places above it; one warp, all of
// its lanes.  counts [256].
struct Digit {
  uint32_t value;
  int64_t above;
};

MOERT_DEVICE_INLINE Digit find_digit(const int32_t* counts, int64_t wanted) {
  constexpr int kEach = 256 / kWarp;
  const int top = 255 - lane_id() * kEach;
  int64_t mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine += counts[top - i];
  int64_t upto = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, upto, unsigned(step));
    if (lane_id() >= step) upto += other;
  }
  const unsigned reached = __ballot_sync(kAllLanes, upto >= wanted);
  const int lane = __ffs(int(reached)) - 1;
  Digit digit{0, upto - mine};
  if (lane == lane_id())
    for (int i = 0; i < kEach; ++i) {
      digit.value = uint32_t(top - i);
      if (digit.above + counts[top - i] >= wanted) break;
      digit.above += counts[top - i];
    }
  return {__shfl_sync(kAllLanes, digit.value, lane), __shfl_sync(kAllLanes, digit.above, lane)};
}

// last[d, e]: the last token that expert e takes of segment d.
template <typename T>
__global__ void __launch_bounds__(kChoiceThreads) last_place_kernel(const ChoiceCall<T> p) {
  __shared__ int32_t counts[256];
  __shared__ Digit found;
  __shared__ int64_t there;
  const int64_t d = blockIdx.x / p.E, e = blockIdx.x % p.E;
  int64_t wanted = p.capacity[blockIdx.x];
  Place last{0, 0};
  constexpr int kHalf = sizeof(Acc<T>) == 8 ? kScoreDigits : kScoreDigits / 2;  // beyond it a score has zeros
  for (int digit = 0; digit < kDigits && wanted > 0; digit = digit + 1 == kHalf ? kScoreDigits : digit + 1) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t t = threadIdx.x; t < p.tokens; t += kChoiceThreads) {
      if (p.segments[t] != d) continue;
      const Place place = place_of(p.scores[t * p.stride + e], t);
      if (begins_with(place, last, digit)) atomicAdd(&counts[digit_of(place, digit)], 1);
    }
    __syncthreads();
    if (warp_id() == 0) {
      int64_t all = 0;
      for (int i = lane_id(); i < 256; i += kWarp) all += counts[i];
      all = warp_sum(all);
      all = wanted < all ? wanted : all;  // a segment with fewer tokens: all are taken
      const Digit digit_found = all > 0 ? find_digit(counts, all) : Digit{0, 0};
      if (lane_id() == 0) found = digit_found, there = all;
    }
    __syncthreads();
    wanted = there - found.above;
    set_digit(last, digit, found.value);
    __syncthreads();
  }
  if (threadIdx.x == 0) p.last[blockIdx.x] = wanted > 0 ? last : kNobody;
}

// ids and weights of a token, a warp's.
template <typename T>
__global__ void __launch_bounds__(kChoiceThreads, 1) fill_choices_kernel(const ChoiceCall<T> p) {
  const int64_t t = int64_t(blockIdx.x) * (kChoiceThreads / kWarp) + warp_id();
  if (t >= p.tokens) return;
  const int64_t d = p.segments[t];
  const bool in = d >= 0 && d < p.D;
  int64_t n = 0;
  for (int64_t first = 0; first < p.E; first += kWarp) {
    const int64_t e = first + lane_id();
    const bool there = in && e < p.E;
    const T score = there ? p.scores[t * p.stride + e] : T{};
    const bool taken = there && not_before(place_of(score, t), p.last[d * p.E + e]);
    const unsigned all = __ballot_sync(kAllLanes, taken);
    const int64_t j = n + __popc(all & ((1u << lane_id()) - 1));
    if (taken && j < p.k) {
      p.ids[t * p.k + j] = int32_t(e);
      p.weights[t * p.k + j] = widen(score);
    }
    n += __popc(all);
  }
  for (int64_t j = n + lane_id(); j < p.k; j += kWarp) {
    p.ids[t * p.k + j] = int32_t(p.E);
    p.weights[t * p.k + j] = 0;
  }
}

}  // namespace moert::cuda
