"""Adapters in files: written in each layout, read by the tools that the layouts belong to and by us."""

import json

import pytest
import torch
from lora_network import KINDS, NAMES, TARGETS, Experts, folded, run, tiny_network, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kinema.adapters.files import fold_file, locate, read_adapter
from kinema.adapters.inject import adapter_of, add_adapter, fold_adapter, merge_adapter, start_from
from kinema.adapters.targets import adaptable_modules
from kinema.adapters.write import DIFFUSERS_FILE, by_file, file_metadata, save_adapter
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError
from kinema.families.wan_names import NETWORK

ALPHAS = pytest.mark.parametrize("alpha", [4.0, 1.0, 7.0], ids=lambda a: f"alpha{a:g}of4")
MIXED = {"rank_patterns": {r"attn2\.to_[qk]": 3, "to_v": 2}, "alpha_patterns": {"to_q": 1.5, r"blocks\.1\..*": 5.0}}
"""Ranks and alphas that differ by layer."""


def save(path, layout, network, names=NAMES, **options):
    options.setdefault("metadata", {"a": "b"})
    save_adapter(path, layout, [adapter_of(network)], names, **options)
    return path


def read(path, network, names=NAMES):
    (adapter,) = read_adapter(path, names, {"network": adaptable_modules(network)}).adapters.values()
    return adapter


def pipeline(image: bool):
    """diffusers' pipeline around a fresh network: the parts that loading adapters does not touch are absent."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    if image:
        parts |= dict.fromkeys(("image_encoder", "image_processor"))
        return WanImageToVideoPipeline(transformer=tiny_network(True), scheduler=scheduler, **parts)
    return WanPipeline(transformer=tiny_network(False), scheduler=scheduler, **parts)


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"alpha": 4.0}, {"alpha": 1.0}, {"alpha": 7.0}, MIXED], ids=str)
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_diffusers_pipelines_read_three_layouts_to_the_same_output(tmp_path, image, changes):
    network = trained("lora", image, **changes)
    expected = run(network)
    assert (expected - run(tiny_network(image))).abs().max() > 1e-2, "the adapter does nothing"
    diffusers = save(tmp_path / DIFFUSERS_FILE, "diffusers", network)
    comfyui = save(tmp_path / "comfyui.safetensors", "comfyui", network)
    kohya = save(tmp_path / "kohya.safetensors", "kohya", network)
    for source in (diffusers, comfyui, kohya):
        pipe = pipeline(image)
        pipe.load_lora_weights(source)
        torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-6, atol=1e-6)
    alone = tiny_network(image)
    alone.load_lora_adapter(tmp_path, weight_name=DIFFUSERS_FILE, use_safetensors=True)
    torch.testing.assert_close(run(alone), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "lokr", "lokr whole", "lokr both"])
def test_diffusers_networks_read_the_other_kinds(tmp_path, kind):
    network = trained(kind)
    save(tmp_path / DIFFUSERS_FILE, "diffusers", network)
    alone = tiny_network()
    alone.load_lora_adapter(tmp_path, use_safetensors=True)
    torch.testing.assert_close(run(alone), run(network), rtol=1e-6, atol=1e-6)
    if kind == "dora":
        pipe = pipeline(False)
        pipe.load_lora_weights(tmp_path)
        torch.testing.assert_close(run(pipe.transformer), run(network), rtol=1e-6, atol=1e-6)


@ALPHAS
def test_diffusers_reads_layers_outside_the_blocks(tmp_path, alpha):
    """Its importer refuses an alpha there, so the file must not have one. In float64: these layers amplify rounding."""
    targets = (*TARGETS, "proj_out", "time_proj", r"text_embedder\.linear_[12]", r"ff\.net\.(0\.proj|2)")
    network = trained("lora", True, targets, alpha=alpha).double()
    pipe = pipeline(True)
    pipe.transformer.double()
    pipe.load_lora_weights(save(tmp_path / "x.safetensors", "comfyui", network))
    expected = run(network, torch.float64)
    assert (expected - run(tiny_network(True).double(), torch.float64)).abs().max() > 1e-2
    torch.testing.assert_close(run(pipe.transformer, torch.float64), expected, rtol=1e-9, atol=1e-9)


def test_the_second_expert_is_loaded_where_diffusers_wants_it(tmp_path):
    """Its pipelines read names of the first transformer and are told which one they are for."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    network = trained("lora")
    adapter = adapter_of(network, "network_2")
    save_adapter(tmp_path / "x.safetensors", "diffusers", [adapter], Experts(), metadata={})
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = WanPipeline(
        transformer=tiny_network(), transformer_2=tiny_network(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    pipe.load_lora_weights(tmp_path / "x.safetensors", load_into_transformer_2=True)
    torch.testing.assert_close(run(pipe.transformer_2), run(network), rtol=1e-6, atol=1e-6)
    assert torch.equal(run(pipe.transformer), run(tiny_network()))


# -- PEFT, ComfyUI, LyCORIS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_its_directories(tmp_path, kind):
    from peft import PeftModel

    changes = MIXED if kind in ("lora", "dora") else {}
    network = trained(kind, **changes)
    save(tmp_path / "peft", "peft", network)
    theirs = PeftModel.from_pretrained(tiny_network(), tmp_path / "peft")
    torch.testing.assert_close(run(theirs.get_base_model()), run(network), rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == {"lo": "LOKR", "ia": "IA3"}.get(kind[:2] if kind != "lora" else "", "LORA")


def comfyui_patches(path, base):
    """What ComfyUI adds to each weight, after the rules of its loader (comfy/lora.py, comfy/weight_adapter):
    `<weight name>.lora_A.weight`, `.lora_B.weight` with alpha over A's rows; `.lokr_*` with alpha over the rank of the
    last decomposed factor, and no alpha where both matrices are whole; an absent alpha is a scale of 1."""
    tensors, patches = load_file(path), {}
    for key, weight in base.items():
        name = "diffusion_model." + key.removesuffix(".weight")
        own = {n.removeprefix(f"{name}."): tensors.pop(n) for n in list(tensors) if n.startswith(f"{name}.")}
        if not own or not key.endswith(".weight"):
            tensors |= {f"{name}.{n}": value for n, value in own.items()}
            continue
        alpha, dim = own.pop("alpha", None), None
        own = {n: value.double() for n, value in own.items()}
        if "lora_A.weight" in own:
            dim = own["lora_A.weight"].shape[0]
            delta = own["lora_B.weight"] @ own["lora_A.weight"]
        else:
            if (w1 := own.get("lokr_w1")) is None:
                dim, w1 = own["lokr_w1_b"].shape[0], own["lokr_w1_a"] @ own["lokr_w1_b"]
            if (w2 := own.get("lokr_w2")) is None:
                dim, w2 = own["lokr_w2_b"].shape[0], own["lokr_w2_a"] @ own["lokr_w2_b"]
            delta = torch.kron(w1, w2)
        delta = delta * (alpha.item() / dim if alpha is not None and dim is not None else 1.0)
        if "dora_scale" in own:
            # As LyCORIS defines it; ComfyUI itself divides by the norm of the base weight.
            assert own["dora_scale"].shape == (weight.shape[0], 1)
            whole = weight.double() + delta
            delta = whole * own["dora_scale"] / whole.norm(dim=1, keepdim=True) - weight.double()
        patches[key] = delta
    assert not tensors, f"ComfyUI would not load {sorted(tensors)[:3]}"
    return patches


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ia3"])
@pytest.mark.parametrize("changes", [{}, {"alpha": 4.0}, {"alpha_patterns": {"to_q": 0.5}}], ids=str)
def test_comfyui_finds_every_layer_and_the_same_update(tmp_path, kind, changes):
    network = trained(kind, True, (*TARGETS, "proj_out"), **changes)
    path = save(tmp_path / "x.safetensors", "comfyui", network)
    base = NETWORK.to_original(tiny_network(True).state_dict())
    patches = comfyui_patches(path, base)
    assert len(patches) == 2 * 12 + 1
    merge_adapter(network)
    merged = NETWORK.to_original(network.state_dict())
    for key, patch in patches.items():
        assert merged[key].shape == patch.shape
        difference = merged[key].double() - base[key].double()
        torch.testing.assert_close(difference, patch, rtol=1e-4, atol=1e-5)


def test_kohya_files_say_what_kohyas_tools_expect(tmp_path):
    network = trained("lora", alpha=1.0)
    path = save(tmp_path / "x.safetensors", "kohya", network)
    tensors = load_file(path)
    name = "lora_unet_blocks_0_self_attn_q"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 24) and tensors[f"{name}.lora_up.weight"].shape == (24, 4)
    assert tensors[f"{name}.alpha"].item() == 1.0
    assert sum(key.endswith(".alpha") for key in tensors) == 20 and len(tensors) == 60
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "1.0")
    lokr = load_file(save(tmp_path / "lokr.safetensors", "kohya", trained("lokr")))
    assert lokr[f"{name}.lokr_w2_a"].shape == (6, 2) and lokr[f"{name}.alpha"].item() == 3.0
    whole = load_file(save(tmp_path / "whole.safetensors", "kohya", trained("lokr whole")))
    assert set(key.rpartition(".")[2] for key in whole) == {"lokr_w1", "lokr_w2", "alpha"}


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya", "peft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, MIXED], ids=["uniform", "mixed"])
def test_reading_gives_back_what_was_written(tmp_path, network, layout, kind, changes):
    image = bool(network.config.image_dim)
    if kind == "ia3" and layout != "peft":
        with pytest.raises(UserError, match=rf"layout {layout} cannot hold an adapter of type ia3: .*peft"):
            save(tmp_path / "x.safetensors", layout, trained(kind))
        return
    changes = (
        {}
        if kind == "ia3"
        else {"alpha_patterns": changes["alpha_patterns"]}
        if changes and "lokr" in kind
        else changes
    )
    source = trained(kind, image, **changes)
    path = save(tmp_path / ("x" if layout == "peft" else "x.safetensors"), layout, source)
    written, adapter = adapter_of(source), read(path, network)
    assert adapter.kind == written.kind and adapter.on_input == written.on_input
    assert adapter.state.keys() == written.state.keys()
    for layer in written.layers:
        assert adapter.scale(layer) == pytest.approx(written.scale(layer)) or "whole" in kind
        if "lokr" not in kind:
            assert (adapter.ranks.get(layer), adapter.alphas.get(layer)) == (
                written.ranks.get(layer),
                written.alphas.get(layer),
            )
    if kind != "lokr whole" or layout in ("diffusers", "peft"):
        assert all(torch.equal(adapter.state[name], value) for name, value in written.state.items()), "not lossless"
    fold_adapter(network, adapter)
    torch.testing.assert_close(run(network), run(source), rtol=1e-4, atol=1e-5)


@ALPHAS
def test_pefts_own_directory_is_read(tmp_path, alpha):
    from peft import LoraConfig, get_peft_model

    for use_rslora in (False, True):
        theirs = get_peft_model(
            tiny_network(),
            LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_k"], use_rslora=use_rslora,
                       init_lora_weights=False, rank_pattern={"to_k": 3}),
        )  # fmt: skip
        folder = tmp_path / f"theirs{use_rslora}"
        theirs.save_pretrained(folder)
        network = tiny_network()
        fold_file(folder, NAMES, {"network": network})
        torch.testing.assert_close(run(network), run(theirs.get_base_model()), rtol=1e-4, atol=1e-5)


def test_names_of_older_diffusers_and_of_other_tools(tmp_path):
    """Attention processors, `lora.down`, LyCORIS' wrapper, and original names after diffusers' prefix."""
    adapter = adapter_of(trained("lora", targets=(r"attn1\.to_q",), alpha=4.0))
    expected = run(folded(adapter))
    a, b = ({n.split(".lora_")[0]: v for n, v in adapter.state.items() if f"lora_{x}" in n} for x in "AB")
    forms = {
        "processors": lambda layer: (f"transformer.{layer.replace('.to_q', '.processor.to_q_lora')}", ".down", ".up"),
        "dots": lambda layer: (f"transformer.{layer}", ".lora.down", ".lora.up"),
        "lycoris": lambda layer: (f"lycoris_{layer.replace('.', '_')}", ".lora_down", ".lora_up"),
        "named slot": lambda layer: (f"base_model.model.{layer}", ".lora_A.default", ".lora_B.default"),
        "original": lambda layer: (f"transformer.{NETWORK.original_layer(layer)}", ".lora_A", ".lora_B"),
        "bare": lambda layer: (layer, ".lora_A", ".lora_B"),
        "diffusers in comfyui": lambda layer: (f"diffusion_model.{layer}", ".lora_A", ".lora_B"),
    }
    for form, named in forms.items():
        tensors = {}
        for layer in adapter.layers:
            start, down, up = named(layer)
            tensors |= {f"{start}{down}.weight": a[layer].clone(), f"{start}{up}.weight": b[layer].clone()}
        path = tmp_path / f"{form}.safetensors"
        save_file(tensors, path)
        network = tiny_network()
        fold_file(path, NAMES, {"network": network})
        assert torch.equal(run(network), expected), form


def test_layers_of_several_ranks_and_alphas_keep_them(tmp_path):
    network = tiny_network()
    state = {}
    draw = torch.Generator().manual_seed(0)
    expected = {}
    base = network.state_dict()
    for i, (name, rank, alpha) in enumerate([("to_q", 2, 2.0), ("to_k", 2, 2.0), ("to_v", 5, 1.0)]):
        layer = f"blocks.{i % 2}.attn1.{name}"
        a, b = torch.randn(rank, 24, generator=draw), torch.randn(24, rank, generator=draw)
        key = "diffusion_model." + layer.replace("attn1.to_", "self_attn.")
        state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(alpha)}
        expected[f"{layer}.weight"] = base[f"{layer}.weight"] + alpha / rank * b @ a
    save_file(state, tmp_path / "x.safetensors")
    adapter = read(tmp_path / "x.safetensors", network)
    assert sorted(adapter.ranks.values()) == [2, 2, 5] and sorted(adapter.alphas.values()) == [1.0, 2.0, 2.0]
    assert torch.equal(adapter.state["blocks.0.attn1.to_v.lora_B.weight"], b)
    fold_adapter(network, adapter)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected.get(name, base[name]), rtol=1e-5, atol=1e-5)


def test_linear_layers_written_as_convolutions_fit(tmp_path):
    adapter = adapter_of(trained("lora", targets=("to_q",)))
    save_adapter(tmp_path / "x.safetensors", "kohya", [adapter], NAMES, metadata={})
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({n: v[:, :, None, None] if v.ndim == 2 else v for n, v in tensors.items()}, tmp_path / "y.safetensors")
    again = read(tmp_path / "y.safetensors", tiny_network())
    assert all(torch.equal(again.state[name], value) for name, value in adapter.state.items())


def test_tucker_factors_of_lycoris_are_read(tmp_path):
    draw = torch.Generator().manual_seed(0)
    key = "lora_unet_patch_embedding"
    w1, t2 = torch.randn(4, 4, generator=draw), torch.randn(2, 2, 1, 2, 2, generator=draw)
    a, b = torch.randn(2, 6, generator=draw), torch.randn(2, 4, generator=draw)
    tensors = {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    save_file({f"{key}.{name}": value for name, value in tensors.items()}, tmp_path / "x.safetensors")
    network = tiny_network()
    before = network.patch_embedding.weight.clone().double()
    fold_file(tmp_path / "x.safetensors", NAMES, {"network": network})
    w2 = torch.zeros(6, 4, 1, 2, 2, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            w2 += (
                a[i].double()[:, None, None, None, None] * b[j].double()[None, :, None, None, None] * t2[i, j].double()
            )
    expected = before.clone()
    for out in range(24):
        for inner in range(16):
            expected[out, inner] += 0.5 * w1[out // 6, inner // 4].double() * w2[out % 6, inner % 4]
    torch.testing.assert_close(network.patch_embedding.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_whole_parameters_that_other_tools_add_to_are_folded_in(tmp_path):
    """Distilled LoRAs of the community change norms and biases too (`.diff`, `.diff_b`)."""
    adapter = adapter_of(trained("lora"))
    save_adapter(tmp_path / "x.safetensors", "comfyui", [adapter], NAMES, metadata={})
    start = "diffusion_model.blocks.0"
    added = {
        f"{start}.norm3.diff": torch.randn(24),
        f"{start}.self_attn.q.diff_b": torch.randn(24),
        f"{start}.modulation.diff": torch.randn(1, 6, 24),
        f"{start}.self_attn.norm_k.diff": torch.zeros(24),
    }
    save_file(load_file(tmp_path / "x.safetensors") | added, tmp_path / "y.safetensors")
    with_shifts = read(tmp_path / "y.safetensors", tiny_network())
    assert len(with_shifts.shifts) == 3, "zeros are left out"
    plain, whole = folded(adapter, factor=0.5).state_dict(), folded(with_shifts, factor=0.5).state_dict()
    for name, value in plain.items():
        shift = {
            "blocks.0.norm2.weight": ".norm3.diff",
            "blocks.0.attn1.to_q.bias": ".self_attn.q.diff_b",
            "blocks.0.scale_shift_table": ".modulation.diff",
        }.get(name)
        expected = value if shift is None else value + 0.5 * added[start + shift]
        torch.testing.assert_close(whole[name], expected, rtol=1e-6, atol=1e-6)
    save_adapter(tmp_path / "z.safetensors", "comfyui", [with_shifts], NAMES, metadata={})
    again = load_file(tmp_path / "z.safetensors")
    assert all(torch.equal(again[name], value) for name, value in added.items() if value.any())
    with pytest.raises(UserError, match=r"also changes 3 whole parameters, .* layout kohya cannot hold"):
        save_adapter(tmp_path / "k.safetensors", "kohya", [with_shifts], NAMES, metadata={})
    network = tiny_network()
    config = AdapterConfig(rank=4, init_from=tmp_path / "y.safetensors")
    add_adapter(network, config, TARGETS, seed=0)
    with pytest.raises(UserError, match=r"also changes 3 whole parameters, .*kinema merge"):
        start_from(network, config, with_shifts)
    save_file(
        {f"{start}.norm9.diff": torch.ones(24), **load_file(tmp_path / "x.safetensors")}, tmp_path / "w.safetensors"
    )
    with pytest.raises(UserError, match=r"changes blocks\.0\.norm9\.weight \[24\], and there is none"):
        fold_file(tmp_path / "w.safetensors", NAMES, {"network": tiny_network()})


# -- several parts -----------------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})])


class WithText(Experts):
    def layout(self, part="network"):
        from kinema.families.layout import Layout

        return Layout([("layers", "text_model.encoder.layers")]) if part == "text_encoder" else NETWORK

    def expert(self, part):
        return ""


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya", "peft"])
def test_a_text_encoder_and_a_network_in_one_adapter(tmp_path, layout):
    from lora_network import train_a_little

    from kinema.adapters.inject import add_adapter

    encoder, network, names = Encoder(), trained("lora"), WithText()
    add_adapter(encoder, AdapterConfig(rank=2, alpha=1.0), ("q_proj",), seed=0)
    train_a_little(encoder)
    adapters = [adapter_of(network), adapter_of(encoder, "text_encoder")]
    files = by_file(adapters, layout, names)
    assert len(files) == (2 if layout == "peft" else 1)
    for inside in files:
        path = tmp_path / inside[0].part if layout == "peft" else tmp_path / "x.safetensors"
        save_adapter(path, layout, inside, names, metadata={})
    plain = {"network": tiny_network(), "text_encoder": Encoder()}
    modules = {part: adaptable_modules(module) for part, module in plain.items()}
    found = read_adapter(tmp_path, names, modules).adapters
    assert found.keys() == plain.keys()
    for part, adapter in zip(plain, adapters, strict=True):
        assert found[part].alphas == adapter.alphas
        assert all(torch.equal(found[part].state[name], value) for name, value in adapter.state.items())
    if layout == "kohya":
        assert "lora_te_text_model_encoder_layers_0_q_proj.alpha" in load_file(tmp_path / "x.safetensors")
    if layout != "peft":
        with pytest.raises(UserError, match=r"it also adapts (lora_te|text_encoder) .*no part that is adapted here"):
            read_adapter(tmp_path, names, {"network": modules["network"]})


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya", "peft"])
def test_two_experts_lie_in_files_of_their_own(tmp_path, layout):
    names = Experts()
    adapters = [adapter_of(trained("lora"), "network"), adapter_of(trained("lora", rank=2), "network_2")]
    for inside in by_file(adapters, layout, names):
        (one,) = inside
        ending = names.expert(one.part)
        path = tmp_path / ending if layout == "peft" else tmp_path / f"x-{ending}.safetensors"
        save_adapter(path, layout, inside, names, metadata={})
    modules = dict.fromkeys(("network", "network_2"), adaptable_modules(tiny_network()))
    found = read_adapter(tmp_path, names, modules).adapters
    assert {part: set(one.ranks.values()) for part, one in found.items()} == {"network": {4}, "network_2": {2}}
    (second,) = [file for file in locate(tmp_path) if "expert_2" in str(file)]
    assert read_adapter(second, names, modules).adapters.keys() == {"network_2"}
    alone = read_adapter(second, names, {"network": modules["network"]}).adapters
    assert alone.keys() == {"network"}, "to go on with it in the other one is a choice"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_files_that_are_no_adapter_for_this_network_are_told(tmp_path):
    network = tiny_network()
    path = tmp_path / "x.safetensors"

    def reading(tensors):
        save_file(tensors, path)
        return read(path, network)

    a, b = torch.zeros(2, 24), torch.zeros(24, 2)
    key = "diffusion_model.blocks.0.self_attn.q"
    pair = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    with pytest.raises(UserError, match=r"no layer for .*txt_attn\.q.*another model"):
        reading({f"diffusion_model.blocks.0.txt_attn.q.lora_{x}.weight": v for x, v in (("A", a), ("B", b))})
    with pytest.raises(UserError, match="no layer for lora_unet_double_blocks_0_img_attn_qkv"):
        reading({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": a})
    with pytest.raises(UserError, match=r"1 tensors are none, for instance .*self_attn\.q\.hada_w1_a"):
        reading({**pair, f"{key}.hada_w1_a": torch.zeros(24, 2)})
    with pytest.raises(UserError, match=r"q has lora_A\.weight, which is no complete lora layer"):
        reading({f"{key}.lora_A.weight": a})
    with pytest.raises(UserError, match=r"no complete lora layer"):
        reading({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.zeros(24, 3)})
    with pytest.raises(UserError, match=r"no complete lokr layer.*mix several kinds"):
        other = "diffusion_model.blocks.1.self_attn.q"
        reading({**pair, f"{other}.lokr_w1": torch.zeros(4, 4), f"{other}.lokr_w2": torch.zeros(6, 6)})
    with pytest.raises(UserError, match=r"lora_B\.weight \[20, 2\].*weight there is \[24, 24\].*another size"):
        reading({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.zeros(20, 2)})
    with pytest.raises(UserError, match=r"lora_magnitude_vector \[1, 24\]"):  # LyCORIS' norms over inputs
        reading({**pair, f"{key}.dora_scale": torch.ones(1, 24)})
    with pytest.raises(UserError, match=r"another of its layers are both blocks\.0\.self_attn\.q"):
        reading(
            {**pair, "lora_unet_blocks_0_self_attn_q.lora_down.weight": a.clone(),
             "lora_unet_blocks_0_self_attn_q.lora_up.weight": b.clone()}
        )  # fmt: skip
    path.write_bytes(b"not a file")
    with pytest.raises(UserError, match="no readable safetensors file"):
        read(path, network)
    with pytest.raises(UserError, match="there is no such file"):
        read(tmp_path / "absent", network)
    (tmp_path / "second.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"found second\.safetensors, x\.safetensors"):
        read(tmp_path, network)


def test_lokr_of_shapes_that_peft_cannot_make_is_refused_where_peft_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    key = "lora_unet_blocks_0_self_attn_q"
    save_file({f"{key}.lokr_w1": torch.ones(8, 2), f"{key}.lokr_w2": torch.ones(3, 12)}, path)
    adapter = read(path, tiny_network())
    with pytest.raises(UserError, match=r"shapes that PEFT does not make.*comfyui or kohya"):
        save_adapter(tmp_path / "y.safetensors", "diffusers", [adapter], NAMES, metadata={})
    save_adapter(tmp_path / "y.safetensors", "kohya", [adapter], NAMES, metadata={})
    assert torch.equal(load_file(tmp_path / "y.safetensors")[f"{key}.lokr_w1"], torch.ones(8, 2))


def test_headers_say_where_a_file_is_from(tmp_path):
    base = tmp_path / "someone" / "base-model"
    base.mkdir(parents=True)
    metadata = file_metadata(title="shapes", base_model=str(base), architecture="wan/lora", config_hash="abc", step=12)
    network = trained("lora")
    for layout in ("diffusers", "comfyui", "kohya", "peft"):
        path = save(tmp_path / f"{layout}.safetensors", layout, network, metadata=metadata)
        file = path / "adapter_model.safetensors" if layout == "peft" else path
        with safe_open(file, framework="pt") as handle:
            header = handle.metadata()
        assert header["kinema.step"] == "12" and header["kinema.config_hash"] == "abc"
        assert header["modelspec.title"] == "shapes" and header["format"] == "pt"
        assert header["kinema.base_model"] == "base-model" and header["kinema.part"] == "network"
        assert str(tmp_path) not in json.dumps(header)


def test_tensors_have_the_type_asked_for(tmp_path):
    network = trained("dora")
    for layout in ("diffusers", "comfyui", "kohya"):
        path = save(tmp_path / f"{layout}.safetensors", layout, network, dtype=torch.bfloat16)
        kinds = {value.dtype for name, value in load_file(path).items() if not name.endswith(".alpha")}
        assert kinds == {torch.bfloat16}
