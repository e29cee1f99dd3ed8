#include "cpu/tile_tasks.h"

#include <cstdint>
#include <vector>

#include "expect.h"

using namespace moert;
using namespace moert::cpu;

namespace {

// Where nothing is allocated, an address is a number.
const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// Rows, experts and strides whose elements are more than 2^31, and whose bytes are more than 2^32.
void addresses_beyond_32_bits() {
  constexpr int64_t row = 3000000, stride = 8192, column = 4097;
  const Rows rows{pointer(64), DType::f32, stride};
  EXPECT(address(tile_of(rows, row, column).data) == 64 + 4 * uintptr_t(row * stride + column));
  const int32_t index[] = {0, 2000000000};
  const TileMatrix gathered = tile_of(Rows{pointer(64), DType::bf16, stride, index}, 1, column);
  EXPECT(gathered.index == index + 1 && address(gathered.data) == 64 + 2 * uintptr_t(column));

  constexpr int64_t expert = 1023, E_stride = int64_t(4096) * 14336;
  const ExpertMatrix w{pointer(64), DType::f32, E_stride, 14336, 1};
  EXPECT(address(tile_of(w, expert, 4095, 14335).data) == 64 + 4 * uintptr_t((expert + 1) * E_stride - 1));
  const ExpertMatrix transposed{pointer(64), DType::bf16, E_stride, 1, 4096};
  const TileOperand operand = operand_of(transposed, expert, 5, 7, true);
  EXPECT(address(operand.matrix.data) == 64 + 2 * uintptr_t(expert * E_stride + 5 + 7 * 4096));
  EXPECT(operand.k_rows && operand.matrix.row_stride == 4096 && operand.matrix.col_stride == 1);
}

// Every element of the product belongs to one task; the busiest expert comes first, one without rows not at all.
void every_element_once() {
  const std::vector<int32_t> offsets{0, 3, 3, 620, 621};
  const int64_t E = 4, first = 32, last = 1000;
  for (const int64_t threads : {1, 2, 7}) {
    std::vector<int> seen(offsets[E] * last);
    const auto tasks = tile_tasks(offsets.data(), E, first, last, kTileColumns, threads);
    EXPECT(tasks.front().expert == 2 && tasks.back().expert == 3);
    for (const TileTask& task : tasks) {
      EXPECT(task.M > 0 && task.M <= kTileRows && task.N > 0 && task.N <= kTileColumns && task.n >= first);
      EXPECT(task.row >= offsets[task.expert] && task.row + task.M <= offsets[task.expert + 1]);
      for (int64_t m = task.row; m < task.row + task.M; ++m)
        for (int64_t n = task.n; n < task.n + task.N; ++n) ++seen[m * last + n];
    }
    for (int64_t m = 0; m < offsets[E]; ++m)
      for (int64_t n = 0; n < last; ++n) EXPECT(seen[m * last + n] == (n >= first));
  }
}

}  // namespace

int main() {
  addresses_beyond_32_bits();
  every_element_once();
}
