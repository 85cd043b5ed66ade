"""What the training loop adds to a bare PyTorch loop on the same network: paired medians in one run.

Ours is the whole path between two steps: taking the batch, random draws, forward, backward, clipping, update, EMA off,
metrics and progress written. The bare loop holds its batch in memory and calls the network, MSE, backward,
``clip_grad_norm_`` and a fused AdamW. They take turns, step by step, on networks of the same size.

    python bench/loop_overhead.py [--steps 60]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kinema.config.load import load_config
from kinema.families.registry import open_family
from kinema.parallel.mesh import start
from kinema.shapes.models import write_model
from kinema.shapes.world import write_dataset
from kinema.training.loop import run_steps
from kinema.training.preflight import resolve
from kinema.training.progress import Progress
from kinema.training.requests import Requests
from kinema.training.resume import ResumeOptions
from kinema.training.train import Run

CONFIG = """
run.dir = "{root}/run"
data = {{ sources = [{{ path = "{root}/clips" }}], buckets = {{ sizes = [[64, 64]], frames = [17], fps = 16 }} }}
model = {{ family = "wan", path = "{root}/model", text_length = 32 }}
training = {{ steps = {steps}, batch_size = 16, precision = "fp32" }}
checkpoint = {{ every_minutes = 600 }}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps; the first ten warm up")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as root:
        write_dataset(Path(root) / "clips", 64)
        write_model(Path(root) / "model")
        path = Path(root) / "bench.toml"
        path.write_text(CONFIG.format(root=root, steps=steps))
        ours, bare = measure(load_config(path, []))
    ratios = [a / b for a, b in zip(ours[10:], bare[10:], strict=True)]
    print(f"bare loop   {1000 * statistics.median(bare[10:]):8.1f} ms a step (median of {len(ratios)})")
    print(f"kinema      {1000 * statistics.median(ours[10:]):8.1f} ms a step")
    print(f"ratio       {statistics.median(ratios):8.4f} (median of paired ratios; limit 1.02)")


def measure(config) -> tuple[list[float], list[float]]:
    family = open_family(config.model)
    world = start(config.parallel)
    run = Run(resolve(config, world.device), ResumeOptions(), family, world)
    run.prepare()
    bare_step = bare_loop(run)
    ours: list[float] = []
    bare: list[float] = []
    mark = time.perf_counter()

    def after_step(before: Progress, result, seconds: float) -> None:
        nonlocal mark
        run.after_step(before, result, seconds)
        now = time.perf_counter()
        ours.append(now - mark)
        bare_step()
        mark = time.perf_counter()
        bare.append(mark - now)

    with Requests(run.directory) as run.requests, run.batches() as batches:
        mark = time.perf_counter()
        run_steps(run.trainer, batches, run.requests, after_step)
    run.close()
    return ours, bare


def bare_loop(run: Run):
    """The loop that one would write by hand, with everything prepared outside of it."""
    network = copy.deepcopy(next(iter(run.networks.values()))).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    prepared = run.family.prepare(run.data.training.batch(0, 0, 1))
    latents, text = prepared.latents, prepared.conditioning["encoder_hidden_states"]

    def step() -> float:
        eps = torch.randn_like(latents)
        t = torch.rand(len(latents))
        at = t.view(-1, 1, 1, 1, 1)
        x_t = (1 - at) * latents + at * eps
        predicted = network(x_t, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted, eps - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


if __name__ == "__main__":
    main()
