"""How a learner finds a fleet on its machine: a roster file in a directory that only this user can enter."""

import json
import os
import re
import socket
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from weights.bucket import DEFAULT_BUCKET_BYTES, check_bucket_bytes
from weights.errors import RosterError

DEFAULT_DEADLINE_S = 60.0
DEFAULT_SILENCE_S = 180.0
ABANDONED_S = 60.0
"""Age at which a socket or a half-written roster that nobody uses is swept; a starting host's is younger."""
TRANSPORTS = ("shared_memory", "cuda_ipc", "nccl")
"""Transports that a roster may name."""

BACKENDS = ("nccl", "gloo")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un of Linux, less the final zero


def runtime_directory() -> Path:
    """Where rosters and sockets lie: $MOE_ROLLOUT_RUNTIME_DIR, or moe-rollout in $XDG_RUNTIME_DIR, or
    moe-rollout-<uid> in the temporary directory. Made with mode 0700. RosterError if it belongs to another user or
    others may enter it.
    """
    named, session = os.environ.get("MOE_ROLLOUT_RUNTIME_DIR"), os.environ.get("XDG_RUNTIME_DIR")
    if named:
        directory = Path(named)
    elif session:
        directory = Path(session) / "moe-rollout"
    else:
        directory = Path(tempfile.gettempdir()) / f"moe-rollout-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise RosterError(
            f"{directory} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, "
            f"expected user {os.getuid()} and mode 700: whoever enters it may replace weights. "
            "Remove it, chmod 700 it, or name another in MOE_ROLLOUT_RUNTIME_DIR"
        )
    return directory


def socket_path(fleet: str, host: str) -> str:
    """The unix socket of a host.

    ValueError for names that are none, RosterError if the path is too long for a socket.
    """
    path = str(runtime_directory() / f"{check_name(fleet)}.{check_name(host)}.sock")
    if len(path.encode()) > _MAX_SOCKET_PATH_BYTES:
        raise RosterError(
            f"a socket's path has at most {_MAX_SOCKET_PATH_BYTES} bytes, got {len(path.encode())}: {path}. "
            "Name a shorter directory in MOE_ROLLOUT_RUNTIME_DIR"
        )
    return path


def check_name(name: str) -> str:
    """`name`, if it may name a fleet or a host: it becomes part of a file's name. ValueError otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a fleet or host is named by 1 to 64 of A-Z a-z 0-9 . _ - (a letter or digit first), got {name!r:.100}"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterHost:
    """One host of a fleet."""

    id: str
    address: str
    """Path of the unix socket that it listens on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who is in a fleet, and the terms of its updates."""

    name: str
    transport: str
    hosts: tuple[RosterHost, ...]
    backend: str = "nccl"
    """Of the transport nccl: gloo where the hosts run on CPUs."""
    shadow: bool = False
    """Of the transport nccl: whether hosts keep a full second copy of an update before they vote."""
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    deadline_s: float = DEFAULT_DEADLINE_S
    """How long a host may take to answer one call of the publisher."""
    silence_s: float = DEFAULT_SILENCE_S
    """How long a host hears nothing during an update before it settles; more than deadline_s, or it may settle under
    a live publisher.
    """
    launcher: int | None = None
    """Process that watches the hosts and starts them again; None where nobody does."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_bucket_bytes(self.bucket_bytes)
        ids = [check_name(host.id) for host in self.hosts]
        if len(set(ids)) != len(ids):
            raise ValueError(f"host ids of a fleet differ, got {', '.join(ids)}")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport is one of {', '.join(TRANSPORTS)}, got {self.transport!r:.100}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is one of {', '.join(BACKENDS)}, got {self.backend!r:.100}")
        if not 0 < self.deadline_s < self.silence_s < float("inf"):
            raise ValueError(f"expected 0 < deadline_s < silence_s, got {self.deadline_s} and {self.silence_s}")

    def write(self) -> Path:
        """Puts the roster in its place, whole: a reader sees the old one or the new one."""
        path = _roster_path(self.name)
        plain = {
            "name": self.name,
            "transport": self.transport,
            "backend": self.backend,
            "shadow": self.shadow,
            "hosts": [[host.id, host.address] for host in self.hosts],
            "bucket_bytes": self.bucket_bytes,
            "deadline_s": self.deadline_s,
            "silence_s": self.silence_s,
            "launcher": self.launcher,
        }
        text = json.dumps(plain, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.replace(file.name, path)
            except OSError:  # a full disk: the old roster stands
                os.unlink(file.name)
                raise
        return path

    @classmethod
    def read(cls, name: str) -> "Roster":
        """The roster of a fleet on this machine. RosterError if there is none or it is malformed."""
        path = _roster_path(name)
        try:
            text = path.read_text()
        except FileNotFoundError as error:
            known = ", ".join(sorted(other.name.removesuffix(_SUFFIX) for other in path.parent.glob(f"*{_SUFFIX}")))
            raise RosterError(
                f"no fleet {name!r} in {path.parent} (there: {known or 'none'}); "
                "launch it first, with the same MOE_ROLLOUT_RUNTIME_DIR"
            ) from error
        try:
            match json.loads(text):
                case {
                    "name": str(found),
                    "transport": str(transport),
                    "backend": str(backend),
                    "shadow": bool(shadow),
                    "hosts": [*hosts],
                    "bucket_bytes": int(bucket_bytes),
                    "deadline_s": int() | float() as deadline_s,
                    "silence_s": int() | float() as silence_s,
                    "launcher": int() | None as launcher,
                }:
                    return cls(
                        name=found,
                        transport=transport,
                        backend=backend,
                        shadow=shadow,
                        hosts=tuple(_host(host) for host in hosts),
                        bucket_bytes=bucket_bytes,
                        deadline_s=deadline_s,
                        silence_s=silence_s,
                        launcher=launcher,
                    )
        except ValueError as error:
            raise RosterError(f"{path} is no roster: {error}; remove it and launch the fleet again") from error
        raise RosterError(
            f"{path} is no roster: fields are missing or of other types; remove it and launch the fleet again"
        )

    def remove(self) -> None:
        """Takes the roster away; no error if it is gone."""
        remove_roster(self.name)


def remove_roster(name: str) -> None:
    """Takes the roster of a fleet away; no error if there is none."""
    _roster_path(name).unlink(missing_ok=True)


def sweep() -> tuple[str, ...]:
    """Removes what fleets that died left in the runtime directory, and returns the names of the files.

    A roster goes, with its sockets, when nobody listens on any of them and its launcher is gone; anything else that
    is in no roster goes when nobody uses it and it is old.
    """
    directory = runtime_directory()
    swept, kept = [], set()
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            roster = Roster.read(path.name.removesuffix(_SUFFIX))
        except (RosterError, ValueError):
            continue  # not ours to judge: a later release's, say
        doors = {Path(host.address) for host in roster.hosts}
        if _runs(roster.launcher) or any(_listens(door) for door in doors):
            kept |= doors
        else:
            swept += [path, *(door for door in doors if door.parent == directory and door.exists())]
    old = [*directory.glob("*.sock"), *directory.glob(f".*{_SUFFIX}.*")]
    swept += [path for path in old if path not in kept and path not in swept and _is_abandoned(path)]
    for path in swept:
        path.unlink(missing_ok=True)
    return tuple(path.name for path in swept)


def _is_abandoned(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_S and not (path.suffix == ".sock" and _listens(path))
    except FileNotFoundError:
        return False


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _runs(process: int | None) -> bool:
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_SUFFIX = ".roster.json"


def _roster_path(name: str) -> Path:
    return runtime_directory() / f"{check_name(name)}{_SUFFIX}"


def _host(plain: object) -> RosterHost:
    match plain:
        case [str(identity), str(address)]:
            return RosterHost(id=identity, address=address)
    raise ValueError(f"a host is [id, address], got {plain!r:.100}")
