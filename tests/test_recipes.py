"""The recipes: each is valid, trains on a tiny model of its family, and takes what its header says.

What Open-Sora's stages train is in tests/training/test_open_sora_recipes.py.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kinema.config.load import load_config, parse_overrides
from kinema.config.memory import SLOTS
from kinema.config.schema import Config
from kinema.families.registry import family_class, open_family
from kinema.runs.exports import list_exports
from kinema.shapes.world import caption, render, training_clips, write_clips

sys.path.insert(0, str(Path(__file__).parent / "memory"))
from lagging import late_copies

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "recipes.md"
RECIPES = sorted(path for kind in ("lora", "full") for path in (ROOT / "recipes" / kind).glob("*.toml"))
STAGES = sorted((ROOT / "recipes" / "open_sora").glob("*.toml"))
AMOUNT = r"(?P<device>[\d.]+) GB(?: on the card)?(?:, (?P<host>[\d.]+) GB in its machine's memory)?"
HEADER = re.compile(rf"^# Forecast: {AMOUNT} \(kinema plan (?P<file>\S+) --devices (?P<cards>\S+)\)$", re.MULTILINE)
OTHER = re.compile(rf"^#   (?:{AMOUNT}: )?(?P<flags>--.*(?:\n#     --.*)*)$", re.MULTILINE)
TAKEN_OUT = {
    "parallel": "one process trains here",
    "preview": "samples have tests of their own",
    "schedule": "two steps warm nothing up",
}
"""Tables that the tiny trainings go without, and why."""
QUICK = ("lora/flux-24gb", "full/wan-1.3b-24gb")
"""What `make test` trains: a base in 8 bits, and a whole network updated inside the backward pass."""


@dataclass(frozen=True)
class Said:
    """What a header says that a configuration takes, in GB."""

    flags: str
    """Of `kinema train`, beside the file."""
    device: float | None
    """None where it says nothing."""
    host: float


def name_of(recipe: Path) -> str:
    return f"{recipe.parent.name}/{recipe.stem}"


def cards_of(recipe: Path) -> str:
    header = HEADER.search(recipe.read_text())
    assert header is not None, f"{recipe} does not say what it takes"
    return header["cards"]


def said_by(recipe: Path) -> list[Said]:
    """Of the file as it is, and with the flags for other models that it names."""
    text = recipe.read_text()
    header = HEADER.search(text)
    assert header is not None, f"{recipe} does not say what it takes"
    assert header["file"] == f"recipes/{name_of(recipe)}.toml"
    found = [(header, ""), *((other, other["flags"].replace("\n#", " ")) for other in OTHER.finditer(text))]
    return [
        Said(flags, None if match["device"] is None else float(match["device"]), float(match["host"] or 0))
        for match, flags in found
    ]


def configured(recipe: Path, said: Said) -> Config:
    return load_config(recipe, parse_overrides(shlex.split(said.flags)))


def test_there_is_one_for_every_card_and_several() -> None:
    cards = {cards_of(recipe) for recipe in RECIPES}
    assert {"12GB", "16GB", "24GB", "48GB", "80GB", "4x24GB", "8x80GB"} <= cards
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_it_is_valid_for_every_model_that_it_names(recipe: Path) -> None:
    count, card = re.fullmatch(r"(?:(\d+)x)?(\d+)GB", cards_of(recipe)).groups()  # type: ignore[union-attr]
    runs = set()
    for said in said_by(recipe):
        config = configured(recipe, said)
        assert config.parallel.dp_shard == int(count or 1)
        if said.device is not None:
            assert said.device <= float(card), f"{said} does not fit {card} GB"
            assert (said.host > 0) == (config.memory.offload_activations or config.memory.offload_blocks != 0)
        open_family(config.model).validate(config)
        runs.add((config.model.family, config.model.variant))
    assert len(runs) == len(said_by(recipe)) >= 2, "it says what to change for others of its group"


@pytest.mark.parametrize("recipe", STAGES, ids=name_of)
def test_a_stage_says_what_it_takes_of_the_devices_that_it_is_for(recipe: Path) -> None:
    (said,) = said_by(recipe)
    parallel = configured(recipe, said).parallel
    assert isinstance(parallel.dp_shard, int) and cards_of(recipe) == f"{parallel.dp_shard * parallel.sp}x80GB"
    assert said.device is not None and said.device <= 80 and not said.host


def test_no_two_write_into_one_run_but_for_the_same_model() -> None:
    runs: dict[Path, str] = {}
    for recipe in RECIPES:
        config = load_config(recipe)
        assert runs.setdefault(config.run.dir, config.model.family) == config.model.family


def row_of(recipe: Path) -> str:
    """The recipe's row of the page."""
    config, (own, *_) = load_config(recipe), said_by(recipe)
    what = "whole" if config.adapter is None else "LoRA"
    buckets = config.data.sources[0].buckets
    assert buckets is not None
    side, length = max(buckets.resolutions), max(buckets.frames)
    width, height = max(buckets.sizes or [(side, side)])
    size = f"{width} x {height}" + (f", {length} frames" if length > 1 else "")
    host = f"{own.host:g} GB" if own.host else ""
    link = f"[`{name_of(recipe)}`](../../recipes/{name_of(recipe)}.toml)"
    model = f"{config.model.family} {config.model.variant}"
    cells = (link, model, what, size, cards_of(recipe).replace("GB", " GB"), f"{own.device:g} GB", host)
    return "| " + " | ".join(cells) + " |"


def test_the_page_has_a_row_for_each() -> None:
    """The rows are to be copied from the message."""
    rows = [row_of(recipe) for recipe in RECIPES]
    on_page = [line for line in PAGE.read_text().splitlines() if line.startswith("| [`")]
    assert sorted(on_page) == sorted(rows), "\n".join(["the page should have", *rows])


# -- on tiny models --------------------------------------------------------------------------------------------------


def made_small(recipe: Path, root: Path) -> Config:
    """The recipe on a tiny model, on four small clips or pictures, for two steps; what is left of it stays as it is."""
    text = recipe.read_text()
    tables: dict[str, Any] = tomllib.loads(text)
    model, frames, batch = tables["model"], tables["data"]["buckets"]["frames"], tables["training"]["batch_size"]
    still = frames == [1]
    tiny = family_class(model["family"]).tiny(root / "model", model["variant"], seed=1)
    data = write_pictures(root / "data") if still else write_videos(root / "data")
    given = {
        "run.dir": root / "run",
        "run.threads": 1,
        "model.path": tiny,
        "data.sources.0.path": data,
        "data.buckets.sizes": "[[64, 64]]",
        "data.buckets.frames": "[1]" if still else "[9]",
        "training.steps": 2,
        "training.batch_size": min(batch, 2),
        "monitoring.tensorboard": "false",
    }
    if tables.get("memory", {}).get("offload_blocks"):
        given["memory.offload_blocks"] = SLOTS + 1  # tiny networks have few blocks
    own = root / "recipe.toml"
    own.write_text(without_tables(text, TAKEN_OUT).replace("resolutions = ", "# "))
    return load_config(own, [(key, str(value)) for key, value in given.items()])


def without_tables(text: str, names: Iterable[str]) -> str:
    """A TOML file without these tables."""
    tables = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    kept = [table for table in tables if table.lstrip("[").partition("]")[0] not in names]
    return "".join(kept)


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number, (combo, seed) in enumerate(training_clips(4)):
        path = folder / f"{number}.png"
        Image.fromarray(render(combo, seed)[0]).save(path)
        path.with_suffix(".txt").write_text(caption(combo))
    return folder


def write_videos(folder: Path) -> Path:
    write_clips(folder, list(training_clips(4)), frames=9, size=64)
    return folder


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(one, marks=[] if name_of(one) in QUICK else pytest.mark.slow, id=name_of(one)) for one in RECIPES],
)
def test_it_trains(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the host's memory travels, as on a GPU whose copies are late."""
    from kinema.training.train import train

    engines, config = late_copies(monkeypatch), made_small(recipe, tmp_path)
    run = train(config)
    moves = config.memory.offload_activations or config.memory.offload_blocks != 0
    assert bool(engines) == moves and all(one.peak > 0 and not one.pending for one in engines)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(row["grad_norm"] > 0 for row in rows)
    (export,) = list_exports(run / "exports")
    files = [file.name for file in export.glob("*/*")]
    assert any(name.endswith(".safetensors") for name in files)
    assert {"diffusers", "comfyui"} <= {folder.name for folder in export.iterdir()}


# -- at their real size ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, *STAGES], ids=name_of)
def test_it_takes_what_its_header_says(recipe: Path) -> None:
    """By the forecast of `kinema plan`, to the digits that are given."""
    from kinema.parallel.devices import parse_devices
    from kinema.parallel.mesh import sizes_of
    from kinema.parallel.plan import Candidate, kind_of
    from kinema.parallel.plan_model import Sharding
    from kinema.training.plan import offloading_of, planning_family, prospect

    cluster = parse_devices(cards_of(recipe))
    wrong = []
    for said in said_by(recipe):
        if said.device is None:
            continue
        config = configured(recipe, said)
        sizes = sizes_of(config.parallel, cluster.count)
        known = prospect(config, planning_family(config), sizes)
        sharding = Sharding(config.parallel.zero, config.parallel.cpu_offload)
        plan = Candidate(sizes, kind_of(config.training.activation_checkpointing), sharding, offloading_of(config))
        assert known.refusal(plan) is None
        memory = known.workload.forecast(plan, cluster).memory
        if max(abs(memory.total / 1e9 - said.device), abs(memory.host / 1e9 - said.host)) > 0.051:
            wrong.append(f"{said}: {memory.total / 1e9:.1f} GB, {memory.host / 1e9:.1f} GB in its machine's memory")
    assert not wrong, "\n".join(wrong)
