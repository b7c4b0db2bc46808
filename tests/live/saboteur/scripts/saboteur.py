"""Breaks a stage of a running WebUI when it is asked to: for tests/live/test_live_faults.py, and for nothing else.

Whoever may ask the server may break it by this: it must never be installed where others can.
"""

import copy
import ctypes
import errno
import gc
import importlib
import os
import sys
import threading
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from fastapi import Body
from modules import script_callbacks, scripts, shared

ERRORS = {
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
SPOILS = {
    "nan": lambda made: made * float("nan"),
    "wrong shape": lambda made: made[..., :-1],
    "another picture": lambda made: made[:0],
}
HOSTS = ("modules", "k_diffusion", "modules_forge", "backend", "ldm", "sgm")
"""Packages that are the WebUI's."""

undo = []
calls = []
seen = {}


def spoiled(made, how):
    return [spoiled(one, how) for one in made] if isinstance(made, list) else SPOILS[how](made)


def strike(place: str = Body(), after: int = Body(), fault: str = Body()):
    """Has a function, named as ``module:path``, fail from one of its calls on."""
    module, path = place.split(":")
    owner = importlib.import_module(module)
    *above, name = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    kept, own = vars(owner)[name], getattr(owner, name)
    calls.clear()

    def failing(*args, **kwargs):
        calls.append(len(calls))
        if calls[-1] < after:
            return own(*args, **kwargs)
        if fault in ERRORS:
            raise copy.copy(ERRORS[fault])
        if fault in STOPS:
            setattr(shared.state, fault, True)
            return own(*args, **kwargs)
        return spoiled(own(*args, **kwargs), fault)

    setattr(owner, name, staticmethod(failing) if isinstance(kept, staticmethod) else failing)
    undo.append(lambda: setattr(owner, name, kept))


def choose(options: dict):
    """Has options of the Settings tab be others."""
    for name, value in options.items():
        undo.append(partial(shared.opts.data.update, {name: getattr(shared.opts, name)}))
        shared.opts.data[name] = value


def mend(keep: int = Body(0, embed=True)):
    """Takes back all but the first changes; tells how often the stage was called."""
    while len(undo) > keep:
        undo.pop()()
    return {"calls": len(calls), "kept": len(undo)}


def held():
    """What every object that lives as long as the WebUI holds."""
    found = {n: m for n, m in sys.modules.items() if n.split(".")[0] in HOSTS}
    for module in list(found.values()):
        found.update({f"{module.__name__}.{n}": v for n, v in vars(module).items() if isinstance(v, type)})
    found.update({"opts": shared.opts, "runner": scripts.scripts_img2img})
    found.update({f"script {script.title()}": script for script in scripts.scripts_img2img.scripts})
    model = shared.sd_model
    found.update({f"model.{name}": part for name, part in named_parts(model)})
    return {f"{n}.{k}": v for n, owner in found.items() for k, v in list(getattr(owner, "__dict__", {}).items())}


def named_parts(model):
    """The model's modules; of Forge also what it patches them by."""
    for name, part in {"": model, **vars(getattr(model, "forge_objects", None) or object)}.items():
        yield name, part
        for inner in (part, getattr(part, "model", None), getattr(part, "patcher", None)):
            if isinstance(inner, torch.nn.Module):
                yield from ((f"{name}.{n}", m) for n, m in inner.named_modules())


def look():
    """What has changed since it was looked before, and what the WebUI says and holds."""
    now, ours = held(), {name for name in sys.modules if name.startswith("lib_unsampler.")}
    changed = [k for k in {*now, *seen} if now.get(k, seen) is not seen.get(k, now)] if seen else []
    seen.clear()
    seen.update(now)
    return {
        "changed": sorted(changed),
        "ours": sorted(k for k, v in now.items() if getattr(v, "__module__", None) in ours),
        "textinfo": shared.state.textinfo,
        "job": shared.state.job,
        "job_count": shared.state.job_count,
        "threads": [thread.name for thread in threading.enumerate()],
        "cwd": os.getcwd(),
    }


def counted(trace: bool = Body(False), trim: bool = Body(False)):
    """What the process holds: objects by type, bytes by line, memory before and after it is given back."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    told = {"rss": int(status["VmRSS"].split()[0])}
    if trim:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        told["trimmed"] = int(status["VmRSS"].split()[0])
    objects = gc.get_objects()
    told["objects"] = dict(Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in objects))
    tensors = {id(o): o.numel() * o.element_size() for o in objects if type(o) in (torch.Tensor, torch.nn.Parameter)}
    told["tensors"] = sum(tensors.values())
    if trace and not tracemalloc.is_tracing():
        tracemalloc.start(1)
    elif tracemalloc.is_tracing():
        told["traced"] = tracemalloc.get_traced_memory()[0]
        lines = tracemalloc.take_snapshot().statistics("lineno")
        told["lines"] = {f"{line.traceback[0].filename}:{line.traceback[0].lineno}": line.size for line in lines}
    return told


def add_routes(_, app):
    for route in (strike, choose, mend, look, counted):
        app.add_api_route(f"/saboteur/{route.__name__}", route, methods=["POST"])


script_callbacks.on_app_started(add_routes)
