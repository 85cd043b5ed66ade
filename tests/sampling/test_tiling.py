"""Autoencoders in tiles: the setting reaches every class that has them, and is refused, before loading, elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.latents import is_picture_autoencoder
from kinema.families.registry import family_class, open_family
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.tiling import check_tiling, set_tiles, tiles
from kinema.sampling.writing import read_metadata

SPACE = [
    # pixels of one latent, latents of the smallest tile that its overlap allows
    ("wan", "t2v-1.3b", 8, 2),
    ("wan", "ti2v-5b", 16, 2),  # its autoencoder works on patches of 2 x 2 pixels
    ("hunyuan_video", "t2v", 8, 2),
    ("hunyuan_video15", "480p-t2v", 16, 4),
    ("ltx_video", "i2v-2b-0.9.1", 32, 2),
    ("open_sora", "v2", 8, 2),
    ("open_sora", "v2-dc", 32, 2),
    ("flux", "dev", 8, 4),
    ("hunyuan_image", "base", 32, 4),
    ("qwen_image", "base", 8, 2),
]
IN_TIME = {"hunyuan_video": 4, "ltx_video": 8, "open_sora": 4}
"""Frames of one latent, of autoencoders that have tiles in time."""


def autoencoder_of(directory: Path, name: str, variant: str) -> Any:
    path = family_class(name).tiny(directory, variant)
    family = open_family(ModelConfig(family=name, variant=variant, path=str(path)))
    return family.load("autoencoder", "cpu", torch.float32)


def latents_of(autoencoder: Any, frames: int, rows: int, columns: int) -> Tensor:
    config = autoencoder.config
    channels = config.get("latent_channels") or config["z_dim"]
    z = torch.randn(1, channels, frames, rows, columns, generator=torch.Generator().manual_seed(0))
    return z[:, :, 0] if is_picture_autoencoder(autoencoder) else z


def decoded(autoencoder: Any, z: Tensor) -> Tensor:
    timed = autoencoder.config.get("timestep_conditioning")
    with torch.no_grad():
        out = autoencoder.decode(z, torch.tensor([0.05])) if timed else autoencoder.decode(z)
    found: Tensor = out if isinstance(out, Tensor) else out.sample
    return found


SLOW = ("qwen_image", "hunyuan_image")
"""Classes much like others."""


@pytest.mark.parametrize(
    ("name", "variant", "ratio", "least"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW or case[1] == "v2" else []) for case in SPACE],
)
def test_tiles_in_space(tmp_path: Path, name: str, variant: str, ratio: int, least: int) -> None:
    """One tile over all is no tile; with smaller ones each part of the picture is seen by its tile alone."""
    autoencoder = autoencoder_of(tmp_path / "model", name, variant)
    z = latents_of(autoencoder, 1 if name == "qwen_image" else 2, least + 1, least)
    set_tiles(autoencoder, "off", None, None)
    plain = decoded(autoencoder, z)
    set_tiles(autoencoder, "auto", 8 * ratio, None)
    assert torch.equal(decoded(autoencoder, z), plain)
    set_tiles(autoencoder, "auto", least * ratio, None)
    tiled = decoded(autoencoder, z)
    assert tiled.shape == plain.shape
    alone = decoded(autoencoder, z[..., :least, :])
    kept = (least - 1) * ratio
    assert torch.allclose(tiled[..., :kept, :kept], alone[..., :kept, :kept], atol=1e-6), (
        "up to the next one, the first tile"
    )
    assert 0 < (tiled - plain).abs().mean() < plain.std(), "near what the whole gives, though the weights are random"
    with pytest.raises(UserError, match=rf"--tile-size {ratio + 1}: .* from {least * ratio} on"):
        set_tiles(autoencoder, "auto", ratio + 1, None)


@pytest.mark.parametrize(("name", "variant", "ratio"), [(n, v, IN_TIME[n]) for n, v, *_ in SPACE if n in IN_TIME])
def test_tiles_in_time(tmp_path: Path, name: str, variant: str, ratio: int) -> None:
    autoencoder = autoencoder_of(tmp_path / "model", name, variant)
    z = latents_of(autoencoder, 6, 1, 1)
    set_tiles(autoencoder, "off", None, None)
    plain = decoded(autoencoder, z)
    set_tiles(autoencoder, "auto", None, 8 * ratio)
    assert torch.equal(decoded(autoencoder, z), plain)
    set_tiles(autoencoder, "auto", None, 4 * ratio)
    tiled = decoded(autoencoder, z)
    assert tiled.shape == plain.shape and 0 < (tiled - plain).abs().mean() < plain.std()
    # up to where the next tile begins the first one is alone: four latents of it, and one that leads in a causal one
    alone = decoded(autoencoder, z[:, :, : 4 if variant == "v2-dc" else 5])
    kept = 3 * ratio
    assert torch.allclose(tiled[:, :, :kept], alone[:, :, :kept], atol=1e-6)
    set_tiles(autoencoder, "off", None, None)
    assert torch.equal(decoded(autoencoder, z), plain)
    with pytest.raises(UserError, match=rf"--tile-frames {ratio}: .* from {2 * ratio} on; nearest: {2 * ratio}"):
        set_tiles(autoencoder, "auto", None, ratio)


def test_what_is_not_there_is_refused_before_loading(tmp_path: Path) -> None:
    def check(name: str, variant: str, *tiling: Any) -> None:
        check_tiling(open_family(ModelConfig(family=name, variant=variant, path=str(tmp_path))), *tiling)

    check("wan", "t2v-1.3b", "auto", 128, None)
    check("cosmos1", "text2world-7b", "off", None, None)
    with pytest.raises(UserError, match=r"--tile-frames 16: .*AutoencoderKLWan.* no tiles in time"):
        check("wan", "t2v-1.3b", "on", None, 16)
    with pytest.raises(UserError, match=r"--tiling on: .*AutoencoderKLCosmos.* no tiles"):
        check("cosmos1", "text2world-7b", "on", None, None)
    with pytest.raises(UserError, match=r"--tiling of: expected one of auto, on, off"):
        check("wan", "t2v-1.3b", "of", None, None)
    with pytest.raises(UserError, match="--tiling off and --tile-size do not go together"):
        check("wan", "t2v-1.3b", "off", 128, None)
    with pytest.raises(UserError, match=r"--tile-size 100: .*multiples of 32 pixels, from 64 on; nearest: 96"):
        check("open_sora", "v2-dc", "auto", 100, None)


VIDEO = [("wan", "t2v-1.3b"), ("hunyuan_video", "t2v"), ("ltx_video", "t2v-2b-0.9"), ("open_sora", "v2-dc")]


@pytest.mark.parametrize(("name", "variant"), VIDEO)
def test_the_setting_reaches_the_autoencoder_of_a_call(
    tmp_path: Path, name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = family_class(name).tiny(tmp_path / "model", variant)
    family = open_family(ModelConfig(family=name, variant=variant, path=str(path)))
    pipeline = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    space = 32 if name in ("ltx_video", "open_sora") else 16
    size = 2 * space if space == 32 else 16
    seen: list[Any] = []
    own = pipeline.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        vae = pipeline.vae
        seen.append(vae.tiling if hasattr(vae, "tiling") else (vae.use_tiling, vae.tile_sample_min_height))
        return own(*args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", decode)
    plain = SampleSettings("a red ball", 2 * space, 3 * space, 9 if name != "open_sora" else 8, 2, 1.0)
    tiled = replace(plain, tile_size=size)
    before = dict(vars(pipeline.vae))
    first, second, third = sample_many(family, pipeline, [plain, tiled, replace(plain, tiling="off")])
    assert {k: v for k, v in vars(pipeline.vae).items() if k in before and k[:3] in ("use", "til")} == {
        k: v for k, v in before.items() if k[:3] in ("use", "til")
    }, "afterwards as before"
    if name == "open_sora":
        assert (seen[0].space, seen[1].space, seen[2]) == (8, 2, None)
    else:
        assert seen == [(False, before["tile_sample_min_height"]), (True, size), (False, seen[2][1])]
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_tiles_are_a_setting_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = family_class("wan").tiny(tmp_path / "base", "t2v-1.3b")
    small: dict[str, Any] = {"model": str(base), "height": 32, "width": 32, "frames": 5, "steps": 1, "out": tmp_path}
    (path,) = sample(["a"], **small)
    plain = path.read_bytes()
    sample(["a"], tile_size=16, crf=0, **small)
    facts = read_metadata(path)
    assert (facts["tiling"], facts["tile_size"], facts["tile_frames"], facts["crf"]) == ("auto", 16, None, 0)
    tiled = path.read_bytes()
    assert tiled != plain
    (again,) = sample(repeat=path)
    assert again.read_bytes() == tiled
    (other,) = sample(repeat=path, seed=1)
    assert read_metadata(other) | {"seed": 0} == {**facts, "seed": 0} | {"weights": read_metadata(other)["weights"]}
    (whole,) = sample(repeat=path, tiling="off", out=tmp_path / "whole")
    assert (read_metadata(whole)["tiling"], read_metadata(whole)["tile_size"]) == ("off", None)
    (tiled_again,) = sample(repeat=whole, tile_size=16, out=tmp_path / "tiled")
    assert tiled_again.read_bytes() == tiled
    capsys.readouterr()
    sample(["a"], tile_size=16, crf=0, **small)
    assert "1 of 1 are there already" in capsys.readouterr().err
    sample(["a"], tile_size=16, **small)
    assert read_metadata(path)["crf"] == 10 and path.stat().st_size < len(tiled)
    with pytest.raises(UserError, match="--crf 52"):
        sample(["a"], crf=52, **small)


def test_a_failed_call_leaves_the_autoencoder_as_it_was(tmp_path: Path) -> None:
    class Pipeline:
        vae = autoencoder_of(tmp_path / "model", "wan", "t2v-1.3b")

    settings = SampleSettings("a", 32, 32, 5, tiling="on", tile_size=16)
    with pytest.raises(RuntimeError), tiles(Pipeline, settings):
        assert Pipeline.vae.use_tiling and Pipeline.vae.tile_sample_stride_width == 8
        raise RuntimeError
    assert not Pipeline.vae.use_tiling and Pipeline.vae.tile_sample_min_width == 256
