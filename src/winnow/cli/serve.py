"""``winnow serve``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]

_SHAPES = "256"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(text: str, bare: str = "") -> int:
    """``4GiB``, ``512M``, ``12B`` or ``1000000`` as bytes; ``bare`` is the unit of a number alone."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is no size; write it as 4GiB, 512MiB or a number of bytes")
    unit = found[2].upper() or ("" if found[3] else bare)
    return int(float(found[1]) * _UNITS[unit])


def serve(
    model: Annotated[str, typer.Argument(help="'embedded', a directory, or a hub name.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A YAML file, a method or a packaged recipe, as NAME=SOURCE if it needs a name; may be "
            "repeated: requests choose by name, the first is the default. None is full attention.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients use; the model's own by default.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and answer together, in tokens; the model's own by default.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at a time.")] = 64,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="New tokens of one step; 512 by default, 2048 on a GPU and with a prompt's pattern."
        ),
    ] = None,
    kv_memory: Annotated[str, typer.Option(help="Most memory for all entries, such as 4GiB.")] = "4GiB",
    kv_dir: Annotated[
        Path | None, typer.Option(help="Keep finished sequences here; they outlive the process.")
    ] = None,
    kv_dir_size: Annotated[str, typer.Option(help="Most bytes of files in --kv-dir.")] = "16GiB",
    swap_space: Annotated[
        str,
        typer.Option(help="Host memory beside --kv-memory where preempted sequences wait; a number is GiB."),
    ] = "0",
    swap_dir: Annotated[
        Path | None, typer.Option(help="Where preempted sequences wait that find no room in --swap-space.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; may be repeated. Also WINNOW_API_KEY."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_body: Annotated[str, typer.Option(help="Most bytes of a request's body.")] = "8MiB",
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds that requests get at the end.")] = 30.0,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse exact prefixes across requests.")] = True,
    tool_call_parser: Annotated[
        str, typer.Option(help="Form of the model's tool calls: auto, hermes, json or none.")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the weights' own.")] = None,
    backend: Annotated[str, typer.Option(help="auto, native, triton or reference.")] = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model under recipes, through OpenAI's interface; a live page is at /."""
    # PyTorch keeps a compiled product for each of the last 1024 shapes, a megabyte apiece, and every
    # step of a server is another shape. It reads these when it is imported.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _SHAPES)
    try:
        import torch

        from winnow.models.load import load_model
        from winnow.serve import logs
        from winnow.serve.config import Settings
        from winnow.serve.run import build, named_recipes
        from winnow.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; install the server with winnow-llm[serve]") from error

    logs.configure(log_level)
    kinds = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"unknown dtype {dtype!r}; choose {', '.join(kinds)}")
    recipes = named_recipes(recipe or [])
    loaded, text = load_model(model, dtype=kinds[dtype] if dtype else None)
    keys = [*(api_key or ()), *filter(None, [os.environ.get("WINNOW_API_KEY")])]
    if max_model_len is not None and max_model_len > loaded.max_length:
        raise ValueError(f"{model} takes {loaded.max_length} tokens; lower --max-model-len")
    settings = Settings(
        served_model_name=served_model_name or loaded.name,
        recipes=recipes,
        max_model_len=max_model_len or loaded.max_length,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_memory=_bytes(kv_memory),
        kv_dir=kv_dir,
        kv_dir_bytes=_bytes(kv_dir_size),
        swap_space=_bytes(swap_space, bare="G"),
        swap_dir=swap_dir,
        api_keys=tuple(keys),
        max_body=_bytes(max_body),
        max_queue=max_queue,
        request_timeout=request_timeout,
        tool_parser=tool_call_parser,
    )
    app = build(loaded, text, settings, prefix_caching=prefix_caching, backend=backend)  # type: ignore[arg-type]
    run(app, host=host, port=port, grace=shutdown_timeout)
