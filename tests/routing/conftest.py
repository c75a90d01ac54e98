"""Fixtures of the routing tests."""

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests marked gpu."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
