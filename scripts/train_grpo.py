"""GRPO with a live fleet: a learner trains a tiny MoE from random weights and publishes into hosts while they generate.

The last line of standard output is one JSON object with the run's figures; the exit status says whether they are what
they must be.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

from grpo.errors import DemoError
from grpo.families import FAMILIES
from grpo.figures import figures_of, misses
from grpo.learner_process import LearnerProcess
from grpo.plot import draw
from grpo.record import Record
from grpo.task import ANSWER_TOKENS, PROMPT_TOKENS
from grpo.trainer import Plan, Trainer
from grpo.view import LiveView, PlainView, View
from rich.console import Console

from rollout import Fleet, RolloutConfig, RolloutError
from rollout.config import DeadlineConfig, EngineConfig

LEARNER_START_S = 120.0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_moe", help="the learner's model class")
    parser.add_argument("--updates", type=int, default=Plan().updates, help="optimizer steps, each of them published")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the prompts")
    parser.add_argument(
        "--replay", action="store_true", help="the learner trains on the experts that the hosts chose for each token"
    )
    parser.add_argument("--hosts", type=int, default=2, help="replicas of the model")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for checkpoint, plot, figures and log"
    )
    parser.add_argument("--plain", action="store_true", help="a line per update in place of the live view")
    args = parser.parse_args(arguments)
    for name in ("updates", "hosts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, must be at least 1")
    return args


def fleet_config(args: argparse.Namespace) -> RolloutConfig:
    return RolloutConfig(
        name=f"grpo-demo-{os.getpid()}",
        model=str(args.out / "checkpoint"),
        trainer="transformers",
        rl_mode=True,
        hosts=args.hosts,
        dtype="float32",
        device="cpu",
        engine=EngineConfig(max_running=32, max_context=PROMPT_TOKENS + ANSWER_TOKENS, block_size=4),
        deadlines=DeadlineConfig(start_s=120.0, progress_s=60.0),
    )


def train(args: argparse.Namespace, view: View) -> list[Record]:
    """The run itself."""
    with LearnerProcess(
        family=args.family,
        checkpoint=args.out / "checkpoint",
        seed=args.seed,
        log=args.out / "learner.log",
        replays=args.replay,
    ) as learner:
        view.phase("writing the checkpoint, loading the learner")
        learner.receive("the learner to write and load its checkpoint", LEARNER_START_S)
        view.phase("starting Ray and the hosts")
        config = fleet_config(args)
        with Fleet.launch(config) as fleet:
            version = fleet.status().version
            assert version is not None, "hosts that have just loaded one checkpoint serve one version"
            learner.send(config.name)
            view.phase("training")
            plan = Plan(updates=args.updates, seed=args.seed)
            return Trainer(fleet, learner, plan, version).run(view.update)


def main(arguments: list[str]) -> int:
    started = time.perf_counter()
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    title = f"GRPO, {args.family}, {args.hosts} hosts"
    console = Console()
    plain = args.plain or not console.is_terminal
    view: View = PlainView(console) if plain else LiveView(console, title=title, updates=args.updates)
    try:
        with view:
            records = train(args, view)
    except (DemoError, RolloutError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    draw(records, args.out / "plot.png", title=title)
    figures = figures_of(records, family=args.family, transport="shared_memory", seconds=time.perf_counter() - started)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    missed = misses(figures, hosts=args.hosts)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    print(json.dumps(figures), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
