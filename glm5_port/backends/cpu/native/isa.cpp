#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace glm5 {

const char* isa_name(Isa isa) {
  static const char* const names[isa_count] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

#if defined(__x86_64__)
namespace {

constexpr unsigned long avx_state = 0x6, avx512_state = 0xE6, tile_state = 0x60000;
constexpr long arch_request_xcomp_permission = 0x1023, tile_data = 18;

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

bool bit(unsigned word, int index) { return (word >> index) & 1; }

// Registers that the operating system saves and restores; without that, using them would corrupt other programs.
unsigned long saved_state() {
  if (!bit(Leaf(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long>(high) << 32) | low;
}

bool saves(unsigned long state) { return (saved_state() & state) == state; }

const char* avx2_missing() {
  const Leaf one(1, 0), seven(7, 0);
  if (!bit(one.c, 12) || !bit(one.c, 29) || !bit(seven.b, 5) || !bit(seven.b, 8)) return "this processor has no AVX2 with FMA and BMI2";
  return saves(avx_state) ? "" : "the operating system does not save AVX registers";
}

const char* avx512_missing() {
  const Leaf seven(7, 0);
  const bool all = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
  if (!all) return "this processor has no AVX-512 with BW, DQ, VL and VNNI";
  return saves(avx512_state) ? avx2_missing() : "the operating system does not save AVX-512 registers";
}

const char* avx512_bf16_missing() {
  if (!bit(Leaf(7, 1).a, 5)) return "this processor has no AVX-512 BF16";
  return avx512_missing();
}

const char* amx_missing() {
  const Leaf seven(7, 0);
  if (!bit(seven.d, 22) || !bit(seven.d, 24) || !bit(seven.d, 25)) return "this processor has no AMX with BF16 and INT8";
  if (!saves(tile_state)) return "the operating system does not save AMX tiles";
  static const long granted = syscall(SYS_arch_prctl, arch_request_xcomp_permission, tile_data);
  return granted == 0 ? avx512_bf16_missing() : "the operating system refuses AMX tiles to this process";
}

}  // namespace

const char* isa_missing(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "";
    case Isa::avx2: return avx2_missing();
    case Isa::avx512: return avx512_missing();
    case Isa::avx512_bf16: return avx512_bf16_missing();
    case Isa::amx: return amx_missing();
  }
  return "no such instruction set";
}

#else

const char* isa_missing(Isa isa) { return isa == Isa::scalar ? "" : "this processor is no x86-64"; }

#endif

}  // namespace glm5
