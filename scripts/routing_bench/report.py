"""JSON that people read too: what fits in a line stands in one."""

import json

WIDTH = 180


def text(value: object, indent: int = 0) -> str:
    """`value` as JSON, nested lines indented by one more blank each."""
    line = json.dumps(value)
    if len(line) + indent <= WIDTH or not isinstance(value, dict | list):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(name))}: {text(part, indent + 1)}" for name, part in value.items()]
    else:
        parts = [text(part, indent + 1) for part in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    inner = ",\n".join(" " * (indent + 1) + part for part in parts)
    return f"{opening}\n{inner}\n{' ' * indent}{closing}"
