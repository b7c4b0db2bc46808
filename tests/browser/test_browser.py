"""The accordion, its schedule and the player, as a person uses them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lib_unsampler.settings import form, help_on, surface_fields
from lib_unsampler.settings.needs import is_used

FIELDS = {f.name: f for f in surface_fields("host")}


@pytest.fixture(scope="module")
def opened(browser: Any, served: SimpleNamespace) -> Iterator[Any]:
    """The page with the accordion open."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    page = context.new_page()
    page.errors = []
    page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(served.url)
    page.locator("#batch_unsampler").wait_for()
    page.locator("#batch_unsampler > button, #batch_unsampler .label-wrap").first.click()
    page.locator("#batch_unsampler_curve[data-kept]").wait_for()
    page.served = served
    yield page
    context.close()


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The page as it was at first; whatever the console calls an error fails the test."""
    opened.locator("#batch_unsampler_reset").click()
    sampler = opened.locator("#img2img_sampling input")
    if sampler.input_value() != "Euler":
        choose_sampler(opened, "Euler")
    for name, value in (("steps", 8), ("denoising_strength", 0.6), ("seed", 5)):
        opened.locator(f"#img2img_{name} input[type=number]").fill(str(value))
    fold = opened.locator(".batch-unsampler-fold")
    if fold.get_attribute("aria-expanded") == "true":
        fold.click()
    for name in ("skip", "positive", "panel"):
        box(opened, name).wait_for(state="hidden")
    opened.locator("#batch_unsampler_cost").filter(has_text="9 frames \u00b7 0.9 s \u00b7 about").wait_for()
    yield opened
    errors, opened.errors[:] = list(opened.errors), []
    assert [text for text in errors if "Failed to load resource" not in text] == []  # gradio's fonts, from elsewhere


def choose_sampler(page: Any, name: str) -> None:
    page.locator("#img2img_sampling input").click()
    page.get_by_role("option", name=name, exact=True).click()


def box(page: Any, name: str) -> Any:
    return page.locator(f"#batch_unsampler_{name}")


def kept(page: Any) -> list[float]:
    return json.loads(page.locator("#batch_unsampler_curve").get_attribute("data-kept"))


def put(page: Any, name: str, value: Any) -> None:
    """As a user enters it."""
    field = FIELDS.get(name)
    if field is not None and field.metadata["choices"]:
        for choice in field.metadata["choices"]:
            label = box(page, name).locator("label").filter(has=page.get_by_text(choice, exact=True)).locator("input")
            if label.is_checked() != (choice in ([value] if isinstance(value, str) else value)):
                label.click()
    else:
        owner = "batch_unsampler" if field is not None else "img2img"
        number = page.locator(f"#{owner}_{name} input[type=number]")
        number.fill(str(value))
        number.press("Tab")


def counted(page: Any) -> Callable[[], list[list[str]]]:
    """What the page has asked Python for since."""
    asked: list[list[str]] = []

    def note(request: Any) -> None:
        if request.method == "POST" and request.post_data and '\\"wants\\"' in request.post_data:
            question = next(d for d in json.loads(request.post_data)["data"] if d)
            asked.append(json.loads(question)["wants"])

    page.on("request", note)
    return lambda: asked


def generate(page: Any) -> tuple[Any, Any]:
    count = len(page.served.made)
    page.click("#img2img_generate")
    page.wait_for_timeout(200)
    for _ in range(200):
        if len(page.served.made) > count:
            break
        page.wait_for_timeout(50)
    page.locator("#batch_unsampler_player").wait_for(timeout=10000)
    page.wait_for_timeout(700)
    return page.served.made[-1]


def test_a_slider_moves_the_curve_without_a_request(page: Any) -> None:
    before = kept(page)
    page.wait_for_timeout(600)
    asked = counted(page)
    box(page, "end_at_step").locator("input[type=range]").fill("3")
    page.wait_for_timeout(50)
    assert kept(page) == before[:-3]
    put(page, "step_increment", 2)
    assert kept(page) == before[:-3][::-1][::2][::-1]
    page.wait_for_timeout(600)
    assert all(wants == ["check"] for wants in asked())
    box(page, "steps").locator("input[type=range]").fill("30")
    page.wait_for_timeout(1000)
    assert len(kept(page)) == 14 and sum("schedule" in wants for wants in asked()) == 1
    box(page, "steps").locator("input[type=range]").fill("0")
    page.wait_for_timeout(600)
    assert sum("schedule" in wants for wants in asked()) == 1  # known already


CASES: list[dict[str, Any]] = [
    {},
    {"steps": 13, "step_increment": 3},
    {"end_at_step": 2, "sampling": "DPM++ 2M"},
    {"output": ["frames", "init"], "denoising_strength": 0.35},
    {"mode": "invert", "step_increment": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.one_of(2)
def test_the_levels_drawn_are_those_that_are_made(page: Any, case: dict[str, Any]) -> None:
    for name, value in case.items():
        if name == "sampling":
            choose_sampler(page, value)
        else:
            put(page, name, value)
    page.wait_for_timeout(1000)
    drawn = kept(page)
    _, processed = generate(page)
    assert drawn == processed.extra_generation_params["Unsampler sigmas"]


def test_the_model_s_name_and_a_level_are_read(page: Any) -> None:
    readout = page.locator("#batch_unsampler_readout")
    assert readout.text_content() == "8 of 8 levels, curve of doubled"
    curve = page.locator("#batch_unsampler_curve")
    place = curve.bounding_box()
    page.mouse.move(place["x"] + place["width"] - 11, place["y"] + 40)
    assert readout.text_content() == "step 8, sigma 0"
    curve.press("Home")
    assert readout.text_content() == "step 0, sigma 14.61, kept"
    curve.press("ArrowRight")
    assert readout.text_content().startswith("step 1, sigma 7.903")
    assert curve.get_attribute("aria-valuenow") == "1"
    page.mouse.move(0, 0)


def test_help_is_there_on_demand_and_by_keyboard(page: Any) -> None:
    help_text = help_on(FIELDS["noise"], "host")
    assert not page.get_by_text(help_text).filter(visible=True).count()
    ask = page.get_by_role("button", name="Help: Noise", exact=True)
    ask.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text(help_text).filter(visible=True).count() == 1
    assert ask.get_attribute("aria-expanded") == "true"
    page.keyboard.press("Enter")
    assert not page.get_by_text(help_text).filter(visible=True).count()


def test_automatic_is_a_word(page: Any) -> None:
    for name, word in (("steps", "automatic"), ("end_at_step", "automatic")):
        spoken = box(page, name).locator(".batch-unsampler-word")
        assert spoken.text_content() == word and spoken.is_visible()
        put(page, name, 4)
        page.wait_for_timeout(100)
        assert not spoken.is_visible()


def visible(page: Any) -> set[str]:
    return {name for name in FIELDS if box(page, name).is_visible()}


def check_only_used_are_visible(page: Any, changes: list[dict[str, Any]]) -> None:
    """After each change exactly the fields that the mode uses are on the page."""
    page.locator(".batch-unsampler-fold").click()
    defaults = {f.name: f.default for f in FIELDS.values()}
    for change in changes:
        for name, value in change.items():
            put(page, name, value)
        page.wait_for_timeout(700)
        values = {**defaults, **change}
        assert visible(page) == {name for name in FIELDS if is_used(FIELDS[name], values)}, change


def test_only_what_the_mode_uses_is_there(page: Any) -> None:
    more = {"mode": "noise", "output": ["latents"]}
    check_only_used_are_visible(page, [{}, {"mode": "invert"}, {"mode": "replay"}, more])


def test_what_would_be_refused_is_said_beside_its_field(page: Any) -> None:
    error = page.locator("#batch_unsampler_steps_error")
    put(page, "output", ["frames", "init"])
    put(page, "steps", 20)
    error.filter(has_text="20 is not 0, which init needs").wait_for()
    assert box(page, "steps").locator("input[type=number]").get_attribute("aria-invalid") == "true"
    put(page, "steps", 0)
    error.wait_for(state="hidden")
    choose_sampler(page, "DDIM")
    page.locator("#batch_unsampler_output_error").filter(has_text="needs a sampler with a sigma schedule").wait_for()


def test_a_hidden_field_that_is_refused_is_shown(page: Any) -> None:
    page.locator(".batch-unsampler-fold").click()
    put(page, "mode", "invert")
    box(page, "panel").locator("input").check()
    page.locator(".batch-unsampler-fold").click()
    put(page, "mode", "noise")
    page.locator("#batch_unsampler_panel_error").filter(has_text="needs mode invert").wait_for()


@pytest.mark.parametrize("name", form.PRESETS)
def test_a_preset_sets_every_field_and_reset_takes_it_back(page: Any, name: str) -> None:
    page.locator("#batch_unsampler_preset").select_option(name)
    page.wait_for_timeout(500)
    one = "document.querySelector(`#batch_unsampler_${name} input[type=number]`).value"
    read = f"names => Object.fromEntries(names.map((name) => [name, {one}]))"
    numbers = [f.name for f in FIELDS.values() if type(f.default) in (int, float)]
    wanted = form.preset(name)
    assert {n: float(v) for n, v in page.evaluate(read, numbers).items()} == {n: wanted[n] for n in numbers}
    shown = box(page, "output").locator("label:has(input:checked)").all_inner_texts()
    assert [text.strip() for text in shown] == list(wanted["output"])
    page.locator("#batch_unsampler_reset").click()
    page.wait_for_timeout(500)
    assert {n: float(v) for n, v in page.evaluate(read, numbers).items()} == {n: FIELDS[n].default for n in numbers}
    assert box(page, "mode").locator("label:has(input:checked)").inner_text().strip() == "noise"


def test_costs_are_told_and_what_is_dear_is_warned_of(page: Any) -> None:
    cost = page.locator("#batch_unsampler_cost")
    cost.filter(has_text="9 frames \u00b7 0.9 s \u00b7 about").wait_for()
    warning = page.locator("#batch_unsampler_warning")
    assert not warning.is_visible()
    put(page, "mode", "invert")
    put(page, "steps", 150)
    warning.filter(has_text="This will take long: about 600 model calls").wait_for()


def test_the_player_plays_scrubs_and_compares(page: Any) -> None:
    _, processed = generate(page)
    moving = page.locator("#img2img_gallery img").first.get_attribute("src")
    assert moving.endswith(".gif")
    with Image.open(processed.images[0].already_saved_as) as gif:
        assert gif.is_animated and gif.n_frames == 9
    player, told = page.locator("#batch_unsampler_player"), page.locator("#batch_unsampler_frame")
    scrub = player.get_by_label("Frame", exact=True)
    seen = []
    for number in range(9):
        scrub.fill(str(number))
        seen.append(told.text_content())
    sigmas = processed.extra_generation_params["Unsampler sigmas"]
    assert seen == ["source, sigma 0", *(f"step {7 - i}, sigma {float(f'{s:.4g}'):g}" for i, s in enumerate(sigmas))]
    player.get_by_role("button", name="Play").click()
    page.wait_for_timeout(350)
    assert told.text_content() != seen[-1]
    player.get_by_role("button", name="Pause").click()
    still = told.text_content()
    page.wait_for_timeout(250)
    assert told.text_content() == still
    compare = player.get_by_role("button", name="Compare")
    compare.click()
    assert compare.get_attribute("aria-pressed") == "true"
    player.get_by_label("Edge between source and frame").fill("25")
    assert player.locator(".batch-unsampler-source").evaluate("e => e.style.clipPath") == "inset(0px 75% 0px 0px)"


def test_everything_can_be_downloaded(page: Any) -> None:
    put(page, "output", ["frames", "animation", "latents"])
    _, processed = generate(page)
    with page.expect_download() as film:
        page.get_by_role("button", name="Animation", exact=True).click()
    assert Path(film.value.path()).read_bytes() == Path(processed.images[0].already_saved_as).read_bytes()
    with page.expect_download() as frames:
        page.get_by_role("button", name="Frames (zip)").click()
    with zipfile.ZipFile(frames.value.path()) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert (
            len(names) == 9 and names[0].startswith("frame-0000-source.") and names[-1].startswith("frame-0008-step-0.")
        )
        shown = Image.open(io.BytesIO(archive.read(names[-1]))).convert("RGB")
        assert shown.tobytes() == processed.images[-1].convert("RGB").tobytes()
    with page.expect_download() as latents:
        page.get_by_role("button", name="Latents", exact=True).click()
    (made,) = processed.extra_generation_params["Unsampler latents"]
    assert Path(latents.value.path()).read_bytes() == Path(made).read_bytes()


START: list[tuple[dict[str, Any], int]] = [
    ({}, 3),
    ({"noise": "shared", "steps": 12, "step_increment": 2}, 4),
    ({"noise": "path", "output": ["frames", "latents"]}, 3),
    ({"noise": "independent", "output": ["frames", "latents"]}, 0),
    ({"mode": "invert", "output": ["frames", "latents"]}, 2),
    ({"mode": "replay"}, 3),
]


@pytest.mark.parametrize(("case", "step"), START, ids=str)
@pytest.mark.one_of(2)
def test_the_next_generate_starts_from_the_same_z(page: Any, case: dict[str, Any], step: int) -> None:
    from doubled import latents_of, record_start

    if case.get("mode") == "replay":
        choose_sampler(page, "Euler a")
    for name, value in case.items():
        put(page, name, value)
    if "output" not in case:
        put(page, "output", ["frames", "latents"])
    _, processed = generate(page)
    (saved,) = latents_of(processed)
    level = (saved.sigmas == saved.schedule[step]).nonzero().item()
    scrub = page.get_by_label("Frame", exact=True)
    scrub.fill(str(level + 1))
    assert page.locator("#batch_unsampler_frame").text_content().startswith(f"step {step},")
    put(page, "seed", 77)
    page.get_by_role("button", name="Start from this level").click()
    page.locator(".batch-unsampler-says").filter(has_text=f"starts from step {step}").wait_for()
    page.wait_for_timeout(800)
    assert not page.locator("#batch_unsampler .batch-unsampler-error").filter(visible=True).count()
    seen: list[torch.Tensor] = []
    undo = record_start(page.served.host, seen)
    count = len(page.served.made)
    page.click("#img2img_generate")
    for _ in range(100):
        page.wait_for_timeout(50)
        if len(page.served.made) > count:
            break
    undo()
    assert torch.equal(seen[-1], saved.z[level])


def test_a_level_without_a_file_says_why_it_cannot_be_started_from(page: Any) -> None:
    put(page, "noise", "path")
    generate(page)
    start = page.get_by_role("button", name="Start from this level")
    assert start.is_disabled() and "No latents file was saved" in start.get_attribute("title")


def test_it_leaves_nothing_in_the_global_scope(page: Any) -> None:
    script = (Path(__file__).resolve().parents[2] / "javascript/batch_unsampler.js").read_text(encoding="utf-8")
    empty = page.context.new_page()
    empty.set_content("<p>nothing of ours</p>")
    before = set(empty.evaluate("Object.getOwnPropertyNames(window)"))
    empty.add_script_tag(content=script)
    assert set(empty.evaluate("Object.getOwnPropertyNames(window)")) == before
    empty.close()


SERIOUS = ("serious", "critical")


def test_no_serious_barrier_in_our_part(page: Any, node_tools: Path) -> None:
    """Axe's rules over the form, everything open, and the player."""
    page.locator(".batch-unsampler-fold").click()
    put(page, "mode", "invert")
    generate(page)
    page.get_by_role("button", name="Help: Mode", exact=True).click()
    page.evaluate((node_tools / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8"))
    for theme in ("light", "dark"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        page.wait_for_timeout(300)
        ours = "#batch_unsampler_stage, .batch-unsampler-field, .batch-unsampler-fold, #batch_unsampler_player"
        run = "async (ours) => (await axe.run({include: ours.split(', ').map((part) => [part])})).violations"
        found = page.evaluate(run, ours)
        told = [(v["id"], v["help"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in SERIOUS]
        assert told == [], theme
    page.evaluate("document.body.classList.remove('dark')")
    page.evaluate("delete window.axe")
    page.get_by_role("button", name="Help: Mode", exact=True).click()


OVERLAPS = """() => {
    const parts = [...document.querySelectorAll(
        "#batch_unsampler :is([data-testid=block-info], .batch-unsampler-ask, input, button, select, textarea)")];
    const shown = parts.filter((p) => p.checkVisibility() && p.getBoundingClientRect().width > 0)
        .map((p) => [p, p.getBoundingClientRect()]);
    const right = document.getElementById("batch_unsampler").getBoundingClientRect().right;
    const told = shown.filter(([, r]) => r.right > right + 1).map(([p]) => `cut: ${p.outerHTML.slice(0, 90)}`);
    for (const [one, a] of shown) for (const [other, b] of shown) {
        if (one === other || one.contains(other) || other.contains(one)) continue;
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 2 && down > 4) told.push(`${one.outerHTML.slice(0, 90)} over ${other.outerHTML.slice(0, 90)}`);
    }
    return told;
}"""


@pytest.mark.parametrize("width", [1280, 700, 400])
def test_no_line_overlaps_and_nothing_is_cut(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    for mode in ("noise", "invert", "replay"):
        put(page, "mode", mode)
        page.wait_for_timeout(300)
        assert page.evaluate(OVERLAPS) == [], mode
    page.locator(".batch-unsampler-fold").click()
    page.wait_for_timeout(300)
    assert page.evaluate(OVERLAPS) == []
    page.set_viewport_size({"width": 1280, "height": 1000})


def test_the_accordion_is_not_tall(page: Any) -> None:
    low = "() => document.getElementById('batch_unsampler').getBoundingClientRect().height <= 420"
    page.wait_for_function(low, timeout=5000)  # once the window has its width again
