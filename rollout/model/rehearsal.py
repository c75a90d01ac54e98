"""One token through a hosted model before anything is served, so that whatever cannot be computed here is refused now.

What a process or a device cannot do shows only when it is tried: products of another precision than the gate's, a
dtype that a device has no kernel for, a reduce function that breaks its contract.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rollout.model.batch import ForwardBatch, KvCache
from rollout.model.decoder import Decoder
from rollout.model.spec import DecoderSpec
from routing.parity import ParityRefused

_OURS = ("rollout.model.", "routing.")


def rehearse(spec: DecoderSpec, parameters: Mapping[str, Tensor], kv: KvCache) -> None:
    """Runs token 0 at position 0 in block 0 and throws the results away.

    Outside of inference mode, where a reduce function that writes to its argument shows.

    Args:
        spec: the model.
        parameters: loaded.
        kv: a scratch cache of one block.

    Raises:
        ValueError: an operation raised; it is named, and its error is the cause.
    """
    device = kv.keys.device
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        token_ids_T=zero,
        positions_T=zero,
        slots_T=zero,
        query_lengths=(1,),
        context_lengths=(1,),
        block_tables_SB=zero[:, None],
        logit_rows_R=zero,
    )
    with naming_what_fails(device), torch.no_grad():
        Decoder(spec, parameters).forward(batch, kv, record_routing=True)


@contextmanager
def naming_what_fails(device: torch.device) -> Iterator[None]:
    """Turns what is raised inside into a ValueError that names our operation. A ParityRefused names its own."""
    try:
        yield
    except ParityRefused:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"this model cannot run on {device}: {_operation(error)}: {error}") from error


def _operation(error: BaseException) -> str:
    """The innermost of our public functions in which it was raised: routing.gate.gate_logits."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [f"{frame.f_globals['__name__']}.{frame.f_code.co_name}" for frame in frames]
    ours = [name for name in names if name.startswith(_OURS) and not name.rpartition(".")[2].startswith("_")]
    return ours[-1]
