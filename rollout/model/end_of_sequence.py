"""Which tokens end a sequence, as the checkpoint says."""

from pathlib import Path

from rollout.model.checkpoint import CheckpointError, read_json_object

KEY = "eos_token_id"


def end_of_sequence_ids(folder: Path | str) -> frozenset[int]:
    """eos_token_id of generation_config.json, or of config.json where that says nothing; empty where neither does.

    Raises:
        CheckpointError: a file is no JSON object, or says something else than an id, a list of ids or null.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        said = read_json_object(path).get(KEY)
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        wrong = [token for token in ids if not _is_token_id(token)]
        if wrong:
            raise CheckpointError(
                f"{path}: {KEY}={said!r}: expected a token id of at least 0, a list of them or null; "
                f"not one: {', '.join(map(repr, wrong))}"
            )
        return frozenset(ids)
    return frozenset()


def _is_token_id(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0
