#include "cpu/peak.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define MOERT_VECTOR_REGISTER "+v"
#elif defined(__aarch64__)
#define MOERT_VECTOR_REGISTER "+w"
#else
#define MOERT_VECTOR_REGISTER "+m"
#endif

#include "cpu/parallel.h"
#include "moert/isa.h"

namespace moert::cpu {

namespace {

struct Loop {
  void (*run)(int64_t rounds);
  int64_t operations;  // of one round
};

#if defined(__aarch64__)
constexpr int64_t kSums = 20;  // enough to fill four pipes of four cycles
#else
constexpr int64_t kSums = 12;  // two pipes of four cycles, 16 registers with AVX2
#endif

// What asm might change is neither left out nor computed beforehand.
#define MOERT_FLOAT_LOOP(name, target, bytes)                            \
  target void name(int64_t rounds) {                                     \
    typedef float Vector __attribute__((vector_size(bytes)));            \
    Vector sums[kSums] = {}, x = Vector{} + 0.5f, y = Vector{} + 0.999f; \
    for (int64_t i = 0; i < rounds; ++i)                                 \
      for (auto& sum : sums) {                                           \
        sum = sum * x + y;                                               \
        asm volatile("" : MOERT_VECTOR_REGISTER(sum));                   \
      }                                                                  \
  }

// x as well, or its products would be made once.
#define MOERT_BYTE_LOOP(name, flags, Register, products)                         \
  __attribute__((target(flags))) void name(int64_t rounds) {                     \
    Register sums[kSums] = {}, x = Register{} + 0x01020304;                      \
    const Register y = Register{} + 0x04030201;                                  \
    for (int64_t i = 0; i < rounds; ++i)                                         \
      for (auto& sum : sums) {                                                   \
        sum = products;                                                          \
        asm volatile("" : MOERT_VECTOR_REGISTER(sum), MOERT_VECTOR_REGISTER(x)); \
      }                                                                          \
  }

MOERT_FLOAT_LOOP(floats_generic, , 16)
#if defined(__x86_64__)
MOERT_FLOAT_LOOP(floats_avx2, __attribute__((target("avx2,fma"))), 32)
MOERT_FLOAT_LOOP(floats_avx512, __attribute__((target("avx512f"))), 64)
MOERT_BYTE_LOOP(bytes_avx2, "avx2", __m256i, _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), y)))
MOERT_BYTE_LOOP(bytes_avx512, "avx512f,avx512bw", __m512i,
                _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(x, y), y)))
MOERT_BYTE_LOOP(bytes_vnni, "avx512f,avx512vnni", __m512i, _mm512_dpbusd_epi32(sum, x, y))
#endif

Loop loop_of(void (*run)(int64_t), int64_t elements) { return {run, kSums * elements * 2}; }

Loop float_loop() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return loop_of(floats_avx512, 16);
  if (isa() >= Isa::avx2) return loop_of(floats_avx2, 8);
#endif
  return loop_of(floats_generic, 4);
}

Loop byte_loop() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512_vnni) return loop_of(bytes_vnni, 64);
  if (isa() >= Isa::avx512) return loop_of(bytes_avx512, 64);
  if (isa() >= Isa::avx2) return loop_of(bytes_avx2, 32);
#endif
  return float_loop();
}

int64_t run(const Loop& loop, int64_t operations, int64_t threads) {
  // As many for each thread, or the last to end would have done less than it could.
  const int64_t per_round = threads * loop.operations, rounds = operations / per_round + (operations % per_round != 0);
  parallel_for(threads, threads, [&](int64_t) { loop.run(rounds); });
  return rounds * per_round;
}

}  // namespace

int64_t multiply_floats(int64_t operations, int64_t threads) { return run(float_loop(), operations, threads); }

int64_t multiply_bytes(int64_t operations, int64_t threads) { return run(byte_loop(), operations, threads); }

}  // namespace moert::cpu
