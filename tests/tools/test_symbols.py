import subprocess

import pytest
from tools.symbols import main, weak_symbols


def compiled(folder, name, text):
    (folder / f"{name}.cpp").write_text(text)
    subprocess.run(["c++", "-std=c++20", "-O0", "-c", f"{name}.cpp", "-o", f"{name}.o"], cwd=folder, check=True)
    return folder / f"{name}.o"


def test_inline_function_is_weak(tmp_path):
    text = "inline int shared(int x) { return x; }\nint f(int x) { return shared(x); }\n"
    assert weak_symbols(compiled(tmp_path, "gemm_avx2", text)) == ["shared(int)"]
    with pytest.raises(SystemExit, match="gemm_avx2.o: weak symbol shared"):
        main([str(tmp_path)])


def test_static_function_is_not(tmp_path, capsys):
    text = "static inline int own(int x) { return x; }\nint f(int x) { return own(x); }\n"
    assert weak_symbols(compiled(tmp_path, "gemm_avx512", text)) == []
    main([str(tmp_path)])
    assert "1 objects" in capsys.readouterr().out


def test_nothing_to_look_at_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="got none"):
        main([str(tmp_path)])
