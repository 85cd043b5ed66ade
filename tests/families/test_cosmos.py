"""Cosmos: preconditioning and the law of its noise levels, original names, which model a file is, what is refused."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kinema.config.schema import Config, ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.cosmos import CosmosFamily
from kinema.families.cosmos_layout import AUTOENCODER
from kinema.families.loading import build
from kinema.families.registry import open_family
from kinema.objectives.flow import flow_matching, loss_weight


def family_of(family: str, variant: str, **model: Any) -> CosmosFamily:
    opened = open_family(ModelConfig.model_validate({"family": family, "variant": variant, **model}))
    assert isinstance(opened, CosmosFamily)
    return opened


class Recorder(torch.nn.Module):
    """A network that says what it was given and answers with fixed numbers."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Linear(1, 1)
        self.answer = answer
        self.given: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.given = inputs
        return (self.answer,)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 1.0, 7.0, 80.0])
def test_edm_preconditioning_is_diffusers(sigma: float) -> None:
    """Around any network output: input, time and D(x; sigma) of EDMEulerScheduler, from our x_t and t."""
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    draw = torch.Generator().manual_seed(0)
    x_0, eps, output = (torch.randn(2, 16, 2, 4, 4, generator=draw) for _ in range(3))
    level = torch.tensor(sigma, dtype=torch.float64)
    x = (0.5 * x_0 + sigma * eps).double()
    t = (level / (1 + level)).float().expand(2)
    network = Recorder(output)
    x_t = (x / (1 + sigma)).float()
    predicted = family_of("cosmos1", "text2world-7b").predict(network, x_t, t, {})
    expected = scheduler.precondition_outputs(x, output.double(), level)
    torch.testing.assert_close(predicted.double(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(
        network.given["hidden_states"].double(), scheduler.precondition_inputs(x, level), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        network.given["timestep"].double(), scheduler.precondition_noise(level).expand(2), rtol=0, atol=2e-5
    )
    assert network.given["fps"] == 30 and network.given["padding_mask"].shape == (1, 1, 32, 32)


def test_edm_given_frames_come_back() -> None:
    """Whatever the network says, a frame at t = 0 is what was given; the network is told the others' time."""
    x_t = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    given = torch.zeros(2, 1, 2, 4, 4)
    given[:, :, 0] = 1
    t = torch.tensor([0.5, 0.9])
    family = family_of("cosmos1", "video2world-7b")
    network = Recorder(torch.randn(x_t.shape))
    conditioning = {"condition_mask": given}
    predicted = family.predict(network, x_t, t.view(-1, 1, 1, 1, 1) * (1 - given), conditioning)
    torch.testing.assert_close(predicted[:, :, 0], x_t[:, :, 0])
    torch.testing.assert_close(network.given["hidden_states"][:, :, 0], x_t[:, :, 0] / 0.5)
    torch.testing.assert_close(network.given["timestep"], (t / (1 - t)).log() / 4)
    assert torch.equal(family.predict(network, x_t, t, conditioning), predicted)


def test_predict2_given_frames_and_time() -> None:
    """One time a frame, sigma 0.0001 of the given one; x_t goes in and comes out as it is."""
    x_t = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    given = torch.zeros(1, 1, 3, 4, 4)
    given[:, :, 0] = 1
    family = family_of("cosmos_predict2", "video2world-2b")
    network = Recorder(torch.randn(x_t.shape))
    t = torch.tensor([0.8])
    predicted = family.predict(network, x_t, t.view(-1, 1, 1, 1, 1) * (1 - given), {"condition_mask": given})
    assert torch.equal(predicted, network.answer) and torch.equal(network.given["hidden_states"], x_t)
    expected = torch.tensor([0.0001 / 1.0001, 0.8, 0.8]).view(1, 1, 3, 1, 1)
    torch.testing.assert_close(network.given["timestep"], expected)
    family.predict(network, x_t, t, {"condition_mask": given})
    torch.testing.assert_close(network.given["timestep"], expected)
    pictures = family_of("cosmos_predict2", "text2image-2b")
    pictures.predict(network, x_t[:, :, :1], t, {})
    assert torch.equal(network.given["timestep"], t) and "fps" not in network.given


@pytest.mark.parametrize(
    ("family", "variant", "multiplier"),
    [
        ("cosmos1", "text2world-7b", 4.0),
        ("cosmos_predict2", "video2world-2b", 24**0.5),
        ("cosmos_predict2", "text2image-2b", 1.0),
    ],
)
def test_noise_levels_are_log_normal(family: str, variant: str, multiplier: float) -> None:
    """sigma = m exp(z), z standard normal: the quantiles of t / (1 - t) under the family's own defaults."""
    opened = family_of(family, variant)
    config = Config.model_validate(
        {
            "model": {"family": family, "variant": variant},
            "data": {"sources": [{"path": "."}]},
            "training": {"steps": 1},
        }
    )
    objective = flow_matching(config.objective, opened)
    u = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97], dtype=torch.float64)
    t = objective.law.quantile(u, 1000)
    expected = torch.tensor([multiplier * 2.718281828459045 ** NormalDist().inv_cdf(float(one)) for one in u])
    torch.testing.assert_close((t / (1 - t)).float(), expected, rtol=5e-3, atol=0)  # the ends of the range are cut off
    if family == "cosmos1":
        sigma = t / (1 - t)
        weight = loss_weight(objective.weighting, t, opened.path.native, 5.0)
        torch.testing.assert_close(weight, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    else:
        assert objective.weighting == "none" and opened.path.native == "velocity"


def full_size(family: str, variant: str, part: str = "network") -> torch.nn.Module:
    source = family_of(family, variant).source(part)
    return build(source.spec, source.config, empty=True)


def test_original_names_of_cosmos1() -> None:
    """As NVIDIA's checkpoints have them, which carry buffers besides; diffusers' converter for them takes its own table
    for the second generation's, so that it cannot say."""
    family = family_of("cosmos1", "video2world-7b")
    state = full_size("cosmos1", "video2world-7b").state_dict()
    original = family.to_original(state)
    expected = {
        "x_embedder.proj.1.weight", "extra_pos_embedder.pos_emb_h", "t_embedder.1.linear_2.weight",
        "affline_norm.weight", "blocks.block0.blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight",
        "blocks.block27.blocks.2.adaLN_modulation.2.weight", "blocks.block1.blocks.0.block.attn.to_q.0.weight",
        "blocks.block1.blocks.0.block.attn.to_q.1.weight", "blocks.block1.blocks.1.block.attn.to_k.0.weight",
        "blocks.block1.blocks.1.block.attn.to_v.0.weight", "blocks.block1.blocks.1.block.attn.to_out.0.weight",
        "blocks.block9.blocks.2.block.layer1.weight", "final_layer.adaLN_modulation.2.weight",
    }  # fmt: skip
    assert expected <= original.keys() and len(original) == len(state)
    published = {f"net.{name}": value for name, value in original.items()}
    published |= {f"net.{name}": torch.zeros(1) for name in ("logvar.0.freqs", "logvar.1.weight", "pos_embedder.seq")}
    read = family.source("network").spec.to_ours(published)
    assert {n: v.shape for n, v in read.items()} == {n: v.shape for n, v in state.items()}


def test_original_names_of_the_autoencoder() -> None:
    state = full_size("cosmos1", "text2world-7b", "autoencoder").state_dict()
    original = AUTOENCODER.rename_all(state)
    assert len(original) == len(state)
    expected = {
        "encoder.conv_in.0.conv3d.weight", "encoder.conv_out.1.conv3d.bias", "encoder.norm_out.norm.weight",
        "encoder.down.0.block.0.conv1.0.conv3d.weight", "encoder.down.1.block.0.nin_shortcut.conv3d.weight",
        "encoder.down.0.downsample.conv3.conv3d.weight", "encoder.mid.attn_1.0.q.conv3d.weight",
        "encoder.mid.attn_1.1.proj_out.conv3d.bias", "encoder.mid.block_2.conv2.1.conv3d.weight",
        "decoder.up.2.block.0.conv1.0.conv3d.weight", "quant_conv.conv3d.weight", "post_quant_conv.conv3d.bias",
    }  # fmt: skip
    assert expected <= original.keys(), sorted(expected - original.keys())
    spec = family_of("cosmos1", "text2world-7b").source("autoencoder").spec
    further = {"encoder.patcher3d.wavelets": 0, "decoder.unpatcher3d._arange": 0, "latent_mean": 0, "latent_std": 0}
    read = spec.to_ours(original | further)  # type: ignore[arg-type]
    assert read.keys() == state.keys() and all(read[name] is state[name] for name in state)


@pytest.mark.parametrize(
    ("family", "shape", "variant"),
    [
        ("cosmos1", (4096, 68), "text2world-7b"),
        ("cosmos1", (5120, 72), "video2world-14b"),
        ("cosmos_predict2", (2048, 72), "video2world-2b"),
        ("cosmos_predict2", (5120, 68), "text2image-14b"),
    ],
)
@pytest.mark.parametrize("prefix", ["net.", ""])
def test_variant_from_shapes(family: str, shape: tuple[int, int], variant: str, prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    save_file({f"{prefix}x_embedder.proj.1.weight": torch.zeros(shape)}, file)
    assert open_family(ModelConfig(family=family, path=str(file))).variant.name == variant


def test_cosmos1_latents_have_statistics_of_each_frame() -> None:
    """(raw - mean) / std times 0.5, with mean and std by channel and latent frame."""
    family = family_of("cosmos1", "text2world-7b")
    module = full_size("cosmos1", "text2world-7b", "autoencoder")
    offset, scale = family.latent_statistics(module, torch.zeros(1, 16, 3, 2, 2))
    assert offset.shape == scale.shape == (1, 16, 3, 1, 1)
    assert offset[0, 0, :, 0, 0].tolist() == pytest.approx([0.11362758, -0.0171717, 0.03071163])
    assert scale[0, 1, 0, 0, 0].item() == pytest.approx(0.85245121 / 0.5)
    assert scale[0, 15, 2, 0, 0].item() == pytest.approx(0.63110614 / 0.5)


def config_of(family: str, variant: str, **tables: Any) -> Config:
    model = {"family": family, "variant": variant, "random_weights": True} | tables.pop("model", {})
    buckets = {"frames": [9], "fps": 30.0} | tables.pop("buckets", {})
    data = {"sources": [{"path": "."}], "buckets": buckets}
    return Config.model_validate({"model": model, "data": data, "training": {"steps": 1}} | tables)


@pytest.mark.parametrize(
    ("variant", "tables", "message"),
    [
        ("text2world-7b", {"buckets": {"frames": [129]}}, r"data\.buckets\.frames: .* up to 121 frames.*not 129"),
        ("text2world-7b", {"preview": {"frames": 129}}, r"preview\.frames: .* up to 121 frames.*not 129"),
        ("text2world-7b", {"buckets": {"frames": [13]}}, r"data\.buckets\.frames: 13 frames .* nearest are 9 and 17"),
        (
            "text2world-7b",
            {"buckets": {"fps": 16.0}},
            r"data\.buckets\.fps: .*is told 30\. Set data\.buckets\.fps = 30",
        ),
        ("text2world-7b", {"model": {"first_frame_p": 0.5}}, r"first_frame_p: text2world-7b is never given a frame"),
        ("video2world-7b", {"model": {"first_frame_p": 0.0}}, r"first_frame_p: video2world-7b is always given a frame"),
        ("text2world-7b", {"preview": {"prompts": ["a"]}}, r"preview\.prompts: .*pip install cosmos_guardrail"),
    ],
)
def test_what_is_refused(variant: str, tables: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinema.families.standard.StandardFamily.needed_parts", lambda *_: ())  # no files here
    config = config_of("cosmos1", variant, **tables)
    with pytest.raises(ConfigError, match=message):
        open_family(config.model).validate(config)


def test_samples_ask_for_the_guardrail() -> None:
    family = family_of("cosmos_predict2", "text2image-2b", random_weights=True)
    with pytest.raises(UserError, match="pip install cosmos_guardrail"):
        family.pipeline({"scheduler": object()})
