"""Loads exported checkpoints with GPT-QModel, in the environment of `make test-gptqmodel`: nothing of glm5_port.

    python gptqmodel_player.py REQUESTS.json ANSWERS.safetensors

The request is [{"name", "directory", "kernel", "tokens"}], the kernel a member of GPT-QModel's BACKEND. The answers hold
NAME/logits [tokens, vocabulary] float32, and NAME/weight/MODULE [out, in] float16 for every module that it takes for quantised:
the module's product with the identity.
"""

from __future__ import annotations

import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
from torch import Tensor


def run(request: dict) -> dict[str, Tensor]:
    """Everything that is asked about one checkpoint."""
    model = GPTQModel.load(request["directory"], device="cpu", backend=BACKEND[request["kernel"]], dtype=torch.float16).model
    answers = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                identity = torch.eye(module.in_features, dtype=torch.float16)
                answers[f"weight/{name}"] = module(identity).t().contiguous()
        answers["logits"] = model(torch.tensor([request["tokens"]]), use_cache=False).logits[0].float()
    return {f"{request['name']}/{name}": tensor for name, tensor in answers.items()}


def main() -> None:
    """Answers every request."""
    with open(sys.argv[1], encoding="utf-8") as file:
        requests = json.load(file)
    answers: dict[str, Tensor] = {}
    for request in requests:
        answers |= run(request)
    save_file(answers, sys.argv[2])


if __name__ == "__main__":
    main()
