"""Profiles: what was learnt about a model offline, in a file beside the recipe."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from winnow.types import Profile

__all__ = ["load_profile", "save_profile"]


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write a profile as safetensors, atomically.

    Raises
    ------
    OSError
        No space, no permission or no such directory; what was at ``path`` stays.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in profile.tensors.items()}
        save_file(tensors, name, metadata={"winnow": profile.kind, "model": profile.model})
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_profile(path: str | Path, *, model: str) -> Profile:
    """Read a profile that was made for the model of fingerprint ``model``.

    Raises
    ------
    ValueError
        If there is none at ``path``, it is no profile, or it was made for another model.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the profile {path} cannot be read ({error}); make one for your model") from None
    if "winnow" not in metadata or "model" not in metadata:
        raise ValueError(f"{path} is no profile of Winnow; make one with the command that its method names")
    if metadata["model"] != model:
        raise ValueError(
            f"the profile {path} was made for another model ({metadata['model'][:12]}, not {model[:12]}); "
            "make one for this model"
        )
    return Profile(kind=metadata["winnow"], model=metadata["model"], tensors=tensors)
