"""Runs an exported decoder with numpy and onnxruntime alone. As a script, with torch and glm5_port out of reach:

python onnx_runner.py decoder.onnx job.npz results.npz

The job holds "tokens" [N] and "prompt", a number. The results hold logits [N, vocabulary] of one prefill of all tokens ("whole"),
of two ("chunks") and of a prefill of the prompt with decoding token by token ("steps"), and what greedy decoding of the prompt
gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


class Runner:
    """A session and the caches of its sequences."""

    def __init__(self, graph: Path | str, *, batch: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.past = {
            put.name: np.zeros((batch, 0, put.shape[2]), np.float32)
            for put in self.session.get_inputs()
            if put.name.startswith("past.")
        }
        self.seen = 0
        self.results: dict[str, np.ndarray] = {}

    def step(self, tokens: np.ndarray, **more: np.ndarray) -> np.ndarray:
        """Logits [B, S, vocabulary] of the next tokens [B, S]; the caches grow."""
        positions = np.broadcast_to(np.arange(self.seen, self.seen + tokens.shape[1]), tokens.shape)
        fed = {"input_ids": tokens.astype(np.int64), "position_ids": np.ascontiguousarray(positions), **self.past, **more}
        self.results = dict(zip(self.names, self.session.run(None, fed), strict=True))
        self.past = {name: self.results[name.replace("past.", "present.", 1)] for name in self.past}
        self.seen += tokens.shape[1]
        return self.results["logits"]


def steps(graph: Path | str, tokens: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Logits [N, vocabulary] of a sequence taken in steps of these sizes."""
    runner, cuts = Runner(graph), np.cumsum(sizes)[:-1]
    return np.concatenate([runner.step(part[None])[0] for part in np.split(tokens, cuts)])


def greedy(graph: Path | str, prompt: np.ndarray, count: int) -> np.ndarray:
    """The prompt and `count` tokens more."""
    runner, tokens = Runner(graph), prompt[None]
    new = tokens
    for _ in range(count):
        new = runner.step(new)[:, -1:].argmax(-1)
        tokens = np.concatenate((tokens, new), axis=1)
    return tokens[0]


def main() -> None:
    graph, job, results = sys.argv[1:]
    given = np.load(job)
    tokens, prompt = given["tokens"], int(given["prompt"])
    rest = len(tokens) - prompt
    np.savez(
        results,
        whole=steps(graph, tokens, [len(tokens)]),
        chunks=steps(graph, tokens, [prompt, rest]),
        steps=steps(graph, tokens, [prompt, *[1] * rest]),
        greedy=greedy(graph, tokens[:prompt], rest),
    )


if __name__ == "__main__":
    sys.modules["torch"] = sys.modules["glm5_port"] = None  # type: ignore[assignment]
    main()
