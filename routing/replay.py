"""Replay: a learner's model sends its tokens to the experts that the rollout sent them to.

The model's own routers compute scores and combine weights with their own operations, and with gradient; only which
experts are chosen comes from the record, in the record's slot order. A record is consumed by one forward of the model,
every MoE layer once, or an error says what was not.

B rows of the batch, S positions, T = B * S, K slots of a token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

from routing.choice import ChoiceReplaced
from routing.comparison import Comparison, ReplayReport
from routing.model_routers import ROUTERS, ModelRouter, RouterClass, model_routers
from routing.record import RoutingRecord, spelled_out

_REPLAYS = "routing_replays"


@contextmanager
def replay(
    model: nn.Module,
    record: RoutingRecord,
    *,
    weights: Literal["own", "recorded"] = "own",
    recompute: bool = False,
    extra_routers: Mapping[str, RouterClass] | None = None,
) -> Iterator["Replay"]:
    """Inside the block, one forward of `model` uses the record's experts.

    Args:
        model: the module that the caller calls, eager; its routers are found by class name.
        record: of the batch that the forward will get.
        weights: "own": the model's combine weights for the record's experts, with gradient. "recorded": the record's,
            without; the routers then learn nothing.
        recompute: the model recomputes its layers in the backward pass (gradient checkpointing), which gets the same
            record once more; backward() must be called inside the block then.
        extra_routers: rows for router classes that are not in ROUTERS, by class name.

    Yields:
        The replay; its `report()` is there once the forward has run.

    Raises:
        ValueError: on entry, the record does not fit the model, or holds an id that a layer does not have; in the
            forward, the batch is not the record's, or a layer is visited again; at the end of the block, the record was
            not consumed.
    """
    known = {**ROUTERS, **(extra_routers or {})}
    with _replaying(Replay(model, record, known, replaces=True, weights=weights, recompute=recompute)) as replaying:
        yield replaying


@contextmanager
def observe(
    model: nn.Module,
    record: RoutingRecord,
    *,
    recompute: bool = False,
    extra_routers: Mapping[str, RouterClass] | None = None,
) -> Iterator["Replay"]:
    """As `replay`, but the model routes as it would: only compares."""
    known = {**ROUTERS, **(extra_routers or {})}
    with _replaying(Replay(model, record, known, replaces=False, weights="own", recompute=recompute)) as replaying:
        yield replaying


@contextmanager
def _replaying(replaying: "Replay") -> Iterator["Replay"]:
    replaying.install()
    try:
        yield replaying
    finally:
        replaying.remove()
    replaying.check_consumed()


class Replay:
    """One record on its way through one forward; made by `replay` and `observe`."""

    def __init__(
        self,
        model: nn.Module,
        record: RoutingRecord,
        known: Mapping[str, RouterClass],
        *,
        replaces: bool,
        weights: Literal["own", "recorded"],
        recompute: bool,
    ) -> None:
        self._model = model
        self._record = record
        self._routers = model_routers(model, known)
        self._replaces = replaces
        self._weights = weights
        self._recompute = recompute
        self._complete = bool(record.recorded_BS.all())
        self._visits = [0] * len(self._routers)
        self._recomputed = [0] * len(self._routers)
        self._forwards = 0
        self._running = False
        self._with_grad = False
        self._undo: list[Callable[[], object]] = []
        self._comparison = Comparison(record, replaced=replaces)
        faults = [*self._misfits()]
        if faults:
            raise ValueError(f"replay: the record does not fit {type(model).__name__}: {'; '.join(faults)}")

    def report(self) -> ReplayReport:
        """Of the forward. ValueError before every layer has been visited."""
        missing = self._unvisited()
        if missing:
            raise ValueError(f"replay: no report yet, not visited: {spelled_out(missing, len(missing))}")
        return self._comparison.report()

    def install(self) -> None:
        """Puts itself between the model and its routers."""
        self._undo += [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True).remove,
            self._model.register_forward_hook(self._end, always_call=True).remove,
        ]
        for layer, router in enumerate(self._routers):
            self._undo.append(self._wrap(layer, router))

    def remove(self) -> None:
        """Leaves the model as it was."""
        while self._undo:
            self._undo.pop()()

    def check_consumed(self) -> None:
        """ValueError unless the record was used up."""
        if not self._forwards:
            raise ValueError(
                f"replay: {type(self._model).__name__} was not run inside the block, its record is unused; pass the"
                " module that you call"
            )
        missing = self._unvisited()
        if missing:
            raise ValueError(f"replay: never visited in the forward: {spelled_out(missing, len(missing))}")
        if self._recompute and self._with_grad and not any(self._recomputed):
            raise ValueError(
                "replay: recompute=True, but no layer was recomputed inside the block; call backward() inside it, or"
                " leave recompute out where nothing is checkpointed"
            )

    def _misfits(self) -> Iterator[str]:
        record, routers = self._record, self._routers
        layers, slots = record.expert_ids_BSLK.shape[2:]
        taken = [router.name for router in routers if hasattr(getattr(router.module, router.row.method), _REPLAYS)]
        if taken:
            yield f"it is inside another block already ({spelled_out(taken, len(taken))})"
        compiled = [name or "the model" for name, module in self._model.named_modules() if _is_compiled(module)]
        if compiled:
            yield f"it is compiled ({spelled_out(compiled, len(compiled))}), and replay works on eager modules"
        if self._weights == "recorded" and record.weights_BSLK is None:
            yield "weights='recorded', but it holds no weights"
        if layers != len(routers):
            names = spelled_out((router.name for router in routers), len(routers))
            yield f"it has {layers} MoE layers, the model {len(routers)} ({names})"
        others = [f"{router.name} {router.top_k}" for router in routers if router.top_k != slots]
        if others:
            yield f"it has {slots} experts per token, the model: {spelled_out(others, len(others))}"
        for layer, router in enumerate(routers[:layers]):
            ids_BSK = record.expert_ids_BSLK[:, :, layer].long()
            beyond = ((ids_BSK >= router.num_experts).any(dim=-1) & record.recorded_BS).nonzero().tolist()
            if beyond:
                cells = (f"{record.name(b)} position {s}: {ids_BSK[b, s].tolist()}" for b, s in beyond)
                yield f"{router.name} has {router.num_experts} experts; beyond: {spelled_out(cells, len(beyond))}"

    def _unvisited(self) -> list[str]:
        return [router.name for router, visits in zip(self._routers, self._visits, strict=True) if not visits]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward."""
        if self._forwards:
            raise ValueError(
                f"replay: a second forward of {type(model).__name__} in one block; a record is for one forward, open a"
                " block for each"
            )
        if torch.is_grad_enabled() and not self._recompute:
            checkpointed = [name or "the model" for name, module in model.named_modules() if _is_checkpointed(module)]
            if checkpointed:
                raise ValueError(
                    f"replay: gradient checkpointing is on ({spelled_out(checkpointed, len(checkpointed))}), and its"
                    " recomputation would route by itself; pass recompute=True and call backward() inside the block"
                )
        self._check_inputs(kwargs.get("input_ids", args[0] if args else None))
        self._forwards += 1
        self._running = True
        self._with_grad = torch.is_grad_enabled()

    def _end(self, _model: nn.Module, _args: object, _output: object) -> None:
        self._running = False

    def _check_inputs(self, input_ids_BS: object) -> None:
        record = self._record
        if not isinstance(input_ids_BS, Tensor) or input_ids_BS.is_floating_point():
            return  # embeddings: the routers will see how many there are
        if input_ids_BS.shape != record.recorded_BS.shape:
            raise ValueError(
                f"replay: input_ids of shape {list(input_ids_BS.shape)}, the record is of a batch"
                f" {list(record.recorded_BS.shape)}"
            )
        if record.token_ids_BS is not None:
            other_BS = (input_ids_BS != record.token_ids_BS.to(input_ids_BS.device)) & record.recorded_BS.to(
                input_ids_BS.device
            )
            rows = other_BS.any(dim=1).nonzero().flatten().tolist()
            if rows:
                names = spelled_out(map(record.name, rows), len(rows))
                raise ValueError(f"replay: input_ids hold other tokens than the record in {names}")

    def _wrap(self, layer: int, router: ModelRouter) -> Callable[[], None]:
        """Puts a wrapper around the method that routes; returns what takes it away."""
        module, method, row = router.module, router.row.method, router.row
        own = getattr(module, method)

        @wraps(own)
        def routed(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            first = self._visit(layer)
            with ChoiceReplaced(router.num_experts, router.top_k, partial(self._decided, layer)) as choice:
                output: tuple[Any, ...] = own(*args, **kwargs)
            if len(choice.chosen) != 1 or output[row.expert_ids] is not choice.chosen[0]:
                raise ValueError(
                    f"replay: {router.name} ({type(module).__name__}) has to take the ids that it returns from one"
                    f" torch.topk of {router.top_k} out of {router.num_experts}; it called {len(choice.chosen)} such"
                )
            if first:
                self._comparison.add(layer, choice.own[0], choice.chosen[0], output[row.weights])
            return self._with_weights(layer, row, output)

        setattr(routed, _REPLAYS, True)
        before = module.__dict__.get(method)
        setattr(module, method, routed)
        return lambda: delattr(module, method) if before is None else setattr(module, method, before)

    def _visit(self, layer: int) -> bool:
        """Counts a visit; whether it is the forward's, and no recomputation's. ValueError for one too many."""
        name = self._routers[layer].name
        if torch._C._current_graph_task_id() != -1:
            if not self._recompute:
                raise ValueError(
                    f"replay: {name} is recomputed in a backward pass (gradient checkpointing); pass recompute=True"
                )
            if self._recomputed[layer]:
                raise ValueError(f"replay: {name} is recomputed a second time; a record is for one backward pass")
            self._recomputed[layer] += 1
            return False
        if not self._running:
            raise ValueError(
                f"replay: {name} is visited outside of a forward of {type(self._model).__name__}; pass the module that"
                " you call"
            )
        if self._visits[layer]:
            raise ValueError(f"replay: {name} is visited a second time in one forward; its record is consumed")
        self._visits[layer] += 1
        return True

    def _decided(self, layer: int, own_TK: Tensor) -> Tensor:
        """[T, K] int64: the record's ids, and the router's own where there is no record, or nothing is to change."""
        record, device = self._record, own_TK.device
        if len(own_TK) != record.recorded_BS.numel():
            raise ValueError(
                f"replay: {self._routers[layer].name} routes {len(own_TK)} tokens, the record is of a batch"
                f" {list(record.recorded_BS.shape)}"
            )
        if not self._replaces:
            return own_TK
        ids_TK = record.layer_ids(layer, device)
        return ids_TK if self._complete else torch.where(record.recorded_BS.to(device).view(-1, 1), ids_TK, own_TK)

    def _with_weights(self, layer: int, row: RouterClass, output: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._weights == "own":
            return output
        record, own_TK = self._record, output[row.weights]
        weights_TK = record.layer_weights(layer, own_TK.device)
        assert weights_TK is not None, "checked on entry"
        recorded_T1 = record.recorded_BS.to(own_TK.device).view(-1, 1)
        mixed_TK = torch.where(recorded_T1, weights_TK.to(own_TK.dtype), own_TK)
        return tuple(mixed_TK if place == row.weights else part for place, part in enumerate(output))


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _is_checkpointed(module: nn.Module) -> bool:
    """By transformers' switch, or by PyTorch's wrapper."""
    switched = getattr(module, "gradient_checkpointing", False) is True and module.training
    return switched or type(module).__name__ == "CheckpointWrapper"
