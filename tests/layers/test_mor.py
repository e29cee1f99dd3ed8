import copy

import pytest
import torch
from torch import nn

from moert import RouterContext
from moert.layers import FeedForward, MoRModel, PackedBlock, RecursiveStack, Rows, all_rows
from moert.layers.packed import attend, rotate
from moert.testing import OperatorsRan, row_error

H, HEADS, DEPTHS, S = 16, 2, 3, 12


def blocks(n=2):
    return [PackedBlock(H, HEADS, FeedForward(H, 24), layer) for layer in range(n)]


def recursive(**options):
    stack = RecursiveStack(blocks(), DEPTHS, H, **options)
    for router in stack.routers:
        nn.init.normal_(router.weight, std=0.5)
    return stack


def plain(stack, u, at):
    """F on the tokens of one sequence at positions `at`."""
    rows = Rows(at, torch.tensor([0, len(at)]))
    for block in stack.blocks:
        u = block(u, rows)
    return u


def naive_expert(stack, x):
    """Sequence by sequence, sets of tokens that shrink."""
    out, sets = [], []
    for sequence in x:
        active, sets_here = list(range(len(sequence))), []
        for router in stack.routers:
            r = sequence @ router.weight[0]
            k = max(1, int(router.capacity * len(sequence) + 1e-6))
            active = sorted(sorted(active, key=lambda t: -r[t].item())[:k])
            at = torch.tensor(active)
            g = router.alpha * r[at].sigmoid() if stack.gating == "weighted" else torch.ones(k)
            after = g[:, None] * plain(stack, sequence[at], at)
            put = sequence.index_copy if stack.gating == "replace" else sequence.index_add
            sequence = put(0, at, after)
            sets_here.append(active)
        out.append(sequence)
        sets.append(sets_here)
    return torch.stack(out), sets


def test_full_capacity_and_replacement_is_the_recursive_and_the_unrolled_model():
    stack = recursive(capacity=[1, 1, 1], gating="replace")
    x, rows = torch.randn(2, S, H), all_rows(torch.zeros(2, S, H))
    u = x.flatten(0, 1)
    for block in (*stack.blocks, *stack.blocks, *stack.blocks):
        u = block(u, rows)
    assert row_error(stack(x)[0], u.view_as(x)) < 1e-5
    unrolled = nn.ModuleList([copy.deepcopy(b) for _ in range(DEPTHS) for b in stack.blocks])
    v = x.flatten(0, 1)
    for block in unrolled:
        v = block(v, rows)
    assert torch.equal(u, v)
    first, last = blocks()
    model, block_size = MoRModel(first, stack, last), sum(p.numel() for p in first.parameters())
    routers = sum(p.numel() for p in stack.routers.parameters())
    assert sum(p.numel() for p in model.parameters()) == 4 * block_size + routers
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    expected = last(u := stack(first(x.flatten(0, 1), rows).view_as(x))[0].flatten(0, 1), rows).view_as(x)
    assert torch.equal(model(x)[0], expected) and u.isfinite().all()


@pytest.mark.parametrize("gating", ("weighted", "additive", "replace"))
def test_expert_choice_agrees_with_a_loop(gating):
    stack, x = recursive(gating=gating), torch.randn(3, S, H, requires_grad=True)
    y, routings = stack(x)
    expected, sets = naive_expert(stack, x)
    assert row_error(y, expected) < 1e-5
    for b, per_depth in enumerate(sets):
        assert [len(s) for s in per_depth] == [12, 8, 4]
        for r, active in enumerate(per_depth):
            assert torch.where(routings[r].ids.view(3, S)[b] == 0)[0].tolist() == active
            assert r == 0 or set(active) <= set(per_depth[r - 1])
    dy, parameters = torch.randn_like(y), [x, *stack.blocks.parameters()]
    parameters += [r.weight for r in stack.routers] if gating == "weighted" else []
    got, want = (torch.autograd.grad(z, parameters, dy, retain_graph=True) for z in (y, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_bce_counts_the_tokens_of_the_depth_before():
    stack, x = recursive(), torch.randn(1, S, H)
    first, second, _ = stack(x)[1]
    mask = first.ids[:, 0] == 0
    p = second.logits[:, 0].sigmoid()
    chosen = second.ids[:, 0] == 0
    expected = -0.001 * torch.where(chosen, p, 1 - p)[mask].log().mean()
    torch.testing.assert_close(second.losses["depth_bce"], expected)


def naive_token(stack, x):
    routing = stack.routers[0](x.flatten(0, 1))
    depth, p = routing.ids.view(x.shape[:2]), routing.weights.view(x.shape[:2])
    scores = (x @ stack.routers[0].weight.T).softmax(-1)
    out = []
    for b, start in enumerate(x):
        state = start
        for r in range(DEPTHS):
            at = torch.where(depth[b] >= r)[0]
            if len(at) == 0:
                break
            rows = []
            for t, after in zip(at.tolist(), plain(stack, state[at], at), strict=True):
                last = depth[b, t] == r
                if stack.gates == "every":
                    after = scores[b, t, r] * after
                elif last and stack.gating == "weighted":
                    after = p[b, t] * after
                rows.append(start[t] + after if last and stack.gating != "replace" else after)
            state = state.index_copy(0, at, torch.stack(rows))
        out.append(state)
    return torch.stack(out)


@pytest.mark.parametrize("options", ({}, {"gates": "every"}, {"gating": "additive"}, {"gating": "replace"}), ids=str)
def test_token_choice_agrees_with_a_loop(options):
    stack, x = recursive(mode="token", **options), torch.randn(3, S, H, requires_grad=True)
    (y, (routing,)), expected = stack(x), naive_token(stack, x)
    assert row_error(y, expected) < 1e-5
    assert set(routing.losses) == {"balance", "z"} and len(routing.ids.unique()) == DEPTHS
    dy, parameters = torch.randn_like(y), [x, *stack.blocks.parameters(), stack.routers[0].weight]
    if stack.gating != "weighted":
        parameters.pop()  # no gradient reaches the router
    got, want = (torch.autograd.grad(z, parameters, dy, retain_graph=True) for z in (y, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_what_the_routers_are_given():
    expert = recursive(threshold=0.7, bce_coef=0.2).routers[0]
    assert (expert.alpha, expert.threshold, expert.loss_coef, expert.z_coef) == (0.1, 0.7, 0.2, 0.0)
    token, bias = recursive(mode="token").routers[0], recursive(mode="token", balance="bias").routers[0]
    assert (token.scale, token.score, token.balance_coef, token.z_coef) == (1.0, "softmax", 0.1, 1e-5)
    assert bias.expert_bias is not None and recursive(mode="token", score="sigmoid").routers[0].scale == 0.1
    other = recursive(mode="token", score="sigmoid", alpha=0.3, balance_coef=0.5, z_coef=0.0).routers[0]
    assert (other.scale, other.balance_coef, other.z_coef) == (0.3, 0.5, 0.0)
    assert recursive(alpha=1.0).routers[2].alpha == 1


def test_stored_rows():
    x = torch.randn(2, 96, H)
    unrolled = DEPTHS * 2 * 2 * 96
    for strategy, share in (("recursion", 2 / 3), ("shared", 1 / 3)):
        stack = recursive(kv=strategy)
        kv = stack.new_kv(2)
        stack(x, kv=kv)
        assert kv.stored() == round(share * unrolled)


@pytest.mark.parametrize("strategy", ("recursion", "shared", "update"))
@pytest.mark.parametrize("mode", ("expert", "token"))
def test_decode_equals_recomputation(mode, strategy):
    stack, x = recursive(mode=mode, kv=strategy).eval().causal_(), torch.randn(2, 20, H)
    whole, routings = stack(x)
    kv = stack.new_kv(2)
    for s in range(20):
        y, _ = stack(x[:, s : s + 1], positions=torch.full((2, 1), s), kv=kv)
        torch.testing.assert_close(y[:, 0], whole[:, s], rtol=1e-4, atol=1e-5)
    if strategy == "recursion":  # all tokens run at the first depth, whose share is 1
        assert kv.depths[0].stored() == 2 * 2 * 20
    if strategy == "recursion" and mode == "token":
        assert kv.stored() == 2 * (routings[0].ids + 1).sum()


def test_updated_keys_are_those_of_the_deepest_depth_so_far():
    """Attention written out: at depth r a query sees every token, at the deepest depth <= r that the token reached."""
    stack, x = recursive(kv="update", capacity=[1, 0.5, 0.5]), torch.randn(1, S, H)
    whole, routings = stack(x)
    state, keys = x[0], {}
    for routing in routings:
        active = torch.where(routing.ids[:, 0] == 0)[0]
        u = state[active]
        for place, block in enumerate(stack.blocks):
            q, k, v = block.attention.qkv(block.attention_norm(u)).view(len(active), 3, HEADS, -1).unbind(1)
            rows = Rows(active, torch.tensor([0, len(active)]))
            q, k = rotate(q, active), rotate(k, active)
            for row, token in enumerate(active.tolist()):
                keys[place, token] = k[row], v[row]
            k_all, v_all = (torch.stack([keys[place, t][i] for t in range(S)]) for i in (0, 1))
            a = u + block.attention.out(attend(q, rows, [(k_all, v_all, torch.arange(S))]).flatten(1))
            u = a + block.ffn(block.ffn_norm(a))
        state = state.index_add(0, active, routing.weights[active] * u)
    assert row_error(whole[0], state) < 1e-5


def test_capacity_warms_up():
    stack, x = recursive(warmup=100), torch.randn(2, S, H)

    def chosen(step):
        return [int((r.ids == 0).sum()) for r in stack(x, RouterContext(step=step))[1]]

    assert chosen(0) == [24, 24, 24] and chosen(50) == [24, 20, 16] and chosen(100) == chosen(None) == [24, 16, 8]
    stack.eval()
    assert chosen(0) == [24, 16, 8]


def test_the_blocks_of_each_depth_may_differ():
    stack = recursive(capacity=[1, 1, 1], gating="replace", order=[[0, 0], [1, 1], [0, 1]])
    x, rows = torch.randn(2, S, H), all_rows(torch.zeros(2, S, H))
    u = x.flatten(0, 1)
    for i in (0, 0, 1, 1, 0, 1):
        u = stack.blocks[i](u, rows)
    assert row_error(stack(x)[0], u.view_as(x)) < 1e-5
    kv = stack.new_kv(2)
    stack(x, kv=kv)
    assert kv.stored() == 6 * 2 * S  # a block that runs twice keeps the keys of both runs


def test_routers_with_an_inner_layer_and_a_z_loss():
    stack, x = recursive(inner=2 * H, z_coef=0.5), torch.randn(2, S, 2 * H)[..., :H]
    routing = stack(x)[1][0]
    r = torch.nn.functional.gelu(x.reshape(-1, H) @ stack.routers[0].inner_weight.T) @ stack.routers[0].weight[0]
    torch.testing.assert_close(routing.logits[:, 0], r)
    torch.testing.assert_close(routing.losses["z"], 0.5 * r.square().mean())
    token = recursive(mode="token", inner=2 * H)
    logits = torch.nn.functional.gelu(x.reshape(-1, H) @ token.routers[0].inner_weight.T) @ token.routers[0].weight.T
    assert torch.equal(token(x)[1][0].ids[:, 0].long(), logits.argmax(-1))


def test_model_decodes_as_it_recomputes():
    model = MoRModel(blocks(1)[0], recursive().causal_(), blocks(1)[0]).eval()
    x = torch.randn(2, 8, H)
    whole, kv = model(x)[0], model.new_kv(2)
    for s in range(8):
        y = model(x[:, s : s + 1], positions=torch.full((2, 1), s), kv=kv)[0]
        torch.testing.assert_close(y[:, 0], whole[:, s], rtol=1e-4, atol=1e-5)
    assert kv.first.stored() == kv.last.stored() == 16


def test_padding_has_no_depth():
    stack, x = recursive(mode="token").eval(), torch.randn(2, S, H)
    mask = torch.arange(S) < torch.tensor([[S], [5]])
    y = stack(x, RouterContext(mask=mask.flatten()))[0]
    assert torch.equal(y[~mask], x[~mask])
    torch.testing.assert_close(y[1:, :5], stack(x[1:, :5])[0], rtol=1e-5, atol=1e-5)


def test_padding_is_never_chosen():
    stack, x = recursive(), torch.randn(2, S, H)
    mask = torch.arange(S) < torch.tensor([[S], [5]])
    y, routings = stack(x, RouterContext(mask=mask.flatten()))
    assert all((r.ids[~mask.flatten()] == 1).all() for r in routings)
    assert torch.equal(y[~mask], x[~mask])
    assert (routings[0].ids[mask.flatten()] == 0).all()  # capacity 1: every other token is


def test_dtype_empty_compile_state_and_operators():
    stack = recursive()
    with OperatorsRan() as ran:
        stack(torch.randn(1, S, H))
    assert ran.names == ["expert_choice", "permute_plan", "permute", "unpermute"] * DEPTHS
    for shape in ((0, S, H), (2, 0, H)):
        assert stack(torch.zeros(shape))[0].shape == shape
    other = recursive()
    other.load_state_dict(stack.state_dict())
    x = torch.randn(2, S, H)
    assert torch.equal(other(x)[0], stack(x)[0])
    compiled = torch.compile(lambda x: stack(x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stack(x)[0], rtol=1e-6, atol=1e-6)
    low = stack.bfloat16()(x.bfloat16())[0]
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mode": "layer"}, "mode must be expert or token, got layer"),
        ({"gating": "soft"}, "gating must be one of weighted, additive, replace, got soft"),
        ({"mode": "token", "gates": "first"}, "gates must be one of last, every, got first"),
        (
            {"mode": "token", "gating": "additive", "gates": "every"},
            "gates must be last in mode token, gating additive: unused there, got every",
        ),
        ({"gates": "every"}, "gates must be last in mode expert, gating weighted: unused there, got every"),
        ({"score": "sigmoid"}, "score must be softmax in mode expert, gating weighted: unused there, got sigmoid"),
        ({"mode": "token", "capacity": [1, 1, 1]}, "capacity must be None in mode token, .*, got"),
        ({"mode": "token", "threshold": 0.7}, "threshold must be 0.5 in mode token, .*, got 0.7"),
        ({"kv": "none"}, "kv must be one of recursion, shared, update, got none"),
        ({"capacity": [1, 0.5]}, r"capacity must be 3 shares that do not increase, got \[1, 0.5\]"),
        ({"capacity": [0.5, 1, 1]}, r"capacity must be 3 shares that do not increase, got \[0.5, 1, 1\]"),
        ({"capacity": [0.5] * 3, "kv": "shared"}, "capacity must begin with 1 for kv shared, got 0.5"),
        ({"order": [[0, 1], [1]]}, r"order must be 3 lists of the same length, got \[\[0, 1\], \[1\]\]"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        recursive(**options)
