// Rows of activations as int8, in the order in which the codes of a format are multiplied.
//
// A row is: for each step (a vector of packed bytes) kPlanes vectors of int8, which are the columns of those planes,
// and a vector of int32 lanes, minus code_bias times the sum of what the lane multiplies; then the lanes of the whole
// row, the scale of every 32 columns (the same for all that share one), and minus code_bias times the sum of every 32
// columns. Of codes that are kTransposed 4 steps are a block instead: every plane of each of the 4 vectors, transposed,
// then minus code_bias times the sum of each lane's columns, and their scale; the lanes of the whole row are not used.
#pragma once

#include "cpu/packed_codes.h"

namespace moert::cpu {
namespace {

constexpr int kGroupShift = 5;
constexpr int64_t kGroup = 1 << kGroupShift;
constexpr int64_t kRowGroup = 160;       // of int8_group160: whole groups, and whole lanes of ternary5
constexpr int64_t kPanelColumns = 1024;  // of a panel at most: with 16 rows it is 16 KiB, half of a level-1 cache
constexpr int64_t kPanelGroups = kPanelColumns / kGroup;

MOERT_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

MOERT_INLINE constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Where the parts of a row lie, in bytes.
struct RowLayout {
  int64_t steps, step_bytes, whole, scales, sums, bytes;
};

// Codes whose integers belong to 32 columns: the words of four steps are transposed in every 16 bytes, so that a lane
// has the kLaneColumns of 16 bytes.
constexpr int64_t kBlockSteps = 4;
template <typename Code>
constexpr bool kTransposed = Code::kPlanes == 2 || std::is_same_v<Code, Int8GroupCode>;
template <typename Code>
constexpr int64_t kLaneColumns = 16 * Code::kPlanes;
template <typename Code>
constexpr int64_t kBlockBytes = (kBlockSteps * Code::kPlanes + 2) * kVectorBytes;

MOERT_INLINE int64_t row_blocks(const RowLayout& row) { return (row.steps + kBlockSteps - 1) / kBlockSteps; }

// Which columns of a block are in each lane, in groups of 2^shift.
template <typename Code>
MOERT_INLINE VecI group_of_block_lane(int shift) {
  VecI groups;
  for (int i = 0; i < kLanes<int32_t>; ++i)
    groups[i] = int32_t((i % 4 * (kVectorBytes / 16) + i / 4) * kLaneColumns<Code> >> shift);
  return groups;
}

template <typename Code>
MOERT_INLINE RowLayout row_layout(int64_t columns) {
  RowLayout row;
  row.steps = (columns + kStepColumns<Code> - 1) / kStepColumns<Code>;
  row.step_bytes = kTransposed<Code> ? 0 : (Code::kPlanes + 1) * kVectorBytes;
  const int64_t blocks = kTransposed<Code> ? row_blocks(row) : 0;
  row.whole = round_up(row.steps * row.step_bytes + blocks * kBlockBytes<Code>, 64);
  row.scales = row.whole + 64;
  // A panel's worth of scales, or a vector, is read from any of them on.
  const int64_t groups = (row.steps * kStepColumns<Code> + kGroup - 1) / kGroup + kPanelGroups;
  row.sums = row.scales + round_up(4 * groups, 64);
  row.bytes = row.sums + round_up(4 * groups, 64);
  return row;
}

MOERT_INLINE const char* quantized_row(const QuantizedRows& rows, int64_t r) {
  return rows.data + (rows.index ? rows.index[r] : r) * rows.stride;
}

// row_scale of the largest.
float scale_of(const float* x, int64_t n) {
  VecF largest{};
  VecI bad{};
  for_vectors<float>(n, [&](int64_t i, auto count) {
    const VecI bits = bit_cast_vector<VecI>(load(x + i, count)) & 0x7fffffff;
    largest = max(largest, bit_cast_vector<VecF>(bits));
    bad |= bits >= 0x7f800000;
  });
  float most = 0;
  int32_t any = 0;
  for (int i = 0; i < kLanes<float>; ++i) most = most < largest[i] ? largest[i] : most, any |= bad[i];
  return row_scale(any ? 0x7f800000u : float_to_bits(most), kLargestInt8);
}

MOERT_INLINE void narrow_codes(const VecI& x, int8_t* out) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8(bit_cast_vector<__m512i>(x));
  store_vector(out, bytes);
#else
  for (int i = 0; i < kLanes<float>; ++i) out[i] = int8_t(x[i]);
#endif
}

// q = x / scale of the group for `n` columns from `first` on, zeros past the last column.
MOERT_INLINE void quantize_columns(const float* x, int64_t columns, const float* scales, int64_t first, int64_t n,
                                   int8_t* q) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const int64_t column = first + i, left = columns - column;
    const float scale = scales[column / kGroup];
    if (left <= 0 || !(scale > 0)) {
      std::memset(q + i, 0, kLanes<float>);
      continue;
    }
    const VecF values = left >= kLanes<float> ? load(x + column) : load_first(x + column, left);
    narrow_codes(nearest_integers(values / scale), q + i);
  }
}

template <typename Code>
void split_planes(const int8_t* q, int8_t* planes) {
  constexpr int64_t P = Code::kPlanes, V = kVectorBytes;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t b = 0; b < V; ++b) planes[p * V + b] = q[b * P + p];
}

// The steps of a row as blocks.
template <typename Code>
void quantize_blocks(const float* x, int64_t columns, int64_t steps, const float* scales, int bias, int32_t* sums,
                     char* row) {
  constexpr int64_t P = Code::kPlanes, V = kVectorBytes, kColumns = kStepColumns<Code>;
  const VecI lanes = group_of_block_lane<Code>(kGroupShift);
  const VecI order = group_of_block_lane<Code>(__builtin_ctz(kLaneColumns<Code>));
  for (int64_t first = 0; first < steps; first += kBlockSteps, row += kBlockBytes<Code>) {
    int8_t planes[kBlockSteps][P * V] = {};
    int32_t lane_sums[V / 4] = {};
    for (int64_t s = first; s < smaller(steps, first + kBlockSteps); ++s) {
      int8_t q[kColumns];
      quantize_columns(x, columns, scales, s * kColumns, kColumns, q);
      for (int64_t i = 0; i < kColumns; i += kLaneColumns<Code>) {
        int32_t sum = 0;
        for (int64_t j = 0; j < kLaneColumns<Code>; ++j) sum += q[i + j];
        lane_sums[((s - first) * kColumns + i) / kLaneColumns<Code>] = -bias * sum;
        sums[(s * kColumns + i) / kGroup] -= bias * sum;
      }
      split_planes<Code>(q, planes[s - first]);
    }
    for (int64_t p = 0; p < P; ++p) {
      VecI words[kBlockSteps];
      for (int64_t i = 0; i < kBlockSteps; ++i) words[i] = load_vector<VecI>(planes[i] + p * V);
      transpose_words(words);
      for (int64_t i = 0; i < kBlockSteps; ++i) store_vector(row + (i * P + p) * V, words[i]);
    }
    store_vector(row + kBlockSteps * P * V, pick(lane_sums, order));
    store_vector(row + (kBlockSteps * P + 1) * V, pick(scales + first * kColumns / kGroup, lanes));
  }
}

// The steps of a row; the sums of its lanes go to `whole`, those of every 32 columns to `sums`.
template <typename Code>
void quantize_steps(const float* x, int64_t columns, const RowLayout& layout, const float* scales, int bias,
                    int32_t* whole, int32_t* sums, char* row) {
  constexpr int64_t P = Code::kPlanes, V = kVectorBytes, kColumns = kStepColumns<Code>;
  for (int64_t s = 0; s < layout.steps; ++s) {
    int8_t q[kColumns];
    quantize_columns(x, columns, scales, s * kColumns, kColumns, q);
    for (int64_t i = 0; i < kColumns; i += 16) {
      int32_t sum = 0;
      for (int64_t j = 0; j < 16; ++j) sum += q[i + j];
      sums[(s * kColumns + i) / kGroup] -= bias * sum;
    }
    int8_t* step = reinterpret_cast<int8_t*>(row + s * layout.step_bytes);
    split_planes<Code>(q, step);
    int32_t lanes[V / 4];
    for (int64_t lane = 0; lane < V / 4; ++lane) {
      int32_t sum = 0;
      for (int64_t i = 0; i < 4 * P; ++i) sum += q[lane * 4 * P + i];
      lanes[lane] = -bias * sum;
      whole[lane] += lanes[lane];
    }
    std::memcpy(step + P * V, lanes, sizeof lanes);
  }
}

template <typename Code>
void quantize_row_of(const float* x, int64_t columns, Precision precision, int bias, char* row) {
  const RowLayout layout = row_layout<Code>(columns);
  std::memset(row + layout.whole, 0, size_t(layout.bytes - layout.whole));
  float* scales = reinterpret_cast<float*>(row + layout.scales);
  const int64_t each = precision == Precision::int8_group32    ? kGroup
                       : precision == Precision::int8_group160 ? kRowGroup
                                                               : columns;
  for (int64_t i = 0; i < columns; i += each) {
    const int64_t end = smaller(columns, i + each);
    std::fill(scales + i / kGroup, scales + (end + kGroup - 1) / kGroup, scale_of(x + i, end - i));
  }
  int32_t* sums = reinterpret_cast<int32_t*>(row + layout.sums);
  if constexpr (kTransposed<Code>)
    quantize_blocks<Code>(x, columns, layout.steps, scales, bias, sums, row);
  else
    quantize_steps<Code>(x, columns, layout, scales, bias, reinterpret_cast<int32_t*>(row + layout.whole), sums, row);
}

int64_t quantized_row_bytes(const Packing& p, Precision precision) {
  return with_code(p, precision, [&](auto code) { return row_layout<decltype(code)>(p.columns).bytes; });
}

void quantize_row(const float* x, const Packing& p, Precision precision, char* row) {
  with_code(p, precision, [&](auto code) {
    using Code = decltype(code);
    quantize_row_of<Code>(x, p.columns, precision, code_bias<Code>(p), row);
  });
}

}  // namespace
}  // namespace moert::cpu
