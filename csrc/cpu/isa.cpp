#include "moert/isa.h"

#include <cstdint>
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

#if defined(__x86_64__) && defined(__linux__)
constexpr long kTileData = 18;  // XFEATURE_XTILEDATA

// GCC 12's __builtin_cpu_supports does not know tile registers.
bool has_amx() {
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24, kTileInt8 = 1u << 25;
  constexpr long kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  unsigned a = 0, b = 0, c = 0, d = 0;
  uint64_t states = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileBf16) && (d & kTile) && (d & kTileInt8) &&
         syscall(SYS_arch_prctl, kSupported, &states) == 0 && (states >> kTileData & 1);
}

// Linux gives a process tile registers when it asks for them; its signal stacks must have room for them from then on.
bool ask_for_amx() {
  constexpr long kAsk = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}
#else
bool has_amx() { return false; }
bool ask_for_amx() { return false; }
#endif

// clang 14's __builtin_cpu_supports does not know it.
bool has_f16c() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
#else
  return false;
#endif
}

Isa read_isa() {
  const char* wanted = std::getenv("MOERT_ISA");
  const Isa best = best_isa();
  if (!wanted || !*wanted) return best == Isa::amx && !ask_for_amx() ? Isa::avx512_bf16 : best;
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    MOERT_CHECK(i <= int(best), "MOERT_ISA must be at most ", name(best), " on this CPU, got ", wanted);
    MOERT_CHECK(Isa(i) != Isa::amx || ask_for_amx(), "MOERT_ISA must not be amx: the system gives no tile registers");
    return Isa(i);
  }
  fail("MOERT_ISA must be one of generic, avx2, avx512, avx512_vnni, avx512_bf16, amx, got ", wanted);
}

}  // namespace

const char* name(Isa isa) { return kNames[int(isa)]; }

Isa best_isa() {
#if defined(__x86_64__)
  const auto has = [](bool flag) { return flag; };
  if (!has(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) return Isa::generic;
  if (!has(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return Isa::avx2;
  if (!has(__builtin_cpu_supports("avx512vnni"))) return Isa::avx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512_vnni;
  static const bool amx = has_amx();
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
