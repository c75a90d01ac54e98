"""Runs token sequences through a Decoder in steps of any shape, over a cache that shows every wrong read."""

import random
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rollout.model.batch import ForwardBatch, KvCache
from rollout.model.decoder import Decoder, ForwardOutput
from rollout.model.hosted import HostedModel


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a model says of one sequence."""

    logits_TV: Tensor
    expert_ids_TLK: Tensor | None
    expert_weights_TLK: Tensor | None


class Paged:
    """Runs sequences over a cache that starts full of NaN, its blocks dealt out at random; with a Decoder of its own
    unless one is given."""

    def __init__(
        self,
        model: HostedModel,
        sequences: list[list[int]],
        *,
        block_size: int,
        seed: int,
        decoder: Decoder | None = None,
    ) -> None:
        self._decoder = Decoder(model.spec, model.parameters) if decoder is None else decoder
        self._sequences = sequences
        self._block_size = block_size
        counts = [-(-len(sequence) // block_size) for sequence in sequences]
        blocks = list(range(sum(counts) + 2))
        random.Random(seed).shuffle(blocks)
        self._tables = [blocks[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
        self.done = [0] * len(sequences)
        self._kv: KvCache = model.kv_cache(blocks=len(blocks), block_size=block_size)
        self._kv.keys.fill_(float("nan"))
        self._kv.values.fill_(float("nan"))
        self._outputs: list[list[Forward]] = [[] for _ in sequences]

    @property
    def unfinished(self) -> list[int]:
        """Sequences with tokens left."""
        return [i for i, sequence in enumerate(self._sequences) if self.done[i] < len(sequence)]

    def forward(self, lengths: dict[int, int], *, logit_rows: list[int], record_routing: bool) -> ForwardOutput:
        """Runs the next `lengths[i]` tokens of sequence i, all in one batch."""
        tokens, positions, slots = [], [], []
        for i, length in lengths.items():
            for position in range(self.done[i], self.done[i] + length):
                tokens.append(self._sequences[i][position])
                positions.append(position)
                block = self._tables[i][position // self._block_size]
                slots.append(block * self._block_size + position % self._block_size)
            self.done[i] += length
        widest = max(len(self._tables[i]) for i in lengths)
        batch = ForwardBatch(
            token_ids_T=torch.tensor(tokens),
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_lengths=tuple(lengths.values()),
            context_lengths=tuple(self.done[i] for i in lengths),
            block_tables_SB=torch.tensor([self._tables[i] + [0] * (widest - len(self._tables[i])) for i in lengths]),
            logit_rows_R=torch.tensor(logit_rows),
        )
        return self._decoder.forward(batch, self._kv, record_routing=record_routing)

    def step(self, lengths: dict[int, int]) -> None:
        """The same, with all logits and experts kept for `results`."""
        out = self.forward(lengths, logit_rows=list(range(sum(lengths.values()))), record_routing=True)
        start = 0
        for i, length in lengths.items():
            rows = slice(start, start + length)
            start += length
            self._outputs[i].append(
                Forward(
                    logits_TV=out.logits_RV[rows],
                    expert_ids_TLK=None if out.expert_ids_TLK is None else out.expert_ids_TLK[rows],
                    expert_weights_TLK=None if out.expert_weights_TLK is None else out.expert_weights_TLK[rows],
                )
            )

    def results(self) -> list[Forward]:
        """Per sequence, over all steps."""
        return [
            Forward(
                logits_TV=torch.cat([out.logits_TV for out in outs]),
                expert_ids_TLK=_cat([out.expert_ids_TLK for out in outs]),
                expert_weights_TLK=_cat([out.expert_weights_TLK for out in outs]),
            )
            for outs in self._outputs
        ]


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts))
    return torch.cat(present) if present else None


def run_at_once(model: HostedModel, sequences: list[list[int]]) -> list[Forward]:
    """Every sequence whole, in one step, blocks of 4."""
    paged = Paged(model, sequences, block_size=4, seed=0)
    paged.step({i: len(sequence) for i, sequence in enumerate(sequences)})
    return paged.results()


def run_in_chunks(
    model: HostedModel, sequences: list[list[int]], seed: int, decoder: Decoder | None = None
) -> list[Forward]:
    """Random sequences in every step, most of them with one token, some with more; random block size and tables."""
    dice = random.Random(seed)
    paged = Paged(model, sequences, block_size=dice.randint(1, 5), seed=seed, decoder=decoder)
    while unfinished := paged.unfinished:
        chosen = dice.sample(unfinished, dice.randint(1, len(unfinished)))
        left = {i: len(sequences[i]) - paged.done[i] for i in chosen}
        paged.step({i: min(left[i], dice.choice([1, 1, 1, 2, 3, 7])) for i in chosen})
    return paged.results()
