// Instruction sets: which there are, which this machine has, and how a kernel is chosen among them.
#pragma once

namespace glm5 {

// In rising order. A family that has no kernel for a set uses the nearest lower one that it has.
enum class Isa { scalar, avx2, avx512, avx512_bf16, amx };

constexpr int isa_count = 5;
const char* isa_name(Isa isa);

// Why this machine cannot run a set: an empty string when it can. Asks the operating system for the tile registers of AMX,
// which is granted per process, the first time that amx is asked for.
const char* isa_missing(Isa isa);

}  // namespace glm5
