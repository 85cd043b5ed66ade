"""What of the optimiser's table is refused before anything is loaded, for a model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import TINY

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.registry import open_family
from kinema.parallel.mesh import Sizes
from kinema.shapes.models import write_model
from kinema.training.networks import check_networks
from kinema.training.optimizer_checks import check_optimizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checks") / "model"
    write_model(path, **TINY)
    return path


def check(model: Path, tables: dict[str, Any], sizes: Sizes | None = None) -> None:
    needed = {"model": {"family": "wan", "path": str(model), "text_length": 32}}
    needed |= {"data": {"sources": [{"path": "x"}]}, "training": {"steps": 1}}
    config = Config.model_validate(needed | {name: needed.get(name, {}) | table for name, table in tables.items()})
    family = open_family(config.model)
    check_optimizer(config, family, sizes or Sizes(), check_networks(config, family))


LORA = {"adapter": {"rank": 2}}
BF16 = {"model": {"network": {"dtype": "bf16"}}}
TO_Q = {"pattern": r"attn1\.to_q", "lr": 1e-3}


@pytest.mark.parametrize(
    "tables",
    [
        {"optimizer": {"groups": [TO_Q]}},
        LORA | {"optimizer": {"groups": [TO_Q, {"pattern": r"lora_B\.weight$", "lr": 1e-2}], "lora_plus": 16}},
        {"optimizer": {"rounding": "kahan"}} | BF16,
        {"optimizer": {"rounding": "stochastic"}, "adapter": {"rank": 2, "dtype": "bf16"}},
        LORA | {"optimizer": {"type": "torch.Muon"}},  # an adapter is of matrices alone
        {"optimizer": {"type": "prodigy"}},
    ],
)
def test_these_can_start(model: Path, tables: dict[str, Any]) -> None:
    check(model, tables)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"optimizer": {"groups": [{"pattern": "atn1", "lr": 1}]}}, r"groups\.0\.pattern = 'atn1' .*near are .*attn1"),
        ({"optimizer": {"part_lr": {"text_encoder": 1e-5}}}, r"part_lr\.text_encoder: .*network does"),
        ({"optimizer": {"rounding": "kahan"}}, r'stored in fp32.*model\.network\.dtype = "bf16"'),
        (LORA | BF16 | {"optimizer": {"rounding": "kahan"}}, r'stored in fp32.*adapter\.dtype = "bf16"'),
        ({"optimizer": {"type": "torch.Muon"}}, r'"torch\.Muon"'),
        ({"optimizer": {"type": "prodigy", "groups": [TO_Q]}}, "finds one learning rate"),
    ],
)
def test_these_are_refused(model: Path, tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(model, tables)


def test_a_plan_that_cuts_rows(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tp = 2, which cuts rows"):
        check(model, {"optimizer": {"type": "adamw8bit"}}, Sizes(tp=2))
