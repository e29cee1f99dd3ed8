#include "moert/isa.h"

#include <cstdlib>
#include <iterator>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "moert/check.h"

namespace moert {

namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

// Linux gives a process tile registers when it asks for them; GCC 12's __builtin_cpu_supports does not know them.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

Isa read_isa() {
  const char* wanted = std::getenv("MOERT_ISA");
  if (!wanted || !*wanted) return best_isa();
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    MOERT_CHECK(i <= int(best_isa()), "MOERT_ISA must be at most ", name(best_isa()), " on this CPU, got ", wanted);
    return Isa(i);
  }
  fail("MOERT_ISA must be one of generic, avx2, avx512, avx512_vnni, avx512_bf16, amx, got ", wanted);
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
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512_vnni;
  static const bool amx = may_use_amx();
  return amx ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::generic;
#endif
}

Isa isa() {
  static const Isa chosen = read_isa();
  return chosen;
}

}  // namespace moert
