"""Chats with a run's policy in the terminal: `alignjax generate --interactive`."""

import io
import sys
from collections.abc import Callable, Iterator

import jax

from alignjax import errors
from alignjax.commands.best_of import Request
from alignjax.data.field import Message
from alignjax.errors import InputError
from alignjax.runs.run import Run, check_writes
from alignjax.sampling.generate import pad_of
from alignjax.sampling.stream import stream

HELP = "/reset forgets the dialogue, /exit (or the end of the input) leaves"


def chat(run: Run, request: Request, ask: Callable[[], str] | None = None) -> None:
  """Answers each line of the user, given the whole dialogue before it, until the input ends.

  An answer is printed while it is sampled; Ctrl-C ends the answer.

  Args:
    run: of a policy.
    request: seed, max_new_tokens, temperature, top_k, top_p.
    ask: returns the next line, or raises EOFError; reads standard input if None.

  Raises:
    InputError: the run is a reward model's, or there are several processes.
  """
  check_writes(run)
  if jax.process_count() > 1:
    raise InputError("--interactive: a dialogue needs one process; this run has several")
  ask = ask or _ask
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")  # a broken byte does not end the dialogue: the user types it again
  print(f"step {run.step}; {HELP}", file=sys.stderr)
  with errors.ctrl_c_raises(), jax.set_mesh(run.mesh):
    params = jax.jit(run.model.unstack)(run.params)
    dialogue: list[Message] = []
    turn = 0
    while (line := _line(ask)) != "/exit":
      if line == "/reset":
        dialogue = []
      elif _broken(line):
        print("this is not UTF-8; type it again", file=sys.stderr)
      elif line.startswith("/"):
        print(HELP, file=sys.stderr)
      elif line:
        dialogue.append({"role": "user", "content": line})
        answer = _say(_pieces(run, params, dialogue, request, turn))
        dialogue.append({"role": "assistant", "content": answer})
        turn += 1


def _ask() -> str:
  """Reads a line from standard input, with a prompt if that is a terminal."""
  if sys.stdin.isatty():
    return input("> ")
  return input()


def _line(ask: Callable[[], str]) -> str:
  """Returns the next line; "/exit" at the end of the input, or at Ctrl-C."""
  try:
    return ask().strip()
  except (EOFError, KeyboardInterrupt):
    return "/exit"


def _broken(line: str) -> bool:
  """Returns True if a line holds bytes that are not UTF-8."""
  try:
    line.encode()
  except UnicodeEncodeError:
    return True
  return False


def _say(pieces: Iterator[str]) -> str:
  """Prints an answer piece by piece, and returns it."""
  printed = []
  try:
    for piece in pieces:
      printed.append(piece)
      print(piece, end="", flush=True)
  except KeyboardInterrupt:
    pass
  print(flush=True)
  return "".join(printed)


def _pieces(run: Run, params, dialogue: list[Message], request: Request, turn: int) -> Iterator[str]:
  """Samples an answer and yields its text in pieces of whole characters: a character may take several tokens.

  Args:
    run: of a policy.
    params: its parameters, with unstacked layers.
    dialogue: ends with the user's turn.
    request: how to sample.
    turn: number of the answer, from 0, which decides its random numbers together with the seed.
  """
  tokenizer = run.tokenizer
  tokens = stream(
    run.model,
    params,
    tokenizer.render(dialogue, add_generation_prompt=True),
    key=jax.random.key(request.seed),
    prompt_id=turn,
    max_new_tokens=request.max_new_tokens,
    stop_id=tokenizer.stop_id,
    pad_id=pad_of(tokenizer),
    temperature=request.temperature,
    top_k=request.top_k or None,
    top_p=None if request.top_p == 1 else request.top_p,
  )
  ids: list[int] = []
  yielded = ""
  for token in tokens:
    ids.append(token)
    text = tokenizer.decode(ids)
    if text.startswith(yielded) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
      yield text[len(yielded) :]
      yielded = text
  text = tokenizer.decode(ids)
  if text != yielded and text.startswith(yielded):
    yield text[len(yielded) :]
  if ids[-1:] != [tokenizer.stop_id]:
    print(f"[cut at --max-new-tokens={request.max_new_tokens}]", file=sys.stderr)
