"""A run without a WebUI: picture files in, the noise progression and what goes on from it out.

Everything streams: a level is noised, shown, written and dropped, unless its latents are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..core import inversion, replay, trajectory
from ..core.noising import SeededDraws, blend, unsample, walk
from ..core.replay import Recording
from ..core.schedule import Levels, levels
from ..core.trajectory import Trajectory
from ..pictures import animation, render, roundtrip
from ..pictures.background import Background
from ..pictures.reel import Reel
from ..settings import Settings, to_infotext
from . import sampling
from .embedded import Denoiser, guided, make_model, masked
from .walkback import WalkBack, round_trip, walk_back

PREDICTION = {"gaussian": "eps", "gaussian-flow": "flow", "mixture": "eps"}
DEFAULT_STEPS = 20
FRAME_NAME = re.compile(r"\d{5,}_sigma_\d+\.\d{4}\.png")


CHUNK_VALUES = 2**20
"""Values of latents that are turned into pictures at once."""

Level = tuple[int, Tensor, Tensor, Tensor]
"""Schedule index, sigma, z and the masked z of one level."""


@dataclass(frozen=True)
class Step:
    """One frame of a progression: schedule index (None for the source itself), sigma, z and its picture."""

    index: int | None
    sigma: float
    z: Tensor
    picture: Image.Image


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


def load_picture(path: Path, size: int) -> Tensor:
    """A picture as latents in [-1, 1] with shape (1, 3, H, W), its long side at most ``size``.

    Transparency is laid on white.

    Raises:
        ValueError: if the file is no picture, OSError: if it cannot be read.
    """
    picture = ImageOps.exif_transpose(_open(path)).convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    paper = Image.new("RGBA", picture.size, "white")
    pixels = Image.alpha_composite(paper, picture).convert("RGB")
    return _to_tensor(pixels) * 2 - 1


def load_mask(path: Path, height: int, width: int) -> Tensor:
    """A mask as weights in [0, 1] with shape (1, 1, height, width); white is unsampled."""
    return _to_tensor(_open(path).convert("L").resize((width, height), Image.Resampling.BILINEAR))


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
        return picture
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from None


def _to_tensor(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2).float() / 255


def progression(source: Tensor, plan: Levels, settings: Settings, mask: Tensor | None) -> Iterator[Step]:
    """Every frame of a picture, least noisy first; each step's z is the unmasked one."""
    draw = SeededDraws((settings.seed,), tuple(source.shape[1:]))
    walked = walk(source, plan, draw, settings.noise, PREDICTION[settings.model], settings.normalize)
    levels = ((index, plan.schedule[index], z, blend(z, source, mask)) for index, z in walked)
    return _shown(levels, source, mask, settings)


def replayed(saved: Trajectory, settings: Settings) -> Iterator[Step]:
    """The frames of a saved trajectory, least noisy first."""
    found = list(zip(_indices(saved), saved.sigmas, saved.z))
    model = source_model(settings, saved.source, None)
    seen = {index: model(z, sigma.reshape(1)) for index, sigma, z in found} if settings.panel else None
    return _shown(((index, sigma, z, z) for index, sigma, z in found), saved.source, saved.mask, settings, seen)


def walked_back(
    walked: WalkBack, source: Tensor, plan: Levels, settings: Settings, mask: Tensor | None
) -> Iterator[Step]:
    """The frames of an inversion; z is what the model made, which saw no mask."""
    kept = [level for level in walked.levels if level.index in plan.kept]
    levels = ((level.index, plan.schedule[level.index], level.z, blend(level.z, source, mask)) for level in kept)
    return _shown(levels, source, mask, settings, walked.estimates)


def _shown(
    levels: Iterable[Level],
    source: Tensor,
    mask: Tensor | None,
    settings: Settings,
    estimates: Mapping[int, Tensor] | None = None,
) -> Iterator[Step]:
    """The steps of these levels with their pictures, the source before them if it is wanted.

    With estimates, the model's D(z) by schedule index, a picture is a panel: source, z, D(z).
    """
    clean = render.to_pictures(source)[0]

    def decode(taken: list[Level]) -> list[list[Image.Image]]:
        views = [render.viewed(m, source, mask, s, PREDICTION[settings.model], settings.view) for _, s, _, m in taken]
        pictures = render.to_pictures(torch.cat(views))
        if not estimates:
            return [[picture] for picture in pictures]
        seen = render.to_pictures(torch.cat([estimates[index] for index, *_ in taken]))
        return [[render.beside([clean, *pair])] for pair in zip(pictures, seen)]

    if settings.include_clean:
        yield Step(None, 0.0, source, render.beside([clean] * 3) if estimates else clean)
    chunk = max(1, CHUNK_VALUES // source.numel())
    for (index, sigma, z, _), (picture,) in render.in_chunks(levels, decode, chunk):
        yield Step(index, float(sigma), z, picture)


def source_model(settings: Settings, source: Tensor, mask: Tensor | None) -> Denoiser:
    """The embedded model under the source's own prompts and scale."""
    return _model(settings, (settings.positive, settings.negative), settings.cfg, source, mask)


def resampling_model(settings: Settings, source: Tensor, mask: Tensor | None) -> Denoiser:
    """The embedded model under the resampling's prompts and scale."""
    prompts = (settings.resample_positive or settings.positive, settings.resample_negative or settings.negative)
    scale = settings.cfg if settings.resample_cfg < 0 else settings.resample_cfg
    return _model(settings, prompts, scale, source, mask)


def _model(settings: Settings, prompts: tuple[str, str], scale: float, source: Tensor, mask: Tensor | None) -> Denoiser:
    model = guided(*(make_model(settings.model, p, *source.shape[-2:]) for p in prompts), scale)
    return model if mask is None else masked(model, source, mask)


def carry_back(z: Tensor, source: Tensor, mask: Tensor | None, sigmas: Tensor, settings: Settings, path: Path) -> None:
    """Carries the hand-off latent down the rest of the schedule and writes the picture it becomes.

    Arguments:
        z: The unmasked latent at ``sigmas[0]`` with shape (1, 3, H, W).
    """
    model = resampling_model(settings, source, mask)
    clean = blend(sampling.sample(model, z, sigmas, settings.sampler, (settings.seed,)), source, mask)
    animation.write_png(path, render.to_pictures(clean)[0], parameters(settings))


def recorded_levels(plan: Levels, settings: Settings) -> Levels:
    """Every level that a replay samples: from ``skip`` steps below the walk's noisiest."""
    return levels(plan.schedule, plan.kept[-1] + settings.skip)


def remaining(plan: Levels) -> Tensor:
    """The schedule from the walk's noisiest level to 0."""
    return plan.schedule[plan.kept[-1] :]


def record(source: Tensor, plan: Levels, settings: Settings, mask: Tensor | None, quiet: bool) -> Recording:
    """The picture as its sampler's noises."""
    below = recorded_levels(plan, settings)
    prediction = PREDICTION[settings.model]
    draw = SeededDraws((settings.seed,), tuple(source.shape[1:]))
    states = unsample(source, below, draw, settings.noise, prediction, settings.normalize)
    fresh = (draw(j) for j in count(len(plan.schedule) - 1))
    model, function = source_model(settings, source, mask), sampling.function(settings.sampler)
    return replay.record(function, model, remaining(below), states, source, fresh, prediction, disable=quiet)


def play_back(
    recording: Recording, skip: int, source: Tensor, mask: Tensor | None, settings: Settings, path: Path, quiet: bool
) -> None:
    """Samples a recording under the resampling's prompts and writes the picture it becomes.

    Arguments:
        skip: Steps to leave out at the recording's beginning.
    """
    model, function = resampling_model(settings, source, mask), sampling.function(settings.sampler)
    clean = replay.replay(function, model, recording.sigmas, recording, skip, disable=quiet)
    animation.write_png(path, render.to_pictures(clean)[0], parameters(settings))


def check_resampling(settings: Settings) -> None:
    """Refuses what the embedded model cannot be sampled with, before any work.

    Raises:
        ValueError: for an unknown prompt, or a sampler that is wrong for the prediction type or for a replay.
    """
    if settings.mode == "replay":
        sigmas = remaining(recorded_levels(plan_levels(settings), settings))
        replay.check_function(sampling.function(settings.sampler), sigmas)
    sampling.check_sampler(settings.sampler, PREDICTION[settings.model])
    for prompt in (settings.positive, settings.negative, settings.resample_positive, settings.resample_negative):
        make_model(settings.model, prompt, 1, 1)


def check_inversion(settings: Settings) -> str | None:
    """What is to be said before a picture is inverted: that another sampler than the named one is.

    Raises:
        ValueError: for an unknown prompt, or a sampler that can not be inverted.
    """
    for prompt in (settings.positive, settings.negative):
        make_model(settings.model, prompt, 1, 1)
    return inversion.kin(settings.sampler, settings.solver)[1]


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
    plan = plan_levels(settings)
    if settings.mode == "invert":
        model = source_model(settings, source, None)  # a model must not see a clean border at a high noise level
        walked = walk_back(model, source, plan, settings, PREDICTION[settings.model], quiet)
        steps = walked_back(walked, source, plan, settings, mask)
    else:
        steps = progression(source, plan, settings, mask)
    with trajectory.Kept(targets.latents) if targets.latents else nullcontext() as kept:
        last = _write(with_latents(steps, kept, source, mask), plan.schedule, list(plan.kept), settings, targets, quiet)
        recording = None
        if settings.mode == "replay" and (targets.latents or targets.resample):
            recording = record(source, plan, settings, mask, quiet)
        if kept is not None:
            result = Trajectory(
                z=kept.outline,
                sigmas=plan.sigmas,
                schedule=plan.schedule,
                start=plan.kept[-1],
                source=source,
                prediction=PREDICTION[settings.model],
                seeds=(settings.seed,),
                mask=mask,
                handoff=None if mask is None else last,
                replay=recording,
                settings=asdict(settings),
                info={"model": settings.model},
            )
            trajectory.save(result, targets.latents, kept)
    if targets.resample and recording is not None:
        play_back(recording, 0, source, mask, settings, targets.resample, quiet)
    elif targets.resample:
        carry_back(last, source, mask, remaining(plan), settings, targets.resample)
    if settings.mode == "invert":
        said = inversion.unconverged(walked.levels)
        if targets.report:
            trip = round_trip(model, walked, source, plan, settings.tolerance)
            animation.write_png(targets.report, roundtrip.page(trip), parameters(settings))
            said = [*said, *trip.lines()]
        return said
    return []


def with_latents(
    steps: Iterable[Step], kept: trajectory.Kept | None, source: Tensor, mask: Tensor | None
) -> Iterator[Step]:
    """The same steps; each level's masked z goes into ``kept`` on the way."""
    for step in steps:
        if kept is not None and step.index is not None:
            kept.add(blend(step.z, source, mask))
        yield step


def resume(saved: Trajectory, settings: Settings, targets: Targets, quiet: bool = False) -> None:
    """Goes on from a saved trajectory: sampled back, and shown again, as wanted."""
    skip = 0 if saved.replay is None else check_saved(saved, saved.replay, settings)
    indices = _indices(saved)
    _write(replayed(saved, settings), saved.schedule, indices, settings, targets, quiet)
    if targets.resample and saved.replay is not None:
        play_back(saved.replay, skip, saved.source, saved.mask, settings, targets.resample, quiet)
    elif targets.resample:
        carry_back(saved.latent, saved.source, saved.mask, saved.remaining, settings, targets.resample)


def check_saved(saved: Trajectory, recording: Recording, settings: Settings) -> int:
    """How many steps of a saved recording ``skip`` leaves out: it counts from the trajectory's noisiest level.

    Raises:
        ValueError: if the maps begin only below the level that is asked for, or do not fit the settings.
    """
    begun = len(saved.schedule) - 1 - len(recording.states) - saved.start
    if settings.skip < begun:
        raise ValueError(f"skip: {settings.skip} is below {begun}, where the saved maps begin")
    replay.check_replay(sampling.function(settings.sampler), recording.sigmas, recording, settings.skip - begun)
    return settings.skip - begun


def _indices(saved: Trajectory) -> list[int]:
    """The schedule index of each saved level (the embedded schedules repeat no sigma)."""
    return [int((saved.schedule == sigma).nonzero()[0]) for sigma in saved.sigmas]


def parameters(settings: Settings) -> str:
    """What is written into the files: the settings that are not default, as generation parameters.

    Text with a comma, colon or line break is quoted, as the WebUI does.
    """
    pairs = to_infotext(settings, "cli")
    quoted = {k: json.dumps(v, ensure_ascii=False) if set(v) & set(",:\n") else v for k, v in pairs.items()}
    return ", ".join(["Batch Unsampler"] + [f"{key}: {value}" for key, value in quoted.items()])


def _write(
    steps: Iterable[Step],
    schedule: Tensor,
    indices: list[int],
    settings: Settings,
    targets: Targets,
    quiet: bool,
) -> Tensor:
    """Runs the steps through every writer that is wanted; returns the noisiest z."""
    text = parameters(settings)
    sigmas = [0.0] * settings.include_clean + schedule[indices].tolist()
    stale = {f for f in targets.frames.glob("*.png") if FRAME_NAME.fullmatch(f.name)} if targets.frames else set()
    with ExitStack() as stack:
        background = stack.enter_context(Background())
        begun = Reel(settings, sigmas, text, background, targets.animation, targets.sheet is not None)
        reel = stack.enter_context(begun)
        bar = stack.enter_context(tqdm(steps, "unsampling", len(sigmas), unit="frame", disable=quiet))
        for number, step in enumerate(bar):
            picture = reel.add(step.picture, step.index, None)
            if targets.frames:
                path = targets.frames / f"{number:05d}_sigma_{step.sigma:.4f}.png"
                size = 3 * picture.width * picture.height
                background.submit(size, stale.discard, _write_frame, path, picture, text)
        sheet = reel.finish()
        background.finish()
    for leftover in stale:  # of an earlier run into the same folder
        leftover.unlink()
    if targets.sheet:
        animation.write_png(targets.sheet, sheet, text)
    if targets.curve:
        animation.write_png(targets.curve, render.sigma_curve(schedule, indices), text)
    return step.z


def _write_frame(path: Path, picture: Image.Image, text: str) -> Path:
    animation.write_png(path, picture, text)
    return path
