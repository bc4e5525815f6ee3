# SPDX-License-Identifier: Apache-2.0
"""Write bitsandbytes.pt: checkpoints of bitsandbytes 0.50.2's optimizers on CPU, and what its next step comes to.

    pip install bitsandbytes==0.50.2 && python tests/golden/make_bitsandbytes.py

Of each optimizer: `before` and `after` the third step (parameters and `state_dict`), and that step's gradients. One
parameter is small and keeps 32 bits; the other is no whole number of blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

MAKERS = {
    "AdamW": lambda params: bnb.optim.AdamW8bit(params, lr=1e-2, weight_decay=0.1),
    "Lion": lambda params: bnb.optim.Lion8bit(params, lr=1e-3, weight_decay=0.1),
    "SGD": lambda params: bnb.optim.SGD8bit(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda params: bnb.optim.RMSprop8bit(params, lr=1e-2, alpha=0.9),
    "Adagrad": lambda params: bnb.optim.Adagrad8bit(params, lr=1e-2),
    "AdEMAMix": lambda params: bnb.optim.AdEMAMix8bit(params, lr=1e-2),
}


_books: dict[bytes, Tensor] = {}


def snapshot(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"params": [p.detach().clone() for p in params], "optimizer": _copied(optimizer.state_dict())}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, Tensor) and value.shape == (256,):  # a code book is stored once
        return _books.setdefault(value.numpy().tobytes(), value)
    return value.clone() if isinstance(value, Tensor) else value


def main() -> None:
    golden = {"version": bnb.__version__}
    for name, make in MAKERS.items():
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: B023, E731
        params = [nn.Parameter(draw(5)), nn.Parameter(draw(9, 30))]
        optimizer = make(params)
        optimizer.args.min_8bit_size = 100
        for step in range(3):
            for p in params:
                p.grad = 0.01 * draw(*p.shape)
            if step == 2:
                before = snapshot(params, optimizer)
            optimizer.step()
        golden[name] = {"before": before, "gradients": [p.grad for p in params], "after": snapshot(params, optimizer)}
    file = Path(__file__).with_name("bitsandbytes.pt")
    torch.save(golden, file, _use_new_zipfile_serialization=False)  # half the bytes


if __name__ == "__main__":
    main()
