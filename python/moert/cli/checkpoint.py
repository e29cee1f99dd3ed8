"""Local Hugging Face MoE checkpoints: what is checked before and while one is loaded, and the byte tokenizer.

Nothing here looks at the network, runs code from a checkpoint or unpickles one.
"""

import json
from pathlib import Path

from moert.cli.errors import CommandError, check_directory, first_line

INDEX = "model.safetensors.index.json"
_MOST_LAYERS = 10_000  # a config is hostile until it has loaded
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")


def check_files(directory: Path) -> None:
    """A CommandError unless directory holds config.json and safetensors files whose headers are sound."""
    check_directory(directory)
    config = read_json(directory / "config.json")
    if "model_type" not in config:
        raise CommandError(f"config.json of the model must have a model_type, got none in {directory}")
    for name in weight_files(directory):
        _check_safetensors(directory / name)


def load_config(directory: Path):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config.json can provoke
        raise CommandError(f"model must have a config that transformers knows: {first_line(error)}") from error


def packed_by_moert(config) -> bool:
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    return method == "moert"


def load_model(directory: Path, experts: str, dtype: str, random: bool = False, packing: str | None = None):
    """The model in eval mode, its experts run by `experts`: eager, grouped_mm or moert.

    random: directory holds a configuration alone, and the weights are drawn, the same ones every time.  packing: the
    format (packing.py) in which the experts of a float checkpoint are packed while it loads.
    """
    config = load_config(directory)
    model_class = class_of(config)
    empty = skeleton(config, model_class)
    named = has_interface(empty)
    if experts == "moert":
        import moert.integrations.transformers  # noqa: F401  registers the name
    if packing and not named:
        raise CommandError(f"model must have experts that can be packed, got {model_class.__name__} without any")
    if random:
        return _random_model(model_class, config, experts, dtype, packing)
    if packing and getattr(config, "quantization_config", None):
        raise CommandError("model must have float weights to be packed, got quantized ones")
    _check_shapes(directory, empty, config)
    try:
        model, report = model_class.from_pretrained(
            directory,
            experts_implementation=experts if named else None,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # its error names no weight; the report does
            **({"quantization_config": _moert_config(packing)} if packing else {}),
        )
    except Exception as error:  # mismatched shapes, truncated data, missing packages: each its own type
        raise CommandError(f"model must load, got {type(error).__name__}: {first_line(error)}") from error
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, got, wanted = mismatched[0]
        raise CommandError(f"{name} must have shape {list(wanted)} by the config, got {list(got)}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise CommandError(f"model must have every weight, got none for {missing[0]} and {len(missing) - 1} more")
    return served(model, experts).eval()


def _check_shapes(directory: Path, empty, config) -> None:
    """A CommandError where the config's sizes are not those of the files; of other libraries' packed ones they may be.

    Before anything of the config's sizes is allocated.
    """
    from moert.cli.tensor_files import header
    from moert.integrations.transformers.quantizer import MoertConfig, MoertQuantizer
    from moert.integrations.transformers.streaming import check_shapes

    packed = getattr(config, "quantization_config", None)
    if packed and not packed_by_moert(config):
        return
    try:
        if packed:
            options = packed if isinstance(packed, MoertConfig) else MoertConfig.from_dict(packed)
            MoertQuantizer(options, pre_quantized=True).preprocess_model(empty)
        headers = (header(path) for file in weight_files(directory) if (path := directory / file))
        check_shapes(empty, {name: stored.shape for found in headers for name, (stored, _) in found.items()})
    except (ValueError, TypeError, RuntimeError) as error:
        raise CommandError(first_line(error)) from error


def served(model, experts: str):
    """The model, with moert in the blocks that transformers keeps outside its experts interface where that is asked."""
    if experts == "moert" and _swappable(model):
        from moert.integrations.transformers import swap_

        swap_(model)
    return model


def _moert_config(packing: str):
    from moert.cli.packing import packing_format
    from moert.integrations.transformers import MoertConfig

    fmt = packing_format(packing)
    return MoertConfig(fmt.spelling, fmt.group)


def _random_model(model_class, config, experts: str, dtype: str, packing: str | None):
    import torch

    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=getattr(torch, dtype))
    if has_interface(model):
        model.set_experts_implementation(experts)
    served(model, experts)
    if packing:
        from moert.integrations.transformers.quantizer import quantize_

        quantize_(model, _moert_config(packing))
    return model.eval()


def load_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    # transformers makes an empty vocabulary up where there is none.
    if not any(path for pattern in _VOCABULARIES for path in directory.glob(pattern)):
        raise CommandError(f"model must have a tokenizer in {directory}, got no tokenizer.json or other vocabulary")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing files, broken JSON, packages a tokenizer needs
        raise CommandError(f"model must have a tokenizer in {directory}, got {first_line(error)}") from error


def byte_tokenizer():
    """A tokenizer whose 256 tokens are the bytes of UTF-8, id for value; AutoTokenizer loads it like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's spelling: bytes that print stand for themselves, the others for the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(f"model must have a {path.name}, got none in {path.parent}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(f"{path} must be readable JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CommandError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[str]:
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CommandError(f"{directory / INDEX} must have a weight_map, got {type(weight_map).__name__}")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CommandError(f"{directory / INDEX} must name files beside it, got {outside[0]}")
        return names
    if (directory / "model.safetensors").exists():
        return ["model.safetensors"]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    got = f"only pickled files ({pickles[0]})" if pickles else "none"
    raise CommandError(f"model must have safetensors weights, got {got} in {directory}")


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if not file.keys():
                raise CommandError(f"{path} must hold tensors, got none")
    except FileNotFoundError as error:
        raise CommandError(f"model must have every file its index names, got no {path}") from error
    except (SafetensorError, OSError) as error:
        raise CommandError(f"{path} must be a sound safetensors file: {first_line(error)}") from error


def class_of(config):
    """The class of transformers that generates text with a model of this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise CommandError(f"model must generate text, got model_type {config.model_type}")


def skeleton(config, model_class):
    """The model without memory for its weights; a CommandError where it has no experts."""
    import torch

    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise CommandError(f"num_hidden_layers must be at most {_MOST_LAYERS}, got {layers}")
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # sizes in the config that do not fit together
        raise CommandError(f"model must have a config that fits its class: {first_line(error)}") from error
    if not (has_interface(model) or _swappable(model)):
        raise CommandError(f"model must have mixture-of-experts layers, got {model_class.__name__} without any")
    return model


def has_interface(model) -> bool:
    """Whether the model's experts are chosen by name (transformers' experts interface)."""
    return any(hasattr(module, "is_concatenated") and hasattr(module, "has_gate") for module in model.modules())


def _swappable(model) -> bool:
    from moert.integrations.transformers.swap import blocks

    return bool(blocks(model))
