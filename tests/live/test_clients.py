"""A running WebUI, named by ``WEBUI_URL``, driven by what its users drive it with: webuiapi from PyPI, the X/Y/Z
plot, the README's examples, the latents route, the progress bar.

Run with ``-m live``.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_live import CAT, URL, apart, as_base64, ask, img2img, notes, pixels
from test_readme import WEBUI, python_examples

from lib_unsampler.core import trajectory
from lib_unsampler.settings import surface_fields

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]


@pytest.fixture
def client() -> Any:
    """A client that knows nothing of the extension."""
    webuiapi = pytest.importorskip("webuiapi")
    return webuiapi.WebUIApi(baseurl=f"{URL}/sdapi/v1", sampler="Euler", scheduler="Automatic", steps=6)


def asked(client: Any, settings: dict[str, Any], **request: Any) -> Any:
    """One img2img of webuiapi with an all-white mask of seeded latent noise, so that it is repeatable."""
    size = (128, 128)
    picture = Image.open(CAT).convert("RGB").resize(size)
    return client.img2img(
        images=[picture],
        mask_image=Image.new("RGB", size, "white"),
        inpainting_fill=2,
        inpaint_full_res=False,
        mask_blur=0,
        prompt="a cat",
        seed=5,
        cfg_scale=3,
        width=128,
        height=128,
        denoising_strength=0.7,
        alwayson_scripts={"Batch Unsampler": {"args": [settings]}} if settings else {},
        **request,
    )


def test_webuiapi_gets_frames_and_the_animation(client: Any) -> None:
    settings = {"output": ["frames", "animation"], "format": "webp", "step_increment": 2}
    result = asked(client, {**settings, "noise": "independent"})  # shared noise is this source itself: flow stays at it
    told = result.info["extra_generation_params"]["Unsampler images"]
    assert [note["kind"] for note in told] == ["animation"] + ["frame"] * 4
    assert (result.images[0].format, result.images[0].n_frames) == ("WEBP", 4)
    assert [image.size for image in result.images[1:]] == [(128, 128)] * 4
    assert len({image.tobytes() for image in result.images[1:]}) == 4
    assert "Unsampler step increment: 2" in result.info["infotexts"][1]


def test_webuiapi_gets_init(client: Any) -> None:
    plain = asked(client, {}).image.tobytes()
    assert asked(client, {"output": ["init"]}).image.tobytes() == plain
    assert asked(client, {"output": ["init"], "noise": "independent", "normalize": True}).image.tobytes() != plain


def test_webuiapi_is_told_what_is_wrong(client: Any) -> None:
    with pytest.raises(RuntimeError, match=r"422.*pink.* is not one of shared, independent, path"):
        asked(client, {"noise": "pink"})


def served(path: str, **headers: str) -> bytes:
    return urllib.request.urlopen(urllib.request.Request(URL + path, headers=headers), timeout=60).read()


def test_webuiapi_gets_an_mp4_by_its_route(client: Any, tmp_path: Path) -> None:
    """It takes every item of the reply for a picture, and an MP4 is none."""
    settings = {"output": ["animation"], "format": "mp4"}
    try:
        asked(client, settings)
    except RuntimeError as error:
        pytest.skip(f"this WebUI has no PyAV: {error}")
    except Image.UnidentifiedImageError:
        pass
    result = asked(client, settings, send_images=False, save_images=True)
    (name,) = result.info["extra_generation_params"]["Unsampler animations names"]
    assert name in ask("/unsampler/v1/animations")
    data = served(f"/unsampler/v1/animations/{name}")
    assert data[4:8] == b"ftyp" and served(f"/unsampler/v1/animations/{name}", Range="bytes=4-7") == b"ftyp"
    av = pytest.importorskip("av")
    (tmp_path / "cat.mp4").write_bytes(data)
    with av.open(str(tmp_path / "cat.mp4")) as film:
        assert len(list(film.decode(video=0))) == 7


@pytest.mark.parametrize("form", ["gif", "webp", "apng"])
def test_a_saved_animation_is_had_over_the_api(form: str) -> None:
    reply = img2img({"output": ["animation"], "format": form}, save_images=True)
    (name,) = reply["params"]["Unsampler animations names"]
    assert served(f"/unsampler/v1/animations/{name}") == base64.b64decode(reply["images"][0])
    assert img2img({"output": ["animation"], "format": form})["params"]["Unsampler animations names"] == []


def test_a_file_is_had_in_parts() -> None:
    (name,) = img2img({"output": ["latents"]})["params"]["Unsampler latents names"]
    path = f"/unsampler/v1/latents/{name}"
    whole = served(path)
    assert served(path, Range="bytes=10-99", **{"Accept-Encoding": "gzip"}) == whole[10:100]
    assert served(path, **{"Accept-Encoding": "gzip"}) == whole
    told = urllib.request.urlopen(urllib.request.Request(URL + path, method="HEAD"), timeout=60)
    assert int(told.headers["Content-Length"]) == len(whole) and told.read() == b""
    with pytest.raises(urllib.error.HTTPError, match="416"):
        served(path, Range=f"bytes={len(whole)}-")


def test_what_stands_behind_the_dict_is_refused_by_name() -> None:
    for behind, said in (([5], "output: 5"), ([{"steps": 3}], "output: {'steps': 3}")):
        reply = img2img(args=[{"output": ["frames"]}, *behind])
        assert reply["status"] == 422 and f"{said} stands behind a dict" in reply["detail"]


@pytest.mark.parametrize("size", [(100, 60), (72, 100)])
def test_any_picture_has_a_report(size: tuple[int, int]) -> None:
    transparent = Image.open(CAT).convert("RGBA").resize(size)
    transparent.putalpha(Image.linear_gradient("L").resize(size))
    settings = {"mode": "invert", "output": ["frames"], "report": True, "steps": 3, "max_calls": 3}
    fields = {"width": size[0], "height": size[1], "sampler_name": "Euler", "steps": 3, "mask": None}
    reply = img2img(settings, init_images=[as_base64(transparent)], **fields)
    assert notes(reply)[0]["kind"] == "report" and notes(reply)[0]["codec dB"] > 3, reply


def test_a_latents_file_is_had_over_the_api_and_init_goes_on_from_it(tmp_path: Path) -> None:
    made = img2img({"output": ["latents", "init"], "noise": "path"})
    (name,) = made["params"]["Unsampler latents names"]
    assert name in ask("/unsampler/v1/latents")
    file = tmp_path / "latents.safetensors"
    file.write_bytes(served(f"/unsampler/v1/latents/{name}"))
    saved = trajectory.load(file)
    assert saved.sigmas.tolist() == made["params"]["Unsampler sigmas"]
    again = img2img({"output": ["init"], "trajectory": name})
    assert apart(pixels(again)[0], pixels(made)[0]) <= 1
    told = img2img({"output": ["frames"], "trajectory": name}, steps=20)
    assert [note["sigma"] for note in notes(told)[1:]] == made["params"]["Unsampler sigmas"]
    for refused in (
        img2img({"output": ["init"], "trajectory": name}, steps=9),
        img2img({"output": ["init"], "trajectory": name}, width=192),
        img2img({"output": ["init"], "trajectory": "../" + name}),
    ):
        assert refused["status"] == 422 and "trajectory: " in refused["detail"]


NAMES = ["..%2f..%2fconfig.json", "%2fetc%2fpasswd", "no.safetensors", "x" * 300, "a%00.safetensors", "%ff.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_is_had_over_the_api(name: str) -> None:
    for kind in ("latents", "animations"):
        reply = ask(f"/unsampler/v1/{kind}/{name}")
        assert reply["status"] == 404 and "is not a" in reply["detail"]


def test_parameters_of_a_picture_are_a_request() -> None:
    settings = {
        "output": ["frames", "contact sheet"],
        "noise": "path",
        "step_increment": 2,
        "end_at_step": 1,
        "positive": ' a "cat", 512x512\n(sea:1.2)',
        "negative": '["x"]',
        "duration": 0.25,
        "include_clean": False,
    }
    first = img2img(settings)
    again = img2img(infotext=first["infotexts"][1])
    assert again["params"]["Unsampler settings"] == first["params"]["Unsampler settings"]
    assert pixels(again) == pixels(first)
    over = img2img({"output": ["frames"]}, infotext=first["infotexts"][1])
    assert over["params"]["Unsampler settings"]["noise"] == "shared"  # what the request itself says, holds
    assert not any(key.startswith("Unsampler") for key in img2img()["params"])


def test_the_infotext_field_takes_what_the_readme_says() -> None:
    """Sent as the README's example sends it. Seed, steps, sampler and our fields are the parameters'; the prompt,
    the size, CFG and the strength stay the API's own defaults."""
    settings = {"output": ["frames"], "noise": "path", "step_increment": 2}
    first = img2img(settings, seed=77, steps=4, sampler_name="Heun", negative_prompt="rain")
    again, plain = (
        ask("/sdapi/v1/img2img", {"init_images": [as_base64(Image.open(CAT))], **body})
        for body in ({"infotext": first["infotexts"][1]}, {"steps": 1})
    )
    said, of_the_first, defaults = (json.loads(reply["info"]) for reply in (again, first, plain))
    for key in ("seed", "steps", "sampler_name"):
        assert said[key] == of_the_first[key] != defaults[key]
    told = said["extra_generation_params"]
    assert told["Unsampler settings"] == first["params"]["Unsampler settings"] and len(again["images"]) == 3
    for key in ("prompt", "negative_prompt", "width", "height", "cfg_scale", "denoising_strength"):
        assert said[key] == defaults[key]
    assert said["cfg_scale"] != of_the_first["cfg_scale"] and said["width"] != of_the_first["width"]


def plot_args() -> list[dict[str, Any]]:
    (plot,) = [s for s in ask("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and s["is_img2img"]]
    return plot["args"]


def plot_axes() -> list[str]:
    return [c if isinstance(c, str) else c[0] for c in plot_args()[0]["choices"]]


def plotted(axes: list[tuple[str, str]], settings: Any, **request: Any) -> dict[str, Any]:
    known, args = plot_axes(), []
    for name, values in [*axes, ("Nothing", ""), ("Nothing", "")][:3]:
        args += [known.index(name), values, []]
    no_legend_but_pictures, as_text = [False, True, False, False, False, False, False], True
    sizes = [0] * (len(plot_args()) - len(args) - len(no_legend_but_pictures) - 1)  # Neo's has rows beside the margin
    args += [*no_legend_but_pictures, *sizes, as_text]
    return img2img(settings, script_name="x/y/z plot", script_args=args, **request)


def test_the_plot_has_every_axis_once() -> None:
    numbers_and_choices = [f for f in surface_fields("host") if type(f.default) is not str or f.metadata["choices"]]
    ours = [name for name in plot_axes() if name.startswith("[Unsampler] ")]
    assert ours == ["[Unsampler] " + f.name.replace("_", " ") for f in numbers_and_choices]


def test_the_plot_varies_two_fields() -> None:
    axes = [("[Unsampler] noise", "shared, path"), ("[Unsampler] end at step", "0, 3")]
    reply = plotted(axes, {"output": ["frames"]})
    cells = list(itertools.product((0, 3), ("shared", "path")))
    assert len(reply["images"]) == 1 + len(cells)
    for (end, noise), cell, text in zip(cells, pixels(reply)[1:], reply["infotexts"][1:]):
        alone = img2img({"output": ["frames"], "noise": noise, "end_at_step": end})
        assert cell == pixels(alone)[-1]
        assert ("Unsampler noise: path" in text) == (noise == "path") and f"Unsampler end at step: {end}" in text


def test_the_plot_takes_ranges_and_the_word_automatic() -> None:
    reply = plotted([("[Unsampler] end at step", "automatic, 2-3")], {"output": ["frames"]})
    alone = [img2img({"output": ["frames"], "end_at_step": end}) for end in ("automatic", 2, 3)]
    assert pixels(reply)[1:] == [pixels(one)[-1] for one in alone]


def test_the_plot_says_what_is_wrong_before_it_begins() -> None:
    reply = plotted([("[Unsampler] noise", "shared, pink")], {"output": ["frames"]})
    assert reply["status"] == 422 and "noise: 'pink' is not one of" in reply["detail"]
    assert "not ticked" in plotted([("[Unsampler] noise", "shared, path")], None)["detail"]


def followed(settings: dict[str, Any], **request: Any) -> list[dict[str, Any]]:
    """What the progress API says while a request runs, every tenth of a second."""
    run = threading.Thread(target=img2img, args=(settings,), kwargs=request)
    seen = []
    run.start()
    while run.is_alive():
        seen.append(ask("/sdapi/v1/progress?skip_current_image=true"))
        time.sleep(0.1)
    return [p for p in seen if p["state"]["job_count"] > 0]


@pytest.mark.parametrize(
    ("settings", "request_", "says"),
    [
        ({"output": ["frames", "animation", "latents"], "steps": 60}, {}, ["Unsampling: frame"]),
        ({"output": ["frames", "init"]}, {"n_iter": 2, "steps": 20}, ["Unsampling: frame"]),
        ({"output": ["frames", "init"], "mode": "invert"}, {"n_iter": 2}, ["Inverting: level", "Unsampling: frame"]),
    ],
)
def test_the_bar_only_goes_forward_and_says_why(
    settings: dict[str, Any], request_: dict[str, Any], says: list[str]
) -> None:
    seen = followed(settings, sampler_name="Euler", **request_)
    done = [p["progress"] for p in seen]
    assert len(done) > 5 and 0 < done[0] < 0.5 < done[-1] <= 1
    assert all(later >= before - 1e-9 for before, later in zip(done, done[1:]))  # the host adds parts up in floats
    assert all(p["eta_relative"] > -1 for p in seen)
    for text in says:
        assert any(text in (p["textinfo"] or "") for p in seen)


@pytest.mark.parametrize("number", range(len(python_examples(WEBUI))))
def test_a_python_example_of_the_webuis_readme_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = python_examples(WEBUI)[number]
    if "webuiapi" in example:
        pytest.importorskip("webuiapi")
    Image.open(CAT).convert("RGB").resize((128, 128)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    host, port = re.fullmatch(r"https?://([^:/]+):(\d+)/?", URL).groups()
    example = example.replace("127.0.0.1", host).replace("7860", port)
    for small in ('"width": 128, "height": 128, "steps": 6', "width=128, height=128, steps=6"):
        example = example.replace('"steps": 20' if ":" in small else "steps=20", small)
    exec(compile(example, f"webui/README.md example {number + 1}", "exec"), {})
    made = {file.suffix: file.read_bytes() for file in tmp_path.iterdir() if file.name != "cat.jpg"}
    assert made
    for ending, data in made.items():
        if ending in (".gif", ".png", ".webp"):
            assert Image.open(io.BytesIO(data)).size[0] > 0
        else:
            (tmp_path / "copy.safetensors").write_bytes(data)
            assert trajectory.load(tmp_path / "copy.safetensors").z.ndim == 5


def test_fifty_requests_from_four_threads_are_each_answered_as_if_alone() -> None:
    kinds = (None, {"output": ["frames"]}, {"output": ["init"], "noise": "path"}, {"noise": "pink"})

    def asked_for(number: int) -> dict[str, Any]:
        return img2img(kinds[number % 4], seed=100 + number, steps=3)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(asked_for, range(50)))
    for number, reply in enumerate(replies):
        if number % 4 == 3:
            assert reply["status"] == 422 and "noise: 'pink'" in reply["detail"]
        else:
            assert json.loads(reply["info"])["seed"] == 100 + number
    for number in (0, 17, 34, 49):
        assert pixels(asked_for(number)) == pixels(replies[number])


def test_the_hosts_own_docs_page_has_our_routes() -> None:
    assert b"swagger" in served("/docs").lower()
    paths = json.loads(served("/openapi.json"))["paths"]
    assert {f"/unsampler/v1/{kind}{name}" for kind in ("latents", "animations") for name in ("", "/{name}")} <= set(
        paths
    )
