"""Memory between two pages that may not be touched: what reads or writes next to a tensor ends its process."""

import ctypes
import mmap

import torch

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
NO_ACCESS = 0


def guarded(numbers: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of a flat tensor that begins, or ends, where such a page ends or begins."""
    size = numbers.numel() * numbers.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=numbers.dtype, count=numbers.numel(), offset=offset)
    return copy.copy_(numbers)


class GuardedCalls:
    """
    Gives the kernels of `kernels/cpu.py` copies of all tensors, each between two such pages, and takes the results
    back. Tensors that share memory share their copy.
    """

    def __init__(self, monkeypatch, cpu):
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.calls = 0
        self.run = cpu.run
        monkeypatch.setattr(cpu, "address", self.address)
        monkeypatch.setattr(cpu, "run", self.run_on_copies)

    def address(self, x: torch.Tensor | None) -> int | None:
        if x is None:
            return None
        if x.data_ptr() not in self.copies:
            length = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
            span = x.as_strided((length,), (1,))
            self.copies[x.data_ptr()] = span, guarded(span, at_end=self.calls % 2 == 0)
        return self.copies[x.data_ptr()][1].data_ptr()

    def run_on_copies(self, *arguments) -> None:
        self.run(*arguments)
        for span, copy in self.copies.values():
            span.copy_(copy)
        self.copies.clear()
        self.calls += 1
