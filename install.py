"""Batch Unsampler's two commands; with no argument (how the WebUI calls it) it does nothing.

    python install.py demo [PICTURE]   a noise progression, the picture back from its noises, and an edit of it
    python install.py test [ARGS]      run the tests

Both use a private environment, .venv beside this file, made on first use.
"""

import sys

HELP = """
demo   unsamples PICTURE (default: the bundled cat) and leaves in outputs/demo: the moving noise progression, the
       same picture sampled back from its own noises, and an edit of it by a prompt. No WebUI, no model, no download
       but the packages.
test   runs the tests, on every core; with arguments, pytest with those.

Both use a private environment, .venv beside this file, made on first use (a few minutes, PyTorch is large)."""
USAGE = "usage: python install.py demo [PICTURE] | python install.py test [PYTEST ARGUMENTS]"
OLDEST, NEWEST = (3, 10), (3, 12)
ON_ALL_CORES = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
"""The whole suite's arguments: tests that are chosen may be live ones, which share one WebUI and go in turn."""


def check_platform():
    """Says clearly where the private environment cannot be made."""
    import platform
    import struct

    here = sys.version_info[:2]
    if not OLDEST <= here <= NEWEST:
        sys.exit(
            f"Batch Unsampler's demo and tests need Python 3.10 to 3.12; this is {platform.python_version()}. "
            "Run them with another one, e.g. python3.11 install.py demo"
        )
    machine = platform.machine().lower()
    if struct.calcsize("P") != 8 or (sys.platform == "darwin" and machine == "x86_64"):
        sys.exit(f"PyTorch has no current build for {sys.platform} on {machine} ({struct.calcsize('P') * 8} bit).")
    if sys.platform.startswith("linux") and platform.libc_ver()[0] != "glibc":
        sys.exit("PyTorch has no build for a Linux without glibc (Alpine and other musl systems).")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            "This Python cannot make virtual environments (ensurepip is missing). "
            "On Debian and Ubuntu: sudo apt install python3-venv"
        )


def pins(root, groups):
    """The pinned requirements of pyproject.toml's dependency groups."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)["dependency-groups"]
    return [requirement for group in groups for requirement in table[group]]


def made_by_this_python(folder):
    """Whether an environment's Python is the one that runs this: then only packages are added to it."""
    try:
        lines = (folder / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    version = ".".join(map(str, sys.version_info[:3]))
    return any(line.replace(" ", "") == "version=" + version for line in lines)


COMES = (
    r"(?:Downloading|Using cached|Processing) (?:\S*[/\\])?([^-\s]+)-([^-\s]+?)(?:-|\.tar)\S*?(?<!\.metadata)(?: \(|$)"
)
"""A line of pip's for a package that comes: its name and version; its size may follow."""


def fetch(python, wanted):
    """Pip install, told in one line for each package that comes, and at length where it fails; returns its status."""
    import re
    import subprocess

    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *wanted]
    said = []
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, encoding="utf-8", errors="replace", **streams) as pip:
        for line in pip.stdout:
            said.append(line)
            package = re.match(COMES, line.strip())
            if package:
                size = re.search(r"\(\d[\d.]* [kMG]?B\)", line)
                print(" ", *package.groups(), size[0] if size else "", flush=True)
            elif line.startswith("Installing "):
                print("  unpacking", flush=True)
    if pip.returncode:
        print("".join(said[-20:]), end="", file=sys.stderr)
    return pip.returncode


def environment(root, groups):
    """The Python of .venv, with the pinned packages of the groups; made or completed if need be."""
    import hashlib
    import os
    import venv

    folder = root / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, alone = pins(root, groups), pins(root, ["alone"])
    mark = hashlib.sha256("\n".join([sys.version, *wanted, *alone]).encode()).hexdigest()
    stamp = folder / f"installed-{'-'.join(groups)}"
    if stamp.is_file() and stamp.read_text() == mark and python.exists():
        return python
    print(f"Making {folder} (first time: a few minutes; PyTorch is a large download)", flush=True)
    listed = folder / "requirements.txt"
    try:
        if not (python.exists() and any(folder.glob("installed-*")) and made_by_this_python(folder)):
            venv.create(folder, with_pip=True, clear=True, symlinks=os.name != "nt")
        listed.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    except OSError as error:
        sys.exit(f"{folder} cannot be made: {error}. End what still runs from it, and run this again.")
    if fetch(python, ["-r", str(listed)]) or fetch(python, ["--no-deps", *alone]):
        sys.exit(
            "Installing failed; pip says why above. Nothing outside .venv was touched: mend it and run this again."
        )
    stamp.write_text(mark)
    return python


SUMMARY = (
    ("progression.gif", "the picture dissolving into noise, level by level"),
    ("same.png", "the same picture again, bit for bit, sampled back from its own noises (mode replay)"),
    ("sunset.png", "the same noises under another prompt, 'sunset': an edit that keeps every hair"),
    ("contact_sheet.png", "every noise level on one page, with its sigma"),
    ("sigma_curve.png", "the noise schedule"),
    ("frames", "every level as a picture of its own"),
    ("replay.safetensors", "the noises: go on from them with --resume"),
)
"""What the demo leaves in outputs/demo, and what each is."""


def demo_commands(python, picture, out):
    """The demo as the command lines it is made of."""
    run = [str(python), "-m", "lib_unsampler"]
    noises = str(out / "replay.safetensors")
    return [
        [
            *(*run, str(picture), "--steps", "24", "-o", str(out / "progression.gif")),
            *("--sheet", str(out / "contact_sheet.png"), "--curve", str(out / "sigma_curve.png")),
            *("--frames", str(out / "frames")),
        ],
        [
            *(*run, str(picture), "--mode", "replay", "--sampler", "euler_ancestral"),
            *("--latents", noises, "--resample", str(out / "same.png")),
        ],
        [*run, "--resume", noises, "--resample", str(out / "sunset.png"), "--resample-positive", "sunset"],
    ]


def demo(root, picture):
    """Unsamples a picture, gets it back from its noises, and edits it; the results are in outputs/demo."""
    import subprocess

    out = root / "outputs" / "demo"
    for command in demo_commands(environment(root, ["demo"]), picture, out):
        print("$ python", *command[1:], flush=True)
        status = subprocess.call(command, cwd=root, stdout=subprocess.DEVNULL)
        if status:
            return status
    print(f"\nMade of {picture}, in {out}:")
    for name, text in SUMMARY:
        print(f"  {name:20} {text}")
    return 0


def main(arguments):
    if not arguments:
        return 0
    from pathlib import Path

    root = Path(__file__).resolve().parent
    if arguments[0] == "demo" and set(arguments[1:]) & {"-h", "--help"}:
        print(USAGE)
        print(HELP)
        return 0
    if arguments[0] == "demo" and len(arguments) <= 2:
        picture = Path(arguments[1]).resolve() if len(arguments) == 2 else root / "lib_unsampler/assets/cat.jpg"
        if not picture.is_file():
            print(f"install.py: {picture}: no such picture", file=sys.stderr)
            return 2
        check_platform()
        return demo(root, picture)
    if arguments[0] == "test":
        import subprocess

        check_platform()
        python = environment(root, ["demo", "test"])
        return subprocess.call([str(python), "-m", "pytest", *(arguments[1:] or ON_ALL_CORES)], cwd=root)
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
