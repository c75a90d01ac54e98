"""The task: what is right, and that nobody scores without reading the prompt."""

import itertools
import random
from statistics import fmean

from grpo.task import ANSWER_TOKENS, PROMPT_TOKENS, VOCAB_SIZE, answer, draw_prompts, reward, spelled
from hypothesis import given
from hypothesis import strategies as st

PROMPTS = list(itertools.product(range(VOCAB_SIZE), repeat=PROMPT_TOKENS))
COMPLETIONS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=ANSWER_TOKENS, max_size=ANSWER_TOKENS).map(tuple)


def test_the_answer_alternates_the_prompts_letters() -> None:
    assert spelled((2, 5)) == "cf"
    assert spelled(answer((2, 5))) == "cfcfcfcf"


def test_only_the_answer_scores_one() -> None:
    assert all(reward(prompt, answer(prompt)) == 1 for prompt in PROMPTS)
    assert all(reward(prompt, answer(other)) < 1 for prompt in PROMPTS for other in PROMPTS if prompt != other)


def test_each_right_position_counts_the_same() -> None:
    assert reward((0, 1), (0, 1, 0, 1, 7, 7, 7, 7)) == 0.5
    assert reward((0, 1), (7, 7, 7, 7, 0, 1, 0, 1)) == 0.5


def test_missing_positions_are_wrong() -> None:
    assert reward((0, 1), (0, 1)) == 2 / ANSWER_TOKENS
    assert reward((0, 1), ()) == 0


@given(COMPLETIONS)
def test_any_constant_answer_scores_an_eighth_over_all_prompts(completion: tuple[int, ...]) -> None:
    assert fmean(reward(prompt, completion) for prompt in PROMPTS) == 1 / VOCAB_SIZE < 0.3


def test_a_random_policy_scores_at_chance() -> None:
    numbers = random.Random(0)
    rewards = [reward(prompt, tuple(numbers.choices(range(VOCAB_SIZE), k=ANSWER_TOKENS))) for prompt in PROMPTS * 30]
    assert abs(fmean(rewards) - 1 / VOCAB_SIZE) < 0.01


def test_prompts_are_a_function_of_seed_and_update() -> None:
    drawn = draw_prompts(16, update=3, seed=1)
    assert drawn == draw_prompts(16, update=3, seed=1)
    assert drawn != draw_prompts(16, update=4, seed=1)
    assert drawn != draw_prompts(16, update=3, seed=2)


def test_prompts_are_of_one_length_and_cover_the_vocabulary() -> None:
    drawn = draw_prompts(200, update=0, seed=0)
    assert len(drawn) == 200
    assert {len(token_ids) for token_ids in drawn} == {PROMPT_TOKENS}
    assert {token_id for token_ids in drawn for token_id in token_ids} == set(range(VOCAB_SIZE))
