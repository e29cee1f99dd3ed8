"""Systems of the literature inside Hugging Face models: what their documents show, held to what the parts promise."""

import pytest
import torch
from tests.decode.models import mixtral
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ViTConfig, ViTModel

from moert import GluExperts, MoELayer, RouterContext
from moert.experts import HeteroExperts
from moert.integrations.transformers.routers import use_routers_
from moert.layers import FeedForward, MoMaLayer, train_auxiliary
from moert.routers import (
    DenseToSparseRouter,
    GatingResidualRouter,
    PrototypeRouter,
    causal_routers_,
    given_context,
    linked_routers,
    recorded_routings,
)

KINDS = ["ffn"] * 8 + ["const", "copy", "zero"]
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def sizes(model):
    experts = model.model.layers[0].mlp.experts
    return experts.gate_up_proj.shape[0], model.config.hidden_size, experts.down_proj.shape[2]


@pytest.fixture
def plus():
    model = mixtral().eval()
    E, H, I = sizes(model)
    for layer in model.model.layers:
        ffn = GluExperts(E, H, I)
        ffn.load_state_dict(layer.mlp.experts.state_dict())
        kinds = KINDS[8 - E :]
        layer.mlp = MoELayer(GatingResidualRouter(H, len(kinds), kinds=kinds), HeteroExperts(ffn, kinds, H))
    return model


def test_moe_plus_plus_hands_logits_from_layer_to_layer(plus):
    with linked_routers(plus), recorded_routings(plus) as calls:
        logits = plus(IDS).logits
    (_, first), (name, second) = calls
    with recorded_routings(plus) as alone:
        assert not torch.equal(plus(IDS).logits, logits)
    assert torch.equal(alone[0][1].logits, first.logits)
    residual = plus.get_submodule(name).residual_weight
    torch.testing.assert_close(second.logits - alone[1][1].logits, first.logits @ residual.T)
    with linked_routers(plus):
        assert torch.equal(plus.generate(IDS, **GREEDY), plus.generate(IDS, use_cache=False, **GREEDY))


def test_moe_plus_plus_trains_every_parameter(plus):
    with linked_routers(plus.train()), recorded_routings(plus) as calls:
        loss = plus(IDS, labels=IDS).loss
    sum([each for _, routing in calls for each in routing.losses.values()], loss).backward()
    unused = [name for name, p in plus.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == ["model.layers.0.mlp.router.residual_weight"]  # nothing comes before the first


def dense_to_sparse(gate):
    E, H = gate.weight.shape
    router = DenseToSparseRouter(H, E, gate.top_k, total_steps=10)
    router.weight.data.copy_(gate.weight)
    return router


def test_dense_to_sparse_is_the_gate_in_evaluation_and_dense_at_first():
    model = mixtral().eval()
    model.set_experts_implementation("moert")
    expected = model(IDS).logits
    assert len(use_routers_(model, dense_to_sparse)) == 2
    torch.testing.assert_close(model(IDS).logits, expected)
    assert torch.equal(model.generate(IDS, **GREEDY), model.generate(IDS, use_cache=False, **GREEDY))
    model.train()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.router.weight"):
            parameter.data.mul_(20)
    used = []
    for step in (0, 10):
        with given_context(model, RouterContext(step=step)), recorded_routings(model) as calls:
            model(IDS, labels=IDS).loss.backward()
        used.append(sum((routing.ids < routing.num_experts).sum().item() for _, routing in calls))
    assert used[1] < used[0] <= 2 * IDS.numel() * sizes(model)[0]
    assert all(p.grad.any() for name, p in model.named_parameters() if "gate.router" in name)


def test_promoe_in_a_model_of_patches():
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model, labels = ViTModel(config), torch.tensor([3, 1000, 7, 1000])
    experts = GluExperts(7, 32, 32, "gelu_tanh", bias=True)
    layer = MoELayer(PrototypeRouter(32, 6), experts, FeedForward(32, 32, "gelu_tanh", bias=True))
    model.layers[1].mlp = layer

    def of_labels(x):
        return RouterContext(conditional=(labels != 1000).repeat_interleave(len(x) // len(labels)))

    images = torch.randn(4, 3, 16, 16)
    with given_context(model, of_labels), recorded_routings(model) as calls:
        y = model(images).last_hidden_state
    ids = calls[0][1].ids.view(4, 5)  # four patches and the first token
    assert (ids[[1, 3]] == 6).all() and (ids[[0, 2]] < 6).all()
    (y.square().mean() + calls[0][1].losses["rcl"]).backward()
    assert layer.router.prototypes.grad.any()
    with torch.no_grad(), given_context(model.eval(), of_labels):
        before = model(images).last_hidden_state
        layer.experts.down_proj[6] += 1
        after = model(images).last_hidden_state
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[[1, 3]], after[[1, 3]])


def test_moma_in_an_early_fusion_model():
    images = {f"IMGIMG{chr(65 + i)}Z": 48 + i for i in range(16)}
    config = ChameleonConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocabulary_map={"<image>": 4} | images,
        vq_config={"embed_dim": 8, "latent_channels": 8, "num_embeddings": 16, "base_channels": 32, "resolution": 32},
    )  # fmt: skip
    model, seen = ChameleonForConditionalGeneration(config), {}
    for layer in model.model.layers:
        layer.mlp = MoMaLayer(32, 16, (2, 3))
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.update(ids=inputs[0]))
    ids = torch.randint(5, 64, (2, 24))

    def of_ids(x):
        return RouterContext(modality=(seen["ids"].flatten() >= 48).long())

    with given_context(model, of_ids):
        with recorded_routings(model) as calls:
            model(ids, labels=ids).loss.backward()
        joint = [routing for name, routing in calls if name.endswith("mlp.router")]
        image = (ids.flatten() >= 48)[:, None]
        for routing in joint:
            real = routing.ids < 5
            assert torch.equal(real & (routing.ids >= 2), real & image)
        assert all(p.grad.any() for name, p in model.named_parameters() if "mlp.experts" in name)
        assert len(train_auxiliary(model.eval(), [(ids,)], steps=3)) == 4
        causal_routers_(model)
        assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, use_cache=False, **GREEDY))
