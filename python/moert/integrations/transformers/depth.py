"""Mixture-of-Depths and Mixture-of-Recursions in a decoder of transformers: to_mod and to_recursive."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from moert.integrations.transformers.rows import DecoderRows
from moert.layers.mod import MoDBlock
from moert.layers.mor import RecursiveStack
from moert.routers.base import RouterContext
from moert.routers.depth import DepthRouter
from moert.routers.within import causal_routers_
from moert.runtime.skippable_kv import SkippableKV, at_layer

SHARINGS = ("cycle", "sequence", "middle-cycle", "middle-sequence")
INITS = ("average", "stepwise", "lower", "upper")


class SkippableLayer(DynamicLayer):
    """The place of a layer in transformers' cache whose keys and values lie elsewhere, as many as tokens reach it."""

    def __init__(self, kv):
        super().__init__()
        self.kv, self.seen = kv, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        raise ValueError("cache must be a new one for every sequence of a model of variable depth, got reset()")

    def _of_every_token(self, *_):
        raise ValueError("cache must stay as it is in a model of variable depth, got a change of batch or length")

    update = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _of_every_token


class DepthLayer(nn.Module):
    """A MoDBlock or RecursiveStack in the place of decoder layer `index`; padding is what no query may see.

    Keys and values are kept once tokens decide for themselves (causal_()): a cache that top-k has passed is an error.
    """

    def __init__(self, run: MoDBlock | RecursiveStack, index: int):
        super().__init__()
        self.run, self.index = run, index

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        past_key_values=None,
        **_,
    ) -> Tensor | tuple[Tensor]:
        B, S, _ = hidden_states.shape
        cache = past_key_values if cache is None else cache
        if position_ids is None:
            position_ids = torch.arange(S, device=hidden_states.device)[None]
        context = RouterContext(mask=_tokens(attention_mask, B, S))
        kv = None if cache is None else self._kv(cache, B, S)
        y = self.run(hidden_states, context, position_ids.expand(B, S), kv)[0]
        block = self.run.block if isinstance(self.run, MoDBlock) else self.run.blocks[0]
        return (y,) if block.gives_tuple else y  # as the layer that was here before

    def _kv(self, cache, B: int, S: int):
        causal = self.run.router.causal if isinstance(self.run, MoDBlock) else self.run.causal
        place = cache.layers[self.index]
        if not isinstance(place, SkippableLayer):
            kv = SkippableKV(1, B) if isinstance(self.run, MoDBlock) else self.run.new_kv(B)
            place = cache.layers[self.index] = SkippableLayer(kv if causal else None)
        elif place.kv is None:
            raise ValueError("cache must be None unless tokens decide for themselves (causal_), got one of top-k")
        place.seen += S
        return at_layer(place.kv, 0) if isinstance(place.kv, SkippableKV) else place.kv


def _tokens(attention_mask: Tensor | None, B: int, S: int) -> Tensor | None:
    """[B*S] True where a token is none of padding, from the mask [B, 1, S, keys] of transformers."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 4:
        raise ValueError(f"attention_mask must have shape [B, 1, S, keys], got {list(attention_mask.shape)}")
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    return visible[:, 0, :, -S:].any(1).expand(B, S).reshape(-1)


def _decoder(model: nn.Module) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not all(hasattr(decoder, name) for name in ("layers", "rotary_emb")):
        raise ValueError(f"model must have decoder layers and a rotary embedding, got {type(model).__name__}")
    if any(isinstance(layer, DepthLayer) for layer in decoder.layers):
        raise ValueError("model must be one of transformers' layers alone, got one converted before")
    return decoder


def to_mod(model: nn.Module, layers: Iterable[int] | None = None, capacity: float = 0.125, **options) -> nn.Module:
    """Makes decoder layers (None: every second, 1, 3, …) Mixture-of-Depths, in place; options are DepthRouter's.

    Losses come by recorded_routings; to generate, call causal_(model) first.
    """
    decoder = _decoder(model)
    chosen = sorted(set(range(1, len(decoder.layers), 2) if layers is None else layers))
    if any(not 0 <= i < len(decoder.layers) for i in chosen):
        raise ValueError(f"layers must be in [0, {len(decoder.layers)}), got {chosen}")
    for i in chosen:
        layer = decoder.layers[i]
        router = DepthRouter(model.config.hidden_size, capacity, **_like(layer), **options)
        block = MoDBlock(DecoderRows(layer, decoder.rotary_emb), router)
        decoder.layers[i] = DepthLayer(block, i).train(layer.training)
    return model


def causal_(model: nn.Module, on: bool = True) -> nn.Module:
    """Every token decides for itself how deep it goes in a model that to_mod or to_recursive made."""
    if not any(isinstance(module, DepthLayer) for module in model.modules()):
        raise ValueError(f"model must be made by to_mod or to_recursive, got {type(model).__name__}")
    return causal_routers_(model, on)


def to_recursive(
    model: nn.Module, depths: int, sharing: str = "middle-cycle", init: str = "average", **options
) -> nn.Module:
    """Makes the decoder Mixture-of-Recursions, in place: its layers become depths runs of a part of them.

    sharing "cycle" is (1, 2)(1, 2)…, "sequence" (1, 1)(2, 2)…; the middle ones keep the first layer and the last.  A
    shared layer starts as the average of those that it replaces (init), or as one of the b layers at equal steps
    ("stepwise"), the first b ("lower") or the last ("upper").  options are RecursiveStack's.
    """
    decoder = _decoder(model)
    if sharing not in SHARINGS:
        raise ValueError(f"sharing must be one of {', '.join(SHARINGS)}, got {sharing}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init}")
    ends = 1 if sharing.startswith("middle") else 0
    layers = list(decoder.layers)
    inner = layers[ends : len(layers) - ends]
    if depths < 1 or not inner or len(inner) % depths:
        raise ValueError(f"depths must divide the {len(inner)} layers that are shared, got {depths}")
    b = len(inner) // depths
    order = [l % b if sharing.endswith("cycle") else l // depths for l in range(len(inner))]
    blocks = [DecoderRows(shared, decoder.rotary_emb) for shared in _shared(inner, order, b, init)]
    per_depth = [order[r * b : (r + 1) * b] for r in range(depths)]
    stack = RecursiveStack(
        blocks, depths, model.config.hidden_size, order=per_depth, **_like(inner[0]), **options
    ).train(inner[0].training)
    decoder.layers = nn.ModuleList([*layers[:ends], DepthLayer(stack, ends), *layers[len(layers) - ends :]])
    return model


@torch.no_grad()
def _shared(inner: list[nn.Module], order: list[int], b: int, init: str) -> list[nn.Module]:
    """b of the layers, with the weights that init says."""
    if init == "lower":
        return inner[:b]
    if init == "upper":
        return inner[-b:]
    if init == "stepwise":
        return [inner[round(i * (len(inner) - 1) / max(1, b - 1))] for i in range(b)]
    out = []
    for i in range(b):
        same = [layer for layer, shared in zip(inner, order, strict=True) if shared == i]
        for name, tensor in same[0].state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([layer.state_dict()[name].float() for layer in same]).mean(0))
        out.append(same[0])
    return out


def _like(layer: nn.Module) -> dict:
    weight = next(layer.parameters())
    return {"device": weight.device, "dtype": weight.dtype}
