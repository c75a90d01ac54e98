"""What may be said about the bits of an operation."""

from enum import StrEnum


class Verdict(StrEnum):
    """What may be promised about one operation's bits."""

    EQUAL = "equal"
    """The trainer's, given the trainer's input."""
    UNPROVED = "unproved"
    """They may be equal; nothing here shows it."""
    IMPOSSIBLE = "impossible"
    """They differ, or follow the batch, whatever the weights."""
