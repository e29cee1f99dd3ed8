import os
import signal

import pytest

from moert.cli.errors import CommandError
from moert.cli.generation import Request
from moert.cli.provider import Load, Provider


def test_a_process_answers_streams_and_dies_with_a_name(checkpoint):
    request = Request("def f(", 6, stream=True)
    with Provider("eager", Load(checkpoint, threads=1)) as provider:
        assert provider.wait() == "Qwen3MoeForCausalLM"
        pieces = []
        first = provider.generate(request, pieces.append)
        assert provider.generate(request).ids == first.ids and len(first.ids) == 6
        assert "".join(pieces).strip() == first.text.strip()
        os.kill(provider._process.pid, signal.SIGKILL)
        with pytest.raises(CommandError, match=r"the eager process must finish, got SIGKILL \(out of memory\?\)"):
            provider.generate(request)
    assert provider._process.returncode == -signal.SIGKILL


def test_its_errors_are_ours(dense_checkpoint):
    message = "must have mixture-of-experts layers"
    with Provider("eager", Load(dense_checkpoint)) as provider, pytest.raises(CommandError, match=message):
        provider.wait()


def test_a_process_that_cannot_start_says_why(checkpoint):
    message = "the eager process must finish, got: .*invalid int value"
    with Provider("eager", Load(checkpoint, threads=0.5)) as provider, pytest.raises(CommandError, match=message):
        provider.wait()
