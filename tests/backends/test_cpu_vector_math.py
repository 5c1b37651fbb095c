"""The functions of native/vector_math.h against double, for every instruction set that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import glm5_port.backends.cpu.extension as extension

NATIVE = Path(extension.__file__).parent / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
PROGRAM = r"""
#include "vector_math.h"

#include <cmath>
#include <cstdio>

using namespace glm5;

static double units(float got, double expected) {  // distance in units of the last place of the expected number
  int exponent;
  std::frexp(expected, &exponent);
  return std::fabs(got - expected) / std::ldexp(1.0, (exponent - 24 < -149 ? -149 : exponent - 24));
}

static float first(F32 x) {
  float all[F32::width];
  x.store(all);
  for (int i = 1; i < F32::width; ++i)
    if (bits_of(all[i]) != bits_of(all[0]) && all[0] == all[0]) std::printf("lanes differ\n");
  return all[0];
}

int main() {
  double worst_exp = 0, worst_silu = 0;
  for (uint32_t bits = 0; bits < 0x7F800000u; bits += 32749) {
    for (int sign = 0; sign < 2; ++sign) {
      const float x = sign ? -float_of(bits) : float_of(bits);
      const double e = std::exp(static_cast<double>(x)), s = x / (1 + std::exp(-static_cast<double>(x)));
      if (e < 3.4028234e38) worst_exp = std::fmax(worst_exp, units(first(exponential(F32::broadcast(x))), e));
      if (x > -88.7f && x != 0) worst_silu = std::fmax(worst_silu, units(first(silu(F32::broadcast(x))), s));
    }
  }
  const float inf = INFINITY, nan = NAN;
  std::printf("%.3f %.3f %g %g %g %g %g %g\n", worst_exp, worst_silu, first(exponential(F32::broadcast(-inf))),
              first(exponential(F32::broadcast(inf))), first(exponential(F32::broadcast(0.0f))),
              std::fabs(first(exponential(F32::broadcast(nan)))), first(exponential(F32::broadcast(88.75f))),
              first(silu(F32::broadcast(inf))));
}
"""


@pytest.mark.skipif(COMPILER is None, reason="NOT TESTED: no C++ compiler")
@pytest.mark.parametrize("isa", sorted(FLAGS))
def test_exponential_and_silu_are_near_the_exact_values(tmp_path: Path, isa: str) -> None:
    if missing := extension.isa_missing(isa):
        pytest.skip(f"NOT TESTED: {missing}")
    source, program = tmp_path / "check.cpp", tmp_path / "check"
    source.write_text(PROGRAM)
    command = [
        str(COMPILER),
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        f"-I{NATIVE}",
        *FLAGS[isa],
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=120)
    exponential, silu, *special = done.stdout.split()
    assert float(exponential) <= 1.0
    assert float(silu) <= 3.0
    assert special == ["0", "inf", "1", "nan", "inf", "inf"]
