#include "moert/expert_choice.h"

#include "cuda/expert_choice.cuh"
#include "cuda/launch.h"

namespace moert::cuda {

int64_t expert_choice_workspace(int64_t E, int64_t D) { return D * E * int64_t(sizeof(Place)); }

void expert_choice(const void* scores, DType dtype, int64_t stride, const int64_t* segments, const int64_t* capacity,
                   int64_t T, int64_t E, int64_t D, int64_t k, void* workspace, void* stream, void* weights,
                   int32_t* ids) {
  if (T == 0) return;
  with_dtype(dtype, [&](auto type) {
    using X = decltype(type);
    const ChoiceCall<X> call{
        static_cast<const X*>(scores), stride, segments, capacity, T, E, D, k, static_cast<Place*>(workspace),
        static_cast<Acc<X>*>(weights), ids};
    launch(&last_place_kernel<X>, {D * E}, kChoiceThreads, stream, call);
    launch(&fill_choices_kernel<X>, {ceil_div(T, kChoiceThreads / kWarp)}, kChoiceThreads, stream, call);
  });
}

}  // namespace moert::cuda
