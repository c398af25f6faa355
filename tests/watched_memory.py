"""
What Triton's interpreter does not show by itself: it runs one program after the other, reads whatever lies at an
address, and has zeros in the place of what is masked. A GPU runs them at the same time, may fault, and has anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class Watch:
    """
    The memory accesses of one launch.

    Args:
        tensors (`list[torch.Tensor]`): What the kernel was given.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        spans = [span(x) for x in tensors if x.numel() > 0]
        self.starts, self.ends = np.array(sorted(spans), dtype=np.int64).reshape(-1, 2).T
        self.ends = np.maximum.accumulate(self.ends)  # of views that lie in one another
        self.loads: list[tuple[int, np.ndarray]] = []
        self.stores: list[tuple[int, np.ndarray]] = []

    def note(self, accesses: list, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, columns, layers = interpreter.interpreter_builder.grid_dim
        addresses = pointers[np.broadcast_to(mask.astype(bool), pointers.shape)].astype(np.int64)
        places = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (places >= 0) & (addresses + itemsize <= self.ends[places])
        assert inside.all(), f"{(~inside).sum()} accesses of program {x, y, z} are outside of all tensors"
        accesses.append(((x * columns + y) * layers + z, addresses))

    def check_programs(self) -> None:
        """No program reads or writes what another one writes."""
        written, writers = joined(self.stores)
        order = np.argsort(written, kind="stable")
        written, writers = written[order], writers[order]
        twice = (written[1:] == written[:-1]) & (writers[1:] != writers[:-1])
        assert not twice.any(), f"{twice.sum()} numbers are written by more than one program"
        read, readers = joined(self.loads)
        places = np.minimum(np.searchsorted(written, read), len(written) - 1)
        others = (written[places] == read) & (writers[places] != readers)
        assert not others.any(), f"{others.sum()} numbers are read by one program and written by another"


def span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def joined(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses, and the program of each."""
    programs = [np.full(addresses.size, program) for program, addresses in accesses]
    return np.concatenate([addresses for _, addresses in accesses]), np.concatenate(programs)


@contextmanager
def watched() -> Iterator[None]:
    """Checks every launch of a kernel under the interpreter."""
    watches: list[Watch] = []
    native, executor, builder = interpreter._interpreter, interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, start, masked_load = executor.__call__, executor._init_args_hst, builder.create_masked_load

    class Interpreter:
        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, pointers, mask, other, dtype):
            watches[-1].note(watches[-1].loads, pointers, mask, np.dtype(dtype).itemsize)
            return native.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            watches[-1].note(watches[-1].stores, pointers, mask, value.dtype.itemsize)
            return native.store(pointers, value, mask)

    def started(self, args, kwargs):
        args, kwargs = start(self, args, kwargs)
        watches.append(Watch([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]))
        return args, kwargs

    def launched(self, *args, **kwargs):
        launch(self, *args, **kwargs)
        watches.pop().check_programs()

    def load_or_poison(self, pointers, mask, other, *rest):
        if other is None:  # what a GPU gives is anything then
            kind = pointers.get_element_ty()
            numbers = np.full(pointers.data.size, -1, dtype=f"i{np.dtype(interpreter._get_np_dtype(kind)).itemsize}")
            numbers = numbers.view(interpreter._get_np_dtype(kind)).reshape(pointers.data.shape)
            other = interpreter.TensorHandle(numbers, kind)
        return masked_load(self, pointers, mask, other, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load_or_poison)
        patch.setattr(interpreter, "_interpreter", Interpreter())
        patch.setattr(executor, "_init_args_hst", started)
        patch.setattr(executor, "__call__", launched)
        yield
