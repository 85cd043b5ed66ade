"""Open-Sora's sampler over tensors, against what the original gives (tests/golden/open_sora), and its rules by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from kinema.errors import UserError
from kinema.families.open_sora_denoise import ALL, Branch, denoise, shares
from kinema.families.open_sora_schedule import (
    Guidance,
    growing_with_time,
    oscillating,
    schedule,
    shift_of,
    shifted_time,
)
from kinema.families.open_sora_strategy import Conditions, Given, lay_out, named_condition, parse_strategy
from kinema.families.resolutions import size
from kinema.networks.open_sora import pack, positions, unpack

GOLDEN = Path(__file__).parents[1] / "golden" / "open_sora"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "sampling_denoise.json").read_text())["cases"]
TABLES: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "sampling_aspect_tables.json").read_text())[
    "inference sizes [height, width] by compression/resolution"
]


@pytest.fixture(scope="module")
def times() -> dict[str, Any]:
    return json.loads((GOLDEN / "sampling_schedule.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sampling_denoise.safetensors")


@pytest.fixture(scope="module")
def packing() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sampling_pack_ids.safetensors")


# -- sizes and times -------------------------------------------------------------------------------------------------


def test_sizes_are_the_originals() -> None:
    checked = 0
    for name, table in TABLES.items():
        grid, resolution = name.removeprefix("D").split("/")
        for ratio, expected in table.items():
            assert list(size(resolution, ratio, int(grid))) == expected, (name, ratio)
            checked += 1
    assert checked == 300


def test_other_sizes_follow_the_rule() -> None:
    assert size("256px") == (192, 336)
    height, width = size("256px", "21:9")
    assert (height, width) == (160, 384) and size("256px", "9:21") == (width, height)
    for wrong in ("256", "px", "256pxp", "0px", "-2p"):
        with pytest.raises(UserError, match="is no resolution"):
            size(wrong)
    for wrong in ("16", "16:9:1", "0:1", "a:b", "inf:1"):
        with pytest.raises(UserError, match="is no shape"):
            size("256px", wrong)
    with pytest.raises(UserError, match="shorter than 16 pixels"):
        size("15px", "2:1")


def test_times_are_exact(times: dict[str, Any]) -> None:
    for case in times["get_schedule_cases"]:
        told = case["num_steps"], case["image_seq_len"], case["latent_frames"]
        assert shift_of(*told[1:]) == case["shift_alpha"]
        assert schedule(*told) == schedule(*told, True) == case["timesteps"]
        assert schedule(*told, case["shift_alpha"]) == case["timesteps"]
    assert len(times["get_schedule_cases"]) == 72
    for other in times["get_schedule_other"]:
        kwargs = other["kwargs"]
        shift = kwargs.get("shift_alpha") if kwargs.get("shift", True) else False
        if "base_shift" in kwargs or "max_shift" in kwargs:
            low, high = kwargs.get("base_shift", 1), kwargs.get("max_shift", 3)
            shift = shift_of(kwargs["image_seq_len"], kwargs["num_frames"], low, high)
        assert schedule(kwargs["num_steps"], kwargs["image_seq_len"], kwargs["num_frames"], shift) == other["timesteps"]
    for shift, expected in times["time_shift_of_linspace_0_1_21"].items():
        assert shifted_time(torch.linspace(0, 1, 21), float(shift)).tolist() == expected
    for tokens, expected in times["get_res_lin_function_default"].items():
        assert shift_of(int(tokens), 1) == expected


def test_a_shift_of_one_is_a_number_and_not_yes() -> None:
    assert schedule(4, 4096, 9, 1.0) == schedule(4, 4096, 9, False) == [1, 0.75, 0.5, 0.25, 0]
    assert schedule(4, 4096, 9)[2] == pytest.approx(9 * 0.5 / (1 + 8 * 0.5))  # 3 of the tokens, times root 9


def test_oscillation(times: dict[str, Any]) -> None:
    found = times["get_oscillation_gs_for_i_0_to_29"]
    for scale in (7.5, 3.0):
        assert [oscillating(scale, i) for i in range(30)] == found[str(scale)]
    assert [oscillating(3.0, i, 4) for i in range(30)] == found["3.0_force_num_4"]
    assert [i for i in range(20) if oscillating(3.0, i) == 1] == [11, 13, 15, 17, 19]


def test_the_scale_of_frames_grows_over_the_video() -> None:
    grown = growing_with_time(3.0, 5, 10, 4)
    assert grown.tolist() == pytest.approx([1, 1 + 1 / 3, 1 + 2 / 3, 2])  # halfway from 3 to 1, the largest is 2
    assert growing_with_time(3.0, 5, 10, 1).tolist() == [1]
    guidance = Guidance(image=3.0, text_osci=False)
    assert guidance.scales(11, 20, 4) == (7.5, 1.0)  # a low step of its oscillation does not grow
    assert torch.is_tensor(guidance.scales(12, 20, 4)[1])
    assert Guidance(text=None, image_osci=False, scale_temporal_osci=False).scales(11, 20, 4) == (None, 3.0)


# -- tokens and noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [2, 1])
def test_packing(packing: dict[str, Tensor], patch: int) -> None:
    x, packed = packing[f"pack{patch}.x"], packing[f"pack{patch}.packed"]
    assert torch.equal(pack(x, patch), packed)
    assert torch.equal(unpack(packed, x.shape[2:], patch), x)


def test_positions(packing: dict[str, Tensor]) -> None:
    ids = packing["prepare_ids.out.img_ids"]
    assert ids.shape == (2, 72, 3)  # 3 frames of 4 x 6 tokens
    assert all(torch.equal(positions((3, 8, 12), 2), own) for own in ids)
    assert not packing["prepare_ids.out.txt_ids"].any()


def test_noise_is_that_of_a_generator(packing: dict[str, Tensor]) -> None:
    """208 x 368 pixels with 16 channels, and 192 x 352 with 128 of the video DC-AE."""
    for name, shape, seed in (
        ("noise_d16_p2", (2, 16, 3, 26, 46), 42),
        ("noise_d32_p1", (1, 128, 2, 6, 11), 1234),
    ):
        drawn = randn_tensor(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        assert torch.equal(drawn, packing[name])


# -- what is given ---------------------------------------------------------------------------------------------------


def conditions_of(golden: dict[str, Tensor], patch: str, name: str, z: Tensor) -> Conditions:
    strategy = named_condition(name).strategy
    references = {"t2v": [], "i2v_head": ["head"], "i2v_tail": ["tail"], "i2v_loop": ["head", "tail"]}[name]
    own = [[golden[f"{patch}.ref_{which}"][i] for which in references] for i in range(len(z))]
    return lay_out([strategy] * len(z), own, z)


@pytest.mark.parametrize("patch", ["p1", "p2"])
@pytest.mark.parametrize("name", ["t2v", "i2v_head", "i2v_tail", "i2v_loop"])
def test_masks_of_pictures(golden: dict[str, Tensor], patch: str, name: str) -> None:
    found = conditions_of(golden, patch, name, golden[f"{patch}.z"])
    masks, masked = (golden[f"cond.{patch}.{name}.{which}"] for which in ("masks", "masked_ref"))
    assert torch.equal(found.told(1.0), torch.cat([masks, masked], dim=1))
    assert torch.equal(found.told(1e-3), found.told(1.0)), "given to the end"
    told = pack(found.told(1.0), int(patch[1]))
    assert torch.equal(torch.cat([told, told, 0 * told]), golden[f"cond.{patch}.{name}.model_cond_3B"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"])
def test_masks_of_videos(golden: dict[str, Tensor], name: str, causal: bool) -> None:
    cuts, strategy = named_condition(name, causal)
    z, video = golden["v2v.z"], golden["p2.ref_video"]
    found = lay_out([strategy] * 2, [[video[0]], [video[1]]], z)
    where = f"v2v.{name}.{'causal' if causal else 'uncausal'}"
    assert torch.equal(found.mask(0.5), golden[f"{where}.masks"])
    assert torch.equal(found.told(0.5)[:, 1:], golden[f"{where}.masked_ref"])
    frames = (64 if "easy" in name else 32) + causal
    assert cuts == (((0, frames) if "head" in name else (-1, -frames)),)


def test_frames_are_put_back_into_every_sample(golden: dict[str, Tensor]) -> None:
    """The original does so in the first sample of a batch alone."""
    z = golden["p2.z"]
    back = conditions_of(golden, "p2", "i2v_loop", z).put_back(z)
    assert torch.equal(back[:, :, :1], golden["p2.ref_head"]) and torch.equal(back[:, :, -1:], golden["p2.ref_tail"])
    assert torch.equal(back[:, :, 1:-1], z[:, :, 1:-1])


def test_strategies_in_the_notation_of_1_x() -> None:
    assert parse_strategy("") == {}
    assert parse_strategy("0") == {0: (Given(0, 0, 0, 1, 0.0),)}
    assert parse_strategy("0,0,0,0,8,0.3") == {0: (Given(frames=8, edit=0.3),)}
    found = parse_strategy("0,0,0,0,1; 0,1,0,-1,1;2,1,-4,0,4,0.5")
    assert found == {0: (Given(), Given(1, 0, -1)), 2: (Given(1, -4, 0, 4, 0.5),)}
    for wrong, told in {
        "0,0,0,0,1,0,7": "7 numbers",
        "0,a": "whole numbers",
        "0,0,0,0,1,2": "edit from 0 to 1",
        "0,0,0,0,0": "frames 1 or more",
        "-1": "loop is 0 or more",
    }.items():
        with pytest.raises(UserError, match=told):
            parse_strategy(wrong)
    with pytest.raises(UserError, match=r"no condition 'i2v_haed'.*i2v_head"):
        named_condition("i2v_haed")


def test_what_is_not_there_is_said() -> None:
    like, reference = torch.zeros(1, 2, 4, 1, 1), torch.ones(2, 3, 1, 1)
    with pytest.raises(UserError, match="reference 1; the sample has 1"):
        lay_out([(Given(1),)], [[reference]], like)
    with pytest.raises(UserError, match="Frame 3 is not there: the reference has 3"):
        lay_out([(Given(source=3),)], [[reference]], like)
    with pytest.raises(UserError, match="Frame -5 is not there: the video has 4"):
        lay_out([(Given(target=-5),)], [[reference]], like)


stretches = st.builds(
    Given, st.integers(-2, 1), st.integers(-3, 2), st.integers(-5, 4), st.integers(1, 6), st.sampled_from([0, 0.3, 1.0])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(stretches, max_size=4))
def test_strategies_frame_by_frame(strategy: list[Given]) -> None:
    """The rule of 1.x, one frame at a time: the last stretch that reaches a frame of the video decides."""
    like = torch.zeros(1, 1, 5, 1, 1)
    references = [torch.arange(10.0, 13.0), torch.arange(20.0, 23.0)]
    edit, kept = [1.0] * 5, [0.0] * 5
    for one in strategy:
        source, target = one.source % 3, one.target % 5
        for frame in range(one.frames):
            if source + frame < 3 and target + frame < 5:
                edit[target + frame] = one.edit
                kept[target + frame] = float(references[one.reference][source + frame]) if one.edit < 1 else 0.0
    found = lay_out([tuple(strategy)], [[one.view(1, 3, 1, 1) for one in references]], like)
    assert found.edit.flatten().tolist() == pytest.approx(edit)
    assert found.reference.flatten().tolist() == kept


# -- denoising -------------------------------------------------------------------------------------------------------


class Linear:
    """The fixed model of the golden files, and a record of what it is asked.

    ``apart``: the pass that is told nothing has a negative text of its own. It has in the golden files, whose three
    texts were all drawn; in use the two negative texts are one.
    """

    def __init__(self, golden: dict[str, Tensor], patch: int, scale: float, apart: bool = False) -> None:
        self.patch, self.scale, self.apart = patch, scale, apart
        self.asked: list[list[Branch]] = []
        self.own = {key.removeprefix(f"p{patch}."): v for key, v in golden.items() if key.startswith(f"p{patch}.")}

    def __call__(self, x: Tensor, t: float, told: Tensor | None, branches: Sequence[Branch]) -> list[Tensor]:
        self.asked.append(list(branches))
        own = self.own
        w = {key: own[f"model.{key}"] for key in ("Wi", "Wc", "Wt", "Wy", "Wp", "a")}
        tokens = pack(x, self.patch)
        ids = positions(x.shape[2:], self.patch)
        assert torch.equal(ids, own["prepared.img_ids"][0])
        answers = []
        for prompt, frames in branches:
            first = 0 if prompt else 2 if frames or not self.apart else 4
            rows = slice(first, first + 2)
            text = own["txt"][rows].mean(1) @ w["Wt"] + own["y_vec"][rows] @ w["Wy"]
            answer = tokens @ w["Wi"] + text[:, None] + ids @ w["Wp"] + w["a"][0] * t + w["a"][1] * self.scale
            if told is not None and frames:
                answer = answer + pack(told, self.patch) @ w["Wc"]
            answers.append(unpack(answer, x.shape[2:], self.patch))
        return answers


class Always(Conditions):
    """Conditions that count as given though no frame is, so that text-to-video makes all three passes."""

    def given(self, t: float) -> bool:
        return True


def run(golden: dict[str, Tensor], name: str, three: bool, apart: bool) -> tuple[Tensor, Linear]:
    """Our trajectory for a golden case, and the model with what it was asked."""
    case = CASES[name]
    patch, distilled = case["patch_size"], "distilled" in name
    model = Linear(golden, patch, case["guidance"], apart)
    z = golden[f"p{patch}.z"]
    states = [z]

    def on_step(_step: int, _t: float, x: Tensor) -> Tensor:
        states.append(x)
        return x

    guidance, conditions = None, None
    if not distilled:
        osci = (case[key] for key in ("text_osci", "image_osci", "scale_temporal_osci"))
        guidance = Guidance(case["guidance"], case["guidance_img"], *osci)
        conditions = conditions_of(golden, f"p{patch}", case["cond_type"], z)
        conditions = Always(**vars(conditions)) if three else conditions
    denoise(model, z, case["timesteps"], guidance, conditions, on_step)
    return torch.stack([pack(x, patch) for x in states]), model


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of any state, relative to the largest value of that state."""
    largest = expected.abs().amax((1, 2, 3), keepdim=True)
    assert largest[-1].item() > 1  # not a field of zeros that anything equals
    return ((found - expected).abs() / largest).max().item()


@pytest.mark.parametrize("name", CASES)
def test_trajectories_equal_the_originals(golden: dict[str, Tensor], name: str) -> None:
    found, _ = run(golden, name, three=True, apart=True)
    assert len(found) == CASES[name]["num_steps"] + 1
    assert distance(found, golden[f"run.{name}.traj"]) <= 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if "t2v" in name])
def test_two_passes_equal_three(golden: dict[str, Tensor], name: str) -> None:
    """Where no frames are given, and both negative texts are one, as they are in use."""
    two, asked_two = run(golden, name, three=False, apart=False)
    three, asked_three = run(golden, name, three=True, apart=False)
    assert distance(two, three) <= 1e-5
    assert max(map(len, asked_two.asked)) == 2 and max(map(len, asked_three.asked)) == 3


def test_passes_that_cancel_are_not_made(golden: dict[str, Tensor]) -> None:
    def passes(name: str) -> list[int]:
        return [len(asked) for asked in run(golden, name, three=False, apart=False)[1].asked]

    assert passes("p2.t2v.s14.FFF") == [2] * 14
    assert passes("p2.t2v.s14.TTT") == [2] * 11 + [1, 2, 1]
    assert passes("p2.i2v_head.s14.FFF") == [3] * 14
    assert passes("p2.i2v_head.s14.TTT") == [3] * 11 + [1, 3, 1]
    assert passes("p2.i2v_head.s14.TFF") == [3] * 14  # the text alone falls to 1 and the frames do not
    assert passes("p2.i2v_head.s10.TTT_g4_gi1") == [2] * 10
    assert passes("distilled.p2.s4") == [1] * 4


def test_shares_are_the_formula() -> None:
    """n + g_f (f - n) + g_t (c - f), for numbers."""
    c, f, n = 2.0, -3.0, 5.0
    for text, image in ((7.5, 3.0), (1.0, 3.0), (7.5, 1.0), (3.0, 3.0), (1.0, 1.0), (0.0, 0.0)):
        found = shares(text, image, True)
        value = {(True, True): c, (False, True): f, (False, False): n}
        assert sum(share * value[branch] for branch, share in found.items()) == n + image * (f - n) + text * (c - f)
    assert set(shares(1.0, 1.0, True)) == {ALL} and len(shares(3.0, 3.0, True)) == 2
    # without guidance of the text, the frames are compared with the prompt alone: p + g_f (c - p)
    assert shares(None, 3.0, True) == {Branch(True, True): 3.0, Branch(True, False): -2.0}
    assert shares(None, 3.0, False) == {ALL: 1.0}


def test_edited_frames_are_set_free_at_their_time() -> None:
    """A network that moves nothing shows what the sampler itself does to the frames."""
    times = [1.0, 0.8, 0.5, 0.2, 0.0]
    noise = torch.randn(1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    reference = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    strategy = (Given(), Given(0, 1, 1, 1, 0.5), Given(0, 2, 2, 1, 0.9), Given(0, 3, 3, 1, 1.0))
    conditions = lay_out([strategy], [[reference]], noise)
    masks = []

    def still(x: Tensor, t: float, told: Tensor | None, branches: Sequence[Branch]) -> list[Tensor]:
        assert told is not None
        assert torch.equal(told[:, 1:], told[:, :1] * reference)
        masks.append(told[0, 0, :, 0, 0].tolist())
        return [torch.zeros_like(x)] * len(branches)

    x = denoise(still, noise, times, Guidance(), conditions)
    assert masks == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    mixed = {1: 0.5, 2: 0.8}  # the first time that is not above the edit
    for frame in range(4):
        t = mixed.get(frame, 1.0)
        expected = (1 - t) * reference[:, frame] + t * noise[0, :, frame] if frame in mixed else noise[0, :, frame]
        torch.testing.assert_close(x[0, :, frame], expected)
    back = conditions.put_back(x)
    assert torch.equal(back[0, :, 0], reference[:, 0]) and torch.equal(back[:, :, 1:], x[:, :, 1:])


def test_edit_one_is_as_if_nothing_were_given(golden: dict[str, Tensor]) -> None:
    z = golden["p2.z"]
    model = Linear(golden, 2, 7.5)
    times = schedule(6, 6, 4)
    free = lay_out([(Given(edit=1.0),)] * 2, [[one] for one in golden["p2.ref_head"]], z)
    assert torch.equal(denoise(model, z, times, Guidance(), free), denoise(model, z, times, Guidance(), None))
    assert max(map(len, model.asked)) == 2


def test_a_step_is_eulers() -> None:
    """With v = eps - x_0 known, any times lead to x_0."""
    x_0, eps = torch.randn(2, 1, 1, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    heard = []
    for shift in (None, 8.0, False):
        times = schedule(7, 100, 4, shift)
        x = denoise(lambda x, t, told, branches: [eps - x_0] * len(branches), eps, times, None, None)
        torch.testing.assert_close(x, x_0, rtol=0, atol=2e-6)
        heard.append(math.prod(1 + a - b for a, b in pairwise(times)))
    assert len({round(one, 6) for one in heard}) == 3  # the times were three different ones
