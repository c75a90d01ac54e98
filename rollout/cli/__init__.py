"""The command line, `moe-rollout`: one file per command."""

from rollout.cli.entry import main

__all__ = ["main"]
