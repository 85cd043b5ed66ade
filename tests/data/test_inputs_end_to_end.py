"""The table of inputs through the whole data system: every file of a folder is used or listed, none stops the run, and
`data.strict` makes each an error."""

from pathlib import Path

import pytest
from input_files import mask, video
from small_encoder import Alone, SmallEncoder
from test_inputs import MADE, Left, Used

from kinema.config.schema import Config
from kinema.data.dataset import Dataset
from kinema.data.opening import open_data
from kinema.errors import UserError

NO_RECORDS = {"gone.mp4", "folder.mp4", "no_times.h264"}
"""What is no file of a folder, or has an extension that no folder source takes."""


def open_folder(folder: Path, root: Path, *, strict: bool = False, **source: object) -> Dataset:
    config = Config.model_validate(
        {
            "model": {"family": "small"},
            "data": {
                "sources": [{"path": folder, **source}],
                "buckets": {"resolutions": [64], "frames": [1, 9], "fps": None},
                "cache": root / "cache",
                "strict": strict,
            },
            "training": {"steps": 1, "batch_size": 3, "precision": "fp32"},
        }
    )
    return open_data(config, config.data.sources, SmallEncoder(), Alone())


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All inputs in one folder, each with a caption."""
    folder = tmp_path_factory.mktemp("everything") / "media"
    folder.mkdir()
    for name, (make, _) in MADE.items():
        if name not in NO_RECORDS:
            make(folder / name)
            (folder / f"{name.rpartition('.')[0]}.txt").write_text(name)
    return folder


def test_every_input_is_used_or_listed(everything: Path, tmp_path: Path) -> None:
    data = open_folder(everything, tmp_path)
    expected = {name: outcome for name, (_, outcome) in MADE.items() if name not in NO_RECORDS}
    used = {Path(item.record.path).name for item in data.items}
    left_out = {Path(entry.path).name: entry for entry in data.left_out}
    assert used == {name for name, outcome in expected.items() if isinstance(outcome, Used)}
    assert left_out.keys() == expected.keys() - used and len(data.left_out) == len(left_out)
    for name, entry in left_out.items():
        outcome = expected[name]
        assert isinstance(outcome, Left) and entry.code == outcome.code, entry
    seen: set[int] = set()
    for step in range(data.order.steps_per_epoch):
        batch = data.batch(step)
        seen.update(data.order.batch(step).items.tolist())
        assert all(latents.isfinite().all() for latents in batch.tensors["latents"])
    assert seen == set(range(len(data)))


def test_strict_makes_each_an_error(everything: Path, tmp_path: Path) -> None:
    data = open_folder(everything, tmp_path)
    with pytest.raises(UserError, match=rf"data\.strict is set, and {len(data.left_out)} of the files") as raised:
        open_folder(everything, tmp_path, strict=True)
    assert sum(str(entry) in str(raised.value) for entry in data.left_out) == min(30, len(data.left_out))


def test_captions_and_masks_that_are_damaged_or_missing(tmp_path: Path) -> None:
    folder, masks = tmp_path / "media", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    for name in ("good", "latin", "utf16", "bare", "maskless", "square", "half"):
        video(folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text("a caption")
        mask(masks / f"{name}.png", (64, 64) if name == "square" else (64, 48))
    mask(masks / "half.png", (32, 24), white=(8, 6, 24, 18))
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("a caption".encode("utf-16"))
    (folder / "bare.txt").unlink()
    (masks / "maskless.png").unlink()
    data = open_folder(folder, tmp_path, masks=masks)
    codes = {Path(entry.path).name: entry.code for entry in data.left_out}
    assert codes == {
        "latin.mp4": "unreadable caption",
        "utf16.mp4": "unreadable caption",
        "bare.mp4": "no caption",
        "maskless.mp4": "no mask",
        "square.mp4": "mask of another shape",
    }
    reasons = {Path(entry.path).name: entry.reason for entry in data.left_out}
    assert "not UTF-8 (byte 0xe9" in reasons["latin.mp4"] and "UTF-16" in reasons["utf16.mp4"]
    batch = data.batch(0)
    assert len(batch) == len(batch.masks) == 2
    kept = [found for found in batch.masks if found is not None]
    assert all(tuple(found.shape) == (1, 1, 56, 72) for found in kept), "as the bucket of 64 x 48"
    whole, half = (found.int() for found in kept)
    assert 0 < int(whole.sum()) < 255 * whole.numel()
    assert (whole - half).abs().max() <= 1, "the mask of half the size is exact here: its edges lie on even pixels"
