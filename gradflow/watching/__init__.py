"""A training seen over time: when to look, what a look shows, what is certain of it, and where it is kept.

May import from every part above it in the layout; `gradflow.integrations` builds on it.
"""

from gradflow.watching.log import read_history
from gradflow.watching.monitor import Monitor
from gradflow.watching.observer import Observer, observer
from gradflow.watching.state import ObserverState

__all__ = ["Monitor", "Observer", "ObserverState", "observer", "read_history"]
