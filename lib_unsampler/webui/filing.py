"""One batch's levels on their way into animations, sheets and files, as they are made.

Nothing is held but thumbnails and what is being encoded or saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core import comfy, trajectory
from ..core.kept import Kept
from ..core.replay import Recording
from ..core.trajectory import Trajectory
from ..pictures import render, roundtrip
from ..pictures.background import Background
from ..pictures.progression import Frame
from ..pictures.reel import Reel
from ..pictures.roundtrip import RoundTrip
from ..pictures.timing import evenly
from ..settings import Settings
from .driven import Plan
from .host.codec import latent_scale
from .host.request import comment
from .host.saving import temporary_file
from .host.schedule import scheduler, timestep
from .naming import Naming
from .reply import Reply

ENDINGS = {"gif": ".gif", "webp": ".webp", "apng": ".png", "mp4": ".mp4"}


class Filing:
    """Takes one batch's levels with their pictures, least noisy first; a context manager that forgets the rest."""

    def __init__(
        self, p: Any, settings: Settings, plan: Plan, reply: Reply, save: bool, sigmas: Sequence[float]
    ) -> None:
        """Begins the files of a batch.

        Arguments:
            p: The host's request, at one of its batches.
            settings: What is wanted.
            plan: The levels.
            reply: Where the results go.
            save: Whether the host saves this batch's images.
            sigmas: The noise level of every frame that may come.

        Raises:
            ValueError: if the animation's format cannot be had or cannot hold it.
            OSError: if files cannot be written.
        """
        self._p, self._settings, self._plan, self._reply, self._save = p, settings, plan, reply, save
        self._wanted = set(settings.output)
        self._sigmas = list(sigmas)
        self.count = 0
        self._last: list[Image.Image] = []
        self._entry: dict[str, Any] = {}
        self._indices: list[int] = []
        self._stack = ExitStack()
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise

    def _begin(self) -> None:
        encoders = self._stack.enter_context(Background())
        self._saver = self._stack.enter_context(Background())
        self._naming = Naming(self._p, self._reply, self._saver.submit)
        self._moving: list[Path] = []
        self._reels: list[Reel] = []
        for text in self._naming.texts:
            if "animation" in self._wanted:
                self._moving.append(self._temporary(ENDINGS[self._settings.format]))
            path = self._moving[-1] if self._moving else None
            reel = Reel(self._settings, self._sigmas, text, encoders, path, "contact sheet" in self._wanted)
            self._reels.append(self._stack.enter_context(reel))
        self._kept = None
        if self._wanted & {"latents", "comfyui"}:
            self._latents = self._temporary(".safetensors")
            self._kept = self._stack.enter_context(Kept(self._latents))

    def _temporary(self, ending: str) -> Path:
        file = temporary_file(ending)
        self._stack.callback(file.unlink, missing_ok=True)
        return file

    def __enter__(self) -> Filing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def level(self, index: int, z: Tensor) -> None:
        """Takes the next noisier level, of schedule index ``index``, unmasked."""
        self._indices.append(index)
        if self._kept is not None:
            self._kept.add(z)

    def frame(self, frame: Frame, part: str = "") -> None:
        """Takes the pictures of one level, one for each image; ``part`` says what they are part of."""
        self._last = frame.pictures
        self._entry = {"kind": "frame", "step": frame.index, "sigma": frame.sigma, **({"part": part} if part else {})}
        step = None
        if self._settings.captions and frame.index is not None:
            step = timestep(self._p, self._plan.levels.schedule[frame.index])
        for image, (reel, picture) in enumerate(zip(self._reels, frame.pictures)):
            seen = reel.add(picture, frame.index, step, part)
            if "frames" in self._wanted:
                suffix = f"-z{self.count:03d}"
                self._naming.frame(seen, image, self._entry, suffix, self._save, self._is_shown())
        self.count += 1

    def _is_shown(self) -> bool:
        """Whether the present level's frames are among those that the reply has room for."""
        levels = max(1, self._reply.limit // (len(self._reels) * self._p.n_iter))
        return self._reply.limit > 0 and evenly(self.count, len(self._sigmas), levels)

    def abandon(self) -> None:
        """Takes everything back."""
        self._saver.finish()
        self._naming.abandon()

    def finish(
        self, save: bool, source: Tensor, mask: Tensor | None, handoff: Tensor | None, recording: Recording | None
    ) -> None:
        """Writes what is only known at the end.

        Arguments:
            save: Whether the host still saves this batch's images: it may not, once it was interrupted.
            source: Clean latents with shape (B, C, [T,] H, W).
            mask: Weights that broadcast against them, or None.
            handoff: Where sampling began, if not at the noisiest level.
            recording: The noises of a replay, if it was one.
        """
        self._reply.sigmas = [float(self._plan.levels.schedule[index]) for index in self._indices]
        self._saver.finish()
        if self._save and not save:
            self._naming.unsave()
        for image, reel in enumerate(self._reels):
            sheet = reel.finish() if self.count else None
            if self._moving and self.count:
                about = (self._last[image], image, self._settings.format, save)
                self._naming.animation(self._moving[image], *about, fit=reel.fit)
            if sheet is not None:
                self._naming.picture("contact sheet", sheet, image, "-unsampling-sheet", save)
        if "sigma curve" in self._wanted and not self._reply.items["sigma curve"]:
            curve = render.sigma_curve(self._plan.levels.schedule, self._indices)
            self._naming.picture("sigma curve", curve, 0, "-unsampling-curve", save)
        if self._last:
            self._naming.stand_in(self._last, self._entry)
        if self._kept is not None:
            replay = recording if self._indices[-1] == self._plan.start else None  # not of what was interrupted
            walked = (self._plan, self._indices, self._kept.outline)
            parts: dict[str, Any] = {"mask": mask, "handoff": handoff, "replay": replay}
            self._file_latents(self._kept, trajectory_of(self._p, self._settings, *walked, source, **parts))
        self._say_what_is_missing(save)

    def _file_latents(self, kept: Kept, made: Trajectory) -> None:
        """The latents as our own file, and as ComfyUI's."""
        named = self._last[0] if self._last else Image.new("RGB", (self._p.width, self._p.height))
        if "comfyui" in self._wanted:
            file, form = self._temporary(comfy.ENDING), comfy.form_of(*latent_scale(self._p.sd_model))
            comfy.save_latent(replace(made, z=torch.stack(list(kept.tensors()))), form, file)
            self._reply.comfyui.append(self._naming.latents(file, named))
        if "latents" in self._wanted:
            trajectory.save(made, self._latents, kept)
            self._reply.latents.append(self._naming.latents(self._latents, named))

    def report(self, image: int, trip: RoundTrip, save: bool) -> None:
        """Files how near one image came when it was sampled back."""
        figures = {"latents dB": trip.latents, "pixels dB": trip.pixels, "codec dB": trip.codec, "calls": trip.calls}
        self._naming.picture("report", roundtrip.page(trip), image, "-unsampling-report", save, figures)
        number = self._p.iteration * self._p.batch_size + image
        comment(self._p, f"round trip of image {number}: {'; '.join(trip.lines())}")

    def _say_what_is_missing(self, save: bool) -> None:
        made = self.count * len(self._reels) if "frames" in self._wanted else 0
        shown = self._naming.count("frame")
        if shown < made and self._reply.limit:
            others = "all are saved" if save else "the others are not kept, since this request saves nothing"
            comment(self._p, f"{shown} of {made} frames are shown, spread evenly; {others}")


def trajectory_of(
    p: Any, settings: Settings, plan: Plan, indices: Sequence[int], z: Tensor, source: Tensor, **parts: Any
) -> Trajectory:
    """The latents file of a batch's walk, with what the request and its model say of it; see ``trajectory.of_walk``."""
    return trajectory.of_walk(
        plan.levels.schedule,
        indices,
        z,
        source,
        plan.prediction,
        seeds=tuple(int(seed) for seed in p.seeds),
        settings=asdict(settings),
        info={
            "model": str(p.sd_model_name),
            "sampler": str(p.sampler_name),
            "scheduler": scheduler(p),
            "latent format": comfy.form_of(*latent_scale(p.sd_model)),
        },
        **parts,
    )
