"""moe-rollout: reads the command line, runs the command, and turns what goes wrong into one line and an exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import rollout.cli.check as check
import rollout.cli.generate as generate
import rollout.cli.launch as launch
import rollout.cli.parity as parity
import rollout.cli.publish as publish
import rollout.cli.status as status
import rollout.cli.verify as verify
from rollout.cli.fault import FAULTS, described, one_line
from rollout.cli.terminal import say

PROGRAM = "moe-rollout"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

EPILOGUE = """\
A fleet is found by its name from every shell of the machine. A first round:

  moe-rollout check rollout.yaml          what will run, and what may be promised about its bits
  moe-rollout launch rollout.yaml         stays in the foreground; Ctrl-C ends it
  moe-rollout status                      in another shell: hosts, versions, states
  moe-rollout publish CHECKPOINT --fleet NAME
  moe-rollout verify NAME                 recomputes what every host holds

Exit status: 0 done; 1 it failed, and one line on stderr says why; 2 the command line is wrong; 130 interrupted.
"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line on one line."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message}; see {self.prog} --help")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    whole = OneLineParser(
        prog=PROGRAM,
        description="A rollout worker for reinforcement learning on mixture-of-experts language models.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (check, parity, launch, generate, publish, status, verify):
        one = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(one)
        one.add_argument("--verbose", action="store_true", help="list every offender of an error, on lines of its own")
        one.set_defaults(run=command.run)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. SystemExit for `--help` and for a wrong command line."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=logging.WARNING)
    try:
        answer: int = arguments.run(arguments)
        return answer
    except KeyboardInterrupt:
        say(f"{PROGRAM}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FAULTS as error:
        text = described(error) if arguments.verbose else one_line(error)
        say(f"{PROGRAM} {arguments.command}: {text}")
        return 1
