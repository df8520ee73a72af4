"""A preflight as lines for people."""

from alignjax.preflight import chip as chips
from alignjax.preflight.estimate import Estimate
from alignjax.preflight.run import Preflight

_GIB = 2**30


def report(found: Preflight) -> list[str]:
  """What the compiler says, step by step, and the verdict; not the levers, which are told as they are tried."""
  place, mesh = found.place, " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
  kind = place.chip.kind if place.chip else "CPU"
  slices = f" x {place.slices} slices" if place.slices > 1 else ""
  lines = [
    f"{place.topology}{slices}: {len(place.devices)} x {kind}, {mesh}; "
    f"{found.parameters / 1e9:.3f} B parameters, {found.tokens:,} tokens a step",
    f"compiler estimates ({chips.compiler(place.chip)}), not measurements; per device",
  ]
  for estimate in found.estimates:
    lines += _lines(estimate)
  if found.decode:
    d, ms = found.decode, lambda name: f"{found.decode[name] * 1e3:.2f} ms"
    reads = f"{d['weights_bytes'] / _GIB:.2f} GiB of weights and {d['cache_bytes'] / _GIB:.2f} of cache"
    times = f"at least {ms('floor_seconds')}; by cycles {ms('seconds')}, {d['ratio']:.1f} times that"
    lines.append(f"a decode step reads {reads}: {times}")
  if found.mfu_ceiling:
    lines.append(f"MFU of the update: at most {found.mfu_ceiling:.0%}, by its bound against the datasheet's peak")
  fits = "every step fits" if place.chip else "every step compiles; what a CPU's memory holds is not asked"
  lines.append(fits if found.fits else "does not fit")
  return lines


def _lines(e: Estimate) -> list[str]:
  m = e.memory
  sizes = {**m.arguments, **{f"({name})": size for name, size in m.beside.items()}}
  sizes |= {"temporaries": m.temporaries, "output": m.output}
  parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sizes.items() if size >= 0.005 * _GIB)
  verdict = ""
  if m.capacity:
    spare = (m.capacity - m.total) / m.capacity
    verdict = f" of {m.capacity / _GIB:.2f}: " + (f"fits, {spare:.0%} to spare" if m.fits else f"{-spare:.0%} too much")
  lines = [
    f"{e.step}  (compiled in {e.compile_seconds:.0f} s)",
    f"  memory   {m.total / _GIB:.2f} GiB{verdict}; most: {m.largest}",
    f"           GiB: {parts or 'next to nothing'}  (in brackets: resident, not read by this step)",
  ]
  if m.host:
    lines.append(f"           and {m.host / _GIB:.2f} GiB of the host's memory for each device")
  if e.temporaries:
    lines.append(f"           largest temporaries: {'; '.join(e.temporaries)}")
  traffic = ""
  if e.totals:
    traffic = f", HBM {e.totals.hbm / 1e9:.1f} GB"
    if e.totals.open_loops:
      traffic += f"  (open loops counted {e.turns} times)"
  work = f"matmuls {e.flops / 1e12:.3g} TFLOP"
  if e.kernel_flops and e.totals:
    work += f", {e.kernel_flops / 1e12:.3g} of them in {e.totals.kernels:,} kernels"
  lines.append(f"  work     {work}{traffic}")
  if e.totals and e.totals.count:
    kinds = [f"{kind} {n:,} ({e.totals.wire[kind] / 1e9:.2f} GB)" for kind, n in sorted(e.totals.count.items())]
    lines.append(f"  sends    {', '.join(kinds)}")
  if e.seconds:
    each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in e.seconds.items())
    lines.append(f"  bound    {e.bound}: at least {e.step_seconds:.3g} s  ({each})")
  return lines
