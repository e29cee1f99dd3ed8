"""Expert choice routing (arXiv:2202.09368), with the auxiliary router that makes it causal (MoMa, arXiv:2407.21770)."""

import math

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from moert.ops.expert_choice import expert_choice
from moert.ops.gating import SCORES
from moert.routers.base import RouterContext
from moert.routers.dense_to_sparse import gumbel
from moert.routers.documents import document_of_token, tokens_per_document
from moert.routers.linear import LinearRouter, wide_dtype
from moert.types import Routing


class AuxiliaryRouter(nn.Module):
    """Predicts from a token alone whether each expert would choose it: x [T, H] -> logits [T, E], float32.

    W_2 SiLU(W_1 x); hidden_aux is half of hidden unless given.  trained is set by train_auxiliary.
    """

    def __init__(self, hidden: int, num_experts: int, hidden_aux: int | None = None, device=None):
        super().__init__()
        hidden_aux = max(1, hidden // 2) if hidden_aux is None else hidden_aux
        self.up = nn.Linear(hidden, hidden_aux, bias=False, device=device)
        self.down = nn.Linear(hidden_aux, num_experts, bias=False, device=device)
        self.register_buffer("trained", torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = F.silu(F.linear(x.float(), self.up.weight.float()))
            return F.linear(h, self.down.weight.float())


class ExpertChoiceRouter(LinearRouter):
    """Every expert takes the share `capacity` of the tokens, those with its largest scores: even load by construction.

    capacity None is 1 / num_experts; the number of tokens is rounded up.  Tokens compete in the whole batch, or (per
    "sequence") within each document of context.cu_seqlens; those outside context.mask take no part and get no expert.
    A token has 0 to num_experts experts, ascending, and the scores as weights.  gumbel adds the difference of two
    Gumbel noises to the logits in training.  scope "world" shares the number of tokens out evenly over the ranks.
    Later tokens change earlier ones' experts unless causal_() was called: then auxiliary decides, token by token.
    """

    wide = ("weight", "logit_bias")

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        capacity: float | None = None,
        score: str = "sigmoid",
        gumbel: bool = False,
        per: str = "batch",
        scope: str = "rank",
        auxiliary: AuxiliaryRouter | None = None,
        logit_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden, num_experts, logit_bias, torch.float32, device, wide_dtype(dtype))
        if capacity is not None and not 0 < capacity <= 1:
            raise ValueError(f"capacity must be in (0, 1], got {capacity}")
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f"score must be sigmoid or softmax, got {score}")
        if per not in ("batch", "sequence"):
            raise ValueError(f"per must be batch or sequence, got {per}")
        if scope not in ("rank", "world"):
            raise ValueError(f"scope must be rank or world, got {scope}")
        self.capacity, self.score, self.gumbel = capacity, score, gumbel
        self.per, self.scope, self.auxiliary, self.causal = per, scope, auxiliary, False
        self.reset_parameters()

    def causal_(self, on: bool = True) -> "ExpertChoiceRouter":
        """The auxiliary router chooses from here on; the weights stay the scores."""
        if on and self.auxiliary is None:
            raise ValueError("auxiliary must be given for causal_, got None")
        if on and not self.auxiliary.trained:
            raise ValueError(
                "auxiliary must be trained for causal_ (moert.layers.train_auxiliary), got an untrained one"
            )
        self.causal = on
        return self

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Routing:
        context = context or RouterContext()
        logits_TE = self.logits(x, context)
        if self.training and self.gumbel:
            logits_TE = logits_TE + gumbel(logits_TE) - gumbel(logits_TE)
        scores_TE = SCORES[self.score](logits_TE)
        mask = context.counted()
        if self.causal:
            taken = self.auxiliary(x) > 0
            taken = taken if mask is None else taken & mask[:, None]
            ids = torch.where(taken, torch.arange(self.num_experts, device=x.device), self.num_experts)
            return Routing(ids, torch.where(taken, scores_TE, 0), self.num_experts, logits_TE)
        segment, D = document_of_token(context.cu_seqlens if self.per == "sequence" else None, len(x), x.device)
        segment = segment if mask is None else torch.where(mask, segment, D)
        capacity = self._tokens_per_expert(segment, D)
        weights, ids, plan = expert_choice(scores_TE, segment, capacity, max_slots=self._max_slots(len(x), D))
        return Routing(ids, weights, self.num_experts, logits_TE, plan=plan)

    def _max_slots(self, T: int, D: int) -> int | None:
        """A bound on the choices of T tokens in D segments that depends on nothing else: a masked token lowers them."""
        if self.scope == "world":
            return None  # a rank with few tokens may take them all
        E = self.num_experts
        # Whole numbers alone, lest a symbolic T meets a fraction: at least the share of T, and one more per segment.
        share = T // E if self.capacity is None else T * math.ceil(self.capacity * 2**20) // 2**20
        return torch.sym_min(share + D, T) * E

    def _tokens_per_expert(self, segment: Tensor, D: int) -> Tensor:
        """[D, E], from the number of tokens in each segment; segment D is no segment."""
        count = tokens_per_document(segment, D)
        if self.scope == "world" and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            count = count // torch.distributed.get_world_size()
        if self.capacity is None:
            tokens = (count + self.num_experts - 1) // self.num_experts
        else:
            # Less a little, lest the rounding of a product that is whole lifts it to the next integer.
            tokens = torch.ceil(self.capacity * count.double() - 1e-6).long().clamp_min(1)
        return tokens[:, None].expand(D, self.num_experts)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, capacity={self.capacity}, score={self.score}"
