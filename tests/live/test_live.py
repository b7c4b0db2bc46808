"""A running WebUI, named by ``WEBUI_URL``, through its API: what users get, and what is left behind.

Run with ``-m live``. Requests are made repeatable by an all-white mask whose content is seeded latent
noise: the host's VAE otherwise encodes a picture with an unseeded draw.
An edit model is shown the picture all the same (Neo's Flux.2-Klein): switch its option ``klein_no_reference`` on.
"""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageSequence

from lib_unsampler.settings import help_on, surface_fields

URL = os.environ.get("WEBUI_URL", "")
SCHEDULER = os.environ.get("WEBUI_SCHEDULER", "Automatic")
"""``Simple`` for a flow model in Forge, whose ``Automatic`` ends at sigma 0 twice: black pictures, also without us."""
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
TIMESTEP_SAMPLERS = ("DDIM", "DDIM CFG++", "PLMS", "UniPC")
"""Those that may walk timesteps; in Neo UniPC walks sigmas."""
CAT = Path(__file__).resolve().parents[2] / "lib_unsampler/assets/cat.jpg"


def choices(arg: dict[str, Any]) -> tuple[str, ...] | None:
    """The choices of a control in script-info: gradio 3 lists values, gradio 4 pairs of label and value."""
    listed = arg["choices"]
    return None if listed is None else tuple(c if isinstance(c, str) else c[1] for c in listed)


def as_base64(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def ask(path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    try:
        return json.load(urllib.request.urlopen(request, timeout=1200))
    except urllib.error.HTTPError as error:
        return {"status": error.code, **json.loads(error.read())}


def img2img(settings: Any = None, args: list[Any] | None = None, **fields: Any) -> dict[str, Any]:
    """One repeatable img2img; ``settings`` is the script's dict, ``args`` its arguments as a list."""
    size = (128, 128)
    body = {
        "init_images": [as_base64(Image.open(CAT).convert("RGB").resize(size))],
        "mask": as_base64(Image.new("RGB", size, "white")),
        "inpainting_fill": 2,
        "inpaint_full_res": False,
        "mask_blur": 0,
        "inpainting_mask_invert": 0,
        "width": size[0],
        "height": size[1],
        "steps": 6,
        "seed": 5,
        "cfg_scale": 3,
        "prompt": "a cat",
        "sampler_name": "Euler a",
        "scheduler": SCHEDULER,
        "denoising_strength": 0.7,
        **fields,
    }
    if settings is not None or args is not None:
        body["alwayson_scripts"] = {"Batch Unsampler": {"args": args if args is not None else [settings]}}
    reply = ask("/sdapi/v1/img2img", body)
    if "info" in reply:
        reply["params"] = json.loads(reply["info"])["extra_generation_params"]
        reply["infotexts"] = json.loads(reply["info"])["infotexts"]
    return reply


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def is_picture(data: str) -> bool:
    """Whether a picture of a reply is not black, which it is where a model computes NaN."""
    return opened(data).convert("RGB").getextrema() != ((0, 0),) * 3


def pixels(reply: dict[str, Any]) -> list[bytes]:
    """The pictures' pixels; black ones would equal each other."""
    assert all(is_picture(data) for data in reply["images"]), "the model gives black pictures"
    return [opened(data).convert("RGB").tobytes() for data in reply["images"]]


def frames_of(gif: Image.Image) -> list[bytes]:
    return [f.convert("RGB").tobytes() for f in ImageSequence.Iterator(gif)]


def apart(one: bytes, other: bytes) -> int:
    """The largest difference of two pictures, in steps of 255."""
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other))


def notes(reply: dict[str, Any]) -> list[dict[str, Any]]:
    return reply["params"]["Unsampler images"]


def kinds(reply: dict[str, Any]) -> list[str]:
    return [note["kind"] for note in notes(reply)]


@pytest.fixture(scope="module")
def plain() -> list[bytes]:
    """A plain img2img, seen to be repeatable, which every later plain one must equal."""
    first, second = pixels(img2img()), pixels(img2img())
    assert first == second
    return first


def samplers() -> list[str]:
    return [s["name"] for s in ask("/sdapi/v1/samplers")] if URL else []


def sampled_by_the_host(name: str, **fields: Any) -> list[bytes]:
    """The host's own picture with a sampler. Some of its samplers fail with some models (Neo: RF ones with eps)."""
    reply = img2img(sampler_name=name, **fields)
    if not is_picture(reply["images"][0]):
        pytest.skip(f"the host's own pictures by {name} are black with this model")
    return pixels(reply)


@pytest.mark.parametrize("name", samplers())
def test_init_with_shared_noise_is_plain_img2img(name: str) -> None:
    """Or the sampler walks timesteps, and is refused by name."""
    reply = img2img({"output": ["init"]}, sampler_name=name)
    if "status" in reply:
        shown = img2img({"output": ["frames"]}, sampler_name=name)
        assert name in TIMESTEP_SAMPLERS and shown["params"]["Unsampler schedule"] == f"{name} timesteps"
        assert len(shown["images"]) >= 6
        assert reply["status"] == 422 and "init" in reply["detail"] and name in reply["detail"]
        return
    own = sampled_by_the_host(name)
    assert pixels(reply) == own


@pytest.mark.parametrize("name", samplers())
def test_init_from_other_noise_runs_on_every_sampler(name: str) -> None:
    reply = img2img({"output": ["init"], "noise": "independent", "end_at_step": 1}, sampler_name=name)
    if "status" in reply:
        assert reply["status"] == 422 and name in TIMESTEP_SAMPLERS
        return
    assert len(reply["images"]) == 1, reply
    own = sampled_by_the_host(name)
    assert pixels(reply) != own


@pytest.mark.parametrize(
    ("settings", "fields", "status"),
    [
        ({"output": ["init", "frames", "animation"], "noise": "path", "end_at_step": 1}, {}, None),
        ({"output": ["frames", "contact sheet"], "steps": 9}, {"batch_size": 2, "n_iter": 2}, None),
        ({"noise": "pink", "steps": -1, "nonsense": 3}, {}, 422),
        ({"output": ["init"]}, {"sampler_name": "DDIM"}, 422),
        ({"output": ["frames"]}, {"sampler_name": "DDIM"}, None),
        ({"output": ["latents"], "normalize": True}, {"subseed": 3, "subseed_strength": 0.5}, None),
        ({"output": ["init"], "noise": "path"}, {"sampler_name": "DPM++ 3M SDE", "denoising_strength": 0.05}, "plain"),
    ],
)
def test_nothing_is_left_behind(
    plain: list[bytes], settings: dict[str, Any], fields: dict[str, Any], status: int | str | None
) -> None:
    """``plain``: what the host says without us; with one step left, A1111's 3M SDE fails and Forge's does not."""
    expected = img2img(**fields).get("status") if status == "plain" else status
    assert img2img(settings, **fields).get("status") == expected
    assert pixels(img2img()) == plain


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([{"noise": "pink", "steps": -1, "nonsense": 3}], ("noise: 'pink'", "steps: -1", "nonsense: unknown")),
        ([{"output": []}], ("output: []",)),
        ([{"output": "everything"}], ("output: 'everything'",)),
        ([{"steps": 2.5, "duration": 0, "reverse": 1}], ("steps: 2.5", "duration: 0", "reverse: 1")),
        ([{"output": ["init"], "steps": 9}], ("steps: 9",)),
        ([{"enabled": "yes"}], ("enabled: 'yes'",)),
        ([True, ["frames"], None, -2], ("steps: None", "end_at_step: -2")),
        (["on", ["frames"]], ("enabled: 'on'",)),
    ],
)
def test_every_error_is_answered_at_once(args: list[Any], said: tuple[str, ...]) -> None:
    reply = img2img(args=args)
    assert reply["status"] == 422
    assert [text for text in said if text not in reply["detail"]] == []


def test_a_dict_where_the_host_wants_a_list_is_not_answered_with_a_picture() -> None:
    assert img2img(args={"output": ["frames"]})["status"] >= 400


def test_frames_in_order_with_the_animation_first() -> None:
    reply = img2img({"duration": 0.25})
    assert kinds(reply) == ["animation"] + ["frame"] * 7
    assert len(reply["images"]) == len(reply["infotexts"]) == 8
    sigmas = [n["sigma"] for n in reply["params"]["Unsampler images"][1:]]
    assert sigmas == sorted(sigmas) and sigmas[0] == 0
    assert sigmas[1:] == reply["params"]["Unsampler sigmas"]
    gif = opened(reply["images"][0])
    assert [f.info["duration"] for f in ImageSequence.Iterator(gif)] == [250] * 7
    assert "Unsampler duration: 0.25" in gif.info["comment"].decode()
    assert [opened(i).info["parameters"] for i in reply["images"][1:]] == reply["infotexts"][1:]
    assert [f"Unsampler frame sigma: {s:.6g}" in t for s, t in zip(sigmas, reply["infotexts"][1:])] == [True] * 7


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"step_increment": 2}, 4),
        ({"end_at_step": 4}, 3),
        ({"include_clean": False}, 6),
        ({"steps": 11}, 12),
    ],
)
def test_which_levels_are_shown(settings: dict[str, Any], count: int) -> None:
    reply = img2img({"output": ["frames"], **settings})
    assert kinds(reply) == ["frame"] * count


def test_thinned_frames_are_frames_of_the_whole_run() -> None:
    every = pixels(img2img({"output": ["frames"], "noise": "path"}))
    thinned = pixels(img2img({"output": ["frames"], "noise": "path", "step_increment": 2}))
    assert thinned == [every[0], *every[2::2]]


def test_reverse_plays_backwards() -> None:
    forwards, backwards = (opened(img2img({"output": ["animation"], "reverse": r})["images"][0]) for r in (False, True))
    assert frames_of(forwards)[::-1] == frames_of(backwards)


def test_init_gives_its_own_pictures_last_and_the_levels_it_starts_from() -> None:
    reply = img2img({"output": ["init", "frames", "animation", "contact sheet"]})
    own = pixels(img2img())
    assert kinds(reply) == ["animation", "contact sheet"] + ["frame"] * 6  # strength 0.7 of 6 steps: 5 levels
    assert pixels(reply)[8:] == own
    assert len(reply["infotexts"]) == 9 and "Unsampler frame" not in reply["infotexts"][8]


def test_four_images_of_two_batches() -> None:
    reply = img2img({"output": ["frames", "animation", "contact sheet"]}, batch_size=2, n_iter=2, steps=3)
    assert kinds(reply) == ["animation"] * 4 + ["contact sheet"] * 4 + ["frame"] * 16
    assert [n["image"] for n in notes(reply)] == [0, 1, 2, 3] * 2 + [0, 1] * 4 + [2, 3] * 4
    assert [n["sigma"] for n in notes(reply)[8::2]] == [0, *reply["params"]["Unsampler sigmas"]] * 2
    seeds = [f"Seed: {5 + n['image']}," in text for n, text in zip(notes(reply), reply["infotexts"])]
    assert seeds == [True] * 24


@pytest.mark.parametrize("noise", ["shared", "independent", "path"])
def test_a_batch_is_its_single_runs(noise: str) -> None:
    """The mask's latent noise is drawn per image, so that each seed's picture is its own."""
    settings = {"output": ["frames"], "noise": noise, "include_clean": False}
    batch = pixels(img2img(settings, batch_size=2))
    for i in range(2):
        single = pixels(img2img(settings, seed=5 + i))
        assert len(batch) == 2 * len(single)
        for together, alone in zip(batch[i::2], single):
            assert apart(together, alone) <= 1


@pytest.mark.parametrize(
    "override",
    [{"always_discard_next_to_last_sigma": True}, {"sigma_max": 9.0}, {"sigma_min": 0.2}],
)
def test_the_schedule_is_the_host_s(override: dict[str, Any]) -> None:
    undo = {key: False if isinstance(value, bool) else 0 for key, value in override.items()}
    fields = {"scheduler": "Karras"}
    usual = img2img({"output": ["frames"]}, override_settings=undo, **fields)["params"]["Unsampler sigmas"]
    changed = img2img({"output": ["frames"]}, override_settings=override, **fields)["params"]["Unsampler sigmas"]
    again = img2img({"output": ["frames"]}, override_settings=undo, **fields)["params"]["Unsampler sigmas"]
    assert usual == again != changed
    if "sigma_max" in override:
        assert changed[-1] == pytest.approx(9.0)
    if "sigma_min" in override:
        assert changed[0] == pytest.approx(0.2)


def test_positional_arguments_and_an_unticked_script(plain: list[bytes]) -> None:
    assert kinds(img2img(args=[True, ["frames"], 0, -1, 3])) == ["frame"] * 3
    for args in ([False, ["frames"], "nonsense"], [{"enabled": False, "steps": "nonsense"}], []):
        assert pixels(img2img(args=args)) == plain


def test_samples_are_saved_only_where_the_host_saves_them() -> None:
    """Seen through the latents file, which is written either way: the numbers before it tell."""
    fields = {"output": ["frames", "latents"], "include_clean": False}
    numbers = []
    for save in (False, False, True):
        path = img2img(fields, save_images=save)["params"]["Unsampler latents"][0]
        numbers.append(int(Path(path.replace("\\", "/")).name.split("-")[0]))
    assert numbers[1] - numbers[0] == 1
    assert numbers[2] - numbers[1] == 7


def watched(button: str, settings: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A long run with a button pressed after a few frames: its reply, and the last progress before that."""
    reply: dict[str, Any] = {}
    run = threading.Thread(target=lambda: reply.update(img2img(settings, **fields)))
    run.start()
    progress: dict[str, Any] = {"textinfo": None}
    until = time.monotonic() + 120
    while not (progress["textinfo"] and progress["state"]["sampling_step"] > 5):
        assert run.is_alive() and time.monotonic() < until
        time.sleep(0.1)
        progress = ask("/sdapi/v1/progress")
    ask(f"/sdapi/v1/{button}", {})
    run.join(timeout=300)
    return reply, progress


def test_interrupt_ends_with_what_was_done(plain: list[bytes]) -> None:
    reply, progress = watched("interrupt", {"steps": 200}, n_iter=2)  # all within the gallery's limit
    count = kinds(reply).count("frame")
    assert 5 < count < 201
    assert {n["image"] for n in notes(reply)} == {0}
    assert opened(reply["images"][0]).n_frames == count
    assert "Unsampling: frame" in progress["textinfo"]
    assert progress["state"]["sampling_steps"] == 202 and 0 < progress["progress"] < 1
    assert opened(progress["current_image"]).size == (128, 128)
    assert pixels(img2img()) == plain


def test_skip_goes_on_with_the_next_batch(plain: list[bytes]) -> None:
    reply, _ = watched("skip", {"steps": 40}, n_iter=2)
    counts = [sum(n["kind"] == "frame" and n["image"] == i for n in notes(reply)) for i in (0, 1)]
    assert 5 < counts[0] < 41 and counts[1] == 41
    assert [opened(i).n_frames for i in reply["images"][:2]] == counts
    assert pixels(img2img()) == plain


@pytest.mark.parametrize("output", [["init", "animation"], ["animation", "frames"]])
def test_a_script_that_runs_img2img_many_times_gets_one_picture_each(output: list[str]) -> None:
    loopback = {"script_name": "loopback", "script_args": [2, 0.5, "Linear", "None"]}
    reply = img2img({"output": output}, **loopback)
    assert [opened(i).format for i in reply["images"]] == ["PNG"] * 3  # the grid, and one for each loop
    if "init" in output:
        assert pixels(reply) == pixels(img2img(**loopback))


def test_the_script_documents_itself() -> None:
    scripts = [s for s in ask("/sdapi/v1/script-info") if s["name"] == "batch unsampler" and s["is_img2img"]]
    assert len(scripts) == 1 and scripts[0]["is_alwayson"]
    enabled, *args = scripts[0]["args"]
    assert (enabled["label"], enabled["value"]) == ("Batch Unsampler", False)
    assert len(args) == len(surface_fields("host"))
    for f, arg in zip(surface_fields("host"), args):
        assert arg["label"] == f"{f.metadata['label']}: {help_on(f, 'host')}"
        assert arg["value"] == (list(f.default) if isinstance(f.default, tuple) else f.default)
        assert (arg["minimum"], arg["maximum"]) == (f.metadata["minimum"], f.metadata["maximum"])
        assert (choices(arg) or None) == f.metadata["choices"]
