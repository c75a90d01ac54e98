"""Every legal fault of a message: the hosts agree on one whole version, and the next update succeeds."""

import pytest
from ordeal.messages import strike_message
from ordeal.table import MESSAGE_CELLS, PROCESS_CELLS, MessageCell

from weights.transports.faults import Fault


@pytest.mark.parametrize(
    "cell", MESSAGE_CELLS, ids=lambda c: f"{c.kind} {c.message}{' reply' if c.reply else ''}".replace(" ", "_")
)
def test_a_fault_of_a_message_leaves_one_whole_version(cell: MessageCell) -> None:
    assert strike_message(cell).cell is cell


def test_the_table_holds_legal_cells_once_each() -> None:
    for cell in MESSAGE_CELLS:
        Fault(kind=cell.kind, host="a", message=cell.message, reply=cell.reply)  # ValueError for an illegal one
    assert len(set(MESSAGE_CELLS)) == len(MESSAGE_CELLS) == 69
    assert len(set(PROCESS_CELLS)) == len(PROCESS_CELLS) == 49
