import sys

from examples import sub1_rates


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(sub1_rates, "SHAPES", ((16, 128),))
    monkeypatch.setattr(sys, "argv", ["sub1_rates.py"])
    sub1_rates.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [["16 × 128", name] for name in ("rounded", "GPTQ", "GPTQ, act_order")]
    errors = [float(line[4]) for line in lines]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[0]
    assert all(0.5 < float(line[2].strip("%")) / 100 < 0.95 and 0.5 < float(line[3]) < 3 for line in lines)
