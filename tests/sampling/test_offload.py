"""Parts and blocks that are on the device only while they work: every weight is there when it is used, nothing else
is, and samples are those without offload."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading
from PIL import Image
from torch import nn

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.catalog import entry
from kinema.families.registry import family_class, open_family
from kinema.sampling import offload
from kinema.sampling.offload import check_offload, choose_offload, out_of_memory_advice, part_bytes
from kinema.sampling.pipeline import SampleSettings, sample_many

CPU, BF16 = torch.device("cpu"), torch.bfloat16
GIB = 2**30


def tiny_pipeline(directory: Path, name: str, variant: str) -> tuple[Any, Any]:
    path = family_class(name).tiny(directory, variant)
    family = open_family(ModelConfig(family=name, variant=variant, path=str(path)))
    pipeline = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    return family, pipeline


class Absent:
    """Parameters that are not on the device hold NaN: what uses one spoils the sample. On one device no move can be
    seen otherwise."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.true: dict[torch.Tensor, torch.Tensor] = {}
        self.at_home: dict[int, torch.Tensor] = {}
        self.turns: list[str] = []
        """Names of the parts that were brought, in their order."""
        self.blocks = [0, 0]
        """How many parameters of groups are there, and how many there were at most."""
        for part in self.parts.values():
            for parameter in part.parameters():
                self.true[parameter] = parameter.data
                parameter.data = torch.full_like(parameter.data, float("nan"))
                self.at_home[parameter.data.data_ptr()] = self.true[parameter]
        monkeypatch.setattr(offload, "to_device", lambda data, _device: self.at_home.get(data.data_ptr(), data))
        monkeypatch.setattr(group_offloading.ModuleGroup, "_onload_from_memory", self._group(True))
        monkeypatch.setattr(group_offloading.ModuleGroup, "_offload_to_memory", self._group(False))
        names = {id(part): name for name, part in self.parts.items()}
        bring = offload.Stage.bring

        def noted(stage: offload.Stage, parts: offload.Parts) -> None:
            called = [names[id(part)] for part in parts]
            if stage.parts is not parts:
                self.turns.append("+".join(called))
            bring(stage, parts)
            assert [name for name, other in self.parts.items() if self.is_there(other)] == called, "nothing else"

        monkeypatch.setattr(offload.Stage, "bring", noted)

    def _group(self, there: bool) -> Any:
        def move(group: Any) -> None:
            own = [one for module in group.modules for one in module.parameters()] + list(group.parameters)
            for one in own:
                self.blocks[0] += (1 if there else -1) * (self.is_there(one) != there) * one.numel()
                one.data = self.true[one] if there else torch.full_like(one.data, float("nan"))
            self.blocks[1] = max(self.blocks)

        return move

    def is_there(self, what: nn.Module | torch.Tensor) -> bool:
        own = [what] if isinstance(what, torch.Tensor) else list(what.parameters())
        return any(one.data_ptr() == self.true[one].data_ptr() for one in own)

    @property
    def hooked(self) -> list[str]:
        """Parts that still have hooks."""
        return [
            name
            for name, part in self.parts.items()
            if hasattr(part, "_hf_hook")
            or any(one._forward_pre_hooks for one in part.modules())
            or group_offloading._is_group_offload_enabled(part)
        ]


FAMILIES = [
    # two experts: one network at a time; a first frame is encoded in between; a network and an autoencoder of ours;
    # what is called is inside its text encoder, and pictures to edit; text that is encoded in the call
    ("wan", "t2v-a14b", (32, 48, 9), ["text_encoder", "transformer", "transformer_2", "vae"]),
    ("wan", "i2v-14b-480p", (32, 48, 5), ["text_encoder", "image_encoder", "vae", "transformer", "vae"]),
    ("open_sora", "v2-dc", (32, 32, 8), ["text_encoder+text_encoder_2", "vae", "transformer", "vae"]),
    ("omnigen2", "omnigen2", (32, 48, 1), ["mllm", "vae", "transformer", "vae"]),
    ("flux", "dev", (32, 48, 1), ["text_encoder", "text_encoder_2", "transformer", "vae"]),
]
OTHERS = [
    ("sdxl", "base-eps", (64, 64, 1)),
    ("sd3", "sd3-medium", (32, 48, 1)),
    ("hidream", "full", (32, 48, 1)),
    ("qwen_image", "base", (32, 48, 1)),
    ("hunyuan_image", "base", (64, 64, 1)),
    ("lumina2", "image-2.0", (32, 48, 1)),
    ("z_image", "turbo", (32, 48, 1)),
    ("chroma", "hd", (32, 48, 1)),
    ("aura_flow", "v0.3", (32, 48, 1)),
    ("ltx_video", "i2v-2b-0.9.5", (64, 96, 9)),
    ("hunyuan_video", "t2v", (32, 48, 9)),
    ("hunyuan_video15", "720p-i2v", (32, 64, 5)),
    ("open_sora", "v2", (32, 48, 9)),
]


def drawn(
    directory: Path, name: str, variant: str, size: tuple[int, int, int], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> Absent:
    """Two steps without offload and with it; the samples have to be equal."""
    pixels = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(directory / "picture.png")
    family, pipeline = tiny_pipeline(directory / "model", name, variant)
    images = (directory / "picture.png",) * min(1, family.variant.pictures[1])
    height, width, frames = size
    settings = [SampleSettings("a red ball", height, width, frames, steps=2, guidance=3.0, images=images)]
    (plain,) = sample_many(family, pipeline, settings)
    absent = Absent(pipeline, monkeypatch)
    (moved,) = sample_many(family, pipeline, settings, offload=kind)
    assert torch.equal(plain, moved)
    assert plain.std() > 0.01
    assert not any(absent.is_there(part) for part in absent.parts.values()) and not absent.hooked
    return absent


QUICK = {"t2v-a14b": ("parts", "blocks"), "i2v-14b-480p": ("parts",), "v2-dc": ("blocks",), "omnigen2": ("parts",)}
"""What `make test` runs; the others are slow."""
CASES = [
    pytest.param(*case, kind, marks=[] if kind in QUICK.get(case[1], ()) else [pytest.mark.slow])
    for case in FAMILIES
    for kind in ("parts", "blocks")
]


@pytest.mark.parametrize(("name", "variant", "size", "turns", "kind"), CASES)
def test_samples_are_the_same(
    tmp_path: Path,
    name: str,
    variant: str,
    size: tuple[int, int, int],
    turns: list[str],
    kind: Literal["parts", "blocks"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = drawn(tmp_path, name, variant, size, kind, monkeypatch)
    networks = [one for one in ("transformer", "transformer_2") if one in absent.parts]
    if kind == "parts":
        assert absent.turns == turns
        return
    assert absent.turns == [one for one in turns if one not in networks], "networks go block by block"
    whole = min(sum(one.numel() for one in absent.parts[name].parameters()) for name in networks)
    assert 0 < absent.blocks[1] < whole, "never a whole network"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "blocks"])
@pytest.mark.parametrize(("name", "variant", "size"), OTHERS)
def test_samples_of_all_families_are_the_same(
    tmp_path: Path, name: str, variant: str, size: tuple[int, int, int], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(tmp_path, name, variant, size, kind, monkeypatch)


# -- which ----------------------------------------------------------------------------------------------------------


def test_what_is_chosen() -> None:
    """By the published sizes: 14.3 and 14.3 billion parameters of two experts, a text encoder of 5.7 billion."""
    family = open_family(ModelConfig(family="wan", variant="t2v-a14b", path="x"))
    cuda = torch.device("cuda", 0)
    sizes = part_bytes(family, BF16)
    published = {part.name: part.parameters for part in entry("wan", "t2v-a14b").parts if part.parameters}
    assert sizes.keys() == {"network", "network_2", "text_encoder", "autoencoder"}
    assert sizes["network"] == 2 * published["network"] and sizes["autoencoder"] == 4 * published["autoencoder"]
    total, largest = sum(sizes.values()), max(sizes.values())
    assert 60 < total / GIB < 70 and 25 < largest / GIB < 28

    def chosen(asked: str, free: float, device: torch.device = cuda) -> tuple[str, str]:
        return choose_offload(asked, family, device, BF16, int(free * GIB))

    assert chosen("auto", 96) == ("none", "")
    kind, said = chosen("auto", 80)
    assert kind == "parts" and f"{total / GIB:.1f} GiB of weights" in said and "80.0 GiB free" in said
    assert [chosen("auto", free)[0] for free in (40, 24, 8)] == ["parts", "blocks", "blocks"]
    assert chosen("none", 8) == ("none", "") and chosen("blocks", 96) == ("blocks", "")
    assert chosen("auto", 0, CPU) == ("none", "")
    kind, said = chosen("parts", 0, CPU)
    assert kind == "none" and "on a CPU" in said
    for kind, size in (("fp8", 1.0), ("nf4", 0.54)):
        narrow = family.config.model_copy(update={"network": family.config.network.model_copy(update={"dtype": kind})})
        assert part_bytes(open_family(narrow), BF16)["network"] == math.ceil(size * published["network"])
    with pytest.raises(UserError, match=r"--offload block: expected one of .*did you mean 'blocks'"):
        check_offload("block")


def test_too_little_memory_is_a_message() -> None:
    with (
        pytest.raises(UserError, match=r"cuda:1 has too little memory .*tried to allocate 2 GiB.* --offload blocks"),
        out_of_memory_advice(torch.device("cuda", 1)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory, tried to allocate 2 GiB.\nMore")


# -- on a GPU --------------------------------------------------------------------------------------------------------


def large(directory: Path, layers: int = 16, heads: int = 64, ffn: int = 3072) -> tuple[Any, Any]:
    """A pipeline with two networks of about 600 MB each (float32), beside which nothing counts."""
    family, pipeline = tiny_pipeline(directory, "wan", "t2v-a14b")
    torch.manual_seed(0)
    for name in ("transformer", "transformer_2"):
        small = getattr(pipeline, name)
        changed = {"num_layers": layers, "num_attention_heads": heads, "ffn_dim": ffn}
        network = type(small).from_config({**small.config, **changed}).eval().requires_grad_(False)
        pipeline.register_modules(**{name: network})
    return family, pipeline


@pytest.mark.gpu
def test_memory_on_a_gpu(tmp_path: Path) -> None:
    """What a GPU holds at most: both networks, one of them, a block or two; and the same sample to the bit."""
    family, pipeline = large(tmp_path)
    network = sum(4 * one.numel() for one in pipeline.transformer.parameters())
    block = sum(4 * one.numel() for one in pipeline.transformer.blocks[0].parameters())
    settings = [SampleSettings("a red ball", 32, 48, 9, steps=4, guidance=3.0, seed=seed) for seed in (0, 1)]
    kinds: tuple[Any, ...] = ("none", "parts", "blocks")
    samples, peaks = {}, {}
    for kind in kinds:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        samples[kind] = list(sample_many(family, pipeline, settings, "cuda", batch=1, offload=kind))
        peaks[kind] = torch.cuda.max_memory_allocated() - before
        assert torch.cuda.memory_allocated() <= before + 2**26, "weights have left"
        assert all(one.device.type == "cpu" for one in pipeline.transformer.parameters())
    slack = 3 * block
    assert 2 * network <= peaks["none"]
    assert network <= peaks["parts"] <= network + slack
    assert peaks["blocks"] <= 3 * block + slack < network
    for kind in kinds[1:]:
        assert all(torch.equal(a, b) for a, b in zip(samples["none"], samples[kind], strict=True)), kind


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["parts", "blocks"])
@pytest.mark.parametrize(("name", "variant", "size", "turns"), FAMILIES)
def test_samples_on_a_gpu_are_the_same(
    tmp_path: Path, name: str, variant: str, size: tuple[int, int, int], turns: list[str], kind: Any
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), np.uint8)).save(tmp_path / "picture.png")
    family, pipeline = tiny_pipeline(tmp_path / "model", name, variant)
    images = (tmp_path / "picture.png",) * min(1, family.variant.pictures[1])
    settings = [SampleSettings("a red ball", *size, steps=2, guidance=3.0, images=images)]
    (plain,) = sample_many(family, pipeline, settings, "cuda")
    (moved,) = sample_many(family, pipeline, settings, "cuda", offload=kind)
    assert torch.equal(plain, moved)
