// Memory that is brought to the L2 cache while registers are busy with what came before.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace moert::cpu {
namespace {

constexpr int64_t kLine = 64;

// What comes next in memory, a few lines at a time, row after row: rows of weights lie too far apart for the CPU to
// foresee them, and memory gives one piece faster than a line of each of many rows.
struct Ahead {
  const char* row = nullptr;
  int64_t pitch = 0, lines = 0;  // of a row
  int64_t at_once = 0;
  int64_t line = 0;
  int64_t every = 1, wait = 1;  // of so many calls one fetches
  int64_t left = INT64_MAX;     // lines

  // `rows` rows over so many calls of fetch(): a burst of them would keep loads and products waiting.
  static Ahead over(int64_t steps, const void* row, int64_t pitch, int64_t bytes, int64_t rows) {
    const int64_t lines = (bytes + kLine - 1) / kLine, all = lines * rows;
    if (all <= 0 || steps <= 0) return {};
    const int64_t every = all < steps ? steps / all : 1;
    return {static_cast<const char*>(row), pitch, lines, (all + steps - 1) / steps, 0, every, 1, all};
  }

  MOERT_INLINE void fetch() {
    if (--wait > 0) return;
    wait = every;
    for (int64_t i = 0; i < at_once && left > 0; ++i, --left) {
      __builtin_prefetch(row + kLine * line, 0, 2);
      if (++line == lines) line = 0, row += pitch;
    }
  }
};

}  // namespace
}  // namespace moert::cpu
