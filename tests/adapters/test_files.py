import json

import pytest
import torch
from lora_network import NAMES, TARGETS, run, tiny_network, train_a_little
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kinema.adapters.files import file_metadata, read_adapter, save_comfyui, save_diffusers
from kinema.adapters.lora import (
    adaptable_modules,
    adapter_state,
    add_adapter,
    attach_adapter,
    merge_adapter,
    start_from,
)
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError

ALPHAS = pytest.mark.parametrize("alpha", [4.0, 1.0, 7.0], ids=lambda a: f"alpha{a:g}of4")


def trained(image: bool, alpha: float, targets=TARGETS) -> torch.nn.Module:
    network = tiny_network(image)
    add_adapter(network, AdapterConfig(rank=4, alpha=alpha), targets, seed=3)
    train_a_little(network)
    return network


def pipeline(image: bool):
    """diffusers' pipeline around a fresh network: the parts that loading adapters does not touch are
    absent."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    if image:
        parts |= dict.fromkeys(("image_encoder", "image_processor"))
        return WanImageToVideoPipeline(transformer=tiny_network(True), scheduler=scheduler, **parts)
    return WanPipeline(transformer=tiny_network(False), scheduler=scheduler, **parts)


@ALPHAS
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_diffusers_pipelines_read_both_layouts_to_the_same_output(tmp_path, image, alpha):
    network = trained(image, alpha)
    expected = run(network)
    assert (expected - run(tiny_network(image))).abs().max() > 1e-2, "the adapter does nothing"
    save_diffusers(
        tmp_path / "pytorch_lora_weights.safetensors",
        adapter_state(network),
        rank=4,
        alpha=alpha,
        metadata={"a": "b"},
    )
    (tmp_path / "comfyui").mkdir()
    comfyui = tmp_path / "comfyui" / "some-name.safetensors"
    save_comfyui(comfyui, adapter_state(network), rank=4, alpha=alpha, names=NAMES, metadata={"a": "b"})
    for source in (tmp_path, comfyui):
        pipe = pipeline(image)
        pipe.load_lora_weights(source)
        torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-6, atol=1e-6)
    alone = tiny_network(image)
    alone.load_lora_adapter(tmp_path, use_safetensors=True)
    torch.testing.assert_close(run(alone), expected, rtol=1e-6, atol=1e-6)


@ALPHAS
def test_diffusers_reads_layers_outside_the_blocks(tmp_path, alpha):
    """Its importer refuses an alpha there, so the file must not have one."""
    targets = (*TARGETS, "proj_out", "time_proj", r"text_embedder\.linear_[12]", r"ff\.net\.(0\.proj|2)")
    network = trained(True, alpha, targets)
    save_comfyui(tmp_path / "x.safetensors", adapter_state(network), rank=4, alpha=alpha, names=NAMES, metadata={})
    pipe = pipeline(True)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(run(pipe.transformer), run(network), rtol=1e-6, atol=1e-6)


def comfyui_patches(path, original_keys):
    """What ComfyUI makes of an adapter: for each weight that it names, B A times alpha over rank (rank = A's
    rows).

    After the rules of its loader: `<weight name>.lora_A.weight`, `.lora_B.weight`, and `.alpha`, absent
    meaning 1."""
    tensors, patches = load_file(path), {}
    for key in original_keys:
        name = "diffusion_model." + key.removesuffix(".weight")
        if f"{name}.lora_A.weight" in tensors:
            a, b = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
            alpha = tensors.pop(f"{name}.alpha", None)
            patches[key] = (1.0 if alpha is None else alpha.item() / a.shape[0]) * (b.double() @ a.double())
    assert not tensors, f"ComfyUI would not load {sorted(tensors)[:3]}"
    return patches


@ALPHAS
def test_comfyui_finds_every_layer_and_the_same_update(tmp_path, alpha):
    network = trained(True, alpha, (*TARGETS, "proj_out"))
    save_comfyui(tmp_path / "x.safetensors", adapter_state(network), rank=4, alpha=alpha, names=NAMES, metadata={})
    base = NAMES.to_original(tiny_network(True).state_dict())
    patches = comfyui_patches(tmp_path / "x.safetensors", base)
    assert len(patches) == 2 * 12 + 1
    merge_adapter(network)
    merged = NAMES.to_original(network.state_dict())
    for key, patch in patches.items():
        assert merged[key].shape == patch.shape
        difference = merged[key].double() - base[key].double()
        torch.testing.assert_close(difference, patch, rtol=1e-4, atol=1e-5)


def as_kohya(state: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in NAMES.to_original(state).items():
        layer, _, which = name.rpartition(".lora_")
        layer = "lora_unet_" + layer.replace(".", "_")
        result[f"{layer}.lora_{'down' if which[0] == 'A' else 'up'}.weight"] = value
        result[f"{layer}.alpha"] = torch.tensor(alpha)
    return result


@ALPHAS
@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya", "peft"])
def test_reading_gives_back_what_was_written(tmp_path, network, layout, alpha):
    image = bool(network.config.image_dim)
    source = trained(image, alpha, (*TARGETS, "proj_out") if layout == "comfyui" else TARGETS)
    state, path = adapter_state(source), tmp_path / "file.safetensors"
    match layout:
        case "diffusers":
            save_diffusers(path, state, rank=4, alpha=alpha, metadata={})
        case "comfyui":
            save_comfyui(path, state, rank=4, alpha=alpha, names=NAMES, metadata={})
        case "kohya":
            save_file({name: value.contiguous() for name, value in as_kohya(state, alpha).items()}, path)
        case "peft":
            save_file({f"base_model.model.{name}": value for name, value in state.items()}, path)
            (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    adapter = read_adapter(path, NAMES, adaptable_modules(network))
    assert (adapter.rank, adapter.alpha) == (4, alpha)
    assert adapter.state.keys() == state.keys()
    attach_adapter(network, adapter)
    torch.testing.assert_close(run(network), run(source), rtol=1e-6, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_diffusers_and_kinema_agree_on_kohya_names(tmp_path):
    network = trained(False, 2.0)
    tensors = {name: value.contiguous() for name, value in as_kohya(adapter_state(network), 2.0).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = pipeline(False)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(run(pipe.transformer), run(network), rtol=1e-6, atol=1e-6)


def test_layers_of_several_ranks_and_alphas(tmp_path):
    network = tiny_network()
    state = {}
    draw = torch.Generator().manual_seed(0)
    expected = {}
    base = network.state_dict()
    for i, (name, rank, alpha) in enumerate([("to_q", 2, 2.0), ("to_k", 2, 2.0), ("to_v", 5, 1.0)]):
        layer = f"blocks.{i % 2}.attn1.{name}"
        a, b = torch.randn(rank, 24, generator=draw), torch.randn(24, rank, generator=draw)
        original = layer.replace("attn1.to_", "self_attn.")
        key = "diffusion_model." + original
        state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(alpha)}
        expected[f"{layer}.weight"] = base[f"{layer}.weight"] + alpha / rank * b @ a
    save_file(state, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors", NAMES, adaptable_modules(network))
    assert (adapter.rank, adapter.alpha, sorted(adapter.ranks.values())) == (2, 2.0, [2, 2, 5])
    attach_adapter(network, adapter)
    merge_adapter(network)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected.get(name, base[name]), rtol=1e-5, atol=1e-5)


def test_updates_of_several_adapters_add_up(tmp_path):
    base = tiny_network().state_dict()
    expected = {name: value.clone() for name, value in base.items()}
    network = tiny_network()
    for i, (rank, targets) in enumerate([(4, TARGETS), (2, ("to_q", "proj_out"))]):
        one = tiny_network()
        add_adapter(one, AdapterConfig(rank=rank, alpha=3.0), targets, seed=i)
        train_a_little(one, seed=i)
        path = tmp_path / f"{i}.safetensors"
        save_diffusers(path, adapter_state(one), rank=rank, alpha=3.0, metadata={})
        attach_adapter(network, read_adapter(path, NAMES, adaptable_modules(network)))
        merge_adapter(one)
        for name, value in one.state_dict().items():
            expected[name] += value - base[name]
    together = run(network)
    merge_adapter(network)
    torch.testing.assert_close(network.state_dict(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(network), together, rtol=1e-5, atol=1e-5)


@ALPHAS
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_training_starts_from_a_file(tmp_path, layout, alpha):
    source = trained(False, 3.0)
    path = tmp_path / "start.safetensors"
    if layout == "diffusers":
        save_diffusers(path, adapter_state(source), rank=4, alpha=3.0, metadata={})
    else:
        save_comfyui(path, adapter_state(source), rank=4, alpha=3.0, names=NAMES, metadata={})
    network = tiny_network()
    modules = adaptable_modules(network)
    config = AdapterConfig(rank=4, alpha=alpha, init_from=path)
    add_adapter(network, config, (*TARGETS, "proj_out"), seed=0)
    start_from(network, config, read_adapter(path, NAMES, modules))
    torch.testing.assert_close(run(network), run(source), rtol=1e-5, atol=1e-6)
    fresh = adapter_state(network)["proj_out.lora_A.weight"]
    assert fresh.any(), "a layer that the file lacks starts fresh"


def test_a_start_that_does_not_fit_is_told(tmp_path):
    path = tmp_path / "start.safetensors"
    save_diffusers(path, adapter_state(trained(False, 4.0)), rank=4, alpha=4.0, metadata={})
    network = tiny_network()
    adapter = read_adapter(path, NAMES, adaptable_modules(network))
    config = AdapterConfig(rank=8, init_from=path)
    add_adapter(network, config, TARGETS, seed=0)
    with pytest.raises(UserError, match=r"start\.safetensors has rank 4 .* adapter\.rank is 8. Set adapter\.rank = 4"):
        start_from(network, config, adapter)
    network = tiny_network()
    config = AdapterConfig(rank=4, init_from=path)
    add_adapter(network, config, ("to_q",), seed=0)
    with pytest.raises(UserError, match=r"changes layers that adapter.targets leave out"):
        start_from(network, config, adapter)


def test_files_that_are_no_adapter_for_this_network_are_told(tmp_path):
    modules = adaptable_modules(tiny_network())
    path = tmp_path / "x.safetensors"

    def reading(tensors):
        save_file(tensors, path)
        return read_adapter(path, NAMES, modules)

    a, b = torch.zeros(2, 24), torch.zeros(24, 2)
    key = "diffusion_model.blocks.0.self_attn.q"
    with pytest.raises(UserError, match=r"no layer for .*txt_attn\.q.*another model"):
        reading({f"diffusion_model.blocks.0.txt_attn.q.lora_{x}.weight": v for x, v in (("A", a), ("B", b))})
    with pytest.raises(UserError, match="no layer for lora_unet_double_blocks_0_img_attn_qkv"):
        reading({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": a})
    with pytest.raises(UserError, match=r"1 tensors are none, for instance .*dora_scale"):
        reading({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.dora_scale": a.clone()})
    with pytest.raises(UserError, match="lacks lora_A or lora_B"):
        reading({f"{key}.lora_A.weight": a})
    path.write_bytes(b"not a file")
    with pytest.raises(UserError, match="no readable safetensors file"):
        read_adapter(path, NAMES, modules)
    with pytest.raises(UserError, match="there is no such file"):
        read_adapter(tmp_path / "absent", NAMES, modules)
    (tmp_path / "second.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"found second\.safetensors, x\.safetensors"):
        read_adapter(tmp_path, NAMES, modules)


def test_headers_say_where_a_file_is_from(tmp_path):
    base = tmp_path / "someone" / "base-model"
    base.mkdir(parents=True)
    metadata = file_metadata(title="shapes", base_model=str(base), architecture="wan/lora", config_hash="abc", step=12)
    network = trained(False, 2.0)
    for save in (
        lambda path: save_diffusers(path, adapter_state(network), rank=4, alpha=2.0, metadata=metadata),
        lambda path: save_comfyui(path, adapter_state(network), rank=4, alpha=2.0, names=NAMES, metadata=metadata),
    ):
        save(tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
            header = handle.metadata()
        assert header["kinema.step"] == "12" and header["kinema.config_hash"] == "abc"
        assert header["modelspec.title"] == "shapes" and header["format"] == "pt"
        assert header["kinema.base_model"] == "base-model"
        assert str(tmp_path) not in json.dumps(header)
