import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.experts import HeteroExperts
from moert.layers import FeedForward, MoDBlock, PackedBlock, all_rows
from moert.routers import DepthRouter, TokenDepthRouter
from moert.runtime import SkippableKV
from moert.testing import OperatorsRan, row_error

H, HEADS = 16, 2


def mod(capacity=0.25, gate="raw", causal="predictor", ffn=None, **options):
    ffn = FeedForward(H, 24) if ffn is None else ffn
    layer = MoDBlock(PackedBlock(H, HEADS, ffn), DepthRouter(H, capacity, gate, causal, **options))
    nn.init.normal_(layer.router.weight, std=0.5)
    return layer


def naive(layer, x, chosen, r):
    """A sequence at a time, boolean indexing, attention written out over true positions."""
    block, out = layer.block, []
    for b in range(len(x)):
        at = torch.where(chosen[b])[0]
        y = x[b].clone()
        if len(at):
            u = x[b][at]
            q, k, v = block.attention.qkv(block.attention_norm(u)).view(len(at), 3, HEADS, -1).unbind(1)
            half = q.shape[-1] // 2
            angle = at[:, None].to(x.dtype) * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
            turn = torch.polar(torch.ones_like(angle), angle)[:, None]
            q, k = (torch.complex(z[..., :half], z[..., half:]) * turn for z in (q, k))
            scores = (q[:, None] * k[None].conj()).real.sum(-1) / (2 * half) ** 0.5
            scores = scores.masked_fill((at[:, None] < at)[..., None], -torch.inf).softmax(1)
            a = block.attention.out((scores[..., None] * v[None]).sum(1).flatten(1))
            y[at] = u + r[b][at, None] * (a + block.ffn(block.ffn_norm(u + a)))
        out.append(y)
    return torch.stack(out)


def parts(layer, x, context=None):
    y, routing = layer(x, context)
    return y, (routing.ids == 0).view(x.shape[:2]), routing.weights.view(x.shape[:2])


@pytest.mark.parametrize("gate", ("raw", "sigmoid", "softmax2"))
@pytest.mark.parametrize("S,capacity,padded", ((16, 0.25, False), (13, 0.3, True), (7, 1.0, True), (1, 0.125, False)))
@pytest.mark.parametrize("causal", (False, True))
def test_agrees_with_a_loop(S, capacity, padded, gate, causal):
    layer, x = mod(capacity, gate), torch.randn(3, S, H, requires_grad=True)
    layer.router.causal_(causal)
    mask = torch.arange(S) < torch.tensor([[S], [S // 2], [1]]) if padded else torch.ones(3, S, dtype=torch.bool)
    y, chosen, r = parts(layer, x, RouterContext(mask=mask.flatten()))
    expected = naive(layer, x, chosen, r)
    assert not chosen[~mask].any()
    assert row_error(y, expected) < 1e-5
    dy = torch.randn_like(y)
    inputs = [x, layer.router.weight, *layer.block.parameters()]
    got, want = (torch.autograd.grad(z, inputs, dy, retain_graph=True, allow_unused=True) for z in (y, expected))
    for g, w in zip(got, want, strict=True):
        if w is not None:
            torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w, rtol=1e-4, atol=1e-5)


def test_everything_with_gate_one_is_the_plain_block():
    layer, x = mod(1.0), torch.randn(2, 9, H)
    layer.router._weights = torch.ones_like
    plain = layer.block(x.flatten(0, 1), all_rows(x)).view_as(x)
    torch.testing.assert_close(layer(x)[0], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("causal", (False, True))
def test_unchosen_rows_keep_their_bits(dtype, causal):
    layer, x = mod().to(dtype), torch.randn(2, 20, H).to(dtype)
    layer.router.causal_(causal)
    y, chosen, _ = parts(layer, x)
    assert y.dtype == dtype and torch.equal(y[~chosen], x[~chosen]) and not torch.equal(y[chosen], x[chosen])


def test_multiply_adds_fall_with_the_capacity():
    def count(capacity):
        layer, x = mod(capacity), torch.randn(2, 64, H)
        # The fused kernel of the CPU is not counted, the products of attention are.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(x)
        flops = counter.get_flop_counts()["Global"]
        attention = sum(n for op, n in flops.items() if "attention" in str(op) or "bmm" in str(op))
        router = 2 * 2 * 64 * H * (1 + H // 2) + 2 * 2 * 64 * H // 2  # its product and its predictor's two
        return sum(flops.values()) - attention - router, attention

    (few, few_attention), (all_, all_attention) = count(0.125), count(1.0)
    assert all_attention > 0
    assert few <= 0.13 * all_ and few_attention <= 0.02 * all_attention


def test_threshold_mode_is_causal_and_top_k_leaks():
    layer, x = mod(0.5), torch.randn(2, 12, H)
    other = x.clone()
    other[:, 7:] = layer.router.weight[0].detach() * 50
    assert not torch.equal(layer(x)[0][:, :7], layer(other)[0][:, :7])
    layer.router.causal_()
    torch.testing.assert_close(layer(x)[0][:, :7], layer(other)[0][:, :7], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", ("predictor", "aux"))
def test_decode_equals_recomputation_and_stores_fewer_rows(causal):
    layer, x = mod(0.3, causal=causal), torch.randn(3, 24, H)
    layer.router.causal_()
    whole, chosen, _ = parts(layer, x)
    kv = SkippableKV(1, 3)
    for s in range(24):
        y, _ = layer(x[:, s : s + 1], positions=torch.full((3, 1), s), kv=kv)
        torch.testing.assert_close(y[:, 0], whole[:, s], rtol=1e-5, atol=1e-5)
    assert 0 < kv.stored() == chosen.sum() < 3 * 24
    with pytest.raises(ValueError, match=r"kv must be None unless router.causal_\(\) was called, got a cache"):
        layer.router.causal_(False)
        layer(x, kv=kv)


def test_no_token_passes_and_no_tokens_at_all():
    layer, x = mod(causal="aux"), torch.randn(2, 5, H)
    layer.router.causal_()
    nn.init.zeros_(layer.router.weight)
    layer.block.delta = None  # would raise if it were called
    assert torch.equal(layer(x)[0], x)
    for shape in ((0, 5, H), (2, 0, H)):
        for on in (False, True):
            other = mod(causal="aux")
            other.router.causal_(on)
            assert other(torch.zeros(shape))[0].shape == shape


def test_token_choice_is_the_same_block_with_a_router_of_two_outputs():
    layer, x = MoDBlock(PackedBlock(H, HEADS, FeedForward(H, 24)), TokenDepthRouter(H, 2)), torch.randn(3, 14, H)
    nn.init.normal_(layer.router.weight, std=0.5)
    y, chosen, p = parts(layer, x)
    assert 0 < chosen.sum() < 42 and set(layer(x)[1].losses) == {"balance", "z"}
    assert torch.equal(chosen.flatten(), (x.flatten(0, 1) @ layer.router.weight.T).argmax(-1) == 0)
    assert row_error(y, naive(layer, x, chosen, p)) < 1e-5


def test_integrated_mode_is_experts_that_do_nothing():
    kinds = ["ffn"] * 3 + ["zero"] * 2
    moe = MoELayer(TopKRouter(H, 5, 1), HeteroExperts(GluExperts(3, H, 8), kinds, H))
    block, x = PackedBlock(H, HEADS, moe), torch.randn(2, 9, H)
    u, rows = x.flatten(0, 1), all_rows(x)
    a = u + block.attention(block.attention_norm(u), rows)
    idle = moe.router(block.ffn_norm(a)).ids[:, 0] >= 3
    assert idle.any() and not idle.all()
    y = block(u, rows)
    assert torch.equal(y[idle], a[idle]) and not torch.equal(y[~idle], a[~idle])


def test_checkpointing_replays_the_choice():
    layer, x = mod(), torch.randn(2, 16, H, requires_grad=True)
    grads = []
    for y in (layer(x)[0], checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)):
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.block.parameters()]))
    assert all(map(torch.equal, *grads))


def test_compiles_for_any_length():
    layer = mod()
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 16, H), (3, 19, H)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x)[0], rtol=1e-6, atol=1e-6)


def test_state_dict_and_operators():
    moe = MoELayer(TopKRouter(H, 4, 2), GluExperts(4, H, 8))
    one, other, x = mod(ffn=moe), mod(ffn=MoELayer(TopKRouter(H, 4, 2), GluExperts(4, H, 8))), torch.randn(2, 8, H)
    other.load_state_dict(one.state_dict())
    with OperatorsRan() as ran:
        y = one(x)[0]
    assert torch.equal(other(x)[0], y)
    expected = ["expert_choice", "permute_plan", "permute", "topk_gating", "fused_experts", "unpermute"]
    assert ran.names == expected
