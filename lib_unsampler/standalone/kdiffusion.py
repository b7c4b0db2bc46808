"""k-diffusion's samplers and schedules, from its own distribution, without the rest of it.

``import k_diffusion`` runs the package's ``__init__``, and with it the training code: torchvision, kornia, wandb, clip,
scikit-image. The samplers' own files ask for none of these. So the package is entered here without its ``__init__``,
and what its files import and hardly any sampler calls is imported when it is called: scipy by LMS, torchsde by the SDE
samplers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

PACKAGE = "k_diffusion"
LATER = ("scipy", "torchdiffeq", "torchsde", "torchvision.transforms")
"""What ``sampling.py`` and ``utils.py`` import beyond torch, Pillow, safetensors and tqdm."""


class Later:
    """A name of a module that need not be there before it is called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Later:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(name)
        return Later(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What it is calls, imported now."""
        return resolve_name(self._name)(*args, **kwargs)


def sampling() -> ModuleType:
    """``k_diffusion.sampling``; of the whole package, where that has been imported already.

    Raises:
        ModuleNotFoundError: where k-diffusion is not installed.
    """
    if PACKAGE in sys.modules:
        return import_module(f"{PACKAGE}.sampling")
    spec = find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    package = ModuleType(PACKAGE)
    package.__path__ = spec.submodule_search_locations
    stands: dict[str, Any] = {name: Later(name) for name in LATER if name not in sys.modules}
    sys.modules.update(stands, **{PACKAGE: package})
    try:
        return import_module(f"{PACKAGE}.sampling")
    except BaseException:
        del sys.modules[PACKAGE]
        raise
    finally:
        for name in stands:
            del sys.modules[name]
