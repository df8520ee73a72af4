"""`alignjax` that takes every completion for one that ended by itself: those of six steps of training hardly ever do.

python -m tests.all_end best-of --workdir ...
"""

import sys

from alignjax import cli
from alignjax.errors import exit_status
from alignjax.system import hosts
from tests import smoke

if __name__ == "__main__":
  with smoke.all_end():
    sys.exit(exit_status(lambda argv: hosts.run(lambda: cli.main(argv)), sys.argv[1:]))
