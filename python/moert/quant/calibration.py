"""A model run on batches of calibration: each layer is packed by what the packed layers before it make of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moert.quant.float_experts import FloatExperts, LayerReport, PackFormat, pack_experts
from moert.quant.gptq import GPTQ
from moert.quant.progress import Progress


class _Reached(BaseException):
    """Ends a forward pass at the module in question; no `except Exception` of a model is meant by it."""


def calibrate_(
    model: nn.Module,
    experts: Mapping[str, FloatExperts],
    calibration: Iterable[Any],
    fmt: PackFormat,
    settings: GPTQ = GPTQ(),
) -> list[LayerReport]:
    """Packs the experts, named as in the model, in the order in which the model calls them; reports in that order.

    A batch is a tensor, a mapping or a sequence: what the model is called with.  In memory, beside the model: the
    batches, the rows of one layer in their own dtype, settings.memory of Hessians and copies of those experts' weights.
    Time, beside GPTQ's own: a forward pass of all batches, and one up to each layer.
    """
    batches = checked_batches(calibration)
    with Progress(sum(each.shapes[0][0] for each in experts.values()), "experts") as progress:
        return calibrate_quietly_(model, experts, batches, fmt, settings, progress.advance)


def calibrate_quietly_(
    model: nn.Module,
    experts: Mapping[str, FloatExperts],
    batches: list,
    fmt: PackFormat,
    settings: GPTQ,
    advance: Callable[[int, str], None],
) -> list[LayerReport]:
    """The same, telling advance how many experts of which module are done."""
    reports = []
    with evaluating(model), torch.no_grad():
        calls = [called(model, batch, experts) for batch in batches]
        order = list(dict.fromkeys(name for names in calls for name in names))
        order += [name for name in experts if name not in order]  # never called: they are rounded
        for name in order:
            counts = [names.count(name) for names in calls]
            x, ids = rows_of(model, batches, counts, experts[name])
            reports.append(_pack(name, experts[name], x, ids, fmt, settings, advance))
    return reports


def checked_batches(calibration: Iterable[Any]) -> list[Any]:
    if isinstance(calibration, (Tensor, Mapping, str)):
        kind = type(calibration).__name__
        raise TypeError(f"calibration must be an iterable of batches, got one {kind}: put it in a list")
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration must hold at least one batch, got none")
    for batch in batches:
        if not isinstance(batch, (Tensor, Mapping, list, tuple)):
            raise TypeError(f"calibration must hold tensors, mappings or sequences, got {type(batch).__name__}")
    return batches


def called(model: nn.Module, batch: Any, experts: Mapping[str, FloatExperts]) -> list[str]:
    """The names of the experts that the model calls for a batch, in order."""
    names = []
    hooks = {name: partial(lambda name, *_: names.append(name), name) for name in experts}
    with _hooked({experts[name].module: hook for name, hook in hooks.items()}):
        _run(model, batch)
    return names


def rows_of(model: nn.Module, batches: list, counts: list[int], experts: FloatExperts) -> tuple[Tensor, Tensor]:
    """x [T, H] and ids [T, k] of the first counts[b] calls of the experts in batch b."""
    calls = [
        call
        for batch, count in zip(batches, counts, strict=True)
        if count
        for call in _calls_of(model, batch, count, experts)
    ]
    if not calls:
        return torch.zeros(0, experts.shapes[0][2]), torch.zeros(0, 1, dtype=torch.int32)
    x, ids = zip(*calls, strict=True)
    return torch.cat(x), torch.cat(ids)


def _calls_of(model: nn.Module, batch: Any, count: int, experts: FloatExperts) -> list[tuple[Tensor, Tensor]]:
    """(x, ids) of the first calls of the experts, without rows of padding; the pass ends with the last of them."""
    calls, real = [], _real_tokens(batch)

    def keep(module, args, kwargs):
        x, ids = experts.inputs(*args, **kwargs)
        if real is not None and len(real) == len(x):
            x, ids = x[real], ids[real]
        calls.append((x, ids))
        if len(calls) == count:
            raise _Reached

    with _hooked({experts.module: keep}), suppress(_Reached):
        _run(model, batch)
    return calls


def _real_tokens(batch: Any) -> Tensor | None:
    """Which tokens of a batch its attention_mask [B, S] does not call padding; None where it calls none so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.bool().all():
        return None
    return mask.bool().flatten()


def _pack(name, experts, x, ids, fmt, settings, advance) -> LayerReport:
    try:
        packed, rows = pack_experts(experts, x, ids, (fmt, fmt), settings, lambda count: advance(count, name))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    experts.replace(packed)
    rounded = tuple(e for e, count in enumerate(rows) if count < settings.min_rows)
    if rounded:
        least = f"fewer than min_rows={settings.min_rows} rows of calibration and were rounded to nearest"
        warnings.warn(f"{len(rounded)} of {len(rows)} experts of {name} had {least}: {_listed(rounded)}", stacklevel=5)
    return LayerReport(name, rows, rounded)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*batch)


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and every module in its own mode again afterwards."""
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():  # by name: experts were replaced meanwhile
            module.training = name in training
