import hashlib

import pytest
import torch

from moert.cli.calibration import CALIBRATION_TOKENS, Calibration
from moert.cli.errors import CommandError
from moert.cli.perplexity import WINDOW
from moert.cli.tensor_files import TensorFiles
from moert.quant import GPTQ


def text(folder, content):
    path = folder / "text.txt"
    path.write_text(content)
    return path


def test_a_text_in_windows(checkpoint, tmp_path):
    calibration = Calibration.of(checkpoint, text(tmp_path, "abc" * 400), None)
    assert calibration.ids == [97, 98, 99] * 400
    rows = [batch["input_ids"].shape for batch in calibration.batches]
    assert rows == [(2, WINDOW), (1, 1200 - 2 * WINDOW)]
    together = torch.cat([batch["input_ids"].flatten() for batch in calibration.batches])
    assert together.tolist() == calibration.ids and not any(batch["use_cache"] for batch in calibration.batches)
    assert len(Calibration.of(checkpoint, text(tmp_path, "abc" * 400), 100).ids) == 100
    assert len(Calibration.of(checkpoint, text(tmp_path, "a" * 70000), None).ids) == CALIBRATION_TOKENS


def test_facts_tell_texts_and_settings_apart():
    facts = Calibration([1, 2, 3]).facts
    digest = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in (1, 2, 3))).hexdigest()
    assert facts["sha256"] == digest and facts["tokens"] == 3 and facts["method"] == "gptq"
    assert Calibration([1, 2, 4]).facts != facts != Calibration([1, 2, 3], GPTQ(damp=0.1)).facts
    assert Calibration([1, 2, 3], GPTQ(memory=1)).facts == facts  # which changes no bit


def test_the_model_has_no_memory_before_it_runs(checkpoint):
    work = Calibration([1, 2, 3]).start(
        checkpoint, TensorFiles(checkpoint), torch.bfloat16, [named("model.layers.0.x")]
    )
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in work.model.parameters())
    with pytest.raises(CommandError, match="experts must be in one list of layers to be calibrated .* got none"):
        Calibration([1, 2, 3]).start(checkpoint, TensorFiles(checkpoint), torch.bfloat16, [named("experts")])


def named(name):
    return type("Named", (), {"name": name})
