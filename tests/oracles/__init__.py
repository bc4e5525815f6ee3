# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious float64 references, written from the papers and importing nothing of ours."""
