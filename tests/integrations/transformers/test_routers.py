import pytest
import torch
from tests.decode.models import SIZES, mixtral
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moert.integrations.transformers.routers import use_routers_
from moert.routers import FrozenRandomRouter, recorded_routings
from moert.testing import OperatorsRan

IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def models():
    qwen = Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=False, **SIZES)
    olmoe = OlmoeConfig(num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, **SIZES)
    made = {"mixtral": mixtral(), "qwen3": Qwen3MoeForCausalLM(qwen), "olmoe": OlmoeForCausalLM(olmoe)}
    for model in made.values():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("mixtral", "qwen3", "olmoe"))
def test_the_same_logits_and_gradients(name, dtype):
    model = models()[name].eval().to(dtype)
    expected = model(IDS).logits
    expected_grad = torch.autograd.grad(expected.float().square().sum(), model.model.embed_tokens.weight)[0]
    assert len(use_routers_(model)) == 2 and not model.training
    with OperatorsRan() as ran, recorded_routings(model) as calls:
        got = model(IDS).logits
    assert ran.names.count("topk_gating") == 2 and len(calls) == 2
    grad = torch.autograd.grad(got.float().square().sum(), model.model.embed_tokens.weight)[0]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(grad, expected_grad, **tolerance)


def test_any_router():
    model = mixtral()
    use_routers_(model, lambda gate: FrozenRandomRouter(gate.weight.shape[1], gate.weight.shape[0], 3))
    with recorded_routings(model) as calls:
        model(IDS, labels=IDS).loss.backward()
    assert [routing.ids.shape for _, routing in calls] == [(18, 3)] * 2


def test_errors():
    with pytest.raises(ValueError, match="model must have gates of MixtralTopKRouter, .*, got Linear"):
        use_routers_(nn.Linear(2, 2))
