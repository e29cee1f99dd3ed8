// Routes three tokens to two experts and multiplies each by its expert's matrix.
#include <moert/grouped_gemm.h>
#include <moert/permute.h>

#include <cstdint>
#include <iostream>

int main() {
  const int64_t T = 3, k = 1, E = 2, H = 2, N = 2, threads = 2;
  const int32_t ids[T * k] = {1, 0, 1};
  int32_t offsets[E + 1], tokens[T * k], slots[T * k];
  moert::cpu::permute_plan(ids, T, k, E, -1, threads, offsets, tokens, slots);

  const float x[T * H] = {1, 2, 4, 6, 3, 6};
  const float w[E * N * H] = {1, 0, 0, 1, 10, 0, 0, 10};  // expert 0: the identity; expert 1: ten times it
  float y[T * N];
  moert::GroupedGemm product{};
  product.S = T * k, product.E = E, product.N = N, product.K = H;
  product.offsets = offsets;
  product.x = {x, moert::DType::f32, H, tokens};
  product.w = {w, moert::DType::f32, N * H, H, 1};
  moert::cpu::grouped_gemm(product, threads, y, N);

  for (int32_t token : tokens) std::cout << token << ' ';
  std::cout << ':';
  for (float value : y) std::cout << ' ' << value;
  std::cout << '\n';
}
