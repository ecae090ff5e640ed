from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr.config import ConfigError, LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.mask_head import AttentionMap, MaskHead
from detr.model import Outputs, build_model, freeze_detector
from detr.original import load_detector_state_dict, load_original_state_dict, to_original_state_dict
from detr.postprocess import detect
from tests.support.masked_model import TINY, build_masked, drawn_targets


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, backbone="resnet18", norm="frozen_batch"),
        replace(TINY, backbone="resnet50", norm="frozen_batch"),
        replace(TINY, backbone="resnet50", norm="frozen_batch", dilation=True),
    ],
    ids=["tiny", "r18", "r50", "r50-dc5"],
)
def test_every_query_has_a_mask_on_the_stride_4_grid(config: ModelConfig) -> None:
    outputs = build_model(config, 4)(torch.randn(2, 3, 70, 100))
    assert outputs.masks is not None
    assert outputs.masks.shape == (2, 6, 18, 25)
    assert all(layer.masks is None for layer in outputs.auxiliary)


@pytest.mark.parametrize(
    "sizes", [((3, 4), (5, 8), (10, 15)), ((6, 8), (12, 16), (24, 32))], ids=["same and odd", "twice each time"]
)
def test_head_equals_the_plain_convolutions(sizes: tuple[tuple[int, int], ...]) -> None:
    """Compare with the plain form: a copy of the features for every query, and enlarged maps."""
    torch.manual_seed(0)
    head = MaskHead(128, 8, [24, 16, 12])
    for norm in (m for m in head.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    features, attention = torch.randn(2, 128, 3, 4), torch.randn(2, 5, 8, 3, 4)
    finer = [torch.randn(2, channels, *size) for channels, size in zip((24, 16, 12), sizes, strict=True)]

    def per_query(shared: Tensor) -> Tensor:
        return shared.repeat_interleave(5, 0)

    x = torch.cat([per_query(features), attention.flatten(0, 1)], 1)
    x = F.relu(head.gn2(head.lay2(F.relu(head.gn1(head.lay1(x))))))
    for i, stage in enumerate(finer, start=1):
        x = per_query(getattr(head, f"adapter{i}")(stage)) + F.interpolate(x, stage.shape[2:], mode="nearest")
        x = F.relu(getattr(head, f"gn{i + 2}")(getattr(head, f"lay{i + 2}")(x)))
    expected, got = head.out_lay(x).view(2, 5, *sizes[-1]), head(features, attention, finer)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(masks.square().mean(), [*head.parameters()]) for masks in (got, expected)]
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_attention_map_sums_to_one_over_heads_and_unpadded_cells() -> None:
    torch.manual_seed(0)
    attention, padding = AttentionMap(32, 4), torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 7:] = True
    queries, memory = torch.randn(2, 3, 32), torch.randn(2, 12, 32)
    maps = attention(queries, memory, padding)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 3))
    assert not maps[1, :, :, 7:].any()
    torch.testing.assert_close(maps[1:, :, :, :7], attention(queries[1:], memory[1:, :7], None))


def test_all_false_padding_changes_no_mask() -> None:
    model, images = build_masked(), torch.randn(2, 3, 64, 80)
    masked = model(images, torch.zeros(2, 64, 80, dtype=torch.bool))
    torch.testing.assert_close(masked.masks, model(images).masks, rtol=1e-4, atol=1e-4)


def test_a_seed_gives_the_same_detector_with_and_without_masks() -> None:
    with_masks = build_masked().state_dict()
    assert all(torch.equal(value, with_masks[key]) for key, value in build_masked(masks=False).state_dict().items())


@pytest.mark.parametrize(("field", "value", "multiple"), [("hidden_dim", 192, 128), ("heads", 4, 8)])
def test_channels_that_group_norm_cannot_divide_are_refused(field: str, value: int, multiple: int) -> None:
    with pytest.raises(ConfigError, match=f"{field}: got {value}, expected a multiple of {multiple} with masks"):
        replace(TINY, **{field: value})
    replace(TINY, masks=False, **{field: value})


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_only_the_mask_head_of_a_frozen_detector_trains(norm: str) -> None:
    model = build_masked(norm=norm).train()
    freeze_detector(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    compute_losses(model(torch.randn(2, 3, 64, 80)), drawn_targets(2, 3), 5.0, LossConfig()).total.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    learns = {name for name, _ in model.named_parameters() if name.startswith(("bbox_attention.", "mask_head."))}
    assert changed == learns
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learns


def test_a_frozen_detector_keeps_its_dropout_as_in_the_original() -> None:
    model, images = build_masked(dropout=0.5), torch.randn(1, 3, 64, 80)
    freeze_detector(model)
    assert not torch.equal(model.train()(images).boxes, model(images).boxes)
    assert torch.equal(model.eval()(images).boxes, model(images).boxes)


def test_freezing_keeps_the_outputs() -> None:
    model, images = build_masked(norm="batch"), torch.randn(2, 3, 64, 80)
    model.train()(images)  # statistics of its own
    expected = model.eval()(images).masks
    freeze_detector(model)
    torch.testing.assert_close(model(images).masks, expected, rtol=1e-4, atol=1e-4)


def test_freezing_without_a_mask_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="masks: got a model without a mask head"):
        freeze_detector(build_masked(masks=False))


def reference_masks(
    logits: Tensor, sizes: list[tuple[int, int]], originals: list[tuple[int, int]], canvas: tuple[int, int]
) -> list[Tensor]:
    """Return the masks of the original's post-processing, step by step on batches of floats."""
    inside = F.interpolate(logits, canvas, mode="bilinear", align_corners=False).sigmoid() > 0.5
    return [
        F.interpolate(found[:, None, :height, :width].float(), original, mode="nearest")[:, 0].bool()
        for found, (height, width), original in zip(inside, sizes, originals, strict=True)
    ]


@pytest.mark.parametrize("canvas", [None, (64, 96)])
def test_masks_of_detections_are_cut_and_scaled_to_the_original_images(canvas: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(2, 6, 5, 6), (16, 24), mode="bicubic")
    outputs = Outputs(torch.randn(2, 6, 5), torch.rand(2, 6, 4), (), logits)
    sizes, originals = [(61, 70), (48, 93)], [(97, 111), (31, 60)]
    found = detect(outputs, originals, sizes=sizes, canvas=canvas)
    expected = reference_masks(logits, sizes, originals, canvas or (61, 93))
    for detection, masks, original in zip(found, expected, originals, strict=True):
        assert detection.masks.shape == (6, *original)
        assert detection.masks.dtype == torch.bool
        assert torch.equal(detection.masks, masks)
        assert 0.05 < masks.float().mean() < 0.95
    suppressed = detect(outputs, originals, sizes=sizes, canvas=canvas, nms=0.5)
    for few, every in zip(suppressed, found, strict=True):
        rows = [every.scores.tolist().index(score) for score in few.scores.tolist()]
        assert torch.equal(few.masks, every.masks[rows])


def test_masks_are_returned_only_with_sizes() -> None:
    outputs = Outputs(torch.zeros(2, 6, 5), torch.zeros(2, 6, 4), (), torch.zeros(2, 6, 16, 20))
    assert all(found.masks is None for found in detect(outputs, [(9, 9), (8, 8)]))
    assert all(found.masks is None for found in detect(outputs._replace(masks=None), [(9, 9)] * 2, sizes=[(4, 4)] * 2))
    with pytest.raises(ValueError, match="sizes: got 1, expected one per image, 2"):
        detect(outputs, [(9, 9), (8, 8)], sizes=[(64, 80)])
    assert (
        detect(Outputs(torch.zeros(0, 6, 5), torch.zeros(0, 6, 4), (), torch.zeros(0, 6, 16, 16)), [], sizes=[]) == []
    )


def test_state_dict_with_masks_has_the_originals_keys() -> None:
    source = to_original_state_dict(build_masked())
    assert {key.split(".")[0] for key in source} == {"detr", "bbox_attention", "mask_head"}
    for key in ("detr.transformer.decoder.norm.bias", "detr.backbone.0.body.conv1.weight", "detr.query_embed.weight",
                "bbox_attention.q_linear.bias", "mask_head.lay5.weight", "mask_head.gn1.bias",
                "mask_head.adapter3.weight", "mask_head.out_lay.bias"):  # fmt: skip
        assert key in source
    model = build_model(TINY, 4)
    load_original_state_dict(model, source)
    returned = to_original_state_dict(model)
    assert list(returned) == list(source)
    assert all(torch.equal(returned[key], source[key]) for key in source)


def test_detector_loads_into_a_model_with_masks() -> None:
    detector, model = build_masked(masks=False), build_model(TINY, 4)
    fresh = {name: p.clone() for name, p in model.named_parameters()}
    load_detector_state_dict(model, to_original_state_dict(detector))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in detector.state_dict().items())
    for name in ("bbox_attention.q_linear.weight", "mask_head.lay1.weight", "mask_head.adapter1.weight"):
        assert torch.equal(state[name], fresh[name])


def test_state_dict_error_names_a_missing_or_extra_mask_head() -> None:
    detector, segmenter = build_masked(masks=False), build_masked()
    with pytest.raises(ValueError, match="it has no mask head: load_detector_state_dict"):
        load_original_state_dict(segmenter, to_original_state_dict(detector))
    for load in (load_original_state_dict, load_detector_state_dict):
        with pytest.raises(ValueError, match="it is a segmentation model"):
            load(detector, to_original_state_dict(segmenter))
    with pytest.raises(ValueError, match="another number of classes"):
        load_original_state_dict(segmenter, to_original_state_dict(build_model(TINY, 5)))
    with pytest.raises(ValueError, match="another number of classes"):
        load_detector_state_dict(segmenter, to_original_state_dict(build_model(replace(TINY, masks=False), 5)))


def test_the_mask_model_compiles_to_the_same_outputs() -> None:
    pytest.importorskip("torch._dynamo")
    model, images = build_masked(), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).masks, model(images).masks)
