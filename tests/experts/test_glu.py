import pytest
import torch

from moert import Activation, ExpertLayout, GluExperts
from moert.ops.fused_experts import fused_experts_ref
from moert.runtime import add_to_main_grad_
from moert.testing import assert_rows_close, random_routing

T, E, k, H, I = 21, 6, 2, 20, 12


@pytest.mark.parametrize("layout", [ExpertLayout(), ExpertLayout(True, True)], ids=["ENK", "EKN-interleaved"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2", Activation("swiglu_oai", alpha=1.5, limit=0.5)], ids=str)
def test_forward(activation, bias, layout):
    experts = GluExperts(E, H, I, activation, bias, layout)
    x, routing = torch.randn(T, H), random_routing(T, E, k)
    w1, w2, b1, b2 = (
        experts.gate_up_proj,
        experts.down_proj,
        experts.gate_up_proj_bias,
        experts.down_proj_bias,
    )

    def ref(x, w1, w2, b1, b2):
        return fused_experts_ref(x, routing, w1, w2, (b1, b2), activation, layout)

    assert_rows_close(experts(x, routing), ref, x, w1, w2, b1, b2)


def test_gradients_reach_every_parameter():
    experts = GluExperts(E, H, I, bias=True)
    experts(torch.randn(T, H), random_routing(T, E, k)).square().sum().backward()
    assert {name for name, p in experts.named_parameters() if p.grad.abs().sum() > 0} == {
        "gate_up_proj",
        "down_proj",
        "gate_up_proj_bias",
        "down_proj_bias",
    }


def test_gradients_are_added_to_main_grad():
    experts = GluExperts(E, H, I, bias=True, dtype=torch.bfloat16)
    batches = [(torch.randn(T, H).bfloat16(), random_routing(T, E, k)) for _ in range(2)]
    parameters = list(experts.parameters())
    first, second = (torch.autograd.grad(experts(*batch).square().sum(), parameters) for batch in batches)
    for p in add_to_main_grad_(experts).parameters():
        p.main_grad = torch.zeros(p.shape)
    experts(*batches[0]).square().sum().backward()
    after_one = [p.main_grad.clone() for p in parameters]
    experts(*batches[1]).square().sum().backward()
    assert all(p.grad is None for p in parameters)
    for p, one, g1, g2 in zip(parameters, after_one, first, second, strict=True):
        assert torch.equal(one.bfloat16(), g1)
        # of one more addition, in float32
        torch.testing.assert_close((p.main_grad - one).bfloat16(), g2, rtol=2**-8, atol=1e-5 * float(one.abs().max()))


def test_names_and_shapes_are_those_of_hugging_face():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_local_experts=E)
    theirs = Qwen3MoeExperts(config)
    ours = GluExperts(E, H, I)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}


def test_dtype_and_meta_device():
    experts = GluExperts(E, H, I, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    experts.reset_parameters()
    y = experts(torch.randn(T, H).bfloat16(), random_routing(T, E, k))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert experts.float()(torch.randn(T, H), random_routing(T, E, k)).dtype == torch.float32


def test_extra_repr():
    text = "num_experts=6, hidden=20, intermediate=12, activation=relu2, bias=False"
    assert GluExperts(E, H, I, "relu2").extra_repr() == text


@pytest.mark.parametrize("name", ["num_experts", "hidden", "intermediate"])
def test_errors(name):
    sizes = {"num_experts": E, "hidden": H, "intermediate": I} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GluExperts(**sizes)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of swiglu, .*, got swish"):
        GluExperts(E, H, I, "swish")
