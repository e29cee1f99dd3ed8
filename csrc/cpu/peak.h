// Loops that multiply and add from registers alone: no product is faster, so the benches hold products to them.
#pragma once

#include <cstdint>

namespace moert::cpu {

// float32, in fused multiply-adds of the instruction set in use.  Both return the operations done, a multiplication and
// an addition of every element: what was asked for, rounded up to whole tasks of some millions.
int64_t multiply_floats(int64_t operations, int64_t threads);

// int8, each of VNNI's four products, or the AVX2 and AVX-512 instructions that give the same; floats without them.
int64_t multiply_bytes(int64_t operations, int64_t threads);

}  // namespace moert::cpu
