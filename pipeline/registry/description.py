"""Description of a version as Markdown, which its page in MLflow shows: how good, from what, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.registry.facts import Figures, VersionFacts
from pipeline.tracking.pages.data import DataSet
from pipeline.tracking.pages.links import artifact, commit_text, run_page, version_page

MOST_TEXT = 4900
"""Characters of a description; MLflow keeps 5000."""
_SHOWN = 12  # characters of a digest
_CLASSES = 8  # classes that are named, the most frequent
_COMMAND = 64  # characters of a command beside which its use is shown in a column
_EVALUATIONS = 6  # data sets whose figures are shown
_MOST_CELL = (600, 300, 120)  # characters of a cell, as many as fit
_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def describe_version(facts: VersionFacts, pictures: Mapping[str, str]) -> str:
    """Return the description of a version; `pictures` are paths of artifacts of its run by their titles."""
    shown = "\n\n".join(f"![{title}]({artifact(facts.run_id, path)})" for title, path in pictures.items())
    text, commands = "", f"```\n{usage_text(facts)}\n```"
    for most in _MOST_CELL:
        blocks = [_origin(facts), _figures(facts), _change(facts), shown, _facts(facts, most), commands]
        text = "\n\n".join(filter(None, blocks))
        if len(text) <= MOST_TEXT:
            return text
    return text[:MOST_TEXT].rpartition("\n\n")[0]  # not in the middle of a block, which would spoil the page


def describe_model(facts: VersionFacts) -> str:
    """Return the description of the registered model of a version."""
    recipe = f" with the recipe `{facts.config.recipe}`" if facts.config and facts.config.recipe else ""
    made = "Detectors that `detr train` has trained" if facts.config else "Detectors in this project's form"
    return (
        f"{made}{recipe}: DETR as an MLflow model. `@best` is on the version with the highest AP on the same validation "
        f"data, unless somebody moved it. The page of each version says how good it is, from which data and code it came, and "
        f"how it is used; `detr lineage models:/{facts.name}/VERSION` follows it to the annotations.\n\n"
        f"```\ndetr evaluate models:/{facts.name}@best --data URL\n"
        f"detr predict models:/{facts.name}@best *.jpg --out found\n"
        f"mlflow models serve -m models:/{facts.name}@best\n```"
    )


def _origin(facts: VersionFacts) -> str:
    imported = facts.tags.get("imported_from")
    run = f"[{facts.run_name}]({run_page(facts.experiment_id, facts.run_id)})"
    if imported:
        return f"Imported from {imported.replace(' sha256:', ', sha256 `')}`, as the run {run} records."
    step, epoch = int(facts.tags.get("step", 0)), float(facts.tags.get("epoch", 0))
    of = f" of {facts.config.optim.epochs}" if facts.config else ""
    return f"Checkpoint of step {step:,}, epoch {epoch:.3g}{of}, of the run {run}."


def _figures(facts: VersionFacts) -> str:
    if not facts.figures:
        return "Not evaluated yet: `detr evaluate` adds its figures here."
    masks = any("mask_AP" in figures.metrics for figures in facts.figures)
    gap = "&nbsp;&nbsp;"  # MLflow's tables have none between columns
    panoptic = any("PQ" in figures.metrics for figures in facts.figures)
    columns = ("PQ", *_COLUMNS) if panoptic else _COLUMNS
    lines = [f"| data | {gap}" + f" | {gap}".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for figures in facts.figures[:_EVALUATIONS]:
        for title, prefix in (("", ""), (", masks", "mask_"))[: 1 + masks]:
            cells = [_cell(figures.metrics.get(prefix + name)) for name in columns]
            lines.append(f"| {_data_title(facts, figures)}{title} | {gap}" + f" | {gap}".join(cells) + " |")
    return "\n".join(lines)


def _data_title(facts: VersionFacts, figures: Figures) -> str:
    name = figures.data or "validation data"
    if figures.run_id == facts.run_id:
        return f"**{name}**"
    return f"[{name}]({run_page(facts.experiment_id, figures.run_id)}) `{figures.digest[:_SHOWN]}`"


def _cell(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{value:.3f}"


def _change(facts: VersionFacts) -> str:
    return "\n".join(f"- {text}" for name, text in sorted(facts.tags.items()) if name.startswith("change."))


def _facts(facts: VersionFacts, most: int) -> str:
    rows = [(f"{use} data", data_text(data)) for use, data in facts.data]
    if not facts.data:  # of a run of an older release
        uses = {"train_digest": "training data", "val_digest": "validation data"}
        rows += [(use, f"digest `{facts.tags[tag][:_SHOWN]}`") for tag, use in uses.items() if facts.tags.get(tag)]
    if facts.config:
        rows.append(("recipe", f"`{facts.config.recipe or 'none'}`, {facts.config.model.backbone}"))
    rows.append(("code", commit_text(facts.commit, facts.repository)))
    if facts.parent:
        page = version_page(facts.parent.name, facts.parent.version)
        rows.append(("started from", f"[{facts.parent.uri}]({page})"))
    elif facts.initial_weights:
        rows.append(("first weights", facts.initial_weights))
    if "ema" in facts.tags:
        rows.append(("weights", f"moving average, decay {facts.tags['ema']}"))
    if "checkpoint_uri" in facts.tags:
        rows.append(("checkpoint", f"`{facts.tags['checkpoint_uri']}`"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {title} | {text.replace('|', '/')[:most]} |" for title, text in rows)


def data_text(data: DataSet) -> str:
    """Return a data set in one line: counts, most frequent classes, digests, address."""
    pieces = [str(data)]
    if data.by_class:
        ordered = sorted(data.by_class, key=lambda entry: -entry.objects)[:_CLASSES]
        more = ", ..." if len(data.by_class) > _CLASSES else ""
        pieces.append("(" + ", ".join(f"{entry.name} {entry.objects:,}" for entry in ordered) + more + ")")
    digests = [f"digest `{data.digest[:_SHOWN]}`"]
    if data.source_digest:
        digests.append(f"made from annotations `{data.source_digest[:_SHOWN]}`")
    if data.corrections_digest:
        digests.append(f"with {corrections_text(data)}, `{data.corrections_digest[:_SHOWN]}`")
    return f"{' '.join(pieces)}; {', '.join(digests)}; {data.url}"


def corrections_text(data: DataSet) -> str:
    """Return the corrections of a data set by action, such as `corrections: 2 relabel, 1 delete`."""
    counts = ", ".join(f"{count} {action}" for action, count in sorted(data.corrections.items()))
    return f"corrections: {counts}" if counts else "corrections"


def usage_text(facts: VersionFacts) -> str:
    """Return the commands that use a version, each with what it does."""
    rows = dict(_usage(facts))
    width = min(max(map(len, rows)), _COMMAND)
    return "\n".join(f"{command.ljust(width)}  # {use}" for command, use in rows.items())


def _usage(facts: VersionFacts) -> Iterator[tuple[str, str]]:
    uri = facts.uri
    data = next((data.url for use, data in facts.data if use == "validation"), "URL")
    yield f"detr evaluate {uri} --data {data}", "score it again, or on other data"
    yield f"detr predict {uri} *.jpg --out found", "detect"
    yield f"mlflow models serve -m {uri}", "serve it"
    if facts.config:
        yield f"detr resume {facts.run_id[:8]} --epochs {facts.config.optim.epochs * 2}", "train its run longer"
    yield f"detr train finetune --initial {uri} --data.train URL --data.val URL", "fine-tune it"
    yield f"detr lineage {uri}", "follow it to the annotations"
