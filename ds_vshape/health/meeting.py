"""A piece of work in which all ranks wait for each other, and which succeeds on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from ds_vshape.comm.channels import PeerLost
from ds_vshape.health.failures import Agreement


class Meeting:
    """A context in which each rank does its part; an error in it on one rank is raised on all, as `Agreement.reach`
    does.

    A rank that has failed never gets to a point where the others wait for it, so `meet` must be called before each
    such point.

    Args:
        what: a noun that names the work, the same on every rank.
        explain: what is raised, on this rank and on the others, for an error of this rank.
    """

    def __init__(self, agreement: Agreement, what: str, explain: Callable[[Exception], Exception]) -> None:
        self._agreement, self._what, self._explain = agreement, what, explain
        self._over = False

    def meet(self) -> None:
        """Return if no rank has failed so far, else raise as the context does; collective."""
        try:
            self._agreement.reach(None, self._what)
        except Exception:
            self._over = True
            raise

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._over or isinstance(error, PeerLost) or not isinstance(error, (Exception, type(None))):
            return
        failure = None
        if error is not None:
            explained = self._explain(error)
            if explained is not error:
                explained.__cause__ = error
            failure = self._agreement.failure(explained, self._what)
        self._agreement.reach(failure, self._what)
