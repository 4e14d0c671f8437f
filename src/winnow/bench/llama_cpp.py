"""llama.cpp as a contender of the end-to-end benchmark, on the same random weights.

Needs the extra ``peers`` (``llama-cpp-python`` and ``gguf``). The weights are written once as a
bf16 GGUF file. A deep cache is filled without prefilling it: one short prompt is computed, and
copies of its state are loaded behind each other, moved to later positions. What a decode step
costs depends on how many entries it reads, not on what they hold.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LlamaCpp", "available", "write_gguf"]

_PIECE = 2048


def available() -> str:
    """Empty where llama.cpp can take part, else what is missing and the remedy."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        return f'{error.name} is not installed; pip install "winnow-llm[peers]"'
    return ""


class LlamaCpp:
    """llama.cpp through its low-level Python binding, weights in bf16, cache in f16.

    Parameters
    ----------
    module : transformers.LlamaForCausalLM
        Written to a temporary GGUF file; its tensors are not kept.
    threads : int
    """

    def __init__(self, module: nn.Module, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._threads = threads
        self._file = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115 - closed with the object
        write_gguf(module, Path(self._file.name))
        llama_cpp.llama_backend_init()
        _be_quiet(llama_cpp)
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(self._file.name.encode(), params)
        if not self._model:
            raise ValueError("llama.cpp could not load the model that was written for it")
        self._context: Any = None
        self._at = 0

    def _open(self, room: int) -> None:
        self.drop()
        params = self._lib.llama_context_default_params()
        params.n_ctx = -(-room // 256) * 256
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self._threads
        params.n_seq_max = 2
        params.kv_unified = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp could not open a context of {room} tokens")

    def _run(self, ids: list[int], position: int) -> None:
        """Compute tokens of sequence 0 from ``position`` on."""
        lib = self._lib
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i == len(ids) - 1
            code = lib.llama_decode(self._context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}")
        finally:
            lib.llama_batch_free(batch)

    def fill(self, entries: int, room: int) -> None:
        """See :class:`winnow.bench.end_to_end.Contender`."""
        lib, piece = self._lib, min(_PIECE, entries)
        if entries % piece:
            raise ValueError(f"llama.cpp is filled in pieces of {piece} entries; choose a multiple of it")
        self._open(entries + room)
        for first in range(0, piece, 512):
            self._run([1] * min(512, piece - first), first)
        memory = lib.llama_get_memory(self._context)
        size = lib.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        lib.llama_state_seq_get_data(self._context, buffer, size, 0)
        for at in range(piece, entries, piece):
            if not lib.llama_state_seq_set_data(self._context, buffer, size, 1):
                raise RuntimeError("llama.cpp refused the state that it had given")
            lib.llama_memory_seq_add(memory, 1, 0, -1, at)
            lib.llama_memory_seq_cp(memory, 1, 0, 0, -1)
            lib.llama_memory_seq_rm(memory, 1, 0, -1)
        self._at = entries
        assert lib.llama_memory_seq_pos_max(memory, 0) == entries - 1

    def decode(self, tokens: int) -> float:
        """See :class:`winnow.bench.end_to_end.Contender`."""
        token = 1
        start = time.perf_counter()
        for _ in range(tokens):
            token = self.extend([token])
        return (time.perf_counter() - start) / tokens

    def prefill(self, ids: list[int]) -> float:
        """See :class:`winnow.bench.end_to_end.Contender`."""
        self.begin(len(ids) + 1)
        start = time.perf_counter()
        self._append(ids)
        seconds = time.perf_counter() - start
        self.drop()
        return seconds

    @property
    def length(self) -> int:
        """Tokens of the sequence that have entries."""
        return self._at

    def begin(self, room: int) -> None:
        """Start an empty sequence with room for so many tokens."""
        self._open(room)
        self._at = 0

    def extend(self, ids: list[int]) -> int:
        """Append tokens to the sequence; the likeliest next one."""
        self._append(ids)
        return self._likeliest()

    def cut(self, length: int) -> None:
        """Forget all tokens of the sequence but the first ``length``."""
        if not self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, length, -1):
            raise RuntimeError("llama.cpp refused to cut a sequence")
        self._at = length

    def state_bytes(self) -> int:
        """Bytes of the sequence's state as llama.cpp would save it: its entries and their places."""
        return int(self._lib.llama_state_seq_get_size(self._context, 0))

    def _append(self, ids: list[int]) -> None:
        for first in range(0, len(ids), 512):
            piece = ids[first : first + 512]
            self._run(piece, self._at)
            self._at += len(piece)

    def _likeliest(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocabulary)).contents
        return int(torch.frombuffer(row, dtype=torch.float32).argmax())

    def drop(self) -> None:
        """See :class:`winnow.bench.end_to_end.Contender`."""
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None


def _be_quiet(lib: Any) -> None:
    def log(level: int, text: bytes, data: Any) -> None:
        pass

    callback = lib.llama_log_callback(log)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    # The library keeps a bare pointer: the callback must outlive it.
    lib.winnow_log_callback = callback


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order.

    It turns neighbouring pairs of a head's channels; `transformers` turns the first half against the second.
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _rope_factors(module: Any) -> Tensor:
    """``[D / 2]``: by how much the model turns each pair of channels slower than its base alone says."""
    config = module.config
    frequencies_E: Tensor = module.model.rotary_emb.inv_freq.float()
    steps_E = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain_E = torch.pow(float(config.rope_parameters["rope_theta"]), -steps_E)
    return plain_E / frequencies_E


def write_gguf(module: Any, path: Path) -> None:
    """Write the weights of a Llama in llama.cpp's own file format, bf16, without a tokenizer.

    Parameters
    ----------
    module : transformers.LlamaForCausalLM
    path : Path
    """
    import gguf

    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    def add(name: str, tensor: Tensor) -> None:
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
            return
        raw = tensor.detach().to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    with torch.no_grad():
        add("token_embd.weight", module.model.embed_tokens.weight)
        factors_E = _rope_factors(module)
        if not torch.allclose(factors_E, torch.ones_like(factors_E), rtol=1e-4):
            add("rope_freqs.weight", factors_E)
        add("output_norm.weight", module.model.norm.weight)
        if not config.tie_word_embeddings:
            add("output.weight", module.lm_head.weight)
        for i, layer in enumerate(module.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for name, owner in (
                ("attn_norm", layer.input_layernorm),
                ("attn_v", attention.v_proj),
                ("attn_output", attention.o_proj),
                ("ffn_norm", layer.post_attention_layernorm),
                ("ffn_gate", mlp.gate_proj),
                ("ffn_up", mlp.up_proj),
                ("ffn_down", mlp.down_proj),
            ):
                add(f"blk.{i}.{name}.weight", owner.weight)
            for name, owner in (("attn_q", attention.q_proj), ("attn_k", attention.k_proj)):
                add(f"blk.{i}.{name}.weight", _interleaved(owner.weight, config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
