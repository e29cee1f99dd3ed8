"""GGUF files of whole models, written by the gguf package, against the float model of the dequantised weights."""

import math
import warnings

import gguf
import numpy as np
import pytest
import torch
from foreign_checkpoint import CONFIGS, SIZES
from k_quants import K_QUANTS, k_quantize
from transformers import AutoModelForCausalLM, GptOssConfig, OlmoeConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moert.integrations.transformers import InexactWarning, load_gguf
from moert.integrations.transformers.quantized import PackedExperts
from moert.quant import Int4, Int8, Mxfp4, Ternary2
from moert.quant.readers import gguf_experts
from moert.testing import row_error

IDS = torch.arange(14).view(2, 7) * 5 % 96
OLMOE = {name: size for name, size in SIZES.items() if name != "head_dim"}
FAMILIES = {
    "qwen3moe": CONFIGS["qwen3"],
    "llama": CONFIGS["mixtral"],
    # Blocks of 256 columns.
    "wide": lambda: Qwen3MoeConfig(
        moe_intermediate_size=256,
        num_experts=4,
        num_experts_per_tok=2,
        **SIZES | {"hidden_size": 256, "head_dim": 64},
    ),
    "olmoe": lambda: OlmoeConfig(intermediate_size=32, num_experts=4, num_experts_per_tok=2, **OLMOE),
    # A sliding window, shorter than IDS, in its first layer; YaRN.
    "gpt-oss": lambda: GptOssConfig(
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, **SIZES
    ),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
GPT_OSS_NAMES = NAMES | {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"}


def numbers(config, arch):
    width = "expert_feed_forward_length" if arch in ("qwen3moe", "gpt-oss") else "feed_forward_length"
    rope = (
        {}
        if arch != "gpt-oss"
        else {
            "attention.sliding_window": config.sliding_window,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_parameters["factor"],
            "rope.scaling.original_context_length": config.rope_parameters["original_max_position_embeddings"],
        }
    )
    return rope | {
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.hidden_size // config.num_attention_heads,
        "context_length": config.max_position_embeddings,
        "expert_count": 4,
        "expert_used_count": config.num_experts_per_tok,
        width: getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
    }


def written(path, arch, kinds, skip=(), extra=None, **change):
    """A file whose gate, up, down and attention are of these types; the float model of what is in it."""
    config, arch = FAMILIES[arch](), "qwen3moe" if arch == "wide" else arch
    if arch == "qwen3moe":
        config.norm_topk_prob = True
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:
            parameter.data.normal_()
    writer = gguf.GGUFWriter(path, arch)
    values = numbers(config, arch) | {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    for key, value in (values | change).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{arch}.{key}", value)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)

    def put(name, tensor, kind):
        name_of_kind, kind = kind, gguf.GGMLQuantizationType[kind]
        floats = tensor.detach().float().contiguous().numpy()
        data = k_quantize(floats, name_of_kind) if name_of_kind in K_QUANTS else gguf.quants.quantize(floats, kind)
        if name not in skip:
            writer.add_tensor(name, data, raw_dtype=kind)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))

    body = model.model
    put("token_embd.weight", body.embed_tokens.weight, "Q8_0")
    put("output.weight", model.lm_head.weight, "F16")
    put("output_norm.weight", body.norm.weight, "F32")
    for i, layer in enumerate(body.layers):
        parameters = dict(layer.named_parameters())
        for inner, name in (GPT_OSS_NAMES if arch == "gpt-oss" else NAMES).items():
            weight = parameters.get(f"{inner}.weight")
            if weight is None:
                continue
            if (bias := parameters.get(f"{inner}.bias")) is not None:
                put(f"blk.{i}.{name}.bias", bias.data, "F32")
            kind = kinds[3] if name in ("attn_q", "attn_k", "attn_v", "attn_output") else "F32"
            if arch == "llama" and name in ("attn_q", "attn_k"):  # as llama.cpp turns the rows of a head
                turned = weight.data.view(4, 2, -1, 64).transpose(1, 2).reshape(weight.shape).contiguous()
                put(f"blk.{i}.{name}.weight", turned, kind)
                weight.data.copy_(turned.view(4, -1, 2, 64).transpose(1, 2).reshape(weight.shape))
            else:
                put(f"blk.{i}.{name}.weight", weight.data, kind)
        if arch == "gpt-oss":
            put(f"blk.{i}.attn_sinks.weight", layer.self_attn.sinks.data, "F32")
        for (name, part), kind in zip(experts_of(layer.mlp.experts).items(), (*kinds[:3], *["F32"] * 3), strict=False):
            put(f"blk.{i}.ffn_{name}", part, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def experts_of(experts):
    """Views of the parameters, weights [E, rows, columns] first."""
    w1, w2 = experts.gate_up_proj.data, experts.down_proj.data
    if not experts.is_transposed:
        gate, up = w1.chunk(2, 1)
        return {"gate_exps.weight": gate, "up_exps.weight": up, "down_exps.weight": w2}
    w1, b1 = w1.mT, experts.gate_up_proj_bias.data
    return {
        "gate_exps.weight": w1[:, ::2],
        "up_exps.weight": w1[:, 1::2],
        "down_exps.weight": w2.mT,
        "gate_exps.bias": b1[:, ::2],
        "up_exps.bias": b1[:, 1::2],
        "down_exps.bias": experts.down_proj_bias.data,
    }


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.flatten(0, 1)


def formats(model):
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return [(module.w1_format, module.w2_format) for module in packed]


@pytest.mark.parametrize(
    "arch,kinds,expected",
    [
        ("qwen3moe", ("Q8_0", "Q8_0", "Q8_0", "Q8_0"), (Int8(32), Int8(32))),
        ("qwen3moe", ("Q4_0", "Q4_0", "MXFP4", "Q5_0"), (Int4(32), Mxfp4())),
        ("llama", ("Q4_0", "Q4_0", "Q4_0", "Q8_0"), (Int4(32), Int4(32))),
        ("olmoe", ("Q8_0", "Q8_0", "Q8_0", "Q4_0"), (Int8(32), Int8(32))),
        ("gpt-oss", ("MXFP4", "MXFP4", "MXFP4", "Q8_0"), (Mxfp4(), Mxfp4())),
        ("gpt-oss", ("Q8_0", "Q8_0", "Q4_0", "BF16"), (Int8(32), Int4(32))),
        ("wide", ("TQ1_0", "TQ1_0", "TQ2_0", "Q4_K"), (Ternary2(128), Ternary2(128))),
        ("wide", ("TQ2_0", "TQ1_0", "Q8_0", "Q6_K"), (Ternary2(128), Int8(32))),
    ],
)
def test_exact(arch, kinds, expected, tmp_path):
    reference = written(tmp_path / "m.gguf", arch, kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        model = load_gguf(tmp_path / "m.gguf", precision="full")
    assert formats(model) == [expected] * 2
    assert row_error(logits(model), logits(reference)) < 5e-6
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert formats(again) == [expected] * 2 and row_error(logits(again), logits(model)) < 1e-6
    assert hasattr(again.config.quantization_config, "experts") == (expected[0] != expected[1])


@pytest.mark.parametrize(
    "kinds,why,expected",
    [
        (
            ("Q5_0", "Q5_0", "Q8_0", "Q8_0"),
            "2 converted to .*: no format has the numbers of Q5_0",
            (Int8(128), Int8(32)),
        ),
        (
            ("Q8_0", "Q4_0", "Q4_0", "F32"),
            "2 converted to .*: gate and up are of different types",
            (Int8(128), Int4(32)),
        ),
    ],
)
def test_converted_and_said(kinds, why, expected, tmp_path):
    reference = written(tmp_path / "m.gguf", "qwen3moe", kinds)
    with pytest.warns(InexactWarning, match=why):
        model = load_gguf(tmp_path / "m.gguf", precision="full", dtype=torch.float32)
    assert formats(model) == [expected] * 2
    assert 0 < row_error(logits(model), logits(reference)) < 0.05


@pytest.mark.parametrize(
    "kinds", [("Q4_K", "Q4_K", "Q6_K", "Q4_K"), ("Q5_K", "Q5_K", "Q5_K", "Q5_K"), ("Q6_K", "Q4_K", "TQ2_0", "Q6_K")]
)
def test_k_quants_are_converted_and_said(kinds, tmp_path):
    reference = written(tmp_path / "m.gguf", "wide", kinds)
    with pytest.warns(InexactWarning, match=f"converted to .*: no format has the numbers of {kinds[0]}"):
        model = load_gguf(tmp_path / "m.gguf", precision="full")
    assert formats(model) == [(Int8(128), Ternary2(128) if kinds[2] == "TQ2_0" else Int8(128))] * 2
    assert 0 < row_error(logits(model), logits(reference)) < 0.05


@pytest.mark.parametrize("arch", ["qwen2moe", "deepseek2"])
def test_architectures_that_are_not_read(arch, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    writer.add_uint32(f"{arch}.expert_count", 4)
    writer.add_tensor("blk.0.ffn_down_exps.weight", np.zeros((4, 2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"must be one of .*, gpt-oss with experts, got {arch} of 4"):
        load_gguf(tmp_path / "m.gguf")
    ((name, read),) = gguf_experts(tmp_path / "m.gguf")
    assert name == "blk.0.ffn_down_exps.weight" and read.packed.shape == (4, 2, 32)


def test_errors(tmp_path):
    path, kinds = tmp_path / "m.gguf", ("Q8_0",) * 4
    for change, skip, message in [
        (
            {"expert_count": 0},
            (),
            "must be one of .*, gpt-oss with experts, got qwen3moe of 0 experts",
        ),
        ({"block_count": 0}, (), "qwen3moe.block_count must be a positive integer, got 0"),
        ({"expert_count": 5}, (), r"mlp.gate.weight must have shape \[5, 64\] by the config, got \[4, 64\]"),
        ({}, ("token_embd.weight",), "must hold token_embd.weight, got none"),
        ({}, ("blk.1.ffn_up_exps.weight",), "parts must hold gate and up, or down, got gate, gate_type"),
        ({}, ("blk.1.attn_q.weight",), "checkpoint must hold every weight, got no model.layers.1.self_attn.q_proj"),
    ]:
        written(path, "qwen3moe", kinds, skip, **change)
        with pytest.raises(ValueError, match=message):
            load_gguf(path)


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
    written(tmp_path / "m.gguf", "qwen3moe", ("Q8_0",) * 4, **change)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_a_tensor_that_the_model_has_not(tmp_path, monkeypatch):
    """Norms of the heads' queries belong to Qwen3-MoE, not to Mixtral."""
    monkeypatch.setitem(NAMES, "input_layernorm", "attn_q_norm")
    written(tmp_path / "m.gguf", "llama", ("Q8_0",) * 4)
    with pytest.raises(ValueError, match="must hold tensors of MixtralForCausalLM alone, got .*q_norm"):
        load_gguf(tmp_path / "m.gguf")


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
    written(tmp_path / "m.gguf", "gpt-oss", ("Q8_0",) * 4, **change)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_biases_of_gpt_oss(tmp_path):
    path, kinds = tmp_path / "m.gguf", ("MXFP4",) * 3 + ("Q8_0",)
    for name in ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps", "attn_k"):
        written(path, "gpt-oss", kinds, (f"blk.1.{name}.bias",))
        with pytest.raises(ValueError, match="must hold every weight, got no |must be a tensor of .*, got blk.1.ffn"):
            load_gguf(path)


def test_other_routers_than_the_family_has(tmp_path):
    for arch, norm in (("llama", False), ("olmoe", True)):
        written(tmp_path / "m.gguf", arch, ("Q8_0",) * 4, expert_weights_norm=norm)
        with pytest.raises(ValueError, match=f"{arch}.expert_weights_norm must be {not norm}, the only one read"):
            load_gguf(tmp_path / "m.gguf")


def test_rotary_factors(tmp_path):
    """llama.cpp divides the frequencies by them, whatever the metadata say of scaling."""
    path, kinds = tmp_path / "m.gguf", ("Q8_0",) * 4
    reference = written(path, "llama", kinds, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert row_error(logits(load_gguf(path, precision="full")), logits(reference)) < 5e-6
    written(path, "llama", kinds, extra={"rope_freqs.weight": np.array([1] * 7 + [8], np.float32)})
    with pytest.raises(ValueError, match="rope_freqs.weight must be 1 everywhere, .*, got 8.0"):
        load_gguf(path)


def test_sizes_are_checked_before_the_loader_sees_them(tmp_path, monkeypatch):
    """It allocates what does not fit, or is missing, at the size that the metadata say."""
    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("allocates"))
    for change, skip in [
        ({"expert_feed_forward_length": 2**20}, ()),
        ({"embedding_length": 2**20}, ()),
        ({}, ("blk.1.attn_q.weight",)),
    ]:
        written(tmp_path / "m.gguf", "qwen3moe", ("Q8_0",) * 4, skip, **change)
        with pytest.raises(ValueError, match="by the config, got|must hold every weight, got no"):
            load_gguf(tmp_path / "m.gguf")
