import copy

import pytest
import torch
from tests.decode.models import SIZES, greedy, llama, mixtral
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, DynamicCache

from moert.decode.cached import holding
from moert.integrations.transformers.depth import DepthLayer, SkippableLayer, causal_, to_mod, to_recursive
from moert.layers import MoMaLayer, train_auxiliary
from moert.routers import given_context, recorded_routings, routers_in
from moert.routers.base import RouterContext

IDS = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))


def undecided(model):
    """Routers that let about half of the tokens through."""
    for router in (each for each in routers_in(model).values() if hasattr(each, "weight")):
        nn.init.normal_(router.weight, std=0.5)
        if getattr(router, "predictor", None) is not None:
            nn.init.normal_(router.predictor.down.weight, std=0.5)
            nn.init.normal_(router.predictor.up.weight, std=0.5)
    return model


def mod(make=llama, **options):
    return undecided(to_mod(make(num_hidden_layers=4), capacity=0.5, **options))


def mor(make=llama, layers=6, **options):
    return undecided(to_recursive(make(num_hidden_layers=layers), 2, **options))


@torch.no_grad()
def test_mod_with_every_token_and_gate_one_is_the_model():
    plain, model = llama(num_hidden_layers=4), to_mod(llama(num_hidden_layers=4), layers=(0, 2, 3), capacity=1)
    for router in routers_in(model).values():
        router._weights = torch.ones_like
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mod_agrees_with_a_loop_over_the_layers():
    model, plain = mod(), llama(num_hidden_layers=4)
    for x, source in zip(plain.model.layers, model.model.layers, strict=True):
        x.load_state_dict((source.run.block.layer if isinstance(source, DepthLayer) else source).state_dict())
    out = []
    for ids in IDS:
        x, at = plain.model.embed_tokens(ids[None]), torch.arange(11)[None]
        for i, layer in enumerate(plain.model.layers):
            if i % 2 == 0:
                x = layer(x, position_embeddings=plain.model.rotary_emb(x, at))
                continue
            r = x[0] @ model.model.layers[i].run.router.weight[0]
            chosen = r.topk(5).indices.sort().values
            u = x[:, chosen]
            delta = layer(u, position_embeddings=plain.model.rotary_emb(u, chosen[None])) - u
            x = x.index_copy(1, chosen, u + r[chosen][None, :, None] * delta)
        out.append(plain.lm_head(plain.model.norm(x)))
    torch.testing.assert_close(model(IDS).logits, torch.cat(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", (llama, mixtral))
@pytest.mark.parametrize("convert", (mod, mor))
def test_training_reaches_every_parameter(convert, make):
    model = convert(make).train()
    with recorded_routings(model) as calls:
        loss = model(IDS, labels=IDS).loss
    sum([each for _, r in calls for each in r.losses.values()], loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == [] and loss.isfinite()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with recorded_routings(model) as calls:
        loss = model(IDS, labels=IDS).loss
    sum([each for _, r in calls for each in r.losses.values()], loss).backward()
    for got, expected in zip((p.grad for p in model.parameters()), grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    (
        mod,
        lambda: mod(layers=(0, 1), causal="aux"),
        lambda: mod(mixtral),
        mor,
        lambda: mor(kv="shared"),
        lambda: mor(mode="token"),
        lambda: mor(layers=4, sharing="cycle"),
    ),
    ids=("mod", "mod, first layer, aux", "mod, mixtral", "mor", "mor, shared", "mor, token choice", "mor, cycle"),
)
def test_generation_is_what_recomputing_gives(make):
    model = causal_(make())
    expected = greedy(model, IDS, 5)
    cache = DynamicCache(config=model.config)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = model.generate(IDS, **options, **holding(model, cache))
    assert torch.equal(out, expected)
    places = [place for place in cache.layers if isinstance(place, SkippableLayer)]
    assert places
    for place in places:
        assert place.kv.stored() > 0 and place.get_seq_length() == 15
        if hasattr(place.kv, "keys"):  # Mixture-of-Depths: a row for each token that passed
            assert place.kv.stored() < 2 * 15


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("convert", (mod, mor))
@pytest.mark.parametrize("side", ("left", "right"))
@torch.no_grad()
def test_padding_changes_nothing(convert, side, attention):
    model = convert(lambda **sizes: llama(attn_implementation=attention, **sizes))
    short, pad, S = IDS[1:, :7], torch.zeros(1, 4, dtype=torch.int64), slice(4, 11) if side == "left" else slice(0, 7)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    batch, mask = torch.cat([IDS[:1], row]), torch.ones(2, 11, dtype=torch.int64)
    mask[1] = 0
    mask[1, S] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    causal_(model)
    alone = model(short, use_cache=False).logits
    padded = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits[1:, S]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_recursion_of_every_token_is_the_unrolled_model():
    for sharing, order in (("middle-cycle", (0, 1, 0, 1)), ("middle-sequence", (0, 0, 1, 1))):
        options = {"capacity": [1, 1], "gating": "replace", "sharing": sharing, "init": "lower"}
        model, plain = mor(**options), llama(num_hidden_layers=6)
        inner = [copy.deepcopy(layer) for layer in plain.model.layers[1:3]]
        for place, i in enumerate(order):
            plain.model.layers[1 + place].load_state_dict(inner[i].state_dict())
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
        size = sum(p.numel() for p in inner[0].parameters())
        assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in model.parameters()) == (
            2 * size - sum(p.numel() for r in routers_in(model).values() for p in r.parameters())
        )


@pytest.mark.parametrize(
    "sharing,init,expected",
    (
        ("middle-cycle", "average", ((1, 3), (2, 4))),
        ("middle-sequence", "average", ((1, 2), (3, 4))),
        ("middle-cycle", "stepwise", ((1,), (4,))),
        ("middle-cycle", "lower", ((1,), (2,))),
        ("middle-cycle", "upper", ((3,), (4,))),
        ("cycle", "average", ((0, 3), (1, 4), (2, 5))),
    ),
)
def test_where_shared_weights_come_from(sharing, init, expected):
    plain, model = llama(num_hidden_layers=6), mor(sharing=sharing, init=init)
    weights = [layer.mlp.up_proj.weight for layer in plain.model.layers]
    (stack,) = (m.run for m in model.modules() if isinstance(m, DepthLayer))
    for block, layers in zip(stack.blocks, expected, strict=True):
        torch.testing.assert_close(block.layer.mlp.up_proj.weight, torch.stack([weights[i] for i in layers]).mean(0))


def test_state_dict_and_context():
    one, other = mod(), mod()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(IDS).logits, other(IDS).logits)
    with given_context(one, RouterContext(step=0)), recorded_routings(one) as calls:
        one(IDS)
    assert len(calls) == 2


def moma_and_mod(**sizes):
    """Chameleon with MoMa layers, every second one entered by half of the tokens; what it is given as its context."""
    images = {f"IMGIMG{chr(65 + i)}Z": 40 + i for i in range(8)}
    quantizer = {"embed_dim": 8, "latent_channels": 8, "num_embeddings": 8, "base_channels": 32, "resolution": 32}
    config = ChameleonConfig(**SIZES | sizes, vocabulary_map={"<image>": 4} | images, vq_config=quantizer)
    torch.manual_seed(0)
    model, seen = ChameleonForConditionalGeneration(config).eval(), {}
    for layer in model.model.layers:
        layer.mlp = MoMaLayer(64, 16, (2, 3), gumbel=False)
    undecided(to_mod(model.model, (0, 2), 0.5))
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: seen.update(ids=inputs[0]))
    return model, lambda x: RouterContext(modality=(seen["ids"].flatten() >= 40).long())


@torch.no_grad()
def test_experts_of_a_modality_within_the_layers_that_some_tokens_enter():
    """Every expert takes its share of the tokens of its modality that entered the layer, and no others."""
    model, of_ids = moma_and_mod(num_hidden_layers=4)
    text = IDS.flatten() < 40
    with given_context(model, of_ids), recorded_routings(model) as calls:
        model(IDS)
    own = {name: r for name, r in calls if name.endswith("mlp.router")}
    assert [len(r.ids) for r in own.values()] == [10, 22, 10, 22]
    depths = [r for name, r in calls if name.endswith("run.router")]
    for depth, inner in zip(depths, [r for r in own.values() if len(r.ids) == 10], strict=True):
        of_rows = text[depth.ids[:, 0] == 0]
        for experts, rows, n in ((range(2), of_rows, 2), (range(2, 5), ~of_rows, 3)):
            for e in experts:
                members = (inner.ids == e).any(1)
                assert members.sum() == -(-int(rows.sum()) // n) and not members[~rows].any()


def test_experts_and_depths_learn_to_decide_alone_and_generate():
    model, of_ids = moma_and_mod(num_hidden_layers=4)
    with given_context(model, of_ids):
        model.train()
        with recorded_routings(model) as calls:
            loss = model(IDS, labels=IDS).loss
        sum([each for _, r in calls for each in r.losses.values()], loss).backward()
        trained = [p for name, p in model.named_parameters() if "auxiliary" not in name and "vqmodel" not in name]
        grads = [p.grad.clone() for p in trained]
        model.zero_grad()
        model.gradient_checkpointing_enable()
        with recorded_routings(model) as calls:
            loss = model(IDS, labels=IDS).loss
    # Outside, as a training loop may do it: what runs again has the context that it had.
    with given_context(model, of_ids):
        sum([each for _, r in calls for each in r.losses.values()], loss).backward()
    for parameter, expected in zip(trained, grads, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    with given_context(model, of_ids):
        assert len(train_auxiliary(model.eval(), [(IDS,)], 5)) == 8
        causal_(model)
        options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_errors():
    model = mod()
    cache = DynamicCache(config=model.config)
    model(IDS, **holding(model, cache))
    with pytest.raises(
        ValueError, match=r"cache must be None unless tokens decide for themselves \(causal_\), got one"
    ):
        model(IDS[:, :1], **holding(model, cache))
    place = SkippableLayer(None)
    for call in (lambda: place.crop(-1), lambda: place.reorder_cache(None), lambda: place.update(None, None)):
        with pytest.raises(ValueError, match="cache must stay as it is in a model of variable depth, got a change"):
            call()
    with pytest.raises(ValueError, match="cache must be a new one for every sequence of a model of variable depth"):
        place.reset()
    for call, message in (
        (lambda: to_mod(model), "model must be one of transformers' layers alone, got one converted before"),
        (lambda: to_mod(nn.Linear(2, 2)), "model must have decoder layers and a rotary embedding, got Linear"),
        (lambda: to_mod(llama(), layers=(2,)), r"layers must be in \[0, 2\), got \[2\]"),
        (lambda: causal_(llama()), "model must be made by to_mod or to_recursive, got LlamaForCausalLM"),
        (lambda: mor(layers=5), "depths must divide the 3 layers that are shared, got 2"),
        (lambda: mor(sharing="all"), "sharing must be one of cycle, sequence, middle-cycle, middle-sequence, got all"),
        (lambda: mor(init="best"), "init must be one of average, stepwise, lower, upper, got best"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, 1, S, keys\], got \[2, 11\]"):
        model.model.layers[1](torch.randn(2, 11, 64), torch.ones(2, 11))
