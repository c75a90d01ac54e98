"""replay_gap.py's pieces: a model with random weights, tokens that our engine generates with it, the learner's odds."""
