// The products of bfloat16 activations, by pairs or, on AMX, by tiles, and those of 8-bit activations by tiles. What is left, float
// activations and 8-bit ones without tiles, takes the kernels of AVX-512.
#include "matmul/bf16_kernel.h"
#include "matmul/int4_tiles.h"
#include "matmul/int8_tiles.h"
#include "matmul/linear.h"
#include "matmul/mixture.h"
#include "matmul/tile_kernel.h"

namespace glm5 {
namespace {

const MatmulKernels& narrower = avx512::matmul;

struct BytesByVectors {
  static void int4_int8_experts(const ExpertsCall<Int4Weight>& call) { narrower.int4_int8_experts(call); }
  static void int8_matmul(const MatmulCall<Int8Weight>& call) { narrower.int8_matmul(call); }
};

struct BytesByTiles {
  static void int4_int8_experts(const ExpertsCall<Int4Weight>& call) {
    call.is_bf16 ? mix_quantised<Int4ByByteTiles, bf16>(call) : mix_quantised<Int4ByByteTiles, float>(call);
  }
  static void int8_matmul(const MatmulCall<Int8Weight>& call) {
    if (call.rows <= few_rows) return narrower.int8_matmul(call);
    call.is_bf16 ? multiply_quantised_by_tiles<bf16>(call) : multiply_quantised_by_tiles<float>(call);
  }
};

template <class Int4, class Dense, class OfBytes>
struct Kernels {
  static void int4_matmul(const MatmulCall<Int4Weight>& call) { call.is_bf16 ? multiply_rows<Int4, bf16>(call) : narrower.int4_matmul(call); }
  static void int4_experts(const ExpertsCall<Int4Weight>& call) { call.is_bf16 ? mix_experts<Int4, bf16>(call) : narrower.int4_experts(call); }
  static void linear(const MatmulCall<DenseWeight>& call) { call.is_bf16 ? multiply_rows<Dense, bf16>(call) : narrower.linear(call); }
  static void dense_experts(const ExpertsCall<DenseWeight>& call) { call.is_bf16 ? mix_experts<Dense, bf16>(call) : narrower.dense_experts(call); }

  static constexpr MatmulKernels table = {int4_matmul, int4_experts, OfBytes::int4_int8_experts, OfBytes::int8_matmul, linear, dense_experts};
};

using ByTileUnit = Kernels<ByTiles<Int4ByPairs>, ByTiles<DenseByPairs>, BytesByTiles>;

}  // namespace

namespace GLM5_ISA {
#if defined(GLM5_ISA_amx)
const MatmulKernels matmul = ByTileUnit::table;
#else
const MatmulKernels matmul = Kernels<Int4ByPairs, DenseByPairs, BytesByVectors>::table;
const MatmulKernels matmul_by_emulated_tiles = ByTileUnit::table;
#endif
}
}  // namespace glm5
