import copy
import math
import re

import pytest
import torch
from lora_network import KINDS, TARGETS, run, tiny_network, train_a_little, trained
from torch import Tensor, nn

from kinema.adapters.inject import (
    adapter_of,
    adapter_parameters,
    adapter_state,
    add_adapter,
    fold_adapter,
    leave_casts_to_autocast,
    load_adapter_state,
    merge_adapter,
    start_from,
)
from kinema.adapters.targets import adaptable_modules, match_patterns, plan_layers
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError

kinds = pytest.mark.parametrize("kind", KINDS)


# -- fresh adapters ----------------------------------------------------------------------------------------------------


def test_targets_wrap_every_matching_layer_and_freeze_the_rest(network):
    expected = 2 * (8 + 2 + (2 if network.config.image_dim else 0))
    names = add_adapter(network, AdapterConfig(rank=3), TARGETS, seed=0)
    assert len(names) == expected
    state = adapter_state(network)
    assert state["blocks.1.attn1.to_out.0.lora_A.weight"].shape == (3, 24)
    assert state["blocks.1.ffn.net.0.proj.lora_B.weight"].shape == (40, 3)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trainable == sum(value.numel() for value in state.values())
    base = sum(p.numel() for p in tiny_network(bool(network.config.image_dim)).parameters())
    assert sum(p.numel() for p in network.parameters()) == base + trainable


@kinds
def test_a_fresh_adapter_changes_nothing_and_trains_all_its_weights(kind):
    network = tiny_network()
    before = run(network)
    add_adapter(network, KINDS[kind], TARGETS, seed=0)
    torch.testing.assert_close(run(network), before, rtol=1e-6, atol=1e-7)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        name for name, p in network.named_parameters() if re.search(r"\.(lora_|lokr_|ia3_)", name)
    }
    shapes = {name.rpartition("to_q.")[2]: tuple(p.shape) for name, p in adapter_parameters(network).items()}
    small = {
        "lora": {"lora_A.weight": (4, 24), "lora_B.weight": (24, 4)},
        "dora": {"lora_A.weight": (4, 24), "lora_B.weight": (24, 4), "lora_magnitude_vector": (24,)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)},
        "lokr whole": {"lokr_w1": (4, 4), "lokr_w2": (6, 6)},
        "lokr both": {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 6)},
        "ia3": {"ia3_l": (24, 1)},
    }[kind]
    assert {key: shapes[key] for key in small} == small


def test_a_fresh_dora_on_a_bf16_base_changes_nothing_either():
    network = tiny_network().to(torch.bfloat16)
    layer = network.blocks[0].attn1.to_q
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    before = layer(x)
    add_adapter(network, KINDS["dora"], TARGETS, seed=0)
    assert torch.equal(network.blocks[0].attn1.to_q(x), before)


@kinds
def test_initial_weights_depend_on_seed_and_name_alone(kind):
    states = []
    for seed, noise in ((5, 1), (5, 99), (6, 1)):
        network = tiny_network()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        config = KINDS[kind].model_copy(update={"input_targets": ()})
        add_adapter(network, config, TARGETS if noise == 1 else TARGETS[:1], seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
        states.append(adapter_state(network))
    same, fewer, other = states
    assert all(torch.equal(same[name], fewer[name]) for name in fewer)
    drawn = [name for name in same if name.endswith((".lora_A.weight", ".lokr_w1", ".lokr_w1_a"))]
    assert bool(drawn) == (kind != "ia3")
    for name in drawn:
        assert not torch.equal(same[name], other[name])
        if ".to_q." in name:
            assert not torch.equal(same[name], same[name.replace("to_q", "to_k")])


def test_a_is_kaiming_uniform_and_b_zero():
    network = tiny_network()
    add_adapter(network, AdapterConfig(rank=4), TARGETS, seed=5)
    state = adapter_state(network)
    a = state["blocks.0.attn1.to_q.lora_A.weight"]
    assert a.abs().max() <= 1 / math.sqrt(24)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 24), rel=0.15)
    assert all(not value.any() for name, value in state.items() if "lora_B" in name)


# -- what they compute -------------------------------------------------------------------------------------------------


def test_update_is_alpha_over_rank_times_b_a():
    network = tiny_network()
    layer = network.blocks[0].attn1.to_q
    x = torch.randn(5, 24)
    plain = layer(x).double()
    add_adapter(network, AdapterConfig(rank=4, alpha=10.0), TARGETS, seed=0)
    train_a_little(network)
    state = adapter_state(network)
    a = state["blocks.0.attn1.to_q.lora_A.weight"].double()
    b = state["blocks.0.attn1.to_q.lora_B.weight"].double()
    torch.testing.assert_close(
        network.blocks[0].attn1.to_q(x).double(),
        plain + 10 / 4 * x.double() @ a.T @ b.T,
        rtol=1e-5,
        atol=1e-5,
    )


@kinds
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_merging_is_what_peft_merges_and_leaves_an_ordinary_network(kind, image):
    """Our arithmetic against peft's own merge of the same layers, in float64."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {name for name, _ in tiny_network(image).named_modules()}
    network = trained(kind, image)
    output = run(network)
    assert (output - run(tiny_network(image))).abs().max() > 1e-2, "the adapter does nothing"
    theirs = copy.deepcopy(network).double()
    expected = {}
    for name, module in theirs.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            expected[name] = module.get_base_layer()
    merge_adapter(network)
    assert len(expected) == 2 * (12 if image else 10)
    for name, layer in expected.items():
        merged = network.get_submodule(name)
        torch.testing.assert_close(merged.weight.double(), layer.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged.bias.double(), layer.bias, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(network), output, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in network.named_modules()} == names
    assert not adapter_parameters(network)
    add_adapter(network, AdapterConfig(rank=2), TARGETS, seed=0)  # it takes another one
    torch.testing.assert_close(run(network), output, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 2.0])
def test_a_factor_goes_its_way_between_the_base_and_the_adapted_weights(kind, factor):
    network = trained(kind)
    adapter = adapter_of(network)
    base, whole, part = tiny_network(), tiny_network(), tiny_network()
    fold_adapter(whole, adapter)
    fold_adapter(part, adapter, factor)
    for name, value in base.state_dict().items():
        expected = value.double() + factor * (whole.state_dict()[name].double() - value.double())
        torch.testing.assert_close(part.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_updates_of_several_adapters_add_up():
    first, second = trained("lora"), trained("lokr", targets=("to_q", "proj_out"))
    base, both = tiny_network().state_dict(), tiny_network()
    expected = {name: value.clone() for name, value in base.items()}
    for one in (first, second):
        fold_adapter(both, adapter_of(one))
        merge_adapter(one)
        for name, value in one.state_dict().items():
            expected[name] += value - base[name]
    torch.testing.assert_close(dict(both.state_dict()), expected, rtol=1e-5, atol=1e-5)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.point(self.first(x)).mean((-1, -2)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ia3"])
@pytest.mark.parametrize("rank", [1, 8])
def test_convolutions_adapt_and_merge_too(kind, rank):
    network = Convolutions()
    config = KINDS[kind].model_copy(update={"rank": rank})
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    plain = network(x)
    add_adapter(network, config, ("first", "point", "last"), seed=0)
    torch.testing.assert_close(network(x), plain, rtol=1e-5, atol=1e-6)
    train_a_little(network)
    expected = network(x)
    assert (expected - plain).abs().max() > 1e-2
    merge_adapter(network)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", [(), ("first", "last")])
def test_ia3_multiplies_outputs_or_inputs_of_convolutions(inputs):
    network = Convolutions()
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    add_adapter(network, AdapterConfig(type="ia3", input_targets=inputs), ("first", "last"), seed=0)
    train_a_little(network)
    expected = network(x)
    adapter = adapter_of(network)
    assert adapter.on_input == set(inputs)
    plain = Convolutions()
    assert not torch.allclose(plain(x), expected, atol=1e-2)
    fold_adapter(plain, adapter)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


def test_three_dimensional_convolutions_adapt_where_peft_can():
    network = tiny_network()
    add_adapter(network, AdapterConfig(rank=2, targets=("patch_embedding",)), (), seed=0)
    train_a_little(network)
    output = run(network)
    merge_adapter(network)
    torch.testing.assert_close(run(network), output, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r'type = "lokr" cannot adapt patch_embedding, a Conv3d.*adapter\.exclude'):
        add_adapter(tiny_network(), AdapterConfig(type="lokr", targets=("patch_embedding",)), (), seed=0)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapter_on_a_bf16_base_trains_in_and_out_of_autocast(autocast):
    network = tiny_network().to(torch.bfloat16)
    add_adapter(network, AdapterConfig(rank=2), TARGETS, seed=0)
    assert {p.dtype for p in adapter_parameters(network).values()} == {torch.float32}
    x = torch.randn(1, 16, 2, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = network(x, torch.tensor([400]), torch.randn(1, 6, 20, dtype=torch.bfloat16), return_dict=False)[0]
    out.float().square().mean().backward()
    for name, parameter in adapter_parameters(network).items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.any()) == ("lora_B" in name), name
    assert all(p.grad is None for n, p in network.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_casts_left_to_autocast_change_no_bit_and_keep_less(kind):
    found = []
    for left in (False, True):
        network = trained(kind).to(torch.bfloat16)
        for parameter in adapter_parameters(network).values():
            parameter.data = parameter.data.float()
        if left:
            leave_casts_to_autocast(network, AdapterConfig(type=kind))
        draw = torch.Generator().manual_seed(3)
        x, text = torch.randn(1, 16, 2, 8, 8, generator=draw), torch.randn(1, 6, 20, generator=draw)
        kept: dict[int, Tensor] = {}  # held, so that no storage has another's address

        def pack(one: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept.setdefault(one.untyped_storage().data_ptr(), one)
            return one

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            out = network(x, torch.tensor([400.0]), text, return_dict=False)[0]
        out.float().square().mean().backward()
        size = sum(one.untyped_storage().nbytes() for one in kept.values())
        found.append((out, {name: p.grad for name, p in adapter_parameters(network).items()}, size))
    (out, gradients, size), (same, same_gradients, less) = found
    assert torch.equal(out, same) and less < 0.95 * size
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


@kinds
def test_every_weight_of_a_trained_adapter_gets_a_gradient(kind):
    network = trained(kind)
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 20)
    network(x, torch.tensor([400.0]), text, return_dict=False)[0].square().mean().backward()
    for name, parameter in adapter_parameters(network).items():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for n, p in network.named_parameters() if not p.requires_grad)


@kinds
def test_dtype_of_the_adapter(kind):
    network = tiny_network()
    add_adapter(network, KINDS[kind].model_copy(update={"dtype": "bf16"}), TARGETS, seed=0)
    assert {p.dtype for p in adapter_parameters(network).values()} == {torch.bfloat16}
    assert run(network).dtype == torch.float32


@pytest.mark.parametrize(
    "config", [{"dropout": 0.5}, {"type": "dora", "dropout": 0.5}, {"type": "lokr", "rank": 2, "rank_dropout": 0.5}]
)
def test_dropout_acts_in_training_alone(config):
    network = tiny_network()
    add_adapter(network, AdapterConfig(**config), TARGETS, seed=0)
    train_a_little(network)
    network.eval()
    assert torch.equal(run(network), run(network))
    network.train()
    assert not torch.equal(run(network), run(network))


@kinds
def test_state_moves_to_another_network(kind):
    one, two = tiny_network(), tiny_network()
    for network in (one, two):
        add_adapter(network, KINDS[kind], TARGETS, seed=0)
    train_a_little(one)
    load_adapter_state(two, adapter_state(one))
    assert torch.equal(run(one), run(two))
    short = dict(adapter_state(one))
    name = min(short)
    short.pop(name)
    with pytest.raises(UserError, match=rf"1 missing, 0 unknown, for instance {re.escape(name)}"):
        load_adapter_state(two, short)
    wrong = {name: value[:0] for name, value in adapter_state(one).items()}
    with pytest.raises(UserError, match=r"has shape \(0.*rank, decompose_factor"):
        load_adapter_state(two, wrong)


@pytest.mark.parametrize("stored", ["fp8", "int8", "nf4"])
@kinds
def test_a_base_in_few_bits_takes_every_kind(kind, stored):
    """Fresh, trained and folded in as on the same weights, rounded, in ordinary layers."""
    from kinema.networks.quantized import QuantizedLinear, quantize, restore

    network, rounded = tiny_network(), tiny_network()
    quantize([network.blocks], stored)
    quantize([rounded.blocks], stored)
    restore(rounded)
    fresh = run(network)
    for one in (network, rounded):
        add_adapter(one, KINDS[kind], TARGETS, seed=0)
    torch.testing.assert_close(run(network), fresh, rtol=1e-5, atol=1e-6)
    train_a_little(network)
    load_adapter_state(rounded, adapter_state(network))
    assert (run(network) - fresh).abs().max() > 1e-2
    torch.testing.assert_close(run(network), run(rounded), rtol=1e-4, atol=1e-5)
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 20)
    network(x, torch.tensor([400.0]), text, return_dict=False)[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(network).values())
    expected = run(network)
    merge_adapter(network)
    torch.testing.assert_close(run(network), expected, rtol=1e-4, atol=1e-5)
    assert not isinstance(network.blocks[0].attn1.to_q, QuantizedLinear)


# -- which layers ------------------------------------------------------------------------------------------------------


def test_patterns_match_from_the_end_of_a_name():
    names = adaptable_modules(tiny_network())

    def match(*patterns):
        return match_patterns(names, patterns, "adapter.targets")

    assert match("to_q") == [f"blocks.{b}.attn{a}.to_q" for b in (0, 1) for a in (1, 2)]
    assert match(r"1\.attn1\.to_[qk]") == ["blocks.1.attn1.to_q", "blocks.1.attn1.to_k"]
    assert match("proj_out") == ["proj_out"]
    with pytest.raises(UserError, match="'o_q' matches no layer"):
        match("o_q")


def test_a_target_that_matches_nothing_names_its_neighbours():
    with pytest.raises(UserError) as caught:
        add_adapter(tiny_network(), AdapterConfig(targets=("to_q", r"atn1\.to_kk")), TARGETS, seed=0)
    message = str(caught.value)
    assert r"'atn1\.to_kk' matches no layer" in message
    assert "blocks.0.attn1.to_k" in message and "blocks.1" not in message


def test_ranks_and_alphas_follow_the_first_pattern_that_matches():
    config = AdapterConfig(
        rank=4,
        rank_patterns={r"attn2\.to_q": 2, "to_q": 8},
        alpha_patterns={r"blocks\.1\..*": 1.5},
        exclude=("ffn.*", r"attn1\.to_k"),
    )
    network = tiny_network()
    names = add_adapter(network, config, TARGETS, seed=0)
    assert len(names) == 2 * 7 and not [name for name in names if "ffn" in name or "attn1.to_k" in name]
    adapter = adapter_of(network)
    assert adapter.ranks["blocks.0.attn2.to_q"] == 2 and adapter.ranks["blocks.0.attn1.to_q"] == 8
    assert adapter.ranks["blocks.0.attn1.to_v"] == 4
    assert adapter.alphas["blocks.0.attn2.to_q"] == 2, "the default of alpha is each layer's own rank"
    assert adapter.alphas["blocks.0.attn1.to_q"] == 8
    assert {layer: alpha for layer, alpha in adapter.alphas.items() if layer.startswith("blocks.1.")} == dict.fromkeys(
        [layer for layer in names if layer.startswith("blocks.1.")], 1.5
    )
    assert adapter_state(network)["blocks.1.attn2.to_q.lora_A.weight"].shape == (2, 24)
    train_a_little(network)
    output = run(network)
    merge_adapter(network)
    torch.testing.assert_close(run(network), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": ("proj_out",)}, r"adapter\.exclude: 'proj_out' matches no layer that adapter\.targets choose"),
        ({"exclude": (".*",)}, r"adapter\.exclude leaves no layer of the network"),
        ({"rank_patterns": {"proj_out": 2}}, r"adapter\.rank_patterns: 'proj_out' matches no layer that is adapted"),
        ({"alpha_patterns": {"to_z": 2.0}}, r"adapter\.alpha_patterns: 'to_z' .*Nearest names: .*to_"),
        (
            {"exclude": ("to_q",), "rank_patterns": {r"attn1\.to_q": 2}},
            r"adapter\.rank_patterns: 'attn1\\\.to_q' matches no layer that is adapted",
        ),
    ],
)
def test_patterns_that_match_nothing_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        add_adapter(tiny_network(), AdapterConfig(**changes), TARGETS, seed=0)


def test_a_pattern_may_match_in_one_of_several_parts():
    modules = {"network": adaptable_modules(tiny_network()), "text_encoder": {"layers.0.q_proj": nn.Linear(2, 2)}}
    config = AdapterConfig(targets=("to_q", "q_proj"), rank_patterns={"q_proj": 3})
    plan = plan_layers(modules, config, {})
    assert plan["text_encoder"]["layers.0.q_proj"].rank == 3 and len(plan["network"]) == 4
    with pytest.raises(UserError, match=r"adapter\.targets match no layer of the text_encoder, which is to train"):
        plan_layers(modules, AdapterConfig(targets=("to_q",)), {})


@kinds
def test_the_same_layers_adapt_with_an_adapter_on(kind):
    network = tiny_network()
    plain = set(adaptable_modules(network))
    add_adapter(network, KINDS[kind], TARGETS, seed=0)
    assert set(adaptable_modules(network)) == plain


# -- starting from an adapter ------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_training_starts_from_an_adapter_with_its_function(kind, alpha):
    source = trained(kind)
    network = tiny_network()
    changes = {} if kind == "ia3" else {"alpha": alpha}
    config = KINDS[kind].model_copy(update=changes)
    add_adapter(network, config, (*TARGETS, "proj_out"), seed=0)
    start_from(network, config, adapter_of(source))
    torch.testing.assert_close(run(network), run(source), rtol=1e-5, atol=1e-5)
    if kind == "lora":
        assert adapter_state(network)["proj_out.lora_A.weight"].any(), "a layer that the file lacks starts fresh"


def test_a_start_that_does_not_fit_is_told():
    adapter = adapter_of(trained("lora"))

    def start(config, adapter=adapter, targets=TARGETS):
        network = tiny_network()
        add_adapter(network, config, targets, seed=0)
        start_from(network, config, adapter)

    where = {"init_from": "some/start.safetensors"}
    with pytest.raises(UserError, match=r"start\.safetensors has rank 4 .* gives it 8. Set adapter\.rank = 4"):
        start(AdapterConfig(rank=8, **where))
    with pytest.raises(UserError, match=r"changes layers that the configuration leaves out.*Widen adapter\.targets"):
        start(AdapterConfig(rank=4, **where), targets=("to_q",))
    with pytest.raises(UserError, match=r'is of type lora, adapter\.type is "lokr". Set adapter\.type = "lora"'):
        start(AdapterConfig(type="lokr", **where))
    several = adapter_of(trained("lora", rank_patterns={"to_k": 2}))
    with pytest.raises(
        UserError, match=r"Set adapter\.rank = 4, and adapter\.rank_patterns for the layers of rank \{2\}"
    ):
        start(AdapterConfig(rank=4, **where), several)
    with pytest.raises(
        UserError, match=r"multiplies the input of blocks\.0\.ffn\.net\.2\. Make adapter\.input_targets"
    ):
        start(AdapterConfig(type="ia3", **where), adapter_of(trained("ia3")))
    with pytest.raises(UserError, match=r"lokr_w1 has shape .* expected .*decompose_factor"):
        start(AdapterConfig(type="lokr", rank=2, decompose_factor=2, **where), adapter_of(trained("lokr")))
