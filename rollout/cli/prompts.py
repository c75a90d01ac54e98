"""Prompts and sampling parameters as the command line gives them."""

import argparse
import json
import sys
from pathlib import Path

from rollout.cli.text import Text
from rollout.request import Prompt, SamplingParams


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what to continue, and how."""
    prompts = parser.add_argument_group("prompts (at least one)")
    prompts.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a text; may come several times")
    prompts.add_argument(
        "--tokens", metavar="IDS", action="append", default=[], help="token ids, as in 1,2,3; may come several times"
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt per line: a text, or token ids as a JSON list; - reads standard input",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, help="sampled tokens at most (default: %(default)s)")
    sampling.add_argument("--n", type=int, default=1, help="samples per prompt (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    sampling.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    sampling.add_argument("--top-p", type=float, default=1.0, help="keep this mass of them (default: %(default)s)")
    sampling.add_argument("--seed", type=int, help="the same seed gives the same tokens")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")


def sampling_of(arguments: argparse.Namespace) -> SamplingParams:
    """ValueError names every option that is out of range."""
    return SamplingParams(
        max_tokens=arguments.max_tokens,
        n=arguments.n,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )


def prompts_of(arguments: argparse.Namespace, text: Text) -> list[Prompt]:
    """All prompts of a command line, in order.

    Raises:
        ValueError: there is none, or one is neither token ids nor, with this checkpoint, a text.
        OSError: the file cannot be read.
    """
    found = [text.encode(given) for given in arguments.prompt]
    found += [_token_ids(given) for given in arguments.tokens]
    if arguments.prompts is not None:
        lines = _lines(arguments.prompts)
        found += [
            _of_line(line, number, arguments.prompts, text) for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not found:
        raise ValueError("no prompt: give --prompt TEXT, --tokens 1,2,3 or --prompts FILE")
    return [Prompt(id=f"prompt-{index}", token_ids=ids) for index, ids in enumerate(found)]


def _lines(name: str) -> list[str]:
    if name == "-":
        return sys.stdin.read().splitlines()
    try:
        return Path(name).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _of_line(line: str, number: int, name: str, text: Text) -> tuple[int, ...]:
    try:
        plain = json.loads(line)
    except ValueError:
        plain = None
    if isinstance(plain, list) and plain and all(type(token) is int for token in plain):
        return tuple(plain)
    try:
        return text.encode(line)
    except ValueError as error:
        raise ValueError(f"{name}, line {number}: {error}") from error


def _token_ids(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in given.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--tokens {given!r}: expected token ids such as 1,2,3") from None
