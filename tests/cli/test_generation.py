import pytest

from moert.cli.generation import Generation, first_difference, summarize


def generation(ids, seconds=(), prefill=0.1, peak=100, above=10, gaps=None):
    return Generation(list(ids), "", 20, prefill, list(seconds), peak, above, gaps)


def test_same_tokens():
    assert first_difference(generation([1, 2]), generation([1, 2]), "moert") is None


def test_first_difference_tells_place_tokens_and_gap():
    reference = generation([1, 2, 3], gaps=[0.5, 0.25, 0.125])
    found = first_difference(reference, generation([1, 7, 3]), "moert")
    assert (found.provider, found.position, found.expected, found.got, found.gap) == ("moert", 1, 2, 7, 0.25)


def test_stopping_earlier_is_a_difference():
    found = first_difference(generation([1, 2, 3]), generation([1, 2]), "eager")
    assert (found.position, found.expected, found.got, found.gap) == (2, 3, None, None)
    assert first_difference(generation([1]), generation([1, 2]), "eager").got == 2


def test_percentiles_stay_among_the_times_that_were_measured():
    (made,) = [generation([1, 2, 3], [0.010, 0.0015])]
    times = summarize([made], [made])["milliseconds_per_token"]
    assert 1.5 <= times["p20"] <= times["p50"] <= times["p80"] <= 10


def test_summarize_takes_medians_over_rounds_and_the_largest_memory():
    decodes = [generation([1, 2, 3], [0.01, 0.03], peak=300), generation([1, 2, 3], [0.02, 0.02], above=40)]
    row = summarize([generation([1], prefill=p) for p in (0.1, 0.2, 0.4)], decodes)
    assert row["prefill_tokens_per_second"] == pytest.approx(100)
    assert row["decode_tokens_per_second"] == pytest.approx(50)
    assert row["milliseconds_per_token"]["p50"] == pytest.approx(20)
    assert row["milliseconds_per_token"]["p20"] <= 20 <= row["milliseconds_per_token"]["p80"]
    assert (row["peak_bytes"], row["generation_bytes"], row["rounds"]) == (300, 40, 2)


def test_one_token_has_no_decode():
    row = summarize([generation([1])], [generation([1])])
    assert row["decode_tokens_per_second"] is None and row["milliseconds_per_token"] is None
