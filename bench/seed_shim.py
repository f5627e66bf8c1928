"""Lets bench/compare.py run mdy666/Scalable-Flash-Native-Sparse-Attention ("the seed") from a
checkout of it.

The seed wants a module flash_attn_interface (FlashAttention 3) for its sliding window, and
pkg_resources. Both are stood in for here: the former by FlashAttention 4 (flash-attn-4) where that
is installed and knows the widths, else by torch's own FlashAttention 2,
`aten::_flash_attention_forward`, which knows packs and windows. Where the real ones are installed
they are used, and `swa_backend` says so. A process keeps what its first Seed took.
"""

import sys
import types

import torch


def widened(x, q):
    """x with zeros up to q's width: FlashAttention 2 knows one width alone."""
    return torch.nn.functional.pad(x,
                                   (0,
                                    q.shape[-1] - x.shape[-1])) if x.shape[-1] < q.shape[-1] else x


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, causal=True, window=(-1, -1)):
    """torch's FlashAttention 2 over a pack: o [T, H, d], lse, and what its backward wants
    besides."""
    left = window[0] if window[0] >= 0 else None
    o, lse, state, extra, _ = torch.ops.aten._flash_attention_forward(
        q, k, widened(v, q), cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale,
        window_size_left=left, window_size_right=0 if left is not None else None)
    return o[..., :v.shape[-1]], lse, state, extra


def flash_backward(d_o, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, state, extra, scale=None,
                   causal=True, window=(-1, -1)):
    left = window[0] if window[0] >= 0 else None
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        widened(d_o, q), q, k, widened(v, q), widened(o, q), lse, cu_q, cu_k, max_q, max_k, 0.0,
        causal, state, extra, scale=scale, window_size_left=left,
        window_size_right=0 if left is not None else None)
    return d_q, d_k, d_v[..., :v.shape[-1]]


class Flash(torch.autograd.Function):
    """flash_forward with its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window):
        o, lse, state, extra = flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal,
                                             window)
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k, state, extra)
        ctx.rest = max_q, max_k, scale, causal, window
        return o

    @staticmethod
    def backward(ctx, d_o):
        q, k, v, o, lse, cu_q, cu_k, state, extra = ctx.saved_tensors
        max_q, max_k, scale, causal, window = ctx.rest
        return *flash_backward(d_o.contiguous(), q, k, v, o, lse, cu_q, cu_k, max_q, max_k, state,
                               extra, scale, causal, window), *[None] * 7


def _interface4():
    """flash_attn_interface of FlashAttention 4's functions."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd, flash_attn_varlen_func

    def sides(window):
        return {
            f"window_size_{side}": x if x >= 0 else None
            for side, x in zip(("left", "right"), window)
        }

    def pack(cu_q, cu_k, max_q, max_k):
        return {
            "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k
        }

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False,
               window_size=(-1, -1)):
        result = flash_attn_varlen_func(
            q, k, v, **pack(cu_q, cu_k, max_q, max_k), softmax_scale=softmax_scale, causal=causal,
            window_size=tuple(x if x >= 0 else None for x in window_size))
        return result[0] if isinstance(result, tuple) else result

    def forward(q, k, v, k_new, v_new, qv, out, cu_q, cu_k, cu_k_new, used_q, used_k, max_q, max_k,
                *rest, causal=False, window_size=(-1, -1), **_):
        o, lse, *_ = _flash_attn_fwd(q, k, v, **pack(cu_q, cu_k, max_q,
                                                     max_k), softmax_scale=rest[-1], causal=causal,
                                     **sides(window_size), return_lse=True, out=out)
        return o, lse

    def backward(d_o, q, k, v, o, lse, cu_q, cu_k, used_q, used_k, max_q, max_k, dq, dk, dv, scale,
                 causal, window_size, softcap, deterministic, sm_margin):
        _flash_attn_bwd(q, k, v, o, d_o, lse, softmax_scale=scale, causal=causal,
                        **sides(window_size), **pack(cu_q, cu_k, max_q, max_k), dq=dq, dk=dk, dv=dv)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = varlen
    module._flash_attn_forward = forward
    module._flash_attn_backward = backward
    return module


def _interface():
    """flash_attn_interface with the three functions that the seed takes from it."""
    module = types.ModuleType("flash_attn_interface")
    states = {}

    def state(device):  # dropout's, and there is none
        if device not in states:
            states[device] = torch.zeros(2, dtype=torch.uint64,
                                         device=device), torch.zeros(0, device=device)
        return states[device]

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False,
                               window_size=(-1, -1)):
        return Flash.apply(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size)

    def _flash_attn_forward(q, k, v, k_new, v_new, qv, out, cu_q, cu_k, cu_k_new, used_q, used_k,
                            max_q, max_k, *rest, causal=False, window_size=(-1, -1), **_):
        o, lse, *_ = flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, rest[-1], causal, window_size)
        return o if out is None else out.copy_(o), lse

    def _flash_attn_backward(d_o, q, k, v, o, lse, cu_q, cu_k, used_q, used_k, max_q, max_k, dq, dk,
                             dv, scale, causal, window_size, softcap, deterministic, sm_margin):
        results = flash_backward(d_o, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, *state(q.device),
                                 scale, causal, window_size)
        for target, result in zip((dq, dk, dv), results):
            target.copy_(result)

    module.flash_attn_varlen_func = flash_attn_varlen_func
    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module


class Seed:
    """The seed's whole function and its branches, for one configuration. `params` are those of
    examples/nsa.json. With a group of processes the whole function runs on them; `recompute`:
    whatever it can keep or compute again, it computes again. `older`: what it does where there is
    no TMA."""

    def __init__(self, path, params, group=None, recompute=False, older=False):
        try:
            import flash_attn_interface

            self.swa_backend = getattr(flash_attn_interface, "stands_for", "FlashAttention 3")
        except ImportError:
            try:
                # FlashAttention 4 has no backward of unequal widths in groups, and runs on no older
                # GPU
                if older or params["D"] != params["DV"]:
                    raise ImportError
                module, self.swa_backend = _interface4(), "FlashAttention 4"
            except ImportError:
                module, self.swa_backend = _interface(), "torch's FlashAttention 2"
            module.stands_for = self.swa_backend
            sys.modules["flash_attn_interface"] = module
        try:
            import pkg_resources  # noqa: F401
        except ImportError:
            from packaging.version import parse

            sys.modules["pkg_resources"] = types.SimpleNamespace(parse_version=parse)
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        import flash_nsa

        self.m, p = flash_nsa, params
        if older:
            flash_nsa.NSAHelper.use_tma = False
        config = flash_nsa.NSAConfig(
            head_dim=p["D"], qk_head_dim=p["D"], v_head_dim=p["DV"], num_heads=p["H"],
            num_kv_heads=p["KH"], kernel_size=p["kernel"], stride=p["stride"],
            block_size=p["block"], top_n=p["top_n"], num_init_blocks=p["init"],
            num_local_blocks=p["local"], window_size=p["window"], kv_head_stride=1,
            **{f"recompute_{what}": recompute for what in ("swa_o", "slc_o", "cmp_kv", "cmp_o")})
        self.core = flash_nsa.NSACore(config, process_group=group,
                                      pp_size=1).to("cuda", torch.bfloat16)
        self.scale = p["D"] ** -0.5

    def __call__(self, q, k, v, gate, cu, mode=None):
        return self.core(q, k, v, gate, cu, cp_mode=mode)

    def start(self, cu):
        self.m.NSAHelper.init_cu_seqlens(cu)

    def compressed(self, k, v):
        return self.m.mean_pooling(k), self.m.mean_pooling(v)

    def cmp(self, q, ck, cv):
        return self.m.compress_attn(q, ck, cv, sm_scale=self.scale)

    def select(self, q, ck, lse):
        return self.m.slc_topk_indices(q, ck, lse, sm_scale=self.scale,
                                       maybe_efficient_version=True, scale_slc_p=True)[0]

    def slc(self, q, k, v, topk):
        return self.m.select_attn(q, k, v, topk, sm_scale=self.scale)

    def swa(self, q, k, v):
        return self.m.swa_varlen_func(q, k, v, self.scale)

    def combine(self, cmp, slc, swa, gate):
        from flash_nsa.ops.combine import fused_sigmoid_combine

        return fused_sigmoid_combine(cmp, slc, swa, gate)
