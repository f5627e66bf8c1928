#!/usr/bin/env python3
"""DSA's and MSA's attention beside peers, forward and backward, in one run on one Hopper GPU.

    bench/dsa.py build FOLDER --peer tilelang --checkout PATH   # a checkout of tile-ai/tilelang,
                                                                  for examples/deepseek_v32
    bench/dsa.py build FOLDER --peer cudnn                      # nvidia-cudnn-frontend,
                                                                  nvidia-cutlass-dsl, apache-tvm-ffi
    bench/dsa.py build FOLDER --peer fa4                        # flash-attn-4, the same
    bench/dsa.py run FOLDER [--tokens 32768] [--runs 7]         # torch, apache-tvm-ffi, a built
                                                                  regraph

`build` compiles a peer's kernels ahead, for the shapes below and no others; it needs the peer's
packages and nvcc, no GPU. So `run` needs none of them, and packages that want different versions of
each other can be compared. FOLDER also takes libcute_dsl_runtime.so, which compiled CuTe DSL
kernels load.

DSA: 64 heads of 576 and 512, V the first columns of K, 2048 of the keys before each query, drawn
evenly; gradients of q and of K, of which V's is a part. TileLang has both directions (two forwards:
its plain and its pipelined one), cuDNN frontend a backward for Hopper; both add gradients of keys
up in the order in which blocks come, ours is the same bits each time. MSA: 64/4 heads of 128, 16
blocks of 128 keys by an indexer of 4 heads, beside FlashAttention 4, dense and causal.

Times are medians in ms between CUDA events after a write of 512 MB. Peers' numbers are compared
with ours.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import sys
from pathlib import Path

import compare

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]
H, D, E, TOP = 64, 576, 512, 2048
SCALE = D**-0.5


# ---- peers, compiled ahead ----


def without_gpu(torch):
    """What compilers ask a GPU for."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0


def build_tilelang(torch, folder, args):
    sys.path.insert(0, str(Path(args.checkout) / "examples" / "deepseek_v32"))
    import sparse_mla_bwd
    import sparse_mla_fwd
    import sparse_mla_fwd_pipelined
    from tilelang.jit.adapter.libgen import LibraryGenerator

    class Unloaded(ctypes.CDLL):  # it would call init, which wants a GPU
        def __getattr__(self, name):
            return (lambda: 0) if name == "init" else super().__getattr__(name)

    LibraryGenerator.load_lib = lambda self, path=None: Unloaded(path or self.libpath)

    def like(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    T = args.tokens
    q, kv, o, row = like(1, T, H, D), like(1, T, 1, D), like(1, T, H,
                                                             E), like(1, T, H, dtype=torch.float32)
    idx, sums = like(1, T, 1, TOP, dtype=torch.int32), like(1, T, 1, D, dtype=torch.float32)
    more = (H, E, D - E, TOP)
    for name, kernel, a in (("forward", sparse_mla_fwd.sparse_mla_fwd, (q, kv, idx, *more)),
                            ("pipelined", sparse_mla_fwd_pipelined.sparse_mla_fwd,
                             (q, kv, idx, like(1, dtype=torch.int32), *more,
                              1)), ("delta", sparse_mla_bwd.preprocess,
                                    (o, o)), ("backward", sparse_mla_bwd.bwd, (q, kv, o, idx, row,
                                                                               row, sums, *more)),
                            ("round", sparse_mla_bwd.postprocess, (sums, E, D - E))):
        kernel.target, kernel.execution_backend = {"kind": "cuda", "arch": "sm_90a"}, "cython"
        shutil.copy(kernel.compile(*a).adapter.libpath, folder / f"tilelang_{name}.so")


def link(folder, name, objects):
    """Objects of CuTe DSL, as a module of tvm_ffi, and what it loads."""
    import cutlass
    import subprocess

    subprocess.run(["g++", "-shared", "-o", folder / f"{name}.so", *objects], check=True)
    for path in Path(cutlass.__file__).parents[2].rglob("libcute_dsl_runtime.so"):
        if "stubs" not in path.parts:
            shutil.copy(path, folder)


def build_cudnn(torch, folder, args):
    without_gpu(torch)
    import cutlass
    import cutlass.cute as cute
    from cudnn.deepseek_sparse_attention.sparse_attention_backward import dsa_bwd_sm90 as dsa
    from cutlass.cute.runtime import make_fake_compact_tensor
    from cutlass.runtime import make_fake_stream

    def like(dtype, *shape, align=16):
        return make_fake_compact_tensor(dtype, shape,
                                        stride_order=tuple(reversed(range(len(shape)))),
                                        assumed_align=align)

    T, bf16, f32, stream = args.tokens, cutlass.BFloat16, cutlass.Float32, make_fake_stream(
        use_tvm_ffi_env_stream=True)
    q, kv, o, row = like(bf16, 1, T, H, D), like(bf16, 1, T, 1, D), like(bf16, 1, T, H,
                                                                         E), like(f32, 1, T, H)
    sums = like(f32, 1, 1, T * D)
    delta = dsa._FlashAttentionDSABackwardPreprocessSm90(bf16, E, 90, 64, num_threads=256)
    main = dsa.FlashAttentionDSABackwardSm90(bf16, D, E, H, tile_m=64, tile_n=64, KV_stage=1,
                                             PdS_stage=1, SdP_swapAB=False, dKV_swapAB=False,
                                             dQ_swapAB=False, num_threads=256,
                                             have_topk_length=False, max_topk=TOP)
    last = dsa._FlashAttentionDSABackwardPostprocessSm90(bf16, hdim_chunk=64, tile_n=64, head_dim=D,
                                                         num_threads=64, N_hdim_chunks=D // 64)
    objects = []
    for name, kernel, a in (("delta", delta, (o, o, row, like(f32, 1, T, H, align=4), row,
                                              like(f32, H), like(f32, H), None, None, None)),
                            ("backward", main, (q, kv, o, row, row, q, sums,
                                                like(cutlass.Int32, 1, T, TOP), None,
                                                SCALE)), ("round", last, (sums, kv, T))):
        objects.append(folder / f"cudnn_{name}.o")
        cute.compile(kernel, *a, stream,
                     options="--enable-tvm-ffi").export_to_c(str(objects[-1]), function_name=name)
    link(folder, "cudnn", objects)


def build_fa4(torch, folder, args):
    os.environ.update(FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED="1",
                      FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=str(folder / "fa4"),
                      FLASH_ATTENTION_ARCH="sm_90", FLASH_ATTENTION_NUM_SMS="132")
    without_gpu(torch)
    from flash_attn.cute import interface
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        def like(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        T = args.tokens
        q, k = like(1, T, 64, 128), like(1, T, 4, 128)
        interface._flash_attn_fwd(q, k, k, causal=True, return_lse=True)
        interface._flash_attn_bwd(q, k, k, q, q, like(1, 64, T, dtype=torch.float32), causal=True)
    at = next((folder / "fa4").iterdir())
    parts = {
        "forward": at / "fwd", "delta": at / "bwd_pre", "backward": at / "bwd",
        "round": at / "bwd_post"
    }
    for name, where in parts.items():  # of two that round, d.q's has the larger object
        for i, path in enumerate(sorted(where.glob("*.o"), key=lambda p: -p.stat().st_size)):
            link(folder, f"fa4_{name}{i}", [path])


# ---- what is measured ----


def spec(inputs, nodes):
    return {
        "regraph": 1, "name": "bench", "params": {"H": H},
        "inputs": {**inputs, "cu_seqlens": {"shape": ["B+1"],
                                            "dtype": "i32"}}, "nodes": nodes, "outputs": {"o": "o"}
    }


DSA = spec(
    {
        "q": {"shape": ["T", "H", D], "dtype": "bf16", "grad": True}, "kv": {
            "shape": ["T", 1, D], "dtype": "bf16", "grad": True
        }, "idx": {"shape": ["T", 1, TOP], "dtype": "i32"}
    }, [{
        "name": "value", "op": "slice", "in": {"x": "kv"}, "out": {"y": "v"},
        "attrs": {"axis": 2, "start": 0, "stop": E}
    }, {
        "name": "attention", "op": "slc_attn", "in": {"q": "q", "k": "kv", "v": "v", "idx": "idx"},
        "out": {"o": "o"}, "attrs": {"block": 1, "scale": SCALE}
    }])
MSA = spec(
    {
        **{
            x: {"shape": ["T", h, 128], "dtype": "bf16",
                "grad": True} for x, h in (("q", "H"), ("k", 4), ("v", 4))
        }, **{x: {"shape": ["T", 4, 128], "dtype": "bf16"} for x in ("index_q", "index_k")}
    }, [{
        "name": "choose", "op": "topk", "in": {"q": "index_q", "k": "index_k"},
        "out": {"idx": "idx"}, "attrs": {
            "kernel": 1, "stride": 1, "block": 128, "top_n": 16, "init": 0, "local": 1,
            "score": "dot", "pool": "max"
        }
    }, {
        "name": "attention", "op": "slc_attn", "in": {"q": "q", "k": "k", "v": "v", "idx": "idx"},
        "out": {"o": "o"}, "attrs": {"block": 128}
    }])


class Clock(compare.Clock):
    def __init__(self, torch, runs):
        super().__init__(torch, None)
        self.runs = runs

    def __call__(self, name, function):
        self.once(function)
        print(
            f"{name:32} {statistics.median(self.once(function) for _ in range(self.runs)):8.2f} ms",
            flush=True)


def agree(name, x, want, most=1.5e-2):
    x, want = x.float().flatten(), want.float().flatten()
    off = ((x - want).norm() / want.norm()).item()
    print(f"{name:32} {off:8.1e} from ours{'' if off < most else ': WRONG'}", flush=True)


def choices(torch, T):
    """TOP keys of those up to each query, ascending, one of each TOP-th part of them; -1 past the
    first ones."""
    t, n = torch.arange(T, device="cuda")[:, None], torch.arange(TOP, device="cuda")[None]
    low, high = (t + 1) * n // TOP, (t + 1) * (n + 1) // TOP
    drawn = low + (torch.rand(T, TOP, device="cuda") *
                   (high - low)).long().clamp(max=high - low - 1)
    return torch.where(t + 1 > TOP, drawn, torch.where(n <= t, n, -1)).int()


def library(path):
    lib = ctypes.CDLL(str(path))
    lib.get_last_error.restype = ctypes.c_char_p
    if lib.init() != 0:
        raise RuntimeError(lib.get_last_error().decode())

    def call(*a):
        import torch
        b = [ctypes.c_void_p(x.data_ptr()) if hasattr(x, "data_ptr") else x for x in a]
        if lib.call(*b, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)) != 0:
            raise RuntimeError(lib.get_last_error().decode())
    return call


def module(folder, name):
    import tvm_ffi

    ctypes.CDLL(str(folder / "libcute_dsl_runtime.so"), ctypes.RTLD_GLOBAL)
    return tvm_ffi.load_module(str(folder / f"{name}.so"))


def attempt(name, function):
    try:
        function()
    except Exception as e:  # a peer that fails is told, and costs nobody else their times
        print(f"{name}: {type(e).__name__}: {str(e)[:300]}", flush=True)


def dsa(torch, folder, args, clock):
    import regraph.torch

    T, g = args.tokens, torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

    q, kv, d_o, idx = normal(T, H, D), normal(T, 1, D), normal(T, H, E), choices(torch, T)
    cu = torch.tensor([0, T], dtype=torch.int32, device="cuda")
    attend, x = regraph.torch.attention(DSA), [q.requires_grad_(), kv.requires_grad_()]
    o = attend(*x, idx[:, None], cu)
    want = [o.detach(), *torch.autograd.grad(o, x, d_o, retain_graph=True)]
    again = torch.autograd.grad(o, x, d_o, retain_graph=True)
    print("the same gradients again, bit for bit:",
          all(torch.equal(a, b) for a, b in zip(again, want[1:])))
    clock("DSA forward: regraph", lambda: attend(*x, idx[:, None], cu))
    clock("DSA backward: regraph", lambda: torch.autograd.grad(o, x, d_o, retain_graph=True))
    del o, again
    x = [t.detach() for t in x]
    out, d_q, d_kv, lse, delta = d_o.clone(), q.detach().clone(), kv.detach().clone(), *torch.empty(
        2, T, H, device="cuda")
    sums = torch.empty(T + 1, D, device="cuda")

    def tilelang():
        # an entry that is none has to be a key that exists and may not be seen
        entry = torch.where(idx < 0,
                            torch.arange(1, T + 1, device="cuda")[:, None], idx).int().contiguous()
        zero = torch.zeros(1, dtype=torch.int32, device="cuda")
        plain, pipelined = library(folder / "tilelang_forward.so"), library(folder /
                                                                            "tilelang_pipelined.so")
        first, main, last = (library(folder / f"tilelang_{n}.so")
                             for n in ("delta", "backward", "round"))

        def backward():
            first(out, d_o, delta)
            sums.zero_()
            main(*x, d_o, entry, lse, delta, sums, d_q)
            last(sums, d_kv)

        for name, forward in (("pipelined", lambda: pipelined(*x, entry, zero, out, lse, 1, T, T)),
                              ("plain", lambda: plain(*x, entry, out, lse, 1, T, T))):
            def measure():
                forward()
                agree(f"TileLang, {name}: o", out, want[0])
                clock(f"DSA forward: TileLang, {name}", forward)
            attempt(f"TileLang, {name}", measure)
        backward()
        agree("TileLang: d.q", d_q, want[1])
        agree("TileLang: d.kv", d_kv, want[2])
        clock("DSA backward: TileLang", backward)

    def cudnn():
        parts = module(folder, "cudnn")
        sinks, d_sinks = torch.full((H,), -torch.inf, device="cuda"), torch.zeros(H, device="cuda")
        log2 = torch.empty(1, T, H, device="cuda")
        four = [t[None].contiguous() for t in (x[0], x[1], d_o, want[0])]
        natural = lse[None] * 0.6931471805599453  # the lse that TileLang left
        total = sums[:T].reshape(1, 1, T * D)

        def backward():
            total.zero_()
            d_sinks.zero_()
            parts["delta"](four[3], four[2], delta[None], natural, log2, sinks, d_sinks, None, None,
                           None)
            parts["backward"](four[0], four[1], four[2], log2, delta[None], d_q[None], total,
                              idx[None], None, SCALE)
            parts["round"](total, d_kv[None], T)

        backward()
        agree("cuDNN frontend: d.q", d_q, want[1])
        agree("cuDNN frontend: d.kv", d_kv, want[2])
        clock("DSA backward: cuDNN frontend", backward)

    attempt("TileLang", tilelang)
    attempt("cuDNN frontend", cudnn)


def msa(torch, folder, args, clock):
    import regraph.torch

    T, g = args.tokens, torch.Generator("cuda").manual_seed(2)
    q, d_o, k, v, a, b = (torch.randn(T, h, 128, generator=g, device="cuda", dtype=torch.bfloat16)
                          for h in (64, 64, 4, 4, 4, 4))
    cu = torch.tensor([0, T], dtype=torch.int32, device="cuda")
    attend, x = regraph.torch.attention(MSA), [t.requires_grad_() for t in (q, k, v)]
    o = attend(*x, a, b, cu)
    clock("MSA forward: regraph", lambda: attend(*x, a, b, cu))
    clock("MSA backward: regraph", lambda: torch.autograd.grad(o, x, d_o, retain_graph=True))
    del o
    q, k, v, d_o = (t.detach()[None] for t in (*x, d_o))
    out, lse, log2, delta = torch.empty_like(q), *torch.empty(3, 1, 64, T, device="cuda")
    d_q, d_k, d_v, sums = torch.empty_like(q), torch.empty_like(k), torch.empty_like(
        v), torch.empty(1, 64, T * 128, device="cuda")
    both = torch.empty(2, 1, 4, T * 128, device="cuda")

    def fa4():
        fwd, pre, bwd, post = (module(folder, f"fa4_{n}0")["func"]
                               for n in ("forward", "delta", "backward", "round"))
        post_k, none = module(folder, "fa4_round1")["func"], [None] * 9
        scale = 128**-0.5

        def forward():
            fwd(q, k, v, out, lse, scale, *none[:8], None, (None, None), None, None)

        def backward():
            pre(out, d_o, delta, lse, log2, sums, None, None, None, None, None, 1.0, None, None)
            both.zero_()
            bwd(q, k, v, d_o, log2, delta, sums, both[0], both[1], scale, *none, (None, None), None,
                None)
            post(sums, d_q, scale, None, None, None, None)
            post_k(both[0], d_k, scale, None, None, None, None)
            post_k(both[1], d_v, 1.0, None, None, None, None)

        forward()
        y = [t.detach().transpose(1, 2) for t in (q, k, v)]
        some = torch.nn.functional.scaled_dot_product_attention(*y, is_causal=True,
                                                                enable_gqa=True).transpose(1, 2)
        agree("FlashAttention 4: o (torch's)", out, some)
        clock("dense forward: FlashAttention 4", forward)
        backward()
        clock("dense backward: FlashAttention 4", backward)

    attempt("FlashAttention 4", fa4)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["build", "run"])
    p.add_argument("folder", type=Path)
    p.add_argument("--peer", choices=["tilelang", "cudnn", "fa4"])
    p.add_argument("--checkout", help="of tile-ai/tilelang")
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--runs", type=int, default=7)
    args = p.parse_args()
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
    import torch

    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.what == "build":
        {"tilelang": build_tilelang, "cudnn": build_cudnn,
         "fa4": build_fa4}[args.peer](torch, folder, args)
        return
    clock = Clock(torch, args.runs)
    attempt("DSA", lambda: dsa(torch, folder, args, clock))
    torch.cuda.empty_cache()
    attempt("MSA", lambda: msa(torch, folder, args, clock))


if __name__ == "__main__":
    main()
