// What every binding uses: addresses and sizes come from Python as integers, nothing of torch is known here. Python checks
// dtypes, shapes and strides before it calls; the interpreter lock is released while a kernel runs.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "isa.h"

namespace glm5 {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline nanobind::call_guard<nanobind::gil_scoped_release> released() { return {}; }

// Each family defines its own, in <family>/bind.cpp.
void bind_limits(nanobind::module_& module);
void bind_quantize(nanobind::module_& module);
void bind_matmul(nanobind::module_& module);
void bind_indexer(nanobind::module_& module);
void bind_small(nanobind::module_& module);
void bind_attention(nanobind::module_& module);
void bind_cache(nanobind::module_& module);

}  // namespace glm5
