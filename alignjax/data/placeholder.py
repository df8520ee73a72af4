"""What users write never becomes a control token.

Wherever a message holds the text of one ("<|im_end|>"), a template gets a private-use character in
its place. What the template writes itself is then all that can be read as control tokens; the
character is spelled out as plain text afterwards (`hf_tokenizer.py`).
"""

import re
from typing import Any

from alignjax.data.jinja_template import FIRST, LAST, OPEN
from alignjax.errors import InputError

_PLACEHOLDER = re.compile(f"([{FIRST}-{LAST}])")


def pattern(texts: set[str]) -> re.Pattern:
  """Finds any of these texts; of two that begin at one place, the longer."""
  longest_first = sorted(texts, key=lambda text: (-len(text), text))
  return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class Placeholders:
  """The control tokens' texts in one dialogue, each with the character that stands for it."""

  def __init__(self, control: re.Pattern):
    # A private-use character that a user wrote would be taken for one of ours: it gets another.
    self._hidden = re.compile(f"{control.pattern}|[{OPEN}-{LAST}]")
    self._characters: dict[str, str] = {}
    self._texts: dict[str, str] = {}

  def hide(self, value: Any) -> Any:
    """A copy of a JSON value with placeholders in all its strings.

    Raises:
      InputError: it holds something that JSON has not, or is nested too deeply.
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
    """The parts of a rendered text: (text, where it begins, whether it is what a user wrote for a control token)."""
    parts, start = [], 0
    for part in _PLACEHOLDER.split(text):
      if part:
        parts.append((self._texts.get(part, part), start, part in self._texts))
      start += len(part)
    return parts

  def reveal(self, text: str) -> str:
    """A rendered text as people would read it."""
    return "".join(part for part, _, _ in self.split(text))

  def _character(self, match: re.Match) -> str:
    text = match[0]
    if text not in self._characters:
      character = chr(ord(FIRST) + len(self._characters))
      if character > LAST:
        raise InputError(f"a dialogue holds more than {len(self._characters)} different private-use characters")
      self._characters[text], self._texts[character] = character, text
    return self._characters[text]
