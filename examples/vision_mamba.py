"""A small Vision Mamba, trained for seconds and made sparse without training. (python examples/vision_mamba.py)

Each block scans the patches of an image twice, once forward and once reversed; a class token in the middle of the
patches collects what the head reads. simba_fx scores every patch by its contribution to the class token, from both
sides, and lets the others go. The images are made at run time: a short bar on noise, to be told by its direction.

An image model's input has no token dimension, so what is transformed is the stack of blocks, `vim.encoder`; patches,
class token and head stay the user's own Python.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import simba_fx

SIZE, PATCH, CLASSES = 32, 4, 4  # pixels of an image's side and of a patch's; directions of the bar
BATCH = 32
PATCHES = (SIZE // PATCH) ** 2
CLASS_TOKEN = PATCHES // 2  # its position among the tokens

# --- the model: ordinary PyTorch ----------------------------------------------------------------------------------


def scan(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`h_t = exp(step_t A) h_{t-1} + step_t B_t x_t` and `y_t = C_t h_t`, token by token.

    `x`, `step` and the result are `(B, L, D)`; `A` is `(D, N)`, negative; `B`, `C` are `(B, L, N)`.
    """
    state, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        state = torch.exp(step[:, t, :, None] * A) * state + (step[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


class Direction(nn.Module):
    """One selective scan over `(B, L, D)`."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=2, groups=width)
        self.selection = nn.Linear(width, width + 2 * states)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.sizes = (width, states, states)
        nn.init.constant_(self.selection.bias[:width], -3.0)  # small steps: a long memory

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, B, C = self.selection(x).split(self.sizes, dim=-1)
        return scan(x, F.softplus(step), -torch.exp(self.A_log), B, C) + x


class Block(nn.Module):
    """Two scans over the same tokens, the second against their order."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.inputs = nn.Linear(width, 2 * width, bias=False)
        self.ahead, self.back = Direction(width, states), Direction(width, states)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x, gate = self.inputs(self.norm(hidden)).chunk(2, dim=-1)
        y = self.ahead(x) + self.back(x.flip(1)).flip(1)
        return hidden + self.output(y * F.silu(gate))


class Encoder(nn.Module):
    """`(B, L, D)` to `(B, L, D)`, for any number of tokens."""

    def __init__(self, width: int, states: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, states) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class ViM(nn.Module):
    def __init__(self, width: int = 32, states: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, PATCHES + 1, width) * 0.02)
        self.encoder: nn.Module = Encoder(width, states, depth)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, CLASSES)

    def tokens(self, images: Tensor) -> Tensor:
        """`(B, 1, 32, 32)` images to `(B, 65, D)` tokens, the class token in the middle."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        before, behind = patches.split([CLASS_TOKEN, PATCHES - CLASS_TOKEN], dim=1)
        return torch.cat((before, self.class_token.expand(len(images), -1, -1), behind), dim=1) + self.positions

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.tokens(images))[:, CLASS_TOKEN]))


# --- images -------------------------------------------------------------------------------------------------------


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n images `(n, 1, 32, 32)` of a bar, 13 pixels long and 3 wide, anywhere on noise, and its direction `(n,)`."""
    labels = torch.randint(CLASSES, (n,), generator=generator)
    angle = labels * (math.pi / CLASSES)
    centre = 7 + (SIZE - 14) * torch.rand(2, n, generator=generator)
    y, x = (axis[None] - place[:, None, None] for axis, place in zip(_grid(), centre))
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    bar = ((x * cos + y * sin).abs() <= 6.5) & ((y * cos - x * sin).abs() <= 1.5)
    noise = 0.25 * torch.randn(n, SIZE, SIZE, generator=generator)
    return (noise + 2.0 * bar)[:, None], labels


def _grid() -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return y, x


# --- making it sparse ---------------------------------------------------------------------------------------------


def adapter(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor):  # type: ignore[no-untyped-def]
    """The arguments of `scan` in simba_fx's layout, `(B, D, L)`, and the way back for the result."""
    operands = simba_fx.SelectiveScan(
        u=x.transpose(1, 2), delta=step.transpose(1, 2), A=A, B=B.transpose(1, 2), C=C.transpose(1, 2)
    )
    return operands, lambda y, last_state: y.transpose(1, 2)


simba_fx.register_scan(scan, adapter)


def train(vim: ViM, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(vim.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        images, labels = draw(BATCH, generator)
        F.cross_entropy(vim(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(vim: ViM, images: Tensor, labels: Tensor) -> float:
    return float((vim(images).argmax(1) == labels).double().mean())


def picture(vim: ViM, images: Tensor, path: Path) -> None:
    """Save the images, and again with a veil over the patches that did not enter the last block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with torch.no_grad():
        vim(images)
    reached = torch.zeros(len(images), PATCHES + 1).scatter_(1, simba_fx.kept(vim.encoder)[-1], 1.0)
    patches = torch.cat((reached[:, :CLASS_TOKEN], reached[:, CLASS_TOKEN + 1 :]), 1)  # without the class token
    seen = patches.view(-1, SIZE // PATCH, SIZE // PATCH)
    figure = Figure(figsize=(1.7 * len(images), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, len(images))
    for above, below, image, mask in zip(upper, lower, images[:, 0], seen):
        for axes in (above, below):
            axes.imshow(image, cmap="gray", vmin=-1, vmax=2.5, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        shade = torch.zeros(SIZE // PATCH, SIZE // PATCH, 4)
        shade[..., :3], shade[..., 3] = torch.tensor([0.85, 0.9, 0.97]), 0.85 * (1 - mask)
        below.imshow(shade, extent=(-0.5, SIZE - 0.5, SIZE - 0.5, -0.5), interpolation="nearest")
    upper[0].set_ylabel("image")
    lower[0].set_ylabel("enters last block")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help=f"of training, {BATCH} images each")
    parser.add_argument("--picture", type=Path, default=Path("vision_mamba.png"), help="where the picture is saved")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vim = ViM()
    encoder = vim.encoder
    sample = (vim.tokens(draw(2, generator)[0]),)

    def transformed(schedule: str | float | simba_fx.Linear, criterion: str = "simba") -> nn.Module:
        return simba_fx.transform(encoder, schedule, criterion=criterion, query=CLASS_TOKEN, example_inputs=sample)

    vim.encoder = transformed("dense")  # the same weights, and a fast scan: `scan` above is a loop over tokens
    train(vim, arguments.steps, generator)
    images, labels = draw(1000, generator)
    print(f"dense: {accuracy(vim, images, labels):.3f} of the directions told, chance {1 / CLASSES:.2f}")

    print("schedule           mean share  FLOPs of dense  accuracy  keeping random tokens")
    for final in (0.5, 0.3, 0.1):
        schedule = simba_fx.Linear(final)
        vim.encoder = transformed(schedule, "random")
        random = accuracy(vim, images, labels)
        vim.encoder = transformed(schedule)
        found, report = accuracy(vim, images, labels), simba_fx.report(vim.encoder, vim.tokens(images[:BATCH]))
        shares = f"{report.mean_share:10.3f}  {report.total.share:14.3f}"
        print(f"Linear(final={final})  {shares}  {found:8.3f}  {random:21.3f}")
    vim.encoder = transformed(simba_fx.Linear(0.3))
    try:
        picture(vim, images[:6], arguments.picture)
        print(f"saved {arguments.picture}: the patches that entered the last block")
    except ImportError:
        print("no picture: it is drawn with matplotlib (pip install simba-fx[plot])")


if __name__ == "__main__":
    main()
