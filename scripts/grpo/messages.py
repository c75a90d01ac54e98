"""What the trainer and the learner's process say to each other over their pipe.

trainer -> learner: str (the fleet's name, once it is up), then a Batch per update; the pipe's end means stop.
learner -> trainer: Ready, then per update Trained and Published; Failed instead of any of them.
"""

from dataclasses import dataclass

from grpo.agreement import Agreement, Replayed
from weights import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The checkpoint is on disk and the learner holds it."""

    parameters: int
    replays: bool
    """Whether it trains on the experts that the hosts chose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One optimizer step is done; its weights go out next."""

    update: int
    """Updates so far, this one included."""
    agreement: Agreement
    """Hosts beside learner, over completions made wholly under the weights that this step began with. The learner's
    side is what it does by itself, whether or not it replays."""
    staleness: float
    masked_tokens: int
    seconds: float
    replayed: Replayed | None = None
    """None where the learner trains on its own routing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """All hosts serve the weights of this update."""

    update: int
    version: WeightVersion
    seconds: float
    pause_s: tuple[float, ...]
    """Per host, how long no engine step ran."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The learner stops; this is why."""

    text: str


FromLearner = Ready | Trained | Published | Failed
