"""What tuning found, kept: one JSON file per question, looked up when a plan is made.

A `Question` is asked by an operator ("which config for these heads, dtypes, this machine"), a bucket of shapes makes it
an exact key, a `Record` answers it. Layers (folders, packs) hold records; the `Scope` in force says which layers are
asked, and where new records go. Nothing here measures anything; that is `flashloom.tune`.
"""

from flashloom.records.folder import Folder, Layer, Memory
from flashloom.records.question import Question, bucket_of, ceil_power
from flashloom.records.record import FORMAT, Record, Rejected, Tried, parse
from flashloom.records.scope import (
    Counters,
    Scope,
    add_layer,
    base,
    current,
    default_root,
    entered,
    find,
    forget,
    published,
)

__all__ = [
    "FORMAT", "Counters", "Folder", "Layer", "Memory", "Question", "Record", "Rejected", "Scope", "Tried", "add_layer",
    "base", "bucket_of", "ceil_power", "current", "default_root", "entered", "find", "forget", "parse", "published",
]  # fmt: skip
