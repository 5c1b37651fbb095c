"""`glm5-port generate`: continues a prompt with a checkpoint, on the backend that was asked for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm5_port.cli.output import log_to_stderr, print_json, print_text, progress
from glm5_port.errors import InputError

if TYPE_CHECKING:
    from glm5_port.model.decoder import Glm5Model


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Directory with config.json and safetensors files.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", metavar="FILE", help="A file with the text.")] = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="1,2,3", help="Token ids instead of text.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=0)] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    backend: Annotated[str | None, typer.Option("--backend", metavar="NAME", help="Default: as GLM5_PORT_BACKEND says.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Default: the config's.")] = None,
    latent_norm_eps: Annotated[
        float | None, typer.Option("--latent-norm-eps", help="Default: rms_norm_eps; 1e-6 reproduces transformers.")
    ] = None,
    cache_format: Annotated[str | None, typer.Option("--cache-format", help="plain, fp8 or int8.")] = None,
    block_size: Annotated[int | None, typer.Option("--block-size", help="Rows of a cache page.")] = None,
    max_context: Annotated[int | None, typer.Option("--max-context", help="Default: the config's limit.")] = None,
    int4_activations: Annotated[
        str | None,
        typer.Option(
            "--int4-activations", help="Of INT4 experts: wide (W4A16, the default), int8 (W4A8, a scale a token) or int8_groups."
        ),
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Draft with the MTP layer and verify.")] = False,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", min=1, help="Tokens drafted at a time, with --mtp.")] = 1,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="A parallel plan (glm5-port plan --save) for the processes of torchrun."),
    ] = None,
    role: Annotated[
        str | None, typer.Option("--role", help="With --plan: run one replica of this role (mixed, prefill or decode).")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="With --plan: seconds that a rank waits for another.")] = 300,
    decisions: Annotated[
        bool, typer.Option("--decisions", help="Also print which implementation ran for every operator.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Continue a prompt; tokens appear as they are made."""
    from glm5_port.model.sampling import Sampling
    from glm5_port.requests import resolve_backend
    from glm5_port.text import Text, TextStream

    log_to_stderr()
    resolve_backend(backend)  # before anything is read: a backend that is not here is the first thing to know
    sampling = Sampling(temperature, top_k, top_p, seed)
    if [prompt, prompt_file, ids].count(None) != 2:
        raise InputError("give exactly one of --prompt, --prompt-file and --ids")
    text = None if ids is not None else Text(checkpoint)
    tokens = _ids(ids) if ids is not None else text.encode(_read(prompt, prompt_file))  # type: ignore[union-attr]
    options: dict[str, Any] = {
        "backend": backend,
        "dtype": dtype,
        "latent_norm_eps": latent_norm_eps,
        "cache_format": cache_format,
        "block_size": block_size,
        "max_context": max_context,
        "mtp": mtp,
        "int4_activations": int4_activations,
    }
    stream = TextStream(text) if text is not None else None
    arguments = {"max_new_tokens": max_new_tokens, "sampling": sampling, "draft_tokens": draft_tokens}
    if plan is None and role is not None:
        raise InputError("--role belongs to --plan, which was not given")
    alone = nullcontext() if plan is None else planned(plan, checkpoint, tokens, options, arguments, role=role, timeout=timeout)
    with alone:
        model = load_with_progress(checkpoint, **options)
        _continue(model, tokens, arguments, text, stream, decisions=decisions, as_json=as_json)


def _continue(
    model: Glm5Model, tokens: list[int], arguments: dict[str, Any], text: Any, stream: Any, *, decisions: bool, as_json: bool
) -> None:
    """Generates, and shows what comes."""
    made: list[int] = []
    finished: str | None = None
    started = time.perf_counter()
    shown = nullcontext() if stream is not None and not as_json else progress("generate", arguments["max_new_tokens"])
    with shown as advance:
        for (emission,) in model.stream([tokens], **arguments):
            made += emission.tokens
            finished = emission.finished
            if advance is not None:
                advance(len(emission.tokens))
            elif stream is not None:
                sys.stdout.write(stream.push(emission.tokens, last=finished is not None))
                sys.stdout.flush()
    seconds = time.perf_counter() - started
    if as_json:
        print_json(_report(model, tokens, made, text, finished, seconds))
        return
    print_text("" if stream is not None else ",".join(map(str, made)))
    if decisions:
        print_text("\n" + "\n".join(str(selection) for selection in model.decisions()))


@contextmanager
def planned(
    plan: Path,
    checkpoint: Path,
    tokens: list[int],
    options: dict[str, Any],
    arguments: dict[str, Any],
    *,
    role: str | None,
    timeout: float,
) -> Iterator[None]:
    """Within the context this process is a rank of a plan, which settles some of the options; only rank 0 writes anything.

    Args:
        plan, role, timeout: see `glm5_port.parallel.launch.start`.
        checkpoint: whose config the plan must fit.
        tokens: of the prompt, which must be the same on all ranks.
        options: of `load`; the plan adds to them.
        arguments: of `Glm5Model.stream`; likewise.

    Raises:
        InputError: an option that says something else than the plan.
    """
    from glm5_port.config import Glm5Config
    from glm5_port.parallel.launch import agree, is_first, start
    from glm5_port.parallel.plan import ParallelPlan

    read = ParallelPlan.load(plan)
    with start(read, Glm5Config.from_json(checkpoint), role=role, backend=options["backend"], timeout=timeout) as ranks:
        drafts = ranks.layout.drafts
        settled = {"cache_format": read.kv_format, "max_context": read.max_context, "mtp": drafts > 0}
        for name, value in settled.items():
            if options[name] not in (None, False, value):
                raise InputError(f"--{name.replace('_', '-')} {options[name]}: the plan says {value}; leave the option out")
        options.update(settled, ranks=ranks)
        arguments["draft_tokens"] = max(drafts, 1)
        agree({"prompt": tokens, "options": {name: options[name] for name in options if name != "ranks"}, "sampling": arguments})
        with open(os.devnull, "w") as nowhere, ExitStack() as silence:
            if not is_first():
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
            yield


def load_with_progress(checkpoint: Path, **options: Any) -> Glm5Model:
    """`glm5_port.load` with a progress bar on stderr."""
    from glm5_port.model.load import load

    bar: Any = None
    advance: Any = None

    def report(done: int, total: int) -> None:
        nonlocal bar, advance
        if bar is None:
            bar = progress("reading tensors", total)
            advance = bar.__enter__()
        advance()

    try:
        return load(checkpoint, progress=report, **options)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def _read(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None:
        return prompt
    path = Path(str(prompt_file))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt-file {path}: {error}") from error


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"--ids {text}: token ids are whole numbers separated by commas ({error})") from error


def _report(
    model: Glm5Model, prompt: list[int], made: list[int], text: Any, finished: str | None, seconds: float
) -> dict[str, Any]:
    return {
        "backend": model.backend,
        "plan": model.ranks.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "latent_norm_eps": model.config.latent_norm_eps,
        "prompt_ids": prompt,
        "new_ids": made,
        "text": None if text is None else text.decode(made),
        "finished": finished,
        "seconds": seconds,
        "speculation": {
            "rounds": model.speculation.rounds,
            "drafted": model.speculation.drafted,
            "accepted": model.speculation.accepted,
        },
        "decisions": [selection.as_dict() for selection in model.decisions()],
    }
