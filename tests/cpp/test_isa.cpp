#include "moert/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "expect.h"

using moert::Isa;

// isa() reads the environment once per process, so the wrong name is tried last, by itself, in a run of its own.
int main(int argc, char**) {
  if (argc > 1) {
    setenv("MOERT_ISA", "sse9", 1);
    try {
      moert::isa();
      EXPECT(!"reached");
    } catch (const std::runtime_error& error) {
      EXPECT(std::string(error.what()) ==
             "MOERT_ISA must be one of generic, avx2, avx512, avx512_vnni, avx512_bf16, amx, got sse9");
    }
    return 0;
  }
  EXPECT(moert::isa() <= moert::best_isa());
  if (const char* wanted = std::getenv("MOERT_ISA")) EXPECT(std::string(moert::name(moert::isa())) == wanted);
#if defined(__x86_64__)
  EXPECT((moert::best_isa() >= Isa::avx2) ==
         bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));  // F16C came before both
#else
  EXPECT(moert::best_isa() == Isa::generic);
#endif
}
