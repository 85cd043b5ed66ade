"""LTX-Video: what the suite of all families does not see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch
from kinema.errors import ConfigError
from kinema.families.loading import CONFIGS
from kinema.families.ltx_video import LTXVideo
from kinema.families.ltx_video_parts import AUTOENCODERS


def family(**model: object) -> LTXVideo:
    return LTXVideo(ModelConfig.model_validate({"family": "ltx_video"} | model), seed=3)


def config(**tables: object) -> Config:
    data = {"sources": [{"path": "."}], "buckets": {"frames": [17], "fps": 25.0}}
    model = {"family": "ltx_video", "variant": "t2v-2b-0.9"}
    return Config.model_validate({"model": model, "data": data, "training": {"steps": 1}} | tables)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ltx")
    return {v: LTXVideo.tiny(root / v, v) for v in ("t2v-2b-0.9", "t2v-2b-0.9.1", "t2v-2b-0.9.5")}


@pytest.mark.parametrize("version", ["0.9", "0.9.1", "0.9.5"])
def test_the_autoencoder_of_an_original_file(directories: dict[str, Path], tmp_path: Path, version: str) -> None:
    """Our inverse of the names is read alike by diffusers' converter and by us, and the version is recognised."""
    state = load_file(directories[f"t2v-2b-{version}"] / "vae" / "diffusion_pytorch_model.safetensors")
    original = {f"vae.{k}": v for k, v in AUTOENCODERS[version].to_original(state).items()}
    extra = {
        "vae.per_channel_statistics.mean-of-stds": torch.ones(128),
        "vae.per_channel_statistics.channel": torch.ones(1),
    }
    if version == "0.9.5":  # diffusers tells this version by the published width
        original["vae.encoder.conv_out.conv.weight"] = torch.zeros(129, 2048, 1, 1, 1)
    theirs = convert_ltx_vae_checkpoint_to_diffusers(dict(original | extra))
    assert theirs.keys() == state.keys()
    for name in state.keys() - {"encoder.conv_out.conv.weight"}:
        assert torch.equal(theirs[name], state[name]), name

    original |= {f"vae.{k}": v for k, v in AUTOENCODERS[version].to_original(state).items()}
    network = {"model.diffusion_model.patchify_proj.weight": torch.zeros(2048, 128)}
    save_file({k: v.contiguous() for k, v in (original | extra | network).items()}, tmp_path / "whole.safetensors")
    whole = family(path=str(tmp_path / "whole.safetensors"))
    assert whole.variant.name == f"t2v-2b-{version}"
    shutil.copytree(directories[f"t2v-2b-{version}"] / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    save_file({k: v.contiguous() for k, v in (original | extra).items()}, tmp_path / "vae" / "model.safetensors")
    ours = family(variant=f"t2v-2b-{version}", autoencoder={"path": str(tmp_path / "vae")})
    loaded = ours.load("autoencoder", "cpu", None).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("version", ["0.9", "0.9.1", "0.9.5"])
def test_the_variant_of_a_directory(directories: dict[str, Path], tmp_path: Path, version: str) -> None:
    directory = directories[f"t2v-2b-{version}"]
    assert family(path=str(directory)).variant.name == f"t2v-2b-{version}"


def test_an_image_to_video_directory_names_its_pipeline(directories: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(directories["t2v-2b-0.9"], tmp_path / "model"))
    shutil.copy(CONFIGS / "ltx_video" / "t2v-2b-0.9" / "transformer" / "config.json", root / "transformer")
    index = json.loads((root / "model_index.json").read_text())
    index["_class_name"] = "LTXImageToVideoPipeline"
    (root / "model_index.json").write_text(json.dumps(index))
    assert family(path=str(root)).variant.name == "i2v-2b-0.9"


def batch(step: int, indices: list[int], frames: int = 3) -> Batch:
    latents = [torch.zeros(128, frames, 2, 3) for _ in indices]
    text = [torch.ones(4, 8) for _ in indices]
    share = [1 / len(indices)] * len(indices)
    return Batch(step, {"latents": latents, "text": text}, [""] * len(indices), indices, share)


def test_first_frames_are_given_as_often_as_asked_and_by_key() -> None:
    """A share p of the samples, whatever the order and the split into batches."""
    ours = family(variant="t2v-2b-0.9", first_frame_p=0.3)
    given = ours.prepare(batch(5, list(range(2000)))).given
    assert given is not None and given.shape == (2000, 1, 3, 2, 3)
    assert (given[:, :, 1:] == 0).all()
    first = given[:, 0, 0].flatten(1)
    assert (first == first[:, :1]).all()
    share = float(first[:, 0].mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    part = ours.prepare(batch(5, [1700, 3])).given
    assert part is not None and torch.equal(part, given[[1700, 3]])
    other = ours.prepare(batch(6, list(range(2000)))).given
    assert other is not None and not torch.equal(other, given)


def test_no_first_frame_where_it_would_be_all() -> None:
    assert family(variant="t2v-2b-0.9").prepare(batch(0, [0, 1])).given is None
    assert family(variant="t2v-2b-0.9", first_frame_p=1.0).prepare(batch(0, [0], frames=1)).given is None
    given = family(variant="i2v-2b-0.9").prepare(batch(0, [0, 1])).given
    assert given is not None and given.sum() == 2 * 6


def test_wrong_settings_are_refused(caplog: pytest.LogCaptureFixture, directories: dict[str, Path]) -> None:
    path = str(directories["t2v-2b-0.9"])
    model = {"family": "ltx_video", "variant": "t2v-2b-0.9", "path": path}
    good = config(model=model)
    LTXVideo(good.model).validate(good)
    assert not caplog.records
    slow = {"sources": [{"path": "."}], "buckets": {"frames": [17], "fps": 16.0}}
    LTXVideo(good.model).validate(config(model=model, data=slow))
    assert "set it to 25" in caplog.text
    never = config(model=model | {"variant": "i2v-2b-0.9", "first_frame_p": 0.0}, preview={"prompts": []})
    with pytest.raises(ConfigError, match=r"model\.first_frame_p.*t2v-2b-0\.9"):
        LTXVideo(never.model).validate(never)
    short = config(model=model, data={"sources": [{"path": "."}], "buckets": {"frames": [13], "fps": 25.0}})
    with pytest.raises(ConfigError, match="8 k \\+ 1"):
        LTXVideo(short.model).validate(short)


def test_the_time_shift_is_the_authors() -> None:
    shift = LTXVideo.resolution_shift
    assert shift(1024) == pytest.approx(2.718281828**0.95) and shift(4096) == pytest.approx(2.718281828**2.05)
    assert family(variant="t2v-2b-0.9").default_shift() == "resolution"
