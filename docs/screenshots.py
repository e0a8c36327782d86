"""Writes five reports and pictures of them at two widths, to be looked at.

    python docs/screenshots.py [FOLDER]

It needs playwright and a Chromium (`pip install playwright`, `apt-get install chromium-headless-shell`), and
transformers. The weights are random; nothing is loaded. The folder is `screenshots` by default;
`llama-1280.png` there is what the README shows, with fewer colours.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradflow as gf

WIDTHS, HEIGHT = (390, 1280), 1000
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Residual(nn.Module):
    """Two convolutions with norms, and a way round them."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.way = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the convolutions add to what entered."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.way(x))


def labelled(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that draws batches with one of ten labels each."""
    return lambda: (torch.randn(*shape), torch.randint(0, 10, shape[:1]))


def tokens(vocabulary: int) -> Callable[[], dict[str, Tensor]]:
    """Return a function that draws batches of tokens for a language model."""

    def draw() -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (4, 24))
        return {"input_ids": ids, "labels": ids}

    return draw


def vanishing_mlp() -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """Ten layers with sigmoids between."""
    layers = [part for _ in range(9) for part in (nn.Linear(64, 64), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return model, labelled(64, 64), nn.CrossEntropyLoss(), {"optimizer": torch.optim.Adam(model.parameters())}


def resnet() -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """Three stages of three residual blocks; the flow is measured on every edge."""
    widths = (16, 32, 64)
    stages = []
    for before, width in zip((16, *widths), widths, strict=False):
        stages.append(nn.Sequential(Residual(before, width), Residual(width, width), Residual(width, width)))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(64, 10))  # fmt: skip
    return model, labelled(16, 3, 16, 16), nn.CrossEntropyLoss(), {"detail": "full", "steps": 8}


def gpt2() -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """GPT-2 with its 12 layers, narrower; its scores are far too large in layer 5."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12, n_embd=96, n_head=6, vocab_size=211, n_positions=64, bos_token_id=0,
                        eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.h[5].attn.c_attn.weight.mul_(40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, tokens(211), None, {"optimizer": optimizer, "steps": 12}


def llama() -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """A model like Llama with 48 layers, narrower; one projection has stopped to learn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=48, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=211, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[30].mlp.down_proj.weight.zero_()
        model.model.layers[30].mlp.up_proj.weight.zero_()
    return model, tokens(211), None, {"steps": 4}


def mlp_1000() -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """A thousand layers with tanh between."""
    layers = [part for _ in range(999) for part in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(16, 10)), labelled(8, 16), nn.CrossEntropyLoss(), {"steps": 4}


MODELS = (vanishing_mlp, resnet, gpt2, llama, mlp_1000)


def reports(folder: Path) -> Iterator[Path]:
    """Yield the file of every report as it is written."""
    for build in MODELS:
        torch.manual_seed(0)
        model, batches, loss, options = build()
        report = gf.diagnose(model, batches, loss, seed=0, **options)
        file = folder / f"{build.__name__}.html"
        report.to_html(file)
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB, {str(report).splitlines()[0]}")
        yield file


def main() -> None:
    """Write the reports and their pictures."""
    from playwright.sync_api import sync_playwright

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    program = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as run:
        browser = run.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for file in reports(folder):
            for width in WIDTHS:
                page = browser.new_page(viewport={"width": width, "height": HEIGHT})
                page.goto(file.resolve().as_uri())
                page.screenshot(path=folder / f"{file.stem}-{width}.png", full_page=False)
                page.screenshot(path=folder / f"{file.stem}-{width}-whole.png", full_page=True)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
