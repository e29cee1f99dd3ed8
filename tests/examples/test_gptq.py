import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from examples import gptq
from moert.quant import GPTQ, Int4, Ternary2


def save_tiny(directory):
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(hidden_size=32, num_hidden_layers=1, vocab_size=256, **attention, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def test_rows(tmp_path):
    save_tiny(tmp_path)
    text = torch.randint(256, (6, 32))
    rows = list(gptq.rows(tmp_path, [Int4(), Ternary2()], text[:4], text[4:], GPTQ(min_rows=1)))
    assert [row.name for row in rows] == ["float32", "`Int4(group=32)`", "`Ternary2(group=None)`"]
    assert [row.bits for row in rows] == [32, 4.5, 4.5]  # rows of 32 ternary weights are half a block, and a scale
    assert all(200 < row.rounded < 330 for row in rows) and rows[0].calibrated is None
    assert rows[2].calibrated != rows[2].rounded and rows[2].few == 0


def test_markdown():
    row = gptq.Row("`Int4(group=32)`", 4.5, 11.0, 10.5, 3.4, 2)
    assert row.markdown(10.0) == "| `Int4(group=32)` | 4.50 | 11.000 (+10.00 %) | 10.500 (+5.00 %) | 3 | 2 |"


def test_command(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path)
    monkeypatch.setattr(gptq, "FORMATS", (Int4(),))
    monkeypatch.setattr(sys, "argv", ["gptq.py", str(tmp_path), "--windows", "8", "--min-rows", "3"])
    gptq.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("GPTQ(") and "min_rows=3" in lines[0] and "2,048 bytes of calibration" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[1:]] == ["experts", "---", "float32", "`Int4(group=32)`"]
