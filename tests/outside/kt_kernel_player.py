"""Runs the routed experts of an exported checkpoint through kt-kernel, in the environment of `make test-kt-kernel`: nothing of
glm5_port.

    python kt_kernel_player.py REQUESTS.json ANSWERS.safetensors

The request is {"inputs": file, "runs": [{"name", "directory", "layer", "experts", "kernel"}]}. For each run the file of inputs
holds NAME/hidden [T, D] bfloat16, NAME/ids [T, k] int64 and NAME/weights [T, k] float32; the answers hold NAME [T, D] bfloat16.
kt-kernel's own loader reads the directory, as its method RAWINT4 does.
"""

from __future__ import annotations

import json
import sys

import kt_kernel
import torch
from kt_kernel.utils.loader import CompressedSafeTensorLoader
from safetensors.torch import load_file, save_file
from torch import Tensor

THREADS = 2
BITS = 4


def worker_pool() -> object:
    """Threads that compute, in one group."""
    options = kt_kernel.kt_kernel_ext.WorkerPoolConfig()
    options.subpool_count, options.subpool_numa_map, options.subpool_thread_count = 1, [0], [THREADS]
    return kt_kernel.kt_kernel_ext.CPUInfer(options)


def run(request: dict, inputs: dict[str, Tensor], pool: object) -> Tensor:
    """The experts' sum for each token: [T, D] bfloat16."""
    hidden, ids, weights = (inputs[f"{request['name']}/{part}"] for part in ("hidden", "ids", "weights"))
    loaded = CompressedSafeTensorLoader(request["directory"]).load_experts(f"model.layers.{request['layer']}")
    inner, groups = loaded["gate_scale"][0].shape
    experts, width = len(loaded["gate"]), hidden.shape[1]
    if experts != request["experts"]:
        raise SystemExit(f"kt-kernel's loader finds {experts} experts of {request['experts']}")
    on_device = torch.zeros(experts, dtype=torch.bool)
    options = kt_kernel.kt_kernel_ext.moe.MOEConfig(experts, ids.shape[1], width, inner, on_device.data_ptr())
    options.layer_idx, options.pool, options.max_len = 0, pool.backend_, max(len(hidden), 32)
    for name in ("gate", "up", "down"):
        setattr(options, f"{name}_projs", [[weight.data_ptr() for weight in loaded[name]]])
        setattr(options, f"{name}_scales", [[scale.data_ptr() for scale in loaded[f"{name}_scale"]]])
    options.quant_config.bits, options.quant_config.group_size = BITS, width // groups
    options.quant_config.zero_point = False
    block = getattr(kt_kernel.kt_kernel_ext.moe, request["kernel"])(options)
    order = torch.arange(experts)
    pool.submit(block.load_weights_task(order.data_ptr()))
    pool.sync()
    output, count = torch.full_like(hidden, float("nan")), torch.tensor([len(hidden)], dtype=torch.int32)
    arguments = (tensor.data_ptr() for tensor in (ids, weights, hidden, output))
    pool.submit(block.forward_task(count.data_ptr(), ids.shape[1], *arguments, False))
    pool.sync()
    return output


def main() -> None:
    """Answers every request."""
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    inputs, pool = load_file(requests["inputs"]), worker_pool()
    save_file({request["name"]: run(request, inputs, pool) for request in requests["runs"]}, sys.argv[2])
    print(f"variant={kt_kernel.__cpu_variant__}")


if __name__ == "__main__":
    main()
