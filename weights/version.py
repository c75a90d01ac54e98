"""WeightVersion: which weights a host serves, bound to their content."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from weights.digest import Digest

RUN_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")
"""What a run may be called: no spaces, no slashes, and no @, which ends it in a version's text."""

_MAX_STEP = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """The trainer's run, its step, and the digest of the content. Ordered by step, and only within a run."""

    run: str
    """The trainer's run; a restarted learner has a new one, since it may repeat steps."""
    step: int
    """The trainer's step, from 0."""
    digest: Digest
    """Digest of the whole hosted content: the manifest's."""

    def __post_init__(self) -> None:
        if not RUN_PATTERN.fullmatch(self.run):
            raise ValueError(
                f"a run is named by 1 to 128 of A-Z a-z 0-9 . _ : + - (a letter or digit first), got {self.run!r}"
            )
        if not 0 <= self.step <= _MAX_STEP:
            raise ValueError(f"a step is in [0, 2^63), got {self.step}")

    def __str__(self) -> str:
        return f"{self.run}@{self.step}:{self.digest.hex[:8]}"

    def __lt__(self, other: "WeightVersion") -> bool:
        return self._step_beside(other) < other.step

    def __le__(self, other: "WeightVersion") -> bool:
        return self._step_beside(other) <= other.step

    def __gt__(self, other: "WeightVersion") -> bool:
        return self._step_beside(other) > other.step

    def __ge__(self, other: "WeightVersion") -> bool:
        return self._step_beside(other) >= other.step

    def _step_beside(self, other: "WeightVersion") -> int:
        if self.run != other.run:
            raise ValueError(f"{self} and {other} are of different runs, which have no order; compare with ==")
        return self.step

    def to_plain(self) -> dict[str, object]:
        """As a mapping that JSON can hold; `from_plain` is its inverse."""
        return {"run": self.run, "step": self.step, "digest": self.digest.hex}

    @classmethod
    def from_plain(cls, plain: object) -> "WeightVersion":
        """ValueError for anything that `to_plain` does not give."""
        if not isinstance(plain, Mapping) or set(plain) != {"run", "step", "digest"}:
            raise ValueError(f"a version is a mapping of run, step and digest, got {plain!r:.200}")
        run, step, digest = plain["run"], plain["step"], plain["digest"]
        if not isinstance(run, str) or not isinstance(digest, str) or type(step) is not int:
            raise ValueError(f"a version's run and digest are strings and its step an integer, got {plain!r:.200}")
        return cls(run=run, step=step, digest=Digest.from_hex(digest))
