"""Judges by name: a run's directory or a folder of weights, openai:URL#MODEL, rule:NAME."""

from alignjax.feedback.judge import rule
from alignjax.feedback.judge.endpoint import EndpointJudge, parse_name
from alignjax.feedback.judge.judge import DEFAULT, Judge, Settings
from alignjax.feedback.judge.local import LocalJudge
from alignjax.runs.run import load


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
    return EndpointJudge(url, model, settings)
  return LocalJudge(load(name), name, settings)
