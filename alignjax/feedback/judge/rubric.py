"""What a judge is asked, as a YAML file with a version, known by the hash of its content.

  name: helpful-harmless-honest
  version: 1                     # raise it where the meaning changes
  form: pairwise                 # pairwise, single or checks
  criteria:                      # what to look at; in the form checks, what to answer with yes or no
    - {id: helpful, text: Does it do what the user asked?}
  labels: [A, B, C]              # pairwise: for the first, the second and, if there is a third, a tie
  scale: [1, 10]                 # single: the least and the greatest whole number
  reference: answer              # the field of a record with a reference; left out: there is none
  reasoning: false               # true: the judge may write before its verdict
  system: ...                    # left out: no system message
  template: ...                  # the user's message, in Jinja
  examples:                      # answered before the question, as turns
    - {prompt: ..., completions: [..., ...], verdict: A}

Every form asks for one label of a few: a place, a number, yes or no. So a verdict can always be read from the
log-probabilities of the labels. The form checks asks one question for each criterion.

A template sees `prompt`, `completions`, `completion` (the first), `reference`, `criteria`, `check` (the criterion that
is asked, in the form checks), `fence` (a text that occurs in none of these, to enclose them with) and `answer` (the
words that say how to answer). It is rendered in the sandbox of chat templates.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from alignjax.data import jinja_limits
from alignjax.data.field import Dialogue, required, text
from alignjax.data.source import Record
from alignjax.errors import InputError
from alignjax.feedback.comparison import RubricName
from alignjax.system import reading

FORMS = ("pairwise", "single", "checks")
YES, NO = "yes", "no"  # the labels of a check
MARK = "Verdict:"  # begins the last line of an answer with reasons
_ANSWERS = 1  # version of the words that say how to answer; part of the hash
_MOST_GRADES = 101
_SHIPPED = resources.files("alignjax.feedback.judge") / "rubrics"
_KNOWN = (
  *("name", "version", "form", "criteria", "labels", "scale", "reference", "reasoning", "system", "template"),
  "examples",
)


class Criterion(NamedTuple):
  """One thing to look at; in the form checks also what it adds to the score if the answer is yes."""

  id: str
  text: str
  weight: float = 1.0


class Question(NamedTuple):
  """One thing that a judge is asked.

  Attributes:
    rubric: how.
    prompt: the messages that were answered.
    completions: in the order shown; one in the forms single and checks.
    reference: of the record; "" if the rubric reads none.
    check: the criterion that is asked in the form checks.
    sample: the number of the answer among those to this question, from 0.
  """

  rubric: "Rubric"
  prompt: Dialogue
  completions: tuple[str, ...]
  reference: str = ""
  check: Criterion | None = None
  sample: int = 0


@dataclass(frozen=True)
class Rubric:
  """A rubric; the attributes are the fields of the module's table.

  Attributes:
    content: the parsed file, of which `hash` is.
    labels: of a verdict, as a judge writes them. Pairwise: first, second and maybe tie; single: the numbers in order;
      checks: yes, no.
  """

  content: Mapping[str, Any]
  name: str
  version: int
  form: str
  criteria: tuple[Criterion, ...]
  labels: tuple[str, ...]
  reference: str
  reasoning: bool
  system: str
  template: str
  examples: tuple[Mapping[str, Any], ...]

  def reference_of(self, record: Record) -> str:
    """Returns the reference of a record; "" if the rubric reads none. Raises InputError if the record lacks it."""
    if not self.reference:
      return ""
    return text(required(record, self.reference), self.reference)

  @cached_property
  def hash(self) -> str:
    """Hex sha256 of the content: of the values, whatever the file's layout and comments."""
    text = json.dumps({"answers": _ANSWERS, "rubric": self.content}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()

  @property
  def named(self) -> RubricName:
    """What a record says of it."""
    return RubricName(self.name, self.version, self.hash)

  @property
  def has_tie(self) -> bool:
    """True if a judge may call two completions equal."""
    return self.form == "pairwise" and len(self.labels) == 3

  def messages(self, question: Question) -> Dialogue:
    """Renders a question as messages, the last of which a judge answers.

    Raises:
      InputError: the template fails.
    """
    messages: Dialogue = []
    if self.system:
      messages.append({"role": "system", "content": self.system})
    for example in self.examples:
      if question.check is None or example["check"] == question.check.id:
        messages += self._turns(example, question)
    shown = shown_prompt(question.prompt)
    return [*messages, self._ask(shown, question.completions, question.reference, question.check)]

  def _turns(self, example: Mapping[str, Any], question: Question) -> Dialogue:
    """Returns an example as a turn of the user and its answer."""
    reference = example.get("reference", "")
    asked = self._ask(example["prompt"], tuple(example["completions"]), reference, question.check)
    answer = example["verdict"]
    if self.reasoning:
      answer = f"{example['reason']}\n{MARK} {answer}"
    return [asked, {"role": "assistant", "content": answer}]

  def _ask(self, prompt: str, completions: tuple[str, ...], reference: str, check: Criterion | None) -> Any:
    variables = {
      "prompt": prompt,
      "completions": list(completions),
      "completion": completions[0],
      "reference": reference,
      "criteria": [one._asdict() for one in self.criteria],
      "check": check._asdict() if check else None,
      "fence": _fence(prompt, *completions, reference),
      "answer": self._how_to_answer(),
    }
    return {"role": "user", "content": _render(self.name, self.template, variables)}

  def _how_to_answer(self) -> str:
    """Says how to answer, in the words that `verdict.read` understands."""
    labels = f"{', '.join(self.labels[:-1])} or {self.labels[-1]}"
    if self.form == "single":
      labels = f"one whole number from {self.labels[0]} to {self.labels[-1]}"
    if self.reasoning:
      return f'Give your reasons first. Then end with one line that is "{MARK} " and {labels}, and nothing more.'
    return f"Answer with {labels} alone, and nothing more."


def shown_prompt(prompt: Dialogue) -> str:
  """Returns a prompt as text: a single turn of a user as it is, a dialogue with the roles."""
  if len(prompt) == 1 and prompt[0]["role"] == "user":
    return prompt[0]["content"]
  return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _fence(*texts: str) -> str:
  """Returns a line that occurs in none of the texts: a completion cannot forge the end of its own part."""
  digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
  while any(digest[:8] in text for text in texts):
    digest = hashlib.sha256(digest.encode()).hexdigest()
  return f"=== {digest[:8]} ==="


def _render(name: str, template: str, variables: Mapping[str, Any]) -> str:
  try:
    compiled, _ = jinja_limits.compile_template(jinja_limits.SafeEnvironment(), template)
    return jinja_limits.render(compiled, variables).strip()
  except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
    reason = " ".join(str(error).split())[:300]
    raise InputError(f"rubric {name}: field 'template' cannot be rendered ({reason}); correct it") from error


def shipped() -> list[str]:
  """Returns the names of the rubrics that come with the package."""
  return sorted(path.name.removesuffix(".yaml") for path in _SHIPPED.iterdir() if path.name.endswith(".yaml"))


def load(path: str) -> Rubric:
  """Reads a rubric from a YAML file, or one that comes with the package by its name.

  Raises:
    InputError: there is none, or a field is not as the module's table has it.
  """
  file = Path(path).expanduser()
  if path in shipped():
    text = (_SHIPPED / f"{path}.yaml").read_text()
  elif not file.exists():
    raise InputError(f"--rubric={path}: no such file; give a YAML file, or one of {', '.join(shipped())}")
  else:
    text = reading.read_text(file)
  return parse(text, path)


def parse(text: str, place: str) -> Rubric:
  """Reads a rubric from YAML; `place` names it in errors.

  Raises:
    InputError: as `load`.
  """
  try:
    import yaml
  except ImportError as error:
    raise InputError("a rubric is a YAML file, which needs PyYAML: pip install 'alignjax[judge]'") from error
  try:
    content = yaml.load(text, Loader=_strict(yaml))
  except yaml.YAMLError as error:
    raise InputError(f"{place}: is no YAML ({' '.join(str(error).split())[:300]})") from error
  try:
    return _rubric(content)
  except InputError as error:
    raise InputError(f"{place}: {error}") from error


def _strict(yaml: Any) -> Any:
  """Returns PyYAML's safe loader, which refuses a key that comes twice and keeps dates as text."""

  class Strict(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
      keys = [self.construct_object(key, deep=True) for key, _ in node.value]
      if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise yaml.YAMLError(f"the key {twice!r} comes twice, line {node.start_mark.line + 1}")
      return super().construct_mapping(node, deep)

  return Strict


def _rubric(content: Any) -> Rubric:
  if not isinstance(content, dict):
    raise InputError("a rubric is a mapping of name, version, form, criteria, template, ...")
  if unknown := sorted(str(key) for key in content if key not in _KNOWN):
    raise InputError(f"field '{unknown[0]}' is unknown; the fields are {', '.join(_KNOWN)}")
  form = _text(content, "form")
  if form not in FORMS:
    raise InputError(f"field 'form' is {form!r}; use {', '.join(FORMS)}")
  version: Any = content.get("version")
  if not _is_whole(version) or version < 1:
    raise InputError(f"field 'version' is {version!r}; use a whole number from 1")
  reasoning = content.get("reasoning", False)
  if not isinstance(reasoning, bool):
    raise InputError(f"field 'reasoning' is {reasoning!r}; use true or false")
  criteria = _criteria(content, form)
  labels = _labels(content, form)
  try:
    json.dumps(content)
  except (TypeError, ValueError) as error:
    raise InputError(f"a value is not plain ({error}); put it into quotes") from error
  rubric = Rubric(
    content=content,
    name=_text(content, "name"),
    version=version,
    form=form,
    criteria=criteria,
    labels=labels,
    reference=_text(content, "reference", ""),
    reasoning=reasoning,
    system=_text(content, "system", ""),
    template=_text(content, "template"),
    examples=_examples(content, form, labels, criteria, reasoning),
  )
  check = None
  if form == "checks":
    check = criteria[0]
  count = 2 if form == "pairwise" else 1
  rubric.messages(Question(rubric, [{"role": "user", "content": "a"}], ("b", "c")[:count], "d", check))
  return rubric


def _text(content: Mapping[str, Any], name: str, default: str | None = None) -> str:
  value = content.get(name, default)
  if not isinstance(value, str) or (default is None and not value.strip()):
    raise InputError(f"field '{name}' is {value!r}; write a text")
  return value


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _criteria(content: Mapping[str, Any], form: str) -> tuple[Criterion, ...]:
  given = content.get("criteria", [])
  if not isinstance(given, list) or (form == "checks" and not given):
    raise InputError(f"field 'criteria' is {given!r:.60}; write a list of {{id, text}}")
  found = []
  for i, one in enumerate(given):
    if not isinstance(one, dict) or not {"id", "text"} <= one.keys() <= {"id", "text", "weight"}:
      raise InputError(f"field 'criteria[{i}]' is {one!r:.60}; write {{id, text}}, and a weight in the form checks")
    weight = one.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < 1e6:
      raise InputError(f"field 'criteria[{i}].weight' is {weight!r}; write a number")
    found.append(Criterion(_text(one, "id"), _text(one, "text"), float(weight)))
  if len({one.id for one in found}) < len(found):
    raise InputError("field 'criteria': two have one id; rename one")
  return tuple(found)


def _labels(content: Mapping[str, Any], form: str) -> tuple[str, ...]:
  """Returns the labels of a verdict; the field that another form reads is refused."""
  for name, of in (("labels", "pairwise"), ("scale", "single")):
    if name in content and form != of:
      raise InputError(f"field '{name}' is of the form {of}; leave it out of the form {form}")
  if form == "checks":
    return (YES, NO)
  if form == "single":
    scale = content.get("scale")
    if not isinstance(scale, list) or len(scale) != 2 or not all(map(_is_whole, scale)) or scale[0] >= scale[1]:
      raise InputError(f"field 'scale' is {scale!r}; write the least and the greatest whole number, as in [1, 10]")
    if scale[1] - scale[0] >= _MOST_GRADES:
      raise InputError(f"field 'scale' is {scale!r}; use at most {_MOST_GRADES} numbers")
    return tuple(str(number) for number in range(scale[0], scale[1] + 1))
  labels = content.get("labels", ["A", "B"])
  is_list = isinstance(labels, list) and len(labels) in (2, 3) and all(isinstance(one, str) for one in labels)
  if not is_list or len(set(labels)) < len(labels) or any(one != one.strip() or not one for one in labels):
    raise InputError(f"field 'labels' is {labels!r}; write two different texts, and a third for a tie, in quotes")
  return tuple(labels)


def _examples(
  content: Mapping[str, Any], form: str, labels: tuple[str, ...], criteria: tuple[Criterion, ...], reasoning: bool
) -> tuple[Mapping[str, Any], ...]:
  given = content.get("examples", [])
  needed = {"prompt", "completions", "verdict"}
  if reasoning:
    needed |= {"reason"}
  if form == "checks":
    needed |= {"check"}
  if not isinstance(given, list):
    raise InputError("field 'examples' is no list")
  for i, one in enumerate(given):
    place = f"field 'examples[{i}]"
    if not isinstance(one, dict) or not needed <= one.keys() <= needed | {"reference"}:
      raise InputError(f"{place}' must have {', '.join(sorted(needed))}, and may have a reference")
    count = 2 if form == "pairwise" else 1
    completions = one["completions"]
    if not isinstance(completions, list) or len(completions) != count:
      raise InputError(f"{place}.completions' must be a list of {count}")
    if not all(isinstance(value, str) for value in (*completions, *(one[key] for key in one if key != "completions"))):
      raise InputError(f"{place}': every value is a text; put numbers, yes and no into quotes")
    if one["verdict"] not in labels:
      raise InputError(f"{place}.verdict' is {one['verdict']!r}; use one of {', '.join(labels)}")
    if form == "checks" and one["check"] not in {criterion.id for criterion in criteria}:
      raise InputError(f"{place}.check' is {one['check']!r}; name a criterion")
  return tuple(given)
