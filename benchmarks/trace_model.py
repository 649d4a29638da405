"""A small byte-level MoE language model trained on the standard library, and a recording of how it routes.

    python -m benchmarks.trace_model --seconds 90 --out benchmarks/traces/stdlib_moe.npz

8 layers, 64 experts, top 6, 6 million active parameters; text that every Python installation has. The recording is
of real text and of a trained router, in prefill and in decode, for four kinds of text and a drift between two of them,
but of a small model: it shows correlations and skew that generated loads lack, not those of a large one.

Arrays: prefill_KIND uint8 [layers, tokens, topk] and decode_KIND uint8 [steps, layers, sequences, topk], expert ids,
best first; drift uint8 [steps, layers, tokens, topk], the share of "topics" among "source" growing from 0 to 1;
load int64 [steps, layers, experts] and kind str [steps], the same as counts, for `python -m megamoe plan`; losses
float32, bits per byte at each hundredth of the training; about str, how it was made.
"""

import argparse
import ast
import math
import platform
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("source", "docstrings", "topics", "encodings")


def read_texts(limit_bytes: int | None = None) -> dict[str, bytes]:
    """Text of each kind from this interpreter's standard library, files in order of name, limit_bytes of each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {kind: [] for kind in KINDS}
    size = dict.fromkeys(KINDS, 0)
    for path in sorted(root.rglob("*.py"), key=lambda p: (p.parent.name not in ("encodings", "pydoc_data"), p)):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(parts):
            continue
        wanted = {"encodings": ("encodings",), "pydoc_data": ("topics",)}.get(parts[0], ("source", "docstrings"))
        if limit_bytes is not None and min(size[kind] for kind in wanted) > limit_bytes:
            continue
        data = path.read_bytes()
        if parts[0] == "encodings":
            texts["encodings"].append(data)
        elif parts[0] == "pydoc_data":
            # One dictionary of literals: its values are the reference manual's pages
            values = [n.value for n in ast.walk(ast.parse(data)) if isinstance(n, ast.Constant)]
            texts["topics"] += [v.encode() for v in values if isinstance(v, str) and len(v) > 200]
        else:
            texts["source"].append(data)
            texts["docstrings"] += _docstrings(data)
        size |= {kind: sum(map(len, texts[kind])) for kind in wanted}
    return {kind: b"\n".join(parts)[:limit_bytes] for kind, parts in texts.items()}


def _docstrings(data: bytes) -> list[bytes]:
    try:
        tree = ast.parse(data)
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text.encode() for text in found if text and len(text) > 80]


def padded_experts(x: Tensor, idx: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts with gradients: x [n, width], idx and weights [n, topk], up [experts, width, 2 * inner], gate then
    up, down [experts, inner, width] -> [n, width]. Every expert's rows are padded to the fullest one's: none is
    dropped, so the routing is the model's own."""
    topk = idx.shape[1]
    count = torch.bincount(idx.flatten(), minlength=len(up))
    order = idx.flatten().argsort(stable=True)
    expert = idx.flatten()[order]
    place = torch.arange(len(order), device=x.device) - (count.cumsum(0) - count)[expert]
    rows = x.new_zeros(len(up), int(count.max()), x.shape[1])
    rows[expert, place] = x[order // topk]
    gate, value = (rows @ up).chunk(2, -1)
    rows = (F.silu(gate) * value) @ down
    picked = rows[expert, place] * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // topk, picked)


class Experts(nn.Module):
    """Router and SwiGLU experts. forward: [n, width] -> [n, width]; keeps topk_idx and the load-balancing loss."""

    def __init__(self, width: int, inner: int, experts: int, topk: int):
        super().__init__()
        self.topk, self.experts = topk, experts
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / (inner * topk) ** 0.5)
        self.topk_idx: Tensor | None = None
        self.balance: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.softmax(F.linear(x.float(), self.router.weight.float()), -1)
        weights, idx = scores.topk(self.topk)
        weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)
        self.topk_idx = idx
        count = torch.bincount(idx.flatten(), minlength=self.experts)
        # Fedus et al., Switch Transformers (arXiv 2101.03961), eq. 4
        self.balance = self.experts * (scores.mean(0) * count / (n * self.topk)).sum()
        return padded_experts(x, idx, weights, self.up.to(x.dtype), self.down.to(x.dtype))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, **experts):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.moe = Experts(width, **experts)

    def forward(self, x: Tensor, cache: list | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.moe(self.norm2(x).flatten(0, 1)).view_as(x)


class Model(nn.Module):
    """Bytes [batch, length] -> logits [batch, length, 256]. position: of the first byte, with a cache."""

    def __init__(self, layers: int, width: int, heads: int, context: int, **experts):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, **experts) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        self.context = context

    def forward(self, x: Tensor, caches: list | None = None, position: int = 0) -> Tensor:
        where = torch.arange(position, position + x.shape[1], device=x.device)
        h = self.embed(x) + self.position(where)
        for i, block in enumerate(self.blocks):
            h = block(h, None if caches is None else caches[i])
        return self.head(self.norm(h))

    def routed(self) -> np.ndarray:
        """uint8 [layers, tokens, topk] of the last forward."""
        return torch.stack([block.moe.topk_idx for block in self.blocks]).to(torch.uint8).cpu().numpy()


def train(loss_of: Callable, parameters: list, texts: dict[str, bytes], seconds: float, batch: int, context: int,
          device: torch.device) -> list[float]:  # fmt: skip
    """Mix the kinds evenly; a cosine over the time given. loss_of: int64 [batch, context + 1] -> (cross entropy, what
    else to minimize). Returns bits per byte at every hundredth."""
    data = [torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device) for text in texts.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator(device=device).manual_seed(0)
    begin, losses, span = time.monotonic(), [], torch.arange(context + 1, device=device)
    while (part := (time.monotonic() - begin) / seconds) < 1:
        rows = []
        for one in data:
            at = torch.randint(len(one) - len(span), (batch // len(data), 1), generator=generator, device=device)
            rows.append(one[at + span])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, part * 30) * (0.55 + 0.45 * math.cos(math.pi * part))
        loss, more = loss_of(torch.cat(rows).long())
        optimizer.zero_grad(set_to_none=True)
        (loss + more).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if len(losses) <= part * 100:
            losses.append(float(loss.detach()) / math.log(2))
            if len(losses) % 10 == 1:
                print(f"{part:4.0%}  {losses[-1]:.3f} bits per byte", flush=True)
    return losses


def loss_of(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        logits = model(x[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
    return loss, 0.01 * sum(block.moe.balance for block in model.blocks) / len(model.blocks)


@torch.no_grad()
def record(model: Model, texts: dict[str, bytes], tokens: int, sequences: int, steps: int, device) -> dict:
    """The arrays of the module's docstring, without losses and about."""
    rng = np.random.default_rng(1)
    experts, context = model.blocks[0].moe.experts, model.context
    arrays, load, kinds = {}, [], []

    def passages(kind: str, count: int, length: int) -> Tensor:
        data = np.frombuffer(texts[kind], np.uint8)
        at = rng.integers(len(data) - length, size=count)
        return torch.from_numpy(np.stack([data[i : i + length] for i in at]).astype(np.int64)).to(device)

    def note(routed: np.ndarray, kind: str) -> np.ndarray:
        load.append([np.bincount(one.ravel(), minlength=experts) for one in routed])
        kinds.append(kind)
        return routed

    def forward(*args):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(*args)

    for kind in texts:
        forward(passages(kind, max(1, tokens // context), context))
        arrays[f"prefill_{kind}"] = note(model.routed(), f"prefill {kind}")
        caches, prompt = [[] for _ in model.blocks], context // 4
        x, chosen = passages(kind, sequences, prompt), []
        for step in range(min(steps, context - prompt)):
            logits = forward(x, caches, 0 if step == 0 else prompt + step - 1)
            if step:
                chosen.append(note(model.routed(), f"decode {kind}"))
            x = torch.multinomial(torch.softmax(logits[:, -1].float(), -1), 1)
        arrays[f"decode_{kind}"] = np.stack(chosen)
    drift, count = [], max(2, tokens // 4 // context)
    for step in range(17):
        new = round(count * step / 16)
        forward(torch.cat([passages("source", count - new, context), passages("topics", new, context)])
                if 0 < new < count else passages("topics" if new else "source", count, context))  # fmt: skip
        drift.append(note(model.routed(), "drift"))
    return arrays | {"drift": np.stack(drift), "load": np.array(load, np.int64), "kind": np.array(kinds)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=90, help="of training (default 90)")
    add("--out", type=Path, required=True)
    add("--layers", type=int, default=8)
    add("--width", type=int, default=256)
    add("--inner", type=int, default=96, help="width of an expert")
    add("--experts", type=int, default=64)
    add("--topk", type=int, default=6)
    add("--context", type=int, default=512)
    add("--batch", type=int, default=48, help="sequences a step, a multiple of 4")
    add("--tokens", type=int, default=8192, help="recorded of each kind in prefill, a quarter of it a drift step")
    add("--sequences", type=int, default=64, help="recorded in decode")
    add("--steps", type=int, default=65, help="of decode, the first of them the prompts")
    add("--text-bytes", type=int, help="of each kind at most; default: all")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = read_texts(given.text_bytes)
    model = Model(given.layers, given.width, given.width // 32, given.context, inner=given.inner,
                  experts=given.experts, topk=given.topk).to(device)  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    idle = given.layers * (given.experts - given.topk) * 3 * given.width * given.inner
    sizes = ", ".join(f"{kind} {len(text) / 2**20:.1f} MiB" for kind, text in texts.items())
    print(f"{total / 1e6:.1f} M parameters, {(total - idle) / 1e6:.1f} M active; {sizes}", flush=True)
    losses = train(partial(loss_of, model), list(model.parameters()), texts, given.seconds, given.batch,
                   model.context, device)  # fmt: skip
    arrays = record(model, texts, given.tokens, given.sequences, given.steps, device)
    about = (f"Python {platform.python_version()}'s standard library ({sizes}); {given.layers} layers, {given.experts} "
             f"experts, top {given.topk}; {given.seconds:g} s of training, {losses[-1]:.3f} bits per byte; torch "
             f"{torch.__version__}")  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(given.out, **arrays, losses=np.array(losses, np.float32), about=np.array(about))
    print(f"{given.out}: {given.out.stat().st_size / 2**20:.2f} MiB, {len(arrays['load'])} steps; {about}")


if __name__ == "__main__":
    main()
