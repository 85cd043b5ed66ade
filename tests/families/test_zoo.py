"""Every family and variant through the same proofs, on tiny models with the structure of the real ones.

The letters are the columns of the table in docs/families.md, which this run writes (``--families-table``).
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

import cases
import pytest
import torch
from lagging import LaggingCopies
from torch import Tensor, nn
from zoo import (
    NEGATIVE,
    PROMPT,
    Case,
    Inputs,
    assert_same,
    batch_of,
    config_of,
    encode,
    family_of,
    network_parts,
    recording,
    run_pipeline,
    their_pipeline,
    tiny_directory,
)

from kinema.config.schema import Config
from kinema.data.batch import Batch
from kinema.families.base import Family, Parts, Prepared
from kinema.families.prediction import convert, native_target
from kinema.families.standard import StandardFamily
from kinema.objectives.base import Draws
from kinema.objectives.flow import flow_matching
from kinema.training.networks import FamilyDenoiser

ALL: list[Case] = [
    case
    for module in pkgutil.iter_modules(cases.__path__)
    for case in importlib.import_module(f"cases.{module.name}").CASES
]


class Model:
    """A tiny model, loaded by us once for all tests of a case; tests copy what they change."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.directory = tiny_directory(case, root)
        self.family = family_of(case, self.directory)
        self.parts: Parts = {part: self.family.load(part, "cpu", torch.float32) for part in self.family.variant.parts}
        self.samples = {caption: encode(case, self.family, self.parts, caption) for caption in (PROMPT, NEGATIVE)}

    @property
    def network(self) -> nn.Module:
        return self.parts["network"]

    def prepared(self, *captions: str) -> Prepared:
        batch = batch_of(*(self.samples[caption] for caption in captions), captions=captions)
        return self.family.prepare(batch, {})

    def output(self, network: nn.Module, t: float = 0.6, *captions: str) -> Tensor:
        """The native prediction for fixed noise."""
        prepared = self.prepared(*(captions or (PROMPT,)))
        x_t = torch.randn(prepared.latents.shape, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return self.family.predict(network, x_t, _times(prepared, t), prepared.conditioning)


def _times(prepared: Prepared, t: float) -> Tensor:
    times = torch.full((len(prepared.latents),), t)
    if prepared.given is None:
        return times
    return times.view(-1, 1, 1, 1, 1) * (1 - prepared.given)


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.id) for case in ALL])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp("zoo"))


# -- (a) parity ------------------------------------------------------------------------------------------------------


def test_a_calls_of_the_network(model: Model) -> None:
    """Names, shapes and values of everything that the pipeline hands to the network in three steps with guidance."""
    case, family = model.case, model.family
    pipeline = their_pipeline(case, family, model.directory)
    networks = [getattr(pipeline, family.folder(part)) for part in network_parts(family)]
    with recording(*networks) as theirs:
        run_pipeline(case, pipeline, guided=True)
    assert len(theirs) >= 3
    for number, inputs in enumerate(theirs):
        prepared = model.prepared(*case.captions(number))
        x_t, t = case.x_t(family, inputs), case.t(family, inputs)
        assert x_t.shape == prepared.latents.shape, "the entry's x_t, or the shape of our latents"
        told = case.told(family, prepared.conditioning, inputs)
        with recording(model.network) as ours, torch.no_grad():
            family.predict(model.network, x_t, t, told)
        assert_same(case.visible(ours[0]), case.visible(inputs), case.tolerance, f"call {number}")
        with torch.no_grad():
            both = [model.network(**call, return_dict=False) for call in (ours[0], inputs)]
        assert_same(both[0], both[1], max(case.tolerance, 1e-5), f"output of call {number}")
    different = model.samples[PROMPT], model.samples[NEGATIVE]
    texts = [name for name in different[0] if not name.startswith("latents")]
    changed = [
        n for n in texts if different[0][n].shape != different[1][n].shape or (different[0][n] != different[1][n]).any()
    ]
    assert changed, "the prompts are encoded alike"


def test_a_encoding_does_not_depend_on_the_batch(model: Model) -> None:
    """Encoders may be given several samples at once."""
    from kinema.data.batch import Sample

    case = model.case
    for encoding in model.family.encodings():
        pixels = case.clip if encoding.reads_pixels else None
        controls = case.control_pictures if encoding.controls else ()
        samples = [Sample(caption, pixels, controls) for caption in (PROMPT, NEGATIVE)]
        needed = {part: model.parts[part] for part in encoding.parts}
        for row, caption in zip(model.family.encode(encoding, needed, samples), (PROMPT, NEGATIVE), strict=True):
            for name, value in row.items():
                assert_same(value, model.samples[caption][name], 1e-5, f"{encoding.name}: {name}")


def test_a_each_text_encoder_is_told_by_itself(model: Model) -> None:
    """Every text encoder has an encoding of its own. A caption that is dropped for one leaves what the others make as
    it was, and changes other numbers of what the network is told than a caption that is dropped for another."""
    from kinema.data.batch import Sample

    case, family = model.case, model.family
    readers = {encoding.name: encoding.text_encoder for encoding in family.encodings()}
    encoders = [part for part in family.variant.parts if part.startswith("text_encoder")]
    assert {part for part in readers.values() if part is not None} == set(encoders)

    def told(dropped: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for encoding in family.encodings():
            caption = "" if encoding.text_encoder == dropped else 'a sign with the words "red ball"'
            pixels = case.clip if encoding.reads_pixels else None
            sample = Sample(caption, pixels, case.control_pictures if encoding.controls else ())
            (row,) = family.encode(encoding, {part: model.parts[part] for part in encoding.parts}, [sample])
            tensors |= row
        return dict(_leaves(family.prepare(batch_of(tensors), {}).conditioning))

    if len(encoders) == 1:
        return
    whole = told("")
    changes = {part: _changes(whole, told(part)) for part in encoders}
    assert all(changes.values()), f"a dropped caption changes nothing: {changes}"
    for one, other in itertools.combinations(changes.values(), 2):
        for name in one.keys() & other.keys():
            assert not (one[name] & other[name]).any(), name


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(one, f"{name}.{key}")


def _changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which numbers of each tensor are others afterwards, where some are; all of them where its shape is another."""
    found = {}
    for name, value in before.items():
        same = after[name].shape == value.shape
        changed = after[name] != value if same else torch.ones_like(value, dtype=torch.bool)
        if changed.any():
            found[name] = changed
    return found


def test_a_shapes_of_samples(model: Model) -> None:
    """What `kinema plan` takes for encoded samples has the names and shapes of what the encoders give, but for the
    length of texts."""
    from kinema.data.buckets import Bucket
    from kinema.families.sample_shapes import sample_shapes

    case = model.case
    ours = sample_shapes(model.family, Bucket(case.frames, case.height, case.width), controls=case.controls)
    real = {name: tuple(value.shape) for name, value in model.samples[PROMPT].items() if name != "latents_std"}
    assert ours.keys() == real.keys()
    for name, shape in real.items():
        if name in ("text", "glyphs"):
            assert ours[name][1:] == shape[1:], name
        elif name != "controls" or case.controls:  # without pictures there is no size
            assert ours[name] == shape, name


# -- (b) conversion and path -----------------------------------------------------------------------------------------


def test_b_the_true_answer_recovers_the_data(model: Model) -> None:
    """Over the family's range of times, in the kind that its network predicts."""
    path = model.family.path
    x_0 = model.prepared(PROMPT).latents.double()
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low = max(path.t_min, 1e-3)
    high = min(path.t_max, 0.999)
    for t in torch.linspace(low, high, 33, dtype=torch.float64):
        x_t = (1 - t) * x_0 + t * eps
        native = native_target(path, x_0, eps, t.view(1))
        recovered = convert(native, path.native, "x0", x_t, t.view(1))
        torch.testing.assert_close(recovered, x_0, rtol=0, atol=1e-9)
    u = torch.linspace(0, 1, 65, dtype=torch.float64)
    times = model.family.native_time(u)
    assert (times.diff() >= 0).all() and times.min() >= path.t_min - 1e-9 and times.max() <= path.t_max + 1e-9


def test_b_a_network_that_knows_leads_the_pipeline_along_our_path(model: Model) -> None:
    """x_t of each step is what training makes for that time, and what is decoded are the autoencoder's own latents."""
    case, family = model.case, model.family
    pipeline = their_pipeline(case, family, model.directory)
    prepared = model.prepared(PROMPT)
    x_0 = prepared.latents
    noise: list[Tensor] = []
    calls: list[Inputs] = []

    def replace(network: nn.Module) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            from zoo import bound

            inputs = bound(network, args, kwargs)
            calls.append(inputs)
            x_t = case.x_t(family, inputs)
            t = case.exact_t(pipeline, len(calls) - 1, case.t(family, inputs))
            at = t.view(-1, 1, 1, 1, 1) if t.ndim == 1 else t
            if not noise:
                noise.append((x_t - (1 - at) * x_0) / at.clamp(min=1e-6))
            expected = (1 - at) * x_0 + at * noise[0]
            kept = torch.ones_like(x_t, dtype=torch.bool)
            if prepared.given is not None:
                kept &= (prepared.given == 0).expand_as(x_t)
            error = (x_t - expected)[kept].abs().max() / max(1.0, float(expected.abs().max()))
            assert error < 2e-4, (
                f"step {len(calls) - 1}: x_t is off our path by {error:.2e} at t = {t.flatten()[0]:.4f}"
            )
            return (case.answer(family, native_target(family.path, x_0, noise[0], t), inputs),)

        network.forward = forward  # type: ignore[method-assign]

    for part in network_parts(family):
        replace(getattr(pipeline, family.folder(part)))
    given: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, *args, **kwargs: given.append(z.detach().clone()) or decode(z, *args, **kwargs)
    run_pipeline(case, pipeline, guided=False)
    assert len(calls) >= 3
    assert isinstance(family, StandardFamily)
    offset, scale = family.latent_statistics(model.parts["autoencoder"], x_0)
    raw = x_0 * scale + offset
    decoded = case.decoded(given[0])
    left = raw + case.last_sigma * noise[0] * scale
    if prepared.given is not None:  # the pipeline may draw them from their posterior
        decoded, left = (one * (1 - prepared.given) for one in (decoded, left))
    assert_same(decoded, left, 5e-4, "what the pipeline decodes")
    with torch.no_grad():
        mean = case.encoded(model.parts["autoencoder"], case.clip[None].float() / 127.5 - 1)
    learnt = 1.0 if prepared.given is None else 1 - prepared.given  # given frames are encoded alone, as at sampling
    assert_same(raw * learnt, mean * learnt, 1e-4, "our latents, before normalisation")


# -- (c), (d) training -----------------------------------------------------------------------------------------------


def training_batch(model: Model) -> Batch:
    return batch_of(model.samples[PROMPT], model.samples[NEGATIVE], captions=(PROMPT, NEGATIVE))


def loss_of(model: Model, networks: dict[str, nn.Module], config: Config, step: int) -> Tensor:
    objective = flow_matching(config.objective, model.family)
    denoiser = FamilyDenoiser(model.family, networks)
    return objective(training_batch(model), {"student": denoiser}, Draws(0, step)).total


def steps(model: Model, network: nn.Module, config: Config, count: int, lr: float, fixed: bool) -> list[float]:
    """Losses of AdamW steps on one batch; ``fixed``: always the same noise and times."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(count):
        loss = loss_of(model, {"network": network}, config, 0 if fixed else step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_c_a_full_step_moves_every_weight(model: Model, tmp_path: Path) -> None:
    config = config_of(model.case, model.directory, tmp_path)
    network = copy.deepcopy(model.network).train().requires_grad_(True)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    steps(model, network, config, 2, 1e-3, fixed=False)
    unused = re.compile("|".join(f"(?:{one})" for one in model.case.unused) or r"(?!)")
    for name, parameter in network.named_parameters():
        moved = bool((parameter != before[name]).any())
        assert moved != bool(unused.fullmatch(name)), f"{name} {'moved' if moved else 'did not move'}"


def test_c_an_adapter_step_moves_the_adapter_alone(model: Model, tmp_path: Path) -> None:
    from kinema.adapters.inject import adapter_parameters, add_adapter

    config = config_of(model.case, model.directory, tmp_path, adapter={"rank": 2})
    assert config.adapter is not None
    network = copy.deepcopy(model.network).train()
    layers = add_adapter(network, config.adapter, model.family.adapter_targets(), 0)
    linear = [n for n, m in model.network.named_modules() if isinstance(m, nn.Linear)]
    assert len(layers) > len(linear) / 4, "the default targets are few"
    ours = {id(p) for p in adapter_parameters(network).values()}
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    steps(model, network, config, 2, 1e-2, fixed=False)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (id(parameter) in ours)
        moved = bool((parameter != before[name]).any())
        dead = any(re.fullmatch(one, _base_name(name)) for one in model.case.unused)
        assert moved == (id(parameter) in ours and not dead), f"{name} {'moved' if moved else 'did not move'}"


def _base_name(name: str) -> str:
    return re.sub(r"\.lora_[AB]\.\w+\.weight$", ".weight", name)


def test_d_thirty_steps_bring_the_loss_down(model: Model, tmp_path: Path) -> None:
    config = config_of(model.case, model.directory, tmp_path)
    network = copy.deepcopy(model.network).train().requires_grad_(True)
    losses = steps(model, network, config, 30, model.case.lr, fixed=True)
    assert losses[-1] < 0.7 * losses[0], f"from {losses[0]:.3f} to {losses[-1]:.3f}"


# -- (e), (f), (g) files ---------------------------------------------------------------------------------------------


def adapted(model: Model, config: Config) -> nn.Module:
    """A network with an adapter of random weights."""
    from kinema.adapters.inject import adapter_parameters, add_adapter

    assert config.adapter is not None
    network = copy.deepcopy(model.network)
    add_adapter(network, config.adapter, model.family.adapter_targets(), 0)
    draw = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(network).values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return network.requires_grad_(False)


def exported(model: Model, network: nn.Module, config: Config, root: Path) -> Path:
    from kinema.parallel.mesh import World
    from kinema.training.export import export_weights

    world = World.alone()
    return export_weights(root / "exports", 1, model.family, {"network": network}, config, world)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_e_adapters_come_back(model: Model, tmp_path: Path, layout: str) -> None:
    """Exported by us; read by diffusers (its pipeline's loader, or its network's) and by us."""
    from kinema.adapters.files import fold_file

    settings = {"rank": 4, "alpha": 2.0}
    config = config_of(
        model.case, model.directory, tmp_path, adapter=settings, export={"dtype": "fp32", "layouts": [layout]}
    )
    network = adapted(model, config)
    expected = model.output(network)
    assert (expected - model.output(model.network)).abs().max() > 1e-3
    folder = exported(model, network, config, tmp_path) / layout
    (file,) = folder.glob("*.safetensors")

    ours = copy.deepcopy(model.network)
    fold_file(file, model.family, {"network": ours})
    assert_same(model.output(ours), expected, 1e-5, "read by us")
    if layout == "comfyui" and not model.case.comfyui_loader:
        return
    pipeline = their_pipeline(model.case, model.family, model.directory)
    theirs = getattr(pipeline, model.family.folder("network"))
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, weight_name=file.name)
    else:
        theirs.load_lora_adapter(folder, weight_name=file.name, prefix=model.family.folder("network"))
    assert_same(model.output(theirs), expected, 1e-5, "read by diffusers")


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """To the bit."""
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_f_whole_weights_come_back(model: Model, tmp_path: Path) -> None:
    config = config_of(model.case, model.directory, tmp_path, export={"dtype": "fp32", "layouts": ["diffusers"]})
    expected = model.output(model.network)
    folder = exported(model, model.network, config, tmp_path) / "diffusers" / model.family.folder("network")
    theirs = type(model.network).from_pretrained(folder)
    ours = family_of(model.case, model.directory, network={"path": str(folder)}).load("network", "cpu", None)
    for loaded in (theirs, ours):
        assert_same_weights(loaded, model.network)
        assert_same(model.output(loaded), expected, 1e-6, "the output")  # sums may run in another order


def test_g_single_file_in_the_original_layout(model: Model, tmp_path: Path) -> None:
    """What we write reads back the same, through us and, where it has one, through diffusers' converter."""
    from safetensors.torch import load_file

    config = config_of(model.case, model.directory, tmp_path, export={"dtype": "fp32", "layouts": ["comfyui"]})
    (file,) = (exported(model, model.network, config, tmp_path) / "comfyui").glob("*.safetensors")
    ours = family_of(model.case, model.directory, network={"path": str(file)}).load("network", "cpu", None)
    assert_same_weights(ours, model.network)
    assert_same(model.output(ours), model.output(model.network), 1e-6, "the output")
    if model.case.converter is None:
        return
    original = {name.removeprefix("model.diffusion_model."): value for name, value in load_file(file).items()}
    theirs = model.case.converter(dict(original))
    state = model.network.state_dict()
    assert theirs.keys() == state.keys()
    for name, value in theirs.items():
        assert torch.equal(value, state[name]), name


def test_g_names_at_full_size(model: Model) -> None:
    """Every weight of the published size has an original name, no two the same, and comes back under its own."""
    network = full_size(model.family)
    layout = model.family.layout()
    state = {name: value for name, value in network.state_dict().items()}
    original = layout.to_original(state)
    back = layout.from_original(original)
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}


def full_size(family: Family) -> nn.Module:
    from kinema.config.schema import ModelConfig
    from kinema.families.loading import build
    from kinema.families.registry import open_family

    bare: Any = open_family(ModelConfig(family=family.name, variant=family.variant.name))
    source = bare.source("network")
    return build(source.spec, source.config, empty=True)


def test_published_size(model: Model) -> None:
    """The shipped configuration has the parameters that the variant states, which its entry checks by hand."""
    network = full_size(model.family)
    assert sum(p.numel() for p in network.parameters()) == model.family.variant.parameters
    tiny = {re.sub(r"\d+", "#", name) for name in model.network.state_dict()}
    real = {re.sub(r"\d+", "#", name) for name in network.state_dict()}
    assert tiny == real, f"the tiny network lacks or adds parts: {sorted(tiny ^ real)[:8]}"
    trained = {re.sub(r"\d+", "#", n) for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    targets = [re.compile(rf"(?:.*\.)?(?:{one})") for one in model.family.adapter_targets()]
    assert all(any(t.fullmatch(n) for n, _ in network.named_modules()) for t in targets) and trained


# -- (h) memory ------------------------------------------------------------------------------------------------------


def gradients(model: Model, network: nn.Module, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    loss = loss_of(model, {"network": network}, config, 0)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def test_h_blocks_run_in_the_order_of_the_list(model: Model) -> None:
    network = copy.deepcopy(model.network)
    blocks = [(f"{name}.{i}", b) for name, group in model.family.blocks(network).items() for i, b in enumerate(group)]
    ran: list[str] = []
    for name, block in blocks:
        block.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    model.output(network)
    assert ran == [name for name, _ in blocks]


def test_h_activation_checkpointing(model: Model, tmp_path: Path) -> None:
    """The same loss and gradients, to the bit."""
    from kinema.memory.checkpointing import checkpoint_blocks

    config = config_of(model.case, model.directory, tmp_path)
    plain, checkpointed = (copy.deepcopy(model.network).train().requires_grad_(True) for _ in range(2))
    checkpoint_blocks(model.family.blocks(checkpointed))
    selective, nested = copy.deepcopy(plain), copy.deepcopy(plain)
    checkpoint_blocks(model.family.blocks(selective), "selective")
    checkpoint_blocks(model.family.blocks(nested), "nested")
    loss, expected = gradients(model, plain, config)
    for network in (checkpointed, selective, nested):
        ours, got = gradients(model, network, config)
        assert torch.equal(loss, ours) and got.keys() == expected.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trains", ["norms", "all"])
def test_h_blocks_and_activations_in_the_hosts_memory(model: Model, tmp_path: Path, trains: str) -> None:
    """The same loss and gradients, to the bit, through an engine whose copies are late: with frozen weights, and where
    all trains; two blocks' weights are on the device at most, and frozen ones are never written."""
    from kinema.memory.activations import offload_activations
    from kinema.memory.block_swap import SLOTS, BlockSwap, host_weights
    from kinema.memory.checkpointing import checkpoint_blocks

    config = config_of(model.case, model.directory, tmp_path)
    plain, moving = (copy.deepcopy(model.network).train() for _ in range(2))
    for network in (plain, moving):
        for parameter in network.parameters():
            parameter.requires_grad_(trains == "all" or parameter.ndim == 1)
    blocks, engine = model.family.blocks(moving), LaggingCopies()
    checkpoint_blocks(blocks, "nested" if trains == "all" else 2)
    homes = host_weights(moving, blocks, sum(map(len, blocks.values())))
    BlockSwap(blocks, homes, engine)
    before, places = [home.flat.clone() for home in homes], engine.live
    offload = offload_activations(blocks, engine, smallest=256)
    assert next(iter(moving.parameters())) not in {p for home in homes for p in home.parameters}  # tells the device
    loss, expected = gradients(model, plain, config)
    for _ in range(2):
        ours, got = gradients(model, moving, config)
        assert torch.equal(loss, ours) and got.keys() == expected.keys()
        for name, value in got.items():
            assert torch.equal(value, expected[name]), name
    assert all(torch.equal(home.flat, flat) for home, flat in zip(homes, before, strict=True))
    assert torch.equal(model.output(moving), model.output(plain))
    assert places < sum(home.size for home in homes) or len(homes) <= 2
    assert offload.moved_bytes > 0 and engine.live == places
    assert len(engine.pending) <= SLOTS  # the next pass's first blocks, on their way


def test_h_compiled_blocks(model: Model, tmp_path: Path) -> None:
    """Per block, through dynamo and AOT autograd (Inductor: one family, test_wan_compile)."""
    from kinema.memory.compile import compile_blocks

    torch._dynamo.reset()
    config = config_of(model.case, model.directory, tmp_path)
    plain, compiled = (copy.deepcopy(model.network).train().requires_grad_(True) for _ in range(2))
    compile_blocks(model.family.blocks(compiled), backend="aot_eager")
    loss, expected = gradients(model, plain, config)
    ours, got = gradients(model, compiled, config)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        assert_same(got[name], value, 1e-4, name)


def test_h_frozen_base_in_few_bits(model: Model, tmp_path: Path) -> None:
    """Stored so through the configuration: near the plain one, in the bytes that are counted without weights; an
    adapter trains on it, and nothing else."""
    from kinema.adapters.inject import adapter_parameters, add_adapter
    from kinema.config.section import QUANTIZED
    from kinema.families.stored import quantized_bytes
    from kinema.networks.quantized import QuantizedLinear

    plain, empty = model.output(model.network), model.family.empty("network")
    config = config_of(model.case, model.directory, tmp_path, adapter={"rank": 2})
    assert config.adapter is not None
    for kind in QUANTIZED:
        family = family_of(model.case, model.directory, network={"dtype": kind})
        network = family.load("network", "cpu", torch.float32)
        layers = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) >= 4 and {layer.kind for layer in layers} - {"int8_block"} == {kind}
        counted = quantized_bytes(family, "network", empty, torch.float32)
        assert sum(counted.values()) == sum(layer.quantized.nbytes + layer.scale.nbytes for layer in layers)
        error = float((model.output(network) - plain).norm() / plain.norm())
        limit = model.case.fp8_tolerance * (3 if kind == "nf4" else 1)
        assert 0 < error < limit, f"{kind}: relative error {error:.3f}"
    add_adapter(network, config.adapter, family.adapter_targets(), 0)
    gradients(model, network.train(), config)
    names = {name for name, p in network.named_parameters() if p.grad is not None}
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter_parameters(network)) and names <= trained
    assert len(names) > 0.8 * len(trained)  # what a last block makes of text, some networks leave
    losses = steps(model, network, config, 5, 1e-2, fixed=True)
    assert losses[-1] < losses[0]


def test_h_fused_projections(model: Model, tmp_path: Path) -> None:
    """The same output and gradients, under the same names, where a network can; it is said where none can."""
    from kinema.errors import ConfigError
    from kinema.memory.fusion import check_fusion, fuse_projections

    name = model.family.name
    if name not in ("aura_flow", "chroma", "flux", "open_sora", "sd3", "sdxl", "wan") or "3.5" in model.case.id:
        with pytest.raises(ConfigError, match=f"training.fuse_qkv: no attention of {name} can"):
            check_fusion(model.family, "training.fuse_qkv", ["network"])
        return
    config = config_of(model.case, model.directory, tmp_path)
    plain, fused = (copy.deepcopy(model.network).train().requires_grad_(True) for _ in range(2))
    assert fuse_projections(fused) > 0
    torch.testing.assert_close(model.output(fused), model.output(plain), rtol=1e-6, atol=2e-6)
    loss, expected = gradients(model, plain, config)
    ours, got = gradients(model, fused, config)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=1e-6)
    assert got.keys() == expected.keys() and plain.state_dict().keys() == fused.state_dict().keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(got[parameter], value, rtol=1e-4, atol=1e-6)


def test_index_of_the_tiny_model_is_the_variants(model: Model) -> None:
    """Opened by its path alone, the tiny directory belongs to this family."""
    index = json.loads((model.directory / "model_index.json").read_text())
    assert index["_class_name"] == model.family.variant.pipeline
