"""How far a learner's log-probabilities are from the rollout's, with its own routing and with the rollout's replayed.

Our engine generates tokens with a Qwen3-MoE of random weights, once with its gate in fp32 (RL mode) and once with the
trainer's; transformers' model with the same weights scores them with its own gate, and those of the fp32 gate also with
our gate installed. Random weights route almost uniformly: the last expert that is chosen and the first one that is not
are often nearly tied, and rounding decides between them. A trained model's shares of differing decisions are other
ones; what compares is one row with another.

    python scripts/replay_gap.py --layers 8 --tokens 4096 --out results/replay_gap.json --commit "$(git rev-parse HEAD)"
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from gap.rollout import INIT_STD, SHAPES, Lengths, generate, hosted, random_model
from gap.scoring import Routing, gap
from transformers import PreTrainedModel

from rollout import Completion
from routing.installed_gate import install_gate

COLUMNS = {
    "logprob_abs_diff_mean": "mean",
    "logprob_abs_diff_p99": "p99",
    "logprob_abs_diff_max": "max",
    "kl_estimate": "KL",
    "own_decisions_differing_share": "decisions",
    "own_positions_differing_share": "tokens",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the model, all of them MoE")
    parser.add_argument("--tokens", type=int, default=4096, help="to generate with each gate, at least")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--answer-length", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of model and engine")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and sampling")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", required=True, help="what the checkout is at, for the file")
    args = parser.parse_args(arguments)
    for name in ("layers", "tokens", "prompt_length", "answer_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, must be at least 1")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON holds it."""
    started = time.perf_counter()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    lengths = Lengths(
        sequences=-(-args.tokens // args.answer_length), prompt=args.prompt_length, answer=args.answer_length
    )
    model = random_model(args.shape, layers=args.layers, dtype=dtype, device=device, seed=args.seed)
    by_trainer = generate(hosted(model, "trainer"), lengths, args.seed)
    by_fp32 = generate(hosted(model, "fp32"), lengths, args.seed)
    rows = gaps(model, by_trainer, rollout_gate="trainer", learner_gate="its own")
    rows += gaps(model, by_fp32, rollout_gate="fp32", learner_gate="its own")
    with install_gate(model):
        rows += gaps(model, by_fp32, rollout_gate="fp32", learner_gate="ours, fp32")
    on_gpu = device.type == "cuda"
    return {
        "what": "learner's log-probability gap with and without replay",
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": args.commit,
        "model": {**SHAPES[args.shape], "layers": args.layers, "dtype": args.dtype, "weights_std": INIT_STD},
        "learner": {
            "attention": model.config._attn_implementation,
            "experts": model.config._experts_implementation,
        },
        "lengths": {"sequences": lengths.sequences, "prompt": lengths.prompt, "answer": lengths.answer},
        "seed": args.seed,
        "note": "random weights route almost uniformly, so that near ties are frequent: compare rows, not shares",
        "rows": rows,
        "memory_peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "seconds": time.perf_counter() - started,
    }


def gaps(model: PreTrainedModel, completions: Sequence[Completion], **gates: str) -> list[dict[str, Any]]:
    """A row for every kind of routing."""
    return [{**gates, "routing": str(routing), **gap(model, completions, routing)} for routing in Routing]


def table(rows: list[dict[str, Any]]) -> str:
    """Lines for the terminal."""
    lines = [
        "|log-probability difference| of learner and rollout per sampled token, and the share of decisions, and of",
        "tokens in any layer, in which the learner by itself chooses other experts than the rollout did",
    ]
    lines += [
        f"{'rollout gate':14}{'learner gate':14}{'learner routing':26}"
        + "".join(f"{title:>11}" for title in COLUMNS.values())
    ]
    lines += [
        f"{row['rollout_gate']:14}{row['learner_gate']:14}{row['routing']:26}"
        + "".join(f"{row[name]:11.3g}" for name in COLUMNS)
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    found = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found["rows"]))
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
