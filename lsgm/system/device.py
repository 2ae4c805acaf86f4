"""The device that computations run on."""

from __future__ import annotations

import torch

from lsgm.errors import UserError

__all__ = [
    "choose_device",
]


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Return the device called `name`; "auto" is an accelerator if there is one, else the CPU.

    Times, noise levels and bounds are computed in float64, which a device has to have.

    An accelerator without an index gets the index `local_rank`, so that each process has its own.

    Raises:
        UserError: If there is no such device, or it has no float64.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        usable = accelerator is not None and _has_float64(accelerator)
        device = torch.device(accelerator.type if accelerator and usable else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"device: no device {name!r}; try auto, cpu, cuda, cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or accelerator.type != device.type:
        here = "none" if accelerator is None else accelerator.type
        raise UserError(
            f"device: {name} is not available here (accelerator: {here}); use cpu or auto"
        )
    if not _has_float64(device):
        raise UserError(
            f"device: {name} has no 64-bit floats, which times and bounds need; use cpu or auto"
        )
    index = local_rank if device.index is None else device.index
    if index >= torch.accelerator.device_count():
        raise UserError(
            f"device: {device.type}:{index} is not available, this machine has "
            f"{torch.accelerator.device_count()} {device.type} device(s)"
        )
    return torch.device(device.type, index)


def _has_float64(device: torch.device) -> bool:
    if device.type == "cuda":  # always; asking would start it
        return True
    try:
        torch.ones((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS; some XPUs
        return False
    return True
