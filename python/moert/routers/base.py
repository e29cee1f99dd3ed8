"""The contract of routers: (x [T, H], what is known about the T tokens) -> Routing."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moert.types import Routing


@dataclass(frozen=True)
class RouterContext:
    """What a caller knows about the tokens, for all routers: each reads what it needs and ignores the rest.

    mask [T] is True where a token counts (False for padding); cu_seqlens [documents + 1] int32 are the boundaries of
    documents, from 0 to T; previous is the routing of the layer before; state is what this router returned to its
    caller for the next call; modality [T] holds integers; conditional [T] is False for the tokens of samples without a
    label (classifier-free guidance); step counts training steps.  logit_bias [E] or [T, E] is added to this call's
    logits.  ranks holds a tuple of ranks (1 is a token's best expert) for each group of tokens, which then go to the
    experts of these ranks; group [T] is the group of each token; renormalize says whether the weights of its ranks are
    divided by their sum (None: as the router's own).  attention [B, heads, N, N] is what the layer before
    attended to, or a callable that mixes rows [T, n] by it.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    previous: Routing | None = None
    state: Any = None
    modality: Tensor | None = None
    conditional: Tensor | None = None
    step: int | Tensor | None = None
    logit_bias: Tensor | None = None
    ranks: tuple[tuple[int, ...], ...] | None = None
    group: Tensor | None = None
    renormalize: bool | None = None
    attention: Tensor | Callable[[Tensor], Tensor] | None = None

    def counted(self) -> Tensor | None:
        """mask as bool [T], whatever its shape and dtype (tokenizers give integers [B, N]); None without one."""
        return None if self.mask is None else self.mask.reshape(-1).bool()

    def beside(self, passed: "RouterContext | None") -> "RouterContext":
        """What a caller passes counts before this, field by field."""
        if passed is None:
            return self
        known = {field.name: value for field in fields(passed) if (value := getattr(passed, field.name)) is not None}
        return replace(self, **known)

    def at(self, tokens: Tensor, offsets: Tensor) -> "RouterContext":
        """What is known of rows that are some of the tokens: tokens [S] of each row, -1 (masked) where it has none.

        offsets [documents + 1] are the rows' cu_seqlens.  previous, state and attention say something of all tokens
        together and are left out.
        """
        real, index = tokens >= 0, tokens.clamp_min(0).long()

        def rows(of_token: Tensor | None) -> Tensor | None:
            if of_token is None or len(of_token):
                return None if of_token is None else of_token[index]
            return of_token.new_zeros(len(index), *of_token.shape[1:])  # rows without tokens, of no tokens at all

        def flat(of_token: Tensor | None) -> Tensor | None:
            return None if of_token is None else rows(of_token.reshape(-1))

        mask = flat(self.counted())
        bias = self.logit_bias if self.logit_bias is None or self.logit_bias.dim() == 1 else rows(self.logit_bias)
        return replace(
            self,
            mask=real if mask is None else real & mask,
            cu_seqlens=offsets,
            modality=flat(self.modality),
            conditional=flat(self.conditional),
            group=flat(self.group),
            logit_bias=bias,
            previous=None,
            state=None,
            attention=None,
        )


class TakesContext(nn.Module):
    """A module with forward(x, context=None, ...) that given_context and recorded_routings reach.

    Those are routers, and blocks that hand what is known of their rows to the routers within.  Not by hooks: code that
    torch.compile made before a hook was there does not know of it.
    """

    def __init__(self):
        super().__init__()
        self.given: tuple[RouterContext | Callable[[Tensor], RouterContext], ...] = ()
        self.hears: tuple[Callable[[Tensor, RouterContext | None, Any], None], ...] = ()

    def __call__(self, x: Tensor, context: RouterContext | None = None, *args, **kwargs):
        for given in self.given:
            context = (given(x.flatten(0, -2)) if callable(given) else given).beside(context)
        out = nn.Module.__call__(self, x, context, *args, **kwargs)
        for hear in self.hears:
            hear(x, context, out)
        return out

    def __init_subclass__(cls, **options):
        # Code of its own for each class: torch.compile bounds how often one code is compiled again.
        super().__init_subclass__(**options)
        if "__call__" in cls.__dict__:
            return
        call = TakesContext.__call__
        cls.__call__ = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__)


class Router(TakesContext):
    """Decides which experts each token goes to, and with what weights.

    logit_bias [E] is None or a trained parameter that a router adds to its logits (by biased).  What wide names
    (parameters and buffers) stays float32 when the module moves to a lower precision.  reads_ranks says whether it
    goes by the ranks of a context.
    """

    wide: tuple[str, ...] = ()
    reads_ranks = False

    def __init__(
        self,
        num_experts: int,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts
        self.logit_bias = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype)) if logit_bias else None

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.wide}
        before = {name: (t.detach().clone(), t.grad) for name, t in before.items() if t is not None}
        super()._apply(fn, recurse)
        for name, (tensor, grad) in before.items():
            moved = getattr(self, name)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                moved.grad = None
                moved.data = tensor.to(moved.device, torch.float32)
                moved.grad = None if grad is None else grad.to(moved.device, torch.float32)
        return self

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        raise TypeError(f"{type(self).__name__} must define forward(x, context)")

    @property
    def weight_is_one(self) -> bool:
        """Whether a token's only weight is 1 whatever its logits (k = 1, renormalised): no gradient reaches them."""
        return False

    def check_previous(self, before: "Router") -> None:
        """Raises a ValueError where the routings of `before` are none that this router can have as context.previous."""

    def biased(self, logits: Tensor, context: RouterContext | None) -> Tensor:
        """logits [T, E] plus what is added to them before any rule of selection: logit_bias and the context's."""
        if self.logit_bias is not None:
            logits = logits + self.logit_bias.to(logits.dtype)
        if context is not None and context.logit_bias is not None:
            # A float32 bias makes bfloat16 logits float32: a small step would be lost in them.
            logits = logits + context.logit_bias
        return logits
