"""Devices as parameters: one body of a test for the CPU, which always runs, and for a GPU, which needs one."""

import pytest
import torch
from transformers import PreTrainedModel

ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
"""Runs a test that takes `device`, a string for `torch.device`, on the CPU, and marked `cuda` on a GPU."""


def on(device: str | torch.device, model: PreTrainedModel) -> PreTrainedModel:
    """`model`, moved to `device`."""
    # Not `model.to`: transformers wraps it so that no argument but a model has the right type.
    torch.nn.Module.to(model, device)
    return model
