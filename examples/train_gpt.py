"""Train a byte-level GPT on text, on any number of processes:  ringfold run -n 2 examples/train_gpt.py [--help]
Shapes: B rows, T bytes of context, D width, H heads, K width of a head, V the 256 bytes."""

import argparse
import itertools
import math
import os
import sysconfig
from pathlib import Path

import ringfold as rf
import torch
import torch.nn.functional as F
from ringfold.runtime.metrics import Metrics
from torch import nn
from torch.utils.data import Subset, TensorDataset

SIZES = {"tiny": (2, 64, 2, 64, 6e-3), "small": (5, 128, 4, 128, 4e-3), "10m": (6, 384, 6, 256, 1.5e-3)}  # layers, D, H, T, learning rate


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
        qkv_3BHTK = self.qkv(self.norm1(x_BTD)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a, b = qkv_3BHTK[:2].chunk(2, -1)  # pairs of channels of q and k turn by an angle that grows with the position: RoPE
        q_BHTK, k_BHTK = torch.cat([a * cos_TK - b * sin_TK, a * sin_TK + b * cos_TK], -1)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, qkv_3BHTK[2], is_causal=True)
        x_BTD = x_BTD + self.out(mixed_BHTK.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.relu(self.up(self.norm2(x_BTD))).square())


class GPT(nn.Module):
    def __init__(self, layers: int = 2, width: int = 32, heads: int = 2, context: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(256, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what adds to the residual stream starts smaller
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 0.02)
        angle_TK = torch.arange(context)[:, None] * 10_000 ** -torch.linspace(0, 1, width // heads // 2)
        self.register_buffer("rotation_2TK", torch.stack([angle_TK.cos(), angle_TK.sin()]), persistent=False)

    def forward(self, bytes_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(bytes_BT.long())
        for block in self.blocks:
            x_BTD = block(x_BTD, *self.rotation_2TK[:, : bytes_BT.shape[1]])
        return F.linear(self.norm(x_BTD), self.embed.weight)  # logits_BTV, from the tied embedding

    @torch.no_grad()
    def continue_text(self, text: bytes, count: int, context: int) -> str:
        generator, ids = torch.Generator().manual_seed(0), list(text)
        for _ in range(count):
            logits_V = self(torch.tensor([ids[-context:]], device=self.embed.weight.device))[0, -1].cpu()
            ids.append(int(torch.multinomial(F.softmax(logits_V / 0.7, -1), 1, generator=generator)))
        return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in bytes(ids).decode(errors="replace"))


def read_rows(path: Path | None, context: int) -> list[TensorDataset]:
    root, skipped = path or Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    found = sorted(root.rglob("*" if path else "*.py")) if root.is_dir() else [root]
    text = b"".join(file.read_bytes() for file in found if file.is_file() and (path or skipped.isdisjoint(file.relative_to(root).parts)))
    if len(text) < 1 << 16:
        raise rf.ConfigError(f"--data {root}: found {len(text)} bytes of text; give a text file, or a folder of them, with 64 KiB or more")
    parts = torch.frombuffer(bytearray(text), dtype=torch.uint8).tensor_split([len(text) * 9 // 10])  # training, validation
    return [TensorDataset((rows := part.unfold(0, context + 1, context))[:, :-1], rows[:, 1:]) for part in parts]


def cross_entropy(logits_BTV: torch.Tensor, target_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.long().flatten(), reduction="sum"), target_BT.numel()


def verified() -> tuple[object, object, object]:  # ringfold verify examples/train_gpt.py:verified --layout dp4
    rows = torch.randint(256, (9, 33), generator=torch.Generator().manual_seed(0))
    return GPT, (rows[:, :-1], rows[:, 1:]), cross_entropy


def main(args: argparse.Namespace) -> None:
    mesh = rf.init()
    *shape, context, lr = SIZES[args.size]
    train, valid = read_rows(args.data, context)
    valid = Subset(valid, range(0, len(valid), max(1, len(valid) // 512)))  # about 512 rows, evenly spread
    engine = rf.Engine(
        lambda: GPT(*shape, context),
        mesh,
        loss=cross_entropy,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(  # warmup, then a cosine down to a tenth
            optimizer, lambda step: min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * min(1, step / max(1, args.steps))))
        ),
        clip_norm=1.0,
    )
    batches = engine.shard(train, batch_size=args.batch_size, shuffle=True)
    args.resume and engine.resume(args.out)
    with Metrics(mesh, total_steps=args.steps, log_dir=os.environ.get("RINGFOLD_LOG_DIR", args.out)) as metrics:
        for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), max(0, args.steps - engine.step)):
            metrics.step(engine.step + 1, loss=engine.train_step(batch), tokens=engine.count)
            if engine.step % 100 == 0 or engine.step == args.steps:
                engine.save(args.out / f"step-{engine.step}")
        metrics.report(engine.step, validation_loss=engine.evaluate(rf.shard(valid, mesh["dp"], batch_size=args.batch_size))["loss"])
        metrics.print(f"\n{engine.module.continue_text(b'def read_', 240, context)}\n")
        again = f"ringfold run -n {mesh.size} {os.path.relpath(__file__)} --steps {2 * args.steps} --resume"
        metrics.print(f"checkpoint  {args.out}/step-{engine.step}\nlogs        {metrics.path}\nnext        {again}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="a text file, or a folder of them (default: Python's standard library)")
    parser.add_argument("--size", choices=SIZES, default="small", help="default: %(default)s, 1.0 M parameters")
    parser.add_argument("--steps", type=int, default=300, help="train steps in all (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of the global batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder of the checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    main(parser.parse_args())
