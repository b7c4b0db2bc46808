"""One img2img request in a double of the host, and what tests ask of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The double's modules, the Script loaded as the host loads it, and ``run`` for one request."""
    with doubled_host(tmp_path, monkeypatch) as doubled:
        yield doubled


@contextmanager
def doubled_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The same for tests that share one host."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/webui/host_double"))
    script_module = load_script()
    from modules import processing, scripts, sd_models, sd_samplers, shared

    script = script_module.BatchUnsampler()
    runner = scripts.ScriptRunner(script)
    shared.opts.temp_dir = str(tmp_path / "temporary")
    shared.opts.outdir_img2img_samples = str(tmp_path / "out")
    model = processing.Model()
    model.sd_checkpoint_info = sd_models.checkpoint("doubled")
    sd_models.model_data.sd_model = model
    photo = Image.open(ROOT / "lib_unsampler/assets/cat.jpg").convert("RGB")

    def make(args: tuple[Any, ...] = (), selected: int = 0, **fields: Any) -> Any:
        fields = {"outpath_samples": str(tmp_path / "out"), "init_images": [photo], **fields}
        return processing.StableDiffusionProcessingImg2Img(
            sd_model=model, scripts=runner, script_args=(selected, *args), **fields
        )

    def run(settings: Any = None, **fields: Any) -> tuple[Any, Any]:
        reset_state(shared.state)
        p = make(() if settings is None else (settings,), **fields)
        return p, processing.process_images(p)

    torch_before = sampling.torch
    yield SimpleNamespace(
        **dict(run=run, make=make, runner=runner, shared=shared, processing=processing, script=script),
        **dict(sd_samplers=sd_samplers, out=tmp_path / "out"),
    )
    sampling.torch = torch_before
    forget_host()


FREE = {"routes"}
"""What knows no host; tests hold on to it."""


def forget_host() -> None:
    """Unloads the double and what is bound to it, so that the next test starts afresh."""
    from lib_unsampler import webui

    for name in [m for m in sys.modules if m.split(".")[0] == "modules"]:
        del sys.modules[name]
    for name in [name for name, module in vars(webui).items() if isinstance(module, ModuleType) and name not in FREE]:
        vars(webui).pop(name, None)
        for module in [m for m in sys.modules if f"{m}.".startswith(f"lib_unsampler.webui.{name}.")]:
            del sys.modules[module]


def load_script() -> ModuleType:
    """Executes scripts/batch_unsampler.py as the host does, from its file."""
    spec = importlib.util.spec_from_file_location("batch_unsampler.py", ROOT / "scripts/batch_unsampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reset_state(state: Any) -> None:
    state.__init__()


def record_start(host: SimpleNamespace, seen: list[torch.Tensor]) -> Callable[[], None]:
    """Has every sampler that is made note the x its function is really started with."""
    original = host.sd_samplers.create_sampler

    def create(name: str, model: Any) -> Any:
        sampler = original(name, model)
        function = sampler.func

        def noted(model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(x.clone())
            return function(model, x, *args, **kwargs)

        noted.__wrapped__ = function
        sampler.func = noted
        return sampler

    host.sd_samplers.create_sampler = create
    return lambda: setattr(host.sd_samplers, "create_sampler", original)


def latents_of(processed: Any) -> list[Any]:
    from lib_unsampler.core import trajectory

    return [trajectory.load(Path(f)) for f in processed.extra_generation_params["Unsampler latents"]]


def pixels(processed: Any) -> list[bytes]:
    return [image.tobytes() for image in processed.images]
