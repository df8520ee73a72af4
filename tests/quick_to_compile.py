"""XLA_FLAGS for what runs a moment only: most of its time is compilation, and the optimisation would save little.

`python -m tests.quick_to_compile` prints them. JAX is not imported here: it reads the environment when it is.
"""

import importlib.metadata


def flags() -> str:
  names = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
  names.append("--xla_cpu_parallel_codegen_split_count=1")  # each part of a program costs its own set-up
  # XLA ends the process at a flag that it does not know, and since jaxlib 0.11.2 this one is gone.
  if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    names.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(names)


if __name__ == "__main__":
  print(flags())
