"""`kinema sample`: where weights come from, what is written, what is refused before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinema.config.schema import Config, ModelConfig
from kinema.errors import UserError
from kinema.families.registry import family_class, open_family
from kinema.parallel.mesh import World
from kinema.sampling.command import sample
from kinema.sampling.request import distinct_slugs, slug
from kinema.sampling.weights import adapter_option, find_weights, load_parts
from kinema.sampling.writing import read_metadata
from kinema.training.export import export_weights
from kinema.training.rundir import write_description

ALONE = World.alone()
SMALL: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("base"), "t2v-1.3b")


@pytest.fixture(scope="module")
def from_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("i2v"), "i2v-14b-480p")


def pixels(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


# -- what is written -------------------------------------------------------------------------------------------------


def test_files_index_and_metadata(base: Path, tmp_path: Path) -> None:
    prompts = ["A red ball, moving left!", "größe", "A red ball, moving left!"]
    paths = sample(prompts, model=str(base), out=tmp_path, num_samples=2, negative="box", guidance=3.0, **SMALL)
    names = [path.name for path in paths]
    assert names[:2] == ["a-red-ball-moving-left-0.mp4", "a-red-ball-moving-left-1.mp4"]
    beside = [f"{name}.json" for name in names]
    assert len(names) == 4 and sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, *beside, "index.jsonl"])
    assert [pixels(path).shape for path in paths] == [(5, 32, 48, 3)] * 4
    index = lines(tmp_path)
    assert [(one["file"], one["prompt"], one["seed"]) for one in index] == [
        (name, prompt, seed)
        for name, (prompt, seed) in zip(names, [(p, s) for p in prompts[:2] for s in (0, 1)], strict=True)
    ]
    assert read_metadata(paths[1]) == {key: value for key, value in index[1].items() if key != "file"}
    facts = read_metadata(paths[1])
    assert json.loads((tmp_path / beside[1]).read_text()) == facts
    assert len(facts.pop("weights_identity")) == 32 and facts.pop("device_name") and facts.pop("threads") >= 1
    assert facts.pop("versions") == {name: version(name) for name in ("kinema", "torch", "diffusers", "transformers")}
    # four of these share a call, whose size changes the last digits
    others = [{"seed": 0}, {"prompt": prompts[1], "seed": 0}, {"prompt": prompts[1]}]
    assert facts == {
        "prompt": prompts[0], "height": 32, "width": 48, "frames": 5, "steps": 2, "guidance": 3.0, "seed": 1,
        "image_guidance": None, "negative": "box", "images": [], "image_contents": [], "shift": None,
        "tiling": "auto", "tile_size": None, "tile_frames": None, "crf": 10,
        "text_length": 512, "fps": 16.0, "weights": base.name, "adapters": [], "adapter_contents": [],
        "weights_from": {"model": str(base), "family": None, "variant": None},
        "dtype": "float32", "device": "cpu", "batch": {"place": 1, "others": others},
    }  # fmt: skip
    assert not np.array_equal(pixels(paths[0]), pixels(paths[1]))

    before = [path.read_bytes() for path in paths]
    again = {"model": str(base), "out": tmp_path, "negative": "box", "guidance": 3.0, **SMALL}
    sample(prompts, num_samples=2, again=True, **again)
    assert [path.read_bytes() for path in paths] == before, "the same settings give the same bytes"
    sample([prompts[0]], **{**again, "again": True})
    assert [one["file"] for one in lines(tmp_path)] == [*names[1:], names[0]], "one line a file"


def test_one_frame_is_a_png(base: Path, tmp_path: Path) -> None:
    from PIL import Image

    (path,) = sample(["green"], model=str(base), out=tmp_path, **{**SMALL, "frames": 1}, seed=3)
    assert path.name == "green-3.png"
    assert Image.open(path).size == (48, 32)
    assert read_metadata(path)["frames"] == 1


def test_slugs_are_distinct() -> None:
    assert slug("A red ball, moving left!") == "a-red-ball-moving-left"
    assert slug("crème brûlée") == "creme-brulee"
    assert slug("") == slug("?!") == "empty"
    assert slug("雪") != slug("雨")
    long = "word " * 40
    assert len(slug(long)) <= 67 and slug(long) != slug(long + "x")
    names = distinct_slugs(["a ball", "A ball", "a ball", "a  ball."])
    assert names["a ball"] == "a-ball" and len(names) == 3 == len(set(names.values()))


# -- where weights come from -----------------------------------------------------------------------------------------


def make_config(base: Path, root: Path, **tables: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(root / "run")},
            "model": {"family": "wan", "path": str(base)},
            "data": {"sources": [{"path": "clips"}], "buckets": {"sizes": [[32, 48]], "frames": [1, 5]}},
            "training": {"steps": 4, "ema": {"decay": 0.9}},
            "preview": {"steps": 2, "guidance": 2.0, "fps": 8, "negative_prompt": "box"},
            "export": {"dtype": "fp32"},
            **tables,
        }
    )


def make_run(config: Config) -> tuple[Any, Any]:
    """A run directory with a checkpoint at step 2, and weights at step 2: (network, its averages swapped in)."""
    from kinema.adapters.inject import add_adapter
    from kinema.optim.ema import Ema
    from kinema.runs.trained import named_trainables
    from kinema.training.checkpoint import Checkpointer
    from kinema.training.state import training_state

    family = open_family(config.model)
    network = family.load("network", "cpu", torch.float32).requires_grad_(True)
    draw = torch.Generator().manual_seed(1)
    if config.adapter is not None:
        add_adapter(network, config.adapter, family.adapter_targets(), 0)
    parameters = named_trainables({"network": network})
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        ema = Ema(parameters.items(), 0.9)
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    write_description(config.run.dir, config, {})
    checkpointer = Checkpointer(config.run.dir / "checkpoints", 2, False, ALONE)
    checkpointer.save(2, training_state({"network": network}, (), ema), {"config": config.model_dump(mode="json")})
    checkpointer.close()
    return network, ema


def merged(network: Any) -> dict[str, torch.Tensor]:
    """The network's weights with its adapter folded in."""
    import copy

    from kinema.adapters.inject import merge_adapter

    network = copy.deepcopy(network)
    merge_adapter(network)
    return network.state_dict()


def sampled_network(**options: Any) -> dict[str, torch.Tensor]:
    """The weights that the command would sample with these options."""
    arguments: dict[str, Any] = {
        "run": None,
        "model": None,
        "family": None,
        "variant": None,
        "adapters": (),
        "ema": None,
    }
    arguments.update(options)
    weights = find_weights(arguments.pop("run"), arguments.pop("model"), **arguments)
    return load_parts(weights, "cpu", torch.float32)["network"].state_dict()


def agree(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one) <= tolerance


@pytest.mark.parametrize("meta", ["{", '{"format": 99, "sequence": 1}'])
def test_a_checkpoint_that_cannot_be_read_is_named(base: Path, tmp_path: Path, meta: str) -> None:
    config = make_config(base, tmp_path)
    write_description(config.run.dir, config, {})
    place = config.run.dir / "checkpoints" / "step-00000002"
    place.mkdir(parents=True)
    (place / "meta.json").write_text(meta)
    with pytest.raises(UserError, match="step-00000002"):
        find_weights(config.run.dir, None, family=None, variant=None, adapters=(), ema=None)


@pytest.mark.parametrize("adapter", [None, {"rank": 4, "alpha": 8.0}])
def test_a_run_is_sampled_from_its_newest_weights(base: Path, tmp_path: Path, adapter: dict[str, Any] | None) -> None:
    config = make_config(base, tmp_path, **({"adapter": adapter} if adapter else {}))
    network, ema = make_run(config)
    run = config.run.dir
    raw = merged(network)
    with ema.swapped():
        averaged = merged(network)
    assert not agree(raw, averaged, 1e-3)
    assert agree(sampled_network(run=run), averaged, 1e-6), "averaged weights by default"
    assert agree(sampled_network(run=run, ema=False), raw, 1e-6)

    def export(step: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for parameter in ema.averages.values():
                parameter.mul_(1.1)
        with ema.swapped():
            export_weights(run / "exports", step, open_family(config.model), {"network": network}, config, ALONE)
            return merged(network)

    export(1)
    assert agree(sampled_network(run=run), averaged, 1e-6), "the checkpoint is newer"
    newer = export(3)
    assert agree(sampled_network(run=run), newer, 1e-5), "the export is newer"
    assert agree(sampled_network(run=run, ema=False), raw, 1e-6), "exports are averaged"
    place = run / "exports" / "step-00000003"
    for path in (place, place / "diffusers"):
        assert agree(sampled_network(model=str(path)), newer, 1e-5)

    (path,) = sample(["green"], run=run)  # the run's own sizes
    assert path == run / "samples" / "green-0.mp4"
    facts = read_metadata(path)
    assert (facts["height"], facts["width"], facts["frames"], facts["fps"]) == (32, 48, 5, 8.0)
    assert (facts["steps"], facts["guidance"], facts["negative"]) == (2, 2.0, "box")
    assert facts["weights"] == "run at step 3"


def test_adapters_are_merged_with_their_scales(base: Path, tmp_path: Path) -> None:
    config = make_config(base, tmp_path, adapter={"rank": 4, "alpha": 8.0})
    network, _ = make_run(config)
    folder = export_weights(tmp_path / "exports", 5, open_family(config.model), {"network": network}, config, ALONE)
    plain, full = sampled_network(model=str(base)), merged(network)
    for file in (folder / "diffusers", *sorted((folder / "comfyui").iterdir())):
        half = sampled_network(model=str(base), adapters=(f"{file}:0.5",))
        expected = {name: (plain[name] + full[name]) / 2 for name in plain}
        assert agree(half, expected, 1e-5) and not agree(half, plain, 1e-3)
        twice = sampled_network(model=str(base), adapters=(f"{file}:0.5", file, f"{file}:-0.5"))
        assert agree(twice, full, 1e-5)
    assert adapter_option(f"{folder}:0.25") == (folder, 0.25)
    assert adapter_option(str(folder)) == (folder, 1.0)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_made_is_refused(base: Path, from_image: Path, tmp_path: Path) -> None:
    model = {"model": str(base), "out": tmp_path / "out"}
    picture = tmp_path / "first.png"
    from PIL import Image

    Image.new("RGB", (48, 32)).save(picture)
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:20])
    (tmp_path / "network.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    refused: list[tuple[str, dict[str, Any]]] = [
        (r"--height 100.*multiples of 16; nearest: 96 or 112", {**model, "height": 100}),
        (r"--width 7.*nearest: 16", {**model, "width": 7}),
        (r"--frames 16.*4 k \+ 1 frames; nearest: 13 or 17", {**model, "frames": 16}),
        (r"makes videos from text alone", {**model, "images": [picture]}),
        (r"makes a video from its first frame: give the picture with --image", {"model": str(from_image)}),
        (r"broken\.png", {"model": str(from_image), "images": [tmp_path / "broken.png"]}),
        (r"gone\.png cannot be read", {"model": str(from_image), "images": [tmp_path / "gone.png"]}),
        (r"either --run .* or --model", {}),
        (r"either --run .* or --model", {**model, "run": tmp_path}),
        (r"--model .*nowhere: there is no such file", {"model": str(tmp_path / "nowhere")}),
        (r"--run .*nowhere: there is no such directory", {"run": tmp_path / "nowhere"}),
        (r"no run directory", {"run": tmp_path}),
        (r"no model_index\.json", {"model": str(tmp_path / "empty")}),
        (r"single file: say what it is with --family", {"model": str(tmp_path / "network.safetensors")}),
        (r"--variant \(.*t2v-14b", {"model": str(tmp_path / "network.safetensors"), "family": "wan"}),
        (r"no family 'wann'; did you mean 'wan'", {**model, "family": "wann"}),
        (r"--adapter .*lora\.st: there is no such", {**model, "adapter": [tmp_path / "lora.st"]}),
        (r"--dtype bf15.*'bf16'", {**model, "dtype": "bf15"}),
        (r"--ema and --no-ema choose among the weights of a --run", {**model, "ema": False}),
        (r"--device warp", {**model, "device": "warp"}),
    ]
    for message, options in refused:
        with pytest.raises(UserError, match=message):
            sample(["a ball"], **options)
    with pytest.raises(UserError, match="at least one prompt"):
        sample([], model=str(base))
    assert not list(tmp_path.glob("out/*.mp4"))


def test_a_run_without_weights_is_refused(base: Path, tmp_path: Path) -> None:
    config = make_config(base, tmp_path)
    write_description(config.run.dir, config, {})
    with pytest.raises(UserError, match="neither an export nor a checkpoint"):
        sample(["a ball"], run=config.run.dir)
    with pytest.raises(UserError, match="is a run directory: use --run"):
        sample(["a ball"], model=str(config.run.dir))
    with pytest.raises(UserError, match=r"no-ema.*has no checkpoint"):
        sample(["a ball"], run=config.run.dir, ema=False)


def test_a_wrong_size_is_told_without_importing_torch(base: Path) -> None:
    script = (
        "import sys, time; start = time.monotonic()\n"
        "from kinema.errors import UserError\n"
        "from kinema.sampling.command import sample\n"
        f"try: sample(['x'], model={str(base)!r}, height=100)\n"
        "except UserError: pass\n"
        "print(time.monotonic() - start, *{'torch', 'diffusers', 'transformers', 'av'} & set(sys.modules))\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert output[1:] == []


def test_the_single_file_takes_the_rest_from_the_hub(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.head.modulation": torch.zeros(1)}, tmp_path / "network.safetensors")
    weights = find_weights(
        None, str(tmp_path / "network.safetensors"), family="wan", variant="t2v-1.3b", adapters=(), ema=None
    )
    config: ModelConfig = weights.family.config
    assert config.path == str(tmp_path / "network.safetensors")
    hub = weights.family.variant.hub
    assert (config.autoencoder.path, config.text_encoder.path, config.network.path) == (hub, hub, None)
