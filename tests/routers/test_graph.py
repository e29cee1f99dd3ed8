import functools

import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, RouterContext
from moert.routers import AttentionAwareRouter, SimilarityRouter, mix_probs_with_attention, mixing_statistics
from moert.testing import OperatorsRan

D, E = 8, 5
TWO = torch.tensor([0, 7, 12], dtype=torch.int32)


def router(sim="bilinear", **options):
    out = SimilarityRouter(D, E, 2, sim, **options)
    nn.init.normal_(out.weight)
    nn.init.normal_(out.bias)
    return out


def naive(layer, x, ends, causal):
    """Tokens, neighbours and experts one by one."""
    p = [(layer.weight.detach() @ u + layer.bias.detach()).softmax(-1) for u in x]
    r = torch.zeros(len(x), E, dtype=x.dtype)
    for first, last in zip(ends, ends[1:], strict=False):
        for i in range(first, last):
            neighbours = range(first, i + 1 if causal else last)
            if layer.sim == "cosine":
                sim = [x[i] @ x[j] / (x[i].norm() * x[j].norm()) for j in neighbours]
            else:
                sim = [x[i] @ layer.similarity.detach() @ x[j] / D**0.5 for j in neighbours]
            s = (torch.stack(sim) / layer.tau).softmax(0)
            for share, j in zip(s, neighbours, strict=True):
                for e in range(E):
                    r[i, e] += share * p[j][e]
    return r, torch.stack(p)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("sim", ("bilinear", "cosine"))
def test_exact(sim, causal):
    layer, x = router(sim, causal=causal, dtype=torch.float64), torch.randn(12, D, dtype=torch.float64)
    if sim == "bilinear":
        nn.init.normal_(layer.similarity)
    r, p = naive(layer, x, TWO.tolist(), causal)
    routing = layer(x, RouterContext(cu_seqlens=TWO))
    torch.testing.assert_close(routing.logits.exp(), r, rtol=0, atol=1e-10)
    torch.testing.assert_close(routing.state.p, p, rtol=0, atol=1e-10)
    best = r.argsort(-1, descending=True)[:, :2]
    assert torch.equal(routing.ids.long(), best)
    w = r.gather(-1, best)
    torch.testing.assert_close(routing.weights, w / w.sum(-1, keepdim=True))
    assert torch.equal(layer(x[:7]).ids, routing.ids[:7])  # the other sequence does not leak


@pytest.mark.parametrize("causal", (False, True))
def test_rows_at_a_time(causal, monkeypatch):
    layer, x, mask = router(causal=causal), torch.randn(12, D), torch.arange(12) != 4
    context = RouterContext(cu_seqlens=TWO, mask=mask)
    whole = layer(x, context).logits
    monkeypatch.setattr("moert.routers.graph.ROWS", 3)
    torch.testing.assert_close(layer(x, context).logits, whole, rtol=1e-6, atol=1e-6)


def test_defaults():
    dot, cosine = SimilarityRouter(D, E), SimilarityRouter(D, E, sim="cosine")
    assert (dot.k, dot.tau, cosine.tau, cosine.similarity) == (2, 1.0, 0.3, None)
    assert torch.equal(dot.similarity, torch.eye(D)) and not dot.bias.any() and not dot.causal


def test_the_best_may_be_chosen_before_mixing():
    layer, x = router("cosine", mixed="topk"), torch.randn(12, D)
    routing = layer(x)
    p = (x @ layer.weight.T + layer.bias).softmax(-1)
    p = torch.where(p >= p.topk(2).values[:, -1:], p, 0)
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.state.p, p)
    u = nn.functional.normalize(x, dim=-1)
    r = (u @ u.T / 0.3).softmax(-1) @ p
    best = r.topk(2)
    assert torch.equal(routing.ids.long(), best.indices)
    torch.testing.assert_close(routing.weights, best.values / best.values.sum(-1, keepdim=True))


def test_balance_is_of_the_mixed():
    layer, x = router(balance_coef=0.01), torch.randn(20, D)
    routing = layer(x)
    f = torch.bincount(routing.ids.flatten().long(), minlength=E) / 20
    torch.testing.assert_close(routing.losses["balance"], 0.01 * E * (f * routing.logits.exp().mean(0)).sum())


@pytest.mark.parametrize("k", (2, E), ids=("sparse", "dense"))
def test_experts_are_given_the_tokens_own_rows(k):
    """Mixing changes where a token goes, not what its experts see; with k = E it is the dense mixture."""
    layer, x = MoELayer(SimilarityRouter(D, E, k, "cosine", causal=True), GluExperts(E, D, 6)), torch.randn(12, D)
    nn.init.normal_(layer.router.weight)
    y = layer(x, RouterContext(cu_seqlens=TWO))
    r, _ = naive(layer.router, x, TWO.tolist(), causal=True)
    for t in range(12):
        best = sorted(range(E), key=lambda e, t=t: -r[t, e])[:k]
        row = torch.zeros(D)
        for e in best:
            gate, up = (layer.experts.gate_up_proj[e] @ x[t]).chunk(2)
            row += r[t, e] / r[t, best].sum() * (layer.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
        torch.testing.assert_close(y[t], row, rtol=0, atol=1e-5)


def entropy(p):
    return -(p * p.clamp_min(1e-30).log()).sum(-1)


@pytest.mark.parametrize("tau", (0.1, 0.3, 1.0))
def test_entropy_lies_between_its_bounds(tau):
    layer, x = router("cosine", tau=tau), torch.randn(40, D)
    routing = layer(x)
    r, p = routing.logits.exp(), routing.state.p
    u = nn.functional.normalize(x, dim=-1)
    S = (u @ u.T / tau).softmax(-1)
    low = S @ entropy(p)
    torch.testing.assert_close(r.sum(-1), torch.ones(40))
    assert (low <= entropy(r) + 1e-5).all() and (entropy(r) <= low + entropy(S) + 1e-5).all()


@pytest.mark.parametrize("sim", ("bilinear", "cosine"))
def test_causal_and_decode(sim):
    layer, x = router(sim, causal=True), torch.randn(9, D)
    whole = layer(x)
    assert torch.equal(whole.logits[0], whole.state.p[0].log())
    other = x.clone()
    other[6:] = torch.randn(3, D)
    assert torch.equal(layer(other).logits[:6], whole.logits[:6])
    state = None
    for t in range(9):
        step = layer(x[t : t + 1], RouterContext(state=state))
        torch.testing.assert_close(step.logits[0].exp(), whole.logits[t].exp(), rtol=0, atol=1e-6)
        state = step.state


@pytest.mark.parametrize("padded", (False, True))
def test_decode_of_several_sequences(padded):
    layer, x, mask = router(causal=True), torch.randn(3, 9, D), torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = not padded  # on the left
    whole = layer(x.flatten(0, 1), RouterContext(cu_seqlens=torch.arange(4) * 9, mask=mask)).logits.view(3, 9, E)
    state = None
    for first, last in ((0, 5), (5, 6), (6, 9)):
        some = {"cu_seqlens": torch.arange(4) * (last - first), "mask": mask[:, first:last]}
        step = layer(x[:, first:last].flatten(0, 1), RouterContext(state=state, **some))
        torch.testing.assert_close(step.logits.view(3, -1, E), whole[:, first:last], rtol=0, atol=1e-5)
        state = step.state
    assert state.ends == (0, 9, 18, 27) and state.p.shape == (27, E)


def test_sharp_similarity_leaves_every_token_alone():
    routing = router("cosine", tau=1e-4)(torch.randn(20, D))
    torch.testing.assert_close(routing.logits.exp(), routing.state.p, rtol=0, atol=1e-6)


def test_masked_tokens_are_nobodys_neighbours():
    layer, x, mask = router("cosine"), torch.randn(6, D), torch.tensor([True] * 4 + [False] * 2)
    masked = layer(x, RouterContext(mask=mask)).logits
    torch.testing.assert_close(masked[:4], layer(x[:4]).logits)
    alone = layer(x, RouterContext(mask=torch.zeros(6, dtype=torch.bool)))
    torch.testing.assert_close(alone.logits.exp(), alone.state.p)


@pytest.mark.parametrize("head_mix", ("mean", "learned"))
def test_attention_aware(head_mix):
    layer, x = AttentionAwareRouter(D, E, 2, heads=3, head_mix=head_mix), torch.randn(12, D)
    A = torch.rand(2, 3, 6, 6).tril()
    A[0, :, 2] = 0  # attends to nothing
    routing = layer(x, RouterContext(attention=A))
    p = routing.state.p
    for b in range(2):
        for i in range(6):
            s = A[b, :, i].mean(0)
            expected = p[b * 6 + i] if s.sum() == 0 else s / s.sum() @ p[b * 6 : b * 6 + 6]
            torch.testing.assert_close(routing.logits[b * 6 + i].exp(), expected)
    if head_mix == "learned":
        routing.weights.square().sum().backward()
        assert layer.heads.grad is not None


def test_attention_aware_decode():
    """A step has the rows of A of its own tokens, or queries of its own."""
    layer, x, q, k = AttentionAwareRouter(D, E, 2), torch.randn(2, 6, D), *torch.randn(2, 2, 3, 6, 4).unbind(0)
    A = (q @ k.mT / 2).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf).softmax(-1)
    whole = layer(x.flatten(0, 1), RouterContext(attention=A)).logits.view(2, 6, E)
    one = other = None
    for n, m in ((0, 4), (4, 5), (5, 6)):
        rows = x[:, n:m].flatten(0, 1)
        one = layer(rows, RouterContext(attention=A[:, :, n:m, :m], state=one)).state
        mixer = functools.partial(mix_probs_with_attention, q[:, :, n:m], k[:, :, :m], causal=True)
        step = layer(rows, RouterContext(attention=mixer, state=other, cu_seqlens=torch.arange(3) * (m - n)))
        torch.testing.assert_close(step.logits.view(2, -1, E), whole[:, n:m], rtol=1e-5, atol=1e-5)
        other = step.state
        assert torch.equal(one.p, other.p) and one.ends == other.ends


def test_mixing_statistics():
    layer, x = router("cosine"), torch.randn(30, D)
    routing = layer(x)
    p, r = routing.state.p, routing.logits.exp()
    got = mixing_statistics(routing)
    torch.testing.assert_close(got["entropy p"], entropy(p).mean())
    torch.testing.assert_close(got["entropy r"], entropy(r).mean())
    assert got["flips"].item() == pytest.approx(
        sum(a != b for a, b in zip(p.argmax(-1), r.argmax(-1), strict=True)) / 30
    )


@pytest.mark.parametrize("causal", (False, True))
def test_probabilities_as_values(causal):
    q, k = torch.randn(2, 2, 3, 16, 4).unbind(0)
    layer, x = AttentionAwareRouter(D, E), torch.randn(32, D)
    scores = q @ k.mT / 2
    if causal:
        scores = scores.masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
    explicit = layer(x, RouterContext(attention=scores.softmax(-1)))
    mixed = layer(x, RouterContext(attention=lambda p: mix_probs_with_attention(q, k, p, causal)))
    torch.testing.assert_close(mixed.logits.exp(), explicit.logits.exp(), rtol=1e-5, atol=1e-5)


def test_probabilities_as_values_make_no_matrix():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if torch.is_tensor(t):
                    self.size = max(self.size, t.numel())
            return out

    N = 4096
    q, p = torch.randn(1, 1, N, 4), torch.rand(N, E).softmax(-1)
    with torch.no_grad(), Largest() as largest:
        mix_probs_with_attention(q, q, p, True)
    assert 0 < largest.size < N * 64


def test_empty_dtype_compile_state_operators_and_gradients():
    layer, x = router(), torch.randn(6, D)
    assert layer(x[:0]).ids.shape == (0, 2)
    with OperatorsRan() as ran:
        MoELayer(layer, GluExperts(E, D, 4))(x)
    assert ran.names == ["topk_gating", "fused_experts"]
    layer(x).weights.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (layer.weight, layer.bias, layer.similarity))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).weights, layer(x).weights)
    other = router()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x).weights, layer(x).weights)
    assert router().bfloat16()(x.bfloat16()).weights.dtype == torch.float32


def test_attention_aware_empty_dtype_compile_state_operators_and_gradients():
    layer, x = AttentionAwareRouter(D, E, heads=3, head_mix="learned"), torch.randn(6, D)
    A = torch.rand(1, 3, 6, 6).softmax(-1)
    for shape in ((2, 3, 0, 0), (0, 3, 4, 4)):
        assert layer(x[:0], RouterContext(attention=torch.zeros(shape))).ids.shape == (0, 2)
    empty = torch.zeros(2, 3, 0, 4)
    assert mix_probs_with_attention(empty, empty, torch.zeros(0, E), True).shape == (0, E)
    context = RouterContext(attention=A)
    with OperatorsRan() as ran:
        MoELayer(layer, GluExperts(E, D, 4))(x, context)
    assert ran.names == ["topk_gating", "fused_experts"]
    layer(x, context).weights.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (layer.weight, layer.bias, layer.heads))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context).weights, layer(x, context).weights)
    other = AttentionAwareRouter(D, E, heads=3, head_mix="learned")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, context).weights, layer(x, context).weights)
    # Probabilities of a bfloat16 model are added up in float32.
    low = RouterContext(attention=A.bfloat16())
    assert torch.equal(layer(x, low).logits, layer(x, RouterContext(attention=A.bfloat16().float())).logits)
    assert layer.bfloat16()(x.bfloat16(), low).weights.dtype == torch.float32


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: SimilarityRouter(D, E, 6), r"k must be in \[1, 5\], got 6"),
        (lambda: SimilarityRouter(D, E, sim="dot"), "sim must be bilinear or cosine, got dot"),
        (lambda: SimilarityRouter(D, E, tau=0.0), "tau must be above 0, got 0.0"),
        (lambda: SimilarityRouter(D, E, mixed="some"), "mixed must be all or topk, got some"),
        (lambda: AttentionAwareRouter(D, E, head_mix="max"), "head_mix must be mean or learned, got max"),
        (lambda: AttentionAwareRouter(D, E, head_mix="learned"), "heads must be a number for head_mix learned, got"),
        (lambda: AttentionAwareRouter(D, E)(torch.zeros(3, D)), "context.attention must be a tensor or a callable"),
        (
            lambda: AttentionAwareRouter(D, E)(torch.zeros(3, D), RouterContext(attention=torch.zeros(1, 1, 4, 4))),
            r"context.attention must have B \* N = T=3 rows and B \* M = 3 columns, got \[1, 4, 4\]",
        ),
        (
            lambda: router()(torch.zeros(6, D), RouterContext(mask=torch.ones(2, 3))),
            "context.cu_seqlens must bound the 2 sequences of context.mask, got None",
        ),
        (
            lambda: router()(
                torch.zeros(12, D), RouterContext(cu_seqlens=TWO, state=router()(torch.zeros(3, D)).state)
            ),
            "context.state must have 2 sequences, got 1",
        ),
        (
            lambda: mixing_statistics(
                router()(torch.zeros(1, D), RouterContext(state=router()(torch.zeros(2, D)).state))
            ),
            "routing must be of a call without context.state, got 2 tokens before it",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
