"""A run's completions of many prompts as JSON lines, on their way to another program: `alignjax generate`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from alignjax.commands import resumable
from alignjax.commands.best_of import Request, draw, identity, plain
from alignjax.data.field import Dialogue
from alignjax.data.format import BEFORE_COMPLETION, detect, parse, placed
from alignjax.data.source import Record, Source
from alignjax.errors import InputError
from alignjax.runs.run import Run, check_writes
from alignjax.system import hosts, output, ranges
from alignjax.system.fingerprint import digest


class Typed:
  """Prompts of the command line, as one file of a source."""

  blanks = 0

  def __init__(self, prompts: Sequence[str]):
    self._prompts = list(prompts)
    self.left_out: dict[str, str] = {}
    self.digest = digest(self._prompts)

  def __len__(self) -> int:
    return len(self._prompts)

  def read(self, i: int) -> bytes:
    return json.dumps({"prompt": self._prompts[i]}).encode()

  def where(self, i: int) -> str:
    return f"prompt {i + 1}"


def answer(run: Run, source: Source, request: Request, token_ids: bool = False) -> Iterator[dict[str, Any]]:
  """A record for each completion, prompt by prompt: the prompt's own fields, and "completion", "finished", "logp".

  logp is in nats, of the distribution that sampled. A field of the record with one of these names is kept as
  "given_<name>", which must be free, and so is one that is of other completions and would make another kind of record
  of it, such as "chosen" or "label". A prompt that was part of one has a field of its own, "prompt". Completions are
  those of `run.sample` for the same prompts and seed.

  Args:
    run: of a policy.
    source: records with a prompt, a string or messages.
    request: what is sampled.
    token_ids: also "tokens", the completion's ids with the stop token.

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
  """Writes the records of `answer` to a .jsonl file, whole or not at all; the same call goes on after an interruption.

  What is finished lies in OUT.parts until then.

  Raises:
    InputError: as `answer`; or the file is there already, or parts of another request.
  """
  out = resumable.check_out(out)
  folder = out.with_suffix(".parts")
  with hosts.held("parts", lambda: output.lock(folder, "samples", "--out")):
    there = hosts.there(out)
    if there and not hosts.there(folder / "request.json"):
      raise InputError(f"--out={out}: is there already; delete it, or choose another")
    _check(run, source, token_ids)
    found = identity(run, source, request)
    found["request"] |= {"token_ids": token_ids}
    resumable.claim(folder, found)
    if not there:  # else it was killed when all but the parts' end was done
      make = lambda numbers: _records(run, source, numbers, request, token_ids)
      rows = resumable.rows(folder, range(len(source)), _size(request), make)
      resumable.write(out, (resumable.line_of(row) for row in rows))
    resumable.remove(folder)
  return out


def _records(run, source, numbers, request, token_ids):
  for one in draw(run, source, numbers, request):
    completion = one.completion
    own = {"completion": completion.text, "finished": completion.finished, "logp": float(completion.logps.sum())}
    own |= {"tokens": completion.tokens} if token_ids else {}
    names = _names(one.record, one.prompt, token_ids)
    if names.get("prompt") != "prompt":
      own["prompt"] = plain(one.prompt)
    yield {names[name]: value for name, value in one.record.items()} | own


def _names(record: Record, prompt: Dialogue, token_ids: bool) -> dict[str, str]:
  """What each field of a record is called beside a completion of its prompt.

  Raises:
    InputError: two would have one name.
  """
  taken = {"completion", "finished", "logp", *(["tokens"] if token_ids else []), *BEFORE_COMPLETION}
  asked = None if detect(record) == "messages" else record.get("prompt")  # which may be anything beside messages
  if asked is None or parse({"prompt": asked}, "prompt").prompt != prompt:
    taken.add("prompt")
  names = {name: f"given_{name}" if name in taken else name for name in record}
  for name, kept in names.items():
    if name != kept and kept in record:
      raise InputError(f"field '{name}' is kept as '{kept}' beside a completion, and that is there too; rename one")
  return names


def _size(request: Request) -> int:
  """Prompts whose completions fill a batch."""
  return max(1, request.batch_size // max(1, request.n))


def _check(run: Run, source: Source, token_ids: bool) -> None:
  """Raises InputError before anything is sampled."""
  check_writes(run)
  check_prompts(source, token_ids)


def check_prompts(source: Source, token_ids: bool = False) -> None:
  """Raises InputError where a record has no prompt, an empty one, or no free name for a field that must give way."""

  def check(record: Record) -> None:
    prompt = parse(record, "prompt").prompt
    if not any(message["content"].strip() for message in prompt):
      raise InputError("the prompt is empty; write something")
    _names(record, prompt, token_ids)

  for number in range(len(source)):
    placed(source, number, check)
