"""The tiny model of many tests, which trains on 64 px with one core."""

from detr.config import ModelConfig

TINY_MODEL = ModelConfig(
    backbone="tiny",
    backbone_weights="random",
    norm="group",
    hidden_dim=16,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=32,
    dropout=0.1,
    num_queries=8,
)
