// Loops that multiply and add from registers alone.  Products in the same arithmetic are slower, so the benches hold
// them to these; AMX and AVX512-BF16 multiply faster.
#pragma once

#include <cstdint>

namespace moert::cpu {

// float32, in fused multiply-adds of the instruction set in use.  Both return the operations done, a multiplication and
// an addition of every element: what was asked for, rounded up to as many for each thread.
int64_t multiply_floats(int64_t operations, int64_t threads);

// int8, each of VNNI's four products, or the AVX2 and AVX-512 instructions that give the same; floats without them.
int64_t multiply_bytes(int64_t operations, int64_t threads);

}  // namespace moert::cpu
