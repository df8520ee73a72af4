"""A simulated host to which something happens, once, though all start again.

  python -m tests.one_host FOLDER BLOW:HOST:SAVE[,...] train --config ... --workdir ...

is `alignjax train`. The blows ("kill", "term": a signal to itself) fall in their order, each in one life of the pod: on
that host, when it saves for the SAVE-th time in that life. A file in FOLDER remembers each.
"""

import os
import signal
import sys
from pathlib import Path

from alignjax import cli
from alignjax.errors import exit_status
from alignjax.system import hosts
from tests.struck import struck

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


def main(folder: str, blows: str, *command: str) -> int:
  fallen = len(list(Path(folder).glob("*.fell")))
  due = [blow.split(":") for blow in blows.split(",")][fallen:][:1]
  train = lambda argv: hosts.run(lambda: cli.main(argv))
  if not due or due[0][1] != os.environ.get("JAX_PROCESS_ID"):
    return exit_status(train, command)

  def blow():
    (Path(folder) / f"{fallen}.fell").touch()
    os.kill(os.getpid(), SIGNALS[due[0][0]])
    return True  # as the save that it stands for

  with struck("save", int(due[0][2]), blow):
    return exit_status(train, command)


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
