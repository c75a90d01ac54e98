"""The frames that messages travel in.

A frame is magic (4 bytes), length of the body (8, big-endian), blake2b-128 of the body (16), and the body: JSON.
Nothing is ever unpickled, and nothing that arrives is believed before it is checked.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn, get_type_hints

from weights.catalogue import Catalogue
from weights.delivery import Delivery
from weights.digest import Digest
from weights.digests import Digests
from weights.errors import ManifestError, MessageError
from weights.lease import Lease, SlotTerms, WireTerms
from weights.messages import KINDS, Message
from weights.state import Intent, Outcome, State
from weights.version import WeightVersion

MAX_BODY_BYTES = 256 << 20

_HEADER = struct.Struct(">4sQ16s")
_MAGIC = b"MoRW"
HEADER_BYTES = _HEADER.size


def encode(message: Message) -> bytes:
    """The frame of a message."""
    plain: dict[str, object] = {"kind": type(message).__name__}
    for field, hint in _FIELDS[type(message)].items():
        plain[field] = _ENCODERS.get(hint, _as_is)(getattr(message, field))
    body = json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    return _HEADER.pack(_MAGIC, len(body), _checksum(body)) + body


def body_bytes(header: bytes) -> int:
    """The length of the body that follows a frame's first HEADER_BYTES.

    MessageError if no frame of ours starts like that.
    """
    if len(header) != HEADER_BYTES:
        raise MessageError(f"a frame starts with {HEADER_BYTES} bytes, got {len(header)}: it was cut short")
    magic, length, _ = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise MessageError(f"a frame starts with {_MAGIC!r}, got {magic!r}: not a publisher or host of this program")
    if length > MAX_BODY_BYTES:
        raise MessageError(f"a frame's body has at most {MAX_BODY_BYTES} bytes, got {length}")
    return int(length)


def decode(frame: bytes) -> Message:
    """The inverse of `encode`. MessageError for any other bytes."""
    length = body_bytes(frame[:HEADER_BYTES])
    body = frame[HEADER_BYTES:]
    if len(body) != length:
        raise MessageError(f"a frame announced {length} bytes and holds {len(body)}: it was cut short")
    if _checksum(body) != _HEADER.unpack(frame[:HEADER_BYTES])[2]:
        raise MessageError(f"a frame of {length} bytes was changed on its way: its checksum differs")
    return decode_body(body)


def decode_body(body: bytes) -> Message:
    """The message in a frame's body. MessageError for anything that is none."""
    try:
        plain = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a message is JSON, got {body[:80]!r}: {error}") from error
    if not isinstance(plain, dict) or not isinstance(plain.get("kind"), str) or plain["kind"] not in KINDS:
        raise MessageError(f"a message has one of the kinds {', '.join(KINDS)}, got {str(plain)[:80]!r}")
    kind = KINDS[plain.pop("kind")]
    hints = _FIELDS[kind]
    if set(plain) != set(hints):
        raise MessageError(f"{kind.__name__} has the fields {', '.join(hints)}, got {', '.join(plain)[:200]}")
    values = {}
    for field, hint in hints.items():
        try:
            values[field] = _DECODERS[hint](plain[field])
        except (ValueError, ManifestError) as error:
            raise MessageError(f"{kind.__name__}.{field}: {error}") from error
    return kind(**values)


def _hints(kind: type[Message]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


_FIELDS = {kind: _hints(kind) for kind in KINDS.values()}


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number here")


def _as_is(value: object) -> object:
    return value


def _text(plain: object) -> str:
    if not isinstance(plain, str):
        raise ValueError(f"expected a string, got {type(plain).__name__}")
    plain.encode()  # a lone surrogate, which JSON can spell, is a ValueError here and not later in a log
    return plain


def _count(plain: object) -> int:
    if type(plain) is not int or not 0 <= plain < 1 << 63:
        raise ValueError(f"expected an integer in [0, 2^63), got {plain!r:.40}")
    return plain


def _seconds(plain: object) -> float:
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not 0 <= plain < 1 << 53:  # NaN is neither
        raise ValueError(f"expected seconds, finite and not negative, got {plain!r:.40}")
    return float(plain)


def _texts(plain: object) -> dict[str, str]:
    if not isinstance(plain, dict):
        raise ValueError(f"expected a mapping of strings, got {type(plain).__name__}")
    return {_text(key): _text(value) for key, value in plain.items()}


def _digest(plain: object) -> Digest:
    return Digest.from_hex(_text(plain))


def _plain_if_any(value: Any) -> object:
    return None if value is None else value.to_plain()


def _if_any(read: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda plain: None if plain is None else read(plain)


_ENCODERS: dict[Any, Callable[[Any], object]] = {
    Digest: lambda digest: digest.hex,
    Digest | None: lambda digest: None if digest is None else digest.hex,
    Digests: lambda digests: digests.hex,
    WeightVersion: WeightVersion.to_plain,
    WeightVersion | None: _plain_if_any,
    Catalogue | None: _plain_if_any,
    Lease | None: _plain_if_any,
    SlotTerms | None: _plain_if_any,
    WireTerms | None: _plain_if_any,
    Mapping[str, str]: dict,
}
_DECODERS: dict[Any, Callable[[object], Any]] = {
    str: _text,
    int: _count,
    float: _seconds,
    Digest: _digest,
    Digest | None: _if_any(_digest),
    Digests: lambda plain: Digests.from_hex(_text(plain)),
    WeightVersion: WeightVersion.from_plain,
    WeightVersion | None: _if_any(WeightVersion.from_plain),
    Catalogue | None: _if_any(Catalogue.from_plain),
    Lease | None: _if_any(Lease.from_plain),
    SlotTerms | None: _if_any(SlotTerms.from_plain),
    WireTerms | None: _if_any(WireTerms.from_plain),
    Delivery: lambda plain: Delivery(_text(plain)),
    State: lambda plain: State(_text(plain)),
    Outcome: lambda plain: Outcome(_text(plain)),
    Intent: lambda plain: Intent(_text(plain)),
    Mapping[str, str]: _texts,
}
