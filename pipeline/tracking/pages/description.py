"""Description of a run as Markdown, which its page in MLflow shows: how good, how far, from what, and how to continue.

The driver rewrites it at each evaluation, each minute while it follows the run, and when it sets the final status. So it
is as true as the store: after an outage, the command that sends the rest of the points rewrites it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config import RunConfig
from pipeline.figures import DECIDING, deciding_name
from pipeline.tracking.pages.data import data_of_run
from pipeline.tracking.pages.links import artifact, commit_text, run_page
from pipeline.tracking.pages.parameters import differing
from pipeline.tracking.pages.pictures import CURVES, DETECTIONS, REPORT, newest_small
from pipeline.tracking.progress import read_progress
from pipeline.tracking.tags import (
    TAG_COMMIT,
    TAG_EPOCHS,
    TAG_FOLDER,
    TAG_HARDWARE,
    TAG_INITIAL_WEIGHTS,
    TAG_LEFT_OUT,
    TAG_PHASE,
    TAG_REPOSITORY,
    TAG_STREAM,
    TAG_TOTAL_STEPS,
    TAG_VERSIONS,
    TAG_WARNING,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

MOST_TEXT = 4900
"""Characters of a description; MLflow's servers refuse tags of 5000."""
_SHOWN = 12  # characters of a digest
_LONGEST = 60  # characters without a space
_OPTIONS = 10  # options in a line
_ENDS = {
    "finished": "**Finished**",
    "stopped": "**Stopped**: what is saved is kept",
    "killed": "**Killed**: what is saved is kept",
    "failed": "**Failed**",
}


class Scored(NamedTuple):
    """Metrics of an evaluation."""

    step: int
    epoch: float
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        """Name of `deciding`."""
        name = DECIDING[deciding_name(self.metrics)]
        return name[0].upper() + name[1:]

    @property
    def deciding(self) -> float:
        """Figure by which checkpoints are compared: PQ of panoptic data, AP of masks if they are predicted, or AP."""
        return self.metrics.get(deciding_name(self.metrics), -1.0)


def describe(
    run: Run, config: RunConfig, scores: Sequence[Scored], versions: Iterable[str] = (), now: datetime | None = None
) -> str:
    """Return the description of a run with these evaluations and registered versions (`NAME/VERSION`)."""
    now, tags = now or datetime.now(UTC), run.data.tags
    blocks = [
        f"{_headline(scores)} {_position(run, now)} {_origin(run)} {_call(tags)}",  # MLflow shows a few lines at first
        _scores(scores),
        _warnings(tags),
        _pictures(run, bool(scores)),
        _facts(run, config),
        _commands(run, config, list(versions)),
        f"*Rewritten {now:%Y-%m-%d %H:%M} UTC.*",
    ]
    return _fitted([block for block in blocks if block])


def _fitted(blocks: list[str]) -> str:
    """Return the blocks as a text that MLflow shows whole: lines of the longest one go first, the commands stay."""
    text = "\n\n".join(blocks)
    while len(text) > MOST_TEXT:
        longest = max(range(len(blocks) - 2), key=lambda number: len(blocks[number]))
        shorter, _, last = blocks[longest].rpartition("\n")
        blocks[longest] = shorter or last[: -(len(text) - MOST_TEXT)]
        text = "\n\n".join(blocks)
    return text


def _headline(scores: Sequence[Scored]) -> str:
    if not scores:
        return "Not evaluated yet."
    best = _best(scores)
    return f"**{best.name} {best.deciding:.3f}** at best (epoch {best.epoch:g}), {scores[-1].deciding:.3f} now."


def _best(scores: Sequence[Scored]) -> Scored:
    return max(scores, key=lambda score: (score.deciding, score.step))


def _origin(run: Run) -> str:
    data = ", ".join(f"{use} {data.name} `{data.digest[:_SHOWN]}`" for use, data in data_of_run(run))
    commit = commit_text(run.data.tags.get(TAG_COMMIT, "unknown"), run.data.tags.get(TAG_REPOSITORY, ""))
    return f"Data: {data}. Commit {commit}." if data else f"Commit {commit}."


def _call(tags: dict[str, str]) -> str:
    count = sum(name.startswith(TAG_WARNING) and bool(text) for name, text in tags.items()) + (TAG_LEFT_OUT in tags)
    return f"**{count} warning{'s' if count > 1 else ''}**, below." if count else "No warnings."


def _position(run: Run, now: datetime) -> str:
    tags, progress = run.data.tags, read_progress(run.data.tags)
    phase = tags.get(TAG_PHASE, "starting")
    words = [_ENDS.get(phase, f"**{phase.capitalize()}**")]
    if progress:
        total, epochs = int(tags.get(TAG_TOTAL_STEPS, 0)), float(tags.get(TAG_EPOCHS, 0))
        words.append(f"epoch {progress.epoch:.3g} of {epochs:g}, step {progress.step:,} of {total:,}")
        end = progress.ends
        if end and phase not in _ENDS:
            when = end.astimezone(UTC)
            words.append(
                f"ends about {when:%Y-%m-%d %H:%M} UTC" if when > now else "the forecast of its end has passed"
            )
    if phase in _ENDS and run.info.end_time:
        words.append(f"ended {datetime.fromtimestamp(run.info.end_time / 1000, UTC):%Y-%m-%d %H:%M} UTC")
    resume = f"`detr resume {run.info.run_id[:8]}"
    words.append(f"{resume} --epochs N` trains it longer" if phase == "finished" else f"{resume}` continues it")
    return "; ".join(words) + "."


def _scores(scores: Sequence[Scored]) -> str:
    if not scores:
        return ""
    best = _best(scores)
    names = [name for name in ("PQ", "AP", "AP50", "AP75", "mask_AP", "mask_AP50") if name in best.metrics]
    rows = [("newest", scores[-1]), ("**best**", best)] if best is not scores[-1] else [("**newest and best**", best)]
    lines = [
        "| | " + " | ".join([*(name.replace("_", " ") for name in names), "epoch", "step"]) + " |",
        "|---|" + "---|" * (len(names) + 2),
    ]
    for title, score in rows:
        figures = [f"{score.metrics[name]:.3f}" if name in score.metrics else "-" for name in names]
        lines.append("| " + " | ".join([title, *figures, f"{score.epoch:g}", f"{score.step:,}"]) + " |")
    return "\n".join(lines)


def _warnings(tags: dict[str, str]) -> str:
    found = [text for name, text in sorted(tags.items()) if name.startswith(TAG_WARNING) and text]
    found += [f"left out: {tags[TAG_LEFT_OUT]}"] if TAG_LEFT_OUT in tags else []
    if not found:
        return ""
    return "**Warnings**\n\n" + "\n".join(f"- {_plain(text)[:400]}" for text in found)


def _pictures(run: Run, evaluated: bool) -> str:
    experiment, run_id = run.info.experiment_id, run.info.run_id
    if not evaluated:
        return ""
    page = run_page(experiment, run_id, f"artifacts/{REPORT}")
    charts = run_page(experiment, run_id, "model-metrics")
    detections, curves = (artifact(run_id, newest_small(key)) for key in (DETECTIONS, CURVES))
    return (
        f"[Report with classes, errors and worst images]({page}), [curves]({charts})\n\n"
        f"![detections beside the truth]({detections})\n\n![precision over recall]({curves})"
    )


def _facts(run: Run, config: RunConfig) -> str:
    tags = run.data.tags
    rows = [(f"{use} data", f"{data}, digest `{data.digest[:_SHOWN]}`, {data.url}") for use, data in data_of_run(run)]
    rows.append(("recipe", _recipe(config)))
    commit = commit_text(tags.get(TAG_COMMIT, "unknown"), tags.get(TAG_REPOSITORY, ""))
    rows.append(("code", f"commit {commit}"))
    rows += [
        (title, tags[tag])
        for title, tag in (
            ("initial weights", TAG_INITIAL_WEIGHTS),
            ("changes of the data", TAG_STREAM),
            ("hardware", TAG_HARDWARE),
            ("versions", TAG_VERSIONS),
            ("location", TAG_FOLDER),
        )
        if tags.get(tag)
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {title} | {_plain(text)[:600]} |" for title, text in rows)


def _recipe(config: RunConfig) -> str:
    changed = [
        f"{name} {value or 'none'} (recipe: {usual or 'none'})" for name, (value, usual) in differing(config).items()
    ]
    more = f" and {len(changed) - _OPTIONS} more" if len(changed) > _OPTIONS else ""
    return f"`{config.recipe or 'none'}`" + (
        f" with {', '.join(changed[:_OPTIONS])}{more}" if changed else ", unchanged"
    )


def _commands(run: Run, config: RunConfig, versions: Sequence[str]) -> str:
    handle = run.info.run_id[:8]
    rows = _command_rows(handle, config, versions)
    # The use above its command: a longer line would widen the page.
    return "```\n" + "\n".join(f"# {use}\n{command}" for command, use in rows) + "\n```"


def _command_rows(handle: str, config: RunConfig, versions: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield f"detr runs {handle} --follow", "follow it"
    yield f"detr resume {handle}", "continue it after a stop"
    yield f"detr resume {handle} --epochs {config.optim.epochs * 2}", "train it longer"
    if not versions:
        yield f"detr register {handle} --name {config.model_name} --alias best", "make its best checkpoint a version"
    model = f"models:/{versions[-1] if versions else config.model_name + '@best'}"
    yield f"detr evaluate {model} --data {config.data.val}", "evaluate it"
    yield f"detr predict {model} *.jpg --out found", "detect"
    yield f"mlflow models serve -m {model}", "serve it"


def _plain(text: str) -> str:
    """Return a text that stays in its cell of a table; a long path keeps its end, or it would widen the whole page."""
    words = text.replace("|", "/").split()
    return " ".join(word if len(word) <= _LONGEST else f"...{word[-_LONGEST:]}" for word in words)
