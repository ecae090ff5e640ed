"""The options of `detr resume` that change a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.errors import RunConfigError
from shards.store import storage


@dataclass(frozen=True)
class ResumeOptions:
    """Changes of the configuration when a run is resumed; None keeps a value."""

    epochs: int | None = None
    """New total number of epochs, not below the old one."""
    batch_size: int | None = None
    """New global batch size."""
    data: str | None = None
    """Folder or URL of new training data."""
    accept: bool = False
    """Continue although the stream of samples is another one, because data or batch size changed."""

    def of(self, config: RunConfig) -> RunConfig:
        """Return the configuration with these changes; raise `RunConfigError` for fewer epochs than before."""
        optim, data = config.optim, config.data
        if self.epochs is not None:
            if self.epochs < optim.epochs:
                raise RunConfigError(
                    f"--epochs {self.epochs} is less than the run's {optim.epochs}; expected as many or more: "
                    "start a new run for a shorter schedule"
                )
            optim = replace(optim, epochs=self.epochs, max_steps=0)
        if self.batch_size is not None:
            optim = replace(optim, batch_size=self.batch_size)
        if self.data is not None:
            data = replace(data, train=storage.absolute(self.data), built_in=False)
        return replace(config, optim=optim, data=data)
