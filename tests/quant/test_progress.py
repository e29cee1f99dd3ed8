import io

from moert.quant.progress import Progress, _clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_on_a_terminal():
    stream = Terminal()
    with Progress(4, "experts", stream) as progress:
        progress.advance(1, text="layers.0")
        progress.advance(3, text="layers.1")
    first, last = stream.getvalue().split("\r")[1:]
    assert "1/4 experts, 0:00 gone, 0:00 left  layers.0" in first
    assert last == "█" * 24 + " 4/4 experts, 0:00 gone, 0:00 left  layers.1\n"


def test_nothing_elsewhere():
    stream = io.StringIO()
    with Progress(2, "experts", stream) as progress:
        progress.advance(2)
    assert stream.getvalue() == "" and progress.done == 2


def test_clock():
    assert [_clock(s) for s in (0, 59.6, 61, 3600 + 125)] == ["0:00", "1:00", "1:01", "1:02:05"]
