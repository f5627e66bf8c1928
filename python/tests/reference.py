"""Native Sparse Attention in plain torch with dense masks, one sequence at a time: what the tests
compare with.

Selection is taken as given (`idx`), so gradients are of the same function; `select` says what it
should be.
"""

import torch


def compress(x, kernel, stride, storage):
    """[L, KH, d] → [n, KH, d], means over blocks as they are stored: rounded to `storage`
    (gradients pass)."""
    blocks = x.unfold(0, kernel, stride).mean(-1) if x.shape[0] >= kernel else x[:0]
    return blocks + (blocks.to(storage).to(x.dtype) - blocks).detach()


def attend(q, k, v, seen):
    """q [L, H, d], k and v [n, KH, d], seen [L, H, n]; returns o [L, H, d_v] and probabilities.
    Blind rows give 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->ihj", q, k) / q.shape[-1] ** 0.5
    p = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
    return torch.einsum("ihj,jhd->ihd", p, v), p


def visible_blocks(length, n, p, device):
    i, j = torch.arange(length, device=device)[:, None], torch.arange(n, device=device)[None, :]
    return i >= j * p["stride"] + p["kernel"] - 1


def selected_keys(idx, length, block):
    """idx [L, KH, top_n] → bool [L, KH, L]: keys of the selected blocks up to the query."""
    blocks = torch.zeros(length, idx.shape[1], -(-length // block) + 1, dtype=torch.bool,
                         device=idx.device)
    blocks.scatter_(2, torch.where(idx < 0, blocks.shape[2] - 1, idx).long(), True)
    blocks[:, :, -1] = False
    keys = blocks.repeat_interleave(block, 2)[:, :, :length]
    i = torch.arange(length, device=idx.device)
    return keys & (i[None, None, :] <= i[:, None, None])


def sequence(q, k, v, gate, idx, p, storage):
    length, heads = q.shape[:2]
    group = heads // k.shape[1]
    ck, cv = (compress(x, p["kernel"], p["stride"], storage) for x in (k, v))
    seen = visible_blocks(length, ck.shape[0], p, q.device)[:, None, :].expand(-1, heads, -1)
    cmp, _ = attend(q, ck, cv, seen)
    slc, _ = attend(q, k, v, selected_keys(idx, length, p["block"]).repeat_interleave(group, 1))
    i = torch.arange(length, device=q.device)[:, None]
    j = i.transpose(0, 1)
    near = (j <= i) & (j >= i - p["window"])
    swa, _ = attend(q, k, v, near[:, None, :].expand(-1, heads, -1))
    g = torch.sigmoid(gate)
    return g[..., 0:1] * cmp + g[..., 1:2] * slc + g[..., 2:3] * swa


def nsa(q, k, v, gate, idx, cu_seqlens, p, storage):
    """All sequences; rows past the last are zero. Computes in the type of q."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        if b > a:
            out[a:b] = sequence(q[a:b], k[a:b], v[a:b], gate[a:b], idx[a:b], p, storage)
    return out


def select(q, k, p, storage):
    """The blocks that one sequence's queries choose: list [L][KH] of sets, by DESIGN's rule, ties
    aside."""
    length, kv_heads = k.shape[:2]
    ck = compress(k, p["kernel"], p["stride"], storage)
    seen = visible_blocks(length, ck.shape[0], p, q.device)[:, None, :].expand(-1, q.shape[1], -1)
    _, prob = attend(q, ck, ck, seen)
    prob = prob.view(length, kv_heads, -1, ck.shape[0]).sum(2)
    blocks = -(-length // p["block"])
    start = torch.arange(ck.shape[0], device=q.device)[:, None] * p["stride"]
    edge = torch.arange(blocks, device=q.device)[None, :] * p["block"]
    ends = torch.minimum(start + p["kernel"], edge + p["block"])
    overlap = (ends - torch.maximum(start, edge)).clamp(min=0)
    score = torch.einsum("ihj,jb->ihb", prob, overlap.to(prob.dtype) / p["stride"])
    chosen = []
    for i in range(length):
        own = i // p["block"]
        forced = {*range(min(p["init"], own + 1)), *range(max(0, own - p["local"] + 1), own + 1)}
        row = []
        for h in range(kv_heads):
            rest = sorted((b for b in range(own + 1) if b not in forced),
                          key=lambda b: (-score[i, h, b].item(), b))
            row.append(forced | set(rest[: max(0, p["top_n"] - len(forced))]))
        chosen.append(row)
    return chosen


def rel_rms(x, reference):
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp(min=1e-30)).item()
