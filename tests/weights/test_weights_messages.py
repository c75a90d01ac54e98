"""Messages: what is sent is what arrives, and what is no message is a MessageError."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from fakes.weights_fleet import offer_of
from hypothesis import given
from hypothesis import strategies as st

from weights.catalogue import TensorSpec
from weights.codec import HEADER_BYTES, MAX_BODY_BYTES, body_bytes, decode, decode_body, encode
from weights.delivery import Delivery
from weights.digest import Digest
from weights.errors import MessageError
from weights.lease import Lease, Memory, SlotTerms, WireTerms
from weights.manifest import Manifest
from weights.messages import (
    KINDS,
    PROTOCOL,
    Abort,
    Aborted,
    Answer,
    Ask,
    Begun,
    Commit,
    Committed,
    Deliver,
    Delivered,
    Finish,
    Hello,
    Join,
    Joined,
    Message,
    Offered,
    Refused,
    Stage,
    Staged,
    Vote,
    Voted,
    Welcome,
)
from weights.state import Intent, Outcome, State
from weights.version import WeightVersion

D = Digest(1, 2)
V = WeightVersion(run="r", step=3, digest=D)
MANIFEST = Manifest.of(
    [
        (TensorSpec(name="model.norm.weight", shape=(4,), dtype=torch.bfloat16), D),
        (TensorSpec(name="gewicht.é", shape=(), dtype=torch.float32), Digest(3, 4)),
    ]
)
MEMORY = Memory("ab" * 64, "7", 4096)
LEASE = Lease(MANIFEST.catalogue.id, (MEMORY,), ((0, 0), (0, 256)))
SLOTS = SlotTerms("s", (MEMORY, MEMORY))
WIRE = WireTerms("w", "127.0.0.1", 4321, "gloo", ("a", "b"), 4096)
WELCOME = Welcome(
    sequence=1,
    protocol=PROTOCOL,
    host="a",
    state=State.IDLE,
    version=V,
    layout="x",
    tied={"b": "c"},
    catalogue="",
    lease="",
    way="",
)
EVERY_MESSAGE: tuple[Message, ...] = (
    Hello(sequence=1, protocol=PROTOCOL, publisher="learner"),
    Join(sequence=1, wire=None, slots=SLOTS),
    Join(sequence=1, wire=WIRE, slots=None),
    offer_of(MANIFEST),
    replace(offer_of(Manifest.of([]), base=D, delivery=Delivery.STREAM), tensors=None),
    Stage(sequence=3, update="u", bucket=0),
    Stage(sequence=3, update="u", bucket=0, lease=LEASE.id, terms=LEASE),
    Vote(sequence=4, update="u"),
    Commit(sequence=5, update="u"),
    Deliver(sequence=5, update="u", bucket=7),
    Finish(sequence=5, update="u"),
    Abort(sequence=6, update="u", reason="because"),
    Ask(sequence=7, update="u", asker="a", intent=Intent.HOLD),
    WELCOME,
    replace(WELCOME, state=State.TORN, version=None, tied={}, catalogue="c", lease="l", way="w"),
    Joined(sequence=1, way="w"),
    Offered(sequence=2, update="u", stages=3, content=D),
    Staged(sequence=3, update="u", bucket=0),
    Voted(sequence=4, update="u", digest=D),
    Begun(sequence=5, update="u"),
    Delivered(sequence=5, update="u", bucket=7),
    Committed(sequence=5, update="u", version=V, pause_s=0.25, copy_s=0.0, verify_s=1e-9),
    Aborted(sequence=6, update="u", state=State.IDLE, version=None),
    Answer(sequence=7, update="u", host="b", outcome=Outcome.VOTED),
    Refused(sequence=0, update="", state=State.OFFERED, reason="no\n  and why"),
)


def framed(body: bytes) -> bytes:
    return b"MoRW" + len(body).to_bytes(8, "big") + hashlib.blake2b(body, digest_size=16).digest() + body


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    frame = encode(message)
    assert decode(frame) == message
    assert body_bytes(frame[:HEADER_BYTES]) == len(frame) - HEADER_BYTES
    assert frame == framed(frame[HEADER_BYTES:])


def test_every_kind_of_message_was_tried() -> None:
    assert {type(message) for message in EVERY_MESSAGE} == set(KINDS.values())


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_a_frame_that_was_cut_anywhere_is_no_message(message: Message) -> None:
    frame = encode(message)
    for length in range(len(frame)):
        with pytest.raises(MessageError):
            decode(frame[:length])
    with pytest.raises(MessageError):
        decode(frame + b" ")


@given(message=st.sampled_from(EVERY_MESSAGE), data=st.data())
def test_a_frame_with_any_bit_flipped_is_no_message(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(MessageError):
        decode(bytes(frame))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(data: bytes) -> None:
    for read in (decode, decode_body, lambda body: decode(framed(body))):
        try:
            message = read(data)
        except MessageError:
            continue
        assert decode(encode(message)) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["idle", "u", D.hex]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_any_content_of_any_kind_is_a_message_or_a_message_error(kind: str, data: st.DataObject) -> None:
    sample = next(message for message in EVERY_MESSAGE if type(message).__name__ == kind)
    plain = json.loads(encode(sample)[HEADER_BYTES:])
    for field in data.draw(st.sets(st.sampled_from(sorted(plain)), min_size=1)):
        plain[field] = data.draw(JSON)
    try:
        message = decode_body(json.dumps(plain).encode())
    except MessageError:
        return
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"kind":"Vote","sequence":' + b"9" * 5000 + b',"update":"u"}',
        b'{"kind":"Vote","sequence":NaN,"update":"u"}',
        b'{"kind":"Vote","sequence":Infinity,"update":"u"}',
        b'{"kind":"Vote","sequence":-1,"update":"u"}',
        b'{"kind":"Vote","sequence":true,"update":"u"}',
        b'{"kind":"Vote","sequence":1,"update":"\\ud800"}',
        b'{"kind":"Vote","sequence":1}',
        b'{"kind":"Vote","sequence":1,"update":"u","more":1}',
        b'{"kind":"Message","sequence":1}',
        b'{"kind":["Vote"]}',
        b"\xff\xfe",
        b"null",
        b"",
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_hostile_bodies_are_message_errors(body: bytes) -> None:
    with pytest.raises(MessageError):
        decode(framed(body))


@pytest.mark.parametrize("seconds", ["1e400", "-1", "true", "null", "9" * 400, '"1"'])
def test_seconds_are_finite_and_not_negative(seconds: str) -> None:
    sample = next(message for message in EVERY_MESSAGE if isinstance(message, Committed))
    body = encode(sample)[HEADER_BYTES:].replace(b'"pause_s":0.25', b'"pause_s":' + seconds.encode())
    with pytest.raises(MessageError):
        decode_body(body)


def test_a_length_beyond_the_limit_is_refused_before_anything_is_read() -> None:
    header = b"MoRW" + (MAX_BODY_BYTES + 1).to_bytes(8, "big") + bytes(16)
    with pytest.raises(MessageError, match="at most"):
        body_bytes(header)


def test_another_program_s_bytes_are_named_as_such() -> None:
    with pytest.raises(MessageError, match="not a publisher or host"):
        decode(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
