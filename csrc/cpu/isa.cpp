#include "moert/isa.h"

#include <cstdlib>
#include <string>

#include "moert/check.h"

namespace moert {

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

Isa read_isa() {
  const char* wanted = std::getenv("MOERT_ISA");
  if (!wanted || !*wanted) return best_isa();
  for (int i = 0; i < 5; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    MOERT_CHECK(i <= int(best_isa()), "MOERT_ISA must be at most ", name(best_isa()), " on this CPU, got ", wanted);
    return Isa(i);
  }
  fail("MOERT_ISA must be one of generic, avx2, avx512, avx512_vnni, avx512_bf16, got ", wanted);
}

}  // namespace

const char* name(Isa isa) { return kNames[int(isa)]; }

Isa best_isa() {
#if defined(__x86_64__)
  const auto has = [](bool flag) { return flag; };
  if (!has(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::generic;
  if (!has(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return Isa::avx2;
  if (!has(__builtin_cpu_supports("avx512vnni"))) return Isa::avx512;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512_vnni;
#else
  return Isa::generic;
#endif
}

Isa isa() {
  static const Isa chosen = read_isa();
  return chosen;
}

}  // namespace moert
