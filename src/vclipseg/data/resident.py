"""Volumes that stay on a device, so that patches are cut and changed there and nothing is sent in a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Resident:
    """Moves each volume to a device once, as long as there is room; what has none goes there each time.

    Args:
        device: where volumes are held.
        room: bytes that they may take.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        self.device = device
        self.room = room
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, read: Callable[[], np.ndarray]) -> Tensor:
        """The volume of that name on the device; what is not held there is read."""
        if name not in self.held:
            volume = torch.from_numpy(read()).to(self.device)
            if volume.nbytes > self.room:
                return volume
            self.room -= volume.nbytes
            self.held[name] = volume
        return self.held[name]
