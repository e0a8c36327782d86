"""Every exception that gradflow raises on its own account.

Each message says what was expected, what came, the likely cause and the fix. A finding about a model is
never an exception: it is data in a record.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class GradflowError(Exception):
    """The base of gradflow's own exceptions."""


class RecordFormatError(GradflowError, ValueError):
    """The data is not a record of this format."""

    @classmethod
    def at(cls, detail: str) -> RecordFormatError:
        """Return the error for what `detail` says is wrong with the data."""
        return cls(
            f"from_json: {detail}. Pass what to_json() of the same version of gradflow wrote, or the path of "
            "a file of it."
        )


class RecordInputError(GradflowError, TypeError):
    """What was passed as a record, or as issues or causes, is none."""


class MeasurementError(GradflowError, TypeError):
    """What a measurement gives, or a record of one's own, cannot be kept, or has a name that is taken."""


class UnknownLayerError(GradflowError, KeyError):
    """No layer, parameter or node has this name."""

    @classmethod
    def at(cls, name: str, known: Sequence[str]) -> UnknownLayerError:
        """Return the error for `name`, with those of the `known` names that are nearest to it."""
        if not known:
            return cls(f"no entry named {name!r}: there are no names at all.")
        near = difflib.get_close_matches(str(name), known, n=5, cutoff=0.3) or list(known[:5])
        return cls(f"no entry named {name!r}. The nearest of {len(known)} names: {', '.join(near)}.")

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which garbles a sentence
        return str(self.args[0])


class GraphUnavailableError(GradflowError, RuntimeError):
    """The run holds no layer graph, or no flow on it."""


class ModelInputError(GradflowError, TypeError):
    """What was passed as a model, a batch or a loss cannot be used as one."""


class LossError(GradflowError, ValueError):
    """The loss is not a scalar that carries a gradient."""


class NoTrainableParametersError(GradflowError, ValueError):
    """The model has no parameter that requires a gradient."""


class ModelNotCalledError(GradflowError, RuntimeError):
    """A step ran without any layer of the model being called."""


class OtherThreadError(GradflowError, RuntimeError):
    """A layer was called in another thread than the one that measures."""

    @classmethod
    def at(cls, layer: str, kind: str, thread: str, own: str) -> OtherThreadError:
        """Return the error for a layer, of a class, that was called in one thread, and measured in `own`."""
        return cls(
            f"{layer or 'the model'!r} ({kind}) was called in the thread {thread!r} while {own!r} measures "
            "the model. Autograd keeps its books by thread, so a gradient may be put down to a wrong layer. "
            "Either the model runs branches in threads of its own: run them one after the other for the "
            "measurement, `[branch(x) for branch in branches]`. Or another thread uses the model meanwhile: "
            "let it wait."
        )


class OptimizerMismatchError(GradflowError, ValueError):
    """What was passed as an optimizer is none, or holds none of the model's parameters."""


class EmptyBatchesError(GradflowError, ValueError):
    """There was no batch at all."""


class NotRestoredError(GradflowError, RuntimeError):
    """Something that the run changed could not be put back; everything else was."""

    @classmethod
    def of(cls, failures: Sequence[str]) -> NotRestoredError:
        """Return the error for objects that could not be put back, each with the reason."""
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        return cls(
            f"{len(failures)} of the objects that the model holds could not be put back as they were before "
            f"the run; all others were. {'; '.join(failures[:3])}{more}. The model changes them when it is "
            "called, and they refuse to be written to: keep such an object out of the model's attributes, or "
            "analyse a copy of the model, `copy.deepcopy(model)`."
        )


class ModelCallError(GradflowError, RuntimeError):
    """The model cannot be differentiated in the way asked for; the exception it raised is the `__cause__`."""


class ProcessError(GradflowError, RuntimeError):
    """Another process of an analysis has raised, is gone, or never came.

    Args:
        text: what happened.
        told: whether all processes know of it.
    """

    def __init__(self, text: str = "", *, told: bool = False) -> None:
        super().__init__(text)
        self.told = told


class PipelineError(GradflowError, TypeError):
    """What was passed as a pipeline, a detector, a rule or a type of issue cannot be used as one."""


class RemedyError(GradflowError, ValueError):
    """A remedy is none, or cannot be applied to this model; in a trial, the reason why it was not tried."""


class NotAnalyzedError(GradflowError, RuntimeError):
    """An analyzer was asked for what it has only after a run."""

    @classmethod
    def at(cls, analyzer: str) -> NotAnalyzedError:
        """Return the error for an analyzer of that class."""
        return cls(f"{analyzer}: nothing was analysed yet. Call analyze(input_fn, loss_fn) first.")


def check_one_source(input_fn: object, forward_fn: object) -> None:
    """Check that a run is given either batches or a forward of its own.

    Raises:
        ModelInputError: if it is given neither or both.
    """
    if (input_fn is None) == (forward_fn is None):
        raise ModelInputError(
            f"analyze was given {'both' if input_fn is not None else 'neither'} of input_fn and forward_fn, "
            "and needs one: batches to call the model with, or a function of (model, step) that calls it."
        )
