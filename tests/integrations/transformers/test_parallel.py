"""Models that transformers spreads over processes: the results of one process, for each kind of gate and layout."""

import pytest

from parallel import LAYOUTS, LAYOUTS_OF_4, compare, save
from ranks import ranks

BOUND = 1e-5
WITH_FSDP = ["FSDP2", "FSDP2 and expert parallel", "FSDP2 and expert parallel, moert"]
# What transformers itself can spread; the reasons are the same for its other implementations of the experts.
KINDS = {
    "Qwen3Moe": [*LAYOUTS],
    "Aria": [*LAYOUTS],
    "GptOss": [*LAYOUTS],
    "NemotronH": [*LAYOUTS],
    "DeepseekV4": [*LAYOUTS],
    "MiniMaxM3VL": [*LAYOUTS],
    "OpenAIPrivacyFilter": WITH_FSDP,  # has no plan for tensor parallelism, which the others build on
    "Gemma4Text": [*LAYOUTS][:5],  # puts its dense layers on the ranks of the experts, where FSDP2 has them
    "Inkling2": [*LAYOUTS][1:],  # tensor parallel: full_tensor() of gate_up_proj has its quarters in another order
    "MuseSpark": WITH_FSDP,  # tensor parallel: a norm inside the embedding meets a sum that is not finished
}
# Each kind at least once and each layout at least twice; all pairs are run with -m slow.
SOME = {
    "Qwen3Moe": [*LAYOUTS],
    "Aria": ["tensor parallel"],
    "GptOss": ["expert parallel, all_to_all", "expert parallel, moert"],
    "NemotronH": ["tensor parallel"],
    "DeepseekV4": ["expert parallel, all_reduce"],
    "MiniMaxM3VL": ["FSDP2 and expert parallel", "FSDP2 and expert parallel, moert"],
    "OpenAIPrivacyFilter": ["FSDP2 and expert parallel"],
    "Gemma4Text": ["tensor parallel"],
    "Inkling2": ["expert parallel, all_to_all"],
    "MuseSpark": ["FSDP2"],
}


def assert_like_one_process(number: int, kinds: dict[str, list[str]], folder) -> None:
    for kind in kinds:
        save(kind, folder)
    told = ranks(number, compare, str(folder), kinds, BOUND, timeout=400)
    wrong = [f"rank {rank}, {name}: {text}" for rank, all in enumerate(told) for name, text in all.items() if text]
    assert not wrong, "\n".join(wrong)
    assert all(len(one) == sum(map(len, kinds.values())) for one in told)


def test_two_ranks(tmp_path):
    assert_like_one_process(2, SOME, tmp_path)


@pytest.mark.slow
def test_two_ranks_with_every_kind(tmp_path):
    assert_like_one_process(2, KINDS, tmp_path)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    kinds = [kind for kind, layouts in KINDS.items() if layouts == [*LAYOUTS]]
    assert_like_one_process(4, {kind: [*LAYOUTS_OF_4] for kind in kinds}, tmp_path)
