"""Each memory technique with and without, in one run: the most bytes that a training step has alive, and its time.

    python bench/memory.py [--steps 5] [--only fp8]
    python bench/memory.py --gpu [--only wan]

Without a GPU: a Wan of 8M parameters, bytes counted by the storages of tensors (what kernels take for themselves and
give back is not seen), times of steps taken in turns, with and without (median of the ratios). What techniques move to
the host's memory is not counted then; their copies take their time there, as nothing runs beside them.

With a GPU: Wan 2.1 1.3B at its real size with random weights, bytes counted by torch's allocator. ``--gpu`` trains a
LoRA of real-size networks with random weights instead, in bf16 with activation checkpointing: seconds of a step, peak,
and the share of the device's rated speed (what is computed again does not count as work), beside what SimpleTuner
publishes for an H100.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.data.buckets import Bucket
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.families.stored import load_quantized
from kinema.memory.compile import PAYS_FROM, settled
from kinema.optim import adam
from kinema.parallel.devices import KNOWN
from kinema.parallel.mesh import World
from kinema.training.dry_step import DryNetworks
from kinema.training.loop import Trainer, Work, train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parallel"))
from elsewhere import Elsewhere
from plan_cases import Small, batch_of, counting, trainer_of, write

from open_sora import fill

Tables = dict[str, dict[str, Any]]
SMALL = Small(
    "wan",
    "t2v-1.3b",
    {"num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 1024, "num_layers": 8},
    Bucket(17, 192, 192),
)
DEEP = replace(SMALL, network=SMALL.network | {"num_layers": 30})
PIECE_BYTES = 2**20
"""What AdamW updates at once, of the small network: as little of it as the usual 64 MB are of a real one."""
STILL = {"cpu": Bucket(1, 64, 64), "cuda": Bucket(1, 480, 832)}
"""For what is done to weights: few tokens."""
CLIP = {"cpu": SMALL.bucket, "cuda": Bucket(33, 480, 832)}
"""For what is done to activations."""
LORA: Tables = {"adapter": {"rank": 16}, "training": {"precision": "bf16"}}
FULL: Tables = {"training": {"clip_norm": None}}
AGAIN: Tables = {"training": {"activation_checkpointing": True}}
MB, GIB = 1e6, 2**30


def merged(*tables: Tables) -> Tables:
    found: Tables = {}
    for one in tables:
        for name, values in one.items():
            found[name] = found.get(name, {}) | values
    return found


@dataclass(frozen=True)
class Technique:
    """Two trainings that differ by one thing."""

    name: str
    trains: str
    without: Tables
    change: Tables
    buckets: Mapping[str, Bucket]
    claim: str = ""
    """Of the mission."""
    of_weights: bool = False
    """Whether the frozen weights are what is compared, instead of the peak."""
    deep: bool = False
    """Whether it takes a network of 30 blocks, as the real one has."""


def checkpointing(kind: Any) -> Tables:
    return {"training": {"activation_checkpointing": kind}}


def stored(dtype: str) -> Tables:
    return {"model": {"network": {"dtype": dtype}}}


TECHNIQUES = (
    Technique("activation checkpointing: every block", "all", FULL, checkpointing(True), CLIP, "-30 to -50%"),
    Technique("activation checkpointing: every 2nd block", "all", FULL, checkpointing(2), CLIP),
    Technique("activation checkpointing: selective", "all", FULL, checkpointing("selective"), CLIP),
    Technique("activation checkpointing: nested", "all", FULL, checkpointing("nested"), CLIP),
    Technique(
        "activations in the host's memory, beside checkpointing", "LoRA", merged({"adapter": {"rank": 4}}, AGAIN),
        {"memory": {"offload_activations": True}}, CLIP, deep=True,
    ),
    Technique(
        "24 of 30 blocks in the host's memory", "LoRA", merged(LORA, AGAIN), {"memory": {"offload_blocks": 24}}, STILL,
        "-40 to -60%", deep=True,
    ),
    *(
        Technique(
            f"base in {dtype}, for bf16", "LoRA", merged(LORA, AGAIN), stored(dtype), STILL,
            "-50% of the weights" if dtype == "fp8" else "", of_weights=True,
        )
        for dtype in ("fp8", "int8", "nf4")
    ),
    Technique(
        "gradient release", "all", merged(FULL, AGAIN), {"optimizer": {"gradient_release": True}}, STILL, "-20 to -30%"
    ),
    Technique(
        "gradient release, with 8-bit AdamW", "all", merged(FULL, AGAIN, {"optimizer": {"type": "adamw8bit"}}),
        {"optimizer": {"gradient_release": True}}, STILL, "-20 to -30%",
    ),
    Technique("8-bit AdamW", "all", merged(FULL, AGAIN), {"optimizer": {"type": "adamw8bit"}}, STILL),
    Technique(
        "optimiser's state in the host's memory", "all", merged(FULL, AGAIN), {"optimizer": {"state_on_cpu": True}},
        STILL,
    ),
)  # fmt: skip


# -- one training ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training that steps on one batch again and again."""

    trainer: Trainer
    networks: dict[str, Any]
    work: Work
    elsewhere: Elsewhere

    def step(self) -> None:
        train_step(self.trainer, self.work, 0)

    def timed(self) -> float:
        synchronise()
        began = time.perf_counter()
        self.step()
        synchronise()
        return time.perf_counter() - began

    def peak(self) -> int:
        """Bytes, of a step that is not the first."""
        self.step()
        gc.collect()
        if self.trainer.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        with counting(self.trainer, self.networks, self.work.batch, self.elsewhere) as live:
            self.step()
        return live.peak

    def weights(self) -> int:
        """Bytes of what does not train."""
        frozen = [p for network in self.networks.values() for p in network.parameters() if not p.requires_grad]
        return sum(parameter.nbytes for parameter in frozen)


def started(model: dict[str, Any], tables: Tables, bucket: Bucket, device: str, samples: int = 1) -> Run:
    """A training from random weights on random latents."""
    config = configured(model, tables, device, samples)
    family = open_family(config.model)
    if device != "cpu":
        draw_on(family, device)
    torch.manual_seed(0)
    elsewhere = Elsewhere(PIECE_BYTES)
    trainer, networks = trainer_of(config, family, World.alone(device), elsewhere if device == "cpu" else None)
    return Run(trainer, networks, Work(batch_of(family, bucket, samples), samples, None, 0.0), elsewhere)


def configured(model: dict[str, Any], tables: Tables, device: str, samples: int) -> Config:
    base: Tables = {
        "model": model | {"random_weights": True},
        "data": {"sources": [{"path": "."}]},
        "training": {"steps": PAYS_FROM, "precision": "fp32" if device == "cpu" else "bf16", "batch_size": samples},
    }
    return Config.model_validate(merged(base, tables))


def draw_on(family: Family, device: str) -> None:
    """Let a family draw its networks' random weights on the device, where that takes seconds."""

    def load(part: str, place: Any, dtype: torch.dtype | None) -> Any:
        if str(place) == "meta":
            return family.empty(part)
        configured = getattr(family.config, part).dtype

        def draw() -> Any:
            return fill(family.empty(part), torch.device(device), dtype or torch.bfloat16)

        module = load_quantized(family, part, draw, dtype) if configured in QUANTIZED else draw()
        return module.to(place)

    family.load = load  # type: ignore[method-assign]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def emptied() -> Iterator[None]:
    """What a run leaves on the device is gone afterwards."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- techniques ------------------------------------------------------------------------------------------------------


def compare(technique: Technique, model: dict[str, Any], device: str, steps: int) -> tuple[int, int, float]:
    """(Bytes without, bytes with, time with over time without)."""
    bucket = technique.buckets[device]
    ways = [technique.without, merged(technique.without, technique.change)]
    found: list[int] = []
    if device == "cuda":  # one after the other: the allocator counts all that is there
        times = []
        for tables in ways:
            with emptied():
                run = started(model, tables, bucket, device)
                found.append(size_of(run, technique))
                times.append(statistics.median(run.timed() for _ in range(steps)))
                del run
        return found[0], found[1], times[1] / times[0]
    runs = [started(model, tables, bucket, device) for tables in ways]
    found = [size_of(run, technique) for run in runs]
    pairs = [(runs[0].timed(), runs[1].timed()) for _ in range(steps)]
    return found[0], found[1], statistics.median(after / before for before, after in pairs)


def size_of(run: Run, technique: Technique) -> int:
    peak = run.peak()
    return run.weights() if technique.of_weights else peak


def techniques(model: dict[str, Any], deep: dict[str, Any], device: str, steps: int, only: str) -> None:
    print("| technique | what trains | of | without | with | change | claimed | time |\n|" + "---|" * 8)
    for one in TECHNIQUES:
        if only not in one.name:
            continue
        before, after, ratio = compare(one, deep if one.deep else model, device, steps)
        of, change = "weights" if one.of_weights else "peak", f"{after / before - 1:+.0%}"
        cells = [of, f"{before / MB:,.1f} MB", f"{after / MB:,.1f} MB", change, one.claim, f"x {ratio:.2f}"]
        print("| " + " | ".join((one.name, one.trains, *cells)) + " |", flush=True)


# -- real sizes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """A LoRA at the size at which others publish figures."""

    family: str
    variant: str
    bucket: Bucket
    samples: int = 1
    published: tuple[float, float] | None = None
    """Seconds of a step and GiB: SimpleTuner on an H100."""
    tables: Tables = field(default_factory=dict)
    note: str = ""


def hosted(blocks: int, activations: bool = True, kind: Any = True) -> Tables:
    """So many blocks in the host's memory, and what blocks keep if it says so."""
    memory = {"offload_blocks": blocks, "offload_activations": activations}
    return {"memory": memory, "training": {"activation_checkpointing": kind}}


WHOLE: Tables = {"training": {"activation_checkpointing": False}}
VIDEO, PICTURE = Bucket(81, 480, 832), Bucket(1, 1024, 1024)
SHORT, SMALL_WAN, WAN = (7.68, 26.4), (2.10, 4.7), (7.16, 16.3)
REAL = (
    Real("wan", "t2v-1.3b", VIDEO, published=(1.41, 71.9), tables=WHOLE, note="nothing again"),
    Real("wan", "t2v-1.3b", VIDEO, published=SMALL_WAN),
    Real("wan", "t2v-1.3b", VIDEO, published=SMALL_WAN, tables=hosted(30, kind="nested"), note="nested, all elsewhere"),
    Real("wan", "t2v-14b", VIDEO, published=WAN),
    Real("wan", "t2v-14b", VIDEO, published=WAN, tables=merged(stored("fp8"), hosted(38)), note="fp8, on the host: 38"),
    Real("wan", "t2v-14b", VIDEO, tables=merged(stored("fp8"), hosted(38, kind="nested")), note="the same, nested"),
    Real("qwen_image", "base", PICTURE, published=(1.20, 41.0)),
    Real("qwen_image", "base", PICTURE, published=(1.20, 41.0), tables=hosted(9, False), note="on the host: 9 blocks"),
    Real("z_image", "base", PICTURE, published=(0.243, 21.3), tables=WHOLE, note="nothing again"),
    Real("z_image", "base", PICTURE, published=(0.479, 12.9)),
    Real("z_image", "base", PICTURE, published=(0.479, 12.9), tables=hosted(11, False), note="on the host: 11 blocks"),
    Real("hunyuan_video15", "480p-t2v", Bucket(49, 480, 832), samples=2, published=SHORT),
    Real("hunyuan_video15", "480p-t2v", Bucket(49, 480, 832), 2, SHORT, hosted(0), "activations on the host"),
)
"""As published, and in no more memory than that by the forecast of `kinema plan`; the smallest is for 12 GB."""


def real_sizes(steps: int, only: str) -> None:
    name = torch.cuda.get_device_name()
    rated = next((one.flops for one in KNOWN.values() if one.name in name), None)
    print(f"{name}, torch {torch.__version__}")
    print("| model | size | with | s a step | peak | MFU | published | time, memory of it |\n|" + "---|" * 8)
    for one in REAL:
        if only not in f"{one.family} {one.variant} {one.note}":
            continue
        model = {"family": one.family, "variant": one.variant}
        tables = merged(LORA, AGAIN, one.tables)
        compiles = settled(configured(model, tables, "cuda", one.samples), torch.device("cuda"), None)
        tables = merged(tables, {"training": {"compile": compiles}})
        try:
            with emptied():
                run = started(model, tables, one.bucket, "cuda", one.samples)
                peak = run.peak()
                seconds = statistics.median(run.timed() for _ in range(steps))
                del run
        except torch.cuda.OutOfMemoryError:
            print(f"| {one.family} {one.variant} | {one.bucket} | {one.note} | does not fit |", flush=True)
            continue
        share = "" if rated is None else f"{flops(model, one) / seconds / rated:.1%}"
        cells = [f"{one.family} {one.variant}", f"{one.bucket} x {one.samples}", one.note]
        cells += [f"{seconds:.3f}", f"{peak / GIB:.1f} GiB", share]
        if one.published is not None:
            theirs, size = one.published
            cells += [f"{theirs:g} s, {size:g} GiB", f"{seconds / theirs:.2f}, {peak / GIB / size:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def flops(model: dict[str, Any], one: Real) -> float:
    """Of a step without anything computed again."""
    config = configured(model, LORA, "cuda", one.samples)
    whole = DryNetworks(config, open_family(config.model), "bf16").run(one.bucket, one.samples, False)
    return sum(segment.flops for segment in (*whole.forward, *whole.backward))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each training")
    parser.add_argument("--only", default="", help="rows that have this in their name")
    parser.add_argument("--gpu", action="store_true", help="real-size networks beside published figures")
    options = parser.parse_args()
    if options.gpu:
        if not torch.cuda.is_available():
            raise SystemExit("--gpu: there is none here")
        real_sizes(options.steps, options.only)
    elif torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: Wan 2.1 1.3B, random weights")
        model = {"family": SMALL.family, "variant": SMALL.variant}
        techniques(model, model, "cuda", options.steps, options.only)
    else:
        torch.set_num_threads(1)
        adam.PIECE_BYTES = PIECE_BYTES
        print(f"A CPU, one thread, torch {torch.__version__}: a Wan of 8M parameters, where deep of 31M")
        with tempfile.TemporaryDirectory() as root:
            model, deep = (
                {"family": SMALL.family, "variant": SMALL.variant, "path": str(write(small, Path(root, name)))}
                | {"text_length": 64}
                for name, small in (("small", SMALL), ("deep", DEEP))
            )
            techniques(model, deep, "cpu", options.steps, options.only)


if __name__ == "__main__":
    main()
