"""`moert quantize --calibrate`: a text as batches of tokens, and a checkpoint that runs on them layer by layer."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moert.cli.checkpoint import class_of, load_config
from moert.cli.errors import CommandError
from moert.cli.perplexity import WINDOW, tokens_of, windows
from moert.cli.tensor_files import TensorFiles
from moert.integrations.transformers.layerwise import Layerwise
from moert.integrations.transformers.streaming import Layer
from moert.quant.gptq import GPTQ

CALIBRATION_TOKENS = 65536  # of a text, where nothing else is said


@dataclass(frozen=True)
class Calibration:
    """What a checkpoint is run on, in windows that know nothing of each other."""

    ids: list[int]
    settings: GPTQ = GPTQ()

    @classmethod
    def of(cls, model: Path, text: Path, limit: int | None) -> "Calibration":
        """The first tokens of a text, by the tokenizer of the checkpoint."""
        return cls(tokens_of(model, text, limit or CALIBRATION_TOKENS))

    @property
    def batches(self) -> list[dict]:
        return [{"input_ids": window, "use_cache": False} for window in windows(self.ids, WINDOW)]

    @property
    def facts(self) -> dict:
        """What MoertConfig.calibrated says."""
        ids = torch.tensor(self.ids, dtype=torch.int64).numpy().tobytes()
        settings = {name: value for name, value in asdict(self.settings).items() if name != "memory"}
        digest = hashlib.sha256(ids).hexdigest()
        return {"method": "gptq", **settings, "tokens": len(self.ids), "window": WINDOW, "sha256": digest}

    def start(self, source: Path, files: TensorFiles, dtype: torch.dtype, layers: list[Layer]) -> Layerwise:
        """The model of the checkpoint, about to run on the batches."""
        config = load_config(source)
        with torch.device("meta"):
            model = class_of(config)._from_config(config, dtype=dtype)
        try:
            return Layerwise(model, files.stored, files.read, dtype, layers, self.batches, self.settings)
        except ValueError as error:
            raise CommandError(str(error)) from error
