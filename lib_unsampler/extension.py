"""One img2img request with Batch Unsampler ticked: what happens when, between host and core.

The host swallows exceptions in its hooks and goes on with a plain img2img. So errors are found
early and raised where nothing swallows them: bad requests from ``p.init``, before any work, and
what fails later from ``p.save_samples``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import __version__, animation, driven, host, render, trajectory
from .driven import Batch, Plan
from .inversion import kin
from .noising import blend, walk
from .replay import Recording, check_function
from .schedule import levels
from .settings import INFOTEXT_PREFIX, VERSION_KEY, Settings, SettingsError, parse_args, surface_fields, to_infotext
from .timing import Timing
from .trajectory import Trajectory

PATCHED = ("init", "sample", "save_samples")
PICTURES = {"frames", "animation", "contact sheet"}
HOST_FIELDS = {f.name for f in surface_fields("host")}


def attach(p: Any, args: Sequence[Any]) -> None:
    """Prepares a request from the script's arguments; never raises, since the host would swallow it."""
    detach(p)
    try:
        enabled, settings = parse_args(args, "host")
        if enabled:
            Request(p, settings).attach()
    except SettingsError as error:
        _refuse(p, f"Batch Unsampler: {error}")
    except Exception as error:
        _refuse(p, f"Batch Unsampler: {type(error).__name__}: {error}")


def finish(p: Any, processed: Any) -> None:
    """Hands the request's results over and takes everything off it again."""
    request = vars(p).get("batch_unsampler")
    detach(p)
    if request is not None:
        request.hand_over(processed)


def detach(p: Any) -> None:
    """Takes every attribute of an earlier request off ``p`` (the host reuses it in loops)."""
    request = vars(p).pop("batch_unsampler", None)
    for name in PATCHED:
        _unpatch(p, name)
    if request is not None:
        request.restore()


def _patch(p: Any, name: str, function: Callable[..., Any]) -> None:
    def patched(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    patched.batch_unsampler = True
    patched.before = vars(p).get(name)  # another script's own patch, if there is one
    setattr(p, name, patched)


def _unpatch(p: Any, name: str) -> None:
    patched = vars(p).get(name)
    if not getattr(patched, "batch_unsampler", False):
        return
    if patched.before is None:
        delattr(p, name)
    else:
        setattr(p, name, patched.before)


def _refuse(p: Any, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        detach(p)
        raise host.RefusedError(message)

    _patch(p, "init", refuse)


@dataclass(frozen=True)
class Frame:
    """One picture of one image of the batch, with the level it shows (step None: the source)."""

    image: int
    step: int | None
    sigma: float
    picture: Image.Image


class Request:
    """The run of one request over all its batches."""

    def __init__(self, p: Any, settings: Settings) -> None:
        self.p = p
        self.settings = settings
        self.wanted = set(settings.output)
        self.error: Exception | None = None
        self.animations: list[Any] = []
        self.sheets: list[Any] = []
        self.frames: list[Any] = []
        self.texts: dict[str, list[str]] = {"animations": [], "sheets": [], "frames": []}
        self.manifest: dict[str, list[dict[str, Any]]] = {"animations": [], "sheets": [], "frames": []}
        self.latents: list[str] = []
        self.sigmas: list[float] = []
        self._made: list[Frame] = []
        self._trajectory: Trajectory | None = None
        self.script = host.selected_script(p)
        self.stand_ins: list[tuple[Image.Image, str, dict[str, Any]]] = []

    @property
    def samples(self) -> bool:
        """Whether img2img's own sampling is wanted at all."""
        return "init" in self.wanted

    def attach(self) -> None:
        """Puts this request's three wrappers on ``p``."""
        p = self.p
        p.batch_unsampler = self
        self._init, self._sample, self._save_samples = p.init, p.sample, p.save_samples
        self._own_grid = p.do_not_save_grid
        p.do_not_save_grid = p.do_not_save_grid or not self.samples
        for name in PATCHED:
            _patch(p, name, getattr(self, f"on_{name}"))
        p.extra_generation_params[VERSION_KEY] = __version__
        p.extra_generation_params.update(to_infotext(self.settings, "host"))

    def restore(self) -> None:
        self.p.do_not_save_grid = self._own_grid

    def on_init(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses what the sampler cannot do, then lets the host go on."""
        _unpatch(self.p, "init")
        name = self.p.sampler_name
        sampler = host.make_sampler(self.p)
        refused = self._refusal(sampler)
        if refused:
            detach(self.p)
            raise host.RefusedError(f"Batch Unsampler: {refused}")
        if not host.has_sigmas(sampler):
            host.comment(self.p, f"{name} has no sigma schedule: its timesteps' noise levels are shown")
            self.p.extra_generation_params[INFOTEXT_PREFIX + "schedule"] = f"{name} timesteps"
        if self.script is not None and self.wanted - {"init", "latents"}:
            host.comment(self.p, f"{self.script} gets one picture for each image; the others are only saved to disk")
        return self._init(*args, **kwargs)

    def _refusal(self, sampler: Any) -> str | None:
        """Why this request cannot be done with its sampler, if it cannot."""
        mode, driving = self.settings.mode, self.settings.mode != "noise"
        if not host.has_sigmas(sampler):
            if not self.samples and not driving:
                return None
            needs = "output: init" if self.samples else f"mode: {mode}"
            return (
                f"{needs} needs a sampler with a sigma schedule, and {self.p.sampler_name!r} has timesteps; "
                "choose a k-diffusion sampler (Euler, DPM++, Heun, LMS, ...)"
            )
        refiner = host.refiner(self.p)
        if driving and refiner is not None:
            return f"refiner: {refiner!r} takes the model's place on the way; mode {mode} needs one model (None)"
        try:
            if mode == "invert":
                kin(host.sampler_function(sampler), self.settings.solver)
            elif mode == "replay":
                check_function(sampler.func)
        except ValueError as error:
            return str(error)
        return None

    def on_sample(self, *args: Any, **kwargs: Any) -> Any:
        """The host's sampling of one batch, with ours in it; then the frames are made."""
        p = self.p
        self._made, self._trajectory = [], None
        self._batch: tuple[Tensor, Tensor, Plan] | None = None
        self._inverted: driven.Inverted | None = None
        self._recording: Recording | None = None
        own = p.sampler.sample_img2img
        if p.iteration == 0:
            jobs = (self.settings.mode != "noise") + (self.samples and bool(self.wanted - {"init"}))
            host.add_jobs(jobs * p.n_iter)

        def sample_img2img(*args: Any, **kwargs: Any) -> Tensor:
            return self._start(Batch(own, *args, **kwargs))

        try:
            with host.attribute(p.sampler, "sample_img2img", sample_img2img):
                samples = self._sample(*args, **kwargs)
        except BaseException:
            detach(p)
            raise
        try:
            if self._batch is None and self.error is None:
                raise host.RefusedError(
                    f"Batch Unsampler: {self.script or 'another extension'} samples in its own way, "
                    "past img2img's; untick one of the two"
                )
            if self.error is None:
                self._make(*self._batch)
        except Exception as error:
            self.error = error
        if self.samples and self.error is None:
            return samples
        shape = (3, p.height, p.width)
        return host.Decoded(torch.zeros(shape) for _ in p.prompts)

    def plan(self) -> Plan:
        """The levels of the host's schedule that this request asks for."""
        p, settings = self.p, self.settings
        if self.samples:
            total, start = host.img2img_steps(p)
        else:
            total, start = settings.steps or p.steps, 0
        asked = settings.end_at_step if settings.end_at_step >= 0 else start
        walked = levels(host.get_sigmas(p, p.sampler, total), asked, settings.step_increment)
        prediction = host.prediction_type(p.sd_model)
        return Plan(walked, prediction, total, own_start=walked.kept[-1] == start)

    def _start(self, batch: Batch) -> Tensor:
        """In place of the sampler's ``sample_img2img``: lets the model drive what it drives, then samples from there."""
        x = batch.x
        try:
            if x.ndim > 4 and x.shape[2] > 1:
                raise ValueError("videos are not supported, only pictures")
            plan = self.plan()
            batch = replace(batch, x=x.detach().clone(), noise=batch.noise.detach().clone())
            self._batch = (batch.x, batch.noise, plan)
            self._drive(batch, plan)
            if self._inverted is not None or self._recording is not None:
                host.next_job()
            if not self.samples or host.stopped():
                return x
            if not plan.own_start:
                overrides = f"end at step {plan.start} overrides the denoising strength"
                host.comment(self.p, f"{overrides}: starts at step {plan.start} of {plan.total}")
            return self._sample_from(batch, plan)
        except ValueError as error:
            self.error = host.RefusedError(f"Batch Unsampler: {error}")
        except Exception as error:
            self.error = error
        return x

    def _drive(self, batch: Batch, plan: Plan) -> None:
        """What needs the model's calls before any frame or latent is there."""
        if self.settings.mode == "invert":
            self._inverted = driven.invert(batch, plan, self.settings)
            self._batch = (self._inverted.source, batch.noise, plan)
        elif self.settings.mode == "replay" and self.wanted & {"init", "latents"}:
            self._recording = driven.record(batch, plan, host.HostDraws(self.p, batch.noise), self.settings)

    def _sample_from(self, batch: Batch, plan: Plan) -> Tensor:
        """img2img's own sampling, from z at its start level."""
        if self._recording is not None:
            return driven.sample_replayed(batch, plan, self._recording, self.settings.skip)
        by_noise = self.settings.mode == "noise"
        if by_noise and self.settings.noise == "shared" and not self.settings.normalize and plan.own_start:
            return batch.sample(plan)
        *_, (_, z) = self._walk()
        with host.starting_from(self.p.sampler, z):
            return batch.sample(plan)

    def _walk(self) -> Iterator[tuple[int, Tensor]]:
        """Every kept level, least noisy first, as (schedule index, z)."""
        x, noise, plan = self._batch
        if self._inverted is not None:
            return self._inverted.kept(plan)
        kind = "independent" if self.settings.mode == "replay" else self.settings.noise
        draws = host.HostDraws(self.p, noise)
        return walk(x, plan.levels, draws, kind, plan.prediction, self.settings.normalize)

    def _make(self, x: Tensor, noise: Tensor, plan: Plan) -> None:
        """Walks one batch: makes its frames' pictures and keeps its latents, as wanted."""
        shown = bool(self.wanted & PICTURES)
        standing_in = self.script is not None and not self.samples
        if not shown and not standing_in and "latents" not in self.wanted:
            return
        total = len(plan.levels.kept) + (shown and self.settings.include_clean)
        progress = host.Progress(total, own_job=self.samples)
        mask = getattr(self.p, "nmask", None)
        kept: list[tuple[int, Tensor]] = []
        if shown and self.settings.include_clean:
            self._show(x, None, 0.0, progress)
        z = None
        for index, z in self._walk():
            if host.stopped():
                break
            sigma = plan.levels.schedule[index]
            masked = blend(z, x, mask)
            if shown or (standing_in and index == plan.levels.kept[-1]):
                view = render.viewed(masked, x, mask, sigma, plan.prediction, self.settings.view)
                self._show(view, index, float(sigma), progress)
            kept.append((index, masked.cpu() if "latents" in self.wanted else sigma))
        self.sigmas = [float(plan.levels.schedule[index]) for index, _ in kept]
        if "latents" in self.wanted and kept:
            self._trajectory = self._record(kept, plan, x, mask, z)
        progress.done()

    def _show(self, latents: Tensor, step: int | None, sigma: float, progress: host.Progress) -> None:
        decoded = torch.stack(host.decode(self.p, latents))
        for image, picture in enumerate(render.to_pictures(decoded)):
            self._made.append(Frame(image, step, sigma, host.overlaid(self.p, picture, image)))
        progress.step(len(self._made) // len(latents), self._made[-1].picture)

    def _record(
        self, kept: list[tuple[int, Tensor]], plan: Plan, x: Tensor, mask: Tensor | None, last: Tensor
    ) -> Trajectory:
        indices = [index for index, _ in kept]
        p = self.p
        return Trajectory(
            z=torch.stack([z for _, z in kept]),
            sigmas=plan.levels.schedule[indices],
            schedule=plan.levels.schedule,
            start=indices[-1],
            source=x.cpu(),
            prediction=plan.prediction,
            seeds=tuple(int(seed) for seed in p.seeds),
            mask=None if mask is None else mask.cpu().float(),
            handoff=None if mask is None else last.cpu(),
            settings=asdict(self.settings),
            info={"model": str(p.sd_model_name), "sampler": str(p.sampler_name), "scheduler": str(p.scheduler)},
        )

    def on_save_samples(self, *args: Any, **kwargs: Any) -> bool:
        """Once per batch, after its sampling: raises what failed, files what was made."""
        if self.error is not None:
            error = self.error
            detach(self.p)
            raise error
        save = self._save_samples(*args, **kwargs)
        for image in range(len(self.p.prompts)):
            self._file_animation([f for f in self._made if f.image == image], image, save)
            self._file_sheet([f for f in self._made if f.image == image], image, save)
        self._file_frames(save)
        if self.script is not None and not self.samples:
            self._stand_in()
        self._file_latents()
        self._made = []
        return save and self.samples

    def _file_animation(self, frames: list[Frame], image: int, save: bool) -> None:
        if "animation" not in self.wanted or not frames:
            return
        text = host.infotext(self.p, image, {})
        pictures = [f.picture for f in frames]
        file = host.temporary_file(".gif")
        timing = Timing([self.settings.duration] * len(pictures), reverse=self.settings.reverse)
        animation.write(file, pictures, timing, text)
        if save:
            file = host.save_file(self.p, file, pictures[0], image, text, "-unsampling")
        self.animations.append(host.gallery_item(self.p, file, pictures[0], text))
        self._note("animations", text, {"kind": "animation", "image": self._number(image)})

    def _file_sheet(self, frames: list[Frame], image: int, save: bool) -> None:
        if "contact sheet" not in self.wanted or not frames:
            return
        text = host.infotext(self.p, image, {})
        captions = [render.sigma_text(f.sigma) for f in frames]
        sheet = render.contact_sheet([render.thumbnail(f.picture) for f in frames], captions)
        sheet.info["parameters"] = text
        if save:
            host.save_picture(self.p, sheet, image, text, "-unsampling-sheet")
        self.sheets.append(sheet)
        self._note("sheets", text, {"kind": "contact sheet", "image": self._number(image)})

    def _file_frames(self, save: bool) -> None:
        if "frames" not in self.wanted:
            return
        for number, frame in enumerate(self._made):
            level = {"sigma": f"{frame.sigma:.6g}"} | ({} if frame.step is None else {"step": frame.step})
            extra = {INFOTEXT_PREFIX + "frame " + key: value for key, value in level.items()}
            text = host.infotext(self.p, frame.image, extra)
            frame.picture.info["parameters"] = text
            if save:
                order = number // len(self.p.prompts)
                host.save_picture(self.p, frame.picture, frame.image, text, f"-z{order:03d}")
            self.frames.append(frame.picture)
            self._note("frames", text, self._entry(frame))

    def _entry(self, frame: Frame) -> dict[str, Any]:
        return {"kind": "frame", "image": self._number(frame.image), "step": frame.step, "sigma": frame.sigma}

    def _stand_in(self) -> None:
        """For a selectable script, which takes one picture for each image: the noisiest frame of each."""
        for frame in self._made[-len(self.p.prompts) :]:
            text = host.infotext(self.p, frame.image, {})
            frame.picture.info.setdefault("parameters", text)
            self.stand_ins.append((frame.picture, text, self._entry(frame)))

    def _file_latents(self) -> None:
        """The latents file is asked for by name, so it is written also where samples are not saved."""
        if self._trajectory is None:
            return
        text = host.infotext(self.p, 0, {})
        file = host.temporary_file(".safetensors")
        trajectory.save(self._trajectory, file)
        path = host.save_file(self.p, file, Image.new("RGB", (8, 8)), 0, text, "-unsampling").absolute()
        self.latents.append(str(path))
        host.comment(self.p, f"latents saved: {path}")

    def _number(self, image: int) -> int:
        """The number of an image over all batches, as in ``all_seeds``."""
        return self.p.iteration * self.p.batch_size + image

    def _note(self, kind: str, text: str, entry: dict[str, Any]) -> None:
        self.texts[kind].append(text)
        self.manifest[kind].append(entry)

    def hand_over(self, processed: Any) -> None:
        """Animations, then sheets, then frames, then (with init) the host's own images.

        A selectable script (X/Y/Z plot, loopback, SD upscale, ...) counts on one picture for each
        image, so under it there are only those.
        """
        kinds = ("animations", "sheets", "frames")
        items = [item for kind in kinds for item in getattr(self, kind)]
        texts = [text for kind in kinds for text in self.texts[kind]]
        notes = [entry for kind in kinds for entry in self.manifest[kind]]
        if self.script is not None:
            items, texts, notes = map(list, zip(*self.stand_ins)) if self.stand_ins else ([], [], [])
        host.put_first(processed, items, texts, keep_own=self.samples)
        settings = {k: v for k, v in asdict(self.settings).items() if k in HOST_FIELDS}
        processed.extra_generation_params = {
            **processed.extra_generation_params,
            INFOTEXT_PREFIX + "settings": settings,
            INFOTEXT_PREFIX + "sigmas": self.sigmas,
            INFOTEXT_PREFIX + "images": notes,
            INFOTEXT_PREFIX + "latents": self.latents,
        }
