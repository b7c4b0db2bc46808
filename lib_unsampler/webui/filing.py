"""One batch's results on their way to files and to the host's reply, as they are made.

Nothing is held but thumbnails and what is being encoded or saved: a frame that is saved stands in
the reply as its file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import Tensor

from ..core import trajectory
from ..core.replay import Recording
from ..core.trajectory import Trajectory
from ..pictures import render, roundtrip
from ..pictures.background import Background
from ..pictures.reel import Reel, evenly
from ..pictures.roundtrip import RoundTrip
from ..settings import INFOTEXT_PREFIX, Settings
from .driven import Plan
from .host.page import preferences
from .host.request import comment
from .host.saving import infotext, kept_file, moving_item, save_file, save_picture, saved_item, temporary_file
from .host.schedule import timestep

KINDS = ("animation", "contact sheet", "sigma curve", "report", "frame")
"""What the reply holds, in its order."""

ENDINGS = {"gif": ".gif", "webp": ".webp", "apng": ".png", "mp4": ".mp4"}


@dataclass(frozen=True)
class Item:
    """One thing in the reply: what the host shows, its generation parameters, and what is said of it."""

    shown: Any
    text: str
    note: dict[str, Any]


@dataclass
class Reply:
    """What one request hands over, over all its batches.

    Attributes:
        limit: Frames that it holds at most; the others are only saved.
        items: What the gallery and the API get, by kind.
        stand_ins: The noisiest frame of each image, for who takes one picture for each.
        latents: Paths of the latents files.
        sigmas: The kept levels that were made, least noisy first.
    """

    limit: int
    items: dict[str, list[Item]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    stand_ins: list[Item] = field(default_factory=list)
    latents: list[str] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    def every(self) -> list[Item]:
        """All items, in order."""
        return [item for kind in KINDS for item in self.items[kind]]


class Filing:
    """Takes one batch's levels with their pictures, least noisy first; a context manager that forgets the rest.

    Pictures are saved by one thread, in order, since the host names them by counting.
    """

    def __init__(self, p: Any, settings: Settings, plan: Plan, reply: Reply, save: bool) -> None:
        """Begins the files of a batch.

        Arguments:
            p: The host's request, at one of its batches.
            settings: What is wanted.
            plan: The levels.
            reply: Where the results go.
            save: Whether the host saves this batch's images.

        Raises:
            ValueError: if the animation's format cannot be had or cannot hold it.
            OSError: if files cannot be written.
        """
        self._p, self._settings, self._plan, self._reply, self._save = p, settings, plan, reply, save
        self._wanted = set(settings.output)
        self._sigmas = [0.0] * settings.include_clean + plan.levels.sigmas.tolist()
        self._texts = [infotext(p, image, {}) for image in range(len(p.prompts))]
        self._count = 0
        self._last: list[Image.Image] = []
        self._entry: dict[str, Any] = {}
        self._files: list[Path] = []
        self._own: list[Item] = []
        self._indices: list[int] = []
        self._stack = ExitStack()
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise

    def _begin(self) -> None:
        self._encoders = self._stack.enter_context(Background())
        self._saver = self._stack.enter_context(Background(1))
        self._moving: list[Path] = []
        self._reels: list[Reel] = []
        for text in self._texts:
            if "animation" in self._wanted:
                self._moving.append(temporary_file(ENDINGS[self._settings.format]))
                self._stack.callback(self._moving[-1].unlink, missing_ok=True)
            path = self._moving[-1] if self._moving else None
            reel = Reel(self._settings, self._sigmas, text, self._encoders, path, "contact sheet" in self._wanted)
            self._reels.append(self._stack.enter_context(reel))
        self._kept = None
        if "latents" in self._wanted:
            self._latents = temporary_file(".safetensors")
            self._stack.callback(self._latents.unlink, missing_ok=True)
            self._kept = self._stack.enter_context(trajectory.Kept(self._latents))

    def __enter__(self) -> Filing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def level(self, index: int, masked: Tensor) -> None:
        """Takes the next noisier level, of schedule index ``index``."""
        self._indices.append(index)
        if self._kept is not None:
            self._kept.add(masked)

    def pictures(self, index: int | None, pictures: Sequence[Image.Image]) -> None:
        """Takes the pictures of one level, one for each image; ``index`` None is the source."""
        sigma = 0.0 if index is None else float(self._plan.levels.schedule[index])
        self._entry, self._last = {"kind": "frame", "step": index, "sigma": sigma}, list(pictures)
        step = None
        if self._settings.captions and index is not None:
            step = timestep(self._p, self._plan.levels.schedule[index])
        for image, (reel, picture) in enumerate(zip(self._reels, pictures)):
            shown = reel.add(picture, index, step)
            if "frames" in self._wanted:
                self._frame(image, index, sigma, shown)
        self._count += 1

    def _frame(self, image: int, index: int | None, sigma: float, picture: Image.Image) -> None:
        level = {"sigma": f"{sigma:.6g}"} | ({} if index is None else {"step": index})
        extra = {INFOTEXT_PREFIX + "frame " + key: value for key, value in level.items()}
        text = infotext(self._p, image, extra)
        picture.info["parameters"] = text
        note, shown = {"image": self._number(image), **self._entry}, self._is_shown()

        def saved(files: tuple[Path, ...]) -> None:
            self._files += files
            if shown:
                self._put("frame", Item(saved_item(files[0], text), text, note))

        if self._save:
            size, suffix = 3 * picture.width * picture.height, f"-z{self._count:03d}"
            own = picture.copy()  # a host may change what it saves: Forge hides text in an alpha channel
            self._saver.submit(size, saved, save_picture, self._p, own, image, text, suffix)
        elif shown:
            self._put("frame", Item(picture, text, note))

    def _is_shown(self) -> bool:
        """Whether the present level's frames are among those that the reply has room for."""
        levels = max(1, self._reply.limit // (len(self._reels) * self._p.n_iter))
        return self._reply.limit > 0 and evenly(self._count, len(self._sigmas), levels)

    def _put(self, kind: str, item: Item) -> None:
        if kind != "frame" or len(self._reply.items[kind]) < self._reply.limit:
            self._reply.items[kind].append(item)
            self._own.append(item)

    def abandon(self) -> None:
        """Takes everything back."""
        self._saver.finish()
        for kind, items in self._reply.items.items():
            self._reply.items[kind] = [item for item in items if item not in self._own]
        for file in self._files:
            file.unlink(missing_ok=True)

    def finish(
        self, save: bool, source: Tensor, mask: Tensor | None, last: Tensor, recording: Recording | None
    ) -> None:
        """Writes what is only known at the end.

        Arguments:
            save: Whether the host still saves this batch's images: it may not, once it was interrupted.
            source: Clean latents with shape (B, C, [T,] H, W).
            mask: Weights that broadcast against them, or None.
            last: The noisiest level, unmasked.
            recording: The noises of a replay, if it was one.
        """
        self._reply.sigmas = [float(self._plan.levels.schedule[index]) for index in self._indices]
        self._saver.finish()
        if self._save and not save:
            self._take_back()
        for image, reel in enumerate(self._reels):
            sheet = reel.finish() if self._count else None
            if self._moving and self._count:
                self._file_animation(image, save)
            if sheet is not None:
                self._file_picture("contact sheet", sheet, image, "-unsampling-sheet", save)
        if "sigma curve" in self._wanted and not self._reply.items["sigma curve"]:
            curve = render.sigma_curve(self._plan.levels.schedule, self._indices)
            self._file_picture("sigma curve", curve, 0, "-unsampling-curve", save)
        if self._last:
            self._stand_in()
        if self._kept is not None:
            self._file_latents(source, mask, last, recording)
        self._say_what_is_missing(save)

    def report(self, image: int, trip: RoundTrip, save: bool) -> None:
        """Files how near one image came when it was sampled back."""
        figures = {"latents dB": trip.latents, "pixels dB": trip.pixels, "codec dB": trip.codec, "calls": trip.calls}
        self._file_picture("report", roundtrip.page(trip), image, "-unsampling-report", save, figures)
        comment(self._p, f"round trip of image {self._number(image)}: {'; '.join(trip.lines())}")

    def _take_back(self) -> None:
        """The host saves nothing of what was interrupted: what was saved until then goes, the reply keeps it."""
        for item in self._own:
            item.shown.load()
            del item.shown.already_saved_as
        for file in self._files:
            file.unlink(missing_ok=True)

    def _file_animation(self, image: int, save: bool) -> None:
        file, text, poster = self._moving[image], self._texts[image], self._last[image]
        if save:
            folder = preferences().animation_folder
            file = save_file(self._p, file, poster, image, text, "-unsampling", folder)
        elif not getattr(self._p, "is_api", False):
            file = kept_file(file)
        note = {"kind": "animation", "image": self._number(image), "format": self._settings.format}
        self._put("animation", Item(moving_item(self._p, file, save, poster, text), text, note))

    def _file_picture(
        self,
        kind: str,
        picture: Image.Image,
        image: int,
        suffix: str,
        save: bool,
        told: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        text = self._texts[image]
        picture.info["parameters"] = text
        if save:
            picture = saved_item(save_picture(self._p, picture, image, text, suffix)[0], text)
        self._put(kind, Item(picture, text, {"kind": kind, "image": self._number(image), **told}))

    def _stand_in(self) -> None:
        for image, picture in enumerate(self._last):
            picture.info.setdefault("parameters", self._texts[image])
            note = {"image": self._number(image), **self._entry}
            self._reply.stand_ins.append(Item(picture, self._texts[image], note))

    def _file_latents(self, source: Tensor, mask: Tensor | None, last: Tensor, recording: Recording | None) -> None:
        """The latents file is asked for by name, so it is written also where samples are not saved."""
        p, plan = self._p, self._plan
        result = Trajectory(
            z=self._kept.outline,
            sigmas=plan.levels.schedule[self._indices],
            schedule=plan.levels.schedule,
            start=self._indices[-1],
            source=source.cpu(),
            prediction=plan.prediction,
            seeds=tuple(int(seed) for seed in p.seeds),
            mask=None if mask is None else mask.cpu().float(),
            handoff=None if mask is None else last.cpu(),
            replay=recording if self._indices[-1] == plan.start else None,  # not of what was interrupted
            settings=asdict(self._settings),
            info={"model": str(p.sd_model_name), "sampler": str(p.sampler_name), "scheduler": str(p.scheduler)},
        )
        trajectory.save(result, self._latents, self._kept)
        size = (8 * source.shape[-1], 8 * source.shape[-2])
        named = self._last[0] if self._last else Image.new("RGB", size)
        path = save_file(p, self._latents, named, 0, self._texts[0], "-unsampling").absolute()
        self._reply.latents.append(str(path))
        comment(p, f"latents saved: {path}")

    def _say_what_is_missing(self, save: bool) -> None:
        made = self._count * len(self._reels) if "frames" in self._wanted else 0
        shown = sum(item.note["kind"] == "frame" for item in self._own)
        if shown < made and self._reply.limit:
            others = "all are saved" if save else "the others are not kept, since this request saves nothing"
            comment(self._p, f"{shown} of {made} frames are shown, spread evenly; {others}")

    def _number(self, image: int) -> int:
        """The number of an image over all batches, as in ``all_seeds``."""
        return self._p.iteration * self._p.batch_size + image
