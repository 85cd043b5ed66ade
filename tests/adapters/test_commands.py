"""`kinema convert`, `merge` and `extract` on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_network import KINDS, train_a_little
from safetensors.torch import load_file, save_file

from kinema.adapters.convert import convert, find_adapter, is_adapter
from kinema.adapters.extract import extract, truncated
from kinema.adapters.files import read_adapter
from kinema.adapters.inject import adapter_of, add_adapter, fold_adapter
from kinema.adapters.merge import merge
from kinema.adapters.model import empty_modules, open_model
from kinema.adapters.store import Writer, groups
from kinema.adapters.write import DIFFUSERS_FILE, file_metadata, save_adapter
from kinema.errors import UserError
from kinema.families.wan import Wan

WHAT = {"family": "wan", "variant": "t2v-1.3b"}
PATTERNS = (r"to_[qkv]", r"ffn\.net\.2", "proj_out")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Wan.tiny(tmp_path_factory.mktemp("tiny") / "base", "t2v-1.3b", seed=1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def load(base):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(base / "transformer").requires_grad_(False)


def adapter_on(base, kind="lora", patterns=PATTERNS, **changes):
    network = load(base)
    config = KINDS[kind].model_copy(update={"input_targets": (), **changes})
    add_adapter(network, config, patterns, seed=0)
    train_a_little(network)
    return adapter_of(network)


def weights(path):
    state = {}
    for file in sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else [path]:
        state |= load_file(file)
    return state


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_an_adapter_goes_round_through_all_layouts_unchanged(tmp_path, base, kind):
    changes = {"alpha_patterns": {"to_k": 1.0}} | ({"rank_patterns": {"to_v": 2}} if kind != "lokr" else {})
    adapter = adapter_on(base, kind, **changes)
    family = open_model(str(base), **WHAT).family
    first = tmp_path / "0.safetensors"
    metadata = file_metadata(title="it", base_model="x", architecture="wan/t2v-1.3b/lora", step=7)
    save_adapter(first, "kohya", [adapter], family, metadata=metadata)
    place = first
    for layout, name in [
        ("diffusers", "folder"), ("peft", "peft"), ("comfyui", "c.safetensors"), ("diffusers", "d.safetensors"),
        ("kohya", "k.safetensors"),
    ]:  # fmt: skip
        out = tmp_path / name
        lines = convert(str(place), out, layout, base=str(base), **WHAT)
        assert lines[0] == f"{place}: {kind} of {len(adapter.layers)} layers of the network of wan/t2v-1.3b"
        assert is_adapter(str(out)) and out.exists()
        place = out
    assert (tmp_path / "folder" / DIFFUSERS_FILE).is_file()
    alphas = {name for name in load_file(place) if name.startswith("lora_unet_head_head")}
    assert same({n: v for n, v in load_file(place).items() if n not in alphas},
                {n: v for n, v in load_file(first).items() if n not in alphas})  # fmt: skip
    found = read_adapter(place, family, empty_modules(family)).adapters["network"]
    for layer in adapter.layers:
        assert found.scale(layer) * found.ranks[layer] == pytest.approx(found.alphas[layer])
        assert found.scale(layer) == pytest.approx(adapter.scale(layer)) or layer == "proj_out"
    from safetensors import safe_open

    with safe_open(place, framework="pt") as opened:
        assert opened.metadata()["kinema.step"] == "7"


def test_an_adapter_is_converted_to_another_type(tmp_path, base):
    adapter, family = adapter_on(base), open_model(str(base), **WHAT).family
    save_adapter(tmp_path / "a.safetensors", "comfyui", [adapter], family, metadata={})
    convert(str(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya", base=str(base), dtype="bf16", **WHAT)
    kinds = {v.dtype for n, v in load_file(tmp_path / "b.safetensors").items() if not n.endswith("alpha")}
    assert kinds == {torch.bfloat16}


def test_what_cannot_be_converted_is_told(tmp_path, base):
    adapter, family = adapter_on(base, "ia3"), open_model(str(base), **WHAT).family
    save_adapter(tmp_path / "ia3", "peft", [adapter], family, metadata={})
    out = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"layout kohya cannot hold an adapter of type ia3"):
        convert(str(tmp_path / "ia3"), out, "kohya", base=str(base), **WHAT)
    assert not out.exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=r"layout kohya cannot hold a whole network: its names are those of adapters"):
        convert(str(base), out, "kohya", **WHAT)
    with pytest.raises(UserError, match=r"layout diffusers is written as a directory"):
        convert(str(base), out, "diffusers", **WHAT)
    with pytest.raises(UserError, match=r"layout comfyui is written as a file that ends in \.safetensors"):
        convert(str(base), tmp_path / "folder", "comfyui", **WHAT)
    with pytest.raises(UserError, match=r"layout peft is written as a directory"):
        convert(str(tmp_path / "ia3"), out, "peft", base=str(base), **WHAT)
    with pytest.raises(UserError, match=r"--base belongs to an adapter"):
        convert(str(base), out, "comfyui", base=str(base), **WHAT)
    with pytest.raises(UserError, match=r"nowhere: there is no such file or directory"):
        convert(str(tmp_path / "nowhere"), out, "comfyui", **WHAT)
    out.write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.safetensors is there already"):
        convert(str(base), out, "comfyui", **WHAT)


def test_the_family_of_an_adapter_is_read_from_its_header_or_its_layers(tmp_path):
    """A published size needs no base; the header is believed, and without one the layers decide."""
    key = "diffusion_model.blocks.39.self_attn.q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 5120), f"{key}.lora_B.weight": torch.ones(5120, 2)}
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "said.safetensors", {"modelspec.architecture": "wan/t2v-14b/lora"})
    for name, given in (("plain", "wan"), ("said", None)):
        found, file = find_adapter(tmp_path / f"{name}.safetensors", given, None, "network")
        assert (found.name, found.variant.name) == ("wan", "t2v-14b")
        assert file.adapters["network"].layers == ["blocks.39.attn1.to_q"]
    with pytest.raises(UserError, match=r"q has .*5120.*weight there is \[1536, 1536\]|no layer for"):
        find_adapter(tmp_path / "plain.safetensors", "wan", "t2v-1.3b", "network")


# -- whole networks ----------------------------------------------------------------------------------------------------


def test_a_network_goes_from_diffusers_to_comfyui_and_back(tmp_path, base):
    from diffusers import WanTransformer3DModel

    network = load(base)
    single, folder = tmp_path / "single.safetensors", tmp_path / "again"
    lines = convert(str(base), single, "comfyui", **WHAT)
    assert lines[0] == f"{base}: the network of wan/t2v-1.3b, {len(network.state_dict())} tensors"
    assert all(name.startswith("model.diffusion_model.") for name in load_file(single))
    theirs = WanTransformer3DModel.from_single_file(single, config=str(base), subfolder="transformer")
    assert same(theirs.state_dict(), network.state_dict())
    place = {"family": "wan", "variant": "t2v-1.3b"}
    convert(str(base / "transformer"), folder, "diffusers", shard_gb=50e-6, **place)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(sizes) == 3 and len(set(index["weight_map"].values())) == len(sizes)
    assert same(WanTransformer3DModel.from_pretrained(folder).state_dict(), network.state_dict())


def test_types_change_but_for_what_the_library_keeps(tmp_path, base):
    from diffusers import WanTransformer3DModel

    convert(str(base), tmp_path / "x", "diffusers", dtype="bf16", **WHAT)
    state = weights(tmp_path / "x")
    exact = {name for name, value in state.items() if value.dtype == torch.float32}
    theirs = WanTransformer3DModel.from_pretrained(base / "transformer", torch_dtype=torch.bfloat16).state_dict()
    assert exact == {name for name, value in theirs.items() if value.dtype == torch.float32} and exact
    assert same(state, theirs)


def test_files_are_what_safetensors_itself_writes(tmp_path):
    entries = {
        "b.0.x": torch.randn(3, 5), "b.0.y": torch.randn(2).bfloat16(), "b.1.x": torch.arange(4, dtype=torch.int64),
        "c": torch.tensor(2.5), "d": torch.randn(4, 4).to(torch.float8_e4m3fn), "e": torch.tensor([True, False]),
    }  # fmt: skip
    assert groups(entries) == [["b.0.x", "b.0.y"], ["b.1.x"], ["c"], ["d"], ["e"]]
    with Writer(tmp_path / "x.safetensors", entries, {"k": "v"}) as writer:
        for name in reversed(entries):
            writer.write(name, entries[name])
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == entries.keys()
    for name, value in entries.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name].float(), value.float())
    with (
        pytest.raises(AssertionError, match="2 tensors were not written"),
        Writer(tmp_path / "y", entries, {}) as writer,
    ):
        for name in list(entries)[2:]:
            writer.write(name, entries[name])


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_a_merged_checkpoint_is_the_base_with_every_adapter_folded_in(tmp_path, base, layout):
    family = open_model(str(base), **WHAT).family
    expected, files = load(base), []
    for number, (kind, factor) in enumerate((("lora", 1.0), ("ia3", 1.0), ("dora", 0.5), ("lokr", -0.25))):
        adapter = adapter_on(base, kind)
        path = tmp_path / str(number)
        save_adapter(path, "peft", [adapter], family, metadata={})
        fold_adapter(expected, adapter, factor)
        files.append((path, factor))
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    lines = merge(str(base), files, out, layout, **WHAT)
    assert lines[1] == f"{tmp_path / '0'}: lora of {len(adapter.layers)} layers, factor 1"
    merged = {name.removeprefix("model.diffusion_model."): value for name, value in weights(out).items()}
    merged = family.layout().from_original(merged)
    assert merged.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
    assert not same(merged, load(base).state_dict())


def test_whole_parameters_are_merged_too(tmp_path, base):
    family, adapter = open_model(str(base), **WHAT).family, adapter_on(base)
    save_adapter(tmp_path / "x.safetensors", "comfyui", [adapter], family, metadata={})
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({**tensors, "diffusion_model.blocks.1.norm3.diff": torch.ones(24)}, tmp_path / "y.safetensors")
    merge(str(base), [(tmp_path / "y.safetensors", 0.5)], tmp_path / "out", "diffusers", **WHAT)
    network = load(base)
    fold_adapter(network, adapter, 0.5)
    network.get_parameter("blocks.1.norm2.weight").data += 0.5
    merged = weights(tmp_path / "out")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
    save_file({**tensors, "diffusion_model.blocks.1.norm3.diff": torch.ones(5)}, tmp_path / "z.safetensors")
    with pytest.raises(UserError, match=r"changes blocks\.1\.norm2\.weight \[5\], and that of the network is \[24\]"):
        merge(str(base), [(tmp_path / "z.safetensors", 1.0)], tmp_path / "never", "diffusers", **WHAT)
    assert not (tmp_path / "never").exists()


def test_a_float8_base_is_merged_in_fp32(tmp_path, base):
    """Files of plain float8 (without scales) stay of their type, or take the one asked for."""
    state = {
        name: value.to(torch.float8_e4m3fn) if value.ndim == 2 and "blocks" in name else value
        for name, value in load(base).state_dict().items()
    }
    short = tmp_path / "short"
    short.mkdir()
    save_file(state, short / "diffusion_pytorch_model.safetensors")
    (short / "config.json").write_text((base / "transformer" / "config.json").read_text())
    adapter, family = adapter_on(base), open_model(str(base), **WHAT).family
    save_adapter(tmp_path / "x.safetensors", "comfyui", [adapter], family, metadata={})
    for dtype, wanted in ((None, torch.float8_e4m3fn), ("bf16", torch.bfloat16)):
        out = tmp_path / f"out{dtype}"
        merge(str(short), [(tmp_path / "x.safetensors", 1.0)], out, "diffusers", dtype=dtype, **WHAT)
        merged, layer = weights(out), "blocks.1.attn1.to_q"
        a, b = (adapter.state[f"{layer}.lora_{x}.weight"] for x in "AB")
        exact = state[f"{layer}.weight"].float() + adapter.scale(layer) * b @ a
        assert merged[f"{layer}.weight"].dtype == wanted
        assert (merged[f"{layer}.weight"].float() != exact.to(wanted).float()).float().mean() < 0.01


def test_merging_rounds_once(tmp_path, base):
    """A bf16 base gets the fp32 sum of all adapters, rounded at the end."""
    short = tmp_path / "short"
    convert(str(base), short, "diffusers", dtype="bf16", **WHAT)
    before = weights(short)
    exact = {name: value.float() for name, value in before.items()}
    family, files = open_model(str(base), **WHAT).family, []
    for seed in range(3):
        adapter = adapter_on(base, alpha=0.02 * (seed + 1))
        save_adapter(tmp_path / f"{seed}.safetensors", "comfyui", [adapter], family, metadata={})
        files.append((tmp_path / f"{seed}.safetensors", 1.0))
        for layer in adapter.layers:
            a, b = (adapter.state[f"{layer}.lora_{x}.weight"] for x in "AB")
            exact[f"{layer}.weight"] += adapter.scale(layer) * b @ a
    merge(str(short), files, tmp_path / "out", "diffusers", **WHAT)
    merged = weights(tmp_path / "out")
    for name, value in exact.items():
        assert merged[name].dtype == before[name].dtype
        off = merged[name].float() != value.to(merged[name].dtype).float()
        assert off.float().mean() < 1e-3, name  # a sum in another order may land on the other side of a tie


# -- extracting --------------------------------------------------------------------------------------------------------


def tune(base, out, changes):
    network = load(base)
    for name, change in changes.items():
        network.get_parameter(name).data += change
    network.save_pretrained(out)
    return out


def test_the_extracted_lora_is_the_best_of_its_rank():
    """Eckart and Young: the error is the sum of the squares of the singular values left out."""
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(30, 20, generator=draw) @ torch.diag(torch.logspace(0, -2, 20))
    singular = torch.linalg.svdvals(delta.double())
    for rank in (1, 4, 20, 99):
        factors, kept = truncated(delta, rank, None)
        assert factors.rank == min(rank, 20) and factors.alpha == factors.rank
        error = (delta.double() - factors.B.double() @ factors.A.double()).square().sum()
        best = singular[rank:].square().sum()
        assert error.item() == pytest.approx(best.item(), rel=1e-4, abs=1e-9)
        assert 1 - kept == pytest.approx((best / singular.square().sum()).item(), abs=1e-6)
    for share in (0.5, 0.9, 0.999, 1.0):
        factors, kept = truncated(delta, None, share)
        shares = singular.square().cumsum(0) / singular.square().sum()
        assert kept >= share - 1e-9 and factors.rank == int((shares < share - 1e-12).sum()) + 1
    assert truncated(delta, 2, 0.999)[0].rank == 2
    image = torch.randn(6, 4, 3, 3, generator=draw)
    factors, kept = truncated(image, 6, None)
    assert factors.A.shape == (6, 4, 3, 3) and factors.B.shape == (6, 6, 1, 1) and kept == pytest.approx(1)
    torch.testing.assert_close((factors.B.flatten(1) @ factors.A.flatten(1)).reshape(image.shape), image)


def test_a_low_rank_difference_is_found_again(tmp_path, base):
    draw = torch.Generator().manual_seed(0)
    names = ["blocks.0.attn1.to_q.weight", "blocks.2.attn1.to_q.weight", "blocks.1.ffn.net.0.proj.weight"]
    parameters = dict(load(base).named_parameters())
    changes = {}
    for rank, name in enumerate(names, start=1):
        out, inner = parameters[name].shape
        changes[name] = 0.1 * torch.randn(out, rank, generator=draw) @ torch.randn(rank, inner, generator=draw)
    changes["blocks.0.norm2.weight"] = torch.full((24,), 0.01)
    tuned = tune(base, tmp_path / "tuned", changes)
    out = tmp_path / "lora.safetensors"
    lines = extract(str(base), str(tuned), out, "kohya", energy=0.9999, **WHAT)
    text = "\n".join(lines)
    assert "blocks.*.attn1.to_q" in text and "1-2" in text and "kept of all that a LoRA can hold: 100.00%" in text
    assert "not held by a LoRA: 1 tensors that differ too, for instance blocks.0.norm2.weight" in text
    assert "layers are the same in both" in text
    family = open_model(str(base), **WHAT).family
    adapter = read_adapter(out, family, empty_modules(family)).adapters["network"]
    assert {f"{layer}.weight": rank for layer, rank in adapter.ranks.items()} == dict(
        zip(names, (1, 2, 3), strict=True)
    )
    network = load(base)
    fold_adapter(network, adapter)
    for name, change in changes.items():
        if name in names:
            torch.testing.assert_close(network.get_parameter(name) - parameters[name], change, rtol=1e-3, atol=1e-5)
    pipe_input = tmp_path / "diffusers"
    extract(str(base), str(tuned), pipe_input, "diffusers", rank=2, targets=("to_q",), **WHAT)
    network = load(base)
    network.load_lora_adapter(pipe_input, use_safetensors=True)
    assert {name for name, _ in network.named_modules() if name.endswith("lora_A")} == {
        f"blocks.{i}.attn1.to_q.lora_A" for i in (0, 2)
    }


def test_what_cannot_be_extracted_is_told(tmp_path, base):
    out = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"Give --rank N, --energy SHARE"):
        extract(str(base), str(base), out, "kohya", **WHAT)
    with pytest.raises(UserError, match=r"do not differ in any layer"):
        extract(str(base), str(base), out, "kohya", rank=2, **WHAT)
    with pytest.raises(UserError, match=r"--target: 'to_z' matches no layer"):
        extract(str(base), str(base), out, "kohya", rank=2, targets=("to_z",), **WHAT)


# -- the command line --------------------------------------------------------------------------------------------------


def kinema(*arguments):
    done = subprocess.run([sys.executable, "-m", "kinema", *arguments], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_three_commands_from_a_shell(tmp_path, base):
    family, adapter = open_model(str(base), **WHAT).family, adapter_on(base)
    lora = tmp_path / "lora.safetensors"
    save_adapter(lora, "comfyui", [adapter], family, metadata={})
    place = ("--family", "wan", "--variant", "t2v-1.3b")
    merged, again = tmp_path / "merged", tmp_path / "again.safetensors"
    code, out, err = kinema("merge", str(base), str(merged), "--adapter", f"{lora}:0.5", *place)
    assert code == 0 and "factor 0.5" in out and f"wrote {merged} (diffusers)" in out, err
    code, out, err = kinema("extract", str(base), str(merged), str(again), "--rank", "4", *place)
    assert code == 0 and "kept of all that a LoRA can hold: 100.00%" in out, err
    found = read_adapter(again, family, empty_modules(family)).adapters["network"]
    one, two = load(base), load(base)
    fold_adapter(one, adapter, 0.5)
    fold_adapter(two, found)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    code, out, err = kinema("convert", str(lora), str(merged), "--to", "kohya", "--base", str(base), *place)
    assert code == 2 and "error:" in err and "ends in .safetensors" in err and "Traceback" not in err


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
import torch, diffusers, peft.tuners.lora, safetensors.torch
from kinema.adapters.convert import convert
from kinema.adapters.extract import extract
from kinema.adapters.merge import merge
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

root, what = Path(sys.argv[1]), {"family": "wan", "variant": "t2v-1.3b"}
from kinema.adapters.model import open_model
open_model(str(root / "base"), **what)
peak, done = anonymous(), threading.Event()
before = peak
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
match sys.argv[2]:
    case "convert":
        convert(str(root / "base"), root / "out.safetensors", "comfyui", dtype="bf16", **what)
    case "merge":
        merge(str(root / "base"), [(root / "lora.safetensors", 1.0)], root / "out", "diffusers", **what)
    case "extract":
        extract(str(root / "base"), str(root / "tuned"), root / "x.safetensors", "kohya", rank=2, **what)
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("command", ["convert", "merge", "extract"])
def test_a_block_at_a_time_is_in_memory(tmp_path, command):
    """A network of 30 blocks: what a command allocates stays under a fifth of its size."""
    from diffusers import WanTransformer3DModel

    shape = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "num_layers": 30, "text_dim": 64}
    torch.manual_seed(0)
    network = WanTransformer3DModel(**shape).requires_grad_(False)
    network.save_pretrained(tmp_path / "base" / "transformer")
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    assert size > 400e6
    if command == "merge":
        add_adapter(network, KINDS["lora"], ("to_q", "ffn.*"), seed=0)
        family = open_model(str(tmp_path / "base" / "transformer"), **WHAT).family
        save_adapter(tmp_path / "lora.safetensors", "comfyui", [adapter_of(network)], family, metadata={})
    elif command == "extract":
        for block in network.blocks:
            block.attn1.to_q.weight += 0.01 * torch.randn(512, 1) @ torch.randn(1, 512)
        network.save_pretrained(tmp_path / "tuned" / "transformer")
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "tuned").mkdir(exist_ok=True)
    (tmp_path / "tuned" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), command], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    allocated = int(done.stdout.split()[-1])
    assert allocated < size / 5, f"{allocated / 1e6:.0f} MB for a network of {size / 1e6:.0f} MB"
