import math

import pytest
import torch
from lora_network import TARGETS, run, tiny_network, train_a_little

from kinema.adapters.lora import (
    adaptable_modules,
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter_state,
    match_targets,
    merge_adapter,
)
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError


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


def test_a_fresh_adapter_changes_nothing(network):
    before = run(network)
    add_adapter(network, AdapterConfig(rank=4), TARGETS, seed=0)
    assert torch.equal(run(network), before)


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


def test_initial_weights_depend_on_seed_and_name_alone():
    states = []
    for seed, noise in ((5, 1), (5, 99), (6, 1)):
        network = tiny_network()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        add_adapter(network, AdapterConfig(rank=4), TARGETS if noise == 1 else TARGETS[:1], seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
        states.append(adapter_state(network))
    same, fewer, other = states
    assert all(torch.equal(same[name], fewer[name]) for name in fewer)
    a = "blocks.0.attn1.to_q.lora_A.weight"
    assert not torch.equal(same[a], other[a])
    assert not torch.equal(same[a], same[a.replace("to_q", "to_k")])
    assert same[a].abs().max() <= 1 / math.sqrt(24)
    assert same[a].std().item() == pytest.approx(1 / math.sqrt(3 * 24), rel=0.15)
    assert all(not value.any() for name, value in same.items() if "lora_B" in name)


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


def test_dtype_of_the_adapter():
    network = tiny_network()
    add_adapter(network, AdapterConfig(rank=2, dtype="bf16"), TARGETS, seed=0)
    assert {p.dtype for p in adapter_parameters(network).values()} == {torch.bfloat16}
    assert run(network).dtype == torch.float32


def test_dropout_acts_in_training_alone():
    network = tiny_network()
    add_adapter(network, AdapterConfig(rank=4, dropout=0.5), TARGETS, seed=0)
    train_a_little(network)
    network.eval()
    assert torch.equal(run(network), run(network))
    network.train()
    assert not torch.equal(run(network), run(network))


def test_state_moves_to_another_network():
    one, two = tiny_network(), tiny_network()
    for network in (one, two):
        add_adapter(network, AdapterConfig(rank=4), TARGETS, seed=0)
    train_a_little(one)
    load_adapter_state(two, adapter_state(one))
    assert torch.equal(run(one), run(two))
    short = dict(adapter_state(one))
    short.pop("blocks.0.attn1.to_q.lora_B.weight")
    with pytest.raises(UserError, match=r"1 missing, 0 unknown, for instance blocks\.0\.attn1\.to_q"):
        load_adapter_state(two, short)
    wrong = {name: value[:1] if "lora_A" in name else value for name, value in adapter_state(one).items()}
    with pytest.raises(UserError, match=r"shape \(1, 24\), expected \(4, 24\)"):
        load_adapter_state(two, wrong)


def test_merging_keeps_the_function_and_leaves_an_ordinary_network(network):
    names = {name for name, _ in network.named_modules()}
    before = run(network)
    add_adapter(network, AdapterConfig(rank=4, alpha=6.0), TARGETS, seed=0)
    train_a_little(network)
    trained = run(network)
    assert (trained - before).abs().max() > 1e-2
    merge_adapter(network)
    torch.testing.assert_close(run(network), trained, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in network.named_modules()} == names
    assert not adapter_parameters(network)
    add_adapter(network, AdapterConfig(rank=2), TARGETS, seed=0)  # it takes another one
    torch.testing.assert_close(run(network), trained, rtol=1e-5, atol=1e-5)


def test_targets_match_from_the_end_of_a_name():
    names = adaptable_modules(tiny_network())
    assert match_targets(names, ["to_q"]) == [f"blocks.{b}.attn{a}.to_q" for b in (0, 1) for a in (1, 2)]
    assert match_targets(names, [r"1\.attn1\.to_[qk]"]) == ["blocks.1.attn1.to_q", "blocks.1.attn1.to_k"]
    assert match_targets(names, ["proj_out"]) == ["proj_out"]
    with pytest.raises(UserError, match="'o_q' matches no layer"):
        match_targets(names, ["o_q"])


def test_a_target_that_matches_nothing_names_its_neighbours():
    with pytest.raises(UserError) as caught:
        add_adapter(tiny_network(), AdapterConfig(targets=("to_q", r"atn1\.to_kk")), TARGETS, seed=0)
    message = str(caught.value)
    assert r"'atn1\.to_kk' matches no layer" in message
    assert "blocks.0.attn1.to_k" in message and "blocks.1" not in message


def test_the_same_layers_adapt_with_an_adapter_on():
    network = tiny_network()
    plain = set(adaptable_modules(network))
    add_adapter(network, AdapterConfig(rank=2), TARGETS, seed=0)
    assert set(adaptable_modules(network)) == plain


def test_convolutions_adapt_too():
    network = tiny_network()
    add_adapter(network, AdapterConfig(rank=2, targets=("patch_embedding",)), (), seed=0)
    train_a_little(network)
    trained = run(network)
    merge_adapter(network)
    torch.testing.assert_close(run(network), trained, rtol=1e-5, atol=1e-5)
