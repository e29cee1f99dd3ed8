#include "moert/dispatch.h"

#include <tuple>

#include "binding/experts.h"
#include "binding/ids.h"

namespace moert {

namespace {

// values [E] of one expert each, side by side.
Tensor check_map(const Tensor& values, const char* name, const Tensor& first) {
  MOERT_CHECK(is_beside(values, first), name,
              " must be on " MOERT_DEVICE_NAME " like the other arguments, got another device");
  MOERT_CHECK(values.dim() == 1 && values.numel() > 0, name, " must be [E] with E > 0, got shape ", shape(values));
  MOERT_CHECK(values.scalar_type() == ScalarType::Int, name, " must have dtype Int, got ",
              torch::headeronly::toString(values.scalar_type()));
  return torch::stable::contiguous(values);
}

Payload payload_of(const std::string& payload) {
  MOERT_CHECK(payload == "none" || payload == "int8" || payload == "float8_e4m3",
              "payload must be none, int8 or float8_e4m3, got ", payload);
  return payload == "none" ? Payload::none : payload == "int8" ? Payload::int8 : Payload::float8_e4m3;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dispatch_plan(const Tensor& ids, const Tensor& expert_to_rank, int64_t num_ranks,
                                                 const std::optional<Tensor>& x, const std::optional<Tensor>& weights) {
  MOERT_CHECK(x.has_value() == weights.has_value(), "weights must come with x, got one of them");
  if (x) check_routed(*x, ids, *weights);
  CHECK_DEVICE(ids);
  const Tensor ranks = check_map(expert_to_rank, "expert_to_rank", ids);
  MOERT_CHECK(num_ranks >= 1 && num_ranks < std::numeric_limits<int32_t>::max(),
              "num_ranks must be in [1, 2^31 - 2], got ", num_ranks);
  const int64_t E = ranks.numel();
  const Tensor ready = expert_ids(ids, E);
  const int64_t T = ids.size(0), k = ids.size(1);
  Tensor offsets = torch::stable::new_empty(ready, {num_ranks + 1}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(ready, {T * k}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(ready, {T, k}, ScalarType::Int);
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(ids, cuda::dispatch_plan_workspace(T, k, num_ranks));
  cuda::dispatch_plan(ready.const_data_ptr<int32_t>(), T, k, ranks.const_data_ptr<int32_t>(), E, num_ranks,
                      workspace.mutable_data_ptr(), Execution(ids), offsets.mutable_data_ptr<int32_t>(),
                      tokens.mutable_data_ptr<int32_t>(), slots.mutable_data_ptr<int32_t>());
#else
  cpu::dispatch_plan(ready.const_data_ptr<int32_t>(), T, k, ranks.const_data_ptr<int32_t>(), E, num_ranks,
                     Execution(ids), offsets.mutable_data_ptr<int32_t>(), tokens.mutable_data_ptr<int32_t>(),
                     slots.mutable_data_ptr<int32_t>());
#endif
  return {offsets, tokens, slots};
}

namespace {

// What dispatch_pack takes, checked, and in memory as the kernels take it.
struct Packed {
  Tensor rows, weights, ids, ranks, locals, offsets, tokens;
  RecordLayout layout;
  Packing packing;
};

Packed check_pack(const Tensor& x, const Tensor& weights, const Tensor& ids, const Tensor& expert_to_rank,
                  const Tensor& local_ids, const Tensor& offsets, const Tensor& tokens, const std::string& payload) {
  check_routed(x, ids, weights);
  const Tensor ranks = check_map(expert_to_rank, "expert_to_rank", x), locals = check_map(local_ids, "local_ids", x);
  const int64_t E = ranks.numel();
  MOERT_CHECK(locals.numel() == E, "local_ids must have shape [E=", E, "], got ", shape(local_ids));
  CHECK_SAME_DEVICE(offsets, x);
  CHECK_DTYPE(offsets, Int);
  MOERT_CHECK(offsets.dim() == 1 && offsets.numel() >= 1, "offsets must be [R+1], got shape ", shape(offsets));
  CHECK_SAME_DEVICE(tokens, x);
  CHECK_DTYPE(tokens, Int);
  CHECK_DIM(tokens, 1, "[N]");
  const Payload rounded = payload_of(payload);
  // With that x is not float64 either.
  MOERT_CHECK(rounded == Payload::none || weights.scalar_type() == ScalarType::Float,
              "weights must have dtype Float beside a payload, got ",
              torch::headeronly::toString(weights.scalar_type()));

  Packed p{dense_rows(x),
           torch::stable::contiguous(weights),
           expert_ids(ids, E),
           ranks,
           locals,
           torch::stable::contiguous(offsets),
           torch::stable::contiguous(tokens),
           {},
           {}};
  const int64_t H = x.size(1), k = ids.size(1), N = tokens.numel(), weight_size = size_of(dtype(weights));
  p.layout = record_layout(H, size_of(dtype(x)), k, weight_size, rounded);
  p.packing = {p.rows.const_data_ptr(),
               p.rows.stride(0),
               dtype(x),
               p.weights.const_data_ptr(),
               weight_size,
               p.ids.const_data_ptr<int32_t>(),
               p.ranks.const_data_ptr<int32_t>(),
               p.locals.const_data_ptr<int32_t>(),
               p.offsets.const_data_ptr<int32_t>(),
               p.tokens.const_data_ptr<int32_t>(),
               x.size(0),
               H,
               k,
               E,
               offsets.numel() - 1,
               N,
               rounded};
  return p;
}

}  // namespace

Tensor dispatch_pack(const Tensor& x, const Tensor& weights, const Tensor& ids, const Tensor& expert_to_rank,
                     const Tensor& local_ids, const Tensor& offsets, const Tensor& tokens, const std::string& payload) {
  const Packed p = check_pack(x, weights, ids, expert_to_rank, local_ids, offsets, tokens, payload);
  Tensor records = torch::stable::new_empty(x, {p.packing.N, p.layout.bytes}, ScalarType::Byte);
  device::dispatch_pack(p.packing, Execution(x), records.mutable_data_ptr());
  return records;
}

void dispatch_pack_(Tensor records, const Tensor& x, const Tensor& weights, const Tensor& ids,
                    const Tensor& expert_to_rank, const Tensor& local_ids, const Tensor& offsets, const Tensor& tokens,
                    int64_t first, const std::string& payload) {
  Packed p = check_pack(x, weights, ids, expert_to_rank, local_ids, offsets, tokens, payload);
  CHECK_SAME_DEVICE(records, x);
  CHECK_DTYPE(records, Byte);
  MOERT_CHECK(records.dim() == 2 && records.size(1) == p.layout.bytes && records.is_contiguous(),
              "records must be contiguous [n, ", p.layout.bytes, "], got shape ", shape(records));
  const int64_t n = records.size(0), N = p.packing.N;
  MOERT_CHECK(n <= N, "records must have at most N=", N, " rows, got ", n);
  MOERT_CHECK(first >= 0 && first <= N - n, "first must be in [0, N - n=", N - n, "], got ", first);
  p.packing.first = first;
  p.packing.last = first + n;
  device::dispatch_pack(p.packing, Execution(x), records.mutable_data_ptr());
}

void dispatch_unpack_(Tensor rows, const Tensor& records, const std::string& payload) {
  CHECK_DEVICE(rows);
  CHECK_FLOAT(rows);
  CHECK_DIM(rows, 2, "[M, H]");
  MOERT_CHECK(rows.scalar_type() != ScalarType::Double, "rows must have dtype Float, BFloat16 or Half, got Double");
  MOERT_CHECK(rows.is_contiguous(), "rows must be contiguous, got strides of another layout");
  CHECK_SAME_DEVICE(records, rows);
  CHECK_DTYPE(records, Byte);
  const Payload rounded = payload_of(payload);
  MOERT_CHECK(rounded != Payload::none, "payload must be int8 or float8_e4m3, got none");
  const int64_t M = rows.size(0), H = rows.size(1), least = scale_place(H) + 4;
  MOERT_CHECK(records.dim() == 2 && records.size(0) == M && records.size(1) >= least, "records must be [M=", M,
              ", at least ", least, " bytes], got shape ", shape(records));
  const Tensor from = torch::stable::contiguous(records);
  device::dispatch_unpack({from.const_data_ptr(), from.size(1), rounded, dtype(rows), M, H}, Execution(rows),
                          rows.mutable_data_ptr());
}

Tensor dispatch_combine(const Tensor& rows, const Tensor& own, int64_t first, const Tensor& slots,
                        const std::optional<Tensor>& residual) {
  CHECK_DEVICE(rows);
  CHECK_FLOAT(rows);
  CHECK_DIM(rows, 2, "[N - n, H]");
  const int64_t H = rows.size(1);
  CHECK_SAME_DEVICE(own, rows);
  CHECK_SAME_DTYPE(own, rows);
  MOERT_CHECK(own.dim() == 2 && own.size(1) == H, "own must be [n, H=", H, "], got shape ", shape(own));
  const int64_t N = rows.size(0) + own.size(0);
  MOERT_CHECK(N <= std::numeric_limits<int32_t>::max(), "rows must be fewer than 2^31 together, got ", N);
  MOERT_CHECK(first >= 0 && first <= rows.size(0), "first must be in [0, N - n=", rows.size(0), "], got ", first);
  CHECK_SAME_DEVICE(slots, rows);
  CHECK_DTYPE(slots, Int);
  CHECK_DIM(slots, 2, "[T, k]");
  const int64_t T = slots.size(0), k = slots.size(1);
  if (residual) {
    CHECK_SAME_DEVICE(*residual, rows);
    CHECK_SAME_DTYPE(*residual, rows);
    MOERT_CHECK(has_shape(*residual, {T, H}), "residual must have shape [T=", T, ", H=", H, "], got ",
                shape(*residual));
  }
  const Tensor theirs = dense_rows(rows), ours = dense_rows(own), of = torch::stable::contiguous(slots);
  const std::optional<Tensor> start = residual ? std::optional(dense_rows(*residual)) : std::nullopt;
  Tensor y = torch::stable::new_empty(rows, {T, H});
  device::dispatch_combine({theirs.const_data_ptr(), theirs.stride(0), ours.const_data_ptr(), ours.stride(0), first,
                            own.size(0), dtype(rows), of.const_data_ptr<int32_t>(),
                            start ? start->const_data_ptr() : nullptr, start ? start->stride(0) : 0, T, k, N, H},
                           Execution(rows), y.mutable_data_ptr());
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("dispatch_plan", TORCH_BOX(&dispatch_plan));
  m.impl("dispatch_pack", TORCH_BOX(&dispatch_pack));
  m.impl("dispatch_pack_", TORCH_BOX(&dispatch_pack_));
  m.impl("dispatch_unpack_", TORCH_BOX(&dispatch_unpack_));
  m.impl("dispatch_combine", TORCH_BOX(&dispatch_combine));
}

}  // namespace moert
