"""Samples from the network in training, through the same pipeline as ``kinema sample``.

A preview changes nothing: the global random state, the modes of the modules and the places of the parts are
afterwards what they were. Text is encoded once, at the first preview, and its encoders let go; the autoencoder stays
in CPU memory between previews. Where text encoders train, every preview encodes anew; where they see pictures too
(`kinema.sampling.texts`), they stay in CPU memory as well, and are on the device while samples are drawn.

Replicated weights: the main rank samples alone, with those that share its samples (the stages of its pipeline, which
the network's forward goes through one after the other); the others go on to the next collective call and wait there.
Sharded weights (FSDP2): every forward pass gathers parameters, so all ranks draw all prompts; the main rank writes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.dtypes import torch_dtype
from kinema.families.base import Family, Parts
from kinema.sampling.index import add_to_index, prepare_index
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.request import check_previews, defaults_of_run, preview_images, slug
from kinema.sampling.texts import Texts
from kinema.sampling.writing import suffix, write_video
from kinema.training.networks import evaluating

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kinema.parallel.mesh import World


class Previewer:
    """Makes the previews of a run. Making one loads nothing; UserError for previews that cannot be made."""

    def __init__(self, config: Config, family: Family, world: World) -> None:
        check_previews(config, family)
        self.config, self.family, self.world = config, family, world
        self.settings = preview_settings(config, family)
        self.parts: Parts = {}
        self.texts: Texts | None = None

    @property
    def takes_part(self) -> bool:
        """Whether this rank has to run the network."""
        return self.world.dp_rank == 0 or self.world.is_sharded

    def preview(self, step: int, networks: Mapping[str, nn.Module]) -> list[Path]:
        """Sample the configured prompts from what trains, on the run's device, as it is (the caller swaps averages
        in). Writes ``previews/step-XXXXXXXX/NN-words.mp4`` (or png) and ``index.jsonl``; the main rank returns the
        paths, other ranks nothing."""
        if not self.takes_part or not self.settings:
            return []
        folder = self.config.run.dir / "previews" / f"step-{step:08d}"
        fps = defaults_of_run(self.config, self.family).fps
        names = [f"{i:02d}-{slug(one.prompt)}{suffix(one.frames)}" for i, one in enumerate(self.settings)]
        if self.world.is_main:
            prepare_index(folder, names)
        with ExitStack() as stack:
            stack.enter_context(untouched_randomness())
            stack.enter_context(evaluating(networks.values()))
            for network in networks.values():
                stack.enter_context(self._computing(network))
            pipeline = self._pipeline(networks)
            samples = sample_many(self.family, pipeline, self.settings, self.world.device, texts=self.texts)
            for name, one, frames in zip(names, self.settings, samples, strict=True):
                if self.world.is_main:
                    entry = {**one.to_json(), "fps": fps, "step": step}
                    write_video(frames, folder / name, fps, entry)
                    add_to_index(folder, {"file": name, **entry})
        return [folder / name for name in names] if self.world.is_main else []

    def _pipeline(self, networks: Mapping[str, nn.Module]) -> Any:
        """The family's pipeline over ``networks``, and the text encoded. The first time, the other parts are loaded."""
        if self.texts is None:
            for part in self.family.variant.parts:
                if part not in networks:
                    self.parts[part] = self.family.load(part, "cpu", self.family.part_dtype(part, self._dtype))
        pipeline = self._quiet_pipeline(networks)
        encoders = self.family.text_encoders
        trains = any(part in networks for part in encoders)  # then every preview reads its texts anew
        if self.texts is None or trains:
            self.texts = Texts(self.family, pipeline)
            self.texts.encode(self.settings, self.world.device)
            if self.texts.apart and not trains:
                self.parts = {name: part for name, part in self.parts.items() if name not in encoders}
                pipeline = self._quiet_pipeline(networks)
        return pipeline

    def _quiet_pipeline(self, networks: Mapping[str, nn.Module]) -> Any:
        pipeline = self.family.pipeline({**self.parts, **networks})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def _dtype(self) -> torch.dtype:
        return torch_dtype(self.config.training.precision)

    @contextmanager
    def _computing(self, network: nn.Module) -> Iterator[None]:
        """The network, and it alone, computes in the precision that it trains with."""
        import torch

        from kinema.training.loop import keeps_casts

        if self._dtype == torch.float32:
            with nullcontext():
                yield
            return
        own = network.__dict__.get("forward")
        forward = network.forward
        device, cached = self.world.device.type, keeps_casts(self.config, self.world)

        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, self._dtype, cache_enabled=cached):
                return forward(*args, **kwargs)

        network.forward = autocast_forward
        try:
            yield
        finally:
            del network.forward
            if own is not None:
                network.forward = own


def preview_settings(config: Config, family: Family) -> list[SampleSettings]:
    """One sample for each prompt of the configuration, with seeds that count up."""
    preview, wanted = config.preview, defaults_of_run(config, family)
    return [
        SampleSettings(
            prompt=prompt,
            height=wanted.height,
            width=wanted.width,
            frames=wanted.frames,
            steps=wanted.steps,
            guidance=wanted.guidance,
            image_guidance=wanted.image_guidance,
            seed=preview.seed + i,
            negative=wanted.negative,
            images=images,
            text_length=family.text_length,
        )
        for i, (prompt, images) in enumerate(zip(preview.prompts, preview_images(config, family), strict=True))
    ]


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Python's, numpy's and torch's global generators (of all devices) are afterwards where they were."""
    import numpy as np
    import torch

    ours, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)
