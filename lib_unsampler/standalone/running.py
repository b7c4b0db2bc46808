"""A run without a WebUI: picture files in, the noise progression and what goes on from it out.

Everything streams: a level is noised, shown, written and dropped, unless its latents are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..core import inversion, replay, trajectory
from ..core.noising import SeededDraws, walk
from ..core.schedule import Levels, levels
from ..core.trajectory import Trajectory
from ..pictures import animation, render, roundtrip
from ..pictures.background import Background
from ..pictures.progression import Frame, Scene, Visit, frames
from ..pictures.reel import Reel, timing
from ..settings import Settings
from . import memory, sampling
from .embedded import Denoiser, make_model
from .folders import FRAME_NAME
from .onward import (
    PREDICTION,
    WRITTEN_BY,
    carry_back,
    check_saved,
    first_draw,
    parameters,
    play_back,
    record,
    recorded_levels,
    remaining,
    resampler,
    source_model,
)
from .walkback import WalkBack, round_trip, walk_back

DEFAULT_STEPS = 20
CHUNK_VALUES = 2**20
"""Values of latents that are turned into pictures at once."""


RECORDED_COPIES = 5
"""How many values a replay holds at its worst for each value of its levels: z, states and maps, and those stacked."""


@dataclass(frozen=True)
class Targets:
    """Where the results of one picture go; None is not wanted."""

    animation: Path | None = None
    frames: Path | None = None
    sheet: Path | None = None
    curve: Path | None = None
    latents: Path | None = None
    resample: Path | None = None
    report: Path | None = None


def check(settings: Settings, resamples: bool) -> list[str]:
    """Refuses what the embedded model cannot do, before any work; returns what there is to say before it.

    Raises:
        ValueError: for an unknown prompt, or a sampler that is wrong for the mode or the prediction type.
    """
    said = inversion.kin(settings.sampler, settings.solver)[1] if settings.mode == "invert" else None
    names = ["positive", "negative"] if resamples or settings.mode != "noise" else []
    _check_prompts(settings, names + (["resample_positive", "resample_negative"] if resamples else []))
    if settings.mode == "replay":
        sigmas = remaining(recorded_levels(plan_levels(settings), settings))
        replay.check_function(sampling.function(settings.sampler), sigmas)
    if (resamples and settings.mode == "noise") or settings.mode == "replay":
        sampling.check_sampler(settings.sampler, PREDICTION[settings.model])
    back = f", and sampled back by {resampler(settings)}" if said and resamples else ""
    return [said + back] if said else []


def _check_prompts(settings: Settings, names: list[str]) -> None:
    for name in names:
        try:
            make_model(settings.model, getattr(settings, name), 1, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_resume(saved: Trajectory, settings: Settings, chosen: bool, resamples: bool) -> list[str]:
    """As :func:`check`, of a saved trajectory.

    Arguments:
        chosen: Whether the sampler is a new choice, not the trajectory's.
    """
    if saved.replay is not None:
        check_saved(saved, saved.replay, settings)
    names = ["positive", "negative"] if resamples or settings.panel else []
    _check_prompts(settings, names + (["resample_positive", "resample_negative"] if resamples else []))
    if not resamples:
        return []
    inverted = settings.mode == "invert"
    if not inverted or chosen:
        sampling.check_sampler(settings.sampler, PREDICTION[settings.model])
    if inverted and chosen:
        made_by = resampler(replace(settings, sampler=saved.settings["sampler"]))
        if settings.sampler != made_by:
            return [
                f"sampler: {settings.sampler!r} is not {made_by!r}, which was inverted: the picture will not come back"
            ]
    if inverted and not chosen and settings.sampler != resampler(settings):
        return [f"{settings.sampler} was inverted as {resampler(settings)}, and is sampled back by it"]
    return []


def check_frames(folder: Path | None, settings: Settings, sigmas: Tensor) -> None:
    """Refuses to write frames over files that this program did not make.

    Raises:
        ValueError: naming the first.
    """
    if folder is None or not folder.is_dir():
        return
    for number, sigma in enumerate(_shown_sigmas(settings, sigmas.tolist())):
        path = frame_path(folder, number, sigma)
        if os.path.lexists(path) and not is_ours(path):
            raise ValueError(f"--frames: {path} was not written by this program; name another folder")


def check_animation(path: Path | None, settings: Settings, sigmas: list[float], size: tuple[int, int]) -> None:
    """Refuses an animation that its format cannot hold.

    Arguments:
        size: Width and height of a picture.

    Raises:
        ValueError: saying what is too long or too large.
    """
    if path is None:
        return
    animation.check_format(path.suffix.lower())
    form, width = animation.FORMATS[path.suffix.lower()], size[0] * (3 if settings.panel else 1)
    longest = timing(settings, _shown_sigmas(settings, sigmas)).longest()
    if longest > form.ticks / form.ticks_per_second:
        most = form.ticks / form.ticks_per_second
        raise ValueError(f"duration: a frame of {path} is shown {longest:g} s, above the format's {most:g} s")
    if max(width, size[1]) > form.side:
        raise ValueError(f"-o: frames of {width} x {size[1]} in {path} are above the format's {form.side}; see --size")


def frame_path(folder: Path, number: int, sigma: float) -> Path:
    """Where a frame is written."""
    return folder / f"{number:05d}_sigma_{sigma:.4f}.png"


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that this program wrote, by the text in it."""
    with suppress(Exception), Image.open(path, formats=["PNG"]) as picture:
        return str(picture.info.get("parameters", "")).startswith(WRITTEN_BY)
    return False


def _shown_sigmas(settings: Settings, sigmas: list[float]) -> list[float]:
    return [0.0] * settings.include_clean + sigmas


def plan_levels(settings: Settings) -> Levels:
    """The walk that settings ask of the embedded models.

    Raises:
        ValueError: for a scheduler that the model cannot have.
    """
    sigmas = sampling.get_sigmas(settings.scheduler, settings.steps or DEFAULT_STEPS, PREDICTION[settings.model])
    return levels(sigmas, max(settings.end_at_step, 0), settings.step_increment)


def unsample_picture(
    source: Tensor, settings: Settings, targets: Targets, mask: Tensor | None = None, quiet: bool = False
) -> list[str]:
    """Unsamples one picture of shape (1, 3, H, W) and writes what is wanted; returns what there is to say of it."""
    plan, inverts = plan_levels(settings), settings.mode == "invert"
    check_animation(targets.animation, settings, plan.sigmas.tolist(), (source.shape[-1], source.shape[-2]))
    records = settings.mode == "replay" and bool(targets.latents or targets.resample)
    if records:
        steps = len(recorded_levels(plan, settings).visited)
        memory.check(RECORDED_COPIES * 4 * steps * source.numel(), f"the {steps} levels of a replay")
    model = source_model(settings, source, None)  # a model must not see a clean border at a high noise level
    walked_back = walk_back(model, source, plan, settings, PREDICTION[settings.model], quiet) if inverts else None
    walked = noised(source, plan, settings) if walked_back is None else walked_back.kept(plan)
    seen = {} if walked_back is None else walked_back.estimates
    scene = Scene(source, plan.schedule, PREDICTION[settings.model], settings.view, mask, seen)
    with trajectory.Kept(targets.latents) if targets.latents else nullcontext() as kept:
        last = _write(walked, scene, list(plan.kept), settings, targets, quiet, kept)
        recording = None
        if records:
            recording = record(source, plan, settings, mask, quiet)
        if kept is not None and targets.latents is not None:
            _keep(kept, scene, plan, settings, targets.latents, recording)
    if targets.resample and recording is not None:
        play_back(recording, 0, source, mask, settings, targets.resample, quiet)
    elif targets.resample:
        first = first_draw(settings, plan.schedule, plan.kept[-1])
        way = (remaining(plan), settings, resampler(settings), first)
        carry_back(last, source, mask, *way, targets.resample, quiet)
    return [] if walked_back is None else _told(walked_back, model, scene, plan, settings, targets)


def noised(source: Tensor, plan: Levels, settings: Settings) -> Iterator[tuple[int, Tensor]]:
    """Every kept level of a picture by the forward process, least noisy first, as (schedule index, z)."""
    draw = SeededDraws((settings.seed,), tuple(source.shape[1:]))
    return walk(source, plan, draw, settings.noise, PREDICTION[settings.model], settings.normalize)


def _keep(
    kept: trajectory.Kept,
    scene: Scene,
    plan: Levels,
    settings: Settings,
    path: Path,
    recording: replay.Recording | None,
) -> None:
    """Writes the latents file."""
    result = trajectory.of_walk(
        plan.schedule,
        plan.kept,
        kept.outline,
        scene.source,
        scene.prediction,
        mask=scene.mask,
        replay=recording,
        seeds=(settings.seed,),
        settings=asdict(settings),
        info={"model": settings.model},
    )
    trajectory.save(result, path, kept)


def _told(
    walked: WalkBack, model: Denoiser, scene: Scene, plan: Levels, settings: Settings, targets: Targets
) -> list[str]:
    """What there is to say of an inversion; writes its report, if one is wanted."""
    said = inversion.unconverged(walked.levels)
    if targets.report:
        trip = round_trip(model, walked, scene.source, plan, settings.tolerance)
        animation.write_png(targets.report, roundtrip.page(trip), parameters(settings))
        said = [*said, *trip.lines()]
    return said


def resume(saved: Trajectory, settings: Settings, targets: Targets, chosen: bool = False, quiet: bool = False) -> None:
    """Goes on from a saved trajectory: sampled back, and shown again, as wanted.

    Arguments:
        chosen: Whether the sampler is a new choice, not the trajectory's.
    """
    size = (saved.source.shape[-1], saved.source.shape[-2])
    check_animation(targets.animation, settings, saved.sigmas.tolist(), size)
    skip = 0 if saved.replay is None else check_saved(saved, saved.replay, settings)
    indices = _indices(saved)
    model = source_model(settings, saved.source, None)
    seen = {i: model(z, sigma.reshape(1)) for i, sigma, z in zip(indices, saved.sigmas, saved.z) if settings.panel}
    prediction = PREDICTION[settings.model]
    scene = Scene(saved.source, saved.schedule, prediction, settings.view, saved.mask, seen, blended=saved.blended)
    _write(zip(indices, saved.z), scene, indices, settings, targets, quiet)
    if targets.resample and saved.replay is not None:
        play_back(saved.replay, skip, saved.source, saved.mask, settings, targets.resample, quiet)
    elif targets.resample:
        sampler, first = (
            settings.sampler if chosen else resampler(settings),
            first_draw(settings, saved.schedule, saved.start),
        )
        way = (saved.remaining, settings, sampler, first)
        carry_back(saved.latent, saved.source, saved.mask, *way, targets.resample, quiet)


def _indices(saved: Trajectory) -> list[int]:
    """The schedule index of each saved level (the embedded schedules repeat no sigma)."""
    return [int((saved.schedule == sigma).nonzero()[0]) for sigma in saved.sigmas]


def shown(
    walked: Iterable[tuple[int, Tensor]], scene: Scene, settings: Settings, visit: Visit = lambda *_: True
) -> Iterator[Frame]:
    """The frames of one picture's levels, least noisy first."""

    def decode(latents: Tensor) -> list[Image.Image]:
        return render.to_pictures(latents)

    chunk = max(1, CHUNK_VALUES // scene.source.numel())
    return frames(walked, scene, settings.include_clean, decode, chunk, visit)


def _write(
    walked: Iterable[tuple[int, Tensor]],
    scene: Scene,
    indices: list[int],
    settings: Settings,
    targets: Targets,
    quiet: bool,
    kept: trajectory.Kept | None = None,
) -> Tensor:
    """Runs the levels through every writer that is wanted; returns the noisiest z."""
    text, last = parameters(settings), scene.source
    sigmas = _shown_sigmas(settings, scene.schedule[indices].tolist())
    before = targets.frames.glob("*.png") if targets.frames else ()
    stale = {f for f in before if FRAME_NAME.fullmatch(f.name) and is_ours(f)}

    def visit(index: int, z: Tensor, masked: Tensor) -> bool:
        nonlocal last
        last = z
        if kept is not None:
            kept.add(z)
        return True

    with ExitStack() as stack:
        background = stack.enter_context(Background())
        begun = Reel(settings, sigmas, text, background, targets.animation, targets.sheet is not None)
        reel = stack.enter_context(begun)
        made = shown(walked, scene, settings, visit)
        bar = stack.enter_context(tqdm(made, "unsampling", len(sigmas), unit="frame", disable=quiet))
        for number, frame in enumerate(bar):
            picture = reel.add(frame.pictures[0], frame.index, None)
            if targets.frames:
                path = frame_path(targets.frames, number, frame.sigma)
                size = 3 * picture.width * picture.height
                background.submit(size, stale.discard, _write_frame, path, picture, text)
        sheet = reel.finish()
        background.finish()
    for leftover in stale:  # of an earlier run into the same folder
        leftover.unlink()
    if sheet is not None and targets.sheet:
        animation.write_png(targets.sheet, sheet, text)
    if targets.curve:
        animation.write_png(targets.curve, render.sigma_curve(scene.schedule, indices), text)
    return last


def _write_frame(path: Path, picture: Image.Image, text: str) -> Path:
    animation.write_png(path, picture, text)
    return path
