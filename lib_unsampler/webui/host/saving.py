"""Files under the host's names, and the results that it hands to the page and the API."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules import images, processing, shared
from PIL import Image

from ...files import naming, whole
from ...pictures import png
from .page import preferences
from .request import attribute, comment


def infotext(p: Any, index: int, extra: dict[str, Any]) -> str:
    """The generation parameters of image ``index`` of the present batch, with more keys."""
    with attribute(p, "extra_generation_params", {**p.extra_generation_params, **extra}):
        return processing.create_infotext(
            p, p.prompts, p.seeds, p.subseeds, index=index, all_negative_prompts=p.negative_prompts
        )


def save_picture(
    p: Any, picture: Image.Image, index: int, text: str, suffix: str, prepared: png.Prepared | None = None
) -> tuple[Path, ...]:
    """Saves a picture where and as the host saves its images; returns the file, and its text file if there is one."""
    return _save(p, picture, p.outpath_samples, shared.opts.samples_format, index, text, suffix, prepared)


def prepared_to_save(picture: Image.Image) -> png.Prepared | None:
    """What of saving a picture needs none of the host: in any thread, several at once."""
    return png.Prepared(picture) if shared.opts.samples_format.lower() == "png" else None


def _save(
    p: Any,
    picture: Image.Image,
    folder: str,
    form: str,
    index: int,
    text: str | None,
    suffix: str,
    prepared: png.Prepared | None = None,
    **more: Any,
) -> tuple[Path, ...]:
    """What the host's ``save_image`` writes of a picture; where it fails, what it has begun is taken away."""
    begun: list[Any] = []
    save = picture.save

    def noted(file: Any, *args: Any, **kwargs: Any) -> None:
        begun.append(file)
        if not isinstance(file, (str, os.PathLike)):
            save(file, *args, **kwargs)
            return
        with naming(Path(file).with_suffix(f".{form}")):  # the host writes beside it first
            if not args and png.serves(picture, kwargs):
                png.save(picture, file, kwargs.get("pnginfo"), prepared)
            else:
                save(file, *args, **kwargs)

    try:
        with attribute(p, "batch_index", index), attribute(picture, "save", noted):  # file name patterns read the first
            written = images.save_image(
                *(picture, folder, "", p.seeds[index], p.prompts[index], form), info=text, p=p, suffix=suffix, **more
            )
    except BaseException:
        saved = getattr(picture, "already_saved_as", None)  # and then its text file failed
        for file in [*begun, *([saved, Path(saved).with_suffix(".txt")] if saved else [])]:
            if isinstance(file, (str, os.PathLike)):
                Path(file).unlink(missing_ok=True)
        raise
    return tuple(Path(name) for name in written if name)


def save_file(p: Any, made: Path, picture: Image.Image, index: int, text: str, suffix: str, folder: str = "") -> Path:
    """Moves a finished file to the name the host would give an image, with its own ending.

    It goes into ``folder``, or where the request's pictures go.

    The host names files only while it saves them, so it saves a picture first, whose name is then
    taken over.
    """
    placeholder, *_ = _save(p, picture.copy(), folder or p.outpath_samples, "png", index, text, suffix)
    final = placeholder.with_suffix(made.suffix)
    try:
        if final != placeholder and final.exists() and not _replaces(p, placeholder, index):
            final = _free(final)
        with whole(final) as part:
            shutil.copyfile(made, part)
    except BaseException:
        placeholder.unlink(missing_ok=True)
        raise
    if final != placeholder:
        placeholder.unlink(missing_ok=True)
    made.unlink(missing_ok=True)
    return final


def saved_item(file: Path, text: str) -> Image.Image:
    """A saved picture for the results: the page shows the file itself, its pixels are read when they are asked for.

    The file is open only then: a reply may hold more pictures than a process may open files, and an open
    one keeps a disk busy.
    """
    picture: Any = Image.open(file)
    with picture:
        held = weakref.ref(picture)

    def load() -> Any:
        picture: Any = held()
        del picture.load, picture.draft
        with Image.open(file) as read:
            read.load()
        vars(picture).update({**vars(read), "info": picture.info})
        return picture.load()

    picture.load, picture.draft = load, lambda *_: None  # a draft is a smaller reading of the file, for thumbnails
    picture.info["parameters"] = text
    picture.already_saved_as = str(file)
    return picture


def _replaces(p: Any, there: Path, index: int) -> bool:
    """Whether the host would write over a PNG that is there: it is tried, since each host has words of its own."""
    named: dict[str, Any] = {"forced_filename": there.stem, "save_to_dirs": False}
    written = _save(p, Image.new("RGB", (1, 1)), str(there.parent), "png", index, None, "", **named)
    for file in written:
        if file != there:
            file.unlink()
    return written[0] == there


def _free(path: Path) -> Path:
    """A path at which there is no file yet, numbered as the host numbers its own."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def temporary_file(ending: str) -> Path:
    """A file the WebUI's page may show though nothing is saved; the host cleans its folder up."""
    folder = shared.opts.temp_dir or os.path.join(tempfile.gettempdir(), "gradio")
    os.makedirs(folder, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=ending, dir=folder)
    os.close(handle)
    return Path(name)


def kept_file(file: Path) -> Path:
    """A copy of a temporary file that outlives the request, for the page to show; the host cleans it up."""
    kept = temporary_file(file.suffix)
    os.replace(file, kept)
    return kept


def moving_item(p: Any, file: Path, saved: bool, poster: Image.Image, text: str) -> Any:
    """What stands for an animation in the results: base64 in the API, the moving file on the page.

    The page's gallery plays no MP4: it shows the poster, and a remark names the file.
    """
    if getattr(p, "is_api", False):
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        if not saved:
            file.unlink()
        return data
    picture: Any = poster.copy()
    picture.info["parameters"] = text
    if saved and preferences().animation_folder:
        shutil.copyfile(file, kept := temporary_file(file.suffix))  # the page shows nothing outside its own folders
        file = kept
    if file.suffix == ".mp4":
        comment(p, f"animation {'saved' if saved else 'for now'}: {file.absolute()}")
    else:
        picture.already_saved_as = str(file)
    return picture


def put_first(processed: Any, items: Sequence[Any], texts: Sequence[str], keep_own: bool) -> None:
    """Puts results before the host's own images, or in their place."""
    own = (list(processed.images), list(processed.infotexts)) if keep_own else ([], [])
    processed.images = [*items, *own[0]]
    processed.infotexts = [*texts, *own[1]]
    if items or not keep_own:
        processed.index_of_first_image = 0


def own_first(
    processed: Any, stand_ins: Mapping[int, tuple[Any, str]], told: Callable[[int, str], str]
) -> list[dict[str, Any]]:
    """Has the host's own pictures say more, and others stand in for those that it did not sample.

    Arguments:
        stand_ins: (picture, parameters) by the number of the image; where there are any, the masks go.
        told: The parameters of an image, by its number, from those that it has.

    Returns:
        What each picture of the results is, in order.
    """
    first = processed.index_of_first_image
    texts, pictures = processed.infotexts[first:], processed.images[first:]
    step = max(1, len(pictures) // len(texts))  # each is followed by its masks, which have no text
    if stand_ins:
        pictures, step = pictures[::step], 1
    notes: list[dict[str, Any]] = [{"kind": "grid"}] * first
    notes += [{"kind": "mask" if i % step else "own", "image": i // step} for i in range(len(pictures))]
    for number, place in enumerate(range(0, len(pictures), step)):
        pictures[place], text = stand_ins.get(number, (pictures[place], texts[number]))
        texts[number] = told(number, text)
        if "parameters" in pictures[place].info:
            pictures[place].info["parameters"] = texts[number]
    processed.images[first:], processed.infotexts[first:] = pictures, texts
    return notes


def put_last(processed: Any, items: Sequence[Any], texts: Sequence[str]) -> None:
    """Puts results behind the host's own images."""
    own = [*processed.infotexts, *[""] * (len(processed.images) - len(processed.infotexts))]
    processed.images, processed.infotexts = [*processed.images, *items], [*own, *texts]


def retell(p: Any, processed: Any) -> None:
    """Has the results' remarks be all that the request has by now: the host gathers them before its last hooks."""
    if hasattr(processed, "comments"):
        processed.comments = "".join(f"{text}\n" for text in p.comments)
