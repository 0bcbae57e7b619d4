"""When a device has too little memory for a weight: once more with all of it free, then on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from pissa_hub.errors import ResourceError
from pissa_hub.pipeline.planned import PlannedWeight
from pissa_hub.pipeline.stream import Made, Worker

W = TypeVar("W", bound=PlannedWeight)
_CPU = torch.device("cpu")
# What cuBLAS, cuSOLVER and the CPU's allocator say.
_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class Resilient(Generic[W]):
    """A worker that another one stands in for.

    Args:
        equip: makes a worker for a device.
        device: where to work if it can be done there.
        note: told of every weight that is not.
    """

    def __init__(
        self, equip: Callable[[torch.device], Worker[W]], device: torch.device, note: Callable[[str], None]
    ) -> None:
        self._equip = equip
        self._device = device
        self._note = note
        self._worker: Worker[W] | None = equip(device)

    def __call__(self, weight: W, data: memoryview) -> Made:
        """Raises ResourceError if the CPU's memory is too small as well."""
        # A worker may have begun to write the result where the weight was.
        stored = None if self._device == _CPU else bytes(data)
        for device in (self._device, *([] if stored is None else [self._device, _CPU])):
            try:
                made = self._on(device, weight, data)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._worker = None
            else:
                if device != self._device:
                    self._note(f"{weight.name} does not fit in the memory of {self._device}; it was done on the CPU")
                return made
            torch.cuda.empty_cache()
            if stored is not None:
                data[:] = stored
        raise ResourceError(
            f"{weight.name} needs more memory than there is", "use a machine with more, or fewer threads"
        )

    def _on(self, device: torch.device, weight: W, data: memoryview) -> Made:
        if device != self._device:
            return self._equip(device)(weight, data)
        if self._worker is None:
            self._worker = self._equip(device)
        return self._worker(weight, data)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, or of the libraries below it, is about memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
