"""Benchmarks: ``python -m lib_unsampler.bench NAME [--json]``.

Every module here without a leading underscore is a bench: its docstring's first line says what it
measures, ``add_options(parser)`` adds its own options, ``run(options)`` returns a :class:`._report.Report`.
"""
