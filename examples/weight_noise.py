# SPDX-License-Identifier: Apache-2.0
"""Train under noise of the size of a rounding error in a loop of one's own, and export every block in few bits."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from lowbits.methods.gaussws import Plan, add_noise_, load_ladder, noisy, save_ladder, set_draw_
from lowbits.nn import Recipe, convert_

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
convert_(model, Recipe(), verbose=False)
add_noise_(model, Plan(b_init=6, b_target=4), seed=0)

bits = [weight.b_i for weight in noisy(model)]
weights = [p for p in model.parameters() if not any(p is b for b in bits)]
groups = [{"params": weights}, {"params": bits, "lr": 0.02, "weight_decay": 1.0}]
optimizer = torch.optim.AdamW(groups, lr=3e-3)
centres = torch.randn(10, 64)
for step in range(200):
    labels = torch.randint(10, (64,))
    set_draw_(noisy(model), step)  # a number that never repeats
    loss = nn.functional.cross_entropy(model(centres[labels] + torch.randn(64, 64)), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

path = Path(tempfile.mkdtemp()) / "model.safetensors"
size = save_ladder(model, path)
plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
plain.load_state_dict({name: tensor.float() for name, tensor in load_ladder(path).items()})
labels = torch.arange(10).repeat(100)
accuracy = (plain(centres[labels] + torch.randn(1000, 64)).argmax(1) == labels).float().mean()
mean_bits = torch.cat([weight.bits().flatten() for weight in noisy(model)]).mean()
print(f"{mean_bits:.2f} bits on average, {size:,} bytes instead of {4 * 19_210:,}, accuracy {accuracy:.1%}")
