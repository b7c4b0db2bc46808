"""The command line: ``python -m lib_unsampler PICTURE... -o OUT.gif``. Torch is imported late."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__, files
from ..settings import Settings, SettingsError, allowed, help_on, parse, remarks, surface_fields
from ..settings.combinations import sweep_refusals
from ..settings.effects import clamped
from ..settings.fields import MOVING
from . import folders
from .folders import TARGETS, Paths, Place, flag
from .stopping import Stopped, Stops, say_stopped, streams

SHOWN_AS_SAVED = {"view", "include_clean", "captions", "format", "animation_side", "max_megabytes"}
SHOWN_AS_SAVED |= {"reverse", "ping_pong", "duration", "timing", "hold_first", "hold_last", "loop"}
RESUMABLE = {"sampler", "skip", "cfg", "positive", "negative", "resample_cfg", "resample_positive", "resample_negative"}
RESUMABLE |= {"guide", "guide_strength", "guide_alpha", "guide_from", "guide_until", "film", "film_view"}
RESUMABLE |= SHOWN_AS_SAVED
"""Fields that may differ from the trajectory that is resumed; the others are what it is."""

OUTPUTS = {
    "sheet": "contact sheet",
    "curve": "sigma curve",
    "sweep": "strength sweep",
    "sweep_pictures": "strength sweep",
}
"""The settings' names of targets that have another."""

LATENT_FORMATS = {"sd15": 4, "sdxl": 4, "sd3": 16, "flux": 16}
"""The channels of the latent formats of which ComfyUI's file can be made."""

SERVE = "serve"
"""The first word that asks for the page; a picture of that name is ./serve."""

GROUPS = {
    "the noise levels": (
        *("steps", "end_at_step", "end_at_sigma", "step_increment", "scheduler", "noise", "normalize", "seed"),
        *("mode", "model"),
    ),
    "what a frame shows": ("include_clean", "view", "captions", "panel", "film", "film_view"),
    "the animation": (
        *("format", "duration", "timing", "hold_first", "hold_last", "reverse", "ping_pong", "loop"),
        *("animation_side", "max_megabytes"),
    ),
    "the model, where it drives (modes invert and replay)": (
        *("sampler", "cfg", "positive", "negative", "skip", "solver", "tolerance", "max_calls"),
    ),
    "sampling back to a picture (--resample)": ("resample_cfg", "resample_positive", "resample_negative"),
    "drawing it towards the noise levels (--resample)": (
        *("guide", "guide_strength", "guide_alpha", "guide_from", "guide_until"),
    ),
}
"""Every setting under a heading of the help."""

EPILOG = """\
A name that ends in / or is a folder already is a folder, which then holds one file per picture, named as the
picture is; so is a name without an ending where several pictures or a folder are given. Links are followed: the
file that one leads to is replaced, the link stays. In the folder of --frames only frames that this program wrote
are replaced or taken away. In a mask, white is unsampled; black and transparent stay as they are.

exit status:
  0  everything was made
  1  some pictures could not be read: they are named, the others were made
  2  nothing more could be made: one line says why
  130, 143, 129  stopped by Ctrl-C, SIGTERM, SIGHUP; no half-written file is left

examples:
  python -m lib_unsampler cat.jpg -o cat.gif
  python -m lib_unsampler cat.jpg --mode replay --sampler euler_ancestral --latents cat.safetensors --resample same.png
  python -m lib_unsampler --resume cat.safetensors --resample sunset.png --resample-positive sunset
  python -m lib_unsampler photos/ -o gifs/ --format webp
  python -m lib_unsampler cat.jpg -o cat.gif --steps 30 --noise path --end-at-step 10
  python -m lib_unsampler cat.jpg -o panel.gif --mode invert --panel --report report.png
  python -m lib_unsampler cat.jpg --resample near.png --guide --guide-alpha 1 --resample-positive sunset
  python -m lib_unsampler cat.jpg --resample new.png --film both -o there-and-back.gif
  python -m lib_unsampler cat.jpg --sweep lost.gif --sampler heun
  python -m lib_unsampler --resume from-the-webui.safetensors --comfyui levels.latent
  python -m lib_unsampler serve      the form, curve and player of the WebUI's page, in a browser on this machine
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers an error with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """As argparse's, in one line."""
        fail(message)


def fail(message: str) -> NoReturn:
    """One line on standard error, exit status 2."""
    print(f"unsampler: error: {_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def note(message: str) -> None:
    """One line on standard error, where the results' names are not."""
    print(f"unsampler: {_line(message)}", file=sys.stderr)


def _note_of(path: Path, message: str) -> None:
    note(f"{path}: {message}")


FIELDS = {f.name: "--" + f.name.replace("_", "-") for f in fields(Settings)}
"""The option of every setting."""


def _line(message: str) -> str:
    """A message in one line, settings named by their options: at a sentence's head, and wherever no word is meant."""
    words = "|".join(name for name in FIELDS if "_" in name)
    message = re.sub(
        rf"(?<![\w/\\.-])({words})(?![\w/\\]|\.\w)", lambda m: FIELDS[m[1]], " ".join(str(message).split())
    )
    return re.sub(r"(^|; )(\w+)(?=: )", lambda m: m[1] + FIELDS.get(m[2], m[2]), message)


# What is asked


def make_parser() -> Parser:
    """The parser; every setting's option, bounds and help come from settings."""
    parser = Parser(
        prog="python -m lib_unsampler",
        usage="python -m lib_unsampler PICTURE... -o OUT.gif [options]\n"
        "       python -m lib_unsampler --resume FILE.safetensors --resample OUT.png [options]\n"
        "       python -m lib_unsampler serve [--port PORT] [--folder DIR]",
        description="Batch Unsampler: walk a noise schedule backwards from a picture and show every level.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"Batch Unsampler {__version__}")
    source = parser.add_argument_group("what goes in")
    source.add_argument("pictures", nargs="*", metavar="PICTURE", type=_path, help="picture files, or folders of them")
    source.add_argument("--resume", metavar="FILE", type=_path, help="go on from a saved trajectory, not a picture")
    source.add_argument(
        "--mask", metavar="MASK", type=_path, help="a picture; white is unsampled, black and transparent stay clean"
    )
    source.add_argument(
        "--size", metavar="PIXELS", type=int, help="shrink pictures to this long side, 8 to 8192 (default: 512)"
    )
    out = parser.add_argument_group("what comes out (at least one)")
    _add_targets(out)
    out.add_argument(
        "--latent-format",
        metavar="FORMAT",
        choices=tuple(LATENT_FORMATS),
        help=f"--comfyui: the latents' format, where the file does not name it: {', '.join(LATENT_FORMATS)}",
    )
    known = {f.name: f for f in surface_fields("cli")}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_setting(group, known.pop(name))
    assert not known, f"no group of the help has {', '.join(known)}"
    return parser


def _add_targets(group: Any) -> None:
    moving = f"the moving noise progression, in the format of its ending: {', '.join(TARGETS['animation'])}"
    moving += " (.png as .apng; .mp4 needs PyAV: pip install av)"
    group.add_argument("-o", dest="animation", metavar="OUT", type=_place, help=moving)
    for name, metavar, text in (
        ("frames", "DIR", "every frame as a PNG"),
        ("sheet", "OUT.png", "all frames on one page, each with its sigma"),
        ("curve", "OUT.png", "the sigma curve, kept levels marked"),
        ("latents", "OUT.safetensors", "the trajectory, to resume from"),
        ("resample", "OUT.png", "the noisiest latent, sampled back to a picture"),
        ("report", "OUT.png", "mode invert: how near sampling back comes, and a residual plot"),
        ("sweep", "OUT|DIR", "every level sampled back: an animation (endings as -o), or a folder of PNGs"),
        ("comfyui", "OUT.latent", "the levels of a WebUI's latents file (--resume) for ComfyUI's LoadLatent"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, type=_place, help=text)


def _path(text: str) -> Path:
    """A file name; an empty one (an unset shell variable) would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def _place(text: str) -> Place:
    _path(text)
    return Place.named(text)


def _add_setting(group: Any, f: Any) -> None:
    shown = str(f.default).lower() if isinstance(f.default, bool) else f.default
    text = f"{help_on(f, 'cli')} Allowed: {allowed(f)}. (default: {shown if shown != '' else 'empty'})"
    text = text.replace("%", "%%")
    if isinstance(f.default, bool):
        group.add_argument(FIELDS[f.name], dest=f.name, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(FIELDS[f.name], dest=f.name, metavar=f.name.upper(), help=text)


@dataclass(frozen=True)
class Job:
    """Checked arguments.

    Attributes:
        pictures: What was named.
        resume: The trajectory to go on from.
        mask: The mask's file.
        size: The long side.
        values: The settings that were given.
        places: The outputs by target.
        form: The latent format that was named, if one was.
    """

    pictures: list[Path]
    resume: Path | None
    mask: Path | None
    size: int
    values: dict[str, Any]
    places: dict[str, Place]
    form: str | None = None

    @property
    def many(self) -> bool:
        """Whether several pictures or a folder were named."""
        return len(self.pictures) > 1 or any(path.is_dir() for path in self.pictures)

    def without_effect(self, settings: Settings, given: set[str], walked: bool) -> list[str]:
        """What was given and changes nothing."""
        outputs = [OUTPUTS.get(target, target) for target in self.places]
        if "strength sweep" in outputs:
            outputs.append("resample")  # what a resampling uses, every one of a sweep's does
        called = {OUTPUTS.get(target, target): flag(target) for target in TARGETS}
        said = remarks(settings, given, outputs, walked=walked, called=called)
        if "sweep_pictures" in self.places:  # stills: what is for animations alone changes nothing
            moving = {f.name for f in surface_fields("cli") if f.metadata["outputs"] == MOVING}
            said += remarks(settings, given & moving, [o for o in outputs if o != "strength sweep"], called=called)
        unused = ["--latent-format: has no effect without --comfyui"]
        return said + (unused if self.form and "comfyui" not in self.places else [])


def check(given: dict[str, Any]) -> Job:
    """The arguments, or a refusal of what can be seen to be wrong.

    Raises:
        SettingsError: with everything that is wrong, at once.
    """
    names = {f.name for f in surface_fields("cli")}
    values = {k: v for k, v in given.items() if k in names}
    places = folders.places(given)
    resume, size = given.get("resume"), given.get("size")
    errors: list[str] = []
    try:
        later = {"skip"} if resume else set()  # allowed or not by the file's mode: checked when it is read
        settings = parse({k: v for k, v in values.items() if k not in later}, "cli")
        if _sweeps(places):
            errors += sweep_refusals(settings, "--sweep")
    except SettingsError as error:
        errors += error.errors
    if not places:
        errors.append(f"nothing to make: name at least one of {', '.join(dict.fromkeys(map(flag, TARGETS)))}")
    if "report" in places and values.get("mode") != "invert" and not resume:
        errors.append("--report: needs mode invert")
    if "comfyui" in places and not resume:
        errors.append(f"--comfyui: {PIXELS}; it needs --resume with a WebUI's latents file")
    if resume:
        errors += _check_resume(given, values)
    elif not given.get("pictures"):
        errors.append("PICTURE: none given (a file, several, or a folder; or --resume FILE)")
    if size is not None and not 8 <= size <= 8192:
        errors.append(f"--size: {size} is not a whole number from 8 to 8192")
    if errors:
        raise SettingsError(errors)
    return Job(
        list(given.get("pictures", [])),
        resume,
        given.get("mask"),
        size or 512,
        values,
        places,
        given.get("latent_format"),
    )


PIXELS = "the embedded models' latents are pixels, which no latent format of ComfyUI's holds"


def _sweeps(places: Collection[str]) -> bool:
    return "sweep" in places or "sweep_pictures" in places


def _check_resume(given: dict[str, Any], values: dict[str, Any]) -> list[str]:
    free = ", ".join(sorted(FIELDS[name] for name in RESUMABLE))
    errors = [
        f"{name}: is what the resumed trajectory has; it can not change (allowed: {free})"
        for name in values
        if name not in RESUMABLE
    ]
    flags = {"pictures": "PICTURE", "mask": "--mask", "size": "--size"}
    errors += [f"{shown}: does not go with --resume" for name, shown in flags.items() if given.get(name)]
    if "latents" in given:
        errors.append("--latents: the resumed trajectory is that file already")
    if "report" in given:
        errors.append("--report: belongs to the inversion itself; it can not be made from a trajectory")
    return errors


# What is done


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    with streams(), Stops() as stops:
        try:
            given = list(sys.argv[1:] if argv is None else argv)
            if given[:1] == [SERVE]:
                return _serve(given[1:], stops)
            return run(check(vars(make_parser().parse_args(given))), stops)
        except Stopped as stopped:
            say_stopped(stopped.number, stopped.left)
            return stopped.status
        except KeyboardInterrupt:
            say_stopped(2)
            return 130
        except (SettingsError, ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
            message = explained(error)
            if message is None:
                raise
            fail(message)


def _serve(given: Sequence[str], stops: Stops) -> int:
    from .serve import command

    _load()
    return command.serve(given, Parser(prog=f"python -m lib_unsampler {SERVE}", description=command.__doc__), stops)


def explained(error: Exception) -> str | None:
    """What is said of an error that a user can do something about; None of any other."""
    if isinstance(error, ImportError):
        return (
            f"this Python lacks what the command line needs ({error}). Make its environment once with "
            "`python install.py demo`, then run .venv/bin/python (Windows: .venv\\Scripts\\python) in place of python"
        )
    if isinstance(error, (RuntimeError, MemoryError)) and not isinstance(error, NotImplementedError):
        from ..pictures.render import out_of_memory

        if not out_of_memory(error):
            return None
        return f"out of memory: take fewer steps, a larger step_increment or a smaller --size ({error or 'no more'})"
    return str(error) or type(error).__name__


def run(job: Job, stops: Stops) -> int:
    """Does the work of checked arguments; returns the exit status."""
    files.sweep.cache_clear()
    if job.resume is not None:
        (paths,) = folders.outputs(job.places, [job.resume], False, job.values.get("format"), [job.resume])
        _load()
        return _resume(job, job.resume, paths, stops)
    pictures, said = folders.find_pictures(job.pictures)
    sources = pictures + ([job.mask] if job.mask else [])
    made = folders.outputs(job.places, pictures, job.many, job.values.get("format"), sources)
    for line in said:
        note(line)
    _load()
    return _make(job, pictures, made, stops)


def _load() -> None:
    """Imports PyTorch, which takes seconds."""
    if "torch" not in sys.modules:
        note("loading PyTorch")
    from . import reading, running  # noqa: F401


def _make(job: Job, pictures: Sequence[Path], made: Sequence[Paths], stops: Stops) -> int:
    from . import reading, running

    settings = parse(job.values, "cli")
    plan = running.plan_levels(settings)
    said = running.check(settings, running.Targets(**made[0]))
    each = [parse({**job.values, "seed": settings.seed + number}, "cli") for number in range(len(pictures))]
    for paths in made:
        targets, first = running.Targets(**paths), min(plan.kept[-1] + settings.skip, plan.visited[0])
        running.check_frames(settings, targets, plan.schedule, plan.kept, first)
    ended = replace(settings, end_at_step=plan.kept[-1]) if settings.end_at_sigma > 0 else settings
    given = {name for name in job.values if getattr(settings, name) != Settings.__dataclass_fields__[name].default}
    for line in [*said, *clamped(ended, len(plan.schedule) - 1), *job.without_effect(settings, given, True)]:
        note(line)
    stops.writing = True
    unread = 0
    for number, (picture, own, paths) in enumerate(zip(pictures, each, made), 1):
        about = f"{picture}: " if job.many else ""
        if job.many:
            note(f"picture {number} of {len(pictures)}: {picture}")
        try:
            source = reading.load_picture(picture, job.size, partial(_note_of, picture))
        except reading.UnreadableError as error:
            if not job.many:
                raise
            note(f"{error}; passed over")
            unread += 1
            continue
        mask = None
        if job.mask:
            height, width = source.shape[-2:]
            mask = reading.load_mask(job.mask, height, width, partial(_note_of, job.mask))
        for line in running.unsample_picture(source, own, running.Targets(**paths), mask, hold=stops.held):
            note(about + line)
        _report(paths)
    if job.many:
        note(
            f"{len(pictures) - unread} of {len(pictures)} pictures made" + (f", {unread} passed over" if unread else "")
        )
    return 1 if unread else 0


def _resume(job: Job, path: Path, paths: Paths, stops: Stops) -> int:
    from ..core import trajectory
    from . import running

    saved = trajectory.load(path)
    if "comfyui" in paths:
        return _to_comfyui(job, saved, path, paths, stops)
    stored = running.stored_settings(saved, str(path))
    before = parse(stored, "cli")
    swept = {"guide": False, "film": "noising"} if _sweeps(paths) else {}  # of the run that was saved, not asked for
    settings = parse({**stored, **swept, **job.values}, "cli")
    if _sweeps(paths) and (errors := sweep_refusals(settings, "--sweep")):
        raise SettingsError(errors)
    targets = running.Targets(**paths)
    said = running.check_resume(saved, settings, "sampler" in job.values, targets)
    if "resample" in paths and saved.replay is not None:
        said += clamped(replace(settings, end_at_step=saved.start), len(saved.schedule) - 1)
    given = {name for name in job.values if getattr(settings, name) != getattr(before, name)}
    for line in [*said, *job.without_effect(settings, given, False)]:
        note(line)
    stops.writing = True
    for line in running.resume(saved, settings, targets, "sampler" in job.values, hold=stops.held):
        note(line)
    _report(paths)
    return 0


def _to_comfyui(job: Job, saved: Any, path: Path, paths: Paths, stops: Stops) -> int:
    """A latents file's levels as ComfyUI's, whatever model they are of."""
    from ..core import comfy

    if saved.source.shape[1] == 3:
        raise ValueError(f"--comfyui: {path} is of an embedded model; {PIXELS}")
    others = [flag(target) for target in paths if target != "comfyui"]
    if others:
        raise ValueError(f"{others[0]}: {path} is a WebUI's, of which only --comfyui can be made here")
    if saved.blended:
        raise ValueError(f"--comfyui: the levels in {path} are masked (format 1), not what a sampler goes on from")
    form = job.form or saved.info.get("latent format") or ""
    if not form:
        known = ", ".join(LATENT_FORMATS)
        raise ValueError(f"--comfyui: {path} does not name its latent format; name it with --latent-format ({known})")
    channels = saved.source.shape[1]
    if LATENT_FORMATS.get(form, channels) != channels:
        raise ValueError(f"--latent-format: {form} has {LATENT_FORMATS[form]} channels, and {path} has {channels}")
    for line in job.without_effect(parse(job.values, "cli"), set(job.values), False):
        note(line)
    stops.writing = True
    comfy.save_latent(saved, form, paths["comfyui"])
    _report(paths)
    return 0


def _report(paths: Paths) -> None:
    for path in paths.values():
        print(path)


if __name__ == "__main__":
    sys.exit(main())
