import sys

from tools import machine


def test_this_machine_has_all():
    assert machine.missing() is None


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "nonexistent++ -O2")
    assert machine.missing() == "a C++ compiler, got no nonexistent++: apt install g++"


def test_no_headers(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert machine.missing() == "the headers of Python, got no Python.h: apt install python3-dev"


def test_no_venv(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert machine.missing().endswith("apt install python3-venv")


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert machine.missing().startswith("Python >= 3.10, got 3.9:")
