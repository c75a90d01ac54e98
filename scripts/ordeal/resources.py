"""What processes hold: memory, descriptors, segments. A leak shows when the end of a run holds more than its start."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_OWN = re.compile(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", re.MULTILINE)
SEGMENT = "moe-rollout-weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """By several processes together, at one moment."""

    at_s: float
    memory_mib: float
    """Anonymous and shared: what they wrote, not the libraries that they mapped."""
    descriptors: int
    segments: int
    """Mappings of and descriptors for segments of weights."""


def held(processes: Iterable[int], at_s: float) -> Held | None:
    """None if one of them ended meanwhile."""
    memory = descriptors = segments = 0
    for process in processes:
        place = Path(f"/proc/{process}")
        try:
            memory += sum(map(int, _OWN.findall((place / "status").read_text())))
            segments += (place / "maps").read_text().count(SEGMENT)
            for entry in os.listdir(place / "fd"):
                descriptors += 1
                with suppress(FileNotFoundError):
                    segments += SEGMENT in os.readlink(place / "fd" / entry)
        except (FileNotFoundError, ProcessLookupError):
            return None
    return Held(at_s=at_s, memory_mib=memory / 1024, descriptors=descriptors, segments=segments)


def growth(samples: list[Held], whole_s: float, what: str) -> tuple[float, float]:
    """The median in the second tenth of a run, and in the last."""

    def tenth(index: int) -> float:
        inside = [getattr(s, what) for s in samples if index <= 10 * s.at_s / whole_s < index + 1]
        return float(median(inside))

    return tenth(1), tenth(9)
