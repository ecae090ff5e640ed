"""Conditional DETR (Meng et al., 2021): cross-attention whose queries carry a learned position.

May import `detr.losses`, `detr.matcher` and what lies below them.
"""
