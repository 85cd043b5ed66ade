"""Several parts train together, each at its own learning rate: the run from its start to its exports, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import final_state, finish, start_training
from safetensors.torch import load_file

from kinema.families.registry import family_class, open_family

PARTS = ("network", "text_encoder", "text_encoder_2")
CONFIG = """
[run]
dir = "{root}/{name}"
threads = 1
seed = 3

[model]
family = "sdxl"
path = "{root}/model"
train = ["network", "text_encoder", "text_encoder_2"]

[data]
sources = [{{ path = "{root}/pictures" }}]
cache = "{root}/cache"
buckets = {{ sizes = [[64, 64]], frames = [1] }}

[training]
steps = {steps}
batch_size = 2
precision = "fp32"
caption_dropout = 0.3
ema = {{ decay = 0.9 }}

[optimizer]
lr = 1e-3
weight_decay = 0.0
part_lr = {{ text_encoder = 1e-4, text_encoder_2 = 1e-5 }}

[preview]
prompts = ["a red ball"]
steps = 2
guidance = 2.0
every_steps = 2

[checkpoint]
every_steps = 2

[export]
dtype = "fp32"

[monitoring]
tensorboard = false
"""
ADAPTER = "[adapter]\nrank = 2\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    family_class("sdxl").tiny(root / "model", "base-eps", seed=1)
    (root / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for i, caption in enumerate(("a red ball", "the blue box", "green and red", "a ball under the box")):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(caption)
    return root


def run(root: Path, name: str, extra: str = "", steps: int = 4) -> tuple[Path, str]:
    file = root / f"{name}.toml"
    file.write_text(CONFIG.format(root=root, name=name, steps=steps) + extra)
    return root / name, finish(start_training(file))


def of_part(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith(f"networks.{part}.")}


@pytest.mark.slow
def test_adapters_of_three_parts(root: Path) -> None:
    """All of them move, at their own pace; the text is in no cache; a resumed run ends with the same bits; previews and
    samples show what was trained."""
    directory, printed = run(root, "adapters", ADAPTER)
    assert "Encoding latents" in printed and "text_encoder" not in printed
    state = final_state(directory)
    for part, rate in zip(PARTS, (1e-3, 1e-4, 1e-5), strict=True):
        unread = f"{part}.encoder.layers.2."  # CLIP-L is read before its last layer
        found = {name: value for name, value in of_part(state, part).items() if "lora_B" in name}
        moved = [value.abs().max() for name, value in found.items() if unread not in name]
        assert moved and all(0 < float(one) < 4.5 * rate for one in moved), part  # four steps of Adam from zero
        assert max(map(float, moved)) > rate
        assert any(name.startswith(f"optimizer.{part}.") for name in state)
        assert any(name.startswith(f"ema.{part}.") for name in state)
    previews = sorted((directory / "previews").glob("*/*.png"))
    assert len({preview.read_bytes() for preview in previews}) == 3  # before the first step, after two, after four

    shutil.copytree(directory, root / "unbroken")
    for kept in ("checkpoints/step-00000004", "exports/step-00000004"):
        shutil.rmtree(directory / kept)
    _, printed = run(root, "adapters", ADAPTER)
    assert "Resuming from" in printed
    again = final_state(directory)
    assert again.keys() == state.keys()
    assert [name for name, value in again.items() if not torch.equal(value, state[name])] == []

    export = directory / "exports" / "step-00000004"
    names = [*load_file(next((export / "diffusers").glob("*.safetensors")))]
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder", "text_encoder_2"}
    sampled_as_in_the_preview(directory, previews[-1])


def sampled_as_in_the_preview(directory: Path, preview: Path) -> None:
    """The export, read back and merged into all three parts, draws the last preview (both are of the averages)."""
    from kinema.sampling.pipeline import sample_many
    from kinema.sampling.weights import find_weights, load_parts
    from kinema.sampling.writing import to_uint8
    from kinema.training.previews import preview_settings

    found = find_weights(directory, None, family=None, variant=None, adapters=(), ema=None)
    assert found.config is not None
    parts = load_parts(found, "cpu", torch.float32)
    pipeline = found.family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    (settings,) = preview_settings(found.config, found.family)
    pixels = next(sample_many(found.family, pipeline, [settings]))
    ours = to_uint8(pixels)
    theirs = torch.from_numpy(np.asarray(Image.open(preview)).copy())
    ours = torch.as_tensor(np.asarray(ours)).reshape(theirs.shape) if ours.ndim == 4 else torch.as_tensor(ours)
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.slow
def test_three_parts_train_whole(root: Path) -> None:
    """Every weight that an output depends on moves; exports are read by transformers, diffusers and us."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    directory, _ = run(root, "whole", steps=2)
    state = final_state(directory)
    base: Any = open_family_at(root)
    unread = ("text_projection", "position_embedding", "token_embedding")
    for part in PARTS:
        before = base.load(part, "cpu", torch.float32).state_dict()
        trained = {name.removeprefix(f"networks.{part}."): value for name, value in of_part(state, part).items()}
        assert trained.keys() == before.keys()
        still = [name for name, value in trained.items() if torch.equal(value, before[name])]
        # The last layer but one is what is read of CLIP-L; CLIP-G pools from its last.
        expected = [
            name for name in still if part == "text_encoder" and name.startswith(("encoder.layers.2.", "final"))
        ]
        assert still == expected, part
        assert part != "text_encoder" or expected
        assert not any(name.startswith(unread) for name in still)
    export = directory / "exports" / "step-00000002"
    averaged = {name.removeprefix("ema."): value for name, value in state.items() if name.startswith("ema.")}
    classes = (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection)
    for part, kind in zip(PARTS, classes, strict=True):
        theirs = kind.from_pretrained(export / "diffusers" / base.folder(part)).state_dict()
        single = next(file for file in (export / "comfyui").iterdir() if file.stem.endswith(f"step2{ending(part)}"))
        ours = open_family_at(root, **{part: {"path": str(single)}}).load(part, "cpu", None).state_dict()
        for name, value in theirs.items():
            assert torch.equal(value, averaged[f"{part}.{name}"]), (part, name)
            assert torch.equal(ours[name], value), (part, name)


def ending(part: str) -> str:
    return "" if part == "network" else f"-{part}"


def open_family_at(root: Path, **model: Any) -> Any:
    from kinema.config.schema import ModelConfig

    return open_family(ModelConfig.model_validate({"family": "sdxl", "path": str(root / "model"), **model}))
