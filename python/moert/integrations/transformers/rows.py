"""A decoder layer of transformers on packed rows, so that moert's layers over depth take it as a block."""

import inspect
from contextlib import contextmanager
from typing import get_origin

import torch
from torch import Tensor, nn

from moert.layers.packed import Rows
from moert.routers.base import RouterContext
from moert.routers.within import given_context, routers_in


class DecoderRows(nn.Module):
    """x [N, H], rows -> [N, H]: the layer's own code, with rotary positions and a mask made from the rows.

    delta is what the layer adds to its input; routers in it are given the rows' context.  rotary is the model's; kv as
    for PackedAttention.  Rows that are not a rectangle, and those with kv, are one row of a batch whose mask keeps the
    sequences apart.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module):
        super().__init__()
        self.layer = layer
        self._rotary = (rotary,)  # in a tuple: it is the model's
        signature = inspect.signature(layer.forward)
        self._cache = "cache" if "cache" in signature.parameters else "past_key_values"
        # What the layer says that it returns, until it has returned something.
        self.gives_tuple = get_origin(signature.return_annotation) is tuple
        attention = layer.self_attn.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation must be sdpa or eager, got {attention}")

    def delta(self, x: Tensor, rows: Rows, kv=None) -> Tensor:
        return self(x, rows, kv) - x

    def forward(self, x: Tensor, rows: Rows, kv=None) -> Tensor:
        if len(x) == 0:
            return x
        none = torch.iinfo(rows.positions.dtype).max
        # Where a row has no token any position will do, but those of some rotary embeddings depend on the largest.
        positions = torch.where(rows.positions == none, 0, rows.positions)
        B = 1 if kv is not None or rows.length is None else len(rows.offsets) - 1
        x_BNH, positions = x.view(B, -1, x.shape[-1]), positions.view(B, -1)
        mask = self._mask(x, rows, kv, B)
        options = {"position_ids": positions, "position_embeddings": self._rotary[0](x_BNH, positions)}
        if kv is not None:
            options[self._cache] = _Cache(kv, rows)
        y = self._run(x_BNH, rows.context, attention_mask=mask, **options)
        self.gives_tuple = isinstance(y, tuple)
        return (y[0] if self.gives_tuple else y).view_as(x)

    def _run(self, x: Tensor, context: RouterContext | None, **options):
        """The layer, whose routers are given the rows' context, also when checkpointing runs it again."""
        layer = self.layer
        if context is None or not routers_in(layer):
            return layer(x, **options)
        again = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()

        def run(x):
            with given_context(layer, context), _not_checkpointed(layer):
                return layer(x, **options)

        # What runs again must find the context, so it is what is checkpointed, and not the layer inside it.
        return layer._gradient_checkpointing_func(run, x) if again and self._cache not in options else run(x)

    def _mask(self, x: Tensor, rows: Rows, kv, B: int) -> Tensor | None:
        attention = self.layer.self_attn
        # Layers of their own kinds say it themselves (None: full attention), those that are all alike leave it there.
        holder = attention if hasattr(attention, "sliding_window") else attention.config
        window = getattr(holder, "sliding_window", None)
        if kv is None and rows.length is not None:
            if window is None and attention.config._attn_implementation == "sdpa":
                return None  # rows are in order: causal it is
            at = rows.positions.view(B, -1)
            keys, same = at, torch.ones((), dtype=torch.bool, device=x.device)
        else:
            at, counts = rows.positions[None], rows.offsets.diff()
            each = at.split(counts.tolist(), 1) if kv is None else kv.positions(attention.layer_idx, rows)
            keys, lengths = torch.cat(each, -1).view(1, -1), torch.tensor([each_b.shape[-1] for each_b in each])
            number = torch.arange(len(counts), device=x.device)
            owner, of_key = (number.repeat_interleave(n.to(x.device)) for n in (counts, lengths))
            same = owner[:, None] == of_key
        visible = same & (at[:, :, None] >= keys[:, None])
        if window is not None:
            visible = visible & (at[:, :, None] - keys[:, None] < window)
        return torch.where(visible, 0.0, torch.finfo(x.dtype).min).to(x.dtype)[:, None]


@contextmanager
def _not_checkpointed(layer: nn.Module):
    was = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = was


class _Cache:
    """What the layer's attention takes for its cache: the rows' keys and values go to kv, and all of them come back."""

    def __init__(self, kv, rows: Rows):
        self.kv, self.rows = kv, rows

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        k, v = (t[0].transpose(0, 1) for t in (keys, values))
        each = self.kv.extend(layer, k, v, self.rows)
        return tuple(torch.cat([one[i] for one in each]).transpose(0, 1)[None] for i in (0, 1))
