import pytest
import torch
from tests.decode.models import SIZES, llama, mixtral
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moert.integrations.transformers.rows import DecoderRows
from moert.layers import Rows, all_rows
from moert.runtime import SkippableKV

H = SIZES["hidden_size"]


def models():
    return {
        "llama": llama(),
        "llama, eager": llama(attn_implementation="eager"),
        "mixtral": mixtral(),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval(),
        "mistral, window": MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)).eval(),
    }


def captured(model, ids):
    """What the first layer is given and gives, inside the model."""
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(ids, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", models())
@torch.no_grad()
def test_all_rows_are_the_layer_itself(name):
    torch.manual_seed(0)
    model = models()[name]
    x, y = captured(model, torch.randint(50, (2, 9)))
    block = DecoderRows(model.model.layers[0], model.model.rotary_emb)
    rows = all_rows(x)
    got = block(x.flatten(0, 1), rows).view_as(y)
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)
    packed = block(x.flatten(0, 1), Rows(rows.positions, rows.offsets)).view_as(y)
    torch.testing.assert_close(packed, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.delta(x.flatten(0, 1), rows).view_as(y), y - x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models())
@torch.no_grad()
def test_with_keys_kept_rows_come_a_few_at_a_time(name):
    torch.manual_seed(0)
    model = models()[name]
    block = DecoderRows(model.model.layers[0], model.model.rotary_emb)
    x, at = torch.randn(7, H), torch.tensor([1, 4, 6, 0, 2, 3, 9])
    whole = block(x, Rows(at, torch.tensor([0, 3, 7])))
    kv, parts = SkippableKV(1, 2), []
    for first, second in ((slice(0, 2), slice(3, 4)), (slice(2, 3), slice(4, 4)), (slice(3, 3), slice(4, 7))):
        n = first.stop - first.start
        rows = Rows(torch.cat([at[first], at[second]]), torch.tensor([0, n, n + second.stop - second.start]))
        y = block(torch.cat([x[first], x[second]]), rows, kv)
        parts.append((y[:n], y[n:]))
    for half, expected in zip((0, 1), (whole[:3], whole[3:]), strict=True):
        torch.testing.assert_close(torch.cat([p[half] for p in parts]), expected, rtol=1e-4, atol=1e-5)
    assert kv.stored() == 7 and block(x[:0], Rows(at[:0], torch.tensor([0, 0, 0]))).shape == (0, H)


def test_errors():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation must be sdpa or eager, got flash_attention_2"):
        DecoderRows(model.model.layers[0], model.model.rotary_emb)
