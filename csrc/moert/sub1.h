// QMoE's code for mostly-zero ternary weights: below one bit a weight.
//
// A digit is 0 (zero), 1 (the row's low) or 2 (its high).  Two neighbouring columns make a symbol, d[2i] + 3 d[2i+1];
// an odd last column has a 0 beside it.  A codeword of 16 bits stands for 1 to 14 symbols out of one dictionary, which
// is computed, not stored, and the same everywhere.  A row is the greedy longest-match parse of its symbols.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "moert/dtype.h"

namespace moert {

constexpr int kSub1Symbols = 9;
constexpr int kSub1Longest = 14;  // symbols of a codeword
constexpr int64_t kSub1Size = 65536;
constexpr double kSub1Zero = 0.885;  // the share of zeros that the dictionary is made for

// Two words an entry: symbols 0..6 and 7..13.  In each, bits 0..3 are the entry's number of symbols, and digit t of the
// word's 14 is bits 4 + 2 t and 5 + 2 t; what is not used is 0.
using Sub1Entry = std::array<uint32_t, 2>;

MOERT_HOST_DEVICE static inline int sub1_length(const uint32_t* entry) { return int(entry[0] & 15u); }
MOERT_HOST_DEVICE static inline uint8_t sub1_digit(const uint32_t* entry, int t) {
  return uint8_t(entry[t / 14] >> (4 + 2 * (t % 14)) & 3u);
}

namespace cpu {

struct Sub1Dictionary {
  std::vector<Sub1Entry> entries;                           // [kSub1Size]
  std::vector<std::array<int32_t, kSub1Symbols>> children;  // [1 + kSub1Size]: of the empty sequence, then of each
                                                            // entry; an entry's number, or -1
};

// Best first: the likeliest sequence gets the next number, of equally likely ones the first in lexicographic order, and
// its nine extensions become candidates.  Made once, at the first call.
const Sub1Dictionary& sub1_dictionary();

// What kernels read of an entry: its symbols as d0 + 4 d1, symbol i at bits 8 i and, from the eighth on, 8 (i - 8) + 4;
// bits 60..63 are their number.  So an entry and the entry >> 4 behind it are a byte a symbol, with other things above.
const uint64_t* sub1_pairs();  // [kSub1Size]

// The digits [rows, columns] as codewords: row r is codes[row_ptr[r]] up to codes[row_ptr[r + 1]].  Throws on digits
// above 2 and where row_ptr would not fit.
struct Sub1Rows {
  std::vector<uint16_t> codes;
  std::vector<int32_t> row_ptr;  // [rows + 1]
};
Sub1Rows sub1_encode(const uint8_t* digits, int64_t rows, int64_t columns, int threads);

// The way back.  Throws where row_ptr does not rise from 0 to `size`, or a row has more or fewer columns.
void sub1_decode(const uint16_t* codes, int64_t size, const int32_t* row_ptr, int64_t rows, int64_t columns,
                 int threads, uint8_t* digits);

}  // namespace cpu
}  // namespace moert
