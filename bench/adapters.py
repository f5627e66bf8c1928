#!/usr/bin/env python3
"""The adapters on a GPU, each beside its framework's own attention; what is not within its gate
says BAD.

    bench/adapters.py hf|megatron|torchtitan|jax [cpu]

Exit status: how many lines say so. torch and the framework are needed. jax says times only, since
python/tests/test_jax_cuda.py compares; what the others do on the CPU, python/tests has tests for.
"""

import copy
import importlib
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
warnings.filterwarnings("ignore")
WHAT = sys.argv[1] if len(sys.argv) > 1 else None
DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cuda"
if WHAT not in ("hf", "megatron", "torchtitan", "jax") or DEVICE not in ("cuda", "cpu"):
    sys.exit(__doc__)
GPU = DEVICE == "cuda"
STEPS = 50 if GPU else 5
SMALL = {"kernel": 32, "stride": 16, "block": 64, "top_n": 6, "window": 128}  # NSA's
LEARNED = {"k_method": "linear", "v_method": "sigmoid_mul"}
bad = 0


def say(ok, text):
    global bad
    bad += not ok
    print(WHAT, "ok " if ok else "BAD", text, flush=True)


def rel(a, b):
    """Relative root mean square."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def filled(model):
    import torch
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, mean=float(p.dim() == 1))
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(name, models, loss_of):
    """Losses side by side, from the same weights."""
    import torch
    losses = []
    for model in models:
        opt = torch.optim.AdamW(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(STEPS):
            opt.zero_grad()
            loss = loss_of(model)
            loss.backward()
            opt.step()
            losses[-1].append(loss.item())
    far = max(abs(a - b) for a, b in zip(*losses))
    say(far < 1e-3, f"{name}: {STEPS} steps in fp32, losses {far:.1e} apart at most, "
                    f"{losses[1][0]:.3f} to {losses[1][-1]:.3f}")


# ---- transformers ----


def batched(name, model, prompts, graphs=None):
    """Continuous batching, with common beginnings shared and not: each token is the likeliest of a
    full recomputation, where the two best differ by 1e-3."""
    import torch
    import transformers
    made = transformers.ContinuousBatchingConfig
    size = "page_size" if hasattr(made, "page_size") else "block_size"
    # greedy: 5.17 warms up over memory as it finds it, and sampling trips over what comes out
    said = transformers.GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1,
                                         pad_token_id=0)
    for share in (True, False):
        config = made(**{size: 16}, num_blocks=600, max_batch_tokens=64, max_requests_per_batch=8,
                      use_cuda_graph=graphs, allow_block_sharing=share)
        out = copy.deepcopy(model).generate_batch(  # which leaves it with another name of attention
            inputs=prompts, generation_config=said, continuous_batching_config=config,
            progress_bar=False)
        clear = right = 0
        for one in out.values():
            tokens, prompt = list(one.generated_tokens), list(one.prompt_ids)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens], device=DEVICE)).logits
            best = logits[0, len(prompt) - 1:-1].float().topk(2)
            there = (best.values[:, 0] - best.values[:, 1] > 1e-3).cpu()
            clear += int(there.sum())
            right += int((best.indices[:, 0].cpu() == torch.tensor(tokens))[there].sum())
        say(len(out) == len(prompts) and clear == right > 0,
            f"{name}: continuous batching, beginnings {'' if share else 'not '}shared, {right} of "
            f"{clear} clear tokens the likeliest")


def hf_model(name, config, ids, prompts):
    import torch
    from transformers import AutoModelForCausalLM
    S = ids.shape[1]
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    eager = filled(eager).to(DEVICE).bfloat16()
    exact, ours = copy.deepcopy(eager).float(), copy.deepcopy(eager)
    ours.set_attn_implementation("regraph")
    wide = copy.deepcopy(ours).float()
    there = torch.ones_like(ids)
    there[1, : S // 3] = 0  # padded left
    labels = ids.masked_fill((there == 0) | (there.cumsum(1) == 1), -100)
    logits, grads = {}, {}
    for key, model in {"exact": exact, "wide": wide, "eager": eager, "ours": ours}.items():
        out = model(input_ids=ids, attention_mask=there, labels=labels,
                    position_ids=(there.cumsum(1) - 1).clamp(min=0))
        out.loss.backward()
        logits[key], grads[key] = out.logits[there.bool()], gradients(model)
        model.zero_grad()
    worst = max((rel(grads["wide"][n], g), n) for n, g in grads["exact"].items()
                if not n.endswith("router.bias"))  # which cancels: eager's own is 6e-5 from fp64
    far = rel(logits["wide"], logits["exact"])
    say(far < 1e-5 and worst[0] < 2e-5, f"{name}: fp32 logits {far:.1e}, of "
        f"{len(grads['exact'])} gradients the worst {worst[0]:.1e} ({worst[1]})")
    said = []
    for key in ("ours", "eager"):  # how far each is in bf16
        of = sorted(rel(grads[key][n], g) for n, g in grads["exact"].items())
        said.append((rel(logits[key], logits["exact"]), of[len(of) // 2], of[-1]))
    say(all(a < 1.2 * b for a, b in zip(said[0][:2], said[1])),
        f"{name}: bf16 from eager in fp32, ours and eager's: logits %.1e, %.1e; gradients, the "
        "middle %.1e, %.1e; the worst %.1e, %.1e" % tuple(x for pair in zip(*said) for x in pair))
    parts = S // 3, S - S // 3
    starts = torch.tensor([0, parts[0], S], dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        positions = torch.cat([torch.arange(n, device=DEVICE) for n in parts])[None]
        both = wide(input_ids=ids[:1], position_ids=positions, cu_seq_lens_q=starts,
                    cu_seq_lens_k=starts).logits
        alone = torch.cat([exact(input_ids=part).logits for part in ids[:1].split(parts, 1)], 1)
    say(rel(both, alone) < 1e-5,
        f"{name}: a pack beside eager's sequences alone, fp32 {rel(both, alone):.1e}")
    said = [m.generate(ids[:, :40], max_new_tokens=24, do_sample=False, output_logits=True,
                       return_dict_in_generate=True, disable_compile=True) for m in (wide, exact)]
    top = torch.stack(said[1].logits, 1).topk(2).values
    clear = (top[..., 0] - top[..., 1] > 1e-3).cumprod(1).bool()
    tokens = [one.sequences[:, -24:][clear] for one in said]
    say(torch.equal(*tokens), f"{name}: the {len(tokens[0])} of {clear.numel()} tokens generated "
                              "before the two best come within 1e-3")
    # transformers 5.17's experts of fp32 can't be captured with torch 2.11
    batched(name, wide, prompts, False if name == "gpt_oss" else None)
    short = ids[:, : S // 4]
    train(name, (wide, exact), lambda m: m(input_ids=short, labels=short).loss)


def run_hf():
    import torch
    import regraph.hf
    from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3Config, logging
    logging.set_verbosity_error()
    base = dict(vocab_size=1000, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=16, num_key_value_heads=4, head_dim=64, pad_token_id=0,
                bos_token_id=1, eos_token_id=None)
    torch.manual_seed(5)
    ids = torch.randint(3, 1000, (2, 2048 if GPU else 96)).to(DEVICE)
    prompts = [torch.randint(3, 1000, (n,)).tolist() for n in (5, 40, 200, 333)]
    prompts.append(prompts[3][:180] + [7, 8])
    gpt_oss = GptOssConfig(**base, num_local_experts=2, num_experts_per_tok=2, sliding_window=128,
                           layer_types=["sliding_attention", "full_attention"])
    hf_model("gpt_oss", gpt_oss, ids, prompts)
    hf_model("llama", LlamaConfig(**base), ids, prompts)
    hf_model("qwen3", Qwen3Config(**base), ids, prompts)
    config = regraph.hf.NsaQwen3Config(**base, nsa={**LEARNED, "window": 128, "policy": "all"})
    nsa = filled(AutoModelForCausalLM.from_config(config)).to(DEVICE)
    batched("nsa", nsa, prompts)
    nsa = nsa.bfloat16()
    nsa(input_ids=ids, labels=ids).loss.backward()
    say(all(g.isfinite().all() for g in gradients(nsa).values()), "nsa: bf16 gradients are finite")


# ---- Megatron-Core ----


def compare(name, ours, theirs, loss_of):
    a, b = loss_of(ours), loss_of(theirs)
    a.mean().backward()
    b.mean().backward()
    got, want = gradients(ours), gradients(theirs)
    worst = max((rel(got[n], want[n]), n) for n in want)
    say(rel(a, b) < 5e-6 and worst[0] < 2e-5, f"{name}: fp32 losses {rel(a, b):.1e}, of "
        f"{len(want)} gradients the worst {worst[0]:.1e} ({worst[1]})")
    train(name, (ours, theirs), lambda m: loss_of(m).mean())


def run_megatron():
    import torch
    import regraph.megatron as ours
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec as local
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import TransformerConfig
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    torch.distributed.init_process_group("nccl" if GPU else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if GPU:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    else:  # its own attention asks for a GPU's generator
        import contextlib
        import types
        from megatron.core.transformer import dot_product_attention
        torch.cuda.current_device = lambda: "cpu"
        tracker = types.SimpleNamespace(fork=contextlib.nullcontext)
        dot_product_attention.tensor_parallel.get_cuda_rng_tracker = lambda: tracker
    T = 1024 if GPU else 64

    def model(spec, **more):
        config = TransformerConfig(
            num_layers=2, hidden_size=256, num_attention_heads=8, num_query_groups=2,
            kv_channels=64, use_cpu_initialization=not GPU, hidden_dropout=0.0,
            attention_dropout=0.0, masked_softmax_fusion=False, bias_dropout_fusion=False, **more)
        return filled(GPTModel(config, spec, vocab_size=1000, max_sequence_length=T,
                               position_embedding_type="rope").to(DEVICE))

    def loss_of(m, ids, **pack):
        S = ids.shape[1]
        mask = torch.triu(torch.ones(S, S, dtype=torch.bool, device=DEVICE), 1)[None, None]
        return m(ids, torch.arange(S, device=DEVICE).expand(ids.shape), mask, labels=ids, **pack)

    ids = torch.randint(999, (2, T), device=DEVICE)
    for name, more in (("plain", {}), ("sinks", {"softmax_type": "learnable"})):
        compare(name, model(ours.with_attention(local()), **more), model(local(), **more),
                lambda m: loss_of(m, ids))
    starts = torch.tensor([0, T // 4, T], dtype=torch.int32, device=DEVICE)
    parts = [T // 4, T - T // 4]
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts,
                           max_seqlen_q=parts[1], max_seqlen_kv=parts[1])

    def nsa(**more):
        return model(ours.with_nsa(local(), **{**SMALL, **LEARNED, **more}))

    kept, again = nsa(), nsa(policy="all")
    losses = [loss_of(m, ids) for m in (kept, again)]
    for loss in losses:
        loss.mean().backward()
    pairs = zip(gradients(kept).values(), gradients(again).values())
    say(torch.equal(*losses) and all(torch.equal(a, b) for a, b in pairs),
        "nsa: kept and computed again, the same bits")
    # all blocks chosen: of near equals a pack may choose another than a sequence alone
    every = nsa(top_n=max(6, T // 64))
    with torch.no_grad():
        both = loss_of(every, ids[:1], packed_seq_params=pack)
        alone = torch.cat([loss_of(every, part) for part in ids[:1].split(parts, 1)], 1)
    say(rel(both, alone) < 1e-5,
        f"nsa: a pack and each sequence alone, all blocks chosen {rel(both, alone):.1e}")
    half = nsa().bfloat16()
    wide = nsa()
    for narrow, p in zip(half.parameters(), wide.parameters()):
        p.data.copy_(narrow)
    losses = [loss_of(m, ids) for m in (half, wide)]
    losses[0].mean().backward()
    say(rel(*losses) < 0.02 and all(g.isfinite().all() for g in gradients(half).values()),
        f"nsa: bf16 losses from fp32 {rel(*losses):.1e}")


# ---- torchtitan ----


def patient(name):
    """torchtitan asks for a newer torch than some machines have: what it only shards with becomes a
    placeholder."""
    for _ in range(40):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            of_torch = (error.name or "").split(".")[0] == "torch"
            if not of_torch or "cannot import name" not in str(error):
                raise
            missing = str(error).split("'")[1]
            print("this torch has no", error.name, missing)
            setattr(sys.modules[error.name], missing, type(missing, (), {}))
            for module in list(sys.modules):
                if module.startswith(("torchtitan", "regraph.torchtitan")):
                    del sys.modules[module]


def run_torchtitan():
    import torch
    patient("torchtitan.models.llama3")
    ours = patient("regraph.torchtitan")
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import llama3_configs
    T = 1024 if GPU else 64

    def model(own):
        config = llama3_configs["debugmodel"](attn_backend="varlen")
        config.layers = config.layers[:2]
        if own:
            config = ours.with_attention(config)
        else:
            for layer in config.layers:
                layer.attention.inner_attention = ScaledDotProductAttention.Config()
        with torch.device(DEVICE):
            made = config.build()
        made.init_states(buffer_device=torch.device(DEVICE))
        return filled(made)

    def loss_of(m, ids, positions=None, masks=None):
        if positions is None:
            positions = torch.arange(ids.shape[1], device=DEVICE).expand(ids.shape)
        logits = m(ids, positions, masks).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="none")
        return loss.view(ids.shape)

    ids = torch.randint(2048, (2, T), device=DEVICE)
    own, theirs = model(True), model(False)
    positions = torch.arange(T, device=DEVICE).expand(2, -1) % (T // 4)
    with torch.no_grad():
        docs = loss_of(own, ids, positions, own.get_attention_masks(positions))
        parts = torch.cat([loss_of(theirs, part) for part in ids.split(T // 4, 1)], 1)
    say(rel(docs, parts) < 5e-6, "documents beside its own attention on each alone: fp32 losses "
                                 f"{rel(docs, parts):.1e}")
    compare("llama3", own, theirs, lambda m: loss_of(m, ids))


# ---- JAX ----


def run_jax():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import regraph.jax

    spec, names = regraph.example("nsa.json"), ("q", "k", "v", "gate")

    def case(T, H, KH, D, dtype):
        draw = np.random.default_rng(0)
        x = [jnp.asarray(draw.standard_normal((T, *shape)), regraph.arrays.NUMPY[dtype])
             for shape in ((H, D), (KH, D), (KH, D), (H, 3))]
        params, starts = {"H": H, "KH": KH, "D": D, "DV": D}, jnp.array([0, T], jnp.int32)
        attend = regraph.jax.attention(spec, **params)
        forward = jax.jit(lambda *x: attend(*x, starts))
        both = jax.jit(lambda d, *x: jax.vjp(lambda *x: attend(*x, starts), *x)[1](d))
        session = regraph.Session(regraph.Plan(regraph.Spec(spec, dtype=dtype, **params), T=T, B=1,
                                               device=DEVICE))
        o = session.forward(**dict(zip(names, map(np.asarray, x))),
                            cu_seqlens=np.array([0, T], np.int32))["o"]
        session.backward({"o": o})
        return x, jnp.asarray(o), forward, both, session

    def us(run, wait, count):
        best = []
        for _ in range(4):
            begin = time.perf_counter()
            for _ in range(count):
                made = run()
            wait(made)
            best.append((time.perf_counter() - begin) / count * 1e6)
        return min(best)

    cases = (8192 if GPU else 256, 64, 4, 128, "bf16", 20), (64, 4, 2, 16, "f32", 300)
    for T, H, KH, D, dtype, count in cases:
        x, o, forward, both, session = case(T, H, KH, D, dtype)
        one = jax.jit(lambda *x: x[0] + 1)

        def bare():
            session.run_forward()
            session.run_backward()

        runs = (lambda: forward(*x)), (lambda: both(o, *x)), (lambda: one(*x))
        times = [us(run, jax.block_until_ready, count) for run in runs]
        times += [us(run, lambda made: session.synchronize(), count)
                  for run in (session.run_forward, bare)]
        say(True, "%d tokens, %d/%d heads, %s: a call %.1f us, with gradients %.1f us (a program "
                  "that adds 1: %.1f us); a session's replays %.1f us and %.1f us"
            % (T, H, KH, dtype, *times))


if WHAT != "jax":
    import torch
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
globals()["run_" + WHAT]()
sys.stdout.flush()
os._exit(min(bad, 99))  # a framework's threads are not waited for
