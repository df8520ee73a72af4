"""A dialogue with a run's policy in the terminal: `alignjax generate --interactive`."""

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
  """Answers line after line, each with the whole dialogue before it, until there is no other.

  An answer is printed as it is sampled; Ctrl-C ends it where it is.

  Args:
    run: of a policy.
    request: seed, max_new_tokens, temperature, top_k, top_p.
    ask: gives the next line, or raises EOFError; reads the standard input if None.

  Raises:
    InputError: the run is a reward model's, or lies on several hosts.
  """
  check_writes(run)
  if jax.process_count() > 1:
    raise InputError("--interactive: a dialogue needs one process; this run has several")
  ask = ask or _ask
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")  # a broken byte would end the dialogue: it is asked for again
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
  return input("> " if sys.stdin.isatty() else "")


def _line(ask: Callable[[], str]) -> str:
  try:
    return ask().strip()
  except (EOFError, KeyboardInterrupt):
    return "/exit"


def _broken(line: str) -> bool:
  """Whether a line holds bytes that are no text."""
  try:
    line.encode()
  except UnicodeEncodeError:
    return True
  return False


def _say(pieces: Iterator[str]) -> str:
  """Prints an answer piece by piece, and returns it."""
  said = []
  try:
    for piece in pieces:
      said.append(piece)
      print(piece, end="", flush=True)
  except KeyboardInterrupt:
    pass
  print(flush=True)
  return "".join(said)


def _pieces(run: Run, params, dialogue: list[Message], request: Request, turn: int) -> Iterator[str]:
  """The text of an answer, as far as it is certain: a character may take several tokens."""
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
  ids, said, token = [], "", None
  for token in tokens:
    ids.append(token)
    text = tokenizer.decode(ids)
    if text.startswith(said) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
      yield text[len(said) :]
      said = text
  if (text := tokenizer.decode(ids)) != said and text.startswith(said):
    yield text[len(said) :]
  if token != tokenizer.stop_id:
    print(f"[cut at --max-new-tokens={request.max_new_tokens}]", file=sys.stderr)
