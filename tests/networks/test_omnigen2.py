"""OmniGen2's network against golden tensors from its authors' code (tests/golden/omnigen2), and its properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kinema.errors import UserError
from kinema.networks.omnigen2 import OmniGen2Transformer2DModel

GOLDEN = Path(__file__).parents[1] / "golden" / "omnigen2"
CASES = ("text_only", "one_reference", "two_references", "mixed_sizes")
TOLERANCE = 1e-5
PUBLISHED_PARAMETERS = 3_967_161_400
"""The authors say 4B; this number is that of users who counted, and that of the shapes below."""


def golden_network() -> OmniGen2Transformer2DModel:
    network = OmniGen2Transformer2DModel.from_config(json.loads((GOLDEN / "config.json").read_text()))
    network.load_state_dict(load_file(GOLDEN / "weights.safetensors"))
    return network.eval()


@pytest.fixture(scope="module")
def network() -> OmniGen2Transformer2DModel:
    """The network with the golden weights. Leave it as it is."""
    return golden_network().requires_grad_(False)


def golden_case(name: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "cases.safetensors")
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def numbered(case: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """``prefix.0``, ``prefix.1``..., as far as there are any."""
    found = []
    while (key := f"{prefix}.{len(found)}") in case:
        found.append(case[key])
    return found


def run(network: nn.Module, case: dict[str, Tensor], rows: list[int] | None = None) -> list[Tensor]:
    """Predictions for a golden case, or for these samples of it."""
    latents = numbered(case, "latents")
    rows = list(range(len(latents))) if rows is None else rows
    references = [numbered(case, f"reference.{i}") for i in rows]
    arguments = (case["time"][rows], case["text"][rows], case["mask"][rows])
    return network([latents[i] for i in rows], *arguments, references).sample


def block_shapes(modulated: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block of the published checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn.to_q.weight": (2520, 2520),
        "attn.to_k.weight": (840, 2520),
        "attn.to_v.weight": (840, 2520),
        "attn.to_out.0.weight": (2520, 2520),
        "attn.norm_q.weight": (120,),
        "attn.norm_k.weight": (120,),
        "feed_forward.linear_1.weight": (10240, 2520),
        "feed_forward.linear_2.weight": (2520, 10240),
        "feed_forward.linear_3.weight": (10240, 2520),
        "ffn_norm1.weight": (2520,),
        "norm2.weight": (2520,),
        "ffn_norm2.weight": (2520,),
    }
    if modulated:
        norm = {"norm1.linear.weight": (10080, 1024), "norm1.linear.bias": (10080,), "norm1.norm.weight": (2520,)}
        return shapes | norm
    return shapes | {"norm1.weight": (2520,)}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (2520, 64),
        "x_embedder.bias": (2520,),
        "ref_image_patch_embedder.weight": (2520, 64),
        "ref_image_patch_embedder.bias": (2520,),
        "time_caption_embed.timestep_embedder.linear_1.weight": (1024, 256),
        "time_caption_embed.timestep_embedder.linear_1.bias": (1024,),
        "time_caption_embed.timestep_embedder.linear_2.weight": (1024, 1024),
        "time_caption_embed.timestep_embedder.linear_2.bias": (1024,),
        "time_caption_embed.caption_embedder.0.weight": (2048,),
        "time_caption_embed.caption_embedder.1.weight": (2520, 2048),
        "time_caption_embed.caption_embedder.1.bias": (2520,),
        "norm_out.linear_1.weight": (2520, 1024),
        "norm_out.linear_1.bias": (2520,),
        "norm_out.linear_2.weight": (64, 2520),
        "norm_out.linear_2.bias": (64,),
        "image_index_embedding": (5, 2520),
    }
    for group, count in {"noise_refiner": 2, "ref_image_refiner": 2, "context_refiner": 2, "layers": 32}.items():
        for i in range(count):
            block = block_shapes(modulated=group != "context_refiner")
            shapes |= {f"{group}.{i}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize("name", CASES)
def test_predictions_equal_the_authors(network: OmniGen2Transformer2DModel, name: str) -> None:
    case = golden_case(name)
    predictions = run(network, case)
    expected = numbered(case, "prediction")
    assert len(predictions) == len(expected)
    for prediction, golden in zip(predictions, expected, strict=True):
        assert golden.std() > 0.3, "the golden prediction says something"
        torch.testing.assert_close(prediction, golden, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_authors(network: OmniGen2Transformer2DModel, name: str) -> None:
    case = golden_case(name)
    golden = {key: case[f"gradient.{key}"] for key in case if f"gradient.{key}" in case}
    assert {"latents.0", "text"} <= golden.keys()
    if name != "text_only":
        assert "reference.0.0" in golden or "reference.1.0" in golden
    for key in golden:
        case[key].requires_grad_()
    probes = numbered(case, "probe")
    sum((p * q).sum() for p, q in zip(run(network, case), probes, strict=True)).backward()
    for key, expected in golden.items():
        scale = expected.abs().max().item()
        assert scale > 1e-2
        torch.testing.assert_close(case[key].grad, expected, rtol=0, atol=TOLERANCE * max(1.0, scale))


def test_full_size_network_has_the_published_parameters() -> None:
    with torch.device("meta"):
        network = OmniGen2Transformer2DModel()
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == published_shapes()
    assert network.state_dict().keys() == published_shapes().keys()
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED_PARAMETERS


def test_untrained_network_predicts_zero() -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    assert all(
        p.count_nonzero() == 0 for p in run(OmniGen2Transformer2DModel.from_config(config), golden_case(CASES[2]))
    )


def test_gradients_reach_every_parameter() -> None:
    network = golden_network()
    generator = torch.Generator().manual_seed(0)
    references = [[torch.randn(4, 4, 2 + 2 * j, generator=generator) for j in range(5)], []]
    latents, text = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(2, 7, 20, generator=generator)
    network(latents, torch.tensor([0.2, 0.7]), text, None, references).sample.square().mean().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    assert network.image_index_embedding.grad is not None
    assert (network.image_index_embedding.grad.abs().sum(dim=1) > 0).all(), "each of the five places"


def test_without_references_their_parameters_get_zero_gradients() -> None:
    """Sharded parameters need the same blocks, and gradients of the same parameters, on every rank."""
    network = golden_network()
    case = golden_case("text_only")
    sum(p.square().mean() for p in run(network, case)).backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    zero = {name for name, grad in grads.items() if grad is not None and grad.count_nonzero() == 0}
    assert zero == {name for name in grads if name.startswith(("ref_image_", "image_index_embedding"))}


@pytest.mark.parametrize("name", ["two_references", "mixed_sizes"])
def test_a_sample_is_predicted_alone_as_in_company(network: OmniGen2Transformer2DModel, name: str) -> None:
    case = golden_case(name)
    together = run(network, case)
    for i, expected in enumerate(together):
        alone = {
            **case,
            "text": case["text"][:, : case["mask"][i].sum()],
            "mask": case["mask"][:, : case["mask"][i].sum()],
        }
        references = numbered(case, f"reference.{i}")
        alone = {k: v for k, v in alone.items() if not k.startswith(("reference.", "latents."))}
        alone |= {"latents.0": case[f"latents.{i}"]} | {f"reference.0.{j}": r for j, r in enumerate(references)}
        alone |= {key: alone[key][i : i + 1] for key in ("time", "text", "mask")}
        torch.testing.assert_close(run(network, alone)[0], expected, rtol=0, atol=TOLERANCE)


def test_what_is_padding_does_not_matter(network: OmniGen2Transformer2DModel) -> None:
    case = golden_case("two_references")
    other = {**case, "text": torch.where(case["mask"][..., None], case["text"], 7.0)}
    for prediction, expected in zip(run(network, other), run(network, case), strict=True):
        assert torch.equal(prediction, expected)


def test_batched_latents_and_no_mask_are_the_same(network: OmniGen2Transformer2DModel) -> None:
    case = golden_case("one_reference")
    references = [[case["reference.0.0"]]]
    batched = network(case["latents.0"][None], case["time"], case["text"], None, references, return_dict=False)
    assert isinstance(batched, tuple)
    torch.testing.assert_close(batched[0][0], case["prediction.0"], rtol=0, atol=TOLERANCE)


def test_the_order_of_references_matters(network: OmniGen2Transformer2DModel) -> None:
    case = golden_case("two_references")
    swapped = {**case, "reference.0.0": case["reference.0.1"], "reference.0.1": case["reference.0.0"]}
    assert (run(network, swapped)[0] - run(network, case)[0]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["text_only", "two_references"])
def test_blocks_run_in_order(name: str) -> None:
    network = golden_network()
    groups = ("context_refiner", "noise_refiner", "ref_image_refiner", "layers")
    listed = {id(block): f"{group}.{i}" for group in groups for i, block in enumerate(getattr(network, group))}
    seen: list[str] = []
    for module in network.modules():
        if id(module) in listed:
            module.register_forward_pre_hook(lambda block, _: seen.append(listed[id(block)]))
    run(network, golden_case(name))
    assert seen == list(listed.values())


def test_saved_and_loaded(network: OmniGen2Transformer2DModel, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    config = OmniGen2Transformer2DModel.load_config(tmp_path)
    assert config["_class_name"] == "OmniGen2Transformer2DModel"
    assert OmniGen2Transformer2DModel.from_config(config).config == network.config
    again = OmniGen2Transformer2DModel.from_pretrained(tmp_path)
    for got, expected in zip(
        run(again, golden_case("mixed_sizes")), run(network, golden_case("mixed_sizes")), strict=True
    ):
        assert torch.equal(got, expected)


def test_lora_saved_and_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig

    network, case = golden_network(), golden_case("two_references")
    before = run(network, case)[0]
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapted = {name: p for name, p in network.named_parameters() if "lora_" in name}
    assert len(adapted) == 2 * 4 * 8, "a pair for each of 4 projections of 8 blocks"
    with torch.no_grad():
        for i, parameter in enumerate(adapted.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    expected = run(network, case)[0]
    assert (expected - before).abs().max() > 0.1
    network.save_lora_adapter(tmp_path, adapter_name="default")

    fresh = golden_network()
    fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="loaded", use_safetensors=True)
    torch.testing.assert_close(run(fresh, case)[0], expected, rtol=0, atol=TOLERANCE)


def test_attention_backend_can_be_chosen() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    network, case = golden_network(), golden_case("mixed_sizes")
    with attention_backend(AttentionBackendName.NATIVE):  # set_attention_backend also changes a global: put it back
        network.set_attention_backend("_native_math")
        predictions = run(network, case)
    chosen = {m.processor._attention_backend for m in network.modules() if hasattr(m, "processor")}
    assert chosen == {AttentionBackendName._NATIVE_MATH}
    for prediction, golden in zip(predictions, numbered(case, "prediction"), strict=True):
        torch.testing.assert_close(prediction, golden, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("latent", "references", "text_length", "message"),
    [
        ((4, 4), [(4, 4)] * 6, 3, "6 reference pictures: leave out all but 5"),
        ((4, 68), [], 3, "4 x 68 latents .* larger than the 64 x 64"),
        ((4, 4), [(66, 4)], 3, "66 x 4 latents"),
        ((4, 4), [(64, 4), (60, 4)], 2, r"text \(2 tokens\) and 2 reference pictures need 65 positions"),
        ((4, 4), [], 65, r"text \(65 tokens\)"),
    ],
)
def test_what_the_model_has_no_positions_for_is_refused(
    network: OmniGen2Transformer2DModel,
    latent: tuple[int, int],
    references: list[tuple[int, int]],
    text_length: int,
    message: str,
) -> None:
    inputs = (torch.zeros(1, 4, *latent), torch.zeros(1), torch.zeros(1, text_length, 20), None)
    with pytest.raises(UserError, match=message):
        network(*inputs, [[torch.zeros(4, *size) for size in references]])
