"""Errors that are the user's to mend. Each carries the exit code of the command line."""

from __future__ import annotations


class QnextError(ValueError):
    """One clear line for the user; `exit_code` is what the process ends with."""

    exit_code = 2


class UsageError(QnextError):
    """Contradictory or impossible arguments."""

    exit_code = 2


class ModelNotFound(QnextError):
    """No such folder, preset or hub name."""

    exit_code = 3


class DoesNotFit(QnextError):
    """The request needs more memory or context than there is; the message says what would fit."""

    exit_code = 4


class CorruptCheckpoint(QnextError):
    """A checkpoint file is damaged or contradicts another; the message names file and key or tensor."""

    exit_code = 5


class ConfigError(CorruptCheckpoint):
    """A configuration value is unknown, missing or contradictory; the message names file and key."""


class ConstraintFailed(QnextError):
    """The output of one request cannot follow its constraint any further; only that request ends."""

    exit_code = 2
