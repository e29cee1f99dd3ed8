"""Numbers of GGUF files: their bounds, and values that would change the model in a way that is not read."""

import math

import pytest
from gguf_writer import check_refused, written

from moert.integrations.transformers import load_gguf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": 1}, "block_count must be that of the tensors, 2 in a row, got 1"),
        ({"block_count": 2_000_000_000}, "block_count must be that of the tensors"),
        ({"expert_used_count": 9}, "expert_used_count must be at most expert_count=4, got 9"),
        ({"block_count": 2.0}, "qwen3moe.block_count must be a positive integer, got 2.0"),
        ({"context_length": math.nan}, "context_length must be a positive integer, got nan"),
        ({"expert_used_count": True}, "expert_used_count must be a positive integer, got True"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, "rms_epsilon must be a positive finite number, got nan"),
        ({"rope.freq_base": math.inf}, "qwen3moe.rope.freq_base must be a positive finite number, got inf"),
        ({"expert_feed_forward_length": 2**20}, r"must have shape \[4, 1048576, 64\] by the config, got \[4, 32, 64\]"),
        ({"embedding_length": 2**31}, "must have shape .*2147483648.* by the config, got"),
        ({"attention.head_count_kv": 2**30}, "k_proj.weight must have shape .* by the config, got"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type must be none, got yarn"),
        ({"rope.scale_linear": 4}, "qwen3moe.rope.scale_linear must be 1, the only one read, got 4"),
        ({"rope.scaling.factor": 4.0}, "qwen3moe.rope.scaling.factor must be 1, the only one read, got 4.0"),
        ({"expert_weights_scale": 2.5}, "qwen3moe.expert_weights_scale must be 1, the only one read, got 2.5"),
        ({"expert_weights_norm": False}, "qwen3moe.expert_weights_norm must be True, the only one read, got False"),
        ({"expert_gating_func": 2}, "qwen3moe.expert_gating_func must be 1, the only one read, got 2"),
        ({"attention.value_length": 8}, "qwen3moe.attention.value_length must be 16, the only one read, got 8"),
        ({"attention.scale": 0.5}, "qwen3moe.attention.scale must be 0.25, the only one read, got 0.5"),
        ({"attention.clamp_kqv": 8.0}, "qwen3moe.attention.clamp_kqv must be 0, the only one read, got 8.0"),
        ({"rope.dimension_count": 8}, "rope.dimension_count must be"),
        ({"attention.sliding_window": 4}, "attention.sliding_window must be 0"),
    ],
)
def test_metadata_that_would_change_the_model(change, message, tmp_path):
    check_refused(tmp_path / "m.gguf", "qwen3moe", message, **change)


def test_tokens(tmp_path):
    ids = {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("bos", "padding", "eos", "eot"), 3)}
    written(tmp_path / "m.gguf", "gpt-oss", ("Q8_0",) * 4, **ids)
    model = load_gguf(tmp_path / "m.gguf")
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (3, 4, [5, 6])
    written(tmp_path / "m.gguf", "gpt-oss", ("Q8_0",) * 4, **ids | {"tokenizer.ggml.eot_token_id": 5})
    assert load_gguf(tmp_path / "m.gguf").generation_config.eos_token_id == 5
    written(tmp_path / "m.gguf", "gpt-oss", ("Q8_0",) * 4, **ids | {"tokenizer.ggml.eos_token_id": 96})
    with pytest.raises(ValueError, match="tokenizer.ggml.eos_token_id must be an id below 96, got 96"):
        load_gguf(tmp_path / "m.gguf")
