// Packed rows as the kernels read them: where each row's codes are, and its scales and zeros as vectors.
#pragma once

#include "cpu/packed_activations.h"

namespace moert::cpu {
namespace {

// f16 scales, or e8m0 ones times 1/2 because Mxfp4Code doubles its values; `first`, `n`: of one row's groups.
MOERT_INLINE void widen_scales(const PackedRows& b, int64_t row, int64_t first, int64_t n, float* out) {
  const int64_t at = row * groups(b.packing) + first;
  if (b.packing.format != Format::mxfp4) {
    const f16* scales = static_cast<const f16*>(b.scales) + at;
    for_vectors<float>(n, [&](int64_t i, auto count) { store(out + i, load(scales + i, count), count); });
    return;
  }
  const uint8_t* scales = static_cast<const uint8_t*>(b.scales) + at;
  for (int64_t i = 0; i < n; ++i) {
    // 2^(byte - 128): subnormal below 2, and 255 is NaN.
    const uint32_t byte = scales[i], normal = (byte - 1) << 23, small = 0x00200000u << byte;
    out[i] = bits_to_float(byte == 255 ? 0x7fc00000u : byte < 2 ? small : normal);
  }
}

// kBias - zero in each of four bytes.
template <typename Code>
MOERT_INLINE void widen_zeros(const PackedRows& b, int64_t row, int64_t first, int64_t n, int32_t* out) {
  const uint8_t* zeros = b.zeros + row * groups(b.packing) + first;
  for (int64_t i = 0; i < n; ++i) out[i] = int32_t(uint8_t(Code::kBias - zeros[i]) * 0x01010101u);
}

// The packed bytes of some rows: in place, or ternary5 unpacked to int8.
struct CodeRows {
  const uint8_t* data;
  int64_t stride;  // also the bytes of a row
};

// Room for so many unpacked rows.
constexpr int64_t kUnpackedRows = 16;

MOERT_INLINE CodeRows code_rows(const PackedRows& b, Precision precision, int64_t row, int64_t n, char* scratch) {
  const int64_t bytes = row_bytes(b.packing);
  const uint8_t* data = b.codes + row * bytes;
  if (!unpacks_first(b.packing, precision)) return {data, bytes};
  const int64_t columns = b.packing.columns, stride = round_up(columns, 16);
  uint8_t* out = reinterpret_cast<uint8_t*>(scratch);
  for (int64_t r = 0; r < n; ++r, data += bytes) {
    uint8_t* q = out + r * stride;
    for (int64_t i = 0; i < columns; ++i) q[i] = uint8_t(FiveTritsAByte::code(data[i / 5], int(i % 5)) - 1);
    std::memset(q + columns, 0, size_t(stride - columns));
  }
  return {out, stride};
}

// Lane l of a step belongs to group (l * columns of a lane) / group, counted from first_group.
template <typename Code>
MOERT_INLINE VecI group_of_lane(int64_t group) {
  VecI lanes;
  for (int i = 0; i < kLanes<int32_t>; ++i) lanes[i] = int32_t(i * 4 * Code::kPlanes / group);
  return lanes;
}

}  // namespace
}  // namespace moert::cpu
