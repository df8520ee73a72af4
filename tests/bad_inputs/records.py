"""Records of every kind, broken in every way; and files that hold none."""

import gzip
import json
import random
from collections.abc import Iterator

from tests.bad_inputs.case import TOKENIZER, Case, words

KINDS = {
  "sft": {"prompt": "Hi", "completion": "Hello there"},
  "preference": {"prompt": "Hi", "chosen": "Hello there", "rejected": "No"},
  "unpaired": {"prompt": "Hi", "completion": "Hello there", "label": True},
  "ranked": {"prompt": "Hi", "responses": ["Hello there", "No"], "rankings": [1, 2]},
  "stepwise": {"prompt": "Hi", "completions": ["One.", "Two."], "labels": [True, False]},
}
VALUES = (None, 5, 1.5, True, {}, {"a": 1}, [5], [None], [[]], [{}], [{"role": 5}], [{"role": "user", "content": 5}])
LINES = {
  "not JSON": b"{'prompt': 1}\n",
  "cut": b'{"prompt": "half\n',
  "a list": b"[1, 2]\n",
  "null": b"null\n",
  "a number": b"5\n",
  "text": b'"Hi"\n',
  "empty object": b"{}\n",
  "latin-1": '{"prompt": "caf\u00e9"}\n'.encode("latin-1"),
  "utf-16": '{"prompt": "Hi"}\n'.encode("utf-16"),
  "binary": bytes(range(256)),
  "NaN": b'{"prompt": NaN}\n',
  "huge integer": b'{"prompt": "Hi", "n": ' + b"9" * 5000 + b"}\n",
  "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
  "lone surrogate": b'{"prompt": "\\ud800", "chosen": "\\ud800", "rejected": "b", "completion": "\\ud800"}\n',
  "two on a line": b'{"prompt": "a"}{"prompt": "b"}\n',
  "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
  "html": b"<!DOCTYPE html><html></html>\n",
}
FILES = {
  "empty.jsonl": b"",
  "blank.jsonl": b"\n\n\n",
  "cut.jsonl.gz": gzip.compress(b'{"prompt": "Hi"}\n' * 100, mtime=0)[:-20],
  "plain.jsonl.gz": b'{"prompt": "Hi"}\n',
  "empty.jsonl.gz": b"",
  "text.parquet": b'{"prompt": "Hi"}\n',
  "cut.parquet": b"PAR1" + bytes(40),
  "empty.parquet": b"",
  "text.arrayrecord": b'{"prompt": "Hi"}\n',
  "empty.arrayrecord": b"",
  "text.arrow": b'{"prompt": "Hi"}\n',
  "records.csv": b"prompt,completion\nHi,Hello\n",
  "records.json": b'{"prompt": "Hi"}',
  "array.json": b"[1, 2]",
  "records": b'{"prompt": "Hi"}\n',
  "records.zip": b"PK\x03\x04",
}


def check(content: bytes, kind: str, name: str = "mine.jsonl"):
  """The command that reads a file of records."""
  argv = ("data", "check", "--input", "{}/" + name, "--tokenizer", str(TOKENIZER), "--kind", kind)

  def make(folder):
    (folder / name).write_bytes(content)
    return words(*argv)(folder)

  return make


def broken(seed: int, count: int) -> Iterator[Case]:
  """A good record, then one with a field that is missing, or of another type."""
  draw = random.Random(seed)
  found = []
  for kind, good in KINDS.items():
    for field in good:
      found.append((kind, f"{field} missing", {k: v for k, v in good.items() if k != field}))
      found += [
        (kind, f"{field}={value!r}", good | {field: value})
        for value in VALUES
        if not isinstance(value, type(good[field])) or isinstance(value, list)
      ]
  draw.shuffle(found)
  for kind, name, record in found[:count]:
    content = "".join(json.dumps(one) + "\n" for one in (KINDS[kind], record)).encode()
    yield Case(f"{kind} record: {name}", check(content, kind), ("mine.jsonl:2",))


def lines(seed: int) -> Iterator[Case]:
  """A good record, then a line that is none; of a kind that the seed draws."""
  draw = random.Random(seed)
  for name, line in LINES.items():
    kind = draw.choice(list(KINDS))
    good = json.dumps(KINDS[kind]).encode() + b"\n"
    yield Case(f"{kind} line: {name}", check(good + line, kind), ("mine.jsonl:2", "mine.jsonl:3"))
    yield Case(f"{kind} file: {name}", check(line, kind), ("mine.jsonl",))


def files() -> Iterator[Case]:
  """Files that hold no record."""
  for name, content in FILES.items():
    yield Case(f"data check {name}", check(content, "preference", name), (name,))
