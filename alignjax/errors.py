"""The one error that a user's input can cause, and how a command reports it."""

import sys
from collections.abc import Callable, Sequence


class InputError(ValueError):
  """What is wrong, where (file, line, field) and the remedy, in one line.

  The command line prints it without a traceback and exits with status 2.
  """


def exit_status(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """What main(argv) returns; 2 after one line on standard error where the input is at fault."""
  try:
    return main(argv)
  except InputError as error:
    print(f"alignjax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
