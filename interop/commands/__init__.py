"""The commands of `randlora`, one module each: HELP, EXAMPLES, `add_arguments(parser)` and `run(options)`.

`run` prints what was found and returns the exit code: 0, or 1 where two adapters are not the same. What it raises,
`interop.cli` shows.
"""
