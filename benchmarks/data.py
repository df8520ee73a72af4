"""Is the data layer fast enough, and does its memory stay flat in the number of records?

  python -m benchmarks.data [--records 1000000]

For a small file and for one of `--records` pairs, each in a fresh process: seconds to index, to measure
all records (once per data set and tokenizer) and to open again, rows and tokens per second of the packed
stream, and the peak resident memory. Writes benchmarks/results/data.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from alignjax.data import DataConfig, Dataset, load_tokenizer, open_source, train_tokenizer
from benchmarks import result

WORDS = [f"{a}{b}" for a in ("re", "un", "co", "de", "in", "") for b in ("tell", "pose", "form", "act", "late", "view")]


def write_pairs(path: Path, records: int) -> None:
  """Pairs of about 110 tokens, prompts all different."""
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(4, 40, 1000)]
  with open(path, "w") as file:
    for i in range(records):
      a, b, c = (texts[i * k % 997] for k in (1, 3, 7))
      file.write(json.dumps({"id": i, "prompt": f"{i}: {a}", "chosen": b, "rejected": f"{c} no"}) + "\n")


def measure(path: str, model: str, steps: int = 50) -> dict:
  """The numbers of one file; for a process of its own."""
  tokenizer = load_tokenizer(model)
  config = DataConfig(train=path, rows=32, row_length=1024)
  clock = [time.monotonic()]

  def lap() -> float:
    clock.append(time.monotonic())
    return round(clock[-1] - clock[-2], 3)

  source = open_source(path)
  numbers = {"records": len(source), "bytes": os.path.getsize(path), "index_s": lap()}
  numbers["baseline_rss_mb"] = _memory("VmRSS")
  Dataset.open(config, tokenizer, "preference")
  numbers["first_open_s"] = lap()
  dataset = Dataset.open(config, tokenizer, "preference")
  numbers["open_again_s"] = lap()
  report = dataset.report
  numbers["plan_s"] = lap()
  batches = dataset.batches(step=10**6)  # an epoch far away: nothing is replayed
  next(batches)
  numbers["first_batch_s"] = lap()
  tokens = sum(int((next(batches)["segment_ids"] > 0).sum()) for _ in range(steps))
  seconds = lap()
  batches.close()
  numbers |= {"rows_per_s": round(steps * 32 / seconds), "tokens_per_s": round(tokens / seconds)}
  return numbers | {"padding_share": round(report["padding_share"], 4), "peak_rss_mb": _memory("VmHWM")}


def _memory(field: str) -> int:
  """Megabytes of this process, from the kernel."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return int(next(line for line in lines if line.startswith(field)).split()[1]) // 1024


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--records", type=int, default=1_000_000)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    print(json.dumps(measure(*arguments.child)))
    return
  runs = []
  with tempfile.TemporaryDirectory() as folder:
    model = f"{folder}/words.model"
    train_tokenizer([" ".join(WORDS), "0123456789: no"] * 100, model, 384)
    for records in (10_000, arguments.records):
      path = Path(folder) / f"{records}.jsonl"
      write_pairs(path, records)
      command = [sys.executable, "-m", "benchmarks.data", "--child", str(path), model]
      environment = os.environ | {"ALIGNJAX_CACHE": f"{folder}/cache"}
      runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout))
      print(runs[-1], flush=True)
  question = "is the data layer fast enough, and does its memory stay flat in the number of records?"
  result.write("data", {"question": question, "runs": runs})


if __name__ == "__main__":
  main()
