"""Every variant of the model trains, compiles and is divided over ranks by the same rules."""

import pytest
import torch

from detr.batch import Target
from detr.compute import fsdp_units, set_channels_last, set_recompute
from detr.config import LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.variant import tensors_of
from tests.support.variants import VARIANTS, built, images

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("boxes", [(2, 0), (0, 0), ()], ids=["boxes", "no boxes", "no images"])
def test_every_parameter_gets_a_gradient_for_which_ddp_waits(
    config: ModelConfig, auxiliary: bool, boxes: tuple[int, ...]
) -> None:
    model = built(config, auxiliary=auxiliary or config.variant == "deformable")
    targets = [
        Target(torch.full((n, 4), 0.4), torch.ones(n, dtype=torch.int64), i, (9, 9)) for i, n in enumerate(boxes)
    ]
    loss = LossConfig(auxiliary=auxiliary, weight_one_to_many=float(auxiliary))
    compute_losses(model(*images(len(boxes))), targets, 2.0, loss).total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@every_variant
def test_recomputing_and_channels_last_change_no_gradient(config: ModelConfig) -> None:
    gradients = []
    for changed in (False, True):
        model = built(config)
        if changed:
            set_recompute(model, "both")
            set_channels_last(model)
        sum(tensor.sum() for tensor in tensors_of(model(*images()))).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)


@every_variant
def test_fsdp_shards_each_layer(config: ModelConfig) -> None:
    model = built(config)
    layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    assert [unit for unit in fsdp_units(model) if unit[0] in layers] == [[layer] for layer in layers]


@pytest.mark.parametrize("variant", ["conditional", "hybrid"])
def test_a_compiled_model_has_the_same_losses_and_gradients(variant: str) -> None:
    targets = [Target(torch.full((2, 4), 0.4), torch.ones(2, dtype=torch.int64), 1, (9, 9))] * 2
    found = []
    for compiled in (False, True):
        model = built(VARIANTS[variant])
        forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        losses = compute_losses(forward(*images()), targets, 2.0, LossConfig())
        losses.total.backward()
        found.append([losses.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
