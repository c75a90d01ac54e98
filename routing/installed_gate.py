"""Our gate inside a transformers model, so that learner and rollout compute the router's logits by one definition."""

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from routing.gate import gate_logits
from routing.terms import GateSpec

ROUTER_CLASS = re.compile(r"Router$|TopKGating$|MoE\w*Gate$")
"""How transformers, and code that comes with a checkpoint, names routers: Qwen3MoeTopKRouter, HunYuanMoEV1Gate."""


class InstalledGate:
    """What install_gate did; `remove`, or leaving it as a context, undoes it."""

    def __init__(self, gate: GateSpec, routers: dict[str, nn.Module]) -> None:
        self.gate = gate
        self._routers = routers

    @property
    def routers(self) -> tuple[str, ...]:
        """The names of the modules that compute our gate."""
        return tuple(self._routers)

    def remove(self) -> None:
        """Gives every router its own product back. Again: nothing happens."""
        for router in self._routers.values():
            plain = getattr(type(router), "plain_class", None)
            if plain is not None:
                router.__class__ = plain

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def install_gate(model: nn.Module, gate: GateSpec | None = None) -> InstalledGate:
    """Every router of a transformers model computes its logits with `routing.gate_logits`, in place.

    The rest of the router stays the model's own code. Forward: gate_logits, so the logits come in gate.output_dtype.
    Backward: a linear layer's gradients, in fp32, in the parameters' dtypes. Works under gradient checkpointing,
    autocast, no_grad and copy.deepcopy; torch.compile runs the routers eagerly.

    gate: None takes GateSpec(), RL mode's. ValueError if there is no router, if one of them cannot be taken, and if the
    gate has no bias where a router has one, or the other way about.
    """
    gate = GateSpec() if gate is None else gate
    routers = {name: module for name, module in model.named_modules() if _is_router(name, module)}
    if not routers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"install_gate: {type(model).__name__} has no router: no module's class is named like *Router, *TopKGating"
            f" or *MoE*Gate, and no linear layer is called router. Its classes: {', '.join(kinds)}"
        )
    faults = [f"{name}: {fault}" for name, router in routers.items() if (fault := _fault(router, gate)) is not None]
    if faults:
        raise ValueError(f"install_gate: {'; '.join(faults)}")
    classes: dict[tuple[type[nn.Module], torch.Size], type[nn.Module]] = {}
    for router in routers.values():
        (weight,) = _weights(router).values()
        key = type(router), weight.shape
        if key not in classes:
            classes[key] = _gated(*key, gate)
        router.__class__ = classes[key]
    return InstalledGate(gate, routers)


def _is_router(name: str, module: nn.Module) -> bool:
    is_plain_layer = isinstance(module, nn.Linear) and name.rpartition(".")[2] == "router"
    return is_plain_layer or ROUTER_CLASS.search(type(module).__name__) is not None


def _weights(router: nn.Module) -> dict[str, nn.Parameter]:
    """Its matrices; a correction bias may be [1, E]."""
    return {
        name: parameter
        for name, parameter in router.named_parameters()
        if parameter.ndim == 2 and parameter.shape[0] > 1
    }


def _fault(router: nn.Module, gate: GateSpec) -> str | None:
    """Why this router cannot be taken."""
    if hasattr(type(router), "plain_class"):
        return "has a gate installed already: remove that first"
    if "forward" in vars(router):
        return "its forward was replaced on the instance (by accelerate's hooks, say): install the gate before that"
    weights = _weights(router)
    if len(weights) != 1:
        return f"{type(router).__name__} has {len(weights)} matrices ({', '.join(weights)}), one [E, D] expected"
    owner = next(iter(weights)).rpartition(".")[0]
    has_bias = getattr(router.get_submodule(owner), "bias", None) is not None
    if has_bias != gate.has_bias:
        return f"its linear layer has {'a' if has_bias else 'no'} bias: use GateSpec(has_bias={has_bias})"
    return None


def _gated(plain: type[nn.Module], shape: torch.Size, gate: GateSpec) -> type[nn.Module]:
    """A subclass whose forward is the plain one's with its product by the weight of that shape replaced; state and
    name stay.

    A class, rather than a function set on the module: copies of the model carry it, and run on their own weights.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _ProductReplaced(shape, gate) as product:
            result = plain.forward(self, *args, **kwargs)
        if product.calls != 1:
            raise RuntimeError(
                f"{plain.__name__} multiplied by its weight {product.calls} times, once expected: our gate does not fit"
                f" this router; remove it (InstalledGate.remove)"
            )
        return result

    return type(
        plain.__name__,
        (plain,),
        {
            "forward": torch.compiler.disable(forward),  # type: ignore[no-untyped-call]
            "plain_class": plain,
            "__module__": plain.__module__,
            "__doc__": plain.__doc__,
        },
    )


class _ProductReplaced(TorchFunctionMode):
    """While active, torch.nn.functional.linear with a weight of that shape, converted or not, is our gate."""

    def __init__(self, shape: torch.Size, gate: GateSpec) -> None:
        super().__init__()
        self.calls = 0
        self._shape = shape
        self._gate = gate

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is linear:
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape != self._shape:
            return linear(input, weight, bias)
        self.calls += 1
        rows = input.reshape(-1, input.shape[-1])
        return gate_logits(rows, weight, self._gate, bias).view(*input.shape[:-1], weight.shape[0])
