"""OmniGen2's pipeline against golden tensors from its authors' code (tests/golden/omnigen2), and its properties."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kinema.errors import UserError
from kinema.networks.omnigen2 import OmniGen2Transformer2DModel
from kinema.networks.omnigen2_pipeline import OmniGen2Pipeline, reference_size

GOLDEN = Path(__file__).parents[1] / "golden" / "omnigen2"
SETTINGS = json.loads((GOLDEN / "pipeline.json").read_text())
TOLERANCE = 2e-5
"""Of values up to about 10."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pipeline.safetensors")


@pytest.fixture
def pipeline(golden: dict[str, Tensor]) -> OmniGen2Pipeline:
    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}

    config = json.loads((GOLDEN / "config.json").read_text()) | {"axes_lens": SETTINGS["axes_lens"]}
    network = OmniGen2Transformer2DModel.from_config(config)
    network.load_state_dict(load_file(GOLDEN / "weights.safetensors"))
    vae = AutoencoderKL(**SETTINGS["vae"])
    vae.load_state_dict(below("vae."))
    mllm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(SETTINGS["mllm"]))
    missing, unexpected = mllm.load_state_dict(below("mllm."), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "processor")
    made = OmniGen2Pipeline(network.eval(), vae.eval(), scheduler, mllm.eval(), tokenizer)
    made.set_progress_bar_config(disable=True)
    return made


def numbered(tensors: dict[str, Tensor], prefix: str) -> Iterator[Tensor]:
    """``prefix.0``, ``prefix.1``..., as far as there are any."""
    number = 0
    while f"{prefix}.{number}" in tensors:
        yield tensors[f"{prefix}.{number}"]
        number += 1


def arguments(golden: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Our call for a golden case."""
    case = SETTINGS["cases"][name]
    pictures = [Image.fromarray(one.numpy()) for one in numbered(golden, f"{name}.picture")]
    height, width = case.get("size", (None, None))
    return {
        "prompt": case["prompts"],
        "negative_prompt": case.get("negative"),
        "image": pictures,
        "height": height,
        "width": width,
        "num_inference_steps": SETTINGS["steps"],
        "guidance_scale": case["text"],
        "image_guidance_scale": case.get("image", 1.0),
        "max_pixels": case.get("pixels", 1024 * 1024),
        "max_input_image_side_length": case.get("side", 1024),
        "max_sequence_length": case.get("length", 1024),
        "latents": golden[f"{name}.noise"],
        "output_type": "pt",
        "return_dict": False,
    }


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", SETTINGS["cases"])
def test_equals_the_authors_pipeline(golden: dict[str, Tensor], pipeline: OmniGen2Pipeline, name: str) -> None:
    """What the network is given in every call, in their order, what is decoded, and the pictures."""
    calls: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    decoded: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, **kwargs: decoded.append(z) or decode(z, **kwargs)
    (images,) = pipeline(**arguments(golden, name))
    case = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
    assert len(calls) == sum(key.endswith(".latents") for key in case) >= SETTINGS["steps"]
    for number, call in enumerate(calls):
        where = f"call.{number}"
        assert_close(call["hidden_states"], case[f"{where}.latents"])
        assert_close(call["timestep"], case[f"{where}.time"])
        if f"{where}.text" not in case:
            continue
        mask = case[f"{where}.mask"].bool()
        assert_close(call["text_hidden_states"][mask], case[f"{where}.text"][mask])
        if call["text_attention_mask"] is None:
            assert mask.all()
        else:
            assert torch.equal(call["text_attention_mask"], mask)
        references = call["ref_image_hidden_states"] or [[] for _ in mask]
        for i, own in enumerate(references):
            theirs = list(numbered(case, f"{where}.reference.{i}"))
            assert len(own) == len(theirs)
            for one, other in zip(own, theirs, strict=True):
                assert_close(one, other)
    assert_close(decoded[0], case["decoded"])
    assert_close(images, case["images"])


def test_embeddings_of_before_give_the_same(golden: dict[str, Tensor], pipeline: OmniGen2Pipeline) -> None:
    """And a text encoder is then not needed."""
    told = arguments(golden, "several")
    expected = pipeline(**told)[0]
    embeds, negative = pipeline.encode_prompt(told["prompt"], True, told["negative_prompt"])
    assert [len(one) for one in embeds] == [28, 33] and negative is not None
    pipeline.mllm = None
    told |= {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    torch.testing.assert_close(pipeline(**told)[0], expected, rtol=0, atol=1e-6)


def test_callback_hears_every_step_and_may_change_the_latents(
    golden: dict[str, Tensor], pipeline: OmniGen2Pipeline
) -> None:
    heard = []

    def end(of: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert of is pipeline
        heard.append((step, round(float(time))))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == SETTINGS["steps"] - 1 else {}

    told = arguments(golden, "text") | {"output_type": "latent", "callback_on_step_end": end}
    assert not pipeline(**told)[0].any()
    # For 4 x 6 latents the shift is sqrt(24) / 40: t = m u / (1 + (m - 1) u) at u = 1, 3/4, 1/2, 1/4.
    m = 24**0.5 / 40
    times = [m * u / (1 + (m - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
    assert heard == [(i, round(1000 * time)) for i, time in enumerate(times)]


def test_a_fixed_shift_replaces_that_of_the_size(golden: dict[str, Tensor], pipeline: OmniGen2Pipeline) -> None:
    from kinema.sampling.pipeline import shifted

    pipeline.scheduler = shifted(pipeline.scheduler, 3.0)
    pipeline(**arguments(golden, "text"))
    expected = [3 * u / (1 + 2 * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor(expected), rtol=0, atol=1e-6)


def test_sizes(golden: dict[str, Tensor], pipeline: OmniGen2Pipeline) -> None:
    assert reference_size(1024, 1024) == (1024, 1024)
    assert reference_size(832, 1216) == (688, 1024)  # the longer side is brought to 1024, the other follows
    assert reference_size(500, 700) == (496, 688)  # never enlarged
    assert reference_size(600, 600, max_pixels=512 * 512) == (512, 512)
    with pytest.raises(UserError, match=r"multiples of 16, not 40 x 48"):
        pipeline(**arguments(golden, "text") | {"height": 40})


def test_noise_comes_from_the_generators(golden: dict[str, Tensor], pipeline: OmniGen2Pipeline) -> None:
    """One generator a sample draws the same noise for it in any batch."""
    told = arguments(golden, "several") | {"latents": None, "output_type": "latent"}
    both = pipeline(**told | {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]})[0]
    second = told | {"prompt": told["prompt"][1], "generator": torch.Generator().manual_seed(2)}
    torch.testing.assert_close(pipeline(**second)[0], both[1:], rtol=0, atol=1e-4)
