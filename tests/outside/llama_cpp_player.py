"""Runs GGUF files through llama.cpp, in the environment of `make test-llama-cpp`: no torch, nothing of glm5_port.

    python llama_cpp_player.py REQUEST.json ANSWERS.npz

The request is a list of {"name", "file", "text": None or a string, "tokens": ids, "decoded": bool, "fault": None or a name,
"new": int}. For each the answers hold NAME/ids (the text's token ids), NAME/logits [tokens, vocabulary] of one pass over the
tokens, and NAME/greedy (so many tokens after them, one at a time). `decoded` first writes every tensor in float32 as gguf-py
reads it, so that llama.cpp computes with the values of the file and rounds no activation to the type of a weight; `fault` damages
that file.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

GGML_F32 = 0
FLASH_ATTENTION_OFF = 0
THREADS = 2
SHOWN = 30


def decode_file(source: Path, destination: Path, fault: str | None) -> None:
    """The same model, of all its parts, with every tensor in float32, decoded by gguf-py, and without its tokenizer."""
    readers = [gguf.GGUFReader(part) for part in sorted(source.parent.glob("*.gguf"))]
    reader, tensors = readers[0], [tensor for part in readers for tensor in part.tensors]
    writer = gguf.GGUFWriter(destination, arch=reader.fields["general.architecture"].contents())
    writer.add_tokenizer_model("none")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture", "tokenizer.", "split.")):
            continue
        value = field.contents()
        if fault == "another index_topk" and field.name.endswith("indexer.top_k"):
            value -= 1
        writer.add_key_value(field.name, value, field.types[0], sub_type=field.types[-1])
    layer = f"blk.{max(int(tensor.name.split('.')[1]) for tensor in tensors if tensor.name.startswith('blk.')) - 1}."
    exchanged = {
        f"{layer}ffn_gate_exps.weight": f"{layer}ffn_up_exps.weight",
        f"{layer}ffn_up_exps.weight": f"{layer}ffn_gate_exps.weight",
    }
    for tensor in tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = exchanged.get(tensor.name, tensor.name) if fault == "gate and up exchanged" else tensor.name
        writer.add_tensor(name, values.reshape([int(n) for n in tensor.shape[::-1]]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A GGUF file in llama.cpp: weights as they are stored, cache in float32, attention by plain matrix products."""

    def __init__(self, file: Path, context: int) -> None:
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = False  # Q4_0 aborts in the AMX buffers of this version
        options.load_mtp = True
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.options = llama_cpp.llama_context_default_params()
        self.options.n_ctx = self.options.n_batch = self.options.n_ubatch = context
        self.options.n_threads = self.options.n_threads_batch = THREADS
        self.options.type_k = self.options.type_v = GGML_F32
        self.options.flash_attn_type = FLASH_ATTENTION_OFF

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, special tokens by their names, nothing before or after."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), True, True)
        if count < 0:
            raise SystemExit("llama.cpp cannot tokenise the text")
        return list(ids[:count])

    def open(self) -> ctypes.c_void_p:
        """A new empty context."""
        context = llama_cpp.llama_init_from_model(self.model, self.options)
        if not context:
            raise SystemExit("llama.cpp makes no context")
        return context

    def run(self, context: ctypes.c_void_p, tokens: list[int], start: int) -> np.ndarray:
        """The logits of every one of further tokens: [tokens, vocabulary]."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode answers {status}")
        flat = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens) * self.size,))
        llama_cpp.llama_batch_free(batch)
        return flat.reshape(len(tokens), self.size).copy()


def play(request: dict, answers: dict[str, np.ndarray]) -> None:
    """One file of the request."""
    name, file = request["name"], Path(request["file"])
    if request["decoded"]:
        decoded = file.parent.with_name(f"{name.replace('/', ' ')}.gguf")
        decode_file(file, decoded, request["fault"])
        file = decoded
    tokens, new = request["tokens"], request["new"]
    model = Model(file, context=len(tokens) + new + 8)
    if request["text"] is not None:
        answers[f"{name}/ids"] = np.array(model.tokenize(request["text"]), dtype=np.int64)
    context = model.open()
    logits = answers[f"{name}/logits"] = model.run(context, tokens, 0)
    greedy = [int(logits[-1].argmax())]
    while len(greedy) < new:
        greedy.append(int(model.run(context, greedy[-1:], len(tokens) + len(greedy) - 1)[0].argmax()))
    answers[f"{name}/greedy"] = np.array(greedy, dtype=np.int64)
    llama_cpp.llama_free(context)


def main() -> None:
    """Answers every request."""
    answers: dict[str, np.ndarray] = {}
    for request in json.loads(Path(sys.argv[1]).read_text()):
        play(request, answers)
    np.savez(sys.argv[2], **answers)


LOG: list[str] = []
"""What llama.cpp said; shown where it fails."""


@llama_cpp.llama_log_callback
def keep_log(level: int, text: bytes, data: object) -> None:
    """Takes a line of llama.cpp's log."""
    LOG.append(text.decode(errors="replace"))


if __name__ == "__main__":
    llama_cpp.llama_log_set(keep_log, None)
    llama_cpp.llama_backend_init()
    try:
        main()
    except SystemExit:
        print("".join(LOG[-SHOWN:]), file=sys.stderr)
        raise
