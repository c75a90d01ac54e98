"""A learner in a process of its own, as CUDA's handles need it: publishes a checkpoint's tensors, and ends."""

import sys

import torch
from transformers import AutoModelForCausalLM

from weights.publisher import Publisher


def publish(fleet: str, folder: str, step: int) -> None:
    """Publishes a model that stays on the GPU, as its trainer has it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to("cuda")
    with Publisher.connect(fleet, run="learner") as publisher:
        report = publisher.publish(model, step=step)
    torch.cuda.synchronize()
    print(report.version.digest.hex)


if __name__ == "__main__":
    publish(sys.argv[1], sys.argv[2], int(sys.argv[3]))
