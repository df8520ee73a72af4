"""Votes of people who compare two models on the chat page, a JSON line each in a file that only grows."""

import json
import os
import threading
from collections.abc import Collection
from typing import Annotated, Any

from alignjax.data.field import Dialogue
from alignjax.feedback.comparison import PLACES, TIE
from alignjax.serving.fields import Fields, RefusedError
from alignjax.serving.wire import read_messages
from alignjax.system import output
from alignjax.system.ranges import NonNegative, Range, Seed

VERDICTS = (*PLACES[:2], TIE)
_Strength = Annotated[int, Range(1, 3)]


def read(fields: Fields, models: Collection[str]) -> dict[str, Any]:
  """Reads a comparison: the prompt, the two completions in the order shown, and the verdict.

  Args:
    fields: of the request.
    models: names that the completions may be of.

  Raises:
    RefusedError: it names the field at fault.
  """
  prompt: Dialogue = fields.read("prompt", read_messages, [])
  completions = fields.read("completions", _texts, [])
  names = fields.read("models", _texts, [])
  if not prompt or len(completions) != 2 or len(names) != 2:
    raise RefusedError("a vote has a prompt, two completions and the names of their models", "prompt")
  if unknown := set(names) - set(models):
    raise RefusedError(f"model {min(unknown)[:80]!r} is not served here", "models")
  verdict = fields.required_text("verdict")
  strength = fields.number("strength", _Strength, None)
  if verdict not in VERDICTS or (strength is None) != (verdict == "tie"):
    raise RefusedError(
      "field 'verdict' is 'first' or 'second' with a strength from 1 to 3, or 'tie' without one", "verdict"
    )
  record = {
    "prompt": prompt,
    "completions": completions,
    "models": names,
    "verdict": verdict,
    "strength": strength,
    "annotator": fields.required_text("annotator"),
    "seconds": fields.number("seconds", NonNegative, None),
    "seed": fields.number("seed", Seed, None),
  }
  fields.done()
  return record


class Votes:
  """A file of votes. A vote is in it whole, and on the disk, when `add` returns."""

  def __init__(self, path: str):
    """Opens the file, or makes it; what a crash has left of a line that was never answered is cut off.

    Raises:
      InputError: it cannot be written.
    """
    path = os.path.expanduser(path)
    self._lock = threading.Lock()
    with output.failing(path, "--votes"):
      self._file = open(path, "ab+", buffering=0)  # noqa: SIM115
      self._file.seek(0)
      whole = self._file.read().rpartition(b"\n")[0]
      if whole:
        whole += b"\n"
      self._file.truncate(len(whole))

  def add(self, record: dict[str, Any]) -> None:
    """Appends a vote."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with self._lock:
      self._file.write(line.encode())
      os.fsync(self._file.fileno())


def _texts(value: Any, path: str) -> list[str]:
  if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
    raise RefusedError(f"field '{path}' must be a list of texts", path)
  return value
