import json

import pytest

import moert
from moert.cli.errors import CommandError
from moert.cli.info import info, lines


def test_lines_name_every_fact(capsys):
    info(as_json=False)
    out = capsys.readouterr().out
    facts = moert.info()
    for name, kernel in facts["operators"].items():
        assert any(line.split() == [name, "(CPU)", kernel["cpu"]] for line in out.splitlines())
    assert f"moert {facts['version']}" in " ".join(out.split()) and facts["build"]["compiler"] in out
    assert "CUDA archs" in out and facts["cpu"]["isa"] in out


def test_json_is_the_facts(capsys):
    info(as_json=True)
    assert json.loads(capsys.readouterr().out) == moert.info()


def test_what_is_missing_is_printed():
    facts = {**moert.info(), "missing": ["rich: pip install 'moert[cli]'"]}
    assert lines(facts)[-1].endswith("rich: pip install 'moert[cli]'")


def test_a_wrong_instruction_set_is_one_line(monkeypatch):
    def fail():
        raise RuntimeError("MOERT_ISA must be one of generic, avx2, got sse9")

    monkeypatch.setattr(moert, "info", fail)
    with pytest.raises(CommandError, match="MOERT_ISA must be one of generic, avx2, got sse9"):
        info(as_json=False)


def test_a_line_for_the_rows_of_each_format():
    facts = moert.info()
    facts["quantized_precision"] = {"int4-g32": "int8_group32", "fp8": "full", "sub1": "full"}
    facts["bfloat16_from_rows"] = {"int4-g32": 16, "fp8": 8}
    rows = [" ".join(line.split()) for line in lines(facts) if line.startswith("quantized rows")]
    assert rows == [
        'quantized rows int4-g32: int8_group32, bfloat16 from 16 rows an expert (precision="auto")',
        'quantized rows fp8: full, bfloat16 from 8 rows an expert (precision="auto")',
        'quantized rows sub1: full (precision="auto")',
    ]
    mine = [line for line in lines(moert.info()) if line.startswith("quantized rows")]
    assert len(mine) == len(moert.info()["quantized_precision"]) >= 14
