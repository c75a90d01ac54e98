"""Which tokens end a sequence, as the checkpoint says."""

import json
from pathlib import Path


def end_of_sequence_ids(folder: Path | str) -> frozenset[int]:
    """eos_token_id of generation_config.json, or of config.json where that says nothing; empty where neither does.

    Raises:
        ValueError: a file is no JSON object, or says something else than an id, a list of ids or null.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        said = config.get("eos_token_id") if isinstance(config, dict) else "no object"
        ids = said if isinstance(said, list) else [said]
        if said is not None:
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
                raise ValueError(f"{path}: eos_token_id is {said!r}, expected a token id, a list of them or null")
            return frozenset(ids)
    return frozenset()
