# SPDX-License-Identifier: Apache-2.0
"""Quantized distillation. Polino, Pascanu and Alistarh 2018, arXiv:1802.05668.

A student runs forward and backward on weights of few levels, its loss mixes labels with a teacher's soft outputs, and
the optimizer moves a master copy in full precision. The parts are plain functions for any loop:

    quantize_weights_(student, Levels.of_bits(4))
    teacher = Teacher(big)
    loss = distillation_loss(student(x), teacher(x), y)
    ...
    save_coded("student.safetensors", coded_model(student))        # of lowbits.export
"""

from __future__ import annotations

from lowbits.methods._distillation_loss import KlMean, Mixing, TopK, distillation_loss
from lowbits.methods._first_and_last import FirstAndLast, first_and_last
from lowbits.methods._levels import Backward, Levels, encode, round_to_levels
from lowbits.methods._quantized_weights import LevelView, quantize_weights_
from lowbits.methods._teacher import Teacher, free_memory, load_teacher
from lowbits.methods._teacher_cache import CacheSettings, Stored, TeacherCache, content_keys
from lowbits.methods._weight_views import coded_model, master_weights, remove_views_, set_draw_, settle_, viewed

__all__ = [
    "Backward",
    "CacheSettings",
    "FirstAndLast",
    "KlMean",
    "LevelView",
    "Levels",
    "Mixing",
    "Stored",
    "Teacher",
    "TeacherCache",
    "TopK",
    "coded_model",
    "content_keys",
    "distillation_loss",
    "encode",
    "first_and_last",
    "free_memory",
    "load_teacher",
    "master_weights",
    "quantize_weights_",
    "remove_views_",
    "round_to_levels",
    "set_draw_",
    "settle_",
    "viewed",
]
