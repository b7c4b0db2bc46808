"""The command line of the benches."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module

from ..standalone.cli import Parser, explained, fail, note
from ..standalone.stopping import streams
from . import __path__


def main(args: list[str]) -> None:
    """Runs the bench that ``args`` name and prints its table or JSON; a mistake exits with status 2.

    What it is at is shown on standard error.
    """
    with streams():
        try:
            _run(args)
        except ImportError as error:
            fail(explained(error) or str(error))


def _run(args: list[str]) -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: python -m lib_unsampler.bench NAME [--json] [-h]\n\nNAME is one of: {', '.join(names)}")
        raise SystemExit(0 if args else 2)
    if args[0] not in names:
        fail(f"bench {args[0]!r} is not one of: {', '.join(names)}")
    if "torch" not in sys.modules:
        note("loading PyTorch")
    from ._report import as_json, as_text

    bench = import_module(f"{__package__}.{args[0]}")
    about = (bench.__doc__ or "").partition("\n")[0]
    parser = Parser(prog=f"python -m lib_unsampler.bench {args[0]}", description=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    bench.add_options(parser)
    options = parser.parse_args(args[1:])
    report = bench.run(options)
    print(as_json(report) if options.json else as_text(report))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
