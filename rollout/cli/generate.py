"""moe-rollout generate: continues prompts, with a fleet of its own or with one that runs."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rollout.cli.connect import connect
from rollout.cli.memory import host_memory, refuse_shortage, room
from rollout.cli.prompts import add_prompt_options, prompts_of, sampling_of
from rollout.cli.stopping import stoppable
from rollout.cli.terminal import progress, say, show, show_json
from rollout.cli.text import Text
from rollout.config import RolloutConfig
from rollout.fleet import Fleet
from rollout.model.checkpoint import read_config
from rollout.model.families import decoder_spec
from rollout.prospect import prospect_of
from rollout.request import Completion, FinishReason, Prompt, SamplingParams

NAME = "generate"
SUMMARY = "continue prompts, as text or token ids"
DESCRIPTION = """\
Continues prompts and prints each completion when it is done. With CONFIG it launches a fleet for the purpose, with
--fleet it asks one that runs. Prompts and completions are texts where the checkpoint has a tokenizer.json, and token
ids otherwise.

  moe-rollout generate rollout.yaml --prompt "The capital of France is" --max-tokens 16
  moe-rollout generate --fleet grpo-run-7 --tokens 1,2,3 --n 4 --json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("config", metavar="CONFIG", nargs="?", help="launch what this YAML file says")
    whose.add_argument("--fleet", metavar="NAME", help="ask a fleet that runs")
    add_prompt_options(parser)
    parser.add_argument("--json", action="store_true", help="one line of JSON per completion, with log-probabilities")


def run(arguments: argparse.Namespace) -> int:
    """Checks everything that can be checked before a fleet is started or asked."""
    sampling = sampling_of(arguments)
    if arguments.fleet is not None:
        with connect(arguments.fleet) as fleet:
            text = Text(fleet.config.model)
            prompts = prompts_of(arguments, text)
            check_length(prompts, sampling, fleet.config, decoder_context(fleet.config))
            return _generate(fleet, prompts, sampling, text, as_json=arguments.json)
    prospect = prospect_of(RolloutConfig.from_yaml(arguments.config), os.environ)
    text = Text(prospect.config.model)
    prompts = prompts_of(arguments, text)
    check_length(prompts, sampling, prospect.config, prospect.spec.context_length)
    refuse_shortage(
        prospect.config, host_memory(prospect.config, prospect.spec), room(prospect.config, prospect.platform)
    )
    with _launched(prospect.config) as fleet:
        return _generate(fleet, prompts, sampling, text, as_json=arguments.json)


def check_length(prompts: list[Prompt], sampling: SamplingParams, config: RolloutConfig, context_length: int) -> None:
    """ValueError naming the first prompt that is too long for the model or the configuration, and how many are."""
    limit = min(config.engine.max_context, context_length)
    long = [prompt for prompt in prompts if len(prompt.token_ids) + sampling.max_tokens > limit]
    if not long:
        return
    longest = len(long[0].token_ids)
    if limit == context_length:
        what, knob = f"the model's context of {limit} tokens", ""
    else:
        what, knob = f"engine.max_context={limit}", f", or raise engine.max_context (the model takes {context_length})"
    others = f" (and {len(long) - 1} more)" if len(long) > 1 else ""
    fix = f"set --max-tokens to at most {limit - longest}" if longest < limit else "shorten the prompt"
    raise ValueError(
        f"{long[0].id}{others}: {longest} prompt tokens and --max-tokens {sampling.max_tokens} exceed {what}; "
        f"{fix}{knob}"
    )


def decoder_context(config: RolloutConfig) -> int:
    """Positions of the model that a running fleet hosts."""
    return decoder_spec(read_config(config.model)).context_length


@contextmanager
def _launched(config: RolloutConfig) -> Iterator[Fleet]:
    say(f"starting {config.hosts} host{'s' if config.hosts > 1 else ''} of {config.model}")
    with stoppable() as stopping, Fleet.launch(config) as fleet:
        stopping.rearm()
        yield fleet


def _generate(fleet: Fleet, prompts: list[Prompt], sampling: SamplingParams, text: Text, *, as_json: bool) -> int:
    reasons: Counter[FinishReason] = Counter()
    tokens = 0
    with progress("completions") as bar:
        task = bar.add_task("generating", total=len(prompts) * sampling.n)
        for completion in fleet.generate(prompts, sampling):
            bar.advance(task)
            reasons[completion.finish_reason] += 1
            tokens += len(completion.token_ids)
            if as_json:
                show_json(plain(completion, text))
            else:
                show(readable(completion, text))
    ends = ", ".join(f"{count} by {reason}" for reason, count in sorted(reasons.items()))
    say(f"{reasons.total()} completions, {tokens} tokens; ended {ends}")
    bad = reasons[FinishReason.NOT_A_NUMBER]
    if bad:
        raise ValueError(f"{bad} completions ended since the model's logits are no numbers: its weights are broken")
    return 0


def readable(completion: Completion, text: Text) -> str:
    """For a person."""
    versions = ", ".join(str(span.version) for span in completion.version_spans) or "no version"
    head = (
        f"--- {completion.prompt_id} #{completion.sample}: {len(completion.token_ids)} tokens, "
        f"{completion.finish_reason}, {versions}"
    )
    ids = completion.token_ids
    return f"{head}\n{text.decode(ids) if text.there else ' '.join(map(str, ids))}"


def plain(completion: Completion, text: Text) -> dict[str, object]:
    """For JSON."""
    return {
        "prompt_id": completion.prompt_id,
        "sample": completion.sample,
        "host": completion.host_id,
        **({"text": text.decode(completion.token_ids)} if text.there else {}),
        "prompt_token_ids": list(completion.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "model_logprobs": list(completion.model_logprobs),
        "finish_reason": str(completion.finish_reason),
        "seed": completion.seed,
        "versions": [[str(span.version), span.start, span.stop] for span in completion.version_spans],
    }
