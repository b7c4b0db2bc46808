"""A run without a WebUI: picture files in, the noise progression and what goes on from it out.

Everything streams: a level is noised, shown, written and dropped, unless its latents are asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..core import inversion, replay, trajectory
from ..core.held import every_level, unguidable
from ..core.kept import Kept
from ..core.noising import SeededDraws, walk
from ..core.schedule import Levels, levels, noisy, step_at
from ..core.trajectory import Trajectory
from ..pictures import animation, render, roundtrip
from ..pictures.background import Background
from ..pictures.film import Film
from ..pictures.fitting import Fit
from ..pictures.progression import Frame, Scene, Visit, frames, stills
from ..pictures.reel import Reel, making, timing
from ..settings import Settings, surface_fields
from . import memory, sampling
from .embedded import Denoiser, make_model
from .folders import flag
from .onward import (
    PREDICTION,
    Listen,
    carry_back,
    check_saved,
    first_draw,
    guide_by,
    parameters,
    play_back,
    record,
    recorded_levels,
    remaining,
    resampler,
    shared_levels,
    source_model,
)
from .progress import Bars, silent, terminal
from .stills import Stills, foreign
from .stopping import Hold, unstopped
from .sweeping import Sweep
from .walkback import WalkBack, round_trip, walk_back

DEFAULT_STEPS = 20
CHUNK_VALUES = 2**20
"""Values of latents that are turned into pictures at once."""


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
    sweep: Path | None = None
    sweep_pictures: Path | None = None

    @property
    def samples(self) -> bool:
        """Whether anything is sampled back to a picture."""
        return bool(self.resample or self.sweeps)

    @property
    def sweeps(self) -> bool:
        """Whether a strength sweep is wanted."""
        return bool(self.sweep or self.sweep_pictures)

    def films(self, settings: Settings) -> bool:
        """Whether the sampling back is shown."""
        shows = bool(self.animation or self.frames or self.sheet)
        return shows and bool(self.resample) and settings.film != "noising"

    def spooled(self, settings: Settings) -> Path | None:
        """Beside which file the noises of a replay are kept while they are found, if they are."""
        return (self.latents or self.resample) if settings.mode == "replay" else None


@dataclass(frozen=True, eq=False)
class Story:
    """What the frames show, by schedule index: the noising, least noisy first, then the sampling.

    Attributes:
        schedule: The descending schedule, with shape (n + 1).
        clean: Whether the source comes first.
        noising: The noising's levels.
        film: The steps of the sampling, which ends with its picture; empty where it is not shown.
    """

    schedule: Tensor
    clean: bool
    noising: Sequence[int]
    film: Sequence[int]

    @property
    def sigmas(self) -> list[float]:
        """The noise level of every frame, 0 for the source and for the picture that comes back."""
        said = [0.0] * self.clean + self.schedule[list(self.noising)].tolist()
        return said + ([*self.schedule[list(self.film)].tolist(), 0.0] if self.film else [])


def story(settings: Settings, targets: Targets, schedule: Tensor, kept: Sequence[int], first: int) -> Story:
    """What the frames of a run show.

    Arguments:
        kept: The kept levels' schedule indices, least noisy first.
        first: The schedule index at which sampling back begins.
    """
    films = targets.films(settings)
    noising = settings.film == "both" or not films
    film = [index for index in reversed(kept) if index >= first] if films else []
    return Story(schedule, settings.include_clean and noising, kept if noising else (), film)


def planned_story(settings: Settings, targets: Targets, plan: Levels) -> Story:
    """What the frames of a picture's run show."""
    begins = recorded_levels(plan, settings) if targets.spooled(settings) else plan
    return story(settings, targets, plan.schedule, plan.kept, begins.kept[-1])


def check(settings: Settings, targets: Targets) -> list[str]:
    """Refuses what the embedded model cannot do, before any work; returns what there is to say before it.

    Raises:
        ValueError: for an unknown prompt, or a sampler that is wrong for the mode or the prediction type.
    """
    said, resamples, plan = [], targets.samples, plan_levels(settings)
    if settings.mode == "invert" and (kin := inversion.kin(settings.sampler, settings.solver)[1]):
        said.append(kin + (f", and sampled back by {resampler(settings)}" if resamples else ""))
    names = ["positive", "negative"] if resamples or settings.mode != "noise" else []
    _check_prompts(settings, names + (["resample_positive", "resample_negative"] if resamples else []))
    if settings.mode == "replay":
        replay.check_function(sampling.function(settings.sampler), remaining(recorded_levels(plan, settings)))
    if (resamples and settings.mode == "noise") or settings.mode == "replay":
        sampling.check_sampler(settings.sampler, PREDICTION[settings.model])
    _check_steps(settings, targets, resampler(settings), remaining(plan))
    said += _swept_from_inversion(settings, targets, resampler(settings))
    if settings.end_at_sigma > 0 and not step_at(plan.schedule, settings.end_at_sigma)[1]:
        lowest = float(plan.schedule[plan.kept[-1]])
        said.append(f"end_at_sigma: {settings.end_at_sigma:g} is below the lowest level; it ends at {lowest:.4g}")
    return said


def _swept_from_inversion(settings: Settings, targets: Targets, sampler: str) -> list[str]:
    """What there is to say of a strength sweep whose levels are an inversion's."""
    said = inversion.from_below(sampler) if targets.sweeps and settings.mode == "invert" else None
    return [] if said is None else [f"--sweep: {said}"]


def _check_steps(settings: Settings, targets: Targets, sampler: str, sigmas: Tensor) -> None:
    """What guide and film need of the resampling's sampler."""
    if settings.guide and targets.resample:
        sampling.check_walks(sampler, sigmas)
    walks = "sigmas" in inspect.signature(sampling.function(sampler)).parameters
    if targets.films(settings) and not walks:
        raise ValueError(
            f"film: {settings.film} needs a sampler that walks the schedule; {sampler!r} chooses its own steps"
        )


def _check_prompts(settings: Settings, names: list[str]) -> None:
    for name in names:
        try:
            make_model(settings.model, getattr(settings, name), 1, 1)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_resume(saved: Trajectory, settings: Settings, chosen: bool, targets: Targets) -> list[str]:
    """As :func:`check`, of a saved trajectory.

    Arguments:
        chosen: Whether the sampler is a new choice, not the trajectory's.
    """
    resamples = targets.samples
    skip = 0 if saved.replay is None else check_saved(saved, saved.replay, settings)
    check_frames(settings, targets, saved.schedule, kept_indices(saved), first_sampled(saved, skip))
    names = ["positive", "negative"] if resamples or settings.panel else []
    _check_prompts(settings, names + (["resample_positive", "resample_negative"] if resamples else []))
    if not resamples:
        return []
    if settings.guide and targets.resample and (why := unguidable(saved)):
        raise ValueError(f"guide: the file cannot guide; {why}")
    if targets.sweeps and saved.blended:
        raise ValueError("--sweep: the file's levels are masked (format 1), of which only the noisiest can be sampled")
    _check_steps(settings, targets, settings.sampler if chosen else resampler(settings), saved.remaining)
    inverted = settings.mode == "invert"
    if not inverted or chosen:
        sampling.check_sampler(settings.sampler, PREDICTION[settings.model])
    said = _swept_from_inversion(settings, targets, settings.sampler if chosen else resampler(settings))
    if inverted and chosen:
        made_by = resampler(replace(settings, sampler=saved.settings["sampler"]))
        if settings.sampler != made_by:
            said.append(
                f"sampler: {settings.sampler!r} is not {made_by!r}, which was inverted: the picture will not come back"
            )
    elif inverted and settings.sampler != resampler(settings):
        said.append(f"{settings.sampler} was inverted as {resampler(settings)}, and is sampled back by it")
    return said


def check_frames(settings: Settings, targets: Targets, schedule: Tensor, kept: Sequence[int], first: int) -> None:
    """Refuses to write frames over files that this program did not make; see :func:`story`.

    Raises:
        ValueError: naming the first.
    """
    shown, swept = story(settings, targets, schedule, kept, first).sigmas, schedule[list(kept)].tolist()
    for target, folder, sigmas in (
        ("frames", targets.frames, shown),
        ("sweep_pictures", targets.sweep_pictures, swept),
    ):
        for path in foreign(folder, sigmas):
            raise ValueError(f"{flag(target)}: {path} was not written by this program; name another folder")


def check_animation(target: str, path: Path | None, settings: Settings, sigmas: list[float], size: list[int]) -> None:
    """Refuses an animation that its format cannot hold.

    Arguments:
        sigmas: The noise level of every frame.
        size: Height and width of a frame.

    Raises:
        ValueError: saying what is too long or too large.
    """
    if path is None:
        return
    animation.check_format(path.suffix.lower())
    form, (width, height) = animation.FORMATS[path.suffix.lower()], making(settings).size((size[1], size[0]))
    longest = timing(settings, sigmas).longest()
    if longest > form.ticks / form.ticks_per_second:
        most = form.ticks / form.ticks_per_second
        raise ValueError(f"duration: a frame of {path} is shown {longest:g} s, above the format's {most:g} s")
    if max(width, height) > form.side:
        called = f"{flag(target)}: frames of {width} x {height} in {path}"
        raise ValueError(f"{called} are above the format's {form.side}; see --size")


def _check_animations(settings: Settings, targets: Targets, told: Story, kept: Sequence[int], source: Tensor) -> None:
    height, width = source.shape[-2:]
    panel = [height, width * (3 if settings.panel else 1)]
    check_animation("animation", targets.animation, settings, told.sigmas, panel)
    check_animation("sweep", targets.sweep, settings, told.schedule[list(kept)].tolist(), [height, width])


def plan_levels(settings: Settings) -> Levels:
    """The walk that settings ask of the embedded models.

    Raises:
        ValueError: for a scheduler that the model cannot have.
    """
    sigmas = sampling.get_sigmas(settings.scheduler, settings.steps or DEFAULT_STEPS, PREDICTION[settings.model])
    end = max(settings.end_at_step, 0)
    if settings.end_at_sigma > 0:
        end, _ = step_at(sigmas, settings.end_at_sigma)
    return levels(sigmas, end, settings.step_increment)


def unsample_picture(
    source: Tensor,
    settings: Settings,
    targets: Targets,
    mask: Tensor | None = None,
    bars: Bars = terminal,
    hold: Hold = unstopped,
) -> list[str]:
    """Unsamples one picture of shape (1, 3, H, W) and writes what is wanted; returns what there is to say of it.

    Arguments:
        hold: Keeps signals while a film is made.
    """
    plan, inverts = plan_levels(settings), settings.mode == "invert"
    spooled, told = targets.spooled(settings), planned_story(settings, targets, plan)
    _check_animations(settings, targets, told, plan.kept, source)
    if inverts:
        size = 4 * len(plan.visited) * source.numel() * inversion.held(settings.sampler, settings.solver)
        memory.check(size, f"the {len(plan.visited)} levels of an inversion")
    model = source_model(settings, source, None)  # a model must not see a clean border at a high noise level
    walked_back = walk_back(model, source, plan, settings, PREDICTION[settings.model], bars) if inverts else None
    walked = noised(source, plan, settings) if walked_back is None else walked_back.kept(plan)
    seen = {} if walked_back is None else walked_back.estimates
    scene = Scene(source, plan.schedule, PREDICTION[settings.model], settings.view, mask, seen)
    recording = None if spooled is None else record(source, plan, settings, mask, bars, partial(Kept, spooled))
    level = shared_levels(source, plan.schedule, settings)
    if walked_back is not None:
        level = {reached.index: reached.z for reached in walked_back.levels}.__getitem__
    back = Back(scene, settings, resampler(settings), level, recording, 0, hold)
    with Kept(targets.latents) if targets.latents else nullcontext() as kept:
        fits = _write(walked, scene, told, plan, back, settings, targets, bars, kept)
        if kept is not None and targets.latents is not None:
            _keep(kept, scene, plan, settings, targets.latents, recording)
    said = [] if walked_back is None else _told(walked_back, model, scene, plan, settings, targets)
    return [*said, *_fitted(fits)]


@dataclass(frozen=True, eq=False)
class Back:
    """How a picture's levels are sampled back.

    Attributes:
        scene: The picture.
        settings: What is asked for.
        sampler: Who samples.
        level: z of any executed schedule index, where a guide is wanted.
        recording: The noises of a replay, if it is one.
        skip: Steps to leave out at the recording's beginning.
        hold: Keeps signals while a film is made.
    """

    scene: Scene
    settings: Settings
    sampler: str
    level: Callable[[int], Tensor]
    recording: replay.Recording | None
    skip: int
    hold: Hold = unstopped

    def __call__(self, index: int, z: Tensor, bars: Bars, listen: Listen | None = None) -> Image.Image:
        """The picture that z of a schedule index becomes; ``listen`` is told the schedule index of each step."""
        scene, settings = self.scene, self.settings
        first = index
        if self.recording is not None:
            states = len(self.recording.states)
            first = len(scene.schedule) - 1 - states + min(self.skip, states - 1)
        heard = None if listen is None else lambda step, x, seen: listen(first + step, x, seen)
        if self.recording is not None:
            return play_back(self.recording, self.skip, scene.source, scene.mask, settings, bars, heard)
        guide = guide_by(self.level, scene.schedule, index, settings)
        draw = first_draw(settings, scene.schedule, index)
        way = (scene.schedule[index:], settings, self.sampler, draw)
        return carry_back(z, scene.source, scene.mask, *way, bars, guide, heard)


def noised(source: Tensor, plan: Levels, settings: Settings) -> Iterator[tuple[int, Tensor]]:
    """Every kept level of a picture by the forward process, least noisy first, as (schedule index, z)."""
    draw = SeededDraws((settings.seed,), tuple(source.shape[1:]))
    return walk(source, plan, draw, settings.noise, PREDICTION[settings.model], settings.normalize)


def _keep(
    kept: Kept,
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


def resume(
    saved: Trajectory,
    settings: Settings,
    targets: Targets,
    chosen: bool = False,
    bars: Bars = terminal,
    hold: Hold = unstopped,
) -> list[str]:
    """Goes on from a saved trajectory: sampled back, and shown again, as wanted; returns what there is to say of it.

    Arguments:
        chosen: Whether the sampler is a new choice, not the trajectory's.
        hold: Keeps signals while a film is made.
    """
    skip = 0 if saved.replay is None else check_saved(saved, saved.replay, settings)
    indices = kept_indices(saved)
    told = story(settings, targets, saved.schedule, indices, first_sampled(saved, skip))
    _check_animations(settings, targets, told, indices, saved.source)
    model = source_model(settings, saved.source, None)
    seen = {i: model(z, sigma.reshape(1)) for i, sigma, z in zip(indices, saved.sigmas, saved.z) if settings.panel}
    prediction = PREDICTION[settings.model]
    scene = Scene(saved.source, saved.schedule, prediction, settings.view, saved.mask, seen, blended=saved.blended)
    level = every_level(saved, indices, saved.source)
    sampler = settings.sampler if chosen else resampler(settings)
    back = Back(scene, settings, sampler, level, saved.replay, skip, hold)
    plan = Levels(saved.schedule, tuple(range(noisy(saved.schedule) - 1, saved.start - 1, -1)), tuple(indices))
    levels = zip(indices, saved.z)
    return _fitted(_write(levels, scene, told, plan, back, settings, targets, bars, handoff=saved.latent))


def _fitted(fits: Iterable[Fit | None]) -> list[str]:
    """What was chosen for animations of limited size.

    Raises:
        ValueError: for one that could not be small enough, when all else is made.
    """
    every = [fit for fit in fits if fit is not None]
    for fit in every:
        if not fit.kept:
            raise ValueError(fit.said())
    return [fit.said() for fit in every]


def stored_settings(saved: Trajectory, called: str) -> dict[str, Any]:
    """The settings that a file of an embedded model was made with, as far as they are of the command line.

    Raises:
        ValueError: naming the file as it is ``called``, if it is of none.
    """
    if saved.source.ndim != 4 or tuple(saved.source.shape[:2]) != (1, 3):
        raise ValueError(f"{called}: latents {tuple(saved.source.shape)} are not one picture's (1, 3, height, width)")
    model = saved.info.get("model")
    if model not in PREDICTION:
        raise ValueError(f"{called}: made by model {model!r}, which is not an embedded one")
    if PREDICTION[model] != saved.prediction:
        raise ValueError(f"{called}: of type {saved.prediction}, where its model {model!r} is {PREDICTION[model]}")
    names = {f.name for f in surface_fields("cli")}
    stored = {name: value for name, value in saved.settings.items() if name in names}
    if stored.get("model", Settings.model) != model:
        raise ValueError(f"{called}: made by model {model!r}, where its settings say {stored.get('model')!r}")
    return stored


def first_sampled(saved: Trajectory, skip: int) -> int:
    """The schedule index at which sampling back begins; ``skip`` is of a recording's own steps."""
    if saved.replay is None:
        return saved.start
    states = len(saved.replay.states)
    return len(saved.schedule) - 1 - states + min(skip, states - 1)


def kept_indices(saved: Trajectory) -> list[int]:
    """The schedule index of each saved level (the embedded schedules repeat no sigma)."""
    return [int((saved.schedule == sigma).nonzero()[0]) for sigma in saved.sigmas]


def shown(
    walked: Iterable[tuple[int, Tensor]],
    scene: Scene,
    settings: Settings,
    visit: Visit = lambda *_: True,
    clean: bool | None = None,
) -> Iterator[Frame]:
    """The frames of one picture's levels, least noisy first; ``clean`` overrules the settings' include_clean."""
    begins = settings.include_clean if clean is None else clean
    return frames(walked, scene, begins, _decode, _chunk(scene), visit)


def _decode(latents: Tensor) -> Callable[[], list[Image.Image]]:
    return partial(render.to_pictures, latents)  # the embedded models' latents are pictures


def _chunk(scene: Scene) -> int:
    return max(1, CHUNK_VALUES // scene.source.numel())


def _write(
    walked: Iterable[tuple[int, Tensor]],
    scene: Scene,
    told: Story,
    plan: Levels,
    back: Back,
    settings: Settings,
    targets: Targets,
    bars: Bars,
    kept: Kept | None = None,
    handoff: Tensor | None = None,
) -> list[Fit | None]:
    """Runs the levels through every writer that is wanted, and samples them back; a stopped film keeps what it has.

    Returns what became of the animations of limited size.

    Arguments:
        handoff: Where sampling begins; None is the noisiest z.
    """
    text, passing = parameters(settings), _Passing(scene.source, plan, bool(told.noising), kept, handoff)
    with back.hold() if told.film else unstopped() as stopped, ExitStack() as stack:
        background = stack.enter_context(Background())
        if targets.sweeps:
            passing.sweep = stack.enter_context(_swept(plan, back, settings, targets, text))
        begun = Reel(settings, told.sigmas, text, background, targets.animation, targets.sheet is not None)
        reel = stack.enter_context(begun)
        folder = Stills(targets.frames, text, background) if targets.frames else None
        bar = stack.enter_context(bars("unsampling", len(told.sigmas), "frame"))

        def film() -> Iterator[tuple[Frame, str]]:
            if told.film and targets.resample:
                yield from _filmed(passing.last, scene, plan, back, settings, targets.resample, text, bars, stopped)

        for frame, part in _then(shown(walked, scene, settings, passing, told.clean), film, stopped):
            picture = reel.add(frame.pictures[0], frame.index, None, part)
            if folder is not None:
                folder.add(picture, frame.sigma)
            bar.update()
        sheet = reel.finish()
        background.finish()
        for writer in (folder, passing.sweep):
            if writer is not None:
                writer.finish()
        if sheet is not None and targets.sheet:
            animation.write_png(targets.sheet, sheet, text)
    if targets.curve:
        animation.write_png(targets.curve, render.sigma_curve(scene.schedule, list(plan.kept)), text)
    if targets.resample and not told.film:
        animation.write_png(targets.resample, back(plan.kept[-1], passing.last, bars), text)
    return [reel.fit, None if passing.sweep is None else passing.sweep.fit]


class _Passing:
    """What each level is handed to on its way to its frame; the last one is where sampling begins."""

    def __init__(self, source: Tensor, plan: Levels, is_shown: bool, kept: Kept | None, handoff: Tensor | None) -> None:
        self._noisiest, self._is_shown, self._kept, self._handoff = plan.kept[-1], is_shown, kept, handoff
        self.last = source
        self.sweep: Sweep | None = None

    def __call__(self, index: int, z: Tensor, masked: Tensor) -> bool:
        self.last = self._handoff if self._handoff is not None and index == self._noisiest else z
        if self._kept is not None:
            self._kept.add(z)
        if self.sweep is not None:
            self.sweep.take(index, self.last)
        return self._is_shown


def _then(
    noising: Iterable[Frame], film: Callable[[], Iterator[tuple[Frame, str]]], stopped: Callable[[], bool]
) -> Iterator[tuple[Frame, str]]:
    """The frames of the noising, and, if none was stopped, of the film; each with its part's name."""
    for frame in noising:
        yield frame, ""
        if stopped():
            return
    yield from film()


def _swept(plan: Levels, back: Back, settings: Settings, targets: Targets, text: str) -> Sweep:
    """The strength sweep that is wanted."""
    sigmas, own = plan.sigmas.tolist(), partial(back, bars=silent)
    return Sweep(settings, sigmas, text, targets.sweep, targets.sweep_pictures, own)


class _EndedError(Exception):
    """A film's sampling was stopped between two steps."""


def _filmed(
    z: Tensor,
    scene: Scene,
    plan: Levels,
    back: Back,
    settings: Settings,
    path: Path,
    text: str,
    bars: Bars,
    stopped: Callable[[], bool],
) -> Iterator[tuple[Frame, str]]:
    """Samples back to a picture, writes it, and shows how it came about; or as far as it came."""
    picture = None

    def listen(index: int, state: Tensor, estimate: Tensor) -> None:
        film.listen(index, state, estimate)
        if stopped() and film.indices:
            raise _EndedError

    with Film(path, plan, scene.prediction, settings) as film:
        with suppress(_EndedError):
            picture = back(plan.kept[-1], z, bars, listen)
            animation.write_png(path, picture, text)
        for frame in stills(film.levels(), 1, scene.schedule, _decode, _chunk(scene)):
            yield frame, "sampling"
    if picture is not None:
        yield Frame(None, 0.0, [picture]), "result"
