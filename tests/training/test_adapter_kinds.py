"""Every kind of adapter through the trainer's own paths: networks, exports, samples, a resumed run."""

import re
import shutil

import pytest
import torch
from runs import final_state, finish, make_world, metrics, start_training, write_config
from test_export import ALONE, FAMILY, load, make_config, run

from kinema.adapters.files import fold_file
from kinema.adapters.inject import adapter_parameters
from kinema.config.layouts import why_not
from kinema.errors import UserError
from kinema.families.registry import family_class, open_family
from kinema.optim.optimizers import build_optimizers
from kinema.runs.trained import named_trainables
from kinema.sampling.weights import find_weights, load_parts
from kinema.training.export import export_weights
from kinema.training.networks import block_matrices, check_networks, load_networks

KINDS = {
    "lora": {"rank": 4, "alpha": 2.0, "rank_patterns": {"to_q": 2}},
    "dora": {"type": "dora", "rank": 4},
    "lokr": {"type": "lokr", "rank": 2, "alpha": 1.0, "exclude": ["ffn.*"]},
    "ia3": {"type": "ia3", "input_targets": [r"ffn\.net\.2"]},
}
LAYOUTS = ("diffusers", "comfyui", "kohya", "peft")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return family_class(FAMILY).tiny(tmp_path_factory.mktemp("kinds") / "tiny", "t2v-1.3b")


def config_of(base, root, kind, **tables):
    layouts = [layout for layout in LAYOUTS if why_not(kind, layout) is None]
    tables = {"export": {"dtype": "fp32", "layouts": layouts}, "training": {"steps": 4, "precision": "fp32"}, **tables}
    return make_config(base, root, adapter=KINDS[kind], **{"optimizer": {"type": "muon"}, **tables})


def trained_networks(config):
    networks = load_networks(config, open_family(config.model), ALONE)
    draw = torch.Generator().manual_seed(1)
    for network in networks.values():
        for parameter in adapter_parameters(network).values():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return networks


@kinds
def test_exports_of_every_layout_sample_as_they_trained(tmp_path, base, kind):
    config = config_of(base, tmp_path, kind)
    networks, family = trained_networks(config), open_family(config.model)
    expected = run(networks["network"])
    plain = load(config.model)
    assert (expected - run(plain)).abs().max() > 1e-2
    path = export_weights(tmp_path / "exports", 3, family, networks, config, ALONE)
    places = sorted(place.name for place in path.iterdir() if place.is_dir())
    assert places == sorted(config.layouts)
    for place in (*places, "."):
        network = load(config.model)
        fold_file(path / place, family, {"network": network})
        torch.testing.assert_close(run(network), expected, rtol=1e-4, atol=1e-5)
    sampled = load_parts(
        find_weights(None, str(path), family=None, variant=None, adapters=(), ema=None), "cpu", torch.float32
    )
    torch.testing.assert_close(run(sampled["network"]), expected, rtol=1e-4, atol=1e-5)


@kinds
def test_training_goes_on_from_an_export(tmp_path, base, kind):
    config = config_of(base, tmp_path, kind)
    first = trained_networks(config)["network"]
    path = export_weights(tmp_path / "exports", 3, open_family(config.model), {"network": first}, config, ALONE)
    assert config.adapter is not None
    again = config.model_copy(update={"adapter": config.adapter.model_copy(update={"init_from": path})})
    second = load_networks(again, open_family(config.model), ALONE)["network"]
    torch.testing.assert_close(run(second), run(first), rtol=1e-5, atol=1e-6)
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {
        n for n, p in second.named_parameters() if re.search(r"lora_|lokr_|ia3_", n)
    }


@kinds
def test_vectors_are_neither_decayed_nor_orthogonalised(tmp_path, base, kind):
    """Weight decay would draw IA3's factors from one to zero, and Muon would make them all of one size."""
    config = config_of(base, tmp_path, kind)
    family = open_family(config.model)
    networks = load_networks(config, family, ALONE)
    parameters, matrices = named_trainables(networks), block_matrices(networks, family)
    vectors = {n for n, p in parameters.items() if "ia3_l" in n or "magnitude" in n}
    assert bool(vectors) == (kind in ("dora", "ia3")) and not vectors & matrices
    assert matrices == parameters.keys() - vectors
    for optimizer in build_optimizers(parameters, matrices, config.optimizer):
        for group in optimizer.param_groups:
            decayed = {n for n, p in parameters.items() if any(p is one for one in group["params"])}
            assert not (decayed & vectors and group["weight_decay"])


def test_what_cannot_be_is_told_before_anything_is_loaded(tmp_path, base):
    def check(**adapter):
        config = make_config(base, tmp_path, adapter=adapter)
        return check_networks(config, open_family(config.model))

    assert {one.rank for one in check(rank=3)["network"].values()} == {3}
    with pytest.raises(UserError, match=r"adapter\.rank_patterns: 'to_z' matches no layer that is adapted"):
        check(rank_patterns={"to_z": 3})
    with pytest.raises(UserError, match=r'type = "lokr" cannot adapt patch_embedding'):
        check(type="lokr", targets=["patch_embedding"])
    with pytest.raises(UserError, match=r"nowhere\.safetensors: there is no such file"):
        check(init_from=tmp_path / "nowhere.safetensors")


def gradients(base, root, kind, world=None):
    """Gradients of the adapter's weights for fixed inputs, with every weight moved; sharded over ``world``."""
    from kinema.parallel.data import accumulate, shard

    config = config_of(base, root, kind)
    network = trained_networks(config)["network"].train()
    if world is not None:
        shard(network, open_family(config.model).blocks(network), world)
    draw = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=draw), torch.randn(1, 6, network.config.text_dim, generator=draw)
    with accumulate(network):
        network(x, torch.tensor([400.0]), text, return_dict=False)[0].square().mean().backward()
    found = {}
    for name, parameter in adapter_parameters(network).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if world is not None else parameter.grad
    return found


def sharded_gradients(rank, port, base, root):
    import os

    from kinema.config.schema import ParallelConfig
    from kinema.parallel.mesh import start, stop

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = start(ParallelConfig(dp_shard=2), "cpu")
    for kind in KINDS:
        found = gradients(base, root / f"rank{rank}", kind, world)
        if rank == 0:
            torch.save(found, root / f"{kind}.pt")
    world.barrier()
    stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_networks_give_every_kind_the_same_gradients(tmp_path, base):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded_gradients, (port, base, tmp_path), nprocs=2)
    for kind in KINDS:
        alone, sharded = gradients(base, tmp_path, kind), torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert sharded.keys() == alone.keys()
        for name, value in alone.items():
            assert value.any(), name
            torch.testing.assert_close(sharded[name], 2 * value, rtol=1e-4, atol=1e-6)  # two ranks, summed


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", ['type = "dora"\nrank = 4', 'type = "lokr"\nrank = 4\nrank_dropout = 0.3', 'type = "ia3"']
)
def test_a_resumed_run_of_every_kind_ends_with_the_same_bits(tmp_path, adapter):
    make_world(tmp_path)
    config = write_config(tmp_path, 6, f"\n[adapter]\n{adapter}\n")
    finish(start_training(config, "--model.variant", "t2v-1.3b"))
    run_dir = tmp_path / "run"
    expected = final_state(run_dir)
    losses = [row["loss"] for row in metrics(run_dir)]
    assert len(set(losses)) > 1
    newest = max((run_dir / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000006"
    shutil.rmtree(newest)
    finish(start_training(config, "--model.variant", "t2v-1.3b"))
    state = final_state(run_dir)
    assert state.keys() == expected.keys()
    assert [name for name, value in state.items() if not torch.equal(value, expected[name])] == []
