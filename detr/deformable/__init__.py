"""Deformable DETR (Zhu et al., 2021) and hybrid matching (Jia et al., 2023) in plain PyTorch.

May import `detr.losses`, `detr.matcher` and what lies below them.
"""
