"""Rewards for the form of a completion: 1 if it has the form, 0 if not."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from functools import partial

from alignjax.errors import InputError
from alignjax.rewards.final_answer import last_boxed, marked_number, number
from alignjax.rewards.protocol import Reward
from alignjax.rewards.sandbox.isolation import isolated


def format(*, form: str = "think") -> Reward:
  """Makes a reward: 1 if a completion has a form of `FORMS`, else 0; `regex` takes any other form.

  Args:
    form: "think", "think_answer", "hashes" or "boxed".

  Raises:
    InputError: an unknown form.

  Source: DeepSeek-AI 2025, section 2.2.2 (arXiv:2501.12948).
  """
  if form not in FORMS:
    raise InputError(f"reward format has no form {form!r}; use one of {', '.join(FORMS)}, or the reward regex")
  has_form = FORMS[form]
  return lambda prompts, completions, token_ids, columns: [float(has_form(text)) for text in completions]


def regex(*, pattern: str = "", match_limit_s: float = 5.0) -> Reward:
  """Makes a reward: 1 if a completion contains a match of `pattern`, else 0.

  In the pattern, "." is any character; anchor it with \\A and \\Z. It runs in a process that is killed if a match takes
  more than `match_limit_s` seconds.

  Raises:
    InputError: the pattern is empty, as by default, or no regular expression.
  """
  if not pattern:
    raise InputError("reward regex needs a pattern, such as '\\AThe answer is [0-9]+\\.\\Z'")
  try:
    re.compile(pattern)
  except re.error as error:
    raise InputError(f"reward regex: {pattern!r} is no regular expression ({error})") from error
  return isolated(partial(_matches, pattern), match_limit_s)


def json_schema(*, schema: str = "", match_limit_s: float = 5.0) -> Reward:
  """Makes a reward: 1 if a completion, or the one ```json block in it, is JSON that fits `schema`, else 0.

  `schema` is JSON text that begins with "{", or the path of a file. It runs in a process that is killed if this takes
  more than `match_limit_s` seconds.

  Raises:
    InputError: the library jsonschema is not installed, or the schema is empty, as by default, or invalid.
  """
  if importlib.util.find_spec("jsonschema") is None:
    raise InputError("reward json_schema needs the library jsonschema: pip install 'alignjax[verify]'")
  from alignjax.rewards.schema import fits, parsed

  if not schema:
    raise InputError("reward json_schema needs a schema: JSON text, or the path of a file")
  return isolated(partial(fits, parsed(schema)), match_limit_s)


def think(text: str) -> bool:
  """Returns whether the text is <think>...</think>, opened once and at the very beginning, then anything."""
  return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text


def think_answer(text: str) -> bool:
  """Returns whether the text is <think>...</think> <answer>...</answer> and nothing else, each tag once."""
  tags = ("<think>", "</think>", "<answer>", "</answer>")
  return all(text.count(tag) == 1 for tag in tags) and _THINK_ANSWER.fullmatch(text.strip()) is not None


def hashes(text: str) -> bool:
  """Returns whether the last line is "#### " and a number, as in GSM8K."""
  last = text.rstrip().rpartition("\n")[2]
  if not last.startswith("#### "):
    return False
  answer = marked_number(last)
  return answer is not None and last == f"#### {answer}" and number(answer) is not None


_THINK_ANSWER = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
FORMS: Mapping[str, Callable[[str], bool]] = {
  "think": think,
  "think_answer": think_answer,
  "hashes": hashes,
  "boxed": lambda text: last_boxed(text) is not None,
}


def _matches(pattern: str, prompts, completions: list[str], token_ids, columns) -> list[float]:
  return [float(re.search(pattern, text, re.DOTALL) is not None) for text in completions]
