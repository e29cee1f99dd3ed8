// Packed rows in tile registers: for rows of int8 as they are or as int8 of one scale a row, as bfloat16 for others.
#include "cpu/packed_amx.h"
#include "cpu/packed_requantize.h"

namespace moert::cpu::amx {

namespace {

// The values of all codes of 4 bits.
alignas(64) constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr float kTwiceE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// What the codes of 32 columns stand for: a byte that is widened to 32 bits and shifted by 12 onto itself has the even
// column's code in its lowest bits and the odd one's in those from 16 on; the look-up reads no bits but 5 of each 16,
// of which the table, twice 16 values, makes one void.
MOERT_INLINE __m512i look_up(const uint8_t* bytes, __m512i table) {
  const __m512i wide = _mm512_cvtepu8_epi32(load_vector<__m128i>(bytes));
  return _mm512_permutexvar_epi16(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)), table);
}

// f(g, scale, first column, end) for the groups of row n.
template <typename F>
MOERT_INLINE void for_groups(const PackedRows& b, int64_t n, const F& f) {
  const Packing& p = b.packing;
  const int64_t per_row = groups(p), columns = p.group ? p.group : p.columns;
  for (int64_t first = 0; first < per_row; first += kSegmentGroups) {
    const int64_t count = smaller(kSegmentGroups, per_row - first);
    float scales[kSegmentGroups];
    widen_scales(b, n, first, count, scales);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = (first + i) * columns;
      f(first + i, scales[i], column, smaller(p.columns, column + columns));
    }
  }
}

// Two codes a byte: for every group a table of its 16 values.
template <Format kFormat>
void table_row(const PackedRows& b, int64_t n, bf16* out) {
  const uint8_t* row = b.codes + n * row_bytes(b.packing);
  const uint8_t* zeros = b.zeros ? b.zeros + n * groups(b.packing) : nullptr;
  const __m512 values = _mm512_load_ps(kFormat == Format::mxfp4 ? kTwiceE2m1 : kInt4Values);
  for_groups(b, n, [&](int64_t g, float scale, int64_t column, int64_t end) {
    __m512 codes = values;
    if constexpr (kFormat == Format::int4_asymmetric) codes = _mm512_add_ps(codes, _mm512_set1_ps(8 - float(zeros[g])));
    const __m256bh scaled = _mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(scale)));
    const __m512i table = _mm512_broadcast_i64x4(bit_cast_vector<__m256i>(scaled));
    __builtin_prefetch(row + column / 2 + kAheadBytes / 2, 0, 2);
    for (; column < end; column += kStep) store_vector(out + column, look_up(row + column / 2, table));
  });
}

void int8_row(const PackedRows& b, int64_t n, bf16* out) {
  const int64_t bytes = row_bytes(b.packing);
  const uint8_t* row = b.codes + n * bytes;
  for_groups(b, n, [&](int64_t, float scale, int64_t column, int64_t end) {
    for (; column < end; column += kStep) {
      const bool whole = bytes - column >= kStep;  // else the row ends after 16 bytes, and perhaps the memory
      const VecF low = to_floats(widen_codes(row + column)) * scale;
      store_step(out + column, low, whole ? to_floats(widen_codes(row + column + kStep / 2)) * scale : VecF{});
      __builtin_prefetch(row + column + kAheadBytes / 2, 0, 2);
    }
  });
}

template <typename Row>
void step_row(const PackedRows& b, int64_t n, bf16* out) {
  Row row(b, n);
  for (int64_t s = 0; s * kStep < b.packing.columns; ++s) {
    VecF v[kStepVectors];
    const float scale = row.step(s, v);
    store_step(out + s * kStep, v[0] * Row::kFactor * scale, v[1] * Row::kFactor * scale);
  }
}

// Fewer rows of x do not fill a tile, and come at memory's speed as dot products; where weights are unpacked before
// either, tiles are faster from 4 rows on (measured: docs/quantized.md).
constexpr int64_t kTileRowsAtLeast = 8, kRequantizedRowsAtLeast = 4;

}  // namespace

void packed_gemm(const PackedTile& t) {
  static thread_local LaidOut last;
  const LaidOut before = std::exchange(last, {});
  const Packing& packing = t.b.packing;
  const bool requantized_first = requantizes(packing, t.precision), in_groups = packing.group && !requantized_first;
  const int64_t least = requantized_first ? kRequantizedRowsAtLeast : kTileRowsAtLeast;
  if (!is_int8_row(t.precision) || in_groups || packing.columns == 0 || t.M < least)
    return avx512_vnni::packed_gemm_kernels.gemm(t);
  bool ready = t.same_a && before.scratch == t.scratch && before.number == t.same_a;
  if (requantized_first)
    requantized(t, [&](const PackedTile& part) { ready = packed_tiles<Int8Code>(part, ready); });
  else if (packing.format == Format::ternary2)
    ready = packed_tiles<Ternary2Code>(t, ready);
  else if (packing.format == Format::ternary5)
    ready = packed_tiles<Ternary5Code>(t, ready);
  else
    ready = packed_tiles<Int8Code>(t, ready);
  if (ready) last = {t.scratch, t.same_a};
}

void dequantize_bf16(const PackedRows& b, int64_t N, bf16* out, int64_t stride, float* row) {
  static_assert(kBf16Step == kStep && kStepVectors == 2);
  using Row = void (*)(const PackedRows&, int64_t, bf16*);
  static constexpr Row rows[kFormats] = {int8_row,
                                         table_row<Format::int4>,
                                         table_row<Format::int4_asymmetric>,
                                         table_row<Format::mxfp4>,
                                         dequantize_row<Format::ternary2, bf16>,
                                         dequantize_row<Format::ternary5, bf16>,
                                         step_row<Fp8Row>,
                                         step_row<BitNestedRow>,
                                         nullptr};
  const Row of_format = rows[int(b.packing.format)];
  if (!of_format) return dequantize_bf16_rows(b, N, out, stride, row);
  for (int64_t n = 0; n < N; ++n) of_format(b, n, out + n * stride);
}

}  // namespace moert::cpu::amx
