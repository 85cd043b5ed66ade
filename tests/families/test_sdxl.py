"""What the suite does not see of Stable Diffusion XL: its schedule, whole checkpoints, adapters of all three parts, and
what detection and checks say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.sdxl import SDXL as Case
from safetensors.torch import load_file, save_file
from zoo import NEGATIVE, PROMPT, assert_same, batch_of, config_of, encode, recording, run_pipeline, their_pipeline

from kinema.config.schema import ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.discrete import StepSchedule
from kinema.families.part_names import AUTOENCODER_KL, OPEN_CLIP
from kinema.families.registry import open_family
from kinema.families.sdxl import PARTS, SDXL, TOKENIZERS
from kinema.families.sdxl_layout import TEXT_ENCODER

VARIANTS = ("base-eps", "v-prediction")
MODELS = ("network", "autoencoder", *TOKENIZERS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sdxl")
    return {variant: SDXL.tiny(root / variant, variant, seed=1) for variant in VARIANTS}


@pytest.fixture(scope="module")
def base(directories: dict[str, Path]) -> Path:
    return directories["base-eps"]


def family_at(**model: Any) -> Any:
    return open_family(ModelConfig.model_validate({"family": "sdxl", **model}))


# -- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_schedule_is_diffusers(variant: str) -> None:
    """Signal and noise of every step against DDPMScheduler, and the published range of t; steps survive float32."""
    from diffusers import DDPMScheduler

    family = family_at(variant=variant)
    config = family.source("scheduler").config
    known = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr")
    theirs = DDPMScheduler(**{key: config[key] for key in known if key in config}).alphas_cumprod.double()
    signal = torch.tensor(family.schedule.signal, dtype=torch.float64)
    torch.testing.assert_close(signal.square(), theirs, rtol=2e-5, atol=1e-7)
    steps = torch.arange(1000)
    near = 4e-4 if variant == "v-prediction" else 0.0  # their float32 product loses the last steps' little signal
    t = family.schedule.time_at(steps)
    torch.testing.assert_close(t, (1 - theirs).sqrt() / ((1 - theirs).sqrt() + theirs.sqrt()), rtol=2e-5, atol=near)
    assert (t.diff() > 0).all()
    sigma_min, sigma_max = 0.0291675, 14.6146  # as k-diffusion's wrappers of this schedule state them
    assert float(t[0]) == pytest.approx(sigma_min / (1 + sigma_min), rel=1e-4)
    assert float(t[-1]) == (1.0 if variant == "v-prediction" else pytest.approx(sigma_max / (1 + sigma_max), rel=1e-6))
    assert (family.path.t_min, family.path.t_max) == (float(t[0]), float(t[-1]))
    assert torch.equal(family.schedule.step_at(t.float()), steps.double())
    u = (torch.rand(5000, generator=torch.Generator().manual_seed(0)).double() + steps.repeat(5)) / 1000
    assert torch.equal(family.native_time(u), t[(u * 1000).floor().long()])


def test_between_steps_the_noise_level_is_interpolated() -> None:
    """As diffusers' Euler scheduler does for fractional steps; outside the range, the ends."""
    from diffusers import EulerDiscreteScheduler

    family = family_at(variant="base-eps")
    scheduler = EulerDiscreteScheduler.from_config(dict(family.source("scheduler").config), timestep_spacing="linspace")
    scheduler.set_timesteps(30)
    sigma = scheduler.sigmas[:-1].double()
    ours = family.schedule.step_at(sigma / (1 + sigma))
    # their sigmas are rounded to float32, 2e-4 of a step
    torch.testing.assert_close(ours, scheduler.timesteps.double(), rtol=0, atol=2e-2)
    assert (ours.frac() > 0.1).sum() > 15
    assert family.schedule.step_at(torch.tensor([0.0, 1e-3, 0.95, 1.0])).tolist() == [0, 0, 999, 999]


def test_other_schedules() -> None:
    linear = {"num_train_timesteps": 4, "beta_start": 0.1, "beta_end": 0.4, "beta_schedule": "linear"}
    products = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]
    assert StepSchedule.of(linear).signal == pytest.approx([one**0.5 for one in products])
    with pytest.raises(UserError, match=r"squaredcos_cap_v2.*scheduler_config.json"):
        StepSchedule.of({**linear, "beta_schedule": "squaredcos_cap_v2"})


def test_the_step_without_signal(directories: dict[str, Path]) -> None:
    """A sampler that begins there hands over what we do at t = 1, where the velocity is minus the data."""
    from kinema.families.prediction import convert, native_target

    case = Case(variant="v-prediction")
    family: Any = family_at(path=str(directories["v-prediction"]))
    parts = {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}
    prepared = family.prepare(batch_of(encode(case, family, parts, PROMPT)))
    pipeline = their_pipeline(case, family, directories["v-prediction"])
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    with recording(pipeline.unet) as theirs:
        run_pipeline(case, pipeline, guided=False)
    assert float(theirs[0]["timestep"]) == 999 and float(case.t(family, theirs[0])) == 1.0
    with recording(parts["network"]) as ours, torch.no_grad():
        family.predict(parts["network"], case.x_t(family, theirs[0]), torch.ones(1), prepared.conditioning)
    assert_same(case.visible(ours[0]), case.visible(theirs[0]), 1e-5, "the first call")
    x_0, eps = prepared.latents, torch.randn_like(prepared.latents)
    t = torch.ones(1)
    assert torch.equal(native_target(family.path, x_0, eps, t), -x_0)
    torch.testing.assert_close(convert(-x_0, "vp_velocity", "x0", eps, t), x_0, rtol=0, atol=1e-6)


# -- files -----------------------------------------------------------------------------------------------------------


def whole_checkpoint(directory: Path, file: Path) -> Path:
    """The tiny model as one file, as Stability AI publishes it: CLIP-L by transformers' names of then, CLIP-G by
    OpenCLIP's."""
    family = family_at(path=str(directory))
    states = {part: family.load(part, "cpu", None).state_dict() for part in MODELS}
    open_clip = OPEN_CLIP.to_original(states["text_encoder_2"])
    open_clip["logit_scale"] = torch.tensor(4.6)
    clip = TEXT_ENCODER.to_original(states["text_encoder"])
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    parts = {
        "model.diffusion_model.": family.layout().to_original(states["network"]),
        "first_stage_model.": AUTOENCODER_KL.to_original(states["autoencoder"]),
        "conditioner.embedders.0.transformer.": clip,
        "conditioner.embedders.1.model.": open_clip,
    }
    tensors = {
        f"{prefix}{name}": value.contiguous() for prefix, state in parts.items() for name, value in state.items()
    }
    if family.variant.name == "v-prediction":
        tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_is_read_out_of_a_whole_checkpoint(
    directories: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    """By us, to the bit; and the file is what diffusers' own loader of single files takes it for."""
    from diffusers import StableDiffusionXLPipeline

    directory = directories[variant]
    file = whole_checkpoint(directory, tmp_path / "model.safetensors")
    # sizes are not in a file: those of the tiny model stand beside each part's path
    tiny = {part: {"path": str(directory / PARTS[part].folder)} for part in MODELS}
    plain = family_at(path=str(directory), **tiny)
    family = family_at(path=str(file), variant=variant)
    family._shipped = lambda name, spec: directory / spec.folder / spec.config_file
    theirs = StableDiffusionXLPipeline.from_single_file(file, config=str(directory), local_files_only=True)
    for part in MODELS:
        expected = plain.load(part, "cpu", None).state_dict()
        for loaded in (family.load(part, "cpu", None), getattr(theirs, PARTS[part].folder)):
            state = loaded.state_dict()
            assert state.keys() == expected.keys()
            different = [name for name, value in state.items() if not torch.equal(value, expected[name])]
            assert different == [], part


def test_samples_of_a_whole_checkpoint_need_tokenizers_alone(base: Path, tmp_path: Path) -> None:
    from kinema.sampling.weights import find_weights

    file = whole_checkpoint(base, tmp_path / "model.safetensors")
    found = find_weights(None, str(file), family="sdxl", variant="base-eps", adapters=(), ema=None).family
    hub = found.variant.hub
    paths = {part: getattr(found.config, part).path for part in found.variant.parts if part != "scheduler"}
    assert paths == dict.fromkeys(MODELS) | dict.fromkeys(TOKENIZERS.values(), hub)


@pytest.mark.parametrize("variant", VARIANTS)
def test_detection(directories: dict[str, Path], tmp_path: Path, variant: str) -> None:
    assert family_at(path=str(directories[variant])).variant.name == variant
    names = {"input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048), "label_emb.0.0.weight": (8, 8)}
    for prefix in ("model.diffusion_model.", ""):
        tensors = {f"{prefix}{name}": torch.zeros(shape) for name, shape in names.items()}
        if variant == "v-prediction":
            tensors |= {f"{prefix}v_pred": torch.zeros(0)}
        save_file(tensors, tmp_path / "one.safetensors")
        assert family_at(path=str(tmp_path / "one.safetensors")).variant.name == variant


def test_a_file_of_another_model_is_no_variant(tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(8, 768)}, tmp_path / "sd15.safetensors")
    with pytest.raises(UserError, match="does not say which variant of sdxl"):
        _ = family_at(path=str(tmp_path / "sd15.safetensors")).variant


def test_checks(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(variant="base-eps")
    family_at(path=str(base)).validate(config_of(case, base, tmp_path))
    assert not caplog.records
    # Some repositories of velocity models have a scheduler for noise beside them: the variant that is named counts.
    asked = {"variant": "v-prediction", "path": str(base)}
    family = family_at(**asked)
    family.validate(config_of(case, base, tmp_path, model=asked))
    assert "v_prediction" in caplog.text and "epsilon" in caplog.text
    assert (family.path.native, family.path.t_max) == ("vp_velocity", 1.0)
    assert family.load("scheduler", "cpu", None).config.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"model.text_length.*77"):
        family_at(path=str(base), text_length=64).validate(config_of(case, base, tmp_path))
    with pytest.raises(ConfigError, match=r"cannot train 'autoencoder'.*network, text_encoder, text_encoder_2"):
        keys = {"path": str(base), "train": ["autoencoder"]}
        family_at(**keys).validate(config_of(case, base, tmp_path, model=keys))


def test_marks_of_velocity_prediction_are_written(directories: dict[str, Path]) -> None:
    """Without them ComfyUI takes a file for one of noise prediction."""
    for variant, marks in (("base-eps", set()), ("v-prediction", {"v_pred", "ztsnr"})):
        family = family_at(path=str(directories[variant]))
        state = family.load("network", "cpu", None).state_dict()
        assert {name for name in family.to_original(state) if "." not in name} == marks


# -- adapters of all parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
def test_an_adapter_of_all_parts_comes_back(base: Path, tmp_path: Path, layout: str) -> None:
    """One file for the network and both text encoders. The network's layers lie under Kohya's names of the original
    layout; diffusers' pipeline (which does not read ComfyUI's) and we give the same pictures of mind."""
    from kinema.adapters.files import fold_file
    from kinema.adapters.inject import adapter_parameters, add_adapter
    from kinema.parallel.mesh import World
    from kinema.training.export import export_weights

    case = Case(variant="base-eps")
    trained = ["network", *TOKENIZERS]
    settings = {"rank": 2, "alpha": 1.0}
    config = config_of(
        case, base, tmp_path, adapter=settings, export={"dtype": "fp32", "layouts": [layout]}, model={"train": trained}
    )
    family: Any = open_family(config.model)
    assert config.adapter is not None
    networks = {part: family.load(part, "cpu", torch.float32) for part in trained}
    draw = torch.Generator().manual_seed(3)
    for part, network in networks.items():
        add_adapter(network, config.adapter, family.adapter_targets(part), 0)
        for parameter in adapter_parameters(network).values():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
        network.requires_grad_(False)
    world = World.alone()
    folder = export_weights(tmp_path / "exports", 1, family, networks, config, world) / layout
    (file,) = folder.glob("*.safetensors")

    expected = outputs(family, networks)
    plain = {part: family.load(part, "cpu", torch.float32) for part in trained}
    before = outputs(family, plain)
    for name in before:
        assert (before[name] - expected[name]).abs().max() > 1e-3, name
    fold_file(file, family, plain)
    assert_same(outputs(family, plain), expected, 2e-5, "read by us")
    names = load_file(file).keys()
    if layout != "diffusers":
        assert all(
            name.startswith(("lora_te1_text_model_", "lora_te2_text_model_")) for name in names if "te" in name[:7]
        )
        start = {"kohya": "lora_unet_input_blocks_4_1_", "comfyui": "diffusion_model.input_blocks.4.1."}[layout]
        assert any(name.startswith(start) for name in names)
    if layout == "comfyui":
        return
    pipeline = their_pipeline(case, family, base)
    pipeline.load_lora_weights(folder, weight_name=file.name)
    theirs = {part: getattr(pipeline, PARTS[part].folder) for part in trained}
    assert_same(outputs(family, theirs), expected, 2e-5, "read by diffusers")


def outputs(family: Any, networks: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each part makes of fixed inputs, the network of fixed text."""
    case = Case(variant="base-eps")
    draw = torch.Generator().manual_seed(9)
    conditioning = {
        "encoder_hidden_states": torch.randn(1, 77, 36, generator=draw),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 20, generator=draw),
            "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]]),
        },
    }
    x_t = torch.randn(1, 4, 1, 8, 12, generator=draw)
    found = {}
    with torch.no_grad():
        found["network"] = family.predict(networks["network"], x_t, torch.tensor([0.5]), conditioning)
        for part, tokenizer in TOKENIZERS.items():
            tokens = family.load(tokenizer, "cpu", None)
            sample = family._encode_text(part, networks[part], tokens, PROMPT)
            found |= {f"{part} {name}": value for name, value in sample.items()}
    assert case.family == family.name
    return found


def test_the_network_is_told_sizes_and_crops(base: Path) -> None:
    """By hand: a picture scaled to cover 64 x 96 and cropped at its centre, in (height, width)."""
    from kinema.data.batch import Sample

    family = family_at(path=str(base))
    autoencoder = family.load("autoencoder", "cpu", torch.float32)
    pixels = torch.zeros(3, 1, 64, 96, dtype=torch.uint8)
    expected = {
        None: [64, 96, 0, 0, 64, 96],
        (128, 192): [128, 192, 0, 0, 64, 96],
        (100, 300): [100, 300, 0, 48, 64, 96],  # becomes 64 x 192
        (400, 48): [400, 48, 368, 0, 64, 96],  # becomes 800 x 96
    }
    samples = [Sample("", pixels, size=size) for size in expected]
    rows = family.encode(family.encodings()[-1], {"autoencoder": autoencoder}, samples)
    assert [row["sizes"].tolist() for row in rows] == list(expected.values())


# -- text encoders that train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trained", [("text_encoder",), ("text_encoder_2",), ("network", "text_encoder", "text_encoder_2")]
)
def test_trained_encoders_read_the_captions_themselves(base: Path, trained: tuple[str, ...]) -> None:
    """What they make equals what would have been cached; the cache leaves it out; gradients reach them alone."""
    case = Case(variant="base-eps")
    usual, family = family_at(path=str(base)), family_at(path=str(base), train=list(trained))
    parts = {part: usual.load(part, "cpu", torch.float32) for part in usual.variant.parts}
    cached = [encode(case, usual, parts, caption) for caption in (PROMPT, NEGATIVE)]
    expected = usual.prepare(batch_of(*cached)).conditioning
    here = [encode(case, family, parts, caption) for caption in (PROMPT, NEGATIVE)]
    assert not set(here[0]) & {part for part in trained if part in TOKENIZERS}
    assert ("pooled" in here[0]) == ("text_encoder_2" not in trained)
    networks = {part: copy.deepcopy(parts[part]).train().requires_grad_(True) for part in trained}
    prepared = family.prepare(batch_of(*here, captions=(PROMPT, NEGATIVE)), networks)
    assert_same(prepared.conditioning, expected, 1e-5, "conditioning")
    prepared.conditioning["encoder_hidden_states"].square().sum().backward()
    for part in set(trained) & set(TOKENIZERS):
        grads = [p.grad is not None for name, p in networks[part].named_parameters() if "layers.0." in name]
        assert grads and all(grads)


def test_captions_are_dropped_for_one_encoder_alone(base: Path) -> None:
    """Those that train are told the empty caption in the same rows as the cached text of the others would be."""
    case = Case(variant="base-eps")
    usual, trained = family_at(path=str(base)), ("text_encoder", "text_encoder_2")
    family = family_at(path=str(base), train=list(trained))
    parts = {part: usual.load(part, "cpu", torch.float32) for part in usual.variant.parts}
    dropped = [frozenset(), frozenset({"text_encoder"}), frozenset({"text_encoder_2"}), frozenset(trained)]
    told, untold = (encode(case, usual, parts, caption) for caption in (PROMPT, ""))
    owner = {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "pooled": "text_encoder_2"}
    cached = [{name: (untold if owner.get(name) in row else told)[name] for name in told} for row in dropped]
    expected = usual.prepare(batch_of(*cached)).conditioning
    batch = batch_of(*[encode(case, family, parts, PROMPT)] * 4, captions=[PROMPT] * 4)
    batch.dropped = dropped
    prepared = family.prepare(batch, {part: parts[part] for part in trained})
    assert_same(prepared.conditioning, expected, 1e-5, "conditioning")
    rows = expected["encoder_hidden_states"]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 4


def test_shares_of_dropout_are_those_of_text_encoders(base: Path, tmp_path: Path) -> None:
    def check(shares: Any) -> None:
        training = {"steps": 1, "caption_dropout": shares}
        family_at(path=str(base)).validate(config_of(Case(variant="base-eps"), base, tmp_path, training=training))

    for accepted in (0.1, {"text_encoder": 0.3, "text_encoder_2": 0.0}, {"text_encoder_2": 1.0}):
        check(accepted)
    known = r"Its text encoders: text_encoder, text_encoder_2\.$"
    with pytest.raises(
        ConfigError, match=rf"caption_dropout: base-eps has .* 'text_encoder_3'; did you mean .* {known}"
    ):
        check({"text_encoder": 0.1, "text_encoder_3": 0.1})
    with pytest.raises(ConfigError, match=rf"no text encoder 'network'\. {known}"):
        check({"network": 0.1})
