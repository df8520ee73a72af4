import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from unittest import mock

import pytest

from alignjax.errors import InputError
from alignjax.system import output
from tests import killed, smoke

ROOT = os.geteuid() == 0
NOBODY = 65534


@contextlib.contextmanager
def mounted(path, options):
  """A tmpfs, if this user may mount one."""
  path.mkdir()
  made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, check=False)
  if made.returncode:
    pytest.skip("mounts no file system here")
  try:
    yield path
  finally:
    subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def held_elsewhere(path, record=b"{}"):
  """Another process has the lock of a file; it gives itself."""
  program = """
    import fcntl, os, sys
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.write(fd, sys.argv[2].encode())
    print("held", flush=True)
    sys.stdin.read()
  """
  command = [sys.executable, "-c", textwrap.dedent(program), str(path), record.decode()]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
  path = tmp_path / "new" / "a.json"
  output.write(path, "first é\n")
  path.chmod(0o640)
  output.write(path, b"second")
  assert path.read_bytes() == b"second"
  assert path.stat().st_mode & 0o777 == 0o640
  assert smoke.files(tmp_path) == {"new/a.json": b"second"}


def test_links_stay_and_what_they_point_to_is_written(tmp_path):
  there, link, dangling = tmp_path / "there", tmp_path / "link", tmp_path / "dangling"
  there.write_text("old")
  link.symlink_to(there)
  dangling.symlink_to(tmp_path / "not yet")
  output.write(link, "new")
  output.write(dangling, "made")
  assert link.is_symlink()
  assert there.read_text() == "new"
  assert dangling.is_symlink()
  assert (tmp_path / "not yet").read_text() == "made"


def test_an_error_in_between_leaves_the_old_file_and_nothing_else(tmp_path):
  def half(path):
    with output.file(path) as out:
      out.write("half of the n")
      raise KeyboardInterrupt

  output.write(tmp_path / "a", "old")
  for path in (tmp_path / "a", tmp_path / "made" / "for" / "it"):
    with pytest.raises(KeyboardInterrupt):
      half(path)
  assert smoke.files(tmp_path) == {"a": b"old"}
  assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_text_that_is_no_text_is_one_line_and_leaves_the_old_file(tmp_path):
  output.write(tmp_path / "a", "old")
  with pytest.raises(InputError, match=r"a: its text has \\ud800, half of a character"):
    output.write(tmp_path / "a", "new \ud800")
  assert smoke.files(tmp_path) == {"a": b"old"}


def bad_places(folder: Path) -> dict[str, tuple[Path, str]]:
  """Where no file can be written, and what is said of it."""
  (folder / "file").write_text("")
  (folder / "folder").mkdir()
  (folder / "loop").symlink_to(folder / "loop")
  (folder / "frozen").write_text("")
  return {
    "a folder": (folder / "folder", "is a folder"),
    "below a file": (folder / "file" / "a", "is a file, not a folder"),
    "far below a file": (folder / "file" / "a" / "b" / "c", "is a file, not a folder"),
    "a loop": (folder / "loop", "loop of symbolic links"),
    "below a loop": (folder / "loop" / "a", "loop of symbolic links|is a file, not a folder"),
    "the kernel's": (Path("/proc/alignjax"), "permission denied|not permitted|read-only"),
    "below the kernel's": (Path("/proc/alignjax/a"), "permission denied|not permitted|read-only"),
    "a full device": (Path("/dev/full"), "is a device or a pipe"),
    "a null device": (Path("/dev/null"), "is a device or a pipe"),
    "a long name": (folder / ("n" * 300), "name is too long"),
    "a null byte": (Path(f"{folder}/a\0b"), "is no name of a file"),
  }


@pytest.mark.parametrize("name", [
  "a folder", "below a file", "far below a file", "a loop", "below a loop", "the kernel's", "below the kernel's",
  "a full device", "a null device", "a long name", "a null byte",
])  # fmt: skip
def test_what_cannot_be_written_is_one_line_before_the_work(tmp_path, name):
  path, said = bad_places(tmp_path)[name]
  before = smoke.files(tmp_path)
  with pytest.raises(InputError, match=said) as caught, output.file(path, "--out"):
    raise AssertionError("the work began")
  assert "\n" not in str(caught.value)
  assert str(caught.value).lstrip("'").startswith("--out=")
  with pytest.raises(InputError, match=said):
    output.check_file(path)
  if name != "a folder":
    with pytest.raises(InputError):
      output.check_folder(path / "below")
    with pytest.raises(InputError), output.lock(path, "trains"):
      raise AssertionError("the work began")
    with pytest.raises(InputError), output.folder(path):
      raise AssertionError("the work began")
  assert smoke.files(tmp_path) == before


def test_a_missing_folder_is_made_or_asked_for(tmp_path):
  with pytest.raises(InputError, match=r"--out=.*/no/a: cannot be written \(no such .*\); .* make its folder"):
    output.write(tmp_path / "no" / "a", "", "--out", parents=False)
  output.check_file(tmp_path / "no" / "a")
  output.check_folder(tmp_path / "no" / "a")
  assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not ROOT, reason="becomes another user")
def test_permissions_are_those_of_the_user(tmp_path):
  frozen = tmp_path / "frozen"
  frozen.mkdir()
  (frozen / "mine").write_text("old")
  tmp_path.chmod(0o755)
  os.seteuid(NOBODY)
  try:
    for work in (
      lambda: output.write(frozen / "a", "", "--out"),
      lambda: output.check_folder(frozen / "b", "--out"),
      lambda: output.write(frozen / "mine", "new"),
      lambda: contextlib.ExitStack().enter_context(output.lock(frozen, "trains")),
      lambda: contextlib.ExitStack().enter_context(output.folder(frozen / "c")),
    ):
      with pytest.raises(InputError, match="permission denied"):
        work()
  finally:
    os.seteuid(0)
  assert smoke.files(frozen) == {"mine": b"old"}


def test_a_read_only_file_system_is_one_line(tmp_path):
  with mounted(tmp_path / "frozen", "size=64k") as frozen:
    subprocess.run(["mount", "-o", "remount,ro", str(frozen)], check=True)
    with pytest.raises(InputError, match="read-only"):
      output.write(frozen / "a", "")
    with pytest.raises(InputError, match="read-only"):
      output.check_folder(frozen / "a" / "b")
    with pytest.raises(InputError, match="read-only"), output.lock(frozen, "trains"):
      pass


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
  with mounted(tmp_path / "small", "size=64k") as small:
    output.write(small / "a", "old")
    with pytest.raises(InputError, match=r"small/a: cannot be written \(the disk is full\); make room"):
      output.write(small / "a", bytes(200_000))
    with pytest.raises(InputError, match="the disk is full"), output.folder(small / "b") as folder:
      output.write(folder / "c", bytes(200_000))
    assert smoke.files(small) == {"a": b"old"}
    output.write(small / "a", "new")
    filling = small / "filling"
    with contextlib.suppress(OSError):
      filling.write_bytes(bytes(60_000))
      filling.open("ab").write(bytes(60_000))
    for work in (
      lambda: output.check_file(small / "b"),
      lambda: output.check_folder(small / "b"),
      lambda: contextlib.ExitStack().enter_context(output.lock(small / "b", "trains")),
    ):
      with pytest.raises(InputError, match="the disk is full"):
        work()
    filling.unlink()
    assert smoke.files(small) == {"a": b"new"}


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  output.write(tmp_path / "a", "old")
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  try:
    with pytest.raises(InputError, match="limit on a file's size"):
      output.write(tmp_path / "a", bytes(20_000))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert smoke.files(tmp_path) == {"a": b"old"}


def test_a_disk_that_fills_when_all_is_written_is_one_line(tmp_path):
  output.write(tmp_path / "a", "old")
  out = output.file(tmp_path / "a")
  file = out.__enter__()
  file.write("new")
  full = mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device"))
  with full, pytest.raises(InputError, match="the disk is full"):
    out.__exit__(None, None, None)
  assert smoke.files(tmp_path) == {"a": b"old"}


def test_what_is_written_is_synced_before_it_is_renamed(tmp_path):
  order = []
  synced, replaced = os.fsync, os.replace
  sync = lambda fd: (order.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), synced(fd))
  replace = lambda a, b: (order.append(("rename", b)), replaced(a, b))
  with mock.patch("os.fsync", sync), mock.patch("os.replace", replace):
    output.write(tmp_path / "a", "new")
  name = str(tmp_path / "a")
  assert order[-3:] == [("sync", f"{name}.partial"), ("rename", name), ("sync", str(tmp_path))]


def test_two_processes_do_not_write_one_file_at_once(tmp_path):
  path = tmp_path / "a.json"
  owner = b'{"pid": 7, "host": "far", "doing": "writes", "since": "noon"}'
  with held_elsewhere(f"{path}.partial", owner) as process:
    with pytest.raises(InputError, match=r"--out=.*: process 7 on far writes here since noon; wait for it"):
      output.write(path, "", "--out")
    process.kill()
    process.wait()
    output.write(path, "mine")  # the lock went with the process
  assert smoke.files(tmp_path) == {"a.json": b"mine"}


def test_two_processes_do_not_work_in_one_folder(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  (run / "kept").write_text("")
  owner = b'{"pid": 7, "host": "far", "doing": "trains", "since": "noon"}'
  with held_elsewhere(run / output.LOCK, owner) as process:
    refused = pytest.raises(InputError, match=r"--workdir=.*run: process 7 on far trains here since noon; .* --workdir")
    with refused, output.lock(run, "trains", "--workdir"):
      raise AssertionError("the work began")
    process.kill()
    process.wait()
    with output.lock(run, "trains"):
      record = json.loads((run / output.LOCK).read_text())
      assert record["pid"] == os.getpid()
      assert record["doing"] == "trains"
  assert smoke.files(tmp_path) == {"run/kept": b""}


def test_the_lock_is_the_threads_own_and_may_be_taken_again(tmp_path):
  said = []

  def other():
    try:
      with output.lock(tmp_path / "link", "trains"):
        said.append("in")
    except InputError as error:
      said.append(str(error))

  (tmp_path / "link").symlink_to(tmp_path / "run")
  with output.lock(tmp_path / "run", "trains"), output.lock(tmp_path / "run", "trains"):
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
  assert len(said) == 1
  assert "another thread of this process trains here" in said[0]
  other()
  assert said[1:] == ["in"]
  assert [child.name for child in tmp_path.iterdir()] == ["link"]  # nothing came into the folder: it went again


def test_a_file_system_without_locks_is_no_obstacle(tmp_path):
  without = mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available"))
  with without, output.lock(tmp_path / "run", "trains"):
    output.write(tmp_path / "run" / "a", "x")
  assert smoke.files(tmp_path) == {"run/a": b"x"}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
  out = tmp_path / "new" / "model"

  def work():
    with output.folder(out) as folder:
      output.write(folder / "weights", bytes(10))
      (folder / "deep").mkdir()
      output.write(folder / "deep" / "config", "{}")
      assert not out.exists()

  work()
  assert smoke.files(tmp_path) == {"new/model/weights": bytes(10), "new/model/deep/config": b"{}"}
  with pytest.raises(InputError, match="is not empty"):
    work()
  assert [child.name for child in out.parent.iterdir()] == ["model"]


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path):
  (tmp_path / "real").mkdir()
  (tmp_path / "link").symlink_to("real")
  with output.folder(tmp_path / "link") as folder:
    output.write(folder / "a", "x")
  assert (tmp_path / "link").is_symlink()
  assert smoke.files(tmp_path / "real") == {"a": b"x"}
  with pytest.raises(InputError, match="is the root of a file system"), output.folder("/"):
    pass


def test_an_error_in_a_folder_leaves_nothing(tmp_path):
  def half():
    with output.folder(tmp_path / "new" / "model") as folder:
      output.write(folder / "a", "x")
      raise KeyError

  with pytest.raises(KeyError):
    half()
  assert not list(tmp_path.iterdir())


def test_two_processes_do_not_fill_one_folder(tmp_path):
  with output.folder(tmp_path / "model") as folder:
    output.write(folder / "a", "x")
    refused = pytest.raises(InputError, match=rf"process {os.getpid()} on .* writes here")
    with refused, output.folder(tmp_path / "model"):
      raise AssertionError("the work began")
  assert smoke.files(tmp_path) == {"model/a": b"x"}


def test_after_a_kill_at_any_write_the_same_work_ends_the_same(tmp_path):
  def work():
    root = tmp_path / "root"
    with output.lock(root, "trains"):
      output.write(root / "a" / "b.json", "{}")
      output.write(root / "a" / "b.json", '{"new": 1}')
      output.write_json(root / "c.json", {"d": 1})
      if not (root / "folder").exists():
        with output.folder(root / "folder") as folder:
          output.write(folder / "one", "1")
          output.write(folder / "two", "2")

  assert killed.at_every_write(tmp_path / "root", work) > 15


def test_a_flipped_byte_of_what_is_read_back_is_found(tmp_path):
  path, record = tmp_path / "a.json", {"steps": 10, "loss": 0.25, "names": ["a", None], "é": {"b": True}}
  output.write_json(path, record)
  assert output.read_json(path) == record
  content = path.read_bytes()
  for place in range(len(content)):
    for bit in (1, 16, 128):
      changed = bytearray(content)
      changed[place] ^= bit
      path.write_bytes(changed)
      with contextlib.suppress(output.DamagedError):
        assert output.read_json(path) == record, changed  # between two words, a blank for a blank
  for cut in (0, 1, len(content) // 2, len(content) - 3):
    path.write_bytes(content[:cut])
    with pytest.raises(output.DamagedError, match=r"a\.json: is damaged"):
      output.read_json(path)
  path.write_text(json.dumps(record))
  assert output.read_json(path) == record  # of an earlier version


def test_a_folder_is_copied_whole_without_the_hold_on_it(tmp_path):
  with output.lock(tmp_path / "run", "trains"):
    output.write(tmp_path / "run" / "a", "x")
    output.write(tmp_path / "run" / "b" / "c", "y")
    output.copy_folder(tmp_path / "run", tmp_path / "best")
  assert smoke.files(tmp_path / "best") == {"a": b"x", "b/c": b"y"}


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
  output.write(tmp_path / "real" / "a", "x")
  (tmp_path / "link").symlink_to("real")
  output.remove(tmp_path / "link")
  output.remove(tmp_path / "not there")
  assert smoke.files(tmp_path) == {"real/a": b"x"}
  output.remove(tmp_path / "real")
  assert not list(tmp_path.iterdir())


def test_an_object_store_has_no_locks_and_writes_beside(tmp_path):
  def half():
    with output.file(tmp_path / "a") as out:
      out.write("half")
      raise KeyError

  with mock.patch.object(output, "local", return_value=False):
    output.write(tmp_path / "a", "old")
    with pytest.raises(KeyError):
      half()
    with output.lock(tmp_path, "trains"), output.lock(tmp_path, "trains"):
      pass
    with output.folder(tmp_path / "folder") as folder:
      output.write(folder / "b", "x")
  assert smoke.files(tmp_path) == {"a": b"old", "folder/b": b"x"}
