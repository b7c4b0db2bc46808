"""A sample of tests/webui/test_faults.py's matrix in a running WebUI, and faults of the machine's own.

The WebUI is of this machine, and has tests/live/saboteur beside this extension: link that folder into its
``extensions`` for this test alone, since whoever may ask the server may break it by that. Run with ``-m live``. Faults
of the disk need the right to mount a file system of a few kilobytes, or are skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_faults import ERRORS, OWN_NAME, STAGES, STOPS, Stage, check_whole, words
from test_live import URL, ask, img2img, pixels

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
SMALL = {"width": 64, "height": 64, "steps": 8, "save_images": True}
HOST_S = {"the host's encoder": "modules.processing:images_tensor_to_samples"}
"""Stages that the double has under another name."""

SAMPLE = [
    *(("preferences", "exception"), ("settings", "out of memory"), ("the sampler", "exception")),
    *(("schedule, checked", "nan"), ("schedule", "bad value"), ("schedule", "wrong shape"), ("noise", "exception")),
    *(("the host's encoder", "out of memory"), ("the host's encoder", "nan"), ("the host's encoder", "wrong shape")),
    *(("noise, second draw", "out of memory"), ("noise, second draw", "wrong shape"), ("noise, second draw", "nan")),
    *(("noise, on its thread", "exception"), ("noise, on its thread", "interrupted")),
    *(("model, call 0", "exception"), ("model, call 2", "out of memory"), ("model, call 7", "exception")),
    *(("model, call 2", "nan"), ("model, call 2", "wrong shape"), ("model, call 2", "another picture")),
    *(("model, call 2", "interrupted"), ("model, call 2", "skipped"), ("model, call 7", "stopping_generation")),
    *(("model, reverse", "nan"), ("model, reverse", "skipped"), ("model, replay", "exception")),
    *(("model, replay", "wrong shape"), ("model, replay", "interrupted"), ("model, replaying", "out of memory")),
    *(("model, replaying", "skipped"), ("model, init", "out of memory"), ("model, init", "nan")),
    *(("model, init", "wrong shape"), ("model, sweep", "exception"), ("model, sweep", "interrupted")),
    *(("model, guide", "out of memory"), ("model, guide", "skipped"), ("model, film", "exception")),
    *(("model, film", "interrupted"), ("guide", "exception"), ("listening", "exception")),
    *(("the host's decoder, before a film's end", "out of memory"), ("model, init", "exception")),
    *(("the host's saving, before a film's end", "full disk"), ("the host's saving, before a film's end", "exception")),
    *(("decoder", "exception"), ("decoder", "nan"), ("decoder, later", "out of memory"), ("decoder, later", "skipped")),
    *(("decoder, later", "another picture"), ("decoder", "wrong shape"), ("caption", "exception")),
    *(("pictures, on their thread", "out of memory"), ("deflating", "out of the machine's memory")),
    *(("one save", "full disk"), ("a later save", "read-only folder"), ("the last saves", "locked folder")),
    *(("a later save", "interrupted"), ("a temporary file", "full disk"), ("a temporary file", "read-only folder")),
    *(("temporary file of latents", "full disk"), ("temporary file of a film", "full disk")),
    *(("temporary file of a sweep", "full disk"), ("sheet", "exception"), ("curve", "exception")),
    *(("report", "exception"), ("latents", "full disk"), ("ComfyUI's latents", "exception")),
    *(("moving a file", "full disk"), ("moving a later file", "read-only folder"), ("sweep's pictures", "exception")),
    *(("what is told", "odd exception"), ("handing over", "exception")),
    *((f"{form}, {part}", "full disk") for form in ("gif", "webp", "apng") for part in ("begin", "add", "finish")),
    *(("gif, encode", "exception"), ("webp, encode", "interrupted"), ("apng, encode", "out of memory")),
]


def saboteur(name: str, body: Any = None) -> Any:
    return ask(f"/saboteur/{name}", {} if body is None else body)


class Server:
    """The running WebUI: its folders, and what it was before the faults."""

    def __init__(self, folder: Path) -> None:
        self.out, self.temporary = folder / "out", folder / "temporary"
        options = {name: str(self.out) for name in ("outdir_samples", "outdir_img2img_samples")}
        saboteur("choose", {**options, "temp_dir": str(self.temporary)})
        self.kept = saboteur("mend", {"keep": 1000})["kept"]
        self.plain = pixels(img2img(**SMALL))
        saboteur("look")
        self.usual: set[str] = {"modules.progress.current_task"}
        """What changes without us; the host's API names its last task, which failed, until the next."""
        for fields in ({}, {"sampler_name": "Euler"}, {}):
            assert fields or pixels(img2img(**SMALL)) == self.plain, "a plain img2img is not repeatable"
            img2img(**SMALL, **fields)
            self.usual |= set(saboteur("look")["changed"])

    def files(self) -> set[Path]:
        return {file for folder in (self.out, self.temporary) for file in folder.rglob("*") if file.is_file()}

    def check(self, said: str, before: set[Path], failed: bool) -> None:
        """Files whole and named, nothing left on any object of the host, and its img2img as ever."""
        new = self.files() - before
        for file in new:
            assert file.suffix not in (".tmp", ".part", ".film") and not file.name.startswith("."), file
            check_whole(file)
            if failed:
                assert file.is_relative_to(self.out), f"{file} was left"
                assert OWN_NAME.fullmatch(file.name) or file.name in said, f"{file} is not named: {said}"
        seen = saboteur("look")
        changed = {name for name in seen["changed"] if not name.endswith(".__warningregistry__")}
        assert changed <= self.usual, changed - self.usual
        assert not [name for name in seen["threads"] if name.startswith("unsampler")]
        assert (seen["textinfo"], seen["job"], seen["job_count"], seen["ours"]) == (None, "", 0, [])
        told = ask("/sdapi/v1/progress")
        assert not told["textinfo"] and told["progress"] == 0
        assert pixels(img2img(**SMALL)) == self.plain


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if saboteur("mend").get("status") == 404:
        pytest.skip("the WebUI has no saboteur: see above")
    try:
        yield Server(tmp_path_factory.mktemp("server"))
    finally:
        saboteur("mend")


def asked(settings: dict[str, Any], fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A request's reply, and all that it says: of an error the whole, of a result its remarks."""
    reply = img2img(settings, **{**SMALL, "sampler_name": "Euler", **fields})
    if "images" not in reply:
        return reply, json.dumps(reply, ensure_ascii=False)
    info = json.loads(reply["info"])
    return reply, f"{reply['params'].get('Unsampler messages')} {info.get('comments')}"


def trajectory_of(server: Server, stage: Stage) -> dict[str, Any]:
    if "trajectory" not in stage.settings:
        return stage.settings
    made = img2img({"output": ["latents"]}, **SMALL)
    return {**stage.settings, "trajectory": made["params"]["Unsampler latents names"][0]}


@pytest.mark.parametrize(("name", "fault"), SAMPLE)
def test_a_fault_is_said_and_leaves_nothing(server: Server, name: str, fault: str) -> None:
    stage = STAGES[name]
    before = server.files()
    saboteur("strike", {"place": HOST_S.get(name, stage.place), "after": stage.after, "fault": fault})
    try:
        reply, said = asked(stage.settings, stage.request)
    finally:
        calls = saboteur("mend", {"keep": server.kept})["calls"]
    assert calls > stage.after, "the fault never struck"
    failed = "images" not in reply
    if fault in ERRORS:
        assert words(fault) in said, said
        assert failed or "not whole" in said or "not shown" in said, said
    elif fault in STOPS:
        assert not failed, said
    elif failed:
        assert re.search("finite|NaN|shape|picture|frame|size", said), said
    server.check(said, before, failed)
    print(f"\n{name}: {fault}: {reply.get('status', 'made ' + str(len(reply.get('images', []))))}: {said[:400]}")


@pytest.mark.parametrize("fault", ["exception", "out of memory", "wrong shape"])
def test_a_model_s_error_in_img2img_s_own_sampling_reads_as_without_us(server: Server, fault: str) -> None:
    stage, said = STAGES["model, init"], []
    for settings in (None, {"output": ["init"]}):
        saboteur("strike", {"place": stage.place, "after": stage.after, "fault": fault})
        try:
            said.append(img2img(settings, **SMALL))
        finally:
            saboteur("mend", {"keep": server.kept})
    assert "images" not in said[0] and said[0] == said[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a file system of so many kilobytes, with these options."""
    mounted: list[Path] = []

    def mount(size: int, *options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}k", *options]), "none", str(folder)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no right to mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


ALL = {"output": ["frames", "animation", "contact sheet", "latents", "init"]}
MOVING = {"output": ["animation"], "reverse": True}
OUT, TEMPORARY = ("outdir_samples", "outdir_img2img_samples"), ("temp_dir",)
FULL, LOCKED = "No space left", "Read-only file system"
DISKS = {
    "a full output folder": (OUT, 4, (), ALL, FULL),
    "an output folder that fills up": (OUT, 60, (), ALL, FULL),
    "an output folder that fills up while the animation comes": (OUT, 120, (), ALL, FULL),
    "a read-only output folder": (OUT, 64, ("ro",), ALL, LOCKED),
    "a full temporary folder": (TEMPORARY, 4, (), ALL, FULL),
    "a temporary folder that fills up": (TEMPORARY, 40, (), MOVING, FULL),
    "a full temporary folder of a film": (TEMPORARY, 4, (), {"output": ["animation", "init"], "film": "both"}, FULL),
    "a full temporary folder of a sweep": (TEMPORARY, 4, (), {"output": ["strength sweep"]}, FULL),
    "a read-only temporary folder": (TEMPORARY, 64, ("ro",), ALL, LOCKED),
}


@pytest.mark.parametrize("name", DISKS)
def test_a_real_disk_fails(server: Server, small_disk: Any, name: str) -> None:
    options, size, how, settings, expected = DISKS[name]
    before, disk = server.files(), small_disk(size, *how)
    saboteur("choose", dict.fromkeys(options, str(disk)))
    try:
        reply, said = asked(settings, {"width": 128, "height": 128})
    finally:
        saboteur("mend", {"keep": server.kept})
    failed = "images" not in reply
    assert expected in said and str(disk) in said and (failed or "not whole" in said), said
    for file in [file for file in disk.rglob("*") if file.is_file()]:
        check_whole(file)
        assert options == OUT and (OWN_NAME.fullmatch(file.name) or file.name in said), f"{file} is not named: {said}"
    server.check(said, before, failed)
    print(f"\n{name}: {reply.get('status', 'made')}: {said[:400]}")


@pytest.mark.parametrize("options", [OUT, TEMPORARY])
def test_a_file_stands_where_a_folder_should_be(server: Server, options: tuple[str, ...], tmp_path: Path) -> None:
    before, there = server.files(), tmp_path / "file"
    there.write_text("not a folder")
    saboteur("choose", dict.fromkeys(options, str(there)))
    try:
        reply, said = asked(ALL, {})
    finally:
        saboteur("mend", {"keep": server.kept})
    assert "images" not in reply and str(there) in said, said
    assert there.read_text() == "not a folder"
    server.check(said, before, failed=True)
