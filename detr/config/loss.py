"""Configuration of the matching and of the losses."""

from dataclasses import dataclass

from detr.config.checks import require, require_each


@dataclass(frozen=True)
class LossConfig:
    """Matching costs and loss weights (section 3.1 and appendix A.4 of the paper).

    A cost or weight of 0 switches its term off, as in the paper's ablations (section 4.2). A term that is off never
    changes the loss, whatever its value, NaN included; it is still reported.
    """

    cost_class: float = 1.0
    """Matching cost of the class probability. 0: off."""
    cost_bbox: float = 5.0
    """Matching cost of the L1 distance between boxes. 0: off."""
    cost_giou: float = 2.0
    """Matching cost of the generalised IoU of boxes. 0: off."""
    weight_ce: float = 1.0
    """Weight of the classification loss (cross entropy). 0: off."""
    weight_bbox: float = 5.0
    """Weight of the L1 loss of boxes. 0: off."""
    weight_giou: float = 2.0
    """Weight of the generalised IoU loss of boxes. 0: off."""
    weight_mask: float = 1.0
    """Weight of the focal loss of masks, for models with masks. 0: off."""
    weight_dice: float = 1.0
    """Weight of the DICE loss of masks, for models with masks. 0: off."""
    focal_alpha: float = 0.25
    """Weight of likely classes in the focal loss and its matching cost, 0 to 1; others have 1 - `focal_alpha`.
    Only for models with a sigmoid per class, which are all variants but the paper's."""
    one_to_many_copies: int = 6
    """Number of queries that may match each object in hybrid matching (`model.deformable.one_to_many_queries`)."""
    weight_one_to_many: float = 1.0
    """Weight of the losses of hybrid matching, in addition to their own. 0: off."""
    eos_coef: float = 0.1
    """Weight of the class "no object" in the cross entropy; real classes have weight 1.
    Raise it if most queries have an object to match."""
    auxiliary: bool = True
    """Compute the losses of every decoder layer, as in the paper, not only of the last. Needs `model.auxiliary`."""

    def __post_init__(self) -> None:
        fields = "cost_class cost_bbox cost_giou weight_ce weight_bbox weight_giou weight_mask weight_dice eos_coef"
        require_each(self, f"{fields} weight_one_to_many", 0, "a finite number, 0 or more")
        require(0 <= self.focal_alpha <= 1, "focal_alpha", self.focal_alpha, "0 to 1")
        require_each(self, "one_to_many_copies", 0, "0 or more")
        costs = self.cost_class + self.cost_bbox + self.cost_giou
        require(costs > 0, "cost_class, cost_bbox, cost_giou", (0, 0, 0), "at least one above 0")
