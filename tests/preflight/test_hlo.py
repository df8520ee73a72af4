"""What is read off a compiled program's text."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.preflight import hlo


def compiled(function, mesh, *specs, shape=(8, 16)):
  """The text of a function of float32 arrays that lie as the specs say."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
  out = NamedSharding(mesh, PartitionSpec())
  return jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text()


def test_a_gather_sends_what_the_others_lack(eight_devices):
  totals = hlo.analyse(compiled(lambda x: x * 2, eight_devices, PartitionSpec("fsdp")))
  assert totals.count == {"all-gather": 1}
  assert totals.wire["all-gather"] == 8 * 16 * 4 * 7 / 8


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs(eight_devices):
  def looped(x):
    whole = NamedSharding(eight_devices, PartitionSpec())
    split = NamedSharding(eight_devices, PartitionSpec("fsdp"))

    def body(x, _):
      x = jax.lax.with_sharding_constraint(jnp.sin(x), whole)
      return jax.lax.with_sharding_constraint(jnp.cos(jnp.cumsum(x, axis=0)), split), None

    return jax.lax.scan(body, x, length=6)[0]

  totals = hlo.analyse(compiled(looped, eight_devices, PartitionSpec("fsdp")))
  assert totals.count["all-gather"] == 7  # the loop's, and that of the result
  assert not totals.open_loops


def test_a_loop_that_data_end_counts_turns_times(one_device):
  def unbounded(x):
    return jax.lax.while_loop(lambda x: jnp.any(x < 3), lambda x: x @ x.T @ x, x)

  one, ten = (hlo.analyse(compiled(unbounded, one_device, PartitionSpec()), turns) for turns in (1, 10))
  assert one.open_loops == ten.open_loops == 1
  assert ten.hbm - one.hbm == pytest.approx(9 * one.body.hbm)


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x=1", 4),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
    ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", 2),
    ("dimensions={0}", 16),
  ],
)
def test_every_way_to_write_a_group_is_read(text, size):
  assert hlo.group_size(text, devices=16) == size


TPU_LOOP = """\
HloModule jit_f, num_partitions=4

%condition (p: (u32[], f32[8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8), metadata={op_name="while"}
  %p = (u32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (q: (u32[], f32[8])) -> (u32[], f32[8]) {
  %q = (u32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%q), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%j, %two)
  %moved = f32[8]{0:T(128)} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %out = (u32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %moved)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %a)
  %loop = (u32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_a_tpu_loop_is_counted_by_its_condition():
  totals = hlo.analyse(TPU_LOOP)
  assert totals.count == {"collective-permute": 4}
  assert totals.wire["collective-permute"] == 4 * 8 * 4


def test_elements_of_tuples_that_have_no_line_of_their_own_are_read_alike():
  own_line = re.compile(r"^  %(\w+) = \S+ get-tuple-element\(%(\w+)\), index=(\d)\n", re.MULTILINE)
  inline = own_line.sub("", TPU_LOOP)
  for name, whole, index in own_line.findall(TPU_LOOP):
    inline = inline.replace(f"%{name},", f"%{whole}#{index},").replace(f"%{name})", f"%{whole}#{index})")
  assert "add(%q#0, %two)" in inline
  assert hlo.analyse(inline) == hlo.analyse(TPU_LOOP)


def test_a_collective_that_is_spread_over_fusions_counts_once():
  gather = "f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}"
  part = lambda name: f"%{name} (p: f32[2]) -> f32[8] {{\n  %p = f32[2]{{0}} parameter(0)\n  ROOT %g = {gather}\n}}\n\n"
  call = lambda name: f"  %{name} = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%{name}\n"
  main = "ENTRY %main (a: f32[2]) -> f32[8] {\n  %a = f32[2]{0} parameter(0)\n" + call("one") + call("two") + "}\n"
  totals = hlo.analyse("HloModule jit_f, num_partitions=4\n\n" + part("one") + part("two") + main)
  assert totals.count == {"all-gather": 1}
  assert totals.wire["all-gather"] == 8 * 4 * 3 / 4


def test_what_goes_to_another_slice_counts_by_itself():
  text = """\
HloModule jit_f, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8]{0}, u32[], token[]) send(%a, %t), channel_id=3, frontend_attributes={x="xla_megascale_runtime"}
  %d = token[] send-done(%s), channel_id=3
  ROOT %b = f32[8]{0} copy(%a)
}
"""
  totals = hlo.analyse(text)
  assert totals.count == {hlo.SLICES: 1}
  assert totals.wire[hlo.SLICES] == 8 * 4


def test_a_kernel_in_a_loop_counts_as_often_as_it_runs():
  call = '%k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
  text = f"""\
HloModule jit_f, num_partitions=1

%condition (p: (u32[], f32[8])) -> pred[] {{
  %limit = u32[] constant(5)
  %p = (u32[], f32[8]{{0}}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (q: (u32[], f32[8])) -> (u32[], f32[8]) {{
  %q = (u32[], f32[8]{{0}}) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %x = f32[8]{{0}} get-tuple-element(%q), index=1
  %one = u32[] constant(1)
  %next = u32[] add(%j, %one)
  {call}
  ROOT %out = (u32[], f32[8]{{0}}) tuple(%next, %k)
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %zero = u32[] constant(0)
  %start = (u32[], f32[8]{{0}}) tuple(%zero, %a)
  %loop = (u32[], f32[8]{{0}}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""
  assert hlo.analyse(text).kernels == 5


OPEN_LOOPS = """\
HloModule jit_f, num_partitions=1

%condition (p: f32[8]) -> pred[] {
  %p = f32[8]{0} parameter(0)
  ROOT %done = pred[] custom-call(%p), custom_call_target="x"
}

%large (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %twice = f32[8]{0} add(%q, %q)
  ROOT %thrice = f32[8]{0} add(%twice, %q)
}

%small (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %once = f32[8]{0} negate(%r)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} while(%a), condition=%condition, body=%FIRST
  ROOT %c = f32[8]{0} while(%b), condition=%condition, body=%SECOND
}
"""


@pytest.mark.parametrize(("first", "second"), [("large", "small"), ("small", "large")])
def test_of_two_open_loops_the_larger_is_the_one_turn(first, second):
  totals = hlo.analyse(OPEN_LOOPS.replace("FIRST", first).replace("SECOND", second), turns=10)
  assert (totals.open_loops, totals.unread) == (2, 0)
  assert totals.body.hbm == 2 * 3 * 8 * 4
  assert totals.hbm == 10 * (2 * 3 + 2) * 8 * 4


@pytest.mark.parametrize(
  ("line", "count"),
  [
    ("fusion(%a), kind=kLoop, calls=%there", 0),
    ("fusion(%a), kind=kLoop, calls=%absent", 1),
    ("fusion(%a), kind=kLoop", 1),
    ("call(%a), to_apply=%absent", 1),
    ("async-start(%a)", 1),
    ("while(%a), condition=%absent, body=%absent", 1),
    ('while(%a), condition=%absent, body=%absent, backend_config={"known_trip_count":{"n":"7"}}', 1),
    ("conditional(%a, %a, %a), branch_computations={%there, %absent}", 1),
    ("conditional(%a, %a, %a)", 1),
  ],
)
def test_the_call_of_a_computation_that_the_text_lacks_is_counted(line, count):
  there = "%there (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n  ROOT %n = f32[8]{0} negate(%p)\n}\n\n"
  main = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  %b = f32[8]{{0}} {line}\n}}\n"
  assert hlo.analyse("HloModule jit_f, num_partitions=1\n\n" + there + main, turns=5).unread == count


@pytest.mark.parametrize(
  ("shape", "known"),
  [
    ("(f32[4]{0:T(128)S(1)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)})", True),
    ("(token[], s32[])", True),
    ("f2e1[4]{0}", False),
    ("(f32[4]{0}, f32[<=8]{0})", False),
  ],
)
def test_a_shape_of_no_known_form_is_counted(shape, known):
  text = f"HloModule f\n\nENTRY %main () -> f32[] {{\n  ROOT %a = {shape} custom-call()\n}}\n"
  assert hlo.analyse(text).unread == (not known)


def test_what_lies_in_the_chips_own_memory_is_no_traffic():
  assert hlo.num_bytes("(f32[4]{0:T(128)S(1)}, bf16[2,3]{1,0})") == 16 + 12
  assert hlo.num_bytes("(f32[4]{0:T(128)S(1)}, bf16[2,3]{1,0})", in_hbm=True) == 12
