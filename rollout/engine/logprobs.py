"""The log-probability of given tokens: one definition for sampling and for scoring. R rows, V vocabulary."""

import torch
from torch import Tensor


def chosen_logprobs(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """fp32 [R]: log softmax of each row at its token. Rows never look at each other."""
    return torch.log_softmax(logits_RV, dim=1).gather(1, token_R[:, None])[:, 0]
