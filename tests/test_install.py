"""install.py: inside the WebUI it does nothing, at once; elsewhere it says clearly what is missing."""

from __future__ import annotations

import ast
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import install

ROOT = Path(install.__file__).resolve().parent
PINNED = re.compile(r"^[A-Za-z0-9._-]+(\[[a-z,]+\])?==[0-9][A-Za-z0-9.+!]*(; .+)?$")
GROUPS = ("demo", "alone", "test")


def refusal(platform: Callable[[], Any]) -> str:
    with pytest.raises(SystemExit) as caught:
        platform()
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def test_with_no_argument_it_imports_nothing_and_is_done() -> None:
    """As the WebUI runs it: the modules that could install or reach the network are never loaded."""
    program = (
        "import sys, runpy; sys.argv = ['install.py']; before = set(sys.modules)\n"
        "try: runpy.run_path('install.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, *sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    code, *loaded = done.stdout.split()
    assert code == "0" and done.stderr == ""
    assert not {"venv", "pip", "subprocess", "urllib", "socket", "platform", "torch", "pathlib"} & set(loaded)


def test_only_sys_is_imported_at_the_top() -> None:
    tree = ast.parse((ROOT / "install.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [alias.name for node in top for alias in node.names] == ["sys"]
    assert install.main([]) == 0


@pytest.mark.parametrize("arguments", [["demos"], ["--help"], [""], ["demo", "a.png", "b.png"]], ids=str)
def test_unknown_arguments_get_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(arguments) == 2
    assert capsys.readouterr().err == install.USAGE + "\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_demo_has_a_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["demo", word]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(install.USAGE) and "outputs/demo" in said.out and said.err == ""


def test_a_missing_picture_is_said_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "environment", lambda *_: pytest.fail("made an environment"))
    assert install.main(["demo", str(tmp_path / "no.png")]) == 2
    assert capsys.readouterr().err == f"install.py: {tmp_path / 'no.png'}: no such picture\n"


@pytest.mark.parametrize("version", [(3, 9), (3, 13), (3, 14), (2, 7)], ids=str)
def test_a_wrong_python_is_said(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    assert "need Python 3.10 to 3.12; this is " in refusal(install.check_platform)


@pytest.mark.parametrize("module", ["ensurepip", "venv"])
def test_a_missing_ensurepip_is_said(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 0, "final", 0))
    monkeypatch.setitem(sys.modules, module, None)
    said = refusal(install.check_platform)
    assert "ensurepip is missing" in said and "apt install python3-venv" in said


@pytest.mark.parametrize(
    ("system", "machine", "bits", "libc", "said"),
    [
        ("win32", "x86", 4, "", "no current build for win32 on x86 (32 bit)"),
        ("darwin", "x86_64", 8, "", "no current build for darwin on x86_64"),
        ("linux", "x86_64", 8, "musl", "without glibc"),
    ],
)
def test_an_unsupported_platform_is_said(
    system: str, machine: str, bits: int, libc: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 0, "final", 0))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(struct, "calcsize", lambda _: bits)
    assert said in refusal(install.check_platform)


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)], ids=str)
def test_supported_pythons_pass(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.35"))
    assert install.check_platform() is None


def test_every_requirement_is_pinned_exactly() -> None:
    wanted = install.pins(ROOT, GROUPS)
    assert [r for r in wanted if not PINNED.match(r)] == []
    assert install.pins(ROOT, ["demo"]) == wanted[: len(install.pins(ROOT, ["demo"]))]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_each_python_gets_one_version_of_each_package(python: str, system: str) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    parsed = [requirements.Requirement(r) for r in install.pins(ROOT, GROUPS)]
    here = {"python_version": python, "sys_platform": system}
    names = [r.name.lower() for r in parsed if r.marker is None or r.marker.evaluate(here)]
    assert sorted(names) == sorted(set(names))
    assert {"torch", "k-diffusion", "pillow", "safetensors", "pytest", "hypothesis"} <= set(names)


def test_a_failing_pip_is_said_and_not_taken_for_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """venv and pip are replaced, not the code under test: no network in the tests."""
    (tmp_path / "pyproject.toml").write_text('[dependency-groups]\ndemo = ["nothing==1.0"]\nalone = ["bare==2.0"]\n')
    monkeypatch.setattr("venv.create", lambda folder, **_: folder.mkdir(exist_ok=True))
    calls: list[list[str]] = []
    monkeypatch.setattr(install, "fetch", lambda _, wanted: calls.append(wanted) or 1)
    for _ in range(2):
        assert "Installing failed" in refusal(lambda: install.environment(tmp_path, ["demo"]))
    assert len(calls) == 2 and not list((tmp_path / ".venv").glob("installed-*"))


def test_a_made_environment_is_used_again_until_the_pins_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[dependency-groups]\ndemo = ["nothing==1.0"]\nalone = ["bare==2.0"]\n')

    def create(folder: Path, **_: Any) -> None:
        for name in ("bin/python", "Scripts/python.exe"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    calls: list[list[str]] = []
    monkeypatch.setattr("venv.create", create)
    monkeypatch.setattr(install, "fetch", lambda _, wanted: calls.append(wanted) or 0)
    first = install.environment(tmp_path, ["demo"])
    assert first.exists() and install.environment(tmp_path, ["demo"]) == first
    (_, listed), bare = calls
    assert Path(listed).read_text() == "nothing==1.0\n" and bare == ["--no-deps", "bare==2.0"]
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("venv.create", lambda folder, **options: made.append(options))
    version = ".".join(map(str, sys.version_info[:3]))
    (tmp_path / ".venv" / "pyvenv.cfg").write_text(f"home = /usr\nversion = {version}\n")
    project.write_text('[dependency-groups]\ndemo = ["nothing==1.1"]\nalone = ["bare==2.0"]\n')
    install.environment(tmp_path, ["demo"])
    assert len(calls) == 4
    assert made == []  # its Python may be running: writing over that is "Text file busy"
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("home = /usr\nversion = 3.9.1\n")
    project.write_text('[dependency-groups]\ndemo = ["nothing==1.2"]\nalone = ["bare==2.0"]\n')
    install.environment(tmp_path, ["demo"])
    assert len(made) == 1 and made[0]["clear"]


def wheel(folder: Path, name: str, wanted: str = "") -> str:
    """A package with nothing in it, as pip takes it."""
    path, about = folder / f"{name}-1.5-py3-none-any.whl", f"{name}-1.5.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        needs = f"Requires-Dist: {wanted}\n" if wanted else ""
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n{needs}")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return str(path)


def test_pip_says_one_line_a_package_and_all_where_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real pip, without its index."""
    packages = [wheel(tmp_path, "first"), wheel(tmp_path, "second", "first"), wheel(tmp_path, "third", "nowhere==1.0")]
    alone = ["--no-index", "--target", str(tmp_path / "made")]
    assert install.fetch(sys.executable, [*alone, *packages[:2]]) == 0
    said = capsys.readouterr()
    assert [line.split() for line in said.out.splitlines()] == [["first", "1.5"], ["second", "1.5"], ["unpacking"]]
    assert said.err == ""
    assert install.fetch(sys.executable, [*alone, packages[2]]) != 0
    assert "No matching distribution found for nowhere==1.0" in capsys.readouterr().err


def test_what_pip_says_of_a_download_is_its_name_version_and_size() -> None:
    """pip's own lines, of versions 23 and 26."""
    told = {
        "Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl (906.4 MB)": ("torch", "2.14.1"),
        "Using cached k_diffusion-0.1.1.post1-py3-none-any.whl (33 kB)": ("k_diffusion", "0.1.1.post1"),
        "Downloading pytz-2026.6.tar.gz (320 kB)": ("pytz", "2026.6"),
        "Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)": None,
        "Collecting torch==2.14.1": None,
    }
    for line, wanted in told.items():
        found = re.match(install.COMES, line)
        assert (found and found.groups()) == wanted, line


def test_an_environment_in_use_that_cannot_be_made_anew_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text('[dependency-groups]\ndemo = ["nothing==1.0"]\nalone = ["bare==2.0"]\n')

    def busy(folder: Path, **_: Any) -> None:
        raise OSError(26, "Text file busy", str(folder))

    monkeypatch.setattr("venv.create", busy)
    said = refusal(lambda: install.environment(tmp_path, ["demo"]))
    assert "Text file busy" in said and "End what still runs from it" in said


def test_the_demo_shows_the_progression_the_same_picture_and_an_edit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own commands, run here by this Python: every file that the summary names is there and is what it says."""
    image = pytest.importorskip("PIL.Image")
    cat = ROOT / "lib_unsampler/assets/cat.jpg"
    monkeypatch.setattr(install, "environment", lambda *_: sys.executable)
    (tmp_path / "lib_unsampler").symlink_to(ROOT / "lib_unsampler", target_is_directory=True)
    assert install.demo(tmp_path, cat) == 0
    out, said = tmp_path / "outputs" / "demo", capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {name for name, _ in install.SUMMARY}
    assert all(re.search(rf"^  {re.escape(name)} +{re.escape(text)}$", said, re.M) for name, text in install.SUMMARY)
    source, same, edit = (image.open(path).convert("RGB") for path in (cat, out / "same.png", out / "sunset.png"))
    assert same.tobytes() == source.tobytes()
    edges = [picture.convert("L").resize((80, 60)) for picture in (source, edit)]
    one, other = (list(picture.tobytes()) for picture in edges)
    assert correlation(one, other) > 0.5 and edit.tobytes() != source.tobytes()  # recognisable, and changed
    assert image.open(out / "progression.gif").n_frames == 25


def correlation(one: list[int], other: list[int]) -> float:
    means = [sum(values) / len(values) for values in (one, other)]
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(one, other))
    squares = [sum((v - mean) ** 2 for v in values) for values, mean in zip((one, other), means)]
    return products / (squares[0] * squares[1]) ** 0.5
