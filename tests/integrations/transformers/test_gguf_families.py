"""What the architectures of GGUF files take for granted, against what a file says."""

import math
from itertools import product

import gguf
import numpy as np
import pytest
from gguf_writer import check_refused, logits, written

from moert.integrations.transformers import load_gguf
from moert.integrations.transformers.gguf_families import config_of
from moert.quant.readers import GgufFile, gguf_experts
from moert.testing import row_error


def test_architectures_that_are_not_read(tmp_path):
    arch = "qwen2moe"
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_uint32(f"{arch}.expert_count", 4)
    writer.add_tensor("blk.0.ffn_down_exps.weight", np.zeros((4, 2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"must be one of .*, gpt-oss, deepseek2 with experts, got {arch} of 4"):
        load_gguf(tmp_path / "m.gguf")
    ((name, read),) = gguf_experts(tmp_path / "m.gguf")
    assert name == "blk.0.ffn_down_exps.weight" and read.packed.shape == (4, 2, 32)


@pytest.mark.parametrize(
    "arch,change",
    [
        ("qwen3moe", {"expert_weights_norm": True, "expert_weights_scale": 1.0, "attention.value_length": 16}),
        ("llama", {"expert_weights_norm": True, "expert_gating_func": 1, "attention.scale": 0.0}),
        ("olmoe", {"expert_weights_norm": False, "expert_weights_scale": 0.0, "attention.clamp_kqv": 0.0}),
    ],
)
def test_metadata_that_say_what_is_computed(arch, change, tmp_path):
    change |= {"attention.scale": 0.25}  # 1 / sqrt of 16
    reference = written(tmp_path / "m.gguf", arch, ("Q8_0",) * 4, **change)
    assert row_error(logits(load_gguf(tmp_path / "m.gguf", precision="full")), logits(reference)) < 5e-6


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rope.scaling.type": "linear"}, "rope.scaling.type must be none or yarn, got linear"),
        ({"rope.scaling.factor": math.nan}, "rope.scaling.factor must be a positive finite number, got nan"),
        ({"rope.scaling.original_context_length": 0}, "original_context_length must be a positive integer, got 0"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor must be 1, the only one read, got 0.5"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier must be 0, the only one read, got"),
        ({"rope.freq_base_swa": 5.0}, "rope.freq_base_swa must be 150000.0, the only one read, got 5.0"),
        ({"attention.sliding_window": 0}, "attention.sliding_window must be a positive integer, got 0"),
        ({"expert_gating_func": 1}, "expert_gating_func must be 3, the only one read, got 1"),
    ],
)
def test_metadata_of_gpt_oss(change, message, tmp_path):
    check_refused(tmp_path / "m.gguf", "gpt-oss", message, **change)


def test_other_routers_than_the_family_has(tmp_path):
    for arch, norm in (("llama", False), ("olmoe", True)):
        written(tmp_path / "m.gguf", arch, ("Q8_0",) * 4, expert_weights_norm=norm)
        with pytest.raises(ValueError, match=f"{arch}.expert_weights_norm must be {not norm}, the only one read"):
            load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["qwen3moe", "llama", "olmoe", "gpt-oss", "deepseek-v2", "deepseek-v3"])
def test_any_value_is_read_or_refused(family, tmp_path):
    written(tmp_path / "m.gguf", family, ("Q8_0",) * 4)
    file = GgufFile(tmp_path / "m.gguf")
    metadata, refused = dict(file.metadata), 0
    more = (
        "expert_gating_func",
        "expert_weights_norm",
        "rope.scaling.type",
        "attention.scale",
        "attention.q_lora_rank",
    )
    keys = [*metadata, *(f"{metadata['general.architecture']}.{name}" for name in more)]
    values = (-1, 0, 7, 2**40, -0.5, 1e-30, math.nan, math.inf, "x", "yarn", True, False, [1, 2], [])
    for key, value in product(keys, values):
        file.metadata = metadata | {key: value}
        try:
            config_of(file)
        except ValueError:
            refused += 1
    assert len(keys) * len(values) // 2 < refused < len(keys) * len(values)
