"""``kinema download`` as a user meets it: a process of its own, the hub's own client, a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import COMMIT, OLDER, HubServer, serve

from kinema.config.schema import ModelConfig
from kinema.families.download import part_files
from kinema.families.loading import find
from kinema.families.parts import T5_TOKENIZER, T5_XXL
from kinema.families.registry import family_class, open_family
from kinema.families.sdxl import PARTS as SDXL_PARTS
from kinema.families.wan import Wan

HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(t2v: Path) -> HubServer:
    return HubServer({HUB: t2v})


@pytest.fixture
def address(hub: HubServer) -> Iterator[str]:
    with serve(hub) as address:
        yield address


def kinema(address: str, cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": address, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}
    command = [sys.executable, "-m", "kinema", "download", "wan", "--variant", "t2v-1.3b", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=120
    )


def files_of(directory: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return {name: data for name, data in found.items() if name != "kinema-download.json"}


def test_a_dry_run_says_sizes_and_fetches_nothing(hub: HubServer, address: str, tmp_path: Path, t2v: Path) -> None:
    done = kinema(address, tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    network = (t2v / NETWORK).stat().st_size
    network += sum((t2v / name).stat().st_size for name in ("model_index.json", "transformer/config.json"))
    assert f"{network / 1e3:.1f} kB" in rows["network"] or f"{network / 1e6:.1f} MB" in rows["network"]
    assert f"{HUB} @ {COMMIT}" in rows["network"]
    assert {"network", "autoencoder", "text_encoder", "tokenizer", "scheduler", "total"} <= set(rows)
    assert "free at models/wan-t2v-1.3b" in done.stdout
    assert hub.sent < 20_000 and not (tmp_path / "models").exists()


def test_what_arrives_is_a_model(hub: HubServer, address: str, tmp_path: Path, t2v: Path) -> None:
    done = kinema(address, tmp_path, "--to", "here")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "here") == files_of(t2v)
    assert done.stdout.splitlines()[-1] == 'path = "here"'
    record = json.loads((tmp_path / "here" / "kinema-download.json").read_text())
    assert record["repositories"] == {HUB: COMMIT} and record["complete"]
    family = open_family(ModelConfig(family="wan", path=str(tmp_path / "here")))
    assert family.variant.name == "t2v-1.3b"
    before = family.load("network", "cpu", None).state_dict()
    theirs = open_family(ModelConfig(family="wan", path=str(t2v))).load("network", "cpu", None).state_dict()
    assert all(bool((before[name] == value).all()) for name, value in theirs.items())

    sent = hub.sent
    again = kinema(address, tmp_path, "--to", "here")
    assert again.returncode == 0 and "to fetch: 0.0 kB" in again.stdout
    assert hub.sent - sent < 20_000  # the listing


@pytest.fixture
def large(hub: HubServer, t2v: Path, tmp_path: Path) -> bytes:
    """The network's file is 25 MB, and the connection breaks at 22: the hub's client hands on 10 MiB at a time."""
    copy = shutil.copytree(t2v, tmp_path / "large")
    data = np.random.default_rng(0).bytes(25_000_000)
    (copy / NETWORK).write_bytes(data)
    hub.repositories[HUB] = copy
    hub.break_after = 22_000_000
    return data


def test_it_goes_on_where_it_broke_off(hub: HubServer, address: str, tmp_path: Path, large: bytes) -> None:
    broken = kinema(address, tmp_path, "--to", "here", "--parts", "network")
    assert broken.returncode == 2 and "Start the command again" in broken.stderr, broken.stderr
    assert hub.broken and not (tmp_path / "here" / NETWORK).exists()
    hub.break_after, hub.broken = None, False
    hub.requests.clear()
    resumed = kinema(address, tmp_path, "--to", "here", "--parts", "network")
    assert resumed.returncode == 0, resumed.stderr
    assert "to fetch: 4.0 MB" in resumed.stdout  # 25 MB less 20 MiB
    assert hub.ranges() == [f"bytes={20 * 2**20}-"]
    assert (tmp_path / "here" / NETWORK).read_bytes() == large
    assert not list((tmp_path / "here").rglob(".kinema-partial"))


@pytest.mark.slow
def test_a_damaged_beginning_is_found(hub: HubServer, address: str, tmp_path: Path, large: bytes) -> None:
    kinema(address, tmp_path, "--to", "here", "--parts", "network")
    (partial,) = (tmp_path / "here" / ".kinema-partial").iterdir()
    partial.write_bytes(b"x" * partial.stat().st_size)
    hub.break_after, hub.broken = None, False
    damaged = kinema(address, tmp_path, "--to", "here", "--parts", "network")
    assert damaged.returncode == 2 and "arrived damaged" in damaged.stderr
    mended = kinema(address, tmp_path, "--to", "here", "--parts", "network")
    assert mended.returncode == 0, mended.stderr
    assert (tmp_path / "here" / NETWORK).read_bytes() == large


def test_an_unfinished_download_keeps_its_commit(hub: HubServer, address: str, tmp_path: Path, large: bytes) -> None:
    kinema(address, tmp_path, "--to", "here", "--revision", "v1")
    hub.break_after, hub.broken = None, False
    resumed = kinema(address, tmp_path, "--to", "here")
    assert resumed.returncode == 0 and OLDER in resumed.stdout and COMMIT not in resumed.stdout
    assert f"{HUB} @ {COMMIT}" in kinema(address, tmp_path, "--to", "here").stdout  # finished: the newest


def test_gated_models_are_explained(hub: HubServer, address: str, tmp_path: Path) -> None:
    hub.gated, hub.token = {HUB}, "hf_right"
    refused = kinema(address, tmp_path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    message = " ".join(refused.stderr.split())
    for part in (f"{HUB} is gated", f"accept them on {address}/{HUB}", f"{address}/settings/tokens", "HF_TOKEN=hf_..."):
        assert part in message
    other = " ".join(kinema(address, tmp_path, HF_TOKEN="hf_wrong").stderr.split())
    assert "belongs to an account that has not been let in yet" in other and "hf_wrong" not in other
    let_in = kinema(address, tmp_path, HF_TOKEN="hf_right")
    assert let_in.returncode == 0, let_in.stderr
    assert not any(b"hf_right" in data for data in files_of(tmp_path).values())


def test_a_token_goes_to_the_hub_alone(hub: HubServer, address: str, tmp_path: Path, t2v: Path) -> None:
    """The real hub sends large files from other hosts, whose addresses are the permission."""
    hub.gated, hub.token, hub.elsewhere = {HUB}, "hf_right", True
    done = kinema(address, tmp_path, "--to", "here", HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "here") == files_of(t2v)
    asked = {path: authorization for method, path, _, authorization in hub.requests if method == "GET"}
    assert asked[f"/elsewhere/{HUB}/{NETWORK}"] is None
    assert asked[f"/{HUB}/resolve/{COMMIT}/model_index.json"] == "Bearer hf_right"


def test_a_stored_login_is_not_used(hub: HubServer, address: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_stored")
    assert kinema(address, tmp_path, "--parts", "scheduler").returncode == 0
    assert {authorization for *_, authorization in hub.requests} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--revision", "nowhere"], "has no revision 'nowhere'"),
        (["--repo", "some/other"], "there is no some/other"),
        (["--parts", "netwrok"], "has no part 'netwrok'; did you mean 'network'?"),
        (["--variant", "t2v-2b"], "wan has no variant 't2v-2b'"),
    ],
)
def test_what_does_not_exist_is_named(address: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    failed = kinema(address, tmp_path, *arguments)
    assert failed.returncode == 2 and message in failed.stderr, failed.stderr
    assert not (tmp_path / "models").exists()


def test_a_disk_that_is_too_small_is_said_first(hub: HubServer, address: str, tmp_path: Path) -> None:
    hub.claimed_sizes[NETWORK] = 10**16
    failed = kinema(address, tmp_path)
    assert failed.returncode == 2 and "are to be fetched" in failed.stderr and "--to models" in failed.stderr
    assert not [path for _, path, _, _ in hub.requests if "/resolve/" in path]


def test_nothing_listens(tmp_path: Path) -> None:
    failed = kinema("http://127.0.0.1:9", tmp_path)
    assert failed.returncode == 2 and "did not answer as expected" in failed.stderr


def test_a_directory_holds_one_variant(hub: HubServer, address: str, tmp_path: Path) -> None:
    assert kinema(address, tmp_path, "--to", "here", "--parts", "scheduler").returncode == 0
    failed = kinema(address, tmp_path, "--to", "here", "--variant", "t2v-14b")
    assert failed.returncode == 2 and "it holds wan t2v-1.3b from huggingface" in failed.stderr


def test_parts_that_the_variant_lacks_come_from_their_own_repository(tmp_path: Path, t2v: Path) -> None:
    """A text encoder at the top of another repository arrives in its folder, where the model is looked for."""
    tiny = family_class("chroma").tiny(tmp_path / "tiny", "hd", seed=1)
    (tmp_path / "t5").mkdir()
    for name in ("text_encoder", "tokenizer"):
        for file in (tiny / name).iterdir():
            shutil.move(file, tmp_path / "t5" / file.name)
        (tiny / name).rmdir()
    hub = HubServer({"lodestones/Chroma1-HD": tiny, "google/t5-v1_1-xxl": tmp_path / "t5"})
    command = [sys.executable, "-m", "kinema", "download", "chroma", "--variant", "hd", "--to", "here"]
    with serve(hub) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        hub.gated = {"google/t5-v1_1-xxl"}
        refused = subprocess.run(command, timeout=120, **options)
        assert refused.returncode == 2 and "google/t5-v1_1-xxl is gated" in refused.stderr
        assert not (tmp_path / "here").exists()  # said before anything is fetched
        hub.gated = set()
        done = subprocess.run(command, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    family = open_family(ModelConfig(family="chroma", variant="hd", path=str(tmp_path / "here")))
    for part in family.variant.parts:
        assert find(family.config, part, family.spec(part)) is not None, part  # type: ignore[attr-defined]
    assert family.load("text_encoder", "cpu", None).num_parameters() > 0


def test_a_part_alone_is_found_where_the_last_lines_say(
    hub: HubServer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = kinema(address, tmp_path, "--to", "here", "--parts", "text_encoder, tokenizer")
    assert done.returncode == 0, done.stderr
    table = tomllib.loads(done.stdout[done.stdout.index("[model]") :])["model"]
    assert sorted(table) == ["text_encoder", "tokenizer"]
    monkeypatch.chdir(tmp_path)
    family = open_family(ModelConfig.model_validate({"family": "wan", "variant": "t2v-1.3b", **table}))
    assert family.load("text_encoder", "cpu", None).num_parameters() > 0
    assert family.load("tokenizer", "cpu", None)("red").input_ids


WEIGHTS = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "openvino.xml"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_the_files_that_loading_looks_for_are_chosen() -> None:
    network = SDXL_PARTS["network"]
    in_folder = [f"unet/{name}" for name in ["config.json", *WEIGHTS]]
    chosen = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert part_files(network, [*in_folder, "sd_xl_base_1.0.safetensors", "README.md"]) == chosen
    assert part_files(network, ["sd_xl_base_1.0.safetensors"]) == ["sd_xl_base_1.0.safetensors"]
    assert part_files(network, ["vae/config.json"]) == []

    index = "model.safetensors.index.json"
    names = [
        "config.json",
        index,
        "model.safetensors.index.fp16.json",
        *SHARDS,
        "model.fp16-00001-of-00001.safetensors",
    ]
    found = part_files(T5_XXL, [f"text_encoder/{name}" for name in [*names, "pytorch_model.bin"]])
    assert found == [f"text_encoder/{name}" for name in ["config.json", index, *SHARDS]]
    assert part_files(T5_XXL, ["config.json", "pytorch_model.bin", "tf_model.h5"], alone=True) == [
        "config.json",
        "pytorch_model.bin",
    ]
    small = ["tokenizer_config.json", "spiece.model", "special_tokens_map.json"]
    assert part_files(T5_TOKENIZER, [*small, "pytorch_model.bin", "README.md"], alone=True) == small

    wan = Wan.parts
    original = ["diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model", "config.json"]
    assert part_files(wan["network"], original) == ["diffusion_pytorch_model.safetensors"]
    assert part_files(wan["autoencoder"], original) == ["Wan2.1_VAE.pth"]
    assert part_files(wan["tokenizer"], original) == ["google/umt5-xxl/spiece.model"]


def test_modelscope_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError")  # as if it were not there
    failed = kinema("http://127.0.0.1:9", tmp_path, "--from", "modelscope", PYTHONPATH=str(tmp_path))
    assert failed.returncode == 2 and "pip install 'kinema[modelscope]'" in failed.stderr
