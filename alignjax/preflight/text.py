"""A preflight as lines of text."""

from alignjax.preflight import chip as chips
from alignjax.preflight.estimate import Estimate
from alignjax.preflight.run import Preflight

_GIB = 2**30


def report(result: Preflight) -> list[str]:
  """Formats the estimates step by step, and the verdict, as lines.

  The levers are not repeated: they are printed as they are tried.
  """
  place = result.place
  kind = place.chip.kind if place.chip else "CPU"
  slices = f" x {place.slices} slices" if place.slices > 1 else ""
  mesh = " x ".join(f"{axis} {size}" for axis, size in result.mesh.items())
  lines = [
    f"{place.topology}{slices}: {len(place.devices)} x {kind}, {mesh}; "
    f"{result.parameters / 1e9:.3f} B parameters, {result.tokens:,} tokens a step",
    f"compiler estimates ({chips.compiler(place.chip)}), not measurements; per device",
  ]
  for estimate in result.estimates:
    lines += _memory_lines(estimate)
    lines += _work_lines(estimate)
  if decode := result.decode:
    reads = f"{decode['weights_bytes'] / _GIB:.2f} GiB of weights and {decode['cache_bytes'] / _GIB:.2f} of cache"
    floor = f"{decode['floor_seconds'] * 1e3:.2f} ms"
    seconds = f"{decode['seconds'] * 1e3:.2f} ms"
    times = f"at least {floor}; by cycles {seconds}, {decode['ratio']:.1f} times that"
    lines.append(f"a decode step reads {reads}: {times}")
  if result.mfu_ceiling:
    lines.append(f"MFU of the update: at most {result.mfu_ceiling:.0%}, by its bound against the datasheet's peak")
  lines.append(_verdict(result))
  return lines


def _verdict(result: Preflight) -> str:
  if not result.fits:
    return "does not fit"
  if result.place.chip:
    return "every step fits"
  return "every step compiles; what a CPU's memory holds is not asked"


def _memory_lines(e: Estimate) -> list[str]:
  """Returns a step's name and its memory."""
  m = e.memory
  sizes = {**m.arguments, **{f"({name})": size for name, size in m.beside.items()}}
  sizes |= {"temporaries": m.temporaries, "output": m.output}
  parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sizes.items() if size >= 0.005 * _GIB)
  verdict = ""
  if m.capacity:
    spare = (m.capacity - m.total) / m.capacity
    fits = f"fits, {spare:.0%} to spare" if m.fits else f"{-spare:.0%} too much"
    verdict = f" of {m.capacity / _GIB:.2f}: {fits}"
  lines = [
    f"{e.step}  (compiled in {e.compile_seconds:.0f} s)",
    f"  memory   {m.total / _GIB:.2f} GiB{verdict}; most: {m.largest}",
    f"           GiB: {parts or 'next to nothing'}  (in brackets: resident, not read by this step)",
  ]
  if m.host:
    lines.append(f"           and {m.host / _GIB:.2f} GiB of the host's memory for each device")
  if e.temporaries:
    lines.append(f"           largest temporaries: {'; '.join(e.temporaries)}")
  return lines


def _work_lines(e: Estimate) -> list[str]:
  """Returns a step's matmuls and traffic, its collectives and its bound."""
  traffic = ""
  if e.totals:
    traffic = f", HBM {e.totals.hbm / 1e9:.1f} GB"
    if e.totals.open_loops:
      traffic += f"  (open loops counted {e.turns} times)"
  work = f"matmuls {e.flops / 1e12:.3g} TFLOP"
  if e.kernel_flops and e.totals:
    work += f", {e.kernel_flops / 1e12:.3g} of them in {e.totals.kernels:,} kernels"
  lines = [f"  work     {work}{traffic}"]
  if e.totals and e.totals.unread:
    lines.append(f"           {e.totals.unread:,} instructions are not understood: nothing of them is in these numbers")
  if e.totals and e.totals.count:
    kinds = [f"{kind} {count:,} ({e.totals.wire[kind] / 1e9:.2f} GB)" for kind, count in sorted(e.totals.count.items())]
    lines.append(f"  sends    {', '.join(kinds)}")
  if e.seconds:
    each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in e.seconds.items())
    lines.append(f"  bound    {e.bound}: at least {e.step_seconds:.3g} s  ({each})")
  return lines
