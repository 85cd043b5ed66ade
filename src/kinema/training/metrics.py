"""What a run writes about itself: ``metrics.jsonl``, TensorBoard events, optionally Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
from pathlib import Path
from typing import Any

from kinema.config.schema import MonitoringConfig
from kinema.errors import UserError
from kinema.runs.metrics import read_metrics

WANDB_ID = "wandb-id"


def check_monitoring(config: MonitoringConfig) -> None:
    """UserError for a tracker that is asked for and not installed."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("monitoring.wandb needs the package wandb: pip install 'kinema[wandb]', or remove the key.")


class Metrics:
    """Writes scalars of a step to every place that the configuration names; does nothing off the main rank.

    A resumed run first takes back what an earlier process wrote after the step it resumes from, so that every
    step stands in the file once.
    """

    def __init__(
        self,
        directory: Path,
        config: MonitoringConfig,
        resume_step: int,
        run_config: dict[str, Any],
        main: bool,
    ) -> None:
        self._file = self._tensorboard = self._wandb = None
        if not main:
            return
        path = directory / "metrics.jsonl"
        _forget_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)
        if config.wandb is not None:
            self._wandb = _start_wandb(config.wandb, directory, run_config)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of ``metrics.jsonl``: ``{"step": step, ...}``. Values that are not finite become null."""
        if self._file is None:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _forget_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)


def _start_wandb(project: str, directory: Path, run_config: dict[str, Any]) -> Any:
    import wandb

    # A resumed run goes on in the same W&B run: its id lies in the run directory.
    known = directory / WANDB_ID
    if not known.exists():
        known.write_text(secrets.token_hex(8) + "\n")
    return wandb.init(
        project=project,
        id=known.read_text().strip(),
        name=directory.resolve().name,
        dir=str(directory),
        resume="allow",
        config=run_config,
    )
