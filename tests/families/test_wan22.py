"""Wan 2.2: two experts by noise level, each alone or both; the first frame given in place of x_t; its autoencoder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch
from kinema.errors import ConfigError
from kinema.families.loading import build
from kinema.families.registry import open_family
from kinema.families.wan import Wan
from kinema.families.wan_names import AUTOENCODER_22
from kinema.objectives.flow import flow_matching
from kinema.training.networks import FamilyDenoiser


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Wan.tiny(tmp_path_factory.mktemp("tiny") / "a14b", "t2v-a14b", seed=3)


def family_of(variant: str, **model: object) -> Wan:
    family = open_family(ModelConfig.model_validate({"family": "wan", "variant": variant, **model}))
    assert isinstance(family, Wan)
    return family


@pytest.mark.parametrize(("variant", "boundary"), [("t2v-a14b", 0.875), ("i2v-a14b", 0.9)])
def test_experts_share_the_times(variant: str, boundary: float) -> None:
    family = family_of(variant)
    assert family.time_range("network") == (boundary, 1.0) and family.time_range("network_2") == (0.0, boundary)
    assert (family.expert("network"), family.expert("network_2")) == ("high", "low")
    assert (family.folder("network"), family.folder("network_2")) == ("transformer", "transformer_2")
    assert family.trained_parts() == ("network", "network_2")
    assert family_of("t2v-14b").expert("network") == ""
    team = FamilyDenoiser(family, {"network": torch.nn.Identity(), "network_2": torch.nn.Identity()})
    assert [team.at(t).part for t in (0.1, boundary - 0.01, boundary + 0.01, 1.0)] == ["network_2"] * 2 + [
        "network"
    ] * 2


def test_the_share_of_steps_of_an_expert_follows_the_time_law() -> None:
    """t = 12 u / (1 + 11 u) is above 0.875 for u above 0.875 / (12 - 11 * 0.875), which are 63 % of them."""
    family = family_of("t2v-a14b")
    config = Config.model_validate(
        {
            "model": {"family": "wan", "variant": "t2v-a14b"},
            "data": {"sources": [{"path": "."}]},
            "training": {"steps": 1},
            "objective": {"time": "uniform"},
        }
    )
    law = flow_matching(config.objective, family).law
    high = (law.quantile(torch.linspace(0, 1, 10001), 100) > 0.875).double().mean()
    assert abs(float(high) - (1 - 0.875 / (12 - 11 * 0.875))) < 1e-3


def config_of(directory: Path, **tables: dict) -> Config:
    model = {"family": "wan", "variant": "t2v-a14b", "path": str(directory)} | tables.pop("model", {})
    base = {"data": {"sources": [{"path": "."}], "buckets": {"frames": [5]}}, "training": {"steps": 1}}
    return Config.model_validate({"model": model} | base | tables)


def test_one_expert_trains_without_the_other(a14b: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(a14b, alone, ignore=shutil.ignore_patterns("transformer"))
    low = config_of(alone, model={"train": ["network_2"]})
    family = open_family(low.model)
    family.validate(low)
    assert family.trained_parts() == ("network_2",)
    both = config_of(alone)
    with pytest.raises(ConfigError, match=r"model\.network\.path: there is nowhere to load the diffusion network from"):
        open_family(both.model).validate(both)
    shown = config_of(alone, model={"train": ["network_2"]}, preview={"prompts": ["a"]})
    with pytest.raises(ConfigError, match=r"model\.network\.path"):
        open_family(shown.model).validate(shown)


def test_release_in_the_original_layout(a14b: Path, tmp_path: Path) -> None:
    """The directory that `hf download Wan-AI/Wan2.2-T2V-A14B` makes: each expert in a folder of its own."""
    root = tmp_path / "Wan2.2-T2V-A14B"
    family = family_of("t2v-a14b", path=str(a14b))
    described = {"_class_name": "WanModel", "dim": 5120, "in_dim": 16, "model_type": "t2v", "num_heads": 40}
    for folder, part in (("high_noise_model", "network"), ("low_noise_model", "network_2")):
        (root / folder).mkdir(parents=True)
        (file,) = (a14b / family.folder(part)).glob("*.safetensors")
        state = family.to_original(load_file(file), part)
        save_file(
            {name: value.contiguous() for name, value in state.items()},
            root / folder / "diffusion_pytorch_model.safetensors",
        )
        (root / folder / "config.json").write_text(json.dumps(described))
    assert open_family(ModelConfig(family="wan", path=str(root))).variant.name == "t2v-a14b"
    found = {part: family_of("t2v-a14b", path=str(root))._find(part) for part in ("network", "network_2")}
    places = {part: one.place.name for part, one in found.items() if one is not None}
    assert places == {"network": "high_noise_model", "network_2": "low_noise_model"}


def test_the_pipeline_has_both_experts_and_their_boundary(a14b: Path) -> None:
    assert open_family(ModelConfig(family="wan", path=str(a14b))).variant.name == "t2v-a14b"
    family = family_of("t2v-a14b", path=str(a14b))
    parts = {part: family.load(part, "cpu", None) for part in ("network", "network_2", "autoencoder")}
    pipeline = family.pipeline(parts)
    assert pipeline.transformer is parts["network"] and pipeline.transformer_2 is parts["network_2"]
    assert pipeline.config.boundary_ratio == 0.875 and not pipeline.config.expand_timesteps
    names = list(parts["network"].state_dict())
    assert any((parts["network"].state_dict()[n] != parts["network_2"].state_dict()[n]).any() for n in names)


def test_adapters_of_both_experts_are_read_together(a14b: Path, tmp_path: Path) -> None:
    """As they are exported: one file an expert, told apart by its ending and its header."""
    from kinema.adapters.files import fold_file
    from kinema.adapters.inject import adapter_parameters, add_adapter
    from kinema.parallel.mesh import World
    from kinema.training.export import export_weights

    config = config_of(
        a14b,
        run={"dir": str(tmp_path / "run")},
        adapter={"rank": 2, "targets": ["attn1.to_q"]},
        export={"dtype": "fp32", "layouts": ["comfyui"]},
    )
    assert config.adapter is not None
    family = open_family(config.model)
    plain, adapted = ({part: family.load(part, "cpu", None) for part in family.trained_parts()} for _ in range(2))
    draw = torch.Generator().manual_seed(0)
    for network in adapted.values():
        add_adapter(network, config.adapter, family.adapter_targets(), 0)
        for parameter in adapter_parameters(network).values():
            parameter.data = torch.randn(parameter.shape, generator=draw)
    world = World.alone()
    folder = export_weights(tmp_path / "exports", 1, family, adapted, config, world) / "comfyui"
    assert sorted(re.sub(r".*-", "", file.stem) for file in folder.iterdir()) == ["high", "low"]
    fold_file(folder, family, plain)
    inputs = torch.randn(1, 16, 2, 4, 4, generator=draw)
    text = {"encoder_hidden_states": torch.randn(1, 512, 32, generator=draw)}
    outputs = []
    for part, network in plain.items():
        with torch.no_grad():
            ours, expected = (
                family.predict(one, inputs, torch.tensor([0.5]), text) for one in (network, adapted[part])
            )
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        outputs.append(ours)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


# -- the 5B model ----------------------------------------------------------------------------------------------------


def batch_of(count: int, step: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(step)
    rows = {"latents": (48, 3, 4, 4), "first_frame": (48, 1, 4, 4), "text": (3, 8)}
    tensors = {name: [torch.randn(shape, generator=draw) for _ in range(count)] for name, shape in rows.items()}
    return Batch(step, tensors, [""] * count, list(range(count)), [1 / count] * count)


def test_given_first_frames() -> None:
    """Given frames are the autoencoder's mean, the rest what was drawn; a share of the clips where one is asked for."""
    batch = batch_of(200)
    every = family_of("ti2v-5b-i2v").prepare(batch)
    assert every.given is not None and every.given.shape == (200, 1, 3, 4, 4)
    assert (every.given[:, :, 0] == 1).all() and (every.given[:, :, 1:] == 0).all()
    assert torch.equal(every.latents[:, :, :1], torch.stack(batch.tensors["first_frame"]))
    assert torch.equal(every.latents[:, :, 1:], torch.stack(batch.tensors["latents"])[:, :, 1:])

    some = family_of("ti2v-5b", first_frame_p=0.3).prepare(batch)
    assert some.given is not None
    share = some.given[:, 0, 0, 0, 0]
    assert 0.2 < share.mean() < 0.4 and torch.equal(
        share, family_of("ti2v-5b", first_frame_p=0.3).prepare(batch).given[:, 0, 0, 0, 0]
    )  # type: ignore[index]
    kept = share == 0
    assert torch.equal(some.latents[kept], torch.stack(batch.tensors["latents"])[kept])

    none = family_of("ti2v-5b")
    assert none.prepare(batch).given is None
    assert [one.name for one in none.encodings()] == ["text", "latents"]
    assert [one.name for one in family_of("ti2v-5b-i2v").encodings()] == ["text", "latents", "first_frame"]


def test_time_of_tokens() -> None:
    """Zero for the tokens of a given frame, the sample's for all others, in thousandths."""
    seen: list[Tensor] = []

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embedding = torch.nn.Conv3d(1, 1, 1)

        def forward(self, hidden_states: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
            seen.append(timestep)
            return (hidden_states,)

    family = family_of("ti2v-5b-i2v")
    prepared = family.prepare(batch_of(2))
    assert prepared.given is not None
    t = torch.tensor([0.25, 0.5])
    family.predict(Network(), prepared.latents, t.view(-1, 1, 1, 1, 1) * (1 - prepared.given), prepared.conditioning)
    family.predict(Network(), prepared.latents, t, prepared.conditioning)
    assert seen[0].tolist() == [[0.0] * 4 + [250.0] * 8, [0.0] * 4 + [500.0] * 8]
    assert seen[1].tolist() == [[250.0] * 12, [500.0] * 12]


@pytest.mark.parametrize(
    ("variant", "p", "message"),
    [
        ("t2v-a14b", 0.5, r"model\.first_frame_p: t2v-a14b is never given a frame"),
        ("ti2v-5b-i2v", 0.0, r"model\.first_frame_p: ti2v-5b-i2v is always given a frame"),
    ],
)
def test_first_frame_p_is_refused_where_nothing_reads_it(variant: str, p: float, message: str) -> None:
    config = config_of(Path("no/such"), model={"variant": variant, "path": None, "first_frame_p": p})
    family = family_of(variant, first_frame_p=p)
    with pytest.raises(ConfigError, match=message):
        family._check_first_frames(config)


def test_autoencoder_names_at_full_size() -> None:
    """Those of ``Wan2.2_VAE.pth``: every one known; samples of each kind as its authors' modules give them."""
    family = family_of("ti2v-5b")
    source = family.source("autoencoder")
    module = build(source.spec, source.config, empty=True)
    state = module.state_dict()
    assert sum(p.numel() for p in module.parameters()) == 704_688_668
    original = AUTOENCODER_22.rename_all(state)
    assert len(original) == len(state)
    assert source.spec.to_ours(dict(original)).keys() == state.keys()
    assert source.spec.to_ours(dict(state)).keys() == state.keys()
    samples = {
        "conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.head.0.gamma", "decoder.head.2.weight",
        "encoder.middle.0.residual.2.weight", "encoder.middle.1.to_qkv.weight", "decoder.middle.2.residual.6.bias",
        "encoder.downsamples.0.downsamples.0.residual.0.gamma", "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "encoder.downsamples.0.downsamples.2.resample.1.weight", "encoder.downsamples.1.downsamples.0.shortcut.weight",
        "decoder.upsamples.0.upsamples.3.time_conv.bias", "decoder.upsamples.2.upsamples.3.resample.1.bias",
        "decoder.upsamples.3.upsamples.2.residual.6.weight",
    }  # fmt: skip
    assert samples <= original.keys()
    levels = {int(m[1]) for name in original if (m := re.match(r"decoder\.upsamples\.(\d+)\.", name))}
    assert levels == {0, 1, 2, 3}
