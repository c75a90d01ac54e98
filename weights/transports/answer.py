"""What the two ends do with the bytes of a frame: the same on every transport."""

from torch import Tensor

from weights.codec import decode, encode
from weights.errors import MessageError
from weights.messages import Refused, Reply, Request
from weights.receiver import Receiver


def answer(receiver: Receiver, frame: bytes, segment: Tensor | None) -> tuple[bytes, bool]:
    """The frame of the reply, and whether the connection goes on: it ends after a frame that is no request of ours."""
    try:
        request = read_request(frame)
    except MessageError as error:
        return encode(unreadable(receiver, error)), False
    return encode(receiver.handle(request, segment)), True


def read_request(frame: bytes) -> Request:
    """MessageError for anything but a request."""
    message = decode(frame)
    if not isinstance(message, Request):
        raise MessageError(f"a host answers requests, got {type(message).__name__}")
    return message


def unreadable(receiver: Receiver, error: MessageError) -> Refused:
    """The reply to what could not be read."""
    reason = f"could not read a message, and ends the connection: {error}"
    return Refused(sequence=0, update="", state=receiver.state, reason=reason)


def read_reply(frame: bytes) -> Reply:
    """MessageError for anything but a reply."""
    message = decode(frame)
    if not isinstance(message, Reply):
        raise MessageError(f"a publisher hears replies, got {type(message).__name__}")
    return message
