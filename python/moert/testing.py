"""What tests and benches share: the error rule, random routings, shapes and layouts.

Letters: T tokens, E experts, k choices per token, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moert.types import Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is for gradcheck
ID_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
LAYOUTS = ("columns_first", "every_second", "padded_rows", "offset_by_one")
ROUTINGS = ("uniform", "zipf", "one_expert", "empty_experts", "sentinels")


def row_error(out: Tensor, ref: Tensor) -> float:
    """Relative error of the worst row (token): a global norm cannot see one dropped token in thousands."""
    if out.numel() == 0:
        return 0.0
    out, ref = out.double().flatten(0, -2), ref.double().flatten(0, -2)
    size = ref.norm(dim=-1)
    # A row that cancels keeps the rounding of its terms: it is held to the error of a row of a tenth of the largest.
    error = ((out - ref).norm(dim=-1) / size.clamp_min(max(0.1 * size.max().item(), 1e-30))).max().item()
    return float("inf") if error != error else error


def assert_rows_close(out: Tensor, fn, *args, factor: float = 2.0, floor: float = 2e-6) -> None:
    """out is at most `factor` times further from fn(args in float64) than fn(args) itself, row by row.

    On top come the floor, which is the rounding of a float32 sum, and half a unit in the last place of a narrower
    dtype: plain torch may be exact by luck.
    """

    def double(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    ref, same = fn(*map(double, args)), fn(*args)
    assert out.shape == ref.shape, f"shape {list(out.shape)}, expected {list(ref.shape)}"
    got, allowed = row_error(out, ref), factor * row_error(same, ref) + floor + _half_unit(same.dtype)
    assert got <= allowed, f"worst row is off by {got:.3g}, allowed {allowed:.3g} ({factor} x torch in {same.dtype})"


def _half_unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype.itemsize < 4 else 0.0


def assert_grads_close(fn, ref, dy: Tensor, *args: Tensor | None, factor: float = 2.0, floor: float = 2e-6) -> None:
    """The gradients of fn(*args) . dy for every floating argument obey the rule of assert_rows_close against ref's."""

    def grads(f, *args):
        args = [a if a is None else a.detach().requires_grad_() for a in args]
        given = [a for a in args if a is not None]
        # Of T = 0 rows a reference by tokens makes nothing: a gradient of zeros.
        return torch.autograd.grad(f(*args), given, dy.to(args[0].dtype), materialize_grads=True)

    def double(a):
        return a if a is None else a.double()

    names = [i for i, a in enumerate(args) if a is not None]
    all_three = zip(names, grads(fn, *args), grads(ref, *args), grads(ref, *map(double, args)), strict=True)
    for i, got, same, exact in all_three:
        assert got.dtype == args[i].dtype, f"gradient of argument {i} has dtype {got.dtype}, expected {args[i].dtype}"
        # Rows of a few numbers (a token's k weights, a bias) cancel by chance, all of them together do not.
        got, same, exact = (g.reshape(1, -1) if g.dim() < 2 or g.shape[-1] < 8 else g for g in (got, same, exact))
        allowed = factor * row_error(same, exact) + floor + _half_unit(args[0].dtype)
        error = row_error(got, exact)
        assert error <= allowed, f"gradient of argument {i}: worst row is off by {error:.3g}, allowed {allowed:.3g}"


class OperatorsRan(TorchDispatchMode):
    """`with OperatorsRan() as ran:` collects in ran.names moert's operators in the order in which they ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moert":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def random_routing(
    T: int,
    E: int,
    k: int,
    kind: str = "uniform",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    id_dtype: torch.dtype = torch.int32,
) -> Routing:
    """Routing of T tokens to k of E experts; weights are positive, those of dropped choices too.

    uniform and zipf (expert e as likely as 1 / (e + 1)) choose k different experts, repeating where k > E; one_expert
    sends every choice to expert E // 2; empty_experts leaves the odd ones out; sentinels drops a third (-1 and E).
    """
    if kind not in ROUTINGS:
        raise ValueError(f"kind must be one of {', '.join(ROUTINGS)}, got {kind}")
    choosable = (E + 1) // 2 if kind == "empty_experts" else E
    # The Gumbel trick: the k largest of log p + noise are k draws without replacement.
    noise = -torch.log(-torch.log(torch.rand(T, choosable, generator=generator).clamp(1e-9, 1 - 1e-7)))
    if kind == "zipf":
        noise -= torch.log(torch.arange(1, choosable + 1))
    ids = noise.argsort(-1, descending=True)[:, torch.arange(k) % choosable]
    if kind == "one_expert":
        ids = torch.full_like(ids, E // 2)
    elif kind == "empty_experts":
        ids = 2 * ids
    elif kind == "sentinels":
        lot = torch.randint(0, 6, ids.shape, generator=generator)
        ids = torch.where(lot == 0, -1, torch.where(lot == 1, E, ids))
    weights = torch.rand(T, k, generator=generator, dtype=torch.float64) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    return Routing(ids.to(id_dtype), weights.to(dtype), E)


@dataclass(frozen=True)
class Shape:
    """Sizes of one case and why it is there; str() is its pytest id, like T7-E60-k4."""

    why: str
    T: int
    E: int
    k: int
    H: int | None = None
    I: int | None = None
    kind: str = "uniform"

    def __str__(self):
        sizes = "-".join(f"{n}{getattr(self, n)}" for n in "TEkHI" if getattr(self, n) is not None)
        return sizes if self.kind == "uniform" else f"{sizes}-{self.kind}"

    def routing(self, **options) -> Routing:
        return random_routing(self.T, self.E, self.k, self.kind, **options)


GATING_SHAPES = (
    Shape("no tokens", 0, 8, 2),
    Shape("one token, one expert", 1, 1, 1),
    Shape("k = E: every expert is chosen", 5, 6, 6),
    Shape("E not a multiple of any vector", 7, 60, 4),
    Shape("Mixtral", 33, 8, 2),
    Shape("Qwen3-MoE", 64, 128, 8),
    Shape("DeepSeek-V3: 256 experts in 8 groups", 16, 256, 8),
    Shape("one more than 256 experts, a prime", 128, 257, 8),
)

PERMUTE_SHAPES = (
    Shape("no tokens", 0, 8, 2, 16),
    Shape("one token", 1, 4, 2, 8),
    Shape("one expert, one column", 5, 1, 1, 1),
    Shape("k = E", 6, 4, 4, 24),
    Shape("nothing is a multiple of the vector", 7, 60, 4, 33),
    Shape("one expert takes all", 19, 8, 2, 16, kind="one_expert"),
    Shape("every other expert is empty", 40, 16, 4, 48, kind="empty_experts"),
    Shape("dropped choices", 37, 12, 3, 65, kind="sentinels"),
    Shape("more experts than rows", 9, 300, 2, 17),
    Shape("enough rows for several threads, uneven experts", 3001, 128, 8, 20, kind="zipf"),
)

GROUPED_GEMM_SHAPES = (
    Shape("no tokens", 0, 4, 2, 16, 24),
    Shape("decode: one row an expert", 1, 8, 4, 64, 48),
    Shape("one expert is a plain GEMM", 65, 1, 1, 64, 32),
    Shape("nothing is a multiple of the vector or the tile", 7, 60, 4, 33, 19),
    Shape("one expert takes all, the others get an empty product", 130, 8, 2, 40, 136, kind="one_expert"),
    Shape("every other expert is empty", 40, 16, 4, 48, 56, kind="empty_experts"),
    Shape("dropped rows stay zero", 37, 12, 3, 65, 31, kind="sentinels"),
    Shape("several tiles of each size, uneven experts", 300, 8, 2, 300, 280, kind="zipf"),
    Shape("many rows of odd length, several blocks of it", 230, 2, 1, 1037, 45),
)

FUSED_EXPERTS_SHAPES = (
    Shape("no tokens", 0, 4, 2, 16, 24),
    Shape("decode: one token", 1, 8, 4, 64, 48),
    Shape("one expert is a plain FFN", 17, 1, 1, 32, 64),
    Shape("k = E: dense", 6, 4, 4, 24, 16),
    Shape("nothing is a multiple of the vector or the tile", 7, 60, 4, 33, 19),
    Shape("one expert takes all", 130, 8, 2, 40, 24, kind="one_expert"),
    Shape("every other expert is empty", 40, 16, 4, 48, 56, kind="empty_experts"),
    Shape("dropped choices", 37, 12, 3, 65, 31, kind="sentinels"),
    Shape("several tiles of each size, uneven experts", 300, 8, 2, 136, 144, kind="zipf"),
)

# The smallest first: it is the one that a smoke run takes.
BENCH_SHAPES = (
    Shape("decode with the model that moert run trains", 1, 32, 2, 128, 128),
    Shape("a training step of that model", 1024, 32, 2, 128, 128),
    Shape("OLMoE decode", 1, 64, 8, 2048, 1024),
    Shape("OLMoE prefill", 512, 64, 8, 2048, 1024),
    Shape("Qwen3-30B-A3B decode, sixteen sequences", 16, 128, 8, 2048, 768),
    Shape("256 rows an expert", 1024, 8, 2, 2048, 768),
)


def strided(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout (LAYOUTS); what lies between them is NaN or the largest integer."""
    junk = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    if layout == "columns_first":
        return x.mT.contiguous().mT
    if layout == "every_second":
        return torch.stack([x, torch.full_like(x, junk)], -1)[..., 0]
    if layout == "padded_rows":
        return torch.cat([x, x.new_full((*x.shape[:-1], 3), junk)], -1)[..., : x.shape[-1]]
    if layout == "offset_by_one":
        return torch.cat([x.new_full((1,), junk), x.flatten()])[1:].view(x.shape)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
