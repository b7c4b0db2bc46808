"""One request's files and reply, streamed through a double of the host: formats, limits, memory, interruption."""

from __future__ import annotations

import base64
import io
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import latents_of, pixels
from PIL import Image

from lib_unsampler.pictures import render

HEADS = {"gif": b"GIF89a", "webp": b"RIFF", "apng": b"\x89PNG", "mp4": b"\0\0\0"}
ENDINGS = {"gif": ".gif", "webp": ".webp", "apng": ".png", "mp4": ".mp4"}


def notes(processed: Any) -> list[dict[str, Any]]:
    return processed.extra_generation_params["Unsampler images"]


def kinds(processed: Any) -> list[str]:
    return [note["kind"] for note in notes(processed)]


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("saved", [True, False])
def test_each_format_is_a_file_on_the_page_and_base64_in_the_api(host: SimpleNamespace, form: str, saved: bool) -> None:
    if form == "mp4":
        pytest.importorskip("av")
    settings = {"output": ["animation"], "format": form, "hold_last": 0.5, "ping_pong": True}
    p, page = host.run(settings, do_not_save_samples=not saved)
    assert notes(page) == [{"kind": "animation", "image": 0, "format": form}]
    assert page.images[0].size == (64, 64)  # of whatever another extension does with it
    shown = getattr(page.images[0], "already_saved_as", None)
    if form == "mp4":
        assert shown is None  # the gallery plays none: a remark names the file
        (shown,) = [c.split(": ", 1)[1] for c in p.comments if c.startswith("animation ")]
    assert Path(shown).suffix == ENDINGS[form] and Path(shown).read_bytes().startswith(HEADS[form])
    assert (Path(shown).parent == host.out) == saved
    names = [path.name for path in host.out.iterdir()] if saved else []
    assert names == ([Path(shown).name] if saved else [])
    _, api = host.run(settings, do_not_save_samples=not saved, is_api=True)
    data = base64.b64decode(api.images[0])
    assert data.startswith(HEADS[form])
    if form != "mp4":
        assert Image.open(io.BytesIO(data)).n_frames == 16


@pytest.mark.parametrize("output", ["animation", "strength sweep"])
def test_an_animation_under_a_limit_says_what_was_chosen(host: SimpleNamespace, output: str) -> None:
    settings = {"output": [output], "format": "webp", "max_megabytes": 0.008, "steps": 0}
    p, processed = host.run(settings, batch_size=2)
    films = [note for note in notes(processed) if "animation" in note["kind"]]
    files = sorted(host.out.glob("*.webp"))
    assert len(films) == len(files) == 2 and processed.extra_generation_params["Unsampler max megabytes"] == "0.008"
    for number, (note, file) in enumerate(zip(films, files)):
        assert note["bytes"] == file.stat().st_size <= 8000 and (note["width"], note["height"]) == (64, 64)
        said = f"image {number}: max_megabytes: {note['bytes'] / 1e6:.3g} MB at 64 x 64, quality {note['quality']}"
        assert any(said in comment for comment in p.comments)


def test_an_animation_that_cannot_be_small_enough_leaves_the_rest(host: SimpleNamespace) -> None:
    p, processed = host.run({"output": ["animation", "frames"], "max_megabytes": 0.001})
    assert set(kinds(processed)) == {"frame"} and len(processed.images) == 9
    assert not list(host.out.glob("*.gif"))
    assert any("max_megabytes: not made, since 0.001 MB cannot be kept: at 64 x 64" in c for c in p.comments)


def test_the_side_is_the_animation_s_alone(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["animation", "frames"], "animation_side": 32}, is_api=True)
    assert Image.open(io.BytesIO(base64.b64decode(processed.images[0]))).size == (32, 32)
    assert processed.images[1].size == (64, 64)


def test_the_api_leaves_no_temporary_files(host: SimpleNamespace) -> None:
    host.run({"output": ["animation", "frames", "latents"]}, is_api=True, batch_size=2)
    folder = Path(host.shared.opts.temp_dir)
    assert list(folder.iterdir()) == []


def test_what_a_host_cannot_write_is_refused_before_any_work(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(Exception, match="format: MP4 needs PyAV.*pip install av") as caught:
        host.run({"format": "mp4"})
    assert caught.value.status_code == 422 and not host.out.exists()
    assert len(host.run({"format": "mp4", "output": ["frames"]})[1].images) == 9


def test_a_frame_shown_for_longer_than_the_format_can_is_refused(host: SimpleNamespace) -> None:
    too_long = {"output": ["animation"], "duration": 60, "timing": "log sigma", "steps": 800, "step_increment": 799}
    _, processed = host.run(too_long)  # two noisy frames: 60 s each
    assert len(processed.images) == 1
    from lib_unsampler.pictures import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.TIMINGS, "log sigma", lambda sigmas, duration: [700.0] * len(sigmas))
        with pytest.raises(Exception, match="a frame is shown 700 s, above the format's 655.35 s") as caught:
            host.run(too_long)
    assert caught.value.status_code == 422


def test_the_sigma_curve_comes_once_for_all_batches(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["sigma curve", "frames"], "step_increment": 3}, batch_size=2, n_iter=2)
    assert kinds(processed) == ["sigma curve"] + ["frame"] * 16
    schedule = torch.tensor([*sorted(processed.extra_generation_params["Unsampler sigmas"], reverse=True)])
    assert len(schedule) == 3 and processed.images[0].size == (720, 405)
    assert len(list(host.out.glob("*-unsampling-curve.png"))) == 1


@pytest.mark.parametrize("init", [False, True])
def test_latents_alone_show_the_noisiest_frame(host: SimpleNamespace, init: bool) -> None:
    alone = host.run({"output": ["frames"]})[1].images[-1]
    p, processed = host.run({"output": ["latents", "init"] if init else ["latents"]})
    assert len(processed.images) == len(processed.infotexts) == 1
    assert any(c.startswith("latents saved: ") for c in p.comments)
    if init:
        assert notes(processed) == [] and torch.equal(p.latest_samples, host.run()[0].latest_samples)
    else:
        assert [n["step"] for n in notes(processed)] == [0] and pixels(processed) == [alone.tobytes()]


@pytest.mark.parametrize("limit", [1, 4, 9, 17])
@pytest.mark.parametrize("saved", [True, False])
def test_frames_beyond_the_limit_are_named_and_never_dropped_silently(
    host: SimpleNamespace, limit: int, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(batch_size=2, n_iter=2, do_not_save_samples=not saved)
    every = host.run({"output": ["frames"]}, **fields)[1]
    count = len(list(host.out.iterdir())) if saved else 0
    monkeypatch.setattr(host.shared.opts, "batch_unsampler_gallery_limit", limit, raising=False)
    p, processed = host.run({"output": ["frames"]}, **fields)
    assert 0 < len(processed.images) <= limit and len(every.images) == 36
    assert pixels(processed) == [every.images[notes(every).index(note)].tobytes() for note in notes(processed)]
    said = [c for c in p.comments if "of 18 frames are shown" in c and ("all are saved" in c) == saved]
    assert said and set(said) <= set(processed.extra_generation_params["Unsampler messages"])
    if saved:
        assert len(list(host.out.iterdir())) == 2 * count == 72


def test_all_levels_are_spread_over_the_limit(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.shared.opts, "batch_unsampler_gallery_limit", 3, raising=False)
    _, processed = host.run({"output": ["frames"]})
    assert [n["step"] for n in notes(processed)] == [6, 3, 0]


def test_a_saved_frame_stands_in_the_reply_as_its_file(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["frames", "contact sheet"]})
    for item, text in zip(processed.images, processed.infotexts):
        assert item.info["parameters"] == text
        with Image.open(item.already_saved_as) as file:
            assert file.tobytes() == item.tobytes() and file.info["parameters"] == text


def interrupted_at(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Has the user interrupt while picture ``count`` is being decoded."""
    decode, calls = host.processing.decode_latent_batch, itertools.count(1)

    def interrupting(*args: Any, **more: Any) -> Any:
        host.shared.state.interrupted = next(calls) >= count
        return decode(*args, **more)

    monkeypatch.setattr(host.processing, "decode_latent_batch", interrupting)


def test_an_interrupt_before_any_noise_makes_nothing(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source alone is no progression: neither a file of it nor a picture."""
    interrupted_at(host, monkeypatch, 1)
    outputs = ["frames", "animation", "contact sheet", "sigma curve", "latents"]
    processed = host.processing.process_images(host.make(({"output": outputs},)))
    assert processed.images == [] and notes(processed) == [] and not any(host.out.iterdir())
    assert list(Path(host.shared.opts.temp_dir).iterdir()) == []


def test_an_interrupted_run_is_whole_as_far_as_it_came(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    state = host.shared.state
    host.shared.opts.save_incomplete_images = True
    interrupted_at(host, monkeypatch, 4)
    outputs = ["frames", "animation", "contact sheet", "latents"]
    processed = host.processing.process_images(host.make(({"output": outputs, "noise": "path"},)))
    monkeypatch.undo()
    host.shared.opts.save_incomplete_images = False
    assert kinds(processed) == ["animation", "contact sheet"] + ["frame"] * 4
    saved = latents_of(processed)[0]
    assert len(saved.z) == 3 and saved.start == 5
    state.__init__()
    complete = latents_of(host.run({"output": ["latents"], "noise": "path"})[1])[0]
    assert torch.equal(saved.z, complete.z[:3])


def test_a_host_that_changes_what_it_saves_changes_nothing_else(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forge hides the parameters in an alpha channel, in place."""
    from modules import images

    save = images.save_image

    def hidden(image: Image.Image, *args: Any, **kwargs: Any) -> Any:
        image.putalpha(254)
        return save(image, *args, **kwargs)

    plain = host.run({"output": ["frames", "animation"]}, do_not_save_samples=True)[1]
    monkeypatch.setattr(images, "save_image", hidden)
    ours = host.run({"output": ["frames", "animation"]})[1]
    gifs = [Path(run.images[0].already_saved_as).read_bytes() for run in (plain, ours)]
    assert len(set(gifs)) == 1


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decoded pictures are alive, each time that more are made."""
    made: list[weakref.ref[Image.Image]] = []
    counts: list[int] = []
    own: Callable[..., list[Image.Image]] = render.to_pictures

    def watched(decoded: torch.Tensor) -> list[Image.Image]:
        pictures = own(decoded)
        made.extend(map(weakref.ref, pictures))
        counts.append(sum(ref() is not None for ref in made))
        return pictures

    monkeypatch.setattr(render, "to_pictures", watched)
    return counts


def test_a_long_run_holds_few_frames(host: SimpleNamespace, alive: list[int]) -> None:
    host.shared.opts.live_previews_enable = False  # the double keeps every preview
    outputs = ["frames", "animation", "contact sheet", "latents"]
    _, processed = host.run({"output": outputs, "steps": 150, "noise": "independent"}, batch_size=2)
    assert len(alive) == 151 and max(alive) < 60 and len(processed.images) == 4 + 302


def test_frames_are_decoded_in_chunks_and_again_in_smaller_ones(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_unsampler.webui import showing

    plain = host.run({"output": ["frames"]}, batch_size=2)[1]
    decode, asked, freed = host.processing.decode_latent_batch, [], []

    def limited(model: Any, batch: torch.Tensor, **more: Any) -> Any:
        asked.append(len(batch))
        if len(batch) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return decode(model, batch, **more)

    monkeypatch.setattr(host.processing, "decode_latent_batch", limited)
    monkeypatch.setattr(showing, "decodable", lambda p, latents: 8)
    monkeypatch.setattr(showing, "free_memory", lambda: freed.append(True))
    chunked = host.run({"output": ["frames"]}, batch_size=2)[1]
    assert pixels(chunked) == pixels(plain) and asked == [16, 8, 4, 4, 4, 4, 2] and len(freed) == 2


def test_no_memory_for_a_single_frame_is_said(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(host.processing, "decode_latent_batch", never)
    with pytest.raises(MemoryError, match="not even one frame can be decoded"):
        host.run({})


def test_the_bar_says_when_files_are_written(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import images

    save, said = images.save_image, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        said.append(host.shared.state.textinfo)
        return save(*args, **kwargs)

    monkeypatch.setattr(images, "save_image", noted)
    host.run({"output": ["animation"]})
    assert said == ["Unsampling: writing files"] and host.shared.state.textinfo is None
