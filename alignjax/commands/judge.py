"""Asks judges about a file's completions, in parts: pairs to train on, grades, and reports on a judge itself.

Answers lie in OUT.parts until all of them are there. The same command continues after a kill, to the same bytes.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from alignjax.commands import resumable
from alignjax.data.source import open_source
from alignjax.errors import InputError
from alignjax.evaluation.alternative_annotator import EPSILON
from alignjax.feedback import comparison
from alignjax.feedback.comparison import MOST_NULL
from alignjax.feedback.judge import agreement, bias, named, pairwise, rubric, score
from alignjax.feedback.judge.judge import Judge
from alignjax.feedback.judge.pairwise import Item
from alignjax.feedback.judge.rubric import Rubric
from alignjax.system import hosts, output, ranges
from alignjax.system.ranges import Count, NonNegative, Seed, Share

PART = 32  # items that are asked about, and written, together
FAIL = bias.FAIL


class Request(NamedTuple):
  """What is asked, besides rubric and judges.

  Attributes:
    seed: draws which order is asked first.
    samples: answers to each question.
    tie_margin: nats; a pair whose preference is not stronger is a tie.
    author: the judge's name among the records' authors, for the bias "own"; "": none is its own.
    epsilon: of the alternative annotator test.
  """

  seed: Seed = 0
  samples: Count = 1
  tie_margin: NonNegative = 0.0
  author: str = ""
  epsilon: Share = EPSILON


DEFAULT = Request()


def check(what: str, judges: Sequence[str], rubric_name: str, out: str, request: Request) -> Rubric:
  """Checks the flags without loading a model, and returns the rubric.

  Raises:
    InputError: one of them does not fit.
  """
  for name in ("seed", "samples", "tie_margin", "epsilon"):
    ranges.check(name, getattr(request, name), Request.__annotations__[name])
  for name in judges:
    named.check(name)
  if len(judges) > 1 and what != "pairs":
    raise InputError(f"--judge: {len(judges)} are given; a panel judges pairs, and each judge is measured alone")
  if len(set(judges)) < len(judges):
    raise InputError("--judge: one is given twice; a panel is of different judges")
  found = rubric.load(rubric_name)
  if what == "score":
    pairwise.check_form(found, "single", "checks")
    resumable.check_out(out, ".json")
    return found
  pairwise.check_form(found, "pairwise")
  if what == "pairs":
    resumable.check_out(out, ".json", ".comparisons.jsonl")
  else:
    output.check_file(_report_path(out), "--out")
  return found


def pairs(
  judges: Sequence[Judge], found: Rubric, path: str, out: epath.PathLike, request: Request = DEFAULT
) -> dict[str, Any]:
  """Writes pairs to train on to OUT.jsonl, every comparison to OUT.comparisons.jsonl and a summary to OUT.json.

  Args:
    judges: a panel.
    found: the rubric, of the form pairwise.
    path: records with "chosen" and "rejected", or with "completions".
    out: named FILE.jsonl.
    request: what is asked.

  Returns:
    The summary.

  Raises:
    InputError: a record is malformed, or the parts beside `out` are of other work.
  """
  out = resumable.check_out(out, ".json", ".comparisons.jsonl")
  source = open_source(path)
  items = pairwise.read_items(source, found)
  equal = [item for item in items if item.completions[0] == item.completions[1]]
  items = [item for item in items if item.completions[0] != item.completions[1]]
  work = _identity("pairs", judges, found, source.fingerprint, request)
  begun = time.monotonic()
  with _parts(out, work) as folder:
    rows = list(_comparison_rows(folder, judges, found, items, request))
    records = [row["pair"] for row in rows if row["pair"] is not None]
    comparisons = [one for row in rows for one in row["comparisons"]]
    resumable.write(out.with_suffix(".comparisons.jsonl"), map(resumable.line_of, comparisons))
    nulls = sum(one["verdict"] is None for one in comparisons)
    summary = {
      "pairs": len(items),
      "records": len(records),
      "left_out": {
        "equal completions": len(equal),
        "tie": sum(row["verdict"] == comparison.TIE for row in rows),
        "no verdict": sum(row["verdict"] is None for row in rows),
      },
      "null": _null(nulls, len(comparisons)),
      "judges": [judge.name for judge in judges],
      "rubric": found.named._asdict(),
      "request": _asked(request, "seed", "samples", "tie_margin"),
    }
    resumable.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
    resumable.write(out, map(resumable.line_of, records))
  hosts.say(f"{time.monotonic() - begun:.1f} s for {len(comparisons)} answers")
  return summary


def grade(judge: Judge, found: Rubric, path: str, out: epath.PathLike, request: Request = DEFAULT) -> dict[str, Any]:
  """Writes a grade of each completion to OUT.jsonl, and a summary to OUT.json; the arguments are those of `pairs`.

  Raises:
    InputError: as `pairs`.
  """
  out = resumable.check_out(out, ".json")
  source = open_source(path)
  items = score.read_graded(source, found)
  work = _identity("score", [judge], found, source.fingerprint, request)

  def make(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    chosen = [items[number] for number in numbers]
    for item, one in zip(chosen, score.grades(judge, found, chosen, request.samples), strict=True):
      record = score.grade_record(item, one, judge, found)
      yield {"record": record, "nulls": one.nulls, "answers": one.answers}

  with _parts(out, work) as folder:
    rows = list(resumable.rows(folder, range(len(items)), PART, make))
    known = [row["record"]["score"] for row in rows if row["record"]["score"] is not None]
    summary = {
      "completions": len(items),
      "graded": len(known),
      "mean": sum(known) / len(known) if known else None,
      "null": _null(sum(row["nulls"] for row in rows), sum(row["answers"] for row in rows)),
      "judge": judge.name,
      "rubric": found.named._asdict(),
      "request": _asked(request, "samples"),
    }
    resumable.write(out.with_suffix(".json"), [json.dumps(summary, indent=2)])
    resumable.write(out, (resumable.line_of(row["record"]) for row in rows))
  return summary


def biases(judge: Judge, found: Rubric, path: str, out: epath.PathLike, request: Request = DEFAULT) -> dict[str, Any]:
  """Writes a report on the biases of a judge to OUT, a JSON file; the other arguments are those of `pairs`.

  Raises:
    InputError: as `pairs`.
  """
  source = open_source(path)
  asked = bias.probes(pairwise.read_items(source, found))
  work = _identity("bias", [judge], found, source.fingerprint, request)

  def make(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    answered = [[comparison.parse(one) for one in row["comparisons"]] for row in rows]
    return bias.report(found, asked, answered, request.author)

  items = [probe.item for probe in asked]
  return _report(judge, found, items, out, work, request, make)


def agreements(
  judge: Judge, found: Rubric, path: str, out: epath.PathLike, request: Request = DEFAULT
) -> dict[str, Any]:
  """Writes a report on a judge's agreement with people to OUT, a JSON file.

  Args:
    judge: who is measured.
    found: the rubric, of the form pairwise.
    path: comparisons that people made.
    out: named FILE.json.
    request: what is asked.

  Raises:
    InputError: as `pairs`.
  """
  if found.reference:
    raise InputError(f"--rubric: {found.name} reads the field '{found.reference}', which comparisons do not have")
  units = comparison.units(comparison.read(path))
  work = _identity("agreement", [judge], found, open_source(path).fingerprint, request)

  def make(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return agreement.report(units, [row["verdict"] for row in rows], request.epsilon)

  return _report(judge, found, agreement.items(units), out, work, request, make)


def failures(summary: dict[str, Any]) -> list[str]:
  """Returns a line for each check of a summary or report that failed."""
  lines = []
  if summary["null"]["outcome"] == FAIL:
    share = summary["null"]["share"]
    lines.append(f"{share:.1%} of the answers are no verdict, more than {MOST_NULL:.0%}: look at the raw ones")
  if summary.get("constant_answer", {}).get("outcome") == FAIL:
    wins = summary["constant_answer"]["wins"]["value"]
    lines.append(f"a constant answer wins {wins:.1%}: what this judge prefers is not quality")
  return lines


def _report(
  judge: Judge,
  found: Rubric,
  items: Sequence[Item],
  out: epath.PathLike,
  work: dict[str, Any],
  request: Request,
  make: Callable[[Iterable[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
  """Asks a judge about pairs, and writes the report that `make` makes of the rows."""
  out = _report_path(out)
  with _parts(out, work) as folder:
    rows = _comparison_rows(folder, [judge], found, items, request)
    report = make(rows) | {"judge": judge.name, "rubric": found.named._asdict(), "request": request._asdict()}
    resumable.write(out, [json.dumps(report, indent=2)])
  return report


def _comparison_rows(
  folder: epath.Path, judges: Sequence[Judge], found: Rubric, items: Sequence[Item], request: Request
) -> Iterator[dict[str, Any]]:
  """Yields the label and the comparisons of each pair; a part that is not there is asked for."""

  def make(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    chosen = [items[number] for number in numbers]
    labelled = pairwise.judge_items(
      judges, found, chosen, seed=request.seed, samples=request.samples, tie_margin=request.tie_margin
    )
    for item, (label, comparisons) in zip(chosen, labelled, strict=True):
      yield {
        "verdict": label.verdict,
        "pair": pairwise.pair_record(item, label, found),
        "comparisons": [one.record() for one in comparisons],
      }

  return resumable.rows(folder, range(len(items)), PART, make)


@contextlib.contextmanager
def _parts(out: epath.Path, work: dict[str, Any]) -> Iterator[epath.Path]:
  """Gives the folder of a command's parts: locked, claimed for this work, and removed when the outputs are written."""
  with resumable.locked_parts(out, "judges") as folder:
    resumable.claim(folder, work)
    yield folder
    resumable.remove(folder)


def _report_path(out: epath.PathLike) -> epath.Path:
  path = epath.Path(out).expanduser()
  if path.suffix != ".json":
    raise InputError(f"--out={out}: a report is a JSON file; give it the ending .json")
  return path


def _identity(what: str, judges: Sequence[Judge], found: Rubric, fingerprint: str, request: Request) -> dict[str, Any]:
  """Returns everything that decides the answers, for `resumable.claim`."""
  return {
    "work": what,
    "judges": [{"name": judge.name} | judge.identity for judge in judges],
    "rubric": found.hash,
    "input": fingerprint,
    "request": _asked(request, "seed", "samples", "tie_margin"),
  }


def _asked(request: Request, *names: str) -> dict[str, Any]:
  return {name: getattr(request, name) for name in names}


def _null(count: int, answers: int) -> dict[str, Any]:
  """Returns the count of null verdicts, and whether they are too many."""
  return {"share": count / max(answers, 1), "count": count, "outcome": bias.null_outcome(count, answers)}
