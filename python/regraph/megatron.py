"""regraph for Megatron-Core (0.19): the core attention of a layer spec.

    spec = regraph.megatron.with_attention(get_gpt_layer_local_spec())
    model = GPTModel(config, transformer_layer_spec=spec, …)

CoreAttention stands where DotProductAttention or TEDotProductAttention does and reads the same
config: window_size and window_attn_skip_freq, softmax_type (sinks, of which `softmax_offset` is
the parameter), softmax_scale. It takes batches [s, b, heads, d] and, by PackedSeqParams, packs
[t, heads, d]; under tensor parallelism the heads that this rank has. Context parallelism shares
a sequence out as Megatron does. What it does not do is refused when the model is made.
"""

import copy
import json

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (is_layer_window_attention,
                                             make_sharded_tensors_for_checkpoint)

from .errors import RegraphError
from .specs import program


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
        self._options = ()
        if config.context_parallel_size > 1:
            group = (pg_collection.cp if pg_collection is not None else
                     parallel_state.get_context_parallel_group())
            # chunks r and 2n - 1 - r, as Megatron deals them out; its DDP sums gradients of sinks
            policy = {"regraph_policy": 1, "cp": {"mode": 2, "weights": "local"}}
            self._options = (("policy", json.dumps(policy)), ("cp", group))
        self.softmax_offset = None
        if config.softmax_type != "vanilla":
            heads = config.num_attention_heads // self.tp_group.size()
            device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
            offset = torch.zeros(heads, dtype=config.params_dtype, device=device)
            if config.softmax_type == "learnable":
                self.softmax_offset = torch.nn.Parameter(offset)
                if config.perform_initialization:
                    config.init_method(self.softmax_offset)
            else:
                self.softmax_offset = offset

    def _check(self, attn_mask_type):
        if attn_mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
            _refuse(f"attn_mask_type is {attn_mask_type.name}; expected causal")

    def _attend(self, q, k, v, starts):
        shapes = {"H": q.shape[1], "KH": k.shape[1], "D": q.shape[2], "DV": v.shape[2]}
        sinks = self.softmax_offset
        attend = program("window", self._options, crossed=False, sinks=sinks is not None, **shapes,
                         window=self._window, scale=self._scale, softcap=0.0)
        more = {} if sinks is None else {"sinks": sinks.to(q.device)}
        return attend(q=q, k=k, v=v, cu_seqlens=starts, **more).flatten(1)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None,
                attention_bias=None, packed_seq_params=None, **_):
        """[s, b, heads, d] to [s, b, heads·d], or [t, heads, d] to [t, heads·d]. As in
        TransformerEngine a causal layer looks at no mask."""
        self._check(attn_mask_type)
        if attention_bias is not None:
            _refuse("attention_bias is not served")
        if key.shape[0] != query.shape[0]:
            _refuse(f"{key.shape[0]} keys for {query.shape[0]} queries; expected as many "
                    "(training: inference has engines of its own)")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        shares = self.config.context_parallel_size
        length, batch = query.shape[:2]
        if shares > 1:  # each sequence by itself: its chunks are this rank's rows
            starts = torch.tensor([0, shares * length], dtype=torch.int32, device=query.device)
            return torch.stack([self._attend(query[:, b], key[:, b], value[:, b], starts)
                                for b in range(batch)], 1)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length
        flat = [tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value)]
        return self._attend(*flat, starts).unflatten(0, (batch, length)).transpose(0, 1)

    def _packed(self, query, key, value, params):
        if params.qkv_format != "thd":
            _refuse(f"qkv_format is \"{params.qkv_format}\"; expected \"thd\"")
        if self.config.context_parallel_size > 1:
            _refuse("packs and context parallelism: Megatron cuts each sequence, regraph the pack; "
                    "expected packed_seq_params or context_parallel_size > 1, not both")
        # what pads a sequence follows it, and nothing before sees it: it may count as its tokens
        padded = params.cu_seqlens_q_padded
        starts = params.cu_seqlens_q if padded is None else padded
        one = query.dim() == 4  # [t, 1, heads, d]
        o = self._attend(*(t.squeeze(1) if one else t for t in (query, key, value)), starts)
        return o.unsqueeze(1) if one else o

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The sinks, where they are learned, shared out by heads, as DotProductAttention's."""
        learned = self.config.softmax_type == "learnable"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True) if learned else {}, prefix,
            {"softmax_offset": 0}, sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"])


def with_attention(spec):
    """A layer spec, of a GPT's layer or of a block of them, whose self-attention is ours."""
    spec = copy.deepcopy(spec)
    layers = getattr(spec, "layer_specs", None) or [spec]
    for layer in layers:
        layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec
