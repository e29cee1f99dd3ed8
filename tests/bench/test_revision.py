import os
import subprocess
import sys

import pytest

from revision import put_in_front


def test_another_moert_is_found_before_the_one_that_is_installed(tmp_path):
    (tmp_path / "moert").mkdir()
    (tmp_path / "moert" / "__init__.py").touch()
    put_in_front(tmp_path)
    command = [sys.executable, "-c", "import moert; print(moert.__file__)"]
    found = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True)
    assert found.strip() == str(tmp_path / "moert" / "__init__.py")


def test_without_another_moert_it_stops(tmp_path):
    (tmp_path / "moert.py").write_text("__file__ = '/elsewhere/moert.py'")
    with pytest.raises(SystemExit, match="moert must be found in .*, got /elsewhere/moert.py"):
        put_in_front(tmp_path)
