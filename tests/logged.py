"""A run whose metrics go to a logger, killed and continued, in an environment that has the logger.

  python -m tests.logged LOGGER WORKDIR OUT begin|resume|read

"read" writes to OUT, in JSON, what the logger's own means of reading find: how many runs, and values by step.
"""

import json
import pathlib
import struct
import subprocess
import sys

from alignjax.training.metrics import MetricWriter

KEYS = ("loss", "eval/loss")


def main(name: str, workdir: str, out: str, part: str) -> None:
  folder = pathlib.Path(workdir)
  if part == "read":
    pathlib.Path(out).write_text(json.dumps(READERS[name](folder)))
    return
  start = {"begin": 0, "resume": 3}[part]  # steps 4 and 5 were written behind the checkpoint of step 3
  writer = MetricWriter(folder, resume_step=start, loggers=[name])
  for step in range(start + (part == "resume"), 6 if part == "begin" else 7):
    writer.write(step, {"loss": 1 / 2**step})
  if part == "resume":
    writer.write(6, {"eval/loss": 0.25})
  writer.close()


def read_tensorboard(folder):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  found = EventAccumulator(str(folder / "tensorboard"))
  found.Reload()
  return {"runs": 1} | {key: {event.step: event.value for event in found.Scalars(key)} for key in KEYS}


def read_wandb(folder):
  """Offline, wandb has no reader that it calls public: its own record of the run, a log of protocol buffers."""
  from wandb.proto import wandb_internal_pb2

  values, ids = {key: {} for key in KEYS}, set()
  for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    for data in log_records(path.read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      if record.WhichOneof("record_type") == "run":
        ids.add(record.run.run_id)
      if record.WhichOneof("record_type") == "history":
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key in KEYS:
          if key in row:
            values[key][row["_step"]] = row[key]
  return {"runs": len(ids)} | values


def log_records(data, begin=7, block=32768):
  """The records of a LevelDB log with a header: pieces of (checksum, length, kind), cut at blocks."""
  at, whole = begin, b""
  while at + 7 <= len(data):
    if block - at % block < 7:
      at += block - at % block
      continue
    length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
    whole += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or its last piece
      yield whole
      whole = b""


def read_trackio(folder):
  """By its command line; a step that was logged again behind a kill is there twice, with one value."""
  import trackio

  runs = list(trackio.Api().runs("alignjax"))
  command = [pathlib.Path(sys.executable).parent / "trackio", "get", "metric", "--project", "alignjax", "--json"]
  values = {}
  for key in KEYS:
    done = subprocess.run(
      [*command, "--run", runs[0].name, "--metric", key], capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["values"]
    values[key] = {row["step"]: row["value"] for row in rows}
    assert {(row["step"], row["value"]) for row in rows} == set(values[key].items())
  return {"runs": len(runs)} | values


def read_mlflow(folder):
  import mlflow

  client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
  runs = client.search_runs([client.get_experiment_by_name("alignjax").experiment_id])
  history = lambda key: client.get_metric_history(runs[0].info.run_id, key)
  assert all(len(history(key)) == len({metric.step for metric in history(key)}) for key in KEYS)  # no step twice
  return {"runs": len(runs)} | {key: {metric.step: metric.value for metric in history(key)} for key in KEYS}


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}

if __name__ == "__main__":
  main(*sys.argv[1:])
