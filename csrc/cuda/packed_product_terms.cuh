// Bit-nested and sub-1-bit weights.  Of the latter f16 rows take two terms, and a span is multiplied once for each.
#pragma once

#include "cuda/packed_product_mma.cuh"

namespace moert::cuda {

// A weight is an integer times a part of the scale.  Lane t of a row has bits t, t + 4, t + 8 and so on of a word of 32
// columns, so that two of them are 16 apart and need only a shift.
struct BitNestedFragments : FragmentScale<Format::bit_nested> {
  static constexpr Format kFormat = Format::bit_nested;
};

template <>
struct FragmentRows<BitNestedFragments, 1> {
  static constexpr int kRows = 16, kMostPlanes = 8, kTermsTogether = 1;
  PackedWeights w;
  const uint8_t* from;     // of row lane % 16 in plane lane / 16
  int64_t plane_bytes;     // from a plane to the next
  int32_t at_scales[2];    // of rows g and g + 8
  int32_t planes, pieces;  // pieces: of 16 bytes in a row

  MOERT_HOST_DEVICE static int stage_bytes(const PackedWeights& w) { return int(w.matrix.packing.planes) * kRows * 16; }
  template <typename T>
  MOERT_DEVICE_INLINE static constexpr int terms() {
    return 1;
  }

  template <typename P>
  MOERT_DEVICE_INLINE FragmentRows(const P& p, int64_t expert, int64_t first) : w(BitNestedCodes::expert(p.w, expert)) {
    const Packing& packing = w.matrix.packing;
    planes = int(packing.planes), pieces = int32_t(w.row_bytes / 16);
    plane_bytes = packing.rows * w.row_bytes;
    from = w.matrix.codes + lane_id() / kRows * plane_bytes + weight_row(p, first, lane_id() % kRows) * w.row_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      at_scales[half] = int32_t(weight_row(p, first, 8 * half + lane_id() / 4)) * w.groups;
  }

  MOERT_DEVICE_INLINE void copy(int step, char* to) const {
    const bool inside = step < pieces;
#pragma unroll
    for (int j = 0; j < kMostPlanes / 2; ++j) {
      const int plane = 2 * j + lane_id() / kRows;
      if (plane < planes)
        copy_async(to + (plane * kRows + lane_id() % kRows) * 16,
                   inside ? from + 2 * j * plane_bytes + int64_t(step) * 16 : nullptr, inside);
    }
  }

  MOERT_DEVICE_INLINE int group(int step, int span) const {
    const int g = (step * step_columns(Format::bit_nested) + span * kSpanColumns) >> w.group_shift;
    return g < w.groups ? g : w.groups - 1;
  }
  MOERT_DEVICE_INLINE void read_scales(int step, uint32_t (&out)[1][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      out[0][half] = BitNestedFragments::read(w, at_scales[half] + group(step, lane_id() % 4));
  }
  // bit_nested_value is (2^shift code - zero) / 2^parts.
  MOERT_DEVICE_INLINE int shift() const { return planes < 4 ? 5 - planes : 1; }
  MOERT_DEVICE_INLINE int zero() const { return planes < 4 ? 17 - (1 << (4 - planes)) : (17 << (planes - 4)) - 1; }
  MOERT_DEVICE_INLINE int parts() const { return planes < 4 ? 1 : planes - 3; }
  template <typename T>
  MOERT_DEVICE_INLINE float scale(int, int, int, int, uint32_t bits) const {
    return BitNestedFragments::scale(bits) / float(1 << parts());
  }

  // Bits 4 j and 4 j + 16 are those of this lane's pair j of columns.
  MOERT_DEVICE_INLINE static uint32_t plane_bits(const char* step, int plane, int row, int span) {
    return *reinterpret_cast<const uint32_t*>(step + (plane * kRows + row) * 16 + 4 * span) >> lane_id() % 4;
  }
  template <typename T>
  MOERT_DEVICE_INLINE void pairs(int, const char* step, int row, int span, uint32_t, uint32_t (&out)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = 0;
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane) {
      const uint32_t word = plane_bits(step, plane, row, span);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = 2 * out[j] + (word >> 4 * j & 0x00010001u);
    }
    const uint32_t minus = kMinusBeside<T> + both_halves(uint32_t(zero()));
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = fma_pair<T>(out[j] << shift() | kPairBeside<T>, kOne<T>, minus);
  }
};

// The warp writes the digits of a step to shared memory, two bits a column as ternary2 has them: a codeword's are side
// by side in its entry of the dictionary, and eight lanes bring those of eight codewords of a row to their place.
//
// A row's low and high are bf16, and so its weights are; f16 may not hold them, and has a term where a digit is 1 and
// another where it is 2.
struct Sub1Fragments : TwoBitFragments {
  static constexpr Format kFormat = Format::sub1;
};

template <>
struct FragmentRows<Sub1Fragments, 1> {
  static constexpr int kRows = 16, kLanes = 8, kAtOnce = kWarp / kLanes, kPasses = kRows / kAtOnce;
  static constexpr int kColumns = step_columns(Format::sub1), kPieces = Sub1Fragments::kPieces, kTermsTogether = 2;
  const uint16_t* codes;  // the expert's
  const Sub1Entry* dictionary;
  uint32_t limits[2];          // low and high, bf16, of rows g and g + 8
  int32_t next[kPasses];       // of the rows of eight lanes: the first codeword that the steps so far do not end with
  int32_t end[kPasses];        // after their last
  int32_t behind[kPasses];     // digits of codeword `next` that were in the steps so far
  uint16_t codeword[kPasses];  // number next + lane % 8

  MOERT_HOST_DEVICE static int stage_bytes(const PackedWeights&) { return kRows * kPieces * 16; }
  template <typename T>
  MOERT_DEVICE_INLINE static constexpr int terms() {
    return kIsBf16<T> ? 1 : 2;
  }

  template <typename P>
  MOERT_DEVICE_INLINE FragmentRows(const P& p, int64_t expert, int64_t first) : dictionary(p.w.dictionary) {
    const PackedMatrix& m = p.w.matrix;
    const int64_t rows = m.packing.rows, start = codewords_before(p.w, expert);
    const int64_t here = start < 0 || start > m.size ? m.size : start, left = m.size - here;  // whatever the tables are
    const int32_t* ends = reinterpret_cast<const int32_t*>(m.zeros) + expert * (rows + 1);
    const uint16_t* low_high = static_cast<const uint16_t*>(m.scales) + 2 * expert * rows;
    codes = reinterpret_cast<const uint16_t*>(m.codes) + here;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int64_t n = weight_row(p, first, kAtOnce * pass + lane_id() / kLanes);
      end[pass] = ends[n + 1] < left ? ends[n + 1] : int32_t(left);
      next[pass] = ends[n] > end[pass] ? end[pass] : ends[n] < 0 ? 0 : ends[n];
      behind[pass] = 0;
      codeword[pass] = read(pass);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = weight_row(p, first, 8 * half + lane_id() / 4);
      limits[half] = low_high[2 * n] | uint32_t(low_high[2 * n + 1]) << 16;
    }
  }

  MOERT_DEVICE_INLINE bool inside(int pass) const { return lane_id() % kLanes < end[pass] - next[pass]; }
  MOERT_DEVICE_INLINE uint16_t read(int pass) const {
    return inside(pass) ? codes[next[pass] + lane_id() % kLanes] : uint16_t(0);
  }

  MOERT_DEVICE_INLINE Sub1Entry look_up(uint16_t code) const {
    const uint2 words = reinterpret_cast<const uint2*>(dictionary)[code];
    return {words.x, words.y};
  }

  // Steps must be asked for one after the other.
  MOERT_DEVICE_INLINE void copy(int, char* to) {
    store_chunk(to + lane_id() * 16, Chunk{});
    static_assert(kRows * kPieces == kWarp);
    __syncwarp();
    Sub1Entry entry[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) entry[pass] = look_up(codeword[pass]);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) write_row(pass, entry[pass], to);
    // For the next step
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) codeword[pass] = read(pass);
  }

  // The columns of this step of the rows of a pass; `entry` is that of this lane's codeword.
  MOERT_DEVICE_INLINE void write_row(int pass, Sub1Entry entry, char* to) {
    const int row = kAtOnce * pass + lane_id() / kLanes, lane = lane_id() % kLanes, lanes = lane_id() - lane;
    int at = -behind[pass];
    bool more = true;
#pragma unroll 1
    while (true) {
      const int digits = more && inside(pass) ? 2 * sub1_length(entry.data()) : 0;
      int stop = digits;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, stop, unsigned(step));
        if (lane >= step) stop += other;
      }
      stop += at;
      const int start = stop - digits;
      if (digits > 0 && start < kColumns && stop > 0) put_digits(entry, start, row, to);
      const uint32_t ended = __ballot_sync(kAllLanes, digits > 0 && stop <= kColumns) >> lanes & 0xff;
      const int count = __popc(ended);
      const int reached = __shfl_sync(kAllLanes, stop, lanes + kLanes - 1);
      const int unended = __shfl_sync(kAllLanes, start, lanes + count % kLanes);
      if (more) {
        next[pass] += count;
        behind[pass] = count < kLanes && unended < kColumns ? kColumns - unended : 0;
        more = count == kLanes && reached < kColumns;
        at = reached;
      }
      if (!__any_sync(kAllLanes, more)) break;
      entry = look_up(more ? read(pass) : uint16_t(0));
    }
  }

  // The digits of a codeword that are in the step, from column `start` on, which may be before it.
  MOERT_DEVICE_INLINE static void put_digits(const Sub1Entry& entry, int start, int row, char* to) {
    const uint64_t digits = uint64_t(entry[1] >> 4) << 28 | entry[0] >> 4;
    const uint32_t low = uint32_t(digits), high = uint32_t(digits >> 32);
    const int first = start * 2 >> 5, shift = start * 2 & 31;
    const uint32_t parts[] = {low << shift, shift_pair(low, high, shift), shift_pair(high, 0, shift)};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int word = first + i;
      if (parts[i] == 0 || word < 0 || word >= 2 * kColumns / 32) continue;
      char* const piece = to + (row * kPieces + Sub1Fragments::place(row, word / 4)) * 16;
      atomicOr(reinterpret_cast<uint32_t*>(piece) + word % 4, parts[i]);
    }
  }

  MOERT_DEVICE_INLINE void read_scales(int, uint32_t (&out)[1][2]) const {
    out[0][0] = limits[0], out[0][1] = limits[1];
  }
  // A digit of 2 is 2 where an f16 has it.
  template <typename T>
  MOERT_DEVICE_INLINE float scale(int term, int, int, int, uint32_t bits) const {
    if (kIsBf16<T>) return 1;
    return term == 0 ? bits_to_float(bits << 16) : 0.5f * bits_to_float(bits & 0xffff0000u);
  }
  template <typename T>
  MOERT_DEVICE_INLINE void pairs(int term, const char* step, int row, int span, uint32_t bits,
                                 uint32_t (&out)[4]) const {
    const uint32_t half = Sub1Fragments::load(step, row, span, lane_id() % 4);
    if constexpr (kIsBf16<T>) {
      // Digit d is bytes 2 d and 2 d + 1 of 0, low and high.
      const uint32_t zero_low = bits << 16, high = bits >> 16;
#pragma unroll
      for (int c = 0; c < 4; ++c) out[c] = permute_bytes(zero_low, high, (half >> 2 * c & 0x0303u) * 0x22u + 0x1010u);
    } else {
      const uint32_t word = permute_bytes(half, 0, 0x4140), digit = term == 0 ? 0x00010001u : 0x00020002u;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        out[c] = fma_pair<T>(and_or(word >> 2 * c, digit, kPairBeside<T>), kOne<T>, kMinusBeside<T>);
    }
  }
};

}  // namespace moert::cuda
