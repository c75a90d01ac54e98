"""How a host ends an update without its publisher: it asks its siblings how it ended with them."""

from collections.abc import Iterable
from dataclasses import dataclass

from weights.errors import WeightsError
from weights.messages import Ask
from weights.serving import Sibling
from weights.state import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How it ended, and why."""

    update: str
    outcome: Outcome
    reason: str


def ask_each(siblings: Iterable[Sibling], question: Ask) -> tuple[dict[str, Outcome], dict[str, str]]:
    """What each sibling answered, and why those that did not could not."""
    answers: dict[str, Outcome] = {}
    unreached: dict[str, str] = {}
    for sibling in siblings:
        try:
            answers[sibling.host] = sibling.ask(question).outcome
        except WeightsError as error:
            unreached[sibling.host] = str(error)
    return answers, unreached
