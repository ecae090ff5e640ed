"""The MLflow model of a version: detector, code, packages, signature, example; what `mlflow models serve` needs.

Its own code is one archive, which Python imports from as it is: a store takes a second for each file.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.registry.card import DETECTOR_FOLDER, read_card

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature

ROOT = Path(__file__).resolve().parents[2]
OWN_PACKAGES = ("detr", "shards", "pipeline")
PACKAGES = ("torch", "numpy", "pillow", "msgspec", "safetensors", "pycocotools", "mlflow")
"""Packages that a version lists: all that `pipeline.inference.serve` imports and no others; a test compares the two."""
CODE_ARCHIVE = "code/detr.zip"

_DESCRIPTION = {
    "request": "column `image`: a picture file (JPEG, PNG, WebP, BMP, GIF, TIFF) as base64, or a data: URL of it",
    "answer": "for each row: width and height in pixels, and detections, the highest score first, each with category_id, "
    "category, bbox (x, y, width, height in pixels), score and, if the model predicts it, segmentation (COCO's run lengths); of a "
    "panoptic model also segments and panoptic_png, COCO's panoptic PNG as base64, whose ids are those of the segments",
    "threshold": "lowest score, 0 to 1",
    "exif": "`upright` turns a picture as its camera was held; `ignore` takes the pixels as stored",
    "bad_rows": "`refuse` refuses a request with a wrong row; `report` answers such a row with `error`",
}


def write_mlflow_model(path: Path, detector: Path, model: Model) -> None:
    """Write the MLflow model of the detector in folder `detector` into `path` (models from code, nothing pickled).

    model: MLflow's description of it, which names run and id.
    """
    import mlflow.pyfunc

    # MLflow advises type hints, but the signature is more precise. MLflow's own filter overrides `ignore`, so the
    # warnings are recorded and dropped.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # record them even if warnings are errors
        mlflow.pyfunc.save_model(
            path=path,
            python_model=str(ROOT / "pipeline" / "inference" / "serve.py"),
            artifacts={Path(DETECTOR_FOLDER).name: str(detector)},
            signature=signature(panoptic=read_card(detector).panoptic),
            input_example=example(),
            pip_requirements=requirements(),
            metadata=_DESCRIPTION,
            mlflow_model=model,
        )
    write_code(path / CODE_ARCHIVE)
    flavor = model.flavors["python_function"]
    flavor["code"] = CODE_ARCHIVE
    flavor["model_code_path"] = "serve.py"  # MLflow reads the name alone, and wrote this machine's path
    flavor["artifacts"][Path(DETECTOR_FOLDER).name]["uri"] = DETECTOR_FOLDER
    model.save(path / "MLmodel")


def requirements() -> list[str]:
    """Return the packages with the versions that are installed here.

    Without the local label (`+cpu`): the package index has no such file, and the same release serves either way.
    """
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES]


def write_code(path: Path) -> None:
    """Write the source files of this project as an archive; the same files give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for name in OWN_PACKAGES for file in (ROOT / name).rglob("*.py")):
            archive.writestr(zipfile.ZipInfo(str(file.relative_to(ROOT))), file.read_bytes(), zipfile.ZIP_DEFLATED)


def signature(*, panoptic: bool = False) -> ModelSignature:
    """Return the columns of requests and answers, which a panoptic model has more of, and the parameters with defaults."""
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    segmentation = Object([Property("size", Array(DataType.long)), Property("counts", DataType.string)])
    detection = Object(
        [
            Property("category_id", DataType.long),
            Property("category", DataType.string),
            Property("bbox", Array(DataType.double)),
            Property("score", DataType.double),
            Property("segmentation", segmentation, required=False),
        ]
    )
    answer = [
        ColSpec(DataType.long, "width"),
        ColSpec(DataType.long, "height"),
        ColSpec(Array(detection), "detections"),
    ]
    if panoptic:
        whole = {name: DataType.long for name in ("id", "category_id", "isthing", "iscrowd", "area")}
        fields = whole | {"category": DataType.string, "score": DataType.double}
        segment = [Property(name, kind) for name, kind in fields.items()]
        segment += [Property("bbox", Array(DataType.long)), Property("segmentation", segmentation)]
        answer += [ColSpec(Array(Object(segment)), "segments"), ColSpec(DataType.string, "panoptic_png")]
    parameters = [
        ParamSpec("threshold", DataType.double, 0.5),
        ParamSpec("exif", DataType.string, "upright"),
        ParamSpec("bad_rows", DataType.string, "refuse"),
    ]
    return ModelSignature(Schema([ColSpec(DataType.string, "image")]), Schema(answer), ParamSchema(parameters))


def example() -> tuple[Any, dict[str, Any]]:
    """Return a request that works: a small picture and a parameter."""
    import pandas
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(picture).ellipse((24, 8, 72, 56), fill="firebrick")
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return pandas.DataFrame({"image": [base64.b64encode(file.getvalue()).decode()]}), {"threshold": 0.5}
