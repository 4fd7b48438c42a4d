"""Fixed-point iterations that reach their end in fewer rounds, over the ranks."""

from __future__ import annotations

import numpy as np

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.reduction.sums import exact_sum

# penalty on the squares of the coefficients, over that of the step: the last tenth of it is not worth large ones
_PENALTY = 1e-2


class Acceleration:
    """Anderson's acceleration of x -> G(x).

    The last steps G(x) - x tell how the iteration goes on; the combination of the last states for which the steps
    cancel best is nearer to the end than the last state. Every rank has its part of the state; inner products, a few
    numbers, are summed over the ranks. Where G has kinks and steps, as from weights of outliers and observations that
    come and go, large coefficients lead far away: they are penalised, and the history is dropped when a step is longer
    than one before.

    References
    ----------
    Anderson (1965). J. ACM 12, 547. Walker & Ni (2011). SIAM J. Numer. Anal. 49, 1715.
    Scieur, d'Aspremont & Bach (2020). Math. Program. 179, 47: the penalty, in proportion to the squared step.
    """

    def __init__(self, comm: Communicator, depth: int = 6) -> None:
        self._comm, self._depth = comm, depth
        self.forget()

    def forget(self) -> None:
        """Begin anew, as when G has changed."""
        self._states: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []
        self._size = np.inf

    def next(self, state: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Where to go on. Collective.

        Parameters
        ----------
        state
            (n,) G(x), this rank's part.
        step
            (m,) G(x) - x in whatever units make the squares of its elements comparable; what all ranks share must be
            zero on all but one.
        """
        size = float(exact_sum(self._comm, step[:, None] ** 2)[0])
        if size > self._size:
            self.forget()
        self._size = min(size, self._size)
        self._states = [*self._states[-self._depth :], state]
        self._steps = [*self._steps[-self._depth :], step]
        if len(self._steps) == 1 or size == 0:
            return state
        differences = np.diff(np.array(self._steps), axis=0)
        products = differences[:, None] * np.concatenate([differences, step[None]])
        inner = exact_sum(self._comm, products.reshape(-1, len(step)).T).reshape(products.shape[:2])
        matrix, right = inner[:, :-1], inner[:, -1]
        share = np.linalg.solve(matrix + _PENALTY * size * np.eye(len(matrix)), right)
        for part, difference in zip(share, np.diff(np.array(self._states), axis=0)):
            state = state - part * difference
        return state
