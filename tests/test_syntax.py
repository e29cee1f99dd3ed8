"""The package is written in the oldest Python that it promises, whichever Python runs the tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = (3, 10)


def test_the_oldest_python_is_the_promised_one():
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_check_sees_newer_syntax():
    with pytest.raises(SyntaxError, match="3.11"):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass\n", feature_version=OLDEST)


def test_syntax():
    files = [*(ROOT / "python" / "moert").rglob("*.py")]
    assert len(files) > 20
    for path in files:
        ast.parse(path.read_text(), str(path), feature_version=OLDEST)
