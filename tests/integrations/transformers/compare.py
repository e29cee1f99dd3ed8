"""Runs experts and whole models with the eager implementation and with moert and compares every row of every result."""

import copy
from collections.abc import Callable
from statistics import median

import torch
from families import text_config, tiny_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moert.integrations.transformers import experts, swap_, unswap_
from moert.integrations.transformers.swap import blocks
from moert.testing import row_error

# Classes whose eager forward computes in float32 whatever the dtype is; transformers' own grouped_mm does not either.
WIDER = {"OpenAIPrivacyFilterExperts"}
# Sampling a canvas amplifies rounding: in float32 eager, grouped_mm and batched_mm draw three different texts.
CHAOTIC = {"DiffusionGemmaForBlockDiffusion"}
LOSSES = ("loss", "aux_loss", "encoder_z_loss", "encoder_aux_loss", "decoder_z_loss", "decoder_aux_loss")
# Routers outside the experts interface: what their output says about who is chosen.
ROUTERS = {
    "DbrxRouter": lambda out: out.topk(2).indices,
    "JetMoeTopKGating": lambda out: out[4].topk(2).indices,
    "Llama4Router": lambda out: out[0] > 0,
    "LongcatFlashTopkRouter": lambda out: out[2],
    "NllbMoeTop2Router": lambda out: out[1] > 0,
    "Step3p7TopKRouter": lambda out: out[2],
    "SwitchTransformersTop1Router": lambda out: out[0],
}
FLOOR = 1e-6  # the rounding of a float32 sum: eager may be exact by luck


class InDouble(TorchFunctionMode):
    """Turns what a model does in float32 whatever its weights are into float64, for a reference worth the name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def worst(mine: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> str:
    """The first result further from the float64 one than twice eager's own distance; "" if there is none.

    Results of tokens are held by the worst token, gradients of weights by the worst expert.
    """
    got, allowed = _errors(mine, exact), _errors(eager, exact)
    return _first(got, {name: 2 * allowed[name] + FLOOR for name in exact})


def worst_of_model(got: dict[str, float], allowed: dict[str, float], exact: dict[str, Tensor], low: bool) -> str:
    """The same for a whole model, where a gate that clamps or a few numbers may come out right or wrong by luck.

    got and allowed: the distances of moert and of eager from the float64 results; low: in bfloat16.

    float32: a gradient may be as far off as twice eager's, or twice the median gradient's (one of under 8 numbers: the
    worst one's), and 1e-5.  bfloat16: the
    tokens are held to three times eager's worst token, the gradients together (root mean square of their errors) to
    twice eager's.  A loss is exact by luck only and is held to the worst token.
    """
    gradients = [name for name in exact if _is_gradient(name, exact[name])]
    tokens = max(allowed[name] for name in exact if name not in gradients and exact[name].dim())
    limits = {name: (3 if low else 2) * tokens + FLOOR for name in exact if name not in gradients}
    if low:
        got = dict(got)
        got["gradients"], all_allowed = (_rms([errors[name] for name in gradients]) for errors in (got, allowed))
        limits["gradients"] = 2 * all_allowed
    else:
        ordered = sorted(allowed[name] for name in gradients)
        # A gradient of a few numbers may be a sum over the whole model that cancels: it is held to the worst one.
        usual = {name: ordered[-1 if exact[name].numel() < 8 else len(ordered) // 2] for name in gradients}
        limits |= {name: 2 * max(allowed[name], usual[name]) + 1e-5 for name in gradients}
    return _first(got, limits)


def _first(got: dict[str, float], limits: dict[str, float]) -> str:
    for name, limit in limits.items():
        if not got[name] <= limit:
            return f"{name} is off by {got[name]:.3g}, allowed {limit:.3g}"
    return ""


def _rms(x: list[float]) -> float:
    return (sum(value**2 for value in x) / len(x)) ** 0.5


def _errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert results.keys() == exact.keys(), f"{sorted(results)} and {sorted(exact)}"
    # A gradient that is zero but for rounding is compared with the size of the largest.
    least = 1e-4 * max([x.norm().item() for name, x in exact.items() if _is_gradient(name, x)], default=0.0)
    return {name: _error(name, results[name], exact[name], least) for name in exact}


def _is_gradient(name: str, x: Tensor) -> bool:
    return name.startswith("d") and name != "dx"


def _is_rounding(name: str, exact: dict[str, Tensor]) -> bool:
    """Whether it is a gradient that would be zero but for rounding, as that of a gate whose weights are normalized."""
    largest = max(x.norm().item() for each, x in exact.items() if _is_gradient(each, x))
    return _is_gradient(name, exact[name]) and exact[name].norm().item() < 1e-12 * largest


def _error(name: str, x: Tensor, exact: Tensor, least: float) -> float:
    if name == "dweights":  # a token has only k of them, and a dot product of either may cancel
        x, exact = x.flatten(), exact.flatten()
    elif not _is_gradient(name, exact):
        return row_error(x.reshape(-1, x.shape[-1] if x.dim() else 1), exact.reshape(-1, x.shape[-1] if x.dim() else 1))
    x, exact = (t.double().flatten(1) if t.dim() == 3 else t.double().reshape(1, -1) for t in (x, exact))
    size = exact.norm(dim=1)
    error = ((x - exact).norm(dim=1) / size.clamp_min(max(1e-3 * size.max().item(), least, 1e-30))).max().item()
    return float("inf") if error != error else error


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As from_pretrained(dtype=...) would load it: what a class keeps in float32 stays there."""
    model = copy.deepcopy(model).to(dtype)
    keep = model._keep_in_fp32_modules_strict or ()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if dtype == torch.bfloat16 and p.is_floating_point() and any(f".{key}." in f".{name}." for key in keep):
            p.data = p.data.float()
    return model


def routing(module: nn.Module, tokens: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids [T, k], distinct within a token, and float32 weights; the last expert stays empty."""
    generator = torch.Generator().manual_seed(seed)
    E = module.down_proj.shape[0]
    scores = torch.rand(tokens, max(E - 1, k), generator=generator)
    return scores.topk(k).indices, torch.rand(tokens, k, generator=generator).to(dtype)


def run_experts(module: nn.Module, forward, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """y and every gradient of one experts module under a given forward."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = forward(module, x, ids, weights)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(cotangent)
    grads = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad} | grads


def compare_experts(module: nn.Module, dtype: torch.dtype, tokens: int = 13) -> str:
    """The experts module alone, eager against moert; "" or what is wrong."""
    module = copy.deepcopy(module).to(dtype)
    double = copy.deepcopy(module).double()
    w1 = module.gate_up_proj if module.has_gate else module.up_proj
    ids, weights = routing(module, tokens, min(2, module.down_proj.shape[0]), dtype)
    for seed in range(100):
        x = torch.randn(
            tokens, w1.shape[1 if module.is_transposed else 2], generator=torch.Generator().manual_seed(seed)
        )
        if not _meets_the_clamp(double, x.to(dtype).double(), ids):
            break
    x = x.to(dtype)
    eager = type(module).forward.__wrapped__
    mine = run_experts(module, experts.experts_forward, x, ids, weights)
    yardstick = eager if type(module).__name__ not in WIDER else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    same = run_experts(module, yardstick, x, ids, weights)
    with InDouble():
        exact = run_experts(double, eager, x.double(), ids, weights.double())
    return worst(mine, same, exact)


def _meets_the_clamp(module: nn.Module, x: Tensor, ids: Tensor) -> bool:
    """Whether a value lies so near the clamp of the gate that rounding to bfloat16 turns its derivative on or off."""
    limit = getattr(module, "swiglu_limit", getattr(module, "limit", None))
    if limit is None:
        return False
    w1 = module.gate_up_proj[ids]
    h = torch.einsum("th,tkhi->tki" if module.is_transposed else "th,tkih->tki", x, w1).detach()
    if module.has_bias:
        h = h + module.gate_up_proj_bias[ids].detach()
    return bool(((h.abs() - limit).abs() < 2**-7 * limit).any())


def choose(model: nn.Module, implementation: str) -> None:
    if blocks(model):
        (swap_ if implementation == "moert" else unswap_)(model)
    else:
        model.set_experts_implementation(implementation)


def run_model(model: nn.Module, implementation: str, inputs: dict, backward: bool = True) -> tuple[dict, list[Tensor]]:
    """Logits, losses and gradients of a whole model, and the ids every experts module was called with."""
    choose(model, implementation)
    model.zero_grad(set_to_none=True)
    ids, hooks = [], []
    for module in model.modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
            hooks.append(module.register_forward_pre_hook(_keep_ids(ids), with_kwargs=True))
        if chosen := ROUTERS.get(type(module).__name__):
            hooks.append(module.register_forward_hook(_keep_chosen(ids, chosen)))
    torch.manual_seed(0)  # a diffusion model draws its canvas
    out = model(**inputs, **_options(model, inputs))
    for hook in hooks:
        hook.remove()
    results = {name: out[name] for name in ("logits", "last_hidden_state", *LOSSES) if out.get(name) is not None}
    for name in ("router_logits", "encoder_router_logits", "decoder_router_logits", "feature_maps"):
        results |= {f"{name}{i}": x for i, x in enumerate(out.get(name) or ())}
    if backward:
        main = next(results[name] for name in ("logits", "last_hidden_state", "feature_maps0") if name in results)
        cotangent = torch.randn(main.shape, generator=torch.Generator().manual_seed(2)).to(main.dtype)
        total = (main * cotangent).sum() + sum(results[name] for name in LOSSES if name in results)
        total.backward()
        results |= {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in results.items()}, ids


def _keep_ids(ids: list):
    def hook(module, args, kwargs):
        ids.append((args[1:] + tuple(kwargs.values()))[0].detach().clone())

    return hook


def _keep_chosen(ids: list, chosen):
    def hook(module, args, out):
        ids.append(chosen(out).detach().clone())

    return hook


def _options(model: nn.Module, inputs: dict) -> dict:
    options = {}
    if hasattr(text_config(model), "output_router_logits"):
        options["output_router_logits"] = True
    if "input_ids" in inputs and "For" in type(model).__name__ and model.can_generate():
        options["labels"] = inputs["input_ids"]
    return options


def with_one_thread(call: Callable):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return call()
    finally:
        torch.set_num_threads(threads)


def compare_model(model: nn.Module, dtype: torch.dtype, seeds: int = 12) -> str:
    """The whole model, eager against moert, on the first inputs where rounding moves no token to another expert.

    Eager's own distance is the larger of two runs': that of a gate's gradient may change by 3.4 times with the threads.
    With the input it may by 13 times, moert's too: where in float32 the first thing that is off is a gradient that is
    zero but for rounding, the medians of five inputs decide; all else is held on each of them.
    """
    model, low = to_dtype(model, dtype), dtype == torch.bfloat16
    double, tried = to_dtype(model, torch.float64), []
    for seed in range(1, seeds + 1):
        with InDouble():
            exact, ids64 = run_model(double, "eager", tiny_inputs(double, seed))
        eager, ids = run_model(model, "eager", tiny_inputs(model, seed))
        alone = with_one_thread(lambda seed=seed: run_model(model, "eager", tiny_inputs(model, seed)))
        mine, my_ids = run_model(model, "moert", tiny_inputs(model, seed))
        others = my_ids, ids64, alone[1]
        if all(torch.equal(a, b) for other in others for a, b in zip(ids, other, strict=True)):
            runs = [_errors(each, exact) for each in (eager, alone[0])]
            tried.append((_errors(mine, exact), {name: max(run[name] for run in runs) for name in exact}))
            wrong = worst_of_model(*tried[-1], exact, low)
            if low or (wrong and not _is_rounding(wrong.split()[0], exact)) or not (wrong or tried[1:]):
                return wrong
            if len(tried) == 5:
                break
    if tried:
        usual = ({name: median(each[name] for each in errors) for name in exact} for errors in zip(*tried, strict=True))
        return worst_of_model(*usual, exact, low)
    return f"rounding moves a token in each of {seeds} inputs"


def compare_generate(model: nn.Module, steps: int = 6) -> str:
    """Greedy tokens with a KV cache, eager against moert."""
    if type(model).__name__ in CHAOTIC:
        model = to_dtype(model, torch.float64)
    inputs = tiny_inputs(model, generate=True)
    tokens = {}
    for implementation in ("eager", "moert"):
        choose(model, implementation)
        with torch.no_grad():
            torch.manual_seed(0)
            out = model.generate(
                **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0
            )
        tokens[implementation] = out if torch.is_tensor(out) else out.sequences
    return "" if torch.equal(tokens["eager"], tokens["moert"]) else f"tokens are {tokens}"
