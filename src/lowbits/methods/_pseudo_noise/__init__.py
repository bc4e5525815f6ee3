# SPDX-License-Identifier: Apache-2.0
"""Noise of the size of a rounding error on weights: what GaussWS and DiffQ have in common."""
