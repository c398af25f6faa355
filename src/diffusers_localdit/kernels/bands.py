# Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
"""Rows of windows and the tokens in them, which the CPU kernels read and write where they lie."""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..transformer_localdit import WindowGeometry

# By the geometry's map and the size of a band: geometries are kept from call to call, so that each is cut up once.
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


def make_band(geometry: WindowGeometry) -> Band:
    tokens = geometry.window_to_token[~geometry.padding].sort().values
    places = torch.searchsorted(tokens, geometry.window_to_token).masked_fill(geometry.padding, -1)
    gap = (tokens.diff() > 1).nonzero().flatten()
    first, last = torch.cat([tokens[:1], tokens[gap + 1]]), torch.cat([tokens[gap], tokens[-1:]])
    return Band(geometry, places, tuple(map(slice, first.tolist(), (last + 1).tolist())))


def split_into_bands(geometry: WindowGeometry, size: int | None) -> list[Band]:
    """Bands of about `size` tokens, of one row of windows at least; for `None` all in one."""
    bands = known.setdefault(geometry.map_to_token, {})
    if size not in bands:
        bands[size] = [make_band(part) for part in geometry.split(size)]
    return bands[size]
