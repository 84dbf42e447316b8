"""The kernel backend that runs on GPUs: cubins loaded and launched through CuPy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from cutp.array import cuda, graph, programmatic_launch
from cutp.array.kernel_arguments import plain_argument
from cutp.array.kernel_cache import KernelCache
from cutp.array.kernel_source import read_source
from cutp.array.precompile import KernelSpec, build
from cutp.errors import ConfigError, DeviceError

PLAIN_SHARED_BYTES = 32 * 1024
"""Dynamic shared memory that a kernel may use without asking for it. The limit is 48 KB, with the static shared memory
and what aligning the dynamic one takes."""


class CudaBackend:
    """Builds a kernel on its first launch on a GPU and keeps it loaded. Used by any number of threads.

    Launches go to the calling thread's current GPU and CuPy stream.
    """

    def __init__(self, cache: KernelCache | None = None):
        """DeviceError if there is no GPU to use, with the reason. `cache` defaults to that of the process."""
        self._cupy = cuda.cupy()
        self._cache = cache
        self._functions: dict[tuple[str, tuple[str, ...], str, int], _Function] = {}
        self._modules: dict[tuple[str, tuple[str, ...], int], Any] = {}
        self._lock = threading.Lock()

    def launch(
        self, source: str, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], args: Sequence[Any],
        shared_bytes: int, defines: tuple[str, ...], pdl: bool,
    ) -> None:
        device = self._cupy.cuda.runtime.getDevice()
        function = self._functions.get((source, defines, name, device)) or self._load(source, defines, name, device)
        if shared_bytes > PLAIN_SHARED_BYTES:
            function.allow_shared(shared_bytes)
        graph.keep_for_capture(args)
        try:
            if pdl and function.pdl:
                stream = self._cupy.cuda.get_current_stream().ptr
                programmatic_launch.launch(function.pointer, grid, block, args, shared_bytes, stream)
            else:
                function.cupy_function(grid, block, [plain_argument(a) for a in args], shared_bytes)
        except (RuntimeError, TypeError, DeviceError) as error:  # CuPy's CUDADriverError is a RuntimeError
            raise DeviceError(
                f"kernel {name} of {source} ({' '.join(defines)}) cannot be launched with grid {grid}, block {block} "
                f"and {shared_bytes} bytes of dynamic shared memory: {error}"
            ) from error

    @property
    def capability(self) -> tuple[int, int]:
        """Of the current GPU, for example (9, 0)."""
        return cuda.device_info(self._cupy.cuda.runtime.getDevice()).capability

    def _load(self, source: str, defines: tuple[str, ...], name: str, device: int) -> _Function:
        with self._lock:
            function = self._functions.get((source, defines, name, device))
            if function is None:
                module = self._modules.get((source, defines, device))
                if module is None:
                    module = self._modules[source, defines, device] = self._load_module(source, defines, device)
                function = self._functions[source, defines, name, device] = _Function(module, source, name, device)
            return function

    def _load_module(self, source: str, defines: tuple[str, ...], device: int) -> Any:
        info = cuda.device_info(device)
        arch = read_source(source).arch_for(info.capability)
        kernel = build(KernelSpec(source, arch, defines), self._cache)
        module = self._cupy.cuda.function.Module()
        try:
            self._cupy.cuda.runtime.free(0)  # opens the GPU's context, into which the driver loads the code
            module.load(kernel.cubin)
        except RuntimeError as error:
            major, minor = info.driver_version
            raise DeviceError(
                f"the driver (CUDA {major}.{minor}) does not load {source}, built for {arch}, on {info.name}: {error}",
                hint="a driver of the same CUDA major version as the compiler's is needed",
            ) from error
        return module


class _Function:
    """One kernel loaded on one GPU."""

    def __init__(self, module: Any, source: str, name: str, device: int):
        try:
            self.cupy_function = module.get_function(name)
        except RuntimeError as error:
            raise ConfigError(f'{source} has no kernel {name} (is it extern "C"?): {error}') from error
        self.name = name
        self.device = device
        self.pointer = self.cupy_function.ptr
        self.pdl = programmatic_launch.is_supported(cuda.device_info(device).capability)
        self._allowed_shared = PLAIN_SHARED_BYTES

    def allow_shared(self, size: int) -> None:
        """Let launches use `size` bytes of dynamic shared memory. DeviceError if the GPU has less."""
        if size <= self._allowed_shared:
            return
        limit = cuda.device_info(self.device).shared_memory_per_block
        if size > limit:
            raise DeviceError(f"kernel {self.name} wants {size} bytes of shared memory per block, the GPU has {limit}")
        from cupy_backends.cuda.api import driver

        try:
            driver.funcSetAttribute(self.pointer, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)
        except RuntimeError as error:
            raise DeviceError(f"kernel {self.name} cannot use {size} bytes of dynamic shared memory beside its "
                              f"static shared memory (the GPU has {limit} in all): {error}") from error
        self._allowed_shared = size
