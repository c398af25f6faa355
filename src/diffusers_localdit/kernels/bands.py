# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""Rows of windows and the tokens in them, which the CPU kernels read and write where they lie."""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..transformer_localdit import WindowGeometry

# Places and runs of all bands, by the geometry's map and the size of a band: geometries are kept from call to call, so
# that each is cut up once. Nothing here may hold that map.
known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Band(NamedTuple):
    """
    Some whole rows of n windows, and their tokens in the order of the token map.

    Attributes:
        geometry (`WindowGeometry`): Of these windows.
        places (`torch.Tensor` of shape `(n, w*w)`): of each window's members among the tokens; -1 for padding.
        runs (`tuple` of `slice`):
            where the tokens lie in the token map: next to each other, or at its start and at its end, if the shift
            brought these together.
    """

    geometry: WindowGeometry
    places: torch.Tensor
    runs: tuple[slice, ...]

    def take(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The band's tokens `(B, l, C)` of `(B, L, C)`."""
        runs = [hidden_states[:, run] for run in self.runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)

    def put(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Puts the band's tokens `(B, l, C)` where they belong in `(B, L, C)`."""
        lengths = [run.stop - run.start for run in self.runs]
        for run, part in zip(self.runs, tokens.split(lengths, dim=1)):
            hidden_states[:, run] = part


def places_and_runs(part: WindowGeometry) -> tuple[torch.Tensor, tuple[slice, ...]]:
    tokens = part.window_to_token[~part.padding].sort().values
    places = torch.searchsorted(tokens, part.window_to_token).masked_fill(part.padding, -1)
    gap = (tokens.diff() > 1).nonzero().flatten()
    first, last = torch.cat([tokens[:1], tokens[gap + 1]]), torch.cat([tokens[gap], tokens[-1:]])
    return places, tuple(map(slice, first.tolist(), (last + 1).tolist()))


def split_into_bands(geometry: WindowGeometry, size: int | None) -> list[Band]:
    """Bands of about `size` tokens, of one row of windows at least; for `None` all in one."""
    parts = geometry.split(size)
    by_size = known.setdefault(geometry.map_to_token, {})
    if size not in by_size:
        by_size[size] = [places_and_runs(part) for part in parts]
    return [Band(part, *rest) for part, rest in zip(parts, by_size[size])]
