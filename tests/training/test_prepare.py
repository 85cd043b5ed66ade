"""``kinema cache`` leaves nothing to encode for the training."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import make_world, write_config


@pytest.mark.slow
def test_what_cache_prepares_is_all_that_train_reads(tmp_path: Path) -> None:
    make_world(tmp_path, clips=6)
    (tmp_path / "clips" / "empty.mp4").touch()
    held_out = f'\n[[evaluation.sets]]\nname = "held"\nsources = [{{ path = "{tmp_path}/clips/short" }}]\n'
    config = write_config(tmp_path, steps=1, extra=held_out)

    def run(command: str) -> str:
        arguments = [sys.executable, "-m", "kinema", command, str(config), "--preview.prompts", "[]"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    first = run("cache")
    assert "empty.mp4" in first
    assert "done in" in first
    assert f"11 items are ready in {tmp_path}/cache" in first  # six clips, five of them held out too
    assert not (tmp_path / "run").exists()
    again = run("cache")
    assert "done in" not in again
    assert "done in" not in run("train")
