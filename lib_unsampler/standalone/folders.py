"""Which pictures a run takes and which files it makes of them: folders, names, and what stands in the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..settings import SettingsError
from .formats import ENDINGS

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

FORMAT_OF = {".gif": "gif", ".webp": "webp", ".apng": "apng", ".png": "apng", ".mp4": "mp4"}
FRAME_NAME = re.compile(r"\d{5,}_sigma_\d+\.\d{4}\.png")

Paths = dict[str, Path]
"""A picture's outputs by target."""


@dataclass(frozen=True)
class Place:
    """An output as it was named.

    Attributes:
        path: The name.
        folder: Whether it ends in a slash, or names a folder that is there.
    """

    path: Path
    folder: bool

    @classmethod
    def named(cls, text: str) -> Place:
        """The place of a command line's word."""
        return cls(Path(text), text.endswith(("/", "\\")) or Path(text).is_dir())


def flag(target: str) -> str:
    """The option that names a target."""
    return "-o" if target == "animation" else f"--{target}"


# Pictures


def find_pictures(given: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The pictures among files and folders, in order, and what in the folders is none of them.

    Raises:
        ValueError: for a name that is neither, or a folder without pictures.
    """
    found: list[Path] = []
    said: list[str] = []
    for path in given:
        if path.is_dir():
            inside = _listed(path, said)
            if not inside:
                raise ValueError(f"{path}: a folder without pictures ({', '.join(ENDINGS)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such picture")
    return found, said


def _listed(folder: Path, said: list[str]) -> list[Path]:
    inside = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS):
        if path.name.startswith("."):
            said.append(f"{path}: hidden; passed over")
        elif path.is_dir():
            said.append(f"{path}: a folder; passed over (folders in folders are not looked into)")
        elif path.exists() and not path.is_file():
            said.append(f"{path}: not a file; passed over")
        else:
            inside.append(path)
    return inside


def unique_names(pictures: Sequence[Path]) -> list[str]:
    """A name per picture for its outputs: the file's own, numbered where two would be the same.

    Names that differ in case alone are the same on many disks.
    """
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    names = []
    for path in pictures:
        name, key = path.stem, path.stem.casefold()
        while name.casefold() in taken:
            numbers[key] = numbers.get(key, 1) + 1
            name = f"{path.stem}-{numbers[key]}"
        taken.add(name.casefold())
        names.append(name)
    return names


# Outputs


def outputs(
    places: Mapping[str, Place], pictures: Sequence[Path], many: bool, format: str | None, sources: Sequence[Path]
) -> list[Paths]:
    """Every picture's outputs.

    Arguments:
        many: Whether several pictures or a folder were named.
        format: The animations' format in a folder; None is GIF.
        sources: Every file that is read.

    Raises:
        SettingsError: naming everything that could not be written, before anything is.
    """
    errors: list[str] = []
    folders = {k: _is_folder(k, place, many) for k, place in places.items()}
    for k, place in places.items():
        errors += _named_wrong(k, place.path, folders[k], len(pictures), format)
    if errors:
        raise SettingsError(errors)
    made = [
        {k: _own(k, place.path, name, format) if folders[k] else place.path for k, place in places.items()}
        for name in unique_names(pictures)
    ]
    errors += _unwritable(made) or _overwritten(made, sources) or _inside_one_another(made)
    if errors:
        raise SettingsError(errors)
    return made


def _is_folder(target: str, place: Place, many: bool) -> bool:
    """Whether a place holds outputs by the pictures' names."""
    if not TARGETS[target]:
        return many
    return place.folder or (many and not place.path.suffix)


def _named_wrong(target: str, path: Path, folder: bool, count: int, format: str | None) -> list[str]:
    called, endings = flag(target), TARGETS[target]
    if (folder or not endings) and path.exists() and not path.is_dir():
        return [f"{called}: {path} is a file, where a folder is needed"]
    if folder or not endings:
        return []
    if path.suffix.lower() not in endings:
        return [f"{called}: {path} does not end in {' or '.join(endings)}, nor in / for a folder"]
    if count > 1:
        return [f"{called}: {count} pictures do not go into one file; {path}/ would be a folder"]
    if target == "animation" and format not in (None, FORMAT_OF[path.suffix.lower()]):
        return [f"--format: {format} is not what {path} ends in; a file's ending is its format"]
    return []


def _own(target: str, folder: Path, name: str, format: str | None) -> Path:
    if not TARGETS[target]:
        return folder / name
    return folder / (name + (f".{format or 'gif'}" if target == "animation" else TARGETS[target][0]))


def _unwritable(made: Iterable[Paths]) -> list[str]:
    errors = []
    for paths in made:
        for target, path in paths.items():
            try:
                files.check_writable(path if TARGETS[target] else path / "frame.png")
            except NotADirectoryError:
                above = next(p for p in path.absolute().parents if p.exists())
                errors.append(f"{flag(target)}: {path} cannot be made, {above} is a file")
            except OSError as error:
                errors.append(f"{flag(target)}: {path}: {error.strerror}")
    return errors


def _overwritten(made: Iterable[Paths], sources: Iterable[Path]) -> list[str]:
    """Outputs that would overwrite what they are made from, or one another."""
    read = {files.target(source) for source in sources}
    homes = {source.parent for source in read}
    taken: dict[Path, str] = {}
    errors = []
    for paths in made:
        for target, path in paths.items():
            final = files.target(path)
            if final in read or (target == "frames" and final in homes):
                errors.append(f"{flag(target)}: {path} would overwrite what it is made from")
            if final in taken:
                errors.append(f"{flag(target)}: {path} is the output of {taken[final]} too")
            taken[final] = flag(target)
    return errors


def _inside_one_another(made: Iterable[Paths]) -> list[str]:
    """Outputs that a file of another's would have to be the folder of, or that would be taken for a frame."""
    finals = [(target, path, files.target(path)) for paths in made for target, path in paths.items()]
    single = {final: target for target, _, final in finals if TARGETS[target]}
    frames = {final for target, _, final in finals if not TARGETS[target]}
    errors = []
    for target, path, final in finals:
        above = next((single[p] for p in final.parents if p in single), None)
        if above is not None:
            errors.append(f"{flag(target)}: {path} lies inside the file of {flag(above)}")
        if TARGETS[target] and final.parent in frames and FRAME_NAME.fullmatch(final.name):
            errors.append(f"{flag(target)}: {path} has the name of a frame in the folder of --frames")
    return errors
