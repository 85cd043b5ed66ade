"""Which export or checkpoint of a run another one starts from, and that it stays that one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import BASE, configured, network_of, tensors_of

from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.errors import UserError
from kinema.families.from_runs import read_checkpoint, settled
from kinema.runs.checkpoint_list import list_checkpoints
from kinema.runs.exports import list_exports
from kinema.runs.newest import newest
from kinema.sampling.weights import find_weights
from kinema.training.resume import ResumeOptions
from kinema.training.train import train


def copied(first: Path, place: Path, *without: str) -> Path:
    return shutil.copytree(first / "first", place, ignore=shutil.ignore_patterns(*without))


def add(export: Path, amount: float) -> None:
    """Other weights in the export of a network."""
    file = next(export.rglob("diffusion*.safetensors"))
    save_file({name: value + amount for name, value in load_file(file).items()}, file)


def sampled(run: Path, ema: bool = True) -> torch.nn.Module:
    """The network that `kinema sample --run` draws with."""
    from kinema.sampling.weights import load_parts

    weights = find_weights(run, None, family=None, variant=None, adapters=(), ema=ema)
    return load_parts(weights, "cpu", torch.float32)["network"]


def test_of_one_step_what_trains_starts_from_weights_that_are_not_rounded(first: Path, tmp_path: Path) -> None:
    run = copied(first, tmp_path / "run")
    add(list_exports(run / "exports")[-1], 1.0)  # as rounding to bf16 does, only more
    exact = tensors_of(list_checkpoints(run / "checkpoints")[-1].path)["ema.network.img_in.weight"]
    config = configured(first, "x", model={"network": {"path": str(run)}})
    assert torch.equal(network_of(first, network={"path": str(run)}).img_in.weight, exact)
    assert settled(config.model, ("network",)).network.path == f"{run}/checkpoints/step-00000002"
    assert settled(config.model, ()).network.path == f"{run}/exports/step-00000002", "an adapter's base"
    assert torch.equal(sampled(run).img_in.weight, exact + 1), "samples show what is exported"


def test_checking_reads_no_weights(first: Path, tmp_path: Path) -> None:
    run = copied(first, tmp_path / "run", "exports", "rank-*.safetensors")
    family = settled(configured(first, "x", model={"network": {"path": str(run)}}).model, ("network",))
    network = network_of(first, "meta", network={"path": family.network.path})
    assert {value.device.type for value in network.parameters()} == {"meta"}
    with pytest.raises(UserError, match=r"checkpoint .* is damaged: .*rank-00000\.safetensors"):
        network_of(first, network={"path": str(run)})


def test_weights_that_one_process_wrote_are_mapped(first: Path) -> None:
    """Nothing of them is in memory twice; those of several processes are put together."""
    checkpoint = list_checkpoints(first / "first" / "checkpoints")[-1].path
    tensors = read_checkpoint(checkpoint, "network")
    whole = tensors_of(checkpoint)
    assert len(tensors) > 20 and all(
        torch.equal(value, whole[f"ema.network.{name}"]) for name, value in tensors.items()
    )
    with open("/proc/self/maps") as maps:
        assert f"{checkpoint}/rank-00000.safetensors" in maps.read()


def test_a_run_that_goes_another_way_leaves_its_later_exports(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, saving = {"every_steps": 1, "dtype": "fp32"}, {"every_steps": 1, "keep": 9}

    def run(steps: int, **options: Any) -> Path:
        training = {**BASE["training"], "steps": steps}
        config = configured(first, str(tmp_path / "run"), training=training, export=export, checkpoint=saving)
        return train(config, ResumeOptions(**options))

    directory = run(4)
    names = [path.name for path in list_exports(directory / "exports")]
    assert names == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    shutil.rmtree(list_checkpoints(directory / "checkpoints")[-1].path)
    run(4)  # as after a kill between the export and the checkpoint: it comes to the same weights
    assert not (directory / "previous-1").exists() and len(list_exports(directory / "exports")) == 4
    capsys.readouterr()
    run(2, resume_from=directory / "checkpoints" / "step-00000001")
    assert "Exports of later steps were moved to" in capsys.readouterr().err
    assert [path.name for path in list_exports(directory / "exports")] == names[:2]
    assert [path.name for path in list_exports(directory / "previous-1" / "exports")] == names[1:]
    assert newest(directory) == directory / "exports" / names[1]


def test_a_stage_needs_only_the_stage_before(first: Path, tmp_path: Path) -> None:
    """From a checkpoint, when what that run began with is gone: for the next stage, and to draw with."""
    one = copied(first, tmp_path / "one")
    model = {"network": {"path": str(one)}, "cond_embed": True}
    two = train(configured(first, str(tmp_path / "two"), model=model, training={**BASE["training"], "steps": 1}))
    assert load_config(two / "config.toml").model.network.path == f"{one}/checkpoints/step-00000002"
    shutil.rmtree(one)
    shutil.rmtree(two / "exports")
    checkpoint = list_checkpoints(two / "checkpoints")[-1].path
    stored = tensors_of(checkpoint)
    three = network_of(first, network={"path": str(two)})
    assert three.config.cond_embed is True
    assert torch.equal(three.cond_in.weight, stored["ema.network.cond_in.weight"])
    assert torch.equal(sampled(two).img_in.weight, stored["ema.network.img_in.weight"])
    assert torch.equal(sampled(two, ema=False).img_in.weight, stored["networks.network.img_in.weight"])

    meta = json.loads((checkpoint / "meta.json").read_text())
    del meta["meta"]["trained"]  # as earlier versions wrote it
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=rf"{checkpoint} does not say the configuration .* has to be there: .*one"):
        network_of(first, network={"path": str(two)})


def adapter_on(first: Path, tmp_path: Path, base: str) -> Config:
    adapter = {"rank": 2, "targets": ["img_attn.qkv", "linear1"], "type": "lora"} | {"targets": ["q_proj"]}
    settings = {**BASE["training"], "steps": 2, "ema": None}
    model = {"network": {"path": base}}
    return configured(
        first, str(tmp_path / "adapter"), model=model, adapter=adapter, training=settings,
        checkpoint={"every_steps": 1, "keep": 9},
    )  # fmt: skip


def test_an_adapter_stays_with_its_base_while_that_trains_on(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copied(first, tmp_path / "base")
    own = base / "exports" / "step-00000002"
    run = train(adapter_on(first, tmp_path, str(base)))
    assert f"model.network.path: {base} stands for {own}" in capsys.readouterr().err
    assert load_config(run / "config.toml").model.network.path == str(own)
    described = json.loads((list_exports(run / "exports")[-1] / "kinema.json").read_text())
    assert described["model"]["network"]["path"] == str(own.resolve())
    last = list_checkpoints(run / "checkpoints")[-1].path
    unbroken = tensors_of(last)

    add(Path(shutil.copytree(own, base / "exports" / "step-00000009")), 0.5)
    shutil.rmtree(last)
    shutil.rmtree(run / "exports")
    train(adapter_on(first, tmp_path, str(base)))
    resumed = tensors_of(list_checkpoints(run / "checkpoints")[-1].path)
    assert [name for name in unbroken if not torch.equal(resumed[name], unbroken[name])] == []
    assert "changed:" not in capsys.readouterr().err

    own.rename(tmp_path / "moved")
    message = rf"model\.network\.path: {own} is no longer there; {base} holds exports/step-00000009 now"
    with pytest.raises(UserError, match=message):
        train(adapter_on(first, tmp_path, str(base)))
    shutil.rmtree(run / "exports")
    with pytest.raises(UserError, match=message):
        sampled(run)


def test_a_whole_network_resumes_though_its_first_weights_are_gone(first: Path, tmp_path: Path) -> None:
    base = copied(first, tmp_path / "base")

    def start(steps: int) -> Path:
        training = {**BASE["training"], "steps": steps}
        return train(
            configured(first, str(tmp_path / "run"), model={"network": {"path": str(base)}}, training=training)
        )

    start(1)
    shutil.rmtree(base / "checkpoints" / "step-00000002")
    run = start(2)
    assert [one.step for one in list_checkpoints(run / "checkpoints")] == [1, 2]


def test_a_configuration_with_a_run_is_checked_without_torch(first: Path, tmp_path: Path) -> None:
    run = copied(first, tmp_path / "run", "exports")
    (tmp_path / "c.toml").write_text(
        f'[model]\nfamily = "open_sora"\npath = "{first}/model"\nnetwork = {{ path = "{run}" }}\n'
        f'[[data.sources]]\npath = "{first}/clips"\n[data.buckets]\nsizes = [[32, 32]]\nframes = [9]\n'
        "[training]\nsteps = 1\n"
    )
    program = (
        "import sys; from kinema.config.load import load_config; from kinema.families.registry import open_family\n"
        f"config = load_config({str(tmp_path / 'c.toml')!r}); open_family(config.model).validate(config)\n"
        "print(*{'torch', 'diffusers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr
