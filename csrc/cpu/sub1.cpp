#include "moert/sub1.h"

#include <algorithm>
#include <limits>
#include <queue>

#include "cpu/parallel.h"
#include "moert/check.h"

namespace moert::cpu {

namespace {

// A sequence of symbols: 4 bits each from the highest on, symbol + 1, so that a prefix is below what it begins and the
// order of the numbers is lexicographic.
struct Candidate {
  double probability;
  uint64_t sequence;
  int length;
  int32_t parent;  // index in children

  int symbol(int i) const { return int(sequence >> (60 - 4 * i) & 15u) - 1; }
  bool operator<(const Candidate& other) const {  // the top of a priority queue is the greatest
    return probability != other.probability ? probability < other.probability : sequence > other.sequence;
  }
};

Sub1Entry entry_of(const Candidate& c) {
  Sub1Entry words = {uint32_t(c.length), uint32_t(c.length)};
  for (int t = 0; t < 2 * c.length; ++t) {
    const int symbol = c.symbol(t / 2);
    words[size_t(t / 14)] |= uint32_t(t % 2 == 0 ? symbol % 3 : symbol / 3) << (4 + 2 * (t % 14));
  }
  return words;
}

Sub1Dictionary make_dictionary() {
  constexpr double kOther = 0.0575;  // each of the two digits that are not zero
  Sub1Dictionary made;
  made.entries.reserve(size_t(kSub1Size));
  std::array<int32_t, kSub1Symbols> none;
  none.fill(-1);
  made.children.assign(size_t(1 + kSub1Size), none);
  std::priority_queue<Candidate> candidates;
  const auto extend = [&](const Candidate& c, int32_t index) {
    for (int s = 0; s < kSub1Symbols; ++s) {
      const double pair = (s % 3 == 0 ? kSub1Zero : kOther) * (s / 3 == 0 ? kSub1Zero : kOther);
      const uint64_t symbol = uint64_t(s + 1) << (60 - 4 * c.length);
      candidates.push({c.probability * pair, c.sequence | symbol, c.length + 1, index});
    }
  };
  extend({1.0, 0, 0, 0}, 0);
  while (int64_t(made.entries.size()) < kSub1Size) {
    const Candidate best = candidates.top();
    candidates.pop();
    const int32_t id = int32_t(made.entries.size());
    made.entries.push_back(entry_of(best));
    made.children[size_t(best.parent)][size_t(best.symbol(best.length - 1))] = id;
    if (best.length < kSub1Longest) extend(best, id + 1);
  }
  return made;
}

int symbol_of(const uint8_t* digits, int64_t columns, int64_t pair) {
  return digits[2 * pair] + 3 * (2 * pair + 1 < columns ? digits[2 * pair + 1] : 0);
}

// emit(codeword) for each of the row's.
template <typename F>
void parse(const Sub1Dictionary& dictionary, const uint8_t* digits, int64_t columns, const F& emit) {
  int32_t node = 0;  // in children
  for (int64_t pair = 0; 2 * pair < columns; ++pair) {
    const size_t symbol = size_t(symbol_of(digits, columns, pair));
    int32_t id = dictionary.children[size_t(node)][symbol];
    if (id < 0) {  // no longer match: every single symbol is an entry
      emit(uint16_t(node - 1));
      id = dictionary.children[0][symbol];
    }
    node = id + 1;
  }
  if (node > 0) emit(uint16_t(node - 1));
}

// False where the codewords do not give exactly the row's columns.
bool decode_row(const Sub1Dictionary& dictionary, const uint16_t* codes, int64_t size, int64_t columns,
                uint8_t* digits) {
  int64_t column = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t* entry = dictionary.entries[codes[i]].data();
    const int count = 2 * sub1_length(entry);
    if (column + count > columns + columns % 2) return false;
    for (int t = 0; t < count; ++t, ++column) {
      const uint8_t digit = sub1_digit(entry, t);
      if (column < columns) {
        digits[column] = digit;
      } else if (digit != 0) {
        return false;
      }
    }
  }
  return column == columns + columns % 2;
}

}  // namespace

const Sub1Dictionary& sub1_dictionary() {
  static const Sub1Dictionary dictionary = make_dictionary();
  return dictionary;
}

const uint64_t* sub1_pairs() {
  static const std::vector<uint64_t> pairs = [] {
    std::vector<uint64_t> made;
    made.reserve(size_t(kSub1Size));
    for (const Sub1Entry& entry : sub1_dictionary().entries) {
      const int size = sub1_length(entry.data());
      uint64_t bits = uint64_t(size) << 60;
      for (int t = 0; t < 2 * size; ++t) {
        const int symbol = t / 2;
        bits |= uint64_t(sub1_digit(entry.data(), t)) << (8 * (symbol % 8) + 4 * (symbol / 8) + 2 * (t % 2));
      }
      made.push_back(bits);
    }
    return made;
  }();
  return pairs.data();
}

Sub1Rows sub1_encode(const uint8_t* digits, int64_t rows, int64_t columns, int threads) {
  const uint8_t* end = digits + rows * columns;
  const uint8_t* bad = std::find_if(digits, end, [](uint8_t digit) { return digit > 2; });
  MOERT_CHECK(bad == end, "digits must be 0, 1 or 2, got ", int(*bad), " at index ", bad - digits);
  const Sub1Dictionary& dictionary = sub1_dictionary();
  std::vector<int64_t> sizes(size_t(rows), 0);
  parallel_for(rows, threads, [&](int64_t row) {
    parse(dictionary, digits + row * columns, columns, [&](uint16_t) { ++sizes[size_t(row)]; });
  });
  Sub1Rows out;
  out.row_ptr.assign(size_t(rows + 1), 0);
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    total += sizes[size_t(row)];
    MOERT_CHECK(total <= std::numeric_limits<int32_t>::max(), "digits must need fewer than 2^31 codewords, got more");
    out.row_ptr[size_t(row + 1)] = int32_t(total);
  }
  out.codes.resize(size_t(total));
  parallel_for(rows, threads, [&](int64_t row) {
    uint16_t* next = out.codes.data() + out.row_ptr[size_t(row)];
    parse(dictionary, digits + row * columns, columns, [&](uint16_t code) { *next++ = code; });
  });
  return out;
}

void sub1_decode(const uint16_t* codes, int64_t size, const int32_t* row_ptr, int64_t rows, int64_t columns,
                 int threads, uint8_t* digits) {
  MOERT_CHECK(row_ptr[0] == 0 && row_ptr[rows] == size, "row_ptr must rise from 0 to ", size, ", got ", row_ptr[0],
              " to ", row_ptr[rows]);
  for (int64_t row = 0; row < rows; ++row) {
    MOERT_CHECK(row_ptr[row] <= row_ptr[row + 1], "row_ptr must rise, got ", row_ptr[row + 1], " after ", row_ptr[row],
                " at row ", row);
  }
  const Sub1Dictionary& dictionary = sub1_dictionary();
  std::vector<uint8_t> good(size_t(rows), 0);
  parallel_for(rows, threads, [&](int64_t row) {
    good[size_t(row)] =
        decode_row(dictionary, codes + row_ptr[row], row_ptr[row + 1] - row_ptr[row], columns, digits + row * columns);
  });
  const auto bad = std::find(good.begin(), good.end(), uint8_t(0));
  MOERT_CHECK(bad == good.end(), "codes must hold ", columns, " columns a row, got others in row ", bad - good.begin());
}

}  // namespace moert::cpu
