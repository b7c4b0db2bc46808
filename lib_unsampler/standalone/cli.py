"""The command line: ``python -m lib_unsampler PICTURE... -o OUT.gif``. Torch is imported late."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..settings import SettingsError, allowed, parse, surface_fields, whole_help

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TARGETS = {
    "animation": (".gif", ".webp", ".apng", ".png", ".mp4"),
    "frames": (),
    "sheet": (".png",),
    "curve": (".png",),
    "latents": (".safetensors",),
    "resample": (".png",),
    "report": (".png",),
}
"""Where results go: each target's file endings; none is a folder."""

RESUMABLE = {"sampler", "skip", "cfg", "positive", "negative", "resample_cfg", "resample_positive", "resample_negative"}
RESUMABLE |= {"view", "include_clean", "captions"}
RESUMABLE |= {"reverse", "ping_pong", "duration", "timing", "hold_first", "hold_last", "loop"}
"""Fields that may differ from the trajectory that is resumed; the others are what it is."""

EPILOG = """\
With several pictures or a folder, -o and the other outputs name folders, which then hold one
file per picture. Colours outside the mask stay; white in the mask is unsampled.

examples:
  python -m lib_unsampler cat.jpg -o cat.gif
  python -m lib_unsampler cat.jpg -o cat.gif --steps 30 --noise path --end-at-step 10
  python -m lib_unsampler cat.jpg --latents cat.safetensors --resample back.png
  python -m lib_unsampler --resume cat.safetensors --resample sea.png --positive sea --cfg 3
  python -m lib_unsampler cat.jpg -o panel.gif --mode invert --panel --report report.png
  python -m lib_unsampler cat.jpg --mode replay --sampler euler_ancestral --resample sea.png --resample-positive sea
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers an error with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Without argparse's usage."""
        fail(message)


def fail(message: str) -> NoReturn:
    """One line on standard error, exit status 2."""
    line = " ".join(str(message).split())
    print(f"unsampler: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def note(message: str) -> None:
    """One line on standard error, where the results' names are not."""
    print(f"unsampler: {message}", file=sys.stderr)


def make_parser() -> Parser:
    """The parser; every setting's option, bounds and help come from settings.py."""
    parser = Parser(
        prog="python -m lib_unsampler",
        description="Batch Unsampler: walk a noise schedule backwards from a picture and show every level.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"Batch Unsampler {__version__}")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", type=_path, help="picture files, or folders of them")
    files = parser.add_argument_group("what comes out (at least one)")
    files.add_argument(
        "-o",
        dest="animation",
        metavar="OUT",
        type=_path,
        help=f"the moving noise progression, in the format of its ending: {', '.join(TARGETS['animation'])} "
        "(.png as .apng; .mp4 needs PyAV: pip install av)",
    )
    files.add_argument("--frames", metavar="DIR", type=_path, help="every frame as a PNG")
    files.add_argument("--sheet", metavar="OUT.png", type=_path, help="all frames on one page, each with its sigma")
    files.add_argument("--curve", metavar="OUT.png", type=_path, help="the sigma curve, kept levels marked")
    files.add_argument("--latents", metavar="FILE.safetensors", type=_path, help="the trajectory, to resume from")
    files.add_argument(
        "--resample", metavar="OUT.png", type=_path, help="the noisiest latent, sampled back to a picture"
    )
    files.add_argument(
        "--report", metavar="OUT.png", type=_path, help="mode invert: how near sampling back comes, and a residual plot"
    )
    source = parser.add_argument_group("what goes in")
    source.add_argument("--resume", metavar="FILE", type=_path, help="go on from a saved trajectory, not a picture")
    source.add_argument("--mask", metavar="MASK", type=_path, help="a picture; white is unsampled, black stays clean")
    source.add_argument(
        "--size", metavar="PIXELS", type=int, help="shrink pictures to this long side, 8 to 8192 (default: 512)"
    )
    settings = parser.add_argument_group("settings")
    for f in surface_fields("cli"):
        _add_setting(settings, f)
    return parser


def _path(text: str) -> Path:
    """A file name; an empty one (an unset shell variable) would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def _add_setting(group: Any, f: Any) -> None:
    flag = "--" + f.name.replace("_", "-")
    shown = str(f.default).lower() if isinstance(f.default, bool) else f.default
    text = f"{whole_help(f)} Allowed: {allowed(f)}. (default: {shown if shown != '' else 'empty'})"
    text = text.replace("%", "%%")
    if isinstance(f.default, bool):
        group.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(flag, dest=f.name, metavar=f.name.upper(), help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(make_parser().parse_args(argv))
    try:
        job = check(given)
        run(*job)
    except KeyboardInterrupt:
        print("unsampler: interrupted; no half-written file was left", file=sys.stderr)
        return 130
    except (SettingsError, ValueError, OSError, MemoryError) as error:
        fail(str(error) or type(error).__name__)
    return 0


def check(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Path]]:
    """Splits the arguments into (inputs, settings, targets) and refuses what can be seen to be wrong.

    Raises:
        SettingsError: with everything that is wrong, at once.
    """
    names = {f.name for f in surface_fields("cli")}
    settings = {k: v for k, v in given.items() if k in names}
    targets = {k: v for k, v in given.items() if k in TARGETS}
    inputs = {k: given.get(k) for k in ("pictures", "resume", "mask", "size")}
    errors: list[str] = []
    try:
        later = {"skip"} if inputs["resume"] else set()  # allowed or not by the file's mode: checked when it is read
        parse({k: v for k, v in settings.items() if k not in later}, "cli")
    except SettingsError as error:
        errors += error.errors
    if not targets:
        ways = "-o, --frames, --sheet, --curve, --latents, --resample, --report"
        errors.append(f"nothing to make: name at least one of {ways}")
    if "report" in targets and settings.get("mode") != "invert" and not inputs["resume"]:
        errors.append("report: needs mode invert")
    if inputs["resume"]:
        errors += _check_resume(inputs, settings, targets)
    elif not inputs["pictures"]:
        errors.append("PICTURE: none given (a file, several, or a folder; or --resume FILE)")
    if inputs["size"] is not None and not 8 <= inputs["size"] <= 8192:
        errors.append(f"size: {inputs['size']} is not a whole number from 8 to 8192")
    if errors:
        raise SettingsError(errors)
    return inputs, settings, targets


def _check_resume(inputs: dict[str, Any], settings: dict[str, Any], targets: dict[str, Path]) -> list[str]:
    errors = [
        f"{name}: is what the resumed trajectory has; it can not change (allowed: {', '.join(sorted(RESUMABLE))})"
        for name in settings
        if name not in RESUMABLE
    ]
    errors += [f"{name}: does not go with --resume" for name in ("pictures", "mask", "size") if inputs[name]]
    if "latents" in targets:
        errors.append("latents: the resumed trajectory is that file already")
    if "report" in targets:
        errors.append("report: belongs to the inversion itself; it can not be made from a trajectory")
    return errors


def run(inputs: dict[str, Any], values: dict[str, Any], targets: dict[str, Path]) -> None:
    """Does the work of checked arguments."""
    if inputs["resume"]:
        _check_targets(targets, many=False)
        _check_written([targets], [inputs["resume"]])
        _resume(inputs["resume"], values, targets)
        return
    pictures = _find_pictures(inputs["pictures"])
    many = len(inputs["pictures"]) > 1 or inputs["pictures"][0].is_dir()
    _check_targets(targets, many)
    names = _unique_names(pictures)
    written = [{k: _own_path(k, v, name) for k, v in targets.items()} if many else targets for name in names]
    _check_written(written, pictures + ([inputs["mask"]] if inputs["mask"] else []))
    from . import reading, running

    settings = parse(values, "cli")
    if "resample" in targets or settings.mode == "replay":
        running.check_resampling(settings)
    if settings.mode == "invert" and (message := running.check_inversion(settings)):
        note(message)
    running.plan_levels(settings)
    each = [parse({**values, "seed": settings.seed + number}, "cli") for number in range(len(pictures))]
    for picture, own, paths in zip(pictures, each, written):
        source = reading.load_picture(picture, inputs["size"] or 512)
        mask = reading.load_mask(inputs["mask"], *source.shape[-2:]) if inputs["mask"] else None
        for line in running.unsample_picture(source, own, running.Targets(**paths), mask):
            note(f"{picture}: {line}")
        _report(paths)


def _resume(path: Path, values: dict[str, Any], targets: dict[str, Path]) -> None:
    from ..core import trajectory
    from . import running

    saved = trajectory.load(path)
    if saved.source.ndim != 4 or tuple(saved.source.shape[:2]) != (1, 3):
        raise ValueError(f"{path}: latents {tuple(saved.source.shape)} are not one picture's (1, 3, height, width)")
    if saved.info.get("model") not in running.PREDICTION:
        raise ValueError(f"{path}: made by model {saved.info.get('model')!r}, which is not an embedded one")
    settings = parse({**_cli_settings(saved.settings), **values}, "cli")
    if "resample" in targets:
        running.check_resampling(settings)
    running.resume(saved, settings, running.Targets(**targets))
    _report(targets)


def _cli_settings(stored: Any) -> dict[str, Any]:
    names = {f.name for f in surface_fields("cli")}
    return {k: v for k, v in dict(stored).items() if k in names}


def _find_pictures(given: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_ENDINGS)
            if not inside:
                raise ValueError(f"{path}: a folder without pictures ({', '.join(PICTURE_ENDINGS)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such picture")
    return found


def _unique_names(pictures: Sequence[Path]) -> list[str]:
    """A name per picture for its outputs: the file's own, numbered where two would be the same."""
    names: list[str] = []
    for path in pictures:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def _own_path(target: str, folder: Path, name: str) -> Path:
    endings = TARGETS[target]
    return folder / (name + endings[0]) if endings else folder / name


def _flag(target: str) -> str:
    return "-o" if target == "animation" else f"--{target}"


def _check_targets(targets: dict[str, Path], many: bool) -> None:
    """Refuses outputs that could not be written."""
    flags = {k: _flag(k) for k in targets}
    errors = []
    for name, path in targets.items():
        above = next((p for p in path.absolute().parents if p.exists()), path)
        endings = () if many else TARGETS[name]
        if endings and path.suffix.lower() not in endings:
            errors.append(f"{flags[name]}: {path} does not end in {' or '.join(endings)}")
        if endings and path.is_dir():
            errors.append(f"{flags[name]}: {path} is a folder, not a file")
        if not endings and path.exists() and not path.is_dir():
            errors.append(f"{flags[name]}: {path} is a file, where a folder is needed")
        if not above.is_dir():
            errors.append(f"{flags[name]}: {path} cannot be made, {above} is a file")
    if errors:
        raise SettingsError(errors)


def _check_written(written: Sequence[dict[str, Path]], sources: Sequence[Path]) -> None:
    """Refuses outputs that would overwrite what they are made from, or one another."""
    read = {s.resolve() for s in sources}
    made: dict[Path, str] = {}
    errors = []
    for paths in written:
        for name, path in paths.items():
            final = path.resolve()
            if final in read or (name == "frames" and final in {r.parent for r in read}):
                errors.append(f"{_flag(name)}: {path} would overwrite what it is made from")
            if final in made:
                errors.append(f"{_flag(name)}: {path} is the output of {made[final]} too")
            made[final] = _flag(name)
    if errors:
        raise SettingsError(errors)


def _report(paths: dict[str, Path]) -> None:
    for path in paths.values():
        print(path)


if __name__ == "__main__":
    sys.exit(main())
