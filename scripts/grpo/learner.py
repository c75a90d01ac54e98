"""The learner: transformers' own model, one optimizer step per batch, weights published after each.

Runs as a process of its own (python -m grpo.learner) that knows the fleet only by name: it imports neither Ray nor the
rollout package.

S samples, M tokens of a prompt and its completion, N = M - 1 positions that are fed, C completion tokens, V vocabulary.
"""

import argparse
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.agreement import Agreement, Replayed, compare, gaps
from grpo.batch import Batch
from grpo.checkpoint import write_checkpoint
from grpo.families import FAMILIES
from grpo.messages import Failed, Published, Ready, Trained
from grpo.objective import advantages, objective
from grpo.routers import recorded_routing
from routing import RoutingRecord, replay
from weights import Publisher

SILENCE_S = 600.0  # without a batch for so long the trainer is not coming back


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Found by trying: both families pass 0.9 in 60 updates with every seed tried."""

    learning_rate: float = 6e-3
    learning_rate_floor: float = 6e-4
    decay_updates: int = 70
    """The learning rate falls in a straight line that would reach 0 here, and stops at its floor."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.4
    """Wide: half of the tokens come from the weights before, and a step of this size moves ratios that far."""
    max_staleness: int = 2
    grad_norm: float = 1.0


class Learner:
    """A model and its optimizer.

    Args:
        model: a transformers model in fp32; trained in place.
        replays: whether it trains on the experts that the hosts chose, instead of its own.
    """

    def __init__(self, model: PreTrainedModel, hyperparameters: Hyperparameters, *, replays: bool = False) -> None:
        self.model = model
        self.hyperparameters = hyperparameters
        self.replays = replays
        self.updates = 0
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=hyperparameters.learning_rate, betas=hyperparameters.betas, weight_decay=0.0
        )

    def step(self, batch: Batch) -> Trained:
        """One GRPO step; compares the hosts' account of the batch with its own on the way."""
        started = time.perf_counter()
        with torch.set_grad_enabled(not self.replays):
            logprobs_SC, agreement = self._by_itself(batch)
        replayed = None
        if self.replays:
            logprobs_SC, replayed = self._replayed(batch)
        outcome = objective(
            logprobs_SC,
            torch.from_numpy(batch.logprobs_SC),
            advantages(torch.from_numpy(batch.rewards_S), batch.samples),
            self.updates - torch.from_numpy(batch.updates_SC),
            clip=self.hyperparameters.clip,
            max_staleness=self.hyperparameters.max_staleness,
        )
        self._descend(outcome.loss)
        self.updates += 1
        return Trained(
            update=self.updates,
            agreement=agreement,
            staleness=outcome.staleness,
            masked_tokens=outcome.masked_tokens,
            seconds=time.perf_counter() - started,
            replayed=replayed,
        )

    def _by_itself(self, batch: Batch) -> tuple[Tensor, Agreement]:
        """Log-probabilities [S, C] with its own routing, and how both compare with the hosts'."""
        with recorded_routing(self.model) as routing:
            logprobs_SC = self._logprobs(batch)
        return logprobs_SC, compare(
            logprobs_SC,
            torch.from_numpy(batch.model_logprobs_SC),
            routing,
            torch.from_numpy(batch.expert_ids_SNLK),
            self._of_present_weights(batch),
        )

    def _replayed(self, batch: Batch) -> tuple[Tensor, Replayed]:
        """Log-probabilities [S, C] with the hosts' experts."""
        token_ids_SN = torch.from_numpy(batch.token_ids_SM[:, :-1])
        record = RoutingRecord(
            expert_ids_BSLK=torch.from_numpy(batch.expert_ids_SNLK),
            recorded_BS=torch.ones_like(token_ids_SN, dtype=torch.bool),
            token_ids_BS=token_ids_SN,
        )
        with replay(self.model, record) as replaying:
            logprobs_SC = self._logprobs(batch)
        diffs = gaps(logprobs_SC, torch.from_numpy(batch.model_logprobs_SC))[self._of_present_weights(batch)]
        report = replaying.report()
        return logprobs_SC, Replayed(
            decisions=report.decisions,
            differing=report.differing,
            tokens=diffs.numel(),
            logprob_abs_diff_max=float(diffs.max()) if diffs.numel() else 0.0,
        )

    def _logprobs(self, batch: Batch) -> Tensor:
        """Of the sampled tokens, under the present weights."""
        token_ids_SM = torch.from_numpy(batch.token_ids_SM)
        logits_SMV = self.model(input_ids=token_ids_SM[:, :-1], use_cache=False).logits
        logprobs_SCV = logits_SMV[:, batch.prompt_tokens - 1 :].log_softmax(dim=-1)
        logprobs_SC1: Tensor = logprobs_SCV.gather(2, token_ids_SM[:, batch.prompt_tokens :].unsqueeze(-1))
        return logprobs_SC1.squeeze(-1)

    def _of_present_weights(self, batch: Batch) -> Tensor:
        """bool [S]: every token and every key and value came from the weights that the learner holds now."""
        tokens_SC, kv_SN = torch.from_numpy(batch.updates_SC), torch.from_numpy(batch.kv_updates_SN)
        return (tokens_SC == self.updates).all(dim=1) & (kv_SN == self.updates).all(dim=1)

    def _descend(self, loss: Tensor) -> None:
        h = self.hyperparameters
        for group in self._optimizer.param_groups:
            group["lr"] = max(h.learning_rate * (1 - self.updates / h.decay_updates), h.learning_rate_floor)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), h.grad_norm)
        self._optimizer.step()


def serve(pipe: Connection, family: str, checkpoint: Path, seed: int, *, replays: bool) -> None:
    """Writes the checkpoint and loads it, connects to the fleet that the trainer names, then trains and publishes.

    Raises:
        EOFError: the trainer closed its end.
        TimeoutError: no word from the trainer for SILENCE_S.
    """
    write_checkpoint(family, checkpoint, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    learner = Learner(model, Hyperparameters(), replays=replays)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pipe.send(Ready(parameters=parameters, replays=learner.replays))
    publisher = Publisher.connect(_next(pipe))
    while True:
        trained = learner.step(_next(pipe))
        pipe.send(trained)
        report = publisher.publish(model, step=trained.update)
        pipe.send(
            Published(
                update=trained.update,
                version=report.version,
                seconds=report.seconds,
                pause_s=tuple(host.pause_s for host in report.hosts.values()),
            )
        )


def _next(pipe: Connection) -> Any:
    if not pipe.poll(SILENCE_S):
        raise TimeoutError(f"waited {SILENCE_S:g} s for the trainer's next message")
    return pipe.recv()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="grpo.learner", description="The demo's learner; scripts/train_grpo.py starts it."
    )
    parser.add_argument("--pipe", type=int, required=True, help="file descriptor of the pipe to the trainer")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to write the tiny checkpoint to")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--replay", action="store_true", help="train on the experts that the hosts chose")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Connection(args.pipe)
    try:
        serve(pipe, args.family, args.checkpoint, args.seed, replays=args.replay)
    except EOFError:
        return 0
    except Exception:  # the process's edge: the trainer shall hear why
        traceback.print_exc()
        pipe.send(Failed(text=traceback.format_exc()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
