"""regraph for Hugging Face transformers (5.17 and newer), for training and generation.

    import regraph.hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="regraph")

Importing this registers attention and masks under the name "regraph". What is served: causal
attention with windows, sinks, softcap, grouped heads; batches padded left or right, packed batches
(`cu_seq_lens_q`, or position_ids that start anew), keys from a cache, and continuous batching.
Everything else, such as dropout, chunked or bidirectional masks, is refused by name.

Masks: transformers asks `mask` once a forward for each kind of layer. It answers as for flash
attention, None or which keys are there [B, S], or for packed batches the number of each token's
sequence. Layers then share what follows from it (_Layout), which is kept with the mask.

NSA: NsaLlamaForCausalLM and NsaQwen3ForCausalLM (and their configs) attend by Native Sparse
Attention, with gates and learned compression. See docs/hf.md.
"""

import importlib
from dataclasses import dataclass

import torch
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel,
                          AutoModelForCausalLM)
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .errors import RegraphError
from .programs import room
from .specs import NSA, nsa_program, nsa_settings, program

NAME = "regraph"
# what the parts of a mask that we serve are called; each says a rule that _Layout or a window keeps
_SERVED = {"causal_mask_function", "and_masks.<locals>.and_mask",
           "sliding_window_overlay.<locals>.inner_mask",
           "packed_sequence_mask_function.<locals>.inner_mask",
           "remap_positions_for_packed_sequence.<locals>.inner_mask"}
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_OTHER = "position_bias", "head_mask"


def _refuse(message):
    raise RegraphError("RG_E_USAGE", f"attn_implementation=\"{NAME}\": {message}")


# ---- masks ----


def _parts(function):
    """The functions that a mask is made of, itself among them."""
    yield function
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            if callable(part) and not isinstance(part, torch.Tensor):
                yield from _parts(part)


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None,
         attention_mask=None, device=None, **_):
    """What transformers calls for a mask. None: all keys up to a query's own are there. bool
    [B, keys] says which are, the queries' own last; integers number tokens' sequences, from 1."""
    parts = list(_parts(mask_function)) if mask_function is not None else []
    for part in parts:
        if part.__qualname__ not in _SERVED:
            _refuse(f"masks by {part.__qualname__.split('.')[0]} are not served; take \"sdpa\"")
    packed = next((part for part in parts if part.__qualname__ == _PACKED), None)
    if packed is not None:
        return packed.__closure__[0].cell_contents + 1
    filled = int(q_offset) + q_length - kv_offset  # keys that are there: a static cache has more
    if attention_mask is None:
        if filled == kv_length:
            return None
        return torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    there = attention_mask[:, : kv_offset + filled][:, -filled:].bool()
    return None if filled == kv_length and there.all() else there


# ---- where queries and keys stand in the packed tensors ----


@dataclass(frozen=True)
class _Layout:
    starts: torch.Tensor  # of the sequences of queries
    rows: torch.Tensor | None = None  # of all queries those that are there; None: all
    starts_k: torch.Tensor | None = None  # where keys are others than the queries' own
    rows_k: torch.Tensor | None = None
    offset: torch.Tensor | None = None  # keys before each sequence's first query


def _starts(counts):
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _where(there, width):
    """Numbers of the rows that are there, of `width` in a batch entry."""
    entry, at = there.nonzero(as_tuple=True)
    return entry * width + at


def _of_breaks(breaks):
    """Sequences that begin where `breaks` [B, S] says, and at the start of each entry."""
    breaks = breaks.clone()
    breaks[:, 0] = True
    first = breaks.flatten().nonzero().squeeze(1)
    return _Layout(torch.nn.functional.pad(first, (0, 1), value=breaks.numel()).to(torch.int32))


def _of_mask(there, queries, keys):
    if there.dim() != 2:
        _refuse(f"a mask of {there.dim()} axes; expected which tokens are there, [B, S]")
    if there.dtype != torch.bool:
        return _of_breaks(there != torch.roll(there, 1, 1))
    width = there.shape[1]
    own = there[:, width - queries:]
    rows, starts = _where(own, queries), _starts(own.sum(1))
    if width == queries and keys == queries:
        return _Layout(starts, rows)
    return _Layout(starts, rows, _starts(there.sum(1)), _where(there, keys),
                   there[:, : width - queries].sum(1).to(torch.int32))


def _of_positions(positions, batch):
    return _of_breaks(torch.diff(positions, prepend=positions[:, :1], dim=1).ne(1)
                      .expand(batch, -1))


def _of_lengths(starts, starts_k, queries, keys):
    if starts_k is None or starts_k is starts and queries == keys:
        return _Layout(starts)
    if not isinstance(starts_k, torch.Tensor):
        _refuse("cu_seq_lens_k differs from layer to layer; expected one tensor")
    return _Layout(starts, starts_k=starts_k,
                   offset=(starts_k.diff() - starts.diff()).to(torch.int32))


def _dense(batch, queries, keys, device):
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    if queries == keys:
        return _Layout(starts * queries)
    return _Layout(starts * queries, starts_k=starts * keys,
                   offset=torch.full((batch,), keys - queries, dtype=torch.int32, device=device))


def _kept(tensor, kind, make):
    """What `make` makes of a tensor that all layers are given, made once."""
    if torch.compiler.is_compiling() or tensor.is_inference():  # which counts no changes
        return make()
    kind = (*kind, tensor._version)
    if getattr(tensor, "_regraph", (None,))[0] != kind:
        tensor._regraph = kind, make()
    return tensor._regraph[1]


def _layout(query, key, there, starts, starts_k, positions):
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if there is not None:
        return _kept(there, (queries, keys), lambda: _of_mask(there, queries, keys))
    if starts is not None:
        return _of_lengths(starts, starts_k, queries, keys)
    if positions is not None and positions.dim() == 2 and 1 < queries == keys == positions.shape[1]:
        return _kept(positions, (batch,), lambda: _of_positions(positions, batch))
    return _dense(batch, queries, keys, query.device)


# ---- attention ----


def _widened(tensor, rows, value=0):
    """With so many rows: few plans then serve all lengths of a growing cache."""
    more = rows - tensor.shape[0]
    pad = [0, 0] * (tensor.dim() - 1) + [0, more]
    return torch.nn.functional.pad(tensor, pad, value=value) if more else tensor


def _widened_starts(starts, count):
    return torch.cat([starts, starts[-1:].expand(count + 1 - len(starts))])


def _run(attend, layout, query, key, value, gate=None, **weights):
    """Attention of batches [B, heads, S, d] where the layout says; [B, S, heads, d]."""
    batch, heads, length = query.shape[:3]

    def packed(tensor, rows):
        flat = tensor.flatten(0, 1)
        return flat if rows is None else flat.index_select(0, rows)

    crossed = layout.starts_k is not None
    rows_k = layout.rows_k if crossed else layout.rows
    named = {"q": packed(query.transpose(1, 2), layout.rows),
             "k": packed(key.transpose(1, 2), rows_k), "v": packed(value.transpose(1, 2), rows_k),
             "cu_seqlens": layout.starts, **weights}
    if gate is not None:
        named["gate"] = packed(gate, layout.rows)
    count = named["q"].shape[0]
    if crossed:
        for name, tensor in list(named.items()):
            if name in ("q", "k", "v", "gate"):
                named[name] = _widened(tensor, room(tensor.shape[0]))
        sequences = room(len(layout.offset), 0)
        named["cu_seqlens"] = _widened_starts(layout.starts, sequences)
        named["cu_seqlens_k"] = _widened_starts(layout.starts_k, sequences)
        named["q_offset"] = _widened(layout.offset, sequences)
    o = attend(**named)[:count]
    if layout.rows is not None:
        wide = o.new_zeros(batch * length, *o.shape[1:])
        o = wide.index_copy(0, layout.rows, o)
    return o.unflatten(0, (batch, length))


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
              sliding_window=None, softcap=None, s_aux=None, is_causal=None, cu_seq_lens_q=None,
              cu_seq_lens_k=None, position_ids=None, regraph_gate=None, **kwargs):
    """What transformers calls for attention: query [B, H, S, D], key and value [B, KH, S, D]."""
    if dropout:
        _refuse("no dropout of attention weights; set attention_dropout to 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        _refuse("attention is causal; this layer's is not")
    if kwargs.get("block_table") is not None:
        _refuse("tables of pages are not served; set max_blocks_per_request to 0")
    for name in _OTHER:
        if kwargs.get(name) is not None:
            _refuse(f"{name} is not served")
    layout = _layout(query, key, attention_mask, cu_seq_lens_q, cu_seq_lens_k, position_ids)
    crossed = layout.starts_k is not None
    shapes = {"H": query.shape[1], "KH": key.shape[1], "D": query.shape[3], "DV": value.shape[3],
              "scale": float(scaling or query.shape[3] ** -0.5)}
    if regraph_gate is not None:
        if sliding_window or softcap or s_aux is not None:
            _refuse("NSA has no windows of layers, sinks or softcap")
        o = _run(module.nsa(crossed, shapes), layout, query, key, value, regraph_gate,
                 **module.nsa_weights())
    else:
        attend = program("window", crossed=crossed, sinks=s_aux is not None, **shapes,
                          softcap=float(softcap or 0),
                          window=sliding_window - 1 if sliding_window else -1)
        o = _run(attend, layout, query, key, value, **({} if s_aux is None else {"sinks": s_aux}))
    return o, None


# ---- continuous batching: one pack of all requests' rows, keys read from pages for each layer ----


def paged_attention(module, query, key, value, attention_mask, cache=None, **kwargs):
    """What older transformers (5.17) call in continuous batching: the cache is kept here."""
    if cache is None:
        _refuse("\"paged|regraph\" is for continuous batching; take \"regraph\"")
    if kwargs.get("block_table") is not None:
        _refuse("tables of pages are not served; set max_blocks_per_request to 0")
    key, value = (rows.transpose(0, 1).unsqueeze(0) for rows in cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx,
        read_index=kwargs["read_index"], write_index=kwargs["write_index"]))
    starts = kwargs.get("cu_seq_lens_k")
    if isinstance(starts, dict):
        kind = "sliding" if getattr(module, "sliding_window", None) else "full"
        kwargs["cu_seq_lens_k"] = starts[f"{kind}_attention"].to(torch.int32)
    return attention(module, query, key, value, None, **kwargs)


def _count_as_flash():
    """Continuous batching packs rows by lengths for names with "flash" in them, and has masks of
    [rows, keys] for two others; a name of ours it does not know. So where it asks, we are one."""
    for part in ("continuous_api", "initialization", "cache"):
        try:
            module = importlib.import_module(f"transformers.generation.continuous_batching.{part}")
            asked = module.is_flash_attention_requested
        except (ImportError, AttributeError):  # then it refuses our name itself
            continue

        def requested(config=None, requested_attention_implementation=None, version=None,
                      asked=asked):
            name = requested_attention_implementation or getattr(config, "_attn_implementation", "")
            if version is None and name in (NAME, f"paged|{NAME}"):
                return True
            return asked(config, requested_attention_implementation, version)

        module.is_flash_attention_requested = requested


for _name, _attention in ((NAME, attention), (f"paged|{NAME}", paged_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, mask)
_count_as_flash()


# ---- Native Sparse Attention in Llama and Qwen3 ----


class _Settled:
    """A config's `nsa` is whole whenever it is set; `from_pretrained` does that at the end."""

    def __setattr__(self, name, value):
        super().__setattr__(name, nsa_settings(value) if name == "nsa" else value)


class NsaLlamaConfig(_Settled, llama.LlamaConfig):
    """LlamaConfig with `nsa`, a dict of settings (NSA says which there are, and defaults)."""

    model_type = "regraph_nsa_llama"
    nsa: dict | None = None


class NsaQwen3Config(_Settled, qwen3.Qwen3Config):
    """Qwen3Config with `nsa`, a dict of settings (NSA says which there are, and defaults)."""

    model_type = "regraph_nsa_qwen3"
    nsa: dict | None = None


class NsaAttention:
    """What a model's attention layer becomes with this as its first base: it has gates, one for
    each head and branch, and weights that compress blocks of keys and values, where these learn."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.nsa_gate = torch.nn.Linear(config.hidden_size, 3 * config.num_attention_heads)
        for name in ("k", "v"):
            if config.nsa[f"{name}_method"] != "mean":
                wide = 1 if config.nsa[f"{name}_method"] == "linear" else 2
                self.add_module(f"nsa_{name}_compress", torch.nn.Linear(
                    config.nsa["kernel"] * self.head_dim, wide * self.head_dim, bias=False))

    def nsa(self, crossed, shapes):
        """The program for queries and keys of these shapes."""
        return nsa_program(self.config.nsa, crossed, **shapes)

    def nsa_weights(self):
        """Weights of compression, by their names in the spec."""
        found = {f"{name}_weight": getattr(self, f"nsa_{name}_compress", None) for name in "kv"}
        return {name: linear.weight for name, linear in found.items() if linear is not None}

    def forward(self, hidden_states, *args, **kwargs):
        """The layer's forward, which hands the gates through to `attention`."""
        gate = self.nsa_gate(hidden_states).unflatten(-1, (-1, 3))
        return super().forward(hidden_states, *args, regraph_gate=gate, **kwargs)


class NsaLlamaAttention(NsaAttention, llama.LlamaAttention):
    """Llama's attention layer by NSA."""


class NsaQwen3Attention(NsaAttention, qwen3.Qwen3Attention):
    """Qwen3's attention layer by NSA."""


class _NsaModel:
    """The first base of models whose layers attend by NSA: those of full attention do."""

    _nsa_attention: type

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.base_model.layers):
            if not getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn = self._nsa_attention(config, index)
        self.post_init()

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation not in (None, NAME, f"paged|{NAME}"):
            raise RegraphError("RG_E_USAGE", f"{type(self).__name__} attends by NSA alone; "
                               f"expected attn_implementation=\"{NAME}\" or none, not "
                               f"\"{attn_implementation}\"")
        return super()._check_and_adjust_attn_implementation(attn_implementation or NAME, *args,
                                                             **kwargs)


class NsaLlamaModel(_NsaModel, llama.LlamaModel):
    """LlamaModel whose layers attend by NSA."""

    config_class = NsaLlamaConfig
    config: NsaLlamaConfig
    _nsa_attention = NsaLlamaAttention


class NsaLlamaForCausalLM(_NsaModel, llama.LlamaForCausalLM):
    """LlamaForCausalLM whose layers attend by NSA."""

    config_class = NsaLlamaConfig
    config: NsaLlamaConfig
    _nsa_attention = NsaLlamaAttention


class NsaQwen3Model(_NsaModel, qwen3.Qwen3Model):
    """Qwen3Model whose layers attend by NSA."""

    config_class = NsaQwen3Config
    config: NsaQwen3Config
    _nsa_attention = NsaQwen3Attention


class NsaQwen3ForCausalLM(_NsaModel, qwen3.Qwen3ForCausalLM):
    """Qwen3ForCausalLM whose layers attend by NSA."""

    config_class = NsaQwen3Config
    config: NsaQwen3Config
    _nsa_attention = NsaQwen3Attention


for _config, _model, _causal in ((NsaLlamaConfig, NsaLlamaModel, NsaLlamaForCausalLM),
                                 (NsaQwen3Config, NsaQwen3Model, NsaQwen3ForCausalLM)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal)
