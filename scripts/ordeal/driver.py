"""A trainer that launches a fleet of its own on a Ray of its own: `python -m ordeal.driver WORKSPACE NAME`.

Says "up" with the processes of its hosts, then answers {"do": "status"} and {"do": "generate"}; ends with its input.
"""

import json
import os
import sys
from pathlib import Path

from ordeal.arena import arena_config
from rollout import Fleet, Prompt, SamplingParams


def say(**event: object) -> None:
    os.write(1, (json.dumps(event) + "\n").encode())


def described(fleet: Fleet) -> dict[str, object]:
    status = fleet.status()
    return {
        "processes": [host.process for host in status.hosts],
        "versions": [str(host.version) for host in status.hosts],
        "incidents": [incident.what for incident in status.incidents],
    }


def main(workspace: str, name: str) -> None:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    with Fleet.launch(arena_config(Path(workspace), name, hosts=2)) as fleet:
        say(event="up", **described(fleet))
        streams = []
        for line in sys.stdin:
            if json.loads(line)["do"] == "generate":
                prompts = [Prompt(id=str(index), token_ids=(1, 2, index % 8)) for index in range(400)]
                streams.append(fleet.generate(prompts, SamplingParams(n=4, max_tokens=55, ignore_eos=True)))
                next(streams[-1])
            say(event="done", **described(fleet))


if __name__ == "__main__":
    main(*sys.argv[1:])
