"""Control pictures of edit models on their way from folders to encoders and into the keys of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_encoder import Alone, SmallEncoder

from kinema.config.schema import Config
from kinema.data.batch import Encoding, Sample
from kinema.data.dataset import Dataset
from kinema.data.opening import open_data


class Editor(SmallEncoder):
    """Encodes the controls as latents, and text that depends on them."""

    def encodings(self) -> tuple[Encoding, ...]:
        return (
            Encoding("text", "caption", ("text_encoder",), "plain"),
            Encoding("told", "caption", ("text_encoder",), controls=True),
            Encoding("latents", "media", ("autoencoder",)),
            Encoding("control", "controls", ("autoencoder",), controls=True),
        )

    def _text(self, parts, sample: Sample):
        assert not sample.controls
        return super()._text(parts, sample)

    def _told(self, parts, sample: Sample):
        assert sample.pixels is None and len(sample.controls) == 1
        text = super()._text(parts, Sample(sample.caption))["text"]
        return {"told": text + sample.controls[0].float().mean() / 255}

    def _control(self, parts, sample: Sample):
        assert sample.pixels is None
        (picture,) = sample.controls
        assert picture.dtype == torch.uint8
        return {"control": picture.float().mean((1, 2, 3)) / 255, "size": torch.tensor(picture.shape)}


def solid(path: Path, level: int, size: tuple[int, int] = (48, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), level, np.uint8)).save(path)


def open_set(root: Path, encoder: Editor) -> Dataset:
    config = Config.model_validate(
        {
            "run": {"dir": str(root / "runs" / "run")},
            "model": {"family": "none"},
            "data": {
                "sources": [{"path": str(root / "target"), "controls": [str(root / "control")]}],
                "buckets": {"sizes": [[32, 48]], "frames": [1]},
                "workers": 1,
            },
            "training": {"steps": 1, "batch_size": 2, "precision": "fp32", "caption_dropout": 0.5},
        }
    )
    return open_data(config, config.data.sources, encoder, Alone(), lambda message: None)


def test_controls_reach_the_encoders_that_read_them_and_no_others(tmp_path: Path) -> None:
    for name, level in (("a", 51), ("b", 204)):
        solid(tmp_path / "target" / f"{name}.png", level + 1)
        (tmp_path / "target" / f"{name}.txt").write_text(f"make it {name}")
        solid(tmp_path / "control" / f"{name}.png", level, (96, 96))  # of another size: cut to the bucket's
    encoder = Editor()
    data = open_set(tmp_path, encoder)
    batch = data.batch(0)
    assert set(batch.tensors) == {"text", "told", "latents", "control", "size"}
    levels = sorted(round(float(value[0]), 3) for value in batch.tensors["control"])
    assert levels == [0.2, 0.8]
    assert all(size.tolist() == [3, 1, 32, 48] for size in batch.tensors["size"])
    # Three captions (the empty one is shared); two of each record for what reads its picture too.
    assert encoder.calls == {"text": 3, "told": 4, "latents": 2, "control": 2}

    again = Editor()
    open_set(tmp_path, again)
    assert not again.calls

    solid(tmp_path / "control" / "b.png", 100, (96, 96))
    changed = Editor()
    after = open_set(tmp_path, changed)
    assert changed.calls == {"told": 2, "control": 1}, "what does not read the control picture is kept"
    assert after.fingerprint != data.fingerprint


def test_a_damaged_control_picture_leaves_its_record_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        solid(tmp_path / "target" / f"{name}.png", 128)
        (tmp_path / "target" / f"{name}.txt").write_text(name)
        solid(tmp_path / "control" / f"{name}.png", 10)
    (tmp_path / "control" / "b.png").write_bytes(b"no picture")
    data = open_set(tmp_path, Editor())
    assert [Path(item.record.path).name for item in data.items] == ["a.png"]
    (missing,) = data.left_out
    assert Path(missing.path).name == "b.png" and "control" in missing.reason
