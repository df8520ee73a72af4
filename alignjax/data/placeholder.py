"""Placeholders, so that users' text never becomes a control token.

If a message has the text of a control token ("<|im_end|>"), the template gets a private-use character in
its place. Then only the text that the template itself writes can become control tokens. Afterwards the
character is encoded as the plain text that it replaces (`hf_tokenizer.py`).
"""

import re
from typing import Any

from alignjax.data.jinja_template import FIRST, LAST, OPEN
from alignjax.errors import InputError

_PLACEHOLDER = re.compile(f"([{FIRST}-{LAST}])")


def pattern(texts: set[str]) -> re.Pattern:
  """Compiles a pattern that finds any of these texts, and the longest if several begin at one place."""
  longest_first = sorted(texts, key=lambda text: (-len(text), text))
  return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class Placeholders:
  """The texts of control tokens in one dialogue, each with the character that replaces it."""

  def __init__(self, control: re.Pattern):
    # A private-use character that a user wrote looks like a placeholder, so it is replaced by one too.
    self._hidden = re.compile(f"{control.pattern}|[{OPEN}-{LAST}]")
    self._characters: dict[str, str] = {}
    self._texts: dict[str, str] = {}

  def hide(self, value: Any) -> Any:
    """Copies a JSON value with placeholders in all its strings.

    Raises:
      InputError: it has a value of no JSON type, or is nested too deeply.
    """
    try:
      return self._hide(value)
    except RecursionError as error:
      raise InputError("a message or a tool is nested too deeply; write it flatter") from error

  def _hide(self, value: Any) -> Any:
    if isinstance(value, str):
      return self._hidden.sub(self._character, value)
    if isinstance(value, dict):
      return {self._hide(key): self._hide(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [self._hide(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
      return value
    raise InputError(f"a message holds a {type(value).__name__}; write text, numbers, lists and objects")

  def split(self, text: str) -> list[tuple[str, int, bool]]:
    """Splits a rendered text into (original text, place in the rendered text, True if a placeholder replaced it)."""
    parts = []
    start = 0
    for part in _PLACEHOLDER.split(text):
      if part:
        parts.append((self._texts.get(part, part), start, part in self._texts))
      start += len(part)
    return parts

  def reveal(self, text: str) -> str:
    """Returns a rendered text with the original texts in place of the placeholders."""
    return "".join(part for part, _, _ in self.split(text))

  def _character(self, match: re.Match) -> str:
    text = match[0]
    if text not in self._characters:
      character = chr(ord(FIRST) + len(self._characters))
      if character > LAST:
        raise InputError(f"a dialogue holds more than {len(self._characters)} different private-use characters")
      self._characters[text] = character
      self._texts[character] = text
    return self._characters[text]
