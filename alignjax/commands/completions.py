"""Writes a run's completions of many prompts as JSON lines, for other programs: `alignjax generate`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from alignjax.commands import resumable
from alignjax.commands.best_of import Request, draw, identity
from alignjax.data.field import Dialogue, plain
from alignjax.data.format import BEFORE_COMPLETION, detect, parse, placed
from alignjax.data.source import Record, Source
from alignjax.errors import InputError
from alignjax.runs.run import Run, check_writes
from alignjax.system import hosts, ranges
from alignjax.system.fingerprint import digest


class Typed:
  """Prompts of the command line, in the form of a source's file: each is the record {"prompt": TEXT}."""

  blanks = 0

  def __init__(self, prompts: Sequence[str]):
    self._prompts = list(prompts)
    self.left_out: dict[str, str] = {}
    self.digest = digest(self._prompts)

  def __len__(self) -> int:
    return len(self._prompts)

  def read(self, i: int) -> bytes:
    """Returns prompt i, from 0, as a line of JSON."""
    return json.dumps({"prompt": self._prompts[i]}).encode()

  def where(self, i: int) -> str:
    """Names prompt i, from 0, for people, who count from 1."""
    return f"prompt {i + 1}"


def answer(run: Run, source: Source, request: Request, token_ids: bool = False) -> Iterator[dict[str, Any]]:
  """Yields a record for each completion, prompt by prompt: the prompt's fields and "completion", "finished", "logp".

  logp is in nats, of the distribution that was sampled. A field of the prompt's record with one of these names is
  renamed to "given_<name>", which must be free. So is a field about other completions, such as "chosen" or "label",
  which would make it a record of another kind. If the prompt was only a part of a field, the record gets a field
  "prompt". The completions are those of `run.sample` for the same prompts and seed.

  Args:
    run: of a policy.
    source: records with a prompt, a string or messages.
    request: how the completions are sampled.
    token_ids: adds "tokens", the completion's ids with the stop token.

  Raises:
    InputError: the run is a reward model's, a record has no prompt, an empty one or no free name for a field, or an
      option is out of range.
  """
  ranges.check_record("", request)
  _check(run, source, token_ids)
  size = _size(request)
  for start in range(0, len(source), size):
    yield from _records(run, source, range(len(source))[start : start + size], request, token_ids)


def write(run: Run, source: Source, out: epath.PathLike, request: Request, token_ids: bool = False) -> epath.Path:
  """Writes the records of `answer` to a .jsonl file, whole or not at all; the same call continues after a kill.

  Finished parts lie in OUT.parts until the file is written.

  Args:
    run: of a policy.
    source: records with a prompt.
    out: named FILE.jsonl.
    request: how the completions are sampled.
    token_ids: as for `answer`.

  Returns:
    The path of the file.

  Raises:
    InputError: as `answer`; or the file exists already, or parts of another request.
  """
  out = resumable.check_out(out)
  with resumable.locked_parts(out, "samples") as folder:
    written = hosts.there(out)
    if written and not hosts.there(folder / "request.json"):
      raise InputError(f"--out={out}: is there already; delete it, or choose another")
    _check(run, source, token_ids)
    request_identity = identity(run, source, request)
    request_identity["request"] |= {"token_ids": token_ids}
    resumable.claim(folder, request_identity)
    if not written:  # if it is written, an earlier call was killed before it had removed the parts
      rows = resumable.rows(
        folder,
        range(len(source)),
        _size(request),
        lambda numbers: _records(run, source, numbers, request, token_ids),
      )
      resumable.write(out, (resumable.line_of(row) for row in rows))
    resumable.remove(folder)
  return out


def _records(run, source, numbers, request, token_ids):
  """Samples and yields the records of `answer` for the prompts of these numbers."""
  for item in draw(run, source, numbers, request):
    completion = item.completion
    new_fields = {
      "completion": completion.text,
      "finished": completion.finished,
      "logp": float(completion.logps.sum()),
    }
    if token_ids:
      new_fields["tokens"] = completion.tokens
    names = _names(item.record, item.prompt, token_ids)
    if names.get("prompt") != "prompt":
      new_fields["prompt"] = plain(item.prompt)
    yield {names[name]: value for name, value in item.record.items()} | new_fields


def _names(record: Record, prompt: Dialogue, token_ids: bool) -> dict[str, str]:
  """Returns the new name of each field of a record that gets a completion of its prompt.

  Raises:
    InputError: two fields would have the same name.
  """
  renamed = {"completion", "finished", "logp", *BEFORE_COMPLETION}
  if token_ids:
    renamed.add("tokens")
  if not _has_prompt(record, prompt):
    renamed.add("prompt")
  names = {}
  for name in record:
    names[name] = name
    if name in renamed:
      names[name] = f"given_{name}"
      if names[name] in record:
        raise InputError(
          f"field '{name}' is kept as '{names[name]}' beside a completion, and that is there too; rename one"
        )
  return names


def _has_prompt(record: Record, prompt: Dialogue) -> bool:
  """Returns True if the field "prompt" of a record is this prompt; in a record of messages it may be anything."""
  if detect(record) == "messages" or record.get("prompt") is None:
    return False
  return parse({"prompt": record["prompt"]}, "prompt").prompt == prompt


def _size(request: Request) -> int:
  """Returns the number of prompts whose completions fill a batch."""
  return max(1, request.batch_size // max(1, request.n))


def _check(run: Run, source: Source, token_ids: bool) -> None:
  """Raises InputError if the run or a record is not fit for `answer`; called before sampling."""
  check_writes(run)
  check_prompts(source, token_ids)


def check_prompts(source: Source, token_ids: bool = False) -> None:
  """Raises InputError if a record has no prompt, an empty one, or no free name for a field that must be renamed.

  Args:
    source: of the prompts; every record is read.
    token_ids: as for `answer`.
  """

  def check(record: Record) -> None:
    prompt = parse(record, "prompt").prompt
    if not any(message["content"].strip() for message in prompt):
      raise InputError("the prompt is empty; write something")
    _names(record, prompt, token_ids)

  for number in range(len(source)):
    placed(source, number, check)
