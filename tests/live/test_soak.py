"""Many mixed requests through a running WebUI's API, from two clients at once, while its page asks too.

Every answer is what the same request gave alone, and the server holds no more at the end than at the beginning.
Run with ``-m live -s``. ``SOAK_REQUESTS`` (500) and ``SOAK_SECONDS`` (1800) bound it. Of a server on this machine
memory, handles, threads and temporary files are read from /proc; with tests/live/saboteur beside the extension (see
test_live_faults.py) also what is in use once all memory that can be is given back. Start the server with
``MALLOC_ARENA_MAX=1``: with an arena a thread, malloc keeps pieces in each, without this extension too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_live import URL, ask, img2img, opened

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "500"))
SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
EVERY = 10
"""Answers between two looks at the server."""
SMALL = {"width": 64, "height": 64, "steps": 4}
EULER = {**SMALL, "sampler_name": "Euler"}

MIXED: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (None, SMALL),
    "plain, Euler": (None, EULER),
    "frames": ({"output": ["frames"]}, SMALL),
    "two images": ({"output": ["frames"], "noise": "independent"}, {**SMALL, "batch_size": 2}),
    "two batches": ({"output": ["frames"], "noise": "path"}, {**SMALL, "n_iter": 2}),
    "GIF": ({"output": ["animation"], "captions": True}, SMALL),
    "WebP": ({"output": ["animation"], "format": "webp", "ping_pong": True}, SMALL),
    "APNG": ({"output": ["animation"], "format": "apng", "reverse": True}, SMALL),
    "sheet and curve": ({"output": ["contact sheet", "sigma curve"]}, SMALL),
    "latents": ({"output": ["latents", "frames"]}, SMALL),
    "init": ({"output": ["init"], "noise": "independent"}, SMALL),
    "inversion": ({"mode": "invert", "output": ["init"], "report": True, "max_calls": 8}, EULER),
    "reverse": ({"mode": "invert", "solver": "reverse", "output": ["init", "frames"], "panel": True}, EULER),
    "replay": ({"mode": "replay", "output": ["init"]}, SMALL),
    "guide": ({"output": ["guide"], "noise": "path"}, SMALL),
    "sweep": ({"output": ["strength sweep"]}, SMALL),
    "film": ({"output": ["animation", "init"], "film": "both", "format": "webp"}, SMALL),
    "a bad field": ({"noise": "pink"}, SMALL),
    "a bad prompt's file": ({"output": ["init"], "trajectory": "../x.safetensors"}, SMALL),
    "a bad sampler": ({"mode": "replay", "output": ["init"]}, EULER),
}


def answer(name: str) -> str:
    """What a request is answered with, in short."""
    settings, fields = MIXED[name]
    reply = img2img(settings, **fields)
    if "images" not in reply:
        assert reply["status"] == 422, reply
        return str(reply["detail"])
    return hashlib.sha256("\n".join(reply["images"]).encode()).hexdigest()


@dataclass(frozen=True)
class Held:
    """What a server holds: megabytes, open files, threads, temporary files."""

    memory: float
    handles: int
    threads: int
    temporary: int


def server() -> int | None:
    """The process that listens at the address, if it is one of this machine's."""
    port = str(urlsplit(URL).port).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--port" in words and words[words.index(b"--port") + 1] == port:
            return int(process.name)
    return None


def environment(pid: int) -> dict[str, str]:
    words = os.fsdecode((Path("/proc") / str(pid) / "environ").read_bytes()).split("\0")
    return dict(word.partition("=")[::2] for word in words)


def held(pid: int) -> Held:
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    folder = Path(environment(pid).get("GRADIO_TEMP_DIR", "/tmp/gradio"))
    temporary = sum(file.is_file() for file in folder.rglob("*")) if folder.exists() else 0
    handles = len(os.listdir(process / "fd"))
    return Held(int(status["VmRSS"].split()[0]) / 1024, handles, int(status["Threads"]), temporary)


def in_use() -> float:
    """Megabytes, once what nobody holds and what malloc keeps is given back; 0 where the WebUI has no saboteur."""
    told = ask("/saboteur/counted", {"trim": True, "trace": False})
    return told["trimmed"] / 1024 if "trimmed" in told else 0.0


def slope(values: list[float]) -> float:
    """Of the least-squares line through equally spaced values, a step."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return above / sum((i - middle) ** 2 for i in range(len(values)))


def until(ended: threading.Event, asking: Callable[[], Any]) -> None:
    while not ended.wait(0.2):
        asking()


previews: list[tuple[int, int]] = []


def progress() -> None:
    """As the page does while a picture is made, its preview included."""
    told = ask("/sdapi/v1/progress")
    assert 0 <= told["progress"] <= 1, told
    if told["current_image"]:
        previews.append(opened(told["current_image"]).size)


def files() -> None:
    """The routes of the extension, while others work."""
    assert isinstance(ask("/unsampler/v1/latents"), list)


def test_a_long_day() -> None:
    alone = {name: answer(name) for name in MIXED}
    again = {name: answer(name) for name in MIXED}
    assert alone == again, "a request is not repeatable by itself"
    assert len(set(alone.values())) == len(alone)
    order = random.Random(0)
    asked = [order.choice(list(MIXED)) for _ in range(REQUESTS)]
    pid, looks, wrong, used = server(), [], [], []
    deadline, done, lock = time.monotonic() + SECONDS, 0, threading.Lock()

    def one(name: str) -> None:
        nonlocal done
        if time.monotonic() > deadline:
            return
        if answer(name) != alone[name]:
            wrong.append(name)
        with lock:
            done += 1
            if pid is not None and done % EVERY == 0:
                looks.append(held(pid))

    ended = threading.Event()
    with ThreadPoolExecutor(2) as clients, ThreadPoolExecutor(2) as pages:
        others = [pages.submit(until, ended, asking) for asking in (progress, files)]
        try:
            for part in (asked[: REQUESTS // 3], asked[REQUESTS // 3 :]):
                list(clients.map(one, part))
                used.append(in_use())
        finally:
            ended.set()
        for other in others:
            other.result()
    assert not wrong and done > 0
    assert previews
    counts = json.dumps({name: asked[:done].count(name) for name in MIXED})
    print(f"\n{done} requests, each as alone, beside {len(previews)} previews: {counts}")
    assert answer("plain") == alone["plain"]
    if not looks:
        return
    later = looks[len(looks) // 3 :]
    growth = slope([look.memory for look in later]) / EVERY if len(later) > 1 else 0.0
    print("first, a third, last:", looks[0], later[0], looks[-1], f"slope {1024 * growth:.1f} KiB a request", sep="\n")
    print(f"in use: {used[0]:.0f} MB after a third, {used[1]:.0f} MB at the end (0: no saboteur to ask)")
    assert used[1] <= 1.03 * used[0] or "MALLOC_ARENA_MAX" not in environment(pid)
    assert growth < 0.25 or later[-1].memory < 1.02 * later[0].memory
    for name in ("handles", "threads", "temporary"):
        assert getattr(later[-1], name) <= max(getattr(look, name) for look in later[: len(later) // 2 + 1]) + 2, name
