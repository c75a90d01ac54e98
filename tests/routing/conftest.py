"""Fixtures of the routing tests."""

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests marked gpu; without one they are not collected."""
    return torch.device("cuda")
