"""The half that counts wrong bits: every router of the table, and code that nobody here wrote."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from routing import Platform, RouterSpec
from routing.orders import probe_orders
from routing_bench import bits, megatron_function, transformers_modules
from routing_bench.compilation import Job, Kind, jobs_of
from routing_bench.models import Logits, Model
from routing_bench.tally import Count

EAGER, OTHERWISE = "eager PyTorch", "strides, functions, counts"
"""Parts that are tried beside eager PyTorch: every model; and a few in other ways."""
CLOSELY = ("Qwen3-30B-A3B", "GLM-4.5,", "DeepSeek-V3")
"""Models that are also tried at odd strides, with functions, and with counts and padding."""
CLOSE_KINDS = (Kind.ODD_FEW, Kind.ODD_MANY, Kind.CHOSEN_MANY, Kind.PADDED)
MANY = (Kind.MANY,)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is tried."""

    sizes: list[int]
    """Tokens of the corpus's batches."""
    batches: int
    """Of random rows, per spec."""
    batch_tokens: int


@dataclass
class Findings:
    """Rows of the report, and everything counted."""

    total: Count = field(default_factory=Count)
    rows: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, count: Count, **row: object) -> None:
        """One row of a part."""
        self.total += count
        self.rows.setdefault(part, []).append({**row, **asdict(count)})

    def tokens(self, part: str) -> int:
        """Compared in that part."""
        return sum(int(str(row["tokens"])) for row in self.rows.get(part, []))


class Correctness:
    """Everything of this half.

    Args:
        models: the routers.
        device: where; on a CPU the reference stands for the kernel, and nothing is compiled.
        extent: how much.
        megatron: a folder with the package `megatron`, or None.
    """

    def __init__(self, models: Sequence[Model], device: torch.device, extent: Extent, megatron: Path | None) -> None:
        self._models, self._device, self._extent = models, device, extent
        self._platform: Platform = "cuda" if device.type == "cuda" else "cpu"
        self._megatron = None if megatron is None else megatron_function.routing_function(megatron)
        specs = [model.spec(Logits.FP32, self._platform) for model in models]
        # two slots add alike in every order
        self._order = probe_orders(max(specs, key=lambda spec: spec.top_k), device).sum_order

    @property
    def megatron_version(self) -> str | None:
        """Of the package."""
        return None if self._megatron is None else self._megatron[1]

    def jobs(self) -> Iterator[Job]:
        """The kernels that this half needs."""
        for model in self._models:
            for logits in Logits:
                yield from jobs_of(self._spec(model, logits))
            for dtype in transformers_modules.DTYPES.values():
                yield from jobs_of(self._here(transformers_modules.spec_of(model, dtype, self._platform)), MANY)
        for model in self._close():
            yield from jobs_of(self._spec(model, Logits.FP32), CLOSE_KINDS)
        for spec in self._megatron_specs().values():
            yield from jobs_of(spec, MANY)

    def run(self) -> Findings:
        """All of it."""
        findings = Findings()
        parts = {
            EAGER: self._eager,
            OTHERWISE: self._otherwise,
            "transformers": self._transformers,
            "Megatron-Core": self._megatron_function,
        }
        for name, part in parts.items():
            began = time.monotonic()
            part(findings)
            findings.seconds[name] = round(time.monotonic() - began, 1)
            print(f"{name}: {findings.tokens(name):,} tokens in {findings.seconds[name]} s", flush=True)
        return findings

    def _eager(self, findings: Findings) -> None:
        extent = self._extent
        for model in self._models:
            for logits in Logits:
                spec = self._spec(model, logits)
                found = bits.examine(
                    spec,
                    self._device,
                    sizes=extent.sizes,
                    batches=extent.batches,
                    batch_tokens=extent.batch_tokens,
                )
                findings.add(
                    EAGER,
                    found.count,
                    model=model.name,
                    logits=str(logits),
                    exact_share=found.exact_share,
                    spec=spec.digest,
                )

    def _otherwise(self, findings: Findings) -> None:
        tokens = self._extent.batch_tokens
        for model in self._close():
            spec = self._spec(model, Logits.FP32)
            counts = {
                "odd strides": bits.at_odd_strides(spec, self._device),
                "counts and padding": bits.counts_and_padding(spec, self._device, tokens=tokens),
                **{
                    f"reduce function: {name}": count
                    for name, count in bits.with_functions(spec, self._device, tokens=tokens).items()
                },
            }
            for name, count in counts.items():
                findings.add(OTHERWISE, count, model=model.name, what=name)

    def _transformers(self, findings: Findings) -> None:
        for model in self._models:
            for name, dtype in transformers_modules.DTYPES.items():
                count = transformers_modules.compared(
                    model, dtype, self._device, batches=2, tokens=self._extent.batch_tokens
                )
                router = model.row.source.rpartition(".")[2]
                findings.add("transformers", count, model=model.name, router=router, module_dtype=name)

    def _megatron_function(self, findings: Findings) -> None:
        if self._megatron is None:
            return
        function, _ = self._megatron
        for (model, setting), spec in self._megatron_specs().items():
            count = megatron_function.compared(
                function, spec, self._device, batches=2, tokens=self._extent.batch_tokens
            )
            findings.add("Megatron-Core", count, model=model, setting=setting)

    def _megatron_specs(self) -> Mapping[tuple[str, str], RouterSpec]:
        if self._megatron is None:
            return {}
        return {
            (model.name, setting): self._here(megatron_function.spec_of(model, setting, self._platform))
            for model in megatron_function.known(self._models)
            for setting in megatron_function.SETTINGS
        }

    def _close(self) -> list[Model]:
        return [model for model in self._models if model.name.startswith(CLOSELY)]

    def _spec(self, model: Model, logits: Logits) -> RouterSpec:
        return self._here(model.spec(logits, self._platform))

    def _here(self, spec: RouterSpec) -> RouterSpec:
        """With the order in which the PyTorch here adds."""
        return spec if self._platform == "cpu" or self._order is None else replace(spec, sum_order=self._order)
