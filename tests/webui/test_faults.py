"""Every stage of a request times every fault: what is said, what is kept, what is left behind, and img2img after it."""

from __future__ import annotations

import copy
import errno
import importlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import doubled_host, pixels, reset_state
from PIL import Image
from safetensors import safe_open

from lib_unsampler.core import trajectory

Own = Callable[..., Any]


@dataclass(frozen=True)
class Stage:
    """Where a fault strikes: a function, by the module or class that it is looked up in, and its how-manieth call."""

    place: str
    settings: dict[str, Any]
    after: int = 0
    request: dict[str, Any] = field(default_factory=dict)
    spoils: tuple[str, ...] = ()
    """How what it makes is spoiled in place of an error."""


INVERT = {"mode": "invert", "output": ["frames", "init"], "cfg": 3}
REPLAY = {"mode": "replay", "output": ["latents", "init"]}
ALL = {"output": ["frames", "animation", "contact sheet", "sigma curve", "latents", "comfyui", "init"]}
EULER_A = {"sampler_name": "Euler a"}
MODEL = "modules.sd_samplers_cfg_denoiser:CFGDenoiser.forward"
WEBUI = "lib_unsampler.webui"
FILM = {"output": ["animation", "init"], "film": "both"}
DRAWN = {"output": ["frames"], "noise": "independent"}


SPOILED = ("nan", "wrong shape", "another picture")


def moving(form: str) -> dict[str, Any]:
    return {"output": ["animation"], "format": form}


def writer(form: str) -> str:
    name = {"gif": "Gif", "webp": "WebP", "apng": "Apng"}.get(form)
    return f"lib_unsampler.pictures.containers:{name}" if name else "lib_unsampler.pictures.video:Mp4"


STAGES: dict[str, Stage] = {
    "settings": Stage(f"{WEBUI}.extension:parse_args", {}),
    "preferences": Stage(f"{WEBUI}.extension:preferences", {}),
    "a latents file": Stage("lib_unsampler.page.shelf:read", {"output": ["init"], "trajectory": "x.safetensors"}),
    "the sampler": Stage("modules.sd_samplers:create_sampler", ALL),
    "schedule, checked": Stage("modules.sd_samplers_kdiffusion:KDiffusionSampler.get_sigmas", ALL, spoils=SPOILED),
    "schedule": Stage("modules.sd_samplers_kdiffusion:KDiffusionSampler.get_sigmas", ALL, 2, spoils=SPOILED[:2]),
    "the host's encoder": Stage("modules.processing:encode", ALL, spoils=SPOILED),
    "noise": Stage("modules.rng:ImageRNG.next", DRAWN, 0, spoils=SPOILED),
    "noise, second draw": Stage("modules.rng:ImageRNG.next", DRAWN, 2, spoils=SPOILED),
    "noise, on its thread": Stage("modules.rng:ImageRNG.next", DRAWN, 4, spoils=SPOILED),
    "model, call 0": Stage(MODEL, INVERT, 0, spoils=SPOILED),
    "model, call 2": Stage(MODEL, INVERT, 2, spoils=SPOILED),
    "model, call 7": Stage(MODEL, INVERT, 7, spoils=SPOILED),
    "model, reverse": Stage(MODEL, {**INVERT, "solver": "reverse"}, 2, spoils=SPOILED),
    "model, replay": Stage(MODEL, REPLAY, 2, EULER_A, spoils=SPOILED),
    "model, replaying": Stage(MODEL, REPLAY, 7, EULER_A, spoils=SPOILED),
    "model, init": Stage(MODEL, ALL, 2, spoils=SPOILED[:2]),
    "model, sweep": Stage(MODEL, {"output": ["strength sweep"]}, 2, spoils=SPOILED[:2]),
    "model, guide": Stage(MODEL, {"output": ["guide"]}, 2, spoils=SPOILED[:2]),
    "model, film": Stage(MODEL, FILM, 2, spoils=SPOILED[:2]),
    "guide": Stage(f"{WEBUI}.onward:sample_guided", {"output": ["guide"]}),
    "listening": Stage("lib_unsampler.pictures.film:Film.listen", FILM, 1),
    "the host's decoder, before a film's end": Stage("modules.processing:decode_latent_batch", FILM, 11),
    "the host's saving, before a film's end": Stage("modules.images:save_image", FILM, 0),
    "decoder": Stage("modules.processing:decode_latent_batch", ALL, 0, spoils=SPOILED),
    "decoder, later": Stage("modules.processing:decode_latent_batch", ALL, 4, spoils=SPOILED),
    "pictures, on their thread": Stage(f"{WEBUI}.showing:render.to_pictures", ALL, 3),
    "caption": Stage("lib_unsampler.pictures.render:captioned", {**ALL, "captions": True}, 3),
    "deflating": Stage("lib_unsampler.pictures.png:deflated", ALL, 3),
    "one save": Stage("modules.images:save_image", ALL, 0),
    "a later save": Stage("modules.images:save_image", ALL, 4),
    "the last saves": Stage("modules.images:save_image", ALL, 10),
    "a picture in the reply": Stage(f"{WEBUI}.naming:saved_item", ALL, 3),
    "a temporary file": Stage(f"{WEBUI}.filing:temporary_file", ALL, 0),
    "temporary file of latents": Stage(f"{WEBUI}.filing:temporary_file", ALL, 1),
    "temporary file of a film": Stage(f"{WEBUI}.batch:temporary_file", {"output": ["frames", "init"], "film": "both"}),
    "temporary file of a sweep": Stage(f"{WEBUI}.sweep:temporary_file", {"output": ["strength sweep"]}),
    "sheet": Stage("lib_unsampler.pictures.render:contact_sheet", ALL),
    "curve": Stage("lib_unsampler.pictures.render:sigma_curve", ALL),
    "report": Stage("lib_unsampler.pictures.roundtrip:page", {**INVERT, "report": True}),
    "keeping levels": Stage("lib_unsampler.core.kept:Kept.add", ALL, 3),
    "latents": Stage("lib_unsampler.core.trajectory:save", ALL),
    "ComfyUI's latents": Stage("lib_unsampler.core.comfy:save_latent", ALL),
    "moving a file": Stage(f"{WEBUI}.host.saving:shutil.copyfile", ALL),
    "moving a later file": Stage(f"{WEBUI}.host.saving:shutil.copyfile", ALL, 1),
    "sweep's pictures": Stage(f"{WEBUI}.sweep:finished", {"output": ["strength sweep"]}, 1),
    "what is told": Stage(f"{WEBUI}.reply:Reply.told", ALL),
    "handing over": Stage(f"{WEBUI}.extension:put_first", ALL),
}
for form in ("gif", "webp", "apng", "mp4"):
    for part, after in (("begin", 0), ("encode", 2), ("add", 2), ("finish", 0)):
        STAGES[f"{form}, {part}"] = Stage(f"{writer(form)}.{part}", moving(form), after)

ERRORS: dict[str, BaseException] = {
    "exception": RuntimeError("no kernel image"),
    "odd exception": KeyError("no such key"),
    "bad value": ValueError("strange value"),
    "out of memory": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "out of the machine's memory": MemoryError("cannot hold that"),
    "full disk": OSError(errno.ENOSPC, "No space left on device", "x.tmp"),
    "read-only folder": OSError(errno.EROFS, "Read-only file system", "x.tmp"),
    "locked folder": PermissionError(errno.EACCES, "Permission denied", "x.tmp"),
}
STOPS = ("interrupted", "skipped", "stopping_generation")
SPOILS: dict[str, Callable[[Any], Any]] = {
    "nan": lambda made: made * float("nan"),
    "wrong shape": lambda made: made[..., :-1],
    "another picture": lambda made: made[:0],
}


def spoiled(made: Any, how: str) -> Any:
    return [spoiled(one, how) for one in made] if isinstance(made, list) else SPOILS[how](made)


def looked_up(place: str) -> tuple[Any, str]:
    module, path = place.split(":")
    owner: Any = importlib.import_module(module)
    *above, name = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    return owner, name


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    patch = pytest.MonkeyPatch()
    with doubled_host(tmp_path_factory.mktemp("host"), patch) as doubled:
        sys.modules["modules.sd_models"].model_data.sd_model.scale_factor = 0.18215  # known to ComfyUI
        doubled.plain = pixels(plain(doubled))
        yield doubled
    patch.undo()


def plain(host: SimpleNamespace) -> Any:
    """img2img of a host that has no scripts at all."""
    reset_state(host.shared.state)
    p = host.make()
    p.scripts = None
    return host.processing.process_images(p)


def strike(host: SimpleNamespace, stage: Stage, fault: str, patch: pytest.MonkeyPatch) -> list[int]:
    """Has a stage fail from one call on; returns the calls, one by one."""
    owner, name = looked_up(stage.place)
    kept = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
    own = getattr(owner, name)
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] < stage.after:
            return own(*args, **kwargs)
        if fault in ERRORS:
            raise copy.copy(ERRORS[fault])
        if fault in STOPS:
            setattr(host.shared.state, fault, True)
            return own(*args, **kwargs)
        return spoiled(own(*args, **kwargs), fault)

    patch.setattr(owner, name, staticmethod(failing) if isinstance(kept, staticmethod) else failing)
    return calls


def attributes(host: SimpleNamespace) -> dict[str, Any]:
    """What every host object holds: modules, their classes, the objects that live as long as the host."""
    modules = {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("modules", "k_diffusion")}
    found: dict[str, Any] = dict(modules)
    for module in modules.values():
        found |= {f"{module.__name__}.{n}": v for n, v in vars(module).items() if isinstance(v, type)}
    found |= {"runner": host.runner, "script": host.script, "opts": host.shared.opts}
    model = sys.modules["modules.sd_models"].model_data
    found |= {"model_data": model, "model": model.sd_model}
    return {f"{n}.{k}": id(v) for n, owner in found.items() for k, v in vars(owner).items() if k not in FREE}


FREE = {"__builtins__", "swallowed", "_abc_impl", "__annotations__", "torch"}
"""k-diffusion's torch is the host's own hijack, which stays after each of its samplings."""


def check_whole(file: Path) -> None:
    """A file that opens, to its last byte."""
    if file.suffix in (".safetensors", ".latent"):
        with safe_open(file, framework="pt") as opened:
            assert all(torch.isfinite(opened.get_tensor(name)).all() for name in opened.keys())  # noqa: SIM118
        if file.suffix == ".safetensors":
            trajectory.load(file)
    elif file.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(file)) as film:
            assert list(film.decode(video=0))
    else:
        with Image.open(file) as picture:
            for frame in range(getattr(picture, "n_frames", 1)):
                picture.seek(frame)
                picture.load()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("unsampler")]


def outcome(host: SimpleNamespace, p: Any) -> tuple[BaseException | None, Any]:
    """How the host's own page and API make a request: what is raised or made."""
    host.runner.swallowed.clear()
    with closing(p):
        try:
            return None, host.processing.process_images(p)
        except BaseException as error:
            return error.with_traceback(None), None


OWN_NAME = re.compile(r"[0-9]{5}-[0-9]+\.png")
"""The host's name of its own picture."""


def words(fault: str) -> str:
    """What of a fault a user must hear."""
    error = ERRORS[fault]
    return str(error.args[1] if isinstance(error, OSError) else error.args[0])


def check_said(stage: Stage, fault: str, p: Any, error: BaseException | None, processed: Any, saved: set[str]) -> None:
    """A clear message, or a result that says what it lacks."""
    told = [*p.comments, getattr(processed, "comments", "")]
    said = str(error) if error is not None else "; ".join(told)
    if fault in ERRORS:
        assert words(fault) in said
        assert error is not None or "not whole" in said or "not shown" in said
        assert all(name in said for name in saved if not OWN_NAME.fullmatch(name))
    elif fault in STOPS:
        assert error is None or "trajectory" in stage.settings
    elif error is not None:
        assert re.search("finite|NaN|shape|picture|frame|size", said)


CASES = [(name, fault) for name, stage in STAGES.items() for fault in (*ERRORS, *STOPS, *stage.spoils)]


@pytest.mark.parametrize(("name", "fault"), CASES)
@pytest.mark.one_of(5)
def test_a_fault_is_said_and_leaves_nothing(
    host: SimpleNamespace, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES[name]
    out, temporary = Path(host.shared.opts.outdir_img2img_samples), Path(host.shared.opts.temp_dir)
    before, there, kept = attributes(host), names(out), names(temporary)
    reset_state(host.shared.state)
    p = host.make((stage.settings,), **stage.request)
    with monkeypatch.context() as patch:
        calls = strike(host, stage, fault, patch)
        error, processed = outcome(host, p)
    assert len(calls) > stage.after, "the fault never struck"
    for file in names(out) - there:
        check_whole(out / file)
    check_said(stage, fault, p, error, processed, names(out) - there)
    assert host.shared.state.textinfo is None
    assert not {"init", "sample", "save_samples", "close", "batch_unsampler"} & set(vars(p))
    deadline = time.monotonic() + 2
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not our_threads()
    assert error is None or names(temporary) == kept
    assert attributes(host) == before
    assert pixels(plain(host)) == host.plain
