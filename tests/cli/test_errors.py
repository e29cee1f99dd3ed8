from moert.cli.errors import first_line


def test_many_lines_become_one():
    assert first_line(ValueError("size mismatch:\n  a\n\tb")) == "size mismatch: a b"


def test_long_text_is_cut():
    assert first_line(ValueError("x" * 1000)) == "x" * 297 + "..."


def test_an_error_without_words_is_named():
    assert first_line(MemoryError()) == "MemoryError"
