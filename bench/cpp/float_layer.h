// The experts of a model in float32 or bfloat16, for the benches that multiply them.
#pragma once

#include <memory>

#include "layers.h"
#include "moert/fused_experts.h"

namespace moert::bench {

// One model's experts; kept until the next model's are wanted, since they fill the memory.
struct Layer {
  Model model;
  DType dtype;
  Bytes w1, w2, dw1, dw2;  // [E, 2I, H], gates first, [E, H, I], and their gradients

  Layer(const Model& m, DType dtype)
      : model(m),
        dtype(dtype),
        w1(values(m.E * 2 * m.I * m.H, dtype, std::sqrt(3.0f / m.H))),
        w2(values(m.E * m.H * m.I, dtype, std::sqrt(3.0f / m.I))) {}

  ExpertMatrix matrix(const Bytes& data, int64_t rows, int64_t columns, int64_t stride, int64_t first = 0) const {
    return {data.data() + first * columns * size_of(dtype), dtype, stride * columns, columns, 1};
  }

  ExpertWeights weights() const {
    ExpertWeights w{};
    w.E = model.E, w.H = model.H, w.I = model.I;
    w.gate = matrix(w1, model.I, model.H, 2 * model.I);
    w.up = matrix(w1, model.I, model.H, 2 * model.I, model.I);
    w.down = matrix(w2, model.H, model.I, model.H);
    return w;
  }
};

inline const Layer& layer_of(const Model& model, DType dtype, bool gradients) {
  static std::unique_ptr<Layer> layer;
  if (!layer || layer->model.name != model.name || layer->dtype != dtype) {
    layer.reset();
    layer = std::make_unique<Layer>(model, dtype);
  }
  if (gradients) layer->dw1.resize(layer->w1.size()), layer->dw2.resize(layer->w2.size());
  return *layer;
}

}  // namespace moert::bench
