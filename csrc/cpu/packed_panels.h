// Products of many rows with packed weights: kLanes weight rows become a panel whose vectors hold four columns of each
// of them, so that a lane is a weight row and a scale of the activations is one number.  The micro kernel broadcasts
// four columns of x and keeps M rows of sums in registers.
#pragma once

#include "cpu/packed_dots.h"

#if defined(__AVX2__)  // the portable kernels have dot products only

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kPanelM = 12;  // 12 integer sums and 12 float32 ones, a vector of the panel and one of scales
constexpr int kUnroll = 2;   // of so many multiply-adds the loop is nothing, and code takes time to compile
#else
constexpr int kPanelM = 4;
constexpr int kUnroll = 8;
#endif
constexpr int64_t kPanelN = kLanes<int32_t>;

template <typename Code>
constexpr int64_t kPanelSteps = kPanelColumns / kStepColumns<Code>;

// What the micro kernel knows of a code; few enough kinds.
template <int kCodePlanes, int kCodeMax, bool kCodeUnpacked>
struct PanelCode {
  static constexpr int kPlanes = kCodePlanes, kMaxCode = kCodeMax;
  static constexpr bool kUnpacked = kCodeUnpacked;
};
constexpr int panel_max(int code) {
  if (code == kSigned) return code;
  if (kOnlyAvx2)  // whose 16 bits hold more sums of smaller codes
    for (int most : {3, 15, 30})
      if (code <= most) return most;
  return code <= 129 ? 129 : 255;
}
template <typename Code>
using PanelOf = PanelCode<Code::kPlanes, panel_max(Code::kMaxCode), Code::kUnpacked>;

// One row of x for the columns of a panel.
struct PanelRow {
  int8_t x[kPanelColumns];
  float scales[kPanelGroups];
  int32_t sums[kPanelGroups];
  int32_t pad[16];  // rows start on different cache sets
};

struct PanelMemory {
  uint8_t codes[kPanelColumns * kPanelN];
  float scales[kPanelGroups * kPanelN];   // [group of 32, weight row]
  int32_t zeros[kPanelGroups * kPanelN];  // likewise
  float rows[kPanelN * (kPanelGroups + 16)];
  PanelRow x[kTileRows];
};

// The planes of a block's steps one after the other.
template <typename Code>
void steps_of_block(const char* block, int8_t* out) {
  constexpr int64_t P = Code::kPlanes, V = kVectorBytes;
  static_assert(kPanelSteps<Code> % kBlockSteps == 0);
  for (int64_t p = 0; p < P; ++p) {
    VecI words[kBlockSteps];
    for (int64_t i = 0; i < kBlockSteps; ++i) words[i] = load_vector<VecI>(block + (i * P + p) * V);
    transpose_words(words);
    for (int64_t i = 0; i < kBlockSteps; ++i) store_vector(out + (i * P + p) * V, words[i]);
  }
}

// The steps [first, first + steps) of all rows of x.
template <typename Code>
void gather_rows(const PackedTile& t, const RowLayout& layout, int64_t first, int64_t steps, PanelRow* out) {
  constexpr int64_t kBytes = Code::kPlanes * kVectorBytes;
  const int64_t at = first * kStepColumns<Code> / kGroup * 4;
  for (int64_t m = 0; m < t.M; ++m) {
    const char* row = quantized_row(t.a, m);
    if constexpr (kTransposed<Code>)
      for (int64_t s = 0; s < steps; s += kBlockSteps)
        steps_of_block<Code>(row + (first + s) / kBlockSteps * kBlockBytes<Code>, out[m].x + s * kBytes);
    else
      for (int64_t s = 0; s < steps; ++s)
        std::memcpy(out[m].x + s * kBytes, row + (first + s) * layout.step_bytes, kBytes);
    std::memcpy(out[m].scales, row + layout.scales + at, sizeof out[m].scales);
    std::memcpy(out[m].sums, row + layout.sums + at, sizeof out[m].sums);
  }
}

// in [kPanelN, n] to out [n, kPanelN], rows of `in` `pitch` apart.
template <typename T>
__attribute__((noinline)) void transpose_rows(const T* in, int64_t pitch, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kPanelN) {
    Vec<T> rows[kPanelN];
#pragma GCC unroll 16
    for (int r = 0; r < kPanelN; ++r) rows[r] = load_vector<Vec<T>>(in + r * pitch + i);
    transpose<kPanelN / 2>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < kPanelN; ++r) store_vector(out + (i + r) * kPanelN, rows[r]);
  }
}

// The scales (and zeros) of the panel's columns for every 32 of them.
template <typename Code>
void panel_scales(const PackedTile& t, int64_t n, int64_t rows, int64_t column, PanelMemory& memory) {
  constexpr int64_t kPitch = kPanelGroups + 16;
  const Packing& p = t.b.packing;
  const int64_t first = p.group ? column / p.group : 0, each = p.group ? p.group / kGroup : kPanelGroups;
  const int64_t count = kPanelGroups / each, there = smaller(count, groups(p) - first);
  const auto spread = [&](auto* values, const auto& read) {
    using T = std::remove_pointer_t<decltype(values)>;
    T* in = reinterpret_cast<T*>(memory.rows);
    std::memset(in, 0, sizeof memory.rows);
    for (int64_t r = 0; r < rows; ++r) read(n + r, in + r * kPitch);
    transpose_rows<T>(in, kPitch, count, values);
    // From the last group on, so that none is overwritten before it is read.
    for (int64_t g = kPanelGroups - 1; g > 0 && each > 1; --g)
      std::memmove(values + g * kPanelN, values + g / each * kPanelN, kPanelN * sizeof(T));
  };
  spread(memory.scales, [&](int64_t row, float* out) { widen_scales(t.b, row, first, there, out); });
  if constexpr (Code::kZeros)
    spread(memory.zeros, [&](int64_t row, int32_t* out) { widen_zeros<Code>(t.b, row, first, there, out); });
}

// out [kPanelN, kPanelN], four bytes of a row each: a vector of packed bytes of each row, transposed.  left: bytes from
// there to the end of a row; rows behind the last are zeros.
MOERT_INLINE void load_lanes(const uint8_t* bytes, int64_t stride, int64_t rows, int64_t left, VecI* out) {
#pragma GCC unroll 16
  for (int r = 0; r < kPanelN; ++r) {
    out[r] = VecI{};
    if (r >= rows) continue;
    const uint8_t* row = bytes + r * stride;
    out[r] = left >= kVectorBytes ? load_vector<VecI>(row) : bit_cast_vector<VecI>(load_last(row, left));
    __builtin_prefetch(row + kPanelN * stride, 0, 2);
  }
  transpose<kPanelN / 2>(out);
}

// The codes of weight rows [0, rows) for steps [first, first + steps): for each step and lane the planes' vectors.
// vectors: of packed bytes in a step.
template <typename Code>
void panel_codes(const CodeRows& source, int64_t vectors, int64_t rows, int64_t first, int64_t steps,
                 PanelMemory& memory) {
  constexpr int64_t P = Code::kPlanes, V = kVectorBytes;
  uint8_t* out = memory.codes;
  for (int64_t s = first; s < first + steps; ++s) {
    VecI lanes[Code::kVectors][kPanelN];
    const int64_t left = source.stride - s * V;
    for (int64_t i = 0; i < vectors; ++i)
      load_lanes(source.data + i * source.vector + s * V, source.stride, rows, left, lanes[i]);
    if constexpr (Code::kUnpacked) {
      const uint8_t* bits = reinterpret_cast<const uint8_t*>(lanes);
      unpack_planes(vectors, {bits, kPanelN * V, kPanelN * V, out, V, P * V});
      out += kPanelN * P * V;
    } else {
      for (int64_t lane = 0; lane < kPanelN; ++lane, out += P * V) {
        VecB zeros{}, planes[P];
        if constexpr (Code::kZeros) {
          const int64_t group = ((s - first) * kStepColumns<Code> + lane * 4 * P) / kGroup;
          zeros = load_vector<VecB>(memory.zeros + group * kPanelN);
        }
        const VecB codes = bit_cast_vector<VecB>(lanes[0][lane]);
        Code::unpack(&codes, zeros, planes);
        for (int p = 0; p < P; ++p) store_vector(out + p * V, planes[p]);
      }
    }
  }
}

MOERT_INLINE VecS broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return bit_cast_vector<VecS>(splat(four));
}

// Four columns of every plane, of lane `lane` of step s, times those of M rows of x; the first of these sums is the
// i-th.
template <typename Code, int M>
MOERT_INLINE void panel_lane(const uint8_t* codes, const PanelRow* x, int64_t s, int64_t lane,
                             ByteDots<Code::kMaxCode>* dots, int i) {
  constexpr int64_t P = Code::kPlanes, V = kVectorBytes;
#pragma GCC unroll kUnroll
  for (int p = 0; p < P; ++p) {
    const VecB code = load_vector<VecB>(codes + ((s * kPanelN + lane) * P + p) * V);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) dots[m].add(code, broadcast4(x[m].x + (s * P + p) * V + 4 * lane), i + p);
  }
}

// c [M, kPanelN] += the panel's columns, scaled every 32 of them, of ternary5 every kRowGroup.
template <typename Code, int M>
void panel_groups(const PanelMemory& memory, const PanelRow* x, int64_t steps, int code_shift, float* c) {
  constexpr int64_t kColumns = Code::kPlanes == 5 ? kRowGroup : kGroup, kGroups = kColumns / kGroup;
  constexpr int64_t kLanesPerGroup = kColumns / (4 * Code::kPlanes), kGroupsPerStep = kPanelN / kLanesPerGroup;
  const auto bias = [](const PanelRow& row, int64_t g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < kGroups; ++i) sum += row.sums[g + i];
    return sum;
  };
  VecF total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) total[m] = load(c + m * kTileColumns);
  for (int64_t s = 0, g = 0; s < steps; ++s)
    for (int64_t first = 0; first < kGroupsPerStep * kLanesPerGroup; first += kLanesPerGroup, g += kGroups) {
      ByteDots<Code::kMaxCode> dots[M];
      VecI sums[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) dots[m].sums = Code::kUnpacked ? VecI{} : splat(bias(x[m], g));
#pragma GCC unroll kUnroll
      for (int lane = 0; lane < kLanesPerGroup; ++lane)
        panel_lane<Code, M>(memory.codes, x, s, first + lane, dots, lane * Code::kPlanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        sums[m] = dots[m].total(kLanesPerGroup * Code::kPlanes);
        if constexpr (Code::kUnpacked) sums[m] = (sums[m] << code_shift) + bias(x[m], g);
      }
      const VecF scale = load(memory.scales + g * kPanelN);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) total[m] += to_floats(sums[m]) * (scale * x[m].scales[g]);
    }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store(c + m * kTileColumns, total[m]);
}

// c as int32: sums of integers along the whole row.
template <typename Code, int M>
void panel_integers(const PanelMemory& memory, const PanelRow* x, int64_t steps, float* c) {
  ByteDots<Code::kMaxCode> dots[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) dots[m].sums = load_vector<VecI>(c + m * kTileColumns);
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t lane = 0; lane < kPanelN; ++lane) {
      panel_lane<Code, M>(memory.codes, x, s, lane, dots, 0);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) dots[m].sums = dots[m].total(Code::kPlanes);
    }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_vector(c + m * kTileColumns, dots[m].sums);
}

template <typename Code, Scales kScales, int M>
void panel_rows(const PanelMemory& memory, const PanelRow* x, int64_t steps, [[maybe_unused]] int code_shift,
                float* c) {
  if constexpr (kScales == Scales::none)
    panel_integers<Code, M>(memory, x, steps, c);
  else
    panel_groups<Code, M>(memory, x, steps, code_shift, c);
}

template <typename Code, Scales kScales, int... M>
auto panel_rows_of(int64_t m, std::integer_sequence<int, M...>) {
  using Function = void (*)(const PanelMemory&, const PanelRow*, int64_t, int, float*);
  static constexpr Function table[] = {panel_rows<Code, kScales, M + 1>...};
  return table[m - 1];
}

// c [n] before the first panel: 0, or the integer that takes the bias off.
void begin_row(float* c, int64_t n, bool integers, const int32_t* whole) {
  int32_t sum = 0;
  for (int lane = 0; integers && lane < kLanes<int32_t>; ++lane) sum += whole[lane];
  const float bits = bits_to_float(uint32_t(sum));
  for (int64_t i = 0; i < n; ++i) c[i] = bits;
}

// Where every scale belongs to a whole row: c, so far the integers, times both.
void scale_integers(const PackedTile& t, int64_t scales_at) {
  float w[kTileColumns];
  for (int64_t n = 0; n < t.N; ++n) widen_scales(t.b, n, 0, 1, w + n);
  for (int64_t m = 0; m < t.M; ++m) {
    const float x = *reinterpret_cast<const float*>(quantized_row(t.a, m) + scales_at);
    float* c = t.c + m * kTileColumns;
    for (int64_t n = 0; n < t.N; ++n) {
      int32_t sum;
      std::memcpy(&sum, c + n, 4);
      c[n] = float(sum) * w[n] * x;
    }
  }
}

template <typename Code, Scales kScales>
void packed_panels(const PackedTile& t) {
  PanelMemory& memory = *reinterpret_cast<PanelMemory*>(t.scratch);
  char* unpacked = t.scratch + round_up(sizeof(PanelMemory), 64);
  const RowLayout layout = row_layout<Code>(t.b.packing.columns);
  for (int64_t m = 0; m < t.M; ++m)
    begin_row(t.c + m * kTileColumns, round_up(t.N, kPanelN), kScales == Scales::none,
              reinterpret_cast<const int32_t*>(quantized_row(t.a, m) + layout.whole));
  for (int64_t s = 0; s < layout.steps; s += kPanelSteps<Code>) {
    const int64_t steps = smaller(kPanelSteps<Code>, layout.steps - s);
    gather_rows<Code>(t, layout, s, steps, memory.x);
    for (int64_t n = 0; n < t.N; n += kPanelN) {
      const int64_t rows = smaller(kPanelN, t.N - n);
      if (kScales != Scales::none) panel_scales<Code>(t, n, rows, s * kStepColumns<Code>, memory);
      const CodeRows source = code_rows(t.b, t.precision, n, rows, unpacked);
      panel_codes<Code>(source, Code::kUnpacked ? t.b.packing.planes : 1, rows, s, steps, memory);
      const int64_t slabs = (t.M + kPanelM - 1) / kPanelM;
      for (int64_t i = 0, m = 0, M; i < slabs; ++i, m += M) {
        M = (t.M - m + slabs - i - 1) / (slabs - i);
        panel_rows_of<PanelOf<Code>, kScales>(M, std::make_integer_sequence<int, kPanelM>{})(
            memory, memory.x + m, steps, code_shift<Code>(t.b.packing), t.c + m * kTileColumns + n);
      }
    }
  }
  if (kScales == Scales::none) scale_integers(t, layout.scales);
}

}  // namespace
}  // namespace moert::cpu

#endif
