"""The one record of a comparison, whoever made it: a person, a model or a rule.

A line of JSON:

  prompt        a string, or messages
  completions   two or more texts in the order shown
  verdict       "first", "second", ... (the place of the better one), "tie", or null: no verdict could be had
  strength      1 to 3, how much better; null for ties, null verdicts, and where it is not known
  annotator     who compared
  id            of the record whose completions were compared; "" if it has none
  placement     the number, from 0, that each shown completion has in that record; null if it is not known
  rubric        {"name", "version", "hash"}, or null
  seconds       that a person took; null for others, whose time is of no use and differs when work is done again
  gold          the true verdict, in the order shown, where it is known
  raw           what a model answered, word for word
  logps         nats of each label of the verdict, where a model gives them

Other fields are kept, in `more`. A null verdict is never a tie and never a win; it is counted.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from alignjax.data.field import Dialogue, as_dialogue, listed, plain, required, text
from alignjax.data.format import placed
from alignjax.data.source import Record, open_source
from alignjax.errors import InputError
from alignjax.system.ranges import Count, NonNegative, check

TIE = "tie"
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
MOST_NULL = 0.02  # share of null verdicts above which the work of an annotator counts as failed
_STRENGTHS = (1, 2, 3)


class RubricName(NamedTuple):
  """What a verdict was made by: a rubric's name, its version, and the hash of its content."""

  name: str
  version: int
  hash: str


@dataclass(frozen=True)
class Comparison:
  """A verdict on completions of one prompt; the attributes are the fields of the module's table."""

  prompt: Dialogue
  completions: tuple[str, ...]
  verdict: str | None
  annotator: str
  strength: int | None = None
  id: str = ""
  placement: tuple[int, ...] | None = None
  rubric: RubricName | None = None
  seconds: float | None = None
  gold: str | None = None
  raw: str | None = None
  logps: Mapping[str, float] | None = None
  more: Mapping[str, Any] = field(default_factory=dict)

  @property
  def winner(self) -> int | None:
    """The place of the better completion, from 0; None for a tie and for no verdict."""
    return place(self.verdict)

  def record(self) -> dict[str, Any]:
    """Returns the record as JSON, every field of the table in its order, then the others."""
    rubric = None
    if self.rubric:
      rubric = self.rubric._asdict()
    placement = None
    if self.placement is not None:
      placement = list(self.placement)
    return {
      "prompt": plain(self.prompt),
      "completions": list(self.completions),
      "verdict": self.verdict,
      "strength": self.strength,
      "annotator": self.annotator,
      "id": self.id,
      "placement": placement,
      "rubric": rubric,
      "seconds": self.seconds,
      "gold": self.gold,
      "raw": self.raw,
      "logps": None if self.logps is None else dict(self.logps),
      **self.more,
    }


def place(verdict: str | None) -> int | None:
  """Returns the place, from 0, that a verdict names; None for a tie and for no verdict."""
  if verdict is None or verdict == TIE:
    return None
  return PLACES.index(verdict)


def read(path: str) -> list[Comparison]:
  """Reads the comparisons of a file.

  Raises:
    InputError: a record is none; the message names file, line and field.
  """
  source = open_source(path)
  return [placed(source, i, parse) for i in range(len(source))]


def shown_order(seed: int, prompt: Dialogue, completions: Sequence[str]) -> tuple[int, ...]:
  """Draws the order in which completions are shown: the number, from 0, of the completion at each place.

  It depends on the seed and the texts alone, not on the order of a file's records. A record keeps it as "placement".
  """
  drawn = hashlib.sha256(json.dumps([seed, prompt, list(completions)]).encode()).digest()
  rng = np.random.default_rng(int.from_bytes(drawn[:8], "big"))
  return tuple(int(number) for number in rng.permutation(len(completions)))


class Unit(NamedTuple):
  """What annotators may agree on: a prompt with its completions, in whatever order these were shown.

  Attributes:
    first: its first comparison, in whose order of completions the verdicts are.
    verdicts: of each annotator, those that were given: the number of the better completion, or TIE or None.
    gold: the same of the true verdict; None where it is not known.
  """

  first: Comparison
  verdicts: dict[str, list[int | str | None]]
  gold: int | str | None


def units(comparisons: Iterable[Comparison]) -> list[Unit]:
  """Groups comparisons of one record: of the same id and completions; in the order in which these come first.

  Raises:
    InputError: a comparison is of two equal completions, whose places cannot be told apart.
  """
  found: dict[str, Unit] = {}
  for one in comparisons:
    texts = sorted(one.completions)
    if len(set(texts)) < len(texts):
      raise InputError(
        f"record {one.id or one.prompt[-1]['content'][:60]!r}: two of its completions are equal; drop it"
      )
    key = json.dumps([one.id, one.prompt, texts])
    unit = found.setdefault(key, Unit(one, {}, None))
    order = unit.first.completions
    unit.verdicts.setdefault(one.annotator, []).append(_number(one, one.verdict, order))
    if unit.gold is None and one.gold is not None:
      found[key] = unit._replace(gold=_number(one, one.gold, order))
  return list(found.values())


def _number(one: Comparison, verdict: str | None, order: Sequence[str]) -> int | str | None:
  """Returns which of the completions in `order` a verdict of `one` is for; TIE and None as they are."""
  winner = place(verdict)
  if winner is None:
    return verdict
  return order.index(one.completions[winner])


_FIELDS = (
  *("prompt", "completions", "verdict", "strength", "annotator", "id", "placement", "rubric", "seconds", "gold"),
  *("raw", "logps"),
)


def parse(record: Record) -> Comparison:
  """Reads a record as a comparison.

  Raises:
    InputError: a field is missing or not as the module's table has it.
  """
  prompt = as_dialogue(required(record, "prompt"), "prompt", "user")
  completions = tuple(text(one, f"completions[{i}]") for i, one in enumerate(listed(record, "completions")))
  if not 2 <= len(completions) <= len(PLACES):
    raise InputError(f"field 'completions' holds {len(completions)}; a comparison is of 2 to {len(PLACES)}")
  if "verdict" not in record:
    raise InputError(f"field 'verdict' is missing; write {_allowed(completions)}")
  verdict = _verdict(record["verdict"], "verdict", completions)
  strength = record.get("strength")
  if strength is not None and (isinstance(strength, bool) or strength not in _STRENGTHS or place(verdict) is None):
    raise InputError(f"field 'strength' is {strength!r}; a verdict for one completion has 1, 2 or 3, another has null")
  seconds = record.get("seconds")
  if seconds is not None:
    check("field 'seconds'", seconds, NonNegative)
  return Comparison(
    prompt=prompt,
    completions=completions,
    verdict=verdict,
    annotator=text(required(record, "annotator"), "annotator"),
    strength=strength,
    id=_id(record),
    placement=_placement(record.get("placement"), completions),
    rubric=_rubric(record.get("rubric")),
    seconds=seconds,
    gold=_verdict(record.get("gold"), "gold", completions),
    raw=None if record.get("raw") is None else text(record["raw"], "raw"),
    logps=_logps(record.get("logps")),
    more={name: value for name, value in record.items() if name not in _FIELDS},
  )


def _id(record: Record) -> str:
  """Returns the field "id" as text; "" if there is none."""
  value = record.get("id")
  if value is None:
    return ""
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return text(value, "id")


def _allowed(completions: Sequence[str]) -> str:
  places = ", ".join(f'"{name}"' for name in PLACES[: len(completions)])
  return f'{places}, "{TIE}" or null'


def _verdict(value: Any, name: str, completions: Sequence[str]) -> str | None:
  if value is None or value == TIE:
    return value
  if not isinstance(value, str) or value not in PLACES[: len(completions)]:
    raise InputError(f"field '{name}' is {value!r}; write {_allowed(completions)}")
  return value


def _placement(value: Any, completions: Sequence[str]) -> tuple[int, ...] | None:
  if value is None:
    return None
  numbers = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
  if not numbers or len(value) != len(completions) or len(set(value)) != len(value) or min(value) < 0:
    raise InputError(f"field 'placement' is {value!r}; write the number, from 0, of each completion in its record")
  return tuple(value)


def _rubric(value: Any) -> RubricName | None:
  if value is None:
    return None
  if not isinstance(value, Mapping):
    raise InputError(f'field \'rubric\' is {value!r}; write {{"name", "version", "hash"}}')
  check("field 'rubric.version'", required(dict(value), "version", "rubric"), Count)
  name = text(required(dict(value), "name", "rubric"), "rubric.name")
  return RubricName(name, value["version"], text(required(dict(value), "hash", "rubric"), "rubric.hash"))


def _logps(value: Any) -> dict[str, float] | None:
  if value is None:
    return None
  is_table = isinstance(value, Mapping) and all(
    isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value.values()
  )
  if not is_table:
    raise InputError(f"field 'logps' is {value!r:.80}; write the nats of each label")
  return dict(value)
