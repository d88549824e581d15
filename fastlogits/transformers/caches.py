"""Keys and values in memory of a fixed place and size: what a captured step reads and writes.

Every layer has room for the whole sequence, those with a sliding window too: the mask says what a token may see. So
where a token goes depends on a counter on the device alone, and nothing on the host.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, cache_utils

_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

NAME = "cache" if "cache" in _PREPARES else "past_key_values"
"""What this version of transformers calls the cache, in ``generate``, in models and in what they return."""

_LAYERS = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
    if hasattr(cache_utils, name)
)
"""The layers whose states can be taken over."""


def has_device_counters() -> bool:
    """Whether this version of transformers has static layers that count on the device."""
    layer = getattr(cache_utils, "StaticLayer", None)
    if layer is None or "value_states" not in inspect.signature(layer.lazy_initialization).parameters:
        return False
    return isinstance(getattr(layer(1), "cumulative_length", None), torch.Tensor)


def unfit(cache: Any) -> str | None:
    """Why the states of a cache can't be taken over; None where they can."""
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        return unfit(cache.self_attention_cache) or unfit(cache.cross_attention_cache)
    if not isinstance(cache, cache_utils.Cache):
        return f"{type(cache).__name__} is a cache that fastlogits doesn't know"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    for layer in cache.layers:
        if type(layer) not in _LAYERS:
            return f"the cache has layers of {type(layer).__name__}"
    lazy = cache.layer_class_to_replicate
    return f"the cache has layers of {lazy.__name__}" if lazy is not None and lazy not in _LAYERS else None


def rows_of(cache: Any) -> int | None:
    """How many rows a cache holds; None where it is empty, or of a kind that isn't known."""
    if isinstance(cache, cache_utils.EncoderDecoderCache):
        cache = cache.self_attention_cache
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.numel():
            return int(keys.shape[0])
    return None


class _Held(NamedTuple):
    """What a layer holds: the states ``[B, heads, N, D]`` of the last ``N`` of ``length`` tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int

    @classmethod
    def of(cls, layer: Any) -> _Held:
        length = int(layer.get_seq_length())
        N = min(length, layer.keys.shape[2])
        # A dynamic layer holds no more than it has seen; a static one has its last tokens at the end once it is full.
        return cls(layer.keys[:, :, :N], layer.values[:, :, :N], length)


class FixedCache:
    """A cache for ``length`` tokens, shaped as another one that holds a prompt.

    Args:
        like: the other one; each of its layers holds something.
        length: tokens that there is room for.
    """

    def __init__(self, like: Any, length: int) -> None:
        self.length = length
        crossed = isinstance(like, cache_utils.EncoderDecoderCache)
        own = like.self_attention_cache if crossed else like
        self._layers = [_room(layer, length) for layer in own.layers]
        self._crossed: list[Any] = []
        self.cache: Any = cache_utils.Cache(layers=self._layers)
        """What the model is given."""
        if crossed:
            self._crossed = [_room(layer, int(layer.get_seq_length())) for layer in like.cross_attention_cache.layers]
            self.cache = cache_utils.EncoderDecoderCache(self.cache, cache_utils.Cache(layers=self._crossed))

    @staticmethod
    def shape_of(like: Any) -> tuple[Any, ...]:
        """What two caches have in common whose states go into the same memory."""
        if isinstance(like, cache_utils.EncoderDecoderCache):
            crossed = like.cross_attention_cache
            lengths = tuple(int(layer.get_seq_length()) for layer in crossed.layers)
            return (*FixedCache.shape_of(like.self_attention_cache), lengths, *FixedCache.shape_of(crossed))
        return tuple(
            (*(x.shape[i] for x in (layer.keys, layer.values) for i in (0, 1, 3)), layer.keys.dtype, layer.keys.device)
            for layer in like.layers
        )

    def load(self, cache: Any) -> None:
        """Take over what a cache holds."""
        if self._crossed:
            for layer, mine in zip(cache.cross_attention_cache.layers, self._crossed, strict=True):
                _fill(mine, _Held.of(layer))
            for i in range(len(self._crossed)):
                self.cache.is_updated[i] = True
            cache = cache.self_attention_cache
        for layer, mine in zip(cache.layers, self._layers, strict=True):
            _fill(mine, _Held.of(layer))

    def set_length(self, length: torch.Tensor) -> None:
        """Let the next token go behind so many, whatever lies there: a tensor of no dimensions, on the device."""
        for layer in self._layers:
            layer.cumulative_length.copy_(length)

    def append_to(self, cache: Any, start: int, stop: int) -> None:
        """Give a cache the states of the tokens from ``start`` to ``stop``."""
        if start >= stop:
            return
        own = cache.self_attention_cache if self._crossed else cache
        for layer, mine in zip(own.layers, self._layers, strict=True):
            layer.update(mine.keys[:, :, start:stop], mine.values[:, :, start:stop])


def _room(layer: Any, length: int) -> Any:
    """A static layer with room for so many tokens, of the shape of another layer."""
    room = cache_utils.StaticLayer(length)
    room.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
    return room


def _fill(room: Any, held: _Held) -> None:
    N, length = held.keys.shape[2], held.length
    for mine, theirs in ((room.keys, held.keys), (room.values, held.values)):
        mine[:, :, : length - N].zero_()
        mine[:, :, length - N : length].copy_(theirs)
        mine[:, :, length:].zero_()  # a sum of nothing times what was there before may be NaN
    room.cumulative_length.fill_(length)
