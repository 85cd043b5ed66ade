"""The video DC-AE against golden tensors of Open-Sora 2.0 (tests/golden/open_sora/dcae*), diffusers, closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kinema.errors import UserError
from kinema.networks import dc_ae_blocks as blocks
from kinema.networks.dc_ae import VideoDCAE
from kinema.networks.dc_ae_flow import chain_of, results
from kinema.networks.dc_ae_tiling import run_tiled, tiling_of

GOLDEN = Path(__file__).parents[1] / "golden" / "open_sora"
CASES = ("plain_T1", "plain_T2", "plain_T8", "plain_T16_scaled")
WIDTHS, DEPTHS = (8, 16, 16, 32, 32, 64), (1, 1, 1, 1, 1, 2)
TINY: dict[str, Any] = dict(
    latent_channels=16, encoder_widths=WIDTHS, decoder_widths=WIDTHS, encoder_depths=DEPTHS, decoder_depths=(1,) * 6
)
PARAMETERS = 459_462_147


def golden_autoencoder(**changes: Any) -> VideoDCAE:
    autoencoder = VideoDCAE.from_config({**TINY, **changes})
    autoencoder.load_state_dict(load_file(GOLDEN / "dcae.weights.safetensors"))
    return autoencoder.eval()


@pytest.fixture(scope="module")
def autoencoder() -> VideoDCAE:
    """With the golden weights. Leave it as it is."""
    return golden_autoencoder().requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "dcae.io.safetensors")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# -- the original ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames_at_once", [None, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode_equal_the_original(golden: dict[str, Tensor], case: str, frames_at_once: int | None) -> None:
    autoencoder = golden_autoencoder(scaling_factor=0.493 if case.endswith("scaled") else 1.0)
    x, z, y = (golden[f"{case}.{name}"] for name in "xzy")
    pixels = x.shape[0] * x.shape[3] * x.shape[4]
    autoencoder.chunk_elements = None if frames_at_once is None else frames_at_once * pixels * WIDTHS[0]
    with torch.no_grad():
        latents, decoded = autoencoder.encode(x), autoencoder.decode(z)
    assert z.std() > 0.5 and y.std() > 0.2, "the golden tensors say something"
    close(latents, z)
    close(decoded, y)


def test_every_stage_equals_the_original(golden: dict[str, Tensor], autoencoder: VideoDCAE) -> None:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: seen.update({name: output})

    names = [name.removeprefix("mid.") for name in golden if name.startswith("mid.")]
    handles = []
    for name in names:
        module = autoencoder.get_submodule(name)
        last = module.op_list[-1] if ".stages." in name else module  # a stage's modules are called one by one
        handles.append(last.register_forward_hook(keep(name)))
    autoencoder.encode(golden["plain_T8.x"])
    autoencoder.decode(golden["plain_T8.z"])
    for handle in handles:
        handle.remove()
    assert sorted(seen) == sorted(names) and len(names) == 11
    for name in names:
        close(seen[name], golden[f"mid.{name}"])


# -- the published configuration ---------------------------------------------------------------------------------------


def conv(cin: int, cout: int, kernel: int = 3, groups: int = 1) -> tuple[int, ...]:
    return (cout, cin // groups, kernel, kernel, kernel)


def affine(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def block_shapes(kind: str, c: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block of c channels."""
    if kind == "ResBlock":
        return {
            **affine("main.conv1.conv", conv(c, c)),
            "main.conv2.conv.weight": conv(c, c),
            **affine("main.conv2.norm", (c,)),
        }
    context, local = "context_module.main", "local_module.main"
    return {
        f"{context}.qkv.conv.weight": conv(c, 3 * c, 1),
        f"{context}.aggreg.0.0.weight": conv(3 * c, 3 * c, 5, groups=3 * c),
        f"{context}.aggreg.0.1.weight": conv(3 * c, 3 * c, 1, groups=3 * c // 32),
        f"{context}.proj.conv.weight": conv(2 * c, c, 1),
        **affine(f"{context}.proj.norm", (c,)),
        **affine(f"{local}.inverted_conv.conv", conv(c, 8 * c, 1)),
        **affine(f"{local}.depth_conv.conv", conv(8 * c, 8 * c, groups=8 * c)),
        f"{local}.point_conv.conv.weight": conv(4 * c, c, 1),
        **affine(f"{local}.point_conv.norm", (c,)),
    }


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the f32t4c128 checkpoint, from the tables of the authors' names."""
    widths, kinds = (128, 256, 512, 512, 1024, 1024), ["ResBlock"] * 3 + ["EfficientViT"] * 3
    shapes = {
        **affine("encoder.project_in.conv", conv(3, 128)),
        **affine("encoder.project_out.main.op_list.0.conv", conv(1024, 128)),
        **affine("decoder.project_in.main.conv", conv(128, 1024)),
        **affine("decoder.project_out.op_list.0", (128,)),
        **affine("decoder.project_out.op_list.2.conv", conv(128, 3)),
    }
    for stage, (kind, width, depth) in enumerate(zip(kinds, widths, (2, 2, 2, 3, 3, 3), strict=True)):
        inside, outside = f"encoder.stages.{stage}.op_list", f"decoder.stages.{stage}.op_list"
        last = stage == 5
        for k in range(depth):
            shapes |= {f"{inside}.{k}.{name}": shape for name, shape in block_shapes(kind, width).items()}
        for k in range(3):
            place = f"{outside}.{k if last else k + 1}"
            shapes |= {f"{place}.{name}": shape for name, shape in block_shapes(kind, width).items()}
        if not last:
            shapes |= affine(f"{inside}.{depth}.main.conv", conv(width, widths[stage + 1]))
            shapes |= affine(f"{outside}.0.main.conv.conv", conv(widths[stage + 1], width))
    return shapes


def parameters_by_layers() -> int:
    """Residual block: two convolutions, 54 c^2 + 3 c. EfficientViT block: 3 c^2 + 375 c + 96 c + 2 c^2 + 2 c for its
    attention, 8 c^2 + 8 c + 216 c + 8 c + 4 c^2 + 2 c for its feed-forward. The changes of size: 27 a b and a bias."""

    def res(c: int) -> int:
        return 54 * c * c + 3 * c

    def vit(c: int) -> int:
        return 17 * c * c + 707 * c

    sides = [(128, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024)]
    down = sum(27 * a * b + b for a, b in sides)
    up = sum(27 * a * b + a for a, b in sides)
    encoder = 27 * 3 * 128 + 128 + 2 * (res(128) + res(256) + res(512)) + 3 * (vit(512) + 2 * vit(1024)) + down
    encoder += 27 * 1024 * 128 + 128
    decoder = 27 * 128 * 1024 + 1024 + 3 * (res(128) + res(256) + res(512) + vit(512) + 2 * vit(1024)) + up
    return encoder + decoder + 2 * 128 + 27 * 128 * 3 + 3


def test_published_configuration_has_every_tensor() -> None:
    with torch.device("meta"):
        autoencoder = VideoDCAE()
    shapes = {name: tuple(value.shape) for name, value in autoencoder.state_dict().items()}
    assert shapes == published_shapes()
    count = sum(parameter.numel() for parameter in autoencoder.parameters())
    print(f"video DC-AE f32t4c128: {count:,} parameters in {len(shapes)} tensors")
    assert count == parameters_by_layers() == PARAMETERS
    assert (autoencoder.temporal_compression_ratio, autoencoder.spatial_compression_ratio) == (4, 32)
    assert autoencoder.encode(torch.empty(1, 3, 128, 192, 352, device="meta")).shape == (1, 128, 32, 6, 11)


def test_saves_and_loads(autoencoder: VideoDCAE, golden: dict[str, Tensor], tmp_path: Path) -> None:
    autoencoder.save_pretrained(tmp_path)
    loaded = VideoDCAE.from_pretrained(tmp_path)
    assert (loaded.config.encoder_widths, loaded.config.latent_channels) == (list(WIDTHS), 16)
    x = golden["plain_T2.x"]
    assert torch.equal(loaded.encode(x), autoencoder.encode(x))


def test_a_fresh_one_learns() -> None:
    """Norms begin at one: at the authors' 0.02 a block adds next to nothing to what it is given."""
    torch.manual_seed(0)
    fresh = VideoDCAE(**TINY)
    norms = [m.weight for m in fresh.modules() if isinstance(m, blocks.RMSNorm3d)]
    assert len(norms) == 21 and all(bool((weight == 1).all()) for weight in norms)
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
    x = torch.stack([rows, columns, -rows])[None, :, None]
    optimiser = torch.optim.Adam(fresh.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        loss = (fresh(x) - x).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0], losses


# -- pictures: diffusers' AutoencoderDC --------------------------------------------------------------------------------


def as_2d(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of ours under diffusers' names; of a kernel over time the middle, all that a single frame meets."""
    if value.ndim == 5:
        value = value[:, :, value.shape[2] // 2]
    half, _, rest = name.partition(".")
    is_block = ".op_list." in rest and rest.startswith("stages")
    if not is_block:
        places = {
            "encoder.project_in.conv": "encoder.conv_in",
            "encoder.project_out.main.op_list.0.conv": "encoder.conv_out",
            "decoder.project_in.main.conv": "decoder.conv_in",
            "decoder.project_out.op_list.0": "decoder.norm_out",
            "decoder.project_out.op_list.2.conv": "decoder.conv_out",
        }
        module, kind = name.rsplit(".", 1)
        return {f"{places[module]}.{kind}": value}
    _, stage, _, k, inside = rest.split(".", 4)
    place = f"{half}.{'down' if half == 'encoder' else 'up'}_blocks.{stage}.{k}"
    if inside.endswith("qkv.conv.weight"):
        parts = value[..., 0, 0].chunk(3)
        return {f"{place}.attn.to_{x}.weight": part for x, part in zip("qkv", parts, strict=True)}
    module, kind = inside.rsplit(".", 1)
    modules = {
        "main.conv1.conv": "conv1",
        "main.conv2.conv": "conv2",
        "main.conv2.norm": "norm",
        "main.conv": "conv",
        "main.conv.conv": "conv",
        "context_module.main.aggreg.0.0": "attn.to_qkv_multiscale.0.proj_in",
        "context_module.main.aggreg.0.1": "attn.to_qkv_multiscale.0.proj_out",
        "context_module.main.proj.conv": "attn.to_out",
        "context_module.main.proj.norm": "attn.norm_out",
        "local_module.main.inverted_conv.conv": "conv_out.conv_inverted",
        "local_module.main.depth_conv.conv": "conv_out.conv_depth",
        "local_module.main.point_conv.conv": "conv_out.conv_point",
        "local_module.main.point_conv.norm": "conv_out.norm",
    }
    if modules[module] == "attn.to_out":
        value = value[..., 0, 0]
    return {f"{place}.{modules[module]}.{kind}": value}


@pytest.fixture(scope="module")
def picture_autoencoder(autoencoder: VideoDCAE) -> AutoencoderDC:
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    theirs = AutoencoderDC(
        latent_channels=16,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=DEPTHS,
        decoder_layers_per_block=(1,) * 6,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        attention_head_dim=32,
    )
    state: dict[str, Tensor] = {}
    for name, value in autoencoder.state_dict().items():
        state |= as_2d(name, value)
    theirs.load_state_dict(state)
    return theirs.eval().requires_grad_(False)


def test_a_picture_is_what_diffusers_makes_of_it(autoencoder: VideoDCAE, picture_autoencoder: AutoencoderDC) -> None:
    """With one frame nothing is left of the time: the whole autoencoder is diffusers' 2-D one."""
    x = noise(2, 3, 1, 96, 128, seed=2).tanh()
    theirs = picture_autoencoder.encode(x[:, :, 0]).latent
    close(autoencoder.encode(x)[:, :, 0], theirs)
    close(autoencoder.decode(theirs[:, :, None])[:, :, 0], picture_autoencoder.decode(theirs).sample)


def test_tiles_of_a_picture_are_blended_as_diffusers_does(picture_autoencoder: AutoencoderDC) -> None:
    ours = golden_autoencoder().requires_grad_(False)
    ours.enable_tiling(pixels=128, frames=None)
    picture_autoencoder.enable_tiling(128, 128, 96, 96)
    x = noise(1, 3, 1, 224, 320, seed=3).tanh()
    theirs = picture_autoencoder.encode(x[:, :, 0]).latent
    close(ours.encode(x)[:, :, 0], theirs)
    # diffusers blends decoded tiles over the same 32 pixels.
    close(ours.decode(theirs[:, :, None])[:, :, 0], picture_autoencoder.decode(theirs).sample)
    picture_autoencoder.use_tiling = False
    untiled = picture_autoencoder.encode(x[:, :, 0]).latent
    assert (untiled - theirs).abs().max() > 0.1, "tiles change the latents, so the comparison says something"


# -- closed forms in float64 -------------------------------------------------------------------------------------------


def test_shortcut_of_downsampling_means_over_neighbouring_channels() -> None:
    x = noise(2, 6, 4, 4, 6, dtype=torch.float64)
    down = blocks.Downsample(6, 16, in_time=True).double()
    shortcut = down._shortcut(x)
    assert shortcut.shape == (2, 16, 2, 2, 3)
    for out in range(16):
        expected = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
        for group in range(3):
            channel, rest = divmod(out * 3 + group, 8)
            t, h, w = rest // 4, rest // 2 % 2, rest % 2
            expected += x[:, channel, t::2, h::2, w::2] / 3
        torch.testing.assert_close(shortcut[:, out], expected, rtol=0, atol=1e-14)


def test_shortcut_of_upsampling_repeats_channels() -> None:
    x = noise(1, 8, 3, 2, 2, dtype=torch.float64)
    up = blocks.Upsample(8, 4, in_time=True).double()
    shortcut = up._shortcut(x)
    assert shortcut.shape == (1, 4, 6, 4, 4)
    for out in range(4):
        for t, h, w in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
            source = (out * 8 + t * 4 + h * 2 + w) // 4  # 8 channels become 32: each four times
            assert torch.equal(shortcut[:, out, t::2, h::2, w::2], x[:, source])


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2)])
def test_boxes_and_channels_are_inverse(factors: tuple[int, int, int]) -> None:
    x = noise(2, 3, 4, 4, 6)
    assert torch.equal(blocks.channels_to_space(blocks.space_to_channels(x, factors), factors), x)


def test_linear_attention_is_attention_with_relu_products() -> None:
    """The quadratic form, written out: weights relu(q_i) . relu(k_j), over their sum."""
    channels, heads = 64, 2
    attention = blocks.LinearAttention(channels).double().requires_grad_(False)
    x = noise(2, channels, 3, 4, 5, seed=4, dtype=torch.float64)
    qkv = F.conv3d(x, attention.qkv.conv.weight)
    mixed = F.conv3d(qkv, attention.aggreg[0][0].weight, padding=2, groups=3 * channels)
    mixed = F.conv3d(mixed, attention.aggreg[0][1].weight, groups=3 * heads)
    found = []
    for part in (qkv, mixed):
        for head in range(heads):
            rows = part[:, head * 96 : (head + 1) * 96].flatten(2)
            query, key, value = rows[:, :32].clamp(min=0), rows[:, 32:64].clamp(min=0), rows[:, 64:]
            weights = torch.einsum("bdi,bdj->bij", query, key)
            answer = torch.einsum("bij,bdj->bdi", weights, value) / (weights.sum(2)[:, None] + 1e-15)
            found.append(answer.unflatten(2, (3, 4, 5)))
    projected = F.conv3d(torch.cat(found, 1), attention.proj.conv.weight)
    scale = (projected.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    expected = projected * scale * attention.proj.norm.weight[:, None, None, None]
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)
    for frames in (1, 2):
        torch.testing.assert_close(attention.in_chunks(x, frames), expected, rtol=1e-10, atol=1e-10)


def test_a_position_without_queries_gets_nothing_rather_than_nan() -> None:
    attention = blocks.LinearAttention(32).requires_grad_(False)
    attention.qkv.conv.weight[:32] = 0.0
    attention.aggreg[0][0].weight.zero_()
    assert torch.equal(attention(noise(1, 32, 2, 2, 2)), torch.zeros(1, 32, 2, 2, 2))


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", range(1, 8))
def test_flows_give_the_result_of_the_whole(frames: int) -> None:
    """In float64, for every chunk size: nothing of the clip is lost, doubled or moved."""
    torch.manual_seed(frames)
    chain = [
        blocks.ConvLayer(3, 8),
        blocks.Residual(blocks.ResBlock(8)),
        blocks.Downsample(8, 16, in_time=False),
        blocks.Residual(blocks.GLUConv(16)),
        blocks.Residual(blocks.Ops(blocks.ConvLayer(16, 4)), 4),
        blocks.Upsample(4, 4, in_time=False),
        blocks.Ops(blocks.RMSNorm3d(4), nn.ReLU(), blocks.ConvLayer(4, 3)),
    ]
    ops = [op.double().requires_grad_(False) for op in chain]
    x = noise(2, 3, frames, 4, 4, seed=frames, dtype=torch.float64)
    whole = blocks.Ops(*ops)(x)
    for size in range(1, frames + 1):
        chunks = list(results(chain_of(ops), x, size))
        torch.testing.assert_close(torch.cat(chunks, dim=2), whole, rtol=0, atol=1e-12)
        assert max(chunk.shape[2] for chunk in chunks) <= size, "no chunk grows on the way"


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                reference = StorageWeakRef(leaf.untyped_storage())
                self.live[reference.cdata] = reference, leaf.untyped_storage().nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_chunks_bound_the_memory_of_long_clips(half: str) -> None:
    """128 frames of 192 x 320 in bf16, the published widths, one block a stage, on the meta device: live bytes."""
    with torch.device("meta"):
        autoencoder = VideoDCAE(encoder_depths=(1,) * 6, decoder_depths=(1,) * 6).requires_grad_(False)
    for parameter in autoencoder.parameters():
        parameter.data = parameter.data.bfloat16()
    shape = (1, 3, 128, 192, 320) if half == "encode" else (1, 128, 32, 6, 10)
    peaks = {}
    for elements in (None, 2**26):
        autoencoder.chunk_elements = elements
        with torch.no_grad(), Peak() as measured:
            getattr(autoencoder, half)(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        peaks[elements] = measured.peak / 2**30
    print(half, {key: f"{value:.2f} GiB" for key, value in peaks.items()})
    assert peaks[2**26] < 0.15 * peaks[None]


def test_bf16_stays_near(autoencoder: VideoDCAE, golden: dict[str, Tensor]) -> None:
    low = golden_autoencoder().requires_grad_(False)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    x, z, y = (golden[f"plain_T2.{name}"] for name in "xzy")
    for ours, exact in ((low.encode(x.bfloat16()), z), (low.decode(z.bfloat16()), y)):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).std() < 0.02 * exact.std()


# -- tiles -------------------------------------------------------------------------------------------------------------


def test_tiles_that_cover_all_change_nothing(autoencoder: VideoDCAE, golden: dict[str, Tensor]) -> None:
    tiled = golden_autoencoder().requires_grad_(False)
    tiled.enable_tiling()
    x, z = golden["plain_T16_scaled.x"], golden["plain_T8.z"]
    assert torch.equal(tiled.encode(x), autoencoder.encode(x))
    assert torch.equal(tiled.decode(z), autoencoder.decode(z))


@pytest.mark.parametrize("pixels, frames, overlap", [(256, 32, 0.25), (128, 16, 0.5), (64, 8, 0.3), (None, 24, 0.1)])
@pytest.mark.parametrize("clip", [(52, 96, 480), (68, 288, 32)])
def test_blending_weights_sum_to_one(
    pixels: int | None, frames: int | None, overlap: float, clip: tuple[int, int, int]
) -> None:
    """What is the same in every tile comes back, in latents (encode) and in pixels (decode), at full length."""
    tiling = tiling_of(pixels, frames, overlap, 32, 4)
    t, h, w = clip
    latents = noise(1, 1, t // 4, h // 32, w // 32, dtype=torch.float64)

    def grow(z: Tensor) -> Tensor:
        assert z.shape[2] > 1, "a tile of one latent frame would decode to one frame"
        return z.repeat_interleave(4, 2).repeat_interleave(32, 3).repeat_interleave(32, 4)

    def shrink(x: Tensor) -> Tensor:
        return F.avg_pool3d(x, (4, 32, 32))

    pixels_of = run_tiled(grow, latents, tiling, (1, 1), (4, 32))
    assert pixels_of.shape == (1, 1, t, h, w)
    torch.testing.assert_close(pixels_of, grow(latents), rtol=0, atol=1e-6)  # ramps are float32
    back = run_tiled(shrink, pixels_of, tiling, (4, 32), (1, 1))
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-6)


def test_tiles_of_the_default_in_time() -> None:
    """Tiles of 32 frames begin every 24; over the 8 that two share the later fades in by eighths."""
    tiling = tiling_of(256, 32, 0.25, 32, 4)
    count = iter(range(10))
    begins = []

    def run(z: Tensor) -> Tensor:
        begins.append((int(z.flatten()[0]), z.shape[2]))
        return torch.full((1, 1, 4 * z.shape[2], 32, 32), float(next(count)))

    latents = torch.arange(13.0).view(1, 1, 13, 1, 1)
    pixels = run_tiled(run, latents, tiling, (1, 1), (4, 32))[0, 0, :, 0, 0]
    assert begins == [(0, 8), (6, 7)], "a last tile of one latent frame, 12, is left out"
    expected = torch.cat([torch.zeros(24), torch.arange(8) / 8, torch.ones(20)])
    assert torch.equal(pixels, expected)


def test_52_frames_come_back_as_52() -> None:
    """The original gives 49: its last tile is one latent frame, which decodes to one frame."""
    tiled = golden_autoencoder().requires_grad_(False)
    tiled.enable_tiling()
    x = noise(1, 3, 52, 32, 32, seed=5).tanh()
    z = tiled.encode(x)
    assert z.shape[2] == 13
    assert tiled.decode(z).shape == x.shape
    near = (z - golden_autoencoder().encode(x)).abs()
    assert near.max() > 1e-3, "tiles are not the whole"
    tiled.disable_tiling()
    close(tiled.encode(x), golden_autoencoder().encode(x), 2e-5)


def test_tile_sizes_are_consistent_and_checked(autoencoder: VideoDCAE) -> None:
    """The original keeps its latent tile sizes at 8 whatever it is told."""
    tiled = golden_autoencoder().requires_grad_(False)
    tiled.enable_tiling(pixels=64, frames=8)
    x = noise(1, 3, 12, 96, 64, seed=6).tanh()
    z = tiled.encode(x)
    assert z.shape == (1, 16, 3, 3, 2)
    assert tiled.decode(z).shape == x.shape
    # The first latent is far from every seam of the later tiles: it is that of the first tile alone.
    close(z[:, :, :1, :1, :1], autoencoder.encode(x[:, :, :8, :64, :64])[:, :, :1, :1, :1])
    with pytest.raises(UserError, match=r"tiles of 100 pixels.*multiple of 32.*nearest is 96"):
        tiled.enable_tiling(pixels=100)
    with pytest.raises(UserError, match=r"tiles of 4 frames.*from 8 on.*nearest is 8"):
        tiled.enable_tiling(frames=4)
    with pytest.raises(UserError, match=r"share above 0 and at most 0.5, not 0"):
        tiled.enable_tiling(overlap=0.0)


# -- lengths and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, nearest", [(3, "2 and 4"), (5, "4 and 8"), (6, "4 and 8"), (129, "128 and 132")])
def test_other_lengths_are_refused_with_the_nearest(autoencoder: VideoDCAE, frames: int, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"a clip of {frames} frames.*1, 2 or a multiple of 4.*nearest are {nearest}"):
        autoencoder.encode(torch.zeros(1, 3, frames, 32, 32))


def test_other_sizes_are_refused_with_the_nearest(autoencoder: VideoDCAE) -> None:
    with pytest.raises(UserError, match=r"48 x 90 pixels.*multiples of 32.*nearest is 64 x 96"):
        autoencoder.encode(torch.zeros(1, 3, 1, 48, 90))


def test_clips_come_back_whole_or_cut(autoencoder: VideoDCAE) -> None:
    for frames in (1, 8, 12):
        z = autoencoder.encode(noise(1, 3, frames, 32, 32, seed=frames).tanh())
        assert z.shape[1:] == (16, max(1, frames // 4), 1, 1)
        whole = autoencoder.decode(z)
        assert whole.shape[2] == autoencoder.decoded_frames(z.shape[2]) == frames
    assert torch.equal(autoencoder.decode(z, frames=9), whole[:, :, :9])
    with pytest.raises(UserError, match=r"1 latent frames decode to 1 frames: 4 cannot"):
        autoencoder.decode(torch.zeros(1, 16, 1, 1, 1), frames=4)


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(autoencoder: VideoDCAE, x: Tensor) -> dict[str, Tensor]:
    autoencoder.zero_grad()
    autoencoder(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in autoencoder.named_parameters()}


def test_gradients_flow_and_checkpointing_keeps_them() -> None:
    autoencoder = golden_autoencoder().double()
    x = noise(1, 3, 8, 32, 32, seed=7, dtype=torch.float64).tanh()
    plain = gradients(autoencoder, x)
    assert all(bool(gradient.abs().max() > 0) for gradient in plain.values())
    autoencoder.enable_gradient_checkpointing()
    assert autoencoder.encoder.gradient_checkpointing and autoencoder.decoder.gradient_checkpointing
    calls = []
    block = autoencoder.encoder.stages[0].op_list[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed = gradients(autoencoder, x)
    assert len(calls) == 2, "once forward, once more backward"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-10, atol=1e-14)


def test_gradients_are_those_of_differences() -> None:
    autoencoder = golden_autoencoder().double()
    x = noise(1, 3, 4, 32, 32, seed=8, dtype=torch.float64).tanh()
    slopes = gradients(autoencoder, x)
    # Along one random direction through all parameters, shorter where they are small.
    direction = {
        name: noise(*parameter.shape, seed=i, dtype=torch.float64) * parameter.detach().abs().mean()
        for i, (name, parameter) in enumerate(autoencoder.named_parameters())
    }
    expected = sum(float((slopes[name] * direction[name]).sum()) for name in direction)
    losses = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for name, parameter in autoencoder.named_parameters():
                parameter.add_(direction[name], alpha=step)
            losses.append(float(autoencoder(x).square().mean()))
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


def test_what_moves_parts_to_a_device_hears_of_encoding_and_decoding(autoencoder: VideoDCAE) -> None:
    """A hook of accelerate stands before ``forward`` alone, unless a method says that it wants it."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    calls: list[Any] = []

    class Heard(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            calls.append(module)
            return args, kwargs

    x = torch.zeros(1, 3, 1, 64, 64)
    expected = autoencoder.encode(x)
    add_hook_to_module(autoencoder, Heard())
    latents = autoencoder.encode(x)
    assert calls == [autoencoder] and torch.equal(latents, expected)
    autoencoder.decode(latents, frames=1)
    assert calls == [autoencoder] * 2
    remove_hook_from_module(autoencoder)
