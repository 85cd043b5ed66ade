import pytest
import torch
from lora_network import tiny_network


@pytest.fixture(params=[False, True], ids=["t2v", "i2v"])
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny_network(image=request.param)
