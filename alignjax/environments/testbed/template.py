"""Sentences with slots, read in both directions: one template writes a text and recognises it."""

import re
from collections.abc import Iterable, Mapping, Sequence

_SLOT = re.compile(r"\{(\w+)\}")


def slots(template: str) -> tuple[str, ...]:
  """The names of the slots of a template, each once, in the order of first use."""
  return tuple(dict.fromkeys(_SLOT.findall(template)))


def choice(words: Iterable[str]) -> str:
  """A regular expression for any one of `words`."""
  return "|".join(re.escape(word) for word in words)


def pattern(template: str, words: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
  """Compiles a template to the expression whose full match gives the slots back by name.

  Args:
    template: text with `{slot}` marks; a slot used twice must hold the same word both times.
    words: for each slot, the words that may stand in it.
  """
  seen: set[str] = set()

  def group(slot: str) -> str:
    if slot in seen:
      return f"(?P={slot})"
    seen.add(slot)
    return f"(?P<{slot}>{choice(words[slot])})"

  # re.split puts the slots' names at the odd places, between the pieces of plain text
  pieces = enumerate(_SLOT.split(template))
  return re.compile("".join(group(p) if i % 2 else re.escape(p) for i, p in pieces))
