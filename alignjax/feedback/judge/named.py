"""Judges by name: a run's directory or a folder of weights, openai:URL#MODEL, rule:NAME."""

from typing import NamedTuple

from alignjax.feedback.judge import rule
from alignjax.feedback.judge.endpoint import EndpointJudge, Limits, parse_name
from alignjax.feedback.judge.judge import Judge
from alignjax.feedback.judge.local import LocalJudge
from alignjax.runs.run import load
from alignjax.system import ranges
from alignjax.system.ranges import Count, NonNegative, Positive, Seed, Several, Whole


class Settings(NamedTuple):
  """How judges are asked; the attributes are those of `Limits`, and of `LocalJudge` where it has them.

  Attributes:
    batch_size: answers of a local judge that are scored together.
  """

  seed: Seed = 0
  temperature: NonNegative = 0.0
  max_tokens: Several = 512
  batch_size: Count = 32
  concurrency: Count = 8
  per_minute: Whole = 0
  retries: Whole = 5
  timeout: Positive = 60.0
  logprobs: bool = True

  def check(self) -> None:
    """Raises InputError if a value is out of range."""
    ranges.check_record("", self)


DEFAULT = Settings()


def check(name: str) -> None:
  """Raises InputError if a name is that of no judge, as far as this can be seen without loading a model."""
  kind, colon, rest = name.partition(":")
  if colon and kind == "rule":
    rule.find(rest)
  elif colon and kind == "openai":
    parse_name(name)


def find(name: str, settings: Settings = DEFAULT) -> Judge:
  """Returns the judge of a name; a run or folder is loaded.

  Raises:
    InputError: there is none of this name, or it is no policy.
  """
  check(name)
  if name.startswith("rule:"):
    return rule.find(name.removeprefix("rule:"))
  if name.startswith("openai:"):
    url, model = parse_name(name)
    return EndpointJudge(url, model, Limits(**{key: getattr(settings, key) for key in Limits._fields}))
  return LocalJudge(
    load(name),
    name,
    max_tokens=settings.max_tokens,
    temperature=settings.temperature,
    seed=settings.seed,
    batch_size=settings.batch_size,
  )
