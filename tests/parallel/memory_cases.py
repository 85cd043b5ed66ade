"""What loading and exporting take of this machine's memory, on the processes that torchrun starts:
``torchrun --nproc-per-node 2 memory_cases.py DIRECTORY CASE...``. Each case leaves its findings in the directory."""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kinema.config.schema import Config, ParallelConfig
from kinema.families.registry import family_class, open_family
from kinema.optim.gradients import local_part
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop
from kinema.parallel.packing import packings, whole
from kinema.runs.checkpoint_list import list_checkpoints
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.export import export_weights
from kinema.training.networks import load_networks

FAMILY, VARIANT = "wan", "t2v-1.3b"
Facts = dict[str, Any]


def write_model(directory: Path, width: int, blocks: int) -> int:
    """A tiny model with a network of this size, stored in bf16; how many numbers it has."""
    from diffusers import WanTransformer3DModel

    family_class(FAMILY).tiny(directory.parent / "tiny", VARIANT)
    family_class(FAMILY).tiny(directory, VARIANT)
    tiny = WanTransformer3DModel.load_config(directory / "transformer")
    sizes = {"num_attention_heads": width // 64, "attention_head_dim": 64, "ffn_dim": 4 * width, "num_layers": blocks}
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config({**tiny, **sizes})
    network = network.to_empty(device="cpu").to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randint(-99, 99, parameter.shape, generator=generator, dtype=torch.int8).bfloat16() / 999
    network.save_pretrained(directory / "transformer")
    return sum(parameter.numel() for parameter in network.parameters())


def config_of(directory: Path, run: Path, **tables: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(run)},
            "model": {"family": FAMILY, "variant": VARIANT, "path": str(directory), **tables.pop("model", {})},
            "data": {"sources": [{"path": str(directory)}]},
            "training": {"steps": 1, "precision": "bf16"},
            **tables,
        }
    )


def own_memory() -> int:
    """Bytes that this process shares with no other and no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """By how many bytes this process's own memory grew, at most, inside."""
    gc.collect()
    before, highest, ended = own_memory(), [0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            highest[0] = max(highest[0], own_memory() - before)
            ended.wait(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: highest[0]
    finally:
        ended.set()
        watcher.join()


def same_weights(network: nn.Module, plain: nn.Module) -> bool:
    """Whether what is on this process, put together, has the bits of the plain network."""
    packed, expected = packings(network), plain.state_dict()
    equal = True
    for name, tensor in network.state_dict().items():
        gathered: Tensor = whole(tensor, packed.get(name)).detach()
        original = name.replace(".base_layer", "")
        if original in expected:
            theirs = expected[original]
            equal = equal and gathered.dtype == theirs.dtype and bool(torch.equal(gathered, theirs))
    return equal


def loading(world: World, root: Path, sizes: Sizes, **tables: Any) -> Facts:
    """Own memory while a network is loaded and laid out, and when it is; whether the weights are those of one process
    that loads it whole; and their bytes."""
    world = lay_out(world, sizes)
    tables["parallel"] = {name: size for name, size in asdict(sizes).items() if size > 1}
    config, small = (config_of(root / name, root / "run", **tables) for name in ("model", "tiny"))
    load_networks(small, open_family(small.model), world)  # what is imported on the way is no weights
    family = open_family(config.model)
    with peak() as grown:
        network = load_networks(config, family, world)["network"]
    found: Facts = {"peak": grown(), "here": sum(local_part(p).nbytes for p in network.parameters())}
    stored = torch.float32 if config.adapter is None else torch.bfloat16
    with peak() as grown:
        plain = family.load("network", "cpu", stored)
    return found | {"plain": grown(), "equal": same_weights(network, plain)}


def in_pieces(world: World, root: Path) -> Facts:
    """As `loading`, from a checkpoint in which every process has its part of each tensor."""
    saved = lay_out(world, Sizes(dp_shard=2))
    config = config_of(root / "model", root / "run", parallel={"dp_shard": 2})
    network = load_networks(config, open_family(config.model), saved)
    checkpointer = Checkpointer(root / "checkpoints", 1, False, saved)
    checkpointer.save(1, {"networks": named_trainables(network)}, {"config": config.model_dump(mode="json")})
    checkpointer.close()
    path = list_checkpoints(root / "checkpoints")[-1].path
    del network
    return loading(world, root, Sizes(dp_shard=2), model={"network": {"path": str(path)}})


def sharded(world: World, root: Path) -> Facts:
    """As `loading`; then own memory while the network is exported in both layouts, and whether the files hold what the
    whole network at once would be written as; the bytes of its largest tensor."""
    world = lay_out(world, Sizes(dp_shard=2))
    config, small = (
        config_of(root / name, root / "run", parallel={"dp_shard": 2}, export={"dtype": "bf16"})
        for name in ("model", "tiny")
    )
    for one in (small, config):  # what is imported on the way is no weights
        family = open_family(one.model)
        with peak() as loaded:
            networks = load_networks(one, family, world)
        with peak() as exported:
            path = export_weights(root / "exports", 1, family, networks, one, world)
    parameters = list(networks["network"].parameters())
    found: Facts = {"peak": loaded(), "here": sum(local_part(p).nbytes for p in parameters)}
    found |= {"exporting": exported(), "largest": max(p.nbytes for p in parameters)}
    with peak() as grown:
        plain = family.load("network", "cpu", torch.float32)
    state = plain.state_dict()
    original = {f"model.diffusion_model.{k}": v for k, v in family.to_original(state, "network").items()}
    single, folder = next((path / "comfyui").glob("*.safetensors")), path / "diffusers" / "transformer" / STEM
    found["files"] = all(
        files.keys() == expected.keys() and all(torch.equal(files[k], v.bfloat16()) for k, v in expected.items())
        for files, expected in ((load_file(single), original), (load_file(folder), state))
    )
    return found | {"plain": grown(), "equal": same_weights(networks["network"], plain)}


STEM = "diffusion_pytorch_model.safetensors"
CASES: dict[str, Callable[[World, Path], Facts]] = {
    "sharded": sharded,
    "matrices": lambda world, root: loading(world, root, Sizes(tp=2)),
    "stages": lambda world, root: loading(world, root, Sizes(pp=2)),
    "lora": lambda world, root: loading(world, root, Sizes(dp_shard=2), adapter={"rank": 4}),
    "dora": lambda world, root: loading(world, root, Sizes(dp_shard=2), adapter={"rank": 4, "type": "dora"}),
    "in_pieces": in_pieces,
}


def main() -> None:
    torch.set_num_threads(1)
    root, names = Path(sys.argv[1]), sys.argv[2:]
    world = start(ParallelConfig(), "cpu")
    for name in names:
        facts = world.gather_objects(CASES[name](world, root))
        if world.is_main:
            (root / f"{name}.json").write_text(json.dumps(facts))
    stop()


if __name__ == "__main__":
    main()
