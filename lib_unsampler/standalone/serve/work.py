"""The runs of the page: one at a time, told as they go, stopped by a word."""

from __future__ import annotations

import base64
import binascii
import io
import re
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ...page import questions, shelf
from ...pictures.render import to_pictures
from ...settings import Settings, SettingsError, parse, surface_fields
from .. import reading, running
from ..cli import explained
from ..embedded import GaussianPrior, make_model
from ..progress import Bar
from ..stills import frame_path
from .asked import Asked

CAT = Path(__file__).resolve().parents[2] / "assets/cat.jpg"
EXAMPLES = ("cat", "sea", "sunset", "snow")
"""The bundled photograph, and pictures that the embedded model itself draws under these prompts."""
DRAWN = 256
"""Side of a drawn example."""
EVERY = 0.1
"""Seconds between two words about the progress."""
BEAT = 1.0
"""Seconds after which one who waits hears again: whose page is gone then leaves the queue."""

Tell = Callable[[Mapping[str, Any]], None]
"""Sends the page a line; raises :class:`Interrupted` where it is gone."""


class Interrupted(BaseException):
    """The run is to end. Not an Exception: only what cleans up may look at it."""


class Work:
    """Makes what the page asks for, in a folder of results of which each run has its own."""

    def __init__(self, folder: Path) -> None:
        """Begins: ``folder`` is made if it is not there."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._turn = threading.Condition()
        self._queue: deque[str] = deque()
        self._ended: set[str] = set()
        self._closed = False
        self._going = 0  # runs whose thread may still be in the midst of PyTorch: ending the process there aborts it

    def answer(self, question: str) -> dict[str, Any]:
        """What the form's script is told."""
        return questions.answer(question, lambda: self.folder, self._foreseen).told

    def _foreseen(self, told: Mapping[str, Any], form: Settings) -> Asked:
        return Asked(told, form, self.folder)

    def interrupt(self, run: str) -> None:
        """Ends a run, also one that still waits; an unknown one is over."""
        with self._turn:
            if run in self._queue:
                self._ended.add(run)
                self._turn.notify_all()

    def close(self, patience: float = 10.0) -> None:
        """Ends every run, and waits until nothing half-written is left."""
        with self._turn:
            self._closed = True
            self._ended.update(self._queue)
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._going, patience)

    def run(self, request: Mapping[str, Any], tell: Tell) -> None:
        """Makes what is asked for, as soon as it is its turn; the last line is a result, an error or the interruption.

        Arguments:
            request: ``values``, the form's fields; ``host``, the page's own controls; ``picture``, an example's name
                or the data of a picture file in base64.
            tell: Sends a line.
        """
        with self._counted():
            self._run(uuid.uuid4().hex, request, tell)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._turn:
            self._going += 1
        try:
            yield
        finally:
            with self._turn:
                self._going -= 1
                self._turn.notify_all()

    def _run(self, run: str, request: Mapping[str, Any], tell: Tell) -> None:
        try:
            with self._waited(run, tell):
                tell(self._made(run, request, tell))
        except Interrupted:
            tell({"interrupted": True})
        except SettingsError as error:
            tell({"errors": [questions.by_field(text) for text in error.errors]})
        except Exception as error:
            said = explained(error) if isinstance(error, (ValueError, OSError, MemoryError, RuntimeError)) else None
            if said is None:
                tell({"errors": [{"field": "", "text": f"{type(error).__name__}: {error}"}]})
                raise
            tell({"errors": [questions.by_field(said)]})

    @contextmanager
    def _waited(self, run: str, tell: Tell) -> Iterator[None]:
        """The turn of a run: those before it go first."""
        with self._turn:
            self._queue.append(run)
        try:
            while before := self._before(run):
                tell({"run": run, "waiting": before})
                with self._turn:
                    self._turn.wait_for(lambda: self._queue[0] == run or self._is_ended(run), BEAT)
                self._check(run)
            tell({"run": run})
            yield
        finally:
            with self._turn:
                self._queue.remove(run)
                self._ended.discard(run)
                self._turn.notify_all()

    def _before(self, run: str) -> int:
        with self._turn:
            return self._queue.index(run)

    def _is_ended(self, run: str) -> bool:
        return self._closed or run in self._ended

    def _check(self, run: str) -> None:
        if self._is_ended(run):
            raise Interrupted

    def _made(self, run: str, request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
        form = parse(request["values"], "host")
        asked = Asked(request["host"], form, self.folder)
        said = asked.check()
        bars = _bars(lambda: self._check(run), tell)
        with self._place() as (folder, name), torch.no_grad():
            targets = asked.targets(folder, name)
            if asked.saved is None:
                source = picture(request.get("picture"), asked.size, said.append)
                said += running.unsample_picture(source, asked.settings, targets, None, bars)
            else:
                said += running.resume(asked.saved, asked.settings, targets, True, bars)
            return {**self._result(asked, targets), "said": said}

    @contextmanager
    def _place(self) -> Iterator[tuple[Path, str]]:
        """A new folder for a run's files, which goes again if it fails, and its name."""
        there = [int(file.name) for file in self.folder.iterdir() if re.fullmatch(r"[0-9]{5,9}", file.name)]
        folder = self.folder / f"{1 + max(there, default=0):05d}"
        folder.mkdir()
        try:
            yield folder, folder.name
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _result(self, asked: Asked, targets: running.Targets) -> dict[str, Any]:
        """The page's own result: what the WebUI's JSON of one holds for our script, and the pictures' names."""
        form, told, settings = asked.form, asked.story(targets), asked.settings
        shown: list[tuple[dict[str, Any], Path]] = []

        def show(path: Path | None, kind: str, **note: Any) -> None:
            if path is not None:
                shown.append(({"kind": kind, "image": 0, **note}, path))

        show(targets.animation, "animation", format=form.format)
        show(targets.sweep, "sweep animation", format=form.format)
        show(targets.sheet, "contact sheet")
        show(targets.curve, "sigma curve")
        show(targets.report, "report")
        if targets.frames:
            for number, (note, sigma) in enumerate(zip(_notes(told), told.sigmas)):
                show(frame_path(targets.frames, number, sigma), "frame", sigma=sigma, **note)
        kept = asked.walked.kept
        sigmas = [asked.walked.schedule[index] for index in kept]
        if targets.sweep_pictures:
            for number, (index, sigma) in enumerate(zip(kept, sigmas)):
                show(frame_path(targets.sweep_pictures, number, sigma), "sweep", step=index, sigma=sigma)
        images = [path for _, path in shown] + ([targets.resample] if targets.resample else [])
        extra = {
            "Unsampler images": [note for note, _ in shown],
            "Unsampler sigmas": sigmas,
            "Unsampler settings": {f.name: getattr(form, f.name) for f in surface_fields("host")},
            "Unsampler latents names": [shelf.name_of(self.folder, targets.latents)] if targets.latents else [],
        }
        result = {"all_seeds": [settings.seed], "seed": settings.seed, "steps": asked.steps, "batch_size": 1}
        result |= {"sampler_name": settings.sampler, "extra_generation_params": extra}
        return {"result": result, "images": [shelf.name_of(self.folder, path) for path in images]}


def _notes(told: running.Story) -> Iterator[dict[str, Any]]:
    """What is said of each frame of a story, in its order."""
    if told.clean:
        yield {"step": None}
    for index in told.noising:
        yield {"step": int(index)}
    if told.film:
        for index in told.film:
            yield {"step": int(index), "part": "sampling"}
        yield {"step": None, "part": "result"}


def _bars(check: Callable[[], None], tell: Tell) -> Callable[..., Any]:
    """Bars whose every step looks whether the run is to end, and says from time to time how far it is."""

    @contextmanager
    def bar(name: str, total: int | None, unit: str) -> Iterator[Bar]:
        yield _Told(name, total, unit, check, tell)

    return bar


class _Told:
    def __init__(self, name: str, total: int | None, unit: str, check: Callable[[], None], tell: Tell) -> None:
        self._name, self._total, self._unit, self._check, self._tell = name, total, unit, check, tell
        self._done, self._last = 0, 0.0

    def update(self) -> None:
        self._check()
        self._done += 1
        if time.monotonic() - self._last >= EVERY or self._done == self._total:
            self._last = time.monotonic()
            self._tell({"progress": {"part": self._name, "done": self._done, "of": self._total, "unit": self._unit}})

    def set_postfix_str(self, s: str, refresh: bool) -> None:
        """Is not shown."""


# Pictures


@cache
def example(name: str) -> bytes:
    """An example picture's file."""
    if name == "cat":
        return CAT.read_bytes()
    prior = make_model("gaussian", name, DRAWN, DRAWN)
    assert isinstance(prior, GaussianPrior)
    noise = torch.randn(1, 3, DRAWN, DRAWN, generator=torch.Generator().manual_seed(EXAMPLES.index(name)))
    most = torch.tensor(14.614642)
    made = io.BytesIO()
    to_pictures(prior.solve(most * noise, most, torch.tensor(0.0)))[0].save(made, "PNG")
    return made.getvalue()


def picture(named: Any, size: int, tell: reading.Tell) -> Tensor:
    """The picture of a request as latents of shape (1, 3, H, W).

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(named, dict) or not {"example", "data"} & set(named):
        raise ValueError("no picture: choose an example, or a picture file")
    if "example" in named and named["example"] not in EXAMPLES:
        raise ValueError(f"{named['example']!r} is not an example picture ({', '.join(EXAMPLES)})")
    try:
        data = example(named["example"]) if "example" in named else base64.b64decode(str(named["data"]), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture's data is not base64") from None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        file.write_bytes(data)
        try:
            return reading.load_picture(file, size, tell)
        except reading.UnreadableError as error:
            raise ValueError(str(error).replace(str(file), "the picture")) from None
