"""`Pathfinder`: being written."""

from pushforward._runner import Runner
from pushforward._types import Key
from pushforward.methods._base import Draws, Method
from pushforward.model.inverse import InverseProblem


class Pathfinder(Method):
    """Being written."""

    def run(self, problem: InverseProblem, key: Key, draws: int, runner: Runner) -> Draws:
        """See `Method.run`."""
        raise NotImplementedError
