"""A list of prompts goes on where it was stopped, and may be shared by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kinema.cli import app
from kinema.errors import ConfigError, UserError
from kinema.families.registry import family_class
from kinema.sampling.command import sample
from kinema.sampling.index import add_to_index, prepare_index, read_index
from kinema.sampling.writing import read_metadata

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("resume"), "t2v-1.3b")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples in five calls: rows of other lengths share none."""
    path = tmp_path_factory.mktemp("listed") / "l.csv"
    rows = [f"prompt {i},{5 if i % 3 else 9},{1 + (i % 3 == 1)}" for i in range(7)]
    path.write_text("text,frames,num_samples\n" + "\n".join(rows))
    return path


def options(base: Path, listed: Path, out: Path) -> dict[str, Any]:
    return {"prompt_list": str(listed), "model": str(base), "out": str(out), **SMALL, "frames": None, "device": "cpu"}


def start(options: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    """Another process that draws these; with as many threads as this one, for they decide the last digits."""
    import torch

    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    command = [sys.executable, "-c", f"from kinema.sampling.command import sample\nsample(**{options!r})"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.jsonl"}


def check_consistent(folder: Path) -> None:
    """Every file is whole, and the index says of each of its files what the file itself says."""
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    for line in index:
        assert read_metadata(folder / line.pop("file")) == line
    files = [path for path in folder.iterdir() if path.suffix in (".mp4", ".png") and not path.name.startswith(".")]
    assert {path.name for path in files} >= set(read_index(folder)) and len(index) == len(read_index(folder))
    for path in files:
        assert read_metadata(path)["prompt"]


@pytest.fixture(scope="module")
def unbroken(base: Path, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a command that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken")
    assert len(sample(**options(base, listed, out))) == 9
    check_consistent(out)
    found = contents(out)
    assert len(found) == 2 * 9 and len(read_index(out)) == 9
    return found


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4])
def test_killed_and_started_again(
    base: Path,
    listed: Path,
    tmp_path: Path,
    unbroken: dict[str, bytes],
    after: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same bytes in the end, and what was there is neither drawn nor touched again."""
    process = start(options(base, listed, tmp_path))
    limit = time.monotonic() + 120
    while len(list(tmp_path.glob("prompt*.mp4"))) < after and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("prompt*.mp4")}
    assert after <= len(before) < 9
    check_consistent(tmp_path)
    capsys.readouterr()
    sample(**options(base, listed, tmp_path))
    assert f"{len(before)} of 9 are there already" in capsys.readouterr().err
    check_consistent(tmp_path)
    assert contents(tmp_path) == unbroken
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert len(read_index(tmp_path)) == 9


def test_ranks_share_the_calls_and_draw_what_one_does(
    base: Path, listed: Path, tmp_path: Path, unbroken: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no process group, each on its own."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    drawn = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        drawn.append({path.name for path in sample(**options(base, listed, tmp_path))})
        check_consistent(tmp_path)
    assert [len(names) for names in drawn] == [1, 4, 4] and len(set.union(*drawn)) == 9
    assert contents(tmp_path) == unbroken and len(read_index(tmp_path)) == 9


@pytest.mark.slow
def test_ranks_at_the_same_time(base: Path, listed: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    ranks = [start(options(base, listed, tmp_path), RANK=str(i), WORLD_SIZE="2", LOCAL_RANK=str(i)) for i in range(2)]
    said = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    check_consistent(tmp_path)
    assert contents(tmp_path) == unbroken and len(read_index(tmp_path)) == 9
    for i, count in enumerate((3, 6)):
        lines = [line for line in said[i].splitlines() if line.startswith(f"rank {i}: ") and line.endswith(".mp4")]
        assert len(lines) == count


def test_only_the_first_rank_says_what_is_wrong(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, kind in ((0, UserError), (1, ConfigError)):  # the command line prints the latter on rank 0 alone
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="--height 33") as caught:
            sample(["x"], model=str(base), height=33)
        assert type(caught.value) is kind


def test_what_counts_as_there(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*prompts: str, **options: Any) -> int:
        """How many are drawn."""
        capsys.readouterr()
        arguments: dict[str, Any] = {"model": str(base), "out": tmp_path, **SMALL, **options}
        names = [path.name for path in sample(prompts, **arguments)]
        check_consistent(tmp_path)
        said = capsys.readouterr().err.splitlines()
        assert all((tmp_path / f"{name}.json").is_file() for name in names)
        return sum(line.endswith(".mp4") for line in said)

    assert drawn("a", "b") == 2
    assert drawn("a", "b") == 0
    assert drawn("b", "c", "a") == 1
    assert drawn("a", again=True) == 1
    assert drawn("a", steps=2) == 1 and drawn("a", steps=2) == 0
    assert drawn("a", dtype="bf16", steps=2) == 1
    assert drawn("a") == 1
    assert drawn("a", num_samples=3) == 2
    other = family_class("wan").tiny(tmp_path / "other", "t2v-1.3b", seed=9)
    assert drawn("a", model=str(other)) == 1 and drawn("a", model=str(other)) == 0
    moved = other.rename(tmp_path / "moved")
    assert drawn("a", model=str(moved)) == 0, "the same weights elsewhere"

    index = tmp_path / "index.jsonl"
    whole = index.read_text()
    index.write_text(whole[: len(whole) - 30])  # a line that a full disk cut short
    assert drawn("a", "b", model=str(moved)) == 1, "of a, drawn last, the file says what it is; b is of other weights"
    index.unlink()
    (tmp_path / "a-0.mp4.json").unlink()
    (tmp_path / ".a-0.999999999.mp4").write_text("left by a process that was killed")
    assert drawn("a", "b", "c", model=str(moved)) == 1
    assert sorted(read_index(tmp_path)) == ["a-0.mp4", "b-0.mp4", "c-0.mp4"]
    (tmp_path / "a-0.mp4").write_bytes(b"not whole")
    index.unlink()
    assert drawn("a", model=str(moved)) == 1
    assert not list(tmp_path.glob(".*"))


def test_many_processes_write_one_index(tmp_path: Path) -> None:
    """Lines are added and taken out at the same time; none is lost, none is torn."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from kinema.sampling.index import add_to_index, prepare_index\n"
        "folder, me = Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(60):\n"
        "    add_to_index(folder, {'file': f'{me}-{i}', 'prompt': 'x' * 5000})\n"
        "    if i % 2: prepare_index(folder, [f'{me}-{i}'])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(i)]) for i in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert sorted(read_index(tmp_path)) == sorted(f"{me}-{i}" for me in range(4) for i in range(0, 60, 2))
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 120
    prepare_index(tmp_path, [])
    add_to_index(tmp_path, {"file": "größe"})
    assert "größe" in read_index(tmp_path)


def test_the_flags_of_the_command(base: Path, listed: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["sample", *arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stderr

    (tmp_path / "l.tsv").write_text("text\tid\tgood\nfirst\t1\tx\nsecond\t2\tx\nthird\t3\tx\n")
    size = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "1", "--model", str(base)]
    common = ["--list", str(tmp_path / "l.tsv"), "--ignore-columns", "id,good", *size, "--out", str(tmp_path / "o")]
    run(*common, "--rows", "1:")
    assert sorted(read_index(tmp_path / "o")) == ["second-0.mp4", "third-0.mp4"]
    assert "2 of 3 are there already" in run(*common)
    assert "already" not in run(*common, "--again", "--rows", "0")
    run("--from", str(tmp_path / "o" / "first-0.mp4"))
    assert (tmp_path / "o" / "repeats" / "first-0.mp4").read_bytes() == (tmp_path / "o" / "first-0.mp4").read_bytes()
    run("--from", str(tmp_path / "o" / "first-0.mp4"), "--seed", "0", "--guidance", "2", "--out", str(tmp_path / "p"))
    assert read_metadata(tmp_path / "p" / "first-0.mp4")["guidance"] == 2.0
