"""Open-Sora: what the suite cannot see. Training against tensors of the original; conditions; files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import batch_of

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families import open_sora, standard
from kinema.families.base import Prepared
from kinema.families.noise_path import FrameShift, NoisePath
from kinema.families.open_sora import OpenSora
from kinema.families.open_sora_conditions import CONDITIONS, SHIPPED, choose, given_of, latents_of, possible
from kinema.families.registry import family_class, open_family
from kinema.families.steering import Steering
from kinema.networks.open_sora import OpenSoraTransformer, pack, positions, unpack
from kinema.objectives import flow
from kinema.objectives.flow import FlowMatching, flow_matching
from kinema.objectives.time import TimeLaw
from kinema.sampling.request import check_image_guidance

GOLDEN = Path(__file__).parents[1] / "golden" / "open_sora"
NOISING = json.loads((GOLDEN / "training_noising.json").read_text())["cases"]
LAWS = NOISING.pop("tlaw")
CASES = list(NOISING)


@pytest.fixture(scope="module")
def noising() -> dict[str, Tensor]:
    return load_file(GOLDEN / "training_noising.safetensors")


@pytest.fixture(scope="module", params=["v2", "v2-dc"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OpenSora.tiny(tmp_path_factory.mktemp("open_sora") / request.param, request.param, seed=3)


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OpenSora.tiny(tmp_path_factory.mktemp("open_sora") / "one", "v2", seed=4)


def family(path: Path | None = None, **model: Any) -> OpenSora:
    place = {} if path is None else {"path": str(path)}
    found = open_family(ModelConfig.model_validate({"family": "open_sora", **place, **model}))
    assert isinstance(found, OpenSora)
    return found


def noise_clip(frames: int, seed: int = 0, height: int = 64, width: int = 64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), generator=draw, dtype=torch.uint8)


# -- training as the original does it ----------------------------------------------------------------------------------


class LinearAutoencoder(nn.Module):
    """The reference's stand-in for an autoencoder, after its mean over 4 x 4 pixels."""

    def __init__(self, matrix: Tensor, causal: bool) -> None:
        super().__init__()
        self.matrix, self.causal = matrix, causal
        self.unused = nn.Conv3d(1, 1, 1)  # it takes videos
        self.config = SimpleNamespace()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def encode(self, x: Tensor) -> Any:
        first, rest = (x[:, :, :1], x[:, :, 1:]) if self.causal or x.shape[2] == 1 else (x[:, :, :0], x)
        means = torch.cat([first, rest.unflatten(2, (-1, 4)).mean(3)], dim=2) if rest.shape[2] else first
        z = torch.einsum("dc,bcthw->bdthw", self.matrix, means)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=z, std=torch.zeros_like(z))) if self.causal else z


@dataclass
class Recorder:
    """A denoiser that keeps what it is asked, and answers as the reference's."""

    family: OpenSora
    path: NoisePath
    answer: Tensor
    asked: dict[str, Any]
    time_range: tuple[float, float] = (0.0, 1.0)

    def prepare(self, batch: Batch) -> Prepared:
        return self.family.prepare(batch)

    def tokens(self, latents: Tensor) -> int:
        return self.family.tokens(latents)

    def at(self, t: float) -> Recorder:
        return self

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        self.asked |= {"x_t": x_t, "t": t, "conditioning": conditioning}
        return self.answer


@dataclass
class TheirDraws:
    noise: Tensor
    u: Tensor

    def normal(self, batch: Batch, like: Tensor, purpose: str) -> Tensor:
        return self.noise

    def uniform(self, batch: Batch, device: torch.device, purpose: str) -> Tensor:
        return self.u

    def shared(self, purpose: str) -> Tensor:
        return torch.tensor(0.5, dtype=torch.float64)


class QuarterCount(FrameShift):
    """The original's training counts a quarter of the latents of a frame as its tokens even where each is one."""

    def __call__(self, tokens: int, frames: int = 1) -> float:
        return super().__call__(tokens // 4, frames)


def names_of(masks: Tensor, weights: dict[str, float], causal: bool) -> list[str]:
    """The condition that each sample of the reference drew, from its mask [B, T]; by the rule of ours."""
    frames = masks.shape[1]
    rows = {}
    for name in possible(weights, frames, causal):
        head, tail = (latents_of(count, causal) for count in CONDITIONS[name])
        rows[name] = [float(i < head or i >= frames - tail) for i in range(frames)]
    found = [[name for name, row in rows.items() if row == mask.tolist()] for mask in masks]
    assert all(len(names) == 1 for names in found), found
    return [name for (name,) in found]


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_noised_as_the_original_does(
    case: str, noising: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the reference's clips and draws: references, mask, x_t, t, what the network is told, target and loss."""
    facts = NOISING[case]
    golden = {name.removeprefix(f"{case}."): v for name, v in noising.items() if name.startswith(f"{case}.")}
    causal, patch, size = facts["causal"], facts["patch_size"], facts["latent_THW"]
    weights = facts["condition_config_given"] or {"t2v": 1}
    ours = family(variant="v2" if causal else "v2-dc", conditions=weights)

    means, count = golden["in.video_means"], facts["video_shape"][0]
    monkeypatch.setattr(standard, "pixels_of", lambda samples: means)
    monkeypatch.setattr(open_sora, "pixels_of", lambda samples: means)
    parts = {"autoencoder": LinearAutoencoder(golden["in.M"], causal)}
    rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for encoding in ours.encodings():
        if encoding.reads_pixels:
            for i, encoded in enumerate(ours.encode(encoding, parts, [Sample("")] * count)):
                rows[i] |= encoded
    for i, row in enumerate(rows):
        row.pop("latents_std", None)
        row["text"], row["pooled"] = golden["in.txt"][i], golden["in.vec"][i]
        if _dropped(facts, golden, 1, "t5")[i]:  # each encoder's text is dropped by draws of its own
            null = golden["in.null_txt"][0]  # shorter ones are filled with their last token
            row["text"] = torch.cat([null, null[-1:].expand(len(row["text"]) - len(null), -1)])
        if _dropped(facts, golden, 2, "clip")[i]:
            row["pooled"] = golden["in.null_vec"][0]
    batch = batch_of(*rows)
    mask = None
    if "inp.cond" in golden:
        mask = unpack(golden["inp.cond"], size, patch)[:, 0, :, 0, 0]
        drawn = names_of(mask, weights, causal)
        monkeypatch.setattr(ours, "drawn_conditions", lambda batch, frames: drawn, raising=False)

    targets: list[Tensor] = []
    real_target = flow.native_target
    monkeypatch.setattr(flow, "native_target", lambda *a: targets.append(real_target(*a)) or targets[-1])
    student = Recorder(ours, NoisePath(sigma_min=facts["sigma_min"]), unpack(golden["some_pred"], size, patch), {})
    draws = TheirDraws(unpack(golden["x_1"], size, patch), torch.special.ndtr(golden["draw.0.randn"].double()))
    law = TimeLaw("logit_normal", shift=FrameShift() if patch == 2 else QuarterCount())
    objective = Config.model_validate(config({})).objective
    loss = FlowMatching(objective, law)(batch, {"student": student}, draws)  # type: ignore[arg-type, dict-item]

    def close(value: Tensor, name: str) -> None:
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-5, msg=lambda m: f"{case} {name}: {m}")

    told = student.asked["conditioning"]
    close(pack(batch_stack(batch, "latents"), patch), "x_0")
    close(student.asked["t"], "inp.timesteps")
    close(pack(student.asked["x_t"], patch), "inp.img")
    close(pack(targets[0], patch), "v_target")
    close(loss.total.view(1), "loss")
    close(told["encoder_hidden_states"], "inp.txt")
    close(told["pooled_projections"], "inp.y_vec")
    assert torch.equal(positions(size, patch).expand(count, -1, -1), golden["inp.img_ids"])
    if mask is not None:
        close(pack(told["cond"], patch), "inp.cond")
    else:
        assert not told["cond"].any()

    # Ours counts the tokens that there are, in training as in sampling.
    tokens = size[1] * size[2] // patch**2
    alpha = (1 + (tokens - 256) * 2 / 3840) * math.sqrt(size[0])
    assert ours.resolution_shift(tokens * size[0], size[0]) == pytest.approx(alpha, rel=1e-12)
    assert (alpha == pytest.approx(facts["shift_alpha"], rel=1e-9)) == (patch == 2)


def _dropped(facts: dict[str, Any], golden: dict[str, Tensor], draw: int, part: str) -> list[bool]:
    if facts["dropout_ratio"] is None:
        return [False] * len(golden["in.vec"])
    return (golden[f"draw.{draw}.rand"] < facts["dropout_ratio"][part]).tolist()


def batch_stack(batch: Batch, name: str) -> Tensor:
    return torch.stack(batch.tensors[name])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: "x".join(map(str, law["latent_THW"])))
def test_the_time_law(law: dict[str, Any], noising: dict[str, Tensor]) -> None:
    frames, rows, columns = law["latent_THW"]
    ours = flow_matching(Config.model_validate(config({})).objective, family(variant="v2")).law
    tokens = frames * rows * columns // 4
    assert ours.shift_for(tokens, frames) == pytest.approx(law["shift_alpha"], rel=1e-12)
    u = torch.special.ndtr(noising["tlaw.normal_draws"].double())
    theirs = noising[f"tlaw.{frames}x{rows}x{columns}"].double()
    torch.testing.assert_close(ours.quantile(u, tokens, frames), theirs, rtol=0, atol=1e-6)


def test_what_is_left_of_the_noise_is_data_with_noise_on_it() -> None:
    """x_t and v of Lipman et al.'s path with sigma_min are those of the plain path from x_0 + sigma_min eps."""
    draw = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 64, generator=draw, dtype=torch.float64)
    t, s = torch.rand(64, generator=draw, dtype=torch.float64), 0.1
    start = x_0 + s * eps
    torch.testing.assert_close((1 - t) * start + t * eps, (1 - t) * x_0 + (1 - (1 - s) * (1 - t)) * eps)
    torch.testing.assert_close(eps - start, (1 - s) * eps - x_0)


def test_what_is_given_has_no_noise_left_on_it() -> None:
    """In families that put given frames in the place of noisy ones."""
    latents, given = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 3, 2, 2)
    given[:, :, 0] = 1
    student = Recorder(family(variant="v2"), NoisePath(sigma_min=0.1), torch.zeros_like(latents), {})
    student.prepare = lambda batch: Prepared(latents, {}, given)  # type: ignore[method-assign]
    noise, u = torch.ones_like(latents), torch.full((2,), 0.5, dtype=torch.float64)
    batch = Batch(0, {}, ["", ""], [0, 1], [0.5, 0.5])
    objective = Config.model_validate(config({})).objective
    FlowMatching(objective, TimeLaw())(batch, {"student": student}, TheirDraws(noise, u))  # type: ignore[arg-type, dict-item]
    x_t = student.asked["x_t"]
    assert torch.equal(x_t[:, :, :1], latents[:, :, :1])
    torch.testing.assert_close(x_t[:, :, 1:], 0.5 * latents[:, :, 1:] + (1 - 0.9 * 0.5))


# -- conditions --------------------------------------------------------------------------------------------------------


def config(model: dict[str, Any], **tables: Any) -> dict[str, Any]:
    return {
        "model": {"family": "open_sora", "variant": "v2", **model},
        "data": {"sources": [{"path": "."}], "buckets": {"frames": [1, 33], "resolutions": [256]}},
        "training": {"steps": 1},
        **tables,
    }


def names(ours: OpenSora) -> list[str]:
    return [encoding.name for encoding in ours.encodings()]


def test_only_what_the_weights_ask_for_is_encoded() -> None:
    base = ["text", "pooled", "latents"]
    assert family(variant="v2").conditions == SHIPPED == {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
    assert names(family(variant="v2")) == [*base, "head_1", "tail_1"]
    assert names(family(variant="v2", conditions={"t2v": 1, "i2v_head": 0})) == base
    some = {"v2v_tail_easy": 1, "v2v_head": 2, "i2v_head": 1}
    assert names(family(variant="v2", conditions=some)) == [*base, "tail_65", "head_33", "head_1"]
    assert names(family(variant="v2-dc", conditions=some)) == [*base, "tail_64", "head_32", "head_1"]


def test_conditions_are_drawn_by_weight_for_each_sample_of_the_global_batch() -> None:
    weights = {"t2v": 1.0, "i2v_head": 5.0, "v2v_tail": 2.0}
    ours = family(variant="v2", conditions=weights)

    def drawn(step: int, indices: list[int], frames: int = 33) -> list[str]:
        return ours.drawn_conditions(Batch(step, {}, [""] * len(indices), indices, [1.0] * len(indices)), frames)

    counts = Counter(name for step in range(40) for name in drawn(step, list(range(100))))
    for name, weight in weights.items():
        share = weight / 8
        assert abs(counts[name] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000), counts
    whole = drawn(7, list(range(8)))
    assert drawn(7, [5, 2]) == [whole[5], whole[2]] and drawn(8, list(range(8))) != whole
    short = Counter(name for step in range(10) for name in drawn(step, list(range(100)), frames=9))
    assert set(short) == {"t2v", "i2v_head"}  # nothing would be left to learn of 33 frames
    assert drawn(0, [0, 1, 2], frames=1) == ["t2v"] * 3
    assert family(variant="v2", conditions={"i2v_head": 1}).drawn_conditions(Batch(0, {}, [""], [0], [1.0]), 1) == [
        "t2v"
    ]


def test_what_may_be_given() -> None:
    """Causal: 1 frame, or 4 k + 1 for k + 1 latents. At least one latent frame is left to be learnt."""
    assert [latents_of(n, causal=True) for n in (0, 1, 32, 64)] == [0, 1, 9, 17]
    assert [latents_of(n, causal=False) for n in (0, 1, 32, 64)] == [0, 1, 8, 16]
    every = dict.fromkeys(CONDITIONS, 1.0)
    assert list(possible(every, 2, True)) == ["t2v", "i2v_head", "i2v_tail"]
    assert list(possible(every, 9, True)) == ["t2v", "i2v_head", "i2v_tail", "i2v_loop"]
    assert "v2v_head" in possible(every, 9, False) and "v2v_head" not in possible(every, 8, False)
    assert len(possible(every, 18, True)) == 8 and len(possible(every, 17, True)) == 6
    assert [choose({"a": 1, "b": 0, "c": 3}, u) for u in (0.0, 0.2499, 0.25, 0.9999999)] == ["a", "a", "c", "c"]


def test_stretches_of_any_length() -> None:
    """v2v_head_N gives N frames, which the autoencoder takes whole."""
    assert given_of("v2v_head_33", True) == given_of("v2v_head", True)
    assert given_of("v2v_tail_64", False) == given_of("v2v_tail_easy", False)
    assert [latents_of(n, True) for n in given_of("v2v_head_9", True)] == [3, 0]
    assert [latents_of(n, False) for n in given_of("v2v_tail_8", False)] == [0, 2]
    assert list(possible({"v2v_head_9": 1, "v2v_head_13": 1}, 4, True)) == ["v2v_head_9"]
    for name, causal, near in (
        ("v2v_head_8", True, "5 or 9"), ("v2v_head_1", True, "5"), ("v2v_tail_9", False, "8 or 12"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"{name}: .* nearest: {near}\. A single frame is i2v_"):
            given_of(name, causal)


def test_training_is_given_a_stretch(tiny: Path) -> None:
    """From clip to mask: the first 9 (8) frames of a clip of 17 (16), encoded by themselves."""
    causal = family(tiny).causal
    name, stretch, latents, whole = ("v2v_head_9", 9, 3, 17) if causal else ("v2v_head_8", 8, 2, 16)
    ours = family(tiny, conditions={name: 1})
    parts = {"autoencoder": ours.load("autoencoder", "cpu", torch.float32)}
    row = {"text": torch.zeros(512, 32), "pooled": torch.zeros(24)}
    for encoding in ours.encodings():
        if encoding.reads_pixels:
            row |= ours.encode(encoding, parts, [Sample("", noise_clip(whole))])[0]
    row.pop("latents_std", None)
    assert row[f"head_{stretch}"].shape[1] == latents
    cond = ours.prepare(batch_of(row)).conditioning["cond"][0]
    assert cond[0, :, 0, 0].tolist() == [1.0] * latents + [0.0] * (cond.shape[1] - latents)
    assert torch.equal(cond[1:, :latents], row[f"head_{stretch}"])


def test_given_frames_are_encoded_by_themselves(tiny: Path) -> None:
    """Nothing of the rest of the clip leaks into them, and each is what the autoencoder makes of these frames alone."""
    weights = {"i2v_loop": 1.0, "v2v_head": 1.0, "v2v_tail": 1.0}
    ours = family(tiny, conditions=weights)
    autoencoder = ours.load("autoencoder", "cpu", torch.float32)
    length = 41 if ours.causal else 44
    clip, other = noise_clip(length), noise_clip(length, seed=1)
    other[:, :33] = clip[:, :33]  # the same beginning

    def encoded(name: str, pixels: Tensor) -> Tensor:
        (row,) = ours.encode(
            Encoding(name, "media", ("autoencoder",)), {"autoencoder": autoencoder}, [Sample("", pixels)]
        )
        return row[name]

    stretch = 33 if ours.causal else 32
    assert torch.equal(encoded("head_1", clip), encoded("head_1", other))
    head = encoded(f"head_{stretch}", clip)
    assert torch.equal(head, encoded(f"head_{stretch}", other)) and head.shape[1] == (9 if ours.causal else 8)
    assert not torch.equal(encoded("latents", clip)[:, : head.shape[1]], encoded("latents", other)[:, : head.shape[1]])
    tail, last = encoded(f"tail_{stretch}", clip), encoded("tail_1", clip)
    assert tail.shape == head.shape and last.shape[1] == 1
    assert torch.equal(last, encoded("head_1", clip[:, -1:].expand(-1, 2, -1, -1)))
    alone = encoded("latents", clip[:, -stretch:])
    torch.testing.assert_close(tail, alone, rtol=0, atol=1e-5)
    for name in (f"head_{stretch}", f"tail_{stretch}"):
        assert encoded(name, clip[:, :stretch]).numel() == 0  # all of it would be given
    assert encoded("head_1", clip[:, :1]).numel() == 0


def test_what_the_network_is_told(v2: Path) -> None:
    """Mask, then masked latents; each sample has its own condition, and the network sees it."""
    ours = family(v2, conditions={"t2v": 1, "i2v_head": 1, "i2v_tail": 1, "i2v_loop": 1, "v2v_head": 1, "v2v_tail": 1})
    draw = torch.Generator().manual_seed(0)
    frames = {"latents": 12, "head_1": 1, "tail_1": 1, "head_33": 9, "tail_33": 9}
    rows = [
        {name: torch.randn(16, n, 4, 4, generator=draw) for name, n in frames.items()}
        | {"text": torch.randn(512, 32, generator=draw), "pooled": torch.randn(24, generator=draw)}
        for _ in range(40)
    ]
    batch = batch_of(*rows)
    drawn = ours.drawn_conditions(batch, 12)
    assert set(drawn) == set(ours.conditions)
    prepared = ours.prepare(batch)
    assert prepared.given is None, "the network learns all frames"
    cond = prepared.conditioning["cond"]
    assert cond.shape == (40, 17, 12, 4, 4)
    for row, (name, told) in zip(rows, zip(drawn, cond, strict=True), strict=True):
        shown = torch.zeros(16, 12, 4, 4)
        given = torch.zeros(12)
        for end, where in (("head", slice(0, 9)), ("tail", slice(-9, None))):
            if name == f"v2v_{end}":
                shown[:, where], given[where] = row[f"{end}_33"], 1
            elif name in (f"i2v_{end}", "i2v_loop"):
                at = slice(0, 1) if end == "head" else slice(-1, None)
                shown[:, at], given[at] = row[f"{end}_1"], 1
        assert torch.equal(told[1:], shown) and torch.equal(told[0], given[:, None, None].expand(12, 4, 4))
    network = ours.load("network", "cpu", torch.float32)
    x_t, t = torch.randn(40, 16, 12, 4, 4, generator=draw), torch.full((40,), 0.5)
    with torch.no_grad():
        seen = ours.predict(network, x_t, t, prepared.conditioning)
        unseen = ours.predict(network, x_t, t, prepared.conditioning | {"cond": torch.zeros_like(cond)})
    changed = (seen - unseen).flatten(1).abs().amax(1) > 1e-4
    assert changed.tolist() == [name != "t2v" for name in drawn]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"conditions": {"i2v_heat": 1}}, r"no condition 'i2v_heat'.*i2v_head.*Known: t2v"),
        ({"conditions": {"v2v_head_8": 1}}, r"model\.conditions: v2v_head_8: .* nearest: 5 or 9"),
        ({"conditions": {"t2v": 0, "i2v_head": 0}}, r"no weight is above 0"),
        ({"conditions": {}}, r"no weight is above 0"),
        ({"guidance": 4.0}, r"model\.guidance: this network has no guidance embedding"),
        ({"first_frame_p": 0.5}, r"model\.first_frame_p: open_sora has nothing that reads it"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(model: dict[str, Any], message: str, v2: Path) -> None:
    whole = Config.model_validate(config({"path": str(v2), **model}))
    with pytest.raises(ConfigError, match=message):
        open_family(whole.model).validate(whole)


def test_negative_weights_are_refused_when_the_file_is_read() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Config.model_validate(config({"conditions": {"t2v": -1}}))


def test_other_families_have_no_conditions(tmp_path: Path) -> None:
    whole = Config.model_validate(config({"family": "wan", "variant": "t2v-1.3b", "conditions": {"t2v": 1}}))
    with pytest.raises(ConfigError, match=r"model\.conditions: wan has nothing that reads it"):
        open_family(whole.model).validate(whole)


def test_the_shipped_mix_and_pictures_are_fine(v2: Path) -> None:
    whole = Config.model_validate(config({"path": str(v2), "conditions": {"t2v": 1, "v2v_head": 2.5}}))
    open_family(whole.model).validate(whole)


# -- networks of other kinds -------------------------------------------------------------------------------------------


def with_network(directory: Path, model: Path, **changes: Any) -> Path:
    """A model directory with another network."""
    settings = json.loads((model / "transformer" / "config.json").read_text())
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    OpenSoraTransformer(**settings | changes).save_pretrained(directory / "network")
    return directory / "network"


def test_a_network_without_conditions_is_told_none(v2: Path, tmp_path: Path) -> None:
    """As the authors train on pictures and in their first stage."""
    place = with_network(tmp_path, v2, cond_embed=False)
    ours = family(v2, network={"path": str(place)})
    assert names(ours) == ["text", "pooled", "latents"] and ours.conditions == {"t2v": 1.0}
    row = {"text": torch.zeros(512, 32), "pooled": torch.zeros(24), "latents": torch.zeros(16, 3, 4, 4)}
    prepared = ours.prepare(batch_of(row))
    assert set(prepared.conditioning) == {"encoder_hidden_states", "pooled_projections"}
    network = ours.load("network", "cpu", torch.float32)
    assert ours.predict(network, torch.zeros(1, 16, 3, 4, 4), torch.tensor([0.5]), prepared.conditioning).shape[2] == 3
    whole = Config.model_validate(
        config({"path": str(v2), "network": {"path": str(place)}, "conditions": {"i2v_head": 1}})
    )
    with pytest.raises(ConfigError, match=r"told no frames \(cond_embed = false\), which i2v_head needs"):
        open_family(whole.model).validate(whole)


def test_a_distilled_network_is_told_the_guidance_scale(v2: Path, tmp_path: Path) -> None:
    place = with_network(tmp_path, v2, guidance_embed=True)
    told: list[float] = []
    for model in ({}, {"guidance": 2.5}):
        ours = family(v2, network={"path": str(place)}, **model)
        network = ours.load("network", "cpu", torch.float32)
        network.register_forward_pre_hook(lambda _m, _a, kw: told.append(float(kw["guidance"][0])), with_kwargs=True)
        row = {"text": torch.zeros(512, 32), "pooled": torch.zeros(24), "latents": torch.zeros(16, 1, 4, 4)}
        ours.predict(
            network, torch.zeros(1, 16, 1, 4, 4), torch.tensor([0.5]), ours.prepare(batch_of(row)).conditioning
        )
        whole = Config.model_validate(config({"path": str(v2), "network": {"path": str(place)}, **model}))
        open_family(whole.model).validate(whole)
    assert told == [4.0, 2.5]
    check_image_guidance(family(v2), 3.0)
    check_image_guidance(ours, None)
    with pytest.raises(UserError, match="--image-guidance: v2 has no guidance of its own for pictures"):
        check_image_guidance(ours, 3.0)


def test_the_networks_configuration_is_read_once(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of ten thousand rows asks as often what the network can do."""
    read: list[str] = []
    own = family(v2)
    known = type(own).known_config
    monkeypatch.setattr(OpenSora, "known_config", lambda self, part: read.append(part) or known(self, part))
    for _ in range(5):
        own.check_steering(Steering(), 17, 7.5, [])
    assert len(read) == 2, "whether it is told frames, and whether it was distilled"


# -- parts -------------------------------------------------------------------------------------------------------------


def test_wans_autoencoder_may_come_from_the_hub_or_from_a_single_file(
    v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = open_family(
        ModelConfig(family="wan", path=str(family_class("wan").tiny(tmp_path / "hub" / ("c" * 40), "t2v-1.3b")))
    )
    snapshot = Path(str(wan.config.path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    ours = family(v2, autoencoder={"path": "somebody/wan"})
    own = ours.load("autoencoder", "cpu", torch.float32)
    assert type(own).__name__ == "AutoencoderKLWan"
    theirs = wan.load("autoencoder", "cpu", torch.float32)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in own.state_dict().items())
    assert ours.fingerprint(["autoencoder"]) != family(v2).fingerprint(["autoencoder"])

    published = {"wan.safetensors": "encoder.conv1.weight", "hunyuan.safetensors": "encoder.conv_in.conv.weight"}
    for file, name in published.items():
        save_file({name: torch.zeros(1, 1, 1, 1, 1)}, tmp_path / file)
    kinds = [type(family(v2, autoencoder={"path": str(tmp_path / file)}).empty("autoencoder")) for file in published]
    assert [kind.__name__ for kind in kinds] == ["AutoencoderKLWan", "AutoencoderKLHunyuanVideo"]


def test_text_is_what_flux_makes_of_it(v2: Path) -> None:
    """T5 and CLIP as diffusers' Flux pipeline uses them: padding is attended to, by T5 and by the network."""
    from diffusers import FluxPipeline

    ours = family(v2)
    parts = {
        name: ours.load(name, "cpu", torch.float32) for name in ours.variant.parts if name.startswith(("text", "tok"))
    }
    flux = FluxPipeline(None, None, parts["text_encoder"], parts["tokenizer"], parts["text_encoder_2"], parts["tokenizer_2"], None)  # fmt: skip  # noqa: E501
    caption = "a red ball  moves left"
    for encoding in ours.encodings()[:2]:
        (row,) = ours.encode(encoding, {part: parts[part] for part in encoding.parts}, [Sample(caption)])
        with torch.no_grad():
            if encoding.name == "text":
                theirs = flux._get_t5_prompt_embeds(caption, max_sequence_length=512)[0]
            else:
                theirs = flux._get_clip_prompt_embeds(caption)[0]
        torch.testing.assert_close(row[encoding.name], theirs, rtol=0, atol=1e-6)
    assert [encoding.text_encoder for encoding in ours.encodings()[:2]] == ["text_encoder_2", "text_encoder"]


def test_whole_clips_in_time_and_tiles_in_space(v2: Path) -> None:
    """As the authors use HunyuanVideo's autoencoder; diffusers cuts clips of more than 16 frames in time."""
    ours = family(v2)
    autoencoder = ours.load("autoencoder", "cpu", torch.float32)
    assert autoencoder.use_tiling and (autoencoder.tile_sample_min_width, autoencoder.tile_sample_stride_width) == (
        256,
        192,
    )
    clip = noise_clip(33, height=32, width=32)
    (row,) = ours.encode_latents(autoencoder, [Sample("", clip)])
    with torch.no_grad():
        moments = autoencoder.quant_conv(autoencoder.encoder(clip[None].float() / 127.5 - 1))
    expected = moments.chunk(2, dim=1)[0] * 0.476986
    torch.testing.assert_close(row["latents"][None], expected, rtol=0, atol=1e-5)
    assert row["latents"].shape == (16, 9, 4, 4) and (row["latents_std"] > 0).all()


def test_the_authors_directory_is_read_as_it_is(v2: Path, tmp_path: Path) -> None:
    """Open_Sora_v2.safetensors, hunyuan_vae.safetensors, and the text encoders in folders of their makers. At tiny size
    configurations lie beside the weights, which the authors' repository need not have."""
    root = tmp_path / "ckpts"
    for folder, place in (
        ("text_encoder", "openai/clip-vit-large-patch14"),
        ("tokenizer", "openai/clip-vit-large-patch14"),
        ("text_encoder_2", "google/t5-v1_1-xxl"),
        ("tokenizer_2", "google/t5-v1_1-xxl"),
    ):
        (root / place).mkdir(parents=True, exist_ok=True)
        for file in (v2 / folder).iterdir():
            (root / place / file.name).write_bytes(file.read_bytes())
    save_file(load_file(next((v2 / "transformer").glob("*.safetensors"))), root / "Open_Sora_v2.safetensors")
    save_file(load_file(next((v2 / "vae").glob("*.safetensors"))), root / "hunyuan_vae.safetensors")
    ours = family(root, variant="v2")
    found = {part: ours._find(part) for part in ours.variant.parts if part != "scheduler"}
    assert {part: one and one.place.name for part, one in found.items()} == {
        "network": "Open_Sora_v2.safetensors",
        "autoencoder": "hunyuan_vae.safetensors",
        "text_encoder": "clip-vit-large-patch14",
        "tokenizer": "clip-vit-large-patch14",
        "text_encoder_2": "t5-v1_1-xxl",
        "tokenizer_2": "t5-v1_1-xxl",
    }
    text = {part: ours.load(part, "cpu", torch.float32) for part in ("text_encoder_2", "tokenizer_2")}
    theirs = {part: family(v2).load(part, "cpu", torch.float32) for part in text}
    one, other = (
        ours.encode(ours.encodings()[0], parts, [Sample("a red ball")])[0]["text"] for parts in (text, theirs)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["v2", "v2-dc"])
def test_a_single_file_says_which_variant_it_is(name: str, tmp_path: Path) -> None:
    """The published shapes: 64 + 4 channels of given frames, or 128 + 1."""
    channels, more = (64, 4) if name == "v2" else (128, 1)
    for cond in (True, False):
        state = {"img_in.weight": torch.zeros(8, channels), "single_blocks.0.linear2.bias": torch.zeros(8)}
        if cond:
            state["cond_in.weight"] = torch.zeros(8, channels + more)
        save_file(state, tmp_path / "some.safetensors")
        assert family(tmp_path / "some.safetensors").variant.name == name
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(8, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not an Open-Sora network"):
        _ = family(tmp_path / "other.safetensors").variant


def test_a_directory_says_which_variant_it_is(tiny: Path) -> None:
    assert family(tiny).variant.name == tiny.name


def test_published_sizes() -> None:
    shipped = Path(open_sora.__file__).parent / "configs" / "open_sora"
    settings = json.loads((shipped / "v2" / "transformer" / "config.json").read_text())
    published = OpenSoraTransformer.load_config(shipped / "v2" / "transformer")
    assert {key: published[key] for key in ("hidden_size", "num_heads", "depth", "depth_single_blocks")} == {
        "hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    }  # fmt: skip
    assert settings["axes_dim"] == [16, 56, 56] and settings["in_channels"] == 64 and settings["cond_embed"] is True
    dense = json.loads((shipped / "v2-dc" / "transformer" / "config.json").read_text())
    assert {key for key in settings if dense[key] != settings[key]} == {"in_channels", "patch_size"}
    assert (dense["in_channels"], dense["patch_size"]) == (128, 1)
    # 129 frames at 16:9 of 256px and 768px.
    ours = family(variant="v2")
    assert [ours.tokens(torch.empty(1, 16, 33, h // 8, w // 8)) for h, w in ((192, 336), (576, 1024))] == [
        8_316,
        76_032,
    ]
    assert ours.resolution_shift(8_316, 33) == pytest.approx(5.73, abs=5e-3)
    assert ours.resolution_shift(76_032, 33) == pytest.approx(11.87, abs=5e-3)


def test_every_linear_layer_of_the_blocks_is_adapted(v2: Path) -> None:
    ours = family(v2)
    network = ours.load("network", "cpu", torch.float32)
    pattern = re.compile("|".join(ours.adapter_targets()))
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear) and "blocks." in name}
    assert linear == {name for name, _ in network.named_modules() if pattern.fullmatch(name)}
