"""PEFT's low-rank adapters on expert weights: x A B per expert, equal to PEFT's own W + dW, which is never made."""

import copy

import peft
import pytest
import torch
from families import families, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import moert.integrations.transformers  # noqa: F401  registers "moert"
from moert.testing import row_error

# Plain, transposed, transposed with biases and interleaved, unknown gate, norm after the experts, without gate.
KINDS = {"Qwen3Moe": "mlp", "Aria": "mlp", "GptOss": "mlp", "Inkling2": "mlp", "MuseSpark": "", "NemotronH": "mixer"}


def adapted(kind: str, adapters: int = 1) -> torch.nn.Module:
    """The tiny model of a kind with random adapters on both weights of its experts."""
    model = tiny_model(next(family for family in families() if family.id == kind))
    up = "up_proj" if kind == "NemotronH" else "gate_up_proj"
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=[f"experts.{up}", "experts.down_proj"]
    )
    model = peft.get_peft_model(model, config)
    for number in range(1, adapters):
        model.add_adapter(f"further{number}", config)
    if adapters > 1:
        model.base_model.set_adapter(["default", *(f"further{number}" for number in range(1, adapters))])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
                p.requires_grad_()
    return model


class Largest(TorchDispatchMode):
    """The shapes of all new tensors while it is on."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if torch.is_tensor(t)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(t.shape))
        return out


def results(model, implementation: str) -> dict[str, torch.Tensor]:
    model.base_model.model.set_experts_implementation(implementation)
    model.zero_grad()
    y = model(**tiny_inputs(model.base_model.model), use_cache=False)[0]
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [1, 2], ids="A{}".format)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(kind, adapters):
    model = adapted(kind, adapters)
    want, mine = results(model, "eager"), results(model, "moert")
    exact = results(copy.deepcopy(model).double(), "eager") if kind != "Inkling2" else want
    assert mine.keys() == want.keys() and sum("lora_" in name for name in mine) >= 4 * adapters
    for name in want:
        errors = [row_error(x[name].reshape(1, -1), exact[name].reshape(1, -1)) for x in (mine, want)]
        assert errors[0] <= 2 * errors[1] + 1e-5, f"{name}: {errors}"


@pytest.mark.parametrize("kind", KINDS)
def test_neither_dw_nor_its_sum_is_made(kind, monkeypatch):
    """Where PEFT was imported after moert the first forward learns of it."""
    wrapper = peft.tuners.lora.layer.ParamWrapper
    monkeypatch.setattr(
        wrapper, "_activate_lora", getattr(wrapper._activate_lora, "_moert_original", wrapper._activate_lora)
    )
    model = adapted(kind)
    weights = {tuple(p.shape) for name, p in model.named_parameters() if name.endswith(("up_proj", "down_proj"))}
    assert weights
    results(model, "moert")
    with Largest() as largest:
        results(model, "moert")
    assert not weights & largest.shapes
    with Largest() as largest:
        results(model, "eager")
    assert weights & largest.shapes, "the check must see what PEFT makes"


def test_merged_disabled_and_without_adapter():
    model = adapted("Qwen3Moe")
    x = tiny_inputs(model.base_model.model)

    def logits(implementation):
        model.base_model.model.set_experts_implementation(implementation)
        with torch.no_grad():
            return model(**x).logits

    with model.disable_adapter():
        bare = logits("moert")
        assert row_error(bare, logits("eager")) < 1e-5
    adapted_logits = logits("moert")
    assert row_error(adapted_logits, bare) > 1e-2
    model.merge_adapter()
    assert row_error(logits("moert"), adapted_logits) < 1e-5
    model.unmerge_adapter()
    assert row_error(logits("moert"), adapted_logits) < 1e-5


def test_adapters_train():
    """Five steps change the loss as PEFT's own five steps do, and leave the weights as they were."""
    losses = {}
    for implementation in ("eager", "moert"):
        model = adapted("Qwen3Moe")
        model.base_model.model.set_experts_implementation(implementation)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = tiny_inputs(model.base_model.model)["input_ids"]
        losses[implementation] = []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert losses["moert"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["moert"][-1] < losses["moert"][0]
