"""The engine: step() = schedule, forward, sample, append.

It belongs to one thread at a time (the host sees to that) and knows nothing of clients, Ray or weight updates; the
version
that it stamps is what the host says is in its parameters.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rollout.config import EngineConfig
from rollout.engine.blocks import BlockPool
from rollout.engine.counts import Counts
from rollout.engine.logprobs import chosen_logprobs
from rollout.engine.noise import sample_seed
from rollout.engine.sampler import sample
from rollout.engine.scheduler import ScheduledRows, Scheduler
from rollout.engine.sequence import Purpose, Sequence, validate_fits
from rollout.model.batch import ForwardBatch
from rollout.model.decoder import Decoder, ForwardOutput
from rollout.model.hosted import HostedModel
from rollout.model.spec import DecoderSpec, MoeSpec
from rollout.request import AtCommit, FinishReason
from weights.version import WeightVersion


class Engine:
    """Continuous batching over one decoder.

    Args:
        model: its parameters never move, and change only between steps.
        decoder: runs the model.
        config: what may run at once.
        eos_token_ids: the checkpoint's end-of-sequence tokens.
        version: what the parameters hold.
        at_commit: what becomes of sequences that do not say.
    """

    def __init__(
        self,
        model: HostedModel,
        decoder: Decoder,
        config: EngineConfig,
        *,
        eos_token_ids: frozenset[int],
        version: WeightVersion,
        at_commit: AtCommit = "keep",
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.config = config
        self.version = version
        self.at_commit = at_commit
        self.counts = Counts()
        self.eos_token_ids = eos_token_ids
        self.kv = model.kv_cache(blocks=config.blocks, block_size=config.block_size)
        self.device = self.kv.keys.device
        self.expert_id_dtype = smallest_unsigned(model.spec)
        self.scheduler = Scheduler(
            BlockPool(config.blocks),
            max_running=config.max_running,
            prefill_chunk=config.prefill_chunk,
            block_size=config.block_size,
            prefix_cache=config.prefix_cache,
            copy_block=self.kv.copy_block,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would run anything."""
        return self.scheduler.has_work(self.version)

    def validate(self, sequence: Sequence) -> None:
        """Reads nothing that changes, so any thread may ask.

        Raises:
            ValueError: the sequence can never run here: too long, or tokens outside the vocabulary.
        """
        spec = self.model.spec
        validate_fits(sequence, self.config, context_length=spec.context_length, vocab_size=spec.vocab_size)

    def add(self, *sequences: Sequence) -> None:
        """Queues sequences that `validate` has seen."""
        self.scheduler.waiting.extend(sequences)

    def cancel(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Ends every chosen sequence where it stands and returns them."""
        gone = self.scheduler.withdraw(chosen)
        for sequence in gone:
            self.end(sequence, FinishReason.ABORT)
        return gone

    def commit(self, version: WeightVersion) -> list[Sequence]:
        """The parameters now hold `version`; returns the sequences that this ended.

        A sequence that has begun keeps its keys and values, rebuilds them or ends, as it or the configuration says; one
        that has lived through too many commits ends, and so does one that waits for a run that is over; scores begin
        again.
        """
        before, self.version = self.version, version
        self.scheduler.new_version()
        begun = [s for s in (*self.scheduler.running, *self.scheduler.waiting) if s.computed or s.sampled]
        ended: dict[Sequence, FinishReason] = {}
        for sequence in self.scheduler.waiting:
            least = sequence.params.min_version
            if least is not None and least.run == before.run != version.run:
                ended[sequence] = FinishReason.STALE  # no later step of that run will ever come
        for sequence in begun:
            sequence.commits += 1
            policy = sequence.params.at_commit or self.at_commit
            limit = sequence.params.max_staleness
            if sequence.purpose is Purpose.SCORE:
                self.scheduler.rebuild(sequence)
            elif policy == "abort":
                ended[sequence] = FinishReason.ABORT
            elif limit is not None and sequence.commits > limit:
                ended[sequence] = FinishReason.STALE
            elif policy == "recompute" and sequence.computed:
                self.scheduler.rebuild(sequence)
        gone = self.scheduler.withdraw(lambda sequence: sequence in ended)
        for sequence in gone:
            self.end(sequence, ended[sequence])
        return gone

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Runs every running sequence on by one token or one chunk of its prompt; returns those that finished."""
        scheduled = self.scheduler.schedule(self.version)
        run = [entry for entry in scheduled if entry.rows]
        logits_V: dict[Sequence, Tensor] = {}
        finished: list[Sequence] = []
        if run:
            recording = any(entry.sequence.params.record_routing for entry in run)
            output = self.decoder.forward(self.batch(run), self.kv, record_routing=recording)
            self.record(run, output)
            finished += self.advance(run, output.logits_RV, logits_V)
        for entry in scheduled:
            if entry.sequence.first_logits_V is not None:
                logits_V[entry.sequence] = entry.sequence.first_logits_V
                entry.sequence.first_logits_V = None
        finished += self.sample([entry.sequence for entry in scheduled if entry.sequence in logits_V], logits_V)
        for sequence in finished:
            self.scheduler.finish(sequence)
        return finished

    def batch(self, scheduled: list[ScheduledRows]) -> ForwardBatch:
        """The rows of a step as tensors."""
        block_size = self.config.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        for entry in scheduled:
            sequence = entry.sequence
            span = range(sequence.computed, sequence.computed + entry.rows)
            first_row = len(tokens)
            tokens += sequence.token_ids[span.start : span.stop]
            positions += span
            slots += [sequence.blocks[p // block_size] * block_size + p % block_size for p in span]
            if sequence.purpose is Purpose.SCORE:  # every row but the last predicts a token that was given
                logit_rows += [first_row + row for row, p in enumerate(span) if p + 1 < len(sequence.token_ids)]
            elif span.stop == len(sequence.token_ids):
                logit_rows.append(len(tokens) - 1)
        contexts = tuple(entry.sequence.computed + entry.rows for entry in scheduled)
        columns = -(-max(contexts) // block_size)
        tables = [(entry.sequence.blocks + [0] * columns)[:columns] for entry in scheduled]
        return ForwardBatch(
            token_ids_T=self.int64(tokens),
            positions_T=self.int64(positions),
            slots_T=self.int64(slots),
            query_lengths=tuple(entry.rows for entry in scheduled),
            context_lengths=contexts,
            block_tables_SB=self.int64(tables),
            logit_rows_R=self.int64(logit_rows),
        )

    def record(self, scheduled: list[ScheduledRows], output: ForwardOutput) -> None:
        """Stamps the keys and values just written, and keeps the experts for those who asked."""
        first_row = 0
        ids_TLK = weights_TLK = None
        if output.expert_ids_TLK is not None and output.expert_weights_TLK is not None:
            ids_TLK = output.expert_ids_TLK.cpu().numpy().astype(self.expert_id_dtype)
            weights_TLK = output.expert_weights_TLK.to(torch.float32).cpu().numpy()
        for entry in scheduled:
            rows = slice(first_row, first_row + entry.rows)
            first_row += entry.rows
            if entry.sequence.params.record_routing and ids_TLK is not None and weights_TLK is not None:
                entry.sequence.record(np.ascontiguousarray(ids_TLK[rows]), np.ascontiguousarray(weights_TLK[rows]))

    def advance(self, run: list[ScheduledRows], logits_RV: Tensor, logits_V: dict[Sequence, Tensor]) -> list[Sequence]:
        """Takes in the rows that were run: scores get their log-probabilities, and `logits_V` the row of every sequence
        that a token is to be drawn for. Returns the scores that are complete.
        """
        scored = []
        row = 0
        for entry in run:
            sequence, start = entry.sequence, entry.sequence.computed
            sequence.advance(entry.rows, self.version)
            self.scheduler.remember(sequence, self.version)
            if sequence.purpose is Purpose.SCORE:
                targets = sequence.token_ids[start + 1 : start + entry.rows + 1]
                logprobs = chosen_logprobs(logits_RV[row : row + len(targets)], self.int64(targets))
                row += len(targets)
                sequence.model_logprobs += logprobs.tolist()
                if sequence.uncomputed == 0:
                    self.end(sequence, FinishReason.LENGTH)
                    scored.append(sequence)
            elif sequence.uncomputed == 0:
                logits_V[sequence] = logits_RV[row]
                row += 1
                if not sequence.sampled:
                    self.counts.prompt_tokens += len(sequence.prompt.token_ids)
                    self.scheduler.prompt_read(sequence, logits_V[sequence], self.version)
        return scored

    def sample(self, sequences: list[Sequence], logits_V: dict[Sequence, Tensor]) -> list[Sequence]:
        """Appends one token to each of these sequences; returns the finished ones."""
        if not sequences:
            return []
        outcomes = sample(
            torch.stack([logits_V[sequence] for sequence in sequences]),
            [sequence.params for sequence in sequences],
            [sample_seed(seed_of(sequence), sequence.key[2]) for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
        )
        finished = []
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            if outcome is None:
                reason: FinishReason | None = FinishReason.NOT_A_NUMBER
            else:
                sequence.append(outcome, self.version)
                self.counts.tokens_by_version[self.version] += 1
                reason = self.finish_reason(sequence)
            if reason is not None:
                self.end(sequence, reason)
                finished.append(sequence)
        return finished

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence is done; the scheduler's part is its caller's."""
        sequence.finish_reason = reason
        if sequence.purpose is Purpose.GENERATE:
            self.counts.finished[reason] += 1

    def finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Whether the token just sampled ends the sequence."""
        params, token = sequence.params, sequence.token_ids[-1]
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.sampled >= params.max_tokens else None

    def int64(self, values: list[int] | list[list[int]]) -> Tensor:
        """A list as int64 on the model's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def seed_of(sequence: Sequence) -> int:
    """The seed that the host drew or the caller gave."""
    assert sequence.params.seed is not None, "unseeded"
    return sequence.params.seed


def smallest_unsigned(spec: DecoderSpec) -> type[np.unsignedinteger]:
    """The smallest unsigned dtype that holds every expert id of a model."""
    experts = max((layer.mlp.router.num_experts for layer in spec.layers if isinstance(layer.mlp, MoeSpec)), default=1)
    return np.uint8 if experts <= 1 << 8 else np.uint16
