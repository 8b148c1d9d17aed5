"""Numbers that the host writes and a device reads, at places that never change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Mirror:
    """On the CPU both sides are one memory. Elsewhere `send` copies what `host` holds to `device`, and the host does
    not wait for it. `at` is the device's memory, where it is there already."""

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        *,
        dtype: torch.dtype = torch.long,
        at: Tensor | None = None,
    ) -> None:
        self.device = torch.zeros(tuple(shape), dtype=dtype, device=device) if at is None else at
        self._is_shared = self.device.device.type == "cpu"
        # Pinned memory is copied while the host goes on.
        is_pinned = self.device.device.type == "cuda"
        self._host = self.device if self._is_shared else torch.zeros(tuple(shape), dtype=dtype, pin_memory=is_pinned)
        self.host: NDArray[np.generic] = self._host.numpy()
        self._sent: torch.cuda.Event | None = None

    @property
    def on_host(self) -> Tensor:
        """The host's side as a tensor."""
        return self._host

    def begin(self) -> None:
        """To be called before the host writes: waits until the last copy has been made."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Copy to the device, in the order of its current stream."""
        if self._is_shared:
            return
        self.device.copy_(self._host, non_blocking=True)
        if self.device.device.type == "cuda":
            self._sent = self._sent or torch.cuda.Event()
            self._sent.record()
