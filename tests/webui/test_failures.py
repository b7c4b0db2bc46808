"""Requests that fail: what is said, what is taken back, what the server still holds. Nothing waits for a collection."""

from __future__ import annotations

import copy
import errno
import gc
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disks import files_up_to
from doubled import reset_state
from PIL import Image

from lib_unsampler.page import shelf

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells which files are open")
EVERYTHING = {"output": ["frames", "animation", "contact sheet", "latents", "init"]}
OWN_NAME = re.compile(r"[0-9]{5}-[0-9]+\.png")
"""The host's name of its own picture."""
OURS = {"init", "sample", "save_samples", "close", "batch_unsampler"}


def raising(error: Exception, after: int = 0) -> Callable[..., Any]:
    """A function that fails from one call on; before that it does what ``own`` does."""
    calls = iter(range(10**6))

    def fail(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise copy.copy(error)  # who keeps an error keeps its traceback
        return own(*args, **kwargs)

    return fail


def breaking(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, after: int = 0) -> None:
    own, fail = getattr(owner, name), raising(error, after)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: fail(own, *args, **kwargs))


def open_below(folder: Path) -> list[str]:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return [target for link in links if link.is_symlink() and (target := os.readlink(link)).startswith(str(folder))]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Cycles are not collected, so what is freed has no owner left."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def requests(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every request of ours that was attached."""
    from lib_unsampler.webui import extension

    seen: list[weakref.ref[Any]] = []
    own = extension.Request.attach
    monkeypatch.setattr(extension.Request, "attach", lambda self: seen.append(weakref.ref(self)) or own(self))
    return seen


def failed(host: SimpleNamespace, settings: dict[str, Any], **fields: Any) -> tuple[BaseException, Any]:
    """How a request fails, without its traceback, and what is left of the host's request."""
    reset_state(host.shared.state)
    p = host.make((settings,), **fields)
    try:
        with closing(p):
            host.processing.process_images(p)
    except Exception as error:
        return error.with_traceback(None), p
    pytest.fail("it did not fail")


INVERT = {"mode": "invert", "output": ["init", "frames"], "cfg": 7}
FAULTS: dict[str, tuple[dict[str, Any], str, Exception, int]] = {
    "model, first call": (INVERT, "denoiser.forward", RuntimeError("no kernel image"), 0),
    "model, later": (INVERT, "denoiser.forward", RuntimeError("no kernel image"), 9),
    "model, in replay": ({**INVERT, "mode": "replay"}, "denoiser.forward", RuntimeError("no kernel image"), 2),
    "model, in img2img's own sampling": (EVERYTHING, "denoiser.forward", RuntimeError("no kernel image"), 2),
    "decoder": ({"output": ["frames"]}, "processing.decode_latent_batch", RuntimeError("no memory"), 4),
    "full disk": (EVERYTHING, "images.save_image", OSError(errno.ENOSPC, "No space left on device"), 4),
    "read-only disk": (EVERYTHING, "images.save_image", PermissionError(errno.EROFS, "Read-only", "out/x.tmp"), 0),
    "the host's encoder": (EVERYTHING, "processing.encode", RuntimeError("no memory"), 0),
    "the host's own saving": ({"output": ["init", "frames"]}, "images.save_image", OSError(28, "No space left"), 6),
}


def broken(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str) -> dict[str, Any]:
    from modules import images, sd_samplers_cfg_denoiser

    settings, place, error, after = FAULTS[kind]
    owners = {"denoiser": sd_samplers_cfg_denoiser.CFGDenoiser, "processing": host.processing, "images": images}
    owner, name = place.split(".")
    breaking(monkeypatch, owners[owner], name, error, after)
    return settings


@needs_proc
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.one_of(2)
def test_a_failed_request_leaves_nothing_behind(
    host: SimpleNamespace,
    kind: str,
    requests: list[weakref.ref[Any]],
    uncollected: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as broken_host:
        settings = broken(host, broken_host, kind)
        error, p = failed(host, settings, sampler_name="Euler a" if "replay" in kind else "Euler")
    assert str(FAULTS[kind][2].args[-1]).split("/")[0] in str(error)
    assert host.shared.state.textinfo is None
    assert open_below(host.out) == []
    saved = [path.name for path in host.out.glob("*") if not OWN_NAME.fullmatch(path.name)]
    assert all(name in str(error) for name in saved)
    if kind != "the host's own saving":  # then nobody of ours is asked any more
        assert not OURS & set(vars(p)) and requests.pop()() is None, "a cycle holds it"
    if host.out.exists():
        assert not [path.name for path in host.out.iterdir() if path.suffix in (".tmp", ".part", ".gif")]
    assert host.run({"output": ["frames"]})[1].images


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": "pink"}, "noise: 'pink'"),
        ({"output": ["init"], "trajectory": "no.safetensors"}, "trajectory"),
        ({"mode": "replay", "output": ["init"]}, "adds no noise"),
    ],
)
def test_a_refused_request_is_whole_and_free(
    host: SimpleNamespace, settings: dict[str, Any], said: str, uncollected: None
) -> None:
    before = set(vars(host.make()))
    error, p = failed(host, settings)
    assert said in str(error) and error.status_code == 422
    assert set(vars(p)) - before <= set(vars(host.run()[0])) and not OURS & set(vars(p))
    alive = weakref.ref(p)
    del p, error
    assert alive() is None


def test_what_cannot_be_checked_fails_and_leaves_nothing(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is no refusal, before any work: a latents file on a disk that cannot be read."""
    breaking(monkeypatch, shelf, "read", PermissionError(errno.EACCES, "Permission denied", "cat.safetensors"))
    error, p = failed(host, {"output": ["init"], "trajectory": "cat.safetensors"})
    assert isinstance(error, PermissionError) and not OURS & set(vars(p)) and not host.out.exists()


def test_a_request_that_never_comes_to_its_start_is_freed(host: SimpleNamespace, uncollected: None) -> None:
    for settings in ({"noise": "pink"}, {"output": ["frames"]}):
        p = host.make((settings,))
        host.runner.process(p)
        alive = weakref.ref(p)
        del p
        assert alive() is None


@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_full_disk_names_what_is_saved(
    host: SimpleNamespace, after: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modules import images

    breaking(monkeypatch, images, "save_image", OSError(errno.ENOSPC, "No space left on device"), after + batches * 9)
    error, _ = failed(host, {"output": ["frames"]}, batch_size=2, n_iter=batches + 1)
    saved = sorted(path.name for path in host.out.iterdir())
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC and len(saved) == after + batches * 9
    assert all(name in str(error) for name in saved) and str(host.out) in str(error)


def test_a_refusal_on_the_way_names_what_is_saved(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_unsampler.webui import filing

    breaking(monkeypatch, filing.render, "sigma_curve", ValueError("cannot be drawn"))
    error, _ = failed(host, {"output": ["frames", "sigma curve"]})
    assert "cannot be drawn" in str(error) and all(path.name in str(error) for path in host.out.iterdir())


def test_of_very_many_files_the_first_and_the_last_are_named() -> None:
    from lib_unsampler.webui.reply import Reply

    reply = Reply(5, files=[Path(f"out/{i:05d}.png") for i in range(5000)])
    assert reply.told_files() == "00000.png to 04999.png (5000 files) in out"


@needs_proc
@pytest.mark.parametrize("room", [0, 200, 3000])
@pytest.mark.parametrize("with_text", [False, True])
def test_a_picture_that_does_not_fit_leaves_no_piece_of_it(
    host: SimpleNamespace, room: int, with_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3000 bytes the picture is there and its text file, which is longer here, does not fit."""
    from modules import images

    monkeypatch.setattr(host.shared.opts, "save_txt", with_text)
    save, count = images.save_image, iter(range(100))

    def saved(image: Any, *args: Any, **kwargs: Any) -> Any:
        if next(count) < 3:
            return save(image, *args, **kwargs)
        if room == 3000:
            image.paste((9, 9, 9), (0, 0, *image.size))
            kwargs["info"] = None if not with_text else "x" * 5000
        with files_up_to(room):
            return save(image, *args, **kwargs)

    monkeypatch.setattr(images, "save_image", saved)
    if room == 3000 and not with_text:
        assert host.run({"output": ["frames"]})[1].images
        return
    error, _ = failed(host, {"output": ["frames"]})
    assert error.errno == errno.EFBIG
    assert room == 3000 or re.search(rf"File too large: '{host.out}/[0-9]+-5-\S+\.png'", str(error))
    names = sorted(path.name for path in host.out.iterdir())
    assert len(names) == (6 if with_text else 3) and all(name in str(error) for name in names)


@needs_proc
def test_an_animation_that_does_not_fit_leaves_no_placeholder(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    breaking(monkeypatch, shutil, "copyfile", OSError(errno.ENOSPC, "No space left on device"))
    error, _ = failed(host, {"output": ["animation"]})
    assert error.errno == errno.ENOSPC and list(host.out.iterdir()) == []
    assert list(Path(host.shared.opts.temp_dir).iterdir()) == []


@needs_proc
@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_a_saved_picture_in_the_reply_is_not_an_open_file(host: SimpleNamespace, form: str) -> None:
    from lib_unsampler.webui.host.saving import saved_item

    file = host.out.parent / f"cat.{form}"
    Image.open(Path(__file__).resolve().parents[2] / "lib_unsampler/assets/cat.jpg").save(file)
    expected = Image.open(file)
    picture, thumbnail = saved_item(file, "a cat"), saved_item(file, "a cat")
    assert open_below(host.out.parent) == [str(file)] and picture.size == expected.size  # the expected one's
    expected.load()
    thumbnail.thumbnail((64, 64))
    small = expected.copy()
    small.thumbnail((64, 64))
    assert picture.tobytes() == expected.tobytes() and thumbnail.tobytes() == small.tobytes()
    assert picture.info["parameters"] == "a cat" and picture.already_saved_as == str(file)
    assert (picture.format, picture.mode) == (expected.format, expected.mode) and open_below(host.out.parent) == []


@needs_proc
def test_a_reply_of_many_frames_holds_no_files(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["frames"], "steps": 60}, batch_size=2)
    assert len(processed.images) == 122 and open_below(host.out) == []
    assert len({image.tobytes() for image in processed.images}) > 60 and open_below(host.out) == []


def test_the_log_has_the_traceback_of_what_was_no_refusal(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = broken(host, monkeypatch, "decoder")
    failed(host, settings)
    assert "in decode" in capsys.readouterr().err
    failed(host, {"noise": "pink"})
    assert "Traceback" not in capsys.readouterr().err


def test_errors_of_any_kind_can_say_more(host: SimpleNamespace) -> None:
    from lib_unsampler.webui.host.request import RefusedError, say_more

    errors = [
        *(OSError(28, "No space"), FileNotFoundError(2, "None such", "x"), OSError("odd"), KeyError("key")),
        *(RuntimeError("no kernel", 5), ValueError(), RefusedError("refused"), torch.cuda.OutOfMemoryError("no room")),
    ]
    for error in errors:
        before = str(error)
        say_more(error, "saved before that: a.png")
        assert before.strip("'") in str(error) and "saved before that: a.png" in str(error)
