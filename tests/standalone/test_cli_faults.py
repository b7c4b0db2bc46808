"""Every stage of the command line times signals, full disks and memory: what is said, and only whole files are left.

Each run is a fork of a process that has loaded PyTorch already and runs no threads (a fork of one that does may wait
for them for ever); a signal comes from within the stage.
"""

from __future__ import annotations

import copy
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from lib_unsampler.core import trajectory
from lib_unsampler.standalone import cli, running  # noqa: F401  (with PyTorch, before the forks)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")

PICTURES = "lib_unsampler.pictures"
STAGES: dict[str, tuple[str, int]] = {
    "schedule": ("lib_unsampler.standalone.running:plan_levels", 0),
    "source": ("lib_unsampler.standalone.reading:load_picture", 0),
    "noise": ("lib_unsampler.core.noising:SeededDraws.__call__", 2),
    "model, first call": ("lib_unsampler.standalone.embedded:GaussianPrior.__call__", 0),
    "model, later call": ("lib_unsampler.standalone.embedded:GaussianPrior.__call__", 3),
    "pictures": (f"{PICTURES}.render:to_pictures", 0),
    "caption": (f"{PICTURES}.render:captioned", 2),
    "frame, encoded": (f"{PICTURES}.containers:Gif.encode", 1),
    "frame, written": (f"{PICTURES}.containers:Gif.add", 1),
    "end of the animation": (f"{PICTURES}.containers:Gif.finish", 0),
    "keeping levels": ("lib_unsampler.core.kept:Kept.add", 2),
    "latents": ("lib_unsampler.core.trajectory:save", 0),
    "sheet": (f"{PICTURES}.render:contact_sheet", 0),
    "curve": (f"{PICTURES}.render:sigma_curve", 0),
    "a whole file": ("lib_unsampler.files:os.replace", 0),
    "another whole file": ("lib_unsampler.files:os.replace", 3),
    "the last whole file": ("lib_unsampler.files:os.replace", 8),
}
ERRORS = {
    "out of memory": MemoryError("cannot hold that"),
    "full disk": OSError(errno.ENOSPC, "No space left on device", "x"),
    "read-only folder": OSError(errno.EROFS, "Read-only file system", "x"),
    "locked folder": PermissionError(errno.EACCES, "Permission denied", "x"),
    "exception": RuntimeError("no kernel image"),
}
SIGNALS = ("SIGINT", "SIGTERM")
CASES = [(stage, fault) for stage in STAGES for fault in (*SIGNALS, *ERRORS)]
BEFORE_WRITING = ("schedule",)


def struck(own: Callable[..., Any], fault: str, after: int) -> Callable[..., Any]:
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == after + 1 and fault in SIGNALS:
            os.kill(os.getpid(), getattr(signal, fault))
        elif len(calls) > after and fault in ERRORS:
            raise copy.copy(ERRORS[fault])
        return own(*args, **kwargs)

    return failing


def strike(stage: str, fault: str) -> None:
    place, after = STAGES[stage]
    module, path = place.split(":")
    owner: Any = importlib.import_module(module)
    *above, name = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    failing = struck(getattr(owner, name), fault, after)
    still = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(failing) if still else failing)


def child(stage: str, fault: str, arguments: list[str], said: Path) -> NoReturn:
    status = 99
    try:
        for number in map(signal.Signals.__getitem__, SIGNALS):
            signal.signal(number, signal.SIG_DFL)
        written = os.open(said, os.O_CREAT | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(written, stream)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w") for n in (1, 2))
        strike(stage, fault)
        status = cli.main(arguments)
    except SystemExit as end:
        status = int(str(end.code))
    except BaseException as error:
        print("Traceback", type(error).__name__, error, file=sys.stderr)
        status = 1
    finally:
        sys.stderr.flush()
        assert threading.active_count() < 50
        os._exit(status)


def serve() -> None:
    """Runs what it is asked for, a line of JSON each, and answers with its exit status."""
    for line in sys.stdin:
        stage, fault, arguments, said = json.loads(line)
        process = os.fork()
        if process == 0:
            child(stage, fault, arguments, Path(said))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[..., int]]:
    here = Path(__file__).resolve()
    paths = os.pathsep.join(map(str, (here.parents[2], here.parent)))
    command = [sys.executable, "-c", f"import {here.stem}; {here.stem}.serve()"]
    env, pipe = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as made:
        asked, answered = made.stdin, made.stdout
        assert asked is not None and answered is not None

        def run(*what: Any) -> int:
            print(json.dumps(what), file=asked, flush=True)
            return int(answered.readline())

        yield run
        asked.close()


def check_whole(file: Path) -> None:
    if file.suffix == ".safetensors":
        trajectory.load(file)
        return
    with Image.open(file) as picture:
        for frame in range(getattr(picture, "n_frames", 1)):
            picture.seek(frame)
            picture.load()


@pytest.mark.parametrize(("stage", "fault"), CASES)
@pytest.mark.one_of(4)
def test_a_fault_leaves_whole_files(
    stage: str, fault: str, picture: Path, tmp_path: Path, server: Callable[..., int]
) -> None:
    out, said = tmp_path / "out", tmp_path / "said.txt"
    names = {"-o": "x.gif", "--frames": "frames", "--sheet": "sheet.png", "--curve": "curve.png"}
    names |= {"--latents": "x.safetensors", "--resample": "same.png"}
    arguments = [str(picture), "--steps", "4", "--noise", "path", "--captions"]
    arguments += [word for option, name in names.items() for word in (option, str(out / name))]
    status, text = server(stage, fault, arguments, str(said)), said.read_text()
    if fault in SIGNALS:
        assert status == 128 + getattr(signal, fault), text
        assert text.splitlines()[-1].endswith("no half-written file was left") and "Traceback" not in text
    else:
        error = ERRORS[fault]
        assert str(error.args[1] if isinstance(error, OSError) else error.args[0]) in text
        assert status == (1 if fault == "exception" else 2) and ("Traceback" in text) == (fault == "exception")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path not in (picture, said)]
    assert not [path for path in left if path.name.startswith(".")]
    for path in left:
        check_whole(path)
    assert stage not in BEFORE_WRITING or not left
