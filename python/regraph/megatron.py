"""regraph for Megatron-Core (0.19): the core attention of a layer spec; Native Sparse Attention.

    spec = regraph.megatron.with_attention(get_gpt_layer_local_spec())
    spec = regraph.megatron.with_nsa(get_gpt_layer_local_spec(), window=256, k_method="linear")
    model = GPTModel(config, transformer_layer_spec=spec, …)

CoreAttention stands where DotProductAttention or TEDotProductAttention does and reads the same
config: window_size and window_attn_skip_freq, softmax_type (sinks, of which `softmax_offset` is
the parameter), softmax_scale. It takes batches [s, b, heads, d] and, by PackedSeqParams, packs
[t, heads, d]; under tensor parallelism the heads that this rank has. Context parallelism shares
a sequence out as Megatron does; rows of a pack go over to regraph's shares and back. What it does
not do is refused when the model is made.

NsaSelfAttention stands where SelfAttention does: it has gates of the layer's input, and around
NsaCoreAttention, which has the weights of compression, all that Megatron's has.
"""

import copy
import functools
import json

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (is_layer_window_attention,
                                             make_sharded_tensors_for_checkpoint)

from .errors import RegraphError
from .rows import cp_from_documents, cp_to_documents
from .specs import nsa_program, nsa_settings, policy_document, program


class Refused(RegraphError):
    """What this adapter does not do. Made of a text alone, since Megatron raises what goes wrong in
    a layer's making again, with more text."""

    def __init__(self, message):
        super().__init__("RG_E_USAGE", message)


def _refuse(message):
    raise Refused(f"regraph.megatron: {message}")


def _window(config, layer_number):
    """Keys before a query's own that this layer sees; -1: all."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq,
                                     layer_number):
        return -1
    left, right = config.window_size
    if right > 0:
        _refuse(f"window_size is {config.window_size}; expected no keys after the query's own")
    return left


class CoreAttention(MegatronModule):
    """Causal attention, in the place of Megatron's DotProductAttention."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type,
                 attention_dropout=None, softmax_scale=None, k_channels=None, v_channels=None,
                 cp_comm_type=None, pg_collection=None, **_):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            _refuse(f"attention_dropout is {dropout}; expected 0")
        if attention_type != "self":
            _refuse(f"attention_type is \"{attention_type}\"; expected \"self\"")
        if config.qk_clip or config.log_max_attention_logit:
            _refuse("the largest logit is not told; expected neither qk_clip nor "
                    "log_max_attention_logit")
        self._check(attn_mask_type)
        self._scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5
        self._window = _window(config, max(1, layer_number))
        self.tp_group = (pg_collection.tp if pg_collection is not None else
                         parallel_state.get_tensor_model_parallel_group())
        self._group = None
        if config.context_parallel_size > 1:
            self._group = (pg_collection.cp if pg_collection is not None else
                           parallel_state.get_context_parallel_group())
        self.softmax_offset = None
        if config.softmax_type != "vanilla":
            heads = config.num_attention_heads // self.tp_group.size()
            offset = torch.zeros(heads, **self._place())
            if config.softmax_type == "learnable":
                self.softmax_offset = torch.nn.Parameter(offset)
                if config.perform_initialization:
                    config.init_method(self.softmax_offset)
            else:
                self.softmax_offset = offset

    def _check(self, attn_mask_type):
        if attn_mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
            _refuse(f"attn_mask_type is {attn_mask_type.name}; expected causal")

    def _place(self):
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        return {"dtype": self.config.params_dtype, "device": device}

    def _options(self, policy=None):
        """Of a program: a policy, and who shares out the tokens."""
        if self._group is None:
            return (("policy", policy),)
        # chunks r and 2n - 1 - r, as Megatron deals them out; its DDP sums gradients of weights
        policy = {"regraph_policy": 1, **policy_document(policy),
                  "cp": {"mode": 2, "weights": "local"}}
        return ("policy", json.dumps(policy)), ("cp", self._group)

    def _shapes(self, q, k, v):
        return {"H": q.shape[1], "KH": k.shape[1], "D": q.shape[2], "DV": v.shape[2],
                "scale": self._scale}

    def _attend(self, starts, q, k, v):
        sinks = self.softmax_offset
        attend = program("window", self._options(), crossed=False, sinks=sinks is not None,
                         **self._shapes(q, k, v), window=self._window, softcap=0.0)
        more = {} if sinks is None else {"sinks": sinks.to(q.device)}
        return attend(q=q, k=k, v=v, cu_seqlens=starts, **more).flatten(1)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None,
                attention_bias=None, packed_seq_params=None, gate=None, **_):
        """[s, b, heads, d] to [s, b, heads·d], or [t, heads, d] to [t, heads·d]. As in
        TransformerEngine a causal layer looks at no mask."""
        self._check(attn_mask_type)
        if attention_bias is not None:
            _refuse("attention_bias is not served")
        if key.shape[0] != query.shape[0]:
            _refuse(f"{key.shape[0]} keys for {query.shape[0]} queries; expected as many "
                    "(training: inference has engines of its own)")
        rows = [query, key, value] if gate is None else [query, key, value, gate]
        if packed_seq_params is not None:
            return self._packed(rows, packed_seq_params)
        shares = self.config.context_parallel_size
        length, batch = query.shape[:2]
        if shares > 1:  # each sequence by itself: its chunks are this rank's rows
            return torch.stack([self._shared([t[:, b] for t in rows]) for b in range(batch)], 1)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
        flat = [tensor.transpose(0, 1).flatten(0, 1) for tensor in rows]
        return self._attend(starts, *flat).unflatten(0, (batch, length)).transpose(0, 1)

    def _shared(self, rows):
        """One sequence, of which these are this rank's rows."""
        length = self.config.context_parallel_size * rows[0].shape[0]
        starts = torch.tensor([0, length], dtype=torch.int32, device=rows[0].device)
        return self._attend(starts, *rows)

    def _packed(self, rows, params):
        if params.qkv_format != "thd":
            _refuse(f"qkv_format is \"{params.qkv_format}\"; expected \"thd\"")
        # what pads a sequence follows it, and nothing before sees it: it may count as its tokens
        padded = params.cu_seqlens_q_padded
        starts = params.cu_seqlens_q if padded is None else padded
        one = rows[0].dim() == 4  # [t, 1, heads, d]
        if one:
            rows = [tensor.squeeze(1) for tensor in rows]
        if self._group is None:
            o = self._attend(starts, *rows)
        else:  # Megatron cuts each sequence, regraph a pack as a whole
            over = cp_from_documents(rows, starts, self._group, mode=2)
            o = cp_to_documents(self._attend(starts, *over), starts, self._group, mode=2)
        return o.unsqueeze(1) if one else o

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Learned sinks, shared out by heads as DotProductAttention's, and weights of compression,
        which all ranks have."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0},
            sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])


class NsaCoreAttention(CoreAttention):
    """Native Sparse Attention by settings `nsa`, with weights that compress blocks of keys and
    values where these learn. What gates the branches comes from NsaSelfAttention."""

    def __init__(self, config, *args, nsa, **more):
        super().__init__(config, *args, **more)
        if config.softmax_type != "vanilla" or self._window >= 0:
            _refuse("NSA has neither sinks nor windows of layers; expected softmax_type "
                    "\"vanilla\" and no window_size (its own is the setting `window`)")
        self._nsa, self._gate = nsa_settings(nsa), None
        for name in ("k", "v"):
            method, weight = self._nsa[f"{name}_method"], None
            if method != "mean":
                rows = config.kv_channels * (1 if method == "linear" else 2)
                columns = self._nsa["kernel"] * config.kv_channels
                weight = torch.nn.Parameter(torch.empty(rows, columns, **self._place()))
                if config.perform_initialization:
                    config.init_method(weight)
            self.register_parameter(f"{name}_weight", weight)

    def hand(self, gate):
        """Gates [s, b, heads·3] for the next forward."""
        self._gate = gate

    def take(self):
        """The gates that were handed, once."""
        gate, self._gate = self._gate, None
        return gate

    def forward(self, query, *args, gate=None, **more):
        gate = (self.take() if gate is None else gate).unflatten(-1, (-1, 3))
        if query.dim() == 3:  # a pack, whose batch of one Megatron drops
            gate = gate.squeeze(1)
        return super().forward(query, *args, gate=gate, **more)

    def _attend(self, starts, q, k, v, gate):
        attend = nsa_program(self._nsa, options=self._options(self._nsa["policy"]),
                             **self._shapes(q, k, v))
        # each rank has some of the heads, and all of these: gradients are sums over the heads
        weights = {name: copy_to_tensor_model_parallel_region(weight, self.tp_group)
                   for name, weight in self.named_parameters(recurse=False)}
        return attend(q=q, k=k, v=v, gate=gate, cu_seqlens=starts, **weights).flatten(1)


class NsaSelfAttention(SelfAttention):
    """SelfAttention around NsaCoreAttention: `linear_gate` makes its gates, one for each head and
    branch, of the layer's input."""

    def __init__(self, config, *args, **more):
        super().__init__(config, *args, **more)
        self.linear_gate = ColumnParallelLinear(
            config.hidden_size, 3 * config.num_attention_heads, config=config,
            init_method=config.init_method, bias=True, gather_output=False, tp_group=self.tp_group)

    def forward(self, hidden_states, *args, **more):
        self.core_attention.hand(self.linear_gate(hidden_states)[0])
        return super().forward(hidden_states, *args, **more)

    def _checkpointed_attention_forward(self, *args, **more):
        return super()._checkpointed_attention_forward(
            *args, core_attention_extra_kwargs={"gate": self.core_attention.take()}, **more)


def _attentions(spec):
    """Specs of the self-attentions in a spec of a GPT's layer, or of a block of them."""
    return [layer.submodules.self_attention
            for layer in getattr(spec, "layer_specs", None) or [spec]]


def with_attention(spec):
    """A layer spec, of a GPT's layer or of a block of them, whose self-attention is ours."""
    spec = copy.deepcopy(spec)
    for attention in _attentions(spec):
        attention.submodules.core_attention = CoreAttention
    return spec


def with_nsa(spec, **settings):
    """A layer spec, of a GPT's layer or of a block of them, whose layers attend by NSA. `settings`
    are those of regraph.specs.NSA: kernel, stride, block, top_n, init, local, window, k_method,
    v_method, policy."""
    spec, settings = copy.deepcopy(spec), nsa_settings(settings)
    for attention in _attentions(spec):
        if attention.module is not SelfAttention:
            _refuse(f"self_attention is {attention.module.__name__}; expected SelfAttention")
        attention.module = NsaSelfAttention
        attention.submodules.core_attention = functools.partial(NsaCoreAttention, nsa=settings)
    return spec
