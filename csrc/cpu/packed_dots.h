// Products of few rows with packed weights as they lie (but bit planes, unpacked a block before): the lanes of a vector
// run along a weight row, whose bytes are unpacked once for all rows of x.  A register block is M rows of x by kBlock
// weight rows.
#pragma once

#include "cpu/packed_groups.h"

namespace moert::cpu {
namespace {

template <typename Code, Scales kScales, int M>
struct Dots {
  using Sum = std::conditional_t<kScales == Scales::none, int32_t, float>;
  static constexpr int P = Code::kPlanes, V = kVectorBytes;
  static constexpr int R = P == 1 && kInOrder<M> ? 1 : kBlock;  // weight rows at a time
  Vec<Sum> sums[M][kBlock];

  // Group of the first lane of step s.
  MOERT_INLINE static int64_t first_group(int64_t s, int shift) { return s * kStepColumns<Code> >> shift; }

  struct Weights {
    VecB planes[P];
    VecF scale;
  };

  template <bool kLast>
  MOERT_INLINE static Weights unpack(const DotBlock& b, const uint8_t* bytes, int r, int64_t s, const VecI& lanes) {
    Weights w;
    VecB codes[Code::kVectors];
    load_codes<Code, kLast>(bytes, b.vector, b.last, codes);
    Code::unpack(codes, VecB{}, w.planes);
    if constexpr (kScales == Scales::both) w.scale = pick(b.scales + r * b.pitch + first_group(s, b.shift), lanes);
    return w;
  }

  // The integers of a step.
  MOERT_INLINE static VecI integers(const Weights& w, const char* x, int code_shift) {
    const VecI bias = load_vector<VecI>(x + P * V);
    VecI sum = Code::kUnpacked ? VecI{} : bias;
    if constexpr (P == 8) {  // two chains of sums, or they wait for one another
      VecI other{};
#pragma GCC unroll 4
      for (int p = 0; p < P; p += 2) {
        sum = dot4<Code::kMaxCode>(sum, w.planes[p], load_vector<VecS>(x + p * V));
        other = dot4<Code::kMaxCode>(other, w.planes[p + 1], load_vector<VecS>(x + (p + 1) * V));
      }
      sum += other;
    } else {
      ByteDots<Code::kMaxCode> dots;
      dots.sums = sum;
#pragma GCC unroll 5
      for (int p = 0; p < P; ++p) dots.add(w.planes[p], load_vector<VecS>(x + p * V), p);
      sum = dots.total(P);
    }
    return Code::kUnpacked ? (sum << code_shift) + bias : sum;
  }

  MOERT_INLINE void multiply(const Weights& w, const char* x, const VecF& x_scale, int code_shift, Vec<Sum>& sum) {
    if constexpr (kScales == Scales::none) {
      ByteDots<Code::kMaxCode> dots;
      dots.sums = sum;
#pragma GCC unroll 5
      for (int p = 0; p < P; ++p) dots.add(w.planes[p], load_vector<VecS>(x + p * V), p);
      sum = dots.total(P);
    } else {
      sum += to_floats(integers(w, x, code_shift)) * (kScales == Scales::both ? w.scale * x_scale : x_scale);
    }
  }

  MOERT_INLINE static VecF scale_of_step(const float* x, int64_t s, const VecI& lanes) {
    if constexpr (kScales == Scales::none) return VecF{};
    return pick(x + first_group(s, kGroupShift), lanes);
  }

  template <bool kLast>
  MOERT_INLINE void step(const DotBlock& b, const uint8_t* const* bytes, const DotRow* x, int64_t s, int first,
                         const VecI& lanes, const VecI& x_lanes, Vec<Sum> (&part)[M][R]) {
    const int64_t at = s * b.layout.step_bytes;
    if constexpr (P == 1) {  // int8 with one scale a row; the weights of the block stay in registers
      static_assert(kScales == Scales::none);
      Weights w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = unpack<kLast>(b, bytes[r], first + r, s, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) multiply(w[r], x[m].data + at, VecF{}, b.code_shift, part[m][r]);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Weights w = unpack<kLast>(b, bytes[r], first + r, s, lanes);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
          multiply(w, x[m].data + at, scale_of_step(x[m].scales, s, x_lanes), b.code_shift, part[m][r]);
      }
    }
  }

  MOERT_INLINE void run(const DotBlock& b, const DotRow* x) {
    if constexpr (R == kBlock) {
      run(b, x, 0, sums);
    } else {
      for (int first = 0; first < kBlock; first += R) {
        Vec<Sum> part[M][R];
        run(b, x, first, part);
        for (int m = 0; m < M; ++m)
          for (int r = 0; r < R; ++r) sums[m][first + r] = part[m][r];
      }
    }
  }

  // The weight rows [first, first + R).
  MOERT_INLINE void run(const DotBlock& b, const DotRow* x, int first, Vec<Sum> (&part)[M][R]) {
    const VecI lanes = group_of_lane<Code>(b.shift), x_lanes = group_of_lane<Code>(kGroupShift);
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) {
        if constexpr (kScales == Scales::none)
          part[m][r] = load_vector<VecI>(x[m].data + b.layout.whole);
        else
          part[m][r] = VecF{};
      }
    const uint8_t* bytes[R];
    for (int r = 0; r < R; ++r) bytes[r] = b.codes[first + r];
    const int64_t whole = b.layout.steps - (b.last ? 1 : 0);
    for (int64_t s = 0; s < whole; ++s) {
      step<false>(b, bytes, x, s, first, lanes, x_lanes, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if constexpr (!Code::kUnpacked) __builtin_prefetch(bytes[r] + bytes_ahead<R>(b), 0, 2);
        bytes[r] += V;
      }
    }
    if constexpr (V > 16 && !Code::kUnpacked)  // rows are whole blocks of 16 bytes
      if (b.last) step<true>(b, bytes, x, whole, first, lanes, x_lanes, part);
  }
};

// c for `rows` of M rows of x.
template <typename Code, Scales kScales, int M>
void dots(const DotBlock& b, const DotRow* x, int64_t rows, float* c) {
  static_assert(kTransposed<Code> ? kScales == Scales::both : !Code::kZeros);
  std::conditional_t<kTransposed<Code>, GroupDots<Code, M>, Dots<Code, kScales, M>> dots;
  dots.run(b, x);
  store_block(b, x, rows, dots.sums, kScales, c);
}

template <typename Code, Scales kScales, int... M>
auto dots_of(int64_t m, std::integer_sequence<int, M...>) {
  using Function = void (*)(const DotBlock&, const DotRow*, int64_t, float*);
  static constexpr Function table[] = {dots<Code, kScales, rows_of_kernel(M + 1)>...};
  return table[m - 1];
}

// Scales and zeros of some weight rows, widened together.  Where scales are picked, vectors are read from any of them
// on: columns that pad a row, whose sums are 0, have those of the next one (which GroupDots masks), and the last zeros.
template <typename Code>
struct DotScales {
  static constexpr int64_t kRows = 32;  // their scales stay in a cache
  int64_t first, pitch, bytes;          // bytes: of the scratch
  float* scales;                        // [kRows, pitch]
  int32_t* zeros;                       // likewise

  DotScales(const PackedTile& t, int64_t first, int64_t rows) : first(first) {
    constexpr int64_t kBehind = 16 + kStepColumns<Code> / kGroup;
    pitch = groups(t.b.packing);
    const int64_t count = rows * pitch, size = round_up(kRows * pitch + kBehind, 16);
    scales = reinterpret_cast<float*>(t.scratch);
    zeros = reinterpret_cast<int32_t*>(scales + size);
    bytes = (Code::kZeros ? 2 : 1) * size * 4;
    // Those of the rows to come, of which the next tile begins with the first.
    const char* next = static_cast<const char*>(t.b.scales) + (first + rows) * pitch * scale_bytes(t.b.packing.format);
    for (int64_t i = 0; i < count * scale_bytes(t.b.packing.format); i += 64) __builtin_prefetch(next + i, 0, 2);
    widen_scales(t.b, first, 0, count, scales);
    std::memset(scales + count, 0, kBehind * sizeof(float));
    if constexpr (Code::kZeros) {
      widen_zeros<Code>(t.b, first, 0, count, zeros);
      std::memset(zeros + count, 0, kBehind * sizeof(int32_t));
    }
  }
};

// The weight rows from n on as a block; what is unpacked first is written to scratch.
template <typename Code>
DotBlock dot_block(const PackedTile& t, const RowLayout& layout, const DotScales<Code>& of, int64_t n) {
  const PackedRows& b = t.b;
  DotBlock block{};
  block.rows = t.N - n < kBlock ? t.N - n : kBlock;
  // Groups of 32, 64 or 128 columns; one group a row goes on for ever.
  block.shift = b.packing.group ? __builtin_ctzll(uint64_t(b.packing.group)) : 62;
  block.pitch = of.pitch;
  block.layout = layout;
  block.scales = of.scales + (n - of.first) * of.pitch;
  block.zeros = of.zeros + (n - of.first) * of.pitch;
  block.code_shift = code_shift<Code>(b.packing);
  char* scratch = t.scratch + of.bytes;
  const CodeRows rows =
      Code::kUnpacked ? unpacked_rows(b, n, block.rows, scratch) : code_rows(b, t.precision, n, block.rows, scratch);
  block.vector = rows.vector;
  block.last = Code::kUnpacked ? 0 : rows.stride % (kTransposed<Code> ? kBlockSteps * kVectorBytes : kVectorBytes);
  block.ahead = whole_blocks_ahead(kBlock * rows.stride);
  for (int64_t r = 0; r < kBlock; ++r) block.codes[r] = rows.data + smaller(r, block.rows - 1) * rows.stride;
  return block;
}

// Rows of x that are multiplied at a time: many as long as they stay in a level-1 cache of 32 KB.
template <typename Code>
MOERT_INLINE int64_t rows_at_a_time(const RowLayout& layout) {
  if constexpr (kTransposed<Code>) return kGroupM * layout.whole <= (32 << 10) ? kGroupM : kBlockM;
  return kBlockM;
}

template <typename Code, Scales kScales>
void packed_dots(const PackedTile& t) {
  using Widened = DotScales<Code>;
  const RowLayout layout = row_layout<Code>(t.b.packing.columns);
  const int64_t at_once = rows_at_a_time<Code>(layout), parts = (t.M + at_once - 1) / at_once;
  // f(m, M, x): rows of x, in equal parts.
  const auto for_parts = [&](const auto& f) {
    for (int64_t i = 0, m = 0, M; i < parts; ++i, m += M) {
      M = (t.M - m + parts - i - 1) / (parts - i);
      DotRow x[kRowsOfX<Code>];
      for (int64_t r = 0; r < rows_of_kernel(int(M)); ++r) {
        x[r].data = quantized_row(t.a, m + smaller(r, M - 1));
        x[r].scales = reinterpret_cast<const float*>(x[r].data + layout.scales);
      }
      f(m, M, x);
    }
  };
  const auto multiply = [&](const DotBlock& block, const DotRow* x, int64_t m, int64_t M, int64_t n) {
    constexpr std::make_integer_sequence<int, kRowsOfX<Code>> kCounts{};
    dots_of<Code, kScales>(M, kCounts)(block, x, M, t.c + m * kTileColumns + n);
  };
  for (int64_t first = 0; first < t.N; first += Widened::kRows) {
    const int64_t end = smaller(t.N, first + Widened::kRows);
    const Widened scales(t, first, end - first);
    if (kTransposed<Code> && !unpacks_first(t.b.packing, t.precision)) {  // rows of x stay in the cache
      for_parts([&](int64_t m, int64_t M, const DotRow* x) {
        for (int64_t n = first; n < end; n += kBlock) multiply(dot_block(t, layout, scales, n), x, m, M, n);
      });
      continue;
    }
    for (int64_t n = first; n < end; n += kBlock) {
      const DotBlock block = dot_block(t, layout, scales, n);
      for_parts([&](int64_t m, int64_t M, const DotRow* x) { multiply(block, x, m, M, n); });
    }
  }
}

}  // namespace
}  // namespace moert::cpu
