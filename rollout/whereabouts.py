"""Where a fleet can be found: which Ray cluster it is in, and which process launched it.

A file of the runtime directory. Ray finds a local cluster by itself as long as there is one; with several, and for a
list of fleets, that is not enough.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from weights.rendezvous import check_name, runtime_directory

_SUFFIX = ".fleet.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """Of one fleet on this machine."""

    name: str
    ray_address: str
    """Of its cluster's head, host:port."""
    ray_auth_mode: str
    """What RAY_AUTH_MODE was there; empty where it was not set."""
    launcher: int
    """Process that launched it."""

    def write(self) -> None:
        """Puts it in its place, whole."""
        path = _path(self.name)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(asdict(self), file)
        os.replace(file.name, path)

    @classmethod
    def read(cls, name: str) -> Self | None:
        """Of the fleet of this name; None where no living process launched one here."""
        path = _path(name)
        try:
            match json.loads(path.read_text(encoding="utf-8")):
                case {
                    "name": str(found),
                    "ray_address": str(address),
                    "ray_auth_mode": str(auth_mode),
                    "launcher": int(launcher),
                } if _runs(launcher):
                    return cls(name=found, ray_address=address, ray_auth_mode=auth_mode, launcher=launcher)
        except (OSError, ValueError):
            pass
        return None

    def remove(self) -> None:
        """Takes it away, unless it is another launcher's by now."""
        if Whereabouts.read(self.name) == self:
            _path(self.name).unlink(missing_ok=True)


def fleets_here() -> tuple[str, ...]:
    """Names of the fleets that living processes of this machine launched."""
    names = sorted(path.name.removesuffix(_SUFFIX) for path in runtime_directory().glob(f"*{_SUFFIX}"))
    return tuple(name for name in names if Whereabouts.read(name) is not None)


def sweep_whereabouts() -> tuple[str, ...]:
    """Removes the files of launchers that are gone, and returns their names."""
    swept = tuple(path for path in runtime_directory().glob(f"*{_SUFFIX}") if _is_dead(path))
    for path in swept:
        path.unlink(missing_ok=True)
    return tuple(path.name for path in swept)


def _is_dead(path: Path) -> bool:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # not ours to judge
    return isinstance(plain, dict) and type(plain.get("launcher")) is int and not _runs(plain["launcher"])


def _path(name: str) -> Path:
    return runtime_directory() / f"{check_name(name)}{_SUFFIX}"


def _runs(process: int) -> bool:
    return Path(f"/proc/{process}").exists()
