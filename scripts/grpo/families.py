"""The model families that the demo can train; kept apart from what imports transformers, which takes seconds."""

FAMILIES = ("qwen3_moe", "glm4_moe")
