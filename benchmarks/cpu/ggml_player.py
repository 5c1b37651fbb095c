"""ggml's experts for a contest: runs in `.venv-llama-cpp`, nothing of glm5_port (`benchmarks.cpu.outside` says what it is told).

    python ggml_player.py DIRECTORY EXPERTS THREADS

Q4_0 weights in ggml's repacked buffers (what llama.cpp computes with on this kind of processor), as llama.cpp's graph of a
mixture: mul_mat_id of gate and of up, swiglu, mul_mat_id of down, times the weights, summed. Activations are in 8 bits by blocks
of 32. Only shared libraries of the llama-cpp-python wheel are called.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import Structure, c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

F32, Q4_0, I32 = 0, 2, 26
BLOCK, BLOCK_BYTES = 32, 18


class InitParams(Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def library() -> ctypes.CDLL:
    """ggml's base library with the signatures that are used; the CPU backend as its attribute `cpu`."""
    place = next(Path(folder) / "llama_cpp" / "lib" for folder in sys.path if (Path(folder) / "llama_cpp" / "lib").exists())
    base = ctypes.CDLL(str(place / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(place / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointers = {
        base: {
            "ggml_new_tensor_1d": [c_void_p, c_int, c_int64],
            "ggml_new_tensor_2d": [c_void_p, c_int, c_int64, c_int64],
            "ggml_new_tensor_3d": [c_void_p, c_int, c_int64, c_int64, c_int64],
            "ggml_mul_mat_id": [c_void_p] * 4,
            "ggml_swiglu_split": [c_void_p] * 3,
            "ggml_mul": [c_void_p] * 3,
            "ggml_add": [c_void_p] * 3,
            "ggml_view_2d": [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t],
            "ggml_new_graph": [c_void_p],
            "ggml_backend_alloc_ctx_tensors": [c_void_p, c_void_p],
            "ggml_backend_alloc_ctx_tensors_from_buft": [c_void_p, c_void_p],
        },
        cpu: {"ggml_backend_cpu_init": [], "_Z35ggml_backend_cpu_repack_buffer_typev": []},
    }
    for owner, functions in pointers.items():
        for name, arguments in functions.items():
            function = getattr(owner, name)
            function.restype, function.argtypes = c_void_p, arguments
    base.ggml_init.restype, base.ggml_init.argtypes = c_void_p, [InitParams]
    base.ggml_free.argtypes = [c_void_p]
    base.ggml_backend_buffer_free.argtypes = [c_void_p]
    base.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
    base.ggml_backend_graph_compute.restype, base.ggml_backend_graph_compute.argtypes = c_int, [c_void_p, c_void_p]
    for name in ("ggml_backend_tensor_set", "ggml_backend_tensor_get"):
        getattr(base, name).argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    cpu.ggml_backend_cpu_set_n_threads.argtypes = [c_void_p, c_int]
    base.cpu = cpu
    return base


def q4_0(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows of Q4_0 blocks from canonical words [O, I / 8] uint32 and scales [O, I / 32] float32."""
    codes = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(np.uint8).reshape(len(words), -1, BLOCK)
    blocks = np.empty((*codes.shape[:2], BLOCK_BYTES), dtype=np.uint8)
    blocks[..., :2] = scales.astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 2:] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return blocks


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """Numbers of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, rounded half to even."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def read(path: str) -> dict[str, np.ndarray]:
    """A safetensors file; bfloat16 as bits. Read by hand: safetensors' numpy reader knows no bfloat16."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"BF16": np.uint16, "F32": np.float32, "I32": np.int32}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + place for place in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Experts:
    """The weights, and graphs over them."""

    def __init__(self, directory: str, count: int, threads: int) -> None:
        self.ggml = library()
        self.backend = self.ggml.cpu.ggml_backend_cpu_init()
        self.ggml.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        stored = read(f"{directory}/experts")
        distinct = 1 + max(int(name.partition(".")[0]) for name in stored)
        self.width, self.inner = len(stored["0.down_packed"]), len(stored["0.gate_up_packed"]) // 2
        context = self._context(16)
        kind = self.ggml.cpu._Z35ggml_backend_cpu_repack_buffer_typev()
        self.gate, self.up = (self.ggml.ggml_new_tensor_3d(context, Q4_0, self.width, self.inner, count) for _ in range(2))
        self.down = self.ggml.ggml_new_tensor_3d(context, Q4_0, self.inner, self.width, count)
        if not self.ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind):
            sys.exit("ggml has no memory for the experts")
        rows = self.inner
        for tensor, name, part in (
            (self.gate, "gate_up", slice(0, rows)),
            (self.up, "gate_up", slice(rows, None)),
            (self.down, "down", slice(None)),
        ):
            made = [
                q4_0(stored[f"{n}.{name}_packed"].view(np.uint32)[part], bf16_to_float(stored[f"{n}.{name}_scales"])[part])
                for n in range(distinct)
            ]
            whole = np.ascontiguousarray(np.stack([made[n % distinct] for n in range(count)]))
            self.ggml.ggml_backend_tensor_set(tensor, whole.ctypes.data, 0, whole.nbytes)

    def _context(self, tensors: int) -> int:
        overhead = self.ggml.ggml_tensor_overhead
        overhead.restype = c_size_t
        graph = self.ggml.ggml_graph_overhead
        graph.restype = c_size_t
        return int(self.ggml.ggml_init(InitParams(tensors * overhead() + graph(), None, True)))

    def graph(self, tokens: int, top_k: int) -> None:
        """Builds the graph for so many tokens, in place of an earlier one."""
        ggml = self.ggml
        self.context = context = self._context(64 + 2 * top_k)
        self.hidden = ggml.ggml_new_tensor_3d(context, F32, self.width, 1, tokens)
        self.ids = ggml.ggml_new_tensor_2d(context, I32, top_k, tokens)
        self.weights = ggml.ggml_new_tensor_3d(context, F32, 1, top_k, tokens)
        gate = ggml.ggml_mul_mat_id(context, self.gate, self.hidden, self.ids)
        up = ggml.ggml_mul_mat_id(context, self.up, self.hidden, self.ids)
        down = ggml.ggml_mul_mat_id(context, self.down, ggml.ggml_swiglu_split(context, gate, up), self.ids)
        weighted = ggml.ggml_mul(context, down, self.weights)
        row = 4 * self.width
        parts = [ggml.ggml_view_2d(context, weighted, self.width, tokens, row * top_k, row * k) for k in range(top_k)]
        total = parts[0]
        for part in parts[1:]:
            total = ggml.ggml_add(context, total, part)
        self.total, self.built = total, ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(self.built, total)
        if not ggml.ggml_backend_alloc_ctx_tensors(context, self.backend):
            sys.exit("ggml has no memory for the graph")

    def run(self, hidden: np.ndarray, ids: np.ndarray, weights: np.ndarray, output: np.ndarray) -> None:
        """Computes; conversions to float32 and back count, as the others' do."""
        wide = bf16_to_float(hidden)
        for tensor, data in ((self.hidden, wide), (self.ids, ids), (self.weights, weights)):
            self.ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        if self.ggml.ggml_backend_graph_compute(self.backend, self.built):
            sys.exit("ggml did not compute")
        result = np.empty(hidden.shape, dtype=np.float32)
        self.ggml.ggml_backend_tensor_get(self.total, result.ctypes.data, 0, result.nbytes)
        output[:] = float_to_bf16(result)


def main() -> None:
    """Answers until the end of its input."""
    experts = Experts(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print("done", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "inputs" in request:
            inputs = read(request["inputs"])
            hidden = inputs["hidden"]
            output = np.memmap(request["output"], dtype=np.uint16, mode="r+", shape=hidden.shape)
            experts.graph(*inputs["ids.0"].shape)
        else:
            number = request["routing"]
            experts.run(hidden, inputs[f"ids.{number}"], inputs[f"weights.{number}"], output)
        print("done", flush=True)


if __name__ == "__main__":
    main()
