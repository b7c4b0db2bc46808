"""Folders of pictures, names of outputs, what is in the way of both, and how a run ends that is stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_unsampler import files
from lib_unsampler.core import trajectory
from lib_unsampler.standalone import folders, memory
from lib_unsampler.standalone.cli import main
from lib_unsampler.standalone.folders import Place

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "3")
Capture = pytest.CaptureFixture[str]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and permissions of POSIX")


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Folder runs


def test_bad_files_are_named_and_passed_over_and_the_rest_is_made(
    picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    photos, gifs = tmp_path / "photos", tmp_path / "gifs"
    photos.mkdir()
    for name in ("a.png", "z.webp", "m.tga"):
        Image.open(picture).save(photos / name)
    (photos / "bad.png").write_text("no picture")
    (photos / "cut.jpg").write_bytes((ROOT / "lib_unsampler/assets/cat.jpg").read_bytes()[:5000])
    (photos / "._a.png").write_bytes(b"\0\5\26\7")
    (photos / "sub.png").mkdir()
    (photos / "gone.png").symlink_to("nowhere")
    Image.new("RGB", (4, 4)).save(photos / "vector.eps")
    assert run(photos, "-o", f"{gifs}/", "--latents", f"{tmp_path / 'latents'}/", *SHORT) == 1
    out, err = capsys.readouterr()
    assert names(gifs) == {"a.gif", "m.gif", "z.gif"}
    assert out.split() == [
        str(tmp_path / f"{d}/{n}") for n in "amz" for d in (f"gifs/{n}.gif", f"latents/{n}.safetensors")
    ] or (sorted(out.split()) == sorted(map(str, [*gifs.iterdir(), *(tmp_path / "latents").iterdir()])))
    for name in ("bad.png", "cut.jpg", "gone.png", "._a.png", "sub.png"):
        assert any(str(photos / name) in line and "passed over" in line for line in err.splitlines()), name
    assert f"picture 1 of 6: {photos / 'a.png'}" in err and f"picture 6 of 6: {photos / 'z.webp'}" in err
    assert err.splitlines()[-1] == "unsampler: 3 of 6 pictures made, 3 passed over"
    seeds = [trajectory.load(tmp_path / f"latents/{n}.safetensors").seeds[0] for n in "amz"]
    assert seeds == [0, 4, 5]  # a picture's seed is its place, whatever becomes of the others


@pytest.mark.parametrize(("format", "magic"), [("webp", b"RIFF"), ("apng", b"\x89PNG"), ("gif", b"GIF8")])
def test_a_folder_has_the_format_that_is_asked_for(
    format: str, magic: bytes, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run(picture, picture, "-o", tmp_path / "out", "--format", format, *SHORT) == 0
    assert names(tmp_path / "out") == {f"picture.{format}", f"picture-2.{format}"}
    assert all(path.read_bytes().startswith(magic) for path in (tmp_path / "out").iterdir())
    assert capsys.readouterr().err.splitlines()[-1] == "unsampler: 2 of 2 pictures made"


def test_one_picture_goes_into_a_folder_that_is_named_so(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert run(picture, "-o", f"{tmp_path / 'new'}/", "--sheet", tmp_path / "there", *SHORT) == 0
    assert names(tmp_path / "new") == {"picture.gif"} and names(tmp_path / "there") == {"picture.png"}
    assert run(picture, "--latents", tmp_path / "saved.safetensors", *SHORT) == 0
    assert run("--resume", tmp_path / "saved.safetensors", "-o", f"{tmp_path / 'new'}/", "--format", "webp") == 0
    assert names(tmp_path / "new") == {"picture.gif", "saved.webp"}


def test_a_folder_of_bad_files_alone_makes_nothing(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("x")
    assert run(tmp_path / "in", "-o", tmp_path / "out", *SHORT) == 1
    assert capsys.readouterr().err.endswith("unsampler: 0 of 1 pictures made, 1 passed over\n")


def test_names_that_would_clash_are_numbered_whatever_their_case() -> None:
    found = folders.unique_names([Path(p) for p in ("a/x.png", "b/X.png", "b/x-2.png", "c/x.jpg", "d/y.png")])
    assert found == ["x", "X-2", "x-2-2", "x-3", "y"]


def test_thousands_of_one_name_take_no_longer_each_than_few(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        pictures = [tmp_path / str(i) / "same.png" for i in range(count)]
        begun = time.perf_counter()
        made = folders.outputs({"animation": Place(tmp_path / "out", True)}, pictures, True, None, pictures)
        assert len({paths["animation"] for paths in made}) == count
        return time.perf_counter() - begun

    seconds(100)
    assert seconds(8000) < 16 * max(0.05, min(seconds(1000) for _ in range(3)))


# Links, and files of others


def test_a_link_is_followed_and_stays(picture: Path, tmp_path: Path) -> None:
    real, link, dangling = tmp_path / "real.gif", tmp_path / "link.gif", tmp_path / "dangling.png"
    real.write_bytes(b"the old one")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "made" / "new.png")
    assert run(picture, "-o", link, "--sheet", dangling, *SHORT) == 0
    assert link.is_symlink() and real.read_bytes().startswith(b"GIF8")
    assert dangling.is_symlink() and (tmp_path / "made" / "new.png").is_file()


def test_two_names_of_one_file_are_refused(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "x.png")
    with pytest.raises(SystemExit):
        run(picture, "--sheet", tmp_path / "x.png", "--curve", tmp_path / "link.png", *SHORT)
    assert "link.png is the output of --sheet too" in capsys.readouterr().err


def test_frames_of_others_are_neither_replaced_nor_taken_away(picture: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    assert run(picture, "--frames", frames, "--steps", 6) == 0
    mine = frames / "00009_sigma_9.9999.png"
    shutil.copy(picture, mine)
    assert run(picture, "--frames", frames, *SHORT) == 0
    assert mine.read_bytes() == picture.read_bytes() and len(names(frames)) == 4 + 1


def test_a_later_target_that_cannot_be_written_is_found_first(
    picture: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's answer is played."""
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != locked)
    with pytest.raises(SystemExit):
        run(picture, "-o", tmp_path / "a.gif", "--resample", locked / "new" / "a.png", *SHORT)
    said = capsys.readouterr().err
    assert said == f"unsampler: error: --resample: {locked / 'new' / 'a.png'}: Permission denied\n"
    assert not (tmp_path / "a.gif").exists() and names(locked) == set()


# Half-written files


def test_what_a_killed_run_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    stale, other = tmp_path / f".{'0' * 32}.part", tmp_path / ".mine.part"
    for path in (stale, other):
        path.write_bytes(b"half")
    files.sweep.cache_clear()
    with files.whole(tmp_path / "a.txt") as first:
        assert not stale.exists() and other.exists()
        files.sweep.cache_clear()
        with files.whole(tmp_path / "b.txt") as second:
            assert first.exists()
            second.write_text("b")
        first.write_text("a")
    assert (tmp_path / "a.txt").read_text() == "a" and (tmp_path / "b.txt").read_text() == "b"


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lib_unsampler", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
@pytest.mark.one_of(2)
def test_a_stopped_run_leaves_nothing_half(name: str, picture: Path, tmp_path: Path, capsys: Capture) -> None:
    number, out = getattr(signal, name), tmp_path / "frames"
    process = started(picture, "-o", tmp_path / "x.gif", "--frames", out, "--steps", 10000)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(list(out.glob("0*.png"))) < 3:
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    if name == "SIGKILL":
        assert list(tmp_path.glob(".*.part"))
        assert run(picture, "-o", tmp_path / "x.gif", "--frames", out, *SHORT) == 0
    else:
        assert process.returncode == 128 + number and "Traceback" not in errors
        assert errors.splitlines()[-1].endswith("; no half-written file was left")
        assert not (tmp_path / "x.gif").exists()
    assert not list(tmp_path.rglob(".*"))


@posix
def test_a_stopped_film_keeps_what_it_has(picture: Path, tmp_path: Path) -> None:
    """Stopped while it samples: the steps until then are frames and animation, and no picture came of it."""
    gif, frames, sheet, back = (tmp_path / n for n in ("x.gif", "frames", "sheet.png", "back.png"))
    length = 600
    wanted = ("--steps", length, "--film", "both", "--frames", frames, "--sheet", sheet, "--resample", back)
    process = started(picture, "-o", gif, *wanted, "--sampler", "heun")
    errors = ""
    assert process.stderr is not None
    while not re.search(r"sampling back: +([3-9]|[1-8]\d)%", errors[-300:]):
        read = process.stderr.read(1)
        assert read, errors
        errors += read
    process.send_signal(signal.SIGINT)
    errors += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "unsampler: interrupted; the film ends where it was"
    with Image.open(gif) as moving:
        assert length + 1 + length // 50 <= moving.n_frames < 2 * length
        assert len(list(frames.iterdir())) == moving.n_frames
    assert sheet.exists() and not back.exists() and not list(tmp_path.rglob(".*"))


@posix
def test_a_film_stopped_before_it_samples_keeps_its_noising(picture: Path, tmp_path: Path) -> None:
    gif, frames = tmp_path / "x.gif", tmp_path / "frames"
    process = started(
        picture, "-o", gif, "--frames", frames, "--steps", 9000, "--film", "both", "--resample", tmp_path / "r.png"
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(list(frames.glob("0*.png"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and errors.splitlines()[-1].endswith("; the film ends where it was")
    with Image.open(gif) as moving:
        assert 3 <= moving.n_frames == len(list(frames.iterdir())) < 9000
    assert not (tmp_path / "r.png").exists()


@posix
@pytest.mark.parametrize("wait", [0, 0.15, 0.3, 0.6, 1.2])
@pytest.mark.one_of(2)
def test_ctrl_c_in_the_first_moments_is_no_traceback(wait: float, picture: Path, tmp_path: Path) -> None:
    """From the first word on: before it Python itself is starting."""
    process = started(picture, "-o", tmp_path / "x.gif", "--steps", 10000)
    assert process.stderr.readline() == "unsampler: loading PyTorch\n"
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert names(tmp_path) == {"picture.png"}


# Streams, and a Python that lacks something


@posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "2>&- >&-", "2> >(exit 0)", "> >(exit 0)"])
@pytest.mark.one_of(3)
def test_closed_streams_change_no_result(closed: str, picture: Path, tmp_path: Path) -> None:
    command = f'exec "$0" -m lib_unsampler "$1" -o "$2" --steps 3 {closed}'
    shell = ["bash", "-c", command, sys.executable, str(picture), str(tmp_path / "x.gif")]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout and "Exception" not in done.stderr
    assert Image.open(tmp_path / "x.gif").n_frames == 4


@posix
@pytest.mark.parametrize(("arguments", "status"), [("--help", 0), ("--steps=x", 2)])
def test_closed_streams_keep_the_exit_status(arguments: str, status: int) -> None:
    for closed in ("2>&-", ">&-", "> >(exit 0)", "2> >(exit 0)"):
        command = ["bash", "-c", f'exec "$0" -m lib_unsampler {arguments} {closed}', sys.executable]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and "Traceback" not in done.stderr + done.stdout


def test_a_name_that_no_encoding_has_is_printed_as_it_is(picture: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.gif"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [
        os.fsencode(sys.executable),
        b"-m",
        b"lib_unsampler",
        os.fsencode(picture),
        b"-o",
        name,
        b"--steps",
        b"2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout == name + b"\n"


@pytest.mark.parametrize("module", ["lib_unsampler", "lib_unsampler.bench"])
def test_a_python_without_torch_is_told_what_to_do(module: str, picture: Path, tmp_path: Path) -> None:
    own = ("replay",) if module.endswith("bench") else (picture, "-o", tmp_path / "x.gif")
    command = [sys.executable, "-S", "-m", module, *own]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("unsampler: error: this Python lacks what the command line needs (No module named")
    assert "python install.py demo" in last


def test_something_is_said_before_torch_is_loaded(picture: Path, tmp_path: Path) -> None:
    process = started(picture, "-o", tmp_path / "x.gif", *SHORT)
    assert process.stderr.readline() == "unsampler: loading PyTorch\n"
    process.communicate(timeout=120)


def test_an_inversion_that_does_not_fit_is_refused_before_any_work(
    picture: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda: 10**6)
    arguments = ("--mode", "invert", "--sampler", "euler", "--resample", tmp_path / "x.png", "--steps", 1000)
    with pytest.raises(SystemExit) as caught:
        run(picture, *arguments, "-o", tmp_path / "x.gif")
    assert caught.value.code == 2 and names(tmp_path) == {"picture.png"}
    assert capsys.readouterr().err == (
        "unsampler: error: out of memory: take fewer steps, a larger --step-increment or a smaller --size "
        "(the 1000 levels of an inversion take 0.0 GB, and 0.0 GB are free)\n"
    )


def test_free_memory_is_the_least_of_the_machine_s_and_the_container_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 1000000\n")
    assert memory.free() == 1_500_000


def test_running_out_of_memory_is_one_line(
    picture: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("lib_unsampler.standalone.running.record", hungry)
    arguments = ("--mode", "replay", "--sampler", "euler_ancestral", "--resample", tmp_path / "x.png", *SHORT)
    with pytest.raises(SystemExit) as caught:
        run(picture, *arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and re.match("unsampler: error: out of memory: take fewer steps", last)
