"""One batch's results under the host's names: saved where and as the host saves its images, and put into the reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from ..pictures.fitting import Fit
from ..pictures.png import Prepared
from ..settings import INFOTEXT_PREFIX
from .host.page import preferences
from .host.request import attribute, comment
from .host.saving import infotext, kept_file, moving_item, prepared_to_save, save_file, save_picture, saved_item
from .reply import Filed, Item, Reply

Submit = Callable[..., None]
"""A background's ``submit(size, then, work, *arguments)``."""


SUFFIXES = {"animation": "-unsampling", "sweep animation": "-sweep"}


class Naming:
    """Names, saves and notes what a batch makes. A picture that is saved stands in the reply as its file."""

    def __init__(self, p: Any, reply: Reply, submit: Submit) -> None:
        """``submit`` hands on in order, one at a time, since the host names pictures by counting."""
        self._p, self._reply, self._submit = p, reply, submit
        self._files: list[Path] = []  # of frames: an interrupted batch's are taken away
        self._own: list[Item] = []
        self.texts = [infotext(p, image, {}) for image in range(len(p.prompts))]

    def frame(
        self, picture: Image.Image, image: int, entry: Mapping[str, Any], suffix: str, save: bool, shown: bool
    ) -> None:
        """One frame of an image; ``entry`` is what is said of its level."""
        level = {"sigma": f"{entry['sigma']:.6g}"} | ({} if entry["step"] is None else {"step": entry["step"]})
        text = infotext(self._p, image, {INFOTEXT_PREFIX + "frame " + key: value for key, value in level.items()})
        picture.info["parameters"] = text
        note = {"image": self._number(image), **entry}

        def saved(prepared: Prepared | None) -> None:
            files = save_picture(self._p, own, image, text, suffix, prepared)
            self._files += files
            self._note("frame", image, files)
            if shown:
                self._put("frame", Item(saved_item(files[0], text), text, note))

        if save:
            own = picture.copy()  # a host may change what it saves: Forge hides text in an alpha channel
            size = 3 * picture.width * picture.height
            self._submit(size, saved, prepared_to_save, own)
        elif shown:
            self._put("frame", Item(picture, text, note))

    def swept(self, picture: Image.Image, image: int, entry: Mapping[str, Any], suffix: str, save: bool) -> None:
        """A picture sampled from a level: its parameters are plain img2img's at the strength that starts there."""
        ours = [key for key in self._p.extra_generation_params if key.startswith(INFOTEXT_PREFIX)]
        plain = {key: value for key, value in self._p.extra_generation_params.items() if key not in ours}
        with attribute(self._p, "extra_generation_params", {**plain, "Denoising strength": entry["strength"]}):
            text = infotext(self._p, image, {})
        picture.info["parameters"] = text
        if save:
            files = save_picture(self._p, picture, image, text, suffix)
            self._note("sweep", image, files)
            picture = saved_item(files[0], text)
        self._put("sweep", Item(picture, text, {"image": self._number(image), **entry}))

    def picture(
        self,
        kind: str,
        picture: Image.Image,
        image: int,
        suffix: str,
        save: bool,
        told: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """A picture that stands for a whole image or request."""
        text = self.texts[image]
        picture.info["parameters"] = text
        if save:
            files = save_picture(self._p, picture, image, text, suffix)
            self._note(kind, image, files)
            picture = saved_item(files[0], text)
        self._put(kind, Item(picture, text, {"kind": kind, "image": self._number(image), **told}))

    def animation(
        self,
        file: Path,
        poster: Image.Image,
        image: int,
        form: str,
        save: bool,
        kind: str = "animation",
        fit: Fit | None = None,
    ) -> None:
        """A finished animation in a temporary file; ``poster`` is its last frame, ``form`` its format.

        ``fit`` is what became of one of limited size; one that could not be small enough is only spoken of.
        """
        text = self.texts[image]
        note: dict[str, Any] = {"kind": kind, "image": self._number(image), "format": form}
        if fit is not None:
            comment(self._p, f"{kind} of image {note['image']}: {fit.said()}")
            if not fit.kept:
                return
            note |= fit.told()
        if save:
            file = save_file(self._p, file, poster, image, text, SUFFIXES[kind], preferences().animation_folder)
            self._note(kind, image, [file])
            self._reply.animations.append(file)
        elif not getattr(self._p, "is_api", False):
            file = kept_file(file)
        self._put(kind, Item(moving_item(self._p, file, save, poster, text), text, note))

    def latents(self, file: Path, named: Image.Image) -> str:
        """A finished latents file, by its path; asked for by name, so it is kept also where samples are not saved."""
        path = save_file(self._p, file, named, 0, self.texts[0], "-unsampling").absolute()
        self._reply.files[path] = Filed("latents", tuple(map(self._number, range(len(self.texts)))))
        comment(self._p, f"latents saved: {path}")
        return str(path)

    def stand_in(self, pictures: Sequence[Image.Image], entry: Mapping[str, Any]) -> None:
        """The noisiest frame of each image."""
        for image, picture in enumerate(pictures):
            picture.info.setdefault("parameters", self.texts[image])
            note = {"image": self._number(image), **entry}
            self._reply.stand_ins.append(Item(picture, self.texts[image], note))

    def count(self, kind: str) -> int:
        """How many of a kind this batch has put into the reply."""
        return sum(item.note["kind"] == kind for item in self._own)

    def abandon(self) -> None:
        """Takes everything back, the reply's too."""
        for kind, items in self._reply.items.items():
            self._reply.items[kind] = [item for item in items if item not in self._own]
        self._unlink()

    def unsave(self) -> None:
        """The host saves nothing of what was interrupted: what was saved until then goes, the reply keeps it."""
        for item in self._own:
            item.shown.load()
            del item.shown.already_saved_as
        self._unlink()

    def _unlink(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)
            self._reply.files.pop(file, None)

    def _note(self, kind: str, image: int, files: Iterable[Path]) -> None:
        self._reply.files.update(dict.fromkeys(files, Filed(kind, (self._number(image),))))

    def _put(self, kind: str, item: Item) -> None:
        if kind != "frame" or len(self._reply.items[kind]) < self._reply.limit:
            self._reply.items[kind].append(item)
            self._own.append(item)

    def _number(self, image: int) -> int:
        """The number of an image over all batches, as in ``all_seeds``."""
        return self._p.iteration * self._p.batch_size + image
