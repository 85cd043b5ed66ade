"""Checks before anything expensive."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kinema.config.schema import TrainingConfig
from kinema.errors import UserError
from kinema.training.preflight import check_shares


@dataclass
class Devices:
    """What is checked of a World."""

    dp_size: int


def check(devices, **training):
    check_shares(SimpleNamespace(training=TrainingConfig(steps=1, **training)), Devices(devices))


def test_every_device_has_a_sample():
    check(4, batch_size=4)
    check(4, batch_size=8, batch_sizes=[{"size": 4, "frames": 1}])
    check(4, batch_size="auto")
    check(4, token_budget=10)  # at least one on each
    with pytest.raises(UserError, match=r"training\.batch_size = 3 .* has 4: 1 of them .* multiple of 4"):
        check(4, batch_size=3)
    with pytest.raises(UserError, match=r"training\.batch_sizes\.1\.size = 2 .* 2 of them"):
        check(4, batch_size=8, batch_sizes=[{"size": 4, "frames": 1}, {"size": 2}])
    with pytest.raises(UserError, match=r"training\.batch_sizes\.0\.size"):
        check(4, batch_size="auto", batch_sizes=[{"size": 2}])
