"""Sentences with slots: a template both writes a text and recognises it."""

import re
from collections.abc import Iterable, Mapping, Sequence

_SLOT = re.compile(r"\{(\w+)\}")


def slots(template: str) -> tuple[str, ...]:
  """Returns the names of a template's slots, each once, in the order of first use."""
  return tuple(dict.fromkeys(_SLOT.findall(template)))


def choice(words: Iterable[str]) -> str:
  """Returns a regular expression for any one of `words`."""
  return "|".join(re.escape(word) for word in words)


def pattern(template: str, words: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
  """Compiles a template to an expression whose full match has the slots' words as named groups.

  Args:
    template: text with `{slot}` marks; a slot that occurs twice must have the same word both times.
    words: the allowed words of each slot.
  """
  seen: set[str] = set()

  def group(slot: str) -> str:
    if slot in seen:
      return f"(?P={slot})"
    seen.add(slot)
    return f"(?P<{slot}>{choice(words[slot])})"

  # re.split puts the slots' names at odd places, between the pieces of plain text.
  pieces = enumerate(_SLOT.split(template))
  return re.compile("".join(group(p) if i % 2 else re.escape(p) for i, p in pieces))
