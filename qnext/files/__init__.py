"""Publishes files and folders, which appear whole or not at all. All code that writes uses this.

A new file or folder is made beside its place as `.NAME.partial-<12 hex digits>`, flushed to the disk and renamed. Its
maker holds a lock on it, which ends with the process. What nobody holds was left by a killed run, and whoever makes
the same file or folder next removes it. What takes too long to be made twice is `NAME.unfinished`, and the next run
goes on with it. Errors name the file that was meant; a full disk is DiskFull. Imports errors alone. A new kind of
publication goes here, never beside its caller.
"""

from __future__ import annotations

from qnext.files.folders import copy_inside, new_folder, remove_folder, scratch_folder, write_inside
from qnext.files.partial import is_partial, remove_partials
from qnext.files.single import append, move_file, new_file, remove_file, write_file
from qnext.files.unfinished import Unfinished, remove_finished, unfinished_folder
from qnext.files.writing import NewFile, sync_folder

__all__ = [
    "NewFile",
    "Unfinished",
    "append",
    "copy_inside",
    "is_partial",
    "move_file",
    "new_file",
    "new_folder",
    "remove_file",
    "remove_finished",
    "remove_folder",
    "remove_partials",
    "scratch_folder",
    "sync_folder",
    "unfinished_folder",
    "write_file",
    "write_inside",
]
