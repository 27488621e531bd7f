"""GPU memory that is given back and taken again at the same addresses.

Captured CUDA graphs hold addresses, so what they read cannot be freed and allocated anew. Here addresses are reserved once, and
memory is put behind them and taken away by the driver (CUDA driver API, "Virtual Memory Management"). torch's allocator does not
know of this memory, so the peak of both together is measured here.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint64
from functools import cache
from typing import Any

import torch
from torch import Tensor

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
DEVICE, PINNED, READ_AND_WRITE, FINEST = 1, 1, 3, 0  # values of the driver's enumerations


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(Properties), c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(Properties), c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(Access), c_size_t),
    "cuMemUnmap": (c_uint64, c_size_t),
}


class MappedMemory:
    """`num_bytes` of a GPU's memory, all zeros after it was taken; it is taken when it is made.

    It must not hold its own tensors: these hold it, in a way that Python's garbage collector cannot see.

    Raises:
        torch.OutOfMemoryError: there is not as much, even after torch gave back what it keeps.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # the driver's calls need the context that torch makes
        self.device, self.num_bytes, self.is_taken = device, num_bytes, False
        self._location = Location(DEVICE, device.index)
        self._properties = Properties(type=PINNED, location=self._location)
        unit, address = c_size_t(), c_uint64()
        _call("cuMemGetAllocationGranularity", byref(unit), byref(self._properties), FINEST)
        self._size = -(-num_bytes // unit.value) * unit.value
        _call("cuMemAddressReserve", byref(address), self._size, 0, 0, 0)
        self._address = address.value
        weakref.finalize(self, _free, device, self._address, self._size).atexit = False  # the driver does it then
        _ALL.add(self)
        self.take()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.num_bytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def tensor(self) -> Tensor:
        """All of it, (num_bytes,) uint8. Only while it is taken; the tensor keeps this object, and its addresses."""
        return torch.as_tensor(self, device=self.device)

    def take(self) -> None:
        """Have memory again, all zeros; raises as the class. Nothing happens if it was not released."""
        if self.is_taken:
            return
        handle = self._allocate()
        _keep_peak(self.device)
        try:
            _call("cuMemMap", self._address, self._size, 0, handle, 0)
        finally:
            _call("cuMemRelease", handle)  # the mapping keeps the memory
        self.is_taken = True
        try:
            _call("cuMemSetAccess", self._address, self._size, byref(Access(self._location, READ_AND_WRITE)), 1)
        except RuntimeError:
            self.release()
            raise
        self.tensor().zero_()

    def release(self) -> None:
        """Give the memory back, once the GPU has done what was asked of it. Until `take` nothing may touch the tensors."""
        if not self.is_taken:
            return
        torch.cuda.synchronize(self.device)
        _keep_peak(self.device)
        _call("cuMemUnmap", self._address, self._size)
        self.is_taken = False

    def _allocate(self) -> int:
        handle = c_uint64()
        for last in (False, True):
            try:
                _call("cuMemCreate", byref(handle), self._size, byref(self._properties), 0)
                break
            except torch.OutOfMemoryError:
                if last:
                    gib = self._size / 2**30
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to map {gib:.2f} GiB.") from None
            torch.cuda.empty_cache()  # torch keeps what it has freed
        return handle.value


def missing() -> str | None:
    """Why there is no such memory on this machine, as far as that can be told without touching a GPU; None if there may be."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if torch.version.hip is not None:
        return "that takes CUDA, not ROCm"
    try:
        _driver()
    except OSError as error:
        return f"CUDA's driver library cannot be loaded ({error})"
    return None


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
    return library


def _call(name: str, *arguments: Any) -> None:
    """Raises torch.OutOfMemoryError or another RuntimeError if the driver's function fails."""
    if code := getattr(_driver(), name)(*arguments):
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        if code == OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory in {name}")
        raise RuntimeError(f"{name}: CUDA error {code}, {(text.value or b'unknown').decode()}")


def _free(device: torch.device, address: int, size: int) -> None:
    with suppress(RuntimeError):  # the GPU may be in an error that was raised elsewhere
        torch.cuda.synchronize(device)
    _driver().cuMemUnmap(address, size)  # which fails, and does nothing, where it was released
    _driver().cuMemAddressFree(address, size)


# ---- how much is in use ----------------------------------------------------------------------------------------------

_ALL: weakref.WeakSet[MappedMemory] = weakref.WeakSet()  # of this process, which has one GPU
_peaks: dict[torch.device, int] = {}


def taken_bytes() -> int:
    """What is taken now."""
    return sum(each.num_bytes for each in _ALL if each.is_taken)


def released_bytes() -> int:
    """What is released now, and will be taken again."""
    return sum(each.num_bytes for each in _ALL if not each.is_taken)


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` start from what is in use now."""
    torch.cuda.reset_peak_memory_stats(device)
    _peaks.pop(device, None)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that torch's tensors and mapped memory took at once since the reset."""
    return max(_peaks.get(device, 0), torch.cuda.max_memory_allocated(device) + taken_bytes())


def _keep_peak(device: torch.device) -> None:
    """Before `taken_bytes` changes."""
    _peaks[device] = peak_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
