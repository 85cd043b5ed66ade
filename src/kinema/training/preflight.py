"""What is decided and checked when a training starts, before anything expensive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.schema import Config
from kinema.errors import UserError

if TYPE_CHECKING:
    import torch

    from kinema.parallel.mesh import World


def resolve(config: Config, device: torch.device) -> Config:
    """The configuration with everything decided that depends on the machine, and torch set up accordingly."""
    import torch

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if config.run.deterministic and device.type == "cuda":
        import os

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself with a fixed workspace
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if config.training.precision != "auto":
        return config
    precision = "bf16" if computes_in_bf16(device) else "fp32"
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself; where it does not, bf16 is slower than fp32 by far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_shares(config: Config, world: World) -> None:
    """UserError for a global batch that leaves devices without a sample."""
    training = config.training
    given = [(f"training.batch_sizes.{i}.size", rule.size) for i, rule in enumerate(training.batch_sizes)]
    if training.batch_size != "auto" and training.token_budget is None:
        given.insert(0, ("training.batch_size", training.batch_size))
    for key, size in given:
        if size < world.dp_size:
            raise UserError(
                f"{key} = {size} is the batch over all devices, and this run has {world.dp_size}: "
                f"{world.dp_size - size} of them would have nothing to do. Set it to a multiple of {world.dp_size}."
            )


def make_writable(directory: Path) -> None:
    """Make the run directory; UserError where nothing can be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write to {directory} ({error.strerror}). Choose another with --run.dir."
        ) from None
