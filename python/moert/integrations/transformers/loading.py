"""load_quantized: a checkpoint that another library quantized, its experts on moert's packed kernels."""

import os
import re
import warnings
from os import PathLike

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moert.quant.format import RowFormat
from moert.quant.int8 import Int8
from moert.quant.quantize import format_of
from moert.quant.readers import layout_of

TOLD = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is wrong, for an error of our own


_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class InexactWarning(UserWarning):
    """Some of a checkpoint's numbers are not as they are in its files."""


def load_quantized(
    directory: str | PathLike,
    convert: str | RowFormat = Int8(128),
    precision: str = "auto",
    model_class: type = AutoModelForCausalLM,
    **options,
) -> PreTrainedModel:
    """A Hugging Face checkpoint in GPTQ, AWQ, compressed-tensors, fp8 or mxfp4, as its config.json says.

    Experts keep the checkpoint's bits where a format of moert holds its numbers; where none does they are rounded to
    `convert`, with an InexactWarning.  All else is unpacked to the model's dtype.  options are from_pretrained's;
    weights that are pickled (.bin) are not read.
    """
    # None too takes pickled files where there are no others.
    if options.setdefault("use_safetensors", True) is not True:
        got = options["use_safetensors"]
        raise ValueError(f"use_safetensors must be True, as pickled files can run code, got {got}")
    _check_is_there(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=options.get("trust_remote_code", False))
    foreign_(config, _source(config), convert, precision)
    return loaded(
        directory, *model_class.from_pretrained(directory, config=config, output_loading_info=True, **options)
    )


def foreign_(config: PretrainedConfig, source: dict, convert: str | RowFormat, precision: str) -> None:
    """Makes from_pretrained read a checkpoint of that source with ForeignQuantizer."""
    fmt = format_of(convert)
    config.quantization_config = {
        "quant_method": "moert-foreign",
        "source": source,
        "format": fmt.spelling,
        "group": fmt.group,
        "precision": precision,
    }


def loaded(where: str | PathLike, model: PreTrainedModel, info: dict) -> PreTrainedModel:
    """The model, once it is whole and what was changed is said."""
    for name, got, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{name} must have shape {list(wanted)} by the config, got {list(got)}")
    if unread := [name for name in info["unexpected_keys"] if ".experts." in name]:
        raise ValueError(f"checkpoint must hold experts of the config alone, got {min(unread)}")
    if info["missing_keys"]:
        raise ValueError(f"checkpoint must hold every weight, got no {min(info['missing_keys'])}")
    for change, count in model.hf_quantizer.changed.items():
        text = f"{where}: experts' matrices are not as in the file: {count} {change}"
        warnings.warn(text, InexactWarning, stacklevel=3)
    return model


def _check_is_there(directory: str | PathLike) -> None:
    """What is not here and can only be a path is no name to ask the Hub for."""
    path = os.fspath(directory)
    if not os.path.isdir(path) and (isinstance(directory, PathLike) or not _HUB_NAME.fullmatch(path)):
        raise ValueError(f"directory must exist or be a name on the Hub, got {path}")


def _source(config: PretrainedConfig) -> dict:
    """The quantization_config of the checkpoint, taken out of config; an error if it is none of those read here."""
    for each in (config, config.get_text_config(decoder=True)):
        if source := getattr(each, "quantization_config", None):
            del each.quantization_config
            layout_of(source)
            return source
    raise ValueError("config.json must have a quantization_config, got none")
