"""Tensor parallel trainings that must give what one process gives.

Two kinds: tiny models of families through the real loop (`pipeline_cases.Plan` says which), and networks in float64
whose every gradient is compared. `main` runs them one after the other on the same processes, and rank 0 leaves each
result in the directory; the tests run the same functions in one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipeline_cases import SAMPLES, Plan, configured, share, trainer_of
from ranks import run_cases
from torch import Tensor, nn

from kinema.adapters.inject import adapter_state, add_adapter, diffusers_name
from kinema.config.schema import AdapterConfig, OptimizerConfig
from kinema.families.pipeline_plans import pipeline_units
from kinema.memory.checkpointing import checkpoint_blocks
from kinema.memory.compile import compile_blocks
from kinema.objectives.base import Loss
from kinema.optim.ema import Ema
from kinema.optim.optimizers import build_optimizers
from kinema.parallel.data import accumulate, check_equal_weights, shard
from kinema.parallel.lanes import collected
from kinema.parallel.mesh import Sizes, World
from kinema.parallel.packing import packings, whole
from kinema.parallel.pipeline import Pipeline
from kinema.parallel.pipeline_stages import cut, partition
from kinema.parallel.sequence import split_sequences
from kinema.parallel.tensor import split_matrices
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.clipping import clip_gradients
from kinema.training.loop import train_step
from kinema.training.state import load_training_state, training_state

Result = dict[str, Any]
Call = Callable[[nn.Module, torch.Generator], Tensor]
CLIP_NORM = 0.01
"""In float64 every norm is above it."""


def gathered(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in their own order, by the network's names."""
    packed = packings(network)
    return {name: whole(tensor.detach(), packed.get(name)).clone() for name, tensor in tensors.items()}


# -- through the loop ------------------------------------------------------------------------------------------------


def train(world: World, plan: Plan, root: Path) -> Result:
    """Losses, norms and weights of a family's tiny model after some steps of `train_step`."""
    config, family = configured(plan, root)
    trainer = trainer_of(world, config, family, start_adapters=False)  # one process and peers draw them alike
    samples = torch.load(root / f"{plan.model}.pt", weights_only=True)
    losses, norms = [], []
    for _ in range(plan.steps):
        result = train_step(trainer, share(world, samples, config), 0)
        trainer.progress = trainer.progress.after_step(SAMPLES, 0.0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = {}
    for part, network in trainer.networks["student"].networks.items():  # type: ignore[attr-defined]
        own = {name: p for name, p in network.named_parameters() if p.requires_grad}
        weights |= {f"{part}.{name}": value for name, value in gathered(network, own).items()}
    return {"losses": losses, "norms": norms, "weights": weights, "shared": len(packings(network))}


# -- in float64 ------------------------------------------------------------------------------------------------------


def _open_sora(fused: bool) -> tuple[nn.Module, dict[str, nn.ModuleList], Call]:
    from kinema.networks.open_sora import OpenSoraTransformer

    network = OpenSoraTransformer(
        in_channels=8,
        patch_size=1,
        vec_in_dim=10,
        context_in_dim=12,
        hidden_size=48,
        num_heads=4,
        mlp_ratio=1.09,  # 52: of two peers 26 each, which FSDP2 over 4 cuts unevenly
        depth=1,
        depth_single_blocks=2,
        axes_dim=(4, 4, 4),
        fused_qkv=fused,
        cond_embed=False,
    )

    def call(network: nn.Module, generator: torch.Generator) -> Tensor:
        draw = _drawing(generator)
        return network(
            hidden_states=draw(2, 6, 8),
            timestep=torch.tensor([0.3, 0.7]),
            encoder_hidden_states=draw(2, 5, 12),
            pooled_projections=draw(2, 10),
            img_ids=torch.arange(18.0).view(6, 3),
            return_dict=False,
        )[0]

    return network, {"double_blocks": network.double_blocks, "single_blocks": network.single_blocks}, call


def _flux() -> tuple[nn.Module, dict[str, nn.ModuleList], Call]:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )

    def call(network: nn.Module, generator: torch.Generator) -> Tensor:
        draw = _drawing(generator)
        return network(
            hidden_states=draw(2, 6, 8),
            encoder_hidden_states=draw(2, 5, 12),
            pooled_projections=draw(2, 10),
            timestep=torch.tensor([0.3, 0.7], dtype=torch.float64),
            img_ids=torch.arange(18.0).view(6, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]

    blocks = {"transformer_blocks": network.transformer_blocks}
    return network, blocks | {"single_transformer_blocks": network.single_transformer_blocks}, call


def _wan() -> tuple[nn.Module, dict[str, nn.ModuleList], Call]:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )

    def call(network: nn.Module, generator: torch.Generator) -> Tensor:
        draw = _drawing(generator)
        return network(
            hidden_states=draw(2, 4, 2, 4, 4),
            timestep=torch.tensor([300.0, 700.0]),
            encoder_hidden_states=draw(2, 5, 16),
            return_dict=False,
        )[0]

    return network, {"blocks": network.blocks}, call


NETWORKS: dict[str, Callable[[], tuple[nn.Module, dict[str, nn.ModuleList], Call]]] = {
    "flux": _flux,
    "wan": _wan,
    "open_sora": lambda: _open_sora(False),
    "open_sora_fused": lambda: _open_sora(True),
}


def _drawing(generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def built(world: World, name: str, lora: bool, compiled: bool = False) -> tuple[nn.Module, Call]:
    """A network with random weights in float64, laid over the processes as ``load_networks`` does it; with its blocks
    compiled, and run again in the backward pass."""
    network, blocks, call = NETWORKS[name]()
    torch.manual_seed(5)
    for parameter in network.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * scale
    if lora:
        add_adapter(network, AdapterConfig(rank=3), [r".*blocks\..*", "proj_out|final_layer.linear"], seed=4)
        generator = torch.Generator().manual_seed(6)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    if world.size > 1:
        check_equal_weights(network, world)
    units = pipeline_units(network, blocks)
    split_matrices(network, world)
    split_sequences(network, blocks, world)
    if compiled:
        checkpoint_blocks(blocks)
        compile_blocks(blocks, "aot_eager")
    if world.sizes.pp > 1:
        starts = partition([unit.name for unit in units], [1] * len(units), world.sizes.pp, "uniform")
        cut(network, units, starts, world.place["pp"], world.sizes.pp)
    shard(network, blocks, world)
    return network, call


class Passes:
    """Forward and backward of samples that depend on a number alone, one a micro-batch."""

    def __init__(self, world: World, network: nn.Module, call: Call) -> None:
        self.world, self.network, self.call = world, network, call
        self.pipeline = Pipeline({"network": network}, world) if world.sizes.pp > 1 else None

    def __call__(self, seeds: range) -> float:
        """Sums gradients over all of them, on whichever process; returns the loss."""
        mine, share = seeds[self.world.dp_rank :: self.world.dp_size], 1 / self.world.sizes.sp
        if self.pipeline is None:
            losses = [self._one(seed, share, seed == mine[-1]) for seed in mine]
        else:
            losses = self.pipeline.run([partial(self._loss, seed) for seed in mine], share)
            with accumulate(self.network):  # sums over the other dimensions of the mesh
                pass
            self.pipeline.sum_shared()
        return self.world.all_reduce_sum(sum(one.total.item() for one in losses))

    def _one(self, seed: int, share: float, last: bool) -> Loss:
        with accumulate(self.network, last):
            loss = self._loss(seed)
            (loss.total * share).backward()
        return loss

    def _loss(self, seed: int) -> Loss:
        total = self.call(self.network, torch.Generator().manual_seed(seed)).square().mean() / SAMPLES
        return Loss(total, total.detach(), {})


def gradients(world: World, name: str, lora: bool, compiled: bool = False) -> Result:
    """Loss and clipped gradients of a batch."""
    network, call = built(world, name, lora, compiled)
    passes = Passes(world, network, call)
    loss = passes(range(SAMPLES))
    trained = {name: p for name, p in network.named_parameters() if p.grad is not None}
    norm = clip_gradients(trained.values(), CLIP_NORM, passes.pipeline)
    found = gathered(network, {name: p.grad for name, p in trained.items() if p.grad is not None})
    return {"loss": loss, "norm": norm.item(), "gradients": of_all_stages(world, found)}


def of_all_stages(world: World, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of all processes; what several have must be the same on all, but for rounding."""
    together: dict[str, Tensor] = {}
    for theirs in world.gather_objects({name: tensor.clone() for name, tensor in mine.items()}):
        for name, tensor in theirs.items():
            torch.testing.assert_close(together.setdefault(name, tensor), tensor, rtol=1e-12, atol=1e-15)
    return together


def states(world: World, name: str, lora: bool, root: Path, optimizer: str) -> Result:
    """Two steps from a checkpoint that one process wrote after its first two; what was loaded, what is saved, what is
    exported."""
    network, call = built(world, name, lora)
    networks = {"network": network}
    parameters = named_trainables(networks)
    matrices = {one for one, p in parameters.items() if p.ndim == 2 and "blocks" in one}
    config = OptimizerConfig(type=optimizer, lr=1e-3, weight_decay=0.1)
    optimizers, ema = build_optimizers(parameters, matrices, config), Ema(parameters.items(), 0.9)
    passes = Passes(world, network, call)
    written = root / f"{name}-{lora}-{optimizer}"
    mine = Checkpointer(written / "-".join(map(str, dataclasses.astuple(world.sizes))), 2, world.size > 1, world)

    def steps(first: int) -> None:
        for step in (first, first + 1):
            passes(range(10 * step, 10 * step + SAMPLES))
            clip_gradients([p for p in parameters.values() if p.grad is not None], CLIP_NORM, passes.pipeline)
            for one in optimizers:
                one.step()
                one.zero_grad()
            ema.update(step + 1)

    if world.size == 1:
        steps(0)
        mine.save(2, training_state(networks, optimizers, ema), {})
    else:
        load_training_state(mine, written / "1-1-1-1-1" / "step-00000002", networks, optimizers, ema)
    before = everything(world, networks, optimizers, ema)
    steps(2)
    mine.save(4, training_state(networks, optimizers, ema), {})
    mine.wait_for_staging()
    after = everything(world, networks, optimizers, ema)
    for parameter in parameters.values():  # while it is written
        parameter.data.zero_()
    mine.close()

    networks = {"network": built(world, name, lora)[0]}
    parameters = named_trainables(networks)
    optimizers, ema = build_optimizers(parameters, matrices, config), Ema(parameters.items(), 0.9)
    mine = Checkpointer(mine.root, 2, False, world)
    load_training_state(mine, mine.root / "step-00000004", networks, optimizers, ema)
    returned = everything(world, networks, optimizers, ema)
    assert all(torch.equal(value, returned[key]) for key, value in after.items()), "not what was saved"
    here = adapter_state(networks["network"]) if lora else networks["network"].state_dict()
    exported = exportable(world, networks["network"], here)
    return {"before": before, "after": after, "exported": exported, "written": str(mine.root / "step-00000004")}


def exportable(world: World, network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors by their diffusers names as an export gets them, one at a time on the main process."""
    packed = {diffusers_name(name) or name: packing for name, packing in packings(network).items()} | packings(network)
    tensors = collected(state, lambda name, value: whole(value, packed.get(name)).detach(), world)
    return {name: value.clone() for name, value in tensors if world.is_main}


def everything(world: World, networks: Any, optimizers: Any, ema: Ema) -> dict[str, Tensor]:
    """All tensors of the training, whole."""
    network = networks["network"]
    names = {parameter: name for name, parameter in named_trainables(networks).items()}
    packed = {f"network.{name}": packing for name, packing in packings(network).items()}
    found = {f"networks.{n}": whole(p.detach(), packed.get(n)) for p, n in names.items()}
    found |= {f"ema.{n}": whole(value, packed.get(n)) for n, value in ema.state().items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = names[parameter]
            for key, value in state.items():
                found[f"optimizer.{name}.{key}"] = whole(value, packed.get(name))
    return of_all_stages(world, found)


# -- on several processes --------------------------------------------------------------------------------------------


def sizes_of(text: str) -> Sizes:
    """Such as "dp_shard2-tp2"."""
    return Sizes(**{one.rstrip("0123456789"): int(one[-1]) for one in text.split("-")})


def run(world: World, case: str, root: Path) -> Result:
    """``gradients NETWORK KIND``, ``compiled NETWORK KIND``, ``states NETWORK KIND OPTIMIZER``, or the name of a
    plan."""
    what, *rest = case.split()
    if what in ("gradients", "compiled"):
        return gradients(world, rest[0], rest[1] == "lora", what == "compiled")
    if what == "states":
        return states(world, rest[0], rest[1] == "lora", root, rest[2])
    sizes = "-".join(f"{key}{size}" for key, size in dataclasses.asdict(world.sizes).items() if size > 1)
    return train(world, dataclasses.replace(Plan.of(case), sizes=sizes), root)


def main(root: Path, cases: list[str]) -> None:
    """``cases``: each as ``SIZES:CASE``."""
    run_cases(
        root,
        cases,
        lambda one, _: sizes_of(one.partition(":")[0]),
        lambda world, one, root: run(world, one.partition(":")[2], root),
    )
