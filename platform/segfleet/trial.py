"""A trial as Ray Tune sees it: reports that come from a group of workers, and the word whether it goes on.

Imports little, because its process is started for each trial that runs beside others.
"""

from typing import Any

import ray
from ray import tune

from segfleet.faults import fault


class Trial(tune.Trainable):
    """One trial on the group of workers that its settings name; Tune uses the process again for the next one.

    Whoever starts it anew after its process died hears the last report again: none is lost, none decided twice.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Give the group its task; a group that has it already goes on with it."""
        self._group = ray.get_actor(config["group"])
        self._heard = -1
        ray.get(self._group.train.remote(config["task"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial in this process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Let the trial go on and wait for its next report, or its end."""
        event: Any = ray.get(self._group.next_event.remote(self._heard))
        fault("trial.heard")
        self._heard = event[0]
        return dict(event[1])
