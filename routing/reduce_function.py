"""The trainer's own normalisation as a Python function, where no ReduceKind describes it.

The contract is FastDeploy's `topk_reduce_func`: routing chooses the experts and hands the function their raw scores [T,
K], in the slot order and in the chain dtype of the spec; the function returns the denominator, [T, 1] or [T, K], and

    weights = scores / function(scores)

by eager PyTorch's division. A function that yields the weights themselves says so with `@returns_weights`; it is never
guessed from a shape, because for K = 1 both look alike. The scale comes after it in every case. dtypes follow PyTorch's
promotion (an fp64 denominator gives an fp64 chain from there on), and the spec's weight dtype is applied last.

A function must be a pure function of each row, must not write to its argument, and must work on an empty batch.

T tokens, K slots of a token.
"""

import functools
import hashlib
import importlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

ReduceFunction = Callable[[Tensor], Tensor]
F = TypeVar("F", bound=ReduceFunction)

_RETURNS_WEIGHTS = "routing_returns_weights"
_PROBE_SLOTS = (1, 2, 4, 6, 8)


def returns_weights(function: F) -> F:
    """Marks a reduce function whose result is the combine weights, not their denominator."""
    setattr(function, _RETURNS_WEIGHTS, True)
    return function


def normalise(scores_TK: Tensor, function: ReduceFunction) -> Tensor:
    """[T, K] unscaled combine weights, in the promoted dtype. ValueError if the function breaks the contract."""
    before = None if scores_TK.is_inference() else scores_TK._version
    result = function(scores_TK)
    yields_weights = getattr(function, _RETURNS_WEIGHTS, False)
    T, K = scores_TK.shape
    shapes = [(T, K)] if yields_weights else [(T, 1), (T, K)]
    faults = []
    if not isinstance(result, Tensor):
        faults.append(f"returned {type(result).__name__}, expected a tensor")
    else:
        if tuple(result.shape) not in shapes:
            faults.append(f"returned shape {tuple(result.shape)}, expected {' or '.join(map(str, shapes))}")
        if not result.is_floating_point():
            faults.append(f"returned {result.dtype}, expected a floating-point dtype")
        if result.device != scores_TK.device:
            faults.append(f"returned a tensor on {result.device}, expected {scores_TK.device}")
    if before is not None and scores_TK._version != before:
        faults.append("wrote to its argument, expected a pure function")
    if faults:
        raise ValueError(f"reduce function {_name(function)}: {'; '.join(faults)}")
    return result if yields_weights else scores_TK / result


@functools.cache
def resolve(path: str) -> ReduceFunction:
    """The function that `package.module:function` names; imports the module. ValueError says which part is missing."""
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"reduce function {path!r}: package.module:function expected")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reduce function {path!r}: {error}; is its folder on PYTHONPATH?") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        state = "does not exist" if function is None else "is not callable"
        raise ValueError(f"reduce function {path!r}: {attribute} {state} in {module_name}")
    found: ReduceFunction = function
    return found


def identify(path: str) -> str:
    """`probe_digest` of the function at `package.module:function`."""
    return probe_digest(resolve(path))


def probe_digest(function: ReduceFunction) -> str:
    """128 bits, in hex, over the weights that a function gives on fixed probe rows on the CPU.

    The rows are multiples of 2^-7 whose sums are exact in any order, so the digest tells formulas apart and is the same
    on every machine; a zero row and a row of 1e-13 show the epsilon. It says nothing about the order of a sum.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for K in _PROBE_SLOTS:
        for dtype in (torch.float32, torch.bfloat16):
            weights_TK = normalise(_probe_rows(K, dtype), function)
            hashed.update(f"{K} {dtype} {weights_TK.dtype} {tuple(weights_TK.shape)};".encode())
            canonical = torch.where(weights_TK.isnan(), torch.nan, weights_TK.double())
            hashed.update(canonical.contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _probe_rows(K: int, dtype: torch.dtype) -> Tensor:
    slots = torch.arange(K)
    rows = [(slots * 37 + row * 11) % 101 + 1 for row in range(5)]
    probe = torch.stack(rows).double() / 128
    specials = torch.stack([torch.zeros(K), torch.full((K,), 2.0**-43), torch.full((K,), 2.0**-70)]).double()
    return torch.cat([probe, specials]).to(dtype)


def _name(function: ReduceFunction) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
