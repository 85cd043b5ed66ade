"""An autoencoder's tiles, shared out over the processes that draw a sample together.

The autoencoder's own method runs twice. First it calls its decoder for every tile: a process decodes those that are
its own and answers all calls with tensors without values. Then the processes send each other what they have decoded,
and in the second run every call is answered with it, so that tiles are blended as one process blends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from kinema.parallel.mesh import World

_TILED = ("tiled_decode", "_temporal_tiled_decode")
"""What diffusers calls the methods that decode tile by tile; one may call the other."""
_NEW_TILE = "clear_cache"
"""What autoencoders call before each tile that decode a tile in several calls, which depend on each other."""


def share_tiles(autoencoder: Any, world: World) -> None:
    """Let the processes of a sequence share the tiles that this autoencoder decodes, in place; one that has no tiles,
    or decodes without, stays as it is. All of them have to decode the same latents."""
    if any(hasattr(autoencoder, name) for name in _TILED):
        _SharedTiles(autoencoder, world).install()


@dataclass
class _Tiles:
    """The tiles of one sample: in the order of the decoder's calls whose they are, and what this process found."""

    rank: int
    size: int
    owners: list[int] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    tile: int = -1
    call: int = 0
    """Of this tile's calls of the decoder, the present one."""
    dtype: torch.dtype = torch.float32
    """Of what the decoder gives."""

    def next_call(self, new_tile: bool) -> bool:
        """Whether this process answers the next call of the decoder."""
        self.tile, self.call = (self.tile + 1, 0) if new_tile else (self.tile, self.call + 1)
        self.owners.append(self.tile % self.size)
        return self.owners[-1] == self.rank

    def exchanged(self, world: World) -> list[Tensor]:
        """What was found for every call, on every process."""
        group = world.group("sp")
        shapes: list[list[torch.Size]] = [[] for _ in range(self.size)]
        dist.all_gather_object(shapes, [one.shape for one in self.found], group=group)
        like = self.found[0] if self.found else torch.empty(0, dtype=self.dtype, device=world.device)
        shapes_of, mine = [iter(one) for one in shapes], iter(self.found)
        results = []
        for owner in self.owners:
            shape = next(shapes_of[owner])
            result = next(mine).contiguous() if owner == self.rank else like.new_empty(shape)
            dist.broadcast(result, dist.get_global_rank(group, owner), group=group)
            results.append(result)
        self.found.clear()
        return results


class _Shapes:
    """What shape the decoder gives for a tile that it does not decode here.

    Of the tiles of as many frames one is asked for, of those that a tile's first calls decode each: height and width of
    the others follow from it.
    """

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.known: dict[tuple[Any, ...], tuple[torch.Size, Tensor]] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def learn(self, call: int, given: Tensor, result: Tensor) -> None:
        self.known[self._key(call, given)] = given.shape, result.to("meta")

    def of(self, call: int, decode: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A tensor without values, of the shape that ``decode`` would give."""
        given: Tensor = args[0]
        key = self._key(call, given)
        if key not in self.known:
            with self.mode:
                result = decode(*args, **kwargs)
            self.known[key] = given.shape, torch.empty(result.shape, dtype=result.dtype, device="meta")
        shape, result = self.known[key]
        sides = zip(result.shape[-2:], given.shape[-2:], shape[-2:], strict=True)
        height, width = (known * here // there for known, here, there in sides)
        return result.new_empty(*result.shape[:-2], height, width)

    def _key(self, call: int, given: Tensor) -> tuple[Any, ...]:
        # A causal decoder's first frame is by itself, and the second is the first that has one before it.
        return min(call, 2), given.shape[:-2]


class _SharedTiles:
    def __init__(self, autoencoder: Any, world: World) -> None:
        self.autoencoder, self.world = autoencoder, world
        self.inside = False
        self.new_tile = True
        self.has_cache = hasattr(autoencoder, _NEW_TILE)

    def install(self) -> None:
        for name in _TILED:
            if hasattr(self.autoencoder, name):
                setattr(self.autoencoder, name, self._sharing(getattr(self.autoencoder, name)))
        if self.has_cache:
            clear = getattr(self.autoencoder, _NEW_TILE)

            def cleared() -> None:
                self.new_tile = True
                clear()

            setattr(self.autoencoder, _NEW_TILE, cleared)

    def _sharing(self, tiled: Callable[..., Any]) -> Callable[..., Any]:
        def shared(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return tiled(*args, **kwargs)
            self.inside = True
            try:
                tiles = _Tiles(self.world.place["sp"], self.world.sizes.sp)
                with self._decoding(self._own(tiles)):
                    tiled(*args, **kwargs)
                results = iter(tiles.exchanged(self.world))
                with self._decoding(lambda *_, **__: next(results)):
                    return tiled(*args, **kwargs)
            finally:
                self.inside = False

        return shared

    def _own(self, tiles: _Tiles) -> Callable[..., Tensor]:
        """A decoder that decodes the tiles of this process, and gives tensors without values."""
        decode, shapes = self.autoencoder.decoder.forward, _Shapes()

        def run(*args: Any, **kwargs: Any) -> Tensor:
            new_tile, self.new_tile = self.new_tile or not self.has_cache, False
            if not tiles.next_call(new_tile):
                answer = shapes.of(tiles.call, decode, args, kwargs)
                tiles.dtype = answer.dtype
                return answer
            result: Tensor = decode(*args, **kwargs)
            tiles.found.append(result)
            shapes.learn(tiles.call, args[0], result)
            return result.to("meta")

        return run

    @contextmanager
    def _decoding(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """The autoencoder's decoder with another forward pass."""
        decoder, name = self.autoencoder.decoder, "forward"
        before = vars(decoder).get(name)
        decoder.forward = forward
        try:
            yield
        finally:
            del decoder.forward
            if before is not None:
                decoder.forward = before
