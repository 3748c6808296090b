"""The command `fused-merge`.

What scripts may rely on:

- Exit codes: 0, done; 1, bad input or a failure, with one sentence on standard error; 2, wrong usage, with the usage on
  standard error; 130, interrupted (Ctrl-C). A reader of standard output that goes away (`| head`) is no failure.
- Standard output holds results, standard error everything else: sentences, warnings and, on a terminal, the progress
  bar. `--quiet` leaves out the bar and the results, and never an error.
- With `--json`, standard output is exactly one JSON document, whenever the exit code is 0, 1 or 130: the result, or
  `{"error": "the sentence"}` beside the same sentence on standard error. Wrong usage prints none.
- No error shows a traceback unless `--debug` asks for it.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from fused_merge.cli.commands import app
    except ModuleNotFoundError as error:
        print(f"fused-merge needs {str(error.name).partition('.')[0]}: pip install 'fused_merge[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app()
