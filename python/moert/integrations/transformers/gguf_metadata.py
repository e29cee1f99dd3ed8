"""The numbers that a GGUF file says of its model, read with their bounds; what is not read must change nothing."""

import math
import re

from transformers import PretrainedConfig

from moert.quant.readers import GgufFile

NO_SCALING = "none"


class Metadata:
    """The values of a file's architecture by their names without it."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.architecture = file.metadata.get("general.architecture")

    def get(self, key: str, default=None):
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def positive(self, key: str, kind: type, default: float | None = None) -> float:
        """An int where kind is int; 0, negative numbers, infinity and NaN are errors."""
        value = self.get(key, default)
        if type(value) not in (int, kind) or not 0 < value < math.inf:
            number = "integer" if kind is int else "finite number"
            raise ValueError(f"{self.architecture}.{key} must be a positive {number}, got {value}")
        return kind(value)

    def count(self, key: str) -> int:
        """An int from 0 on, which it is where the file says nothing."""
        value = self.get(key, 0)
        if type(value) is not int or value < 0:
            raise ValueError(f"{self.architecture}.{key} must be an integer from 0 on, got {value}")
        return value

    def sizes(self, names: dict[str, str]) -> dict:
        """The sizes of a configuration; names: of ours, by the file's."""
        return {name: self.positive(key, float if name == "rms_norm_eps" else int) for key, name in names.items()}

    def check(self, read: dict[str, tuple]) -> None:
        """Values, where the file gives them, that leave the model as it is read."""
        for key, values in read.items():
            if (got := self.get(key)) not in (None, *values):
                raise ValueError(f"{self.architecture}.{key} must be {values[0]}, the only one read, got {got}")

    def tokens(self, vocabulary: int) -> dict[str, int | list[int]]:
        """The ids that the file gives, of which generation stops at the last two."""
        found = {}
        for name in ("bos", "padding", "eos", "eot"):
            key = f"tokenizer.ggml.{name}_token_id"
            if (token := self.file.metadata.get(key)) is None:
                continue
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(f"{key} must be an id below {vocabulary}, got {token}")
            found[name] = token
        ends = list(dict.fromkeys(found[name] for name in ("eos", "eot") if name in found))
        tokens = {"bos_token_id": found.get("bos"), "pad_token_id": found.get("padding")}
        tokens |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
        return {name: token for name, token in tokens.items() if token is not None}

    def check_counts(self) -> None:
        """Blocks and experts."""
        get = self.get
        blocks = {int(found[1]) for name in self.file.tensors if (found := re.match(r"blk\.(\d{1,6})\.", name))}
        if get("block_count") != len(blocks) or max(blocks, default=0) >= len(blocks):
            got = get("block_count")
            raise ValueError(f"block_count must be that of the tensors, {len(blocks)} in a row, got {got}")
        if get("expert_used_count") > get("expert_count"):
            got = get("expert_used_count")
            raise ValueError(f"expert_used_count must be at most expert_count={get('expert_count')}, got {got}")

    def check_attention(self, scale: float, window: bool = False) -> None:
        """What every family leaves as it is but its own scale of the products; window: a sliding one is read."""
        read = {"rope.scale_linear": (1, 0), "attention.clamp_kqv": (0,)}  # llama.cpp takes 0 for 1
        read |= {"rope.freq_base_swa": (self.get("rope.freq_base"),), "attention.sliding_window_pattern": (2,)}
        read |= {"attention.temperature_scale": (0,), "attention.temperature_length": (0,)}
        if not window:
            read |= {"attention.sliding_window": (0,)}
        self.check(read)
        got = self.get("attention.scale")
        if got not in (None, 0) and not (type(got) is float and math.isclose(got, scale, rel_tol=1e-6)):
            raise ValueError(f"{self.architecture}.attention.scale must be {scale}, the only one read, got {got}")

    def rope(self, scalings: tuple[str, ...] = (NO_SCALING,)) -> dict:
        """rope_parameters of one of these kinds."""
        rope = {"rope_type": "default", "rope_theta": self.positive("rope.freq_base", float, 1e4)}
        if (scaling := self.get("rope.scaling.type", NO_SCALING)) not in scalings:
            raise ValueError(f"rope.scaling.type must be {' or '.join(scalings)}, got {scaling}")
        if scaling == NO_SCALING:
            self.check({"rope.scaling.factor": (1, 0)})
            return rope
        self.check({f"rope.scaling.{name}": (1,) for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")})
        return rope | {
            "rope_type": scaling,
            "factor": self.positive("rope.scaling.factor", float),
            "original_max_position_embeddings": self.positive("rope.scaling.original_context_length", int),
            "beta_fast": self.positive("rope.scaling.yarn_beta_fast", float, 32.0),
            "beta_slow": self.positive("rope.scaling.yarn_beta_slow", float, 1.0),
        }

    def config(self, kind: type[PretrainedConfig], **values) -> PretrainedConfig:
        try:
            return kind(**values)
        except Exception as error:  # whatever sizes can provoke
            raise ValueError(f"{self.file.path} must have sizes that fit {kind.__name__}, got {error}") from error
