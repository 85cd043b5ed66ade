"""Networks whose weights wait in their files until they are asked for."""

from __future__ import annotations

import weakref

import pytest
import torch

from kinema.config.schema import ModelConfig
from kinema.families.registry import family_class, open_family
from kinema.networks import quantized
from kinema.networks.mapped import leaving_weights_mapped, may_wait, settle, taken, tensors, value


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return family_class("wan").tiny(tmp_path_factory.mktemp("mapped") / "tiny", "t2v-1.3b")


def waiting(family, part, dtype):
    with leaving_weights_mapped():
        return family.load(part, "cpu", dtype)


def same(one, other):
    assert one.keys() == other.keys()
    return all(value.dtype == other[k].dtype and torch.equal(value, other[k]) for k, value in one.items())


@pytest.mark.parametrize("part", ["network", "text_encoder"])  # the latter has parameters under two names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_settled_weights_are_those_loaded_at_once(directory, part, dtype):
    family = open_family(ModelConfig(family="wan", path=str(directory)))
    plain, module = family.load(part, "cpu", dtype), waiting(family, part, dtype)
    assert not may_wait(), "elsewhere weights are loaded as ever"
    for name, stand_in in module.named_parameters():
        assert stand_in.isnan().all() and stand_in.stride() == (0,) * stand_in.ndim, f"{name} has memory"
    kinds = {name: (p.shape, p.dtype) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in module.named_parameters()} == kinds
    assert same(dict(tensors(module)), plain.state_dict())
    assert all(parameter.isnan().all() for parameter in module.parameters()), "looking at values keeps none"
    objects = dict(module.named_parameters())
    settle(module)
    assert same(module.state_dict(), plain.state_dict())
    assert all(parameter is objects[name] for name, parameter in module.named_parameters())
    before = {name: parameter.clone() for name, parameter in family.load(part, "cpu", dtype).named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)  # in memory of its own: the files stay as they are
    assert same(dict(family.load(part, "cpu", dtype).named_parameters()), before)


def test_one_module_or_one_tensor_at_a_time(directory):
    family = open_family(ModelConfig(family="wan", path=str(directory)))
    plain, module = family.load("network", "cpu", torch.float32), waiting(family, "network", torch.float32)
    settle(module.blocks[1])
    assert same(module.blocks[1].state_dict(), plain.blocks[1].state_dict())
    layer, theirs = module.blocks[0].attn1.to_q, plain.blocks[0].attn1.to_q
    assert torch.equal(value(layer, "weight"), theirs.weight) and layer.weight.isnan().all()
    layer.weight = torch.nn.Parameter(taken(layer, "weight") * 2)
    settle(module)
    assert torch.equal(layer.weight, theirs.weight * 2) and torch.equal(layer.bias, theirs.bias)


def test_one_layer_is_there_at_a_time(directory, monkeypatch):
    """While a base is rounded: the layers before are gone, those to come wait in their file."""
    layers = weakref.WeakSet()
    encode = quantized.encode
    there: list[int] = []

    def counting(weight, kind):
        there.append(sum(layer.weight.untyped_storage().nbytes() >= layer.weight.nbytes for layer in layers))
        return encode(weight, kind)

    def settled(module):
        layers.add(module)
        settle(module)

    monkeypatch.setattr(quantized, "settle", settled)
    monkeypatch.setattr(quantized, "encode", counting)
    open_family(ModelConfig(family="wan", path=str(directory), network={"dtype": "fp8"})).load("network", "cpu", None)
    assert len(there) > 20 and set(there) == {1}
    assert not layers


def test_a_base_in_float8_is_rounded_from_what_waits(directory):
    family = open_family(ModelConfig(family="wan", path=str(directory), network={"dtype": "fp8"}))
    plain, module = family.load("network", "cpu", torch.bfloat16), waiting(family, "network", torch.bfloat16)
    settle(module)
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in module.state_dict().values())
    assert same(module.state_dict(), plain.state_dict())
