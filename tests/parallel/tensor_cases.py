"""Tensor parallel trainings that must give what one process gives.

Two kinds: tiny models of families through the real loop (`pipeline_cases.Plan` says which), and networks in float64
whose every gradient is compared. ``torchrun --nproc-per-node 2 tensor_cases.py DIRECTORY CASE...`` runs them one after
the other on the same processes and leaves rank 0's results there; the tests run the same functions in one process.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pipeline_cases
import torch
from pipeline_cases import SAMPLES, Plan, configured, share, trainer_of
from torch import Tensor, nn

from kinema.config.schema import AdapterConfig, OptimizerConfig, ParallelConfig
from kinema.optim.ema import Ema
from kinema.optim.optimizers import build_optimizers
from kinema.parallel.data import accumulate, check_equal_weights, shard
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop
from kinema.parallel.packing import packings, whole
from kinema.parallel.tensor import split_matrices
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.clipping import clip_gradients
from kinema.training.export import _gathered
from kinema.training.loop import train_step
from kinema.training.state import load_training_state, training_state

Result = dict[str, Any]
Call = Callable[[nn.Module, torch.Generator], Tensor]


def gathered(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in their own order, by the network's names."""
    packed = packings(network)
    return {name: whole(tensor.detach(), packed.get(name)).clone() for name, tensor in tensors.items()}


# -- through the loop ------------------------------------------------------------------------------------------------


def train(world: World, plan: Plan, root: Path) -> Result:
    """Losses, norms and weights of a family's tiny model after some steps of `train_step`."""
    config, family = configured(plan, root)
    pipeline_cases._start_adapters = lambda networks: None  # real ones, which one process and peers draw alike
    trainer = trainer_of(world, config, family)
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

    return network, {"double": network.double_blocks, "single": network.single_blocks}, call


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

    return network, {"double": network.transformer_blocks, "single": network.single_transformer_blocks}, call


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


def built(world: World, name: str, lora: bool) -> tuple[nn.Module, Call]:
    """A network with random weights in float64, laid over the processes as ``load_networks`` does it."""
    network, blocks, call = NETWORKS[name]()
    torch.manual_seed(5)
    for parameter in network.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * scale
    if lora:
        from kinema.adapters.inject import add_adapter

        add_adapter(network, AdapterConfig(rank=3), [r".*blocks\..*", "proj_out|final_layer.linear"], seed=4)
        generator = torch.Generator().manual_seed(6)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    if world.size > 1:
        check_equal_weights(network, world)
    split_matrices(network, world)
    shard(network, blocks, world)
    return network, call


def gradients(world: World, name: str, lora: bool) -> Result:
    """Loss and gradients of samples, one a micro-batch, that depend on their place in the batch alone."""
    network, call = built(world, name, lora)
    total = 0.0
    mine = range(world.dp_rank, 4, world.dp_size)
    for index in mine:
        with accumulate(network, last=index == mine[-1]):
            loss = call(network, torch.Generator().manual_seed(index)).square().mean() / 4
            loss.backward()
        total += loss.item()
    trained = {name: p for name, p in network.named_parameters() if p.grad is not None}
    clip = clip_gradients(trained.values(), 0.1)
    found = gathered(network, {name: p.grad for name, p in trained.items() if p.grad is not None})
    return {"loss": world.all_reduce_sum(total), "norm": clip.item(), "gradients": found}


def states(world: World, name: str, lora: bool, root: Path, optimizer: str) -> Result:
    """Two steps from a checkpoint that one process wrote after its first two; what was loaded, what is saved, what is
    exported."""
    network, call = built(world, name, lora)
    networks = {"network": network}
    parameters = named_trainables(networks)
    matrices = {one for one, p in parameters.items() if p.ndim == 2 and "blocks" in one}
    config = OptimizerConfig(type=optimizer, lr=1e-3, weight_decay=0.1)
    optimizers, ema = build_optimizers(parameters, matrices, config), Ema(parameters.items(), 0.9)
    written = root / f"{name}-{lora}-{optimizer}"
    mine = Checkpointer(written / "-".join(map(str, dataclasses.astuple(world.sizes))), 2, world.size > 1, world)

    def steps(first: int) -> None:
        for step in (first, first + 1):
            for index in range(world.dp_rank, 4, world.dp_size):
                with accumulate(network, last=index + world.dp_size >= 4):
                    loss = call(network, torch.Generator().manual_seed(10 * step + index)).square().mean() / 4
                    loss.backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
            ema.update(step + 1)

    if world.size == 1:
        steps(0)
        mine.save(2, training_state(networks, optimizers, ema), {})
    else:
        load_training_state(mine, written / "1-1-1-1-1" / "step-00000002", networks, optimizers, ema)
    before = everything(networks, optimizers, ema)
    steps(2)
    mine.save(4, training_state(networks, optimizers, ema), {})
    mine.wait_for_staging()
    after = everything(networks, optimizers, ema)
    for parameter in parameters.values():  # while it is written
        parameter.data.zero_()
    mine.close()

    networks = {"network": built(world, name, lora)[0]}
    parameters = named_trainables(networks)
    optimizers, ema = build_optimizers(parameters, matrices, config), Ema(parameters.items(), 0.9)
    mine = Checkpointer(mine.root, 2, False, world)
    load_training_state(mine, mine.root / "step-00000004", networks, optimizers, ema)
    returned = everything(networks, optimizers, ema)
    assert all(torch.equal(value, returned[key]) for key, value in after.items()), "not what was saved"
    exported = _gathered(networks["network"], lora, torch.float64, world)
    return {"before": before, "after": after, "exported": exported, "written": str(mine.root / "step-00000004")}


def everything(networks: Any, optimizers: Any, ema: Ema) -> dict[str, Tensor]:
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
    return {name: tensor.clone() for name, tensor in found.items()}


# -- on several processes --------------------------------------------------------------------------------------------


def sizes_of(text: str) -> Sizes:
    """Such as "dp_shard2-tp2"."""
    return Sizes(**{one.rstrip("0123456789"): int(one[-1]) for one in text.split("-")})


def run(world: World, case: str, root: Path) -> Result:
    """``gradients NETWORK KIND``, ``states NETWORK KIND OPTIMIZER``, or the name of a plan."""
    what, *rest = case.split()
    if what == "gradients":
        return gradients(world, rest[0], rest[1] == "lora")
    if what == "states":
        return states(world, rest[0], rest[1] == "lora", root, rest[2])
    sizes = "-".join(f"{key}{size}" for key, size in dataclasses.asdict(world.sizes).items() if size > 1)
    return train(world, dataclasses.replace(Plan.of(case), sizes=sizes), root)


def main(root: Path, cases: list[str]) -> None:
    """Cases, each as ``SIZES:CASE``."""
    torch.set_num_threads(1)
    started = start(ParallelConfig(), "cpu")
    worlds: dict[str, World] = {}
    for one in cases:
        sizes, case = one.split(":")
        if sizes not in worlds:
            worlds[sizes] = lay_out(started, sizes_of(sizes))
        result = run(worlds[sizes], case, root)
        if started.is_main:
            torch.save(result, root / f"{one}.result".replace(" ", "_"))
            print("done", one, flush=True)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
