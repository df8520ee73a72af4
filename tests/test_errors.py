"""What becomes one line and which status; what keeps its traceback; Ctrl-C and closed pipes of whole processes."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from alignjax import errors
from alignjax.errors import InputError, exit_status
from alignjax.system import output
from tests import smoke

LINE = "alignjax: interrupted; run the same command again to go on\n"


def status_of(error):
  """The status of a command that raises this."""

  def main(argv):
    raise error

  return exit_status(main, [])


@pytest.mark.parametrize(
  ("number", "line"),
  [
    (errno.EACCES, "permission denied; get the permission, or choose another place"),
    (errno.ENOSPC, "the disk is full; make room, or choose another place; then run the same command again"),
    (errno.EROFS, "the file system is read-only; choose a place that can be written"),
    (errno.EISDIR, "is a folder; name a file"),
    (errno.ENOTDIR, "a part of this path is a file, not a folder; correct the path"),
    (errno.ELOOP, "a loop of symbolic links; correct the link, or choose another place"),
    (errno.ENAMETOOLONG, "the name is too long; choose a shorter one"),
    (errno.EMFILE, "too many open files; raise the limit (ulimit -n)"),
    (errno.EIO, "Input/output error; look at this file, device or connection, then run the same command again"),
  ],
)
def test_what_the_system_refuses_is_one_line_with_place_and_remedy(number, line, tmp_path, capsys):
  error = OSError(number, os.strerror(number), "some/place")
  assert status_of(error) == 2
  assert capsys.readouterr().err == f"alignjax: some/place: {line}\n"
  reason, remedy = errors.refusal(error)
  with pytest.raises(InputError) as caught, output.failing(tmp_path / "a", "--out"):  # of an output in the same words
    raise error
  assert str(caught.value) == f"--out={tmp_path / 'a'}: cannot be written ({reason}); {remedy}"


def test_an_error_of_the_system_without_a_path_is_one_line_too(capsys):
  assert status_of(OSError(errno.ENOSPC, "No space left on device")) == 2
  assert capsys.readouterr().err.startswith("alignjax: an input or output: the disk is full; make room")


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 8 TiB"), InputError("a\n  b")])
def test_memory_and_input_are_one_line(error, capsys):
  assert status_of(error) == 2
  assert capsys.readouterr().err.count("\n") == 1


def test_memory_of_the_device_is_one_line(capsys):
  error = type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: Out of memory allocating\n9 bytes")
  assert status_of(error) == 2
  line = capsys.readouterr().err
  assert "the device has not enough memory" in line
  assert "data.rows" in line
  assert line.count("\n") == 1


def test_interrupt_is_one_line(capsys):
  assert status_of(KeyboardInterrupt()) == 130
  assert capsys.readouterr().err == LINE


@pytest.mark.parametrize(
  "error",
  [KeyError("x"), AssertionError(), TypeError("x"), ValueError("x"), RuntimeError("gloo"), RecursionError("deep")],
)
def test_a_fault_of_the_program_keeps_its_traceback(error):
  with pytest.raises(type(error)):
    status_of(error)


def test_a_broken_pipe_that_is_not_of_the_output_is_said(capsys):
  assert status_of(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 2
  assert "Broken pipe" in capsys.readouterr().err


def test_a_loop_that_saved_at_an_interrupt_is_no_success(capsys):
  def main(argv):
    errors.note_interrupt("stopping")
    return 0

  assert exit_status(main, []) == 130
  assert capsys.readouterr().err == "alignjax: stopping\n"
  assert exit_status(lambda argv: 0, []) == 0  # the next command's own


@pytest.mark.parametrize("value", [None, 5, [], b"x", "", "a\0b"])
def test_what_is_no_path_is_an_input_error(value):
  with pytest.raises(InputError, match="workdir"):
    errors.check_path("workdir", value)


HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # though the tests run behind nohup
PROGRAM = f"""
{HEARD}
import sys
from alignjax import errors; from alignjax.system import output
errors.watch_interrupts()
{{setup}}
def main(argv):
  {{body}}
sys.exit(errors.run_process(main))
"""


def start(body, setup=""):
  """A process of a few lines that runs under the boundary, without JAX."""
  program = PROGRAM.format(setup=setup, body=body.replace("\n", "\n  "))
  return subprocess.Popen(
    [sys.executable, "-c", program], cwd=smoke.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def test_a_reader_that_has_gone_ends_the_command_quietly():
  for body in ("for i in range(10**6): print(i)", "print(1)\nimport time; time.sleep(0.5)"):
    process = start(f"{body}\nreturn 0")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_full_standard_output_is_one_line():
  if not os.path.exists("/dev/full"):
    pytest.skip("no /dev/full")
  with open("/dev/full", "w") as full:
    program = PROGRAM.format(setup="", body="print(1)\n  return 0")
    done = subprocess.run(
      [sys.executable, "-c", program], cwd=smoke.ROOT, stdout=full, stderr=subprocess.PIPE, text=True
    )
  assert done.returncode == 2
  assert "the disk is full; make room" in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "body",
  [
    "print('there', flush=True)\nimport time; time.sleep(60)",
    "print('there', flush=True)\nwhile True: pass",
    "print('there', flush=True)\ntry:\n  import time; time.sleep(60)\nexcept BaseException: time.sleep(60)",
    # held beside Python's lock, as a compilation is: the main thread does not come back
    "import ctypes\nprint('there', flush=True)\nctypes.CDLL(None).sleep(60); ctypes.CDLL(None).sleep(60)",
  ],
)
def test_interrupt_ends_whatever_is_running(body):
  process = start(body)
  assert process.stdout.readline() == "there\n"
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=20)
  assert (process.returncode, out, err) == (130, "", LINE)


def test_interrupt_while_imports_run_is_one_line():
  process = start("return 0", setup="print('there', flush=True)\nimport time; time.sleep(60)")
  assert process.stdout.readline() == "there\n"
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=20)[1] == LINE
  assert process.returncode == 130


def test_ignored_interrupts_stay_ignored():
  setup = "import os, signal"
  program = PROGRAM.format(setup=setup, body="os.kill(os.getpid(), signal.SIGINT)\n  return 0")
  command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", program.replace(HEARD, "")]
  done = subprocess.run(command, cwd=smoke.ROOT, capture_output=True)
  assert (done.returncode, done.stderr) == (0, b"")


def interrupted(argv, seconds):
  """Status and standard error of a command that is told to stop after some seconds."""
  entry = f"{HEARD}; import sys; from alignjax.cli import entry; sys.exit(entry())"
  command = [sys.executable, "-c", entry, *map(str, argv)]
  process = subprocess.Popen(command, cwd=smoke.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  return process.returncode, err, out


@pytest.mark.long
@pytest.mark.parametrize("verb", ["train", "generate", "evaluate"])
def test_interrupt_of_a_command_is_one_line_at_every_moment(verb, tmp_path):
  workdir = smoke.finished("sft")[0]
  argv = {
    "train": smoke.arguments("dpo", tmp_path / "run", "run.steps=100000"),
    "generate": ("generate", "--workdir", workdir, "--prompt", "Hi", "--num", 4096, "--max-new-tokens", 256),
    "evaluate": ("evaluate", "--workdir", workdir),
  }[verb]
  moments = (0.8, 1.2, 1.8, 2.5, 3.5, 5, 7, 10, 14, 20) if verb == "train" else (1, 2, 3.5, 5)
  for seconds in moments:
    status, err, out = interrupted(argv, seconds)
    if status == 0 and verb != "train":  # over before
      break
    assert status == 130, (seconds, status, err)
    assert "Traceback" not in err, (seconds, err)
    assert err.count("alignjax: ") == 1, (seconds, err)
    assert err.endswith(LINE) or "stopped at step" in out, (seconds, err)


@pytest.mark.long
def test_generate_into_head_ends_quietly(tmp_path):
  workdir = smoke.finished("sft")[0]
  generate = f"{sys.executable} -m alignjax.cli generate --workdir {workdir} --num 200 --max-new-tokens 4 --prompt Hi"
  for reader in ("head -1", "true"):
    command = ["bash", "-c", f"{generate} | {reader}; echo ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=smoke.ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "141"
