"""Trainings through a pipeline that must give what one process gives, each a function of a World.

The test writes tiny models with encoded samples into a directory (`write_model`); `main` runs cases, named
as `Plan.name` writes them, one after the other on several processes, and rank 0 leaves each result there.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_cases
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))

import cases
from lagging import LaggingCopies
from zoo import NEGATIVE, PROMPT, Case, batch_of, config_of, encode, family_of, tiny_directory

from kinema.config.memory import MemoryConfig
from kinema.config.schema import Config
from kinema.dtypes import torch_dtype
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.memory.activations import offload_activations
from kinema.objectives.flow import flow_matching
from kinema.optim.ema import Ema
from kinema.optim.optimizers import build_optimizers
from kinema.parallel import packing
from kinema.parallel.data import accumulate
from kinema.parallel.mesh import Sizes, World
from kinema.parallel.packing import packings
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.evaluation import evaluate
from kinema.training.export import export_weights
from kinema.training.loop import Trainer, Work, train_step
from kinema.training.networks import FamilyDenoiser, block_matrices, evaluating, load_networks, pipeline_over
from kinema.training.progress import Progress
from kinema.training.state import training_state

Result = dict[str, Any]
ALL: dict[str, Case] = {
    case.id: case
    for module in pkgutil.iter_modules(cases.__path__)
    for case in importlib.import_module(f"cases.{module.name}").CASES
}
SAMPLES = 4
"""In a global batch."""
CLIP_NORMS = {"full": 0.005, "lora": 0.0005}
"""Below the norm of every gradient of every case."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A case: what trains, how it is laid out, for how many steps."""

    model: str
    sizes: str = ""
    """Such as "pp2-dp_shard2"."""
    lora: bool = False
    steps: int = 3
    settings: tuple[tuple[str, Any], ...] = ()
    """Further keys of ``[parallel]`` and, with dots, of other tables."""

    @property
    def name(self) -> str:
        said = [f"{key}={value}" for key, value in self.settings]
        return "+".join([self.model, self.sizes, "lora" if self.lora else "full", str(self.steps), *said])

    @classmethod
    def of(cls, name: str) -> Plan:
        model, sizes, kind, steps, *said = name.split("+")
        settings = tuple((key, _value(value)) for key, value in (one.split("=") for one in said))
        return cls(model, sizes, kind == "lora", int(steps), settings)

    @property
    def alone(self) -> Plan:
        """The same training in one process."""
        mine = tuple((key, value) for key, value in self.settings if "." in key and key != "training.compile")
        mine += tuple((key, value) for key, value in self.settings if key == "files")
        return Plan(self.model, "", self.lora, self.steps, mine)

    def mesh(self) -> Sizes:
        return Sizes(**{one.rstrip("0123456789"): int(one[-1]) for one in self.sizes.split("-") if one})


def _value(text: str) -> Any:
    if "," in text:
        return tuple(text.split(","))
    if re.fullmatch(r"[\d.]+", text):
        return float(text) if "." in text else int(text)
    return {"True": True, "False": False}.get(text, text)


# -- models ----------------------------------------------------------------------------------------------------------


def write_model(name: str, root: Path) -> None:
    """The tiny model of a case and two encoded samples."""
    case = ALL[name]
    if (root / f"{name}.pt").exists():
        return
    directory = tiny_directory(case, root)
    family = family_of(case, directory)
    parts = {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}
    torch.save([encode(case, family, parts, caption) for caption in (PROMPT, NEGATIVE)], root / f"{name}.pt")


def configured(plan: Plan, root: Path) -> tuple[Config, Family]:
    case = ALL[plan.model]
    tables: dict[str, Any] = {}
    of_plan = {key: value for key, value in plan.settings if "." not in key and key != "files"}
    mesh = {key: size for key, size in dataclasses.asdict(plan.mesh()).items() if size > 1}
    tables["parallel"] = of_plan | mesh
    clip_norm = CLIP_NORMS["lora" if plan.lora else "full"]
    tables["training"] = {"steps": plan.steps, "batch_size": SAMPLES, "precision": "fp32", "clip_norm": clip_norm}
    tables["export"] = {"dtype": "fp32", "layouts": ["diffusers"]}
    tables["optimizer"] = {"lr": 1e-3, "weight_decay": 0.1}
    if plan.lora:
        tables["adapter"] = {"rank": 2}
    for key, value in plan.settings:
        if "." in key:
            *path, last = key.split(".")
            table = tables
            for one in path:
                table = table.setdefault(one, {})
            table[last] = value
    config = config_of(case, root / case.id, root, **tables)
    return config, open_family(config.model)


# -- one training ----------------------------------------------------------------------------------------------------


def trainer_of(world: World, config: Config, family: Family, start_adapters: bool = True) -> Trainer:
    """As a run makes it. What ``memory.offload_activations`` moves goes nowhere on a CPU, but late."""
    networks = load_networks(config.model_copy(update={"memory": MemoryConfig()}), family, world)
    for network in networks.values() if config.memory.offload_activations else ():
        offload_activations(family.blocks(network), LaggingCopies(), smallest=256)
    if start_adapters and config.adapter is not None:
        _start_adapters(networks)
    parameters = named_trainables(networks)

    @contextmanager
    def accumulating(last: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(accumulate(network, last))
            yield

    return Trainer(
        config=config,
        world=world,
        networks={"student": FamilyDenoiser(family, networks)},
        parameters=parameters,
        objective=flow_matching(config.objective, family),
        optimizers=build_optimizers(parameters, block_matrices(networks, family), config.optimizer),
        compute_dtype=torch_dtype(config.training.precision),
        progress=Progress(),
        total_steps=config.training.steps or 0,
        ema=Ema(parameters.items(), 0.9),
        pipeline=pipeline_over(networks, config, world),
        accumulating=accumulating,
    )


def _start_adapters(networks: Mapping[str, Any]) -> None:
    """Not at zero, where half of an adapter has no gradient: a function of the parameter's name."""
    for name, parameter in named_trainables(networks).items():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        with torch.no_grad():
            local.fill_(0.02 + 0.001 * (sum(map(ord, name)) % 17))


def train(world: World, plan: Plan, root: Path) -> Result:
    """Steps of `train_step` on this rank's share of a global batch, one sample a micro-batch unless the plan says
    otherwise; the loss on a held-out batch; what the averages predict."""
    config, family = configured(plan, root)
    trainer = trainer_of(world, config, family)
    samples = torch.load(root / f"{plan.model}.pt", weights_only=True)
    if config.model.train:  # text encoders that train run in every step
        encoded = [name for name in samples[0] if name.startswith(("text", "pooled"))]
        samples = [{name: one[name] for name in one if name not in encoded} for one in samples]
    losses, norms = [], []
    for _ in range(plan.steps):
        result = train_step(trainer, share(world, samples, config), 0)
        trainer.progress = trainer.progress.after_step(SAMPLES, 0.0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    networks = dict(trainer.networks["student"].networks)  # type: ignore[attr-defined]
    assert trainer.ema is not None
    if dict(plan.settings).get("files"):
        write_files(world, trainer, networks, family, root / plan.name)
    averages = whole(world, trainer.ema.state(), networks)
    weights = whole(world, {name: p.detach() for name, p in trainer.parameters.items()}, networks)
    with evaluating(networks.values()):
        batches = [share(world, samples, config).batch]
        held_out = evaluate("set", batches, trainer.objective, trainer.networks, 5, world)
    return {
        "losses": losses,
        "norms": norms,
        "clip_norm": config.training.clip_norm,
        "weights": weights,
        "averages": averages,
        "held_out": held_out["set/loss"],
    }


def assert_alike(got: Result, want: Result, plan: Plan) -> None:
    """What a plan's ranks left, against one process."""
    for kind in ("losses", "norms", "held_out"):
        assert got[kind] == pytest.approx(want[kind], rel=1e-5), f"{plan.name}: {kind}"
    assert min(want["norms"]) > 1.2 * want["clip_norm"], f"{plan.name}: clipping was not in force"
    for kind in ("weights", "averages"):
        assert got[kind].keys() == want[kind].keys()
        for name, weight in want[kind].items():
            norm = pytest.approx(weight.norm().item(), rel=1e-5, abs=1e-7)
            assert got[kind][name].norm().item() == norm, f"{plan.name}: {name}"
            # AdamW turns the rounding of a gradient near zero into a part of a step of 1e-3.
            assert (got[kind][name] - weight).abs().max().item() < 2e-4, f"{plan.name}: {name}"


def write_files(world: World, trainer: Trainer, networks: Mapping[str, Any], family: Family, root: Path) -> None:
    """A checkpoint and an export."""
    checkpointer = Checkpointer(root, 1, True, world)
    step = trainer.progress.step
    checkpointer.save(step, training_state(networks, trainer.optimizers, trainer.ema), {})
    checkpointer.close()
    export_weights(root / "exports", step, family, networks, trainer.config, world)


def share(world: World, samples: list[dict[str, Tensor]], config: Config) -> Work:
    chosen = [samples[i % 2] for i in range(SAMPLES)]
    batch = batch_of(*chosen, captions=[(PROMPT, NEGATIVE)[i % 2] for i in range(SAMPLES)])
    size = SAMPLES // world.dp_size
    mine = batch.select(list(range(world.dp_rank * size, (world.dp_rank + 1) * size)))
    return Work(mine, SAMPLES, config.training.micro_batch_size or 1, 0.0)


def whole(world: World, tensors: Mapping[str, Tensor], networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors of all stages in their own order; those that several stages have must be the same on all."""
    packed = {f"{part}.{name}": how for part, one in networks.items() for name, how in packings(one).items()}
    mine = {name: packing.whole(tensor, packed.get(name)).clone() for name, tensor in tensors.items()}
    together: dict[str, Tensor] = {}
    for theirs in world.gather_objects(mine):
        for name, tensor in theirs.items():
            assert torch.equal(together.setdefault(name, tensor), tensor), f"{name} differs between processes"
    return together


def main(root: Path, names: list[str]) -> None:
    def run(world: World, name: str, root: Path) -> Result:
        return train(world, Plan.of(name), root)

    run_cases(root, names, lambda name, _: Plan.of(name).mesh(), run)
