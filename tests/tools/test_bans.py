import pytest
from tools.bans import findings, sources

REFUSED = [
    ("python/moert/a.py", "    print(x)", "print("),
    ("a.cpp", "// TODO make it fast", "TODO"),
    ("a.cpp", "  #if 0", "#if 0"),
    ("a.cpp", "\tint x;", "tab"),
    ("a.py", "x = 1  ", "space at the end"),
    ("a.py", "# good enough for now", "for now"),
    ("a.cpp", "// ----------------", "banner"),
    ("a.cpp", "  // int x = f(y);", "commented-out"),
    ("a.cpp", "  // f(x, y);", "commented-out"),
    ("a.py", "    # x = f(y)", "commented-out"),
    ("csrc/binding/a.cpp", "#include <torch/extension.h>", "torch/extension.h"),
    ("csrc/cpu/a.cpp", "#include <torch/csrc/stable/tensor.h>", "torch outside csrc/binding"),
]
ALLOWED = [
    ("python/moert/cli/a.py", "    print(x)"),
    ("a.cpp", "// TODO(#12) the backward"),
    ("a.cpp", "//   offsets [E+1]   the slots of expert e are offsets[e] .. offsets[e+1]-1; the rest is free"),
    ("a.cpp", "// y[s] = x[s] . w[expert of s]^T, scaled before or after the bias is added"),
    ("a.py", "# H = hidden size, in elements"),
    ("csrc/binding/a.cpp", "#include <torch/csrc/stable/tensor.h>"),
    ("Makefile", "\tpytest"),
]


@pytest.mark.parametrize("path,line,what", REFUSED, ids=str)
def test_refused(path, line, what):
    found = findings(path, "first\n" + line)
    assert len(found) == 1 and found[0].startswith(f"{path}:2: ") and what in found[0]


@pytest.mark.parametrize("path,line", ALLOWED, ids=str)
def test_allowed(path, line):
    assert findings(path, line) == []


def test_sources_cover_the_tree():
    names = {path.name for path in sources()}
    assert {"CMakeLists.txt", "pyproject.toml", "module.cpp", "README.md", "types.py", "check.h"} - {
        "CMakeLists.txt"
    } <= names
