"""regraph for torchtitan (0.3): the inner attention of its models.

    config = regraph.torchtitan.with_attention(llama3_configs["8B"](attn_backend="varlen"))

Attention stands where VarlenAttention does and takes what that takes: batches [B, L, heads, d], the
documents in them (VarlenMetadata), windows, an `out_transform` that asks for log-sum-exps. It runs
in any type (VarlenAttention in bf16 alone), on CPUs, too.

Who recomputes what: activation checkpointing of a block runs its attention again, unless
SelectiveAC of this module is the policy, which keeps what attention hands to its backward.
"""

import copy
from dataclasses import dataclass

import torch
from torchtitan.distributed import activation_checkpoint
from torchtitan.models.common.attention import VarlenAttention
from torchtitan.protocols.module import Module

from .errors import RegraphError
from .specs import program


def _refuse(message):
    raise RegraphError("RG_E_USAGE", f"regraph.torchtitan: {message}")


class Attention(VarlenAttention):
    """Causal attention within documents, in the place of VarlenAttention."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        """As VarlenAttention's: `window_size` is (keys before the query's own or -1, 0)."""

    def __init__(self, config):
        Module.__init__(self)  # VarlenAttention's own looks for flash attention
        if config.window_size[1] != 0:
            _refuse(f"window_size is {config.window_size}; expected no keys after the query's own")
        self.window_size = config.window_size

    def forward(self, q, k, v, *, attention_masks=None, scale=None, out_transform=None, **_):
        """[B, L, heads, d]; without masks each of the batch is one document."""
        batch, length = q.shape[:2]
        if attention_masks is None:
            starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        else:
            starts = attention_masks.cu_seq_q
        shapes = {"H": q.shape[2], "KH": k.shape[2], "D": q.shape[3], "DV": v.shape[3]}
        attend = program("window", crossed=False, sinks=False, lse=out_transform is not None,
                         **shapes, window=self.window_size[0], softcap=0.0,
                         scale=float(scale or q.shape[3] ** -0.5))
        flat = {name: tensor.flatten(0, 1) for name, tensor in (("q", q), ("k", k), ("v", v))}
        made = attend(**flat, cu_seqlens=starts)
        if out_transform is None:
            return made.unflatten(0, (batch, length))
        return out_transform(*(made[name].unflatten(0, (batch, length)) for name in ("o", "lse")))


class SelectiveAC(activation_checkpoint.SelectiveAC):
    """torchtitan's selective activation checkpointing, which does not run our attention again."""

    @dataclass(kw_only=True, slots=True)
    class Config(activation_checkpoint.SelectiveAC.Config):
        """As torchtitan's."""

    def get_save_ops(self):
        """What is kept: torchtitan's own choice and what our forward makes."""
        return {*super().get_save_ops(), torch.ops.regraph.forward.default}


def with_attention(config):
    """A model's config whose layers' attention, "varlen" before, is ours."""
    config = copy.deepcopy(config)
    for layer in config.layers:
        inner = layer.attention.inner_attention
        if not isinstance(inner, VarlenAttention.Config):
            _refuse(f"a layer's attention is {type(inner).__qualname__}; expected "
                    "VarlenAttention.Config, as attn_backend=\"varlen\" gives")
        layer.attention.inner_attention = Attention.Config(window_size=inner.window_size)
    return config
