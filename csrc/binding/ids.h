// Expert ids at the boundary: any integer dtype, any strides, any values.
#pragma once

#include <limits>

#include "binding/device.h"
#include "moert/permute.h"

namespace moert {

// out [T, k] = ids, and -1 for what lies outside [0, E).
template <typename Id>
void narrow_ids(const Tensor& ids, int64_t E, int32_t* out) {
  const auto* in = static_cast<const Id*>(ids.const_data_ptr());
  const int64_t T = ids.size(0), k = ids.size(1), row = ids.stride(0), column = ids.stride(1);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < k; ++j) {
      const Id id = in[t * row + j * column];
      // Compared in 64 bits: 2^32 + 3 is not expert 3, and a negative id is far above E.
      *out++ = uint64_t(id) < uint64_t(E) ? int32_t(id) : -1;
    }
}

inline bool is_integer(ScalarType t) {
  return t == ScalarType::Char || t == ScalarType::Short || t == ScalarType::Int || t == ScalarType::Long ||
         t == ScalarType::Byte || t == ScalarType::UInt16 || t == ScalarType::UInt32 || t == ScalarType::UInt64;
}

#if defined(MOERT_CUDA)

// Kernels drop what lies outside [0, E) themselves.
inline bool ids_are_ready(const Tensor& ids, int64_t) {
  return ids.scalar_type() == ScalarType::Int && ids.is_contiguous();
}

inline void narrow_ids(const Tensor& ids, int64_t E, Tensor& out) {
  const ScalarType t = ids.scalar_type();
  const bool is_signed =
      t == ScalarType::Char || t == ScalarType::Short || t == ScalarType::Int || t == ScalarType::Long;
  const int64_t bytes = t == ScalarType::Char || t == ScalarType::Byte      ? 1
                        : t == ScalarType::Short || t == ScalarType::UInt16 ? 2
                        : t == ScalarType::Int || t == ScalarType::UInt32   ? 4
                                                                            : 8;
  cuda::narrow_ids(ids.const_data_ptr(), bytes, is_signed, ids.stride(0), ids.stride(1), ids.size(0), ids.size(1), E,
                   Execution(ids), out.mutable_data_ptr<int32_t>());
}

#else

inline bool ids_are_ready(const Tensor& ids, int64_t E) {
  if (ids.scalar_type() != ScalarType::Int || !ids.is_contiguous()) return false;
  const auto* id = static_cast<const int32_t*>(ids.const_data_ptr());
  bool ready = true;
  for (int64_t i = 0, n = ids.numel(); i < n; ++i) ready &= id[i] >= -1 && id[i] < E;
  return ready;
}

inline void narrow_ids(const Tensor& ids, int64_t num_experts, Tensor& out) {
  int32_t* p = out.mutable_data_ptr<int32_t>();
  switch (ids.scalar_type()) {
    case ScalarType::Char:
      narrow_ids<int8_t>(ids, num_experts, p);
      break;
    case ScalarType::Short:
      narrow_ids<int16_t>(ids, num_experts, p);
      break;
    case ScalarType::Int:
      narrow_ids<int32_t>(ids, num_experts, p);
      break;
    case ScalarType::Long:
      narrow_ids<int64_t>(ids, num_experts, p);
      break;
    case ScalarType::Byte:
      narrow_ids<uint8_t>(ids, num_experts, p);
      break;
    case ScalarType::UInt16:
      narrow_ids<uint16_t>(ids, num_experts, p);
      break;
    case ScalarType::UInt32:
      narrow_ids<uint32_t>(ids, num_experts, p);
      break;
    default:
      narrow_ids<uint64_t>(ids, num_experts, p);
  }
}

#endif

// ids [T, k] of any integer dtype -> the same as contiguous int32, -1 for every id outside [0, num_experts);
// ids itself where it is that already.
inline Tensor expert_ids(const Tensor& ids, int64_t num_experts) {
  CHECK_DIM(ids, 2, "[T, k]");
  CHECK_DEVICE(ids);
  MOERT_CHECK(is_integer(ids.scalar_type()), "ids must have an integer dtype, got ",
              torch::headeronly::toString(ids.scalar_type()));
  MOERT_CHECK(num_experts >= 1 && num_experts < std::numeric_limits<int32_t>::max(),
              "num_experts must be in [1, 2^31 - 2], got ", num_experts);
  MOERT_CHECK(ids.numel() <= std::numeric_limits<int32_t>::max(), "ids must have fewer than 2^31 elements, got shape ",
              shape(ids));
  if (ids_are_ready(ids, num_experts)) return ids;

  Tensor out = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  narrow_ids(ids, num_experts, out);
  return out;
}

}  // namespace moert
