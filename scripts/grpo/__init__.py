"""The demo's pieces: a task, a tiny checkpoint, a GRPO learner, and what is shown of them.

scripts/train_grpo.py puts them together.
"""
