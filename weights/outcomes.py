"""Outcomes: how the last updates ended on a host."""

from collections import OrderedDict

from weights.state import Outcome

_REMEMBERED = 256


class Outcomes:
    """A bounded memory: what was asked about or told lately is kept, what is older is forgotten."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()

    def __getitem__(self, update: str) -> Outcome:
        return self._outcomes[update]

    def get(self, update: str) -> Outcome | None:
        return self._outcomes.get(update)

    def keep(self, update: str, outcome: Outcome) -> None:
        self._outcomes[update] = outcome
        while len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)

    def absence(self, update: str, under_way: str | None) -> str:
        """Why a host has no such update at hand."""
        ended = self._outcomes.get(update)
        if ended is not None:
            return f"update {update} has ended here: {ended}"
        other = "" if under_way is None else f"; {under_way} is under way"
        return f"update {update} was never offered here{other}"
