"""The real page of a running WebUI, named by ``WEBUI_URL``, in a real browser.

Run with ``-m live`` where Playwright and a Chromium are (``CHROMIUM`` names another than Playwright's own).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from test_clients import served
from test_live import SCHEDULER, URL, apart, as_base64, img2img, pixels
from test_settings import requests

from lib_unsampler.settings import OUTPUTS, Settings, parse, surface_fields, to_infotext

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright drives the page: pip install playwright")

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
SHARED = [HealthCheck.function_scoped_fixture]
FIELDS = {f.name: f for f in surface_fields("host")}


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """The img2img tab."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        page.thrown = []
        page.on("pageerror", lambda error: page.thrown.append(f"{error}: {getattr(error, 'stack', '')}"))
        page.goto(URL, timeout=120000)
        page.wait_for_selector("#img2img_generate", state="attached", timeout=120000)
        page.wait_for_selector("#batch_unsampler-visible-checkbox", state="attached", timeout=120000)
        page.wait_for_timeout(2000)
        page.click("#tabs > div.tab-nav button:has-text('img2img')")
        yield page
        browser.close()


def shown(page: Any, name: str) -> Any:
    """What a control shows, as its field's type."""
    f, box = FIELDS[name], page.locator(f"#batch_unsampler_{name}")
    if f.metadata["choices"] is OUTPUTS:
        labels = "boxes => boxes.map(b => b.parentElement.innerText.trim())"
        return tuple(box.locator("input:checked").evaluate_all(labels))
    if f.metadata["choices"]:
        return box.locator("input:checked").evaluate("box => box.parentElement.innerText.trim()")
    if isinstance(f.default, bool):
        return box.locator("input").is_checked()
    return type(f.default)(box.locator("input, textarea").first.input_value())


def everything(page: Any) -> dict[str, Any]:
    values = {name: shown(page, name) for name in FIELDS}
    return {"enabled": page.locator("#batch_unsampler-visible-checkbox").is_checked(), **values}


def open_fold(page: Any) -> None:
    fold = page.locator(".batch-unsampler-fold")
    if fold.get_attribute("aria-expanded") != "true":
        fold.click()


def paste(page: Any, text: str) -> None:
    """Pastes parameters of seed 5 by the arrow, until the seed shows it; Neo leaves the prompt as it is."""
    page.locator("#img2img_seed input").first.fill("1")
    page.locator("#img2img_prompt textarea").fill(text)
    page.click("#img2img_tools #paste")
    page.wait_for_function("document.querySelector('#img2img_seed input').value == '5'", timeout=20000)
    page.wait_for_timeout(300)


def expected(wanted: Settings) -> dict[str, Any]:
    return {"enabled": True, **{name: getattr(wanted, name) for name in FIELDS}}


def quoted(value: str) -> str:
    """As the host writes a value of the parameters."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",\n:") else value


@settings(max_examples=15, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=SHARED)
@given(values=requests("host"))
def test_every_setting_is_pasted_into_its_control(page: Any, values: dict[str, Any]) -> None:
    texts = {name: values[name].replace("\r", "") for name in ("positive", "negative")}  # as a page has them
    texts["trajectory"] = re.sub("[\r\n]", "", values["trajectory"])  # the chooser has one line
    texts["reply"] = "all"  # says where a reply goes, not what a picture is: it is never pasted
    wanted = parse({**values, **texts}, "host")
    written = {"Unsampler version": "0", **to_infotext(wanted, "host")}
    lines = ", ".join(f"{key}: {quoted(value)}" for key, value in written.items())
    paste(page, f"pasted\nSteps: 6, Sampler: Euler, Seed: 5, Size: 128x128, {lines}")
    got = everything(page)
    assert {k: v for k, v in got.items() if v != expected(wanted)[k]} == {}


@pytest.mark.parametrize(
    "name", ["cat.safetensors\n", "\ncat.safetensors", "a\ncat.safetensors", "cat.safetensors\r\n"]
)
def test_a_pasted_file_name_has_one_line(page: Any, name: str) -> None:
    written = {"Unsampler version": "0", **to_infotext(parse({"trajectory": name}, "host"), "host")}
    lines = ", ".join(f"{key}: {quoted(value)}" for key, value in written.items())
    paste(page, f"pasted\nSteps: 6, Sampler: Euler, Seed: 5, Size: 128x128, {lines}")
    assert shown(page, "trajectory") == re.sub("[\r\n]", "", name)


def test_a_picture_s_own_parameters_are_pasted(page: Any) -> None:
    asked = {"output": ["frames", "contact sheet"], "noise": "path", "step_increment": 2, "duration": 0.25}
    text = img2img(asked, prompt="pasted")["infotexts"][1]
    paste(page, text)
    assert everything(page) == expected(parse(asked, "host"))
    paste(page, "pasted\nSteps: 6, Sampler: Euler, Seed: 5, Size: 128x128")
    assert everything(page) == {**expected(parse(asked, "host")), "enabled": False}


def test_a_latents_file_is_chosen_or_uploaded(page: Any, tmp_path: Path) -> None:
    (name,) = img2img({"output": ["latents"]})["params"]["Unsampler latents names"]
    box = page.locator("#batch_unsampler")
    if not page.locator("#batch_unsampler-visible-checkbox").is_checked():
        box.locator(".label-wrap > span").first.click(position={"x": 60, "y": 10})
    open_fold(page)
    page.click("#batch_unsampler_look")
    page.wait_for_timeout(1500)
    page.locator("#batch_unsampler_trajectory input").click()
    assert page.locator("#batch_unsampler_trajectory ul li", has_text=name).count() == 1
    page.keyboard.press("Escape")
    file = tmp_path / "mine.safetensors"
    for data, kept in ((served(f"/unsampler/v1/latents/{name}"), True), (b"no trajectory", False)):
        before = shown(page, "trajectory")
        file.write_bytes(data)
        with page.expect_file_chooser() as chooser:
            page.click("#batch_unsampler_upload")
        chooser.value.set_files(str(file))
        page.wait_for_timeout(3000)
        if kept:
            assert shown(page, "trajectory").startswith("unsampler-uploads/")
        else:
            assert shown(page, "trajectory") == before
            assert page.get_by_text("not a readable trajectory file").count()


def put(page: Any, selector: str, value: Any) -> None:
    number = page.locator(f"{selector} input[type=number]")
    number.fill(str(value))
    number.press("Tab")


def begin_again(page: Any) -> None:
    """The img2img tab as a newcomer finds it."""
    page.reload()
    page.wait_for_selector("#batch_unsampler_trajectory", state="attached", timeout=120000)
    page.wait_for_timeout(2000)
    page.click("#tabs > div.tab-nav button:has-text('img2img')")


def test_the_curve_is_the_request_s_and_the_player_has_its_frames(page: Any) -> None:
    """From a fresh page: tick, move a slider, Generate, scrub, start from a level."""
    begin_again(page)
    picture = str(Path(__file__).resolve().parents[2] / "lib_unsampler/assets/cat.jpg")
    page.locator("#img2img_img2img_tab input[type=file], #img2img_image input[type=file]").first.set_input_files(
        picture
    )
    page.wait_for_timeout(1500)
    for name, value in (("steps", 8), ("width", 128), ("height", 128), ("seed", 5)):
        put(page, f"#img2img_{name}", value)
    page.locator("#batch_unsampler .label-wrap > span").first.click(position={"x": 60, "y": 10})
    assert page.locator("#batch_unsampler-visible-checkbox").is_checked()
    curve = page.locator("#batch_unsampler_curve[data-kept]")
    curve.wait_for(timeout=20000)  # a request of the tests before has loaded the model
    assert page.locator("#batch_unsampler").bounding_box()["height"] <= 420
    before = json.loads(curve.get_attribute("data-kept"))
    page.locator("#batch_unsampler_step_increment .batch-unsampler-range").fill("2")
    page.wait_for_timeout(300)
    drawn = json.loads(curve.get_attribute("data-kept"))
    assert drawn == before[::-1][::2][::-1]
    page.click("#img2img_generate")
    player = page.locator("#batch_unsampler_player")
    player.wait_for(timeout=120000)
    page.wait_for_timeout(1500)
    told = json.loads(page.locator("#generation_info_img2img textarea").input_value())["extra_generation_params"]
    assert drawn == told["Unsampler sigmas"]
    scrub = player.get_by_label("Frame", exact=True)
    assert int(scrub.get_attribute("max")) == len(drawn)
    scrub.fill("2")
    step = told["Unsampler images"][-len(drawn) - 1 :][2]["step"]
    assert page.locator("#batch_unsampler_frame").text_content().startswith(f"step {step},")
    page.get_by_role("button", name="Start from this level").click()
    page.wait_for_timeout(1500)
    assert shown(page, "end_at_step") == step and shown(page, "output") == ("init",)
    assert not page.locator("#batch_unsampler .batch-unsampler-error").filter(visible=True).count()


def test_the_estimate_is_of_the_size_that_resize_by_makes(page: Any) -> None:
    """From the test before: an 8-step request of 128x128 with frames wanted again."""
    page.locator("#batch_unsampler_reset").click()
    cost = page.locator("#batch_unsampler_cost")
    cost.filter(has_text="GIF").wait_for()
    page.wait_for_timeout(1500)
    before = cost.text_content()
    page.locator("#tab_img2img button:visible", has_text="Resize by").click()
    page.locator("#img2img_scale input[type=number]").fill("0.5")
    page.locator("#img2img_scale input[type=number]").press("Tab")
    page.locator("#img2img_scale input[type=range]").dispatch_event("pointerup")
    said = page.locator("#img2img_scale_resolution_preview .resolution").last
    said.wait_for(timeout=10000)
    page.wait_for_timeout(2000)
    width, height = (int(side) for side in said.text_content().split("x"))
    wanted = pytest.approx(width * height / 128**2, rel=0.03)
    for _ in range(30):  # a busy host answers late
        if size_said(cost.text_content()) / size_said(before) == wanted:
            break
        page.wait_for_timeout(1000)
    assert size_said(cost.text_content()) / size_said(before) == wanted
    page.locator("#tab_img2img button:visible", has_text="Resize to").click()
    cost.filter(has_text=before).wait_for()


def size_said(text: str) -> float:
    number, unit = re.search(r"about ([\d.e+]+) (B|kB|MB) GIF", text).groups()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def upload(page: Any, picture: Path, mask: Path) -> None:
    """A picture and its mask, unblurred, by the tab *Inpaint upload*."""
    page.locator("#mode_img2img > div.tab-nav button:has-text('Inpaint upload')").click()
    page.locator("#img_inpaint_base input[type=file]").set_input_files(str(picture))
    page.locator("#img_inpaint_mask input[type=file]").set_input_files(str(mask))
    page.wait_for_timeout(1500)
    put(page, "#img2img_mask_blur", 0)


def shown_in_gallery(page: Any) -> list[str]:
    """What the gallery's pictures are read from, each once."""
    sources = page.locator("#img2img_gallery img:not(.livePreview *)").evaluate_all("all => all.map(each => each.src)")
    return list(dict.fromkeys(sources))


def results(page: Any, before: str) -> list[str]:
    """What the gallery shows when a run that was asked for is over, whose first picture is not ``before``.

    A busy host shows previews meanwhile, and Neo's stand where results do.
    """
    for _ in range(600):
        page.wait_for_timeout(500)
        running = page.locator("#img2img_interrupt").is_visible()
        if not running and shown_in_gallery(page)[:1] not in ([], [before]):
            break
    page.wait_for_timeout(3000)
    return shown_in_gallery(page)


def test_a_map_guides_from_inpaint_upload(page: Any, tmp_path: Path) -> None:
    """Black on the left, grey on the right: the API's picture of the same request, and the source on the left.

    The pages of Forge and Neo make every mask black and white, an uploaded one too.
    """
    photo = Path(__file__).resolve().parents[2] / "lib_unsampler/assets/cat.jpg"
    mask = Image.new("L", (128, 128), 0)
    mask.paste(160, (64, 0, 128, 128))
    mask.save(tmp_path / "map.png")
    with Image.open(photo) as read:
        read.convert("RGB").resize((128, 128)).save(tmp_path / "cat.png")
    asked = {"output": ["guide"], "guide_weight": "map"}
    begin_again(page)
    lines = ", ".join(f"{key}: {quoted(value)}" for key, value in to_infotext(parse(asked, "host"), "host").items())
    written = "Denoising strength: 0.8, Unsampler version: 0"
    sampled = f"Steps: 8, Sampler: Euler, Schedule type: {SCHEDULER}, CFG scale: 2, Seed: 5, Size: 128x128"
    paste(page, f"pasted\n{sampled}, {written}, {lines}")
    upload(page, tmp_path / "cat.png", tmp_path / "map.png")
    page.locator("#img2img_inpaint_full_res label", has_text="Whole picture").click()  # Neo begins with the other
    page.locator("#img2img_prompt textarea").fill("pasted")  # where Neo leaves all that was pasted
    page.click("#img2img_generate")
    read = Image.open(io.BytesIO(page.request.get(results(page, "")[0]).body()))
    assert read.info["parameters"].startswith("pasted\nSteps: 8, Sampler: Euler, ")
    made = read.convert("RGB")
    if page.evaluate("typeof ForgeCanvas != 'undefined'"):
        mask = mask.point(lambda value: 255 if value > 128 else 0)
    with Image.open(tmp_path / "cat.png") as cat:
        fields = {"init_images": [as_base64(cat)], "mask": as_base64(mask), "mask_blur": 0, "inpainting_fill": 1}
        own = {"prompt": "pasted", "steps": 8, "cfg_scale": 2, "seed": 5, "sampler_name": "Euler", "width": 128}
        reply = img2img(asked, denoising_strength=0.8, height=128, **own, **fields)
        source = img2img({"output": ["frames"], "steps": 1}, height=128, **own, **{**fields, "mask": None})
    assert made.size == (128, 128)
    assert apart(made.tobytes(), pixels(reply)[0]) <= 3  # each request's autoencoder draws for itself
    left, right = ((side, 0, side + 48, 128) for side in (0, 80))
    plain = Image.frombytes("RGB", (128, 128), pixels(source)[0])
    moved = [np.abs(np.asarray(made.crop(box), float) - np.asarray(plain.crop(box))).mean() for box in (left, right)]
    assert moved[0] < moved[1] / 2


def test_no_error_is_ours(page: Any) -> None:
    assert [error for error in page.thrown if "batch_unsampler" in error] == []


def test_the_settings_tab_has_the_section(page: Any) -> None:
    page.click("#tabs > div.tab-nav button:has-text('Settings')")
    page.locator("#settings button", has_text="Batch Unsampler").first.click()
    assert page.locator("#setting_batch_unsampler_gallery_limit").is_visible()
    assert page.locator("#setting_batch_unsampler_format input:checked").input_value() == "gif"
    page.click("#tabs > div.tab-nav button:has-text('img2img')")
