"""Names for the content of full KV blocks: the weight version, and every token up to the block's end.

Keys chain (each hashes the one before), so two blocks share a key only if the whole prefix and the version are the
same.
"""

import hashlib
from array import array
from collections.abc import Sequence

from weights.version import WeightVersion


def root_key(version: WeightVersion) -> bytes:
    """The key of the empty prefix."""
    return _hashed(f"{version.run}@{version.step}:{version.digest.hex}".encode())


def next_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of the block that holds `token_ids` after the prefix `parent`."""
    return _hashed(parent + array("q", token_ids).tobytes())


def _hashed(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
