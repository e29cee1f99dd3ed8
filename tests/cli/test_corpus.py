import math

import pytest
import torch

from moert.cli.corpus import bigram_loss, evenly_spaced, load_corpus
from moert.cli.errors import CommandError


def library(root, files=60):
    for i in range(files):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i}\n" * 400)
    return root


def test_split_is_by_file_and_the_same_again(tmp_path):
    corpus, again = load_corpus(library(tmp_path)), load_corpus(tmp_path)
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.heldout, again.heldout)
    texts = [bytes(part.tolist()) for part in (corpus.train, corpus.heldout)]
    for i in range(60):
        assert sum(f"# module {i}\n".encode() in text for text in texts) == 1
    assert sum(corpus.files) == 60 and corpus.files[1] > 0


def test_tests_and_installed_packages_are_not_the_library(tmp_path):
    size = len(load_corpus(library(tmp_path)).train)
    for folder in ("test", "site-packages/x", "package0/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text("x = 1\n" * 1000)
    assert len(load_corpus(tmp_path).train) == size


def test_this_python_has_enough_text():
    corpus = load_corpus()
    assert len(corpus.train) > 2e6 and len(corpus.heldout) > 5e4


def test_no_source(tmp_path):
    with pytest.raises(CommandError, match=r"source of the standard library must be in .*, got 0 files"):
        load_corpus(tmp_path)


def test_evenly_spaced():
    windows = evenly_spaced(torch.arange(100, dtype=torch.uint8), length=10, count=4)
    assert windows.tolist() == [list(range(s, s + 10)) for s in (0, 30, 60, 90)]


def test_bigram_loss_by_hand():
    train = torch.tensor(list(b"abab"), dtype=torch.uint8)
    # Seen a->b twice, b->a once; add one for each of 256: p(b|a) = 3/258, p(a|b) = 2/257, p(c|b) = 1/257.
    expected = -(math.log(3 / 258) + math.log(2 / 257) + math.log(3 / 258) + math.log(1 / 257)) / 4
    assert bigram_loss(train, torch.tensor([list(b"ababc")])) == pytest.approx(expected)
