// The instruction sets that moert has CPU kernels for, and the one in use.
#pragma once

namespace moert {

// Ordered: a CPU that has one has all before it.
enum class Isa : int { generic, avx2, avx512, avx512_vnni, avx512_bf16, amx };

const char* name(Isa isa);

// The best that this CPU (and its operating system) can run.
Isa best_isa();

// The one in use: best_isa(), or what the environment variable MOERT_ISA names; read once.
// Throws where MOERT_ISA is no name of the list or more than the CPU has.
Isa isa();

}  // namespace moert
