"""A process that owns device memory and lets others open it: `python -m fakes.memory_owner DEVICE`, spoken to in lines
of JSON."""

import gc
import json
import sys
from typing import Any

import torch

from weights.cuda_driver import DeviceBuffer, allocation_of, export
from weights.errors import TransportError


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main(index: int) -> None:
    device = torch.device("cuda", index)
    tensors: dict[str, torch.Tensor] = {}
    buffers: dict[str, DeviceBuffer] = {}
    say(event="ready")
    for line in sys.stdin:
        command = json.loads(line)
        name = command["name"]
        if command["do"] == "tensor":
            tensors[name] = torch.full((command["size"],), command["fill"], dtype=torch.uint8, device=device)
        elif command["do"] == "buffer":
            buffers[name] = DeviceBuffer(command["size"], device)
            tensors[name] = buffers[name].data
            tensors[name].fill_(command["fill"])
        elif command["do"] == "fill":
            tensors[name].fill_(command["fill"])
        elif command["do"] == "free":
            del tensors[name]
            if name in buffers:
                buffers.pop(name).close()
            gc.collect()
            torch.cuda.empty_cache()
            say(event="freed")
            continue
        torch.cuda.synchronize(device)
        found = allocation_of(tensors[name].data_ptr(), index)
        try:
            handle = export(found)
        except TransportError as error:
            say(event="refused", text=str(error))
            continue
        offset = tensors[name].data_ptr() - found.address
        say(event="shared", handle=handle, bytes=found.bytes, identity=found.identity, offset=offset)


if __name__ == "__main__":
    main(int(sys.argv[1]))
