import json

import pytest
import torch
from safetensors.torch import load_file

from kinema.adapters.inject import adapter_state, add_adapter
from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.errors import UserError
from kinema.families.registry import family_class, open_family
from kinema.parallel.mesh import World
from kinema.runs.exports import list_exports, read_export
from kinema.training import export
from kinema.training.export import export_weights

ALONE = World.alone()
FAMILY = "wan"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return family_class(FAMILY).tiny(tmp_path_factory.mktemp("base") / "tiny", "t2v-1.3b")


def make_config(base, root, **tables):
    return Config.model_validate(
        {
            "run": {"dir": root / "some-run"},
            "model": {"family": FAMILY, "path": str(base)},
            "data": {"sources": [{"path": "clips"}]},
            "training": {"steps": 4},
            "export": {"dtype": "fp32"},
            **tables,
        }
    )


def load(model):
    return open_family(model).load("network", "cpu", torch.float32)


def trained(config):
    """The run's network after what stands for training."""
    network = load(config.model)
    draw = torch.Generator().manual_seed(11)
    if config.adapter is not None:
        add_adapter(network, config.adapter, open_family(config.model).adapter_targets(), seed=0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if config.adapter is None or ".lora_B." in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return network


def run(network):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(1, 16, 2, 4, 4, generator=draw)
    text = torch.randn(1, 6, network.config.text_dim, generator=draw)
    with torch.no_grad():
        return network.eval()(x, torch.tensor([400.0]), text, return_dict=False)[0]


def same(one, two):
    """Equal weights to the bit, and outputs: those to rounding, since it depends on how tensors lie in memory."""
    theirs = two.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
    torch.testing.assert_close(run(one), run(two), rtol=1e-5, atol=1e-5)
    return True


def write(config, network, step=1000):
    return export_weights(
        config.run.dir / "exports", step, open_family(config.model), {"network": network}, config, ALONE
    )


def test_a_whole_network_is_read_back_by_diffusers_and_by_us(tmp_path, base):
    from diffusers import WanTransformer3DModel

    config = make_config(base, tmp_path)
    network = trained(config)
    assert (run(network) - run(load(config.model))).abs().max() > 1e-2
    path = write(config, network)
    assert path == tmp_path / "some-run" / "exports" / "step-00001000"
    theirs = WanTransformer3DModel.from_pretrained(path / "diffusers", subfolder="transformer")
    assert same(theirs, network)
    assert json.loads((path / "diffusers" / "transformer" / "config.json").read_text())["_class_name"] == (
        "WanTransformer3DModel"
    )
    single = path / "comfyui" / "some-run-step1000.safetensors"
    theirs = WanTransformer3DModel.from_single_file(single, config=str(base), subfolder="transformer")
    assert same(theirs, network)
    found = read_export(path)
    assert found is not None and not found.adapters and found.step == 1000
    assert same(load(found.model), network)
    ours = config.model.model_copy(update={"network": config.model.network.model_copy(update={"path": str(single)})})
    assert same(load(ours), network)


def test_comfyui_recognises_the_single_file(tmp_path, base):
    """Its loader looks for `model.diffusion_model.` (or no prefix), then for these tensors of the original layout."""
    config = make_config(base, tmp_path)
    path = write(config, trained(config), step=7)
    tensors = load_file(path / "comfyui" / "some-run-step7.safetensors")
    prefix = "model.diffusion_model."
    assert all(name.startswith(prefix) for name in tensors)
    names = {name.removeprefix(prefix) for name in tensors}
    assert {"head.modulation", "patch_embedding.weight", "blocks.0.ffn.0.weight", "blocks.2.modulation"} <= names


def test_the_other_parts_are_found_from_an_export(tmp_path, base, monkeypatch):
    """From any working directory, though the run's paths were relative."""
    monkeypatch.chdir(base.parent)
    config = make_config(base.name, tmp_path)
    path = write(config, trained(config))
    monkeypatch.chdir(tmp_path)
    model = read_export(path).model
    ours, original = open_family(model), open_family(make_config(base, tmp_path).model)
    assert model.variant == "t2v-1.3b"
    state = ours.load("text_encoder", "cpu", torch.float32).state_dict()
    expected = original.load("text_encoder", "cpu", torch.float32).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())
    assert read_export(tmp_path / "some-run").model == model
    assert read_export(base) is None


def test_random_weights_are_not_asked_for_again(tmp_path, base):
    config = make_config(base, tmp_path, model={"family": FAMILY, "path": str(base), "random_weights": True})
    network = trained(config)
    found = read_export(write(config, network))
    assert found.model.random_weights is False
    assert same(load(found.model), network)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_an_adapter_is_read_back_by_diffusers_and_by_us(tmp_path, base, alpha):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    from kinema.adapters.files import fold_file, read_adapter
    from kinema.adapters.targets import adaptable_modules

    config = make_config(base, tmp_path, adapter={"rank": 4, "alpha": alpha})
    network = trained(config)
    expected = run(network)
    path = write(config, network)
    for source in (path / "diffusers", path / "comfyui"):
        none = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
        pipe = WanPipeline(transformer=load(config.model), scheduler=FlowMatchEulerDiscreteScheduler(), **none)
        pipe.load_lora_weights(source)
        torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-5, atol=1e-6)
    found = read_export(path)
    for file in (found.adapters["network"], path, path / "diffusers", path / "comfyui"):
        ours = load(found.model)
        family = open_family(found.model)
        adapter = read_adapter(file, family, {"network": adaptable_modules(ours)})
        fold_file(file, family, {"network": ours})
        torch.testing.assert_close(run(ours), expected, rtol=1e-5, atol=1e-6)
    assert adapter.metadata["kinema.step"] == "1000"
    assert adapter.metadata["kinema.base_model"] == "tiny"


def test_dtype_and_layouts_are_those_asked_for(tmp_path, base):
    config = make_config(base, tmp_path, export={"dtype": "bf16", "layouts": ["comfyui"]})
    network = trained(config)
    network.register_buffer("counter", torch.tensor([3]))
    family = open_family(config.model)
    family.to_original = lambda state, part: dict(state)
    path = export_weights(tmp_path / "exports", 1, family, {"network": network}, config, ALONE)
    assert sorted(file.name for file in path.iterdir()) == ["comfyui", "config.toml", "kinema.json"]
    tensors = load_file(path / "comfyui" / "some-run-step1.safetensors")
    kinds = {name.removeprefix("model.diffusion_model."): value.dtype for name, value in tensors.items()}
    assert kinds.pop("counter") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}, "the network that trains was changed"
    config = make_config(base, tmp_path, export={"dtype": "fp16", "layouts": ["diffusers"]}, adapter={"rank": 2})
    path = write(config, trained(config), step=2)
    assert sorted(file.name for file in path.iterdir()) == ["config.toml", "diffusers", "kinema.json"]
    tensors = load_file(path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_large_networks_are_sharded(tmp_path, base, monkeypatch):
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    config = make_config(base, tmp_path)
    network = trained(config)
    path = write(config, network)
    folder = path / "diffusers" / "transformer"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= 3 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 70_000 for file in files)
    theirs = WanTransformer3DModel.from_pretrained(path / "diffusers", subfolder="transformer")
    assert same(theirs, network)
    assert same(load(read_export(path).model), network)


def test_the_configuration_comes_with_it(tmp_path, base):
    config = make_config(base, tmp_path, adapter={"rank": 2})
    path = write(config, trained(config))
    assert load_config(path / "config.toml") == config


def test_old_exports_rotate_and_the_same_step_is_replaced(tmp_path, base):
    config = make_config(base, tmp_path, adapter={"rank": 2}, export={"keep": 2, "dtype": "fp32"})
    network = trained(config)
    root = config.run.dir / "exports"
    for step in (5, 10, 100):
        write(config, network, step)
    assert [path.name for path in list_exports(root)] == ["step-00000010", "step-00000100"]
    with torch.no_grad():
        for value in adapter_state(network).values():
            value.mul_(2)
    (root / "writing-step-00000007").mkdir()  # what a killed process leaves
    path = write(config, network, 100)
    assert sorted(entry.name for entry in root.iterdir()) == ["step-00000010", "step-00000100"]
    name = "blocks.0.attn1.to_q.lora_A.weight"
    tensors = load_file(path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert torch.equal(tensors[f"transformer.{name}"], adapter_state(network)[name])
    config = make_config(base, tmp_path, adapter={"rank": 2})
    for step in (200, 300):
        write(config, network, step)
    assert len(list_exports(root)) == 4, "without `keep` all stay"


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path, base, monkeypatch):
    config = make_config(base, tmp_path)
    network = trained(config)
    write(config, network, 1)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.Writer, "write", refuse)
    with pytest.raises(UserError, match=r"cannot write the export .*step-00000002: No space left on device"):
        write(config, network, 2)
    assert [entry.name for entry in (config.run.dir / "exports").iterdir()] == ["step-00000001"]


def test_a_disk_that_is_too_full_is_told_before_a_byte_is_written(tmp_path, base, monkeypatch):
    from kinema.runs import checkpoint_files

    config = make_config(base, tmp_path)
    network = trained(config)
    need = 4 * 2 * sum(parameter.numel() for parameter in network.parameters())  # fp32, two layouts
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda _: need - 1)
    monkeypatch.setattr(export, "Writer", None)
    with pytest.raises(UserError, match=r"step-00000001: it takes .* and .* are free\. Free some space"):
        write(config, network, 1)
    assert list((config.run.dir / "exports").iterdir()) == []


def sharded_export(rank, port, base, root):
    """One of two ranks: shard the network, export it and its adapter."""
    import os

    from kinema.parallel.data import shard
    from kinema.parallel.mesh import start, stop

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    configs = [
        make_config(base, root / name, adapter=adapter, parallel={"dp_shard": 2})
        for name, adapter in (("whole", None), ("adapter", {"rank": 4}))
    ]
    world = start(configs[0].parallel, "cpu")
    for config in configs:
        network, family = trained(config), open_family(config.model)
        shard(network, family.blocks(network), world)
        export_weights(config.run.dir / "exports", 1, family, {"network": network}, config, world)
    world.barrier()
    stop()


@pytest.mark.timeout(600)  # two processes that import everything anew, on a machine that may be busy
@pytest.mark.slow
def test_sharded_weights_are_gathered(tmp_path, base):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded_export, (port, base, tmp_path), nprocs=2)
    for name, adapter in (("whole", None), ("adapter", {"rank": 4})):
        ranks, alone = tmp_path / name, tmp_path / f"{name}-alone"
        config = make_config(base, alone, adapter=adapter)
        write(config, trained(config), step=1)
        files = [
            file.relative_to(alone) for file in sorted(alone.rglob("*")) if file.suffix in (".safetensors", ".json")
        ]
        assert len(files) == (4 if adapter is None else 3)
        for file in files:
            if file.suffix == ".json":
                assert (ranks / file).read_text() == (alone / file).read_text()
                continue
            ours, theirs = load_file(ranks / file), load_file(alone / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
