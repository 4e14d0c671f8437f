"""Loading: from a directory, a hub name, the embedded model or a model already in memory."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from winnow.models import embedded
from winnow.models.fused import FusedModel
from winnow.models.hf import HFModel
from winnow.models.pooling import Pooling, read_pooling
from winnow.models.refuse import check_config
from winnow.models.text import Text
from winnow.types import LanguageModel

__all__ = ["Runner", "load_model"]

Runner = Literal["auto", "general", "fused"]

_log = logging.getLogger("winnow.models")
_WEIGHT_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
)


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    runner: Runner = "auto",
    long_positions: bool = False,
) -> tuple[LanguageModel, Text | None]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    model : str, Path or transformers.PreTrainedModel
        A directory, ``"embedded"``, a hub name ``owner/name`` (the only case that may use a network),
        or a model in memory, which stays usable as it is.
    dtype : torch.dtype or None
        None keeps the dtype of the weights.
    device : str, torch.device or None
        None takes the first CUDA device where there is one, else the CPU; a model in memory stays.
    runner : {"auto", "general", "fused"}
        ``auto`` takes the fused runner where it applies and agrees with the general one, and logs
        why where not; ``fused`` demands it.
    long_positions : bool
        For longrope models (Phi-3): take the full length, on the frequencies of long prompts.

    Returns
    -------
    LanguageModel
    Text or None
        None where no tokenizer comes with the model.

    Raises
    ------
    ValueError
        One line: an unknown name, a directory without configuration or weights, damaged weights, a
        model that is not supported, or one that the demanded runner cannot take.
    """
    if runner not in get_args(Runner):
        raise ValueError(f"unknown runner {runner!r}; choose {', '.join(get_args(Runner))}")
    if isinstance(model, (str, Path)):
        found = _from_name(str(model), dtype, device)
    elif isinstance(model, PreTrainedModel):
        found = _from_memory(model, dtype, device)
    else:
        raise ValueError(
            f"cannot load a {type(model).__name__}; give a directory, a hub name or a transformers model"
        )
    general = HFModel(
        found.module,
        name=found.name,
        long_positions=long_positions,
        pooling=found.pooling,
        generates=found.generates,
    )
    if runner == "general":
        return general, found.text
    try:
        return FusedModel(general), found.text
    except ValueError as reason:
        if runner == "fused":
            raise
        _log.info("%s runs on the general runner: %s", general.name, reason)
        return general, found.text


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A model and what lies beside its weights."""

    module: PreTrainedModel
    text: Text | None
    name: str | None
    pooling: Pooling | str
    generates: bool


def _from_memory(
    model: PreTrainedModel, dtype: torch.dtype | None, device: str | torch.device | None
) -> _Found:
    if dtype not in (None, model.dtype):
        raise ValueError(f"the model in memory is {model.dtype}; convert it yourself with model.to({dtype})")
    if device is not None and torch.device(device).type != model.device.type:
        raise ValueError(
            f"the model in memory is on {model.device}; move it yourself with model.to({device!r})"
        )
    source = model.config.name_or_path
    return _Found(
        module=model,
        text=_tokenizer(source, offline=True) if source else None,
        name=None,
        pooling=_pooling(source, model.config, offline=True) if source else "it was made in memory",
        generates=True,
    )


def _from_name(name: str, dtype: torch.dtype | None, device: str | torch.device | None) -> _Found:
    source = str(embedded.path()) if name == "embedded" else name
    local = Path(source).expanduser()
    if source and local.is_dir():
        _check_directory(local)
        source = str(local)
    else:
        _check_hub_name(name)
    offline = bool(source) and local.is_dir()
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=offline)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(name, "configuration", error, offline=offline) from error
    check_config(config)
    pooling = _pooling(source, config, offline=offline)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with _no_progress_bar():
            module, report = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype or "auto",
                local_files_only=offline,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _unreadable(name, "weights", error, offline=offline) from error
    missing = sorted(report["missing_keys"])
    # Embedding models are saved without the head that they have no use for.
    headless = isinstance(pooling, Pooling) and bool(missing) and missing == _head(module)
    if missing and not headless:
        raise ValueError(
            f"{name} lacks {len(missing)} weights, the first is {missing[0]}; download or convert it again"
        )
    if headless:
        # What stands there is random: the embedding's weights take no memory, and loading gives equal models.
        module.set_output_embeddings(_tied(module))
    return _Found(
        module=module.eval().to(where),
        text=_tokenizer(source, offline=offline),
        name=name,
        pooling=pooling,
        generates=not headless,
    )


def _head(module: PreTrainedModel) -> list[str]:
    """Names of the weights of the language-model head."""
    head = module.get_output_embeddings()
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return sorted(name for name, one in module.named_parameters(remove_duplicate=False) if id(one) in own)


def _tied(module: PreTrainedModel) -> nn.Module:
    """A head made of the embedding's weights."""
    embedding: Any = module.get_input_embeddings()
    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    return head


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the directory that save_pretrained wrote")
    if not any(file for pattern in _WEIGHT_FILES for file in path.glob(pattern)):
        raise ValueError(f"{path} has no weights (*.safetensors); download or save the model again")


def _check_hub_name(name: str) -> None:
    """Refuse what is neither a directory nor ``owner/name``, before a network is touched."""
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not name.startswith((".", "~")):
        return
    if len(parts) > 1:
        raise ValueError(f"there is no directory {name}; give an existing directory or a hub name owner/name")
    near = difflib.get_close_matches(name, ["embedded"], cutoff=0.5)
    siblings = difflib.get_close_matches(
        name, [p.name for p in Path.cwd().iterdir() if p.is_dir()], cutoff=0.7
    )
    hint = (
        f"did you mean {(near or siblings)[0]!r}?"
        if near or siblings
        else "the only short name is 'embedded';"
    )
    raise ValueError(f"unknown model {name!r}: {hint} Otherwise give a directory or a hub name owner/name")


def _unreadable(name: str, what: str, error: Exception, *, offline: bool) -> ValueError:
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = "download or save it again" if offline else "check the name and the network, or give a directory"
    return ValueError(f"cannot read the {what} of {name}: {first_line.strip().rstrip('.')}; {remedy}")


def _pooling(source: str, config: Any, *, offline: bool) -> Pooling | str:
    """How the model embeds texts, or why it does not."""
    try:
        return read_pooling(source, config, offline=offline)
    except (AttributeError, KeyError, TypeError) as error:
        reason = f"its modules.json, or a file that belongs to it, is damaged ({error})"
    except ValueError as error:
        reason = str(error)
    _log.debug("%s does not embed texts: %s", source, reason)
    return reason


def _tokenizer(source: str, *, offline: bool) -> Text | None:
    """The tokenizer beside the weights, or None, which is said."""
    try:
        return Text(AutoTokenizer.from_pretrained(source, local_files_only=offline))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        _log.info("%s has no tokenizer that loads (%s): token ids only", source, first_line)
        return None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading shards draws a bar by default; callers here draw their own."""
    shown: Any = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
