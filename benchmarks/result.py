"""Where the numbers of the benchmarks go: one JSON per question, with what it takes to ask it again."""

import datetime
import json
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax

from alignjax.system import output, provenance

RESULTS = pathlib.Path(__file__).parent / "results"


def write(name: str, numbers: Mapping[str, Any]) -> pathlib.Path:
  """Writes results/NAME.json: the numbers, and the command, commit, versions, device and date behind them."""
  record = {
    **numbers,
    "command": shlex.join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(_short, sys.argv[1:])]),
    "commit": provenance.commit(),
    "versions": provenance.versions(),
    "device": device(),
    "date": datetime.date.today().isoformat(),
  }
  path = RESULTS / f"{name}.json"
  output.write(path, json.dumps(record, indent=2) + "\n")
  return path


def _short(argument: str) -> str:
  """An argument without the folders of an absolute path: where they lie on this machine tells nobody anything."""
  return re.sub(r"(^|=)/(?:[^/]+/)+", r"\1", argument)


def device() -> dict[str, Any]:
  """The accelerators that JAX sees, and the host's processor."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return {
    "kind": jax.devices()[0].device_kind,
    "count": jax.device_count(),
    "processor": models[0] if models else platform.processor() or platform.machine(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  }
