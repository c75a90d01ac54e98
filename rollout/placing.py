"""What the supervisor of a fleet needs of Ray: the seam between the two."""

from typing import Any, Protocol

from rollout.actor import Call
from rollout.introduction import Introduction


class Placing(Protocol):
    """Starts, calls and ends actors: `rollout.actor.Placement` does, and a fake in tests."""

    def place(self, host_id: str, incarnation: int, hold: bool) -> Any: ...
    def call(self, actor: Any, method: str, *args: Any) -> Call: ...
    def end(self, actor: Any, introduction: Introduction | None) -> None: ...
