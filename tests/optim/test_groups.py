"""Groups by pattern, LoRA+, and what the optimiser's table refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kinema.config.optimizer import OptimizerConfig
from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.optim.groups import check_groups
from kinema.optim.optimizers import build_optimizers

NAMES = (
    "network.blocks.0.attn1.to_q.weight",
    "network.blocks.0.attn1.to_q.bias",
    "network.blocks.1.ffn.net.0.proj.weight",
    "network.proj_out.weight",
    "text_encoder.layers.0.mlp.weight",
)


def weights(names: tuple[str, ...] = NAMES) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(4, *([4] if not name.endswith("bias") else []))) for name in names}


def settings_of(parameters: dict[str, torch.nn.Parameter], config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """(peak learning rate, weight decay) of each parameter, from the optimisers' groups."""
    found = {}
    for optimizer in build_optimizers(parameters, {NAMES[0]}, config):
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                assert parameters[name] is parameter
                found[name] = group["peak_lr"], group["weight_decay"]
    return found


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon", "automagic", "lion", "torch.SGD"])
def test_the_first_pattern_that_is_found_counts(kind: str) -> None:
    config = OptimizerConfig(
        type=kind, lr=1e-4, weight_decay=0.05, part_lr={"text_encoder": 2e-4},
        groups=({"pattern": r"attn1\.to_q", "lr": 3e-4}, {"pattern": "^network", "weight_decay": 0.5},
                {"pattern": "ffn", "lr": 9e-4}),
    )  # fmt: skip
    assert settings_of(weights(), config) == {
        NAMES[0]: (3e-4, 0.05), NAMES[1]: (3e-4, 0.0), NAMES[2]: (1e-4, 0.5), NAMES[3]: (1e-4, 0.5),
        NAMES[4]: (2e-4, 0.05),
    }  # fmt: skip


def test_lora_plus() -> None:
    names = tuple(f"{part}.x.lora_{factor}.default.weight" for part in ("network", "text_encoder") for factor in "AB")
    config = OptimizerConfig(lora_plus=16, part_lr={"text_encoder": 1e-5})
    rates = [lr for lr, _ in settings_of(weights(names), config).values()]
    assert rates == pytest.approx([1e-4, 16e-4, 1e-5, 16e-5])
    grouped = OptimizerConfig(lora_plus=16, groups=({"pattern": r"network.*lora_B\.weight", "lr": 7e-4},))
    assert settings_of(weights(names), grouped)[names[1]][0] == 7e-4


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ("attn1.to_k",),
            r"optimizer.groups.0.pattern = 'attn1.to_k' is found in none of the 5 weights that train; near",
        ),
        (("blocks", "ffn"), r"optimizer.groups.1.pattern = 'ffn': the groups before it take all that it finds"),
        (("zzzz",), "some are network.blocks.0.attn1.to_q.weight"),
    ],
)
def test_groups_that_match_nothing(groups: tuple[str, ...], message: str) -> None:
    config = OptimizerConfig(groups=tuple({"pattern": pattern, "lr": 1e-3} for pattern in groups))
    with pytest.raises(ConfigError, match=message):
        check_groups(config, NAMES)


def test_a_part_that_does_not_train() -> None:
    with pytest.raises(ConfigError, match=r"part_lr\.text_encoder_2: .*network and text_encoder do"):
        check_groups(OptimizerConfig(part_lr={"text_encoder_2": 1e-3}), NAMES)


def whole(**tables: Any) -> Config:
    needed = {"model": {"family": "wan"}, "data": {"sources": [{"path": "x"}]}, "training": {"steps": 1}}
    return Config.model_validate(needed | tables)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"optimizer": {"type": "lion", "eps": 1e-6}}, 'type = "lion" has no such setting'),
        ({"optimizer": {"matrix_lr": 1e-3}}, 'type = "adamw" has no such setting'),
        ({"optimizer": {"type": "torch.SGD", "betas": [0.9, 0.9]}}, "go into options"),
        ({"optimizer": {"type": "adafactor", "rounding": "kahan"}}, 'type = "adafactor" has no such setting'),
        ({"optimizer": {"groups": [{"pattern": "(", "lr": 1}]}}, "no regular expression"),
        ({"optimizer": {"groups": [{"pattern": "a"}]}}, "gives neither"),
        ({"optimizer": {"type": "automagic", "lr": 1e-2}}, "outside of 1e-07 to 0.001"),
        ({"optimizer": {"lora_plus": 16}}, r"this run has no \[adapter\]"),
        ({"optimizer": {"lora_plus": 16}, "adapter": {"type": "lokr"}}, 'an adapter of type "lokr"'),
        ({"optimizer": {"type": "schedulefree"}, "training": {"steps": 1, "ema": {}}}, "average of its own"),
        ({"optimizer": {"beta2_half_life": 9}, "training": {"steps": 1, "batch_size": "auto"}}, "differ in size"),
        ({"optimizer": {"beta2_half_life": 9, "betas": [0.9, 0.5]}}, "second of betas, which is 0.5"),
    ],
)
def test_contradictions(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        whole(**tables)


def test_what_follows_from_other_tables() -> None:
    assert whole(optimizer={"type": "prodigy"}).optimizer.lr == 1.0
    assert whole(optimizer={"type": "prodigy", "lr": 0.5}).optimizer.lr == 0.5
    config = whole(optimizer={"beta2_half_life": 1000}, training={"steps": 1, "batch_size": 10})
    assert config.optimizer.betas[1] ** 100 == pytest.approx(0.5)  # 1000 samples are 100 steps
    written = {"beta2_half_life": 1000, "betas": config.optimizer.betas}  # as the resolved configuration has it
    again = whole(optimizer=written, training={"steps": 1, "batch_size": 10})
    assert again.optimizer.betas == config.optimizer.betas
