"""What is written appears whole or not at all, and what is removed is gone at once: one home for files that matter.

A new file or folder is made beside its place as `.NAME.partial-<12 hex digits>`, flushed to the disk and renamed. Its
maker holds a lock on it, which ends with the process, however that ends: what nobody holds was left by a killed run,
and whoever makes the same file or folder next removes it. Errors name the file that was meant and say what became of
it; a full disk is DiskFull. A new verb of this kind goes here, never beside its caller.
"""

from __future__ import annotations

from qnext.files.folders import copy_inside, new_folder, remove_folder, scratch_folder, write_inside
from qnext.files.partial import is_partial, remove_partials
from qnext.files.single import append, move_file, new_file, write_file
from qnext.files.writing import NewFile, sync_folder

__all__ = [
    "NewFile",
    "append",
    "copy_inside",
    "is_partial",
    "move_file",
    "new_file",
    "new_folder",
    "remove_folder",
    "remove_partials",
    "scratch_folder",
    "sync_folder",
    "write_file",
    "write_inside",
]
