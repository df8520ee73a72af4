"""How many tokens a second does `alignjax serve` give 1, 8 and 32 clients, and does it outlive a storm of requests?

  python -m benchmarks.serving [--rounds 5] [--storm 10000]

Throughput: a decoder of 27M parameters with random weights, prompts of 32 tokens, completions of 64. Each client sends
its next request when the last one is answered; they run in a process of their own on the same machine. Against
`generate` on the same prompts, seeds aside, in batches of as many rows as there are clients, which has no HTTP, no JSON
and no text: the two take turns. Latencies are those that the clients see.
Storm: requests of mixed options, routes and lengths to a tiny model, among them clients that leave, malformed bodies
and prompts that are too long. Every answer must equal the one that the same request got when it was alone.
Writes benchmarks/results/serving.json.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import uvicorn

from alignjax.data.tokenizer import load_tokenizer
from alignjax.model import ModelConfig, decoder
from alignjax.runs.config import resolve
from alignjax.runs.run import Run
from alignjax.sampling.generate import make_generate, pad_of
from alignjax.serving.app import Server
from alignjax.serving.engine import Engine
from alignjax.serving.served import Served
from alignjax.system import malloc, sharding
from benchmarks import result
from benchmarks.step_time import MODEL, spread

TOKENIZER = str(pathlib.Path(__file__).parents[1] / "configs" / "smoke" / "tokenizer.model")
CLIENTS = (1, 8, 32)
PROMPT, NEW = 32, 64
TINY = {"layers": 2, "embed": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 128}
LANES, SLOTS, CONTEXT = 48, 16, 128  # of the storm
DISTINCT = 200  # requests of the storm that are sent again and again


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5, help="times that server and generate take turns")
  parser.add_argument("--storm", type=int, default=10_000, help="requests of the storm; 0: none")
  a = parser.parse_args()
  numbers: dict[str, Any] = {"question": __doc__.splitlines()[0], "rounds": a.rounds, "throughput": {}}
  if a.rounds:
    run = random_run(MODEL)
    with listening(run, max(CLIENTS), 128) as port:
      for clients in CLIENTS:
        numbers["throughput"][str(clients)] = throughput(run, port, clients, a.rounds)
        print(clients, json.dumps(numbers["throughput"][str(clients)]), flush=True)
    result.write("serving", numbers)
  if a.storm:
    numbers["storm"] = storm(a.storm)
    print(json.dumps(numbers["storm"], indent=2))
  print("wrote", result.write("serving", numbers))


def random_run(sizes: dict[str, Any]) -> Run:
  """A run of random weights that has taken no step."""
  tokenizer = load_tokenizer(TOKENIZER)
  sizes = {"vocab": tokenizer.vocab_size} | sizes
  config = resolve(
    {"model": sizes, "data": {"tokenizer": TOKENIZER}, "algorithm": {"name": "sft"}, "run": {"steps": 1}}
  )
  model = decoder.make(ModelConfig(**sizes))
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    params = jax.jit(model.init)(jax.random.key(0))
  return Run(config, 0, params, model, tokenizer, mesh, {}, {})


@contextlib.contextmanager
def listening(run: Run, slots: int, context: int, queue: int = 10_000) -> Iterator[int]:
  """The port of a server of a run in this process."""
  with jax.set_mesh(run.mesh):
    engine = Engine(run, slots, context)
    engine.warm()
  server = Server({"model": Served("model", "", engine)}, queue)
  config = uvicorn.Config(server.application(), host="127.0.0.1", port=0, log_level="warning", access_log=False)
  socket = config.bind_socket()
  socket.listen(config.backlog)  # clients may come before the thread does
  uvicorn_server = uvicorn.Server(config)
  thread = threading.Thread(target=lambda: asyncio.run(uvicorn_server.serve([socket])))
  thread.start()
  try:
    yield socket.getsockname()[1]
  finally:
    uvicorn_server.should_exit = True
    thread.join()
    assert engine.busy == 0, "a slot was never freed"
    assert not engine.waiting, "a job was never answered"


def send(port: int, lanes: list[list[dict[str, Any]]]) -> dict[str, Any]:
  """Sends requests from a process of clients, and returns what they got."""
  with tempfile.TemporaryDirectory() as folder:
    plan, answers = (os.path.join(folder, name) for name in ("plan.json", "answers.json"))
    pathlib.Path(plan).write_text(json.dumps({"port": port, "lanes": lanes}))
    subprocess.run([sys.executable, "-m", "benchmarks.serving_client", plan, answers], check=True)
    return json.loads(pathlib.Path(answers).read_text())


def throughput(run: Run, port: int, clients: int, rounds: int) -> dict[str, Any]:
  """Tokens/s and latencies of so many clients, beside `generate` in batches of as many rows."""
  each = {1: 8, 8: 4, 32: 3}[clients]
  prompts = np.random.default_rng(0).integers(16, 512, (each, clients, PROMPT))
  body = {"model": "model", "max_tokens": NEW, "temperature": 1.0}
  lanes = [
    [
      {"path": "/v1/completions", "body": json.dumps(body | {"prompt": prompts[k, c].tolist(), "seed": k})}
      for k in range(each)
    ]
    for c in range(clients)
  ]
  generate = make_generate(run.model, NEW)
  ids = np.arange(clients, dtype=np.int32)
  options = {"stop_id": run.tokenizer.stop_id, "pad_id": pad_of(run.tokenizer), "temperature": 1.0}

  def static() -> float:
    began = time.perf_counter()
    tokens = 0
    for k in range(each):
      samples = generate(
        run.params,
        prompts[k].astype(np.int32),
        np.full(clients, PROMPT, np.int32),
        key=jax.random.key(k),
        prompt_ids=0 * ids,
        sample_ids=0 * ids,
        **options,
      )
      tokens += int(samples.lengths.sum())
    return tokens / (time.perf_counter() - began)

  rates: dict[str, list[float]] = {"served": [], "generate": []}
  seconds: list[float] = []
  with jax.set_mesh(run.mesh):
    for turn in range(rounds + 1):
      answers = send(port, lanes)
      rate = static()
      if not turn:  # it compiles
        continue
      tokens = sum(
        json.loads(answer)["usage"]["completion_tokens"] for lane in answers["lanes"] for _, answer, _ in lane
      )
      rates["served"].append(tokens / answers["seconds"])
      rates["generate"].append(rate)
      seconds += [took for lane in answers["lanes"] for _, _, took in lane]
  arrays = {name: np.array(values) for name, values in rates.items()}
  return {
    "requests": clients * each,
    "tokens_per_s": {name: spread(values) for name, values in arrays.items()},
    "over_generate": spread(arrays["served"] / arrays["generate"]),
    "latency_s": {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))},
  }


@dataclasses.dataclass
class Kinds:
  """Requests of the storm: those that are answered, and bodies that are refused with a status."""

  good: list[dict[str, Any]]
  bad: list[tuple[dict[str, Any], int]]


def kinds(rng: random.Random) -> Kinds:
  """Draws the distinct requests of the storm."""
  words = ["ball", "red", "Who", "has", "the", "12", "+", "7", "please", "\N{SNOWMAN}", "why", "\n"]
  good = []
  for number in range(DISTINCT):
    text = "Tell " + " ".join(rng.choices(words, k=rng.randint(1, 20)))
    options: dict[str, Any] = {
      "model": "model",
      "max_tokens": rng.randint(1, 32),
      "seed": number,
      "temperature": rng.choice([0, 0.5, 1, 1.3]),
      "top_p": rng.choice([1, 1, 0.8]),
      "top_k": rng.choice([0, 0, 7]),
      "n": rng.choice([1, 1, 1, 2]),
      "stop": rng.choice([None, None, "e", ["a", "on"]]),
      "stream": rng.random() < 0.3,
    }
    if rng.random() < 0.5:
      path = "/v1/chat/completions"
      options["messages"] = [{"role": "user", "content": text}]
    else:
      path = "/v1/completions"
      options["prompt"] = text
      if not options["stream"] and rng.random() < 0.3:
        options |= {"echo": True, "logprobs": rng.choice([1, 3])}
    good.append({"path": path, "body": json.dumps(options)})
  chat, complete = "/v1/chat/completions", "/v1/completions"
  long = json.dumps({"model": "model", "prompt": list(range(16, 416)), "max_tokens": 4})
  bad = [
    ({"path": chat, "body": "{"}, 400),
    ({"path": chat, "body": "[" * 5000}, 400),
    ({"path": complete, "body": json.dumps({"model": "model", "prompt": "a", "logit_bias": {"3": 1}})}, 400),
    ({"path": complete, "body": json.dumps({"model": "model", "prompt": [[10**8]]})}, 400),
    ({"path": chat, "body": json.dumps({"model": "none", "messages": [{"role": "user", "content": "a"}]})}, 404),
    ({"path": complete, "body": long}, 400),
    ({"path": complete, "body": json.dumps({"model": "model", "prompt": "word " * 20_000})}, 400),
    ({"path": complete, "body": json.dumps({"model": "model", "prompt": "a", "max_tokens": 10**6})}, 400),
  ]
  return Kinds(good, bad)


def substance(status: int, body: str) -> Any:
  """What of an answer must be the same every time: not its id and time; a stream counts as its whole."""
  if not body.startswith("data: "):
    record = json.loads(body)
    if status != 200:
      return record
    return [rounded(choice) for choice in record["choices"]]
  texts: dict[int, list[Any]] = {}
  for line in body.split("\n\n"):
    if line and line != "data: [DONE]":
      for choice in json.loads(line[6:])["choices"]:
        whole = texts.setdefault(choice["index"], ["", None])
        whole[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        whole[1] = choice["finish_reason"] or whole[1]
  return sorted(texts.items())


def rounded(value: Any) -> Any:
  """A JSON value with its log-probs rounded: programs of other shapes sum in another order."""
  if isinstance(value, float):
    return round(value, 3)
  if isinstance(value, list):
    return [rounded(item) for item in value]
  if isinstance(value, dict):
    return {key: rounded(item) for key, item in value.items() if key not in ("top_logprobs", "token_logprobs")}
  return value


def memory() -> float:
  """Resident memory of this process, MiB."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def storm(requests: int) -> dict[str, Any]:
  """Sends requests of all kinds at once, and compares every answer with that of the same request alone."""
  rng = random.Random(0)
  drawn = kinds(rng)
  run = random_run(TINY)
  # Larger embeddings than at initialisation: logits that differ enough for their order to matter.
  run = run._replace(params=run.params | {"embed": 8 * run.params["embed"]})
  with listening(run, SLOTS, CONTEXT) as port:
    alone = {}
    (lane,) = send(port, [drawn.good])["lanes"]
    for request, (status, body, _) in zip(drawn.good, lane, strict=True):
      assert status == 200, body
      alone[request["body"]] = substance(status, body)
    parts = []
    for share in (0.2, 0.8):  # memory is read after the first, when all programs are compiled
      parts.append(wave(port, drawn, alone, int(requests * share), rng) | {"memory_mib": round(memory(), 1)})
    threads = threading.active_count()
  names = [name for name in parts[0] if name not in ("memory_mib", "seconds")]
  total = {name: sum(part[name] for part in parts) for name in names}
  return total | {
    "requests": requests,
    "seconds": round(sum(part["seconds"] for part in parts), 1),
    "lanes": LANES,
    "slots": SLOTS,
    "distinct": DISTINCT,
    "memory_mib": {"after_a_fifth": parts[0]["memory_mib"], "at_the_end": parts[1]["memory_mib"]},
    "threads": threads,
  }


def wave(port: int, drawn: Kinds, alone: dict[str, Any], requests: int, rng: random.Random) -> dict[str, Any]:
  """Sends a part of the storm; counts the answers by what they are."""
  lanes: list[list[dict[str, Any]]] = [[] for _ in range(LANES)]
  expected: list[list[int | None]] = [[] for _ in range(LANES)]
  for number in range(requests):
    chance = rng.random()
    request = rng.choice(drawn.good)
    status: int | None = None
    if chance < 0.08:
      request = request | {"leave": rng.choice([0, 0.001, 0.01, 0.05, 0.2])}
    elif chance < 0.16:
      request, status = rng.choice(drawn.bad)
    lanes[number % LANES].append(request)
    expected[number % LANES].append(status)
  answers = send(port, lanes)
  counts = {"equal": 0, "different": 0, "left": 0, "refused": 0, "wrongly_answered": 0}
  for requests_of, statuses, got in zip(lanes, expected, answers["lanes"], strict=True):
    for request, status, (came, body, _) in zip(requests_of, statuses, got, strict=True):
      if "leave" in request:
        counts["left"] += 1
      elif status is not None:
        counts["refused" if came == status else "wrongly_answered"] += 1
      elif came != 200:
        counts["wrongly_answered"] += 1
      else:
        counts["equal" if substance(came, body) == alone[request["body"]] else "different"] += 1
  return counts | {"seconds": answers["seconds"]}


if __name__ == "__main__":
  malloc.keep_freed()  # as the command line does
  main()
