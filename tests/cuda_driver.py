"""Loads PTX and launches its kernel through the CUDA driver, with nothing between: as TensorRT launches a plugin's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

_LIBRARY = "libcuda.so.1"


class Driver:
    """The driver's functions that a launch takes, in the context that torch made current."""

    def __init__(self) -> None:
        torch.cuda.current_stream().synchronize()  # makes the context
        self._library = ctypes.CDLL(_LIBRARY)

    def load(self, ptx: str, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self._check("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        return function

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        arguments: Sequence[torch.Tensor | int | None],
    ) -> None:
        """A tensor is passed as its address, an int in 32 bits, None as a null pointer."""
        values = [
            ctypes.c_int32(value)
            if isinstance(value, int)
            else ctypes.c_void_p(None if value is None else value.data_ptr())
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = [ctypes.c_uint(size) for size in (*grid, *block, shared_bytes)]
        self._check("cuLaunchKernel", function, *sizes, stream, pointers, None)
        torch.cuda.synchronize()

    def _check(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")
