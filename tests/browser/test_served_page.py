"""The page of ``python -m lib_unsampler serve`` in a real Chromium: the same script, form and player as the WebUI's."""

from __future__ import annotations

import io
import json
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/browser"))

from test_browser import OVERLAPS, SERIOUS, box, check_only_used_are_visible, kept, put  # noqa: E402

from lib_unsampler.core import trajectory  # noqa: E402
from lib_unsampler.standalone.serve import server, work  # noqa: E402


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with server.Server(0, work.Work(tmp_path_factory.mktemp("results"))) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
        page = context.new_page()
        page.errors, page.folder = [], served.work.folder
        page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(served.url)
        yield page
        context.close()
        served.shutdown()
        thread.join()
        served.work.close()


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The page as it was at first, with a small picture; whatever the console calls an error fails the test."""
    opened.reload()
    opened.locator("#own_size").fill("64")
    opened.locator("#own_steps").fill("8")
    opened.locator("#own_seed").fill("5")
    opened.locator("#batch_unsampler_cost").filter(has_text="9 frames \u00b7 0.9 s \u00b7 about").wait_for()
    yield opened
    errors, opened.errors[:] = list(opened.errors), []
    assert errors == []


def generate(page: Any) -> dict[str, Any]:
    """Presses Generate; what the script is told of the result."""
    page.evaluate(
        """() => document.addEventListener("batch-unsampler-result", ({detail}) => {
            document.body.dataset.result = JSON.stringify(detail);
        }, {once: true})"""
    )
    page.locator("#generate").click()
    page.locator("body[data-result]").wait_for(timeout=60000)
    told = json.loads(
        page.evaluate(
            "() => { const {result} = document.body.dataset; delete document.body.dataset.result; return result; }"
        )
    )
    page.locator("#says").filter(has_text="Done").wait_for()
    return told


def file_of(page: Any, address: str) -> Path:
    return page.folder / address.removeprefix("/results/")


def drawn_at_last(page: Any, wanted: list[float]) -> list[float]:
    """The levels drawn, when they are what is wanted or a busy machine has had its time."""
    for _ in range(100):
        if kept(page) == wanted:
            break
        page.wait_for_timeout(50)
    return kept(page)


def test_a_slider_moves_the_curve_and_it_is_what_is_made(page: Any) -> None:
    before = kept(page)
    box(page, "end_at_step").locator("input[type=range]").fill("3")
    assert drawn_at_last(page, before[:-3]) == before[:-3]
    put(page, "step_increment", 2)
    wanted = before[:-3][::-1][::2][::-1]
    assert drawn_at_last(page, wanted) == wanted
    assert wanted == generate(page)["result"]["extra_generation_params"]["Unsampler sigmas"]


CASES: list[dict[str, Any]] = [
    {"output": ["frames", "init"], "own_denoising_strength": "0.35"},
    {"steps": 13, "own_scheduler": "exponential"},
    {"own_model": "gaussian-flow"},
    {"mode": "invert", "step_increment": 3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.one_of(2)
def test_the_levels_drawn_are_those_that_are_made(page: Any, case: dict[str, Any]) -> None:
    for name, value in case.items():
        control = page.locator(f"#{name}")
        if not name.startswith("own_"):
            put(page, name, value)
        elif control.evaluate("e => e.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)
    page.wait_for_timeout(900)
    assert kept(page) == generate(page)["result"]["extra_generation_params"]["Unsampler sigmas"]


def test_only_what_the_mode_uses_is_there(page: Any) -> None:
    check_only_used_are_visible(page, [{}, {"mode": "invert"}, {"mode": "replay"}])


def test_what_would_be_refused_is_said_before_and_then(page: Any) -> None:
    put(page, "mode", "replay")
    page.locator("#batch_unsampler_mode_error").filter(has_text="adds no noise").wait_for()
    page.locator("#generate").click()
    page.locator("#says").filter(has_text="mode: sampler: 'euler' adds no noise").wait_for()
    page.locator("#own_sampler").select_option("euler_ancestral")
    page.locator("#batch_unsampler_mode_error").wait_for(state="hidden")


def test_the_gif_moves_the_player_plays_scrubs_and_compares(page: Any) -> None:
    told = generate(page)
    moving = page.locator("#gallery img").first
    with Image.open(file_of(page, moving.get_attribute("src"))) as gif:
        assert gif.is_animated and gif.n_frames == 9
    seen = {moving.screenshot() for _ in range(6) if page.wait_for_timeout(150) is None}
    assert len(seen) > 1
    player, said = page.locator("#batch_unsampler_player"), page.locator("#batch_unsampler_frame")
    scrub, texts = player.get_by_label("Frame", exact=True), []
    for number in range(9):
        scrub.fill(str(number))
        texts.append(said.text_content())
    sigmas = told["result"]["extra_generation_params"]["Unsampler sigmas"]
    assert texts == ["source, sigma 0", *(f"step {7 - i}, sigma {float(f'{s:.4g}'):g}" for i, s in enumerate(sigmas))]
    player.get_by_role("button", name="Play").click()
    page.wait_for_timeout(350)
    assert said.text_content() != texts[-1]
    player.get_by_role("button", name="Pause").click()
    player.get_by_role("button", name="Compare").click()
    player.get_by_label("Edge between source and frame").fill("25")
    assert player.locator(".batch-unsampler-source").evaluate("e => e.style.clipPath") == "inset(0px 75% 0px 0px)"


def test_everything_can_be_downloaded(page: Any) -> None:
    put(page, "output", ["frames", "animation", "latents"])
    told = generate(page)
    with page.expect_download() as film:
        page.get_by_role("button", name="Animation", exact=True).click()
    assert Path(film.value.path()).read_bytes() == file_of(page, told["images"][0]).read_bytes()
    with page.expect_download() as frames:
        page.get_by_role("button", name="Frames (zip)").click()
    with zipfile.ZipFile(frames.value.path()) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 9
        last = archive.read(archive.namelist()[-1])
        assert last == file_of(page, told["images"][-1]).read_bytes() and Image.open(io.BytesIO(last))
    with page.expect_download() as latents:
        page.get_by_role("button", name="Latents", exact=True).click()
    (name,) = told["result"]["extra_generation_params"]["Unsampler latents names"]
    assert Path(latents.value.path()).read_bytes() == (page.folder / name).read_bytes()


START: list[tuple[dict[str, Any], str, int]] = [
    ({"steps": 12, "step_increment": 2}, "euler", 4),
    ({"noise": "path"}, "euler", 3),
    ({"mode": "invert"}, "euler", 2),
    ({"mode": "replay"}, "euler_ancestral", 3),
]


@pytest.mark.parametrize(("case", "sampler", "step"), START, ids=str)
def test_the_next_generate_starts_from_the_same_z(page: Any, case: dict[str, Any], sampler: str, step: int) -> None:
    page.locator("#own_sampler").select_option(sampler)
    for name, value in case.items():
        put(page, name, value)
    put(page, "output", ["frames", "latents"])
    told = generate(page)["result"]["extra_generation_params"]
    saved = trajectory.load(page.folder / told["Unsampler latents names"][0])
    level = (saved.sigmas == saved.schedule[step]).nonzero().item()
    page.get_by_label("Frame", exact=True).fill(str(level + 1))
    assert page.locator("#batch_unsampler_frame").text_content().startswith(f"step {step},")
    page.locator("#own_seed").fill("77")
    page.get_by_role("button", name="Start from this level").click()
    page.locator(".batch-unsampler-says").filter(has_text=f"starts from step {step}").wait_for()
    page.wait_for_timeout(600)
    assert not page.locator("#batch_unsampler .batch-unsampler-error").filter(visible=True).count()
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patched:
        note_start(patched, seen)
        generate(page)
    assert torch.equal(seen[-1], saved.z[level])


def note_start(patched: pytest.MonkeyPatch, seen: list[torch.Tensor]) -> None:
    """Has k-diffusion's samplers note the x that they are started with."""
    from lib_unsampler.standalone import sampling

    original = sampling.function

    def function(sampler: str) -> Any:
        own = original(sampler)

        def noted(model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if x.numel() > 100:  # not where it is looked what a sampler asks for
                seen.append(x.clone())
            return own(model, x, *args, **kwargs)

        noted.__wrapped__ = own
        noted.__name__ = own.__name__
        return noted

    patched.setattr(sampling, "function", function)


def test_a_picture_of_one_s_own_and_a_prompt(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    Image.new("RGB", (60, 30), (200, 40, 10)).save(file)
    page.locator("#own_picture").set_input_files(str(file))
    page.wait_for_timeout(200)
    put(page, "output", ["frames", "init"])
    told = generate(page)
    with Image.open(file_of(page, told["images"][0])) as source:
        assert source.size == (60, 30) and source.convert("RGB").getpixel((9, 9)) == (200, 40, 10)
    with file.open("r+b") as opened:
        opened.truncate(33 * 2**20)
    page.locator("#own_picture").set_input_files(str(file))
    page.locator("#generate").click()
    page.locator("#says").filter(has_text="red.png is larger than 32 MB").wait_for()
    page.locator("input[name=picture][value=sea]").check(force=True)
    page.wait_for_timeout(200)
    with Image.open(file_of(page, generate(page)["images"][0])) as source:
        assert source.size == (64, 64)


def test_progress_is_shown_and_interrupt_ends_it(page: Any) -> None:
    page.locator("#own_size").fill("256")
    put(page, "mode", "invert")
    put(page, "steps", 1000)
    page.locator("#generate").click()
    page.locator("#says").filter(has_text="inverting: ").wait_for()
    assert page.locator("#progress").get_attribute("max") == "1000"
    page.locator("#interrupt").click()
    page.locator("#says").filter(has_text="Interrupted").wait_for()
    assert page.locator("#generate").is_enabled() and page.locator("#interrupt").is_disabled()


def test_no_serious_barrier(page: Any, node_tools: Path) -> None:
    """Axe's rules over the whole page, everything open, in both colour schemes."""
    page.locator(".batch-unsampler-fold").click()
    put(page, "mode", "invert")
    generate(page)
    page.get_by_role("button", name="Help: Mode", exact=True).click()
    page.evaluate((node_tools / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8"))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        found = page.evaluate("async () => (await axe.run()).violations")
        told = [(v["id"], v["help"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in SERIOUS]
        assert told == [], scheme
    page.emulate_media(color_scheme="light")


@pytest.mark.parametrize("width", [1280, 700, 400])
def test_no_line_overlaps_and_nothing_is_cut(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    whole = OVERLAPS.replace("#batch_unsampler :is(", "body :is(").replace('getElementById("batch_unsampler")', "body")
    page.locator(".batch-unsampler-fold").click()
    for mode in ("noise", "invert", "replay"):
        put(page, "mode", mode)
        page.wait_for_timeout(300)
        assert page.evaluate(whole) == [], mode
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1280, "height": 1000})
