"""The task: go on with the prompt. Two letters come in, and the right completion alternates them: "cf" -> "cfcfcfcf".

Every position counts by itself. A policy that knows nothing scores 1/8, and so does any answer that is the same for all
prompts.
"""

import random

LETTERS = "abcdefgh"
VOCAB_SIZE = len(LETTERS)
"""The token ids are the letters' places; there is nothing else in the vocabulary."""
PROMPT_TOKENS = 2
ANSWER_TOKENS = 8


def answer(prompt_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The right completion of a prompt."""
    return tuple(prompt_token_ids[position % len(prompt_token_ids)] for position in range(ANSWER_TOKENS))


def reward(prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> float:
    """Share of the answer's positions that hold the right letter, in [0, 1]; a position that is not there is wrong."""
    right = answer(prompt_token_ids)
    return sum(got == want for got, want in zip(token_ids, right, strict=False)) / len(right)


def draw_prompts(count: int, *, update: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of the prompts of one update."""
    numbers = random.Random(f"{seed}/{update}")
    return tuple(tuple(numbers.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)) for _ in range(count))


def spelled(token_ids: tuple[int, ...]) -> str:
    """Token ids as letters."""
    return "".join(LETTERS[token_id] for token_id in token_ids)
