"""What every test shares."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs are those of the test, whichever tests came before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
