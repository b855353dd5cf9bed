"""A key-value cache that grows in place, where transformers' own copies everything for each token."""

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_STEP_TOKENS = 128  # how far the cache grows at a time


class _GrowingLayer(DynamicLayer):
    """A cache layer that writes into room set aside."""

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, both (B, heads, L, width), and return all of them as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            larger = _room_for(key_states, end), _room_for(value_states, end)
            if start:
                larger[0][:, :, :start], larger[1][:, :, :start] = self.keys, self.values
            self._room = larger
        keys, values = self._room
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if self._room is not None:
            end = self.get_seq_length()
            keys, values = self._room[0][indices], self._room[1][indices]
            self._room = keys, values
            self.keys, self.values = keys[:, :, :end], values[:, :, :end]


def _room_for(states: Tensor, length: int) -> Tensor:
    return states.new_empty(*states.shape[:2], length + _STEP_TOKENS, states.shape[-1])


def growing_cache(model: nn.Module) -> DynamicCache:
    """The cache that the model's config asks for; layers with a window or a state of their own stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
