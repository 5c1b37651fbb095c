"""`glm5_port.load`: from a checkpoint directory to a ready model on the requested backend."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

import torch
from torch import Tensor

from glm5_port.model.build import build, stored_dtype, working_dtype
from glm5_port.model.checkpoint import Checkpoint
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.ranks import Ranks
from glm5_port.model.tensors import expected_tensors
from glm5_port.requests import resolve_backend

Progress = Callable[[int, int], None]
"""Called with (tensors read, tensors of the checkpoint). A model with dense attention reads no indexer, so it stays below."""


def load(
    path: str | PathLike[str],
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    latent_norm_eps: float | None = None,
    cache_format: str | None = None,
    block_size: int | None = None,
    max_context: int | None = None,
    mtp: bool = False,
    *,
    int4_activations: str | None = None,
    trainable: bool = False,
    implementation: str | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Glm5Model:
    """Reads a checkpoint and returns a model that is ready to run.

    Every name, shape and dtype is checked both ways before anything is allocated; weights then stream in one at a time.

    Args:
        path: directory with config.json and safetensors files: bf16, block-FP8 (dequantised while reading), canonical INT4 or
            INT8 with one scale for each output (both computed from their codes).
        backend: "cpu", "cuda", "npu", ..., or a list "npu,cpu" (the first usable one); None follows use_backend, then
            GLM5_PORT_BACKEND, then auto.
        dtype: working dtype; None is the config's (bfloat16 for the released models).
        latent_norm_eps: eps of the two latent norms; None means rms_norm_eps, as the serving engines do; 1e-6 reproduces
            Hugging Face transformers.
        cache_format: "plain" (None: the model's dtype), "fp8" or "int8".
        block_size: rows of a cache page; None is 64.
        max_context: most positions of a sequence; None is the config's limit. At or below index_topk attention is dense,
            since selection would keep everything.
        mtp: also load the MTP layer; generation then drafts and verifies with it.
        int4_activations: what INT4 experts multiply with: "wide" (None: the working dtype, W4A16), "int8" (quantised as they
            come, W4A8, one scale for each token) or "int8_groups" (W4A8, one for each group of a token, those of the weights:
            a third of the error; only cpu has kernels of its own for it). Other INT4 projections are W4A16 always.
        trainable: bind differentiable implementations, and let the weights require gradients.
        implementation: pins every operator ("reference"), for comparisons.
        ranks: how ranks of a process group share the model (`glm5_port.parallel.launch.start`); each reads its part only.
        progress: called after each tensor.

    Raises:
        ConfigError, CheckpointError: the files are not such a model, or are incomplete.
        PlanError: a tensor cannot be divided as the plan of `ranks` says.
        InputError: an option outside its range, or a cache_format that cannot store this model's rows.
        SelectionError, FlagError: no backend or implementation fits the request.
    """
    device = torch.device(resolve_backend(backend).device_type)
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
        working = working_dtype(dtype, config)
        expected = expected_tensors(config, mtp=mtp)
        checkpoint.check(expected)
        shared = ranks or Ranks()
        cuts = {name: shared.cut(name, spec.component, spec.shape) for name, spec in expected.items()}  # a wrong one raises now
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            tensor = checkpoint.tensor(name, stored_dtype(name, working, expected[name].kind), cuts[name]).to(device)
            done += 1
            if progress is not None:
                progress(done, len(expected))
            return tensor

        model = build(
            config,
            read,
            backend=backend,
            dtype=working,
            latent_norm_eps=latent_norm_eps,
            cache_format=cache_format,
            block_size=block_size,
            max_context=max_context,
            mtp=mtp,
            int4_activations=int4_activations,
            trainable=trainable,
            implementation=implementation,
            ranks=shared,
        )
        model.source = checkpoint.path
        if (stops := checkpoint.stop_ids) is not None:
            model.stop_ids = stops
        return model
