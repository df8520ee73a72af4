"""Numbers that other people's code has produced; the file that ALIGNJAX_GOLDEN names holds them.

A test walks whatever cases the file holds, so that another file of the same form asks it other questions.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

UNSET = "ALIGNJAX_GOLDEN names no file of reference values"


@functools.cache
def _file() -> dict[str, Any]:
  path = os.environ.get("ALIGNJAX_GOLDEN")
  return json.loads(Path(path).read_text()) if path else {}


def section(name: str) -> dict[str, Any]:
  """A section of the file; skips the test that asks where there is none."""
  if not _file():
    pytest.skip(UNSET)
  if name not in _file():
    pytest.skip(f"the golden file has no section {name!r}")
  return _file()[name]


def cases(name: str, wanted: Callable[[dict], bool]) -> list:
  """pytest parameters: the names of a section's cases whose config is wanted; a skipped one where there is no file."""
  if not _file():
    return [pytest.param("", marks=pytest.mark.skip(reason=UNSET))]
  found = _file().get(name, {}).get("cases", {})
  config = lambda case: case.get("config", {}) if isinstance(case, dict) else {}  # some are a number
  return [name for name, case in found.items() if wanted(config(case))]


def entries(name: str, fields: set[str]) -> list:
  """pytest parameters: the names of a section's entries with these fields; a skipped one where there is no file."""
  if not _file():
    return [pytest.param("", marks=pytest.mark.skip(reason=UNSET))]
  return [key for key, entry in _file().get(name, {}).items() if isinstance(entry, dict) and fields <= set(entry)]
