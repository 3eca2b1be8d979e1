"""The commands of `randlora`, one a module: HELP, EXAMPLES, `add_arguments(parser)` and `run(options)`."""
