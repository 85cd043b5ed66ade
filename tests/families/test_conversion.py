"""Weights converted a group at a time are those converted all at once, for every family; and what cannot be taken
apart is not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.conversion import Stream, traced
from kinema.families.registry import family_class, family_names, open_family

State = dict[str, Tensor]


def small(state: State) -> State:
    """Tensors of these names with few values, all different; what is as wide as another stays so."""
    made, count = {}, 0
    for name, value in state.items():
        shape = tuple(min(size, 8) for size in value.shape)
        number = torch.Size(shape).numel()
        made[name] = torch.arange(count, count + number, dtype=torch.float64).reshape(shape)
        count += number
    return made


def streamed(conversion, state: State, order: list[str]) -> tuple[State, int]:
    """What comes of tensors that arrive in this order, and how many waited at once."""
    found: State = {}
    stream, most = Stream(conversion, found.__setitem__), 0
    for name in order:
        stream.put(name, state[name])
        most = max(most, len(stream._here))
    assert not stream._here
    return found, most


@pytest.mark.parametrize("name", family_names())
def test_every_family_converts_a_few_tensors_at_a_time(name):
    family = open_family(ModelConfig(family=name, variant=next(iter(family_class(name).variants))))
    for part in family.trainable_parts():
        try:
            state = small(family.empty(part).state_dict())
            convert = partial(family.to_original, part=part)
            expected = convert(state)
        except UserError:  # a text encoder that has no shipped configuration, or no other layout
            assert not part.startswith("network")
            continue
        conversion = traced(convert, state)
        assert max(map(len, conversion.groups)) <= 4, "queries, keys, values and a gate: all at once would be one group"
        found, most = streamed(conversion, state, list(state))
        assert found.keys() == expected.keys() == conversion.results.keys()
        assert most <= 12, "parts of one layer come one behind the other"
        for key, value in expected.items():
            assert found[key].dtype == value.dtype == conversion.results[key].dtype
            assert found[key].shape == conversion.results[key].shape and torch.equal(found[key], value), key


def test_groups_are_what_results_are_made_of():
    def convert(state: State) -> State:
        made = {"mark": torch.zeros(0)} | {f"plain.{name}": state[name] for name in state if name in "de"}
        if "a" in state:
            rows = torch.empty_like(state["a"].repeat(2, 1))
            rows[:1] = state["a"]  # in place: followed as well
            rows[1:] = state["b"]
            made |= {"ab": rows}
        if "c" in state:
            made |= {"c.0": state["c"].chunk(2)[0], "c.1": state["c"].chunk(2)[1].T}
        return made

    state = {name: torch.full((1, 2), i + 1.0) for i, name in enumerate("abde")} | {"c": torch.rand(2, 3)}
    conversion = traced(convert, state)
    assert conversion.groups == (("a", "b"), ("d",), ("e",), ("c",))
    found, most = streamed(conversion, state, ["b", "d", "c", "a", "e"])
    assert most == 1 and found.keys() == {"mark", "ab", "c.0", "c.1", "plain.d", "plain.e"}
    assert found["ab"].tolist() == [[1, 1], [2, 2]] and torch.equal(found["c.1"], state["c"][1:].T)


def test_a_conversion_that_looks_at_what_else_there_is_gets_all_at_once():
    def numbered(state: State) -> State:
        return {f"{len(state)}.{name}": value for name, value in state.items()}

    def together(state: State) -> State:
        return {"sum": state["a"] + state["c"], "b": state["b"]} if len(state) == 3 else {}

    state = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    for convert in (numbered, together):
        conversion = traced(convert, state)
        assert conversion.groups == (("a", "b", "c"),)
        found, most = streamed(conversion, state, ["c", "a", "b"])
        assert most == 2 and found.keys() == convert(state).keys()
