// The table of a family's kernels for each instruction set, and the choice among them.
#pragma once

#include "isa.h"

// Declares `Type name` in the namespace of each instruction set that the family is compiled for, and `name##_for(isa)`.
#if defined(__x86_64__)
#define GLM5_KERNELS(Type, name)                                     \
  namespace scalar { extern const Type name; }                       \
  namespace avx2 { extern const Type name; }                         \
  namespace avx512 { extern const Type name; }                       \
  inline const Type& name##_for(Isa isa) {                           \
    if (isa >= Isa::avx512) return avx512::name;                     \
    return isa == Isa::avx2 ? avx2::name : scalar::name;             \
  }
#define GLM5_MATRIX_KERNELS(Type, name)                              \
  namespace scalar { extern const Type name; }                       \
  namespace avx2 { extern const Type name; }                         \
  namespace avx512 { extern const Type name; }                       \
  namespace avx512_bf16 { extern const Type name; }                  \
  namespace amx { extern const Type name; }                          \
  inline const Type& name##_for(Isa isa) {                           \
    switch (isa) {                                                   \
      case Isa::avx2: return avx2::name;                             \
      case Isa::avx512: return avx512::name;                         \
      case Isa::avx512_bf16: return avx512_bf16::name;               \
      case Isa::amx: return amx::name;                               \
      default: return scalar::name;                                  \
    }                                                                \
  }
#else
#define GLM5_KERNELS(Type, name)                                     \
  namespace scalar { extern const Type name; }                       \
  inline const Type& name##_for(Isa) { return scalar::name; }
#define GLM5_MATRIX_KERNELS(Type, name) GLM5_KERNELS(Type, name)
#endif
