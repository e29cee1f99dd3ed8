import pytest
from tools.mirror import expected, missing


@pytest.mark.parametrize(
    "path,others",
    [
        ("python/moert/ops/gating.py", ["tests/ops/test_gating.py"]),
        ("python/moert/types.py", ["tests/test_types.py"]),
        ("python/moert/ops/__init__.py", []),
        (
            "csrc/binding/gating.cpp",
            [
                "python/moert/ops/gating.py",
                "csrc/cpu/gating.cpp",
                "csrc/moert/gating.h",
                "bench/python/bench_gating.py",
            ],
        ),
        ("csrc/binding/module.cpp", []),
        ("csrc/moert/gating.h", ["tests/cpp/test_gating.cpp"]),
        ("csrc/cpu/gating_avx512.cpp", ["csrc/cpu/gating.cpp", "csrc/cpu/gating_isa.h"]),
        ("tools/size.py", ["tests/tools/test_size.py"]),
    ],
)
def test_expected(path, others):
    assert expected(path) == others


def test_missing_names_both_files():
    assert missing({"csrc/moert/a.h"}) == ["csrc/moert/a.h needs tests/cpp/test_a.cpp"]
    assert missing({"csrc/moert/a.h", "tests/cpp/test_a.cpp"}) == []
